"""The GPU kernels compile with the oldest Triton that is supported: it refuses some code that later ones take."""

import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if not triton.__version__.startswith("3.6."):
    pytest.skip(f"Triton is {triton.__version__}, not 3.6", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from test_gpu_ptx import BF16, FP32, OTHERS, compile_launch, launches, pair_and_sandwich

USUAL = {"M": 8192, "N": 1280, "x": BF16, "w": BF16, "cast": "early", "offset": 0.0, "residual": False}


@pytest.mark.parametrize("name", OTHERS)
def test_the_kernels_of_every_kind_of_input_compile(name: str) -> None:
    for launch in launches(**(USUAL | OTHERS[name])):
        compile_launch(launch, 90)


@pytest.mark.parametrize("w", [None, BF16, FP32], ids=["no weight", "bf16 weight", "fp32 weight"])
def test_pairs_and_sandwiches_compile(w: torch.dtype | None) -> None:
    for launch in pair_and_sandwich(1280, BF16, w):
        compile_launch(launch, 90)
