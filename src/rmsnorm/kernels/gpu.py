# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code="assignment, var-annotated"
"""The arithmetic of reference.py on the GPU, in Triton.

Each kernel is launched with `enable_fp_fusion=False`: a product and a sum fused into one instruction would round
once where the arithmetic rounds twice. `div_rn` and `sqrt_rn` are the IEEE ones; `/` is only used in fp64, where it
is one too. What is absent is passed as None, and its code is not compiled.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from rmsnorm.kernels import launch
from rmsnorm.kernels.driver import Slot, TritonLaunch
from rmsnorm.kernels.launch import Gpu, Launch
from rmsnorm.kernels.plan import MOST_PLANS, Backward, Converted, Forward, Fresh, Plan, TensorKind, laid_out, summands
from rmsnorm.kernels.rows import Walk, walk

NAME = "gpu kernel (Triton)"
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # before Triton 3.7

# --- the kernels ---------------------------------------------------------------------------------------------
# m: rows, n: columns, in 64 bits where they become an address. Outputs are contiguous; of the inputs only the last
# dimension is, and `sizes` and `*_steps` say where a row begins (see rows.Walk).
# offset: -0.0 where there is none, the one number whose addition changes no weight.


@triton.jit
def _start(m, sizes, steps, STRIDED: tl.constexpr):
    """Where row m of an input begins, in elements."""
    if STRIDED:
        middle, inner = sizes[0], sizes[1]
        j = m // inner
        i = j // middle
        at = i * steps[0] + (j - i * middle) * steps[1] + (m - j * inner) * steps[2]
    else:
        at = m * steps[2]
    return at


@triton.jit
def _load(pointer, inside):
    """The elements as fp32, exactly; zero outside."""
    return tl.load(pointer, inside, 0.0).to(tl.float32)


@triton.jit
def _rstd(S, N, eps):
    """1 / sqrt(S / N + eps): four correctly rounded steps after the sum in fp64."""
    v = (S / N).to(tl.float32) + eps
    return tl.div_rn(1.0, tl.sqrt_rn(v))


@triton.jit
def _cast(h, X: tl.constexpr):
    """h rounded to the dtype X, and back to fp32."""
    if X == tl.bfloat16:  # noqa: SIM300
        # Triton rounds one by one, with an instruction of a sixteenth of the others' rate; here two at a time.
        h = tl.inline_asm_elementwise(
            "{ .reg .b32 two; cvt.rn.bf16x2.f32 two, $3, $2; shl.b32 $0, two, 16; and.b32 $1, two, 0xffff0000; }",
            "=r,=r,r,r", [h], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        h = h.to(X).to(tl.float32)
    return h


@triton.jit
def _output(h, w, offset, X: tl.constexpr, Y: tl.constexpr, EARLY: tl.constexpr):
    """y from h = x·rstd, for x of dtype X and y of dtype Y."""
    if w is None:
        y = h.to(X)
    elif EARLY:
        y = (w.to(tl.float32) * _cast(h, X)).to(Y)
    else:
        y = ((w.to(tl.float32) + offset) * h).to(Y)
    return y


@triton.jit
def _times_scale(dy, w, offset, EARLY: tl.constexpr):
    """dy times what x·rstd was multiplied by: the weight plus the offset, or nothing."""
    g = dy.to(tl.float32)
    if w is not None:
        g = g * (w.to(tl.float32) if EARLY else w.to(tl.float32) + offset)
    return g


@triton.jit
def _mean(S, N, inverse):
    """S / N in fp64, correctly rounded, and then in fp32; N and its inverse are fp64.

    In a loop this is faster than `/`: 1 / N is taken once, and the remainder, exact since N has few digits, mends the
    quotient (Markstein).
    """
    q = S * inverse
    mended = tl.fma(tl.fma(-q, N, S), inverse, q)
    return tl.where(tl.abs(S) < float("inf"), mended, S).to(tl.float32)


@triton.jit(do_not_specialize=["size"])
def _no_shares_yet(shares, size, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr):
    """Prepares the exchange below. The kernel that needs it may start meanwhile, and waits to hand anything in."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(shares + i, tl.full([BLOCK_N], -1, tl.int64), i < size)


@triton.jit
def _whole(S, shares, part, parts, PARTS: tl.constexpr):
    """The sums over rows whose `parts` programs each hold a share: hand in one's own, wait for the others.

    A share is one 8-byte store and needs no fence; -1, a NaN that no arithmetic makes, means that it is still missing.
    The programs of a row have consecutive numbers and are few, so all of them run at once and none waits for ever.
    """
    tl.atomic_xchg(shares + part, S.to(tl.int64, bitcast=True), sem="relaxed")
    p = tl.arange(0, PARTS)[None, :]
    found = tl.load(shares + p, p < parts, 0, volatile=True)
    while tl.sum((found == -1).to(tl.int32)) > 0:
        found = tl.load(shares + p, p < parts, 0, volatile=True)
    return tl.sum(found.to(tl.float64, bitcast=True), axis=1, keep_dims=True)


@triton.jit
def _packed(row):
    """The row as memory has it. Without this its fp32 copy is kept over a wait, in twice the registers."""
    if row.dtype.primitive_bitwidth == 16:
        row = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [row], dtype=row.dtype, is_pure=True, pack=2)
    return row


# A row is held in PIECES of BLOCK_N columns, so that a width far from a power of two leaves few threads idle.


@triton.jit(do_not_specialize=["M"])
def _forward_block(
    x, residual, w, y, s, rstd, shares, M, N, parts, sizes, x_steps, residual_steps, eps, offset,
    EARLY: tl.constexpr, STRIDED: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, read once; or, with PARTS > 1, one part of a row."""
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    m = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    first = part * (PIECES * BLOCK_N) + tl.arange(0, BLOCK_N)[None, :]
    row = ()
    for k in tl.static_range(PIECES):
        n = first + k * BLOCK_N
        row += (tl.load(x + _start(m, sizes, x_steps, STRIDED) + n, (m < M) & (n < N), 0.0),)
    if residual is not None:
        total = ()
        for k in tl.static_range(PIECES):
            n = first + k * BLOCK_N
            other = _load(residual + _start(m, sizes, residual_steps, STRIDED) + n, (m < M) & (n < N))
            total += ((row[k].to(tl.float32) + other).to(x.dtype.element_ty),)
        row = total
        for k in tl.static_range(PIECES):
            n = first + k * BLOCK_N
            tl.store(s + m * N + n, row[k], (m < M) & (n < N))
    squares = tl.zeros([ROWS, BLOCK_N], tl.float64)
    for k in tl.static_range(PIECES):
        d = row[k].to(tl.float32).to(tl.float64)
        squares = tl.fma(d, d, squares)  # the square is exact, so fusing changes nothing
    S = tl.sum(squares, axis=1, keep_dims=True)
    if PARTS > 1:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        S = _whole(S, shares + m * parts, part, parts, PARTS)
        packed = ()
        for k in tl.static_range(PIECES):
            packed += (_packed(row[k]),)
        row = packed
    r = _rstd(S, N, eps)
    if rstd is not None:
        tl.store(rstd + m, r, m < M)
    for k in tl.static_range(PIECES):
        n = first + k * BLOCK_N
        h = row[k].to(tl.float32) * r
        weight = None if w is None else tl.load(w + n, n < N, 0.0)
        out = _output(h, weight, offset, x.dtype.element_ty, y.dtype.element_ty, EARLY)
        tl.store(y + m * N + n, out, (m < M) & (n < N))


@triton.jit(do_not_specialize=["M"])
def _forward_loop(
    x, residual, w, y, s, rstd, M, N, sizes, x_steps, residual_steps, eps, offset,
    EARLY: tl.constexpr, STRIDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row a program, in pieces: read once for the sum and again for y."""
    m = tl.program_id(0).to(tl.int64)
    rows = x + _start(m, sizes, x_steps, STRIDED)
    squares = tl.zeros([BLOCK_N], tl.float64)
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        row = tl.load(rows + n, n < N, 0.0)
        if residual is not None:
            other = _load(residual + _start(m, sizes, residual_steps, STRIDED) + n, n < N)
            row = (row.to(tl.float32) + other).to(row.dtype)
            tl.store(s + m * N + n, row, n < N)
        d = row.to(tl.float32).to(tl.float64)
        squares = tl.fma(d, d, squares)  # the square is exact, so fusing changes nothing
    r = _rstd(tl.sum(squares, axis=0), N, eps)
    if rstd is not None:
        tl.store(rstd + m, r)
    if residual is not None:
        rows = s + m * N
        tl.debug_barrier()  # threads read what other threads have written
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        h = _load(rows + n, n < N) * r
        weight = None if w is None else tl.load(w + n, n < N, 0.0)
        tl.store(y + m * N + n, _output(h, weight, offset, x.dtype.element_ty, y.dtype.element_ty, EARLY), n < N)


@triton.jit
def _inside(n, N, k, PIECES: tl.constexpr, PARTS: tl.constexpr):
    """Which columns of piece k the row has: if one program holds a row, only its last piece can end early."""
    return n < N if PARTS > 1 or k == PIECES - 1 else n >= 0


@triton.jit
def _load_rows(
    t, m, n, M, N, sizes, steps,
    STRIDED: tl.constexpr, PARTS: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The pieces of rows of t; zero below the last row."""
    row = ()
    for k in tl.static_range(PIECES):
        inside = (m < M) & _inside(n + k * BLOCK_N, N, k, PIECES, PARTS)
        row += (tl.load(t + _start(m, sizes, steps, STRIDED) + n + k * BLOCK_N, inside, 0.0),)
    return row


@triton.jit
def _turns(M, program, programs, ROWS: tl.constexpr):
    """How many tiles of ROWS rows are the program's: every so many. Nothing here passes M, which may end 32 bits."""
    return (M - 1) // ROWS // programs + ((M - 1) // ROWS % programs >= program).to(tl.int32)


@triton.jit(do_not_specialize=["M", "programs"])
def _backward_block(
    dy, ds, x, w, rstd, dx, partials, shares, M, N, parts, programs, sizes, dy_steps, ds_steps, x_steps, offset,
    EARLY: tl.constexpr, STRIDED: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """dx of every so many tiles of ROWS rows, and their share of dw; with PARTS > 1, of one part of each row.

    With STAGES > 1 the next tiles are loaded into shared memory while this one is worked on. At any time all programs
    are at neighbouring tiles: memory is faster so than with a stretch of rows for each.
    """
    program, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    n = part * (PIECES * BLOCK_N) + tl.arange(0, BLOCK_N)[None, :]
    dw = ()
    weight = ()
    for k in tl.static_range(PIECES):
        dw += (tl.zeros([ROWS, BLOCK_N], tl.float32),)
        if w is not None:
            weight += (tl.load(w + n + k * BLOCK_N, n + k * BLOCK_N < N, 0.0),)
    width = tl.full([ROWS, 1], N, tl.float64)
    inverse = 1.0 / width
    if PARTS > 1 and OVERLAP:
        tl.extra.cuda.gdc_wait()
    for turn in tl.range(0, _turns(M, program, programs, ROWS), num_stages=STAGES):
        m = (program + turn * programs).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        dy_row = _load_rows(dy, m, n, M, N, sizes, dy_steps, STRIDED, PARTS, PIECES, BLOCK_N)
        x_row = _load_rows(x, m, n, M, N, sizes, x_steps, STRIDED, PARTS, PIECES, BLOCK_N)
        if ds is not None and STAGES > 1:
            ds_row = _load_rows(ds, m, n, M, N, sizes, ds_steps, STRIDED, PARTS, PIECES, BLOCK_N)
        r = tl.load(rstd + m, m < M, 0.0)
        products = tl.zeros([ROWS, BLOCK_N], tl.float64)
        for k in tl.static_range(PIECES):
            xh = _xh(x_row[k], r, _inside(n + k * BLOCK_N, N, k, PIECES, PARTS))
            g = _times_scale(dy_row[k], None if w is None else weight[k], offset, EARLY)
            products += (g * xh).to(tl.float64)
        S = tl.sum(products, axis=1, keep_dims=True)
        if PARTS > 1:
            S = _whole(S, shares + m * parts, part, parts, PARTS)
        c = _mean(S + 0.0, width, inverse)  # +0.0, never -0.0
        if ds is not None and STAGES == 1:  # not before, which takes more registers than there are
            ds_row = _load_rows(ds, m, n, M, N, sizes, ds_steps, STRIDED, PARTS, PIECES, BLOCK_N)
        summed = ()
        for k in tl.static_range(PIECES):
            inside = _inside(n + k * BLOCK_N, N, k, PIECES, PARTS)
            xh = _xh(x_row[k], r, inside)
            g = _times_scale(dy_row[k], None if w is None else weight[k], offset, EARLY)
            dx_row = r * (g - xh * c)
            if ds is not None:
                dx_row += ds_row[k].to(tl.float32)
            tl.store(dx + m * N + n + k * BLOCK_N, dx_row.to(dx.dtype.element_ty), (m < M) & inside)
            summed += (dw[k] + _dw(dy_row[k].to(tl.float32), xh, x.dtype.element_ty, EARLY),)
        dw = summed
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # _sum_partials may start, and waits
    if partials is not None:
        for k in tl.static_range(PIECES):
            share = tl.sum(dw[k].to(tl.float64), axis=0, keep_dims=True).to(tl.float32)
            tl.store(partials + program.to(tl.int64) * N + n + k * BLOCK_N, share, n + k * BLOCK_N < N)


@triton.jit
def _xh(x, r, inside):
    """x·rstd, and zero beyond the row's end, where 0·inf would be NaN."""
    return tl.where(inside, x.to(tl.float32) * r, 0.0)


@triton.jit
def _dw(dy, xh, X: tl.constexpr, EARLY: tl.constexpr):
    """What one element adds to dw."""
    h = _cast(xh, X) if EARLY else xh
    return dy * h


@triton.jit(do_not_specialize=["M"])
def _backward_loop(
    dy, ds, x, w, rstd, dx, M, N, sizes, dy_steps, ds_steps, x_steps, offset,
    EARLY: tl.constexpr, STRIDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx of one row a program, in pieces: read once for the sum and again for dx."""
    m = tl.program_id(0).to(tl.int64)
    r = tl.load(rstd + m)
    dy += _start(m, sizes, dy_steps, STRIDED)
    x += _start(m, sizes, x_steps, STRIDED)
    products = tl.zeros([BLOCK_N], tl.float64)
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        xh = _xh(_load(x + n, n < N), r, n < N)
        g = _times_scale(_load(dy + n, n < N), None if w is None else _load(w + n, n < N), offset, EARLY)
        products += (g * xh).to(tl.float64)
    c = (tl.sum(products, axis=0) / N).to(tl.float32)
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        xh = _load(x + n, n < N) * r
        g = _times_scale(_load(dy + n, n < N), None if w is None else _load(w + n, n < N), offset, EARLY)
        dx_row = r * (g - xh * c)
        if ds is not None:
            dx_row += _load(ds + _start(m, sizes, ds_steps, STRIDED) + n, n < N)
        tl.store(dx + m * N + n, dx_row.to(dx.dtype.element_ty), n < N)


@triton.jit(do_not_specialize=["M", "programs"])
def _dw_alone(
    dy, x, rstd, partials, M, N, parts, programs, sizes, dy_steps, x_steps,
    EARLY: tl.constexpr, STRIDED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The share of dw of one part, of BLOCK_N columns, of every so many tiles of ROWS rows."""
    program, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    n = part.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    dw = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for turn in tl.range(0, _turns(M, program, programs, ROWS), num_stages=STAGES):
        m = (program + turn * programs).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (m < M) & (n < N)
        r = tl.load(rstd + m, m < M, 0.0)
        dy_row = _load(dy + _start(m, sizes, dy_steps, STRIDED) + n, inside)
        xh = _load(x + _start(m, sizes, x_steps, STRIDED) + n, inside) * r
        dw += _dw(dy_row, xh, x.dtype.element_ty, EARLY)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    share = tl.sum(dw.to(tl.float64), axis=0, keep_dims=True).to(tl.float32)
    tl.store(partials + program.to(tl.int64) * N + n, share, n < N)


@triton.jit(do_not_specialize=["programs"])
def _sum_partials(
    partials, dw, programs, N, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """dw of BLOCK_N columns: the shares of all programs, always in the same order."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # for the end of the kernel before, which need not have ended for this one to start
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros([ROWS, BLOCK_N], tl.float64)
    for first in range(0, programs, ROWS):
        program = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(partials + program.to(tl.int64) * N + n, (program < programs) & (n < N), 0.0).to(tl.float64)
    tl.store(dw + n, tl.sum(total, axis=0, keep_dims=True).to(tl.float32).to(dw.dtype.element_ty), n < N)


# Rows in shared memory, in Gluon, where one says how threads hold a tile: more rows are under way than registers hold.
# Asynchronous copies bring them, of 16 bytes each, so that rows must begin and end at multiples of that.


@gluon.jit
def _collected(shares, parts, PARTS: gl.constexpr):
    """The sum of a row's shares, once all of its programs have handed in theirs; see _whole."""
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    p = gl.arange(0, PARTS, lanes)
    found = gl.load(shares + p, p < parts, 0, volatile=True)
    while gl.sum((found == -1).to(gl.int32), axis=0) > 0:
        found = gl.load(shares + p, p < parts, 0, volatile=True)
    return gl.sum(found.to(gl.float64, bitcast=True), axis=0)


@gluon.jit
def _buffers(DTYPE: gl.constexpr, COPIES: gl.constexpr, PIECES: gl.constexpr, BLOCK_N: gl.constexpr):
    """Shared memory for COPIES rows, a buffer for each piece: what is one buffer is waited for as one."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    buffers = ()
    for _ in gl.static_range(PIECES):
        buffers += (gl.allocate_shared_memory(DTYPE, [COPIES, BLOCK_N], plain),)
    return buffers


@gluon.jit
def _begin(buffers, slot, row, n, N, present, PIECES: gl.constexpr, BLOCK_N: gl.constexpr):
    """Have a row copied, if it is present; columns outside keep what they held."""
    for k in gl.static_range(PIECES):
        _copy(buffers[k].index(slot), row + n + k * BLOCK_N, mask=(n + k * BLOCK_N < N) & present)


@gluon.jit(do_not_specialize=["M"])
def _forward_staged(
    x, residual, w, y, s, rstd, shares, M, N, parts, sizes, x_steps, residual_steps, eps, offset,
    EARLY: gl.constexpr, STRIDED: gl.constexpr, PARTS: gl.constexpr,
    PIECES: gl.constexpr, BLOCK_N: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """One part of a row, which waits for the other parts."""
    X: gl.constexpr = x.dtype.element_ty
    columns: gl.constexpr = gl.BlockedLayout([128 // X.primitive_bitwidth], [32], [gl.num_warps()], [0])
    m, part = (gl.program_id(0) // parts).to(gl.int64), gl.program_id(0) % parts
    n = part * (PIECES * BLOCK_N) + gl.arange(0, BLOCK_N, columns)
    row = _buffers(X, 1, PIECES, BLOCK_N)
    for k in gl.static_range(PIECES):
        at = n + k * BLOCK_N
        _copy(row[k].index(0), x + _start(m, sizes, x_steps, STRIDED) + at, mask=at < N)
        async_copy.commit_group()
    squares = gl.zeros([BLOCK_N], gl.float64, columns)
    for k in gl.static_range(PIECES):
        async_copy.wait_group(PIECES - 1 - k)
        inside = n + k * BLOCK_N < N
        piece = row[k].index(0).load(columns)
        if residual is not None:
            at = residual + _start(m, sizes, residual_steps, STRIDED) + n + k * BLOCK_N
            piece = (piece.to(gl.float32) + gl.load(at, inside, 0.0).to(gl.float32)).to(X)
            gl.store(s + m * N + n + k * BLOCK_N, piece, inside)
            row[k].index(0).store(piece)
        d = gl.where(inside, piece.to(gl.float32), 0.0).to(gl.float64)
        squares = gl.fma(d, d, squares)  # the square is exact, so fusing changes nothing
    S = gl.sum(squares, axis=0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    gl.atomic_xchg(shares + m * parts + part, S.to(gl.int64, bitcast=True), sem="relaxed")
    r = _rstd(_collected(shares + m * parts, parts, PARTS), N, eps)
    if rstd is not None:
        gl.store(rstd + m, r)
    for k in gl.static_range(PIECES):
        inside = n + k * BLOCK_N < N
        h = row[k].index(0).load(columns).to(gl.float32) * r
        weight = None if w is None else gl.load(w + n + k * BLOCK_N, inside, 0.0)
        gl.store(y + m * N + n + k * BLOCK_N, _output(h, weight, offset, X, y.dtype.element_ty, EARLY), inside)


@gluon.jit
def _staged_weight(w, n, N, PIECES: gl.constexpr, BLOCK_N: gl.constexpr):
    """The pieces of the weight: in registers, or in shared memory where 16-bit rows have more columns a thread."""
    weight = ()
    for k in gl.static_range(PIECES):
        piece = gl.load(w + n + k * BLOCK_N, n + k * BLOCK_N < N, 0.0)
        if 1024 * gl.num_warps() < BLOCK_N * PIECES:
            held = _buffers(w.dtype.element_ty, 1, 1, BLOCK_N)[0].index(0)
            held.store(piece)
            weight += (held,)
        else:
            weight += (piece,)
    return weight


@gluon.jit
def _piece(
    dy_rows, x_rows, weight, slot, k, r, n, N, offset, columns: gl.constexpr,
    EARLY: gl.constexpr, PARTS: gl.constexpr, PIECES: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """dy, x·rstd and g of piece k of a row; zero outside the row."""
    inside = _inside(n + k * BLOCK_N, N, k, PIECES, PARTS)
    dy_piece = gl.where(inside, dy_rows[k].index(slot).load(columns), 0.0)
    xh = _xh(x_rows[k].index(slot).load(columns), r, inside)
    scale = None
    if len(weight) > 0:
        scale = weight[k].load(columns) if 1024 * gl.num_warps() < BLOCK_N * PIECES else weight[k]
    return dy_piece, xh, _times_scale(dy_piece, scale, offset, EARLY)


@gluon.jit
def _dot_by_warp(
    dy_rows, x_rows, weight, slot, r, n, N, offset, columns: gl.constexpr,
    EARLY: gl.constexpr, PARTS: gl.constexpr, PIECES: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Each warp's share of the sum of g·xh."""
    products = gl.zeros([BLOCK_N], gl.float64, columns)
    for k in gl.static_range(PIECES):
        _, xh, g = _piece(
            dy_rows, x_rows, weight, slot, k, r, n, N, offset, columns, EARLY, PARTS, PIECES, BLOCK_N
        )  # fmt: skip
        products += (g * xh).to(gl.float64)
    return gl.sum(gl.reshape(products, [gl.num_warps(), BLOCK_N // gl.num_warps()]), axis=1)


@gluon.jit(do_not_specialize=["M", "programs"])
def _backward_staged(
    dy, ds, x, w, rstd, dx, partials, shares, M, N, parts, programs, sizes, dy_steps, ds_steps, x_steps, offset,
    EARLY: gl.constexpr, STRIDED: gl.constexpr, PARTS: gl.constexpr,
    PIECES: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """As _backward_block for one part of each row, of which STAGES are on the way or held.

    One row behind: a program hands in its share of the next row's sum before it asks for this row's.
    """
    X: gl.constexpr = x.dtype.element_ty
    columns: gl.constexpr = gl.BlockedLayout([128 // X.primitive_bitwidth], [32], [gl.num_warps()], [0])
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    program, part = (gl.program_id(0) // parts).to(gl.int64), gl.program_id(0) % parts
    n = part * (PIECES * BLOCK_N) + gl.arange(0, BLOCK_N, columns)
    dy_rows = _buffers(dy.dtype.element_ty, STAGES, PIECES, BLOCK_N)
    x_rows = _buffers(X, STAGES, PIECES, BLOCK_N)
    by_warp = gl.allocate_shared_memory(gl.float64, [gl.num_warps()], plain)
    for i in gl.static_range(STAGES - 1):
        m = program + i * programs
        _begin(dy_rows, i, dy + _start(m, sizes, dy_steps, STRIDED), n, N, m < M, PIECES, BLOCK_N)
        _begin(x_rows, i, x + _start(m, sizes, x_steps, STRIDED), n, N, m < M, PIECES, BLOCK_N)
        async_copy.commit_group()
    weight = () if w is None else _staged_weight(w, n, N, PIECES, BLOCK_N)
    dw = ()
    for _ in gl.static_range(PIECES):
        dw += (gl.zeros([BLOCK_N], gl.float32, columns),)
    width = N.to(gl.float64)
    inverse = 1.0 / width
    async_copy.wait_group(STAGES - 2)
    r = gl.load(rstd + program)
    by_warp.store(_dot_by_warp(
        dy_rows, x_rows, weight, 0, r, n, N, offset, columns, EARLY, PARTS, PIECES, BLOCK_N
    ))  # fmt: skip
    S = gl.sum(by_warp.load(lanes), axis=0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    gl.atomic_xchg(shares + program * parts + part, S.to(gl.int64, bitcast=True), sem="relaxed")
    r_next = gl.load(rstd + program + programs, program + programs < M, 0.0)
    slot = 0
    for m in range(program, M.to(gl.int64), programs):
        slot_before = gl.where(slot == 0, STAGES - 1, slot - 1)
        slot_next = gl.where(slot == STAGES - 1, 0, slot + 1)
        last = m + (STAGES - 1) * programs
        _begin(dy_rows, slot_before, dy + _start(last, sizes, dy_steps, STRIDED), n, N, last < M, PIECES, BLOCK_N)
        _begin(x_rows, slot_before, x + _start(last, sizes, x_steps, STRIDED), n, N, last < M, PIECES, BLOCK_N)
        async_copy.commit_group()
        async_copy.wait_group(STAGES - 2)
        by_warp.store(_dot_by_warp(
            dy_rows, x_rows, weight, slot_next, r_next, n, N, offset, columns, EARLY, PARTS, PIECES, BLOCK_N
        ))  # fmt: skip
        S = gl.sum(by_warp.load(lanes), axis=0)
        gl.atomic_xchg(
            shares + (m + programs) * parts + part, S.to(gl.int64, bitcast=True), mask=m + programs < M, sem="relaxed"
        )  # fmt: skip
        ds_row = ()
        if ds is not None:
            for k in gl.static_range(PIECES):
                inside = _inside(n + k * BLOCK_N, N, k, PIECES, PARTS)
                ds_row += (gl.load(ds + _start(m, sizes, ds_steps, STRIDED) + n + k * BLOCK_N, inside, 0.0),)
        c = _mean(_collected(shares + m * parts, parts, PARTS) + 0.0, width, inverse)  # +0.0, never -0.0
        summed = ()
        for k in gl.static_range(PIECES):
            dy_piece, xh, g = _piece(
                dy_rows, x_rows, weight, slot, k, r, n, N, offset, columns, EARLY, PARTS, PIECES, BLOCK_N
            )  # fmt: skip
            dx_piece = r * (g - xh * c)
            if ds is not None:
                dx_piece += ds_row[k].to(gl.float32)
            inside = _inside(n + k * BLOCK_N, N, k, PIECES, PARTS)
            gl.store(dx + m * N + n + k * BLOCK_N, dx_piece.to(dx.dtype.element_ty), inside)
            summed += (dw[k] + _dw(dy_piece.to(gl.float32), xh, X, EARLY),)
        dw = summed
        r = r_next
        r_next = gl.load(rstd + m + 2 * programs, m + 2 * programs < M, 0.0)
        slot = slot_next
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    async_copy.wait_group(0)
    if partials is not None:
        for k in gl.static_range(PIECES):
            gl.store(partials + program * N + n + k * BLOCK_N, dw[k], n + k * BLOCK_N < N)


# --- planning calls ------------------------------------------------------------------------------------------

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(x: torch.dtype, residual: torch.dtype | None, w: torch.dtype | None) -> str | None:
    """Why tensors of these dtypes must run the reference; None if the kernels take them."""
    if torch.version.hip is not None:
        return "the kernels are proven on NVIDIA GPUs only"
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if min(capabilities, default=(8, 0)) < (8, 0):
        return f"compute capability {min(capabilities)} is below 8.0, the first to round to bf16"
    for name, dtype in (("x", x), ("residual", residual), ("weight", w)):
        if dtype is not None and dtype not in _DTYPES:
            return f"{name} is {dtype}: computed in fp32 and returned as {dtype} by plain torch"
    return None


@functools.lru_cache(MOST_PLANS)
def plan_forward(kind: Forward) -> Plan:
    """For y, s and rstd as of `reference.forward`."""
    row, x, residual, before = summands(kind)
    w, spec = kind.w, kind.spec
    wanted = {row: (x, x.dtype)} | ({} if residual is None else {"residual": (residual, x.dtype)})
    rows, kinds, converted = laid_out(walk, wanted)
    before += converted
    gpu = _gpu(_number(kind.device))
    aligned = rows.N > launch.ADD_WIDEST and _by_16_bytes(rows, kinds)
    config = launch.forward(rows.N, x.dtype.itemsize, residual is not None, aligned, gpu)
    if w is not None:
        kinds["w"] = _dense("w", w, before)
    shape = tuple(x.shape)
    fresh = [Fresh("y", _y_dtype(x.dtype, w, spec.cast), shape)]
    if residual is not None:
        fresh.append(Fresh("s", x.dtype, shape))
    if kind.with_rstd:
        fresh.append(Fresh("rstd", torch.float32, shape[:-1]))
    calls = _Calls(_number(kind.device), rows, kinds, fresh)
    calls.add(
        _forward_loop if config.parts == 0 else _forward_staged if config.staged else _forward_block,
        _cdiv(rows.M, config.rows) * max(1, config.parts), config, calls.exchange(config, gpu),
        x=row, residual=None if residual is None else "residual", w=None if w is None else "w", y="y",
        s=None if residual is None else "s", rstd="rstd" if kind.with_rstd else None, shares="shares",
        x_steps=rows.steps[0], residual_steps=rows.steps[-1], eps=float(spec.eps), offset=_offset(spec.offset),
        EARLY=spec.cast == "early",
    )  # fmt: skip
    return Plan(
        kind.device,
        inputs=("x", "residual", "w"),
        before=tuple(before),
        fresh=tuple(fresh),
        launches=tuple(calls.launches),
        outputs=("y", None if kind.residual is None else "s", "rstd" if kind.with_rstd else None),
    )


@functools.lru_cache(MOST_PLANS)
def plan_backward(kind: Backward) -> Plan:
    """For dx and dw as of `reference.backward`; dw is the fp64 sum of fp32 sums over `launch.LONGEST_SUM` numbers at
    most."""
    x, w, spec, need_dx = kind.x, kind.w, kind.spec, kind.need_dx
    with_ds, of_dw = need_dx and kind.ds is not None, w.dtype if kind.need_dw and w is not None else None
    wanted = {"dy": (kind.dy, _y_dtype(x.dtype, w, spec.cast)), "x": (x, x.dtype)}
    if kind.ds is not None and with_ds:
        wanted["ds"] = kind.ds, x.dtype
    rows, kinds, before = laid_out(walk, wanted)
    M, N, device, gpu = rows.M, rows.N, _number(kind.device), _gpu(_number(kind.device))
    of_x, of_dy = x.dtype.itemsize, kinds["dy"].dtype.itemsize
    aligned = launch.BACKWARD_WIDEST[of_x] < N and _by_16_bytes(rows, kinds)
    kinds["rstd"] = _dense("rstd", kind.rstd, before)  # as it was, but for hooks on what is saved
    if w is not None:
        kinds["w"] = _dense("w", w, before)
    fresh = [Fresh("dx", x.dtype, tuple(x.shape))] if need_dx else []
    calls = _Calls(device, rows, kinds, fresh)
    early, steps = spec.cast == "early", {"dy_steps": rows.steps[0], "x_steps": rows.steps[1]}
    sums: Launch | None = None  # of the kernel whose programs hold the shares of dw, where there are rows
    if need_dx:
        itemsize = 0 if of_dw is None else of_dw.itemsize
        config = launch.backward(M, N, of_x, of_dy, itemsize, with_ds, aligned, gpu)
        sums = config if of_dw is not None and config.parts > 0 else None
        if sums is not None:
            fresh.append(Fresh("partials", torch.float32, (sums.programs, N)))
        calls.add(
            _backward_loop if config.parts == 0 else _backward_staged if config.staged else _backward_block,
            M if config.parts == 0 else config.programs * config.parts, config, calls.exchange(config, gpu),
            dy="dy", ds="ds" if with_ds else None, x="x", w=None if w is None else "w", rstd="rstd", dx="dx",
            partials=None if sums is None else "partials", shares="shares", programs=config.programs, **steps,
            ds_steps=rows.steps[-1], offset=_offset(spec.offset), EARLY=early,
        )  # fmt: skip
    if of_dw is not None:
        if sums is None:
            sums = launch.dw_alone(M, N, of_dy + of_x, of_dw.itemsize, gpu)
            parts = _cdiv(N, sums.block_n)
            fresh.append(Fresh("partials", torch.float32, (sums.programs, N)))
            calls.add(
                _dw_alone, sums.programs * parts, sums, False, dy="dy", x="x", rstd="rstd", partials="partials",
                parts=parts, programs=sums.programs, **steps, EARLY=early,
            )  # fmt: skip
        config = launch.sum_partials(sums.programs, N, gpu)
        fresh.append(Fresh("dw", of_dw, (N,)))
        calls.add(
            _sum_partials, _cdiv(N, config.block_n), config, sums.programs > 0, partials="partials", dw="dw",
            programs=sums.programs,
        )  # fmt: skip
    return Plan(
        kind.device,
        inputs=("dy", "ds", "x", "w", "rstd"),
        before=tuple(before),
        fresh=tuple(fresh),
        launches=tuple(calls.launches),
        outputs=("dx" if need_dx else None, None if of_dw is None else "dw"),
    )


class _Calls:
    """The launches of a plan, as they come."""

    def __init__(self, device: int, rows: Walk, kinds: Mapping[str, TensorKind], fresh: list[Fresh]) -> None:
        """kinds: of the inputs, as the kernels get them. fresh: of the plan, to which `exchange` adds."""
        self.launches: list[TritonLaunch] = []
        self._device, self._rows, self._kinds, self._fresh = device, rows, kinds, fresh

    def add(self, kernel: Any, grid: int, config: Launch, after: bool, /, **named: Any) -> None:
        """A launch, unless of no programs. after: whether the launch before prepares it. named: the values of the
        kernel's arguments, and others; of a tensor its name, or None."""
        if grid == 0:
            return
        rows = self._rows
        values = config.constants | {
            "M": rows.M, "N": rows.N, "parts": config.parts, "sizes": rows.sizes, "STRIDED": rows.strided,
            # As many as a warp has lanes. Fewer would be held several times over, in a third more registers.
            "PARTS": 1 if config.parts == 1 else launch.MOST_PARTS,
        } | named  # fmt: skip
        arguments = tuple(self._argument(values[name]) for name in kernel.arg_names)
        given = [self._kinds.get(a.tensor) for a in arguments if isinstance(a, Slot)]
        aligned = all(kind is None or kind.alignment == 16 for kind in given)
        early = after and config.overlap
        self.launches.append(TritonLaunch(kernel, (grid,), config.warps, arguments, early, aligned, self._device))

    def exchange(self, config: Launch, gpu: Gpu) -> bool:
        """Whether there is something to prepare where programs that share rows exchange their sums; see `_whole`."""
        size = self._rows.M * config.parts
        if config.parts <= 1:
            return False
        self._fresh.append(Fresh("shares", torch.int64, (size,)))
        config = launch.no_shares_yet(gpu)
        self.add(_no_shares_yet, _cdiv(size, config.block_n), config, False, shares="shares", size=size)
        return size > 0

    def _argument(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        kind = self._kinds.get(value) or next((t for t in self._fresh if t.name == value), None)
        return None if kind is None else Slot(value, kind.dtype)  # there are no shares where none are exchanged


def _number(device: torch.device) -> int:
    """Of a GPU; -1 for the interpreter, whose tensors are on none."""
    return -1 if device.index is None or device.type != "cuda" else device.index


@functools.cache
def _gpu(device: int) -> Gpu:
    """The GPU with this number; without one, as in the interpreter, a typical one without Hopper's instructions."""
    if device < 0:
        return Gpu(capability=8)
    found = torch.cuda.get_device_properties(device)
    shared_memory = int(found.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    return Gpu(shared_memory, found.multi_processor_count, found.major)


def _y_dtype(x: torch.dtype, w: TensorKind | None, cast: str) -> torch.dtype:
    return x if w is None or cast == "late" else torch.promote_types(x, w.dtype)


def _offset(offset: float) -> float:
    return float(offset) or -0.0


def _dense(name: str, kind: TensorKind, before: list[Converted]) -> TensorKind:
    """The kind as a kernel reads it that knows no strides of it, after a copy if it must be."""
    if kind.is_dense:
        return kind
    before.append(Converted(name, (name,), kind.dtype))
    return TensorKind.dense(kind.shape, kind.dtype)


def _by_16_bytes(rows: Walk, kinds: Mapping[str, TensorKind]) -> bool:
    """Whether rows begin and end where asynchronous copies can, and Triton is told: of multiples of 16 numbers."""
    steps = [step for of_tensor in rows.steps for step in (of_tensor if rows.strided else of_tensor[2:])]
    return all(step % 16 == 0 for step in (rows.N, *steps)) and all(k.alignment == 16 for k in kinds.values())


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
