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
#
# A word is 16 bytes. The compiler loads a word at once if it can prove that the address is a multiple of 16 bytes.
# Triton tells it only which integer arguments are multiples of 16. Two constants serve other rows:
# MULTIPLE: the number of elements in a word if it divides N and all steps, and 16 does not divide all; otherwise 1.
# WORD: the number of elements in a word, if rows are contiguous and may begin in the middle of a word; otherwise 1. The
# first `lead` columns of such a row come before its first whole word. The rows of a tile are APART rows apart, so all
# have the same lead. The PIECES hold the `body` columns, those in whole words, and one more piece (see `ends_of`) holds
# the columns at both ends. Column numbers n count from the first whole word.
#
# HEADS: how many weights there are. Row m has that of head m % HEADS, so the rows of a tile are HEADS rows apart, and
# all tiles of a program have the rows of one head.
# V: over how many of the first columns the statistic is taken; None for all.


@triton.jit
def as_multiple(i, OF: tl.constexpr):
    """i, written so that the compiler sees that it is a multiple of OF."""
    return i if OF == 1 else i // OF * OF


@triton.jit
def row_start(m, sizes, steps, STRIDED: tl.constexpr, MULTIPLE: tl.constexpr):
    """Where row m of an input begins, in elements."""
    if STRIDED:
        middle, inner = sizes[0], sizes[1]
        j = m // inner
        i = j // middle
        at = i * as_multiple(steps[0], MULTIPLE)
        at = at + (j - i * middle) * as_multiple(steps[1], MULTIPLE)
        at = at + (m - j * inner) * as_multiple(steps[2], MULTIPLE)
    else:
        at = m * as_multiple(steps[2], MULTIPLE)
    return at


@triton.jit
def rows_of(tile, ROWS: tl.constexpr, APART: tl.constexpr):
    """The rows of a tile, in a column: consecutive ones, or ones that are APART rows apart."""
    if APART == 1 or ROWS == 1:
        m = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    else:
        first = (tile // APART).to(tl.int64) * (ROWS * APART) + tile % APART
        m = first + tl.arange(0, ROWS)[:, None] * APART
    return m


@triton.jit
def lead_of(tile, N, APART: tl.constexpr, WORD: tl.constexpr):
    """How many columns come before the first whole word in the rows of a tile."""
    return 0 if WORD == 1 else (WORD - tile % APART % WORD * (N % WORD).to(tl.int32) % WORD) % WORD


@triton.jit
def body_of(N, lead, WORD: tl.constexpr):
    """How many columns of a row are in whole words."""
    return N if WORD == 1 else as_multiple(N - lead, WORD)


@triton.jit
def start_of(start, lead, WORD: tl.constexpr):
    """Where the first whole word begins in rows that begin at `start`."""
    return start if WORD == 1 else as_multiple(start + lead, WORD)


@triton.jit
def weight_of(w, tile, N, HEADS: tl.constexpr):
    """The weight of the rows of a tile; `tile` can also be a row, or a program that takes the rows of one head."""
    return w + (tile % HEADS).to(tl.int64) * N


@triton.jit
def measured(values, n, V):
    """The values of the columns n over which the statistic is taken; zero for the others."""
    return values if V is None else tl.where(n < V, values, 0.0)


@triton.jit
def _fit(N, lead, body, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, WORD: tl.constexpr):
    """Which columns of the piece at the ends of rows are among SIZE aligned ones that are all inside the row."""
    i = tl.arange(0, BLOCK_N)[None, :] // SIZE * SIZE
    n = tl.where(i < WORD, i - WORD, body - WORD + i)
    return (n >= -lead) & (n + SIZE <= N - lead)


@triton.jit
def ends_of(N, lead, body, part, BLOCK_N: tl.constexpr, WORD: tl.constexpr):
    """The piece with the partial words at both ends of rows; () if rows consist of whole words.

    Returns its columns, which of them are inside the row, which are in its first word and in its last, and which to
    store 1/2, 1/4 and 1/8 of a word at a time.
    """
    ends = ()
    if WORD > 1:
        i = tl.arange(0, BLOCK_N)[None, :]
        n = tl.where(i < WORD, i - WORD, body - WORD + i)
        n = tl.max_contiguous(tl.multiple_of(n, [1, WORD]), [1, WORD])
        word = tl.where(part == 0, i // WORD, 2)
        head, tail = word == tl.where(lead > 0, 0, -1), word == tl.where(lead + body < N, 1, -1)
        stored = i < 0
        together = ()
        for halvings in tl.static_range(1, 4):
            if WORD >> halvings > 0:
                fit = (head | tail) & _fit(N, lead, body, WORD >> halvings, BLOCK_N, WORD)
                together += (fit & (stored == 0),)
                stored = fit
        ends = n, stored, head, tail, together
    return ends


@triton.jit
def columns(first, ends, k, PIECES: tl.constexpr, BLOCK_N: tl.constexpr):
    """The columns of piece k."""
    return first + k * BLOCK_N if k < PIECES else ends[0]


@triton.jit
def at_piece(t, first, ends, k, PIECES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers to piece k of rows of t."""
    return t + first + k * BLOCK_N if k < PIECES else t + ends[0]


@triton.jit
def is_inside(n, N, k, PIECES: tl.constexpr, PARTS: tl.constexpr):
    """Which columns of piece k are inside the row; if one program holds a row, only its last piece can be partial."""
    return n < N if PARTS > 1 or k == PIECES - 1 else n >= 0


@triton.jit
def is_column(n, body, ends, k, PIECES: tl.constexpr, PARTS: tl.constexpr):
    """As `is_inside`, also for the piece with the ends of rows."""
    return is_inside(n, body, k, PIECES, PARTS) if k < PIECES else ends[1]


@triton.jit
def load_piece(piece, inside, m, M, ends, k, PIECES: tl.constexpr):
    """Loads piece k of rows m; zero outside."""
    if k < PIECES:
        loaded = tl.load(piece, inside, 0.0)
    else:
        # Loads whole words, which include columns of the rows before and after, but nothing beyond the last row.
        words = tl.load(piece, (ends[2] & (m < M)) | (ends[3] & (m < M - 1)), 0.0)
        rest = tl.load(piece, ends[3] & ends[1] & (m == M - 1), 0.0)
        loaded = tl.where(ends[1], tl.where(ends[3] & (m == M - 1), rest, words), 0.0)
    return loaded


@triton.jit
def load_weight(w, n, body, ends, k, PIECES: tl.constexpr):
    """The weight of columns n, from the addresses w; zero outside."""
    return tl.load(w, n < body if k < PIECES else ends[1], 0.0)


@triton.jit
def store_piece(piece, values, inside, m, M, ends, k, PIECES: tl.constexpr):
    """Stores piece k of rows m."""
    if k < PIECES:
        tl.store(piece, values, inside)
    else:
        for i in tl.static_range(len(ends[4])):
            tl.store(piece, values, ends[4][i] & (m < M))


@triton.jit
def load_fp32(pointer, inside):
    """Loads elements and converts them to fp32, exactly; zero outside."""
    return tl.load(pointer, inside, 0.0).to(tl.float32)


@triton.jit
def rstd_of(S, N, eps):
    """1 / sqrt(S / N + eps), from the fp64 sum S, in correctly rounded steps."""
    v = (S / N).to(tl.float32) + eps
    return tl.div_rn(1.0, tl.sqrt_rn(v))


@triton.jit
def cast_to(h, X: tl.constexpr):
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
        # One instruction for two numbers: a·1 + b. Triton would round each sum separately, as in `cast_to`.
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
        dx = cast_to(dx, X)
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
        y = (w.to(tl.float32) * cast_to(h, X)).to(Y)
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


@triton.jit
def forward_tile(
    tile, part, x, residual, w, y, s, rstd, shares, M, N, parts, sizes, x_steps, residual_steps, eps, offset, V,
    EARLY: tl.constexpr, FIRST: tl.constexpr, STRIDED: tl.constexpr, MULTIPLE: tl.constexpr, WORD: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, APART: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Computes the ROWS rows of a tile, reading them once; if PARTS > 1, one part of a row."""
    N = as_multiple(N, MULTIPLE)
    if HEADS > 1:
        w = weight_of(w, tile, N, HEADS)
    m = rows_of(tile, ROWS, APART)
    lead = lead_of(tile, N, APART, WORD)
    body = body_of(N, lead, WORD)
    first = part * (PIECES * BLOCK_N) + tl.arange(0, BLOCK_N)[None, :]
    ends = ends_of(N, lead, body, part, BLOCK_N, WORD)
    ALL: tl.constexpr = PIECES if WORD == 1 else PIECES + 1
    row = ()
    for k in tl.static_range(ALL):
        n = columns(first, ends, k, PIECES, BLOCK_N)
        start = start_of(row_start(m, sizes, x_steps, STRIDED, MULTIPLE), lead, WORD)
        row += (load_piece(x + start + n, (m < M) & (n < body), m, M, ends, k, PIECES),)
    if residual is not None:
        total = ()
        for k in tl.static_range(ALL):
            n = columns(first, ends, k, PIECES, BLOCK_N)
            start = start_of(row_start(m, sizes, residual_steps, STRIDED, MULTIPLE), lead, WORD)
            other = load_piece(residual + start + n, (m < M) & (n < body), m, M, ends, k, PIECES)
            total += ((row[k].to(tl.float32) + other.to(tl.float32)).to(x.dtype.element_ty),)
        row = total
        for k in tl.static_range(ALL):
            n = columns(first, ends, k, PIECES, BLOCK_N)
            start = start_of(m * N, lead, WORD)
            store_piece(s + start + n, row[k], (m < M) & (n < body), m, M, ends, k, PIECES)
    squares = tl.zeros([ROWS, BLOCK_N], tl.float64)
    for k in tl.static_range(ALL):
        d = measured(row[k].to(tl.float32), columns(first, ends, k, PIECES, BLOCK_N) + lead, V).to(tl.float64)
        squares = tl.fma(d, d, squares)  # the square is exact, so fusing changes nothing
    S = tl.sum(squares, axis=1, keep_dims=True)
    if PARTS > 1:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        S = sum_of_shares(S, shares + m * parts, part, parts, PARTS)
        packed = ()
        for k in tl.static_range(ALL):
            packed += (_packed(row[k]),)
        row = packed
    r = rstd_of(S, N if V is None else V, eps)
    if rstd is not None:
        tl.store(rstd + m, r, m < M)
    r = factor_of(r, x.dtype.element_ty, FIRST)
    for k in tl.static_range(ALL):
        n = columns(first, ends, k, PIECES, BLOCK_N)
        h = row[k].to(tl.float32) * r
        weight = None if w is None else load_weight(w + lead + n, n, body, ends, k, PIECES)
        out = scaled_output(h, weight, offset, x.dtype.element_ty, y.dtype.element_ty, EARLY)
        start = start_of(m * N, lead, WORD)
        store_piece(y + start + n, out, (m < M) & (n < body), m, M, ends, k, PIECES)


@triton.jit(do_not_specialize=["M"])
def forward_block(
    x, residual, w, y, s, rstd, shares, M, N, parts, sizes, x_steps, residual_steps, eps, offset, V,
    EARLY: tl.constexpr, FIRST: tl.constexpr, STRIDED: tl.constexpr, MULTIPLE: tl.constexpr, WORD: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, APART: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Each program computes a tile, or one part of it."""
    forward_tile(
        tl.program_id(0) // parts, tl.program_id(0) % parts, x, residual, w, y, s, rstd, shares, M, N, parts,
        sizes, x_steps, residual_steps, eps, offset, V,
        EARLY, FIRST, STRIDED, MULTIPLE, WORD, PARTS, ROWS, APART, PIECES, BLOCK_N, HEADS, OVERLAP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "M2", "tiles"])
def forward_two(
    x, w, y, rstd, x2, w2, y2, rstd2, M, N, sizes, x_steps, M2, N2, sizes2, x2_steps, tiles, eps, offset,
    EARLY: tl.constexpr, FIRST: tl.constexpr,
    STRIDED: tl.constexpr, MULTIPLE: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
    STRIDED2: tl.constexpr, MULTIPLE2: tl.constexpr, ROWS2: tl.constexpr, PIECES2: tl.constexpr, BLOCK_N2: tl.constexpr,
    HEADS2: tl.constexpr,
):  # fmt: skip
    """Two calls of `forward_block` without a residual: the first `tiles` programs make the first."""
    program = tl.program_id(0)
    if program < tiles:
        forward_tile(
            program, 0, x, None, w, y, None, rstd, None, M, N, 1, sizes, x_steps, None, eps, offset,
            None, EARLY, FIRST, STRIDED, MULTIPLE, 1, 1, ROWS, HEADS, PIECES, BLOCK_N, HEADS, False,
        )  # fmt: skip
    else:
        forward_tile(
            program - tiles, 0, x2, None, w2, y2, None, rstd2, None, M2, N2, 1, sizes2, x2_steps, None, eps, offset,
            None, EARLY, FIRST, STRIDED2, MULTIPLE2, 1, 1, ROWS2, HEADS2, PIECES2, BLOCK_N2, HEADS2, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def forward_sandwich(
    x, residual, w, w2, y, s, rstd, rstd2, M, N, sizes, x_steps, residual_steps, eps, offset,
    EARLY: tl.constexpr, FIRST: tl.constexpr, STRIDED: tl.constexpr, MULTIPLE: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program computes the norm of a tile of x, adds the residual, and computes the norm of the sum s."""
    N = as_multiple(N, MULTIPLE)
    m = rows_of(tl.program_id(0), ROWS, 1)
    first = tl.arange(0, BLOCK_N)[None, :]
    row = ()
    other = ()
    squares = tl.zeros([ROWS, BLOCK_N], tl.float64)
    for k in tl.static_range(PIECES):
        n = first + k * BLOCK_N
        inside = (m < M) & (n < N)
        row += (tl.load(x + row_start(m, sizes, x_steps, STRIDED, MULTIPLE) + n, inside, 0.0),)
        other += (tl.load(residual + row_start(m, sizes, residual_steps, STRIDED, MULTIPLE) + n, inside, 0.0),)
    for k in tl.static_range(PIECES):
        d = row[k].to(tl.float32).to(tl.float64)
        squares = tl.fma(d, d, squares)  # the square is exact, so fusing changes nothing
    r = rstd_of(tl.sum(squares, axis=1, keep_dims=True), N, eps)
    if rstd is not None:
        tl.store(rstd + m, r, m < M)
    r = factor_of(r, x.dtype.element_ty, FIRST)
    total = ()
    squares = tl.zeros([ROWS, BLOCK_N], tl.float64)
    for k in tl.static_range(PIECES):
        n = first + k * BLOCK_N
        weight = None if w is None else tl.load(w + n, n < N, 0.0)
        h = scaled_output(row[k].to(tl.float32) * r, weight, offset, x.dtype.element_ty, s.dtype.element_ty, EARLY)
        # h is not 0 beyond the end of a row if r is inf or NaN.
        sum_k = tl.where(n < N, (h.to(tl.float32) + other[k].to(tl.float32)).to(s.dtype.element_ty), 0.0)
        tl.store(s + m * N + n, sum_k, (m < M) & (n < N))
        d = sum_k.to(tl.float32).to(tl.float64)
        squares = tl.fma(d, d, squares)
        total += (sum_k,)
    r = rstd_of(tl.sum(squares, axis=1, keep_dims=True), N, eps)
    if rstd2 is not None:
        tl.store(rstd2 + m, r, m < M)
    r = factor_of(r, s.dtype.element_ty, FIRST)
    for k in tl.static_range(PIECES):
        n = first + k * BLOCK_N
        weight = None if w2 is None else tl.load(w2 + n, n < N, 0.0)
        out = scaled_output(total[k].to(tl.float32) * r, weight, offset, s.dtype.element_ty, y.dtype.element_ty, EARLY)
        tl.store(y + m * N + n, out, (m < M) & (n < N))


@triton.jit(do_not_specialize=["M"])
def forward_loop(
    x, residual, w, y, s, rstd, M, N, sizes, x_steps, residual_steps, eps, offset, V,
    EARLY: tl.constexpr, FIRST: tl.constexpr, STRIDED: tl.constexpr, MULTIPLE: tl.constexpr, BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Each program loops over one row twice: once for the sum, once for y."""
    N = as_multiple(N, MULTIPLE)
    m = tl.program_id(0).to(tl.int64)
    if HEADS > 1:
        w = weight_of(w, m, N, HEADS)
    rows = x + row_start(m, sizes, x_steps, STRIDED, MULTIPLE)
    squares = tl.zeros([BLOCK_N], tl.float64)
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        row = tl.load(rows + n, n < N, 0.0)
        if residual is not None:
            other = load_fp32(residual + row_start(m, sizes, residual_steps, STRIDED, MULTIPLE) + n, n < N)
            row = (row.to(tl.float32) + other).to(row.dtype)
            tl.store(s + m * N + n, row, n < N)
        d = measured(row.to(tl.float32), n, V).to(tl.float64)
        squares = tl.fma(d, d, squares)  # the square is exact, so fusing changes nothing
    r = rstd_of(tl.sum(squares, axis=0), N if V is None else V, eps)
    if rstd is not None:
        tl.store(rstd + m, r)
    r = factor_of(r, x.dtype.element_ty, FIRST)
    if residual is not None:
        rows = s + m * N
        tl.debug_barrier()  # threads read s elements that other threads have written
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        h = load_fp32(rows + n, n < N) * r
        weight = None if w is None else tl.load(w + n, n < N, 0.0)
        tl.store(y + m * N + n, scaled_output(h, weight, offset, x.dtype.element_ty, y.dtype.element_ty, EARLY), n < N)


@triton.jit
def load_rows(
    t, m, n, M, lead, body, ends, sizes, steps, STRIDED: tl.constexpr, MULTIPLE: tl.constexpr, WORD: tl.constexpr,
    PARTS: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Loads the pieces of rows of t; zero below the last row."""
    row = ()
    for k in tl.static_range(PIECES if WORD == 1 else PIECES + 1):
        of_piece = columns(n, ends, k, PIECES, BLOCK_N)
        inside = (m < M) & is_column(of_piece, body, ends, k, PIECES, PARTS)
        start = start_of(row_start(m, sizes, steps, STRIDED, MULTIPLE), lead, WORD)
        row += (load_piece(at_piece(t + start, n, ends, k, PIECES, BLOCK_N), inside, m, M, ends, k, PIECES),)
    return row


@triton.jit
def added(
    row, t, m, n, M, lead, body, ends, sizes, steps, STRIDED: tl.constexpr, MULTIPLE: tl.constexpr,
    WORD: tl.constexpr, PARTS: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of the pieces of `row` and the pieces of t that `load_rows` loads, rounded to their dtype."""
    other = load_rows(t, m, n, M, lead, body, ends, sizes, steps, STRIDED, MULTIPLE, WORD, PARTS, PIECES, BLOCK_N)
    total = ()
    for k in tl.static_range(PIECES if WORD == 1 else PIECES + 1):
        total += (rounded_sum(row[k], other[k]),)
    return total


@triton.jit
def load_weights(
    w, n, lead, body, ends, ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr, ALL: tl.constexpr
):  # fmt: skip
    """Loads the pieces of the weight, for tiles of ROWS rows; () if there is none."""
    weight = ()
    if w is not None:
        for k in tl.static_range(ALL):
            # Narrow pieces: with a copy for each row, Triton distributes rows over threads as it loads them.
            of_rows = w + lead + tl.zeros([ROWS, 1], tl.int32) if BLOCK_N < 256 and PIECES > 1 else w + lead
            at = at_piece(of_rows, n, ends, k, PIECES, BLOCK_N)
            weight += (load_weight(at, columns(n, ends, k, PIECES, BLOCK_N), body, ends, k, PIECES),)
    return weight


@triton.jit
def turns_of(M, program, programs, ROWS: tl.constexpr, APART: tl.constexpr):
    """How many tiles of ROWS rows this program processes. No intermediate value exceeds M, which may be 2³¹ - 1."""
    last = (M - 1) // ROWS if APART == 1 or ROWS == 1 else (M - 1) // (ROWS * APART) * APART + (APART - 1)
    return last // programs + (last % programs >= program).to(tl.int32)


@triton.jit
def normalized(x, r, inside):
    """x·rstd; zero beyond the end of the row, where 0·inf would be NaN."""
    return tl.where(inside, x.to(tl.float32) * r, 0.0)


@triton.jit
def dw_terms(dy, xh, X: tl.constexpr, EARLY: tl.constexpr):
    """The terms that each element adds to dw."""
    h = cast_to(xh, X) if EARLY else xh
    return dy * h


@triton.jit
def dx_and_dw(
    dy_row, x_row, ds_row, weight, r, c, dx, dw, m, n, M, N, lead, body, ends, offset, V,
    EARLY: tl.constexpr, ROUND_FIRST: tl.constexpr, WORD: tl.constexpr, PARTS: tl.constexpr,
    PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores dx of rows m, and returns dw with the terms of these rows added. `ds_row` and `weight` are () if absent.

    c: the mean of g·xh over each row.
    """
    summed = ()
    for k in tl.static_range(PIECES if WORD == 1 else PIECES + 1):
        of_piece = columns(n, ends, k, PIECES, BLOCK_N)
        inside = is_column(of_piece, body, ends, k, PIECES, PARTS)
        xh = normalized(x_row[k], r, inside)
        g = times_scale(dy_row[k], weight[k] if len(weight) > 0 else None, offset, EARLY)
        dx_row = r * (g - measured(xh * c, of_piece + lead, V))
        if len(ds_row) > 0:
            dx_row = plus_ds(dx_row, ds_row[k], dx.dtype.element_ty, ROUND_FIRST)
        out = at_piece(dx + start_of(m * N, lead, WORD), n, ends, k, PIECES, BLOCK_N)
        store_piece(out, dx_row.to(dx.dtype.element_ty), (m < M) & inside, m, M, ends, k, PIECES)
        summed += (dw[k] + dw_terms(dy_row[k].to(tl.float32), xh, x_row[k].dtype, EARLY),)
    return summed


@triton.jit(do_not_specialize=["M", "programs"])
def backward_block(
    dy, dy2, dy3, ds, x, w, rstd, dx, partials, shares, M, N, parts, programs,
    sizes, dy_steps, dy2_steps, dy3_steps, ds_steps, x_steps, offset, V,
    EARLY: tl.constexpr, ROUND_FIRST: tl.constexpr,
    STRIDED: tl.constexpr, MULTIPLE: tl.constexpr, WORD: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, APART: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr,
    STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """dx of every `programs`-th tile of ROWS rows, and their share of dw; if PARTS > 1, of one part of each row.

    If STAGES > 1, the next tiles are loaded into shared memory while this one is processed. At any time all programs
    work on neighbouring tiles, for which memory is faster than if each worked on its own range of rows. If rows
    begin anywhere within a word, or HEADS > 1, APART divides `programs` or each program has one tile, so that its rows
    have one lead or one weight.
    """
    N = as_multiple(N, MULTIPLE)
    program, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    if HEADS > 1:
        w = weight_of(w, program, N, HEADS)
    n = part * (PIECES * BLOCK_N) + tl.arange(0, BLOCK_N)[None, :]
    lead = lead_of(program, N, APART, WORD)
    body = body_of(N, lead, WORD)
    ends = ends_of(N, lead, body, part, BLOCK_N, WORD)
    ALL: tl.constexpr = PIECES if WORD == 1 else PIECES + 1
    dw = ()
    for _ in tl.static_range(ALL):
        dw += (tl.zeros([ROWS, BLOCK_N], tl.float32),)
    weight = load_weights(w, n, lead, body, ends, ROWS, PIECES, BLOCK_N, ALL)
    width = tl.full([ROWS, 1], N if V is None else V, tl.float64)
    inverse = 1.0 / width
    if PARTS > 1 and OVERLAP:
        tl.extra.cuda.gdc_wait()
    for turn in tl.range(0, turns_of(M, program, programs, ROWS, APART), num_stages=STAGES):
        m = rows_of(program + turn * programs, ROWS, APART)
        dy_row = load_rows(
            dy, m, n, M, lead, body, ends, sizes, dy_steps, STRIDED, MULTIPLE, WORD, PARTS, PIECES, BLOCK_N
        )
        if dy2 is not None:
            dy_row = added(
                dy_row, dy2, m, n, M, lead, body, ends, sizes, dy2_steps,
                STRIDED, MULTIPLE, WORD, PARTS, PIECES, BLOCK_N,
            )  # fmt: skip
        if dy3 is not None:
            dy_row = added(
                dy_row, dy3, m, n, M, lead, body, ends, sizes, dy3_steps,
                STRIDED, MULTIPLE, WORD, PARTS, PIECES, BLOCK_N,
            )  # fmt: skip
        x_row = load_rows(x, m, n, M, lead, body, ends, sizes, x_steps, STRIDED, MULTIPLE, WORD, PARTS, PIECES, BLOCK_N)
        ds_row = ()
        if ds is not None and STAGES > 1:
            ds_row = load_rows(
                ds, m, n, M, lead, body, ends, sizes, ds_steps, STRIDED, MULTIPLE, WORD, PARTS, PIECES, BLOCK_N
            )
        r = tl.load(rstd + m, m < M, 0.0)
        products = tl.zeros([ROWS, BLOCK_N], tl.float64)
        for k in tl.static_range(ALL):
            of_piece = columns(n, ends, k, PIECES, BLOCK_N)
            xh = normalized(x_row[k], r, is_column(of_piece, body, ends, k, PIECES, PARTS))
            g = times_scale(dy_row[k], None if w is None else weight[k], offset, EARLY)
            products += (g * xh).to(tl.float64)
        S = tl.sum(products, axis=1, keep_dims=True)
        if PARTS > 1:
            S = sum_of_shares(S, shares + m * parts, part, parts, PARTS)
        c = mean_of(S + 0.0, width, inverse)  # +0.0, never -0.0
        if ds is not None and STAGES == 1:  # loaded this late because registers are short before
            ds_row = load_rows(
                ds, m, n, M, lead, body, ends, sizes, ds_steps, STRIDED, MULTIPLE, WORD, PARTS, PIECES, BLOCK_N
            )
        dw = dx_and_dw(
            dy_row, x_row, ds_row, weight, r, c, dx, dw, m, n, M, N, lead, body, ends, offset, V,
            EARLY, ROUND_FIRST, WORD, PARTS, PIECES, BLOCK_N,
        )  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # sum_partials may start; it waits for this kernel's end
    if partials is not None:
        store_share(dw, partials + program.to(tl.int64) * N + lead, n, body, ends, PIECES, BLOCK_N, ALL)


@triton.jit
def store_share(
    dw, partials, n, body, ends, PIECES: tl.constexpr, BLOCK_N: tl.constexpr, ALL: tl.constexpr
):  # fmt: skip
    """Stores the sums of dw over the rows of a program."""
    for k in tl.static_range(ALL):
        share = tl.sum(dw[k].to(tl.float64), axis=0, keep_dims=True).to(tl.float32)
        of_piece = columns(n, ends, k, PIECES, BLOCK_N)
        at = at_piece(partials, n, ends, k, PIECES, BLOCK_N)
        tl.store(at, share, of_piece < body if k < PIECES else ends[1])


@triton.jit(do_not_specialize=["M"])
def backward_loop(
    dy, ds, x, w, rstd, dx, M, N, sizes, dy_steps, ds_steps, x_steps, offset, V,
    EARLY: tl.constexpr, ROUND_FIRST: tl.constexpr, STRIDED: tl.constexpr, MULTIPLE: tl.constexpr,
    BLOCK_N: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Each program computes dx of one row, looping over it twice: once for the sum, once for dx."""
    N = as_multiple(N, MULTIPLE)
    m = tl.program_id(0).to(tl.int64)
    if HEADS > 1:
        w = weight_of(w, m, N, HEADS)
    r = tl.load(rstd + m)
    dy += row_start(m, sizes, dy_steps, STRIDED, MULTIPLE)
    x += row_start(m, sizes, x_steps, STRIDED, MULTIPLE)
    products = tl.zeros([BLOCK_N], tl.float64)
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        xh = normalized(load_fp32(x + n, n < N), r, n < N)
        g = times_scale(load_fp32(dy + n, n < N), None if w is None else load_fp32(w + n, n < N), offset, EARLY)
        products += (g * xh).to(tl.float64)
    c = (tl.sum(products, axis=0) / (N if V is None else V)).to(tl.float32)
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        xh = load_fp32(x + n, n < N) * r
        g = times_scale(load_fp32(dy + n, n < N), None if w is None else load_fp32(w + n, n < N), offset, EARLY)
        dx_row = r * (g - measured(xh * c, n, V))
        if ds is not None:
            ds_row = tl.load(ds + row_start(m, sizes, ds_steps, STRIDED, MULTIPLE) + n, n < N, 0.0)
            dx_row = plus_ds(dx_row, ds_row, dx.dtype.element_ty, ROUND_FIRST)
        tl.store(dx + m * N + n, dx_row.to(dx.dtype.element_ty), n < N)


@triton.jit(do_not_specialize=["M", "programs"])
def dw_alone(
    dy, dy2, dy3, x, rstd, partials, M, N, parts, programs, sizes, dy_steps, dy2_steps, dy3_steps, x_steps,
    EARLY: tl.constexpr, STRIDED: tl.constexpr, MULTIPLE: tl.constexpr, ROWS: tl.constexpr, APART: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A share of dw for BLOCK_N columns: the sum over every `programs`-th tile of ROWS rows, APART rows apart."""
    N = as_multiple(N, MULTIPLE)
    program, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    n = part.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    dw = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for turn in tl.range(0, turns_of(M, program, programs, ROWS, APART), num_stages=STAGES):
        m = rows_of(program + turn * programs, ROWS, APART)
        inside = (m < M) & (n < N)
        r = tl.load(rstd + m, m < M, 0.0)
        dy_row = tl.load(dy + row_start(m, sizes, dy_steps, STRIDED, MULTIPLE) + n, inside, 0.0)
        if dy2 is not None:
            more = tl.load(dy2 + row_start(m, sizes, dy2_steps, STRIDED, MULTIPLE) + n, inside, 0.0)
            dy_row = rounded_sum(dy_row, more)
        if dy3 is not None:
            more = tl.load(dy3 + row_start(m, sizes, dy3_steps, STRIDED, MULTIPLE) + n, inside, 0.0)
            dy_row = rounded_sum(dy_row, more)
        xh = load_fp32(x + row_start(m, sizes, x_steps, STRIDED, MULTIPLE) + n, inside) * r
        dw += dw_terms(dy_row.to(tl.float32), xh, x.dtype.element_ty, EARLY)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    share = tl.sum(dw.to(tl.float64), axis=0, keep_dims=True).to(tl.float32)
    tl.store(partials + program.to(tl.int64) * N + n, share, n < N)


@triton.jit
def sum_gradients(
    dy, dy2, dy3, summed, N, parts, sizes, dy_steps, dy2_steps, dy3_steps,
    STRIDED: tl.constexpr, MULTIPLE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of a row of the sum of gradients, for kernels that take only one gradient."""
    N = as_multiple(N, MULTIPLE)
    m, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.load(dy + row_start(m, sizes, dy_steps, STRIDED, MULTIPLE) + n, n < N, 0.0)
    total = rounded_sum(total, tl.load(dy2 + row_start(m, sizes, dy2_steps, STRIDED, MULTIPLE) + n, n < N, 0.0))
    if dy3 is not None:
        total = rounded_sum(total, tl.load(dy3 + row_start(m, sizes, dy3_steps, STRIDED, MULTIPLE) + n, n < N, 0.0))
    tl.store(summed + m * N + n, total, n < N)


@triton.jit(do_not_specialize=["programs"])
def sum_partials(
    partials, dw, programs, N,
    MULTIPLE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """dw of BLOCK_N columns: the sum of all programs' shares, always in the same order."""
    N = as_multiple(N, MULTIPLE)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # this kernel may start before the one that computes the partials has ended
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros([ROWS, BLOCK_N], tl.float64)
    for first in range(0, programs, ROWS):
        program = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(partials + program.to(tl.int64) * N + n, (program < programs) & (n < N), 0.0).to(tl.float64)
    tl.store(dw + n, tl.sum(total, axis=0, keep_dims=True).to(tl.float32).to(dw.dtype.element_ty), n < N)
