"""Builds the sdist, and the wheel from the sdist, and compares their contents with the files that git tracks."""

import os
import subprocess
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What the build backend adds to the files of the repository.
ADDED_TO_SDIST = {"PKG-INFO"}
ADDED_TO_WHEEL = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}


@dataclass(frozen=True)
class Built:
    """sdist: its file. source: the folder into which it was unpacked. wheel: its file, built from that folder."""

    sdist: Path
    source: Path
    wheel: Path


def build(python: str, folder: Path) -> Built:
    """Builds both into the folder with the build backend, hatchling, of another Python."""
    python = os.path.abspath(python)  # the wheel is built in another folder
    _hatchling(python, "sdist", ROOT, folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    _hatchling(python, "wheel", source, folder)
    (wheel,) = folder.glob("*.whl")
    return Built(sdist, source, wheel)


def _hatchling(python: str, kind: str, source: Path, folder: Path) -> None:
    command = [python, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"hatchling cannot build the {kind}:\n{done.stdout}{done.stderr}")


def tracked() -> dict[str, bytes] | None:
    """The files that git tracks with their present contents, by name; None if it tracks none here or is not installed."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if listed.returncode != 0 or not listed.stdout:  # an unpacked sdist can be inside another repository
        return None
    return {name: (ROOT / name).read_bytes() for name in listed.stdout.split("\0") if (ROOT / name).is_file()}


def below(files: Mapping[str, bytes], folder: str) -> dict[str, bytes]:
    """The files of one folder, by their names in it."""
    return {name.removeprefix(folder): content for name, content in files.items() if name.startswith(folder)}


def in_sdist(path: Path) -> dict[str, bytes]:
    """Its files, by their names below its only folder."""
    with tarfile.open(path) as archive:
        opened = {member.name.partition("/")[2]: archive.extractfile(member) for member in archive if member.isfile()}
        return {name: file.read() for name, file in opened.items() if file is not None}


def in_wheel(path: Path) -> dict[str, bytes]:
    """Its files by name, those of the metadata without the name of their folder."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition(".dist-info/")[2] or name: archive.read(name) for name in archive.namelist()}


def differences(archive: str, found: Mapping[str, bytes], expected: Mapping[str, bytes], added: set[str]) -> list[str]:
    """A line for each file that an archive lacks, has in addition, or has with other contents.

    added: the files that the build backend adds to the expected ones.
    """
    return [
        *(f"the {archive} lacks {name}" for name in sorted((expected.keys() | added) - found.keys())),
        *(
            f"the {archive} has {name}, which git does not track"
            for name in sorted(found.keys() - expected.keys() - added)
        ),
        *(
            f"the {archive} has {name} with other contents"
            for name in sorted(found.keys() & expected)
            if found[name] != expected[name]
        ),
    ]


def wrong_contents(built: Built, files: Mapping[str, bytes]) -> list[str]:
    """How the sdist differs from the files that git tracks, and the wheel from those below src."""
    return [
        *differences("sdist", in_sdist(built.sdist), files, ADDED_TO_SDIST),
        *differences("wheel", in_wheel(built.wheel), below(files, "src/"), ADDED_TO_WHEEL),
    ]
