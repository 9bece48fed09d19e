"""Result files: tried before the work, and written whole or not at all."""

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from rmsnorm.errors import CommandError, one_line

# More than a command writes: whether so much fits is tried before the work.
_LARGEST_RESULT = 1 << 18


def check_folder(out: Path, argument: str = "--out") -> None:
    """Raise CommandError, before any work is done for it, unless a file could be written into `out`.

    Writes a nameless file where `out` is or would be made, since permissions say nothing of a full disk.
    """
    existing = out
    try:
        while not existing.exists() and not existing.is_symlink() and existing != existing.parent:
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(_LARGEST_RESULT))
    except (OSError, ValueError) as error:
        advice = f"give {argument} a folder that can be written to"
        raise CommandError(f"nothing can be written into {out} ({one_line(error)}): {advice}") from None


def check_file(path: Path, argument: str) -> int | None:
    """Raise CommandError, before any work is done for it, unless `write_output` could write the file.

    Returns the handle of a pipe or a device, None for a file: a pipe that is closed and opened again is two to who
    reads it.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except OSError as error:
        raise CommandError(f"{argument} {path} cannot be written: {one_line(error)}") from None
    if stat.S_ISDIR(mode) or stat.S_ISBLK(mode):
        raise CommandError(f"{argument} {path} is a folder or a disk, expected a file")
    if stat.S_ISREG(mode):
        check_folder((Path(os.path.realpath(path)) if path.is_symlink() else path.absolute()).parent, argument)
        return None
    try:
        handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe without a reader is an error
        os.set_blocking(handle, True)
        if stat.S_ISCHR(mode) and not os.isatty(handle):
            os.write(handle, b"\n")  # which changes no JSON document; /dev/full refuses it
    except OSError as error:
        raise CommandError(f"{argument} {path} cannot be written: {one_line(error)}") from None
    return handle


def check_apart(one: tuple[str, Path], other: tuple[str, Path]) -> None:
    """Raise CommandError if two results would be one file, or one's file would be where the other needs a folder.

    Args:
        one: The name of an argument, and the file that is written for it.
        other: The same of another argument.
    """
    for (argument, file), (second, its_file) in ((one, other), (other, one)):
        here, there = (Path(os.path.realpath(path)) for path in (file, its_file))
        if here == there:
            raise CommandError(f"{argument} and {second} both write {file}: give them different names")
        if here in there.parents:
            raise CommandError(
                f"{argument} writes the file {file}, which {second} needs as a folder: give another name"
            )


def write_output(path: Path, content: bytes, argument: str, handle: int | None) -> None:
    """Write what `check_file` was asked about, and gave the handle of. Raises CommandError if it cannot be written."""
    if handle is None:
        write_whole(Path(os.path.realpath(path)), content)  # a link stays one
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    except OSError as error:
        raise CommandError(f"{argument} {path} cannot be written: {one_line(error)}") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write it as a whole file or not at all. Raises ValueError for NaN and infinities, which JSON has not."""
    write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write the whole file or none of it: into a file beside it, and then under its name.

    Raises CommandError if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".rmsnorm-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {one_line(error)}") from None
