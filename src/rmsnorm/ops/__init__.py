"""The operators `torch.ops.rmsnorm.*`; importing this registers them."""

from rmsnorm.ops import gated, operators, pairs, sandwich, slices

__all__ = ["gated", "operators", "pairs", "sandwich", "slices"]
