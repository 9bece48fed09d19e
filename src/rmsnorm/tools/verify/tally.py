"""What `rmsnorm verify` counts in its cases; tallies of several cases add up."""

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class GradientError:
    """Squared relative error of a gradient, ours and eager's, summed over `elements` elements."""

    elements: int = 0
    ours: float = 0.0
    eagers: float = 0.0

    def __add__(self, other: "GradientError") -> "GradientError":
        return GradientError(self.elements + other.elements, self.ours + other.ours, self.eagers + other.eagers)

    @property
    def size(self) -> float:
        """Our root mean square relative error."""
        return math.sqrt(self.ours / self.elements) if self.elements else 0.0

    @property
    def ratio(self) -> float | None:
        """Our error divided by eager's; None if both are 0."""
        if self.eagers == 0.0:
            return math.inf if self.ours > 0.0 else None
        return math.sqrt(self.ours / self.eagers)


@dataclass(frozen=True)
class Tally:
    """What was counted in one or more cases.

    Attributes:
        outputs: Elements of y.
        differing: Elements of y, x + residual, dx and dgate whose bits differ from the exact arithmetic's.
        from_cpu: Elements of these whose bits differ from the CPU's.
        unsteady: Numbers that change from run to run, or that are wrong on one rank.
        rows: The number of rows.
        close: Rows in which Σ x² or Σ g·xh is so close to a rounding boundary that the order of an fp64 sum may
            decide the result.
        eager_differing: Outputs whose bits differ from those of the class run eagerly.
        eager_ulp: The largest such difference, in ulp.
        eager_too_far: Cases with a larger difference than their spec allows.
        off_in_row: Constructed rows only: the largest difference from the exact arithmetic, in ulp of the row's
            largest number.
        dw_too_far: Gated norms only: elements of dw that are further from the exact arithmetic's than another order of
            the sum can take them.
        dx: The error of dx.
        dw: The error of dw.
    """

    outputs: int = 0
    differing: int = 0
    from_cpu: int = 0
    unsteady: int = 0
    rows: int = 0
    close: int = 0
    eager_differing: int = 0
    eager_ulp: float = 0.0
    eager_too_far: int = 0
    off_in_row: float = 0.0
    dw_too_far: int = 0
    dx: GradientError = GradientError()
    dw: GradientError = GradientError()

    def __add__(self, other: "Tally") -> "Tally":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        largest = {name: max(getattr(self, name), getattr(other, name)) for name in ("eager_ulp", "off_in_row")}
        return Tally(**{**sums, **largest})
