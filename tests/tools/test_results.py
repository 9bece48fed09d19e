"""Result files."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from rmsnorm.errors import CommandError
from rmsnorm.tools import results


def test_results_that_overwrite_each_other_are_refused(tmp_path: Path) -> None:
    report = tmp_path / "out" / "report.json"
    (tmp_path / "link").symlink_to(tmp_path / "out")
    results.check_apart(("--out", report), ("--json", tmp_path / "out" / "other.json"))
    results.check_apart(("--out", report), ("--json", tmp_path / "report.json"))
    for same in (report, tmp_path / "link" / "report.json", tmp_path / "x" / ".." / "out" / "report.json"):
        with pytest.raises(CommandError, match="--out and --json both write"):
            results.check_apart(("--out", report), ("--json", same))
    with pytest.raises(CommandError, match=r"--json writes the file .*out, which --out needs as a folder"):
        results.check_apart(("--out", report), ("--json", tmp_path / "out"))
    with pytest.raises(CommandError, match=r"--out writes the file .*json, which --json needs as a folder"):
        results.check_apart(("--out", report), ("--json", report / "x.json"))
    assert list(tmp_path.iterdir()) == [tmp_path / "link"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "figures.json"
    results.write_json(path, {"a": 1.5})
    assert json.loads(path.read_text()) == {"a": 1.5}
    with pytest.raises(ValueError, match="JSON"):
        results.write_json(path, {"a": math.nan})
    with pytest.raises(TypeError):
        results.write_json(path, {"a": torch.device("cpu")})
    assert json.loads(path.read_text()) == {"a": 1.5}
    assert [p.name for p in path.parent.iterdir()] == ["figures.json"]


@pytest.mark.skipif(os.name != "posix", reason="the modes of files are those of POSIX")
@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o027, 0o640), (0o022, 0o644)])
def test_a_file_has_the_mode_that_the_umask_allows(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        results.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == mode


def test_a_name_with_a_nul_byte_is_refused() -> None:
    with pytest.raises(CommandError, match=r"--json .* cannot be written: ValueError: embedded null byte"):
        results.check_file(Path("a\0b"), "--json")


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    results.check_folder(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CommandError, match="--out"):
            results.check_folder(out)


def test_a_stored_result_without_an_end_is_refused_without_reading_it_all() -> None:
    with pytest.raises(CommandError, match=r"^--from /dev/zero has more than 33,554,432 bytes: give a result$"):
        results.read_stored(Path("/dev/zero"), dict, "a result")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_stored_result_is_read_in_the_encodings_that_shells_write(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"cpu": "\u00b5"}', encoding=encoding)
    assert results.read_stored(tmp_path / "a.json", dict, "a result") == {"cpu": "\u00b5"}
