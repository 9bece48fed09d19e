"""Compares the tallies of a sweep with the bounds of the contract."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rmsnorm.tools.verify.bounds import (
    CAST_TIE,
    CONSTRUCTED_ULP,
    DIFFERING,
    EAGER_SHARE,
    GRADIENT_ELEMENTS,
    GRADIENT_RATIO,
    GRADIENT_ROWS,
    NARROW,
    NARROW_ERROR,
    SHARE_OUTPUTS,
    TIE,
)
from rmsnorm.tools.verify.cases import FLOATS, SweepRow, VerifyCase, short_name
from rmsnorm.tools.verify.tally import GradientError, Tally


@dataclass(frozen=True)
class RowResult:
    """What was counted in a row of the sweep, and which parts of it break the contract."""

    section: str
    name: str
    tally: Tally
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the row keeps the contract."""
        return not self.faults


def judge_all(rows: list[SweepRow], tallies: list[Tally]) -> tuple[RowResult, ...]:
    """Judge every row, and for each dtype all of its random rows taken together.

    Args:
        rows: The rows that ran.
        tallies: What was counted in each of them.

    Returns:
        A result for each row, then one for each dtype with more than one row.
    """
    pairs = [*zip(rows, tallies, strict=True), *_per_dtype(rows, tallies)]
    return tuple(judge(row, tally) for row, tally in pairs)


def judge(row: SweepRow, tally: Tally) -> RowResult:
    """Compare what was counted in one row with the bounds."""
    case = row.cases[0]
    faults = []
    if tally.unsteady:
        faults.append(f"{tally.unsteady} numbers depend on the run, on the thread count or on the rank")
    if row.section == "constructed":
        if tally.off_in_row > CONSTRUCTED_ULP:
            faults.append(f"off by {tally.off_in_row:.3g} ulp of the row's largest number")
        return RowResult(row.section, row.name, tally, tuple(faults))
    if tally.from_cpu > DIFFERING:
        faults.append(f"{tally.from_cpu} numbers of y, x + residual, dx and dgate differ from the CPU's")
    if tally.differing > DIFFERING:
        faults.append(f"{tally.differing} numbers of y, x + residual, dx and dgate differ from exact")
    if tally.dw_too_far:
        faults.append(f"{tally.dw_too_far} numbers of dw are too far from exact")
    if case.s in EAGER_SHARE:
        if tally.eager_differing > _differences_allowed(row):
            faults.append(f"{tally.eager_differing} outputs differ from eager's, more than allowed")
        if tally.eager_too_far:
            faults.append(f"outputs differ from eager's by up to {tally.eager_ulp:.3g} ulp")
    narrow = max(c.N for c in row.cases) < NARROW
    for name, error, dtype in (("dx", tally.dx, case.x), ("dw", tally.dw, case.w)):
        if dtype is None or error.ratio is None or not is_large_enough(error, tally):
            continue
        limit = _ratio_allowed(row, name, dtype)
        # The comparison is negated so that a NaN counts as a fault.
        if not (error.ratio <= limit or (narrow and error.size <= NARROW_ERROR)):
            faults.append(f"the error of {name} is {error.ratio:.5f} of eager's, more than {limit:.5f}")
    return RowResult(row.section, row.name, tally, tuple(faults))


def is_large_enough(error: GradientError, tally: Tally) -> bool:
    """Whether the sample of a gradient is large enough to judge its error."""
    return error.elements >= GRADIENT_ELEMENTS and tally.rows >= GRADIENT_ROWS


def _differences_allowed(row: SweepRow) -> float:
    """Return how many outputs of a row may differ from eager's.

    A small sample is allowed five standard deviations more than the mean. Differences come in clusters: if x·rstd
    falls on the other side of a rounding boundary for one x, it does so for every x with the same significand, which is
    N·2⁻⁷ of the numbers in a row of bf16. With the first cast the statistic falls on the other side, for a whole row.
    """
    dtype = row.cases[0].s
    expected = variance = largest = 0.0
    for case in row.cases:
        cluster = case.N if case.cast == "first" else max(1.0, case.N * torch.finfo(dtype).eps)
        largest = max(largest, cluster)
        expected += EAGER_SHARE[dtype] * case.outputs
        variance += EAGER_SHARE[dtype] * case.outputs * cluster
    if sum(case.outputs for case in row.cases) >= SHARE_OUTPUTS:
        return expected
    return expected + 5 * math.sqrt(variance) + largest


def _ratio_allowed(row: SweepRow, gradient: str, dtype: torch.dtype) -> float:
    """Return the largest allowed ratio of our error of a gradient, "dx" or "dw", to eager's."""
    case = row.cases[0]
    early = any(c.cast != "late" for c in row.cases)
    if gradient == "dw" and early and case.s in CAST_TIE and case.w != case.s:
        return GRADIENT_RATIO[case.s] + CAST_TIE[case.s]
    return GRADIENT_RATIO[dtype] + (TIE if dtype != torch.float32 else 0.0)


def _per_dtype(rows: list[SweepRow], tallies: list[Tally]) -> Iterator[tuple[SweepRow, Tally]]:
    """Yield for each dtype all random rows in which every tensor has it, as one row: the contract's sample.

    Gated norms are not among them, because they are not compared with eager.
    """
    for dtype in FLOATS:
        cases: list[VerifyCase] = []
        total, count = Tally(), 0
        for row, tally in zip(rows, tallies, strict=True):
            case = row.cases[0]
            if row.section in ("constructed", "gated") or {case.x, case.s, case.w or dtype} != {dtype}:
                continue
            cases.extend(row.cases)
            count += 1
            total += (
                tally
                if max(c.N for c in row.cases) >= NARROW
                else dataclasses.replace(tally, dx=GradientError(), dw=GradientError())
            )
        if count > 1:  # of a single row it would only repeat that row
            yield SweepRow("all", f"{short_name(dtype)}, together", tuple(cases)), total
