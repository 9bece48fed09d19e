"""Compiles the CPU kernels."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from numba import types

from rmsnorm import compat, kernels
from rmsnorm.kernels.cpu.cache import KernelCache
from rmsnorm.kernels.cpu.kernels import drain, wait

ELEMENT = {torch.float32: types.float32, torch.bfloat16: types.uint16, torch.float16: types.int16}
PAIR = types.uint32
_WORD, _POINTER = ctypes.c_int64, ctypes.c_void_p


@functools.cache
def compiled(kernel: Callable[..., None], *pointees: Any) -> Any:
    """The kernel as machine code that takes pointers to these types and two integers; if it cannot be compiled, why."""
    return _code(kernel, [types.CPointer(pointee) for pointee in pointees], 2)


@functools.cache
def compiled_drain(pointers: int) -> Any:
    return _code(drain(pointers), [types.CPointer(types.int64)], 0)


@functools.cache
def compiled_wait() -> Any:
    return _code(wait, [types.CPointer(types.int64)], 0)


def _code(function: Callable[..., None], pointers: Sequence[Any], integers: int) -> Any:
    """A ctypes function, which releases the GIL and takes addresses as integers; if it cannot be compiled, why.

    It has the attributes address and not_kept: why the machine code is not kept on disk; None if it is.
    """
    cache = KernelCache(function)
    try:
        signature = types.void(*pointers, *[types.int64] * integers)
        code = compat.numba_cfunc(function, signature, {"error_model": "numpy"}, cache.result)
    except Exception as error:  # the reference can compute whatever the error is
        if kernels.raised_by_signal_handler(error):
            raise
        said = str(error).strip().partition("\n")[0]
        return f"Numba cannot compile the kernel: {type(error).__name__}: {said}"
    callable_: Any = ctypes.CFUNCTYPE(None, *[_POINTER] * len(pointers), *[_WORD] * integers)(code.address)
    callable_.keeps, callable_.address, callable_.not_kept = code, code.address, cache.fault  # keeps the code alive
    return callable_
