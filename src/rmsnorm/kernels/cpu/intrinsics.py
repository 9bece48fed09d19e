"""What the CPU kernels are made of: Numba intrinsics for elements, sums and threads, and where rows begin.

Kernels are compiled for the element types of their pointers. float32 stands for itself, uint16 for bf16, int16 for
fp16 (Numba has neither type on a CPU), and uint32 for a pair of bf16 numbers, which takes fewer instructions than
two single ones. No function uses `fastmath`; only the additions into an fp64 sum may be reordered or fused, and carry
those flags themselves (`add_square`, `add`).
"""

import os
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

# --- intrinsics ----------------------------------------------------------------------------------------------

_I16, _I32 = ir.IntType(16), ir.IntType(32)


@intrinsic
def parts_of(typing_context: Any, pointer: Any) -> Any:
    """How many numbers one element holds, 1 or 2, as a compile-time constant."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.IntType(64)(2 if pointer.dtype == types.uint32 else 1)

    return types.int64(pointer), code


@intrinsic
def nothing(typing_context: Any, pointer: Any) -> Any:
    """An element of zeros."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(pointer.dtype), 0)

    return pointer.dtype(pointer), code


@intrinsic
def widen(typing_context: Any, element: Any, part: Any) -> Any:
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
def cast(typing_context: Any, value: Any, pointer: Any) -> Any:
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
def put(typing_context: Any, element: Any, part: Any, value: Any, pointer: Any, source: Any) -> Any:
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
def add_square(typing_context: Any, total: Any, value: Any) -> Any:
    """total + value²; additions may be reordered. An fp32 number's square is exact in fp64, so fusing is harmless."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        square = builder.fmul(args[1], args[1], flags=("contract",))
        return builder.fadd(args[0], square, flags=("reassoc", "contract"))

    return types.float64(types.float64, types.float64), code


@intrinsic
def add(typing_context: Any, total: Any, value: Any) -> Any:
    """total + value; additions may be reordered."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(args[0], args[1], flags=("reassoc",))

    return types.float64(types.float64, types.float64), code


@intrinsic
def given(typing_context: Any, pointer: Any) -> Any:
    """Whether the pointer is not null: absent tensors pass a null pointer."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.icmp_unsigned("!=", args[0], ir.Constant(args[0].type, None))

    return types.boolean(pointer), code


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float64(types.float64, types.float64, types.float64), code


@intrinsic
def power_of_two(typing_context: Any, shifted: Any) -> Any:
    """2^n for a number n + 1.5 · 2^52, which has n in its last bits."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        exponent = builder.add(builder.bitcast(args[0], word), word(1023))
        return builder.bitcast(builder.shl(exponent, word(52)), ir.DoubleType())

    return types.float64(types.float64), code


@intrinsic
def seen_as(typing_context: Any, pointer: Any, number: Any) -> Any:
    """The pointer as one to elements of the type `number`."""
    result = types.CPointer(number.instance_type)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(result))

    return result(pointer, number), code


@intrinsic(prefer_literal=True)
def buffer(typing_context: Any, length: Any) -> Any:
    """Memory on the stack for `length` fp32 numbers, a constant, until the calling function returns."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return cgutils.alloca_once(builder, ir.FloatType(), size=ir.IntType(64)(length.literal_value))

    return types.CPointer(types.float32)(length), code


@intrinsic
def take(typing_context: Any, counter: Any) -> Any:
    """Atomically increments the counter and returns its previous value, so no two threads get the same."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], ir.IntType(64)(1), "monotonic")

    return types.int64(counter), code


@intrinsic
def finish(typing_context: Any, call: Any, rows: Any) -> Any:
    """Adds the rows of a finished piece to the count, with release semantics: who reads the count sees the rows."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.atomic_rmw("add", builder.gep(args[0], [ir.IntType(64)(1)]), args[1], "release")
        return context.get_dummy_value()

    return types.void(call, rows), code


@intrinsic
def finished(typing_context: Any, call: Any) -> Any:
    """How many rows are done, with acquire semantics."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.gep(args[0], [ir.IntType(64)(1)]), "acquire", 8)

    return types.int64(call), code


@intrinsic
def yield_processor(typing_context: Any) -> Any:
    """Yields the processor to another thread if one is waiting."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if os.name == "posix":
            builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I32, []), "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), code


@intrinsic(prefer_literal=True)
def invoke(typing_context: Any, call: Any, pointers: Any, first: Any, last: Any) -> Any:
    """Runs the kernel at address call[4], with the pointers that follow it, for rows first to last - 1."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(64)
        address, *values = (
            builder.load(builder.gep(args[0], [word(4 + i)])) for i in range(1 + pointers.literal_value)
        )
        kernel = ir.FunctionType(ir.VoidType(), [byte] * len(values) + [word] * 2).as_pointer()
        addresses = [builder.inttoptr(value, byte) for value in values]
        builder.call(builder.inttoptr(address, kernel), [*addresses, args[2], args[3]])
        return context.get_dummy_value()

    return types.void(call, pointers, first, last), code


# --- where rows begin ----------------------------------------------------------------------------------------
# The layout of a call holds N, the rows of a chunk, the two inner sizes of the rows' three dimensions, and from FIRST
# on three strides for each input. HEADS: how many rows one after the other have different weights. MEASURED: over how
# many columns the statistic is taken. WHOLE: by how many it is divided: more if a call takes a part of rows.

FIRST, SECOND, THIRD, FOURTH, FIFTH, HEADS, MEASURED, WHOLE = 4, 7, 10, 13, 16, 19, 20, 21


@numba.njit(error_model="numpy")
def start_of(layout: Any, strides: int, m: int) -> Any:
    """Where row m of an input begins, in elements."""
    middle, inner = layout[2], layout[3]
    if m < inner:
        return m * layout[strides + 2]
    outer, rest = m // (middle * inner), m // inner
    return outer * layout[strides] + rest % middle * layout[strides + 1] + m % inner * layout[strides + 2]
