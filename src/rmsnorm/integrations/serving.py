"""Which rounding an inference engine's RMSNorm is computed with, decided from the dtypes of its tensors."""

import torch
from torch import Tensor

from rmsnorm.spec import KERNEL_DTYPES, Cast

# The user chooses one by the name of a provider (vLLM) or of a plugin (SGLang). The choice is for weights of the dtype
# of x only. The user has to make it, because the engines do not tell their kernels how the model's own class rounds.
CASTS: dict[str, Cast] = {"rmsnorm": "early", "rmsnorm_late": "late"}


def cast_for(x: Tensor, weight: Tensor | None, same_dtype: Cast) -> Cast | None:
    """The cast with which to compute a norm that returns the dtype of x; None if we do not compute it.

    Looks at dtypes, the device and the last dimension only, so the batch size does not change the cast.

    Args:
        x: (..., N).
        weight: (N,) or None.
        same_dtype: The cast for a weight of the dtype of x.

    Returns:
        `same_dtype` for a weight of the dtype of x, or none. "late" for a float32 weight of 16-bit x, for which the
        engines multiply in fp32: Gemma's `1 + weight` arrives this way. None for other dtypes, shapes and devices.
    """
    if x.dtype not in KERNEL_DTYPES or x.device.type not in ("cpu", "cuda") or x.dim() == 0:
        return None
    if weight is None:
        return same_dtype
    if weight.shape != x.shape[-1:]:
        return None
    if weight.dtype is x.dtype:
        return same_dtype
    return "late" if weight.dtype is torch.float32 else None
