"""A small Qwen3 model with random weights, and the words that it reads."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(3))
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip


def randomized(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 1.0 if parameter.dim() == 1 else 0.2
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def qwen() -> Any:
    return randomized(Qwen3ForCausalLM(Qwen3Config(**SMALL)))


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]
