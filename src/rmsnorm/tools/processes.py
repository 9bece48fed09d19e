"""Work in processes of their own, and how they end."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from rmsnorm.tools import machine


def side_by_side(work: Callable[..., object], shares: Iterable[Any], *others: Any) -> None:
    """Have new processes call `work(share, *others)` for each share, for what they leave on disk: compiled kernels.

    There torch has one thread. What goes wrong there goes wrong again where it is seen, so here it is passed over.
    """
    workers = min(machine.cores(), 16)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_as_a_worker) as pool:
        try:
            for done in [pool.submit(work, share, *others) for share in shares]:
                with contextlib.suppress(Exception):
                    done.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _as_a_worker() -> None:
    torch.set_num_threads(1)
    end_silently_on_ctrl_c()


def end_silently_on_ctrl_c() -> None:
    """For a process that another one started: the terminal interrupts both, and only the first is to say so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
