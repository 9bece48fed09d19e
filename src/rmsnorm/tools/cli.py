"""The command `rmsnorm`: parse, call, print.

Exit code 0 if all is well, 1 if a check is red, 2 for a wrong call or a machine that lacks something, 130 for Ctrl-C.
What a verb needs is imported when it is called; the command itself needs nothing but the standard library and torch.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

import rmsnorm
from rmsnorm.errors import CommandError, one_line
from rmsnorm.tools import display, machine, results
from rmsnorm.tools.timing import Progress

_WRONG_CALL, _INTERRUPTED = 2, 130
_STANDARD_OUTPUT = ("-", "/dev/stdout")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line.

    Args:
        arguments: Those after the command's name; by default those that the process was started with.

    Raises:
        SystemExit: Always, with the exit code.
    """
    try:
        try:
            code = _run(_parser().parse_args(arguments))
        except SystemExit as end:  # how argparse ends after --help, which may still have to be written
            code = int(end.code or 0)
        _print("")
    except CommandError as error:
        _complain(str(error))
        code = _WRONG_CALL
    except KeyboardInterrupt:
        _complain("interrupted")
        code = _INTERRUPTED
    raise SystemExit(code)


# --- parsing -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as the verbs do."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--[\w-]+): ", r"\1 ", message)
        raise CommandError(f"{message}; {self.prog} --help lists what there is")


_LARGEST = 10**9  # beyond what anything here can count: numbers of 64 bits overflow


def _whole_number(text: str) -> int:
    with contextlib.suppress(ValueError):
        if 1 <= int(text) <= _LARGEST:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 to {_LARGEST:,}")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: give a number of seconds above 0")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rmsnorm", description="RMSNorm: verified, measured, put into models.", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the versions of rmsnorm and of what it runs on")
    parser.set_defaults(work=None)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", description="rmsnorm VERB --help says what each takes")

    def verb(name: str, work: Any, summary: str) -> argparse.ArgumentParser:
        """With the option that all of them have."""
        made = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        made.set_defaults(work=work)
        made.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON; - for standard output")
        return made

    def device(made: argparse.ArgumentParser) -> None:
        made.add_argument("--device", help="cpu or cuda; by default the GPU if there is one")

    def verbose(made: argparse.ArgumentParser) -> None:
        made.add_argument("--verbose", action="store_true", help="print every figure, not only the answer")

    def several(made: argparse.ArgumentParser, option: str, what: str, metavar: str) -> None:
        made.add_argument(option, action="append", default=[], metavar=metavar, help=f"{what}; may be given again")

    report = verb("report", _report, "Prove and replace the norms of a model, and say what that gained.")
    report.add_argument(
        "target", nargs="?", default="deepseek-ocr", help="deepseek-ocr, which is the default, or a checkpoint's folder"
    )
    device(report)
    report.add_argument(
        "--out", type=Path, default=Path(), metavar="FOLDER", help="where report.json goes; by default here"
    )
    report.add_argument(
        "--tokens", type=_whole_number, default=2048, metavar="N", help="length of the sequence; %(default)s by default"
    )
    report.add_argument(
        "--seconds", type=_seconds, default=90.0, metavar="S", help="about how long it may take; %(default)g by default"
    )
    report.add_argument("--all", action="store_true", help="print a row for every norm, not one for each kind")

    verify = verb("verify", _verify, "Hold the kernels to the contract, over more than 10⁸ outputs.")
    device(verify)
    verify.add_argument("--quick", action="store_true", help="a sixth of the sweep, in about a minute")
    several(verify, "--only", "only the rows whose name contains this", "NAME")
    verify.add_argument(
        "--world", type=_whole_number, metavar="N", help="shard every case over N ranks, which are started here"
    )
    verbose(verify)

    bench = verb("bench", _bench, "Measure this norm beside the others, in one run.")
    device(bench)
    bench.add_argument("--quick", action="store_true", help="fewer shapes and calls")
    bench.add_argument("--out", type=Path, metavar="FOLDER", help="where bench-DEVICE.json goes")
    bench.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the shares of a copy's speed into this .svg or .png"
    )
    bench.add_argument("--from", type=Path, dest="stored", metavar="FILE", help="take this JSON, and measure nothing")
    several(bench, "--dtype", "only this dtype", "DTYPE")
    several(bench, "--mode", "only this mode", "MODE")
    several(bench, "--provider", "only this one, ours and a copy", "NAME")
    verbose(bench)

    cost = verb("cost", _cost, "Count what a model's norms cost, from its configuration alone.")
    cost.add_argument(
        "target", metavar="CONFIG.json|PRESET", help="a model's configuration, or a preset: deepseek-ocr for example"
    )
    cost.add_argument("--batch", type=_whole_number, default=1, metavar="N", help="sequences; %(default)s by default")
    cost.add_argument(
        "--seq", type=_whole_number, default=8192, metavar="N", help="tokens of each; %(default)s by default"
    )
    cost.add_argument("--dtype", default="bfloat16", help="bfloat16, which is the default, float16 or float32")
    cost.add_argument("--gpu", help="predict times for it: h200 for example")
    verbose(cost)
    return parser


# --- calling -------------------------------------------------------------------------------------------------


def _report(args: argparse.Namespace, progress: Progress) -> Any:
    from rmsnorm.tools.report import main

    options = {"device": args.device, "tokens": args.tokens, "seconds": args.seconds, "every_layer": args.all}
    return main(args.target, args.out, progress, **options)


def _verify(args: argparse.Namespace, progress: Progress) -> Any:
    if args.world is None:
        from rmsnorm.tools.verify import verify

        return verify(args.device, args.quick, progress, only=args.only)
    from rmsnorm.tools.world import verify_on_ranks

    return verify_on_ranks(args.world, args.device, args.quick, progress, only=args.only)


def _bench(args: argparse.Namespace, progress: Progress) -> Any:
    from rmsnorm.tools.bench import main

    some = {"dtypes": args.dtype, "modes": args.mode, "names": args.provider}
    return main(args.device, args.quick, args.out, progress, drawing=args.plot, stored=args.stored, **some)


def _cost(args: argparse.Namespace, progress: Progress) -> Any:
    from rmsnorm.tools.predict import main

    return main(args.target, progress, batch=args.batch, seq=args.seq, dtype=args.dtype, gpu=args.gpu)


def _run(args: argparse.Namespace) -> int:
    """Call the verb, and print its result or its JSON. Returns the exit code."""
    if args.version:
        _print(_versions())
        return 0
    if args.work is None:
        _parser().print_help(sys.stderr)
        return _WRONG_CALL
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
        result = args.work(args, progress)
    finally:
        progress.close()
    text = json.dumps(result.to_json(), indent=2) + "\n"
    if args.json is not None and not to_screen:
        results.write_output(args.json, text.encode(), "--json", handle)
    if to_screen:
        _print(text)
    else:
        _print(_drawn(result.table(args.verbose) if "verbose" in args else result.table()))
    return 0 if result.ok else 1


def _files(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """What the verb writes besides --json: the name of the option, and the file."""
    out, plot = getattr(args, "out", None), getattr(args, "plot", None)
    names = ("report.json",) if args.work is _report else ("bench-cpu.json", "bench-cuda.json")
    return [("--out", out / name) for name in names if out is not None] + ([("--plot", plot)] if plot else [])


def _versions() -> str:
    found = machine.versions()
    others = ", ".join(f"{name} {found[name]}" for name in ("torch", "numba", "triton") if name in found)
    return f"rmsnorm {rmsnorm.__version__} ({others})\n"


# --- printing ------------------------------------------------------------------------------------------------


class _ProgressLine:
    """How far the work is: on a terminal one line that is written over, else a line now and then."""

    SECONDS_BETWEEN = 10.0

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._rewrites = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
        self._said = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        text = f"{math.floor(100 * done / total) if total else 0} %  {one_line(what)}"
        if self._rewrites:
            self._write(f"\r\x1b[K{text[: self._width() - 1]}")
        elif time.monotonic() - self._said >= self.SECONDS_BETWEEN:
            self._said = time.monotonic()
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
            self._stream, self._rewrites = None, False  # nobody reads it any more; the work goes on


def _drawn(blocks: Iterable[display.Block]) -> str:
    color = sys.stdout is not None and display.colored(sys.stdout)
    return display.render(blocks, display.terminal_width(), color)


def _print(text: str) -> None:
    """Write to standard output. Raises CommandError if it takes no more; a reader that has gone is no mistake."""
    if sys.stdout is not None:
        _written(sys.stdout, text)


def _complain(message: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(CommandError):
            _written(sys.stderr, f"rmsnorm: {one_line(message)}\n")


def _written(stream: TextIO, text: str) -> bool:
    """Whether all of it was written: False if nobody reads the stream any more. Raises CommandError if it is full."""
    try:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # of a terminal that has no µ
        stream.write(text)
        stream.flush()
        return True
    except OSError as error:
        with open(os.devnull, "w") as nowhere, contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere.fileno(), stream.fileno())  # or the rest fails once more as Python exits
        if isinstance(error, BrokenPipeError):
            return False
        name = "error" if stream is sys.stderr else "output"
        raise CommandError(f"standard {name} cannot be written: {one_line(error)}") from None


if __name__ == "__main__":
    main()
