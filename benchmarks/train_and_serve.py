"""Trains a small model with this package's norms, serves it through operators with vLLM's signatures, and compares.

    python benchmarks/train_and_serve.py [--device cuda] [--steps 50]

The inputs of every norm in the last training step are served again: in one batch, row by row, and compiled. Prints how
many outputs of norms differ from those of training, and exits with 1 if one does. For comparison it prints the same for
the Definition, which is trained in eager mode and served compiled.

Where vLLM 0.33 is installed, the norms are served by vLLM's own operators with our provider. Elsewhere `rms_norm` and
`fused_add_rms_norm` below serve them, which have the signatures of `vllm.ir.ops`. There, a weight of the dtype of x is
multiplied after the cast (early); any other weight is multiplied in fp32, before the cast (late).
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rmsnorm
from rmsnorm.errors import CommandError
from rmsnorm.tools import machine
from rmsnorm.tools.bench.peers import EPS, definition

WIDTH, LAYERS, WORDS, ROWS, CONTEXT = 256, 4, 64, 16, 12


# --- serving --------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    if variance_size is not None:
        raise NotImplementedError("a statistic of some columns only")
    same = weight is None or weight.dtype == x.dtype
    return rmsnorm.rms_norm(x, weight, epsilon, cast="early" if same else "late")


def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    if variance_size is not None:
        raise NotImplementedError("a statistic of some columns only")
    same = weight is None or weight.dtype == x.dtype
    return rmsnorm.add_rms_norm(x, x_residual, weight, epsilon, cast="early" if same else "late")


@contextlib.contextmanager
def through_vllm() -> Iterator[bool]:
    """Serve through vLLM's operators with our provider inside the context. Yields False if vLLM is not installed."""
    if find_spec("vllm") is None:
        yield False
        return
    from vllm.ir import ops

    from rmsnorm.integrations import vllm

    vllm.register()
    global rms_norm, fused_add_rms_norm
    before = rms_norm, fused_add_rms_norm
    first = ["rmsnorm", "native"]
    with ops.rms_norm.set_priority(first), ops.fused_add_rms_norm.set_priority(first):
        rms_norm, fused_add_rms_norm = ops.rms_norm, ops.fused_add_rms_norm
        try:
            yield True
        finally:
            rms_norm, fused_add_rms_norm = before


# --- training -------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """What one norm got and gave in a training step; the residual is None for the first norm."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    y: Tensor


@dataclass
class Recorded:
    calls: list[Call] = field(default_factory=list)


class Model(nn.Module):
    """Predicts the next word from the mean of those before; each layer adds to the residual stream, as in a decoder."""

    def __init__(self, add_norm: Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.up = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(LAYERS))
        self.down = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(LAYERS))
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(WIDTH)) for _ in range(LAYERS + 1))
        self.head = nn.Linear(WIDTH, WORDS)
        self.add_norm = add_norm

    def forward(self, words: Tensor, recorded: Recorded) -> Tensor:
        x = self.embed(words)
        x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        residual = None
        for i, weight in enumerate(self.weights):
            y, s = self.add_norm(x, residual, weight)
            recorded.calls.append(
                Call(*(None if t is None else t.detach().clone() for t in (x, residual, weight, y)))  # type: ignore[arg-type]
            )
            if i < LAYERS:
                x, residual = self.down[i](F.silu(self.up[i](y))), s
        return self.head(y)


def ours(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    return (rmsnorm.rms_norm(x, weight, EPS), x) if residual is None else rmsnorm.add_rms_norm(x, residual, weight, EPS)


def eager(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    s = x if residual is None else x + residual
    return definition(s, weight), s


def train(add_norm: Callable[..., tuple[Tensor, Tensor]], steps: int, device: torch.device) -> tuple[list[Call], float]:
    """The norms of the last step, and its loss."""
    torch.manual_seed(0)
    model = Model(add_norm).to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        recorded = Recorded()
        start = torch.randint(0, WORDS, (ROWS, 1), device=device)
        words = (start + 3 * torch.arange(CONTEXT + 1, device=device)) % WORDS  # a sequence that can be learned
        logits = model(words[:, :-1], recorded)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), words[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return recorded.calls, loss.item()


# --- comparison -----------------------------------------------------------------------------------------------


def served(call: Call) -> Tensor:
    if call.residual is None:
        return rms_norm(call.x, call.weight, EPS)
    return fused_add_rms_norm(call.x, call.residual, call.weight, EPS)[0]


def row_by_row(call: Call) -> Tensor:
    def of(t: Tensor | None, i: int) -> Tensor | None:
        return None if t is None else t.flatten(0, -2)[i : i + 1]

    rows = range(call.x[..., 0].numel())
    parts = [served(Call(of(call.x, i), of(call.residual, i), call.weight, call.y)) for i in rows]  # type: ignore[arg-type]
    return torch.cat(parts).view_as(call.y)


def compiled(norm: Callable[..., Tensor]) -> Callable[[Call], Tensor]:
    run = torch.compile(norm)
    return lambda call: run(call.x, call.residual, call.weight)


def differing(calls: list[Call], serve: Callable[[Call], Tensor]) -> int:
    """How many outputs of all norms have other bits when served."""
    with torch.no_grad():
        return sum(int((serve(call) != call.y).sum()) for call in calls)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--steps", type=int, default=50, help="training steps (default: %(default)s)")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    device = machine.find_device(options.device)
    calls, loss = train(ours, options.steps, device)
    outputs = sum(call.y.numel() for call in calls)
    print(f"{device.type}, bfloat16: {options.steps} steps, loss {loss:.3f}, {len(calls)} norms, {outputs} outputs")
    with through_vllm() as present:
        through = "vLLM's operators, " if present else ""
        ways = {f"{through}in one batch": served, f"{through}row by row": row_by_row}
        counts = {way: differing(calls, serve) for way, serve in ways.items()}
    counts["compiled"] = differing(calls, compiled(lambda x, residual, w: served(Call(x, residual, w, x))))
    for way, count in counts.items():
        print(f"  rmsnorm, served {way}: {count} differ")
    theirs, _ = train(eager, options.steps, device)
    count = differing(theirs, compiled(lambda x, residual, w: eager(x, residual, w)[0]))
    print(f"  Definition, trained in eager mode, served compiled: {count} differ")
    return int(any(counts.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CommandError as error:
        sys.exit(f"train_and_serve.py: {error}")
