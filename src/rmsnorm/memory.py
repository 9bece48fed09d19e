"""Measures memory: what autograd saves for the backward pass, and what a call allocates."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from rmsnorm import compat

T = TypeVar("T")


@contextlib.contextmanager
def saved_for_backward(besides: Iterable[Tensor] = ()) -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd saves within a `with` statement. Each storage counts once.

    Args:
        besides: Tensors whose storages do not count, such as the weights.

    Yields:
        A function without arguments that returns how many of the bytes that were saved so far are still kept. Call it
        while the outputs are alive: the graph is freed with them.

    Example:
        >>> from rmsnorm import memory
        >>> x, w = torch.randn(4, 8, requires_grad=True), torch.ones(8, requires_grad=True)
        >>> with memory.saved_for_backward(besides=[w]) as count:
        ...     y = rmsnorm.rms_norm(x, w)
        ...     print(count())  # x, and 4 bytes a row
        144
    """
    known = {compat.storage_id(t) for t in besides}
    # While a weak reference to a storage is alive, no other storage gets the same id.
    storages: dict[int, tuple[Any, int]] = {}

    def pack(t: Tensor) -> Tensor:
        storage, key = t.untyped_storage(), compat.storage_id(t)
        if key not in known:
            storages[key] = compat.StorageWeakRef(storage), storage.nbytes()
        return t.detach()  # an output that held itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield lambda: sum(nbytes for storage, nbytes in storages.values() if not storage.expired())


@dataclass
class ModuleOutput:
    """What a call of a module returned.

    Attributes:
        module: The module.
        nbytes: The bytes of the output.
        saved: Whether an operator that reads the output has saved it, or a view of it, for the backward pass.
    """

    module: nn.Module
    nbytes: int
    saved: bool = False


@contextlib.contextmanager
def saved_outputs(modules: Iterable[nn.Module]) -> Iterator[list[ModuleOutput]]:
    """Find out which outputs of modules are saved by the operators that read them, within a `with` statement.

    Saved tensors are not kept, so that no backward pass can run afterwards, and fake tensors can be used.

    Args:
        modules: Modules that return a tensor.

    Yields:
        The outputs in the order of the calls. The list grows as modules are called.

    Example:
        >>> from rmsnorm import memory
        >>> norm, linear = rmsnorm.RMSNorm(8), torch.nn.Linear(8, 8)
        >>> with memory.saved_outputs([norm]) as outputs:
        ...     y = linear(norm(torch.randn(4, 8)))  # the weight's gradient needs the norm's output
        ...     z = norm(torch.randn(4, 8)) + 1
        >>> [(output.nbytes, output.saved) for output in outputs]
        [(128, True), (128, False)]
    """
    outputs: list[ModuleOutput] = []
    by_storage: dict[int, tuple[Any, ModuleOutput]] = {}

    def watch(module: nn.Module, _: Any, y: Any) -> None:
        output = ModuleOutput(module, y.nbytes)
        outputs.append(output)
        # While a weak reference to a storage is alive, no other storage gets the same id.
        by_storage[compat.storage_id(y)] = compat.StorageWeakRef(y.untyped_storage()), output

    def pack(t: Tensor) -> None:
        with contextlib.suppress(NotImplementedError):  # sparse tensors have no storage
            reference, output = by_storage.get(compat.storage_id(t), (None, None))
            if reference is not None and output is not None and not reference.expired():
                output.saved = True

    def unpack(_: None) -> Tensor:
        raise RuntimeError("within memory.saved_outputs, no tensor is kept for the backward pass")

    hooks = [module.register_forward_hook(watch) for module in modules]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Allocated(Generic[T]):
    """What a call returned, and what it allocated.

    Attributes:
        result: What the call returned.
        kept: The bytes that it allocated and did not free, less those that it freed of what was allocated before, on a
            CPU only within another measured call. None if unknown.
        peak: The most bytes that were allocated during the call beyond those before it; None if unknown.
    """

    result: T
    kept: int | None
    peak: int | None


def allocated(call: Callable[[], T], device: torch.device) -> Allocated[T]:
    """Run a call, and measure what it allocates on a device: the bytes that it asks for, before they are rounded up.

    Args:
        call: What to run. What it returns is alive when the bytes are counted.
        device: A GPU, whose peak in torch's statistics is reset, or the CPU, where torch's profiler counts. On another
            device the bytes are not known.

    Returns:
        What the call returned, and the bytes.

    Example:
        >>> from rmsnorm import memory
        >>> found = memory.allocated(lambda: torch.ones(4, 8).exp(), torch.device("cpu"))
        >>> found.kept, found.peak
        (128, 256)
    """
    with _without_garbage_collection():
        return _allocated(call, device)


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Free nothing inside the context that earlier calls left in reference cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _allocated(call: Callable[[], T], device: torch.device) -> Allocated[T]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_stats(device).get("requested_bytes.all.current", 0)
        result = call()
        torch.cuda.synchronize(device)
        after = torch.cuda.memory_stats(device)
        current, peak = (after["requested_bytes.all." + what] - before for what in ("current", "peak"))
        return Allocated(result, current, peak)
    if device.type != "cpu":
        return Allocated(call(), None, None)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _quiet_profiler(), torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        result = call()
    steps = compat.cpu_allocations(profile)
    if steps is None:
        return Allocated(result, None, None)
    alive = [0, *accumulate(steps)]
    return Allocated(result, alive[-1], max(alive))


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Let a profiler that starts for the first time in this process write nothing to standard error."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
