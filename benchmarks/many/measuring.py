"""Everything that is measured on one rank, and one run for each number of ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from many import norms, plans, result, steps
from many.definitions import BITS, LEFT_OUT, NORMS, STEPS, Options
from rmsnorm.errors import CommandError
from rmsnorm.functional import wait_for_host
from rmsnorm.tools import machine, processes, timing
from rmsnorm.tools.models import library
from rmsnorm.tools.processes import Rank
from rmsnorm.tools.verify.cases import SweepRow
from rmsnorm.tools.verify.command import compile_ahead


def measure(
    device: torch.device,
    worlds: Sequence[int],
    options: Options,
    say: Callable[[str], None],
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure with each number of ranks.

    Args:
        device: A GPU, if each rank is to have one, or the CPU.
        worlds: The numbers of ranks.
        options: What is measured.
        say: Called with a line of text for each part that was measured.
        write: Called with the result after each part, so that nothing is lost if a later part fails.

    Returns:
        The result, in types that `json.dumps` takes. If a rank fails, `failed` has the reason, by the number of ranks,
        and the parts that were measured before are kept.
    """
    start = timing.now()
    found: dict[str, Any] = {
        "verb": "many_gpus",
        "machine": machine.describe(device),
        "tiny": options.tiny,
        "worlds": list(worlds),
        "sections": list(options.sections),
        "plans": list(options.plans),
        "repetitions": options.repetitions,
        BITS: [],
        NORMS: [],
        STEPS: [],
        LEFT_OUT: [],
        "failed": {},
        "bounds": [],
        "seconds": 0.0,
    }

    def keep(world: int, section: str, parts: list[dict[str, Any]]) -> None:
        found[section] += [{"world": world} | part for part in parts]
        found["bounds"] = result.bounds(found)
        found["seconds"] = round(timing.now() - start, 1)
        write(found)
        say(f"{result.ranks(world)}: {section}{', '.join(['', *(part['plan'] for part in parts if 'plan' in part)])}")

    if device.type == "cuda" and BITS in options.sections:
        compile_ahead([SweepRow("form", "many GPUs", tuple(options.bit_cases()))], device, timing.no_progress)
    for world in worlds:
        try:
            processes.run_ranks(
                measure_on_rank, (options,), world, device.type, lambda *part, world=world: keep(world, *part)
            )
        except CommandError as error:
            found["failed"][str(world)] = str(error)
            say(str(error))
            write(found)
    return found


def measure_on_rank(rank: Rank, options: Options) -> None:
    """Measure everything on one rank. The first rank reports each section, or part of it, when it is measured."""
    wait_for_host()

    def report(section: str, parts: list[dict[str, Any]]) -> None:
        if rank.index == 0:
            rank.report(section, parts)

    if BITS in options.sections and rank.world > 1:
        report(BITS, norms.compare_bits(rank, options))
    if NORMS in options.sections and rank.world > 1:
        report(NORMS, norms.time_norms(rank, options))
    if STEPS in options.sections:
        with library.quiet():
            built = steps.build(rank, options)
            for plan in options.plans:
                reason = plans.why_not(plan, rank.world, built.config, options.tokens)
                if reason:
                    report(LEFT_OUT, [{"plan": plan, "reason": reason}])
                else:
                    report(STEPS, [steps.measure_plan(plan, built, rank, options)])
