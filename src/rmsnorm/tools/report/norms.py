"""What was found about each norm of a model, and sums over the norms."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from rmsnorm.patching.patch_report import Verdict
from rmsnorm.spec import Gate, Spec

Mode = Literal["forward", "training", "token"]  # training: forward and backward; token: forward of one token
WITH_BACKWARD: tuple[Mode, ...] = ("forward", "training")
KEYS: dict[Mode, str] = {"forward": "forward", "training": "forward_backward", "token": "one_token"}  # in JSON


@dataclass(frozen=True)
class Pair:
    """Seconds with the model's own norms and with ours."""

    before: float
    after: float

    @property
    def gain(self) -> float | None:
        """How many times as fast ours are; None if no time was measured for ours."""
        return self.before / self.after if self.after else None

    def __add__(self, other: "Pair") -> "Pair":
        return Pair(self.before + other.before, self.after + other.after)

    def __mul__(self, times: int) -> "Pair":
        return Pair(self.before * times, self.after * times)


def pair_to_json(pair: Pair | None) -> dict[str, Any] | None:
    """Return the two times in microseconds and the gain."""
    if pair is None:
        return None
    return {"before_us": pair.before * 1e6, "after_us": pair.after * 1e6, "gain": pair.gain}


def pair_from_json(stored: dict[str, Any]) -> Pair:
    """Return what `pair_to_json` describes. Raises KeyError for the JSON of anything else."""
    return Pair(stored["before_us"] / 1e6, stored["after_us"] / 1e6)


@dataclass
class NormResult:
    """One norm, proven or left as it is, and what was measured when activations reached it.

    Attributes:
        verdict: What `patch` decided.
        width: The width of its rows; None until that is known.
        dtype: The dtype of its input, such as "bfloat16"; None until that is known.
        weight_dtype: The dtype of its weight; None without a weight.
        calls: How often the model called it.
        rows: How many rows it got in all calls.
        outputs: How many outputs were compared.
        wrong: Outputs of the patched model whose bits differ from *exact*.
        changed: Outputs whose bits differ from those of the class that was replaced.
        ulp: The largest such change, in ulp.
        times: Seconds of one call; empty if there was no time to measure them.
        again: How often it was measured again.
        outlier: Whether it took much longer than norms of its kind even when measured again. Its times are then not
            used in sums.
    """

    verdict: Verdict
    width: int | None
    dtype: str | None = None
    weight_dtype: str | None = None
    calls: int = 0
    rows: int = 0
    outputs: int = 0
    wrong: int = 0
    changed: int = 0
    ulp: int = 0
    times: dict[Mode, Pair] = field(default_factory=dict)
    again: int = 0
    outlier: bool = False

    @property
    def compared(self) -> bool:
        """Whether it is proven and activations reached it."""
        return self.verdict.replaced and self.calls > 0

    def to_json(self) -> dict[str, Any]:
        """Return everything, in types that `json.dumps` takes."""
        spec = self.verdict.spec
        return {
            "name": self.verdict.name,
            "class": self.verdict.class_name,
            "width": self.width,
            "dtype": self.dtype,
            "weight_dtype": self.weight_dtype,
            "finding": self.verdict.finding,
            "spec": None if spec is None else _spec_to_json(spec),
            "left_because": self.verdict.reason or None,
            "own_forward": self.verdict.own_forward_when or None,
            "calls": self.calls,
            "rows": self.rows,
            "outputs": self.outputs,
            "differ_from_exact": self.wrong,
            "differ_from_original": self.changed,
            "most_ulp_from_original": self.ulp,
            "forward": pair_to_json(self.times.get("forward")),
            "forward_backward": pair_to_json(self.times.get("training")),
            "one_token": pair_to_json(self.times.get("token")),
            "measured_again": self.again,
            "outlier": self.outlier,
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any], dtype: str | None) -> "NormResult":
        """Return what `to_json` describes. Raises KeyError for the JSON of anything else.

        Args:
            stored: The JSON.
            dtype: The dtype of the model, for an older file that has none for each norm.
        """
        times = {mode: pair_from_json(stored[key]) for mode, key in KEYS.items() if stored[key] is not None}
        return cls(
            StoredVerdict.from_json(stored), stored["width"], stored.get("dtype", dtype),
            stored.get("weight_dtype", dtype), stored["calls"], stored["rows"], stored["outputs"],
            stored["differ_from_exact"], stored["differ_from_original"], stored["most_ulp_from_original"], times,
            stored.get("measured_again", 0), stored.get("outlier", False),
        )  # fmt: skip


@dataclass(frozen=True)
class StoredVerdict(Verdict):
    """A verdict that was read from the JSON of a report, which has in words what was found."""

    words: str = field(kw_only=True)
    own_forward: str = field(kw_only=True)

    @property
    def finding(self) -> str:
        """What was found, in words."""
        return self.words or super().finding

    @property
    def own_forward_when(self) -> str:
        """When a replacement runs the module's own forward; "" if never."""
        return self.own_forward

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "StoredVerdict":
        """Return the verdict of a norm in the JSON of a report. Raises KeyError for the JSON of anything else."""
        spec = None if stored["spec"] is None else _spec_from_json(stored["spec"])
        return cls(
            stored["class"], spec, stored["left_because"] or "", name=stored["name"], words=stored.get("finding", ""),
            own_forward=stored["own_forward"] or "",
        )  # fmt: skip


def _spec_to_json(spec: Spec) -> dict[str, Any]:
    found: dict[str, Any] = {"eps": spec.eps, "cast": spec.cast, "offset": spec.offset}
    if spec.gate is not None:
        found |= {"activation": spec.gate.activation, "gate_first": spec.gate.first, "groups": spec.groups}
    return found


def _spec_from_json(stored: dict[str, Any]) -> Spec:
    gate = Gate(stored["activation"], stored["gate_first"]) if "activation" in stored else None
    return Spec(stored["eps"], stored["cast"], stored["offset"], gate, stored.get("groups", 1))


@dataclass(frozen=True)
class NormKind:
    """Norms of one class, width and verdict that get equally many rows, and therefore take the same time."""

    norms: tuple[NormResult, ...]

    def time(self, mode: Mode) -> Pair | None:
        """Return the seconds of all calls, each norm counted as the median of those measured; None if none was."""
        measured = [n for n in self.norms if mode in n.times]
        pairs = [n.times[mode] for n in measured if not n.outlier] or [n.times[mode] for n in measured]
        if not pairs:
            return None
        each = Pair(statistics.median(p.before for p in pairs), statistics.median(p.after for p in pairs))
        return each * sum(n.calls for n in self.norms)


def kinds_of(norms: Iterable[NormResult]) -> tuple[NormKind, ...]:
    """Group norms by their kind, in order of appearance."""
    groups: dict[Any, list[NormResult]] = {}
    for n in norms:
        groups.setdefault((n.verdict.class_name, n.width, n.verdict.finding, n.rows, n.calls), []).append(n)
    return tuple(NormKind(tuple(group)) for group in groups.values())


def total(norms: Iterable[NormResult], mode: Mode) -> Pair | None:
    """Return the seconds of all norms that activations reached; None without any, or if a kind was not timed."""
    pairs = [kind.time(mode) for kind in kinds_of(n for n in norms if n.compared)]
    known = [pair for pair in pairs if pair is not None]
    return sum(known, Pair(0.0, 0.0)) if known and len(known) == len(pairs) else None
