"""Bits and times of sharded norms, on one rank."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import rmsnorm
from many.definitions import BY_FSDP, COLUMNS, PART, REDUCE, ROWS, WHOLE, Options
from many.sampling import sample_rounds
from rmsnorm import bits, reference
from rmsnorm.tools import timing
from rmsnorm.tools.processes import Rank
from rmsnorm.tools.verify import ranks
from rmsnorm.tools.verify.cases import VerifyCase
from rmsnorm.tools.verify.compare import CallOutputs, differing, eager, run_unsharded
from rmsnorm.tools.verify.inputs import Inputs, draw

# --- bits ----------------------------------------------------------------------------------------------------


def compare_bits(rank: Rank, options: Options) -> list[dict[str, Any]]:
    """Compare every case in every sharding with one GPU; return what was found, in types that `json.dumps` takes."""
    line = init_device_mesh(rank.device.type, (rank.world,))
    has_square = rank.world > 2 and rank.world % 2 == 0
    square = init_device_mesh(rank.device.type, (2, rank.world // 2)) if has_square else None
    found = []
    for seed, case in enumerate(options.bit_cases()):
        inputs = draw(case, seed).map(lambda t, _: t.to(rank.device))
        inputs = dataclasses.replace(inputs, w=None if inputs.w is None else inputs.w.to(rank.device))
        whole = run_unsharded(inputs, case)
        for sharding, dims in ranks.SHARDINGS.items():
            mesh = square if len(dims) > 1 else line
            if mesh is not None:
                sharded = ranks.run_sharded(inputs, dataclasses.replace(case, sharding=sharding), mesh)
                dw = _error_of_dw(sharded, inputs, case) if "rows" not in dims else {"differing": sharded.misplaced}
                found.append(_compared(case, sharding, rank, sharded, whole, dw))
        if case.residual is None:
            found.append(_compare_fsdp(case, inputs, whole, line, rank))
    return found


def _compared(
    case: VerifyCase, sharding: str, rank: Rank, ours: CallOutputs, whole: CallOutputs, dw: dict[str, Any]
) -> dict[str, Any]:
    """Return what was found in a case, with the elements of all ranks added up."""
    pairs = list(ours.pairs(whole))
    counts = [sum(differing(a, b) for a, b in pairs), sum(b.numel() for _, b in pairs), dw.get("differing", 0)]
    total = torch.tensor(counts, device=rank.device)
    dist.all_reduce(total)
    if "differing" in dw:
        dw = dw | {"differing": int(total[2])}
    return {
        "sharding": sharding,
        "dtype": str(case.x).removeprefix("torch."),
        "cast": case.cast,
        "offset": case.offset,
        "residual": case.residual is not None,
        "rows": case.M,
        "width": case.N,
        "elements": int(total[1]),
        "differing": int(total[0]),
        "dw": dw,
    }


def _error_of_dw(ours: CallOutputs, inputs: Inputs, case: VerifyCase) -> dict[str, float]:
    """Return the L2 error of our dw and of the eager class's dw, relative to the dw of the unrounded formula."""
    assert ours.dw is not None
    assert inputs.w is not None
    rows = inputs.x if inputs.residual is None else inputs.x + inputs.residual
    truth = _gradient(reference.truth(rows.double(), w := _leaf(inputs.w.double()), case.eps, case.offset), w, inputs)
    eagers = _gradient(eager(rows, w := _leaf(inputs.w), case.eps, case.cast, case.offset), w, inputs)
    error, error_of_eager = (float((dw.double() - truth).norm() / truth.norm()) for dw in (ours.dw, eagers))
    return {"error": error, "error_of_eager": error_of_eager}


def _leaf(w: Tensor) -> Tensor:
    return w.detach().requires_grad_()


def _gradient(y: Tensor, w: Tensor, inputs: Inputs) -> Tensor:
    return torch.autograd.grad(y, w, inputs.dy.to(y.dtype))[0]


def _compare_fsdp(case: VerifyCase, inputs: Inputs, whole: CallOutputs, mesh: DeviceMesh, rank: Rank) -> dict[str, Any]:
    """Compare a layer that FSDP2 shards, given this rank's rows; its dw with the mean of the dw of all ranks' rows."""
    w = inputs.w
    assert w is not None
    layer = rmsnorm.RMSNorm(case.N, case.eps, cast=case.cast, offset=case.offset, device=rank.device, dtype=w.dtype)
    with torch.no_grad():
        layer.weight.copy_(w)
    fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    own = slice(*(case.M * index // rank.world for index in (rank.index, rank.index + 1)))
    x = inputs.x[own].detach().requires_grad_()
    y = layer(x)
    y.backward(inputs.dy[own])
    assert x.grad is not None
    of_rows = run_unsharded(inputs.map(lambda t, _: t[own]), case)
    assert of_rows.dw is not None
    mean = of_rows.dw.float()
    dist.all_reduce(mean)
    dw = layer.weight.grad.full_tensor()
    of_dw, ulp = bits.differing(dw, (mean / rank.world).to(dw.dtype))
    parts = CallOutputs(y.detach(), None, x.grad, None, None)
    of_whole = CallOutputs(whole.y[own], None, whole.dx[own], None, None)
    return _compared(case, BY_FSDP, rank, parts, of_whole, {"differing": of_dw, "ulp": ulp})


# --- times ---------------------------------------------------------------------------------------------------


def time_norms(rank: Rank, options: Options) -> list[dict[str, Any]]:
    """Time sharded norms, whole rows, and the least that rows in parts need: a kernel on a part, and the all-reduce."""
    mesh = init_device_mesh(rank.device.type, (rank.world,))
    found = []
    for M, N in options.timed_shapes():
        generator = torch.Generator(rank.device).manual_seed(0)

        def draw_bf16(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator, device=rank.device).bfloat16()

        x, w, dy = draw_bf16(M, N), draw_bf16(N), draw_bf16(M, N)
        part = N // rank.world
        sums = torch.zeros(M, dtype=torch.float64, device=rank.device)

        def spread(t: Tensor, placement: Any) -> Tensor:
            return distribute_tensor(t, mesh, [placement], src_data_rank=None)

        tensors = {
            WHOLE: (x, w, dy),
            ROWS: (spread(x, Shard(0)), spread(w, Replicate()), spread(dy, Shard(0))),
            COLUMNS: (spread(x, Shard(1)), spread(w, Shard(0)), spread(dy, Shard(1))),
            PART: tuple(t[..., :part].contiguous() for t in (x, w, dy)),
        }
        for direction, call_of in (("forward", _forward), ("backward", _backward)):
            calls = {name: call_of(*given) for name, given in tensors.items()}
            calls[REDUCE] = lambda sums=sums: dist.all_reduce(sums)
            taken = sample_rounds(calls, rank, options.repetitions)
            times = {name: timing.summarize(samples).to_json() for name, samples in taken.items()}
            found.append({"rows": M, "width": N, "direction": direction, "times": times})
    return found


def _forward(x: Tensor, w: Tensor, dy: Tensor) -> Callable[[], object]:
    def call() -> None:
        with torch.no_grad():
            rmsnorm.rms_norm(x, w)

    return call


def _backward(x: Tensor, w: Tensor, dy: Tensor) -> Callable[[], object]:
    x, w = (t.detach().requires_grad_() for t in (x, w))
    y = rmsnorm.rms_norm(x, w)
    return lambda: torch.autograd.grad(y, [x, w], dy, retain_graph=True)
