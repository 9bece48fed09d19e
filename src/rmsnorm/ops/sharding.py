"""The operators' rules for DTensors, as FSDP2, tensor parallelism and sequence parallelism use them.

Imported only once torch.distributed.tensor is. Along each dimension of the mesh x is replicated, sharded by rows, or
sharded by columns (the hidden dimension):

    x            weight               y, s, dx   rstd         dw             communication
    Replicate    Replicate            Replicate  Replicate    Replicate      none
    Shard(row)   Replicate            as x       Shard(row)   Partial(sum)   none
    Shard(-1)    Shard(0), Replicate  as x       Replicate    Shard(0)       one fp64 number a row, in each direction

If each head has its own weight, (H, N), the weight is sharded as the last two dimensions of x are, or replicated. Heads
that are sharded need no communication.

A row that is sharded by columns has the same bits as a whole row, because the ranks exchange partial sums in fp64,
where the order of summation does not change the rounded result.
"""

import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from rmsnorm import reference
from rmsnorm.errors import complaint
from rmsnorm.spec import caller, check_gradients, check_memory, check_spec, check_tensors

# One placement for each dimension of the mesh.
Layout = tuple[Placement, ...]


# --- the rules -----------------------------------------------------------------------------------------------


def is_sharded_by_columns(x: Any, residual: Any, w: Any) -> bool | None:
    """Whether each row of these DTensors is spread over several ranks, for `explain`; None if there is no DTensor."""
    if not any(isinstance(t, DTensor) for t in (x, residual, w)):
        return None
    return Shard(x.dim() - 1) in _layout("explain", x, residual, w)


@torch.no_grad()
def _forward(
    x: Any, residual: Any, w: Any, eps: float, cast: str, offset: float, with_rstd: bool, **hints: bool
) -> tuple[DTensor, DTensor, DTensor]:
    where = caller(residual)
    layout = _layout(where, x, residual, w)
    check_spec(where, 0.0 if isinstance(eps, torch.SymFloat) else eps, cast, offset)
    check_tensors(where, x, residual, w, offset, symbolic=True)
    mesh, shape, last = x.device_mesh, x.shape, x.dim() - 1
    w = _local(w, _of_weight(layout, x, w))
    x, residual = _local(x, layout), _local(residual, layout)
    if Shard(last) in layout:
        s, S = _begin_forward(x, residual)
        S = _over_ranks(S, mesh, layout, shape)
        y, rstd = _finish_forward(x if residual is None else s, w, S, shape[-1], eps, cast, offset)
    else:
        y, s, rstd = torch.ops.rmsnorm.forward.default(x, residual, w, eps, cast, offset, with_rstd, **hints)
    nothing = (Replicate(),) * mesh.ndim
    return (
        as_whole(y, mesh, layout, shape),
        as_whole(s, mesh, layout, shape) if residual is not None else as_whole(s, mesh, nothing, s.shape),
        as_whole(rstd, mesh, _of_rows(layout, last), shape[:-1])
        if with_rstd
        else as_whole(x.new_empty(0), mesh, nothing, (0,)),
    )


@torch.no_grad()
def _backward(
    dy: Any, ds: Any, x: Any, w: Any, rstd: Any, cast: str, offset: float, need_dx: bool, need_dw: bool
) -> tuple[DTensor, DTensor]:
    layout = _layout("rms_norm", x, None, w)
    check_spec("rms_norm", 0.0, cast, offset)
    check_gradients("rms_norm", dy, ds, x, w, rstd, offset, need_dw, symbolic=True)
    mesh, shape, last = x.device_mesh, x.shape, x.dim() - 1
    of_w, w_shape = _of_weight(layout, x, w), () if w is None else w.shape
    dy, ds, x = (_local(t, layout) for t in (dy, ds, x))
    w, rstd = _local(w, of_w), _local(rstd, _of_rows(layout, last))
    if Shard(last) in layout:
        S = _over_ranks(_begin_backward(dy, x, w, rstd, offset), mesh, layout, shape) if need_dx else None
        dx, dw = _finish_backward(dy, ds, x, w, rstd, S, shape[-1], cast, offset, need_dw)
    else:
        dx, dw = torch.ops.rmsnorm.backward.default(dy, ds, x, w, rstd, cast, offset, need_dx, need_dw)
    nothing = (Replicate(),) * mesh.ndim
    of_dw = tuple(
        Partial() if q == Replicate() and _dim(p) is not None else q for p, q in zip(layout, of_w, strict=True)
    )  # fmt: skip
    return (
        as_whole(dx, mesh, layout, shape) if need_dx else as_whole(dx, mesh, nothing, (0,)),
        as_whole(dw, mesh, of_dw, w_shape) if need_dw and w is not None else as_whole(dw, mesh, nothing, (0,)),
    )


def _layout(where: str, x: Any, residual: Any, w: Any) -> Layout:
    """The layout for x and the residual: x's, or along mesh dimensions where x is not sharded, the residual's.

    Partial placements are summed (replicated).

    Raises:
        ValueError: if the placements or meshes do not fit together; on every rank alike.
    """
    present = {name: t for name, t in (("x", x), ("residual", residual), ("weight", w)) if t is not None}
    name, given = next((name, t) for name, t in present.items() if isinstance(t, DTensor))
    where_given = f"the mesh of {name}, which is {given.device_mesh} with placements {given.placements}"
    for other, t in present.items():
        if not isinstance(t, DTensor):
            fix = f"a DTensor on {where_given}: distribute_tensor({other}, …), parallelize_module for the norm, or, "
            fix += "where fully_shard holds the weight, a call of the module that it was given"
            raise ValueError(complaint(where, other, "is a plain tensor", fix))
        if t.device_mesh != given.device_mesh:
            was = f"is on the mesh {t.device_mesh} with placements {t.placements}"
            raise ValueError(complaint(where, other, was, f"{where_given}: distribute both on one mesh"))
    layout, last = [], x.dim() - 1
    shared = x.dim() - (1 if w is None else w.dim())  # dimensions of x that the weight does not have
    for i, p in enumerate(x.placements):
        q = p if residual is None else residual.placements[i]
        if _dim(p) is not None and _dim(q) is not None and p != q:
            fix = f"{x.placements}, those of x: residual.redistribute(placements=x.placements)"
            raise ValueError(complaint(where, "residual", f"has placements {residual.placements}", fix))
        p = next((one for one in (p, q) if _dim(one) is not None), Replicate())
        dim = _dim(p)
        if dim is not None and dim >= shared and p != Shard(dim):
            of = "hidden dimension" if dim == last else "dimension of the heads"
            fix = f"Shard or Replicate in the {of}: x.redistribute(placements=…)"
            raise ValueError(complaint(where, "x", f"has placements {x.placements}", fix))
        fitting = (Replicate(), *([Shard(dim - shared)] if dim is not None and dim >= shared else []))
        if w is not None and w.placements[i] not in fitting:
            fix = f"{' or '.join(map(repr, fitting))} on mesh dimension {i}, as x has {x.placements}: "
            fix += "redistribute the weight, or shard the same dimension of x too"
            raise ValueError(complaint(where, "weight", f"has placements {w.placements}", fix))
        layout.append(p)
    return tuple(layout)


def _dim(p: Placement) -> int | None:
    """The tensor dimension that a placement shards, or None. Includes the strided shards of FSDP and views."""
    return getattr(p, "dim", None)


def _of_weight(layout: Layout, x: Any, w: Any) -> Layout:
    """The layout of the weight, and of its gradient before that is summed: x's in the dimensions that both have."""
    shared = x.dim() - (1 if w is None else w.dim())
    dims = [_dim(p) for p in layout]
    return tuple(Replicate() if dim is None or dim < shared else Shard(dim - shared) for dim in dims)


def _of_rows(layout: Layout, last: int) -> Layout:
    return tuple(Replicate() if p == Shard(last) else p for p in layout)


def _local(t: DTensor | None, layout: Layout) -> Tensor | None:
    if t is None:
        return None
    return (t if t.placements == layout else t.redistribute(placements=layout)).to_local()


def as_whole(t: Tensor, mesh: Any, layout: Layout, shape: Sequence[int]) -> DTensor:
    """The DTensor of the given global shape whose local part is t."""
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(t, mesh, layout, run_check=False, shape=torch.Size(shape), stride=stride)


def _over_ranks(S: Tensor, mesh: Any, layout: Layout, shape: Sequence[int]) -> Any:
    """Adds each rank's sums over its columns to sums over whole rows: the only all-reduce."""
    last = len(shape) - 1
    partial = tuple(Partial() if p == Shard(last) else p for p in layout)
    return _local(as_whole(S, mesh, partial, shape[:-1]), _of_rows(layout, last))


# --- arithmetic of rows sharded by columns, as operators that are opaque to compilers --------------------------

_ARGUMENTS = {"rows": "x", "w": "weight"}  # their names in error messages


def _begin_forward(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(s, Σ s²) with the sum in fp64; without a residual, an empty tensor and Σ x²."""
    s = x.new_empty(0) if residual is None else (x + residual).contiguous()
    return s, reference.sum_of_squares(x if residual is None else s)


def _finish_forward(
    rows: Tensor, w: Tensor | None, S: Tensor, N: int, eps: float, cast: str, offset: float
) -> tuple[Tensor, Tensor]:
    rstd = reference.rstd_of(S, N, eps)
    return reference.normalize(rows, w, rstd, cast, offset).contiguous(), rstd


def _begin_backward(dy: Tensor, x: Tensor, w: Tensor | None, rstd: Tensor, offset: float) -> Tensor:
    g, xh = reference.products(dy, x, w, rstd, offset)
    return reference.dot(g, xh)


def _finish_backward(
    dy: Tensor,
    ds: Tensor | None,
    x: Tensor,
    w: Tensor | None,
    rstd: Tensor,
    S: Tensor | None,
    N: int,
    cast: str,
    offset: float,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    g, xh = reference.products(dy, x, w, rstd, offset)
    return (
        x.new_empty(0) if S is None else reference.input_gradient(g, xh, rstd, S, N, ds, x.dtype),
        reference.weight_gradient(dy, xh, x.dtype, w, cast) if need_dw and w is not None else x.new_empty(0),
    )


def _opaque(function: Any) -> Any:
    names = [_ARGUMENTS.get(name, name) for name in inspect.signature(function).parameters]

    @functools.wraps(function)
    def checked(*args: Any) -> Any:
        tensors = {name: a for name, a in zip(names, args, strict=True) if isinstance(a, Tensor)}
        check_memory("rms_norm", backward="backward" in function.__name__, **tensors)
        return function(*args)

    op = torch.library.custom_op(f"rmsnorm::{function.__name__.lstrip('_')}_in_parts", checked, mutates_args=())
    op.register_fake(function)  # the function is plain torch, so it also computes the shapes
    return op


_begin_forward, _finish_forward, _begin_backward, _finish_backward = map(
    _opaque, (_begin_forward, _finish_forward, _begin_backward, _finish_backward)
)

for _name, _rule in (("forward", _forward), ("backward", _backward)):
    torch.library.register_torch_dispatch(
        f"rmsnorm::{_name}", DTensor, lambda cls, op, types, args, kwargs, rule=_rule: rule(*args, **(kwargs or {}))
    )
