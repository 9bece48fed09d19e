"""Measures norms and training steps on several GPUs, and writes many-gpus-DEVICE.json.

    python benchmarks/many_gpus.py --out DIR                 1, 2, 4, … ranks, as many as there are GPUs
    python benchmarks/many_gpus.py --worlds 1,2 --sections steps
    python benchmarks/many_gpus.py --tiny --device cpu       tries the script with gloo on the CPU

Three sections are measured with each number of ranks:

    bits    y, x + residual and dx of norms that are sharded by rows, by columns, by both and by FSDP2, compared bit by
            bit with those of one device; and dw, compared as docs/sharding.md defines it
    norms   times of a norm of whole rows on one device, sharded by rows and sharded by columns, and the least that the
            last one needs: the kernel on a part of the columns, and the all-reduce of one number a row
    steps   a training step, without an optimizer, of a Llama model with random weights in bf16, as it is and patched:
            under FSDP2, under sequence parallel with tensor parallel, and under both (with an even number of ranks, of
            which two at a time are tensor parallel). The step adds up the gradients of norms that every rank holds.

All calls are timed once in every round, in an order that is shuffled in each round. A sample is the time of the slowest
rank, from a barrier until host and GPU have finished. Then one step is profiled. The result has the time of the kernels
of norms, of the collectives inside norms, and of all other collectives, relative to the median step. These shares can
add up to more than 1: kernels run at the same time, and a collective also waits for the other ranks.

If a rank fails, the others are ended, the parts that were measured before are kept, and the exit status is 1.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from many import definitions, measuring, result
from rmsnorm.errors import CommandError
from rmsnorm.tools import display, machine, processes, results


def _names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r}: give some of {', '.join(known)}")
        return tuple(name for name in known if name in names)

    return parse


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of ranks, such as 1,2") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument(
        "--worlds", type=_numbers, metavar="N,…", help="the numbers of ranks (default: 1, 2, 4, … up to all GPUs)"
    )
    for option, known in (("sections", definitions.SECTIONS), ("plans", definitions.PLANS)):
        parser.add_argument(
            f"--{option}",
            type=_names(known),
            default=known,
            metavar="NAME,…",
            help=f"of {', '.join(known)}; default: all",
        )
    for option, default, what in (
        ("repetitions", 15, "samples of each call"),
        ("batch", 2, "sequences of a step, for each data-parallel rank"),
        ("tokens", 4096, "tokens of a sequence"),
        ("layers", definitions.LAYERS, "layers of the model"),
    ):
        parser.add_argument(
            f"--{option}", type=_positive, default=default, metavar="N", help=f"{what} (default: {default})"
        )
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script, also on a CPU")
    parser.add_argument("--out", type=Path, help="a folder for many-gpus-DEVICE.json")
    return parser


def _default_worlds(device: torch.device) -> tuple[int, ...]:
    most = torch.cuda.device_count() if device.type == "cuda" else 2
    return tuple(itertools.takewhile(lambda world: world <= most, (2**k for k in itertools.count())))


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    device = machine.find_device(given.device)
    worlds = given.worlds or _default_worlds(device)
    for world in worlds:
        processes.check_world(world, device, "--worlds")
    if given.out is not None:
        results.check_folder(given.out)
    sizes = {"batch": 2, "tokens": 16, "layers": 2} if given.tiny else {}
    options = definitions.Options(
        tiny=given.tiny, sections=given.sections, plans=given.plans, repetitions=given.repetitions,
        **({"batch": given.batch, "tokens": given.tokens, "layers": given.layers} | sizes),
    )  # fmt: skip

    def write(found: dict[str, Any]) -> None:
        if given.out is not None:
            results.write_json(given.out / f"many-gpus-{device.type}.json", found)

    found = measuring.measure(
        device, worlds, options, lambda what: print(f"… {what}", file=sys.stderr, flush=True), write
    )
    print(display.render(result.blocks(found), display.terminal_width()), end="")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CommandError as error:
        sys.exit(f"many_gpus.py: {error}")
