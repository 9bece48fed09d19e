"""Builds the sdist and the wheel, compares them with git, and tests the wheel in fresh environments.

    python tests/wheel/runner.py BUILDER               # the Python of an environment with hatchling: make test-wheel
    python tests/wheel/runner.py BUILDER hf "no extra" # only these environments

The environments hold the wheel with torch alone, with its dependencies, and with each of its extras (environments.py);
checks.py runs in each. If the environment that runs this script lacks a distribution, that is printed, and the
environment that needs it is skipped. Exits with 1 if anything is wrong.
"""

import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from archives import ROOT, Built, build, tracked, wrong_contents
from environments import CLEAN, closure, make, pip

CHECKS = ROOT / "tests" / "wheel" / "checks.py"


@dataclass(frozen=True)
class Environment:
    """requirement: what it holds besides the wheel, which may be the wheel with an extra."""

    name: str
    requirement: str


def environments(wheel: metadata.Distribution) -> list[Environment]:
    extras = wheel.metadata.get_all("Provides-Extra") or []
    return [
        Environment("torch alone", "torch"),
        Environment("no extra", wheel.name),
        *(Environment(extra, f"{wheel.name}[{extra}]") for extra in extras),
    ]


def wrong_requirements(python: str, environment: Environment, left_out: set[str]) -> list[str]:
    """What pip finds missing or in conflict, except the dependencies that were left out on purpose."""
    complaints = [line for line in pip(python, "check").stdout.splitlines() if line != "No broken requirements found."]
    expected = {line for line in complaints if any(f"requires {name}, which is not" in line for name in left_out)}
    wrong = [f"pip check: {line}" for line in complaints if line not in expected]
    if len(expected) != len(left_out):
        wrong.append(f"pip check does not name each of {sorted(left_out)}, which are missing: {complaints}")
    if not left_out:  # for the command in our error messages, pip must find that nothing is left to install
        installing = pip(python, "install", "--no-index", environment.requirement)
        if (
            installing.returncode != 0
            or "does not provide the extra" in installing.stderr
            or "Collecting" in installing.stdout
        ):
            wrong.append(f"pip install {environment.requirement}: {installing.stdout}{installing.stderr}")
    return wrong


def test(environment: Environment, built: Built, wheel: metadata.Distribution, folder: Path) -> list[str]:
    """Makes the environment and runs checks.py in it. Returns what is wrong."""
    needed = closure([environment.requirement], wheel)
    if needed.missing:
        print(f"{environment.name}: skipped, because {sys.prefix} does not have {', '.join(sorted(needed.missing))}")
        return []
    begun = time.monotonic()
    python = make(folder / "environment", needed.found.values(), built.wheel)
    always = {canonicalize_name(r.name) for r in map(Requirement, wheel.requires or ()) if r.marker is None}
    wrong = wrong_requirements(python, environment, always - needed.found.keys())
    work = folder / "work"
    work.mkdir()
    command = [python, "-I", str(CHECKS), environment.name, str(built.source)]
    # The C++ of the wheel is compiled here, once for all environments; a library in the user's cache would hide that.
    compiling = CLEAN | {"TORCH_EXTENSIONS_DIR": str(folder.parent / "compiled")}
    if subprocess.run(command, cwd=work, env=compiling).returncode != 0:
        wrong.append("checks.py failed")
    print(
        f"{environment.name}: {len(needed.found)} distributions and the wheel, {time.monotonic() - begun:.0f} s",
        flush=True,
    )
    return [f"{environment.name}: {line}" for line in wrong]


def main(builder: str, *only: str) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        built = build(builder, folder)
        files = tracked()
        if files is None:
            print("contents: not compared, because git tracks no files here")
        wrong = [] if files is None else wrong_contents(built, files)
        (about,) = (entry for entry in zipfile.Path(built.wheel).iterdir() if entry.name.endswith(".dist-info"))
        wheel = metadata.PathDistribution(about)
        print(f"{built.wheel.name}, built from {built.sdist.name}", flush=True)
        chosen = [environment for environment in environments(wheel) if not only or environment.name in only]
        for number, environment in enumerate(chosen):
            where = folder / f"{number}"
            where.mkdir()
            wrong += test(environment, built, wheel, where)
    print("\n".join(wrong) or "found no fault")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
