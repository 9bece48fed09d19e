"""patch and unpatch: replace every norm of a model that is proven to be one we compute, in place.

A module is proven, not recognized: the operators that its own forward runs must be those of exactly one RMSNorm, in
every state in which it can be called (see proof.py). What is proven gets a class of ours, a subclass of its own:
parameters, names, hooks and isinstance stay as they are.
"""

import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rmsnorm import reference
from rmsnorm.errors import complaint, one_line
from rmsnorm.modules import DeepseekV2RMSNorm, RMSNorm
from rmsnorm.patching.drop_in import TorchRMSNorm
from rmsnorm.patching.proof import Change, Proof, fingerprint, obstacle, prove
from rmsnorm.patching.replacement import become, changed, original, rebound, replacement, rule_of, served, why_own
from rmsnorm.spec import Spec

_OURS = RMSNorm, DeepseekV2RMSNorm, TorchRMSNorm
_EPS = re.compile(r"(^|_)eps(ilon)?(_|$)", re.IGNORECASE)  # and no steps
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
        return f"{self.kind}{self._figures([self])}"

    @property
    def kind(self) -> str:
        """What norms of one group have in common."""
        if self.spec is None:
            return f"left: {self.reason}"
        offset = f", offset {self.spec.offset:g}" if self.spec.offset else ""
        how = "proven" if self.exactly else "taken, though it takes the statistic in another way"
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
class Passed:
    """A module that patch passed over though it has to do with norms, and why."""

    name: str
    cls: str
    why: str


@dataclass(frozen=True)
class Report:
    """One verdict for each norm that patch met, in the order of `named_modules`. As a string: one line a group.

    passed: what else has to do with norms. The string names it where patch met none that it could judge.
    """

    verdicts: tuple[Verdict, ...]
    passed: tuple[Passed, ...] = ()
    _modules: tuple[Any, ...] = field(default=(), init=False, compare=False, repr=False)  # weak references

    def __reduce__(self) -> Any:
        return Report, (self.verdicts, self.passed)

    def check(self) -> tuple[str, ...]:
        """Which of the norms that patch replaced do not run ours any more, each with the reason; empty if all do.

        Whatever rebinds a norm's forward or changes its class or attributes after `patch` takes ours out, unseen. A
        norm that no longer exists is passed over, and so is every norm of a Report that was copied or pickled.
        """
        found = []
        for verdict, ref in zip(self.verdicts, self._modules, strict=False):
            module = ref()
            if verdict.spec is not None and module is not None:
                reason = _off(module)
                if reason is not None:
                    found.append(f"{verdict.name} {reason}")
        return tuple(found)

    @property
    def proven(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.spec is not None)

    @property
    def left(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.spec is None)

    @property
    def groups(self) -> tuple[tuple[Verdict, ...], ...]:
        """The verdicts that say the same about the same class, together."""
        return _grouped(self.verdicts, lambda verdict: verdict.kind)

    def __str__(self) -> str:
        return "\n".join([*self._head(), *(f"  {line(group)}" for group in self.groups)])

    def expanded(self) -> str:
        """As the string, but with a line for each norm under its group."""
        lines = self._head()
        for group in self.groups:
            lines += [f"  {line(group)}", *(f"    {v.name}{v._figures([v]).replace('; ', ': ', 1)}" for v in group)]
        if self.proven:
            lines.append("  the backward pass keeps the input itself: write x = x + f(norm(x)), not x += f(norm(x))")
        return "\n".join(lines)

    def _head(self) -> list[str]:
        lines = [f"{len(self.proven)} of {len(self.verdicts)} norms proven and replaced"]
        if not self.verdicts:
            lines.append('  looked for: modules whose class has "norm" in its name and computes an RMSNorm')
            groups = _grouped(self.passed, lambda passed: passed.why)
            lines += [f"  {_members(group)} passed over: {group[0].why}" for group in groups]
        return lines


@dataclass(frozen=True)
class Unpatched:
    """The names of the norms to which `unpatch` gave their own class back, in the order of `named_modules`."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        if not self.names:
            return "no norm was patched, so none was changed"
        return f"{len(self.names)} norms have their own class back: {_first(self.names)}"


_Of = TypeVar("_Of", Verdict, Passed)


def _grouped(found: Sequence[_Of], kind: Callable[[_Of], str]) -> tuple[tuple[_Of, ...], ...]:
    """Those of the same class and kind together, in the order of the first of each."""
    groups: dict[tuple[str, str], list[_Of]] = {}
    for one in found:
        groups.setdefault((one.cls, kind(one)), []).append(one)
    return tuple(map(tuple, groups.values()))


def _members(group: Sequence[Verdict] | Sequence[Passed]) -> str:
    """How many modules of which class, and the name of the first."""
    return f"{len(group)} x {group[0].cls} ({_first([one.name for one in group])})"


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}, …"


def line(group: Sequence[Verdict]) -> str:
    """One group of a Report in one line: how many, which class, what was found, the largest change, bytes saved."""
    return f"{_members(group)} {group[0].kind}{group[0]._figures(group)}"


def patch(model: nn.Module, *, strict: bool = True) -> Report:
    """Replace in place every norm of the model that is proven to compute an RMSNorm of ours.

    The others stay as they are; the Report says which and why. A module is tried if its class is named like a norm;
    one whose name does not even say RMSNorm is reported only if it is proven. With `strict=False` a norm is replaced
    too if nothing but the way in which it takes the statistic differs from *published*. A model that is patched
    already is judged anew. Where our kernel cannot serve a call, a replaced norm runs its own forward.

    Patch first, then PEFT, then compile, FSDP, tensor parallel or accelerate. Raises RuntimeError, and changes
    nothing, for a norm that FSDP or tensor parallel has sharded already or whose forward was rebound by anything but
    accelerate; TypeError if `model` is not an nn.Module.
    """
    _check_module("patch", model)
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise RuntimeError(f"[patch] the model is sharded by FSDP, which took its parameters apart; {_ORDER}")
    proofs: dict[Any, Proof] = {}
    found: list[tuple[str, nn.Module, Proof]] = []
    passed: list[Passed] = []
    for name, module in model.named_modules():
        cls = original(module)
        if not _is_tried(module):
            why = _resemblance(module)
        else:
            proof = _judged(module, strict, proofs)
            if proof.rule is not None or "rmsnorm" in cls.__name__.lower() or cls is not type(module):
                found.append((name, module, proof))
                continue
            why = proof.reason  # by its name and by what it computes another kind of norm
        if why is not None:
            passed.append(Passed(name, cls.__name__, why))
    for name, module, proof in found:
        late = _too_late(module) if _class_for(module, proof) is not type(module) else None
        if late is not None:
            raise RuntimeError(f"[patch] {name} {late}")
    verdicts = tuple(_replaced(name, module, proof) for name, module, proof in found)
    report = Report(verdicts, tuple(passed))
    object.__setattr__(report, "_modules", tuple(weakref.ref(module) for _, module, _ in found))
    return report


def _judged(module: nn.Module, strict: bool, proofs: dict[Any, Proof]) -> Proof:
    """The proof of a norm, or of one that it cannot be told apart from. An odd class is left, whatever it does."""
    cls = original(module)
    try:
        why = obstacle(cls, module)
        if why is not None:
            return Proof(reason=why)
        key = fingerprint(cls, module)
        if key not in proofs:
            proof = prove(cls, module, strict)
            if proof.rule is not None:
                replacement(cls, proof.rule)
            proofs[key] = proof
        return proofs[key]
    except Exception as error:  # noqa: BLE001  # it must not end patch for the other norms
        return Proof(reason=_in_words(error))


def _in_words(error: Exception) -> str:
    try:
        return f"the probe raised {one_line(error)}"
    except Exception:  # noqa: BLE001
        return f"the probe raised {type(error).__name__}"


def _replaced(name: str, module: nn.Module, proof: Proof) -> Verdict:
    """Give the module the class for what was found; a class that does not let itself be changed is left."""
    before = type(module)
    try:
        become(module, _class_for(module, proof))
    except Exception as error:  # noqa: BLE001
        if type(module) is not before:
            object.__setattr__(module, "__class__", before)
        proof = Proof(reason=f"its class cannot be changed: {_in_words(error)}")
    return _verdict(name, module, proof)


def unpatch(model: nn.Module) -> Unpatched:
    """Give every norm that `patch` replaced in the model its own class back. Returns their names.

    Raises RuntimeError, and changes nothing, for a norm that FSDP has wrapped since; TypeError for what is no module.
    """
    _check_module("unpatch", model)
    patched = [(name, module) for name, module in model.named_modules() if rule_of(module) is not None]
    for name, module in patched:
        late = _wrapped(module)
        if late is not None:
            raise RuntimeError(f"[unpatch] {name} {late}; unpatch first, or build the model anew")
    for _, module in patched:
        become(module, original(module))
    return Unpatched(tuple(name for name, _ in patched))


def exact(module: nn.Module, x: Tensor) -> Tensor | None:
    """What *exact* gives for a norm that `patch` replaced; None where its own forward runs."""
    if why_own(module, x) is not None:
        return None
    rows, w, spec = served(module, x)
    y = reference.forward(rows, None, w, spec.eps, spec.cast, spec.offset, with_rstd=False)[0]
    return y.view(x.shape)


def _verdict(name: str, module: nn.Module, proof: Proof) -> Verdict:
    cls, rule = original(module).__name__, proof.rule
    if rule is None:
        return Verdict(name, cls, None, proof.reason)
    return Verdict(name, cls, proof.spec, "", rule.partly, proof.exactly, proof.changed, proof.saved)


def _class_for(module: nn.Module, proof: Proof) -> type[nn.Module]:
    if proof.rule is None:
        return original(module)
    if proof.rule == rule_of(module):
        return type(module)  # which FSDP may have made from ours
    return replacement(original(module), proof.rule)


def _check_module(where: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(complaint(where, "model", f"is a {type(model).__name__}", "a torch.nn.Module"))


def _is_tried(module: nn.Module) -> bool:
    return _is_named_norm(module) and not _is_torchs(module) and not isinstance(module, _OURS)


def _is_named_norm(module: nn.Module) -> bool:
    return "norm" in original(module).__name__.lower()


def _is_torchs(module: nn.Module) -> bool:
    """Whether it is one of torch's own modules, of which only RMSNorm is one."""
    cls = original(module)
    return str(cls.__module__).startswith("torch.nn.modules.") and cls is not nn.RMSNorm


def _resemblance(module: nn.Module) -> str | None:
    """What a module that is not tried has to do with norms; None if nothing."""
    if isinstance(module, _OURS):
        return "it is rmsnorm's own, which needs no patch"
    if _is_torchs(module):
        return "it is torch's own, and no RMSNorm" if _is_named_norm(module) else None
    held = [p for p in (*module._parameters.values(), *module._modules.values()) if p is not None]
    eps = next(filter(_EPS.search, vars(module)), None)
    if eps is None or len(held) != 1 or not isinstance(held[0], Tensor) or is_lazy(held[0]) or held[0].dim() != 1:
        return None
    return f'it has one 1-D parameter and {eps}, but its class is not tried without "norm" in its name'


# --- what stands in the way ----------------------------------------------------------------------------------


def _wrapped(module: nn.Module) -> str | None:
    cls = type(module)
    if any(base.__name__ == "FSDPModule" for base in cls.__mro__):
        return "is sharded by FSDP, whose class of it would be lost"
    if rule_of(module) is not None and "_rmsnorm_rule" not in vars(cls):
        return f"has got another class since it was patched, {cls.__name__}"
    return None


def _too_late(module: nn.Module) -> str | None:
    """What was done to the module that must be done after `patch`, and the way out."""
    if (wrapped := _wrapped(module)) is not None:
        return f"{wrapped}; {_ORDER}"
    if type(module._parameters.get("weight")).__name__ == "DTensor":
        return f"has a weight that is sharded (a DTensor); {_ORDER}"
    if (who := rebound(module)) is not None:
        return (
            f"has a forward that was rebound on the instance, to {who}: have the library that did it leave the norms "
            f"alone (for Liger: rms_norm=False), or build the model anew and patch it first; {_ORDER}"
        )
    return None


def _off(module: nn.Module) -> str | None:
    """Why a norm that was replaced does not run ours."""
    rule = rule_of(module)
    if rule is None:
        return f"has the class {type(module).__module__}.{type(module).__qualname__} now"
    if (who := rebound(module)) is not None:
        return f"runs a forward that was rebound on the instance, to {who}"
    ours = next(vars(cls)["forward"] for cls in type(module).__mro__ if "_rmsnorm_rule" in vars(cls))
    if type(module).forward is not ours:
        return f"runs the forward of {type(module).__module__}.{type(module).__qualname__}"
    own = changed(module)
    return None if own is None else f"runs its own forward, because {own}"
