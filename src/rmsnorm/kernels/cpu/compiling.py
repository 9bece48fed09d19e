"""Compiles the kernels, and keeps their machine code in the user's cache folder."""

import contextlib
import ctypes
import functools
import hashlib
import os
import pickle
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import llvmlite.binding
import numba
import torch
from numba import types
from numba.core import ccallback, sigutils
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target
from numba.core.serialize import dumps

from rmsnorm import kernels
from rmsnorm.kernels.cpu.kernels import drain, wait
from rmsnorm.kernels.host import build

ELEMENT = {torch.float32: types.float32, torch.bfloat16: types.uint16, torch.float16: types.int16}
PAIR = types.uint32
_WORD, _POINTER = ctypes.c_int64, ctypes.c_void_p


FAILURES: list[str] = []  # what Numba said where it could not compile


@functools.cache
def compiled(kernel: Callable[..., None], *pointees: Any) -> Any:
    """The kernel as machine code: pointers to these types first, then two integers. None if it cannot be compiled."""
    return _code(kernel, [types.CPointer(pointee) for pointee in pointees], 2)


@functools.cache
def compiled_drain(pointers: int) -> Any:
    return _code(drain(pointers), [types.CPointer(types.int64)], 0)


@functools.cache
def compiled_wait() -> Any:
    return _code(wait, [types.CPointer(types.int64)], 0)


def _code(function: Callable[..., None], pointers: Sequence[Any], integers: int) -> Any:
    """Machine code that is called through ctypes, which releases the GIL, with addresses as plain integers."""
    code = _Code(function, sigutils.normalize_signature(types.void(*pointers, *[types.int64] * integers)))
    try:
        code.compile()
    except Exception as error:  # whatever it is, the reference can compute
        if kernels.is_of_a_signal(error):
            raise
        said = str(error).strip().partition("\n")[0]
        FAILURES.append(f"Numba cannot compile the kernel: {type(error).__name__}: {said}")
        return None
    callable_ = ctypes.CFUNCTYPE(None, *[_POINTER] * len(pointers), *[_WORD] * integers)(code.address)
    callable_.keeps, callable_.address = code, code.address  # type: ignore[attr-defined]  # the code lives as long
    return callable_


_CFunc: Any = ccallback.CFunc


class _Code(_CFunc):  # type: ignore[misc]
    """A function that Numba compiles to machine code, or has compiled before."""

    def __init__(self, function: Callable[..., None], signature: Any) -> None:
        super().__init__(function, signature, locals={}, options={"error_model": "numpy"})
        self._kept: _Kept | None = None
        with _whatever_ails_the_cache():
            self._kept = _Kept(function)

    def _compile_uncached(self) -> Any:
        if self._kept is None:
            return super()._compile_uncached()
        context = self._targetdescr.target_context
        found = self._kept.load(self._sig, context)
        if found is None:
            with self._kept.lock():
                found = self._kept.load(self._sig, context)  # what the process that we waited for compiled
                if found is None:
                    found = super()._compile_uncached()
                    self._kept.save(self._sig, found)
        return found


@contextlib.contextmanager
def _whatever_ails_the_cache() -> Iterator[None]:
    """Goes on without: a compilation says what is wrong, if anything is."""
    try:
        yield
    except Exception as error:
        if kernels.is_of_a_signal(error):
            raise


class _Kept:
    """The machine code of a function on disk, each signature in a file of its own.

    So reading takes no lock. The seal of a file covers its function, signature, processor, source and versions: a file
    that was renamed is not loaded. What is read is executed, hence the folder and the file must be the user's own.
    """

    _waits = True  # for other processes that compile, until one took too long

    def __init__(self, function: Callable[..., None]) -> None:
        constants = tuple(cell.cell_contents for cell in function.__closure__ or ())
        self._function = function.__qualname__, constants
        self._folder = _folder()
        self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        _check_own(self._folder)

    def _file(self, signature: Any, context: Any) -> tuple[Path, bytes]:
        """Its path, and what its seal is about."""
        about = repr((self._function, signature, context.codegen().magic_tuple())).encode()
        name = f"{self._function[0].split('.')[0]}.{hashlib.sha256(about).hexdigest()[:16]}.nbc"
        return self._folder / name, _made_from() + about

    def load(self, signature: Any, context: Any) -> Any:
        """What was compiled; None if there is no file, or it is damaged or not the user's own."""
        with _whatever_ails_the_cache(), contextlib.ExitStack() as stack:
            context.refresh()
            path, about = self._file(signature, context)
            file = build.opened(path)
            stack.callback(os.close, file)
            if build.distrust(os.fstat(file)) is None:
                content = build.unsealed(build.content(file), about)
                return None if content is None else CompileResult._rebuild(context, *pickle.loads(content))
        return None

    def save(self, signature: Any, result: Any) -> None:
        with _whatever_ails_the_cache():
            content = dumps(result._reduce())
            path, about = self._file(signature, cpu_target.target_context)
            build.write(str(path), build.sealed(content, about), 0o644)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process compiles while the others wait, so that they need not; but not for long."""
        with contextlib.ExitStack() as stack:
            with _whatever_ails_the_cache():
                try:
                    timeout = 10 if _Kept._waits else 0
                    stack.enter_context(filelock.FileLock(self._folder / "rmsnorm.compiling", timeout, mode=0o600))
                except filelock.Timeout:
                    _Kept._waits = False
            yield


@functools.cache
def _made_from() -> bytes:
    """What all machine code depends on: its source, and the versions of what compiles it."""
    versions = numba.__version__, llvmlite.__version__, sys.version
    sources = [Path(__file__).with_name(name).read_bytes() for name in ("kernels.py", "compiling.py")]
    return b"".join(sources) + repr(versions).encode()


def _folder() -> Path:
    """Where the machine code is kept: never beside the sources, where it would outlive the package.

    In a folder for each source and its compiler, so that environments of different versions do not replace each
    other's files.
    """
    given = os.environ.get("RMSNORM_CACHE_DIR") or numba.config.CACHE_DIR
    if given:
        base = Path(given).absolute()
    else:
        xdg = os.environ.get("XDG_CACHE_HOME", "")
        base = (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "rmsnorm"
    return base / f"numba-{hashlib.sha256(_made_from()).hexdigest()[:16]}"


def _check_own(folder: Path) -> None:
    """Raises PermissionError where anybody else can put files into the folder, or another folder in its place."""
    own, around = folder.lstat(), folder.parent.stat()
    fault = build.distrust(own) if stat.S_ISDIR(own.st_mode) else "is no folder"
    if fault is not None:
        raise PermissionError(f"{folder} {fault}")
    if around.st_uid not in (0, os.geteuid()):
        raise PermissionError(f"{folder.parent} is another user's")
    if around.st_mode & stat.S_IWOTH and not around.st_mode & stat.S_ISVTX:  # with it, as /tmp, others can only add
        raise PermissionError(f"{folder.parent} can be written by others")
