"""Runs `rmsnorm bench`.

cases -> first call, host times and line -> measure each case -> BenchResult, written after each case
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import rmsnorm
from rmsnorm.errors import CommandError
from rmsnorm.functional import wait_for_host
from rmsnorm.tools import display, machine, processes, results
from rmsnorm.tools.bench import line, overheads, peers, plot, printing
from rmsnorm.tools.bench.cases import FORWARD, BenchCase, cases
from rmsnorm.tools.bench.measure import compile_once, measure
from rmsnorm.tools.bench.result import BenchResult
from rmsnorm.tools.timing import Progress


def bench(
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
) -> BenchResult:
    """Measure every provider in every case of a device.

    The first call, the host's time and the line are measured if the cases include forward in bf16.

    Args:
        device: "cpu" or "cuda"; by default the GPU if there is one.
        quick: Whether to measure fewer cases, and slow providers with fewer samples.
        out: A folder; bench-<device>.json is written there.
        progress: Called before each case with the number of cases that are done.
        drawing: A .svg or .png file; the speeds relative to a copy are drawn into it.
        stored: The JSON of a run, which is read instead of measuring.
        dtypes: Names of dtypes; with any, only these are measured.
        modes: Slugs of modes; with any, only these are measured.
        names: Names of providers; with any, only these, ours and the copy are measured.

    Returns:
        What was measured.

    Raises:
        CommandError: Before anything is measured, if the device cannot be used, a file cannot be written or read, a
            dtype, mode or provider is not measured, or there are too few cases to draw.
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


def _load(path: Path) -> BenchResult:
    def checked(content: Any) -> BenchResult:
        result = BenchResult.from_json(content)
        json.dumps(result.to_json(), allow_nan=False)
        display.render(printing.blocks(result, verbose=True))
        return result

    return results.read_stored(path, checked, "the JSON of a run of rmsnorm bench")


def _only(selected: list[BenchCase], field: str, values: Sequence[str]) -> list[BenchCase]:
    """Return the cases whose "dtype" or "mode" in JSON is one of the values; without values, all cases."""
    known = list(dict.fromkeys(case.to_json()[field] for case in selected))
    for value in values:
        if value not in known:
            raise CommandError(
                f"--{field} {value!r} is not measured in this run: give one of {', '.join(map(repr, known))}"
            )
    return [case for case in selected if not values or case.to_json()[field] in values]


def _measure_all(
    device: str | None,
    quick: bool,
    out: Path | None,
    progress: Progress,
    drawing: Path | None,
    dtypes: Sequence[str],
    modes: Sequence[str],
    names: Sequence[str],
) -> BenchResult:
    where = machine.find_device(device)
    file = None if out is None else out / results.bench_file(where.type)
    if file is not None:
        results.check_file(file, "--out")
    selected = list(cases(where.type, quick))
    selected = _only(_only(selected, "dtype", dtypes), "mode", modes)
    measured = peers.providers(where.type, names)
    if drawing is not None:
        plot.panels(case.to_json() for case in selected)
    start = time.perf_counter()
    facts = machine.describe(where)
    facts["versions"] |= peers.versions(measured)
    overall = any((case.mode, case.dtype) == (FORWARD, torch.bfloat16) for case in selected)
    cuda = overall and where.type == "cuda"
    wait_for_host()
    if where.type == "cuda":
        progress(0, 1 + len(selected), "compiling kernels in several processes")
        processes.run_in_workers(compile_once, selected, where, names)
    progress(0, 1 + len(selected), "measuring the first call, in new processes")
    first_call = overheads.first_call(where) if overall else {}
    host = overheads.host_times(where, measured) if cuda else {}
    lines = line.measure_lines(where, line.fitting_rows(where)) if cuda and not quick else None
    x = torch.ones(2, 1280, dtype=torch.bfloat16, device=where)
    result = BenchResult(facts, rmsnorm.explain(x, x[0]), quick, (), first_call, host, 0.0, lines)
    for number, case in enumerate(selected, 1):
        progress(number, 1 + len(selected), str(case))
        row = measure(case, where, measured, quick)
        result = replace(result, rows=(*result.rows, row), seconds=time.perf_counter() - start)
        if file is not None:  # after each case, so that nothing is lost if the run is interrupted
            results.write_json(file, result.to_json())
    return result
