"""README.md and docs/: code blocks run and print what is shown, figures are measured, and what is named exists."""

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import rmsnorm
from documents import ROOT, Block, blocks, documents, run, without_blocks
from rmsnorm.tools.cli import main
from scripts import benchmark_script
from tolerance import DEFINITION_SHARE, DEFINITION_ULP

SOURCE = Path(rmsnorm.__file__).parent
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
RUN = [path for path in documents() if any(b.language == "python" for b in blocks(path.read_text()))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def needing() -> list[tuple[Path, Block]]:
    return [(p, b) for p in RUN for b in blocks(p.read_text()) if any(w.startswith("needs=") for w in b.words)]


# --- code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RUN, ids=name)
def test_python_blocks_run_and_print_what_the_document_says(path: Path) -> None:
    for ran in run(path):
        if ran.output is not None:
            where = f"{name(path)}, line {ran.output.line}: run python tests/documents.py; printed was"
            assert ran.output.same(ran.printed), f"{where}\n{ran.printed}"


@pytest.mark.parametrize(("path", "block"), needing(), ids=lambda value: getattr(value, "line", None) or name(value))
def test_a_block_that_needs_a_package_compiles_and_the_text_above_names_the_package(path: Path, block: Block) -> None:
    compile(block.text, str(path), "exec")
    above = path.read_text()[: block.start].splitlines()[-4:]
    package = next(word.removeprefix("needs=") for word in block.words if word.startswith("needs="))
    spoken = {"liger_kernel": "liger", "flash_attn": "flash-attn"}.get(package, package)
    assert any(f"needs {spoken}" in line.lower() for line in above), f"the text before does not say: needs {spoken}"
    if block.missing:
        pytest.skip(f"{name(path)}, line {block.line}: {package} is not installed")


def test_an_output_that_differs_is_noticed() -> None:
    exact, vary = (
        Block("text", words, "3 of 5 differ by up to 2 ulp; early\n", 0, 1) for words in ((), ("figures-vary",))
    )
    assert exact.same("3 of 5 differ by up to 2 ulp; early\n")
    assert not exact.same("4 of 5 differ by up to 2 ulp; early\n")
    assert vary.same("0 of 5 differ; early\n")
    assert not vary.same("0 of 5 differ; late\n")


# --- commands ------------------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in a shell block, or in the running text between backticks."""
    lines = [line for block in blocks(text) if block.language == "sh" for line in block.text.splitlines()]
    lines += re.findall(r"`((?:rmsnorm|make|python) [^`]+)`", without_blocks(text))
    for line in lines:
        words = shlex.split(line, comments=True)
        if words:
            yield [Path(words[0]).name, *words[1:]]


@pytest.fixture
def help_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def show(*verb: str) -> str:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["rmsnorm", *verb, "--help"])
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == 0, f"there is no command rmsnorm {' '.join(verb)}"
        return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)

    return show


@pytest.mark.parametrize("path", [*documents(), CONTRIBUTING], ids=name)
def test_commands_and_their_options_exist(path: Path, help_of) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    known: dict[str, str] = {}
    for program, *words in commands(path.read_text()):
        if program == "make":
            for word in words:
                assert "=" in word or word in targets, f"make {word}"
        elif program == "rmsnorm":
            verb, *rest = words
            known[verb] = known.get(verb) or help_of(verb)
            for option in (word for word in rest if word.startswith("--")):
                assert re.search(rf"{option}\b", known[verb]), f"rmsnorm {verb} has no {option}"
        elif program == "python":
            files = [word for word in words if "/" in word]
            assert files or words[:1] == ["-m"], words
            for file in files:
                assert (ROOT / file).exists(), file
        else:
            assert program == "pip", f"{program} in a shell block"


def test_a_command_that_does_not_exist_is_noticed(help_of) -> None:
    assert list(commands("```sh\nmake x  # y\n```\nand `rmsnorm cost a --b`")) == [
        ["make", "x"],
        ["rmsnorm", "cost", "a", "--b"],
    ]
    assert "--frobnicate" not in help_of("cost")
    with pytest.raises(AssertionError, match="no command"):
        help_of("frobnicate")


# --- links ---------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*documents(), CONTRIBUTING], ids=name)
def test_links_between_documents_have_a_target(path: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        file = path if not target else path.parent / target
        assert file.exists(), f"{name(path)} links to {link}"
        assert not anchor or anchor in anchors(file.read_text()), f"{name(path)} links to {link}"


# --- layout --------------------------------------------------------------------------------------------------


def pictured(text: str) -> dict[str, set[str]]:
    """The entries of each folder in the picture of CONTRIBUTING.md: "src/rmsnorm/" to {"spec.py", "kernels/", ...}.

    Lines that are indented further go on with the entry above them.
    """
    (picture,) = (block.text for block in blocks(text) if block.language == "text")
    found: dict[str, set[str]] = {}
    for line in picture.splitlines():
        entry = re.match(r"( *)(\S+)", line)
        assert entry is not None, line
        if not entry[1]:
            folder = entry[2]
        found.setdefault(folder, set()).update({entry[2]} if len(entry[1]) == 2 else ())
    return found


def test_contributing_names_every_module_and_package_of_the_library() -> None:
    entries = pictured(CONTRIBUTING.read_text())
    there = {f"{path.name}/" if path.is_dir() else path.name for path in SOURCE.iterdir()}
    assert entries["src/rmsnorm/"] == there - {"__pycache__/", "py.typed"}
    for folder, names in entries.items():
        for entry in ("", *names):
            assert (ROOT / folder / entry).exists(), f"{folder}{entry}"


# --- figures -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return benchmark_script("tables")


@pytest.mark.parametrize("path", documents(), ids=name)
def test_tables_are_those_of_the_stored_results(path: Path, tables: ModuleType) -> None:
    text = path.read_text()
    assert tables.filled(text) == text, f"{name(path)} differs from benchmarks/results: run make tables"


def test_every_table_is_in_one_document_and_a_changed_figure_is_noticed(tables: ModuleType) -> None:
    texts = [path.read_text() for path in documents()]
    for part in tables.PARTS:
        marked = f"<!-- results: {part} -->\n"
        (holder,) = (text for text in texts if marked in text)
        start = holder.index(marked) + len(marked)
        digit = re.compile(r"\d").search(holder, start, holder.index("<!-- end of results -->", start))
        if digit is None:  # its results have not been measured
            assert tables.PARTS[part]() == ""
            continue
        changed = holder[: digit.start()] + str((int(digit[0]) + 1) % 10) + holder[digit.end() :]
        assert tables.filled(changed) == holder
    with pytest.raises(KeyError):
        tables.filled("<!-- results: nothing -->\n<!-- end of results -->")


# Figures with a unit that are no measurements: claims of others, constants of a prediction, sizes of downloads.
NOT_MEASURED = (
    "at least 95 %", "(98.4 %)", "(95.9 %)", "at most 8 s", "up to 10 % more",
    "15 to 20 %", "at 75 %", "or 5 µs a kernel", "about 0.5 GB", "2.2 GB", "at least 1 %",
)  # fmt: skip
MEASURED = re.compile(r"\d\s?(%|µs|us\b|ms\b|s\b|[kMGT]B\b|[GT]B/s)")


# Scripts write these as a whole: tests/patching/verdicts.py and benchmarks/founding_document.py.
GENERATED = ("verdicts.md", "founding-document.md")


@pytest.mark.parametrize("path", [p for p in documents() if p.name not in GENERATED], ids=name)
def test_measured_figures_appear_only_in_generated_tables(path: Path, tables: ModuleType) -> None:
    """A figure written by hand would go stale."""
    text = without_blocks(tables.without_results(path.read_text()))
    for known in NOT_MEASURED:
        text = text.replace(known, "")
    found = MEASURED.search(text)
    assert found is None, f"{name(path)}: {text[max(0, found.start() - 60) : found.end()]!r} is no stored result"


def test_readme_and_contract_state_the_bounds_that_are_tested() -> None:
    shares = [f"{DEFINITION_SHARE[dtype] * 1e5:.0f}·10⁻⁵" for dtype in (torch.bfloat16, torch.float16)]
    for path in (ROOT / "README.md", ROOT / "docs" / "contract.md"):
        text = re.sub(r"\s+", " ", path.read_text())
        for words in (*shares, f"{DEFINITION_ULP['early']} ulp", f"{DEFINITION_ULP['late']} ulp"):
            assert words in text, f"{name(path)} does not say {words}"


def test_the_cost_document_states_the_presets_counts_that_are_tested() -> None:
    tested = re.findall(
        r'\("([a-z0-9-]+)", (\d+), ([\d_]+)\)', (ROOT / "tests" / "tools" / "cost" / "test_model_cost.py").read_text()
    )
    rows = re.findall(
        r"^\| `([a-z0-9-]+)` \| (\d+) \| ([\d,]+) \|$", (ROOT / "docs" / "cost.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 5
    assert {(preset, norms, parameters.replace(",", "_")) for preset, norms, parameters in rows} == set(tested)


# --- messages ------------------------------------------------------------------------------------------------

# The functions whose texts `explain` repeats,
EXPLAINED = {
    "explain", "explain_norm", "_explain_gated", "_described", "refuses", "refusal", "_module", "_planner", "described",
    "remark", "_by_python", "native", "why_own_forward",
    "_why_changed", "_why_unproven", "_why_unsupported", "_unsupported_tensor", "_why_exported",
    "_why_inference_tensor", "_why_autocast", "_rmsnorm_explain",
}  # fmt: skip
# the classes whose methods of these names count,
EXPLAINED_CLASSES = {"_Replacement", "MachineCode", "TritonLaunch"}
# and the exceptions whose messages it repeats.
UNUSABLE = ("Unusable", "_Replaceable")


def sentences(tree: ast.AST) -> Iterator[str]:
    """The string literals in the code without docstrings; in an f-string … stands for each value."""
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)} - {
        id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
    }
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (inner | docs):
            yield node.value


def said_by_explain() -> Iterator[str]:
    for file in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        classes = (cls for cls in tree.body if isinstance(cls, ast.ClassDef) and cls.name not in EXPLAINED_CLASSES)
        others = {f for cls in classes for f in cls.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name in EXPLAINED and node not in others:
                yield from sentences(node)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in UNUSABLE:
                yield from sentences(node)


def test_the_troubleshooting_document_has_every_message_of_explain() -> None:
    """Compares the parts of a message between its values, if they have at least three words."""
    document = re.sub(r"\s+", " ", (ROOT / "docs" / "troubleshooting.md").read_text())
    pieces = {p.strip(" :;,()") for sentence in said_by_explain() for p in sentence.split("…")}
    pieces = {p for p in pieces if p.count(" ") >= 2}
    assert len(pieces) > 25
    missing = sorted(p for p in pieces if p not in document)
    assert not missing, f"docs/troubleshooting.md does not have {missing}"


def is_composed(words: str, code: str) -> bool:
    """Whether the code contains the words, whole or in parts of at least three words."""
    if words in code or words.count(" ") < 2:
        return True
    cuts = [i for i, letter in enumerate(words) if letter == " "][2:]
    return any(words[:i].rstrip(",:;") in code and is_composed(words[i + 1 :], code) for i in cuts)


def test_every_message_in_the_troubleshooting_document_is_in_the_code() -> None:
    """Compares the first column of its tables, by the parts of a message between its values."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    said = [s for file in SOURCE.rglob("*.py") for s in sentences(ast.parse(file.read_text()))]
    code = re.sub(r"…+", "…", " ".join(said))
    for row in re.findall(r"^\| (`.+?) \|", text, re.MULTILINE):
        for quoted in re.findall(r"`([^`]+)`", row.partition(" | ")[0]):
            for piece in re.split("…|expected ", quoted):  # every error message has this word
                words = re.sub(r"^\[\w+\]", "", piece).strip(" :;,()")
                assert is_composed(words, code), words
