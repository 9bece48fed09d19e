"""The operator of sandwich norms, as in Gemma 2: a norm whose output is added to a residual that another norm reads.

    h = rms_norm(x, w);  s = residual + h;  y = rms_norm(s, w2)    ->    y, s = forward_sandwich(x, w, residual, w2)

Only residual_fusion.py calls it, in graphs of torch.compile. On a GPU, one kernel makes the three steps if it can hold
a row, and then h is neither written nor read. The bits are those of separate steps, which round h and s. The backward
pass is that of two norms.
"""

import torch
from torch import Tensor

from rmsnorm import compat
from rmsnorm.kernels import dispatch
from rmsnorm.kernels.host import loader as host
from rmsnorm.ops.derivatives import differentiated
from rmsnorm.ops.dispatch import without_none
from rmsnorm.spec import Cast, check_memory, check_sandwich, check_spec, result_dtype, spec_of, sum_dtype

# An output that was not requested is an empty tensor, because a schema cannot declare an optional output.

_LIB = torch.library.Library("rmsnorm", "FRAGMENT")
_LIB.define(
    "forward_sandwich(Tensor x, Tensor? weight, Tensor residual, Tensor? weight2, float eps, str cast, float offset,"
    " bool with_rstd) -> (Tensor y, Tensor s, Tensor rstd, Tensor rstd2)"
)
_NAME = "forward_sandwich"


def _run(
    x: Tensor, w: Tensor | None, residual: Tensor, w2: Tensor | None, eps: float, cast: Cast, offset: float,
    with_rstd: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    host.look()
    spec = spec_of(_NAME, eps, cast, offset)
    check_sandwich(_NAME, x, w, residual, w2, offset)
    check_memory(_NAME, x=x, weight=w, residual=residual, weight2=w2)
    return without_none(x, *dispatch.forward_sandwich(x, w, residual, w2, spec, with_rstd))


def _fake(
    x: Tensor, w: Tensor | None, residual: Tensor, w2: Tensor | None, eps: float, cast: str, offset: float,
    with_rstd: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_spec(_NAME, eps, cast, offset)
    check_sandwich(_NAME, x, w, residual, w2, offset, symbolic=True)
    h_dtype = result_dtype(x.dtype, None if w is None else w.dtype, cast)
    s_dtype = sum_dtype(h_dtype, residual.dtype)
    y_dtype = result_dtype(s_dtype, None if w2 is None else w2.dtype, cast)
    rstd, rstd2 = (x.new_empty(x.shape[:-1], dtype=torch.float32) if with_rstd else None for _ in range(2))
    return without_none(x, x.new_empty(x.shape, dtype=y_dtype), x.new_empty(x.shape, dtype=s_dtype), rstd, rstd2)


def _autograd(
    x: Tensor, w: Tensor | None, residual: Tensor, w2: Tensor | None, eps: float, cast: Cast, offset: float,
    with_rstd: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Raise if a gradient is needed: graphs call the operator where autograd has been traced already."""
    if differentiated(x, w, residual, w2):
        raise RuntimeError(
            f"rmsnorm::{_NAME} cannot be differentiated: call rmsnorm.rms_norm and rmsnorm.add_rms_norm instead"
        )
    with compat.below_autograd():
        return torch.ops.rmsnorm.forward_sandwich.default(  # type: ignore[no-any-return]
            x, w, residual, w2, eps, cast, offset, with_rstd
        )


_LIB.impl(_NAME, _run, "CompositeExplicitAutograd")
_LIB.impl(_NAME, _autograd, "Autograd")
torch.library.register_fake(f"rmsnorm::{_NAME}", _fake, lib=_LIB)
