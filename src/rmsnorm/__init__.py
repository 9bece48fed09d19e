"""RMSNorm for PyTorch: the Definition's bits, the same bits everywhere, at the speed of memory."""

from rmsnorm.costs.counts import Cost, cost
from rmsnorm.modules import DeepseekV2RMSNorm, RMSNorm
from rmsnorm.ops import add_rms_norm, explain, rms_norm, warmup
from rmsnorm.patching.drop_in import TorchRMSNorm
from rmsnorm.patching.models import Report, patch, unpatch
from rmsnorm.register import register

__version__ = "0.1.0"

__all__ = [
    "Cost",
    "DeepseekV2RMSNorm",
    "RMSNorm",
    "Report",
    "TorchRMSNorm",
    "add_rms_norm",
    "cost",
    "explain",
    "patch",
    "register",
    "rms_norm",
    "unpatch",
    "warmup",
]
