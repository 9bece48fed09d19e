"""Gated norms: their arithmetic, gradients, and ways to call them."""

import itertools

import mpmath
import pytest
import torch
from torch import Tensor

import rmsnorm
from rmsnorm import gated_reference
from rmsnorm.spec import Gate, Spec

FORMS = [
    Spec(1e-5, cast, gate=Gate(activation, first), groups=groups)
    for cast, activation, first, groups in itertools.product(
        ("early", "late"), ("silu", "sigmoid"), (False, True), (1, 4)
    )
]


def call(x: Tensor, gate: Tensor, w: Tensor | None, spec: Spec) -> Tensor:
    assert spec.gate is not None
    return rmsnorm.gated_rms_norm(
        x, gate, w, spec.eps, cast=spec.cast, activation=spec.gate.activation, gate_first=spec.gate.first,
        groups=spec.groups,
    )  # fmt: skip


@pytest.mark.parametrize("spec", FORMS, ids=str)
def test_gradients_are_as_near_the_truth_as_fp32_allows(spec: Spec) -> None:
    torch.manual_seed(0)
    x, gate = (torch.randn(64, 64, requires_grad=True) for _ in range(2))
    w = torch.randn(64, requires_grad=True)
    dy = torch.randn(64, 64)
    call(x, gate, w, spec).backward(dy)
    found = [x.grad, gate.grad, w.grad]
    assert spec.gate is not None
    truth = gated_reference.truth(x, gate, w, spec.eps, spec.gate, spec.groups)
    expected = torch.autograd.grad(truth, [x, gate, w], dy.double())
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        assert (a - b).norm() / b.norm() < 3e-7


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_silu_and_sigmoid_of_bf16_numbers_are_correctly_rounded_but_for_near_ties_at_zero(activation: str) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    g = bits.view(torch.bfloat16)[::7]
    g = g[g.isfinite()].float()
    wrong = []
    for a, found in zip(g.tolist(), gated_reference.silu_or_sigmoid(g, activation).tolist(), strict=True):
        with mpmath.workprec(200):
            exact = (a if activation == "silu" else 1) / (1 + mpmath.exp(-mpmath.mpf(a)))
            _, exponent = mpmath.frexp(exact)
            unit = mpmath.ldexp(1, max(int(exponent) - 24, -149))
            if float(mpmath.nint(exact / unit) * unit) != found:
                wrong.append(a)
    assert all(2**-24 <= abs(a) < 2**-14 for a in wrong)
    assert len(wrong) < 30


def test_the_module_and_the_published_class_of_qwen3_next_agree_but_for_the_last_bits() -> None:
    pytest.importorskip("transformers")
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    torch.manual_seed(1)
    theirs = Qwen3NextRMSNormGated(64).bfloat16()
    torch.nn.init.normal_(theirs.weight)
    ours = rmsnorm.GatedRMSNorm(64, dtype=torch.bfloat16)
    ours.load_state_dict(theirs.state_dict())
    x, gate = torch.randn(2, 512, 64, dtype=torch.bfloat16)
    a, b = ours(x, gate), theirs(x, gate)
    assert a.dtype is b.dtype
    assert (a != b).sum() <= 8  # of 32,768


@pytest.mark.parametrize("spec", FORMS, ids=str)
def test_the_layer_has_the_bits_of_the_function(spec: Spec) -> None:
    torch.manual_seed(4)
    assert spec.gate is not None
    layer = rmsnorm.GatedRMSNorm(
        32, spec.eps, cast=spec.cast, activation=spec.gate.activation, gate_first=spec.gate.first, groups=spec.groups
    )
    assert layer.weight is not None
    torch.nn.init.normal_(layer.weight)
    x, gate = torch.randn(2, 3, 5, 32, dtype=torch.bfloat16)
    assert layer(x, gate).equal(call(x, gate, layer.weight, spec))


def test_torch_compile_export_and_vmap_give_the_same_bits() -> None:
    torch.manual_seed(2)
    layer = rmsnorm.GatedRMSNorm(32, gate_first=True, groups=2)
    x, gate = torch.randn(2, 6, 5, 32)
    expected = layer(x, gate)
    assert torch.compile(layer, backend="aot_eager", fullgraph=True)(x, gate).equal(expected)
    assert torch.export.export(layer, (x, gate)).module()(x, gate).equal(expected)
    assert torch.vmap(layer)(x, gate).equal(expected)
    torch.library.opcheck(
        torch.ops.rmsnorm.gated_forward.default,
        (x.requires_grad_(), gate, layer.weight, 1e-6, "early", "silu", True, 2, True),
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": torch.ones(2, 7)}, ValueError, r"gate has shape \(2, 7\), expected \(2, 8\), the shape of x"),
        ({"gate": torch.ones(2, 8, dtype=torch.int32)}, TypeError, "gate has dtype torch.int32"),
        ({"gate": torch.ones(2, 8, device="meta")}, ValueError, "gate is on meta, expected cpu"),
        ({"groups": 3}, ValueError, "groups is 3, expected a number that divides 8"),
        ({"groups": 0}, ValueError, "groups is 0, expected at least 1"),
        ({"groups": 2.0}, TypeError, "groups is 2.0, expected an int"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu', expected 'silu' or 'sigmoid'"),
        ({"cast": "first"}, ValueError, "cast is 'first' with a gate, expected 'early' or 'late'"),
        ({"gate_first": 1}, TypeError, "gate_first is 1, expected True or False"),
    ],
)
def test_invalid_arguments_are_refused_by_name(change: dict[str, object], error: type, message: str) -> None:
    arguments = {"x": torch.ones(2, 8), "gate": torch.ones(2, 8), **change}
    with pytest.raises(error, match=message):
        rmsnorm.gated_rms_norm(**arguments)  # type: ignore[arg-type]


def test_a_second_derivative_raises() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(rmsnorm.gated_rms_norm(x, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative of gated_rms_norm is not implemented"):
        dx.sum().backward()


def test_no_python_runs_for_a_planned_call(left_to_python: list[str]) -> None:
    torch.manual_seed(3)
    for spec in FORMS:
        assert spec.gate is not None
        form = (spec.cast, spec.gate.activation, spec.gate.first, spec.groups)
        x, gate = torch.randn(2, 3, 5, 32, dtype=torch.bfloat16)
        w = torch.randn(32, dtype=torch.bfloat16)
        y, rstd = torch.ops.rmsnorm.gated_forward.default(x, gate, w, spec.eps, *form, True)
        expected, expected_rstd = gated_reference.forward(x, gate, w, spec, True)
        assert y.equal(expected)
        assert rstd.equal(expected_rstd)
        needs = (True, True, True)
        gradients = torch.ops.rmsnorm.gated_backward.default(y, x, gate, w, rstd, *form, *needs)
        apart = gated_reference.backward(y, x, gate, w, rstd, spec, *needs)
        assert gradients[0].equal(apart[0])
        assert gradients[1].equal(apart[1])
    assert left_to_python == []
