"""Worker processes."""

import json
import signal
from pathlib import Path

import torch

from rmsnorm.tools import processes


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
