"""Worker processes."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from rmsnorm.tools import machine


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
