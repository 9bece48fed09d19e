"""The bytes that autograd keeps for the backward pass."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def saved_for_backward(besides: Iterable[Tensor] = ()) -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd saves within a `with` statement. Each storage counts once.

    Args:
        besides: Tensors whose storages do not count, such as the weights.

    Yields:
        A function without arguments that returns how many bytes have been saved so far. Call it while the outputs are
        alive: when the graph is freed, the address of a storage may be used again.

    Example:
        >>> from rmsnorm import memory
        >>> x, w = torch.randn(4, 8, requires_grad=True), torch.ones(8, requires_grad=True)
        >>> with memory.saved_for_backward(besides=[w]) as count:
        ...     y = rmsnorm.rms_norm(x, w)
        ...     print(count())  # x, and 4 bytes a row
        144
    """
    known = {t.untyped_storage().data_ptr() for t in besides}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # an output that held itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield lambda: sum(storages.values())
