"""Compiles the CPU kernels and caches their machine code in the user's cache folder."""

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


@functools.cache
def compiled(kernel: Callable[..., None], *pointees: Any) -> Any:
    """The kernel as machine code that takes pointers to these types and two integers; if it cannot be compiled, why."""
    return _code(kernel, [types.CPointer(pointee) for pointee in pointees], 2)


@functools.cache
def compiled_drain(pointers: int) -> Any:
    return _code(drain(pointers), [types.CPointer(types.int64)], 0)


@functools.cache
def compiled_wait() -> Any:
    return _code(wait, [types.CPointer(types.int64)], 0)


def _code(function: Callable[..., None], pointers: Sequence[Any], integers: int) -> Any:
    """A ctypes function, which releases the GIL and takes addresses as integers; if it cannot be compiled, why."""
    code = _Code(function, sigutils.normalize_signature(types.void(*pointers, *[types.int64] * integers)))
    try:
        code.compile()
    except Exception as error:  # the reference can compute whatever the error is
        if kernels.raised_by_signal_handler(error):
            raise
        said = str(error).strip().partition("\n")[0]
        return f"Numba cannot compile the kernel: {type(error).__name__}: {said}"
    callable_ = ctypes.CFUNCTYPE(None, *[_POINTER] * len(pointers), *[_WORD] * integers)(code.address)
    callable_.keeps, callable_.address = code, code.address  # type: ignore[attr-defined]  # keeps the code alive
    return callable_


_CFunc: Any = ccallback.CFunc


class _Code(_CFunc):  # type: ignore[misc]
    """A function that Numba compiles, or that is loaded from the cache."""

    def __init__(self, function: Callable[..., None], signature: Any) -> None:
        super().__init__(function, signature, locals={}, options={"error_model": "numpy"})
        self._kernel_cache: _KernelCache | None = None
        with _ignoring_cache_errors():
            self._kernel_cache = _KernelCache(function)

    def _compile_uncached(self) -> Any:
        if self._kernel_cache is None:
            return super()._compile_uncached()
        context = self._targetdescr.target_context
        found = self._kernel_cache.load(self._sig, context)
        if found is None:
            with self._kernel_cache.lock():
                found = self._kernel_cache.load(self._sig, context)  # another process may have compiled it meanwhile
                if found is None:
                    found = super()._compile_uncached()
                    self._kernel_cache.save(self._sig, found)
        return found


@contextlib.contextmanager
def _ignoring_cache_errors() -> Iterator[None]:
    """Suppresses errors of the cache, which is optional; compiling reports any error that matters."""
    try:
        yield
    except Exception as error:
        if kernels.raised_by_signal_handler(error):
            raise


class _KernelCache:
    """The machine code of a function on disk, one file for each signature, so that reading needs no lock.

    The checksum of a file covers its function, signature, processor, source and versions, so a renamed file is not
    loaded. The files are executed, so both the folder and the file must belong to the user or root.
    """

    _waits = True  # whether to wait for other processes that compile; false after one wait timed out

    def __init__(self, function: Callable[..., None]) -> None:
        constants = tuple(cell.cell_contents for cell in function.__closure__ or ())
        self._function = function.__qualname__, constants
        self._folder = _folder()
        self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        _check_own(self._folder)

    def _file(self, signature: Any, context: Any) -> tuple[Path, bytes]:
        """The path of a signature's file, and what its checksum covers besides the content."""
        about = repr((self._function, signature, context.codegen().magic_tuple())).encode()
        name = f"{self._function[0].split('.')[0]}.{hashlib.sha256(about).hexdigest()[:16]}.nbc"
        return self._folder / name, _code_version() + about

    def load(self, signature: Any, context: Any) -> Any:
        """The compiled function; None if there is no file, or it is damaged or other users can write it."""
        with _ignoring_cache_errors(), contextlib.ExitStack() as stack:
            context.refresh()
            path, about = self._file(signature, context)
            file = build.opened(path)
            stack.callback(os.close, file)
            if build.distrust(os.fstat(file)) is None:
                content = build.unsealed(build.content(file), about)
                return None if content is None else CompileResult._rebuild(context, *pickle.loads(content))
        return None

    def save(self, signature: Any, result: Any) -> None:
        with _ignoring_cache_errors():
            content = dumps(result._reduce())
            path, about = self._file(signature, cpu_target.target_context)
            build.write(str(path), build.sealed(content, about), 0o644)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lets one process compile while the others wait for its result, up to a timeout."""
        with contextlib.ExitStack() as stack:
            with _ignoring_cache_errors():
                try:
                    timeout = 10 if _KernelCache._waits else 0
                    stack.enter_context(filelock.FileLock(self._folder / "rmsnorm.compiling", timeout, mode=0o600))
                except filelock.Timeout:
                    _KernelCache._waits = False
            yield


@functools.cache
def _code_version() -> bytes:
    """What all machine code depends on: the source, and the versions of Numba, llvmlite and Python."""
    versions = numba.__version__, llvmlite.__version__, sys.version
    sources = [Path(__file__).with_name(name).read_bytes() for name in ("kernels.py", "compiling.py")]
    return b"".join(sources) + repr(versions).encode()


def _folder() -> Path:
    """The cache folder; not beside the sources, where the files would survive uninstalling the package.

    Each version of source and compiler has its own, so that environments do not overwrite each other's files.
    """
    given = os.environ.get("RMSNORM_CACHE_DIR") or numba.config.CACHE_DIR
    if given:
        base = Path(given).absolute()
    else:
        xdg = os.environ.get("XDG_CACHE_HOME", "")
        base = (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "rmsnorm"
    return base / f"numba-{hashlib.sha256(_code_version()).hexdigest()[:16]}"


def _check_own(folder: Path) -> None:
    """Raises PermissionError if another user can write to the folder or replace it."""
    own, around = folder.lstat(), folder.parent.stat()
    fault = build.distrust(own) if stat.S_ISDIR(own.st_mode) else "is no folder"
    if fault is not None:
        raise PermissionError(f"{folder} {fault}")
    if around.st_uid not in (0, os.geteuid()):
        raise PermissionError(f"{folder.parent} is another user's")
    if around.st_mode & stat.S_IWOTH and not around.st_mode & stat.S_ISVTX:  # a sticky folder such as /tmp is safe
        raise PermissionError(f"{folder.parent} can be written by others")
