"""Fresh environments with the wheel, and with links to exactly the distributions that its metadata requires.

The links point into the environment that runs this script. So nothing is downloaded, and neither the other packages of
that environment nor its own rmsnorm can be imported.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# No environment variable may add other packages to a Python's path.
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"PYTHONNOUSERSITE": "1"}


@dataclass(frozen=True)
class Closure:
    """The distributions that requirements need, directly or not, and the names of those that are not installed."""

    found: Mapping[str, metadata.Distribution]
    missing: frozenset[str]


def closure(requirements: Iterable[str], wheel: metadata.Distribution) -> Closure:
    """The closure of the requirements, without the wheel itself, which they may name."""
    own = canonicalize_name(wheel.name)
    found: dict[str, metadata.Distribution] = {}
    missing, done = set(), set()
    left = [Requirement(text) for text in requirements]
    while left:
        wanted = left.pop()
        name = canonicalize_name(wanted.name)
        try:
            found[name] = wheel if name == own else metadata.distribution(name)
        except metadata.PackageNotFoundError:
            missing.add(name)
            continue
        for extra in {"", *wanted.extras}:
            if (name, extra) not in done:
                done.add((name, extra))
                asked = [Requirement(text) for text in found[name].requires or ()]
                left += [one for one in asked if one.marker is None or one.marker.evaluate({"extra": extra})]
    return Closure({name: found[name] for name in found if name != own}, frozenset(missing))


def make(folder: Path, distributions: Iterable[metadata.Distribution], wheel: Path) -> str:
    """Makes an environment with these distributions and the wheel, but without pip, and returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(asked, env=CLEAN, capture_output=True, text=True, check=True).stdout.strip())
    for distribution in distributions:
        _link(distribution, packages)
    pip(python, "install", "-q", "--no-deps", "--no-index", str(wheel)).check_returncode()
    return python


def pip(python: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs the pip of this environment for the environment of another Python."""
    command = [sys.executable, "-m", "pip", "--python", python, *arguments]
    return subprocess.run(command, env=CLEAN, capture_output=True, text=True)


def _link(distribution: metadata.Distribution, packages: Path) -> None:
    """Links the files of a distribution into a folder of packages, but not its commands, which run the other Python."""
    source = Path(str(distribution.locate_file("")))
    files = {PurePosixPath(file) for file in distribution.files or ()}
    _link_entries(source, packages, PurePosixPath(), {file for file in files if ".." not in file.parts})


def _link_entries(source: Path, packages: Path, folder: PurePosixPath, files: set[PurePosixPath]) -> None:
    """Links those of the files that are in the folder; a subfolder as one link if all its files are among them."""
    for entry in sorted({folder / file.relative_to(folder).parts[0] for file in files}):
        inside = {file for file in files if entry in file.parents}
        if inside and _is_shared(source, entry, inside):
            (packages / entry).mkdir(exist_ok=True)
            _link_entries(source, packages, entry, inside)
        elif (source / entry).exists():
            (packages / entry).symlink_to(source / entry)


def _is_shared(source: Path, folder: PurePosixPath, own: set[PurePosixPath]) -> bool:
    for where, folders, names in os.walk(source / folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        here = PurePosixPath(Path(where).relative_to(source))
        if any(here / name not in own for name in names):
            return True
    return False
