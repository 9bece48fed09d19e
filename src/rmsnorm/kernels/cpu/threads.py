"""Runs machine code on as many threads as torch uses: torch's OpenMP threads, or a small pool of our own.

torch's threads are preferred: a second pool competes with them for the processors and takes 60 us to wake up. The pool
serves forked children, in which OpenMP deadlocks, and builds of torch without OpenMP. Numba's threading layers would
fail in both cases too.

A Python signal handler can raise between any two bytecodes. So a single call into C covers everything from the start
of the first thread to the end of the last one's work; no exception can leave a thread running on freed memory.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmsnorm import kernels
from rmsnorm.kernels.plan import NativeLaunch, NativeTeam

# Pieces of work for each thread, so that the others can take over if one is delayed. Not measured alone.
_PIECES = 8
_WORD = ctypes.c_int64

Task = Callable[[int], None]  # a ctypes function
_Jobs = queue.SimpleQueue[tuple[Task, int, Any]]


@dataclass(frozen=True)
class Team:
    """How several threads share M rows; each takes at least `rows` at once.

    drain: machine code that processes pieces until none is left; its argument is the address of the array that
    `MachineCode.run` makes. wait: returns machine code that waits until all pieces are done, or the reason why that
    cannot be compiled.
    """

    M: int
    rows: int
    drain: Any
    wait: Callable[[], Task | str]


@dataclass(frozen=True, eq=False)
class MachineCode:
    """A launch of CPU code whose arguments are the addresses of tensors and then `words`.

    Absent tensors pass a null pointer.

    function: what `compiling.compiled` returns. team: None if one thread makes the whole call; otherwise the function
    takes two more words, the first row and the end of the range. keeps: the memory that the words point to.
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

    def remark(self) -> str | None:
        why = self.function.not_kept
        return None if why is None else f"each process compiles the kernel, because it cannot be kept: {why}"

    def renamed(self, names: Mapping[str, str]) -> "MachineCode":
        return replace(self, tensors=tuple(None if name is None else names[name] for name in self.tensors))

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


def run(task: Task, wait: Callable[[], Task | str], argument: int, pieces: int, keeps: Any) -> None:
    """Runs task(argument) on the calling thread and others, at most `pieces` at once, and returns when all is done.

    Each thread processes pieces until none is left; the task must not need the GIL. wait()(argument) returns when all
    pieces are done. keeps: the memory that a thread still reads if it starts after all pieces are taken.
    """
    count = torch.get_num_threads()
    team = _together()
    if min(count, pieces) < 2:
        task(argument)
    elif team is not None:
        team(task, argument, count, 0)  # all of torch's threads: a smaller team would terminate the rest
    else:
        until_done = wait()
        jobs, helpers = _helpers(min(count, pieces) - 1)
        if isinstance(until_done, str) or helpers == 0:
            task(argument)
            return
        functions: tuple[Any, ...] = (*[jobs.put] * helpers, task, until_done)
        arguments: tuple[Any, ...] = (*[(task, argument, keeps)] * helpers, argument, argument)
        collections.deque(map(operator.call, functions, arguments), maxlen=0)  # one call into C: see above


def _together() -> Callable[[Task, int, int, int], Any] | None:
    """`_team_of_openmp` if it may be called in this process, else None."""
    return _team_of_openmp() if os.getpid() == kernels.PROCESS and not _was_forked() else None


@functools.cache
def _team_of_openmp() -> Callable[[Task, int, int, int], Any] | None:
    """GOMP_parallel of the OpenMP library that torch loaded, which runs a function on a team of threads, or None."""
    team = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
    if team is not None:
        team.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        team.restype = None
    return team


_FORKED_AND_NO_EXEC = 0x40  # PF_FORKNOEXEC of Linux: the process was forked and has not called exec since


@functools.cache
def _was_forked() -> bool:
    """Whether this process is a fork of one that may have used OpenMP. True if that is unknown."""
    try:
        flags = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[6]
        return bool(int(flags) & _FORKED_AND_NO_EXEC)
    except (OSError, IndexError, ValueError):  # not Linux, or /proc is not mounted
        return True


def _helpers(wanted: int) -> tuple[_Jobs, int]:
    """Starts helper threads up to the wanted number; returns their job queue and how many can be used."""
    jobs, started = _pool(os.getpid())
    with contextlib.suppress(RuntimeError):  # the system may refuse to start a thread
        while len(started) < wanted:
            # Not threading.Thread or ThreadPoolExecutor: a signal handler's exception can leave their locks held.
            started.append(_thread.start_new_thread(_serve, (jobs,)))
    return jobs, min(wanted, len(started))


@functools.lru_cache(maxsize=1)
def _pool(pid: int) -> tuple[_Jobs, list[int]]:
    """The job queue and threads of this process. The pid is a key because threads do not survive a fork."""
    return queue.SimpleQueue(), []


def _serve(jobs: _Jobs) -> None:
    while True:
        task, argument, _ = jobs.get()
        task(argument)
