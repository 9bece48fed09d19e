"""The kernels of gated norms on the CPU have the bits of gated_reference.py, for every form, dtype, width and layout.

The tests call the public functions and the operators, so that they cover autograd too.
"""

import ast
import itertools
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

import rmsnorm
from rmsnorm import compat, explain, gated_reference, gated_rms_norm
from rmsnorm.kernels.cpu import cache, processor
from rmsnorm.kernels.cpu.gated_kernels import TILE, sigmoid
from rmsnorm.spec import Activation, Cast, Gate, Spec, gated_dtype
from test_kernels import FLOATS, FORMS, NANS, PATTERNS, allocated, saved, short, special
from tolerance import GATED_GRADIENT, assert_same_bits

pytestmark = pytest.mark.usefixtures("poisoned")

CASTS: tuple[Cast, ...] = ("early", "late")
ACTIVATIONS: tuple[Activation, ...] = ("silu", "sigmoid")
FORMS_OF_GATE = [
    Spec(1e-6, cast, gate=Gate(activation, first))
    for cast, activation, first in itertools.product(CASTS, ACTIVATIONS, (False, True))
]
every_form = pytest.mark.parametrize("spec", FORMS_OF_GATE, ids=str)


# Each value of each property at least once.
diverse_forms = pytest.mark.parametrize("spec", [FORMS_OF_GATE[i] for i in (0, 3, 6)], ids=str)


def in_groups(spec: Spec, groups: int, eps: float = 1e-6) -> Spec:
    return Spec(eps, spec.cast, gate=spec.gate, groups=groups)


def call(x: Tensor, gate: Tensor, w: Tensor | None, spec: Spec) -> Tensor:
    assert spec.gate is not None
    return gated_rms_norm(
        x, gate, w, spec.eps, cast=spec.cast, activation=spec.gate.activation, gate_first=spec.gate.first,
        groups=spec.groups,
    )  # fmt: skip


def operator_arguments(spec: Spec) -> tuple[Any, ...]:
    assert spec.gate is not None
    return spec.cast, spec.gate.activation, spec.gate.first, spec.groups


def y_dtype(x: Tensor, w: Tensor | None, spec: Spec) -> torch.dtype:
    return gated_dtype(x.dtype, None if w is None else w.dtype, spec)


def check(x: Tensor, gate: Tensor, w: Tensor | None, dy: Tensor, spec: Spec) -> None:
    """Asserts that y, rstd, dx, dgate and dw have the reference's bits, and that no input changed."""
    inputs = [t for t in (x, gate, w, dy) if t is not None]
    before = [t.clone() for t in inputs]
    y_ref, rstd_ref = gated_reference.forward(x, gate, w, spec, True)
    assert rstd_ref is not None
    _, rstd = torch.ops.rmsnorm.gated_forward.default(x, gate, w, spec.eps, *operator_arguments(spec), True)
    assert_same_bits(rstd, rstd_ref, "rstd")
    leaves = [t.detach().requires_grad_() for t in (x, gate, w) if t is not None]
    y = call(leaves[0], leaves[1], leaves[2] if w is not None else None, spec)
    assert_same_bits(y, y_ref, "y")
    assert y.is_contiguous()
    expected = gated_reference.backward(dy, x, gate, w, rstd_ref, spec, True, True, w is not None)
    for name, got, right in zip(("dx", "dgate", "dw"), torch.autograd.grad(y, leaves, dy), expected, strict=False):
        assert_same_bits(got, right, name)
    for now, then in zip(inputs, before, strict=True):
        assert_same_bits(now, then, "an input was written to")


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_these_tests_run_the_kernels(dtype) -> None:
    x = torch.zeros(2, 8, dtype=dtype)
    assert "Numba" in explain(x, torch.zeros(8, dtype=dtype), gate=x, groups=2)
    assert "Numba" in explain(x, rmsnorm.GatedRMSNorm(8), gate=x.float())
    assert "Numba" in explain(x, rmsnorm.GatedRMSNorm(8))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": rmsnorm.RMSNorm(8)}, TypeError, "gate is given, expected None: the layer has no gate"),
        ({"gate": None, "groups": 2}, ValueError, "gate is None with arguments of gated_rms_norm, expected the gate"),
        ({"residual": torch.ones(2, 8)}, ValueError, "residual is given with a gate, expected None"),
        ({"offset": 1.0, "cast": "late"}, ValueError, "offset is 1.0 with a gate, expected 0"),
        ({"gate": torch.ones(8)}, ValueError, r"gate has shape \(8,\), expected \(2, 8\)"),
        ({"groups": 3}, ValueError, "groups is 3, expected a number that divides 8"),
    ],
)
def test_explain_refuses_what_no_call_takes(change, error, message) -> None:
    with pytest.raises(error, match=message):
        explain(**{"x": torch.ones(2, 8), "gate": torch.ones(2, 8), **change})


def test_explain_says_what_is_copied_and_what_has_no_kernel() -> None:
    x = torch.ones(2, 8)
    assert explain(x, gate=torch.ones(8, 2).t()).endswith("because the last dimension is not contiguous: gate")
    assert "gate is torch.float64: computed in fp32" in explain(x, gate=x.double())


# --- the sweep -----------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("x_dtype", FLOATS, ids=short)
def test_bits_for_every_dtype(x_dtype, spec, randn) -> None:
    for gate_dtype, w_dtype, groups in itertools.product(FLOATS, (None, *FLOATS), (1, 4)):
        N = 60
        # From rows so small that eps dominates to rows so large that it has no effect.
        x = (randn(5, N) * torch.tensor([1e-3, 0.1, 1.0, 30.0, 200.0])[:, None]).to(x_dtype)
        w = None if w_dtype is None else randn(N, dtype=w_dtype)
        of = in_groups(spec, groups)
        check(x, randn(5, N, dtype=gate_dtype, scale=4.0), w, randn(5, N, dtype=y_dtype(x, w, of)), of)


@every_form
def test_bits_at_every_width(spec, randn) -> None:
    narrow = itertools.product((1, 2, 3, 7, 127, 1021), (1, 3))
    for (N, groups), dtype in zip([*narrow, (TILE - 1, 1), (TILE + 1, 2)], itertools.cycle(FLOATS)):
        x, gate = randn(2, N * groups, dtype=dtype), randn(2, N * groups, dtype=dtype, scale=3.0)
        w = randn(N * groups, dtype=dtype)
        check(x, gate, w, randn(2, N * groups, dtype=dtype), in_groups(spec, groups))


# A selection of dtypes and forms; the tests above cover all combinations.
DIVERSE = [
    (torch.float32, torch.float32, torch.float32, FORMS_OF_GATE[0]),
    (torch.bfloat16, torch.float32, torch.bfloat16, FORMS_OF_GATE[1]),
    (torch.bfloat16, torch.bfloat16, torch.float32, FORMS_OF_GATE[4]),
    (torch.float16, torch.bfloat16, None, FORMS_OF_GATE[7]),
]
diverse = pytest.mark.parametrize(
    ("x_dtype", "gate_dtype", "w_dtype", "spec"), DIVERSE, ids=lambda v: str(v) if isinstance(v, Spec) else short(v)
)


@diverse
@pytest.mark.parametrize("form", FORMS)
def test_bits_for_every_memory_layout(form, x_dtype, gate_dtype, w_dtype, spec, randn) -> None:
    for N, groups in ((7, 1), (32, 4)):
        of = in_groups(spec, groups)
        x = FORMS[form](randn, N, x_dtype)
        w = None if w_dtype is None else randn(N, dtype=w_dtype)
        dy_dtype = y_dtype(x, w, of)
        gate, dy = randn(*x.shape, dtype=gate_dtype), randn(*x.shape, dtype=dy_dtype)
        check(x, gate, w, dy, of)
        check(x, FORMS[form](randn, N, gate_dtype), w, FORMS[form](randn, N, dy_dtype), of)


@diverse
def test_inputs_with_a_contiguous_last_dimension_are_not_copied(x_dtype, gate_dtype, w_dtype, spec, randn) -> None:
    """x and the gate as halves of one projection's rows, as in Mamba 2."""
    N, M = 512, 64
    both = randn(M, 2 * N + 8, dtype=x_dtype)
    x, gate = both[:, :N], both[:, N : 2 * N]
    w = None if w_dtype is None else randn(N, dtype=w_dtype)
    with torch.no_grad():
        sizes = allocated(lambda: call(x, gate, w, in_groups(spec, 4)))
    assert sizes == [M * N * y_dtype(x, w, spec).itemsize]


@diverse
def test_bits_for_a_strided_weight(x_dtype, gate_dtype, w_dtype, spec, randn) -> None:
    if w_dtype is None:
        return
    x, gate = randn(3, 66, dtype=x_dtype), randn(3, 66, dtype=gate_dtype)
    for w in (randn(66, 3, dtype=w_dtype)[:, 1], randn(1, dtype=w_dtype).expand(66), randn(71, dtype=w_dtype)[5:]):
        check(x, gate, w, randn(3, 66, dtype=y_dtype(x, w, spec)), in_groups(spec, 3))


@diverse
def test_bits_for_many_rows(x_dtype, gate_dtype, w_dtype, spec, randn) -> None:
    """So many rows that threads share them in pieces, with sizes that do not divide evenly."""
    for M, N, groups in ((601, 64, 1), (157, 96, 3), (20_007, 1, 1)):
        of = in_groups(spec, groups)
        x, gate = randn(M, N, dtype=x_dtype), randn(M, N, dtype=gate_dtype)
        w = None if w_dtype is None else randn(N, dtype=w_dtype)
        check(x, gate, w, randn(M, N, dtype=y_dtype(x, w, of)), of)


@every_form
def test_only_the_gradients_that_are_asked_for_are_computed(spec, randn) -> None:
    x, gate, w, dy = randn(5, 24), randn(5, 24), randn(24), randn(5, 24)
    of = in_groups(spec, 2)
    _, rstd = gated_reference.forward(x, gate, w, of, True)
    assert rstd is not None
    for needs in itertools.product((False, True), repeat=3):
        got = torch.ops.rmsnorm.gated_backward.default(dy, x, gate, w, rstd, *operator_arguments(of), *needs)
        right = gated_reference.backward(dy, x, gate, w, rstd, of, *needs)
        for a, b in zip(got, right, strict=True):
            assert_same_bits(a, torch.empty(0) if b is None else b)


def test_a_cotangent_and_a_statistic_of_any_dtype_and_strides(randn) -> None:
    """Calls of the operator, and hooks on saved tensors, can pass these."""
    x, gate, w = randn(6, 24, dtype=torch.bfloat16), randn(6, 24), randn(24)
    spec = in_groups(FORMS_OF_GATE[0], 2)
    _, rstd = gated_reference.forward(x, gate, w, spec, True)
    assert rstd is not None
    for dy in (randn(6, 24), randn(6, 24).double(), randn(24, 6, dtype=torch.float16).t()):
        for r in (rstd, rstd.t().contiguous().t()):
            arguments = dy, x, gate, w, r
            got = torch.ops.rmsnorm.gated_backward.default(*arguments, *operator_arguments(spec), True, True, True)
            for a, b in zip(got, gated_reference.backward(*arguments, spec, True, True, True), strict=True):
                assert_same_bits(a, b)


def test_the_sigmoid_has_the_bits_of_the_reference_before_it_is_rounded_to_fp32(randn) -> None:
    """In fp32 a last bit of fp64, such as that of a product that is rounded alone, shows once in 10^8 numbers."""
    gates = torch.cat([randn(20_000, scale=20.0), randn(20_000), PATTERNS.float()]).double()
    found = np.empty(len(gates))

    @numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def compute(gates: Any, out: Any) -> None:
        for i in range(out.size):
            out[i] = sigmoid(gates[i])

    compute(gates.numpy(), found)
    assert_same_bits(torch.from_numpy(found), gated_reference._sigmoid(gates))


# --- special numbers -----------------------------------------------------------------------------------------


@every_form
def test_bits_for_every_kind_of_bf16_pattern(spec, randn) -> None:
    mixed = torch.stack([PATTERNS, *randn(2, 1 << 16, dtype=torch.bfloat16)], 1)[:: 13 if spec.cast == "late" else 7]
    plain, w = randn(*mixed.shape, dtype=torch.bfloat16), randn(3, dtype=torch.bfloat16)
    for x, gate, dy, eps in ((plain, mixed, plain, 1e-6), (mixed, plain, plain, 0.0), (plain, plain, mixed, 1e-6)):
        check(x, gate, w, dy, in_groups(spec, 1, eps))
    wide = randn(1, 1 << 12, dtype=torch.bfloat16)
    check(wide, wide.flip(1), PATTERNS[3::16], wide, in_groups(spec, 1 << 10))


@every_form
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_bits_for_special_numbers_in_every_input(dtype, spec, randn) -> None:
    values = [*special(dtype), 90.0, -90.0, -88.0, 200.5, -200.5, -60.5, 60.5]
    values += NANS.view(torch.float32).tolist() if dtype is torch.float32 else []
    pairs = torch.cartesian_prod(*[torch.tensor(values, dtype=dtype)] * 2)
    other, w = randn(len(pairs), 2, dtype=dtype), randn(2, dtype=dtype)
    swapped = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))]
    for eps, groups in ((0.0, 1), (1e-6, 2)):
        of = in_groups(spec, groups, eps)
        check(pairs, swapped, w, other, of)
        check(other, swapped, w, pairs, of)
    special_w = torch.tensor(values, dtype=dtype)
    x = randn(2, len(values), dtype=dtype)
    check(x, x.flip(0), special_w, x, in_groups(spec, len(values)))


@every_form
def test_nans_of_fp32_gates_and_weights_stay_nans_in_16_bits(spec, randn) -> None:
    """Careless rounding turns a NaN with ones in the bits that bf16 lacks into -0 or inf."""
    nans = NANS.view(torch.float32)
    x = randn(3, len(nans), dtype=torch.bfloat16)
    of = in_groups(spec, len(nans))
    dy = randn(*x.shape, dtype=torch.bfloat16)
    check(x, nans.expand_as(x), randn(len(nans), dtype=torch.bfloat16), dy, of)
    check(x, randn(*x.shape), nans, dy.to(y_dtype(x, nans, of)), of)


def test_rows_of_zeros_and_no_rows(randn) -> None:
    for spec in FORMS_OF_GATE:
        w, x = randn(6), torch.zeros(3, 6)
        assert (call(x, randn(3, 6), w, spec) == 0).all()
        check(x, randn(3, 6), w, randn(3, 6), in_groups(spec, 2, 0.0))
        for empty in (torch.empty(0, 6), torch.empty(2, 0, 6)):
            check(empty, empty, w, empty, in_groups(spec, 2))


# --- threads and batches -------------------------------------------------------------------------------------


def everything(x: Tensor, gate: Tensor, w: Tensor, dy: Tensor, spec: Spec) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x, gate, w)]
    y = call(leaves[0], leaves[1], leaves[2], spec)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


@diverse_forms
def test_the_thread_count_changes_no_bit(spec, randn, threads) -> None:
    for M, N, groups in ((1011, 64, 1), (61, 1280, 4), (5, 2 * TILE + 2, 2)):
        x, gate, w, dy = randn(M, N), randn(M, N), randn(N), randn(M, N)
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(everything(x, gate, w, dy, in_groups(spec, groups)))
        for other in results[1:]:
            for label, got, expected in zip(("y", "dx", "dgate", "dw"), other, results[0], strict=True):
                assert_same_bits(got, expected, label)


@every_form
def test_a_row_has_the_same_bits_in_every_batch(spec, randn) -> None:
    x, gate, w, dy = randn(700, 96), randn(700, 96), randn(96), randn(700, 96)
    of = in_groups(spec, 3)
    y, dx, dgate, _ = everything(x, gate, w, dy, of)
    for rows in (slice(0, 1), slice(37, 38), slice(333, 600)):
        alone = everything(x[rows], gate[rows], w, dy[rows], of)
        for label, got, expected in zip(("y", "dx", "dgate"), alone, (y, dx, dgate), strict=False):
            assert_same_bits(got, expected[rows], label)


def test_the_order_in_which_dw_is_summed_depends_on_its_shape_only(threads) -> None:
    """The order depends on M and N, not on groups, threads, dimensions or strides. The terms cancel, so it is visible."""
    generator = torch.Generator().manual_seed(11)
    M, N = 20000, 64
    signs = torch.randint(0, 2, (M, N), generator=generator) * 2.0 - 1  # with eps 0 the norm of ±1 is ±1
    half = torch.randn(M // 2, N, generator=generator) * 10.0 ** torch.randint(-9, 10, (M // 2, N), generator=generator)
    dy = torch.cat([half, -half[torch.randperm(M // 2, generator=generator)]]) * signs
    gate = torch.full((M, N), 40.0)  # its sigmoid is 1

    def dw(x: Tensor, dy: Tensor, groups: int = 1) -> Tensor:
        w = torch.ones(N, requires_grad=True)
        y = gated_rms_norm(x, gate.reshape(x.shape), w, 0.0, activation="sigmoid", groups=groups)
        (gradient,) = torch.autograd.grad(y, w, dy.reshape(x.shape))
        return gradient

    expected = dw(signs, dy)
    assert (dw(signs.flip(0), dy.flip(0)) != expected).any(), "the order does not show"
    wide = torch.zeros(M, N + 8)
    wide[:, :N] = signs
    for i, form in enumerate((signs, signs.reshape(4, M // 4, N), wide[:, :N], signs.reshape(M // 5, 1, 5, N))):
        threads(1 + i % 3)
        assert_same_bits(dw(form, dy, groups=2**i), expected, f"{tuple(form.shape)}, {1 + i % 3} threads")


# --- gradients and memory ------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize(("N", "groups"), [(64, 4), (1000, 1)])
def test_gradients_are_within_their_roundings_of_the_truth(N, groups, spec, randn) -> None:
    x, gate, w, dy = randn(40, N), randn(40, N, scale=3.0), randn(N), randn(40, N)
    assert spec.gate is not None
    first, grouped = spec.gate.first, gated_reference.grouped
    _, dx, dgate, dw = everything(x, gate, w, dy, in_groups(spec, groups))
    leaves = [t.double().requires_grad_() for t in (x, gate, w)]
    truth = gated_reference.truth(leaves[0], leaves[1], leaves[2], spec.eps, spec.gate, groups)
    of_x, of_gate, of_w = torch.autograd.grad(truth, leaves, dy.double())
    # The sizes of what is multiplied and subtracted.
    g = leaves[1]
    a = torch.nn.functional.silu(g) if spec.gate.activation == "silu" else torch.sigmoid(g)
    slope = torch.autograd.grad(a.sum(), g)[0].abs()
    a, size_x, size_dy, size_w = a.detach().abs(), x.double().abs(), dy.double().abs(), w.double().abs()
    rows = grouped(size_x * a if first else size_x, groups)
    rstd = torch.rsqrt(rows.square().mean(-1, keepdim=True) + spec.eps)
    xh = rows * rstd
    d = size_dy if first else size_dy * a
    of_g = grouped(d * size_w, groups)
    dz = (rstd * (of_g + xh * (of_g * xh).mean(-1, keepdim=True))).flatten(-2)
    h = xh.flatten(-2)
    sizes = (
        dz * a if first else dz, slope * (dz * size_x if first else size_dy * size_w * h), (d * h).sum(0)
    )  # fmt: skip
    for label, got, right, size in zip(
        ("dx", "dgate", "dw"), (dx, dgate, dw), (of_x, of_gate, of_w), sizes, strict=True
    ):
        assert ((got - right).abs() <= GATED_GRADIENT * size).all(), label


def test_backward_saves_the_inputs_and_four_bytes_a_row_and_group(randn) -> None:
    M, N, groups = 300, 512, 4
    x, gate, w = (t.requires_grad_() for t in (randn(M, N), randn(M, N), randn(N)))
    kept = saved(lambda: gated_rms_norm(x, gate, w, groups=groups))
    ours = {t.untyped_storage().data_ptr() for t in (x, gate, w)}
    assert ours <= kept.keys(), "a copy of an input is saved in its place"
    assert [size for at, size in kept.items() if at not in ours] == [4 * M * groups]


def test_calls_allocate_their_outputs_and_little_more(randn) -> None:
    M, N = 600, 512
    x, gate, w = (t.requires_grad_() for t in (randn(M, N, dtype=torch.bfloat16), randn(M, N), randn(N)))
    y = gated_rms_norm(x, gate, w, groups=4)
    dy = torch.ones_like(y)
    with torch.no_grad():
        assert allocated(lambda: gated_rms_norm(x, gate, w, groups=4)) == [2 * M * N]
    sizes = allocated(lambda: torch.autograd.grad(y, (x, gate, w), dy))
    # dx, dgate, dw, and the partial sums of dw, which are much smaller than M × N.
    assert sizes[-2:] == [2 * M * N, 4 * M * N]
    assert sum(sizes[:-2]) < M * N


# --- how they are compiled -----------------------------------------------------------------------------------


def test_the_cache_is_keyed_by_every_source_that_machine_code_is_made_from() -> None:
    root = Path(rmsnorm.__file__).parent
    sources = {source.relative_to(root).as_posix() for source in cache.SOURCES}
    assert all(source.exists() for source in cache.SOURCES)
    for name in ("kernels", "gated_kernels", "intrinsics"):
        file = f"kernels/cpu/{name}.py"
        assert file in sources
        for node in ast.walk(ast.parse((root / file).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rmsnorm."):
                imported = (node.module or "").removeprefix("rmsnorm.").replace(".", "/")
                assert f"{imported}.py" in sources, f"{file} imports {imported}"


@pytest.mark.parametrize(
    ("name", "missing"), [("x86-64-v2", ("fp16", "fma")), ("ivybridge", ("fma",)), ("haswell", ())]
)
def test_processors_without_fma_or_fp16_are_recognized(name, missing, monkeypatch) -> None:
    triple = "x86_64-unknown-linux-gnu"
    monkeypatch.setattr(compat, "numba_processor", lambda: (triple, name, ""))
    try:
        found = processor._missing_instructions.__wrapped__()
    except RuntimeError as error:
        pytest.skip(f"LLVM cannot compile for x86 here: {error}")
    assert found == missing
