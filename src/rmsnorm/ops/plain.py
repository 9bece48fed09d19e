"""The operators in plain torch, for programs that run without this package: ONNX, and decomposed exported programs.

The statistic is *published* (see `Spec`): the programs compute what the published classes compute.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rmsnorm import reference
from rmsnorm.ops.dispatch import without_none
from rmsnorm.spec import Cast


def plain_forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: Cast, offset: float, with_rstd: bool,
    **hints: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As the operator `forward`, but with the *published* statistic, in operators that autograd can differentiate."""
    s = None if residual is None else (x + residual).contiguous()
    rows = x if s is None else s
    rstd = reference.published_rstd(rows, eps)
    y = reference.normalize(rows, w, rstd, cast, offset).contiguous()
    return without_none(x, y, s, rstd if with_rstd else None)


def _plain_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, offset: float, need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dx, dw = reference.backward(dy, ds, x, w, rstd, cast, offset, need_dx, need_dw)
    return without_none(x, dx, dw)


def decompositions() -> dict[Any, Callable[..., tuple[Tensor, ...]]]:
    """Return the decompositions of this package's operators into torch's, for programs that run without the package.

    An exported program holds each norm as one operator of this package. If the program is to run where the package
    cannot be imported (a C++ server, another runtime), decompose it first. It then computes what the published classes
    compute, with the mean in fp32. Its compiler decides where to round, so the bits are not the same on every device.

    Returns:
        A new dict from operator to function, for `torch.export.ExportedProgram.run_decompositions` and for any other
        `decomposition_table` of torch. It can be merged with other tables.

    Example:
        >>> layer = rmsnorm.RMSNorm(8)
        >>> program = torch.export.export(layer, (torch.randn(2, 8),))
        >>> plain = program.run_decompositions(rmsnorm.decompositions())
        >>> "rmsnorm" in program.graph_module.code, "rmsnorm" in plain.graph_module.code
        (True, False)
    """
    return {
        torch.ops.rmsnorm.forward.default: plain_forward,
        torch.ops.rmsnorm.backward.default: _plain_backward,
    }
