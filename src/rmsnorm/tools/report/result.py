"""What `rmsnorm report` found, and its JSON."""

from dataclasses import dataclass
from typing import Any

from rmsnorm.tools.report.norms import Mode, NormResult, Pair, pair_to_json, total
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
        peak_bytes: The most memory that the process used.
        every_layer: Whether to print a row for each norm.
        compilation: What was compiled; None if whole-model steps ran eagerly or were not timed.
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
    peak_bytes: int
    every_layer: bool = False
    compilation: Compilation | None = None

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

    def to_json(self) -> dict[str, Any]:
        """Return everything, in types that `json.dumps` takes."""
        return {
            "verb": "report",
            "ok": self.ok,
            "target": self.target,
            "machine": self.facts,
            "model": self.model,
            "notes": list(self.notes),
            "norms": [n.to_json() for n in self.norms],
            "sum_forward": pair_to_json(self.total("forward")),
            "sum_forward_backward": pair_to_json(self.total("training")),
            "sum_one_token": pair_to_json(self.total("token")),
            "forward_step": self.forward and self.forward.to_json(),
            "training_step": self.training and self.training.to_json(),
            "compiled": self.compilation and self.compilation.to_json(),
            "saved_for_backward": self.saved and self.saved.to_json(),
            "peak_of_training_step": self.peak and self.peak.to_json(),
            "asked_seconds": self.asked,
            "seconds": round(self.seconds, 1),
            "phases_seconds": {name: round(seconds, 1) for name, seconds in self.phases.items()},
            "peak_resident_bytes": self.peak_bytes,
        }  # fmt: skip
