"""Finds the spec that a norm computes wherever input and weight share a dtype."""

import contextlib
import math
from dataclasses import dataclass

from torch import Tensor

from rmsnorm.bits import differing
from rmsnorm.patching.difference import difference
from rmsnorm.patching.expression import ACTIVATIONS, Refusal, epsilon, loosened, nodes
from rmsnorm.patching.observe import Observation
from rmsnorm.patching.probe import NotProven, Probe
from rmsnorm.patching.rule import TRAINING_DTYPES
from rmsnorm.patching.states import State, all_modes
from rmsnorm.spec import Cast, Gate, Spec, may_be_eps


@dataclass(frozen=True)
class Found:
    """The one spec that matches, and whether it does so without loosening how mean and rsqrt are computed."""

    spec: Spec
    matches_published_bits: bool


def find_spec(probe: Probe, strict: bool) -> Found:
    """The spec of the norm. Raises NotProven if there is none, or more than one."""
    specs, refusal = _matching_specs(probe, loosely=False)
    matches_published_bits = bool(specs)
    if not specs and not strict:
        specs, refusal = _matching_specs(probe, loosely=True)
    if not specs:
        raise NotProven(refusal)
    if len(specs) > 1:
        raise NotProven(f"{len(specs)} specs match it, so what it computes is ambiguous")
    return Found(specs[0], matches_published_bits)


def mismatch(state: State) -> str:
    return f"its operators match no supported RMSNorm for {state}"


def _matching_specs(probe: Probe, loosely: bool) -> tuple[list[Spec], str]:
    """The specs that match in every dtype and mode; if there are none, the reason."""
    candidates: list[Spec] | None = None
    for dtype in TRAINING_DTYPES:
        for shape in probe.shapes:
            for state in all_modes(probe.same_dtypes(dtype)):
                seen, x, w = probe.run(state, shape)
                if candidates is None:
                    candidates = _candidates(probe, seen, _observed_eps(seen, shape))
                before, candidates = candidates, [c for c in candidates if probe.matches(seen, x, w, c, loosely)]
                if not candidates:
                    return [], mismatch(state) + _more(probe, loosely, state, shape, seen, x, w, before)
    return candidates or [], ""


def _observed_eps(seen: Observation, shape: tuple[int, ...]) -> float | None:
    return epsilon(loosened(seen.expression, math.prod(shape) // seen.groups))


def _candidates(probe: Probe, seen: Observation, eps: float | None) -> list[Spec]:
    """The specs that a norm with this eps may compute; none if it is not a valid eps."""
    if eps is None or not may_be_eps(eps):
        return []
    if probe.gated:
        return _gated_candidates(probe, seen, eps)
    if not probe.weighted:
        return [Spec(eps), Spec(eps, "first")]
    # Not first: its gradient of the weight would be that of a rounded statistic in the class, and not in our kernels.
    return [Spec(eps), *(Spec(eps, "late", offset) for offset in (0.0, 1.0))]


def _gated_candidates(probe: Probe, seen: Observation, eps: float) -> list[Spec]:
    """With the activation and the groups that were seen."""
    activations = {node.op for node in nodes(seen.expression)} & {*ACTIVATIONS}
    gates = [Gate(a, first) for a in ACTIVATIONS if a in activations for first in (False, True)]
    casts: tuple[Cast, ...] = ("early", "late")
    specs = [Spec(eps, cast, gate=gate, groups=seen.groups) for gate in gates for cast in casts]
    if probe.weighted:
        return specs
    # Without a weight, and the gate first, there is one rounding only.
    return [s for s in specs if s.cast == "early" or (s.gate is not None and not s.gate.first)]


def _more(
    probe: Probe, loosely: bool, state: State, shape: tuple[int, ...], seen: Observation, x: Tensor, w: Tensor | None,
    candidates: list[Spec],
) -> str:  # fmt: skip
    """More about why a norm matches none of the candidates in a state."""
    hint = "" if loosely else _hint(probe, seen, x, w, candidates)
    if hint:
        return hint
    why = difference(seen.expression, probe.gated)
    return (f": {why}" if why else "") + (_nearest(probe, seen, state, shape) if loosely else "")


def _hint(probe: Probe, seen: Observation, x: Tensor, w: Tensor | None, candidates: list[Spec]) -> str:
    """Says so if strict=False would accept the norm in this state."""
    candidates = candidates or _candidates(probe, seen, _observed_eps(seen, probe.shapes[0]))
    if any(probe.matches(seen, x, w, c, loosely=True) for c in candidates):
        how = " (it divides by a square root)" if any(n.op == "sqrt" for n in nodes(seen.expression)) else ""
        return f"; it computes the mean or rsqrt differently{how}, which strict=False accepts"
    return ""


def _nearest(probe: Probe, seen: Observation, state: State, shape: tuple[int, ...]) -> str:
    """Says how far its outputs are from the nearest *exact*."""
    numbers = {float(v) for v in vars(probe.module).values() if type(v) in (int, float) and 0 <= v < 1}
    found = []
    x, w = probe.draw_many(state.dtypes[0], shape)
    gate = probe.draw_gate(x, state.dtypes)
    with contextlib.suppress(Exception, Refusal):
        y = probe.call(probe.stand_in(w), x.clone(), gate)
        for spec in (c for eps in numbers for c in _candidates(probe, seen, eps)):
            ours = probe.exact(x, w, spec, gate)
            if y.dtype == ours.dtype and y.shape == ours.shape:
                count, ulp = differing(y, ours)
                found.append((count / y.numel(), ulp))
    if not found:
        return ""
    share, ulp = min(found)
    return f"; {100 * share:.2g}% of its outputs differ from exact, by up to {ulp} ulp"
