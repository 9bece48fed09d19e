"""The command line: what it prints where, and its exit codes."""

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

import rmsnorm.measure
import rmsnorm.predict
import rmsnorm.verify
from rmsnorm.cli import main
from rmsnorm.errors import CommandError


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rmsnorm", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0)


def stub(monkeypatch: pytest.MonkeyPatch, ok: bool) -> None:
    def verify(device, quick, progress) -> SimpleNamespace:
        progress(1, 2, "half way")
        return SimpleNamespace(ok=ok, to_json=lambda: {"ok": ok, "quick": quick}, table=lambda: "the table")

    monkeypatch.setattr(rmsnorm.verify, "verify", verify)


@pytest.mark.parametrize("ok", [True, False])
def test_exit_code_tells_whether_a_check_is_red(ok, monkeypatch, capsys, tmp_path) -> None:
    stub(monkeypatch, ok)
    assert call(monkeypatch, "verify") == (0 if ok else 1)
    assert "the table" in capsys.readouterr().out
    assert call(monkeypatch, "verify", "--quick", "--json", "-") == (0 if ok else 1)
    assert json.loads(capsys.readouterr().out) == {"ok": ok, "quick": True}
    assert call(monkeypatch, "verify", "--json", str(tmp_path / "v.json")) == (0 if ok else 1)
    assert json.loads((tmp_path / "v.json").read_text()) == {"ok": ok, "quick": False}


def test_a_command_error_is_one_line_and_exit_code_2(monkeypatch, capsys) -> None:
    def verify(*_: object) -> None:
        raise CommandError("the device has gone")

    monkeypatch.setattr(rmsnorm.verify, "verify", verify)
    assert call(monkeypatch, "verify") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "rmsnorm: the device has gone"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("verify", "--device", "nowhere"), "device 'nowhere' cannot be used"),
        (("verify", "--world", "0"), "--world 0: give a number of ranks"),
        (("report", "deepseek-nothing"), "deepseek-nothing"),
        (("cost", "deepseek-nothing"), "deepseek-nothing"),
        (("cost", "deepseek-ocr", "--gpu", "abacus"), "h200, h100"),
        (("verify", "--json", "/nowhere/at/all.json"), "there is no folder"),
        (("bench", "--plot", "shares.pdf"), "--plot shares.pdf: give a file that ends in .svg or .png"),
        (("bench", "--device", "cpu", "--dtype", "int3"), "--dtype 'int3' is not measured in this run: give one of"),
        (("bench", "--device", "cpu", "--mode", "sideways"), "--mode 'sideways' is not measured"),
        (("bench", "--device", "cpu", "--provider", "nobody"), "--provider 'nobody' cannot be measured here"),
        (("bench", "--from", "/nowhere/at/all.json"), "--from /nowhere/at/all.json: No such file"),
    ],
)
def test_wrong_calls_say_what_to_do(arguments, text, monkeypatch, capsys) -> None:
    assert call(monkeypatch, *arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("rmsnorm: ")
    assert text in last


def test_unknown_verbs_and_options_exit_with_2(monkeypatch) -> None:
    assert call(monkeypatch, "frobnicate") == 2
    assert call(monkeypatch, "verify", "--frobnicate") == 2


@pytest.mark.parametrize("missing", ["rich", "typer"])
def test_without_the_extra_it_says_what_to_install(missing, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert call(monkeypatch, "verify") == 2
    assert (
        capsys.readouterr().err.strip() == f"rmsnorm: the command line needs {missing}: pip install 'rmsnorm[report]'"
    )


@pytest.mark.parametrize("verb", ["verify", "cost"])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p.symlink_to("/dev/full"), "No space left on device"),
        (os.mkfifo, "No such device or address"),  # nobody reads it
        (lambda p: p.mkdir(), "is a folder or a disk, expected a file"),
        (lambda p: p.symlink_to(p), "Too many levels of symbolic links"),
        (lambda p: p.symlink_to("/proc/self/nothing.json"), "nothing can be written into /proc"),
    ],
)
def test_a_json_that_cannot_be_written_is_refused_before_the_work(
    verb, make, says, monkeypatch, capsys, tmp_path
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("it worked")

    monkeypatch.setattr(rmsnorm.verify, "verify", work)
    monkeypatch.setattr(rmsnorm.predict, "main", work)
    make(tmp_path / "x.json")
    target = ["deepseek-ocr"] if verb == "cost" else []
    assert call(monkeypatch, verb, *target, "--json", str(tmp_path / "x.json")) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert says in said
    assert os.listdir(tmp_path) == ["x.json"]


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond some bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_or_fills_up_is_one_line(monkeypatch, capsys, tmp_path) -> None:
    stub(monkeypatch, ok=True)
    file = tmp_path / "v.json"
    with full_disk():
        assert call(monkeypatch, "verify", "--json", str(file)) == 2
        assert call(monkeypatch, "report", "deepseek-ocr", "--out", str(tmp_path / "out")) == 2
    early, out = (line for line in capsys.readouterr().err.splitlines() if line.strip())
    assert "nothing can be written into" in early
    assert "File too large" in early
    assert "--out" in out
    monkeypatch.setattr(rmsnorm.measure, "check_file", lambda *_: None)  # it fills up during the work
    with full_disk():
        assert call(monkeypatch, "verify", "--json", str(file)) == 2
    (late,) = (line for line in capsys.readouterr().err.splitlines() if line.strip())
    assert late == f"rmsnorm: {file} cannot be written: File too large"
    assert os.listdir(tmp_path) == []


def test_a_pipe_gets_the_json_and_nothing_of_the_trial(monkeypatch, tmp_path) -> None:
    stub(monkeypatch, ok=True)
    reader, writer = os.pipe()
    with os.fdopen(reader) as file:
        assert call(monkeypatch, "verify", "--json", f"/dev/fd/{writer}") == 0
        os.close(writer)
        assert json.loads(file.read()) == {"ok": True, "quick": False}


def test_a_link_to_a_file_stays_one(monkeypatch, tmp_path) -> None:
    stub(monkeypatch, ok=True)
    (tmp_path / "link.json").symlink_to("target.json")
    assert call(monkeypatch, "verify", "--json", str(tmp_path / "link.json")) == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "target.json").read_text())["ok"]


def test_standard_output_that_takes_no_more_is_one_line() -> None:
    code = "import sys; sys.argv = ['rmsnorm', 'cost', 'deepseek-ocr', '--json', '-']; from rmsnorm.cli import main; main()"
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, check=False
        )
    assert run.returncode == 2
    assert run.stderr.strip() == "rmsnorm: standard output cannot be written: No space left on device"


def test_a_message_of_several_lines_and_control_characters_is_one(monkeypatch, capsys) -> None:
    def verify(*_: object) -> None:
        raise CommandError("one\ntwo \x1b[31mthree")

    monkeypatch.setattr(rmsnorm.verify, "verify", verify)
    assert call(monkeypatch, "verify") == 2
    assert capsys.readouterr().err.strip() == "rmsnorm: one two \\x1b[31mthree"
