"""How CPU kernels traverse rows, and launches over all rows of a call, which threads share."""

import ctypes
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rmsnorm.kernels.cpu.compiling import compiled_drain, compiled_wait
from rmsnorm.kernels.cpu.threads import MachineCode, Team
from rmsnorm.kernels.plan import MOST_PLANS, Fresh, TensorKind
from rmsnorm.kernels.rows import walk

# The fewest elements of a piece of a shared call, 2 us of work. Measured only together with the change to torch's
# threads, which reduced fp32 of 512 x 1280 from 132 to 63 us on two threads.
_GRAIN = 1 << 14
# The fewest elements and rows of a partial sum of dw, and the most such sums: each takes 8 bytes a column. Not measured
# alone. Changing these changes the bits of dw.
CHUNK, _MOST_CHUNKS, _FEWEST_ROWS = 1 << 16, 256, 32
# Bytes from which the C library maps new memory for each tensor; 42 MB cause 10,000 page faults, or 20 with huge pages:
# fp32 of 8192 x 1280 15.1 to 4.8 ms.
_MAPPED = 32 << 20
_MOST_INPUTS = 5  # tensors of rows that a kernel reads


@dataclass(frozen=True)
class Rows:
    """How kernels traverse M rows of N elements. It depends on shape and strides only, not on the number of threads.

    Of gated norms with groups, a row here is one group of a row. If each head has its own weight, heads are groups.

    grain: rows that a thread takes at once in the forward pass. chunk, chunks: rows of each partial sum of dw, and how
    many such sums there are. even: whether rows begin and end at pairs of numbers. layout: the array that kernels read.
    """

    M: int
    N: int
    grain: int
    chunk: int
    chunks: int
    even: bool
    layout: Any


@functools.lru_cache(MOST_PLANS)
def rows_of(
    shape: Sequence[int], *strides: Sequence[int], groups: int = 1, least: int = CHUNK, measured: int | None = None,
    whole: int = 0,
) -> Rows | None:  # fmt: skip
    """As `rows.walk`, with rows divided into chunks of at least `least` elements and a multiple of `groups` rows.

    measured: over how many of the first columns the statistic is taken, if not over all. whole: the width of whole rows
    if these are parts of them.
    """
    found = walk(shape, *strides)
    if found is None:
        return None
    M, N = found.M, found.N
    chunk = groups * max(_FEWEST_ROWS, -(-least // (N * groups)), -(-(M // groups) // _MOST_CHUNKS))
    sizes = found.sizes if found.strided else (1, M)
    steps = [step for of_one in found.steps for step in of_one]
    columns = N if measured is None else measured
    values = [N, chunk, *sizes, *steps, *[0] * (3 * _MOST_INPUTS - len(steps)), groups, columns, whole or columns]
    even = all(number % 2 == 0 for number in (N, columns, *steps)) and sys.byteorder == "little"
    return Rows(M, N, max(1, _GRAIN // N), chunk, -(-M // chunk), even, (ctypes.c_int64 * len(values))(*values))


def like_rows(name: str, x: TensorKind, dtype: torch.dtype) -> Fresh:
    nbytes = math.prod(x.shape) * dtype.itemsize
    return Fresh(name, dtype, tuple(x.shape), huge_pages=nbytes >= _MAPPED)


def over_rows(
    kernel: Any, tensors: tuple[str | None, ...], rows: Rows, arrays: tuple[Any, ...], at_once: int, alone: int
) -> MachineCode:
    """A launch over all rows. Several threads share more than `alone` elements, in pieces of `at_once` rows.

    arrays: what the kernel takes after the tensors and the layout of the rows.
    """
    words = tuple(ctypes.addressof(array) for array in (rows.layout, *arrays))
    shared = alone < rows.M * rows.N and at_once < rows.M
    drain = compiled_drain(len(tensors) + len(words)) if shared else None
    if drain is None or isinstance(drain, str):
        return MachineCode(kernel, tensors, (*words, 0, rows.M), keeps=(rows, arrays))
    return MachineCode(kernel, tensors, words, Team(rows.M, at_once, drain, compiled_wait), keeps=(rows, arrays))
