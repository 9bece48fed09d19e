"""The rule that the replacement of a norm follows: what the norm computes, and for which calls that is proven."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rmsnorm import compat
from rmsnorm.spec import DTYPES, Cast, Gate, Spec, may_be_eps

# The dtypes in which a norm must be proven where input and weight share one. For other pairs of dtypes, and in fp64,
# its own forward may run.
TRAINING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How many dimensions an input has in front of the normalized ones.
LEADING_DIMS = range(5)

DtypePair = tuple[torch.dtype, torch.dtype | None]  # of the input and of the weight
Dtypes = DtypePair | tuple[torch.dtype, torch.dtype | None, torch.dtype]  # and of the gate, if the norm has one


@dataclass(frozen=True)
class Rule:
    """What a replaced norm computes, and when its own forward runs instead.

    Attributes:
        cast: As in `Spec`.
        offset: As in `Spec`.
        eps_attribute: The name of the attribute that holds eps. It is read at each call.
        weighted: Whether the norm has a weight.
        none_is_torch_eps: Whether an eps of None means fp32's machine epsilon, as in torch.nn.RMSNorm.
        own_dtypes: The dtypes of input and weight, and of the gate if there is one, for which its own forward runs.
        own_under_autocast: Whether its own forward runs under autocast.
        calls_rms_norm: Whether it calls F.rms_norm, whose input and weight autocast casts to fp32 on some devices.
            There its own forward runs, unless both are fp32 already.
        keeps_memory_order: Whether the output of its own forward has its dimensions in memory in the same order as the
            input, as with torch's elementwise operators. Otherwise that output is contiguous, except that F.rms_norm
            keeps channels last.
        ranks: The numbers of dimensions of an input for which it was proven; for others its own forward runs.
        attributes: The attributes that its forward reads, and their values when it was proven. If one has changed, its
            own forward runs.
        normalized_shape: The last dimensions, over which it normalizes, if the norm fixes them; None for the last
            dimension, of any size.
        gate: As in `Spec`. If it is called without a gate, its own forward runs.
        groups: As in `Spec`.
        gate_optional: Whether its own forward can be called without a gate.
    """

    cast: Cast
    offset: float
    eps_attribute: str
    weighted: bool
    none_is_torch_eps: bool = False
    own_dtypes: frozenset[Dtypes] = frozenset()
    own_under_autocast: bool = False
    calls_rms_norm: bool = False
    keeps_memory_order: bool = False
    ranks: frozenset[int] = frozenset()
    attributes: tuple[tuple[str, object], ...] = ()
    normalized_shape: tuple[int, ...] | None = None
    gate: Gate | None = None
    groups: int = 1
    gate_optional: bool = False

    @property
    def normalized_dims(self) -> int:
        """Over how many of the last dimensions it normalizes."""
        return 1 if self.normalized_shape is None else len(self.normalized_shape)

    def eps(self, value: object) -> float | None:
        """The eps that a value of `eps_attribute` means; None if it is not a valid eps."""
        if value is None and self.none_is_torch_eps:
            return torch.finfo(torch.float32).eps
        if type(value) in (int, float) and may_be_eps(value):  # type: ignore[arg-type]
            return float(value)  # type: ignore[arg-type]
        return None

    def spec(self, eps: float) -> Spec:
        """The spec that it stands for with this eps."""
        return Spec(eps, self.cast, self.offset, self.gate, self.groups)

    @property
    def dtypes(self) -> tuple[Dtypes, ...]:
        """The dtypes of input, weight and gate for which it was proven, as in `Dtypes`; None for no weight."""
        every = dtype_combinations(DTYPES, self.weighted, self.gate is not None)
        return tuple(dtypes for dtypes in every if dtypes not in self.own_dtypes)

    @property
    def own_forward_when(self) -> str:
        """When the norm's own forward runs, in words. fp64 is not mentioned: nobody trains in it."""
        own = {dtypes for dtypes in self.own_dtypes if torch.float64 not in dtypes}
        parts = ["without a gate"] if self.gate_optional else []
        tensors = "input and weight" if self.gate is None else "input, weight and gate"
        every = itertools.product(TRAINING_DTYPES, repeat=2 if self.gate is None else 3)
        if own and own.issuperset(dtypes for dtypes in every if len(set(dtypes)) > 1):
            parts.append(f"when {tensors} have different dtypes")
        elif own:
            shown = {dtypes_in_words(dtypes) for dtypes in own if dtypes[1] is not None or self.gate is not None}
            parts.append("for " + ", ".join(sorted(shown)))
        if self.own_under_autocast:
            parts.append("under autocast")
        elif self.calls_rms_norm and "cuda" not in compat.RMS_NORM_UNCHANGED_BY_AUTOCAST:
            parts.append("under autocast on GPUs unless input and weight are float32")
        missing = [f"{n}-D" for n in (self.normalized_dims + k for k in LEADING_DIMS) if n not in self.ranks]
        if missing:
            parts.append(f"for {', '.join(missing)} inputs")
        return " and ".join(parts)


def dtype_combinations(dtypes: Sequence[torch.dtype], weighted: bool, gated: bool) -> list[Dtypes]:
    """Every dtype for the input with every one for the weight and every one for the gate, if there are any."""
    pairs = [(x, w) for x in dtypes for w in (dtypes if weighted else (None,))]
    return [(x, w, g) for x, w in pairs for g in dtypes] if gated else list(pairs)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def kind_in_words(of: Rule | Spec) -> list[str]:
    """What distinguishes it besides eps: `late`, `offset 1`; with a gate `early`, `silu gate first`, `8 groups`."""
    words: list[str] = [of.cast]
    if of.offset:
        words.append(f"offset {of.offset:g}")
    if of.gate is not None:
        words.append(f"{of.gate.activation} gate {'first' if of.gate.first else 'last'}")
    if of.groups > 1:
        words.append(f"{of.groups} groups")
    return words


def dtypes_in_words(dtypes: Dtypes) -> str:
    """`bfloat16 input with float32 weight`, and for a gated norm `and bfloat16 gate`."""
    x, w, *gates = dtypes
    others = [f"{dtype_name(dtype)} {name}" for dtype, name in ((w, "weight"), *((g, "gate") for g in gates)) if dtype]
    return f"{dtype_name(x)} input" + (f" with {' and '.join(others)}" if others else "")
