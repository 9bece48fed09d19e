"""The words of every complaint: which argument, what it was, what it should be."""


class CommandError(Exception):
    """A mistake in how a command was called; the command line prints it in one line and exits with 2."""


def complaint(where: str, argument: str, was: object, expected: str) -> str:
    """`[rms_norm] weight has shape (512,), expected (1280,), the last dimension of x`."""
    return f"[{where}] {argument} {was}, expected {expected}"
