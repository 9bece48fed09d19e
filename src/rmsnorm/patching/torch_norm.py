"""TorchRMSNorm, a drop-in replacement for torch.nn.RMSNorm: a class that computes what `patch` makes of one.

Its rule is written down here instead of proven; a test compares it with what the proof finds for torch.nn.RMSNorm.
"""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmsnorm.errors import complaint, type_name
from rmsnorm.patching.replacement import explain_norm, forward_by_rule
from rmsnorm.patching.rule import LEADING_DIMS, Rule
from rmsnorm.spec import DTYPES, as_int, check_bool


class TorchRMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` with this package's kernels: the same constructor, attributes, state_dict and result dtype.

    The result has the dtype of x, whatever the dtype of the weight: the product is computed in fp32 and rounded once,
    as in `F.rms_norm` (`cast="late"`). The outputs are the same, bit for bit, as those of a `torch.nn.RMSNorm` that
    `patch` has replaced: the same for every batch size and device, and in 16 bits within 1 ulp of torch's own.

    torch's own forward runs where x or the weight is float64 (torch computes in fp64 then), where autocast casts x or
    the weight to fp32 (on GPUs), for more than four dimensions in front of the normalized ones, under torch.jit and
    ONNX export, and for inputs of the wrong shape or type, so that the errors are torch's too.
    `rmsnorm.explain(x, norm)` says which of the two runs, and why.

    Args:
        normalized_shape: The sizes of the last dimensions, over which it normalizes; an int for one dimension.
        eps: Added to the mean of squares. None means the machine epsilon of fp32 (of fp64 for float64 inputs).
        elementwise_affine: Whether there is a weight, of shape `normalized_shape`, which starts at one.
        device: The device of the weight.
        dtype: The dtype of the weight.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is no dimension to normalize over.

    Example:
        >>> norm = rmsnorm.TorchRMSNorm(1280, eps=1e-6)
        >>> norm.load_state_dict(torch.nn.RMSNorm(1280).state_dict())
        <All keys matched successfully>
        >>> norm(torch.randn(2, 1280, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        where = type(self).__name__
        shape = _checked_shape(where, normalized_shape)
        if eps is not None and (isinstance(eps, bool) or not isinstance(eps, numbers.Real)):
            raise TypeError(complaint(where, "eps", f"is {type_name(eps)}", "a number or None"))
        check_bool(where, "elementwise_affine", elementwise_affine)
        super().__init__(shape, None if eps is None else float(eps), elementwise_affine, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x.

        Args:
            x: A floating-point tensor of shape (..., *normalized_shape).

        Returns:
            A tensor of the shape and dtype of x.

        Raises:
            RuntimeError: If the shape of x does not end in `normalized_shape`.
        """
        forward_of = _forward.__wrapped__ if torch.compiler.is_compiling() else _forward
        return forward_of(self.normalized_shape, self.elementwise_affine)(self, x)

    def _rmsnorm_explain(self, x: Any) -> str:
        """What `rmsnorm.explain` says."""
        return explain_norm(self, torch_rule(self.normalized_shape, self.elementwise_affine), x)

    def __prepare_scriptable__(self) -> nn.Module:
        """A torch.nn.RMSNorm for torch.jit.script, which compiles the source code of a forward."""
        plain = nn.RMSNorm.__new__(nn.RMSNorm)
        plain.__dict__ = self.__dict__
        return plain


def _checked_shape(where: str, given: object) -> tuple[int, ...]:
    sizes = given if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    shape = tuple(n for n in map(as_int, sizes) if n is not None)
    if len(shape) != len(sizes):
        raise TypeError(complaint(where, "normalized_shape", f"is {given!r}", "an int or a sequence of ints"))
    if not shape or min(shape) < 1:
        raise ValueError(complaint(where, "normalized_shape", f"is {shape}", "sizes of at least 1, and at least one"))
    return shape


@functools.cache
def _forward(shape: tuple[int, ...], weighted: bool) -> Callable[..., Tensor]:
    return forward_by_rule(torch_rule(shape, weighted), nn.RMSNorm.forward)


def torch_rule(shape: tuple[int, ...], weighted: bool) -> Rule:
    """What torch.nn.RMSNorm computes over the last dimensions of this shape, with or without a weight."""
    weights = DTYPES if weighted else (None,)
    return Rule(
        "late" if weighted else "early", 0.0, "eps", weighted, none_is_torch_eps=True,
        own_dtypes=frozenset((x, w) for x in DTYPES for w in weights if torch.float64 in (x, w)),
        calls_rms_norm=True, ranks=frozenset(len(shape) + k for k in LEADING_DIMS), normalized_shape=shape,
    )  # fmt: skip
