"""Which model of transformers a config.json describes, and how that model is built. No code from a folder is run.

A config.json whose model_type transformers does not know may hold its language model's configuration under
language_config, as DeepSeek-OCR's does: then that language model is meant. `describe` decides, `configuration` asks
transformers for the configuration, `build_on_meta` builds the model without memory.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmsnorm.errors import CommandError
from rmsnorm.tools.checkpoint import AtMost, CallsExhausted, blame

_BUILD_CALLS = 300_000
# The first release of transformers with an architecture that a preset or a configuration of DeepSeek's needs.
_SINCE = {"deepseek_v3": (4, 51), "deepseek_v2": (4, 54), "deepseek_ocr2_text": (5, 10)}
# Architectures of a language_config without a model_type, for a transformers that has no such class.
_KNOWN = {"DeepseekV2ForCausalLM": "deepseek_v2", "DeepseekV3ForCausalLM": "deepseek_v3"}


@dataclass(frozen=True)
class Description:
    """What a config.json says of a model.

    source: the file, and of a part of it which one, for messages. kind: its model_type in transformers. content: the
    fields, without what would fetch or run foreign code. outer: the model_type of a model that transformers does not
    know, of which this is the language_config. renamed: whether the weights on disk belong to a class of another name,
    so that transformers does not know how to load them.
    """

    source: str
    kind: str
    content: dict[str, Any]
    outer: Any = None
    renamed: bool = False


def describe(content: dict[str, Any], path: Path, transformers: Any) -> Description:
    """What a config.json describes. Raises CommandError unless transformers has that architecture."""
    source, outer, renamed = str(path), None, False
    foreign = "auto_map" in content
    content = _harmless(content)
    kind = content.get("model_type")
    nested = content.get("language_config")
    if not _knows(transformers, kind) and isinstance(nested, dict):
        source, outer, renamed, content = f"{path}, language_config", kind, True, nested
        kind = content.get("model_type") or _of_architectures(content, transformers)
    if not kind:
        raise CommandError(_without_a_type(source, content))
    if kind == "deepseek_v2" and content.get("use_mla") is False:
        kind, content, renamed = "deepseek_ocr2_text", _without_mla(content), True
    if not _knows(transformers, kind):
        raise CommandError(f"{_unknown(source, kind, transformers)}; {in_python(path.parent, foreign)}")
    return Description(source, kind, content, outer, renamed)


def in_python(folder: Path, foreign: bool) -> str:
    """What works where the commands do not: the user loads the model, and knows whose code that runs."""
    patched = "report = rmsnorm.patch(model); print(report)"
    if not foreign:
        return f"or load it yourself with the code of its authors, then: import rmsnorm; {patched}"
    load = f"model = transformers.AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    return (
        "or load it yourself with its own code, which then runs on this machine: "
        f"import rmsnorm, transformers; {load}; {patched}"
    )


def configuration(described: Description, transformers: Any) -> Any:
    """Transformers' configuration of what is described. Raises CommandError with the whole reason if it refuses."""
    kind, content = described.kind, described.content
    with blame(f"{described.source}: transformers {transformers.__version__} cannot read this {kind} configuration"):
        cls = of_kind(kind, transformers, described.source)
        names = getattr(cls, "attribute_map", {})
        nested = [content, *(v for v in content.values() if isinstance(v, dict))]
        for needed in ("hidden_size", "num_hidden_layers"):
            spelled = {needed, names.get(needed, needed)}
            if not any(spelled & set(part) for part in nested):
                said = " or ".join(sorted(spelled))
                raise CommandError(f"{described.source} has no {said}, expected a whole number of at least 1: add it")
        return cls(**{k: v for k, v in content.items() if k != "model_type"})


def of_kind(kind: str, transformers: Any, what: str) -> Any:
    """The class of configurations of a model_type. Raises CommandError if the installed transformers has none."""
    if not _knows(transformers, kind):
        raise CommandError(_unknown(what, kind, transformers))
    return type(transformers.AutoConfig.for_model(kind))


def deepseek_ocr(transformers: Any, layers: int = 12, **changes: Any) -> Any:
    """The configuration of DeepSeek-OCR's language decoder, which transformers keeps under DeepSeek-OCR 2."""
    sizes = {
        "vocab_size": 129280, "hidden_size": 1280, "intermediate_size": 6848, "num_hidden_layers": layers,
        "num_attention_heads": 10, "num_key_value_heads": 10, "max_position_embeddings": 8192, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "n_shared_experts": 2, "moe_intermediate_size": 896,
        "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1),
    }  # fmt: skip
    preset = "deepseek-ocr" if layers == 12 else f"deepseek-ocr-{layers}-layers"
    return of_kind("deepseek_ocr2_text", transformers, preset)(**sizes | changes)


def build_on_meta(config: Any, transformers: Any, what: str) -> nn.Module:
    """The model of a configuration, without memory. Raises CommandError where transformers cannot build it."""
    cls = model_class(config, transformers)
    model: nn.Module
    try:
        with (
            blame(f"transformers cannot build {what}"),
            torch.enable_grad(),
            torch.device("meta"),
            AtMost(_BUILD_CALLS),
        ):
            if cls is not transformers.AutoModel:
                model = cls(config)
            else:
                model = cls.from_config(config, trust_remote_code=False)
    except CommandError as error:
        if isinstance(error.__cause__, CallsExhausted):
            calls = f"{_BUILD_CALLS:,} calls of torch"
            raise CommandError(f"{what} is too large to be built: it takes more than {calls}") from None
        raise
    return model


def model_class(config: Any, transformers: Any) -> Any:
    """The class whose `from_config` or constructor builds the model.

    AutoModel, but for DeepSeek-OCR 2's decoder, an encoder alone where that is what was saved, and a class that the
    configuration names where AutoModel knows none.
    """
    if config.model_type == "deepseek_ocr2_text":
        from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

        return DeepseekOcr2TextModel
    named = getattr(config, "architectures", None)
    name = named[0] if isinstance(named, (list, tuple)) and named else None
    if isinstance(name, str) and (name.endswith("EncoderModel") or type(config) not in transformers.MODEL_MAPPING):
        cls = getattr(transformers, name, None)
        if getattr(cls, "config_class", None) is type(config):
            return cls
    return transformers.AutoModel


# --- what is known of transformers ---------------------------------------------------------------------------


def release(transformers: Any) -> tuple[int, ...]:
    """Major and minor: (5, 23)."""
    return tuple(int(n) for n in re.findall(r"\d+", transformers.__version__)[:2])


def _knows(transformers: Any, kind: Any) -> bool:
    return kind in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES


def _unknown(source: str, kind: str, transformers: Any) -> str:
    """That this architecture is not there, and which transformers has it."""
    since = _SINCE.get(kind)
    if since is None:
        said = f"transformers {transformers.__version__} does not know the architecture {kind!r} of {source}"
        return f"{said}; a later one may: pip install -U transformers"
    first = ".".join(map(str, since))
    said = f"{source} is of the architecture {kind!r}, which transformers {transformers.__version__} does not have"
    return f"{said}, but {first} and later do: pip install 'transformers>={first}'"


def _without_a_type(source: str, content: dict[str, Any]) -> str:
    said = f'{source} has no model_type, which names the architecture, such as "llama"'
    if "architectures" in content:
        said += f" (its architectures {content['architectures']!r} name no language model of transformers)"
    return f"{said}: add it"


# --- what is made of a configuration -------------------------------------------------------------------------


def _harmless(content: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in content.items():
        if key in ("auto_map", "quantization_config") or key.endswith(
            ("attn_implementation", "experts_implementation")
        ):
            continue
        kept[key] = _harmless(value) if isinstance(value, dict) else value
    return kept


def _of_architectures(content: dict[str, Any], transformers: Any) -> str | None:
    classes = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = content.get("architectures")
    wanted = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    return next((kind for kind, cls in classes.items() if cls == wanted), _KNOWN.get(wanted))


def _without_mla(content: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek-V2's decoder with ordinary attention, which transformers keeps under DeepSeek-OCR 2."""
    layers, dense = content.get("num_hidden_layers"), content.get("first_k_dense_replace", 0)
    drop = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "architectures")
    kept = {k: v for k, v in content.items() if k not in drop}
    if isinstance(layers, int) and isinstance(dense, int):
        kept["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (layers - dense)
    return kept
