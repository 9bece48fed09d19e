"""The kernels, one package per device.

Only kernels.cpu and kernels.gpu import Numba or Triton; each is imported when the first tensor of its device arrives.
"""

import functools
import os
import signal
from typing import Any

PROCESS = os.getpid()  # a forked child has another pid, and none of the threads that torch started in this process


def raised_by_signal_handler(error: BaseException) -> bool:
    """Whether a Python signal handler raised the error, as a timeout does: such errors must reach the caller."""
    handlers = [handler for number in signal.valid_signals() if callable(handler := signal.getsignal(number))]
    codes = {_code(handler) for handler in handlers}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in codes:
            return True
        trace = trace.tb_next
    return False


def _code(handler: Any) -> Any:
    """The code object that a handler runs, looking through functools.partial and lru_cache, which have no frame."""
    while True:
        if isinstance(handler, functools.partial):
            handler = handler.func
            continue
        code = getattr(handler, "__code__", None) or getattr(type(handler).__call__, "__code__", None)
        if code is not None or not isinstance(handler, functools._lru_cache_wrapper):
            return code
        handler = handler.__wrapped__
