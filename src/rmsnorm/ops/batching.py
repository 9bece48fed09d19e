"""The vmap rule that calls an operator once for each sample of a batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[tuple[Tensor, ...], tuple[int | None, ...]]


def call_by_sample(op: Any, tensors: int, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Outputs:
    """The outputs of a batched call and their batch dimensions, as a vmap rule returns them.

    Args:
        op: The operator.
        tensors: How many arguments, the first ones, are tensors or None.
        info: As a vmap rule gets it.
        in_dims: The batch dimension of each argument; None for one that is not batched.
        args: The arguments.
    """
    front = [a if d is None else a.movedim(d, 0) for a, d in zip(args[:tensors], in_dims[:tensors], strict=True)]
    batched = [d is not None for d in in_dims[:tensors]]
    if info.batch_size == 0:  # take the shapes from a call with a made-up sample
        one = [a.new_ones(a.shape[1:]) if is_batched else a for a, is_batched in zip(front, batched, strict=True)]
        outputs = op(*one, *args[tensors:])
        return tuple(o.new_empty(0, *o.shape) for o in outputs), (0,) * len(outputs)
    samples = [
        op(*(a[i] if is_batched else a for a, is_batched in zip(front, batched, strict=True)), *args[tensors:])
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(output) for output in zip(*samples, strict=True)), (0,) * len(samples[0])


def vmap_by_sample(name: str, tensors: int) -> Callable[..., Outputs]:
    """The rule for `torch.library.register_vmap` of one of our operators; `tensors`: see `call_by_sample`."""
    op = getattr(torch.ops.rmsnorm, name).default

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Outputs:
        return call_by_sample(op, tensors, info, in_dims, args)

    return rule
