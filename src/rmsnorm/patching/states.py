"""The states in which a norm is called while it is being proven: dtypes, shapes, modes, layouts and values."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rmsnorm.patching.rule import TRAINING_DTYPES, Dtypes, dtypes_in_words

# What requires a gradient; or that gradients are off.
GRAD_MODES = ("no_grad", "both", "input", "weight", "neither", "inference")
# For a gated norm, "both" and "input" include the gate; a forward that asks runs in these too.
GATED_GRAD_MODES = (*GRAD_MODES, "input without gate", "gate alone")
PERMUTED_LAYOUTS = ("transposed", "columns first")
_LAYOUTS = ("sliced", "every second element", "expanded", *PERMUTED_LAYOUTS)
_VALUES = ("zero", "tiny", "huge", "infinite", "NaN", "spiky")
_DEVICES = ("cuda:0", "cuda:1", "mps", "xpu:0", "meta")


@dataclass(frozen=True)
class State:
    """One way to call a norm.

    Attributes:
        dtypes: Of input and weight, None for no weight; and of the gate, if the norm has one.
        leading: The dimensions of the input in front of the normalized ones.
        training: Whether the module is in training mode.
        grad: One of `GRAD_MODES`, or for a gated norm of `GATED_GRAD_MODES`.
        layout: How the input lies in memory, and the gate.
        values: What its rows hold.
        autocast: The dtype of autocast, if it is on.
        device: The device that tensors report, if not the one that they are on.
    """

    dtypes: Dtypes
    leading: tuple[int, ...] = (2, 3)
    training: bool = False
    grad: str = "no_grad"
    layout: str = "dense"
    values: str = "random"
    autocast: torch.dtype | None = None
    device: str | None = None

    def __str__(self) -> str:
        usual = State(self.dtypes)
        text = dtypes_in_words(self.dtypes)
        if self.leading != usual.leading:
            text += f" and leading dimensions {self.leading}"
        if self.training:
            text += ", in training mode"
        text += {"no_grad": "", "inference": ", in inference mode"}.get(self.grad, ", with gradients")
        if self.layout != usual.layout:
            text += f", in {self.layout} layout"
        if self.values != usual.values:
            text += f", with {self.values} values"
        return text if self.device is None else f"{text}, on {self.device}"


def one_dtype(dtypes: Dtypes) -> bool:
    """Whether input, weight and gate have the same dtype, as far as there are any."""
    return all(dtype in (dtypes[0], None) for dtype in dtypes[1:])


def same_dtypes(dtype: torch.dtype, weighted: bool, gated: bool) -> Dtypes:
    """The dtype for the input, and for the weight and the gate if there are any."""
    w = dtype if weighted else None
    return (dtype, w, dtype) if gated else (dtype, w)


def all_modes(dtypes: Dtypes) -> Iterator[State]:
    """Training and evaluation, with and without gradients; fewer of these for dtypes in which nobody trains."""
    for training in (False, True):
        every = one_dtype(dtypes) or (torch.float64 not in dtypes and not training)
        for grad in GRAD_MODES if every else GRAD_MODES[:2]:
            yield State(dtypes, training=training, grad=grad)


def all_shapes(weighted: bool, gated: bool = False) -> Iterator[State]:
    """Inputs of every rank and on every device in each dtype, and of other sizes, layouts and values in some of them.

    A forward cannot tell sizes, layouts and values apart without being refused, so each dtype gets some of these.
    """
    ways = [(d, training, grad) for d in TRAINING_DTYPES for training, grad in ((False, "no_grad"), (True, "both"))]
    turn = itertools.cycle(ways)

    def state(way: tuple[torch.dtype, bool, str], leading: tuple[int, ...], **others: Any) -> State:
        dtype, training, grad = way
        return State(same_dtypes(dtype, weighted, gated), leading, training, grad, **others)

    for way in ways:
        yield from (state(way, leading) for leading in ((), (2,), (2, 3), (2, 1, 5), (2, 3, 2, 2)))
        yield from (state(way, (2, 3), device=device) for device in _DEVICES)
    yield from (state(next(turn), leading) for leading in ((0,), (1,), (40,), (1, 1), (3, 0, 2)) for _ in range(2))
    for layout in _LAYOUTS:
        yield from (state(next(turn), leading, layout=layout) for leading in ((5,), (3, 2), (2, 3, 4)))
    for values in _VALUES:
        yield from (state(way, (2, 4), values=values) for way in ways[::2])


def all_autocasts(dtypes: Dtypes) -> Iterator[State]:
    """Autocast to both 16-bit dtypes, with and without gradients."""
    for autocast in (torch.bfloat16, torch.float16):
        for grad in ("no_grad", "both"):
            yield State(dtypes, grad=grad, autocast=autocast)
