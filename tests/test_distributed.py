"""The same bits on several ranks as on one. Each case runs on every rank of a group of gloo processes on the CPU.

A group is started once and runs its cases in turn. A rank whose case fails prints why and leaves, which ends the
others, so that nothing waits for it: then only the first failure of a group counts.
"""

import contextlib
import datetime
import functools
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

import rmsnorm
from rmsnorm import reference
from tolerance import OTHER_ORDER, assert_same_bits

Case = Callable[[DeviceMesh], None]
CASES: dict[int, dict[str, Case]] = {2: {}, 4: {}}
FAULTS: dict[str, Case] = {}
SPECS: list[dict[str, Any]] = [{}, {"cast": "late"}, {"cast": "late", "offset": 1.0}]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on(*worlds: int) -> Callable[[Case], Case]:
    def add(case: Case) -> Case:
        for world in worlds:
            CASES[world][case.__name__] = case
        return case

    return add


# --- what the cases share ------------------------------------------------------------------------------------


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spread(t: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    return distribute_tensor(t.detach(), mesh, placements, src_data_rank=None).requires_grad_(t.requires_grad)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, w_dtype: torch.dtype | None) -> list[Tensor | None]:
    """x, residual, w (None without a dtype), dy, ds."""
    y_dtype = dtype if w_dtype is None else torch.promote_types(dtype, w_dtype)
    x, residual = (randn(*shape, seed=i, dtype=dtype).requires_grad_() for i in (1, 2))
    w = None if w_dtype is None else randn(shape[-1], seed=3, dtype=w_dtype).requires_grad_()
    return [x, residual, w, randn(*shape, seed=4, dtype=y_dtype), randn(*shape, seed=5, dtype=dtype)]


def norm(x: Any, residual: Any, w: Any, dy: Any, ds: Any, spec: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """(y, s), (dx, d_residual, dw) of add_rms_norm and, with no residual, of rms_norm."""
    leaves = [t for t in (x, residual, w) if t is not None]
    if residual is None:
        outputs, gradients = [rmsnorm.rms_norm(x, w, **spec)], [dy]
    else:
        outputs, gradients = [*rmsnorm.add_rms_norm(x, residual, w, **spec)], [dy, ds]
    gradients = [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)]
    return outputs, list(torch.autograd.grad(outputs, leaves, gradients))


def same(got: DTensor, expected: Tensor, what: str, *placements: Placement) -> None:
    assert got.placements == placements, f"{what}: {got.placements}, expected {placements}"
    assert_same_bits(got.full_tensor(), expected, what)


def dw_of_rows(x: Any, residual: Any, w: Any, dy: Any, spec: dict[str, Any]) -> Tensor:
    """dw of the reference, whose sum over rows is in fp64."""
    cast, offset = spec.get("cast", "early"), spec.get("offset", 0.0)
    with torch.no_grad():
        rows = x if residual is None else x + residual
        rstd = reference.exact_rstd(rows, 1e-6)
    dw = reference.backward(dy, None, rows, w, rstd, cast, offset, False, True)[1]
    assert dw is not None
    return dw


class Messages(TorchDispatchMode):
    """What each collective inside carries: (its name, dtype, how many numbers)."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes here again with what is local
        if func.namespace == "_c10d_functional" and not func.__name__.startswith(("wait", "_")):
            self.sent.append((func.__name__.split(".")[0], args[0].dtype, args[0].numel()))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def communicating(**expected: int) -> Iterator[None]:
    """Exactly these collectives inside."""
    with CommDebugMode() as counted:
        yield
    counts = {op.__name__.split(".")[0]: n for op, n in counted.get_comm_counts().items() if n}
    assert counts == expected, f"{counts}, expected {expected}"


# --- the operators -------------------------------------------------------------------------------------------


@on(2, 4)
def rows_pass_through(mesh: DeviceMesh) -> None:
    """Any sharding of rows: no communication, exact placements, and dw what each rank's own rows give."""
    for shape in ((4, 7, 96), (3, 1, 5, 33), (1, 2, 1)):  # uneven, and ranks without a row
        for dim in (None, *range(len(shape) - 1)):
            p: Placement = Replicate() if dim is None else Shard(dim)
            for i, spec in enumerate(SPECS):
                x, residual, w, dy, ds = drawn(shape, DTYPES[i], torch.float32 if i == 1 else DTYPES[i])
                for r in (None, residual):
                    outputs, gradients = norm(x, r, w, dy, ds, spec)
                    X, R, DY, DS = (None if t is None else spread(t, mesh, p) for t in (x, r, dy, ds))
                    with communicating():
                        got, got_gradients = norm(X, R, spread(w, mesh, Replicate()), DY, DS, spec)
                    for a, b in zip(got + got_gradients[:-1], outputs + gradients[:-1], strict=True):
                        same(a, b, f"{shape} {p} {spec}", p)
                    dw = got_gradients[-1]
                    assert dw.placements == ((Replicate() if dim is None else Partial()),)
                    local = [None if t is None else t.to_local().detach() for t in (X, R, DY)]
                    if local[0].numel():
                        local = [None if t is None else t.requires_grad_() for t in local]
                        own = norm(local[0], local[1], w, local[2], torch.zeros_like(local[0]), spec)[1][-1]
                        assert_same_bits(dw.to_local(), own, "dw of a rank")
                    else:
                        assert dw.to_local().eq(0).all()


@on(2, 4)
def columns_stay_sharded(mesh: DeviceMesh) -> None:
    """One all-reduce of one fp64 number a row in each direction; also uneven, and with ranks that hold no column."""
    for N, dtype in ((256, DTYPES[1]), *((67, dtype) for dtype in DTYPES), (5, DTYPES[0]), (1, DTYPES[2])):
        for w_dtype, spec in ((dtype, SPECS[0]), (torch.float32, SPECS[1]), (dtype, SPECS[2]), (None, SPECS[0])):
            x, residual, w, dy, ds = drawn((3, 5, N), dtype, w_dtype)
            for r, w_placement in ((None, Shard(0)), (residual, Shard(0)), (residual, Replicate())):
                outputs, gradients = norm(x, r, w, dy, ds, spec)
                X, R, DY, DS = (None if t is None else spread(t, mesh, Shard(2)) for t in (x, r, dy, ds))
                W = None if w is None else spread(w, mesh, w_placement)
                with Messages() as messages, communicating(all_reduce=2):
                    got, got_gradients = norm(X, R, W, DY, DS, spec)
                assert messages.sent == [("all_reduce", torch.float64, 15)] * 2, messages.sent
                pairs = list(zip(got + got_gradients, outputs + gradients, strict=True))
                for a, b in pairs if w is None else pairs[:-1]:
                    same(a, b, f"{N} {dtype} {spec}", Shard(2))
                if w is not None:
                    same(pairs[-1][0], dw_of_rows(x, r, w, dy.to(outputs[0].dtype), spec), "dw", Shard(0))


@on(4)
def two_dimensions(mesh: DeviceMesh) -> None:
    """Rows on one dimension of the mesh and columns on the other; rows, or columns, on both."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    x, residual, w, dy, ds = drawn((5, 3, 67), torch.float32, torch.float32)
    outputs, gradients = norm(x, residual, w, dy, ds, {})
    for placements, all_reduces, of_w, of_dw in (
        ((Shard(0), Shard(2)), 2, (Replicate(), Shard(0)), (Partial(), Shard(0))),
        ((Shard(2), Shard(1)), 2, (Shard(0), Replicate()), (Shard(0), Partial())),
        ((Shard(0), Shard(0)), 0, (Replicate(), Replicate()), (Partial(), Partial())),
        ((Shard(2), Shard(2)), 4, (Shard(0), Shard(0)), (Shard(0), Shard(0))),
        ((Replicate(), Shard(2)), 2, (Replicate(), Shard(0)), (Replicate(), Shard(0))),
    ):
        X, R, DY, DS = (spread(t, mesh, *placements) for t in (x, residual, dy, ds))
        with communicating(**({"all_reduce": all_reduces} if all_reduces else {})):
            got, got_gradients = norm(X, R, spread(w, mesh, *of_w), DY, DS, {})
        for a, b in zip(got + got_gradients[:-1], outputs + gradients[:-1], strict=True):
            same(a, b, str(placements), *placements)
        assert got_gradients[-1].placements == of_dw
        torch.testing.assert_close(got_gradients[-1].full_tensor(), gradients[-1], rtol=OTHER_ORDER, atol=1e-5)


@on(2)
def what_differs_is_brought_together(mesh: DeviceMesh) -> None:
    """A residual or a gradient that lies otherwise than x, and a sum that is still partial."""
    x, residual, w, dy, ds = drawn((4, 6, 32), torch.float32, torch.float32)
    outputs, gradients = norm(x, residual, w, dy, ds, {})
    W = spread(w, mesh, Replicate())
    for of_x, of_residual, of_dy, expected, counts in (
        (Shard(1), Replicate(), Shard(1), Shard(1), {}),
        (Replicate(), Shard(1), Replicate(), Shard(1), {}),
        (Shard(0), Shard(0), Shard(1), Shard(0), {"all_gather_into_tensor": 1}),  # an all-to-all, but gloo has none
        (Shard(2), Shard(2), Replicate(), Shard(2), {"all_reduce": 2}),
    ):
        X, R, DY, DS = (
            spread(t, mesh, p) for t, p in ((x, of_x), (residual, of_residual), (dy, of_dy), (ds, expected))
        )
        with communicating(**counts):
            got, got_gradients = norm(X, R, W, DY, DS, {})
        for a, b in zip(got + got_gradients[:2], outputs + gradients[:2], strict=True):
            same(a, b, f"{of_x} {of_residual}", expected)
    half = DTensor.from_local(x.detach() / 2, mesh, [Partial()])  # a power of two: the sum is x again
    with communicating(all_reduce=1):
        y = rmsnorm.rms_norm(half, W)
    same(y, rmsnorm.rms_norm(x, w), "partial", Replicate())
    with communicating(reduce_scatter_tensor=1):
        y, s = rmsnorm.add_rms_norm(half, spread(residual, mesh, Shard(1)), W)
    same(y, outputs[0], "partial x", Shard(1))
    same(s, outputs[1], "partial x", Shard(1))


@on(2)
def without_fp64_sums_bits_differ(mesh: DeviceMesh) -> None:
    """In fp32: if the partial sums were fp32, the test of columns would be red, forward and backward."""
    x, _, w, dy, ds = drawn((64, 8, 256), torch.float32, torch.float32)
    outputs, gradients = norm(x, None, w, dy, ds, {})

    def differing() -> list[int]:
        X, DY = spread(x, mesh, Shard(2)), spread(dy, mesh, Shard(2))
        got, got_gradients = norm(X, None, spread(w, mesh, Shard(0)), DY, None, {})
        pairs = (got[0], outputs[0]), (got_gradients[0], gradients[0])
        return [int((a.full_tensor() != b).sum()) for a, b in pairs]

    assert differing() == [0, 0]
    squares, dot = reference.sum_of_squares, reference.dot
    try:
        reference.dot = lambda g, xh: (g * xh).sum(-1)
        y, dx = differing()
        assert y == 0
        assert dx > 0
        reference.sum_of_squares, reference.dot = lambda x: x.float().square().sum(-1), dot
        y, dx = differing()
        assert y > 0
        assert dx > 0
    finally:
        reference.sum_of_squares, reference.dot = squares, dot


@on(2)
def compiled(mesh: DeviceMesh) -> None:
    """fullgraph: the same bits, one node a call, and no more collectives in the graph than eagerly."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    whole = {"rmsnorm.forward.default"}, {"rmsnorm.backward.default"}
    parts = [
        {f"rmsnorm.{half}_{way}_in_parts.default" for half in ("begin", "finish")} for way in ("forward", "backward")
    ]
    recording = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    x, residual, w, dy, ds = drawn((4, 6, 67), torch.bfloat16, torch.bfloat16)
    for p, of_w, ours, reduces in ((Shard(1), Replicate(), whole, 0), (Shard(2), Shard(0), parts, 1)):
        for r in (None, residual):
            outputs, gradients = norm(x, r, w, dy, ds, {})
            for backend in (recording, "inductor"):
                torch._dynamo.reset()
                graphs.clear()
                X, R, DY, DS = (None if t is None else spread(t, mesh, p) for t in (x, r, dy, ds))
                W = spread(w, mesh, of_w)
                if r is None:
                    got = [torch.compile(rmsnorm.rms_norm, fullgraph=True, backend=backend)(X, W)]
                    got_gradients = torch.autograd.grad(got, [X, W], [DY])
                else:
                    got = [*torch.compile(rmsnorm.add_rms_norm, fullgraph=True, backend=backend)(X, R, W)]
                    got_gradients = torch.autograd.grad(got, [X, R, W], [DY, DS])
                for a, b in zip(got + list(got_gradients[:-1]), outputs + gradients[:-1], strict=True):
                    same(a, b, f"{p} {backend}", p)
                assert len(graphs) == (2 if backend is recording else 0)
                for nodes, expected in zip(graphs, ours, strict=False):
                    assert {n for n in nodes if n.startswith("rmsnorm")} == expected, nodes
                    assert sum("all_reduce" in n for n in nodes) == reduces, nodes
                    assert not any(f"aten.{n}." in node for node in nodes for n in ("mul", "add", "rsqrt")), nodes
    torch._dynamo.reset()


@on(2)
def not_differentiated(mesh: DeviceMesh) -> None:
    """no_grad, inference_mode, a compiled inference, and what explain says."""
    x, _, w, *_ = drawn((4, 6, 67), torch.bfloat16, torch.bfloat16)
    y = rmsnorm.rms_norm(x, w).detach()
    for p, of_w in ((Shard(1), Replicate()), (Shard(2), Shard(0))):
        for mode in (torch.no_grad, torch.inference_mode):
            for f in (rmsnorm.rms_norm, torch.compile(rmsnorm.rms_norm, fullgraph=True, backend="aot_eager")):
                with mode():
                    got = f(spread(x.detach(), mesh, p), spread(w.detach(), mesh, of_w))
                    same(got, y, f"{mode} {p}", p)
    X, W = spread(x, mesh, Shard(2)), spread(w, mesh, Shard(0))
    assert "the last dimension is sharded" in rmsnorm.explain(X, W)
    assert "without communication" in rmsnorm.explain(spread(x, mesh, Shard(0)), spread(w, mesh, Replicate()))
    torch._dynamo.reset()


# --- running a group -----------------------------------------------------------------------------------------


def run_rank(rank: int, world: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ranks",))
    os.chdir(folder)
    for name in names:
        start = time.perf_counter()
        try:
            CASES[world][name](mesh)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
            os._exit(1)
        print(f"passed {name} {time.perf_counter() - start:.1f}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def start(rank: int, world: int, folder: Path, *names: str) -> "subprocess.Popen[str]":
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    # torch's cache of compiled code does not tell uneven shards of one DTensor apart: one cache for each rank.
    variables["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled-{rank}"
    arguments = [sys.executable, __file__, str(rank), str(world), str(folder), *names]
    return subprocess.Popen(arguments, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(processes: list["subprocess.Popen[str]"], seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0])
    finally:
        for process in processes:
            process.kill()
    return outputs


@functools.cache
def group(world: int) -> list[str]:
    """What each rank of a group printed."""
    with tempfile.TemporaryDirectory() as folder:
        return finish([start(r, world, Path(folder), *CASES[world]) for r in range(world)], 240)


@pytest.mark.parametrize(("world", "name"), [(w, n) for w in CASES for n in CASES[w]])
def test_on_every_rank(world: int, name: str) -> None:
    for rank, output in enumerate(group(world)):
        assert f"\npassed {name} " in "\n" + output, f"rank {rank}:\n{output}"


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
