"""The operators' rules for DTensors, as FSDP2, tensor parallelism and sequence parallelism use them.

This module is imported only after torch.distributed.tensor. Along each dimension of the mesh, x is replicated, sharded
by rows, or sharded by columns (the hidden dimension):

    x            weight               y, s, dx   rstd         dw             communication
    Replicate    Replicate            Replicate  Replicate    Replicate      none
    Shard(row)   Replicate            as x       Shard(row)   Partial(sum)   none
    Shard(-1)    Shard(0), Replicate  as x       Replicate    Shard(0)       one fp64 number a row, in each pass

If each head has its own weight, (H, N), the weight is sharded as the last two dimensions of x are, or replicated.
Sharded heads need no communication.

A row that is sharded by columns has the same bits as a whole row, because the ranks exchange partial sums in fp64,
where the order of summation does not change the rounded result. A kernel runs on each side of the all-reduce (see
parts.py). Two norms of one call of `rms_norms` share the all-reduce.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from rmsnorm import compat
from rmsnorm.errors import complaint
from rmsnorm.spec import caller, check_gradients, check_spec, check_tensors

# One placement for each dimension of the mesh.
Layout = tuple[Placement, ...]


# --- the rules -----------------------------------------------------------------------------------------------


def part_of_columns(x: Any, residual: Any, w: Any) -> int | None:
    """How many columns of each row this rank has, for `explain`; None unless they are sharded by columns."""
    layout, last = _layout("explain", x, residual, w), x.dim() - 1
    n: int = x.shape[last]
    for i, p in enumerate(layout):
        if p == Shard(last):  # as torch.chunk divides
            size = -(-n // x.device_mesh.size(i))
            n = max(0, min(size, n - size * x.device_mesh.get_local_rank(i)))
    return n if Shard(last) in layout else None


@torch.no_grad()
def _forward(
    x: Any, residual: Any, w: Any, eps: float, cast: str, offset: float, with_rstd: bool, **hints: bool
) -> tuple[Tensor, Tensor, Tensor]:
    norm = _check_forward(x, residual, w, eps, cast, offset)
    if norm.by_columns:
        return _forward_by_columns([norm], eps, cast, offset, with_rstd)[0]
    local = (norm.local(x), norm.local(residual), norm.local_weight(w))
    y, s, rstd = torch.ops.rmsnorm.forward.default(*local, eps, cast, offset, with_rstd, **hints)
    return norm.outputs(y, None if residual is None else s, rstd if with_rstd else None)


@torch.no_grad()
def _forward_pair(
    x: Any, w: Any, x2: Any, w2: Any, eps: float, cast: str, offset: float, with_rstd: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norms = [_check_forward(rows, None, weight, eps, cast, offset) for rows, weight in ((x, w), (x2, w2))]
    if _share_sums(*norms):
        found = _forward_by_columns(norms, eps, cast, offset, with_rstd)
    else:
        found = [_forward(rows, None, weight, eps, cast, offset, with_rstd) for rows, weight in ((x, w), (x2, w2))]
    (y, _, rstd), (y2, _, rstd2) = found
    return y, rstd, y2, rstd2


@torch.no_grad()
def _backward(
    dy: Any, ds: Any, x: Any, w: Any, rstd: Any, cast: str, offset: float, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    norm = _check_backward(dy, ds, x, w, rstd, cast, offset, need_dw)
    if norm.by_columns and need_dx:
        return _backward_by_columns([norm], [(dy, ds, rstd)], cast, offset, need_dw)[0]
    dy, ds, x, w, rstd = norm.local(dy), norm.local(ds), norm.local(x), norm.local_weight(w), norm.local_rstd(rstd)
    if x.shape[-1] == 0:  # without columns and without need of sums over ranks, there is nothing to compute
        return norm.gradients(None, torch.zeros_like(w) if need_dw and w is not None else None)
    dx, dw = torch.ops.rmsnorm.backward.default(dy, ds, x, w, rstd, cast, offset, need_dx, need_dw)
    return norm.gradients(dx if need_dx else None, dw if need_dw and w is not None else None)


@torch.no_grad()
def _backward_pair(
    dy: Any, x: Any, w: Any, rstd: Any, dy2: Any, x2: Any, w2: Any, rstd2: Any, cast: str, offset: float, need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = (dy, None, x, w, rstd), (dy2, None, x2, w2, rstd2)
    norms = [_check_backward(*one, cast, offset, need_dw) for one in given]
    if need_dx and _share_sums(*norms):
        found = _backward_by_columns(norms, [(dy, None, rstd), (dy2, None, rstd2)], cast, offset, need_dw)
    else:
        found = [_backward(*one, cast, offset, need_dx, need_dw) for one in given]
    return *found[0], *found[1]


@dataclass(frozen=True)
class _Norm:
    """One norm of DTensors that were checked: its tensors, and how they are sharded.

    layout: that of x, the residual, and every tensor of their shape.
    """

    x: Any
    residual: Any
    w: Any
    layout: "Layout"

    @property
    def mesh(self) -> Any:
        return self.x.device_mesh

    @property
    def N(self) -> int:
        """The width of whole rows."""
        return self.x.shape[-1]  # type: ignore[no-any-return]

    @property
    def last(self) -> int:
        return self.x.dim() - 1  # type: ignore[no-any-return]

    @property
    def by_columns(self) -> tuple[int, ...]:
        """The dimensions of the mesh over which each row is spread; none if every rank has whole rows."""
        return tuple(i for i, p in enumerate(self.layout) if p == Shard(self.last))

    def local(self, t: Any) -> Any:
        return _local(t, self.layout)

    def local_weight(self, w: Any) -> Any:
        return _local(w, _of_weight(self.layout, self.x, self.w))

    def local_rstd(self, rstd: Any) -> Any:
        return _local(rstd, _of_rows(self.layout, self.last))

    def outputs(self, y: Tensor, s: Tensor | None, rstd: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs of the forward pass from the local ones; None for one that was not requested."""
        shape, of_rows = self.x.shape, _of_rows(self.layout, self.last)
        return (
            as_whole(y, self.mesh, self.layout, shape),
            y.new_empty(0) if s is None else as_whole(s, self.mesh, self.layout, shape),
            y.new_empty(0) if rstd is None else as_whole(rstd, self.mesh, of_rows, shape[:-1]),
        )

    def gradients(self, dx: Tensor | None, dw: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradients from the local ones; None for one that was not requested."""
        of_w = _of_weight(self.layout, self.x, self.w)
        of_dw = tuple(
            Partial() if q == Replicate() and _dim(p) is not None else q for p, q in zip(self.layout, of_w, strict=True)
        )
        absent = self.x.to_local().new_empty
        return (
            absent(0) if dx is None else as_whole(dx, self.mesh, self.layout, self.x.shape),
            absent(0) if dw is None else as_whole(dw, self.mesh, of_dw, self.w.shape),
        )


def _check_forward(x: Any, residual: Any, w: Any, eps: float, cast: str, offset: float) -> _Norm:
    where = caller(residual)
    layout = _layout(where, x, residual, w)
    check_spec(where, 0.0 if isinstance(eps, torch.SymFloat) else eps, cast, offset)
    check_tensors(where, x, residual, w, offset, symbolic=True)
    return _Norm(x, residual, w, layout)


def _check_backward(dy: Any, ds: Any, x: Any, w: Any, rstd: Any, cast: str, offset: float, need_dw: bool) -> _Norm:
    layout = _layout("rms_norm", x, None, w)
    check_spec("rms_norm", 0.0, cast, offset)
    check_gradients("rms_norm", dy, ds, x, w, rstd, offset, need_dw, symbolic=True)
    return _Norm(x, None, w, layout)


# --- rows spread over ranks ----------------------------------------------------------------------------------


def _forward_by_columns(
    norms: Sequence[_Norm], eps: float, cast: str, offset: float, with_rstd: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The outputs of norms whose rows are spread over the same ranks, with one all-reduce for all."""
    parts = []
    for norm in norms:
        x, residual = norm.local(norm.x), norm.local(norm.residual)
        s, S = torch.ops.rmsnorm.begin_forward.default(x, residual)
        parts.append((x if residual is None else s, S))
    found = []
    for norm, (rows, _), S in zip(norms, parts, _summed([S for _, S in parts], norms[0]), strict=True):
        w = norm.local_weight(norm.w)
        y, rstd = torch.ops.rmsnorm.finish_forward.default(rows, w, S, norm.N, eps, cast, offset, with_rstd)
        found.append(norm.outputs(y, None if norm.residual is None else rows, rstd if with_rstd else None))
    return found


def _backward_by_columns(
    norms: Sequence[_Norm], given: Sequence[tuple[Any, Any, Any]], cast: str, offset: float, need_dw: bool
) -> list[tuple[Tensor, Tensor]]:
    """The gradients of norms whose rows are spread over the same ranks, with one all-reduce for all.

    given: dy, ds and rstd of each.
    """
    parts = []
    for norm, (dy, ds, rstd) in zip(norms, given, strict=True):
        dy, ds, x, w, rstd = (
            norm.local(dy), norm.local(ds), norm.local(norm.x), norm.local_weight(norm.w), norm.local_rstd(rstd)
        )  # fmt: skip
        S = torch.ops.rmsnorm.begin_backward.default(dy, x, w, rstd, cast, offset)
        parts.append(((dy, ds, x, w, rstd), S))
    found = []
    for norm, (tensors, _), S in zip(norms, parts, _summed([S for _, S in parts], norms[0]), strict=True):
        dx, dw = torch.ops.rmsnorm.finish_backward.default(*tensors, S, norm.N, cast, offset, need_dw)
        found.append(norm.gradients(dx, dw if need_dw and norm.w is not None else None))
    return found


def _share_sums(first: _Norm, second: _Norm) -> bool:
    """Whether the rows of both norms are spread over the same ranks, so that one all-reduce serves both."""
    return bool(first.by_columns) and first.mesh == second.mesh and first.by_columns == second.by_columns


def _summed(sums: Sequence[Tensor], norm: _Norm) -> list[Tensor]:
    """Turn each rank's sums over its own columns into sums over whole rows, for norms that are spread as this one."""
    if len(sums) == 1:
        return [_over_ranks(sums[0], norm)]
    all_sums = _over_ranks(torch.cat([S.flatten() for S in sums]), norm)
    return [
        part.view(S.shape) for part, S in zip(all_sums.split([S.numel() for S in sums]), sums, strict=True)
    ]  # fmt: skip


def _over_ranks(S: Tensor, norm: _Norm) -> Tensor:
    """The sum of S over the ranks that share rows, by one all-reduce along each dimension of the mesh."""
    for dim in norm.by_columns:
        summed = compat.sum_over_ranks(S, norm.mesh, dim)
        if summed is None:
            layout = tuple(Partial() if i == dim else Replicate() for i in range(norm.mesh.ndim))
            summed = _local(as_whole(S, norm.mesh, layout, S.shape), (Replicate(),) * norm.mesh.ndim)
        S = summed  # type: ignore[assignment]
    return S


# --- layouts -------------------------------------------------------------------------------------------------


def _layout(where: str, x: Any, residual: Any, w: Any) -> Layout:
    """The layout for x and the residual: x's, or the residual's along mesh dimensions where x is not sharded.

    Partial placements become replicated: they are summed.

    Raises:
        ValueError: If the placements or meshes do not fit together. Every rank raises it.
    """
    present = {name: t for name, t in (("x", x), ("residual", residual), ("weight", w)) if t is not None}
    name, given = next((name, t) for name, t in present.items() if isinstance(t, DTensor))

    def where_given() -> str:  # formatted for messages only, because that takes as long as the checks
        return f"the mesh of {name}, which is {given.device_mesh} with placements {given.placements}"

    for other, t in present.items():
        if not isinstance(t, DTensor):
            fix = (
                f"a DTensor on {where_given()}: use distribute_tensor({other}, …), or parallelize_module for the norm; "
            )
            fix += "if fully_shard has sharded the weight, call the module that was passed to fully_shard"
            raise ValueError(complaint(where, other, "is a plain tensor", fix))
        if t.device_mesh != given.device_mesh:
            was = f"is on the mesh {t.device_mesh} with placements {t.placements}"
            raise ValueError(complaint(where, other, was, f"{where_given()}: distribute both on one mesh"))
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


for _name, _rule in (
    ("forward", _forward),
    ("backward", _backward),
    ("forward_pair", _forward_pair),
    ("backward_pair", _backward_pair),
):
    torch.library.register_torch_dispatch(
        f"rmsnorm::{_name}", DTensor, lambda cls, op, types, args, kwargs, rule=_rule: rule(*args, **(kwargs or {}))
    )
