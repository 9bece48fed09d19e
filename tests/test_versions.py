"""One version everywhere, and the oldest supported versions of docs/versions.md are those of pyproject.toml."""

import datetime
import re
import tomllib

import rmsnorm
from documents import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_first_release_of_the_changelog_is_this_version_with_its_date_or_unreleased() -> None:
    heading = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None
    version, _, when = heading[1].partition(" ")
    assert version == rmsnorm.__version__
    assert when == "(unreleased)" or datetime.date.fromisoformat(when.strip("()"))


def test_the_version_is_a_semantic_one_and_the_readme_names_its_wheel() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", rmsnorm.__version__)
    assert set(re.findall(r"rmsnorm-(\S+)-py3", (ROOT / "README.md").read_text())) == {rmsnorm.__version__}


def test_the_oldest_supported_versions_are_the_declared_ones() -> None:
    rows = re.findall(r"^\| (\w+) \| (\d[\d.]*) \|", (ROOT / "docs" / "versions.md").read_text(), re.MULTILINE)
    oldest = {name.lower(): version for name, version in rows}
    needed = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["hf"]]
    declared = dict(need.split(">=") for need in needed if ">=" in need)
    declared["python"] = PROJECT["requires-python"].removeprefix(">=")
    (declared["triton"],) = re.findall(r"^triton==(\d+\.\d+)", oldest_triton(), re.MULTILINE)
    assert oldest == declared


def oldest_triton() -> str:
    """What make test-integrations installs: torch itself declares which Triton it needs."""
    return (ROOT / "tests" / "integrations" / "triton-3.6.txt").read_text()
