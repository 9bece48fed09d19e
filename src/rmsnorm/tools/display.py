"""Formats what a command prints: numbers with their units, and lines and tables that fit the terminal.

    printing.blocks(result) -> blocks (strings, Text, Table) -> render(blocks, width, color) -> text

Nothing is ever cut off. Text wraps; columns of numbers do not, and a table that is too wide is split into several, one
below the other, which all repeat the first column. The text is the same on a terminal and in a pipe, except for its
width and its colors.
"""

import math
import os
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO

# --- numbers -------------------------------------------------------------------------------------------------

NOTHING = "–"
_DIGITS = 4


def number(value: float | None, unit: str = "", digits: int = _DIGITS) -> str:
    """Format a number with at most `digits` significant digits and its unit: `1,235 GB/s`.

    Args:
        value: The number; None and NaN give a dash.
        unit: What follows the number after a space.
        digits: How many significant digits are printed; trailing zeros are dropped.

    Returns:
        The text, without an exponent.

    Example:
        >>> number(0.0000123456, "%")
        '0.00001235 %'
    """
    if value is None or math.isnan(value):
        return NOTHING
    text = "∞" if value > 0 else "-∞"
    if math.isfinite(value):
        rounded = float(f"{value:.{digits - 1}e}")
        exponent = math.floor(math.log10(abs(rounded))) if rounded else 0
        text = f"{rounded:,.{max(0, digits - 1 - exponent)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{text} {unit}" if unit else text


def _scaled(value: float | None, units: Sequence[tuple[float, str]], digits: int) -> str:
    """Format in the largest unit in which the printed number is at least 1; the smallest unit is the last one."""
    if value is None or math.isnan(value):
        return NOTHING
    rounded = abs(float(f"{value:.{digits - 1}e}"))
    size, unit = next(((size, unit) for size, unit in units if rounded >= size), units[-1])
    return number(value / size, unit, digits)


def duration(seconds: float | None, digits: int = _DIGITS) -> str:
    """Format seconds: `1.5 s`, `15.52 ms` or `68.1 µs`; None gives a dash."""
    if seconds == 0:
        return "0 s"
    return _scaled(seconds, ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")), digits)


_SIZES = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def size(count: float | None, digits: int = _DIGITS) -> str:
    """Format bytes in SI units (1 MB is 10⁶ bytes): `512 B`, `78.64 MB`; None gives a dash."""
    return _scaled(count, _SIZES, digits)


def speed(bytes_per_second: float | None, digits: int = _DIGITS) -> str:
    """Format bytes per second in SI units: `4.185 TB/s`; None gives a dash."""
    return _scaled(bytes_per_second, tuple((scale, f"{unit}/s") for scale, unit in _SIZES), digits)


def count(value: float | None, digits: int = _DIGITS) -> str:
    """Format a count: exactly below 10,000, else as `60.52 thousand` or `167.9 million`; None gives a dash."""
    if value is not None and abs(value) < 10_000 and value == int(value):
        return f"{int(value):,}"
    units = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand"), (1.0, ""))
    return _scaled(value, units, digits)


def share(part: float | None, digits: int = _DIGITS) -> str:
    """Format a share of 1 in percent: `12.3 %`. A share below 1 is never printed as `100 %`; None gives a dash."""
    if part is not None and part < 1 and float(f"{100 * part:.{digits - 1}e}") == 100:
        return f"> {number(100 * (1 - 10.0**-digits), '%', digits)}"
    return number(None if part is None else 100 * part, "%", digits)


def signed_share(part: float | None, digits: int = 2) -> str:
    """Format a change as a share with its sign: `+3.6 %`; None gives a dash."""
    return NOTHING if part is None else f"{'+' if part > 0 else ''}{number(100 * part, '%', digits)}"


def factor(value: float | None, digits: int = _DIGITS) -> str:
    """Format a factor: `3.21 ×`; None gives a dash."""
    return number(value, "×", digits)


# --- blocks --------------------------------------------------------------------------------------------------

Style = Literal["", "title", "good", "bad", "note"]
_CODES: dict[Style, str] = {"title": "1", "good": "32", "bad": "31", "note": "2"}


@dataclass(frozen=True)
class Text:
    """A line or a cell of a table, in a style. `fold` is False for text that must not wrap, such as a command."""

    text: str
    style: Style = ""
    fold: bool = True


@dataclass(frozen=True)
class Column:
    """A column of text (`words`), which is aligned to the left and may wrap, or of numbers."""

    header: str
    words: bool = False


@dataclass(frozen=True)
class Table:
    """A table. Its first column names the rows; it is repeated if the table is split because it is too wide."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str | Text, ...], ...]


Block = str | Text | Table

_NARROWEST = 40  # the narrowest layout; a narrower terminal wraps by itself
_FEWEST_WORDS, _LONGEST_WORD = 14, 24  # the narrowest column of text, and the longest word that is not broken
_GAP = "  "
# The space between a number and its unit, and the spaces in a shape such as 8192 × 1280: no line breaks there.
_UNIT = re.compile(r"(?<=\d) (?=(?:s|ms|µs|[kMGTP]?B|thousand|million|billion|trillion|×|%)(?![\w%]))|(?<=\d ×) (?=\d)")


def render(blocks: Iterable[Block], width: int = 80, color: bool = False) -> str:
    """Render blocks as text, with an empty line before each table and lines of at most `width` characters.

    Args:
        blocks: Lines and tables. Control characters in them are escaped.
        width: The width of a line in characters. Only a longer word, number or command exceeds it.
        color: Whether to add the terminal's escape codes for the styles.

    Returns:
        The text, which ends with a line break unless it is empty.
    """
    width = max(width, _NARROWEST)
    lines: list[str] = []
    for block in blocks:
        if isinstance(block, Table):
            for part in _split(block, width):
                lines += ["", *_draw_part(part, block, width, color)]
        else:
            cell = _cell(block)
            lines += [_with_style(line, cell.style, color) for line in _wrapped(cell, width)]
    return "\n".join(lines[1:] if lines and not lines[0] else lines) + ("\n" if lines else "")


def printable(text: str) -> str:
    """Escape control characters, and those that change the direction of text; names in a model can have any."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def terminal_width() -> int:
    """Return the width of standard output: COLUMNS if that is set, else the terminal's, or 80 without a terminal."""
    return shutil.get_terminal_size((80, 24)).columns


def colored(stream: TextIO) -> bool:
    """Return whether to use colors: on a terminal that supports them, unless NO_COLOR is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


# --- how it is laid out --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Some columns of a table, by their indices, and their widths."""

    columns: tuple[int, ...]
    widths: tuple[int, ...]


def _cell(cell: str | Text) -> Text:
    cell = Text(cell) if isinstance(cell, str) else cell
    return Text(printable(cell.text), cell.style, cell.fold)


def _wrapped(cell: Text, width: int, hard: bool = False) -> list[str]:
    """Wrap a text, keeping numbers and their units together. `hard` also breaks words that are longer than a line."""
    if not cell.fold:
        return cell.text.splitlines()
    lines = []
    for line in cell.text.splitlines() or [""]:
        indent = line[: len(line) - len(line.lstrip())]
        folded = textwrap.wrap(
            _UNIT.sub("\N{NO-BREAK SPACE}", line),
            width,
            subsequent_indent=indent,
            break_long_words=hard,
            break_on_hyphens=False,
        )
        lines += [part.replace("\N{NO-BREAK SPACE}", " ") for part in folded] or [""]
    return lines


def _with_style(text: str, style: Style, color: bool) -> str:
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if color and style and text else text


def _split(table: Table, width: int) -> list[_Part]:
    """Split a table into as few parts as possible that fit the width and together have all columns."""
    parts: list[_Part] = []
    taken = [0]
    for i in range(1, len(table.columns)):
        if len(taken) > 1 and _line([_least(table, j) for j in (*taken, i)]) > width:
            parts.append(_fit(table, taken, width))
            taken = [0]
        taken.append(i)
    return [*parts, _fit(table, taken, width)]


def _fit(table: Table, columns: Sequence[int], width: int) -> _Part:
    """Choose the widths of columns: the natural ones, or narrower ones for which headers wrap, and then text."""
    loose, tight, least = ([needs(table, i) for i in columns] for needs in (_loose, _tight, _least))
    bounds = (loose, tight) if _line(tight) <= width else (tight, least)
    return _Part(tuple(columns), tuple(_narrow_to(*bounds, width)))


def _line(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _longest_cell(table: Table, i: int) -> int:
    return max((len(line) for row in table.rows for line in _cell(row[i]).text.splitlines()), default=0)


def _loose(table: Table, i: int) -> int:
    return max(len(table.columns[i].header), _longest_cell(table, i))


def _tight(table: Table, i: int) -> int:
    return max(*(len(word) for word in ["", *table.columns[i].header.split()]), _longest_cell(table, i), 1)


def _least(table: Table, i: int) -> int:
    if not table.columns[i].words:
        return _tight(table, i)
    word = max((len(word) for row in table.rows for word in _cell(row[i]).text.split()), default=0)
    return min(_tight(table, i), max(_FEWEST_WORDS, min(word, _LONGEST_WORD)))


def _narrow_to(wanted: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    """Start with the wanted widths, and narrow the widest column that can be narrowed until the line fits."""
    widths = list(wanted)
    while _line(widths) > width:
        widest = max(range(len(widths)), key=lambda i: (widths[i] > least[i], widths[i]))
        if widths[widest] <= least[widest]:
            break
        widths[widest] -= 1
    return widths


def _draw_part(part: _Part, table: Table, width: int, color: bool) -> list[str]:
    lines = [_with_style(line, "title", color) for line in _wrapped(Text(table.title), width)] if table.title else []
    headers = tuple(Text(column.header, "note") for column in table.columns)
    lines += _row(part, table, headers, color)
    lines.append(_with_style(_GAP.join("─" * w for w in part.widths), "note", color))
    for row in table.rows:
        lines += _row(part, table, row, color)
    return lines


def _row(part: _Part, table: Table, row: Sequence[str | Text], color: bool) -> list[str]:
    cells, columns = [], []
    for i, width in zip(part.columns, part.widths, strict=True):
        cell, words = _cell(row[i]), table.columns[i].words
        of_header = cell.text == table.columns[i].header
        columns.append(_wrapped(cell, width, hard=words) if words or of_header else cell.text.splitlines())
        cells.append(cell)
    lines = []
    for k in range(max(map(len, columns))):
        line = []
        for i, width, cell, column in zip(part.columns, part.widths, cells, columns, strict=True):
            text = column[k] if k < len(column) else ""
            padded = text.ljust(width) if table.columns[i].words else text.rjust(width)
            line.append(padded.replace(text, _with_style(text, cell.style, color)) if text else padded)
        lines.append(_GAP.join(line).rstrip())
    return lines
