"""The GPU kernels of gated norms without a GPU: their PTX, the plans, and the claims on which their arithmetic rests."""

import itertools
import math
import re
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rmsnorm import gated_reference as reference
from rmsnorm.kernels.gpu import driver, gated_planner, tiling
from rmsnorm.kernels.gpu.driver import Slot, TritonLaunch
from rmsnorm.kernels.gpu.tiling import Gpu
from rmsnorm.kernels.plan import GatedBackward, GatedForward, Plan, TensorKind
from rmsnorm.spec import Gate, Spec, gated_dtype
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

WIDTHS = sorted(
    {
        N
        for table in (tiling._GATED_FORWARD, tiling._GATE_LAST_BACKWARD, tiling._GATE_FIRST_BACKWARD)
        for tiles in table.values()
        for N in tiles
    }
)
FORMS = tuple(itertools.product(("early", "late"), ("silu", "sigmoid"), (False, True)))


@pytest.fixture(autouse=True)
def fresh() -> None:
    gated_planner.plan_gated_forward.cache_clear()
    gated_planner.plan_gated_backward.cache_clear()


def plans(
    N: int,
    x: torch.dtype = BF16,
    gate: torch.dtype | None = None,
    w: torch.dtype | None = BF16,
    form: int = 0,
    *,
    M: int = 1 << 15,
    groups: int = 1,
    needs: tuple[bool, bool, bool] = (True, True, True),
    capability: int = 9,
) -> tuple[Plan, Plan]:
    """The plans of both passes for M rows of groups of width N."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated_planner, "gpu_at", lambda device: Gpu(SHARED_MEMORY[capability], capability=capability))
        cast, activation, first = FORMS[form]
        spec, shape = Spec(1e-6, cast, gate=Gate(activation, first), groups=groups), (M, groups, N)
        x_, gate_ = TensorKind.dense(shape, x), TensorKind.dense(shape, gate or x)
        w_ = None if w is None else TensorKind.dense((groups * N,), w)
        dy, rstd = TensorKind.dense(shape, gated_dtype(x, w, spec)), TensorKind.dense(shape[:-1], FP32)
        return (
            gated_planner.plan_gated_forward(GatedForward(CPU, x_, gate_, w_, spec, True)),
            gated_planner.plan_gated_backward(GatedBackward(CPU, dy, x_, gate_, w_, rstd, spec, *needs)),
        )


def launches(*arguments: Any, **named: Any) -> list[TritonLaunch]:
    return [launch for plan in plans(*arguments, **named) for launch in plan.launches]


def held_to(launch: TritonLaunch, capability: int, folder: Path, aligned: bool) -> None:
    """Checks one kernel's PTX against all requirements; the only approximation is what `_reciprocal` starts from."""
    name, code = compile_launch(launch, capability)
    ptx, where = code.asm["ptx"].replace("rcp.approx.ftz.f64", ""), f"{name} {launch.arguments} sm_{capability}"
    for forbidden in ("fma.rn.f32", ".approx", ".ftz", "div.full"):
        assert forbidden not in ptx, f"{where}: {forbidden}"
    assert code.metadata.shared <= SHARED_MEMORY[capability // 10], where
    assert spilled(code.asm["ptx"], capability, folder) <= FEW_BYTES, f"{where}: spills"
    given = values(launch)
    elements = given.get("ROWS", 1) * given["BLOCK_N"] // (32 * launch.warps)  # of a thread
    if aligned and "gated" in name and elements * given["x"].dtype.itemsize >= 16:
        assert re.search(r"ld\.global[\w.:]*\.(v4\.b32|v2\.b64)|cp\.async\.cg\S* .*, 0x10,", ptx), f"{where}: loads"
        if name != "gated_dw_alone":  # which stores one row of sums
            assert re.search(r"st\.global[\w.:]*\.(v4\.b32|v2\.b64)", ptx), f"{where}: stores"


KINDS = {
    "bf16": ((128, *WIDTHS, 16384), BF16, BF16, BF16, 0),
    "bf16, gate first": ((128, *tiling._GATE_FIRST_BACKWARD[2]), BF16, BF16, BF16, 5),
    "fp32, gate first": ((32, 128, 4096), FP32, FP32, FP32, 5),
    "fp16, sigmoid, fp32 gate": ((512, 1024), FP16, FP32, FP16, 6),
}
FEW_BYTES = 32  # of spills are accepted: some tiles that spill are faster than those that do not


@pytest.mark.parametrize("kind", KINDS)
def test_ptx_of_every_width_meets_the_requirements(kind: str, tmp_path: Path) -> None:
    widths, *others = KINDS[kind]
    for N in widths:
        for launch in launches(N, *others):
            held_to(launch, 90, tmp_path, aligned=True)


@pytest.mark.parametrize("capability", [80, 100])
def test_ptx_for_other_gpus_meets_the_requirements(capability: int, tmp_path: Path) -> None:
    for N, groups in ((128, 1), (1024, 4)):
        for launch in launches(N, groups=groups, capability=capability // 10):
            held_to(launch, capability, tmp_path, aligned=True)


@pytest.mark.parametrize(
    "named",
    [
        {"N": 1021}, {"N": 512, "groups": 8}, {"N": 512, "w": None}, {"N": 512, "w": FP32, "form": 1},
        {"N": 512, "needs": (False, False, True)}, {"N": 512, "needs": (True, False, True)}, {"N": 128, "M": 2**31 + 16},
        {"N": 512, "M": 64}, {"N": 512, "x": FP32, "gate": FP16, "w": FP32},
        {"N": 8191, "x": FP32, "w": FP32, "form": 5},
    ],
    ids=str,
)  # fmt: skip
def test_ptx_of_every_kind_of_input_meets_the_requirements(named: dict[str, Any], tmp_path: Path) -> None:
    for launch in launches(**named):
        held_to(launch, 90, tmp_path, aligned=named["N"] % 16 == 0)


def test_the_constants_of_the_exponential_are_those_of_the_reference() -> None:
    """Triton would round plain numbers to fp32."""
    forward, _ = plans(512, FP32, w=FP32)
    ptx = compile_launch(forward.launches[0], 90)[1].asm["ptx"]
    for constant in (reference.INVERSE_LN2, -reference.LN2_HIGH, -reference.LN2_LOW, *reference.EXP_COEFFICIENTS):
        bits = torch.tensor(constant, dtype=torch.float64).view(torch.int64).item() & (2**64 - 1)
        assert f"0d{bits:016X}" in ptx, constant


def test_a_table_is_computed_once_for_many_gates_of_16_bits_and_read_after_a_wait() -> None:
    for x, gate, M, tabulated in (
        (BF16, BF16, 1 << 15, True), (FP32, FP16, 1 << 15, True), (BF16, FP32, 1 << 15, False), (BF16, BF16, 64, False),
    ):  # fmt: skip
        for needs in itertools.product((True, False), repeat=3):
            for plan in plans(512, x, gate, M=M, needs=needs):
                names = [launch.kernel.__name__ for launch in plan.launches]
                if not names:  # nothing is needed
                    continue
                assert names.count("tabulate") == tabulated
                if not tabulated:
                    continue
                first, second = plan.launches[:2]
                assert first.kernel.__name__ == "tabulate"
                assert (first.early, second.early) == (False, True)
                ptx = compile_launch(second, 90)[1].asm["ptx"]
                waits, table = ptx.index("griddepcontrol.wait"), re.search(r"ld\.global\.b(32|64) %\w+, ", ptx)
                assert table is not None
                assert waits < table.start()
                assert "griddepcontrol.launch_dependents" in compile_launch(first, 90)[1].asm["ptx"]


def test_a_table_holds_slopes_only_if_the_gradient_of_the_gate_is_needed() -> None:
    for needs, entry in (((True, True, True), torch.int64), ((True, False, True), FP32)):
        forward, backward = plans(512, needs=needs)
        dtypes = [next(t.dtype for t in plan.fresh if t.name == "table") for plan in (forward, backward)]
        assert dtypes == [FP32, entry]


def test_every_kernel_argument_gets_the_tensor_of_its_name() -> None:
    """Fresh tensors also have the shapes that their names imply, and each partial sum has its columns of dw."""
    seen = set()
    for N, groups, needs in itertools.product(
        (7, 128, 1024, 16384), (1, 3), itertools.product((True, False), repeat=3)
    ):
        for plan in plans(N, M=64, groups=groups, needs=needs):
            whole = (64, groups, N)
            sizes = {"y": whole, "dx": whole, "dgate": whole, "rstd": (64, groups), "dw": (groups * N,)}
            fresh = {t.name: t.shape for t in plan.fresh}
            assert all(shape == sizes[name] for name, shape in fresh.items() if name in sizes)
            assert set(filter(None, plan.outputs)) <= set(fresh)
            written = set()
            for launch in plan.launches:
                seen.add(launch.kernel.__name__)
                for name, value in values(launch).items():
                    if isinstance(value, Slot):
                        assert value.tensor == name
                        written.add(name)
                if "partials" in fresh and "programs" in values(launch):
                    assert fresh["partials"] == (values(launch)["programs"], groups * N)
            assert set(fresh) <= written
    assert seen == {
        "gated_forward_block", "gated_forward_loop", "gated_backward_block", "gated_backward_loop", "gated_dw_alone",
        "sum_partials",
    }  # fmt: skip


def test_each_partial_sum_of_dw_is_over_at_most_the_longest_sum() -> None:
    for N, groups, dtype in itertools.product((8, 128, 1024, 4096, 16384), (1, 8, 1000), (BF16, FP32)):
        for M, needs in itertools.product((1, 1000, 10**6), ((True, True, True), (False, False, True))):
            _, backward = plans(N, dtype, w=dtype, M=M, groups=groups, needs=needs)
            sums = [v for v in map(values, backward.launches) if v.get("partials") and "ROWS" in v and "dw" not in v]
            assert len(sums) == 1
            tiles = -(-M // sums[0]["ROWS"])
            assert -(-tiles // sums[0]["programs"]) <= tiling.LONGEST_SUM[dtype.itemsize]


def test_grids_are_within_the_limits_of_a_gpu() -> None:
    for M, N, groups in ((2**31 + 16, 1, 1), (2**26, 128, 8), (512, 2**17, 4), (4, 1, 2**20)):
        for dtype, needs in itertools.product((BF16, FP32), ((True, True, True), (False, False, True))):
            for launch in launches(N, dtype, M=M, groups=groups, needs=needs):
                assert 0 < launch.grid[0] < 2**31, (M, N, launch.kernel.__name__)


def test_every_kernel_can_be_launched_through_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_library", lambda: SimpleNamespace(cuLaunchKernelEx=None))
    seen = set()
    for N, groups in ((512, 4), (16384, 1)):
        for launch in launches(N, groups=groups):
            compile_without_gpu(launch, monkeypatch)
            assert not isinstance(launch.native(), str), (N, launch.kernel.__name__)
            seen.add(launch.kernel.__name__)
    assert {"tabulate", "gated_forward_loop", "gated_backward_block", "gated_dw_alone"} <= seen


# --- the claims of gated_kernels.py --------------------------------------------------------------------------


def fp32_neighbours(value: float) -> list[float]:
    """The fp32 numbers around a value."""
    nearest = torch.tensor(value, dtype=FP32)
    towards = (nearest, torch.tensor(math.inf), torch.tensor(-math.inf))
    return [t.item() for t in (nearest, nearest.nextafter(towards[1]), nearest.nextafter(towards[2]))]


def test_a_fused_multiply_add_rounds_the_exponent_to_the_same_integer() -> None:
    """`_sigmoid` fuses t · (1 / ln 2) + 1.5 · 2^52, the reference does not; they differ if the product rounds to a tie."""
    inverse = Fraction(reference.INVERSE_LN2)
    low, high = (round(limit * reference.INVERSE_LN2) for limit in (-60.0, 200.0))
    for k in range(low - 2, high + 2):
        tie = Fraction(2 * k + 1, 2)
        for t in fp32_neighbours(float(tie / inverse)):
            assert abs(Fraction(t) * inverse - tie) > Fraction(1, 2**40), t


def test_a_gate_whose_reciprocal_may_be_wrong_gives_the_same_results() -> None:
    """`_reciprocal` may be one unit off for d of only ones: 2^(k+1) - 2^(k-52). Only gates near 0 have such a d."""
    for k in range(1, 290):
        wanted = math.log(2.0**k * (2 - 2.0**-52) - 1)
        assert all(abs(t - wanted) > 2.0**-46 * wanted for t in fp32_neighbours(wanted)), k
    ones = torch.tensor(2 - 2.0**-52, dtype=torch.float64)
    for g in (0.0, 2.0**-53, 2.0**-52, 1.5 * 2.0**-52):  # where 1 + exp(-g) is just below 2
        t = torch.tensor(g, dtype=torch.float64)
        right, off = 1 / ones, torch.nextafter(1 / ones, torch.tensor(0.0, dtype=torch.float64))
        for result in (lambda s: s, lambda s: t * s, lambda s: s + (t * s) * (1 - s), lambda s: s * (1 - s)):
            assert result(right).float() == result(off).float(), g


def test_the_reciprocal_is_correctly_rounded() -> None:
    """Recomputes `_reciprocal` in exact arithmetic, from every approximation with an error of up to 2^-20."""
    rounded = lambda value: Fraction(float(value))  # noqa: E731  # Python rounds a Fraction correctly
    draw = torch.Generator().manual_seed(0)
    numbers = torch.rand(300, generator=draw, dtype=torch.float64) + 1
    exponents = torch.randint(0, 289, (300,), generator=draw)
    for d in [1.0, 2.0, 1 + 2.0**-52, 2 - 2.0**-51, *(numbers * 2.0 ** exponents.double()).tolist()]:
        exact, D = 1 / Fraction(d), Fraction(d)
        for error in (0, 1, -1, Fraction(1, 3), Fraction(-5, 7)):
            y = rounded(exact * (1 + error * Fraction(1, 2**20)))
            e = rounded(1 - D * y)
            y = rounded(y + y * rounded(e + e * e))
            y = rounded(y + y * rounded(1 - D * y))
            assert y == rounded(exact), (d, error)
