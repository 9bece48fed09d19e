"""Small models, and runs of the report on them, which the tests of the report share."""

import builtins
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2Model,
    FalconMambaConfig,
    FalconMambaModel,
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rmsnorm.patching.patch_report import Verdict
from rmsnorm.spec import Spec
from rmsnorm.tools import machine, timing
from rmsnorm.tools.display import render
from rmsnorm.tools.report import command, norm_timer, printing
from rmsnorm.tools.report import run as report_run
from rmsnorm.tools.report.norms import NormResult, Pair
from rmsnorm.tools.report.result import MemoryBytes, ReportResult
from rmsnorm.tools.report.steps import StepResult

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
}


def deepseek() -> PreTrainedModel:
    return DeepseekV2Model(
        DeepseekV2Config(
            **SMALL, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
            n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=32,
            first_k_dense_replace=1, n_group=1, topk_group=1,
        )
    )  # fmt: skip


def deepseek_lite() -> PreTrainedModel:
    """Like DeepSeek-V2-Lite: the queries have no low rank, so a layer has three norms."""
    config = deepseek().config
    config.q_lora_rank = None
    return DeepseekV2Model(config)


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, rms_norm_eps=1e-5))


def qwen() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16))


def gemma3() -> PreTrainedModel:
    return Gemma3TextModel(Gemma3TextConfig(**SMALL, head_dim=16))


def gemma() -> PreTrainedModel:
    return Gemma2Model(Gemma2Config(**SMALL, head_dim=32))


def saved(build: Callable[[], PreTrainedModel], folder: Path) -> Path:
    """Save a checkpoint with random weights, including those of the norms."""
    generator = torch.Generator().manual_seed(2)
    model = build().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        scale = 0.3 if "norm" in name else 0.05
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(name="checkpoint")
def checkpoint_fixture(tmp_path: Path) -> Path:
    return saved(deepseek, tmp_path / "checkpoint")


class Clock:
    """A clock that a test sets, and that advances by a tenth of a millisecond each time it is read."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1e-4
        return self.seconds


@pytest.fixture(name="clock", autouse=True)
def clock_fixture(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace the clock, so that no test depends on how fast the machine is."""
    clock = Clock()
    monkeypatch.setattr(timing, "now", clock)
    return clock


@pytest.fixture(name="quick", autouse=True)
def quick_fixture(monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]) -> None:
    """Take few samples on a machine that looks idle, and fail if anything reads standard input."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(norm_timer, "_NORM_SAMPLES", 3)
    monkeypatch.setattr(norm_timer, "_TOKEN_SAMPLES", 3)
    monkeypatch.setattr(report_run, "_MOST_PAIRS", 7)
    threads(1)  # with several, small models spend most of their time on waking threads

    def no_input(*prompt: object) -> str:
        raise AssertionError("it read standard input")

    monkeypatch.setattr(builtins, "input", no_input)


def run_report(target: Path | str, out: Path, **options: Any) -> ReportResult:
    """Run the report on the CPU, and check the progress that it reports."""
    steps: list[tuple[int, int]] = []

    def progress(done: int, total: int, what: str) -> None:
        assert what
        steps.append((done, total))

    result = command.report(str(target), out, progress, **{"device": "cpu", "tokens": 32} | options)
    assert steps == sorted(steps)
    assert all(0 <= done < total == 100 for done, total in steps)
    return result


def printed_report(result: ReportResult, width: int = 200) -> str:
    return render(printing.blocks(result), width)


TINY = {k: v for k, v in SMALL.items() if k != "max_position_embeddings"} | {"num_attention_heads": 4, "head_dim": 16}


def falcon_mamba() -> PreTrainedModel:
    return FalconMambaModel(FalconMambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, state_size=8))


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def a_step(*differences: float, before: float = 1.0, norms: Pair = Pair(0.5, 0.1)) -> StepResult:  # noqa: B008  # frozen
    return StepResult(64, tuple((before, before - difference) for difference in differences), norms)


def a_norm(name: str, times: dict[str, Pair], **more: Any) -> NormResult:
    spec = Spec(1e-6, "early", 0.0)
    facts = {"calls": 1, "rows": 8, "outputs": 512} | more
    return NormResult(Verdict("ARMSNorm", spec, name=name), facts.pop("width", 64), times=times, **facts)  # type: ignore[arg-type]


MODEL = {
    "class": "AModel", "parameters": 337_400_000, "dtype": "bfloat16", "tokens": 2048, "tokens_asked": 2048,
    "norms": 3, "norm_parameters": 192, "as_expected": None,
}  # fmt: skip
REASON = "it multiplies by a weight that is a function of its input, which no RMSNorm of ours does, " * 3


def a_result(**changes: Any) -> ReportResult:
    times = {"forward": Pair(6.0912e-3, 258.5e-6), "training": Pair(0.0123456, 5.4321e-3), "token": Pair(3e-5, 2e-6)}
    norms = (
        a_norm("layers.0.input_layernorm", times, changed=3, ulp=2),
        a_norm("layers.1.input_layernorm", times),
        NormResult(Verdict("OddRMSNorm", reason=REASON, name="odd"), None),
    )
    differences = (0.0381, 0.0402, 0.0413, 0.0394, 0.0425, 0.0436, 0.0377)
    timed = a_step(*differences, before=8.07, norms=Pair(0.1, 0.01))
    facts = machine.describe("cpu")
    values = {
        "target": "small", "facts": facts, "model": MODEL, "notes": ("a note",), "norms": norms, "forward": timed,
        "training": timed, "saved": MemoryBytes(2048, 2_999_123_456, 2_737_123_456, 2_637_123_456),
        "peak": MemoryBytes(2048, 4_111_000_000, 3_999_000_000, 4_222_000_000), "asked": 90.0,
        "phases": {"loading": 12.345, "norms": 60.0}, "peak_bytes": 3_123_456_789,
    }  # fmt: skip
    return ReportResult(**values | changes)
