"""Plans calls of parts of rows on the GPU, as planner.py plans calls of whole rows."""

import functools

import torch

from rmsnorm.kernels.gpu import kernels, parts_kernels, tiling
from rmsnorm.kernels.gpu.planner import Calls, cdiv, gpu_at, index_of, offset_of, y_dtype_of
from rmsnorm.kernels.plan import (
    MOST_PLANS,
    BeginBackward,
    BeginForward,
    FinishBackward,
    FinishForward,
    Fresh,
    Plan,
    dense,
    find_layout,
    summands,
)
from rmsnorm.kernels.rows import walk


@functools.lru_cache(MOST_PLANS)
def plan_begin_forward(kind: BeginForward) -> Plan:
    """Plans a call that computes s and S as `reference.begin_forward` does."""
    row, x, residual, before = summands(kind)
    adds = residual is not None
    wanted = {row: (x, x.dtype)} | ({} if residual is None else {"residual": (residual, x.dtype)})
    rows, kinds, converted = find_layout(walk, wanted)
    shape = tuple(x.shape)
    fresh = [Fresh("S", torch.float64, shape[:-1]), *([Fresh("s", x.dtype, shape)] if adds else [])]
    config = tiling.parts_forward(rows.N, x.dtype.itemsize)
    calls = Calls(index_of(kind.device), rows, kinds, fresh, x.dtype)
    calls.add(
        parts_kernels.begin_forward, config.tiles(rows.M), config, False,
        x=row, residual="residual" if adds else None, s="s" if adds else None, S="S",
        x_steps=rows.steps[0], residual_steps=rows.steps[-1],
    )  # fmt: skip
    return Plan(
        kind.device,
        inputs=("x", "residual"),
        before=(*before, *converted),
        fresh=tuple(fresh),
        launches=tuple(calls.launches),
        outputs=(None if kind.residual is None else "s", "S"),
    )


@functools.lru_cache(MOST_PLANS)
def plan_finish_forward(kind: FinishForward) -> Plan:
    """Plans a call that computes y and rstd as `reference.finish_forward` does."""
    x, w, spec = kind.x, kind.w, kind.spec
    rows, kinds, before = find_layout(walk, {"x": (x, x.dtype)})
    kinds["S"] = dense("S", kind.S, before)
    if w is not None:
        kinds["w"] = dense("w", w, before)
    shape = tuple(x.shape)
    fresh = [Fresh("y", y_dtype_of(x.dtype, w, spec.cast), shape)]
    if kind.with_rstd:
        fresh.append(Fresh("rstd", torch.float32, shape[:-1]))
    config = tiling.parts_forward(rows.N, x.dtype.itemsize)
    calls = Calls(index_of(kind.device), rows, kinds, fresh, x.dtype)
    calls.add(
        parts_kernels.finish_forward, config.tiles(rows.M) * config.parts, config, False,
        x="x", w=None if w is None else "w", S="S", y="y", rstd="rstd" if kind.with_rstd else None, whole=kind.N,
        x_steps=rows.steps[0], eps=float(spec.eps), offset=offset_of(spec.offset),
        EARLY=spec.cast != "late", FIRST=spec.cast == "first",
    )  # fmt: skip
    return Plan(
        kind.device,
        inputs=("x", "w", "S"),
        before=tuple(before),
        fresh=tuple(fresh),
        launches=tuple(calls.launches),
        outputs=("y", "rstd" if kind.with_rstd else None),
    )


@functools.lru_cache(MOST_PLANS)
def plan_begin_backward(kind: BeginBackward) -> Plan:
    """Plans a call that computes S as `reference.begin_backward` does."""
    x, w, spec = kind.x, kind.w, kind.spec
    y_dtype = y_dtype_of(x.dtype, w, spec.cast)
    rows, kinds, before = find_layout(walk, {"dy": (kind.dy, y_dtype), "x": (x, x.dtype)})
    kinds["rstd"] = dense("rstd", kind.rstd, before)
    if w is not None:
        kinds["w"] = dense("w", w, before)
    fresh = [Fresh("S", torch.float64, tuple(x.shape[:-1]))]
    config = tiling.parts_forward(rows.N, max(x.dtype.itemsize, y_dtype.itemsize), with_dy=True)
    calls = Calls(index_of(kind.device), rows, kinds, fresh, x.dtype)
    calls.add(
        parts_kernels.begin_backward, config.tiles(rows.M), config, False,
        dy="dy", x="x", w=None if w is None else "w", rstd="rstd", S="S", dy_steps=rows.steps[0],
        x_steps=rows.steps[1], offset=offset_of(spec.offset), EARLY=spec.cast != "late",
    )  # fmt: skip
    return Plan(
        kind.device,
        inputs=("dy", "x", "w", "rstd"),
        before=tuple(before),
        fresh=tuple(fresh),
        launches=tuple(calls.launches),
        outputs=("S",),
    )


@functools.lru_cache(MOST_PLANS)
def plan_finish_backward(kind: FinishBackward) -> Plan:
    """Plans a call that computes dx and dw as `reference.finish_backward` does; dw is summed as in planner.py."""
    x, w, spec = kind.x, kind.w, kind.spec
    y_dtype = y_dtype_of(x.dtype, w, spec.cast)
    of_dw = w.dtype if kind.need_dw and w is not None else None
    wanted = {"dy": (kind.dy, y_dtype), "x": (x, x.dtype)} | ({} if kind.ds is None else {"ds": (kind.ds, x.dtype)})
    rows, kinds, before = find_layout(walk, wanted)
    kinds |= {"rstd": dense("rstd", kind.rstd, before), "S": dense("S", kind.S, before)}
    if w is not None:
        kinds["w"] = dense("w", w, before)
    M, N, device = rows.M, rows.N, index_of(kind.device)
    gpu = gpu_at(device)
    config = tiling.parts_backward(
        M, N, x.dtype.itemsize, y_dtype.itemsize, 0 if of_dw is None else of_dw.itemsize, kind.ds is not None, gpu
    )
    fresh = [Fresh("dx", x.dtype, tuple(x.shape))]
    if of_dw is not None:
        fresh += [Fresh("partials", torch.float32, (config.programs, N)), Fresh("dw", of_dw, (N,))]
    calls = Calls(device, rows, kinds, fresh, x.dtype)
    calls.add(
        parts_kernels.finish_backward, config.programs * config.parts, config, False,
        dy="dy", ds=None if kind.ds is None else "ds", x="x", w=None if w is None else "w", rstd="rstd", S="S", dx="dx",
        partials=None if of_dw is None else "partials", whole=kind.N, programs=config.programs,
        dy_steps=rows.steps[0], x_steps=rows.steps[1], ds_steps=rows.steps[-1], offset=offset_of(spec.offset),
        EARLY=spec.cast != "late",
    )  # fmt: skip
    if of_dw is not None:
        sums = tiling.sum_partials(config.programs, N, gpu)
        calls.add(
            kernels.sum_partials, cdiv(N, sums.block_n), sums, config.programs > 0 and config.overlap,
            partials="partials", dw="dw", programs=config.programs,
        )  # fmt: skip
    return Plan(
        kind.device,
        inputs=("dy", "ds", "x", "w", "rstd", "S"),
        before=tuple(before),
        fresh=tuple(fresh),
        launches=tuple(calls.launches),
        outputs=("dx", None if of_dw is None else "dw"),
    )
