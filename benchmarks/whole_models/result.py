"""The aims, several runs as one result, and what is printed."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rmsnorm.errors import CommandError
from rmsnorm.tools import machine
from rmsnorm.tools.display import NOTHING, Block, Column, Table, duration, size
from whole_models.definitions import AS_IS, PATCHED, RECOMPUTED

_MUST_AGREE = "tiny", "compiled_with", "gpu", "cpu", "commit"


def merge(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return several runs as one; of a case that was measured twice, the later run counts.

    Raises:
        CommandError: If they are not of one machine, commit and way to compile, or of several versions of a package.
    """
    versions = [run["machine"]["versions"] for run in runs]
    packages = sorted({package for each in versions for package in each})
    facts = {what: [run.get(what, run["machine"].get(what)) for run in runs] for what in _MUST_AGREE}
    facts |= {f"the version of {package}": [v[package] for v in versions if package in v] for package in packages}
    for what, values in facts.items():
        found = {json.dumps(value, sort_keys=True) for value in values}
        if len(found) > 1:
            raise CommandError(f"--merge: the runs differ in {what} ({'; '.join(sorted(found))}): give runs that agree")
    cases = {(case["model"], case["mode"]): case for run in runs for case in run["cases"]}
    # Results of earlier versions of this benchmark have no such sections.
    gradients = {(one["model"], one["compiled"]): one for run in runs for one in run.get("gradients", ())}
    batches = {one["model"]: one for run in runs for one in run.get("batches", ())}
    return runs[0] | {
        "machine": runs[0]["machine"] | {"versions": {name: v for each in versions for name, v in each.items()}},
        "missing": {name: why for run in runs for name, why in run["missing"].items()},
        "left_out": [],
        "cases": list(cases.values()),
        "gradients": list(gradients.values()),
        "batches": list(batches.values()),
        "bounds": bounds(list(cases.values()), list(gradients.values())),
        "seconds": round(sum(run["seconds"] for run in runs), 1),
    }


# The aims. Each is of a ratio to the model as it is; with recompute, to the patched model.
_COMPILATION_AT_MOST, _KEPT_AT_MOST, _RECOMPUTED_TIME_AT_MOST = 1.1, 1.0, 1.01
_FREED_AT_LEAST = 0.95  # of the bytes of norm outputs that other operators keep
_GRADIENTS_AT_MOST = 0  # elements that recompute changes


def bounds(cases: Sequence[dict[str, Any]], gradients: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Return the aims, and what was measured."""
    found = []
    for case in cases:
        for compiled, by_name in by_compilation(case):
            if PATCHED not in by_name:
                continue
            what = {"model": case["model"], "mode": case["mode"], "compiled": compiled}
            found += [what | bound for bound in _of_patched(case, by_name, compiled)]
            found += [what | bound for bound in _of_recompute(case, by_name)]
    for one in gradients:
        if "differing" in one:
            what = {"model": one["model"], "mode": "training", "compiled": one["compiled"]}
            found.append(what | bound_at_most("gradients that recompute changes", one["differing"], _GRADIENTS_AT_MOST))
    return found


def by_compilation(case: dict[str, Any]) -> Iterator[tuple[bool, dict[str, dict[str, Any]]]]:
    """Yield the variants of a case by name, those that were not compiled first, and whether they were compiled."""
    for compiled in (False, True):
        yield compiled, {v["variant"]: v for v in case["variants"] if v["compiled"] == compiled}


def _of_patched(case: dict[str, Any], by_name: dict[str, dict[str, Any]], compiled: bool) -> Iterator[dict[str, Any]]:
    patched = by_name[PATCHED]
    if AS_IS not in by_name:
        return
    as_is, ratio = by_name[AS_IS], patched["over_as_is"]
    if ratio is not None:
        yield bound_at_most("time", ratio["ratio"], case["at_most"], ratio["low"])
    if compiled and None not in (patched["first_call_s"], as_is["first_call_s"]):
        yield bound_at_most("compilation", patched["first_call_s"] / as_is["first_call_s"], _COMPILATION_AT_MOST)
    if patched["kept_bytes"] and as_is["kept_bytes"]:
        yield bound_at_most("kept memory", patched["kept_bytes"] / as_is["kept_bytes"], _KEPT_AT_MOST)


def _of_recompute(case: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    if RECOMPUTED not in by_name:
        return
    ratio = by_name[RECOMPUTED].get("over_patched")
    if ratio is not None:
        yield bound_at_most("time with recompute", ratio["ratio"], _RECOMPUTED_TIME_AT_MOST, ratio["low"])
    freed = freed_share(case, by_name)
    if freed is not None:
        yield _bound("norm outputs freed", freed, freed >= _FREED_AT_LEAST) | {"at_least": _FREED_AT_LEAST}


def freed_share(case: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> float | None:
    """Return which share of the bytes of norm outputs that recompute can free it has freed; None if unknown."""
    less = recompute_less(by_name, "kept_bytes")
    saved = case.get("saved_output_bytes")
    return less / saved if saved and less is not None else None


def recompute_less(by_name: dict[str, dict[str, Any]], figure: str) -> int | None:
    """Return by how many bytes a figure is smaller with recompute than without; None if unknown."""
    plain, recomputed = (by_name.get(name, {}).get(figure) for name in (PATCHED, RECOMPUTED))
    return None if plain is None or recomputed is None else plain - recomputed


def bound_at_most(of: str, measured: float, at_most: float, low: float | None = None) -> dict[str, Any]:
    met = measured <= at_most
    spread = not met and low is not None and low <= at_most
    return _bound(of, measured, met, spread) | {"at_most": at_most}


def _bound(of: str, measured: float, met: bool, spread: bool = False) -> dict[str, Any]:
    return {"of": of, "measured": measured, "met": met, "inside_spread": spread}


def aim_in_words(bound: dict[str, Any]) -> str:
    """Return the aim."""
    least, figure = "at_least" in bound, bound.get("at_least", bound.get("at_most"))
    return f"at {'least' if least else 'most'} {figure:{'d' if isinstance(figure, int) else '.2f'}}"


def blocks(result: dict[str, Any]) -> Iterator[Block]:
    """Yield what is printed of a result."""
    yield machine.headline(result["machine"])
    yield f"compiled with torch.compile({', '.join(f'{k}={v!r}' for k, v in result['compiled_with'].items())})"
    columns = (
        Column("", words=True), Column("step"), Column("quartiles"), Column("/ as is", words=True),
        Column("first call"), Column("kept"), Column("peak"),
    )  # fmt: skip
    for case in result["cases"]:
        of_model = f"{case['model']} ({case['what']}, {case['layers']} layer{'s' if case['layers'] > 1 else ''})"
        title = f"{of_model}, {case['title']}"
        yield Table(title, columns, tuple(_row(found) for found in case["variants"]))
    yield from _recompute_tables(result)
    yield ""
    for case in result["cases"]:
        for found in case["variants"]:
            if "no_time" in found:
                label = f"{found['variant']}, {how(found['compiled'])}"
                yield f"{case['model']}, {case['mode']}, {label}: not timed: {found['no_time']}"
    for one in result.get("gradients", ()):
        yield f"{one['model']}, gradients, {how(one['compiled'])}: {gradients_in_words(one)}"
    for name, why in result["missing"].items():
        yield f"{name} was not measured: {why}"
    if result["left_out"]:
        yield f"no time was left for: {'; '.join(result['left_out'])}; give more --seconds, or measure them apart"
    yield from aims_met(result, in_words)


def aims_met(result: dict[str, Any], words: Callable[[dict[str, Any]], str]) -> Iterator[str]:
    """Yield how many aims a result meets, and those that it misses, in the words of `words`."""
    met = sum(bound["met"] for bound in result["bounds"])
    yield f"{met} of {len(result['bounds'])} aims are met in {duration(result['seconds'], 3)}"
    for bound in result["bounds"]:
        if not bound["met"]:
            yield f"  missed: {words(bound)}"


def _recompute_tables(result: dict[str, Any]) -> Iterator[Block]:
    """Yield what recompute saves, and the largest batches."""
    rows = []
    for case in result["cases"]:
        for compiled, by_name in by_compilation(case):
            freed = freed_share(case, by_name)
            if freed is not None:
                less = (size(recompute_less(by_name, figure), 3) for figure in ("kept_bytes", "peak_bytes"))
                outputs = size(case["saved_output_bytes"], 3)
                ratio = ratio_in_words(by_name[RECOMPUTED], "over_patched")
                rows.append((f"{case['model']}, {how(compiled)}", outputs, *less, f"{freed:.3f}", ratio))
    if rows:
        columns = (
            Column("", words=True), Column("norm outputs kept", words=True), Column("kept: less", words=True),
            Column("peak: less", words=True), Column("share freed", words=True), Column("time / patched", words=True),
        )  # fmt: skip
        yield Table("Recompute, relative to patched", columns, tuple(rows))
    if result.get("batches"):
        names = [found["variant"] for found in result["batches"][0]["variants"]]
        columns = (Column("", words=True), *map(Column, names))
        rows = [(batches_title(one), *(str(v["batch"]) for v in one["variants"])) for one in result["batches"]]
        yield Table("The largest batch whose training step fits, eager", columns, tuple(rows))


def batches_title(one: dict[str, Any]) -> str:
    """Return the model, its layers, the length of a sequence and the limit."""
    layers = f"{one['layers']} layer{'s' if one['layers'] > 1 else ''}"
    return f"{one['model']}, {layers}, sequences of {one['tokens']} tokens, {size(one['limit_bytes'], 3)}"


def gradients_in_words(one: dict[str, Any]) -> str:
    """Return how many elements of gradients recompute changes, or why that was not measured."""
    if "differing" not in one:
        return f"not compared: {one['reason']}"
    repeated = f"; {one['repeated']:,} differ between two steps without it" if one["repeated"] else ""
    return f"recompute changes {one['differing']:,} of {one['elements']:,} elements{repeated}"


def how(compiled: bool) -> str:
    """Return how a model was run."""
    return "compiled" if compiled else "eager"


def in_words(bound: dict[str, Any]) -> str:
    """Return what was measured for an aim."""
    spread = ", within the spread" if bound["inside_spread"] else ""
    figure = f"{bound['measured']}" if isinstance(bound["measured"], int) else f"{bound['measured']:.3f}"
    figures = f"{figure}, aim: {aim_in_words(bound)}{spread}"
    return f"{bound['model']}, {bound['mode']}, {how(bound['compiled'])}: {bound['of']} {figures}"


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    label = f"{found['variant']}, {how(found['compiled'])}"
    times = (NOTHING, NOTHING)
    if "no_time" not in found:
        median, low, high = (found[f"{figure}_us"] / 1e6 for figure in ("median", "low", "high"))
        times = duration(median), f"{duration(low, 3)} to {duration(high, 3)}"
    memory = (size(found[f"{what}_bytes"], 3) for what in ("kept", "peak"))
    return (label, *times, ratio_in_words(found), duration(found["first_call_s"], 3), *memory)


def ratio_in_words(found: dict[str, Any], which: str = "over_as_is") -> str:
    ratio = found.get(which)
    if ratio is None or (which == "over_as_is" and found["variant"] == AS_IS):
        return NOTHING
    if ratio["low"] is None:
        return f"{ratio['ratio']:.3f}"
    spread = "; within the spread" if ratio["low"] <= 1 <= ratio["high"] else ""
    return f"{ratio['ratio']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}{spread})"
