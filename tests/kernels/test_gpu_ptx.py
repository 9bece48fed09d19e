"""The GPU kernels without a GPU: every specialisation in use, compiled for three generations and held to its PTX."""

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

from rmsnorm.kernels import gpu, host  # noqa: E402
from rmsnorm.kernels import launch as configuration  # noqa: E402
from rmsnorm.kernels.launch import Gpu  # noqa: E402

CAPABILITIES = (80, 90, 100)
# Bytes of shared memory a program may have: of 8.x and 12.x as many as the smallest has (8.6, 8.9, 12.0).
SHARED_MEMORY = {8: 99 << 10, 9: 227 << 10, 10: 227 << 10}
# The widest rows of every tile that launch.py has, some between, and some that are wider than all.
_TABLES = (
    configuration._FORWARD,
    configuration._BACKWARD,
    configuration._FORWARD_STAGED,
    configuration._BACKWARD_STAGED,
)
_WIDEST = {N for table in _TABLES for tiles in table.values() for N in tiles}
WIDTHS = sorted(_WIDEST | {2**k for k in range(9)} | {2880, 6144, 7168, 32768, 300000})


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No launch that an earlier test made ready, and none that a later one would find."""
    forget = [calls.cache_clear for calls in (gpu._forward_call, gpu._backward_calls)]
    for clear in forget:
        clear()
    yield
    for clear in forget:
        clear()


def launches(
    M: int,
    N: int,
    x: torch.dtype,
    w: torch.dtype | None,
    cast: str,
    offset: float,
    residual: bool,
    frozen: str = "",
    capability: int = 9,
) -> list[tuple[Any, ...]]:
    """What `gpu._run` is asked to run for a forward and a backward pass; tensors without memory are enough."""
    asked: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_run", lambda *launch: asked.append(launch))
        patch.setattr(gpu, "_gpu", lambda device: Gpu(SHARED_MEMORY[capability], capability=capability))
        gpu._backward_calls.cache_clear()
        x_ = torch.empty(M, N, dtype=x, device="meta")
        w_ = None if w is None else torch.empty(N, dtype=w, device="meta")
        y, s, rstd = gpu.forward(x_, x_ if residual else None, w_, 1e-6, cast, offset, with_rstd=True)
        assert rstd is not None
        gpu.backward(y, s, x_, w_, rstd, cast, offset, frozen != "x", frozen != "w" and w is not None)
    return asked


def specialised(kernel: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The types, constants and divisibilities that Triton's launch would take from these arguments."""
    constants: dict[tuple[int, ...], Any] = {}
    divisible: list[tuple[int, ...]] = []

    def type_of(path: tuple[int, ...], value: Any, fixed: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(type_of((*path, i), item, fixed) for i, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            divisible.append(path)  # what torch allocates is aligned
            name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
            return "*" + name[value.dtype]
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


def compile_launch(launch: tuple[Any, ...], capability: int) -> tuple[str, Any]:
    """The name of the kernel and what it compiles to."""
    call, pointers = launch
    signature, constants, divisible = specialised(call.kernel, gpu._arguments(call, pointers))
    code = compiled(call.kernel, tuple(signature.items()), constants, divisible, call.config.warps, capability)
    return call.kernel.__name__, code


def spilled(ptx: str, capability: int, folder: Path) -> int:
    """Bytes that ptxas spills to local memory, stores and loads."""
    (folder / "kernel.ptx").write_text(ptx)
    architecture = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    command = [get_ptxas(capability).path, "-v", "--fmad=false", f"--gpu-name={architecture}", "kernel.ptx"]
    log = subprocess.run([*command, "-o", os.devnull], cwd=folder, capture_output=True, text=True, check=True).stderr
    counts = re.findall(r"(\d+) bytes spill", log)
    assert counts, log
    return sum(map(int, counts))


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "bf16": (BF16, BF16, "early", 0.0, False),
    "bf16, residual": (BF16, BF16, "early", 0.0, True),
    "fp32, residual, late, offset": (FP32, FP32, "late", 1.0, True),
}
# What a launch at one width may come with besides: each is another specialisation.
OTHERS: dict[str, dict[str, Any]] = {
    "fp16": {"x": FP16, "w": FP16},
    "fp32 weight": {"w": FP32},
    "fp32 weight, late": {"w": FP32, "cast": "late"},
    "bf16 weight of fp32": {"x": FP32},
    "no weight": {"w": None},
    "frozen weight": {"frozen": "w"},
    "frozen input": {"frozen": "x"},
    "odd width": {"N": 1279},
    "odd width, wide": {"N": 32771, "residual": True},
    "odd width, wider": {"N": 200001, "residual": True},
    "no residual, wide": {"N": 32768},
    "64-bit rows": {"M": 2**31 + 16},
    "one row": {"M": 1},
}


def held_to(launch: tuple[Any, ...], capability: int, folder: Path, *, aligned: bool = True) -> None:
    """One kernel's PTX against everything that is asked of it."""
    name, code = compile_launch(launch, capability)
    config = launch[0].config
    ptx, where = code.asm["ptx"], f"{name} {config} sm_{capability}"
    for forbidden in ("fma.rn.f32", ".approx", ".ftz", "div.full"):
        assert forbidden not in ptx, f"{where}: {forbidden}"
    assert code.metadata.shared <= SHARED_MEMORY[capability // 10], (
        f"{where}: {code.metadata.shared} bytes of shared memory"
    )
    assert spilled(ptx, capability, folder) == 0, f"{where}: spills"
    if aligned and name != "_no_shares_yet":  # which loads nothing
        # Loads that are pipelined go to shared memory: cp.async of 0x10 bytes.
        assert re.search(r"ld\.global[\w.:]*\.(v4\.b32|v2\.b64)|cp\.async\.cg\S* .*, 0x10,", ptx), (
            f"{where}: narrow loads"
        )
        if config.block_n >= 1024:  # below, a program has more threads than 16-byte pieces of w
            assert "ld.global.b16" not in ptx, f"{where}: loads of 2 bytes"
        if name != "_sum_partials":  # its one row of output is scattered over the threads that summed it
            assert re.search(r"st\.global[\w.:]*\.(v4\.b32|v2\.b64)", ptx), f"{where}: narrow stores"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES)
def test_every_width(case: str, capability: int, tmp_path: Path) -> None:
    for N in WIDTHS if capability == 90 else (1, 16, 512, 2048, 8192, 16384, 32768):
        for launch in launches(8192, N, *CASES[case], capability=capability // 10):
            held_to(launch, capability, tmp_path, aligned=N >= 16)


@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_of_input(name: str, tmp_path: Path) -> None:
    given = {"M": 8192, "N": 1280, "x": BF16, "w": BF16, "cast": "early", "offset": 0.0, "residual": False}
    given |= OTHERS[name]
    for launch in launches(**given):
        held_to(launch, 90, tmp_path, aligned=given["N"] % 16 == 0)


def test_strided_rows_load_16_bytes_too(tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_run", lambda *launch: asked.append(launch))
        x = torch.empty(4, 32, 128, 576, dtype=BF16, device="meta").transpose(1, 2)[..., :512]
        w, rstd = torch.empty(512, dtype=BF16, device="meta"), torch.empty(x.shape[:-1], device="meta")
        gpu.forward(x, x, w, 1e-6, "early", 0.0, with_rstd=True)
        gpu.backward(x, x, x, w, rstd, "early", 0.0, True, True)
        gpu.backward(x, None, x, w, rstd, "early", 0.0, False, True)
    assert [call.flags[1:2] for call, _ in asked] == [(True,), (True,), (), (True,), ()]
    for launch in asked:
        held_to(launch, 90, tmp_path)


def instructions(launch: tuple[Any, ...]) -> str:
    """Its PTX, with the rounding left out where every instruction of the kind has it."""
    ptx: str = compile_launch(launch, 90)[1].asm["ptx"]
    for kind in ("mul.f32", "sub.f32", "add.f64", "div.f64", "fma.f64"):
        operation, dtype = kind.split(".")
        ptx = ptx.replace(f"{operation}.rn.{dtype}", kind)
    return ptx


def test_rounding_is_ieee_and_subnormals_live() -> None:
    """The instructions that must be there: none of them could be missing without the arithmetic being another one."""
    forward, backward, _ = launches(8192, 1280, BF16, BF16, "early", 0.0, False)
    for launch, needed in (
        (forward, ("sqrt.rn.f32", "div.rn.f32", "div.f64", "cvt.rn.f32.f64", "fma.f64", "add.f64")),
        (backward, ("sub.f32", "div.f64", "fma.f64", "cvt.rn.f32.f64", "cvt.f64.f32")),
    ):
        ptx = instructions(launch)
        for instruction in needed:
            assert instruction in ptx, instruction


def test_bf16_is_rounded_two_numbers_at_a_time() -> None:
    """One at a time is an instruction of a sixteenth of the others' rate, which the backward pass would wait for."""
    for N in (512, 1280, 4096, 32768):
        for launch in launches(8192, N, BF16, BF16, "early", 0.0, False):
            if launch[0].kernel.__name__ in ("_no_shares_yet", "_sum_partials"):
                continue
            ptx = instructions(launch)
            assert "cvt.rn.bf16x2.f32" in ptx
            assert "cvt.rn.bf16.f32" not in ptx


def test_the_mean_in_a_loop_is_a_correctly_rounded_quotient() -> None:
    """The arithmetic of `_mean`, in exact numbers: 1 / N once, and a remainder that mends the quotient."""
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
    """What this file compiles with must be what is launched with."""
    options: list[dict[str, Any]] = []

    class Kernel:
        def __init__(self, name: str, kernel: Any) -> None:
            self.__name__, self.arg_names = name, kernel.arg_names

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **flags: options.append(flags)

    kernels = [name for name, value in vars(gpu).items() if isinstance(value, triton.JITFunction)]
    for name in kernels:
        monkeypatch.setattr(gpu, name, Kernel(name, getattr(gpu, name)))
    for N in (1280, 32768):
        x, w = torch.randn(4, N), torch.randn(N)
        rstd = gpu.forward(x, x, w, 1e-6, "early", 0.0, with_rstd=True)[2]
        assert rstd is not None
        gpu.backward(x, x, x, w, rstd, "early", 0.0, True, True)
        gpu.backward(x, x, x, w, rstd, "early", 0.0, False, True)
    assert len(options) == 12
    assert all(flags["enable_fp_fusion"] is False for flags in options)


def test_grids_are_such_as_a_gpu_takes() -> None:
    """2**31 - 1 programs along the first axis, 65535 along the others, however many rows there are."""
    for M, N in ((2**31 + 16, 1), (2**28 + 5, 1), (2**27, 128), (2**24, 1280), (512, 2**20)):
        for dtype, frozen in itertools.product((BF16, FP32), ("", "x", "w")):
            for call, _ in launches(M, N, dtype, dtype, "early", 0.0, False, frozen):
                first, *others = call.grid
                assert 0 < first < 2**31, (M, N, call.kernel.__name__)
                assert all(size < 2**16 for size in others), (M, N, call.kernel.__name__)


def test_tensors_of_another_gpu_are_worked_on_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated and launched is on the current GPU, so theirs becomes that first, and only for the call."""
    current, entered = [1], []

    @contextlib.contextmanager
    def device(number: int) -> Iterator[None]:
        entered.append(number)
        current.append(number)
        yield
        current.pop()

    ran_on: list[int] = []
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1], raising=False)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0)
    monkeypatch.setattr(gpu, "_gpu", lambda device: Gpu(capability=8))
    monkeypatch.setattr(gpu, "_run", lambda call, pointers: ran_on.append(current[-1]))
    x, w = torch.randn(6, 1280), torch.randn(1280)
    gpu.forward(x, None, w, 1e-6, "early", 0.0, False)
    gpu.backward(x, None, x, w, torch.rand(6), "early", 0.0, True, True)
    assert (entered, ran_on, current) == ([0, 0], [0, 0, 0], [1])
    current[0] = 0
    gpu.forward(x, None, w, 1e-6, "early", 0.0, False)
    assert (entered, ran_on) == ([0, 0], [0, 0, 0, 0])
    assert not gpu._elsewhere(-1)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_starts_early_waits_before_it_needs_what_it_waits_for(capability: int) -> None:
    """Once, before the first share is handed in or read; and what it starts beside lets it start, once."""
    early = set()
    for N, residual in itertools.product((1280, 16384, 16401, 32768, 600000), (False, True)):
        calls = {}
        for call, pointers in launches(4096, N, BF16, BF16, "early", 0.0, residual, capability=capability // 10):
            calls[id(call)] = call, compile_launch((call, pointers), capability)[1].asm["ptx"]
        for call, ptx in calls.values():
            waits = [match.start() for match in re.finditer(r"griddepcontrol\.wait", ptx)]
            if call.before is None or not call.config.overlap:
                assert not waits, (N, call.kernel.__name__)
                continue
            early.add(call.kernel.__name__)
            assert len(waits) == 1, (N, call.kernel.__name__)
            needed = r"ld\.global" if call.kernel is gpu._sum_partials else r"atom\.|ld\.volatile"
            first = re.search(needed, ptx)
            assert first is not None
            assert waits[0] < first.start(), (N, call.kernel.__name__)
            before = calls[id(call.before)][1]
            assert before.count("griddepcontrol.launch_dependents") == 1, (N, call.kernel.__name__)
    shared = {"_forward_block", "_forward_staged", "_backward_block", "_backward_staged"}
    assert early == (shared | {"_sum_partials"} if capability >= 90 else set())


@pytest.mark.parametrize("residual", [False, True], ids=["no residual", "residual"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_every_launch_can_be_laid_ready_for_the_driver(
    dtype: torch.dtype, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is laid ready is what the PTX declares: otherwise Triton's launcher would run, slower and unnoticed."""
    monkeypatch.setattr(gpu.driver, "_library", lambda: SimpleNamespace(cuLaunchKernelEx=None))
    kernels = set()
    for N in (7, 512, 1280, 16384, 16401, 32768, 600000):
        for call, pointers in launches(4096, N, dtype, dtype, "early", 0.0, residual):
            code = compile_launch((call, pointers), 90)[1]
            arguments = gpu._arguments(call, pointers)
            found = SimpleNamespace(src=code.src, metadata=code.metadata, asm={"ptx": code.asm["ptx"]}, function=1)
            assert gpu.driver.ready(found, call.grid, arguments, early=False) is not None, (N, call.kernel.__name__)
            kernels.add(call.kernel.__name__)
    assert kernels >= {"_forward_block", "_forward_staged", "_forward_loop", "_backward_staged", "_dw_alone"}


def test_the_second_launch_goes_straight_to_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the arguments in the kernel's order, and only for the very specialisation that was compiled."""
    compiled_with: list[tuple[Any, ...]] = []
    prepared: list[tuple[Any, ...]] = []
    launched: list[tuple[int, list[int]]] = []
    refuses = False

    class Kernel:
        def __init__(self, name: str, kernel: Any) -> None:
            self.__name__, self.arg_names = name, kernel.arg_names

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, **options: Any) -> Any:
                assert len(arguments) == len(self.arg_names)
                compiled_with.append((self.__name__, grid, arguments, options["launch_pdl"]))
                return self.__name__

            return launch

    def ready(found: Any, grid: Any, arguments: Any, early: bool) -> Any:
        prepared.append((found, grid, arguments, early))

        def launch(stream: int, addresses: list[int]) -> bool:
            launched.append((stream, addresses))
            return not refuses

        return launch

    for name in [name for name, value in vars(gpu).items() if isinstance(value, triton.JITFunction)]:
        monkeypatch.setattr(gpu, name, Kernel(name, getattr(gpu, name)))
    monkeypatch.setattr(gpu.driver, "ready", ready)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)

    x, w = torch.randn(6, 1280), torch.randn(1280)
    rstd = torch.rand(6)
    gpu.forward(x, None, w, 1e-6, "early", 0.0, False)
    gpu.backward(x, None, x, w, rstd, "early", 0.0, True, True)
    assert (len(compiled_with), len(launched)) == (3, 0)
    for before, after in zip(compiled_with, prepared, strict=True):
        assert all(a is b for a, b in zip(before[2], after[2], strict=True))
        assert (before[0], before[1], before[3]) == (after[0], after[1], after[3])
    other = torch.randn(6, 1280)
    y = gpu.forward(other, None, w, 1e-6, "early", 0.0, False)[0]
    gpu.backward(other, None, x, w, rstd, "early", 0.0, True, True)
    assert (len(compiled_with), len(launched)) == (3, 3)
    assert launched[0] == (7, [other.data_ptr(), w.data_ptr(), y.data_ptr()])  # what is absent has no address
    refuses = True
    gpu.forward(other, None, w, 1e-6, "early", 0.0, False)
    assert (len(compiled_with), len(launched)) == (4, 4)  # Triton's own launcher says what is wrong
    refuses = False

    shifted = torch.randn(6 * 1280 + 1)[1:].view(6, 1280)  # an address that 16 does not divide
    late = {"cast": "late", "offset": 0.0}
    for changed in (
        lambda: gpu.forward(shifted, None, w, 1e-6, "early", 0.0, False),
        lambda: gpu.forward(x, None, w, 1e-6, with_rstd=False, **late),  # type: ignore[arg-type]
        lambda: gpu.forward(x, None, w, 1e-6, "early", 0.0, True),
        lambda: gpu.forward(x, None, w, 1e-5, "early", 0.0, False),
        lambda: gpu.forward(x, None, w.half(), 1e-6, "early", 0.0, False),
        lambda: gpu.forward(x, x, w, 1e-6, "early", 0.0, False),
        lambda: gpu.forward(x[:5], None, w, 1e-6, "early", 0.0, False),
        lambda: gpu.forward(x.expand(2, 6, 1280), None, w, 1e-6, "early", 0.0, False),
    ):
        before = len(compiled_with)
        changed()
        assert (len(compiled_with), len(launched)) == (before + 1, 4)


_PLACES = {
    3: ("x", "residual", "w", "y", "s", "rstd", "shares"),
    5: ("dy", "ds", "x", "w", "rstd", "dx", "dw", "partials", "shares"),
}  # by how many are inputs


def test_the_host_learns_every_launch_with_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which they ran, and each tensor at the place that its name has."""
    ran: list[Any] = []
    learned: list[tuple[Any, ...]] = []

    def run(call: Any, pointers: tuple[Any, ...]) -> None:
        ran.append(call)
        call.ready = SimpleNamespace(launch=lambda tensors: (call, tensors))

    monkeypatch.setattr(gpu, "_run", run)
    monkeypatch.setattr(gpu, "_gpu", lambda device: Gpu(SHARED_MEMORY[9], capability=9))
    monkeypatch.setattr(gpu.host, "learns", lambda: True)
    monkeypatch.setattr(gpu.host, "learned", lambda *all_of_it: learned.append(all_of_it))
    kernels = set()
    for N, adds, of_w, (need_dx, need_dw) in itertools.product(
        (7, 1280, 16384, 16401, 32768, 600000),
        (False, True),
        (FP32, None),
        ((True, True), (True, False), (False, True)),
    ):
        x, dy = (torch.empty(64, N, dtype=BF16, device="meta") for _ in range(2))
        w = None if of_w is None else torch.empty(N, dtype=of_w, device="meta")
        residual = torch.empty_like(x) if adds else None
        y, s, rstd = gpu.forward(x, residual, w, 1e-6, "late", 0.0, with_rstd=need_dw)
        ds = torch.empty_like(x) if adds else None
        rstd = torch.empty(64, device="meta") if rstd is None else rstd
        dx, dw = gpu.backward(dy, ds, x, w, rstd, "late", 0.0, need_dx, need_dw)
        for inputs, spec, fresh, launched, aligned, keeps in learned:
            assert spec == ((1e-6, "late", 0.0, need_dw) if len(inputs) == 3 else ("late", 0.0, need_dx, need_dw))
            assert aligned == 15
            assert len(keeps) == len(launched)
            tensors = (*inputs, *(t for t, _ in fresh))
            assert len(tensors) == len(_PLACES[len(inputs)])
            sizes = {host.LIKE_ROWS: (64, N), host.A_NUMBER_A_ROW: (64,), host.LIKE_WEIGHT: (N,)}
            assert all(t.shape == sizes[size] if size < 0 else t.numel() == size for t, size in fresh if t is not None)
            for call, given in launched:
                kernels.add(call.kernel.__name__)
                named = [_PLACES[len(inputs)].index(n) for n in call.kernel.arg_names if n in _PLACES[len(inputs)]]
                assert [place for place, _ in given] == [i for i in named if tensors[i] is not None]
                assert all(tensors[place] is t for place, t in given)
        assert [call for _, _, _, launched, _, _ in learned for call, _ in launched] == ran
        assert (y.shape, s is None, dx is None, dw is None) == (
            x.shape, not adds, not need_dx, not need_dw or w is None)  # fmt: skip
        learned.clear()
        ran.clear()
    assert kernels == {
        "_forward_block", "_forward_staged", "_forward_loop", "_backward_block", "_backward_staged", "_backward_loop",
        "_dw_alone", "_sum_partials", "_no_shares_yet",
    }  # fmt: skip
