"""Says how an expression differs from every supported RMSNorm, if the difference is a common one."""

from collections.abc import Iterator

import torch

from rmsnorm.patching.expression import ACTIVATIONS, Node, Term, nodes
from rmsnorm.patching.rule import dtype_name

_ROOTS = ("rsqrt", "sqrt")
_IN_16_BITS = (torch.bfloat16, torch.float16)


def difference(found: Node, gated: bool) -> str | None:
    """How a norm's expression differs from an RMSNorm; None if the difference is not a common one.

    Args:
        found: The expression.
        gated: Whether the norm was given a gate.
    """
    every = list(nodes(found))
    if gated and not any(node.op == "g" for node in every):
        return "it does not use its second argument"
    roots = [node for node in every if node.op in _ROOTS]
    if not roots:
        return "it takes no square root"
    return next((said for said in _differences(every, roots) if said is not None), None)


def _differences(every: list[Node], roots: list[Node]) -> Iterator[str | None]:
    yield from map(_of_statistic, roots)
    yield _of_eps(every, roots)
    yield from map(_of_rounding, every)
    yield _of_gate(every)
    yield from map(_of_gated_input, roots)


def _of_statistic(root: Node) -> str | None:
    """What is unusual in the operand of a root."""
    statistic = _without_eps(root)
    if statistic.op == "sum":
        return "it takes the sum of the squares, not their mean"
    if statistic.op != "mean":
        return None
    squares = _uncast(statistic.args[0])
    if squares.op != "square":
        return "it takes the mean of something other than the squares of its input"
    narrow = [node.dtype for node in (squares, statistic) if node.dtype in _IN_16_BITS]
    return f"it takes the mean of squares in {dtype_name(narrow[0])}, not in float32" if narrow else None


def _of_eps(every: list[Node], roots: list[Node]) -> str | None:
    if any(_without_eps(root) is not _uncast(root.args[0]) for root in roots):
        return None
    outside = any(
        node.op == "add" and any(isinstance(a, float) for a in node.args) and any(n in roots for n in nodes(node))
        for node in every
    )
    return "it adds eps outside of the square root" if outside else "it adds no eps under the square root"


def _of_rounding(node: Node) -> str | None:
    if node.op == "cast" and node.dtype in _IN_16_BITS and _uncast(node.args[0]).op in (*_ROOTS, "reciprocal"):
        return f"it rounds the inverse root to {dtype_name(node.dtype)}"
    return None


def _of_gate(every: list[Node]) -> str | None:
    """What is unusual in what is done with a gate."""
    activations = [node for node in every if node.op in ACTIVATIONS]
    if not activations and any(node.op == "g" for node in every):
        return "it applies neither silu nor sigmoid to its second argument"
    narrow = [node for node in activations if node.dtype in _IN_16_BITS]
    return f"it takes {narrow[0].op} in {dtype_name(narrow[0].dtype)}, not in float32" if narrow else None


def _of_gated_input(root: Node) -> str | None:
    """What is unusual in the product of input and gate, if that is normalized."""
    for node in nodes(root):
        if node.op == "cast" and node.dtype in _IN_16_BITS and any(inner.op in ACTIVATIONS for inner in nodes(node)):
            return f"it rounds the product of input and gate to {dtype_name(node.dtype)} before it normalizes it"
    return None


def _without_eps(root: Node) -> Node:
    """The operand of a root, without the number that is added to it."""
    below = _uncast(root.args[0])
    if below.op == "add":
        terms = [a for a in below.args if isinstance(a, Node)]
        if len(terms) == 1:
            return _uncast(terms[0])
    return below


def _uncast(e: Term) -> Node:
    assert isinstance(e, Node)
    while e.op == "cast":
        (e,) = e.args
        assert isinstance(e, Node)
    return e
