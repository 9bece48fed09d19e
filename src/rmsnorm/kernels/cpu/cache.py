"""Keeps the machine code of the CPU kernels in the user's cache folder."""

import contextlib
import functools
import hashlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import llvmlite
import numba

from rmsnorm import compat, kernels
from rmsnorm.errors import one_line
from rmsnorm.kernels.host import build


class KernelCache:
    """The machine code of a function on disk, one file for each signature, so that reading needs no lock.

    The checksum of a file covers its function, signature, processor, source and versions, so a renamed file is not
    loaded. The files are executed, so both the folder and the file must belong to the user or root.

    fault: why compiled code is not kept on disk; None if it is.
    """

    _waits = True  # whether to wait for other processes that compile; false after one wait timed out

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function.__qualname__, tuple(cell.cell_contents for cell in function.__closure__ or ())
        self._folder: Path | None = None
        self.fault: str | None = "this version of Numba does not allow others to store what it compiles"
        with self._noting_faults():
            self._folder = _usable_folder()

    def result(self, signature: Any, compile: Callable[[], Any]) -> Any:
        """The compiled function, from its file if there is one; otherwise compiles it and writes the file."""
        if self._folder is None:
            return compile()
        self.fault = None
        found = self._load(self._folder, signature)
        if found is None:
            with self._lock(self._folder):
                found = self._load(self._folder, signature)  # another process may have compiled it meanwhile
                if found is None:
                    found = compile()
                    with self._noting_faults():
                        self._save(self._folder, signature, found)
        return found

    def _file(self, folder: Path, signature: Any) -> tuple[Path, bytes]:
        """The path of a signature's file, and the bytes that its checksum covers besides the content."""
        about = repr((self._function, signature, compat.numba_processor())).encode()
        name = f"{self._function[0].split('.')[0]}.{hashlib.sha256(about).hexdigest()[:16]}.nbc"
        return folder / name, _code_version() + about

    def _load(self, folder: Path, signature: Any) -> Any:
        """The compiled function; None if there is no file, or it is damaged or other users can write it."""
        with _ignoring_errors(), contextlib.ExitStack() as stack:
            path, about = self._file(folder, signature)
            file = build.opened(path)
            stack.callback(os.close, file)
            if build.distrust(os.fstat(file)) is None:
                content = build.unsealed(build.content(file), about)
                return None if content is None else compat.numba_unpacked(content)
        return None

    def _save(self, folder: Path, signature: Any, result: Any) -> None:
        path, about = self._file(folder, signature)
        build.write(str(path), build.sealed(compat.numba_packed(result), about), 0o644)

    @contextlib.contextmanager
    def _lock(self, folder: Path) -> Iterator[None]:
        """Lets one process compile while the others wait for its result, up to a timeout."""
        with contextlib.ExitStack() as stack:
            with _ignoring_errors():
                try:
                    timeout = 10 if KernelCache._waits else 0
                    stack.enter_context(filelock.FileLock(folder / "rmsnorm.compiling", timeout, mode=0o600))
                except filelock.Timeout:
                    KernelCache._waits = False
            yield

    @contextlib.contextmanager
    def _noting_faults(self) -> Iterator[None]:
        with _ignoring_errors():
            try:
                yield
            except Exception as error:
                where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
                self.fault = f"{where}{one_line(error)}"
                raise


@contextlib.contextmanager
def _ignoring_errors() -> Iterator[None]:
    """Suppresses errors of the cache, which is optional; compiling reports any error that matters."""
    try:
        yield
    except Exception as error:
        if kernels.raised_by_signal_handler(error):
            raise


# The files that machine code is made from: the kernels, how they are compiled, and all that the kernels import.
SOURCES = tuple(
    Path(kernels.__file__).parents[1] / name
    for name in (
        "gated_reference.py", "kernels/cpu/compiling.py", "kernels/cpu/gated_kernels.py", "kernels/cpu/intrinsics.py",
        "kernels/cpu/kernels.py",
    )
)  # fmt: skip


@functools.cache
def _code_version() -> bytes:
    """Identifies what all machine code depends on: the sources, and the versions of Numba, llvmlite and Python."""
    versions = numba.__version__, llvmlite.__version__, sys.version
    return b"".join(source.read_bytes() for source in SOURCES) + repr(versions).encode()


def _usable_folder() -> Path:
    """The cache folder, which is made if necessary; then unused folders of other versions are removed.

    Raises:
        OSError: If it cannot be made, or another user could write to it.
    """
    if not hasattr(os, "geteuid"):
        raise OSError("this system does not report the owners of files")
    folder = _folder()
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    is_new = False
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        is_new = True
    _check_own(folder)
    build.mark_used(folder)
    if is_new:
        build.remove_unused_beside(folder)
    return folder


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
