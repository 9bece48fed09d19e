"""The block spec, built into layers by Megatron-core's own code, in one process on the CPU."""

from collections.abc import Iterator
from typing import Any

import pytest

from installed import need

need("megatron")

import torch
from megatron.core import parallel_state
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp

import rmsnorm
from rmsnorm.bits import differing
from rmsnorm.integrations import megatron


@pytest.fixture(scope="module", autouse=True)
def _groups(one_process: None) -> Iterator[None]:
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()


def config(**options: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, use_cpu_initialization=True, normalization="RMSNorm",
        qk_layernorm=True, persist_layer_norm=True, params_dtype=torch.bfloat16, layernorm_epsilon=1e-6, **options,
    )  # fmt: skip


def model(cast: str, **options: Any) -> GPTModel:
    made = config(**options)
    spec = megatron.block_spec(made, cast=cast)
    return GPTModel(made, transformer_layer_spec=spec, vocab_size=128, max_sequence_length=16)


@pytest.mark.parametrize("cast", ["late", "early"])
def test_every_norm_of_the_built_model_is_ours_and_computes_rms_norm(cast: str) -> None:
    modules = model(cast).named_modules()
    norms = {name: norm for name, norm in modules if name.endswith("norm") and not isinstance(norm, IdentityOp)}
    assert sorted(norms) == [
        "decoder.final_layernorm",
        *(
            f"decoder.layers.{i}.{norm}"
            for i in (0, 1)
            for norm in ("input_layernorm", "pre_mlp_layernorm", "self_attention.k_layernorm",
                         "self_attention.q_layernorm")
        ),
    ]  # fmt: skip
    for norm in norms.values():
        assert isinstance(norm, megatron.RMSNorm)
        with torch.no_grad():
            norm.weight.normal_()
        x = torch.randn(4, 2, norm.weight.numel(), dtype=torch.bfloat16)
        assert differing(norm(x), rmsnorm.rms_norm(x, norm.weight, 1e-6, cast=cast)) == (0, 0)


def test_gradients_reach_the_weight_through_megatrons_own_mlp() -> None:
    layer = model("early").decoder.layers[1]
    x = torch.randn(4, 2, 64, dtype=torch.bfloat16, requires_grad=True)
    out, _ = layer.mlp(layer.pre_mlp_layernorm(x))
    out.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.count_nonzero()
    assert layer.pre_mlp_layernorm.weight.grad.count_nonzero()


def test_a_zero_centered_weight_is_offset_by_one_and_starts_at_zero() -> None:
    norm = model("late", layernorm_zero_centered_gamma=True).decoder.final_layernorm
    assert not norm.weight.count_nonzero()
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    expected = rmsnorm.rms_norm(x, norm.weight, 1e-6, cast="late", offset=1.0)
    assert differing(norm(x), expected) == (0, 0)


def test_sequence_parallel_weights_are_marked_for_megatrons_all_reduce() -> None:
    made = config()
    assert megatron.RMSNorm(made, 64).weight.sequence_parallel is False
    made.sequence_parallel = True
    assert megatron.RMSNorm(made, 64).weight.sequence_parallel is True


def test_the_provider_gives_megatrons_own_norm_for_layer_norm() -> None:
    provider = megatron.RMSNormSpecProvider()
    assert provider.layer_norm() is LocalSpecProvider().layer_norm()
    for options in ({}, {"for_qk": True}, {"has_residual": True}):
        assert provider.layer_norm(rms_norm=True, **options) is megatron.RMSNorm


def test_making_a_spec_leaves_megatrons_own_backend_in_place() -> None:
    megatron.block_spec(config())
    assert gpt_layer_specs.LocalSpecProvider is LocalSpecProvider


def test_a_config_for_layer_norm_is_refused() -> None:
    made = config()
    made.normalization = "LayerNorm"
    with pytest.raises(ValueError, match="normalization is 'LayerNorm', expected 'RMSNorm'"):
        megatron.RMSNorm(made, 64)
