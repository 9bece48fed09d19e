"""Code that comes with a checkpoint, as DeepSeek-OCR's, which needs transformers 4.46 for LlamaFlashAttention2."""

import copy
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rmsnorm import patch, register, unpatch
from rmsnorm.patching import replacement
from tolerance import assert_same_bits

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# A decoder reduced to what DeepSeek's file has around its norms. Both norms round early; the inner one is built without
# an eps and gets a strided view, as kv_a_layernorm does.
CONFIGURATION = """
    from transformers.configuration_utils import PretrainedConfig

    class TinyDeepseekConfig(PretrainedConfig):
        model_type = "tiny_deepseek"

        def __init__(self, vocab_size=32, hidden_size=24, rank=16, rms_norm_eps=1e-5, **kwargs):
            self.vocab_size, self.hidden_size, self.rank, self.rms_norm_eps = vocab_size, hidden_size, rank, rms_norm_eps
            super().__init__(**kwargs)
"""
MODELING = """
    import torch
    from torch import nn
    from transformers.modeling_outputs import BaseModelOutput
    from transformers.modeling_utils import PreTrainedModel
    from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
    {imports}
    from .configuration_tiny import TinyDeepseekConfig

    class DeepseekV2RMSNorm(nn.Module):
        def __init__(self, width, eps=1e-6):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))
            self.variance_epsilon = eps

        def forward(self, x):
            dtype = x.dtype
            x = x.to(torch.float32)
            mean = x.pow(2).mean(-1, keepdim=True)
            x = x * torch.rsqrt(mean + self.variance_epsilon)
            return self.weight * x.to(dtype)

    ALL_LAYERNORM_LAYERS.append(DeepseekV2RMSNorm)

    class TinyDeepseek(PreTrainedModel):
        config_class = TinyDeepseekConfig

        def __init__(self, config):
            super().__init__(config)
            self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
            self.input_layernorm = DeepseekV2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.kv_a_layernorm = DeepseekV2RMSNorm(config.rank)
            self.post_init()

        def forward(self, input_ids, **kwargs):
            x = self.input_layernorm(self.embed(input_ids))
            part, _ = torch.split(x, [self.config.rank, self.config.hidden_size - self.config.rank], dim=-1)
            return BaseModelOutput(last_hidden_state=self.kv_a_layernorm(part))
"""


@pytest.fixture(scope="module")
def is_version_4() -> bool:
    return int(transformers.__version__.partition(".")[0]) == 4


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, is_version_4: bool) -> Iterator[Any]:
    """A model from a folder, as from the Hub, with the code that is in it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patched:
        for module in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
            patched.setattr(f"{module}.HF_MODULES_CACHE", str(folder / "modules"), raising=False)
        yield saved_and_loaded(folder, is_version_4)


def saved_and_loaded(folder: Path, is_version_4: bool) -> Any:
    imports = "from transformers.models.llama.modeling_llama import LlamaFlashAttention2" if is_version_4 else ""
    (folder / "configuration_tiny.py").write_text(textwrap.dedent(CONFIGURATION))
    (folder / "modeling_tiny.py").write_text(textwrap.dedent(MODELING).format(imports=imports))
    auto = {"AutoConfig": "configuration_tiny.TinyDeepseekConfig", "AutoModel": "modeling_tiny.TinyDeepseek"}
    facts = {"model_type": "tiny_deepseek", "architectures": ["TinyDeepseek"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(facts))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    built = transformers.AutoModel.from_config(config, trust_remote_code=True)
    for norm in (built.input_layernorm, built.kv_a_layernorm):
        torch.nn.init.normal_(norm.weight)
    built.save_pretrained(folder)
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_remote_code_are_proven_and_have_our_bits(loaded: Any, dtype: torch.dtype) -> None:
    model = copy.deepcopy(loaded).to(dtype)
    assert type(model).__module__.startswith("transformers_modules.")
    ids = torch.randint(0, 32, (40, 7), generator=torch.Generator().manual_seed(1))
    before = model(ids).last_hidden_state
    found = {v.name: v.spec for v in patch(model).replaced}
    assert {name: (spec.cast, spec.eps) for name, spec in found.items()} == {
        "input_layernorm": ("early", 1e-5), "kv_a_layernorm": ("early", 1e-6),
    }  # fmt: skip
    seen = []

    def look(norm: Any, args: Any, y: Any) -> None:
        seen.append((y, replacement.exact_output(norm, args[0])))

    hooks = [norm.register_forward_hook(look) for norm in (model.input_layernorm, model.kv_a_layernorm)]
    y = model(ids).last_hidden_state
    y.float().square().sum().backward()
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2
    for got, exact in seen:
        assert_same_bits(got, exact)
    assert model.kv_a_layernorm.weight.grad is not None
    unpatch(model)
    assert_same_bits(model(ids).last_hidden_state, before)


def test_norms_of_llama_are_proven() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    ))  # fmt: skip
    report = patch(llama)
    assert {(v.class_name, v.spec.cast) for v in report.replaced} == {("LlamaRMSNorm", "early")}
    assert len(report.replaced) == 3
    llama(torch.arange(8)[None]).logits.sum().backward()
    assert llama.model.norm.weight.grad is not None


def test_weight_decay_exempts_our_layers_where_transformers_goes_by_class(is_version_4: bool) -> None:
    if not is_version_4:
        pytest.skip(f"transformers {transformers.__version__} goes by names: transformers 4.46.3 is needed")
    import rmsnorm

    register()
    model = torch.nn.ModuleDict({"first": rmsnorm.RMSNorm(8), "linear": torch.nn.Linear(8, 8)})
    decayed = transformers.Trainer.get_decay_parameter_names(None, model)
    assert decayed == ["linear.weight"]
