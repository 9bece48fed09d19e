"""Launching what Triton has compiled by the CUDA driver itself.

    ready(compiled, grid, arguments, early)  ->  Ready(stream, addresses)  ->  cuLaunchKernelEx
                                                 Ready.launch(tensors)     ->  the same, for host.cpp

Triton's own launcher takes a list of all arguments apart at every call, which takes longer than a small norm. Here
all but the addresses of tensors lies ready in memory, and is held to what the kernel's PTX says that it takes.
"""

import ctypes
import functools
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from rmsnorm.kernels.host import Argument, Launch

_NUMBERS: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, with a value that is an int."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Configuration(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_memory", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


class Ready:
    """A kernel that waits for a stream and the addresses of its tensors, those that are there, in their order."""

    def __init__(
        self, library: Any, compiled: Any, tensors: int, numbers: list[Any], configuration: _Configuration
    ) -> None:
        self._compiled = compiled  # Triton takes a kernel off the GPU when nobody holds it
        self._launch, self._configuration, self._numbers = library.cuLaunchKernelEx, configuration, numbers
        self._addresses = (ctypes.c_void_p * tensors)()
        start = ctypes.addressof(self._addresses)
        where = [start + i * ctypes.sizeof(ctypes.c_void_p) for i in range(tensors)]
        where += [ctypes.addressof(number) for number in numbers]
        # In the form in which ctypes hands them on: to look at what they are takes a microsecond.
        function, parameters = ctypes.c_void_p(compiled.function), (ctypes.c_void_p * len(where))(*where)
        self._arguments = (ctypes.byref(configuration), function, parameters, None)
        self._lock = threading.Lock()

    def launch(self, tensors: Sequence[Argument]) -> Launch:
        """The same for the host, with these tensors, those that are there. It holds as long as this does."""
        _, function, _, _ = self._arguments
        words = [int.from_bytes(bytes(number).ljust(8, b"\0"), "little") for number in self._numbers]
        return Launch(
            function.value or 0, (*tensors, *words), ctypes.cast(self._launch, ctypes.c_void_p).value or 0,
            bytes(self._configuration), _Configuration.stream.offset,
        )  # fmt: skip

    def __call__(self, stream: int, addresses: list[Any]) -> bool:
        """Launch. False if nothing was: the driver refuses, for want of a context for example, or another launch has
        the memory at this moment, of another thread or, in a signal's handler, of this one."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self._configuration.stream = stream
            self._addresses[:] = addresses
            return not self._launch(*self._arguments)
        finally:
            self._lock.release()


def ready(compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any], early: bool) -> Ready | None:
    """compiled: Triton's kernel. arguments: as its source has them, tensors first and constants too, None for a tensor
    that is absent. early: it may start before the kernel before has ended.

    None where there is no driver, or the kernel is not of the form that Triton's kernels are known to have.
    """
    library = _library()
    try:
        metadata = compiled.metadata
        known = metadata.num_ctas == 1 and metadata.global_scratch_size == 0 and metadata.profile_scratch_size == 0
        parameters = list(_flat(tuple(compiled.src.signature.values()), tuple(arguments)))
        tensors = sum(kind.startswith("*") for kind, _ in parameters)
        numbers = [_NUMBERS[kind](value) for kind, value in parameters[tensors:]]
        numbers += [ctypes.c_void_p(), ctypes.c_void_p()]  # Triton's scratch memory, global and of its profiler: none
        sizes = [ctypes.sizeof(ctypes.c_void_p)] * tensors + [ctypes.sizeof(number) for number in numbers]
        if library is None or not known or _taken(compiled.asm["ptx"]) != sizes:
            return None
        attribute = _Attribute(id=_STREAM_SERIALIZATION, value=1)
        configuration = _Configuration(
            grid=(*grid, 1, 1)[:3], block=(32 * metadata.num_warps, 1, 1), shared_memory=metadata.shared,
            attributes=ctypes.pointer(attribute), attribute_count=int(early),
        )  # fmt: skip
        return Ready(library, compiled, tensors, numbers, configuration)
    except (AttributeError, KeyError, ValueError):  # another Triton's
        return None


def _flat(kinds: tuple[Any, ...], values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The types and values that reach the GPU: tuples taken apart, constants left out."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


@functools.cache
def _library() -> Any:
    """The CUDA driver; None where there is none, or an old one."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        return library if library.cuLaunchKernelEx else None
    except (OSError, AttributeError):
        return None


@functools.lru_cache(1024)
def _taken(ptx: str) -> list[int]:
    """The bytes of each parameter of the kernel: `.param .u64 .ptr …`, `.param .f32 …`."""
    declared = re.search(r"\.entry[^(]*\(([^)]*)\)", ptx)
    return [int(bits) // 8 for bits in re.findall(r"\.param\s+\.[a-z]+(\d+)", declared[1])] if declared else []
