"""benchmarks/load.py: that a short run is right, and that it finds a wrong bit, a leak, and work that was not done."""

import gc
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import rmsnorm
from rmsnorm import compat
from rmsnorm.tools.bench.peers import EPS, definition
from scripts import benchmark_script

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def load() -> ModuleType:
    return benchmark_script("load")


def ignore(_: str) -> None:
    pass


def test_a_short_run_has_right_bits_and_does_all_that_it_is_for(load: ModuleType) -> None:
    so_far: list[Any] = []
    outcome = load.loaded(CPU, 0.0, ignore, kinds=8, store=so_far.append)
    assert [(one.rounds, one.faults) for one in so_far] == [(1, [])]  # what is left if the run is ended
    assert outcome.faults == []
    assert set(outcome.runs) == set(load.WORKLOADS) - {"captured graphs"}
    assert outcome.counts["forked children"] == outcome.counts["spawned processes"] == 1
    assert outcome.counts["allocations that failed"] >= 1
    assert {r.name for r in load.RESOURCES if "GPU" not in r.name} | {"second"} == set(outcome.samples[0])
    assert outcome.verdicts == []
    facts = load.result(outcome, {"device": "cpu"})
    assert (facts["passed"], facts["fault_count"], facts["rounds"]) == (True, 0, 1)


def test_a_wrong_bit_is_a_fault(load: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = rmsnorm.rms_norm

    def wrong(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        y = norm(x, *arguments, **named)
        return torch.where(torch.arange(y.numel()).view(y.shape) == y.numel() - 1, y * (1 + 2**-6), y)

    monkeypatch.setattr(
        load, "WORKLOADS", {name: load.WORKLOADS[name] for name in ("plain", "threads", "checkpointed")}
    )
    monkeypatch.setattr(load, "FUNCTIONS", ("rms_norm",))
    monkeypatch.setattr(load, "MUST_HAPPEN", {"cpu": ("forked children",)})
    monkeypatch.setattr(rmsnorm, "rms_norm", wrong)
    outcome = load.loaded(CPU, 0.0, ignore, kinds=8)
    assert not outcome.passed
    for name in load.WORKLOADS:
        assert any(fault.startswith(f"{name}: WrongBits: ") and "rms_norm of (" in fault for fault in outcome.faults)
    assert "forked children: none in this run" in outcome.faults


@pytest.mark.parametrize(("growth", "flat"), [(0.0, True), (0.2, True), (2.0, False)])
def test_a_resource_that_grows_is_found(load: ModuleType, growth: float, flat: bool) -> None:
    noise = random.Random(0)
    samples = [
        {"resident memory": 900 + growth * k + noise.uniform(-5, 5), "threads": 4.0, "open files": 6.0 + k // 60}
        for k in range(90)
    ]
    verdicts = {v.resource: v for v in load.judged(samples)}
    assert verdicts["resident memory"].flat is flat
    assert verdicts["threads"].flat
    assert not verdicts["open files"].flat
    assert load.judged(samples[:29]) == []


# --- steps that keep memory ----------------------------------------------------------------------------------


def alive(norm: Callable[..., Tensor], step: Callable[[Tensor, Tensor], None]) -> int:
    """How many of the storages of x, w, y and their gradients are alive after a step."""
    x, w = torch.randn(4, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    y = norm(x, w)
    references = [compat.StorageWeakRef(t.untyped_storage()) for t in (x, w, y)]
    step(y, x)
    references += [compat.StorageWeakRef(t.grad.untyped_storage()) for t in (x, w) if t.grad is not None]
    x.grad = x.grad if step is backward else None
    w.grad = w.grad if step is backward else None
    del x, w, y
    gc.collect()
    return sum(not reference.expired() for reference in references)


def backward(y: Tensor, _: Tensor) -> None:
    (y * y).sum().backward(create_graph=True)


def backward_and_reset(y: Tensor, x: Tensor) -> None:
    backward(y, x)


def grad(y: Tensor, x: Tensor) -> None:
    torch.autograd.grad((y * y).sum(), [x], create_graph=True)


def forward_alone(y: Tensor, x: Tensor) -> None:
    pass


def summed(x: Tensor, w: Tensor) -> Tensor:
    return rmsnorm.add_rms_norm(x, x, w, EPS)[0]


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("norm", [rmsnorm.rms_norm, summed])
def test_no_step_keeps_memory_that_it_does_not_keep_with_the_definition(norm: Callable[..., Tensor]) -> None:
    for step in (forward_alone, grad, backward_and_reset):
        assert alive(norm, step) == alive(definition, step) == 0
    assert alive(norm, backward) <= alive(definition, backward)
    assert alive(definition, backward) > 0  # torch's cycle of a leaf and its gradient


def test_the_result_of_a_run_is_written(load: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "WORKLOADS", {"plain": load.plain})
    monkeypatch.setattr(load, "MUST_HAPPEN", {"cpu": ()})
    assert load.main(["--device", "cpu", "--seconds", "0", "--kinds", "8", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "load-cpu.json").exists()
