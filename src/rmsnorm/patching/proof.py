"""The proof of one norm: which RMSNorm it computes, or why that was not found.

    eligibility      what rules it out before it is run
    spec_search      the one spec that its forward computes, in every dtype and mode
    coverage         the ranks, dtypes and autocast states in which that holds
    eps_attribute    the attribute that holds eps
    gradients        that its gradients are the formula's

All of them but the first run its own forward through a probe (probe.py), which observes it on a stand-in. What a proof
cannot see is listed in docs/patching.md.
"""

import warnings
from dataclasses import replace

import torch
from torch import nn

from rmsnorm.bits import differing
from rmsnorm.patching.coverage import find_coverage
from rmsnorm.patching.eligibility import forward_parameters, may_be_gated
from rmsnorm.patching.eps_attribute import find_eps_attribute
from rmsnorm.patching.expression import Refusal
from rmsnorm.patching.gradients import check_gradients
from rmsnorm.patching.probe import NotProven, Probe, is_close
from rmsnorm.patching.rule import TRAINING_DTYPES, OutputChange, Proof, Rule, dtype_name
from rmsnorm.patching.spec_search import find_spec
from rmsnorm.spec import Spec


def prove(cls: type[nn.Module], module: nn.Module, strict: bool) -> Proof:
    """Prove what an eligible norm computes.

    Args:
        cls: The norm's own class.
        module: The norm; it is only read.
        strict: If False, its mean and rsqrt may be computed in another way than *published* computes them.

    Returns:
        The rule that holds in every state and what replacing the norm changes, or the reason why it is not proven.
    """
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.autograd.set_detect_anomaly(False),
            warnings.catch_warnings(action="ignore"),  # about dtypes that only the probe mixes
        ):
            return _prove(Probe(cls, module), strict)
    except (NotProven, Refusal) as reason:
        if not may_be_gated(cls):
            return Proof(reason=str(reason))
        takes = f"its forward takes ({', '.join(map(str, forward_parameters(cls)))})"
        return Proof(reason=f"{takes}; taken as a gated norm, {reason}")


def _prove(probe: Probe, strict: bool) -> Proof:
    found = find_spec(probe, strict)
    probe.loosely = not found.matches_published_bits
    coverage = find_coverage(probe, found.spec)
    eps_attribute = find_eps_attribute(probe, found.spec)
    rule = Rule(
        found.spec.cast, found.spec.offset, eps_attribute.name, probe.weighted, eps_attribute.none_is_torch_eps,
        coverage.own_dtypes, coverage.own_under_autocast, calls_rms_norm="rms_norm" in probe.queries,
        keeps_memory_order=coverage.keeps_memory_order, ranks=coverage.ranks, normalized_shape=probe.normalized_shape,
        gate=found.spec.gate, groups=found.spec.groups, gate_optional=probe.gated and probe.runs_without_gate(),
    )  # fmt: skip
    eps = rule.eps(probe.attributes[rule.eps_attribute])  # the operators have rounded it to fp32
    spec = found.spec if eps is None else replace(found.spec, eps=eps)
    memory_saved = check_gradients(probe, spec, rule.own_dtypes)
    read = {name: value for name, value in probe.attributes.items() if name != rule.eps_attribute}
    rule = replace(rule, attributes=tuple(sorted(read.items())))
    return Proof(rule, spec, "", found.matches_published_bits, _output_changes(probe, spec), memory_saved)


def _output_changes(probe: Probe, spec: Spec) -> dict[str, OutputChange]:
    """How the outputs change on many random rows. Raises NotProven if they are not the spec's."""
    changes = {}
    for dtype in TRAINING_DTYPES:
        x, w = probe.draw_many(dtype, probe.shapes[0])
        gate = probe.draw_gate(x, probe.same_dtypes(dtype))
        y = probe.call(probe.stand_in(w), x, gate)
        if not is_close(y, probe.published(x, w, spec, gate)):
            raise NotProven(f"its operators match no supported RMSNorm for {x.shape[1]} rows")
        count, ulp = differing(y, probe.exact(x, w, spec, gate))
        changes[dtype_name(dtype)] = OutputChange(count / y.numel(), ulp)
    return changes
