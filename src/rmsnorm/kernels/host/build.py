"""Files of machine code: compiled whole or not at all, sealed with a checksum, opened if nobody else can write them.

    python -I -S build.py PARENT TARGET COMMAND …

compiles, and beside the target, where that failed, leaves what the compiler said. PARENT: the process whose end is
this one's too, or 0. Only what a bare Python has, so that a process of its own can run it without what the first one
has loaded.
"""

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from typing import Any

_SECONDS = 600
_DIGEST = hashlib.sha256().digest_size
_SCRATCH = "scratch."
_ENDING = (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM))


# --- files that are executed ---------------------------------------------------------------------------------


def sealed(content: bytes, about: bytes = b"") -> bytes:
    """The content with a checksum after it, of what it is about too. A sealed library can be loaded as it is."""
    return content + hashlib.sha256(about + content).digest()


def unsealed(whole: bytes, about: bytes = b"") -> bytes | None:
    """The content; None if it was cut short, or changed, or is about something else."""
    content = whole[:-_DIGEST]
    return content if len(whole) > _DIGEST and sealed(content, about) == whole else None


def opened(path: str | os.PathLike[str]) -> int:
    """The descriptor of a file that is read. OSError if it is a symbolic link, or no regular file."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO would block
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(f"{path} is no regular file")
    return file


def distrust(found: os.stat_result) -> str | None:
    """Why what is in a file or folder must not be executed; None if only its user and root can have put it there."""
    if found.st_uid not in (0, os.geteuid()):
        return "is another user's"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by others, its mode is {stat.S_IMODE(found.st_mode):04o}"
    return None


def content(file: int) -> bytes:
    """All of an open file."""
    with open(file, "rb", closefd=False) as stream:
        return stream.read()


def write(path: str, whole: bytes, mode: int = 0o600) -> None:
    """Put a whole file in place of whatever has that name, a symbolic link too. OSError if that cannot be."""
    file, scratch = tempfile.mkstemp(prefix=_SCRATCH, dir=os.path.dirname(path))
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(whole)
            stream.flush()
            os.fchmod(file, mode)
            os.fsync(file)  # or a power cut can leave a part of it under its name
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(scratch)


# --- compiling them ------------------------------------------------------------------------------------------


def compiled(target: str, command: list[str], unblock: Any = ()) -> bool:
    """Whether the command, with `-o FILE` after it, made the file. If not, TARGET.failed holds it and what it said.

    Whatever ends it, the compiler's processes and files end with it. unblock: signals that are to reach the compiler,
    and this process once it can end the compiler.
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
    return True


def _sweep(folder: str) -> None:
    """Delete what a compilation left that was killed. Only who holds the lock compiles, so nobody needs it."""
    for name in os.listdir(folder):
        if name.startswith(_SCRATCH):
            path = os.path.join(folder, name)
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.unlink(path)


def _run(command: list[str], scratch: str, log: str, unblock: Any) -> None:
    """The command in a group of processes of its own, so that all of them can be ended where it is interrupted."""
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
            signal.pthread_sigmask(signal.SIG_BLOCK, unblock)  # nothing is to interrupt the cleaning up
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)


def first_line(command: list[str]) -> bytes:
    """Of TARGET.failed."""
    return os.fsencode(shlex.join(command)) + b"\n"


def _end(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def _main(parent: int, target: str, command: list[str]) -> bool:
    os.nice(10)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # where memory ends, rather this than what it is compiled for
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
