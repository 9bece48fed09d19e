"""Plans: what to allocate and launch for one kind of call.

A plan depends on shapes, strides, alignments, dtypes and options only. It is made once and run for every such call.

    Forward, Backward  ->  cpu/planner.py, gpu/planner.py  ->  Plan  ->  run.py, in Python
       a kind of call                                           |
                                                                `->  Native  ->  host.cpp, without Python

Planners only decide: they allocate and launch nothing. Runners only execute: they allocate the tensors that a plan
lists and start its launches in order.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from rmsnorm.kernels.rows import dense_strides
from rmsnorm.spec import Spec, sum_dtype

MOST_PLANS = 4096  # size of each plan cache: one for each pass on each device
_ALIGNED = 16  # bytes of the widest load; torch aligns new tensors to 64


# --- kinds of calls ------------------------------------------------------------------------------------------


class TensorKind(NamedTuple):
    """The properties of a tensor that a plan may depend on.

    alignment: the largest power of two, up to 16, that divides its address in bytes.
    """

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
        """The kind of a newly allocated contiguous tensor."""
        return cls(dtype, tuple(shape), dense_strides(shape))

    @property
    def is_dense(self) -> bool:
        """As `Tensor.is_contiguous`."""
        return 0 in self.shape or all(
            size == 1 or stride == dense
            for size, stride, dense in zip(self.shape, self.strides, dense_strides(self.shape), strict=True)
        )


class Forward(NamedTuple):
    """A kind of forward call, which computes y, s and rstd from x, residual and w."""

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
    """A kind of backward call, which computes dx and dw from dy, ds, x, w and rstd.

    x is what the forward pass normalized: its x, or s if it added a residual. dy2, dy3: further gradients of y, of the
    dtype of dy, which are added to it; each sum is rounded. round_first: whether dx is rounded before ds is added, as
    if a separate addition followed the backward pass, and not only after.
    """

    device: torch.device
    dy: TensorKind
    ds: TensorKind | None
    x: TensorKind
    w: TensorKind | None
    rstd: TensorKind
    spec: Spec
    need_dx: bool
    need_dw: bool
    dy2: TensorKind | None = None
    dy3: TensorKind | None = None
    round_first: bool = False

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

    @classmethod
    def of_sum(cls, dy: Sequence[Tensor], *arguments: Any) -> "Backward":
        """A call of `backward_of_sum`, with several gradients of y; `arguments` are the other arguments of `of`."""
        dy2, dy3 = (TensorKind.of(dy[i]) if i < len(dy) else None for i in (1, 2))
        return cls.of(dy[0], *arguments)._replace(dy2=dy2, dy3=dy3, round_first=True)

    @property
    def dys(self) -> dict[str, TensorKind]:
        """The gradients of y to add, by name."""
        named = {"dy": self.dy, "dy2": self.dy2, "dy3": self.dy3}
        return {name: kind for name, kind in named.items() if kind is not None}

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the tensors that a call takes, in order."""
        return ("dy", "ds", "x", "w", "rstd", *list(self.dys)[1:])

    @property
    def rounds_dx_first(self) -> bool:
        """Whether dx is rounded to a dtype narrower than fp32 before ds is added."""
        return self.round_first and self.need_dx and self.ds is not None and self.x.dtype is not torch.float32


class GatedForward(NamedTuple):
    """A kind of gated forward call, which computes y and rstd from x, gate and w.

    x and gate have the shape (..., groups, N / groups): see `gated_reference.grouped`. w is (N,).
    """

    device: torch.device
    x: TensorKind
    gate: TensorKind
    w: TensorKind | None
    spec: Spec
    with_rstd: bool

    @classmethod
    def of(cls, x: Tensor, gate: Tensor, w: Tensor | None, spec: Spec, with_rstd: bool) -> "GatedForward":
        of = TensorKind.of
        return cls(x.device, of(x), of(gate), None if w is None else of(w), spec, with_rstd)


class GatedBackward(NamedTuple):
    """A kind of gated backward call, which computes dx, dgate and dw from dy, x, gate, w and rstd.

    dy, x and gate have the shape (..., groups, N / groups), rstd (..., groups), and w (N,).
    """

    device: torch.device
    dy: TensorKind
    x: TensorKind
    gate: TensorKind
    w: TensorKind | None
    rstd: TensorKind
    spec: Spec
    need_dx: bool
    need_dgate: bool
    need_dw: bool

    @classmethod
    def of(
        cls, dy: Tensor, x: Tensor, gate: Tensor, w: Tensor | None, rstd: Tensor, spec: Spec, need_dx: bool,
        need_dgate: bool, need_dw: bool,
    ) -> "GatedBackward":  # fmt: skip
        of = TensorKind.of
        return cls(
            x.device, of(dy), of(x), of(gate), None if w is None else of(w), of(rstd),
            spec, need_dx, need_dgate, need_dw,
        )  # fmt: skip


# Calls of parts: each rank holds some columns of every row. See `reference.begin_forward`.


class BeginForward(NamedTuple):
    """A kind of call that computes s and the sums S of one part from x and residual."""

    device: torch.device
    x: TensorKind
    residual: TensorKind | None

    @classmethod
    def of(cls, x: Tensor, residual: Tensor | None) -> "BeginForward":
        return cls(x.device, TensorKind.of(x), None if residual is None else TensorKind.of(residual))


class FinishForward(NamedTuple):
    """A kind of call that computes y and rstd of one part from x, w and the sums S over whole rows of N columns."""

    device: torch.device
    x: TensorKind
    w: TensorKind | None
    S: TensorKind
    N: int
    spec: Spec
    with_rstd: bool

    @classmethod
    def of(
        cls, x: Tensor, w: Tensor | None, S: Tensor, N: int, spec: Spec, with_rstd: bool
    ) -> "FinishForward":  # fmt: skip
        of = TensorKind.of
        return cls(x.device, of(x), None if w is None else of(w), of(S), N, spec, with_rstd)


class BeginBackward(NamedTuple):
    """A kind of call that computes the sums S of one part from dy, x, w and rstd."""

    device: torch.device
    dy: TensorKind
    x: TensorKind
    w: TensorKind | None
    rstd: TensorKind
    spec: Spec

    @classmethod
    def of(cls, dy: Tensor, x: Tensor, w: Tensor | None, rstd: Tensor, spec: Spec) -> "BeginBackward":
        of = TensorKind.of
        return cls(x.device, of(dy), of(x), None if w is None else of(w), of(rstd), spec)


class FinishBackward(NamedTuple):
    """A kind of call that computes dx and dw of one part from dy, ds, x, w, rstd and the sums S over whole rows."""

    device: torch.device
    dy: TensorKind
    ds: TensorKind | None
    x: TensorKind
    w: TensorKind | None
    rstd: TensorKind
    S: TensorKind
    N: int
    spec: Spec
    need_dw: bool

    @classmethod
    def of(
        cls, dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, S: Tensor, N: int, spec: Spec,
        need_dw: bool,
    ) -> "FinishBackward":  # fmt: skip
        of = TensorKind.of
        return cls(
            x.device, of(dy), None if ds is None else of(ds), of(x), None if w is None else of(w), of(rstd), of(S), N,
            spec, need_dw,
        )  # fmt: skip


# --- plans ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Converted:
    """A contiguous tensor in `dtype` that torch computes: the sum of the tensors `of`, or a copy of one.

    If `name` is the name of an input, the new tensor replaces that input.
    """

    name: str
    of: tuple[str, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Fresh:
    """A contiguous tensor that each call allocates.

    value: what to fill it with; None if a launch writes it. huge_pages: whether to advise the system to back it with
    huge pages, which causes fewer page faults.
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
    """`threads.Team` for C++.

    parallel: the address of GOMP_parallel. process: the pid of the process that may call it; its forked children may
    not. pieces: how many pieces of work to make for each thread.
    """

    M: int
    rows: int
    drain: int
    parallel: int
    process: int
    pieces: int


@dataclass(frozen=True)
class NativeLaunch:
    """A launch that C++ can make.

    arguments: numbers, and names of tensors, whose addresses are passed. team: how threads share the rows of a CPU
    function; it then takes two more arguments, the first row and the end of the range. launcher, configuration,
    stream_at: for a GPU kernel the address of cuLaunchKernelEx, its CUlaunchConfig, and the offset of the stream in it.
    """

    function: int
    arguments: tuple[str | int, ...]
    team: NativeTeam | None = None
    launcher: int = 0
    configuration: bytes = b""
    stream_at: int = 0


class KernelLaunch(Protocol):
    """A kernel and its arguments: names of tensors, and numbers."""

    def run(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Launches the kernel, compiling it first if necessary."""

    def native(self) -> NativeLaunch | str:
        """Compiles the kernel and returns a launch for C++, or the reason why only Python can launch it."""

    def remark(self) -> str | None:
        """What `explain` adds about the kernel, if anything."""

    def renamed(self, names: Mapping[str, str]) -> "KernelLaunch":
        """The same launch for tensors with the names to which `names` maps its own."""


@dataclass(frozen=True, eq=False)
class Plan:
    """How to make calls of one kind.

    inputs: the names of the arguments, in order. before, after: conversions by torch before and after the launches.
    fresh: tensors to allocate. outputs: the names of the results, None for those not requested. Each launch keeps the
    memory alive that it points to.
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
        """The index of the GPU, or None if the plan is for another device."""
        return self.device.index if self.device.type == "cuda" else None

    @property
    def remarks(self) -> list[str]:
        """What `explain` adds about the kernels."""
        return [remark for launch in self.launches if (remark := launch.remark()) is not None]

    @functools.cached_property
    def native(self) -> "Native | str":
        """This plan for C++, or the reason why only Python can run it."""
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


def both(first: Plan, second: Plan, outputs: Sequence[int], shared: Mapping[str, str] | None = None) -> Plan:
    """A plan that makes the calls of two plans for one device.

    Args:
        first: A plan.
        second: Another, whose tensors get a 2 at the end of their names.
        outputs: The places in each plan's outputs of those that the plan has; the first plan's come first.
        shared: Inputs of the second plan that are fresh tensors of the first, each with its name there. The second
            plan converts none of them.
    """
    shared = shared or {}
    assert not any(shared.keys() & set(converted.of) for converted in second.before)  # conversions come first
    names = {name: f"{name}2" for name in (*second.inputs, *(t.name for t in second.fresh))}
    names |= {converted.name: f"{converted.name}2" for converted in (*second.before, *second.after)}
    names |= shared

    def renamed(converted: Converted) -> Converted:
        return replace(converted, name=names[converted.name], of=tuple(names[name] for name in converted.of))

    return Plan(
        first.device,
        inputs=(*first.inputs, *(names[name] for name in second.inputs if name not in shared)),
        before=(*first.before, *map(renamed, second.before)),
        fresh=(*first.fresh, *(replace(t, name=names[t.name]) for t in second.fresh)),
        launches=(*first.launches, *(launch.renamed(names) for launch in second.launches)),
        after=(*first.after, *map(renamed, second.after)),
        outputs=(
            *(first.outputs[i] for i in outputs),
            *(None if (name := second.outputs[i]) is None else names[name] for i in outputs),
        ),
    )


def sandwich(first: Plan, second: Plan) -> Plan | None:
    """A plan that returns y, s, rstd and rstd2 of a norm, whose y is the x of a second norm with a residual.

    None if torch must convert that x.
    """
    if any("x" in converted.of for converted in second.before):
        return None
    plan = both(first, second, (0, 1, 2), {"x": "y"})
    _, _, rstd, y, s, rstd2 = plan.outputs
    return replace(plan, outputs=(y, s, rstd, rstd2))


@dataclass(frozen=True)
class Native:
    """A `Plan` that C++ can run. keeps: an object to keep alive as long as this one."""

    inputs: tuple[str, ...]
    fresh: tuple[Fresh, ...]
    launches: tuple[NativeLaunch, ...]
    outputs: tuple[str | None, ...]
    keeps: Any = field(repr=False)


@dataclass(frozen=True)
class ByReference:
    """Stands in for a plan if the reference computes calls of this kind; `why` is the reason."""

    why: str


# --- helpers for planners ------------------------------------------------------------------------------------

Found = TypeVar("Found")


def dense(name: str, kind: TensorKind, before: list[Converted]) -> TensorKind:
    """The kind of a tensor that a kernel reads as contiguous; adds a copy to `before` if it is not."""
    if kind.is_dense:
        return kind
    before.append(Converted(name, (name,), kind.dtype))
    return TensorKind.dense(kind.shape, kind.dtype)


def summands(kind: Forward | BeginForward) -> tuple[str, TensorKind, TensorKind | None, list[Converted]]:
    """What a forward kernel reads: the name and kind of its rows, the residual it adds, and conversions before it.

    If the residual has another dtype than x, torch adds the two before the kernel runs, which then only reads s.
    """
    x, residual = kind.x, kind.residual
    if residual is None or residual.dtype is x.dtype:
        return "x", x, residual, []
    total = TensorKind.dense(x.shape, sum_dtype(x.dtype, residual.dtype))
    return "s", total, None, [Converted("s", ("x", "residual"), total.dtype)]


def heads_of(w: TensorKind | None) -> int:
    """How many heads have a weight of their own: row m has that of head m % heads. 1 if all rows have the same."""
    return 1 if w is None or len(w.shape) == 1 else max(1, w.shape[0])


def gradients(kind: Backward, dtype: torch.dtype) -> tuple[dict[str, TensorKind], list[Converted]]:
    """The gradients of y that a kernel adds, by name, and the conversions before the kernel.

    If there are several and the kernel reads another dtype, torch adds them first, because each sum is rounded to their
    own dtype.
    """
    dys = kind.dys
    if len(dys) == 1 or kind.dy.dtype is dtype:
        return dys, []
    return {"dy": TensorKind.dense(kind.dy.shape, dtype)}, [Converted("dy", tuple(dys), dtype)]


def find_layout(
    find: Callable[..., Found | None], wanted: Mapping[str, tuple[TensorKind, torch.dtype]]
) -> tuple[Found, dict[str, TensorKind], list[Converted]]:
    """Finds a layout for tensors that a kernel reads in the wanted dtypes, copying as few of them as possible.

    `find(shape, *strides)` returns a layout, or None if it does not support these strides. Tensors of another dtype
    are always converted.

    Returns:
        The layout, the kinds of the tensors as the kernel reads them, and the conversions that must come first.
    """
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
    assert found is not None, "find must accept contiguous tensors of one shape"
    converted = [Converted(name, (name,), kinds[name].dtype) for name in kinds if kinds[name] is not wanted[name][0]]
    return found, kinds, converted


def _found(find: Callable[..., Found | None], kinds: Mapping[str, TensorKind]) -> Found | None:
    shape = next(iter(kinds.values())).shape
    return find(tuple(shape), *(tuple(kind.strides) for kind in kinds.values()))
