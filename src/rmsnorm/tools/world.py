"""`rmsnorm verify --world N`: the sweep of `verify.py`, each case sharded over N ranks, which are started here.

Every rank draws the whole of a case, gives the public API its own part as a DTensor, and gathers what came out; the
ranks take turns at counting it.
"""

import contextlib
import dataclasses
import datetime
import itertools
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from rmsnorm.errors import CommandError
from rmsnorm.functional import explain
from rmsnorm.ops.sharding import as_whole
from rmsnorm.tools import machine
from rmsnorm.tools.processes import end_silently_on_ctrl_c
from rmsnorm.tools.timing import Progress
from rmsnorm.tools.verify import (
    Case,
    Inputs,
    Outcome,
    Plan,
    Result,
    Tally,
    compare,
    count,
    differing,
    judge_rows,
    named,
    run_whole,
    sweep,
)

# What is sharded, along each dimension of the mesh.
LAYOUTS = {"rows": ("rows",), "columns": ("columns",), "rows and columns": ("rows", "columns")}
# A rank that waits longer than this for the others ends with an error.
_TIMEOUT = datetime.timedelta(minutes=5)


def verify_on_ranks(
    world: int,
    device: str | None = None,
    quick: bool = False,
    progress: Progress = lambda done, total, what: None,
    *,
    only: Sequence[str] = (),
) -> Result:
    """`verify.verify` with every case sharded over `world` ranks: gloo on the CPU, NCCL with one GPU for each.

    Raises CommandError for a device or a number of ranks that is not there, for a text of `only` that is in no name,
    and if a rank fails or dies.
    """
    place = machine.find_device(device)
    if world < 1:
        raise CommandError(f"--world {world}: give a number of ranks of at least 1")
    if place.type == "cuda" and world > torch.cuda.device_count():
        raise CommandError(f"--world {world}: there are {torch.cuda.device_count()} GPUs; give fewer, or --device cpu")
    start = time.perf_counter()
    x = torch.ones(1, 1280, dtype=torch.bfloat16, device=place)
    plans = named(sharded(sweep(quick), world), only)
    rows = judge_rows(plans, tallies_of_ranks(plans, world, place.type, progress))
    kernel = explain(x, x[0])
    facts = machine.describe(place)
    return Result(place.type, kernel, quick, time.perf_counter() - start, facts, rows, world, tuple(only))


def sharded(plans: list[Plan], world: int) -> list[Plan]:
    """The same cases, sharded in one way after the other. Rows and columns both take an even number of ranks."""
    layouts = [name for name, dims in LAYOUTS.items() if len(dims) == 1 or (world > 2 and world % 2 == 0)]
    return [
        dataclasses.replace(
            plan,
            cases=tuple(
                dataclasses.replace(case, sharding=layouts[(i + j) % len(layouts)]) for j, case in enumerate(plan.cases)
            ),
        )
        for i, plan in enumerate(plans)
    ]


def tallies_of_ranks(plans: list[Plan], world: int, device: str, progress: Progress) -> list[Tally]:
    """Start the ranks, and add up what each of them counted."""
    steps = multiprocessing.get_context("spawn").SimpleQueue()

    def pass_on() -> None:
        while (step := steps.get()) is not None:
            progress(*step)

    listener = threading.Thread(target=pass_on, daemon=True)
    listener.start()
    with tempfile.TemporaryDirectory() as logs, _launcher_silent():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world,
            run_id="rmsnorm-verify",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(logs, redirects=Std.OUT),  # NCCL logs there, where the JSON may go
        )
        try:
            counted = elastic_launch(config, _rank)(plans, device, steps)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            message = failure.message["message"] if isinstance(failure.message, dict) else failure.message
            raise CommandError(f"rank {rank} of {world} failed: {message}") from None
    steps.put(None)  # not after a failure: a rank that was killed may have taken the queue's lock with it
    listener.join()
    return [sum(tallies, Tally()) for tallies in zip(*counted.values(), strict=True)]


@contextlib.contextmanager
def _launcher_silent() -> Iterator[None]:
    """Without the launcher's warnings, of which Ctrl-C causes one a rank; what fails is raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


def _rank(plans: list[Plan], device_type: str, steps: Any) -> list[Tally]:
    """One rank. Only the first says how far it is."""
    end_silently_on_ctrl_c()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=_TIMEOUT)
    line = init_device_mesh(device_type, (world,))
    square = init_device_mesh(device_type, (2, world // 2)) if world > 2 and world % 2 == 0 else line
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    turns = itertools.cycle(range(world))

    def one(case: Case, seed: int) -> Tally:
        mesh = square if len(LAYOUTS[case.sharding]) > 1 else line
        return compare(case, seed, device, lambda inputs, case: run_sharded(inputs, case, mesh), next(turns) == rank)

    try:
        return count(plans, one, lambda *step: steps.put(step) if rank == 0 else None)
    finally:
        dist.destroy_process_group()


def run_sharded(inputs: Inputs, case: Case, mesh: DeviceMesh) -> Outcome:
    """Through the public API, on DTensors."""
    dims = LAYOUTS[case.sharding]

    def placements(t: Tensor) -> tuple[Placement, ...]:
        return tuple(Shard(t.dim() - (1 if dim == "columns" else 2)) for dim in dims)

    def share(t: Tensor) -> DTensor:
        return as_whole(_part(t, mesh, placements(t)), mesh, placements(t), t.shape)

    w = inputs.w
    if w is not None:
        of_w = tuple(Shard(0) if dim == "columns" else Replicate() for dim in dims)
        w = as_whole(_part(w, mesh, of_w), mesh, of_w, w.shape)
    ours = run_whole(dataclasses.replace(inputs.map(lambda t, _: share(t)), w=w), case)
    gathered = {
        name: t.full_tensor()
        for name in ("y", "s", "dx", "d_residual")
        if isinstance(t := getattr(ours, name), DTensor)
    }
    dw, astray = ours.dw, 0
    if isinstance(dw, DTensor) and "rows" not in dims:
        dw = dw.full_tensor()
    elif isinstance(dw, DTensor):
        if dims == ("rows",):
            own = run_whole(inputs.map(lambda t, _: _part(t, mesh, placements(t))), case).dw
            astray = 0 if own is None else differing(dw.to_local(), own)
        dw = None
    return dataclasses.replace(ours, **gathered, dw=dw, astray=astray)


def _part(t: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Tensor:
    """This rank's part, in the memory of the whole; empty where there are more ranks than rows or columns."""
    for i, p in enumerate(placements):
        if isinstance(p, Shard):
            n = t.shape[p.dim]
            size = -(-n // mesh.size(i))
            start = min(n, size * mesh.get_local_rank(i))
            t = t.narrow(p.dim, start, min(size, n - start))
    return t
