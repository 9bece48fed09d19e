"""Sizes of a model: numbers in its configuration, and the FLOP of its matrix products."""

import contextlib
from typing import Any

from torch import nn

_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")  # the names that configurations use


def size_of(config: Any, key: str) -> int:
    """Return an integer of a configuration; 0 if it is missing, or if transformers raises since layers differ."""
    value = None
    with contextlib.suppress(Exception):
        value = getattr(config, key, None)
    return int(value) if isinstance(value, int) else 0


def head_dim(config: Any) -> int:
    """Return the width of an attention head."""
    heads = size_of(config, "num_attention_heads") or 1
    return size_of(config, "head_dim") or size_of(config, "d_kv") or size_of(config, "hidden_size") // heads


def matmul_flops(model: nn.Module, config: Any, batch: int, seq: int) -> int:
    """Count the FLOP of the matrix products in a forward pass.

    For each token that is 2 for every weight that it is multiplied with, for attention's scores and weighted sums, and
    for the head. A token passes through `num_experts_per_tok` experts. Attention is assumed to see the whole sequence
    in every layer; half of the scores are masked in a decoder's self-attention, none in an encoder or between the two.

    Args:
        model: The model, on the meta device.
        config: Its configuration.
        batch: The number of sequences.
        seq: The tokens of each.
    """
    experts = next((n for n in (size_of(config, k) for k in _EXPERTS) if n), 1)
    used = size_of(config, "num_experts_per_tok") or experts
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    met = 0
    for name, p in model.named_parameters():
        if p.dim() < 2 or id(p) in embeddings:
            continue
        routed = (p.dim() == 3 and p.shape[0] == experts) or (".experts." in name and p.dim() == 2)
        met += p.numel() * used // experts if routed else p.numel()
    text = getattr(config, "decoder", None) or config  # an encoder and a decoder may have a configuration each
    met += size_of(text, "vocab_size") * size_of(text, "hidden_size")
    nope = size_of(config, "qk_nope_head_dim")
    mla = nope and any(name.endswith("kv_a_layernorm") for name, _ in model.named_modules())
    heads, layers = size_of(text, "num_attention_heads"), size_of(text, "num_hidden_layers")
    per_layer = getattr(text, "per_layer_config", None) or []  # if layers differ, as in Gemma 4
    if mla:
        a_layer = heads * (nope + size_of(config, "qk_rope_head_dim") + size_of(config, "v_head_dim"))
    elif per_layer:
        a_layer = sum(size_of(c, "num_attention_heads") * 2 * head_dim(c) for c in per_layer) // len(per_layer)
    else:
        a_layer = heads * 2 * head_dim(text)
    parts = [part for part in ("encoder", "decoder") if isinstance(getattr(model, part, None), nn.Module)]
    if getattr(config, "is_encoder_decoder", False) and "encoder" in parts:
        encoder = size_of(getattr(config, "encoder", None) or config, "num_hidden_layers")
        decoder = size_of(config, "num_decoder_layers") or layers
        layers = 2 * encoder + (3 * decoder if "decoder" in parts else 0)
    return 2 * batch * seq * met + batch * seq * seq * layers * a_layer
