"""Two steps of training of a patched model by Trainer, accelerate, PEFT, TRL and Lightning, as they are.

tests/patching/test_other_libraries.py has what these libraries do to a model without training it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmsnorm import patch
from rmsnorm.patching import replacement
from tolerance import assert_same_bits

transformers = pytest.importorskip("transformers", "5.0", reason="transformers 5 is not installed")

from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

NORMS = 4 + 1
STEPS = 2
ROWS = [
    {"input_ids": row.tolist(), "labels": row.tolist(), "attention_mask": [1] * 8}
    for row in torch.randint(0, 64, (2 * STEPS, 8), generator=torch.Generator().manual_seed(3))
]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=32, pad_token_id=0,
        )
    )  # fmt: skip
    for norm in norms(model):
        nn.init.normal_(norm.weight)
    assert len(patch(model).replaced) == NORMS
    return model


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, Qwen3RMSNorm)]


@contextlib.contextmanager
def trained(model: Any, learned: str, checkpointed: bool = False) -> Iterator[None]:
    """Every norm is called in each step, or twice in a checkpointed layer, gives *exact*'s bits, and stays replaced."""
    calls: dict[nn.Module, int] = {}

    def look(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        assert_same_bits(y, replacement.exact_output(module, args[0]))
        calls[module] = calls.get(module, 0) + 1

    before = {name: p.detach().clone() for name, p in model.named_parameters() if learned in name}
    hooks = [norm.register_forward_hook(look) for norm in norms(model)]
    yield
    for hook in hooks:
        hook.remove()
    *of_layer, last = norms(model)
    assert calls == {**dict.fromkeys(of_layer, STEPS * (1 + checkpointed)), last: STEPS}
    after = dict(model.named_parameters())
    assert before
    assert not any(torch.equal(after[name], value) for name, value in before.items())
    assert all(replacement.rule_of(norm) is not None for norm in norms(model))


def arguments(cls: Any, folder: Path, **more: Any) -> Any:
    return cls(
        str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=0.1, lr_scheduler_type="constant",
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **more,
    )  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_trainer_trains_a_patched_model(model: Any, tmp_path: Path, more: dict[str, bool]) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    trainer = Trainer(model, arguments(TrainingArguments, tmp_path, **more), train_dataset=ROWS)
    with trained(model, "norm", "gradient_checkpointing" in more):
        trainer.train()


def test_accelerate_trains_a_patched_model(model: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    with trained(model, "norm"):
        for row in ROWS[:STEPS]:
            with accelerator.accumulate(prepared):
                inputs = {name: torch.tensor([value]) for name, value in row.items()}
                accelerator.backward(prepared(**inputs).loss)
                optimizer.step()
                optimizer.zero_grad()


def test_trainer_trains_peft_adapters_of_a_patched_model(model: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    trainer = Trainer(adapted, arguments(TrainingArguments, tmp_path), train_dataset=ROWS)
    with trained(adapted, "lora_B"):
        trainer.train()


def test_trl_trains_a_patched_model(model: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed: make test-integrations")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: make test-integrations")
    rows = datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in ROWS])
    trainer = trl.SFTTrainer(
        model, arguments(trl.SFTConfig, tmp_path, bf16=False, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=rows, processing_class=tokenizer(),
    )  # fmt: skip
    with trained(model, "norm"):
        trainer.train()


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 64)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def test_lightning_trains_a_patched_model(model: Any, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed: make test-integrations")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            return self.model(**batch).loss  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    rows = [{name: torch.tensor(value) for name, value in row.items()} for row in ROWS]
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with trained(model, "norm"):
        trainer.fit(Module(), torch.utils.data.DataLoader(rows, batch_size=2))
