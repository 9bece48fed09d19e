"""Kernels, in a folder a device: only cpu/ imports Numba and only gpu/ Triton, when a first tensor needs them."""

import functools
import os
import signal
from typing import Any

PROCESS = os.getpid()  # a child that is forked from it has none of the threads that torch started in it


def is_of_a_signal(error: BaseException) -> bool:
    """Whether a signal handler raised it, a timeout for example: it is the caller's, whatever it interrupted."""
    handlers = [handler for number in signal.valid_signals() if callable(handler := signal.getsignal(number))]
    codes = {_code(handler) for handler in handlers}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in codes:
            return True
        trace = trace.tb_next
    return False


def _code(handler: Any) -> Any:
    """The Python code that a handler runs. functools.partial and functools.lru_cache have no frame of their own."""
    while True:
        if isinstance(handler, functools.partial):
            handler = handler.func
            continue
        code = getattr(handler, "__code__", None) or getattr(type(handler).__call__, "__code__", None)
        if code is not None or not isinstance(handler, functools._lru_cache_wrapper):
            return code
        handler = handler.__wrapped__
