"""The override, applied and built by torchtitan's own code to its own models."""

import copy
from collections.abc import Iterator

import pytest

from installed import need

need("torchtitan")

import torch
from torch import nn
from torchtitan.config.override import OverrideConfig, apply_overrides
from torchtitan.models.common.nn_modules import RMSNorm as TheirRMSNorm
from torchtitan.models.deepseek_v3 import deepseekv3_configs
from torchtitan.models.llama3 import llama3_configs

import rmsnorm
from rmsnorm.bits import differing

OVERRIDE = "rmsnorm.integrations.torchtitan.rms_norm"
CONFIGS = {"llama3": llama3_configs["debugmodel"], "deepseek_v3": deepseekv3_configs["debugmodel"]}


def built(model: str, imports: list[object]) -> nn.Module:
    options = {"moe_comm_backend": "standard"} if model == "deepseek_v3" else {}
    config = CONFIGS[model](attn_backend="flex", **options)
    apply_overrides(OverrideConfig(imports=copy.deepcopy(imports)), config)
    torch.manual_seed(0)
    built_model = config.build()
    built_model.init_states()
    return built_model


def norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TheirRMSNorm))


@pytest.mark.parametrize("model", CONFIGS)
def test_every_norm_of_the_built_model_is_ours_with_the_same_parameters(model: str) -> None:
    theirs, ours = built(model, []), built(model, [OVERRIDE])
    assert [name for name, _ in norms(ours)] == [name for name, _ in norms(theirs)] != []
    assert all(type(norm).__module__ == "rmsnorm.integrations.torchtitan" for _, norm in norms(ours))
    assert [norm.eps for _, norm in norms(ours)] == [norm.eps for _, norm in norms(theirs)]
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("cast", ["late", "early"])
def test_outputs_and_gradients_are_those_of_rmsnorm(cast: str) -> None:
    model = built("llama3", [(OVERRIDE, {"cast": cast})]).bfloat16()
    norm = model.layers["0"].attention_norm
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(2, 16, 256, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    y = norm(x)
    gradients = torch.autograd.grad(y, (x, norm.weight), dy)
    expected = rmsnorm.rms_norm(x, norm.weight, norm.eps, cast=cast)
    assert differing(y, expected) == (0, 0)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (x, norm.weight), dy), strict=True):
        assert differing(ours, theirs) == (0, 0)


def test_late_is_what_torchtitans_own_norm_computes() -> None:
    ours, theirs = built("llama3", [OVERRIDE]).norm.bfloat16(), built("llama3", []).norm.bfloat16()
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.normal_())
    x = torch.randn(512, 256, dtype=torch.bfloat16)
    count, most = differing(ours(x), theirs(x))
    assert count <= 1e-4 * x.numel()
    assert most <= 1
