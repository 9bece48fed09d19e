"""The command `rmsnorm`: parse, call, print. Exit code 0 if all is well, 1 if a check is red, 2 for a wrong call."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

from rmsnorm import measure
from rmsnorm.errors import CommandError, one_line


def main() -> None:
    """Run the command line on `sys.argv`."""
    try:
        app = _app()
    except ImportError as error:
        _fail(f"the command line needs {error.name}: pip install 'rmsnorm[report]'")
    app()


def _fail(message: str) -> NoReturn:
    print(f"rmsnorm: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


def _app() -> Any:
    import rich  # noqa: F401  # so that its absence is noticed here
    import typer

    app = typer.Typer(no_args_is_help=True, add_completion=False, help="RMSNorm: verified, measured, put into models.")
    Json = Annotated[Path | None, typer.Option("--json", help="Write the result as JSON; - for standard output.")]
    Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU if there is one.")]

    @app.command()
    def verify(
        device: Device = None,
        quick: Annotated[bool, typer.Option("--quick", help="A sixth of the sweep, in under a minute.")] = False,
        world: Annotated[int | None, typer.Option(help="Shard every case over so many ranks, started here.")] = None,
        json: Json = None,
    ) -> None:
        """Hold the kernels to the contract, over more than 10⁸ outputs."""
        if world is None:
            from rmsnorm.verify import verify as run

            _run(lambda progress: run(device, quick, progress), json)
        else:
            from rmsnorm.world import verify_on_ranks

            _run(lambda progress: verify_on_ranks(world, device, quick, progress), json)

    @app.command()
    def bench(
        device: Device = None,
        quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes and calls.")] = False,
        out: Annotated[Path | None, typer.Option(help="A folder for bench-DEVICE.json.")] = None,
        plot: Annotated[Path | None, typer.Option(help="Draw the shares of a copy's speed: a .svg or .png.")] = None,
        stored: Annotated[Path | None, typer.Option("--from", help="Take this JSON, and measure nothing.")] = None,
        dtype: Annotated[list[str] | None, typer.Option(help="Only this dtype; may be given again.")] = None,
        mode: Annotated[list[str] | None, typer.Option(help="Only this mode; may be given again.")] = None,
        provider: Annotated[
            list[str] | None, typer.Option(help="Only this, ours and a copy; may be given again.")
        ] = None,
        json: Json = None,
    ) -> None:
        """Measure this norm beside the others, in one run."""
        from rmsnorm.bench import main as run

        some = {"dtypes": dtype or (), "modes": mode or (), "names": provider or ()}
        _run(lambda progress: run(device, quick, out, progress, drawing=plot, stored=stored, **some), json)

    @app.command()
    def report(
        target: Annotated[str, typer.Argument(help="deepseek-ocr, or a checkpoint's folder.")] = "deepseek-ocr",
        out: Annotated[Path, typer.Option(help="The folder that report.json goes to.")] = Path(),
        device: Device = None,
        tokens: Annotated[int, typer.Option(help="The length of the sequence.")] = 2048,
        seconds: Annotated[float, typer.Option(help="About how long it may take.")] = 90.0,
        json: Json = None,
    ) -> None:
        """Prove and replace the norms of a model, and say what that gained."""
        from rmsnorm.report import main as run

        _run(lambda progress: run(target, out, progress, device=device, tokens=tokens, seconds=seconds), json)

    @app.command()
    def cost(
        target: Annotated[
            str, typer.Argument(metavar="CONFIG.json|PRESET", help="A model's configuration, or a preset.")
        ],
        batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
        seq: Annotated[int, typer.Option(help="Tokens of each.")] = 8192,
        dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
        gpu: Annotated[str | None, typer.Option(help="Predict times for it, h200 for example.")] = None,
        json: Json = None,
    ) -> None:
        """Count what a model's norms cost, from its configuration alone."""
        from rmsnorm.predict import main as run

        _run(lambda progress: run(target, progress, batch=batch, seq=seq, dtype=dtype, gpu=gpu), json)

    return app


def _run(call: Callable[[Callable[[int, int, str], None]], Any], json_path: Path | None) -> None:
    """Call with a progress bar on standard error; print the table, or the JSON where it was asked for."""
    from rich.console import Console
    from rich.progress import Progress

    to_screen = json_path is not None and str(json_path) in ("-", "/dev/stdout")
    handle = None
    try:
        if json_path is not None and not to_screen:
            if not json_path.absolute().parent.is_dir():
                _fail(f"--json {json_path}: there is no folder {json_path.absolute().parent}")
            handle = measure.check_file(json_path, "--json")
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)

            def progress(done: int, total: int, what: str) -> None:
                bar.update(task, completed=done, total=total, description=what)

            result = call(progress)
        text = json.dumps(result.to_json(), indent=2) + "\n"
        if json_path is not None and not to_screen:
            measure.write_output(json_path, text.encode(), "--json", handle)
        _show(text if to_screen else result.table())
    except CommandError as error:
        _fail(str(error))
    raise SystemExit(0 if result.ok else 1)


def _show(what: Any) -> None:
    """Print a text as it is, anything else as rich draws it. Raises CommandError if standard output takes no more."""
    from rich.console import Console

    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # of a terminal that has no ≠
        if isinstance(what, str):
            sys.stdout.write(what)
        else:
            Console().print(what)
        sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "w") as nowhere, contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # or the rest fails once more as Python exits
        raise CommandError(f"standard output cannot be written: {one_line(error)}") from None


if __name__ == "__main__":
    main()
