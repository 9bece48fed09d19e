"""The operators `torch.ops.rmsnorm.forward` and `backward`; importing this registers them."""

from rmsnorm.ops import operators

__all__ = ["operators"]
