"""verify on several ranks. That it fails on wrong code is tested in test_distributed.py."""

import json
import os
import signal
import threading
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException

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


def test_ctrl_c_raises_keyboard_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: object) -> Any:
        def interrupted(*_: object) -> None:
            raise SignalException("got signal 2", sigval=signal.SIGINT)

        return interrupted

    monkeypatch.setattr(ranks, "elastic_launch", launch)
    with pytest.raises(KeyboardInterrupt):
        ranks.tallies_of_ranks([], 1, "cpu", lambda *step: None)


def _killed_while_reporting_progress(sweep_rows: Any, device: str, steps: Any) -> None:
    steps._wlock.acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_rank_raises_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_rank", _killed_while_reporting_progress)
    raised: list[CommandError] = []

    def run() -> None:
        try:
            ranks.tallies_of_ranks([], 1, "cpu", lambda *step: None)
        except CommandError as error:
            raised.append(error)

    running = threading.Thread(target=run, daemon=True)  # a thread, so that a hang is a failure
    running.start()
    running.join(25)
    assert not running.is_alive(), "it hangs"
    assert "rank 0 of 1 failed: Signal 9" in str(raised[0])


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
