"""patch and unpatch: a proven norm is replaced and computes *exact*; for any other norm the report says why not."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3Model
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextRMSNorm
from transformers.models.nanochat.modeling_nanochat import NanoChatRMSNorm

import rmsnorm
from rmsnorm import PatchReport, patch, reference, unpatch
from rmsnorm.spec import Spec

N = 96


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return module


class EarlyRMSNorm(nn.Module):
    """A plain early norm. Each class below differs from it in one way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return reference.published(x, self.weight, self.eps, "early", 0.0)


class IgnoredEpsRMSNorm(EarlyRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return reference.published(x, self.weight, 1e-5, "early", 0.0)


class GatedRMSNorm(EarlyRMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x)


class RaisingRMSNorm(EarlyRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no CPU here")


class HalvingRMSNorm(EarlyRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class BiasedRMSNorm(EarlyRMSNorm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(N))


class EpslessRMSNorm(EarlyRMSNorm):
    def __init__(self) -> None:
        super().__init__()
        del self.eps

    def forward(self, x: Tensor) -> Tensor:
        return reference.published(x, self.weight, 1e-6, "early", 0.0)


class LateInHalfRMSNorm(EarlyRMSNorm):
    """Early in fp32 and bf16, late in fp16."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.published(x, self.weight, self.eps, "late" if x.dtype == torch.float16 else "early", 0.0)


class SideEffectsRMSNorm(EarlyRMSNorm):
    """Writes to everything that it can reach, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        torch.rand(3)
        self.weight.data.add_(1)
        self.count.add_(1)
        self.seen.append(x)
        self.eps = 0.5
        return y


class OverwritingRMSNorm(EarlyRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.zero_()
        return y


class DetachedRMSNorm(EarlyRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class RootRMSNorm(EarlyRMSNorm):
    """Computes the rsqrt in another way, as accurately as *published* does."""

    def forward(self, x: Tensor) -> Tensor:
        rstd = 1 / (x.float().square().mean(-1) + self.eps).sqrt()
        return reference.normalize(x, self.weight, rstd, "early", 0.0)


class CoarseRMSNorm(EarlyRMSNorm):
    """Rounds the statistic to bf16."""

    def forward(self, x: Tensor) -> Tensor:
        rstd = reference.published_rstd(x, self.eps).to(torch.bfloat16).float()
        return reference.normalize(x, self.weight, rstd, "early", 0.0)


@pytest.mark.short
@pytest.mark.parametrize(
    ("norm", "spec"),
    [
        (DeepseekV2RMSNorm(N), Spec(1e-6)),
        (DeepseekV2RMSNorm(N, 1e-5), Spec(1e-5)),
        (DeepseekV2RMSNorm(N, 0.0), Spec(0.0)),
        (DeepseekV2RMSNorm(N).bfloat16(), Spec(1e-6)),
        (Llama4TextRMSNorm(N), Spec(1e-5)),
        (GptOssRMSNorm(N), Spec(1e-6, "late")),
        (Gemma2RMSNorm(N), Spec(1e-6, "late", 1.0)),
        (NanoChatRMSNorm(), Spec(1e-6)),
    ],
)
def test_proven_norms_compute_exact(norm: nn.Module, spec: Spec) -> None:
    model = randomized(nn.Sequential(norm))
    unpatched = copy.deepcopy(model)
    report = patch(model)
    assert [v.spec for v in report.verdicts] == [spec]
    weight = getattr(norm, "weight", None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(64, N, generator=torch.Generator().manual_seed(1)).to(dtype)
        y = reference.forward(x, None, weight, spec.eps, spec.cast, spec.offset, False)[0]
        assert torch.equal(model(x), y)
        assert y.dtype == unpatched(x).dtype
    assert report.verdicts[0].output_changes["float32"].share > 0
    assert report.verdicts[0].output_changes["bfloat16"].max_ulp <= 2


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (IgnoredEpsRMSNorm(), "none of its attributes holds its eps"),
        (GatedRMSNorm(), "gate"),
        (RaisingRMSNorm(), "its forward raised RuntimeError: no CPU here"),
        (HalvingRMSNorm(), "match no supported RMSNorm"),
        (BiasedRMSNorm(), "more than a weight: bias"),
        (OverwritingRMSNorm(), "it writes to its input"),
        (DetachedRMSNorm(), "its forward uses Tensor.detach"),
        (EpslessRMSNorm(), "none of its attributes holds its eps"),
        (LateInHalfRMSNorm(), "float16"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_norm_that_computes_something_else_is_not_replaced_and_the_report_says_why(
    norm: nn.Module, reason: str
) -> None:
    holder = nn.ModuleDict({"a": norm, "bRMSNorm": EarlyRMSNorm()})
    before = type(norm)
    report = patch(holder)
    if before.__name__.endswith("RMSNorm"):
        assert [v.name for v in report.not_replaced] == ["a"]
        assert reason in report.not_replaced[0].reason
        assert reason in str(report)
    assert type(norm) is before
    assert [v.name for v in report.replaced] == ["bRMSNorm"]


def test_the_proof_does_not_touch_the_live_module() -> None:
    norm = randomized(nn.Sequential(SideEffectsRMSNorm()))[0]
    weight, state = norm.weight.detach().clone(), torch.get_rng_state()
    patch(nn.Sequential(norm))
    assert torch.equal(norm.weight, weight)
    assert norm.weight.grad is None
    assert torch.equal(norm.count, torch.zeros(3))
    assert norm.seen == []
    assert norm.eps == 1e-6
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_verdicts_do_not_depend_on_modes_or_the_default_dtype(
    context: Callable[[], AbstractContextManager[None]],
) -> None:
    def judged() -> PatchReport:
        return patch(nn.Sequential(DeepseekV2RMSNorm(N), Gemma2RMSNorm(N), SideEffectsRMSNorm()))

    expected = judged()
    assert len(expected.replaced) == 2
    with context():
        assert judged() == expected
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert judged() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_strict_false_accepts_another_way_to_compute_mean_and_rsqrt() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(RootRMSNorm(), CoarseRMSNorm(), IgnoredEpsRMSNorm(), HalvingRMSNorm())

    model = randomized(build())
    left = patch(model)
    assert left.replaced == ()
    assert ["which strict=False accepts" in v.reason for v in left.not_replaced] == [True, False, False, False]
    report = patch(model, strict=False)
    assert [v.spec for v in report.verdicts] == [Spec(1e-6), None, None, None]
    assert not report.replaced[0].matches_published_bits
    assert "accepted by strict=False" in str(report)
    assert "of its outputs differ from exact" in report.not_replaced[0].reason
    assert patch(model).replaced == ()  # proven again, strictly
    assert type(model[0]) is RootRMSNorm


def test_the_report_has_a_line_for_each_group_and_expanded_for_each_norm() -> None:
    model = nn.ModuleDict({"a": DeepseekV2RMSNorm(N), "b": DeepseekV2RMSNorm(N), "c": DeepseekV2RMSNorm(2 * N)})
    model["d"] = GatedRMSNorm()
    report = patch(model)
    head, group, left = str(report).splitlines()
    assert head == "3 of 4 norms replaced"
    assert group.startswith("  3 x DeepseekV2RMSNorm (a, …) proven: early, eps 1e-06; float32: 1")
    # saved before: x in fp32 and its cast, both for the products; now x in its dtype and 4 bytes
    assert re.search(
        rf"bfloat16: \S+% of outputs change( by up to \d ulp)?, backward keeps {(2 + 1 + 1) * N * 4:,} fewer bytes",
        group,
    )
    assert left.startswith("  1 x GatedRMSNorm (d) not replaced: its forward takes")
    assert [line.split(":")[0].strip() for line in report.expanded().splitlines() if line.startswith("    ")] == list(
        "abcd"
    )


@pytest.mark.short
def test_nothing_but_the_class_changes_and_unpatch_restores_it() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"norm": DeepseekV2RMSNorm(N), "linear": nn.Linear(N, N)})
    norm = model["norm"]
    randomized(norm)
    calls: list[str] = []
    norm.register_forward_hook(lambda *_: calls.append("hook"))
    parameter, keys, attributes = norm.weight, list(model.state_dict()), set(vars(norm))
    state = torch.get_rng_state()
    x = torch.randn(4, N)
    torch.set_rng_state(state)
    before = norm(x)
    patch(model)
    assert calls == ["hook"], "the proof must not run the hooks of the live module"
    assert torch.equal(torch.get_rng_state(), state)
    assert norm.weight is parameter
    assert norm.weight.grad is None
    assert list(model.state_dict()) == keys
    assert set(vars(norm)) == attributes
    assert isinstance(norm, DeepseekV2RMSNorm)
    assert type(norm) is not DeepseekV2RMSNorm
    assert norm(hidden_states=x).shape == x.shape
    assert calls == ["hook", "hook"]
    unpatch(model)
    assert type(norm) is DeepseekV2RMSNorm
    assert torch.equal(norm(x), before)


def test_the_memory_saved_is_counted_per_row() -> None:
    """In bf16 Gemma keeps x in fp32 and x·rstd, and rstd; `1 + weight` is kept once, however many rows there are."""
    (v,) = patch(nn.Sequential(Gemma2RMSNorm(N))).verdicts
    assert v.memory_saved_per_row["bfloat16"] == (4 * N + 4 * N + 4) - (2 * N + 4)


def test_patching_twice_gives_the_same_report_and_classes() -> None:
    model = nn.Sequential(DeepseekV2RMSNorm(N), Gemma2RMSNorm(N))
    first = patch(model)
    classes = [type(m) for m in model]
    assert patch(model) == first
    assert [type(m) for m in model] == classes
    unpatch(model)
    assert [type(m) for m in model] == [DeepseekV2RMSNorm, Gemma2RMSNorm]


def test_patched_models_are_copied_and_pickled() -> None:
    model = randomized(nn.Sequential(DeepseekV2RMSNorm(N), GptOssRMSNorm(N)))
    patch(model)
    x = torch.randn(4, N, generator=torch.Generator().manual_seed(0)).bfloat16()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert [type(m) for m in other] == [type(m) for m in model]
        assert torch.equal(other(x), model(x))
        unpatch(other)
        assert type(other[0]) is DeepseekV2RMSNorm


def test_norms_that_were_pickled_before_there_were_hints_are_loaded() -> None:
    norm = nn.RMSNorm(8, eps=1e-6)
    rmsnorm.patch(norm)
    rebuild, (cls, rule, _), state = norm.__reduce_ex__(2)  # type: ignore[misc]
    loaded = rebuild(cls, rule)
    loaded.__setstate__(state)
    x = torch.randn(4, 8)
    assert torch.equal(loaded(x), norm(x))
    assert len(rmsnorm.patch(loaded).replaced) == 1


def test_norms_on_meta_are_proven() -> None:
    with torch.device("meta"):
        model = nn.Sequential(DeepseekV2RMSNorm(N))
        report = patch(model)
    assert len(report.replaced) == 1
    assert model[0].weight.is_meta


def test_models_without_norms_and_arguments_that_are_not_modules() -> None:
    assert patch(nn.Linear(3, 3)).verdicts == ()
    assert patch(nn.Sequential(rmsnorm.RMSNorm(4), nn.LayerNorm(4))).verdicts == ()
    head = '0 of 0 norms replaced\n  patch proves modules with "norm" in the name of their class, or with one 1-D '
    assert str(patch(nn.Linear(3, 3))) == f"{head}parameter and an eps"
    for verb in (patch, unpatch):
        with pytest.raises(TypeError, match=r"model is a dict, expected a torch.nn.Module"):
            verb({})
        with pytest.raises(TypeError, match=r"model is an int, expected"):
            verb(3)


def test_a_norm_whose_weight_is_a_submodule_is_not_replaced() -> None:
    class ModuleWeightRMSNorm(EarlyRMSNorm):
        def __init__(self) -> None:
            super().__init__()
            del self.weight
            self.weight = nn.Linear(N, N)

    report = patch(nn.Sequential(ModuleWeightRMSNorm(), EarlyRMSNorm()))
    assert [(v.name, v.reason) for v in report.not_replaced] == [("0", "its weight is a submodule")]
    assert [v.name for v in report.replaced] == ["1"]


@pytest.mark.short
def test_a_whole_model_of_transformers() -> None:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=48, kv_lora_rank=32, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16,
    )  # fmt: skip
    model = DeepseekV3Model(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter)
    tokens = torch.randint(0, 128, (2, 9))
    before = model(tokens).last_hidden_state
    report = patch(model)
    assert len(report.replaced) == 9
    assert not report.not_replaced
    after = model(tokens).last_hidden_state
    assert not torch.equal(after, before)  # in fp32 about 15 % of a norm's outputs change, by an ulp or two
    torch.testing.assert_close(
        after, before, rtol=0, atol=64 * torch.finfo(torch.float32).eps * before.abs().max().item()
    )
    after.square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "norm" in n)
    unpatch(model)
    assert torch.equal(model(tokens).last_hidden_state, before)


class Rescale(nn.Module):
    """An RMSNorm without "norm" in its name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(N)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * h.to(x.dtype)


class Affine(Rescale):
    """Has the attributes of an RMSNorm and computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x + self.epsilon


def test_an_rmsnorm_that_is_not_named_a_norm_is_replaced_if_it_is_proven() -> None:
    model = nn.ModuleDict({"a": Rescale(), "b": Affine(), "c": Rescale(), "d": nn.BatchNorm1d(N), "e": nn.Linear(N, N)})
    own = copy.deepcopy(randomized(model)["a"])
    report = patch(model)
    assert [(v.name, v.class_name, v.spec) for v in report.verdicts] == [
        ("a", "Rescale", Spec(1e-6)), ("c", "Rescale", Spec(1e-6))
    ]  # fmt: skip
    assert type(model["b"]) is Affine
    assert [(s.name, s.resembles_rmsnorm) for s in report.skipped if s.name == "b"] == [("b", True)]
    lines = str(report).splitlines()
    assert "1 x Affine (b) skipped: its operators match no supported RMSNorm for " in lines[1]
    assert "2 x Rescale (a, …) proven although its class is not named a norm: early, eps 1e-06" in lines[2]
    x = torch.randn(64, N)
    assert torch.equal(model["a"](x), reference.forward(x, None, own.weight, 1e-6, "early", 0.0, False)[0])
    unpatch(model)
    assert torch.equal(model["a"](x), own(x))


def test_modules_that_cannot_be_norms_are_not_run() -> None:
    """A model has thousands of modules."""

    class Watched(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("was run")

    several, none, matrix = Watched(), Watched(), Watched()
    several.eps = none.eps = matrix.eps = 1e-6
    several.weight, several.bias = nn.Parameter(torch.ones(N)), nn.Parameter(torch.ones(N))
    matrix.weight = nn.Parameter(torch.ones(N, N))
    without_eps = Watched()
    without_eps.weight = nn.Parameter(torch.ones(N))
    report = patch(nn.ModuleList([several, none, matrix, without_eps]))
    assert (report.verdicts, report.skipped) == ((), ())


class Scale(nn.Module):
    """An RMSNorm with neither "norm" in its name nor a parameter that is called weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.epsilon = nn.Parameter(torch.ones(N)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon))


class ChannelLayerNorm(nn.Module):
    """Named like a norm, but not an RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x - x.mean(-1, keepdim=True))


class Sampler(nn.Module):
    """Does not resemble a norm, although it has a 1-D parameter and an attribute that contains "eps"."""

    def __init__(self) -> None:
        super().__init__()
        self.times, self.num_steps = nn.Parameter(torch.ones(N)), 10


class Lazy(nn.Module):
    """Its weight has no shape yet."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.UninitializedParameter(), 1e-6


def test_the_report_of_a_model_without_norms_names_the_skipped_modules() -> None:
    model = nn.ModuleDict(
        {
            "a": nn.LayerNorm(N), "b": Scale(), "c": nn.LayerNorm(N), "d": rmsnorm.RMSNorm(N), "e": ChannelLayerNorm(),
            "f": nn.Linear(N, N), "g": Sampler(), "h": Lazy(),
        }
    )  # fmt: skip
    report = patch(model)
    assert report.verdicts == ()
    assert [module.name for module in report.skipped] == ["a", "b", "c", "d", "e"]
    _, _, layer_norm, scale, ours, channel = str(report).splitlines()
    assert layer_norm == "  2 x LayerNorm (a, …) skipped: it is a module of torch.nn other than RMSNorm"
    assert scale == "  1 x Scale (b) skipped: it holds gain in place of an attribute named weight"
    assert ours == "  1 x RMSNorm (d) skipped: it is a layer of rmsnorm already"
    assert channel.startswith("  1 x ChannelLayerNorm (e) skipped: its forward runs aten.sub.Tensor")
    assert report.expanded() == str(report)
    assert pickle.loads(pickle.dumps(report)) == report
    model["norm"] = DeepseekV2RMSNorm(N)
    # Beside a norm, only the skipped modules that resemble an RMSNorm are listed.
    assert [line.split(" (")[0] for line in str(patch(model)).splitlines()[1:]] == [
        "  1 x Scale",
        "  1 x DeepseekV2RMSNorm",
    ]
    assert "1 x DeepseekV2RMSNorm (norm) proven" in str(patch(model))


def test_the_repr_of_a_model_shows_which_norms_are_patched() -> None:
    model = nn.Sequential(DeepseekV2RMSNorm(N), Gemma2RMSNorm(N), nn.RMSNorm(N), EarlyRMSNorm(), nn.Linear(2, 2))
    before = repr(model)
    patch(model)
    assert repr(model[0]) == f"DeepseekV2RMSNorm(({N},), eps=1e-06, rmsnorm: early)"
    assert repr(model[1]) == f"Gemma2RMSNorm(({N},), eps=1e-06, rmsnorm: late, offset 1)"
    assert repr(model[2]) == f"RMSNorm(({N},), eps=None, elementwise_affine=True, rmsnorm: late)"
    assert repr(model[3]) == "EarlyRMSNorm(rmsnorm: early)"
    assert repr(copy.deepcopy(model)) == repr(model)
    unpatch(model)
    assert repr(model) == before


def test_unpatch_returns_the_names_of_the_restored_norms() -> None:
    model = nn.ModuleDict({"a": DeepseekV2RMSNorm(N), "b": nn.Linear(2, 2), "c": Gemma2RMSNorm(N)})
    assert str(unpatch(model)) == "no norm was patched, so nothing was changed"
    patch(model)
    done = unpatch(model)
    assert done.names == ("a", "c")
    assert str(done) == "2 norms have their own class again: a, …"
    assert unpatch(model).names == ()
    patch(model["a"])
    assert str(unpatch(model)) == "1 norm has its own class again: a"
