"""Recomputes norm outputs in the backward pass of a graph that torch.compile has made.

    y = forward(x);  y @ a;  dz @ y              ->  y = forward(x);  y @ a;  again = forward(x);  dz @ again

The backward pass then reads y from a second call, so y is not kept. The call needs x and the weight, which are kept for
the norm's own backward pass anyway, and gives the same bits. It carries the metadata that activation checkpointing uses
to make torch's partitioner run a node in the backward pass. inductor.py runs this.
"""

from collections.abc import Iterable, Iterator

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from rmsnorm.ops.graphs import FORWARD, RESHAPES, Edit, arguments, outputs

# Operators that return a view of their first argument.
_VIEWS = RESHAPES | {
    torch.ops.aten.permute.default, torch.ops.aten.transpose.int, torch.ops.aten.t.default,
    torch.ops.aten.unsqueeze.default, torch.ops.aten.squeeze.dim, torch.ops.aten.expand.default,
    torch.ops.aten.slice.Tensor, torch.ops.aten.select.int,
}  # fmt: skip


def recompute_outputs(graph: Graph) -> None:
    """Recompute the outputs of norms that were traced with `recompute`, where the backward pass reads them."""
    norms = [node for node in graph.find_nodes(op="call_function", target=FORWARD) if node.kwargs.get("recompute")]
    backward = _reachable(node for node in graph.nodes if node.op == "placeholder" and "tangents" in str(node.target))
    edit = Edit(graph)
    for norm in norms:
        _recompute(edit, norm, backward)


def _recompute(edit: Edit, norm: Node, backward: set[Node]) -> None:
    """Let the readers of y in the backward pass read a second call, if there are such readers."""
    if norm in backward or "recompute" in norm.meta:  # activation checkpointing decides about this norm
        return
    x, residual, w, eps, cast, offset, _ = arguments(norm)
    found = dict(outputs(norm))
    if 0 not in found or (residual is not None and 1 not in found):
        return
    y, rows = found[0], x if residual is None else found[1]
    views = [y, *_views_of(y, backward)]
    readers = [(view, user) for view in views for user in view.users if user in backward]
    if not readers or any(user.op == "output" for view in views for user in view.users):
        return  # the graph returns y, so its caller may keep it
    place = edit.first(user for _, user in readers)
    again = edit.call(place, FORWARD, (rows, None, w, eps, cast, offset, False), norm)
    copies = {y: edit.output(place, again, 0, y)}
    for view in views[1:]:
        source, *rest = arguments(view)
        copies[view] = edit.call(place, view.target, (copies[source], *rest), view)
    for node in (again, *copies.values()):
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    for view, user in readers:
        user.replace_input_with(view, copies[view])
    edit.erase(*reversed(copies.values()))


def _views_of(node: Node, backward: set[Node]) -> Iterator[Node]:
    """The views of a node in the forward pass, each after the node that it views."""
    for user in node.users:
        if user.target in _VIEWS and user not in backward and user.args[0] is node:
            yield user
            yield from _views_of(user, backward)


def _reachable(nodes: Iterable[Node]) -> set[Node]:
    """The nodes that depend on these, except the graph's output."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found and node.op != "output":
            found.add(node)
            waiting.extend(node.users)
    return found
