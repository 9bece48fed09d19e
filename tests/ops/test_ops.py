"""The operators inside torch: compile, export, trace, torch.func, forward mode, second derivatives, modes, subclasses.

Everywhere they give the bits of a plain call, and no derivative is silently missing.
"""

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import rmsnorm
from rmsnorm import GatedRMSNorm, RMSNorm, add_rms_norm, explain, reference, rms_norm
from tolerance import SUM_TWICE, TANGENT, assert_same_bits, tangent_bound

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SPECS: tuple[tuple[Any, float], ...] = (("early", 0.0), ("late", 0.0), ("late", 1.0), ("first", 0.0))
Draw = Callable[..., Tensor]
FORWARD, BACKWARD = torch.ops.rmsnorm.forward.default, torch.ops.rmsnorm.backward.default

every_spec = pytest.mark.parametrize(("cast", "offset"), SPECS)


class Layer(nn.Module):
    """A module with a weight and one call of a norm, with or without a residual."""

    def __init__(self, w: Tensor, cast: Any = "early", offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(w.clone())
        self.cast, self.offset = cast, offset

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return rms_norm(x, self.weight, cast=self.cast, offset=self.offset)
        return add_rms_norm(x, residual, self.weight, cast=self.cast, offset=self.offset)


class Seen(TorchDispatchMode):
    """Records the names of our operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rmsnorm":
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def run(f: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The outputs, followed by the gradients of the inputs for a fixed cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = f(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return (*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, cotangents))


def assert_all_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(a, b, f"result {i}")


# --- opcheck -------------------------------------------------------------------------------------------------


def forward_samples(randn: Draw) -> Iterator[tuple[Any, ...]]:
    for dtype, (cast, offset) in zip((*FLOATS, torch.bfloat16), SPECS, strict=True):
        x, w, residual = randn(3, 5, 16, dtype=dtype), randn(16, dtype=dtype), randn(3, 5, 16, dtype=dtype)
        yield x, None, w, 1e-6, cast, offset, True
        yield x, residual, w, 1e-6, cast, offset, False
    x = randn(4, 5, 16)
    yield x, None, None, 0.0, "early", 0.0, True
    yield x.transpose(0, 1), None, randn(16, dtype=torch.bfloat16), 1e-6, "early", 0.0, True
    yield x[:1, :1, :8], None, randn(8), 1e-6, "early", 0.0, True
    yield x.transpose(0, 2), x.transpose(0, 2), randn(4), 1e-6, "late", 0.0, True
    yield x[0, 0], randn(16, dtype=torch.bfloat16), randn(16), 1e-6, "early", 0.0, True
    yield x[:0], None, randn(16), 1e-6, "early", 0.0, True
    yield randn(3, 16).bfloat16(), None, randn(16), 1e-6, "early", 0.0, True
    yield randn(3, 16).double(), None, randn(16), 1e-6, "early", 0.0, True


def test_opcheck_forward(randn) -> None:
    for sample in forward_samples(randn):
        torch.library.opcheck(FORWARD, sample)


def test_opcheck_backward(randn) -> None:
    for (x, residual, w, eps, cast, offset, _), (need_dx, need_dw) in zip(
        forward_samples(randn), itertools.cycle(itertools.product((True, False), repeat=2)), strict=False
    ):
        y, s, rstd = reference.forward(x, residual, w, eps, cast, offset, True)
        rows = x if s is None else s
        for ds in (None, randn(*x.shape).to(rows.dtype)):
            sample = (randn(*x.shape).to(y.dtype), ds, rows, w, rstd, cast, offset, need_dx, need_dw and w is not None)
            torch.library.opcheck(BACKWARD, sample)


# --- torch.compile -------------------------------------------------------------------------------------------


def around(f: Callable[..., Any]) -> Callable[..., Any]:
    """A norm between exact operations that a compiler would try to fuse with it."""

    def g(x: Tensor, *rest: Tensor) -> Any:
        return tree_map(lambda t: t * 0.5, f(x * 2, *rest))

    return g


@pytest.mark.short
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled_code_gives_the_same_bits(backend, randn) -> None:
    specs = SPECS if backend == "aot_eager" else SPECS[:1]
    for dtype, (cast, offset) in itertools.product((torch.bfloat16,) if backend == "inductor" else FLOATS, specs):

        def norm(x: Tensor, w: Tensor, cast: Any = cast, offset: float = offset) -> Tensor:
            return rms_norm(x, w, cast=cast, offset=offset)

        torch._dynamo.reset()  # otherwise all of these count as recompilations of one function
        x, w = randn(6, 5, 96, dtype=dtype), randn(96, dtype=dtype)
        compiled = torch.compile(around(norm), fullgraph=True, backend=backend)
        assert_all_same(run(compiled, x, w), run(around(norm), x, w))
        with torch.no_grad():
            assert_same_bits(compiled(x, w), around(norm)(x, w), "no_grad")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled_code_with_a_residual_gives_the_same_bits(backend, randn) -> None:
    def norm(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, w, cast="late")

    x, residual, w = randn(6, 96, dtype=torch.bfloat16), randn(6, 96, dtype=torch.bfloat16), randn(96)
    compiled = torch.compile(around(norm), fullgraph=True, backend=backend)
    assert_all_same(run(compiled, x, residual, w), run(around(norm), x, residual, w))


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_accepts_every_memory_layout(randn) -> None:
    w = randn(64)
    for x in (
        randn(5, 72)[:, :64], randn(5, 72)[:1, :64], randn(4, 3, 64).transpose(0, 1), randn(64, 3).t(), randn(64),
    ):  # fmt: skip
        torch._dynamo.reset()
        compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
        assert_same_bits(compiled(x, w), rms_norm(x, w), str(x.stride()))
        assert compiled(x, w).stride() == rms_norm(x, w).stride()
        leaf = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(compiled(leaf, w).square().sum(), leaf)
        (expected,) = torch.autograd.grad(rms_norm(leaf, w).square().sum(), leaf)
        assert_same_bits(dx, expected, str(x.stride()))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("grad", [False, True])
def test_a_new_row_count_causes_no_recompilation(grad, randn) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    w = randn(32, dtype=torch.bfloat16).requires_grad_(grad)
    compiled = torch.compile(lambda x, w: rms_norm(x, w), fullgraph=True, backend=counter)
    for M in (2, 3, 5, 64, 1000, 4097):
        x = randn(M, 32, dtype=torch.bfloat16).requires_grad_(grad)
        y = compiled(x, w)
        assert_same_bits(y, rms_norm(x, w), f"M={M}")
        if grad:
            y.sum().backward()
    # Once for the first row count, and once more with a dynamic count.
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_norm_is_one_node_of_one_graph(randn) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=keep)
    x, w = randn(4, 8), randn(8)
    with torch.no_grad():
        torch.compile(rms_norm, fullgraph=True, backend=backend)(x, w)
    targets = [str(n.target) for n in graphs[-1].graph.nodes if n.op == "call_function" and "getitem" not in n.name]
    assert targets == ["rmsnorm.forward.default"], "opaque: traced through, it would be fused and lose bits"


# --- export and trace ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_export(strict, grad, randn) -> None:
    layer = Layer(randn(16, dtype=torch.bfloat16), "late", 1.0).requires_grad_(grad)
    x, residual = randn(4, 16, dtype=torch.bfloat16), randn(4, 16, dtype=torch.bfloat16)
    rows = torch.export.Dim("rows")
    program = torch.export.export(layer, (x, residual), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
    for M in (4, 7, 1000):
        x, residual = randn(M, 16, dtype=torch.bfloat16), randn(M, 16, dtype=torch.bfloat16)
        assert_all_same(program.module()(x, residual), layer(x, residual))
    assert "rmsnorm.forward" in program.run_decompositions().graph_module.code


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_loses_no_gradient(strict, randn) -> None:
    layer, x = Layer(randn(16)), randn(4, 16).requires_grad_()
    exported = torch.export.export(layer, (x.detach(),), strict=strict).module()
    layer(x).square().sum().backward()
    expected, x.grad = (x.grad, layer.weight.grad), None
    exported.weight.grad = None
    try:
        exported(x).square().sum().backward()
    except (RuntimeError, NotImplementedError):
        return
    assert_all_same((x.grad, exported.weight.grad), expected)


def test_export_round_trip(randn, tmp_path) -> None:
    layer, x = Layer(randn(16)), randn(4, 16)
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
    assert_same_bits(torch.export.load(tmp_path / "layer.pt2").module()(x), layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace(randn) -> None:
    layer = Layer(randn(16)).requires_grad_(False)
    traced = torch.jit.trace(layer, (randn(4, 16),), check_trace=False)
    x = randn(9, 16)
    assert_same_bits(traced(x), layer(x), "another row count: nothing was baked in as a constant")
    traced = torch.jit.trace(layer, (randn(4, 16), randn(4, 16)), check_trace=False)
    assert_all_same(traced(x, 2 * x), layer(x, 2 * x))


TRACED: dict[str, tuple[nn.Module, int]] = {
    "RMSNorm": (RMSNorm(16), 1),
    "RMSNorm with heads": (RMSNorm(16, heads=4), 1),
    "RMSNorm with variance_size": (RMSNorm(16, variance_size=8), 1),
    "GatedRMSNorm": (GatedRMSNorm(16), 2),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("layer", "tensors"), TRACED.values(), ids=TRACED.keys())
def test_a_layer_that_jit_has_traced_is_trained_as_before(layer, tensors, grad, randn) -> None:
    """By default, torch.jit.trace compares what it records with what it records without gradients."""
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(layer, (randn(2, 4, 16),) * tensors)
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    x = randn(3, 4, 16).requires_grad_()
    expected = layer(*[x] * tensors)
    of_layer = torch.autograd.grad(expected.square().sum(), (x, layer.weight))
    for one in (traced, torch.jit.load(stored)):
        y = one(*[x] * tensors)
        assert_same_bits(y, expected)
        assert_all_same(torch.autograd.grad(y.square().sum(), (x, one.weight)), of_layer)


def test_make_fx(randn) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x, w = randn(4, 16), randn(16)
    graph = make_fx(lambda x, w: rms_norm(x, w))(x, w)
    assert "rmsnorm.forward" in graph.code
    assert_same_bits(graph(2 * x + 1, w), rms_norm(2 * x + 1, w))


# --- torch.func ----------------------------------------------------------------------------------------------


@every_spec
def test_func_grad(cast, offset, randn) -> None:
    x, w, dy = randn(6, 20), randn(20), randn(6, 20)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return (rms_norm(x, w, cast=cast, offset=offset) * dy).sum()

    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    assert_all_same(torch.func.grad(loss, (0, 1))(x, w), torch.autograd.grad(loss(*leaves), leaves))


@every_spec
@pytest.mark.parametrize("dtype", FLOATS)
def test_vmap(dtype, cast, offset, randn) -> None:
    def norm(x: Tensor, w: Tensor | None) -> Tensor:
        return rms_norm(x, w, cast=cast, offset=offset)

    x, w = randn(5, 3, 16, dtype=dtype), randn(16, dtype=dtype)
    ws = randn(5, 16, dtype=dtype)
    vmap = torch.func.vmap
    loop = torch.stack([norm(a, w) for a in x])
    assert_same_bits(vmap(norm, (0, None))(x, w), loop, "x")
    assert_same_bits(vmap(norm, (0, None), chunk_size=2)(x, w), loop, "x in chunks")
    assert_same_bits(vmap(norm, (1, None))(x.transpose(0, 1), w), loop, "x, along another dimension")
    assert_same_bits(vmap(norm, (-1, None))(x.movedim(0, -1), w), loop, "x, along the last dimension")
    assert_same_bits(vmap(norm, (1, None), out_dims=1)(x, w), norm(x, w), "out_dims")
    assert_same_bits(vmap(norm, (None, 0))(x[0], ws), torch.stack([norm(x[0], a) for a in ws]), "w")
    assert_same_bits(vmap(norm)(x, ws), torch.stack([norm(*a) for a in zip(x, ws, strict=True)]), "both")
    assert_same_bits(vmap(norm, (0, None))(x[:, 0], w), norm(x[:, 0], w), "single rows")
    assert_same_bits(vmap(vmap(norm, (0, None)), (0, None))(x, w), loop, "twice")
    if not offset:
        assert_same_bits(vmap(lambda a: norm(a, None))(x), norm(x, None), "no weight")


def test_vmap_with_a_residual(randn) -> None:
    x, residual, w, ws = randn(5, 3, 16), randn(5, 3, 16), randn(16), randn(5, 16)
    vmap = torch.func.vmap
    for dims, args in (
        ((0, 0, None), (x, residual, w)),
        ((0, None, None), (x, residual[0], w)),
        ((None, 0, None), (x[0], residual, w)),
        ((0, 0, 0), (x, residual, ws)),
        ((None, None, 0), (x[0], residual[0], ws)),
        ((None, 0, 0), (x[0], residual, ws)),
    ):
        loop = [
            add_rms_norm(*(a if d is None else a[i] for a, d in zip(args, dims, strict=True))) for i in range(len(x))
        ]
        expected = tuple(torch.stack(o) for o in zip(*loop, strict=True))
        assert_all_same(vmap(add_rms_norm, dims)(*args), expected)


@every_spec
def test_per_sample_gradients(cast, offset, randn) -> None:
    x, w, dy = randn(5, 3, 16), randn(16), randn(5, 3, 16)

    def loss(w: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        return (rms_norm(x, w, cast=cast, offset=offset) * dy).sum()

    for arguments in (0, 1, (0, 1)):
        grad = torch.func.grad(loss, arguments)
        got = torch.func.vmap(grad, (None, 0, 0))(w, x, dy)
        loop = [grad(w, *sample) for sample in zip(x, dy, strict=True)]
        if isinstance(arguments, int):
            got, loop = (got,), [(g,) for g in loop]
        assert_all_same(got, tuple(torch.stack(g) for g in zip(*loop, strict=True)))


def test_per_sample_gradients_with_a_residual(randn) -> None:
    x, residual, w = randn(5, 3, 16), randn(5, 3, 16), randn(16)

    def loss(w: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        y, s = add_rms_norm(x, residual, w)
        return (y * y * y).sum() + (s * s).sum()

    grad = torch.func.grad(loss, (0, 1, 2))
    loop = [grad(w, *sample) for sample in zip(x, residual, strict=True)]
    expected = tuple(torch.stack(g) for g in zip(*loop, strict=True))
    assert_all_same(torch.func.vmap(grad, (None, 0, 0))(w, x, residual), expected)


def test_batched_cotangents(randn) -> None:
    x, w, dys = randn(3, 8).requires_grad_(), randn(8).requires_grad_(), randn(5, 3, 8)
    y = rms_norm(x, w)
    got = torch.autograd.grad(y, (x, w), dys, is_grads_batched=True, retain_graph=True)
    loop = [torch.autograd.grad(y, (x, w), dy, retain_graph=True) for dy in dys]
    assert_all_same(got, tuple(torch.stack(g) for g in zip(*loop, strict=True)))


def test_jacrev_and_jacfwd_and_vjp(randn) -> None:
    x, w = randn(6), randn(6)
    true = torch.func.jacrev(lambda x, w: reference.truth(x, w, 1e-6, 0.0), (0, 1))(x.double(), w.double())
    for jac in (torch.func.jacrev, torch.func.jacfwd):
        for got, expected, scale in zip(jac(rms_norm, (0, 1))(x, w), true, tangent_scales(x, w), strict=True):
            assert ((got.double() - expected).abs() <= TANGENT * scale).all()
    y, pullback = torch.func.vjp(rms_norm, x, w)
    assert_same_bits(y, rms_norm(x, w))
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    assert_all_same(pullback(torch.ones(6)), torch.autograd.grad(rms_norm(*leaves).sum(), leaves))


def tangent_scales(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The scale relative to which errors in the two Jacobians of one row are measured."""
    x, w = x.double(), w.double()
    r = (x.square().mean() + 1e-6).rsqrt()
    xh = x * r
    return (w * r).abs()[:, None] * (torch.eye(len(x)) + (xh[:, None] * xh).abs() / len(x)), xh.abs().diag()


# --- forward mode --------------------------------------------------------------------------------------------


def true_tangent(f: Any, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    _, true = torch.func.jvp(f, tuple(t.double() for t in primals), tuple(t.double() for t in tangents))
    return true


def assert_tangent(got: Tensor | None, true: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert got is not None, "the tangent was dropped"
    assert (got.double() - true).norm() <= tangent_bound(dtype) * true.norm()


@every_spec
@pytest.mark.parametrize("grad_mode", [True, False])
def test_forward_mode(grad_mode, cast, offset, randn) -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm(x, w, cast=cast, offset=offset)

    def truth(x: Tensor, w: Tensor) -> Tensor:
        return reference.truth(x, w, 1e-6, offset)

    x, w, x_t, w_t = randn(4, 24), randn(24), randn(4, 24), randn(24)
    true = true_tangent(truth, (x, w), (x_t, w_t))
    true_x = true_tangent(truth, (x, w), (x_t, torch.zeros(24)))
    true_w = true_tangent(truth, (x, w), (torch.zeros(4, 24), w_t))
    with torch.set_grad_enabled(grad_mode):
        y, tangent = torch.func.jvp(norm, (x, w), (x_t, w_t))
        assert_same_bits(y, norm(x, w))
        assert_tangent(tangent, true)
        leaf_x, leaf_w = x.clone().requires_grad_(), w.clone().requires_grad_()
        with forward_ad.dual_level():
            dual_x, dual_w = forward_ad.make_dual(x, x_t), forward_ad.make_dual(w, w_t)
            for a, b, expected in (
                (dual_x, dual_w, true), (dual_x, w, true_x), (x, dual_w, true_w), (dual_x, leaf_w, true_x),
                (leaf_x, dual_w, true_w),
            ):  # fmt: skip
                y, tangent = forward_ad.unpack_dual(norm(a, b))
                assert_same_bits(y, norm(x, w))
                assert_tangent(tangent, expected)
            assert forward_ad.unpack_dual(norm(x, w)).tangent is None


@pytest.mark.parametrize("grad_mode", [True, False])
def test_forward_mode_with_a_residual(grad_mode, randn) -> None:
    def truth(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
        return reference.truth(x + residual, w, 1e-6, 0.0)

    primals, tangents = (randn(4, 24), randn(4, 24), randn(24)), (randn(4, 24), randn(4, 24), randn(24))
    with torch.set_grad_enabled(grad_mode):
        (y, s), (y_t, s_t) = torch.func.jvp(add_rms_norm, primals, tangents)
        assert_all_same((y, s), add_rms_norm(*primals))
        assert_tangent(y_t, true_tangent(truth, primals, tangents))
        assert_same_bits(s_t, tangents[0] + tangents[1])
        for i in range(3):
            only = tuple(t if i == j else torch.zeros_like(t) for j, t in enumerate(tangents))
            true = true_tangent(truth, primals, only)
            with forward_ad.dual_level():
                duals = list(primals)
                duals[i] = forward_ad.make_dual(primals[i], tangents[i])
                y, s = add_rms_norm(*duals)
                assert_tangent(forward_ad.unpack_dual(y).tangent, true)
                s_t = forward_ad.unpack_dual(s).tangent
                assert_same_bits(torch.zeros(4, 24) if s_t is None else s_t, only[0] + only[1])


@pytest.mark.parametrize("cast", ["early", "late"])
@pytest.mark.parametrize(("w_dtype", "x_dtype"), [(w, x) for w in FLOATS for x in FLOATS if w in (x, torch.float32)])
def test_forward_mode_dtypes(w_dtype, x_dtype, cast, randn) -> None:
    x, w = randn(4, 24, dtype=x_dtype), randn(24, dtype=w_dtype)
    x_t, w_t = randn(4, 24, dtype=x_dtype), randn(24, dtype=w_dtype)
    y, tangent = torch.func.jvp(lambda x, w: rms_norm(x, w, cast=cast), (x, w), (x_t, w_t))
    assert tangent.dtype == y.dtype
    true = true_tangent(lambda x, w: reference.truth(x, w, 1e-6, 0.0), (x, w), (x_t, w_t))
    assert_tangent(tangent, true, x_dtype)


# --- second derivatives: they raise, or are right ------------------------------------------------------------


def scalar(x: Tensor, w: Tensor) -> Tensor:
    return rms_norm(x, w).pow(3).sum()


SECOND: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "autograd.functional.hessian": lambda x, w: torch.autograd.functional.hessian(scalar, (x, w)),
    "autograd.functional.hessian, forward over reverse": lambda x, w: torch.autograd.functional.hessian(
        scalar, (x, w), vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "autograd.functional.hvp": lambda x, w: torch.autograd.functional.hvp(lambda x: scalar(x, w), x, x),
    "autograd.functional.vhp": lambda x, w: torch.autograd.functional.vhp(lambda x: scalar(x, w), x, x),
    "autograd.functional.jvp, by double backward": lambda x, w: torch.autograd.functional.jvp(
        lambda x: rms_norm(x, w), x, x
    ),
    "func.hessian": lambda x, w: torch.func.hessian(scalar)(x, w),
    "func.hessian of w": lambda x, w: torch.func.jacrev(torch.func.grad(scalar, 1), 0)(x, w),
    "func.grad of grad": lambda x, w: torch.func.grad(lambda x: torch.func.grad(scalar)(x, w).sum())(x),
    "func.jacrev of jacrev": lambda x, w: torch.func.jacrev(torch.func.jacrev(scalar))(x, w),
    "func.jacfwd of jacfwd": lambda x, w: torch.func.jacfwd(torch.func.jacfwd(scalar))(x, w),
    "func.jacrev of jacfwd": lambda x, w: torch.func.jacrev(torch.func.jacfwd(scalar))(x, w),
    "func.jvp of grad": lambda x, w: torch.func.jvp(lambda x: torch.func.grad(scalar)(x, w), (x,), (x + 1,)),
    "func.jvp of grad of w": lambda x, w: torch.func.jvp(lambda x: torch.func.grad(scalar, 1)(x, w), (x,), (x + 1,)),
    "func.grad of jvp": lambda x, w: torch.func.grad(
        lambda x: torch.func.jvp(lambda x: rms_norm(x, w), (x,), (x.detach() + 1,))[1].sum()
    )(x),
    "func.jvp of jvp": lambda x, w: torch.func.jvp(
        lambda x: torch.func.jvp(lambda x: rms_norm(x, w), (x,), (torch.ones_like(x),))[1], (x,), (x + 1,)
    ),
    "func.vmap of hessian": lambda x, w: torch.func.vmap(torch.func.hessian(scalar), (0, None))(x, w),
    "autograd.gradgradcheck": lambda x, w: torch.autograd.gradgradcheck(
        rms_norm, (x.double().requires_grad_(), w.double().requires_grad_())
    ),
}


@pytest.mark.parametrize("way", SECOND)
def test_a_second_derivative_raises(way, randn) -> None:
    with pytest.raises(RuntimeError, match="second derivative"):
        SECOND[way](randn(2, 4), randn(4))


@pytest.mark.parametrize("allow_unused", [False, True])
@every_spec
def test_double_backward_raises(cast, offset, allow_unused, randn) -> None:
    """Of dx and dw with respect to x, w and dy; they are never None, even with allow_unused=True."""
    x, w, dy = (t.requires_grad_() for t in (randn(3, 8), randn(8), randn(3, 8)))
    for first, second in itertools.product((x, w), (x, w, dy, (x, w, dy))):
        y = rms_norm(x, w, cast=cast, offset=offset)
        (g,) = torch.autograd.grad(y, first, dy, create_graph=True)
        assert g.requires_grad, "the gradient has come loose from what it depends on"
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(g.square().sum(), second, allow_unused=allow_unused)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_other_ways_to_a_second_derivative_raise(randn) -> None:
    x, w = randn(3, 8).requires_grad_(), randn(8).requires_grad_()
    (dx,) = torch.autograd.grad(scalar(x, w), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.norm().backward()  # a gradient penalty
    assert x.grad is None
    assert w.grad is None
    # Materialized zeros do not hide the error either.
    (dx,) = torch.autograd.grad(scalar(x, w), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(dx.sum(), w, materialize_grads=True)
    # Two norms in sequence.
    (dx,) = torch.autograd.grad(scalar(rms_norm(x), w), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(dx.sum(), x)
    # backward(create_graph=True), and x.grad used afterwards.
    scalar(x, w).backward(create_graph=True, inputs=[x])
    assert x.grad is not None
    with pytest.raises(RuntimeError, match="second derivative"):
        x.grad.sum().backward()
    x.grad = None


def test_a_second_derivative_of_the_residual_raises(randn) -> None:
    x, residual, w = (t.requires_grad_() for t in (randn(3, 8), randn(3, 8), randn(8)))
    for first, second in itertools.product((x, residual, w), repeat=2):
        y, s = add_rms_norm(x, residual, w)
        (g,) = torch.autograd.grad(y.pow(3).sum() + s.pow(3).sum(), first, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(g.sum(), second, allow_unused=True)


def test_the_second_derivative_through_the_sum_alone_is_right(randn) -> None:
    x, residual, w = randn(3, 8).requires_grad_(), randn(3, 8).requires_grad_(), randn(8)
    _, s = add_rms_norm(x, residual, w)
    (dx,) = torch.autograd.grad(s.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), residual)
    torch.testing.assert_close(second, 6 * (x + residual), rtol=SUM_TWICE, atol=0)


def test_forward_over_reverse_raises(randn) -> None:
    x, w, dy, t = randn(3, 8), randn(8), randn(3, 8), randn(3, 8)
    for leaf in (x, w):
        leaf.requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), t).requires_grad_()
        y = rms_norm(dual, w)
        for target in (dual, w):
            with pytest.raises(RuntimeError, match="second derivative"):
                torch.autograd.grad(y, target, dy, retain_graph=True)


@pytest.mark.parametrize("residual", [False, True])
def test_a_dual_cotangent_loses_no_tangent(residual, randn) -> None:
    """dx and dw are linear in dy, so this derivative exists: the call raises or returns it, but never drops it."""
    x, w, dy, t = randn(3, 8).requires_grad_(), randn(8).requires_grad_(), randn(3, 8), randn(3, 8)
    y = add_rms_norm(x, x.detach(), w)[0] if residual else rms_norm(x, w)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(dy, t)
        try:
            grads = torch.autograd.grad(y, (x, w), dual, retain_graph=True)
        except RuntimeError as error:
            assert "second derivative" in str(error)  # noqa: PT017
            return
        got = [forward_ad.unpack_dual(g).tangent for g in grads]
    assert all(g is not None for g in got), "the tangent was dropped"
    assert_all_same(tuple(got), torch.autograd.grad(y, (x, w), t))


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_second_derivative_of_compiled_code_raises(randn) -> None:
    x, w = randn(3, 8).requires_grad_(), randn(8).requires_grad_()
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    y = compiled(x, w)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.sum(), x, allow_unused=True)


def test_a_first_derivative_with_create_graph_is_the_same(randn) -> None:
    x, w = randn(3, 8, dtype=torch.bfloat16).requires_grad_(), randn(8).requires_grad_()
    plain = torch.autograd.grad(scalar(x, w), (x, w))
    assert_all_same(torch.autograd.grad(scalar(x, w), (x, w), create_graph=True), plain)
    x.grad = w.grad = None
    scalar(x, w).backward(create_graph=True)
    assert_all_same((x.grad, w.grad), plain)
    x.grad = w.grad = None


def test_the_public_gradient_is_the_reference(randn) -> None:
    x, w = randn(5, 12).requires_grad_(), randn(12).requires_grad_()
    dy = randn(5, 12)
    rstd = reference.forward(x, None, w, 1e-6, "early", 0.0, True)[2]
    dx, dw = reference.backward(dy, None, x.detach(), w.detach(), rstd, "early", 0.0, True, True)
    assert_all_same(torch.autograd.grad(rms_norm(x, w), (x, w), dy), (dx, dw))


# --- derivatives inside compiled code, and of the bare operator: they raise, or are right ---------------------


def dual_into(f: Callable[..., Tensor], x: Tensor, w: Tensor, t: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        tangent: Tensor | None = forward_ad.unpack_dual(f(forward_ad.make_dual(x, t), w)).tangent
        return tangent


def plainly(f: Callable[..., Any]) -> Callable[..., Any]:
    return f


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad inside": lambda wrap, x, w, t: wrap(
        lambda x, w, t: torch.func.grad(lambda x, w: (rms_norm(x, w) * t).sum(), (0, 1))(x, w)
    )(x, w, t),
    "grad inside, with a residual": lambda wrap, x, w, t: wrap(
        lambda x, w, t: torch.func.grad(lambda x, w: (add_rms_norm(x, t, w)[0] * t).sum(), (0, 1))(x, w)
    )(x, w, t),
    "jvp inside": lambda wrap, x, w, t: wrap(lambda x, w, t: torch.func.jvp(lambda x: rms_norm(x, w), (x,), (t,))[1])(
        x, w, t
    ),
    "vmap inside": lambda wrap, x, w, t: wrap(lambda x, w, t: torch.func.vmap(rms_norm, (0, None))(x, w))(x, w, t),
    "vmap of grad inside": lambda wrap, x, w, t: wrap(
        lambda x, w, t: torch.func.vmap(torch.func.grad(lambda x, t: (rms_norm(x, w) * t).sum()))(x, t)
    )(x, w, t),
    "a dual tensor into it": lambda wrap, x, w, t: dual_into(wrap(lambda x, w: rms_norm(x, w)), x, w, t),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", TRANSFORMS)
def test_compiled_derivatives_are_right_or_raise(way, randn) -> None:
    x, w, t = randn(3, 8), randn(8), randn(3, 8)
    expected = TRANSFORMS[way](plainly, x, w, t)
    try:
        got = TRANSFORMS[way](lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"), x, w, t)
    except (RuntimeError, NotImplementedError, torch._dynamo.exc.TorchDynamoException):
        return
    expected, got = (v if isinstance(v, tuple) else (v,) for v in (expected, got))
    for a, b in zip(got, expected, strict=True):
        assert a is not None, "the tangent was dropped"
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore")
def test_the_operator_called_directly_loses_no_gradient(randn) -> None:
    x, w, t = randn(3, 8).requires_grad_(), randn(8), randn(3, 8)
    expected = torch.autograd.grad((rms_norm(x, w) * t).sum(), x)

    def bare(x: Tensor) -> Tensor:
        y: Tensor = FORWARD(x, None, w, 1e-6, "early", 0.0, True)[0]
        return y

    ways: list[Callable[[], Any]] = [
        lambda: torch.autograd.grad((bare(x) * t).sum(), x, allow_unused=True),
        lambda: (torch.func.grad(lambda x: (bare(x) * t).sum())(x.detach()),),
    ]
    for way in ways:
        try:
            got = way()
        except (RuntimeError, NotImplementedError):
            continue
        assert_all_same(got, expected)


# --- other features of autograd ------------------------------------------------------------------------------


def test_backward_twice_needs_retain_graph(randn) -> None:
    x, w = randn(3, 8).requires_grad_(), randn(8).requires_grad_()
    y = rms_norm(x, w)
    first = torch.autograd.grad(y.square().sum(), (x, w), retain_graph=True)
    assert_all_same(torch.autograd.grad(y.square().sum(), (x, w)), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, torch.ones_like(y))


@pytest.mark.parametrize("which", ["x", "weight", "sum"])
def test_modifying_a_saved_tensor_raises_in_backward(which, randn) -> None:
    x, residual, w = randn(3, 8).requires_grad_(), randn(3, 8), randn(8).requires_grad_()
    inner, scale = x * 1, w * 1
    if which == "sum":
        y, s = add_rms_norm(inner, residual, scale)
        s.detach().add_(1)
    else:
        y = rms_norm(inner, scale)
        (inner if which == "x" else scale).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_modifying_the_output_changes_no_gradient(randn) -> None:
    x, w = randn(3, 8).requires_grad_(), randn(8)
    y = rms_norm(x, w)
    (expected,) = torch.autograd.grad((y * 2).sum(), x)
    y = rms_norm(x, w)
    y.mul_(2)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert_same_bits(got, expected)


def test_no_grad_leaves_no_graph(randn) -> None:
    x, w = randn(3, 8).requires_grad_(), randn(8).requires_grad_()
    with torch.no_grad():
        assert not rms_norm(x, w).requires_grad
        assert not any(t.requires_grad for t in add_rms_norm(x, x, w))
    assert not rms_norm(x.detach(), w.detach()).requires_grad
    assert rms_norm(x.detach(), w).requires_grad
    assert all(t.requires_grad for t in add_rms_norm(x.detach(), x, w.detach()))


@pytest.mark.parametrize(
    ("needs", "expected"),
    [((True, False), (True, False)), ((False, True), (False, True)), ((True, True), (True, True))],
)
def test_no_gradient_is_computed_for_frozen_tensors(needs, expected, randn, monkeypatch) -> None:
    from rmsnorm.kernels.cpu import planner as cpu

    asked: list[tuple[bool, bool]] = []
    plan = cpu.plan_backward
    monkeypatch.setattr(cpu, "plan_backward", lambda kind: (asked.append((kind.need_dx, kind.need_dw)), plan(kind))[1])
    x, w = randn(3, 8).requires_grad_(needs[0]), randn(8).requires_grad_(needs[1])
    rms_norm(x, w).sum().backward()
    assert set(asked) == {expected}
    assert (x.grad is not None, w.grad is not None) == expected
    asked.clear()
    add_rms_norm(x.detach(), x, w)[0].sum().backward()
    assert set(asked) == {expected}


def test_an_unused_sum_adds_no_gradient_tensor(randn, monkeypatch) -> None:
    from rmsnorm.kernels.cpu import planner as cpu

    cotangents: list[Any] = []
    plan = cpu.plan_backward
    monkeypatch.setattr(cpu, "plan_backward", lambda kind: (cotangents.append(kind.ds), plan(kind))[1])
    x, residual, w = randn(3, 8).requires_grad_(), randn(3, 8), randn(8)
    add_rms_norm(x, residual, w)[0].sum().backward()
    assert set(cotangents) == {None}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant, randn) -> None:
    from torch.utils.checkpoint import checkpoint

    def norm(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm(x * 1.5, w)

    x, w = randn(3, 8, dtype=torch.bfloat16).requires_grad_(), randn(8).requires_grad_()
    norm(x, w).square().sum().backward()
    expected = x.grad, w.grad
    x.grad = w.grad = None
    checkpoint(norm, x, w, use_reentrant=use_reentrant).square().sum().backward()
    assert_all_same((x.grad, w.grad), expected)


def test_saved_tensor_hooks_may_move_saved_tensors(randn) -> None:
    x, w = randn(30, 8, dtype=torch.float16), randn(8)
    expected = run(rms_norm, x, w)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy):
        assert_all_same(run(rms_norm, x, w), expected)


def test_deepcopy_of_a_layer(randn) -> None:
    layer = Layer(randn(8), "late", 1.0)
    x = randn(3, 8)
    assert_same_bits(copy.deepcopy(layer)(x), layer(x))


# --- modes and kinds of tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_inference_mode(dtype, randn) -> None:
    x, w = randn(3, 8, dtype=dtype), randn(8, dtype=dtype).requires_grad_()
    expected = rms_norm(x, w).detach()
    with torch.inference_mode():
        y = rms_norm(x, w)
        inner, _ = add_rms_norm(x * 1, x, w)
        assert y.is_inference()
        assert_same_bits(y, expected)
        assert_same_bits(inner, add_rms_norm(x, x, w)[0])
    assert_same_bits(rms_norm(y, w.detach()), rms_norm(expected, w.detach()), "an inference tensor as input")


def on(device: str, *tensors: Tensor) -> list[Tensor]:
    return [t.to(device) for t in tensors]


@pytest.mark.parametrize("cast", ["early", "late"])
@pytest.mark.parametrize(("w_dtype", "x_dtype"), list(itertools.product(FLOATS, FLOATS)))
def test_meta_and_fake(w_dtype, x_dtype, cast, randn) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, w, r_dtype = randn(2, 3, 8, dtype=x_dtype), randn(8, dtype=w_dtype), torch.bfloat16
    residual = randn(2, 3, 8, dtype=r_dtype)
    real = rms_norm(x, w, cast=cast), *add_rms_norm(x, residual, w, cast=cast)

    def match(got: tuple[Tensor, ...]) -> None:
        for a, b in zip(got, real, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())

    mx, mw, mr = on("meta", x, w, residual)
    got = rms_norm(mx, mw, cast=cast), *add_rms_norm(mx, mr, mw, cast=cast)
    assert all(t.is_meta for t in got)
    match(got)
    leaf = mx.requires_grad_()
    rms_norm(leaf, mw.requires_grad_(), cast=cast).sum().backward()
    assert (leaf.grad.dtype, leaf.grad.shape) == (x_dtype, x.shape)
    assert (mw.grad.dtype, mw.grad.shape) == (w_dtype, w.shape)
    with FakeTensorMode() as mode:
        fx, fw, fr = (mode.from_tensor(t) for t in (x, w, residual))
        match((rms_norm(fx, fw, cast=cast), *add_rms_norm(fx, fr, fw, cast=cast)))
        fx.requires_grad_()
        rms_norm(fx, fw, cast=cast).sum().backward()
        assert (fx.grad.dtype, fx.grad.shape) == (x_dtype, x.shape)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("w_dtype", "x_dtype"), list(itertools.product(FLOATS, FLOATS)))
def test_autocast_changes_no_bit(w_dtype, x_dtype, autocast_dtype, randn) -> None:
    x, w = randn(3, 8, dtype=x_dtype), randn(8, dtype=w_dtype)
    for cast in ("early", "late"):

        def norm(x: Tensor, w: Tensor, cast: Any = cast) -> Tensor:
            return rms_norm(x, w, cast=cast)

        expected = run(norm, x, w)
        with torch.autocast("cpu", dtype=autocast_dtype):
            assert_all_same(run(norm, x, w), expected)


def test_a_dispatch_mode_sees_the_operators(randn) -> None:
    x, residual, w = randn(3, 8).requires_grad_(), randn(3, 8), randn(8).requires_grad_()
    expected = run(rms_norm, x, w)
    with Seen() as seen:
        assert_all_same(run(rms_norm, x, w), expected)
    assert seen.names == ["forward", "backward"]
    with Seen() as seen, torch.no_grad():
        add_rms_norm(x, residual, w)
    assert seen.names == ["forward"]
    y = rms_norm(x, w)
    with Seen() as seen:
        y.sum().backward()
    assert seen.names == ["backward"], "a mode that is entered after the forward pass"


class Wrapped(Tensor):
    """A tensor that wraps another and intercepts every operator, as DTensor does."""

    inner: Tensor
    seen: list[str] = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        self = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        out = func(*tree_map(cls.unwrap, args), **tree_map(cls.unwrap, kwargs or {}))
        return tree_map(lambda t: Wrapped(t) if isinstance(t, Tensor) else t, out)

    @staticmethod
    def unwrap(value: Any) -> Any:
        return value.inner if isinstance(value, Wrapped) else value


def test_a_subclass_goes_through_the_operator(randn) -> None:
    x, residual, w = randn(3, 8), randn(3, 8), randn(8)
    for args in ((Wrapped(x), w), (x, Wrapped(w)), (Wrapped(x), Wrapped(w))):
        Wrapped.seen.clear()
        y = rms_norm(*args)
        assert "rmsnorm.forward.default" in Wrapped.seen
        assert_same_bits(Wrapped.unwrap(y), rms_norm(x, w))
    y, s = add_rms_norm(x, Wrapped(residual), w)
    assert_all_same((Wrapped.unwrap(y), Wrapped.unwrap(s)), add_rms_norm(x, residual, w))
    leaf = Wrapped(x).requires_grad_()
    Wrapped.seen.clear()
    rms_norm(leaf, w).sum().backward()
    assert "rmsnorm.backward.default" in Wrapped.seen
    plain = x.clone().requires_grad_()
    rms_norm(plain, w).sum().backward()
    assert_same_bits(Wrapped.unwrap(leaf.grad), plain.grad)


def test_a_subclass_cotangent_goes_through_the_operator(randn) -> None:
    x, w, dy = randn(3, 8).requires_grad_(), randn(8), randn(3, 8)
    (expected,) = torch.autograd.grad(rms_norm(x, w), x, dy)
    Wrapped.seen.clear()
    (got,) = torch.autograd.grad(rms_norm(x, w), x, Wrapped(dy))
    assert "rmsnorm.backward.default" in Wrapped.seen
    assert_same_bits(Wrapped.unwrap(got), expected)


class Named(Tensor):
    """A subclass without behaviour of its own, as many libraries define."""


def test_a_subclass_without_behaviour_gives_the_same_bits(randn) -> None:
    x, w = randn(3, 8), randn(8)
    y = rms_norm(x.as_subclass(Named), w.as_subclass(Named))
    assert_same_bits(y.as_subclass(Tensor), rms_norm(x, w))
    buffer = nn.Buffer(w)
    assert_same_bits(rms_norm(x, buffer), rms_norm(x, w))


# --- explain and warmup --------------------------------------------------------------------------------------


def test_explain(randn) -> None:
    x, w = randn(4, 8), randn(8)
    assert "Numba" in explain(x, w)
    assert "cop" not in explain(x, w)
    assert "cop" not in explain(randn(4, 9)[:, :8], w), "strided rows are not copied"
    strided = explain(randn(8, 4).t(), w)
    assert "Numba" in strided
    assert "copied once" in strided
    assert "x" in strided.split("copied once")[1]
    assert "weight" in explain(x, randn(8, 2)[:, 0]).split("copied once")[1]
    assert "residual" in explain(x, w, randn(8, 4).t()).split("copied once")[1]
    double = explain(x.double(), w)
    assert "reference" in double
    assert "float64" in double
    assert "meta" in explain(*on("meta", x, w))
    assert "reference" in explain(*on("meta", x, w))
    assert "torch.ops.rmsnorm" in explain(Wrapped(x), w)


def test_explain_runs_nothing(randn, monkeypatch) -> None:
    from rmsnorm.kernels import dispatch
    from rmsnorm.kernels.cpu.threads import MachineCode

    monkeypatch.delattr(dispatch, "run")
    monkeypatch.delattr(MachineCode, "run")
    x, w, residual = randn(4, 8), randn(8), randn(4, 8)
    with torch.profiler.profile() as profile:
        explain(x, w, residual)
    assert not [event.name for event in profile.events() if "rmsnorm" in event.name or "empty" in event.name]


def test_warmup_leaves_nothing_to_compile(randn, monkeypatch) -> None:
    from rmsnorm.kernels.cpu import compiling

    rmsnorm.warmup()
    rmsnorm.warmup(dtypes=(torch.bfloat16,), weight_dtypes=(torch.float16,), hidden_size=3)

    def fail(*args: Any) -> None:
        raise AssertionError(f"compiled after warmup: {args}")

    monkeypatch.setattr(compiling, "_code", fail)
    for dtype, cast in itertools.product(FLOATS, ("early", "late")):
        for w_dtype in (dtype, torch.float32):
            x, w = randn(3, 50, dtype=dtype).requires_grad_(), randn(50, dtype=w_dtype).requires_grad_()
            rms_norm(x, w, cast=cast).sum().backward()
            add_rms_norm(x, x.detach(), w, cast=cast)[0].sum().backward()
        rms_norm(x, None).sum().backward()


def test_fp64_is_computed_in_fp32_and_returned_as_promoted(randn) -> None:
    x, w = randn(3, 8).double(), randn(8)
    assert_same_bits(rms_norm(x, w), (w.double() * rms_norm(x.float()).double()))
    assert_same_bits(rms_norm(x, w, cast="late"), rms_norm(x.float(), w).double())
    assert rms_norm(x.float(), w.double()).dtype == torch.float64
    leaf = x.clone().requires_grad_()
    rms_norm(leaf, w).sum().backward()
    assert leaf.grad.dtype == torch.float64
