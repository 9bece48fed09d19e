"""benchmarks/gates.py, which counts how often silu and sigmoid are not correctly rounded."""

import numpy as np
import pytest
import torch

from rmsnorm import gated_reference
from scripts import benchmark_script

pytest.importorskip("numba", reason="there is no Numba")
gates = benchmark_script("gates")


@pytest.mark.parametrize("activation", gates.ACTIVATIONS)
def test_what_is_counted_is_the_function_of_the_reference(activation) -> None:
    found = [piece for _, pieces in gates.kinds(1 << 14) for piece in pieces]
    for piece in found:
        piece = piece[piece.isfinite()]
        values = np.empty(piece.numel())
        gates.unrounded(piece.numpy(), activation == "silu", values)
        assert torch.from_numpy(values).float().equal(gated_reference.silu_or_sigmoid(piece, activation))


@pytest.mark.parametrize("activation", gates.ACTIVATIONS)
def test_roundings_that_are_not_in_question_are_correct(activation) -> None:
    """The others are computed by mpmath anyway."""
    for _, pieces in gates.kinds(400):
        piece = next(pieces)[-400:]
        piece = piece[piece.isfinite()]
        right = [gates.correctly_rounded(g, activation) for g in piece.tolist()]
        counted = gates.Count()
        gates.count(piece, activation, counted)
        ours = gated_reference.silu_or_sigmoid(piece, activation).tolist()
        assert counted.ours == sum(a != b for a, b in zip(ours, right, strict=True))
        assert counted.inputs == len(piece)


def test_wrong_roundings_of_bf16_gates_are_found() -> None:
    """sigmoid(g) of tiny g lies so close to the middle between two numbers that fp64 does not show on which side."""
    every = gates.Count()
    (_, pieces) = next((name, pieces) for name, pieces in gates.kinds(0) if name == "every bf16")
    gates.count(next(pieces), "sigmoid", every)
    assert every.ours == 63
    assert every.largest < 2.0**-14
