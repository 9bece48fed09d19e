"""Plans calls of parts of rows on the CPU, with the kernels that planner.py uses for whole rows.

A kernel that begins a row writes the sum of the part into S, one fp64 number a row; a kernel that finishes a row reads
the sum over the whole row from S. See `sums` in kernels.py.
"""

import functools

import torch

from rmsnorm.kernels.cpu.launches import like_rows, over_rows, rows_of
from rmsnorm.kernels.cpu.planner import (
    BACKWARD_ALONE,
    FORWARD_ALONE,
    backward_kernel,
    forward_kernel,
    paired,
    scale_of,
    spec_words,
    sums_of_dw,
    types_of,
)  # fmt: skip
from rmsnorm.kernels.plan import (
    MOST_PLANS,
    BeginBackward,
    BeginForward,
    ByReference,
    FinishBackward,
    FinishForward,
    Fresh,
    Plan,
    dense,
    find_layout,
    summands,
)


@functools.lru_cache(MOST_PLANS)
def plan_begin_forward(kind: BeginForward) -> Plan | ByReference:
    """Plans a call that computes s and S as `reference.begin_forward` does."""
    row, x, residual, before = summands(kind)
    adds = residual is not None
    wanted = {row: (x, x.dtype)} | ({} if residual is None else {"residual": (residual, x.dtype)})
    rows, kinds, converted = find_layout(rows_of, wanted)
    even = rows.even and paired(*kinds.values())
    kernel = forward_kernel(x.dtype, types_of(x.dtype, None, "late"), even)
    if isinstance(kernel, str):
        return ByReference(kernel)
    tensors = row, "residual" if adds else None, None, None, "s" if adds else None, None, "S"
    words = spec_words(0.0, 0.0, "late")
    return Plan(
        kind.device,
        inputs=("x", "residual"),
        before=(*before, *converted),
        fresh=(
            Fresh("S", torch.float64, tuple(kind.x.shape[:-1])),
            *([like_rows("s", kind.x, x.dtype)] if adds else []),
        ),
        launches=(over_rows(kernel, tensors, rows, (words,), rows.grain, FORWARD_ALONE),),
        outputs=(None if kind.residual is None else "s", "S"),
    )


@functools.lru_cache(MOST_PLANS)
def plan_finish_forward(kind: FinishForward) -> Plan | ByReference:
    """Plans a call that computes y and rstd as `reference.finish_forward` does."""
    x, w, spec = kind.x, kind.w, kind.spec
    rows, kinds, before = find_layout(functools.partial(rows_of, whole=kind.N), {"x": (x, x.dtype)})
    dense("S", kind.S, before)
    types = types_of(x.dtype, None if w is None else w.dtype, spec.cast)
    scale = scale_of(w, types, rows.N)
    kernel = forward_kernel(x.dtype, types, rows.even and paired(*kinds.values(), scale.kind))
    if isinstance(kernel, str):
        return ByReference(kernel)
    rstd = [Fresh("rstd", torch.float32, tuple(x.shape[:-1]))] if kind.with_rstd else []
    tensors = "x", None, scale.name, "y", None, "rstd" if kind.with_rstd else None, "S"
    words = spec_words(spec.eps, spec.offset, spec.cast)
    return Plan(
        kind.device,
        inputs=("x", "w", "S"),
        before=(*before, *scale.before),
        fresh=(like_rows("y", x, types.y), *rstd, *scale.fresh),
        launches=(over_rows(kernel, tensors, rows, (words,), rows.grain, FORWARD_ALONE),),
        outputs=("y", "rstd" if kind.with_rstd else None),
    )


@functools.lru_cache(MOST_PLANS)
def plan_begin_backward(kind: BeginBackward) -> Plan | ByReference:
    """Plans a call that computes S as `reference.begin_backward` does."""
    x, w, spec = kind.x, kind.w, kind.spec
    types = types_of(x.dtype, None if w is None else w.dtype, spec.cast)
    rows, kinds, before = find_layout(rows_of, {"dy": (kind.dy, types.y), "x": (x, x.dtype)})
    rstd, scale = dense("rstd", kind.rstd, before), scale_of(w, types, rows.N)
    even = rows.even and paired(*kinds.values(), scale.kind, rstd)
    kernel = backward_kernel(x.dtype, types, even, 1, False)
    if isinstance(kernel, str):
        return ByReference(kernel)
    tensors = "dy", None, None, None, "x", scale.name, "rstd", None, None, "S"
    words = spec_words(0.0, spec.offset, spec.cast)
    return Plan(
        kind.device,
        inputs=("dy", "x", "w", "rstd"),
        before=(*before, *scale.before),
        fresh=(*scale.fresh, Fresh("S", torch.float64, tuple(x.shape[:-1]))),
        launches=(over_rows(kernel, tensors, rows, (words,), rows.grain, BACKWARD_ALONE),),
        outputs=("S",),
    )


@functools.lru_cache(MOST_PLANS)
def plan_finish_backward(kind: FinishBackward) -> Plan | ByReference:
    """Plans a call that computes dx and dw as `reference.finish_backward` does; dw is summed as in planner.py."""
    x, w, spec = kind.x, kind.w, kind.spec
    types = types_of(x.dtype, None if w is None else w.dtype, spec.cast)
    wanted = {"dy": (kind.dy, types.y), "x": (x, x.dtype)} | ({} if kind.ds is None else {"ds": (kind.ds, x.dtype)})
    rows, kinds, before = find_layout(functools.partial(rows_of, whole=kind.N), wanted)
    dense("S", kind.S, before)
    rstd, scale = dense("rstd", kind.rstd, before), scale_of(w, types, rows.N)
    even = rows.even and paired(*kinds.values(), scale.kind, rstd)
    kernel = backward_kernel(x.dtype, types, even, 1, False)
    dw = sums_of_dw(w if kind.need_dw else None, x.dtype, types, rows, even)
    if isinstance(kernel, str):
        return ByReference(kernel)
    if isinstance(dw, str):
        return ByReference(dw)
    ds = None if kind.ds is None else "ds"
    tensors = "dy", None, None, ds, "x", scale.name, "rstd", "dx", dw.partials, "S"
    words = spec_words(0.0, spec.offset, spec.cast)
    return Plan(
        kind.device,
        inputs=("dy", "ds", "x", "w", "rstd", "S"),
        before=(*before, *scale.before),
        fresh=(*scale.fresh, like_rows("dx", x, x.dtype), *dw.fresh),
        launches=(over_rows(kernel, tensors, rows, (words,), rows.chunk, BACKWARD_ALONE), *dw.launches),
        after=dw.after,
        outputs=("dx", dw.output),
    )
