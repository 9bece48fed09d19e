"""Counts how often silu and sigmoid of a gate are not correctly rounded, ours and eager's, and writes gates.json.

    python benchmarks/gates.py --out DIR              10^8 random fp32 gates, and every bf16 and fp16 gate
    python benchmarks/gates.py --count 1000000        fewer random gates

Our function is that of `rmsnorm.gated_reference`, computed by the CPU kernel. It is accurate to a few units in the last
place of fp64 before it is rounded to fp32, so the rounding can only be wrong near the middle between two fp32 numbers.
Those cases, about one in a million, are computed again by mpmath with 200 bits. Eager's results are compared with the
correctly rounded ones.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpmath
import numba
import numpy as np
import torch
from torch import Tensor

from rmsnorm.kernels.cpu.gated_kernels import sigmoid
from rmsnorm.tools import machine, results

ACTIVATIONS = ("silu", "sigmoid")
# Relative distance from the middle between two fp32 numbers within which mpmath decides: 16 times what fp64 can be off.
NEAR = 2.0**-46
_AT_ONCE = 1 << 22


@dataclass
class Count:
    """What was counted for an activation of gates of one kind.

    inputs: the gates, without NaN and infinities. near: how many results mpmath decided. ours, eagers: results that are
    not correctly rounded. largest: the largest of our wrong gates in magnitude, 0 if there is none.
    """

    inputs: int = 0
    near: int = 0
    ours: int = 0
    eagers: int = 0
    largest: float = 0.0


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def unrounded(gates: Any, silu: bool, out: Any) -> None:
    """Our function of fp32 gates, in fp64."""
    for i in range(gates.size):
        t = np.float64(gates[i])
        sigma = sigmoid(t)
        out[i] = t * sigma if silu else sigma


def near_middle(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The indices of fp64 values so close to the middle between two fp32 numbers that the rounding is in question."""
    _, exponent = np.frexp(values)
    units = values / np.ldexp(1.0, np.maximum(exponent - 24, -149))
    return np.nonzero(np.abs(np.abs(units) % 1.0 - 0.5) <= np.abs(units) * NEAR)[0]


def correctly_rounded(gate: float, activation: str) -> float:
    """The fp32 number next to silu or sigmoid of the gate, as mpmath finds it."""
    with mpmath.workprec(200):
        exact = (gate if activation == "silu" else 1) / (1 + mpmath.exp(-mpmath.mpf(gate)))
        _, exponent = mpmath.frexp(exact)
        unit = mpmath.ldexp(1, max(int(exponent) - 24, -149))
        return float(mpmath.nint(exact / unit) * unit)


def count(gates: Tensor, activation: str, into: Count) -> None:
    """Adds what is found for fp32 gates to a count."""
    gates = gates[gates.isfinite()]
    values = np.empty(gates.numel())
    unrounded(gates.numpy(), activation == "silu", values)
    right = torch.from_numpy(values).float()
    ours = right.clone()
    near = near_middle(values)
    for i in near.tolist():
        right[i] = correctly_rounded(gates[i].item(), activation)
    wrong = ours != right
    eager = torch.nn.functional.silu(gates) if activation == "silu" else torch.sigmoid(gates)
    into.inputs += gates.numel()
    into.near += len(near)
    into.ours += int(wrong.sum())
    into.eagers += int((eager != right).sum())
    into.largest = max([into.largest, *gates[wrong].abs().tolist()])


def kinds(total: int) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """The kinds of gates: random ones in equal numbers, and every finite bf16 and fp16 number."""

    def random(scale: float | None) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(7)
        for first in range(0, total // 2, _AT_ONCE):
            n = min(_AT_ONCE, total // 2 - first)
            gates = torch.randn(n, generator=generator)
            if scale is None:
                exponents = torch.randint(-30, 7, (n,), generator=generator)
                yield torch.ldexp(gates.sign() * (1 + torch.rand(n, generator=generator)), exponents)
            else:
                yield gates * scale

    yield "fp32, normal with deviation 4", random(4.0)
    yield "fp32, 2^-30 to 2^7 in magnitude, uniform exponents", random(None)
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    yield "every bf16", iter([patterns.view(torch.bfloat16).float()])
    yield "every fp16", iter([patterns.view(torch.float16).float()])


def measure(total: int) -> dict[str, dict[str, Count]]:
    """The counts of each kind of gates, for each activation."""
    found: dict[str, dict[str, Count]] = {}
    for name, pieces in kinds(total):
        found[name] = {activation: Count() for activation in ACTIVATIONS}
        for gates in pieces:
            for activation, into in found[name].items():
                count(gates, activation, into)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Count how often silu and sigmoid are not correctly rounded.")
    parser.add_argument("--count", type=int, default=10**8, help="how many random gates")
    parser.add_argument("--out", type=Path, help="a folder to write gates.json into")
    arguments = parser.parse_args()
    if arguments.out is not None:
        results.check_folder(arguments.out)
    found = measure(arguments.count)
    for kind, of_kind in found.items():
        for activation, counted in of_kind.items():
            print(f"{kind}, {activation}: {counted}")
    if arguments.out is not None:
        described = {kind: {a: vars(counted) for a, counted in of_kind.items()} for kind, of_kind in found.items()}
        content = {"machine": machine.describe("cpu"), "counts": described}
        (arguments.out / "gates.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
