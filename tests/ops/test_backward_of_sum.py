"""The operator `backward_of_sum` has the bits of separate additions around `rmsnorm::backward`."""

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rmsnorm import reference
from rmsnorm.kernels.cpu import planner as cpu
from rmsnorm.kernels.plan import Backward
from rmsnorm.spec import Spec
from tolerance import assert_same_bits

OF_SUM, BACKWARD = torch.ops.rmsnorm.backward_of_sum.default, torch.ops.rmsnorm.backward.default
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SPECS = (("early", 0.0), ("late", 0.0), ("late", 1.0))
NEEDS = ((True, True), (True, False), (False, True), (False, False))
Draw = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("poisoned")


def composed(dy: list[Tensor], ds: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The same by separate operators."""
    dx, dw = BACKWARD(functools.reduce(torch.add, dy), None, *arguments)
    return dx if ds is None or dx.shape != ds.shape else dx + ds, dw


def check(dy: list[Tensor], ds: Tensor | None, *arguments: Any) -> None:
    got = OF_SUM(dy, ds, *arguments)
    for name, a, b in zip(("dx", "dw"), got, composed(dy, ds, *arguments), strict=True):
        assert a.is_contiguous()
        assert_same_bits(a, b, f"{name} of {arguments[4:]}, {len(dy)} gradients, ds {ds is not None}")


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "cast", "offset"),
    [
        (x, w, *spec)
        for x, w in ((BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP32, BF16), (FP16, BF16), (FP64, FP32))
        for spec in SPECS
    ]
    + [(BF16, None, "early", 0.0), (FP32, None, "late", 0.0)],
)
def test_bits_are_those_of_separate_operators(runner, randn, x_dtype, w_dtype, cast, offset) -> None:
    """For every number of gradients, with and without ds, and for every choice of results."""
    for shape, count, adds, needs in itertools.product(
        ((5, 33), (70, 64), (2, 3, 1280), (48,)), (1, 2, 3), (False, True), NEEDS
    ):
        if w_dtype is None and needs[1]:
            continue
        w = None if w_dtype is None else randn(shape[-1], dtype=w_dtype)
        x, rstd = randn(*shape, dtype=x_dtype), randn(*shape[:-1], 1).square().squeeze(-1) + 0.5
        y_dtype = torch.promote_types(x_dtype, w_dtype) if w_dtype is not None and cast != "late" else x_dtype
        dy = [randn(*shape, dtype=y_dtype) for _ in range(count)]
        check(dy, randn(*shape, dtype=x_dtype) if adds else None, x, w, rstd, cast, offset, *needs)


def test_omitting_the_rounding_of_dx_or_of_a_sum_of_dy_would_change_bits(randn) -> None:
    """On these numbers, adding in fp32 would give other bits, so the tests of this file can tell the two apart."""
    x, w, rstd, ds = (
        randn(64, 64, dtype=BF16),
        randn(64, dtype=BF16),
        randn(64).square() + 0.5,
        randn(64, 64, dtype=BF16),
    )
    dy = [randn(64, 64, dtype=BF16) for _ in range(3)]
    dx, dw = OF_SUM(dy, ds, x, w, rstd, "early", 0.0, True, True)
    once = BACKWARD(functools.reduce(torch.add, dy), ds, x, w, rstd, "early", 0.0, True, True)[0]
    assert (once != dx).sum() > 100
    wide = BACKWARD(sum(t.float() for t in dy).bfloat16(), None, x, w, rstd, "early", 0.0, True, True)
    assert (wide[0] + ds != dx).sum() > 100
    assert (wide[1] != dw).any()


def test_gradients_of_any_strides_are_added(runner, randn) -> None:
    M, N = 12, 64
    for dtype in (FP32, BF16):
        wide = randn(M, N + 32, dtype=dtype)
        wide[:, N:] = torch.nan
        views = (
            randn(M, N, dtype=dtype),
            wide[:, :N],
            randn(2 * M, N, dtype=dtype)[::2],
            randn(N, M, dtype=dtype).t(),
            randn(M * N + 1, dtype=dtype)[1:].view(M, N),
            randn(1, N, dtype=dtype).expand(M, N),
            randn(()).to(dtype).expand(M, N),
        )
        w, rstd = randn(2 * N, dtype=dtype)[::2], randn(M, 2).square().add(0.5)[:, 0]
        for i in range(len(views)):
            a, b, c, d, x = (views[(i + k) % len(views)] for k in range(5))
            check([a, b, c], d, x, w, rstd, "early", 0.0, True, True)
            check([a, b], None, x, w, rstd, "late", 1.0, True, True)
        four = [randn(2, 3, 2, N + 3, dtype=dtype)[..., :N].permute(2, 0, 1, 3) for _ in range(5)]
        check(four[:3], four[3], four[4], w, randn(2, 2, 3).square() + 0.5, "early", 0.0, True, True)


def test_gradients_of_another_dtype_than_y_are_added_in_their_own_dtype(randn) -> None:
    x, w, rstd = randn(6, 32, dtype=BF16), randn(32, dtype=BF16), randn(6).square() + 0.5
    check([randn(6, 32, dtype=FP16) for _ in range(3)], x, x, w, rstd, "early", 0.0, True, True)
    check([randn(6, 32) for _ in range(3)], x, x, w, rstd, "early", 0.0, True, True)


def test_special_numbers_and_overflowing_sums_have_the_same_bits(runner, randn) -> None:
    for dtype, w_dtype in ((FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16)):
        largest = torch.finfo(dtype).max
        special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, largest, -largest, 1e-40], dtype=dtype)
        dy = [randn(16, 64, dtype=dtype) for _ in range(3)]
        ds, x, w = randn(16, 64, dtype=dtype), randn(16, 64, dtype=dtype), randn(64, dtype=w_dtype)
        for k, t in enumerate((*dy, ds)):
            for row in range(8):
                t[row, :8] = special.roll(row * (k + 1))
        for cast, offset in SPECS:
            if cast == "late" or w_dtype is dtype:  # so that dtype is that of y
                check(dy, ds, x, w, torch.ones(16), cast, offset, True, True)


def test_a_nan_weight_with_any_payload_gives_nan_gradients(runner, randn) -> None:
    """Rounding it to bf16 as a number would make it a zero or an infinity."""
    w = torch.full((64,), 0x7FFFFFFF, dtype=torch.int32).view(FP32)
    x = randn(4, 64, dtype=BF16)
    dx, _ = OF_SUM([x, x], x, x, w, torch.ones(4), "late", 0.0, True, True)
    assert dx.isnan().all()


def test_the_thread_count_changes_no_bit(randn, threads) -> None:
    x, w, rstd = randn(700, 1280, dtype=BF16), randn(1280, dtype=BF16), randn(700).square() + 0.5
    dy = [randn(700, 1280, dtype=BF16) for _ in range(3)]
    threads(1)
    expected = OF_SUM(dy, x, x, w, rstd, "early", 0.0, True, True)
    threads(2)
    for a, b in zip(OF_SUM(dy, x, x, w, rstd, "early", 0.0, True, True), expected, strict=True):
        assert_same_bits(a, b)
    check(dy, x, x, w, rstd, "early", 0.0, True, True)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_rows_give_an_empty_dx_and_a_dw_of_zeros(runner, randn, shape) -> None:
    x, w, rstd = randn(*shape), randn(8), torch.ones(shape[:-1])
    check([x, x], x, x, w, rstd, "early", 0.0, True, True)


# --- who makes the call --------------------------------------------------------------------------------------


def test_no_python_runs_for_a_planned_call(left_to_python, randn) -> None:
    for dtype, count, adds in itertools.product((FP32, BF16, FP16), (1, 2, 3), (False, True)):
        x, w, rstd = randn(40, 1280, dtype=dtype), randn(1280, dtype=dtype), randn(40).square() + 0.5
        check([x + i for i in range(count)], x if adds else None, x, w, rstd, "early", 0.0, True, True)
    assert left_to_python == []


def test_calls_that_differ_in_the_number_of_gradients_have_separate_plans(left_to_python, randn, monkeypatch) -> None:
    planned: list[Backward] = []
    plan = cpu.plan_backward
    monkeypatch.setattr(cpu, "plan_backward", lambda kind: (planned.append(kind), plan(kind))[1])
    x, w, rstd = randn(4, 32), randn(32), randn(4).square() + 0.5
    arguments = x, w, rstd, "early", 0.0, True, True
    for _ in range(2):
        for count, ds in itertools.product((1, 2, 3), (None, x)):
            check([x] * count, ds, *arguments)
        BACKWARD(x, x, *arguments)
    assert len(planned) == len(set(map(repr, planned))) == 3 * 2 + 2  # and `backward` with and without ds
    assert [(len(kind.dys), kind.round_first) for kind in planned if kind.round_first] == [
        (count, True) for count in (1, 1, 2, 2, 3, 3)
    ]
    assert left_to_python == []


def test_planning_allocates_nothing_and_torch_converts_nothing(randn) -> None:
    x, w, rstd = randn(70, 1280, dtype=BF16), randn(1280, dtype=BF16), randn(70).abs()
    for count in (1, 2, 3):
        plan = cpu.plan_backward(Backward.of_sum([x] * count, x, x, w, rstd, Spec(), True, True))
        assert plan.before == plan.after == ()
        assert [t.name for t in plan.fresh] == ["dx", "partials", "dw"]


# --- errors --------------------------------------------------------------------------------------------------

X = torch.ones(4, 64)
GOOD = {
    "dy": [X, X], "ds": X, "x": X, "weight": X[0], "rstd": X[:, 0].contiguous(), "cast": "early", "offset": 0.0,
    "need_dx": True, "need_dw": True,
}  # fmt: skip
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no gradient": ({"dy": []}, ValueError, "dy is a list of 0 tensors, expected 1 to 3"),
    "four gradients": ({"dy": [X] * 4}, ValueError, "dy is a list of 4 tensors, expected 1 to 3"),
    "short second": ({"dy": [X, X[:3]]}, ValueError, "dy[1] has shape (3, 64), expected (4, 64), the shape of dy[0]"),
    "row to broadcast": ({"dy": [X, X[:1]]}, ValueError, "dy[1] has shape (1, 64), expected (4, 64)"),
    "narrow third": ({"dy": [X, X, X[:, 1:]]}, ValueError, "dy[2] has shape (4, 63), expected (4, 64)"),
    "other dtype": ({"dy": [X, X.half()]}, TypeError, "dy[1] has dtype torch.float16, expected torch.float32"),
    "integers": ({"dy": [X, X.int()]}, TypeError, "dy[1] has dtype torch.int32, expected float32"),
    "all short": ({"dy": [X[:3], X[:3]]}, ValueError, "x has shape (4, 64), expected (3, 64), the shape of dy"),
    "short ds": ({"ds": X[:3]}, ValueError, "[add_rms_norm] ds has shape (3, 64), expected (4, 64)"),
    "ds of another dtype": ({"ds": X.half()}, TypeError, "ds has dtype torch.float16, expected torch.float32"),
    "short weight": ({"weight": X[0, :5]}, ValueError, "weight has shape (5,), expected (64,)"),
    "no weight": ({"weight": None}, ValueError, "weight is None"),
    "short rstd": ({"rstd": X[:3, 0]}, ValueError, "rstd has shape (3,), expected (4,)"),
    "cast": ({"cast": "soon"}, ValueError, "cast is 'soon', expected 'early', 'late' or 'first'"),
    "offset": ({"offset": 1.0}, ValueError, "offset is 1 with cast='early'"),
}  # fmt: skip


def on_meta(value: Any) -> Any:
    if isinstance(value, list):
        return [t.to("meta") for t in value]
    return value.to("meta") if isinstance(value, Tensor) else value


@pytest.mark.parametrize("meta", [False, True], ids=["cpu", "meta"])
@pytest.mark.parametrize(("others", "error", "words"), BAD.values(), ids=BAD.keys())
def test_an_invalid_argument_is_named(others, error, words, meta) -> None:
    place = on_meta if meta else lambda value: value
    OF_SUM(**{name: place(value) for name, value in GOOD.items()})
    with pytest.raises(error, match=re.escape(words)):
        OF_SUM(**{name: place(value) for name, value in (GOOD | others).items()})


@pytest.mark.parametrize("which", ["dy[0]", "dy[1]", "dy[2]", "ds", "x", "weight", "rstd"])
def test_a_tensor_whose_memory_was_freed_is_named(randn, which) -> None:
    named = {f"dy[{i}]": randn(4, 64) for i in range(3)}
    named |= {"ds": randn(4, 64), "x": randn(4, 64), "weight": randn(64), "rstd": randn(4).square()}

    def call() -> None:
        *dy, ds, x, w, rstd = named.values()
        OF_SUM(dy, ds, x, w, rstd, "early", 0.0, True, True)

    call()
    named[which].untyped_storage().resize_(8)
    with pytest.raises(ValueError, match=re.escape(f"{which} has a storage of 8 bytes")):
        call()


@pytest.mark.parametrize("which", range(5))
def test_differentiating_the_operator_raises(randn, which) -> None:
    a, b, ds, x, w = tensors = [*(randn(4, 32) for _ in range(4)), randn(32)]
    tensors[which].requires_grad_()
    with pytest.raises(RuntimeError, match="backward_of_sum cannot be differentiated"):
        OF_SUM([a, b], ds, x, w, torch.ones(4), "early", 0.0, True, True)
    with torch.no_grad():
        assert not OF_SUM([a, b], ds, x, w, torch.ones(4), "early", 0.0, True, True)[0].requires_grad


def test_transforms_raise_instead_of_giving_zeros(randn) -> None:
    x, w, rstd = randn(4, 32), randn(32), torch.ones(4)

    def dx(dy: Tensor) -> Tensor:
        return OF_SUM([dy, dy], None, x, w, rstd, "early", 0.0, True, True)[0]

    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.func.jvp(dx, (x,), (x,))
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.func.grad(lambda dy: dx(dy).sum())(x)
    with pytest.raises(RuntimeError, match=r"torch\.vmap over rmsnorm::backward_of_sum"):
        torch.vmap(dx)(x.expand(3, 4, 32))


# --- in compiled graphs --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_graph_of_dynamic_shape_keeps_the_bits(randn) -> None:
    def step(a: Tensor, b: Tensor, ds: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        return OF_SUM([a, b], ds, x, w, rstd, "early", 0.0, True, True)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    w = randn(32, dtype=BF16)
    with torch.no_grad():
        for M in (4, 7):
            a, b, ds, x = (randn(M, 32, dtype=BF16) for _ in range(4))
            given = a, b, ds, x, w, randn(M).square() + 0.5
            for got, expected in zip(
                compiled(*given), composed([a, b], ds, *given[3:], "early", 0.0, True, True), strict=True
            ):
                assert_same_bits(got, expected)


def test_fake_outputs_have_the_shapes_of_the_results(randn) -> None:
    x, w, rstd = randn(4, 32, dtype=BF16).t().contiguous().t(), randn(32), torch.ones(4)
    for needs in NEEDS:
        arguments = "late", 0.0, *needs
        real = OF_SUM([x, x], x, x, w, rstd, *arguments)
        told = OF_SUM([on_meta(x)] * 2, *map(on_meta, (x, x, w, rstd)), *arguments)
        for a, b in zip(real, told, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.stride() == b.stride() or a.shape != x.shape


def test_the_reference_has_the_bits_of_separate_additions(randn) -> None:
    """The oracle of the other devices, itself composed of the reference's backward pass and torch's additions."""
    x, w, rstd, ds = (
        randn(9, 64, dtype=FP16),
        randn(64, dtype=FP16),
        randn(9).square() + 0.5,
        randn(64, 9, dtype=FP16).t(),
    )
    dy = [randn(9, 64, dtype=FP16) for _ in range(3)]
    dx, dw = reference.backward_of_sum(dy, ds, x, w, rstd, "late", 1.0, True, True)
    once = reference.backward(dy[0] + dy[1] + dy[2], None, x, w, rstd, "late", 1.0, True, True)
    assert_same_bits(dx, once[0] + ds)
    assert_same_bits(dw, once[1])
