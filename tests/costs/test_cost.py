"""`cost`: each count equals a trace of the running code, and the trace notices wrong formulas."""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import drawn
import trace_cost
from rmsnorm import Cost, cost, reference
from rmsnorm.costs import counts as counting
from rmsnorm.costs import eager, ours, torch_norms
from rmsnorm.costs.case import RECOMPUTED, Case
from rmsnorm.costs.tape import Tape
from rmsnorm.kernels.gpu import tiling
from rmsnorm.kernels.plan import Backward, Forward, TensorKind
from rmsnorm.spec import Spec
from trace_cost import ReadRun, Run, Watch, saved_bytes, traced

B, H, F = torch.bfloat16, torch.float16, torch.float32
EARLY, LATE, OFFSET = ("early", 0.0), ("late", 0.0), ("late", 1.0)
DTYPES = ((B, B), (F, F), (B, F), (F, B), (H, B), (B, None))
SHAPES = ((64, 1000), (2, 3, 5), (300, 33), (5, 1), (7,), (1, 1))
FIELDS = ("flops", "read", "written", "kernels", "saved", "peak")

other_torch = pytest.mark.skipif(
    torch.__version__.split("+")[0] != counting.TRACED_TORCH,
    reason=f"PyTorch's own operators were counted in torch {counting.TRACED_TORCH}; "
    f"{torch.__version__} may decompose otherwise: trace it, adapt costs/eager.py and costs/torch_norms.py, and set TRACED_TORCH",
)


def cases() -> list[Any]:
    found = []
    for implementation in counting.IMPLEMENTATIONS:
        own = implementation.startswith("ours")
        for cast, offset in (EARLY, LATE, OFFSET) if own or implementation == "eager" else (EARLY,):
            for x, w in DTYPES:
                if (w is None and offset) or (implementation == "LayerNorm" and w not in (x, F, None)):
                    continue
                names = [str(d).removeprefix("torch.") for d in (x, w)]
                label = "-".join([implementation, cast, f"{offset:g}", *names])
                marks = () if own else (other_torch,)
                found.append(pytest.param(implementation, cast, offset, x, w, id=label, marks=marks))
    return found


def counted(shape: tuple[int, ...], x: torch.dtype, w: torch.dtype | None, **options: Any) -> Cost:
    return cost(shape, x, w, elementwise_affine=w is not None, **options)


def wrong(
    implementation: str, cast: str, offset: float, x: torch.dtype, w: torch.dtype | None, shape: Any,
    by_head: bool = False,
) -> list[str]:  # fmt: skip
    """The counts that differ from the trace, one line each."""
    found = []
    for phase in counting.PHASES:
        c = counted(shape, x, w, implementation=implementation, phase=phase, cast=cast, offset=offset, by_head=by_head)
        assert not c.derived
        trace = traced(Run.of(shape, x, w, implementation, cast, offset, by_head=by_head), phase)
        fields = (
            FIELDS if implementation in ("eager", "F.rms_norm") else FIELDS[1:]
        )  # of the others a trace sees no arithmetic
        for field in fields:
            if getattr(c, field) != trace[field]:
                found.append(f"{shape} {phase} {field}: counted {getattr(c, field)}, traced {trace[field]}")
    return found


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize(("implementation", "cast", "offset", "x", "w"), cases())
def test_every_count_equals_a_trace_of_the_running_code(implementation, cast, offset, x, w) -> None:
    assert [line for shape in SHAPES for line in wrong(implementation, cast, offset, x, w, shape)] == []


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@given(
    st.lists(st.integers(1, 40), max_size=2).map(tuple), st.integers(1, 700), drawn.dtypes, st.none() | drawn.dtypes,
    st.sampled_from(("ours", "ours+residual")), drawn.specs, st.booleans(),
)  # fmt: skip
def test_every_count_of_a_generated_call_equals_a_trace(leading, N, x, w, implementation, spec, by_head) -> None:
    if w is None and spec[1]:
        spec = LATE
    assert wrong(implementation, *spec, x, w, (*leading, N), by_head and bool(leading) and w is not None) == []


@pytest.mark.parametrize(("x", "w"), [of for of in DTYPES if of[1] is not None])
def test_every_count_for_heads_with_weights_of_their_own_equals_a_trace(x, w) -> None:
    shapes = (64, 3, 1000), (2, 70, 5), (5, 300, 33), (1, 7), (3, 1, 9), (2000, 2, 8)
    for name, (cast, offset) in itertools.product(("ours", "ours+residual"), (EARLY, OFFSET)):
        assert [line for shape in shapes for line in wrong(name, cast, offset, x, w, shape, by_head=True)] == []


def test_heads_with_weights_of_their_own_have_so_many_parameters() -> None:
    one, many = (cost((5, 4, 8), F, phase="backward", by_head=by_head) for by_head in (False, True))
    assert (one.parameters, many.parameters, many.gradients, many.optimizer) == (32, 128, 128, 260)
    assert many.least - one.least == 2 * (128 - 32)


READ_FIELDS = tuple(field for field in FIELDS if field != "flops")


def random_shapes(count: int) -> list[tuple[int, ...]]:
    """Shapes of up to three dimensions, the same in every run."""
    draw = random.Random(22)
    return [(*(draw.randint(1, 40) for _ in range(draw.randint(0, 2))), draw.randint(1, 700)) for _ in range(count)]


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("x", "w"), DTYPES)
def test_every_count_with_recompute_equals_a_trace_in_which_another_operator_reads_y(adds, x, w) -> None:
    name: Any = "ours+residual" if adds else "ours"
    for shape in random_shapes(4):
        run = ReadRun.reading(Run.of(shape, x, w, name, "early", 0.0), recompute=True)
        for phase in counting.PHASES:
            c = counted(shape, x, w, implementation=name, phase=phase, recompute=True)
            trace = traced(run, phase)
            assert [getattr(c, field) for field in READ_FIELDS] == [trace[field] for field in READ_FIELDS], (
                shape,
                phase,
            )


@pytest.mark.parametrize(("implementation", "cast", "offset", "x", "w"), cases())
def test_the_bytes_that_readers_of_y_save_equal_a_trace(implementation, cast, offset, x, w) -> None:
    for shape in random_shapes(3):
        run = Run.of(shape, x, w, implementation, cast, offset)
        options: Any = {"implementation": implementation, "cast": cast, "offset": offset}
        for recompute in (False, True) if implementation in RECOMPUTED else (False,):
            with_reader = saved_bytes(ReadRun.reading(run, recompute))
            costs = [counted(shape, x, w, phase=phase, recompute=recompute, **options) for phase in counting.PHASES]
            assert [c.saved + c.saved_by_readers for c in costs] == [0, with_reader, with_reader], (shape, recompute)
            assert with_reader - saved_bytes(run) == costs[1].saved_by_readers


def test_recompute_adds_a_forward_call_to_the_backward_pass_and_frees_y() -> None:
    M, N = 8192, 1280
    for device in ("cpu", "cuda"):
        plain, again = (cost((M, N), phase="backward", device=device, recompute=r) for r in (False, True))
        inference = cost((M, N), device=device)
        assert again.terms[0].what == "recompute y"
        assert again.terms[1:] == plain.terms
        for field in ("flops", "read", "written", "kernels", "least"):
            assert getattr(again, field) == getattr(plain, field) + getattr(inference, field), field
        assert (plain.saved_by_readers, again.saved_by_readers) == (2 * M * N, 0)
        assert again.saved == plain.saved
        assert plain.peak - again.peak == 2 * M * N  # dx and partial sums need more than y and its scratch memory
        forward = [cost((M, N), phase="forward", device=device, recompute=r) for r in (False, True)]
        assert forward[0] == replace(forward[1], saved_by_readers=2 * M * N)


def test_the_number_of_partial_sums_is_that_of_the_cpu_kernel() -> None:
    from rmsnorm.kernels.cpu import planner as cpu

    for M, N in ((1, 1), (31, 7), (33, 100000), (8192, 1280), (70000, 3), (9000, 1280)):
        x, w, rstd = (TensorKind.dense(shape, torch.bfloat16) for shape in ((M, N), (N,), (M,)))
        plan = cpu.plan_backward(Backward(torch.device("cpu"), x, None, x, w, rstd, Spec(), True, True))
        (partials,) = (t for t in plan.fresh if t.name == "partials")
        case = Case(M, N, B, B, "ours", "backward", "cpu", "early", 0.0)
        assert ours.cpu_chunks(case) == partials.shape[0], (M, N)


@other_torch
@pytest.mark.parametrize("threads_used", [1, 3])
def test_the_peak_of_layer_norm_follows_the_number_of_threads(threads_used, threads) -> None:
    threads(threads_used)
    trace = traced(Run.of((64, 40), B, B, "LayerNorm", "early", 0.0), "backward")
    assert cost((64, 40), B, implementation="LayerNorm", phase="backward").peak == trace["peak"]
    assert cost((64, 40), B, implementation="LayerNorm", phase="backward", threads=threads_used).peak == trace["peak"]


# --- the FLOPs of norms that are one operator ----------------------------------------------------------------


def watched(call: Callable[[], object]) -> int:
    watch = Watch()
    with torch.no_grad(), watch:
        call()
    return sum(seen.flops for seen in watch.seen)


@pytest.mark.parametrize(
    ("cast", "offset", "affine"), [(*EARLY, True), (*LATE, True), (*OFFSET, True), (*EARLY, False), (*LATE, False)]
)
@pytest.mark.parametrize("adds", [False, True])
def test_the_flops_of_our_kernels_are_those_of_the_reference(cast, offset, affine, adds, randn) -> None:
    x, residual, dy, ds = (randn(6, 9, dtype=B) for _ in range(4))
    w = randn(9, dtype=B) if affine else None
    spec = (w, 1e-6, cast, offset)
    name: Any = "ours+residual" if adds else "ours"
    options: Any = {"implementation": name, "cast": cast, "offset": offset, "elementwise_affine": affine}
    forward = watched(lambda: reference.forward(x, residual if adds else None, *spec, True))
    assert cost((6, 9), phase="forward", **options).flops == forward
    rstd = reference.exact_rstd(x, 1e-6)
    backward = watched(lambda: reference.backward(dy, ds if adds else None, x, w, rstd, cast, offset, True, affine))
    assert cost((6, 9), phase="backward", **options).flops == backward


@pytest.mark.parametrize("affine", [False, True])
def test_the_flops_of_a_fused_norm_are_those_of_its_formula(affine, randn) -> None:
    x, dy = randn(6, 9), randn(6, 9)
    w, b = (randn(9) if affine else None for _ in range(2))

    def mean(t: Tensor) -> Tensor:
        return t.mean(-1, keepdim=True)

    def layer_norm() -> None:
        centred = x - mean(x)
        y = centred * torch.rsqrt(mean(centred.square()) + 1e-6)
        if w is not None:
            y * w + b

    rstd, at = randn(6, 1), randn(6, 1)

    def layer_norm_backward() -> None:
        xh = (x - at) * rstd
        g = dy if w is None else dy * w
        rstd * (g - mean(g) - xh * mean(g * xh))
        if w is not None:
            (dy * xh).sum(0), dy.sum(0)

    def rms_norm() -> None:
        h = x * torch.rsqrt(mean(x.square()) + 1e-6)
        if w is not None:
            h * w

    def rms_norm_backward() -> None:
        xh = x * rstd
        g = dy if w is None else dy * w
        rstd * (g - xh * mean(g * xh))
        if w is not None:
            (dy * xh).sum(0)

    def count(implementation: Any, phase: Any, device: str) -> int:
        return cost(
            (6, 9), F, implementation=implementation, phase=phase, device=device, elementwise_affine=affine
        ).flops

    assert count("LayerNorm", "forward", "cpu") == watched(layer_norm)
    assert count("LayerNorm", "backward", "cpu") == watched(layer_norm_backward)
    assert count("F.rms_norm", "forward", "cuda") == watched(rms_norm)
    assert count("F.rms_norm", "backward", "cuda") == watched(rms_norm_backward)


# --- figures worked out by hand ------------------------------------------------------------------------------


def test_the_counts_of_8192_by_1280_are_those_worked_out_by_hand() -> None:
    """One batch of 8192 tokens with a hidden size of 1280 in bf16."""
    M, d = 8192, 1280
    E = M * d
    forward, backward = (cost((1, M, d), implementation="eager", phase=phase) for phase in ("forward", "backward"))
    assert forward.flops == 4 * E + 2 * M == 41_959_424
    assert backward.flops == 10 * E + 3 * M - d == 104_880_896
    assert forward.moved == 36 * E + 24 * M + 2 * d == 377_686_528
    assert backward.moved == 92 * E + 40 * M + 4 * d == 965_022_720
    assert (forward.kernels, backward.kernels) == (8, 16)
    assert forward.saved == 6 * E + 4 * M == 62_947_328
    assert (forward.peak, backward.peak) == (12 * E + 8 * M, 26 * E + 2 * d)
    assert cost((1, M, d), implementation="eager").peak == 8 * E + 8 * M
    late = [cost((1, M, d), implementation="eager", cast="late", phase=phase) for phase in counting.PHASES]
    assert [c.moved for c in late] == [40 * E + 24 * M + 2 * d] * 2 + [104 * E + 40 * M + 12 * d]
    assert late[1].saved == 8 * E + 4 * M
    assert [c.peak for c in late] == [10 * E + 4 * M, 14 * E + 8 * M, 26 * E + 2 * d]
    fused = [cost((1, M, d), phase=phase) for phase in counting.PHASES]
    assert [c.moved for c in fused[:2]] == [4 * E + 2 * d, 4 * E + 2 * d + 4 * M]
    assert fused[2].least == 6 * E + 4 * M + 4 * d
    assert fused[1].saved == 2 * E + 4 * M == 21_004_288
    assert fused[0].peak == 2 * E


@pytest.mark.parametrize("dtype", [B, F])
def test_the_least_is_every_argument_and_result_once(dtype) -> None:
    M, N, e = 24, 40, dtype.itemsize
    inference, forward, backward = (cost((M, N), dtype, phase=phase) for phase in counting.PHASES)
    assert inference.least == inference.moved == 2 * M * N * e + N * e
    assert forward.least == forward.moved == inference.least + 4 * M
    assert backward.least == 3 * M * N * e + 2 * N * e + 4 * M
    residual = [cost((M, N), dtype, implementation="ours+residual", phase=phase) for phase in counting.PHASES]
    assert [r.least - o.least for r, o in zip(residual, (inference, forward, backward), strict=True)] == [
        2 * M * N * e, 2 * M * N * e, M * N * e,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [B, F])
@pytest.mark.parametrize("make", [nn.RMSNorm, nn.LayerNorm])
def test_parameters_gradients_and_optimizer_state_are_those_that_adamw_holds(dtype, make) -> None:
    layer = make(48).to(dtype)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(4, 48, dtype=dtype)).sum().backward()
    optimizer.step()
    state = [t for of_one in optimizer.state.values() for t in of_one.values()]
    c = cost((4, 48), dtype, implementation="LayerNorm" if make is nn.LayerNorm else "F.rms_norm")
    parameters = list(layer.parameters())
    assert c.parameters == sum(p.nbytes for p in parameters)
    assert c.gradients == sum(p.grad.nbytes for p in parameters)
    assert c.optimizer == sum(t.nbytes for t in state)


def test_master_weights_and_their_moments_are_fp32() -> None:
    assert cost((4, 48), B, master=True).optimizer == 3 * 4 * 48 + 4
    assert cost((4, 48), F, master=True).optimizer == cost((4, 48), F).optimizer == 2 * 4 * 48 + 4


# --- CUDA, as far as it can be derived -----------------------------------------------------------------------


def test_counts_for_cuda_are_marked_as_derived() -> None:
    assert cost((4, 8), device="cuda").derived
    assert not cost((4, 8), device="cpu").derived


def test_cuda_needs_no_scratch_memory_for_casts_and_numbers() -> None:
    on_cpu, on_cuda = (cost((4, 8), F, B, implementation="F.rms_norm", device=device) for device in ("cpu", "cuda"))
    assert on_cuda.terms == on_cpu.terms
    assert on_cuda.peak == on_cpu.peak - 4 * 8  # the weight in fp32


def test_ours_on_cuda_follows_the_launch_configuration() -> None:
    """Kernels and the memory between them: fp32 sums of dw for each program, 8 bytes for each part of a shared row."""
    M, e = 4096, 2
    seen = set()
    for N in (3, 1280, 7168, 16384, 16385, 32768, 262144, 600000):
        forward, backward = (cost((M, N), device="cuda", phase=phase) for phase in ("forward", "backward"))
        config = tiling.forward(N, e, False, N % 16 == 0, tiling.Gpu(227 << 10))
        parts = config.parts
        shares = 8 * M * parts if parts > 1 else 0
        seen.add(min(parts, 2))
        assert forward.kernels == (2 if shares else 1)
        assert forward.moved == forward.least + 3 * shares  # filled, then written and read
        assert forward.peak == M * N * e + 4 * M + shares

        config = tiling.backward(M, N, e, e, e, False, N % 16 == 0, tiling.Gpu(227 << 10))
        shares = 8 * M * config.parts if config.parts > 1 else 0
        alone = config.parts == 0
        programs = tiling.dw_alone(M, N, 2 * e, e, tiling.Gpu()).programs if alone else config.programs
        partials = programs * N * 4
        assert backward.kernels == (3 if alone else 2) + bool(shares)
        again = 2 * M * N * e + 4 * M if alone else 0  # dy, x and rstd, for dw
        assert backward.moved == backward.least + 2 * partials + again + 3 * shares
        assert backward.peak == 2 * M * N * e + 4 * M + partials + N * e + shares  # y, dx, rstd, dw
        without = cost((M, N), device="cuda", phase="backward", elementwise_affine=False)
        config = tiling.backward(M, N, e, e, 0, False, N % 16 == 0, tiling.Gpu(227 << 10))
        shares = 8 * M * config.parts if config.parts > 1 else 0
        assert without.kernels == 1 + bool(shares)
        assert without.moved == without.least + 3 * shares
    assert seen == {0, 1, 2}


def test_the_number_of_programs_is_the_same_on_every_gpu() -> None:
    gpus = [tiling.Gpu(*of) for of in itertools.product((0, 99 << 10, 227 << 10), (64, 132), (8, 9, 12))]
    for M, N in itertools.product((1, 4096, 1 << 20), (3, 500, 1280, 7168, 16384, 65536)):
        for size, of_dy, of_dw in ((2, 2, 2), (2, 4, 4), (4, 4, 2), (4, 4, 4)):
            for with_ds, aligned in itertools.product((False, True), {False, N % 16 == 0}):
                configs = [tiling.backward(M, N, size, of_dy, of_dw, with_ds, aligned, gpu) for gpu in gpus]
                assert len({config.programs for config in configs}) == 1, (M, N)
            assert len({tiling.dw_alone(M, N, size + of_dy, of_dw, gpu).programs for gpu in gpus}) == 1, (M, N)


def test_the_counts_ask_for_the_launches_that_the_kernels_ask_for(monkeypatch) -> None:
    """Compares the arguments with which gpu/planner.py and the counts call tiling.py; needs no GPU."""
    gpu = pytest.importorskip("rmsnorm.kernels.gpu.planner", reason="there is no Triton")
    asked: list[Any] = []

    def spy(name: str, used: int, heads_at: int) -> Callable[..., Any]:
        before = getattr(tiling, name)

        def wrapped(*args: Any) -> Any:
            asked.append((name, *args[:used], args[heads_at] if heads_at < len(args) else 1))
            return before(*args)

        return wrapped

    # All arguments but the GPU and those of sums of gradients.
    for name, used, heads_at in (("forward", 4, 5), ("backward", 7, 10), ("dw_alone", 4, 5)):
        monkeypatch.setattr(tiling, name, spy(name, used, heads_at))
    monkeypatch.setattr(gpu, "gpu_at", lambda _: tiling.Gpu(227 << 10))
    widths, both = (7, 1280, 12000, 14336, 40000), (False, True)
    for (x, w), N, adds, by_head in itertools.product(DTYPES, widths, both, both):
        asked.clear()
        by_head = by_head and w is not None
        rows, rstd = TensorKind.dense((11, 3, N), x), TensorKind.dense((11, 3), torch.float32)
        of_w = (3, N) if by_head else (N,)
        other, weight = rows if adds else None, None if w is None else TensorKind.dense(of_w, w)
        cpu, spec = torch.device("cpu"), Spec()
        y = gpu.plan_forward.__wrapped__(Forward(cpu, rows, other, weight, spec, True)).fresh[0]
        dy = TensorKind.dense(y.shape, y.dtype)
        gpu.plan_backward.__wrapped__(Backward(cpu, dy, other, rows, weight, rstd, spec, True, w is not None))
        kernels = sorted(set(asked))
        asked.clear()
        name: Any = "ours+residual" if adds else "ours"
        for phase in ("forward", "backward"):
            counted((11, 3, N), x, w, implementation=name, phase=phase, device="cuda", by_head=by_head)
        assert sorted(set(asked)) == kernels


def test_the_fused_norms_of_torch_read_dy_and_x_twice_on_cuda() -> None:
    for name in ("F.rms_norm", "LayerNorm"):
        inference, _, backward = (
            cost((8192, 1280), implementation=name, device="cuda", phase=p) for p in counting.PHASES
        )
        assert (inference.kernels, backward.kernels) == (1, 2)
        assert backward.moved // (8192 * 1280 * 2) == 5  # dy, x, dx, and dy and x again
        assert cost((8192, 1283), implementation=name, device="cuda").kernels == 2
        many = cost((70000, 256), implementation=name, device="cuda", phase="backward")
        assert many.kernels == 2 + (2 if name == "LayerNorm" else 1)


# --- invalid arguments and no rows ---------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", counting.IMPLEMENTATIONS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("phase", counting.PHASES)
def test_no_rows_cost_nothing_but_the_parameters(implementation, device, phase) -> None:
    c = cost((0, 8), implementation=implementation, device=device, phase=phase)
    assert (c.flops, c.read, c.written, c.kernels, c.saved, c.peak, c.least, c.terms) == (0,) * 7 + ((),)
    assert c.parameters > 0


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (((-1, 8),), {}, ValueError, "shape is (-1, 8)"),
        (((4, 0),), {}, ValueError, "N of at least 1"),
        (((),), {}, ValueError, "shape is ()"),
        ((8,), {}, TypeError, "shape is 8, expected a sequence of integers"),
        (((4.0, 8),), {}, TypeError, "integers"),
        (((4, 8), torch.float64), {}, TypeError, "dtype is torch.float64"),
        (((4, 8), B, torch.int8), {}, TypeError, "weight_dtype is torch.int8"),
        (((4, 8),), {"implementation": "apex"}, ValueError, "'eager'"),
        (((4, 8),), {"phase": "sideways"}, ValueError, "'backward'"),
        (((4, 8),), {"device": "tpu"}, ValueError, "'cpu' or 'cuda'"),
        (((4, 8),), {"offset": 1.0}, ValueError, "offset is 1 with cast='early'"),
        (
            ((4, 8),),
            {"cast": "first", "implementation": "eager"},
            ValueError,
            "cast is 'first' with implementation='eager'",
        ),
        (((4, 8),), {"offset": 1.0, "cast": "late", "elementwise_affine": False}, ValueError, "elementwise_affine"),
        (((4, 8), F, B), {"implementation": "LayerNorm"}, ValueError, "LayerNorm refuses"),
        (((4, 8), B, F), {"implementation": "LayerNorm", "device": "cuda"}, ValueError, "LayerNorm refuses"),
        (
            ((4, 8),),
            {"recompute": True, "implementation": "eager"},
            ValueError,
            "recompute is True with implementation",
        ),
        (((4, 8),), {"recompute": 1}, TypeError, "recompute is 1, expected"),
        (((4, 8),), {"by_head": 1}, TypeError, "by_head is 1, expected"),
        (((8,),), {"by_head": True}, ValueError, "shape is (8,) with by_head, expected (..., H, N)"),
        (((4, 8),), {"by_head": True, "implementation": "eager"}, ValueError, "by_head is True with implementation"),
        (((4, 8),), {"by_head": True, "elementwise_affine": False}, ValueError, "elementwise_affine is False with by"),
        (((4, 8),), {"threads": 0}, ValueError, "threads is 0"),
        (((4, 8),), {"threads": "4"}, TypeError, "threads is '4', expected an int"),
    ],
)
def test_invalid_arguments_raise_an_error_that_names_them(arguments, options, error, text) -> None:
    with pytest.raises(error) as raised:
        cost(*arguments, **options)
    assert str(raised.value).startswith("[cost] ")
    assert text in str(raised.value)


def test_torch_raises_for_the_weight_dtype_for_which_cost_raises(randn) -> None:
    with pytest.raises(RuntimeError):
        nn.functional.layer_norm(randn(4, 8), (8,), randn(8, dtype=B), randn(8, dtype=B))


# --- the trace notices mistakes ------------------------------------------------------------------------------


def skip_statistic(tape: Any, case: Any, g: Any, x32: Any, rstd: Any) -> None:
    tape.free(x32, rstd)
    tape.recast(g, case.x_dtype)


# What is changed: where, what to, and the implementation and dtypes whose counts must then be wrong.
MUTATIONS: dict[str, tuple[Any, str, Any, str, tuple[torch.dtype, torch.dtype]]] = {
    "two chunks more": (ours, "cpu_chunks", lambda case: 2 + case.M // 256, "ours", (B, B)),
    "no copy of the weight": (ours, "_weight_as_read", lambda tape, case: (case.weight(), None), "ours", (H, B)),
    "no gradient through the statistic": (eager, "_normalize_backward", skip_statistic, "eager", (B, B)),
    "statistics in fp64": (torch_norms, "_statistic_dtype", lambda case: torch.float64, "LayerNorm", (B, B)),
    "no cast of a gradient": (Tape, "recast", lambda tape, array, dtype: array, "F.rms_norm", (B, B)),
}


@other_torch
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_trace_notices_a_wrong_formula(name, monkeypatch) -> None:
    where, attribute, mutant, implementation, dtypes = MUTATIONS[name]
    assert wrong(implementation, "early", 0.0, *dtypes, (64, 40)) == []
    monkeypatch.setattr(where, attribute, mutant)
    assert wrong(implementation, "early", 0.0, *dtypes, (64, 40)) != []


@other_torch
def test_the_trace_notices_other_code(monkeypatch) -> None:
    before = trace_cost.published
    monkeypatch.setattr(trace_cost, "published", lambda x, *rest: before(x + 0, *rest))
    fields = {line.split(": ")[0].split()[-1] for line in wrong("eager", "early", 0.0, B, B, (64, 40))}
    assert fields >= {"read", "written", "kernels"}


@pytest.mark.parametrize("operator", ["erf", "sin"])
def test_an_operator_without_a_rule_raises(operator, randn) -> None:
    x = randn(3)
    with pytest.raises(AssertionError, match=f"no rule says what {operator} costs"):
        watched(lambda: getattr(torch, operator)(x))
