"""Compiles libraries atomically, and reads and writes files of machine code safely.

A file ends with a checksum, and is only trusted if other users cannot write it.

    python -I -S build.py PARENT TARGET COMMAND …

runs the compiler COMMAND and writes TARGET; if that fails, it writes the compiler's output to TARGET.failed. PARENT is
the pid of the process with which this one ends, or 0. The file imports only the standard library, so that the compiling
process starts fast and needs nothing that is installed.
"""

import contextlib
import ctypes
import fnmatch
import hashlib
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from typing import Any

_SECONDS = 600
_DIGEST = hashlib.sha256().digest_size
_SCRATCH = "scratch."
_ENDING = (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM))


# --- files of machine code -----------------------------------------------------------------------------------


def sealed(content: bytes, about: bytes = b"") -> bytes:
    """The content followed by a checksum of `about` and the content. A sealed shared library can still be loaded."""
    return content + hashlib.sha256(about + content).digest()


def unsealed(whole: bytes, about: bytes = b"") -> bytes | None:
    """The content without its checksum; None if it is truncated or modified, or was sealed with another `about`."""
    content = whole[:-_DIGEST]
    return content if len(whole) > _DIGEST and sealed(content, about) == whole else None


def opened(path: str | os.PathLike[str]) -> int:
    """Opens a file for reading and returns its descriptor. OSError if it is a symbolic link or not a regular file."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO would block
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(f"{path} is no regular file")
    return file


def distrust(found: os.stat_result) -> str | None:
    """Why code in a file or folder must not be executed; None if only this user and root can have written it."""
    if found.st_uid not in (0, os.geteuid()):
        return "is another user's"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by others, its mode is {stat.S_IMODE(found.st_mode):04o}"
    return None


def content(file: int) -> bytes:
    """Reads an open file to its end."""
    with open(file, "rb", closefd=False) as stream:
        return stream.read()


def write(path: str, whole: bytes, mode: int = 0o600) -> None:
    """Atomically replaces the file at this path, or the symbolic link. Raises OSError if that fails."""
    file, scratch = tempfile.mkstemp(prefix=_SCRATCH, dir=os.path.dirname(path))
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(whole)
            stream.flush()
            os.fchmod(file, mode)
            os.fsync(file)  # otherwise a power cut could leave an incomplete file at the path
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(scratch)


# --- folders of machine code ---------------------------------------------------------------------------------

# The files that these folders hold. Each version of the package has its own folder, whose name ends in a hash.
_OURS, _NAME = ("*.nbc", "rmsnorm*", f"{_SCRATCH}*"), "(.+[-_])[0-9a-f]{16}"
_DAY = 24 * 60 * 60
_UNUSED = 30 * _DAY


def mark_used(folder: str | os.PathLike[str]) -> None:
    """Sets a folder's time to now, at most once a day, so that `remove_unused_beside` does not remove it."""
    with contextlib.suppress(OSError):  # a folder that cannot be written can still be read
        if time.time() - os.stat(folder).st_mtime > _DAY:
            os.utime(folder)


def remove_unused_beside(folder: str | os.PathLike[str]) -> None:
    """Removes the folders of other versions beside this one that nobody has used for 30 days.

    Processes that have loaded code from one of them keep it. A folder stays if it is another user's, if it holds
    anything that is not ours, or while another process compiles into it.
    """
    around, name = os.path.split(os.path.abspath(folder))
    kind = re.fullmatch(_NAME, name)
    with contextlib.suppress(OSError):
        for other in os.listdir(around):
            found = re.fullmatch(_NAME, other)
            if other != name and kind and found and found[1] == kind[1]:
                with contextlib.suppress(OSError):
                    _remove_if_unused(os.path.join(around, other))


def _remove_if_unused(folder: str) -> None:
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return
    names = os.listdir(folder)
    if not all(any(fnmatch.fnmatchcase(name, pattern) for pattern in _OURS) for name in names):
        return
    paths = [os.path.join(folder, name) for name in names]
    times = [max(info.st_mtime, info.st_atime) for info in map(os.lstat, paths)]
    if time.time() - max(found.st_mtime, *times, 0) < _UNUSED:
        return
    with contextlib.ExitStack() as stack:
        for path in paths:
            if path.endswith((".lock", ".compiling")):
                _hold(path, stack)  # fails if another process holds it
        for path in paths:
            _remove(path)
        os.rmdir(folder)


def _hold(lock: str, stack: contextlib.ExitStack) -> None:
    import fcntl  # Unix only

    file = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    stack.callback(os.close, file)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove(path: str) -> None:
    """Removes a file, a symbolic link or a folder, if possible."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.unlink(path)


# --- compiling -----------------------------------------------------------------------------------------------


def compiled(target: str, command: list[str], unblock: Any = ()) -> bool:
    """Runs the command with `-o FILE` appended and moves the result to the target. Returns whether that succeeded.

    If it fails, TARGET.failed holds the command and its output. If it is interrupted, the compiler's processes are
    killed and its files deleted. unblock: blocked signals to unblock in the compiler, and in this process while the
    compiler runs.
    """
    folder = os.path.dirname(target)
    said = b""
    scratch = None
    try:
        _sweep(folder)
        scratch = tempfile.mkdtemp(prefix=_SCRATCH, dir=folder)
        made, log = os.path.join(scratch, "made"), os.path.join(scratch, "log")
        try:
            _run([*command, "-o", made], scratch, log, unblock)
        finally:
            with contextlib.suppress(OSError), open(log, "rb") as stream:
                said = stream.read()
        with open(made, "rb") as stream:
            write(target, sealed(stream.read()), 0o700)
    except (OSError, subprocess.SubprocessError) as error:
        with contextlib.suppress(OSError):
            write(f"{target}.failed", first_line(command) + (said or os.fsencode(str(error))))
        return False
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.unlink(f"{target}.failed")
    remove_unused_beside(folder)
    return True


def _sweep(folder: str) -> None:
    """Deletes the scratch files of killed compilations. The caller holds the lock, so nobody else uses them."""
    for name in os.listdir(folder):
        if name.startswith(_SCRATCH):
            _remove(os.path.join(folder, name))


def _run(command: list[str], scratch: str, log: str, unblock: Any) -> None:
    """Runs the command in its own process group, so that an interruption can kill all of its processes."""
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, process_group=0,
            env={**os.environ, "TMPDIR": scratch},
            preexec_fn=(lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, unblock)) if unblock else None,
        )  # fmt: skip
    try:
        if unblock:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, unblock)
        process.wait(timeout=_SECONDS)
    finally:
        if unblock:
            signal.pthread_sigmask(signal.SIG_BLOCK, unblock)  # so that no signal interrupts the cleanup
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)


def first_line(command: list[str]) -> bytes:
    """The first line of TARGET.failed: the command."""
    return os.fsencode(shlex.join(command)) + b"\n"


def _end(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def _main(parent: int, target: str, command: list[str]) -> bool:
    os.nice(10)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # out of memory, the kernel kills the compiler before the user's program
    for number in _ENDING:
        signal.signal(number, _end)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    if parent:
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM), 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            return False
    return compiled(target, command, _ENDING)


if __name__ == "__main__":
    sys.exit(not _main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
