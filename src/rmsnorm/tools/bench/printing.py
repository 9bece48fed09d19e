"""What `rmsnorm bench` prints."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rmsnorm.tools import display, machine
from rmsnorm.tools.bench.aims import AimResult
from rmsnorm.tools.bench.cases import moved_bytes
from rmsnorm.tools.bench.line import WIDTH, FittedLine
from rmsnorm.tools.bench.result import BenchResult, BenchRow, Measurement
from rmsnorm.tools.display import Block, Column, Table, Text

_MOST_UNMET = 8  # the furthest from their aims; --verbose prints all of them


def blocks(result: BenchResult, verbose: bool = False) -> list[Block]:
    """Return what to print.

    Args:
        result: What was measured.
        verbose: Whether to print every time, too.
    """
    return [*_answer(result), _summary(result), *(_details(result) if verbose else _unmet_aims(result))]


def _answer(result: BenchResult) -> list[Block]:
    """Return whether the bits are right, the speed, the aims and the machine, and each case with wrong bits."""
    failed = [row for row in result.rows if row.fault]
    bits = Text(f"PASSED: ours has the exact bits in all {len(result.rows)} cases", "good")
    if failed:
        bits = Text(
            f"FAILED: our bits are wrong in {len(failed)} of {len(result.rows)} cases, which have no time", "bad"
        )
    lines: list[Block] = [bits, *(Text(f"  {row.case}: {row.fault}", "bad") for row in failed)]
    shares = [share for row in result.rows if (share := row.ratio("copy", result.cuda)) is not None]
    if shares:
        lines.append(f"ours runs at {_spread(shares, display.share)} of the speed of a copy of the same bytes")
    aims = result.aims()
    if aims:
        unmet = sum(not aim.met for aim in aims)
        lines.append(f"aims: {len(aims) - unmet} of {len(aims)} met" + (f", {unmet} not met" if unmet else ""))
    seconds = display.duration(result.seconds, digits=3)
    lines.append(f"{'quick' if result.quick else 'full'} run in {seconds}; ours: {result.kernel}")
    return [*lines, Text(machine.headline(result.facts), "note")]


def _spread(values: Sequence[float], form: Callable[..., str]) -> str:
    """Return the least and the greatest value: `94.1 % to 99 %`."""
    least, greatest = (form(value, digits=3) for value in (min(values), max(values)))
    return least if least == greatest else f"{least} to {greatest}"


def _summary(result: BenchResult) -> Table:
    """Return a row for each mode and dtype: the medians, over its cases, of the others' times divided by ours."""
    rows = []
    for (mode, dtype), group in _groups(result).items():
        cells = [f"{mode}, {dtype}", str(len(group))]
        copy = [share for row in group if (share := row.ratio("copy", result.cuda)) is not None]
        cells.append(display.share(statistics.median(copy), digits=3) if copy else display.NOTHING)
        fastest = [ratio for row in group if (ratio := _fastest(row, result.cuda)) is not None]
        for ratios in ([row.ratio("Definition", result.cuda) for row in group], fastest):
            known = [ratio for ratio in ratios if ratio is not None]
            cells.append(display.factor(statistics.median(known), digits=3) if known else display.NOTHING)
        rows.append(tuple(cells))
    headers = ("cases", "of a copy's speed", "Definition / ours", "fastest other / ours")
    columns = (Column("mode, dtype", words=True), *map(Column, headers))
    return Table("Medians over the cases; / ours: the other's time divided by ours", columns, tuple(rows))


def _unmet_aims(result: BenchResult) -> list[Block]:
    unmet = sorted((h for h in result.aims() if not h.met), key=lambda h: h.measured / h.at_least)
    title = "Aims that are not met" + (f", the {_MOST_UNMET} furthest" if len(unmet) > _MOST_UNMET else "")
    return [*_aims(title, unmet[:_MOST_UNMET]), Text("\n--verbose prints each case and each aim.", "note")]


def _groups(result: BenchResult) -> dict[tuple[str, str], list[BenchRow]]:
    groups: dict[tuple[str, str], list[BenchRow]] = {}
    for row in result.rows:
        groups.setdefault((row.case.mode.title, row.case.dtype_name), []).append(row)
    return groups


def _fastest(row: BenchRow, cuda: bool) -> float | None:
    """Return the time of the fastest other norm divided by ours; None if one of them is missing."""
    ratios = [row.ratio(name, cuda) for name in row.providers if name not in ("ours", "copy")]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def _details(result: BenchResult) -> list[Block]:
    """Return a table of times for each mode and dtype, the host's time, the line, the aims and the first call."""
    printed: list[Block] = []
    for (mode, dtype), group in _groups(result).items():
        names = list(dict.fromkeys(name for row in group for name in row.providers))
        printed.append(_times(result, f"{mode}, {dtype}", group, names))
        printed += _differing(f"{mode}, {dtype}", group, names)
        printed += _without_time(group, names)
    printed += _host_table(result) if result.host else []
    printed += _line_table(result.line) if result.line else []
    printed += _aims("Aims, met or not", result.aims())
    printed += ["", _first_call_line(result.first_call)] if result.first_call else []
    return printed


def _aims(title: str, held: list[AimResult]) -> list[Block]:
    columns = (Column("the other's time / ours", words=True), *map(Column, ("measured", "aim", "")))
    rows = tuple(
        (
            h.what,
            display.factor(h.measured, digits=3),
            display.factor(h.at_least, digits=3),
            Text("met", "good") if h.met else Text("not met", "bad"),
        )
        for h in held
    )
    return [Table(title, columns, rows)] if rows else []


def _times(result: BenchResult, what: str, group: list[BenchRow], names: list[str]) -> Table:
    headers = [*names, "copy / ours", "Definition / ours", "ours a second"]
    saved = any(m.saved is not None for row in group for m in row.providers.values())
    headers += ["saved: ours", "saved: Definition"] if saved else []
    rows = []
    for row in group:
        cells = [f"{row.case.M} × {row.case.N}"]
        cells += [display.duration(row.time(name, result.cuda)) for name in names]
        cells += [display.factor(row.ratio(provider, result.cuda), digits=3) for provider in ("copy", "Definition")]
        ours = row.time("ours", result.cuda)
        cells.append(display.speed(None if ours is None else moved_bytes(row.case) / ours))
        if saved:
            cells += [display.size(row.providers.get(name, Measurement(None)).saved) for name in ("ours", "Definition")]
        rows.append(tuple(cells))
    figure = "median" if result.cuda else "minimum"
    return Table(f"{what}: {figure} time", (Column("rows × N", words=True), *map(Column, headers)), tuple(rows))


def _differing(what: str, group: list[BenchRow], names: list[str]) -> list[Block]:
    """Return a table of the shares of outputs that differ from the Definition, for providers that are an RMSNorm."""
    known = [n for n in names if any(r.providers[n].differs is not None for r in group if n in r.providers)]
    rows = tuple(
        (
            f"{row.case.M} × {row.case.N}",
            *(display.share(row.providers.get(name, Measurement(None)).differs, digits=2) for name in known),
        )
        for row in group
    )
    title = f"{what}: outputs whose bits differ from the Definition's; where ours differ, its own sum is inaccurate"
    return [Table(title, (Column("rows × N", words=True), *map(Column, known)), rows)] if known else []


def _without_time(group: list[BenchRow], names: list[str]) -> list[Block]:
    """Return for each reason which provider has no time in which cases."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row, name in itertools.product(group, names):
        measured = row.providers.get(name)
        if measured is not None and measured.timing is None and measured.reason:
            reasons.setdefault((name, measured.reason), []).append(f"{row.case.M} × {row.case.N}")
    return [f"{name} has no time at {', '.join(shapes)}: {reason}" for (name, reason), shapes in reasons.items()]


def _host_table(result: BenchResult) -> list[Block]:
    kinds = list(next(iter(result.host.values())))
    rows = tuple(
        (name, *(display.duration(times[kind] / 1e6 if kind in times else None) for kind in kinds))
        for name, times in result.host.items()
    )
    title = "Host time of a call on 16 × 1280, bfloat16: median, without waiting for the GPU"
    return [Table(title, (Column("", words=True), *map(Column, kinds)), rows)]


def _line_table(lines: dict[str, FittedLine]) -> list[Block]:
    headers = ["rows", "moved"]
    for name in lines:
        headers += [name, f"the line of {name}", "off by"]
    rows = []
    for sizes in zip(*(line.to_json()["sizes"] for line in lines.values()), strict=True):
        cells = [f"{sizes[0]['M']}", display.size(sizes[0]["bytes"])]
        for size in sizes:
            cells += [display.duration(size[key] / 1e6) for key in ("median_us", "line_us")]
            cells.append(display.share(size["deviation"], digits=2))
        rows.append(tuple(cells))
    table = Table(f"Forward of rows × {WIDTH}, bfloat16: median time", tuple(map(Column, headers)), tuple(rows))
    return [table, "", *(f"{name}: {line.summary()}" for name, line in lines.items())]


def _first_call_line(first: dict[str, Any]) -> str:
    if "error" in first:
        return f"first call: not measured, {first['error']}"
    empty, filled = (
        " + ".join(display.duration(first[state][phase], digits=3) for phase in ("forward_s", "backward_s"))
        for state in ("empty_cache", "filled_cache")
    )
    return (
        f"first call in a new process, bfloat16, forward + backward: {empty} with an empty cache of compiled code, "
        f"{filled} with a filled one"
    )
