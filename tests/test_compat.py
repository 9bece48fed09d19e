"""The private names of torch and Numba: present where the package is tested, and elsewhere replaced.

What replaces them is slower and right.
"""

import importlib
import operator
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from rmsnorm import TorchRMSNorm, compat, explain, rms_norm
from rmsnorm.tools.bench.peers import definition

pytestmark = pytest.mark.short

# These were seen in torch 2.11 and 2.13; those of the second table in torch 2.13 and Numba 0.68.
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


# Without one of the names of Numba, kernels are compiled in each process: see kernels/test_processes.py.
IN_MODULES = (
    ("torch._C", "_storage_id"),
    ("torch._C", "_current_graph_task_id"),
    ("torch._C", "_autograd._top_saved_tensors_default_hooks"),
    ("torch.multiprocessing.reductions", "StorageWeakRef.expired"),
    ("torch._subclasses.fake_tensor", "FakeTensorMode"),
    ("torch._functorch.config", "donated_buffer"),
    ("torch._C._autograd", "_ProfilerResult.events"),
    ("torch._C._autograd", "_KinetoEvent.nbytes"),
    ("numba.core.ccallback", "CFunc._compile_uncached"),
    ("numba.core.sigutils", "normalize_signature"),
    ("numba.core.compiler", "CompileResult._reduce"),
    ("numba.core.compiler", "CompileResult._rebuild"),
    ("numba.core.serialize", "dumps"),
    ("numba.core.registry", "cpu_target.target_context"),
)


@pytest.mark.parametrize(("module", "name"), IN_MODULES, ids=[name for _, name in IN_MODULES])
def test_the_private_name_is_in_its_module(module: str, name: str) -> None:
    assert operator.attrgetter(name)(importlib.import_module(module)) is not None


@pytest.mark.parametrize("missing", [False, True])
def test_tensors_without_data_compute_shapes_only(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(1 << 30, 1 << 30, device="meta")
    with monkeypatch.context() as patch:
        if missing:
            patch.delattr("torch._subclasses.fake_tensor.FakeTensorMode")
        without_data = compat.tensors_without_data()
    with without_data:
        y = layer(torch.zeros(3, 1 << 30, device="meta"))
    assert y.shape == (3, 1 << 30)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_kept_graph_runs_its_backward_pass_again() -> None:
    from torch._functorch import config

    def twice() -> None:
        compiled = torch.compile(definition, backend="aot_eager")
        leaves = torch.randn(2, 4, requires_grad=True), torch.randn(4, requires_grad=True)
        torch.autograd.grad(compiled(*leaves).sum(), leaves)
        y = compiled(*leaves).sum()
        for _ in range(2):
            torch.autograd.grad(y, leaves, retain_graph=True)

    with config.patch(donated_buffer=True):  # which restores it afterwards
        with pytest.raises(RuntimeError, match="donated"):
            twice()
        torch.compiler.reset()
        compat.keep_compiled_graphs()
        twice()


def test_without_the_setting_for_kept_graphs_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._functorch.config", None)
    compat.keep_compiled_graphs()


def test_without_numbas_target_the_processor_is_what_llvmlite_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    triple, cpu, _ = compat.numba_processor()
    monkeypatch.delattr("numba.core.registry.cpu_target")
    assert compat.numba_processor()[:2] == (triple, cpu)
    monkeypatch.setattr("numba.config.CPU_NAME", "generic")
    monkeypatch.setattr("numba.config.CPU_FEATURES", "+avx")
    assert compat.numba_processor() == (triple, "generic", "+avx")


# The proof of a norm compares classes of torch's C library, which it does not call. cgutils is documented.
ELSEWHERE = {
    "torch._C": {"patching.calls", "patching.bytecode"},
    "torch._functorch": set(),
    "from torch._subclasses": set(),
    "torch._dynamo": set(),
    "numba.core": {"kernels.cpu.intrinsics"},
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_only_compat_uses_private_names(name: str) -> None:
    from test_imports import FILES, module_of

    found = {module_of(file) for file in FILES if name in file.read_text()}
    assert found - {"compat"} == ELSEWHERE[name]


def test_the_devices_whose_autocast_does_not_change_torchs_norm_are_found() -> None:
    assert hasattr(torch._C, "_dispatch_has_kernel_for_dispatch_key")
    assert "cpu" in compat.RMS_NORM_UNCHANGED_BY_AUTOCAST


def test_without_those_devices_torchs_own_forward_runs_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x = TorchRMSNorm(8), torch.ones(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert "own forward" not in explain(x, norm)
        monkeypatch.delattr(torch._C, "_dispatch_has_kernel_for_dispatch_key")
        monkeypatch.setattr(compat, "RMS_NORM_UNCHANGED_BY_AUTOCAST", compat._rms_norm_unchanged_by_autocast())
        assert "own forward, because autocast may cast its input" in explain(x, norm)


def test_the_backward_functions_of_torch_run_without_their_check_for_modes() -> None:
    class Seen(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen: list[Any] = []
    x = torch.ones(3, requires_grad=True)
    with Seen():
        (dx,) = compat.without_override_check(torch.autograd.grad)((x * 2).sum(), x)
        compat.without_override_check(torch.autograd.backward)((x * 3).sum(), inputs=[x])
    assert dx.tolist() == [2, 2, 2]
    assert x.grad is not None
    assert x.grad.tolist() == [3, 3, 3]
    assert not {torch.autograd.grad, torch.autograd.backward} & set(seen)
    assert compat.without_override_check(torch.add) is torch.add  # the fallback
