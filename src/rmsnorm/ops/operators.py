"""The operators: schemas, implementations, shape functions, and rules for autograd and vmap.

The operators are opaque to compilers, which would otherwise fuse the arithmetic and change its bits. torch.compile,
export, subclasses such as DTensor, fake tensors, vmap and dispatch modes see each norm as one node. The Python
implementations below run until `host.loader` has loaded the C++, and afterwards for calls that C++ does not make.
"""

from typing import Any

import torch
from torch import Tensor

from rmsnorm import compat
from rmsnorm.kernels import dispatch
from rmsnorm.kernels.host import loader as host
from rmsnorm.ops.autograd import BackwardOnce, TransformedNorm, check_backward
from rmsnorm.ops.batching import Outputs, call_by_sample
from rmsnorm.ops.derivatives import differentiated, refuse_transforms
from rmsnorm.ops.dispatch import is_plain, load_sharding, without_none
from rmsnorm.spec import (
    Cast,
    Hints,
    caller,
    check_gradients,
    check_memory,
    check_spec,
    check_summed,
    check_tensors,
    result_dtype,
    spec_of,
    sum_dtype,
    summands_by_name,
)  # fmt: skip

# An output that was not requested is an empty tensor, because a schema cannot declare an optional output.
# fuse_residual and recompute are for compilers only; see Hints in spec.py.

_LIB = torch.library.Library("rmsnorm", "DEF")
_LIB.define(
    "forward(Tensor x, Tensor? residual, Tensor? weight, float eps, str cast, float offset, bool with_rstd, *,"
    " bool fuse_residual=False, bool recompute=False) -> (Tensor y, Tensor s, Tensor rstd)"
)
_LIB.define(
    "backward(Tensor dy, Tensor? ds, Tensor x, Tensor? weight, Tensor rstd, str cast, float offset,"
    " bool need_dx, bool need_dw) -> (Tensor dx, Tensor dw)"
)
# For backward graphs only: `backward` together with the additions before and after it. See reference.backward_of_sum.
_LIB.define(
    "backward_of_sum(Tensor[] dy, Tensor? ds, Tensor x, Tensor? weight, Tensor rstd, str cast, float offset,"
    " bool need_dx, bool need_dw) -> (Tensor dx, Tensor dw)"
)


def _run_forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: Cast, offset: float, with_rstd: bool,
    **hints: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    host.look()
    where = caller(residual)
    spec = spec_of(where, eps, cast, offset)
    check_tensors(where, x, residual, w, offset)
    check_memory(where, x=x, residual=residual, weight=w)
    y, s, rstd = dispatch.forward(x, residual, w, spec, with_rstd)
    return without_none(x, y, s, rstd)


def _run_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, offset: float, need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    host.look()
    spec = spec_of(caller(ds), 0.0, cast, offset)
    check_backward(dy, ds, x, w, rstd, offset, need_dw)
    dx, dw = dispatch.backward(dy, ds, x, w, rstd, spec, need_dx, need_dw)
    return without_none(x, dx, dw)


def _run_backward_of_sum(
    dy: list[Tensor], ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, offset: float,
    need_dx: bool, need_dw: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    host.look()
    where = caller(ds)
    spec = spec_of(where, 0.0, cast, offset)
    check_summed(where, dy, ds, x, w, rstd, offset, need_dw)
    check_memory(where, backward=True, **summands_by_name(dy), ds=ds, x=x, weight=w, rstd=rstd)
    dx, dw = dispatch.backward_of_sum(dy, ds, x, w, rstd, spec, need_dx, need_dw)
    return without_none(x, dx, dw)


def _fake_forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: str, offset: float, with_rstd: bool,
    **hints: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_spec(caller(residual), eps, cast, offset)
    check_tensors(caller(residual), x, residual, w, offset, symbolic=True)
    return empty_outputs(x, residual, w, cast, with_rstd)


def empty_outputs(
    x: Tensor, residual: Tensor | None, w: Tensor | None, cast: str, with_rstd: bool
) -> tuple[Tensor, ...]:  # fmt: skip
    """y, s and rstd with the shapes and dtypes that a forward pass gives them."""
    dtype = sum_dtype(x.dtype, None if residual is None else residual.dtype)
    y_dtype = result_dtype(dtype, None if w is None else w.dtype, cast)
    return without_none(
        x,
        x.new_empty(x.shape, dtype=y_dtype),
        None if residual is None else x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape[:-1], dtype=torch.float32) if with_rstd else None,
    )


def _fake_backward(
    dy: Tensor,
    ds: Tensor | None,
    x: Tensor,
    w: Tensor | None,
    rstd: Tensor,
    cast: str,
    offset: float,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, ...]:
    check_spec(caller(ds), 0.0, cast, offset)
    check_gradients(caller(ds), dy, ds, x, w, rstd, offset, need_dw, symbolic=True)
    return empty_gradients(x, w, need_dx, need_dw)


def _fake_backward_of_sum(
    dy: list[Tensor],
    ds: Tensor | None,
    x: Tensor,
    w: Tensor | None,
    rstd: Tensor,
    cast: str,
    offset: float,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, ...]:
    check_spec(caller(ds), 0.0, cast, offset)
    check_summed(caller(ds), dy, ds, x, w, rstd, offset, need_dw, symbolic=True)
    return empty_gradients(x, w, need_dx, need_dw)


def empty_gradients(x: Tensor, w: Tensor | None, need_dx: bool, need_dw: bool) -> tuple[Tensor, ...]:
    """dx and dw with the shapes and dtypes that a backward pass gives them."""
    dw = w.new_empty(w.shape) if need_dw and w is not None else None
    return without_none(x, x.new_empty(x.shape) if need_dx else None, dw)


def _vmap_rule(name: str, tensors: int) -> Any:
    """The vmap rule: one call for the whole batch if only rows are batched; otherwise one call for each sample.

    Samples with fewer dimensions than the weight are called alone too: the operator would take the samples of a batch
    for heads, or for the columns of a row.
    """
    op = getattr(torch.ops.rmsnorm, name).default

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any, **hints: Any) -> Outputs:
        if name == "forward" and in_dims[2] is None:
            front = [a if d is None else a.movedim(d, 0) for a, d in zip(args[:2], in_dims[:2], strict=True)]
            batched = [d is not None for d in in_dims[:2]]
            rows = [
                a if a is None or is_batched else a.expand(info.batch_size, *a.shape)
                for a, is_batched in zip(front, batched, strict=True)
            ]
            w = args[2]
            if rows[0].dim() > (1 if w is None else w.dim()):
                outputs = op(*rows, *args[2:], **hints)
                with_s, with_rstd = front[1] is not None, args[-1]
                return outputs, (0, 0 if with_s else None, 0 if with_rstd else None)
        return call_by_sample(op, tensors, info, in_dims, args)

    return rule


def _no_vmap_rule(*args: Any) -> None:
    raise RuntimeError("torch.vmap over rmsnorm::backward_of_sum is not implemented; vmap rmsnorm::backward instead")


_INSTEAD = "rmsnorm.rms_norm or rmsnorm.add_rms_norm"


def _autograd_forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: Cast, offset: float, with_rstd: bool,
    **hints: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    load_sharding()
    if not differentiated(x, residual, w):
        with compat.below_autograd():
            return torch.ops.rmsnorm.forward.default(  # type: ignore[no-any-return]
                x, residual, w, eps, cast, offset, with_rstd, **hints
            )
    refuse_transforms("forward", _INSTEAD)
    spec = spec_of(caller(residual), eps, cast, offset)  # from here the call bypasses the operator's checks
    check_tensors(caller(residual), x, residual, w, offset, symbolic=not is_plain(x, residual, w))
    y, *s, rstd = TransformedNorm.apply(x, residual, w, spec, Hints(**hints))  # type: ignore[no-untyped-call]
    return without_none(x, y, s[0] if s else None, rstd if with_rstd else None)


def _autograd_backward(*args: Any) -> tuple[Tensor, ...]:
    load_sharding()
    if not differentiated(*args):
        with compat.below_autograd():
            return torch.ops.rmsnorm.backward.default(*args)  # type: ignore[no-any-return]
    refuse_transforms("backward", _INSTEAD)
    return BackwardOnce.apply(*args)  # type: ignore[no-any-return]


def _autograd_backward_of_sum(dy: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    """Raise if a gradient is needed: only passes of torch.compile call the operator, in graphs of a backward pass."""
    if differentiated(*dy, *args):
        raise RuntimeError(
            "rmsnorm::backward_of_sum cannot be differentiated: call rmsnorm::backward, or this one under torch.no_grad"
        )
    with compat.below_autograd():
        return torch.ops.rmsnorm.backward_of_sum.default(dy, *args)  # type: ignore[no-any-return]


for _name, _run, _autograd, _fake, _vmap in (
    ("forward", _run_forward, _autograd_forward, _fake_forward, _vmap_rule("forward", 3)),
    ("backward", _run_backward, _autograd_backward, _fake_backward, _vmap_rule("backward", 5)),
    ("backward_of_sum", _run_backward_of_sum, _autograd_backward_of_sum, _fake_backward_of_sum, _no_vmap_rule),
):
    _LIB.impl(_name, _run, "CompositeExplicitAutograd")
    _LIB.impl(_name, _autograd, "Autograd")
    torch.library.register_fake(f"rmsnorm::{_name}", _fake, lib=_LIB)
    torch.library.register_vmap(f"rmsnorm::{_name}", _vmap, lib=_LIB)
