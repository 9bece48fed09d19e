"""`register` tells torch's FLOP counter and transformers about this package, and only when it is called."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode
from transformers import pytorch_utils
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.trainer_pt_utils import get_parameter_names

import rmsnorm
from rmsnorm import DeepseekV2RMSNorm, RMSNorm, TorchRMSNorm, cost, patch, register


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of what `register` edits, without an earlier registration."""
    ours = (torch.ops.rmsnorm.forward, torch.ops.rmsnorm.backward)
    formulas = {operator: f for operator, f in flop_counter.flop_registry.items() if operator not in ours}
    monkeypatch.setattr(flop_counter, "flop_registry", formulas)
    monkeypatch.setattr(pytorch_utils, "ALL_LAYERNORM_LAYERS", [nn.LayerNorm])


def layers_of_transformers() -> list[type[nn.Module]]:
    return pytorch_utils.ALL_LAYERNORM_LAYERS


def test_flop_counter_mode_counts_our_operators_after_register() -> None:
    x, r, w = (torch.randn(*s, requires_grad=True) for s in ((3, 8), (3, 8), (8,)))

    def counted() -> list[int]:
        counts = []
        with FlopCounterMode(display=False) as counter:
            y = rmsnorm.rms_norm(x, w)
            counts.append(counter.get_total_flops())
            y.backward(torch.randn(3, 8))
            counts.append(counter.get_total_flops() - counts[-1])
        with FlopCounterMode(display=False) as counter:
            y, s = rmsnorm.add_rms_norm(x, r, w, cast="late", offset=1.0)
            counts.append(counter.get_total_flops())
            torch.autograd.backward((y, s), (torch.randn(3, 8), torch.randn(3, 8)))
            counts.append(counter.get_total_flops() - counts[-1])
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(rmsnorm.rms_norm(x, w.detach()), x, torch.randn(3, 8))
            counts.append(counter.get_total_flops() - counts[0])
        return counts

    assert counted()[:4] == [0] * 4
    register()
    plain = [cost((3, 8), torch.float32, phase=phase).flops for phase in ("forward", "backward")]
    options: Any = {"implementation": "ours+residual", "cast": "late", "offset": 1.0}
    added = [cost((3, 8), torch.float32, phase=phase, **options).flops for phase in ("forward", "backward")]
    without_dw = plain[1] - (2 * 24 - 8)
    assert counted() == [*plain, *added, without_dw]


def test_register_adds_our_layers_to_the_list_of_transformers_once() -> None:
    register()
    register()
    layers = layers_of_transformers()
    assert layers[0] is nn.LayerNorm
    assert sorted(cls.__name__ for cls in layers[1:]) == ["DeepseekV2RMSNorm", "RMSNorm", "TorchRMSNorm"]
    model = nn.ModuleDict({"a": RMSNorm(4), "b": DeepseekV2RMSNorm(4), "c": TorchRMSNorm(4), "d": nn.Linear(4, 4)})
    assert get_parameter_names(model, layers) == ["d.weight", "d.bias"]


def test_register_does_not_import_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers")
    register()
    assert "transformers" not in sys.modules
    assert layers_of_transformers() == [nn.LayerNorm]


@pytest.mark.parametrize("layers", [None, (nn.LayerNorm,)])
def test_register_accepts_a_transformers_without_the_list(layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("transformers.pytorch_utils")
    if layers is not None:
        stand_in.ALL_LAYERNORM_LAYERS = layers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", stand_in)
    register()
    assert getattr(stand_in, "ALL_LAYERNORM_LAYERS", None) == layers


def test_building_a_layer_or_patching_a_model_registers_nothing() -> None:
    DeepseekV2RMSNorm(4), RMSNorm(4), TorchRMSNorm(4)
    patch(nn.Sequential(nn.RMSNorm(16)))
    assert layers_of_transformers() == [nn.LayerNorm]
    assert torch.ops.rmsnorm.forward not in flop_counter.flop_registry


def test_weight_decay_skips_a_patched_norm_without_registration() -> None:
    """The list holds the model's own class, of which a replaced norm is an instance."""
    own = modeling_deepseek_v2.DeepseekV2RMSNorm
    model = nn.ModuleDict({"a": own(16), "b": nn.Linear(4, 4)})
    assert len(patch(model).replaced) == 1
    assert type(model["a"]) is not own
    assert get_parameter_names(model, [nn.LayerNorm, own]) == ["b.weight", "b.bias"]
