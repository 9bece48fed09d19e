"""Finds the calls for which a norm computes its spec; for the others its own forward will run."""

import itertools
from dataclasses import dataclass

import torch

from rmsnorm.patching.probe import ForwardRaised, NotProven, Probe
from rmsnorm.patching.rule import TRAINING_DTYPES, Dtypes
from rmsnorm.patching.spec_search import mismatch
from rmsnorm.patching.states import (
    GATED_GRAD_MODES,
    GRAD_MODES,
    PERMUTED_LAYOUTS,
    State,
    all_autocasts,
    all_modes,
    all_shapes,
    one_dtype,
)  # fmt: skip
from rmsnorm.patching.tensor_queries import DECISIVE
from rmsnorm.spec import DTYPES, Spec


@dataclass(frozen=True)
class Coverage:
    """Where a norm computes its spec, by the names that `Rule` has for it."""

    ranks: frozenset[int]
    own_dtypes: frozenset[Dtypes]
    own_under_autocast: bool
    keeps_memory_order: bool


def find_coverage(probe: Probe, spec: Spec) -> Coverage:
    """Where the norm computes the spec. Raises NotProven if that is not everywhere where it must."""
    ranks = _proven_ranks(probe, spec)
    failing = _Failing(frozenset(), False)
    if probe.queries & DECISIVE:
        failing = _all_combinations(probe, spec, ranks)
    own_dtypes = _own_dtypes(probe, spec, failing.dtypes)
    own_under_autocast = failing.under_autocast or _changes_under_autocast(probe, spec)
    return Coverage(ranks, own_dtypes, own_under_autocast, _keeps_memory_order(probe, ranks))


def _proven_ranks(probe: Probe, spec: Spec) -> frozenset[int]:
    """The numbers of dimensions of an input for which the norm computes the spec. It may raise for the others."""
    ranks, raising = set(), set()
    for shape in probe.shapes:
        for state in all_shapes(probe.weighted, probe.gated):
            rank = probe.normalized_dims + len(state.leading)
            try:
                seen, x, w = probe.run(state, shape)
            except ForwardRaised:
                # If it raises for a layout, ours runs there; if for a device, this machine may just not have it.
                if state.layout == "dense" and state.device is None:
                    raising.add(rank)
                continue
            ranks.add(rank)
            if not probe.matches(seen, x, w, spec):
                raise NotProven(mismatch(state))
    return frozenset(ranks - raising)


@dataclass(frozen=True)
class _Failing:
    dtypes: frozenset[Dtypes]
    under_autocast: bool


def _all_combinations(probe: Probe, spec: Spec, ranks: frozenset[int]) -> _Failing:
    """Where the norm fails in some combination of all answers that its forward could branch on."""
    dtypes, under_autocast = set(), False
    modes = GATED_GRAD_MODES if probe.gated else GRAD_MODES
    leadings = [
        one for one in ((), (2,), (1, 2), (2, 3), (1, 3, 2), (1, 2, 1, 3)) if probe.normalized_dims + len(one) in ranks
    ]
    for pair, leading, training, grad, autocast in itertools.product(
        probe.dtype_pairs(TRAINING_DTYPES), leadings, (False, True), modes, (None, torch.bfloat16)
    ):
        state = State(pair, leading, training, grad, autocast=autocast)
        holds = probe.holds(spec, state, probe.shapes[0])
        if not holds and autocast is not None:
            under_autocast = True
        elif not holds and one_dtype(pair):
            raise NotProven(mismatch(state))
        elif not holds:
            dtypes.add(pair)
    return _Failing(frozenset(dtypes), under_autocast)


def _own_dtypes(probe: Probe, spec: Spec, failing: frozenset[Dtypes]) -> frozenset[Dtypes]:
    """The dtypes for which the norm does not compute the spec, so that only its own forward gives its bits.

    For a gated norm these are also all with fp64, for which there is no kernel; each would have to be proven.
    """
    proven = {probe.same_dtypes(dtype) for dtype in TRAINING_DTYPES}
    own = {p for p in probe.dtype_pairs(DTYPES) if probe.gated and torch.float64 in p} | failing
    asked = [p for p in probe.dtype_pairs(DTYPES) if p not in own and p not in proven]
    return frozenset(own).union(
        pair
        for pair in asked
        if not all(probe.holds(spec, state, shape) for shape in probe.shapes for state in all_modes(pair))
    )


def _changes_under_autocast(probe: Probe, spec: Spec) -> bool:
    """Whether autocast changes what the norm computes: on the CPU, or where it asks whether autocast is on."""
    states = [state for dtype in TRAINING_DTYPES for state in all_autocasts(probe.same_dtypes(dtype))]
    return not all(probe.holds(spec, state, shape) for state in states for shape in probe.shapes)


def _keeps_memory_order(probe: Probe, ranks: frozenset[int]) -> bool:
    """Whether the output of a permuted input has its dimensions in memory in the same order as the input."""
    kept = set()
    for dtype, layout, leading in itertools.product(TRAINING_DTYPES, PERMUTED_LAYOUTS, ((3, 2), (2, 3, 4))):
        if probe.normalized_dims + len(leading) not in ranks:
            continue
        seen, x, _ = probe.run(State(probe.same_dtypes(dtype), leading, layout=layout), probe.shapes[0])
        kept.add(seen.y.stride() == x.stride())
    return kept == {True}
