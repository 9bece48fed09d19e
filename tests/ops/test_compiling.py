"""Every way to compile a model gives the outputs and gradients of eager mode, bit for bit.

The models are fp32, and their operators other than norms round once: whatever a compiler fuses, their bits stay.
Modes in which Inductor may choose other matrix products run `Chain`, which has none.
"""

import contextlib
import copy
import functools
import operator
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import rmsnorm
from rmsnorm import reference
from rmsnorm.kernels.host import loader as host
from tolerance import DX, assert_same_bits, published_y

N = 32
FORWARD, BACKWARD = torch.ops.rmsnorm.forward.default, torch.ops.rmsnorm.backward.default
pytestmark = [pytest.mark.compiled, pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.filterwarnings("ignore")]


# --- the models ----------------------------------------------------------------------------------------------


class LlamaRMSNorm(nn.Module):
    """The form of the published classes; `patch` replaces it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(N)), 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        h = hidden_states.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * h.to(hidden_states.dtype)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = (nn.Linear(N, width, bias=False) for width in (N, 2 * N, N))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 2, -1).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, -1).transpose(1, 2).chunk(2, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, N))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(N, 2 * N, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * N, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.gate(x)) * self.up(x))


class LlamaLayer(nn.Module):
    """A decoder layer as transformers writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = LlamaRMSNorm(), LlamaRMSNorm()
        self.attention, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class OwnLayer(nn.Module):
    """A layer of this package's own layer and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = rmsnorm.RMSNorm(N), Mlp()
        self.weight = nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        y, x = rmsnorm.add_rms_norm(self.mlp(self.norm(x)), x, self.weight)
        return x + rmsnorm.rms_norm(self.mlp(y), self.weight, cast="late", offset=1.0)


class Decoder(nn.Module):
    """Two layers and a last norm. wrapped(layer) returns what is called in the place of a layer."""

    wrapped: Callable[[nn.Module], Callable[[Tensor], Tensor]] = staticmethod(lambda layer: layer)

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList([LlamaLayer(), OwnLayer()]), LlamaRMSNorm()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.wrapped(layer)(x)
        return self.norm(x)


class Chain(nn.Module):
    """Norms of every kind between additions."""

    def __init__(self) -> None:
        super().__init__()
        self.patched, self.own = LlamaRMSNorm(), rmsnorm.RMSNorm(N)
        self.weight = nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patched(x)
        y, x = rmsnorm.add_rms_norm(self.own(x), x, self.weight)
        return x + rmsnorm.rms_norm(y, self.weight, cast="late", offset=1.0)


class GemmaRMSNorm(nn.Module):
    """The form of Gemma's classes; `patch` replaces it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(N)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class Checkpointed(nn.Module):
    """Norms, each under a checkpoint of its own, and a norm outside of them."""

    def __init__(self, norms: Iterable[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.norms = list(norms)
        self.layers = nn.ModuleList(norm for norm in self.norms if isinstance(norm, nn.Module))

    def forward(self, x: Tensor) -> Tensor:
        *first, last = self.layers or self.norms
        for norm in first:
            x = checkpoint(norm, x, use_reentrant=False)
        return last(x)


@functools.cache
def patched(cls: type[nn.Module], norms: int) -> nn.Module:
    torch.manual_seed(0)
    model = cls()
    assert len(rmsnorm.patch(model).replaced) == norms
    return model


@pytest.fixture
def decoder() -> nn.Module:
    return copy.deepcopy(patched(Decoder, 3))


@pytest.fixture
def chain() -> nn.Module:
    return copy.deepcopy(patched(Chain, 1))


@pytest.fixture
def x(randn: Any) -> Tensor:
    return randn(2, 5, N)


# --- what is compared ----------------------------------------------------------------------------------------


def trained(
    call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, prepare: Any = None,
    around_backward: Any = contextlib.nullcontext,
) -> dict[str, Tensor]:  # fmt: skip
    """The output, and the gradients of x and of the model's parameters for a fixed cotangent."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    if prepare is not None:
        prepare(x)
    y = call(x)
    with around_backward():
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(7)))
    return {"y": y.detach(), "dx": x.grad} | {name: p.grad for name, p in model.named_parameters()}


def assert_all_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        assert t is not None, f"{name} has no gradient"
        assert_same_bits(got[name], t, name)


def assert_as_eager(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, prepare: Any = None) -> None:
    """Compares call, which runs the model's parameters, with the model."""
    expected = trained(model, model, x)
    assert_all_same(trained(call, model, x, prepare), expected)


# --- torch.compile -------------------------------------------------------------------------------------------


def test_the_default_mode_trains_and_infers(decoder, x) -> None:
    compiled = torch.compile(decoder, fullgraph=True)
    assert_as_eager(compiled, decoder, x)
    with torch.no_grad():
        assert_same_bits(compiled(x), decoder(x), "no_grad")


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_every_compile_mode_keeps_the_bits_of_eager_mode(mode: str, chain, x) -> None:
    compiled = torch.compile(chain, fullgraph=True, mode=mode)
    for _ in range(2):
        assert_as_eager(compiled, chain, x)


@pytest.mark.parametrize("option", ["cpp_wrapper", "emulate_precision_casts", "batch_invariant"])
def test_inductors_options_keep_the_bits_of_eager_mode(option: str, chain, x) -> None:
    if option not in torch._inductor.list_options():
        pytest.skip(f"torch {torch.__version__} has no option {option}")
    compiled = torch.compile(chain, fullgraph=True, options={option: True})
    for _ in range(2):
        assert_as_eager(compiled, chain, x)


def test_freezing_keeps_the_bits_of_eager_mode(chain, x) -> None:
    chain.eval()
    with torch.no_grad(), inductor.patch(freezing=True):
        compiled = torch.compile(chain, fullgraph=True)
        assert_same_bits(compiled(x), chain(x))


@pytest.mark.parametrize("made_by", ["C++", "Python", "a compiled graph"])
def test_compiled_autograd_takes_the_backward_pass_as_one_graph(made_by: str, chain, x) -> None:
    """Whatever made the forward pass."""
    expected = trained(chain, chain, x)
    by_python = host.bypassed() if made_by == "Python" else contextlib.nullcontext()
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    graphs = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor) -> Tensor:
        with by_python:
            return (compiled if made_by == "a compiled graph" else chain)(x)

    def compiling_backward() -> Any:
        return torch._dynamo.compiled_autograd._enable(torch.compile(backend=graphs, fullgraph=True))

    assert_all_same(trained(step, chain, x, around_backward=compiling_backward), expected)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("marked", [True, False])
def test_one_graph_serves_every_batch_size_and_length(marked: bool, decoder, chain, randn) -> None:
    model, backend = (decoder, "aot_eager") if marked else (chain, "inductor")

    def mark(x: Tensor) -> None:
        for axis in (0, 1):
            torch._dynamo.mark_dynamic(x, axis)

    compiled = torch.compile(model, fullgraph=True, dynamic=None if marked else True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in ((2, 5), (3, 7), (4, 16), (7, 3)):
            assert_as_eager(compiled, model, randn(batch, length, N), mark if marked else None)


def test_each_layer_compiled_by_itself(decoder, x) -> None:
    expected = trained(decoder, decoder, x)
    for layer in (*decoder.layers, decoder.norm):
        layer.compile(fullgraph=True)
    assert_all_same(trained(decoder, decoder, x), expected)


# --- CUDA graphs, as far as a CPU can tell -------------------------------------------------------------------


def test_cuda_graphs_may_capture_the_operators(randn) -> None:
    """They modify nothing, return no view, leave nothing on the CPU, and carry no tag for which torch skips a graph."""
    for op in (FORWARD, BACKWARD):
        assert not op._schema.is_mutable
        assert all(one.alias_info is None for one in (*op._schema.arguments, *op._schema.returns))

    def step(x: Tensor, residual: Tensor, w: Tensor, dy: Tensor, ds: Tensor) -> Any:
        y, s, rstd = FORWARD(x, residual, w, 1e-6, "early", 0.0, True)
        return y, *BACKWARD(dy, ds, s, w, rstd, "early", 0.0, True, True)

    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        rows = [torch.empty(4, N) for _ in range(4)]
        graph = make_fx(step, tracing_mode="fake")(*rows[:2], torch.empty(N), *rows[2:]).graph
    calls = [node for node in graph.nodes if node.op == "call_function" and node.target is not operator.getitem]
    assert [node.target for node in calls] == [FORWARD, BACKWARD]
    skipped = {"cudagraph_unsafe", "data_dependent_output", "dynamic_output_shape", "nondeterministic_seeded"}
    for node in graph.nodes:
        made = [t for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
        assert made or node.op == "output"
        assert all(t.device.type == "cuda" for t in made), node
        assert not {tag.name for tag in getattr(node.target, "tags", ())} & skipped, node


# --- checkpointing -------------------------------------------------------------------------------------------


def recording(graphs: list[list[Any]]) -> Any:
    """A backend that keeps the operators of the forward and the backward graph, split as Inductor splits them."""

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([node.target for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)


def test_gradient_checkpointing(decoder, x) -> None:
    expected = trained(decoder, decoder, x)
    decoder.wrapped = lambda layer: functools.partial(checkpoint, layer, use_reentrant=False)
    assert_all_same(trained(decoder, decoder, x), expected)
    assert_all_same(trained(torch.compile(decoder, fullgraph=True), decoder, x), expected)


NORMS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "a layer": lambda: rmsnorm.RMSNorm(N),
    "a layer with an offset": lambda: rmsnorm.RMSNorm(N, cast="late", offset=1.0),
    "a layer with a variance_size": lambda: rmsnorm.RMSNorm(N, variance_size=8),
    "the published class": lambda: rmsnorm.DeepseekV2RMSNorm(N),
    "a replaced norm": LlamaRMSNorm,
    "a replaced norm with an offset": GemmaRMSNorm,
    "rms_norm": lambda: lambda x: rmsnorm.rms_norm(x, None, 1.0),
    "rms_norm with a variance_size": lambda: lambda x: rmsnorm.rms_norm(x, None, 1.0, variance_size=8),
    "add_rms_norm": lambda: lambda x: rmsnorm.add_rms_norm(x, x, None, 1.0)[0],
    "rms_norms": lambda: lambda x: sum(rmsnorm.rms_norms([x, -x], None, 1.0), x),
    "gated_rms_norm": lambda: lambda x: rmsnorm.gated_rms_norm(x, x, None, 1.0),
}


@pytest.mark.parametrize("norm", NORMS)
def test_norms_under_several_checkpoints_compile_with_dynamic_floats(norm: str, x) -> None:
    """With dynamic=True, torch fails if code under two checkpoints reads one float as an input of the graph."""
    model = Checkpointed(NORMS[norm]() for _ in range(3))
    assert len(rmsnorm.patch(model, strict=False).replaced) == (3 if "replaced" in norm else 0)
    assert_as_eager(torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True), model, x)


@pytest.mark.parametrize(("norms", "others", "recomputed"), [("SAVE", "RECOMPUTE", 0), ("RECOMPUTE", "SAVE", 5)])
def test_policies_of_selective_checkpointing_may_name_the_operators(
    norms: str, others: str, recomputed: int, decoder, x
) -> None:
    expected = trained(decoder, decoder, x)

    def policy(context: Any, op: Any, *args: Any, **named: Any) -> CheckpointPolicy:
        return CheckpointPolicy[f"MUST_{norms if op == FORWARD else others}"]

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    decoder.wrapped = lambda layer: functools.partial(checkpoint, layer, use_reentrant=False, context_fn=contexts)
    assert_all_same(trained(decoder, decoder, x), expected)
    graphs: list[list[Any]] = []
    compiled = torch.compile(decoder, fullgraph=True, backend=recording(graphs))
    assert_all_same(trained(compiled, decoder, x), expected)
    forward, backward = graphs
    assert forward.count(FORWARD) == backward.count(BACKWARD) == 6
    assert backward.count(FORWARD) == recomputed


# --- torch.fx and torch.jit.script ---------------------------------------------------------------------------


def test_torch_fx_traces_functions_and_layers_as_one_node_each(x) -> None:
    layer = OwnLayer()
    graph = torch.fx.symbolic_trace(layer)
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(rmsnorm.rms_norm) == 2
    assert targets.count(rmsnorm.add_rms_norm) == 1
    expected = trained(layer, layer, x)
    assert_all_same(trained(graph, graph, x), expected)
    assert_all_same(trained(torch.compile(graph, backend="aot_eager", fullgraph=True), graph, x), expected)


@pytest.mark.parametrize("cls", [rmsnorm.RMSNorm, rmsnorm.DeepseekV2RMSNorm])
def test_torch_jit_script_raises_an_error_that_names_the_alternatives(cls: type[nn.Module]) -> None:
    with pytest.raises(NotImplementedError, match=r"use torch\.export or torch\.jit\.trace"):
        torch.jit.script(nn.Sequential(cls(N)))


# --- programs for other processes ----------------------------------------------------------------------------


def exported(model: nn.Module, x: Tensor, strict: bool) -> torch.export.ExportedProgram:
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=64)
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=({0: batch, 1: length},), strict=strict)


ELSEWHERE = """
import sys, torch

package, ours, plain, examples, results = sys.argv[1:]
xs = torch.load(examples)
assert "rmsnorm" not in sys.modules
for load, path in ((torch._inductor.aoti_load_package, package), (torch.export.load, ours)):
    try:
        load(path)
    except Exception as error:
        print("refused:", error)
plain = torch.export.load(plain).module()
outputs = [plain(x) for x in xs]
import rmsnorm
package, program = torch._inductor.aoti_load_package(package), torch.export.load(ours).module()
torch.save((outputs, [package(x) for x in xs], [program(x) for x in xs]), results)
"""


def test_a_package_of_aot_inductor_runs_in_a_new_process(decoder, randn, tmp_path: Path) -> None:
    """After `import rmsnorm`, with the same bits; before, loading fails, but a decomposed program runs."""
    decoder.eval()
    xs = [randn(batch, length, N) for batch, length in ((2, 5), (3, 7), (1, 9))]
    program, strict = (exported(decoder, xs[0], strict) for strict in (False, True))
    targets = [[n.target for n in p.graph.nodes if n.op == "call_function"] for p in (program, strict)]
    assert targets[0] == targets[1], "so one package stands for both"
    assert targets[0].count(FORWARD) == 6
    files = [str(tmp_path / name) for name in ("package.pt2", "ours.pt2", "plain.pt2", "examples.pt", "results.pt")]
    plain = strict.run_decompositions(rmsnorm.decompositions())
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=files[0])
        torch.export.save(strict, files[1])
        torch.export.save(plain, files[2])
        torch.save(xs, files[3])
        expected = [plain.module()(x) for x in xs], *[[decoder(x) for x in xs]] * 2
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", ELSEWHERE, *files], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    of_package, _ = (line for line in ran.stdout.splitlines() if line.startswith("refused:"))
    assert "rmsnorm::forward" in of_package, of_package
    for way, got, wanted in zip(("plain", "package", "program"), torch.load(files[4]), expected, strict=True):
        for y, y_wanted in zip(got, wanted, strict=True):
            assert_same_bits(y, y_wanted, way)


def test_decompositions_compute_the_formula_and_its_gradients(randn) -> None:
    x, w, dy = randn(4, N), randn(N), randn(4, N)

    def step(x: Tensor, w: Tensor, dy: Tensor) -> Any:
        s = x.detach().requires_grad_(), w.detach().requires_grad_()
        y, total = rmsnorm.add_rms_norm(s[0], s[0], s[1], 1e-3)
        return y, total, *torch.autograd.grad(y, s, dy)

    graph = make_fx(step, decomposition_table=rmsnorm.decompositions())(x, w, dy)
    assert "rmsnorm" not in graph.code
    y, total, dx, dw = graph(x, w, dy)
    assert_same_bits(total, x + x)
    leaves = (2 * x).double().requires_grad_(), w.double().requires_grad_()
    true = reference.truth(*leaves, 1e-3, 0.0)
    true_dx, true_dw = torch.autograd.grad(true, leaves, dy.double())
    assert ((y - true) / true).abs().max() <= published_y(N)
    rstd, g = reference.exact_rstd(2 * x, 1e-3).unsqueeze(-1), (dy * w).abs()
    xh = (2 * x * rstd).abs()
    # DX is for an exact statistic; this one enters up to three times, and is off by less than y is. x enters s twice.
    bound = (DX + 3 * published_y(N)) * rstd * (g + xh * (g * xh).mean(-1, keepdim=True))
    assert ((dx - 2 * true_dx).abs() <= 2 * bound).all()
    assert ((dw - true_dw).abs() <= published_y(N) * (dy * xh).abs().sum(0)).all()
