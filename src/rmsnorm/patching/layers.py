"""The layers of this package, whose arithmetic is known: what they compute needs no proof."""

from torch import nn

from rmsnorm.modules import DeepseekV2RMSNorm, GatedRMSNorm, RMSNorm
from rmsnorm.patching.finding import OutputChange, Proof
from rmsnorm.patching.rule import LEADING_DIMS, TRAINING_DTYPES, Rule, dtype_name
from rmsnorm.patching.torch_norm import TorchRMSNorm, torch_rule

LAYERS = RMSNorm, GatedRMSNorm, DeepseekV2RMSNorm, TorchRMSNorm


def proof_of_layer(module: nn.Module) -> Proof | None:
    """What a layer of this package computes; None for any other module, or for a subclass with its own forward."""
    layer = next((cls for cls in LAYERS if isinstance(module, cls)), None)
    rule = None if layer is None or type(module).forward is not layer.forward else _rule(module)
    eps = None if rule is None else rule.eps(getattr(module, rule.eps_attribute))
    if rule is None or eps is None:
        return None
    dtypes = [dtype_name(dtype) for dtype in TRAINING_DTYPES]
    unchanged = dict.fromkeys(dtypes, OutputChange(0.0, 0))
    return Proof(type(module).__name__, rule.spec(eps), "", rule, True, unchanged, dict.fromkeys(dtypes, 0))


def _rule(module: nn.Module) -> Rule | None:
    weighted, ranks = module._parameters.get("weight") is not None, frozenset(1 + k for k in LEADING_DIMS)
    if isinstance(module, TorchRMSNorm):
        return torch_rule(module.normalized_shape, weighted)
    if isinstance(module, DeepseekV2RMSNorm):
        return Rule("early", 0.0, "variance_epsilon", weighted, ranks=ranks)
    if isinstance(module, GatedRMSNorm):
        spec = module.spec
        return Rule(spec.cast, spec.offset, "eps", weighted, ranks=ranks, gate=spec.gate, groups=spec.groups)
    assert isinstance(module, RMSNorm)
    return Rule(module.cast, module.offset, "eps", weighted, ranks=ranks)
