"""What `patch` and `unpatch` return: what they found and did, as data and as text."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from rmsnorm.ops.eager_recomputation import Recomputation
from rmsnorm.patching.finding import Proof, figures
from rmsnorm.patching.other_libraries import why_inactive
from rmsnorm.patching.recomputing import last_recomputation
from rmsnorm.spec import Hints


@dataclass(frozen=True)
class Verdict(Proof):
    """What `patch` found out about one norm: the `Proof`, and the norm's name. A norm that is proven was replaced.

    Attributes:
        name: Its name in the model, as in `named_modules`.
    """

    name: str = field(kw_only=True)

    def __str__(self) -> str:
        return f"{self.finding}{figures([self], '; ')}"

    @property
    def replaced(self) -> bool:
        """Whether the norm was replaced."""
        return self.proven

    @property
    def finding(self) -> str:
        """What was found, in words, without figures. Norms with the same finding and class form a group."""
        return super().finding if self.replaced else f"not replaced: {self.reason}"


@dataclass(frozen=True)
class SkippedModule:
    """A module that `patch` did not consider although it resembles a norm.

    Attributes:
        name: Its name in the model.
        class_name: The name of its class.
        reason: Why it was not considered.
        resembles_rmsnorm: Whether it has the attributes of an RMSNorm, one 1-D parameter and an eps.
    """

    name: str
    class_name: str
    reason: str
    resembles_rmsnorm: bool = False


@dataclass(frozen=True)
class PatchReport:
    """What `patch` found and did. As a string it has one line for each group of norms.

    Attributes:
        verdicts: One `Verdict` for each norm, in the order of `named_modules`.
        skipped: The modules that resemble norms but were not considered. The string names them if there is no verdict.
        fuse_residual: Whether torch.compile fuses residual additions with these norms; eager mode does not.
        recompute: Whether the backward pass recomputes norm outputs, so that they are not kept.

    Example:
        >>> report = rmsnorm.patch(torch.nn.Sequential(torch.nn.RMSNorm(64, eps=1e-6)))
        >>> [(verdict.name, verdict.spec) for verdict in report.replaced]
        [('0', Spec(eps=1e-06, cast='late', offset=0.0))]
        >>> report.not_replaced
        ()
        >>> report.check()
        ()
    """

    verdicts: tuple[Verdict, ...]
    skipped: tuple[SkippedModule, ...] = ()
    fuse_residual: bool = True
    recompute: bool = False
    _model: Any = field(default=None, init=False, compare=False, repr=False)  # a weak reference
    _modules: tuple[Any, ...] = field(default=(), init=False, compare=False, repr=False)  # weak references

    @classmethod
    def of_model(
        cls,
        verdicts: Sequence[Verdict],
        skipped: Sequence[SkippedModule],
        hints: Hints,
        model: nn.Module,
        modules: Sequence[nn.Module],
    ) -> "PatchReport":
        """A report that does not keep the model and the norms alive, to which `recomputation` and `check` refer."""
        report = cls(tuple(verdicts), tuple(skipped), hints.fuse_residual, hints.recompute)
        object.__setattr__(report, "_model", weakref.ref(model))
        object.__setattr__(report, "_modules", tuple(map(weakref.ref, modules)))
        return report

    def __reduce__(self) -> Any:
        return PatchReport, (self.verdicts, self.skipped, self.fuse_residual, self.recompute)

    @property
    def replaced(self) -> tuple[Verdict, ...]:
        """The verdicts of the norms that were replaced."""
        return tuple(v for v in self.verdicts if v.replaced)

    @property
    def not_replaced(self) -> tuple[Verdict, ...]:
        """The verdicts of the norms that were left as they are, each with its reason."""
        return tuple(v for v in self.verdicts if not v.replaced)

    @property
    def groups(self) -> tuple[tuple[Verdict, ...], ...]:
        """The verdicts, grouped by class and finding."""
        return _grouped(self.verdicts, lambda verdict: verdict.finding)

    @property
    def recomputation(self) -> Recomputation | None:
        """How many norm outputs the model's last forward pass kept, and how many not (see `rmsnorm.recompute`).

        None if recompute is False, the model does not exist any more, or the report was copied or pickled.
        """
        model = None if self._model is None else self._model()
        return last_recomputation(model) if self.recompute and model is not None else None

    def check(self) -> tuple[str, ...]:
        """Find the replaced norms that do not run our kernels any more.

        Another library may have replaced a norm's forward, or its class or attributes may have changed.

        Returns:
            One line for each such norm, with the reason; empty if there is none. Norms that no longer exist are
            skipped, and so are all norms of a report that was copied or pickled.
        """
        found = []
        for verdict, reference in zip(self.verdicts, self._modules, strict=False):
            module = reference()
            if verdict.replaced and module is not None and (why := why_inactive(module)) is not None:
                found.append(f"{_first([verdict.name])} {why}")
        return tuple(found)

    def __str__(self) -> str:
        return "\n".join([*self._head(), *(f"  {_line(group)}" for group in self.groups)])

    def expanded(self) -> str:
        """The report as a string with a line for each norm below the line of its group."""
        lines = self._head()
        for group in self.groups:
            lines += [f"  {_line(group)}", *(f"    {v.name}{figures([v], ': ')}" for v in group)]
        if self.replaced:
            lines.append("  autograd keeps a norm's input itself: write x = x + f(norm(x)), not x += f(norm(x))")
            compiled = "fuses residual additions with these norms" if self.fuse_residual else "fuses no additions"
            lines.append(f"  torch.compile {compiled} (fuse_residual={self.fuse_residual}); eager mode adds separately")
            if self.recompute:
                lines.append("  the backward pass recomputes norm outputs, which are not kept for it (recompute=True)")
            if any(v.spec is not None and v.spec.gate is not None for v in self.replaced):
                lines.append("  neither fuse_residual nor recompute applies to the norms with a gate")
        return "\n".join(lines)

    def _head(self) -> list[str]:
        lines = [f"{len(self.replaced)} of {len(self.verdicts)} norms replaced"]
        if not self.verdicts:
            lines.append(f"  {_LOOKED_FOR}")
        skipped = [module for module in self.skipped if module.resembles_rmsnorm or not self.verdicts]
        for group in _grouped(skipped, lambda module: module.reason):
            lines.append(f"  {_members(group)} skipped: {group[0].reason}")
        return lines


@dataclass(frozen=True)
class UnpatchReport:
    """What `unpatch` did.

    Attributes:
        names: The names of the norms whose own class was restored, in the order of `named_modules`.
        recompute: Whether the model recomputed norm outputs in the backward pass. It does not any more.
    """

    names: tuple[str, ...]
    recompute: bool = False

    def __str__(self) -> str:
        if not self.names:
            return "no norm was patched" + (
                "; outputs are kept again" if self.recompute else ", so nothing was changed"
            )
        norms = "1 norm has its" if len(self.names) == 1 else f"{len(self.names)} norms have their"
        return f"{norms} own class again: {_first(self.names)}"


_LOOKED_FOR = 'patch proves modules with "norm" in the name of their class, or with one 1-D parameter and an eps'

_Of = TypeVar("_Of", Verdict, SkippedModule)


def _grouped(found: Sequence[_Of], key: Callable[[_Of], str]) -> tuple[tuple[_Of, ...], ...]:
    """Grouped by class and key, in the order of the first member of each group."""
    groups: dict[tuple[str, str], list[_Of]] = {}
    for one in found:
        groups.setdefault((one.class_name, key(one)), []).append(one)
    return tuple(map(tuple, groups.values()))


def _line(group: Sequence[Verdict]) -> str:
    """One group in one line: how many norms, their class, the finding, and figures."""
    return f"{_members(group)} {group[0].finding}{figures(group, '; ')}"


def _members(group: Sequence[Verdict] | Sequence[SkippedModule]) -> str:
    return f"{len(group)} x {group[0].class_name} ({_first([one.name for one in group])})"


def _first(names: Sequence[str]) -> str:
    first = names[0] or "the model itself"
    return first if len(names) == 1 else f"{first}, …"
