"""Every tolerance of the tests with its derivation. Whatever has none here is compared bit for bit.

u is half an fp32 ulp, the relative error of one rounded fp32 step. A row's steps, from the definition:
rstd: S/N, eps, their sum (3u, halved by the root), the root, the division: 3.5u. xh = x·rstd: 4.5u. y = w·xh: 5.5u.
"""

import torch
from torch import Tensor

from rmsnorm import gated_reference
from rmsnorm.kernels.gpu.tiling import LONGEST_SUM
from rmsnorm.spec import Spec

FP32_ULP = 2.0**-23
U = FP32_ULP / 2

RSTD = 3.5 * U
XH = 4.5 * U
Y = 5.5 * U

# y of α·x against y of x: two y, and α·x rounded (u in the element, u in the statistic).
SCALED = 2 * Y + 2 * U
# norm(norm(x)) against norm(x), no weight: the inner rms is 1 within XH, so the outer xh is off by XH and 4.5u more.
IDEMPOTENT = 2 * XH
# LayerNorm of a row whose mean was taken out: the centring is rounded once, u of the largest element, which counts in
# the numerator and, through ms, in the statistic.
LAYER_NORM, CENTRED = Y + U, 2 * U
# w·xh folded into the next matrix: the two sides differ by the one rounding of that product.
FOLDED = U * (1 + 2 * U)
# An element of dx, in units of rstd·(|g| + |xh·c|). The xh·c term: xh 4.5, c (g 1, xh 4.5, product 1, mean 1; the sum
# is fp64) 7.5, product 1, difference 1, factor rstd 4.5; the rest is to spare. The g term is shorter.
DX = 20 * U
# As DX, but for an output tangent w·P·x_t + xh·w_t: the factor w, the product xh·w_t and the sum come on top.
TANGENT = DX + 4 * U
# An element of a gradient of a gated norm, in units of the sizes of what is multiplied and subtracted. The longest way is
# dgate with the gate first. z = x·a (a 1, product 1) 2; its square and sum 4, then as above: rstd 3.5 + 2, xh 8.5.
# c (g 1, xh 8.5, product 1, mean 1) 11.5, xh·c 21, the difference 22, the factor rstd 6.5 more: dz 28.5; times x and
# a' (rounded once) 31.5. The rest is for products of errors.
GATED_GRADIENT = 33 * U
# 6·s by way of 3·s² and its derivative: a few fp32 roundings.
SUM_TWICE = 8 * U
# What the ranks sum in another order than one process: matrix products of at most 256 fp32 terms, a few in a row, each
# √256·u off if the roundings are random; relative to the largest terms.
OTHER_ORDER = 8 * 16 * U
# The same in fp64, for the formula itself: a few thousand roundings of 2⁻⁵³ in a row of at most 64.
FP64 = 1e-11

# The contract on gradients, in relative L2 error against fp64 over at least this many elements.
GRADIENT_ELEMENTS = 1 << 16
# fp32, N ≥ 16: eager has the same number of fp32 roundings, so the two errors differ by chance, not by kind.
FP32_GRADIENT_OF_EAGER, FP32_GRADIENT_FROM_N = 1.1, 16
# fp32 below that: dx is a difference that cancels (N = 1: wholly), so its error is in units of what is subtracted,
# DX of at most 2·‖rstd·dy·w‖ in the worst case, a third of that when roundings are random.
FP32_GRADIENT_NARROW = 8 * FP32_ULP
# 16-bit: where eager rounds to 16 bits in between it is worse. Where it does not (late), both round the same number
# once, and chance decides: if δ is our fp32 error before the cast, |fl(t+δ) − t| ≤ |fl(t) − t| + 2|δ|.
HALF_GRADIENT_OF_EAGER, HALF_GRADIENT_TIE = 1.0, 2 * FP32_GRADIENT_NARROW

# Against the class run eagerly: the share of outputs that may differ, and by how many ulp. For first that is without a
# weight: an ulp of the statistic, whose significand is in [1, 2), times that of x is less than two ulp.
DEFINITION_SHARE = {torch.bfloat16: 1e-5, torch.float16: 8e-5}
DEFINITION_ULP = {"early": 2, "late": 1, "first": 2}
# For first, the share of rows that differ: those whose statistic is less than two fp32 ulp from a rounding boundary of 16
# bits, which lie 2¹⁶ (bf16) or 2¹³ (fp16) of them apart, and a factor of four for chance among a few thousand rows.
FIRST_ROWS = {torch.bfloat16: 4 * 4 * 2.0**-16, torch.float16: 4 * 4 * 2.0**-13}
# The same of gated norms. Their gate is off by as much as the statistic, so outputs change up to twice as often. After
# an early cast that changes by 1 ulp, w·h is off by at most 2 ulp; where a gate follows that is 4 ulp of the product at
# most, since the same relative change is up to twice as many ulp.
GATED_SHARE = {dtype: 2 * share for dtype, share in DEFINITION_SHARE.items()}
GATED_ULP = {("early", False): 4, ("early", True): 2, ("late", False): 1, ("late", True): 1}  # cast, gate first
# A tie too: dw of an fp32 weight when early. Both sum dy·cast(xh), whose casts, of error ulp/√12, differ by an ulp in
# that share of places: by √(12·share) of the error in L2.
HALF_GRADIENT_CAST_TIE = {dtype: 1 + (12 * share) ** 0.5 for dtype, share in DEFINITION_SHARE.items()}


def tangent_bound(dtype: torch.dtype) -> float:
    """Of a whole tangent in L2, relative to it, for rows of this dtype.

    The projection of a random tangent on xh takes away far less than it leaves: twice TANGENT. A row of 16 bits
    sends its tangent through 16 bits twice, each time half an ulp.
    """
    return 2 * TANGENT + (0.0 if dtype == torch.float32 else torch.finfo(dtype).eps)


def late_bound(dtype: torch.dtype) -> tuple[float, float]:
    """(relative, absolute) error of an element of y, late: Y and then one rounding to the dtype, half an ulp of it.

    Below the dtype's normal range an ulp is its smallest number.
    """
    limits = torch.finfo(dtype)
    return Y + limits.eps / 2 * (1 + Y), limits.smallest_normal * limits.eps / 2


def published_y(N: int) -> float:
    """The relative error of an element of y in fp32 whose statistic is *published*, summed in any order.

    The mean: the squares (1u), N − 1 additions of terms that are not negative (1u each), the division and eps (2u),
    halved by the root. Then the root, its reciprocal, x·rstd, the product with the weight, and 1 + w: 5u.
    """
    return ((N + 2) / 2 + 5) * U


def ordered(t: Tensor) -> Tensor:
    """The numbers as integers in the same order: neighbours differ by one, and the two zeros are equal."""
    bits = t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]).long()
    lowest = -(1 << (8 * t.element_size() - 1))
    return torch.where(bits < 0, lowest - bits, bits)


def assert_same_bits(got: Tensor | None, expected: Tensor | None, what: str = "") -> None:
    """Assert that dtype, shape and all bits are the same; any two NaN are equal."""
    if got is None or expected is None:
        assert got is expected, f"{what}: {got} against {expected}"
        return
    assert got.dtype == expected.dtype, f"{what}: {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)}, expected {tuple(expected.shape)}"
    got, expected = got.detach().contiguous(), expected.detach().contiguous()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    differ = (got.view(integer) != expected.view(integer)) & ~(got.isnan() & expected.isnan())
    if differ.any():
        at = tuple(differ.nonzero()[0].tolist())
        a, b = got[at].item(), expected[at].item()
        raise AssertionError(f"{what}: {int(differ.sum())} of {got.numel()} differ, first at {at}: {a!r} against {b!r}")


def sums_of_dw(
    dy: Tensor, x: Tensor, rstd: Tensor, cast: str, shape: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """The fp64 sums over the rows of the rounded products that dw adds up, and of their magnitudes.

    shape: that of the weight, by default (N,).
    """
    h = x.float() * rstd.unsqueeze(-1)
    products = dy.float() * (h.to(x.dtype).float() if cast != "late" else h)
    products = products.reshape(-1, *(shape or x.shape[-1:])).double()
    return products.sum(0), products.abs().sum(0)


def sums_of_gated_dw(dy: Tensor, x: Tensor, gate: Tensor, rstd: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """`sums_of_dw` for a gated norm."""
    assert spec.gate is not None
    factor = gated_reference.silu_or_sigmoid(gate, spec.gate.activation)
    d, z = (dy.float(), x.float() * factor) if spec.gate.first else (dy.float() * factor, x.float())
    h = (gated_reference.grouped(z, spec.groups) * rstd.unsqueeze(-1)).flatten(-2)
    products = d * (h.to(x.dtype).float() if spec.cast == "early" else h)
    products = products.reshape(-1, x.shape[-1]).double()
    return products.sum(0), products.abs().sum(0)


def dw_too_far_off(dw: Tensor, total: Tensor, size: Tensor, rows: int) -> int:
    """How many numbers of the GPU's dw are further from the fp64 sum than its arithmetic can take them.

    It sums up to LONGEST_SUM products at a time in fp32, of the `rows` that there are, where each addition is off by 2⁻²⁴
    of a partial sum at most, which is below the sum of the magnitudes; then in fp64; then it rounds to fp32 and once
    more to its own dtype.
    Where a magnitude is not finite or beyond the dtype, the order decides between inf and NaN: not compared.
    """
    wide, limits = dw.double().to(total.device), torch.finfo(dw.dtype)
    longest = min(LONGEST_SUM[dw.element_size()], rows)
    bound = (longest + 1) * 2.0**-24 * size + total.abs() * limits.eps / 2 + limits.smallest_normal * limits.eps
    comparable = (size < torch.finfo(torch.float32).max) & (total.abs() < limits.max)
    return int((comparable & ~((wide - total).abs() <= bound)).sum())
