"""verify on several ranks. That it fails on wrong code is tested in test_distributed.py."""

import json
import multiprocessing
import os
import signal

import pytest
import torch

from rmsnorm.errors import CommandError
from rmsnorm.tools import machine
from rmsnorm.tools.display import render
from rmsnorm.tools.verify import printing, ranks
from rmsnorm.tools.verify.cases import FLOATS, SPECS, SweepRow, VerifyCase, sweep
from rmsnorm.tools.verify.judge import judge_all
from rmsnorm.tools.verify.result import VerifyResult


def test_the_code_passes_on_two_ranks() -> None:
    sweep_rows = sorted(sweep(quick=True), key=lambda row: sum(case.outputs for case in row.cases))[:8]
    sweep_rows = ranks.assign_shardings(sweep_rows, 2)
    assert {case.sharding for row in sweep_rows for case in row.cases} == {"rows", "columns"}
    steps: list[tuple[int, int, str]] = []
    tallies = ranks.tallies_of_ranks(sweep_rows, 2, "cpu", lambda *step: steps.append(step))
    results = judge_all(sweep_rows, tallies)
    assert all(row.ok for row in results), [(row.name, row.faults) for row in results if not row.ok]
    for row, tally in zip(sweep_rows, tallies, strict=True):  # each case is counted by exactly one rank
        assert (tally.outputs, tally.rows) == (sum(c.outputs for c in row.cases), sum(c.M for c in row.cases))
    total = sum(tally.outputs for tally in tallies)
    assert steps[-1] == (total, total, "done")
    result = VerifyResult("cpu", "kernel", True, 1.0, machine.describe(), results, 2)
    assert json.loads(json.dumps(result.to_json()))["world"] == 2
    assert "(quick sweep, 2 ranks)" in render(printing.blocks(result))


def test_a_failing_rank_raises_its_message() -> None:
    case = VerifyCase(torch.float32, torch.float32, "early", 0.0, 8, 64, eps=-1.0, sharding="columns")
    with pytest.raises(CommandError, match=r"rank 0 of 1 failed: ValueError: \[rms_norm\] eps is -1\.0"):
        ranks.tallies_of_ranks([SweepRow("form", "wrong", (case,))], 1, "cpu", lambda *step: None)


def test_a_rank_that_is_killed_ends_verify_with_an_error() -> None:
    """In the middle of a sweep, when the other rank waits for it in a collective."""
    done: list[int] = []

    def kill_rank_1(outputs: int, *_: object) -> None:
        done.append(outputs)
        if len(done) == 3:
            (killed,) = (child for child in multiprocessing.active_children() if child.name == "rank 1")
            os.kill(killed.pid, signal.SIGKILL)

    with pytest.raises(CommandError, match="rank 1 of 2 was killed by SIGKILL"):
        ranks.verify_on_ranks(2, "cpu", quick=True, progress=kill_rank_1)
    assert done[2] > 0
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_every_sharding_occurs_with_every_spec(world) -> None:
    """Also in rows of the sweep with one case of each spec."""
    sweep_rows = [row for row in ranks.assign_shardings(sweep(quick=True), world) if len(row.cases) == 3]
    met = {(c.sharding, c.cast, c.offset, c.x) for row in sweep_rows if row.section == "form" for c in row.cases}
    layouts = ["rows", "columns", *(["rows and columns"] if world in (4, 8) else [])]
    assert met == {(layout, *spec, x) for layout in layouts for spec in SPECS for x in FLOATS}


def test_zero_ranks_raise_a_command_error() -> None:
    with pytest.raises(CommandError, match="--world is 0, expected at least 1"):
        ranks.verify_on_ranks(0, "cpu")


def test_more_ranks_than_fit_into_memory_raise_a_command_error_before_any_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(*_: object) -> None:
        raise AssertionError("the ranks were started")

    monkeypatch.setattr(ranks.processes, "run_ranks", start)
    with pytest.raises(CommandError, match=r"--world is 1000000000, .* memory are enough for [\d,]+: give at most"):
        ranks.verify_on_ranks(10**9, "cpu")
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1 << 29)
    with pytest.raises(CommandError, match=r"--world is 3, .* give at most 2"):
        ranks.verify_on_ranks(3, "cpu")
    with pytest.raises(AssertionError, match="the ranks were started"):
        ranks.verify_on_ranks(2, "cpu")
