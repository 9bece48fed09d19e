"""The arithmetic of reference.py on the CPU, in Numba: one pass over memory, one row at a time.

Kernels are compiled for the element types of their pointers. float32 stands for itself, uint16 for bf16, int16 for
fp16 (Numba has neither type on a CPU), and uint32 for a pair of bf16 numbers, which takes fewer instructions than
two single ones. Kernels and their helpers must stay in this file: the cache of machine code is keyed by this file's
source and would miss a change elsewhere. No function uses `fastmath`; only the additions into an fp64 sum may be
reordered or fused, and carry those flags themselves (`_add_square`, `_add`).
"""

import math
import os
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

# --- intrinsics ----------------------------------------------------------------------------------------------

_I16, _I32 = ir.IntType(16), ir.IntType(32)


@intrinsic
def _parts(typing_context: Any, pointer: Any) -> Any:
    """How many numbers one element holds, 1 or 2, as a compile-time constant."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.IntType(64)(2 if pointer.dtype == types.uint32 else 1)

    return types.int64(pointer), code


@intrinsic
def _nothing(typing_context: Any, pointer: Any) -> Any:
    """An element of zeros."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(pointer.dtype), 0)

    return pointer.dtype(pointer), code


@intrinsic
def _widen(typing_context: Any, element: Any, part: Any) -> Any:
    """Converts a number of the element to fp32, exactly. part: which number of a pair, 0 or 1."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits, k = args
        if element == types.uint32:
            high = builder.icmp_unsigned("!=", k, k.type(0))
            half = builder.select(high, builder.and_(bits, _I32(0xFFFF0000)), builder.shl(bits, _I32(16)))
            return builder.bitcast(half, ir.FloatType())
        if element == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(bits, _I32), _I32(16)), ir.FloatType())
        if element == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        return bits

    return types.float32(element, part), code


def _bf16(builder: Any, value: Any, source: Any) -> Any:
    """32 bits whose upper half is the fp32 value rounded to bf16.

    A NaN from a bf16 input or from the processor has zeros in its low 16 bits, so the rounding addition keeps it a
    NaN. A NaN from an fp32 source can have other bits there and is replaced by a quiet NaN.
    """
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
    rounded = builder.add(builder.add(bits, _I32(0x7FFF)), odd)
    if source.dtype == types.float32:
        rounded = builder.select(builder.fcmp_unordered("uno", value, value), _I32(0x7FC00000), rounded)
    return rounded


@intrinsic
def _cast(typing_context: Any, value: Any, pointer: Any) -> Any:
    """The fp32 value rounded (to nearest even) to the pointer's number type and converted back to fp32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if pointer.dtype in (types.uint16, types.uint32):
            rounded = builder.and_(_bf16(builder, args[0], pointer), _I32(0xFFFF0000))
            return builder.bitcast(rounded, ir.FloatType())
        if pointer.dtype == types.int16:
            return builder.fpext(builder.fptrunc(args[0], ir.HalfType()), ir.FloatType())
        return args[0]

    return types.float32(types.float32, pointer), code


@intrinsic
def _put(typing_context: Any, element: Any, part: Any, value: Any, pointer: Any, source: Any) -> Any:
    """The element with number `part` set to the fp32 value, rounded (to nearest even) to the pointer's number type."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        before, k, number = args[:3]
        if pointer.dtype == types.uint32:
            bits = _bf16(builder, number, source)
            high = builder.icmp_unsigned("!=", k, k.type(0))
            half = builder.select(high, builder.and_(bits, _I32(0xFFFF0000)), builder.lshr(bits, _I32(16)))
            return builder.or_(before, half)
        if pointer.dtype == types.uint16:
            return builder.trunc(builder.lshr(_bf16(builder, number, source), _I32(16)), _I16)
        if pointer.dtype == types.int16:
            return builder.bitcast(builder.fptrunc(number, ir.HalfType()), _I16)
        return number

    return pointer.dtype(element, part, types.float32, pointer, source), code


@intrinsic
def _add_square(typing_context: Any, total: Any, value: Any) -> Any:
    """total + value²; additions may be reordered. An fp32 number's square is exact in fp64, so fusing is harmless."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        square = builder.fmul(args[1], args[1], flags=("contract",))
        return builder.fadd(args[0], square, flags=("reassoc", "contract"))

    return types.float64(types.float64, types.float64), code


@intrinsic
def _add(typing_context: Any, total: Any, value: Any) -> Any:
    """total + value; additions may be reordered."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(args[0], args[1], flags=("reassoc",))

    return types.float64(types.float64, types.float64), code


@intrinsic
def _given(typing_context: Any, pointer: Any) -> Any:
    """Whether the pointer is not null: absent tensors pass a null pointer."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.icmp_unsigned("!=", args[0], ir.Constant(args[0].type, None))

    return types.boolean(pointer), code


@intrinsic
def _take(typing_context: Any, counter: Any) -> Any:
    """Atomically increments the counter and returns its previous value, so no two threads get the same."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], ir.IntType(64)(1), "monotonic")

    return types.int64(counter), code


@intrinsic
def _finish(typing_context: Any, call: Any, rows: Any) -> Any:
    """Adds the rows of a finished piece to the count, with release semantics: who reads the count sees the rows."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.atomic_rmw("add", builder.gep(args[0], [ir.IntType(64)(1)]), args[1], "release")
        return context.get_dummy_value()

    return types.void(call, rows), code


@intrinsic
def _finished(typing_context: Any, call: Any) -> Any:
    """How many rows are done, with acquire semantics."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.gep(args[0], [ir.IntType(64)(1)]), "acquire", 8)

    return types.int64(call), code


@intrinsic
def _yield_processor(typing_context: Any) -> Any:
    """Yields the processor to another thread if one is waiting."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if os.name == "posix":
            builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I32, []), "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), code


@intrinsic(prefer_literal=True)
def _invoke(typing_context: Any, call: Any, pointers: Any, first: Any, last: Any) -> Any:
    """Runs the kernel at address call[4], with the pointers that follow it, for rows first to last - 1."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(64)
        address, *values = (
            builder.load(builder.gep(args[0], [word(4 + i)])) for i in range(1 + pointers.literal_value)
        )
        kernel = ir.FunctionType(ir.VoidType(), [byte] * len(values) + [word] * 2).as_pointer()
        given = [builder.inttoptr(value, byte) for value in values]
        builder.call(builder.inttoptr(address, kernel), [*given, args[2], args[3]])
        return context.get_dummy_value()

    return types.void(call, pointers, first, last), code


# --- the kernels ---------------------------------------------------------------------------------------------
# Absent tensors are null pointers. Outputs are contiguous. Inputs are contiguous in the last dimension only; `layout`
# holds N, the rows of a chunk, the two inner sizes of the rows' three dimensions, and three strides for each input.
# An element holds one or two numbers ("parts"), which divide N. In partial sums, all first parts precede all second.
# spec: eps, the offset, and the cast: 0 is late, 1 early, 2 first. Without an offset it is -0.0, because adding +0.0
# would change a weight of -0.0.

_FIRST, _SECOND, _THIRD, _FOURTH, _FIFTH = 4, 7, 10, 13, 16


@numba.njit(error_model="numpy")
def _start(layout: Any, strides: int, m: int) -> Any:
    """Where row m of an input begins, in elements."""
    middle, inner = layout[2], layout[3]
    if m < inner:
        return m * layout[strides + 2]
    outer, rest = m // (middle * inner), m // inner
    return outer * layout[strides] + rest % middle * layout[strides + 1] + m % inner * layout[strides + 2]


def forward(
    x: Any, residual: Any, w: Any, y: Any, s: Any, rstd: Any, layout: Any, spec: Any, first: int, last: int
) -> None:  # fmt: skip
    N, eps, offset, early = layout[0], spec[0], spec[1], spec[2] != 0
    parts = _parts(x)
    steps = N // parts
    for m in range(first, last):
        rows, at, out = x, _start(layout, _FIRST, m) // parts, m * steps
        if _given(residual):
            other = _start(layout, _SECOND, m) // parts
            for i in range(steps):
                element = _nothing(s)
                for k in range(parts):
                    element = _put(element, k, _widen(x[at + i], k) + _widen(residual[other + i], k), s, x)
                s[out + i] = element
            rows, at = s, out
        total = 0.0
        for i in range(steps):
            for k in range(parts):
                total = _add_square(total, np.float64(_widen(rows[at + i], k)))
        v = np.float32(total / N) + eps
        r = np.float32(1) / np.float32(math.sqrt(v))
        if _given(rstd):
            rstd[m] = r
        if spec[2] == 2:
            r = _cast(r, x)
        for i in range(steps):
            element = _nothing(y)
            for k in range(parts):
                h = _widen(rows[at + i], k) * r
                scaled = _widen(w[i], k) * _cast(h, x) if early else (_widen(w[i], k) + offset) * h
                element = _put(element, k, scaled, y, w)
            y[out + i] = element


def backward(dys: int, round_first: bool) -> Callable[..., None]:
    """The backward kernel for a sum of `dys` gradients of y; dx is rounded before ds is added if `round_first`."""
    strides_of_ds = (_THIRD, _FOURTH, _FIFTH)[dys - 1]

    def backward(
        dy: Any, dy2: Any, dy3: Any, ds: Any, x: Any, w: Any, rstd: Any, dx: Any, dw: Any, layout: Any, spec: Any,
        first: int, last: int,
    ) -> None:  # fmt: skip
        N, chunk, wants_dw, adds = layout[0], layout[1], _given(dw), _given(ds)
        offset, early = spec[1], spec[2] != 0
        parts = _parts(x)
        steps = N // parts
        a2, a3 = 0, 0
        for m in range(first, last):
            a, b = _start(layout, _FIRST, m) // parts, _start(layout, _SECOND, m) // parts
            if dys > 1:
                a2 = _start(layout, _THIRD, m) // parts
            if dys > 2:
                a3 = _start(layout, _FOURTH, m) // parts
            out, sums = m * steps, m // chunk * N
            r = rstd[m]
            if wants_dw and m % chunk == 0:
                for i in range(N):
                    dw[sums + i] = 0.0
            total = 0.0
            for i in range(steps):
                for k in range(parts):
                    d, xh = _widen(dy[a + i], k), _widen(x[b + i], k) * r
                    if dys > 1:
                        d = _cast(d + _widen(dy2[a2 + i], k), dy)
                    if dys > 2:
                        d = _cast(d + _widen(dy3[a3 + i], k), dy)
                    total = _add(total, np.float64((d * (_widen(w[i], k) + offset)) * xh))
                    if wants_dw:
                        dw[sums + k * steps + i] += np.float64(d * (_cast(xh, x) if early else xh))
            if _given(dx):
                c = np.float32(total / N)
                other = _start(layout, strides_of_ds, m) // parts
                for i in range(steps):
                    element = _nothing(dx)
                    for k in range(parts):
                        d, xh = _widen(dy[a + i], k), _widen(x[b + i], k) * r
                        if dys > 1:
                            d = _cast(d + _widen(dy2[a2 + i], k), dy)
                        if dys > 2:
                            d = _cast(d + _widen(dy3[a3 + i], k), dy)
                        t = r * (d * (_widen(w[i], k) + offset) - xh * c)
                        if round_first:
                            t = _widen(_put(_nothing(dx), 0, t, dx, w), 0)
                        element = _put(element, k, t + _widen(ds[other + i], k) if adds else t, dx, w)
                    dx[out + i] = element

    return backward


def sum_chunks(partials: Any, dw: Any, chunks: int, N: int) -> None:
    for chunk in range(1, chunks):
        for i in range(N):
            partials[i] += partials[chunk * N + i]
    parts = _parts(dw)
    steps = N // parts
    for i in range(steps):
        element = _nothing(dw)
        for k in range(parts):
            element = _put(element, k, np.float32(partials[k * steps + i]), dw, dw)
        dw[i] = element


def drain(pointers: int) -> Callable[[Any], None]:
    """The function that each thread of a call runs: it processes pieces until none is left.

    Its argument is an array: the pieces taken, the rows done, M, the rows of a piece, the address of the kernel, and
    the kernel's pointers.
    """

    def drain(call: Any) -> None:
        M, rows = call[2], call[3]
        first = _take(call) * rows
        while first < M:
            last = min(first + rows, M)
            _invoke(call, pointers, first, last)
            _finish(call, last - first)
            first = _take(call) * rows

    return drain


def wait(call: Any) -> None:
    while _finished(call) < call[2]:
        _yield_processor()
