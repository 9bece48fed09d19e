"""Worker processes, and ranks that end together."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rmsnorm.errors import CommandError
from rmsnorm.tools import processes
from rmsnorm.tools.processes import Rank


def describe_worker(folder: Path, name: str) -> None:
    folder.mkdir()
    facts = {"threads": torch.get_num_threads(), "on_ctrl_c": int(signal.getsignal(signal.SIGINT))}
    (folder / name).write_text(json.dumps(facts))


def test_workers_run_every_task_and_ignore_failures(tmp_path: Path) -> None:
    """They have one thread, and Ctrl-C ends them without a traceback."""
    folders = [tmp_path / name for name in ("a", "exists", "b", "c")]
    folders[1].mkdir()  # so that the task fails
    processes.run_in_workers(describe_worker, folders, "facts.json")
    assert sorted(tmp_path.iterdir()) == sorted(folders)
    for folder in folders:
        if folder.name == "exists":
            assert not list(folder.iterdir())
        else:
            facts = json.loads((folder / "facts.json").read_text())
            assert facts == {"threads": 1, "on_ctrl_c": int(signal.SIG_DFL)}


# --- ranks ---------------------------------------------------------------------------------------------------


def sum_of_ranks(rank: Rank, addend: int) -> tuple[int, int, str]:
    print("NCCL logs to stdout")
    total = torch.tensor(rank.index + addend)
    dist.all_reduce(total)
    rank.report(rank.index, "reported")
    return rank.index, int(total), rank.device.type


def test_ranks_form_a_group_report_and_return_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    reports: list[tuple[Any, ...]] = []
    found = processes.run_ranks(sum_of_ranks, (10,), 2, "cpu", lambda *report: reports.append(report))
    assert found == [(0, 21, "cpu"), (1, 21, "cpu")]
    assert sorted(reports) == [(0, "reported"), (1, "reported")]
    assert capfd.readouterr().out == ""


def fail_on_one_rank(rank: Rank, how: str) -> None:
    dist.barrier()
    if rank.index == 0 and how == "raise":
        dist.barrier()  # fails soon after the other rank, which has to be named
    elif rank.index == 0:
        time.sleep(600)
    elif how == "raise":
        raise ValueError("a fault\nof two lines")
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        os._exit(3)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"^rank 1 of 2 failed: ValueError: a fault of two lines$"),
        ("kill", r"^rank 1 of 2 was killed by SIGKILL; the system may be out of memory$"),
        ("exit", r"^rank 1 of 2 ended without a result, with the exit code 3$"),
    ],
)
def test_a_rank_that_fails_is_named_and_ends_the_others(how: str, message: str) -> None:
    raised: list[CommandError] = []

    def run() -> None:
        try:
            processes.run_ranks(fail_on_one_rank, (how,), 2, "cpu")
        except CommandError as error:
            raised.append(error)

    running = threading.Thread(target=run, daemon=True)  # a thread, so that a hang is a failure
    running.start()
    running.join(60)
    assert not running.is_alive(), "it hangs"
    assert multiprocessing.active_children() == []
    with pytest.raises(CommandError, match=message):
        raise raised[0]


def report_and_wait(rank: Rank) -> None:
    rank.report()
    time.sleep(60)


def test_ctrl_c_ends_the_ranks() -> None:
    """Also if only the parent is interrupted."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background ignores
    try:
        with pytest.raises(KeyboardInterrupt):
            processes.run_ranks(report_and_wait, (), 2, "cpu", lambda: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert multiprocessing.active_children() == []


_KILLS_ITSELF = """
import os, signal
from rmsnorm.tools import processes
from test_workers import report_and_wait

if __name__ == "__main__":
    processes.run_ranks(report_and_wait, (), 1, "cpu", lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_killed_parent_leaves_no_ranks(tmp_path: Path) -> None:
    script = tmp_path / "kills_itself.py"
    script.write_text(_KILLS_ITSELF)
    parent = subprocess.Popen(
        [sys.executable, script], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stderr=subprocess.PIPE
    )
    try:
        _, said = parent.communicate(timeout=45)  # stderr ends when the last process that holds it has ended
    finally:
        parent.kill()
    assert parent.returncode == -signal.SIGKILL, said.decode()
