"""patch and unpatch: replace every norm of a model that is proven to be one we compute, in place.

A module is proven, not recognized: its own forward runs on a detached twin with random weights and inputs, and must
equal *published* of exactly one spec bit for bit, in all nine pairs of weight and input dtype. What is proven gets
a class of ours, a subclass of its own: parameters, names, hooks and isinstance stay as they are.
"""

import copy
import functools
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rmsnorm import reference
from rmsnorm.errors import complaint
from rmsnorm.measure import differing
from rmsnorm.module import DeepseekV2RMSNorm, RMSNorm, join_layernorm_layers
from rmsnorm.ops import rms_norm
from rmsnorm.spec import DTYPES, Spec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ONE_TENSOR = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
_ROWS = (2, 12)
# Ours already, and PyTorch's own, whose `normalized_shape` and `eps=None` the probe does not know yet.
_UNTOUCHED = (RMSNorm, DeepseekV2RMSNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Change:
    """What replacing a norm changes on random rows: the share of outputs that differ, and by how many ulp at most."""

    share: float
    ulp: int


@dataclass(frozen=True)
class Verdict:
    """What patch found about one norm. Proven: `spec` says what it computes. Left: `spec` is None, `reason` why.

    changed: by the name of the dtype of weight and input ("float32", "bfloat16", "float16").
    """

    name: str
    cls: str
    spec: Spec | None
    reason: str = ""
    changed: dict[str, Change] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.spec is None:
            return f"left: {self.reason}"
        spec, shares = self.spec, list[str]()
        for dtype, change in self.changed.items():
            shares.append(f"{dtype} {change.share:.2g} of outputs change" + (f", {change.ulp} ulp" * (change.ulp > 0)))
        offset = f", offset {spec.offset:g}" if spec.offset else ""
        return f"proven: {spec.cast}, eps {spec.eps:g}{offset}; " + "; ".join(shares)


@dataclass(frozen=True)
class Report:
    """One verdict for each norm that patch met, in the order of `named_modules`."""

    verdicts: tuple[Verdict, ...]

    @property
    def proven(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.spec is not None)

    @property
    def left(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.spec is None)

    def __str__(self) -> str:
        groups: dict[tuple[str, str], list[str]] = {}
        for v in self.verdicts:
            groups.setdefault((v.cls, str(v)), []).append(v.name)
        lines = [f"{len(self.proven)} of {len(self.verdicts)} norms proven and replaced"]
        lines += [f"  {len(names)} x {cls} ({names[0]}, …) {what}" for (cls, what), names in groups.items()]
        return "\n".join(lines)


def patch(model: nn.Module) -> Report:
    """Replace in place every module whose class name ends in RMSNorm and that is proven to compute an RMSNorm of ours.

    The others stay as they are; the Report says which and why. Patch first, then PEFT, then compile, FSDP, tensor
    parallel or accelerate: those wrap or rebind the forward of what they find. A model that is patched already is
    left alone and reported again. Raises TypeError if `model` is not an nn.Module.
    """
    _check_module("patch", model)
    verdicts: list[Verdict] = []
    proofs: dict[Any, tuple[Spec | None, str, dict[str, Change]]] = {}
    for name, module in _norms(model):
        original, patched = _original(module), hasattr(type(module), "_rmsnorm_spec")
        obstacle = None if patched else _obstacle(module)
        if obstacle is not None:
            verdicts.append(Verdict(name, original.__name__, None, obstacle))
            continue
        key = original, _fingerprint(module)
        if key not in proofs:
            proofs[key] = _prove(original, module)
        spec, reason, changed = proofs[key]
        verdicts.append(Verdict(name, original.__name__, spec, reason, changed))
        if spec is not None and not patched:
            module.__class__ = _replacement(original, spec)  # type: ignore[arg-type]  # classes hash by identity
            join_layernorm_layers(type(module))
    return Report(tuple(verdicts))


def unpatch(model: nn.Module) -> None:
    """Give every norm that `patch` replaced in the model its own class back. Raises TypeError for what is no module."""
    _check_module("unpatch", model)
    for module in model.modules():
        if hasattr(type(module), "_rmsnorm_spec"):
            module.__class__ = _original(module)


def _check_module(where: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(complaint(where, "model", f"is a {type(model).__name__}", "a torch.nn.Module"))


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if type(module).__name__.endswith("RMSNorm") and not isinstance(module, _UNTOUCHED):
            yield name, module


def _original(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before `patch`."""
    return getattr(type(module), "_rmsnorm_original", type(module))


# --- the replacement -----------------------------------------------------------------------------------------


class _Replacement:
    """What a replaced norm does, in front of its own class. Adds no attribute to any instance."""

    _rmsnorm_spec: Spec
    _rmsnorm_original: type[nn.Module]
    # The kernels library of Hugging Face would put its own forward over ours, since the name is inherited.
    kernel_condition = staticmethod(lambda module: False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as its own class and a spec, because the class made here cannot be found by its name."""
        return _rebuild, (self._rmsnorm_original, self._rmsnorm_spec), self.__dict__


@functools.cache
def _replacement(original: type[nn.Module], spec: Spec) -> type[nn.Module]:
    """A subclass of the original whose name is the original's, since users of transformers match on it."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        return rms_norm(x, self._parameters.get("weight"), spec.eps, cast=spec.cast, offset=spec.offset)

    body = {"_rmsnorm_spec": spec, "_rmsnorm_original": original, "forward": forward}
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (_Replacement, original), body | names)


def _rebuild(original: type[nn.Module], spec: Spec) -> nn.Module:
    cls = _replacement(original, spec)  # type: ignore[arg-type]
    return cls.__new__(cls)


# --- the proof -----------------------------------------------------------------------------------------------


def _obstacle(module: nn.Module) -> str | None:
    """Why the module cannot even be tried; None if it can."""
    if "forward" in module.__dict__:
        return "its forward was rebound on the instance (by accelerate, tensor parallel or kernels); patch first"
    if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
        return "it is sharded by FSDP; patch first"
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(parameters) != 1 or parameters[0].kind not in _ONE_TENSOR:
        return f"its forward takes ({', '.join(map(str, parameters))}), not one tensor"
    others = sorted({*module._parameters, *module._modules, *module._buffers} - {"weight"})
    if others or "weight" in module._modules or "weight" in module._buffers:
        return f"it holds more than a weight: {', '.join(others) or 'no parameter'}"
    weight = module._parameters.get("weight")
    if weight is not None and type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}; patch before it is sharded or quantized"
    if weight is not None and (weight.dim() != 1 or weight.numel() == 0 or weight.dtype not in DTYPES):
        return f"its weight has shape {tuple(weight.shape)} and dtype {weight.dtype}"
    return None


def _fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """What a proof depends on besides the class: every plain attribute, and the weight's width."""
    weight = module._parameters.get("weight")
    plain = sorted((k, repr(v)) for k, v in module.__dict__.items() if not k.startswith("_") and k != "training")
    return (None if weight is None else weight.shape[0], *plain)


def _prove(cls: type[nn.Module], module: nn.Module) -> tuple[Spec | None, str, dict[str, Change]]:
    """(the one spec that survives or None, why none does, what replacing it changes)."""
    weight = module._parameters.get("weight")
    N = 64 if weight is None else weight.shape[0]
    numbers = sorted({float(v) for v in vars(module).values() if type(v) in (int, float) and 0 <= v < 1})
    if not numbers:
        return None, "it has no attribute that could be its eps", {}
    candidates = [Spec(eps) for eps in numbers]
    if weight is not None:
        candidates += [Spec(eps, "late", offset) for eps in numbers for offset in (0.0, 1.0)]
    changed = {}
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for x_dtype in _DTYPES:
            for w_dtype in _DTYPES if weight is not None else (None,):
                x = _rows(N, numbers[0], x_dtype, generator)
                w = None if w_dtype is None else torch.randn(N, generator=generator, device="cpu").to(w_dtype)
                try:
                    y = cls.forward(_twin(module, w), x.clone())
                except Exception as error:  # noqa: BLE001  # whatever a stranger's forward raises
                    return None, f"its forward raises {type(error).__name__} under the probe: {error}"[:200], {}
                if not isinstance(y, Tensor):
                    return None, f"its forward returns a {type(y).__name__}", {}
                candidates = [c for c in candidates if _same(y, reference.published(x, w, c.eps, c.cast, c.offset))]
                if not candidates:
                    pair = str(x_dtype) if w_dtype is None else f"{x_dtype} input with {w_dtype} weight"
                    return None, f"no spec gives its bits for {pair}".replace("torch.", ""), {}
                if w_dtype in (None, x_dtype):
                    c = candidates[0]
                    ours = reference.forward(x, None, w, c.eps, c.cast, c.offset, with_rstd=False)[0]
                    changed[str(x_dtype).removeprefix("torch.")] = _change(y, ours)
    if len(candidates) > 1:
        return None, f"{len(candidates)} specs give its bits, so none is proven", {}
    return candidates[0], "", changed


def _twin(module: nn.Module, w: Tensor | None) -> nn.Module:
    """A module with the same attributes and class of its own, but its own weight, no hooks, and nothing shared."""
    twin = nn.Module()
    state = {k: copy.deepcopy(v) for k, v in vars(module).items() if k not in vars(twin)}
    twin.__dict__.update(state, training=module.training)
    twin.__class__ = _original(module)
    twin._parameters["weight"] = None if w is None else nn.Parameter(w, requires_grad=False)
    return twin


def _rows(N: int, eps: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random rows, from large to so small that eps decides the result."""
    smallest = math.log10(max(eps, 1e-12)) / 2 - 1
    sizes = torch.logspace(2, smallest, math.prod(_ROWS), device="cpu").view(*_ROWS, 1)
    return (torch.randn(*_ROWS, N, generator=generator, device="cpu") * sizes).to(dtype)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and differing(a, b)[0] == 0


def _change(before: Tensor, after: Tensor) -> Change:
    count, ulp = differing(before, after)
    return Change(count / before.numel(), ulp)
