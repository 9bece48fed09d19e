"""Runs `rmsnorm report`.

build -> prove -> check and time each norm alone -> time whole-model steps in pairs -> ReportResult -> JSON and page
"""

import json
import math
from pathlib import Path
from typing import Any

from rmsnorm.errors import CommandError
from rmsnorm.functional import wait_for_host
from rmsnorm.tools import display, machine, results
from rmsnorm.tools.models import library, loading
from rmsnorm.tools.report import page, printing
from rmsnorm.tools.report.budget import Announcer, Budget
from rmsnorm.tools.report.result import ReportResult
from rmsnorm.tools.report.run import ReportRun
from rmsnorm.tools.timing import Progress


def report(
    target: str, out: Path, progress: Progress, *, device: str | None = None, tokens: int = 2048, seconds: float = 90.0,
    every_layer: bool = False, compiled: bool = False,
) -> ReportResult:  # fmt: skip
    """Measure what replacing the norms of a model changes and gains, and write out/report.json and out/report.html.

    Args:
        target: "deepseek-ocr", or the path of a folder with config.json and *.safetensors.
        out: The folder for the two files; it is made if it does not exist.
        progress: Called before each step with the percentage of the budget that is spent, 100, and what comes next.
        device: "cpu" or "cuda"; by default the GPU if there is one.
        tokens: The length of the sequence; shorter if the model has fewer positions or the time does not suffice.
        seconds: The budget of wall time. Only loading the model, proving its norms and compiling can exceed it.
        every_layer: Whether to print a row for each norm instead of each kind of norm.
        compiled: Whether whole-model steps are compiled with torch.compile.

    Returns:
        What was found; its `notes` say what was left out and why.

    Raises:
        CommandError: Before anything is written, if the target is neither a preset nor an intact folder, an option is
            out of range, or jinja2 is missing.
    """
    budget = Budget(seconds)
    _check_options(tokens, seconds)
    page.check()
    where = machine.find_device(device)
    for name in (results.REPORT_FILE, results.REPORT_PAGE):
        results.check_file(out / name, "--out")
    build = loading.builder(target)
    library.import_transformers("the report")
    say = Announcer(progress, budget)
    say(f"building {target}")
    with library.quiet():
        wait_for_host(0.0)  # starts compiling the host's code in the background
        built = build(where)
        budget.finish("loading")
        result = ReportRun(target, where, built, tokens, budget, say, every_layer, compiled).result()
    results.write_json(out / results.REPORT_FILE, result.to_json())
    results.write_whole(out / results.REPORT_PAGE, page.html(result).encode())
    return result


def draw_stored(path: Path, out: Path, *, every_layer: bool = False) -> ReportResult:
    """Read a stored report, and write out/report.html.

    Args:
        path: A report.json.
        out: The folder for report.html; it is made if it does not exist.
        every_layer: Whether to print a row for each norm instead of each kind of norm.

    Returns:
        The report.

    Raises:
        CommandError: If the file cannot be read or is not the JSON of a report, or the page cannot be written.
    """
    page.check()
    from jinja2 import TemplateError

    results.check_file(out / results.REPORT_PAGE, "--out")

    def checked(content: Any) -> tuple[ReportResult, bytes]:
        result = ReportResult.from_json(content, every_layer)
        json.dumps(result.to_json(), allow_nan=False)
        display.render(printing.blocks(result))
        try:
            return result, page.html(result).encode()
        except TemplateError as error:
            raise ValueError(str(error)) from None

    result, drawn = results.read_stored(path, checked, "the report.json of a run of rmsnorm report")
    results.write_whole(out / results.REPORT_PAGE, drawn)
    return result


def _check_options(tokens: int, seconds: float) -> None:
    if tokens < 1:
        raise CommandError(f"--tokens is {tokens}: give at least 1")
    if not (math.isfinite(seconds) and seconds > 0):
        raise CommandError(f"--seconds is {seconds:g}: give a finite number above 0")
