"""Residual additions of the families of transformers, fused with their norms under torch.compile: how many, and which bits."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table

import rmsnorm
from captured import Capture, Sites, assert_equal, assert_pass_keeps_bits

pytestmark = pytest.mark.compiled

LAYERS = 2
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS = {"head_dim": 16}
LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "first_k_dense_replace": 1,
}  # fmt: skip
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}

# What is fused follows from where a layer has its norms.
PRE_NORM = Sites(2 * LAYERS, 2 * LAYERS)  # both sums of a layer go into the next norm; so do their gradients come back
POST_NORM = Sites(1, 0)  # norm(f(x)) + x: only the last sum goes into a norm, the final one
# Gemma 4 multiplies by a scalar at the end of a layer, and normalizes the product.
SCALED_LAYERS = Sites(LAYERS, 2 * LAYERS)
# Where Inductor computes what is added in the kernel of the addition, that stays there: a multiple, the sum of a shared
# and of routed experts, a dropout. The gradients still come back to the norms.
SCALED_BRANCHES = Sites(0, 2 * LAYERS)
SHARED_EXPERTS = Sites(LAYERS, 2 * LAYERS)
SHARED_EXPERTS_IN_THE_LAST = Sites(2 * LAYERS - 1, 2 * LAYERS)


@dataclass(frozen=True)
class Family:
    """A model type of transformers, its small configuration, and what the pass fuses in two layers."""

    name: str
    fused: Sites = PRE_NORM
    config: dict[str, Any] = field(default_factory=dict)
    dropout: bool = False  # on every branch, when it is trained

    def build(self, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(1)
        config = transformers.AutoConfig.for_model(self.name, **{**SMALL, **self.config})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():  # weights of one would hide a difference
                if parameter.dim() == 1:
                    parameter.add_(torch.randn(parameter.shape) * 0.2)
        return model


FAMILIES = [
    Family("llama"),
    Family("qwen2"),
    Family("qwen3", config=HEADS),
    Family("qwen3_moe", config=HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    Family("mistral", config=HEADS),
    Family("ministral", config=HEADS),
    Family("mixtral", config={"num_local_experts": 4}),
    Family("gemma", config=HEADS),
    Family("gemma2", config=HEADS),
    Family("gemma3_text", config=HEADS),
    Family("gemma4_text", SCALED_LAYERS, HEADS),
    Family("deepseek_v2", SHARED_EXPERTS_IN_THE_LAST, LATENT | EXPERTS),
    Family("deepseek_v3", SHARED_EXPERTS_IN_THE_LAST, LATENT | EXPERTS),
    Family("olmo2", POST_NORM),
    Family("olmo3", POST_NORM),
    Family("exaone4", POST_NORM),
    Family("phi3"),
    Family("gpt_oss", config=HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("glm4", config=HEADS),
    Family("glm4_moe", SHARED_EXPERTS_IN_THE_LAST, HEADS | EXPERTS),
    Family("smollm3"),
    Family("granite", SCALED_BRANCHES, {"residual_multiplier": 0.22}),
    Family("llama4_text", SHARED_EXPERTS, HEADS | {"num_local_experts": 2, "intermediate_size_mlp": 96}),
    Family("seed_oss", config=HEADS | {"attention_dropout": 0.0}, dropout=True),
]
BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture(autouse=True)
def _one_thread(threads, fresh_dynamo) -> None:
    threads(1)


def ids() -> Tensor:
    return torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(2))


def trained(run: Any, model: nn.Module) -> dict[str, Tensor]:
    """The logits and the gradient of every parameter."""
    torch.manual_seed(3)
    logits = run(input_ids=ids(), use_cache=False).logits
    logits.float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return {"logits": logits.detach(), **gradients}


def check_training(family: Family, dtype: torch.dtype) -> None:
    model = family.build(dtype)
    rmsnorm.patch(model)
    try:
        expected = trained(model, model)
        capture = Capture(select_decomp_table if family.dropout else None)
        got = trained(torch.compile(model, backend=capture.backend, fullgraph=True, dynamic=False), model)
    finally:
        rmsnorm.unpatch(model)
    assert capture.sites == (SCALED_BRANCHES if family.dropout else family.fused)
    assert_pass_keeps_bits(capture)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if not family.dropout:  # of which eager and traced code draw other random numbers
            assert_equal(got[name], value, name)
    for before, after in capture.saved_bytes:
        assert after <= before


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_training_fuses_the_additions_around_norms_and_keeps_all_bits(family) -> None:
    check_training(family, torch.bfloat16)


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3", "seed_oss"])
def test_training_in_fp32_fuses_as_many_and_keeps_all_bits(name) -> None:
    check_training(BY_NAME[name], torch.float32)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_inference_fuses_the_additions_before_norms_and_keeps_all_bits(family) -> None:
    model = family.build(torch.float32).eval()
    rmsnorm.patch(model)
    capture = Capture()
    try:
        with torch.no_grad():
            expected = model(input_ids=ids(), use_cache=False).logits
            compiled = torch.compile(model, backend=capture.backend, fullgraph=True, dynamic=False)
            got = compiled(input_ids=ids(), use_cache=False).logits
    finally:
        rmsnorm.unpatch(model)
    assert capture.sites == Sites(family.fused.forward, 0)
    assert_pass_keeps_bits(capture)
    assert_equal(got, expected, "logits")
