"""The model that verl's FSDP engine builds once its configuration has named our module as `external_lib`."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from installed import need

need("verl")

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from verl.workers.config.model import HFModelConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

ORIGINAL = FSDPEngine._build_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128)).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _restored(one_process: None) -> Iterator[None]:
    FSDPEngine._build_module = ORIGINAL
    yield
    FSDPEngine._build_module = ORIGINAL


def engine(model_config: HFModelConfig) -> FSDPEngine:
    """As much of an engine as `_build_module` reads, without a process group."""
    made = FSDPEngine.__new__(FSDPEngine)
    made.model_config = model_config
    made.engine_config = SimpleNamespace(model_dtype="bf16", forward_only=False)
    made.device_mesh = None
    made.use_remove_padding = False
    made.ulysses_sequence_parallel_size = 1
    return made


def model_config(folder: Path, external_lib: str | None) -> HFModelConfig:
    return HFModelConfig(
        path=str(folder),
        external_lib=external_lib,
        load_tokenizer=False,
        override_config={"attn_implementation": "eager"},
    )


def replaced(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(type(module), "_rmsnorm_rule")]


def test_a_model_of_the_configured_engine_is_patched_and_one_without_the_setting_is_not(folder: Path) -> None:
    assert replaced(engine(model_config(folder, None))._build_module()) == []
    config = model_config(folder, "rmsnorm.integrations.verl")
    from rmsnorm.integrations import verl as adapter

    adapter.install()  # the import does this once; the fixture has undone it
    model = engine(config)._build_module()
    assert len(replaced(model)) == 5
    adapter.install()
    adapter.uninstall()
    assert FSDPEngine._build_module is ORIGINAL
