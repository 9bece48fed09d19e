"""Tells other libraries about this package. Nothing else in the package edits anything outside it."""

import importlib
import sys

import torch

from rmsnorm.costs.flops import FLOP_FORMULAS
from rmsnorm.modules import DeepseekV2RMSNorm, RMSNorm
from rmsnorm.patching.torch_norm import TorchRMSNorm


def register() -> None:
    """Register this package's operators with torch's FLOP counter and its layers with transformers.

    Call it once, before you count FLOPs or build a `Trainer`; calling it again changes nothing. It is needed for:

    - `torch.utils.flop_counter.FlopCounterMode`, which otherwise counts 0 FLOPs for our operators;
    - older versions of transformers, whose `Trainer` exempts the classes in `ALL_LAYERNORM_LAYERS` from weight decay
      (5.23 goes by parameter names instead), for models that contain our layers: `RMSNorm`, `DeepseekV2RMSNorm` or
      `TorchRMSNorm`. Import transformers first; `register` does not import it.

    Norms that `patch` replaced need no registration for `Trainer`: they are instances of the model's own classes.

    Example:
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> rmsnorm.register()
        >>> with FlopCounterMode(display=False) as counter:
        ...     y = rmsnorm.rms_norm(torch.randn(16, 1280))
        >>> counter.get_total_flops()
        61488
    """
    _register_flop_formulas()
    _register_layers()


def _register_flop_formulas() -> None:
    from torch.utils import flop_counter  # here, because it imports Triton

    for name, formula in FLOP_FORMULAS.items():
        operator = getattr(torch.ops.rmsnorm, name)
        if operator not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(operator)(formula)


def _register_layers() -> None:
    if "transformers" not in sys.modules:
        return
    try:
        layers = getattr(importlib.import_module("transformers.pytorch_utils"), "ALL_LAYERNORM_LAYERS", None)
    except ImportError:
        return
    if isinstance(layers, list):
        layers.extend(cls for cls in (DeepseekV2RMSNorm, RMSNorm, TorchRMSNorm) if cls not in layers)
