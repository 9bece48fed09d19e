"""Statistics of whole-model steps that were timed in pairs.

A pair is a step with the model's own norms and one with ours, directly after each other. What is reported is the median
of the paired differences and its confidence interval (`timing.median_interval`).
"""

import statistics
from dataclasses import dataclass
from typing import Any, Literal

from rmsnorm.tools import timing
from rmsnorm.tools.display import duration, share
from rmsnorm.tools.report.norms import Pair, pair_from_json, pair_to_json
from rmsnorm.tools.timing import Interval, Timing

FEWEST_PAIRS = 7  # fewer give no interval of CONFIDENCE that is worth reporting
CONFIDENCE = 0.95
# How many times as long as alone a norm may take in a model, whose other work evicts its data from the caches.
_IN_A_MODEL = 2.0


Outcome = Literal["saved", "slower", "noise", "too few pairs"]


@dataclass(frozen=True)
class StepResult:
    """A whole-model step, timed in pairs.

    Attributes:
        tokens: The number of tokens.
        rounds: For each pair the seconds with the model's own norms and with ours.
        norms: The seconds that the norms alone take in a step.
    """

    tokens: int
    rounds: tuple[tuple[float, float], ...]
    norms: Pair

    @property
    def before(self) -> Timing:
        """The steps with the model's own norms."""
        return timing.summarize([before for before, _ in self.rounds])

    @property
    def after(self) -> Timing:
        """The steps with our norms."""
        return timing.summarize([after for _, after in self.rounds])

    @property
    def differences(self) -> list[float]:
        """The seconds saved in each pair."""
        return [before - after for before, after in self.rounds]

    @property
    def difference(self) -> float:
        """The seconds saved: the median of the paired differences."""
        return statistics.median(self.differences)

    @property
    def interval(self) -> Interval | None:
        """The confidence interval of `difference`; None for too few pairs."""
        return timing.median_interval(self.differences, CONFIDENCE) if len(self.rounds) >= FEWEST_PAIRS else None

    @property
    def most(self) -> float:
        """The most seconds that the norms can save: all that they take in a model with their own classes."""
        return _IN_A_MODEL * self.norms.before

    @property
    def outcome(self) -> Outcome:
        """What the difference means. More than the norms can save has another cause, and is noise."""
        interval = self.interval
        if interval is None:
            return "too few pairs"
        if interval.high < 0:
            return "slower"
        return "saved" if interval.low > 0 and self.difference <= self.most else "noise"

    def summary(self) -> str:
        """Return the outcome in words."""
        interval, outcome = self.interval, self.outcome
        if interval is None:
            return f"unknown: {len(self.rounds)} pairs, at least {FEWEST_PAIRS} are needed"
        low, high = (duration(seconds, 3) for seconds in (interval.low, interval.high))
        if outcome == "saved":
            part = share(self.difference / self.before.median, 2)
            return f"{duration(self.difference, 3)} less, {part} ({low} to {high})"
        if outcome == "slower":
            return (
                f"{duration(-self.difference, 3)} more ({duration(-interval.high, 3)} to {duration(-interval.low, 3)})"
            )
        if interval.low <= 0:
            return f"noise: {low} to {high}"
        return f"noise: {duration(self.difference, 3)} less, but the norms can save at most {duration(self.most, 3)}"

    @classmethod
    def from_json(cls, stored: dict[str, Any], tokens: int, norms: Pair) -> "StepResult":
        """Return what `to_json` describes. Raises KeyError for the JSON of anything else.

        Args:
            stored: The JSON.
            tokens: The number of tokens, for an older file that has none for each step.
            norms: The seconds that the norms alone take, for an older file that does not have them either.
        """
        rounds = tuple((before / 1e6, after / 1e6) for before, after in stored["rounds_us"])
        alone = stored.get("norms")
        return cls(stored.get("tokens", tokens), rounds, norms if alone is None else pair_from_json(alone))

    def to_json(self) -> dict[str, Any]:
        """Return everything, in types that `json.dumps` takes."""
        interval = self.interval
        return {
            "tokens": self.tokens,
            "pairs": len(self.rounds),
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "difference_us": self.difference * 1e6,
            "interval": interval and {
                "of": "the median of the paired differences",
                "method": "order statistics (sign test)",
                "low_us": interval.low * 1e6,
                "high_us": interval.high * 1e6,
                "coverage": interval.coverage,
            },
            "outcome": self.outcome,
            "norms_can_save_us": self.most * 1e6,
            "norms": pair_to_json(self.norms),
            "rounds_us": [[before * 1e6, after * 1e6] for before, after in self.rounds],
        }  # fmt: skip
