"""The largest batch whose training step fits into a limited memory, in eager mode.

A compiled model is not tried: each size of the batch would be compiled, or a graph for all sizes measured instead.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from rmsnorm.tools.models.steps import Steps
from whole_models.definitions import AS_IS, PATCHED, RECOMPUTED, Model, Options, variant_named

TOKENS = 1024  # of each sequence
_MOST = 1 << 16


def measure(model: Model, built: Any, options: Options) -> dict[str, Any]:
    """Find the largest batch of the model as it is, patched and recomputed.

    Args:
        model: The model.
        built: The model as it is.
        options: The options, with the GPU and its limit.

    Returns:
        What was found, in types that `json.dumps` takes.
    """
    found, start = [], 1
    with _limited(options.device, options.limit):
        for name in (AS_IS, PATCHED, RECOMPUTED):
            variant = variant_named(name, options.variants)
            if variant is None:
                continue
            options.say(f"{model.name}, largest batch: {name}")
            copied = variant.applied(built)
            batch = largest(lambda n, copied=copied: _fits(copied, options.device, n), max(start, 1), _MOST)
            found.append({"variant": name, "compiled": False, "batch": batch})
            start = batch
    layers = built.config.num_hidden_layers
    return {"model": model.name, "layers": layers, "tokens": TOKENS, "limit_bytes": options.limit, "variants": found}


def largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """Return the largest number up to `most` that fits, if every smaller one fits, too; 0 if none fits.

    Args:
        fits: Whether a number fits.
        start: The first number that is tried. What is added to it doubles until a number does not fit.
        most: The largest number that is tried.
    """
    low, high, n, step = 0, most + 1, start, 1
    while high - low > 1:
        if fits(n):
            low = n
        else:
            high = n
        n = min(low + step, most) if high > most else (low + high) // 2
        step *= 2
    return low


def _fits(model: nn.Module, device: torch.device, batch: int) -> bool:
    """Run a training step. Returns whether the memory suffices, and frees everything."""
    fits = _runs(lambda: Steps(model, device).train(TOKENS, batch))
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    return fits


def _runs(step: Callable[[], None]) -> bool:
    try:
        step()
        torch.cuda.synchronize()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, torch.OutOfMemoryError):
                return False  # and the exception with the tensors of its frames is freed
            cause = cause.__cause__
        raise
    return True


@contextlib.contextmanager
def _limited(device: torch.device, limit: int) -> Iterator[None]:
    """Let torch reserve at most `limit` bytes of the GPU inside the context."""
    gc.collect()
    torch.cuda.empty_cache()
    index = torch.cuda.current_device() if device.index is None else device.index
    before = torch.cuda.get_per_process_memory_fraction(index)
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, index)
