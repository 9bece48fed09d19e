"""docs/security.md: every dependency is listed with its licence."""

import importlib.metadata
import re
import tomllib

import pytest

from documents import ROOT

TABLE = re.compile(r"^\| ([a-z-]+) \| (always|extra `\w+`|building) \| (.+) \|$", re.MULTILINE)
# A word of each licence, as it stands in the metadata of packages.
WORDS = ("BSD", "MIT", "Apache", "MPL", "matplotlib")


def listed() -> dict[str, tuple[str, str]]:
    return {name: (use, licence) for name, use, licence in TABLE.findall((ROOT / "docs" / "security.md").read_text())}


def declared() -> dict[str, str]:
    """What needs each dependency, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = {
        "building": project["build-system"]["requires"],
        "always": project["project"]["dependencies"],
        **{f"extra `{name}`": needed for name, needed in project["project"]["optional-dependencies"].items()},
    }
    found = {re.split(r"[<>=\[ ;]", one)[0]: use for use, needed in groups.items() for one in needed}
    return {name: use for name, use in found.items() if name != "rmsnorm"}


def test_every_dependency_is_listed_with_its_licence() -> None:
    assert {name: use for name, (use, _) in listed().items()} == declared()


@pytest.mark.parametrize("name", sorted(listed()))
def test_the_licence_is_that_of_the_installed_package(name: str) -> None:
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    fields = (metadata.get("License-Expression"), metadata.get("License"), *(metadata.get_all("Classifier") or ()))
    stated = " ".join(field for field in fields if field)
    licence = listed()[name][1]
    assert any(word in licence and word in stated for word in WORDS), f"{licence}, but the package says {stated[:200]}"
