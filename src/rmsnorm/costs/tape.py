"""The record of a count: which operators run, what they read and write, and what is allocated meanwhile.

A formula plays the operators of one phase on a `Tape` in the order in which they run. It calls `new` where the code
allocates, `free` where it drops the last reference, and `run`, `op` or `cast` for each operator.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

F32 = torch.float32


@dataclass(frozen=True)
class Term:
    """One operator of a count.

    Attributes:
        what: Its name or formula, such as "x²" or "cast to float32".
        flops: The FLOPs that it does.
        read: The bytes that it reads.
        written: The bytes that it writes.
        kernels: How many kernels it is.
    """

    what: str
    flops: int
    read: int
    written: int
    kernels: int


@dataclass(eq=False)
class Array:
    """Memory that a tensor occupies.

    Attributes:
        numel: How many elements are stored.
        dtype: Their dtype.
        ours: Whether the tape allocated it and has not freed it. False for x, weights and incoming gradients.
    """

    numel: int
    dtype: torch.dtype
    ours: bool = True

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.numel * self.dtype.itemsize


def given(numel: int, dtype: torch.dtype) -> Array:
    """An array that exists before the phase begins, and that the tape neither allocates nor frees."""
    return Array(numel, dtype, ours=False)


class Tape:
    """The operators of one phase in the order in which they run, and the bytes allocated between them.

    Args:
        cpu: Whether the operators run on a CPU, where they allocate scratch memory.
        alive: The bytes that are allocated when the phase begins.

    Attributes:
        terms: The operators so far.
        alive: The bytes allocated now.
        peak: The most that `alive` has been.
    """

    def __init__(self, cpu: bool, alive: int = 0) -> None:
        self.cpu = cpu
        self.terms: list[Term] = []
        self.alive = self.peak = alive

    def new(self, numel: int, dtype: torch.dtype) -> Array:
        """Allocate an array."""
        array = Array(numel, dtype)
        self.alive += array.nbytes
        self.peak = max(self.peak, self.alive)
        return array

    def free(self, *arrays: Array | None) -> None:
        """Free arrays; None, what is freed already and what the tape did not allocate are passed over."""
        for array in arrays:
            if array is not None and array.ours:
                assert array.nbytes <= self.alive
                self.alive -= array.nbytes
                array.ours = False

    def run(
        self, what: str, flops: int, inputs: Sequence[Array | None], outputs: Sequence[Array | None], kernels: int = 1
    ) -> None:
        """Record an operator whose outputs are allocated already."""
        read, written = (sum(a.nbytes for a in arrays if a is not None) for arrays in (inputs, outputs))
        self.terms.append(Term(what, flops, read, written, kernels))

    def op(self, what: str, flops: int, numel: int, *inputs: Array, scalar: bool = False) -> Array:
        """Record an aten operator and allocate its result, which has the promoted dtype of the inputs.

        On a CPU it first casts the inputs that have another dtype, and makes two tensors (8 and 4 bytes) of a number.

        Args:
            what: The name of the term.
            flops: Its FLOPs.
            numel: The number of elements of the result.
            *inputs: What it reads.
            scalar: Whether it also takes a Python number.
        """
        dtype = inputs[0].dtype
        for array in inputs:
            dtype = torch.promote_types(dtype, array.dtype)
        scratch: list[Array] = []
        if self.cpu:
            scratch = [self.new(array.numel, dtype) for array in inputs if array.dtype != dtype]
            scratch += self.number() if scalar else []
        out = self.new(numel, dtype)
        self.run(what, flops, inputs, [out])
        self.free(*scratch)
        return out

    def number(self) -> list[Array]:
        """Allocate what an operator on a CPU makes of a Python number: a tensor in fp64, and one in fp32."""
        return [self.new(1, torch.float64), self.new(1, F32)] if self.cpu else []

    def cast(self, array: Array, dtype: torch.dtype) -> Array:
        """Record a cast and allocate its result; an array that has the dtype is returned as it is."""
        if array.dtype == dtype:
            return array
        out = self.new(array.numel, dtype)
        self.run(f"cast to {str(dtype).removeprefix('torch.')}", 0, [array], [out])
        return out

    def recast(self, array: Array, dtype: torch.dtype) -> Array:
        """As `cast`, and free the array if the result is another."""
        out = self.cast(array, dtype)
        if out is not array:
            self.free(array)
        return out
