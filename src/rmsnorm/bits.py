"""Comparison of tensors bit by bit."""

import torch
from torch import Tensor


def differing(a: Tensor, b: Tensor) -> tuple[int, int]:
    """Count the elements whose bits differ. Two NaN are equal; +0 and -0 differ by one ulp.

    Args:
        a: A floating-point tensor.
        b: A tensor of the same shape and dtype.

    Returns:
        How many elements differ, and by how many ulp at most.

    Raises:
        ValueError: If the shapes or dtypes differ.

    Example:
        >>> from rmsnorm import bits
        >>> bits.differing(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 2**-21]))
        (1, 2)
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"{tuple(a.shape)} {a.dtype} cannot be compared with {tuple(b.shape)} {b.dtype}")
    if a.numel() == 0:
        return 0, 0
    x, y = _as_integers(a), _as_integers(b)
    if torch.equal(x, y):  # much faster than what follows
        return 0, 0
    steps = (_ordered(x) - _ordered(y)).abs().masked_fill_(a.isnan() & b.isnan(), 0)
    return int(steps.count_nonzero()), int(steps.max())


def _as_integers(t: Tensor) -> Tensor:
    """The bits of the floats, as integers of their size."""
    return t.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def _ordered(bits: Tensor) -> Tensor:
    """The bits of floats as integers in the order of the floats, in which neighbours differ by one."""
    lowest = torch.iinfo(bits.dtype).min
    bits = bits.long()
    return torch.where(bits < 0, lowest - bits - 1, bits)
