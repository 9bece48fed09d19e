"""What torch.nn.functional.rms_norm and torch.nn.LayerNorm cost.

A forward formula returns the bytes that are saved for the backward pass. A backward formula begins with what the
forward pass saved still allocated. The kernels for CUDA are those of aten/native/cuda/layer_norm_kernel.cu.
"""

import torch

from rmsnorm.costs import eager
from rmsnorm.costs.case import Case
from rmsnorm.costs.tape import F32, Array, Tape, given

_VECTOR = 4  # columns; with another number of them, the statistics and the result are two kernels
# With more rows than this, and fewer blocks of columns than half the multiprocessors, the sums of dw are two kernels.
_MANY_ROWS = 1 << 16
_ROWS_PER_BLOCK, _COLUMNS_PER_BLOCK, _MOST_BLOCKS = 32, 32, 1 << 15
_MULTIPROCESSORS = 132  # of an H100 or H200


def rms_norm_forward(tape: Tape, case: Case) -> int:
    """F.rms_norm. The statistics are 2E + 2M FLOPs: x² E, mean E, + eps M, rsqrt M; then × rstd E, × weight E."""
    if not _is_fused(case):
        return eager.rms_norm_forward(tape, case)
    E, M, w = case.E, case.M, case.weight()
    x, y, rstd = given(E, case.x_dtype), tape.new(E, case.x_dtype), tape.new(M, F32)
    _run_forward(tape, case, 2 * E + 2 * M, (1 if w is None else 2) * E, x, [w], [rstd], y)
    if not case.training:
        tape.free(rstd)
    return x.nbytes + rstd.nbytes


def rms_norm_backward(tape: Tape, case: Case) -> None:
    """F.rms_norm's dx is 7E FLOPs and dw is 2E − N; without a weight dx is 6E.

    dx: xh E, g = dy · w E, mean(g · xh) 2E, rstd · (g − xh · c) 3E. dw: Σ dy · xh.
    """
    if not _is_fused(case):
        eager.rms_norm_backward(tape, case)
        return
    E, w = case.E, case.weight()
    dy, x, rstd = given(E, case.x_dtype), given(E, case.x_dtype), Array(case.M, F32)
    dx, dw = tape.new(E, case.x_dtype), None if w is None else tape.new(case.N, w.dtype)
    tape.run("dx", (6 if w is None else 7) * E, [dy, x, rstd, w], [dx])
    if dw is not None:
        _run_weight_gradients(tape, case, 2 * E - case.N, [dy, x, rstd], [dw])
    tape.free(rstd)


def _is_fused(case: Case) -> bool:
    """Whether F.rms_norm is a kernel of its own: on CUDA, unless the weight has another dtype than x."""
    return not case.cpu and case.w_dtype in (None, case.x_dtype)


def layer_norm_forward(tape: Tape, case: Case) -> int:
    """LayerNorm. The statistics are 4E + 2M FLOPs, the result 3E, or E without weight and bias.

    mean E, x − mean E, squares E, their mean E, + eps M, rsqrt M; × rstd E, × weight E, + bias E.
    """
    E, w = case.E, case.weight()
    x, y = given(E, case.x_dtype), tape.new(E, case.x_dtype)
    mean, rstd = (tape.new(case.M, _statistic_dtype(case)) for _ in range(2))
    _run_forward(tape, case, 4 * E + 2 * case.M, (1 if w is None else 3) * E, x, [w, w], [mean, rstd], y)
    if not case.training:
        tape.free(mean, rstd)
    return x.nbytes + mean.nbytes + rstd.nbytes


def layer_norm_backward(tape: Tape, case: Case) -> None:
    """LayerNorm's dx is 10E FLOPs, dw 2E − N and db E − N; without weight and bias dx is 9E.

    dx: xh = (x − mean) · rstd 2E, g = dy · w E, mean(g) E, mean(g · xh) 2E, rstd · (g − c1 − xh · c2) 4E.
    """
    E, w = case.E, case.weight()
    dy, x = given(E, case.x_dtype), given(E, case.x_dtype)
    mean, rstd = (Array(case.M, _statistic_dtype(case)) for _ in range(2))
    dx = tape.new(E, case.x_dtype)
    dw, db = (None if w is None else tape.new(case.N, w.dtype) for _ in range(2))
    flops, sums = (9 if w is None else 10) * E, 0 if w is None else 3 * E - 2 * case.N
    if case.cpu:
        scratch = None if w is None else tape.new(2 * case.threads * case.N, case.x_dtype)
        tape.run("fused backward", flops + sums, [dy, x, mean, rstd, w, w], [dx, dw, db])
        tape.free(scratch)
    else:
        tape.run("dx", flops, [dy, x, mean, rstd, w], [dx])
        if dw is not None and db is not None:
            _run_weight_gradients(tape, case, sums, [dy, x, mean, rstd], [dw, db])
    tape.free(mean, rstd)


def _statistic_dtype(case: Case) -> torch.dtype:
    """LayerNorm's mean and rstd are fp32 on CUDA; on a CPU they have the dtype of the weight, or of x without one."""
    if not case.cpu:
        return F32
    return case.x_dtype if case.w_dtype is None else case.w_dtype


def _run_forward(
    tape: Tape, case: Case, statistics_flops: int, y_flops: int, x: Array, weights: list[Array | None],
    statistics: list[Array], y: Array,
) -> None:  # fmt: skip
    if case.cpu or case.N % _VECTOR == 0:
        tape.run("fused forward", statistics_flops + y_flops, [x, *weights], [y, *statistics])
    else:
        tape.run("statistics", statistics_flops, [x], statistics)
        tape.run("y", y_flops, [x, *statistics, *weights], [y])


def _run_weight_gradients(tape: Tape, case: Case, flops: int, inputs: list[Array], outputs: list[Array]) -> None:
    """The sums over rows on CUDA.

    Over many rows of few columns they are partial sums in the weight's dtype, whose sums go to new memory.
    """
    blocks_of_columns = -(-case.N // _COLUMNS_PER_BLOCK)
    if case.M <= _MANY_ROWS or case.N // _COLUMNS_PER_BLOCK >= _MULTIPROCESSORS // 2:
        tape.run("sums over rows", flops, inputs, outputs)
        return
    blocks = min(_MOST_BLOCKS // blocks_of_columns, -(-case.M // _ROWS_PER_BLOCK))
    partials = [tape.new(blocks * case.N, out.dtype) for out in outputs]
    tape.run("sums over blocks of rows", flops, inputs, partials)
    for part, out in zip(partials, outputs, strict=True):
        tape.op("Σ over blocks", 0, case.N, part)
        tape.free(out)
    tape.free(*partials)
