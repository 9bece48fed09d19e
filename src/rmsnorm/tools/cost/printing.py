"""What `rmsnorm cost` prints."""

import collections
from collections.abc import Callable

from rmsnorm.costs.counts import TRACED_TORCH
from rmsnorm.tools import display
from rmsnorm.tools.cost.result import COLUMNS, EFFICIENCY, LAUNCH_SECONDS, RECOMPUTED, CostResult, NormCall, Totals
from rmsnorm.tools.display import Block, Column, Table, Text
from rmsnorm.tools.hardware import GPUS


def blocks(result: CostResult, verbose: bool = False) -> list[Block]:
    """Return what to print.

    Args:
        result: The costs.
        verbose: Whether to print each kind of norm and each count, too.
    """
    details = _details(result) if verbose else [Text("\n--verbose prints each kind of norm and each count.", "note")]
    return [*_answer(result), _costs(result, verbose), *_cautions(result), *details]


def _answer(result: CostResult) -> list[Block]:
    """Return the model, what ours saves in a step, and which share of a step that is."""
    eager, ours = result.training["eager"], result.training["ours"]
    lines: list[Block] = [
        f"{result.target}: {result.model}, {display.count(result.parameters)} parameters; {result.count} norms with "
        f"{display.count(result.norm_parameters)} of them; {result.batch} × {result.seq} tokens, {result.dtype}",
        f"ours instead of eager: {display.size(eager.saved - ours.saved)} less kept for the backward pass; a training "
        f"step moves {display.size(eager.bytes - ours.bytes)} less, in {display.count(eager.kernels - ours.kernels)} "
        "fewer kernels",
        _recompute(result),
    ]
    if result.gpu is None or eager.seconds is None or ours.seconds is None:
        return [*lines, f"to predict times, add --gpu with one of {', '.join(GPUS)}"]
    saved = f"predicted on {result.gpu.name}: {display.duration(eager.seconds - ours.seconds)} less a training step"
    shares = result.amdahl(True)
    if shares is not None:
        saved += f", of which the norms are {display.share(shares[0], 3)} and ours gains {display.share(shares[1], 3)}"
    return [*lines, saved]


def _recompute(result: CostResult) -> str:
    """Return what `recompute` saves and costs."""
    ours, recomputed = result.training["ours"], result.training[RECOMPUTED]
    return (
        f"with recompute: {display.size(ours.kept - recomputed.kept)} less kept, "
        f"{display.size(recomputed.bytes - ours.bytes)} more moved, "
        f"{display.count(recomputed.kernels - ours.kernels)} more kernels"
    )


def _costs(result: CostResult, verbose: bool) -> Table:
    """Return the costs of all norms in a step, with a column for each implementation."""
    figures: list[tuple[str, Callable[[Totals], str]]] = [
        ("read and written", lambda t: display.size(t.bytes)),
        ("kernels", lambda t: display.count(t.kernels)),
        ("kept by norms", lambda t: display.size(t.saved)),
        ("kept by readers", lambda t: display.size(t.saved_by_readers)),
    ]
    if result.gpu is not None:
        figures.append(("predicted time", lambda t: display.duration(t.seconds)))
    if verbose:
        figures += [
            ("FLOPs", lambda t: display.count(t.flops)),
            ("peak memory of a norm", lambda t: display.size(t.peak)),
        ]
    rows = tuple(
        (f"{what}: {label}", *(cell(of[name]) for name in COLUMNS))
        for what, of in (("inference", result.inference), ("training", result.training))
        for label, cell in figures
        if what == "training" or not label.startswith("kept by")
    )
    status = "derived" if result.derived else f"as traced in torch {TRACED_TORCH}"
    columns = (Column("", words=True), *map(Column, COLUMNS))
    return Table(f"All norms of a step, on {result.device}: {status}", columns, rows)


def _cautions(result: CostResult) -> list[Block]:
    """Return what is not counted, and what may make the counts wrong."""
    lines = [f"not counted: {n.count} × {n.cls} ({n.first}): {n.reason}" for n in result.left]
    lines += [f"note: {note}" for note in result.notes]
    if result.gpu is not None and result.gpu.few_fp64:
        lines.append(f"note: {result.gpu.name} has few fp64 units, so ours will be slower than predicted")
    return ["", *lines] if lines else []


def _details(result: CostResult) -> list[Block]:
    """Return each kind of norm, the bytes of the weights, and what the predictions assume."""
    w = result.weight
    columns = (
        Column("first", words=True),
        *map(Column, ("count", "rows", "width", "output kept")),
        *(Column(header, words=True) for header in ("what it computes", "class")),
    )
    rows = []
    for g in result.norms:
        spec = f"{g.spec.cast} cast, offset {g.spec.offset:g}" if g.weighted else "no weight"
        rows.append((g.first, f"{g.count}", _rows_of(g.calls), f"{g.width:,}", _saved_of(g.calls), spec, g.cls))
    return [
        Table("Norms", columns, tuple(rows)),
        "",
        f"weights {display.size(w.parameters)}, their gradients {display.size(w.gradients)}, AdamW "
        f"{display.size(w.optimizer)} ({display.size(result.optimizer_master)} with fp32 weights)",
        *_predictions(result),
    ]


def _predictions(result: CostResult) -> list[str]:
    """Return how times are predicted, and the share of a step that the norms take."""
    if result.gpu is None:
        return []
    efficiency = display.share(EFFICIENCY)
    lines = [
        f"predicted for {result.gpu.name}: bytes at {efficiency} of {display.speed(result.gpu.bandwidth)}, or "
        f"{display.duration(LAUNCH_SECONDS)} a kernel where that is more; matrix products at {efficiency} of "
        f"{display.number(result.gpu.matmul / 1e12)} TFLOP/s ({result.gpu.source})"
    ]
    for what, training in (("inference", False), ("training", True)):
        shares, rest = result.amdahl(training), result.step_seconds(training)
        totals = result.training if training else result.inference
        if shares is None or rest is None:
            continue
        norms, gain = (display.share(share, 3) for share in shares)
        step = display.duration(rest + (totals["eager"].seconds or 0.0))
        lines.append(
            f"{what}: the norms take {norms} of the {step} of an eager step's norms and matrix products; ours save "
            f"{gain} of it"
        )
    return lines


def _rows_of(calls: tuple[NormCall, ...]) -> str:
    """Return the rows of a step: `8,192`, or `2 × 8,192` for two calls; `0` for norms that no input reaches."""
    counted = collections.Counter(call.rows for call in calls)
    return " + ".join(f"{rows:,}" if n == 1 else f"{n} × {rows:,}" for rows, n in counted.items()) or "0"


def _saved_of(calls: tuple[NormCall, ...]) -> str:
    """Return whether readers keep the outputs: `yes`, `no`, or `1 of 2` calls."""
    saved = sum(call.is_saved for call in calls)
    return f"{saved} of {len(calls)}" if 0 < saved < len(calls) else "yes" if saved else "no"
