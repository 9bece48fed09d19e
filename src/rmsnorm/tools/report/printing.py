"""What `rmsnorm report` prints."""

from collections.abc import Iterator

from rmsnorm.tools import machine
from rmsnorm.tools.display import (
    NOTHING,
    Block,
    Column,
    Table,
    Text,
    count,
    duration,
    factor,
    share,
    signed_share,
    size,
    speed,
)
from rmsnorm.tools.report.norms import WITH_BACKWARD, Mode, NormKind, NormResult, Pair, kinds_of
from rmsnorm.tools.report.prediction import Rate
from rmsnorm.tools.report.result import ReportResult
from rmsnorm.tools.report.steps import CONFIDENCE


def blocks(result: ReportResult) -> tuple[Block, ...]:
    """Return what to print: a summary, a row for each kind of norm or each norm, the whole model, notes."""
    m = result.model
    phases = ", ".join(f"{duration(seconds, 2)} {name}" for name, seconds in result.phases.items())
    last = (
        f"{result.target}: {m['class']}, {count(m['parameters'])} parameters, {m['dtype']}",
        machine.headline(result.facts),
        f"took {duration(result.seconds, 2)} ({phases}), {duration(result.asked)} were asked for"
        + ("" if result.peak_bytes is None else f"; {size(result.peak_bytes, 2)} of memory at most"),
    )
    return (
        *answer(result),
        *([_norms_table(result) if result.every_layer else _kinds_table(result)] if result.norms else []),
        *_model_table(result),
        *_prediction_table(result),
        "",
        *compilation(result),
        *findings(result),
        *(f"Note: {note}" for note in result.notes),
        *(Text(line, "note") for line in last),
    )


def answer(result: ReportResult) -> Iterator[str | Text]:
    """Yield what was found, in three lines."""
    found, proven = len(result.norms), [n for n in result.norms if n.verdict.replaced]
    if not proven:
        yield Text(
            "No norm was found." if not found else f"None of the {found} norms is proven: all stay as they are.",
            "title",
        )
        yield "Nothing was replaced, so times, memory and outputs do not change."
        return
    idle = sum(not n.calls for n in proven)
    unreached = f"; no activation reached {idle} of them" if idle else ""
    yield Text(f"{len(proven)} of {found} norms are proven and replaced{unreached}.", "title")
    if result.model["as_expected"] is False:
        words = f"{found} norms with {result.model['norm_parameters']:,} parameters: transformers has changed it"
        yield Text(f"This is not the expected model: {words}.", "bad")
    yield Text(_gain(result), "title")
    yield _outputs(result)


def _gain(result: ReportResult) -> str:
    """Return the time and the memory with the model's own norms and with ours."""
    parts = []
    named: tuple[tuple[Mode, str], ...] = (("training", "Norms forward + backward"), ("forward", "Norms forward"))
    pairs = [(words, pair) for mode, words in named if (pair := result.total(mode)) is not None]
    parts.append(f"{pairs[0][0]}: {_arrow(pairs[0][1])}" if pairs else "No time was measured")
    if result.saved is not None:
        of = "" if result.saved.tokens == result.model["tokens"] else f" of {result.saved.tokens:,} tokens"
        parts.append(f"saved for backward{of}: {size(result.saved.before, 3)} → {size(result.saved.after, 3)}")
    return f"{'; '.join(parts)}."


def _outputs(result: ReportResult) -> Text:
    """Return how many outputs are wrong or changed."""
    outputs, wrong, changed = (sum(getattr(n, key) for n in result.norms) for key in ("outputs", "wrong", "changed"))
    if not outputs:
        return Text("No output was compared.", "bad")
    if wrong:
        return Text(
            f"{count(wrong)} of {count(outputs)} outputs of the norms are wrong: they differ from exact.",
            "bad",
        )
    ulp = max(n.ulp for n in result.norms)
    than = f"{count(changed)} of them changed, by at most {ulp} ulp" if changed else "none of them changed"
    return Text(f"Outputs: all {count(outputs)} of the norms are exact; {than}.", "good")


def _kinds_table(result: ReportResult) -> Table:
    columns = (
        Column("norm", words=True), Column("width"), Column("norms"), Column("verdict", words=True),
        Column("changed"), Column("forward"), Column("forward + backward"),
    )  # fmt: skip
    rows = []
    for kind in kinds_of(result.norms):
        n = kind.norms[0]
        wrong, outputs, changed = (sum(getattr(n, k) for n in kind.norms) for k in ("wrong", "outputs", "changed"))
        times = [_arrow(kind.time(mode)) for mode in WITH_BACKWARD]
        width = NOTHING if n.width is None else str(n.width)
        rows.append(
            (
                n.verdict.class_name,
                width,
                str(len(kind.norms)),
                verdict(n),
                _changed(wrong, outputs, changed),
                *times,
            )
        )
    return Table(
        f"Each kind of norm, {_where(result)}: outputs that changed, and time of all its norms before → after",
        columns,
        tuple(rows),
    )


def _norms_table(result: ReportResult) -> Table:
    columns = (
        Column("norm", words=True), Column("rows × width"), Column("verdict", words=True),
        Column("changed"), Column("ulp"), Column("forward"), Column("forward + backward"), Column("one token"),
    )  # fmt: skip
    rows = []
    for n in result.norms:
        changed = _changed(n.wrong, n.outputs, n.changed)
        modes: tuple[Mode, ...] = (*WITH_BACKWARD, "token")
        times = ["outlier" if n.outlier else _arrow(n.times.get(mode)) for mode in modes]
        rows.append(
            (
                n.verdict.name,
                f"{n.rows} × {n.width}" if n.calls else NOTHING,
                verdict(n),
                changed,
                str(n.ulp) if n.calls else NOTHING,
                *times,
            )
        )
    return Table(
        f"Each norm, {_where(result)}: outputs that changed, and time of a call before → after",
        columns,
        tuple(rows),
    )


def _where(result: ReportResult) -> str:
    return f"on the activations of {result.model['tokens']:,} tokens"


def _model_table(result: ReportResult) -> Iterator[Table]:
    columns = (Column("", words=True), Column("own norms"), Column("ours"), Column("difference", words=True))
    rows: list[tuple[str, ...]] = []
    labels: tuple[tuple[str, Mode], ...] = (
        ("norms, forward", "forward"), ("norms, forward + backward", "training"), ("norms, one token", "token"),
    )  # fmt: skip
    for label, mode in labels:
        pair = result.total(mode)
        if pair is not None and pair.gain is not None:
            rows.append((label, duration(pair.before), duration(pair.after), f"{factor(pair.gain, 3)} as fast"))
    unfused = {} if result.compilation is None else result.compilation.unfused
    how = "" if result.compilation is None else ", compiled"
    steps = (
        (f"forward step{how}", result.forward), (f"forward step{how}, additions not fused", unfused.get("forward")),
        (f"training step{how}", result.training), (f"training step{how}, additions not fused", unfused.get("training")),
    )  # fmt: skip
    for label, step in steps:
        if step is not None:
            where = f"{label}, {step.tokens:,} tokens, {len(step.rounds)} pairs"
            rows.append((where, duration(step.before.median), duration(step.after.median), step.summary()))
    for what, found in (("saved for backward", result.saved), ("peak of a training step", result.peak)):
        if found is not None:
            rows.append(_memory_row(f"{what}{how}, {found.tokens:,} tokens", found.before, found.after))
            if found.recomputed is not None:
                rows.append(_memory_row(f"{what}, patched with recompute=True", found.before, found.recomputed))
    if rows:
        yield Table(
            f"The whole model: medians, with {CONFIDENCE:.0%} intervals of paired differences",
            columns,
            tuple(rows),
        )


def _prediction_table(result: ReportResult) -> Iterator[Table]:
    """Yield how long our norms were expected to take, and how long they took; nothing if that is unknown."""
    rate = result.rate
    if rate is None:
        return
    kinds = kinds_of(n for n in result.norms if n.compared)
    if result.every_layer:
        kinds = tuple(NormKind((n,)) for kind in kinds for n in kind.norms)
    rows = []
    named: tuple[tuple[str, Mode], ...] = (("forward", "forward"), ("forward + backward", "training"))
    for words, mode in named:
        found = [(_named(kind, result.every_layer), result.prediction(kind, mode)) for kind in kinds]
        found.append(("all norms", result.whole_prediction(mode)))
        rows += [
            (f"{name}, {words}", duration(p.predicted, 3), duration(p.measured, 3), signed_share(p.error))
            for name, p in found
            if p is not None
        ]
    if rows:
        columns = (Column("", words=True), Column("predicted"), Column("measured"), Column("error"))
        yield Table(f"Our norms, predicted and measured. Predicted: {in_words(rate)}", columns, tuple(rows))


def _named(kind: NormKind, every_layer: bool) -> str:
    n = kind.norms[0]
    return n.verdict.name if every_layer else f"{len(kind.norms)} × {n.verdict.class_name}, {n.rows} × {n.width}"


def in_words(rate: Rate) -> str:
    """Return what a prediction assumes."""
    part = "" if rate.efficiency == 1 else f"{share(rate.efficiency, 3)} of "
    return (
        f"bytes at {part}{rate.name} ({speed(rate.bandwidth, 3)}), and {duration(rate.launch, 3)} a kernel "
        f"(from {rate.source})"
    )


def _memory_row(label: str, before: int, after: int) -> tuple[str, ...]:
    change = f"{size(before - after)} less" if after <= before else f"{size(after - before)} more"
    return label, size(before), size(after), change


_NORMS = {
    "before": "its own norms",
    "after": "our norms",
    "unfused": "our norms without fused additions",
}


def compilation(result: ReportResult) -> Iterator[str]:
    """Yield what was compiled and how long that took."""
    if result.compilation is None:
        return
    yield (
        "The steps of the whole model were compiled with torch.compile (Inductor). The first call of each, which "
        "compiles it, took:"
    )
    for step in result.compilation.steps:
        graphs = f", {step.graphs} graph{'s' if step.graphs > 1 else ''}" if step.graphs else ""
        yield f"  {step.mode} step with {_NORMS[step.side]}: {duration(step.seconds, 3)}{graphs}"


def findings(result: ReportResult) -> Iterator[str]:
    """Yield what was found about each kind of norm, with the whole reason."""
    groups: dict[tuple[str, str], list[NormResult]] = {}
    for n in result.norms:
        groups.setdefault((n.verdict.class_name, n.verdict.finding), []).append(n)
    for (class_name, finding), group in groups.items():
        names = group[0].verdict.name + (", …" if len(group) > 1 else "")
        yield f"{len(group)} × {class_name} ({names}): {finding}"
    idle = [n.verdict.name for n in result.norms if n.verdict.replaced and not n.calls]
    if idle:
        yield f"No activation reached {', '.join(idle)}."


def _arrow(pair: Pair | None) -> str:
    return NOTHING if pair is None else f"{duration(pair.before, 3)} → {duration(pair.after, 3)}"


def verdict(n: NormResult) -> Text:
    """Return what was found about a norm, in a word or two."""
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
        return NOTHING
    return share(changed / outputs, 2) if changed else "0"
