"""host.cpp: the calls that it makes, the calls that it leaves to Python, and how it is compiled and loaded."""

import contextlib
import ctypes
import gc
import importlib
import itertools
import math
import os
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from concurrency import in_threads
from forked import Forked
from planned import planning
from rmsnorm import add_rms_norm, compat, explain, functional, gated_rms_norm, rms_norm
from rmsnorm.functional import wait_for_host
from rmsnorm.kernels import dispatch
from rmsnorm.kernels.cpu import compiling, launches
from rmsnorm.kernels.cpu import planner as cpu
from rmsnorm.kernels.cpu import threads as kernel_threads
from rmsnorm.kernels.host import build
from rmsnorm.kernels.host import loader as host
from rmsnorm.kernels.plan import Backward, Forward, NativeLaunch, Plan
from rmsnorm.spec import Spec
from tolerance import assert_same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SPECS = (("early", 0.0), ("late", 0.0), ("late", 1.0), ("first", 0.0))
EPS = 1e-6
Draw = Callable[..., Tensor]


@pytest.fixture
def cpp() -> None:
    wait_for_host()
    if host.described() != "called from C++":
        pytest.skip(host.described())


@pytest.fixture
def made(cpp: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Records whether C++ made each call, which backward passes Python made, and which kinds of calls were planned."""
    seen: dict[str, list[Any]] = {"forward": [], "backward in Python": [], "planned": []}
    norm, backward = host.norm, dispatch.backward

    def noted(*arguments: Any) -> Any:
        found = norm(*arguments)
        seen["forward"].append(found is not None)
        return found

    def noted_backward(*arguments: Any) -> Any:
        seen["backward in Python"].append(True)
        return backward(*arguments)

    def noting(plan: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda kind: (seen["planned"].append(kind), plan(kind))[1]

    monkeypatch.setattr(host, "norm", noted)
    monkeypatch.setattr(dispatch, "backward", noted_backward)
    monkeypatch.setattr(cpu, "plan_forward", noting(cpu.plan_forward))
    monkeypatch.setattr(cpu, "plan_backward", noting(cpu.plan_backward))
    return seen


def by_cpp(x: Any, residual: Any, w: Any, eps: Any = EPS, cast: Any = "early", offset: Any = 0.0) -> bool:
    """Whether C++ makes the call."""
    return host.norm(x, residual, w, eps, cast, offset) is not None


def gradients(outputs: Any, leaves: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, cotangents[: len(outputs)])]


# --- plans and bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cast", "offset"), SPECS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("adds", [False, True])
def test_calls_from_cpp_have_the_bits_of_calls_from_python(made, randn, adds, dtype, cast, offset) -> None:
    shapes = ((1, 64), (3, 2, 33), (7,), (2, 1, 3, 2, 5), (300, 48), (70, 1280))
    count = 0
    for shape, of_w, frozen in itertools.product(shapes, (dtype, None), ("", "x", "w")):
        if of_w is None and (offset or frozen == "w"):
            continue
        x, residual = (randn(*shape, dtype=dtype).requires_grad_(frozen != "x") for _ in range(2))
        w = None if of_w is None else randn(shape[-1], dtype=of_w).requires_grad_(frozen != "w")
        leaves = [t for t in (x, residual if adds else None, w) if t is not None and t.requires_grad]
        dy, ds = (randn(*shape, dtype=dtype) for _ in range(2))

        def call() -> tuple[Tensor, ...]:
            if adds:
                return add_rms_norm(x, residual, w, EPS, cast=cast, offset=offset)
            return (rms_norm(x, w, EPS, cast=cast, offset=offset),)

        def run() -> list[Tensor]:
            return gradients(call(), leaves, [dy, ds]) if leaves else [*call()]

        runs = [run(), run()]
        with torch.no_grad():
            runs.append([*call()])
        assert made["forward"] == [True, True, True]
        assert made["backward in Python"] == []
        with host.bypassed():
            runs.append(run())
        assert made["backward in Python"] == ([True] if leaves else [])
        for one in runs[:-1]:
            for a, b in zip(one, runs[-1], strict=False):
                assert a.stride() == b.stride()
                assert_same_bits(a, b, f"{shape} {of_w} frozen {frozen}")
        count += 1
        for seen in made.values():
            seen.clear()
        host.forget()
    assert count >= 6


def test_cpp_requests_a_plan_once_for_each_kind_of_call(made, randn) -> None:
    """Forward with and without rstd, backward, and a kind that Python must make are each planned once."""
    x, w, dy = randn(4, 32), randn(32), randn(4, 32)
    for _ in range(3):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        rms_norm(x.clone(), w.clone())
        torch.autograd.grad(rms_norm(*leaves), leaves, dy.clone())
    assert [type(kind).__name__ for kind in made["planned"]] == ["Forward", "Forward", "Backward"]
    assert all(made["forward"])
    made["planned"].clear()
    mixed = randn(32, dtype=torch.bfloat16)
    for _ in range(3):
        assert not by_cpp(x, None, mixed)
    assert len(made["planned"]) == 1


def test_planners_allocate_and_launch_nothing(randn) -> None:
    class Forbidding(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is torch.ops.aten.promote_types.default, f"a planner calls {func}"
            return func(*args, **(kwargs or {}))

    planners = [cpu]
    with contextlib.suppress(ImportError):  # there is no Triton
        planners.append(importlib.import_module("rmsnorm.kernels.gpu.planner"))
    x, w, rstd = randn(70, 1280), randn(1280), randn(70).abs()
    kinds = [
        Forward.of(x, r, weight, Spec(), True) for r in (None, x, x.bfloat16()) for weight in (None, w, w.bfloat16())
    ]
    backward = [Backward.of(x, ds, x, w, rstd, Spec(), True, True) for ds in (None, x)]
    for planner in planners:
        with Forbidding():
            for kind in kinds:
                assert isinstance(planner.plan_forward.__wrapped__(kind), Plan)
            for kind in backward:
                assert isinstance(planner.plan_backward.__wrapped__(kind), Plan)


def test_calls_that_need_a_conversion_are_made_by_python(made, randn) -> None:
    x, w = randn(4, 32), randn(32, dtype=torch.bfloat16)
    for _ in range(3):
        assert_same_bits(rms_norm(x, w), rms_norm(x, w.clone()), "y")
    assert not any(made["forward"])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_share_the_rows_of_a_call_from_cpp(made, randn, count, threads, monkeypatch) -> None:
    """As in Python: torch's own threads, all of them, in a single OpenMP call for each pass."""
    threads(count)
    M = 4097 + count  # a kind of call that no other test has planned
    x, w, dy = randn(M, 64).requires_grad_(), randn(64).requires_grad_(), randn(M, 64)
    teams: list[int] = []
    real = kernel_threads._team_of_openmp()
    if real is None:
        pytest.skip("torch has no OpenMP here")
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    team = kind(lambda task, argument, size, flags: (teams.append(size), real(task, argument, size, flags))[0] and None)
    monkeypatch.setattr(kernel_threads, "_team_of_openmp", lambda: team)
    got = gradients(rms_norm(x, w), [x, w], [dy])
    assert made["forward"] == [True]
    assert made["backward in Python"] == []
    assert teams == ([] if count == 1 else [count, count])
    host.forget()
    threads(1)
    with host.bypassed():
        for a, b in zip(got, gradients(rms_norm(x, w), [x, w], [dy]), strict=True):
            assert_same_bits(a, b, f"{count} threads")


def test_without_openmp_calls_on_several_threads_are_made_by_python(made, randn, threads, monkeypatch) -> None:
    threads(2)
    monkeypatch.setattr(kernel_threads, "_team_of_openmp", lambda: None)
    x, w = randn(4099, 64), randn(64)
    assert_same_bits(rms_norm(x, w)[:1], rms_norm(x[:1], w), "y")
    assert made["forward"] == [False, True]


def test_calls_that_differ_in_any_relevant_property_get_separate_plans(made, randn) -> None:
    x, w, r = (
        randn(4, 6, 32, dtype=torch.bfloat16),
        randn(32, dtype=torch.bfloat16),
        randn(4, 6, 32, dtype=torch.bfloat16),
    )

    def is_new(*call: Any) -> bool:
        made["planned"].clear()
        assert by_cpp(*call)
        return made["planned"] != []

    assert is_new(x, None, w)
    assert not is_new(x, None, w)
    assert not is_new(x.clone(), None, w.clone())
    assert not is_new(nn.Parameter(x, requires_grad=False), None, nn.Parameter(w, requires_grad=False))
    wide = randn(5, 6, 32, dtype=torch.bfloat16)
    others = {
        "rows": (x[:3], None, w), "dimensions": (x.view(24, 32), None, w), "strides": (x.transpose(0, 1), None, w),
        "expanded": (x[:1].expand(4, 6, 32), None, w), "width": (x[..., :16], None, w[:16]),
        "dtype": (x.half(), None, w.half()), "fp32": (x.float(), None, w.float()), "its weight": (x, None, w.float()),
        "no weight": (x, None, None), "a residual": (x, r, w), "where it lies": (wide.view(-1)[1:769].view(4, 6, 32), None, w),
        "eps": (x, None, w, 1e-5), "zero": (x, None, w, 0.0), "late": (x, None, w, EPS, "late"),
        "offset": (x, None, w, EPS, "late", 1.0),
    }  # fmt: skip
    for name, call in others.items():
        assert is_new(*call), name
        assert not is_new(*call), name
    assert is_new(x.clone().requires_grad_(), None, w), "with a gradient"
    with torch.no_grad():
        assert not is_new(x.clone().requires_grad_(), None, w)


def test_invalid_arguments_are_left_to_python(cpp, randn) -> None:
    x, w = randn(4, 6, 32), randn(32)
    for spec in ((-EPS,), (0,), (float("nan"),), (True,), (EPS, "later"), (EPS, None), (EPS, "early", 2.0),
                 (EPS, "early", 1.0), (EPS, "early", 0)):  # fmt: skip
        assert not by_cpp(x, None, w, *spec), spec
    for wrong in (None, 3, "x", [x], x.tolist()):
        assert not by_cpp(wrong, None, w)
    assert not by_cpp(x, x.tolist(), w)
    assert not by_cpp(x, None, [1.0])
    assert not by_cpp(x, None, w[:1])
    assert not by_cpp(x, None, w.repeat(2)[::2])
    assert not by_cpp(x.double(), None, w.double())
    assert not by_cpp(x, x[:2], w)


def test_unaligned_tensors_get_their_own_plan(made, randn) -> None:
    """The plan for pairs of bf16 numbers must not be used for them."""
    store, w = randn(4 * 32 + 1, dtype=torch.bfloat16), randn(33, dtype=torch.bfloat16)
    even, odd = store[:-1].view(4, 32), store[1:].view(4, 32)
    expected = rms_norm(odd.clone(), w[:32])
    host.forget()
    rms_norm(even, w[:32])
    assert_same_bits(rms_norm(odd, w[:32]), expected, "odd")
    assert_same_bits(rms_norm(even, w[1:]), rms_norm(even, w[1:].clone()), "odd weight")
    alignments = [[kind.x.alignment > 2, kind.w.alignment > 2] for kind in made["planned"]]
    assert alignments == [[True, True], [True, True], [False, True], [True, False]]
    # Some processors read pairs at any address, and give the same bits.
    codes = [cpu.plan_forward(kind).launches[0].function for kind in list(made["planned"])]
    assert [code is codes[0] for code in codes] == [True, True, False, False]
    assert all(made["forward"])


def test_results_stay_right_when_the_plan_cache_overflows(made, randn) -> None:
    w = randn(2)
    x = randn(5000, 2)
    for M in range(1, 4200):
        rms_norm(x[:M], w)
    made["planned"].clear()
    rms_norm(x[:4199], w)
    assert len(made["planned"]) == 0
    rms_norm(x[:1], w)
    assert len(made["planned"]) == 1  # it had been dropped from the cache
    for M in (1, 2, 4000, 4199):
        assert_same_bits(rms_norm(x[:M], w), rms_norm(x[:M], w), str(M))


# --- calls that Python must make -----------------------------------------------------------------------------


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_calls_with_anything_but_plain_tensors_are_made_by_python(cpp, randn) -> None:
    x, w = randn(4, 32), randn(32)
    rms_norm(x, w)
    assert by_cpp(x, None, w)
    negative = torch._neg_view(x)
    meta = x.to("meta")
    zeros = torch._efficientzerotensor((4, 32))
    others = {"negative": negative, "meta": meta, "two": TwoTensor(x, x), "sparse": x.to_sparse(), "zeros": zeros}
    for name, t in others.items():
        assert not by_cpp(t, None, w), name
    with Passing():
        assert not by_cpp(x, None, w)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert not by_cpp(mode.from_tensor(x), None, mode.from_tensor(w))
        assert not by_cpp(x, None, w)
    with forward_ad.dual_level():
        assert not by_cpp(forward_ad.make_dual(x, x), None, w)
        assert not by_cpp(x, None, forward_ad.make_dual(w, w))
    seen: list[bool] = []
    torch.func.vmap(lambda row: (seen.append(by_cpp(row, None, w)), row)[1])(x)
    torch.func.grad(lambda x: (seen.append(by_cpp(x, None, w)), x.sum())[1])(x)
    torch.func.grad(lambda z: (seen.append(by_cpp(x, None, w)), z.sum())[1])(
        randn(3)
    )  # plain tensors inside a transform
    torch.jit.trace(lambda x: (seen.append(by_cpp(x, None, w)), x + 1)[1], x, check_trace=False)
    assert seen == [False] * 4
    assert by_cpp(x, None, w)
    for allowed in (torch.autocast("cpu"), torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with allowed:
            assert by_cpp(x, None, w)


def test_arguments_are_checked_after_the_plan_is_cached(cpp, randn) -> None:
    x, w = randn(4, 32), randn(32)
    for _ in range(2):
        rms_norm(x, w)
    with pytest.raises(ValueError, match="eps is -1"):
        rms_norm(x, w, -1.0)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(x, w[:16])
    with pytest.raises(ValueError, match="offset is 1 with cast='early'"):
        rms_norm(x, w, offset=1.0)
    with pytest.raises(TypeError, match="residual is a NoneType"):
        add_rms_norm(x, None, w)  # type: ignore[arg-type]


# --- autograd ------------------------------------------------------------------------------------------------


@pytest.fixture
def known(made: dict[str, list[Any]], randn: Draw) -> dict[str, Any]:
    """Leaves and cotangents whose plans C++ has cached, and the results of Python for them."""
    x, r = (randn(4, 32).requires_grad_() for _ in range(2))
    w, dy, ds = randn(32).requires_grad_(), randn(4, 32), randn(4, 32)

    def both() -> tuple[list[Tensor], list[Tensor]]:
        one = gradients(rms_norm(x, w), [x, w], [dy])
        return one, gradients(add_rms_norm(x, r, w), [x, r, w], [dy, ds])

    both()
    with host.bypassed():
        first, second = both()
    for seen in made.values():
        seen.clear()
    return {"x": x, "r": r, "w": w, "dy": dy, "ds": ds, "one": first, "both": second}


def test_the_backward_pass_runs_without_python(known, made) -> None:
    x, r, w, dy, ds = (known[name] for name in ("x", "r", "w", "dy", "ds"))
    for a, b in zip(gradients(rms_norm(x, w), [x, w], [dy]), known["one"], strict=True):
        assert_same_bits(a, b, "one")
    for a, b in zip(gradients(add_rms_norm(x, r, w), [x, r, w], [dy, ds]), known["both"], strict=True):
        assert_same_bits(a, b, "both")
    assert made == {"forward": [True, True], "backward in Python": [], "planned": []}


def test_only_requested_gradients_are_computed(known, made) -> None:
    """Requesting all gradients of a node, or only some, are different kinds of calls."""
    x, w, dy = known["x"], known["w"], known["dy"]
    expected = dict(zip((x, w), known["one"][1:], strict=True))
    for asked in ([x], [w], [x, w], [w, x], [x], [w]):
        for got, leaf in zip(torch.autograd.grad(rms_norm(x, w), asked, dy), asked, strict=True):
            assert_same_bits(got, expected[leaf], f"{len(asked)} asked for")
    assert made["backward in Python"] == []
    assert [(kind.need_dx, kind.need_dw) for kind in made["planned"]] == [(True, False), (False, True)]


@pytest.mark.parametrize("which", ["y", "s"])
def test_gradients_are_right_if_only_one_output_is_used(known, which) -> None:
    x, r, w, dy = (known[name] for name in ("x", "r", "w", "dy"))
    kinds = []
    for _ in range(3):
        y, s = add_rms_norm(x, r, w)
        kinds.append(torch.autograd.grad(y if which == "y" else s, [x, r, w], dy, allow_unused=True))
    host.forget()
    y, s = add_rms_norm(x, r, w)
    kinds.append(torch.autograd.grad(y if which == "y" else s, [x, r, w], dy, allow_unused=True))
    for got in kinds[1:]:
        for a, b in zip(got, kinds[0], strict=True):
            if b is None:
                assert a is None
            else:
                assert_same_bits(a, b, which)


def test_gradients_have_the_dtypes_of_their_inputs(made, randn) -> None:
    """A residual of another dtype than x."""
    x, r, w = randn(4, 32, dtype=torch.bfloat16), randn(4, 32), randn(32)
    leaves = [t.requires_grad_() for t in (x, r, w)]
    runs = [gradients(add_rms_norm(x, r, w), leaves, [randn(4, 32), randn(4, 32)]) for _ in range(2)]
    assert [t.dtype for t in runs[1]] == [t.dtype for t in runs[0]]


def test_a_second_derivative_raises(known) -> None:
    x, w = known["x"], known["w"]
    y = rms_norm(x, w)
    assert "CppNode" in y.grad_fn.name()
    dx, dw = torch.autograd.grad(y, [x, w], known["dy"], create_graph=True)
    assert_same_bits(dx.detach(), known["one"][1], "dx")
    assert_same_bits(dw.detach(), known["one"][2], "dw")
    with pytest.raises(RuntimeError, match="second derivative"):
        (dx.sum() + dw.sum()).backward()


def test_saved_tensors_that_were_freed_or_modified_raise(known) -> None:
    x, w, dy = known["x"], known["w"], known["dy"]
    y = rms_norm(x, w)
    torch.autograd.grad(y, x, dy)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, dy)
    y = rms_norm(x, w)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, x, dy)
    _, s = outputs = add_rms_norm(x, known["r"], w)
    with torch.no_grad():
        s.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs[0], x, dy)


@pytest.mark.parametrize("form", ["expanded", "transposed", "float64", "negative", "two", "zeros"])
def test_cotangents_of_every_kind_give_the_gradients_of_python(known, form) -> None:
    x, w, dy = known["x"], known["w"], known["dy"]
    given = {
        "expanded": lambda: torch.ones(()).expand(4, 32), "transposed": lambda: dy.t().contiguous().t(),
        "zeros": lambda: torch._efficientzerotensor((4, 32)), "float64": lambda: dy.double(), "negative": lambda: torch._neg_view(dy), "two": lambda: TwoTensor(dy, dy),
    }[form]()  # fmt: skip
    outcome = []
    for forgotten in (True, False, False):
        if forgotten:
            host.forget()
        try:
            dx, dw = torch.autograd.grad(rms_norm(x, w), [x, w], given)
            outcome.append([t.a if isinstance(t, TwoTensor) else t for t in (dx, dw)])
        except RuntimeError as error:
            outcome.append(str(error)[:60])
    for other in outcome[1:]:
        if isinstance(other, str):
            assert other == outcome[0]
        else:
            for a, b in zip(other, outcome[0], strict=True):
                assert_same_bits(a, b, form)


def test_batched_cotangents_saved_tensor_hooks_and_checkpointing_work(known, randn) -> None:
    x, w = known["x"], known["w"]
    dys = randn(3, 4, 32)
    dx, dw = torch.autograd.grad(rms_norm(x, w), [x, w], dys, is_grads_batched=True)
    for i in range(3):
        one = torch.autograd.grad(rms_norm(x, w), [x, w], dys[i])
        assert_same_bits(dx[i], one[0], "dx")
        assert_same_bits(dw[i], one[1], "dw")
    saved: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(tuple(t.shape))
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.to_sparse().to_dense()):
        y = rms_norm(x, w)
    assert sorted(saved) == [(4,), (4, 32), (32,)]
    for a, b in zip(torch.autograd.grad(y, [x, w], known["dy"]), known["one"][1:], strict=True):
        assert_same_bits(a, b, "hooks")
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t.repeat_interleave(2)[::2] if t.shape == (4,) else t
    ):
        y = rms_norm(x, w)  # its rstd comes back with gaps
    for a, b in zip(torch.autograd.grad(y, [x, w], known["dy"]), known["one"][1:], strict=True):
        assert_same_bits(a, b, "gaps")
    y = torch.utils.checkpoint.checkpoint(rms_norm, x, w, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(y, [x, w], known["dy"]), known["one"][1:], strict=True):
        assert_same_bits(a, b, "checkpoint")


def test_a_python_error_in_the_backward_pass_is_raised_unchanged(known, monkeypatch) -> None:
    """Both when C++ requests a plan and when it leaves the call to Python."""

    class Odd(Exception):
        pass

    def backward(*_: Any) -> Any:
        raise Odd("of the kernel")

    x, w = known["x"], known["w"]
    y = rms_norm(x, w)
    host.forget()
    with monkeypatch.context() as patch:  # when C++ requests a plan
        patch.setattr(cpu, "plan_backward", backward)
        with pytest.raises(Odd, match="of the kernel"):
            torch.autograd.grad(y, [x, w], known["dy"], retain_graph=True)
    monkeypatch.setattr(dispatch, "backward", backward)  # when C++ leaves the call to Python
    with pytest.raises(Odd, match="of the kernel"):
        torch.autograd.grad(y, [x, w], known["dy"].t().contiguous().t())


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_autograd_gives_the_same_gradients(known) -> None:
    x, w = known["x"], known["w"]
    leaves = [t.detach().clone().requires_grad_() for t in (x, w)]
    y = rms_norm(*leaves)
    assert "CppNode" in y.grad_fn.name()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        y.backward(known["dy"])
    for leaf, expected in zip(leaves, known["one"][1:], strict=True):
        assert_same_bits(leaf.grad, expected, "compiled autograd")


def test_concurrent_calls_from_many_threads_are_right(cpp, randn) -> None:
    """New and cached kinds of calls, forward and backward, from eight threads."""
    x, w, dy = randn(64, 16), randn(16), randn(64, 16)
    expected = []
    for M in range(1, 65):
        leaf, weight = x[:M].clone().requires_grad_(), w.clone().requires_grad_()
        expected.append(gradients(rms_norm(leaf, weight), [leaf, weight], [dy[:M]]))
    host.forget()

    def work(seed: int) -> None:
        for turn in range(200):
            M = 1 + (turn * 7 + seed * 13) % 64
            leaf, weight = x[:M].clone().requires_grad_(), w.clone().requires_grad_()
            got = gradients(rms_norm(leaf, weight), [leaf, weight], [dy[:M]])
            assert all(torch.equal(a, b) for a, b in zip(got, expected[M - 1], strict=True)), f"{M} rows"
            if turn == 100 and seed == 0:
                host.forget()

    in_threads(8, work)


def test_the_plan_cache_is_right_while_threads_fill_clear_and_count_it(cpp, randn) -> None:
    """The number of plans is that of the kinds of calls that were made since the cache was cleared."""
    x, w = randn(64, 16), randn(16)
    expected = [rms_norm(x[:M], w) for M in range(1, 65)]
    counts: list[int] = []

    def work(seed: int) -> None:
        for turn in range(300):
            M = 1 + (turn * 7 + seed * 13) % 64
            assert torch.equal(rms_norm(x[:M], w), expected[M - 1]), f"{M} rows"
            if seed == 0 and turn % 20 == 0:
                host.forget()
            if seed == 1:
                counts.append(host.cached_plans())

    in_threads(6, work)
    assert 0 < max(counts) <= 64
    host.forget()
    assert host.cached_plans() == 0
    for M in (1, 2, 3, 3, 2):
        rms_norm(x[:M], w)
    assert host.cached_plans() == 3


def test_no_tensor_of_a_call_is_kept_alive(cpp, randn) -> None:
    def run() -> list[weakref.ref[Tensor]]:
        x, w = randn(4, 32).requires_grad_(), randn(32).requires_grad_()
        y = rms_norm(x, w)
        dx, dw = torch.autograd.grad(y, [x, w], randn(4, 32))
        return [weakref.ref(t) for t in (x, w, y, dx, dw)]

    for _ in range(3):
        refs = run()
        gc.collect()
        assert [ref() for ref in refs] == [None] * 5


@pytest.mark.parametrize("fails_at", [None, 1, 2, 3])
def test_a_hook_that_raises_while_tensors_are_saved_keeps_nothing_alive(cpp, randn, fails_at) -> None:
    """Non-reentrant checkpointing ends its recomputation so, and s would stay alive with its node at every step."""

    def step() -> list[Any]:
        x, residual, w = randn(4, 32).requires_grad_(), randn(4, 32).requires_grad_(), randn(32).requires_grad_()
        seen = [compat.StorageWeakRef(t.untyped_storage()) for t in (x, residual, w)]
        if fails_at is None:
            outputs = checkpoint(add_rms_norm, x, residual, w, use_reentrant=False)
            torch.autograd.grad(outputs, (x, residual, w), (randn(4, 32), randn(4, 32)))
            return seen
        calls = itertools.count(1)

        def pack(t: Tensor) -> Tensor:
            if next(calls) == fails_at:
                raise ValueError("the hook fails")
            return t

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            pytest.raises(ValueError, match="the hook fails"),
        ):
            add_rms_norm(x, residual, w)
        return seen

    step()  # the first call of a kind is made by Python
    seen = step()
    gc.collect()
    assert [reference.expired() for reference in seen] == [True] * 3


def test_a_plan_keeps_its_machine_code_alive(cpp, randn) -> None:
    """Clearing the Python caches must not free the machine code and layouts that a plan in C++ points to."""
    x, w = randn(4, 32), randn(32)
    expected = rms_norm(x, w)
    for cache in (cpu.plan_forward, launches.rows_of, cpu.spec_words, cpu.forward_kernel, compiling.compiled):
        cache.cache_clear()
    gc.collect()
    churn = [(ctypes.c_int64 * 16)(*[-1] * 16) for _ in range(2000)]
    for _ in range(50):
        assert by_cpp(x, None, w)
        assert_same_bits(rms_norm(x, w), expected, "y")
    del churn


# --- GPU launches, with a fake driver ------------------------------------------------------------------------

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)


@pytest.mark.parametrize("status", [0, 1])
def test_a_gpu_launch_passes_the_right_arguments_to_the_driver(cpp, randn, status, monkeypatch) -> None:
    """cuLaunchKernelEx gets the configuration, the function, and the addresses and numbers in order."""
    x, w, seen = randn(4, 32), randn(32), []

    def launched(configuration: int, function: int, arguments: Any, extra: Any) -> int:
        words = [ctypes.c_uint64.from_address(arguments[i]).value for i in range(5)]
        seen.append((ctypes.string_at(configuration, 40), function, words, extra))
        ctypes.memmove(words[2], words[0], 4)  # copies the first element of x to y
        return status

    launcher = _LAUNCH(launched)
    address = ctypes.cast(launcher, ctypes.c_void_p).value or 0
    launch = NativeLaunch(
        4711, ("x", "w", "y", 7, 1 << 40), launcher=address, configuration=bytes(range(40)), stream_at=8
    )  # fmt: skip
    planning(monkeypatch, launch, keeps=launcher)
    found = host.norm(x, None, w, EPS, "early", 0.0)
    (configuration, function, words, extra), *others = seen
    assert others == []
    assert (configuration, function, extra) == (bytes(range(8)) + bytes(8) + bytes(range(16, 40)), 4711, None)
    assert words[:2] == [x.data_ptr(), w.data_ptr()]
    assert words[3:] == [7, 1 << 40]
    if status == 0:
        assert words[2] == found.data_ptr()
        assert found[0, 0] == x[0, 0]
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
    else:
        assert found is None  # Python must make the call


def test_an_invalid_plan_raises(cpp, randn, monkeypatch) -> None:
    x, w = randn(4, 32), randn(32)
    for launch, said in {
        NativeLaunch(1, (0,) * 49, launcher=1, configuration=bytes(8)): "a launch of another form",
        NativeLaunch(1, (0,) * 15): "a launch of another form",
        NativeLaunch(1, (0,), launcher=1, configuration=bytes(65)): "a launch of another form",
        NativeLaunch(1, (0,), launcher=1, configuration=bytes(8), stream_at=4): "a launch of another form",
        NativeLaunch(1, ("z",)): "no tensor of the plan is called z",
    }.items():
        planning(monkeypatch, launch)
        with pytest.raises(ValueError, match=said):
            host.norm(x, None, w, EPS, "early", 0.0)


# --- compiling and loading -----------------------------------------------------------------------------------

_CALLS = """
import time, torch, rmsnorm
from rmsnorm.kernels.host import loader as host
x, w = torch.randn(4, 32), torch.randn(32)
for _ in range({looks}):
    y = rmsnorm.rms_norm(x, w)
    if "being compiled" not in host.described():
        break
    time.sleep({pause})
y = rmsnorm.rms_norm(x, w)
print(rmsnorm.explain(x, w))
"""


def start(code: str, folder: Path, compiler: str) -> Forked:
    """A process that compiles the C++ into the folder with this compiler."""
    return Forked(code, {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), "RMSNORM_CXX": compiler})


def finish(process: Forked) -> str:
    """What the process printed."""
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    return out.strip()


def process(folder: Path, compiler: str, looks: int = 1, pause: float = 0.2) -> str:
    """What explain says at the end of a process that calls the norm a few times."""
    return finish(start(_CALLS.format(looks=looks, pause=pause), folder, compiler))


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return shlex.quote(str(path))


def test_without_a_compiler_python_makes_the_calls(cpp, tmp_path) -> None:
    said = process(host.built().parent.parent, "")  # although the compiled library exists
    assert said == "cpu, float32: cpu kernel (Numba) (called from Python: RMSNORM_CXX is empty)"
    assert "no C++ compiler 'there-is-none -O3'" in process(tmp_path, "there-is-none -O3")
    assert "No closing quotation" in process(tmp_path, "c++ '")
    assert list(tmp_path.rglob("*.so")) == []


def test_a_failed_compilation_is_not_repeated_for_a_day(tmp_path) -> None:
    compiler = script(tmp_path / "cxx", f'echo asked >> {tmp_path}/log; echo "no such thing" >&2; exit 1')
    assert "it could not be compiled, see" in process(tmp_path / "out", compiler, looks=300)
    assert "it could not be compiled, see" in process(tmp_path / "out", compiler)
    assert (tmp_path / "log").read_text() == "asked\n"
    (failed,) = (tmp_path / "out").rglob("*.failed")
    assert "no such thing" in failed.read_text()
    assert "it could not be compiled, see" in process(tmp_path / "out", f"{compiler} -O1", looks=300)
    os.utime(failed, (0, 0))
    assert "it could not be compiled, see" in process(tmp_path / "out", f"{compiler} -O1", looks=300)
    assert (tmp_path / "log").read_text() == 3 * "asked\n"  # again for another command, and after a day


def handing_out(folder: Path) -> str:
    """A fake compiler that logs each run, waits for a file `go`, and then copies the already compiled library."""
    waits = f"while [ ! -e {folder}/go ]; do sleep 0.1; done"
    body = f'while [ "$1" != -o ]; do shift; done; cp {host.built()} "$2"'
    return script(folder / "cxx", f"echo asked >> {folder}/log; {waits}; {body}")


def test_one_of_several_processes_compiles_and_all_load(cpp, tmp_path) -> None:
    compiler = handing_out(tmp_path)
    running = [start(_CALLS.format(looks=300, pause=0.2), tmp_path / "out", compiler) for _ in range(4)]
    time.sleep(2)
    (tmp_path / "go").touch()
    said = [finish(one) for one in running]
    assert all("called from C++" in text for text in said), said
    assert (tmp_path / "log").read_text() == "asked\n"


def test_with_an_unusable_folder_python_makes_the_calls(cpp, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    said = process(tmp_path / "file", "true", looks=300)
    assert "called from Python" in said
    assert "being compiled" not in said


def copied(folder: Path) -> Path:
    """A copy of the compiled library that a test may damage."""
    target = folder / host.built().relative_to(host.built().parent.parent)
    target.parent.mkdir(mode=0o700, parents=True)
    target.write_bytes(host.built().read_bytes())
    target.chmod(0o700)
    return target


def test_a_damaged_library_is_compiled_again(cpp, tmp_path) -> None:
    """In its own process, because loading a truncated library kills the process with SIGBUS."""
    (tmp_path / "go").touch()
    compiler = handing_out(tmp_path)
    target = copied(tmp_path / "out")
    whole = target.read_bytes()
    half = len(whole) // 2
    changed = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    for content in (
        b"",
        whole[:half],
        bytes(len(whole)),
        whole[:half] + bytes(len(whole) - half),
        b"no library",
        changed,
    ):
        target.write_bytes(content)
        assert "called from C++" in process(tmp_path / "out", compiler, looks=300)
        assert build.unsealed(target.read_bytes()) is not None
    assert (tmp_path / "log").read_text() == 6 * "asked\n"
    assert sorted(f.suffix for f in target.parent.iterdir()) == [".lock", ".so"]


def test_warmup_replaces_a_library_that_cannot_be_loaded(cpp, tmp_path) -> None:
    """The file is complete, but not a library for this system."""
    (tmp_path / "go").touch()
    compiler = handing_out(tmp_path)
    target = copied(tmp_path / "out")
    target.write_bytes(build.sealed(b"no library"))
    said = process(tmp_path / "out", compiler)
    assert "cannot be loaded" in said
    assert "rmsnorm.warmup() compiles it again" in said
    assert "called from C++" in finish(start(_WARMUP, tmp_path / "out", compiler))
    assert "called from C++" in process(tmp_path / "out", "false")


def test_only_files_that_no_other_user_can_write_are_loaded(cpp, tmp_path) -> None:
    """Files behind a symbolic link, or in a folder that others can write, are not loaded either."""
    target = copied(tmp_path / "out")
    folder, elsewhere = target.parent, tmp_path / "elsewhere"
    assert "called from C++" in process(tmp_path / "out", "false")

    def refused() -> str:
        said = process(tmp_path / "out", "false")
        assert "called from Python" in said
        return said

    for mode in (0o777, 0o770, 0o1777):
        folder.chmod(mode)
        assert f"can be written by others, its mode is {mode:04o}" in refused()
    folder.chmod(0o700)
    for mode in (0o666, 0o620):
        target.chmod(mode)
        assert f"can be written by others, its mode is {mode:04o}" in refused()
    target.chmod(0o700)
    if os.geteuid() == 0:
        for path in (target, folder):
            os.chown(path, 65534, 65534)
            assert "is another user's" in refused()
            os.chown(path, 0, 0)
    assert "called from C++" in process(tmp_path / "out", "false")
    target.rename(elsewhere)
    target.symlink_to(elsewhere)
    assert "cannot be opened" in refused()
    target.unlink()
    os.mkfifo(target)
    assert "cannot be opened" in refused()
    target.unlink()
    elsewhere.rename(target)
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    assert "is no folder" in refused()


def test_the_file_that_was_checked_is_loaded_even_if_another_replaces_it(cpp, tmp_path) -> None:
    """Another file takes its name between the check and loading."""
    target = copied(tmp_path / "out")
    code = f"""
import os, torch, rmsnorm
from rmsnorm.kernels.host import build
distrust = build.distrust
def swapped(found):
    if {str(target)!r} and os.path.exists({str(target)!r}) and os.stat({str(target)!r}).st_ino == found.st_ino:
        os.unlink({str(target)!r})
        with open({str(target)!r}, "wb") as other:
            other.write(b"another one")
    return distrust(found)
build.distrust = swapped
for _ in range(2):  # the first loads the C++
    rmsnorm.rms_norm(torch.randn(2, 8))
print(rmsnorm.explain(torch.randn(2, 8)))
"""
    assert "called from C++" in finish(start(code, tmp_path / "out", "false"))
    assert target.read_bytes() == b"another one"


def test_writing_does_not_follow_symbolic_links(cpp, tmp_path) -> None:
    target = copied(tmp_path / "out")
    victim, new = tmp_path / "victim", tmp_path / "new"
    victim.write_text("precious")
    target.unlink()
    failed, lock = Path(f"{target}.failed"), target.with_suffix(".lock")
    compiler = script(tmp_path / "cxx", "exit 1")
    failed.symlink_to(victim)
    assert "it could not be compiled" in process(tmp_path / "out", compiler, looks=300)
    assert not failed.is_symlink()
    lock.unlink()
    lock.symlink_to(new)
    assert "cannot be written" in process(tmp_path / "out", compiler, looks=300)
    lock.unlink()
    lock.symlink_to(victim)
    assert "cannot be written" in process(tmp_path / "out", compiler, looks=300)
    lock.unlink()
    (tmp_path / "go").touch()
    target.symlink_to(victim)
    assert "called from C++" in finish(start(_WARMUP, tmp_path / "out", handing_out(tmp_path)))
    assert not target.is_symlink()
    assert victim.read_text() == "precious"
    assert not new.exists()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether a process has ended; it may still be a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def slow(folder: Path) -> str:
    """A fake compiler that logs its processes, starts writing, and never ends."""
    note = f"echo $$ >> {folder}/pids"
    child = script(folder / "child", f"{note}; echo part > $TMPDIR/of_the_compiler.s; exec sleep 1000")
    body = f'trap "" TERM; {note}; {child} & while [ "$1" != -o ]; do shift; done; echo part > "$2"; wait'
    return script(folder / "slow", body)


def pids(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "pids").read_text().split()] if (folder / "pids").exists() else []


def test_a_compiler_that_takes_too_long_is_killed(cpp, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(build, "_SECONDS", 1)
    (tmp_path / "out").mkdir()
    assert not build.compiled(str(tmp_path / "out" / "made.so"), shlex.split(slow(tmp_path)))
    until(lambda: all(gone(pid) for pid in pids(tmp_path)))
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["made.so.failed"]


def test_a_new_library_removes_those_of_other_versions_that_were_not_used_for_30_days(tmp_path) -> None:
    new, unused, used = (tmp_path / f"rmsnorm_host_{digit * 16}" for digit in "abc")
    others = tmp_path / f"another_host_{'d' * 16}"
    for folder in (new, unused, used, others):
        folder.mkdir()
        (folder / "rmsnorm_host.so").write_text("")
        for path in (folder / "rmsnorm_host.so", folder):
            os.utime(path, (time.time() - 40 * 24 * 60 * 60,) * 2)
    build.mark_used(used)
    compiler = script(tmp_path / "cxx", 'while [ "$1" != -o ]; do shift; done; echo made > "$2"')
    assert build.compiled(str(new / "rmsnorm_host.so"), [compiler])
    assert [unused.exists(), used.exists(), others.exists()] == [False, True, True]


# A process that a shell started in the background ignores SIGINT, and so do those that it starts.
_HEED_SIGINT = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"


@pytest.mark.parametrize("ending", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_the_compiler_ends_when_the_process_in_warmup_ends(ending, tmp_path) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(out), "RMSNORM_CXX": slow(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", _HEED_SIGINT + _WARMUP], env=environment, stderr=subprocess.DEVNULL
    ) as waiting:
        try:
            until(lambda: len(pids(tmp_path)) == 2)
            waiting.send_signal(getattr(signal, ending))
            waiting.wait(60)
        finally:
            waiting.kill()  # so that a failure does not hang
    until(lambda: all(gone(pid) for pid in pids(tmp_path)))
    until(lambda: [f.suffix for f in out.glob("*/*")] == [".lock"])


@pytest.mark.parametrize("ending", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_the_compiler_ends_when_the_compiling_process_ends(ending, tmp_path) -> None:
    out = tmp_path / "out"
    assert "being compiled" in process(out, slow(tmp_path))
    until(lambda: len(pids(tmp_path)) == 2)
    parent = int(Path(f"/proc/{pids(tmp_path)[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, getattr(signal, ending))
    until(lambda: all(gone(pid) for pid in [parent, *pids(tmp_path)]))
    until(lambda: [f.suffix for f in out.glob("*/*")] == [".lock"])


def test_a_process_that_ends_early_does_not_block_compilation(cpp, tmp_path) -> None:
    """If the process that started a compilation ends, compilation continues. If the compiling process is killed, the
    process that started it says so, and the next process compiles again."""
    assert "being compiled" in process(tmp_path, handing_out(tmp_path))
    (tmp_path / "go").touch()
    assert "called from C++" in process(tmp_path, "c++", looks=300)
    assert (tmp_path / "log").read_text() == "asked\n"
    killing = script(tmp_path / "killing", "kill -9 $PPID")
    for _ in range(2):
        assert "the process that compiled it ended with -9" in process(tmp_path / "killed", killing, looks=300)


_FORKS = """
import os, sys, time, torch, rmsnorm
from rmsnorm.kernels.host import loader as host
x, w = torch.randn(4, 32), torch.randn(32)
rmsnorm.rms_norm(x, w)
assert "being compiled" in host.described(), host.described()
child = os.fork()
if child != 0:
    open("{go}", "w").close()
for _ in range(600):
    rmsnorm.rms_norm(x, w)
    if "C++" in host.described() and "Python" not in host.described():
        break
    time.sleep(0.1)
else:
    print(host.described(), file=sys.stderr)
    os._exit(1)
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_both_processes_load_the_library_after_a_fork_during_compilation(cpp, tmp_path) -> None:
    """Although only the parent can get the exit status of the compiling process."""
    finish(start(_FORKS.format(go=tmp_path / "go"), tmp_path, handing_out(tmp_path)))


_WARMUP = """
import torch, rmsnorm
rmsnorm.warmup(dtypes=(torch.float32,), weight_dtypes=(torch.float32,))
x, w = torch.ones(2, 8), torch.ones(8)
y = rmsnorm.rms_norm(x, w)
print(rmsnorm.explain(x, w))
"""


def test_warmup_waits_for_a_compilation_by_another_process(cpp, tmp_path) -> None:
    compiler = handing_out(tmp_path)
    running = [start(_WARMUP, tmp_path / "out", compiler) for _ in range(3)]
    time.sleep(2)
    (tmp_path / "go").touch()
    for one in running:
        assert "called from C++" in finish(one)
    assert (tmp_path / "log").read_text() == "asked\n"


def test_waiting_for_the_compiler_ends_at_the_timeout(monkeypatch) -> None:
    monkeypatch.setattr(host._State, "module", None)
    monkeypatch.setattr(host._State, "look_at", math.inf)  # the C++ is known to be unusable
    assert functional.wait_for_host(60.0)
    looks: list[float] = []
    monkeypatch.setattr(host, "look", lambda: looks.append(0.0))
    monkeypatch.setattr(host._State, "look_at", 0.0)
    assert not functional.wait_for_host(0.0)
    assert looks == [0.0]

    def found() -> None:
        host._State.module = object() if looks else None
        looks.append(0.0)

    monkeypatch.setattr(host, "look", found)
    looks.clear()
    assert functional.wait_for_host(60.0)
    assert looks == [0.0, 0.0]


def test_a_failed_compilation_is_not_repeated_by_those_who_waited(tmp_path, monkeypatch) -> None:
    compiler = script(tmp_path / "cxx", f"echo asked >> {tmp_path}/log; exit 1")
    target, begun = tmp_path / "out" / "made.so", threading.Event()
    monkeypatch.setenv("RMSNORM_CXX", compiler)
    monkeypatch.setattr(host, "_target", lambda: target)
    clock = SimpleNamespace(time=lambda: (begun.set(), time.time())[1], monotonic=time.monotonic)
    monkeypatch.setattr(host, "time", clock)
    raised: list[Exception] = []

    def wait() -> None:
        try:
            host.built()
        except host.Unusable as error:
            raised.append(error)

    waiting = threading.Thread(target=wait)
    with host._lock(target, wait=True):
        waiting.start()
        assert begun.wait(60)  # the thread has started and now waits for the lock
        assert not build.compiled(str(target), host._command())
    waiting.join()
    assert "it could not be compiled, see" in str(raised[0])
    assert (tmp_path / "log").read_text() == "asked\n"
    with pytest.raises(host.Unusable, match="it could not be compiled, see"):
        host.built()  # a later call compiles again
    assert (tmp_path / "log").read_text() == 2 * "asked\n"


_MENDED = """
import os, torch, rmsnorm
from rmsnorm.kernels.host import loader as host
x, w = torch.randn(4, 32), torch.randn(32)
rmsnorm.rms_norm(x, w)
assert "it could not be compiled" in host.described(), host.described()
rmsnorm.warmup(dtypes=(torch.float32,), weight_dtypes=(torch.float32,))
assert host.described() == "called from C++", host.described()
"""


def test_warmup_retries_a_failed_compilation(cpp, tmp_path) -> None:
    """Even in the same process, once the compiler works."""
    good = handing_out(tmp_path)
    (tmp_path / "go").touch()
    compiler = script(tmp_path / "mending", f'[ -e {tmp_path}/mended ] || exit 1; exec {good} "$@"')
    assert "it could not be compiled, see" in process(tmp_path / "out", compiler, looks=300)
    (tmp_path / "mended").touch()
    finish(start(_MENDED, tmp_path / "out", compiler))
    assert list((tmp_path / "out").rglob("*.failed")) == []


def test_explain_says_whether_cpp_makes_the_call(cpp, randn) -> None:
    x, w = randn(2, 8), randn(8)
    assert explain(x, w) == "cpu, float32: cpu kernel (Numba) (called from C++)"
    assert "called from" not in explain(x.double(), w)
    assert "called from" not in explain(TwoTensor(x, x), w)
    assert functional.explain(x, w) == explain(x, w)


def test_explain_says_whether_cpp_makes_the_call_of_a_gated_norm(cpp, randn, monkeypatch) -> None:
    x, w, by_python, gated_forward = randn(4, 8), randn(8), [], dispatch.gated_forward

    def noted(*arguments: Any) -> Any:
        by_python.append(True)
        return gated_forward(*arguments)

    monkeypatch.setattr(dispatch, "gated_forward", noted)
    for gate, said in (
        (randn(4, 8), "called from C++"),
        (randn(8, 4).t(), "called from Python: torch converts gate at each call"),
    ):
        assert explain(x, w, gate=gate, groups=2).startswith(f"cpu, float32: cpu kernel (Numba) ({said})")
        gated_rms_norm(x, gate, w, groups=2)
        assert bool(by_python) == ("Python" in said)
