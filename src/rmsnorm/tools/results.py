"""Writes result files as a whole or not at all, checks before the work that they can be written, and reads them."""

import json
import os
import secrets
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rmsnorm.errors import CommandError, one_line

_Result = TypeVar("_Result")
# More than a command writes: the check before the work tries whether so much fits.
_LARGEST_RESULT = 1 << 18
# Many times what a command writes. A longer file, or a device without an end, is not read.
_LARGEST_STORED = 1 << 25

# What `rmsnorm report` writes into its folder.
REPORT_FILE, REPORT_PAGE = "report.json", "report.html"


def bench_file(device_type: str) -> str:
    """Return the name of the file that `rmsnorm bench` writes into its folder."""
    return f"bench-{device_type}.json"


def check_folder(out: Path, argument: str = "--out") -> None:
    """Check that a file could be written into a folder.

    Writes a temporary file without a name there, or into the nearest folder that exists, since permissions do not show
    that a disk is full.

    Args:
        out: The folder, which need not exist.
        argument: The option that names it, for the message.

    Raises:
        CommandError: If no file could be written.
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
    """Check that `write_output` could write a file.

    Args:
        path: A file, which need not exist, a pipe or a character device.
        argument: The option that names it, for the message.

    Returns:
        None for a file. For a pipe or a device its open handle: the reader of a pipe would see the end of it if it were
        closed and opened again.

    Raises:
        CommandError: If it could not be written.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except (OSError, ValueError) as error:  # ValueError: a NUL byte
        raise CommandError(f"{argument} {path} cannot be written: {one_line(error)}") from None
    if stat.S_ISDIR(mode) or stat.S_ISBLK(mode):
        raise CommandError(f"{argument} {path} is a folder or a disk, expected a file")
    if stat.S_ISREG(mode):
        check_folder((Path(os.path.realpath(path)) if path.is_symlink() else path.absolute()).parent, argument)
        return None
    try:
        handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))  # fails for a pipe without a reader
        os.set_blocking(handle, True)
        if stat.S_ISCHR(mode) and not os.isatty(handle):
            os.write(handle, b"\n")  # harmless before a JSON document; fails for /dev/full
    except OSError as error:
        raise CommandError(f"{argument} {path} cannot be written: {one_line(error)}") from None
    return handle


def check_apart(one: tuple[str, Path], other: tuple[str, Path]) -> None:
    """Check that two results do not overwrite each other, and that neither file is where the other needs a folder.

    Args:
        one: The name of an option, and the file that is written for it.
        other: The same for another option.

    Raises:
        CommandError: If they conflict.
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
    """Write a file, a pipe or a device.

    Args:
        path: What is written.
        content: The bytes.
        argument: The option that names it, for the message.
        handle: What `check_file` returned for it.

    Raises:
        CommandError: If it cannot be written.
    """
    if handle is None:
        write_whole(Path(os.path.realpath(path)), content)  # a symbolic link stays a link
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    except OSError as error:
        raise CommandError(f"{argument} {path} cannot be written: {one_line(error)}") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as a whole file or not at all.

    Args:
        path: The file; its folder is made if it does not exist.
        content: What is written.

    Raises:
        ValueError: If the content has a NaN or an infinity, which JSON does not have.
        CommandError: If the file cannot be written.
    """
    write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all: into a temporary file beside it, which is then renamed.

    Args:
        path: The file; its folder is made if it does not exist.
        content: The bytes.

    Raises:
        CommandError: If the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.parent / f".rmsnorm-{secrets.token_hex(8)}"
        try:
            with open(name, "xb") as file:  # not by `tempfile`, whose files only their owner can read
                file.write(content)
            os.replace(name, path)
        except BaseException:
            name.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {one_line(error)}") from None


def read_stored(path: Path, make: Callable[[Any], _Result], expected: str) -> _Result:
    """Read a stored result for the option --from.

    Args:
        path: A file or a pipe.
        make: Takes the content of the JSON and returns the result. It does everything that fails for values that no
            result has, such as printing them.
        expected: What to give, for the message.

    Returns:
        What `make` returned.

    Raises:
        CommandError: If the file cannot be read, is too long, is not JSON or is not such a result.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_STORED + 1)
    except OSError as error:
        raise CommandError(f"--from {path}: {one_line(error)}") from None
    if len(data) > _LARGEST_STORED:
        raise CommandError(f"--from {path} has more than {_LARGEST_STORED:,} bytes: give {expected}")
    try:
        return make(json.loads(data))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise CommandError(f"--from {path}: give {expected}") from None
