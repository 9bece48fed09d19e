"""The operators `torch.ops.rmsnorm.*`; importing this registers them."""

from rmsnorm.ops import operators, pairs

__all__ = ["operators", "pairs"]
