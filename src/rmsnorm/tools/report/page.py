"""Draws report.html: the answer of `rmsnorm report` as a page, in one file that loads nothing.

    ReportResult -> its JSON -> Figures, roofline -> page.html.jinja -> text

Every figure on the page comes from the JSON. The element that shows it names its path there in `data-path`, and its
format, one of `FORMATS`, in `data-as`. The template composes the drawings from SVG and boxes, so no plotting library is
needed. jinja2 is always installed, because torch requires it.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmsnorm.errors import CommandError
from rmsnorm.tools import machine, results
from rmsnorm.tools.display import (
    NOTHING,
    Text,
    count,
    duration,
    factor,
    number,
    printable,
    share,
    signed_share,
    size,
    speed,
)
from rmsnorm.tools.report import printing
from rmsnorm.tools.report.norms import KEYS, WITH_BACKWARD
from rmsnorm.tools.report.result import ReportResult

TEMPLATE = Path(__file__).with_name("page.html.jinja")
LISTED = 120  # if there are more norms, the table lists one of each kind, so that the page stays below 1 MB
_DRAWN = 1000  # if there are more norms, the drawing shows one of each kind

# How a value of the JSON is written on the page.
FORMATS: dict[str, Callable[[Any], str]] = {
    "µs": lambda us: duration(us / 1e6, 3),
    "s": lambda seconds: duration(seconds, 3),
    "bytes": lambda nbytes: size(nbytes, 4),
    "GB/s": lambda gb: speed(gb * 1e9, 3),
    "count": count,
    "whole": lambda value: f"{value:,}",
    "number": lambda value: number(value, digits=4),
    "share": lambda part: share(part, 3),
    "error": signed_share,
    "times": lambda gain: factor(gain, 3),
    "text": str,
}
_BY_NAME = (("_us", "µs"), ("_seconds", "s"), ("seconds", "s"), ("_bytes", "bytes"), ("gb_per_s", "GB/s"), ("us", "µs"))
_BY_LAST = {"gain": "times", "error": "error", "efficiency": "share", "coverage": "share", "eps": "text"}


def at(content: Any, path: str) -> Any:
    """Return the value of a JSON at a path such as "norms/0/forward/before_us"."""
    for key in path.split("/"):
        content = content[int(key)] if isinstance(content, list) else content[key]
    return content


def leaves(content: Any, path: str = "") -> Iterator[str]:
    """Yield the path of every value of a JSON that is neither null nor a list or a dict."""
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from leaves(value, f"{path}/{key}" if path else str(key))
    elif content is not None:
        yield path


class Figures:
    """Takes values from the JSON of a report, and remembers which ones the page has shown.

    Args:
        content: The JSON.
        markup: Makes text that jinja2 does not escape again.
    """

    def __init__(self, content: dict[str, Any], markup: Any) -> None:
        self.content, self._markup = content, markup
        self.shown: set[str] = set()

    def has(self, path: str) -> bool:
        """Return whether the JSON has a value at a path."""
        try:
            return at(self.content, path) is not None
        except (KeyError, IndexError, TypeError):
            return False

    def value(self, path: str) -> Any:
        """Return the value at a path; None without one."""
        return at(self.content, path) if self.has(path) else None

    def __call__(self, path: str, as_: str) -> Any:
        """Return the value at a path as an element of the page; a dash without one."""
        if not self.has(path):
            return NOTHING
        self.shown.add(path)
        text = printable(FORMATS[as_](self.value(path)))
        return self._markup('<data data-path="{}" data-as="{}">{}</data>').format(printable(path), as_, text)

    def guessed(self, path: str) -> Any:
        """Return what a call returns, in the format that the name of the value suggests."""
        last = path.rpartition("/")[2]
        value = self.value(path)
        if isinstance(value, bool | str):
            return self(path, "text")
        named = _BY_LAST.get(last) or next((as_ for end, as_ in _BY_NAME if last.endswith(end)), None)
        if named is None and ("phases_seconds/" in path or "rounds_us/" in path):
            named = "s" if "phases_seconds/" in path else "µs"
        return self(path, named or ("whole" if isinstance(value, int) else "number"))

    def rest(self, skip: Iterable[str]) -> list[str]:
        """Return the paths of all values that the page has not shown yet, but none that begins with one of `skip`."""
        ignored = tuple(skip)
        return [path for path in leaves(self.content) if path not in self.shown and not path.startswith(ignored)]


# --- bars ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """One comparison: a label, and for each of its bars the name, the path of its value, and its length in percent."""

    label: str
    as_: str
    bars: tuple[tuple[str, str, float], ...]
    more: str = ""  # the path of a factor that is written beside the label


def _bar(figures: Figures, label: str, as_: str, named: Iterable[tuple[str, str]], more: str = "") -> Bar | None:
    present = [(name, path) for name, path in named if figures.has(path)]
    if len(present) < 2:
        return None
    largest = max(float(figures.value(path)) for _, path in present) or 1.0
    bars = tuple((name, path, 100 * float(figures.value(path)) / largest) for name, path in present)
    return Bar(label, as_, bars, more if figures.has(more) else "")


def _time_bars(figures: Figures) -> list[Bar]:
    pairs = (("norms, forward", "sum_forward"), ("norms, forward + backward", "sum_forward_backward"),
             ("norms, one token", "sum_one_token"))  # fmt: skip
    found = [
        _bar(figures, label, "µs", (("own", f"{key}/before_us"), ("ours", f"{key}/after_us")), f"{key}/gain")
        for label, key in pairs
    ]
    how = ", compiled" if figures.has("compiled") else ""
    for label, key in (("forward step", "forward_step"), ("training step", "training_step")):
        medians = [("own", f"{key}/before/median_us"), ("ours", f"{key}/after/median_us")]
        unfused = f"compiled/without_fusion/{key}/after/median_us"
        found.append(_bar(figures, f"whole model, {label}{how}", "µs", [*medians, ("not fused", unfused)]))
    return [bar for bar in found if bar is not None]


def _memory_bars(figures: Figures) -> list[Bar]:
    keys = (("saved for the backward pass", "saved_for_backward"), ("peak of a training step", "peak_of_training_step"))
    sides = (("own", "before_bytes"), ("ours", "after_bytes"), ("recomputed", "recomputed_bytes"))
    bars = [_bar(figures, label, "bytes", [(name, f"{key}/{side}") for name, side in sides]) for label, key in keys]
    return [bar for bar in bars if bar is not None]


# --- the roofline --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """A norm in one mode with its own class or with ours, at a point of the drawing."""

    x: float
    y: float
    side: str
    mode: str
    norm: int
    words: str


@dataclass(frozen=True)
class Roofline:
    """A drawing of speed over bytes, both on logarithmic scales. Positions are in the units of the SVG.

    Attributes:
        width: The width of the drawing.
        height: The height of the drawing.
        marks: The norms.
        copies: The copies that were measured.
        line: The speed of a copy of any size, as points of a polyline; "" if no copy was measured.
        predicted: The predicted speed of one kernel of ours, likewise.
        roof: The position of the published bandwidth, and its label; None if it is unknown.
        across: The ticks of the bytes: position and label.
        up: The ticks of the speed, likewise.
    """

    width: int
    height: int
    marks: tuple[Mark, ...]
    copies: tuple[tuple[float, float], ...]
    line: str
    predicted: str
    roof: tuple[float, str] | None
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]


LEFT, RIGHT, TOP, BOTTOM = 66, 24, 14, 42  # the margins of the drawing


def roofline(content: dict[str, Any], width: int, height: int) -> Roofline | None:
    """Draw every norm by the bytes that it has to move and the speed at which it moves them.

    Args:
        content: The JSON of a report.
        width: The width of the drawing.
        height: The height of the drawing.

    Returns:
        The drawing; None if the bytes of no timed norm are known.
    """
    points = list(_points(content))
    if not points:
        return None
    copy, rate = content.get("copy"), content.get("prediction")
    copies = [
        (size["moved_bytes"], size["moved_bytes"] / size["us"] * 1e6) for size in (copy or {"sizes": []})["sizes"]
    ]
    published = rate is not None and rate["efficiency"] != 1
    speeds = [s for _, _, s, *_ in points] + [s for _, s in copies]
    speeds += [rate["bandwidth_gb_per_s"] * 1e9] if published and rate is not None else []
    x = _Scale([b for _, b, *_ in points] + [b for b, _ in copies], LEFT, width - RIGHT)
    y = _Scale(speeds, height - BOTTOM, TOP)
    steps = [x.low * (x.high / x.low) ** (i / 48) for i in range(49)]

    def curve(fixed_us: float, bytes_per_second: float) -> str:
        speeds = ((b, b / (fixed_us / 1e6 + b / bytes_per_second)) for b in steps)
        return " ".join(f"{x(b):.1f},{y(s):.1f}" for b, s in speeds if s >= y.low)

    line = curve(copy["fixed_us"], copy["gb_per_s"] * 1e9) if copy and copy["gb_per_s"] is not None else ""
    predicted, roof = "", None
    if published and rate is not None:
        bandwidth = rate["bandwidth_gb_per_s"] * 1e9
        predicted, roof = curve(rate["launch_us"], rate["efficiency"] * bandwidth), (y(bandwidth), speed(bandwidth, 3))
    return Roofline(
        width, height,
        tuple(Mark(round(x(b), 1), round(y(s), 1), side, mode, i, words) for i, b, s, side, mode, words in points),
        tuple((round(x(b), 1), round(y(s), 1)) for b, s in copies), line, predicted, roof,
        tuple((x(b), size(b)) for b in x.ticks(width // 110)), tuple((y(s), speed(s)) for s in y.ticks(height // 45)),
    )  # fmt: skip


def _points(content: dict[str, Any]) -> Iterator[tuple[int, float, float, str, str, str]]:
    """Yield for each norm, mode and side: the norm's number, bytes, bytes per second, side, mode, words."""
    seen = set()
    for i, n in enumerate(content["norms"]):
        kind = (n["class"], n["width"], n["rows"], n["finding"])
        if len(content["norms"]) > _DRAWN and kind in seen:
            continue
        seen.add(kind)
        for mode in WITH_BACKWARD:
            key = KEYS[mode]
            moved, pair = n["moved_bytes"][key], n[key]
            for side in ("before", "after"):
                us = pair and pair[f"{side}_us"]
                if moved and us:
                    words = f"{n['name']}, {key.replace('_', ' + ')}: {size(moved, 3)} in {duration(us / 1e6, 3)}"
                    yield i, moved, moved / us * 1e6, side, mode, words


class _Scale:
    """A logarithmic scale from values to positions, with some space around the values."""

    def __init__(self, values: list[float], start: float, end: float) -> None:
        self.low, self.high = min(values) / 1.6, max(values) * 1.6
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self._start + part * (self._end - self._start)

    def ticks(self, most: int) -> list[float]:
        """Return round values within the scale, at most about `most` of them."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for parts in ((1, 2, 5), (1, 3), (1,)):
            found = [p * 10.0**power for power in powers for p in parts if self.low <= p * 10.0**power <= self.high]
            if len(found) <= max(most, 2):
                return found
        return found[:: math.ceil(len(found) / max(most, 2))]


# --- pairs of steps ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """The paired differences of a step on a line: positions in percent, labels of its ends, zero, and the median."""

    title: str
    key: str
    summary: str
    dots: tuple[tuple[float, int], ...]
    ends: tuple[str, str]
    zero: float
    interval: tuple[float, float] | None
    median: float


def _strips(result: ReportResult) -> Iterator[Strip]:
    named = (("forward step", "forward_step", result.forward), ("training step", "training_step", result.training))
    for title, key, step in named:
        if step is None:
            continue
        low, high = min(*step.differences, 0.0), max(*step.differences, 0.0)

        def place(seconds: float, low: float = low, high: float = high) -> float:
            return round(4 + 92 * (seconds - low) / ((high - low) or 1.0), 2)

        found = step.interval
        interval = None if found is None else (place(found.low), place(found.high))
        dots = tuple((place(difference), i) for i, difference in enumerate(step.differences))
        yield Strip(title, key, step.summary(), dots, _ends(low, high), place(0.0), interval, place(step.difference))


def _ends(low: float, high: float) -> tuple[str, str]:
    """Return the most by which a step with our norms was slower and faster, in words."""
    return (f"{duration(-low, 3)} slower" if low < 0 else "", f"{duration(high, 3)} faster" if high > 0 else "")


# --- the page ------------------------------------------------------------------------------------------------


def check() -> None:
    """Check that a page can be drawn. Raises CommandError if jinja2, which torch requires, is missing."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise CommandError(f"{results.REPORT_PAGE} needs jinja2: pip install jinja2") from None


def html(result: ReportResult) -> str:
    """Return the page of a report.

    Args:
        result: The report.

    Returns:
        HTML that contains its style sheet and its drawings, loads nothing, and runs no script.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    content = result.to_json()
    figures = Figures(content, Markup)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )  # fmt: skip
    listed = _listed(result)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        figure=figures, content=content, result=result, headline=machine.headline(result.facts),
        answer=[line if isinstance(line, Text) else Text(line) for line in printing.answer(result)],
        findings=list(printing.findings(result)), compilation=list(printing.compilation(result)),
        rate=result.rate and printing.in_words(result.rate), times=_time_bars(figures), memory=_memory_bars(figures),
        rooflines=[("wide", roofline(content, 760, 420)), ("narrow", roofline(content, 360, 340))],
        strips=list(_strips(result)), listed=listed, verdicts=[printing.verdict(n) for n in result.norms],
        unlisted=[f"norms/{i}/" for i in set(range(len(result.norms))) - set(listed)],
        margins={"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
    )  # fmt: skip


def _listed(result: ReportResult) -> list[int]:
    """Return the numbers of the norms that get a row: all, or if there are many, the first of each kind."""
    if len(result.norms) <= LISTED:
        return list(range(len(result.norms)))
    first: dict[Any, int] = {}
    for i, n in enumerate(result.norms):
        first.setdefault((n.verdict.class_name, n.width, n.verdict.finding, n.rows, n.calls), i)
    return list(first.values())[:LISTED]
