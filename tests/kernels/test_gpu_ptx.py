"""The GPU kernels without a GPU: compiles every specialization for three GPU generations and checks its PTX."""

import contextlib
import functools
import itertools
import os
import random
import re
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed, so the GPU kernels cannot be compiled")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set, so there is nothing to compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from planned import Kernels  # noqa: E402
from rmsnorm import compat  # noqa: E402
from rmsnorm.kernels.gpu import driver, kernels, staged, tiling  # noqa: E402
from rmsnorm.kernels.gpu import planner as gpu  # noqa: E402
from rmsnorm.kernels.gpu.driver import Slot, TritonLaunch  # noqa: E402
from rmsnorm.kernels.gpu.tiling import Gpu  # noqa: E402
from rmsnorm.kernels.plan import Backward, Forward, Plan, TensorKind, both, sandwich  # noqa: E402
from rmsnorm.kernels.run import run  # noqa: E402
from rmsnorm.spec import Spec, result_dtype  # noqa: E402

pytestmark = pytest.mark.gpu_code

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CAPABILITIES = (80, 90, 100)
# Bytes of shared memory that a program may use; for 8.x and 12.x those of the smallest GPU (8.6, 8.9, 12.0).
SHARED_MEMORY = {8: 99 << 10, 9: 227 << 10, 10: 227 << 10}
# The widest rows of every tile in tiling.py, some widths in between, and some wider than all tiles.
_TABLES = (
    tiling._FORWARD,
    tiling._BACKWARD,
    tiling._FORWARD_STAGED,
    tiling._BACKWARD_STAGED,
    tiling._FORWARD_PIECES,
    tiling._BACKWARD_PIECES,
)
_WIDEST = {N for table in _TABLES for tiles in table.values() for N in tiles}
WIDTHS = sorted(_WIDEST | {2**k for k in range(9)} | {2880, 6144, 7168, 32768, 300000})


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Clears the plan caches, so that no plan carries over between tests."""
    forget = [plans.cache_clear for plans in (gpu.plan_forward, gpu.plan_backward)]
    for clear in forget:
        clear()
    yield
    for clear in forget:
        clear()


CPU = torch.device("cpu")  # the planner then assumes a default GPU


def plans(
    shape: tuple[int, ...],
    x: torch.dtype,
    w: torch.dtype | None,
    cast: str,
    offset: float,
    residual: bool,
    frozen: str = "",
    capability: int = 9,
    heads: int = 1,
    V: int | None = None,
) -> tuple[Plan, Plan]:
    """The plans of a forward and a backward pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "gpu_at", lambda device: Gpu(SHARED_MEMORY[capability], capability=capability))
        gpu.plan_forward.cache_clear()
        gpu.plan_backward.cache_clear()
        spec, x_ = Spec(1e-6, cast, offset, variance_size=V), TensorKind.dense(shape, x)
        w_ = None if w is None else TensorKind.dense(shape[-1:] if heads == 1 else (heads, shape[-1]), w)
        forward = gpu.plan_forward(Forward(CPU, x_, x_ if residual else None, w_, spec, True))
        y = next(t for t in forward.fresh if t.name == "y")
        dy, rstd = TensorKind.dense(shape, y.dtype), TensorKind.dense(shape[:-1], FP32)
        needs = frozen != "x", frozen != "w" and w is not None
        return forward, gpu.plan_backward(Backward(CPU, dy, x_ if residual else None, x_, w_, rstd, spec, *needs))


def plan_of_sum(
    N: int, x: torch.dtype, count: int, *, adds: bool = True, frozen: str = "", capability: int = 9, M: int = 8192
) -> Plan:
    """The plan of a backward pass that adds gradients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "gpu_at", lambda device: Gpu(SHARED_MEMORY[capability], capability=capability))
        gpu.plan_backward.cache_clear()
        rows, w, rstd = (TensorKind.dense(shape, t) for shape, t in (((M, N), x), ((N,), x), ((M,), FP32)))
        kind = Backward(CPU, rows, rows if adds else None, rows, w, rstd, Spec(), frozen != "x", frozen != "w")
        dy2, dy3 = (rows if i < count else None for i in (1, 2))
        return gpu.plan_backward(kind._replace(dy2=dy2, dy3=dy3, round_first=True))


def launches(M: int, N: int, *args: Any, **named: Any) -> list[TritonLaunch]:
    """The launches of the plans."""
    return [launch for plan in plans((M, N), *args, **named) for launch in plan.launches]


def values(launch: TritonLaunch) -> dict[str, Any]:
    """The arguments of a launch by name."""
    return dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))


def specialised(kernel: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The types, constants and divisibility hints that Triton would derive from these arguments."""
    constants: dict[tuple[int, ...], Any] = {}
    divisible: list[tuple[int, ...]] = []

    def type_of(path: tuple[int, ...], value: Any, fixed: bool) -> Any:
        if isinstance(value, Slot):
            divisible.append(path)  # torch aligns its allocations
            name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
            name |= {torch.float64: "fp64"}
            return "*" + name[value.dtype]
        if isinstance(value, tuple):
            return tuple(type_of((*path, i), item, fixed) for i, item in enumerate(value))
        if isinstance(value, float):
            return "fp32"
        if value is None or isinstance(value, bool) or (value == 1 and not fixed):
            constants[path] = value
            return "constexpr"
        if value % 16 == 0 and not fixed:
            divisible.append(path)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = {}
    for i, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            constants[(i,)] = arguments[i]
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = type_of((i,), arguments[i], parameter.do_not_specialize)
    return signature, tuple(constants.items()), tuple(divisible)


@functools.cache
def compiled(kernel: Any, signature: Any, constants: Any, divisible: Any, warps: int, capability: int) -> Any:
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(kernel, dict(signature), dict(constants), {path: [["tt.divisibility", 16]] for path in divisible})
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )


def compile_launch(launch: TritonLaunch, capability: int) -> tuple[str, Any]:
    """The name of the kernel and its compiled code."""
    signature, constants, divisible = specialised(launch.kernel, launch.arguments)
    code = compiled(launch.kernel, tuple(signature.items()), constants, divisible, launch.warps, capability)
    return launch.kernel.__name__, code


def compile_without_gpu(launch: TritonLaunch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the launch find its kernel compiled for sm_90, as if Triton had loaded it into a GPU."""
    code = compile_launch(launch, 90)[1]
    found = SimpleNamespace(src=code.src, metadata=code.metadata, asm={"ptx": code.asm["ptx"]}, function=1, run=None)
    monkeypatch.setattr(type(launch.kernel), "warmup", lambda *_, **options: found)


def spilled(ptx: str, capability: int, folder: Path) -> int:
    """The bytes that ptxas spills to local memory: stores and loads."""
    (folder / "kernel.ptx").write_text(ptx)
    architecture = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    command = [get_ptxas(capability).path, "-v", "--fmad=false", f"--gpu-name={architecture}", "kernel.ptx"]
    log = subprocess.run([*command, "-o", os.devnull], cwd=folder, capture_output=True, text=True, check=True).stderr
    counts = re.findall(r"(\d+) bytes spill", log)
    assert counts, log
    return sum(map(int, counts))


CASES = {
    "bf16": (BF16, BF16, "early", 0.0, False),
    "bf16, residual": (BF16, BF16, "early", 0.0, True),
    "fp32, residual, late, offset": (FP32, FP32, "late", 1.0, True),
}
# Further options of a launch at one width; each leads to another specialization.
OTHERS: dict[str, dict[str, Any]] = {
    "fp16": {"x": FP16, "w": FP16},
    "fp32 weight": {"w": FP32},
    "fp32 weight, late": {"w": FP32, "cast": "late"},
    "bf16 weight of fp32": {"x": FP32},
    "no weight": {"w": None},
    "no weight, first": {"w": None, "cast": "first"},
    "no weight, first, wide": {"w": None, "cast": "first", "N": 32768},
    "frozen weight": {"frozen": "w"},
    "frozen input": {"frozen": "x"},
    "odd width": {"N": 1279},
    "odd width, wide": {"N": 32771, "residual": True},
    "odd width, wider": {"N": 200001, "residual": True},
    "no residual, wide": {"N": 32768},
    "64-bit rows": {"M": 2**31 + 16},
    "first columns": {"V": 1024},
    "first columns, residual": {"V": 1000, "residual": True},
    "first columns, odd width": {"N": 1279, "V": 640},
    "first columns, wide": {"N": 32768, "V": 16384},
    "heads": {"heads": 32, "N": 128},
    "heads, narrow": {"heads": 4, "N": 64, "x": FP16, "w": FP32, "cast": "late", "offset": 1.0},
    "heads, residual": {"heads": 8, "residual": True},
    "heads, odd width": {"heads": 3, "N": 1279},
    "heads, wide": {"heads": 8, "N": 32768, "residual": True},
    "heads, frozen input": {"heads": 16, "frozen": "x"},
    "one row": {"M": 1},
}


def held_to(launch: TritonLaunch, capability: int, folder: Path, *, aligned: bool = True) -> None:
    """Checks one kernel's PTX against all requirements."""
    name, code = compile_launch(launch, capability)
    ptx, where = code.asm["ptx"], f"{name} {launch.arguments} sm_{capability}"
    for forbidden in ("fma.rn.f32", ".approx", ".ftz", "div.full"):
        assert forbidden not in ptx, f"{where}: {forbidden}"
    assert code.metadata.shared <= SHARED_MEMORY[capability // 10], (
        f"{where}: {code.metadata.shared} bytes of shared memory"
    )
    assert spilled(ptx, capability, folder) == 0, f"{where}: spills"
    given = values(launch)
    if aligned and name != "no_shares_yet":  # which loads nothing
        # How many numbers of a piece a thread holds. Some narrow tiles of 16-bit dtypes load and store 8 bytes at a
        # time; they were measured to be the fastest.
        each = given["ROWS"] * given["BLOCK_N"] // (32 * launch.warps) if "ROWS" in given else 8
        halves = r"|v2\.b32|b64" if "x" in given and 2 * each < 16 else ""
        # Pipelined loads go to shared memory, as cp.async of 0x10 bytes.
        loads = rf"ld\.global[\w.:]*\.(v4\.b32|v2\.b64{halves})|cp\.async\.c\S* .*, 0x({'8|' if halves else ''}10),"
        assert re.search(loads, ptx), f"{where}: narrow loads"
        if given["BLOCK_N"] >= 1024:  # otherwise a program has more threads than 16-byte pieces of w
            assert "ld.global.b16" not in ptx, f"{where}: loads of 2 bytes"
        if name != "sum_partials":  # the threads that sum its one output row each hold only part of it
            assert re.search(rf"st\.global[\w.:]*\.(v4\.b32|v2\.b64{halves})", ptx), f"{where}: narrow stores"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES)
def test_ptx_of_every_width_meets_the_requirements(case: str, capability: int, tmp_path: Path) -> None:
    for N in WIDTHS if capability == 90 else (1, 16, 512, 2048, 8192, 16384, 32768):
        for launch in launches(8192, N, *CASES[case], capability=capability // 10):
            held_to(launch, capability, tmp_path, aligned=N >= 16)


@pytest.mark.parametrize("name", OTHERS)
def test_ptx_of_every_kind_of_input_meets_the_requirements(name: str, tmp_path: Path) -> None:
    given = {"M": 8192, "N": 1280, "x": BF16, "w": BF16, "cast": "early", "offset": 0.0, "residual": False}
    given |= OTHERS[name]
    for launch in launches(**given):
        held_to(launch, 90, tmp_path, aligned=given["N"] % 16 == 0)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_ptx_of_a_sum_of_gradients_meets_the_requirements(dtype: torch.dtype, tmp_path: Path) -> None:
    for N, count in itertools.product((128, 1279, 2048, 4096, 7168, 16384, 32771), (1, 3)):
        for launch in plan_of_sum(N, dtype, count).launches:
            held_to(launch, 90, tmp_path, aligned=N % 16 == 0)
    for frozen in ("x", "w"):
        for launch in plan_of_sum(1024, dtype, 2, frozen=frozen).launches:
            held_to(launch, 90, tmp_path)


def pair_and_sandwich(N: int, x: torch.dtype, w: torch.dtype | None) -> list[TritonLaunch]:
    """The launches of two norms of 16 rows in one call, and of a norm, a sum and a norm of 8192 rows."""
    spec, weight = Spec(1e-6, "early", 0.0), None if w is None else TensorKind.dense((N,), w)
    few, rows = (TensorKind.dense((M, N), x) for M in (16, 8192))
    y = TensorKind.dense((8192, N), result_dtype(x, w, "early"))
    two = gpu.plan_forward(Forward(CPU, few, None, weight, spec, True))
    first = gpu.plan_forward(Forward(CPU, rows, None, weight, spec, True))
    second = gpu.plan_forward(Forward(CPU, y, y, weight, spec, True))
    plan = sandwich(first, second)
    assert plan is not None
    merged = gpu.merge_pair(both(two, two, (0, 2))), gpu.merge_sandwich(plan)
    found = [launch for plan in merged for launch in plan.launches]
    assert len(found) == 2
    return found


@pytest.mark.parametrize(("x", "w"), [(BF16, BF16), (BF16, None), (FP32, FP32)], ids=["bf16", "no weight", "fp32"])
def test_ptx_of_pairs_and_sandwiches_meets_the_requirements(
    x: torch.dtype, w: torch.dtype | None, tmp_path: Path
) -> None:
    for N in (128, 1152, 2304, 3584, 5376, 12288):  # Gemma's widths, and the widest
        for launch in pair_and_sandwich(N, x, w):
            held_to(launch, 90, tmp_path)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_bf16_sums_are_rounded_two_at_a_time_by_one_instruction(capability: int) -> None:
    for N in (1280, 4096, 16384):
        adding = [
            launch for launch in plan_of_sum(N, BF16, 3, capability=capability // 10).launches
            if "dy3" in (a.tensor for a in launch.arguments if isinstance(a, Slot))
        ]  # fmt: skip
        assert len(adding) == 1, N
        ptx = compile_launch(adding[0], capability)[1].asm["ptx"]
        assert ptx.count("fma.rn.bf16x2") >= 2
        assert "cvt.rn.bf16.f32" not in ptx


def test_gradients_are_added_inside_the_backward_kernel_except_for_wide_rows() -> None:
    """dw has the partial sums that it has without ds, so that its bits are those of separate operators."""
    for x, N, count, adds in itertools.product(
        (BF16, FP32), (1, 128, 1279, 1536, 3072, 8192, 16384), (1, 2, 3), (0, 1)
    ):
        plan = plan_of_sum(N, x, count, adds=bool(adds))
        names = [launch.kernel.__name__ for launch in plan.launches]
        wide = tiling.BACKWARD_WIDEST[x.itemsize] < N
        assert ("sum_gradients" in names) == (wide and count > 1)
        assert plan.before == plan.after == ()
        backward, alone = (
            next(launch for launch in p.launches if launch.kernel.__name__.startswith("backward"))
            for p in (plan, plan_of_sum(N, x, 1, adds=False))
        )
        for name in ("programs", "ROWS", "parts"):
            assert values(backward).get(name) == values(alone).get(name), (N, name)
        present = {a.tensor for a in backward.arguments if isinstance(a, Slot)}
        assert present >= (
            {"summed"} if wide and count > 1 else {"dy", "dy2", "dy3"} & {"dy", *("dy2", "dy3")[: count - 1]}
        )
        assert values(backward)["ROUND_FIRST"] == (bool(adds) and x is BF16)


def test_strided_rows_are_loaded_16_bytes_at_a_time(tmp_path: Path) -> None:
    x = TensorKind(BF16, (4, 128, 32, 512), (32 * 128 * 576, 576, 128 * 576, 1))
    w, rstd = TensorKind.dense((512,), BF16), TensorKind.dense(x.shape[:-1], FP32)
    asked = [
        *gpu.plan_forward(Forward(CPU, x, x, w, Spec(), True)).launches,
        *gpu.plan_backward(Backward(CPU, x, x, x, w, rstd, Spec(), True, True)).launches,
        *gpu.plan_backward(Backward(CPU, x, None, x, w, rstd, Spec(), False, True)).launches,
    ]
    assert [values(launch).get("STRIDED") for launch in asked] == [True, True, None, True, None]
    for launch in asked:
        held_to(launch, 90, tmp_path)


def launch_of_x(plan: Plan) -> TritonLaunch:
    """The launch of a plan that reads x and writes y or dx."""
    return next(launch for launch in plan.launches if launch.kernel.__name__ in ("forward_block", "backward_block"))


@pytest.mark.parametrize(
    ("N", "dtype"), [*((N, BF16) for N in (72, 97, 200, 1000, 1001, 3073)), (76, FP32), (97, FP32)], ids=str
)
def test_rows_of_any_width_are_loaded_and_stored_in_whole_words(N: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Also if 16 does not divide N. Single numbers are stored only at the ends of rows that are not whole words."""
    word = 16 // dtype.itemsize
    for plan in plans((8192, N), dtype, dtype, "early", 0.0, False):
        launch = launch_of_x(plan)
        held_to(launch, 90, tmp_path, aligned=N % word == 0)
        ptx, given = compile_launch(launch, 90)[1].asm["ptx"], values(launch)
        # Numbers of each piece for a thread, which a few narrow tiles load half a word at a time.
        each = given["ROWS"] * given["BLOCK_N"] // (32 * launch.warps)
        wide = given["PIECES"] * each // min(each, word)
        assert len(re.findall(r"st\.global\S*\.(?:v4\.b32|v2\.b64|v2\.b32|b64)\s", ptx)) >= wide
        loads = r"ld\.global\S*\.(?:v4\.b32|v2\.b64|v2\.b32|b64)\s|cp\.async\.c\S* .*, 0x(?:8|10),"
        assert len(re.findall(loads, ptx)) >= wide
        assert (given["WORD"], given["MULTIPLE"]) == ((1, word) if N % word == 0 else (word, 1))
        single = len(re.findall(rf"st\.global\.b{8 * dtype.itemsize}", ptx))
        if dtype is BF16:
            assert single <= (0 if N % word == 0 else each), "numbers are stored alone inside a row"
            assert N % word or "ld.global.b16" not in ptx


def test_only_contiguous_aligned_rows_are_read_in_words_across_their_ends() -> None:
    """Reading other rows so would leave the tensor. How dw is summed does not depend on where rows are."""
    N, w = 97, TensorKind.dense((97,), BF16)
    dense = TensorKind.dense((64, N), BF16)
    of_dw = set()
    for x, word in (
        (dense, 8),
        (dense._replace(alignment=2), 1),
        (dense._replace(strides=(N + 7, 1)), 1),
        (dense._replace(strides=(0, 1)), 1),
        (TensorKind(BF16, (8, 8, N), (16 * N, N, 1)), 1),
    ):
        rows = x._replace(alignment=16, strides=(8 * N, N, 1)) if len(x.shape) == 3 else dense
        forward = gpu.plan_forward(Forward(CPU, x, None, w, Spec(), True)).launches[0]
        r = TensorKind.dense(x.shape[:-1], FP32)
        backward = gpu.plan_backward(Backward(CPU, rows, None, x, w, r, Spec(), True, True)).launches[0]
        for launch in (forward, backward):
            assert values(launch)["WORD"] == word, x
            assert values(launch)["PIECES"] * values(launch)["BLOCK_N"] >= (N if word == 1 else N - N % word)
        of_dw.add(tuple(values(backward)[name] for name in ("programs", "ROWS", "APART")))
    assert len(of_dw) == 1


def test_strides_that_16_does_not_divide_are_known_to_be_multiples_of_a_word(tmp_path: Path) -> None:
    x = TensorKind(BF16, (64, 512), (520, 1))
    w = TensorKind.dense((512,), BF16)
    launch = gpu.plan_forward(Forward(CPU, x, None, w, Spec(), True)).launches[0]
    assert values(launch)["MULTIPLE"] == 8
    held_to(launch, 90, tmp_path)
    assert "ld.global.b16" not in compile_launch(launch, 90)[1].asm["ptx"]


def instructions(launch: TritonLaunch) -> str:
    """A kernel's PTX without the rounding suffixes that all instructions of a kind have."""
    ptx: str = compile_launch(launch, 90)[1].asm["ptx"]
    for kind in ("mul.f32", "sub.f32", "add.f64", "div.f64", "fma.f64"):
        operation, dtype = kind.split(".")
        ptx = ptx.replace(f"{operation}.rn.{dtype}", kind)
    return ptx


def test_rounding_is_ieee_and_subnormals_are_kept() -> None:
    """The PTX contains these correctly rounded instructions; if one were missing, the arithmetic would be different."""
    forward, backward, _ = launches(8192, 1280, BF16, BF16, "early", 0.0, False)
    for launch, needed in (
        (forward, ("sqrt.rn.f32", "div.rn.f32", "div.f64", "cvt.rn.f32.f64", "fma.f64", "add.f64")),
        (backward, ("sub.f32", "div.f64", "fma.f64", "cvt.rn.f32.f64", "cvt.f64.f32")),
    ):
        ptx = instructions(launch)
        for instruction in needed:
            assert instruction in ptx, instruction


def test_bf16_is_rounded_two_numbers_at_a_time() -> None:
    """Rounding one number at a time runs at 1/16 of the usual rate, which would slow down the backward pass."""
    for N in (512, 1280, 4096, 32768):
        for launch in launches(8192, N, BF16, BF16, "early", 0.0, False):
            if launch.kernel.__name__ in ("no_shares_yet", "sum_partials"):
                continue
            ptx = instructions(launch)
            assert "cvt.rn.bf16x2.f32" in ptx
            assert "cvt.rz" not in ptx
            assert "cvt.rn.bf16.f32" not in ptx


def test_the_mean_in_a_loop_is_a_correctly_rounded_quotient() -> None:
    """Recomputes `mean_of` in exact arithmetic: 1 / N, and a remainder that corrects the quotient."""
    draw = random.Random(0)
    for _ in range(20000):
        N = draw.choice((draw.randint(1, 1024), draw.randint(1, 2**20), 2 ** draw.randint(0, 20) + 1))
        S = draw.choice((-1, 1)) * draw.uniform(1, 2) * 2.0 ** draw.randint(-300, 300)
        inverse = 1.0 / N
        q = S * inverse
        remainder = Fraction(S) - Fraction(q) * N
        assert float(remainder) == remainder, "the remainder is not exact"
        assert float(remainder * Fraction(inverse) + Fraction(q)) == S / N, (S, N)


def test_every_launch_forbids_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options that this file compiles with are those that launches use."""
    options: dict[str, list[dict[str, Any]]] = {"compiled": [], "launched": []}

    class Kernel:
        def __init__(self, name: str, kernel: Any) -> None:
            self.__name__, self.arg_names = name, kernel.arg_names

        def warmup(self, *arguments: Any, grid: tuple[int, ...], **flags: Any) -> None:
            options["compiled"].append(flags)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **flags: options["launched"].append(flags)

    for module in (kernels, staged):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction):
                monkeypatch.setattr(module, name, Kernel(name, value))
    for N in (1280, 32768):
        x, w = torch.randn(4, N), torch.randn(N)
        rstd = Kernels(gpu).forward(x, x, w, 1e-6, "early", 0.0, True)[2]
        assert rstd is not None
        Kernels(gpu).backward(x, x, x, w, rstd, "early", 0.0, True, True)
        Kernels(gpu).backward(x, x, x, w, rstd, "early", 0.0, False, True)
    for made in options.values():
        assert len(made) == 12
        assert all(flags["enable_fp_fusion"] is False for flags in made)


def test_without_gluon_wide_rows_use_the_kernels_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gluon is experimental in Triton; only the kernels that are written in it may become unavailable."""

    def kernels_of_a_wide_row() -> set[str]:
        for plan in (gpu.plan_forward, gpu.plan_backward):
            plan.cache_clear()
        found = launches(64, 32768, BF16, BF16, "early", 0.0, False, "")
        return {launch.kernel.__name__ for launch in found}

    assert kernels_of_a_wide_row() >= {"forward_staged", "backward_staged"}
    monkeypatch.setattr(gpu, "staged", None)
    assert kernels_of_a_wide_row() == {"no_shares_yet", "forward_block", "backward_block", "sum_partials"}
    monkeypatch.undo()
    kernels_of_a_wide_row()


def test_grids_are_within_the_limits_of_a_gpu() -> None:
    """At most 2**31 - 1 programs along the first axis and 65535 along the others, for any number of rows."""
    for M, N in ((2**31 + 16, 1), (2**28 + 5, 1), (2**27, 128), (2**24, 1280), (512, 2**20)):
        for dtype, frozen in itertools.product((BF16, FP32), ("", "x", "w")):
            for launch in launches(M, N, dtype, dtype, "early", 0.0, False, frozen):
                first, *others = launch.grid
                assert 0 < first < 2**31, (M, N, launch.kernel.__name__)
                assert all(size < 2**16 for size in others), (M, N, launch.kernel.__name__)


def test_a_call_runs_on_the_gpu_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocations and launches go to the current GPU, so a call makes the GPU of its tensors current meanwhile."""
    current, entered = [1], []

    @contextlib.contextmanager
    def device(number: int) -> Iterator[None]:
        entered.append(number)
        current.append(number)
        yield
        current.pop()

    ran_on: list[int] = []
    monkeypatch.setattr(compat, "current_gpu", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    launch = SimpleNamespace(run=lambda tensors: ran_on.append(current[-1]))
    x = torch.randn(6, 1280)
    plan = Plan(torch.device("cuda", 0), inputs=("x",), fresh=(), launches=(launch, launch), outputs=("x",))
    assert run(plan, (x,)) == [x]
    assert (entered, ran_on, current) == ([0], [0, 0], [1])
    current[0] = 0
    run(plan, (x,))
    assert (entered, ran_on) == ([0], [0, 0, 0, 0])
    compiled_on: list[int] = []
    kernel = SimpleNamespace(warmup=lambda *arguments, **options: compiled_on.append(current[-1]))
    assert TritonLaunch(kernel, (1,), 4, (), False, True, 3).native() == "Triton launches it"
    assert compiled_on == [3]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_kernel_that_starts_early_waits_before_it_reads_results(capability: int) -> None:
    """It waits once, before it stores or reads the first share; the previous kernel lets it start, once."""
    early = set()
    for N, residual in itertools.product((1280, 16384, 16401, 32768, 600000), (False, True)):
        for plan in plans((4096, N), BF16, BF16, "early", 0.0, residual, capability=capability // 10):
            codes = [compile_launch(launch, capability)[1].asm["ptx"] for launch in plan.launches]
            for i, (launch, ptx) in enumerate(zip(plan.launches, codes, strict=True)):
                waits = [match.start() for match in re.finditer(r"griddepcontrol\.wait", ptx)]
                if not launch.early:
                    assert not waits, (N, launch.kernel.__name__)
                    continue
                early.add(launch.kernel.__name__)
                assert len(waits) == 1, (N, launch.kernel.__name__)
                needed = r"ld\.global" if launch.kernel is kernels.sum_partials else r"atom\.|ld\.volatile"
                first = re.search(needed, ptx)
                assert first is not None
                assert waits[0] < first.start(), (N, launch.kernel.__name__)
                assert codes[i - 1].count("griddepcontrol.launch_dependents") == 1, (N, launch.kernel.__name__)
    shared = {"forward_block", "forward_staged", "backward_block", "backward_staged"}
    assert early == (shared | {"sum_partials"} if capability >= 90 else set())


@pytest.mark.parametrize("residual", [False, True], ids=["no residual", "residual"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_every_kernel_can_be_launched_through_the_driver(
    dtype: torch.dtype, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prepared arguments match the PTX; otherwise Triton's slower launcher would run unnoticed."""
    monkeypatch.setattr(driver, "_library", lambda: SimpleNamespace(cuLaunchKernelEx=None))
    seen = set()
    for N in (7, 512, 1280, 16384, 16401, 32768, 600000):
        sums = plan_of_sum(N, dtype, 3, adds=residual).launches if N in (512, 16384) else ()
        for launch in (*launches(4096, N, dtype, dtype, "early", 0.0, residual), *sums):
            compile_without_gpu(launch, monkeypatch)
            native = launch.native()
            assert not isinstance(native, str), (N, launch.kernel.__name__)
            tensors = [a.tensor for a in launch.arguments if isinstance(a, Slot)]
            assert native.arguments[: len(tensors)] == tuple(tensors)
            seen.add(launch.kernel.__name__)
    assert seen >= {"forward_block", "forward_staged", "forward_loop", "backward_staged", "dw_alone", "sum_gradients"}


def test_a_compiled_kernel_is_launched_through_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind is compiled once and gets its arguments in order; Triton launches what the driver cannot."""
    compiled_with: list[tuple[Any, ...]] = []
    prepared: list[tuple[Any, ...]] = []
    launched: list[tuple[int, list[int]]] = []
    by_triton: list[tuple[Any, ...]] = []
    refuses = False

    class Kernel:
        def __init__(self, name: str, kernel: Any) -> None:
            self.__name__, self.arg_names = name, kernel.arg_names

        def warmup(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> Any:
            assert len(arguments) == len(self.arg_names)
            compiled_with.append((self.__name__, grid, list(arguments), options["launch_pdl"]))
            return SimpleNamespace(name=self.__name__, run=None)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: by_triton.append((self.__name__, grid, arguments))

    def ready(found: Any, grid: Any, arguments: Any, early: bool) -> Any:
        prepared.append((found.name, grid, arguments, early))

        def launch(stream: int, addresses: list[int]) -> bool:
            launched.append((stream, addresses))
            return not refuses

        return launch

    for module in (kernels, staged):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction):
                monkeypatch.setattr(module, name, Kernel(name, value))
    monkeypatch.setattr(driver, "ready", ready)
    monkeypatch.setattr(compat, "raw_stream", lambda device: 7)

    ours = Kernels(gpu)
    x, w = torch.randn(6, 1280), torch.randn(1280)
    rstd = torch.rand(6)
    for _ in range(2):
        y = ours.forward(x, None, w, 1e-6, "early", 0.0, False)[0]
        assert launched[-1] == (7, [x.data_ptr(), w.data_ptr(), y.data_ptr()])  # no addresses for absent tensors
        ours.backward(x, None, x, w, rstd, "early", 0.0, True, True)
    assert (len(compiled_with), len(launched)) == (3, 6)
    assert compiled_with == prepared
    assert compiled_with[0][2][:6] == [FP32, None, FP32, FP32, None, None]  # dtypes instead of tensors
    refuses = True
    y = ours.forward(x, None, w, 1e-6, "early", 0.0, False)[0]
    (name, grid, arguments), *others = by_triton  # Triton's own launcher reports errors
    assert others == []
    assert (name, grid) == compiled_with[0][:2]
    assert [a is b for a, b in zip(arguments, (x, None, w, y, None, None), strict=False)] == [True] * 6
    assert list(arguments[6:]) == compiled_with[0][2][6:]
    refuses = False
    by_triton.clear()

    shifted = torch.randn(6 * 1280 + 1)[1:].view(6, 1280)  # an address that is not a multiple of 16
    ours.forward(shifted, None, w, 1e-6, "early", 0.0, False)
    assert (len(compiled_with), len(by_triton)) == (3, 1)
    for changed in (
        lambda: ours.forward(x, None, w, 1e-6, "late", 0.0, False),
        lambda: ours.forward(x, None, w, 1e-6, "early", 0.0, True),
        lambda: ours.forward(x, None, w, 1e-5, "early", 0.0, False),
        lambda: ours.forward(x, None, w.half(), 1e-6, "early", 0.0, False),
        lambda: ours.forward(x, x, w, 1e-6, "early", 0.0, False),
        lambda: ours.forward(x[:5], None, w, 1e-6, "early", 0.0, False),
        lambda: ours.forward(x.expand(2, 6, 1280), None, w, 1e-6, "early", 0.0, False),
    ):
        before = len(compiled_with)
        changed()
        assert len(compiled_with) == before + 1


def test_every_kernel_argument_gets_the_tensor_of_its_name() -> None:
    """Fresh tensors also have the shapes that their names imply."""
    seen = set()
    for N, adds, of_w, frozen in itertools.product(
        (7, 1280, 16384, 16401, 32768, 600000), (False, True), (FP32, None), ("", "w", "x")
    ):
        if of_w is None and frozen == "x":
            continue
        for plan in plans((64, N), BF16, of_w, "late", 0.0, adds, frozen):
            sizes = {"y": (64, N), "s": (64, N), "dx": (64, N), "rstd": (64,), "dw": (N,)}
            fresh = {t.name: t.shape for t in plan.fresh}
            assert all(shape == sizes[name] for name, shape in fresh.items() if name in sizes)
            assert set(filter(None, plan.outputs)) <= set(fresh)
            absent = {name for name in ("residual", "ds") if not adds} | ({"w"} if of_w is None else set())
            known = {*plan.inputs, *fresh} - absent
            written = set()
            for launch in plan.launches:
                seen.add(launch.kernel.__name__)
                for name, value in values(launch).items():
                    if isinstance(value, Slot):
                        assert value.tensor == name
                        assert name in known
                        written.add(name)
                    else:
                        assert value is not None or name not in known - {"dw"} or (name, frozen) in {
                            ("partials", ""), ("rstd", ""), ("ds", "x")
                        }, (launch.kernel.__name__, name)  # fmt: skip
            assert set(fresh) <= written
    assert seen == {
        "forward_block", "forward_staged", "forward_loop", "backward_block", "backward_staged", "backward_loop",
        "dw_alone", "sum_partials", "no_shares_yet",
    }  # fmt: skip


def test_a_kernel_that_another_thread_compiles_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `triton.AsyncCompileMode`, Triton returns a future instead of a kernel."""
    compiled, seen = SimpleNamespace(run=None), []
    kernel = SimpleNamespace(warmup=lambda *arguments, **options: SimpleNamespace(result=lambda: compiled))
    monkeypatch.setattr(driver, "ready", lambda found, *others: seen.append(found))
    assert TritonLaunch(kernel, (1,), 4, (), False, True, -1).ready is None
    assert seen == [compiled]
