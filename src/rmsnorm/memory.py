"""Counts the bytes that autograd keeps for the backward pass."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def saved_for_backward(besides: Iterable[Tensor] = ()) -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd saves inside, by unique storage, without those of `besides` (the weights).

    The function it gives says how many so far; ask while the graph is alive, as a freed address may come again.
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
