"""The report keeps to its budget of time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from report_runs import (  # noqa: F401  # fixtures
    SMALL,
    Clock,
    checkpoint_fixture,
    clock_fixture,
    llama,
    printed_report,
    quick_fixture,
    run_report,
)

from rmsnorm.patching import replacement
from rmsnorm.tools.models import loading
from rmsnorm.tools.models.loading import Built
from rmsnorm.tools.report import run as report_run
from rmsnorm.tools.report.result import ReportResult


class Pace:
    """Sets how long building, a pass over the model and each token take; training takes three times as long."""

    def __init__(self, clock: Clock, building: float, a_pass: float, a_token: float, slower_after: float = 1e9) -> None:
        self.clock, self.building, self.a_pass, self.a_token = clock, building, a_pass, a_token
        self.slower_after = slower_after
        self.saves = 0.0  # how much faster a pass is with our norms
        self.first_run = 0.0  # how much longer the first pass of a kind takes on a number of tokens
        self.seen: set[tuple[bool, int]] = set()

    def build(self, device: torch.device) -> Any:
        self.clock.seconds += self.building
        model = llama()
        model.register_forward_pre_hook(self._run, with_kwargs=True)
        return Built(model, None, ())

    def _run(self, model: Any, args: Any, named: Any) -> None:
        seconds = self.a_pass + self.a_token * named["input_ids"].numel()
        seconds *= 3 if torch.is_grad_enabled() else 1
        seconds *= 4 if self.clock.seconds > self.slower_after else 1
        kind = torch.is_grad_enabled(), named["input_ids"].numel()
        if kind not in self.seen:
            self.seen.add(kind)
            seconds += self.first_run
        self.clock.seconds += seconds - (self.saves if replacement.rule_of(model.model.norm) else 0.0)


def paced(pace: Pace, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> ReportResult:
    monkeypatch.setitem(loading.PRESETS, "small", pace.build)
    monkeypatch.setitem(SMALL, "max_position_embeddings", 4096)
    return run_report("small", out, **{"tokens": 1024} | options)


@pytest.mark.parametrize(
    ("building", "a_pass", "a_token", "tokens"),
    [(5, 0.01, 0.0001, 1024), (15, 0.1, 0.004, 64), (20, 0.4, 0.004, 16), (30, 0.2, 0.001, 128)],
    ids=["fast", "slow", "slower", "slow to load"],
)
def test_steps_run_on_as_many_tokens_as_the_budget_allows(
    building: float, a_pass: float, a_token: float, tokens: int, tmp_path: Path, clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(report_run, "_MOST_PAIRS", 9)
    result = paced(Pace(clock, building, a_pass, a_token), tmp_path, monkeypatch)
    assert result.seconds <= 90 * 1.2
    assert result.seconds == pytest.approx(clock.seconds, abs=0.1)
    assert result.forward is not None
    assert result.training is not None
    assert 7 <= len(result.training.rounds) == len(result.forward.rounds)
    assert result.training.tokens == result.forward.tokens == tokens
    assert any("whole-model steps run on" in note for note in result.notes) == (tokens < result.model["tokens"])
    assert any("norms are checked on" in note for note in result.notes) == (result.model["tokens"] < 1024)


def test_slow_first_runs_do_not_shorten_the_sequence(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the first step on a number of tokens loads kernels and allocates memory."""
    monkeypatch.setattr(report_run, "_MOST_PAIRS", 9)
    pace = Pace(clock, 20, 0.01, 0.00001)
    pace.first_run = 1.0
    result = paced(pace, tmp_path, monkeypatch)
    assert result.seconds <= 90 * 1.2
    assert result.training is not None
    assert result.training.tokens == 1024
    assert len(result.training.rounds) == 9


def test_a_machine_that_slows_down_does_not_exceed_the_budget(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_run, "_MOST_PAIRS", 100)
    result = paced(Pace(clock, 5, 0.1, 0.004, slower_after=50), tmp_path, monkeypatch)
    assert 70 <= result.seconds <= 90 * 1.2
    assert result.training is not None
    assert result.training.outcome in ("too few pairs", "noise")


def test_only_the_training_step_is_left_out_if_it_does_not_fit(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = paced(Pace(clock, 10, 1.6, 0.0001), tmp_path, monkeypatch)
    assert result.seconds <= 90 * 1.2
    assert result.training is None
    assert result.forward is not None
    assert len(result.forward.rounds) >= 7
    (note,) = [note for note in result.notes if "no training step is timed: 7 pairs of it do not fit into 90 s" in note]
    seconds = int(note.split("--seconds ")[1].split()[0])
    again = paced(Pace(clock, 10, 1.6, 0.0001), tmp_path, monkeypatch, seconds=seconds)
    assert again.training is not None


@pytest.mark.parametrize(("building", "a_pass"), [(12, 0.1), (4, 3)], ids=["loading alone", "a pass"])
def test_with_too_little_time_the_norms_are_checked_and_nothing_is_timed(
    building: float, a_pass: float, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = paced(Pace(clock, building, a_pass, 0.0001), tmp_path, monkeypatch, seconds=5)
    assert result.seconds <= building + a_pass * 1.1 + 0.1
    assert result.ok
    assert all(n.calls == 1 and n.rows == 16 and not n.times for n in result.norms)
    assert result.forward is result.training is None
    assert f"loading {building} s" in " ".join(result.notes)
    assert not any("step is timed" in note for note in result.notes)
    text = printed_report(result)
    assert "No time was measured" in text
    assert "of the norms are exact" in text


def test_a_gain_beyond_what_the_norms_take_is_noise(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = Pace(clock, 1, 1.0, 0.0)
    pace.saves = 0.5
    result = paced(pace, tmp_path, monkeypatch, tokens=16)
    assert result.forward is not None
    assert result.forward.difference == pytest.approx(0.5, abs=0.01)
    assert result.forward.norms.before < 0.5
    assert result.forward.outcome == "noise"
    assert "less, but the norms can save at most" in printed_report(result)


def test_the_order_within_pairs_alternates(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that gets slower with every step, the second side of a pair does not look slower."""
    pace = Pace(clock, 1, 1.0, 0.0)
    passes = iter(range(1000))
    model_runs = pace._run

    def slower(model: Any, args: Any, named: Any) -> None:
        model_runs(model, args, named)
        clock.seconds += 0.01 * next(passes)

    monkeypatch.setattr(pace, "_run", slower)
    result = paced(pace, tmp_path, monkeypatch, tokens=16)
    assert result.forward is not None
    assert {difference > 0 for difference in result.forward.differences} == {True, False}
    assert result.forward.outcome == "noise"


def test_a_model_that_raises_in_training_still_gets_a_forward_step(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(device: torch.device) -> Any:
        model = llama()

        def refuse(module: Any, args: Any) -> None:
            if module.training:
                raise ValueError("only for inference")

        model.register_forward_pre_hook(refuse)
        return Built(model, None, ())

    monkeypatch.setitem(loading.PRESETS, "small", build)
    result = run_report("small", tmp_path)
    assert result.training is None
    assert result.forward is not None
    assert [note for note in result.notes if "no training step is timed" in note and "only for inference" in note]
