"""Runs `rmsnorm verify --world N`: the same sweep with each case sharded over N ranks, which are started here.

Every rank draws the whole inputs of a case, passes its own part to the public API as a DTensor, and gathers the
outputs. The ranks take turns comparing them.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from rmsnorm.ops.sharding import as_whole
from rmsnorm.tools import machine, processes
from rmsnorm.tools.processes import Rank
from rmsnorm.tools.timing import Progress, no_progress
from rmsnorm.tools.verify.cases import SweepRow, VerifyCase, select_rows, sweep
from rmsnorm.tools.verify.command import count_cases, finish
from rmsnorm.tools.verify.compare import CallOutputs, compare, differing, run_unsharded
from rmsnorm.tools.verify.inputs import Inputs
from rmsnorm.tools.verify.judge import judge_all
from rmsnorm.tools.verify.result import VerifyResult
from rmsnorm.tools.verify.tally import Tally

# By name: what is sharded along each dimension of the device mesh.
SHARDINGS = {"rows": ("rows",), "columns": ("columns",), "rows and columns": ("rows", "columns")}


def verify_on_ranks(
    world: int,
    device: str | None = None,
    quick: bool = False,
    progress: Progress = no_progress,
    *,
    only: Sequence[str] = (),
) -> VerifyResult:
    """Check the contract with every case sharded over several ranks: gloo on the CPU, NCCL with a GPU for each rank.

    Args:
        world: The number of ranks.
        device: "cpu" or "cuda"; by default the GPU if there is one.
        quick: Whether to compute a sixth of the outputs.
        progress: Called with the number of outputs that are done, that of all outputs, and the name of the next row.
        only: Texts; only rows with one of them in their names run.

    Returns:
        What was found.

    Raises:
        CommandError: If the device or so many ranks cannot be used, a text is in no row's name, or a rank fails.
    """
    where = machine.find_device(device)
    processes.check_world(world, where)
    start = time.perf_counter()
    rows = select_rows(assign_shardings(sweep(quick), world), only)
    results = judge_all(rows, tallies_of_ranks(rows, world, where.type, progress))
    return finish(where.type, where, quick, start, results, world, only)


def assign_shardings(rows: list[SweepRow], world: int) -> list[SweepRow]:
    """Return the rows with a sharding assigned to each case, the shardings in turn.

    Sharding both rows and columns needs an even number of ranks greater than 2.
    """
    shardings = [name for name, dims in SHARDINGS.items() if len(dims) == 1 or (world > 2 and world % 2 == 0)]
    return [
        dataclasses.replace(
            row,
            cases=tuple(
                dataclasses.replace(case, sharding=shardings[(i + j) % len(shardings)])
                for j, case in enumerate(row.cases)
            ),
        )
        for i, row in enumerate(rows)
        # Gated norms and the operator that adds gradients have no rule for sharded tensors. If each head has its own
        # weight, dw is sharded in a way that is not compared here.
        if not row.cases[0].summands and row.cases[0].gate is None and row.cases[0].heads == 1
    ]


def tallies_of_ranks(rows: list[SweepRow], world: int, device: str, progress: Progress) -> list[Tally]:
    """Start the ranks and run the rows on them.

    Args:
        rows: The rows, with a sharding assigned to each case.
        world: The number of ranks.
        device: "cpu" or "cuda".
        progress: Called in this process as `command.count_cases` does.

    Returns:
        A tally for each row, added up over the ranks.

    Raises:
        CommandError: If a rank fails or is killed.
    """
    counted = processes.run_ranks(_count_on_rank, (rows,), world, device, progress)
    return [sum(tallies, Tally()) for tallies in zip(*counted, strict=True)]


def _count_on_rank(rank: Rank, rows: list[SweepRow]) -> list[Tally]:
    """Count the rows on one rank. Only the first one reports progress."""
    kind, world = rank.device.type, rank.world
    line = init_device_mesh(kind, (world,))
    square = init_device_mesh(kind, (2, world // 2)) if world > 2 and world % 2 == 0 else line
    turns = itertools.cycle(range(world))

    def count(case: VerifyCase, seed: int) -> Tally:
        mesh = square if len(SHARDINGS[case.sharding]) > 1 else line
        own_turn = next(turns) == rank.index
        return compare(case, seed, rank.device, lambda inputs, case: run_sharded(inputs, case, mesh), own_turn)

    return count_cases(rows, count, rank.report if rank.index == 0 else no_progress)


def run_sharded(inputs: Inputs, case: VerifyCase, mesh: DeviceMesh) -> CallOutputs:
    """Call the public API on DTensors, and gather what it returns.

    Args:
        inputs: The whole inputs, the same on every rank.
        case: The case, with its sharding.
        mesh: The device mesh, with as many dimensions as the sharding of the case.
    """
    dims = SHARDINGS[case.sharding]

    def placements(t: Tensor) -> tuple[Placement, ...]:
        return tuple(Shard(t.dim() - (1 if dim == "columns" else 2)) for dim in dims)

    def share(t: Tensor) -> DTensor:
        return as_whole(_part(t, mesh, placements(t)), mesh, placements(t), t.shape)

    w = inputs.w
    if w is not None:
        of_w = tuple(Shard(0) if dim == "columns" else Replicate() for dim in dims)
        w = as_whole(_part(w, mesh, of_w), mesh, of_w, w.shape)
    ours = run_unsharded(dataclasses.replace(inputs.map(lambda t, _: share(t)), w=w), case)
    gathered = {
        name: t.full_tensor()
        for name in ("y", "s", "dx", "d_residual")
        if isinstance(t := getattr(ours, name), DTensor)
    }
    dw, misplaced = ours.dw, 0
    if isinstance(dw, DTensor):
        if dw.placements != tuple(Shard(0) if dim == "columns" else Partial() for dim in dims):
            misplaced = dw.numel()
        elif dims == ("rows",):
            own = run_unsharded(inputs.map(lambda t, _: _part(t, mesh, placements(t))), case).dw
            misplaced = 0 if own is None else differing(dw.to_local(), own)
        dw = None if "rows" in dims else dw.full_tensor()
    return dataclasses.replace(ours, **gathered, dw=dw, misplaced=misplaced)


def _part(t: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Tensor:
    """Return this rank's part as a view; it is empty if there are more ranks than rows or columns."""
    for i, p in enumerate(placements):
        if isinstance(p, Shard):
            n = t.shape[p.dim]
            size = -(-n // mesh.size(i))
            start = min(n, size * mesh.get_local_rank(i))
            t = t.narrow(p.dim, start, min(size, n - start))
    return t
