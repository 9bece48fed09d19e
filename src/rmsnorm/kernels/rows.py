"""How the rows of tensors lie in memory, for the kernels of every device."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Found = TypeVar("Found")


@dataclass(frozen=True, eq=False)  # walks are cached, so one is known by its identity
class Walk:
    """How the rows of tensors of one shape lie in memory.

    Row m of a tensor begins at m · steps[2]; if `strided`, at i·steps[0] + j·steps[1] + k·steps[2] where
    (i, j, k) is m unravelled over three dimensions, of which `sizes` holds the inner two. dense, dense_rows: the
    strides of a contiguous tensor of `shape`, and of one that has a number a row.
    """

    shape: tuple[int, ...]
    M: int
    N: int
    strided: bool
    sizes: tuple[int, int]
    steps: tuple[tuple[int, int, int], ...]
    dense: tuple[int, ...]
    dense_rows: tuple[int, ...]


@functools.lru_cache(4096)
def walk(shape: Sequence[int], *strides: Sequence[int]) -> Walk | None:
    """None if some last dimension is not contiguous, or the rows do not lie in three strided dimensions."""
    N, M = shape[-1], math.prod(shape[:-1])
    if M > 0 and N > 1 and any(stride[-1] != 1 for stride in strides):
        return None
    dims: list[tuple[int, tuple[int, ...]]] = []
    for axis, size in enumerate(shape[:-1] if M > 0 else ()):  # without rows it is all the same where they begin
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
    dense, dense_rows = _dense(shape), _dense(shape[:-1])
    return Walk(tuple(shape), M, N, strided, sizes, tuple(zip(outer, middle, inner, strict=True)), dense, dense_rows)


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))


def walked(find: Callable[..., Found | None], *tensors: Tensor) -> tuple[Found, Sequence[Tensor]]:
    """What `find(shape, *strides)` makes of these tensors, and the tensors: copied if it makes nothing of them."""
    found = find(tensors[0].shape, *map(Tensor.stride, tensors))
    if found is not None:
        return found, tensors
    one_by_one = [t if find(t.shape, t.stride()) is not None else t.contiguous() for t in tensors]
    found = find(tensors[0].shape, *[t.stride() for t in one_by_one])
    if found is not None:
        return found, one_by_one
    return walked(find, *[t.contiguous() for t in tensors])
