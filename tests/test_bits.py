"""Comparing tensors by their bits."""

import math

import pytest
import torch

from conftest import Draw
from rmsnorm import bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_differing_counts_bits(dtype: torch.dtype, randn: Draw) -> None:
    a = randn(5, 7).to(dtype)
    assert bits.differing(a, a.clone()) == (0, 0)
    b = a.clone()
    b[1, 2] = torch.nextafter(b[1, 2], b.new_tensor(math.inf))
    b[3, 0] = torch.nextafter(torch.nextafter(b[3, 0], b.new_tensor(-math.inf)), b.new_tensor(-math.inf))
    assert bits.differing(a, b) == (2, 2)
    tiny = torch.nextafter(a.new_zeros(()), a.new_ones(()))
    around_zero = torch.stack([-tiny, -0.0 * tiny, 0.0 * tiny, tiny])
    assert bits.differing(around_zero[:-1], around_zero[1:]) == (3, 1)


def test_nans_are_equal_and_different_shapes_or_dtypes_raise() -> None:
    nan, one = torch.tensor([math.nan]), torch.tensor([1.0])
    negative = torch.tensor([-1], dtype=torch.int32).view(torch.float32)  # another NaN
    assert negative.isnan().all()
    assert bits.differing(nan, negative) == (0, 0)
    assert bits.differing(nan, one)[0] == 1
    assert bits.differing(torch.empty(0, 4), torch.empty(0, 4)) == (0, 0)
    with pytest.raises(ValueError, match="bfloat16"):
        bits.differing(one, one.bfloat16())
    with pytest.raises(ValueError, match="compared"):
        bits.differing(one, one.expand(2))
