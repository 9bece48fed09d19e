"""What `rmsnorm bench` measured, and its JSON."""

from dataclasses import dataclass, replace
from typing import Any

from rmsnorm.tools.bench.aims import STRIDED_SHARE, AimResult, aims_of, seconds_aimed_at
from rmsnorm.tools.bench.cases import FORWARD, STRIDED_FORWARD, BenchCase, moved_bytes
from rmsnorm.tools.bench.line import FittedLine
from rmsnorm.tools.timing import Timing


@dataclass(frozen=True)
class Measurement:
    """One provider in one case.

    Attributes:
        timing: Its time; None if it has none.
        reason: Why it has no time.
        differs: The share of outputs whose bits differ from the Definition's; None for another function.
        saved: The bytes kept for the backward pass besides the weight; None if the mode is not training.
    """

    timing: Timing | None
    reason: str = ""
    differs: float | None = None
    saved: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the time in microseconds, or why there is none."""
        timing = self.timing.to_json() if self.timing else {"no_time": self.reason}
        return {**timing, "differs_from_definition": self.differs, "saved_bytes": self.saved}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Measurement":
        """Return what `to_json` describes. Raises KeyError for the JSON of anything else."""
        timing, reason = None, stored.get("no_time", "")
        if "calls" in stored:
            seconds = (stored[f"{figure}_us"] / 1e6 for figure in ("min", "median", "low", "high"))
            timing = Timing(stored["calls"], *seconds)
        return cls(timing, reason, stored["differs_from_definition"], stored["saved_bytes"])


@dataclass(frozen=True)
class BenchRow:
    """One case: what is wrong with our bits (`fault`, empty if nothing is), and every provider's measurement."""

    case: BenchCase
    fault: str
    providers: dict[str, Measurement]

    def time(self, name: str, cuda: bool) -> float | None:
        """Return the seconds that are compared: the minimum on a CPU, the median on a GPU."""
        timing = self.providers[name].timing if name in self.providers else None
        return None if timing is None else timing.median if cuda else timing.minimum

    def ratio(self, provider: str, cuda: bool) -> float | None:
        """Return a provider's time divided by ours; None if one of them has no time."""
        theirs, ours = self.time(provider, cuda), self.time("ours", cuda)
        return None if theirs is None or ours is None else theirs / ours


@dataclass(frozen=True)
class BenchResult:
    """What `rmsnorm bench` measured.

    Attributes:
        facts: What `machine.describe` returned.
        kernel: What `explain` says of a call on the device.
        quick: Whether it was a quick run.
        rows: The cases.
        first_call: What `overheads.first_call` returned; empty if it was not measured.
        host: What `overheads.host_times` returned; empty if it was not measured.
        seconds: How long the run took.
        line: What `line.measure_lines` returned; None if it was not measured.
    """

    facts: dict[str, Any]
    kernel: str
    quick: bool
    rows: tuple[BenchRow, ...]
    first_call: dict[str, Any]
    host: dict[str, dict[str, float]]
    seconds: float
    line: dict[str, FittedLine] | None = None

    @property
    def ok(self) -> bool:
        """Whether our bits are right in every case."""
        return not any(row.fault for row in self.rows)

    @property
    def cuda(self) -> bool:
        """Whether it was measured on a GPU."""
        return bool(self.facts["device"] == "cuda")

    def aims(self) -> list[AimResult]:
        """Return the aims of the cases that were measured."""
        found = []
        for row in self.rows:
            case, ours = row.case, row.time("ours", self.cuda)
            if ours is None:
                continue
            for aim in aims_of(case, self.cuda):
                ratio = row.ratio(aim.provider, self.cuda)
                if ratio is not None:
                    found.append(AimResult(f"{case}: {aim.provider} / ours", ratio, aim.at_least))
            longest = seconds_aimed_at(case, self.cuda)
            if longest is not None:
                found.append(AimResult(f"{case}: {longest * 1e6:g} us / ours", longest / ours, 1))
            if case.mode == STRIDED_FORWARD:
                dense = [r.time("ours", self.cuda) for r in self.rows if r.case == replace(case, mode=FORWARD)]
                found += [
                    AimResult(f"{case}: without gaps / ours", t / ours, STRIDED_SHARE) for t in dense if t is not None
                ]
        return found

    def to_json(self) -> dict[str, Any]:
        """Return everything that was measured, in types that `json.dumps` takes."""
        return {
            "verb": "bench",
            "ok": self.ok,
            "machine": self.facts,
            "kernel": self.kernel,
            "quick": self.quick,
            "seconds": round(self.seconds, 1),
            "figure": "median_us, L2 overwritten before every call" if self.cuda else "min_us",
            "first_call": self.first_call,
            "host_us_of_16_x_1280": self.host,
            "line": self.line and {name: line.to_json() for name, line in self.line.items()},
            "cases": [
                {
                    **row.case.to_json(),
                    "moved_bytes": moved_bytes(row.case),
                    "check": row.fault or "green",
                    "copy_over_ours": row.ratio("copy", self.cuda),
                    "definition_over_ours": row.ratio("Definition", self.cuda),
                    "providers": {name: m.to_json() | self._speed(row, name) for name, m in row.providers.items()},
                }
                for row in self.rows
            ],
            "bounds": [
                {"what": h.what, "measured": h.measured, "at_least": h.at_least, "met": h.met} for h in self.aims()
            ],
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "BenchResult":
        """Return what `to_json` describes, times to the nanosecond. Raises KeyError for the JSON of anything else."""
        rows = tuple(
            BenchRow(
                BenchCase.from_json(case),
                "" if case["check"] == "green" else case["check"],
                {name: Measurement.from_json(m) for name, m in case["providers"].items()},
            )
            for case in stored["cases"]
        )
        host = stored.get("host_us_of_16_x_1280", {})
        lines = stored.get("line")
        line = lines and {name: FittedLine.from_json(content) for name, content in lines.items()}
        return cls(
            stored["machine"],
            stored["kernel"],
            stored["quick"],
            rows,
            stored["first_call"],
            host,
            stored["seconds"],
            line,
        )

    def _speed(self, row: BenchRow, name: str) -> dict[str, float]:
        """Return the bytes that must be moved divided by the time, and the speed relative to a copy's."""
        seconds, copy = row.time(name, self.cuda), row.time("copy", self.cuda)
        if seconds is None or copy is None:
            return {}
        return {"gb_per_s": moved_bytes(row.case) / seconds / 1e9, "share_of_copy": copy / seconds}
