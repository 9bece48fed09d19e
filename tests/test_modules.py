"""The layers: constructor, attributes, state_dict, copies, pickles and the meta device."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rmsnorm import DeepseekV2RMSNorm, RMSNorm, TorchRMSNorm, rms_norm

pytestmark = pytest.mark.short


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return module


TORCHS = "rmsnorm.TorchRMSNorm takes the arguments of torch.nn.RMSNorm"
LAYERS = [
    RMSNorm(48),
    RMSNorm(48, 1e-5, cast="late"),
    RMSNorm(48, cast="late", offset=1.0),
    RMSNorm(48, elementwise_affine=False),
    RMSNorm(48, dtype=torch.bfloat16),
    DeepseekV2RMSNorm(48, eps=1e-5),
    TorchRMSNorm((3, 16)),
    TorchRMSNorm(48, 1e-5, False, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_copied_pickled_and_loaded_layers_compute_the_same(layer: nn.Module, tmp_path) -> None:
    layer = randomized(copy.deepcopy(layer))
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    x = x.view(5, *getattr(layer, "normalized_shape", (48,)))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh = copy.deepcopy(layer)
    if list(fresh.parameters()):
        randomized(fresh, seed=2)
        assert not torch.equal(fresh(x), layer(x))
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    for other in [*others, fresh]:
        assert repr(other) == repr(layer)
        assert torch.equal(other(x), layer(x))


def test_a_layer_gives_the_bits_of_the_function() -> None:
    x = torch.randn(3, 4, 48, generator=torch.Generator().manual_seed(0)).half()
    layer = randomized(RMSNorm(48, 1e-5, cast="late", offset=1.0))
    assert torch.equal(layer(x), rms_norm(x, layer.weight, 1e-5, cast="late", offset=1.0))
    published = randomized(DeepseekV2RMSNorm(48))
    assert torch.equal(published(x), rms_norm(x, published.weight))


def test_deepseek_v2_rms_norm_has_the_published_attributes_and_state_dict() -> None:
    layer = DeepseekV2RMSNorm(48, eps=1e-5)
    assert list(layer.state_dict()) == ["weight"]
    assert torch.equal(layer.weight, torch.ones(48))
    assert layer.variance_epsilon == 1e-5
    x = torch.randn(2, 48, generator=torch.Generator().manual_seed(0)) * 1e-3
    before = layer(hidden_states=x)
    layer.variance_epsilon = 1.0
    assert not torch.equal(layer(x), before)


def test_the_weight_of_a_new_layer_multiplies_by_one() -> None:
    assert torch.equal(RMSNorm(4).weight, torch.ones(4))
    assert torch.equal(RMSNorm(4, cast="late", offset=1).weight, torch.zeros(4))
    assert RMSNorm(4, elementwise_affine=False).weight is None


def test_a_layer_on_the_meta_device_allocates_nothing_and_can_be_materialized() -> None:
    layer = RMSNorm(1 << 40, device="meta")
    assert layer.weight.is_meta
    with torch.device("meta"):
        small = DeepseekV2RMSNorm(48)
    assert small(torch.empty(2, 48, device="meta")).shape == (2, 48)
    small = randomized(small.to_empty(device="cpu"))
    assert small(torch.ones(2, 48)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"hidden_size": 0}, ValueError, "[RMSNorm] hidden_size is 0, expected at least 1"),
        ({"hidden_size": -3}, ValueError, "hidden_size is -3"),
        ({"hidden_size": 4.0}, TypeError, "hidden_size is 4.0, expected an int"),
        ({"hidden_size": 4, "eps": -1.0}, ValueError, "eps is -1.0"),
        ({"hidden_size": 4, "eps": float("nan")}, ValueError, "eps is nan"),
        ({"hidden_size": 4, "cast": "middle"}, ValueError, "cast is 'middle', expected 'early', 'late' or 'first'"),
        ({"hidden_size": 4, "offset": 1.0}, ValueError, "cast='late'"),
        (
            {"hidden_size": 4, "cast": "late", "offset": 1.0, "elementwise_affine": False},
            ValueError,
            "elementwise_affine",
        ),
        ({"hidden_size": 4, "dtype": torch.int32}, TypeError, "dtype is torch.int32"),
        ({"hidden_size": 4, "dtype": "float32"}, TypeError, "dtype is 'float32', expected torch.float32, torch.b"),
        ({"hidden_size": (4,)}, TypeError, f"hidden_size is a tuple, expected an int; {TORCHS}"),
        ({"hidden_size": torch.Size([2, 4])}, TypeError, f"hidden_size is a Size, expected an int; {TORCHS}"),
        ({"hidden_size": 4, "eps": None}, TypeError, "F.rms_norm's None is torch.finfo(torch.float32).eps"),
        ({"normalized_shape": 4}, TypeError, f"normalized_shape is 4, expected hidden_size, an int; {TORCHS}"),
    ],
)
def test_the_constructor_names_the_bad_argument(arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        RMSNorm(**arguments)
    assert text in str(caught.value)


def test_a_third_positional_argument_raises_an_error_that_names_torch_rms_norm() -> None:
    with pytest.raises(TypeError, match=rf"^\[RMSNorm\] the argument after eps is True, expected .*; {TORCHS}$"):
        RMSNorm(4, 1e-6, True)
