"""torchtitan 0.3: an override that builds our norm for every `RMSNorm.Config` of a model.

    --override.imports rmsnorm.integrations.torchtitan.rms_norm

rounds "late", as torchtitan's own norm does. For a model whose class rounds "early" (Llama, DeepSeek V3 and Qwen of
transformers), and for the same bits as the server that runs the model:

    --override.imports 'rmsnorm.integrations.torchtitan.rms_norm={"cast": "early"}'
"""

from dataclasses import dataclass

from torch import Tensor
from torchtitan.config.override import derive, override
from torchtitan.models.common import nn_modules

from rmsnorm.functional import rms_norm as normalize
from rmsnorm.spec import Cast


class RMSNorm(nn_modules.RMSNorm):
    """torchtitan's RMSNorm, with its parameters, initialization and sharding, computed by `rmsnorm.rms_norm`."""

    @dataclass(kw_only=True, slots=True)
    class Config(nn_modules.RMSNorm.Config):
        """The fields of torchtitan's own config, and where it rounds."""

        cast: Cast = "late"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.cast: Cast = config.cast

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, of shape (..., normalized_shape)."""
        return normalize(x, self.weight, self.eps, cast=self.cast)

    def extra_repr(self) -> str:
        """Torch's text, and where it rounds."""
        return f"{super().extra_repr()}, rmsnorm: {self.cast}"


@override(target=nn_modules.RMSNorm.Config, exact=True, description="rmsnorm: the same bits for every batch and device")
def rms_norm(config: nn_modules.RMSNorm.Config, cast: Cast = "late") -> RMSNorm.Config:
    """The config of our norm, with the fields of torchtitan's."""
    return derive(config, RMSNorm.Config, cast=cast)  # type: ignore[no-any-return]
