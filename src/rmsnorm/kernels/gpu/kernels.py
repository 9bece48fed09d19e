# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code="assignment, var-annotated"
"""The arithmetic of reference.py on the GPU, in Triton.

Every kernel is launched with `enable_fp_fusion=False`, because a fused multiply-add rounds once where the reference
rounds twice. `div_rn` and `sqrt_rn` round as IEEE 754 requires; `/` does so only in fp64, and is only used there.
Absent tensors are passed as None; the code that uses them is not compiled.
"""

import triton
import triton.language as tl

# m: rows, n: columns; 64-bit where an address is computed from them. Outputs are contiguous. Inputs are contiguous in
# the last dimension only; `sizes` and `*_steps` say where a row begins (see rows.Walk).
# offset: -0.0 if there is none, because adding +0.0 would change a weight of -0.0.


@triton.jit
def row_start(m, sizes, steps, STRIDED: tl.constexpr):
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
    """Loads elements and converts them to fp32, exactly; zero outside."""
    return tl.load(pointer, inside, 0.0).to(tl.float32)


@triton.jit
def rstd_of(S, N, eps):
    """1 / sqrt(S / N + eps), from the fp64 sum S, in correctly rounded steps."""
    v = (S / N).to(tl.float32) + eps
    return tl.div_rn(1.0, tl.sqrt_rn(v))


@triton.jit
def _cast(h, X: tl.constexpr):
    """h rounded to the dtype X and converted back to fp32."""
    if X == tl.bfloat16:  # noqa: SIM300
        # Triton converts one number at a time, with an instruction at 1/16 of the usual rate; this converts two.
        h = tl.inline_asm_elementwise(
            "{ .reg .b32 two; cvt.rn.bf16x2.f32 two, $3, $2; shl.b32 $0, two, 16; and.b32 $1, two, 0xffff0000; }",
            "=r,=r,r,r", [h], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        h = h.to(X).to(tl.float32)
    return h


@triton.jit
def rounded_sum(a, b):
    """a + b, rounded to their dtype."""
    if a.dtype == tl.bfloat16:
        # One instruction for two numbers: a·1 + b. Triton would round each sum separately, as in `_cast`.
        total = tl.inline_asm_elementwise(
            "{ .reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, $1, one, $2; }",
            "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        total = a + b
    return total


@triton.jit
def plus_ds(dx, ds, X: tl.constexpr, ROUND_FIRST: tl.constexpr):
    """dx plus ds, the gradient that arrives through s; ROUND_FIRST: dx is rounded to the dtype X before that."""
    if ROUND_FIRST:
        dx = _cast(dx, X)
    return dx + ds.to(tl.float32)


@triton.jit
def factor_of(r, X: tl.constexpr, FIRST: tl.constexpr):
    """What x, of dtype X, is multiplied by: rstd, rounded to that dtype if FIRST."""
    return r.to(X).to(tl.float32) if FIRST else r


@triton.jit
def scaled_output(h, w, offset, X: tl.constexpr, Y: tl.constexpr, EARLY: tl.constexpr):
    """y from h = x·rstd, for x of dtype X and y of dtype Y."""
    if w is None:
        y = h.to(X)
    elif EARLY:
        y = (w.to(tl.float32) * _cast(h, X)).to(Y)
    else:
        y = ((w.to(tl.float32) + offset) * h).to(Y)
    return y


@triton.jit
def times_scale(dy, w, offset, EARLY: tl.constexpr):
    """g: dy times the factor of x·rstd, which is the weight plus the offset, or 1 without a weight."""
    g = dy.to(tl.float32)
    if w is not None:
        g = g * (w.to(tl.float32) if EARLY else w.to(tl.float32) + offset)
    return g


@triton.jit
def mean_of(S, N, inverse):
    """S / N, correctly rounded in fp64 and then rounded to fp32. N and its inverse are fp64.

    In a loop this is faster than `/`: 1 / N is computed once, and the remainder of S · (1 / N), which is exact because
    N has few digits, corrects the quotient (Markstein's method).
    """
    q = S * inverse
    mended = tl.fma(tl.fma(-q, N, S), inverse, q)
    return tl.where(tl.abs(S) < float("inf"), mended, S).to(tl.float32)


@triton.jit(do_not_specialize=["size"])
def no_shares_yet(shares, size, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr):
    """Marks all shares as missing, for `sum_of_shares`.

    The kernel that uses them may start before this one has ended, but waits for it before it stores a share.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(shares + i, tl.full([BLOCK_N], -1, tl.int64), i < size)


@triton.jit
def sum_of_shares(S, shares, part, parts, PARTS: tl.constexpr):
    """Sums over rows that `parts` programs share: stores this program's share S and waits for the others.

    A share is a single 8-byte store, so no fence is needed. -1, a NaN bit pattern that arithmetic never produces, marks
    a missing share. The programs of a row are few and have consecutive numbers, so all of them run at once and none
    waits forever.
    """
    tl.atomic_xchg(shares + part, S.to(tl.int64, bitcast=True), sem="relaxed")
    p = tl.arange(0, PARTS)[None, :]
    found = tl.load(shares + p, p < parts, 0, volatile=True)
    while tl.sum((found == -1).to(tl.int32)) > 0:
        found = tl.load(shares + p, p < parts, 0, volatile=True)
    return tl.sum(found.to(tl.float64, bitcast=True), axis=1, keep_dims=True)


@triton.jit
def _packed(row):
    """Keeps a 16-bit row packed. Otherwise the compiler holds its fp32 copy during a wait, in twice the registers."""
    if row.dtype.primitive_bitwidth == 16:
        row = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [row], dtype=row.dtype, is_pure=True, pack=2)
    return row


# A row is held in PIECES of BLOCK_N columns, so that few threads are idle if N is far from a power of two.


@triton.jit(do_not_specialize=["M"])
def forward_block(
    x, residual, w, y, s, rstd, shares, M, N, parts, sizes, x_steps, residual_steps, eps, offset,
    EARLY: tl.constexpr, FIRST: tl.constexpr, STRIDED: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Each program computes ROWS rows, reading them once; if PARTS > 1, one part of a row."""
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    m = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    first = part * (PIECES * BLOCK_N) + tl.arange(0, BLOCK_N)[None, :]
    row = ()
    for k in tl.static_range(PIECES):
        n = first + k * BLOCK_N
        row += (tl.load(x + row_start(m, sizes, x_steps, STRIDED) + n, (m < M) & (n < N), 0.0),)
    if residual is not None:
        total = ()
        for k in tl.static_range(PIECES):
            n = first + k * BLOCK_N
            other = _load(residual + row_start(m, sizes, residual_steps, STRIDED) + n, (m < M) & (n < N))
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
        S = sum_of_shares(S, shares + m * parts, part, parts, PARTS)
        packed = ()
        for k in tl.static_range(PIECES):
            packed += (_packed(row[k]),)
        row = packed
    r = rstd_of(S, N, eps)
    if rstd is not None:
        tl.store(rstd + m, r, m < M)
    r = factor_of(r, x.dtype.element_ty, FIRST)
    for k in tl.static_range(PIECES):
        n = first + k * BLOCK_N
        h = row[k].to(tl.float32) * r
        weight = None if w is None else tl.load(w + n, n < N, 0.0)
        out = scaled_output(h, weight, offset, x.dtype.element_ty, y.dtype.element_ty, EARLY)
        tl.store(y + m * N + n, out, (m < M) & (n < N))


@triton.jit(do_not_specialize=["M"])
def forward_loop(
    x, residual, w, y, s, rstd, M, N, sizes, x_steps, residual_steps, eps, offset,
    EARLY: tl.constexpr, FIRST: tl.constexpr, STRIDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program loops over one row twice: once for the sum, once for y."""
    m = tl.program_id(0).to(tl.int64)
    rows = x + row_start(m, sizes, x_steps, STRIDED)
    squares = tl.zeros([BLOCK_N], tl.float64)
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        row = tl.load(rows + n, n < N, 0.0)
        if residual is not None:
            other = _load(residual + row_start(m, sizes, residual_steps, STRIDED) + n, n < N)
            row = (row.to(tl.float32) + other).to(row.dtype)
            tl.store(s + m * N + n, row, n < N)
        d = row.to(tl.float32).to(tl.float64)
        squares = tl.fma(d, d, squares)  # the square is exact, so fusing changes nothing
    r = rstd_of(tl.sum(squares, axis=0), N, eps)
    if rstd is not None:
        tl.store(rstd + m, r)
    r = factor_of(r, x.dtype.element_ty, FIRST)
    if residual is not None:
        rows = s + m * N
        tl.debug_barrier()  # threads read s elements that other threads have written
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        h = _load(rows + n, n < N) * r
        weight = None if w is None else tl.load(w + n, n < N, 0.0)
        tl.store(y + m * N + n, scaled_output(h, weight, offset, x.dtype.element_ty, y.dtype.element_ty, EARLY), n < N)


@triton.jit
def is_inside(n, N, k, PIECES: tl.constexpr, PARTS: tl.constexpr):
    """Which columns of piece k are inside the row; if one program holds a row, only its last piece can be partial."""
    return n < N if PARTS > 1 or k == PIECES - 1 else n >= 0


@triton.jit
def _load_rows(
    t, m, n, M, N, sizes, steps,
    STRIDED: tl.constexpr, PARTS: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Loads the pieces of rows of t; zero below the last row."""
    row = ()
    for k in tl.static_range(PIECES):
        inside = (m < M) & is_inside(n + k * BLOCK_N, N, k, PIECES, PARTS)
        row += (tl.load(t + row_start(m, sizes, steps, STRIDED) + n + k * BLOCK_N, inside, 0.0),)
    return row


@triton.jit
def _added(
    row, t, m, n, M, N, sizes, steps,
    STRIDED: tl.constexpr, PARTS: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of the pieces of `row` and the pieces of t that `_load_rows` loads, rounded to their dtype."""
    other = _load_rows(t, m, n, M, N, sizes, steps, STRIDED, PARTS, PIECES, BLOCK_N)
    total = ()
    for k in tl.static_range(PIECES):
        total += (rounded_sum(row[k], other[k]),)
    return total


@triton.jit
def _turns(M, program, programs, ROWS: tl.constexpr):
    """How many tiles of ROWS rows this program processes. No intermediate value exceeds M, which may be 2³¹ - 1."""
    return (M - 1) // ROWS // programs + ((M - 1) // ROWS % programs >= program).to(tl.int32)


@triton.jit(do_not_specialize=["M", "programs"])
def backward_block(
    dy, dy2, dy3, ds, x, w, rstd, dx, partials, shares, M, N, parts, programs,
    sizes, dy_steps, dy2_steps, dy3_steps, ds_steps, x_steps, offset,
    EARLY: tl.constexpr, ROUND_FIRST: tl.constexpr, STRIDED: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """dx of every `programs`-th tile of ROWS rows, and their share of dw; if PARTS > 1, of one part of each row.

    If STAGES > 1, the next tiles are loaded into shared memory while this one is processed. At any time all programs
    work on neighbouring tiles, for which memory is faster than if each worked on its own range of rows.
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
        if dy2 is not None:
            dy_row = _added(dy_row, dy2, m, n, M, N, sizes, dy2_steps, STRIDED, PARTS, PIECES, BLOCK_N)
        if dy3 is not None:
            dy_row = _added(dy_row, dy3, m, n, M, N, sizes, dy3_steps, STRIDED, PARTS, PIECES, BLOCK_N)
        x_row = _load_rows(x, m, n, M, N, sizes, x_steps, STRIDED, PARTS, PIECES, BLOCK_N)
        if ds is not None and STAGES > 1:
            ds_row = _load_rows(ds, m, n, M, N, sizes, ds_steps, STRIDED, PARTS, PIECES, BLOCK_N)
        r = tl.load(rstd + m, m < M, 0.0)
        products = tl.zeros([ROWS, BLOCK_N], tl.float64)
        for k in tl.static_range(PIECES):
            xh = normalized(x_row[k], r, is_inside(n + k * BLOCK_N, N, k, PIECES, PARTS))
            g = times_scale(dy_row[k], None if w is None else weight[k], offset, EARLY)
            products += (g * xh).to(tl.float64)
        S = tl.sum(products, axis=1, keep_dims=True)
        if PARTS > 1:
            S = sum_of_shares(S, shares + m * parts, part, parts, PARTS)
        c = mean_of(S + 0.0, width, inverse)  # +0.0, never -0.0
        if ds is not None and STAGES == 1:  # loaded this late because registers are short before
            ds_row = _load_rows(ds, m, n, M, N, sizes, ds_steps, STRIDED, PARTS, PIECES, BLOCK_N)
        summed = ()
        for k in tl.static_range(PIECES):
            inside = is_inside(n + k * BLOCK_N, N, k, PIECES, PARTS)
            xh = normalized(x_row[k], r, inside)
            g = times_scale(dy_row[k], None if w is None else weight[k], offset, EARLY)
            dx_row = r * (g - xh * c)
            if ds is not None:
                dx_row = plus_ds(dx_row, ds_row[k], dx.dtype.element_ty, ROUND_FIRST)
            tl.store(dx + m * N + n + k * BLOCK_N, dx_row.to(dx.dtype.element_ty), (m < M) & inside)
            summed += (dw[k] + dw_terms(dy_row[k].to(tl.float32), xh, x.dtype.element_ty, EARLY),)
        dw = summed
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # sum_partials may start; it waits for this kernel's end
    if partials is not None:
        for k in tl.static_range(PIECES):
            share = tl.sum(dw[k].to(tl.float64), axis=0, keep_dims=True).to(tl.float32)
            tl.store(partials + program.to(tl.int64) * N + n + k * BLOCK_N, share, n + k * BLOCK_N < N)


@triton.jit
def normalized(x, r, inside):
    """x·rstd; zero beyond the end of the row, where 0·inf would be NaN."""
    return tl.where(inside, x.to(tl.float32) * r, 0.0)


@triton.jit
def dw_terms(dy, xh, X: tl.constexpr, EARLY: tl.constexpr):
    """The terms that each element adds to dw."""
    h = _cast(xh, X) if EARLY else xh
    return dy * h


@triton.jit(do_not_specialize=["M"])
def backward_loop(
    dy, ds, x, w, rstd, dx, M, N, sizes, dy_steps, ds_steps, x_steps, offset,
    EARLY: tl.constexpr, ROUND_FIRST: tl.constexpr, STRIDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program computes dx of one row, looping over it twice: once for the sum, once for dx."""
    m = tl.program_id(0).to(tl.int64)
    r = tl.load(rstd + m)
    dy += row_start(m, sizes, dy_steps, STRIDED)
    x += row_start(m, sizes, x_steps, STRIDED)
    products = tl.zeros([BLOCK_N], tl.float64)
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        xh = normalized(_load(x + n, n < N), r, n < N)
        g = times_scale(_load(dy + n, n < N), None if w is None else _load(w + n, n < N), offset, EARLY)
        products += (g * xh).to(tl.float64)
    c = (tl.sum(products, axis=0) / N).to(tl.float32)
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        xh = _load(x + n, n < N) * r
        g = times_scale(_load(dy + n, n < N), None if w is None else _load(w + n, n < N), offset, EARLY)
        dx_row = r * (g - xh * c)
        if ds is not None:
            ds_row = tl.load(ds + row_start(m, sizes, ds_steps, STRIDED) + n, n < N, 0.0)
            dx_row = plus_ds(dx_row, ds_row, dx.dtype.element_ty, ROUND_FIRST)
        tl.store(dx + m * N + n, dx_row.to(dx.dtype.element_ty), n < N)


@triton.jit(do_not_specialize=["M", "programs"])
def dw_alone(
    dy, dy2, dy3, x, rstd, partials, M, N, parts, programs, sizes, dy_steps, dy2_steps, dy3_steps, x_steps,
    EARLY: tl.constexpr, STRIDED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """A share of dw for BLOCK_N columns: the sum over every `programs`-th tile of ROWS rows."""
    program, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    n = part.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    dw = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for turn in tl.range(0, _turns(M, program, programs, ROWS), num_stages=STAGES):
        m = (program + turn * programs).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (m < M) & (n < N)
        r = tl.load(rstd + m, m < M, 0.0)
        dy_row = tl.load(dy + row_start(m, sizes, dy_steps, STRIDED) + n, inside, 0.0)
        if dy2 is not None:
            more = tl.load(dy2 + row_start(m, sizes, dy2_steps, STRIDED) + n, inside, 0.0)
            dy_row = rounded_sum(dy_row, more)
        if dy3 is not None:
            more = tl.load(dy3 + row_start(m, sizes, dy3_steps, STRIDED) + n, inside, 0.0)
            dy_row = rounded_sum(dy_row, more)
        xh = _load(x + row_start(m, sizes, x_steps, STRIDED) + n, inside) * r
        dw += dw_terms(dy_row.to(tl.float32), xh, x.dtype.element_ty, EARLY)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    share = tl.sum(dw.to(tl.float64), axis=0, keep_dims=True).to(tl.float32)
    tl.store(partials + program.to(tl.int64) * N + n, share, n < N)


@triton.jit
def sum_gradients(
    dy, dy2, dy3, summed, N, parts, sizes, dy_steps, dy2_steps, dy3_steps,
    STRIDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of a row of the sum of gradients, for kernels that take only one gradient."""
    m, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.load(dy + row_start(m, sizes, dy_steps, STRIDED) + n, n < N, 0.0)
    total = rounded_sum(total, tl.load(dy2 + row_start(m, sizes, dy2_steps, STRIDED) + n, n < N, 0.0))
    if dy3 is not None:
        total = rounded_sum(total, tl.load(dy3 + row_start(m, sizes, dy3_steps, STRIDED) + n, n < N, 0.0))
    tl.store(summed + m * N + n, total, n < N)


@triton.jit(do_not_specialize=["programs"])
def sum_partials(
    partials, dw, programs, N, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """dw of BLOCK_N columns: the sum of all programs' shares, always in the same order."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # this kernel may start before the one that computes the partials has ended
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros([ROWS, BLOCK_N], tl.float64)
    for first in range(0, programs, ROWS):
        program = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(partials + program.to(tl.int64) * N + n, (program < programs) & (n < N), 0.0).to(tl.float64)
    tl.store(dw + n, tl.sum(total, axis=0, keep_dims=True).to(tl.float32).to(dw.dtype.element_ty), n < N)
