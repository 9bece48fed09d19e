"""Applies each mutant of mutants.py to a copy of the package, and checks that one of the tests that it names turns red.

    python tests/mutants/runner.py                       # all of them
    python tests/mutants/runner.py host.cpp "is wrong"   # those whose file or name contains one of these

The tests must be green without a mutant; the runner checks that first. The copy has its own caches, so that no machine
code of a mutant is left behind. A test is red if it fails or its process dies. A skipped test counts as neither red nor
green. The runner writes the rows of the mutants that it has run into docs/mutants.md.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "mutants.md"
COPIED = ("src", "tests", "pyproject.toml")
LIMIT_S = 900  # for the tests of one mutant: some wait forever if the code is wrong

HEADER = """# Mutants

Each row shows a small change that makes the code wrong, and the first test that failed with it. `make test-mutants`
applies the changes one at a time and writes the rows. [failures.md](failures.md) lists faults that users of other norms
have reported.

| what is changed | in | the test that turns red |
| --- | --- | --- |
"""


@dataclass(frozen=True)
class Outcome:
    """red: the first test that failed; "" if none did. fault: why the run does not count; "" if it does."""

    red: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Tree:
    """A copy of the package and its tests."""

    folder: Path
    caches: Path

    @classmethod
    def copied_to(cls, folder: Path, caches: Path) -> "Tree":
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            else:
                shutil.copy(source, folder / name)
        caches.mkdir(mode=0o700, exist_ok=True)
        return cls(folder, caches.absolute())

    def run(self, tests: Iterable[str], *options: str) -> tuple[int | None, dict[str, str]]:
        """Runs tests; returns pytest's exit status, None after LIMIT_S, and the result of each test."""
        results = self.folder / "results.xml"
        results.unlink(missing_ok=True)
        paths = [str(self.folder / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        folders = ("RMSNORM_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        variables = {name: str(self.caches / name.lower()) for name in folders}
        # Without files of bytecode, because Python does not notice two edits of one size within a second.
        variables |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=unshrunk"]
        command.append(f"--junitxml={results}")
        process = subprocess.Popen(
            [*command, *options, *tests], cwd=self.folder, env={**os.environ, **variables},
            stdout=(self.folder / "output").open("w"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None, {}
        return status, _results(results) if results.exists() else {}

    def last_words(self) -> str:
        """The last two lines of pytest's output; a test that does not exist is named within them."""
        lines = [line for line in (self.folder / "output").read_text().splitlines() if line]
        return " ".join(lines[-2:])

    def outcome(self, mutant: Mutant) -> Outcome:
        """What the tests say about the mutant."""
        file = self.folder / mutant.path
        text = file.read_text()
        file.write_text(mutant.applied_to(text))
        try:
            status, results = self.run(mutant.tests, "-x")
        finally:
            file.write_text(text)
        red = next((test for test, result in results.items() if result == "red"), "")
        if status is None:
            return Outcome(fault=f"the tests took more than {LIMIT_S} s")
        if status < 0:  # the process died, in one of the tests
            return Outcome(red=mutant.tests[0])
        if status != 0 and not red:
            return Outcome(fault=f"pytest ended with status {status}: {self.last_words()}")
        return Outcome(red=red)


def _results(file: Path) -> dict[str, str]:
    """green, red or skipped, by the name of the test."""
    found = {}
    for case in ElementTree.parse(file).iter("testcase"):
        if not case.get("classname"):  # a file that cannot be imported
            continue
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        kinds = {child.tag for child in case}
        found[name] = "red" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "green"
    return found


def not_green(tree: Tree, mutants: Iterable[Mutant]) -> list[str]:
    """The reasons why the tests of these mutants are not all green without a mutant; empty if they are."""
    named = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    status, results = tree.run(named)
    if not results:
        return [f"pytest ended with status {status}: {tree.last_words()}"]
    faults = [f"{result}: {test}" for test, result in results.items() if result != "green"]
    faults += [f"not run: {test}" for test in named if not any(_is_of(one, test) for one in results)]
    return faults or ([] if status == 0 else [f"pytest ended with status {status}: {tree.last_words()}"])


def _is_of(test: str, named: str) -> bool:
    return test == named or test.startswith(f"{named}[")


def row(mutant: Mutant, red: str) -> str:
    return f"| {mutant.name} | `{mutant.file}` | `{red}` |"


def documented() -> dict[tuple[str, str], str]:
    """The red test of each row of the document, by the name and the file of the mutant."""
    text = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \| `(.+?)` \|$", text, re.MULTILINE)
    return {(name, file): red for name, file, red in rows}


def write(found: dict[tuple[str, str], str]) -> None:
    """Writes the document with these red tests, and for other mutants with those that it had before."""
    red = documented() | found
    rows = [row(m, red[m.name, m.file]) for m in MUTANTS if (m.name, m.file) in red]
    DOCUMENT.write_text(HEADER + "\n".join(rows) + "\n")


def _chosen(words: list[str]) -> list[Mutant]:
    found = [m for m in MUTANTS if not words or any(word in m.name or word in m.file for word in words)]
    if not found:
        raise SystemExit(f"no mutant has one of {words} in its name or file")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run only the mutants with one of these in their name or file")
    parser.add_argument("--caches", type=Path, help="keep machine code in this folder, for a faster next run")
    options = parser.parse_args()
    mutants = _chosen(options.words)
    began, wrong = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="rmsnorm-mutants-") as folder:
        tree = Tree.copied_to(Path(folder), options.caches or Path(folder) / "caches")
        print(f"{len(mutants)} mutants; first their tests without them", flush=True)
        if faults := not_green(tree, mutants):
            print("not green without a mutant:", *faults, sep="\n  ")
            return 1
        for i, mutant in enumerate(mutants, 1):
            start = time.monotonic()
            outcome = tree.outcome(mutant)
            said = outcome.fault or outcome.red or "SURVIVED"
            took = time.monotonic() - start
            print(f"{i:3d} {took:5.0f} s  {mutant.name} ({mutant.file}): {said}", flush=True)
            if outcome.red:
                write({(mutant.name, mutant.file): outcome.red.partition("[")[0]})
            else:
                wrong.append(f"{mutant.name} ({mutant.file})")
    print(f"{len(mutants) - len(wrong)} of {len(mutants)} caught, in {(time.monotonic() - began) / 60:.0f} minutes")
    if wrong:
        print("not caught:", *wrong, sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
