"""The operators, called directly as compiled graphs do: C++ runs them on plain tensors, Python on anything else."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from concurrency import in_threads
from rmsnorm import add_rms_norm, reference, rms_norm
from rmsnorm.kernels import dispatch
from rmsnorm.kernels.host import loader as host
from tolerance import assert_same_bits

FORWARD, BACKWARD = torch.ops.rmsnorm.forward.default, torch.ops.rmsnorm.backward.default
EPS = 1e-6


@pytest.fixture
def by_python(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the passes that run in Python."""
    if host.described() != "called from C++":
        pytest.skip(host.described())
    seen: list[str] = []
    for name in ("forward", "backward"):
        made = getattr(dispatch, name)
        monkeypatch.setattr(dispatch, name, lambda *a, name=name, made=made: (seen.append(name), made(*a))[1])
    return seen


def assert_all_same(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        if b is None:
            assert a.shape == (0,)  # an output that was not requested
        else:
            assert a.stride() == b.stride()
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cast", "offset"), [("early", 0.0), ("late", 0.0), ("late", 1.0)])
def test_operators_on_plain_tensors_run_without_python(by_python, randn, dtype, cast, offset) -> None:
    for shape, adds, weighted, (first, second) in itertools.product(
        ((3, 2, 33), (7,), (40, 1280), (0, 8)), (False, True), (False, True), ((True, True), (False, True), (True, False))
    ):  # fmt: skip
        if offset and not weighted:
            continue
        x, residual, dy = (randn(*shape, dtype=dtype) for _ in range(3))
        w = randn(shape[-1], dtype=dtype) if weighted else None
        r = residual if adds else None
        got = FORWARD(x, r, w, EPS, cast, offset, first)
        expected = reference.forward(x, r, w, EPS, cast, offset, first)
        assert_all_same(got, expected)
        rows, rstd = (x if expected[1] is None else expected[1]), reference.forward(x, r, w, EPS, cast, offset, True)[2]
        needs = first, second and weighted
        got = BACKWARD(dy, r, rows, w, rstd, cast, offset, *needs)
        plan = dispatch.plan_backward(
            dispatch.Backward.of(dy, r, rows, w, rstd, dispatch.Spec(0.0, cast, offset), *needs)
        )
        assert_all_same(got, dispatch.run(plan, (dy, r, rows, w, rstd)))
    assert by_python == []


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_other_calls_run_in_python_with_the_same_results(by_python, randn) -> None:
    """Calls that need a conversion or autograd, and tensors that torch must dispatch."""
    x, w = randn(4, 32), randn(32)
    expected = FORWARD(x, None, w, EPS, "early", 0.0, True)
    assert by_python == []
    for name, call in {
        "a weight to convert": lambda: FORWARD(x.bfloat16(), None, w.half(), EPS, "early", 0.0, True),
        "an x to copy": lambda: FORWARD(x.t().contiguous().t(), None, w, EPS, "early", 0.0, True),
        "float64": lambda: FORWARD(x.double(), None, w, EPS, "early", 0.0, True),
        "to be differentiated": lambda: FORWARD(x.clone().requires_grad_(), None, w, EPS, "early", 0.0, True),
    }.items():
        by_python.clear()
        call()
        assert by_python == ["forward"], name
    for name, call in {
        "a minus sign": lambda: FORWARD(torch._neg_view(-x), None, w, EPS, "early", 0.0, True),
        "a subclass": lambda: [t.a for t in FORWARD(TwoTensor(x, x), None, TwoTensor(w, w), EPS, "early", 0.0, True)],
    }.items():
        for a, b in zip(call(), expected, strict=True):
            assert_same_bits(a.resolve_neg(), b, name)
    with Passing():
        assert_all_same(FORWARD(x, None, w, EPS, "early", 0.0, True), expected)
    assert_same_bits(torch.vmap(lambda x: FORWARD(x, None, w, EPS, "early", 0.0, True)[0])(x), expected[0])


def test_invalid_arguments_raise_the_errors_of_python(by_python, randn) -> None:
    x, w = randn(4, 32), randn(32)
    FORWARD(x, None, w, EPS, "early", 0.0, False)
    for args, said in (
        ((x, None, w[:5], EPS, "early", 0.0, False), r"\[rms_norm\] weight has shape"),
        ((x, x[:2], w, EPS, "early", 0.0, False), r"\[add_rms_norm\] residual has shape"),
        ((x, None, w, -1.0, "early", 0.0, False), "eps is -1"),
        ((x, None, w, EPS, "soon", 0.0, False), "cast is 'soon'"),
        ((x, None, w, EPS, "early", 1.0, False), "offset is 1 with cast='early'"),
    ):
        with pytest.raises(ValueError, match=said):
            FORWARD(*args)
    short = x.clone()
    short.untyped_storage().resize_(8)
    with pytest.raises(ValueError, match="has a storage of 8 bytes"):
        FORWARD(short, None, w, EPS, "early", 0.0, False)


def test_the_operator_is_differentiable_once(by_python, randn) -> None:
    x, w, dy = randn(4, 32).requires_grad_(), randn(32).requires_grad_(), randn(4, 32)
    expected = torch.autograd.grad(rms_norm(x, w), [x, w], dy)
    got = torch.autograd.grad(FORWARD(x, None, w, EPS, "early", 0.0, True)[0], [x, w], dy, create_graph=True)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a.detach(), b)
    with pytest.raises(RuntimeError, match="second derivative"):
        got[0].sum().backward()
    with torch.no_grad():
        by_python.clear()
        FORWARD(x, None, w, EPS, "early", 0.0, True)
    with torch.inference_mode():
        FORWARD(x.clone(), None, w.clone(), EPS, "early", 0.0, True)
    assert by_python == []


def test_inference_tensors_and_autocast_need_no_python(by_python, randn) -> None:
    with torch.inference_mode():
        x, w = randn(4, 32), randn(32)
    with torch.autocast("cpu"):
        assert FORWARD(x, None, w, EPS, "early", 0.0, False)[0].dtype is torch.float32
    assert by_python == []


@pytest.mark.short
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_graph_runs_the_operators_in_cpp(by_python, randn) -> None:
    """Forward and backward: the profiler shows C++'s own event inside the operator's."""

    def layer(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y, s = add_rms_norm(x * 2, r, w)
        return rms_norm(y + 1, w), s

    x, r, w = randn(4, 32).requires_grad_(), randn(4, 32), randn(32).requires_grad_()
    cotangents = [randn(4, 32), randn(4, 32)]
    expected = torch.autograd.grad(layer(x, r, w), [x, w], cotangents)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        by_python.clear()
        with torch.profiler.profile() as profile:
            got = torch.autograd.grad(compiled(x, r, w), [x, w], cotangents)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)
    inside = [event.cpu_parent.name for event in profile.events() if event.name in ("rmsnorm", "rmsnorm_backward")]
    assert sorted(inside) == ["rmsnorm::backward"] * 2 + ["rmsnorm::forward"] * 2
    assert by_python == []


def test_running_an_operator_in_python_loads_the_cpp(by_python, randn, monkeypatch) -> None:
    """A compiled graph may call nothing else that could load it."""
    looked: list[bool] = []
    monkeypatch.setattr(host, "look", lambda: looked.append(True))
    x, w = randn(4, 32), randn(32, dtype=torch.bfloat16)
    _, _, rstd = FORWARD(x, None, w, EPS, "early", 0.0, True)
    BACKWARD(x, None, x, w, rstd, "early", 0.0, True, True)
    assert looked == [True, True]


def test_concurrent_operator_calls_are_right(by_python, randn) -> None:
    """New and cached kinds of calls, forward and backward."""
    x, w, dy = randn(64, 16), randn(16), randn(64, 16)

    def call(M: int) -> list[Tensor]:
        y, _, rstd = FORWARD(x[:M], None, w, EPS, "early", 0.0, True)
        return [y, rstd, *BACKWARD(dy[:M], None, x[:M], w, rstd, "early", 0.0, True, True)]

    expected = [call(M) for M in range(1, 65)]
    host.forget()

    def work(seed: int) -> None:
        for turn in range(200):
            M = 1 + (turn * 7 + seed * 13) % 64
            assert all(torch.equal(a, b) for a, b in zip(call(M), expected[M - 1], strict=True)), f"{M} rows"

    in_threads(8, work)


def test_outputs_that_were_not_requested_are_ordinary_empty_tensors(by_python, randn) -> None:
    """They are made without torch's dispatcher, but nothing can tell them from `torch.empty(0)`; none share memory."""
    for dtype in (torch.float32, torch.bfloat16):
        x, w = randn(4, 32, dtype=dtype), randn(32, dtype=dtype)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                _, *absent = FORWARD(x.clone(), None, w.clone(), EPS, "early", 0.0, False)
                expected = torch.empty(0, dtype=dtype)
                for t in absent:
                    assert (t.shape, t.stride(), t.dtype, t.device) == (expected.shape, (1,), dtype, x.device)
                    assert t.is_inference() == expected.is_inference()
                    assert torch._C._dispatch_keys(t) == torch._C._dispatch_keys(expected)
                    assert t.untyped_storage().nbytes() == 0
                absent[0].resize_(8).fill_(1.0)
                assert absent[1].untyped_storage().nbytes() == 0
        (absent[0].clone().requires_grad_() * 2).sum().backward()
    assert by_python == []


@pytest.mark.parametrize("transform", ["grad", "jvp", "jacrev", "jacfwd", "vjp"])
def test_torch_func_over_the_operator_itself_raises_an_error_that_names_the_function(transform: str, randn) -> None:
    x, w = randn(3, 8), randn(8)

    def y(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.rmsnorm.forward(x, None, w, 1e-6, "early", 0.0, True)[0]

    calls = {
        "grad": lambda: torch.func.grad(lambda x: y(x).sum())(x),
        "jvp": lambda: torch.func.jvp(y, (x,), (x,)),
        "jacrev": lambda: torch.func.jacrev(y)(x),
        "jacfwd": lambda: torch.func.jacfwd(y)(x),
        "vjp": lambda: torch.func.vjp(y, x),
    }
    with pytest.raises(RuntimeError, match=r"^\[torch.ops.rmsnorm.forward\] .*: call rmsnorm.rms_norm or .* instead$"):
        calls[transform]()
    assert torch.equal(torch.func.vmap(y)(x.requires_grad_()), rms_norm(x, w))
