"""docs/failures.md: every fault has a report and tests, and the tests exist."""

import re

import pytest

from named_tests import ROOT, exists

TEXT = (ROOT / "docs" / "failures.md").read_text()
ROWS = [row for row in re.findall(r"^\| (.+) \|$", TEXT, re.MULTILINE) if not row.startswith(("fault |", "---"))]
LINK = re.compile(r"\[([\w.-]+)#(\d+)\]\(https://github\.com/[\w.-]+/\1/(?:issues|pull)/\2\)")


def test_there_is_a_row_for_each_class_of_fault() -> None:
    assert len(ROWS) > 40
    assert len({row.partition(" | ")[0] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.partition(" | ")[0])
def test_a_fault_has_a_well_formed_report_and_tests_that_exist(row: str) -> None:
    _, report, guards = row.split(" | ")
    assert LINK.search(report)
    assert "](" not in LINK.sub("", report), "a link whose text is not the repository and number of its address"
    named = re.findall(r"`([^`]+)`", guards)
    assert named
    assert re.sub(r"`[^`]+`", "", guards).strip(", ") == ""
    assert not [test for test in named if not exists(test)]


@pytest.mark.parametrize(
    "name",
    [
        "tests/test_reference.py::test_that_is_not_there",
        "tests/test_that_is_not_there.py::test_truth_passes_gradcheck_and_gradgradcheck",
        "tests/test_reference.py::steps",
        "src/rmsnorm/spec.py::test_x",
    ],
)
def test_a_test_that_does_not_exist_is_noticed(name: str) -> None:
    assert not exists(name)
