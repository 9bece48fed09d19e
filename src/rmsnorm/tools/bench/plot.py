"""Draws `rmsnorm bench --plot FILE`: each provider's speed relative to a copy, over N, from the JSON of a run."""

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rmsnorm.errors import CommandError
from rmsnorm.tools import results
from rmsnorm.tools.bench.cases import MODES

_FORMATS = (".svg", ".png")
_FEWEST_WIDTHS = 3
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
        raise CommandError("--plot needs matplotlib: pip install matplotlib") from None
    handle = results.check_file(path, "--plot")
    if handle is not None:
        os.close(handle)
        raise CommandError(f"--plot {path} is a pipe or a device, expected a file")


def panels(cases: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Group the cases that are drawn.

    Args:
        cases: Cases as in the JSON of a run, with at least M, N, dtype and mode.

    Returns:
        For each (mode, dtype) that is drawn its cases, in the order of N.

    Raises:
        CommandError: If there are none.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in cases:
        if case["M"] * case["N"] >= _FEWEST_ELEMENTS:
            found.setdefault((case["mode"], case["dtype"]), []).append(case)
    drawn = {
        key: sorted(group, key=lambda case: (case["N"], case["M"]))
        for key, group in found.items()
        if len({case["N"] for case in group}) >= _FEWEST_WIDTHS
    }
    if not drawn:
        raise CommandError(
            f"--plot: no mode and dtype has {_FEWEST_WIDTHS} widths N with M x N of 2**25 and up, as a run on a GPU has"
        )
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
    """Draw share_of_copy over N, with a panel for each mode and dtype. The same result gives the same bytes of SVG.

    Args:
        result: The JSON of a run.
        path: A .svg or .png file.

    Raises:
        CommandError: If there is no panel to draw, or the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    groups = panels(result["cases"])
    drawn = [case for group in groups.values() for case in group]
    names = [name for name in dict.fromkeys(name for case in drawn for name in case["providers"]) if name != "copy"]
    dashed = others(drawn)
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.hashsalt"] = "rmsnorm"
        figure = Figure(figsize=(5.5 * columns, 3.2 * rows + 0.8), layout="constrained")
        lines: dict[str, Any] = {}
        for i, ((mode, dtype), group) in enumerate(groups.items()):
            axes = figure.add_subplot(rows, columns, i + 1)
            axes.axhline(1.0, color="black", linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.set(title=f"{MODES[mode].title}, {dtype}", xlabel="N", ylabel="time of a copy / time")
            for number, name in enumerate(names):
                shares = [(case["N"], case["providers"].get(name, {}).get("share_of_copy")) for case in group]
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
