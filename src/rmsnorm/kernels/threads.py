"""A small pool of the library's own, that follows torch.get_num_threads() and survives fork.

Numba's own layers do not do: with omp a forked child dies, workqueue aborts when two threads enter.
"""

import functools
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def run(task: Callable[[int, int], None], count: int) -> None:
    """Have task(first, last) cover range(count), each index once, on as many threads as torch uses.

    The calling thread works too. The tasks must release the GIL to gain anything.
    """
    helpers = min(torch.get_num_threads(), count) - 1
    if helpers < 1:
        task(0, count)
        return
    # A few pieces a thread: one that is held up leaves its share to the others.
    pieces = min(count, 4 * (helpers + 1))
    todo = deque((count * piece // pieces, count * (piece + 1) // pieces) for piece in range(pieces))

    def drain() -> None:
        while True:
            try:
                first, last = todo.popleft()
            except IndexError:
                return
            task(first, last)

    futures = [_executor(os.getpid(), helpers).submit(drain) for _ in range(helpers)]
    try:
        drain()
    finally:  # also on KeyboardInterrupt: a helper must not outlive the tensors it works on
        todo.clear()
        for future in futures:
            if not future.cancel():
                future.result()


@functools.lru_cache(maxsize=1)
def _executor(pid: int, helpers: int) -> ThreadPoolExecutor:
    """The pid is a key because threads do not survive a fork: a child makes a pool of its own."""
    return ThreadPoolExecutor(helpers, thread_name_prefix="rmsnorm")
