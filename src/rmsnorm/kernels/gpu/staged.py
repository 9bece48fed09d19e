# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code="assignment, var-annotated"
"""Kernels in Gluon that hold rows in shared memory: the arithmetic of kernels.py, for the widest rows.

In Gluon the code chooses how threads hold a tile, so more rows can be in flight than fit in registers. Asynchronous
copies of 16 bytes load them, so rows must begin and end at multiples of 16 bytes.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from rmsnorm.kernels.gpu.kernels import (
    as_multiple,
    dw_terms,
    factor_of,
    is_inside,
    mean_of,
    normalized,
    plus_ds,
    row_start,
    rstd_of,
    scaled_output,
    times_scale,
)

copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # before Triton 3.7


@gluon.jit
def _collected(shares, parts, PARTS: gl.constexpr):
    """Waits until all programs of a row have stored their shares, and returns the sum; see sum_of_shares."""
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    p = gl.arange(0, PARTS, lanes)
    found = gl.load(shares + p, p < parts, 0, volatile=True)
    while gl.sum((found == -1).to(gl.int32), axis=0) > 0:
        found = gl.load(shares + p, p < parts, 0, volatile=True)
    return gl.sum(found.to(gl.float64, bitcast=True), axis=0)


@gluon.jit
def _buffers(DTYPE: gl.constexpr, COPIES: gl.constexpr, PIECES: gl.constexpr, BLOCK_N: gl.constexpr):
    """Shared memory for COPIES rows, with one buffer for each piece: synchronization covers a whole buffer."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    buffers = ()
    for _ in gl.static_range(PIECES):
        buffers += (gl.allocate_shared_memory(DTYPE, [COPIES, BLOCK_N], plain),)
    return buffers


@gluon.jit
def _begin(buffers, slot, row, n, N, present, PIECES: gl.constexpr, BLOCK_N: gl.constexpr):
    """Starts copying a row, if it is present; columns outside the row keep their old contents."""
    for k in gl.static_range(PIECES):
        copy(buffers[k].index(slot), row + n + k * BLOCK_N, mask=(n + k * BLOCK_N < N) & present)


@gluon.jit(do_not_specialize=["M"])
def forward_staged(
    x, residual, w, y, s, rstd, shares, M, N, parts, sizes, x_steps, residual_steps, eps, offset,
    EARLY: gl.constexpr, FIRST: gl.constexpr, STRIDED: gl.constexpr, MULTIPLE: gl.constexpr, PARTS: gl.constexpr,
    PIECES: gl.constexpr, BLOCK_N: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """One part of a row per program; programs that share a row wait for each other's sums."""
    N = as_multiple(N, MULTIPLE)
    X: gl.constexpr = x.dtype.element_ty
    columns: gl.constexpr = gl.BlockedLayout([128 // X.primitive_bitwidth], [32], [gl.num_warps()], [0])
    m, part = (gl.program_id(0) // parts).to(gl.int64), gl.program_id(0) % parts
    n = part * (PIECES * BLOCK_N) + gl.arange(0, BLOCK_N, columns)
    row = _buffers(X, 1, PIECES, BLOCK_N)
    for k in gl.static_range(PIECES):
        at = n + k * BLOCK_N
        copy(row[k].index(0), x + row_start(m, sizes, x_steps, STRIDED, MULTIPLE) + at, mask=at < N)
        async_copy.commit_group()
    squares = gl.zeros([BLOCK_N], gl.float64, columns)
    for k in gl.static_range(PIECES):
        async_copy.wait_group(PIECES - 1 - k)
        inside = n + k * BLOCK_N < N
        piece = row[k].index(0).load(columns)
        if residual is not None:
            at = residual + row_start(m, sizes, residual_steps, STRIDED, MULTIPLE) + n + k * BLOCK_N
            piece = (piece.to(gl.float32) + gl.load(at, inside, 0.0).to(gl.float32)).to(X)
            gl.store(s + m * N + n + k * BLOCK_N, piece, inside)
            row[k].index(0).store(piece)
        d = gl.where(inside, piece.to(gl.float32), 0.0).to(gl.float64)
        squares = gl.fma(d, d, squares)  # the square is exact, so fusing changes nothing
    S = gl.sum(squares, axis=0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    gl.atomic_xchg(shares + m * parts + part, S.to(gl.int64, bitcast=True), sem="relaxed")
    r = rstd_of(_collected(shares + m * parts, parts, PARTS), N, eps)
    if rstd is not None:
        gl.store(rstd + m, r)
    r = factor_of(r, X, FIRST)
    for k in gl.static_range(PIECES):
        inside = n + k * BLOCK_N < N
        h = row[k].index(0).load(columns).to(gl.float32) * r
        weight = None if w is None else gl.load(w + n + k * BLOCK_N, inside, 0.0)
        gl.store(y + m * N + n + k * BLOCK_N, scaled_output(h, weight, offset, X, y.dtype.element_ty, EARLY), inside)


@gluon.jit
def _staged_weight(w, n, N, PIECES: gl.constexpr, BLOCK_N: gl.constexpr):
    """The pieces of the weight: in registers, or in shared memory if there are more than 32 columns a thread."""
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
    inside = is_inside(n + k * BLOCK_N, N, k, PIECES, PARTS)
    dy_piece = gl.where(inside, dy_rows[k].index(slot).load(columns), 0.0)
    xh = normalized(x_rows[k].index(slot).load(columns), r, inside)
    scale = None
    if len(weight) > 0:
        scale = weight[k].load(columns) if 1024 * gl.num_warps() < BLOCK_N * PIECES else weight[k]
    return dy_piece, xh, times_scale(dy_piece, scale, offset, EARLY)


@gluon.jit
def _dot_by_warp(
    dy_rows, x_rows, weight, slot, r, n, N, offset, columns: gl.constexpr,
    EARLY: gl.constexpr, PARTS: gl.constexpr, PIECES: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The sum of g·xh over each warp's columns."""
    products = gl.zeros([BLOCK_N], gl.float64, columns)
    for k in gl.static_range(PIECES):
        _, xh, g = _piece(
            dy_rows, x_rows, weight, slot, k, r, n, N, offset, columns, EARLY, PARTS, PIECES, BLOCK_N
        )  # fmt: skip
        products += (g * xh).to(gl.float64)
    return gl.sum(gl.reshape(products, [gl.num_warps(), BLOCK_N // gl.num_warps()]), axis=1)


@gluon.jit(do_not_specialize=["M", "programs"])
def backward_staged(
    dy, ds, x, w, rstd, dx, partials, shares, M, N, parts, programs, sizes, dy_steps, ds_steps, x_steps, offset,
    EARLY: gl.constexpr, ROUND_FIRST: gl.constexpr, STRIDED: gl.constexpr, MULTIPLE: gl.constexpr, PARTS: gl.constexpr,
    PIECES: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """As backward_block for one part of each row, with STAGES rows loaded or being loaded.

    A program stores its share of the next row's sum before it waits for this row's, so that the wait is short.
    """
    N = as_multiple(N, MULTIPLE)
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
        _begin(dy_rows, i, dy + row_start(m, sizes, dy_steps, STRIDED, MULTIPLE), n, N, m < M, PIECES, BLOCK_N)
        _begin(x_rows, i, x + row_start(m, sizes, x_steps, STRIDED, MULTIPLE), n, N, m < M, PIECES, BLOCK_N)
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
        _begin(
            dy_rows,
            slot_before,
            dy + row_start(last, sizes, dy_steps, STRIDED, MULTIPLE),
            n,
            N,
            last < M,
            PIECES,
            BLOCK_N,
        )
        _begin(
            x_rows, slot_before, x + row_start(last, sizes, x_steps, STRIDED, MULTIPLE), n, N, last < M, PIECES, BLOCK_N
        )
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
                inside = is_inside(n + k * BLOCK_N, N, k, PIECES, PARTS)
                ds_row += (
                    gl.load(ds + row_start(m, sizes, ds_steps, STRIDED, MULTIPLE) + n + k * BLOCK_N, inside, 0.0),
                )
        c = mean_of(_collected(shares + m * parts, parts, PARTS) + 0.0, width, inverse)  # +0.0, never -0.0
        summed = ()
        for k in gl.static_range(PIECES):
            dy_piece, xh, g = _piece(
                dy_rows, x_rows, weight, slot, k, r, n, N, offset, columns, EARLY, PARTS, PIECES, BLOCK_N
            )  # fmt: skip
            dx_piece = r * (g - xh * c)
            if ds is not None:
                dx_piece = plus_ds(dx_piece, ds_row[k], dx.dtype.element_ty, ROUND_FIRST)
            inside = is_inside(n + k * BLOCK_N, N, k, PIECES, PARTS)
            gl.store(dx + m * N + n + k * BLOCK_N, dx_piece.to(dx.dtype.element_ty), inside)
            summed += (dw[k] + dw_terms(dy_piece.to(gl.float32), xh, X, EARLY),)
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
