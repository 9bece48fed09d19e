"""The FLOP formulas of our operators. `rmsnorm.register` gives them to torch's FlopCounterMode."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from rmsnorm.costs.case import Case
from rmsnorm.costs.ours import backward_flops, forward_flops
from rmsnorm.costs.tape import F32


def _operator_case(shape: Sequence[int], weight: object, cast: str, offset: float, added: object) -> Case:
    """FLOPs depend on no dtype. added: the residual, or in the backward pass the gradient of the sum."""
    return Case(
        M=math.prod(shape[:-1]), N=shape[-1], x_dtype=F32, w_dtype=None if weight is None else F32,
        implementation="ours" if added is None else "ours+residual", phase="forward", device="cpu", cast=cast,
        offset=offset,
    )  # fmt: skip


def _count_forward(x: Any, residual: Any, weight: Any, eps: float, cast: str, offset: float, *_: Any, **__: Any) -> int:
    return forward_flops(_operator_case(x, weight, cast, offset, residual))


def _count_backward(
    dy: Any, ds: Any, x: Any, weight: Any, rstd: Any, cast: str, offset: float, need_dx: bool, need_dw: bool, **_: Any
) -> int:
    return backward_flops(_operator_case(x, weight, cast, offset, ds), need_dx, need_dw)


def _count_forward_pair(x: Any, weight: Any, x2: Any, weight2: Any, *options: Any, **_: Any) -> int:
    return _count_forward(x, None, weight, *options) + _count_forward(x2, None, weight2, *options)


def _count_backward_pair(
    dy: Any, x: Any, weight: Any, rstd: Any, dy2: Any, x2: Any, weight2: Any, rstd2: Any, *options: Any, **_: Any
) -> int:
    first = _count_backward(dy, None, x, weight, rstd, *options)
    return first + _count_backward(dy2, None, x2, weight2, rstd2, *options)


def _activation(activation: str) -> int:
    """FLOPs of the sigmoid of one number (-g, exp, 1 +, 1 /), or of silu, which multiplies by the number too."""
    return 5 if activation == "silu" else 4


def _count_gated_forward(
    x: Any, gate: Any, weight: Any, eps: float, cast: str, activation: str, gate_first: bool, groups: int, *_: Any,
    **__: Any,
) -> int:  # fmt: skip
    """Those of a norm whose rows are the groups, of the activation, and of the product with it."""
    norm = _count_forward((*x[:-1], groups, x[-1] // groups), None, weight, eps, cast, 0.0)
    return int(norm + (_activation(activation) + 1) * math.prod(x))


def _count_gated_backward(
    dy: Any, x: Any, gate: Any, weight: Any, rstd: Any, cast: str, activation: str, gate_first: bool, groups: int,
    need_dx: bool, need_dgate: bool, need_dw: bool, **_: Any,
) -> int:  # fmt: skip
    """Those of a norm whose rows are the groups, and E for each of these, as `gated_reference.backward` has them.

    Always: the activation, and its product with dy, or with x for the gate first. dgate: the slope (1 - σ, its product
    with the activation, and for silu + σ), the product with it, dz·x for the gate first, and otherwise dy·u and, with
    a weight, u = xh·w. dx for the gate first: dz·a.
    """
    need_dz = need_dx or (need_dgate and gate_first)
    grouped = (*x[:-1], groups, x[-1] // groups)
    norm = _count_backward(dy, None, grouped, weight, rstd, cast, 0.0, need_dz, need_dw)
    of_columns = x[-1] - grouped[-1] if need_dw and weight is not None else 0  # dw sums each of the N columns
    per_element = _activation(activation) + 1
    if need_dgate:
        per_element += 4 + (activation == "silu") + (not gate_first and weight is not None)
    if need_dx and gate_first:
        per_element += 1
    return int(norm - of_columns + per_element * math.prod(x))


# By the name of the operator.
FLOP_FORMULAS: dict[str, Callable[..., int]] = {
    "forward": _count_forward,
    "backward": _count_backward,
    "forward_pair": _count_forward_pair,
    "backward_pair": _count_backward_pair,
    "gated_forward": _count_gated_forward,
    "gated_backward": _count_gated_backward,
}
