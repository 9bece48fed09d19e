"""The rules for every printed result, whichever command prints it."""

import re
from collections.abc import Iterable

from rmsnorm.tools.display import Block, Text, render

_FIGURE = re.compile(
    r"(?<![\w.])([\d,]*\.?\d+) (?:s|ms|µs|[kMGTP]?B|[kMGTP]?B/s|thousand|million|billion|%|×(?! \d))(?!\w)"
)


def check(blocks: Iterable[Block]) -> str:
    """The text at 80 columns.

    Asserts that it fits 80 and 60 columns, that nothing is cut off, and that no figure has more than four digits.
    """
    blocks = list(blocks)
    commands = {block.text for block in blocks if isinstance(block, Text) and not block.fold}
    whole = render(blocks, 1000)
    figures = _FIGURE.findall(whole)
    for width in (80, 60):
        text = render(blocks, width)
        long = [line for line in text.splitlines() if len(line) > width and line not in commands]
        assert not long, long
        assert "…" not in text
        assert set(_FIGURE.findall(text)) == set(figures)
    for figure in figures:
        digits = figure.replace(",", "").replace(".", "").strip("0")
        assert len(digits) <= 4, figure
    return render(blocks, 80)
