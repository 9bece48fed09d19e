"""The operators that compute two independent norms in one call: forward_pair and backward_pair.

    norms, or the pass of pairing.py  ->  torch.ops.rmsnorm.forward_pair  ->  dispatch.forward_pair  ->  one plan

For few rows, the call and the launch take nearly all of the time, and here two norms share both.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rmsnorm.kernels import dispatch
from rmsnorm.kernels.host import loader as host
from rmsnorm.ops.autograd import BackwardOnce, needs_gradient, norm
from rmsnorm.ops.batching import vmap_by_sample
from rmsnorm.ops.derivatives import autograd_kernel, has_tangent, reverse_only, saved_tensors, undifferentiable
from rmsnorm.ops.dispatch import are_dtensors, exported_to_onnx, is_plain, load_sharding, without_none
from rmsnorm.spec import (
    PAIR,
    Cast,
    Saved,
    check_memory,
    check_pair,
    check_pair_gradients,
    check_saved,
    check_spec,
    check_tensors,
    constant_offset,
    result_dtype,
    spec_of,
)  # fmt: skip

# An output that was not requested is an empty tensor, because a schema cannot declare an optional output.

_LIB = torch.library.Library("rmsnorm", "FRAGMENT")
_LIB.define(
    "forward_pair(Tensor x, Tensor? weight, Tensor x2, Tensor? weight2, float eps, str cast, float offset,"
    " bool with_rstd) -> (Tensor y, Tensor rstd, Tensor y2, Tensor rstd2)"
)
_LIB.define(
    "backward_pair(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, Tensor dy2, Tensor x2, Tensor? weight2,"
    " Tensor rstd2, str cast, float offset, bool need_dx, bool need_dw)"
    " -> (Tensor dx, Tensor dw, Tensor dx2, Tensor dw2)"
)


def norms(
    xs: Sequence[Tensor], weights: Sequence[Tensor | None], eps: float, cast: Cast, offset: float
) -> list[Tensor]:  # fmt: skip
    """y of each norm, two in each call. Where autograd records eager calls, each norm has its own, made by C++.

    Two norms of DTensors share an all-reduce if their rows are spread over the same ranks, also where autograd records.
    """
    compiling = torch.compiler.is_compiling()
    if compiling:
        offset = constant_offset(offset)
    check_spec(PAIR, eps, cast, offset)
    for x, w in zip(xs, weights, strict=True):
        check_tensors(PAIR, x, None, w, offset, symbolic=compiling)
    tensors = [*xs, *weights]
    recorded = any(needs_gradient(x, None, w) for x, w in zip(xs, weights, strict=True))
    if exported_to_onnx():
        pairable = False
    elif are_dtensors(*tensors):
        load_sharding()
        pairable = True
    elif compiling:
        pairable = all(map(_is_ordinary, tensors))
    else:
        pairable = not recorded and is_plain(*tensors) and not has_tangent(*tensors)
    paired = len(xs) // 2 * 2 if pairable else 0
    found: list[Tensor] = []
    for i in range(0, paired, 2):
        y, _, y2, _ = torch.ops.rmsnorm.forward_pair.default(
            xs[i], weights[i], xs[i + 1], weights[i + 1], float(eps), cast, float(offset), recorded
        )
        found += [y, y2]
    rest = zip(xs[paired:], weights[paired:], strict=True)
    return [*found, *(norm(x, None, w, eps, cast, offset)[0] for x, w in rest)]


def _is_ordinary(t: Tensor | None) -> bool:
    """Whether a traced tensor is not of a subclass, for which there may be rules for single norms only."""
    return t is None or type(t) in (Tensor, Parameter)


def _run_forward(
    x: Tensor, w: Tensor | None, x2: Tensor, w2: Tensor | None, eps: float, cast: Cast, offset: float, with_rstd: bool
) -> tuple[Tensor, ...]:  # fmt: skip
    host.look()
    spec = spec_of(PAIR, eps, cast, offset)
    check_pair(PAIR, x, w, x2, w2, offset)
    check_memory(PAIR, x=x, weight=w, x2=x2, weight2=w2)
    return without_none(x, *dispatch.forward_pair(x, w, x2, w2, spec, with_rstd))


def _run_backward(
    dy: Tensor, x: Tensor, w: Tensor | None, rstd: Tensor, dy2: Tensor, x2: Tensor, w2: Tensor | None, rstd2: Tensor,
    cast: Cast, offset: float, need_dx: bool, need_dw: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    host.look()
    spec = spec_of(PAIR, 0.0, cast, offset)
    first, second = (dy, x, w, rstd), (dy2, x2, w2, rstd2)
    check_pair_gradients(PAIR, first, second, offset, need_dw)
    check_memory(
        PAIR, backward=True, dy=dy, x=x, weight=w, rstd=rstd, dy2=dy2, x2=x2, weight2=w2, rstd2=rstd2
    )  # fmt: skip
    return without_none(x, *dispatch.backward_pair(first, second, spec, need_dx, need_dw))


def _fake_forward(
    x: Tensor, w: Tensor | None, x2: Tensor, w2: Tensor | None, eps: float, cast: str, offset: float, with_rstd: bool
) -> tuple[Tensor, ...]:  # fmt: skip
    check_spec(PAIR, eps, cast, offset)
    check_pair(PAIR, x, w, x2, w2, offset, symbolic=True)
    found: list[Tensor | None] = []
    for rows, weight in ((x, w), (x2, w2)):
        dtype = result_dtype(rows.dtype, None if weight is None else weight.dtype, cast)
        rstd = rows.new_empty(rows.shape[:-1], dtype=torch.float32) if with_rstd else None
        found += [rows.new_empty(rows.shape, dtype=dtype), rstd]
    return without_none(x, *found)


def _fake_backward(
    dy: Tensor, x: Tensor, w: Tensor | None, rstd: Tensor, dy2: Tensor, x2: Tensor, w2: Tensor | None, rstd2: Tensor,
    cast: str, offset: float, need_dx: bool, need_dw: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_spec(PAIR, 0.0, cast, offset)
    check_pair_gradients(PAIR, (dy, x, w, rstd), (dy2, x2, w2, rstd2), offset, need_dw, symbolic=True)
    found: list[Tensor | None] = []
    for rows, weight in ((x, w), (x2, w2)):
        dw = weight.new_empty(weight.shape) if need_dw and weight is not None else None
        found += [rows.new_empty(rows.shape) if need_dx else None, dw]
    return without_none(x, *found)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w, x2, w2, _, ctx.cast, ctx.offset, with_rstd = inputs
    if not with_rstd:
        raise RuntimeError(f"[{PAIR}] a gradient needs rstd: call torch.ops.rmsnorm.forward_pair with with_rstd=True")
    ctx.save_for_backward(x, w, output[1], x2, w2, output[3])
    ctx.saved = [Saved.of(t) for t in (x, w, x2, w2)]
    ctx.mark_non_differentiable(output[1], output[3])
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dy: Tensor | None, _: Tensor | None, dy2: Tensor | None, _2: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, x2 and weight2; in one call if both norms have a dy and need the same gradients."""
    x, w, rstd, x2, w2, rstd2 = saved_tensors(ctx, PAIR, "x or weight")
    saved_x, saved_w, saved_x2, saved_w2 = ctx.saved
    check_saved(PAIR, x=(x, saved_x), weight=(w, saved_w), x2=(x2, saved_x2), weight2=(w2, saved_w2))
    needs, needs2 = ctx.needs_input_grad[:2], ctx.needs_input_grad[2:4]
    options = ctx.cast, ctx.offset
    if dy is not None and dy2 is not None and needs == needs2:
        pair = _BackwardOnce.apply(dy, x, w, rstd, dy2, x2, w2, rstd2, *options, *needs)
        gradients = [t if needed else None for t, needed in zip(pair, (*needs, *needs2), strict=True)]
    else:
        gradients = []
        for given, rows, weight, statistic, wanted in ((dy, x, w, rstd, needs), (dy2, x2, w2, rstd2, needs2)):
            found: Any = (None, None)
            if given is not None and any(wanted):
                found = BackwardOnce.apply(given, None, rows, weight, statistic, *options, *wanted)
            gradients += [t if needed else None for t, needed in zip(found, wanted, strict=True)]
    return *gradients, None, None, None, None


_BackwardOnce = undifferentiable(
    "backward_pair",
    f"a second derivative of {PAIR} is not implemented; differentiate rmsnorm.reference.truth, or plain torch",
)
_Forward = reverse_only("forward_pair", "torch.ops.rmsnorm.forward_pair", _setup_context, _gradients)

for _name, _run, _function, _fake, _tensors in (
    ("forward_pair", _run_forward, _Forward, _fake_forward, 4),
    ("backward_pair", _run_backward, _BackwardOnce, _fake_backward, 8),
):
    _LIB.impl(_name, _run, "CompositeExplicitAutograd")
    _kernel = autograd_kernel(_name, f"torch.ops.rmsnorm.{_name}", "rmsnorm.rms_norm or rmsnorm.rms_norms", _function)
    _LIB.impl(_name, _kernel, "Autograd")
    torch.library.register_fake(f"rmsnorm::{_name}", _fake, lib=_LIB)
    torch.library.register_vmap(f"rmsnorm::{_name}", vmap_by_sample(_name, _tensors), lib=_LIB)
