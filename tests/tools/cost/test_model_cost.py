"""`rmsnorm cost`: a model's norms from its configuration alone."""

import contextlib
import functools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import printed
import rmsnorm
from rmsnorm import cost, memory
from rmsnorm.errors import CommandError
from rmsnorm.tools.cost import calls, command, printing
from rmsnorm.tools.cost.result import COLUMNS, RECOMPUTED, CostResult
from rmsnorm.tools.display import render
from rmsnorm.tools.hardware import GPUS
from rmsnorm.tools.models import architecture, library
from rmsnorm.tools.models.presets import PRESETS

# As DeepSeek-OCR's own config.json has it: a model_type that transformers does not know, code of its own, and the
# decoder's fields in language_config, without a model_type there.
OCR: dict[str, Any] = {
    "architectures": ["DeepseekOCRForCausalLM"],
    "auto_map": {"AutoConfig": "modeling_deepseekocr.DeepseekOCRConfig", "AutoModel": "no_such_file.Nothing"},
    "model_type": "deepseek_vl_v2",
    "language_config": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"},
        "first_k_dense_replace": 1,
        "hidden_size": 1280,
        "intermediate_size": 6848,
        "kv_lora_rank": None,
        "max_position_embeddings": 8192,
        "moe_intermediate_size": 896,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_attention_heads": 10,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 12,
        "num_key_value_heads": 10,
        "q_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "topk_method": "greedy",
        "torch_dtype": "bfloat16",
        "use_mla": False,
        "v_head_dim": 0,
        "vocab_size": 129280,
    },
    "projector_config": {"model_type": "mlp_projector", "n_embed": 1280},
    "vision_config": {"model_type": "vision", "mlp_ratio": 3.7362},
    "torch_dtype": "bfloat16",
}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "vocab_size": 64,
}


def count(target: str, **options: Any) -> CostResult:
    options = {"batch": 1, "seq": 64, "dtype": "bfloat16", "gpu": None} | options
    return command.model_cost(target, lambda *_: None, **options)


@functools.cache
def of_preset(preset: str) -> CostResult:
    """Count a preset once for all tests: a large one takes seconds to build and prove."""
    return count(preset)


def written(folder: Path, content: Any) -> str:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("preset", "norms", "parameters"),
    [
        ("deepseek-ocr", 25, 32_000),
        ("deepseek-v2-lite", 82, 126_464),
        ("deepseek-v2", 241, 742_400),
        ("deepseek-v3", 245, 1_006_592),
        ("deepseek-ocr-40-layers", 81, 103_680),
    ],
)
def test_a_preset_has_the_norms_and_parameters_of_the_model(preset, norms, parameters) -> None:
    result = of_preset(preset)
    assert (result.count, result.norm_parameters) == (norms, parameters)
    assert all(g.spec is not None for g in result.norms)
    assert result.weight.parameters == 2 * parameters
    assert result.weight.optimizer == 4 * parameters + 4 * norms
    assert result.optimizer_master == 12 * parameters + 4 * norms
    assert set(PRESETS) == {
        "deepseek-ocr", "deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "deepseek-ocr-40-layers",
    }  # fmt: skip


def test_deepseek_ocr_s_own_config_json_costs_the_same_as_the_preset(tmp_path) -> None:
    own, preset = count(written(tmp_path, OCR), gpu="h200"), count("deepseek-ocr", gpu="h200")
    assert (own.count, own.norm_parameters) == (25, 32_000)
    assert (own.training, own.matmul_flops, own.parameters) == (preset.training, preset.matmul_flops, preset.parameters)
    assert own.notes == ("deepseek_vl_v2: only its language_config is counted",)
    assert count(str(tmp_path)).count == 25  # the folder works, too


def test_a_language_config_with_mla_is_deepseek_v2(tmp_path) -> None:
    mla = {"use_mla": True, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    result = count(written(tmp_path, OCR | {"language_config": OCR["language_config"] | mla}))
    assert (result.count, result.norm_parameters) == (25 + 12, 32_000 + 12 * 512)


def test_norms_of_queries_and_keys_get_a_row_for_each_head(tmp_path) -> None:
    result = count(written(tmp_path, QWEN3), batch=2, seq=5)
    found = {(g.first.rpartition(".")[2], g.count, g.rows, g.width) for g in result.norms}
    assert found == {("q_norm", 2, 60, 32), ("k_norm", 2, 30, 32), ("input_layernorm", 4, 10, 96), ("norm", 1, 10, 96)}
    assert result.norm_parameters == 4 * 32 + 5 * 96


TEXT = {k: v for k, v in QWEN3.items() if k != "model_type"} | {"num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"hidden_size": 64, "head_dim": 16}
T5 = {"vocab_size": 64, "d_model": 64, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 16}
CPMANT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "dim_head": 16,
    "dim_ff": 96,
    "num_hidden_layers": 2,
}
MAMBA = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
QWEN3_NEXT = TEXT | {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "content", "parameters", "found"),
    [  # found: (how many, rows of each in a step, in how many calls, width)
        ("t5", T5, 12 * 64, {(12, 64, 1, 64)}),
        ("umt5", T5, 12 * 64, {(12, 64, 1, 64)}),
        ("t5", T5 | {"architectures": ["T5EncoderModel"]}, 5 * 64, {(5, 64, 1, 64)}),
        # Two norms of the global side input, a row for each block of 16 tokens.
        ("longt5", T5 | {"encoder_attention_type": "transient-global"}, 14 * 64, {(12, 64, 1, 64), (2, 4, 1, 64)}),
        ("t5gemma", {"encoder": TEXT, "decoder": TEXT}, 22 * 64, {(22, 64, 1, 64)}),
        ("cpmant", CPMANT, 5 * 64, {(5, 64 + 32, 1, 64)}),  # a prompt of 32 goes before the tokens
        ("nanochat", TEXT, 0, {(4, 64, 1, 64), (1, 128, 2, 64), (2, 256, 1, 16), (2, 128, 1, 16)}),
        ("hrm_text", TEXT, 0, {(5, 384, 6, 64), (5, 128, 2, 64)}),  # its layers run several times
        # The norm of queries and keys is one, without a weight, run on both.
        ("llama4_text", TEXT | {"num_local_experts": 4, "intermediate_size_mlp": 96}, 5 * 64,
         {(5, 64, 1, 64), (2, 64 * (4 + 2), 2, 16)}),
        ("falcon_mamba", MAMBA, 3 * 64, {(3, 64, 1, 64), (4, 64, 1, 8), (2, 64, 1, 4)}),
    ],
)  # fmt: skip
def test_proven_norms_are_counted_with_the_rows_they_get(kind, content, parameters, found, tmp_path) -> None:
    result = count(written(tmp_path, content | {"model_type": kind}))
    counted: dict[tuple[int, int, int], int] = {}
    for g in result.norms:
        key = g.rows, len(g.calls), g.width
        counted[key] = counted.get(key, 0) + g.count
    assert {(n, *key) for key, n in counted.items()} == found
    assert result.norm_parameters == parameters
    assert result.weight.parameters == 2 * parameters
    assert result.weight.gradients == 2 * parameters
    assert (result.left, result.notes) == ((), ())
    called = [(g.count, g.cls, call, g.weighted, g.spec) for g in result.norms for call in g.calls]
    flops = sum(
        n * cost(call[:2], cast=spec.cast, offset=spec.offset, elementwise_affine=weighted).flops
        for n, _, call, weighted, spec in called
    )
    assert result.inference["ours"].flops == flops
    text(result)


def test_gemma_4_s_layers_of_several_widths_are_counted(tmp_path) -> None:
    result = count(written(tmp_path, {"model_type": "gemma4", "text_config": TEXT}))
    assert result.count == 18
    # The value's norm has no weight; a sliding layer's heads have 16 columns, a full one's 512.
    widths = {(g.width, g.weighted) for g in result.norms}
    assert {(64, True), (16, True), (512, True), (512, False)} <= widths
    assert result.norm_parameters == sum(g.count * g.width for g in result.norms if g.weighted)
    assert result.matmul_flops > 0
    json.dumps(result.to_json())


def test_gated_norms_are_named_and_not_counted(tmp_path) -> None:
    result = count(written(tmp_path, QWEN3_NEXT | {"model_type": "qwen3_next"}))
    assert result.count == 7
    (left,) = result.left
    assert (left.count, left.cls, left.first) == (1, "Qwen3NextRMSNormGated", "layers.0.linear_attn.norm")
    assert "it has a gate" in left.reason
    assert "not counted: 1 × Qwen3NextRMSNormGated" in " ".join(text(result).split())
    assert result.to_json()["left"][0]["left_because"] == left.reason


@pytest.mark.parametrize(("kind", "content"), [("falcon_mamba", MAMBA), ("cpmant", CPMANT), ("t5", T5)])
def test_rows_of_a_long_sequence_are_extrapolated(kind, content, tmp_path, monkeypatch) -> None:
    target = written(tmp_path, content | {"model_type": kind})
    whole = count(target, batch=3, seq=80)
    monkeypatch.setattr(calls, "_SHORT", (4, 8))
    monkeypatch.setattr(calls, "_observed", too_long(calls._observed))
    extrapolated = count(target, batch=3, seq=80)
    assert extrapolated.norms == whole.norms
    assert "runs of 4 and 8 tokens: with 80, it takes too long" in extrapolated.notes[0]
    assert torch.is_grad_enabled()


def too_long(observed: Any) -> Any:
    """Make a run of more than 8 tokens exceed the limit of calls."""
    return lambda norms, model, batch, seq, most: observed(norms, model, batch, seq, 1 if seq > 8 else most)


def test_rows_of_a_model_that_does_not_run_are_guessed_with_a_note(tmp_path, monkeypatch) -> None:
    target = written(tmp_path, TEXT | {"model_type": "qwen3"})
    observed = count(target, batch=2)

    def raises(*_: object) -> None:
        raise RuntimeError("no, not on tokens")

    monkeypatch.setattr("rmsnorm.tools.models.library.run_on_tokens", raises)
    guessed = count(target, batch=2)
    assert sum(g.count for g in guessed.norms) == sum(g.count for g in observed.norms)
    assert {(call[:2], g.width) for g in guessed.norms for call in g.calls} == {
        (call[:2], g.width) for g in observed.norms for call in g.calls
    }
    assert all(call.is_saved for g in guessed.norms for call in g.calls)
    assert "guessed from the norms' names, and readers are assumed to keep all outputs" in guessed.notes[0]
    assert guessed.notes[0].endswith("RuntimeError: no, not on tokens")
    weightless = count(written(tmp_path, MAMBA | {"model_type": "falcon_mamba"}))
    assert weightless.count == 3
    assert "6 norms without a weight are not counted" in weightless.notes[1]


def test_the_spec_of_a_norm_is_proven(tmp_path) -> None:
    gemma = {k: v for k, v in QWEN3.items() if k != "model_type"} | {"model_type": "gemma", "head_dim": 16}
    groups = count(written(tmp_path, gemma)).norms
    assert {(group.spec.cast, group.spec.offset) for group in groups} == {("late", 1.0)}


def test_totals_are_sums_over_the_norms(tmp_path) -> None:
    result = count(written(tmp_path, QWEN3), batch=2, seq=5, gpu="h100", dtype="float16")
    for name in COLUMNS:
        # The outputs of the norms of queries and keys and of the last norm are saved by no operator.
        shapes = {(60, 32, False): 2, (30, 32, False): 2, (10, 96, True): 4, (10, 96, False): 1}
        options: Any = {"implementation": "ours" if name == RECOMPUTED else name, "device": "cuda"}
        costs = [
            (n, cost(shape, torch.float16, phase=phase, recompute=is_saved and name == RECOMPUTED, **options))
            for (*shape, is_saved), n in shapes.items()
            for phase in ("forward", "backward")
        ]
        assert result.training[name].saved_by_readers == (0 if name == RECOMPUTED else 4 * 10 * 96 * 2)
        total = result.training[name]
        assert total.flops == sum(n * c.flops for n, c in costs)
        assert total.bytes == sum(n * c.moved for n, c in costs)
        assert total.kernels == sum(n * c.kernels for n, c in costs)
        assert 2 * total.saved == sum(n * c.saved for n, c in costs)
        assert total.peak == max(c.peak for _, c in costs)
        h100 = 0.75 * GPUS["h100"].bandwidth
        assert total.seconds == pytest.approx(sum(n * max(c.moved / h100, c.kernels * 5e-6) for n, c in costs))


MLA = {k: v for k, v in TEXT.items() if k != "head_dim"} | {"num_key_value_heads": 4}
MLA |= {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
MODELS: dict[str, dict[str, Any]] = {
    "llama": TEXT,
    "qwen3": TEXT,
    "gemma2": TEXT,
    "olmo2": TEXT,
    "deepseek_v3": MLA | MOE | {"n_group": 1, "topk_group": 1},
    "t5": T5,
    "falcon_mamba": MAMBA,
}


@pytest.mark.parametrize(("kind", "content"), MODELS.items(), ids=MODELS)
def test_the_bytes_that_recompute_saves_are_those_that_it_saves_in_the_model(kind, content, tmp_path) -> None:
    rng = random.Random(kind)
    batch, seq = rng.randint(1, 3), rng.randint(17, 40)
    predicted = count(written(tmp_path, content | {"model_type": kind}), batch=batch, seq=seq)
    config = architecture.of_kind(kind, transformers, "a test")(**content)
    model = transformers.AutoModel.from_config(config).to(torch.bfloat16)
    assert predicted.model == type(model).__name__
    rmsnorm.patch(model)
    ids = torch.randint(64, (batch, seq))

    def saved(context: Any) -> tuple[int, Any]:
        with memory.saved_for_backward(model.parameters()) as saved_bytes, context as entered:
            outputs = library.run_on_tokens(model, ids)
            total = saved_bytes()
        del outputs
        return total, entered

    kept, _ = saved(contextlib.nullcontext())
    recomputed, counts = saved(rmsnorm.recompute())
    ours, again = (predicted.training[column] for column in ("ours", RECOMPUTED))
    assert counts.dropped == sum(g.count for g in predicted.norms for call in g.calls if call.is_saved)
    assert kept - recomputed == counts.dropped_bytes == ours.saved_by_readers == ours.kept - again.kept
    assert again.saved == ours.saved


def test_an_output_of_which_a_cast_copy_is_saved_counts_as_saved_in_fp32_only(tmp_path, monkeypatch) -> None:
    linear = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: linear(self.float(), x.float()).to(x.dtype))
    target = written(tmp_path, TEXT | {"model_type": "llama"})
    shares = {dtype: count(target, dtype=dtype).training["ours"].saved_by_readers for dtype in ("float32", "bfloat16")}
    assert shares == {"float32": 4 * 64 * 64 * 4, "bfloat16": 0}


def test_flops_of_a_dense_model_s_matrix_products(tmp_path) -> None:
    """Each layer: q 96·192, k and v 96·96 each, o 192·96, three of 96·128; the head 96·64; causal attention."""
    a_token = 2 * (96 * 192 + 2 * 96 * 96 + 192 * 96 + 3 * 96 * 128) + 96 * 64
    attention = 2 * 6 * (32 + 32) * 5 * 5 * 2
    assert count(written(tmp_path, QWEN3), batch=2, seq=5).matmul_flops == 2 * 2 * 5 * a_token + attention


def test_only_the_experts_that_a_token_uses_are_counted() -> None:
    """DeepSeek-V3 uses 37 of its 671 billion parameters for a token, one of them only to look up the embedding."""
    result = of_preset("deepseek-v3")
    assert 36e9 < result.matmul_flops / 2 / result.seq < 38e9


def test_the_shares_of_a_step_follow_amdahl_s_law() -> None:
    result = count("deepseek-ocr", seq=8192, gpu="H200")
    shares, rest = result.amdahl(True), result.step_seconds(True)
    assert shares is not None
    assert rest is not None
    eager, ours = (result.training[name].seconds for name in ("eager", "ours"))
    assert shares == pytest.approx((eager / (rest + eager), (eager - ours) / (rest + eager)))
    assert 0 < shares[1] < shares[0] < 1
    assert count("deepseek-ocr").amdahl(True) is None
    assert count("deepseek-ocr", gpu="h200", dtype="float32").amdahl(True) is None


def test_a_training_step_has_three_times_the_matrix_products_of_a_forward_pass() -> None:
    result = count("deepseek-ocr", gpu="h200")
    forward, training = result.step_seconds(False), result.step_seconds(True)
    assert forward == pytest.approx(result.matmul_flops / (0.75 * GPUS["h200"].matmul))
    assert training == pytest.approx(3 * forward)


def text(result: CostResult, verbose: bool = True) -> str:
    return render(printing.blocks(result, verbose), 400)


def test_the_summary_and_the_details_are_printed(tmp_path) -> None:
    plain, predicted = count("deepseek-ocr"), count("deepseek-ocr", gpu="l4")
    for verbose in (False, True):
        assert "25 norms with 32 thousand of them; 1 × 64 tokens" in text(plain, verbose)
        assert "on cpu: as traced" in text(plain, verbose)
        assert "add --gpu with one of h200" in text(plain, verbose)
        assert "predicted time" not in text(plain, verbose)
        assert "less kept for the backward pass" in text(plain, verbose)
        assert "with recompute: 3.932 MB less kept, 7.926 MB more moved, 24 more kernels" in text(plain, verbose)
        assert "training: kept by readers" in text(plain, verbose)
        assert "inference: kept" not in text(plain, verbose)
        assert "training: predicted time" in text(predicted, verbose)
        assert "less a training step, of which the norms are" in text(predicted, verbose)
        assert "has few fp64 units" in text(predicted, verbose)
    shown = text(predicted)
    assert predicted.derived is cost((1, 1), device="cuda").derived
    assert ("on cuda: derived" in shown) is predicted.derived
    for part in ("training: the norms take", "75 % of 300 GB/s", "NVIDIA L4 datasheet"):
        assert part in shown
    for result in (plain, predicted):
        short, full = printed.check(printing.blocks(result)), printed.check(printing.blocks(result, verbose=True))
        assert len(short.splitlines()) <= 25
        assert "layers.0.input_layernorm" in full
        assert "layers.0.input_layernorm" not in short
        assert json.loads(json.dumps(result.to_json()))["norms"] == 25


def test_no_tokens_cost_nothing() -> None:
    for options in ({"batch": 0}, {"seq": 0}):
        result = count("deepseek-ocr", gpu="h200", **options)
        for totals in (*result.inference.values(), *result.training.values()):
            assert (totals.flops, totals.bytes, totals.kernels, totals.kept, totals.peak) == (0,) * 5
            assert totals.seconds == 0
        assert (result.matmul_flops, result.amdahl(True)) == (0, None)
        assert result.norm_parameters == 32_000
        text(result)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json", "is not a JSON object"),
        ("[1, 2]", "is not a JSON object but a list"),
        ({}, "has no model_type"),
        (
            {"architectures": ["X"]},
            'has no model_type, which names the architecture, such as "llama" (its architectures',
        ),
        ({"model_type": "llama"}, "has no hidden_size, expected a whole number of at least 1: add it"),
        ({"model_type": "llama", "hidden_size": 64}, "has no num_hidden_layers, expected"),
        ({"model_type": "gpt2", "n_embd": 64}, "has no n_layer or num_hidden_layers, expected"),
        ({"model_type": "frobnicator", "hidden_size": 64}, "does not know the architecture 'frobnicator' of "),
        ({"model_type": "frobnicator", "auto_map": {"AutoConfig": "evil.Config"}}, "trust_remote_code=True); report ="),
        ({"model_type": "deepseek_vl_v2", "language_config": {}}, "config.json, language_config has no model_type"),
        ({"model_type": "llama", "hidden_size": "wide", "num_hidden_layers": 2}, 'has hidden_size "wide", expected'),
        ({"model_type": "llama", "hidden_size": 7, "num_hidden_layers": 2}, "cannot read this llama"),
        ({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2}, "GPT2Model has no RMSNorm"),
    ],
)
def test_an_unusable_configuration_raises_a_one_line_message(content, words, tmp_path) -> None:
    with pytest.raises(CommandError) as raised:
        count(written(tmp_path, content))
    assert words in str(raised.value)
    assert str(tmp_path / "config.json") in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.fixture
def old(monkeypatch) -> None:
    """Imitate transformers 4.46.3, which DeepSeek-OCR's code needs: it has none of DeepSeek's architectures."""
    auto = transformers.models.auto
    for mapping in (auto.configuration_auto.CONFIG_MAPPING_NAMES, auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        for kind in ("deepseek_v2", "deepseek_v3", "deepseek_ocr2", "deepseek_ocr2_text"):
            monkeypatch.delitem(mapping, kind, raising=False)
    monkeypatch.setattr("transformers.__version__", "4.46.3")


@pytest.mark.parametrize(
    ("preset", "kind", "first"),
    [
        ("deepseek-ocr", "deepseek_ocr2_text", "5.10"),
        ("deepseek-ocr-40-layers", "deepseek_ocr2_text", "5.10"),
        ("deepseek-v2", "deepseek_v2", "4.54"),
        ("deepseek-v2-lite", "deepseek_v2", "4.54"),
        ("deepseek-v3", "deepseek_v3", "4.51"),
    ],
)
def test_an_old_transformers_is_told_the_first_release_that_has_a_preset(preset, kind, first, old) -> None:
    with pytest.raises(CommandError) as raised:
        count(preset)
    assert str(raised.value) == (
        f"{preset} is of the architecture {kind!r}, which transformers 4.46.3 does not have, but {first} and later do: "
        f"pip install 'transformers>={first}'"
    )


def test_an_old_transformers_is_told_the_first_release_that_has_a_language_config(old, tmp_path) -> None:
    mla = OCR | {"language_config": OCR["language_config"] | {"use_mla": True}}
    for content, kind, first in ((OCR, "deepseek_ocr2_text", "5.10"), (mla, "deepseek_v2", "4.54")):
        with pytest.raises(CommandError) as raised:
            count(written(tmp_path, content))
        message = str(raised.value)
        assert f"config.json, language_config is of the architecture {kind!r}" in message
        assert f"pip install 'transformers>={first}'; you can also load it yourself with its own code" in message
        assert f"from_pretrained({str(tmp_path)!r}, trust_remote_code=True)" in message


def test_a_class_unknown_to_automodel_is_taken_from_the_configuration(monkeypatch) -> None:
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"])
    assert architecture.model_class(config, transformers) is transformers.AutoModel
    monkeypatch.setattr(transformers, "MODEL_MAPPING", {})
    assert architecture.model_class(config, transformers) is transformers.LlamaForCausalLM
    for name in ("Qwen2ForCausalLM", "NoSuchClass", "__version__"):
        config.architectures = [name]
        assert architecture.model_class(config, transformers) is transformers.AutoModel


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("deepseek-r9", {}, "deepseek-ocr, deepseek-ocr-40-layers, deepseek-v2-lite"),
        ("deepseek-ocr", {"gpu": "h9000"}, "expected one of h200, h100"),
        ("deepseek-ocr", {"dtype": "int4"}, "expected bfloat16, float16, float32"),
        ("deepseek-ocr", {"batch": -1}, "--batch is -1"),
        ("deepseek-ocr", {"seq": -8}, "--seq is -8"),
    ],
)
def test_unknown_arguments_list_the_known_ones(target, options, words) -> None:
    with pytest.raises(CommandError) as raised:
        count(target, **options)
    assert words in str(raised.value)


def test_without_transformers_the_message_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CommandError, match=r"needs transformers: pip install 'rmsnorm\[hf\]'$"):
        count("deepseek-ocr")


def test_the_command_allocates_no_memory_and_reads_no_input(tmp_path) -> None:
    """671 billion parameters with 2 GiB of address space beyond what the imports take, and an empty standard input."""
    code = (
        "import resource, sys, torch, transformers\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30),) * 2)\n"
        "from rmsnorm.tools.cli import main\n"
        "sys.argv = ['rmsnorm', 'cost', sys.argv[1], '--json', '-']\n"
        "main()"
    )
    unknown = written(tmp_path, OCR | {"language_config": {"model_type": "frobnicator"}})
    good, bad = (
        subprocess.run(
            [sys.executable, "-c", code, target],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        for target in ("deepseek-v3", unknown)
    )
    assert good.returncode == 0
    assert all(" %  " in line for line in good.stderr.splitlines()), good.stderr  # only progress
    assert json.loads(good.stdout)["norms"] == 245
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert "does not know the architecture 'frobnicator'" in " ".join(bad.stderr.split())
