"""The configurations that benchmarks/tiles.py tries. Running them needs a GPU."""

import argparse
import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton")

from rmsnorm.kernels.gpu import tiling
from scripts import FOLDER, benchmark_script

SCRIPT = FOLDER / "tiles.py"
H200 = tiling.Gpu(227 << 10, 132, 9)


@pytest.fixture(scope="module")
def tiles() -> Any:
    return benchmark_script("tiles")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "forward, add-forward, backward, add-backward"),
        ("forwards 8192x1280 bfloat16", "forward, add-forward, backward, add-backward"),
        ("forward 8192x1280", "bfloat16, float16, float32"),
        ("forward 8192x1280 int8", "bfloat16, float16, float32"),
        ("forward 8192 bfloat16", "8192x1280"),
        ("forward 8192x1280 bfloat16 warps", "warps=2,4"),
        ("forward 8192x1280 bfloat16 warps=two", "warps=2,4"),
        ("forward 8192x1280 bfloat16 warp=2", "warps"),
        ("forward 8192x1280 bfloat16 warps=2,0", "warps=0: give numbers of at least 1"),
        ("forward 0x1280 bfloat16", "at least 1"),
    ],
)
def test_an_invalid_sweep_raises_a_message_that_says_what_is_expected(tiles: Any, text: str, told: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=told):
        tiles.Sweep.parse(text)


def test_every_combination_follows_the_configuration_in_use(tiles: Any) -> None:
    in_use = tiling.forward(2880, 2, False, True, H200)
    sweep = tiles.Sweep.parse(f"forward 16384x2880 bfloat16 block_n=512,{in_use.block_n} warps=2,{in_use.warps}")
    configs = sweep.configs(in_use)
    assert configs[0] == in_use
    assert len(configs) == 4
    assert {(c.block_n, c.warps, c.pieces) for c in configs} == {
        (block_n, warps, -(-2880 // block_n)) for block_n in (512, in_use.block_n) for warps in (2, in_use.warps)
    }
    assert tiles.difference(in_use, in_use) == "in use"
    assert tiles.difference(in_use, dataclasses.replace(in_use, warps=2)) == "warps=2"


def test_parts_decides_whether_programs_share_a_row(tiles: Any) -> None:
    in_use = tiling.backward(8192, 16384, 2, 2, 2, False, True, H200)
    assert in_use.parts > 1
    shared, whole = (
        tiles.Sweep.parse(f"backward 8192x16384 bfloat16 block_n=1024 pieces=2 parts={parts} programs=100").configs(
            in_use
        )[1]
        for parts in (2, 1)
    )
    assert (shared.parts, shared.pieces, shared.staged) == (8, 2, True)
    assert (whole.parts, whole.pieces, whole.staged) == (1, 16, False)
    assert tiles.Sweep.parse("backward 8192x16384 bfloat16 rows=2").configs(in_use) == [
        in_use
    ]  # no kernel shares two rows
    enough = tiles.Sweep.parse("backward 8192x16384 bfloat16 block_n=16384 pieces=1").configs(in_use)[1]
    assert (enough.parts, enough.pieces, enough.staged) == (1, 1, False)
    longest = tiling.LONGEST_SUM[torch.bfloat16.itemsize]
    assert shared.programs == whole.programs == tiling._programs(8192, 100, longest)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_message_says_so() -> None:
    command = [sys.executable, str(SCRIPT), "forward 64x64 bfloat16"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert run.returncode == 2
    assert "there is no GPU" in run.stderr
    assert "Traceback" not in run.stderr
