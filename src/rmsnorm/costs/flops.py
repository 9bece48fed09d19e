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


# By the name of the operator.
FLOP_FORMULAS: dict[str, Callable[..., int]] = {
    "forward": _count_forward,
    "backward": _count_backward,
    "forward_pair": _count_forward_pair,
    "backward_pair": _count_backward_pair,
}
