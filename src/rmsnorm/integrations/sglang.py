"""SGLang 0.5.23: a hook around `RMSNorm.forward_cuda`, turned on by naming the plugin.

    SGLANG_PLUGINS=rmsnorm python -m sglang.launch_server --model-path MODEL

For a weight of the dtype of x, `rmsnorm` rounds "early", as the classes of Llama, DeepSeek and Qwen do. `rmsnorm_late`
rounds "late", as those of GPT-OSS and Olmo 2 do, and as SGLang's own kernels do for every model. A layer with
`cast_x_before_out_mul` is computed "early" by both. What we do not compute goes to SGLang's own forward.
"""

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from rmsnorm.functional import add_rms_norm, rms_norm
from rmsnorm.integrations.serving import CASTS, cast_for
from rmsnorm.spec import Cast

TARGET = "sglang.srt.layers.layernorm.RMSNorm.forward_cuda"
Forward = Callable[..., Tensor | tuple[Tensor, Tensor]]


def register() -> None:
    """Register the hook of the plugin `rmsnorm`, if the user has named that plugin."""
    _register("rmsnorm")


def register_late() -> None:
    """Register the hook of the plugin `rmsnorm_late`, if the user has named that plugin."""
    _register("rmsnorm_late")


def _register(name: str) -> None:
    # SGLang runs every installed plugin unless SGLANG_PLUGINS is set; ours must not change outputs unasked.
    named = {plugin.strip() for plugin in os.environ.get("SGLANG_PLUGINS", "").split(",")}
    if name not in named:
        return
    if named.issuperset(CASTS):
        raise ValueError(f"[SGLANG_PLUGINS] names {' and '.join(CASTS)}, expected one of them")
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    # Registering twice is harmless: the outer hook computes every call that we can compute.
    HookRegistry.register(TARGET, _hook(CASTS[name]), HookType.AROUND)


def _hook(same_dtype: Cast) -> Callable[..., Any]:
    def forward_cuda(
        original: Forward,
        self: Any,
        x: Tensor,
        residual: Tensor | None = None,
        post_residual_addition: Tensor | None = None,
        quant_linear: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        cast = _cast(self, x, residual, same_dtype)
        if cast is None or post_residual_addition is not None or quant_linear is not None:
            return original(self, x, residual, post_residual_addition, quant_linear)
        if residual is None:
            return rms_norm(x, self.weight.data, self.variance_epsilon, cast=cast)
        return add_rms_norm(x, residual, self.weight.data, self.variance_epsilon, cast=cast)

    return forward_cuda


def _cast(norm: Any, x: Tensor, residual: Tensor | None, same_dtype: Cast) -> Cast | None:
    """The cast with which we compute this call; None if SGLang's own forward is to compute it."""
    if (
        norm.variance_size_override is not None
        or norm.override_orig_dtype is not None
        or norm._quant_linear is not None
        or _has_on_policy_target()
        or (residual is not None and (norm.fp32_residual or residual.dtype is not x.dtype))
    ):
        return None
    cast = cast_for(x, norm.weight, same_dtype)
    return "early" if cast is not None and norm.cast_x_before_out_mul else cast


def _has_on_policy_target() -> bool:
    """Whether SGLang was told to round as a certain trainer does."""
    from sglang.srt.runtime_context import get_exec

    try:
        return get_exec().deterministic.rl_on_policy_target is not None
    except ValueError:  # layers can be used without a server, and then there are no settings
        return False
