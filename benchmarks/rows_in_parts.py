"""Measures norms of rows whose columns are sharded over ranks, and writes rows-in-parts-DEVICE.json.

    python benchmarks/rows_in_parts.py --out DIR           as many ranks as there are GPUs, over NCCL
    python benchmarks/rows_in_parts.py --tiny              tries the script with two ranks of gloo on the CPU

First, y, x + residual and dx of sharded norms are compared bit by bit with those of whole rows on one device: eager,
and for y and dx also compiled and in a CUDA graph. Then these calls are timed forward and backward, each once in every
round, in a shuffled order:

    begin, finish                  the kernel before the all-reduce, and the kernel after it
    all_reduce                     the all-reduce alone
    eager, compiled, cuda_graph    the sharded norm
    kernel_on_part                 the kernel for whole rows, run on one rank's part
    whole_rows                     whole rows on one device

A sharded norm is compared with the sum of kernel_on_part and all_reduce, because it needs at least these two.

Before each sample the L2 cache is overwritten and all ranks meet. The host queues the call while the GPU is busy, and
the sample is the time between two events around the call. The longest median of all ranks counts. `eager_in_a_row` is
the time of one of many eager calls in a row: that of the host or of the GPU, whichever is longer. The script exits with
1 if a bit differs.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import rmsnorm
from rmsnorm import compat
from rmsnorm.errors import CommandError
from rmsnorm.functional import wait_for_host
from rmsnorm.ops.sharding import as_whole
from rmsnorm.tools import machine, results
from rmsnorm.tools.timing import summarize

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES, TINY_SHAPES = ((8192, 16384), (16384, 7168)), ((64, 96),)
# Cases of which only the bits count, (M, N, dtype, spec, whether a residual is added): parts that are wide, of an odd
# width, and of which one is empty.
OTHERS: tuple[tuple[int, int, torch.dtype, dict[str, Any], bool], ...] = (
    (4096, 16384, BF16, {"cast": "late", "offset": 1.0}, True),
    (64, 131072, BF16, {"cast": "first"}, False),
    (512, 2562, FP32, {}, True),
    (3, 1, FP16, {}, False),
)
# Queries and keys whose heads are spread over the ranks, normalized over all heads: (M, N of q, N of k).
PAIR, TINY_PAIR = (4096, 8192, 1024), (8, 64, 32)
EPS, ROUNDS, IN_A_ROW = 1e-6, 60, 50
Call = Callable[[], Any]


class Norm:
    """The tensors of one norm: whole, this rank's parts, and both as DTensors."""

    def __init__(self, mesh: DeviceMesh, M: int, N: int, dtype: torch.dtype) -> None:
        self.mesh, self.shape = mesh, (M, N)
        device = torch.device(mesh.device_type, torch.cuda.current_device() if mesh.device_type == "cuda" else None)
        generator = torch.Generator(device).manual_seed(M + N)  # the same on every rank

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self.whole = {name: draw(M, N) for name in ("x", "residual", "dy", "ds")} | {"w": draw(N)}
        self.part = {name: self._part(t) for name, t in self.whole.items()}
        self.sharded = {
            name: as_whole(self.part[name], mesh, (Shard(t.dim() - 1),), t.shape) for name, t in self.whole.items()
        }

    def _part(self, t: Tensor) -> Tensor:
        n = t.shape[-1]
        size = -(-n // self.mesh.size())
        start = min(n, size * self.mesh.get_local_rank())
        return t.narrow(-1, start, min(size, n - start)).contiguous()


def forward(given: Mapping[str, Any], spec: Mapping[str, Any]) -> Any:
    return rmsnorm.rms_norm(given["x"], given["w"], EPS, **spec)


def gradients(given: Mapping[str, Any], spec: Mapping[str, Any], *, adds: bool) -> list[Tensor]:
    """y, s if `adds`, and dx."""
    x = given["x"].detach().requires_grad_()
    if adds:
        outputs = list(rmsnorm.add_rms_norm(x, given["residual"], given["w"], EPS, **spec))
    else:
        outputs = [forward({"x": x, "w": given["w"]}, spec)]
    dx = torch.autograd.grad(outputs, x, [given["dy"], given["ds"]][: len(outputs)])
    return [t.detach() for t in (*outputs, *dx)]


def captured(call: Call) -> Call:
    """The call in a CUDA graph, which returns the same tensors each time."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL queries events in another thread
        outputs = call()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def count_differing(found: list[Any], expected: list[Tensor], count: dict[str, int]) -> None:
    for got, right in zip(found, expected, strict=True):
        whole = got.full_tensor()
        count["compared"] += whole.numel()
        count["differ"] += int((whole != right).sum())


def compare_others(mesh: DeviceMesh, tiny: bool, count: dict[str, int]) -> None:
    """Compares the bits of sharded norms with those of whole rows."""
    for M, N, dtype, spec, adds in OTHERS:
        if tiny and M * N > 1 << 21:
            continue
        norm = Norm(mesh, M, N, dtype)
        expected, found = (gradients(given, spec, adds=adds) for given in (norm.whole, norm.sharded))
        count_differing(found, expected, count)


def compare_calls(calls: Mapping[str, Mapping[str, Call]], count: dict[str, int]) -> None:
    """Compares the bits of y and dx of the calls that are timed with those of whole rows."""
    for of_direction in calls.values():
        expected = of_direction["whole_rows"]()
        for name in ("eager", "compiled", "cuda_graph"):
            if name in of_direction:
                found = of_direction[name]()
                pair = (found[:1], expected[:1]) if isinstance(expected, tuple) else ([found], [expected])
                count_differing(*pair, count)


def calls_of(norm: Norm) -> dict[str, dict[str, Call]]:
    """What is timed, by direction and name."""
    ops, part, whole, sharded, N = torch.ops.rmsnorm, norm.part, norm.whole, norm.sharded, norm.shape[-1]
    early = ("early", 0.0)
    S = ops.begin_forward(part["x"], None)[1]
    total = compat.sum_over_ranks(S, norm.mesh, 0)
    rstd = ops.finish_forward(part["x"], part["w"], total, N, EPS, *early, True)[1]
    rstd_sharded = DTensor.from_local(rstd, norm.mesh, run_check=False)
    of_dot = ops.begin_backward(part["dy"], part["x"], part["w"], rstd, *early)

    def backward(given: Mapping[str, Any], rstd: Tensor) -> Call:
        return lambda: ops.backward(given["dy"], None, given["x"], given["w"], rstd, *early, True, True)

    backend = "inductor" if norm.mesh.device_type == "cuda" else "aot_eager"
    compiled = torch.compile(rmsnorm.rms_norm, fullgraph=True, backend=backend)
    leaves = [sharded[name].detach().requires_grad_() for name in ("x", "w")]
    with torch.enable_grad():
        y = compiled(*leaves, EPS)
    found: dict[str, dict[str, Call]] = {
        "forward": {
            "begin": lambda: ops.begin_forward(part["x"], None),
            "all_reduce": lambda: compat.sum_over_ranks(S, norm.mesh, 0),
            "finish": lambda: ops.finish_forward(part["x"], part["w"], total, N, EPS, *early, False),
            "eager": lambda: forward(sharded, {}),
            "compiled": lambda: compiled(sharded["x"], sharded["w"], EPS),
            "kernel_on_part": lambda: forward(part, {}),
            "whole_rows": lambda: forward(whole, {}),
        },
        "backward": {
            "begin": lambda: ops.begin_backward(part["dy"], part["x"], part["w"], rstd, *early),
            "all_reduce": lambda: compat.sum_over_ranks(of_dot, norm.mesh, 0),
            "finish": lambda: ops.finish_backward(part["dy"], None, part["x"], part["w"], rstd, total, N, *early, True),
            "eager": backward(sharded, rstd_sharded),
            "compiled": lambda: torch.autograd.grad(y, leaves, sharded["dy"], retain_graph=True),
            "kernel_on_part": backward(part, rstd),
            "whole_rows": backward(whole, rstd),
        },
    }
    if norm.mesh.device_type == "cuda":
        for calls in found.values():
            for name, of in (("cuda_graph", "eager"), ("all_reduce_in_graph", "all_reduce")):
                calls[name] = captured(calls[of])
    return found


def sampled(calls: Mapping[str, Call], mesh: DeviceMesh, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in every round. The order is the same on every rank."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, names = random.Random(0), list(calls)
    meeting = torch.zeros(1, device=mesh.device_type)
    on_gpu = mesh.device_type == "cuda"
    scratch = torch.empty(256 << 20 if on_gpu else 1, dtype=torch.uint8, device=mesh.device_type)
    for name in names:
        calls[name]()
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            for _ in range(8):
                scratch.zero_()
            dist.all_reduce(meeting)
            if on_gpu:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                calls[name]()
                end.record()
                end.synchronize()
                taken[name].append(start.elapsed_time(end) / 1e3)
            else:
                begun = time.perf_counter()
                calls[name]()
                taken[name].append(time.perf_counter() - begun)
    return taken


def in_a_row(call: Call, mesh: DeviceMesh, calls: int) -> list[float]:
    """Seconds of one of several calls in a row, from the first call until host and GPU have finished."""
    taken = []
    for _ in range(5):
        dist.barrier()
        if mesh.device_type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        if mesh.device_type == "cuda":
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - begun) / calls)
    return taken


def slowest(of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return max(of_ranks, key=lambda timing: timing["median_us"])


def timed(calls: Mapping[str, Call], mesh: DeviceMesh, rounds: int, *, eager: str) -> dict[str, Any]:
    """The times of calls by name, each of the slowest rank; and those of calls in a row of the one named `eager`."""
    taken = sampled(calls, mesh, rounds)
    taken["eager_in_a_row"] = in_a_row(calls[eager], mesh, IN_A_ROW)
    own = {name: summarize(samples).to_json() for name, samples in taken.items()}
    ranks: list[Any] = [None] * mesh.size()
    dist.all_gather_object(ranks, own)
    return {name: slowest([of_rank[name] for of_rank in ranks]) for name in own}


def pair_calls(mesh: DeviceMesh, M: int, widths: tuple[int, int], count: dict[str, int]) -> dict[str, Call]:
    """Two norms by two calls of `rms_norm`, and by one call of `rms_norms`; compares their bits."""
    sharded = [Norm(mesh, M, N, BF16).sharded for N in widths]
    calls: dict[str, Call] = {
        "apart": lambda: [forward(given, {}) for given in sharded],
        "together": lambda: rmsnorm.rms_norms([t["x"] for t in sharded], [t["w"] for t in sharded], EPS),
    }
    count_differing(calls["together"](), [t.full_tensor() for t in calls["apart"]()], count)
    if mesh.device_type == "cuda":
        calls |= {f"{name}_in_graph": captured(call) for name, call in calls.items()}
    return calls


def run_rank(rank: int, world: int, device: str, tiny: bool, folder: str, out: str | None) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mesh, bits, cases, rounds = (
        init_device_mesh(device, (world,)),
        {"compared": 0, "differ": 0},
        [],
        3 if tiny else ROUNDS,
    )
    compare_others(mesh, tiny, bits)
    wait_for_host()
    with torch.no_grad():
        for M, N in TINY_SHAPES if tiny else SHAPES:
            torch.compiler.reset()
            calls = calls_of(Norm(mesh, M, N, BF16))
            compare_calls(calls, bits)
            for direction, of_direction in calls.items():
                times = timed(of_direction, mesh, rounds, eager="eager")
                cases.append({"M": M, "N": N, "dtype": "bfloat16", "direction": direction, "times": times})
        M, *widths = TINY_PAIR if tiny else PAIR
        times = timed(pair_calls(mesh, M, (widths[0], widths[1]), bits), mesh, rounds, eager="together")
        pair = {"M": M, "N": widths, "dtype": "bfloat16", "times": times}
    if rank == 0:
        described = machine.describe(torch.device(device, rank) if device == "cuda" else torch.device(device))
        show(bits, cases, pair)
        if out is not None:
            facts = {"machine": described, "ranks": world, "bits": bits, "cases": cases, "pair": pair}
            results.write_json(Path(out) / f"rows-in-parts-{device}.json", facts)
    dist.barrier()
    dist.destroy_process_group()
    if bits["differ"]:
        sys.exit(1)


def show(bits: dict[str, int], cases: list[dict[str, Any]], pair: dict[str, Any]) -> None:
    print(f"{bits['differ']} of {bits['compared']} outputs differ")
    for case in (*cases, pair):
        medians = {name: timing["median_us"] for name, timing in case["times"].items()}
        least = medians["kernel_on_part"] + medians["all_reduce"] if "direction" in case else medians["apart"]
        print(f"{case['M']} x {case['N']} {case.get('direction', 'pair')}: compared with {least:.1f} us")
        for name, median in medians.items():
            print(f"  {name:20} {median:9.1f} us  {median / least:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for the result")
    parser.add_argument("--tiny", action="store_true", help="a few small cases, on the CPU with two ranks")
    options = parser.parse_args()
    gpus = torch.cuda.device_count()
    if not options.tiny and gpus < 2:
        raise CommandError(f"there are {gpus} GPUs, expected at least 2; --tiny tries the script on the CPU")
    if options.out is not None:
        results.check_folder(options.out)
    device, world = ("cpu", 2) if options.tiny else ("cuda", gpus)
    with tempfile.TemporaryDirectory() as folder:
        out = None if options.out is None else str(options.out)
        try:
            torch.multiprocessing.spawn(run_rank, (world, device, options.tiny, folder, out), nprocs=world)
        except torch.multiprocessing.ProcessExitedException as ended:
            return int(ended.exit_code)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CommandError as error:
        sys.exit(f"rows_in_parts.py: {error}")
