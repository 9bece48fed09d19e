"""Fuses additions with norms in a graph that torch.compile has made of a model.

    s = a + b;  y = forward(s)                       ->  y, s = forward(a, b)
    dy = a + b + c;  dx = backward(dy);  dx + ds     ->  dx + ds = backward_of_sum([a, b, c], ds)

Every rewriting keeps the bits that the graph has in eager mode: the fused operators round after each addition, as the
separate additions do. It matches our own operators, which no release of torch decomposes, in the joint graph of the
forward and the backward pass, or in the graph of an inference. inductor.py runs it.
"""

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rmsnorm.spec import KERNEL_DTYPES

_FORWARD = torch.ops.rmsnorm.forward.default
_BACKWARD = torch.ops.rmsnorm.backward.default
_BACKWARD_OF_SUM = torch.ops.rmsnorm.backward_of_sum.default
_ADD = torch.ops.aten.add.Tensor
_VIEW = torch.ops.aten.view.default
_VIEWS = _VIEW, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default

_MOST_SUMMANDS = 3  # of dy that backward_of_sum takes
# Metadata by which activation checkpointing says what the backward pass computes again.
_CHECKPOINTING = "recompute", "ac_graph_id"

# Metadata of a node that describes the values it computed or read, which are others after it was replaced.
_OF_OTHER_VALUES = "tensor_meta", "eager_input_vals"


class Fused(NamedTuple):
    """How many norms a graph now computes together with additions, in each direction."""

    forward: int
    backward: int


def fuse(graph: Graph) -> Fused:
    """Fuse the norms of a graph, in place, that were traced with `fuse_residual`."""
    fusion = _Fusion(graph)
    # Backward first: it finds the forward call of a norm by its rstd, which fusing the forward call may reshape.
    backward = sum(fusion.fuse_backward(node) for node in graph.find_nodes(op="call_function", target=_BACKWARD))
    forward = sum(fusion.fuse_forward(node) for node in graph.find_nodes(op="call_function", target=_FORWARD))
    for node in graph.find_nodes(op="call_function", target=_FORWARD):
        node.kwargs = {}  # only `fuse_residual`, which has served; a call is faster without it
    return Fused(forward, backward)


class _Fusion:
    """The rewritings of one graph, with the order of its nodes: a fused call must follow all that it reads."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.place: dict[Node, float] = {node: i for i, node in enumerate(graph.nodes)}

    def fuse_forward(self, norm: Node) -> bool:
        """Fuse a norm with the addition that computes its x. Returns whether it did."""
        x, residual, w, *options = _args(norm)
        total = _source(x)
        if residual is not None or not _may_fuse(norm) or not _is_sum(total) or not _are_rows_of(x, total):
            return False
        if any(map(_is_fused_by_inductor, _args(total))):
            return False
        first = self._first(total.users)
        if not self._precedes([w], first) or any(total.meta.get(k) != norm.meta.get(k) for k in _CHECKPOINTING):
            return False
        fused = self._call(first, _FORWARD, (*_args(total), w, *options), norm)
        s = self._call(first, operator.getitem, (fused, 1), total)
        total.replace_all_uses_with(s, delete_user_cb=lambda user: user is not fused)
        outputs = _outputs(norm)
        for i, output in outputs:
            new = self._call(output, operator.getitem, (fused, i), output)
            if x is not total:
                shape = list(_args(x)[1])
                new = self._call(output, _VIEW, (new, shape if i == 0 else shape[:-1]), output)
            output.replace_all_uses_with(new)
        self._erase(*(output for _, output in outputs), norm, x, total)
        return True

    def fuse_backward(self, norm: Node) -> bool:
        """Fuse the backward pass of a norm with additions before and after it. Returns whether it did."""
        dy, ds, x, w, rstd, *options = _args(norm)
        if ds is not None or not _may_fuse(_getitem_source(rstd)):
            return False
        outputs = _outputs(norm)
        after = _addition_after(outputs, x)
        summands = _summands(dy)
        if after is None and len(summands) == 1:
            return False
        readers = [user for i, output in outputs for user in output.users if i == 1 or after is None]
        first = self._first([*readers, *([] if after is None else [after.sum])])
        if after is not None and not self._precedes([after.ds], first):
            return False
        if after is not None:
            ds = after.ds
            if after.view is not None:
                ds = self._call(first, _VIEW, (ds, list(_args(x)[1])), after.dx)
        fused = self._call(first, _BACKWARD_OF_SUM, (summands, ds, x, w, rstd, *options), norm)
        for i, output in outputs:
            new = self._call(first, operator.getitem, (fused, i), output)
            if i == 1 or after is None:
                output.replace_all_uses_with(new)
            else:
                if after.view is not None:
                    new = self._call(after.sum, _VIEW, (new, list(_args(after.view)[1])), after.sum)
                after.sum.replace_all_uses_with(new)
        self._erase(*([] if after is None else [after.sum, after.view]), *(output for _, output in outputs), norm)
        self._erase(dy, *_args(dy)[:2])
        return True

    # --- editing the graph ---------------------------------------------------------------------------------------

    def _call(self, before: Node, target: Any, args: tuple[Any, ...], of: Node) -> Node:
        """A new call before a node, with the metadata of the node `of`."""
        with self.graph.inserting_before(before):
            node: Node = self.graph.call_function(target, args)
        self.place[node] = self.place[before] - 0.5
        node.meta = dict(of.meta)
        node.meta["val"] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
        for key in _OF_OTHER_VALUES:
            node.meta.pop(key, None)
        return node

    def _erase(self, *nodes: Any) -> None:
        """Erase those of the nodes that nothing uses."""
        for node in nodes:
            if isinstance(node, Node) and node.op == "call_function" and not node.users and node in self.place:
                del self.place[node]
                self.graph.erase_node(node)

    def _first(self, nodes: Iterable[Node]) -> Node:
        return min(nodes, key=lambda node: self.place[node])

    def _precedes(self, nodes: Sequence[Any], later: Node) -> bool:
        return all(node is None or self.place[node] < self.place[later] for node in nodes)


class _Addition(NamedTuple):
    """An addition to dx, which may lie behind a view of dx."""

    dx: Node
    view: Node | None
    ds: Node
    sum: Node


def _addition_after(outputs: Sequence[tuple[int, Node]], x: Node) -> _Addition | None:
    """The only use of a norm's dx, if it is an addition that the backward kernel can make."""
    dxs = [output for i, output in outputs if i == 0]
    if len(dxs) != 1 or (end := _only_user(dxs[0])) is None:
        return None
    view = end if end.target in _VIEWS else None
    total = end if view is None else _only_user(view)
    if total is None or not _is_sum(total):
        return None
    operand = dxs[0] if view is None else view
    others = [node for node in _args(total) if node is not operand]
    if len(others) != 1 or (view is not None and not (x.target in _VIEWS and _are_rows_of(dxs[0], total))):
        return None
    return _Addition(dxs[0], view, others[0], total)


def _summands(dy: Node) -> list[Node]:
    """The tensors whose sum is dy: three, two, or dy alone, if it is no sum or better stays with its summands."""
    if not _is_sum_used_once(dy):
        return [dy]
    a, b = summands = list(_args(dy))
    for inner, outer in ((a, b), (b, a)):
        if inner is not outer and _is_sum_used_once(inner):
            summands = [*_args(inner), outer]
            break
    return [dy] if any(map(_is_fused_by_inductor, summands)) else summands


def _args(node: Node) -> tuple[Any, ...]:
    """The arguments of a node, without the union of all types that they could have."""
    return node.args


def _may_fuse(norm: Node | None) -> bool:
    return norm is not None and norm.target is _FORWARD and bool(norm.kwargs.get("fuse_residual"))


def _outputs(norm: Node) -> list[tuple[int, Node]]:
    """The nodes that take single outputs of a call, each with the output's number."""
    return [(_args(user)[1], user) for user in norm.users]


def _getitem_source(node: Any) -> Node | None:
    return _args(node)[0] if isinstance(node, Node) and node.target is operator.getitem else None


def _source(node: Node) -> Node:
    """What a node is a view of; itself if it is no view."""
    while node.target in _VIEWS:
        node = _args(node)[0]
    return node


def _only_user(node: Node) -> Node | None:
    """The node's user if it has one that reads it once; None if it has more."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].all_input_nodes.count(node) == 1 else None


def _is_sum(node: Node) -> bool:
    """Whether a node adds two tensors of one shape and one dtype of the kernels, with a contiguous result."""
    if node.target is not _ADD or len(_args(node)) != 2 or node.kwargs:
        return False
    values: list[Any] = [n.meta.get("val") if isinstance(n, Node) else None for n in (node, *_args(node))]
    total = values[0]
    return (
        all(isinstance(value, Tensor) for value in values)
        and total.dtype in KERNEL_DTYPES
        and total.dim() > 0
        and all(value.dtype is total.dtype and value.device == total.device for value in values)
        and all(_same(value.shape, total.shape) for value in values)
        and _is_dense(total)
    )


def _is_sum_used_once(node: Node) -> bool:
    return len(node.users) == 1 and _is_sum(node)


def _same(sizes: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether sizes are known to be equal, without a guard on symbolic ones."""
    return len(sizes) == len(others) and all(statically_known_true(a == b) for a, b in zip(sizes, others, strict=True))


def _is_dense(t: Tensor) -> bool:
    """As `Tensor.is_contiguous`, without a guard on symbolic sizes."""
    expected: Any = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if statically_known_true(size == 1):
            continue
        if not statically_known_true(stride == expected):
            return False
        expected = expected * size
    return True


def _are_rows_of(viewed: Node, node: Node) -> bool:
    """Whether a view has the same rows, of the last dimension, as the tensor that it views."""
    a, b = viewed.meta["val"], node.meta["val"]
    return a.dim() > 0 and b.dim() > 0 and statically_known_true(a.shape[-1] == b.shape[-1])


def _is_fused_by_inductor(operand: Node) -> bool:
    """Whether Inductor computes an operand in the kernel of the addition, if the addition stays there.

    That saves one write and one read of the operand, more than fusing the addition with the norm.
    """
    source = _source(operand)
    pointwise = isinstance(source.target, torch._ops.OpOverload) and torch.Tag.pointwise in source.target.tags
    return pointwise and len(operand.users) == 1 and len(source.users) == 1
