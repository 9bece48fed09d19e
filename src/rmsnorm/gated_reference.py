"""The arithmetic of gated RMSNorms in plain torch; reference.py has that of the others.

A gated norm multiplies by silu or the sigmoid of a second input, the gate. Libraries differ in the last bits of these
functions, so this file defines them as a fixed sequence of fp64 operations that IEEE 754 defines, and rounds the result
once to fp32. Every other step rounds to fp32 unless the code says otherwise.

Shapes: x, gate, y, dy, dx and dgate are (..., N), w and dw are (N,), and rstd is (..., groups). Each row has `groups`
parts of equal width, and each part has its own statistic. `Gate` in spec.py says what else distinguishes one gated norm
from another.
"""

import torch
from torch import Tensor

from rmsnorm.reference import dot, exact_rstd, input_gradient, published_rstd
from rmsnorm.spec import Gate, Spec

# exp(t) = 2^n · exp(r) with n = rint(t / ln 2) and r = t - n · ln 2, so |r| <= 0.347.
INVERSE_LN2 = float.fromhex("0x1.71547652b82fep+0")
# Adding and subtracting 1.5 · 2^52 rounds to an integer, which then stands in the last bits of the sum.
ROUNDER = float.fromhex("0x1.8p+52")
# ln 2 in two parts of at most 42 bits, so that the product of each with n is exact.
LN2_HIGH, LN2_LOW = float.fromhex("0x1.62e42fefa3800p-1"), float.fromhex("0x1.ef35793c76000p-45")
# exp(r) = 1 + r · (1 + r · (c[0] + r · (c[1] + …))), from the Chebyshev interpolation of (exp(r) - 1 - r) / r² of
# degree 9. Relative error 2^-55.8 before rounding.
EXP_COEFFICIENTS = tuple(
    map(
        float.fromhex,
        (
            "0x1.0000000000001p-1", "0x1.5555555555556p-3", "0x1.5555555553d68p-5", "0x1.11111111109b5p-7",
            "0x1.6c16c17889f3cp-10", "0x1.a01a01a7c2f2cp-13", "0x1.a019b914881bap-16", "0x1.71de0db2eb873p-19",
            "0x1.28917c9f3a495p-22", "0x1.af389eea54156p-26",
        ),
    )
)  # fmt: skip
# For t below the first, 1 + exp(t) is 1 in fp64. For t above the second, silu and the sigmoid of -t are 0 in fp32.
LEAST_EXPONENT, LARGEST_EXPONENT = -60.0, 200.0


def silu_or_sigmoid(gate: Tensor, activation: str) -> Tensor:
    """silu(gate) = gate · sigmoid(gate), or sigmoid(gate), rounded once to fp32.

    Args:
        gate: Any shape, in any dtype of `spec.DTYPES`; float64 is rounded to fp32 first.
        activation: "silu" or "sigmoid".

    Returns:
        Of the shape of gate, float32. NaN for NaN, and for silu of -inf, as `torch.nn.functional.silu` gives.
    """
    t = gate.float().double()
    sigma = _sigmoid(t)
    return (t * sigma if activation == "silu" else sigma).float()


def silu_or_sigmoid_slope(gate: Tensor, activation: str) -> Tensor:
    """The derivative of `silu_or_sigmoid`, rounded once to fp32.

    Args:
        gate: As in `silu_or_sigmoid`.
        activation: "silu" or "sigmoid".

    Returns:
        Of the shape of gate, float32: σ + gate·σ·(1 - σ), or σ·(1 - σ).
    """
    t = gate.float().double()
    sigma = _sigmoid(t)
    rest = 1.0 - sigma
    return (sigma + (t * sigma) * rest if activation == "silu" else sigma * rest).float()


def _sigmoid(g: Tensor) -> Tensor:
    """1 / (1 + exp(-g)) in fp64, for fp32 numbers g."""
    t = -g
    above = t > LARGEST_EXPONENT
    t = torch.where(t < LEAST_EXPONENT, LEAST_EXPONENT, t)
    shifted = t * INVERSE_LN2 + ROUNDER
    n = shifted - ROUNDER
    r = (t - n * LN2_HIGH) - n * LN2_LOW
    p = torch.full_like(r, EXP_COEFFICIENTS[-1])
    for c in (*reversed(EXP_COEFFICIENTS[:-1]), 1.0, 1.0):
        p = fma(p, r, c)
    power = ((shifted.view(torch.int64) + 1023) << 52).view(torch.float64)  # 2^n
    return 1.0 / torch.where(above, torch.inf, 1.0 + p * power)


def fma(a: Tensor, b: Tensor, c: float) -> Tensor:
    """a · b + c, rounded once: fp64 has this operation on every processor, but torch does not offer it.

    The product and the sums are split into a rounded result and its error. The errors are added with rounding to odd,
    so that the last rounding is correct (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    This is valid while nothing overflows or underflows, as in the exponential.

    Args:
        a: (...,) float64.
        b: (...,) float64.
        c: A number.

    Returns:
        (...,) float64.
    """
    product, error = _two_product(a, b)
    low, lowest = _two_sum(torch.full_like(a, c), error)
    high, middle = _two_sum(product, low)
    rest, missing = _two_sum(middle, lowest)
    bits = rest.view(torch.int64)
    towards = torch.where((missing > 0) == (rest > 0), 1, -1)
    to_odd = torch.where((missing != 0) & (bits & 1 == 0), bits + towards, bits)
    return high + to_odd.view(torch.float64)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum of a and b, and its error (Knuth)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded product of a and b, and its error (Dekker)."""
    product = a * b
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers of at most 26 bits whose sum is a (Veltkamp)."""
    scaled = a * (2.0**27 + 1)
    high = scaled - (scaled - a)
    return high, a - high


@torch.no_grad()
def forward(x: Tensor, gate: Tensor, w: Tensor | None, spec: Spec, with_rstd: bool) -> tuple[Tensor, Tensor | None]:
    """The forward pass.

    Args:
        x: (..., N).
        gate: (..., N), in the dtype of x or another.
        w: (N,) or None.
        spec: With a gate.
        with_rstd: Whether the statistic is asked for.

    Returns:
        y: (..., N) in the dtype that `spec.gated_dtype` states, contiguous.
        rstd: (..., groups) float32; None if not asked for.
    """
    assert spec.gate is not None
    factor = silu_or_sigmoid(gate, spec.gate.activation)
    rows = grouped(x.float() * factor if spec.gate.first else x, spec.groups)
    rstd = exact_rstd(rows, spec.eps)
    return _output(rows, factor, w, rstd, spec, x.dtype).contiguous(), rstd if with_rstd else None


def published(x: Tensor, gate: Tensor, w: Tensor | None, spec: Spec) -> Tensor:
    """y of `published_forward`."""
    return published_forward(x, gate, w, spec)[0]


def published_forward(x: Tensor, gate: Tensor, w: Tensor | None, spec: Spec) -> tuple[Tensor, Tensor]:
    """y and rstd as a published class gives them when PyTorch runs each operator: see `forward` and `Spec`."""
    assert spec.gate is not None
    g = gate.float()
    factor = torch.nn.functional.silu(g) if spec.gate.activation == "silu" else torch.sigmoid(g)
    rows = grouped(x.float() * factor if spec.gate.first else x, spec.groups)
    rstd = published_rstd(rows, spec.eps)
    return _output(rows, factor, w, rstd, spec, x.dtype), rstd


def grouped(t: Tensor, groups: int) -> Tensor:
    """A view of t with the last dimension divided: (..., N) to (..., groups, N / groups)."""
    return t.unflatten(-1, (groups, t.shape[-1] // groups))  # type: ignore[no-any-return]


def _output(rows: Tensor, factor: Tensor, w: Tensor | None, rstd: Tensor, spec: Spec, dtype: torch.dtype) -> Tensor:
    """y, (..., N), from rows and rstd in groups; dtype is that of x."""
    assert spec.gate is not None
    u = _scaled((rows.float() * rstd.unsqueeze(-1)).flatten(-2), w, spec, dtype)
    if not spec.gate.first:
        u = u * factor
    return u if spec.gate.first and spec.cast == "early" else u.to(dtype)


def _scaled(xh: Tensor, w: Tensor | None, spec: Spec, dtype: torch.dtype) -> Tensor:
    """xh = x·rstd times the weight, rounded as the spec says: early in the promoted dtype, late in fp32."""
    h = xh.to(dtype) if spec.cast == "early" else xh
    if w is None:
        return h
    return w * h if spec.cast == "early" else w.float() * h


@torch.no_grad()
def backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    w: Tensor | None,
    rstd: Tensor,
    spec: Spec,
    need_dx: bool,
    need_dgate: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward pass.

    With a = activation(gate), a' its derivative, xh = the normalized rows, and D(d) = rstd · (d·w - xh · mean(d·w·xh)):

    - the norm first, y = u·a with u = w·xh: dx = D(dy·a), dgate = dy·u·a', dw = Σ over rows of dy·a·xh;
    - the gate first, xh from z = x·a: dz = D(dy) in fp32, dx = dz·a, dgate = dz·x·a', dw = Σ over rows of dy·xh.

    Args:
        dy: (..., N), the gradient of y.
        x: (..., N).
        gate: (..., N).
        w: (N,) or None.
        rstd: (..., groups) float32, from the forward pass.
        spec: With a gate.
        need_dx: Whether dx is asked for.
        need_dgate: Whether dgate is asked for.
        need_dw: Whether dw is asked for.

    Returns:
        dx: (..., N) in the dtype of x, contiguous; None if not asked for.
        dgate: (..., N) in the dtype of gate, contiguous; None if not asked for.
        dw: (N,) in the dtype of w; None if not asked for, or without a weight.
    """
    assert spec.gate is not None
    first, N = spec.gate.first, x.shape[-1]
    factor = silu_or_sigmoid(gate, spec.gate.activation)
    rows = grouped(x.float() * factor if first else x.float(), spec.groups)
    xh = rows * rstd.unsqueeze(-1)
    d = dy.float() if first else dy.float() * factor
    g = grouped(d if w is None else d * w.float(), spec.groups)
    dx = dgate = dw = None
    if need_dx or (need_dgate and first):
        dz = input_gradient(g, xh, rstd, dot(g, xh), N // spec.groups, None, torch.float32).flatten(-2)
        dx = ((dz * factor) if first else dz).to(x.dtype).contiguous() if need_dx else None
    if need_dgate:
        slope = silu_or_sigmoid_slope(gate, spec.gate.activation)
        of_factor = dz * x.float() if first else dy.float() * _scaled(xh.flatten(-2), w, spec, x.dtype).float()
        dgate = (of_factor * slope).to(gate.dtype).contiguous()
    if need_dw and w is not None:
        h = xh.flatten(-2)
        h = h.to(x.dtype).float() if spec.cast == "early" else h
        dw = (d * h).double().reshape(-1, N).sum(0).to(w.dtype)
    return dx, dgate, dw


def truth(x: Tensor, gate: Tensor, w: Tensor | None, eps: float, gate_of: Gate, groups: int) -> Tensor:
    """The formula itself in fp64, unrounded and differentiable, against which gradients are measured.

    Args:
        x: (..., N).
        gate: (..., N).
        w: (N,) or None.
        eps: Added to the mean of squares.
        gate_of: The activation, and whether the gate comes first.
        groups: The number of groups of a row.

    Returns:
        (..., N) float64.
    """
    g = gate.double()
    factor = torch.nn.functional.silu(g) if gate_of.activation == "silu" else torch.sigmoid(g)
    rows = grouped(x.double() * factor if gate_of.first else x.double(), groups)
    h = (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    y = h if w is None else w.double() * h
    return y if gate_of.first else y * factor
