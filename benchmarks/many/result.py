"""The aims, and what is printed."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

from many.definitions import BITS, COLUMNS, LEFT_OUT, MODEL, NORMS, PART, REDUCE, ROWS, STEPS, WHOLE
from many.shares import CLASSES, OTHER
from rmsnorm.tools import machine
from rmsnorm.tools.display import NOTHING, Block, Column, Table, count, duration, share
from whole_models.definitions import AS_IS, PATCHED
from whole_models.result import aim_in_words, aims_met, bound_at_most, ratio_in_words

# The time of rows in parts, relative to the kernel on a part plus the all-reduce; that of a patched model, relative to
# the model as it is.
_COLUMNS_AT_MOST, _STEP_AT_MOST = 1.15, 1.0
# The error of dw relative to eager's, by dtype, over at least so many elements.
_DW_AT_MOST, _FEWEST_OF_DW = {"bfloat16": 1.0, "float32": 1.1}, 1 << 16
# How far a mean over ranks may be from one in another order.
_ULP_AT_MOST = 1


# --- the aims ------------------------------------------------------------------------------------------------


def bounds(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the aims, and what was measured."""
    return [*_of_bits(found[BITS]), *_of_norms(found[NORMS]), *_of_steps(found[STEPS])]


def _of_bits(cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for (world, sharding), group in by_sharding(cases):
        what = {"world": world, "what": f"norms sharded by {sharding}"}
        yield what | bound_at_most("differing elements of y, s and dx", sum(c["differing"] for c in group), 0)
        of_dw = [case["dw"] for case in group]
        if "ulp" in of_dw[0]:
            off = max(dw["ulp"] for dw in of_dw)
            yield what | bound_at_most("ulp of dw to the mean of the ranks' own", off, _ULP_AT_MOST)
        elif "differing" in of_dw[0]:
            wrong = sum(dw["differing"] for dw in of_dw)
            yield what | bound_at_most("elements of dw that are not a rank's own", wrong, 0)
        for dtype, at_most in _DW_AT_MOST.items():
            same = [case for case in group if case["dtype"] == dtype and "error" in case["dw"]]
            if sum(case["width"] for case in same) >= _FEWEST_OF_DW:
                yield what | bound_at_most(f"error of dw / eager's, {dtype}", over_eager(same), at_most)


def over_eager(cases: list[dict[str, Any]]) -> float:
    """Return the error of dw divided by that of the eager class, over all elements of these cases."""
    weighted = {
        whose: math.sqrt(sum(case["width"] * case["dw"][whose] ** 2 for case in cases))
        for whose in ("error", "error_of_eager")
    }
    return weighted["error"] / weighted["error_of_eager"]


def _of_norms(timed: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for one in timed:
        what = {"world": one["world"], "what": f"{one['direction']} of {one['rows']} × {one['width']} by columns"}
        yield what | bound_at_most("time / (a part's kernel + all-reduce)", over_parts(one), _COLUMNS_AT_MOST)


def _of_steps(steps: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for one in steps:
        by_name = {variant["variant"]: variant for variant in one["variants"]}
        what = {"world": one["world"], "what": f"training step, {one['plan']}"}
        ratio = by_name[PATCHED]["over_as_is"]
        yield what | bound_at_most("time / as is", ratio["ratio"], _STEP_AT_MOST, ratio["low"])
        for quantity, error in by_name[PATCHED]["errors"].items():
            off = error if math.isfinite(error) else 1e9
            yield what | bound_at_most(f"{quantity}, relative difference from one process", off, MODEL.far_off)


def by_sharding(cases: list[dict[str, Any]]) -> list[tuple[tuple[int, str], list[dict[str, Any]]]]:
    """Return the cases of each number of ranks and each sharding, in the order in which they were measured."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault((case["world"], case["sharding"]), []).append(case)
    return list(groups.items())


def over_parts(one: dict[str, Any]) -> float:
    """Return the time of a norm sharded by columns, relative to the kernel of a part plus the all-reduce."""
    times = {name: time["median_us"] for name, time in one["times"].items()}
    return times[COLUMNS] / (times[PART] + times[REDUCE])


SHOWN = tuple(name for name in CLASSES if name != OTHER)  # classes of kernels, in tables


def shares(variant: dict[str, Any]) -> list[float | None]:
    """Return the time in each of SHOWN relative to the median step, or None if the step was not profiled."""
    taken = variant.get("shares_us", {})
    return [taken[name] / variant["median_us"] if name in taken else None for name in SHOWN]


def not_measured(found: dict[str, Any]) -> list[str]:
    """Return the training steps that were asked for and not measured, because a rank failed or a run was stopped."""
    known = {(one["world"], one["plan"]) for one in (*found[STEPS], *found[LEFT_OUT])}
    asked = itertools.product(found["worlds"], found["plans"]) if STEPS in found["sections"] else ()
    return [f"{plan} on {ranks(world)}" for world, plan in asked if (world, plan) not in known]


def dw_in_words(group: list[dict[str, Any]]) -> str:
    """Return how dw compares with its contract."""
    of_dw = [case["dw"] for case in group]
    if "error" in of_dw[0]:
        dtypes = dict.fromkeys(case["dtype"] for case in group)
        ratios = {dtype: over_eager([case for case in group if case["dtype"] == dtype]) for dtype in dtypes}
        return "error / eager's: " + ", ".join(f"{ratio:.3f} in {dtype}" for dtype, ratio in ratios.items())
    differing = sum(dw["differing"] for dw in of_dw)
    if "ulp" in of_dw[0]:
        return f"{differing:,} differ from the mean of the ranks' own, by at most {max(dw['ulp'] for dw in of_dw)} ulp"
    return f"{differing:,} differ from those of the rank's own rows"


def ranks(world: int) -> str:
    """Return the number of ranks in words."""
    return f"{world} rank{'s' if world > 1 else ''}"


def mesh_in_words(one: dict[str, Any]) -> str:
    """Return the sizes of the mesh of a training step."""
    return " × ".join(map(str, one["mesh"].values()))


# --- what is printed -----------------------------------------------------------------------------------------


def blocks(found: dict[str, Any]) -> Iterator[Block]:
    """Yield what is printed of a result."""
    yield machine.headline(found["machine"])
    if found[BITS]:
        columns = (
            Column("", words=True),
            Column("cases"),
            Column("elements"),
            Column("differing"),
            Column("dw", words=True),
        )
        rows = [
            (f"{ranks(world)}, by {sharding}", str(len(group)), count(sum(c["elements"] for c in group)),
             count(sum(c["differing"] for c in group)), dw_in_words(group))
            for (world, sharding), group in by_sharding(found[BITS])
        ]  # fmt: skip
        yield Table("y, s and dx of sharded norms against one device", columns, tuple(rows))
    if found[NORMS]:
        names = WHOLE, ROWS, COLUMNS, PART, REDUCE
        columns = (Column("", words=True), *map(Column, names), Column("columns / (part + all-reduce)"))
        rows = [
            (f"{ranks(one['world'])}, {one['direction']}, {one['rows']} × {one['width']}",
             *(duration(one["times"][name]["median_us"] / 1e6, 3) for name in names), f"{over_parts(one):.2f}")
            for one in found[NORMS]
        ]  # fmt: skip
        yield Table("Norms, bf16", columns, tuple(rows))
    if found[STEPS]:
        yield from _steps(found[STEPS])
    yield from found["failed"].values()
    for one in found[LEFT_OUT]:
        yield f"{ranks(one['world'])}, {one['plan']} was left out: {one['reason']}"
    if missing := not_measured(found):
        yield f"not measured: {'; '.join(missing)}"
    yield from aims_met(found, in_words)


def _steps(steps: list[dict[str, Any]]) -> Iterator[Block]:
    columns = (
        Column("", words=True), Column("step"), Column("quartiles"), Column("/ as is", words=True),
        *map(Column, SHOWN),
    )  # fmt: skip
    of_model = f"{MODEL.what}, {steps[0]['layers']} layers"
    for _, group in itertools.groupby(steps, lambda one: one["world"]):
        for one in group:
            size = f"mesh {mesh_in_words(one)}, {one['batch']} × {one['tokens']} tokens"
            title = f"Training step on {ranks(one['world'])}, {one['plan']}, {size} ({of_model})"
            yield Table(title, columns, tuple(_row(variant) for variant in one["variants"]))


def _row(variant: dict[str, Any]) -> tuple[str, ...]:
    median, low, high = (variant[f"{figure}_us"] / 1e6 for figure in ("median", "low", "high"))
    ratio = NOTHING if variant["variant"] == AS_IS else ratio_in_words(variant)
    of_step = (share(part, 3) for part in shares(variant))
    return (variant["variant"], duration(median), f"{duration(low, 3)} to {duration(high, 3)}", ratio, *of_step)


def in_words(bound: dict[str, Any]) -> str:
    """Return what was measured for an aim."""
    spread = ", within the spread" if bound["inside_spread"] else ""
    measured = bound["measured"]
    figure = f"{measured:,}" if isinstance(measured, int) else f"{measured:.3f}"
    return f"{ranks(bound['world'])}, {bound['what']}: {bound['of']} {figure}, aim: {aim_in_words(bound)}{spread}"
