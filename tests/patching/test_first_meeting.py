"""What `patch` says of norms that it meets under other names and on other devices."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rmsnorm
from rmsnorm import DeepseekV2RMSNorm, RMSNorm, TorchRMSNorm


class Scale(nn.Module):
    """An RMSNorm by its arithmetic, whose weight has another name."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(hidden_size) + 0.5)
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.gain * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Renamed(nn.RMSNorm):
    pass


def test_a_near_miss_is_printed_beside_norms_that_were_replaced() -> None:
    report = rmsnorm.patch(nn.Sequential(Scale(8), nn.RMSNorm(8)))
    assert [verdict.name for verdict in report.replaced] == ["1"]
    assert "1 x Scale (0) skipped: it holds gain in place of an attribute named weight" in str(report)
    assert "LayerNorm" not in str(rmsnorm.patch(nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8))))


def test_a_subclass_of_torchs_class_is_replaced_whatever_its_name() -> None:
    model = nn.Sequential(Renamed(8, eps=1e-6))
    assert len(rmsnorm.patch(model).replaced) == 1
    assert "rmsnorm: late" in repr(model)


def test_a_model_that_is_itself_a_norm_is_named_in_words() -> None:
    model = nn.RMSNorm(8)
    assert "(the model itself)" in str(rmsnorm.patch(model))
    assert str(rmsnorm.unpatch(model)).endswith("the model itself")


@pytest.mark.parametrize("patched", [False, True])
def test_a_norm_on_the_meta_device_gives_the_shape_that_torchs_class_gives(patched: bool) -> None:
    norm: Any = nn.RMSNorm(8, device="meta") if patched else TorchRMSNorm(8, device="meta")
    if patched:
        rmsnorm.patch(nn.Sequential(norm))
    y = norm(torch.randn(2, 8, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((2, 8), torch.bfloat16, "meta")


@pytest.mark.parametrize("layer", [RMSNorm(8, cast="late"), DeepseekV2RMSNorm(8), TorchRMSNorm(8)])
def test_explain_takes_a_layer_of_this_package(layer: nn.Module) -> None:
    x = torch.randn(2, 8)
    assert rmsnorm.explain(x, layer) == rmsnorm.explain(x, layer.weight, cast="early")  # type: ignore[arg-type]


def test_explain_says_of_another_norm_that_it_was_not_patched() -> None:
    with pytest.raises(TypeError, match=r"weight is an RMSNorm that was not patched, .*: pass norm\.weight"):
        rmsnorm.explain(torch.randn(2, 8), nn.RMSNorm(8))  # type: ignore[arg-type]


def test_the_published_class_names_the_class_that_takes_torchs_arguments() -> None:
    for arguments, named in (((8, 1e-6, False), {}), ((), {"normalized_shape": 8})):
        with pytest.raises(TypeError, match=r"TorchRMSNorm takes the arguments of torch.nn.RMSNorm"):
            DeepseekV2RMSNorm(*arguments, **named)  # type: ignore[arg-type]
