"""How a figure is taken: interleaved times, bytes saved for backward, differing outputs, a file written whole."""

import contextlib
import json
import math
import multiprocessing
import os
import random
import signal
import stat
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmsnorm import machine
from rmsnorm.errors import CommandError, one_line

# (how many steps are done, of how many, what comes next)
Progress = Callable[[int, int, str], None]
now = time.perf_counter  # seconds; every time and every limit is taken from it, so that a test can set it

# A shorter sample than this on a CPU is mostly the clock, so short calls are timed several in a row.
_SHORTEST_SAMPLE = 100e-6
_SHORTEST_SAMPLE_OF_BOTH = 2e-3  # of host and GPU: much longer than it takes to wait for the GPU
_MOST_REPEATS = 200
_FEWEST_FOR_QUARTILES = 5
# More than a command writes: whether so much fits is tried before the work.
_LARGEST_RESULT = 1 << 18


@dataclass(frozen=True)
class Timing:
    """Seconds a call. low and high: the quartiles of the samples, or, of fewer than five, the extremes."""

    calls: int
    minimum: float
    median: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "min_us": round(self.minimum * 1e6, 3),
            "median_us": round(self.median * 1e6, 3),
            "low_us": round(self.low * 1e6, 3),
            "high_us": round(self.high * 1e6, 3),
        }


def summarize(samples: list[float], repeats: int = 1) -> Timing:
    """The figures of samples in seconds, each the mean of `repeats` calls."""
    low, high = min(samples), max(samples)
    if len(samples) >= _FEWEST_FOR_QUARTILES:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(len(samples) * repeats, min(samples), statistics.median(samples), low, high)


@dataclass(frozen=True)
class Interval:
    """Contains the median of the distribution that the samples came from, with a probability of `coverage` or more."""

    low: float
    high: float
    coverage: float


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """The order-statistic (sign-test) confidence interval of a median.

    It is exact for independent samples of any continuous distribution: the k-th smallest and the k-th largest sample
    enclose the median unless fewer than k samples fall on one side of it, and the number that do is binomial.

    Args:
        samples: At least 6 for a confidence of 0.95.
        confidence: The least probability with which it is to contain the median.

    Returns:
        The interval between the k-th smallest and the k-th largest sample, for the largest k that is confident
        enough. None if there are too few samples for any.

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
    """Time the calls in turn, in an order shuffled every round, so that none has the machine's better moments.

    On a GPU a sample is one call between two events after the L2 cache was overwritten; on a CPU it is as many calls
    in a row as fill a tenth of a millisecond.

    Args:
        calls: What to time, by name.
        device: Where it runs.
        samples: How many samples each gets.
        fewest: How many each gets even if `seconds` are over.
        seconds: For each of the calls: it gets as many samples as are expected to fit, and fewer if they take longer.
        with_host: On a GPU, time many calls in a row until the host and the GPU are through with them. A step of a
            model waits for whichever of the two is slower.

    Returns:
        The seconds a call, by name.
    """
    on_gpu = device.type == "cuda"
    stopwatch: Callable[[Callable[[], object], int], float]
    if not on_gpu:
        stopwatch, shortest = _cpu_stopwatch, _SHORTEST_SAMPLE
    elif with_host:
        stopwatch, shortest = _stopwatch_of_both(device), _SHORTEST_SAMPLE_OF_BOTH
    else:
        stopwatch, shortest = _cuda_stopwatch(device), 0.0
    repeats, counts = {}, {}
    for name, call in calls.items():
        stopwatch(call, 1)
        probe = max(min(stopwatch(call, 1) for _ in range(2)), 1e-9)
        repeats[name] = max(1, min(_MOST_REPEATS, int(shortest / probe)))
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


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of the line a + b·x that minimizes Σ((a + b·x - t) / t)², from (x, t) of at least two different x.

    The errors are relative, or the largest sizes alone would decide.
    """
    uu = sum((1 / t) ** 2 for _, t in points)
    uv = sum(x / t**2 for x, t in points)
    vv = sum((x / t) ** 2 for x, t in points)
    u, v = sum(1 / t for _, t in points), sum(x / t for x, t in points)
    determinant = uu * vv - uv * uv
    return (u * vv - v * uv) / determinant, (v * uu - u * uv) / determinant


def _cpu_stopwatch(call: Callable[[], object], repeats: int) -> float:
    start = now()
    for _ in range(repeats):
        call()
    return (now() - start) / repeats


def _stopwatch_of_both(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    def sample(call: Callable[[], object], repeats: int) -> float:
        torch.cuda.synchronize(device)
        start = now()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize(device)
        return (now() - start) / repeats

    return sample


def _cuda_stopwatch(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    # Four times the L2 cache, eight times over: also long enough for the host to queue the call meanwhile.
    size = 4 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    wash = torch.empty(max(size, 1 << 20), dtype=torch.uint8, device=device)

    def sample(call: Callable[[], object], repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(8):
            wash.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return sample


def side_by_side(work: Callable[..., object], shares: Iterable[Any], *others: Any) -> None:
    """Have new processes call `work(share, *others)` for each share, for what they leave on disk: compiled kernels.

    There torch has one thread. What goes wrong there goes wrong again where it is seen, so here it is passed over.
    """
    workers = min(machine.cores(), 16)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_as_a_worker) as pool:
        try:
            for done in [pool.submit(work, share, *others) for share in shares]:
                with contextlib.suppress(Exception):
                    done.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _as_a_worker() -> None:
    torch.set_num_threads(1)
    end_silently_on_ctrl_c()


def end_silently_on_ctrl_c() -> None:
    """For a process that another one started: the terminal interrupts both, and only the first is to say so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def saved_for_backward(besides: Iterable[Tensor] = ()) -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd saves inside, by unique storage, without those of `besides` (the weights).

    The function it gives says how many so far; ask while the graph is alive, as a freed address may come again.
    """
    known = {t.untyped_storage().data_ptr() for t in besides}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # an output that held itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield lambda: sum(storages.values())


def differing(a: Tensor, b: Tensor) -> tuple[int, int]:
    """(how many elements differ in their bits, by how many ulp at most); two NaN are equal, +0 and -0 one apart.

    a, b: of one shape and of one floating dtype. Raises ValueError if they are not.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"{tuple(a.shape)} {a.dtype} cannot be compared with {tuple(b.shape)} {b.dtype}")
    if a.numel() == 0:
        return 0, 0
    steps = (_ordered(a) - _ordered(b)).abs().masked_fill_(a.isnan() & b.isnan(), 0)
    return int(steps.count_nonzero()), int(steps.max())


def _ordered(t: Tensor) -> Tensor:
    """The floats as integers in the same order, a step an ulp."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    bits = t.detach().contiguous().view(integer).long()
    lowest = -(1 << (8 * t.element_size() - 1))
    return torch.where(bits < 0, lowest - bits - 1, bits)


def check_folder(out: Path, argument: str = "--out") -> None:
    """Raise CommandError, before any work is done for it, unless a file could be written into `out`.

    Writes a nameless file where `out` is or would be made, since permissions say nothing of a full disk.
    """
    existing = out
    try:
        while not existing.exists() and not existing.is_symlink() and existing != existing.parent:
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(_LARGEST_RESULT))
    except (OSError, ValueError) as error:
        advice = f"give {argument} a folder that can be written to"
        raise CommandError(f"nothing can be written into {out} ({one_line(error)}): {advice}") from None


def check_file(path: Path, argument: str) -> int | None:
    """Raise CommandError, before any work is done for it, unless `write_output` could write the file.

    Returns the handle of a pipe or a device, None for a file: a pipe that is closed and opened again is two to who
    reads it.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except OSError as error:
        raise CommandError(f"{argument} {path} cannot be written: {one_line(error)}") from None
    if stat.S_ISDIR(mode) or stat.S_ISBLK(mode):
        raise CommandError(f"{argument} {path} is a folder or a disk, expected a file")
    if stat.S_ISREG(mode):
        check_folder((Path(os.path.realpath(path)) if path.is_symlink() else path.absolute()).parent, argument)
        return None
    try:
        handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe without a reader is an error
        os.set_blocking(handle, True)
        if stat.S_ISCHR(mode) and not os.isatty(handle):
            os.write(handle, b"\n")  # which changes no JSON document; /dev/full refuses it
    except OSError as error:
        raise CommandError(f"{argument} {path} cannot be written: {one_line(error)}") from None
    return handle


def check_apart(one: tuple[str, Path], other: tuple[str, Path]) -> None:
    """Raise CommandError if two results would be one file, or one's file would be where the other needs a folder.

    Args:
        one: The name of an argument, and the file that is written for it.
        other: The same of another argument.
    """
    for (argument, file), (second, its_file) in ((one, other), (other, one)):
        here, there = (Path(os.path.realpath(path)) for path in (file, its_file))
        if here == there:
            raise CommandError(f"{argument} and {second} both write {file}: give them different names")
        if here in there.parents:
            raise CommandError(
                f"{argument} writes the file {file}, which {second} needs as a folder: give another name"
            )


def write_output(path: Path, content: bytes, argument: str, handle: int | None) -> None:
    """Write what `check_file` was asked about, and gave the handle of. Raises CommandError if it cannot be written."""
    if handle is None:
        write_whole(Path(os.path.realpath(path)), content)  # a link stays one
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    except OSError as error:
        raise CommandError(f"{argument} {path} cannot be written: {one_line(error)}") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write it as a whole file or not at all. Raises ValueError for NaN and infinities, which JSON has not."""
    write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write the whole file or none of it: into a file beside it, and then under its name.

    Raises CommandError if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".rmsnorm-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {one_line(error)}") from None
