"""The forward pass over many sizes, fitted by time = fixed + bytes / bandwidth."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rmsnorm.tools import display, timing
from rmsnorm.tools.bench.cases import FORWARD, BenchCase, moved_bytes
from rmsnorm.tools.bench.peers import PROVIDERS

WIDTH = 4096
ROWS = tuple((1 << power) // WIDTH for power in range(24, 34))
WITHIN = 0.05  # the line counts as fitting if no time deviates more
_SAMPLES, _FEWEST, _SECONDS = 31, 5, 0.1  # for each size: a few seconds in all


@dataclass(frozen=True)
class FittedLine:
    """The line time = fixed + bytes / bandwidth through measured times.

    Attributes:
        measured: (M, bytes, seconds) of each size.
    """

    measured: tuple[tuple[int, int, float], ...]

    @functools.cached_property
    def fit(self) -> tuple[float, float]:
        """(the fixed seconds, the seconds for one byte)."""
        return timing.fit_line([(moved, seconds) for _, moved, seconds in self.measured])

    @property
    def greatest(self) -> float:
        """The greatest deviation of the line from a time, as a share of that time."""
        return max(abs(self._deviation(moved, seconds)) for _, moved, seconds in self.measured)

    def _deviation(self, moved: int, seconds: float) -> float:
        fixed, per_byte = self.fit
        return (fixed + per_byte * moved) / seconds - 1

    def to_json(self) -> dict[str, Any]:
        """Return the line, its fit, and the sizes."""
        fixed, per_byte = self.fit
        return {
            "fixed_us": fixed * 1e6,
            "gb_per_s": 1e-9 / per_byte,
            "greatest_deviation": self.greatest,
            "within_5_percent": self.greatest <= WITHIN,
            "sizes": [
                {
                    "M": M,
                    "N": WIDTH,
                    "bytes": moved,
                    "median_us": seconds * 1e6,
                    "line_us": (fixed + per_byte * moved) * 1e6,
                    "deviation": self._deviation(moved, seconds),
                }
                for M, moved, seconds in self.measured
            ],
        }

    def summary(self) -> str:
        """Return the line and how well it fits, as a sentence to print."""
        fixed, per_byte = self.fit
        within = "within" if self.greatest <= WITHIN else "not within"
        return (
            f"{display.duration(fixed, digits=3)} + bytes / ({display.speed(1 / per_byte)}), off by "
            f"{display.share(self.greatest, digits=2)} at most: {within} {display.share(WITHIN)}"
        )

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "FittedLine":
        """Return the line that `to_json` describes. Raises KeyError for the JSON of anything else."""
        return cls(tuple((size["M"], size["bytes"], size["median_us"] / 1e6) for size in stored["sizes"]))


def fitting_rows(device: torch.device) -> tuple[int, ...]:
    """Return the numbers of rows for which x, y and a copy of x fit into 80 % of the GPU's free memory."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return tuple(M for M in ROWS if 3 * M * WIDTH * torch.bfloat16.itemsize <= 0.8 * free)


def measure_lines(device: torch.device, rows: tuple[int, ...]) -> dict[str, FittedLine] | None:
    """Time our forward pass and a copy at several sizes, in turn, and fit a line to each.

    Args:
        device: Where they run.
        rows: The numbers of rows, of width WIDTH.

    Returns:
        The lines by name, "ours" and "copy"; None for fewer than three sizes, through which a line always fits well.
    """
    if len(rows) < 3:
        return None
    x = torch.empty(max(rows), WIDTH, dtype=torch.bfloat16, device=device).normal_()
    target, w = torch.empty_like(x), torch.ones(WIDTH, dtype=x.dtype, device=device)
    norm = PROVIDERS[0].norm
    assert norm is not None
    calls: dict[str, Callable[[], object]] = {}
    for M in sorted(rows, reverse=True):  # the largest first: the others then reuse its memory
        calls[f"ours {M}"] = functools.partial(norm, x[:M], w)
        calls[f"copy {M}"] = functools.partial(target[:M].copy_, x[:M])
    timings = timing.interleave(calls, device, samples=_SAMPLES, fewest=_FEWEST, seconds=_SECONDS)
    moved = {M: moved_bytes(BenchCase(M, WIDTH, x.dtype, FORWARD)) for M in rows}
    return {
        name: FittedLine(tuple((M, moved[M], timings[f"{name} {M}"].median) for M in rows)) for name in ("ours", "copy")
    }
