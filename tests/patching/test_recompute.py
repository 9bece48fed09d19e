"""patch(model, recompute=True): the same gradients of whole models, fewer kept bytes, and nothing else changes."""

import copy
import functools
import inspect
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize

import rmsnorm
from rmsnorm import compat, memory
from rmsnorm.patching.recomputing import is_recomputing, last_recomputation
from tolerance import assert_same_bits

ROWS = 2 * 7
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": transformers.LlamaConfig,
    "qwen3": transformers.Qwen3Config,
    "gemma2": transformers.Gemma2Config,
}


@pytest.fixture(autouse=True)
def _one_thread(threads: Callable[[int], None]) -> None:
    """The models are so small that threads would only wait for each other."""
    threads(1)


def build(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    config = CONFIGS[kind](**SMALL, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def tokens() -> Tensor:
    return torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(1))


def step(model: Any) -> list[Tensor]:
    """The loss and all gradients of one training step."""
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


@functools.cache
def patched(kind: str) -> tuple[Any, Any]:
    """A patched model, and one with recompute=True. Made once, because a proof takes a second."""
    model, other = build(kind), build(kind)
    rmsnorm.patch(model)
    rmsnorm.patch(other, recompute=True)
    return model, other


def two() -> tuple[Any, Any]:
    """Copies of them."""
    model, other = patched("llama")
    return copy.deepcopy(model), copy.deepcopy(other)


# --- gradients and bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_keep_their_bits_and_fewer_bytes_are_kept(kind: str) -> None:
    model, recomputed = copy.deepcopy(patched(kind))
    layers, width = SMALL["num_hidden_layers"], SMALL["hidden_size"]
    # q, k and v, gate and up, and lm_head read these. What else is normalized is added or rotated, which saves nothing.
    read = 2 * layers + 1
    norms = sum("rmsnorm:" in repr(m) for m in model.modules() if not list(m.children()))

    def kept(model: Any) -> int:
        with memory.saved_for_backward(model.parameters()) as count:
            loss = model(input_ids=tokens(), labels=tokens()).loss
            assert loss.requires_grad
            return count()

    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        recomputed.to(dtype)
        for _ in range(2):
            assert_same(step(recomputed), step(model))
        found = last_recomputation(recomputed)
        assert (found.outputs, found.dropped, found.recomputed, found.kept) == (norms, read, read, {})
        assert found.dropped_bytes == read * ROWS * width * dtype.itemsize
        assert kept(model) - kept(recomputed) == found.dropped_bytes


def test_hidden_states_that_the_model_returns_count_as_kept() -> None:
    _, model = two()
    output = model(input_ids=tokens(), output_hidden_states=True)
    assert output.hidden_states is not None
    assert list(last_recomputation(model).kept.values()) == [1]  # the last one is the output of the last norm


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_layers_works_as_without_recompute(reentrant: bool) -> None:
    model, recomputed = two()
    for one in (model, recomputed):
        one.gradient_checkpointing_enable({"use_reentrant": reentrant})
        one.enable_input_require_grads()
        one.train()
    assert_same(step(recomputed), step(model))
    found = last_recomputation(recomputed)
    assert (found.dropped, found.recomputed) == (1, 1)  # that of the last norm, which no checkpoint holds
    assert sum(found.kept.values()) == (0 if reentrant else 4)


def test_accumulated_gradients_and_updated_weights_are_the_same() -> None:
    model, recomputed = two()
    for one in (model, recomputed):
        for _ in range(2):
            for _ in range(2):
                one(input_ids=tokens(), labels=tokens()).loss.backward()
            with torch.no_grad():
                for parameter in one.parameters():
                    parameter -= 0.01 * parameter.grad
            one.zero_grad()
    assert_same(list(recomputed.parameters()), list(model.parameters()))


# --- what stays as it is -----------------------------------------------------------------------------------------


def test_the_model_keeps_its_class_name_signature_and_state() -> None:
    own, model = build(), build()
    report = rmsnorm.patch(model, recompute=True)
    assert isinstance(model, type(own))
    assert (type(model).__name__, type(model).__qualname__) == (type(own).__name__, type(own).__qualname__)
    assert inspect.signature(model.forward) == inspect.signature(own.forward)
    assert vars(model).keys() == vars(own).keys()
    assert list(model.state_dict()) == list(own.state_dict())
    assert "recompute=True" in report.expanded()
    assert report.recomputation.outputs == 0  # nothing ran yet
    assert pickle.loads(pickle.dumps(report)).recomputation is None


def test_generation_and_evaluation_are_not_affected_nor_counted() -> None:
    model, recomputed = two()
    step(recomputed)
    made = [one.generate(tokens(), max_new_tokens=4, do_sample=False) for one in (model, recomputed)]
    assert torch.equal(*made)
    assert last_recomputation(recomputed).outputs == 5


def test_unpatch_or_patching_without_recompute_restores_the_models_own_class() -> None:
    model = build()
    own, expected = type(model), step(model)
    rmsnorm.patch(model, recompute=True)
    again = type(model)
    assert is_recomputing(model)
    rmsnorm.patch(model, recompute=True)
    assert type(model) is again
    report = rmsnorm.patch(model)
    assert type(model) is own
    assert report.recomputation is None
    rmsnorm.patch(model, recompute=True)
    undone = rmsnorm.unpatch(model)
    assert (len(undone.names), undone.recompute) == (5, True)
    assert type(model) is own
    assert_same(step(model), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_recompute_too(copied: Callable[[Any], Any]) -> None:
    model, recomputed = two()
    other = copied(recomputed)
    assert_same(step(other), step(model))
    assert last_recomputation(other).dropped == 5
    assert last_recomputation(recomputed).outputs == 0  # each model has its own
    rmsnorm.unpatch(other)
    assert type(other) is transformers.LlamaForCausalLM


def test_a_model_saved_by_torch_save_still_recomputes() -> None:
    _, model = two()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert is_recomputing(torch.load(file, weights_only=False))


def test_torch_jit_script_gets_the_models_own_class() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    expected = model(x)
    rmsnorm.patch(model, recompute=True)
    with pytest.warns(UserWarning, match="its own class back"):
        scripted = torch.jit.script(model)
    assert_same_bits(scripted(x), expected)


def test_torch_fx_traces_the_model_with_its_own_parameters() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 8))
    rmsnorm.patch(model, recompute=True)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.find_nodes(op="placeholder")] == ["input"]
    assert compat.saved_tensors_hooks() is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_forward_leaves_no_hooks_behind(error: type[BaseException]) -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    model = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), Failing())
    rmsnorm.patch(model, recompute=True)
    with pytest.raises(error):
        model(torch.randn(3, 8))
    assert compat.saved_tensors_hooks() is None


# --- which calls are covered --------------------------------------------------------------------------------------


def test_a_part_of_the_model_needs_the_context() -> None:
    _, model = two()
    model.model(input_ids=tokens())
    assert last_recomputation(model).outputs == 0
    with rmsnorm.recompute() as found:
        loss = model.model(input_ids=tokens()).last_hidden_state.sum()
    assert loss.requires_grad
    assert (found.outputs, found.dropped) == (5, 4)  # the last one is what the part returns


def test_nested_models_share_one_context() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build()
            self.norm, self.head = nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.norm(self.inner(input_ids).logits)).sum()

    model = Outer()
    inner = rmsnorm.patch(model.inner, recompute=True)
    outer = rmsnorm.patch(model, recompute=True)
    loss = model(tokens())
    assert outer.recomputation is inner.recomputation
    assert outer.recomputation.dropped == 6
    loss.backward()
    assert outer.recomputation.recomputed == 6


def test_a_model_that_is_a_single_norm_does_not_recompute() -> None:
    norm = nn.RMSNorm(8, eps=1e-6)
    report = rmsnorm.patch(norm, recompute=True)
    assert len(report.replaced) == 1
    assert not is_recomputing(norm)


def test_lora_on_a_patched_model_recomputes() -> None:
    peft = pytest.importorskip("peft")
    grads = []
    for recompute in (False, True):
        model = build()
        report = rmsnorm.patch(model, recompute=recompute)
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        grads.append(step(wrapped))
        if recompute:  # what is in front of the first adapter requires no gradient, and lm_head is frozen
            assert report.recomputation.dropped == 3
            assert list(report.recomputation.kept.values()) == [1]
    assert_same(grads[1], grads[0])


def test_accelerate_on_a_patched_model_recomputes() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, recomputed = two()
    expected = step(model)
    accelerate.cpu_offload(hooked := copy.deepcopy(recomputed))
    assert_same(step(hooked)[:1], expected[:1])
    prepared = accelerate.Accelerator(cpu=True).prepare(recomputed)
    assert_same(step(prepared), expected)
    assert last_recomputation(recomputed).dropped == 5


def test_a_model_whose_forward_was_replaced_is_refused_and_not_changed() -> None:
    model = build()
    before = type(model)
    model.forward = lambda *args, **named: None
    with pytest.raises(RuntimeError, match=r"the model has a forward that was set on the instance .*recompute\(\)"):
        rmsnorm.patch(model, recompute=True)
    assert type(model) is before
    assert type(model.model.norm) is transformers.models.llama.modeling_llama.LlamaRMSNorm
    rmsnorm.patch(model)


class _OfOneClass(type):
    """Refuses subclasses, as extension types and enforced final classes do."""

    def __new__(mcs, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
        if any(isinstance(base, _OfOneClass) for base in bases):
            raise TypeError(f"{name} is final")
        return super().__new__(mcs, name, bases, body)


class _Final(nn.Sequential, metaclass=_OfOneClass):
    pass


class _KeepsItsClass(nn.Sequential):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise TypeError("the class is fixed")
        super().__setattr__(name, value)


class _Scaled(nn.Sequential):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.scale = nn.Parameter(torch.ones(()))


def _scripted(*parts: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Sequential(*parts))


def _parametrized(*parts: nn.Module) -> nn.Module:
    model = _Scaled(*parts)
    parametrize.register_parametrization(model, "scale", nn.Identity())
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_Final, "cannot be changed: TypeError: _Final is final"),
        (_KeepsItsClass, "cannot be changed: TypeError: the class is fixed"),
        (_parametrized, "has a class made by torch.nn.utils.parametrize"),
        (lambda *parts: torch.fx.symbolic_trace(nn.Sequential(*parts)), "has a class made by torch.fx"),
        (_scripted, "is compiled by torch.jit"),
    ],
    ids=["final", "fixed", "parametrized", "fx", "jit"],
)
def test_a_model_whose_class_cannot_be_changed_is_refused_and_not_changed(
    make: Callable[..., nn.Module], why: str
) -> None:
    model = make(nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 8))
    before = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match=re.escape(why)) as raised:
        rmsnorm.patch(model, recompute=True)
    assert "rmsnorm.recompute()" in str(raised.value)
    assert [type(module) for module in model.modules()] == before
    assert len(rmsnorm.patch(model).replaced) == (0 if isinstance(model, torch.jit.ScriptModule) else 1)


@pytest.mark.parametrize("argument", ["recompute", "fuse_residual"])
def test_options_that_are_not_a_bool_raise(argument: str) -> None:
    with pytest.raises(TypeError, match=argument):
        rmsnorm.patch(nn.Linear(2, 2), **{argument: "yes"})


# --- torch.compile -----------------------------------------------------------------------------------------------


@pytest.fixture
def _graphs() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_graphs")
def test_a_compiled_model_is_one_graph_as_without_recompute() -> None:
    model, recomputed = two()
    expected = step(model)
    step(recomputed)
    compiled = torch.compile(recomputed, backend="aot_eager", fullgraph=True)
    assert_same(step(compiled), expected)
    assert last_recomputation(recomputed).dropped == 5  # that of the eager step
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    rmsnorm.patch(compiled, recompute=False)
    assert not is_recomputing(recomputed)


@pytest.mark.usefixtures("_graphs")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_norm_carries_the_hint(recompute: bool) -> None:
    hints = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        calls = graph.graph.find_nodes(op="call_function", target=torch.ops.rmsnorm.forward.default)
        hints.extend(node.kwargs["recompute"] for node in calls)
        return graph.forward

    model = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 8))
    rmsnorm.patch(model, recompute=recompute)
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(3, 8))
    assert hints == [recompute]


@pytest.mark.usefixtures("_graphs")
def test_compiled_layers_in_a_model_that_recomputes_keep_their_gradients_and_are_compiled_once() -> None:
    model, recomputed = two()
    expected = step(model)
    for layer in recomputed.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_same(step(recomputed), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert last_recomputation(recomputed).dropped == 1  # that of the last norm, which is not compiled


def test_save_on_cpu_around_a_step_keeps_the_bits() -> None:
    model, recomputed = two()
    with torch.autograd.graph.save_on_cpu():
        assert_same(step(recomputed), step(model))
    assert last_recomputation(recomputed).dropped == 5
