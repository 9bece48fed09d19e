"""What `rmsnorm verify` prints: the verdict, what was compared, the rows that failed."""

import shlex
from collections.abc import Iterable

import torch

from rmsnorm.tools import display, machine
from rmsnorm.tools.display import Block, Column, Table, Text
from rmsnorm.tools.verify.bounds import (
    CONSTRUCTED_ULP,
    EAGER_SHARE,
    EAGER_ULP,
    GRADIENT_ELEMENTS,
    GRADIENT_RATIO,
    GRADIENT_ROWS,
)
from rmsnorm.tools.verify.cases import FLOATS, short_name
from rmsnorm.tools.verify.judge import RowResult, is_large_enough
from rmsnorm.tools.verify.result import VerifyResult
from rmsnorm.tools.verify.tally import GradientError, Tally


def blocks(result: VerifyResult, verbose: bool = False) -> list[Block]:
    """Return what to print.

    Args:
        result: What was found.
        verbose: Whether to print every row of the sweep, too.
    """
    last = _details(result) if verbose else _hint(result)
    return [*_verdict(result), *_totals(result), *_failures(result), *last]


def _verdict(result: VerifyResult) -> list[Block]:
    failed = sum(not row.ok for row in result.rows)
    verdict = Text(f"PASSED: all {len(result.rows)} rows of the sweep keep the contract", "good")
    if failed:
        verdict = Text(f"FAILED: {failed} of {len(result.rows)} rows of the sweep break the contract", "bad")
    how = "quick sweep" if result.quick else "full sweep"
    how += f", rows named {' or '.join(map(repr, result.only))}" if result.only else ""
    how += f", {result.world} ranks" if result.world > 1 else ""
    return [
        verdict,
        f"{display.count(result.outputs)} outputs in {display.duration(result.seconds, 3)} on {result.device} ({how})",
        f"kernel: {result.kernel}",
        Text(machine.headline(result.machine), "note"),
    ]


def _hint(result: VerifyResult) -> list[Block]:
    return [Text(f"\n--verbose prints all {len(result.rows)} rows.", "note")]


def _summed(rows: Iterable[RowResult]) -> Tally:
    return sum((row.tally for row in rows), Tally())


def _totals(result: VerifyResult) -> list[Block]:
    """Return what was compared with what, over all rows: how many outputs, how many differ, and how many may."""
    tried = [row for row in result.rows if row.section != "all"]
    random = [row for row in tried if row.section != "constructed"]
    total, built, both = (_summed(rows) for rows in (random, [r for r in tried if r not in random], tried))
    lines = []

    def exactly(what: str, tally: Tally, differing: int) -> None:
        lines.append((what, display.count(tally.outputs), display.count(differing), "", "0", ""))

    def nearly(what: str, tally: Tally, differing: int, ulp: float, allowed: str, allowed_ulp: str) -> None:
        share = display.share(differing / tally.outputs, digits=2)
        by = display.number(ulp, digits=2)
        lines.append((what, display.count(tally.outputs), share, by, allowed, allowed_ulp))

    exactly("itself, called again", both, both.unsteady)
    if random:
        exactly("exact, random rows", total, total.differing)
    if random and result.device != "cpu":
        exactly("the CPU, random rows", total, total.from_cpu)
    if built.outputs:
        nearly("exact, constructed rows", built, built.differing, built.off_in_row, "any", f"{CONSTRUCTED_ULP}")
    for dtype, tally in _by_dtype(result).items():
        share = EAGER_SHARE.get(dtype)
        allowed = ("any", "any") if share is None else (display.share(share), f"{max(EAGER_ULP.values())}")
        nearly(f"eager, {short_name(dtype)}", tally, tally.eager_differing, tally.eager_ulp, *allowed)
    numbers = ("outputs", "differ", "by ulp", "may differ", "may by ulp")
    columns = (Column("compared with", words=True), *map(Column, numbers))
    gradients = tuple(
        (short_name(dtype), *(_ratio(e, t) for e in (t.dx, t.dw)), display.factor(GRADIENT_RATIO[dtype]))
        for dtype, t in _by_dtype(result).items()
    )
    of_gradients = (Column("dtype", words=True), Column("dx"), Column("dw"), Column("at most"))
    return [
        Table("Outputs", columns, tuple(lines)),
        "",
        "exact: the same arithmetic with a correctly rounded statistic, in plain torch; y, dx, dgate and x + residual "
        "are compared. eager: the published class; it differs where its own fp32 sum is inaccurate.",
        *(
            ["constructed: rows whose result depends on the order of an fp64 sum; in ulp of the row's largest number."]
            if built.outputs
            else []
        ),
        f"{display.count(total.close)} of {display.count(total.rows)} random rows were so close to a rounding boundary "
        "that this order could matter.",
        *(
            [Table("Gradients: L2 error against fp64, ours divided by eager's", of_gradients, gradients)]
            if gradients
            else []
        ),
        *([_TOO_FEW] if any(_FEW in row for row in gradients) else []),
    ]


_FEW = "too few"
_TOO_FEW = f"{_FEW}: fewer than {GRADIENT_ELEMENTS:,} elements or {GRADIENT_ROWS} rows, not enough to judge a ratio."


def _ratio(error: GradientError, tally: Tally) -> str:
    """Return our error of a gradient divided by eager's, if the sample is large enough to judge it."""
    return display.factor(error.ratio) if error.ratio is None or is_large_enough(error, tally) else _FEW


def _by_dtype(result: VerifyResult) -> dict[torch.dtype, Tally]:
    """Return the tally of all random rows of each dtype that has several."""
    names = {f"{short_name(dtype)}, together": dtype for dtype in FLOATS}
    return {names[row.name]: row.tally for row in result.rows if row.section == "all" and row.tally.dx.elements}


def _failures(result: VerifyResult) -> list[Block]:
    """Return for each row that failed the reasons, and the command that runs it alone on the same numbers."""
    printed: list[Block] = []
    for row in result.rows:
        if row.ok:
            continue
        printed.append(Text(f"\nFAILED  {row.name}: {display.count(row.tally.outputs)} outputs", "bad"))
        printed += [f"  {fault}" for fault in row.faults]
        options = ["--quick"] * result.quick + (["--world", str(result.world)] if result.world > 1 else [])
        if row.section != "all":
            options += ["--only", row.name]
        printed += [
            "  to run it alone:",
            Text(f"  rmsnorm verify --device {result.device} {shlex.join(options)}".rstrip(), fold=False),
        ]
    return printed


_SECTIONS = {
    "spec": "Each spec with each pair of dtypes",
    "form": "Each memory layout",
    "width": "Each range of widths",
    "gated": "Gated norms",
    "constructed": "Constructed rows: the result depends on the order of an fp64 sum, so some numbers may differ",
    "all": "All random rows of a dtype",
}


def _details(result: VerifyResult) -> list[Block]:
    """Return a table for each section, with every row of the sweep."""
    printed: list[Block] = []
    for section, title in _SECTIONS.items():
        rows = [row for row in result.rows if row.section == section]
        cells = [_cells(row, result.device != "cpu") for row in rows]
        # A column is left out if it is empty in every row of the section.
        headers = [header for header in (cells[0] if cells else ()) if any(c[header] for c in cells)]
        columns = tuple(Column(header, words=header in ("row", "verdict")) for header in headers)
        drawn = tuple(tuple(c[header] or display.NOTHING for header in headers) for c in cells)
        if rows:
            printed.append(Table(title, columns, drawn))
    printed += [
        "",
        "not exact, not the CPU's: numbers of y, dx, dgate and x + residual whose bits differ from the exact "
        "arithmetic's, or from those of the same call on the CPU.",
        "not eager's: the share of outputs that differ from the published class's; by ulp: by how many at most.",
        f"dx, dw: the L2 error of a gradient against fp64, ours divided by eager's. {_TOO_FEW}",
        "close: rows for which the order of an fp64 sum could matter.",
    ]
    return printed


def _cells(row: RowResult, on_gpu: bool) -> dict[str, str | Text]:
    tally = row.tally
    constructed, against_eager = row.section == "constructed", tally.dx.elements > 0
    return {
        "row": row.name,
        "verdict": Text("passed", "good") if row.ok else Text("FAILED", "bad"),
        "outputs": display.count(tally.outputs),
        "not exact": display.count(tally.differing),
        "not the CPU's": display.count(tally.from_cpu) if on_gpu else "",
        "off by": f"{display.number(tally.off_in_row, digits=3)} ulp" if constructed else "",
        "may be off by": f"{CONSTRUCTED_ULP} ulp" if constructed else "",
        "not eager's": display.share(tally.eager_differing / tally.outputs, 2) if against_eager else "",
        "by ulp": display.number(tally.eager_ulp, digits=2) if against_eager else "",
        "dx": "" if tally.dx.ratio is None else _ratio(tally.dx, tally),
        "dw": "" if tally.dw.ratio is None else _ratio(tally.dw, tally),
        "close": display.count(tally.close),
    }
