# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code="assignment, var-annotated"
"""Rows in parts on the GPU, in Triton: what each rank computes before and after the all-reduce of the sums S.

Names, pieces, words and tiles are those of kernels.py, whose functions do the arithmetic. S holds one fp64 number a
row. `whole` is the width of whole rows, and N is the number of columns that this rank has. If N is more than a program
holds, the columns are split into `parts` sections. In the kernels before the all-reduce, which sum over the columns,
one program takes all sections of a row one after the other. In the kernels after it, each section has its own program.

The kernels before the all-reduce take the rows from the first to the last, and those after it from the last to the
first, because the rows that were read last are still in the L2 cache.
"""

import triton
import triton.language as tl

from rmsnorm.kernels.gpu.kernels import (
    added,
    as_multiple,
    at_piece,
    body_of,
    columns,
    dx_and_dw,
    ends_of,
    factor_of,
    is_column,
    lead_of,
    load_rows,
    load_weight,
    load_weights,
    mean_of,
    normalized,
    rows_of,
    rstd_of,
    scaled_output,
    start_of,
    store_piece,
    store_share,
    times_scale,
    turns_of,
)


@triton.jit(do_not_specialize=["M"])
def begin_forward(
    x, residual, s, S, M, N, parts, sizes, x_steps, residual_steps,
    STRIDED: tl.constexpr, MULTIPLE: tl.constexpr, WORD: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, APART: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """s and the sums of squares of a tile of ROWS rows."""
    N = as_multiple(N, MULTIPLE)
    tile = tl.program_id(0)
    m = rows_of(tile, ROWS, APART)
    lead = lead_of(tile, N, APART, WORD)
    body = body_of(N, lead, WORD)
    squares = tl.zeros([ROWS, BLOCK_N], tl.float64)
    for part in range(0, parts):
        n = part * (PIECES * BLOCK_N) + tl.arange(0, BLOCK_N)[None, :]
        ends = ends_of(N, lead, body, part, BLOCK_N, WORD)
        row = load_rows(x, m, n, M, lead, body, ends, sizes, x_steps, STRIDED, MULTIPLE, WORD, PARTS, PIECES, BLOCK_N)
        if residual is not None:
            row = added(
                row, residual, m, n, M, lead, body, ends, sizes, residual_steps,
                STRIDED, MULTIPLE, WORD, PARTS, PIECES, BLOCK_N,
            )  # fmt: skip
            for k in tl.static_range(PIECES if WORD == 1 else PIECES + 1):
                inside = (m < M) & is_column(columns(n, ends, k, PIECES, BLOCK_N), body, ends, k, PIECES, PARTS)
                out = at_piece(s + start_of(m * N, lead, WORD), n, ends, k, PIECES, BLOCK_N)
                store_piece(out, row[k], inside, m, M, ends, k, PIECES)
        for k in tl.static_range(PIECES if WORD == 1 else PIECES + 1):
            d = row[k].to(tl.float32).to(tl.float64)
            squares = tl.fma(d, d, squares)  # the square is exact, so fusing changes nothing
    tl.store(S + m, tl.sum(squares, axis=1, keep_dims=True), m < M)


@triton.jit(do_not_specialize=["M"])
def finish_forward(
    x, w, S, y, rstd, M, N, whole, parts, sizes, x_steps, eps, offset,
    EARLY: tl.constexpr, FIRST: tl.constexpr, STRIDED: tl.constexpr, MULTIPLE: tl.constexpr, WORD: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, APART: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y and rstd of a tile of ROWS rows, or of one section of their columns."""
    N = as_multiple(N, MULTIPLE)
    tile, part = (tl.num_programs(0) - 1 - tl.program_id(0)) // parts, tl.program_id(0) % parts
    m = rows_of(tile, ROWS, APART)
    lead = lead_of(tile, N, APART, WORD)
    body = body_of(N, lead, WORD)
    n = part * (PIECES * BLOCK_N) + tl.arange(0, BLOCK_N)[None, :]
    ends = ends_of(N, lead, body, part, BLOCK_N, WORD)
    row = load_rows(x, m, n, M, lead, body, ends, sizes, x_steps, STRIDED, MULTIPLE, WORD, PARTS, PIECES, BLOCK_N)
    r = rstd_of(tl.load(S + m, m < M, 0.0), whole, eps)
    if rstd is not None:
        tl.store(rstd + m, r, m < M)
    r = factor_of(r, x.dtype.element_ty, FIRST)
    for k in tl.static_range(PIECES if WORD == 1 else PIECES + 1):
        of_piece = columns(n, ends, k, PIECES, BLOCK_N)
        weight = None if w is None else load_weight(w + lead + of_piece, of_piece, body, ends, k, PIECES)
        h = row[k].to(tl.float32) * r
        values = scaled_output(h, weight, offset, x.dtype.element_ty, y.dtype.element_ty, EARLY)
        out = at_piece(y + start_of(m * N, lead, WORD), n, ends, k, PIECES, BLOCK_N)
        inside = (m < M) & is_column(of_piece, body, ends, k, PIECES, PARTS)
        store_piece(out, values, inside, m, M, ends, k, PIECES)


@triton.jit(do_not_specialize=["M"])
def begin_backward(
    dy, x, w, rstd, S, M, N, parts, sizes, dy_steps, x_steps, offset,
    EARLY: tl.constexpr, STRIDED: tl.constexpr, MULTIPLE: tl.constexpr, WORD: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, APART: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sums of g·xh of a tile of ROWS rows."""
    N = as_multiple(N, MULTIPLE)
    tile = tl.program_id(0)
    m = rows_of(tile, ROWS, APART)
    lead = lead_of(tile, N, APART, WORD)
    body = body_of(N, lead, WORD)
    r = tl.load(rstd + m, m < M, 0.0)
    products = tl.zeros([ROWS, BLOCK_N], tl.float64)
    for part in range(0, parts):
        n = part * (PIECES * BLOCK_N) + tl.arange(0, BLOCK_N)[None, :]
        ends = ends_of(N, lead, body, part, BLOCK_N, WORD)
        dy_row = load_rows(
            dy, m, n, M, lead, body, ends, sizes, dy_steps, STRIDED, MULTIPLE, WORD, PARTS, PIECES, BLOCK_N
        )
        x_row = load_rows(x, m, n, M, lead, body, ends, sizes, x_steps, STRIDED, MULTIPLE, WORD, PARTS, PIECES, BLOCK_N)
        for k in tl.static_range(PIECES if WORD == 1 else PIECES + 1):
            of_piece = columns(n, ends, k, PIECES, BLOCK_N)
            weight = None if w is None else load_weight(w + lead + of_piece, of_piece, body, ends, k, PIECES)
            xh = normalized(x_row[k], r, is_column(of_piece, body, ends, k, PIECES, PARTS))
            products += (times_scale(dy_row[k], weight, offset, EARLY) * xh).to(tl.float64)
    tl.store(S + m, tl.sum(products, axis=1, keep_dims=True), m < M)


@triton.jit(do_not_specialize=["M", "programs"])
def finish_backward(
    dy, ds, x, w, rstd, S, dx, partials, M, N, whole, parts, programs, sizes, dy_steps, ds_steps, x_steps, offset,
    EARLY: tl.constexpr, STRIDED: tl.constexpr, MULTIPLE: tl.constexpr, WORD: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, APART: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """dx of every `programs`-th tile of ROWS rows, or of one section of their columns, and their share of dw.

    As in `backward_block`, STAGES tiles are loaded or processed at once, and all rows of a program have the same lead.
    """
    N = as_multiple(N, MULTIPLE)
    program, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    n = part * (PIECES * BLOCK_N) + tl.arange(0, BLOCK_N)[None, :]
    lead = lead_of(program, N, APART, WORD)
    body = body_of(N, lead, WORD)
    ends = ends_of(N, lead, body, part, BLOCK_N, WORD)
    ALL: tl.constexpr = PIECES if WORD == 1 else PIECES + 1
    dw = ()
    for _ in tl.static_range(ALL):
        dw += (tl.zeros([ROWS, BLOCK_N], tl.float32),)
    weight = load_weights(w, n, lead, body, ends, ROWS, PIECES, BLOCK_N, ALL)
    width = tl.full([ROWS, 1], whole, tl.float64)
    inverse = 1.0 / width
    turns = turns_of(M, program, programs, ROWS, APART)
    for turn in tl.range(0, turns, num_stages=STAGES):
        m = rows_of(program + (turns - 1 - turn) * programs, ROWS, APART)
        dy_row = load_rows(
            dy, m, n, M, lead, body, ends, sizes, dy_steps, STRIDED, MULTIPLE, WORD, PARTS, PIECES, BLOCK_N
        )
        x_row = load_rows(x, m, n, M, lead, body, ends, sizes, x_steps, STRIDED, MULTIPLE, WORD, PARTS, PIECES, BLOCK_N)
        ds_row = ()
        if ds is not None:
            ds_row = load_rows(
                ds, m, n, M, lead, body, ends, sizes, ds_steps, STRIDED, MULTIPLE, WORD, PARTS, PIECES, BLOCK_N
            )
        r = tl.load(rstd + m, m < M, 0.0)
        c = mean_of(tl.load(S + m, m < M, 0.0) + 0.0, width, inverse)  # +0.0, never -0.0
        dw = dx_and_dw(
            dy_row, x_row, ds_row, weight, r, c, dx, dw, m, n, M, N, lead, body, ends, offset, None,
            EARLY, False, WORD, PARTS, PIECES, BLOCK_N,
        )  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # sum_partials may start; it waits for this kernel's end
    if partials is not None:
        store_share(dw, partials + program.to(tl.int64) * N + lead, n, body, ends, PIECES, BLOCK_N, ALL)
