"""verify over ranks that it starts itself; test_distributed.py holds that it is red on code that is wrong."""

import json
import os
import signal
import threading
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException

from rmsnorm.errors import CommandError
from rmsnorm.tools import machine, verify, world
from rmsnorm.tools.display import render


def test_the_code_is_green_on_two_ranks() -> None:
    plans = sorted(verify.sweep(quick=True), key=lambda plan: sum(case.outputs for case in plan.cases))[:8]
    plans = world.sharded(plans, 2)
    assert {case.sharding for plan in plans for case in plan.cases} == {"rows", "columns"}
    steps: list[tuple[int, int, str]] = []
    tallies = world.tallies_of_ranks(plans, 2, "cpu", lambda *step: steps.append(step))
    rows = verify.judge_rows(plans, tallies)
    assert all(row.ok for row in rows), [(row.name, row.faults) for row in rows if not row.ok]
    for plan, tally in zip(plans, tallies, strict=True):  # each case counted by one rank, and by no other
        assert (tally.outputs, tally.rows) == (sum(c.outputs for c in plan.cases), sum(c.M for c in plan.cases))
    total = sum(tally.outputs for tally in tallies)
    assert steps[-1] == (total, total, "done")
    result = verify.Result("cpu", "kernel", True, 1.0, machine.describe(), rows, 2)
    assert json.loads(json.dumps(result.to_json()))["world"] == 2
    assert "(quick sweep, 2 ranks)" in render(result.table())


def test_a_rank_that_fails_ends_it_with_its_message() -> None:
    case = verify.Case(torch.float32, torch.float32, "early", 0.0, 8, 64, eps=-1.0, sharding="columns")
    with pytest.raises(CommandError, match=r"rank \d of 2 failed: ValueError: \[rms_norm\] eps is -1\.0"):
        world.tallies_of_ranks([verify.Plan("form", "wrong", (case,))], 2, "cpu", lambda *step: None)


def test_ctrl_c_is_the_caller_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: object) -> Any:
        def interrupted(*_: object) -> None:
            raise SignalException("got signal 2", sigval=signal.SIGINT)

        return interrupted

    monkeypatch.setattr(world, "elastic_launch", launch)
    with pytest.raises(KeyboardInterrupt):
        world.tallies_of_ranks([], 1, "cpu", lambda *step: None)


def _killed_while_it_says_how_far_it_is(plans: Any, device: str, steps: Any) -> None:
    steps._wlock.acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_is_killed_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_rank", _killed_while_it_says_how_far_it_is)
    raised: list[CommandError] = []

    def run() -> None:
        try:
            world.tallies_of_ranks([], 1, "cpu", lambda *step: None)
        except CommandError as error:
            raised.append(error)

    running = threading.Thread(target=run, daemon=True)  # so that one that hangs is a failure
    running.start()
    running.join(25)
    assert not running.is_alive(), "it waits for ever"
    assert "rank 0 of 1 failed: Signal 9" in str(raised[0])


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_every_way_to_shard_meets_every_spec(ranks) -> None:
    """Also where a row of the table has one case of each spec."""
    plans = [plan for plan in world.sharded(verify.sweep(quick=True), ranks) if len(plan.cases) == 3]
    met = {(c.sharding, c.cast, c.offset, c.x) for plan in plans if plan.section == "form" for c in plan.cases}
    layouts = ["rows", "columns", *(["rows and columns"] if ranks in (4, 8) else [])]
    assert met == {(layout, *spec, x) for layout in layouts for spec in verify._SPECS for x in verify._FLOATS}


def test_a_number_of_ranks_that_makes_no_sense() -> None:
    with pytest.raises(CommandError, match="--world 0: give a number of ranks of at least 1"):
        world.verify_on_ranks(0, "cpu")
