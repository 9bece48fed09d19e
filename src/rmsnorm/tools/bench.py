"""`rmsnorm bench`: ours beside its peers, interleaved in one run; no time for a case whose bits are wrong."""

import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rmsnorm
from rmsnorm import bits, memory, reference
from rmsnorm.errors import CommandError
from rmsnorm.functional import wait_for_host
from rmsnorm.tools import display, machine, peers, plot, processes, results, timing
from rmsnorm.tools.display import Block, Column, Table, Text
from rmsnorm.tools.peers import EPS, Provider, definition
from rmsnorm.tools.timing import Progress, Timing

FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward+backward"
ADD_FORWARD, ADD_BACKWARD = "add + norm, forward", "add + norm, backward"
# Of rows that lie further apart than they are wide, as DeepSeek's kv_a_layernorm gets 512 of 576 columns.
SLICE_FORWARD, _BETWEEN = "forward, of rows 64 columns apart", 64
_FORWARDS = (FORWARD, SLICE_FORWARD, ADD_FORWARD)
_NO_GRAD = "forward, no_grad"
_QUICK_SECONDS, _QUICK_FEWEST = 0.4, 5
_SAMPLES = (100, 31)  # on a CPU, on a GPU

Run = Callable[..., tuple[Tensor, ...]]


# --- what is measured ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """M rows of N, one dtype for x and w; mode is one of the six above."""

    M: int
    N: int
    dtype: torch.dtype
    mode: str

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.dtype_name} {self.M} x {self.N} {self.mode}"

    def to_json(self) -> dict[str, Any]:
        return {"M": self.M, "N": self.N, "dtype": self.dtype_name, "mode": self.mode}

    @property
    def adds(self) -> bool:
        return self.mode in (ADD_FORWARD, ADD_BACKWARD)

    @property
    def tensors(self) -> int:
        """Tensors of M x N that must be read or written."""
        return {FORWARD: 2, SLICE_FORWARD: 2, BACKWARD: 3, TRAINING: 5, ADD_FORWARD: 4, ADD_BACKWARD: 4}[self.mode]


Shapes = tuple[tuple[int, int], ...]
_CPU_SHAPES: Shapes = ((1, 1280), (64, 1280), (512, 1280), (2048, 1280), (4096, 1280), (8192, 1280), (2048, 4096))
_CPU_SHAPES_QUICK: Shapes = ((1, 1280), (512, 1280), (8192, 1280))
_CUDA_SHAPES: Shapes = (
    (524288, 128), (65536, 512), (8192, 1280), (65536, 1280), (32768, 1536), (16384, 2048), (16384, 2880),
    (16384, 4096), (8192, 5120), (16384, 7168), (8192, 12288), (8192, 16384), (4096, 32768), (2048, 65536),
    (1024, 131072), (512, 262144),
)  # fmt: skip
# Enough for what differs from the others only in the residual, or from bf16 only in the format of its 16 bits.
_CUDA_SHAPES_QUICK: Shapes = ((8192, 1280), (65536, 1280), (16384, 4096), (16384, 7168))
_CUDA_SLICES: Shapes = ((65536, 512),)


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    """The cases of a run, in the order in which they are measured."""
    dtypes = (torch.bfloat16, torch.float32) if quick else (torch.bfloat16, torch.float32, torch.float16)
    if device_type != "cuda":
        shapes = _CPU_SHAPES_QUICK if quick else _CPU_SHAPES
        for dtype, mode, (M, N) in itertools.product(dtypes, (FORWARD, TRAINING), shapes):
            yield Case(M, N, dtype, mode)
        return
    for dtype, mode in itertools.product(dtypes, (FORWARD, SLICE_FORWARD, BACKWARD, ADD_FORWARD, ADD_BACKWARD)):
        few = quick or mode in (ADD_FORWARD, ADD_BACKWARD) or dtype == torch.float16
        shapes = _CUDA_SLICES if mode == SLICE_FORWARD else _CUDA_SHAPES_QUICK if few else _CUDA_SHAPES
        for M, N in shapes:
            yield Case(M, N, dtype, mode)


def moved_bytes(case: Case) -> int:
    """What nothing that computes this can avoid to read and write; see `rmsnorm.cost`."""
    implementation: Any = "ours+residual" if case.adds else "ours"
    phases: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(_FORWARDS, ("inference",)), TRAINING: ("forward", "backward")
    }  # fmt: skip
    shape = (case.M, case.N)
    return sum(
        rmsnorm.cost(shape, case.dtype, implementation=implementation, phase=phase).least
        for phase in phases.get(case.mode, ("backward",))
    )


# --- what is held against it ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """A peer's time over ours must be at least `at_least`. Printed as met or not met; nothing fails by it."""

    mode: str
    peer: str
    at_least: float


_BIG, _ROW = (8192, 1280), (1, 1280)
_CPU_BOUNDS = (
    Bound(FORWARD, "copy", 1 / 2),
    Bound(FORWARD, "Definition", 20),
    Bound(FORWARD, "LayerNorm", 1.3),
    Bound(FORWARD, "torch.compile", 1.15),
    Bound(TRAINING, "LayerNorm", 1),
    Bound(TRAINING, "torch.compile", 1),
    Bound(TRAINING, "Definition", 15),
)
_CPU_ROW_BOUND = Bound(FORWARD, "F.rms_norm", 3)
_CPU_ROW_SECONDS = 5e-6
_CUDA_WIDEST = 16384
_SLICE_SHARE = 0.98  # "as fast", of two cases that are not interleaved


def _cuda_bounds(case: Case) -> tuple[Bound, ...]:
    """Shares of a copy's speed, and of the fastest peer's."""
    wide = case.N > _CUDA_WIDEST
    copy = {FORWARD: 1 / 1.10 if wide else 1 / 1.05, SLICE_FORWARD: 1 / 1.05, ADD_FORWARD: 1 / 1.05}.get(case.mode)
    if case.mode == BACKWARD:
        copy = 1 / 1.30 if wide or case.N < 1024 else 1 / 1.10
    small = case.M * case.N < 1 << 25
    bounds = () if copy is None or small or case.N > 262144 else (Bound(case.mode, "copy", copy),)
    return (*bounds, Bound(FORWARD, "QuACK", 0.98), Bound(case.mode, "LayerNorm", 1))


@dataclass(frozen=True)
class Held:
    """One bound beside what was measured."""

    what: str
    measured: float
    at_least: float

    @property
    def met(self) -> bool:
        return self.measured >= self.at_least


# --- what comes out ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One provider in one case. timing is None where there is none, and `reason` says why.

    differs: the share of outputs whose bits are not the Definition's; None for what is no such norm.
    saved: bytes kept for backward besides the weight; None in FORWARD.
    """

    timing: Timing | None
    reason: str = ""
    differs: float | None = None
    saved: int | None = None

    def to_json(self) -> dict[str, Any]:
        timing = self.timing.to_json() if self.timing else {"no_time": self.reason}
        return {**timing, "differs_from_definition": self.differs, "saved_bytes": self.saved}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Measured":
        timing, reason = None, stored.get("no_time", "")
        if "calls" in stored:
            seconds = (stored[f"{figure}_us"] / 1e6 for figure in ("min", "median", "low", "high"))
            timing = Timing(stored["calls"], *seconds)
        return cls(timing, reason, stored["differs_from_definition"], stored["saved_bytes"])


@dataclass(frozen=True)
class Row:
    """One case: red says what is wrong with our bits; empty is green."""

    case: Case
    red: str
    providers: dict[str, Measured]

    def time(self, name: str, cuda: bool) -> float | None:
        """The figure that counts: the minimum on a CPU, the median on a GPU."""
        timing = self.providers[name].timing if name in self.providers else None
        return None if timing is None else timing.median if cuda else timing.minimum

    def ratio(self, peer: str, cuda: bool) -> float | None:
        """The peer's time over ours."""
        theirs, ours = self.time(peer, cuda), self.time("ours", cuda)
        return None if theirs is None or ours is None else theirs / ours


_LINE_N = 4096
_LINE_ROWS = tuple((1 << power) // _LINE_N for power in range(24, 34))
_LINE_WITHIN = 0.05
_LINE_SECONDS, _LINE_FEWEST = 0.1, 5  # of each size: a few seconds in all


@dataclass(frozen=True)
class Line:
    """time = fixed + bytes / bandwidth, fitted to measured(M, bytes, seconds)."""

    measured: tuple[tuple[int, int, float], ...]

    @functools.cached_property
    def fit(self) -> tuple[float, float]:
        """(the fixed seconds, seconds a byte)."""
        return timing.fit_line([(moved, seconds) for _, moved, seconds in self.measured])

    @property
    def greatest(self) -> float:
        """The greatest deviation of a time from the line, as a share of the time."""
        return max(abs(self._deviation(moved, seconds)) for _, moved, seconds in self.measured)

    def _deviation(self, moved: int, seconds: float) -> float:
        fixed, per_byte = self.fit
        return (fixed + per_byte * moved) / seconds - 1

    def to_json(self) -> dict[str, Any]:
        fixed, per_byte = self.fit
        return {
            "fixed_us": fixed * 1e6,
            "gb_per_s": 1e-9 / per_byte,
            "greatest_deviation": self.greatest,
            "within_5_percent": self.greatest <= _LINE_WITHIN,
            "sizes": [
                {
                    "M": M,
                    "N": _LINE_N,
                    "bytes": moved,
                    "median_us": seconds * 1e6,
                    "line_us": (fixed + per_byte * moved) * 1e6,
                    "deviation": self._deviation(moved, seconds),
                }
                for M, moved, seconds in self.measured
            ],
        }

    def summary(self) -> str:
        fixed, per_byte = self.fit
        within = "within" if self.greatest <= _LINE_WITHIN else "not within"
        return (
            f"{display.duration(fixed, digits=3)} + bytes / ({display.speed(1 / per_byte)}), off by "
            f"{display.share(self.greatest, digits=2)} at most: {within} {display.share(_LINE_WITHIN)}"
        )

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Line":
        return cls(tuple((size["M"], size["bytes"], size["median_us"] / 1e6) for size in stored["sizes"]))


@dataclass(frozen=True)
class Result:
    """line: ours and a copy, forward in bf16, over the bytes moved; None where it is not measured."""

    facts: dict[str, Any]
    kernel: str
    quick: bool
    rows: tuple[Row, ...]
    first_call: dict[str, Any]
    host: dict[str, dict[str, float]]
    seconds: float
    line: dict[str, Line] | None = None

    @property
    def ok(self) -> bool:
        return not any(row.red for row in self.rows)

    @property
    def cuda(self) -> bool:
        return bool(self.facts["device"] == "cuda")

    def bounds(self) -> list[Held]:
        held = []
        for row in self.rows:
            case = row.case
            wanted: tuple[Bound, ...] = ()
            if self.cuda:
                wanted = _cuda_bounds(case)
            elif case.dtype != torch.float16:
                wanted = {_BIG: _CPU_BOUNDS, _ROW: (_CPU_ROW_BOUND,)}.get((case.M, case.N), ())
            for bound in wanted:
                ratio = row.ratio(bound.peer, self.cuda)
                if bound.mode == case.mode and ratio is not None:
                    held.append(Held(f"{case}: {bound.peer} / ours", ratio, bound.at_least))
            ours = row.time("ours", self.cuda)
            if not self.cuda and wanted == (_CPU_ROW_BOUND,) and case.mode == FORWARD and ours is not None:
                held.append(Held(f"{case}: {_CPU_ROW_SECONDS * 1e6:g} us / ours", _CPU_ROW_SECONDS / ours, 1))
            if case.mode == SLICE_FORWARD and ours is not None:
                alike = [r.time("ours", self.cuda) for r in self.rows if r.case == replace(case, mode=FORWARD)]
                held += [Held(f"{case}: without gaps / ours", t / ours, _SLICE_SHARE) for t in alike if t is not None]
        return held

    def to_json(self) -> dict[str, Any]:
        return {
            "verb": "bench",
            "ok": self.ok,
            "machine": self.facts,
            "kernel": self.kernel,
            "quick": self.quick,
            "seconds": round(self.seconds, 1),
            "figure": "median_us, L2 overwritten before every call" if self.cuda else "min_us",
            "first_call": self.first_call,
            "host_us_of_16_x_1280": self.host,
            "line": self.line and {name: line.to_json() for name, line in self.line.items()},
            "cases": [
                {
                    **row.case.to_json(),
                    "moved_bytes": moved_bytes(row.case),
                    "check": row.red or "green",
                    "copy_over_ours": row.ratio("copy", self.cuda),
                    "definition_over_ours": row.ratio("Definition", self.cuda),
                    "providers": {name: m.to_json() | self._speed(row, name) for name, m in row.providers.items()},
                }
                for row in self.rows
            ],
            "bounds": [
                {"what": h.what, "measured": h.measured, "at_least": h.at_least, "met": h.met} for h in self.bounds()
            ],
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Result":
        """What `to_json` was made of, times to the nanosecond. Raises KeyError for the JSON of anything else."""
        rows = tuple(
            Row(
                Case(case["M"], case["N"], getattr(torch, case["dtype"]), case["mode"]),
                "" if case["check"] == "green" else case["check"],
                {name: Measured.from_json(m) for name, m in case["providers"].items()},
            )
            for case in stored["cases"]
        )
        host = stored.get("host_us_of_16_x_1280", {})
        lines = stored.get("line")
        line = lines and {name: Line.from_json(content) for name, content in lines.items()}
        return cls(
            stored["machine"],
            stored["kernel"],
            stored["quick"],
            rows,
            stored["first_call"],
            host,
            stored["seconds"],
            line,
        )

    def table(self, verbose: bool = False) -> list[Block]:
        """What to print: whether our bits are right, and how fast we are; with `verbose` every time as well."""
        return [*_answer(self), _summary(self), *(_details(self) if verbose else _missed(self))]

    def _speed(self, row: Row, name: str) -> dict[str, float]:
        """What must be moved over the time, and the share of a copy's speed."""
        seconds, copy = row.time(name, self.cuda), row.time("copy", self.cuda)
        if seconds is None or copy is None:
            return {}
        return {"gb_per_s": moved_bytes(row.case) / seconds / 1e9, "share_of_copy": copy / seconds}


# --- printing ------------------------------------------------------------------------------------------------


def _answer(result: Result) -> list[Block]:
    """The bits, the speed, the bounds, the machine: a line each, and each case that is red."""
    red = [row for row in result.rows if row.red]
    bits = Text(f"PASSED: ours has the exact bits in all {len(result.rows)} cases", "good")
    if red:
        bits = Text(f"FAILED: our bits are wrong in {len(red)} of {len(result.rows)} cases, which have no time", "bad")
    lines: list[Block] = [bits, *(Text(f"  {row.case}: {row.red}", "bad") for row in red)]
    shares = [share for row in result.rows if (share := row.ratio("copy", result.cuda)) is not None]
    if shares:
        lines.append(f"ours runs at {_spread(shares, display.share)} of the speed of a copy of the same bytes")
    held = result.bounds()
    if held:
        missed = sum(not h.met for h in held)
        lines.append(f"aims: {len(held) - missed} of {len(held)} met" + (f", {missed} not met" if missed else ""))
    seconds = display.duration(result.seconds, digits=3)
    lines.append(f"{'quick' if result.quick else 'full'} run in {seconds}; ours: {result.kernel}")
    return [*lines, Text(machine.headline(result.facts), "note")]


def _spread(values: Sequence[float], form: Callable[..., str]) -> str:
    """The least and the greatest, `94.1 % to 99 %`."""
    least, greatest = (form(value, digits=3) for value in (min(values), max(values)))
    return least if least == greatest else f"{least} to {greatest}"


def _summary(result: Result) -> Table:
    """A row a mode and dtype: the medians, over its cases, of what the other one's time is over ours."""
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
    return Table("Medians over the cases; / ours: the time of the other over ours", columns, tuple(rows))


_MOST_MISSED = 8  # the furthest from their aims; --verbose prints all of them


def _missed(result: Result) -> list[Block]:
    missed = sorted((h for h in result.bounds() if not h.met), key=lambda h: h.measured / h.at_least)
    title = "Aims that are not met" + (f", the {_MOST_MISSED} furthest" if len(missed) > _MOST_MISSED else "")
    return [*_aims(title, missed[:_MOST_MISSED]), Text("\n--verbose prints each case and each aim.", "note")]


def _groups(result: Result) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in result.rows:
        groups.setdefault((row.case.mode, row.case.dtype_name), []).append(row)
    return groups


def _fastest(row: Row, cuda: bool) -> float | None:
    """The time of the fastest other norm over ours; None where there is none, or ours has no time."""
    ratios = [row.ratio(name, cuda) for name in row.providers if name not in ("ours", "copy")]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def _details(result: Result) -> list[Block]:
    """Every time, a table a mode and dtype; the host's part; the line; the bounds; the first call."""
    blocks: list[Block] = []
    for (mode, dtype), group in _groups(result).items():
        names = list(dict.fromkeys(name for row in group for name in row.providers))
        blocks.append(_times(result, f"{mode}, {dtype}", group, names))
        blocks += _differing(f"{mode}, {dtype}", group, names)
        blocks += _refused(group, names)
    blocks += _host_table(result) if result.host else []
    blocks += _line_table(result.line) if result.line else []
    blocks += _aims("Aims, which are said and not asserted", result.bounds())
    blocks += ["", _first_call_line(result.first_call)] if result.first_call else []
    return blocks


def _aims(title: str, held: list[Held]) -> list[Block]:
    columns = (Column("time of the other / ours", words=True), *map(Column, ("measured", "aim", "")))
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


def _times(result: Result, what: str, group: list[Row], names: list[str]) -> Table:
    headers = [*names, "copy / ours", "Definition / ours", "ours a second"]
    saved = any(m.saved is not None for row in group for m in row.providers.values())
    headers += ["saved: ours", "saved: Definition"] if saved else []
    rows = []
    for row in group:
        cells = [f"{row.case.M} × {row.case.N}"]
        cells += [display.duration(row.time(name, result.cuda)) for name in names]
        cells += [display.factor(row.ratio(peer, result.cuda), digits=3) for peer in ("copy", "Definition")]
        ours = row.time("ours", result.cuda)
        cells.append(display.speed(None if ours is None else moved_bytes(row.case) / ours))
        if saved:
            cells += [display.size(row.providers.get(name, Measured(None)).saved) for name in ("ours", "Definition")]
        rows.append(tuple(cells))
    figure = "median" if result.cuda else "minimum"
    return Table(f"{what}: {figure} time", (Column("rows × N", words=True), *map(Column, headers)), tuple(rows))


def _differing(what: str, group: list[Row], names: list[str]) -> list[Block]:
    """The shares of outputs that are not the Definition's bits, of those that are an RMSNorm."""
    known = [n for n in names if any(r.providers[n].differs is not None for r in group if n in r.providers)]
    rows = tuple(
        (
            f"{row.case.M} × {row.case.N}",
            *(display.share(row.providers.get(name, Measured(None)).differs, digits=2) for name in known),
        )
        for row in group
    )
    title = f"{what}: outputs that do not have the bits of the Definition, whose own sum is off where ours differs"
    return [Table(title, (Column("rows × N", words=True), *map(Column, known)), rows)] if known else []


def _refused(group: list[Row], names: list[str]) -> list[Block]:
    """Why somebody has no time, once for each reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row, name in itertools.product(group, names):
        measured = row.providers.get(name)
        if measured is not None and measured.timing is None and measured.reason:
            reasons.setdefault((name, measured.reason), []).append(f"{row.case.M} × {row.case.N}")
    return [f"{name} has no time at {', '.join(shapes)}: {reason}" for (name, reason), shapes in reasons.items()]


def _host_table(result: Result) -> list[Block]:
    kinds = list(next(iter(result.host.values())))
    rows = tuple(
        (name, *(display.duration(times[kind] / 1e6 if kind in times else None) for kind in kinds))
        for name, times in result.host.items()
    )
    title = "What a call on 16 × 1280 keeps the host busy for, bfloat16: median, the GPU not waited for"
    return [Table(title, (Column("", words=True), *map(Column, kinds)), rows)]


def _line_table(lines: dict[str, Line]) -> list[Block]:
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
    table = Table(f"Forward of rows × {_LINE_N}, bfloat16: median time", tuple(map(Column, headers)), tuple(rows))
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


# --- measuring -----------------------------------------------------------------------------------------------


def main(
    device: str | None,
    quick: bool,
    out: Path | None,
    progress: Progress,
    *,
    drawing: Path | None = None,
    stored: Path | None = None,
    dtypes: Sequence[str] = (),
    modes: Sequence[str] = (),
    names: Sequence[str] = (),
) -> Result:
    """Measure every provider in every case of the device (the GPU if there is one, by default).

    quick: fewer cases, and of slow providers as many calls as fit into a short time. out: a folder into which
    bench-<device>.json is written. drawing: a .svg or .png of the shares of a copy. stored: the JSON of a run,
    taken instead of measuring. dtypes, modes: only the cases with one of these. names: only the providers of these
    names, ours and a copy. What is not a case (the first call, the host's time, the line) is measured where forward in
    bf16 is. Raises CommandError, before anything is measured, for what cannot be had: a device that is not there, a
    folder that cannot be written to, a dtype, mode or provider that is not measured, a drawing of too few cases.
    """
    if drawing is not None:
        plot.check(drawing)
    if stored is not None:
        if device or quick or out or dtypes or modes or names:
            raise CommandError(
                "--from measures nothing: leave out --device, --quick, --out, --dtype, --mode and --provider"
            )
        result = _load(stored)
    else:
        result = _measure_all(device, quick, out, progress, drawing, dtypes, modes, names)
    if drawing is not None:
        plot.draw(result.to_json(), drawing)
    return result


def _load(path: Path) -> Result:
    try:
        return Result.from_json(json.loads(path.read_text()))
    except OSError as error:
        raise CommandError(f"--from {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CommandError(f"--from {path}: give the JSON of a run of rmsnorm bench") from None


def _only(todo: list[Case], field: str, values: Sequence[str]) -> list[Case]:
    """The cases whose dtype or mode, as it is in the JSON, is one of the values; all of them if there are none."""
    known = list(dict.fromkeys(case.to_json()[field] for case in todo))
    for value in values:
        if value not in known:
            raise CommandError(
                f"--{field} {value!r} is not measured in this run: give one of {', '.join(map(repr, known))}"
            )
    return [case for case in todo if not values or case.to_json()[field] in values]


def _measure_all(
    device: str | None,
    quick: bool,
    out: Path | None,
    progress: Progress,
    drawing: Path | None,
    dtypes: Sequence[str],
    modes: Sequence[str],
    names: Sequence[str],
) -> Result:
    where = machine.find_device(device)
    file = None if out is None else out / f"bench-{where.type}.json"
    if file is not None:
        results.check_file(file, "--out")
    todo = list(cases(where.type, quick))
    todo = _only(_only(todo, "dtype", dtypes), "mode", modes)
    measured = peers.providers(where.type, names)
    if drawing is not None:
        plot.panels(case.to_json() for case in todo)
    start = time.perf_counter()
    facts = machine.describe(where)
    besides = any((case.mode, case.dtype) == (FORWARD, torch.bfloat16) for case in todo)
    cuda = besides and where.type == "cuda"
    wait_for_host()
    if where.type == "cuda":
        progress(0, 1 + len(todo), "compiling in processes side by side")
        processes.side_by_side(_compile_once, todo, where, names)
    progress(0, 1 + len(todo), "the first call, in new processes")
    first_call = _first_call(where) if besides else {}
    host = _host(where, measured) if cuda else {}
    line = _line(where, _fitting(where)) if cuda and not quick else None
    x = torch.ones(2, 1280, dtype=torch.bfloat16, device=where)
    result = Result(facts, rmsnorm.explain(x, x[0]), quick, (), first_call, host, 0.0, line)
    for number, case in enumerate(todo, 1):
        progress(number, 1 + len(todo), str(case))
        row = _measure(case, where, measured, quick)
        result = replace(result, rows=(*result.rows, row), seconds=time.perf_counter() - start)
        if file is not None:  # after each case, so that what ends the run early takes nothing away
            results.write_json(file, result.to_json())
    return result


def _compile_once(case: Case, device: torch.device, names: Sequence[str]) -> None:
    """One call of each provider, for the kernels that it leaves on disk."""
    inputs, cotangents = _drawn(case, device)
    for provider in peers.providers(device.type, names):
        if provider.norm is not None:
            with contextlib.suppress(Exception):
                _call(_runner(provider, case), case, inputs, cotangents)()
    del inputs, cotangents
    torch.cuda.empty_cache()  # the other processes need it


def _drawn(case: Case, device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The inputs, (x, w) or (x, residual, w), and the cotangents of the outputs; random, and the same every time."""
    generator = torch.Generator(device).manual_seed(case.M * 7919 + case.N)
    x, dy, *others = (
        torch.randn(case.M, case.N, generator=generator, device=device).to(case.dtype)
        for _ in range(4 if case.adds else 2)
    )
    if case.mode == SLICE_FORWARD:
        x = torch.nn.functional.pad(x, (0, _BETWEEN))[:, : case.N]
    w = (torch.rand(case.N, generator=generator, device=device) + 0.5).to(case.dtype)
    inputs = (x, *others[:1], w)
    if case.mode not in _FORWARDS:
        for t in inputs:
            t.requires_grad_()
    return inputs, (dy, *others[1:])


def _measure(case: Case, device: torch.device, measured: Sequence[Provider], quick: bool) -> Row:
    inputs, cotangents = _drawn(case, device)
    with torch.no_grad():
        x, *residual, w = inputs
        expected = definition(x + residual[0] if residual else x, w)

    calls: dict[str, Callable[[], object]] = {}
    found: dict[str, Measured] = {}
    red = ""
    for provider in measured:
        name = provider.name
        if provider.norm is None:
            calls[name], found[name] = _copy(case, device), Measured(None)
            continue
        try:
            run = _runner(provider, case)
            if name == "ours":
                red = _wrong(run, inputs, cotangents)
            y, *_ = run(*inputs)
            differs = bits.differing(y, expected)[0] / y.numel() if provider.equal else None
            saved = _saved(run, inputs) if case.mode == TRAINING else None
            call = _call(run, case, inputs, cotangents)
            call()
        except Exception as error:  # noqa: BLE001  # a peer that cannot run here is a line in the table
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            found[name] = Measured(None, reason)
            red = reason if name == "ours" else red
            continue
        found[name] = Measured(None, red if name == "ours" else "", differs, saved)
        if not (name == "ours" and red):
            calls[name] = call
        del y
    del expected

    timings = timing.interleave(
        calls,
        device,
        samples=_SAMPLES[device.type == "cuda"],
        fewest=_QUICK_FEWEST,
        seconds=_QUICK_SECONDS if quick else None,
    )
    return Row(case, red, {name: replace(m, timing=timings.get(name)) for name, m in found.items()})


def _runner(provider: Provider, case: Case) -> Run:
    """What computes the outputs of the case, (y,) or (y, s), from (x, w) or (x, residual, w)."""
    norm, add = provider.norm, provider.add
    assert norm is not None

    def plain(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return (norm(x, w),)

    def added(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        if add is not None:
            return add(x, residual, w)
        s = x + residual
        return norm(s, w), s

    run: Run = added if case.adds else plain
    return _compile(run) if provider.compiled else run


def _compile(run: Run) -> Run:
    torch._dynamo.reset()  # each case compiles anew, for its own shape, as a model of fixed shapes would
    from torch._functorch import config

    config.donated_buffer = False  # the backward pass alone is measured on a graph that is kept
    return torch.compile(run, fullgraph=True, dynamic=False)


def _saved(run: Run, inputs: tuple[Tensor, ...]) -> int:
    with memory.saved_for_backward([inputs[-1]]) as saved:
        outputs = run(*inputs)  # held until it is counted
        count = saved()
    del outputs
    return count


def _call(run: Run, case: Case, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> Callable[[], object]:
    if case.mode in _FORWARDS:
        return lambda: run(*inputs)
    if case.mode == TRAINING:
        return lambda: torch.autograd.grad(run(*inputs), inputs, cotangents)
    outputs = run(*inputs)
    return lambda: torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)


def _copy(case: Case, device: torch.device) -> Callable[[], object]:
    """y.copy_(x) of as many elements as the norm has to move."""
    source = torch.ones(case.M * case.N * case.tensors // 2, dtype=case.dtype, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _wrong(run: Run, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> str:
    """What differs in bits from the reference on these very inputs; empty if nothing does."""
    x, *residual, w = (t.detach() for t in inputs)
    y, s, rstd = reference.forward(x, residual[0] if residual else None, w, EPS, "early", 0.0, with_rstd=True)
    outputs = run(*inputs)
    pairs = {"y": (outputs[0], y)}
    if s is not None:
        pairs["s"] = (outputs[1], s)
    if any(t.requires_grad for t in inputs):
        assert rstd is not None
        dx = torch.autograd.grad(outputs, inputs[0], cotangents)[0]
        dy, ds = (*cotangents, None)[:2]
        assert dy is not None
        wanted = reference.backward(dy, ds, x if s is None else s, w, rstd, "early", 0.0, True, False)[0]
        assert wanted is not None
        pairs["dx"] = (dx, wanted)
    wrong = {name: bits.differing(*pair)[0] for name, pair in pairs.items()}
    return ", ".join(f"{count} of {y.numel()} {name} differ" for name, count in wrong.items() if count)


# --- the host's part -----------------------------------------------------------------------------------------

_HOST_CALLS, _HOST_ROUNDS = 50, 21


def _host(device: torch.device, measured: Sequence[Provider]) -> dict[str, dict[str, float]]:
    """Microseconds that a call keeps the host busy, by provider: the median of rounds of calls that a GPU follows."""
    x, dy = (torch.randn(16, 1280, device=device).bfloat16() for _ in range(2))
    w = torch.randn(1280, device=device).bfloat16()
    xg, wg = x.clone().requires_grad_(), w.clone().requires_grad_()
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for provider in measured:
        if provider.norm is None:
            continue
        with contextlib.suppress(Exception):  # the tables say why a provider cannot run
            run = _runner(provider, Case(16, 1280, x.dtype, FORWARD))
            run(x, w)
            calls[provider.name, _NO_GRAD] = functools.partial(run, x, w)
            for _ in range(2):  # the second is as all that follow
                y = run(xg, wg)
                torch.autograd.grad(y, (xg, wg), (dy,), retain_graph=True)
            calls[provider.name, FORWARD] = functools.partial(run, xg, wg)
            calls[provider.name, BACKWARD] = functools.partial(
                torch.autograd.grad, y, (xg, wg), (dy,), retain_graph=True
            )
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(_HOST_ROUNDS):
        for (name, kind), call in calls.items():
            with torch.set_grad_enabled(kind != _NO_GRAD):
                torch.cuda.synchronize(device)
                start = time.perf_counter()
                for _ in range(_HOST_CALLS):
                    call()
                taken[name, kind].append((time.perf_counter() - start) / _HOST_CALLS)
    torch.cuda.synchronize(device)
    found: dict[str, dict[str, float]] = {}
    for (name, kind), seconds in taken.items():
        found.setdefault(name, {})[kind] = statistics.median(seconds) * 1e6
    return found


# --- time = fixed + bytes / bandwidth ------------------------------------------------------------------------


def _fitting(device: torch.device) -> tuple[int, ...]:
    """The rows for which x, its result and its copy take at most 80 % of the GPU's free memory."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return tuple(M for M in _LINE_ROWS if 3 * M * _LINE_N * torch.bfloat16.itemsize <= 0.8 * free)


def _line(device: torch.device, rows: tuple[int, ...]) -> dict[str, Line] | None:
    """Ours and a copy, interleaved over all the sizes; None for fewer than three, which no line can miss by much."""
    if len(rows) < 3:
        return None
    x = torch.empty(max(rows), _LINE_N, dtype=torch.bfloat16, device=device).normal_()
    target, w = torch.empty_like(x), torch.ones(_LINE_N, dtype=x.dtype, device=device)
    norm = peers.PROVIDERS[0].norm
    assert norm is not None
    calls: dict[str, Callable[[], object]] = {}
    for M in sorted(rows, reverse=True):  # the largest result first, of whose memory the others then are
        calls[f"ours {M}"] = functools.partial(norm, x[:M], w)
        calls[f"copy {M}"] = functools.partial(target[:M].copy_, x[:M])
    timings = timing.interleave(calls, device, samples=_SAMPLES[1], fewest=_LINE_FEWEST, seconds=_LINE_SECONDS)
    moved = {M: moved_bytes(Case(M, _LINE_N, x.dtype, FORWARD)) for M in rows}
    return {name: Line(tuple((M, moved[M], timings[f"{name} {M}"].median) for M in rows)) for name in ("ours", "copy")}


# --- the first call ------------------------------------------------------------------------------------------

_FIRST_CALL = """
import json, sys, time, torch, rmsnorm
device = sys.argv[1]
x = torch.ones(64, 1280, dtype=torch.bfloat16, device=device, requires_grad=True)
w = torch.ones(1280, dtype=torch.bfloat16, device=device, requires_grad=True)
wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
wait(); t0 = time.perf_counter()
y = rmsnorm.rms_norm(x, w)
wait(); t1 = time.perf_counter()
torch.autograd.grad(y, (x, w), torch.ones_like(y))
wait(); t2 = time.perf_counter()
print(json.dumps({"forward_s": round(t1 - t0, 3), "backward_s": round(t2 - t1, 3)}))
"""


def _first_call(device: torch.device) -> dict[str, Any]:
    """Seconds of the first forward and backward of a process, with an empty and with a filled cache."""
    found: dict[str, Any] = {}
    package = str(Path(rmsnorm.__file__).resolve().parent.parent)
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        caches = {"NUMBA_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder, "PYTHONPATH": paths}
        for state in ("empty_cache", "filled_cache"):
            try:
                run = subprocess.run(
                    [sys.executable, "-c", _FIRST_CALL, str(device)],
                    env=os.environ | caches, capture_output=True, text=True, timeout=300, check=True,
                )  # fmt: skip
                found[state] = json.loads(run.stdout.splitlines()[-1])
            except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
                return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]}
    return found
