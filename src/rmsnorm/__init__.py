"""Fused RMSNorm for PyTorch that rounds as DeepSeek's published class does and gives the same bits on every device.

rms_norm, add_rms_norm, rms_norms, gated_rms_norm: the functions.
RMSNorm, GatedRMSNorm, DeepseekV2RMSNorm, TorchRMSNorm: the layers.
patch, unpatch, PatchReport: replace the norms of a model, restore them, and what patch found.
prove, Proof: which RMSNorm a module computes, found by running it.
explain, warmup: which kernel a call would run and why; compile the kernels ahead of time.
batch_invariant: a context in which F.rms_norm and torch.nn.RMSNorm give the bits of rms_norm.
recompute: a context in which norm outputs are not kept for the backward pass, which recomputes them.
decompositions: the operators in plain torch, for exported programs that run without this package.
cost, Cost: exact counts of FLOPs, bytes and memory.
register: tell torch's FLOP counter and transformers about this package.
"""

from rmsnorm.costs.counts import Cost, cost
from rmsnorm.functional import add_rms_norm, explain, gated_rms_norm, rms_norm, rms_norms, warmup
from rmsnorm.modules import DeepseekV2RMSNorm, GatedRMSNorm, RMSNorm
from rmsnorm.ops.eager_recomputation import recompute
from rmsnorm.ops.plain import decompositions
from rmsnorm.patching.batch_invariance import batch_invariant
from rmsnorm.patching.finding import Proof
from rmsnorm.patching.patch import patch, unpatch
from rmsnorm.patching.patch_report import PatchReport
from rmsnorm.patching.proof import prove
from rmsnorm.patching.torch_norm import TorchRMSNorm
from rmsnorm.register import register

__version__ = "0.2.0"

__all__ = [
    "Cost",
    "DeepseekV2RMSNorm",
    "GatedRMSNorm",
    "PatchReport",
    "Proof",
    "RMSNorm",
    "TorchRMSNorm",
    "add_rms_norm",
    "batch_invariant",
    "cost",
    "decompositions",
    "explain",
    "gated_rms_norm",
    "patch",
    "prove",
    "recompute",
    "register",
    "rms_norm",
    "rms_norms",
    "unpatch",
    "warmup",
]
