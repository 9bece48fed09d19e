"""The command line: what it prints where, and its exit codes."""

import json
import sys
from types import SimpleNamespace

import pytest

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
