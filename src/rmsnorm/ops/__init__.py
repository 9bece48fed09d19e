"""The operators `torch.ops.rmsnorm.*`; importing this registers them."""

from rmsnorm.ops import gated, operators, pairs, slices

__all__ = ["gated", "operators", "pairs", "slices"]
