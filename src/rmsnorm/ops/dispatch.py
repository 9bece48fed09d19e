"""Decides whether a call goes directly to a kernel or through torch's dispatcher and the operators."""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from rmsnorm import compat
from rmsnorm.errors import complaint

_PLAIN_TYPES = (Tensor, Parameter)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these tensors may bypass torch's dispatcher: ordinary tensors that no mode or transform intercepts."""
    # is_compiling comes first, because compilers cannot trace the other conditions
    if is_compiling() or compat.dispatch_modes() or compat.transforms_active() or compat.is_tracing():
        return False
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN_TYPES or t.is_meta or t.is_neg() or t._is_zerotensor()):
            return False  # is_neg: lazy negation; zero tensors have no memory
    return True


def without_none(x: Tensor, *outputs: Tensor | None) -> tuple[Tensor, ...]:
    """The outputs of an operator: an empty tensor for each that was not requested, as schemas have no optional ones."""
    return tuple(x.new_empty(0) if output is None else output for output in outputs)


def load_sharding() -> None:
    """Registers the rules for DTensors once torch.distributed.tensor is imported; before that there are no DTensors.

    torch.compile runs this while it traces.
    """
    if "torch.distributed.tensor" in sys.modules:
        import rmsnorm.ops.sharding  # noqa: F401


def are_dtensors(*tensors: Tensor | None) -> bool:
    """Whether all tensors that there are, at least one, are DTensors."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    given = [t for t in tensors if t is not None]
    return bool(given) and all(isinstance(t, DTensor) for t in given)


def any_dtensor(*tensors: Any) -> bool:
    """Whether one of these is a DTensor."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(t, DTensor) for t in tensors)


def refuse_dtensors(where: str, argument: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError for a DTensor: operators that take this argument have no rule for its placements."""
    if any_dtensor(*tensors):
        expected = "plain tensors: replicate them in the last dimension, and pass to_local() of each"
        raise NotImplementedError(complaint(where, argument, "is given with DTensors", expected))


def exported_to_onnx() -> bool:
    """Whether torch.onnx.export is tracing. Programs that run its graph do not have our operators."""
    if not (is_compiling() or compat.is_tracing()):
        return False
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()
