# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code="assignment, var-annotated"
"""The arithmetic of reference.py on the GPU, in Triton.

Each kernel is launched with `enable_fp_fusion=False`: a product and a sum fused into one instruction would round
once where the arithmetic rounds twice. `div_rn` and `sqrt_rn` are the IEEE ones; `/` is only used in fp64, where it
is one too. What is absent is passed as None, and its code is not compiled.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmsnorm.kernels import launch
from rmsnorm.kernels.launch import Launch
from rmsnorm.kernels.rows import Walk, walk, walked

NAME = "gpu kernel (Triton)"

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
def _output(h, w, n, N, offset, X: tl.constexpr, Y: tl.constexpr, EARLY: tl.constexpr):
    """y from h = x·rstd, for x of dtype X and y of dtype Y."""
    if w is None:
        y = h.to(X)
    elif EARLY:
        y = (_load(w + n, n < N) * h.to(X).to(tl.float32)).to(Y)
    else:
        y = ((_load(w + n, n < N) + offset) * h).to(Y)
    return y


@triton.jit
def _scale(w, n, N, offset):
    """What dy is multiplied by: the weight plus the offset; 1, which changes no bit, without a weight."""
    return 1.0 if w is None else _load(w + n, n < N) + offset


@triton.jit
def _whole(S, shares, part, parts, PARTS: tl.constexpr):
    """The sum over a row whose `parts` programs each hold a share: hand in one's own, wait for the others.

    A share is one 8-byte store and needs no fence; -1, a NaN that no arithmetic makes, means that it is still missing.
    The programs of a row have consecutive numbers and are few, so all of them run at once and none waits for ever.
    """
    tl.atomic_xchg(shares + part, S.to(tl.int64, bitcast=True), sem="relaxed")
    p = tl.arange(0, PARTS)
    found = tl.load(shares + p, p < parts, 0, volatile=True)
    while tl.sum((found == -1).to(tl.int32)) > 0:
        found = tl.load(shares + p, p < parts, 0, volatile=True)
    return tl.sum(found.to(tl.float64, bitcast=True))


# A row is held in PIECES of BLOCK_N columns, so that a width far from a power of two leaves few threads idle.


@triton.jit(do_not_specialize=["M"])
def _forward_block(
    x, residual, w, y, s, rstd, shares, M, N, parts, sizes, x_steps, residual_steps, eps, offset,
    EARLY: tl.constexpr, STRIDED: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
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
        S = _whole(tl.sum(S), shares + tile.to(tl.int64) * parts, part, parts, PARTS)
    r = _rstd(S, N, eps)
    if rstd is not None:
        tl.store(rstd + m, r, m < M)
    for k in tl.static_range(PIECES):
        n = first + k * BLOCK_N
        h = row[k].to(tl.float32) * r
        out = _output(h, w, n, N, offset, x.dtype.element_ty, y.dtype.element_ty, EARLY)
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
        tl.store(y + m * N + n, _output(h, w, n, N, offset, x.dtype.element_ty, y.dtype.element_ty, EARLY), n < N)


@triton.jit(do_not_specialize=["M", "chunk"])
def _backward_block(
    dy, ds, x, w, rstd, dx, partials, M, N, chunk, sizes, dy_steps, ds_steps, x_steps, offset,
    EARLY: tl.constexpr, STRIDED: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx of a chunk of rows, ROWS whole rows at a time, and the chunk's share of dw."""
    begin = tl.program_id(0).to(tl.int64) * chunk
    n = tl.arange(0, BLOCK_N)[None, :]
    dw = ()
    for _ in tl.static_range(PIECES):
        dw += (tl.zeros([ROWS, BLOCK_N], tl.float32),)
    for first in tl.range(0, chunk, ROWS, num_stages=STAGES):
        m = begin + first + tl.arange(0, ROWS)[:, None]
        r = tl.load(rstd + m, m < M, 0.0)
        dy_row = ()
        x_row = ()
        for k in tl.static_range(PIECES):
            inside = (m < M) & (n + k * BLOCK_N < N)
            dy_row += (tl.load(dy + _start(m, sizes, dy_steps, STRIDED) + n + k * BLOCK_N, inside, 0.0),)
            x_row += (tl.load(x + _start(m, sizes, x_steps, STRIDED) + n + k * BLOCK_N, inside, 0.0),)
        products = tl.zeros([ROWS, BLOCK_N], tl.float64)
        for k in tl.static_range(PIECES):
            xh = _xh(x_row[k], r, (m < M) & (n + k * BLOCK_N < N))
            g = dy_row[k].to(tl.float32) * _scale(w, n + k * BLOCK_N, N, offset)
            products += (g * xh).to(tl.float64)
        S = tl.sum(products, axis=1, keep_dims=True) + 0.0  # +0.0, never -0.0
        c = (S / N).to(tl.float32)
        summed = ()
        for k in tl.static_range(PIECES):
            inside = (m < M) & (n + k * BLOCK_N < N)
            xh = _xh(x_row[k], r, inside)
            g = dy_row[k].to(tl.float32) * _scale(w, n + k * BLOCK_N, N, offset)
            dx_row = r * (g - xh * c)
            if ds is not None:
                dx_row += _load(ds + _start(m, sizes, ds_steps, STRIDED) + n + k * BLOCK_N, inside)
            tl.store(dx + m * N + n + k * BLOCK_N, dx_row.to(dx.dtype.element_ty), inside)
            summed += (dw[k] + _dw(dy_row[k].to(tl.float32), xh, x.dtype.element_ty, EARLY),)
        dw = summed
    if partials is not None:
        for k in tl.static_range(PIECES):
            share = tl.sum(dw[k].to(tl.float64), axis=0, keep_dims=True).to(tl.float32)
            tl.store(partials + tl.program_id(0).to(tl.int64) * N + n + k * BLOCK_N, share, n + k * BLOCK_N < N)


@triton.jit
def _xh(x, r, inside):
    """x·rstd, and zero outside of the rows, where 0·inf would be NaN."""
    return tl.where(inside, x.to(tl.float32) * r, 0.0)


@triton.jit
def _dw(dy, xh, X: tl.constexpr, EARLY: tl.constexpr):
    """What one element adds to dw."""
    h = xh.to(X).to(tl.float32) if EARLY else xh
    return dy * h


@triton.jit(do_not_specialize=["M"])
def _backward_loop(
    dy, ds, x, w, rstd, dx, M, N, sizes, dy_steps, ds_steps, x_steps, offset,
    STRIDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx of one row a program, in pieces: read once for the sum and again for dx."""
    m = tl.program_id(0).to(tl.int64)
    r = tl.load(rstd + m)
    dy += _start(m, sizes, dy_steps, STRIDED)
    x += _start(m, sizes, x_steps, STRIDED)
    products = tl.zeros([BLOCK_N], tl.float64)
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        xh = tl.where(n < N, _load(x + n, n < N) * r, 0.0)
        g = _load(dy + n, n < N) * _scale(w, n, N, offset)
        products += (g * xh).to(tl.float64)
    c = (tl.sum(products, axis=0) / N).to(tl.float32)
    for first in range(0, N.to(tl.int64), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        xh = _load(x + n, n < N) * r
        g = _load(dy + n, n < N) * _scale(w, n, N, offset)
        dx_row = r * (g - xh * c)
        if ds is not None:
            dx_row += _load(ds + _start(m, sizes, ds_steps, STRIDED) + n, n < N)
        tl.store(dx + m * N + n, dx_row.to(dx.dtype.element_ty), n < N)


@triton.jit(do_not_specialize=["M", "chunk"])
def _dw_alone(
    dy, x, rstd, partials, M, N, chunk, sizes, dy_steps, x_steps,
    EARLY: tl.constexpr, STRIDED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The share of dw of BLOCK_N columns of a chunk of rows."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    dw = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for first in tl.range(0, chunk, ROWS, num_stages=STAGES):
        m = tl.program_id(1).to(tl.int64) * chunk + first + tl.arange(0, ROWS)[:, None]
        inside = (m < M) & (n < N)
        r = tl.load(rstd + m, m < M, 0.0)
        dy_row = _load(dy + _start(m, sizes, dy_steps, STRIDED) + n, inside)
        xh = _load(x + _start(m, sizes, x_steps, STRIDED) + n, inside) * r
        dw += _dw(dy_row, xh, x.dtype.element_ty, EARLY)
    share = tl.sum(dw.to(tl.float64), axis=0, keep_dims=True).to(tl.float32)
    tl.store(partials + tl.program_id(1).to(tl.int64) * N + n, share, n < N)


@triton.jit(do_not_specialize=["chunks"])
def _sum_partials(partials, dw, chunks, N, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """dw of BLOCK_N columns: the shares of all chunks, always in the same order."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros([ROWS, BLOCK_N], tl.float64)
    for first in range(0, chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(partials + chunk.to(tl.int64) * N + n, (chunk < chunks) & (n < N), 0.0).to(tl.float64)
    tl.store(dw + n, tl.sum(total, axis=0, keep_dims=True).to(tl.float32).to(dw.dtype.element_ty), n < N)


# --- launching them ------------------------------------------------------------------------------------------

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


def forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: str, offset: float, with_rstd: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `reference.forward`."""
    if residual is not None and residual.dtype != x.dtype:
        total = (x + residual).contiguous()
        y, _, rstd = forward(total, None, w, eps, cast, offset, with_rstd)
        return y, total, rstd
    early = cast == "early"
    rows, (x, *others) = walked(walk, x) if residual is None else walked(walk, x, residual)
    M, N = rows.M, rows.N
    y = torch.empty(x.shape, dtype=_y_dtype(x, w, early), device=x.device)
    s = torch.empty(x.shape, dtype=x.dtype, device=x.device) if others else None
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) if with_rstd else None
    config = launch.forward(N, x.element_size())
    pointers = (x, others[0] if others else None, _contiguous(w), y, s, rstd)
    places = (rows.sizes, rows.steps[0], rows.steps[-1], float(eps), float(offset) or -0.0)
    if config.parts == 0:
        _run(_forward_loop, (M,), config, rows, pointers, (M, N, *places), (early, rows.strided))
        return y, s, rstd
    shares = None
    if config.parts > 1:
        shares = torch.full((M, config.parts), -1, dtype=torch.int64, device=x.device)
    flags = (early, rows.strided, launch.power_of_two(config.parts))
    grid = (_cdiv(M, config.rows) * config.parts,)
    _run(_forward_block, grid, config, rows, (*pointers, shares), (M, N, config.parts, *places), flags)
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
    """As `reference.backward`; dw is summed in fp32 over a few tens of rows at a time, and in fp64 over those sums."""
    early, offset = cast == "early", float(offset) or -0.0
    need_dw = need_dw and w is not None
    tensors = [dy.to(_y_dtype(x, w, early)), x]
    if need_dx and ds is not None:
        tensors.append(ds.to(x.dtype))
    rows, (dy, x, *others) = walked(walk, *tensors)
    M, N, sizes = rows.M, rows.N, rows.sizes
    dy_steps, x_steps = rows.steps[:2]
    rstd = rstd.contiguous()
    loaded = dy.element_size() + x.element_size() + (x.element_size() if others else 0)
    shared = _shared_memory(x.get_device())
    dx = partials = None
    if need_dx:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        pointers = (dy, others[0] if others else None, x, _contiguous(w), rstd, dx)
        w_itemsize = 0 if w is None else w.element_size()
        config = launch.backward(M, N, x.element_size(), loaded, w_itemsize, need_dw, shared)
        chunks = _cdiv(M, config.chunk)
        places = (sizes, dy_steps, rows.steps[-1], x_steps, offset)
        if config.parts == 0:
            _run(_backward_loop, (chunks,), config, rows, pointers, (M, N, *places), (rows.strided,))
        else:
            partials = _partials(chunks, x) if need_dw else None
            numbers = (M, N, config.chunk, *places)
            _run(_backward_block, (chunks,), config, rows, (*pointers, partials), numbers, (early, rows.strided))
    if w is None or not need_dw:
        return dx, None
    if partials is None:
        config = launch.dw_alone(M, N, dy.element_size() + x.element_size(), shared)
        chunks = _cdiv(M, config.chunk)
        partials = _partials(chunks, x)
        grid = (_cdiv(N, config.block_n), chunks)
        places = (sizes, dy_steps, x_steps)
        _run(
            _dw_alone, grid, config, rows, (dy, x, rstd, partials), (M, N, config.chunk, *places), (early, rows.strided)
        )
    dw = torch.empty(N, dtype=w.dtype, device=x.device)
    config = launch.sum_partials(N)
    _run(_sum_partials, (_cdiv(N, config.block_n),), config, rows, (partials, dw), (partials.shape[0], N), ())
    return dx, dw


# What a launch was compiled to, by all that Triton specialises on: the walk stands for every shape and stride.
_compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_MOST_COMPILED = 4096


def _run(
    kernel: Any, grid: tuple[int, ...], config: Launch, rows: Walk,
    pointers: tuple[Tensor | None, ...], numbers: tuple[Any, ...], flags: tuple[Any, ...],
) -> None:  # fmt: skip
    """Launch on the device of the first tensor, on its current stream; nothing if there is nothing to do.

    pointers, numbers, flags: the kernel's arguments in their order, flags without what the configuration holds. The
    first launch of its kind goes through Triton, which compiles. The next ones call what was compiled: to find out
    again what is known takes Triton longer than a small norm. Triton's own hooks for profilers are not called then.
    """
    if 0 in grid:
        return
    device, bits = pointers[0].get_device(), 0  # type: ignore[union-attr]
    addresses: list[int | None] = []
    dtypes: list[torch.dtype | None] = []
    for t in pointers:
        if t is None:
            addresses.append(None)
            dtypes.append(None)
        else:
            address = t.data_ptr()
            bits |= address
            addresses.append(address)
            dtypes.append(t.dtype)
    aligned = bits & 15 == 0
    key = (kernel.__name__, device, rows, flags, *dtypes)
    ready = _compiled.get(key) if aligned else None
    if ready is not None and torch._C._cuda_getDevice() == device:
        run, function, metadata, constants = ready
        x, y, *_ = (*grid, 1)
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(x, y, 1, stream, function, metadata, None, None, None, *addresses, *numbers, *constants)
        return
    names = kernel.arg_names[len(pointers) + len(numbers) :]
    values = dict(zip(names, flags, strict=False))
    values |= {name: value for name, value in config.constants.items() if name in names}
    with torch.cuda.device_of(pointers[0]):
        found = kernel[grid](*pointers, *numbers, **values, num_warps=config.warps, enable_fp_fusion=False)
    if aligned and found is not None:  # nothing comes back from the interpreter
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        constants = tuple(values[name] for name in names)
        _compiled[key] = (found.run, found.function, found.packed_metadata, constants)


@functools.cache
def _shared_memory(device: int) -> int:
    """Bytes of shared memory that one program may have; what every GPU that the kernels take has, without a device."""
    found = torch.cuda.get_device_properties(device) if device >= 0 else None
    return int(getattr(found, "shared_memory_per_block_optin", 99 << 10))


def _y_dtype(x: Tensor, w: Tensor | None, early: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, w.dtype) if early and w is not None else x.dtype


def _partials(chunks: int, x: Tensor) -> Tensor:
    return torch.empty(chunks, x.shape[-1], dtype=torch.float32, device=x.device)


def _contiguous(w: Tensor | None) -> Tensor | None:
    return None if w is None else w.contiguous()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
