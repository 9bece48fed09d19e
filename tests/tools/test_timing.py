"""Timing: samples, their statistics, and time limits."""

import math
import random
import time
from collections.abc import Callable

import pytest
import torch

from rmsnorm.tools import timing

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("samples", "expected"),
    [([3.0, 1.0, 2.0], (1.0, 2.0, 1.0, 3.0)), ([5.0, 1.0, 2.0, 4.0, 3.0], (1.0, 3.0, 2.0, 4.0))],
    ids=["extremes of three", "quartiles of five"],
)
def test_a_summary_has_the_quartiles_or_the_extremes(samples: list[float], expected: tuple[float, ...]) -> None:
    summary = timing.summarize(samples, repeats=4)
    assert (summary.minimum, summary.median, summary.low, summary.high) == expected
    assert summary.calls == 4 * len(samples)


def test_calls_are_timed_in_a_shuffled_order() -> None:
    log: list[str] = []

    def busy(name: str) -> None:
        log.append(name)
        sum(range(20_000))  # longer than the shortest sample, so that one call is one sample

    timings = timing.interleave({n: lambda n=n: busy(n) for n in "abc"}, CPU, samples=30)  # type: ignore[misc]
    assert {name: t.calls for name, t in timings.items()} == dict.fromkeys("abc", 30)
    assert all(0 < t.minimum <= t.low <= t.median <= t.high for t in timings.values())
    rounds = ["".join(log[-90:][i : i + 3]) for i in range(0, 90, 3)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) > 3


def test_a_slow_call_gets_the_fewest_samples_under_a_time_limit() -> None:
    calls = {"slow": lambda: time.sleep(0.01), "fast": lambda: time.sleep(0)}
    timings = timing.interleave(calls, CPU, samples=20, fewest=3, seconds=1e-3)
    assert timings["slow"].calls == 3
    assert timings["fast"].calls > timings["slow"].calls


class Clock:
    """A clock that only calls advance."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def takes(self, *seconds: float) -> Callable[[], None]:
        """Return a call that takes these seconds, one after the other, and then always the last of them."""
        left = list(seconds)

        def call() -> None:
            self.seconds += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "now", clock)
    return clock


def test_calls_that_get_slower_do_not_exceed_the_time_limit(clock: Clock) -> None:
    """The first three calls take a millisecond, all others a second."""
    calls = {name: clock.takes(1e-3, 1e-3, 1e-3, 1.0) for name in "ab"}
    timings = timing.interleave(calls, CPU, samples=1000, fewest=3, seconds=2.0)
    assert {t.calls for t in timings.values()} <= {2, 3}
    assert sum(t.calls for t in timings.values()) <= 6
    assert clock.seconds < 7
    steady = timing.interleave({"a": clock.takes(1e-3)}, CPU, samples=1000, fewest=3, seconds=2.0)
    assert steady["a"].calls == 1000


@pytest.mark.parametrize(
    ("n", "k", "outside"), [(6, 1, 2), (7, 1, 2), (8, 1, 2), (9, 2, 20), (12, 3, 158), (20, 6, 43400)]
)
def test_the_interval_of_a_median_is_that_of_the_sign_test(n: int, k: int, outside: int) -> None:
    """The k-th smallest and largest samples bound it, as in tables of the sign test for 95 %.

    Of the 2**n equally likely ways in which n samples lie above or below the median, `outside` are missed.
    """
    samples = [float(i * i) for i in range(n)]
    random.Random(1).shuffle(samples)
    found = timing.median_interval(samples)
    assert found == timing.Interval((k - 1.0) ** 2, (n - k + 0.0) ** 2, 1 - outside / 2**n)


def test_too_few_samples_have_no_interval() -> None:
    assert timing.median_interval([1.0] * 5) is None
    assert timing.median_interval([]) is None
    assert timing.median_interval([1.0, 2.0, 3.0, 4.0, 5.0], confidence=0.9) is not None
    assert timing.median_interval([1.0] * 7, confidence=0.99) is None


def test_the_interval_covers_the_median_with_its_stated_probability() -> None:
    """For a distribution without a mean, so that only the order of the samples is meaningful."""
    draw = random.Random(0)
    tried, inside = 4000, 0
    for _ in range(tried):
        found = timing.median_interval([math.tan(math.pi * (draw.random() - 0.5)) for _ in range(9)])
        assert found is not None
        inside += found.low <= 0.0 <= found.high
    assert inside / tried == pytest.approx(1 - 20 / 512, abs=0.012)  # four standard deviations


def test_rounds_have_one_sample_of_every_call(clock: Clock) -> None:
    calls = {name: clock.takes(seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    taken = timing.sample_rounds(calls, CPU, fewest=3, most=100, seconds=70.0)
    assert taken == {"a": [1.0] * 10, "b": [2.0] * 10, "c": [4.0] * 10}
    few = timing.sample_rounds(calls, CPU, fewest=3, most=100, seconds=1.0)
    assert [len(samples) for samples in few.values()] == [3, 3, 3]
    most = timing.sample_rounds(calls, CPU, fewest=3, most=5, seconds=1e6)
    assert [len(samples) for samples in most.values()] == [5, 5, 5]


def test_the_order_within_rounds_changes() -> None:
    log: list[str] = []

    def busy(name: str) -> None:
        log.append(name)
        time.sleep(2e-4)  # longer than the shortest sample, so that one call is one sample

    calls: dict[str, Callable[[], None]] = {name: lambda name=name: busy(name) for name in "abc"}  # type: ignore[misc]
    timing.sample_rounds(calls, CPU, fewest=20, most=20, seconds=0.0)
    rounds = {"".join(log[-60:][i : i + 3]) for i in range(0, 60, 3)}
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(rounds) > 3
