"""Plans calls on the CPU: which kernel takes them, how threads share the rows, and what is allocated for it."""

import ctypes
import functools
import math
from typing import Any, NamedTuple

import torch
from numba import types

from rmsnorm.kernels.cpu.compiling import ELEMENT, PAIR, compiled
from rmsnorm.kernels.cpu.kernels import backward, forward, sum_chunks
from rmsnorm.kernels.cpu.launches import Rows, like_rows, over_rows, rows_of
from rmsnorm.kernels.cpu.processor import refusal
from rmsnorm.kernels.cpu.threads import MachineCode
from rmsnorm.kernels.plan import (
    MOST_PLANS,
    Backward,
    ByReference,
    Converted,
    Forward,
    Fresh,
    Plan,
    TensorKind,
    dense,
    find_layout,
    gradients,
    heads_of,
    summands,
)
from rmsnorm.spec import result_dtype

NAME = "cpu kernel (Numba)"


class Types(NamedTuple):
    """The dtype in which the kernels read the weight (x's, or fp32), and the dtype of y."""

    w: torch.dtype
    y: torch.dtype


@functools.cache
def types_of(x: torch.dtype, w: torch.dtype | None, cast: str) -> Types:
    read = x if w is None or w == x else torch.float32
    return Types(read, result_dtype(x, read, cast))


def _elements(x: torch.dtype, read: Types, even: bool) -> tuple[Any, Any, Any]:
    """The element types of x, w and y: pairs if all are bf16 and every row begins and ends at a pair."""
    if even and {x, read.w, read.y} == {torch.bfloat16}:
        return PAIR, PAIR, PAIR
    return ELEMENT[x], ELEMENT[read.w], ELEMENT[read.y]


@functools.cache
def forward_kernel(x: torch.dtype, read: Types, even: bool, by_head: bool = False, sliced: bool = False) -> Any:
    X, W, Y = _elements(x, read, even)
    pointees = X, X, W, Y, X, types.float32, types.float64, types.int64, types.float32
    return compiled(forward(by_head, sliced), *pointees)


@functools.cache
def backward_kernel(
    x: torch.dtype, read: Types, even: bool, dys: int, round_first: bool, by_head: bool = False, sliced: bool = False
) -> Any:
    X, W, Y = _elements(x, read, even)
    pointees = Y, Y, Y, X, X, W, types.float32, X, types.float64, types.float64, types.int64, types.float32
    return compiled(backward(dys, round_first, by_head, sliced), *pointees)


@functools.cache
def sum_kernel(x: torch.dtype, read: Types, even: bool) -> Any:
    return compiled(sum_chunks, types.float64, _elements(x, read, even)[1])


# The most elements that one thread processes alone, in 22 to 34 us. Two threads take 0.58 to 0.89 of that time and gain
# less with fewer elements; if one of them gets no core, a call takes 10 to 25 ms (LOG.md, "On a CPU one thread alone").
FORWARD_ALONE, BACKWARD_ALONE = 1 << 18, 1 << 17
_PAIR_BYTES = 4


def refuses(x: torch.dtype) -> str | None:
    """Why rows of this dtype must run the reference here; None if the kernels take them."""
    return refusal("fp16") if x == torch.float16 else None


@functools.lru_cache(MOST_PLANS)
def plan_forward(kind: Forward) -> Plan | ByReference:
    """Plans a call that computes y, s and rstd as `reference.forward` does."""
    row, x, residual, before = summands(kind)
    spec = kind.spec
    wanted = {row: (x, x.dtype)} | ({} if residual is None else {"residual": (residual, x.dtype)})
    heads, sliced = heads_of(kind.w), spec.variance_size is not None
    find = functools.partial(rows_of, groups=heads, measured=spec.variance_size)
    rows, kinds, converted = find_layout(find, wanted)
    types = types_of(x.dtype, None if kind.w is None else kind.w.dtype, spec.cast)
    scale = scale_of(kind.w, types, rows.N)
    even = rows.even and paired(*kinds.values(), scale.kind)
    kernel = forward_kernel(x.dtype, types, even, heads > 1, sliced)
    if isinstance(kernel, str):
        return ByReference(kernel)
    y, s = like_rows("y", kind.x, types.y), like_rows("s", kind.x, x.dtype)
    rstd = Fresh("rstd", torch.float32, tuple(kind.x.shape[:-1]))
    words = spec_words(spec.eps, spec.offset, spec.cast)
    tensors = (
        row, None if residual is None else "residual", scale.name, "y", None if residual is None else "s",
        "rstd" if kind.with_rstd else None, None,
    )  # fmt: skip
    return Plan(
        kind.device,
        inputs=("x", "residual", "w"),
        before=(*before, *converted, *scale.before),
        fresh=(y, *([] if residual is None else [s]), *([rstd] if kind.with_rstd else []), *scale.fresh),
        launches=(over_rows(kernel, tensors, rows, (words,), rows.grain, FORWARD_ALONE),),
        outputs=("y", None if kind.residual is None else "s", "rstd" if kind.with_rstd else None),
    )


@functools.lru_cache(MOST_PLANS)
def plan_backward(kind: Backward) -> Plan | ByReference:
    """Plans a call that computes dx and dw as `reference.backward` does.

    dw is summed in fp64: over the rows of each chunk, then over the chunks in order.
    """
    x, w, spec, need_dx = kind.x, kind.w, kind.spec, kind.need_dx
    types = types_of(x.dtype, None if w is None else w.dtype, spec.cast)
    dys, before = gradients(kind, types.y)
    dy, *more = ((name, (of, types.y)) for name, of in dys.items())
    wanted = dict([dy, ("x", (x, x.dtype)), *more]) | ({} if kind.ds is None else {"ds": (kind.ds, x.dtype)})
    heads, sliced = heads_of(w), spec.variance_size is not None
    find = functools.partial(rows_of, groups=heads, measured=spec.variance_size)
    rows, kinds, converted = find_layout(find, wanted)  # in the order of the kernel's layout
    before += converted
    rstd = dense("rstd", kind.rstd, before)  # only hooks on saved tensors can make a copy necessary
    scale = scale_of(w, types, rows.N)
    even = rows.even and paired(*kinds.values(), scale.kind, rstd)
    kernel = backward_kernel(x.dtype, types, even, len(dys), kind.rounds_dx_first, heads > 1, sliced)
    dw = sums_of_dw(w if kind.need_dw else None, x.dtype, types, rows, even)
    if isinstance(kernel, str):
        return ByReference(kernel)
    if isinstance(dw, str):
        return ByReference(dw)
    tensors = (
        "dy", "dy2" if "dy2" in dys else None, "dy3" if "dy3" in dys else None, None if kind.ds is None else "ds", "x",
        scale.name, "rstd", "dx" if need_dx else None, dw.partials, None,
    )  # fmt: skip
    words = spec_words(0.0, spec.offset, spec.cast)
    return Plan(
        kind.device,
        inputs=kind.inputs,
        before=(*before, *scale.before),
        fresh=(*scale.fresh, *([like_rows("dx", x, x.dtype)] if need_dx else []), *dw.fresh),
        launches=(over_rows(kernel, tensors, rows, (words,), rows.chunk, BACKWARD_ALONE), *dw.launches),
        after=dw.after,
        outputs=("dx" if need_dx else None, dw.output),
    )


class SumsOfDw(NamedTuple):
    """How dw is summed: the names of the partial sums and of dw, None for what there is not, and parts of the plan."""

    partials: str | None = None
    output: str | None = None
    fresh: tuple[Fresh, ...] = ()
    launches: tuple[MachineCode, ...] = ()
    after: tuple[Converted, ...] = ()


def sums_of_dw(w: TensorKind | None, x: torch.dtype, types: Types, rows: Rows, even: bool) -> SumsOfDw | str:
    """How dw of the weight w, None if it is not needed, is summed; a reason why the sum cannot be compiled."""
    if w is None:
        return SumsOfDw()
    if rows.chunks == 0:
        return SumsOfDw(output="dw", fresh=(Fresh("dw", w.dtype, tuple(w.shape), value=0),))
    kernel = sum_kernel(x, types, even)
    if isinstance(kernel, str):
        return kernel
    columns = math.prod(w.shape)
    return SumsOfDw(
        "partials",
        "dw",
        (Fresh("partials", torch.float64, (rows.chunks, columns)), Fresh("dw", types.w, tuple(w.shape))),
        (MachineCode(kernel, ("partials", "dw"), (rows.chunks, columns)),),
        () if w.dtype is types.w else (Converted("dw", ("dw",), w.dtype),),
    )


class _Scale(NamedTuple):
    """The weight as the kernels read it, with the conversion or allocation it needs.

    An absent weight becomes a vector of ones, which gives the same bits.
    """

    name: str
    kind: TensorKind
    before: tuple[Converted, ...] = ()
    fresh: tuple[Fresh, ...] = ()


def scale_of(w: TensorKind | None, types: Types, N: int) -> _Scale:
    if w is not None and w.dtype is types.w and w.is_dense:
        return _Scale("w", w)
    made = TensorKind.dense((N,) if w is None else w.shape, types.w)
    if w is None:
        return _Scale("ones", made, fresh=(Fresh("ones", types.w, (N,), value=1),))
    return _Scale("w", made, before=(Converted("w", ("w",), types.w),))


def paired(*kinds: TensorKind) -> bool:
    """Whether all addresses are aligned for pairs of 16-bit numbers."""
    return all(kind.alignment >= _PAIR_BYTES for kind in kinds)


@functools.lru_cache(256)
def spec_words(eps: float, offset: float, cast: str) -> Any:
    """The spec as the array that the kernels read. An offset of -0.0 changes no bit of a weight."""
    return (ctypes.c_float * 3)(eps, offset or -0.0, ("late", "early", "first").index(cast))
