"""Plans calls of gated norms on the GPU, as planner.py does for those without a gate."""

import functools
import math
from typing import Any

import torch

from rmsnorm.kernels.gpu import gated_kernels, kernels, tiling
from rmsnorm.kernels.gpu.planner import Calls, cdiv, gpu_at, index_of
from rmsnorm.kernels.gpu.tiling import Launch
from rmsnorm.kernels.plan import (
    MOST_PLANS,
    Converted,
    Fresh,
    GatedBackward,
    GatedForward,
    Plan,
    TensorKind,
    dense,
    find_layout,
)
from rmsnorm.kernels.rows import walk
from rmsnorm.spec import Spec, gated_dtype

# The tensors of these plans have a dimension for the groups: see `GatedForward`. N is the width of a group.


@functools.lru_cache(MOST_PLANS)
def plan_gated_forward(kind: GatedForward) -> Plan:
    """Plans a call that computes y and rstd as `gated_reference.forward` does."""
    x, gate, w, spec = kind.x, kind.gate, kind.w, kind.spec
    rows, kinds, before = find_layout(walk, {"x": (x, x.dtype), "gate": (gate, gate.dtype)})
    device = index_of(kind.device)
    gpu = gpu_at(device)
    config = tiling.gated_forward(rows.N, max(x.dtype.itemsize, gate.dtype.itemsize), gpu)
    _add_weight(w, kinds, before)
    fresh = [Fresh("y", gated_dtype(x.dtype, None if w is None else w.dtype, spec), tuple(x.shape))]
    if kind.with_rstd:
        fresh.append(Fresh("rstd", torch.float32, tuple(x.shape[:-1])))
    calls = Calls(device, rows, kinds, fresh, min(x.dtype, gate.dtype, key=lambda dtype: dtype.itemsize))
    table = _tabulate(gate, torch.float32, spec, calls, fresh, gpu)
    x_steps, gate_steps = rows.steps
    calls.add(
        gated_kernels.gated_forward_loop if config.parts == 0 else gated_kernels.gated_forward_block,
        cdiv(rows.M, config.rows), config, table is not None,
        x="x", gate="gate", table=table, w=_present("w", w), y="y",
        rstd="rstd" if kind.with_rstd else None, groups=spec.groups,
        x_steps=x_steps, gate_steps=gate_steps, eps=float(spec.eps), GROUPED=spec.groups > 1, **_constants(spec),
    )  # fmt: skip
    return Plan(
        kind.device,
        inputs=("x", "gate", "w"),
        before=tuple(before),
        fresh=tuple(fresh),
        launches=tuple(calls.launches),
        outputs=("y", "rstd" if kind.with_rstd else None),
    )


@functools.lru_cache(MOST_PLANS)
def plan_gated_backward(kind: GatedBackward) -> Plan:
    """Plans a call that computes dx, dgate and dw as `gated_reference.backward` does.

    dw is the fp64 sum of fp32 partial sums, each over at most `tiling.LONGEST_SUM` numbers.
    """
    x, gate, w, spec = kind.x, kind.gate, kind.w, kind.spec
    of_dw = w.dtype if kind.need_dw and w is not None else None
    y_dtype = gated_dtype(x.dtype, None if w is None else w.dtype, spec)
    wanted = {"dy": (kind.dy, y_dtype), "x": (x, x.dtype), "gate": (gate, gate.dtype)}
    rows, kinds, before = find_layout(walk, wanted)
    kinds["rstd"] = dense("rstd", kind.rstd, before)
    _add_weight(w, kinds, before)
    groups, N, device = spec.groups, rows.N, index_of(kind.device)
    M, gpu = rows.M // groups, gpu_at(device)  # M: rows of each group
    loaded = y_dtype.itemsize + x.dtype.itemsize + gate.dtype.itemsize
    dw_itemsize = 0 if of_dw is None else of_dw.itemsize
    fresh = [Fresh("dx", x.dtype, tuple(x.shape))] if kind.need_dx else []
    if kind.need_dgate:
        fresh.append(Fresh("dgate", gate.dtype, tuple(x.shape)))
    narrowest = min(y_dtype, x.dtype, gate.dtype, key=lambda dtype: dtype.itemsize)
    calls = Calls(device, rows, kinds, fresh, narrowest)
    steps = dict(zip(("dy_steps", "x_steps", "gate_steps"), rows.steps, strict=True))
    table = None
    if kind.need_dx or kind.need_dgate or of_dw is not None:
        table = _tabulate(gate, torch.int64 if kind.need_dgate else torch.float32, spec, calls, fresh, gpu)
    reads = {"dy": "dy", "x": "x", "gate": "gate", "table": table, "rstd": "rstd", "groups": groups}
    reads |= steps | _constants(spec)
    sums: Launch | None = None  # the launch whose programs compute partial sums of dw
    if kind.need_dx or kind.need_dgate:
        assert spec.gate is not None
        itemsize = max(x.dtype.itemsize, gate.dtype.itemsize)
        config = tiling.gated_backward(M, N, groups, spec.gate.first, itemsize, loaded, dw_itemsize, gpu)
        sums = config if of_dw is not None and config.parts > 0 else None
        if sums is not None:
            fresh.append(Fresh("partials", torch.float32, (sums.programs, groups * N)))
        calls.add(
            gated_kernels.gated_backward_loop if config.parts == 0 else gated_kernels.gated_backward_block,
            rows.M if config.parts == 0 else config.programs * groups, config, table is not None,
            **reads, w=_present("w", w), dx="dx" if kind.need_dx else None, dgate="dgate" if kind.need_dgate else None,
            partials=_present("partials", sums), programs=config.programs,
        )  # fmt: skip
    if of_dw is not None:
        if sums is None:
            sums = tiling.gated_dw_alone(M, N, groups, loaded, dw_itemsize, gpu)
            parts = cdiv(N, sums.block_n)
            fresh.append(Fresh("partials", torch.float32, (sums.programs, groups * N)))
            calls.add(
                gated_kernels.gated_dw_alone, sums.programs * groups * parts, sums,
                table is not None and len(calls.launches) == 1, **reads, partials="partials",
                parts=parts, programs=sums.programs,
            )  # fmt: skip
        config = tiling.sum_partials(sums.programs, groups * N, gpu)
        fresh.append(Fresh("dw", of_dw, (groups * N,)))
        calls.add(
            kernels.sum_partials, cdiv(groups * N, config.block_n), config, sums.programs > 0,
            partials="partials", dw="dw", programs=sums.programs, N=groups * N,
        )  # fmt: skip
    return Plan(
        kind.device,
        inputs=("dy", "x", "gate", "w", "rstd"),
        before=tuple(before),
        fresh=tuple(fresh),
        launches=tuple(calls.launches),
        outputs=(
            "dx" if kind.need_dx else None,
            "dgate" if kind.need_dgate else None,
            None if of_dw is None else "dw",
        ),
    )


def _tabulate(
    gate: TensorKind, entry: torch.dtype, spec: Spec, calls: Calls, fresh: list[Fresh], gpu: tiling.Gpu
) -> str | None:
    """Adds the launch that computes a table of all gates, if that is worth it, and returns the table's name."""
    config = tiling.tabulate(math.prod(gate.shape), gate.dtype.itemsize, gpu)
    if config is None:
        return None
    fresh.append(Fresh("table", entry, (1 << 16,)))
    calls.add(
        gated_kernels.tabulate, (1 << 16) // config.block_n, config, False,
        table="table", BF16=gate.dtype is torch.bfloat16, **_constants(spec),
    )  # fmt: skip
    return "table"


def _add_weight(w: TensorKind | None, kinds: dict[str, TensorKind], before: list[Converted]) -> None:
    """Adds the weight as the kernels read it, contiguous."""
    if w is not None:
        kinds["w"] = dense("w", w, before)


def _present(name: str, what: object) -> str | None:
    """The name of a tensor, or None if there is none."""
    return None if what is None else name


def _constants(spec: Spec) -> dict[str, Any]:
    """The compile-time constants of the kernels that a spec sets, by name."""
    assert spec.gate is not None
    return {
        "EARLY": spec.cast == "early",
        "SIGMOID": spec.gate.activation == "sigmoid",
        "GATE_FIRST": spec.gate.first,
    }
