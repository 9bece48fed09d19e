"""How transformers is called: imported on demand, kept quiet, and its exceptions reported in one line."""

import contextlib
import inspect
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rmsnorm.errors import CommandError, missing_extra, one_line
from rmsnorm.tools import machine


def import_transformers(what: str) -> Any:
    """Import transformers.

    Args:
        what: What needs it, for the message.

    Returns:
        The library.

    Raises:
        CommandError: If it is missing or cannot be imported, or if Python has removed the docstrings that it parses.
    """
    if sys.flags.optimize >= 2:
        raise CommandError(
            f"{what} needs transformers, which parses its own docstrings, and python -OO or PYTHONOPTIMIZE=2 removes "
            "them: use python -O or PYTHONOPTIMIZE=1 at most"
        )
    machine.check_temporary_folder()
    try:
        import transformers
    except ImportError:
        raise missing_extra(what, "transformers", "hf") from None
    except Exception as error:  # noqa: BLE001  # its import runs code of many packages
        raise CommandError(f"transformers cannot be imported: {one_line(error)}") from None
    return transformers


@contextlib.contextmanager
def command_errors(what: str, replace: tuple[object, str] = ("", "")) -> Iterator[None]:
    """Turn any exception into a CommandError.

    Args:
        what: What failed; it begins the message, and the text of the exception follows.
        replace: A text in the exception's, and what to write instead.

    Raises:
        CommandError: For any exception; a CommandError passes unchanged.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as error:  # the code of a model can raise anything
        message = one_line(error)
        if replace[1]:
            message = message.replace(str(replace[0]), replace[1])
        raise CommandError(f"{what}: {message}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Turn off the progress bars, warnings and logs of transformers and torch."""
    from transformers.utils import logging as transformers_logging

    bars: Any = transformers_logging  # it has no types
    shown, disabled = bars.is_progress_bar_enabled(), logging.root.manager.disable
    bars.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)
        if shown:
            bars.enable_progress_bar()


class CallsExhausted(Exception):
    """Raised if more torch functions are called than allowed."""


class CallLimit(TorchFunctionMode):
    """Raises CallsExhausted after a number of calls of torch: unlike a time limit, the same on every machine."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0 and self.left % 1000 == 999:  # not every time: leaving no_grad, for example, calls torch
            raise CallsExhausted
        return func(*args, **(kwargs or {}))


def token_arguments(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Return the arguments for a call of a model on token ids alone.

    Args:
        model: A model of transformers.
        ids: (batch, tokens). A separate decoder gets the same ids.
    """
    taken = inspect.signature(model.forward).parameters
    named: dict[str, Any] = {"input_ids": ids}
    if "decoder_input_ids" in taken:
        named["decoder_input_ids"] = ids
    if "use_cache" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        named["use_cache"] = False
    return named


def run_on_tokens(model: nn.Module, ids: Tensor) -> Any:
    """Run a model on token ids alone, and return what it returns.

    Args:
        model: A model of transformers.
        ids: (batch, tokens).
    """
    return model(**token_arguments(model, ids))


def norm_width(module: nn.Module) -> int | None:
    """Return the width of the rows that a norm takes; None if it has no weight and takes any width."""
    weight, shape = module._parameters.get("weight"), getattr(module, "normalized_shape", None)
    if weight is not None:
        return weight.numel()
    return math.prod(shape) if isinstance(shape, tuple) else None
