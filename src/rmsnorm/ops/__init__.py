"""The operators `torch.ops.rmsnorm.forward`, `backward` and `backward_of_sum`; importing this registers them."""

from rmsnorm.ops import operators

__all__ = ["operators"]
