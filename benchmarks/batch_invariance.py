"""Counts how many of 4096 rows get other bits when they are computed in smaller batches, forward and backward.

    python benchmarks/batch_invariance.py [--device cuda] [--out DIR]

Exits with 1 if a row of ours changes. With --out, writes batch-invariance-cpu.json or batch-invariance-cuda.json.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import rmsnorm
from rmsnorm.errors import CommandError
from rmsnorm.tools import machine, results
from rmsnorm.tools.bench.peers import EPS, definition

M, N = 4096, 7168  # the width of DeepSeek-V3
BATCHES = (1, 7, 64, 1000)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Norm = Callable[[Tensor, Tensor], Tensor]


def torchs(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, w.shape, w, EPS)


def torchs_in_context(x: Tensor, w: Tensor) -> Tensor:
    with rmsnorm.batch_invariant():
        return torchs(x, w)


NORMS: dict[str, Norm] = {
    "Definition": definition,
    "torch.compile": torch.compile(definition),
    "F.rms_norm": torchs,
    "F.rms_norm in batch_invariant": torchs_in_context,
    "ours": rmsnorm.rms_norm,
}
OURS = ("F.rms_norm in batch_invariant", "ours")


def y_and_dx(norm: Norm, x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = norm(x, w)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def changed_rows(norm: Norm, x: Tensor, w: Tensor, dy: Tensor, batches: tuple[int, ...] = BATCHES) -> dict[str, int]:
    """How many rows of y and of dx differ in a bit between the whole batch and any smaller one."""
    whole = y_and_dx(norm, x, w, dy)
    changed = torch.zeros(2, len(x), dtype=torch.bool, device=x.device)
    for size in batches:
        for at in range(0, len(x), size):
            rows = slice(at, at + size)
            for k, part in enumerate(y_and_dx(norm, x[rows], w, dy[rows])):
                changed[k, rows] |= (part != whole[k][rows]).any(-1)
    return dict(zip(("y", "dx"), changed.sum(-1).tolist(), strict=True))


def measured(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(size, generator=generator).to(device, dtype) for size in ((M, N), (N,), (M, N)))
    return {name: changed_rows(norm, x, w, dy) for name, norm in NORMS.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--out", type=Path, help="a folder for the result")
    options = parser.parse_args()
    device = machine.find_device(options.device)
    if options.out is not None:
        results.check_folder(options.out)
    changed = {name: measured(device, dtype) for name, dtype in DTYPES.items()}
    print(f"{device.type}: of {M} rows of {N}, how many change in batches of {', '.join(map(str, BATCHES))}")
    for dtype, of_norms in changed.items():
        for name, counts in of_norms.items():
            print(f"  {dtype:9} {name:30} y {counts['y']:5} dx {counts['dx']:5}")
    if options.out is not None:
        facts = {"machine": machine.describe(device), "rows": M, "width": N, "batches": BATCHES, "changed": changed}
        results.write_json(options.out / f"batch-invariance-{device.type}.json", facts)
    return int(any(any(of_norms[name].values()) for of_norms in changed.values() for name in OURS))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CommandError as error:
        sys.exit(f"batch_invariance.py: {error}")
