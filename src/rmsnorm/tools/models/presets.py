"""Configurations of published models, built from their sizes without any file.

`rmsnorm cost` takes all of them; `rmsnorm report` takes those that `loading.PRESETS` gives weights.
"""

from collections.abc import Callable
from typing import Any

from rmsnorm.tools.models.architecture import of_kind


def deepseek_ocr(transformers: Any, layers: int = 12, **changes: Any) -> Any:
    """Return the configuration of DeepSeek-OCR's language decoder, a class of DeepSeek-OCR 2 in transformers.

    Args:
        transformers: The library.
        layers: The number of layers.
        changes: Fields that are to have other values.

    Raises:
        CommandError: If the installed transformers does not have the architecture.
    """
    sizes = {
        "vocab_size": 129280, "hidden_size": 1280, "intermediate_size": 6848, "num_hidden_layers": layers,
        "num_attention_heads": 10, "num_key_value_heads": 10, "max_position_embeddings": 8192, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "n_shared_experts": 2, "moe_intermediate_size": 896,
        "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1),
    }  # fmt: skip
    preset = "deepseek-ocr" if layers == 12 else f"deepseek-ocr-{layers}-layers"
    return of_kind("deepseek_ocr2_text", transformers, preset)(**sizes | changes)


def _deepseek_v2_lite(transformers: Any) -> Any:
    return of_kind("deepseek_v2", transformers, "deepseek-v2-lite")(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, kv_lora_rank=512, n_routed_experts=64,
        num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1, max_position_embeddings=163840,
    )  # fmt: skip


def _deepseek_v2(transformers: Any) -> Any:
    return of_kind("deepseek_v2", transformers, "deepseek-v2")(
        vocab_size=102400, hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=60,
        num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512, n_routed_experts=160,
        num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1, max_position_embeddings=163840,
    )  # fmt: skip


def _deepseek_v3(transformers: Any) -> Any:
    return of_kind("deepseek_v3", transformers, "deepseek-v3")()  # the defaults are this model


# By name: makes the configuration, given the library.
PRESETS: dict[str, Callable[[Any], Any]] = {
    "deepseek-ocr": deepseek_ocr,
    "deepseek-ocr-40-layers": lambda transformers: deepseek_ocr(transformers, 40),
    "deepseek-v2-lite": _deepseek_v2_lite,
    "deepseek-v2": _deepseek_v2,
    "deepseek-v3": _deepseek_v3,
}
