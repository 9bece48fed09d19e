"""Merges two independent norms in a graph of torch.compile into one call: q_norm and k_norm, q_a and kv_a layernorm.

    y = forward(x);  y2 = forward(x2)            ->  y, y2 = forward_pair(x, x2)
    dx = backward(dy);  dx2 = backward(dy2)      ->  dx, dx2 = backward_pair(dy, dy2)

It does this only for calls of few elements, such as decoding steps, where the call and the launch take most of the
time. The bits are those of two calls. inductor.py runs this after residual_fusion.py, so only norms without a residual
are paired.
"""

from typing import Any

from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rmsnorm.ops.graphs import (
    BACKWARD,
    BACKWARD_PAIR,
    CHECKPOINTING,
    FORWARD,
    FORWARD_PAIR,
    Edit,
    arguments,
    call_of,
    may_fuse,
    outputs,
)  # fmt: skip

# The most elements of each norm of a pair. A kernel for more takes longer than a launch, so a second launch, made while
# the first kernel runs, costs no time.
MOST_ELEMENTS = 1 << 18


def pair(graph: Graph) -> None:
    """Pair, in place, the norms of a graph that were traced with `fuse_residual`."""
    edit = Edit(graph)
    # Backward first: it finds the forward call of a norm by its rstd, which pairing the forward calls replaces.
    for target, of_pair in ((BACKWARD, _pair_backward), (FORWARD, _pair_forward)):
        waiting: Node | None = None
        for node in graph.find_nodes(op="call_function", target=target):
            if not _may_pair(node):
                waiting = None
            elif (
                waiting is not None
                and _are_alike(waiting, node)
                and (moved := _needed_first(edit, node, waiting)) is not None
            ):
                edit.move(moved, waiting)
                of_pair(edit, waiting, node)
                waiting = None
            else:
                waiting = node


def _may_pair(norm: Node) -> bool:
    """Whether it may be fused, has few elements, and neither a residual nor, backward, a gradient of the sum."""
    x = _rows(norm).meta["val"]
    forward = norm if norm.target is FORWARD else call_of(arguments(norm)[4])
    return (
        may_fuse(forward)
        and arguments(norm)[1] is None
        and isinstance(x, Tensor)
        and statically_known_true(x.numel() <= MOST_ELEMENTS)
    )


def _rows(norm: Node) -> Node:
    """x of a call."""
    return arguments(norm)[0 if norm.target is FORWARD else 2]  # type: ignore[no-any-return]


def _options(norm: Node) -> tuple[Any, ...]:
    """The arguments of a call that are not tensors."""
    return arguments(norm)[3 if norm.target is FORWARD else 5 :]


def _are_alike(norm: Node, other: Node) -> bool:
    """Whether both have the same spec and outputs, device, and place with regard to activation checkpointing.

    Norms of the same rows are not: of these, a joint graph can keep more for the backward pass if they are paired.
    """
    return (
        _rows(norm) is not _rows(other)
        and _options(norm) == _options(other)
        and _rows(norm).meta["val"].device == _rows(other).meta["val"].device
        and all(norm.meta.get(key) == other.meta.get(key) for key in CHECKPOINTING)
    )


def _needed_first(edit: Edit, later: Node, earlier: Node) -> set[Node] | None:
    """What must move in front of the earlier call, so that the later one can be made there; None if it cannot.

    The later call must not depend on the earlier one, and no operator with side effects may have to move.
    """
    moved = edit.needed_between(later.all_input_nodes, earlier)
    if any(earlier in node.all_input_nodes for node in (later, *moved)):
        return None
    return moved if all(node.op == "call_function" and not node.is_impure() for node in moved) else None


def _pair_forward(edit: Edit, norm: Node, other: Node) -> None:
    (x, _, w, *options), (x2, _, w2, *_) = arguments(norm), arguments(other)
    _replace(edit, norm, other, FORWARD_PAIR, (x, w, x2, w2, *options), {0: 0, 2: 1})


def _pair_backward(edit: Edit, norm: Node, other: Node) -> None:
    (dy, _, x, w, rstd, *options), (dy2, _, x2, w2, rstd2, *_) = arguments(norm), arguments(other)
    _replace(edit, norm, other, BACKWARD_PAIR, (dy, x, w, rstd, dy2, x2, w2, rstd2, *options), {0: 0, 1: 1})


def _replace(edit: Edit, norm: Node, other: Node, target: Any, args: tuple[Any, ...], places: dict[int, int]) -> None:
    """Replace two calls by one in the place of the first; `places`: their outputs among those of one norm of a pair."""
    call = edit.call(norm, target, args, norm)
    for number, replaced in enumerate((norm, other)):
        found = outputs(replaced)
        for i, output in found:
            new = edit.output(norm, call, 2 * number + places[i], output)
            output.replace_all_uses_with(new)
        edit.erase(*(output for _, output in found))
    edit.erase(norm, other)
