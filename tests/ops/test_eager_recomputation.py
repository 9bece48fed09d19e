"""The context rmsnorm.recompute: the same gradients, bit for bit, and outputs that can be recomputed are not kept."""

import contextlib
import gc
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import rmsnorm
from conftest import Draw
from rmsnorm import compat, memory
from rmsnorm.kernels.host import loader as host
from tolerance import assert_same_bits

M, N = 6, 16
BYTES = M * N * 4  # of one output
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Leaves:
    """x, the weight of a norm and three matrices that multiply its output."""

    def __init__(self, randn: Draw, dtype: torch.dtype = torch.float32, seed_shape: tuple[int, ...] = (M, N)) -> None:
        self.x = randn(*seed_shape, dtype=dtype).requires_grad_()
        self.w = randn(N, dtype=dtype).requires_grad_()
        self.q, self.k, self.v = (randn(N, N, dtype=dtype).requires_grad_() for _ in range(3))
        self.all = (self.x, self.w, self.q, self.k, self.v)


@pytest.fixture
def leaves(randn: Draw) -> Leaves:
    return Leaves(randn)


@pytest.fixture(params=[False, True], ids=["called_from_cpp", "called_from_python"])
def caller(request: pytest.FixtureRequest) -> Iterator[None]:
    """Calls of norms from C++, once it knows calls of the kind, and from Python."""
    with host.bypassed() if request.param else contextlib.nullcontext():
        yield


def readers(y: Tensor, at: Leaves) -> Tensor:
    return (y @ at.q * (y @ at.k)).sum() + (y.view(2, -1, N) @ at.v).square().sum()


def gradients(loss: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor | None]:
    """By `backward`, because reentrant checkpoints refuse `torch.autograd.grad`."""
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    return [leaf.grad for leaf in leaves]


def same_gradients(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Any:
    """Assert that the gradients with and without the context have the same bits; returns the last counts."""
    for _ in range(2):  # in the second round C++ makes the calls
        expected = gradients(forward(), leaves)
        with rmsnorm.recompute() as recomputation:
            loss = forward()
        got = gradients(loss, leaves)
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert_same_bits(a, b)
    return recomputation


# --- the same bits ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("caller")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [{}, {"cast": "late"}, {"cast": "late", "offset": 1.0}], ids=str)
def test_an_output_is_recomputed_once_for_all_readers_and_gradients_keep_their_bits(
    dtype: torch.dtype, spec: dict[str, Any], randn: Draw
) -> None:
    at = Leaves(randn, dtype)
    found = same_gradients(lambda: readers(rmsnorm.rms_norm(at.x, at.w, **spec), at), at.all)
    assert (found.outputs, found.dropped, found.recomputed, found.kept) == (1, 1, 1, {})
    assert found.dropped_bytes == M * N * dtype.itemsize


@pytest.mark.usefixtures("caller")
def test_the_norm_of_a_sum_is_recomputed_from_the_sum(leaves: Leaves, randn: Draw) -> None:
    residual = randn(M, N).requires_grad_()

    def forward() -> Tensor:
        y, s = rmsnorm.add_rms_norm(leaves.x, residual, leaves.w)
        return readers(y, leaves) + (s * s).sum()

    found = same_gradients(forward, (*leaves.all, residual))
    assert (found.dropped, found.recomputed) == (1, 1)


class _Reader(torch.autograd.Function):
    """Saves its input, or a view of it, and remembers the storage that it gets back."""

    seen: StorageWeakRef

    @staticmethod
    def forward(ctx: Any, y: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(view(y))
        ctx.view = view
        return y.sum()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        _Reader.seen = StorageWeakRef(saved.untyped_storage())
        return dy * saved.double().sum().to(dy.dtype).expand(M, N), None


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda y: y,
    "transposed": lambda y: y.t(),
    "sliced": lambda y: y[1:5:2, 3:],
    "reshaped": lambda y: y.reshape(2, 3, N),
    "one row": lambda y: y[4],
    "expanded": lambda y: y[:, None].expand(M, 3, N),
    "detached": lambda y: y.detach(),
    "nothing": lambda y: y[:0],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_saved_view_of_an_output_is_recomputed_as_that_view(view: Callable[[Tensor], Tensor], leaves: Leaves) -> None:
    found = same_gradients(lambda: _Reader.apply(rmsnorm.rms_norm(leaves.x, leaves.w), view), (leaves.x, leaves.w))
    assert (found.dropped, found.kept) == (1, {})


@pytest.mark.parametrize("view", [lambda y: y.detach().view(torch.int32), lambda y: torch._neg_view(y.detach())])
def test_an_output_is_kept_if_a_view_with_another_dtype_or_class_is_saved(
    view: Callable[[Tensor], Tensor], leaves: Leaves
) -> None:
    found = same_gradients(lambda: _Reader.apply(rmsnorm.rms_norm(leaves.x, leaves.w), view), (leaves.x, leaves.w))
    assert found.dropped == 0
    assert found.kept == {"the saved tensor shares its memory but has another dtype or class, or is negated": 1}


def test_an_operator_that_saves_an_output_twice_gets_it_twice(leaves: Leaves) -> None:
    def forward() -> Tensor:
        y = rmsnorm.rms_norm(leaves.x, leaves.w)
        return (y * y).sum()

    found = same_gradients(forward, (leaves.x, leaves.w))
    assert (found.dropped, found.recomputed) == (1, 1)


def test_the_norm_of_a_norm_is_recomputed_from_the_recomputed_output(leaves: Leaves) -> None:
    def forward() -> Tensor:
        return readers(rmsnorm.rms_norm(rmsnorm.rms_norm(leaves.x, leaves.w), leaves.w, cast="late"), leaves)

    assert same_gradients(forward, leaves.all).dropped == 2


@pytest.mark.parametrize("weighted", [False, True])
def test_outputs_of_layers_and_of_strided_inputs_are_recomputed_too(weighted: bool, randn: Draw) -> None:
    norm, linear = rmsnorm.RMSNorm(N, elementwise_affine=weighted), nn.Linear(N, 3)
    x = randn(4, 5, 2 * N).requires_grad_()
    found = same_gradients(lambda: linear(norm(x[..., 1 : N + 1].transpose(0, 1))).sum(), (x, *linear.parameters()))
    assert (found.dropped, found.kept) == (1, {})


def test_autocast_keeps_the_bits(leaves: Leaves) -> None:
    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = rmsnorm.rms_norm(leaves.x.bfloat16(), leaves.w.bfloat16())
            return readers(y, leaves).float()

    assert same_gradients(forward, leaves.all).dropped == 1


# --- backward passes --------------------------------------------------------------------------------------------


def test_each_backward_pass_over_a_retained_graph_recomputes_the_output(leaves: Leaves) -> None:
    expected = torch.autograd.grad(readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves), leaves.all)
    with rmsnorm.recompute() as found:
        loss = readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves)
    for run in range(1, 4):
        got = torch.autograd.grad(loss, leaves.all, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert found.recomputed == run


def test_gradients_of_one_tensor_at_a_time_are_the_same(leaves: Leaves) -> None:
    expected = torch.autograd.grad(readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves), leaves.all)
    with rmsnorm.recompute():
        loss = readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves)
    for leaf, wanted in [*zip(leaves.all, expected, strict=True)] * 2:
        assert_same_bits(torch.autograd.grad(loss, leaf, retain_graph=True)[0], wanted)


def test_a_reader_that_asks_twice_does_not_free_the_output_that_another_needs(leaves: Leaves) -> None:
    with rmsnorm.recompute() as found:
        y = rmsnorm.rms_norm(leaves.x, leaves.w)
        loss = (y @ leaves.q + y @ leaves.k).sum()
        del y
    for leaf in (leaves.q, leaves.q, leaves.k):
        torch.autograd.grad(loss, leaf, retain_graph=True)
    assert found.recomputed == 1


def test_a_reader_can_run_after_the_norms_backward_pass_has_freed_its_saved_tensors(leaves: Leaves) -> None:
    with rmsnorm.recompute():
        y = rmsnorm.rms_norm(leaves.x, leaves.w)
        first, second = (y @ leaves.q).sum(), (y @ leaves.k).sum()
        del y
    torch.autograd.grad(first, [leaves.x, leaves.q])
    wanted = torch.autograd.grad((rmsnorm.rms_norm(leaves.x, leaves.w) @ leaves.k).sum(), leaves.k)
    assert_same_bits(torch.autograd.grad(second, leaves.k)[0], wanted[0])


def test_gradients_with_create_graph_are_the_same(leaves: Leaves) -> None:
    with rmsnorm.recompute():
        loss = readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves)
        got = torch.autograd.grad(loss, leaves.all, create_graph=True)
    expected = torch.autograd.grad(readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves), leaves.all)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.raises(RuntimeError, match="second derivative of rms_norm"):
        torch.autograd.grad(got[0].sum(), leaves.x)


# --- modified tensors -------------------------------------------------------------------------------------------


def test_an_output_that_is_modified_before_it_is_saved_is_kept(leaves: Leaves) -> None:
    def forward() -> Tensor:
        y = rmsnorm.rms_norm(leaves.x, leaves.w)
        y[:, :2] *= 3
        return readers(y, leaves)

    found = same_gradients(forward, leaves.all)
    assert (found.dropped, found.recomputed) == (0, 0)
    assert found.kept == {"it was modified in place before it was saved": 1}


def modify_output(at: Leaves, y: Tensor, z: Tensor) -> None:
    y[0].zero_()


def modify_x(at: Leaves, y: Tensor, z: Tensor) -> None:
    with torch.no_grad():
        at.x.add_(1)


def modify_weight(at: Leaves, y: Tensor, z: Tensor) -> None:
    with torch.no_grad():
        at.w.add_(1)


def modify_matrix(at: Leaves, y: Tensor, z: Tensor) -> None:
    with torch.no_grad():
        at.k.add_(1)


def modify_result(at: Leaves, y: Tensor, z: Tensor) -> None:
    z.add_(1)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("modify", [modify_output, modify_x, modify_weight, modify_matrix, modify_result])
def test_modifying_a_tensor_after_it_was_saved_raises_as_without_the_context(
    modify: Callable[[Leaves, Tensor, Tensor], None], recomputed: bool, leaves: Leaves
) -> None:
    with rmsnorm.recompute() if recomputed else contextlib.nullcontext():
        y = rmsnorm.rms_norm(leaves.x, leaves.w)
        z = (y @ leaves.q).sigmoid()
        loss = (z @ leaves.k).sum()
    modify(leaves, y, z)
    with pytest.raises(RuntimeError, match=r"modified .*in.?place .*expected version 0 instead"):
        torch.autograd.grad(loss, leaves.all)


def keeping_copies() -> saved_tensors_hooks:
    return saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t)


@pytest.mark.parametrize("around", [keeping_copies, torch.autograd.graph.allow_mutation_on_saved_tensors])
def test_saved_tensors_may_be_modified_if_hooks_around_the_context_keep_copies(around: Any, leaves: Leaves) -> None:
    def changed() -> Tensor:
        y = rmsnorm.rms_norm(leaves.x, leaves.w)
        loss = (y @ leaves.q).sum() + (y @ leaves.k).square().sum()
        y.zero_()
        return loss

    with around():
        wanted = gradients(changed(), leaves.all)
    with around(), rmsnorm.recompute():
        got = gradients(changed(), leaves.all)
    assert [a is None for a in got] == [a is None for a in wanted] == [False, False, False, False, True]
    assert all(map(torch.equal, got[:4], wanted[:4]))


def test_a_reader_that_writes_to_the_recomputed_output_raises(leaves: Leaves) -> None:
    class Writer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            ctx.save_for_backward(y)
            return y.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return ctx.saved_tensors[0].mul_(2)

    with rmsnorm.recompute():
        y = rmsnorm.rms_norm(leaves.x, leaves.w)
        loss = (y @ leaves.q).sum()
        loss = loss + Writer.apply(y).sum()  # made last, so its backward runs first
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves.all)


# --- memory -----------------------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """The bytes of the storages that operators made inside and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def count(self) -> int:
        return sum(nbytes for reference, nbytes in self.made.values() if not reference.expired())


def test_the_bytes_kept_are_fewer_by_exactly_the_dropped_outputs(leaves: Leaves) -> None:
    def alive(recomputed: bool) -> int:
        with Alive() as mode, rmsnorm.recompute() if recomputed else contextlib.nullcontext():
            h = rmsnorm.rms_norm(leaves.x, leaves.w)
            h = rmsnorm.rms_norm((h @ leaves.q) * (h @ leaves.k), leaves.w)
            loss = (h @ leaves.v).sum()
            del h
        assert loss.grad_fn is not None
        return mode.count()

    assert alive(False) - alive(True) == 2 * BYTES


@pytest.mark.usefixtures("caller")
def test_outer_hooks_get_everything_but_the_outputs_and_nothing_twice(leaves: Leaves) -> None:
    def forward() -> Tensor:
        return readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves)

    def packed(recomputed: bool) -> tuple[list[tuple[int, ...]], int]:
        shapes: list[tuple[int, ...]] = []

        def pack(t: Tensor) -> Tensor:
            shapes.append(tuple(t.shape))
            return t.detach()

        with memory.saved_for_backward() as count:
            for _ in range(2):
                context = rmsnorm.recompute() if recomputed else contextlib.nullcontext()
                with saved_tensors_hooks(pack, lambda t: t), context:
                    loss = forward()
            with rmsnorm.recompute() if recomputed else contextlib.nullcontext():
                loss = forward()
            assert loss.grad_fn is not None
            return shapes, count()

    (plain, plain_bytes), (recomputed, bytes_) = packed(False), packed(True)
    for _ in range(2 * 3):  # in each of two passes q and k read y, and v a view of it
        plain.remove((M, N))
    assert sorted(plain) == sorted(recomputed)
    assert plain_bytes - bytes_ == BYTES


def test_save_on_cpu_around_the_context_keeps_the_bits(leaves: Leaves) -> None:
    def forward() -> Tensor:
        return readers(rmsnorm.rms_norm(rmsnorm.rms_norm(leaves.x, leaves.w), leaves.w), leaves)

    expected = torch.autograd.grad(forward(), leaves.all)
    with save_on_cpu(), rmsnorm.recompute() as found:
        loss = forward()
    assert all(map(torch.equal, torch.autograd.grad(loss, leaves.all), expected))
    assert (found.dropped, found.kept) == (2, {})


@pytest.mark.parametrize("retain", [False, True])
def test_the_recomputed_output_is_freed_after_its_last_reader(retain: bool, leaves: Leaves) -> None:
    with rmsnorm.recompute():
        y = rmsnorm.rms_norm(leaves.x, leaves.w)
        loss = (y @ leaves.q).sum() + _Reader.apply(y, VIEWS["whole"])
        unused = (y @ leaves.k).sum()
        del y
    del unused  # with a reader that never asks
    torch.autograd.grad(loss, [leaves.q, leaves.x], retain_graph=retain)
    assert _Reader.seen.expired()


def test_tensors_that_outer_hooks_have_moved_are_not_kept_alive(leaves: Leaves) -> None:
    with keeping_copies(), rmsnorm.recompute():
        h = leaves.x * 2
        y = rmsnorm.rms_norm(h, leaves.w)
        z = (y @ leaves.q).sigmoid()  # the last one that is saved
        loss = z.sum()
        references = [StorageWeakRef(t.untyped_storage()) for t in (h, y, z)]
        del h, y, z
    assert all(reference.expired() for reference in references)
    assert loss.requires_grad


def test_the_input_of_an_output_that_nothing_saved_is_not_kept_alive(leaves: Leaves) -> None:
    with rmsnorm.recompute():
        h = leaves.x * 2
        reference = StorageWeakRef(h.untyped_storage())
        rmsnorm.rms_norm(h, leaves.w)
        del h
        rmsnorm.rms_norm(leaves.x, leaves.w)
        assert reference.expired()


def test_an_output_is_kept_if_its_weight_has_an_empty_tensor_in_its_place_when_it_is_read() -> None:
    """As DeepSpeed's ZeRO-3 puts an empty tensor into a parameter until the module's backward pass begins."""
    norm, linear = rmsnorm.RMSNorm(N), nn.Linear(N, N)
    own = norm.weight.data

    def release(*_: Any) -> None:
        norm.weight.data = own.new_empty(0)

    def gather(*_: Any) -> None:
        norm.weight.data = own

    norm.register_forward_pre_hook(gather)
    norm.register_forward_hook(release)
    norm.register_full_backward_pre_hook(gather)
    x = torch.randn(4, N, requires_grad=True)
    found = []
    for context in (contextlib.nullcontext, rmsnorm.recompute):
        with context() as recomputation:
            y = linear(norm(x))
        y.square().sum().backward()
        found.append((norm.weight.grad, linear.weight.grad))
        norm.weight.grad = linear.weight.grad = None
    assert_same_bits(found[1][0], found[0][0])
    assert_same_bits(found[1][1], found[0][1])
    assert (recomputation.dropped, sum(recomputation.kept.values())) == (0, 1)


@contextlib.contextmanager
def freed(w: Tensor) -> Iterator[None]:
    """Without its memory, as FSDP leaves a weight outside its module's forward and backward passes."""
    values, storage = w.detach().clone(), w.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    yield
    storage.resize_(size)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(w):
        w.copy_(values)


def test_an_output_is_kept_if_its_weight_has_no_memory_when_it_is_read(leaves: Leaves) -> None:
    def forward() -> Tensor:
        y = rmsnorm.rms_norm(leaves.x, leaves.w)
        with freed(leaves.w):
            return readers(y, leaves)

    found = same_gradients(forward, leaves.all)
    assert found.dropped == 0
    assert [reason for reason in found.kept if "FSDP" in reason]


def test_a_weight_without_memory_in_the_backward_pass_raises(leaves: Leaves) -> None:
    with rmsnorm.recompute():
        loss = readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves)
    with freed(leaves.w), pytest.raises(ValueError, match="weight has a storage of 0 bytes"):
        torch.autograd.grad(loss, leaves.q)


def test_an_output_with_a_weight_for_each_head_is_recomputed(randn: Draw) -> None:
    at = Leaves(randn, seed_shape=(2, M, N))
    of_heads = randn(M, N).requires_grad_()
    leaves = at.x, of_heads, at.q, at.k
    found = same_gradients(lambda: (lambda y: (y @ at.q * (y @ at.k)).sum())(rmsnorm.rms_norm(at.x, of_heads)), leaves)
    assert (found.dropped, found.kept, found.recomputed) == (1, {}, 1)


CHANGED = {
    "weight has shape (16,), expected (6, 16)": lambda x, w: setattr(w, "data", torch.ones(N)),
    "weight has dtype torch.bfloat16, expected float32": lambda x, w: setattr(w, "data", w.data.bfloat16()),
    "x has shape (6, 12, 16), expected (12, 6, 16)": lambda x, w: setattr(x, "data", x.data.view(6, 12, 16)),
    "x has dtype torch.float64, expected float32": lambda x, w: setattr(x, "data", x.data.double()),
}


@pytest.mark.parametrize(("words", "change"), CHANGED.items(), ids=CHANGED.keys())
def test_nothing_is_recomputed_from_tensors_of_other_shapes_or_dtypes(
    words: str, change: Callable[[Tensor, Tensor], None], randn: Draw
) -> None:
    """The gradient of q reads the output but does not run the norm's own backward pass, which checks this too."""
    x, w, q = (randn(*shape).requires_grad_() for shape in ((12, M, N), (M, N), (N, N)))
    with rmsnorm.recompute():
        loss = (rmsnorm.rms_norm(x, w) @ q).sum()
    change(x, w)
    with pytest.raises((TypeError, ValueError), match=re.escape(f"[rms_norm] {words} (in the backward pass: ")):
        torch.autograd.grad(loss, q)


@pytest.mark.usefixtures("caller")
@pytest.mark.parametrize("backward", [False, True])
def test_nothing_stays_alive_without_the_garbage_collector(backward: bool, leaves: Leaves) -> None:
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            with rmsnorm.recompute():
                h = leaves.x * 2
                y = rmsnorm.rms_norm(h, leaves.w)
                z = (y @ leaves.q).sigmoid()  # saves its own output
                loss = (z @ leaves.k + y @ leaves.v).sum()
                references = [StorageWeakRef(t.untyped_storage()) for t in (h, y, z)]
                del h, y, z
            assert [r.expired() for r in references] == [False, True, False]
            if backward:
                loss.backward()
            del loss
            assert all(r.expired() for r in references)
    finally:
        gc.enable()


def test_a_tensor_that_reuses_the_memory_of_an_output_is_not_mistaken_for_it(leaves: Leaves, randn: Draw) -> None:
    with rmsnorm.recompute():
        for _ in range(50):
            rmsnorm.rms_norm(leaves.x, leaves.w)  # nothing reads it
            z = randn(M, N)
            (grad,) = torch.autograd.grad((z * leaves.w).sum(), leaves.w)
            assert_same_bits(grad, z.sum(0))


def test_an_output_that_outlives_the_context_counts_as_kept(leaves: Leaves) -> None:
    with rmsnorm.recompute() as found:
        y = rmsnorm.rms_norm(leaves.x, leaves.w)
        readers(y, leaves)
    assert found.dropped == 0
    assert list(found.kept) == ["something else held it when the forward pass ended"]


def test_an_output_that_nothing_saves_is_neither_dropped_nor_kept(leaves: Leaves) -> None:
    with rmsnorm.recompute() as found:
        rmsnorm.rms_norm(leaves.x, leaves.w).sum()
    assert (found.outputs, found.dropped, found.kept) == (1, 0, {})


def test_sparse_tensors_are_saved_as_without_the_context(leaves: Leaves) -> None:
    sparse = torch.eye(N).to_sparse().requires_grad_()
    found = same_gradients(lambda: torch.sparse.mm(sparse, rmsnorm.rms_norm(leaves.x, leaves.w).t()).sum(), leaves.all)
    assert found.outputs == 1


# --- where there is no gradient, or another hook ----------------------------------------------------------------


def test_without_gradients_nothing_is_counted(leaves: Leaves) -> None:
    with rmsnorm.recompute() as found, torch.no_grad():
        rmsnorm.rms_norm(leaves.x, leaves.w)
    with rmsnorm.recompute() as also, torch.inference_mode():
        rmsnorm.rms_norm(leaves.x, leaves.w)
    assert found.outputs == also.outputs == 0


@pytest.mark.usefixtures("caller")
def test_the_output_of_a_norm_that_needs_no_gradients_is_kept(leaves: Leaves) -> None:
    x, w = leaves.x.detach(), leaves.w.detach()
    found = same_gradients(lambda: readers(rmsnorm.rms_norm(x, w), leaves), leaves.all[2:])
    assert found.dropped == 0
    assert [reason for reason in found.kept if "neither x nor the weight requires a gradient" in reason]


def test_hooks_inside_the_context_get_the_outputs(leaves: Leaves) -> None:
    def forward() -> Tensor:
        with save_on_cpu():
            return readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves)

    found = same_gradients(forward, leaves.all)
    assert (found.outputs, found.dropped) == (1, 0)
    assert found.kept == {"it belongs to a checkpointed region or to other hooks on saved tensors": 1}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_region_inside_the_context_is_left_alone(reentrant: bool, leaves: Leaves) -> None:
    def region(x: Tensor) -> Tensor:
        return readers(rmsnorm.rms_norm(x, leaves.w), leaves)

    def forward() -> Tensor:
        y = rmsnorm.rms_norm(leaves.x * 1, leaves.w)
        return (y @ leaves.q).sum() + checkpoint(region, leaves.x * 2, use_reentrant=reentrant)

    found = same_gradients(forward, leaves.all)
    assert (found.dropped, found.recomputed) == (1, 1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_context_does_nothing_inside_a_checkpointed_region(reentrant: bool, leaves: Leaves) -> None:
    found = []

    def region(x: Tensor) -> Tensor:
        with rmsnorm.recompute() as recomputation:
            found.append(recomputation)
            return readers(rmsnorm.rms_norm(x, leaves.w), leaves)

    got = gradients(checkpoint(region, leaves.x * 2, use_reentrant=reentrant), leaves.all)
    expected = gradients(readers(rmsnorm.rms_norm(leaves.x * 2, leaves.w), leaves), leaves.all)
    assert all(map(torch.equal, got, expected))
    assert len(found) == 2
    assert [r.recomputed + r.dropped for r in found] == [0, 0]
    assert "checkpoint" in str(found[-1])


def test_nested_contexts_are_one_and_leave_no_hooks_behind(leaves: Leaves) -> None:
    with rmsnorm.recompute() as outer:
        with rmsnorm.recompute() as inner:
            assert inner is outer
            readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves)
        with save_on_cpu(), rmsnorm.recompute() as other:
            assert other is not outer
    assert outer.dropped == 1
    assert compat.saved_tensors_hooks() is None
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), rmsnorm.recompute():
            raise error
        assert compat.saved_tensors_hooks() is None


def test_a_context_belongs_to_the_thread_that_enters_it(leaves: Leaves, randn: Draw) -> None:
    others = [Leaves(randn) for _ in range(3)]
    expected = [torch.autograd.grad(readers(rmsnorm.rms_norm(o.x, o.w), o), o.all) for o in others]
    got: list[Any] = [None] * 3
    counts: list[Any] = []

    def work(i: int) -> None:
        at = others[i]
        for _ in range(20):
            with rmsnorm.recompute() if i else contextlib.nullcontext() as found:
                loss = readers(rmsnorm.rms_norm(at.x, at.w), at)
            got[i] = torch.autograd.grad(loss, at.all)
            if i:
                counts.append((found.outputs, found.dropped, found.recomputed))

    with rmsnorm.recompute() as mine:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert mine.outputs == 0
    assert counts == [(1, 1, 1)] * 40
    for a, b in zip(got, expected, strict=True):
        assert all(map(torch.equal, a, b))


def test_two_threads_may_run_the_backward_pass_of_one_graph(leaves: Leaves) -> None:
    expected = torch.autograd.grad(readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves), leaves.all)
    with rmsnorm.recompute():
        loss = readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves)
    wrong: list[int] = []

    def work() -> None:
        for i in range(20):
            got = torch.autograd.grad(loss, leaves.all, retain_graph=True)
            if not all(map(torch.equal, got, expected)):
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- torch.func, torch.compile, modes ---------------------------------------------------------------------------


def test_transforms_of_torch_func_around_the_context_work_as_without_it(leaves: Leaves) -> None:
    found = []

    def loss(x: Tensor) -> Tensor:
        with rmsnorm.recompute() as recomputation:
            found.append(recomputation)
            return readers(rmsnorm.rms_norm(x, leaves.w), leaves)

    assert_same_bits(torch.func.grad(loss)(leaves.x.detach()), torch.autograd.grad(loss(leaves.x), leaves.x)[0])
    torch.vmap(loss)(torch.stack([leaves.x, leaves.x]))
    assert ["torch.func" in one.why_inactive for one in found] == [True, False, True]


def test_derivatives_of_torch_func_inside_the_context_raise_as_under_any_hooks(leaves: Leaves) -> None:
    with rmsnorm.recompute(), pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(lambda x: x.sum())(leaves.x)


def test_vmap_and_forward_mode_inside_the_context_keep_their_outputs(leaves: Leaves) -> None:
    def forward() -> Tensor:
        y = torch.vmap(lambda row: rmsnorm.rms_norm(row, leaves.w))(leaves.x)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(leaves.x * 1, torch.ones(M, N))
            z = torch.autograd.forward_ad.unpack_dual(rmsnorm.rms_norm(dual, leaves.w)).primal
        return readers(y, leaves) + (z @ leaves.q).sum()

    assert same_gradients(forward, leaves.all).dropped == 0


def test_where_hooks_on_saved_tensors_are_disabled_the_context_does_nothing(leaves: Leaves) -> None:
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"), rmsnorm.recompute() as found:
        readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves)
    assert found.outputs == 0
    assert "not here" in found.why_inactive


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_regions_inside_the_context_are_compiled_once_and_keep_their_gradients(leaves: Leaves) -> None:
    region = torch.compile(lambda y: (y @ leaves.q).sigmoid() @ leaves.k, backend="aot_eager", fullgraph=True)

    def forward() -> Tensor:
        return (
            readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves) + region(rmsnorm.rms_norm(leaves.x, leaves.w)).sum()
        )

    torch._dynamo.utils.counters.clear()
    found = same_gradients(forward, leaves.all)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert found.dropped == 2


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_function_that_enters_the_context_has_the_same_gradients(leaves: Leaves) -> None:
    def forward() -> Tensor:
        with rmsnorm.recompute():
            return readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves)

    expected = torch.autograd.grad(forward(), leaves.all)
    got = torch.autograd.grad(torch.compile(forward, backend="aot_eager")(), leaves.all)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_autograd_takes_the_backward_pass_with_the_same_gradients(fullgraph: bool, leaves: Leaves) -> None:
    expected = gradients(readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves), leaves.all)
    compiler = torch.compile(backend="aot_eager", fullgraph=fullgraph)
    for _ in range(2):
        with rmsnorm.recompute() as found:
            loss = readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves)
        with torch._dynamo.compiled_autograd._enable(compiler):
            got = gradients(loss, leaves.all)
        assert found.dropped == 1
        assert all(map(torch.equal, got, expected))


def test_copies_in_another_dtype_are_saved_as_they_are(leaves: Leaves) -> None:
    found = same_gradients(
        lambda: (rmsnorm.rms_norm(leaves.x, leaves.w).bfloat16() @ leaves.q.bfloat16()).float().sum(), leaves.all
    )
    assert (found.dropped, found.kept) == (0, {})


# --- without private names of torch ------------------------------------------------------------------------------


def test_nothing_is_recomputed_if_torch_cannot_tell_which_hooks_are_active(
    leaves: Leaves, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "saved_tensors_hooks", lambda: compat.UNKNOWN_HOOKS)
    found = same_gradients(lambda: readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves), leaves.all)
    assert "does not say which hooks" in found.why_inactive


def test_outputs_are_recomputed_without_torchs_private_storage_id(
    leaves: Leaves, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "storage_id", compat.slow_storage_id)
    found = same_gradients(lambda: readers(rmsnorm.rms_norm(leaves.x, leaves.w), leaves), leaves.all)
    assert (found.dropped, found.recomputed) == (1, 1)
