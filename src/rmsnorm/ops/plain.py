"""The operators in plain torch, for programs that run without this package: ONNX, and decomposed exported programs.

The statistic is *published* (see `Spec`): the programs compute what the published classes compute.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rmsnorm import gated_reference, reference
from rmsnorm.ops.dispatch import without_none
from rmsnorm.spec import GATED, Activation, Cast, gated_spec


def plain_forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: Cast, offset: float, with_rstd: bool,
    **hints: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As the operator `forward`, but with the *published* statistic, in operators that autograd can differentiate."""
    return plain_slice_forward(x, residual, w, eps, cast, offset, None, with_rstd)


def plain_slice_forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: Cast, offset: float,
    variance_size: int | None, with_rstd: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As the operator `slice_forward`, with the *published* statistic; over all columns if variance_size is None."""
    s = None if residual is None else (x + residual).contiguous()
    rows = x if s is None else s
    rstd = reference.published_rstd(rows[..., :variance_size], eps)
    y = reference.normalize(rows, w, rstd, cast, offset).contiguous()
    return without_none(x, y, s, rstd if with_rstd else None)


def _plain_slice_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, offset: float,
    variance_size: int, need_dx: bool, need_dw: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return without_none(x, *reference.backward(dy, ds, x, w, rstd, cast, offset, need_dx, need_dw, variance_size))


def _plain_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, offset: float, need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dx, dw = reference.backward(dy, ds, x, w, rstd, cast, offset, need_dx, need_dw)
    return without_none(x, dx, dw)


def _plain_forward_pair(
    x: Tensor, w: Tensor | None, x2: Tensor, w2: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    (y, _, rstd), (y2, _, rstd2) = plain_forward(x, None, w, *options), plain_forward(x2, None, w2, *options)
    return y, rstd, y2, rstd2


def _plain_backward_pair(
    dy: Tensor, x: Tensor, w: Tensor | None, rstd: Tensor, dy2: Tensor, x2: Tensor, w2: Tensor | None, rstd2: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return *_plain_backward(dy, None, x, w, rstd, *options), *_plain_backward(dy2, None, x2, w2, rstd2, *options)


def plain_gated_forward(
    x: Tensor, gate: Tensor, w: Tensor | None, eps: float, cast: Cast, activation: Activation, gate_first: bool,
    groups: int, with_rstd: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As the operator `gated_forward`, but with the *published* statistic, and silu or sigmoid of torch."""
    spec = gated_spec(GATED, eps, cast, activation, gate_first, groups)
    y, rstd = gated_reference.published_forward(x, gate, w, spec)
    return without_none(x, y.contiguous(), rstd if with_rstd else None)


def _plain_gated_backward(
    dy: Tensor, x: Tensor, gate: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, activation: Activation,
    gate_first: bool, groups: int, *needs: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    spec = gated_spec(GATED, 0.0, cast, activation, gate_first, groups)
    return without_none(x, *gated_reference.backward(dy, x, gate, w, rstd, spec, *needs))


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
        torch.ops.rmsnorm.forward_pair.default: _plain_forward_pair,
        torch.ops.rmsnorm.backward_pair.default: _plain_backward_pair,
        torch.ops.rmsnorm.slice_forward.default: plain_slice_forward,
        torch.ops.rmsnorm.slice_backward.default: _plain_slice_backward,
        torch.ops.rmsnorm.gated_forward.default: plain_gated_forward,
        torch.ops.rmsnorm.gated_backward.default: _plain_gated_backward,
    }
