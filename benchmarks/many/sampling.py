"""Times that all ranks agree on: each sample is that of the slowest rank, and all ranks make the same calls."""

import random
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from rmsnorm.tools import timing
from rmsnorm.tools.processes import Rank

_SHORTEST_SAMPLE = 2e-3  # seconds: much longer than a synchronization
_MOST_REPEATS = 50


def sample_rounds(calls: Mapping[str, Callable[[], object]], rank: Rank, rounds: int) -> dict[str, list[float]]:
    """Time every call once in every round, in a shuffled order that is the same on all ranks.

    A sample begins when all ranks are ready, and lasts until both the host and the GPU have finished. It is several
    calls in a row if they are short.

    Args:
        calls: What to time, by name; the same names on every rank.
        rank: This rank.
        rounds: The number of samples of each call.

    Returns:
        The seconds for one call, by name: for each round the time of the slowest rank.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(2):
            call()
        (probe,) = _slowest([_seconds(call, 1, rank)], rank)
        repeats[name] = max(1, min(_MOST_REPEATS, int(_SHORTEST_SAMPLE / max(probe, 1e-9))))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, names = random.Random(0), list(calls)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            taken[name].append(_seconds(calls[name], repeats[name], rank) / repeats[name])
    return {name: _slowest(seconds, rank) for name, seconds in taken.items()}


def _seconds(call: Callable[[], object], repeats: int, rank: Rank) -> float:
    dist.all_reduce(torch.zeros(1, device=rank.device))  # all ranks are ready
    _wait(rank.device)
    start = timing.now()
    for _ in range(repeats):
        call()
    _wait(rank.device)
    return timing.now() - start


def _slowest(seconds: list[float], rank: Rank) -> list[float]:
    times = torch.tensor(seconds, dtype=torch.float64, device=rank.device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.tolist()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
