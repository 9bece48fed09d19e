"""Norms whose statistic is taken over the first columns only: bits, gradients, and ways to call them."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import rmsnorm
from rmsnorm import reference
from tolerance import assert_same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SPECS = (("early", 0.0), ("late", 0.0), ("late", 1.0), ("first", 0.0))
N, V = 24, 10


def everything(
    x: Tensor, residual: Tensor | None, w: Tensor | None, dy: Tensor, ds: Tensor | None, eps: float = 1e-6,
    **options: Any,
) -> list[Tensor]:  # fmt: skip
    """y, s if there is a residual, and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in (x, residual, w) if t is not None]
    weight = None if w is None else leaves[-1]
    if residual is None:
        outputs: tuple[Tensor, ...] = (rmsnorm.rms_norm(leaves[0], weight, eps, **options),)
    else:
        outputs = rmsnorm.add_rms_norm(leaves[0], leaves[1], weight, eps, **options)
    cotangents = [dy] if residual is None or ds is None else [dy, ds]
    gradients = torch.autograd.grad(outputs[: len(cotangents)], leaves, cotangents)
    return [*(o.detach() for o in outputs), *gradients]


def check(
    x: Tensor, residual: Tensor | None, w: Tensor | None, dy: Tensor, ds: Tensor | None, V: int, cast: str,
    offset: float, eps: float = 1e-6,
) -> None:  # fmt: skip
    """Asserts that the outputs and gradients have the reference's bits."""
    y, s, rstd = reference.forward(x, residual, w, eps, cast, offset, True, V)
    assert rstd is not None
    rows = x if s is None else s
    dx, dw = reference.backward(dy, ds, rows, w, rstd, cast, offset, True, w is not None, V)
    assert dx is not None
    expected = [y, s, dx.to(x.dtype), None if residual is None else dx.to(residual.dtype), dw]
    got = everything(x, residual, w, dy, ds, eps, cast=cast, offset=offset, variance_size=V)
    for a, b in zip(got, [t for t in expected if t is not None], strict=True):
        assert_same_bits(a, b, f"{tuple(x.shape)} {x.dtype} {V} {cast} {offset}")


@pytest.mark.parametrize(("cast", "offset"), SPECS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_of_the_reference(dtype: torch.dtype, cast: str, offset: float, randn) -> None:
    shapes = ((5, 64), 40), ((3, 7, 33), 7), ((34,), 7), ((601, 8), 1), ((2, 2049), 2048), ((6, 5), 5), ((0, 8), 3)
    for i, (shape, V) in enumerate(shapes):
        w_dtype = (dtype, torch.float32, None)[i % 3] if not offset else dtype
        x, residual = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
        w = None if w_dtype is None else randn(shape[-1], dtype=w_dtype)
        y_dtype = rmsnorm.rms_norm(x, w, cast=cast, offset=offset).dtype
        dy, ds = randn(*shape, dtype=y_dtype), randn(*shape, dtype=dtype)
        check(x, None, w, dy, None, V, cast, offset)
        check(x, residual, w, dy, ds, V, cast, offset)
        check(x, residual, w, dy, None, V, cast, offset, eps=0.0)
        if len(shape) == 3:  # other strides
            check(x.transpose(0, 1), None, w, dy.transpose(0, 1), None, V, cast, offset)


@pytest.mark.parametrize(("x", "w", "residual"), list(itertools.permutations(FLOATS)), ids=str)
def test_dtypes_may_differ(x: torch.dtype, w: torch.dtype, residual: torch.dtype, randn) -> None:
    for cast, offset in SPECS:
        given = randn(5, N, dtype=x), randn(5, N, dtype=residual), randn(N, dtype=w)
        y, s = rmsnorm.add_rms_norm(*given, cast=cast, offset=offset)
        check(*given, randn(5, N, dtype=y.dtype), randn(5, N, dtype=s.dtype), V, cast, offset)


def test_only_the_gradients_that_are_needed_are_computed(randn) -> None:
    given, dy, ds = (randn(5, N), randn(5, N), randn(N)), randn(5, N), randn(5, N)
    every = everything(*given, dy, ds, variance_size=V)[2:]
    for needs in itertools.product((False, True), repeat=3):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(given, needs, strict=True)]
        y, s = rmsnorm.add_rms_norm(*leaves, variance_size=V)
        assert y.requires_grad is any(needs)
        if any(needs):
            torch.autograd.backward([y, s] if s.requires_grad else [y], [dy, ds] if s.requires_grad else [dy])
        for leaf, need, expected in zip(leaves, needs, every, strict=True):
            assert (leaf.grad is not None) is need
            if leaf.grad is not None:
                assert_same_bits(leaf.grad, expected, f"{needs}")


def test_the_reference_computes_it_in_fp64_and_without_kernels(randn) -> None:
    x, w, dy = randn(3, N).double(), randn(N).double(), randn(3, N).double()
    check(x, None, w, dy, None, V, "early", 0.0)
    assert "computed in fp32" in rmsnorm.explain(x, w, variance_size=V)


def test_the_kernel_computes_it_and_explain_says_who_calls_it(randn) -> None:
    said = "cpu, float32: cpu kernel (Numba) (called from Python: C++ does not take variance_size)"
    assert rmsnorm.explain(randn(3, N), randn(N), variance_size=V) == said
    assert rmsnorm.explain(randn(3, N), rmsnorm.RMSNorm(N, variance_size=V)) == said


def test_columns_outside_of_the_statistic_do_not_change_it(randn) -> None:
    x, w = randn(3, N), randn(N)
    y = rmsnorm.rms_norm(x, w, variance_size=V)
    assert_same_bits(y[:, :V], rmsnorm.rms_norm(x[:, :V], w[:V]))
    x[:, V:] = torch.tensor([1.0, torch.inf, torch.nan])[:, None]
    assert_same_bits(rmsnorm.rms_norm(x, w, variance_size=V)[:, :V], y[:, :V])
    dy, infinite = randn(3, N), randn(3, N)
    infinite[:, 0] = torch.inf  # makes the mean of g·xh infinite
    _, dx, _ = everything(x.nan_to_num(), None, w, infinite, None, variance_size=V)
    assert dx[:, V:].isfinite().all()
    check(x, None, w, dy, None, V, "early", 0.0)
    check(x.nan_to_num(), None, w, infinite, None, V, "early", 0.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_columns_are_the_same_as_no_variance_size(dtype: torch.dtype, randn) -> None:
    x, residual, w, dy, ds = (randn(*shape, dtype=dtype) for shape in ((5, N), (5, N), (N,), (5, N), (5, N)))
    for r in (None, residual):
        for a, b in zip(everything(x, r, w, dy, ds, variance_size=N), everything(x, r, w, dy, ds), strict=True):
            assert_same_bits(a, b)


def test_each_head_can_have_its_own_weight(randn) -> None:
    x, w, dy = randn(5, 3, N), randn(3, N), randn(5, 3, N)
    check(x, None, w, dy, None, V, "early", 0.0)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", [1, V, N])
def test_gradients_are_as_near_the_truth_as_fp32_allows(size: int, offset: float, randn) -> None:
    x, w, dy = randn(64, N), randn(N), randn(64, N)
    x[:, 0] += 3.0 * x[:, 0].sign()  # a statistic of one column is not near zero
    _, dx, dw = everything(x, None, w, dy, None, cast="late", offset=offset, variance_size=size)
    leaves = [t.double().requires_grad_() for t in (x, w)]
    truth = torch.autograd.grad(reference.truth(*leaves, 1e-6, offset, size), leaves, dy.double())
    for got, right in zip((dx, dw), truth, strict=True):
        assert (got - right).norm() / right.norm() < 3e-7


def test_compiled_and_exported_code_gives_the_same_bits(randn) -> None:
    layer = rmsnorm.RMSNorm(N, variance_size=V)
    assert str(layer) == "RMSNorm(24, eps=1e-06, cast='early', variance_size=10)"
    x, dy = randn(6, N).requires_grad_(), randn(6, N)
    expected = layer(x)
    (dx,) = torch.autograd.grad(expected, x, dy)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)(x)
    assert_same_bits(y, expected)
    assert_same_bits(torch.autograd.grad(y, x, dy)[0], dx)
    program = torch.export.export(layer, (x.detach(),))
    assert_same_bits(program.module()(x), expected)
    plain = program.run_decompositions(rmsnorm.decompositions())
    assert "rmsnorm" not in plain.graph_module.code
    torch.testing.assert_close(plain.module()(x), expected)


def test_the_operators_pass_the_checks_of_torch(randn) -> None:
    x, residual, w = (t.requires_grad_() for t in (randn(3, N), randn(3, N), randn(N)))
    options = "early", 0.0, V
    for r in (None, residual):
        torch.library.opcheck(torch.ops.rmsnorm.slice_forward.default, (x, r, w, 1e-6, *options, True))
    dy, rstd = randn(3, N), randn(3).abs()
    torch.library.opcheck(
        torch.ops.rmsnorm.slice_backward.default, (dy, None, x.detach(), w.detach(), rstd, *options, True, True)
    )
    for needs in itertools.product((False, True), repeat=2):
        got = torch.ops.rmsnorm.slice_backward.default(dy, None, x.detach(), w.detach(), rstd, *options, *needs)
        right = reference.backward(dy, None, x.detach(), w.detach(), rstd, "early", 0.0, *needs, V)
        for a, b in zip(got, right, strict=True):
            assert_same_bits(a, torch.empty(0) if b is None else b)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (1, 0)])
def test_vmap_of_gradients_has_the_bits_of_autograd(in_dims: tuple[int | None, int | None], randn) -> None:
    def loss(x: Tensor, w: Tensor) -> Tensor:
        return rmsnorm.rms_norm(x, w, variance_size=V).sin().sum()

    samples = [randn(3, *s) if d is not None else randn(*s) for s, d in zip(((4, N), (N,)), in_dims, strict=True)]
    given = [t if d is None else t.movedim(0, d) for t, d in zip(samples, in_dims, strict=True)]
    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=in_dims)(*given)
    for i in range(3):
        leaves = [
            (t if d is None else t[i]).detach().clone().requires_grad_() for t, d in zip(samples, in_dims, strict=True)
        ]
        for got, wanted in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            assert_same_bits(got[i], wanted)


def test_other_derivatives_raise_instead_of_being_lost(randn) -> None:
    x = randn(2, N).requires_grad_()
    (dx,) = torch.autograd.grad(rmsnorm.rms_norm(x, variance_size=V).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative of rms_norm is not implemented"):
        dx.sum().backward()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), randn(2, N))
        with pytest.raises(RuntimeError, match=r"\[rms_norm with variance_size\] forward mode is not implemented"):
            rmsnorm.rms_norm(dual, variance_size=V)


def test_a_gradient_through_the_sum_alone_passes_unchanged(randn) -> None:
    x, residual, ds = randn(2, N).requires_grad_(), randn(2, N).requires_grad_(), randn(2, N)
    _, s = rmsnorm.add_rms_norm(x, residual, variance_size=V)
    for gradient in torch.autograd.grad(s, (x, residual), ds):
        assert_same_bits(gradient, ds)


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (0, ValueError, "variance_size is 0, expected at least 1"),
        (-1, ValueError, "variance_size is -1, expected at least 1"),
        (25, ValueError, "variance_size is 25, expected at most 24"),
        (2.0, TypeError, "variance_size is 2.0, expected an int"),
        (True, TypeError, "variance_size is True, expected an int"),
        ("4", TypeError, "variance_size is '4', expected an int"),
    ],
)
def test_invalid_sizes_are_refused_by_name(size: Any, error: type, message: str, randn) -> None:
    x, w = randn(2, N), randn(N)
    for where, call in (
        ("rms_norm", lambda: rmsnorm.rms_norm(x, w, variance_size=size)),
        ("add_rms_norm", lambda: rmsnorm.add_rms_norm(x, x, w, variance_size=size)),
        ("explain", lambda: rmsnorm.explain(x, w, variance_size=size)),
        ("RMSNorm", lambda: rmsnorm.RMSNorm(N, variance_size=size)),
    ):
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value).startswith(f"[{where}] {message}")
    with pytest.raises(ValueError, match="variance_size is 4 with a gate"):
        rmsnorm.explain(x, w, gate=x, variance_size=4)
