"""Autograd: the tensors that the forward pass saves, gradients, and forward-mode tangents.

norm  ->  _Norm, or TransformedNorm under torch.func and in forward mode  ->  _forward, _backward
                                                   |- plain tensors: directly to a kernel
                                                   `- anything else: torch.ops.rmsnorm.*, then a kernel
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from rmsnorm import compat
from rmsnorm.kernels import dispatch
from rmsnorm.kernels.host import loader as host
from rmsnorm.ops import eager_recomputation
from rmsnorm.ops.derivatives import saved_tensors, undifferentiable
from rmsnorm.ops.dispatch import exported_to_onnx, is_plain, load_sharding
from rmsnorm.ops.plain import plain_forward
from rmsnorm.spec import (
    NO_HINTS,
    Cast,
    Hints,
    Saved,
    Spec,
    caller,
    check_gradients,
    check_memory,
    check_saved,
    check_spec,
    check_tensors,
    constant_offset,
    result_dtype,
    spec_of,
)  # fmt: skip


def check_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, offset: float, need_dw: bool
) -> None:
    check_gradients(caller(ds), dy, ds, x, w, rstd, offset, need_dw)
    check_memory(caller(ds), backward=True, dy=dy, ds=ds, x=x, weight=w, rstd=rstd)


def _forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, spec: Spec, with_rstd: bool, plain: bool,
    hints: Hints = NO_HINTS,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    if plain:
        check_memory(caller(residual), x=x, residual=residual, weight=w)
        return dispatch.forward(x, residual, w, spec, with_rstd)
    load_sharding()
    y, s, rstd = torch.ops.rmsnorm.forward.default(
        x, residual, w, spec.eps, spec.cast, spec.offset, with_rstd, **asdict(hints)
    )
    return y, None if residual is None else s, rstd if with_rstd else None


def _backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, spec: Spec, need_dx: bool, need_dw: bool
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    # Grad mode is on here if create_graph=True: then the gradient is recorded, so that differentiating it raises.
    if torch.is_grad_enabled() or compat.in_forward_ad():
        return _tied_backward(dy, ds, x, w, rstd, spec, need_dx, need_dw)
    batched = compat.is_batched_cotangent  # a cotangent under is_grads_batched=True; compilers cannot trace this
    if is_plain(dy, ds, x, w, rstd) and not (batched(dy) or (ds is not None and batched(ds))):
        check_backward(dy, ds, x, w, rstd, spec.offset, need_dw)
        return dispatch.backward(dy, ds, x, w, rstd, spec, need_dx, need_dw)
    dx, dw = torch.ops.rmsnorm.backward.default(dy, ds, x, w, rstd, spec.cast, spec.offset, need_dx, need_dw)
    return dx if need_dx else None, dw if need_dw else None


BackwardOnce = undifferentiable(
    "backward",
    "a second derivative of rms_norm is not implemented; differentiate rmsnorm.reference.truth, or plain torch",
)


def norm(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: Cast, offset: float,
    hints: Hints = NO_HINTS,
) -> tuple[Any, ...]:  # fmt: skip
    """Computes (y, s, …) and records it for autograd, forward mode or torch.func if necessary."""
    where = caller(residual)
    if exported_to_onnx():
        check_spec(where, eps, cast, offset)
        check_tensors(where, x, residual, w, offset, symbolic=torch.compiler.is_compiling())
        return plain_forward(x, residual, w, eps, cast, offset, with_rstd=False)
    if torch.compiler.is_compiling():  # the compiler traces the operator, which has its own autograd rule
        offset = constant_offset(offset)
        check_spec(where, eps, cast, offset)
        check_tensors(where, x, residual, w, offset, symbolic=True)
        load_sharding()
        if hints.fuse_residual or hints.recompute:
            from rmsnorm.ops import inductor  # only here, because it imports Inductor, which takes seconds

            inductor.install_pass()
        with_rstd = torch.is_grad_enabled()
        return torch.ops.rmsnorm.forward.default(  # type: ignore[no-any-return]
            x,
            residual,
            w,
            eps,
            cast,
            offset,
            with_rstd,
            fuse_residual=hints.fuse_residual,
            recompute=hints.recompute,
        )
    spec = spec_of(where, eps, cast, offset)
    check_tensors(where, x, residual, w, offset)
    plain = is_plain(x, residual, w)
    if plain:
        host.look()
    elif compat.is_tracing():  # TorchScript records the operator, which has its own autograd rule
        return _forward(x, residual, w, spec, True, plain)
    if compat.in_forward_ad() or (not plain and compat.transforms_active()):
        return TransformedNorm.apply(x, residual, w, spec, hints)  # type: ignore[no-any-return, no-untyped-call]
    if needs_gradient(x, residual, w):
        apply = _apply_norm if plain and not _leaked(x, residual, w) else _Norm.apply
        outputs = apply(x, residual, w, spec, plain)
        if residual is None:
            outputs = (outputs,)
    else:
        outputs = _forward(x, residual, w, spec, False, plain)
    if eager_recomputation.open_passes:
        eager_recomputation.note(outputs[0], x if residual is None else outputs[1], w, eps, cast, offset)
    return outputs  # type: ignore[no-any-return]


def needs_gradient(x: Tensor, residual: Tensor | None, w: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or (w is not None and w.requires_grad) or (residual is not None and residual.requires_grad)
    )


def needs_rstd(x: Tensor, residual: Tensor | None, w: Tensor | None) -> bool:
    """Whether a call of an operator is to return rstd. One that torch.jit.trace records may need a gradient later."""
    return needs_gradient(x, residual, w) or (not torch.compiler.is_compiling() and compat.is_tracing())


def _leaked(*tensors: Tensor | None) -> bool:
    """Whether a tensor has leaked from a torch.func transform that has ended, and is still wrapped."""
    for t in tensors:  # noqa: SIM110  # a generator would take a microsecond
        if t is not None and compat.is_wrapped(t):
            return True
    return False


def gradients(
    ctx: Any, dy: Tensor | None, ds: Tensor | None, backward: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, residual and w, from what the forward pass saved. Raises an error if that has changed.

    Args:
        ctx: Of the autograd function.
        dy: The gradient of y; None if nothing depends on y.
        ds: The gradient of s; None if nothing depends on s.
        backward: Takes dy, ds, the normalized rows, w, rstd, `ctx.spec`, and whether dx and dw are needed.
    """
    adds = ctx.dtypes[1] is not None
    where, names = ("add_rms_norm", "s, the sum that it returned, or weight") if adds else ("rms_norm", "x or weight")
    rows, w, rstd = saved_tensors(ctx, where, names)
    saved_rows, saved_w = ctx.saved
    check_saved(where, x=(rows, saved_rows), weight=(w, saved_w))
    needs = ctx.needs_input_grad
    need_x, need_residual, need_dw = needs[:3]
    if dy is None:
        d_rows, dw = ds, None
    else:
        d_rows, dw = backward(dy, ds, rows, w, rstd, ctx.spec, need_x or need_residual, need_dw)
    dx = d_rows.to(ctx.dtypes[0]) if need_x and d_rows is not None else None
    d_residual = d_rows.to(ctx.dtypes[1]) if need_residual and d_rows is not None else None
    return dx, d_residual, dw if need_dw else None


class _Norm(torch.autograd.Function):
    """Saves the normalized rows (x or s, which usually stay alive anyway), the weight, and rstd: 4 bytes a row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, w: Tensor | None, spec: Spec, plain: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, s, rstd = _forward(x, residual, w, spec, True, plain)
        rows = x if s is None else s
        ctx.save_for_backward(rows, w, rstd)
        ctx.set_materialize_grads(False)
        ctx.spec = spec
        ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
        ctx.saved = Saved.of(rows), Saved.of(w)
        return y if s is None else (y, s)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return *gradients(ctx, dy, ds, _backward), None, None


# Skips a Python function of torch that only matters for tensors that `is_plain` and `_leaked` exclude; it takes a few
# microseconds.
_apply_norm = compat.bare_apply(_Norm)


class TransformedNorm(torch.autograd.Function):
    """As `_Norm`, for torch.func and forward mode, which require a separate `setup_context`. It is slower to call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, residual: Tensor | None, w: Tensor | None, spec: Spec, hints: Hints) -> tuple[Any, ...]:
        y, s, rstd = _forward(x, residual, w, spec, True, is_plain(x, residual, w), hints)
        return (y, rstd) if s is None else (y, s, rstd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, residual, w, ctx.spec, _ = inputs
        rstd = output[-1]
        ctx.mark_non_differentiable(rstd)
        rows = x if residual is None else output[1]
        saved = (rows, w, rstd)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)
        ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
        ctx.saved = Saved.of(rows), Saved.of(w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        return *gradients(ctx, dy, others[0] if len(others) > 1 else None, _tied_backward), None, None

    @staticmethod
    def jvp(
        ctx: Any, x_t: Tensor | None, residual_t: Tensor | None, w_t: Tensor | None, *others: None
    ) -> tuple[Tensor | None, ...]:
        """The tangent y_t = w·P·s_t + xh·w_t, where P = rstd · (1 − xh·xhᵀ/N) is symmetric.

        The backward pass multiplies by the same P, so it computes P·s_t here.
        """
        rows, w, rstd = ctx.saved_tensors
        tangents = [t for t in (x_t, residual_t) if t is not None]
        s_t = torch.zeros_like(rows) if not tangents else sum(tangents[1:], tangents[0])
        y_t = BackwardOnce.apply(s_t, None, rows, None, rstd, ctx.spec.cast, 0.0, True, False)[0].float()
        if w is not None:
            y_t = (w.float() + ctx.spec.offset) * y_t
        if w_t is not None:
            y_t = y_t + rows.float() * rstd.unsqueeze(-1) * w_t.float()
        y_t = y_t.to(result_dtype(rows.dtype, None if w is None else w.dtype, ctx.spec.cast))
        return (y_t, None) if ctx.dtypes[1] is None else (y_t, s_t.to(rows.dtype), None)


def _tied_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, spec: Spec, need_dx: bool, need_dw: bool
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    return BackwardOnce.apply(dy, ds, x, w, rstd, spec.cast, spec.offset, need_dx, need_dw)  # type: ignore[no-any-return]
