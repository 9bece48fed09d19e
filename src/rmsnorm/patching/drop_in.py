"""A drop-in for torch.nn.RMSNorm: what `patch` makes of one, as a class of its own.

The rule is written down here instead of proven; a test holds it to what the proof finds of torch.nn.RMSNorm.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rmsnorm.patching.proof import RANKS, Rule
from rmsnorm.patching.replacement import explained, serving
from rmsnorm.spec import DTYPES


class TorchRMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` with this package's kernels: the same constructor, attributes, state_dict and dtypes.

    The result has the dtype of x, whatever the weight's is: it is multiplied in fp32 and cast once, as `F.rms_norm`
    does it (`cast="late"`). It equals what `patch` makes of a `torch.nn.RMSNorm`: bit for bit the same for every batch
    size and device, and within 1 ulp of torch's own in 16 bits.

    torch's own forward runs where any argument is float64 (torch computes in fp64 then), under autocast, for more than
    four dimensions in front of the normalized ones, under torch.jit and ONNX export, and for inputs that do not fit,
    so that the errors are torch's too. `rmsnorm.explain(x, norm)` says which of the two runs, and why.

    Args:
        normalized_shape: An int, or the sizes of the last dimensions that are normalized over.
        eps: Added to the mean of squares; None for the machine epsilon of fp32 (of fp64 for float64 inputs).
        elementwise_affine: Whether there is a weight, of shape `normalized_shape`. It starts at one.
        device: Of the weight.
        dtype: Of the weight.

    Example:
        >>> norm = rmsnorm.TorchRMSNorm(1280, eps=1e-6)
        >>> norm.load_state_dict(torch.nn.RMSNorm(1280).state_dict())
        <All keys matched successfully>
        >>> norm(torch.randn(2, 1280, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x of shape (..., *normalized_shape). Returns y of the shape and dtype of x."""
        forward_of = _forward.__wrapped__ if torch.compiler.is_compiling() else _forward
        return forward_of(self.normalized_shape, self.elementwise_affine)(self, x)

    def _rmsnorm_explain(self, x: Any) -> str:
        """For `rmsnorm.explain`."""
        return explained(self, torchs_rule(self.normalized_shape, self.elementwise_affine), x)

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script, which compiles the source of a forward: it is given torch's own class."""
        plain = nn.RMSNorm.__new__(nn.RMSNorm)
        plain.__dict__ = self.__dict__
        return plain


@functools.cache
def _forward(shape: tuple[int, ...], weighted: bool) -> Callable[..., Tensor]:
    return serving(torchs_rule(shape, weighted), nn.RMSNorm.forward, "x")


def torchs_rule(shape: tuple[int, ...], weighted: bool) -> Rule:
    """What `F.rms_norm` computes over the last dimensions of this shape, with or without a weight."""
    weights = DTYPES if weighted else (None,)
    return Rule(
        "late" if weighted else "early", 0.0, "eps", weighted, torch_eps=True,
        own=frozenset((x, w) for x in DTYPES for w in weights if torch.float64 in (x, w)), autocast=True,
        ranks=frozenset(len(shape) + leading for leading in RANKS), shape=shape,
    )  # fmt: skip
