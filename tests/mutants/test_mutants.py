"""The list of mutants: each still applies, and the tests that it names exist. `make test-mutants` runs them."""

import ast

import pytest

from mutants import MUTANTS, Mutant
from named_tests import ROOT, exists
from runner import documented


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.name}")
def test_a_mutant_applies_to_exactly_one_place_and_names_tests_that_exist(mutant: Mutant) -> None:
    text = (ROOT / mutant.path).read_text()
    changed = mutant.applied_to(text)
    assert changed != text
    if mutant.path.endswith(".py"):
        ast.parse(changed)
    assert mutant.tests
    assert not [test for test in mutant.tests if not exists(test)]


def test_mutants_are_at_least_sixty_and_no_two_are_the_same() -> None:
    assert len(MUTANTS) >= 60
    for key in (lambda m: (m.file, m.name), lambda m: (m.file, m.text, m.replacement)):
        assert len({key(mutant) for mutant in MUTANTS}) == len(MUTANTS)


def test_a_text_that_is_missing_or_occurs_twice_is_an_error() -> None:
    mutant = Mutant("drops a term", "reference.py", "a + b", "a", ("tests/test_reference.py::test_x",))
    assert mutant.applied_to("y = a + b") == "y = a"
    for text, count in (("y = a", 0), ("y = a + b; z = a + b", 2)):
        with pytest.raises(ValueError, match=f"occurs {count} times in reference.py, expected once"):
            mutant.applied_to(text)


def test_the_document_has_each_mutant_with_a_test_that_it_names() -> None:
    named = {(m.name, m.file): {test.partition("[")[0] for test in m.tests} for m in MUTANTS}
    rows = documented()
    assert list(rows) == list(named), "run make test-mutants"
    for mutant, red in rows.items():
        assert red in named[mutant], f"{mutant}: run make test-mutants"
