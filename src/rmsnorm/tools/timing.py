"""Measures times: interleaved samples, their quartiles, confidence intervals, fitted lines; and reports progress."""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Called with the number of steps that are done, the number of all steps, and what comes next.
Progress = Callable[[int, int, str], None]
# Seconds. Every time and every limit is read from this clock, so that a test can replace it.
now = time.perf_counter

# On a CPU, reading the clock dominates a shorter sample than this, so short calls are timed several in a row.
_SHORTEST_SAMPLE = 100e-6
_SHORTEST_SAMPLE_OF_BOTH = 2e-3  # of host and GPU: much longer than a synchronization
_MOST_REPEATS = 200
_FEWEST_FOR_QUARTILES = 5


def no_progress(done: int, total: int, what: str) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Timing:
    """Seconds for one call.

    Attributes:
        calls: How many calls were timed.
        minimum: The shortest sample.
        median: The median of the samples.
        low: The lower quartile of the samples; the shortest of fewer than five.
        high: The upper quartile of the samples; the longest of fewer than five.
    """

    calls: int
    minimum: float
    median: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures in microseconds, to the nanosecond."""
        return {
            "calls": self.calls,
            "min_us": round(self.minimum * 1e6, 3),
            "median_us": round(self.median * 1e6, 3),
            "low_us": round(self.low * 1e6, 3),
            "high_us": round(self.high * 1e6, 3),
        }


def summarize(samples: list[float], repeats: int = 1) -> Timing:
    """Summarize samples in seconds, each the mean of `repeats` calls."""
    low, high = min(samples), max(samples)
    if len(samples) >= _FEWEST_FOR_QUARTILES:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(len(samples) * repeats, min(samples), statistics.median(samples), low, high)


def undisturbed(timing: Timing, device: torch.device) -> float:
    """Return the minimum on a CPU, where other processes only make calls longer, and the median on a GPU."""
    return timing.minimum if device.type == "cpu" else timing.median


@dataclass(frozen=True)
class Interval:
    """A confidence interval: it contains the median of the sampled distribution with probability `coverage`."""

    low: float
    high: float
    coverage: float


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Return the order-statistic (sign-test) confidence interval of a median.

    It is exact for independent samples of any continuous distribution: the k-th smallest and the k-th largest sample
    enclose the median unless fewer than k samples fall on one side of it, and that number is binomially distributed.

    Args:
        samples: At least 6 for a confidence of 0.95.
        confidence: The lowest acceptable probability that the interval contains the median.

    Returns:
        The interval between the k-th smallest and the k-th largest sample, for the largest k that gives at least
        this confidence. None if there are too few samples for any k.

    Example:
        >>> median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 7.0, 90.0])
        Interval(low=1.0, high=90.0, coverage=0.984375)
    """
    ordered, n = sorted(samples), len(samples)
    found, outside = None, 0.0
    for k in range(n // 2):
        outside += 2 * math.comb(n, k) / 2**n
        if 1 - outside < confidence:
            break
        found = Interval(ordered[k], ordered[n - 1 - k], 1 - outside)
    return found


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    samples: int = 100,
    fewest: int = 5,
    seconds: float | None = None,
    with_host: bool = False,
) -> dict[str, Timing]:
    """Time the calls in turn, shuffled in every round, so that slow phases of the machine affect all alike.

    On a GPU a sample is one call between two events, after the L2 cache was overwritten. On a CPU it is as many calls
    in a row as take a tenth of a millisecond.

    Args:
        calls: What to time, by name.
        device: Where it runs.
        samples: How many samples each call gets.
        fewest: How many samples each call gets at least, even if the time limit is exceeded.
        seconds: The time limit for each call. It gets as many samples as are expected to fit, or fewer if they take
            longer than expected.
        with_host: Whether a sample on a GPU is many calls in a row, until both the host and the GPU have finished. A
            step of a model waits for the slower of the two.

    Returns:
        The seconds for one call, by name.
    """
    stopwatch, shortest = _stopwatch(device, with_host)
    repeats, counts = {}, {}
    for name, call in calls.items():
        probe, repeats[name] = _probe(call, stopwatch, shortest)
        affordable = samples if seconds is None else int(seconds / (probe * repeats[name]))
        counts[name] = max(min(fewest, samples), min(samples, affordable))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    rounds = max(counts.values())
    start = now()
    for i in range(rounds):
        spent = seconds is not None and now() - start > seconds * len(calls)
        if spent and all(len(taken[name]) >= min(fewest, count) for name, count in counts.items()):
            break
        due = [name for name, count in counts.items() if i * count // rounds != (i + 1) * count // rounds]
        order.shuffle(due)
        for name in due:
            taken[name].append(stopwatch(calls[name], repeats[name]))
    return {name: summarize(times, repeats[name]) for name, times in taken.items()}


def sample_rounds(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, fewest: int, most: int, seconds: float
) -> dict[str, list[float]]:
    """Time every call once in every round, in a shuffled order, so that samples of one round can be compared in pairs.

    A sample lasts until both the host and the GPU have finished, and is several calls in a row if they are short.

    Args:
        calls: What to time, by name.
        device: Where it runs.
        fewest: The least number of rounds, even if they take longer than `seconds`.
        most: The largest number of rounds.
        seconds: The time limit for all rounds together.

    Returns:
        The seconds for one call, by name: a list with one sample a round.
    """
    stopwatch, shortest = _stopwatch(device, with_host=True)
    repeats = {name: _probe(call, stopwatch, shortest)[1] for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, names = random.Random(0), list(calls)
    start, longest = now(), 0.0
    for i in range(most):
        began = now()
        if i >= fewest and began - start + longest > seconds:
            break
        order.shuffle(names)
        for name in names:
            taken[name].append(stopwatch(calls[name], repeats[name]))
        longest = max(longest, now() - began)
    return taken


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fit the line a + b·x to points by least squares of the relative errors: it minimizes Σ((a + b·x - t) / t)².

    With absolute errors the largest times alone would decide.

    Args:
        points: (x, t) with at least two different x.

    Returns:
        (a, b).
    """
    uu = sum((1 / t) ** 2 for _, t in points)
    uv = sum(x / t**2 for x, t in points)
    vv = sum((x / t) ** 2 for x, t in points)
    u, v = sum(1 / t for _, t in points), sum(x / t for x, t in points)
    determinant = uu * vv - uv * uv
    return (u * vv - v * uv) / determinant, (v * uu - u * uv) / determinant


_Stopwatch = Callable[[Callable[[], object], int], float]


def _stopwatch(device: torch.device, with_host: bool) -> tuple[_Stopwatch, float]:
    """Return a function that times a number of calls in a row, and the least duration of a sample."""
    if device.type != "cuda":
        return _cpu_stopwatch, _SHORTEST_SAMPLE
    if with_host:
        return _stopwatch_of_both(device), _SHORTEST_SAMPLE_OF_BOTH
    return _cuda_stopwatch(device), 0.0


def _probe(call: Callable[[], object], stopwatch: _Stopwatch, shortest: float) -> tuple[float, int]:
    """Return about how many seconds a call takes, and how many calls in a row make a sample."""
    stopwatch(call, 1)
    probe = max(min(stopwatch(call, 1) for _ in range(2)), 1e-9)
    return probe, max(1, min(_MOST_REPEATS, int(shortest / probe)))


def _cpu_stopwatch(call: Callable[[], object], repeats: int) -> float:
    start = now()
    for _ in range(repeats):
        call()
    return (now() - start) / repeats


def _stopwatch_of_both(device: torch.device) -> _Stopwatch:
    def sample(call: Callable[[], object], repeats: int) -> float:
        torch.cuda.synchronize(device)
        start = now()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize(device)
        return (now() - start) / repeats

    return sample


def _cuda_stopwatch(device: torch.device) -> _Stopwatch:
    # Four times the size of the L2 cache, overwritten eight times: that also gives the host time to queue the call.
    size = 4 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    scratch = torch.empty(max(size, 1 << 20), dtype=torch.uint8, device=device)

    def sample(call: Callable[[], object], repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(8):
            scratch.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return sample
