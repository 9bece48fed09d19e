"""The hook in SGLang's own registry, around the forward of SGLang's own layer, on the CPU."""

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest

from installed import need

need("sglang")

import torch
from torch import Tensor
from transformers.utils.import_utils import is_torchvision_available


class _Absent(types.ModuleType):
    """Stands for torchvision, whose wheels need another build of torch. The norms do not use it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


if not is_torchvision_available():  # asked, and remembered by transformers, before the stand-in is there
    for module in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.io"):
        stand_in = _Absent(module)
        stand_in.__spec__ = importlib.machinery.ModuleSpec(module, None)
        stand_in.__path__ = []
        sys.modules[module] = stand_in

import sglang.srt.plugins
from sglang.srt import runtime_context
from sglang.srt.layers import layernorm
from sglang.srt.plugins.hook_registry import HookRegistry

import rmsnorm
from rmsnorm.bits import differing

# In a tuple, because SGLang puts the hooked function into every module that has the original under a name.
ORIGINAL = (layernorm.RMSNorm.forward_cuda,)
GET_EXEC = runtime_context.get_exec
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = {"rmsnorm": "early", "rmsnorm_late": "late"}


def load(monkeypatch: pytest.MonkeyPatch, named: str | None) -> None:
    """Load the plugins as each process of SGLang does, with SGLANG_PLUGINS set to this."""
    if named is None:
        monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("SGLANG_PLUGINS", named)
    monkeypatch.setattr(sglang.srt.plugins, "_plugins_loaded", False)
    sglang.srt.plugins.load_plugins()


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The part of a server's settings that the norms read, as if there were a server."""
    settings = SimpleNamespace(rl_on_policy_target=None)
    execution = SimpleNamespace(deterministic=settings)
    torch.manual_seed(0)
    with monkeypatch.context() as server:
        server.setattr(runtime_context, "get_exec", lambda: execution)
        server.setattr(layernorm, "get_exec", lambda: execution)
        yield settings
    layernorm.RMSNorm.forward_cuda = ORIGINAL[0]
    HookRegistry.reset()


def layer(dtype: torch.dtype = torch.bfloat16, weight_dtype: torch.dtype | None = None, **options: Any) -> Any:
    norm = layernorm.RMSNorm(640, eps=1e-5, weight_dtype=weight_dtype or dtype, **options)
    norm.weight.data.normal_()
    norm._forward_method = norm.forward_cuda  # what SGLang chooses on a GPU
    return norm


def rows(dtype: torch.dtype = torch.bfloat16, count: int = 33) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 640, dtype=dtype), torch.randn(count, 640, dtype=dtype)


def test_installed_but_not_named_it_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {entry.name for entry in entry_points(group="sglang.srt.plugins")} >= set(NAMES)
    load(monkeypatch, None)
    assert layernorm.RMSNorm.forward_cuda is ORIGINAL[0]


def test_naming_both_plugins_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from rmsnorm.integrations import sglang as adapter

    monkeypatch.setenv("SGLANG_PLUGINS", "rmsnorm,rmsnorm_late")
    with pytest.raises(ValueError, match="expected one of them"):
        adapter.register()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(33, 640), (3, 11, 640)], ids=str)
def test_outputs_are_those_of_rmsnorm(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(monkeypatch, name)
    norm = layer(dtype)
    x, residual = (t.view(shape) for t in rows(dtype))
    assert differing(norm(x), rmsnorm.rms_norm(x, norm.weight, 1e-5, cast=NAMES[name])) == (0, 0)
    expected = rmsnorm.add_rms_norm(x, residual, norm.weight, 1e-5, cast=NAMES[name])
    for ours, theirs in zip(norm(x, residual), expected, strict=True):
        assert differing(ours, theirs) == (0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_each_row_alone_has_the_bits_it_has_in_a_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, name)
    norm = layer()
    x, residual = rows()
    together = norm(x, residual)
    for i in range(len(x)):
        for alone, batch in zip(norm(x[i : i + 1], residual[i : i + 1]), together, strict=True):
            assert torch.equal(alone[0], batch[i])


@pytest.mark.parametrize(
    ("name", "weight_dtype", "early"),
    [
        # Without ("rmsnorm", bfloat16, False), where it rounds as the model's class does, and SGLang does not.
        ("rmsnorm", torch.bfloat16, True),
        *(("rmsnorm", torch.float32, early) for early in (False, True)),
        *(("rmsnorm_late", dtype, early) for dtype in (torch.bfloat16, torch.float32) for early in (False, True)),
    ],
)
def test_the_dtype_and_nearly_all_bits_are_those_of_sglangs_native_forward(
    name: str, weight_dtype: torch.dtype, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer's `cast_x_before_out_mul`, and an fp32 weight, decide the rounding as in SGLang's own code."""
    load(monkeypatch, name)
    norm = layer(weight_dtype=weight_dtype, cast_x_before_out_mul=early)
    x, _ = rows(count=512)
    native = norm.forward_native(x)
    y = norm(x)
    assert y.dtype is native.dtype
    assert differing(y, native)[0] <= 2e-4 * x.numel()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"var_hidden_size": 320}, "the statistic of a part of the row"),
        ({"override_orig_dtype": torch.float32}, "another dtype to cast to"),
        ({"fp32_residual": True}, "a residual in fp32"),
        ({"weight_dtype": torch.float16}, "another 16-bit dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_we_do_not_compute_goes_to_sglangs_own_forward(
    options: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(layernorm.RMSNorm, "forward_cuda", lambda self, *args: calls.append(args))
    load(monkeypatch, "rmsnorm")
    x, residual = rows()
    layer(**options)(x, residual)
    assert len(calls) == 1, why
    layer()(x, residual)
    assert len(calls) == 1


def test_calls_with_more_arguments_go_to_sglangs_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(layernorm.RMSNorm, "forward_cuda", lambda self, *args: calls.append(args))
    load(monkeypatch, "rmsnorm")
    x, residual = rows()
    quantized = layer()
    quantized.fuse_input_quant(torch.nn.Linear(640, 8))
    quantized(x)
    layer()(x, residual, post_residual_addition=x)
    layer()(x, residual.float())
    layer()(x, quant_linear=torch.nn.Linear(640, 8))
    assert len(calls) == 4


def test_with_an_on_policy_target_every_call_goes_to_sglangs_own_forward(
    deterministic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(layernorm.RMSNorm, "forward_cuda", lambda self, *args: calls.append(args))
    load(monkeypatch, "rmsnorm")
    deterministic.rl_on_policy_target = "fsdp"
    layer()(rows()[0])
    assert len(calls) == 1


def test_a_layer_without_a_server_is_computed_by_us(monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, "rmsnorm")
    monkeypatch.setattr(runtime_context, "get_exec", GET_EXEC)
    with pytest.raises(ValueError, match="not published"):
        runtime_context.get_exec()
    norm, (x, _) = layer(), rows()
    assert differing(norm(x), rmsnorm.rms_norm(x, norm.weight, 1e-5)) == (0, 0)
