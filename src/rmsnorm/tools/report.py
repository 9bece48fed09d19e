"""`rmsnorm report`: what replacing a model's norms changes and gains, measured on the activations that reach it.

    build -> prove -> each norm alone: its outputs, its time -> whole-model steps in pairs -> Result

The run is planned against a budget of wall time. What does not fit runs on fewer tokens or is left out, and a note
says so. Whole-model steps run in pairs, one with the model's own norms and one with ours, next to each other in time;
what is reported is the median of the paired differences and its confidence interval (`timing.median_interval`).
"""

import contextlib
import math
import resource
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rmsnorm import bits, memory
from rmsnorm.errors import CommandError, one_line
from rmsnorm.kernels.host import loader as host
from rmsnorm.ops import wait_for_host
from rmsnorm.patching.patch import patch
from rmsnorm.patching.patch_report import Verdict
from rmsnorm.patching.replacement import exact_output, set_class
from rmsnorm.tools import checkpoint, loading, machine, results, timing
from rmsnorm.tools.display import Block, Column, Table, Text, count, duration, factor, share, size
from rmsnorm.tools.timing import Interval, Progress, Timing

_FEWEST_PAIRS, _MOST_PAIRS = 7, 200
_CONFIDENCE = 0.95
_FEWEST_TOKENS = 16
_NORM_SAMPLES, _TOKEN_SAMPLES, _FEWEST_SAMPLES = 15, 50, 3
_NORM_SECONDS = 8.0  # the most for timing norms alone, all of them together
_OUTLIER = 3.0  # times as slow as norms of the same kind
_AGAIN = 2  # how often an outlier is measured again
_IN_A_MODEL = 2.0  # times as long as alone may a norm take in a model, whose other work cools the caches
_OF_A_KIND = 3  # how many norms of a kind are timed where only their sum is asked for

# Shares of the time that is left.
_FOR_THE_COMPILER, _FOR_EXAMINING, _FOR_NORMS = 0.25, 0.25, 0.2
_MARGIN = 1.25  # how much longer than predicted a step may take
_GRACE = 0.1  # of all seconds: how far to go beyond them for the fewest pairs


# --- what comes out ------------------------------------------------------------------------------------------

Mode = Literal["forward", "training", "token"]


@dataclass(frozen=True)
class Pair:
    """Seconds with the model's own classes and with ours."""

    before: float
    after: float

    @property
    def gain(self) -> float | None:
        return self.before / self.after if self.after else None

    def __add__(self, other: "Pair") -> "Pair":
        return Pair(self.before + other.before, self.after + other.after)

    def __mul__(self, times: int) -> "Pair":
        return Pair(self.before * times, self.after * times)


def _pair_to_json(pair: Pair | None) -> dict[str, Any] | None:
    if pair is None:
        return None
    return {"before_us": pair.before * 1e6, "after_us": pair.after * 1e6, "gain": pair.gain}


@dataclass
class Norm:
    """One norm, proven or left, and what was seen where activations reached it.

    wrong: outputs of the patched model that are not *exact*'s bits, NaN positions counted; changed: those that are
    not the replaced class's; ulp: by how much at most. times: seconds of one call; empty where there was no time for
    it, since norms of its kind take the same. outlier: whether it took much longer than these, measured again or not,
    so that its times are in no sum.
    """

    verdict: Verdict
    width: int | None
    calls: int = 0
    rows: int = 0
    outputs: int = 0
    wrong: int = 0
    changed: int = 0
    ulp: int = 0
    times: dict[Mode, Pair] = field(default_factory=dict)
    again: int = 0
    outlier: bool = False

    @property
    def compared(self) -> bool:
        return self.verdict.replaced and self.calls > 0

    def to_json(self) -> dict[str, Any]:
        spec = self.verdict.spec
        return {
            "name": self.verdict.name,
            "class": self.verdict.class_name,
            "width": self.width,
            "spec": None if spec is None else {"eps": spec.eps, "cast": spec.cast, "offset": spec.offset},
            "left_because": self.verdict.reason or None,
            "own_forward": self.verdict.own_forward_when or None,
            "calls": self.calls,
            "rows": self.rows,
            "outputs": self.outputs,
            "differ_from_exact": self.wrong,
            "differ_from_original": self.changed,
            "most_ulp_from_original": self.ulp,
            "forward": _pair_to_json(self.times.get("forward")),
            "forward_backward": _pair_to_json(self.times.get("training")),
            "one_token": _pair_to_json(self.times.get("token")),
            "measured_again": self.again,
            "outlier": self.outlier,
        }


@dataclass(frozen=True)
class Kind:
    """Norms of one class, width and verdict that get equally many rows, and so take the same time."""

    norms: tuple[Norm, ...]

    def time(self, mode: Mode) -> Pair | None:
        """Seconds of all calls of these norms, each taken to be the median of those measured; None if none was."""
        measured = [n for n in self.norms if mode in n.times]
        pairs = [n.times[mode] for n in measured if not n.outlier] or [n.times[mode] for n in measured]
        if not pairs:
            return None
        each = Pair(statistics.median(p.before for p in pairs), statistics.median(p.after for p in pairs))
        return each * sum(n.calls for n in self.norms)


def kinds(norms: Iterable[Norm]) -> tuple[Kind, ...]:
    groups: dict[Any, list[Norm]] = {}
    for n in norms:
        groups.setdefault((n.verdict.class_name, n.width, n.verdict.finding, n.rows, n.calls), []).append(n)
    return tuple(Kind(tuple(group)) for group in groups.values())


def total(norms: Iterable[Norm], mode: Mode) -> Pair | None:
    """Seconds of all norms that activations reached; None if there are none, or none of a kind was timed."""
    pairs = [kind.time(mode) for kind in kinds(n for n in norms if n.compared)]
    known = [pair for pair in pairs if pair is not None]
    return sum(known, Pair(0.0, 0.0)) if known and len(known) == len(pairs) else None


Outcome = Literal["saved", "slower", "noise", "too few pairs"]


@dataclass(frozen=True)
class Step:
    """A whole-model step on so many tokens, with the model's own norms and with ours in pairs.

    rounds: seconds before and after, a pair a round; norms: what the norms alone take of a step.
    """

    tokens: int
    rounds: tuple[tuple[float, float], ...]
    norms: Pair

    @property
    def before(self) -> Timing:
        return timing.summarize([before for before, _ in self.rounds])

    @property
    def after(self) -> Timing:
        return timing.summarize([after for _, after in self.rounds])

    @property
    def differences(self) -> list[float]:
        return [before - after for before, after in self.rounds]

    @property
    def difference(self) -> float:
        """Seconds saved: the median of the paired differences."""
        return statistics.median(self.differences)

    @property
    def interval(self) -> Interval | None:
        return timing.median_interval(self.differences, _CONFIDENCE) if len(self.rounds) >= _FEWEST_PAIRS else None

    @property
    def most(self) -> float:
        """The seconds that the norms can save at most: all that they take with their own classes, in a model."""
        return _IN_A_MODEL * self.norms.before

    @property
    def outcome(self) -> Outcome:
        """What may be said of the difference. Far more than all that the norms take was not saved by them."""
        interval = self.interval
        if interval is None:
            return "too few pairs"
        if interval.high < 0:
            return "slower"
        return "saved" if interval.low > 0 and self.difference <= self.most else "noise"

    def said(self) -> str:
        """The outcome in words."""
        interval, outcome = self.interval, self.outcome
        if interval is None:
            return f"unknown: {len(self.rounds)} pairs, at least {_FEWEST_PAIRS} are needed"
        low, high = (duration(seconds, 3) for seconds in (interval.low, interval.high))
        if outcome == "saved":
            part = share(self.difference / self.before.median, 2)
            return f"{duration(self.difference, 3)} less, {part} ({low} to {high})"
        if outcome == "slower":
            return (
                f"{duration(-self.difference, 3)} more ({duration(-interval.high, 3)} to {duration(-interval.low, 3)})"
            )
        if interval.low <= 0:
            return f"noise: {low} to {high}"
        return f"noise: {duration(self.difference, 3)} less, but the norms can save {duration(self.most, 3)} at most"

    def to_json(self) -> dict[str, Any]:
        interval = self.interval
        return {
            "tokens": self.tokens,
            "pairs": len(self.rounds),
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "difference_us": self.difference * 1e6,
            "interval": interval and {
                "of": "the median of the paired differences",
                "method": "order statistics (sign test)",
                "low_us": interval.low * 1e6,
                "high_us": interval.high * 1e6,
                "coverage": interval.coverage,
            },
            "outcome": self.outcome,
            "norms_can_save_us": self.most * 1e6,
            "norms": _pair_to_json(self.norms),
            "rounds_us": [[before * 1e6, after * 1e6] for before, after in self.rounds],
        }  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """Bytes that the whole model saves for backward of so many tokens, weights not counted."""

    tokens: int
    before: int
    after: int


@dataclass(frozen=True)
class Result:
    """asked: the seconds it was given; phases: the seconds it took, part by part."""

    target: str
    facts: dict[str, Any]
    model: dict[str, Any]
    notes: tuple[str, ...]
    norms: tuple[Norm, ...]
    forward: Step | None
    training: Step | None
    saved: Saved | None
    asked: float
    phases: dict[str, float]
    peak_bytes: int
    every_layer: bool = False

    @property
    def ok(self) -> bool:
        """No output of the patched model's norms differs from *exact*, and the preset has the norms it should."""
        return not any(n.wrong for n in self.norms) and self.model["as_expected"] is not False

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    def total(self, mode: Mode) -> Pair | None:
        return total(self.norms, mode)

    def to_json(self) -> dict[str, Any]:
        saved = self.saved
        return {
            "verb": "report",
            "ok": self.ok,
            "target": self.target,
            "machine": self.facts,
            "model": self.model,
            "notes": list(self.notes),
            "norms": [n.to_json() for n in self.norms],
            "sum_forward": _pair_to_json(self.total("forward")),
            "sum_forward_backward": _pair_to_json(self.total("training")),
            "sum_one_token": _pair_to_json(self.total("token")),
            "forward_step": self.forward and self.forward.to_json(),
            "training_step": self.training and self.training.to_json(),
            "saved_for_backward": saved and {
                "tokens": saved.tokens,
                "before_bytes": saved.before,
                "after_bytes": saved.after,
                "less_bytes": saved.before - saved.after,
            },
            "asked_seconds": self.asked,
            "seconds": round(self.seconds, 1),
            "phases_seconds": {name: round(seconds, 1) for name, seconds in self.phases.items()},
            "peak_resident_bytes": self.peak_bytes,
        }  # fmt: skip

    # --- as it is printed ---

    def table(self) -> tuple[Block, ...]:
        """The answer in three lines, a row for each kind of norm or for each norm, the whole model, notes."""
        m = self.model
        phases = ", ".join(f"{duration(seconds, 2)} {name}" for name, seconds in self.phases.items())
        last = (
            f"{self.target}: {m['class']}, {count(m['parameters'])} parameters, {m['dtype']}",
            machine.headline(self.facts),
            f"took {duration(self.seconds, 2)} ({phases}), {duration(self.asked)} were asked for; "
            f"{size(self.peak_bytes, 2)} of memory at most",
        )
        return (
            *self._answer(),
            *([self._norms_table() if self.every_layer else self._kinds_table()] if self.norms else []),
            *self._model_table(),
            "",
            *self._verdicts(),
            *(f"Note: {note}" for note in self.notes),
            *(Text(line, "note") for line in last),
        )

    def _answer(self) -> Iterator[Block]:
        found, proven = len(self.norms), [n for n in self.norms if n.verdict.replaced]
        if not proven:
            yield Text(
                "No norm was found."
                if not found
                else f"None of the {found} norms is proven: all are left as they are.",
                "title",
            )
            yield "Nothing was replaced, so no time, memory or output changes."
            return
        idle = sum(not n.calls for n in proven)
        unreached = f"; no activation reached {idle} of them" if idle else ""
        yield Text(f"{len(proven)} of {found} norms are proven and replaced{unreached}.", "title")
        if self.model["as_expected"] is False:
            words = f"{found} norms with {self.model['norm_parameters']:,} parameters, so transformers has changed it"
            yield Text(f"This is not the expected model: {words}.", "bad")
        yield Text(self._gain(), "title")
        yield self._outputs()

    def _gain(self) -> str:
        """Time and memory before and after."""
        parts = []
        named: tuple[tuple[Mode, str], ...] = (("training", "Norms forward + backward"), ("forward", "Norms forward"))
        pairs = [(words, pair) for mode, words in named if (pair := self.total(mode)) is not None]
        parts.append(f"{pairs[0][0]}: {_arrow(pairs[0][1])}" if pairs else "No time was measured")
        if self.saved is not None:
            of = "" if self.saved.tokens == self.model["tokens"] else f" of {self.saved.tokens:,} tokens"
            parts.append(f"saved for backward{of}: {size(self.saved.before, 3)} → {size(self.saved.after, 3)}")
        return f"{'; '.join(parts)}."

    def _outputs(self) -> Text:
        """What changes in the outputs."""
        outputs, wrong, changed = (sum(getattr(n, key) for n in self.norms) for key in ("outputs", "wrong", "changed"))
        if not outputs:
            return Text("No output was compared.", "bad")
        if wrong:
            return Text(
                f"{count(wrong)} of {count(outputs)} outputs of the norms are wrong: not the exact bits.", "bad"
            )
        ulp = max(n.ulp for n in self.norms)
        than = f"{count(changed)} of them changed, by {ulp} ulp at most" if changed else "none of them changed"
        return Text(f"Outputs: all {count(outputs)} of the norms are exact; {than}.", "good")

    def _kinds_table(self) -> Table:
        columns = (
            Column("norm", words=True), Column("width"), Column("norms"), Column("verdict", words=True),
            Column("changed"), Column("forward"), Column("forward + backward"),
        )  # fmt: skip
        rows = []
        for kind in kinds(self.norms):
            n = kind.norms[0]
            wrong, outputs, changed = (sum(getattr(n, k) for n in kind.norms) for k in ("wrong", "outputs", "changed"))
            times = [_arrow(kind.time(mode)) for mode in _WITH_BACKWARD]
            width = "–" if n.width is None else str(n.width)
            rows.append(
                (
                    n.verdict.class_name,
                    width,
                    str(len(kind.norms)),
                    _verdict(n),
                    _changed(wrong, outputs, changed),
                    *times,
                )
            )
        return Table(
            f"Each kind of norm, {self._where()}: outputs that changed, and time of all its norms before → after",
            columns,
            tuple(rows),
        )

    def _norms_table(self) -> Table:
        columns = (
            Column("norm", words=True), Column("rows × width"), Column("verdict", words=True),
            Column("changed"), Column("ulp"), Column("forward"), Column("forward + backward"), Column("one token"),
        )  # fmt: skip
        rows = []
        for n in self.norms:
            changed = _changed(n.wrong, n.outputs, n.changed)
            modes: tuple[Mode, ...] = (*_WITH_BACKWARD, "token")
            times = ["outlier" if n.outlier else _arrow(n.times.get(mode)) for mode in modes]
            rows.append(
                (
                    n.verdict.name,
                    f"{n.rows} × {n.width}" if n.calls else "–",
                    _verdict(n),
                    changed,
                    str(n.ulp) if n.calls else "–",
                    *times,
                )
            )
        return Table(
            f"Each norm, {self._where()}: outputs that changed, and time of a call before → after",
            columns,
            tuple(rows),
        )

    def _where(self) -> str:
        return f"on the activations of {self.model['tokens']:,} tokens"

    def _model_table(self) -> Iterator[Table]:
        columns = (Column("", words=True), Column("own norms"), Column("ours"), Column("difference", words=True))
        rows: list[tuple[str, ...]] = []
        labels: tuple[tuple[str, Mode], ...] = (
            ("norms, forward", "forward"), ("norms, forward + backward", "training"), ("norms, one token", "token"),
        )  # fmt: skip
        for label, mode in labels:
            pair = self.total(mode)
            if pair is not None and pair.gain is not None:
                rows.append((label, duration(pair.before), duration(pair.after), f"{factor(pair.gain, 3)} as fast"))
        for label, step in (("forward step", self.forward), ("training step", self.training)):
            if step is not None:
                where = f"{label}, {step.tokens:,} tokens, {len(step.rounds)} pairs"
                rows.append((where, duration(step.before.median), duration(step.after.median), step.said()))
        if self.saved is not None:
            before, after = self.saved.before, self.saved.after
            where = f"saved for backward, {self.saved.tokens:,} tokens"
            rows.append((where, size(before), size(after), f"{size(before - after)} less"))
        if rows:
            yield Table(
                f"The whole model: medians, with {_CONFIDENCE:.0%} intervals of paired differences",
                columns,
                tuple(rows),
            )

    def _verdicts(self) -> Iterator[str]:
        """What was found of each kind of norm, with the whole reason."""
        groups: dict[tuple[str, str], list[Norm]] = {}
        for n in self.norms:
            groups.setdefault((n.verdict.class_name, n.verdict.finding), []).append(n)
        for (cls, said), group in groups.items():
            names = group[0].verdict.name + (", …" if len(group) > 1 else "")
            yield f"{len(group)} × {cls} ({names}): {said}"
        idle = [n.verdict.name for n in self.norms if n.verdict.replaced and not n.calls]
        if idle:
            yield f"No activation reached {', '.join(idle)}."


_WITH_BACKWARD: tuple[Mode, ...] = ("forward", "training")


def _arrow(pair: Pair | None) -> str:
    return "–" if pair is None else f"{duration(pair.before, 3)} → {duration(pair.after, 3)}"


def _verdict(n: Norm) -> Text:
    if not n.verdict.replaced:
        return Text("left", "bad")
    if n.wrong:
        return Text("wrong", "bad")
    if not n.calls:
        return Text("proven, not reached", "note")
    return Text("proven in part" if n.verdict.own_forward_when else "proven", "good")


def _changed(wrong: int, outputs: int, changed: int) -> str | Text:
    if wrong:
        return Text(f"{count(wrong)} wrong", "bad")
    if not outputs:
        return "–"
    return share(changed / outputs, 2) if changed else "0"


# --- the budget ----------------------------------------------------------------------------------------------


class _Budget:
    """Seconds of wall time from the start of the command, and what has gone into which part of it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.start = self.last = timing.now()
        self.phases: dict[str, float] = {}

    @property
    def spent(self) -> float:
        return timing.now() - self.start

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    def enter(self, phase: str) -> None:
        """What has passed since the last call, or since the start, was this phase."""
        now = timing.now()
        self.phases[phase], self.last = self.phases.get(phase, 0.0) + now - self.last, now


class _Cost:
    """Predicts the seconds that something takes on so many tokens from what was seen."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def time(self, run: Callable[[int], object], tokens: int) -> None:
        start = timing.now()
        run(tokens)
        self.seen[tokens] = timing.now() - start

    def predict(self, tokens: int) -> float:
        """On the line through the two largest that were seen; in proportion where only one was."""
        if tokens in self.seen:
            return self.seen[tokens]
        *fewer, (many, most) = sorted(self.seen.items())
        if not fewer:
            return most * max(1.0, tokens / many)
        few, least = fewer[-1]
        slope = max(0.0, (most - least) / (many - few))
        return max(least, most + slope * (tokens - many))


def _most_tokens(asked: int, predict: Callable[[int], float], seconds: float) -> int | None:
    """The largest of asked, asked / 2, asked / 4, … tokens that is expected to fit; None if none does."""
    tokens = asked
    while predict(tokens) * _MARGIN > seconds:
        if tokens <= _FEWEST_TOKENS:
            return None
        tokens = max(_FEWEST_TOKENS, tokens // 2)
    return tokens


def _probe(run: Callable[[int], object], asked: int, seconds: float) -> _Cost:
    """Run it on the fewest tokens, again since a first call compiles, and on ever four times as many, while that fits.

    seconds: what all runs but the first may take together.
    """
    cost = _Cost()
    fewest = tokens = min(asked, _FEWEST_TOKENS)
    cost.time(run, fewest)
    expected = cost.seen[fewest]
    while expected <= seconds and tokens <= max(fewest, asked // 2):
        cost.time(run, tokens)
        seconds -= cost.seen[tokens]
        tokens *= 4
        # On few tokens most of the time does not depend on how many they are.
        expected = 2 * cost.seen[fewest] if len(cost.seen) == 1 else cost.predict(tokens)
    return cost


# --- measuring -----------------------------------------------------------------------------------------------


class _Say:
    """Announces what comes next, and how many percent of the seconds are spent."""

    def __init__(self, progress: Progress, budget: _Budget) -> None:
        self.progress, self.budget = progress, budget

    def __call__(self, what: str) -> None:
        self.progress(min(99, int(100 * self.budget.spent / self.budget.seconds)), 100, what)


def main(
    target: str, out: Path, progress: Progress, *, device: str | None = None, tokens: int = 2048, seconds: float = 90.0,
    every_layer: bool = False,
) -> Result:  # fmt: skip
    """Report on a preset or on a local Hugging Face checkpoint folder; writes out/report.json.

    Args:
        target: "deepseek-ocr", or the path of a folder with config.json and *.safetensors.
        out: The folder that report.json goes to; it is made if it is not there.
        progress: Called before each step with the percent of the seconds that are spent, 100, and what comes next.
        device: "cpu" or "cuda"; by default the GPU if there is one.
        tokens: The length of the sequence; less where the model has fewer positions or the time does not suffice.
        seconds: Wall time in which to be done. Only loading the model and proving its norms can take it further.
        every_layer: Print one row each norm instead of one row a kind.

    Returns:
        What was found; its `notes` say what was left out, and why.

    Raises:
        CommandError: Before anything is written, for a target that is neither, a damaged folder, and options that are
            out of range.
    """
    budget = _Budget(seconds)
    _check_options(tokens, seconds)
    where = machine.find_device(device)
    results.check_file(out / "report.json", "--out")
    build = loading.builder(target)
    checkpoint.transformers_for("the report")
    say = _Say(progress, budget)
    say(f"building {target}")
    with checkpoint.quiet():
        wait_for_host(0.0)  # so that it is compiled meanwhile
        model, expected, notes = build(where)
        budget.enter("loading")
        result = _Run(target, where, model, expected, list(notes), tokens, budget, say, every_layer).result()
    results.write_json(out / "report.json", result.to_json())
    return result


def _check_options(tokens: int, seconds: float) -> None:
    if tokens < 1:
        raise CommandError(f"--tokens is {tokens}: give at least 1")
    if not (math.isfinite(seconds) and seconds > 0):
        raise CommandError(f"--seconds is {seconds:g}: give a finite number above 0")


class _Run:
    """One report, from the model to the Result."""

    def __init__(
        self, target: str, where: torch.device, model: Any, expected: tuple[int, int] | None, notes: list[str],
        tokens: int, budget: _Budget, say: _Say, every_layer: bool,
    ) -> None:  # fmt: skip
        self.target, self.where, self.model, self.expected, self.notes = target, where, model, expected, notes
        self.budget, self.say, self.every_layer = budget, say, every_layer
        with checkpoint.blame(f"the configuration of {type(model).__name__} is of no language model"):
            text = model.config.get_text_config()
        vocabulary, positions = (getattr(text, key, None) for key in ("vocab_size", "max_position_embeddings"))
        if not isinstance(vocabulary, int) or vocabulary < 1:
            raise CommandError(f"{type(model).__name__} takes no token ids: give the folder of a language model")
        self.vocabulary = vocabulary
        self.tokens = min(tokens, positions if isinstance(positions, int) and positions > 0 else tokens)
        self.asked = self.tokens
        self.forward: Step | None = None
        self.training: Step | None = None
        self.saved: Saved | None = None
        self.dy: Tensor | None = None  # the cotangent, which a step that is timed does not draw

    def result(self) -> Result:
        self.say("proving and replacing its norms")
        own = {name: type(module) for name, module in self.model.named_modules()}
        with checkpoint.blame(f"the norms of {type(self.model).__name__} cannot be proven"):
            self.verdicts = patch(self.model).verdicts
        modules = dict(self.model.named_modules())
        self.modules = {v.name: modules[v.name] for v in self.verdicts}
        self.own = {name: own[name] for name in self.modules}
        self.ours = {name: type(module) for name, module in self.modules.items()}
        self.norms = self._fresh()
        if any(v.replaced for v in self.verdicts):
            if not wait_for_host(max(0.0, self.budget.left * _FOR_THE_COMPILER)):
                self.notes.append(f"one token is timed as it is {host.described()}")
            self.budget.enter("proving")
            timed = self._examine_within_budget()
            self.budget.enter("norms")
            if timed:
                self._steps_within_budget()
                self.budget.enter("whole-model steps")
        else:
            self.budget.enter("proving")
        facts = machine.describe(self.where)
        if facts["load"] is not None and facts["load"] >= 2 * facts["cores"]:
            self.notes.append(
                f"the machine was busy: {facts['load']:.1f} processes wanted its {facts['cores']} cores in the last "
                "minute, so that times differ from those of an idle machine"
            )
        return Result(
            self.target, facts, self._facts(), tuple(self.notes), self.norms, self.forward,
            self.training, self.saved, self.budget.seconds, self.budget.phases, _peak_bytes(), self.every_layer,
        )  # fmt: skip

    def _fresh(self) -> tuple[Norm, ...]:
        return tuple(Norm(v, checkpoint.norm_width(self.modules[v.name])) for v in self.verdicts)

    def _facts(self) -> dict[str, Any]:
        norms = self.modules.values()
        counts = len(norms), sum(p.numel() for module in norms for p in module.parameters(recurse=False))
        return {
            "class": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in self.model.parameters()})),
            "tokens": self.tokens,
            "tokens_asked": self.asked,
            "norms": counts[0],
            "norm_parameters": counts[1],
            "as_expected": None if self.expected is None else counts == self.expected,
        }

    # --- each norm alone ---

    def _examine_within_budget(self) -> bool:
        """Check and time the norms, on as many of the tokens as a share of the time allows.

        Returns whether there was time for any timing.
        """
        budget, asked = self.budget, self.asked
        fewest = min(asked, _FEWEST_TOKENS)

        def check(tokens: int) -> None:
            self.tokens, self.norms = tokens, self._examine(tokens, None)

        self.say("checking the norms on a few tokens")
        cost = _probe(check, asked, budget.left * _FOR_EXAMINING)
        tokens = _most_tokens(asked, cost.predict, budget.left * _FOR_EXAMINING)
        if tokens is None and cost.predict(fewest) * _MARGIN <= budget.left:
            tokens = fewest
        if tokens is not None:
            timer = _Timer(self, min(_NORM_SECONDS, budget.left * _FOR_NORMS), ("forward", "token", "training"))
            self.tokens, self.norms = tokens, self._examine(tokens, timer)
        else:
            parts = " and ".join(f"{part} {duration(seconds, 2)}" for part, seconds in budget.phases.items())
            self.notes.append(
                f"nothing is timed: {parts} took so much of the {duration(budget.seconds)} that not even a pass over "
                f"{fewest} tokens fits into the rest; give more --seconds"
            )
        if self.tokens < asked:
            self.notes.append(
                f"the norms are checked on {self.tokens:,} of {asked:,} tokens, because more do not fit into "
                f"{duration(budget.seconds)}"
            )
        outliers = sum(n.outlier for n in self.norms)
        if outliers:
            self.notes.append(
                f"outliers: {outliers} norms took more than {_OUTLIER:g} times as long as others of their kind, also "
                "when measured again; their times are in no sum"
            )
        self.cost = cost
        return tokens is not None

    def _examine(self, tokens: int, timer: "_Timer | None") -> tuple[Norm, ...]:
        """One forward pass of the patched model; each norm is checked and timed as its activations reach it.

        Nothing is stored: the model waits inside the norm until it is done.
        """
        norms = self._fresh()
        hooks = []
        for n in norms:
            if n.verdict.replaced:

                def hook(
                    module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y: Tensor, n: Norm = n
                ) -> None:
                    (x,) = (*args, *named.values())
                    _check(n, self.own[n.verdict.name], module, x, y)
                    if timer is not None and not n.wrong and n.calls == 1:
                        timer.time(n, module, x, y)

                hooks.append(self.modules[n.verdict.name].register_forward_hook(hook, with_kwargs=True))
        try:
            self._use("after")
            self._forward(tokens)
        finally:
            for handle in hooks:
                handle.remove()
        return norms

    def _use(self, which: Literal["before", "after"]) -> None:
        for name, module in self.modules.items():
            set_class(module, (self.own if which == "before" else self.ours)[name])

    # --- whole-model steps ---

    def _ids(self, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.vocabulary, (1, tokens), generator=generator).to(self.where)

    def _forward(self, tokens: int) -> None:
        self.model.eval()
        with torch.no_grad():
            _run(self.model, self._ids(tokens))
            self._wait()

    def _train(self, tokens: int) -> None:
        """Forward and backward of one batch, from a random cotangent; no optimizer."""
        self.model.train()
        y = _run(self.model, self._ids(tokens))
        if self.dy is None or self.dy.shape != y.shape:
            self.dy = torch.randn(y.shape, dtype=y.dtype, device=y.device)
        torch.autograd.backward(y, self.dy)
        self.model.zero_grad(set_to_none=True)
        self._wait()

    def _wait(self) -> None:
        if self.where.type == "cuda":
            torch.cuda.synchronize(self.where)

    def _saved(self, tokens: int) -> Saved:
        self.model.train()
        kept = []
        for which in ("before", "after"):
            self._use(which)
            with memory.saved_for_backward(self.model.parameters()) as saved:
                y = _run(self.model, self._ids(tokens))
                kept.append(saved())
            del y
        return Saved(tokens, *kept)

    def _steps_within_budget(self) -> None:
        """Time forward and training steps in pairs, on as many tokens as can be paid for; or say why not."""
        if any(n.wrong for n in self.norms):
            self.notes.append("no whole-model step is timed, because outputs are wrong")
        elif not any(n.compared for n in self.norms):
            self.notes.append("no whole-model step is timed, because no activation reached a norm that is proven")
        else:
            plan = self._plan()
            if plan is not None:
                self._time_steps(*plan)

    def _time_steps(self, tokens: int, runs: dict[Mode, Callable[[int], None]]) -> None:
        seconds = min(_NORM_SECONDS, self.budget.left * _FOR_NORMS / 2)
        alone = self._examine(tokens, _Timer(self, seconds, _WITH_BACKWARD, _OF_A_KIND, with_host=True))
        if "training" in runs:
            self.saved = self._saved(tokens)
        for name, taken in self._rounds(tokens, runs).items():
            norms = total(alone, name)
            assert norms is not None  # the first of each kind is always timed
            setattr(self, name, Step(tokens, tuple(taken), norms))

    def _plan(self) -> tuple[int, dict[Mode, Callable[[int], None]]] | None:
        """On how many tokens which of the steps run often enough in what is left; None if not even a forward does.

        Runs them once on these tokens: the first step pays for memory that nothing has touched yet.
        """
        runs: dict[Mode, Callable[[int], None]] = {"forward": self._forward, "training": self._train}
        fewest = min(self.tokens, _FEWEST_TOKENS)
        if self.budget.left < 2 * self.cost.predict(fewest):
            self._leave_out(runs, ["forward", "training"], 4 * self.cost.predict(fewest))
            return None
        self.say("checking how long whole-model steps take")
        self._use("after")
        costs: dict[Mode, _Cost] = {"forward": _probe(self._forward, self.tokens, self._a_call(2))}
        forward = costs["forward"].predict(fewest)
        if self.budget.left > 4 * forward:
            with self._training(runs):
                self.saved = self._saved(fewest)
        if "training" in runs and self._a_call(1) < 3 * forward:
            self._leave_out(runs, ["training"], 4 * forward)
        if "training" in runs:
            with self._training(runs):
                costs["training"] = _probe(self._train, self.tokens, self._a_call(1))

        def predict(tokens: int) -> float:
            return sum(costs[name].predict(tokens) for name in runs)

        while runs:
            tokens = _most_tokens(self.tokens, predict, self._a_call(1))
            if tokens is None:
                self._leave_out(runs, ["training" if "training" in runs else "forward"], predict(fewest))
            elif all(tokens in costs[name].seen for name in runs):
                if tokens < self.tokens:
                    self.notes.append(
                        f"whole-model steps run on {tokens:,} of {self.tokens:,} tokens, so that at least "
                        f"{_FEWEST_PAIRS} pairs of them fit into {duration(self.budget.seconds)}"
                    )
                return tokens, runs
            else:
                self.say(f"running the whole-model steps once on {tokens:,} tokens")
                for name, run in list(runs.items()):
                    with self._training(runs) if name == "training" else contextlib.nullcontext():
                        costs[name].time(run, tokens)
        return None

    def _a_call(self, of: float) -> float:
        """Seconds that one of the calls of the fewest pairs may take, if it gets so small a part of what is left."""
        return self.budget.left * 0.9 / (2 * _FEWEST_PAIRS * of)

    def _leave_out(self, runs: dict[Mode, Callable[[int], None]], names: list[Mode], seconds: float) -> None:
        """seconds: what one call of each of the runs is expected to take, at least."""
        for name in names:
            del runs[name]
        # Of what is left after proving, examining and timing the norms may take their shares.
        steps = 2 * (_FEWEST_PAIRS + 2) * seconds * _MARGIN / (1 - 1.5 * _FOR_EXAMINING - _FOR_NORMS)
        needs = self.budget.phases["loading"] + self.budget.phases["proving"] + steps
        self.notes.append(
            f"no {' or '.join(names)} step is timed: {_FEWEST_PAIRS} pairs of it do not fit into "
            f"{duration(self.budget.seconds)}, not even on {min(self.tokens, _FEWEST_TOKENS)} tokens; --seconds "
            f"{math.ceil(needs)} may suffice"
        )

    @contextlib.contextmanager
    def _training(self, runs: dict[Mode, Callable[[int], None]]) -> Iterator[None]:
        """Go on without training if the model raises in it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # some models raise what they like in training
            said = str(error) if isinstance(error, CommandError) else one_line(error)
            self.notes.append(f"no training step is timed: {said}")
            self.model.zero_grad(set_to_none=True)
            del runs["training"]

    def _rounds(self, tokens: int, runs: dict[Mode, Callable[[int], None]]) -> dict[Mode, list[tuple[float, float]]]:
        """Time each step with the model's own norms and with ours, in turn, until the time is spent.

        Which of the two comes first alternates, so that whatever gets slower over time favours neither.
        """
        taken: dict[Mode, list[tuple[float, float]]] = {name: [] for name in runs}
        longest = 0.0
        for i in range(_MOST_PAIRS):
            grace = _GRACE * self.budget.seconds if i < _FEWEST_PAIRS else 0.0
            if i and longest > self.budget.left + grace:
                break
            start = timing.now()
            for name, run in runs.items():
                self.say(f"timing the {name} step, pair {i + 1}")
                seconds = {}
                for which in ("before", "after") if i % 2 == 0 else ("after", "before"):
                    self._use(which)
                    began = timing.now()
                    run(tokens)
                    seconds[which] = timing.now() - began
                taken[name].append((seconds["before"], seconds["after"]))
            longest = max(timing.now() - start, 0.5 * longest)
        return taken


def _check(n: Norm, own: type[nn.Module], module: nn.Module, x: Tensor, y: Tensor) -> None:
    """Compare y, which the patched norm gave for x."""
    before = own.forward(module, x)
    expected = exact_output(module, x)
    n.width = n.width or y.shape[-1]
    n.calls += 1
    n.rows += x.numel() // n.width
    n.outputs += y.numel()
    n.wrong += bits.differing(y, before if expected is None else expected)[0]
    changed, ulp = bits.differing(y, before)
    n.changed += changed
    n.ulp = max(n.ulp, ulp)


class _Timer:
    """Times norms alone as activations reach them, in so many seconds, and measures outliers again.

    most: of how many norms of a kind at most. with_host: as `timing.interleave` takes it. When the seconds are
    over, only the first norm of each kind is timed.
    """

    def __init__(
        self, run: _Run, seconds: float, modes: tuple[Mode, ...], most: int | None = None, with_host: bool = False
    ) -> None:
        self.run, self.seconds, self.modes, self.most, self.with_host = run, seconds, modes, most, with_host
        self.to_come = sum(v.replaced for v in run.verdicts)
        self.spent = 0.0
        self.kinds: dict[Any, list[Norm]] = {}

    def time(self, n: Norm, module: nn.Module, x: Tensor, y: Tensor) -> None:
        kind = self.kinds.setdefault((n.verdict.class_name, n.verdict.finding, x.shape, x.stride(), x.dtype), [])
        seconds = max(0.0, self.seconds - self.spent) / max(1, self.to_come)
        self.to_come -= 1
        if kind and (self.spent >= self.seconds or (self.most is not None and len(kind) >= self.most)):
            return
        self.run.say(f"timing {n.verdict.name}")
        start = timing.now()
        n.times = self._times(n, x, y, seconds)
        kind.append(n)
        for other in kind:
            while self._is_outlier(other, kind) and other.again < _AGAIN:
                again = self._times(other, x, y, seconds)
                other.again += 1
                # What disturbs a measurement makes it longer, never shorter.
                other.times = {
                    mode: Pair(min(pair.before, again[mode].before), min(pair.after, again[mode].after))
                    for mode, pair in other.times.items()
                }
        for other in kind:
            other.outlier = self._is_outlier(other, kind)
        self.spent += timing.now() - start

    def _is_outlier(self, n: Norm, kind: list[Norm]) -> bool:
        """Whether any of its times is far above those of the others of its kind."""
        others = [other for other in kind if other is not n]
        for mode, pair in n.times.items():
            for side in ("before", "after"):
                usual = [getattr(other.times[mode], side) for other in others]
                if usual and getattr(pair, side) > _OUTLIER * statistics.median(usual):
                    return True
        return False

    def _times(self, n: Norm, x: Tensor, y: Tensor, seconds: float) -> dict[Mode, Pair]:
        name = n.verdict.name
        own, ours, module = self.run.own[name], self.run.ours[name], self.run.modules[name]
        token = x[..., -1:, :].contiguous()
        w = module._parameters.get("weight")
        leaf = x.detach().requires_grad_()
        inputs = [leaf] if w is None or not w.requires_grad else [leaf, w]
        dy = torch.randn(y.shape, dtype=y.dtype, device=y.device)
        makes: dict[Mode, tuple[int, float, Callable[[Any], Callable[[], object]]]] = {
            "forward": (_NORM_SAMPLES, 0.3, lambda f: lambda: f(module, x)),
            "token": (_TOKEN_SAMPLES, 0.1, lambda f: lambda: f(module, token)),
            "training": (_NORM_SAMPLES, 0.6, lambda f: lambda: torch.autograd.grad(f(module, leaf), inputs, dy)),
        }
        times: dict[Mode, Pair] = {}
        for mode in self.modes:
            samples, part, make = makes[mode]
            with torch.set_grad_enabled(mode == "training"):
                timings = timing.interleave(
                    {"before": make(own.forward), "after": make(ours.forward)}, x.device, samples=samples,
                    fewest=_FEWEST_SAMPLES, seconds=part * seconds / 2, with_host=self.with_host,
                )  # fmt: skip
            times[mode] = Pair(*(_undisturbed(timings[side], x.device) for side in ("before", "after")))
        return times


def _undisturbed(timing: Timing, device: torch.device) -> float:
    """The minimum on a CPU, where other processes make some calls longer and none shorter; the median on a GPU."""
    return timing.minimum if device.type == "cpu" else timing.median


def _run(model: nn.Module, ids: Tensor) -> Tensor:
    with checkpoint.blame(f"{type(model).__name__} cannot be run on token ids alone"):
        output = checkpoint.on_tokens(model, ids)
        y: Tensor | None = getattr(output, "last_hidden_state", None)
        first: Tensor = output[0] if y is None else y
    return first


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
