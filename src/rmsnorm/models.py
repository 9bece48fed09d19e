"""patch and unpatch: replace every norm of a model that is proven to be one we compute, in place.

A module is proven, not recognized: its own forward runs on a detached twin with random weights and inputs, and must
equal *published* of exactly one spec bit for bit. What is proven gets a class of ours, a subclass of its own:
parameters, names, hooks and isinstance stay as they are.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rmsnorm import reference
from rmsnorm.errors import complaint
from rmsnorm.module import DeepseekV2RMSNorm, RMSNorm
from rmsnorm.ops import rms_norm
from rmsnorm.proof import Change, Proof, Rule, arguments, fingerprint, obstacle, prove
from rmsnorm.spec import Spec

_ORDER = "the order that works: patch, then PEFT, then compile, FSDP, tensor parallel or accelerate"


@dataclass(frozen=True)
class Verdict:
    """What patch found about one norm. Proven: `spec` says what it computes. Left: `spec` is None, `reason` why.

    partly: where the norm's own forward still runs, since only elsewhere it is proven; "" if nowhere.
    exactly: whether its bits are *published*'s; False only for what `strict=False` took.
    changed: by the name of the dtype of weight and input ("float32", "bfloat16", "float16").
    saved: by how many bytes a row less is kept for the backward pass, by the same names.
    """

    name: str
    cls: str
    spec: Spec | None
    reason: str = ""
    partly: str = ""
    exactly: bool = True
    changed: dict[str, Change] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self._kind()}{self._figures([self])}"

    def _kind(self) -> str:
        """What norms of one group have in common."""
        if self.spec is None:
            return f"left: {self.reason}"
        offset = f", offset {self.spec.offset:g}" if self.spec.offset else ""
        how = "proven" if self.exactly else "taken, no further from exact than published"
        own = f"; its own forward {self.partly}" if self.partly else ""
        return f"{how}: {self.spec.cast}, eps {self.spec.eps:g}{offset}{own}"

    @staticmethod
    def _figures(group: Sequence["Verdict"]) -> str:
        """The largest change of a group and the bytes a row that its norms together keep less, by dtype."""
        text = ""
        for dtype in group[0].changed:
            changes = [v.changed[dtype] for v in group]
            share, ulp = max(c.share for c in changes), max(c.ulp for c in changes)
            text += f"; {dtype} {share:.2g} of outputs change" + (f", {ulp} ulp" if ulp else "")
            text += f", {sum(v.saved[dtype] for v in group):,} bytes a row less saved"
        return text


@dataclass(frozen=True)
class Report:
    """One verdict for each norm that patch met, in the order of `named_modules`. As a string: one line a group."""

    verdicts: tuple[Verdict, ...]

    @property
    def proven(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.spec is not None)

    @property
    def left(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.spec is None)

    @property
    def groups(self) -> tuple[tuple[Verdict, ...], ...]:
        """The verdicts that say the same about the same class, together."""
        groups: dict[tuple[str, str], list[Verdict]] = {}
        for v in self.verdicts:
            groups.setdefault((v.cls, v._kind()), []).append(v)
        return tuple(map(tuple, groups.values()))

    def __str__(self) -> str:
        return "\n".join([self._head(), *(f"  {line(group)}" for group in self.groups)])

    def expanded(self) -> str:
        """As the string, but with a line for each norm under its group."""
        lines = [self._head()]
        for group in self.groups:
            lines += [f"  {line(group)}", *(f"    {v.name}{v._figures([v]).replace('; ', ': ', 1)}" for v in group)]
        return "\n".join(lines)

    def _head(self) -> str:
        return f"{len(self.proven)} of {len(self.verdicts)} norms proven and replaced"


def line(group: Sequence[Verdict]) -> str:
    """One group of a Report in one line: how many, which class, what was found, the largest change, bytes saved."""
    first = group[0]
    names = first.name if len(group) == 1 else f"{first.name}, …"
    return f"{len(group)} x {first.cls} ({names}) {first._kind()}{first._figures(group)}"


def patch(model: nn.Module, *, strict: bool = True) -> Report:
    """Replace in place every norm of the model that is proven to compute an RMSNorm of ours.

    The others stay as they are; the Report says which and why. A module is tried if its class is named like a norm;
    one whose name does not even say RMSNorm is reported only if it is proven. With `strict=False` a norm whose bits
    are not *published*'s, because it takes the statistic another way, is replaced too, if its outputs lie no further
    from *exact* than *published*'s do. A model that is patched already is judged anew.

    Patch first, then PEFT, then compile, FSDP, tensor parallel or accelerate. Raises RuntimeError, and changes
    nothing, for a norm that FSDP or tensor parallel has sharded already or whose forward was rebound by anything but
    accelerate; TypeError if `model` is not an nn.Module.
    """
    _check_module("patch", model)
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise RuntimeError(f"[patch] the model is sharded by FSDP, which took its parameters apart; {_ORDER}")
    proofs: dict[Any, Proof] = {}
    found: list[tuple[str, nn.Module, Proof]] = []
    for name, module in _norms(model):
        original = _original(module)
        why = obstacle(original, module)
        if why is not None:
            proof = Proof(reason=why)
        else:
            key = original, fingerprint(module)
            if key not in proofs:
                proofs[key] = prove(original, module, strict)
            proof = proofs[key]
        if proof.rule is None and "rmsnorm" not in original.__name__.lower() and original is type(module):
            continue  # by its name and by what it computes another kind of norm
        found.append((name, module, proof))
    for name, module, proof in found:
        new = _class_for(module, proof)
        late = _too_late(module) if new is not type(module) else None
        if late is not None:
            raise RuntimeError(f"[patch] {name} {late}; {_ORDER}")
    for _, module, proof in found:
        _become(module, _class_for(module, proof))
    return Report(tuple(_verdict(name, module, proof) for name, module, proof in found))


def unpatch(model: nn.Module) -> None:
    """Give every norm that `patch` replaced in the model its own class back.

    Raises RuntimeError, and changes nothing, for a norm that FSDP has wrapped since; TypeError for what is no module.
    """
    _check_module("unpatch", model)
    patched = [(name, module) for name, module in model.named_modules() if _rule(module) is not None]
    for name, module in patched:
        late = _wrapped(module)
        if late is not None:
            raise RuntimeError(f"[unpatch] {name} {late}; unpatch first, or build the model anew")
    for _, module in patched:
        _become(module, _original(module))


def exact(module: nn.Module, x: Tensor) -> Tensor | None:
    """What *exact* gives for a norm that `patch` replaced; None where its own forward runs."""
    rule = _rule(module)
    assert rule is not None
    w = _weight(module) if rule.weighted else None
    if (x.dtype, None if w is None else w.dtype) in rule.own:
        return None
    k = 1 if rule.shape is None else len(rule.shape)
    w = None if w is None else w.flatten()
    spec = rule.spec
    y = reference.forward(x.flatten(-k), None, w, spec.eps, spec.cast, spec.offset, with_rstd=False)[0]
    return y.view(x.shape)


def _verdict(name: str, module: nn.Module, proof: Proof) -> Verdict:
    cls, rule = _original(module).__name__, proof.rule
    if rule is None:
        return Verdict(name, cls, None, proof.reason)
    return Verdict(name, cls, rule.spec, "", rule.partly, proof.exactly, proof.changed, proof.saved)


def _check_module(where: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(complaint(where, "model", f"is a {type(model).__name__}", "a torch.nn.Module"))


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        cls = _original(module)
        torchs_own = cls.__module__.startswith("torch.nn.") and cls is not nn.RMSNorm
        if "norm" in cls.__name__.lower() and not torchs_own and not isinstance(module, (RMSNorm, DeepseekV2RMSNorm)):
            yield name, module


def _original(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before `patch`."""
    return getattr(type(module), "_rmsnorm_original", type(module))


def _rule(module: nn.Module) -> Rule | None:
    return getattr(type(module), "_rmsnorm_rule", None)


# --- the replacement -----------------------------------------------------------------------------------------


class _Replacement:
    """What a replaced norm does, in front of its own class. Adds no attribute to any instance."""

    _rmsnorm_rule: Rule
    _rmsnorm_original: type[nn.Module]
    # The kernels library of Hugging Face would put its own forward over ours, since the name is inherited.
    kernel_condition = staticmethod(lambda module: False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as its own class and a rule, because the class made here cannot be found by its name."""
        if "_rmsnorm_rule" not in vars(type(self)):
            return super().__reduce_ex__(protocol)  # of a class made from ours: it would come back as ours
        return _rebuild, (self._rmsnorm_original, self._rmsnorm_rule), self.__getstate__()


def _weight(module: Any) -> Any:
    """The weight, also where a parametrization or an older FSDP has put something else in the parameter's place."""
    try:
        return module._parameters["weight"]
    except KeyError:
        return module.weight


@functools.cache
def _replacement(original: type[nn.Module], rule: Rule) -> type[nn.Module]:
    """A subclass of the original whose name is the original's, since users of transformers match on it."""
    eps, cast, offset = rule.spec.eps, rule.spec.cast, rule.spec.offset
    weighted, own, fp32, shape = rule.weighted, rule.own, rule.fp32, rule.shape
    k = 1 if shape is None else len(shape)
    (argument,) = arguments(original)
    theirs: Callable[..., Tensor] = original.forward

    def forward(self: Any, *args: Tensor, **named: Tensor) -> Tensor:
        if len(args) + len(named) != 1 or (named and argument.name not in named):
            return theirs(self, *args, **named)  # which raises the error that it always raised
        x = args[0] if args else named[argument.name]
        w = _weight(self) if weighted else None
        if own and (x.dtype, None if w is None else w.dtype) in own:
            return theirs(self, x)
        if fp32 and torch.is_autocast_enabled(x.device.type):
            return theirs(self, x)
        if shape is not None and x.shape[-k:] != shape:
            return theirs(self, x)
        if k == 1:
            return rms_norm(x, w, eps, cast=cast, offset=offset)
        w = None if w is None else w.flatten()
        return rms_norm(x.flatten(-k), w, eps, cast=cast, offset=offset).view(x.shape)

    # Not functools.wraps: what follows __wrapped__ would find the original forward.
    forward.__name__, forward.__qualname__, forward.__doc__ = "forward", theirs.__qualname__, theirs.__doc__
    forward.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]
    body = {"_rmsnorm_rule": rule, "_rmsnorm_original": original, "forward": forward}
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (_Replacement, original), body | names)


def _rebuild(original: type[nn.Module], rule: Rule) -> nn.Module:
    cls = _replacement(original, rule)  # type: ignore[arg-type]  # classes hash by identity
    return cls.__new__(cls)


def _class_for(module: nn.Module, proof: Proof) -> type[nn.Module]:
    if proof.rule is None:
        return _original(module)
    if proof.rule == _rule(module):
        return type(module)  # which FSDP may have made from ours
    return _replacement(_original(module), proof.rule)  # type: ignore[arg-type]


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the module's class, and what accelerate has kept of it: its bound forward."""
    before = type(module).forward
    if cls is type(module):
        return
    module.__class__ = cls
    for key, value in vars(module).items():
        if _is_bound(module, value, before):
            module.__dict__[key] = MethodType(cls.forward, module)


def _is_bound(module: nn.Module, value: object, function: object) -> bool:
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is function


# --- what stands in the way ----------------------------------------------------------------------------------


def _wrapped(module: nn.Module) -> str | None:
    cls = type(module)
    if any(base.__name__ == "FSDPModule" for base in cls.__mro__):
        return "is sharded by FSDP, whose class of it would be lost"
    if _rule(module) is not None and "_rmsnorm_rule" not in vars(cls):
        return f"has got another class since it was patched, {cls.__name__}"
    return None


def _too_late(module: nn.Module) -> str | None:
    """What was done to the module that must be done after `patch`."""
    if (wrapped := _wrapped(module)) is not None:
        return wrapped
    if type(module._parameters.get("weight")).__name__ == "DTensor":
        return "has a weight that is sharded (a DTensor)"
    own = vars(module)
    if "forward" in own and not _is_bound(module, own["forward"], type(module).forward):
        hooked = "_hf_hook" in own and _is_bound(module, own.get("_old_forward"), type(module).forward)
        if not hooked:
            return "has a forward that was rebound on the instance (tensor parallel and kernels do that)"
    return None
