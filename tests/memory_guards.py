"""Memory around and behind tensors: guards that must survive a call, and fresh memory that holds no useful numbers."""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

GUARD, SENTINEL = 64, -77.0


@contextlib.contextmanager
def guarded() -> Iterator[list[Tensor]]:
    """Has torch.empty allocate inside larger memory, filled with a sentinel that must survive around each tensor.

    Plans that Python runs allocate their outputs in this way.
    """
    empty, buffers = torch.empty, []

    def inside(*size: Any, dtype: torch.dtype, device: Any) -> Tensor:
        shape = torch.Size(size if isinstance(size[0], int) else size[0])
        buffer = torch.full((shape.numel() + 2 * GUARD,), SENTINEL, dtype=dtype, device=device)
        buffers.append(buffer)
        return buffer[GUARD : buffer.numel() - GUARD].view(shape)

    torch.empty = inside  # type: ignore[assignment]
    try:
        yield buffers
    finally:
        torch.empty = empty
    for buffer in buffers:
        around = torch.cat([buffer[:GUARD], buffer[buffer.numel() - GUARD :]])
        assert (around == SENTINEL).all(), "wrote outside of an output"


_M_PERTURB = -6  # of mallopt in glibc


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills fresh memory, so that an element that was never written is noticed.

    What torch.empty returns is filled with NaN. Other memory, such as that of outputs that C++ allocates without
    torch's dispatcher, has 0x7F in each byte, and freed memory 0x80, where the C library is glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    mallopt(_M_PERTURB, 0x80)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        mallopt(_M_PERTURB, 0)


@contextlib.contextmanager
def unchanged(*tensors: Tensor | None) -> Iterator[None]:
    """Asserts that no byte of the whole memory of these tensors changes."""
    memory = [torch.tensor([], dtype=torch.uint8).set_(t.untyped_storage()) for t in tensors if t is not None]
    before = [bytes_.clone() for bytes_ in memory]
    yield
    for now, then in zip(memory, before, strict=True):
        assert now.equal(then), "an input, or the memory around it, was written to"
