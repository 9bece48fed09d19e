"""Times whole models with different norms, eagerly and compiled, and writes models-DEVICE.json.

    python benchmarks/models.py --out DIR                            every model, mode and variant
    python benchmarks/models.py --models llama,qwen3 --seconds 300   some models; what does not fit is left out
    python benchmarks/models.py --merge a.json b.json --out DIR      several runs as one result

The models have random weights and the widths of published models, but fewer layers, since most of the time goes into
compilation. A variant is a copy of the model that shares its weights and has other norms:

    as is          the model's own norms
    patched        rmsnorm.patch(model)
    not fused      rmsnorm.patch(model, fuse_residual=False), which differs only when compiled
    recomputed     rmsnorm.patch(model, recompute=True), which differs only in training
    Liger          Liger's Triton kernel, called with in_place=False as in `rmsnorm bench`
    F.rms_norm     torch.nn.functional.rms_norm
    no norms       the identity: what a step takes without norms

All variants of a model and a mode are called twice before any is timed. The first call compiles, from empty caches on
disk, and its time is that of the compilation. The second one is checked against the eager model as it is, and its
memory is measured: `kept` is what the forward pass leaves allocated, `peak` the most in the step, both beyond what was
before. Then all variants are timed once in every round, in random order. A ratio is the median over the rounds of the
time divided by that of "as is", eager or compiled alike, with the confidence interval of the sign test.

Of each model with the variants "patched" and "recomputed" in training, two more sections are measured:

    largest batch  how many sequences of 1024 tokens fit into a limited GPU memory, as is, patched and recomputed, found
                   by running training steps in eager mode
    gradients      in deterministic mode, how many elements of all gradients differ with and without recompute
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rmsnorm.errors import CommandError, one_line
from rmsnorm.tools import display, machine, results
from whole_models import definitions, gradients, measuring, result


def _named(known: Sequence[Any], what: str) -> Callable[[str], tuple[Any, ...]]:
    """Return what parses names that are separated by commas."""

    def parse(text: str) -> tuple[Any, ...]:
        by_name = {item.name: item for item in known}
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in by_name:
                raise argparse.ArgumentTypeError(f"{name!r} is not a {what}: give one of {', '.join(by_name)}")
        return tuple(item for item in known if item.name in names)

    return parse


def _sections(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in definitions.SECTIONS:
            known = ", ".join(definitions.SECTIONS)
            raise argparse.ArgumentTypeError(f"{name!r} is not a section: give one of {known}")
    return tuple(name for name in definitions.SECTIONS if name in names)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, known in (
        ("model", definitions.MODELS),
        ("mode", definitions.MODES),
        ("variant", definitions.VARIANTS),
    ):
        names = ", ".join(item.name for item in known)
        parser.add_argument(
            f"--{option}s",
            type=_named(known, option),
            default=known,
            metavar="NAME,…",
            help=f"of {names}; default: all",
        )
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument(
        "--repetitions", type=int, default=measuring.FEWEST_ROUNDS, metavar="N",
        help="the fewest samples of each variant (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=570.0, metavar="S",
        help="a model and mode that is not expected to fit is left out (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--sections", type=_sections, default=definitions.SECTIONS, metavar="NAME,…",
        help=f"of {', '.join(definitions.SECTIONS)}; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=float, default=24.0, metavar="GB",
        help="the GPU memory within which the largest batch is searched (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, metavar="N", help="the number of layers of every model")
    parser.add_argument("--backend", default="inductor", help="the backend of torch.compile (default: %(default)s)")
    parser.add_argument("--compile-mode", metavar="MODE", help="the mode of torch.compile, such as reduce-overhead")
    parser.add_argument(
        "--tiny", action="store_true", help="one layer and a few tokens: tries the script, also on a CPU"
    )
    parser.add_argument("--out", type=Path, help="a folder for models-DEVICE.json")
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="FILE", help="merge these results instead of measuring"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(arguments)
    for option in ("repetitions", "layers"):
        if (value := getattr(given, option)) is not None and value < 1:
            parser.error(f"--{option} {value}: give at least 1")

    if not given.limit > 0:
        parser.error(f"--limit {given.limit:g}: give more than 0")

    def write(found: dict[str, Any]) -> None:
        if given.out is not None:
            results.write_json(given.out / f"models-{found['machine']['device']}.json", found)

    if given.out is not None:
        results.check_folder(given.out)
    if given.merge:
        found = result.merge([_load(path) for path in given.merge])
        write(found)
    else:
        gradients.prepare()
        device = machine.find_device(given.device)
        # Without a mode that torch.compile takes, its default.
        compiled = {"backend": given.backend} | ({"mode": given.compile_mode} if given.compile_mode else {})
        variants = tuple(v for v in definitions.VARIANTS if v.name == definitions.AS_IS or v in given.variants)
        modes = tuple(mode.shrunk() for mode in given.modes) if given.tiny else given.modes
        with tempfile.TemporaryDirectory(prefix="rmsnorm-models-", ignore_cleanup_errors=True) as cache:
            options = definitions.Options(
                device=device, models=given.models, modes=modes, variants=variants, sections=given.sections,
                limit=int(given.limit * 1e9), compiled=compiled, tiny=given.tiny, layers=given.layers,
                rounds=given.repetitions, seconds=given.seconds, cache=Path(cache),
                say=lambda what: print(f"… {what}", file=sys.stderr, flush=True),
            )  # fmt: skip
            found = measuring.Run(options, write).measure()
    print(display.render(result.blocks(found), display.terminal_width()), end="")


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CommandError(f"--merge {path}: {one_line(error)}") from None
    if not isinstance(found, dict) or found.get("verb") != "models":
        raise CommandError(f"--merge {path}: give the JSON of a run of models.py")
    return found


if __name__ == "__main__":
    try:
        main()
    except CommandError as error:
        sys.exit(f"models.py: {error}")
