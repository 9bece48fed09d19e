"""One call of a norm's own forward on a stand-in: what it computes, and what else it does."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmsnorm.errors import type_name
from rmsnorm.patching.calls import Calls, Profiled
from rmsnorm.patching.expression import Node, Operators, Refusal
from rmsnorm.patching.stand_in import Record, record_of
from rmsnorm.patching.tensor_queries import TensorQueries


@dataclass
class Observation:
    """What was seen of one call.

    Attributes:
        y: Its output.
        expression: What the output is, in terms of the leaves "x", "w" and "g", the gate.
        record: Everything else.
        gate: The gate that it was given, if any.
        groups: How many parts of equal width it divided a row into; 1 for a norm without a gate.
    """

    y: Tensor
    expression: Node
    record: Record
    gate: Tensor | None = None
    groups: int = 1


def observe(
    cls: type[nn.Module],
    stand_in: nn.Module,
    x: Tensor,
    N: int,
    row: tuple[int, ...],
    device: torch.device | None = None,
    gate: Tensor | None = None,
) -> Observation:
    """Call the forward of the class on the stand-in.

    Args:
        cls: The norm's own class.
        stand_in: What `make_stand_in` made for the norm.
        x: The input.
        N: The number of elements of a row.
        row: The last dimensions of x that are the same in every call; empty if none is.
        device: The device that tensors report, if not the one that they are on.
        gate: The second argument of a gated norm.

    Raises:
        Refusal: If the forward does something that no RMSNorm needs. Whatever the forward raises is passed on.
    """
    record = record_of(stand_in)
    given = {"x": x, "w": record.weight, "g": gate}
    operators = Operators({name: t for name, t in given.items() if t is not None}, N)
    queries = TensorQueries(record, row, device)
    calls = Calls(record, cls, observe.__code__)
    forward: Any = cls.forward
    try:
        with operators, queries, Profiled(calls):
            y = forward(stand_in, x) if gate is None else forward(stand_in, x, gate)
    except BaseException:
        if record.refusal or operators.refusal:
            raise Refusal(record.refusal or operators.refusal) from None
        raise
    reason = record.refusal or operators.refusal
    if reason:
        raise Refusal(reason)
    if not isinstance(y, Tensor):
        raise Refusal(f"its forward returns {type_name(y)}")
    return Observation(y, operators.expression(y), record, gate, N // operators.N)
