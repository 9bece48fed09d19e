"""What the report concludes from the times: outcomes of steps, sums over norms, outliers."""

from pathlib import Path
from typing import Any

import pytest
from report_runs import SMALL, Clock, a_norm, a_step, checkpoint_fixture, clock_fixture, quick_fixture, run_report  # noqa: F401  # fixtures
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rmsnorm.tools import timing
from rmsnorm.tools.models import loading
from rmsnorm.tools.models.loading import Built
from rmsnorm.tools.report.norms import NormKind, Pair, kinds_of, total


@pytest.mark.parametrize(
    ("differences", "outcome", "says"),
    [
        ((0.38, 0.40, 0.41, 0.39, 0.42, 0.43, 0.37), "saved", "400 ms less, 40 % (370 ms to 430 ms)"),
        ((0.38, 0.40, -0.01, 0.39, 0.42, 0.43, 0.37), "noise", "noise: -10 ms to 430 ms"),
        ((0.90, 0.95, 0.98, 0.99, 0.96, 0.97, 0.94), "saved", "960 ms less, 96 % (900 ms to 990 ms)"),
        ((1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.07), "noise", "noise: 1.04 s less, but the norms can save at most 1 s"),
        ((-0.1, -0.2, -0.1, -0.3, -0.1, -0.1, -0.2), "slower", "100 ms more (100 ms to 300 ms)"),
        ((0.40,) * 6, "too few pairs", "unknown: 6 pairs, at least 7 are needed"),
        ((0.0,) * 7, "noise", "noise: 0 s to 0 s"),
    ],
    ids=[
        "saved",
        "both signs",
        "all that the norms take in a model",
        "more than the norms take",
        "slower",
        "too few",
        "nothing",
    ],
)
def test_the_outcome_of_a_step(differences: tuple[float, ...], outcome: str, says: str) -> None:
    found = a_step(*differences)
    assert (found.outcome, found.summary()) == (outcome, says)
    assert found.to_json()["outcome"] == outcome
    assert (found.to_json()["interval"] is None) == (outcome == "too few pairs")


def test_one_disturbed_pair_changes_neither_the_difference_nor_the_interval() -> None:
    quiet = [0.30 + 0.01 * i for i in range(12)]
    calm, disturbed = a_step(*quiet), a_step(*quiet[:-1], 90.0)
    assert disturbed.difference == calm.difference
    assert calm.interval is not None
    assert disturbed.interval is not None
    assert (disturbed.interval.low, disturbed.interval.high) == (calm.interval.low, calm.interval.high)
    assert disturbed.outcome == "saved"


def test_the_json_names_the_method_of_the_interval() -> None:
    interval = a_step(*(0.1 * i for i in range(1, 8))).to_json()["interval"]
    assert interval["method"] == "order statistics (sign test)"
    assert (interval["low_us"], interval["high_us"]) == (pytest.approx(1e5), pytest.approx(7e5))
    assert interval["coverage"] == 1 - 2 / 2**7


def test_outliers_are_not_summed_and_untimed_norms_count_as_their_kind() -> None:
    usual = {"forward": Pair(189e-6, 20e-6)}
    norms = (
        a_norm("0", usual),
        a_norm("1", {"forward": Pair(115_806e-6, 20e-6)}, outlier=True),
        a_norm("2", {}),
        a_norm("3", usual, width=32),
    )
    assert [len(kind.norms) for kind in kinds_of(norms)] == [3, 1]
    assert total(norms, "forward") == Pair(pytest.approx(4 * 189e-6), pytest.approx(4 * 20e-6))
    assert NormKind(norms[:2]).time("forward") == Pair(pytest.approx(2 * 189e-6), pytest.approx(2 * 20e-6))
    assert total(norms, "training") is None
    assert total((*norms, a_norm("4", {}, width=16)), "forward") is None  # no norm of its kind was timed
    assert total((), "forward") is None


@pytest.mark.parametrize("disturbed", [0, 3, 8], ids=["first", "middle", "last"])
def test_an_outlier_is_measured_again(
    disturbed: int, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine norms of one kind, one of which is timed while the machine is busy."""
    timed: list[int] = []
    interleave = timing.interleave

    def busy(calls: Any, device: Any, **options: Any) -> Any:
        timed.append(0)
        found = interleave(calls, device, **options)
        if len(timed) - 1 == 3 * disturbed:  # its forward, the first of three
            found["before"] = timing.summarize([0.1])
        return found

    monkeypatch.setattr(timing, "interleave", busy)
    monkeypatch.setitem(loading.PRESETS, "small", lambda device: Built(llama_of_four(), None, ()))
    result = run_report("small", tmp_path)
    assert [n.again for n in result.norms] == [int(i == disturbed) for i in range(9)]
    assert not any(n.outlier for n in result.norms)
    assert max(n.times["forward"].before for n in result.norms) < 0.01
    pair = result.total("forward")
    assert pair is not None
    assert pair.before < 0.01


def llama_of_four() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL | {"num_hidden_layers": 4}))
