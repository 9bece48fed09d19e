"""The adapters for transformers' monkey_patching and for kernels, against those libraries themselves."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmsnorm import patch, unpatch
from rmsnorm.integrations import hub
from rmsnorm.patching import replacement
from tolerance import assert_same_bits

transformers = pytest.importorskip("transformers", "5.17", reason="transformers 5.17 has monkey_patching")

from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from small_qwen import IDS, SMALL, qwen, randomized, run


def gpt_oss() -> Any:
    return randomized(GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)))


def patched(model: Any) -> Any:
    assert patch(model).replaced
    return model


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (Qwen3RMSNorm, GptOssRMSNorm))]


# --- transformers.monkey_patching -----------------------------------------------------------------------------


@pytest.fixture
def registered() -> Iterator[Any]:
    """register_patch_mapping, undone after the test."""
    from transformers.monkey_patching import clear_patch_mapping, register_patch_mapping

    yield register_patch_mapping
    clear_patch_mapping()


def test_from_pretrained_builds_replaced_norms(registered: Any, tmp_path: Path) -> None:
    plain = qwen()
    plain.save_pretrained(tmp_path)
    registered(hub.patch_mapping(Qwen3RMSNorm))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [type(m) for m in norms(model)] == [type(m) for m in norms(patched(qwen()))]
    assert all(replacement.rule_of(m) is not None for m in norms(model))
    assert not torch.equal(run(model), run(plain))
    assert_same_bits(run(model), run(patched(qwen())))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert modeling_qwen3.Qwen3RMSNorm is Qwen3RMSNorm
    assert not replacement.rule_of(Qwen3ForCausalLM(Qwen3Config(**SMALL)).model.norm)  # built directly
    unpatch(model)
    assert {type(m) for m in norms(model)} == {Qwen3RMSNorm}
    assert_same_bits(run(model), run(plain))


def test_from_config_initializes_the_weights_of_replaced_norms(registered: Any) -> None:
    registered(hub.patch_mapping(modeling_qwen3))
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SMALL))
    assert all(replacement.rule_of(m) is not None for m in norms(model))
    assert all((m.weight == 1).all() for m in norms(model))


def test_each_class_gets_the_rounding_that_was_proven_of_it(registered: Any) -> None:
    registered(hub.patch_mapping(Qwen3RMSNorm, GptOssRMSNorm))
    for config, cast in ((Qwen3Config(**SMALL), "early"), (GptOssConfig(**SMALL, num_local_experts=2), "late")):
        found = [replacement.rule_of(m) for m in norms(AutoModelForCausalLM.from_config(config))]
        assert found
        assert {rule and rule.cast for rule in found} == {cast}


def test_isinstance_with_the_registered_class_holds_for_norms_of_its_class(registered: Any) -> None:
    from transformers.monkey_patching import apply_patches

    registered(hub.patch_mapping(Qwen3RMSNorm))
    own = Qwen3RMSNorm(8)
    with apply_patches():
        built = modeling_qwen3.Qwen3RMSNorm
        assert built is not Qwen3RMSNorm
        assert isinstance(built(8), built)
        assert isinstance(own, built)
        assert not isinstance(nn.Linear(1, 1), built)
        assert issubclass(built, Qwen3RMSNorm)
        assert (built.__name__, built.__module__) == (Qwen3RMSNorm.__name__, Qwen3RMSNorm.__module__)

        class Derived(built):  # type: ignore[misc,valid-type]
            pass

        assert type(Derived(8)) is Derived


def odd_norm() -> type[nn.Module]:
    """A new class that no norm of ours computes."""

    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() + 1

    return OddRMSNorm


def test_a_class_that_is_not_proven_keeps_its_forward_and_a_warning_says_why() -> None:
    odd = odd_norm()
    (cls,) = hub.patch_mapping(odd).values()
    with pytest.warns(UserWarning, match=r"\[patch_mapping\] OddRMSNorm is not replaced: "):
        assert type(cls()) is odd


def test_wrong_sources_of_a_mapping_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    other = type("Qwen3RMSNorm", (nn.Module,), {})
    for sources, error, words in [
        ((), ValueError, "sources is empty"),
        (("LlamaRMSNorm",), TypeError, "sources has a str"),
        ((nn.modules.linear,), ValueError, "defines no class with rmsnorm in its name"),
        ((Qwen3RMSNorm, other), ValueError, "a name that several classes have"),
    ]:
        with pytest.raises(error, match=words):
            hub.patch_mapping(*sources)
    remote = ModuleType("transformers_modules.somewhere.modeling")
    remote.Qwen3RMSNorm = other  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, remote.__name__, remote)
    with pytest.raises(ValueError, match=r"Qwen3RMSNorm, a name that several classes have.*rmsnorm\.patch"):
        hub.patch_mapping(Qwen3RMSNorm)
    with pytest.raises(TypeError, match="strict"):
        hub.patch_mapping(Qwen3RMSNorm, strict=1)  # type: ignore[arg-type]


# --- kernels --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels() -> Any:
    """The library, in a version that this transformers works with; otherwise the norms have no name for it."""
    library = pytest.importorskip("kernels", reason="kernels is not installed: make test-integrations")
    if not hasattr(library, "kernelize"):  # the folder tests/kernels
        pytest.skip("kernels is not installed: make test-integrations")
    if not hasattr(Qwen3RMSNorm, "kernel_layer_name"):
        pytest.skip(f"transformers {transformers.__version__} does not work with kernels {library.__version__}")
    return library


@pytest.fixture(scope="module")
def mapping(kernels: Any) -> Any:
    """One for both models: their norms, early and late, have the same layer name."""
    return hub.kernel_mapping(nn.ModuleList([qwen(), gpt_oss()]))


def kernelized(kernels: Any, model: Any, mode: Any, mapping: Any) -> Any:
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        return kernels.kernelize(model, mode=mode, device="cpu")


def gradients(model: Any) -> dict[str, Tensor]:
    y = model(input_ids=IDS).logits
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)))
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("build", [qwen, gpt_oss])
def test_kernelized_models_have_the_bits_of_patched_ones(kernels: Any, mapping: Any, build: Any) -> None:
    """In fp32 and bf16."""
    plain, model, ours = build(), build(), patched(build())
    kernelized(kernels, model, kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, mapping)
    assert len(norms(model)) > 4
    assert all("forward" in vars(m) for m in norms(model))
    assert not torch.equal(run(model), run(plain))
    assert_same_bits(run(model), run(ours))
    found, expected = gradients(model), gradients(ours)
    for name in expected:
        assert_same_bits(found[name], expected[name], name)
    for m in (plain, model, ours):
        m.bfloat16()
    assert_same_bits(run(model), run(ours))


def test_one_mapping_serves_every_mode(kernels: Any, mapping: Any) -> None:
    Mode = kernels.Mode
    expected = run(patched(qwen()))
    for mode in (
        Mode.TRAINING,
        Mode.INFERENCE,
        Mode.TRAINING | Mode.TORCH_COMPILE,
        Mode.INFERENCE | Mode.TORCH_COMPILE,
    ):
        assert_same_bits(run(kernelized(kernels, qwen(), mode, mapping)), expected)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("cls", [Qwen3RMSNorm, GptOssRMSNorm])
def test_a_kernelized_norm_compiles_without_a_graph_break(kernels: Any, mapping: Any, cls: type[nn.Module]) -> None:
    model, ours = (randomized(nn.Sequential(nn.Linear(32, 32), cls(32))).bfloat16() for _ in range(2))
    kernelized(kernels, model, kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, mapping)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert_same_bits(torch.compile(model, backend="aot_eager", fullgraph=True)(x), patched(ours)(x))


def test_transformers_own_mapping_can_name_the_repository(kernels: Any, mapping: Any) -> None:
    """As from_pretrained(use_kernels=True) would take it, and again after train() and eval()."""
    from transformers.integrations.hub_kernels import get_kernel_mapping_transformers

    model, ours = qwen(), patched(qwen())
    of_rmsnorm = get_kernel_mapping_transformers()["RMSNorm"]
    assert "cpu" not in of_rmsnorm
    of_rmsnorm["cpu"] = mapping["RMSNorm"]["cpu"]
    try:
        model.set_use_kernels(True)
        assert_same_bits(run(model), run(ours))
        model.train()
        assert_same_bits(run(model), run(ours.train()))
    finally:
        del of_rmsnorm["cpu"]


def test_a_patched_norm_keeps_its_forward_when_the_model_is_kernelized(kernels: Any, mapping: Any) -> None:
    model = patched(qwen())
    with pytest.raises(ValueError, match=r"has no norm that kernels replaces.*rmsnorm\.patch"):
        hub.kernel_mapping(model)
    kernelized(kernels, model, kernels.Mode.INFERENCE, mapping)
    assert not any("forward" in vars(m) for m in norms(model))
    assert_same_bits(run(model), run(kernelized(kernels, qwen(), kernels.Mode.INFERENCE, mapping)))


def test_norms_that_are_not_proven_keep_their_own_forward(kernels: Any) -> None:
    odd = kernels.use_kernel_forward_from_hub("RMSNorm")(odd_norm())
    model, x = nn.Sequential(odd()), torch.ones(2, 8)
    expected = model(x)
    with pytest.warns(UserWarning, match=r"\[kernel_mapping\] OddRMSNorm keeps its own forward: "):
        mapping = hub.kernel_mapping(model)
    kernelized(kernels, model, kernels.Mode.INFERENCE, mapping)
    assert_same_bits(model(x), expected)
    other = nn.Sequential(GptOssRMSNorm(8))  # a class that the mapping was not made for
    with warnings.catch_warnings(action="error"):
        kernelized(kernels, other, kernels.Mode.INFERENCE, mapping)
    assert_same_bits(other(x), GptOssRMSNorm.forward(other[0], x))


def test_wrong_models_raise(kernels: Any) -> None:
    with pytest.raises(TypeError, match="model is an int"):
        hub.kernel_mapping(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no norm that kernels replaces"):
        hub.kernel_mapping(nn.Sequential(nn.Linear(2, 2), nn.RMSNorm(2)))
