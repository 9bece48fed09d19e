"""Several ranks give the same bits as one. Each case runs on every rank of a group of gloo processes on the CPU.

A group is started once and runs its cases in turn. A rank whose case fails prints the error and exits, which ends
the others, so that none waits for it; then only the first failure of a group counts.
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
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rmsnorm
from rmsnorm import compat, reference
from rmsnorm.ops import sharding as shards
from rmsnorm.tools.verify.cases import VerifyCase
from rmsnorm.tools.verify.compare import compare
from rmsnorm.tools.verify.ranks import run_sharded
from rmsnorm.tools.verify.tally import Tally
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


# --- shared by the cases ------------------------------------------------------------------------------------


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers that are the same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spread(t: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    return distribute_tensor(t.detach(), mesh, placements, src_data_rank=None).requires_grad_(t.requires_grad)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, w_dtype: torch.dtype | None) -> list[Tensor | None]:
    """Random x, residual, w (None if its dtype is None), dy and ds."""
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
    """dw of the reference, which sums over rows in fp64."""
    cast, offset = spec.get("cast", "early"), spec.get("offset", 0.0)
    with torch.no_grad():
        rows = x if residual is None else x + residual
        rstd = reference.exact_rstd(rows, 1e-6)
    dw = reference.backward(dy, None, rows, w, rstd, cast, offset, False, True)[1]
    assert dw is not None
    return dw


class Messages(TorchDispatchMode):
    """Records the collectives inside as (name, dtype, number of elements)."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # the mode is called again with the local tensors
        if func.namespace == "_c10d_functional" and not func.__name__.startswith(("wait", "_")):
            self.sent.append((func.__name__.split(".")[0], args[0].dtype, args[0].numel()))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def communicating(**expected: int) -> Iterator[None]:
    """Asserts that exactly these collectives run inside."""
    with CommDebugMode() as counted:
        yield
    counts = {op.__name__.split(".")[0]: n for op, n in counted.get_comm_counts().items() if n}
    assert counts == expected, f"{counts}, expected {expected}"


# --- the operators -------------------------------------------------------------------------------------------


@on(2, 4)
def rows_need_no_communication(mesh: DeviceMesh) -> None:
    """Any sharding of rows: no communication, the expected placements, and dw of each rank's own rows."""
    for shape in ((4, 7, 96), (3, 1, 5, 33), (1, 2, 1)):  # uneven shards, and ranks without rows
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
    """One all-reduce of one fp64 number a row in each direction; also with uneven shards and ranks without columns."""
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


def norm_pair(xs: list[Any], ws: list[Any], dys: list[Any], spec: dict[str, Any], call: Any) -> list[Any]:
    """y of each norm, then dx of each, then dw of each."""
    ys = call(xs, ws, **spec)
    return [*ys, *torch.autograd.grad(ys, [*xs, *ws], dys)]


@on(2, 4)
def two_norms_share_an_all_reduce(mesh: DeviceMesh) -> None:
    """One all-reduce for both in each direction, with the bits of a single process; by rows, none."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    reduces: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        reduces.append(sum("all_reduce" in str(n.target) for n in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=counting, bw_compiler=counting)
    for i, dtype in enumerate(DTYPES):
        shapes = ((3, 5, 67), (4, 32)) if i else ((2, 3), (7, 1))  # the last ranks have no columns
        xs, dys = ([randn(*shape, seed=s, dtype=dtype) for shape in shapes] for s in (1, 2))
        ws = [randn(shape[-1], seed=3, dtype=dtype) for shape in shapes]
        xs, ws = ([t.requires_grad_() for t in ts] for ts in (xs, ws))
        spec = SPECS[i]
        expected = norm_pair(xs, ws, dys, spec, rmsnorm.rms_norms)

        def sharded(*dims: int, xs: Any = xs, ws: Any = ws, dys: Any = dys) -> tuple[list[Any], ...]:
            of_w = [Shard(0) if dim == t.dim() - 1 else Replicate() for dim, t in zip(dims, xs, strict=True)]
            return (
                [spread(t, mesh, Shard(dim)) for dim, t in zip(dims, xs, strict=True)],
                [spread(w, mesh, p) for w, p in zip(ws, of_w, strict=True)],
                [spread(t, mesh, Shard(dim)) for dim, t in zip(dims, dys, strict=True)],
            )

        columns = [len(shape) - 1 for shape in shapes]
        rows = shapes[0][:-1], shapes[1][:-1]
        numbers = sum(torch.Size(one).numel() for one in rows)
        with Messages() as messages, communicating(all_reduce=2):
            runs = [norm_pair(*sharded(*columns), spec, rmsnorm.rms_norms)]
        assert messages.sent == [("all_reduce", torch.float64, numbers)] * 2, messages.sent
        if mesh.size() == 2:
            torch._dynamo.reset()
            reduces.clear()
            compiled_norms = torch.compile(rmsnorm.rms_norms, fullgraph=True, backend=backend)
            runs.append(norm_pair(*sharded(*columns), spec, compiled_norms))
            assert reduces == [1, 1], "all-reduces of the forward and of the backward graph"
        for found in runs:
            for k, (a, b) in enumerate(zip(found[:4], expected[:4], strict=True)):
                same(a, b, f"{dtype} {k}", Shard(columns[k % 2]))
        one = {"all_reduce": 2}  # forward and backward
        for dims, counts in (((0, 0), {}), ((0, columns[1]), one), ((columns[0], 0), one)):
            with communicating(**counts):
                found = norm_pair(*sharded(*dims), spec, rmsnorm.rms_norms)
            for k, (a, b) in enumerate(zip(found[:4], expected[:4], strict=True)):
                same(a, b, f"{dtype} {dims}", Shard(dims[k % 2]))
        # Three norms: two share, and the gradient of one alone needs a sum of its own.
        (X, X2), (W, W2), (DY, _) = sharded(*columns)
        with communicating(all_reduce=2):
            ys = rmsnorm.rms_norms([X, X2, X], [W, W2, W], **spec)
        assert_same_bits(ys[2].full_tensor(), expected[0], "third")
        with Messages() as messages:
            dx = torch.autograd.grad(ys[0], X, DY)[0]
        assert messages.sent == [("all_reduce", torch.float64, torch.Size(rows[0]).numel())]
        same(dx, expected[2], "dx of one", Shard(columns[0]))


@on(2)
def gradients_that_need_no_sum_need_no_communication(mesh: DeviceMesh) -> None:
    """The weight's alone; also on ranks without columns."""
    for N in (67, 1):
        x, _, w, dy, _ = drawn((4, N), torch.float32, torch.float32)
        x = x.detach()
        X, W, DY = spread(x, mesh, Shard(1)), spread(w, mesh, Shard(0)), spread(dy, mesh, Shard(1))
        y = rmsnorm.rms_norm(X, W)
        with communicating():
            dw = torch.autograd.grad(y, W, DY)[0]
        same(dw, dw_of_rows(x, None, w, dy, {}), "dw", Shard(0))


@on(2)
def sums_travel_through_dtensors_without_torchs_operators(mesh: DeviceMesh) -> None:
    """If torch no longer has the functional collectives by their names, DTensors are redistributed."""
    x, residual, w, dy, ds = drawn((3, 5, 67), torch.float32, torch.float32)
    outputs, gradients = norm(x, residual, w, dy, ds, {})
    X, R, DY, DS = (spread(t, mesh, Shard(2)) for t in (x, residual, dy, ds))
    found, compat.sum_over_ranks = compat.sum_over_ranks, lambda *_: None
    try:
        with Messages() as messages:
            got, got_gradients = norm(X, R, spread(w, mesh, Shard(0)), DY, DS, {})
    finally:
        compat.sum_over_ranks = found
    assert messages.sent == [("all_reduce", torch.float64, 15)] * 2
    for a, b in zip(got + got_gradients[:-1], outputs + gradients[:-1], strict=True):
        same(a, b, "redistributed", Shard(2))


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


@on(2, 4)
def weights_of_heads_are_sharded_as_the_heads(mesh: DeviceMesh) -> None:
    """Whole heads without communication, as under tensor parallelism; also uneven shards, rows and columns."""
    for H, dtype in ((8, torch.bfloat16), (3, torch.float32)):
        x, residual, _, dy, ds = drawn((5, H, 40), dtype, dtype)
        w = randn(H, 40, seed=6, dtype=dtype).requires_grad_()
        outputs, gradients = norm(x, residual, w, dy, ds, {})
        for p, of_w, of_dw in (
            (Shard(1), Shard(0), Shard(0)),
            (Shard(1), Replicate(), Shard(0)),
            (Shard(0), Replicate(), Partial()),
            (Shard(2), Shard(1), Shard(1)),
            (Replicate(), Replicate(), Replicate()),
        ):
            X, R, DY, DS = (spread(t, mesh, p) for t in (x, residual, dy, ds))
            with communicating(**({"all_reduce": 2} if p == Shard(2) else {})):
                got, got_gradients = norm(X, R, spread(w, mesh, of_w), DY, DS, {})
            for a, b in zip(got + got_gradients[:-1], outputs + gradients[:-1], strict=True):
                same(a, b, f"{H} heads, {p}", p)
            dw = got_gradients[-1]
            assert dw.placements == (of_dw,)
            if of_dw == Partial():  # each rank rounds its share
                torch.testing.assert_close(dw.full_tensor().float(), gradients[-1].float(), rtol=2e-2, atol=2e-2)
            else:
                assert_same_bits(dw.full_tensor(), gradients[-1], "dw")


@on(2)
def differing_placements_are_redistributed(mesh: DeviceMesh) -> None:
    """A residual or gradient with other placements than x, and a Partial x."""
    x, residual, w, dy, ds = drawn((4, 6, 32), torch.float32, torch.float32)
    outputs, gradients = norm(x, residual, w, dy, ds, {})
    W = spread(w, mesh, Replicate())
    for of_x, of_residual, of_dy, expected, counts in (
        (Shard(1), Replicate(), Shard(1), Shard(1), {}),
        (Replicate(), Shard(1), Replicate(), Shard(1), {}),
        (
            Shard(0),
            Shard(0),
            Shard(1),
            Shard(0),
            {"all_gather_into_tensor": 1},
        ),  # would be an all-to-all, which gloo lacks
        (Shard(2), Shard(2), Replicate(), Shard(2), {"all_reduce": 2}),
    ):
        X, R, DY, DS = (
            spread(t, mesh, p) for t, p in ((x, of_x), (residual, of_residual), (dy, of_dy), (ds, expected))
        )
        with communicating(**counts):
            got, got_gradients = norm(X, R, W, DY, DS, {})
        for a, b in zip(got + got_gradients[:2], outputs + gradients[:2], strict=True):
            same(a, b, f"{of_x} {of_residual}", expected)
    half = DTensor.from_local(x.detach() / 2, mesh, [Partial()])  # halving is exact, so the sum is x again
    with communicating(all_reduce=1):
        y = rmsnorm.rms_norm(half, W)
    same(y, rmsnorm.rms_norm(x, w), "partial", Replicate())
    with communicating(reduce_scatter_tensor=1):
        y, s = rmsnorm.add_rms_norm(half, spread(residual, mesh, Shard(1)), W)
    same(y, outputs[0], "partial x", Shard(1))
    same(s, outputs[1], "partial x", Shard(1))


@contextlib.contextmanager
def fp32_sums() -> Iterator[None]:
    """The sums over columns that ranks exchange, rounded to fp32."""
    over_ranks = shards._over_ranks
    shards._over_ranks = lambda S, norm: over_ranks(S.float().double(), norm)
    try:
        yield
    finally:
        shards._over_ranks = over_ranks


@on(2)
def without_fp64_sums_bits_differ(mesh: DeviceMesh) -> None:
    """Replaces the fp64 partial sums by fp32 ones: then the test of columns must fail, forward and backward."""
    x, _, w, dy, ds = drawn((64, 8, 256), torch.float32, torch.float32)
    outputs, gradients = norm(x, None, w, dy, ds, {})

    def differing() -> list[int]:
        X, DY = spread(x, mesh, Shard(2)), spread(dy, mesh, Shard(2))
        got, got_gradients = norm(X, None, spread(w, mesh, Shard(0)), DY, None, {})
        pairs = (got[0], outputs[0]), (got_gradients[0], gradients[0])
        return [int((a.full_tensor() != b).sum()) for a, b in pairs]

    assert differing() == [0, 0]
    with fp32_sums():
        y, dx = differing()
        assert y > 0
        assert dx > 0


@on(2)
def verify_fails_if_a_rank_is_wrong(mesh: DeviceMesh) -> None:
    """The differences that `rmsnorm verify --world` counts.

    There are none at first, then some with fp32 sums over columns, with a wrong part of dw, and with a part of dw whose
    placement says that it is all of dw.
    """

    def tally(sharding: str) -> Tally:
        case = VerifyCase(torch.float32, torch.float32, "late", 0.0, 128, 256, sharding=sharding)
        return compare(case, 1, torch.device("cpu"), lambda given, case: run_sharded(given, case, mesh))

    for sharding in ("rows", "columns"):
        assert (tally(sharding).differing, tally(sharding).unsteady) == (0, 0)
    assert tally("columns").dw.elements == 256
    with fp32_sums():
        assert tally("columns").differing > 0
    as_whole = shards.as_whole
    try:
        shards.as_whole = lambda t, mesh, layout, shape: as_whole(t + (Partial() in layout), mesh, layout, shape)
        assert tally("rows").unsteady == 256
        shards.as_whole = lambda t, mesh, layout, shape: as_whole(
            t, mesh, tuple(Replicate() if p == Partial() else p for p in layout), shape
        )
        assert tally("rows").unsteady == 256
    finally:
        shards.as_whole = as_whole


@on(2)
def compiled(mesh: DeviceMesh) -> None:
    """With fullgraph=True: the same bits, one node for each call, and no more collectives than in eager mode."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    whole = {"rmsnorm.forward.default"}, {"rmsnorm.backward.default"}
    parts = [{f"rmsnorm.{half}_{way}.default" for half in ("begin", "finish")} for way in ("forward", "backward")]
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
def without_gradients(mesh: DeviceMesh) -> None:
    """no_grad, inference_mode, compiled inference, and the text of `explain`."""
    x, _, w, *_ = drawn((4, 6, 67), torch.bfloat16, torch.bfloat16)
    y = rmsnorm.rms_norm(x, w).detach()
    for p, of_w in ((Shard(1), Replicate()), (Shard(2), Shard(0))):
        for mode in (torch.no_grad, torch.inference_mode):
            for f in (rmsnorm.rms_norm, torch.compile(rmsnorm.rms_norm, fullgraph=True, backend="aot_eager")):
                with mode():
                    got = f(spread(x.detach(), mesh, p), spread(w.detach(), mesh, of_w))
                    same(got, y, f"{mode} {p}", p)
    X, W = spread(x, mesh, Shard(2)), spread(w, mesh, Shard(0))
    for residual in (None, X):
        said = rmsnorm.explain(X, W, residual)
        assert said.startswith("cpu, bfloat16: cpu kernel (Numba) ("), said
        assert "; in two parts around an all-reduce, because the last dimension is sharded; " in said
        assert "reference" not in said
    said = rmsnorm.explain(spread(x[..., :1], mesh, Shard(2)), spread(w[:1], mesh, Shard(0)))
    assert ("this rank has no columns" in said) == (mesh.get_local_rank() == 1)
    said = rmsnorm.explain(spread(x.double(), mesh, Shard(2)), W)
    assert said.startswith("cpu, float64: the reference, in plain torch (x is torch.float64")
    assert "; in two parts around an all-reduce, " in said
    assert "without communication" in rmsnorm.explain(spread(x, mesh, Shard(0)), spread(w, mesh, Replicate()))
    torch._dynamo.reset()


# In its own process, because the rules are registered once.
_OPERATORS_FIRST = """
import sys, torch, rmsnorm
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
rows = distribute_tensor(torch.ones(4, 8), mesh, [Shard(0)])
w = distribute_tensor(torch.ones(8), mesh, [Replicate()])
if sys.argv[2] == "forward":
    out = torch.ops.rmsnorm.forward(rows, None, w, 1e-6, "early", 0.0, True)
else:
    rstd = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    out = torch.ops.rmsnorm.backward(rows, None, rows, w, rstd, "early", 0.0, True, True)
assert out[0].placements == (Shard(0),)
"""


@pytest.mark.parametrize("operator", ["forward", "backward"])
def test_an_operator_called_before_rms_norm_has_its_dtensor_rule(operator: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", _OPERATORS_FIRST, f"{tmp_path}/store", operator]
    ended = subprocess.run(arguments, text=True, capture_output=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr


# --- models --------------------------------------------------------------------------------------------------

N, HIDDEN = 64, 96


class Block(nn.Module):
    """A model without any code for ranks: a norm of each kind between linear layers. Records the inputs of the norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = rmsnorm.DeepseekV2RMSNorm(N)
        self.up = nn.Linear(N, HIDDEN, bias=False)
        self.middle = rmsnorm.RMSNorm(HIDDEN, cast="late")
        self.down = nn.Linear(HIDDEN, N, bias=False)
        self.final = rmsnorm.RMSNorm(N, eps=1e-5, cast="late", offset=1.0)
        for one in (self.norm, self.middle, self.final):
            nn.init.normal_(one.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.final(x + self.down(self.middle(self.up(self.norm(x)))))


def by_columns(norm: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """For a norm between a column-wise and a row-wise linear layer."""

    def shard(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            sharded = spread(parameter, mesh, Shard(0))
            module.register_parameter(key, nn.Parameter(sharded.detach()))

    return distribute_module(norm, mesh, shard)


def in_parallel(model: nn.Module, mesh: DeviceMesh, *, uneven: bool = False) -> nn.Module:
    """Sequence parallel around tensor parallel, the norm in the middle sharded by columns."""
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=not uneven),
        "final": SequenceParallel(),
    }
    by_columns(model.get_submodule("middle"), mesh)
    return parallelize_module(model, mesh, plan)


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, m) for name, m in model.named_modules() if name.split(".")[-1] in ("norm", "middle", "final"))


@contextlib.contextmanager
def checked_norms(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Asserts that every norm that runs inside gives the bits of a single process. dtype: that of the weights."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
            seen[name] = args[0], y

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in norms(model)]
    yield
    for handle in handles:
        handle.remove()
    assert len(seen) == 3
    for name, module in norms(model):
        x, y = seen[name]
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        spec = {"eps": eps, "cast": getattr(module, "cast", "early"), "offset": getattr(module, "offset", 0.0)}
        w = whole(module.weight).to(dtype or module.weight.dtype)
        assert_same_bits(whole(y), rmsnorm.rms_norm(whole(x), w, **spec), name)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace("module.", ""): whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compares relative to each tensor's largest number, which bounds the error of a sum in another order."""
    assert got.keys() == expected.keys()
    for name, b in expected.items():
        off = (got[name].double() - b.double()).abs().max() / b.double().abs().max()
        assert off <= OTHER_ORDER, f"{name} is off by {off}"


def loss(y: Tensor, target: Tensor) -> Tensor:
    return (y.to_local() if isinstance(y, DTensor) else y).float().sub(target).square().sum()


@on(2, 4)
def sequence_and_tensor_parallel(mesh: DeviceMesh) -> None:
    """Norms add no communication but one all-reduce for the norm that is sharded by columns."""
    world, (x, target) = mesh.size(), (randn(3, 8, N, seed=s) for s in (1, 2))
    plain = Block()
    loss(plain(x), target).backward()
    expected = gradients(plain)
    for call in (lambda model: model, lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")):
        model = in_parallel(Block(), mesh)
        own_x, own_target = (t.chunk(world, 1)[mesh.get_local_rank()] for t in (x, target))
        if call(model) is model:
            with checked_norms(model), communicating(all_gather_into_tensor=1, all_reduce=1, reduce_scatter_tensor=1):
                y = model(own_x)
            with communicating(all_gather_into_tensor=1, all_reduce=1, reduce_scatter_tensor=1):
                loss(y, own_target).backward()
        else:
            y = call(model)(own_x)
            loss(y, own_target).backward()
        assert y.placements == (Shard(1),)
        placements = {name: getattr(model, name).weight.grad.placements for name, _ in norms(model)}
        assert placements == {"norm": (Partial(),), "middle": (Shard(0),), "final": (Partial(),)}
        close({"y": whole(y)} | gradients(model), {"y": plain(x).detach()} | expected)
    torch._dynamo.reset()


@on(4)
def uneven_sequence(mesh: DeviceMesh) -> None:
    """Seven tokens over four ranks, as a DTensor."""
    x = randn(3, 7, N, seed=1)
    plain, model = Block(), in_parallel(Block(), mesh, uneven=True)
    plain(x).square().sum().backward()
    with checked_norms(model):
        y = model(spread(x, mesh, Shard(1)))
    assert y.placements == (Shard(1),)
    y.square().sum().backward()
    close(gradients(model), gradients(plain))


@on(2)
def clipping_with_partial_gradients(mesh: DeviceMesh) -> None:
    x = randn(3, 8, N, seed=1)
    plain, model = Block(), in_parallel(Block(), mesh)
    plain(x).square().sum().backward()
    model(x.chunk(2, 1)[mesh.get_local_rank()]).square().sum().backward()
    assert model.norm.weight.grad.placements == (Partial(),)
    norms = {"norm": whole(clip_grad_norm_(model.parameters(), 0.5))}
    close(norms | gradients(model), {"norm": clip_grad_norm_(plain.parameters(), 0.5)} | gradients(plain))


def mean_gradients(model: nn.Module, xs: list[Tensor]) -> dict[str, Tensor]:
    """The gradients that ranks with these batches agree on: the mean over the batches."""
    for x in xs:
        (model(x).float().square().sum() / len(xs)).backward()
    return gradients(model)


@on(2, 4)
def fully_sharded(mesh: DeviceMesh) -> None:
    """FSDP2, the norms in their parent's unit and in their own, with and without mixed precision and offload."""
    xs = [randn(3, 8, N, seed=s) for s in range(mesh.size())]
    x = xs[mesh.get_local_rank()]
    expected = mean_gradients(Block(), xs)
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=False)
    for own in (False, True):
        for options in ({}, {"mp_policy": mixed}, {"offload_policy": offload}):
            model = Block()
            if own:
                for _, module in norms(model):
                    fully_shard(module, mesh=mesh, **options)
            fully_shard(model, mesh=mesh, **options)
            dtype = torch.bfloat16 if "mp_policy" in options else torch.float32
            with checked_norms(model, dtype):
                y = model(x)
            assert y.dtype == dtype
            y.float().square().sum().backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad.placements == (Shard(0),), name
                assert parameter.grad.dtype == torch.float32
            if dtype == torch.float32:
                close(gradients(model), expected)
            else:  # each rank's gradient, then the mean over ranks in fp32
                close(gradients(model), mixed_gradients(xs))


@on(2)
def recomputing_where_parameters_are_sharded_or_replicated(mesh: DeviceMesh) -> None:
    """Outputs and gradients keep their bits. With FSDP2, outputs whose weight is gathered later than their use are kept."""
    rank = mesh.get_local_rank()
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def build(recompute: bool) -> tuple[nn.Module, Any]:
        model = nn.Sequential(Block(), Block(), nn.Linear(N, N))
        return model, rmsnorm.patch(model, recompute=recompute)

    def by_fsdp(*units: str, **options: Any) -> Callable[[nn.Module], nn.Module]:
        def shard(model: nn.Module) -> nn.Module:
            for unit in units:
                fully_shard(model.get_submodule(unit), mesh=mesh, **options)
            return fully_shard(model, mesh=mesh, **options)

        return shard

    every_norm = [f"{block}.{norm}" for block in (0, 1) for norm in ("norm", "middle", "final")]
    freed = "the norm's weight was freed before the output was saved, as FSDP does if the norm is a unit of its own"
    for spread_out, kept in (
        (nn.parallel.DistributedDataParallel, {}),
        (by_fsdp(), {}),
        (by_fsdp("0", "1"), {freed: 2}),  # what leaves a block
        (by_fsdp("0", "1", mp_policy=mixed), {freed: 2}),
        (by_fsdp(*every_norm), {freed: 6}),
    ):
        found: list[dict[str, Tensor]] = []
        for recompute in (False, True):
            model, report = build(recompute)
            model = spread_out(model)
            for _ in range(2):
                y = model(randn(3, 8, N, seed=rank))
                y.float().square().sum().backward()
            found.append(gradients(model) | {"y": y.detach()})
        assert found[0].keys() == found[1].keys()
        for name, expected in found[0].items():
            assert_same_bits(found[1][name], expected, name)
        counts = report.recomputation
        if isinstance(model, FSDPModule):
            with pytest.raises(RuntimeError, match="the model is sharded by FSDP, which has changed its class"):
                rmsnorm.unpatch(model)
        dropped = 6 - sum(kept.values())
        assert (counts.outputs, counts.dropped, counts.recomputed, counts.kept) == (6, dropped, dropped, kept)


@on(2)
def recomputing_keeps_sharded_outputs(mesh: DeviceMesh) -> None:
    """DTensors are kept, and the gradients are those without."""
    x = randn(3, 8, N, seed=1).chunk(2, 1)[mesh.get_local_rank()]
    found = []
    for context in (contextlib.nullcontext, rmsnorm.recompute):
        model = in_parallel(Block(), mesh)
        with context() as counts:
            y = model(x)
        y.square().sum().backward()
        found.append(gradients(model))
    close(found[1], found[0])
    assert counts.dropped == 0
    assert counts.kept["it is not a plain contiguous tensor"] == 3


@on(2)
def fully_sharded_and_compiled(mesh: DeviceMesh) -> None:
    """FSDP2 of a patched model whose layers, or the whole of it, are compiled: the bits of eager FSDP2."""
    x = randn(3, 8, N, seed=mesh.get_local_rank())

    def trained(compile_layers: bool, compile_whole: bool) -> dict[str, Tensor]:
        torch._dynamo.reset()
        model = nn.Sequential(strange_block(), strange_block())
        for layer in model:
            layer.middle = rmsnorm.RMSNorm(HIDDEN, cast="late")
        assert len(rmsnorm.patch(model).replaced) == 4
        for layer in model:
            if compile_layers:
                layer.compile(backend="inductor", fullgraph=True)
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        y = (torch.compile(model, backend="aot_eager") if compile_whole else model)(x)
        y.square().sum().backward()
        return gradients(model) | {"y": y.detach()}

    eager = trained(False, False)
    for compiled in (trained(True, False), trained(False, True)):
        assert compiled.keys() == eager.keys()
        for name, t in eager.items():
            assert_same_bits(compiled[name], t, name)


def mixed_gradients(xs: list[Tensor]) -> dict[str, Tensor]:
    """The fp32 mean of the gradients of a bf16 model for each batch."""
    total: dict[str, Tensor] = {}
    for x in xs:
        model = Block().bfloat16()
        model(x.bfloat16()).float().square().sum().backward()
        for name, g in gradients(model).items():
            total[name] = total.get(name, 0) + g.float() / len(xs)
    return total


@on(4)
def data_and_tensor_parallel_together(mesh: DeviceMesh) -> None:
    """FSDP2 over one mesh dimension, tensor and sequence parallel over the other; with clipping, for two steps."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    xs = [randn(3, 8, N, seed=s) for s in range(2)]
    own = xs[mesh.get_local_rank("dp")].chunk(2, 1)[mesh.get_local_rank("tp")]
    plain, model = Block(), in_parallel(Block(), mesh["tp"])
    for module in (model.norm, model):
        fully_shard(module, mesh=mesh["dp"])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, foreach=False) for m in (plain, model)]
    for _ in range(2):
        with checked_norms(model):
            y = model(own)
        y.square().sum().backward()
        expected = mean_gradients(plain, xs)
        close(gradients(model), expected)
        close(
            {"norm": whole(clip_grad_norm_(model.parameters(), 1.0))},
            {"norm": clip_grad_norm_(plain.parameters(), 1.0)},
        )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        close(weights(model), weights(plain))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in model.named_parameters()}


@on(4)
def a_checkpoint_loads_into_other_shardings(mesh: DeviceMesh) -> None:
    """A checkpoint of a 2 × 2 model is loaded into a model that FSDP shards over four ranks, and into a plain one."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = in_parallel(Block(), square["tp"])
    fully_shard(model, mesh=square["dp"])
    x = randn(3, 8, N, seed=1)
    y = model(x.chunk(2, 1)[square.get_local_rank("tp")]).full_tensor()
    dcp.save({"model": model.state_dict()}, checkpoint_id="checkpoint")
    other, plain = Block(), Block()
    for parameter in [*other.parameters(), *plain.parameters()]:
        nn.init.zeros_(parameter)
    fully_shard(other, mesh=mesh)
    for loaded in (other, plain):
        state = {"model": loaded.state_dict()}
        dcp.load(state, checkpoint_id="checkpoint")
        loaded.load_state_dict(state["model"])
        for name, w in weights(model).items():
            assert_same_bits(weights(loaded)[name], w, name)
        with checked_norms(loaded):
            close({"y": whole(loaded(x))}, {"y": y})


@on(2, 4)
def a_checkpoint_of_a_patched_model_continues_its_training(mesh: DeviceMesh) -> None:
    """On the same mesh with the same bits; it is also loaded onto other meshes, and into models that are not patched.

    It is saved from shards on two ranks; on four ranks there are two replicas of them.
    """
    world = mesh.size()
    half = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")) if world == 4 else mesh
    x = randn(3, 8, N, seed=mesh.get_local_rank())

    def build(on_mesh: DeviceMesh | None, patched: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(strange_block())
        if patched:
            assert len(rmsnorm.patch(model, recompute=True).replaced) == 3
        if on_mesh is not None:
            for part in (*model, model):
                fully_shard(part, mesh=on_mesh)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moments = {
            f"{i} {key}": whole(t) for i, state in optimizer.state_dict()["state"].items() for key, t in state.items()
        }
        return weights(model) | moments

    model, optimizer = build(half)
    first = train(model, optimizer)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(parts, checkpoint_id="patched")
    second = train(model, optimizer)

    def load(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id="patched")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    for on_mesh, patched in ((half, True), (mesh, False), (None, True)):
        again, its_optimizer = build(on_mesh, patched)
        for parameter in again.parameters():
            nn.init.zeros_(parameter)
        load(again, its_optimizer)
        for name, w in weights(again).items():
            assert_same_bits(w, first[name], name)
        if patched and on_mesh is not None:
            continued = train(again, its_optimizer)
            assert continued.keys() == second.keys()
            for name, t in second.items():
                assert_same_bits(continued[name], t, name)


@on(2)
def data_parallel(mesh: DeviceMesh) -> None:
    xs = [randn(3, 8, N, seed=s) for s in range(2)]
    model = nn.parallel.DistributedDataParallel(Block())
    with checked_norms(model):
        y = model(xs[mesh.get_local_rank()])
    y.square().sum().backward()
    close(gradients(model), mean_gradients(Block(), xs))


class Choosing(nn.Module):
    """A patched model with a norm that runs only if it is chosen, and one that never runs."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.block, self.chosen, self.never = strange_block(), StrangersRMSNorm(N), StrangersRMSNorm(N)
        assert len(rmsnorm.patch(self, recompute=recompute).replaced) == 5

    def forward(self, x: Tensor, choose: bool) -> Tensor:
        y = self.block(x)
        return self.chosen(y) if choose else y


@on(2)
def data_parallel_with_a_static_graph_or_unused_parameters(mesh: DeviceMesh) -> None:
    """The gradients of a patched model are the mean of those of both batches alone, with the same bits."""
    xs = [randn(3, 8, N, seed=s) for s in range(2)]
    own = mesh.get_local_rank()
    plain = Choosing(recompute=False)
    for options, chosen, recompute in (
        ({"find_unused_parameters": True}, [True, False], False),
        ({"find_unused_parameters": True}, [True, True], True),
        ({"static_graph": True}, [True, True], False),
        ({"static_graph": True}, [True, True], True),
    ):
        model = nn.parallel.DistributedDataParallel(Choosing(recompute), **options)
        for _ in range(3):  # a static graph is used from the second step
            model.zero_grad()
            model(xs[own], chosen[own]).square().sum().backward()
        alone = []
        for x, choose in zip(xs, chosen, strict=True):
            plain.zero_grad()
            plain(x, choose).square().sum().backward()
            alone.append({name: p.grad for name, p in plain.named_parameters()})
        found = gradients(model)
        assert found.keys() == alone[0].keys() - {"never.weight"}
        for name, g in found.items():
            parts = [torch.zeros_like(g) if one[name] is None else one[name] for one in alone]
            assert_same_bits(g, (parts[0] + parts[1]) / 2, f"{name} {options} {chosen} {recompute}")


@on(2)
def activation_checkpointing_and_offloading(mesh: DeviceMesh) -> None:
    """Activation checkpointing and CPU offloading give the same bits for every gradient."""
    own = randn(3, 8, N, seed=1).chunk(2, 1)[mesh.get_local_rank()]

    def run(call: Callable[[nn.Module, Tensor], Tensor]) -> dict[str, Tensor]:
        model, x = in_parallel(Block(), mesh), own.clone().requires_grad_()
        with checked_norms(model):
            call(model, x).square().sum().backward()
        return gradients(model) | {"x": x.grad}

    def kept(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    once = run(lambda model, x: model(x))
    for call in (lambda model, x: checkpoint(model, x, use_reentrant=False), kept):
        again = run(call)
        for name, g in once.items():
            assert_same_bits(again[name], g, name)


class StrangersRMSNorm(nn.Module):
    """A published class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return reference.published(x, self.weight, self.eps, "early", 0.0)


def strange_block() -> nn.Module:
    """A model whose norms `patch` replaces."""
    model = Block()
    model.norm, model.middle, model.final = StrangersRMSNorm(N), StrangersRMSNorm(HIDDEN), StrangersRMSNorm(N)
    return model


@on(2)
def patched_before_sharding(mesh: DeviceMesh) -> None:
    """Patching before sharding works. After sharding nothing is replaced, and the message says what to do."""

    x = randn(3, 8, N, seed=1)
    model = strange_block()
    assert len(rmsnorm.patch(model).replaced) == 3
    in_parallel(model, mesh)
    with checked_norms(model):
        model(x.chunk(2, 1)[mesh.get_local_rank()])
    for own in (False, True):
        model = strange_block()
        rmsnorm.patch(model)
        if own:
            fully_shard(model.norm, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with checked_norms(model):
            model(x).sum().backward()
    for shard in (lambda model: in_parallel(model, mesh), lambda model: fully_shard(model, mesh=mesh)):
        model = strange_block()
        shard(model)
        norms = [model.norm, model.middle, model.final]
        with pytest.raises(RuntimeError, match=r"sharded weight \(a DTensor\); patch the model first, then"):
            rmsnorm.patch(model)
        assert norms == [model.norm, model.middle, model.final], "something was replaced"


# --- user errors and failures --------------------------------------------------------------------------------


@on(2)
def unsuitable_placements_raise(mesh: DeviceMesh) -> None:
    """Every rank raises an error that names the placements and the fix; afterwards the group still works."""
    other = init_device_mesh("cpu", (2, 1))
    x, residual, w, *_ = (t.detach() for t in drawn((4, 6, 32), torch.float32, torch.float32))
    rows, columns, every = (spread(x, mesh, p) for p in (Shard(1), Shard(2), Replicate()))
    w_every, w_columns = spread(w, mesh, Replicate()), spread(w, mesh, Shard(0))
    of_heads = spread(randn(6, 32), mesh, Shard(1))
    table: list[tuple[tuple[Any, ...], list[str]]] = [
        ((rows, w), ["weight is a plain tensor", "Shard(dim=1)", "distribute_tensor(weight", "parallelize_module"]),
        ((x, w_columns), ["x is a plain tensor", "Shard(dim=0)", "distribute_tensor(x", "fully_shard"]),
        ((every, w_columns), ["weight has placements (Shard(dim=0),)", "x has (Replicate(),)", "redistribute"]),
        ((rows, w_columns), ["weight has placements (Shard(dim=0),)", "x has (Shard(dim=1),)", "redistribute"]),
        ((rows, spread(w, other, Replicate(), Replicate())), ["weight is on the mesh", "the mesh of x", "on one mesh"]),
        ((rows, DTensor.from_local(w, mesh, [Partial()])), ["weight has placements (Partial(sum),)", "redistribute"]),
        ((rows, of_heads), ["weight has placements (Shard(dim=1),)", "Shard(dim=0) on mesh dimension 0", "same dimension"]),
        ((columns, rows, w_every), ["residual has placements (Shard(dim=1),)", "Shard(dim=2)", "residual.redistribute"]),
        ((rows, residual, w_every), ["residual is a plain tensor", "Shard(dim=1)", "distribute_tensor(residual"]),
    ]  # fmt: skip
    for arguments, words in table:
        call = rmsnorm.rms_norm if len(arguments) == 2 else rmsnorm.add_rms_norm
        with pytest.raises(ValueError, match=rf"^\[{call.__name__}\] ") as raised:
            call(*arguments)
        assert all(word in str(raised.value) for word in words), raised.value
    for call, arguments, named, argument in (
        (rmsnorm.rms_norm, (rows, w_every), {"variance_size": 16}, "variance_size"),
        (rmsnorm.explain, (rows, w_every), {"variance_size": 16}, "variance_size"),
        (rmsnorm.gated_rms_norm, (rows, rows, w_every), {}, "gate"),
        (rmsnorm.explain, (rows, w_every), {"gate": rows}, "gate"),
    ):
        words = rf"\[{call.__name__}\] {argument} is given with DTensors, expected plain tensors"
        with pytest.raises(NotImplementedError, match=words):
            call(*arguments, **named)
    sharded = fully_shard(Block(), mesh=mesh)
    with pytest.raises(ValueError, match="call the module"):
        sharded.norm(x.view(-1, 8, 96)[..., :N])
    same(rmsnorm.rms_norm(columns, w_columns), rmsnorm.rms_norm(x, w), "after", Shard(2))


def fault(case: Case) -> Case:
    FAULTS[case.__name__] = case
    return case


@fault
def a_rank_dies(mesh: DeviceMesh) -> None:
    x, w = spread(randn(4, 64), mesh, Shard(1)).requires_grad_(), spread(randn(64), mesh, Shard(0))
    y = rmsnorm.rms_norm(x, w)
    if mesh.get_local_rank() == 1:
        os._exit(3)
    y.backward(spread(randn(4, 64), mesh, Shard(1)))


@fault
def a_rank_hangs(mesh: DeviceMesh) -> None:
    x, w = spread(randn(4, 64), mesh, Shard(1)), spread(randn(64), mesh, Shard(0))
    if mesh.get_local_rank() == 1:
        time.sleep(600)
    rmsnorm.rms_norm(x, w)


@fault
def a_rank_dies_while_saving(mesh: DeviceMesh) -> None:
    model = fully_shard(Block(), mesh=mesh)
    if mesh.get_local_rank() == 1:
        torch.save = lambda *_, **__: os._exit(3)
    dcp.save({"model": model.state_dict()}, checkpoint_id="checkpoint")


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


def run_fault(rank: int, folder: Path, name: str) -> None:
    """Runs two ranks, in a group with a timeout of five seconds once both have joined."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    dist.barrier()
    mesh = DeviceMesh.from_group(dist.new_group(timeout=datetime.timedelta(seconds=5)), "cpu")
    os.chdir(folder)
    try:
        FAULTS[name](mesh)
    except BaseException as error:
        print(f"ended: {error}", flush=True)
        os._exit(1)


def start(rank: int, world: int, folder: Path, *names: str) -> "subprocess.Popen[str]":
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    # torch's cache of compiled code does not distinguish uneven shards of a DTensor, so each rank gets its own.
    variables["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled-{rank}"
    variables["PYTHONPATH"] = os.pathsep.join(sys.path)  # includes tests/, for tolerance.py
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
    """Runs a group and returns the output of each rank."""
    with tempfile.TemporaryDirectory() as folder:
        return finish([start(r, world, Path(folder), *CASES[world]) for r in range(world)], 240)


@pytest.mark.parametrize(("world", "name"), [(w, n) for w in CASES for n in CASES[w]])
def test_case_passes_on_every_rank(world: int, name: str) -> None:
    for rank, output in enumerate(group(world)):
        assert f"\npassed {name} " in "\n" + output, f"rank {rank}:\n{output}"


@pytest.mark.parametrize("name", FAULTS)
def test_an_error_on_one_rank_ends_the_other(name: str, tmp_path: Path) -> None:
    processes = [start(r, 2, tmp_path, name) for r in range(2)]
    try:
        output = finish(processes[:1], 60)[0]
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert "\nended: " in "\n" + output, output
    assert processes[0].returncode == 1
    if "saving" in name:
        assert (tmp_path / "checkpoint").exists()
        with pytest.raises(CheckpointException, match="metadata"):
            dcp.load({"model": Block().state_dict()}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)


if __name__ == "__main__" and sys.argv[4] in FAULTS:
    run_fault(int(sys.argv[1]), Path(sys.argv[3]), sys.argv[4])
elif __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
