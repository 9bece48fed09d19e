"""The arithmetic, in plain torch: specification, fallback and oracle. Every step rounds to fp32 unless it says so.

Shapes: x, residual, s, y, dy, ds, dx are (..., N); w and dw are (N,); rstd is (...,), one fp32 number a row.
The kernels under `kernels/` offer the same `forward` and `backward`, and must give the same bits.
"""

import torch
from torch import Tensor


def exact_rstd(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps): the squares and their sum in fp64, then four correctly rounded fp32 steps.

    torch.sqrt is not correctly rounded in fp32 on the CPU; through fp64 it is, since fp64 holds more than twice
    the digits of fp32.
    """
    return rstd_of(sum_of_squares(x), x.shape[-1], eps)


def sum_of_squares(x: Tensor) -> Tensor:
    """S, in fp64, where the squares are exact."""
    return x.float().double().square().sum(-1)


def rstd_of(S: Tensor, N: int, eps: float) -> Tensor:
    """The statistic from S over whole rows of N."""
    v = _mean(S, N) + eps
    return 1 / v.double().sqrt().float()


def published_rstd(x: Tensor, eps: float) -> Tensor:
    """The statistic as the published classes take it. Used to prove what a class computes, never to compute."""
    return torch.rsqrt(x.float().pow(2).mean(-1) + eps)


def normalize(x: Tensor, w: Tensor | None, rstd: Tensor, cast: str, offset: float) -> Tensor:
    """y from x and its statistic. Early: promote_types(w, x); late, or without a weight: the dtype of x."""
    h = x.float() * rstd.unsqueeze(-1)
    if w is None:
        return h.to(x.dtype)
    if cast == "early":
        return w * h.to(x.dtype)
    return (_scale(w, offset) * h).to(x.dtype)


def published(x: Tensor, w: Tensor | None, eps: float, cast: str, offset: float) -> Tensor:
    """y as a published class gives it when it is run eagerly."""
    return normalize(x, w, published_rstd(x, eps), cast, offset)


@torch.no_grad()
def forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: str, offset: float, with_rstd: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, s, rstd): s = x + residual in its promoted dtype, None without a residual; rstd None if not asked for."""
    s = None if residual is None else x + residual
    rows = x if s is None else s
    rstd = exact_rstd(rows, eps)
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
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dw) in the dtypes of x and w, each None if not asked for.

    x is what was normalized: x + residual where there was one, and ds the gradient that arrives through that sum.
    With xh = x·rstd and g = dy·w:  dx = rstd · (g − xh · mean(g·xh)) + ds,  dw = Σ over rows of dy·xh.
    """
    g, xh = products(dy, x, w, rstd, offset)
    dx = input_gradient(g, xh, rstd, dot(g, xh), x.shape[-1], ds, x.dtype) if need_dx else None
    return dx, weight_gradient(dy, xh, x.dtype, w, cast) if need_dw and w is not None else None


def products(dy: Tensor, x: Tensor, w: Tensor | None, rstd: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """(g, xh) in fp32."""
    return dy.float() if w is None else dy.float() * _scale(w, offset), x.float() * rstd.unsqueeze(-1)


def dot(g: Tensor, xh: Tensor) -> Tensor:
    """The rounded products, summed over each row in fp64."""
    return (g * xh).double().sum(-1)


def input_gradient(
    g: Tensor, xh: Tensor, rstd: Tensor, S: Tensor, N: int, ds: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """dx from S = dot(g, xh) over whole rows of N."""
    c = _mean(S + 0.0, N).unsqueeze(-1)  # a sum of nothing but -0.0 is +0.0 in every order
    dx = rstd.unsqueeze(-1) * (g - xh * c)
    return (dx if ds is None else dx + ds.float()).to(dtype).contiguous()


def weight_gradient(dy: Tensor, xh: Tensor, dtype: torch.dtype, w: Tensor, cast: str) -> Tensor:
    """dw in the dtype of w; dtype is that of x."""
    h = xh.to(dtype).float() if cast == "early" else xh
    return (dy.float() * h).double().reshape(xh.shape[:-1].numel(), xh.shape[-1]).sum(0).to(w.dtype)


def truth(x: Tensor, w: Tensor | None, eps: float, offset: float) -> Tensor:
    """The formula itself, unrounded, in fp64 and differentiable: what gradients are measured against."""
    x = x.double()
    h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return h if w is None else (w.double() + offset) * h


def _scale(w: Tensor, offset: float) -> Tensor:
    """The weight as fp32, plus the offset. Adding 0.0 would turn a weight of -0.0 into +0.0."""
    return w.float() if offset == 0 else w.float() + offset


def _mean(S: Tensor, N: int) -> Tensor:
    """S / N in fp32. Divided by a tensor, because by a number torch multiplies with 1 / N on a GPU."""
    return (S / torch.full((), N, dtype=S.dtype, device=S.device)).float()
