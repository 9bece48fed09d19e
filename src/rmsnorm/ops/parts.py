"""The operators for rows in parts: each rank holds some columns of every row.

    begin_forward   ->  s and S, the sums of squares of the part  ->  all-reduce  ->  finish_forward   ->  y, rstd
    begin_backward  ->  S, the sums of g·xh of the part           ->  all-reduce  ->  finish_backward  ->  dx, dw

A part of a row is the columns that one rank holds; it may have none. sharding.py calls the operators with the local
tensors of DTensors, and adds up S, one fp64 number a row, over the ranks. The outputs have the bits of whole rows.
operators.py states why the operators are opaque to compilers.
"""

from typing import Any

import torch
from torch import Tensor

from rmsnorm.kernels import dispatch
from rmsnorm.kernels.host import loader as host
from rmsnorm.ops.derivatives import autograd_kernel, undifferentiable
from rmsnorm.ops.dispatch import without_none
from rmsnorm.spec import Cast, caller, check_memory, check_part, result_dtype, spec_of, sum_dtype

# N is the width of whole rows, not of a part. An output that was not requested is an empty tensor, because a schema
# cannot declare an optional output.

_LIB = torch.library.Library("rmsnorm", "FRAGMENT")
_LIB.define("begin_forward(Tensor x, Tensor? residual) -> (Tensor s, Tensor S)")
_LIB.define(
    "finish_forward(Tensor x, Tensor? weight, Tensor S, int N, float eps, str cast, float offset, bool with_rstd)"
    " -> (Tensor y, Tensor rstd)"
)
_LIB.define("begin_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, str cast, float offset) -> Tensor S")
_LIB.define(
    "finish_backward(Tensor dy, Tensor? ds, Tensor x, Tensor? weight, Tensor rstd, Tensor S, int N, str cast,"
    " float offset, bool need_dw) -> (Tensor dx, Tensor dw)"
)


def _run_begin_forward(x: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
    host.look()
    where = caller(residual)
    check_part(where, {"x": x, "residual": residual}, None, {})
    check_memory(where, x=x, residual=residual)
    return without_none(x, *dispatch.begin_forward(x, residual))


def _run_finish_forward(
    x: Tensor, w: Tensor | None, S: Tensor, N: int, eps: float, cast: Cast, offset: float, with_rstd: bool
) -> tuple[Tensor, ...]:
    host.look()
    spec = spec_of("rms_norm", eps, cast, offset)
    check_part("rms_norm", {"x": x}, w, {"S": S}, N)
    check_memory("rms_norm", x=x, weight=w, S=S)
    return without_none(x, *dispatch.finish_forward(x, w, S, N, spec, with_rstd))


def _run_begin_backward(
    dy: Tensor, x: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, offset: float
) -> Tensor:  # fmt: skip
    host.look()
    spec = spec_of("rms_norm", 0.0, cast, offset)
    check_part("rms_norm", {"x": x, "dy": dy}, w, {"rstd": rstd}, backward=True)
    check_memory("rms_norm", backward=True, dy=dy, x=x, weight=w, rstd=rstd)
    return dispatch.begin_backward(dy, x, w, rstd, spec)


def _run_finish_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, S: Tensor, N: int, cast: Cast,
    offset: float, need_dw: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    host.look()
    where = caller(ds)
    spec = spec_of(where, 0.0, cast, offset)
    check_part(where, {"x": x, "dy": dy, "ds": ds}, w, {"rstd": rstd, "S": S}, N, backward=True)
    check_memory(where, backward=True, dy=dy, ds=ds, x=x, weight=w, rstd=rstd, S=S)
    return without_none(x, *dispatch.finish_backward(dy, ds, x, w, rstd, S, N, spec, need_dw))


def _fake_begin_forward(x: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
    check_part(caller(residual), {"x": x, "residual": residual}, None, {}, symbolic=True)
    s = None if residual is None else x.new_empty(x.shape, dtype=sum_dtype(x.dtype, residual.dtype))
    return without_none(x, s, x.new_empty(x.shape[:-1], dtype=torch.float64))


def _fake_finish_forward(
    x: Tensor, w: Tensor | None, S: Tensor, N: int, eps: float, cast: Cast, offset: float, with_rstd: bool
) -> tuple[Tensor, ...]:
    check_part("rms_norm", {"x": x}, w, {"S": S}, N, symbolic=True)
    y = x.new_empty(x.shape, dtype=result_dtype(x.dtype, None if w is None else w.dtype, cast))
    return without_none(x, y, x.new_empty(x.shape[:-1], dtype=torch.float32) if with_rstd else None)


def _fake_begin_backward(
    dy: Tensor, x: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, offset: float
) -> Tensor:  # fmt: skip
    check_part("rms_norm", {"x": x, "dy": dy}, w, {"rstd": rstd}, backward=True, symbolic=True)
    return x.new_empty(x.shape[:-1], dtype=torch.float64)


def _fake_finish_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, S: Tensor, N: int, cast: Cast,
    offset: float, need_dw: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_part(caller(ds), {"x": x, "dy": dy, "ds": ds}, w, {"rstd": rstd, "S": S}, N, backward=True, symbolic=True)
    dw = w.new_empty(w.shape) if need_dw and w is not None else None
    return without_none(x, x.new_empty(x.shape), dw)


_OPERATORS: dict[str, tuple[Any, Any]] = {
    "begin_forward": (_run_begin_forward, _fake_begin_forward),
    "finish_forward": (_run_finish_forward, _fake_finish_forward),
    "begin_backward": (_run_begin_backward, _fake_begin_backward),
    "finish_backward": (_run_finish_backward, _fake_finish_backward),
}
_WHOLE = "rmsnorm.rms_norm or rmsnorm.add_rms_norm with DTensors"

for _name, (_run, _fake) in _OPERATORS.items():
    _whole_name = f"torch.ops.rmsnorm.{_name}"
    _raises = undifferentiable(_name, f"[{_whole_name}] the operator has no derivative: call {_WHOLE} instead")
    _LIB.impl(_name, _run, "CompositeExplicitAutograd")
    _LIB.impl(_name, autograd_kernel(_name, _whole_name, _WHOLE, _raises), "Autograd")
    torch.library.register_fake(f"rmsnorm::{_name}", _fake, lib=_LIB)
