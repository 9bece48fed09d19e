"""Runs the library for minutes, and judges whether its bits stay right and the resources of the process constant.

    python benchmarks/load.py [--device cuda] [--seconds 600] [--out DIR]

A round runs every workload once, in random order, on calls of a fixed list of kinds. Every output is compared bit by
bit with that of the reference, computed before the first round; dw is compared with that of the first call. After each
round the script measures the resources: memory, threads, open files, cached plans. It exits with 1 if a bit is wrong,
if a workload fails, if something that MUST_HAPPEN never happened, or if a resource grows. With --out, it writes
load-cpu.json or load-cuda.json, and rewrites it every SAY_EVERY rounds, so that little is lost if the run is stopped.
--seconds counts from the first round, which on a GPU starts minutes later if its kernels are not compiled yet.
"""

import argparse
import contextlib
import copy
import ctypes
import faulthandler
import functools
import gc
import hashlib
import os
import pickle
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rmsnorm
from rmsnorm import gated_reference, reference
from rmsnorm.errors import CommandError, one_line
from rmsnorm.functional import wait_for_host
from rmsnorm.kernels.host import loader
from rmsnorm.spec import GATED, gated_spec
from rmsnorm.tools import machine, results

EPS = 1e-6
SHAPES = ((1, 64), (3, 5, 33), (70, 1280), (7, 4096), (64, 8, 128), (500, 48), (33, 2560), (257, 512))
DTYPES = ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16),
          (torch.float32, torch.float32))  # fmt: skip
SPECS = (("early", 0.0), ("late", 0.0), ("late", 1.0))
FUNCTIONS = ("rms_norm", "add_rms_norm", "gated_rms_norm")
THREADS, CALLS_OF_A_THREAD = 4, 6
SPAWN_SECONDS, CHILD_SECONDS = 30.0, 120.0
# The shape of x in calls whose allocations fail. It has more than 32 MB, so malloc always asks the system for it.
LARGE = {"cpu": (4352, 4096), "cuda": (8192, 4096)}
FEWEST_TO_JUDGE, MOST_STORED, MOST_FAULTS, SAY_EVERY = 30, 120, 20, 20
MB = 1e6


class WrongBits(Exception):
    """An output is not what it must be."""


# --- calls ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Case:
    """A call of one kind: its inputs, the gradients of its outputs, and the outputs and gradients that it must give.

    expected: y, and s of add_rms_norm, then the gradients of `inputs` in their order.
    """

    function: str
    inputs: list[Tensor]
    arguments: dict[str, Any]
    cotangents: list[Tensor]
    expected: list[Tensor] = field(default_factory=list)

    def call(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = getattr(rmsnorm, self.function)(*inputs, EPS, **self.arguments)
        return found if isinstance(found, tuple) else (found,)

    def outputs_and_gradients(
        self, call: Callable[..., Any] | None = None, *, create_graph: bool = False, accumulate: bool = False
    ) -> list[Tensor]:
        """What the call gives in place of `expected`.

        accumulate: whether to call `backward`, which reentrant checkpointing needs, and not `grad`. `backward` copies a
        gradient that belongs to two inputs, on several threads of torch, and a forked child hangs there.
        """
        leaves = [t.detach().requires_grad_() for t in self.inputs]
        outputs = (call or self.call)(*leaves)
        if accumulate:
            torch.autograd.backward(outputs, self.cotangents)
            gradients = tuple(t.grad for t in leaves if t.grad is not None)
        else:
            gradients = torch.autograd.grad(outputs, leaves, self.cotangents, create_graph=create_graph)
        return [t.detach() for t in (*outputs, *gradients)]

    def outputs(self) -> list[Tensor]:
        with torch.no_grad():
            return list(self.call(*self.inputs))

    def check(self, found: Sequence[Tensor], what: str, expected: Sequence[Tensor] | None = None) -> None:
        for k, (one, right) in enumerate(zip(found, expected or self.expected, strict=True)):
            if not same_bits(one, right):
                shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in self.inputs)
                raise WrongBits(f"{what}: {self.function} of {shapes}, {self.arguments}: result {k} is wrong")


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def digest(tensors: Sequence[Tensor]) -> str:
    """The SHA-256 of the bytes. A forked child calls it, so it uses no operator that torch runs on several threads."""
    return hashlib.sha256(b"".join(t.cpu().view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()


def made_case(function: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], spec: tuple[str, float],
              device: torch.device, generator: torch.Generator) -> Case:  # fmt: skip
    def draw(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    (cast, offset), (of_x, of_w) = spec, dtypes
    rows = [draw(*shape, dtype=of_x) for _ in range(1 if function == "rms_norm" else 2)]
    w = draw(shape[-1], dtype=of_w)
    gated = function == "gated_rms_norm"
    arguments: dict[str, Any] = {"cast": cast} if gated else {"cast": cast, "offset": offset}
    case = Case(function, [*rows, w], arguments, [])
    with torch.no_grad():
        outputs = case.call(*case.inputs)
    case.cotangents = [draw(*y.shape, dtype=y.dtype) for y in outputs]
    case.expected = expected(case)
    return case


def expected(case: Case) -> list[Tensor]:
    """The outputs and gradients of the reference. dw is that of a first call: its sums only have to stay the same."""
    x, w, cast = case.inputs[0], case.inputs[-1], case.arguments["cast"]
    *_, dw = case.outputs_and_gradients()
    if case.function == "gated_rms_norm":
        spec = gated_spec(GATED, EPS, cast, "silu", False, 1)
        gate = case.inputs[1]
        y, rstd = gated_reference.forward(x, gate, w, spec, with_rstd=True)
        assert rstd is not None
        dx, dgate, _ = gated_reference.backward(case.cotangents[0], x, gate, w, rstd, spec, True, True, False)
        made = [y, dx, dgate]
    else:
        offset, adds = case.arguments["offset"], case.function == "add_rms_norm"
        y, s, rstd = reference.forward(x, case.inputs[1] if adds else None, w, EPS, cast, offset, with_rstd=True)
        assert rstd is not None
        rows, ds = (x, None) if s is None else (s, case.cotangents[1])
        dx, _ = reference.backward(case.cotangents[0], ds, rows, w, rstd, cast, offset, True, False)
        made = [y, dx] if s is None else [y, s, dx, dx]
    assert all(t is not None for t in made)
    return [*(t for t in made if t is not None), dw]


def all_cases(device: torch.device, most: int | None = None) -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    kinds = [
        (function, shape, dtypes, SPECS[k % (2 if function == "gated_rms_norm" else 3)])
        for function in FUNCTIONS
        for k, shape in enumerate(SHAPES)
        for dtypes in DTYPES
    ]
    random.Random(0).shuffle(kinds)
    return [made_case(*kind, device, generator) for kind in kinds[:most]]


# --- workloads -----------------------------------------------------------------------------------------------


@dataclass
class Load:
    """What the workloads share. counts: how often each thing of MUST_HAPPEN has happened."""

    device: torch.device
    cases: list[Case]
    cpu_cases: list[Case]
    large: Case
    random: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    streams: list[Any] = field(default_factory=list)
    spawned_at: float = -SPAWN_SECONDS

    def some(self, count: int) -> list[Case]:
        return self.random.sample(self.cases, count)


def plain(load: Load) -> None:
    """Every kind of call, whole and with fewer rows."""
    for case in load.random.sample(load.cases, len(load.cases)):
        case.check(case.outputs_and_gradients(), "plain")
        rows = load.random.choice((1, max(1, len(case.inputs[0]) // 2)))
        with torch.no_grad():
            found = case.call(*(t[:rows] for t in case.inputs[:-1]), case.inputs[-1])
        case.check(found, "fewer rows", [t[:rows] for t in case.expected[: len(found)]])


def checkpointed(load: Load) -> None:
    for case in load.some(8):
        for reentrant in (True, False):  # non-reentrant recomputation ends early, when a saved-tensor hook raises
            again = functools.partial(checkpoint, case.call, use_reentrant=reentrant)
            case.check(case.outputs_and_gradients(again, accumulate=reentrant), f"checkpointing, {reentrant=}")


def offloaded(load: Load) -> None:
    for case in load.some(8):
        with torch.autograd.graph.save_on_cpu():
            case.check(case.outputs_and_gradients(), "save_on_cpu")


def with_graph(load: Load) -> None:
    """Gradients with create_graph. Not by `backward`, which would leak: torch makes a cycle of leaf and gradient."""
    for case in load.some(8):
        case.check(case.outputs_and_gradients(create_graph=True), "create_graph")


class Block(nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 128, device=device)
        self.norm = nn.RMSNorm(128, EPS, device=device)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.linear(x))
        return out


def copied(load: Load) -> None:
    """A model is copied, patched, trained for a step, pickled, and unpatched."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(load.device) for _ in range(3)))
    rmsnorm.patch(model)
    x = torch.randn(16, 128, device=load.device)
    found = []
    again = copy.deepcopy(model)
    rmsnorm.unpatch(again)
    rmsnorm.patch(again)
    for one in (model, copy.deepcopy(model), again, pickle.loads(pickle.dumps(model))):
        one(x).square().mean().backward()
        found.append([p.grad for p in one.parameters()])
    for other in found[1:]:
        if not all(same_bits(a, b) for a, b in zip(found[0], other, strict=True)):
            raise WrongBits("a copy of a patched model has other gradients")


def in_threads(load: Load) -> None:
    """Threads that call at the same time; on a GPU each has its own stream."""
    faults: list[BaseException] = []
    if load.device.type == "cuda" and not load.streams:
        load.streams = [torch.cuda.Stream(load.device) for _ in range(THREADS)]

    def work(k: int, cases: list[Case]) -> None:
        try:
            with torch.cuda.stream(load.streams[k]) if load.streams else contextlib.nullcontext():
                for case in cases:
                    case.check(case.outputs_and_gradients(), "threads")
        except BaseException as error:  # noqa: BLE001  # the main thread raises it
            faults.append(error)

    given = [load.some(CALLS_OF_A_THREAD) for _ in range(THREADS)]
    if load.streams:
        torch.cuda.synchronize(load.device)
    threads = [threading.Thread(target=work, args=(k, cases)) for k, cases in enumerate(given)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


def forward_and_backward(case: Case, leaves: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    outputs = case.call(*leaves)
    return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def captured(load: Load) -> None:
    """A CUDA graph of forward and backward, replayed on the rows in another order."""
    for case in load.some(2):
        leaves = [t.clone().requires_grad_() for t in case.inputs]
        cotangents = [t.clone() for t in case.cotangents]
        step = functools.partial(forward_and_backward, case, leaves, cotangents)
        side = torch.cuda.Stream(load.device)
        side.wait_stream(torch.cuda.current_stream(load.device))
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream(load.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        for flipped in (False, True, False):
            flip = (lambda t: t.flip(0)) if flipped else (lambda t: t)
            with torch.no_grad():
                for mine, given in zip((*leaves[:-1], *cotangents), (*case.inputs[:-1], *case.cotangents), strict=True):
                    mine.copy_(flip(given))
            graph.replay()
            # dw is a sum over rows, so its bits may depend on their order
            count = len(case.expected) - 1 if flipped else len(case.expected)
            case.check(found[:count], "a captured graph", [flip(t) for t in case.expected[:count]] if flipped else None)
        load.counts["replays of captured graphs"] += 3


def with_failures(load: Load) -> None:
    """Allocations that fail in the middle of a call, which needs more memory than two tensors of the size of x."""
    case = load.large
    limit = limited_gpu_memory if load.device.type == "cuda" else limited_address_space
    for _ in range(3):
        slack = int(load.random.uniform(0, 3) * case.inputs[0].nbytes)
        try:
            with limit(slack, load.device):
                found = case.outputs_and_gradients()
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "alloc" not in str(error):
                raise
            load.counts["allocations that failed"] += 1
        else:
            case.check(found, "under a memory limit")
        found = []
        case.check(case.outputs_and_gradients(), "after an allocation failed")


@contextlib.contextmanager
def limited_gpu_memory(slack: int, device: torch.device) -> Iterator[None]:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved(device) + slack) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextlib.contextmanager
def limited_address_space(slack: int, device: torch.device) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + slack, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def forked(load: Load) -> None:
    """A forked child makes calls on the CPU."""
    cases = load.random.sample(load.cpu_cases, 4)
    forward_only = load.device.type == "cuda"  # torch refuses a backward pass in a child of a process that uses CUDA
    right = [digest(case.outputs() if forward_only else case.expected) for case in cases]
    with tempfile.TemporaryFile("w+") as trace:
        child = os.fork()
        if child == 0:
            code = 3
            with contextlib.suppress(BaseException):
                faulthandler.dump_traceback_later(CHILD_SECONDS, exit=True, file=trace)
                made = [case.outputs() if forward_only else case.outputs_and_gradients() for case in cases]
                code = 0 if [digest(one) for one in made] == right else 4
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != 0:
            trace.seek(0)
            what = (
                f"(3: it raised; 4: wrong bits; 1: after {CHILD_SECONDS:.0f} s it was here: {one_line(trace.read())})"
            )
            raise WrongBits(f"a forked child ended with {code} {what}")
    load.counts["forked children"] += 1


def spawned(load: Load) -> None:
    """A new process makes calls on the device. Only every SPAWN_SECONDS, because it has to import torch."""
    if time.monotonic() - load.spawned_at < SPAWN_SECONDS:
        return
    command = [sys.executable, __file__, "--worker", "--device", str(load.device)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5 * CHILD_SECONDS, check=False)
    load.spawned_at = time.monotonic()
    if done.returncode != 0:
        raise WrongBits(f"a new process ended with {done.returncode}: {one_line(done.stderr[-500:])}")
    if (there := done.stdout.split()) != (here := worker(load.device)):
        raise WrongBits(f"a new process gave other bits: {there}, here {here}")
    load.counts["spawned processes"] += 1


def worker(device: torch.device) -> list[str]:
    """Digests of a few kinds of calls, as the library computes them."""
    return [digest([t]) for case in all_cases(device, 4) for t in case.outputs_and_gradients()]


WORKLOADS: dict[str, Callable[[Load], None]] = {
    "plain": plain, "checkpointed": checkpointed, "offloaded": offloaded, "create_graph": with_graph,
    "copied models": copied, "threads": in_threads, "captured graphs": captured, "failing allocations": with_failures,
    "forks": forked, "spawned processes": spawned,
}  # fmt: skip
# What must happen at least once in a run; otherwise the run fails.
MUST_HAPPEN = {
    "cpu": ("allocations that failed", "forked children", "spawned processes"),
    "cuda": ("allocations that failed", "forked children", "spawned processes", "replays of captured graphs"),
}


# --- resources -----------------------------------------------------------------------------------------------


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "top",
        )
    ]


@dataclass(frozen=True)
class Resource:
    """Something that must not grow. allowed: by how much its median may rise between two thirds of a run, in `unit`."""

    name: str
    unit: str
    allowed: float
    measure: Callable[[torch.device], float | None]


def rss(_: torch.device) -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MB


def malloc_in_use(_: torch.device) -> float | None:
    """MB that malloc has handed out and not got back: unlike RSS, without fragmentation. None without glibc."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo
    found = mallinfo2()
    return float(found.uordblks + found.hblkhd) / MB


def open_files(_: torch.device) -> float:
    return len(os.listdir("/proc/self/fd"))


def threads_of_process(_: torch.device) -> float:
    return len(os.listdir("/proc/self/task"))


def gpu_allocated(device: torch.device) -> float | None:
    return torch.cuda.memory_allocated(device) / MB if device.type == "cuda" else None


def gpu_reserved(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) / MB


def plans_of_cpp(_: torch.device) -> float:
    return loader.cached_plans()


def cached_entries(_: torch.device) -> float:
    """The entries of all functools caches of the package."""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "rmsnorm"]
    caches = {id(c): c for module in modules for c in vars(module).values() if callable(getattr(c, "cache_info", None))}
    return sum(c.cache_info().currsize for c in caches.values())


RESOURCES = (
    # An allocator keeps some of the memory that it got, so the limit for the memory in use is lower.
    Resource("resident memory", "MB", 30.0, rss),
    Resource("memory in use (malloc)", "MB", 4.0, malloc_in_use),
    Resource("GPU memory in use", "MB", 0.0, gpu_allocated),
    Resource("GPU memory reserved", "MB", 2.0, gpu_reserved),
    Resource("threads", "", 0.0, threads_of_process),
    Resource("open files", "", 0.0, open_files),
    Resource("cached plans of the C++", "", 0.0, plans_of_cpp),
    Resource("entries of Python caches", "", 0.0, cached_entries),
)


def sampled(device: torch.device) -> dict[str, float]:
    gc.collect()
    measured = ((r.name, r.measure(device)) for r in RESOURCES)
    return {name: value for name, value in measured if value is not None}


@dataclass(frozen=True)
class Verdict:
    """Whether a resource stayed constant. middle, last: its median in the second and the last third of the samples."""

    resource: str
    unit: str
    first: float
    middle: float
    last: float
    allowed: float
    flat: bool


def judged(samples: Sequence[dict[str, float]]) -> list[Verdict]:
    """Compare the last third of the samples with the third before; the first third fills caches. Empty if too few."""
    if len(samples) < FEWEST_TO_JUDGE:
        return []
    third = len(samples) // 3
    verdicts = []
    for r in RESOURCES:
        series = [sample[r.name] for sample in samples if r.name in sample]
        if series:
            middle, last = statistics.median(series[third:-third]), statistics.median(series[-third:])
            verdicts.append(Verdict(r.name, r.unit, series[0], middle, last, r.allowed, last - middle <= r.allowed))
    return verdicts


# --- the run -------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    rounds: int
    seconds: float
    runs: dict[str, int]
    counts: dict[str, int]
    faults: list[str]
    samples: list[dict[str, float]]
    verdicts: list[Verdict]

    @property
    def passed(self) -> bool:
        return not self.faults and all(v.flat for v in self.verdicts)


def loaded(
    device: torch.device, seconds: float, say: Callable[[str], None], kinds: int | None = None, seed: int = 0,
    store: Callable[[Outcome], None] = lambda so_far: None,
) -> Outcome:  # fmt: skip
    """Run rounds until the time is over, at least one.

    kinds: how many kinds of calls; None for all. store: called with the outcome so far, every SAY_EVERY rounds.
    """
    rng = random.Random(seed)
    cases = all_cases(device, kinds)
    wait_for_host()
    cpu_cases = cases if device.type == "cpu" else all_cases(torch.device("cpu"), 8)
    dtype = (torch.bfloat16, torch.bfloat16)
    large = made_case("rms_norm", LARGE[device.type], dtype, ("early", 0.0), device, torch.Generator().manual_seed(1))
    load = Load(device, cases, cpu_cases, large, rng)
    workloads = {name: w for name, w in WORKLOADS.items() if device.type == "cuda" or w is not captured}
    runs: Counter[str] = Counter()
    faults: list[str] = []
    samples: list[dict[str, float]] = []
    start = time.monotonic()

    def outcome() -> Outcome:
        taken = time.monotonic() - start
        return Outcome(len(samples), taken, dict(runs), dict(load.counts), list(faults), samples, judged(samples))

    while not samples or time.monotonic() - start < seconds:
        for name in rng.sample(list(workloads), len(workloads)):
            try:
                workloads[name](load)
            except Exception as error:  # noqa: BLE001  # whatever fails is a finding, and the run goes on
                faults.append(f"{name}: {one_line(error)}")
                say(faults[-1])
            runs[name] += 1
        samples.append({"second": round(time.monotonic() - start, 1), **sampled(device)})
        if len(samples) % SAY_EVERY == 1:
            say(", ".join(f"{name} {value:g}" for name, value in samples[-1].items()))
            store(outcome())
    missing = [what for what in MUST_HAPPEN[device.type] if not load.counts[what]]
    faults += [f"{what}: none in this run" for what in missing]
    return outcome()


def result(outcome: Outcome, facts: dict[str, Any]) -> dict[str, Any]:
    every = -(-len(outcome.samples) // MOST_STORED)
    found = asdict(outcome) | {
        "passed": outcome.passed,
        "faults": outcome.faults[:20],
        "fault_count": len(outcome.faults),
    }
    return {"machine": facts, **found, "samples": outcome.samples[::every]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (default: 600)")
    parser.add_argument("--kinds", type=int, help="how many kinds of calls, at least 8 (default: all 96)")
    parser.add_argument("--out", type=Path, help="a folder for the result")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = machine.find_device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if options.worker:
        print("\n".join(worker(device)))
        return 0
    if options.out is not None:
        results.check_folder(options.out)
    facts = machine.describe(device)

    def store(found: Outcome) -> None:
        if options.out is not None:
            results.write_json(options.out / f"load-{device.type}.json", result(found, facts))

    outcome = loaded(device, options.seconds, lambda text: print(text, flush=True), options.kinds, store=store)
    store(outcome)
    print(
        f"{outcome.rounds} rounds in {outcome.seconds:.0f} s; "
        + ", ".join(f"{n} {w}" for w, n in outcome.counts.items())
    )
    for v in outcome.verdicts:
        said = "constant" if v.flat else f"GROWS by more than {v.allowed:g}"
        print(f"  {v.resource:26} {v.middle:10.1f} -> {v.last:10.1f} {v.unit:2} {said}")
    if not outcome.verdicts:
        print(f"  {outcome.rounds} samples are too few to judge growth, which takes {FEWEST_TO_JUDGE}")
    print(f"{len(outcome.faults)} faults" + "".join(f"\n  {fault}" for fault in outcome.faults[:MOST_FAULTS]))
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CommandError as error:
        sys.exit(f"load.py: {error}")
