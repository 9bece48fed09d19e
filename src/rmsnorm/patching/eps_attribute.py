"""Finds the attribute that holds a norm's eps: the one whose value is what the forward adds under the root."""

import contextlib
from dataclasses import dataclass, replace

import torch

from rmsnorm.patching.probe import NotProven, Probe
from rmsnorm.patching.states import State
from rmsnorm.spec import Spec, may_be_eps


@dataclass(frozen=True)
class EpsAttribute:
    """The name of the attribute, and whether None there means fp32's machine epsilon, as in torch.nn.RMSNorm."""

    name: str
    none_is_torch_eps: bool


def find_eps_attribute(probe: Probe, spec: Spec) -> EpsAttribute:
    """The attribute that holds eps. Raises NotProven if there is none."""
    for name, value in probe.attributes.items():  # of the instance or of its class
        if type(value) not in (int, float) and not (value is None and name == "eps"):
            continue
        doubled = 0.0 if value is None else float(value) * 2  # type: ignore[arg-type]
        in_code = {n for n in probe.constants if may_be_eps(n)}
        others = {0.0, 1.0, 0.0078125, 3.3e-9, doubled + 0.0078125, *in_code}
        with contextlib.suppress(NotProven):
            if all(_follows(probe, spec, name, other) for other in sorted(others)):
                return EpsAttribute(name, _none_is_torch_eps(probe, spec, name))
    raise NotProven("none of its attributes holds its eps")


def _follows(probe: Probe, spec: Spec, name: str, eps: float | None) -> bool:
    """Whether the norm computes the spec with another eps if the attribute has that value."""
    means = torch.finfo(torch.float32).eps if eps is None else eps
    seen, x, w = probe.run(State(probe.same_dtypes(torch.float32)), probe.shapes[0], **{name: eps})
    return probe.matches(seen, x, w, replace(spec, eps=means))


def _none_is_torch_eps(probe: Probe, spec: Spec, name: str) -> bool:
    with contextlib.suppress(NotProven):
        return _follows(probe, spec, name, None)
    return False
