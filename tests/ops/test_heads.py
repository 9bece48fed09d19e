"""Norms in which each head has its own weight: gradients, and ways to call them."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import rmsnorm
from rmsnorm import reference
from tolerance import assert_same_bits

H, N = 4, 24


def both(x: Tensor, w: Tensor, dy: Tensor, **options: object) -> list[Tensor]:
    """y, dx and dw."""
    leaves = [t.detach().requires_grad_() for t in (x, w)]
    y = rmsnorm.rms_norm(*leaves, **options)  # type: ignore[arg-type]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def by_head(x: Tensor, w: Tensor, dy: Tensor, **options: object) -> list[Tensor]:
    """The same from a call for each head."""
    found = [both(x[..., h, :], w[h], dy[..., h, :], **options) for h in range(len(w))]
    return [torch.stack([of[i] for of in found], 0 if i == 2 else -2) for i in range(3)]


@pytest.mark.parametrize("options", [{}, {"cast": "late"}, {"cast": "late", "offset": 1.0}, {"cast": "first"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_each_head_is_a_norm_of_its_own(dtype: torch.dtype, options: dict[str, object], randn) -> None:
    x, w = randn(3, 50, H, N).to(dtype), randn(H, N).to(dtype)
    dy = randn(3, 50, H, N).to(rmsnorm.rms_norm(x, w, **options).dtype)
    for got, expected in zip(both(x, w, dy, **options), by_head(x, w, dy, **options), strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradients_are_as_near_the_truth_as_fp32_allows(offset: float, randn) -> None:
    x, w, dy = randn(64, H, N), randn(H, N), randn(64, H, N)
    _, dx, dw = both(x, w, dy, cast="late", offset=offset)
    leaves = [t.double().requires_grad_() for t in (x, w)]
    truth = torch.autograd.grad(reference.truth(*leaves, 1e-6, offset), leaves, dy.double())
    for got, right in zip((dx, dw), truth, strict=True):
        assert (got - right).norm() / right.norm() < 3e-7


def test_a_layer_with_heads_has_a_weight_for_each(randn) -> None:
    layer = rmsnorm.RMSNorm(N, cast="late", offset=1.0, heads=H)
    assert layer.weight is not None
    assert layer.weight.eq(0).all()
    assert str(layer) == "RMSNorm(24, eps=1e-06, cast='late', offset=1.0, heads=4)"
    torch.nn.init.normal_(layer.weight)
    x = randn(2, H, N)
    assert_same_bits(layer(x), rmsnorm.rms_norm(x, layer.weight, cast="late", offset=1.0))
    with pytest.raises(ValueError, match=r"weight has shape \(4, 24\), expected \(24,\), the last"):
        layer(randn(2, N))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_gives_the_same_bits(backend: str, randn) -> None:
    def step(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return rmsnorm.add_rms_norm(x, residual, w)

    x, residual, w = randn(5, H, N), randn(5, H, N), randn(H, N)
    given = [t.requires_grad_() for t in (x, residual, w)]
    outputs = step(*given)
    cotangents = [randn(5, H, N), randn(5, H, N)]
    expected = [*outputs, *torch.autograd.grad(outputs, given, cotangents)]
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)(*given)
    for got, right in zip([*compiled, *torch.autograd.grad(compiled, given, cotangents)], expected, strict=True):
        assert_same_bits(got, right)


def test_export_and_onnx_decompositions_compute_the_formula(randn) -> None:
    layer = rmsnorm.RMSNorm(N, heads=H)
    torch.nn.init.normal_(layer.weight)
    x = randn(3, H, N)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert_same_bits(program.module()(x), layer(x))
    plain = program.run_decompositions(rmsnorm.decompositions())
    assert "rmsnorm" not in plain.graph_module.code
    torch.testing.assert_close(plain.module()(x), layer(x))


def test_the_operators_pass_the_checks_of_torch(randn) -> None:
    x, w = randn(3, H, N).requires_grad_(), randn(H, N).requires_grad_()
    torch.library.opcheck(torch.ops.rmsnorm.forward.default, (x, None, w, 1e-6, "early", 0.0, True))
    dy, rstd = randn(3, H, N), randn(3, H).abs()
    torch.library.opcheck(
        torch.ops.rmsnorm.backward.default, (dy, None, x.detach(), w.detach(), rstd, "early", 0.0, True, True)
    )


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (1, 1), (2, None)])
def test_vmap_of_gradients_has_the_bits_of_autograd(in_dims: tuple[int | None, int | None], randn) -> None:
    def loss(x: Tensor, w: Tensor) -> Tensor:
        return rmsnorm.rms_norm(x, w).sin().sum()

    samples = [randn(3, *s) if d is not None else randn(*s) for s, d in zip(((H, N), (H, N)), in_dims, strict=True)]
    given = [t if d is None else t.movedim(0, d) for t, d in zip(samples, in_dims, strict=True)]
    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=in_dims)(*given)
    for i in range(3):
        leaves = [
            (t if d is None else t[i]).detach().clone().requires_grad_() for t, d in zip(samples, in_dims, strict=True)
        ]
        for got, wanted in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            assert_same_bits(got[i], wanted)


def test_vmap_does_not_take_the_samples_of_a_batch_for_heads(randn) -> None:
    """A batch of H rows has the shape of one sample with H heads."""
    x, w = randn(H, N), randn(H, N)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 24\), expected \(24,\)"):
        torch.vmap(lambda t: rmsnorm.rms_norm(t, w))(x)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 24\), expected \(24,\)"):
        torch.vmap(lambda t: torch.ops.rmsnorm.forward.default(t, None, w, 1e-6, "early", 0.0, False))(x)


def test_forward_mode_is_the_derivative(randn) -> None:
    x, w, x_t, w_t = randn(5, H, N), randn(H, N), randn(5, H, N), randn(H, N)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(
            rmsnorm.rms_norm(forward_ad.make_dual(x, x_t), forward_ad.make_dual(w, w_t))
        ).tangent
        of_truth = reference.truth(
            forward_ad.make_dual(x.double(), x_t.double()), forward_ad.make_dual(w.double(), w_t.double()), 1e-6, 0.0
        )
        expected = forward_ad.unpack_dual(of_truth).tangent
    assert got is not None
    assert expected is not None
    assert (got - expected).norm() / expected.norm() < 1e-6


def test_no_python_runs_for_a_planned_call(left_to_python: list[str], randn) -> None:
    x, w = randn(6, H, N), randn(H, N)
    dy = randn(6, H, N)
    y, _, rstd = torch.ops.rmsnorm.forward.default(x, None, w, 1e-6, "early", 0.0, True)
    dx, dw = torch.ops.rmsnorm.backward.default(dy, None, x, w, rstd, "early", 0.0, True, True)
    for got, right in zip((y, dx, dw), by_head(x, w, dy), strict=True):
        assert_same_bits(got, right)
    assert left_to_python == []


def test_queries_and_keys_with_weights_for_each_head_share_a_call(randn) -> None:
    q, k, wq, wk = randn(1, 8, N), randn(1, 2, N), randn(8, N), randn(2, N)
    for got, x, w in zip(rmsnorm.rms_norms([q, k], [wq, wk]), (q, k), (wq, wk), strict=True):
        assert_same_bits(got, rmsnorm.rms_norm(x, w))


def test_gated_norms_have_one_weight_for_all_heads(randn) -> None:
    x = randn(3, H, N)
    with pytest.raises(ValueError, match=r"\[gated_rms_norm\] weight has shape \(4, 24\), expected \(24,\)"):
        rmsnorm.gated_rms_norm(x, x, randn(H, N))
