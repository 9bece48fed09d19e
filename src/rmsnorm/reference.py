"""The arithmetic in plain torch: the specification, the fallback where there is no kernel, and the tests' oracle.

Every step rounds to fp32 unless the code says otherwise. The modules in `kernels/` offer the same `forward` and
`backward` and must give the same bits. `Spec` in spec.py defines *exact*, *published*, *early*, *late* and
*first*.

Shapes: x, residual, s, y, dy, ds and dx are (..., N), w and dw are (N,), and rstd is (...,), one fp32 number a row. If
each head has its own weight, w and dw are (H, N), rstd is (..., H), and the others are (..., H, N).
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def exact_rstd(x: Tensor, eps: float) -> Tensor:
    """The statistic 1 / sqrt(mean(x²) + eps): an fp64 sum of exact squares, then four correctly rounded fp32 steps.

    Args:
        x: (..., N).
        eps: Added to the mean.

    Returns:
        (...,) float32.
    """
    return rstd_of(sum_of_squares(x), x.shape[-1], eps)


def sum_of_squares(x: Tensor) -> Tensor:
    """S = Σ x² of each row in fp64, in which the squares are exact. (..., N) to (...,) float64."""
    return x.float().double().square().sum(-1)


def rstd_of(S: Tensor, N: int, eps: float) -> Tensor:
    """The statistic from S = `sum_of_squares(x)` over whole rows of N. (...,) float64 to (...,) float32."""
    v = _mean(S, N) + eps
    # torch.sqrt is not correctly rounded in fp32 on a CPU. By way of fp64 it is: that holds twice the digits and more.
    return 1 / v.double().sqrt().float()


def published_rstd(x: Tensor, eps: float) -> Tensor:
    """The statistic as the published classes take it. (..., N) to (...,) float32.

    It serves to prove what a class computes.
    """
    return torch.rsqrt(x.float().pow(2).mean(-1) + eps)


def normalize(x: Tensor, w: Tensor | None, rstd: Tensor, cast: str, offset: float) -> Tensor:
    """y from x and its statistic.

    Args:
        x: (..., N).
        w: (N,) or None.
        rstd: (...,) float32.
        cast: "early", "late" or "first".
        offset: 0 or 1.

    Returns:
        (..., N) in the dtype that `spec.result_dtype` states.
    """
    h = x * rstd.to(x.dtype).unsqueeze(-1) if cast == "first" else x.float() * rstd.unsqueeze(-1)
    if w is None:
        return h.to(x.dtype)
    if cast != "late":
        return w * h.to(x.dtype)  # PyTorch promotes the product, as in the Definition
    return (_scale(w, offset) * h).to(x.dtype)


def published(x: Tensor, w: Tensor | None, eps: float, cast: str, offset: float) -> Tensor:
    """y as a published class gives it when PyTorch runs it operator by operator.

    Arguments and result are those of `normalize`, with eps in place of rstd.
    """
    return normalize(x, w, published_rstd(x, eps), cast, offset)


@torch.no_grad()
def forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: str, offset: float, with_rstd: bool,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The forward pass.

    Args:
        x: (..., N).
        residual: (..., N), added to x before it is normalized; or None.
        w: (N,) or None.
        eps: Added to the mean of squares.
        cast: "early", "late" or "first".
        offset: 0 or 1.
        with_rstd: Whether the statistic is asked for.
        variance_size: Over how many of the first columns the statistic is taken; None for all.

    Returns:
        y: (..., N) in the dtype that `spec.result_dtype` states, contiguous.
        s: x + residual in their promoted dtype, contiguous; None without a residual.
        rstd: (...,) float32; None if not asked for.
    """
    s = None if residual is None else x + residual
    rows = x if s is None else s
    rstd = exact_rstd(rows if variance_size is None else rows[..., :variance_size], eps)
    y = normalize(rows, w, rstd, cast, offset).contiguous()
    return y, None if s is None else s.contiguous(), rstd if with_rstd else None


@torch.no_grad()
def backward(
    dy: Tensor,
    ds: Tensor | None,
    x: Tensor,
    w: Tensor | None,
    rstd: Tensor,
    cast: str,
    offset: float,
    need_dx: bool,
    need_dw: bool,
    variance_size: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The backward pass: dx = rstd · (g − xh · mean(g·xh)) + ds and dw = Σ over rows of dy·xh.

    Here xh = x·rstd and g = dy·(w + offset). If the statistic is taken over the first V of the N columns, the sum of
    g·xh over all N is divided by V, and in the other columns dx = rstd · g + ds.

    Args:
        dy: (..., N), the gradient of y.
        ds: (..., N), the gradient that arrives through s = x + residual; or None.
        x: (..., N), what was normalized: s where there was a residual.
        w: (N,) or None.
        rstd: (...,) float32, from the forward pass.
        cast: "early", "late" or "first".
        offset: 0 or 1.
        need_dx: Whether dx is asked for.
        need_dw: Whether dw is asked for.
        variance_size: V, as in `forward`.

    Returns:
        dx: (..., N) in the dtype of x, contiguous; None if not asked for.
        dw: (N,) in the dtype of w; None if not asked for, or without a weight.
    """
    g, xh = products(dy, x, w, rstd, offset)
    V = x.shape[-1] if variance_size is None else variance_size
    dx = input_gradient(g, xh, rstd, dot(g, xh), V, ds, x.dtype) if need_dx else None
    return dx, weight_gradient(dy, xh, x.dtype, w, cast) if need_dw and w is not None else None


@torch.no_grad()
def backward_of_sum(
    dy: Sequence[Tensor],
    ds: Tensor | None,
    x: Tensor,
    w: Tensor | None,
    rstd: Tensor,
    cast: str,
    offset: float,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The backward pass for a sum of gradients, with the bits of separate additions around `backward`.

    Args:
        dy: The tensors whose sum is the gradient of y, added from left to right; each sum is rounded to their dtype.
        ds: (..., N), added to dx after dx was rounded to its dtype; the sum is rounded again. None if there is none.
        x: (..., N), as in `backward`, like the arguments that follow.
        w: (N,) or None.
        rstd: (...,) float32.
        cast: "early", "late" or "first".
        offset: 0 or 1.
        need_dx: Whether dx is asked for.
        need_dw: Whether dw is asked for.

    Returns:
        dx and dw, as from `backward`.
    """
    dx, dw = backward(functools.reduce(torch.add, dy), None, x, w, rstd, cast, offset, need_dx, need_dw)
    return dx if dx is None or ds is None else (dx + ds).contiguous(), dw


# Rows in parts: each rank holds some columns of every row, perhaps none. The sums S of the ranks are added up between
# `begin_*` and `finish_*`. N is the width of whole rows.


@torch.no_grad()
def begin_forward(x: Tensor, residual: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """What the forward pass of one part computes before the sums are added up.

    Args:
        x: (..., n), n columns of the rows.
        residual: (..., n), added to x before it is normalized; or None.

    Returns:
        s: x + residual in their promoted dtype, contiguous; None without a residual.
        S: (...,) float64, `sum_of_squares` of the part.
    """
    s = None if residual is None else (x + residual).contiguous()
    return s, sum_of_squares(x if s is None else s)


@torch.no_grad()
def finish_forward(
    x: Tensor, w: Tensor | None, S: Tensor, N: int, eps: float, cast: str, offset: float, with_rstd: bool
) -> tuple[Tensor, Tensor | None]:
    """What the forward pass of one part computes from the sums over whole rows.

    Args:
        x: (..., n), what is normalized: s where there was a residual.
        w: (n,), the weight of these columns; or None.
        S: (...,) float64, the sums over whole rows.
        N: The width of whole rows.
        eps: As in `forward`, like the arguments that follow.
        cast: "early", "late" or "first".
        offset: 0 or 1.
        with_rstd: Whether the statistic is asked for.

    Returns:
        y: (..., n), and rstd: (...,) float32 of whole rows, as from `forward`.
    """
    rstd = rstd_of(S, N, eps)
    return normalize(x, w, rstd, cast, offset).contiguous(), rstd if with_rstd else None


@torch.no_grad()
def begin_backward(dy: Tensor, x: Tensor, w: Tensor | None, rstd: Tensor, offset: float) -> Tensor:
    """What the backward pass of one part computes before the sums are added up: `dot` of the part, (...,) float64.

    The arguments are those of `backward`, for n columns of the rows; rstd is that of whole rows.
    """
    return dot(*products(dy, x, w, rstd, offset))


@torch.no_grad()
def finish_backward(
    dy: Tensor,
    ds: Tensor | None,
    x: Tensor,
    w: Tensor | None,
    rstd: Tensor,
    S: Tensor,
    N: int,
    cast: str,
    offset: float,
    need_dw: bool,
) -> tuple[Tensor, Tensor | None]:
    """dx and dw of one part, as from `backward`, from the sums S over whole rows of N, (...,) float64.

    The other arguments are those of `backward`, for n columns of the rows; rstd is that of whole rows.
    """
    g, xh = products(dy, x, w, rstd, offset)
    dx = input_gradient(g, xh, rstd, S, N, ds, x.dtype)
    return dx, weight_gradient(dy, xh, x.dtype, w, cast) if need_dw and w is not None else None


def products(dy: Tensor, x: Tensor, w: Tensor | None, rstd: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """(g, xh), both (..., N) float32: g = dy·(w + offset), or dy without a weight, and xh = x·rstd."""
    return dy.float() if w is None else dy.float() * _scale(w, offset), x.float() * rstd.unsqueeze(-1)


def dot(g: Tensor, xh: Tensor) -> Tensor:
    """Σ g·xh of each row: the fp32 products, summed in fp64. (..., N) float32 to (...,) float64."""
    return (g * xh).double().sum(-1)


def input_gradient(
    g: Tensor, xh: Tensor, rstd: Tensor, S: Tensor, N: int, ds: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """dx, (..., N) in the given dtype, from S = `dot(g, xh)` over whole rows.

    N: the number of columns over which the statistic was taken: all of a row, or the first ones.
    """
    c = _mean(S + 0.0, N).unsqueeze(-1)  # + 0.0, because a sum of nothing but -0.0 is +0.0 in some orders
    through_rstd = xh * c
    if xh.shape[-1] > N:
        through_rstd[..., N:] = 0.0
    dx = rstd.unsqueeze(-1) * (g - through_rstd)
    return (dx if ds is None else dx + ds.float()).to(dtype).contiguous()


def weight_gradient(dy: Tensor, xh: Tensor, dtype: torch.dtype, w: Tensor, cast: str) -> Tensor:
    """dw, of the shape and dtype of w: Σ over rows of dy·xh in fp64. Early and first cast xh to dtype, that of x."""
    h = xh if cast == "late" else xh.to(dtype).float()
    rows = xh.shape[: xh.dim() - w.dim()].numel()
    return (dy.float() * h).double().reshape(rows, *w.shape).sum(0).to(w.dtype)


def truth(x: Tensor, w: Tensor | None, eps: float, offset: float, variance_size: int | None = None) -> Tensor:
    """The formula itself in fp64, unrounded and differentiable, against which gradients are measured.

    Args:
        x: (..., N).
        w: (N,) or None.
        eps: Added to the mean of squares.
        offset: 0 or 1.
        variance_size: Over how many of the first columns the statistic is taken; None for all.

    Returns:
        (..., N) float64.

    Example:
        >>> from rmsnorm import reference
        >>> x = torch.tensor([[3.0, 4.0]], requires_grad=True)
        >>> reference.truth(x, None, eps=0.0, offset=0.0)
        tensor([[0.8485, 1.1314]], dtype=torch.float64, grad_fn=<MulBackward0>)
    """
    x = x.double()
    h = x * torch.rsqrt(x[..., :variance_size].square().mean(-1, keepdim=True) + eps)
    return h if w is None else (w.double() + offset) * h


def _scale(w: Tensor, offset: float) -> Tensor:
    """The weight in fp32 plus the offset. Adding 0.0 would turn a weight of -0.0 into +0.0."""
    return w.float() if offset == 0 else w.float() + offset


def _mean(S: Tensor, N: int) -> Tensor:
    """S / N in fp32. N is a tensor, because torch on a GPU multiplies by 1 / N where it divides by a number."""
    return (S / torch.full((), N, dtype=S.dtype, device=S.device)).float()
