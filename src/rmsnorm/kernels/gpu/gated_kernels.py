# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code="assignment, var-annotated"
"""The arithmetic of gated_reference.py on the GPU, in Triton; kernels.py says how kernels are launched and named.

Every row of these kernels is one group of a row of x: see `plan.GatedForward`. M counts them, N is the width of one,
and row m has group m % groups, which selects its part of the weight.
"""

import triton
import triton.language as tl

from rmsnorm import gated_reference
from rmsnorm.kernels.gpu.kernels import (
    as_multiple,
    cast_to,
    dw_terms,
    is_inside,
    load_fp32,
    mean_of,
    normalized,
    row_start,
    rstd_of,
    turns_of,
)  # fmt: skip

_INVERSE_LN2 = tl.constexpr(gated_reference.INVERSE_LN2)
_ROUNDER = tl.constexpr(gated_reference.ROUNDER)
_LN2_HIGH = tl.constexpr(gated_reference.LN2_HIGH)
_LN2_LOW = tl.constexpr(gated_reference.LN2_LOW)
_COEFFICIENTS = tl.constexpr((*reversed(gated_reference.EXP_COEFFICIENTS), 1.0, 1.0))  # in the order of Horner's scheme
_TERMS = tl.constexpr(len(gated_reference.EXP_COEFFICIENTS) + 2)
_LEAST_EXPONENT = tl.constexpr(gated_reference.LEAST_EXPONENT)
_LARGEST_EXPONENT = tl.constexpr(gated_reference.LARGEST_EXPONENT)


@triton.jit
def _fp64(c: tl.constexpr):
    """A constant in fp64; Triton would round a plain number to fp32."""
    return tl.full([], c, tl.float64)


_INTERPRETED = tl.constexpr(not isinstance(_fp64, triton.JITFunction))  # Triton's interpreter cannot run PTX


@triton.jit
def _reciprocal(d):
    """1 / d, correctly rounded, for fp64 numbers of 1 to 2^290.

    From an approximation with an error of 2^-20, a cubic step yields a result within 0.51 units in the last place.
    Another step rounds it correctly, unless all bits of d's significand are ones (Markstein). Then the result may be
    one unit off, which changes no fp32 result (test_a_gate_whose_reciprocal_may_be_wrong_gives_the_same_results).
    Unlike `/`, this has no branch for numbers outside the range, so the steps of several elements overlap.
    """
    if _INTERPRETED:
        y = 1.0 / d
    else:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f64 $0, $1;", "=d,d", [d], dtype=tl.float64, is_pure=True, pack=1
        )  # fmt: skip
        e = tl.fma(-d, y, _fp64(1.0))
        y = tl.fma(y, tl.fma(e, e, e), y)
        y = tl.fma(y, tl.fma(-d, y, _fp64(1.0)), y)
    return y


@triton.jit
def _sigmoid(g):
    """(t, 1 / (1 + exp(-g))) in fp64 for fp32 numbers g of at least -200, with the operations of `gated_reference`.

    t is -g, or -60 for gates above 60, whose sigmoid is 1. Four fused multiply-adds each replace two operations of the
    reference with the same result. For `shifted`, both round to the same integer, because no fp32 number in the range
    is so close to an odd multiple of ln 2 / 2 that the product rounds to a tie. In the others, which multiply by the
    parts of ln 2 and by a power of two, the products are exact.
    """
    t = tl.where(g > -_LEAST_EXPONENT, _LEAST_EXPONENT, g * -1.0).to(tl.float64)  # `-g` would be 0 - g, so 0 for 0
    shifted = tl.fma(t, _fp64(_INVERSE_LN2), _fp64(_ROUNDER))
    n = shifted - _fp64(_ROUNDER)
    r = tl.fma(n, _fp64(-_LN2_HIGH), t)
    r = tl.fma(n, _fp64(-_LN2_LOW), r)
    p = tl.fma(r, _fp64(_COEFFICIENTS[0]), _fp64(_COEFFICIENTS[1]))
    for i in tl.static_range(2, _TERMS):
        p = tl.fma(p, r, _fp64(_COEFFICIENTS[i]))
    power = ((shifted.to(tl.int64, bitcast=True) + 1023) << 52).to(tl.float64, bitcast=True)  # 2^n
    return t, _reciprocal(tl.fma(p, power, _fp64(1.0)))


@triton.jit
def _silu(g, product):
    """silu(g) in fp32 from the fp64 product of t and the sigmoid; the sigmoid is 1 for large g and 0 below -200."""
    silu = tl.where(g > -_LEAST_EXPONENT, g, product.to(tl.float32) * -1.0)
    return tl.where(g < -_LARGEST_EXPONENT, g * 0.0, silu)


@triton.jit
def _computed(gate, SIGMOID: tl.constexpr):
    """silu(gate) or the sigmoid, and its derivative, in fp32."""
    g = gate.to(tl.float32)
    t, sigma = _sigmoid(g)
    rest = 1.0 - sigma
    if SIGMOID:
        factor = tl.where(g < -_LARGEST_EXPONENT, 0.0, sigma.to(tl.float32))
        slope = tl.where(g < -_LARGEST_EXPONENT, 0.0, (sigma * rest).to(tl.float32))
    else:
        product = t * sigma
        factor = _silu(g, product)
        slope = (sigma - product * rest).to(tl.float32)
        slope = tl.where(g < -_LARGEST_EXPONENT, 0.0, slope) + g * 0.0  # NaN for an infinite gate, as inf · 0
    return factor, slope


# A gate of 16 bits can have 65,536 values. So for large inputs one kernel writes `_computed` of each into a table, and
# the other kernels only read it. Nearly all gates of a model select entries from the same few KB, which stay in L1. An
# entry is a factor in fp32, or 64 bits with the factor in the lower half and the slope in the upper.


@triton.jit
def tabulate(table, BF16: tl.constexpr, SIGMOID: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr):
    """Fills the table for gates in bf16, or else in fp16. The kernel that reads it may start early, but waits."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    factor, slope = _computed(i.to(tl.int16).to(tl.bfloat16 if BF16 else tl.float16, bitcast=True), SIGMOID)
    if table.dtype.element_ty == tl.int64:
        low = factor.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        entry = slope.to(tl.int32, bitcast=True).to(tl.int64) << 32 | low
    else:
        entry = factor
    tl.store(table + i, entry)


@triton.jit
def _entry(gate, table):
    """The entry of the table for each gate.

    `tl.load` would move the gates to other threads and the entries back, and copy entries of later tiles to shared
    memory. `is_pure=False` keeps the compiler from moving the PTX before `_await_table`.
    """
    at = table + (gate.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)
    if _INTERPRETED:
        entry = tl.load(at)
    elif table.dtype.element_ty == tl.int64:
        entry = tl.inline_asm_elementwise(
            "ld.global.b64 $0, [$1];", "=l,l", [at.to(tl.int64)], dtype=tl.int64, is_pure=False, pack=1
        )  # fmt: skip
    else:
        entry = tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [at.to(tl.int64)], dtype=tl.float32, is_pure=False, pack=1
        )  # fmt: skip
    return entry


@triton.jit
def factor_of(gate, table, SIGMOID: tl.constexpr):
    """silu(gate) or the sigmoid, in fp32; table: None, or of the gate's dtype."""
    if table is None:
        factor, _ = _computed(gate, SIGMOID)
    elif table.dtype.element_ty == tl.int64:
        factor = _entry(gate, table).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        factor = _entry(gate, table)
    return factor


@triton.jit
def factor_and_slope(gate, table, SIGMOID: tl.constexpr):
    """silu(gate) or the sigmoid, and its derivative, in fp32; without the derivative if the table has none."""
    if table is None:
        factor, slope = _computed(gate, SIGMOID)
    elif table.dtype.element_ty == tl.int64:
        entry = _entry(gate, table)
        factor = entry.to(tl.int32).to(tl.float32, bitcast=True)
        slope = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        factor = _entry(gate, table)
        slope = factor
    return factor, slope


@triton.jit
def _await_table(table, OVERLAP: tl.constexpr):
    """Waits for the end of `tabulate`; this kernel may have started before that."""
    if table is not None and OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def times_weight(xh, w, X: tl.constexpr, EARLY: tl.constexpr):
    """xh = x·rstd times the weight in fp32, for x of dtype X. If EARLY, xh is rounded to X before."""
    h = cast_to(xh, X) if EARLY else xh
    return h if w is None else w.to(tl.float32) * h


@triton.jit
def before_gate(xh, w, X: tl.constexpr, EARLY: tl.constexpr):
    """What a gate that comes last multiplies, in fp32: xh·w, if EARLY rounded to their promoted dtype."""
    u = times_weight(xh, w, X, EARLY)
    if EARLY and w is not None and w.dtype == X:
        u = cast_to(u, X)  # two different dtypes are promoted to fp32
    return u


@triton.jit
def operands(dy, x, w, factor, r, inside, GATE_FIRST: tl.constexpr):
    """(d, g, xh) of the backward pass: the gradient of w·xh, the same times the weight, and the normalized row."""
    d = dy.to(tl.float32)
    z = x.to(tl.float32)
    if GATE_FIRST:
        z = z * factor
    else:
        d = d * factor
    g = d if w is None else d * w.to(tl.float32)
    return d, g, normalized(z, r, inside)


@triton.jit
def _pieces(rows, n, below, N, PIECES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Loads the pieces of rows that begin at these addresses; zero for rows of which `below`, m < M, is false."""
    loaded = ()
    for k in tl.static_range(PIECES):
        loaded += (tl.load(rows + n + k * BLOCK_N, below & is_inside(n + k * BLOCK_N, N, k, PIECES, 1), 0.0),)
    return loaded


@triton.jit(do_not_specialize=["M"])
def gated_forward_block(
    x, gate, table, w, y, rstd, M, N, groups, sizes, x_steps, gate_steps, eps,
    EARLY: tl.constexpr, SIGMOID: tl.constexpr, GATE_FIRST: tl.constexpr, GROUPED: tl.constexpr, STRIDED: tl.constexpr,
    MULTIPLE: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Each program computes ROWS rows, reading them once."""
    N = as_multiple(N, MULTIPLE)
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    rows = _pieces(x + row_start(m, sizes, x_steps, STRIDED, MULTIPLE), n, m < M, N, PIECES, BLOCK_N)
    gates = _pieces(gate + row_start(m, sizes, gate_steps, STRIDED, MULTIPLE), n, m < M, N, PIECES, BLOCK_N)
    _await_table(table, OVERLAP)
    squares = tl.zeros([ROWS, BLOCK_N], tl.float64)
    normed = ()  # what is normalized
    for k in tl.static_range(PIECES):
        if GATE_FIRST:
            normed += (rows[k].to(tl.float32) * factor_of(gates[k], table, SIGMOID),)
        else:
            normed += (rows[k],)
        d = normed[k].to(tl.float32).to(tl.float64)
        squares = tl.fma(d, d, squares)  # the square is exact, so fusing changes nothing
    r = rstd_of(tl.sum(squares, axis=1, keep_dims=True), N, eps)
    if rstd is not None:
        tl.store(rstd + m, r, m < M)
    first = m % groups * N if GROUPED else 0  # column of the weight
    for k in tl.static_range(PIECES):
        inside = is_inside(n + k * BLOCK_N, N, k, PIECES, 1)
        xh = normed[k].to(tl.float32) * r
        weight = None if w is None else tl.load(w + first + n + k * BLOCK_N, inside, 0.0)
        if GATE_FIRST:
            out = times_weight(xh, weight, x.dtype.element_ty, EARLY)
        else:
            out = before_gate(xh, weight, x.dtype.element_ty, EARLY) * factor_of(gates[k], table, SIGMOID)
        tl.store(y + m * N + n + k * BLOCK_N, out.to(y.dtype.element_ty), (m < M) & inside)


@triton.jit(do_not_specialize=["M"])
def gated_forward_loop(
    x, gate, table, w, y, rstd, M, N, groups, sizes, x_steps, gate_steps, eps,
    EARLY: tl.constexpr, SIGMOID: tl.constexpr, GATE_FIRST: tl.constexpr, STRIDED: tl.constexpr, MULTIPLE: tl.constexpr,
    BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Each program loops over one row twice: once for the sum, once for y."""
    N = as_multiple(N, MULTIPLE)
    m = tl.program_id(0).to(tl.int64)
    x += row_start(m, sizes, x_steps, STRIDED, MULTIPLE)
    gate += row_start(m, sizes, gate_steps, STRIDED, MULTIPLE)
    _await_table(table, OVERLAP)
    squares = tl.zeros([BLOCK_N], tl.float64)
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        row = load_fp32(x + n, n < N)
        if GATE_FIRST:
            row = row * factor_of(tl.load(gate + n, n < N, 0.0), table, SIGMOID)
        d = row.to(tl.float64)
        squares = tl.fma(d, d, squares)  # the square is exact, so fusing changes nothing
    r = rstd_of(tl.sum(squares, axis=0), N, eps)
    if rstd is not None:
        tl.store(rstd + m, r)
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        row = load_fp32(x + n, n < N)
        factor = factor_of(tl.load(gate + n, n < N, 0.0), table, SIGMOID)
        weight = None if w is None else tl.load(w + m % groups * N + n, n < N, 0.0)
        if GATE_FIRST:
            out = times_weight(row * factor * r, weight, x.dtype.element_ty, EARLY)
        else:
            out = before_gate(row * r, weight, x.dtype.element_ty, EARLY) * factor
        tl.store(y + m * N + n, out.to(y.dtype.element_ty), n < N)


@triton.jit(do_not_specialize=["M", "programs"])
def gated_backward_block(
    dy, x, gate, table, w, rstd, dx, dgate, partials, M, N, groups, programs, sizes, dy_steps, x_steps, gate_steps,
    EARLY: tl.constexpr, SIGMOID: tl.constexpr, GATE_FIRST: tl.constexpr, STRIDED: tl.constexpr,
    MULTIPLE: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """dx and dgate of every `programs`-th tile of ROWS rows of one group, and their share of dw.

    If STAGES > 1, the next tiles are loaded into shared memory while this one is processed.
    """
    N = as_multiple(N, MULTIPLE)
    program, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    n = tl.arange(0, BLOCK_N)[None, :]
    column = group.to(tl.int64) * N + n  # of the weight and of dw
    dw = ()
    weight = ()
    for k in tl.static_range(PIECES):
        dw += (tl.zeros([ROWS, BLOCK_N], tl.float32),)
        if w is not None:
            weight += (tl.load(w + column + k * BLOCK_N, n + k * BLOCK_N < N, 0.0),)
    width = tl.full([ROWS, 1], N, tl.float64)
    inverse = 1.0 / width
    _await_table(table, OVERLAP)
    for turn in tl.range(0, turns_of(M // groups, program, programs, ROWS, 1), num_stages=STAGES):
        i = (program + turn * programs).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        m = i * groups + group
        dy_row = _pieces(dy + row_start(m, sizes, dy_steps, STRIDED, MULTIPLE), n, m < M, N, PIECES, BLOCK_N)
        x_row = _pieces(x + row_start(m, sizes, x_steps, STRIDED, MULTIPLE), n, m < M, N, PIECES, BLOCK_N)
        gate_row = _pieces(gate + row_start(m, sizes, gate_steps, STRIDED, MULTIPLE), n, m < M, N, PIECES, BLOCK_N)
        r = tl.load(rstd + m, m < M, 0.0)
        products = tl.zeros([ROWS, BLOCK_N], tl.float64)
        factors = ()
        slopes = ()
        summed = ()
        for k in tl.static_range(PIECES):
            inside = is_inside(n + k * BLOCK_N, N, k, PIECES, 1)
            part = None if w is None else weight[k]
            factor, slope = factor_and_slope(gate_row[k], table, SIGMOID)
            d, g, xh = operands(dy_row[k], x_row[k], part, factor, r, inside, GATE_FIRST)
            products += (g * xh).to(tl.float64)
            summed += (dw[k] + dw_terms(d, xh, x.dtype.element_ty, EARLY),)
            if dgate is not None and not GATE_FIRST:
                of_factor = dy_row[k].to(tl.float32) * before_gate(xh, part, x.dtype.element_ty, EARLY)
                out = (of_factor * slope).to(dgate.dtype.element_ty)
                tl.store(dgate + m * N + n + k * BLOCK_N, out, (m < M) & inside)
            factors += (factor,)
            slopes += (slope,)
        dw = summed
        c = mean_of(tl.sum(products, axis=1, keep_dims=True) + 0.0, width, inverse)  # +0.0, never -0.0
        for k in tl.static_range(PIECES):
            inside = is_inside(n + k * BLOCK_N, N, k, PIECES, 1)
            part = None if w is None else weight[k]
            _, g, xh = operands(dy_row[k], x_row[k], part, factors[k], r, inside, GATE_FIRST)
            dz = r * (g - xh * c)
            if dx is not None:
                out = (dz * factors[k] if GATE_FIRST else dz).to(dx.dtype.element_ty)
                tl.store(dx + m * N + n + k * BLOCK_N, out, (m < M) & inside)
            if dgate is not None and GATE_FIRST:
                out = (dz * x_row[k].to(tl.float32) * slopes[k]).to(dgate.dtype.element_ty)
                tl.store(dgate + m * N + n + k * BLOCK_N, out, (m < M) & inside)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # sum_partials may start; it waits for this kernel's end
    if partials is not None:
        for k in tl.static_range(PIECES):
            share = tl.sum(dw[k].to(tl.float64), axis=0, keep_dims=True).to(tl.float32)
            at = partials + program.to(tl.int64) * groups * N + column + k * BLOCK_N
            tl.store(at, share, n + k * BLOCK_N < N)


@triton.jit(do_not_specialize=["M"])
def gated_backward_loop(
    dy, x, gate, table, w, rstd, dx, dgate, M, N, groups, sizes, dy_steps, x_steps, gate_steps,
    EARLY: tl.constexpr, SIGMOID: tl.constexpr, GATE_FIRST: tl.constexpr, STRIDED: tl.constexpr, MULTIPLE: tl.constexpr,
    BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Each program computes dx and dgate of one row, looping over it twice: once for the sum, once for the results."""
    N = as_multiple(N, MULTIPLE)
    m = tl.program_id(0).to(tl.int64)
    r = tl.load(rstd + m)
    dy += row_start(m, sizes, dy_steps, STRIDED, MULTIPLE)
    x += row_start(m, sizes, x_steps, STRIDED, MULTIPLE)
    gate += row_start(m, sizes, gate_steps, STRIDED, MULTIPLE)
    _await_table(table, OVERLAP)
    products = tl.zeros([BLOCK_N], tl.float64)
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        weight = None if w is None else tl.load(w + m % groups * N + n, n < N, 0.0)
        factor = factor_of(tl.load(gate + n, n < N, 0.0), table, SIGMOID)
        _, g, xh = operands(load_fp32(dy + n, n < N), load_fp32(x + n, n < N), weight, factor, r, n < N, GATE_FIRST)
        products += (g * xh).to(tl.float64)
    c = ((tl.sum(products, axis=0) + 0.0) / N).to(tl.float32)  # +0.0, never -0.0
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        weight = None if w is None else tl.load(w + m % groups * N + n, n < N, 0.0)
        factor, slope = factor_and_slope(tl.load(gate + n, n < N, 0.0), table, SIGMOID)
        dy_row = load_fp32(dy + n, n < N)
        x_row = load_fp32(x + n, n < N)
        _, g, xh = operands(dy_row, x_row, weight, factor, r, n < N, GATE_FIRST)
        dz = r * (g - xh * c)
        if dx is not None:
            tl.store(dx + m * N + n, (dz * factor if GATE_FIRST else dz).to(dx.dtype.element_ty), n < N)
        if dgate is not None:
            of_factor = dz * x_row if GATE_FIRST else dy_row * before_gate(xh, weight, x.dtype.element_ty, EARLY)
            tl.store(dgate + m * N + n, (of_factor * slope).to(dgate.dtype.element_ty), n < N)


@triton.jit(do_not_specialize=["M", "programs"])
def gated_dw_alone(
    dy, x, gate, table, rstd, partials, M, N, groups, parts, programs, sizes, dy_steps, x_steps, gate_steps,
    EARLY: tl.constexpr, SIGMOID: tl.constexpr, GATE_FIRST: tl.constexpr, STRIDED: tl.constexpr,
    MULTIPLE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A share of dw for BLOCK_N columns of a group: the sum over every `programs`-th tile of ROWS rows."""
    N = as_multiple(N, MULTIPLE)
    part, rest = tl.program_id(0) % parts, tl.program_id(0) // parts
    program, group = rest // groups, rest % groups
    n = part.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    dw = tl.zeros([ROWS, BLOCK_N], tl.float32)
    _await_table(table, OVERLAP)
    for turn in tl.range(0, turns_of(M // groups, program, programs, ROWS, 1), num_stages=STAGES):
        i = (program + turn * programs).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        m = i * groups + group
        inside = (m < M) & (n < N)
        r = tl.load(rstd + m, m < M, 0.0)
        dy_row = tl.load(dy + row_start(m, sizes, dy_steps, STRIDED, MULTIPLE) + n, inside, 0.0)
        x_row = tl.load(x + row_start(m, sizes, x_steps, STRIDED, MULTIPLE) + n, inside, 0.0)
        factor = factor_of(
            tl.load(gate + row_start(m, sizes, gate_steps, STRIDED, MULTIPLE) + n, inside, 0.0), table, SIGMOID
        )
        d, _, xh = operands(dy_row, x_row, None, factor, r, n < N, GATE_FIRST)
        dw += dw_terms(d, xh, x.dtype.element_ty, EARLY)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    share = tl.sum(dw.to(tl.float64), axis=0, keep_dims=True).to(tl.float32)
    tl.store(partials + (program.to(tl.int64) * groups + group) * N + n, share, n < N)
