"""benchmarks/rows_in_parts.py, on two ranks of the CPU: it compares bits and writes what the table is made from."""

import json
import subprocess
import sys
from pathlib import Path

from scripts import FOLDER


def test_two_ranks_compare_bits_and_write_every_time(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "rows_in_parts.py"), "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rows-in-parts-cpu.json").read_text())
    assert found["ranks"] == 2
    assert found["bits"]["compared"] > 1 << 20
    assert found["bits"]["differ"] == 0
    assert f"0 of {found['bits']['compared']} outputs differ" in done.stdout
    assert [case["direction"] for case in found["cases"]] == ["forward", "backward"]
    names = {"begin", "all_reduce", "finish", "eager", "compiled", "kernel_on_part", "whole_rows", "eager_in_a_row"}
    for case in found["cases"]:
        assert set(case["times"]) == names
        assert all(timing["median_us"] > 0 for timing in case["times"].values())
    assert set(found["pair"]["times"]) == {"apart", "together", "eager_in_a_row"}
