"""The kernels have the bits of the reference, for every dtype, weight, spec, width and memory layout.

The tests call the public functions, so that they cover autograd too.
"""

import gc
import hashlib
import itertools
import multiprocessing
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rmsnorm import add_rms_norm, explain, reference, rms_norm
from rmsnorm.kernels.cpu import threads as kernel_threads
from rmsnorm.kernels.host import loader as host
from tolerance import assert_same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SPECS = (("early", 0.0), ("late", 0.0), ("late", 1.0), ("first", 0.0))
WIDTHS = (1, 2, 3, 7, 64, 127, 1021, 1280, 4099, 32768)
Draw = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("poisoned")


def short(value: object) -> str:
    return str(value).removeprefix("torch.")


def check(
    x: Tensor,
    w: Tensor | None,
    dy: Tensor | None = None,
    residual: Tensor | None = None,
    ds: Tensor | None = None,
    *,
    cast: Any = "early",
    offset: float = 0.0,
    eps: float = 1e-6,
) -> None:
    """Asserts that y, s, rstd, dx and dw of the public functions have the reference's bits and no input changed."""
    inputs = [t for t in (x, w, dy, residual, ds) if t is not None]
    memory = [torch.as_strided(t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0) for t in inputs]
    before = [t.clone() for t in memory]

    y_ref, s_ref, rstd_ref = reference.forward(x, residual, w, eps, cast, offset, True)
    assert rstd_ref is not None
    rows = x if s_ref is None else s_ref
    y_op, s_op, rstd = torch.ops.rmsnorm.forward.default(x, residual, w, eps, cast, offset, True)
    assert_same_bits(y_op, y_ref, "y of the operator")
    assert_same_bits(rstd, rstd_ref, "rstd")

    leaves = [t.detach().requires_grad_() for t in (x, residual, w) if t is not None]
    x_leaf = leaves[0]
    w_leaf = None if w is None else leaves[-1]
    if residual is None:
        y, s = rms_norm(x_leaf, w_leaf, eps, cast=cast, offset=offset), None
    else:
        y, s = add_rms_norm(x_leaf, leaves[1], w_leaf, eps, cast=cast, offset=offset)
        assert_same_bits(s_op, s_ref, "s of the operator")
        assert_same_bits(s, s_ref, "s")
        assert s.is_contiguous()
    assert_same_bits(y, y_ref, "y")
    assert y.is_contiguous()

    if dy is not None:
        outputs, cotangents = ([y], [dy]) if ds is None or s is None else ([y, s], [dy, ds])
        grads = torch.autograd.grad(outputs, leaves, cotangents)
        dx_ref, dw_ref = reference.backward(dy, ds, rows, w, rstd_ref, cast, offset, True, w is not None)
        assert dx_ref is not None
        assert_same_bits(grads[0], dx_ref.to(x.dtype), "dx")
        if residual is not None:
            assert_same_bits(grads[1], dx_ref.to(residual.dtype), "d_residual")
        if w is not None:
            assert_same_bits(grads[-1], dw_ref, "dw")

    for now, then in zip(memory, before, strict=True):
        assert_same_bits(now, then, "an input was written to")


def output_dtype(x: torch.dtype, w: torch.dtype | None, cast: str) -> torch.dtype:
    return torch.promote_types(x, w) if w is not None and cast != "late" else x


def cases() -> Iterator[Any]:
    for x, w, (cast, offset) in itertools.product(FLOATS, (None, *FLOATS), SPECS):
        if w is not None or not offset:
            yield pytest.param(x, w, cast, offset, id=f"x-{short(x)}-w-{short(w)}-{cast}-{offset:.0f}")


every_case = pytest.mark.parametrize(("x_dtype", "w_dtype", "cast", "offset"), list(cases()))


def weight(randn: Draw, N: int, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else randn(N, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_these_tests_run_the_kernels(dtype) -> None:
    assert "Numba" in explain(torch.zeros(2, 8, dtype=dtype), torch.zeros(8, dtype=dtype))


# --- the sweep -----------------------------------------------------------------------------------------------


@every_case
def test_bits_at_every_width(x_dtype, w_dtype, cast, offset, randn) -> None:
    y_dtype = output_dtype(x_dtype, w_dtype, cast)
    for N in WIDTHS:
        # From rows so small that eps dominates to rows so large that it has no effect.
        x = (randn(5, N) * torch.tensor([1e-3, 0.1, 1.0, 30.0, 200.0])[:, None]).to(x_dtype)
        check(x, weight(randn, N, w_dtype), randn(5, N, dtype=y_dtype), cast=cast, offset=offset)


def sliced(randn: Draw, N: int, dtype: torch.dtype) -> Tensor:
    return randn(5, N + N // 8, dtype=dtype)[:, :N]  # for 512: the first 512 of 576 columns


FORMS: dict[str, Callable[[Draw, int, torch.dtype], Tensor]] = {
    "row_strided": sliced,
    "at_an_offset": lambda randn, N, dtype: randn(5, N + 3, dtype=dtype)[1:, 3:],
    "every_other_row": lambda randn, N, dtype: randn(10, N, dtype=dtype)[::2],
    "3d": lambda randn, N, dtype: randn(3, 4, N, dtype=dtype),
    "3d_transposed": lambda randn, N, dtype: randn(4, 3, N, dtype=dtype).transpose(0, 1),
    "4d_transposed": lambda randn, N, dtype: randn(2, 3, 4, N, dtype=dtype).transpose(1, 2),
    "4d_sliced": lambda randn, N, dtype: randn(2, 5, 4, N + 8, dtype=dtype)[:, 1:4, ::2, :N],
    "4d_permuted": lambda randn, N, dtype: randn(2, 3, 4, N, dtype=dtype).permute(2, 1, 0, 3),
    "5d_permuted": lambda randn, N, dtype: randn(2, 3, 2, 3, N, dtype=dtype).permute(3, 1, 0, 2, 4),
    "expanded_rows": lambda randn, N, dtype: randn(1, N, dtype=dtype).expand(6, N),
    "expanded_wholly": lambda randn, N, dtype: randn(1, 1, dtype=dtype).expand(6, N),
    "last_dimension_strided": lambda randn, N, dtype: randn(N, 5, dtype=dtype).t(),
    "every_other_column": lambda randn, N, dtype: randn(5, 2 * N, dtype=dtype)[:, ::2],
    "one_row": lambda randn, N, dtype: randn(1, N, dtype=dtype),
    "one_row_strided": lambda randn, N, dtype: randn(4, N + 8, dtype=dtype)[2:3, :N],
    "one_dimension": lambda randn, N, dtype: randn(N, dtype=dtype),
    "no_rows": lambda randn, N, dtype: randn(0, N, dtype=dtype),
    "no_rows_3d": lambda randn, N, dtype: randn(3, 0, N, dtype=dtype),
}
# A selection of dtypes and specs; the test of widths above covers all combinations.
DIVERSE = [
    (torch.float32, torch.float32, "early", 0.0),
    (torch.bfloat16, torch.bfloat16, "early", 0.0),
    (torch.bfloat16, torch.float32, "late", 1.0),
    (torch.float16, torch.float16, "late", 0.0),
    (torch.float16, torch.bfloat16, "early", 0.0),
    (torch.bfloat16, None, "early", 0.0),
]
diverse = pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "cast", "offset"), DIVERSE, ids=lambda v: None if isinstance(v, float) else short(v)
)


@diverse
@pytest.mark.parametrize("form", FORMS)
def test_bits_for_every_memory_layout(form, x_dtype, w_dtype, cast, offset, randn) -> None:
    y_dtype = output_dtype(x_dtype, w_dtype, cast)
    for N in (1, 7, 512):
        w = weight(randn, N, w_dtype)
        x = FORMS[form](randn, N, x_dtype)
        check(x, w, randn(*x.shape, dtype=y_dtype), cast=cast, offset=offset)
        # dy in that layout with a contiguous x; then both, as transposes in attention produce.
        dy = FORMS[form](randn, N, y_dtype)
        check(randn(*x.shape, dtype=x_dtype), w, dy, cast=cast, offset=offset)
        check(x, w, dy, cast=cast, offset=offset)


@diverse
def test_bits_for_a_strided_weight(x_dtype, w_dtype, cast, offset, randn) -> None:
    if w_dtype is None:
        return
    x, dy = randn(3, 65, dtype=x_dtype), randn(3, 65, dtype=output_dtype(x_dtype, w_dtype, cast))
    for w in (randn(65, 3, dtype=w_dtype)[:, 1], randn(1, dtype=w_dtype).expand(65), randn(70, dtype=w_dtype)[5:]):
        check(x, w, dy, cast=cast, offset=offset)


@diverse
def test_bits_of_a_weight_for_each_head(x_dtype, w_dtype, cast, offset, randn) -> None:
    if w_dtype is None:
        return
    y_dtype = output_dtype(x_dtype, w_dtype, cast)
    for (*rows, H, N), w in (
        ((5, 4, 7), randn(4, 7)),
        ((2, 1, 3, 64), randn(64, 3).t()),
        ((6, 2), randn(6, 2)),
        ((3, 1, 33), randn(1, 33)),
        ((401, 5, 64), randn(5, 64)),
        ((3, 2000, 2), randn(2000, 2)),
        ((0, 3, 8), randn(3, 8)),
        ((2, 0, 8), randn(0, 8)),
    ):
        shape = *rows, H, N
        x, dy = randn(*shape, dtype=x_dtype), randn(*shape, dtype=y_dtype)
        check(x, w.to(w_dtype), dy, cast=cast, offset=offset)
        # Heads in front of the rows, as in attention, and a residual.
        if len(shape) == 3:
            x, dy = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, dy))
            residual, ds = randn(*shape, dtype=x_dtype), randn(*shape, dtype=x_dtype)
            check(x, w.to(w_dtype), dy, residual, ds, cast=cast, offset=offset)


@diverse
def test_bits_for_many_rows(x_dtype, w_dtype, cast, offset, randn) -> None:
    """So many rows that threads share them in pieces, with sizes that do not divide evenly."""
    y_dtype = output_dtype(x_dtype, w_dtype, cast)
    for M, N in ((20011, 64), (401, 2049), (300_007, 1)):
        x, dy = randn(M, N, dtype=x_dtype), randn(M, N, dtype=y_dtype)
        check(x, weight(randn, N, w_dtype), dy, cast=cast, offset=offset)


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_bits_for_rows_that_begin_more_than_2_31_elements_apart(dtype, randn, tmp_path) -> None:
    step, N = 1 << 30, 33
    # A sparse file, of which only the pages of the rows take memory.
    store = torch.from_file(str(tmp_path / "numbers"), shared=True, size=2 * step + 128, dtype=dtype)
    for shape, strides in (((3, N), (step, 1)), ((2, 3, N), (64, step, 1))):
        far = store.as_strided(shape, strides)
        near, w = far.copy_(randn(*shape, dtype=dtype)).clone(), randn(N, dtype=dtype)
        rstd = reference.exact_rstd(near, 1e-6)
        dx, dw = reference.backward(near, near, near, w, rstd, "early", 0.0, True, True)
        assert_same_bits(rms_norm(far, w), rms_norm(near, w), "y")
        assert_same_bits(add_rms_norm(near, far, w)[1], near + near, "s")
        leaves = far.detach().requires_grad_(), torch.zeros_like(near), w.detach().requires_grad_()
        found = torch.autograd.grad(add_rms_norm(*leaves), (leaves[0], leaves[2]), (far, far))
        assert_same_bits(found[0], dx, "dx")
        assert_same_bits(found[1], dw, "dw")


@every_case
def test_bits_with_a_residual(x_dtype, w_dtype, cast, offset, randn) -> None:
    for r_dtype, N in zip((x_dtype, *FLOATS), (127, 64, 3, 1280), strict=True):
        s_dtype = torch.promote_types(x_dtype, r_dtype)
        y_dtype = output_dtype(s_dtype, w_dtype, cast)
        x, residual = randn(2, 6, N, dtype=x_dtype), randn(2, 6, N, dtype=r_dtype)
        w, dy, ds = weight(randn, N, w_dtype), randn(2, 6, N, dtype=y_dtype), randn(2, 6, N, dtype=s_dtype)
        check(x, w, dy, residual, ds, cast=cast, offset=offset)
        check(x, w, dy, residual, None, cast=cast, offset=offset)
        # Different strides in all four tensors.
        other = randn(6, 2, N + 3, dtype=r_dtype).transpose(0, 1)[..., 3:]
        check(x, w, dy[:1, :1].expand(2, 6, N), other, ds.transpose(0, 1).contiguous().transpose(0, 1), cast=cast,
              offset=offset)  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_bits_with_a_residual_in_every_memory_layout(dtype, randn) -> None:
    w = randn(64, dtype=dtype)
    for (name, form), (_, other) in zip(
        FORMS.items(), [*list(FORMS.items())[1:], ("row_strided", sliced)], strict=True
    ):
        x = form(randn, 64, dtype)
        residual = other(randn, 64, dtype)
        residual = residual if residual.shape == x.shape else form(randn, 64, dtype)
        dy = form(randn, 64, dtype)
        check(x, w, dy, residual, form(randn, 64, dtype), cast="late"), name
    check(randn(3001, 64, dtype=dtype), w, randn(3001, 64, dtype=dtype), randn(3001, 64, dtype=dtype),
          randn(3001, 64, dtype=dtype))  # fmt: skip


def test_gradients_if_only_the_sum_is_used(randn) -> None:
    """If nothing depends on y, the gradient passes through x + residual unchanged, and dw is None."""
    x, residual, w = (t.requires_grad_() for t in (randn(4, 8), randn(4, 8), randn(8)))
    ds = randn(4, 8)
    _, s = add_rms_norm(x, residual, w)
    dx, dr, dw = torch.autograd.grad(s, (x, residual, w), ds, allow_unused=True)
    assert_same_bits(dx, ds)
    assert_same_bits(dr, ds)
    assert dw is None


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_a_lazily_negated_view_is_negated(dtype, randn) -> None:
    """A view with torch's negative bit set, whose memory holds the values before negation."""
    x, w, dy = randn(3, 64, dtype=dtype), randn(64, dtype=dtype), randn(3, 64, dtype=dtype)
    lazy = torch._neg_view(x)
    assert lazy.is_neg()
    assert_same_bits(rms_norm(lazy, w), rms_norm(-x, w), "x")
    assert_same_bits(rms_norm(x, torch._neg_view(w)), rms_norm(x, -w), "weight")
    assert_same_bits(add_rms_norm(x, lazy + x, w)[0], add_rms_norm(x, -x + x, w)[0], "residual")
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(rms_norm(leaf, w), leaf, torch._neg_view(dy))
    (expected,) = torch.autograd.grad(rms_norm(leaf, w), leaf, -dy)
    assert_same_bits(got, expected, "dy")


# --- special numbers -----------------------------------------------------------------------------------------

PATTERNS = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize(("cast", "offset"), SPECS)
@pytest.mark.parametrize("w_dtype", [torch.bfloat16, torch.float32], ids=short)
def test_bits_for_every_bf16_pattern_in_x(w_dtype, cast, offset, randn) -> None:
    x = torch.stack([PATTERNS, *randn(2, 1 << 16, dtype=torch.bfloat16)], 1)
    dy = randn(1 << 16, 3, dtype=output_dtype(torch.bfloat16, w_dtype, cast))
    for eps in (1e-6, 0.0):
        check(x, randn(3, dtype=w_dtype), dy, cast=cast, offset=offset, eps=eps)
        check(
            x, randn(3, dtype=w_dtype), dy, randn(1 << 16, 3, dtype=torch.bfloat16), cast=cast, offset=offset, eps=eps
        )


@pytest.mark.parametrize(("cast", "offset"), SPECS)
@pytest.mark.parametrize("x_dtype", FLOATS, ids=short)
def test_bits_for_every_bf16_pattern_in_the_weight(x_dtype, cast, offset, randn) -> None:
    for w in (PATTERNS, PATTERNS.float()):
        y_dtype = output_dtype(x_dtype, w.dtype, cast)
        check(randn(2, 1 << 16, dtype=x_dtype), w, randn(2, 1 << 16, dtype=y_dtype), cast=cast, offset=offset)
    # In narrow rows too, where no other element's NaN affects the row's sum for dx.
    patterns, x = PATTERNS.reshape(-1, 4)[:: 512 + 1], randn(2, 4, dtype=x_dtype)
    for w in patterns:
        check(x, w, randn(2, 4, dtype=output_dtype(x_dtype, w.dtype, cast)), cast=cast, offset=offset)


@pytest.mark.parametrize(("cast", "offset"), SPECS)
@pytest.mark.parametrize("w_dtype", [torch.bfloat16, torch.float32], ids=short)
def test_bits_for_every_bf16_pattern_in_dy(w_dtype, cast, offset, randn) -> None:
    y_dtype = output_dtype(torch.bfloat16, w_dtype, cast)
    dy = torch.stack([PATTERNS, *randn(2, 1 << 16, dtype=torch.bfloat16)], 1).to(y_dtype)
    x, w = randn(1 << 16, 3, dtype=torch.bfloat16), randn(3, dtype=w_dtype)
    check(x, w, dy, cast=cast, offset=offset)
    residual, ds = randn(1 << 16, 3, dtype=torch.bfloat16), dy.to(torch.bfloat16).flip(0)
    check(x, w, dy, residual, ds, cast=cast, offset=offset)


@pytest.mark.parametrize(("cast", "offset"), SPECS)
@pytest.mark.parametrize("x_dtype", FLOATS, ids=short)
def test_bits_for_every_fp16_pattern(x_dtype, cast, offset, randn) -> None:
    patterns = PATTERNS.view(torch.int16).view(torch.float16)
    if x_dtype == torch.float16:
        x = torch.stack([patterns, *randn(2, 1 << 16, dtype=x_dtype)], 1)
        check(x, randn(3, dtype=x_dtype), randn(1 << 16, 3, dtype=x_dtype), cast=cast, offset=offset)
    y_dtype = output_dtype(x_dtype, torch.float16, cast)
    check(randn(2, 1 << 16, dtype=x_dtype), patterns, randn(2, 1 << 16, dtype=y_dtype), cast=cast, offset=offset)


# NaNs whose payload is only in bits that bf16 lacks, or is all ones: careless rounding turns them into inf or −0.
NANS = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF, 0x7F80FFFF, 0x7FC00000], dtype=torch.int32)


@pytest.mark.parametrize("cast", ["early", "late"])
@pytest.mark.parametrize("x_dtype", FLOATS, ids=short)
def test_a_nan_with_any_payload_stays_a_nan(x_dtype, cast, randn) -> None:
    nans = NANS.view(torch.float32)
    M, N = len(nans), 5
    y_dtype = output_dtype(x_dtype, torch.float32, cast)
    w = randn(N)
    for nan_w in nans:
        bad = torch.cat([nan_w[None], randn(N - 1)])
        check(randn(3, N, dtype=x_dtype), bad, randn(3, N, dtype=y_dtype), cast=cast)
    if y_dtype == torch.float32:
        check(randn(M, N, dtype=x_dtype), w, torch.cat([nans[:, None], randn(M, N - 1)], 1), cast=cast)
        check(randn(M, 1, dtype=x_dtype), randn(1), nans[:, None], cast=cast)
    if x_dtype == torch.float32:
        check(torch.cat([nans[:, None], randn(M, N - 1)], 1), w, randn(M, N), cast=cast)
    for r_dtype in (torch.bfloat16, torch.float16):
        if x_dtype == torch.float32:
            x = torch.cat([nans[:, None], randn(M, N - 1)], 1)
            check(x, w, randn(M, N), randn(M, N, dtype=r_dtype), torch.cat([nans[:, None]] * N, 1), cast=cast)


def special(dtype: torch.dtype) -> list[float]:
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal * info.eps
    values = [0.0, subnormal, info.smallest_normal, info.smallest_normal / 2, 1.0, info.max, float("inf"), float("nan")]
    return values + [-v for v in values]


@pytest.mark.parametrize(("cast", "offset"), SPECS)
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_bits_for_special_numbers_in_every_input(dtype, cast, offset, randn) -> None:
    values = torch.tensor(special(dtype), dtype=dtype)
    pairs = torch.cartesian_prod(values, values)
    triples = torch.cat([pairs, randn(len(pairs), 1, dtype=dtype)], 1)
    dy = triples[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))]
    for eps in (0.0, 1e-6, 1e-30, 1e30):
        check(pairs, randn(2, dtype=dtype), randn(len(pairs), 2, dtype=dtype), cast=cast, offset=offset, eps=eps)
        check(triples, randn(3, dtype=dtype), randn(len(pairs), 3, dtype=dtype), cast=cast, offset=offset, eps=eps)
        check(randn(len(pairs), 3, dtype=dtype), randn(3, dtype=dtype), dy, cast=cast, offset=offset, eps=eps)
    x = randn(2, len(values), dtype=dtype)
    check(x, values, randn(2, len(values), dtype=dtype), cast=cast, offset=offset)
    one = torch.ones(1, 1, dtype=dtype)
    for a, b in itertools.product(values, values):
        check(a.reshape(1, 1), b.reshape(1), one, cast=cast, offset=offset)


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_bits_for_rows_of_zeros(dtype, randn) -> None:
    x, w, dy = torch.zeros(3, 17, dtype=dtype), randn(17, dtype=dtype), randn(3, 17, dtype=dtype)
    for cast in ("early", "late"):
        assert rms_norm(x, w, 0.0, cast=cast).isnan().all()  # 0 · 1/√0 by definition
        assert (rms_norm(x, w, 1e-6, cast=cast) == 0).all()
        for eps in (0.0, 1e-6):
            check(x, w, dy, cast=cast, eps=eps)
            check(-x, w, dy, cast=cast, eps=eps)


def test_the_sign_of_a_zero_weight_is_kept(randn) -> None:
    """Without an offset, cast="late" must not add 0 to the weight, because −0 + 0 is +0."""
    x = randn(3, 9)
    for cast in ("early", "late"):
        y = rms_norm(x, torch.full((9,), -0.0), cast=cast)
        assert torch.equal(y.signbit(), ~x.signbit())
    assert not (rms_norm(x.abs(), torch.full((9,), -0.0), cast="late", offset=1.0) == 0).any()


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_bits_if_products_or_squares_overflow(dtype, randn) -> None:
    big = torch.finfo(dtype).max
    for cast, offset in SPECS:
        for w in (randn(33, scale=big / 4).clamp(-big, big).to(dtype), randn(33, scale=1e38)):
            y_dtype = output_dtype(dtype, w.dtype, cast)
            check(randn(4, 33, dtype=dtype), w, randn(4, 33, dtype=y_dtype), cast=cast, offset=offset)
        # Squares that overflow fp32: their sum is finite in fp64, but the mean is infinite in fp32.
        huge = (randn(4, 33, scale=big / 4).clamp(-big, big)).to(dtype)
        check(huge, randn(33, dtype=dtype), randn(4, 33, dtype=dtype), cast=cast, offset=offset)
        check(huge, randn(33, dtype=dtype), randn(4, 33, dtype=dtype), huge, cast=cast, offset=offset)


# --- threads and processes -----------------------------------------------------------------------------------


def everything(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = rms_norm(x, w)
    return (y.detach(), *torch.autograd.grad(y, (x, w), dy))


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_the_thread_count_changes_no_bit(dtype, randn, threads) -> None:
    for M, N in ((20011, 64), (2048, 1280), (65, 32768)):
        x, w, dy = randn(M, N, dtype=dtype), randn(N, dtype=dtype), randn(M, N, dtype=dtype)
        results = []
        for count in (1, 2, 3, 1):
            threads(count)
            results.append(everything(x, w, dy))
        for other in results[1:]:
            for label, got, expected in zip(("y", "dx", "dw"), other, results[0], strict=True):
                assert_same_bits(got, expected, label)


@pytest.mark.skipif(kernel_threads._team_of_openmp() is None, reason="torch has no OpenMP here: there is only a pool")
def test_openmp_threads_and_the_pool_give_the_same_bits(randn, threads, monkeypatch) -> None:
    """Launched by Python; test_host.py compares C++ with Python."""
    monkeypatch.setattr(host, "norm", lambda *arguments: None)
    teams: list[int] = []
    team = kernel_threads._team_of_openmp()
    monkeypatch.setattr(kernel_threads, "_team_of_openmp", lambda: lambda *call: (teams.append(call[2]), team(*call)))
    threads(3)
    draw = [randn(3001, 129), randn(129), randn(3001, 129)]
    expected = everything(*draw)
    assert teams == [3, 3]  # forward and backward
    monkeypatch.setattr(kernel_threads, "_team_of_openmp", lambda: None)
    for label, got, right in zip(("y", "dx", "dw"), everything(*draw), expected, strict=True):
        assert_same_bits(got, right, label)
    assert kernel_threads._pool.cache_info().currsize == 1
    assert len(kernel_threads._pool(os.getpid())[1]) == 2


@pytest.mark.skipif(kernel_threads._team_of_openmp() is None, reason="torch has no OpenMP here: there is only a pool")
@pytest.mark.parametrize(("M", "forward", "backward"), [(16, 0, 0), (102, 0, 0), (103, 0, 1), (204, 0, 1), (205, 1, 1)])
def test_calls_that_take_about_30_microseconds_run_on_one_thread(
    M, forward, backward, randn, threads, monkeypatch
) -> None:
    """One makes a forward pass of 2^18 elements and a backward pass of 2^17. 1: threads share the pass."""
    monkeypatch.setattr(host, "norm", lambda *arguments: None)
    teams: list[int] = []
    team = kernel_threads._team_of_openmp()
    monkeypatch.setattr(kernel_threads, "_team_of_openmp", lambda: lambda *call: (teams.append(call[2]), team(*call)))
    threads(2)
    x, w = randn(M, 1280).requires_grad_(), randn(1280)
    y = rms_norm(x, w)
    assert teams == [2] * forward
    torch.autograd.grad(y, x, randn(M, 1280))
    assert teams == [2] * (forward + backward)


def test_pairs_and_single_numbers_of_bf16_have_the_same_bits(randn, monkeypatch) -> None:
    """Rows that begin or end in the middle of a 4-byte word are read one number at a time."""
    from rmsnorm.kernels.cpu import planner as cpu

    taken: list[bool] = []
    for name in ("forward_kernel", "backward_kernel"):
        kernel = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *key, kernel=kernel: (taken.append(key[2]), kernel(*key))[1])
    M, N = 700, 254
    memory, w, dy = randn(M * N + 1, dtype=torch.bfloat16), randn(N, dtype=torch.bfloat16), randn(M, N)
    moved = memory[1:].view(M, N)
    expected = everything(moved.clone(), w, dy.bfloat16())
    assert set(taken) == {True}
    taken.clear()
    for label, got, right in zip(("y", "dx", "dw"), everything(moved, w, dy.bfloat16()), expected, strict=True):
        assert_same_bits(got, right, label)
    assert set(taken) == {False}
    for x in (randn(5, 255, dtype=torch.bfloat16)[:, :254], randn(1, 255, dtype=torch.bfloat16),
              randn(5, 256, dtype=torch.bfloat16)[:, :255]):  # fmt: skip
        check(x, weight(randn, x.shape[-1], x.dtype), randn(*x.shape, dtype=x.dtype))


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="this system has no huge pages to ask for"
)
def test_large_outputs_use_huge_pages(randn) -> None:
    y = rms_norm(randn(4100, 4096))
    advised, inside = None, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            first, last = (int(address, 16) for address in line.split()[0].split("-"))
            inside = first <= y.data_ptr() + y.nbytes // 2 < last
        elif inside and line.startswith("VmFlags:"):
            advised = "hg" in line.split()
    assert advised


def test_the_order_in_which_dw_is_summed_depends_on_its_shape_only(threads) -> None:
    """The order depends on M and N, not on threads, dimensions or strides. The terms cancel, so order is visible."""
    generator = torch.Generator().manual_seed(11)
    M, N = 20000, 64
    signs = torch.randint(0, 2, (M, N), generator=generator) * 2.0 - 1  # with eps 0 the norm of ±1 is ±1
    half = torch.randn(M // 2, N, generator=generator) * 10.0 ** torch.randint(-9, 10, (M // 2, N), generator=generator)
    dy = torch.cat([half, -half[torch.randperm(M // 2, generator=generator)]]) * signs
    wide = torch.zeros(M, N + 8)
    wide[:, :N] = signs
    forms = (signs, signs.reshape(1, M, N), signs.reshape(4, M // 4, N), wide[:, :N], signs.reshape(M // 5, 1, 5, N))

    def dw(x: Tensor, dy: Tensor) -> Tensor:
        w = torch.ones(N, requires_grad=True)
        (gradient,) = torch.autograd.grad(rms_norm(x, w, 0.0), w, dy.reshape(x.shape))
        return gradient

    expected = dw(signs, dy)
    assert (dw(signs.flip(0), dy.flip(0)) != expected).any(), "the order does not show"
    for i, form in enumerate(forms):
        threads(1 + i % 3)
        assert_same_bits(dw(form, dy), expected, f"{tuple(form.shape)}, {1 + i % 3} threads")


def test_concurrent_calls_give_the_same_bits(randn) -> None:
    draws = [
        [randn(M, N, dtype=torch.bfloat16), randn(N, dtype=torch.bfloat16), randn(M, N, dtype=torch.bfloat16)]
        for M, N in ((4000, 256), (3, 256), (1000, 1280), (5001, 128))
    ]
    expected = [everything(*draw) for draw in draws]
    wrong: list[BaseException] = []
    start = threading.Barrier(len(draws))

    def work(index: int) -> None:
        try:
            start.wait()
            for _ in range(8):
                for got, right in zip(everything(*draws[index]), expected[index], strict=True):
                    assert_same_bits(got, right, f"thread {index}")
        except BaseException as error:  # raised below, in pytest's thread
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(draws))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong, wrong[0]


def digest(x: Tensor, w: Tensor, dy: Tensor) -> list[str]:
    """Hashes of y, rstd, dx and dw, by the operators, because autograd and OpenMP do not work in a forked child."""
    y, _, rstd = torch.ops.rmsnorm.forward.default(x, None, w, 1e-6, "late", 0.0, True)
    dx, dw = torch.ops.rmsnorm.backward.default(dy, None, x, w, rstd, "late", 0.0, True, True)
    return [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in (y, rstd, dx, dw)]


def in_child(pipe: Any, *tensors: Tensor) -> None:
    torch.use_deterministic_algorithms(False)  # otherwise torch fills memory with NaN through OpenMP: see digest
    pipe.send([digest(*tensors), digest(*tensors)])


def test_a_forked_child_computes_the_same_bits(randn) -> None:
    x, w, dy = randn(4000, 1280), randn(1280), randn(4000, 1280)
    expected = digest(x, w, dy)  # first in the parent, which starts threads that the child does not inherit
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns about any fork with threads
        child = context.Process(target=in_child, args=(there, x, w, dy))
        child.start()
    try:
        assert here.poll(60), "the child hangs or died"
        assert here.recv() == [expected, expected]
    finally:
        child.join(10)
        if child.is_alive():
            child.kill()
    assert child.exitcode == 0
    assert digest(x, w, dy) == expected


def test_repeated_calls_give_the_same_bits(randn) -> None:
    x, w, dy = randn(3000, 640, dtype=torch.bfloat16), randn(640), randn(3000, 640)
    first = everything(x, w, dy)
    for _ in range(3):
        for label, got, expected in zip(("y", "dx", "dw"), everything(x, w, dy), first, strict=True):
            assert_same_bits(got, expected, label)


# --- memory --------------------------------------------------------------------------------------------------


def allocated(run: Callable[[], Any]) -> list[int]:
    """The sizes in bytes of all allocations."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    del kept
    events = profile.profiler.kineto_results.events()
    return sorted(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0)


def saved(run: Callable[[], Any]) -> dict[int, int]:
    """The storages that autograd saves, as a mapping from address to bytes."""
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = run()
    del kept
    return found


@pytest.mark.parametrize("cast", ["early", "late"])
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_backward_saves_the_inputs_and_four_bytes_a_row(dtype, cast, randn) -> None:
    M, N = 300, 512
    wide = randn(M, 576, dtype=dtype)
    w = randn(N, dtype=dtype).requires_grad_()
    for x in (randn(M, N, dtype=dtype), wide[:, :N], randn(10, 30, N, dtype=dtype).transpose(0, 1)):
        x = x.detach().requires_grad_()
        kept = saved(lambda x=x: rms_norm(x, w, cast=cast))
        ours = {x.untyped_storage().data_ptr(), w.untyped_storage().data_ptr()}
        assert ours <= kept.keys(), "a copy of the input is saved in its place"
        assert [size for at, size in kept.items() if at not in ours] == [4 * M]


def test_backward_with_a_residual_saves_the_sum_and_four_bytes_a_row(randn) -> None:
    M, N = 300, 512
    x, residual = randn(M, N, dtype=torch.bfloat16).requires_grad_(), randn(M, N, dtype=torch.bfloat16)
    w = randn(N, dtype=torch.bfloat16)
    out: list[Tensor] = []

    def run() -> None:
        out[:] = add_rms_norm(x, residual, w)

    kept = saved(run)
    ours = {out[1].untyped_storage().data_ptr(), w.untyped_storage().data_ptr()}
    assert ours <= kept.keys(), "of the inputs only their sum is saved, and it is the output itself"
    assert [size for at, size in kept.items() if at not in ours] == [4 * M]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_calls_allocate_their_outputs_and_little_more(dtype, transposed, randn) -> None:
    M, N = 600, 512
    size, w = M * N * dtype.itemsize, randn(N, dtype=dtype).requires_grad_()
    x = randn(20, 30, 576, dtype=dtype).transpose(0, 1)[..., :N] if transposed else randn(M, N, dtype=dtype)
    x, dy = x.detach().requires_grad_(), randn(*x.shape, dtype=dtype)
    y = rms_norm(x, w)
    add_rms_norm(x, x, w)
    with torch.no_grad():
        assert allocated(lambda: rms_norm(x, w)) == [size]
        assert allocated(lambda: add_rms_norm(x, x, w)) == [size] * 2
    assert allocated(lambda: rms_norm(x, w)) == [4 * M, size]
    sizes = allocated(lambda: torch.autograd.grad(y, (x, w), dy))
    # dx, dw, and the partial sums of dw, which are much smaller than M × N.
    assert sizes[-1] == size
    assert sum(sizes[:-1]) < M * N


def test_gradients_of_a_tensor_without_rows() -> None:
    """A mixture-of-experts layer has such rows if an expert gets no tokens. No layout may lead to a copy."""
    w = torch.randn(8, requires_grad=True)
    for x in (torch.empty(0, 8), torch.empty(0, 1).expand(0, 8), torch.empty(2, 0, 2, 0, 2, 0, 2, 8)):
        x.requires_grad_()
        dx, dw = torch.autograd.grad(rms_norm(x, w).sum(), (x, w))
        assert dx.shape == x.shape
        assert torch.equal(dw, torch.zeros(8))
