"""Plans calls on the CPU: which kernel takes them, how threads share the rows, and what is allocated for it."""

import ctypes
import functools
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import llvmlite.binding
import torch
from llvmlite import ir
from numba import types

from rmsnorm import compat
from rmsnorm.kernels.cpu.compiling import ELEMENT, PAIR, compiled, compiled_drain, compiled_wait
from rmsnorm.kernels.cpu.kernels import backward, forward, sum_chunks
from rmsnorm.kernels.cpu.threads import MachineCode, Team
from rmsnorm.kernels.plan import (
    MOST_PLANS,
    Backward,
    ByReference,
    Converted,
    Forward,
    Fresh,
    Plan,
    TensorKind,
    find_layout,
    gradients,
    summands,
)
from rmsnorm.kernels.rows import walk
from rmsnorm.spec import result_dtype

NAME = "cpu kernel (Numba)"


class _Types(NamedTuple):
    """The dtype in which the kernels read the weight (x's, or fp32), and the dtype of y."""

    w: torch.dtype
    y: torch.dtype


@functools.cache
def _types(x: torch.dtype, w: torch.dtype | None, cast: str) -> _Types:
    read = x if w is None or w == x else torch.float32
    return _Types(read, result_dtype(x, read, cast))


def _elements(x: torch.dtype, read: _Types, even: bool) -> tuple[Any, Any, Any]:
    """The element types of x, w and y: pairs if all are bf16 and every row begins and ends at a pair."""
    if even and {x, read.w, read.y} == {torch.bfloat16}:
        return PAIR, PAIR, PAIR
    return ELEMENT[x], ELEMENT[read.w], ELEMENT[read.y]


@functools.cache
def _forward_kernel(x: torch.dtype, read: _Types, even: bool) -> Any:
    X, W, Y = _elements(x, read, even)
    return compiled(forward, X, X, W, Y, X, types.float32, types.int64, types.float32)


@functools.cache
def _backward_kernel(x: torch.dtype, read: _Types, even: bool, dys: int, round_first: bool) -> Any:
    X, W, Y = _elements(x, read, even)
    pointees = Y, Y, Y, X, X, W, types.float32, X, types.float64, types.int64, types.float32
    return compiled(backward(dys, round_first), *pointees)


@functools.cache
def _sum_kernel(x: torch.dtype, read: _Types, even: bool) -> Any:
    return compiled(sum_chunks, types.float64, _elements(x, read, even)[1])


# The most elements that one thread processes alone, in 22 to 34 us. Two threads take 0.58 to 0.89 of that time and gain
# less with fewer elements; if one of them gets no core, a call takes 10 to 25 ms (LOG.md, "On a CPU one thread alone").
_FORWARD_ALONE, _BACKWARD_ALONE = 1 << 18, 1 << 17
# The fewest elements of a piece of a shared call, 2 us of work. Measured only together with the change to torch's
# threads, which reduced fp32 of 512 x 1280 from 132 to 63 us on two threads.
_GRAIN = 1 << 14
# The fewest elements and rows of a partial sum of dw, and the most such sums: each takes 8 bytes a column. Not measured
# alone. Changing these changes the bits of dw.
_CHUNK, _MOST_CHUNKS, _FEWEST_ROWS = 1 << 16, 256, 32
# Bytes from which the C library maps new memory for each tensor; 42 MB cause 10,000 page faults, or 20 with huge pages:
# fp32 of 8192 x 1280 15.1 to 4.8 ms.
_MAPPED = 32 << 20
_PAIR_BYTES = 4
_MOST_INPUTS = 5  # tensors of rows that a kernel reads


def refuses(x: torch.dtype) -> str | None:
    """Why rows of this dtype must run the reference here; None if the kernels take them."""
    if x == torch.float16 and not _has_fp16():
        return "the processor that Numba compiles for has no instructions for fp16: computed by plain torch"
    return None


@functools.cache
def _has_fp16() -> bool:
    """Whether the processor converts fp16 in hardware: otherwise LLVM calls library functions that may be missing."""
    triple, cpu, features = compat.numba_processor()
    half, single = ir.HalfType(), ir.FloatType()
    module = ir.Module()
    module.triple = triple
    for source, target, convert in ((half, single, "fpext"), (single, half, "fptrunc")):
        pointers = [source.as_pointer(), target.as_pointer()]
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), pointers), convert)
        builder = ir.IRBuilder(function.append_basic_block())
        builder.store(getattr(builder, convert)(builder.load(function.args[0]), target), function.args[1])
        builder.ret_void()
    machine = llvmlite.binding.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    assembly = machine.emit_assembly(llvmlite.binding.parse_assembly(str(module)))
    return re.search(r"__\w*(hf|f2h|h2f)", assembly) is None


@functools.lru_cache(MOST_PLANS)
def plan_forward(kind: Forward) -> Plan | ByReference:
    """Plans a call that computes y, s and rstd as `reference.forward` does."""
    row, x, residual, before = summands(kind)
    spec = kind.spec
    wanted = {row: (x, x.dtype)} | ({} if residual is None else {"residual": (residual, x.dtype)})
    rows, kinds, converted = find_layout(_rows, wanted)
    types = _types(x.dtype, None if kind.w is None else kind.w.dtype, spec.cast)
    scale = _scale(kind.w, types, rows.N)
    even = rows.even and _paired(*kinds.values(), scale.kind)
    kernel = _forward_kernel(x.dtype, types, even)
    if isinstance(kernel, str):
        return ByReference(kernel)
    y, s = _like_rows("y", kind.x, types.y), _like_rows("s", kind.x, x.dtype)
    rstd = Fresh("rstd", torch.float32, tuple(kind.x.shape[:-1]))
    words = _spec(spec.eps, spec.offset, spec.cast)
    tensors = (
        row, None if residual is None else "residual", scale.name, "y", None if residual is None else "s",
        "rstd" if kind.with_rstd else None,
    )  # fmt: skip
    return Plan(
        kind.device,
        inputs=("x", "residual", "w"),
        before=(*before, *converted, *scale.before),
        fresh=(y, *([] if residual is None else [s]), *([rstd] if kind.with_rstd else []), *scale.fresh),
        launches=(_over_rows(kernel, tensors, rows, words, rows.grain, _FORWARD_ALONE),),
        outputs=("y", None if kind.residual is None else "s", "rstd" if kind.with_rstd else None),
    )


@functools.lru_cache(MOST_PLANS)
def plan_backward(kind: Backward) -> Plan | ByReference:
    """Plans a call that computes dx and dw as `reference.backward` does.

    dw is summed in fp64: over the rows of each chunk, then over the chunks in order.
    """
    x, w, spec, need_dx = kind.x, kind.w, kind.spec, kind.need_dx
    types = _types(x.dtype, None if w is None else w.dtype, spec.cast)
    dys, before = gradients(kind, types.y)
    dy, *more = ((name, (of, types.y)) for name, of in dys.items())
    wanted = dict([dy, ("x", (x, x.dtype)), *more]) | ({} if kind.ds is None else {"ds": (kind.ds, x.dtype)})
    rows, kinds, converted = find_layout(_rows, wanted)  # in the order of the kernel's layout
    before += converted
    rstd = kind.rstd
    if not rstd.is_dense:  # only hooks on saved tensors can make it so
        rstd = TensorKind.dense(rstd.shape, rstd.dtype)
        before.append(Converted("rstd", ("rstd",), rstd.dtype))
    scale = _scale(w, types, rows.N)
    even = rows.even and _paired(*kinds.values(), scale.kind, rstd)
    kernel = _backward_kernel(x.dtype, types, even, len(dys), kind.rounds_dx_first)
    need_dw = kind.need_dw and w is not None
    sums = need_dw and rows.chunks > 0
    of_sum = _sum_kernel(x.dtype, types, even) if sums else None
    for code in (kernel, of_sum):
        if isinstance(code, str):
            return ByReference(code)
    fresh, after = list(scale.fresh), []
    if need_dx:
        fresh.append(_like_rows("dx", x, x.dtype))
    tensors = (
        "dy", "dy2" if "dy2" in dys else None, "dy3" if "dy3" in dys else None, None if kind.ds is None else "ds", "x",
        scale.name, "rstd", "dx" if need_dx else None, "partials" if sums else None,
    )  # fmt: skip
    launches = [_over_rows(kernel, tensors, rows, _spec(0.0, spec.offset, spec.cast), rows.chunk, _BACKWARD_ALONE)]
    if sums:
        fresh += [
            Fresh("partials", torch.float64, (rows.chunks, rows.N)),
            Fresh("dw", types.w, (rows.N,)),
        ]
        launches.append(MachineCode(of_sum, ("partials", "dw"), (rows.chunks, rows.N)))
        if w is not None and w.dtype is not types.w:
            after.append(Converted("dw", ("dw",), w.dtype))
    elif need_dw and w is not None:
        fresh.append(Fresh("dw", w.dtype, (rows.N,), value=0))
    return Plan(
        kind.device,
        inputs=kind.inputs,
        before=(*before, *scale.before),
        fresh=tuple(fresh),
        launches=tuple(launches),
        after=tuple(after),
        outputs=("dx" if need_dx else None, "dw" if need_dw else None),
    )


@dataclass(frozen=True)
class _Rows:
    """How kernels traverse M rows of N elements. It depends on shape and strides only, not on the number of threads.

    grain: rows that a thread takes at once in the forward pass. chunk, chunks: rows of each partial sum of dw, and how
    many such sums there are. even: whether rows begin and end at pairs of numbers. layout: the array that kernels read.
    """

    M: int
    N: int
    grain: int
    chunk: int
    chunks: int
    even: bool
    layout: Any


@functools.lru_cache(MOST_PLANS)
def _rows(shape: Sequence[int], *strides: Sequence[int]) -> _Rows | None:
    """As `rows.walk`, with the rows divided into chunks."""
    found = walk(shape, *strides)
    if found is None:
        return None
    M, N = found.M, found.N
    chunk = max(_FEWEST_ROWS, -(-_CHUNK // N), -(-M // _MOST_CHUNKS))
    sizes = found.sizes if found.strided else (1, M)
    steps = [step for of_one in found.steps for step in of_one]
    values = [N, chunk, *sizes, *steps, *[0] * (3 * _MOST_INPUTS - len(steps))]
    even = all(number % 2 == 0 for number in (N, *steps)) and sys.byteorder == "little"
    return _Rows(M, N, max(1, _GRAIN // N), chunk, -(-M // chunk), even, (ctypes.c_int64 * len(values))(*values))


class _Scale(NamedTuple):
    """The weight as the kernels read it, with the conversion or allocation it needs.

    An absent weight becomes a vector of ones, which gives the same bits.
    """

    name: str
    kind: TensorKind
    before: tuple[Converted, ...] = ()
    fresh: tuple[Fresh, ...] = ()


def _scale(w: TensorKind | None, types: _Types, N: int) -> _Scale:
    if w is not None and w.dtype is types.w and w.is_dense:
        return _Scale("w", w)
    made = TensorKind.dense((N,), types.w)
    if w is None:
        return _Scale("ones", made, fresh=(Fresh("ones", types.w, (N,), value=1),))
    return _Scale("w", made, before=(Converted("w", ("w",), types.w),))


def _paired(*kinds: TensorKind) -> bool:
    """Whether all addresses are aligned for pairs of 16-bit numbers."""
    return all(kind.alignment >= _PAIR_BYTES for kind in kinds)


def _like_rows(name: str, x: TensorKind, dtype: torch.dtype) -> Fresh:
    nbytes = math.prod(x.shape) * dtype.itemsize
    return Fresh(name, dtype, tuple(x.shape), huge_pages=nbytes >= _MAPPED)


def _over_rows(
    kernel: Any, tensors: tuple[str | None, ...], rows: _Rows, spec: Any, at_once: int, alone: int
) -> MachineCode:
    """A launch over all rows. Several threads share more than `alone` elements, in pieces of `at_once` rows."""
    words = ctypes.addressof(rows.layout), ctypes.addressof(spec)
    shared = alone < rows.M * rows.N and at_once < rows.M
    drain = compiled_drain(len(tensors) + len(words)) if shared else None
    if drain is None or isinstance(drain, str):
        return MachineCode(kernel, tensors, (*words, 0, rows.M), keeps=(rows, spec))
    return MachineCode(kernel, tensors, words, Team(rows.M, at_once, drain, compiled_wait), keeps=(rows, spec))


@functools.lru_cache(256)
def _spec(eps: float, offset: float, cast: str) -> Any:
    """The spec as the array that the kernels read. An offset of -0.0 changes no bit of a weight."""
    return (ctypes.c_float * 3)(eps, offset or -0.0, ("late", "early", "first").index(cast))
