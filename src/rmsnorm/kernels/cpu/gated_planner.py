"""Plans calls of gated norms on the CPU, as planner.py plans those of the others."""

import ctypes
import functools
from typing import Any

import torch
from numba import types

from rmsnorm.kernels.cpu.compiling import ELEMENT, compiled
from rmsnorm.kernels.cpu.gated_kernels import BF16, FP16, FP32, gated_backward, gated_forward
from rmsnorm.kernels.cpu.kernels import sum_chunks
from rmsnorm.kernels.cpu.launches import like_rows, over_rows, rows_of
from rmsnorm.kernels.cpu.processor import refusal
from rmsnorm.kernels.cpu.threads import MachineCode
from rmsnorm.kernels.plan import (
    MOST_PLANS,
    ByReference,
    Converted,
    Fresh,
    GatedBackward,
    GatedForward,
    Plan,
    TensorKind,
    find_layout,
)
from rmsnorm.spec import KERNEL_DTYPES, Spec, gated_dtype, result_dtype

# As in planner.py and launches.py, for elements that take about eight times as long. Not measured.
_FORWARD_ALONE, _BACKWARD_ALONE, _GRAIN, _CHUNK = 1 << 14, 1 << 13, 1 << 11, 1 << 13
_NAMES = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}
_NEEDED = "fp16", "fma"  # instructions that the kernels contain, whatever the dtypes of a call
_BYTES = types.uint8  # tensors of several dtypes are passed as bytes


@functools.cache
def _forward_kernel() -> Any:
    pointees = _BYTES, _BYTES, _BYTES, _BYTES, types.float32, types.int64, types.int64, types.float32
    return refusal(*_NEEDED) or compiled(gated_forward, *pointees)


@functools.cache
def _backward_kernel() -> Any:
    inputs, outputs = (_BYTES, _BYTES, _BYTES, _BYTES, types.float32), (_BYTES, _BYTES, types.float64)
    return refusal(*_NEEDED) or compiled(gated_backward, *inputs, *outputs, types.int64, types.int64)


@functools.cache
def _sum_kernel(w: torch.dtype) -> Any:
    return compiled(sum_chunks, types.float64, ELEMENT[w])


@functools.lru_cache(MOST_PLANS)
def plan_gated_forward(kind: GatedForward) -> Plan | ByReference:
    """Plans a call that computes y and rstd as `gated_reference.forward` does."""
    kernel = _forward_kernel()
    if isinstance(kernel, str):
        return ByReference(kernel)
    x, gate, w, spec = kind.x, kind.gate, kind.w, kind.spec
    find = functools.partial(rows_of, groups=spec.groups, least=_CHUNK)
    rows, _, before = find_layout(find, {"x": (x, x.dtype), "gate": (gate, gate.dtype)})
    before += _weight_made_dense(w)
    y = like_rows("y", x, gated_dtype(x.dtype, None if w is None else w.dtype, spec))
    rstd = Fresh("rstd", torch.float32, tuple(x.shape[:-1]))
    tensors = "x", "gate", None if w is None else "w", "y", "rstd" if kind.with_rstd else None
    arrays = _form(spec, x.dtype, gate.dtype, None if w is None else w.dtype, y.dtype), (ctypes.c_float * 1)(spec.eps)
    return Plan(
        kind.device,
        inputs=("x", "gate", "w"),
        before=tuple(before),
        fresh=(y, rstd) if kind.with_rstd else (y,),
        launches=(over_rows(kernel, tensors, rows, arrays, max(1, _GRAIN // rows.N), _FORWARD_ALONE),),
        outputs=("y", "rstd" if kind.with_rstd else None),
    )


@functools.lru_cache(MOST_PLANS)
def plan_gated_backward(kind: GatedBackward) -> Plan | ByReference:
    """Plans a call that computes dx, dgate and dw as `gated_reference.backward` does.

    dw is summed in fp64: over the rows of each chunk, then over the chunks in order.
    """
    x, gate, w, spec = kind.x, kind.gate, kind.w, kind.spec
    kernel = _backward_kernel()
    of_sum = _sum_kernel(w.dtype) if kind.need_dw and w is not None else None
    for code in (kernel, of_sum):
        if isinstance(code, str):
            return ByReference(code)
    dy_dtype = kind.dy.dtype if kind.dy.dtype in KERNEL_DTYPES else torch.float32
    find = functools.partial(rows_of, groups=spec.groups, least=_CHUNK)
    wanted = {"dy": (kind.dy, dy_dtype), "x": (x, x.dtype), "gate": (gate, gate.dtype)}
    rows, _, before = find_layout(find, wanted)  # in the order of the kernel's layout
    before += _weight_made_dense(w)
    if not kind.rstd.is_dense:  # only hooks on saved tensors can make it so
        before.append(Converted("rstd", ("rstd",), torch.float32))
    sums = of_sum is not None and rows.chunks > 0
    N = spec.groups * rows.N
    tensors = (
        "dy", "x", "gate", None if w is None else "w", "rstd", "dx" if kind.need_dx else None,
        "dgate" if kind.need_dgate else None, "partials" if sums else None,
    )  # fmt: skip
    outputs = "dx" if kind.need_dx else None, "dgate" if kind.need_dgate else None, None if of_sum is None else "dw"
    form = _form(spec, x.dtype, gate.dtype, None if w is None else w.dtype, dy_dtype)
    launches = [over_rows(kernel, tensors, rows, (form,), rows.chunk, _BACKWARD_ALONE)]
    fresh = [
        *([like_rows("dx", x, x.dtype)] if kind.need_dx else []),
        *([like_rows("dgate", gate, gate.dtype)] if kind.need_dgate else []),
    ]
    if of_sum is not None and w is not None:
        fresh.append(Fresh("dw", w.dtype, (N,), value=None if sums else 0))
    if sums:
        fresh.append(Fresh("partials", torch.float64, (rows.chunks, N)))
        launches.append(MachineCode(of_sum, ("partials", "dw"), (rows.chunks, N)))
    return Plan(
        kind.device,
        inputs=("dy", "x", "gate", "w", "rstd"),
        before=tuple(before),
        fresh=tuple(fresh),
        launches=tuple(launches),
        outputs=outputs,
    )


def _weight_made_dense(w: TensorKind | None) -> list[Converted]:
    return [] if w is None or w.is_dense else [Converted("w", ("w",), w.dtype)]


@functools.lru_cache(256)
def _form(spec: Spec, x: torch.dtype, gate: torch.dtype, w: torch.dtype | None, last: torch.dtype) -> Any:
    """The array that the kernels call form. last: the dtype of y, or that of dy."""
    assert spec.gate is not None
    flags = spec.cast == "early", spec.gate.activation == "silu", spec.gate.first
    dtypes = x, gate, w or x, result_dtype(x, w, spec.cast), last
    values = [spec.groups, *map(int, flags), *(_NAMES[dtype] for dtype in dtypes)]
    return (ctypes.c_int64 * len(values))(*values)
