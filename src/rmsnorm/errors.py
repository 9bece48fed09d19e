"""The form of error messages: which argument, what it was, what it should be."""


class CommandError(Exception):
    """A command was called wrongly. The command line prints the message in one line and exits with 2."""


def missing_extra(what: str, library: str, extra: str) -> CommandError:
    """The error for a library that is not installed.

    Args:
        what: The command or option that needs the library.
        library: The name of the library.
        extra: The extra of this package, in pyproject.toml, that installs it.
    """
    return CommandError(f"{what} needs {library}: pip install 'rmsnorm[{extra}]'")


def complaint(where: str, argument: str, was: object, expected: str) -> str:
    """The message of a TypeError or ValueError about an argument.

    Args:
        where: The function that was called.
        argument: The name of the argument.
        was: What it was, with its verb.
        expected: What it should be.

    Example:
        >>> from rmsnorm.errors import complaint
        >>> complaint("rms_norm", "weight", "has shape (512,)", "(1280,), the last dimension of x")
        '[rms_norm] weight has shape (512,), expected (1280,), the last dimension of x'
    """
    return f"[{where}] {argument} {was}, expected {expected}"


def with_article(noun: str) -> str:
    """`a Tensor`, `an int`: a noun, such as the name of a type, after its indefinite article."""
    sound = noun.lower()
    vowel = sound.startswith(("a", "e", "i", "o", "u", "nd", "rms")) and not sound.startswith(("uint", "use"))
    return f"{'an' if vowel else 'a'} {noun}"


def type_name(value: object) -> str:
    """The name of the value's type after its indefinite article: `an int`."""
    return with_article(f"{type(value).__name__}")  # formatted, because torch.compile can then trace methods of the str


def one_line(error: object) -> str:
    r"""An exception or a text as one printable line.

    Args:
        error: An exception, which gives its class and its message, or anything with a text.

    Returns:
        The line, without a full stop at its end. Characters that a terminal cannot show are escaped.

    Example:
        >>> from rmsnorm.errors import one_line
        >>> one_line(ValueError("eps is -1,\n  expected 0 or more."))
        'ValueError: eps is -1, expected 0 or more'
    """
    text = " ".join(str(error).split())
    text = text.partition(" Exception raised from ")[0]  # where torch's C++ appends its stack
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif isinstance(error, BaseException):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text).rstrip(".")
