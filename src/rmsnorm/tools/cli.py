"""The command `rmsnorm`: parses the arguments, calls the verb, and prints.

The exit code is 0 if all is well, 1 if a check failed, 2 if the command was called wrongly or the machine lacks
something, 130 for Ctrl-C. The modules of a verb are imported when it is called; the command itself needs only the
standard library and torch.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

import rmsnorm
from rmsnorm.errors import CommandError, one_line
from rmsnorm.tools import display, machine, results
from rmsnorm.tools.bench.cases import CPU_MODES, CUDA_MODES
from rmsnorm.tools.timing import Progress

_USAGE_ERROR, _INTERRUPTED = 2, 130
_STANDARD_OUTPUT = ("-", "/dev/stdout")
_LONGEST_MESSAGE = 2000  # characters


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line.

    Args:
        arguments: The words after the command's name; by default those of the process.

    Raises:
        SystemExit: Always, with the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # the terminal may have no µ
    try:
        try:
            code = _run(_parser().parse_args(arguments))
        except SystemExit as end:  # argparse exits like this after --help, whose text is flushed below
            code = int(end.code or 0)
        _print("")
    except CommandError as error:
        _report_error(str(error))
        code = _USAGE_ERROR
    except KeyboardInterrupt:
        _report_error("interrupted")
        code = _INTERRUPTED
    raise SystemExit(code)


# --- parsing -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, as the verbs do."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--[\w-]+): ", r"\1 ", message)
        raise CommandError(f"{message}; see {self.prog} --help")


_TARGET, _TOKENS, _REPORT_SECONDS = "deepseek-ocr", 2048, 90.0  # of report, if the user names no other
_LARGEST = 10**9  # larger numbers would overflow 64 bits in some products


def _whole_number(text: str) -> int:
    with contextlib.suppress(ValueError):
        if 1 <= int(text) <= _LARGEST:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1 to {_LARGEST:,}")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: expected a number of seconds above 0")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rmsnorm",
        description="Verify the fused RMSNorm, measure it, and report what it gains in a model.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="store_true", help="print the versions of rmsnorm and of the packages it uses"
    )
    parser.set_defaults(work=None)
    verbs = parser.add_subparsers(
        title="verbs", metavar="VERB", description="rmsnorm VERB --help lists the options of a verb"
    )

    def verb(name: str, work: Any, summary: str) -> argparse.ArgumentParser:
        """Add a verb, with the option that all verbs have."""
        made = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        made.set_defaults(work=work)
        made.add_argument(
            "--json", type=Path, metavar="FILE", help="write the result as JSON to FILE; - for standard output"
        )
        return made

    def device(made: argparse.ArgumentParser) -> None:
        made.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")

    def verbose(made: argparse.ArgumentParser) -> None:
        made.add_argument("--verbose", action="store_true", help="print every figure, not only the summary")

    def stored(made: argparse.ArgumentParser, what: str) -> None:
        made.add_argument("--from", type=Path, dest="stored", metavar="FILE", help=what)

    def several(made: argparse.ArgumentParser, option: str, what: str, metavar: str) -> None:
        made.add_argument(option, action="append", default=[], metavar=metavar, help=f"{what}; can be repeated")

    report = verb("report", _report, "Prove and replace the norms of a model, and measure what that gains.")
    report.add_argument(
        "target",
        nargs="?",
        help="the preset deepseek-ocr (default), or the folder of a Hugging Face checkpoint",
    )
    device(report)
    report.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help=f"folder for {results.REPORT_FILE} and {results.REPORT_PAGE}, which are overwritten if they exist "
        "(default: the current folder)",
    )
    stored(
        report, f"print the stored {results.REPORT_FILE} in FILE, and draw {results.REPORT_PAGE}, instead of measuring"
    )
    report.add_argument(
        "--tokens", type=_whole_number, metavar="N", help=f"length of the sequence (default: {_TOKENS})"
    )
    report.add_argument(
        "--seconds", type=_seconds, metavar="S", help=f"about how long it may take (default: {_REPORT_SECONDS:g})"
    )
    report.add_argument(
        "--compile",
        action="store_true",
        help="compile the steps of the whole model; the time of compilation is not limited by --seconds",
    )
    report.add_argument("--all", action="store_true", help="print a row for each norm, not for each kind of norm")

    verify = verb("verify", _verify, "Check the contract on more than 10⁸ outputs.")
    device(verify)
    verify.add_argument("--quick", action="store_true", help="run a sixth of the sweep, in about a minute")
    several(verify, "--only", "run only the rows whose name contains NAME", "NAME")
    verify.add_argument(
        "--world", type=_whole_number, metavar="N", help="shard every case over N ranks, which the command starts"
    )
    verbose(verify)

    bench = verb("bench", _bench, "Measure this norm and others in one run.")
    device(bench)
    bench.add_argument("--quick", action="store_true", help="measure fewer shapes, with fewer calls")
    bench.add_argument("--out", type=Path, metavar="FOLDER", help="folder for bench-DEVICE.json")
    bench.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw speeds relative to a copy into this .svg or .png file"
    )
    stored(bench, "print the stored result in this JSON file instead of measuring")
    several(bench, "--dtype", "measure only this dtype: bfloat16, float32 or float16", "DTYPE")
    on_cpu, on_gpu = (", ".join(mode.slug for mode in modes) for modes in (CPU_MODES, CUDA_MODES))
    several(bench, "--mode", f"measure only this mode: on a CPU {on_cpu}; on a GPU {on_gpu}", "MODE")
    several(bench, "--provider", "measure only this provider, ours and the copy", "NAME")
    verbose(bench)

    cost = verb("cost", _cost, "Count what the norms of a model cost, from its configuration alone.")
    cost.add_argument(
        "target",
        metavar="CONFIG.json|FOLDER|PRESET",
        help="a model's configuration, the folder that holds it, or a preset such as deepseek-ocr",
    )
    cost.add_argument(
        "--batch", type=_whole_number, default=1, metavar="N", help="number of sequences (default: %(default)s)"
    )
    cost.add_argument(
        "--seq", type=_whole_number, default=8192, metavar="N", help="tokens of each sequence (default: %(default)s)"
    )
    cost.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32 (default: %(default)s)")
    cost.add_argument("--gpu", help="predict times on this GPU, for example h200")
    verbose(cost)
    return parser


# --- calling -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Finished:
    """What a verb found.

    Attributes:
        ok: Whether all checks passed.
        json: The result as JSON.
        blocks: Makes what is printed.
        wrote: Files that the verb wrote, if the arguments do not name them.
    """

    ok: bool
    json: dict[str, Any]
    blocks: Callable[[], Iterable[display.Block]]
    wrote: tuple[Path, ...] = ()


def _report(args: argparse.Namespace, progress: Progress) -> _Finished:
    from rmsnorm.tools.report import command, printing

    if args.stored is not None:
        if args.target or args.device or args.tokens or args.seconds or args.compile:
            raise CommandError(
                "--from measures nothing: leave out the target, --device, --tokens, --seconds and --compile"
            )
        result = command.draw_stored(args.stored, args.out, every_layer=args.all)
    else:
        options = {"device": args.device, "tokens": args.tokens or _TOKENS, "seconds": args.seconds or _REPORT_SECONDS,
                   "every_layer": args.all, "compiled": args.compile}  # fmt: skip
        result = command.report(args.target or _TARGET, args.out, progress, **options)
    wrote = tuple(args.out / name for name in _report_files(args))
    return _Finished(result.ok, result.to_json(), lambda: printing.blocks(result), wrote)


def _report_files(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the names of the files that report writes into its folder."""
    return (results.REPORT_PAGE,) if args.stored is not None else (results.REPORT_FILE, results.REPORT_PAGE)


def _verify(args: argparse.Namespace, progress: Progress) -> _Finished:
    from rmsnorm.tools.verify import printing

    if args.world is None:
        from rmsnorm.tools.verify import command

        result = command.verify(args.device, args.quick, progress, only=args.only)
    else:
        from rmsnorm.tools.verify import ranks

        result = ranks.verify_on_ranks(args.world, args.device, args.quick, progress, only=args.only)
    return _Finished(result.ok, result.to_json(), lambda: printing.blocks(result, args.verbose))


def _bench(args: argparse.Namespace, progress: Progress) -> _Finished:
    from rmsnorm.tools.bench import command, printing

    only = {"dtypes": args.dtype, "modes": args.mode, "names": args.provider}
    result = command.bench(args.device, args.quick, args.out, progress, drawing=args.plot, stored=args.stored, **only)
    wrote = () if args.out is None else (args.out / results.bench_file(result.facts["device"]),)
    return _Finished(result.ok, result.to_json(), lambda: printing.blocks(result, args.verbose), wrote)


def _cost(args: argparse.Namespace, progress: Progress) -> _Finished:
    from rmsnorm.tools.cost import command, printing

    result = command.model_cost(args.target, progress, batch=args.batch, seq=args.seq, dtype=args.dtype, gpu=args.gpu)
    return _Finished(result.ok, result.to_json(), lambda: printing.blocks(result, args.verbose))


def _run(args: argparse.Namespace) -> int:
    """Call the verb, print its result or its JSON, and return the exit code."""
    if args.version:
        _print(_versions())
        return 0
    if args.work is None:
        _parser().print_help(sys.stderr)
        return _USAGE_ERROR
    to_screen = args.json is not None and str(args.json) in _STANDARD_OUTPUT
    handle = None
    if args.json is not None and not to_screen:
        if not args.json.absolute().parent.is_dir():
            raise CommandError(f"--json {args.json}: there is no folder {args.json.absolute().parent}")
        for other in _files(args):
            results.check_apart(other, ("--json", args.json))
        handle = results.check_file(args.json, "--json")
    progress = _ProgressLine(sys.stderr)
    try:
        finished: _Finished = args.work(args, progress)
    finally:
        progress.close()
    text = json.dumps(finished.json, indent=2) + "\n"
    if args.json is not None and not to_screen:
        results.write_output(args.json, text.encode(), "--json", handle)
    if to_screen:
        _print(text)
    else:
        wrote = [display.Text(f"wrote {file}", "note", fold=False) for file in finished.wrote]
        _print(_drawn([*finished.blocks(), *wrote]))
    return 0 if finished.ok else 1


def _files(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Return the options of the verb that write files besides --json, each with its file."""
    out, plot = getattr(args, "out", None), getattr(args, "plot", None)
    names = _report_files(args) if args.work is _report else tuple(map(results.bench_file, ("cpu", "cuda")))
    return [("--out", out / name) for name in names if out is not None] + ([("--plot", plot)] if plot else [])


def _versions() -> str:
    found = machine.versions()
    others = ", ".join(f"{name} {found[name]}" for name in ("torch", "numba", "triton") if name in found)
    return f"rmsnorm {rmsnorm.__version__} ({others})\n"


# --- printing ------------------------------------------------------------------------------------------------


class _ProgressLine:
    """Shows progress: on a terminal in one line that is overwritten, elsewhere in a new line every ten seconds."""

    SECONDS_BETWEEN = 10.0

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._rewrites = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
        self._last = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        text = f"{math.floor(100 * done / total) if total else 0} %  {one_line(what)}"
        if self._rewrites:
            self._write(f"\r\x1b[K{text[: self._width() - 1]}")
        elif time.monotonic() - self._last >= self.SECONDS_BETWEEN:
            self._last = time.monotonic()
            self._write(f"{text}\n")

    def close(self) -> None:
        if self._rewrites:
            self._write("\r\x1b[K")

    def _width(self) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return os.get_terminal_size(self._stream.fileno()).columns or 80  # type: ignore[union-attr]
        return 80

    def _write(self, text: str) -> None:
        if self._stream is not None and not _written(self._stream, text):
            self._stream, self._rewrites = None, False  # nobody reads it any more; the work continues


def _drawn(blocks: Iterable[display.Block]) -> str:
    color = sys.stdout is not None and display.colored(sys.stdout)
    return display.render(blocks, display.terminal_width(), color)


def _print(text: str) -> None:
    """Write to standard output. Raises CommandError if that fails, except for a pipe whose reader has gone."""
    if sys.stdout is not None:
        _written(sys.stdout, text)


def _report_error(message: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(CommandError):
            line = one_line(message)
            if len(line) > _LONGEST_MESSAGE:  # it quotes a value from a file
                line = f"{line[: _LONGEST_MESSAGE // 2]} … {line[-_LONGEST_MESSAGE // 2 :]}"
            _written(sys.stderr, f"rmsnorm: {line}\n")


def _written(stream: TextIO, text: str) -> bool:
    """Return whether the text was written: False if nobody reads the stream. Raises CommandError for other errors."""
    try:
        stream.write(text)
        stream.flush()
        return True
    except OSError as error:
        with open(os.devnull, "w") as nowhere, contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere.fileno(), stream.fileno())  # otherwise the rest fails again when Python exits
        if isinstance(error, BrokenPipeError):
            return False
        name = "error" if stream is sys.stderr else "output"
        raise CommandError(f"standard {name} cannot be written: {one_line(error)}") from None


if __name__ == "__main__":
    main()
