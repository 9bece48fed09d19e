"""The cases of `rmsnorm bench`: what a call does (its mode), shapes and dtypes."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import rmsnorm
from rmsnorm.costs.counts import Phase
from rmsnorm.spec import Gate, Spec


@dataclass(frozen=True)
class Mode:
    """What one timed call does.

    Attributes:
        slug: Its name in JSON and on the command line.
        title: Its name in tables.
        tensors: How many tensors of M × N must be read or written.
        phases: The phases of `rmsnorm.cost` that make up the call.
        backward: Whether the call needs gradients.
        adds: Whether a residual is added before the norm.
        gated: What a gated norm computes; None for a norm without a gate.
    """

    slug: str
    title: str
    tensors: int
    phases: tuple[Phase, ...]
    backward: bool = False
    adds: bool = False
    gated: Spec | None = None


FORWARD = Mode("forward", "forward", 2, ("inference",))
BACKWARD = Mode("backward", "backward", 3, ("backward",), backward=True)
TRAINING = Mode("training", "forward+backward", 5, ("forward", "backward"), backward=True)
ADD_FORWARD = Mode("add-forward", "add + norm, forward", 4, ("inference",), adds=True)
ADD_BACKWARD = Mode("add-backward", "add + norm, backward", 4, ("backward",), backward=True, adds=True)
# The rows of x are columns of wider rows, as those that DeepSeek's kv_a_layernorm gets: 512 of 576 columns.
STRIDED_FORWARD = Mode("strided-forward", "forward, of rows 64 columns apart", 2, ("inference",))
_GATED, _GATE_FIRST = Spec(gate=Gate()), Spec(cast="late", gate=Gate(first=True), groups=8)  # Qwen3-Next, Mamba 2
GATED_FORWARD = Mode("gated-forward", "gated norm, forward", 3, ("inference",), gated=_GATED)
GATED_BACKWARD = Mode("gated-backward", "gated norm, backward", 5, ("backward",), backward=True, gated=_GATED)
GATE_FIRST_FORWARD = Mode("gate-first-forward", "gate first, 8 groups, forward", 3, ("inference",), gated=_GATE_FIRST)
GATE_FIRST_BACKWARD = Mode(
    "gate-first-backward", "gate first, 8 groups, backward", 5, ("backward",), backward=True, gated=_GATE_FIRST
)
GAP = 64  # columns between the rows
# What is measured on each device.
CPU_MODES = (FORWARD, TRAINING)
GATED_MODES = (GATED_FORWARD, GATED_BACKWARD, GATE_FIRST_FORWARD, GATE_FIRST_BACKWARD)
CUDA_MODES = (FORWARD, STRIDED_FORWARD, BACKWARD, ADD_FORWARD, ADD_BACKWARD, *GATED_MODES)
MODES = {mode.slug: mode for mode in dict.fromkeys((*CPU_MODES, *CUDA_MODES))}


@dataclass(frozen=True)
class BenchCase:
    """M rows of width N in a mode; x and the weight have the same dtype."""

    M: int
    N: int
    dtype: torch.dtype
    mode: Mode

    @property
    def dtype_name(self) -> str:
        """The dtype as in JSON and on the command line: "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.dtype_name} {self.M} x {self.N} {self.mode.title}"

    def to_json(self) -> dict[str, Any]:
        """Return what names the case in JSON."""
        return {"M": self.M, "N": self.N, "dtype": self.dtype_name, "mode": self.mode.slug}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "BenchCase":
        """Return the case that `to_json` describes. Raises KeyError for the JSON of anything else."""
        return cls(stored["M"], stored["N"], getattr(torch, stored["dtype"]), MODES[stored["mode"]])


Shapes = tuple[tuple[int, int], ...]
_CPU_SHAPES: Shapes = ((1, 1280), (64, 1280), (512, 1280), (2048, 1280), (4096, 1280), (8192, 1280), (2048, 4096))
_CPU_SHAPES_QUICK: Shapes = ((1, 1280), (512, 1280), (8192, 1280))
_CUDA_SHAPES: Shapes = (
    (524288, 128), (65536, 512), (8192, 1280), (65536, 1280), (32768, 1536), (16384, 2048), (16384, 2880),
    (16384, 4096), (8192, 5120), (16384, 7168), (8192, 12288), (8192, 16384), (4096, 32768), (2048, 65536),
    (1024, 131072), (512, 262144),
)  # fmt: skip
# Enough shapes for modes that differ from others only in the residual, and for fp16, which differs from bf16 only in
# its format.
_CUDA_SHAPES_QUICK: Shapes = ((8192, 1280), (65536, 1280), (16384, 4096), (16384, 7168))
_CUDA_SLICES: Shapes = ((65536, 512),)
_CUDA_HEADS: Shapes = ((1 << 20, 128), (65536, 128), (16384, 4096))
_CUDA_GROUPS: Shapes = ((16384, 4096), (8192, 8192))


def cases(device_type: str, quick: bool) -> Iterator[BenchCase]:
    """Yield the cases of a run in the order in which they are measured.

    Args:
        device_type: "cpu" or "cuda".
        quick: Whether to yield fewer dtypes and shapes.
    """
    dtypes = (torch.bfloat16, torch.float32) if quick else (torch.bfloat16, torch.float32, torch.float16)
    if device_type != "cuda":
        shapes = _CPU_SHAPES_QUICK if quick else _CPU_SHAPES
        for dtype, mode, (M, N) in itertools.product(dtypes, CPU_MODES, shapes):
            yield BenchCase(M, N, dtype, mode)
        return
    for dtype, mode in itertools.product(dtypes, CUDA_MODES):
        few = quick or mode.adds or dtype == torch.float16
        if mode.gated is not None:
            shapes = _CUDA_HEADS if mode.gated.groups == 1 else _CUDA_GROUPS
        else:
            shapes = _CUDA_SLICES if mode == STRIDED_FORWARD else _CUDA_SHAPES_QUICK if few else _CUDA_SHAPES
        for M, N in shapes:
            yield BenchCase(M, N, dtype, mode)


def moved_bytes(case: BenchCase) -> int:
    """Return the bytes that every implementation of the case must read and write; see `rmsnorm.cost`."""
    if case.mode.gated is not None:
        weights, statistics = (2, case.M * case.mode.gated.groups) if case.mode.backward else (1, 0)
        return (case.mode.tensors * case.M + weights) * case.N * case.dtype.itemsize + 4 * statistics
    implementation: Any = "ours+residual" if case.mode.adds else "ours"
    return sum(
        rmsnorm.cost((case.M, case.N), case.dtype, implementation=implementation, phase=phase).least
        for phase in case.mode.phases
    )
