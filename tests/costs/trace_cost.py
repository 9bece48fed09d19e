"""A trace of the running code: the operators that it dispatches, what autograd saves, and what it allocates.

It uses no formula of the counts. A dispatch mode sees every aten operator and the sizes of its tensors, also inside our
own operators, and a spy sees the pointers with which the compiled CPU kernels are called. Memory is what the allocator
reports, measured without the mode, because a mode changes what autograd does in place.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rmsnorm
from rmsnorm import memory
from rmsnorm.ops import operators

EPS = 1e-6
CPU = torch.device("cpu")
NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty"}
NO_FLOPS = {"_to_copy", "to", "clone", "copy_", "ones", "full"}
ONE_EACH = {"add", "sub", "mul", "div", "rsqrt", "sqrt", "reciprocal"}
NEUTRAL = {"mul": 1, "div": 1, "add": 0, "sub": 0}


@dataclass(frozen=True)
class Seen:
    """One operator or kernel that ran."""

    what: str
    flops: int
    read: int
    written: int


def stored(t: Tensor) -> int:
    """Bytes of the stored elements; an expanded dimension counts once."""
    count = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * t.element_size()


def flops(name: str, args: tuple[Any, ...], out: Tensor) -> int:
    if name in NO_FLOPS:
        return 0
    if name == "pow":
        return int(args[1] - 1) * out.numel()
    if name == "mean":
        return args[0].numel()
    if name == "sum":
        return args[0].numel() - out.numel()
    name = name.removesuffix("_")
    assert name in ONE_EACH, f"no rule says what {name} costs"
    number = args[1] if len(args) > 1 and not isinstance(args[1], Tensor) else None
    return 0 if number is not None and number == NEUTRAL[name] else out.numel()


class Watch(TorchDispatchMode):
    """Records the operators that run inside it, in order, without views and allocations."""

    def __init__(self, arithmetic: bool = True) -> None:
        super().__init__()
        self.arithmetic = arithmetic  # False where operators run whose arithmetic a trace does not see
        self.seen: list[Seen] = []
        self.known: dict[int, list[Any]] = {}  # address: [tensor, whether anything has been written there]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if func.namespace == "rmsnorm":
            for t in inputs:
                self.known.setdefault(t.data_ptr(), [t, True])
            run = {"rmsnorm::forward": operators._run_forward, "rmsnorm::backward": operators._run_backward}[
                func._schema.name
            ]
            with self:
                return run(*args, **kwargs)
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        outputs = [a for a in tree_leaves(out) if isinstance(a, Tensor)]
        if func.is_view and {t.data_ptr() for t in outputs} <= {t.data_ptr() for t in inputs}:
            return out  # `to` is called a view too, and copies where it must
        for t in outputs:
            self.known[t.data_ptr()] = [t, name not in NO_WORK]
        if name not in NO_WORK:
            count = flops(name, args, outputs[0]) if self.arithmetic else 0
            self.seen.append(Seen(name, count, sum(map(stored, inputs)), sum(map(stored, outputs))))
        return out

    def launch(self, name: str, addresses: tuple[int | None, ...]) -> None:
        """Record a compiled kernel: it writes the tensors that nothing has written before, and reads the others."""
        entries = [self.known[a] for a in dict.fromkeys(addresses) if a in self.known]
        read = sum(stored(t) for t, written in entries if written)
        self.seen.append(Seen(name, 0, read, sum(stored(t) for t, written in entries if not written)))
        for entry in entries:
            entry[1] = True

    @property
    def totals(self) -> tuple[int, int, int]:
        """Bytes read, bytes written, kernels."""
        return sum(s.read for s in self.seen), sum(s.written for s in self.seen), len(self.seen)


@contextlib.contextmanager
def spied(watch: Watch) -> Iterator[None]:
    """The CPU kernels report to `watch` what they are called with."""
    from rmsnorm.kernels.cpu.threads import MachineCode

    run = MachineCode.run

    def spied_run(launch: MachineCode, tensors: Any) -> None:
        present = [tensors[name] for name in launch.tensors if name is not None]
        watch.launch("rows" if len(launch.tensors) > 2 else "chunks", tuple(t.data_ptr() for t in present))
        run(launch, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MachineCode, "run", spied_run)
        yield


# --- the norms that are traced -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One norm with tensors to run it on; `forward` gives y, or (y, s)."""

    x: Tensor
    residual: Tensor | None
    w: Tensor | None
    bias: Tensor | None
    implementation: str
    cast: str
    offset: float

    @classmethod
    def of(
        cls, shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype | None, implementation: str,
        cast: str, offset: float, device: str = "cpu", by_head: bool = False,
    ) -> "Run":  # fmt: skip
        generator = torch.Generator().manual_seed(1)

        def draw(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype).requires_grad_()

        of_w = shape[-2:] if by_head else shape[-1:]
        return cls(
            draw(*shape, dtype=dtype),
            draw(*shape, dtype=dtype) if implementation == "ours+residual" else None,
            None if weight_dtype is None else draw(*of_w, dtype=weight_dtype),
            draw(*of_w, dtype=weight_dtype) if implementation == "LayerNorm" and weight_dtype is not None else None,
            implementation, cast, offset,
        )  # fmt: skip

    @property
    def inputs(self) -> list[Tensor]:
        return [t for t in (self.x, self.residual, self.w, self.bias) if t is not None]

    def forward(self) -> Any:
        if self.implementation == "LayerNorm":
            return F.layer_norm(self.x, self.x.shape[-1:], self.w, self.bias, EPS)
        if self.implementation == "F.rms_norm":
            return F.rms_norm(self.x, self.x.shape[-1:], self.w, EPS)
        if self.implementation == "eager":
            return published(self.x, self.w, self.cast, self.offset)
        options: Any = {"cast": self.cast, "offset": self.offset}
        if self.residual is not None:
            return rmsnorm.add_rms_norm(self.x, self.residual, self.w, EPS, **options)
        return rmsnorm.rms_norm(self.x, self.w, EPS, **options)

    def inference(self) -> Any:
        with torch.no_grad():
            return self.forward()

    def backward(self, outputs: Any) -> Callable[[], Any]:
        """A call of the backward pass. Its random cotangents are made now, not in the call."""
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = [torch.randn_like(t) for t in tensors]
        return lambda: torch.autograd.grad(tensors, self.inputs, cotangents)


def published(x: Tensor, weight: Tensor | None, cast: str, offset: float) -> Tensor:
    """The published classes' lines: DeepSeek's for "early", GPT-OSS's for "late", Gemma's with an offset."""
    if offset:
        assert weight is not None
        output = _gemma(x.float())
        output = output * (1.0 + weight.float())
        return output.type_as(x)
    input_dtype = x.dtype
    hidden_states = x.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + EPS)
    if weight is None:
        return hidden_states.to(input_dtype)
    if cast == "early":
        return weight * hidden_states.to(input_dtype)
    return (weight * hidden_states).to(input_dtype)


def _gemma(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


class Reader(torch.autograd.Function):
    """An operator that saves y for its backward pass and allocates nothing. Its result shares the memory of `end`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, dy: Tensor, end: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        ctx.dy = dy
        return end.view_as(end)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        ctx.saved_tensors  # noqa: B018  # reads y, which recomputes it
        return ctx.dy, None, None


@dataclass(frozen=True)
class ReadRun(Run):
    """A norm whose y is read by a `Reader` and held by nothing else, with or without `recompute`."""

    recompute: bool
    dy: Tensor
    end: Tensor

    @classmethod
    def reading(cls, run: Run, recompute: bool) -> "ReadRun":
        outputs = run.inference()
        dy = torch.randn_like(outputs[0] if isinstance(outputs, tuple) else outputs)
        return cls(**vars(run), recompute=recompute, dy=dy, end=torch.zeros((), device=dy.device))

    def forward(self) -> Any:
        with rmsnorm.recompute() if self.recompute else contextlib.nullcontext():
            outputs = super().forward()
            y, *s = outputs if isinstance(outputs, tuple) else (outputs,)
            return (Reader.apply(y, self.dy, self.end), *s)


def traced(run: Run, phase: str) -> dict[str, int]:
    """The counts of one phase on the CPU, by their names; flops are 0 where operators do not show theirs."""
    hidden = run.implementation in ("ours", "ours+residual", "LayerNorm")
    outputs = run.forward()  # also compiles what has to be compiled
    run.backward(outputs)()
    call = run.inference if phase == "inference" else run.forward
    if phase == "backward":
        call = run.backward(run.forward())
    watch = Watch(arithmetic=not hidden)
    with spied(watch), watch:
        outputs = call()
    read, written, kernels = watch.totals
    del outputs, call, watch.known
    saved = 0 if phase == "inference" else saved_bytes(run)
    found = memory.allocated(run.inference if phase == "inference" else run.forward, CPU)
    peak = found.peak
    if phase == "backward":
        assert found.kept is not None
        after = memory.allocated(run.backward(found.result), CPU)
        assert after.peak is not None
        peak = found.kept + after.peak
    assert peak is not None
    total = sum(s.flops for s in watch.seen)
    return {"flops": total, "read": read, "written": written, "kernels": kernels, "saved": saved, "peak": peak}


def saved_bytes(run: Run) -> int:
    """What the forward pass saves for the backward pass, without the parameters."""
    with memory.saved_for_backward([t for t in (run.w, run.bias) if t is not None]) as count:
        outputs = run.forward()
        saved = count()
    del outputs
    return saved
