"""What `rmsnorm report` found, and its JSON."""

from dataclasses import dataclass
from typing import Any

from rmsnorm.tools.report.norms import (
    KEYS,
    WITH_BACKWARD,
    Mode,
    NormKind,
    NormResult,
    Pair,
    pair_to_json,
    total,
)
from rmsnorm.tools.report.prediction import CopyLine, Prediction, Rate, predict, rate_on, work_of
from rmsnorm.tools.report.steps import StepResult


@dataclass(frozen=True)
class MemoryBytes:
    """Bytes of a training step of the whole model on `tokens` tokens.

    Attributes:
        tokens: The number of tokens.
        before: With the model's own norms.
        after: With ours.
        recomputed: With ours and `patch(model, recompute=True)`; None if that was not measured.
    """

    tokens: int
    before: int
    after: int
    recomputed: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return everything, in types that `json.dumps` takes."""
        return {
            "tokens": self.tokens,
            "before_bytes": self.before,
            "after_bytes": self.after,
            "less_bytes": self.before - self.after,
            "recomputed_bytes": self.recomputed,
            "recompute_less_bytes": None if self.recomputed is None else self.after - self.recomputed,
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any] | None, tokens: int) -> "MemoryBytes | None":
        """Return what `to_json` describes; `tokens` is for an older file that has no number of tokens."""
        if stored is None:
            return None
        recomputed = stored.get("recomputed_bytes")
        return cls(stored.get("tokens", tokens), stored["before_bytes"], stored["after_bytes"], recomputed)


@dataclass(frozen=True)
class CompiledStep:
    """The first call of a compiled step, which compiles it.

    Attributes:
        mode: "forward" or "training".
        side: "before" with the model's own norms, "after" with ours, "unfused" with ours and without fused additions.
        seconds: How long the call took.
        graphs: How many graphs torch.compile made; 0 if this release of torch does not count them.
    """

    mode: Mode
    side: str
    seconds: float
    graphs: int

    def to_json(self) -> dict[str, Any]:
        """Return everything, in types that `json.dumps` takes."""
        return {"step": self.mode, "norms": self.side, "seconds": round(self.seconds, 3), "graphs": self.graphs}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "CompiledStep":
        """Return what `to_json` describes. Raises KeyError for the JSON of anything else."""
        return cls(stored["step"], stored["norms"], stored["seconds"], stored["graphs"])


@dataclass(frozen=True)
class Compilation:
    """What was compiled for whole-model steps.

    Attributes:
        steps: The first call of each step.
        unfused: By mode, the comparison of the model's own norms with our norms without fused additions.
    """

    steps: tuple[CompiledStep, ...]
    unfused: dict[Mode, StepResult]

    def to_json(self) -> dict[str, Any]:
        """Return everything, in types that `json.dumps` takes."""
        return {
            "with": "torch.compile, backend inductor",
            "first_calls": [step.to_json() for step in self.steps],
            "without_fusion": {f"{mode}_step": step.to_json() for mode, step in self.unfused.items()},
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any], tokens: int) -> "Compilation":
        """Return what `to_json` describes. Raises KeyError for the JSON of anything else."""
        none, modes = Pair(0.0, 0.0), WITH_BACKWARD
        steps = {mode: stored["without_fusion"].get(f"{mode}_step") for mode in modes}
        unfused = {mode: StepResult.from_json(step, tokens, none) for mode, step in steps.items() if step is not None}
        return cls(tuple(map(CompiledStep.from_json, stored["first_calls"])), unfused)


@dataclass(frozen=True)
class ReportResult:
    """What `rmsnorm report` found.

    Attributes:
        target: What the user named.
        facts: What `machine.describe` returned.
        model: The model's class, size, dtype, tokens and numbers of norms, and whether these are as expected.
        notes: What was left out and why.
        norms: The norms.
        forward: Forward steps of the whole model; None if they were not timed.
        training: Training steps of the whole model; None if they were not timed.
        saved: What the model saves for the backward pass, without the weights; None if that was not counted.
        peak: The most that is allocated during a training step, beyond what was before; None if not measured.
        asked: The seconds that the user allowed.
        phases: The seconds that each phase took.
        peak_bytes: The most memory that the process used; None if the system does not say.
        every_layer: Whether to print a row for each norm.
        compilation: What was compiled; None if whole-model steps ran eagerly or were not timed.
        copy: Copies on the device; None if none was timed.
    """

    target: str
    facts: dict[str, Any]
    model: dict[str, Any]
    notes: tuple[str, ...]
    norms: tuple[NormResult, ...]
    forward: StepResult | None
    training: StepResult | None
    saved: MemoryBytes | None
    peak: MemoryBytes | None
    asked: float
    phases: dict[str, float]
    peak_bytes: int | None
    every_layer: bool = False
    compilation: Compilation | None = None
    copy: CopyLine | None = None

    @property
    def ok(self) -> bool:
        """Whether no output of the norms differs from *exact*, and a preset has the norms that it must have."""
        return not any(n.wrong for n in self.norms) and self.model["as_expected"] is not False

    @property
    def seconds(self) -> float:
        """How long the report took."""
        return sum(self.phases.values())

    def total(self, mode: Mode) -> Pair | None:
        """Return the seconds of all norms together; None if they were not timed."""
        return total(self.norms, mode)

    @property
    def rate(self) -> Rate | None:
        """What our kernels are expected to reach on the device; None if that is unknown."""
        return rate_on(self.facts, self.copy)

    def prediction(self, kind: NormKind, mode: Mode) -> Prediction | None:
        """Return the predicted and the measured time of all calls of some norms; None if one of them is unknown."""
        predicted, measured = predict(kind.norms, mode, self.facts["device"], self.rate), kind.time(mode)
        return None if predicted is None or measured is None else Prediction(predicted, measured.after)

    def whole_prediction(self, mode: Mode) -> Prediction | None:
        """Return the predicted and the measured time of all norms together; None if one of them is unknown."""
        compared = [n for n in self.norms if n.compared]
        predicted, measured = predict(compared, mode, self.facts["device"], self.rate), self.total(mode)
        return None if predicted is None or measured is None else Prediction(predicted, measured.after)

    def _norm_to_json(self, n: NormResult) -> dict[str, Any]:
        works = {mode: work_of(n, mode, self.facts["device"]) for mode in WITH_BACKWARD}
        predicted: dict[str, Any] = {}
        for mode, work in works.items():
            if work is not None and self.rate is not None and mode in n.times:
                found = Prediction(self.rate.seconds(work), n.times[mode].after)
                predicted[KEYS[mode]] = found.to_json()
        moved = {KEYS[mode]: None if work is None else work.moved for mode, work in works.items()}
        return n.to_json() | {"moved_bytes": moved, "predicted": predicted}

    def _prediction_to_json(self) -> dict[str, Any] | None:
        if self.rate is None:
            return None
        whole = {mode: self.whole_prediction(mode) for mode in WITH_BACKWARD}
        return self.rate.to_json() | {f"sum_{KEYS[m]}": p and p.to_json() for m, p in whole.items()}

    def to_json(self) -> dict[str, Any]:
        """Return everything, in types that `json.dumps` takes."""
        return {
            "verb": "report",
            "ok": self.ok,
            "target": self.target,
            "machine": self.facts,
            "model": self.model,
            "notes": list(self.notes),
            "norms": [self._norm_to_json(n) for n in self.norms],
            "sum_forward": pair_to_json(self.total("forward")),
            "sum_forward_backward": pair_to_json(self.total("training")),
            "sum_one_token": pair_to_json(self.total("token")),
            "forward_step": self.forward and self.forward.to_json(),
            "training_step": self.training and self.training.to_json(),
            "copy": self.copy and self.copy.to_json(),
            "prediction": self._prediction_to_json(),
            "compiled": self.compilation and self.compilation.to_json(),
            "saved_for_backward": self.saved and self.saved.to_json(),
            "peak_of_training_step": self.peak and self.peak.to_json(),
            "asked_seconds": self.asked,
            "seconds": round(self.seconds, 1),
            "phases_seconds": {name: round(seconds, 1) for name, seconds in self.phases.items()},
            "peak_resident_bytes": self.peak_bytes,
        }  # fmt: skip

    @classmethod
    def from_json(cls, stored: dict[str, Any], every_layer: bool = False) -> "ReportResult":
        """Return what `to_json` describes, or an older version of it. Raises KeyError for the JSON of anything else.

        Args:
            stored: The JSON.
            every_layer: Whether to print a row for each norm.
        """
        if stored["verb"] != "report":
            raise KeyError("verb")
        model = stored["model"]
        tokens, dtype = model["tokens"], model["dtype"] if ", " not in model["dtype"] else None
        norms = tuple(NormResult.from_json(n, dtype) for n in stored["norms"])

        def step(mode: Mode) -> StepResult | None:
            found = stored[f"{mode}_step"]
            return found and StepResult.from_json(found, tokens, total(norms, mode) or Pair(0.0, 0.0))

        compiled, copy = stored.get("compiled"), stored.get("copy")
        return cls(
            stored["target"], stored["machine"], model, tuple(stored["notes"]), norms, step("forward"),
            step("training"), MemoryBytes.from_json(stored["saved_for_backward"], tokens),
            MemoryBytes.from_json(stored.get("peak_of_training_step"), tokens),
            stored.get("asked_seconds", stored["seconds"]), stored.get("phases_seconds", {"in all": stored["seconds"]}),
            stored["peak_resident_bytes"], every_layer, compiled and Compilation.from_json(compiled, tokens),
            copy and CopyLine.from_json(copy),
        )  # fmt: skip
