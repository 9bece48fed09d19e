"""The words of every complaint: which argument, what it was, what it should be."""


class CommandError(Exception):
    """A mistake in how a command was called; the command line prints it in one line and exits with 2."""


def complaint(where: str, argument: str, was: object, expected: str) -> str:
    """`[rms_norm] weight has shape (512,), expected (1280,), the last dimension of x`."""
    return f"[{where}] {argument} {was}, expected {expected}"


def one_line(error: object) -> str:
    """An exception or a text in one line that a terminal can show: an exception's class and all that it says."""
    text = " ".join(str(error).split())
    text = text.partition(" Exception raised from ")[0]  # where torch's C++ appends its stack
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif isinstance(error, BaseException):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text).rstrip(".")
