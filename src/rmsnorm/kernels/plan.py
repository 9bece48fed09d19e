"""What a call of one kind is: decided once, from shapes, strides and dtypes alone, and then run any number of times.

    Forward, Backward  ->  cpu.plan, gpu.plan  ->  Plan  ->  run.py, in Python
       a kind of call                              |
                                                   `->  Native  ->  host.cpp, without Python

A planner is pure: it allocates and launches nothing. A runner decides nothing: it makes the tensors that a plan names
and starts its launches in their order.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from rmsnorm.kernels.rows import dense_strides
from rmsnorm.spec import Spec

MOST_PLANS = 4096  # kinds that are remembered, of one pass on one device
_ALIGNED = 16  # no load takes more bytes at once; torch's fresh memory is aligned to 64


# --- a kind of call ------------------------------------------------------------------------------------------


class TensorKind(NamedTuple):
    """All that a plan may depend on of a tensor. alignment: the largest power of two, up to 16, in its address."""

    dtype: torch.dtype
    shape: Sequence[int]
    strides: Sequence[int]
    alignment: int = _ALIGNED

    @classmethod
    def of(cls, t: Tensor) -> "TensorKind":
        address = t.data_ptr() | _ALIGNED
        return cls(t.dtype, t.shape, t.stride(), address & -address)

    @classmethod
    def dense(cls, shape: Sequence[int], dtype: torch.dtype) -> "TensorKind":
        """Contiguous, in fresh memory."""
        return cls(dtype, tuple(shape), dense_strides(shape))

    @property
    def is_dense(self) -> bool:
        """As `Tensor.is_contiguous`."""
        return 0 in self.shape or all(
            size == 1 or stride == dense
            for size, stride, dense in zip(self.shape, self.strides, dense_strides(self.shape), strict=True)
        )


class Forward(NamedTuple):
    """A kind of forward call: y, s and rstd from x, residual and w."""

    device: torch.device
    x: TensorKind
    residual: TensorKind | None
    w: TensorKind | None
    spec: Spec
    with_rstd: bool

    @classmethod
    def of(cls, x: Tensor, residual: Tensor | None, w: Tensor | None, spec: Spec, with_rstd: bool) -> "Forward":
        of = TensorKind.of
        return cls(
            x.device, of(x), None if residual is None else of(residual), None if w is None else of(w), spec, with_rstd
        )


class Backward(NamedTuple):
    """A kind of backward call: dx and dw from dy, ds, x, w and rstd, where x is what was normalized."""

    device: torch.device
    dy: TensorKind
    ds: TensorKind | None
    x: TensorKind
    w: TensorKind | None
    rstd: TensorKind
    spec: Spec
    need_dx: bool
    need_dw: bool

    @classmethod
    def of(
        cls, dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, spec: Spec, need_dx: bool,
        need_dw: bool,
    ) -> "Backward":  # fmt: skip
        of = TensorKind.of
        return cls(
            x.device, of(dy), None if ds is None else of(ds), of(x), None if w is None else of(w), of(rstd),
            spec, need_dx, need_dw,
        )  # fmt: skip


# --- what is done for it -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Converted:
    """A tensor that torch makes: the sum of others, or a copy of one, contiguous and in `dtype`.

    Where `name` is that of an input, it stands for the input from then on.
    """

    name: str
    of: tuple[str, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Fresh:
    """A contiguous tensor that the call allocates. value: what it is filled with, if a launch does not write it.

    huge_pages: whether to ask for few page faults, where the memory is fresh from the system.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    value: int | None = None
    huge_pages: bool = False

    @functools.cached_property
    def strides(self) -> tuple[int, ...]:
        return dense_strides(self.shape)


@dataclass(frozen=True)
class NativeTeam:
    """As `threads.Team`, for C++.

    parallel: GOMP_parallel. process: the one that may call it, and no child that is forked from it. pieces: of the
    work a thread.
    """

    M: int
    rows: int
    drain: int
    parallel: int
    process: int
    pieces: int


@dataclass(frozen=True)
class NativeLaunch:
    """A function that C++ can call. arguments: the names of tensors, whose addresses it takes, and numbers.

    team: how threads share the rows of machine code; then the first row and the one after the last follow.
    launcher, configuration, stream_at: cuLaunchKernelEx, its CUlaunchConfig, and where the stream is in that; nothing
    where the function is machine code of the CPU.
    """

    function: int
    arguments: tuple[str | int, ...]
    team: NativeTeam | None = None
    launcher: int = 0
    configuration: bytes = b""
    stream_at: int = 0


class KernelLaunch(Protocol):
    """A kernel and what it is called with: tensors by their names, and numbers."""

    def run(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Compile it, unless it was, and start it."""

    def native(self) -> NativeLaunch | str:
        """The same for C++, compiled; or why only Python can start it."""


@dataclass(frozen=True, eq=False)
class Plan:
    """How calls of one kind are made.

    inputs: the names of what is given, in its order. before and after: what torch converts. fresh: what is allocated.
    outputs: the names of what comes out, None for what was not asked for. A launch keeps alive what it points to.
    """

    device: torch.device
    inputs: tuple[str, ...]
    fresh: tuple[Fresh, ...]
    launches: tuple[KernelLaunch, ...]
    outputs: tuple[str | None, ...]
    before: tuple[Converted, ...] = ()
    after: tuple[Converted, ...] = ()

    @functools.cached_property
    def gpu(self) -> int | None:
        """The number of the GPU that it is for, if it is."""
        return self.device.index if self.device.type == "cuda" else None

    @functools.cached_property
    def native(self) -> "Native | str":
        """The same for C++; or why only Python can make such calls."""
        if self.before or self.after:
            made = [name for converted in (*self.before, *self.after) for name in converted.of]
            names = dict.fromkeys("weight" if name == "w" else name for name in made)
            return f"torch converts {', '.join(names)} at each call"
        if any(t.huge_pages for t in self.fresh):
            return "it asks for huge pages"
        launches = []
        for launch in self.launches:
            native = launch.native()
            if isinstance(native, str):
                return native
            launches.append(native)
        return Native(self.inputs, self.fresh, tuple(launches), self.outputs, self)


@dataclass(frozen=True)
class Native:
    """A plan that C++ can run: see `Plan`. keeps: what must live as long."""

    inputs: tuple[str, ...]
    fresh: tuple[Fresh, ...]
    launches: tuple[NativeLaunch, ...]
    outputs: tuple[str | None, ...]
    keeps: Any = field(repr=False)


@dataclass(frozen=True)
class ByReference:
    """There is no plan: calls of this kind are the reference's."""

    why: str


# --- for planners --------------------------------------------------------------------------------------------

Found = TypeVar("Found")


def summands(kind: Forward) -> tuple[str, TensorKind, TensorKind | None, list[Converted]]:
    """What a kernel reads: x by its name, and the residual that it adds; one of another dtype torch adds before."""
    x, residual = kind.x, kind.residual
    if residual is None or residual.dtype is x.dtype:
        return "x", x, residual, []
    total = TensorKind.dense(x.shape, torch.promote_types(x.dtype, residual.dtype))
    return "s", total, None, [Converted("s", ("x", "residual"), total.dtype)]


def laid_out(
    find: Callable[..., Found | None], wanted: Mapping[str, tuple[TensorKind, torch.dtype]]
) -> tuple[Found, dict[str, TensorKind], list[Converted]]:
    """What `find(shape, *strides)` makes of tensors that a kernel reads in these dtypes; what they are then, and what
    must be converted first: those of another dtype, and as few others as `find` can do with."""
    kinds = {
        name: kind if kind.dtype is dtype else TensorKind.dense(kind.shape, dtype)
        for name, (kind, dtype) in wanted.items()
    }
    found = _found(find, kinds)
    if found is None:
        kinds = {
            name: kind if find(kind.shape, kind.strides) is not None else TensorKind.dense(kind.shape, kind.dtype)
            for name, kind in kinds.items()
        }
        found = _found(find, kinds)
    if found is None:
        kinds = {
            name: kind if kind.is_dense else TensorKind.dense(kind.shape, kind.dtype) for name, kind in kinds.items()
        }
        found = _found(find, kinds)
    assert found is not None, "contiguous tensors of one shape are always found"
    converted = [Converted(name, (name,), kinds[name].dtype) for name in kinds if kinds[name] is not wanted[name][0]]
    return found, kinds, converted


def _found(find: Callable[..., Found | None], kinds: Mapping[str, TensorKind]) -> Found | None:
    shape = next(iter(kinds.values())).shape
    return find(tuple(shape), *(tuple(kind.strides) for kind in kinds.values()))
