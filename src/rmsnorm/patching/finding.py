"""What was found out about a norm, as data and as text."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rmsnorm.patching.rule import Dtypes, Rule, kind_in_words
from rmsnorm.spec import Spec


@dataclass(frozen=True)
class OutputChange:
    """How the outputs of a norm change on random rows when it is replaced.

    Attributes:
        share: The share of outputs that change, from 0 to 1.
        max_ulp: The largest change, in units in the last place.
    """

    share: float
    max_ulp: int


@dataclass(frozen=True)
class Proof:
    """What a module computes: which RMSNorm, or why that is not proven. As a string it is one line.

    If an RMSNorm is proven, the gradients of the module were compared with those of the formula, too.

    Attributes:
        class_name: The name of the module's own class.
        spec: What it computes; None if that is not proven.
        reason: Why it is not proven; "" if it is.
        rule: For which calls it is proven, what else it depends on, and which attribute holds its eps; None if it is
            not proven.
        matches_published_bits: Whether it computes mean and rsqrt as the published classes do; False only for a norm
            that `strict=False` accepted.
        output_changes: How its outputs would change on random rows if our kernels computed them, by the dtype that all
            its tensors have ("float32", "bfloat16", "float16").
        memory_saved_per_row: How many fewer bytes per row autograd would keep for the backward pass, by the same
            dtypes.

    Example:
        >>> proof = rmsnorm.prove(torch.nn.RMSNorm(64, eps=1e-6))
        >>> proof.spec
        Spec(eps=1e-06, cast='late', offset=0.0)
        >>> (torch.bfloat16, torch.float32) in proof.dtypes
        True
        >>> proof.output_changes["bfloat16"].share < 1e-3
        True
    """

    class_name: str
    spec: Spec | None = None
    reason: str = ""
    rule: Rule | None = field(default=None, repr=False)
    matches_published_bits: bool = True
    output_changes: dict[str, OutputChange] = field(default_factory=dict)
    memory_saved_per_row: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.class_name} is {self.finding}{figures([self], '; ')}"

    @property
    def proven(self) -> bool:
        """Whether it is proven to compute `spec`."""
        return self.spec is not None

    @property
    def dtypes(self) -> tuple[Dtypes, ...]:
        """The dtypes of input and weight for which it is proven, as pairs; None for no weight.

        For a gated norm they are triples, whose third is the dtype of the gate.
        """
        return () if self.rule is None else self.rule.dtypes

    @property
    def own_forward_when(self) -> str:
        """When a replacement runs the module's own forward, because only the other calls are proven; "" if never."""
        return "" if self.rule is None else self.rule.own_forward_when

    @property
    def finding(self) -> str:
        """What was found, in words, without figures."""
        if self.spec is None:
            return f"not proven: {self.reason}"
        how = "proven" if self.matches_published_bits else _ACCEPTED
        own = f"; its own forward runs {self.own_forward_when}" if self.own_forward_when else ""
        if "norm" not in self.class_name.lower():
            how += " although its class is not named a norm"
        cast, *others = kind_in_words(self.spec)
        return f"{how}: {', '.join((cast, f'eps {self.spec.eps:g}', *others))}{own}"


_ACCEPTED = "accepted by strict=False (it computes the mean or rsqrt differently)"


def figures(group: Sequence[Proof], before: str) -> str:
    """By dtype, the largest output change in a group and the memory that its norms save together."""
    parts = []
    for dtype in group[0].output_changes:
        changes = [v.output_changes[dtype] for v in group]
        share, ulp = max(c.share for c in changes), max(c.max_ulp for c in changes)
        change = f"{100 * share:.2g}% of outputs change" + (f" by up to {ulp} ulp" if ulp else "")
        saved = sum(v.memory_saved_per_row[dtype] for v in group)
        memory = f"backward keeps {abs(saved):,} {'fewer' if saved >= 0 else 'more'} bytes per row"
        parts.append(f"{dtype}: {change}, {memory}")
    return before + "; ".join(parts) if parts else ""
