"""Machine code on as many threads as torch uses: torch's own, which wait for work, or a small pool beside them.

Threads of another pool would compete with torch's for the processors, and take 60 us to wake. But a team of OpenMP
hangs in a forked child, and not every build of torch has OpenMP; Numba's own layers would fail there too.

A signal handler of Python can raise between any two bytecodes. So everything from the first thread's start to the end
of the last one's work is a single call into C: no exception can leave a thread at work on memory that is gone.
"""

import _thread
import collections
import contextlib
import ctypes
import functools
import operator
import os
import queue
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmsnorm import kernels
from rmsnorm.kernels.plan import NativeLaunch, NativeTeam

_PIECES = 8  # of the work a thread, so that one that is held up leaves its share to the others
_WORD = ctypes.c_int64

Task = Callable[[int], None]  # what ctypes makes of machine code
_Jobs = queue.SimpleQueue[tuple[Task, int, Any]]


@dataclass(frozen=True)
class Team:
    """How several threads share M rows, of which each takes `rows` at once, at least.

    drain: machine code that takes pieces of the work until none is left; its argument is the address of what
    `MachineCode` lays out. wait: gives machine code that returns when all of them are done, or None.
    """

    M: int
    rows: int
    drain: Any
    wait: Callable[[], Task | None]


@dataclass(frozen=True, eq=False)
class MachineCode:
    """A launch of code for the CPU, which takes the addresses of tensors, null where there is none, and then words.

    function: what ctypes makes of it, with its `address`. team: None where one thread makes the whole call; otherwise
    two more words follow, the first row and the one after the last. keeps: what the words point to.
    """

    function: Any
    tensors: tuple[str | None, ...]
    words: tuple[int, ...]
    team: Team | None = None
    keeps: Any = None

    def run(self, tensors: Mapping[str, Tensor | None]) -> None:
        addresses = [None if name is None else tensors[name].data_ptr() for name in self.tensors]  # type: ignore[union-attr]
        team = self.team
        if team is None:
            self.function(*addresses, *self.words)
            return
        rows = team.rows * max(1, -(-team.M // team.rows) // (_PIECES * torch.get_num_threads()))
        words = (0, 0, team.M, rows, self.function.address, *(address or 0 for address in addresses), *self.words)
        call = (_WORD * len(words))(*words)
        run(team.drain, team.wait, ctypes.addressof(call), -(-team.M // rows), call)

    def native(self) -> NativeLaunch | str:
        arguments = (*(name or 0 for name in self.tensors), *self.words)
        if self.team is None:
            return NativeLaunch(self.function.address, arguments)
        together = _together()
        if together is None:
            return "several CPU threads share its rows, and not torch's own"
        address: Any = ctypes.cast(together, ctypes.c_void_p).value  # type: ignore[arg-type]
        team = NativeTeam(
            M=self.team.M, rows=self.team.rows, drain=self.team.drain.address, parallel=address,
            process=kernels.PROCESS, pieces=_PIECES,
        )  # fmt: skip
        return NativeLaunch(self.function.address, arguments, team)


def run(task: Task, wait: Callable[[], Task | None], argument: int, pieces: int, keeps: Any) -> None:
    """Have task(argument) run on several threads at once, at most `pieces`; the calling thread is one of them.

    Each takes pieces of the work until none is left. Neither may need the GIL. wait()(argument) returns when all
    pieces are done. keeps: what a thread that comes too late to get a piece still reads.
    """
    count = torch.get_num_threads()
    team = _together()
    if min(count, pieces) < 2:
        task(argument)
    elif team is not None:
        team(task, argument, count, 0)  # all of torch's: those beyond a smaller team would end
    else:
        until_done = wait()
        jobs, helpers = _helpers(min(count, pieces) - 1)
        if until_done is None or helpers == 0:
            task(argument)
            return
        functions: tuple[Any, ...] = (*[jobs.put] * helpers, task, until_done)
        arguments: tuple[Any, ...] = (*[(task, argument, keeps)] * helpers, argument, argument)
        collections.deque(map(operator.call, functions, arguments), maxlen=0)  # one call into C, see above


def _together() -> Callable[[Task, int, int, int], Any] | None:
    """`_team_of_openmp` where it may be called."""
    return _team_of_openmp() if os.getpid() == kernels.PROCESS and not _was_forked() else None


@functools.cache
def _team_of_openmp() -> Callable[[Task, int, int, int], Any] | None:
    """How the OpenMP that torch has loaded runs a function on all threads of a team; None if there is none."""
    team = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
    if team is not None:
        team.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        team.restype = None
    return team


_FORKED_AND_NO_EXEC = 0x40  # PF_FORKNOEXEC of Linux: no program was executed since the process was forked


@functools.cache
def _was_forked() -> bool:
    """Whether another process, which may have used a team, was forked into this one. True where that is unknown."""
    try:
        flags = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[6]
        return bool(int(flags) & _FORKED_AND_NO_EXEC)
    except (OSError, IndexError, ValueError):  # no Linux, or /proc is not mounted
        return True


def _helpers(wanted: int) -> tuple[_Jobs, int]:
    """The queue that the helpers of this process take jobs from, and how many there are, at most as many as wanted."""
    jobs, started = _pool(os.getpid())
    with contextlib.suppress(RuntimeError):  # the system may have no thread left to give
        while len(started) < wanted:
            # Not threading.Thread, nor a ThreadPoolExecutor: an exception inside of their locks leaves them locked.
            started.append(_thread.start_new_thread(_serve, (jobs,)))
    return jobs, min(wanted, len(started))


@functools.lru_cache(maxsize=1)
def _pool(pid: int) -> tuple[_Jobs, list[int]]:
    """The pid is a key because threads do not survive a fork: a child makes a pool of its own."""
    return queue.SimpleQueue(), []


def _serve(jobs: _Jobs) -> None:
    while True:
        task, argument, _ = jobs.get()
        task(argument)
