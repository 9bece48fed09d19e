"""Draws `rmsnorm bench --plot FILE`: each provider's speed relative to a copy, over N or M, from the JSON of a run."""

import io
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rmsnorm.errors import CommandError, missing_extra
from rmsnorm.tools import results
from rmsnorm.tools.bench.cases import MODES

_FORMATS = (".svg", ".png")
_FEWEST_POINTS = 3
_FEWEST_ELEMENTS = 1 << 25  # with fewer, even a copy does not reach the bandwidth
# A provider with more 16-bit outputs than this that differ from the Definition's rounds at another place: that changes
# more than 1 % of them, while eager's own sum changes at most `verify.bounds.EAGER_SHARE`. In fp32 there is no other
# place to round, and eager's sum changes a third of the outputs.
_ROUNDS_ELSEWHERE = 1e-3


def check(path: Path) -> None:
    """Check that a drawing could be written.

    Args:
        path: The file.

    Raises:
        CommandError: If the format is unknown, matplotlib is missing, or the file cannot be written.
    """
    if path.suffix not in _FORMATS:
        raise CommandError(f"--plot {path}: give a file that ends in {' or '.join(_FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise missing_extra("--plot", "matplotlib", "plot") from None
    handle = results.check_file(path, "--plot")
    if handle is not None:
        os.close(handle)
        raise CommandError(f"--plot {path} is a pipe or a device, expected a file")


@dataclass(frozen=True)
class Panel:
    """The cases of one mode and dtype that are drawn.

    Attributes:
        mode: The slug of the mode.
        dtype: "bfloat16", "float32" or "float16".
        axis: What the horizontal axis shows: the width N, of cases of any number of rows, or the number of rows M, of
            cases of one width.
        cases: The cases as in the JSON of a run, in the order of the axis.
    """

    mode: str
    dtype: str
    axis: Literal["M", "N"]
    cases: tuple[dict[str, Any], ...]

    @property
    def title(self) -> str:
        """What stands above it: "forward, bfloat16"; over M also the width, "forward, bfloat16, N = 1280"."""
        return f"{MODES[self.mode].title}, {self.dtype}" + (f", N = {self.cases[0]['N']}" if self.axis == "M" else "")


def panels(cases: Iterable[dict[str, Any]]) -> list[Panel]:
    """Group the cases that are drawn: over N those with enough elements, or if there are too few widths, over M.

    Args:
        cases: Cases as in the JSON of a run, with at least M, N, dtype and mode.

    Returns:
        A panel for each mode and dtype that is drawn.

    Raises:
        CommandError: If there are none.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for case in cases:
        groups[case["mode"], case["dtype"]].append(case)
    drawn = _over_widths(groups) or _over_rows(groups)
    if not drawn:
        raise CommandError(
            f"--plot: no mode and dtype has {_FEWEST_POINTS} widths N with M x N of 2**25 and up, "
            f"or {_FEWEST_POINTS} numbers of rows M of one width"
        )
    return drawn


def _over_widths(groups: dict[tuple[str, str], list[dict[str, Any]]]) -> list[Panel]:
    drawn = []
    for (mode, dtype), group in groups.items():
        large = [case for case in group if case["M"] * case["N"] >= _FEWEST_ELEMENTS]
        if len({case["N"] for case in large}) >= _FEWEST_POINTS:
            drawn.append(Panel(mode, dtype, "N", tuple(sorted(large, key=lambda case: (case["N"], case["M"])))))
    return drawn


def _over_rows(groups: dict[tuple[str, str], list[dict[str, Any]]]) -> list[Panel]:
    """For each group the width with the most cases, the smallest of several such widths."""
    drawn = []
    for (mode, dtype), group in groups.items():
        rows: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
        for case in sorted(group, key=lambda case: (case["N"], case["M"])):
            rows[case["N"]][case["M"]] = case
        most = max(rows.values(), key=len)
        if len(most) >= _FEWEST_POINTS:
            drawn.append(Panel(mode, dtype, "M", tuple(most.values())))
    return drawn


def others(cases: Iterable[dict[str, Any]]) -> set[str]:
    """Return the providers that compute another function than the Definition, or that round at another place."""
    return {
        name
        for case in cases
        for name, provider in case["providers"].items()
        if name != "copy" and "no_time" not in provider
        if (differs := provider["differs_from_definition"]) is None
        or (case["dtype"] != "float32" and differs > _ROUNDS_ELSEWHERE)
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw share_of_copy over N or M, a panel for each mode and dtype. The same result gives the same bytes of SVG.

    Args:
        result: The JSON of a run.
        path: A .svg or .png file.

    Raises:
        CommandError: If there is no panel to draw, or the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    chosen = panels(result["cases"])
    drawn = [case for panel in chosen for case in panel.cases]
    names = [name for name in dict.fromkeys(name for case in drawn for name in case["providers"]) if name != "copy"]
    dashed = others(drawn)
    columns = min(2, len(chosen))
    rows = -(-len(chosen) // columns)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.hashsalt"] = "rmsnorm"
        figure = Figure(figsize=(5.5 * columns, 3.2 * rows + 0.8), layout="constrained")
        lines: dict[str, Any] = {}
        for i, panel in enumerate(chosen):
            axes = figure.add_subplot(rows, columns, i + 1)
            axes.axhline(1.0, color="black", linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.set(title=panel.title, xlabel=panel.axis, ylabel="time of a copy / time")
            for number, name in enumerate(names):
                shares = [
                    (case[panel.axis], case["providers"].get(name, {}).get("share_of_copy")) for case in panel.cases
                ]
                points = [point for point in shares if point[1] is not None]
                if not points:
                    continue
                label = f"{name} (not the Definition)" if name in dashed else name
                lines[label] = axes.plot(
                    *zip(*points, strict=True),
                    label=label,
                    color=f"C{number}",
                    linestyle="--" if name in dashed else "-",
                    linewidth=3 if name == "ours" else 1.2,
                    marker="o",
                    markersize=3,
                    zorder=3 if name == "ours" else 2,
                )[0]
            axes.set_ylim(bottom=0)
        figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4, fontsize="small")
        file = io.BytesIO()
        kind = path.suffix.removeprefix(".")
        figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
    results.write_output(path, file.getvalue(), "--plot", None)
