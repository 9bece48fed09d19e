"""The memory layout of a tensor's rows, for the kernels of every device."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Walk:
    """Where the rows of several tensors of one shape begin in memory: M rows of N elements.

    `steps` holds three strides, in elements, for each tensor. Row m begins at m · steps[2]; if `strided`, at
    i·steps[0] + j·steps[1] + k·steps[2], where (i, j, k) is m unravelled over three dimensions. `sizes` holds the
    sizes of the inner two dimensions.
    """

    M: int
    N: int
    strided: bool
    sizes: tuple[int, int]
    steps: tuple[tuple[int, int, int], ...]


@functools.lru_cache(4096)
def walk(shape: Sequence[int], *strides: Sequence[int]) -> Walk | None:
    """Returns None if a last dimension is not contiguous or the rows need more than three strided dimensions."""
    N, M = shape[-1], math.prod(shape[:-1])
    if M > 0 and N > 1 and any(stride[-1] != 1 for stride in strides):
        return None
    dims: list[tuple[int, tuple[int, ...]]] = []
    for axis, size in enumerate(shape[:-1] if M > 0 else ()):  # strides do not matter if there are no rows
        steps = tuple(stride[axis] for stride in strides)
        if size == 1:
            continue
        if dims and all(outer == inner * size for outer, inner in zip(dims[-1][1], steps, strict=True)):
            dims[-1] = (dims[-1][0] * size, steps)
        else:
            dims.append((size, steps))
    if len(dims) > 3:
        return None
    strided = len(dims) > 1
    dims = [(1, (0,) * len(strides))] * (3 - len(dims)) + dims
    outer, middle, inner = (steps for _, steps in dims)
    sizes = (dims[1][0], dims[2][0]) if strided else (1, 1)
    return Walk(M, N, strided, sizes, tuple(zip(outer, middle, inner, strict=True)))


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of this shape."""
    return tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))
