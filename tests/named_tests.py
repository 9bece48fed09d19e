"""Tests that documents and lists of mutants name as path::test, with or without parameters, relative to the checkout."""

import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def exists(name: str) -> bool:
    """Whether there is a test function of this name. Parameters, which only pytest knows, are not compared."""
    path, _, rest = name.partition("::")
    return rest.partition("[")[0] in _functions(path)


@functools.cache
def _functions(path: str) -> set[str]:
    """The test functions of a file."""
    file = ROOT / path
    known = path.startswith("tests/") and file.is_file()
    return set(re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE)) if known else set()
