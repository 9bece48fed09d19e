"""The arithmetic of reference.py on the CPU, in Numba: one pass over memory, one row at a time.

The cache of machine code is keyed by the sources that `cache.py` lists: what kernels call must be in one of them.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from rmsnorm.kernels.cpu.intrinsics import (
    FIFTH,
    FIRST,
    FOURTH,
    HEADS,
    MEASURED,
    SECOND,
    THIRD,
    WHOLE,
    add,
    add_square,
    cast,
    finish,
    finished,
    given,
    invoke,
    nothing,
    parts_of,
    put,
    seen_as,
    start_of,
    take,
    widen,
    yield_processor,
)  # fmt: skip

# Absent tensors are null pointers. Outputs are contiguous. Inputs are contiguous in the last dimension only. An element
# holds one or two numbers ("parts"), which divide N. In partial sums, all first parts precede all second.
# sums: only for parts of rows, which begin or finish a row: the sums over the part, which are written if there is no y
# or dx; otherwise the sums over whole rows, which are read.
# spec: eps, the offset, and the cast: 0 is late, 1 early, 2 first. Without an offset it is -0.0, because adding +0.0
# would change a weight of -0.0.


def forward(by_head: bool, sliced: bool) -> Callable[..., None]:
    """The forward kernel.

    by_head: whether each head has its own weight, so that row m has that of head m % heads. sliced: whether the
    statistic is taken over only some of the columns.
    """

    def forward(
        x: Any, residual: Any, w: Any, y: Any, s: Any, rstd: Any, sums: Any, layout: Any, spec: Any, first: int,
        last: int,
    ) -> None:  # fmt: skip
        N, eps, offset, early = layout[0], spec[0], spec[1], spec[2] != 0
        finishes = given(sums) and given(y)
        parts = parts_of(x)
        steps, of_head = N // parts, 0
        measured = layout[MEASURED] if sliced else N
        for m in range(first, last):
            rows, at, out = x, start_of(layout, FIRST, m) // parts, m * steps
            if given(residual):
                other = start_of(layout, SECOND, m) // parts
                for i in range(steps):
                    element = nothing(s)
                    for k in range(parts):
                        element = put(element, k, widen(x[at + i], k) + widen(residual[other + i], k), s, x)
                    s[out + i] = element
                rows, at = s, out
            if by_head:
                of_head = m % layout[HEADS] * steps
            total = 0.0
            if finishes:
                total = sums[m]
            else:
                for i in range(measured // parts):
                    for k in range(parts):
                        total = add_square(total, np.float64(widen(rows[at + i], k)))
            if not given(y):
                sums[m] = total
                continue
            v = np.float32(total / layout[WHOLE]) + eps
            r = np.float32(1) / np.float32(math.sqrt(v))
            if given(rstd):
                rstd[m] = r
            if spec[2] == 2:
                r = cast(r, x)
            for i in range(steps):
                element = nothing(y)
                for k in range(parts):
                    h = widen(rows[at + i], k) * r
                    scale = widen(w[of_head + i], k)
                    scaled = scale * cast(h, x) if early else (scale + offset) * h
                    element = put(element, k, scaled, y, w)
                y[out + i] = element

    return forward


def backward(dys: int, round_first: bool, by_head: bool, sliced: bool) -> Callable[..., None]:
    """The backward kernel for a sum of `dys` gradients of y.

    dx is rounded before ds is added if `round_first`; by_head, sliced: as in `forward`.
    """
    strides_of_ds = (THIRD, FOURTH, FIFTH)[dys - 1]

    def backward(
        dy: Any, dy2: Any, dy3: Any, ds: Any, x: Any, w: Any, rstd: Any, dx: Any, dw: Any, sums: Any, layout: Any,
        spec: Any, first: int, last: int,
    ) -> None:  # fmt: skip
        N, chunk, wants_dw, adds = layout[0], layout[1], given(dw), given(ds)
        finishes = given(sums) and given(dx)
        offset, early = spec[1], spec[2] != 0
        parts = parts_of(x)
        steps, columns, of_head = N // parts, N, 0  # columns: of dw
        if by_head:
            columns *= layout[HEADS]
        measured = layout[MEASURED] if sliced else N
        a2, a3 = 0, 0
        for m in range(first, last):
            a, b = start_of(layout, FIRST, m) // parts, start_of(layout, SECOND, m) // parts
            if dys > 1:
                a2 = start_of(layout, THIRD, m) // parts
            if dys > 2:
                a3 = start_of(layout, FOURTH, m) // parts
            out, share = m * steps, m // chunk * columns
            r = rstd[m]
            if wants_dw and m % chunk == 0:
                for i in range(columns):
                    dw[share + i] = 0.0
            if by_head:
                of_head = m % layout[HEADS] * steps
            total = 0.0
            for i in range(steps if wants_dw or not finishes else 0):
                for k in range(parts):
                    d, xh = widen(dy[a + i], k), widen(x[b + i], k) * r
                    if dys > 1:
                        d = cast(d + widen(dy2[a2 + i], k), dy)
                    if dys > 2:
                        d = cast(d + widen(dy3[a3 + i], k), dy)
                    total = add(total, np.float64((d * (widen(w[of_head + i], k) + offset)) * xh))
                    if wants_dw:
                        column = k * (columns // parts) + of_head + i
                        dw[share + column] += np.float64(d * (cast(xh, x) if early else xh))
            if given(sums) and not finishes:
                sums[m] = total
            if given(dx):
                c = np.float32(((sums[m] + 0.0) if finishes else total) / layout[WHOLE])
                other = start_of(layout, strides_of_ds, m) // parts
                for i in range(steps):
                    element = nothing(dx)
                    for k in range(parts):
                        d, xh = widen(dy[a + i], k), widen(x[b + i], k) * r
                        if dys > 1:
                            d = cast(d + widen(dy2[a2 + i], k), dy)
                        if dys > 2:
                            d = cast(d + widen(dy3[a3 + i], k), dy)
                        through = xh * c
                        if sliced and i >= measured // parts:
                            through = np.float32(0)
                        t = r * (d * (widen(w[of_head + i], k) + offset) - through)
                        if round_first:
                            t = widen(put(nothing(dx), 0, t, dx, w), 0)
                        element = put(element, k, t + widen(ds[other + i], k) if adds else t, dx, w)
                    dx[out + i] = element

    return backward


def sum_chunks(partials: Any, dw: Any, chunks: int, N: int) -> None:
    for chunk in range(1, chunks):
        for i in range(N):
            partials[i] += partials[chunk * N + i]
    parts, source = parts_of(dw), seen_as(partials, types.float32)  # an fp32 gate can have made any NaN
    steps = N // parts
    for i in range(steps):
        element = nothing(dw)
        for k in range(parts):
            element = put(element, k, np.float32(partials[k * steps + i]), dw, source)
        dw[i] = element


def drain(pointers: int) -> Callable[[Any], None]:
    """The function that each thread of a call runs: it processes pieces until none is left.

    Its argument is an array: the pieces taken, the rows done, M, the rows of a piece, the address of the kernel, and
    the kernel's pointers.
    """

    def drain(call: Any) -> None:
        M, rows = call[2], call[3]
        first = take(call) * rows
        while first < M:
            last = min(first + rows, M)
            invoke(call, pointers, first, last)
            finish(call, last - first)
            first = take(call) * rows

    return drain


def wait(call: Any) -> None:
    while finished(call) < call[2]:
        yield_processor()
