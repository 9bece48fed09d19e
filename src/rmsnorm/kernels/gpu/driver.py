"""Launches compiled Triton kernels directly through the CUDA driver.

    TritonLaunch  ->  Triton compiles  ->  ready(compiled, grid, arguments, early)  ->  Ready  ->  cuLaunchKernelEx

Triton's own launcher processes all arguments at every call, which takes longer than a small norm. Here all arguments
but the addresses of tensors are prepared once, and their sizes checked against the parameters in the kernel's PTX.
"""

import contextlib
import ctypes
import functools
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmsnorm import compat
from rmsnorm.kernels.plan import NativeLaunch

_NUMBERS: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_ALIGNED = 15  # the address bits that must be 0 for loads of 16 bytes


class Slot(NamedTuple):
    """An argument of a kernel that is a tensor: its name and dtype."""

    tensor: str
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class TritonLaunch:
    """A Triton kernel and everything that is needed to launch it.

    arguments: in the kernel's order, with a `Slot` for each tensor and None for an absent one. early: whether it may
    start before the previous kernel has ended. aligned: whether the addresses of all input tensors are multiples of 16.
    device: the index of the GPU; -1 for Triton's interpreter, whose tensors are on the CPU.
    """

    kernel: Any
    grid: tuple[int, ...]
    warps: int
    arguments: tuple[Any, ...]
    early: bool
    aligned: bool
    device: int

    def run(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Launches on the current stream, with Triton's own launcher if the driver cannot be called directly."""
        ready = self.ready if self.aligned else None
        if ready is not None:
            addresses = []
            bits = 0
            for slot in self._slots:
                address = tensors[slot.tensor].data_ptr()  # type: ignore[union-attr]
                addresses.append(address)
                bits |= address
            if bits & _ALIGNED == 0 and ready(compat.raw_stream(self.device), addresses):
                return
        arguments = [tensors[a.tensor] if isinstance(a, Slot) else a for a in self.arguments]
        self.kernel[self.grid](*arguments, **self._options)

    def remark(self) -> str | None:
        return None

    def renamed(self, names: Mapping[str, str]) -> "TritonLaunch":
        arguments = (a._replace(tensor=names[a.tensor]) if isinstance(a, Slot) else a for a in self.arguments)
        return replace(self, arguments=tuple(arguments))

    def native(self) -> NativeLaunch | str:
        if not self.aligned:
            return "16 does not divide an address"
        ready = self.ready
        return "Triton launches it" if ready is None else ready.native([slot.tensor for slot in self._slots])

    @functools.cached_property
    def ready(self) -> "Ready | None":
        """The kernel, compiled for addresses that are multiples of 16; None if only Triton can launch it.

        Launches through the driver do not call Triton's launch hooks, which profilers use.
        """
        arguments = [a.dtype if isinstance(a, Slot) else a for a in self.arguments]
        with torch.cuda.device(self.device) if self.device >= 0 else contextlib.nullcontext():
            compiled = self.kernel.warmup(*arguments, grid=self.grid, **self._options)
            if compiled is None:  # in the interpreter
                return None
            if hasattr(compiled, "result"):  # Triton's asynchronous mode compiles in another thread
                compiled = compiled.result()
            compiled.run  # noqa: B018  # loads it onto the GPU
            return ready(compiled, self.grid, arguments, self.early)

    @functools.cached_property
    def _slots(self) -> tuple[Slot, ...]:
        return tuple(a for a in self.arguments if isinstance(a, Slot))

    @property
    def _options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "enable_fp_fusion": False, "launch_pdl": self.early}


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute with an int value."""

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
    """A kernel that can be launched with a stream and the addresses of its present tensors, in order."""

    def __init__(
        self, library: Any, compiled: Any, tensors: int, numbers: list[Any], configuration: _Configuration
    ) -> None:
        self._compiled = compiled  # Triton unloads a kernel that is no longer referenced
        self._launch, self._configuration, self._numbers = library.cuLaunchKernelEx, configuration, numbers
        self._addresses = (ctypes.c_void_p * tensors)()
        start = ctypes.addressof(self._addresses)
        where = [start + i * ctypes.sizeof(ctypes.c_void_p) for i in range(tensors)]
        where += [ctypes.addressof(number) for number in numbers]
        # Converted to ctypes objects once: converting them at each call takes a microsecond.
        function, parameters = ctypes.c_void_p(compiled.function), (ctypes.c_void_p * len(where))(*where)
        self._arguments = (ctypes.byref(configuration), function, parameters, None)
        self._lock = threading.Lock()

    def native(self, tensors: Sequence[str]) -> NativeLaunch:
        """The same launch for C++, with these names of tensors. It is valid as long as this object exists."""
        _, function, _, _ = self._arguments
        words = [int.from_bytes(bytes(number).ljust(8, b"\0"), "little") for number in self._numbers]
        return NativeLaunch(
            function.value or 0,
            (*tensors, *words),
            launcher=ctypes.cast(self._launch, ctypes.c_void_p).value or 0,
            configuration=bytes(self._configuration),
            stream_at=_Configuration.stream.offset,
        )

    def __call__(self, stream: int, addresses: list[Any]) -> bool:
        """Launches the kernel and returns whether it could.

        It cannot if the driver refuses (there is no context, for example), or if another launch is using the argument
        memory: from another thread, or from this one if it is in a signal handler.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self._configuration.stream = stream
            self._addresses[:] = addresses
            return not self._launch(*self._arguments)
        finally:
            self._lock.release()


def ready(compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any], early: bool) -> Ready | None:
    """Prepares a compiled kernel for launches through the driver.

    Args:
        compiled: the kernel as Triton compiled it.
        grid: the number of programs.
        arguments: the arguments in the order of the source, tensors first and constants included; None for an absent
            tensor.
        early: whether it may start before the previous kernel has ended.

    Returns:
        None if there is no driver, or the kernel's parameters are not laid out as expected.
    """
    library = _library()
    try:
        metadata = compiled.metadata
        known = metadata.num_ctas == 1 and metadata.global_scratch_size == 0 and metadata.profile_scratch_size == 0
        parameters = list(_flat(tuple(compiled.src.signature.values()), tuple(arguments)))
        tensors = sum(kind.startswith("*") for kind, _ in parameters)
        numbers = [_NUMBERS[kind](value) for kind, value in parameters[tensors:]]
        numbers += [ctypes.c_void_p(), ctypes.c_void_p()]  # Triton's scratch memory, global and of its profiler: unused
        sizes = [ctypes.sizeof(ctypes.c_void_p)] * tensors + [ctypes.sizeof(number) for number in numbers]
        if library is None or not known or _taken(compiled.asm["ptx"]) != sizes:
            return None
        attribute = _Attribute(id=_STREAM_SERIALIZATION, value=1)
        configuration = _Configuration(
            grid=(*grid, 1, 1)[:3], block=(32 * metadata.num_warps, 1, 1), shared_memory=metadata.shared,
            attributes=ctypes.pointer(attribute), attribute_count=int(early),
        )  # fmt: skip
        return Ready(library, compiled, tensors, numbers, configuration)
    except (AttributeError, KeyError, ValueError):  # an unknown version of Triton
        return None


def _flat(kinds: tuple[Any, ...], values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The types and values that are passed to the GPU: tuples flattened, constants left out."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


@functools.cache
def _library() -> Any:
    """The CUDA driver; None if it is missing or too old for cuLaunchKernelEx."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        return library if library.cuLaunchKernelEx else None
    except (OSError, AttributeError):
        return None


@functools.lru_cache(1024)
def _taken(ptx: str) -> list[int]:
    """The size in bytes of each parameter of the kernel, from lines such as `.param .u64 .ptr …`, `.param .f32 …`."""
    declared = re.search(r"\.entry[^(]*\(([^)]*)\)", ptx)
    return [int(bits) // 8 for bits in re.findall(r"\.param\s+\.[a-z]+(\d+)", declared[1])] if declared else []
