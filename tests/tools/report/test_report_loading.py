"""The models that the report loads: DeepSeek-OCR's folder, and models of text and images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from report_runs import (  # noqa: F401  # fixtures
    SMALL,
    TINY,
    checkpoint_fixture,
    clock_fixture,
    deepseek,
    llama,
    quick_fixture,
    run_report,
    saved,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from rmsnorm.errors import CommandError
from rmsnorm.tools.cost.command import model_cost
from rmsnorm.tools.models import loading

# The keys and values of DeepSeek-OCR's config.json, with small sizes.
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
    """The shapes of the decoder's tensors, with the names of DeepSeek-OCR's own code, which does not fuse the experts."""

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
    """Write a folder like DeepSeek-OCR's, with changes of its language_config; return it and its tensors."""
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


def test_deepseek_ocr_s_own_folder_is_reported_without_running_its_code(tmp_path: Path) -> None:
    folder, _ = deepseek_ocr(tmp_path / "DeepSeek-OCR")
    for name in ("modeling_deepseekocr.py", "modeling_deepseek.py", "configuration_deepseek_v2.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    result = run_report(folder, tmp_path / "out")
    assert not (tmp_path / "executed").exists()
    assert result.ok
    assert [n.verdict.name for n in result.norms] == [
        "layers.0.input_layernorm", "layers.0.post_attention_layernorm", "layers.1.input_layernorm",
        "layers.1.post_attention_layernorm", "norm",
    ]  # fmt: skip
    assert all(n.verdict.replaced and (n.rows, n.width, n.wrong) == (32, 64, 0) for n in result.norms)
    assert result.model["dtype"] == "bfloat16"
    assert result.notes == (
        "deepseek_vl_v2: only its language model is loaded",
        "tensors of the folder that were not loaded, because DeepseekOcr2TextModel does not have them: 10 of 43 "
        "(3 of vision_model, 2 of projector, 2 of sam_model, 1 of lm_head, 1 of image_newline, 1 of view_seperator)",
    )


@pytest.mark.parametrize(
    ("prefix", "changes", "norms"),
    [("model.", {}, 5), ("language.model.", MLA, 7)],
    ids=["DeepSeek-OCR", "DeepSeek-VL2"],
)
def test_every_weight_of_the_decoder_comes_from_the_folder(
    prefix: str, changes: Any, norms: int, tmp_path: Path
) -> None:
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


def test_missing_weights_of_a_decoder_are_noted(tmp_path: Path) -> None:
    folder, tensors = deepseek_ocr(tmp_path / "model")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"], tensors["model.norm.weight"]
    write_tensors(folder, tensors)
    *_, note = loading.builder(str(folder))(torch.device("cpu")).notes
    assert note == (
        "parameters that are not in the folder and have random values: 2, for example layers.1.mlp.experts.gate_up_proj"
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
        (without_a_decoder, r"has no tensor 'embed_tokens\.weight' under any prefix"),
    ],
)
def test_weights_that_do_not_fit_the_decoder_are_refused(damage: Any, says: str, tmp_path: Path) -> None:
    folder, tensors = deepseek_ocr(tmp_path / "model")
    damage(tensors)
    write_tensors(folder, tensors)
    with pytest.raises(CommandError, match=says):
        run_report(folder, tmp_path / "out")
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


def test_a_model_of_text_and_images_runs_on_text(tmp_path: Path) -> None:
    """Everything except the head is loaded; cost counts the same norms."""
    folder = saved(llava, tmp_path / "checkpoint")
    result = run_report(folder, tmp_path / "out", tokens=16)
    assert result.ok
    assert [n.calls for n in result.norms] == [1] * 5
    assert result.notes == (
        "tensors of the folder that were not loaded, because LlavaModel does not have them: 1 of "
        f"{len(load_file(folder / 'model.safetensors'))} (1 of lm_head)",
    )
    counted = model_cost(str(folder), lambda *_: None, batch=1, seq=16, dtype="bfloat16", gpu=None)
    assert (counted.count, counted.left) == (5, ())


def test_every_weight_of_gemma_4_is_loaded(tmp_path: Path) -> None:
    folder = saved(gemma4, tmp_path / "checkpoint")
    built = loading.builder(str(folder))(torch.device("cpu"))
    assert (type(built.model).__name__, built.notes) == ("Gemma4Model", ())
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(p, stored[f"model.{name}"]) for name, p in built.model.named_parameters())
