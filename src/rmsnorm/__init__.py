"""RMSNorm for PyTorch: the Definition's bits, the same bits everywhere, at the speed of memory."""

from rmsnorm.ops import add_rms_norm, explain, rms_norm, warmup

__version__ = "0.1.0"

__all__ = ["add_rms_norm", "explain", "rms_norm", "warmup"]
