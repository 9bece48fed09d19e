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
    S = x.float().double().square().sum(-1)
    v = _mean(S, x.shape[-1]) + eps
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
    r = rstd.unsqueeze(-1)
    xh = x.float() * r
    dx = dw = None
    if need_dx:
        g = dy.float() if w is None else dy.float() * _scale(w, offset)
        S = (g * xh).double().sum(-1, keepdim=True) + 0.0  # a sum of nothing but -0.0 is +0.0 in every order
        c = _mean(S, x.shape[-1])
        dx = r * (g - xh * c)
        dx = (dx if ds is None else dx + ds.float()).to(x.dtype).contiguous()
    if need_dw:
        assert w is not None
        h = xh.to(x.dtype).float() if cast == "early" else xh
        dw = (dy.float() * h).double().reshape(-1, x.shape[-1]).sum(0).to(w.dtype)
    return dx, dw


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
