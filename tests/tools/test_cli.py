"""The command line: its output and its exit codes."""

import contextlib
import io
import json
import os
import resource
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rmsnorm.tools.bench.command
import rmsnorm.tools.bench.overheads
import rmsnorm.tools.models.library
import rmsnorm.tools.results
import rmsnorm.tools.verify.command
import rmsnorm.tools.verify.printing
import rmsnorm.tools.verify.ranks
from rmsnorm.errors import CommandError, one_line
from rmsnorm.tools import cli
from rmsnorm.tools.bench.cases import cases
from rmsnorm.tools.cli import main
from rmsnorm.tools.display import Block


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert isinstance(exit.value.code, int)
    return exit.value.code


def stub(monkeypatch: pytest.MonkeyPatch, ok: bool) -> None:
    """Replace the work of `rmsnorm verify`."""

    def verify(device, quick, progress, only) -> SimpleNamespace:
        progress(1, 2, "half way")
        return SimpleNamespace(ok=ok, to_json=lambda: {"ok": ok, "quick": quick})

    def blocks(result, verbose) -> list[Block]:
        return ["the table", *(["with every row"] if verbose else [])]

    monkeypatch.setattr(rmsnorm.tools.verify.command, "verify", verify)
    monkeypatch.setattr(rmsnorm.tools.verify.printing, "blocks", blocks)


@pytest.mark.parametrize("ok", [True, False])
def test_the_exit_code_is_1_if_a_check_fails(ok, monkeypatch, capsys, tmp_path) -> None:
    stub(monkeypatch, ok)
    assert call("verify") == (0 if ok else 1)
    assert capsys.readouterr() == ("the table\n", "")
    assert call("verify", "--verbose") == (0 if ok else 1)
    assert capsys.readouterr().out == "the table\nwith every row\n"
    assert call("verify", "--quick", "--json", "-") == (0 if ok else 1)
    assert json.loads(capsys.readouterr().out) == {"ok": ok, "quick": True}
    assert call("verify", "--json", str(tmp_path / "v.json")) == (0 if ok else 1)
    assert json.loads((tmp_path / "v.json").read_text()) == {"ok": ok, "quick": False}


OUT = Path("out")


@pytest.mark.parametrize(
    ("arguments", "verb", "given"),
    [
        ("report", "report.command.report", ("deepseek-ocr", Path(), {"device": None, "tokens": 2048, "seconds": 90.0, "every_layer": False, "compiled": False})),
        ("report --from a.json --out out --all", "report.command.draw_stored", (Path("a.json"), OUT, {"every_layer": True})),
        (
            "report folder --out out --device cpu --tokens 5 --seconds 2.5 --all --compile",
            "report.command.report",
            ("folder", OUT, {"device": "cpu", "tokens": 5, "seconds": 2.5, "every_layer": True, "compiled": True}),
        ),
        ("verify", "verify.command.verify", (None, False, {"only": []})),
        ("verify --device cpu --quick --only a --only b", "verify.command.verify", ("cpu", True, {"only": ["a", "b"]})),
        ("verify --world 3", "verify.ranks.verify_on_ranks", (3, None, False, {"only": []})),
        (
            "bench",
            "bench.command.bench",
            (None, False, None, {"drawing": None, "stored": None, "dtypes": [], "modes": [], "names": []}),
        ),
        (
            "bench --device cpu --quick --out out --plot a.svg --from b.json --dtype x --dtype y --mode m --provider p",
            "bench.command.bench",
            (
                "cpu", True, OUT,
                {"drawing": Path("a.svg"), "stored": Path("b.json"), "dtypes": ["x", "y"], "modes": ["m"], "names": ["p"]},
            ),
        ),
        ("cost a.json", "cost.command.model_cost", ("a.json", {"batch": 1, "seq": 8192, "dtype": "bfloat16", "gpu": None})),
        (
            "cost deepseek-v3 --batch 2 --seq 3 --dtype float32 --gpu h100",
            "cost.command.model_cost",
            ("deepseek-v3", {"batch": 2, "seq": 3, "dtype": "float32", "gpu": "h100"}),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)  # fmt: skip
def test_every_option_reaches_its_verb(arguments, verb, given, monkeypatch) -> None:
    calls: list[tuple[object, ...]] = []

    def work(*positional: object, **named: object) -> SimpleNamespace:
        calls.append((*(value for value in positional if not callable(value)), named))
        return SimpleNamespace(ok=True, to_json=dict, facts={"device": "cpu"})

    monkeypatch.setattr(f"rmsnorm.tools.{verb}", work)
    monkeypatch.setattr(f"rmsnorm.tools.{verb.partition('.')[0]}.printing.blocks", lambda *_: [])
    assert call(*arguments.split()) == 0
    assert calls == [given]


@pytest.mark.parametrize(
    ("arguments", "verb", "wrote"),
    [
        ("report", "report", "report.html"),
        ("report --out out", "report", "out/report.html"),
        ("bench --out out", "bench", "out/bench-cpu.json"),
        ("report --json -", "report", None),
        ("bench --json x.json", "bench", None),
    ],
)
def test_the_last_line_names_a_written_file_that_no_argument_names(
    arguments, verb, wrote, monkeypatch, capsys, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = SimpleNamespace(ok=True, to_json=dict, facts={"device": "cpu"})
    monkeypatch.setattr(f"rmsnorm.tools.{verb}.command.{verb}", lambda *_, **__: result)
    monkeypatch.setattr(f"rmsnorm.tools.{verb}.printing.blocks", lambda *_: ["a table"])
    assert call(*arguments.split()) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (f"wrote {wrote}" if wrote else "{}" if "-" in arguments.split() else "a table")


def test_the_help_of_bench_names_the_modes_of_each_device(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # otherwise lines break within names
    assert call("bench", "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    for device in ("cpu", "cuda"):
        modes = list(dict.fromkeys(case.mode.slug for case in cases(device, quick=False)))
        assert f"on a {device.upper().replace('CUDA', 'GPU')} {', '.join(modes)}" in said


def test_a_command_error_prints_one_line_and_exits_with_2(monkeypatch, capsys) -> None:
    def verify(*_: object, **__: object) -> None:
        raise CommandError("the device has gone")

    monkeypatch.setattr(rmsnorm.tools.verify.command, "verify", verify)
    assert call("verify") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "rmsnorm: the device has gone"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("verify", "--only", "fp4"), "--only 'fp4' matches no row; a row's name is, for example, 'fp32, no weight'"),
        (("verify", "--only", ""), "--only '' matches no row; a row's name is, for example, 'fp32, no weight'"),
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
def test_a_wrong_call_prints_what_is_expected(arguments, text, capsys) -> None:
    assert call(*arguments) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert message.startswith("rmsnorm: ")
    assert text in message


@pytest.fixture
def no_work(monkeypatch) -> None:
    """Fail if a verb begins to work after it has checked its options."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("it began to work")

    for module, name in (
        (rmsnorm.tools.verify.command, "count_cases"),
        (rmsnorm.tools.verify.ranks, "tallies_of_ranks"),
        (rmsnorm.tools.bench.command, "measure"),
        (rmsnorm.tools.bench.overheads, "first_call"),
        (rmsnorm.tools.models.library, "import_transformers"),
    ):
        monkeypatch.setattr(module, name, work)


DEVICES = [(verb, "--device", "nowhere", "give cpu") for verb in ("report", "verify", "bench")]
WHOLE = "expected a whole number from 1 to 1,000,000,000"
NUMBERS = [
    (verb, option, value, takes)
    for verb, option, takes in (
        ("report", "--tokens", WHOLE),
        ("report", "--seconds", "expected a number of seconds above 0"),
        ("verify", "--world", WHOLE),
        ("cost deepseek-ocr", "--batch", WHOLE),
        ("cost deepseek-ocr", "--seq", WHOLE),
    )
    for value in ("0", "-3", "nan", "inf", "many", *(["1000000001"] if takes == WHOLE else []))
]


@pytest.mark.parametrize(("verb", "option", "value", "takes"), [*DEVICES, *NUMBERS])
@pytest.mark.usefixtures("no_work")
def test_an_invalid_option_is_refused_before_the_work(verb, option, value, takes, capsys) -> None:
    assert call(*verb.split(), f"{option}={value}") == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert message.startswith(f"rmsnorm: {option} {value}: {takes}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("frobnicate",), "'frobnicate' (choose from"),
        (("verify", "--frobnicate"), "unrecognized arguments: --frobnicate"),
        (
            ("verify", "--jso", "a.json"),
            "unrecognized arguments: --jso",
        ),  # otherwise a new option could change what it means
        (("verify", "--json"), "--json expected one argument"),
        (("cost",), "required: CONFIG.json|FOLDER|PRESET; see rmsnorm cost --help"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_unknown_verbs_and_options_exit_with_2(arguments, message, capsys) -> None:
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.strip().splitlines()
    assert message in line


def test_without_a_verb_help_is_printed_and_the_exit_code_is_2(capsys) -> None:
    assert call() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "report" in err


@pytest.mark.parametrize("verb", ["", "report", "verify", "bench", "cost"])
def test_help_is_printed_and_exits_with_0(verb, capsys) -> None:
    assert call(*verb.split(), "--help") == 0
    out, err = capsys.readouterr()
    assert f"usage: rmsnorm {verb}".strip() in out
    assert err == ""


def test_version_lists_the_packages_it_uses(capsys) -> None:
    assert call("--version") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"rmsnorm {rmsnorm.__version__} (torch {torch.__version__}")
    assert out.count("\n") == 1


def test_the_module_and_main_without_arguments_are_the_command(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["rmsnorm", "--version"])
    for start in (main, lambda: runpy.run_module("rmsnorm", run_name="__main__")):
        with pytest.raises(SystemExit) as exit:
            start()
        assert exit.value.code == 0
        assert capsys.readouterr().out.startswith("rmsnorm ")


def test_the_command_works_without_the_extras(monkeypatch, capsys, tmp_path) -> None:
    for name in ("rich", "typer", "click", "transformers", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    assert call("--help") == call("verify", "--help") == call("--version") == 0
    stub(monkeypatch, ok=True)
    assert call("verify", "--json", str(tmp_path / "v.json")) == 0
    assert capsys.readouterr().out.endswith("the table\n")
    assert call("cost", "deepseek-ocr") == 2
    assert capsys.readouterr().err == "rmsnorm: cost needs transformers: pip install 'rmsnorm[hf]'\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line_that_is_erased(monkeypatch) -> None:
    stub(monkeypatch, ok=True)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    assert call("verify") == 0
    assert screen.getvalue() == "\r\x1b[K50 %  half way\r\x1b[K"


def test_progress_elsewhere_is_an_occasional_line(monkeypatch, capsys) -> None:
    stub(monkeypatch, ok=True)
    assert call("verify") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(cli._ProgressLine, "SECONDS_BETWEEN", 0.0)
    assert call("verify") == 0
    assert capsys.readouterr().err == "50 %  half way\n"


def test_ctrl_c_prints_one_line_and_exits_with_130(monkeypatch, capsys) -> None:
    def verify(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rmsnorm.tools.verify.command, "verify", verify)
    assert call("verify") == 130
    assert capsys.readouterr() == ("", "rmsnorm: interrupted\n")


@contextlib.contextmanager
def closed_pipe() -> Iterator[io.TextIOWrapper]:
    """A text stream into a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    yield os.fdopen(writer, "w")


@pytest.mark.parametrize("arguments", [("verify",), ("verify", "--json", "-"), ("--help",), ("verify", "--help")])
@pytest.mark.parametrize("ok", [True, False])
def test_a_pipe_whose_reader_has_gone_is_not_an_error(ok, arguments, monkeypatch, capsys) -> None:
    stub(monkeypatch, ok)
    with closed_pipe() as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert call(*arguments) == (0 if ok or "--help" in arguments else 1)
        pipe.close()  # what is still buffered is dropped without an error
    assert capsys.readouterr().err == ""


def test_the_work_continues_if_nobody_reads_its_progress(monkeypatch, capsys) -> None:
    stub(monkeypatch, ok=True)
    monkeypatch.setattr(cli._ProgressLine, "SECONDS_BETWEEN", 0.0)
    with closed_pipe() as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        assert call("verify") == 0
        pipe.close()
    assert capsys.readouterr().out == "the table\n"


def test_closed_standard_streams_are_not_an_error(monkeypatch, tmp_path) -> None:
    stub(monkeypatch, ok=False)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert call("verify", "--json", str(tmp_path / "v.json")) == 1
    assert json.loads((tmp_path / "v.json").read_text()) == {"ok": False, "quick": False}
    assert call("verify", "--frobnicate") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "--json", "x.json"),
        ("cost", "deepseek-ocr", "--json", "x.json"),
        ("report", "--json", "x.json"),
        ("bench", "--json", "x.json"),
        ("bench", "--plot", "x.svg"),
        ("bench", "--device", "cpu", "--out", "bench-cpu.json"),
        ("report", "--device", "cpu", "--out", "report.json"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p.symlink_to("/dev/full"), "No space left on device"),
        (os.mkfifo, "No such device or address"),  # it has no reader
        (lambda p: p.mkdir(), "is a folder or a disk, expected a file"),
        (lambda p: p.symlink_to(p), "Too many levels of symbolic links"),
        (lambda p: p.symlink_to("/proc/self/nothing.json"), "nothing can be written into /proc"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    arguments, make, says, monkeypatch, capsys, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    *arguments, file = arguments
    make(tmp_path / file)
    assert call(*arguments, str(tmp_path) if "--out" in arguments else file) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert says in message
    assert arguments[-1] in message
    assert os.listdir(tmp_path) == [file]


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Limit the size of files to a few bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_prints_one_line(monkeypatch, capsys, tmp_path) -> None:
    stub(monkeypatch, ok=True)
    file = tmp_path / "v.json"
    with full_disk():
        assert call("verify", "--json", str(file)) == 2
        assert call("report", "deepseek-ocr", "--out", str(tmp_path / "out")) == 2
    early, out = (line for line in capsys.readouterr().err.splitlines() if line.strip())
    assert "nothing can be written into" in early
    assert "File too large" in early
    assert "--out" in out
    monkeypatch.setattr(rmsnorm.tools.results, "check_file", lambda *_: None)  # the disk fills up during the work
    with full_disk():
        assert call("verify", "--json", str(file)) == 2
    (late,) = (line for line in capsys.readouterr().err.splitlines() if line.strip())
    assert late == f"rmsnorm: {file} cannot be written: File too large"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("report", "--out", "r", "--json", "r"), "--json writes the file r, which --out needs as a folder"),
        (("report", "--out", "there", "--json", "there/report.json"), "--out and --json both write there/report.json"),
        (("report", "--json", "report.html"), "--out and --json both write report.html: give them different names"),
        (("report", "--from", "r", "--json", "report.html"), "--out and --json both write report.html"),
        (("report", "--json", "report.json"), "--out and --json both write report.json: give them different names"),
        (("bench", "--out", "there", "--json", "there/bench-cpu.json"), "--out and --json both write there/bench"),
        (("bench", "--plot", "a.svg", "--json", "a.svg"), "--plot and --json both write a.svg"),
    ],
)
def test_conflicting_output_files_are_refused_before_the_work(arguments, says, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert call(*arguments) == 2
    assert f"rmsnorm: {says}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_pipe_gets_only_the_json(monkeypatch, tmp_path) -> None:
    stub(monkeypatch, ok=True)
    reader, writer = os.pipe()
    with os.fdopen(reader) as file:
        assert call("verify", "--json", f"/dev/fd/{writer}") == 0
        os.close(writer)
        assert json.loads(file.read()) == {"ok": True, "quick": False}


def test_a_symbolic_link_stays_a_link(monkeypatch, tmp_path) -> None:
    stub(monkeypatch, ok=True)
    (tmp_path / "link.json").symlink_to("target.json")
    assert call("verify", "--json", str(tmp_path / "link.json")) == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "target.json").read_text())["ok"]


@pytest.mark.parametrize("arguments", [("verify",), ("verify", "--json", "-"), ("--help",)])
def test_a_full_standard_output_prints_one_line(arguments, monkeypatch, capsys) -> None:
    stub(monkeypatch, ok=True)
    full = open("/dev/full", "w")  # noqa: SIM115  # what is still buffered is dropped, so that closing it does not fail
    monkeypatch.setattr(sys, "stdout", full)
    assert call(*arguments) == 2
    full.close()
    assert capsys.readouterr().err == "rmsnorm: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "stream", "code", "text"),
    [
        (("verify", "--help"), "stdout", 0, b"Check the contract on more than 10? outputs."),
        (("µ",), "stderr", 2, b"'?'"),
    ],
    ids=["help", "error"],
)
def test_a_character_that_the_terminal_does_not_have_is_a_question_mark(
    arguments, stream, code, text, monkeypatch
) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, stream, ascii_only)
    assert call(*arguments) == code
    assert text in ascii_only.buffer.getvalue()


@pytest.mark.parametrize("arguments", ["report", "cost deepseek-ocr", "verify --world 2 --device cpu"])
def test_a_verb_that_needs_temporary_files_says_so_before_the_work(arguments, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rmsnorm.tools.results, "check_folder", lambda *_: None)

    def fails() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", fails)
    assert call(*arguments.split()) == 2
    assert capsys.readouterr().err == (
        "rmsnorm: No usable temporary directory found: free space there, or name another folder in TMPDIR\n"
    )


def test_torch_s_stack_trace_is_left_out(capsys) -> None:
    assert one_line(
        RuntimeError("Overflow\nException raised from f at a.h:79 (most recent call first):\nframe #0")
    ) == ("RuntimeError: Overflow")


def test_a_message_is_printed_in_one_line_without_control_characters(monkeypatch, capsys) -> None:
    def verify(*_: object, **__: object) -> None:
        raise CommandError("one\ntwo \x1b[31mthree")

    monkeypatch.setattr(rmsnorm.tools.verify.command, "verify", verify)
    assert call("verify") == 2
    assert capsys.readouterr().err.strip() == "rmsnorm: one two \\x1b[31mthree"
