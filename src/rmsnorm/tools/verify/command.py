"""Runs `rmsnorm verify` in one process.

sweep(quick) -> rows of cases -> count each case -> judge_all -> VerifyResult
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence

import torch

from rmsnorm.functional import explain, wait_for_host
from rmsnorm.tools import machine, processes
from rmsnorm.tools.timing import Progress, no_progress
from rmsnorm.tools.verify.cases import SweepRow, VerifyCase, select_rows, sweep
from rmsnorm.tools.verify.compare import compare, run_unsharded
from rmsnorm.tools.verify.inputs import draw, place
from rmsnorm.tools.verify.judge import RowResult, judge_all
from rmsnorm.tools.verify.result import VerifyResult
from rmsnorm.tools.verify.tally import Tally

_FEW_ROWS = 16  # enough to compile a kernel: hardly any kernel depends on the number of rows


def verify(
    device: str | None = None, quick: bool = False, progress: Progress = no_progress, *, only: Sequence[str] = ()
) -> VerifyResult:
    """Check the contract on a device.

    It has no side effect except that it sets torch's thread count for moments.

    Args:
        device: "cpu" or "cuda"; by default the GPU if there is one.
        quick: Whether to compute a sixth of the more than 10⁸ outputs of the full sweep.
        progress: Called with the number of outputs that are done, that of all outputs, and the name of the next row.
        only: Texts; only rows with one of them in their names run, on the same numbers as in the whole sweep.

    Returns:
        What was found.

    Raises:
        CommandError: If the device cannot be used, or a text is in no row's name.
    """
    where = machine.find_device(device)
    start = time.perf_counter()
    rows = select_rows(sweep(quick), only)
    wait_for_host()
    if where.type == "cuda":
        compile_ahead(rows, where, progress)
    results = verify_rows(rows, where, progress)
    return finish(str(where), where, quick, start, results, 1, only)


def finish(
    name: str, device: torch.device, quick: bool, start: float, rows: tuple[RowResult, ...], world: int,
    only: Sequence[str],
) -> VerifyResult:  # fmt: skip
    """Return the result of a sweep that began at `start`, with the kernel and the facts of the machine."""
    x = torch.ones(1, 1280, dtype=torch.bfloat16, device=device)
    kernel, facts = explain(x, x[0]), machine.describe(device)
    return VerifyResult(name, kernel, quick, time.perf_counter() - start, facts, rows, world, tuple(only))


def verify_rows(rows: list[SweepRow], device: torch.device, progress: Progress = no_progress) -> tuple[RowResult, ...]:
    """Run rows in this process, and judge them."""
    return judge_all(rows, count_cases(rows, lambda case, seed: compare(case, seed, device), progress))


def count_cases(rows: list[SweepRow], count: Callable[[VerifyCase, int], Tally], progress: Progress) -> list[Tally]:
    """Count every case of every row.

    Args:
        rows: The rows.
        count: Returns the tally of a case with a seed.
        progress: Called before each case with the number of outputs that are done.

    Returns:
        A tally for each row.
    """
    total, done, tallies = sum(case.outputs for row in rows for case in row.cases), 0, []
    for row in rows:
        tally = Tally()
        for j, case in enumerate(row.cases):
            progress(done, total, row.name)
            tally += count(case, row.seed + j)
            done += case.outputs
        tallies.append(tally)
    progress(done, total, "done")
    return tallies


def compile_ahead(rows: list[SweepRow], device: torch.device, progress: Progress) -> None:
    """Compile the kernels of all cases into the cache on disk, in several processes; in one it takes minutes.

    Each case runs once, on few rows. Nothing is compared. An error is ignored here, since the case fails again when it
    is counted.
    """
    progress(0, 1, "compiling kernels in several processes")
    processes.run_in_workers(_run_once, groups_by_kernel(rows), device)


def groups_by_kernel(rows: list[SweepRow]) -> list[set[VerifyCase]]:
    """Return every case once, with few rows, in sets that share most kernels, so that few are compiled twice."""
    groups: dict[VerifyCase, set[VerifyCase]] = {}
    for case in (case for row in rows for case in row.cases):
        few = dataclasses.replace(case, M=min(case.M, _FEW_ROWS * case.heads), eps=1.0)
        of_kernel = dataclasses.replace(few, M=0, offset=0.0, N=case.N.bit_length())
        if case.gate is not None:  # few cases share a kernel, but more groups than workers are of no use
            of_kernel = VerifyCase(case.x, None, "early", 0.0, 0, 0, gate=case.gate)
        groups.setdefault(of_kernel, set()).add(few)
    return list(groups.values())


def _run_once(cases: set[VerifyCase], device: torch.device) -> None:
    for case in cases:
        with contextlib.suppress(Exception):
            run_unsharded(place(draw(case, 0), case, device), case)
