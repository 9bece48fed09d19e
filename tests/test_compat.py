"""The private names of torch: present where the package is tested, and replaced by what is slower and right elsewhere."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from rmsnorm import TorchRMSNorm, compat, explain, rms_norm

# On torch 2.11 and 2.13 each of these was seen.
NAMES = (
    (torch._C, "_len_torch_dispatch_stack", "dispatch_modes"),
    (torch._C, "_are_functorch_transforms_active", "transforms_active"),
    (torch._C, "_is_tracing", "is_tracing"),
    (torch._C._functorch, "is_legacy_batchedtensor", "is_batched_cotangent"),
    (torch._C._functorch, "is_functorch_wrapped_tensor", "is_wrapped"),
)


@pytest.mark.parametrize(("owner", "name", "ours"), NAMES, ids=[ours for *_, ours in NAMES])
def test_the_private_name_is_there_and_used(owner: object, name: str, ours: str) -> None:
    assert getattr(compat, ours) is getattr(owner, name)


def norm_and_gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(size, generator=generator) for size in ((3, 8), (8,), (3, 8)))
    y = rms_norm(x.requires_grad_(), w.requires_grad_())
    return [y, *torch.autograd.grad(y, [x, w], dy)]


@pytest.mark.parametrize("ours", [ours for *_, ours in NAMES])
def test_with_the_fallback_the_results_are_the_same(ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = norm_and_gradients()
    monkeypatch.setattr("rmsnorm.kernels.host.loader.norm", lambda *_: None)  # the C++ asks none of these
    monkeypatch.setattr(compat, ours, torch.jit.is_tracing if ours == "is_tracing" else compat.assume_true)
    assert all(torch.equal(a, b) for a, b in zip(norm_and_gradients(), expected, strict=True))


def test_without_the_level_of_forward_mode_the_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = norm_and_gradients()
    monkeypatch.setattr("rmsnorm.kernels.host.loader.norm", lambda *_: None)
    monkeypatch.delattr(forward_ad, "_current_level")
    assert all(torch.equal(a, b) for a, b in zip(norm_and_gradients(), expected, strict=True))


def test_private_names_of_torch_stand_in_compat_alone() -> None:
    """The proof of a norm names classes of torch's C library, which it compares and does not call."""
    from test_imports import FILES, module_of

    allowed = {"compat", "patching.calls", "patching.bytecode"}
    found = {module_of(file) for file in FILES if "torch._C" in file.read_text()}
    assert found <= allowed


def test_the_devices_whose_autocast_leaves_torchs_norm_as_it_is_are_found() -> None:
    assert hasattr(torch._C, "_dispatch_has_kernel_for_dispatch_key")
    assert "cpu" in compat.RMS_NORM_UNCHANGED_BY_AUTOCAST


def test_where_they_are_not_found_torchs_own_forward_runs_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x = TorchRMSNorm(8), torch.ones(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert "own forward" not in explain(x, norm)
        monkeypatch.delattr(torch._C, "_dispatch_has_kernel_for_dispatch_key")
        monkeypatch.setattr(compat, "RMS_NORM_UNCHANGED_BY_AUTOCAST", compat._rms_norm_unchanged_by_autocast())
        assert "own forward, because autocast may cast its input" in explain(x, norm)
