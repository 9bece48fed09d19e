"""Fuses additions with norms in a graph that torch.compile has made of a model.

    s = a + b;  y = forward(s)                       ->  y, s = forward(a, b)
    h = forward(x);  y, s = forward(h, b)            ->  y, s = forward_sandwich(x, b)
    dy = a + b + c;  dx = backward(dy);  dx + ds     ->  dx + ds = backward_of_sum([a, b, c], ds)

No rewriting changes the bits that eager mode gives: the fused operators round after each addition, as the separate
additions do. The pass matches our own operators, which no release of torch decomposes, in the joint graph of forward
and backward pass, or in the graph of a forward pass without gradients. inductor.py runs it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rmsnorm.ops.graphs import (
    BACKWARD,
    BACKWARD_OF_SUM,
    CHECKPOINTING,
    FORWARD,
    FORWARD_SANDWICH,
    RESHAPES,
    VIEW,
    Edit,
    arguments,
    call_of,
    may_fuse,
    outputs,
)  # fmt: skip
from rmsnorm.spec import KERNEL_DTYPES

_ADD = torch.ops.aten.add.Tensor


def fuse(graph: Graph) -> None:
    """Fuse, in place, the norms of a graph that were traced with `fuse_residual`."""
    edit = Edit(graph)
    # Backward first: it finds the forward call of a norm by its rstd, which fusing the forward call may reshape.
    for node in graph.find_nodes(op="call_function", target=BACKWARD):
        _fuse_backward(edit, node)
    for node in graph.find_nodes(op="call_function", target=FORWARD):
        _fuse_forward(edit, node)
    for node in graph.find_nodes(op="call_function", target=FORWARD):
        _fuse_sandwich(edit, node)


def _fuse_forward(edit: Edit, norm: Node) -> None:
    """Fuse a norm with the addition that computes its x, if the kernel can make it."""
    x, residual, w, *options = arguments(norm)
    total = _source(x)
    if residual is not None or not may_fuse(norm) or not _is_sum(total) or not _are_rows_of(x, total):
        return
    if any(map(_is_fused_by_inductor, arguments(total))):
        return
    first = edit.first(total.users)
    if not edit.precedes([w], first) or any(total.meta.get(k) != norm.meta.get(k) for k in CHECKPOINTING):
        return
    fused = edit.call(first, FORWARD, (*arguments(total), w, *options), norm)
    fused.kwargs = norm.kwargs
    s = edit.output(first, fused, 1, total)
    total.replace_all_uses_with(s, delete_user_cb=lambda user: user is not fused)
    found = outputs(norm)
    for i, output in found:
        new = edit.output(output, fused, i, output)
        if x is not total:
            shape = list(arguments(x)[1])
            new = edit.call(output, VIEW, (new, shape if i == 0 else shape[:-1]), output)
        output.replace_all_uses_with(new)
    edit.erase(*(output for _, output in found), norm, x, total)


class _NormBefore(NamedTuple):
    """A call of a norm, its output h, and what is added to h."""

    call: Node
    h: Node
    residual: Node


def _fuse_sandwich(edit: Edit, norm: Node) -> None:
    """Fuse a norm that adds a residual with the norm before it whose output it adds, if nothing else reads that."""
    before = _norm_before(norm)
    if before is None:
        return
    rstds = [output for i, output in outputs(before.call) if i == 2]
    if not all(edit.precedes([norm], user) for rstd in rstds for user in rstd.users):
        return
    replaced = [((0, 1, 3)[i], output) for i, output in outputs(norm)] + [(2, rstd) for rstd in rstds]
    _, _, w, *options = arguments(norm)
    x, _, w_before, *_ = arguments(before.call)
    call = edit.call(norm, FORWARD_SANDWICH, (x, w_before, before.residual, w, *options), norm)
    for i, output in replaced:
        output.replace_all_uses_with(edit.output(norm, call, i, output))
    edit.erase(*(output for _, output in replaced), norm, before.h, before.call)


def _norm_before(norm: Node) -> _NormBefore | None:
    """The norm whose output another norm adds to a residual, if one operator can do both and nothing else reads it."""
    a, b, _, *options = arguments(norm)
    if b is None or not may_fuse(norm):
        return None
    for h, residual in ((a, b), (b, a)):
        call = call_of(h)
        if call is None or not may_fuse(call) or h is residual or _only_user(h) is not norm:
            continue
        x, added, _, *options_before = arguments(call)
        values = [node.meta["val"] for node in (x, h, residual)]
        if (
            arguments(h)[1] == 0
            and added is None
            and options == options_before
            and all(value.dtype is values[0].dtype and _same(value.shape, values[0].shape) for value in values)
            and all(call.meta.get(key) == norm.meta.get(key) for key in CHECKPOINTING)
        ):
            return _NormBefore(call, h, residual)
    return None


def _fuse_backward(edit: Edit, norm: Node) -> None:
    """Fuse the backward pass of a norm with additions before and after it, if there are any."""
    dy, ds, x, w, rstd, *options = arguments(norm)
    if ds is not None or not may_fuse(call_of(rstd)):
        return
    found = outputs(norm)
    after = _addition_after(found, x)
    summands = _summands(dy)
    if after is None and len(summands) == 1:
        return
    readers = [user for i, output in found for user in output.users if i == 1 or after is None]
    first = edit.first([*readers, *([] if after is None else [after.sum])])
    if after is not None and not edit.precedes([after.ds], first):
        return
    if after is not None:
        ds = after.ds
        if after.view is not None:
            ds = edit.call(first, VIEW, (ds, list(arguments(x)[1])), after.dx)
    fused = edit.call(first, BACKWARD_OF_SUM, (summands, ds, x, w, rstd, *options), norm)
    for i, output in found:
        new = edit.output(first, fused, i, output)
        if i == 1 or after is None:
            output.replace_all_uses_with(new)
        else:
            if after.view is not None:
                new = edit.call(after.sum, VIEW, (new, list(arguments(after.view)[1])), after.sum)
            after.sum.replace_all_uses_with(new)
    edit.erase(*([] if after is None else [after.sum, after.view]), *(output for _, output in found), norm)
    edit.erase(dy, *arguments(dy)[:2])


class _Addition(NamedTuple):
    """An addition to dx or to a view of dx."""

    dx: Node
    view: Node | None
    ds: Node
    sum: Node


def _addition_after(found: Sequence[tuple[int, Node]], x: Node) -> _Addition | None:
    """The only use of a norm's dx, if it is an addition that the backward kernel can make."""
    dxs = [output for i, output in found if i == 0]
    if len(dxs) != 1 or (end := _only_user(dxs[0])) is None:
        return None
    view = end if end.target in RESHAPES else None
    total = end if view is None else _only_user(view)
    if total is None or not _is_sum(total):
        return None
    operand = dxs[0] if view is None else view
    others = [node for node in arguments(total) if node is not operand]
    if len(others) != 1 or (view is not None and not (x.target in RESHAPES and _are_rows_of(dxs[0], total))):
        return None
    return _Addition(dxs[0], view, others[0], total)


def _summands(dy: Node) -> list[Node]:
    """The two or three tensors whose sum is dy; dy alone if it is not a sum, or if Inductor should compute the sum."""
    if not _is_sum_used_once(dy):
        return [dy]
    a, b = summands = list(arguments(dy))
    for inner, outer in ((a, b), (b, a)):
        if inner is not outer and _is_sum_used_once(inner):
            summands = [*arguments(inner), outer]
            break
    return [dy] if any(map(_is_fused_by_inductor, summands)) else summands


def _source(node: Node) -> Node:
    """What a node is a view of; itself if it is no view."""
    while node.target in RESHAPES:
        node = arguments(node)[0]
    return node


def _only_user(node: Node) -> Node | None:
    """The only user of a node, if it reads the node once; otherwise None."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].all_input_nodes.count(node) == 1 else None


def _is_sum(node: Node) -> bool:
    """Whether a node adds two tensors of the same shape and dtype, which kernels support, to a contiguous result."""
    if node.target is not _ADD or len(arguments(node)) != 2 or node.kwargs:
        return False
    values: list[Any] = [n.meta.get("val") if isinstance(n, Node) else None for n in (node, *arguments(node))]
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
    """Whether a view has the same rows (last dimension) as the tensor that it views."""
    a, b = viewed.meta["val"], node.meta["val"]
    return a.dim() > 0 and b.dim() > 0 and statically_known_true(a.shape[-1] == b.shape[-1])


def _is_fused_by_inductor(operand: Node) -> bool:
    """Whether Inductor would compute an operand in the same kernel as the addition, if the addition stays separate.

    That saves one write and one read of the operand, which is more than fusing the addition with the norm saves.
    """
    source = _source(operand)
    pointwise = isinstance(source.target, torch._ops.OpOverload) and torch.Tag.pointwise in source.target.tags
    return pointwise and len(operand.users) == 1 and len(source.users) == 1
