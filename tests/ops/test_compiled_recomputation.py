"""Norm outputs that a compiled backward pass computes again: how many, which bytes it saves, and that no bit changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import rmsnorm
from captured import FORWARD, Capture, assert_pass_keeps_bits, calls

pytestmark = pytest.mark.compiled

N, ROWS = 32, 10
FP32, BF16 = torch.float32, torch.bfloat16
MUST_RECOMPUTE = CheckpointPolicy.MUST_RECOMPUTE


@pytest.fixture(autouse=True)
def _one_thread(threads, fresh_dynamo) -> None:
    threads(1)


class Block(nn.Module):
    """Two norms with a residual stream; each norm has two readers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(N, eps=1e-5, dtype=dtype), nn.RMSNorm(N, eps=1e-5, dtype=dtype)
        self.a, self.b, self.c, self.d = (nn.Linear(N, N, bias=False, dtype=dtype) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + torch.tanh(self.a(y)) @ self.b(y).mT @ x
        z = self.norm2(x)
        return x + torch.sigmoid(self.c(z)) * self.d(z)


def captured(model: nn.Module, function: Callable[..., Any], *tensors: Tensor) -> Capture:
    """Compiles and differentiates the function of a patched model."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    rmsnorm.patch(model, recompute=True)
    capture = Capture()
    outputs = torch.compile(function, backend=capture.backend)(*tensors)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    if first.requires_grad:
        first.float().square().sum().backward()
    assert_pass_keeps_bits(capture)
    return capture


def again(capture: Capture) -> int:
    """How many calls of norms the pass has added, all with the mark that obliges the partitioner."""
    added = sum(len(calls(g.after, FORWARD)) - len(calls(g.before, FORWARD)) for g in capture.graphs)
    marked = [n for g in capture.graphs for n in calls(g.after, FORWARD) if n.meta.get("recompute") == MUST_RECOMPUTE]
    assert len(marked) == added
    return added


def bytes_saved(capture: Capture) -> int:
    ((before, after),) = capture.saved_bytes
    return before - after


def rows(dtype: torch.dtype = FP32, **options: bool) -> Tensor:
    return torch.randn(2, ROWS // 2, N, dtype=dtype, **options)


@pytest.mark.parametrize("fuse_residual", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_outputs_that_nothing_but_their_readers_needs_are_not_kept(dtype: torch.dtype, fuse_residual: bool) -> None:
    model = Block(dtype)
    rmsnorm.patch(model, recompute=True, fuse_residual=fuse_residual)
    capture = Capture()
    torch.compile(model, backend=capture.backend)(rows(dtype, requires_grad=True)).float().sum().backward()
    assert_pass_keeps_bits(capture)
    assert again(capture) == 2
    assert bytes_saved(capture) == 2 * ROWS * N * dtype.itemsize


def test_without_recompute_outputs_are_kept() -> None:
    model = Block(FP32)
    rmsnorm.patch(model)
    capture = Capture()
    torch.compile(model, backend=capture.backend)(rows(requires_grad=True)).sum().backward()
    assert (again(capture), bytes_saved(capture)) == (0, 0)


def test_an_output_that_the_graph_returns_is_kept() -> None:
    model = Block(FP32)

    def function(x: Tensor) -> Any:
        y = model.norm1(x)
        return model.a(y), y

    capture = captured(model, function, rows(requires_grad=True))
    assert (again(capture), bytes_saved(capture)) == (0, 0)


def test_an_output_that_the_backward_pass_does_not_read_is_not_recomputed() -> None:
    model = Block(FP32).requires_grad_(False)  # as with LoRA: no gradient of a weight, so y is not needed
    capture = captured(model, lambda x: model.a(model.norm1(x)), rows(requires_grad=True))
    assert (again(capture), bytes_saved(capture)) == (0, 0)


def test_without_gradients_nothing_is_recomputed() -> None:
    model = Block(FP32)
    rmsnorm.patch(model, recompute=True)
    capture = Capture()
    with torch.no_grad():
        torch.compile(model, backend=capture.backend)(rows())
    assert again(capture) == 0


def test_readers_of_views_read_the_recomputed_output() -> None:
    model = Block(FP32)

    def function(x: Tensor) -> Tensor:
        y = model.norm1(x).view(ROWS, N)
        return model.a(y)[: ROWS // 2] * y[: ROWS // 2] + model.b(y[ROWS // 2 :])

    capture = captured(model, function, rows(requires_grad=True))
    assert again(capture) == 1
    assert bytes_saved(capture) == ROWS * N * 4


def test_in_a_checkpointed_region_the_checkpoint_decides() -> None:
    model = Block(FP32)

    def function(x: Tensor) -> Tensor:
        return checkpoint(lambda x: model.a(model.norm1(x)), x, use_reentrant=False)

    capture = captured(model, function, rows(requires_grad=True))
    assert (again(capture), bytes_saved(capture)) == (0, 0)


def test_symbolic_sizes_are_kept_symbolic() -> None:
    model = Block(FP32)
    rmsnorm.patch(model, recompute=True)
    capture = Capture()
    compiled = torch.compile(model, backend=capture.backend, dynamic=True)
    for batch in (2, 3):
        compiled(torch.randn(batch, 5, N, requires_grad=True)).sum().backward()
    assert len(capture.graphs) == 1
    assert again(capture) == 2


def test_gradients_compiled_by_inductor_have_the_same_bits_with_and_without() -> None:
    model = Block(FP32)
    x = rows()

    def gradients(recompute: bool) -> list[Tensor]:
        rmsnorm.patch(model, recompute=recompute)
        leaf = x.clone().requires_grad_()
        y = torch.compile(model, fullgraph=True)(leaf)
        return list(torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()]))

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))
