"""The arithmetic of reference.py on the CPU, in Numba: one pass over memory, a row at a time.

A kernel is compiled for what its pointers point to: float32 is itself, uint16 is bf16, int16 is fp16 (Numba has
no type for either on a CPU). Kernels and their helpers share this file because Numba's cache of compiled code
does not notice an edit in another one. No function carries `fastmath`: the one instruction that may be reordered
or fused, the addition into an fp64 sum, says so itself (`_add_square`, `_add`).
"""

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import filelock
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic
from torch import Tensor

from rmsnorm.kernels import threads
from rmsnorm.kernels.rows import walk, walked

NAME = "cpu kernel (Numba)"

# --- what the kernels are written in -------------------------------------------------------------------------

_I16, _I32 = ir.IntType(16), ir.IntType(32)


@intrinsic
def _widen(typing_context: Any, value: Any) -> Any:
    """The element as fp32, exactly."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if value == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(args[0], _I32), _I32(16)), ir.FloatType())
        if value == types.int16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
        return args[0]

    return types.float32(value), code


@intrinsic
def _narrow(typing_context: Any, value: Any, pointer: Any, source: Any) -> Any:
    """The fp32 value rounded to nearest even to what the pointer points to.

    bf16 is rounded by bits. A NaN that stems from bf16 or from the processor has only zeros in its low 16 bits, so
    the addition cannot carry it away; one that stems from an fp32 source can have others, and is kept by hand.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if pointer.dtype == types.uint16:
            bits = builder.bitcast(args[0], _I32)
            odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
            rounded = builder.add(builder.add(bits, _I32(0x7FFF)), odd)
            if source.dtype == types.float32:
                rounded = builder.select(builder.fcmp_unordered("uno", args[0], args[0]), _I32(0x7FC00000), rounded)
            return builder.trunc(builder.lshr(rounded, _I32(16)), _I16)
        if pointer.dtype == types.int16:
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), _I16)
        return args[0]

    return pointer.dtype(types.float32, pointer, source), code


@intrinsic
def _add_square(typing_context: Any, total: Any, value: Any) -> Any:
    """total + value², in any order; the square of an fp32 number is exact in fp64, so fusing changes nothing."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        square = builder.fmul(args[1], args[1], flags=("contract",))
        return builder.fadd(args[0], square, flags=("reassoc", "contract"))

    return types.float64(types.float64, types.float64), code


@intrinsic
def _add(typing_context: Any, total: Any, value: Any) -> Any:
    """total + value, in any order."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(args[0], args[1], flags=("reassoc",))

    return types.float64(types.float64, types.float64), code


@intrinsic
def _given(typing_context: Any, pointer: Any) -> Any:
    """Whether the pointer is not null: what is absent is passed as null."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.icmp_unsigned("!=", args[0], ir.Constant(args[0].type, None))

    return types.boolean(pointer), code


# --- the kernels ---------------------------------------------------------------------------------------------
# Pointers: what is absent is null. Outputs are contiguous; of the inputs only the last dimension is, and `layout`
# holds N, the rows of a chunk, the two inner sizes of the rows' three dimensions, and three strides for each of them.
# offset: -0.0 where there is none, the one number whose addition changes no weight.

_FIRST, _SECOND, _THIRD = 4, 7, 10


@numba.njit(error_model="numpy")
def _start(layout: Any, strides: int, m: int) -> Any:
    """Where row m of an input begins, in elements."""
    middle, inner = layout[2], layout[3]
    if m < inner:
        return m * layout[strides + 2]
    outer, rest = m // (middle * inner), m // inner
    return outer * layout[strides] + rest % middle * layout[strides + 1] + m % inner * layout[strides + 2]


def _forward(
    x: Any, residual: Any, w: Any, y: Any, s: Any, rstd: Any, layout: Any, first: int, last: int,
    eps: float, offset: float, early: bool,
) -> None:  # fmt: skip
    N = layout[0]
    for m in range(first, last):
        rows, at, out = x, _start(layout, _FIRST, m), m * N
        if _given(residual):
            other = _start(layout, _SECOND, m)
            for i in range(N):
                s[out + i] = _narrow(_widen(x[at + i]) + _widen(residual[other + i]), s, x)
            rows, at = s, out
        total = 0.0
        for i in range(N):
            total = _add_square(total, np.float64(_widen(rows[at + i])))
        v = np.float32(total / N) + eps
        r = np.float32(1) / np.float32(math.sqrt(v))
        if _given(rstd):
            rstd[m] = r
        if early:
            for i in range(N):
                y[out + i] = _narrow(_widen(w[i]) * _widen(_narrow(_widen(rows[at + i]) * r, x, x)), y, w)
        else:
            for i in range(N):
                y[out + i] = _narrow((_widen(w[i]) + offset) * (_widen(rows[at + i]) * r), y, w)


def _backward(
    dy: Any, ds: Any, x: Any, w: Any, rstd: Any, dx: Any, dw: Any, layout: Any, first: int, last: int,
    offset: float, early: bool,
) -> None:  # fmt: skip
    N, chunk, wants_dw, adds = layout[0], layout[1], _given(dw), _given(ds)
    for m in range(first, last):
        a, b, out, part = _start(layout, _FIRST, m), _start(layout, _SECOND, m), m * N, m // chunk * N
        r = rstd[m]
        if _given(dw) and m % chunk == 0:
            for i in range(N):
                dw[part + i] = 0.0
        total = 0.0
        for i in range(N):
            d, xh = _widen(dy[a + i]), _widen(x[b + i]) * r
            total = _add(total, np.float64((d * (_widen(w[i]) + offset)) * xh))
            if wants_dw:
                dw[part + i] += np.float64(d * (_widen(_narrow(xh, x, x)) if early else xh))
        if _given(dx):
            c = np.float32(total / N)
            other = _start(layout, _THIRD, m)
            for i in range(N):
                g, xh = _widen(dy[a + i]) * (_widen(w[i]) + offset), _widen(x[b + i]) * r
                t = r * (g - xh * c)
                dx[out + i] = _narrow(t + _widen(ds[other + i]) if adds else t, dx, w)


def _sum_chunks(partials: Any, dw: Any, chunks: int, N: int) -> None:
    for chunk in range(1, chunks):
        for i in range(N):
            partials[i] += partials[chunk * N + i]
    for i in range(N):
        dw[i] = _narrow(np.float32(partials[i]), dw, dw)


# --- compiling them ------------------------------------------------------------------------------------------

_ELEMENT = {torch.float32: types.float32, torch.bfloat16: types.uint16, torch.float16: types.int16}
_P, _L, _F, _B = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_bool


@functools.cache
def _compiled(kernel: Callable[..., None], *pointees: Any) -> Callable[..., None]:
    """The kernel as machine code: pointers to these types first, then the arguments its kind takes.

    Called through ctypes, which releases the GIL, with addresses as plain integers. Compiled code is kept in
    Numba's cache; a lock keeps processes that compile at once from pairing an index with another one's code.
    """
    pointers = [types.CPointer(pointee) for pointee in pointees]
    integers = [types.int64] * 2
    floats = {_forward: [types.float32] * 2, _backward: [types.float32], _sum_chunks: []}[kernel]
    flag = [] if kernel is _sum_chunks else [types.boolean]
    signature = types.void(*pointers, *integers, *floats, *flag)
    code = _cached(kernel, signature) or numba.cfunc(signature, error_model="numpy")(kernel)
    prototype = ctypes.CFUNCTYPE(None, *[_P] * len(pointers), _L, _L, *[_F] * len(floats), *[_B] * len(flag))
    function = prototype(code.address)
    function.keeps = code  # type: ignore[attr-defined]  # the machine code lives as long as this object
    return function


def _cached(kernel: Callable[..., None], signature: Any) -> Any:
    """The kernel from Numba's cache or compiled into it; None where no folder can be written or a file is damaged."""
    try:
        folder = FunctionCache(kernel).cache_path
        with filelock.FileLock(f"{folder}/rmsnorm.lock", timeout=60):
            return numba.cfunc(signature, cache=True, error_model="numpy")(kernel)
    except Exception:  # noqa: BLE001  # whatever ails the cache, a compilation without it says what is wrong
        return None


class _Types(NamedTuple):
    """What the kernels read the weight as, the input's dtype or fp32, and what y is."""

    w: torch.dtype
    y: torch.dtype


def _types(x: torch.dtype, w: torch.dtype | None, cast: str) -> _Types:
    read = x if w is None or w == x else torch.float32
    return _Types(read, torch.promote_types(x, read) if cast == "early" else x)


@functools.cache
def _forward_kernel(x: torch.dtype, w: torch.dtype | None, cast: str) -> tuple[Callable[..., None], _Types]:
    read = _types(x, w, cast)
    X, W, Y = _ELEMENT[x], _ELEMENT[read.w], _ELEMENT[read.y]
    return _compiled(_forward, X, X, W, Y, X, types.float32, types.int64), read


@functools.cache
def _backward_kernel(x: torch.dtype, w: torch.dtype | None, cast: str) -> tuple[Callable[..., None], _Types]:
    read = _types(x, w, cast)
    X, W, Y = _ELEMENT[x], _ELEMENT[read.w], _ELEMENT[read.y]
    return _compiled(_backward, Y, X, X, W, types.float32, X, types.float64, types.int64), read


@functools.cache
def _sum_kernel(w: torch.dtype) -> Callable[..., None]:
    return _compiled(_sum_chunks, types.float64, _ELEMENT[w])


# --- launching them ------------------------------------------------------------------------------------------

# A call below this many elements takes less time than waking a thread (60 us at 0.25 ns an element).
_CHUNK = 1 << 17
# What bounds the partial sums of dw: 8 bytes a column for every chunk of rows.
_MOST_CHUNKS, _FEWEST_ROWS = 256, 32


class _Plan(NamedTuple):
    """How the rows of some shape and strides are walked. A pure function of both, never of the thread count."""

    M: int
    N: int
    rows: int  # a chunk
    chunks: int
    layout: int  # address
    keeps: Any


@functools.lru_cache(4096)
def _plan(shape: Sequence[int], *strides: Sequence[int]) -> _Plan | None:
    """As `rows.walk`, with the rows cut into chunks."""
    found = walk(shape, *strides)
    if found is None:
        return None
    M, N = found.M, found.N
    rows = max(_FEWEST_ROWS, -(-_CHUNK // N), -(-M // _MOST_CHUNKS))
    sizes = found.sizes if found.strided else (1, M)
    steps = [step for of_one in found.steps for step in of_one]
    values = [N, rows, *sizes, *steps, *[0] * (9 - len(steps))]
    layout = (ctypes.c_int64 * len(values))(*values)
    return _Plan(M, N, rows, -(-M // rows), ctypes.addressof(layout), layout)


def refuses(x: torch.dtype, residual: torch.dtype | None, w: torch.dtype | None) -> str | None:
    """Why tensors of these dtypes must run the reference; None if the kernels take them."""
    for name, dtype in (("x", x), ("residual", residual), ("weight", w)):
        if dtype is not None and dtype not in _ELEMENT:
            return f"{name} is {dtype}: computed in fp32 and returned as {dtype} by plain torch"
    return None


def forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: str, offset: float, with_rstd: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `reference.forward`."""
    if residual is not None and residual.dtype != x.dtype:
        rows = (x + residual).contiguous()
        y, _, rstd = forward(rows, None, w, eps, cast, offset, with_rstd)
        return y, rows, rstd
    kernel, read = _forward_kernel(x.dtype, None if w is None else w.dtype, cast)
    s: Tensor | None = None
    if residual is None:
        plan, (x,) = walked(_plan, x)
    else:
        plan, (x, residual) = walked(_plan, x, residual)
        s = _new(x, x.dtype)
    w = _readable(w, plan.N, read)
    y = _new(x, read.y)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device="cpu") if with_rstd else None
    addresses = (
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        w.data_ptr(),
        y.data_ptr(),
        None if s is None else s.data_ptr(),
        None if rstd is None else rstd.data_ptr(),
        plan.layout,
    )
    scalars = (eps, offset or -0.0, cast == "early")
    if plan.chunks == 1:
        kernel(*addresses, 0, plan.M, *scalars)
    else:
        threads.run(lambda a, b: kernel(*addresses, a * plan.rows, min(b * plan.rows, plan.M), *scalars), plan.chunks)
    return y, s, rstd


def backward(
    dy: Tensor,
    ds: Tensor | None,
    x: Tensor,
    w: Tensor | None,
    rstd: Tensor,
    cast: str,
    offset: float,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """As `reference.backward`; dw is summed in fp64 over the chunks of the plan, and then over them in order."""
    kernel, read = _backward_kernel(x.dtype, None if w is None else w.dtype, cast)
    plan, (dy, x, *rest) = walked(_plan, dy.to(read.y), x, *(() if ds is None else (ds.to(x.dtype),)))
    scale = _readable(w, plan.N, read)
    rstd = rstd.contiguous()
    dx = _new(x, x.dtype) if need_dx else None
    partials = torch.empty(plan.chunks, plan.N, dtype=torch.float64, device="cpu") if need_dw else None
    addresses = (
        dy.data_ptr(),
        rest[0].data_ptr() if rest else None,
        x.data_ptr(),
        scale.data_ptr(),
        rstd.data_ptr(),
        None if dx is None else dx.data_ptr(),
        None if partials is None else partials.data_ptr(),
        plan.layout,
    )
    scalars = (offset or -0.0, cast == "early")
    threads.run(lambda a, b: kernel(*addresses, a * plan.rows, min(b * plan.rows, plan.M), *scalars), plan.chunks)
    if w is None or partials is None:
        return dx, None
    if plan.chunks == 0:
        return dx, torch.zeros_like(w)
    dw = torch.empty(plan.N, dtype=read.w, device="cpu")
    _sum_kernel(read.w)(partials.data_ptr(), dw.data_ptr(), plan.chunks, plan.N)
    return dx, dw.to(w.dtype)


def _readable(w: Tensor | None, N: int, read: _Types) -> Tensor:
    """The weight as the kernels read it; ones in place of none, which change no bit."""
    if w is None:
        return torch.ones(N, dtype=read.w, device="cpu")
    return w.to(read.w).contiguous()


def _new(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous memory of x's shape, by whichever call is faster."""
    if dtype == x.dtype and x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty(x.shape, dtype=dtype, device="cpu")
