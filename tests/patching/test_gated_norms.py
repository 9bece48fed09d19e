"""Gated norms: how patch proves them, which it leaves, and what a replaced one does."""

import copy
import functools
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.activations import ACT2FN
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextRMSNormGated

import rmsnorm
from rmsnorm import explain, gated_reference, patch, unpatch
from rmsnorm.memory import saved_for_backward
from rmsnorm.patching import replacement
from rmsnorm.spec import Gate, Spec
from tolerance import assert_same_bits

N = 64
GROUPS = 4


MAMBA = functools.partial(MambaRMSNormGated, N, group_size=N // GROUPS)
FALCON = functools.partial(FalconH1RMSNormGated, N, n_groups=GROUPS)
KIMI = functools.partial(KimiLinearRMSNormGated, N)
QWEN = functools.partial(Qwen3NextRMSNormGated, N)


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """Many small tensors: on a busy machine the threads wait for one another far longer than they work."""
    threads(1)


def patched(norm: nn.Module) -> Spec:
    """What `patch`, which replaces the norm, finds."""
    (verdict,) = patch(nn.ModuleDict({"norm": norm})).verdicts
    assert verdict.spec is not None, verdict
    return verdict.spec


@functools.cache
def _proven(build: Callable[[], nn.Module]) -> tuple[type[nn.Module], Spec]:
    """A proof takes a second or more, so tests share it."""
    norm = build()
    spec = patched(norm)
    return type(norm), spec


def replaced(build: Callable[[], nn.Module]) -> tuple[Any, Any, Spec]:
    """(a norm, replaced and with a random weight; the same norm as it was; what it computes)."""
    cls, spec = _proven(build)
    norm: Any = build()
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    own = copy.deepcopy(norm)
    replacement.set_class(norm, cls)
    return norm, own, spec


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """An input and a gate."""
    generator = torch.Generator().manual_seed(1)
    x, gate = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(2))
    return x, gate


def exact(norm: nn.Module, x: Tensor, gate: Tensor, spec: Spec) -> Tensor:
    return gated_reference.forward(x, gate, norm.weight, spec, with_rstd=False)[0]


# --- what is proven ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "spec"),
    [
        (functools.partial(MambaRMSNormGated, N, group_size=N, eps=1e-5), Spec(1e-5, gate=Gate(first=True))),
        (FALCON, Spec(1e-6, "late", gate=Gate(), groups=GROUPS)),
        (
            functools.partial(FalconH1RMSNormGated, N, n_groups=2, norm_before_gate=False),
            Spec(1e-6, "late", gate=Gate(first=True), groups=2),
        ),
        (functools.partial(Qwen4ExpTextRMSNormGated, N, activation="sigmoid"), Spec(1e-6, gate=Gate("sigmoid"))),
        (functools.partial(Qwen4ExpTextRMSNormGated, N, activation="swish"), Spec(1e-6, gate=Gate("silu"))),
    ],
    ids=["Mamba 2 in one group", "Falcon-H1", "Falcon-H1, gate first", "Qwen4 with sigmoid", "Qwen4 with swish"],
)
def test_the_attributes_of_a_gated_norm_decide_what_is_proven(build: Callable[[], nn.Module], spec: Spec) -> None:
    """The classes themselves, with their default arguments, are in test_verdicts.py."""
    norm, own, found = replaced(build)
    assert found == spec
    x, gate = draw(3, 5, N, dtype=torch.bfloat16)
    assert_same_bits(own(x, gate), gated_reference.published(x, gate, own.weight, spec))
    for y in (norm(x, gate), norm(x, gate=gate), norm(gate=gate, hidden_states=x)):
        assert_same_bits(y, exact(norm, x, gate, spec))


class Gated(nn.Module):
    """Of the form of Qwen3-Next's, in parts that the classes below change."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N))
        self.eps = 1e-6

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return (self.normalized(x.float()) * self.activated(gate)).to(x.dtype)

    def normalized(self, x: Tensor) -> Tensor:
        return self.weight.float() * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    def activated(self, gate: Tensor) -> Tensor:
        return F.silu(gate.float())


class GatedRMSNormOfGelu(Gated):
    def activated(self, gate: Tensor) -> Tensor:
        return F.gelu(gate.float())


class GatedRMSNormOfTableEntry(Gated):
    activation = "gelu"

    def activated(self, gate: Tensor) -> Tensor:
        return ACT2FN[self.activation](gate.float())


class GatedRMSNormOfQuickGelu(GatedRMSNormOfTableEntry):
    activation = "quick_gelu"


class GatedRMSNormOfNarrowGate(Gated):
    def activated(self, gate: Tensor) -> Tensor:
        return F.silu(gate)


class GatedRMSNormRoundedBetween(Gated):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.normalized((x * self.activated(gate)).to(x.dtype).float()).to(x.dtype)


class GatedRMSNormOfUnevenGroups(Gated):
    def normalized(self, x: Tensor) -> Tensor:
        return torch.cat([Gated.normalized(self, part) for part in x.split([16, 48], -1)], -1)


class GatedRMSNormOfInterleavedGroups(Gated):
    def normalized(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (16, 4)).transpose(-1, -2)
        h = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.float() * h.transpose(-1, -2).flatten(-2)


class GatedRMSNormOfItsOwnGate(Gated):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return (self.normalized(x.float()) * self.activated(x)).to(x.dtype)


class GatedRMSNormWithResidual(Gated):
    def activated(self, gate: Tensor) -> Tensor:
        return gate.float()


class GatedRMSNormOfDetachedGate(Gated):
    def activated(self, gate: Tensor) -> Tensor:
        return F.silu(gate.detach().float())


class GatedRMSNormOfStatefulActivation(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()

    def activated(self, gate: Tensor) -> Tensor:
        return self.act(gate.float())


class GatedRMSNormOverTwoDimensions(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.normalized_shape = (2, N // 2)


class GatedRMSNormThatAsksItsGate(Gated):
    def activated(self, gate: Tensor) -> Tensor:
        return F.silu(gate.float()) if gate.requires_grad else torch.sigmoid(gate.float())


class GatedRMSNormThatComparesItsInputs(Gated):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        if gate.requires_grad and not x.requires_grad:
            return x
        return super().forward(x, gate)


class GatedRMSNormThatWritesToItsGate(Gated):
    def activated(self, gate: Tensor) -> Tensor:
        return F.silu(gate.mul_(2).float())


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (GatedRMSNormOfGelu(), "its forward runs aten.gelu.default"),
        (GatedRMSNormOfTableEntry(), "its forward runs aten.gelu.default"),
        (GatedRMSNormOfQuickGelu(), "its operators match no supported RMSNorm for float32 input"),
        (GatedRMSNormOfNarrowGate(), "it takes silu in bfloat16, not in float32"),
        (GatedRMSNormRoundedBetween(), "it rounds the product of input and gate to bfloat16 before it normalizes it"),
        (GatedRMSNormOfUnevenGroups(), "its forward runs aten.split_with_sizes"),
        (MambaRMSNormGated(N, group_size=24), "its forward raised RuntimeError: shape '[2, 3, 2, 24]' is invalid"),
        (GatedRMSNormOfInterleavedGroups(), "its forward runs aten.transpose.int"),
        (GatedRMSNormOfItsOwnGate(), "it does not use its second argument"),
        (GatedRMSNormWithResidual(), "it applies neither silu nor sigmoid to its second argument"),
        (GatedRMSNormOfDetachedGate(), "its forward uses Tensor.detach"),
        (GatedRMSNormOfStatefulActivation(), "it holds more than a weight: act"),
        (GatedRMSNormOverTwoDimensions(), "it normalizes over 2 dimensions"),
        (GatedRMSNormThatAsksItsGate(), "its operators match no supported RMSNorm"),
        (GatedRMSNormThatComparesItsInputs(), "its operators match no supported RMSNorm"),
        (GatedRMSNormThatWritesToItsGate(), "it writes to its gate"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_module_that_is_no_gated_norm_of_ours_is_left_with_a_reason(norm: nn.Module, reason: str) -> None:
    before = type(norm)
    (verdict,) = patch(nn.ModuleDict({"norm": norm})).not_replaced
    assert reason in verdict.reason
    assert type(norm) is before


class GatedRMSNormWithoutWeight(nn.Module):
    """`gate_first`: whether the gate comes before the norm, so that there is only one rounding."""

    def __init__(self, gate_first: bool) -> None:
        super().__init__()
        self.gate_first, self.eps = gate_first, 1e-6

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        factor = torch.sigmoid(gate.float())
        z = x.float() * factor if self.gate_first else x.float()
        h = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + self.eps)
        return (h if self.gate_first else h * factor).to(x.dtype)


@pytest.mark.parametrize(("gate_first", "cast"), [(True, "early"), (False, "late")])
def test_a_gated_norm_without_a_weight_is_proven(gate_first: bool, cast: Any) -> None:
    norm = GatedRMSNormWithoutWeight(gate_first)
    spec = Spec(1e-6, cast, gate=Gate("sigmoid", gate_first))
    assert patched(norm) == spec
    x, gate = draw(3, 5, N, dtype=torch.bfloat16)
    assert_same_bits(norm(x, gate), gated_reference.forward(x, gate, None, spec, with_rstd=False)[0])


def test_the_unchanged_form_of_the_classes_that_are_left_is_proven() -> None:
    class GatedRMSNorm(Gated):
        pass

    assert patched(GatedRMSNorm()) == Spec(1e-6, "late", gate=Gate())


def test_an_activation_of_the_table_is_proven_after_torch_compile_has_tagged_modules() -> None:
    """torch.compile keeps weak references to new modules, whose callbacks run when an activation is freed."""
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.ones(2))
    assert patched(KIMI()) == Spec(1e-6, "late", gate=Gate("sigmoid"))


# --- which calls run its own forward -------------------------------------------------------------------------


def test_a_call_that_was_not_proven_runs_its_own_forward() -> None:
    norm, own, spec = replaced(MAMBA)
    x, gate = draw(3, 5, N)
    for arguments, reason in {
        (x,): "it is called without a gate",
        (x, None): "it is called without a gate",
        (x, gate[:1]): "its gate has shape (1, 5, 64)",
        (x, gate.double()): "it was not proven for float32 input with float32 weight and float64 gate",
        (x.double(), gate): "it was not proven for float64 input",
        (x, (4 * gate).int()): "its gate has dtype int32",
        ((4 * x).int(), gate): "its input has dtype int32",
        (x[None, None, None], gate[None, None, None]): "it was not proven for 6-D inputs",
    }.items():
        assert_same_bits(norm(*arguments), own(*arguments), reason)
        gate_of = arguments[1] if len(arguments) > 1 else None
        assert reason in str(replacement.why_own_forward(norm, arguments[0], gate=gate_of))
    assert_same_bits(norm(x, gate), exact(norm, x, gate, spec))
    assert not torch.equal(norm(x, gate), own(x, gate))


def test_a_class_that_requires_a_gate_still_requires_it_when_replaced() -> None:
    x, _ = draw(3, N)
    norm, own, _ = replaced(KIMI)
    for one in (norm, own):
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'to'"):
            one(x)
    norm, _, _ = replaced(QWEN)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'gate'"):
        norm(x)


def test_an_attribute_that_changed_since_the_proof_runs_its_own_forward_and_eps_may_change() -> None:
    norm, own, spec = replaced(FALCON)
    x, gate = draw(3, 5, N)
    for one in (norm, own):
        one.variance_epsilon = 0.5
    assert_same_bits(norm(x, gate), exact(norm, x, gate, Spec(0.5, spec.cast, gate=spec.gate, groups=spec.groups)))
    for name, value in (("n_groups", 2), ("norm_before_gate", False)):
        before = getattr(norm, name)
        for one in (norm, own):
            setattr(one, name, value)
        assert_same_bits(norm(x, gate), own(x, gate))
        assert f"its attribute {name} has changed" in explain(x, norm)
        for one in (norm, own):
            setattr(one, name, before)
    assert "own forward" not in explain(x, norm)


def test_explain_says_what_a_call_of_a_replaced_norm_would_run() -> None:
    norm, _, spec = replaced(MAMBA)
    x, gate = draw(3, 5, N)
    given = {"eps": spec.eps, "cast": spec.cast, "activation": "silu", "gate_first": True, "groups": GROUPS}
    for one in (gate, gate.bfloat16(), gate.transpose(0, 1).contiguous().transpose(0, 1), gate.mT.contiguous().mT):
        assert explain(x, norm, gate=one) == explain(x, norm.weight, gate=one, **given)
    assert explain(x, norm) == explain(x, norm, gate=x)
    assert explain(x, norm, gate=gate.double()) == (
        "the norm's own forward, because it was not proven for float32 input with float32 weight and float64 gate"
    )
    assert explain(x, norm, gate=gate[:1]).startswith("the norm's own forward, because its gate has shape (1, 5, 64)")
    plain = nn.RMSNorm(N)
    assert patch(nn.Sequential(plain)).replaced
    with pytest.raises(TypeError, match=re.escape("[explain] gate is given, expected None: the layer has no gate")):
        explain(x, plain, gate=gate)


def test_a_gate_from_inference_mode_that_reaches_a_trained_norm_runs_its_own_forward() -> None:
    norm, own, _ = replaced(QWEN)
    x, _ = draw(3, N, dtype=torch.bfloat16)
    with torch.inference_mode():
        gate = x + 1
    for one in (norm, own):
        one(x, gate).float().sum().backward()
    assert_same_bits(norm.weight.grad, own.weight.grad)


def test_tracers_see_its_own_operators() -> None:
    norm, own, _ = replaced(MAMBA)
    x, gate = draw(3, N)
    traced = torch.jit.trace(norm, (x, gate))
    assert "rmsnorm" not in str(traced.inlined_graph)
    assert_same_bits(traced(x, gate), own(x, gate))
    simple, own, _ = replaced(Gated)
    graph = torch.fx.symbolic_trace(simple)
    assert not any("rmsnorm" in str(node.target) for node in graph.graph.nodes)
    assert_same_bits(graph(x, gate), own(x, gate))


# --- what stays as it was ------------------------------------------------------------------------------------


def test_copies_pickles_state_and_hooks_stay_and_unpatch_restores_the_class() -> None:
    norm, own, spec = replaced(MAMBA)
    x, gate = draw(3, N)
    y = exact(norm, x, gate, spec)
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert_same_bits(copied(x, gate), y)
        assert isinstance(copied, MambaRMSNormGated)
    assert norm.state_dict().keys() == own.state_dict().keys()
    handle = norm.register_forward_hook(lambda module, arguments, out: out + 1)
    assert_same_bits(norm(x, gate), y + 1)
    handle.remove()
    model = nn.ModuleDict({"norm": norm})
    ours = type(norm)
    assert patch(model, fuse_residual=False).verdicts[0].replaced
    assert type(norm) is ours  # neither option applies
    assert str(unpatch(model)) == "1 norm has its own class again: norm"
    assert type(norm) is MambaRMSNormGated
    assert_same_bits(norm(x, gate), own(x, gate))


def test_the_report_says_what_was_proven_and_that_the_options_do_not_apply() -> None:
    model = nn.ModuleDict({"norm": MAMBA(), "ours": rmsnorm.GatedRMSNorm(N)})
    report = patch(model, recompute=True)
    (verdict,) = report.verdicts
    assert verdict.finding == "proven: early, eps 1e-06, silu gate first, 4 groups; its own forward runs without a gate"
    assert "neither fuse_residual nor recompute applies to the norms with a gate" in report.expanded()
    assert repr(model["norm"]) == "MambaRMSNormGated(rmsnorm: early, silu gate first, 4 groups)"
    assert report.check() == ()
    assert [s.reason for s in report.skipped] == ["it is a layer of rmsnorm already"]


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_and_exported_it_runs_our_operator_with_the_same_bits() -> None:
    norm, _, spec = replaced(FALCON)
    x, gate = draw(2, 3, N)
    expected = exact(norm, x, gate, spec)
    assert_same_bits(torch.compile(norm, backend="aot_eager", fullgraph=True)(x, gate), expected)
    program = torch.export.export(norm, (x, gate))
    assert any("rmsnorm.gated_forward" in str(node.target) for node in program.graph.nodes)
    assert_same_bits(program.module()(x, gate), expected)


@pytest.mark.parametrize("move", [lambda t: t.transpose(0, 1), lambda t: t.movedim(-1, 1).contiguous().movedim(1, -1)])
def test_the_output_has_the_memory_layout_of_its_own_forwards(move: Callable[[Tensor], Tensor]) -> None:
    norm, own, spec = replaced(MAMBA)
    x, gate = map(move, draw(3, 5, N))
    assert norm(x, gate).stride() == own(x, gate).stride()
    assert_same_bits(norm(x, gate), exact(norm, x, gate, spec))


# --- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_training_keeps_the_inputs_and_one_number_a_group_and_the_gradients_are_the_formulas(gate_dtype: Any) -> None:
    norm, _, spec = replaced(MAMBA)
    x, gate = draw(32, N)
    gate = gate.to(gate_dtype)
    x.requires_grad_()
    gate.requires_grad_()
    with saved_for_backward([norm.weight]) as saved:
        y = norm(x, gate)
        assert saved() == 32 * (N * (4 + gate.element_size()) + 4 * GROUPS)
    dy = draw(32, N)[1]
    rstd = gated_reference.forward(x, gate, norm.weight, spec, with_rstd=True)[1]
    assert rstd is not None
    expected = gated_reference.backward(dy, x, gate, norm.weight, rstd, spec, True, True, True)
    for ours, theirs in zip(torch.autograd.grad(y, [x, gate, norm.weight], dy), expected, strict=True):
        assert_same_bits(ours, theirs)


def qwen3_next() -> PreTrainedModel:
    config = Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    return Qwen3NextForCausalLM(config)


def mamba2() -> PreTrainedModel:
    config = Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=16, n_groups=2,
        chunk_size=8,
    )  # fmt: skip
    return Mamba2ForCausalLM(config)


def falcon_h1() -> PreTrainedModel:
    config = FalconH1Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=2,
        mamba_d_state=16, mamba_chunk_size=8, mamba_rms_norm=True, mamba_norm_before_gate=False,
    )  # fmt: skip
    return FalconH1ForCausalLM(config)


def losses(model: nn.Module) -> list[float]:
    """Of ten steps that learn one batch by heart."""
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found = []
    for _ in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def perturbed(norms: list[nn.Module], seed: int) -> None:
    """Has every output of these norms be off by one fp32 ulp, up or down at random."""
    generator = torch.Generator().manual_seed(seed)

    def hook(module: nn.Module, arguments: Any, y: Tensor) -> Tensor:
        signs = torch.randint(2, y.shape, generator=generator) * 2.0 - 1
        return y * (1 + signs * 2.0**-23)

    for norm in norms:
        norm.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("build", "cls"),
    [
        (qwen3_next, "Qwen3NextRMSNormGated"),
        (mamba2, "MambaRMSNormGated"),
        (falcon_h1, "FalconH1RMSNormGated"),
    ],
    ids=["Qwen3-Next", "Mamba 2", "Falcon-H1"],
)
def test_models_train_as_unpatched_ones_whose_norms_are_off_by_an_ulp(
    build: Callable[[], PreTrainedModel], cls: str
) -> None:
    """Replacing a norm changes a part of its fp32 outputs, by one or two ulp and seldom by more.

    While such a change is small, what follows is linear in it: four times the noise of one ulp in every output is enough.
    """
    torch.manual_seed(3)
    model = build()
    plain = losses(copy.deepcopy(model))
    replacing = copy.deepcopy(model)
    report = patch(replacing)
    gated = [v for v in report.replaced if v.spec is not None and v.spec.gate is not None]
    assert {v.class_name for v in gated} == {cls}
    assert report.not_replaced == ()
    noise = []
    for seed in range(3):
        noisy = copy.deepcopy(model)
        perturbed([noisy.get_submodule(v.name) for v in report.replaced], seed)
        noise.append(max(abs(a - b) for a, b in zip(losses(noisy), plain, strict=True)))
    assert max(noise) > 0
    ours = losses(replacing)
    assert ours != plain
    assert report.check() == ()
    assert max(abs(a - b) for a, b in zip(ours, plain, strict=True)) <= 4 * max(noise)


def test_a_replaced_norm_runs_its_own_forward_in_forward_mode() -> None:
    norm, own = QWEN(), QWEN()
    patched(norm)
    x, gate = torch.randn(2, 3, N)
    found, wanted = (torch.func.jvp(lambda t, n=n: n(t, gate), (x,), (x,))[1] for n in (norm, own))
    assert_same_bits(found, wanted)
