"""The GPU kernels for rows in parts without a GPU: their PTX, their plans and their launches through the driver."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rmsnorm.kernels.gpu import driver, parts_planner, tiling
from rmsnorm.kernels.gpu.driver import Slot, TritonLaunch
from rmsnorm.kernels.gpu.tiling import Gpu
from rmsnorm.kernels.plan import BeginBackward, BeginForward, FinishBackward, FinishForward, Plan, TensorKind
from rmsnorm.spec import Spec, result_dtype
from test_gpu_ptx import (  # skips this file too if Triton is missing or in its interpreter
    BF16,
    CPU,
    FP16,
    FP32,
    SHARED_MEMORY,
    compile_launch,
    compile_without_gpu,
    spilled,
    values,
)  # fmt: skip

pytestmark = pytest.mark.gpu_code

FP64, EARLY = torch.float64, Spec()
WIDTHS = (64, 96, 768, 2048, 3584, 5120, 8192, 10240, 16384, 32768)
KERNELS = {"begin_forward", "finish_forward", "begin_backward", "finish_backward", "sum_partials"}


@pytest.fixture(autouse=True)
def fresh() -> None:
    for plan in (parts_planner.plan_begin_forward, parts_planner.plan_finish_forward):
        plan.cache_clear()
    for plan in (parts_planner.plan_begin_backward, parts_planner.plan_finish_backward):
        plan.cache_clear()


def plans(
    N: int,
    x: torch.dtype = BF16,
    w: torch.dtype | None = BF16,
    spec: Spec = EARLY,
    *,
    M: int = 8192,
    adds: bool = False,
    need_dw: bool = True,
    capability: int = 9,
) -> list[Plan]:
    """The plans of the four calls for M rows of parts of width N, of which whole rows have two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_planner, "gpu_at", lambda device: Gpu(SHARED_MEMORY[capability], capability=capability))
        rows, w_ = TensorKind.dense((M, N), x), None if w is None else TensorKind.dense((N,), w)
        dy = TensorKind.dense((M, N), result_dtype(x, w, spec.cast))
        rstd, S = TensorKind.dense((M,), FP32), TensorKind.dense((M,), FP64)
        other = rows if adds else None
        return [
            parts_planner.plan_begin_forward(BeginForward(CPU, rows, other)),
            parts_planner.plan_finish_forward(FinishForward(CPU, rows, w_, S, 2 * N, spec, True)),
            parts_planner.plan_begin_backward(BeginBackward(CPU, dy, rows, w_, rstd, spec)),
            parts_planner.plan_finish_backward(
                FinishBackward(CPU, dy, other, rows, w_, rstd, S, 2 * N, spec, need_dw and w is not None)
            ),
        ]


def launches(*arguments: Any, **named: Any) -> list[TritonLaunch]:
    return [launch for plan in plans(*arguments, **named) for launch in plan.launches]


def held_to(launch: TritonLaunch, capability: int, folder: Path, aligned: bool = True) -> None:
    """Checks one kernel's PTX against all requirements."""
    name, code = compile_launch(launch, capability)
    ptx, where = code.asm["ptx"], f"{name} {launch.arguments} sm_{capability}"
    for forbidden in ("fma.rn.f32", ".approx", ".ftz", "div.full"):
        assert forbidden not in ptx, f"{where}: {forbidden}"
    assert code.metadata.shared <= SHARED_MEMORY[capability // 10], where
    assert spilled(ptx, capability, folder) == 0, f"{where}: spills"
    if aligned:
        # To begin a backward pass, a thread loads at least half a word of each of two tensors at once.
        half = r"|v2\.b32|b64" if name == "begin_backward" else ""
        loads = rf"ld\.global[\w.:]*\.(v4\.b32|v2\.b64{half})\s|cp\.async\.cg\S* .*, 0x10,"
        assert re.search(loads, ptx), f"{where}: loads"
        if name in ("finish_forward", "finish_backward"):
            assert re.search(r"st\.global[\w.:]*\.(v4\.b32|v2\.b64)", ptx), f"{where}: stores"


@pytest.mark.parametrize("adds", [False, True], ids=["alone", "with a residual"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_ptx_of_every_width_meets_the_requirements(dtype: torch.dtype, adds: bool, tmp_path: Path) -> None:
    seen = set()
    for N in WIDTHS:
        for launch in launches(N, dtype, dtype, adds=adds):
            held_to(launch, 90, tmp_path)
            seen.add(launch.kernel.__name__)
    assert seen == KERNELS


OTHERS: dict[str, dict[str, Any]] = {
    "fp16": {"x": FP16, "w": FP16},
    "fp32 weight": {"w": FP32},
    "fp32 weight, late, offset": {"w": FP32, "spec": Spec(cast="late", offset=1.0)},
    "no weight, first": {"w": None, "spec": Spec(cast="first")},
    "frozen weight": {"need_dw": False},
    "odd width": {"N": 1279},
    "odd width, wide": {"N": 32771},
    "64-bit rows": {"M": 2**31 + 16},
    "one row": {"M": 1},
    "compute capability 8.0": {"capability": 8},
    "compute capability 10.0": {"capability": 10},
}


@pytest.mark.parametrize("name", OTHERS)
def test_ptx_of_every_kind_of_input_meets_the_requirements(name: str, tmp_path: Path) -> None:
    given = {"N": 1280} | OTHERS[name]
    for launch in launches(**given):
        held_to(launch, 10 * given.get("capability", 9), tmp_path, aligned=given["N"] % 16 == 0)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_every_kernel_can_be_launched_through_the_driver(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prepared arguments match the PTX; otherwise Triton's slower launcher would run unnoticed."""
    monkeypatch.setattr(driver, "_library", lambda: SimpleNamespace(cuLaunchKernelEx=None))
    seen = set()
    for N, adds in itertools.product((7, 1280, 32768), (False, True)):
        for launch in launches(N, dtype, dtype, adds=adds):
            compile_without_gpu(launch, monkeypatch)
            native = launch.native()
            assert not isinstance(native, str), (N, launch.kernel.__name__)
            tensors = [a.tensor for a in launch.arguments if isinstance(a, Slot)]
            assert native.arguments[: len(tensors)] == tuple(tensors)
            seen.add(launch.kernel.__name__)
    assert seen == KERNELS


def test_every_kernel_argument_gets_the_tensor_of_its_name() -> None:
    for N, adds, w in itertools.product((7, 1280, 16401, 600000), (False, True), (BF16, None)):
        for plan in plans(N, w=w, adds=adds, M=64):
            sizes = {"y": (64, N), "s": (64, N), "dx": (64, N), "rstd": (64,), "S": (64,), "dw": (N,)}
            fresh = {t.name: t.shape for t in plan.fresh}
            assert all(shape == sizes[name] for name, shape in fresh.items() if name in sizes)
            assert set(filter(None, plan.outputs)) <= set(fresh)
            written = set()
            for launch in plan.launches:
                for name, value in values(launch).items():
                    if isinstance(value, Slot):
                        assert value.tensor == name
                        assert name in {*plan.inputs, *fresh}
                        written.add(name)
            absent = {"residual", "ds"} if not adds else set()
            assert set(plan.inputs) - absent - ({"w"} if w is None else set()) <= written
            assert set(fresh) <= written


def test_grids_are_within_the_limits_of_a_gpu() -> None:
    for M, N in ((2**31 - 1, 1), (2**27, 128), (2**24, 1280), (512, 2**20)):
        for launch in launches(N, M=M):
            (programs,) = launch.grid
            assert 0 < programs < 2**31, (M, N, launch.kernel.__name__)


def test_wide_parts_are_split_where_no_sum_is_needed() -> None:
    begin, finish, begin_back, finish_back = (plan.launches[0] for plan in plans(1 << 20, M=4))
    for launch, width in ((begin, tiling.WIDTH_OF_WIDE), (begin_back, tiling.WIDTH_OF_WIDE // 2)):
        assert launch.grid == (4,)
        assert values(launch)["parts"] == (1 << 20) // width
    assert finish.grid == (4 * (1 << 20) // tiling.WIDTH_OF_WIDE,)
    assert finish_back.grid == (values(finish_back)["programs"] * (1 << 20) // tiling.WIDTH_OF_WIDE,)
