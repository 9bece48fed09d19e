"""Megatron-core: a backend of layer specs whose RMSNorm is ours, and the block of decoder layers made with it.

    GPTModel(config, transformer_layer_spec=rmsnorm.integrations.megatron.block_spec(config), ...)

rounds "late", as torch's and Transformer Engine's norms do. `block_spec(config, cast="early")` rounds as the classes of
Llama, DeepSeek and Qwen do.
"""

from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from torch import Tensor, nn

from rmsnorm.errors import complaint
from rmsnorm.functional import rms_norm
from rmsnorm.spec import Cast


class RMSNorm(nn.Module):
    """The norm of a Megatron layer, with the arguments with which Megatron builds one.

    It takes `layernorm_zero_centered_gamma` (the weight starts at 0 and 1 is added to it, which needs cast="late") and
    `sequence_parallel` (Megatron then sums the gradient of the weight over the ranks) from the config.

    Args:
        config: Megatron's TransformerConfig.
        hidden_size: N, the width of the rows.
        eps: Added to the mean of squares.
        **_: What Megatron passes to some norms and that changes nothing here, such as `persist_layer_norm`.
    """

    cast: Cast = "late"

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        if config.normalization != "RMSNorm":
            raise ValueError(complaint("RMSNorm", "normalization", f"is {config.normalization!r}", "'RMSNorm'"))
        self.eps = eps
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - self.offset, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, of shape (..., hidden_size)."""
        return rms_norm(x, self.weight, self.eps, cast=self.cast, offset=self.offset)

    def extra_repr(self) -> str:
        """The width, eps, and where it rounds."""
        return f"{self.weight.numel()}, eps={self.eps}, cast={self.cast!r}, offset={self.offset}"


class EarlyRMSNorm(RMSNorm):
    """The norm that casts before it multiplies by the weight."""

    cast = "early"


NORMS: dict[Cast, type[RMSNorm]] = {"late": RMSNorm, "early": EarlyRMSNorm}  # Megatron 0.16 takes classes only


class RMSNormSpecProvider(LocalSpecProvider):
    """Megatron's local backend with our RMSNorm.

    Args:
        cast: "early" or "late".
    """

    def __init__(self, cast: Cast = "late") -> None:
        self.norm = NORMS[cast]

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        """Our norm for `rms_norm`; Megatron's own otherwise. Ours serves q and k, and layers with a residual, alike."""
        return self.norm if rms_norm else super().layer_norm()


def block_spec(config: Any, cast: Cast = "late", **options: Any) -> Any:
    """The decoder layers and the final norm of this pipeline rank: Megatron's `get_gpt_decoder_block_spec` with ours.

    Args:
        config: Megatron's TransformerConfig, with normalization="RMSNorm".
        cast: "early" or "late".
        **options: Those of `get_gpt_decoder_block_spec`, such as `vp_stage` and `qk_l2_norm`.

    Returns:
        TransformerBlockSubmodules.
    """
    # Megatron's function takes no backend: it makes one, by this name.
    with patch.object(gpt_layer_specs, "LocalSpecProvider", partial(RMSNormSpecProvider, cast)):
        block = gpt_layer_specs.get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization="RMSNorm", **options
        )
    block.layer_norm = NORMS[cast]
    return block
