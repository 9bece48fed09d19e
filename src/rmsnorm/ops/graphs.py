"""Reading and rewriting graphs of torch.fx that hold the operators of this package."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

FORWARD = torch.ops.rmsnorm.forward.default
BACKWARD = torch.ops.rmsnorm.backward.default
BACKWARD_OF_SUM = torch.ops.rmsnorm.backward_of_sum.default
FORWARD_SANDWICH = torch.ops.rmsnorm.forward_sandwich.default
FORWARD_PAIR = torch.ops.rmsnorm.forward_pair.default
BACKWARD_PAIR = torch.ops.rmsnorm.backward_pair.default
VIEW = torch.ops.aten.view.default
# Operators that give the same elements, in the same order, another shape.
RESHAPES = {VIEW, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default}

# Metadata that describes the values which a node computed or read. It is no longer right after the node was replaced.
_OF_OTHER_VALUES = "tensor_meta", "eager_input_vals"
# Metadata with which activation checkpointing says what the backward pass recomputes.
CHECKPOINTING = "recompute", "ac_graph_id"


class Edit:
    """Rewrites a graph and knows the order of its nodes, because a new call must come after all nodes that it reads."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._place: dict[Node, float] = {node: i for i, node in enumerate(graph.nodes)}

    def call(self, before: Node, target: Any, args: tuple[Any, ...], of: Node) -> Node:
        """Insert a call in front of the node `before`, with the metadata of the node `of`."""
        with self._graph.inserting_before(before):
            node: Node = self._graph.call_function(target, args)
        self._place[node] = self._place[before] - 0.5
        node.meta = dict(of.meta)
        with torch.no_grad():
            node.meta["val"] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
        for key in _OF_OTHER_VALUES:
            node.meta.pop(key, None)
        return node

    def output(self, before: Node, call: Node, number: int, of: Node) -> Node:
        """Insert a node that takes one output of a call."""
        return self.call(before, operator.getitem, (call, number), of)

    def move(self, nodes: Iterable[Node], before: Node) -> None:
        """Move nodes in front of the node `before`, in their order in the graph."""
        for node in sorted(nodes, key=self._place.__getitem__):
            before.prepend(node)
            self._place[node] = self._place[before] - 0.5

    def needed_between(self, nodes: Iterable[Node], start: Node) -> set[Node]:
        """What these nodes depend on that comes after `start`, the nodes themselves included."""
        found: set[Node] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in found and self._place[node] > self._place[start]:
                found.add(node)
                waiting.extend(node.all_input_nodes)
        return found

    def erase(self, *nodes: Any) -> None:
        """Erase those of the nodes that nothing uses."""
        for node in nodes:
            if isinstance(node, Node) and node.op == "call_function" and not node.users and node in self._place:
                del self._place[node]
                self._graph.erase_node(node)

    def first(self, nodes: Iterable[Node]) -> Node:
        """The node that comes first in the graph."""
        return min(nodes, key=self._place.__getitem__)

    def precedes(self, nodes: Iterable[Node | None], later: Node) -> bool:
        """Whether all of the nodes come before another."""
        return all(node is None or self._place[node] < self._place[later] for node in nodes)


def may_fuse(norm: Any) -> bool:
    """Whether a call of the forward operator was traced with `fuse_residual`."""
    return isinstance(norm, Node) and norm.target is FORWARD and bool(norm.kwargs.get("fuse_residual"))


def call_of(output: Any) -> Node | None:
    """The call of which a node takes one output; None for any other node."""
    return arguments(output)[0] if isinstance(output, Node) and output.target is operator.getitem else None


def arguments(node: Node) -> tuple[Any, ...]:
    """The arguments of a node, typed Any instead of the union of all types that they could have."""
    return node.args


def outputs(call: Node) -> list[tuple[int, Node]]:
    """The nodes that take single outputs of a call, each with the output's number."""
    return [(arguments(user)[1], user) for user in call.users]
