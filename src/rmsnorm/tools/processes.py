"""Worker processes, and ranks: processes that compute together as a group of torch.distributed."""

import contextlib
import datetime
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is public, but not in __all__

from rmsnorm.errors import CommandError, one_line
from rmsnorm.tools import machine, timing


def run_in_workers(work: Callable[..., object], tasks: Iterable[Any], *others: Any) -> None:
    """Call `work(task, *others)` for each task in new processes, to fill caches on disk with compiled kernels.

    Each worker gives torch one thread. Exceptions of the workers are ignored: the caller does the same work again and
    meets them there.

    Args:
        work: A function of a module, so that it can be pickled.
        tasks: The first argument of each call.
        others: The other arguments of all calls.
    """
    workers = min(machine.cores(), 16)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_initialize_worker) as pool:
        try:
            for done in [pool.submit(work, task, *others) for task in tasks]:
                with contextlib.suppress(Exception):
                    done.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _initialize_worker() -> None:
    torch.set_num_threads(1)
    exit_on_ctrl_c()


def exit_on_ctrl_c() -> None:
    """Let Ctrl-C end this process without a traceback: the terminal also interrupts its parent, which reports it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# --- ranks ---------------------------------------------------------------------------------------------------

# A rank that waits longer than this for the others ends with an error.
_TIMEOUT = datetime.timedelta(minutes=5)
# Seconds: to wait after the first failure for failures that say more; to leave the group; from SIGTERM to SIGKILL.
_SETTLE, _LEAVE, _TERMINATE = 0.5, 10.0, 5.0
# Of a rank on the CPU, which imports torch: half of the 510 MB that one uses in `rmsnorm verify`, since ranks share
# the pages of the libraries.
_LEAST_RANK_BYTES = 1 << 28


@dataclass(frozen=True)
class Rank:
    """What the work of a rank gets as its first argument.

    Attributes:
        index: Its number, from 0.
        world: How many ranks there are.
        device: Where it computes: the CPU, or a GPU of its own.
        report: Calls the parent's `on_report` with the same arguments.
    """

    index: int
    world: int
    device: torch.device
    report: Callable[..., None]


def check_world(world: int, device: torch.device, argument: str = "--world") -> None:
    """Check that so many ranks can run: with gloo on the CPU and memory for each, or with NCCL and a GPU for each.

    Args:
        world: The number of ranks.
        device: A device of the kind on which they are to run.
        argument: The option that gives the number, for the message.

    Raises:
        CommandError: If they cannot.
    """
    if world < 1:
        raise CommandError(f"{argument} is {world}, expected at least 1")
    if device.type == "cuda" and world > torch.cuda.device_count():
        raise CommandError(
            f"{argument} is {world}, but there are {torch.cuda.device_count()} GPUs: give fewer, or --device cpu"
        )
    there = machine.memory_bytes()
    if device.type != "cuda" and there is not None and world * _LEAST_RANK_BYTES > there:
        most = max(1, there // _LEAST_RANK_BYTES)
        raise CommandError(
            f"{argument} is {world}, but each rank is a process, and this machine's {there / 1e9:,.0f} GB of memory "
            f"are enough for {most:,}: give at most {most:,}"
        )


def run_ranks(
    work: Callable[..., Any],
    arguments: Sequence[Any],
    world: int,
    device_type: str,
    on_report: Callable[..., object] = timing.no_progress,
) -> list[Any]:
    """Call `work(rank, *arguments)` in a new process for each rank, all in one process group.

    If a rank fails, the caller is interrupted or `on_report` raises, the ranks that still run are ended. They also end
    if this process is killed. What they print to stdout is lost, because NCCL logs there.

    Args:
        work: A function of a module, so that it can be pickled. What it returns must be picklable, too.
        arguments: The other arguments of the call.
        world: The number of ranks.
        device_type: "cpu" for gloo, "cuda" for NCCL with a GPU for each rank.
        on_report: Called in this process with the arguments of each call of `rank.report`.

    Returns:
        What each rank returned.

    Raises:
        CommandError: If a rank raises an exception, is killed or exits; then the message names the rank. Also if
            temporary files cannot be written, which every rank needs.
    """
    machine.check_temporary_folder()
    spawn = multiprocessing.get_context("spawn")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started: list[_Started] = []
    patience = 0.0
    try:
        for index in range(world):
            ours, theirs = spawn.Pipe(duplex=False)
            given = theirs, index, world, device_type, store.port, work, arguments
            process = spawn.Process(target=_run_rank, args=given, name=f"rank {index}", daemon=True)
            process.start()
            theirs.close()  # the rank holds the only other handle, so the pipe ends with it
            started.append(_Started(index, process, ours))
        returned = _collect(started, on_report)
        patience = _LEAVE
    finally:
        _end(started, patience)
    return returned


@dataclass(frozen=True)
class _Started:
    index: int
    process: SpawnProcess
    messages: Connection


@dataclass(frozen=True)
class _Report:
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _Returned:
    value: Any


@dataclass(frozen=True)
class _Failure:
    """Why a rank has no result.

    Attributes:
        rank: Its number.
        why: What it did, in words.
        raised: Whether it raised an exception, which may be the consequence of another rank's end.
        at: When that was noticed.
    """

    rank: int
    why: str
    raised: bool
    at: float = field(default_factory=time.time)


def _collect(started: list[_Started], on_report: Callable[..., object]) -> list[Any]:
    """Take the messages of the ranks until all have returned. Raises CommandError if one fails."""
    returned: dict[int, Any] = {}
    failures: list[_Failure] = []
    running = {rank.index: rank for rank in started}
    deadline = math.inf
    while len(returned) < len(started) and running and timing.now() < deadline:
        handles = [handle for rank in running.values() for handle in (rank.messages, rank.process.sentinel)]
        ready = connection.wait(handles, None if deadline == math.inf else max(0.0, deadline - timing.now()))
        for rank in tuple(running.values()):
            if rank.messages not in ready and rank.process.sentinel not in ready:
                continue
            match _next_message(rank):
                case _Report(arguments):
                    on_report(*arguments)
                case _Returned(value):
                    returned[rank.index] = value
                case _Failure() as failure:
                    failures.append(failure)
                    del running[rank.index]
                case None:
                    del running[rank.index]
                    if rank.index not in returned:
                        failures.append(_Failure(rank.index, _how_it_ended(rank.process), raised=False))
        if failures:
            deadline = min(deadline, timing.now() + _SETTLE)
    if failures:
        first = min(failures, key=lambda failure: (failure.raised, failure.at))
        raise CommandError(f"rank {first.rank} of {len(started)} {first.why}")
    return [returned[index] for index in range(len(started))]


def _next_message(rank: _Started) -> Any:
    """Return what a rank sent, or None if it has ended."""
    try:
        return rank.messages.recv() if rank.messages.poll() else None
    except (EOFError, OSError):
        return None


def _how_it_ended(process: SpawnProcess) -> str:
    process.join(_SETTLE)  # its pipe may be closed a moment before it has ended
    code = process.exitcode
    if code is None or code >= 0:
        return f"ended without a result, with the exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + ("; the system may be out of memory" if -code == 9 else "")


def _end(started: list[_Started], patience: float) -> None:
    """Wait so many seconds for the ranks to end, then end them."""
    processes = [rank.process for rank in started]
    for stop, seconds in ((None, patience), (SpawnProcess.terminate, _TERMINATE), (SpawnProcess.kill, _TERMINATE)):
        for process in processes:
            if stop is not None and process.is_alive():
                stop(process)
        deadline = timing.now() + seconds
        for process in processes:
            process.join(max(0.0, deadline - timing.now()))
    for rank in started:
        rank.messages.close()


def _run_rank(
    messages: Connection, index: int, world: int, device_type: str, port: int, work: Callable[..., Any],
    arguments: Sequence[Any],
) -> None:  # fmt: skip
    """Run one rank in its process, and send what it returns or raises."""
    exit_on_ctrl_c()
    _exit_with_parent()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        device = _join(index, world, device_type, port)
        rank = Rank(index, world, device, lambda *arguments: messages.send(_Report(arguments)))
        messages.send(_Returned(work(rank, *arguments)))
    except BaseException as error:  # noqa: BLE001  # whatever it is, the parent has to know
        why = one_line(str(error) if isinstance(error, CommandError) else error)
        messages.send(_Failure(index, f"failed: {why}", raised=True))
        os._exit(1)  # leaving the group could wait for the others
    dist.destroy_process_group()


def _join(index: int, world: int, device_type: str, port: int) -> torch.device:
    """Join the process group, and return the device of this rank."""
    device = torch.device(device_type, index) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=_TIMEOUT)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=index, world_size=world, timeout=_TIMEOUT)
    return device


def _exit_with_parent() -> None:
    """End this process when its parent has ended, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
