"""docs/founding-document.md: it is what its script computes, and no figure of an answer is typed."""

import ast
import re
from importlib.metadata import version
from types import ModuleType

import pytest

from documents import ROOT
from scripts import FOLDER, benchmark_script

pytest.importorskip("transformers", reason="the page is about classes of transformers")
PAGE = ROOT / "docs" / "founding-document.md"
# Names of dtypes, classes and the like have digits that are no figures.
NAMES = re.compile(r"\b(bf16|fp16|fp32|fp64|T5\w*|float16|bfloat16|DeepSeek-V2|DeepseekV2\w*|modeling_deepseekv2)\b")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return benchmark_script("founding_document")


def test_the_page_is_what_its_script_writes(script: ModuleType) -> None:
    """Whether figures of eager code stay the same with other versions of torch and transformers is not known."""
    text = PAGE.read_text()
    found = re.search(r"with torch (\S+) and\s+transformers (\S+) on a CPU", text)
    assert found is not None
    pinned = dict(re.findall(r"^(torch|transformers)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert (pinned["torch"], pinned["transformers"]) == found.groups(), "run make tables with the pinned versions"
    here = {name: version(name).partition("+")[0] for name in pinned}
    if here != pinned:
        pytest.skip(f"the page was written with {pinned}; installed are {here}")
    assert script.page() == text, "docs/founding-document.md differs from its script: run make tables"


def answers() -> list[ast.expr]:
    """The expression of `so` in each row of the script."""
    tree = ast.parse((FOLDER / "founding_document.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Row"]
    return [call.args[2] for call in calls]


def typed_figures(answer: ast.expr) -> list[str]:
    """The digits of an answer that no computation gives: in its text, or as a constant between braces."""
    inner = {id(n) for v in ast.walk(answer) if isinstance(v, ast.FormattedValue) for n in ast.walk(v)}
    texts = [n.value for n in ast.walk(answer) if isinstance(n, ast.Constant) and isinstance(n.value, str)
             and id(n) not in inner]  # fmt: skip
    values = [v.value for v in ast.walk(answer) if isinstance(v, ast.FormattedValue)]
    constants = [ast.unparse(v) for v in values if not any(isinstance(n, ast.Name) for n in ast.walk(v))]
    return [text for text in texts if re.search(r"\d", NAMES.sub("", text))] + constants


def test_no_figure_of_an_answer_is_typed() -> None:
    found = answers()
    assert len(found) > 40
    assert not [figures for answer in found if (figures := typed_figures(answer))]
    for typed in ('f"{n} bytes, 2.56 KB"', 'f"{25} norms"', '"x" + "81 norms"'):
        assert typed_figures(ast.parse(typed, mode="eval").body), typed
    assert not typed_figures(ast.parse('f"{n:.2f} in bf16"', mode="eval").body)


def test_figures_are_those_of_the_sizes_that_are_given(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "speeds", lambda e: {"Definition": 30.0, "LayerNorm": 10.0, "ours": 8.2})
    e = script.Example(2, 64, 640)
    N, M = 2 * 64 * 640, 2 * 64
    said = {row.said: row for claims in script.rows(e).values() for row in claims}

    def row(start: str):
        (found,) = (r for said_, r in said.items() if said_.startswith(start))
        return found

    assert f"{4 * N + 2 * M:,} FLOPs" in row("for B = 1").so
    assert row("for B = 1").holds == "no"
    assert f"{10 * N + 3 * M - 640:,}" in row("for B = 1").so
    assert (row("x²").holds, row("in total 3N").holds, row("mean along").holds) == ("yes", "no", "no")
    assert row("`fp32_input`").so == f"{4 * N:,} bytes."
    assert row("`fp32_input`").holds == "no"  # of another size
    peaks = (8 * N + 8 * M, 12 * N + 8 * M, 26 * N + 2 * 640)
    assert [script.size(nbytes) for nbytes in peaks] == re.findall(r"[\d.]+ kB|[\d.]+ MB", row("peak: ").so)
    assert f"{640 * 2:,} bytes" in row("gradient of the weight").so
    assert f"{640 * 3 * 2 + 4:,} bytes" in row("in total ~13 KB").so
    assert "3 × the time" in row("~15–20 %").so
    assert row("~15–20 %").holds == "in part"
    assert "25. With 40 layers there would be 81" in row("in total 81").so  # a fact of the model


def test_each_claim_is_on_the_page_once_with_a_verdict(script: ModuleType) -> None:
    rows = re.findall(r"^\| (.+?) \| (yes|no|in part|not checked) \| (.+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert len({said for said, *_ in rows}) == len(rows) == len(answers()) + 3  # one call makes the rows of 4 tensors
    functions = {name for *_, known in rows for name in re.findall(r"`(\w+)`", known)} - {"T5LayerNorm"}
    assert functions
    assert all(hasattr(script, name) for name in functions if name != "load_state_dict"), functions
