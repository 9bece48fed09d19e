"""batch_invariant: the bits of F.rms_norm inside the context, and that nothing else changes, inside or afterwards."""

import contextlib
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from rmsnorm import TorchRMSNorm, batch_invariant, compat, patch, recompute, rms_norm
from tolerance import assert_same_bits

TORCH_EPS = torch.finfo(torch.float32).eps
N = 96


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_of(shape: int | tuple[int, ...] = N, eps: float | None = None, **named: Any) -> nn.RMSNorm:
    norm = nn.RMSNorm(shape, eps, **named)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return norm


def late(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """What rms_norm gives for the arguments of the norm."""
    k = len(norm.normalized_shape)
    w = None if norm.weight is None else norm.weight.flatten()
    eps = TORCH_EPS if norm.eps is None else norm.eps
    return rms_norm(x.flatten(-k), w, eps, cast="late").view(x.shape)


def gradients(y: Tensor, x: Tensor, norm: nn.RMSNorm) -> list[Tensor]:
    return list(torch.autograd.grad(y, [x, *norm.parameters()], rows(*y.shape, seed=2).to(y.dtype)))


def is_ours(norm: Callable[[Tensor], Tensor]) -> bool:
    """Whether a norm without a dtype or eps of its own gives our bits: in fp32 some outputs of torch's differ."""
    x = rows(300, N)
    y, ours, torchs = norm(x), late(x, norm_of()), _plain(x)
    assert not torch.equal(ours, torchs)
    assert torch.equal(y, ours) or torch.equal(y, torchs)
    return torch.equal(y, ours)


def _plain(x: Tensor) -> Tensor:
    """torch's own bits, also inside the context."""
    with torch._C.DisableTorchFunction():
        return norm_of()(x)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize(("shape", "eps"), [((N,), None), ((N,), 1e-6), ((6, 16), None), ((2, 3, 16), 0.5)])
def test_outputs_and_gradients_have_the_bits_of_rms_norm(
    x_dtype: torch.dtype, w_dtype: torch.dtype | None, shape: tuple[int, ...], eps: float | None
) -> None:
    norm = norm_of(shape, eps, elementwise_affine=w_dtype is not None).to(w_dtype)
    x = rows(50, 2, *shape, dtype=x_dtype).requires_grad_()
    torchs, expected = norm(x), late(x, norm)
    with batch_invariant():
        y = norm(x)
    assert y.dtype == torchs.dtype
    assert_same_bits(y, expected)
    for ours, theirs in zip(gradients(y, x, norm), gradients(expected, x, norm), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize(
    "function",
    [F.rms_norm, torch.rms_norm, torch.ops.aten.rms_norm, torch.ops.aten.rms_norm.default],
    ids=["F.rms_norm", "torch.rms_norm", "packet", "overload"],
)
def test_every_public_form_of_the_function_is_covered(function: Any) -> None:
    w = norm_of().weight.detach()
    with batch_invariant():
        assert is_ours(lambda x: function(x, [N], w))
        assert is_ours(lambda x: function(x, torch.Size([N]), weight=w, eps=None))
        assert is_ours(lambda x: function(x.view(1, 1, 1, 1, 1, *x.shape), (N,), w, TORCH_EPS).view(x.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_as_in_a_batch(dtype: torch.dtype) -> None:
    """Of y and dx, at a width at which sums are split into parts."""
    norm, x, dy = norm_of(70001), rows(3, 70001, dtype=dtype), rows(3, 70001, dtype=dtype, seed=2)
    with batch_invariant():
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        for i in range(3):
            alone = x[i : i + 1].clone().requires_grad_()
            y1 = norm(alone)
            assert_same_bits(y1, y[i : i + 1])
            assert_same_bits(*torch.autograd.grad(y1, alone, dy[i : i + 1]), dx[i : i + 1])


def test_torchs_bits_are_back_afterwards() -> None:
    norm = norm_of()
    with batch_invariant():
        assert is_ours(norm)
    assert not is_ours(norm)
    with contextlib.suppress(KeyError), batch_invariant():
        raise KeyError
    assert not is_ours(norm)


def test_contexts_nest() -> None:
    norm, context = norm_of(), batch_invariant()
    with context:
        with batch_invariant(), context:
            assert is_ours(norm)
        assert is_ours(norm)
    assert not is_ours(norm)


def test_only_the_thread_that_entered_it_is_in_the_context() -> None:
    norm, entered, leave = norm_of(), threading.Event(), threading.Event()
    inside: list[bool] = []

    def work() -> None:
        with batch_invariant():
            entered.set()
            leave.wait(60)
            inside.append(is_ours(norm))

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(60)
    assert not is_ours(norm)
    with batch_invariant():
        assert is_ours(norm)
    leave.set()
    thread.join()
    assert inside == [True]
    assert not is_ours(norm)


# --- torch.compile, export ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_has_graphs_of_its_own_inside_and_outside() -> None:
    norm = norm_of()
    for first in (True, False):
        torch._dynamo.reset()
        compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
        before = compat.compiled_graphs()
        for inside in (first, not first, first, not first):
            with batch_invariant() if inside else contextlib.nullcontext():
                assert is_ours(compiled) is inside
        assert compat.compiled_graphs() == before + 2  # neither is compiled again


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_context_works_inside_compiled_code_and_its_gradients_are_ours() -> None:
    norm, x = norm_of(), rows(300, N).requires_grad_()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        with batch_invariant():
            y = norm(x)
        return y, norm(x)

    inside, outside = both(x)
    assert_same_bits(inside, late(x, norm))
    assert_same_bits(outside, norm(x))
    for ours, theirs in zip(gradients(inside, x, norm), gradients(late(x, norm), x, norm), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_with_dynamic_sizes() -> None:
    compiled = torch.compile(lambda x: F.rms_norm(x, x.shape[-1:]), backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((30, 40), (50, 64), (7, 2, 20)):
        with batch_invariant():
            y = compiled(rows(*shape))
        assert_same_bits(y, rms_norm(rows(*shape), None, TORCH_EPS))


def test_an_exported_program_keeps_the_bits_and_a_program_of_torch_gets_them() -> None:
    norm, x = norm_of(), rows(300, N)
    with batch_invariant():
        kept = torch.export.export(norm, (x,)).module()
    assert is_ours(kept)
    plain = torch.export.export(norm, (x,)).module()
    assert not is_ours(plain)
    with batch_invariant():
        assert is_ours(plain)


# --- beside other parts of torch ------------------------------------------------------------------------------


def test_only_rms_norm_changes_and_other_modes_see_every_call() -> None:
    class Seen(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Any] = []

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls.append(function)
            return function(*args, **(kwargs or {}))

    norm, x = norm_of(), rows(3, N)
    expected = F.layer_norm(x, (N,))
    with Seen() as around, batch_invariant(), Seen() as within:
        y = norm(x)
        assert_same_bits(F.layer_norm(x, (N,)), expected)
    assert within.calls[:1] == [F.rms_norm]
    assert F.layer_norm in within.calls
    assert F.layer_norm in around.calls
    assert_same_bits(y, late(x, norm))


def test_layers_and_contexts_of_this_package_work_inside() -> None:
    patched, ours = norm_of(), TorchRMSNorm(N)
    patch(nn.Sequential(patched))
    ours.load_state_dict(patched.state_dict())
    with batch_invariant():
        assert is_ours(patched)
        assert is_ours(ours)
        with recompute() as recomputation:
            y = nn.Linear(N, 2)(norm_of()(rows(3, N).requires_grad_()))
    y.sum().backward()
    assert (recomputation.dropped, recomputation.recomputed) == (1, 1)


def test_transforms_of_torch_func() -> None:
    norm, x = norm_of(), rows(5, 300, N)
    w = norm.weight.detach()
    with batch_invariant():
        y = torch.vmap(norm)(x)
        dx = torch.func.grad(lambda x: F.rms_norm(x, (N,), w).square().sum())(x)
    assert_same_bits(y, late(x, norm))
    leaf = x.clone().requires_grad_()
    late(leaf, norm).square().sum().backward()
    assert_same_bits(dx, leaf.grad)


def test_a_dtensor_stays_one() -> None:
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        norm, x = norm_of(), rows(300, N)
        sharded = DTensor.from_local(x, mesh, [Shard(0)])
        w = DTensor.from_local(norm.weight.detach(), mesh)
        with batch_invariant():
            y = F.rms_norm(sharded, (N,), w)
        assert y.placements == (Shard(0),)
        assert_same_bits(y.to_local(), late(x, norm))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("function", [Tensor.backward, torch.autograd.backward, torch.autograd.grad])
def test_norms_that_activation_checkpointing_calls_again_have_the_same_bits(function: Any, use_reentrant: bool) -> None:
    if use_reentrant and function is torch.autograd.grad:
        return  # torch does not allow it
    norm, x = norm_of(), rows(300, N).requires_grad_()
    calls: list[bool] = []

    def part(x: Tensor) -> Tensor:
        y = norm(x)
        calls.append(torch.equal(y.detach(), late(x, norm).detach()))
        return y

    with batch_invariant():
        y = checkpoint(part, x, use_reentrant=use_reentrant)
        dy = rows(*y.shape, seed=2)
        if function is torch.autograd.grad:
            found = function(y, [x, norm.weight], dy)
        else:
            function(y, dy)
            found = [x.grad, norm.weight.grad]
        assert is_ours(norm)
    assert all(calls)
    for ours, theirs in zip(found, gradients(late(x, norm), x, norm), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_on_a_cpu_changes_no_bit(autocast: torch.dtype) -> None:
    norm = norm_of()
    for dtype in (torch.float32, torch.bfloat16):
        x = rows(300, N, dtype=dtype)
        with torch.autocast("cpu", autocast), batch_invariant():
            y = norm(x)
        assert_same_bits(y, late(x, norm))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16, None])
def test_autocast_on_a_gpu_gives_torchs_dtype_by_our_operator(x_dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    """On fake tensors, which know what autocast does on a GPU: it casts to fp32, in the versions of torch that do."""

    class Operators(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append((function, args))
            return function(*args, **(kwargs or {}))

    called: list[Any] = []
    with torch.no_grad(), FakeTensorMode(), torch.device("cuda"):
        norm, x = nn.RMSNorm(N, elementwise_affine=w_dtype is not None, dtype=w_dtype), torch.empty(3, N, dtype=x_dtype)
        torch.set_autocast_enabled("cuda", True)
        try:
            expected = norm(x)
            with warnings.catch_warnings(action="error"), batch_invariant(), Operators():
                y = norm(x)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert y.dtype == expected.dtype
    ((x_seen, _, w_seen),) = [args[:3] for function, args in called if function is torch.ops.rmsnorm.forward.default]
    assert x_seen.dtype == expected.dtype
    assert w_seen is None or w_seen.dtype == (torch.float32 if expected.dtype is torch.float32 else w_dtype)


# --- what stays torch's ---------------------------------------------------------------------------------------


class Unknown(Tensor):
    """A subclass whose operators we know nothing of."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C._DisableTorchDispatch():
            return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("x", "why"),
    [(rows(300, N).double(), "torch computes float64 in fp64"), (rows(300, N).as_subclass(Unknown), "an Unknown")],
    ids=["float64", "subclass"],
)
def test_where_torchs_own_function_runs_a_warning_says_why(x: Tensor, why: str) -> None:
    with batch_invariant(), pytest.warns(UserWarning, match=rf"\[batch_invariant\] torch's own F.rms_norm ran.*{why}"):
        y = F.rms_norm(x, (N,))
    assert torch.equal(y.as_subclass(Tensor), F.rms_norm(x, (N,)).as_subclass(Tensor))


@pytest.mark.parametrize("shape", [N, (), (N + 1,), (2.5,), "ab", None], ids=str)
def test_errors_are_torchs(shape: Any) -> None:
    with pytest.raises((RuntimeError, TypeError)) as torchs:
        F.rms_norm(rows(3, N), shape)
    with warnings.catch_warnings(action="error"), batch_invariant(), pytest.raises(torchs.type) as ours:
        F.rms_norm(rows(3, N), shape)
    assert str(ours.value) == str(torchs.value)


def test_a_second_derivative_raises() -> None:
    x = rows(3, N).requires_grad_()
    with batch_invariant():
        y = F.rms_norm(x, (N,))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative of rms_norm is not implemented"):
        dx.sum().backward()
