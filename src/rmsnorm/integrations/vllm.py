"""vLLM 0.33: providers of `vllm.ir.ops.rms_norm` and `fused_add_rms_norm`, which the user chooses by name.

    vllm serve MODEL --ir-op-priority.rms_norm=rmsnorm,native --ir-op-priority.fused_add_rms_norm=rmsnorm,native

For a weight of the dtype of x, `rmsnorm` rounds "early", as the classes of Llama, DeepSeek and Qwen do, and
`rmsnorm_late` rounds "late", as those of GPT-OSS and Olmo 2 do. A call that we do not compute goes to the next
provider.
"""

import functools
import logging
from collections.abc import Callable

from torch import Tensor

from rmsnorm.functional import add_rms_norm, rms_norm
from rmsnorm.integrations.serving import CASTS, cast_for
from rmsnorm.spec import Cast

logger = logging.getLogger(__name__)


def register() -> None:
    """Register the providers with vLLM, which calls this in each of its processes. Calling it again changes nothing.

    It is the entry point `rmsnorm` in the group `vllm.general_plugins`. It changes nothing that vLLM computes until
    the user names a provider.
    """
    try:
        from vllm.ir import ops
    except ImportError:
        logger.warning("This version of vLLM has no vllm.ir: the providers of rmsnorm are not registered")
        return
    for name, cast in CASTS.items():
        for op, norm, supports in (
            (ops.rms_norm, _rms_norm(cast), _supports_rms_norm),
            (ops.fused_add_rms_norm, _fused_add_rms_norm(cast), _supports_fused_add_rms_norm),
        ):
            if name not in op.impls:
                # Outputs are new tensors, which `maybe_inplace` allows: the inputs stay as they are.
                op.register_impl(name, supports_args=supports)(norm)


# The names, defaults and annotations of the parameters below must be those of vLLM's own functions.


def _supports_rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    fits = variance_size is None or (x.dim() > 0 and 1 <= variance_size <= x.shape[-1])
    return fits and epsilon >= 0 and cast_for(x, weight, "early") is not None


def _supports_fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    # vLLM returns the sum in the dtype of x; ours has the promoted dtype, which is the same for equal dtypes only.
    return x_residual.dtype is x.dtype and _supports_rms_norm(x, weight, epsilon, variance_size)


@functools.cache
def _rms_norm(same_dtype: Cast) -> Callable[..., Tensor]:
    def rmsnorm_rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        cast = cast_for(x, weight, same_dtype) or same_dtype
        return rms_norm(x, weight, epsilon, cast=cast, variance_size=variance_size)

    return rmsnorm_rms_norm


@functools.cache
def _fused_add_rms_norm(same_dtype: Cast) -> Callable[..., tuple[Tensor, Tensor]]:
    def rmsnorm_fused_add_rms_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        cast = cast_for(x, weight, same_dtype) or same_dtype
        return add_rms_norm(x, x_residual, weight, epsilon, cast=cast, variance_size=variance_size)

    return rmsnorm_fused_add_rms_norm
