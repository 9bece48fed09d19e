"""Measuring what autograd saves and what a call allocates."""

import gc
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import Draw
from rmsnorm import RMSNorm, compat, memory

CPU = torch.device("cpu")


def test_saved_bytes_count_each_storage_once_without_the_weights(randn: Draw) -> None:
    x = randn(6, 8).requires_grad_()
    w = randn(8).requires_grad_()
    with memory.saved_for_backward([w]) as saved:
        y = x * w  # saves x and w
        z = x[:3] * w  # the storage of x again
        assert saved() == x.numel() * 4
        u = y.sigmoid()  # its output
        assert saved() == 2 * x.numel() * 4
    grads = torch.autograd.grad(u.sum() + z.sum(), (x, w))
    s = (x * w).sigmoid()
    wanted = torch.autograd.grad(s.sum() + (x[:3] * w).sum(), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


class OneNorm(nn.Module):
    """A norm, and what becomes of its output."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.norm, self.linear, self.read = RMSNorm(8), nn.Linear(8, 8), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.norm(x), self.linear)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("read", "saved"),
    [
        (lambda y, linear: linear(y), True),
        (lambda y, linear: linear(y[1:]) + linear(y)[1:], True),
        (lambda y, linear: linear(y.double().float()), False),
        (lambda y, linear: y + 1, False),
        (lambda y, linear: y, False),
    ],
    ids=["a matrix product", "a view and a matrix product", "a cast copy", "an addition", "returned"],
)
@pytest.mark.parametrize("without_data", [False, True])
def test_an_output_counts_as_saved_if_an_operator_saves_it(read: Any, saved: bool, without_data: bool) -> None:
    model = OneNorm(read)
    with memory.saved_outputs([model.norm]) as outputs:
        if without_data:
            with compat.tensors_without_data():
                model(torch.randn(4, 8))
        else:
            for _ in range(3):  # memory of freed outputs is used again
                model(torch.randn(4, 8))
    assert [(o.module, o.nbytes, o.saved) for o in outputs] == [(model.norm, 128, saved)] * (1 if without_data else 3)
    assert not model.norm._forward_hooks


def test_no_backward_pass_can_run_after_outputs_were_watched() -> None:
    model = OneNorm(lambda y, linear: linear(y))
    with memory.saved_outputs([model.norm]):
        y = model(torch.randn(4, 8))
    with pytest.raises(RuntimeError, match=r"within memory\.saved_outputs"):
        y.sum().backward()


def test_allocated_counts_what_stays_and_the_most_at_once() -> None:
    x = torch.randn(10, 10)

    def call() -> Tensor:
        y = (x * 2).exp()  # two arrays at once
        del y
        return x + 1

    found = memory.allocated(call, CPU)
    assert (found.kept, found.peak) == (400, 800)
    assert torch.equal(found.result, x + 1)
    held = [torch.ones(25)]
    assert memory.allocated(held.clear, CPU).kept == 0  # it was not allocated within a measured call
    held.append(memory.allocated(lambda: torch.ones(25), CPU).result)
    freed = memory.allocated(held.clear, CPU)
    assert (freed.kept, freed.peak) == (-100, 0)


def test_allocated_collects_no_garbage_of_earlier_calls() -> None:
    gc.collect()
    cycle: list[Any] = [torch.ones(1000)]
    cycle.append(cycle)
    del cycle
    found = memory.allocated(lambda: [[] for _ in range(100_000)], CPU)
    assert (found.kept, found.peak) == (0, 0)
    assert gc.isenabled()


def test_measuring_prints_nothing() -> None:
    """The profiler writes to the file descriptor of standard error when it is started, in a new process at least."""
    code = "import torch; from rmsnorm import memory; memory.allocated(lambda: torch.ones(4), torch.device('cpu'))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")
    assert "KINETO_LOG_LEVEL" not in os.environ


def test_without_the_profiler_s_events_or_on_another_device_the_bytes_are_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = memory.allocated(lambda: 1, torch.device("meta"))
    assert (found.result, found.kept, found.peak) == (1, None, None)
    assert compat.cpu_allocations(object()) is None
    monkeypatch.setattr(compat, "cpu_allocations", lambda profile: None)
    found = memory.allocated(lambda: 1, CPU)
    assert (found.result, found.kept, found.peak) == (1, None, None)
