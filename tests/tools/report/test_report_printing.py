"""What the report prints."""

import re

import pytest
from report_runs import REASON, a_norm, a_result, printed_report

from rmsnorm.tools.report.result import MemoryBytes

FIGURE = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")
UNIT = re.compile(r"(?:s|ms|µs|B|kB|MB|GB|×|%|thousand|million|billion|ulp)\b|×|%")


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("every_layer", [False, True], ids=["kinds", "layers"])
def test_nothing_is_cut_off_at_any_width(width: int, every_layer: bool) -> None:
    text = printed_report(a_result(every_layer=every_layer), width)
    assert "…" not in text.replace(", …)", "")
    assert all(len(line) <= width for line in text.splitlines())
    flat = " ".join(text.split())
    assert " ".join(REASON.split()).strip() in flat
    for figure in (
        "8.07 s",
        "6.09 ms → 258 µs" if every_layer else "12.2 ms → 517 µs",
        "2.999 GB",
        "2.737 GB",
        "262 MB less",
        "362 MB less",
        "112 MB less",
        "111 MB more",
    ):
        assert figure in flat, figure


def test_the_summary_is_the_first_three_lines() -> None:
    lines = printed_report(a_result(), 80).splitlines()
    assert lines[:3] == [
        "2 of 3 norms are proven and replaced.",
        "Norms forward + backward: 24.7 ms → 10.9 ms; saved for backward: 3 GB → 2.74 GB.",
        "Outputs: all 1,024 of the norms are exact; 3 of them changed, by at most 2 ulp.",
    ]
    of_fewer = printed_report(a_result(saved=MemoryBytes(64, 2000, 1000)))
    assert "saved for backward of 64 tokens: 2 kB → 1 kB." in of_fewer


def test_there_is_a_row_for_each_kind_or_for_each_norm() -> None:
    assert sum("ARMSNorm" in line and "→" in line for line in printed_report(a_result()).splitlines()) == 1
    every = printed_report(a_result(every_layer=True))
    assert sum("input_layernorm" in line and "→" in line for line in every.splitlines()) == 2


def test_figures_have_at_most_four_digits() -> None:
    text = printed_report(a_result(), 200)
    tables = text[: text.index("small: AModel")].split("\n")
    for figure in (f for line in tables for f in FIGURE.findall(line)):
        assert len(figure.replace(",", "").replace(".", "").strip("0")) <= 4, figure


def test_nothing_is_claimed_about_a_model_without_proven_norms() -> None:
    left = a_result(norms=a_result().norms[2:], forward=None, training=None, saved=None)
    text = printed_report(left)
    assert "None of the 1 norms is proven" in text
    assert "exact" not in text.splitlines()[1]
    unreached = a_result(norms=(a_norm("0", {}, calls=0, rows=0, outputs=0),), forward=None, training=None, saved=None)
    assert "No output was compared" in printed_report(unreached)
    assert "exact" not in " ".join(printed_report(unreached).splitlines()[:3])
