"""The checks that need a GPU: `python tests/kernels/gpu_check.py [--out DIR] [--only NAME …]`.

They compare the kernels with the reference on the same GPU and with the CPU's bits, at every width, for views, beyond
2³¹ elements, in CUDA graphs, on several streams, under torch.compile and compute-sanitizer. Each check runs in its own
process, because an illegal access breaks the CUDA context of a process; several run at a time. At the end the program
prints a table and writes `gpu_check.json` to DIR. The exit status is 1 if any check fails.
"""

import argparse
import contextlib
import functools
import glob
import importlib
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import tolerance  # noqa: E402
from planned import GatedKernels, Kernels  # noqa: E402
from rmsnorm import add_rms_norm, explain, gated_reference, gated_rms_norm, reference, rms_norm, rms_norms  # noqa: E402
from rmsnorm.functional import wait_for_host  # noqa: E402
from rmsnorm.kernels.gpu import tiling  # noqa: E402
from rmsnorm.kernels.host import loader as host  # noqa: E402
from rmsnorm.spec import Cast, Gate, Spec  # noqa: E402
from rmsnorm.tools import machine  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
SPECS = (("early", 0.0), ("late", 0.0), ("late", 1.0), ("first", 0.0))
# dtypes of x and w, cast, offset
COMBINATIONS: tuple[tuple[torch.dtype, torch.dtype | None, str, float], ...] = (
    (BF16, BF16, "early", 0.0),
    (FP16, FP16, "early", 0.0),
    (FP32, FP32, "early", 0.0),
    (BF16, FP32, "early", 0.0),
    (FP32, BF16, "early", 0.0),
    (FP16, BF16, "early", 0.0),
    (BF16, BF16, "late", 0.0),
    (BF16, BF16, "late", 1.0),
    (FP16, FP32, "late", 1.0),
    (FP32, FP32, "late", 0.0),
    (BF16, None, "early", 0.0),
)
PRIMES = (1031, 1279, 2039, 2053, 4093, 4099, 5003, 8191, 8209, 12289, 16381, 16411, 32771, 65537, 131071, 262147)
# A width for each tile of gated norms, some that are not whole words, and one so wide that a program loops over a row.
GATED_WIDTHS = (64, 72, 128, 200, 256, 512, 1000, 1021, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192, 8200)
TOGETHER, EACH_SECONDS, ALL_SECONDS = 16, 240, 400
CHECKS: dict[str, Callable[["Tally"], None]] = {}


class Tally:
    """What a check has compared, and the differences it found."""

    def __init__(self) -> None:
        self.compared = 0
        self.differing = 0
        self.wrong: list[str] = []
        self.notes: list[str] = []
        self.skipped = ""

    def same(self, got: Tensor | None, expected: Tensor | None, what: str) -> None:
        """Compares bits; all NaNs count as equal."""
        if got is None or expected is None:
            self.true(got is expected, f"{what}: one of the two is missing")
            return
        if (got.dtype, got.shape) != (expected.dtype, expected.shape):
            self.wrong.append(f"{what}: {got.dtype} {tuple(got.shape)}, not {expected.dtype} {tuple(expected.shape)}")
            return
        width = {2: torch.int16, 4: torch.int32}[got.element_size()]
        expected = expected.to(got.device)
        apart = got.contiguous().view(width) != expected.contiguous().view(width)
        count = int((apart & ~(got.isnan() & expected.isnan())).sum())
        self.compared += got.numel()
        if count:
            self.differing += count
            self.wrong.append(f"{what}: {count} of {got.numel()} differ")

    def near(self, got: Tensor | None, dy: Tensor, x: Tensor, rstd: Tensor, cast: str, what: str) -> None:
        """Compares dw with its fp64 sum."""
        self.near_sums(got, *tolerance.sums_of_dw(dy, x, rstd, cast), rstd.numel(), what)

    def near_sums(self, got: Tensor | None, total: Tensor, size: Tensor, rows: int, what: str) -> None:
        """Compares dw with its fp64 sum. size: the sum of the magnitudes. rows: how many rows are summed."""
        assert got is not None
        count = tolerance.dw_too_far_off(got, total, size, rows)
        self.compared += got.numel()
        if count:
            self.differing += count
            self.wrong.append(f"{what} dw: {count} of {got.numel()} are too far off")

    def true(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)


def check(function: Callable[[Tally], None]) -> Callable[[Tally], None]:
    CHECKS[function.__name__] = function
    return function


def kernels() -> Kernels:
    return Kernels(importlib.import_module("rmsnorm.kernels.gpu.planner"))


def cpu_kernels() -> tuple[Any, str]:
    """The CPU kernels, or the reference if Numba is missing; both give the same bits."""
    try:
        module = Kernels(importlib.import_module("rmsnorm.kernels.cpu.planner"))
        module.forward(torch.ones(1, 8), None, torch.ones(8), 1e-6, "early", 0.0, True)
    except Exception as error:  # use the reference whatever the error is
        return reference, f"CPU: the reference, because {type(error).__name__}: {error}"
    return module, "CPU: the kernel"


class Draw:
    """Seeded random tensors on the GPU, with rows of different magnitude."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator("cuda").manual_seed(seed)

    def rows(self, *shape: int, dtype: torch.dtype) -> Tensor:
        scale = self.normal(*shape[:-1], 1).exp()
        return (self.normal(*shape) * scale).to(dtype)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device="cuda")

    def large(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda").normal_(generator=self.generator)


def hold(
    tally: Tally,
    draw: Draw,
    what: str,
    x: Tensor,
    w: Tensor | None,
    residual: Tensor | None = None,
    *,
    dy: Tensor | None = None,
    ds: Tensor | None = None,
    eps: float = 1e-6,
    cast: str = "early",
    offset: float = 0.0,
    needs: tuple[bool, bool] = (True, True),
    on_cpu: Any = None,
) -> None:
    """Compares forward and backward of the kernels with the reference on the GPU, or with `on_cpu` if given."""
    gpu, other = kernels(), on_cpu or reference

    def there(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or on_cpu is None else tensor.cpu()

    got = gpu.forward(x, residual, w, eps, cast, offset, True)
    expected = other.forward(there(x), there(residual), there(w), eps, cast, offset, True)
    for name, a, b in zip(("y", "s", "rstd"), got, expected, strict=True):
        tally.same(a, b, f"{what} {name}")
    y, s, rstd = got
    rows = x if s is None else s
    needs = (needs[0], needs[1] and w is not None)
    dy = draw.rows(*y.shape, dtype=y.dtype) if dy is None else dy
    got = gpu.backward(dy, ds, rows, w, rstd, cast, offset, *needs)
    expected = other.backward(there(dy), there(ds), there(rows), there(w), there(rstd), cast, offset, *needs)
    tally.same(got[0], expected[0], f"{what} dx")
    if needs[1]:
        tally.near(got[1], dy, rows, rstd, cast, what)


def every_combination(tally: Tally, residuals: tuple[bool, ...], on_cpu: Any = None) -> None:
    random = Draw(2)
    for index, (x_dtype, w_dtype, cast, offset) in enumerate(COMBINATIONS):
        for with_residual in residuals:
            x = random.rows(8192, 1280, dtype=x_dtype)
            w = None if w_dtype is None else random.normal(1280).to(w_dtype)
            residual, ds = (random.rows(8192, 1280, dtype=x_dtype) if with_residual else None for _ in range(2))
            what = f"{x_dtype} {w_dtype} {cast} {offset} {with_residual}"
            eps = (1e-6, 1e-5, 0.0)[index % 3]
            hold(tally, random, what, x, w, residual, ds=ds, eps=eps, cast=cast, offset=offset, on_cpu=on_cpu)


@check
def against_reference(tally: Tally) -> None:
    """More than 10⁸ outputs of every combination of dtypes, compared with the reference on this GPU."""
    every_combination(tally, (False, True))


@check
def against_cpu(tally: Tally) -> None:
    """The same tensors, compared with the CPU's results."""
    on_cpu, note = cpu_kernels()
    tally.notes.append(note)
    every_combination(tally, (False,), on_cpu)


def every_width(tally: Tally, dtype: torch.dtype, part: int) -> None:
    random = Draw(4)
    for N in (*range(1 + part, 1025, 2), *PRIMES[part::2]):
        M = 131 if N < 64 else 37 if N < 1024 else 5
        cast, offset = SPECS[N % len(SPECS)]
        x, w = random.rows(M, N, dtype=dtype), random.normal(N).to(dtype)
        residual = random.rows(M, N, dtype=dtype) if N % 4 == 3 else None
        hold(tally, random, f"N={N}", x, w, residual, ds=residual, cast=cast, offset=offset)


for _name, _dtype in DTYPES.items():
    for _part, _widths in enumerate(("odd", "even")):
        CHECKS[f"widths_{_name}_{_widths}"] = functools.partial(every_width, dtype=_dtype, part=_part)


def every_gated_width(tally: Tally, dtype: torch.dtype, first: bool) -> None:
    """Gated norms with every tile, with enough gates for a table of their functions and with too few."""
    gpu, random = GatedKernels(importlib.import_module("rmsnorm.kernels.gpu.gated_planner")), Draw(19)
    for i, N in enumerate(GATED_WIDTHS):
        cast: Cast = ("early", "late")[i % 2]
        spec = Spec(1e-6, cast, gate=Gate(("silu", "sigmoid")[i // 2 % 2], first), groups=(1, 3)[i % 2])
        for M in (tiling.TABLE_LEAST // (N * spec.groups) + 3, 7):
            what, shape = f"{spec} {M} x {N}", (M, spec.groups * N)
            x, gate, dy = (random.rows(*shape, dtype=dtype) for _ in range(3))
            w = random.normal(shape[1]).to(dtype)
            y, rstd = gated_reference.forward(x, gate, w, spec, True)
            assert rstd is not None
            for name, a, b in zip(("y", "rstd"), gpu.forward(x, gate, w, spec, True), (y, rstd), strict=True):
                tally.same(a, b, f"{what} {name}")
            inputs = dy.to(y.dtype), x, gate, w, rstd, spec
            *gradients, dw = gpu.backward(*inputs, True, True, True)
            expected = gated_reference.backward(*inputs, True, True, False)[:2]
            for name, got, right in zip(("dx", "dgate"), gradients, expected, strict=True):
                tally.same(got, right, f"{what} {name}")
            tally.near_sums(dw, *tolerance.sums_of_gated_dw(dy, x, gate, rstd, spec), M, what)


for _name, _dtype in DTYPES.items():
    CHECKS[f"gated_{_name}"] = functools.partial(every_gated_width, dtype=_dtype, first=False)
    CHECKS[f"gate_first_{_name}"] = functools.partial(every_gated_width, dtype=_dtype, first=True)


@check
def widths_powers(tally: Tally) -> None:
    """Every block size and both sides of each width limit, with dw only, dx only, and neither."""
    random = Draw(5)
    for N in (*(2**k for k in range(20)), 1280, 5120, 7168, 12288, 20480, 100000, 200000, 262144, 262145):
        for needs in ((True, True), (True, False), (False, True)):
            x, w = random.rows(33, N, dtype=BF16), random.normal(N).to(BF16)
            hold(tally, random, f"N={N} {needs}", x, w, needs=needs)


@check
def views(tally: Tally) -> None:
    """Misaligned, strided, expanded and permuted tensors; the memory between the rows is NaN."""
    random = Draw(6)
    for dtype in (BF16, FP32):
        for N in (512, 1279, 16411) if dtype == BF16 else (1000,):
            wide = torch.full((2, 6, 7, N + 64), torch.nan, dtype=dtype, device="cuda")
            for left in (0, 1, 8, 13):
                wide[..., left : left + N] = random.rows(2, 6, 7, N, dtype=dtype)
                rows = wide[..., left : left + N]
                forms = (rows, rows.permute(2, 0, 1, 3), rows[:, ::2, 1::3], rows[:1].expand(3, 6, 7, N))
                for form, x in enumerate(forms):
                    w = random.normal(2 * N + 1).to(dtype)[1::2]
                    residual = random.rows(*x.shape[:-1], N + 3, dtype=dtype)[..., 3:]
                    dy, ds = residual.flip(0), residual.transpose(0, 2).contiguous().transpose(0, 2)
                    what = f"{dtype} N={N} left={left} form={form}"
                    hold(tally, random, what, x, w, dy=dy)
                    hold(tally, random, f"{what} add", x, w, residual, dy=dy, ds=ds)
        x, w = random.rows(64, 9, dtype=dtype), random.normal(9).to(dtype)
        hold(tally, random, "last dimension strided", x.t(), random.normal(64).to(dtype))
        for dy in (torch.ones((), dtype=dtype, device="cuda").expand(64, 9), w.expand(64, 9), x[:, :1].expand(64, 9)):
            hold(tally, random, f"dy of strides {dy.stride()}", x, w, dy=dy)
        five = random.rows(2, 3, 2, 3, 2, 32, dtype=dtype)[..., :20].permute(4, 2, 0, 3, 1, 5)[:, :, :, :2]
        hold(tally, random, "too many dimensions", five, random.normal(20).to(dtype))


@check
def extremes(tally: Tally) -> None:
    """NaN, inf, zero, subnormal and huge numbers, eps 0, weights of -0.0; compared on this GPU and with the CPU."""
    random, inf, nan = Draw(7), torch.inf, torch.nan
    for dtype, tiny, huge in ((FP32, 1e-40, 3e38), (FP16, 6e-8, 65504.0), (BF16, 1e-40, 3e38)):
        for N in (21, 1280, 20000):
            x = random.rows(12, N, dtype=dtype)
            x[0, 1], x[1, 2], x[2, 3], x[3, 4] = inf, -inf, nan, huge
            x[4], x[5], x[6], x[7] = 0.0, -0.0, tiny, huge
            x[8] = (random.normal(N).abs() * 1e-24).to(dtype)
            w, dy = random.normal(N).to(dtype), random.rows(12, N, dtype=dtype)
            w[0], w[1], w[2], w[3] = -0.0, inf, nan, tiny
            dy[8] = dy[8].abs()
            dy[9, 0], dy[10, 1] = inf, nan
            for eps in (0.0, 1e-6, 1e-45):
                for cast, offset in SPECS:
                    for weight in (w, w.nan_to_num(1.0, 1.0, -1.0).abs()):
                        what = f"{dtype} N={N} eps={eps} {cast} {offset}"
                        hold(tally, random, what, x, weight, dy=dy, eps=eps, cast=cast, offset=offset)
                        hold(
                            tally,
                            random,
                            f"{what} CPU",
                            x,
                            weight,
                            dy=dy,
                            eps=eps,
                            cast=cast,
                            offset=offset,
                            on_cpu=reference,
                        )


@check
def mixtures(tally: Tally) -> None:
    """Residuals of another dtype, no rows, one row, 1-D inputs."""
    random = Draw(8)
    for x_dtype in (BF16, FP16, FP32):
        for r_dtype in (BF16, FP16, FP32):
            x, residual = random.rows(9, 320, dtype=x_dtype), random.rows(9, 320, dtype=r_dtype)
            hold(tally, random, f"{x_dtype} + {r_dtype}", x, random.normal(320).to(x_dtype), residual)
    for shape in ((0, 33), (3, 0, 33), (1, 33), (33,), (1,), (0, 40000), (40000,), (1, 1)):
        for needs in ((True, True), (False, True), (True, False)):
            x, w = random.rows(*shape, dtype=BF16), random.normal(shape[-1]).to(BF16)
            hold(tally, random, f"{shape} {needs}", x, w, x, ds=x, needs=needs)


@check
def batches(tally: Tally) -> None:
    """y and dx of a row do not depend on the rest of the batch, and dw is the same in every run."""
    gpu, random = kernels(), Draw(9)
    for dtype in (BF16, FP32):
        for N in (1, 31, 512, 1280, 7168, 20000):
            x, w, dy = random.rows(1000, N, dtype=dtype), random.normal(N).to(dtype), random.rows(1000, N, dtype=dtype)
            y, _, rstd = gpu.forward(x, None, w, 1e-6, "early", 0.0, True)
            dx, dw = gpu.backward(dy, None, x, w, rstd, "early", 0.0, True, True)
            for first, last in ((0, 1), (7, 8), (3, 5), (999, 1000), (17, 81), (100, 403)):
                part = slice(first, last)
                y_, _, rstd_ = gpu.forward(x[part], None, w, 1e-6, "early", 0.0, True)
                dx_, _ = gpu.backward(dy[part], None, x[part], w, rstd_, "early", 0.0, True, False)
                tally.same(y_, y[part], f"y of rows {first}…{last} N={N}")
                tally.same(dx_, dx[part], f"dx of rows {first}…{last} N={N}")
            for _ in range(20):
                tally.same(gpu.backward(dy, None, x, w, rstd, "early", 0.0, True, True)[1], dw, f"dw again N={N}")


@check
def memory(tally: Tally) -> None:
    """The memory that stays allocated: y, and rstd if requested; dx and dw in the backward pass."""
    gpu, random = kernels(), Draw(10)
    x, w = random.rows(8192, 1280, dtype=BF16), random.normal(1280).to(BF16)

    def kept(run: Callable[[], Any]) -> int:
        run()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        outputs = run()
        after = torch.cuda.memory_stats()["requested_bytes.all.current"]
        del outputs
        return int(after - before)

    size = x.numel() * x.element_size()
    for asked, expected in ((False, size), (True, size + 4 * 8192)):
        bytes_ = kept(functools.partial(gpu.forward, x, None, w, 1e-6, "early", 0.0, asked))
        tally.true(bytes_ == expected, f"forward, rstd {asked}: {bytes_} bytes, expected {expected}")
    rstd = gpu.forward(x, None, w, 1e-6, "early", 0.0, True)[2]
    for needs, expected in (((True, False), size), ((True, True), size + 2560), ((False, True), 2560)):
        bytes_ = kept(functools.partial(gpu.backward, x, None, x, w, rstd, "early", 0.0, *needs))
        tally.true(bytes_ == expected, f"backward, needs {needs}: {bytes_} bytes, expected {expected}")
    launched: list[Any] = []
    launch_class = importlib.import_module("rmsnorm.kernels.gpu.driver").TritonLaunch
    run = launch_class.run

    def run_and_record(launch: Any, tensors: Any) -> None:
        launched.append(launch.kernel)
        run(launch, tensors)

    launch_class.run = run_and_record
    try:
        gpu.backward(x, None, x, w, rstd, "early", 0.0, True, False)
        tally.true(len(launched) == 1, "a frozen weight costs a second kernel")
    finally:
        launch_class.run = run


def hold_large(tally: Tally, what: str, x: Tensor, w: Tensor, dy: Tensor, step: int) -> None:
    """As `hold`, with the reference run on slices of rows, because its fp64 copies take 8 bytes an element."""
    gpu = kernels()
    y, _, rstd = gpu.forward(x, None, w, 1e-6, "early", 0.0, True)
    dx, dw = gpu.backward(dy, None, x, w, rstd, "early", 0.0, True, True)
    dw_alone = gpu.backward(dy, None, x, w, rstd, "early", 0.0, False, True)[1]
    total, size = (torch.zeros(x.shape[-1], dtype=torch.float64, device="cuda") for _ in range(2))
    for first in range(0, x.shape[0], step):
        part = slice(first, first + step)
        y_, _, rstd_ = reference.forward(x[part], None, w, 1e-6, "early", 0.0, True)
        assert rstd_ is not None
        tally.same(y[part], y_, f"{what} y from row {first}")
        dx_, _ = reference.backward(dy[part], None, x[part], w, rstd_, "early", 0.0, True, False)
        tally.same(dx[part], dx_, f"{what} dx from row {first}")
        for whole, of_part in zip((total, size), tolerance.sums_of_dw(dy[part], x[part], rstd_, "early"), strict=True):
            whole += of_part
    for gradient, frozen in ((dw, ""), (dw_alone, ", x frozen,")):
        tally.true(
            tolerance.dw_too_far_off(gradient, total, size, x.shape[0]) == 0, f"{what} dw{frozen} is too far off"
        )


@check
def every_row_counts(tally: Tally) -> None:
    """dw of numbers whose fp32 sums are exact in any order: fails if one of millions of rows is missing or repeated."""
    gpu, random = kernels(), Draw(15)
    for M, N in ((2**22 + 3, 64), (300001, 1280), (300001, 1283), (30011, 10240), (30011, 16384)):
        x = torch.where(random.normal(M, N) < 0, -1.0, 1.0).to(BF16)
        dy = random.normal(M, N).mul(2).round().clamp(-3, 3).to(BF16)
        expected = (x * dy).sum(0, dtype=torch.float64)
        rstd = torch.ones(M, device="cuda")
        for w in (random.normal(N).to(BF16), random.normal(N)):
            for needs in ((True, True), (False, True)):
                dw = gpu.backward(dy, None, x, w, rstd, "early", 0.0, *needs)[1]
                tally.same(dw, expected.to(torch.float32).to(w.dtype), f"dw {M} x {N} {w.dtype} {needs}")


@check
def beyond_2_31_rows(tally: Tally) -> None:
    """More than 2³¹ elements, contiguous and as columns of a wider tensor."""
    random = Draw(11)
    w = random.normal(1280).to(BF16)
    M = 2**31 // 1280 + 1001
    x, dy = random.large(M, 1280, dtype=BF16), random.large(M, 1280, dtype=BF16)
    hold_large(tally, "contiguous", x, w, dy, 1 << 17)
    x, dy = x.view(-1)[: M // 2 * 2560].view(-1, 2560)[:, 7:1287], dy[: M // 2]
    hold_large(tally, "columns", x, w, dy, 1 << 17)


@check
def beyond_2_31_numbers(tally: Tally) -> None:
    """More than 2³¹ rows of one number, with an fp32 weight: dw needs more programs than a grid's second axis allows."""
    random = Draw(12)
    x = random.large(2**31 + 77, 1, dtype=BF16)
    hold_large(tally, "N=1", x, random.normal(1), x.flip(0), 1 << 27)


@check
def beyond_2_31_columns(tally: Tally) -> None:
    """Rows of more than 2²⁹ numbers."""
    random = Draw(13)
    N = 2**29 + 3
    x, dy = random.large(5, N, dtype=BF16), random.large(5, N, dtype=BF16)
    hold_large(tally, "5 rows", x, random.large(N, dtype=BF16), dy, 1)


@check
def dispatch(tally: Tally) -> None:
    """The public functions run these kernels, with autograd."""
    random = Draw(14)
    x = random.rows(64, 1280, dtype=BF16)
    w = random.normal(1280).to(BF16)
    said = explain(x, w)
    tally.notes.append(said)
    tally.true(kernels().planner.NAME in said, f"explain says {said!r}")
    for trained in ((True, True), (True, False), (False, True)):
        a, b = x.clone().requires_grad_(trained[0]), w.clone().requires_grad_(trained[1])
        dy = random.rows(64, 1280, dtype=BF16)
        y = rms_norm(a, b)
        y.backward(dy)
        y_, _, rstd = reference.forward(x, None, w, 1e-6, "early", 0.0, True)
        assert rstd is not None
        dx, _ = reference.backward(dy, None, x, w, rstd, "early", 0.0, trained[0], False)
        tally.same(y.detach(), y_, f"{trained} y")
        tally.same(a.grad, dx, f"{trained} dx")
        if trained[1]:
            tally.near(b.grad, dy, x, rstd, "early", f"{trained}")


@check
def host_of_few_columns(tally: Tally) -> None:
    """Calls from C++ and their gradients, compared with those from Python."""
    hold_host(tally, ((16, 1280), (3, 100), (1, 1), (70000, 128)))


@check
def host_of_many_columns(tally: Tally) -> None:
    """The same for rows that programs share or loop over."""
    hold_host(tally, ((4096, 7168), (999, 16400), (97, 40000), (5, 300001)))


def hold_host(tally: Tally, shapes: tuple[tuple[int, int], ...]) -> None:
    kernels()
    random = Draw(18)
    wait_for_host()
    tally.notes.append(explain(random.rows(2, 64, dtype=BF16)))
    dtypes = (torch.float32, BF16, torch.float16)
    for (M, N), of_x, of_w, adds in itertools.product(shapes, dtypes, (torch.float32, BF16, None), (False, True)):
        x, residual = (random.rows(M, N, dtype=of_x).requires_grad_() for _ in range(2))
        for trained in (False, True) if of_w is not None else (False,):
            w = None if of_w is None else random.normal(N).to(of_w).requires_grad_(trained)
            leaves = [x, *([residual] if adds else []), *([w] if trained and w is not None else [])]
            runs = []
            for turn in range(3):
                with host.bypassed() if turn == 0 else contextlib.nullcontext():  # the first turn in Python
                    outputs = add_rms_norm(x, residual, w) if adds else (rms_norm(x, w),)
                if turn == 0:
                    cotangents = [random.rows(M, N, dtype=y.dtype) for y in outputs]
                node = outputs[0].grad_fn
                by_python = "_Norm" in type(node).__name__
                tally.true(by_python == (turn == 0), f"{M} x {N} {of_x} {of_w}: by Python {by_python}, {turn}")
                runs.append([*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, cotangents)])
            with torch.no_grad():
                runs += [[*add_rms_norm(x, residual, w)] if adds else [rms_norm(x, w)] for _ in range(2)]
            for turn, run in enumerate(runs[1:], 1):
                for index, (got, first) in enumerate(zip(run, runs[0], strict=False)):
                    tally.same(got, first, f"{M} x {N} {of_x} {of_w} adds={adds} call {turn} output {index}")


def step(x: Tensor, residual: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """A forward and backward pass through both public functions."""
    a, b, c = (t.detach().requires_grad_() for t in (x, residual, w))
    y, s = add_rms_norm(a, b, c)
    z = rms_norm(s, c, cast="late", offset=1.0)
    return (y.detach(), s.detach(), z.detach(), *torch.autograd.grad((y, z), (a, c), (dy, dy)))


def steps_inputs(random: Draw, M: int = 333, N: int = 1280) -> tuple[Tensor, ...]:
    x, residual, dy = (random.rows(M, N, dtype=BF16) for _ in range(3))
    return x, residual, random.normal(N).to(BF16), dy


@check
def graphs(tally: Tally) -> None:
    """Forward and backward captured in a CUDA graph, replayed with new inputs."""
    random = Draw(15)
    for N in (31, 1280, 20000):
        static = steps_inputs(random, N=N)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(*static)
        for turn in range(5):
            for tensor, new in zip(static, steps_inputs(random, N=N), strict=True):
                tensor.copy_(new)
            graph.replay()
            replayed = [t.clone() for t in captured]
            for index, (got, expected) in enumerate(zip(replayed, step(*static), strict=True)):
                tally.same(got, expected, f"N={N} replay {turn}, output {index}")


@check
def streams(tally: Tally) -> None:
    """Four concurrent streams, some with rows that programs share, compared with the results of each alone."""
    random = Draw(16)
    inputs = [steps_inputs(random, M, N) for M, N in ((4096, 1280), (999, 7168), (97, 32768), (41, 262144))]
    expected = [step(*given) for given in inputs]
    torch.cuda.synchronize()
    lanes = [torch.cuda.Stream() for _ in inputs]
    results: list[list[tuple[Tensor, ...]]] = [[] for _ in inputs]
    for _ in range(25):
        for lane, stream in enumerate(lanes):
            with torch.cuda.stream(stream):
                results[lane].append(step(*inputs[lane]))
    torch.cuda.synchronize()
    for lane in range(len(lanes)):
        for turn, outputs in enumerate(results[lane]):
            for index, (got, right) in enumerate(zip(outputs, expected[lane], strict=True)):
                tally.same(got, right, f"stream {lane} turn {turn} output {index}")


@check
def pairs_and_sandwiches(tally: Tally) -> None:
    """Two norms in one call, independent ones and ones with an addition between them, compared with the reference."""
    random = Draw(18)
    for (x_dtype, w_dtype, cast, offset), N in itertools.product(COMBINATIONS, (64, 128, 1000, 2304, 5376, 7168)):
        what, options = f"{x_dtype} {w_dtype} {cast} {offset} {N}", (1e-6, cast, offset, True)
        for M in (16, 4096):
            x = random.rows(M, N, dtype=x_dtype)
            w, w2 = (None if w_dtype is None else random.normal(N).to(w_dtype) for _ in range(2))
            h, _, rstd = reference.forward(x, None, w, *options)
            x2 = random.rows(2 * M, N // 2 + 16, dtype=x_dtype)[:, : N // 2]
            half = None if w2 is None else w2[: N // 2].contiguous()
            y2, _, rstd2 = reference.forward(x2, None, half, *options)
            found = torch.ops.rmsnorm.forward_pair(x, w, x2, half, *options)
            for name, a, b in zip(("y", "rstd", "y2", "rstd2"), found, (h, rstd, y2, rstd2), strict=True):
                tally.same(a, b, f"pair {what} {M} {name}")
            residual = random.rows(M, N, dtype=h.dtype)
            y, s, rstd2 = reference.forward(h, residual, w2, *options)
            found = torch.ops.rmsnorm.forward_sandwich(x, w, residual, w2, *options)
            for name, a, b in zip(("y", "s", "rstd", "rstd2"), found, (y, s, rstd, rstd2), strict=True):
                tally.same(a, b, f"sandwich {what} {M} {name}")


@check
def compiled(tally: Tally) -> None:
    """torch.compile(fullgraph=True), forward and backward, also with a second batch size."""
    random = Draw(17)

    def model(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y, s = add_rms_norm(x, residual, w)
        return y, rms_norm(s.relu(), w, cast="late", offset=1.0)

    fast = torch.compile(model, fullgraph=True)
    for M in (64, 65, 500):
        x, residual, w, dy = steps_inputs(random, M)
        outputs = []
        for run in (fast, model):
            leaves = [t.detach().requires_grad_() for t in (x, residual, w)]
            y, z = run(*leaves)
            outputs.append((y.detach(), z.detach(), *torch.autograd.grad((y, z), leaves[:2], (dy, dy))))
        for index, (got, expected) in enumerate(zip(*outputs, strict=True)):
            tally.same(got, expected, f"M={M} output {index}")


@check
def memcheck(tally: Tally) -> None:
    """Accesses outside of allocations, with a separate allocation for each tensor."""
    run_sanitizer(tally, "memcheck", PYTORCH_NO_CUDA_MEMORY_CACHING="1")


@check
def racecheck(tally: Tally) -> None:
    """Races on shared memory."""
    run_sanitizer(tally, "racecheck")


@check
def initcheck(tally: Tally) -> None:
    """Reads of memory that nothing has written."""
    run_sanitizer(tally, "initcheck", PYTORCH_NO_CUDA_MEMORY_CACHING="1")


@check
def synccheck(tally: Tally) -> None:
    """Barriers that not all threads reach."""
    run_sanitizer(tally, "synccheck")


def run_sanitizer(tally: Tally, tool: str, **environment: str) -> None:
    """Runs every kernel under a tool of compute-sanitizer."""
    packages = Path(torch.__file__).parents[1] / "nvidia"
    places = (*glob.glob("/usr/local/cuda*/bin/compute-sanitizer"), *packages.rglob("compute-sanitizer"))
    found = shutil.which("compute-sanitizer") or next(iter(places), None)
    if found is None:
        tally.skipped = "compute-sanitizer is not on this machine"
        return
    command = [found, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--check", "touch"]
    variables = os.environ | environment | {"PYTHONFAULTHANDLER": "1"}  # an abort prints where each thread was
    try:
        process = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200, check=False)
    except subprocess.TimeoutExpired:  # its limit is below EACH_SECONDS, so that this can be reported
        tally.skipped = f"{tool} takes more than 200 s here"
        return
    said = [line for line in process.stdout.splitlines() if line.startswith("=========")]
    tally.notes += said[-1:]
    if process.returncode != 0 or '"state": "green"' not in process.stdout or "0 errors" not in "".join(said[-1:]):
        others = "\n".join(line for line in process.stdout.splitlines() if line not in said) + process.stderr
        output = "\n".join((*said[:12], others[-1500:]))
        if any(word in output.lower() for word in ("not supported", "unable to", "permi")):
            tally.skipped = f"compute-sanitizer cannot work here: {output[:300]}"
        else:
            tally.wrong.append(f"exit status {process.returncode}: {output}")


def touch(tally: Tally) -> None:
    """Runs every kernel once, at sizes that leave partial tiles; for the sanitizer."""
    gpu, random = kernels(), Draw(18)
    for M, N in ((3, 1), (67, 31), (67, 72), (67, 97), (9, 1001), (5, 1279), (2, 16411), (3, 17408)):
        for x in (random.rows(M, N, dtype=BF16), random.rows(M, N + 1, dtype=BF16)[:, 1:]):
            w = random.normal(N).to(BF16)
            y, s, rstd = gpu.forward(x, x, w, 1e-6, "early", 0.0, True)
            for needs in ((True, True), (False, True)):
                gpu.backward(y, s, x, w, rstd, "early", 0.0, *needs)
    for M, N in ((3, 64), (67, 96), (5, 4104)):
        x, gate, w = (t.requires_grad_() for t in (random.rows(M, N, dtype=BF16), random.rows(M, N, dtype=BF16),
                                                   random.normal(N).to(BF16)))  # fmt: skip
        y = gated_rms_norm(x, gate, w)
        torch.autograd.grad(y, (x, gate, w), y.detach())
        pair = rms_norms([x, gate], [w, w])
        torch.autograd.grad(pair, (x, gate, w), [t.detach() for t in pair])
    torch.cuda.synchronize()
    tally.notes.append("touched")


def run_here(name: str) -> dict[str, Any]:
    """Runs one check in this process."""
    tally, start = Tally(), time.monotonic()
    try:
        {**CHECKS, "touch": touch}[name](tally)
        torch.cuda.synchronize()
    except Exception:  # a check that raises is reported as failed
        tally.wrong.append(traceback.format_exc()[-2500:])
    state = "skipped" if tally.skipped else "red" if tally.wrong else "green"
    return {
        "name": name,
        "state": state,
        "compared": tally.compared,
        "differing": tally.differing,
        "seconds": round(time.monotonic() - start, 1),
        "wrong": tally.wrong[:20],
        "wrong_in_all": len(tally.wrong),
        "notes": [tally.skipped] * bool(tally.skipped) + tally.notes,
    }


def failed(name: str, why: str, seconds: float) -> dict[str, Any]:
    return {
        "name": name, "state": "red", "compared": 0, "differing": 0, "seconds": round(seconds, 1),
        "wrong": [why], "wrong_in_all": 1, "notes": [],
    }  # fmt: skip


def run_all(names: list[str]) -> list[dict[str, Any]]:
    """Runs each check in its own process, a few at a time; a check that takes too long is killed and fails."""
    begin, waiting, results = time.monotonic(), list(names), []
    running: dict[str, tuple[subprocess.Popen[str], float]] = {}
    while waiting or running:
        while waiting and len(running) < TOGETHER and time.monotonic() - begin < ALL_SECONDS:
            name = waiting.pop(0)
            command = [sys.executable, __file__, "--check", name]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            running[name] = (process, time.monotonic())
        if waiting and not running:
            results += [failed(name, "not run: out of time", 0.0) for name in waiting]
            break
        for name, (process, since) in list(running.items()):
            taken = time.monotonic() - since
            try:
                output, errors = process.communicate(timeout=0.2)
            except subprocess.TimeoutExpired:
                if taken < EACH_SECONDS and time.monotonic() - begin < ALL_SECONDS:
                    continue
                process.kill()
                output, errors = process.communicate()
                output, errors = "", f"ended after {taken:.0f} s\n{errors[-1000:]}"
            del running[name]
            try:
                result = json.loads(next(line for line in output.splitlines() if line.startswith('{"name"')))
            except (StopIteration, ValueError):
                result = failed(name, f"exit status {process.returncode}: {errors[-2500:]}", taken)
            results.append(result)
            print(f"{time.monotonic() - begin:5.0f} s  {result['state']:8}{name}", flush=True)
    return sorted(results, key=lambda result: names.index(result["name"]))


def versions() -> dict[str, Any]:
    try:
        triton = importlib.import_module("triton").__version__
    except Exception as error:  # the checks will report it again
        triton = f"{type(error).__name__}: {error}"
    return {
        "commit": machine.describe(torch.device("cpu"))["commit"],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for gpu_check.json")
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="run these checks")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU that torch can use", file=sys.stderr)
        return 2
    if options.check:
        print(json.dumps(run_here(options.check)))
        return 0
    # The longest first, so that none of them is still running alone at the end.
    first = (
        "beyond_2_31_rows",
        "racecheck",
        "memcheck",
        "initcheck",
        "synccheck",
        "host_of_many_columns",
        "compiled",
        "against_cpu",
    )
    names = options.only or [*first, *(name for name in CHECKS if name not in first)]
    about, start = versions(), time.monotonic()
    wait_for_host()
    results = run_all(names)
    green = all(result["state"] != "red" for result in results)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        document = {**about, "green": green, "seconds": round(time.monotonic() - start), "checks": results}
        (options.out / "gpu_check.json").write_text(json.dumps(document, indent=1) + "\n")
    for result in results:
        if result["state"] == "red":
            print(f"\n{result['name']}: {result['wrong_in_all']} wrong", *result["wrong"][:3], sep="\n  ")
    print("\n" + " · ".join(str(value) for value in about.values()))
    for result in results:
        counts = f"{result['compared']:>13,} compared {result['differing']:>9,} differ {result['seconds']:>6} s"
        note = result["notes"][0][:90] if result["notes"] else ""
        print(f"{result['state']:8}{result['name']:22}{counts}  {note}")
    compared = sum(result["compared"] for result in results)
    print(f"{'green' if green else 'RED'}: {compared:,} outputs compared, {math.ceil(time.monotonic() - start)} s")
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
