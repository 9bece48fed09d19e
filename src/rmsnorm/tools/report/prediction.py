"""Predicts how long our norms take, from the bytes that they move and the speed that this device is known to reach.

    our kernels, counted by `cost`                        -> Work
    a GPU in `hardware.FITTED`, or copies on this machine -> Rate
    Work and Rate                                         -> seconds

Nothing here is fitted to the norms of the report, so the error shows what the formula leaves out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from rmsnorm.costs.counts import Phase, cost
from rmsnorm.spec import DTYPES
from rmsnorm.tools import timing
from rmsnorm.tools.hardware import FITTED, GPUS
from rmsnorm.tools.report.norms import Mode, NormResult

_PHASES: dict[Mode, tuple[Phase, ...]] = {"forward": ("inference",), "training": ("forward", "backward")}
_COUNTED = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES if dtype != torch.float64}
_SMALLEST_COPY, _LARGEST_COPY = 1 << 16, 1 << 30  # bytes read and written
_SAMPLES, _FEWEST = 15, 3


class Work(NamedTuple):
    """What our kernels do in one call: the bytes that they read and write, and how many kernels there are."""

    moved: int
    kernels: int


def work_of(n: NormResult, mode: Mode, device: str) -> Work | None:
    """Count what our kernels do in one call of a norm.

    Args:
        n: The norm.
        mode: "forward" or "training".
        device: "cpu" or "cuda".

    Returns:
        The counts; None for a norm that was not proven or not reached, that has a gate, or whose input is float64.
    """
    spec = n.verdict.spec
    if spec is None or spec.gate is not None or not n.calls or n.width is None or n.dtype not in _COUNTED:
        return None
    weight = None if n.weight_dtype is None else _COUNTED.get(n.weight_dtype)
    if (weight is None) != (n.weight_dtype is None):
        return None
    counts = [
        cost(
            (n.rows // n.calls, n.width), _COUNTED[n.dtype], weight, phase=phase, device=device, cast=spec.cast,
            offset=spec.offset, elementwise_affine=weight is not None,
        )
        for phase in _PHASES[mode]
    ]  # fmt: skip
    return Work(sum(c.moved for c in counts), sum(c.kernels for c in counts))


@dataclass(frozen=True)
class CopyLine:
    """Copies on the device, and the line time = fixed + bytes / speed that is fitted to their times.

    Attributes:
        sizes: For each copy the bytes that it reads and writes together, and its seconds.
    """

    sizes: tuple[tuple[int, float], ...]

    @property
    def fit(self) -> tuple[float, float] | None:
        """The fixed seconds and the bytes per second; None if the times do not grow with the bytes."""
        if len(self.sizes) < 2:
            return None
        fixed, per_byte = timing.fit_line(self.sizes)
        return (max(0.0, fixed), 1 / per_byte) if per_byte > 0 else None

    def seconds(self, moved: float) -> float | None:
        """Return how long a copy that moves so many bytes takes, according to the line."""
        return None if self.fit is None else self.fit[0] + moved / self.fit[1]

    def to_json(self) -> dict[str, Any]:
        """Return everything, in types that `json.dumps` takes."""
        fixed, speed = self.fit or (None, None)
        return {
            "fixed_us": None if fixed is None else fixed * 1e6,
            "gb_per_s": None if speed is None else speed / 1e9,
            "sizes": [{"moved_bytes": moved, "us": seconds * 1e6} for moved, seconds in self.sizes],
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "CopyLine":
        """Return what `to_json` describes. Raises KeyError for the JSON of anything else."""
        return cls(tuple((size["moved_bytes"], size["us"] / 1e6) for size in stored["sizes"]))


def measure_copies(device: torch.device, norms: Iterable[NormResult], seconds: float) -> CopyLine | None:
    """Time copies of the sizes that the norms move.

    Args:
        device: Where they run.
        norms: The norms.
        seconds: The time limit for all copies together.

    Returns:
        The copies, from a small one up to the bytes of the norm that moves most; None if the bytes of no norm are
        known.
    """
    works = [work for n in norms for mode in _PHASES if (work := work_of(n, mode, device.type)) is not None]
    if not works:
        return None
    largest = min(_LARGEST_COPY, max(_SMALLEST_COPY * 4, *(work.moved for work in works)))
    powers = range(_SMALLEST_COPY.bit_length(), largest.bit_length(), 2)
    sizes = [*(1 << power for power in powers if 1 << power < largest), largest]
    source = torch.ones(largest // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = {
        str(size): (lambda half: lambda: target[:half].copy_(source[:half]))(size // 2) for size in dict.fromkeys(sizes)
    }
    timings = timing.interleave(
        calls, device, samples=_SAMPLES, fewest=_FEWEST, seconds=seconds / len(calls)
    )  # fmt: skip
    return CopyLine(tuple((int(name), timing.undisturbed(taken, device)) for name, taken in timings.items()))


@dataclass(frozen=True)
class Rate:
    """What our kernels are expected to reach: seconds = kernels · launch + bytes / (efficiency · bandwidth).

    Attributes:
        name: What `bandwidth` is, in words.
        bandwidth: Bytes per second.
        efficiency: The share of the bandwidth that our kernels are expected to reach.
        launch: The seconds that a kernel takes besides moving its bytes.
        source: Where efficiency and launch come from.
    """

    name: str
    bandwidth: float
    efficiency: float
    launch: float
    source: str

    def seconds(self, work: Work) -> float:
        """Predict how long our kernels take."""
        return work.kernels * self.launch + work.moved / (self.efficiency * self.bandwidth)

    def to_json(self) -> dict[str, Any]:
        """Return everything, in types that `json.dumps` takes."""
        return {
            "bandwidth_of": self.name,
            "bandwidth_gb_per_s": self.bandwidth / 1e9,
            "efficiency": self.efficiency,
            "launch_us": self.launch * 1e6,
            "fitted_to": self.source,
        }


def rate_on(facts: dict[str, Any], copy: CopyLine | None) -> Rate | None:
    """Return what our kernels are expected to reach on the device of a report.

    Args:
        facts: What `machine.describe` returned.
        copy: The copies that were timed on that device, if any.

    Returns:
        For a GPU in `hardware.FITTED` its published bandwidth and the fitted efficiency. For any other device the speed
        of copies in the same run and an efficiency of 1; None without copies.
    """
    fitted = FITTED.get(facts["gpu"]["name"]) if facts["gpu"] else None
    if fitted is not None:
        gpu = GPUS[fitted.gpu]
        return Rate(
            f"the published bandwidth of {gpu.name}", gpu.bandwidth, fitted.efficiency, fitted.launch, fitted.source
        )
    if copy is None or copy.fit is None:
        return None
    fixed, speed = copy.fit
    return Rate("the speed of a copy", speed, 1.0, fixed, "copies in this run")


@dataclass(frozen=True)
class Prediction:
    """Predicted and measured seconds of our norms."""

    predicted: float
    measured: float

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured; None if the measured time is 0."""
        return self.predicted / self.measured - 1 if self.measured else None

    def to_json(self) -> dict[str, Any]:
        """Return the times in microseconds, and the error as a share."""
        return {"predicted_us": self.predicted * 1e6, "measured_us": self.measured * 1e6, "error": self.error}


def predict(norms: Iterable[NormResult], mode: Mode, device: str, rate: Rate | None) -> float | None:
    """Predict the seconds of all calls of some norms; None if there are none, or if one of them is not counted."""
    seconds = 0.0
    known = False
    for n in norms:
        work = work_of(n, mode, device)
        if work is None or rate is None:
            return None
        seconds += n.calls * rate.seconds(work)
        known = True
    return seconds if known else None
