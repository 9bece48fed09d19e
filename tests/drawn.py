"""What the tests of generated calls draw: shapes, dtypes, specs, and unusual numbers in any memory layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SPECS = (("early", 0.0), ("late", 0.0), ("late", 1.0), ("first", 0.0))
AROUND = 8  # how many elements of NaN there are at least before and after a tensor


@dataclass(frozen=True)
class Memory:
    """How a tensor lies in memory.

    Attributes:
        order: A number for each leading dimension; the dimension with the smallest has the smallest stride.
        gaps: For each leading dimension, how many elements of NaN lie between two neighbours along it.
        expanded: Which leading dimensions have a stride of 0.
        step: The stride of the last dimension; 0 if all columns share one element.
        offset: How many elements of NaN come first, in addition to `AROUND`.
    """

    order: tuple[int, ...]
    gaps: tuple[int, ...]
    expanded: tuple[bool, ...]
    step: int
    offset: int

    def holding(self, numbers: Tensor) -> Tensor:
        """A tensor of the shape of `numbers` in this layout. Along a stride of 0, the first number stands for all."""
        *leading, N = numbers.shape
        expanded = self.expanded[: len(leading)]
        strides, extent = [0] * len(leading), max(1, (N - 1) * self.step + 1)
        for axis in sorted(range(len(leading)), key=lambda axis: self.order[axis]):
            if not expanded[axis]:
                strides[axis] = extent + self.gaps[axis]
                extent = strides[axis] * max(1, leading[axis])
        store = torch.full((2 * AROUND + self.offset + extent,), torch.nan, dtype=numbers.dtype)
        kept = numbers[tuple(slice(1) if one else slice(None) for one in expanded)][..., : N if self.step else 1]
        view = store.as_strided(kept.shape, (*strides, self.step or 1), AROUND + self.offset)
        view.copy_(kept)
        return view.expand(*(n if e else -1 for n, e in zip(leading, expanded, strict=True)), N)


DENSE = Memory((2, 1, 0), (0, 0, 0), (False,) * 3, 1, 0)
memories = st.just(DENSE) | st.builds(
    Memory,
    order=st.permutations(range(3)).map(tuple),
    gaps=st.tuples(*[st.sampled_from((0, 1, 3, 8))] * 3),
    expanded=st.tuples(*[st.sampled_from((False, False, False, True))] * 3),
    step=st.sampled_from((1, 1, 1, 1, 2, 0)),
    offset=st.integers(0, 3),
)


def special(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal * info.eps
    values = [0.0, subnormal, info.smallest_normal, 1.0, info.max, torch.inf]
    return torch.tensor([*values, *(-v for v in values), torch.nan], dtype=FP64)


def normal(t: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return t


def of_any_size(t: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows from 2^-30 to 2^30: eps dominates in some, and fp16 numbers overflow."""
    return t * torch.exp2(torch.randint(-30, 31, (*t.shape[:-1], 1), generator=generator).double())


def subnormal(t: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return t * torch.finfo(dtype).smallest_normal / 4


def one_large_number(t: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows of small numbers after a large one: a sum in fp32 that begins with it loses them all."""
    t = t * 2.0**-13 if dtype is FP32 else t * 2.0**-6
    t[..., :1] = 2.0
    return t


def sprinkled(t: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Zeros of both signs, infinities, NaN and extreme numbers among others."""
    chosen = special(dtype)[torch.randint(0, 13, t.shape, generator=generator)]
    return torch.where(torch.rand(t.shape, generator=generator) < 0.1, chosen, t)


def zero(t: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return t.sign() * 0.0


@dataclass(frozen=True)
class Drawn:
    """Numbers of one kind, from a seed, in a memory layout."""

    kind: Any
    seed: int
    memory: Memory

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        t = torch.randn(*shape, generator=generator, dtype=FP64)
        return self.memory.holding(self.kind(t, dtype, generator).to(dtype))

    def __repr__(self) -> str:
        return f"{self.kind.__name__} from {self.seed} in {self.memory}"


seeds = st.integers(0, 2**31 - 1)
kinds = st.sampled_from((normal, normal, of_any_size, subnormal, one_large_number, sprinkled, zero))
drawn = st.builds(Drawn, kinds, seeds, memories)
# Their products are summed in fp64 in any order, which must not change the rounded sum.
gradients = st.builds(Drawn, st.sampled_from((normal, of_any_size, sprinkled, zero)), seeds, memories)
leadings = st.lists(st.sampled_from((1, 2, 3, 5, 0)), max_size=3).map(tuple) | st.just((70,))
widths = st.integers(1, 40) | st.sampled_from((63, 64, 65, 127, 1280))
dtypes = st.sampled_from((FP32, BF16, FP16))
all_dtypes = st.sampled_from((FP32, BF16, FP16, FP64))
specs = st.sampled_from(SPECS)
EPSES = (0.0, 1e-30, 1e-6, 1e-3, 1e30)
epses = st.sampled_from(EPSES)
mostly = st.one_of(drawn, drawn, drawn, st.none())  # for an optional tensor
