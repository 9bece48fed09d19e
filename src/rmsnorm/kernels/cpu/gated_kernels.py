"""The arithmetic of gated_reference.py on the CPU, in Numba: one group of a row at a time.

A group is widened to fp32 in buffers on the stack, processed by loops over these, and rounded to its dtype at the end.
The loops are vectorized, and most of the time goes into the exponential. So the dtypes can be arguments of the loops,
and one machine code serves all of them: there are too many combinations to compile each.

A group that is wider than the buffers is processed in tiles. What the second pass over it needs is computed again.
"""

from typing import Any

import numba
import numpy as np
from numba.types import float32, int16, uint16

from rmsnorm.gated_reference import (
    EXP_COEFFICIENTS,
    INVERSE_LN2,
    LARGEST_EXPONENT,
    LEAST_EXPONENT,
    LN2_HIGH,
    LN2_LOW,
    ROUNDER,
)  # fmt: skip
from rmsnorm.kernels.cpu.intrinsics import (
    FIRST,
    SECOND,
    THIRD,
    add,
    add_square,
    buffer,
    fma,
    given,
    nothing,
    power_of_two,
    put,
    seen_as,
    start_of,
    widen,
)  # fmt: skip

# What the kernels call the dtypes.
FP32, BF16, FP16 = 0, 1, 2
# Numbers of a buffer, 32 KB: the groups of published models have up to 8192. A call uses up to 160 KB of stack.
TILE = 8192
C0, C1, C2, C3, C4, C5, C6, C7, C8, C9 = EXP_COEFFICIENTS

_helper = numba.njit(error_model="numpy")
_inlined = numba.njit(error_model="numpy", forceinline=True)

# --- loops over n numbers ------------------------------------------------------------------------------------


@_inlined
def sigmoid(g: float) -> Any:
    """As `gated_reference._sigmoid`."""
    t = -g
    above = t > LARGEST_EXPONENT
    t = LEAST_EXPONENT if t < LEAST_EXPONENT else t
    shifted = t * INVERSE_LN2 + ROUNDER
    n = shifted - ROUNDER
    r = (t - n * LN2_HIGH) - n * LN2_LOW
    p = fma(fma(fma(fma(fma(C9, r, C8), r, C7), r, C6), r, C5), r, C4)
    p = fma(fma(fma(fma(fma(fma(p, r, C3), r, C2), r, C1), r, C0), r, 1.0), r, 1.0)
    return 1.0 / (np.inf if above else 1.0 + p * power_of_two(shifted))


@_helper
def activate(values: Any, n: int, silu: bool) -> None:
    """silu or the sigmoid of the numbers, in their place."""
    if silu:
        for i in range(n):
            t = np.float64(values[i])
            values[i] = np.float32(t * sigmoid(t))
    else:
        for i in range(n):
            values[i] = np.float32(sigmoid(np.float64(values[i])))


@_helper
def activate_with_slope(values: Any, n: int, silu: bool, slopes: Any) -> None:
    """As `activate`, and the derivatives."""
    if silu:
        for i in range(n):
            t = np.float64(values[i])
            sigma = sigmoid(t)
            scaled, rest = t * sigma, 1.0 - sigma
            values[i] = np.float32(scaled)
            slopes[i] = np.float32(sigma + scaled * rest)
    else:
        for i in range(n):
            sigma = sigmoid(np.float64(values[i]))
            values[i] = np.float32(sigma)
            slopes[i] = np.float32(sigma * (1.0 - sigma))


@_helper
def load(source: Any, dtype: int, at: int, n: int, values: Any) -> None:
    """Converts numbers of a tensor to fp32."""
    if dtype == BF16:
        bf16 = seen_as(source, uint16)
        for i in range(n):
            values[i] = widen(bf16[at + i], 0)
    elif dtype == FP16:
        fp16 = seen_as(source, int16)
        for i in range(n):
            values[i] = widen(fp16[at + i], 0)
    else:
        fp32 = seen_as(source, float32)
        for i in range(n):
            values[i] = fp32[at + i]


@_helper
def store(values: Any, n: int, target: Any, dtype: int, at: int) -> None:
    """Rounds the numbers to a tensor's dtype."""
    if dtype == BF16:
        bf16 = seen_as(target, uint16)
        for i in range(n):
            bf16[at + i] = put(nothing(bf16), 0, values[i], bf16, values)
    elif dtype == FP16:
        fp16 = seen_as(target, int16)
        for i in range(n):
            fp16[at + i] = put(nothing(fp16), 0, values[i], fp16, values)
    else:
        fp32 = seen_as(target, float32)
        for i in range(n):
            fp32[at + i] = values[i]


@_helper
def round_to(dtype: int, values: Any, n: int) -> None:
    """Rounds the numbers to a dtype, in their place."""
    if dtype == BF16:
        bf16 = seen_as(values, uint16)
        for i in range(n):
            values[i] = widen(put(nothing(bf16), 0, values[i], bf16, values), 0)
    elif dtype == FP16:
        fp16 = seen_as(values, int16)
        for i in range(n):
            values[i] = widen(put(nothing(fp16), 0, values[i], fp16, values), 0)


@_helper
def multiply(values: Any, n: int, factors: Any) -> None:
    for i in range(n):
        values[i] = values[i] * factors[i]


@_helper
def multiply_by_weight(values: Any, n: int, w: Any, dtype: int, at: int) -> None:
    if dtype == BF16:
        bf16 = seen_as(w, uint16)
        for i in range(n):
            values[i] = widen(bf16[at + i], 0) * values[i]
    elif dtype == FP16:
        fp16 = seen_as(w, int16)
        for i in range(n):
            values[i] = widen(fp16[at + i], 0) * values[i]
    else:
        fp32 = seen_as(w, float32)
        for i in range(n):
            values[i] = fp32[at + i] * values[i]


@_helper
def scale(values: Any, n: int, r: Any) -> None:
    for i in range(n):
        values[i] = values[i] * r


@_helper
def sum_of_squares(values: Any, n: int) -> Any:
    total = 0.0
    for i in range(n):
        total = add_square(total, np.float64(values[i]))
    return total


@_helper
def dot(g: Any, xh: Any, n: int) -> Any:
    """The sum of the fp32 products in fp64."""
    total = 0.0
    for i in range(n):
        total = add(total, np.float64(g[i] * xh[i]))
    return total


# --- the kernels ---------------------------------------------------------------------------------------------
# Absent tensors are null pointers. Outputs are contiguous. Inputs are contiguous in the last dimension only. Row m of a
# layout is group m % groups of a row.
# form: groups, then whether the cast is early, the activation silu, and the gate first, then the dtypes of x, gate, w,
# u = w · xh, and y or dy. A number that a spec does not round has an fp32 u.


@_helper
def weighted(xh: Any, n: int, w: Any, at: int, form: Any) -> None:
    """u = w · xh, in the place of xh."""
    early = form[1] != 0
    if early:
        round_to(form[4], xh, n)
    if given(w):
        multiply_by_weight(xh, n, w, form[6], at)
        if early:
            round_to(form[7], xh, n)


@_helper
def rows_to_normalize(x: Any, at_x: int, gate: Any, at_gate: int, n: int, form: Any, z: Any, factor: Any) -> None:
    """z: x, or x · activation(gate) if the gate is first, which then is in `factor`."""
    load(x, form[4], at_x, n, z)
    if form[3] != 0:
        load(gate, form[5], at_gate, n, factor)
        activate(factor, n, form[2] != 0)
        multiply(z, n, factor)


def gated_forward(
    x: Any, gate: Any, w: Any, y: Any, rstd: Any, layout: Any, form: Any, eps: Any, first: int, last: int
) -> None:  # fmt: skip
    N, groups, gate_first = layout[0], form[0], form[3] != 0
    z, factor = buffer(TILE), buffer(TILE)
    for m in range(first, last):
        at_x, at_gate, column = start_of(layout, FIRST, m), start_of(layout, SECOND, m), m % groups * N
        total = 0.0
        for i in range(0, N, TILE):
            n = min(TILE, N - i)
            rows_to_normalize(x, at_x + i, gate, at_gate + i, n, form, z, factor)
            total += sum_of_squares(z, n)
        r = np.float32(1) / np.float32(np.sqrt(np.float32(total / N) + eps[0]))
        if given(rstd):
            rstd[m] = r
        for i in range(0, N, TILE):
            n = min(TILE, N - i)
            if N > TILE:
                rows_to_normalize(x, at_x + i, gate, at_gate + i, n, form, z, factor)
            scale(z, n, r)
            weighted(z, n, w, column + i, form)
            if not gate_first:
                load(gate, form[5], at_gate + i, n, factor)
                activate(factor, n, form[2] != 0)
                multiply(z, n, factor)
            store(z, n, y, form[8], m * N + i)


@_helper
def operands(
    dy: Any, at_dy: int, x: Any, at_x: int, gate: Any, at_gate: int, n: int, form: Any, r: Any, wants_slope: bool,
    d: Any, xh: Any, factor: Any, slope: Any,
) -> None:  # fmt: skip
    """d: dy, or dy · activation(gate) if the norm is first; xh; the activation of the gate, and its derivative."""
    load(gate, form[5], at_gate, n, factor)
    if wants_slope:
        activate_with_slope(factor, n, form[2] != 0, slope)
    else:
        activate(factor, n, form[2] != 0)
    load(dy, form[8], at_dy, n, d)
    load(x, form[4], at_x, n, xh)
    multiply(xh if form[3] != 0 else d, n, factor)
    scale(xh, n, r)


@_helper
def add_to_dw(d: Any, xh: Any, n: int, form: Any, rounded: Any, dw: Any, at: int) -> None:
    for i in range(n):
        rounded[i] = xh[i]
    if form[1] != 0:
        round_to(form[4], rounded, n)
    for i in range(n):
        dw[at + i] += np.float64(d[i] * rounded[i])


def gated_backward(
    dy: Any, x: Any, gate: Any, w: Any, rstd: Any, dx: Any, dgate: Any, dw: Any, layout: Any, form: Any, first: int,
    last: int,
) -> None:  # fmt: skip
    N, chunk, groups, gate_first = layout[0], layout[1], form[0], form[3] != 0
    wants_dx, wants_dgate, wants_dw = given(dx), given(dgate), given(dw)
    wants_dz = wants_dx or (wants_dgate and gate_first)
    d, xh, factor, slope, dz = buffer(TILE), buffer(TILE), buffer(TILE), buffer(TILE), buffer(TILE)
    for m in range(first, last):
        at_dy, at_x, at_gate = start_of(layout, FIRST, m), start_of(layout, SECOND, m), start_of(layout, THIRD, m)
        column, r = m % groups * N, rstd[m]
        sums = m // chunk * groups * N
        if wants_dw and m % chunk == 0:
            for i in range(groups * N):
                dw[sums + i] = 0.0
        total = 0.0
        for i in range(0, N, TILE):
            n = min(TILE, N - i)
            operands(dy, at_dy + i, x, at_x + i, gate, at_gate + i, n, form, r, wants_dgate, d, xh, factor, slope)
            if wants_dw:
                add_to_dw(d, xh, n, form, dz, dw, sums + column + i)
            if given(w):
                multiply_by_weight(d, n, w, form[6], column + i)
            total += dot(d, xh, n)
        c = np.float32(total / N)
        for i in range(0, N if wants_dx or wants_dgate else 0, TILE):
            n, out = min(TILE, N - i), m * N + i
            if N > TILE:
                operands(dy, at_dy + i, x, at_x + i, gate, at_gate + i, n, form, r, wants_dgate, d, xh, factor, slope)
                if given(w):
                    multiply_by_weight(d, n, w, form[6], column + i)
            if wants_dz:
                for k in range(n):
                    dz[k] = r * (d[k] - xh[k] * c)
            if wants_dx:
                if gate_first:
                    multiply(factor, n, dz)
                    store(factor, n, dx, form[4], out)
                else:
                    store(dz, n, dx, form[4], out)
            if wants_dgate:
                if gate_first:
                    load(x, form[4], at_x + i, n, d)
                    multiply(d, n, dz)
                else:
                    weighted(xh, n, w, column + i, form)
                    load(dy, form[8], at_dy + i, n, d)
                    multiply(d, n, xh)
                multiply(d, n, slope)
                store(d, n, dgate, form[5], out)
