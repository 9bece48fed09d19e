"""Counting the bytes that autograd saves."""

import torch

from conftest import Draw
from rmsnorm import memory


def test_saved_bytes_count_each_storage_once_without_the_weights(randn: Draw) -> None:
    x = randn(6, 8).requires_grad_()
    w = randn(8).requires_grad_()
    with memory.saved_for_backward([w]) as saved:
        y = x * w  # saves x and w
        z = x[:3] * w  # the storage of x again
        assert saved() == x.numel() * 4
        u = y.sigmoid()  # its output
        assert saved() == 2 * x.numel() * 4
    grads = torch.autograd.grad(u.sum() + z.sum(), (x, w))
    s = (x * w).sigmoid()
    wanted = torch.autograd.grad(s.sum() + (x[:3] * w).sum(), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
