"""The operators of gated norms: schemas, implementations, shape functions, and rules for autograd and vmap.

    gated_rms_norm  ->  torch.ops.rmsnorm.gated_forward  ->  autograd: saves x, gate, w and rstd
                                                         ->  dispatch.gated_forward  ->  a kernel, or the reference

They are opaque to compilers for the reason that operators.py states.
"""

from typing import Any

import torch
from torch import Tensor

from rmsnorm import compat
from rmsnorm.kernels import dispatch
from rmsnorm.kernels.host import loader as host
from rmsnorm.ops.autograd import needs_rstd
from rmsnorm.ops.batching import Outputs, call_by_sample, vmap_by_sample
from rmsnorm.ops.derivatives import autograd_kernel, reverse_only, saved_tensors, undifferentiable
from rmsnorm.ops.dispatch import exported_to_onnx, refuse_dtensors, without_none
from rmsnorm.ops.plain import plain_gated_forward
from rmsnorm.spec import (
    GATED,
    Activation,
    Cast,
    Saved,
    check_gate,
    check_gated,
    check_gated_gradients,
    check_memory,
    check_saved,
    gated_dtype,
    gated_spec,
)  # fmt: skip

# An output that was not requested is an empty tensor, because a schema cannot declare an optional output.

_SPEC = "str cast, str activation, bool gate_first, int groups"
_LIB = torch.library.Library("rmsnorm", "FRAGMENT")
_LIB.define(
    f"gated_forward(Tensor x, Tensor gate, Tensor? weight, float eps, {_SPEC}, bool with_rstd)"
    " -> (Tensor y, Tensor rstd)"
)
_LIB.define(
    f"gated_backward(Tensor dy, Tensor x, Tensor gate, Tensor? weight, Tensor rstd, {_SPEC},"
    " bool need_dx, bool need_dgate, bool need_dw) -> (Tensor dx, Tensor dgate, Tensor dw)"
)


def gated_norm(
    x: Tensor, gate: Tensor, w: Tensor | None, eps: float, cast: Cast, activation: Activation, gate_first: bool,
    groups: int,
) -> Tensor:  # fmt: skip
    """Checks the arguments, computes y, and records it for autograd if necessary."""
    check_gate(GATED, eps, cast, activation, gate_first, groups)
    check_gated(GATED, x, gate, w, groups, symbolic=torch.compiler.is_compiling())
    refuse_dtensors(GATED, "gate", x, gate, w)
    if exported_to_onnx():
        return plain_gated_forward(x, gate, w, eps, cast, activation, gate_first, groups, with_rstd=False)[0]
    args = x, gate, w, float(eps), cast, activation, gate_first, int(groups)
    if not torch.compiler.is_compiling() and compat.transforms_active():
        return _Forward.apply(*args, True)[0]  # type: ignore[no-any-return]
    return torch.ops.rmsnorm.gated_forward.default(*args, needs_rstd(x, gate, w))[0]  # type: ignore[no-any-return]


def _run_forward(
    x: Tensor, gate: Tensor, w: Tensor | None, eps: float, cast: Cast, activation: Activation, gate_first: bool,
    groups: int, with_rstd: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    host.look()
    spec = gated_spec(GATED, eps, cast, activation, gate_first, groups)
    check_gated(GATED, x, gate, w, groups)
    check_memory(GATED, x=x, gate=gate, weight=w)
    return without_none(x, *dispatch.gated_forward(x, gate, w, spec, with_rstd))


def _run_backward(
    dy: Tensor, x: Tensor, gate: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, activation: Activation,
    gate_first: bool, groups: int, need_dx: bool, need_dgate: bool, need_dw: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    host.look()
    spec = gated_spec(GATED, 0.0, cast, activation, gate_first, groups)
    check_gated_gradients(GATED, dy, x, gate, w, rstd, groups, need_dw)
    check_memory(GATED, backward=True, dy=dy, x=x, gate=gate, weight=w, rstd=rstd)
    return without_none(x, *dispatch.gated_backward(dy, x, gate, w, rstd, spec, need_dx, need_dgate, need_dw))


def _fake_forward(
    x: Tensor, gate: Tensor, w: Tensor | None, eps: float, cast: Cast, activation: Activation, gate_first: bool,
    groups: int, with_rstd: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    spec = gated_spec(GATED, eps, cast, activation, gate_first, groups)
    check_gated(GATED, x, gate, w, groups, symbolic=True)
    y = x.new_empty(x.shape, dtype=gated_dtype(x.dtype, None if w is None else w.dtype, spec))
    return without_none(x, y, x.new_empty((*x.shape[:-1], groups), dtype=torch.float32) if with_rstd else None)


def _fake_backward(
    dy: Tensor, x: Tensor, gate: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, activation: Activation,
    gate_first: bool, groups: int, need_dx: bool, need_dgate: bool, need_dw: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    gated_spec(GATED, 0.0, cast, activation, gate_first, groups)
    check_gated_gradients(GATED, dy, x, gate, w, rstd, groups, need_dw, symbolic=True)
    return without_none(
        x,
        x.new_empty(x.shape) if need_dx else None,
        gate.new_empty(gate.shape) if need_dgate else None,
        w.new_empty(w.shape) if need_dw and w is not None else None,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate, w, _, *ctx.spec, with_rstd = inputs
    if not with_rstd:
        raise RuntimeError(f"[{GATED}] a gradient needs rstd: call torch.ops.rmsnorm.gated_forward with with_rstd=True")
    ctx.save_for_backward(x, gate, w, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.saved = Saved.of(x), Saved.of(gate), Saved.of(w)


def _gradients(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    x, gate, w, rstd = saved_tensors(ctx, GATED, "x, gate or weight")
    saved_x, saved_gate, saved_w = ctx.saved
    check_saved(GATED, x=(x, saved_x), gate=(gate, saved_gate), weight=(w, saved_w))
    needs = ctx.needs_input_grad[:3]
    gradients = _BackwardOnce.apply(dy, x, gate, w, rstd, *ctx.spec, *needs)
    return *(t if needed else None for t, needed in zip(gradients, needs, strict=True)), *(None,) * 6


_BackwardOnce = undifferentiable(
    "gated_backward",
    "a second derivative of gated_rms_norm is not implemented; differentiate rmsnorm.gated_reference.truth, or "
    "plain torch",
)
_Forward = reverse_only("gated_forward", GATED, _setup_context, _gradients)


def _vmap_forward(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Outputs:
    """One call for the whole batch if the weight is not batched; otherwise one call for each sample."""
    op = torch.ops.rmsnorm.gated_forward.default
    rows = [
        a.expand(info.batch_size, *a.shape) if d is None else a.movedim(d, 0)
        for a, d in zip(args[:2], in_dims[:2], strict=True)
    ]
    if in_dims[2] is None and rows[0].dim() > 1:  # with one dimension, the samples would be taken for columns
        return op(*rows, *args[2:]), (0, 0 if args[-1] else None)
    return call_by_sample(op, 3, info, in_dims, args)


for _name, _run, _function, _fake, _vmap in (
    ("gated_forward", _run_forward, _Forward, _fake_forward, _vmap_forward),
    ("gated_backward", _run_backward, _BackwardOnce, _fake_backward, vmap_by_sample("gated_backward", 5)),
):
    _LIB.impl(_name, _run, "CompositeExplicitAutograd")
    _LIB.impl(_name, autograd_kernel(_name, GATED, f"rmsnorm.{GATED}", _function), "Autograd")
    torch.library.register_fake(f"rmsnorm::{_name}", _fake, lib=_LIB)
    torch.library.register_vmap(f"rmsnorm::{_name}", _vmap, lib=_LIB)
