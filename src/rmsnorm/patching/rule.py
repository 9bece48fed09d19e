"""The rule that the replacement of a norm follows: what the norm computes, and for which calls that is proven."""

from dataclasses import dataclass

import torch

from rmsnorm import compat
from rmsnorm.spec import DTYPES, LARGEST_EPS, Cast

# The dtypes in which a norm must be proven where input and weight share one. For other pairs of dtypes, and in fp64,
# its own forward may run.
TRAINING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How many dimensions an input has in front of the normalized ones.
LEADING_DIMS = range(5)

DtypePair = tuple[torch.dtype, torch.dtype | None]  # of the input and of the weight


@dataclass(frozen=True)
class Rule:
    """What a replaced norm computes, and when its own forward runs instead.

    Attributes:
        cast: As in `Spec`.
        offset: As in `Spec`.
        eps_attribute: The name of the attribute that holds eps. It is read at each call.
        weighted: Whether the norm has a weight.
        none_is_torch_eps: Whether an eps of None means fp32's machine epsilon, as in torch.nn.RMSNorm.
        own_dtypes: The dtypes of input and weight for which its own forward runs.
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
    """

    cast: Cast
    offset: float
    eps_attribute: str
    weighted: bool
    none_is_torch_eps: bool = False
    own_dtypes: frozenset[DtypePair] = frozenset()
    own_under_autocast: bool = False
    calls_rms_norm: bool = False
    keeps_memory_order: bool = False
    ranks: frozenset[int] = frozenset()
    attributes: tuple[tuple[str, object], ...] = ()
    normalized_shape: tuple[int, ...] | None = None

    @property
    def normalized_dims(self) -> int:
        """Over how many of the last dimensions it normalizes."""
        return 1 if self.normalized_shape is None else len(self.normalized_shape)

    def eps(self, value: object) -> float | None:
        """The eps that a value of `eps_attribute` means; None if it is not a valid eps."""
        if value is None and self.none_is_torch_eps:
            return torch.finfo(torch.float32).eps
        if type(value) in (int, float) and 0 <= value <= LARGEST_EPS:  # type: ignore[operator]
            return float(value)  # type: ignore[arg-type]
        return None

    @property
    def dtypes(self) -> tuple[DtypePair, ...]:
        """The dtypes of input and weight for which it was proven; None for no weight."""
        pairs = ((x, w) for x in DTYPES for w in (DTYPES if self.weighted else (None,)))
        return tuple(pair for pair in pairs if pair not in self.own_dtypes)

    @property
    def own_forward_when(self) -> str:
        """When the norm's own forward runs, in words. fp64 is not mentioned: nobody trains in it."""
        pairs = {(x, w) for x, w in self.own_dtypes if torch.float64 not in (x, w)}
        parts = []
        if pairs and all((x, w) in pairs for x in TRAINING_DTYPES for w in TRAINING_DTYPES if x != w):
            parts.append("when input and weight have different dtypes")
        elif pairs:
            parts.append("for " + ", ".join(sorted(dtypes_in_words((x, w)) for x, w in pairs if w)))
        if self.own_under_autocast:
            parts.append("under autocast")
        elif self.calls_rms_norm and "cuda" not in compat.RMS_NORM_UNCHANGED_BY_AUTOCAST:
            parts.append("under autocast on GPUs unless input and weight are float32")
        missing = [f"{n}-D" for n in (self.normalized_dims + k for k in LEADING_DIMS) if n not in self.ranks]
        if missing:
            parts.append(f"for {', '.join(missing)} inputs")
        return " and ".join(parts)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def dtypes_in_words(pair: DtypePair) -> str:
    """`bfloat16 input with float32 weight`."""
    x, w = pair
    return f"{dtype_name(x)} input" + ("" if w is None else f" with {dtype_name(w)} weight")
