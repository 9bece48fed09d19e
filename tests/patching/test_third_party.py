"""The part of docs/verdicts.md about other libraries, and the classes of those that are installed."""

import re

import pytest
import torch

import third_party
from third_party import NORMS, Norm
from verdict_table import parts, without_figures

HEADER = "| library | class | verdict | float32 | bfloat16 | float16 |"
VERDICT = re.compile(r"(without a weight, )?(early|late|first)\b|left: \S|cannot be imported or built: \w+Error")
FIGURE = re.compile(r"0|\d(\.\d+)?(e-\d+)?, \d+ ulp|-")


def lines() -> list[str]:
    """The lines of the table, one for each class."""
    written = parts()[1].splitlines()
    return written[written.index(HEADER) + 2 :]


def test_the_table_has_a_line_for_each_class_in_the_form_that_the_script_writes() -> None:
    assert len(lines()) == len(NORMS)
    for norm, line in zip(NORMS, lines(), strict=True):
        library, name, verdict, *figures = re.split(r" (?<!\\)\| ", line.removeprefix("| ").removesuffix(" |"))
        proven = VERDICT.match(verdict)
        assert proven, verdict
        assert library == norm.library or re.fullmatch(re.escape(norm.library) + r" \d[\w.]*", library)
        assert name.partition(" (")[0] == f"{norm.where}.{norm.cls}"
        assert len(figures) == 3
        assert all(map(FIGURE.fullmatch, figures)), figures
        assert ("-" in figures) == verdict.startswith(("left", "cannot"))


def test_every_class_has_one_line() -> None:
    assert len({(n.where, n.cls, str(n.arguments)) for n in NORMS}) == len(NORMS)


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: f"{n.library}-{n.cls}")
def test_the_line_of_an_installed_class_is_current(norm: Norm) -> None:
    line = lines()[NORMS.index(norm)]
    if norm.version is None:
        pytest.skip(f"{norm.library} is not installed")
    if not line.startswith(f"| {norm.library} {norm.version} "):
        pytest.skip(f"docs/verdicts.md is of another version of {norm.library} than {norm.version}")
    if torch.__version__.partition("+")[0] != "2.13.0":
        pytest.skip(f"docs/verdicts.md was written with torch 2.13.0, this is {torch.__version__}")
    assert without_figures(norm.line()) == without_figures(line), "run: python tests/patching/third_party.py"


def test_a_class_that_cannot_be_built_gets_a_line_with_the_reason() -> None:
    assert Norm("torch", "torch.nn", "RMSNorm").line() == (
        f"| torch {third_party.NORMS[0].version} | torch.nn.RMSNorm | cannot be imported or built: TypeError: "
        "RMSNorm.__init__() missing 1 required positional argument: 'normalized_shape' | - | - | - |"
    )
    absent = Norm("no-such-library", "no_such_library.layers", "RMSNorm").line()
    assert absent.startswith(
        "| no-such-library | no_such_library.layers.RMSNorm | cannot be imported or built: ModuleN"
    )
