"""The GPU kernels in Triton's interpreter, without a GPU: fp32 and fp16 results have the bits of the reference.

The interpreter is a mode of the whole process, so a single child process runs all selected cases and prints the errors,
and each test reads its own case. bf16 is only tested on GPUs, because the interpreter's cast to bf16 truncates.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tolerance
from memory_guards import guarded

pytest.importorskip(
    "triton",
    minversion="3.9",
    reason="no Triton of 3.9 or later: the interpreter of 3.6 takes an argument of -0.0 for 0.0",
)

pytestmark = pytest.mark.gpu_code

FP32, FP16 = torch.float32, torch.float16
SPECS = (("early", 0.0), ("late", 0.0), ("late", 1.0), ("first", 0.0))
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 32, 61, 64, 100, 127, 255, 512, 1000, 1021, 1279, 1280, 2049, 4093, 5000)
CASES: dict[str, Callable[[], None]] = {}
_random = torch.Generator().manual_seed(0)


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def draw(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Random numbers, with rows of different magnitude."""
    scale = torch.randn(*shape[:-1], 1, generator=_random).exp()
    return (torch.randn(*shape, generator=_random) * scale).to(dtype)


def differing(got: Tensor | None, expected: Tensor | None) -> str:
    """Describes how `got` differs from the bits of `expected`; all NaNs count as equal."""
    if got is None or expected is None:
        return "" if got is expected else f"{'absent' if got is None else 'present'}"
    if (got.dtype, got.shape) != (expected.dtype, expected.shape):
        return f"{got.dtype} {tuple(got.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    if not got.is_contiguous():
        return "not contiguous"
    width = torch.int32 if got.element_size() == 4 else torch.int16
    same = (got.view(width) == expected.contiguous().view(width)) | (got.isnan() & expected.isnan())
    return "" if same.all() else f"{int((~same).sum())} of {same.numel()} differ"


def check(
    x: Tensor,
    w: Tensor | None,
    residual: Tensor | None = None,
    *,
    dy: Tensor | None = None,
    ds: Tensor | None = None,
    eps: float = 1e-6,
    cast: str = "early",
    offset: float = 0.0,
    with_rstd: bool = True,
    needs: tuple[bool, bool] = (True, True),
    V: int | None = None,
    kernels: Any = None,
) -> None:
    """Compares forward and backward of the kernels with the reference, and checks the memory around the outputs.

    kernels: with the functions of `planned.Kernels`; by default those for whole rows.
    """
    from planned import Kernels
    from rmsnorm import reference
    from rmsnorm.kernels.gpu import planner as gpu

    kernels = kernels or Kernels(gpu)
    inputs = [t for t in (x, w, residual, dy, ds) if t is not None]
    before = [t.clone(memory_format=torch.contiguous_format) for t in inputs]
    with guarded() as buffers:
        got = kernels.forward(x, residual, w, eps, cast, offset, with_rstd, V)
    assert buffers, "no output is guarded"
    expected = reference.forward(x, residual, w, eps, cast, offset, True, V)
    wrong = {name: differing(a, b) for name, a, b in zip(("y", "s"), got, expected, strict=False)}
    wrong["rstd"] = differing(got[2], expected[2] if with_rstd else None)

    y, s, rstd = expected
    assert rstd is not None
    rows = x if s is None else s
    dy = draw(*y.shape, dtype=y.dtype) if dy is None else dy
    needs = (needs[0], needs[1] and w is not None)
    with guarded():
        gradients = kernels.backward(dy, ds, rows, w, rstd, cast, offset, *needs, V)
    right = reference.backward(dy, ds, rows, w, rstd, cast, offset, *needs, V)
    wrong["dx"] = differing(gradients[0], right[0])
    if needs[1]:
        assert w is not None
        sums = tolerance.sums_of_dw(dy, rows, rstd, cast, w.shape)
        count = tolerance.dw_too_far_off(gradients[1], *sums, rstd.numel())
        wrong["dw"] = f"{count} are too far off" if count else ""
    wrong["inputs"] = "; ".join(filter(None, map(differing, (t.contiguous() for t in inputs), before)))
    said = {name: what for name, what in wrong.items() if what}
    assert not said, f"{tuple(x.shape)} {x.dtype} {cast} {offset}: {said}"


@case
def two_norms_in_one_launch() -> None:
    from rmsnorm import reference
    from rmsnorm.kernels.gpu import planner as gpu
    from rmsnorm.kernels.plan import Forward, both
    from rmsnorm.kernels.run import run
    from rmsnorm.spec import Spec

    # The dimensions of each x, and how many of them each weight has.
    shapes = (
        ((5, 64), (3, 96), 1), ((2, 3, 1280), (7, 16), 1), ((4, 72), (1, 513), 1), ((9, 4, 64), (9, 2, 48), 2)
    )  # fmt: skip
    for (cast, offset), dtype, (shape, shape2, dims) in itertools.product(SPECS[:3], (FP32, FP16), shapes):
        xs = draw(*shape, dtype=dtype), draw(*shape2[:-1], shape2[-1] + 16)[..., : shape2[-1]]
        ws = draw(*shape[-dims:], dtype=dtype), None if offset == 0 and dtype is FP16 else draw(*shape2[-dims:])
        spec = Spec(1e-6, cast, offset)
        apart = [gpu.plan_forward(Forward.of(x, None, w, spec, True)) for x, w in zip(xs, ws, strict=True)]
        plan = gpu.merge_pair(both(*apart, (0, 2)))
        assert len(plan.launches) == 1
        with guarded():
            found = run(plan, (xs[0], None, ws[0], xs[1], None, ws[1]))
        for i, (x, w) in enumerate(zip(xs, ws, strict=True)):
            y, _, rstd = reference.forward(x, None, w, 1e-6, cast, offset, True)
            said = differing(found[2 * i], y) or differing(found[2 * i + 1], rstd)
            assert not said, f"norm {i} of {shape} and {shape2}, {dtype}, {cast}: {said}"


@case
def norm_sum_and_norm_in_one_launch() -> None:
    from rmsnorm import reference
    from rmsnorm.kernels import dispatch
    from rmsnorm.kernels.gpu import planner as gpu
    from rmsnorm.kernels.plan import sandwich
    from rmsnorm.kernels.run import run
    from rmsnorm.spec import Spec

    shapes = ((5, 64), (2, 3, 1280), (3, 2304), (4, 96))
    kinds = ((FP32, FP32), (FP16, FP16), (FP16, FP32))
    for (cast, offset), (dtype, w_dtype), shape in itertools.product(SPECS[:3], kinds, shapes):
        N = shape[-1]
        h_dtype = FP32 if cast == "early" and w_dtype is FP32 else dtype
        x, residual = draw(*shape, dtype=dtype), draw(*shape[:-1], N + 16, dtype=h_dtype)[..., :N]
        w, w2 = draw(N, dtype=w_dtype), None if offset == 0 and dtype is FP16 else draw(N, dtype=w_dtype)
        for with_rstd in (False, True):
            spec = Spec(1e-6, cast, offset)
            apart = map(gpu.plan_forward, dispatch.sandwich_kinds(x, w, residual, w2, spec, with_rstd))
            merged = gpu.merge_sandwich(sandwich(*apart))
            assert len(merged.launches) == 1, (shape, dtype)
            with guarded():
                y, s, rstd, rstd2 = run(merged, (x, None, w, residual, w2))
            h, _, expected_rstd = reference.forward(x, None, w, 1e-6, cast, offset, with_rstd)
            expected = reference.forward(h, residual, w2, 1e-6, cast, offset, with_rstd)
            named = {"y": (y, expected[0]), "s": (s, expected[1])}
            if with_rstd:
                named |= {"rstd": (rstd, expected_rstd), "rstd2": (rstd2, expected[2])}
            for name, (a, b) in named.items():
                said = differing(a, b)
                assert not said, f"{name} of {shape}, {dtype}, {cast}, offset {offset}: {said}"


@contextmanager
def settings(**values: Any) -> Iterator[None]:
    """Changes thresholds in tiling.py, so that a small row takes the path of a wide one."""
    from rmsnorm.kernels.gpu import gated_planner, parts_planner, tiling
    from rmsnorm.kernels.gpu import planner as gpu

    cached = (
        tiling.forward, tiling.backward, tiling.dw_alone, tiling.sum_partials, gpu.plan_forward, gpu.plan_backward,
        tiling.gated_forward, tiling.gated_backward, tiling.gated_dw_alone, gated_planner.plan_gated_forward,
        gated_planner.plan_gated_backward, tiling.parts_forward, tiling.parts_backward,
        parts_planner.plan_begin_forward, parts_planner.plan_finish_forward, parts_planner.plan_begin_backward,
        parts_planner.plan_finish_backward,
    )  # fmt: skip

    def put(numbers: dict[str, Any]) -> None:
        for name, value in numbers.items():
            setattr(tiling, name, value)
        for function in cached:
            function.cache_clear()

    before = {name: getattr(tiling, name) for name in values}
    put(values)
    try:
        yield
    finally:
        put(before)


@contextmanager
def walked(widest: int, **others: int) -> Iterator[set[tuple[str, bool]]]:
    """Makes one program loop over rows wider than this.

    Yields the kernels that ran, each with whether its second tensor was present: for the kernels that loop, a residual
    or a gradient through s.
    """
    from rmsnorm.kernels.gpu.driver import Slot, TritonLaunch

    run, seen = TritonLaunch.run, set()

    def noted(launch: TritonLaunch, tensors: Any) -> None:
        seen.add((launch.kernel.__name__, len(launch.arguments) > 1 and isinstance(launch.arguments[1], Slot)))
        run(launch, tensors)

    widths = {"FORWARD_WIDEST": widest, "ADD_WIDEST": widest, "BACKWARD_WIDEST": {2: widest, 4: widest}}
    TritonLaunch.run = noted  # type: ignore[method-assign]
    try:
        with settings(**widths, ROOM=1 << 30, **others):
            yield seen
    finally:
        TritonLaunch.run = run  # type: ignore[method-assign]


WALKS = {("forward_loop", False), ("backward_loop", False)}
WALKS_OF_TWO = {("forward_loop", True), ("backward_loop", True)}


def sweep(widths: tuple[int, ...], rows: Callable[[int], int]) -> None:
    """Runs both dtypes and the specs in turn, with and without a residual."""
    for index, N in enumerate(widths):
        for dtype in (FP32, FP16):
            cast, offset = SPECS[index % len(SPECS)]
            M = rows(N)
            x, w = draw(M, N, dtype=dtype), draw(N, dtype=dtype)
            check(x, w, cast=cast, offset=offset, eps=(1e-6, 0.0, 1e-3)[index % 3])
            cast, offset = SPECS[(index + 1) % len(SPECS)]
            check(x, w, draw(M, N, dtype=dtype), ds=draw(M, N, dtype=dtype), cast=cast, offset=offset)


@case
def widths() -> None:
    sweep(WIDTHS, lambda N: 67 if N < 64 else 3)


@case
def heads_with_weights_of_their_own() -> None:
    forms = (((7,), 3, 64), ((2, 5), 4, 24), ((), 5, 1280), ((3,), 1, 8), ((40,), 3, 7), ((0,), 2, 8))
    for index, (shape, H, N) in enumerate(forms):
        for dtype, w_dtype in ((FP32, FP32), (FP16, FP16), (FP16, FP32)):
            cast, offset = SPECS[index % len(SPECS)]
            x, w = draw(*shape, H, N, dtype=dtype), draw(H, N, dtype=w_dtype)
            check(x, w, cast=cast, offset=offset, needs=(index % 2 == 0, True))
            cast, offset = SPECS[(index + 1) % len(SPECS)]
            residual, ds = draw(*x.shape, dtype=dtype), draw(*x.shape, dtype=dtype)
            check(x, w, residual, ds=ds, cast=cast, offset=offset)
    with settings(MULTIPROCESSORS=1):  # more heads than programs, and programs of several tiles
        check(draw(130, 3, 16), draw(3, 16))
        check(draw(3, 70, 65, dtype=FP16), draw(70, 65, dtype=FP16))
        check(draw(90, 2, 40), draw(2, 40), needs=(False, True))
    wide = draw(2, 3, 4, 64)
    for x in (wide.transpose(1, 2)[:, :2, :, 5:53], wide[:, :, ::2, :48], draw(48, 3, 2).permute(1, 2, 0)):
        check(x, draw(48, x.shape[-2]).t(), dy=x.flip(-1))
    with walked(32, PIECE=32, COLUMNS=64) as seen:
        check(draw(5, 3, 65), draw(3, 65))
        check(draw(5, 3, 65), draw(3, 65), draw(5, 3, 65), ds=draw(5, 3, 65))
    assert seen >= WALKS | WALKS_OF_TWO, seen


@case
def statistics_of_the_first_columns() -> None:
    forms = ((5, 64, 40), (3, 72, 1), (67, 65, 33), (2, 1280, 1279), (4, 97, 97), (1, 8, 4), (0, 8, 3), (3, 2049, 16))
    for index, (M, N, V) in enumerate(forms):
        for dtype in (FP32, FP16):
            cast, offset = SPECS[index % len(SPECS)]
            x, w = draw(M, N, dtype=dtype), draw(N, dtype=dtype)
            x[2:, V:] = torch.inf  # outside of the statistic
            check(x, w, cast=cast, offset=offset, V=V)
            cast, offset = SPECS[(index + 1) % len(SPECS)]
            residual, ds = draw(M, N, dtype=dtype), draw(M, N, dtype=dtype)
            weight = w if offset or index % 2 else None
            check(draw(M, N, dtype=dtype), weight, residual, ds=ds, cast=cast, offset=offset, V=V)
    check(draw(3, 4, 48), draw(4, 48), V=24)
    check(draw(4, 3, 48).transpose(0, 1)[..., 5:], draw(43), V=24)
    with walked(32, PIECE=32, COLUMNS=64) as seen:
        check(draw(5, 65), draw(65), V=40)
        check(draw(5, 65, dtype=FP16), draw(65), draw(5, 65, dtype=FP16), ds=draw(5, 65, dtype=FP16), V=33)
    assert seen >= WALKS | WALKS_OF_TWO, seen


@case
def rows_that_begin_anywhere_in_a_word() -> None:
    """Rows before and after are loaded with the words at the ends of a row, but do not affect it."""
    for index, (N, dtype) in enumerate(((65, FP32), (98, FP16), (72, FP16))):
        cast, offset = SPECS[index % 3]
        x = draw(67, N, dtype=dtype)
        x[3], x[8, 0], x[8, -1], x[64] = torch.nan, torch.inf, -torch.inf, torch.nan
        residual, ds = (draw(67, N, dtype=dtype), draw(67, N, dtype=dtype)) if index % 2 else (None, None)
        check(x, draw(N, dtype=dtype), residual, ds=ds, cast=cast, offset=offset)
    with settings(MULTIPROCESSORS=1):
        check(draw(300, 97, dtype=FP16), draw(97, dtype=FP16))
    check(draw(9, 104)[1:, 1:], draw(103))


@case
def rows_in_pieces() -> None:
    with walked(32, PIECE=32, COLUMNS=64) as seen:
        sweep((33, 63, 64, 65, 100, 127, 512), lambda N: 5)
    assert seen >= WALKS | WALKS_OF_TWO, seen


@case
def widths_beyond_the_widest_block() -> None:
    with settings(
        ROOM=1 << 30
    ):  # programs that share a row wait for each other, but the interpreter runs them sequentially
        sweep((16411,), lambda N: 2)


@case
def programs_and_their_tails() -> None:
    with settings(MULTIPROCESSORS=1):
        for M in (1, 2, 63, 64, 65, 191, 193, 300):
            for needs in ((True, True), (False, True)):
                check(draw(M, 31), draw(31), needs=needs)
                if M in (1, 65, 193):
                    check(draw(M, 513, dtype=FP16), draw(513, dtype=FP16), needs=needs)


@case
def every_row_counts() -> None:
    """dw of numbers whose fp32 sums are exact in any order: fails if a row is missing or counted twice."""
    from planned import Kernels
    from rmsnorm.kernels.gpu import planner as gpu

    with settings(MULTIPROCESSORS=1):
        shapes = ((1, 31), (300, 31), (67, 512), (19, 1281), (300, 3, 31), (41, 17, 64))  # the last two have heads
        for shape, dtype in itertools.product(shapes, (FP32, FP16)):
            x = torch.where(draw(*shape) < 0, -1.0, 1.0).to(dtype)
            dy = draw(*shape).round().clamp(-3, 3).to(dtype)
            expected = (x * dy).sum(0, dtype=torch.float64).to(dtype)
            w, rstd = draw(*shape[1:], dtype=dtype), torch.ones(shape[:-1])
            for needs in ((True, True), (False, True)):
                dw = Kernels(gpu).backward(dy, None, x, w, rstd, "early", 0.0, *needs)[1]
                assert not differing(dw, expected), f"{shape} {dtype} {needs}: {differing(dw, expected)}"


@case
def strides() -> None:
    N = 48
    wide = draw(4, 4, 3, 64)
    wide[..., N:] = torch.nan  # memory between the rows must not affect them
    views = (
        wide[..., :N],
        wide[:, :3, :, :N],
        wide.transpose(0, 1)[..., :N],
        wide.permute(2, 0, 1, 3)[..., :N],
        wide.flatten(0, 1)[:, 1::2, :N],
        wide.view(-1)[3 : 3 + 15 * N].view(15, N),
        wide[:1, :1, :1, :N].expand(2, 3, 4, N),
        wide.view(2, 2, 2, 2, 3, 64)[:, :, :, :, :2, :N].permute(3, 2, 1, 0, 4, 5),
        wide[0, 0, :, :N].t(),
        wide[0, 0, 0, :N],
        wide[0, 0, 0, :N].expand(1, 1, N),
    )
    for x in views:
        n = x.shape[-1]
        w = draw(2 * n)[::2]
        check(x, w)
        strided = draw(*x.shape[:-1], n + 3)[..., 1 : 1 + n]
        check(x, w, strided, ds=draw(*x.shape), cast="late", offset=1.0)
        check(strided, w, x, ds=strided, dy=strided)
    x, w = draw(7, N), draw(N)
    for dy in (torch.ones(()).expand(7, N), draw(7, 1).expand(7, N), draw(1, N).expand(7, N), draw(N, 7).t()):
        check(x, w, dy=dy)
    with walked(16, PIECE=16, COLUMNS=16) as seen:
        for x in views[:4]:
            check(x, draw(x.shape[-1]), x.flip(-1), ds=x)
    assert seen >= WALKS_OF_TWO, seen


@case
def rows_that_begin_more_than_2_31_elements_apart() -> None:
    step, N = 1 << 30, 33
    with tempfile.TemporaryDirectory() as folder:
        # A sparse file, of which only the pages of the rows take memory.
        store = torch.from_file(f"{folder}/numbers", shared=True, size=2 * step + 128, dtype=FP16)
        for shape, strides in (((3, N), (step, 1)), ((2, 3, N), (64, step, 1))):
            x = store.as_strided(shape, strides)
            x.copy_(draw(*shape))
            w, near = draw(N, dtype=FP16), draw(*shape, dtype=FP16)
            for widest in (16384, 16):
                with walked(widest, PIECE=16, COLUMNS=16):
                    check(x, w)
                    check(near, w, x, ds=x, dy=x)
                    check(near, w, dy=x, needs=(False, True))
                    check_sum([near, x, x], x, near, w)
            for loops in ({}, LOOPS):
                with settings(**loops):
                    check_gated(x, x, w, 1, groups=3, dy=x)


@case
def dtypes_that_differ() -> None:
    for x, w in ((FP32, FP16), (FP16, FP32)):
        for cast, offset in SPECS:
            check(draw(5, 100, dtype=x), draw(100, dtype=w), cast=cast, offset=offset)
    check(draw(5, 100, dtype=FP16), draw(100, dtype=torch.bfloat16), needs=(True, False))
    check(draw(5, 100, dtype=FP16), draw(100, dtype=FP16), draw(5, 100), ds=draw(5, 100))
    check(draw(5, 100), draw(100, dtype=FP16), draw(5, 100, dtype=FP16), ds=draw(5, 100))
    for dtype in (FP32, FP16):
        check(draw(5, 100, dtype=dtype), None)
        check(draw(5, 100, dtype=dtype), None, draw(5, 100, dtype=dtype), cast="late")


def check_sum(
    dy: list[Tensor],
    ds: Tensor | None,
    x: Tensor,
    w: Tensor | None,
    *,
    cast: str = "early",
    offset: float = 0.0,
    needs: tuple[bool, bool] = (True, True),
) -> None:
    """Compares the backward pass of a sum with additions by torch around that of the same kernels; dw too, bit for bit."""
    from planned import Kernels
    from rmsnorm.kernels.gpu import planner as gpu

    kernels, rstd = Kernels(gpu), draw(*x.shape[:-1], 1).abs().squeeze(-1)
    arguments = x, w, rstd, cast, offset, needs[0], needs[1] and w is not None
    with guarded() as buffers:
        got = kernels.backward_of_sum(dy, ds, *arguments)
    assert buffers or not any(arguments[-2:]), "no output is guarded"
    dx, dw = kernels.backward(sum(dy[1:], dy[0]), None, *arguments)
    dx = dx if dx is None or ds is None else (dx + ds).contiguous()
    said = {name: differing(a, b) for name, a, b in zip(("dx", "dw"), got, (dx, dw), strict=True)}
    assert not any(said.values()), f"{len(dy)} of {tuple(x.shape)} {x.dtype} {cast} {offset} {needs}: {said}"


@case
def sums_of_gradients() -> None:
    for index, (N, count, dtype) in enumerate(itertools.product((3, 100, 1279, 1280), (1, 2, 3), (FP32, FP16))):
        cast, offset = SPECS[index % len(SPECS)]
        needs = ((True, True), (True, False), (False, True))[index // 2 % 3]
        x, w = draw(5, N, dtype=dtype), draw(N, dtype=dtype)
        dy, ds = [draw(5, N, dtype=dtype) for _ in range(count)], draw(5, N, dtype=dtype)
        check_sum(dy, ds, x, w, cast=cast, offset=offset, needs=needs)
        check_sum(dy, None, x, w if index % 2 else None, cast=cast, needs=needs)
    heads = [draw(7, 3, 40) for _ in range(5)]
    check_sum(heads[:3], heads[3], heads[4], draw(3, 40))


@case
def sums_of_gradients_of_any_strides() -> None:
    N = 48
    for dtype in (FP32, FP16):
        wide = draw(2, 3, 2, 64, dtype=dtype)
        wide[..., N:] = torch.nan
        views = (
            wide[..., :N],
            draw(3, 2, 2, N, dtype=dtype).transpose(0, 1),
            draw(2, 3, 2, N, dtype=dtype),
            draw(1, 3, 1, N, dtype=dtype).expand(2, 3, 2, N),
            draw(2, 3, 2, N, dtype=dtype).transpose(0, 2).contiguous().transpose(0, 2),
            draw(N, 2, 3, 2, dtype=dtype).permute(1, 2, 3, 0),
        )
        for i in range(len(views)):
            a, b, c, d, x = (views[(i + k) % len(views)] for k in range(5))
            check_sum([a, b, c], d, x, draw(N, dtype=dtype))
            check_sum([a, b], None, x, draw(N, dtype=dtype), needs=(False, True))
    x = draw(5, N, dtype=FP16)
    check_sum([draw(5, N) for _ in range(3)], x, x, draw(N, dtype=FP16))  # of another dtype than y


@case
def sums_of_gradients_of_wide_rows() -> None:
    with walked(32, PIECE=32, COLUMNS=64) as seen:
        for N, count, dtype in itertools.product((33, 64, 100), (2, 3), (FP32, FP16)):
            x, w = draw(5, N, dtype=dtype), draw(N, dtype=dtype)
            dy = [draw(5, N, dtype=dtype) for _ in range(count)]
            check_sum(dy, x.flip(-1), x, w)
            check_sum([t[:, : N - 1] for t in dy], None, x[:, 1:], w[1:], cast="late", offset=1.0)
            check_sum([t[:0] for t in dy], None, x[:0], w)
    assert {name for name, _ in seen} >= {"sum_gradients", "backward_loop", "dw_alone"}, seen


@case
def only_what_is_needed() -> None:
    for block in (16384, 32):
        with walked(block, PIECE=32):
            for needs in ((True, False), (False, True), (False, False)):
                check(draw(9, 65), draw(65), ds=draw(9, 65), needs=needs, with_rstd=False)


@case
def no_rows_or_one() -> None:
    for shape in ((0, 33), (3, 0, 33), (1, 33), (33,), (0, 1), (1, 1), (1,)):
        for needs in ((True, True), (False, True)):
            check(draw(*shape), draw(shape[-1]), needs=needs)
            check(draw(*shape, dtype=FP16), draw(shape[-1], dtype=FP16), draw(*shape, dtype=FP16), needs=needs)


@case
def extremes() -> None:
    inf, nan = torch.inf, torch.nan
    for dtype, tiny, huge in ((FP32, 1e-40, 3e38), (FP16, 6e-8, 65504.0)):
        N = 21
        x = draw(12, N, dtype=dtype)
        x[0, 1], x[1, 2], x[2, 3], x[3, 4] = inf, -inf, nan, huge
        x[4], x[5], x[6], x[7] = 0.0, -0.0, tiny, huge
        x[8] = (
            draw(1, N)[0].abs() * 1e-24
        )  # the mean of squares underflows in fp32, so rstd is inf although x is not zero
        w, dy = draw(N, dtype=dtype), draw(12, N, dtype=dtype)
        w[0], w[1], w[2], w[3] = -0.0, inf, nan, tiny
        dy[8] = dy[8].abs()
        dy[9, 0], dy[10, 1] = inf, nan
        for eps in (0.0, 1e-6):
            for cast, offset in SPECS:
                for weight in (w, w.nan_to_num(1.0, 1.0).abs()):
                    check(x, weight, eps=eps, cast=cast, offset=offset, dy=dy)
                    with walked(16, PIECE=16, COLUMNS=16):
                        check(x, weight, eps=eps, cast=cast, offset=offset, dy=dy, ds=dy)


def check_parts(*given: Tensor | None, at: tuple[int, ...], **options: Any) -> None:
    """As `check`, for rows in parts that begin at these columns besides the first."""
    from planned import InParts, PartsKernels
    from rmsnorm.kernels.gpu import parts_planner

    bounds = (0, *at, given[0].shape[-1])
    columns = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    check(*given, kernels=InParts(PartsKernels(parts_planner), columns), **options)


@case
def parts_of_rows() -> None:
    """Aligned or not, with and without a residual; also parts whose rows begin anywhere in a word."""
    for index, (N, at) in enumerate(((2, (1,)), (64, (32,)), (100, (33, 34)), (1280, (640,)), (2047, (1000,)))):
        for dtype in (FP32, FP16):
            M = 9 if N <= 64 else 2
            x, w = draw(M, N, dtype=dtype), draw(N, dtype=dtype)
            cast, offset = SPECS[index % len(SPECS)]
            check_parts(x, w, at=at, cast=cast, offset=offset, eps=(1e-6, 0.0, 1e-3)[index % 3])
            cast, offset = SPECS[(index + 1) % len(SPECS)]
            residual, ds = draw(M, N, dtype=dtype), draw(M, N, dtype=dtype)
            check_parts(x, w, residual, at=at, ds=ds, cast=cast, offset=offset)
            check_parts(x, None, at=at, cast=cast)


@case
def parts_that_are_contiguous() -> None:
    """As DTensors hold them, so that rows of any width are loaded in whole words."""
    from planned import PartsKernels
    from rmsnorm import reference
    from rmsnorm.kernels.gpu import parts_planner

    kernels = PartsKernels(parts_planner)
    for N, dtype in ((97, FP16), (65, FP32), (1280, FP16)):
        x, w, dy = draw(67, N, dtype=dtype), draw(N, dtype=dtype), draw(67, N, dtype=dtype)
        x[3], x[8, 0], x[64] = torch.nan, torch.inf, torch.nan
        with guarded():
            s, S = kernels.begin_forward(x, x)
        expected_s, expected_S = reference.begin_forward(x, x)
        assert not differing(s, expected_s)
        torch.testing.assert_close(S, expected_S, rtol=1e-14, atol=0, equal_nan=True)
        with guarded():
            y, rstd = kernels.finish_forward(x, w, expected_S, 3 * N, 1e-6, "early", 0.0, True)
        expected_y, expected_rstd = reference.finish_forward(x, w, expected_S, 3 * N, 1e-6, "early", 0.0, True)
        assert not differing(y, expected_y)
        assert not differing(rstd, expected_rstd)
        with guarded():
            S = kernels.begin_backward(dy, x, w, rstd, "early", 0.0)
        expected_S = reference.begin_backward(dy, x, w, rstd, 0.0)
        torch.testing.assert_close(S, expected_S, rtol=1e-9, atol=1e-9, equal_nan=True)
        with guarded():
            dx, dw = kernels.finish_backward(dy, x, x, w, rstd, expected_S, 3 * N, "early", 0.0, True)
        right = reference.finish_backward(dy, x, x, w, rstd, expected_S, 3 * N, "early", 0.0, True)
        assert not differing(dx, right[0])
        terms = tolerance.sums_of_dw(dy, x, rstd, "early")
        assert not tolerance.dw_too_far_off(dw, *terms, 67)


@case
def wide_parts() -> None:
    """One program takes several pieces of a row before the all-reduce, and several programs share it after that."""
    with settings(FORWARD_WIDEST=32, BACKWARD_WIDEST={2: 32, 4: 32}, WIDTH_OF_WIDE=16):
        for index, (N, dtype) in enumerate(itertools.product((64, 100, 127), (FP32, FP16))):
            cast, offset = SPECS[index % len(SPECS)]
            x, w = draw(5, N, dtype=dtype), draw(N, dtype=dtype)
            check_parts(x, w, at=(N // 2,), cast=cast, offset=offset)
            check_parts(x, w, x.flip(-1), at=(N // 3,), ds=x.flip(0), cast=cast, offset=offset)


@case
def parts_of_any_strides_and_dtypes() -> None:
    wide = draw(4, 3, 2, 64)
    wide[..., 48:] = torch.nan  # memory between the rows must not affect them
    views = (
        wide[..., :48],
        wide.transpose(0, 1)[..., :48],
        wide[:, 1:, :, :48],
        wide[0, 0, :, :48].t(),
        wide[0, 0, 0, :48],
        wide[:1, :1, :1, :48].expand(2, 3, 4, 48),
    )
    for x in views:
        n = x.shape[-1]
        check_parts(x, draw(2 * n)[::2], draw(*x.shape), at=(n // 2,), ds=x, cast="late", offset=1.0)
        check_parts(x, draw(n), at=(n // 2,), dy=draw(n).expand(x.shape))
    for x_dtype, w_dtype, residual in ((FP32, FP16, FP16), (FP16, FP32, FP32), (FP16, FP32, FP16)):
        for cast, offset in SPECS:
            x, w, other = draw(5, 100, dtype=x_dtype), draw(100, dtype=w_dtype), draw(5, 100, dtype=residual)
            ds = draw(5, 100, dtype=torch.promote_types(x_dtype, residual))
            check_parts(x, w, other, at=(50,), ds=ds, cast=cast, offset=offset)
    for shape in ((0, 33), (3, 0, 33), (33,)):
        check_parts(draw(*shape), draw(33), draw(*shape), at=(11,), needs=(True, False), with_rstd=False)
        check_parts(draw(*shape), draw(33), at=(11,))
    with settings(MULTIPROCESSORS=1):
        check_parts(draw(300, 96, dtype=FP16), draw(96, dtype=FP16), at=(32,))


FORMS_OF_GATE = tuple(itertools.product(("early", "late"), ("silu", "sigmoid"), (False, True)))


def check_gated(
    x: Tensor,
    gate: Tensor,
    w: Tensor | None,
    form: int,
    *,
    groups: int = 1,
    eps: float = 1e-6,
    dy: Tensor | None = None,
    with_rstd: bool = True,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> None:
    """Compares both passes of a gated norm with the reference, and checks the memory around the outputs."""
    from planned import GatedKernels
    from rmsnorm import gated_reference as reference
    from rmsnorm.kernels.gpu import gated_planner
    from rmsnorm.spec import Gate, Spec

    cast, activation, first = FORMS_OF_GATE[form % len(FORMS_OF_GATE)]
    spec = Spec(eps, cast, gate=Gate(activation, first), groups=groups)
    kernels = GatedKernels(gated_planner)
    with guarded() as buffers:
        got = kernels.forward(x, gate, w, spec, with_rstd)
    assert buffers, "no output is guarded"
    y, rstd = reference.forward(x, gate, w, spec, True)
    assert rstd is not None
    wrong = {"y": differing(got[0], y), "rstd": differing(got[1], rstd if with_rstd else None)}
    dy = draw(*y.shape, dtype=y.dtype) if dy is None else dy
    needs = (*needs[:2], needs[2] and w is not None)
    with guarded():
        gradients = kernels.backward(dy, x, gate, w, rstd, spec, *needs)
    right = reference.backward(dy, x, gate, w, rstd, spec, *needs)
    wrong |= {name: differing(a, b) for name, a, b in zip(("dx", "dgate"), gradients, right, strict=False)}
    if needs[2]:
        sums = tolerance.sums_of_gated_dw(dy, x, gate, rstd, spec)
        count = tolerance.dw_too_far_off(gradients[2], *sums, x.shape[:-1].numel())
        wrong["dw"] = f"{count} are too far off" if count else ""
    said = {name: what for name, what in wrong.items() if what}
    assert not said, f"{tuple(x.shape)} {x.dtype} {gate.dtype} {spec} {needs}: {said}"


# A table for any number of gates, and rows that one program loops over.
TABLES = {"TABLE_LEAST": 0, "TABLE_PIECE": 1 << 16}
LOOPS = {"GATED_FORWARD_WIDEST": 16, "GATED_BACKWARD_WIDEST": 16, "GATED_PIECE": 16, "COLUMNS": 16}


def gates(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Random gates, of which many are large."""
    return (torch.randn(*shape, generator=_random) * 6).to(dtype)


@case
def gated_forms_and_widths() -> None:
    for form, (N, groups) in itertools.product(range(8), ((1, 1), (24, 3), (61, 1), (1282, 2))):
        dtype = FP16 if (form + N) % 2 else FP32
        w = draw(N, dtype=dtype) if form % 3 else None
        check_gated(draw(2, N, dtype=dtype), gates(2, N, dtype=dtype), w, form, groups=groups)


@case
def gated_with_a_table() -> None:
    with settings(**TABLES):
        for form in (0, 3, 5, 6):
            dtype = FP16 if form % 3 else FP32
            check_gated(draw(5, 96, dtype=dtype), gates(5, 96, dtype=FP16), draw(96, dtype=dtype), form, groups=3)
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(FP16).view(16, 4096)
        for form in (0, 2):
            check_gated(draw(16, 4096), every, draw(4096), form, dy=torch.ones(16, 4096))


@case
def gated_rows_in_pieces() -> None:
    for tables, form in itertools.product(({}, TABLES), range(8)):
        with settings(**LOOPS, **tables):
            N, groups, dtype = (51, 3, FP16) if form % 2 else (33, 1, FP32)
            w = draw(N, dtype=dtype) if form % 3 else None
            check_gated(draw(2, N, dtype=dtype), gates(2, N, dtype=dtype), w, form, groups=groups)


@case
def gated_programs_and_their_tails() -> None:
    with settings(MULTIPROCESSORS=1):
        for M, (N, groups) in itertools.product((1, 193), ((31, 1), (96, 3))):
            for needs in ((True, True, True), (False, False, True)):
                check_gated(draw(M, N, dtype=FP16), gates(M, N), draw(N), M, groups=groups, needs=needs)


@case
def gated_dtypes_that_differ() -> None:
    for form, (x, gate, w) in enumerate(itertools.product((FP32, FP16), repeat=3)):
        for other in (form, form + 1):
            check_gated(draw(5, 100, dtype=x), gates(5, 100, dtype=gate), draw(100, dtype=w), other, groups=2)


@case
def gated_strides() -> None:
    N = 48
    wide = gates(2, 3, 2, 128)
    wide[..., N : 128 - N] = torch.nan  # memory between the rows must not affect them
    transposed, whole, sliced, one = (
        lambda t: t.transpose(0, 1),
        lambda t: t,
        lambda t: t[:, 1:3],
        lambda t: t[0, :1, 0],
    )
    for settings_, views in (({}, (transposed, whole, sliced, one)), (LOOPS, (transposed,))):
        with settings(**settings_):
            for i, view in enumerate(views):
                x, gate = view(wide)[..., :N], view(wide)[..., 128 - N :]
                for groups in (1, 4):
                    check_gated(x, gate, draw(2 * N)[::2], 3 * i + groups, groups=groups)
                    dy = draw(1, N).expand(x.shape)
                    check_gated(x, gate.flip(-1), None, 3 * i + groups + 1, groups=groups, dy=dy)


@case
def gated_only_what_is_needed() -> None:
    for i, settings_ in enumerate(({}, LOOPS, TABLES)):
        with settings(**settings_):
            for j, needs in enumerate(itertools.product((True, False), repeat=3)):
                x, gate = draw(2, 51, dtype=FP16), gates(2, 51, dtype=FP16)
                check_gated(x, gate, draw(51, dtype=FP16), i + j, groups=3, needs=needs, with_rstd=False)


@case
def gated_without_rows_or_with_one() -> None:
    for shape, form in itertools.product(((0, 33), (3, 0, 33), (33,), (1, 1)), (0, 5)):
        for settings_ in ({}, LOOPS):
            with settings(**settings_):
                check_gated(draw(*shape), gates(*shape), draw(shape[-1]), form, groups=shape[-1])


@case
def gated_extremes() -> None:
    inf, nan = torch.inf, torch.nan
    for form, dtype in itertools.product(range(8), (FP32, FP16)):
        special = [0.0, -0.0, 60.0, -60.0, 61.0, -104.0, -150.0, -200.0, -201.0, 88.0, -88.0, 1e-40, -1e-40, 6e-8, 1e30]
        x, gate, w = draw(12, 24, dtype=dtype), gates(12, 24, dtype=dtype), draw(24, dtype=dtype)
        gate[0, :15] = torch.tensor(special).clamp(-60000.0, 60000.0).to(dtype)
        gate[1, 1], gate[2, 2], gate[3, 3], x[4, 4], x[5, 5], x[6, 6] = inf, -inf, nan, inf, -inf, nan
        x[7], gate[8], gate[9] = 0.0, 0.0, -0.0
        x[10], gate[10] = (draw(1, 24)[0] * 1e-20).to(dtype), gate[0]
        infinite = w.index_fill(0, torch.tensor([2]), inf)
        for weight, eps, tables in ((w, 0.0, {}), (infinite, 1e-6, {}), (infinite, 0.0, TABLES)):
            with settings(**tables):
                check_gated(x, gate, weight, form, groups=2, eps=eps)


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> dict[str, str]:
    """The errors of each case whose test was selected."""
    here = Path(__file__).resolve()
    names = [item.callspec.params["name"] for item in request.session.items if item.path == here]
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join(filter(None, (str(root / "src"), str(root / "tests"), os.environ.get("PYTHONPATH"))))
    process = subprocess.run(
        [sys.executable, __file__, *names],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    result: dict[str, str] = json.loads(process.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_have_the_bits_of_the_reference(name: str, interpreted: dict[str, str]) -> None:
    assert interpreted[name] == ""


def main() -> None:
    import traceback

    result = {}
    for name in sys.argv[1:]:
        try:
            CASES[name]()
            result[name] = ""
        except Exception:  # reported by the test of this case
            result[name] = traceback.format_exc()[-3000:]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
