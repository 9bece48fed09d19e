"""What a call costs besides the kernel: the host's time on a GPU, and the first call of a process."""

import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import rmsnorm
from rmsnorm.errors import one_line
from rmsnorm.tools.bench.cases import FORWARD, BenchCase
from rmsnorm.tools.bench.measure import runner
from rmsnorm.tools.bench.peers import Provider

# The kinds of calls whose host time is measured: keys of the JSON, and headers of the table.
_NO_GRAD, _FORWARD, _BACKWARD = "forward, no_grad", "forward", "backward"


_HOST_CALLS, _HOST_ROUNDS = 50, 21


def host_times(device: torch.device, measured: Sequence[Provider]) -> dict[str, dict[str, float]]:
    """Measure how long a call on 16 × 1280 bf16 numbers keeps the host busy, without waiting for the GPU.

    Args:
        device: The GPU.
        measured: The providers.

    Returns:
        Microseconds by provider and kind of call: the medians of many calls.
    """
    x, dy = (torch.randn(16, 1280, device=device).bfloat16() for _ in range(2))
    w = torch.randn(1280, device=device).bfloat16()
    xg, wg = x.clone().requires_grad_(), w.clone().requires_grad_()
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for provider in measured:
        if provider.norm is None:
            continue
        with contextlib.suppress(Exception):  # the tables of the cases say why a provider cannot run
            run = runner(provider, BenchCase(16, 1280, x.dtype, FORWARD))
            run(x, w)
            calls[provider.name, _NO_GRAD] = functools.partial(run, x, w)
            for _ in range(2):  # from the second call on, every call is alike
                y = run(xg, wg)
                torch.autograd.grad(y, (xg, wg), (dy,), retain_graph=True)
            calls[provider.name, _FORWARD] = functools.partial(run, xg, wg)
            calls[provider.name, _BACKWARD] = functools.partial(
                torch.autograd.grad, y, (xg, wg), (dy,), retain_graph=True
            )
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(_HOST_ROUNDS):
        for (name, kind), call in calls.items():
            with torch.set_grad_enabled(kind != _NO_GRAD):
                torch.cuda.synchronize(device)
                start = time.perf_counter()
                for _ in range(_HOST_CALLS):
                    call()
                taken[name, kind].append((time.perf_counter() - start) / _HOST_CALLS)
    torch.cuda.synchronize(device)
    found: dict[str, dict[str, float]] = {}
    for (name, kind), seconds in taken.items():
        found.setdefault(name, {})[kind] = statistics.median(seconds) * 1e6
    return found


_FIRST_CALL = """
import json, sys, time, torch, rmsnorm
device = sys.argv[1]
x = torch.ones(64, 1280, dtype=torch.bfloat16, device=device, requires_grad=True)
w = torch.ones(1280, dtype=torch.bfloat16, device=device, requires_grad=True)
wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
wait(); t0 = time.perf_counter()
y = rmsnorm.rms_norm(x, w)
wait(); t1 = time.perf_counter()
torch.autograd.grad(y, (x, w), torch.ones_like(y))
wait(); t2 = time.perf_counter()
print(json.dumps({"forward_s": round(t1 - t0, 3), "backward_s": round(t2 - t1, 3)}))
"""


def first_call(device: torch.device) -> dict[str, Any]:
    """Measure the first forward and backward pass in new processes, with an empty and with a filled kernel cache.

    Args:
        device: Where they run.

    Returns:
        Seconds by the state of the cache, "empty_cache" and "filled_cache", and the pass, "forward_s" and
        "backward_s"; or what went wrong, under "error".
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _first_calls(device, folder)
    except OSError as error:
        return {"error": f"no temporary folder can be made (TMPDIR): {one_line(error)}"}


def _first_calls(device: torch.device, folder: str) -> dict[str, Any]:
    """Do what `first_call` does, with this folder as the kernel cache."""
    found: dict[str, Any] = {}
    package = str(Path(rmsnorm.__file__).resolve().parent.parent)
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    caches = {"RMSNORM_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder, "PYTHONPATH": paths}
    for state in ("empty_cache", "filled_cache"):
        try:
            run = subprocess.run(
                [sys.executable, "-c", _FIRST_CALL, str(device)],
                env=os.environ | caches, capture_output=True, text=True, timeout=300, check=True,
            )  # fmt: skip
            found[state] = json.loads(run.stdout.splitlines()[-1])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]}
    return found
