"""Graphs of torch.compile before and after the pass in Inductor's slot, and their outputs, without compiling C++.

`Capture().backend` is a backend for torch.compile. It hands the joint graph (the forward graph, where nothing is
differentiated) to the pass in `torch._inductor.config.joint_custom_post_pass`, as Inductor does, and then runs the
graph operator by operator. Both graphs are kept: `sites` counts the fused operators, and `outputs` computes a graph
from seeded inputs, so that two graphs can be compared bit by bit with nothing but the pass between them.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch._inductor.config as inductor_config
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

from rmsnorm import bits

FORWARD = torch.ops.rmsnorm.forward.default
FORWARD_SANDWICH = torch.ops.rmsnorm.forward_sandwich.default
FORWARD_PAIR = torch.ops.rmsnorm.forward_pair.default
# Which leave a tensor as it is; Inductor removes them before the pass.
NO_OPERATION = torch.ops.aten.clone.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default


class EarlyNorm(nn.Module):
    """The Definition, which `patch` replaces."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden_size))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        input_dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * x.to(input_dtype)


EarlyNorm.__name__ = "EarlyRMSNorm"  # by which patch finds it


class Sites(NamedTuple):
    """How many fused operators a graph contains."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Graph:
    """A joint graph, or a forward graph where nothing is differentiated, before and after the pass."""

    before: fx.GraphModule
    after: fx.GraphModule


@dataclass
class Capture:
    """Collects the graphs that torch.compile makes, and the bytes that each forward pass keeps for the backward pass.

    Args:
        decompositions: The operators that are decomposed while the graph is traced; none by default, so that the
            operators are those of eager.
    """

    decompositions: Callable[[], Any] | None = None
    graphs: list[Graph] = field(default_factory=list)
    saved_bytes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def backend(self) -> Any:
        return aot_autograd(
            fw_compiler=_by_operator,
            bw_compiler=_by_operator,
            inference_compiler=self._inference,
            partition_fn=self._partition,
            decompositions=self.decompositions,
            keep_inference_input_mutations=True,  # as Inductor
        )

    @property
    def sites(self) -> Sites:
        """The fused operators of all graphs that the pass has added."""
        return _total([_minus(sites(graph.after), sites(graph.before)) for graph in self.graphs])

    def _inference(self, gm: fx.GraphModule, inputs: Any) -> Any:
        return _by_operator(self._passed(gm), inputs)

    def _partition(self, gm: fx.GraphModule, joint_inputs: Any, **keywords: Any) -> tuple[fx.GraphModule, ...]:
        halves = min_cut_rematerialization_partition(self._passed(gm), joint_inputs, **keywords)
        unfused = copy.deepcopy(self.graphs[-1].before)
        before = min_cut_rematerialization_partition(unfused, joint_inputs, **keywords)
        outputs = keywords["num_fwd_outputs"]
        self.saved_bytes.append((_bytes_kept(before[0], outputs), _bytes_kept(halves[0], outputs)))
        return halves

    def _passed(self, gm: fx.GraphModule) -> fx.GraphModule:
        _remove_no_operations(gm)
        before = copy.deepcopy(gm)
        passes = inductor_config.joint_custom_post_pass
        for each in passes if isinstance(passes, (list, tuple)) else [passes]:
            if each is not None:
                each(gm.graph)
        gm.graph.lint()
        gm.recompile()
        self.graphs.append(Graph(before, copy.deepcopy(gm)))
        return gm


def _by_operator(gm: fx.GraphModule, inputs: Any) -> Any:
    return make_boxed_func(gm.forward)


def _remove_no_operations(gm: fx.GraphModule) -> None:
    for node in (node for target in NO_OPERATION for node in calls(gm, target)):
        (read,) = node.args
        same = node.meta["val"].stride() == read.meta["val"].stride()
        if same and not any(user.op == "output" for user in node.users):
            node.replace_all_uses_with(read)
            gm.graph.erase_node(node)
    gm.recompile()


def _total(counts: list[Sites]) -> Sites:
    return Sites(sum(c.forward for c in counts), sum(c.backward for c in counts))


def _minus(a: Sites, b: Sites) -> Sites:
    return Sites(a.forward - b.forward, a.backward - b.backward)


def _bytes_kept(forward: fx.GraphModule, outputs: int) -> int:
    """The bytes that a forward graph returns beyond its own outputs, each tensor and input once."""
    (returned,) = forward.graph.find_nodes(op="output")[0].args
    own = set(returned[:outputs])
    kept = {node for node in returned[outputs:] if isinstance(node, fx.Node) and node not in own}
    values = [node.meta["val"] for node in kept if node.op != "placeholder"]
    return sum(math.prod(map(_size, value.shape)) * value.itemsize for value in values if isinstance(value, Tensor))


def _size(n: Any) -> Any:
    """A size, or the one with which a symbolic size was traced."""
    return n.node.hint if isinstance(n, torch.SymInt) else n


# --- counting ------------------------------------------------------------------------------------------------


def calls(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=target))


def sites(gm: fx.GraphModule) -> Sites:
    """The calls of the norm that add a residual, and of the backward operator of a sum of gradients."""
    names = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
    sandwiches = len(calls(gm, FORWARD_SANDWICH))  # each adds a residual, too
    return Sites(
        forward=sandwiches + sum(node.args[1] is not None for node in calls(gm, FORWARD)),
        backward=sum(name.startswith("rmsnorm.backward_of_sum") for name in names),
    )


# --- computing -----------------------------------------------------------------------------------------------


class _Recorder(fx.Interpreter):
    """Runs a graph operator by operator and keeps the output of every norm."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.norms: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.target is FORWARD_SANDWICH:  # the output of its first norm is not written
            x, w, _, _, *options = self.fetch_args_kwargs_from_env(n)[0]
            self.norms.append(FORWARD(x, None, w, *options)[0].flatten())
        result = super().run_node(n)
        if n.target in (FORWARD, FORWARD_PAIR, FORWARD_SANDWICH):
            ys = result[::2] if n.target is FORWARD_PAIR else result[:1]
            self.norms += [y.flatten().clone() for y in ys]
        return result


def inputs_of(gm: fx.GraphModule) -> list[Any]:
    """Seeded inputs of the shapes, strides and dtypes with which the graph was traced."""
    generator = torch.Generator().manual_seed(0xF00D)
    return [_input(node.meta["val"], generator) for node in gm.graph.find_nodes(op="placeholder")]


def _input(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor):
        return _size(value)
    shape, stride = [_size(n) for n in value.shape], [_size(n) for n in value.stride()]
    made = torch.empty_strided(shape, stride, dtype=value.dtype)
    if value.dtype.is_floating_point:
        return made.copy_(torch.randn(shape, generator=generator) * 0.3 + 0.1)
    return made.copy_(torch.randint(0, 2, shape, generator=generator))


def outputs(gm: fx.GraphModule) -> dict[str, Any]:
    """All outputs of the graph, the output of every norm, and its inputs afterwards, by name."""
    given = inputs_of(gm)
    recorder = _Recorder(gm)
    torch.manual_seed(0)
    with torch.no_grad():
        returned = recorder.run(*given, enable_io_processing=False)
    named = {f"output {i}": value for i, value in enumerate(returned)}
    named |= {f"norm {i}": value for i, value in enumerate(recorder.norms)}
    return named | {f"input {i} afterwards": value for i, value in enumerate(given)}


def assert_same_bits(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() >= expected.keys()  # a norm may be computed again, after all that were there
    for name, value in expected.items():
        assert_equal(got[name], value, name)
        if isinstance(value, Tensor):
            assert got[name].stride() == value.stride(), name


def assert_equal(got: Any, expected: Any, name: str) -> None:
    """Both are the same to the bit: tensors, with their shapes and dtypes, or anything else."""
    if not isinstance(expected, Tensor):
        assert got == expected, name
        return
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
    if expected.dtype.is_floating_point:
        count, ulp = bits.differing(got, expected)
        assert not count, f"{name}: {count} of {expected.numel()} elements differ, by up to {ulp} ulp"
    else:
        assert torch.equal(got, expected), name


def assert_pass_keeps_bits(capture: Capture) -> None:
    """Every graph computes the same after the pass as before, to the bit."""
    for graph in capture.graphs:
        assert_same_bits(outputs(graph.after), outputs(graph.before))
