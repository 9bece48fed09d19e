"""The operators `torch.ops.rmsnorm.*`; importing this registers them."""

from rmsnorm.ops import gated, operators, pairs, parts, sandwich, slices

__all__ = ["gated", "operators", "pairs", "parts", "sandwich", "slices"]
