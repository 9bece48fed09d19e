"""Patched models with PEFT, accelerate, compilers, FSDP, checkpoints, copies and training."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate.hooks
import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils import parametrize
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM, Trainer
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rmsnorm import patch, unpatch
from rmsnorm.patching import replacement
from small_qwen import IDS, SMALL, qwen, randomized, run
from tolerance import assert_same_bits, late_bound

NORMS = 2 * 4 + 1
ORDER = "patch the model first, then apply PEFT, torch.compile"


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (Qwen3RMSNorm, Gemma3RMSNorm))]


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return run(qwen())


@pytest.fixture(scope="module")
def ours(plain: Tensor) -> Tensor:
    """In fp32 some outputs of every norm change, so equal bits show that ours runs everywhere."""
    model = qwen()
    assert len(patch(model).replaced) == NORMS
    y = run(model)
    assert not torch.equal(y, plain)
    return y


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_exact(model: nn.Module, call: Callable[[], object], expected: int = NORMS) -> None:
    """Every norm of the model, where it is called, gives *exact*'s bits, in the dtype of its own class."""
    seen: list[nn.Module] = []

    def look(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        assert_same_bits(y, replacement.exact_output(module, args[0]))
        assert y.dtype == replacement.original_class(module).forward(module, args[0]).dtype
        seen.append(module)

    hooks = [m.register_forward_hook(look) for m in norms(model)]
    call()
    for hook in hooks:
        hook.remove()
    assert len(seen) == expected


# --- PEFT ----------------------------------------------------------------------------------------------------


def lora(model: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("first", ["patch", "PEFT"])
def test_peft(first: str, plain: Tensor, ours: Tensor) -> None:
    """The norm that PEFT saves with its adapter is a copy of the class that was there, and is found inside."""
    model = qwen()
    if first == "patch":
        patch(model)
        model = lora(model)
    else:
        model = lora(model)
        assert len(patch(model).replaced) == 2 * NORMS  # "norm" ends the names of all of them
    assert_same_bits(run(model), ours)
    with model.disable_adapter():
        assert_same_bits(run(model), ours)
    for norm in norms(model):
        assert replacement.rule_of(norm) is not None
    unpatch(model)
    assert {type(m) for m in norms(model)} == {Qwen3RMSNorm}
    assert_same_bits(run(model), plain)


def test_the_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    model = lora(patched := qwen())
    patch(patched)
    with torch.no_grad():
        nn.init.normal_(model.base_model.model.model.norm.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    base = qwen()
    patch(base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_exact(loaded, lambda: run(loaded))
    assert_same_bits(
        loaded.base_model.model.model.norm.modules_to_save["default"].weight.data,
        model.base_model.model.model.norm.modules_to_save["default"].weight.data,
    )


@pytest.mark.parametrize("first", ["patch", "preparation"])
def test_preparation_for_k_bits(first: str) -> None:
    """Norm weights become fp32 while activations may stay in 16 bits: the output is promoted, as by the own class."""
    model = qwen().bfloat16()
    if first == "patch":
        patch(model)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if first != "patch":
        patch(model)
    assert {m.weight.dtype for m in norms(model)} == {torch.float32}
    assert_exact(model, lambda: run(model))
    for norm in norms(model):
        x = torch.randn(3, norm.weight.shape[0], generator=torch.Generator().manual_seed(1)).bfloat16()
        assert norm(x).dtype == torch.float32
        assert_same_bits(norm(x), replacement.exact_output(norm, x))


# --- accelerate ----------------------------------------------------------------------------------------------


class Counting(accelerate.hooks.ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("first", ["patch", "accelerate"])
def test_accelerate(first: str, plain: Tensor, ours: Tensor) -> None:
    """accelerate keeps the bound forward that it found: patch and unpatch update it, and the hook stays."""
    model, hook = qwen(), Counting()
    if first == "patch":
        patch(model)
    for norm in norms(model):
        accelerate.hooks.add_hook_to_module(norm, hook)
    if first != "patch":
        assert len(patch(model).replaced) == NORMS
    assert_same_bits(run(model), ours)
    assert hook.calls == NORMS
    unpatch(model)
    assert_same_bits(run(model), plain)
    assert hook.calls == 2 * NORMS
    patch(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)  # which leaves a bound forward on the instance
    assert_same_bits(run(model), ours)
    unpatch(model)
    assert_same_bits(run(model), plain)
    assert hook.calls == 2 * NORMS


def test_weights_that_accelerate_offloads(ours: Tensor) -> None:
    model = accelerate.cpu_offload(qwen(), execution_device=torch.device("cpu"))
    assert norms(model)[0].weight.is_meta
    assert len(patch(model).replaced) == NORMS
    assert_same_bits(run(model), ours)


def test_a_forward_that_another_library_set_raises() -> None:
    """Tensor parallelism and the kernels library do that. Their forward would still run, so nothing is changed."""
    model = qwen()
    last = norms(model)[-1]
    last.forward = lambda x: x
    with pytest.raises(RuntimeError, match=ORDER):
        patch(model)
    assert {type(m) for m in norms(model)} == {Qwen3RMSNorm}


# --- compilers and shards ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("first", ["patch", "compile"])
def test_compile(first: str) -> None:
    model = randomized(nn.Sequential(Qwen3RMSNorm(32), nn.Tanh(), Gemma3RMSNorm(32)))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    before = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if first == "compile":
        assert_same_bits(compiled(x), before)
    patch(compiled)
    after = model(x)
    assert not torch.equal(after, before)
    assert_same_bits(compiled(x), after)
    unpatch(compiled)
    assert_same_bits(compiled(x), before)


@pytest.mark.usefixtures("group")
def test_fsdp2_after_patch(plain: Tensor, ours: Tensor) -> None:
    model = qwen()
    patch(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert type(norms(model)[0].weight).__name__ == "DTensor"
    assert_same_bits(run(model), ours)
    unpatch(model)
    assert_same_bits(run(model), plain)
    with pytest.raises(RuntimeError, match=ORDER):
        patch(model)
    assert {type(m) for m in norms(model)} == {Qwen3RMSNorm}


@pytest.mark.usefixtures("group")
def test_a_norm_that_fsdp2_wraps_itself_keeps_its_class(ours: Tensor) -> None:
    model = qwen()
    patch(model)
    fully_shard(model.model.norm)
    fully_shard(model)
    wrapped = type(model.model.norm)
    assert issubclass(wrapped, FSDPModule)
    assert_same_bits(run(model), ours)
    assert len(patch(model).replaced) == NORMS
    with pytest.raises(RuntimeError, match=r"model\.norm is sharded by FSDP"):
        unpatch(model)
    assert type(model.model.norm) is wrapped
    assert_same_bits(run(model), ours)


@pytest.mark.usefixtures("group")
def test_fsdp2_before_patch_raises() -> None:
    model = qwen()
    fully_shard(model.model.norm)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match=r"model\.norm is sharded by FSDP, which has changed its class.*" + ORDER):
        patch(model)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:.*")
def test_fsdp1(ours: Tensor) -> None:
    """FSDP1 replaces the parameters."""
    model = qwen()
    patch(model)
    sharded = torch.distributed.fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    assert_same_bits(run(sharded), ours)
    with pytest.raises(RuntimeError, match=ORDER):
        patch(sharded)


def test_a_weight_behind_a_parametrization(ours: Tensor) -> None:
    model = qwen()
    patch(model)
    for norm in norms(model):
        parametrize.register_parametrization(norm, "weight", nn.Identity())
    assert_same_bits(run(model), ours)
    with pytest.raises(RuntimeError, match=r"class changed to .* since it was patched"):
        unpatch(model)


# --- copies and files ----------------------------------------------------------------------------------------


def through_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    replacement._make_class.cache_clear()  # as in another process, where nobody has patched yet
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_file], ids=["deepcopy", "pickle", "save"]
)
def test_copies(copied: Callable[[nn.Module], nn.Module], plain: Tensor, ours: Tensor) -> None:
    model = qwen()
    patch(model)
    other = copied(model)
    assert len(norms(other)) == NORMS
    assert_same_bits(run(other), ours)
    unpatch(other)
    assert {type(m) for m in norms(other)} == {Qwen3RMSNorm}
    assert_same_bits(run(other), plain)
    assert_same_bits(run(model), ours)


def test_save_pretrained(tmp_path: Path) -> None:
    model = qwen()
    model.save_pretrained(tmp_path / "before")
    patch(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path / "after")
    assert {type(m) for m in norms(loaded)} == {Qwen3RMSNorm}
    patch(loaded)
    assert_exact(loaded, lambda: run(loaded))


def test_norms_on_meta_get_their_weights_later(ours: Tensor) -> None:
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**SMALL)).eval()
        assert len(patch(model).replaced) == NORMS
    state = qwen().state_dict()
    for name in ("inv_freq", "original_inv_freq"):
        setattr(model.model.rotary_emb, name, getattr(qwen().model.rotary_emb, name))
    model.load_state_dict(state, assign=True)
    assert_same_bits(run(model), ours)


# --- training ------------------------------------------------------------------------------------------------


def gradients(model: Any) -> dict[str, Tensor]:
    model.train()
    y = model(input_ids=IDS).logits
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)))
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = qwen()
    patch(model)
    checkpointed = copy.deepcopy(model)
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    checkpointed.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    expected = gradients(model)
    for name, gradient in gradients(checkpointed).items():
        assert_same_bits(gradient, expected[name], name)
    assert len(calls) == 2


def test_autocast() -> None:
    model = qwen()
    patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_exact(model, lambda: run(model))
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
        assert model.model.norm(x).dtype == torch.float32


def test_train_and_eval(ours: Tensor) -> None:
    model = qwen()
    patch(model)
    assert_same_bits(run(model.train()), ours)
    assert_same_bits(run(model.eval()), ours)


def test_weight_decay_does_not_change() -> None:
    """Trainer decides by parameter names and nn.LayerNorm: a norm called ln_f has weight decay, and keeps it."""
    model = qwen()
    model.model.ln_f = Qwen3RMSNorm(32)
    before = Trainer.get_decay_parameter_names(None, model)
    assert "model.ln_f.weight" in before
    assert not any("layernorm" in name for name in before)
    patch(model)
    assert Trainer.get_decay_parameter_names(None, model) == before


@pytest.mark.parametrize(
    ("build", "fresh"), [(qwen, 1.0), (lambda: randomized(Gemma3ForCausalLM(Gemma3TextConfig(**SMALL))), 0.0)]
)
def test_init_weights_knows_the_class(build: Callable[[], Any], fresh: float) -> None:
    model = build()
    patch(model)
    for norm in norms(model):
        assert "RMSNorm" in type(norm).__name__
        model._init_weights(norm)
        assert (norm.weight == fresh).all()


# --- identity ------------------------------------------------------------------------------------------------


def test_isinstance_and_names() -> None:
    model = qwen()
    before = {name: id(p) for name, p in model.named_parameters()}
    printed = str(model)
    patch(model)
    assert len(norms(model)) == NORMS
    assert not any(type(m) is Qwen3RMSNorm for m in norms(model))
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert str(model).replace(", rmsnorm: early", "") == printed
    # the kernels library goes by this attribute, which the class inherits, and would put its forward over ours
    assert not any(type(m).kernel_condition(m) for m in norms(model))


def test_shared_and_tied_norms(plain: Tensor) -> None:
    """One module in two places is one verdict; two modules with one weight stay tied."""
    model = qwen()
    first, second = model.model.layers
    second.input_layernorm = first.input_layernorm
    second.post_attention_layernorm.weight = first.post_attention_layernorm.weight
    before = run(model)
    assert not torch.equal(before, plain)
    assert len(patch(model).replaced) == NORMS - 1
    assert second.input_layernorm is first.input_layernorm
    assert second.post_attention_layernorm.weight is first.post_attention_layernorm.weight
    assert_exact(model, lambda: run(model))
    unpatch(model)
    assert_same_bits(run(model), before)


def test_patched_already(plain: Tensor, ours: Tensor) -> None:
    model = qwen()
    report = patch(model)
    classes = [type(m) for m in model.modules()]
    assert patch(model) == report
    assert [type(m) for m in model.modules()] == classes
    assert_same_bits(run(model), ours)
    unpatch(model)
    assert {type(m) for m in norms(model)} == {Qwen3RMSNorm}
    unpatch(model)
    assert_same_bits(run(model), plain)


# --- torch.nn.RMSNorm ----------------------------------------------------------------------------------------


class TitanRMSNorm(nn.RMSNorm):
    """A subclass that does not change the arithmetic, as in torchtitan."""


@pytest.mark.parametrize("cls", [nn.RMSNorm, TitanRMSNorm])
@pytest.mark.parametrize("shape", [(96,), (6, 16)])
@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("affine", [True, False])
def test_torchs_own(cls: type[nn.RMSNorm], shape: tuple[int, ...], eps: float | None, affine: bool) -> None:
    """Late; eps=None means fp32's machine epsilon in all of these dtypes, since that is what torch computes in."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        norm = randomized(cls(shape, eps, elementwise_affine=affine, dtype=dtype))
        sizes = torch.logspace(1, -4, 5).view(5, *[1] * len(shape))
        x = (torch.randn(4, 5, *shape, generator=torch.Generator().manual_seed(1)) * sizes).to(dtype)
        before = norm(x)
        (v,) = patch(nn.Sequential(norm)).verdicts
        assert v.spec is not None
        assert v.spec.eps == (torch.finfo(torch.float32).eps if eps is None else eps)
        assert v.spec.cast == ("late" if affine else "early")  # without a weight the two are one
        y = norm(x)
        assert_same_bits(y, replacement.exact_output(norm, x))
        h = x.flatten(-len(shape)).double()
        h = (h / (h.square().mean(-1, keepdim=True) + v.spec.eps).sqrt()).view(x.shape)
        close = h * norm.weight.double() if affine else h
        rtol, atol = late_bound(dtype)
        torch.testing.assert_close(y.double(), close, rtol=rtol, atol=atol)
        assert y.dtype == before.dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_bits(norm(x), y)
        with pytest.raises(RuntimeError, match="normalized_shape"):
            norm(x[..., :3])
    norm = cls(shape, eps, elementwise_affine=affine, dtype=torch.float64)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1)).double()
    before = norm(x)  # in fp64 with fp64's epsilon: its own forward runs
    patch(nn.Sequential(norm))
    assert_same_bits(norm(x), before)
