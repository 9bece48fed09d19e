"""The table of activation functions from which the models of transformers take the activation of a gate."""

import sys
from types import CodeType
from typing import Any

from torch import nn


def table() -> Any:
    """`ACT2FN`, a mapping from names to new modules; None if transformers is not imported or has none."""
    return getattr(sys.modules.get("transformers.activations"), "ACT2FN", None)


def code_of_lookup() -> CodeType | None:
    """The code that runs in `ACT2FN[name]`."""
    return getattr(getattr(type(table()), "__getitem__", None), "__code__", None)


def is_entry(module: object) -> bool:
    """Whether a module is of a class in the table and holds no tensor, so that its operators say all that it does."""
    found = table()
    if not isinstance(module, nn.Module) or not isinstance(found, dict):
        return False
    classes = [entry[0] if isinstance(entry, tuple) else entry for entry in found.values()]
    return type(module) in classes and not (module._parameters or module._buffers or module._modules)
