"""Gated norms and pairs of norms under torch.func, in forward mode, in traces, and with tensors that were modified."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import rmsnorm
from tolerance import assert_same_bits

GATED = (
    {},
    {"gate_first": True, "groups": 2, "activation": "sigmoid"},
)


def gradients(x: Tensor, gate: Tensor, w: Tensor, options: dict[str, object]) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, gate, w)]
    return torch.autograd.grad(rmsnorm.gated_rms_norm(*leaves, **options).sin().sum(), leaves)


@pytest.mark.parametrize("options", GATED)
@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (1, 0, None), (2, 2, None), (0, 0, 0)])
def test_vmap_of_gradients_of_a_gated_norm_has_the_bits_of_autograd(
    options: dict[str, object], in_dims: tuple[int | None, ...]
) -> None:
    def loss(*tensors: Tensor) -> Tensor:
        return rmsnorm.gated_rms_norm(*tensors, **options).sin().sum()  # type: ignore[arg-type]

    shapes = ((4, 8), (4, 8), (8,))
    samples = [torch.randn(3, *s) if d is not None else torch.randn(s) for s, d in zip(shapes, in_dims, strict=True)]
    given = [t if d is None else t.movedim(0, d) for t, d in zip(samples, in_dims, strict=True)]
    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=in_dims)(*given)
    for i in range(3):
        one = [t if d is None else t[i] for t, d in zip(samples, in_dims, strict=True)]
        for got, wanted in zip(found, gradients(*one, options), strict=True):
            assert_same_bits(got[i], wanted)


def test_a_gated_norm_refuses_forward_mode_instead_of_losing_the_tangent() -> None:
    x, gate = torch.randn(2, 4, 8)
    with pytest.raises(RuntimeError, match=r"\[gated_rms_norm\] forward mode is not implemented"):
        torch.func.jvp(lambda t: rmsnorm.gated_rms_norm(t, gate), (x,), (x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match=r"\[gated_rms_norm\] forward mode is not implemented"):
            rmsnorm.gated_rms_norm(dual, gate)
        with pytest.raises(RuntimeError, match="forward mode is not implemented"):
            torch.ops.rmsnorm.forward_pair(dual, None, x, None, 1e-6, "early", 0.0, False)


def test_rms_norms_keeps_the_tangents_of_forward_mode() -> None:
    x, w = torch.randn(4, 8), torch.randn(8)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.randn_like(x))
        wanted = forward_ad.unpack_dual(rmsnorm.rms_norm(dual, w)).tangent
        found = forward_ad.unpack_dual(rmsnorm.rms_norms([x, dual], [w, w])[1]).tangent
        assert wanted is not None
        assert found is not None
        assert_same_bits(found, wanted)


@pytest.mark.parametrize("modified", [0, 1, 2])
def test_a_gated_norm_names_the_fix_if_a_saved_tensor_was_modified_in_place(modified: int) -> None:
    tensors = [torch.randn(s, requires_grad=True) * 1 for s in ((4, 8), (4, 8), (8,))]
    y = rmsnorm.gated_rms_norm(*tensors)
    tensors[modified].add_(1)
    with pytest.raises(RuntimeError, match=r"\[gated_rms_norm\] x, gate or weight was modified in place .* x = x \+"):
        y.sum().backward()


def test_a_gated_norm_refuses_a_gate_whose_dtype_changed_after_the_forward_pass() -> None:
    x, gate = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    y = rmsnorm.gated_rms_norm(x, gate)
    gate.data = gate.data.bfloat16()
    with pytest.raises(TypeError, match=r"\[gated_rms_norm\] gate has dtype torch.bfloat16, expected float32"):
        y.sum().backward()


@pytest.mark.parametrize(
    "call",
    [lambda x, gate: rmsnorm.gated_rms_norm(x, gate, groups=2), lambda x, gate: rmsnorm.rms_norms([x, gate])[1]],
)
def test_symbolic_trace_keeps_a_call_as_one_node(call: Callable[..., Tensor]) -> None:
    module = torch.fx.symbolic_trace(call)
    assert "rmsnorm_functional_" in module.code
    x, gate = torch.randn(2, 4, 8)
    assert_same_bits(module(x, gate), call(x, gate))


@pytest.mark.parametrize("options", GATED)
def test_decompositions_leave_none_of_the_gated_operators(options: dict[str, object]) -> None:
    given = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)
    graph = make_fx(lambda *t: gradients(*t, options), decomposition_table=rmsnorm.decompositions())(*given)
    assert "rmsnorm" not in graph.code
    for got, wanted in zip(graph(*given), gradients(*given, options), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "flops"),
    [
        # M = 4, E = 32, N = 8. Forward: the norm 4E + 3M, silu and the product 6E.
        # Backward: the norm 7E + 2E - N, silu and a product 6E, the slope 3E, dgate 3E.
        (GATED[0], (4 * 32 + 3 * 4 + 6 * 32) + (9 * 32 - 8 + 6 * 32 + 6 * 32)),
        # 8 groups in all. Forward: 4E + 3 * 8, the sigmoid and the product 5E.
        # Backward: 9E - N, the sigmoid and a product 5E, the slope 2E, dgate 2E, dx E.
        (GATED[1], (4 * 32 + 3 * 8 + 5 * 32) + (9 * 32 - 8 + 5 * 32 + 5 * 32)),
    ],
)
def test_the_flop_counter_counts_gated_norms(options: dict[str, object], flops: int) -> None:
    rmsnorm.register()
    x, gate, w = (torch.randn(s, requires_grad=True) for s in ((4, 8), (4, 8), (8,)))
    with FlopCounterMode(display=False) as counter:
        rmsnorm.gated_rms_norm(x, gate, w, **options).backward(torch.ones(4, 8))  # type: ignore[arg-type]
    assert counter.get_total_flops() == flops
