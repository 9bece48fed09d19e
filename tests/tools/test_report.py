"""report: what it finds in small checkpoints, what it refuses, and that nothing it refuses leaves a trace."""

import builtins
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2Model,
    FalconMambaConfig,
    FalconMambaModel,
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4TextModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextModel,
    T5Config,
    T5EncoderModel,
    T5Model,
)

from rmsnorm.errors import CommandError
from rmsnorm.kernels.host import loader as host
from rmsnorm.patching import replacement
from rmsnorm.patching.patch_report import Verdict
from rmsnorm.spec import Spec
from rmsnorm.tools import loading, machine, predict, report, timing
from rmsnorm.tools.display import render
from rmsnorm.tools.report import Kind, Norm, Pair, Result, Saved, Step, kinds, total

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
    """As DeepSeek-V2-Lite: no low rank for the queries, so three norms a layer."""
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
    """A checkpoint with random weights, those of its norms too."""
    generator = torch.Generator().manual_seed(2)
    model = build().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        scale = 0.3 if "norm" in name else 0.05
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return saved(deepseek, tmp_path / "checkpoint")


class Clock:
    """Time that passes where a test says so, and a tenth of a millisecond at each look."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1e-4
        return self.seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """No test depends on how fast the machine is."""
    clock = Clock()
    monkeypatch.setattr(timing, "now", clock)
    return clock


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]) -> None:
    monkeypatch.setattr(report, "_NORM_SAMPLES", 3)
    monkeypatch.setattr(report, "_TOKEN_SAMPLES", 3)
    threads(1)  # or small models spend their time on waking threads
    monkeypatch.setattr(report, "_MOST_PAIRS", 7)

    def nobody(*prompt: object) -> str:
        raise AssertionError("it asked on stdin")

    monkeypatch.setattr(builtins, "input", nobody)


def run(target: Path | str, out: Path, **options: Any) -> report.Result:
    steps: list[tuple[int, int]] = []

    def progress(done: int, total: int, what: str) -> None:
        assert what
        steps.append((done, total))

    result = report.main(str(target), out, progress, **{"device": "cpu", "tokens": 32} | options)
    assert steps == sorted(steps)
    assert all(0 <= done < total == 100 for done, total in steps)
    return result


def shown(result: Result, width: int = 200) -> str:
    return render(result.table(), width)


# --- what it finds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "names", "widths", "eps", "cast"),
    [
        (llama, 2 * 2 + 1, {64}, 1e-5, "early"),
        (qwen, 2 * 4 + 1, {64, 16}, 1e-6, "early"),
        (deepseek, 2 * 4 + 1, {64, 24, 16}, 1e-6, "early"),
        (deepseek_lite, 2 * 3 + 1, {64, 16}, 1e-6, "early"),
        (gemma, 2 * 4 + 1, {64}, 1e-6, "late"),
        (gemma3, 2 * 6 + 1, {64, 16}, 1e-6, "late"),
    ],
    ids=["Llama", "Qwen3", "DeepSeek V2", "DeepSeek V2 Lite", "Gemma 2", "Gemma 3"],
)
def test_a_checkpoint(
    build: Callable[[], PreTrainedModel], names: int, widths: set[int], eps: float, cast: str, tmp_path: Path
) -> None:
    spec = {"eps": eps, "cast": cast, "offset": 1.0 if cast == "late" else 0.0}
    out = tmp_path / "out"
    result = run(saved(build, tmp_path / "checkpoint"), out)
    assert result.ok
    assert len(result.norms) == names
    for n in result.norms:
        assert n.verdict.spec is not None
        heads = {"q_norm": 2, "k_norm": 2}.get(n.verdict.name.rpartition(".")[2], 1)
        assert (n.calls, n.rows, n.wrong) == (1, 32 * heads, 0)
        assert n.outputs == n.rows * (n.width or 0)
        assert n.changed <= n.outputs
        assert set(n.times) == {"forward", "token", "training"}
        assert all(pair.after > 0 for pair in n.times.values())
    assert {n.width for n in result.norms} == widths
    assert result.saved is not None
    assert 0 < result.saved.after < result.saved.before
    assert result.forward is not None
    assert result.training is not None
    assert len(result.forward.rounds) == len(result.training.rounds) == 7
    assert result.forward.tokens == result.training.tokens == result.saved.tokens == 32

    assert [p.name for p in out.iterdir()] == ["report.json"]
    written = json.loads((out / "report.json").read_text())
    assert written == json.loads(json.dumps(result.to_json()))
    assert [n["spec"] for n in written["norms"]] == [spec] * names
    assert written["model"]["norms"] == names
    assert written["model"]["norm_parameters"] == sum(n.width or 0 for n in result.norms)
    assert f"{names} of {names} norms are proven and replaced" in shown(result)
    assert f"proven: {cast}, eps {eps:g}" in shown(result)
    assert "of the norms are exact" in shown(result)


TINY = {k: v for k, v in SMALL.items() if k != "max_position_embeddings"} | {"num_attention_heads": 4, "head_dim": 16}
T5 = {"vocab_size": 64, "d_model": 64, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 16}


def qwen3_next() -> PreTrainedModel:
    return Qwen3NextModel(
        Qwen3NextConfig(
            **TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
            linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
            layer_types=["linear_attention", "full_attention"],
        )
    )  # fmt: skip


def falcon_mamba() -> PreTrainedModel:
    return FalconMambaModel(FalconMambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, state_size=8))


@pytest.mark.parametrize(
    ("build", "norms", "left", "widths"),
    [
        (lambda: T5EncoderModel(T5Config(**T5)), 5, 0, {64}),
        (lambda: T5Model(T5Config(**T5)), 12, 0, {64}),
        (lambda: Gemma4TextModel(Gemma4TextConfig(**TINY)), 18, 0, {64, 16, 256, 512}),
        (falcon_mamba, 9, 0, {64, 8, 4}),
        (qwen3_next, 8, 1, {64, 16}),
    ],
    ids=["T5's encoder", "T5", "Gemma 4", "Falcon Mamba", "Qwen3-Next"],
)
def test_checkpoints_of_other_kinds(build, norms: int, left: int, widths: set[int], tmp_path: Path) -> None:
    model = saved(build, tmp_path / "checkpoint")
    result = run(model, tmp_path / "out", tokens=16)
    assert result.ok
    assert (len(result.norms), sum(n.verdict.spec is None for n in result.norms)) == (norms, left)
    proven = [n for n in result.norms if n.verdict.spec is not None]
    assert {n.width for n in proven} <= widths
    assert all(n.calls == 1 and n.rows >= 16 and n.outputs == n.rows * (n.width or 0) for n in proven)
    assert result.model["class"] == type(build()).__name__
    assert result.training is not None
    shown(result)


# DeepSeek-OCR's config.json in small: its keys and values, but for the sizes.
OCR: dict[str, Any] = {
    "_name_or_path": "deepseek-ai/DeepSeek-OCR",
    "architectures": ["DeepseekOCRForCausalLM"],
    "auto_map": {
        "AutoConfig": "modeling_deepseekocr.DeepseekOCRConfig",
        "AutoModel": "modeling_deepseekocr.DeepseekOCRForCausalLM",
    },
    "candidate_resolutions": [[1024, 1024]],
    "language_config": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"},
        "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 1, "hidden_size": 64, "intermediate_size": 96,
        "kv_lora_rank": None, "lm_head": True, "max_position_embeddings": 48, "moe_intermediate_size": 32, "n_group": 1,
        "n_routed_experts": 4, "n_shared_experts": 2, "num_attention_heads": 4, "num_experts_per_tok": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 4, "q_lora_rank": None, "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0, "rm_head": False, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
        "use_mla": False, "v_head_dim": 0, "vocab_size": 128,
    },
    "model_type": "deepseek_vl_v2",
    "projector_config": {"input_dim": 2048, "model_type": "mlp_projector", "n_embed": 1280, "projector_type": "linear"},
    "torch_dtype": "bfloat16",
    "vision_config": {"image_size": 1024, "mlp_ratio": 3.7362, "model_name": "deeplip_b_l", "model_type": "vision"},
}  # fmt: skip
MLA = {"use_mla": True, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
BESIDE_THE_DECODER = {
    "lm_head.weight": (128, 64), "model.image_newline": (64,), "model.view_seperator": (64,),
    "model.projector.layers.weight": (64, 16), "model.projector.layers.bias": (64,),
    "model.sam_model.pos_embed": (1, 4, 4, 8), "model.sam_model.blocks.0.norm1.weight": (8,),
    "model.vision_model.pre_layrnorm.weight": (8,), "model.vision_model.transformer.layers.0.layer_norm1.weight": (8,),
    "model.vision_model.transformer.layers.0.mlp.fc1.weight": (16, 8),
}  # fmt: skip


def decoder_shapes(prefix: str, mla: bool = False) -> dict[str, tuple[int, ...]]:
    """The decoder's tensors as DeepSeek-OCR's own code names them, each expert's for itself."""

    def mlp(of: str, width: int) -> dict[str, tuple[int, ...]]:
        up = {f"{of}.{part}_proj.weight": (width, 64) for part in ("gate", "up")}
        return {**up, f"{of}.down_proj.weight": (64, width)}

    attention = {f"{part}_proj.weight": (64, 64) for part in "qkvo"}
    if mla:
        attention = {
            "q_proj.weight": (96, 64), "kv_a_proj_with_mqa.weight": (24, 64), "kv_a_layernorm.weight": (16,),
            "kv_b_proj.weight": (128, 16), "o_proj.weight": (64, 64),
        }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (128, 64), "norm.weight": (64,)}
    for layer in ("layers.0", "layers.1"):
        shapes |= {f"{layer}.{norm}_layernorm.weight": (64,) for norm in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{name}": shape for name, shape in attention.items()}
    shapes |= mlp("layers.0.mlp", 96) | mlp("layers.1.mlp.shared_experts", 64)
    shapes["layers.1.mlp.gate.weight"] = (4, 64)
    for expert in range(4):
        shapes |= mlp(f"layers.1.mlp.experts.{expert}", 32)
    return {prefix + name: shape for name, shape in shapes.items()}


def deepseek_ocr(folder: Path, prefix: str = "model.", **changes: object) -> tuple[Path, dict[str, Tensor]]:
    """A folder as DeepSeek-OCR's, with these changes of its language_config, and the tensors in it."""
    language = OCR["language_config"] | changes
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name, shape in (decoder_shapes(prefix, mla=language["use_mla"]) | BESIDE_THE_DECODER).items():
        tensors[name] = (torch.randn(shape, generator=generator) * 0.1 + ("norm" in name)).bfloat16()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(OCR | {"language_config": language}))
    write_tensors(folder, tensors)
    return folder, tensors


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    file = "model-00001-of-000001.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_deepseek_ocr_s_own_folder(tmp_path: Path) -> None:
    folder, _ = deepseek_ocr(tmp_path / "DeepSeek-OCR")
    for name in ("modeling_deepseekocr.py", "modeling_deepseek.py", "configuration_deepseek_v2.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    result = run(folder, tmp_path / "out")
    assert not (tmp_path / "executed").exists()
    assert result.ok
    assert [n.verdict.name for n in result.norms] == [
        "layers.0.input_layernorm", "layers.0.post_attention_layernorm", "layers.1.input_layernorm",
        "layers.1.post_attention_layernorm", "norm",
    ]  # fmt: skip
    assert all(n.verdict.spec is not None and (n.rows, n.width, n.wrong) == (32, 64, 0) for n in result.norms)
    assert result.model["dtype"] == "bfloat16"
    assert result.notes == (
        "deepseek_vl_v2: its language model alone is loaded",
        "10 of the folder's 43 tensors are no part of DeepseekOcr2TextModel and were not loaded: 3 of vision_model, "
        "2 of projector, 2 of sam_model, 1 of lm_head, 1 of image_newline, 1 of view_seperator",
    )


@pytest.mark.parametrize(
    ("prefix", "changes", "norms"),
    [("model.", {}, 5), ("language.model.", MLA, 7)],
    ids=["DeepSeek-OCR", "DeepSeek-VL2"],
)
def test_every_weight_of_the_decoder_is_the_folder_s(prefix: str, changes: Any, norms: int, tmp_path: Path) -> None:
    folder, tensors = deepseek_ocr(tmp_path / "model", prefix, **changes)
    built = loading.builder(str(folder))(torch.device("cpu"))
    assert len([m for m in built.model.modules() if type(m).__name__.endswith("RMSNorm")]) == norms
    experts = [f"{prefix}layers.1.mlp.experts.{i}" for i in range(4)]
    fused = {
        "layers.1.mlp.experts.gate_up_proj": torch.stack(
            [torch.cat([tensors[f"{e}.gate_proj.weight"], tensors[f"{e}.up_proj.weight"]]) for e in experts]
        ),
        "layers.1.mlp.experts.down_proj": torch.stack([tensors[f"{e}.down_proj.weight"] for e in experts]),
    }
    loaded = dict(built.model.named_parameters())
    assert loaded.keys() >= fused.keys()
    for name, parameter in loaded.items():
        assert torch.equal(parameter, fused[name] if name in fused else tensors[prefix + name]), name


def test_what_the_folder_lacks_of_a_decoder_is_said(tmp_path: Path) -> None:
    folder, tensors = deepseek_ocr(tmp_path / "model")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"], tensors["model.norm.weight"]
    write_tensors(folder, tensors)
    *_, note = loading.builder(str(folder))(torch.device("cpu")).notes
    assert note == (
        "2 parameters are not in the folder and were drawn at random, layers.1.mlp.experts.gate_up_proj first"
    )


def narrow(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.2.down_proj.weight"] = torch.zeros(64, 24)


def quantized(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def without_a_decoder(tensors: dict[str, Tensor]) -> None:
    for name in decoder_shapes("model."):
        del tensors[name]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (narrow, r"experts\.2\.down_proj\.weight has shape \(64, 24\), its config\.json expects \(64, 32\)"),
        (quantized, r"holds model\.layers\.0\.self_attn\.q_proj\.weight as F8_E4M3: .*; give a folder with"),
        (without_a_decoder, r"holds no tensor 'embed_tokens\.weight', under any prefix"),
    ],
)
def test_weights_that_are_not_the_decoder_s(damage: Any, says: str, tmp_path: Path) -> None:
    folder, tensors = deepseek_ocr(tmp_path / "model")
    damage(tensors)
    write_tensors(folder, tensors)
    with pytest.raises(CommandError, match=says):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip


def llava() -> PreTrainedModel:
    text = SMALL | {"model_type": "llama"}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=CLIP))


def gemma4() -> PreTrainedModel:
    vision = {k: v for k, v in CLIP.items() if k != "model_type"} | {"num_key_value_heads": 2, "head_dim": 16}
    return Gemma4ForConditionalGeneration(Gemma4Config(text_config=TINY, vision_config=vision, audio_config=None))


def test_a_model_of_text_and_images(tmp_path: Path) -> None:
    """It is loaded whole, but for the head, and run on text alone; cost counts the same norms."""
    folder = saved(llava, tmp_path / "checkpoint")
    result = run(folder, tmp_path / "out", tokens=16)
    assert result.ok
    assert [n.calls for n in result.norms] == [1] * 5
    assert result.notes == (
        f"1 of the folder's {len(load_file(folder / 'model.safetensors'))} tensors are no part of LlavaModel and were "
        "not loaded: 1 of lm_head",
    )
    counted = predict.main(str(folder), lambda *_: None, batch=1, seq=16, dtype="bfloat16", gpu=None)
    assert (counted.count, counted.left) == (5, ())


def test_gemma_4_of_text_and_images_is_loaded_whole(tmp_path: Path) -> None:
    folder = saved(gemma4, tmp_path / "checkpoint")
    built = loading.builder(str(folder))(torch.device("cpu"))
    assert (type(built.model).__name__, built.notes) == ("Gemma4Model", ())
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(p, stored[f"model.{name}"]) for name, p in built.model.named_parameters())


def test_the_saved_bytes_are_what_the_arithmetic_says(checkpoint: Path, tmp_path: Path) -> None:
    """Of N elements a row a norm kept 4 + 2 bytes each in fp32 and bf16, and 4 of rstd; now 2 of the input and 4.

    The input of kv_a_layernorm is 16 of 24 columns: there the bytes of the whole storage are held.
    """
    result = run(checkpoint, tmp_path / "out")
    assert result.saved is not None
    rows, columns, views = 32, sum(n.width or 0 for n in result.norms), 2
    assert result.saved.before - result.saved.after == rows * columns * (6 - 2) - views * rows * (24 - 16) * 2


def test_wrong_bits_are_red_and_get_no_time(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = replacement.rms_norm

    def wrong(x: Tensor, *args: Any, **named: Any) -> Tensor:
        y = right(x, *args, **named)
        if x.shape[-1] == 24:
            first = torch.zeros_like(y)
            first[..., :1, :1] = 1
            y = y + first
        return y

    monkeypatch.setattr(replacement, "rms_norm", wrong)
    monkeypatch.setattr(host, "norm", lambda *_: None)  # so that every call is Python's
    result = run(checkpoint, tmp_path / "out")
    assert not result.ok
    red = [n for n in result.norms if n.wrong]
    assert [(n.width, n.wrong, n.times) for n in red] == [(24, 1, {})] * 2
    assert result.total("forward") is None
    assert result.forward is result.training is None
    assert "2 of 12.8 thousand outputs of the norms are wrong: not the exact bits." in shown(result)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["ok"] is False


def test_the_preset_has_the_real_widths() -> None:
    """On no device, so in full size; the CPU's is the same but for three numbers, and 700 MB."""
    model, expected, notes = loading.PRESETS["deepseek-ocr"](torch.device("meta"))
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert (len(norms), sum(m.weight.numel() for m in norms)) == (25, 32_000) == expected
    assert {m.weight.shape for m in norms} == {(1280,)}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.n_routed_experts == 64
    assert 2.5e9 < sum(p.numel() for p in model.parameters()) < 3e9  # "3B" with the head and the vision encoder
    assert len(notes) == 1
    assert torch.get_default_dtype() == torch.float32


def test_the_preset_where_the_installed_transformers_lacks_its_architecture(tmp_path: Path, monkeypatch: Any) -> None:
    names = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    monkeypatch.delitem(names, "deepseek_ocr2_text")
    monkeypatch.setattr("transformers.__version__", "4.46.3")
    with pytest.raises(
        CommandError, match=r"4\.46\.3 does not have, but 5\.10 and later do: pip install 'transformers>="
    ):
        run("deepseek-ocr", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_preset_that_is_not_as_expected_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loading.PRESETS, "small", lambda device: (deepseek(), (25, 32_000), ()))
    result = run("small", tmp_path)
    assert not any(n.wrong for n in result.norms)
    assert not result.ok
    assert "not the expected model" in shown(result)


def test_norms_that_are_left_or_not_reached_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StrangeRMSNorm(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    def build(device: torch.device) -> Any:
        model = deepseek()
        model.strange = StrangeRMSNorm()
        model.spare = type(model.norm)(64)
        return model, None, ("a note",)

    monkeypatch.setitem(loading.PRESETS, "small", build)
    result = run("small", tmp_path)
    assert result.ok
    by_name = {n.verdict.name: n for n in result.norms}
    assert by_name["strange"].verdict.spec is None
    assert by_name["spare"].calls == 0
    text = shown(result)
    assert "(strange): not replaced: " in text
    assert "No activation reached spare." in text
    assert "Note: a note" in text
    assert "strange" in shown(replace(result, every_layer=True))


def test_a_model_without_norms_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(device: torch.device) -> Any:
        model = deepseek()
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                model.set_submodule(name, torch.nn.LayerNorm(module.weight.shape[0]))
        return model, None, ()

    monkeypatch.setitem(loading.PRESETS, "small", build)
    result = run("small", tmp_path)
    assert result.ok
    assert result.forward is result.training is result.saved is None
    assert "No norm was found" in shown(result)
    assert "exact" not in shown(result)


def test_what_the_folder_lacks_is_said(checkpoint: Path, tmp_path: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert any("norm.weight" in note for note in run(checkpoint, tmp_path / "out").notes)


def test_more_tokens_than_positions(checkpoint: Path, tmp_path: Path) -> None:
    assert run(checkpoint, tmp_path / "out", tokens=1000).norms[0].rows == SMALL["max_position_embeddings"]


# --- what may be said of the figures -------------------------------------------------------------------------


def step(*differences: float, before: float = 1.0, norms: Pair = Pair(0.5, 0.1)) -> Step:  # noqa: B008  # frozen
    return Step(64, tuple((before, before - difference) for difference in differences), norms)


@pytest.mark.parametrize(
    ("differences", "outcome", "says"),
    [
        ((0.38, 0.40, 0.41, 0.39, 0.42, 0.43, 0.37), "saved", "400 ms less, 40 % (370 ms to 430 ms)"),
        ((0.38, 0.40, -0.01, 0.39, 0.42, 0.43, 0.37), "noise", "noise: -10 ms to 430 ms"),
        ((0.90, 0.95, 0.98, 0.99, 0.96, 0.97, 0.94), "saved", "960 ms less, 96 % (900 ms to 990 ms)"),
        ((1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.07), "noise", "noise: 1.04 s less, but the norms can save 1 s at most"),
        ((-0.1, -0.2, -0.1, -0.3, -0.1, -0.1, -0.2), "slower", "100 ms more (100 ms to 300 ms)"),
        ((0.40,) * 6, "too few pairs", "unknown: 6 pairs, at least 7 are needed"),
        ((0.0,) * 7, "noise", "noise: 0 s to 0 s"),
    ],
    ids=[
        "saved",
        "both signs",
        "all that the norms take in a model",
        "more than the norms take",
        "slower",
        "too few",
        "nothing",
    ],
)
def test_what_is_said_of_a_step(differences: tuple[float, ...], outcome: str, says: str) -> None:
    found = step(*differences)
    assert (found.outcome, found.said()) == (outcome, says)
    assert found.to_json()["outcome"] == outcome
    assert (found.to_json()["interval"] is None) == (outcome == "too few pairs")


def test_one_disturbed_pair_of_many_changes_neither_the_difference_nor_the_interval_much() -> None:
    quiet = [0.30 + 0.01 * i for i in range(12)]
    calm, disturbed = step(*quiet), step(*quiet[:-1], 90.0)
    assert disturbed.difference == calm.difference
    assert calm.interval is not None
    assert disturbed.interval is not None
    assert (disturbed.interval.low, disturbed.interval.high) == (calm.interval.low, calm.interval.high)
    assert disturbed.outcome == "saved"


def test_the_json_says_which_interval_it_is() -> None:
    interval = step(*(0.1 * i for i in range(1, 8))).to_json()["interval"]
    assert interval["method"] == "order statistics (sign test)"
    assert (interval["low_us"], interval["high_us"]) == (pytest.approx(1e5), pytest.approx(7e5))
    assert interval["coverage"] == 1 - 2 / 2**7


def norm(name: str, times: dict[str, Pair], **more: Any) -> Norm:
    spec = Spec(1e-6, "early", 0.0)
    facts = {"calls": 1, "rows": 8, "outputs": 512} | more
    return Norm(Verdict(name, "ARMSNorm", spec), facts.pop("width", 64), times=times, **facts)  # type: ignore[arg-type]


def test_an_outlier_is_in_no_sum_and_a_norm_that_was_not_timed_counts_as_its_kind() -> None:
    usual = {"forward": Pair(189e-6, 20e-6)}
    norms = (
        norm("0", usual),
        norm("1", {"forward": Pair(115_806e-6, 20e-6)}, outlier=True),
        norm("2", {}),
        norm("3", usual, width=32),
    )
    assert [len(kind.norms) for kind in kinds(norms)] == [3, 1]
    assert total(norms, "forward") == Pair(pytest.approx(4 * 189e-6), pytest.approx(4 * 20e-6))
    assert Kind(norms[:2]).time("forward") == Pair(pytest.approx(2 * 189e-6), pytest.approx(2 * 20e-6))
    assert total(norms, "training") is None
    assert total((*norms, norm("4", {}, width=16)), "forward") is None  # of whose kind nothing is known
    assert total((), "forward") is None


@pytest.mark.parametrize("disturbed", [0, 3, 8], ids=["first", "middle", "last"])
def test_an_outlier_is_measured_again(
    disturbed: int, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine norms of one kind, of which one meets a machine that is busy with something else."""
    timed: list[int] = []
    interleave = timing.interleave

    def busy(calls: Any, device: Any, **options: Any) -> Any:
        timed.append(0)
        found = interleave(calls, device, **options)
        if len(timed) - 1 == 3 * disturbed:  # its forward, the first of three
            found["before"] = timing.summarize([0.1])
        return found

    monkeypatch.setattr(timing, "interleave", busy)
    monkeypatch.setitem(loading.PRESETS, "small", lambda device: (llama_of_four(), None, ()))
    result = run("small", tmp_path)
    assert [n.again for n in result.norms] == [int(i == disturbed) for i in range(9)]
    assert not any(n.outlier for n in result.norms)
    assert max(n.times["forward"].before for n in result.norms) < 0.01
    pair = result.total("forward")
    assert pair is not None
    assert pair.before < 0.01


def llama_of_four() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL | {"num_hidden_layers": 4}))


# --- the budget ----------------------------------------------------------------------------------------------


class Pace:
    """Seconds that building, a pass over the model and each of its tokens take; training takes three times as long."""

    def __init__(self, clock: Clock, building: float, a_pass: float, a_token: float, slower_after: float = 1e9) -> None:
        self.clock, self.building, self.a_pass, self.a_token = clock, building, a_pass, a_token
        self.slower_after = slower_after
        self.saves = 0.0  # by a pass with our norms

    def build(self, device: torch.device) -> Any:
        self.clock.seconds += self.building
        model = llama()
        model.register_forward_pre_hook(self._run, with_kwargs=True)
        return model, None, ()

    def _run(self, model: Any, args: Any, named: Any) -> None:
        seconds = self.a_pass + self.a_token * named["input_ids"].numel()
        seconds *= 3 if torch.is_grad_enabled() else 1
        seconds *= 4 if self.clock.seconds > self.slower_after else 1
        self.clock.seconds += seconds - (self.saves if replacement.rule_of(model.model.norm) else 0.0)


def paced(pace: Pace, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Result:
    monkeypatch.setitem(loading.PRESETS, "small", pace.build)
    monkeypatch.setitem(SMALL, "max_position_embeddings", 4096)
    return run("small", out, **{"tokens": 1024} | options)


@pytest.mark.parametrize(
    ("building", "a_pass", "a_token", "tokens"),
    [(5, 0.01, 0.0001, 1024), (15, 0.1, 0.004, 128), (20, 0.5, 0.005, 16), (30, 0.2, 0.001, 256)],
    ids=["fast", "slow", "slower", "slow to load"],
)
def test_the_steps_get_their_pairs_within_the_seconds_on_as_many_tokens_as_that_allows(
    building: float, a_pass: float, a_token: float, tokens: int, tmp_path: Path, clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(report, "_MOST_PAIRS", 9)
    result = paced(Pace(clock, building, a_pass, a_token), tmp_path, monkeypatch)
    assert result.seconds <= 90 * 1.2
    assert result.seconds == pytest.approx(clock.seconds, abs=0.1)
    assert result.forward is not None
    assert result.training is not None
    assert 7 <= len(result.training.rounds) == len(result.forward.rounds)
    assert result.training.tokens == result.forward.tokens == tokens
    assert any("whole-model steps run on" in note for note in result.notes) == (tokens < result.model["tokens"])
    assert any("norms are checked on" in note for note in result.notes) == (result.model["tokens"] < 1024)


def test_a_machine_that_gets_busy_meanwhile_does_not_make_it_late(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_MOST_PAIRS", 100)
    result = paced(Pace(clock, 5, 0.1, 0.004, slower_after=50), tmp_path, monkeypatch)
    assert 70 <= result.seconds <= 90 * 1.2
    assert result.training is not None
    assert result.training.outcome in ("too few pairs", "noise")


def test_a_training_step_that_does_not_fit_is_left_out_and_the_forward_step_is_not(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = paced(Pace(clock, 10, 2.0, 0.0001), tmp_path, monkeypatch)
    assert result.seconds <= 90 * 1.2
    assert result.training is None
    assert result.forward is not None
    assert len(result.forward.rounds) >= 7
    (note,) = [note for note in result.notes if "no training step is timed: 7 pairs of it do not fit into 90 s" in note]
    seconds = int(note.split("--seconds ")[1].split()[0])
    again = paced(Pace(clock, 10, 2.0, 0.0001), tmp_path, monkeypatch, seconds=seconds)
    assert again.training is not None


@pytest.mark.parametrize(("building", "a_pass"), [(12, 0.1), (4, 3)], ids=["loading alone", "a pass"])
def test_seconds_that_do_not_suffice_are_said_and_the_norms_are_checked_all_the_same(
    building: float, a_pass: float, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = paced(Pace(clock, building, a_pass, 0.0001), tmp_path, monkeypatch, seconds=5)
    assert result.seconds <= building + a_pass * 1.1 + 0.1
    assert result.ok
    assert all(n.calls == 1 and n.rows == 16 and not n.times for n in result.norms)
    assert result.forward is result.training is None
    assert f"loading {building} s" in " ".join(result.notes)
    assert not any("step is timed" in note for note in result.notes)
    text = shown(result)
    assert "No time was measured" in text
    assert "of the norms are exact" in text


def test_a_gain_of_the_whole_model_that_its_norms_do_not_explain_is_noise(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = Pace(clock, 1, 1.0, 0.0)
    pace.saves = 0.5
    result = paced(pace, tmp_path, monkeypatch, tokens=16)
    assert result.forward is not None
    assert result.forward.difference == pytest.approx(0.5, abs=0.01)
    assert result.forward.norms.before < 0.5
    assert result.forward.outcome == "noise"
    assert "less, but the norms can save" in shown(result)


def test_neither_side_of_a_pair_is_always_first(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gets slower with every step does not make the second of a pair look slower."""
    pace = Pace(clock, 1, 1.0, 0.0)
    passes = iter(range(1000))
    model_runs = pace._run

    def slower(model: Any, args: Any, named: Any) -> None:
        model_runs(model, args, named)
        clock.seconds += 0.01 * next(passes)

    monkeypatch.setattr(pace, "_run", slower)
    result = paced(pace, tmp_path, monkeypatch, tokens=16)
    assert result.forward is not None
    assert {difference > 0 for difference in result.forward.differences} == {True, False}
    assert result.forward.outcome == "noise"


def test_a_model_that_raises_in_training_gets_its_forward_step(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(device: torch.device) -> Any:
        model = llama()

        def refuse(module: Any, args: Any) -> None:
            if module.training:
                raise ValueError("only for inference")

        model.register_forward_pre_hook(refuse)
        return model, None, ()

    monkeypatch.setitem(loading.PRESETS, "small", build)
    result = run("small", tmp_path)
    assert result.training is None
    assert result.forward is not None
    assert [note for note in result.notes if "no training step is timed" in note and "only for inference" in note]


# --- how it reads --------------------------------------------------------------------------------------------

MODEL = {
    "class": "AModel", "parameters": 337_400_000, "dtype": "bfloat16", "tokens": 2048, "tokens_asked": 2048,
    "norms": 3, "norm_parameters": 192, "as_expected": None,
}  # fmt: skip
REASON = "it multiplies by a weight that is a function of its input, which no RMSNorm of ours does, " * 3


def a_result(**changes: Any) -> Result:
    times = {"forward": Pair(6.0912e-3, 258.5e-6), "training": Pair(0.0123456, 5.4321e-3), "token": Pair(3e-5, 2e-6)}
    norms = (
        norm("layers.0.input_layernorm", times, changed=3, ulp=2),
        norm("layers.1.input_layernorm", times),
        Norm(Verdict("odd", "OddRMSNorm", None, REASON), None),
    )
    differences = (0.0381, 0.0402, 0.0413, 0.0394, 0.0425, 0.0436, 0.0377)
    timed = step(*differences, before=8.07, norms=Pair(0.1, 0.01))
    facts = machine.describe("cpu")
    values = {
        "target": "small", "facts": facts, "model": MODEL, "notes": ("a note",), "norms": norms, "forward": timed,
        "training": timed, "saved": Saved(2048, 2_999_123_456, 2_737_123_456), "asked": 90.0,
        "phases": {"loading": 12.345, "norms": 60.0}, "peak_bytes": 3_123_456_789,
    }  # fmt: skip
    return Result(**values | changes)


FIGURE = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")
UNIT = re.compile(r"(?:s|ms|µs|B|kB|MB|GB|×|%|thousand|million|billion|ulp)\b|×|%")


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("every_layer", [False, True], ids=["kinds", "layers"])
def test_nothing_is_cut_at_any_width(width: int, every_layer: bool) -> None:
    text = shown(a_result(every_layer=every_layer), width)
    assert "…" not in text.replace(", …)", "")
    assert all(len(line) <= width for line in text.splitlines())
    flat = " ".join(text.split())
    assert " ".join(REASON.split()).strip() in flat
    for figure in (
        "8.07 s",
        "6.09 ms → 258 µs" if every_layer else "12.2 ms → 517 µs",
        "2.999 GB",
        "2.737 GB",
        "262 MB less",
    ):
        assert figure in flat, figure


def test_the_answer_comes_first_in_three_lines() -> None:
    lines = shown(a_result(), 80).splitlines()
    assert lines[:3] == [
        "2 of 3 norms are proven and replaced.",
        "Norms forward + backward: 24.7 ms → 10.9 ms; saved for backward: 3 GB → 2.74 GB.",
        "Outputs: all 1,024 of the norms are exact; 3 of them changed, by 2 ulp at most.",
    ]
    of_fewer = shown(a_result(saved=Saved(64, 2000, 1000)))
    assert "saved for backward of 64 tokens: 2 kB → 1 kB." in of_fewer


def test_a_kind_of_norm_has_one_row_and_a_layer_one_where_that_is_asked_for() -> None:
    assert sum("ARMSNorm" in line and "→" in line for line in shown(a_result()).splitlines()) == 1
    every = shown(a_result(every_layer=True))
    assert sum("input_layernorm" in line and "→" in line for line in every.splitlines()) == 2


def test_no_figure_has_more_than_four_digits() -> None:
    text = shown(a_result(), 200)
    tables = text[: text.index("small: AModel")].split("\n")
    for figure in (f for line in tables for f in FIGURE.findall(line)):
        assert len(figure.replace(",", "").replace(".", "").strip("0")) <= 4, figure


def test_nothing_is_claimed_of_a_model_without_proven_norms() -> None:
    left = a_result(norms=a_result().norms[2:], forward=None, training=None, saved=None)
    text = shown(left)
    assert "None of the 1 norms is proven" in text
    assert "exact" not in text.splitlines()[1]
    unreached = a_result(norms=(norm("0", {}, calls=0, rows=0, outputs=0),), forward=None, training=None, saved=None)
    assert "No output was compared" in shown(unreached)
    assert "exact" not in " ".join(shown(unreached).splitlines()[:3])


# --- what it refuses -----------------------------------------------------------------------------------------


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('["model_type"')


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def short_tail(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def short_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:60])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def unknown_model(folder: Path) -> None:
    edit_config(folder, model_type="no_such_model")


def foreign_kernel(folder: Path) -> None:
    edit_config(folder, attn_implementation="somebody/attention")


def nested_foreign_kernel(folder: Path) -> None:
    edit_config(folder, text_config={"_attn_implementation": {"": "somebody/attention"}})


def wrong_shape(folder: Path) -> None:
    edit_config(folder, hidden_size=80)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (no_config, "holds no config.json"),
        (broken_config, "no JSON object"),
        (no_weights, "holds no \\*.safetensors"),
        (short_tail, "cut short"),
        (short_header, "cut short"),
        (empty_weights, "cut short"),
        (
            unknown_model,
            "does not know the architecture 'no_such_model' of .*config.json; a later one may: pip install -U transformers",
        ),
        (wrong_shape, "cannot load"),
        (foreign_kernel, "foreign code"),
        (nested_foreign_kernel, "foreign code"),
    ],
)
def test_a_folder_that_is_no_checkpoint(
    damage: Callable[[Path], None], says: str, checkpoint: Path, tmp_path: Path
) -> None:
    damage(checkpoint)
    with pytest.raises(CommandError, match=says) as raised:
        run(checkpoint, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_code_in_the_folder_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w')\n"
    for name in ("configuration_mine.py", "modeling_mine.py"):
        (checkpoint / name).write_text(code)
    auto = {"AutoConfig": "configuration_mine.MineConfig", "AutoModel": "modeling_mine.MineModel"}
    edit_config(checkpoint, auto_map=auto)
    assert run(checkpoint, tmp_path / "out").ok  # transformers knows the model type itself
    assert not marker.exists()
    edit_config(checkpoint, auto_map=auto, model_type="mine")
    with pytest.raises(CommandError, match="does not know the architecture 'mine'") as raised:
        run(checkpoint, tmp_path / "other")
    load = f"model = transformers.AutoModel.from_pretrained({str(checkpoint)!r}, trust_remote_code=True)"
    assert str(raised.value).endswith(
        f"import rmsnorm, transformers; {load}; report = rmsnorm.patch(model); print(report)"
    )
    assert not marker.exists()
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        ("deepseek-orc", {}, "neither a preset nor a folder: give deepseek-ocr"),
        ("deepseek-ocr", {"tokens": 0}, "--tokens is 0: give at least 1"),
        ("deepseek-ocr", {"tokens": -5}, "--tokens is -5: give at least 1"),
        ("deepseek-ocr", {"seconds": 0.0}, "--seconds is 0: give a finite number above 0"),
        ("deepseek-ocr", {"seconds": -1.0}, "--seconds is -1: give"),
        ("deepseek-ocr", {"seconds": math.nan}, "--seconds is nan: give"),
        ("deepseek-ocr", {"seconds": math.inf}, "--seconds is inf: give"),
        ("deepseek-ocr", {"device": "nonsense"}, "give cpu or cuda"),
    ],
)
def test_bad_options(target: str, options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=says):
        run(target, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_hold_the_report(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "taken" / "report.json").mkdir(parents=True)
    for out in (tmp_path / "link", tmp_path / "taken", Path("/proc/nothing"), Path("/dev/null")):
        with pytest.raises(CommandError, match="--out"):
            run("deepseek-ocr", out)


def test_an_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CommandError, match="--out"):
        run("deepseek-ocr", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CommandError, match=r"needs transformers: pip install transformers safetensors$"):
        run("deepseek-ocr", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_something_else_than_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(device: torch.device) -> Any:
        model = deepseek()
        model.forward = lambda pixels: pixels
        return model, None, ()

    monkeypatch.setitem(loading.PRESETS, "pictures", refuses)
    with pytest.raises(CommandError, match="token ids alone"):
        run("pictures", tmp_path / "out")
    assert not (tmp_path / "out").exists()
