"""The proof of one norm: which RMSNorm it computes, or why it is not proven to compute one.

    eligibility      what rules it out before it is run
    spec_search      the one spec that its forward computes, in every dtype and mode
    coverage         the ranks, dtypes and autocast states in which that holds
    eps_attribute    the attribute that holds eps
    gradients        that its gradients are the formula's

`prove` shows what is found, and `patch` acts on it. All steps but the first run the norm's own forward through a probe
(probe.py), which observes it on a stand-in. What a proof cannot see is listed in docs/patching.md.
"""

import contextlib
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rmsnorm.bits import differing
from rmsnorm.errors import complaint, one_line, type_name
from rmsnorm.patching.coverage import find_coverage
from rmsnorm.patching.eligibility import fingerprint, forward_parameters, may_be_gated, why_ineligible
from rmsnorm.patching.eps_attribute import find_eps_attribute
from rmsnorm.patching.expression import Refusal
from rmsnorm.patching.finding import OutputChange, Proof
from rmsnorm.patching.gradients import check_gradients
from rmsnorm.patching.layers import proof_of_layer
from rmsnorm.patching.other_libraries import forward_on_instance
from rmsnorm.patching.probe import NotProven, Probe, is_close
from rmsnorm.patching.recomputing import whole_model
from rmsnorm.patching.replacement import original_class
from rmsnorm.patching.rule import TRAINING_DTYPES, Rule, dtype_name
from rmsnorm.patching.spec_search import find_spec
from rmsnorm.spec import Spec, check_bool


def prove(module: nn.Module, *, strict: bool = True) -> Proof:
    """Find out which RMSNorm a module computes, by running its forward on stand-ins.

    `patch` decides in the same way about each norm of a model. The module is only read: its parameters, hooks, mode and
    class and the random state stay as they are, and nothing keeps it alive. It may be on any device, also on meta.

    The proof is about the module's own forward, without hooks.

    Args:
        module: The norm; it may be one that `patch` has replaced (its own forward counts), a layer of this package, or
            what torch.compile returned for a norm.
        strict: If False, the mean or the rsqrt may be computed in another way than the published classes compute them,
            such as with `1 / sqrt`.

    Returns:
        The spec that the module computes, for which dtypes, and how its outputs would change if it were replaced; or
        the reason why that is not proven. Print it.

    Raises:
        TypeError: If `module` is not a torch.nn.Module, or `strict` is not a bool.

    Example:
        >>> rmsnorm.prove(torch.nn.RMSNorm(64, eps=1e-6)).spec
        Spec(eps=1e-06, cast='late', offset=0.0)
        >>> print(rmsnorm.prove(torch.nn.LayerNorm(64)))
        LayerNorm is not proven: it holds more than a weight: bias
    """
    if not isinstance(module, nn.Module):
        of_class = isinstance(module, type) and issubclass(module, nn.Module)
        was = f"is the class {module.__name__}" if of_class else f"is {type_name(module)}"
        expected = "a torch.nn.Module" + (f": an instance, such as {module.__name__}(64)" if of_class else "")
        raise TypeError(complaint("prove", "module", was, expected))
    check_bool("prove", "strict", strict)
    module = whole_model(module)
    if (function := forward_on_instance(module)) is not None:
        reason = f"it has a forward that was set on the instance ({function})"
        return Proof(original_class(module).__name__, reason=reason)
    return proof_of_layer(module) or proof_of(module, strict, {})


def proof_of(module: nn.Module, strict: bool, proofs: dict[Any, Proof]) -> Proof:
    """The proof of a module, shared by norms that it cannot tell apart. An error becomes the reason.

    Args:
        module: The module; it is only read.
        strict: As in `prove`.
        proofs: The proofs that were made so far, by `fingerprint`; this one is added.
    """
    cls = original_class(module)
    try:
        why = why_ineligible(cls, module)
        if why is not None:
            return Proof(cls.__name__, reason=why)
        key = fingerprint(cls, module)
        if key not in proofs:
            proofs[key] = _proof_by_running(cls, module, strict)
        return proofs[key]
    except Exception as error:  # noqa: BLE001  # one unusual class must not end patch for the other norms
        return Proof(cls.__name__, reason=f"the proof failed with {in_words(error)}")


def in_words(error: Exception) -> str:
    """The error in one line, also if its own text cannot be made."""
    try:
        return one_line(error)
    except Exception:  # noqa: BLE001
        return type(error).__name__


def _proof_by_running(cls: type[nn.Module], module: nn.Module, strict: bool) -> Proof:
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
            _on_cpu(),
            torch.autograd.set_detect_anomaly(False),
            warnings.catch_warnings(action="ignore"),  # about dtypes that only the probe mixes
        ):
            return _prove(Probe(cls, module), strict)
    except (NotProven, Refusal) as reason:
        if not may_be_gated(cls):
            return Proof(cls.__name__, reason=str(reason))
        takes = f"its forward takes ({', '.join(map(str, forward_parameters(cls)))})"
        return Proof(cls.__name__, reason=f"{takes}; taken as a gated norm, {reason}")


def _on_cpu() -> contextlib.AbstractContextManager[Any]:
    """Make the CPU the default device. torch's context doubles the time of small operators: enter it only if needed."""
    try:
        if torch.empty(0).device.type == "cpu":
            return contextlib.nullcontext()
    except Exception:  # noqa: BLE001  # the default device cannot be used: in a forked process, or without a driver
        pass
    return torch.device("cpu")


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
    changes = _output_changes(probe, spec)
    return Proof(probe.cls.__name__, spec, "", rule, found.matches_published_bits, changes, memory_saved)


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
