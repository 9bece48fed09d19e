"""report --compile: whole-model steps that torch.compile has compiled."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import (  # noqa: F401  # fixtures
    SMALL,
    Clock,
    clock_fixture,
    printed_report,
    quick_fixture,
    run_report,
)
from transformers import LlamaConfig, LlamaModel

from rmsnorm.tools.models import loading
from rmsnorm.tools.models.loading import Built
from rmsnorm.tools.models.steps import Steps, copy_sharing_tensors
from rmsnorm.tools.report import patched as report_patched
from rmsnorm.tools.report.patched import CompiledModel, PatchedModel

pytestmark = pytest.mark.compiled


@pytest.fixture(name="model")
def model_fixture(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> str:
    """A target of one layer, whose steps are traced but not translated, which would take long."""
    config = LlamaConfig(**SMALL | {"num_hidden_layers": 1})
    monkeypatch.setitem(loading.PRESETS, "small", lambda device: Built(LlamaModel(config), None, ()))
    monkeypatch.setitem(report_patched._COMPILED, "backend", "eager")
    return "small"


def test_compiled_steps_are_measured_like_eager_ones(model: str, tmp_path: Path) -> None:
    result = run_report(model, tmp_path, tokens=16, compiled=True)
    assert result.ok
    assert result.forward is not None
    assert result.training is not None
    assert len(result.forward.rounds) == len(result.training.rounds) == 7
    assert result.saved is not None
    assert 0 < result.saved.after < result.saved.before
    assert result.saved.recomputed is None  # that would be another model to compile
    assert result.peak is not None
    assert result.saved.after < result.peak.after
    assert result.peak.recomputed is None
    assert result.compilation is not None
    first_calls = [(step.mode, step.side, step.graphs) for step in result.compilation.steps]
    assert first_calls == [(mode, side, 1) for mode in ("forward", "training") for side in CompiledModel.sides]
    assert {mode: len(step.rounds) for mode, step in result.compilation.unfused.items()} == {
        "forward": 7,
        "training": 7,
    }
    written = json.loads((tmp_path / "report.json").read_text())["compiled"]
    assert [step["graphs"] for step in written["first_calls"]] == [1] * 6
    assert set(written["without_fusion"]) == {"forward_step", "training_step"}
    text = printed_report(result)
    assert "saved for backward, compiled, 16 tokens" in text
    assert "forward step, compiled, 16 tokens, 7 pairs" in text
    assert "were compiled with torch.compile (Inductor)" in text
    assert "forward step, compiled, additions not fused, 16 tokens, 7 pairs" in text
    assert "training step with our norms: " in text
    assert "training step with our norms without fused additions: " in text


def test_each_side_is_timed_as_it_was_compiled(
    model: str, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled first, for the model's own norms, takes 0.1 s, ours 0.2 s, ours without fusion 0.3 s."""
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        number = len(calls)
        calls.append(0)

        def run(*args: Any) -> Any:
            calls[number] += 1
            clock.seconds += 0.1 * (number % 3 + 1)
            return graph(*args)

        return run

    monkeypatch.setitem(report_patched._COMPILED, "backend", backend)
    result = run_report(model, tmp_path, tokens=16, compiled=True)
    first, timed, counted = 1, 7, 2  # memory is measured in two more steps with and without ours
    assert calls == [first + timed] * 3 + [first + timed + counted] * 2 + [first + timed]
    assert result.compilation is not None
    for mode, step in (("forward", result.forward), ("training", result.training)):
        assert step is not None
        assert step.difference == pytest.approx(-0.1, abs=0.01)
        assert step.before.median == pytest.approx(0.1, abs=0.01)
        assert result.compilation.unfused[mode].difference == pytest.approx(-0.2, abs=0.01)  # type: ignore[index]


def test_eager_steps_have_no_compilation(model: str, tmp_path: Path) -> None:
    result = run_report(model, tmp_path, tokens=16)
    assert result.compilation is None
    assert json.loads((tmp_path / "report.json").read_text())["compiled"] is None
    assert "compiled" not in printed_report(result)


def test_the_time_of_the_compilation_does_not_count(
    model: str, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(graph: Any, inputs: Any) -> Any:
        clock.seconds += 500
        return graph

    monkeypatch.setitem(report_patched._COMPILED, "backend", slow)
    result = run_report(model, tmp_path, tokens=16, compiled=True)
    assert result.forward is not None
    assert len(result.forward.rounds) == 7
    assert result.phases["compiling"] >= 4 * 500
    assert result.phases["whole-model steps"] < 90
    assert result.seconds == pytest.approx(clock.seconds, abs=0.1)


def test_a_model_that_cannot_be_compiled_still_gets_a_report(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(graph: Any, inputs: Any) -> Any:
        raise ValueError("no such instruction")

    monkeypatch.setitem(report_patched._COMPILED, "backend", refuses)
    result = run_report(model, tmp_path, tokens=16, compiled=True)
    assert result.ok
    assert result.forward is result.training is None
    notes = [note for note in result.notes if "step is timed: LlamaModel cannot be compiled" in note]
    assert [note.split()[1] for note in notes] == ["forward", "training"]


def test_copies_of_a_model_share_nothing_but_its_weights(model: str) -> None:
    original = loading.PRESETS[model](None).model  # type: ignore[arg-type]
    original.norm.weight.data.uniform_(0.5, 1.5)
    patched = PatchedModel(original, original.device)
    patched.prove()
    compiled = CompiledModel(patched)
    own = type(original.norm)
    assert own is patched.own["norm"]
    for side in compiled.sides:
        compiled.use(side)
        copied = compiled.steps.model
        assert copied is not original
        assert all(a is b for a, b in zip(copied.parameters(), original.parameters(), strict=True))
        assert (type(copied.norm) is own) == (side == "before")
    kinds = {side: type(compiled._steps[side].model.norm) for side in compiled.sides}
    assert len(set(kinds.values())) == 3  # the class says whether torch.compile fuses additions


def test_compiled_copies_of_a_model_are_compiled_once_each(model: str) -> None:
    """They share the code of the model, but no call of one looks up what was compiled for another."""
    compiled: list[object] = []

    def counts(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    original = loading.PRESETS[model](None).model  # type: ignore[arg-type]
    many = [Steps(copy_sharing_tensors(original), original.device, {"backend": counts}) for _ in range(10)]
    for _ in range(2):
        for steps in many:
            steps.forward(4)
    assert len(compiled) == len(many)  # beyond torch.compile's limit of 8 for one function
