"""What our kernels cost.

A forward formula returns the bytes that are saved for the backward pass. A backward formula begins with what the
forward pass saved still allocated.
"""

from dataclasses import replace

import torch

from rmsnorm.costs.case import Case
from rmsnorm.costs.tape import F32, Array, Tape, given
from rmsnorm.kernels.gpu import tiling
from rmsnorm.kernels.gpu.tiling import Launch

# From a GPU's launches we read how many programs share a row and how many hold a share of dw. The second is the same on
# every GPU, the first on every one with `tiling.ROOM`; on a GPU with less it is counted as on an H200.
_GPU = tiling.Gpu(227 << 10)


def forward_flops(case: Case) -> int:
    """FLOPs of the forward pass: 4E + 3M with a weight, E more with a residual, W more with an offset.

    x² E, their sum E − M, / N M, + eps M, sqrt M, 1 / M, × rstd E, × weight E; + residual E, + offset W.
    """
    per_element = 3 + (case.w_dtype is not None) + case.adds
    return per_element * case.E + 3 * case.M + int(case.offset) * case.W


def backward_flops(case: Case, need_dx: bool = True, need_dw: bool = True) -> int:
    """FLOPs of the backward pass: 7E for dx with a weight, and 2E − W for dw.

    Both: xh = x · rstd E. dx: g = dy · w E, g · xh E, its sum E − M, / N M, xh · c E, g − E, rstd · E, + ds E.
    dw: dy · xh E, its sum E − W.
    """
    flops = case.E
    if need_dx:
        per_element = 5 + (case.w_dtype is not None) + case.adds
        flops += per_element * case.E + int(case.offset) * case.W
    if need_dw and case.w_dtype is not None:
        flops += 2 * case.E - case.W
    return flops


def forward(tape: Tape, case: Case) -> int:
    """One kernel: y, s = x + residual where there is a residual, and rstd where autograd records."""
    _forward(tape, case, "forward")
    return case.E * case.x_dtype.itemsize + (case.M * F32.itemsize if case.training else 0)


def recompute(tape: Tape, case: Case) -> None:
    """What `recompute` adds to the backward pass: a forward call on what was normalized, x or s, without rstd.

    The operators that read y use it and free it before the norm's own backward pass begins.
    """
    tape.free(_forward(tape, replace(case, implementation="ours", phase="inference"), "recompute y"))


def _forward(tape: Tape, case: Case, what: str) -> Array:
    """Record the forward kernel, and return y."""
    x, residual = given(case.E, case.x_dtype), given(case.E, case.x_dtype) if case.adds else None
    s = tape.new(case.E, case.x_dtype) if case.adds else None
    w, scratch = _weight_as_read(tape, case)
    y = tape.new(case.E, case.y_dtype)
    rstd = tape.new(case.M, F32) if case.training else None
    shares = None if case.cpu else _shares(tape, case, _forward_launch(case))
    tape.run(what, forward_flops(case), [x, residual, w, shares], [y, s, rstd, shares])
    tape.free(scratch, shares)
    return y


def backward(tape: Tape, case: Case) -> None:
    """dx and partial sums of dw, and a kernel that adds those up."""
    dy, x = given(case.E, case.y_dtype), given(case.E, case.x_dtype)
    ds = given(case.E, case.x_dtype) if case.adds else None
    rstd = Array(case.M, F32)
    w, scratch = _weight_as_read(tape, case)
    dx = tape.new(case.E, case.x_dtype)
    if case.cpu:
        _cpu_backward(tape, case, [dy, ds, x, w, rstd], dx)
    else:
        _cuda_backward(tape, case, [dy, ds, x, w, rstd], dx)
    tape.free(scratch, rstd)


def _cpu_backward(tape: Tape, case: Case, inputs: list[Array | None], dx: Array) -> None:
    """dw is summed in fp64 within chunks of rows, then over the chunks in the dtype in which the weight is read."""
    if case.w_dtype is None:
        tape.run("backward", backward_flops(case), inputs, [dx])
        return
    partials = tape.new(cpu_chunks(case) * case.W, torch.float64)
    tape.run("backward", backward_flops(case), inputs, [dx, partials])
    dw = tape.new(case.W, _dtype_as_read(case, case.w_dtype))
    tape.run("Σ over chunks", 0, [partials], [dw])
    tape.recast(dw, case.w_dtype)
    tape.free(partials)


def _cuda_backward(tape: Tape, case: Case, inputs: list[Array | None], dx: Array) -> None:
    """Each program sums its share of dw; where a program takes a row in pieces, a second kernel sums them."""
    dy, _, x, _, rstd = inputs
    config, alone = _backward_launch(case), _dw_launch(case)
    shares = _shares(tape, case, config)
    partials = None if case.w_dtype is None else tape.new((alone or config).programs * case.N, F32)  # of one head each
    if alone is not None:
        dw_flops = 2 * case.E - case.W
        tape.run("dx", backward_flops(case) - dw_flops, [*inputs, shares], [dx, shares])
        tape.run("dw, by programs", dw_flops, [dy, x, rstd], [partials])
    else:
        what = "dx" if partials is None else "dx, and dw by programs"
        tape.run(what, backward_flops(case), [*inputs, shares], [dx, partials, shares])
    if case.w_dtype is not None:
        tape.run("Σ over programs", 0, [partials], [tape.new(case.W, case.w_dtype)])
    tape.free(partials, shares)


def _forward_launch(case: Case) -> Launch:
    aligned = tiling.ADD_WIDEST < case.N and case.N % tiling.WORD[case.x_dtype.itemsize] == 0
    return tiling.forward(case.N, case.x_dtype.itemsize, case.adds, aligned, _GPU, case.heads)


def _backward_launch(case: Case) -> Launch:
    x, dy, dw = case.x_dtype.itemsize, case.y_dtype.itemsize, 0 if case.w_dtype is None else case.w_dtype.itemsize
    aligned = tiling.BACKWARD_WIDEST[x] < case.N and case.N % tiling.WORD[x] == 0
    return tiling.backward(case.M, case.N, x, dy, dw, case.adds, aligned, _GPU, 1, False, case.heads)


def _dw_launch(case: Case) -> Launch | None:
    """The launch of the kernel that sums dw alone; None where the first kernel does it, or there is no weight."""
    if case.w_dtype is None or _backward_launch(case).parts > 0:
        return None
    loaded = case.y_dtype.itemsize + case.x_dtype.itemsize
    return tiling.dw_alone(case.M, case.N, loaded, case.w_dtype.itemsize, _GPU, case.heads)


def _shares(tape: Tape, case: Case, config: Launch) -> Array | None:
    """Where programs that share a row exchange their sums: 8 bytes for each program and row, filled in advance."""
    if config.parts < 2:
        return None
    shares = tape.new(case.M * config.parts, torch.int64)
    tape.run("fill", 0, [], [shares])
    return shares


def _weight_as_read(tape: Tape, case: Case) -> tuple[Array | None, Array | None]:
    """The weight as the kernels read it, and the scratch memory that was made for it, if any.

    The CPU's kernels always read a weight, of ones where there is none.
    """
    w = case.weight()
    if not tape.cpu:
        return w, None
    if w is None:
        ones = tape.new(case.N, case.x_dtype)
        tape.run("ones", 0, [], [ones])
        return ones, ones
    read = tape.cast(w, _dtype_as_read(case, w.dtype))
    return read, None if read is w else read


def _dtype_as_read(case: Case, w_dtype: torch.dtype) -> torch.dtype:
    """The CPU's kernels read the weight in x's dtype if it has that, else in fp32."""
    return w_dtype if w_dtype == case.x_dtype else F32


def cpu_chunks(case: Case) -> int:
    """The number of chunks of rows in which the CPU's kernels sum dw, as `kernels/cpu/launches.py` splits them."""
    rows = case.heads * max(32, -(-(1 << 16) // case.W), -(-(case.M // case.heads) // 256))
    return -(-case.M // rows)
