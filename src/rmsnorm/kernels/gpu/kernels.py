# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code="assignment, var-annotated"
"""The arithmetic of reference.py on the GPU, in Triton.

Each kernel is launched with `enable_fp_fusion=False`: a product and a sum fused into one instruction would round
once where the arithmetic rounds twice. `div_rn` and `sqrt_rn` are the IEEE ones; `/` is only used in fp64, where it
is one too. What is absent is passed as None, and its code is not compiled.
"""

import triton
import triton.language as tl

# m: rows, n: columns, in 64 bits where they become an address. Outputs are contiguous; of the inputs only the last
# dimension is, and `sizes` and `*_steps` say where a row begins (see rows.Walk).
# offset: -0.0 where there is none, the one number whose addition changes no weight.


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
    """The elements as fp32, exactly; zero outside."""
    return tl.load(pointer, inside, 0.0).to(tl.float32)


@triton.jit
def rstd_of(S, N, eps):
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
    """dy times what x·rstd was multiplied by: the weight plus the offset, or nothing."""
    g = dy.to(tl.float32)
    if w is not None:
        g = g * (w.to(tl.float32) if EARLY else w.to(tl.float32) + offset)
    return g


@triton.jit
def mean_of(S, N, inverse):
    """S / N in fp64, correctly rounded, and then in fp32; N and its inverse are fp64.

    In a loop this is faster than `/`: 1 / N is taken once, and the remainder, exact since N has few digits, mends the
    quotient (Markstein).
    """
    q = S * inverse
    mended = tl.fma(tl.fma(-q, N, S), inverse, q)
    return tl.where(tl.abs(S) < float("inf"), mended, S).to(tl.float32)


@triton.jit(do_not_specialize=["size"])
def no_shares_yet(shares, size, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr):
    """Prepares the exchange below. The kernel that needs it may start meanwhile, and waits to hand anything in."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(shares + i, tl.full([BLOCK_N], -1, tl.int64), i < size)


@triton.jit
def sum_of_shares(S, shares, part, parts, PARTS: tl.constexpr):
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
def forward_block(
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
    for k in tl.static_range(PIECES):
        n = first + k * BLOCK_N
        h = row[k].to(tl.float32) * r
        weight = None if w is None else tl.load(w + n, n < N, 0.0)
        out = scaled_output(h, weight, offset, x.dtype.element_ty, y.dtype.element_ty, EARLY)
        tl.store(y + m * N + n, out, (m < M) & (n < N))


@triton.jit(do_not_specialize=["M"])
def forward_loop(
    x, residual, w, y, s, rstd, M, N, sizes, x_steps, residual_steps, eps, offset,
    EARLY: tl.constexpr, STRIDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row a program, in pieces: read once for the sum and again for y."""
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
    if residual is not None:
        rows = s + m * N
        tl.debug_barrier()  # threads read what other threads have written
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        h = _load(rows + n, n < N) * r
        weight = None if w is None else tl.load(w + n, n < N, 0.0)
        tl.store(y + m * N + n, scaled_output(h, weight, offset, x.dtype.element_ty, y.dtype.element_ty, EARLY), n < N)


@triton.jit
def is_inside(n, N, k, PIECES: tl.constexpr, PARTS: tl.constexpr):
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
        inside = (m < M) & is_inside(n + k * BLOCK_N, N, k, PIECES, PARTS)
        row += (tl.load(t + row_start(m, sizes, steps, STRIDED) + n + k * BLOCK_N, inside, 0.0),)
    return row


@triton.jit
def _turns(M, program, programs, ROWS: tl.constexpr):
    """How many tiles of ROWS rows are the program's: every so many. Nothing here passes M, which may end 32 bits."""
    return (M - 1) // ROWS // programs + ((M - 1) // ROWS % programs >= program).to(tl.int32)


@triton.jit(do_not_specialize=["M", "programs"])
def backward_block(
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
            xh = normalized(x_row[k], r, is_inside(n + k * BLOCK_N, N, k, PIECES, PARTS))
            g = times_scale(dy_row[k], None if w is None else weight[k], offset, EARLY)
            products += (g * xh).to(tl.float64)
        S = tl.sum(products, axis=1, keep_dims=True)
        if PARTS > 1:
            S = sum_of_shares(S, shares + m * parts, part, parts, PARTS)
        c = mean_of(S + 0.0, width, inverse)  # +0.0, never -0.0
        if ds is not None and STAGES == 1:  # not before, which takes more registers than there are
            ds_row = _load_rows(ds, m, n, M, N, sizes, ds_steps, STRIDED, PARTS, PIECES, BLOCK_N)
        summed = ()
        for k in tl.static_range(PIECES):
            inside = is_inside(n + k * BLOCK_N, N, k, PIECES, PARTS)
            xh = normalized(x_row[k], r, inside)
            g = times_scale(dy_row[k], None if w is None else weight[k], offset, EARLY)
            dx_row = r * (g - xh * c)
            if ds is not None:
                dx_row += ds_row[k].to(tl.float32)
            tl.store(dx + m * N + n + k * BLOCK_N, dx_row.to(dx.dtype.element_ty), (m < M) & inside)
            summed += (dw[k] + dw_terms(dy_row[k].to(tl.float32), xh, x.dtype.element_ty, EARLY),)
        dw = summed
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # sum_partials may start, and waits
    if partials is not None:
        for k in tl.static_range(PIECES):
            share = tl.sum(dw[k].to(tl.float64), axis=0, keep_dims=True).to(tl.float32)
            tl.store(partials + program.to(tl.int64) * N + n + k * BLOCK_N, share, n + k * BLOCK_N < N)


@triton.jit
def normalized(x, r, inside):
    """x·rstd, and zero beyond the row's end, where 0·inf would be NaN."""
    return tl.where(inside, x.to(tl.float32) * r, 0.0)


@triton.jit
def dw_terms(dy, xh, X: tl.constexpr, EARLY: tl.constexpr):
    """What one element adds to dw."""
    h = _cast(xh, X) if EARLY else xh
    return dy * h


@triton.jit(do_not_specialize=["M"])
def backward_loop(
    dy, ds, x, w, rstd, dx, M, N, sizes, dy_steps, ds_steps, x_steps, offset,
    EARLY: tl.constexpr, STRIDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx of one row a program, in pieces: read once for the sum and again for dx."""
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
            dx_row += _load(ds + row_start(m, sizes, ds_steps, STRIDED) + n, n < N)
        tl.store(dx + m * N + n, dx_row.to(dx.dtype.element_ty), n < N)


@triton.jit(do_not_specialize=["M", "programs"])
def dw_alone(
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
        dy_row = _load(dy + row_start(m, sizes, dy_steps, STRIDED) + n, inside)
        xh = _load(x + row_start(m, sizes, x_steps, STRIDED) + n, inside) * r
        dw += dw_terms(dy_row, xh, x.dtype.element_ty, EARLY)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    share = tl.sum(dw.to(tl.float64), axis=0, keep_dims=True).to(tl.float32)
    tl.store(partials + program.to(tl.int64) * N + n, share, n < N)


@triton.jit(do_not_specialize=["programs"])
def sum_partials(
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
