"""Norms whose statistic is taken over only the first columns of a row, and their operators.

    sliced_norm  ->  torch.ops.rmsnorm.slice_forward  ->  autograd: saves the rows, w and rstd
                                                      ->  dispatch.forward  ->  a kernel, or the reference

operators.py states why the operators are opaque to compilers. They are separate from `forward` and `backward`, because
the C++ and the passes over the graphs of torch.compile do not handle such norms and so must never get one.
"""

from typing import Any

import torch
from torch import Tensor

from rmsnorm import compat
from rmsnorm.kernels import dispatch
from rmsnorm.kernels.host import loader as host
from rmsnorm.ops.autograd import gradients, needs_rstd
from rmsnorm.ops.batching import vmap_by_sample
from rmsnorm.ops.derivatives import autograd_kernel, reverse_only, undifferentiable
from rmsnorm.ops.dispatch import exported_to_onnx, refuse_dtensors, without_none
from rmsnorm.ops.operators import empty_gradients, empty_outputs
from rmsnorm.ops.plain import plain_slice_forward
from rmsnorm.spec import (
    Cast,
    Saved,
    caller,
    check_gradients,
    check_memory,
    check_spec,
    check_tensors,
    check_variance_size,
    constant_offset,
    spec_of,
)  # fmt: skip

# An output that was not requested is an empty tensor, because a schema cannot declare an optional output.

_SPEC = "str cast, float offset, int variance_size"
_LIB = torch.library.Library("rmsnorm", "FRAGMENT")
_LIB.define(
    f"slice_forward(Tensor x, Tensor? residual, Tensor? weight, float eps, {_SPEC}, bool with_rstd)"
    " -> (Tensor y, Tensor s, Tensor rstd)"
)
_LIB.define(
    f"slice_backward(Tensor dy, Tensor? ds, Tensor x, Tensor? weight, Tensor rstd, {_SPEC}, bool need_dx, bool need_dw)"
    " -> (Tensor dx, Tensor dw)"
)


def sliced_norm(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: Cast, offset: float, variance_size: int
) -> tuple[Tensor, Tensor]:
    """Checks the arguments, computes (y, s), and records it for autograd if necessary. s is empty without a residual.

    Raises:
        NotImplementedError: For a DTensor.
    """
    where = caller(residual)
    symbolic = torch.compiler.is_compiling()
    if symbolic:
        offset = constant_offset(offset)
    check_spec(where, eps, cast, offset)
    refuse_dtensors(where, "variance_size", x, residual, w)
    check_tensors(where, x, residual, w, offset, symbolic)
    check_variance_size(where, variance_size, x, symbolic)
    args = x, residual, w, float(eps), cast, float(offset), int(variance_size)
    if exported_to_onnx():
        return plain_slice_forward(*args, with_rstd=False)[:2]  # type: ignore[return-value]
    if not symbolic and compat.transforms_active():
        y, s, _ = _Forward.apply(*args, True)
    else:
        y, s, _ = torch.ops.rmsnorm.slice_forward.default(*args, needs_rstd(x, residual, w))
    return y, s


def _run_forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: Cast, offset: float, variance_size: int,
    with_rstd: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    host.look()
    where = caller(residual)
    spec = spec_of(where, eps, cast, offset, variance_size)
    check_tensors(where, x, residual, w, offset)
    check_variance_size(where, variance_size, x)
    check_memory(where, x=x, residual=residual, weight=w)
    return without_none(x, *dispatch.forward(x, residual, w, spec, with_rstd))


def _run_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, offset: float,
    variance_size: int, need_dx: bool, need_dw: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    host.look()
    where = caller(ds)
    spec = spec_of(where, 0.0, cast, offset, variance_size)
    check_gradients(where, dy, ds, x, w, rstd, offset, need_dw)
    check_variance_size(where, variance_size, x)
    check_memory(where, backward=True, dy=dy, ds=ds, x=x, weight=w, rstd=rstd)
    return without_none(x, *dispatch.backward(dy, ds, x, w, rstd, spec, need_dx, need_dw))


def _fake_forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: Cast, offset: float, variance_size: int,
    with_rstd: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    where = caller(residual)
    spec_of(where, eps, cast, offset, variance_size)
    check_tensors(where, x, residual, w, offset, symbolic=True)
    check_variance_size(where, variance_size, x, symbolic=True)
    return empty_outputs(x, residual, w, cast, with_rstd)


def _fake_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, offset: float,
    variance_size: int, need_dx: bool, need_dw: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    where = caller(ds)
    spec_of(where, 0.0, cast, offset, variance_size)
    check_gradients(where, dy, ds, x, w, rstd, offset, need_dw, symbolic=True)
    check_variance_size(where, variance_size, x, symbolic=True)
    return empty_gradients(x, w, need_dx, need_dw)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, w, _, *ctx.spec, with_rstd = inputs
    if not with_rstd:
        name = "torch.ops.rmsnorm.slice_forward"
        raise RuntimeError(f"[{caller(residual)}] a gradient needs rstd: call {name} with with_rstd=True")
    _, s, rstd = output
    rows = x if residual is None else s
    ctx.save_for_backward(rows, w, rstd)
    ctx.mark_non_differentiable(*([rstd, s] if residual is None else [rstd]))
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.saved = Saved.of(rows), Saved.of(w)


def _backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, spec: list[Any], need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _BackwardOnce.apply(dy, ds, x, w, rstd, *spec, need_dx, need_dw)  # type: ignore[no-any-return]


def _gradients(ctx: Any, dy: Tensor | None, ds: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *gradients(ctx, dy, ds, _backward), *(None,) * 5


_BackwardOnce = undifferentiable(
    "slice_backward",
    "a second derivative of rms_norm is not implemented; differentiate rmsnorm.reference.truth, or plain torch",
)
_Forward = reverse_only("slice_forward", "rms_norm with variance_size", _setup_context, _gradients)

for _name, _run, _function, _fake, _tensors in (
    ("slice_forward", _run_forward, _Forward, _fake_forward, 3),
    ("slice_backward", _run_backward, _BackwardOnce, _fake_backward, 5),
):
    _LIB.impl(_name, _run, "CompositeExplicitAutograd")
    _kernel = autograd_kernel(
        _name, "rms_norm with variance_size", "rmsnorm.rms_norm or rmsnorm.add_rms_norm", _function
    )
    _LIB.impl(_name, _kernel, "Autograd")
    torch.library.register_fake(f"rmsnorm::{_name}", _fake, lib=_LIB)
    torch.library.register_vmap(f"rmsnorm::{_name}", vmap_by_sample(_name, _tensors), lib=_LIB)
