"""The operators: schema, shapes, autograd, and the choice of who computes.

    rms_norm, add_rms_norm  ->  host.norm: plain tensors, autograd included, without Python
                            ->  _Norm (autograd)  ->  _forward, _backward
                                                        |- plain tensors: straight to the kernel
                                                        `- anything else: torch.ops.rmsnorm.*, then the kernel
    torch.ops.rmsnorm.*     ->  C++, once host.look has loaded it; else, and for what is not plain, _run_*, _autograd_*

The operators are opaque on purpose: a compiler that traced through them would fuse the arithmetic and lose its bits.
What is not plain (torch.compile, export, subclasses such as DTensor, fake tensors, vmap, dispatch modes) meets them
as one node with a schema, a fake, and a rule for vmap.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, Never, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from rmsnorm.errors import complaint
from rmsnorm.kernels import dispatch, host
from rmsnorm.kernels.plan import ByReference, Forward, Plan
from rmsnorm.spec import (
    DTYPES,
    Cast,
    Spec,
    caller,
    check_gradients,
    check_memory,
    check_order,
    check_saved,
    check_spec,
    check_tensors,
    spec_of,
)

P = ParamSpec("P")
T = TypeVar("T")


def _without_more(function: Callable[P, T]) -> Callable[P, T]:
    """Leave the parameter `more` out of the signature that help and editors show: it is there for its error alone."""
    signature = inspect.signature(function)
    shown = [p for p in signature.parameters.values() if p.name != "more"]
    function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return function


@_without_more
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *more: Never,
    cast: Cast = "early",
    offset: float = 0.0,
) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, with the Definition's bits on every device.

    x: (..., N) float32, bfloat16, float16 or float64; any strides, and no copy is made while the last dimension is
    contiguous. weight: (N,) or None. Returns y, contiguous, of x's shape, in `promote_types(weight, x)` for
    `cast="early"` (cast to x's dtype, then multiply) and in x's dtype for `cast="late"` (multiply in fp32, cast once)
    or without a weight. offset 1 (late only) multiplies by `1 + weight`, added in fp32. eps 0 is legal.

    Differentiable once, in reverse and in forward mode; a second derivative raises. Raises TypeError or ValueError,
    naming the argument, for what makes no sense.
    """
    if not more and not torch.compiler.is_compiling():
        y = host.norm(x, None, weight, eps, cast, offset)
        if y is not None:
            return y  # type: ignore[no-any-return]
    check_order("rms_norm", weight, more)
    return _norm(x, None, weight, eps, cast, offset)[0]  # type: ignore[no-any-return]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    cast: Cast = "early",
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(y, s): s = x + residual, rounded to its promoted dtype, and y = rms_norm(s, weight, eps, …), in one pass.

    x and residual: (..., N), of the same shape. The rest is as for `rms_norm`. In the backward pass the gradient
    that arrives through s is added in fp32, before the one cast.
    """
    if residual is None:
        raise TypeError(complaint("add_rms_norm", "residual", "is a NoneType", "a torch.Tensor"))
    if not torch.compiler.is_compiling():
        outputs = host.norm(x, residual, weight, eps, cast, offset)
        if outputs is not None:
            return outputs  # type: ignore[no-any-return]
    y, s = _norm(x, residual, weight, eps, cast, offset)[:2]
    return y, s


def explain(
    x: Tensor,
    weight: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    cast: Cast = "early",
    offset: float = 0.0,
) -> str:
    """Which kernel `rms_norm(x, weight)` would run (with a residual: `add_rms_norm`), and why.

    In place of the weight it takes a norm that `patch` has replaced: then it says whether our kernel or the norm's own
    forward would run on x, and why. Computes nothing, but compiles a CPU kernel as the first call would, to say whether
    that is possible.
    """
    own = getattr(weight, "_rmsnorm_explain", None)
    if own is not None:
        return own(x)  # type: ignore[no-any-return]
    spec = spec_of("explain", eps, cast, offset)
    check_tensors("explain", x, residual, weight, offset)
    plain = _plain(x, residual, weight)
    given: list[Any] = [x, residual, weight]
    x_, residual_, weight_ = given if plain else map(_without_memory, given)
    kind = Forward.of(x_, residual_, weight_, spec, _differentiable(x, residual, weight))._replace(device=x.device)
    plan = dispatch.plan_forward(kind)
    by_kernel = isinstance(plan, Plan)
    reason = plan.why if isinstance(plan, ByReference) else ""
    if isinstance(plan, Plan) and plain:
        host.look()
        reason = host.made_by(plan, x, residual, weight, eps, cast, offset)
    name = dispatch.name_of(plan)
    lines = [f"{x.device.type}, {str(x.dtype).removeprefix('torch.')}: {name}" + (f" ({reason})" if reason else "")]
    copied = [
        label
        for label, tensor in (("x", x), ("residual", residual), ("weight", weight))
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1
    ]
    if copied and by_kernel:
        lines.append(f"copied once, because the last dimension is not contiguous: {', '.join(copied)}")
    if residual is not None and residual.dtype != x.dtype and by_kernel:
        lines.append("the sum is taken before the kernel, because x and residual differ in dtype")
    if not plain:
        lines.append("reached through torch.ops.rmsnorm, because not every argument is a plain tensor")
        _learn_sharding()
        distributed = sys.modules.get("rmsnorm.distributed")
        sharding = None if distributed is None else distributed.explained(x, residual, weight)
        lines.extend([] if sharding is None else [sharding])
    return "; ".join(lines)


def warmup(
    device: torch.device | str = "cpu",
    dtypes: tuple[torch.dtype, ...] = DTYPES[:3],
    weight_dtypes: tuple[torch.dtype, ...] | None = None,
    hidden_size: int = 128,
) -> None:
    """Compile ahead of time what a first call would: forward and backward, for each dtype of x and of the weight, and
    the host's C++.

    weight_dtypes: those to pair with every dtype of x; by default each x is paired with its own dtype and float32.
    """
    wait_for_host()
    for dtype in dtypes:
        for weight_dtype in dict.fromkeys(weight_dtypes or (dtype, torch.float32)):
            for cast in ("early", "late"):
                x = torch.ones(1, hidden_size, dtype=dtype, device=device, requires_grad=True)
                w = torch.ones(hidden_size, dtype=weight_dtype, device=device, requires_grad=True)
                rms_norm(x, w, cast=cast).sum().backward()


def wait_for_host(seconds: float | None = None) -> bool:
    """Wait until the C++ is compiled and loaded, if it can be: `explain` says what came of it.

    seconds: the longest to wait. With 0 its compilation is begun, in another process.

    Returns whether the wait is over: False if the C++ is still being compiled.
    """
    if seconds is not None:
        return host.wait(seconds)
    with contextlib.suppress(host.Unusable):
        host.load()
    return True


# --- straight to the kernels, or through the operators -------------------------------------------------------


_PLAIN_TYPES = (Tensor, Parameter)


def _plain(*tensors: Tensor | None) -> bool:
    """Whether these may go straight to a kernel, past torch's dispatcher: real memory, nobody watching."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch.compiler.is_compiling()
    ):
        return False
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN_TYPES or t.is_meta or t.is_neg() or t._is_zerotensor()):
            return False  # is_neg: a minus sign that torch has not yet applied to the memory; zeros have none
    return True


def _without_memory(t: Any) -> Any:
    """Of the same kind, for tensors of which not all have memory of their own."""
    return None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _check_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, offset: float, need_dw: bool
) -> None:
    check_gradients(caller(ds), dy, ds, x, w, rstd, offset, need_dw)
    check_memory(caller(ds), backward=True, dy=dy, ds=ds, x=x, weight=w, rstd=rstd)


def _learn_sharding() -> None:
    """Load what the operators do with DTensors, if there can be any yet. torch.compile does so while it traces."""
    if "torch.distributed.tensor" in sys.modules:
        import rmsnorm.distributed  # noqa: F401


def _forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, spec: Spec, with_rstd: bool, plain: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if plain:
        check_memory(caller(residual), x=x, residual=residual, weight=w)
        return dispatch.forward(x, residual, w, spec, with_rstd)
    _learn_sharding()
    y, s, rstd = torch.ops.rmsnorm.forward.default(x, residual, w, spec.eps, spec.cast, spec.offset, with_rstd)
    return y, None if residual is None else s, rstd if with_rstd else None


def _backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, spec: Spec, need_dx: bool, need_dw: bool
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    # Grad mode here means create_graph: then the gradient must stay tied to its inputs, to raise if it is used.
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return _tied_backward(dy, ds, x, w, rstd, spec, need_dx, need_dw)
    batched = torch._C._functorch.is_legacy_batchedtensor  # what is_grads_batched=True makes of a cotangent
    if not (batched(dy) or (ds is not None and batched(ds))) and _plain(dy, ds, x, w, rstd):
        _check_backward(dy, ds, x, w, rstd, spec.offset, need_dw)
        return dispatch.backward(dy, ds, x, w, rstd, spec, need_dx, need_dw)
    dx, dw = torch.ops.rmsnorm.backward.default(dy, ds, x, w, rstd, spec.cast, spec.offset, need_dx, need_dw)
    return dx if need_dx else None, dw if need_dw else None


# --- autograd ------------------------------------------------------------------------------------------------

_SECOND = "a second derivative of rms_norm is not implemented; differentiate rmsnorm.reference.truth, or plain torch"


def _norm(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: Cast, offset: float
) -> tuple[Any, ...]:
    """(y, s, …) with whatever machinery of differentiation the arguments and the moment call for."""
    where = caller(residual)
    if torch.compiler.is_compiling():  # the operator has an autograd of its own, and a compiler takes it as it is
        check_spec(where, eps, cast, offset)
        check_tensors(where, x, residual, w, offset, symbolic=True)
        _learn_sharding()
        with_rstd = torch.is_grad_enabled()
        return torch.ops.rmsnorm.forward.default(x, residual, w, eps, cast, offset, with_rstd)  # type: ignore[no-any-return]
    spec = spec_of(where, eps, cast, offset)
    check_tensors(where, x, residual, w, offset)
    plain = _plain(x, residual, w)
    if plain:
        host.look()
    if forward_ad._current_level >= 0 or (not plain and torch._C._are_functorch_transforms_active()):
        return _TransformedNorm.apply(x, residual, w, spec)  # type: ignore[no-any-return, no-untyped-call]
    if _differentiable(x, residual, w):
        apply = _apply_norm if plain and not _leaked(x, residual, w) else _Norm.apply
        outputs = apply(x, residual, w, spec, plain)  # type: ignore[no-untyped-call]
        return (outputs,) if residual is None else outputs
    return _forward(x, residual, w, spec, False, plain)


def _differentiable(x: Tensor, residual: Tensor | None, w: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or (w is not None and w.requires_grad) or (residual is not None and residual.requires_grad)
    )


def _leaked(*tensors: Tensor | None) -> bool:
    """Whether one was kept from within a transform of torch.func that has ended, and has yet to be unwrapped."""
    for t in tensors:  # noqa: SIM110  # a generator takes a microsecond
        if t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t):
            return True
    return False


def _saved(ctx: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """What the forward pass has kept. Raises RuntimeError if it was modified in place since, as torch does."""
    try:
        return ctx.saved_tensors  # type: ignore[no-any-return]
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "[rms_norm] x or weight was modified in place after the forward pass, which keeps them for the backward "
            f"pass: write x = x + ... instead of x += ..., or rmsnorm.unpatch the norm ({error})"
        ) from None


def _gradients(
    ctx: Any, dy: Tensor | None, ds: Tensor | None, backward: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, residual and w; dy or ds is None where nothing depends on that output."""
    rows, w, rstd = _saved(ctx)
    check_saved("rms_norm", rows, w, *ctx.saved_dtypes)
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
    """Saves what was normalized, which autograd holds anyway, and 4 bytes a row."""

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
        ctx.saved_dtypes = (rows.dtype, None if w is None else w.dtype)
        return y if s is None else (y, s)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, ds, _backward), None, None


# Past a function in Python that is there for what `_plain` and `_leaked` rule out, and takes a few microseconds.
_apply_norm = super(torch.autograd.Function, _Norm).apply


class _TransformedNorm(torch.autograd.Function):
    """The same for torch.func and forward mode, which want the context set up apart: slower to call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, residual: Tensor | None, w: Tensor | None, spec: Spec) -> tuple[Any, ...]:
        y, s, rstd = _forward(x, residual, w, spec, True, _plain(x, residual, w))
        return (y, rstd) if s is None else (y, s, rstd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, residual, w, ctx.spec = inputs
        rstd = output[-1]
        ctx.mark_non_differentiable(rstd)
        rows = x if residual is None else output[1]
        saved = (rows, w, rstd)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)
        ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
        ctx.saved_dtypes = (rows.dtype, None if w is None else w.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, others[0] if len(others) > 1 else None, _tied_backward), None

    @staticmethod
    def jvp(
        ctx: Any, x_t: Tensor | None, residual_t: Tensor | None, w_t: Tensor | None, *others: None
    ) -> tuple[Tensor | None, ...]:
        """With P = rstd · (1 − xh·xhᵀ/N), the symmetric matrix of the backward pass: y_t = w·P·s_t + xh·w_t."""
        rows, w, rstd = ctx.saved_tensors
        tangents = [t for t in (x_t, residual_t) if t is not None]
        s_t = torch.zeros_like(rows) if not tangents else sum(tangents[1:], tangents[0])
        y_t = _Backward.apply(s_t, None, rows, None, rstd, ctx.spec.cast, 0.0, True, False)[0].float()  # type: ignore[no-untyped-call]
        y_dtype = rows.dtype
        if w is not None:
            y_t = (w.float() + ctx.spec.offset) * y_t
            if ctx.spec.cast == "early":
                y_dtype = torch.promote_types(w.dtype, rows.dtype)
        if w_t is not None:
            y_t = y_t + rows.float() * rstd.unsqueeze(-1) * w_t.float()
        y_t = y_t.to(y_dtype)
        return (y_t, None) if ctx.dtypes[1] is None else (y_t, s_t.to(rows.dtype), None)


def _tied_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, spec: Spec, need_dx: bool, need_dw: bool
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    return _Backward.apply(dy, ds, x, w, rstd, spec.cast, spec.offset, need_dx, need_dw)  # type: ignore[no-any-return, no-untyped-call]


class _Backward(torch.autograd.Function):
    """The backward operator where it may be differentiated itself: that raises, and is not silently zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.rmsnorm.backward.default(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(_SECOND)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        raise RuntimeError(_SECOND)


# --- the operators -------------------------------------------------------------------------------------------
# An output that was not asked for is an empty tensor: a schema cannot say "or none" of what it returns.

_LIB = torch.library.Library("rmsnorm", "DEF")
_LIB.define(
    "forward(Tensor x, Tensor? residual, Tensor? weight, float eps, str cast, float offset, bool with_rstd)"
    " -> (Tensor y, Tensor s, Tensor rstd)"
)
_LIB.define(
    "backward(Tensor dy, Tensor? ds, Tensor x, Tensor? weight, Tensor rstd, str cast, float offset,"
    " bool need_dx, bool need_dw) -> (Tensor dx, Tensor dw)"
)


def _run_forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: Cast, offset: float, with_rstd: bool
) -> tuple[Tensor, ...]:
    host.look()
    where = caller(residual)
    spec = spec_of(where, eps, cast, offset)
    check_tensors(where, x, residual, w, offset)
    check_memory(where, x=x, residual=residual, weight=w)
    y, s, rstd = dispatch.forward(x, residual, w, spec, with_rstd)
    return y, x.new_empty(0) if s is None else s, x.new_empty(0) if rstd is None else rstd


def _run_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, offset: float, need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    host.look()
    spec = spec_of(caller(ds), 0.0, cast, offset)
    _check_backward(dy, ds, x, w, rstd, offset, need_dw)
    dx, dw = dispatch.backward(dy, ds, x, w, rstd, spec, need_dx, need_dw)
    return x.new_empty(0) if dx is None else dx, x.new_empty(0) if dw is None else dw


def _fake_forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: str, offset: float, with_rstd: bool
) -> tuple[Tensor, ...]:
    check_spec(caller(residual), eps, cast, offset)
    check_tensors(caller(residual), x, residual, w, offset, symbolic=True)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y_dtype = torch.promote_types(dtype, w.dtype) if w is not None and cast == "early" else dtype
    return (
        x.new_empty(x.shape, dtype=y_dtype),
        x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape[:-1], dtype=torch.float32) if with_rstd else x.new_empty(0),
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
    dx = x.new_empty(x.shape) if need_dx else x.new_empty(0)
    return dx, w.new_empty(w.shape) if need_dw and w is not None else x.new_empty(0)


def _vmap_rule(op: Any, tensors: int) -> Any:
    """One call for the whole batch where rows are all that is batched; otherwise one call a sample."""

    def rule(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        front = [
            a.movedim(d, 0) if d is not None else a for a, d in zip(args[:tensors], in_dims[:tensors], strict=True)
        ]
        batched = [d is not None for d in in_dims[:tensors]]
        rows_only = op is torch.ops.rmsnorm.forward.default and not batched[2]
        if rows_only:
            if batched[0] and front[0].dim() == 1:  # the operator would take the samples for the columns of a row
                expected = "(..., N) with N of at least 1"
                raise ValueError(complaint(caller(front[1]), "x", "has shape ()", expected))
            rows = [
                a if a is None or is_batched else a.expand(info.batch_size, *a.shape)
                for a, is_batched in zip(front[:2], batched[:2], strict=True)
            ]
            outputs = op(*rows, front[2], *args[tensors:])
            with_s, with_rstd = front[1] is not None, args[-1]
            return outputs, (0, 0 if with_s else None, 0 if with_rstd else None)
        if info.batch_size == 0:  # the shapes, of one sample that is made up
            one = [a.new_ones(a.shape[1:]) if is_batched else a for a, is_batched in zip(front, batched, strict=True)]
            outputs = op(*one, *args[tensors:])
            return tuple(o.new_empty(0, *o.shape) for o in outputs), (0,) * len(outputs)
        samples = [
            op(*(a[i] if is_batched else a for a, is_batched in zip(front, batched, strict=True)), *args[tensors:])
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(output) for output in zip(*samples, strict=True)), (0,) * len(samples[0])

    return rule


def _differentiated(*args: Any) -> bool:
    """Whether a gradient or a tangent would be lost below autograd."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _autograd_forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: Cast, offset: float, with_rstd: bool
) -> tuple[Tensor, ...]:
    _learn_sharding()
    if not _differentiated(x, residual, w):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.rmsnorm.forward.default(x, residual, w, eps, cast, offset, with_rstd)  # type: ignore[no-any-return]
    spec = spec_of(caller(residual), eps, cast, offset)  # from here it goes to the kernel without the operator
    check_tensors(caller(residual), x, residual, w, offset, symbolic=not _plain(x, residual, w))
    y, *s, rstd = _TransformedNorm.apply(x, residual, w, spec)  # type: ignore[no-untyped-call]
    return y, s[0] if s else x.new_empty(0), rstd if with_rstd else x.new_empty(0)


def _autograd_backward(*args: Any) -> tuple[Tensor, ...]:
    _learn_sharding()
    if not _differentiated(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.rmsnorm.backward.default(*args)  # type: ignore[no-any-return]
    return _Backward.apply(*args)  # type: ignore[no-any-return, no-untyped-call]


for _name, _run, _autograd, _fake, _tensors in (
    ("forward", _run_forward, _autograd_forward, _fake_forward, 3),
    ("backward", _run_backward, _autograd_backward, _fake_backward, 5),
):
    _op = getattr(torch.ops.rmsnorm, _name).default
    _LIB.impl(_name, _run, "CompositeExplicitAutograd")
    _LIB.impl(_name, _autograd, "Autograd")
    torch.library.register_fake(f"rmsnorm::{_name}", _fake, lib=_LIB)
    torch.library.register_vmap(f"rmsnorm::{_name}", _vmap_rule(_op, _tensors), lib=_LIB)
