"""patch and unpatch: what is proven is replaced and computes *exact*; what is not is left, and the report says why."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3Model
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextRMSNorm
from transformers.models.nanochat.modeling_nanochat import NanoChatRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

import rmsnorm
from rmsnorm import patch, reference, unpatch
from rmsnorm.spec import Spec

N = 96


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return module


class EarlyRMSNorm(nn.Module):
    """The base of the strangers below: a plain early norm that each gets wrong in one way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return reference.published(x, self.weight, self.eps, "early", 0.0)


class LyingRMSNorm(EarlyRMSNorm):
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


class TwoFacedRMSNorm(EarlyRMSNorm):
    """Early but for fp16 inputs: a probe in the two other dtypes would call it early."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.published(x, self.weight, self.eps, "late" if x.dtype == torch.float16 else "early", 0.0)


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
    assert report.verdicts[0].changed["float32"].share > 0
    assert report.verdicts[0].changed["bfloat16"].ulp <= 2


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (LyingRMSNorm(), "no spec gives its bits"),
        (GatedRMSNorm(), "gate"),
        (Qwen3NextRMSNormGated(N), "gate"),
        (RaisingRMSNorm(), "RuntimeError under the probe: no CPU here"),
        (HalvingRMSNorm(), "no spec gives its bits"),
        (BiasedRMSNorm(), "more than a weight: bias"),
        (EpslessRMSNorm(), "no attribute that could be its eps"),
        (TwoFacedRMSNorm(), "float16"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_strangers_are_left_with_a_reason(norm: nn.Module, reason: str) -> None:
    holder = nn.ModuleDict({"a": norm, "bRMSNorm": EarlyRMSNorm()})
    before = type(norm)
    report = patch(holder)
    if before.__name__.endswith("RMSNorm"):
        assert [v.name for v in report.left] == ["a"]
        assert reason in report.left[0].reason
        assert reason in str(report)
    assert type(norm) is before
    assert [v.name for v in report.proven] == ["bRMSNorm"]


def test_a_rebound_forward_is_left() -> None:
    norm = DeepseekV2RMSNorm(N)
    norm.forward = lambda hidden_states: hidden_states
    report = patch(nn.Sequential(norm))
    assert "rebound" in report.left[0].reason


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
    assert calls == ["hook"], "the probe must not run the hooks of the live module"
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


def test_patching_twice_reports_again_and_changes_nothing() -> None:
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


def test_norms_on_meta_are_proven() -> None:
    with torch.device("meta"):
        model = nn.Sequential(DeepseekV2RMSNorm(N))
        report = patch(model)
    assert len(report.proven) == 1
    assert model[0].weight.is_meta


def test_models_without_norms_and_things_that_are_no_module() -> None:
    assert patch(nn.Linear(3, 3)).verdicts == ()
    assert patch(nn.Sequential(rmsnorm.RMSNorm(4), nn.RMSNorm(4))).verdicts == ()
    for verb in (patch, unpatch):
        with pytest.raises(TypeError, match=r"model is a dict, expected a torch.nn.Module"):
            verb({})


def test_a_transformers_model_whole() -> None:
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
    assert len(report.proven) == 9
    assert not report.left
    after = model(tokens).last_hidden_state
    assert not torch.equal(after, before)  # in fp32 about 15 % of a norm's outputs change, by an ulp or two
    torch.testing.assert_close(
        after, before, rtol=0, atol=64 * torch.finfo(torch.float32).eps * before.abs().max().item()
    )
    after.square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "norm" in n)
    unpatch(model)
    assert torch.equal(model(tokens).last_hidden_state, before)
