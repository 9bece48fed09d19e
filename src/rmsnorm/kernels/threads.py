"""Machine code on as many threads as torch uses: torch's own, which wait for work, or a small pool beside them.

Threads of another pool would compete with torch's for the processors, and take 60 us to wake. But a team of OpenMP
hangs in a forked child, and not every build of torch has OpenMP; Numba's own layers would fail there too.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from rmsnorm import kernels

Task = Callable[[int], None]  # what ctypes makes of machine code


def run(task: Task, argument: int, pieces: int) -> None:
    """Have task(argument) run on several threads at once, at most `pieces`; the calling thread is one of them.

    Each takes pieces of the work until none is left. The task must not need the GIL.
    """
    count = torch.get_num_threads()
    team = _team_of_openmp() if os.getpid() == kernels.PROCESS else None
    if min(count, pieces) < 2:
        task(argument)
    elif team is not None:
        team(task, argument, count, 0)  # all of torch's: those beyond a smaller team would end
    else:
        helpers = min(count, pieces) - 1
        pool = _pool(os.getpid(), helpers)
        futures = [pool.submit(task, argument) for _ in range(helpers)]
        try:
            task(argument)
        finally:  # also on KeyboardInterrupt: a helper must not outlive the tensors it works on
            for future in futures:
                if not future.cancel():
                    future.result()


@functools.cache
def _team_of_openmp() -> Callable[[Task, int, int, int], Any] | None:
    """How the OpenMP that torch has loaded runs a function on all threads of a team; None if there is none."""
    team = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
    if team is not None:
        team.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        team.restype = None
    return team


@functools.lru_cache(maxsize=1)
def _pool(pid: int, helpers: int) -> ThreadPoolExecutor:
    """The pid is a key because threads do not survive a fork: a child makes a pool of its own."""
    return ThreadPoolExecutor(helpers, thread_name_prefix="rmsnorm")
