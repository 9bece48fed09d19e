"""One compilation: the whole file or none of it, and beside it, where it failed, what the compiler said.

    python -I -S build.py TARGET COMMAND …

Only what a bare Python has, so that a process of its own can run it without what the first one has loaded.
"""

import contextlib
import os
import shlex
import subprocess
import sys

_SECONDS = 600


def compiled(target: str, command: list[str]) -> bool:
    """Whether the command, with `-o FILE` after it, made the file. If not, TARGET.failed holds it and what it said."""
    scratch = f"{target}.{os.getpid()}"
    try:
        subprocess.run(
            [*command, "-o", scratch], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_SECONDS, check=True
        )
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())  # or a power cut can leave a part of it under its name
        os.replace(scratch, target)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stdout", None) or os.fsencode(str(error))
        with contextlib.suppress(OSError), open(f"{target}.failed", "wb") as file:
            file.write(first_line(command) + said)
        return False
    finally:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
    with contextlib.suppress(OSError):
        os.unlink(f"{target}.failed")
    return True


def first_line(command: list[str]) -> bytes:
    """Of TARGET.failed."""
    return os.fsencode(shlex.join(command)) + b"\n"


if __name__ == "__main__":
    os.nice(10)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # where memory ends, rather this than what it is compiled for
    sys.exit(not compiled(sys.argv[1], sys.argv[2:]))
