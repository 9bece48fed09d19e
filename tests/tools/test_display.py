"""Formatting: units, significant digits, and nothing cut off at any width."""

import io
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmsnorm.tools import display
from rmsnorm.tools.display import Column, Table, Text, render


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (display.duration(68.123e-6), "68.12 µs"),
        (display.duration(0.01552), "15.52 ms"),
        (display.duration(96.04), "96.04 s"),
        (display.duration(0), "0 s"),
        (display.duration(1e-9), "0.001 µs"),
        (display.duration(68.123e-6, digits=3), "68.1 µs"),
        (display.duration(999.96e-6), "1 ms"),  # not 1,000 µs
        (display.size(512), "512 B"),
        (display.size(78_643_200), "78.64 MB"),
        (display.size(999_999), "1 MB"),
        (display.speed(4.1853e12), "4.185 TB/s"),
        (display.count(9_999), "9,999"),
        (display.count(60_515), "60.52 thousand"),
        (display.count(167_918_232), "167.9 million"),
        (display.count(36_641_820_958), "36.64 billion"),
        (display.share(0.1234567), "12.35 %"),
        (display.share(6.3e-6), "0.00063 %"),
        (display.share(1), "100 %"),
        (display.share(0.999999), "> 99.99 %"),
        (display.factor(3.21004), "3.21 ×"),
        (display.number(1234567.0, "GB/s"), "1,235,000 GB/s"),
        (display.number(-0.5), "-0.5"),
        (display.number(math.inf), "∞"),
    ],
)
def test_numbers_have_a_unit_and_at_most_four_significant_digits(text, expected) -> None:
    assert text == expected


@pytest.mark.parametrize("form", [display.duration, display.size, display.speed, display.count, display.share])
def test_unknown_values_are_printed_as_a_dash(form) -> None:
    assert form(None) == form(math.nan) == "–"


@given(st.floats(1e-9, 1e15), st.sampled_from([display.duration, display.size, display.share, display.factor]))
def test_no_number_has_an_exponent_or_more_digits(value, form) -> None:
    figure = form(value).removeprefix("> ").split(" ")[0].replace(",", "")
    assert "e" not in figure
    assert len(figure.replace(".", "").strip("0")) <= 4
    scale = {"s": 1, "ms": 1e-3, "µs": 1e-6, "%": 1e-2, "×": 1, "B": 1}
    scale |= {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}
    assert float(figure) * scale[form(value).split(" ")[-1]] == pytest.approx(value, rel=6e-4)


FIGURES = ["68.12 µs", "1,235,000 GB/s", "167.9 million", "0.00063 %", "–"]
TABLE = Table(
    "Forward, bfloat16",
    (Column("rows × columns", words=True), *(Column(f"peer {i} / ours") for i in range(9)), Column("why", words=True)),
    tuple((f"{M} × 1280", *(FIGURES * 2)[:9], "nothing to report, but at some length") for M in (1, 8192)),
)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_a_table_fits_the_width_and_no_figure_is_cut_off(width) -> None:
    text = render([TABLE], width)
    assert max(map(len, text.splitlines())) <= width
    for figure in set(FIGURES):
        assert len(re.findall(rf"(?<!\S){re.escape(figure)}(?!\S)", text)) == 2 * (FIGURES * 2)[:9].count(figure)
    assert text.count("nothing") == text.count("length") == 2
    for part in text.split("\n\n"):  # every part names the rows
        assert part.startswith("Forward, bfloat16\n")
        assert "8192 × 1280" in part


@given(st.lists(st.lists(st.sampled_from(FIGURES), min_size=6, max_size=6), max_size=4), st.integers(1, 130))
def test_every_figure_of_any_table_is_printed_whole(rows, width) -> None:
    columns = (Column("name", words=True), *(Column(f"column {i}") for i in range(6)))
    text = render([Table("", columns, tuple(("norm", *row) for row in rows))], width)
    for figure in FIGURES:
        wanted = sum(row.count(figure) for row in rows)
        assert len(re.findall(rf"(?<!\S){re.escape(figure)}(?!\S)", text)) == wanted
    assert max(map(len, text.splitlines())) <= max(40, width)


def test_a_line_wraps_between_words_but_not_between_a_number_and_its_unit() -> None:
    said = "  tried 167.9 million outputs in 96.04 s at 4.185 TB/s, and 12.3 % of 8192 × 1280 twice"
    for width in range(40, 90):
        lines = render([said], width).splitlines()
        assert max(map(len, lines)) <= width
        assert all(line.startswith("  ") for line in lines)
        assert " ".join(line.strip() for line in lines) == said.strip()
        for figure in ("167.9 million", "96.04 s", "4.185 TB/s", "12.3 %", "8192 × 1280"):
            assert any(figure in line for line in lines)


def test_a_command_does_not_wrap() -> None:
    command = "rmsnorm verify --device cuda --only 'bf16, weight bf16, early' --json /tmp/result.json"
    assert render([Text(command, fold=False)], 60).splitlines() == [command]


def test_a_long_word_is_broken_only_in_a_table() -> None:
    path = "/models/" + "a" * 60
    assert render([path], 40).splitlines() == [path]
    drawn = render([Table("", (Column("n"), Column("path", words=True)), (("1", path),))], 40)
    assert max(map(len, drawn.splitlines())) <= 40
    assert "".join(line[3:] for line in drawn.splitlines()[2:]) == path


def test_control_characters_are_escaped() -> None:
    table = Table("", (Column("class", words=True),), (("Evil\x1b[2J",),))
    assert "\x1b" not in render(["a \x1b[31m b", table])
    assert "\\x1b[2J" in render([table])


def test_colors_change_no_text() -> None:
    blocks = [Text("green", "good"), Table("title", (Column("n"),), ((Text("1", "bad"),),))]
    colored = render(blocks, color=True)
    assert "\x1b[32mgreen\x1b[0m" in colored
    assert re.sub(r"\x1b\[\d+m", "", colored) == render(blocks)


def test_colors_are_used_on_terminals_unless_no_color_is_set(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert display.colored(Terminal())
    assert not display.colored(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not display.colored(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not display.colored(Terminal())


def test_the_width_is_that_of_columns(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert display.terminal_width() == 60
