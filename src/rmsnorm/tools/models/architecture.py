"""Finds out which model of transformers a config.json describes, and builds it. No code from a folder is run.

If transformers does not know the model_type of a config.json, the configuration of its language model may stand under
language_config, as DeepSeek-OCR's does; then that language model is used. `describe` decides, `configuration` makes
transformers' configuration object, `build_on_meta` builds the model without allocating memory.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmsnorm.errors import CommandError, one_line
from rmsnorm.tools.models.library import CallLimit, CallsExhausted, command_errors

_BUILD_CALLS = 300_000
_MOST_SHOWN = 80  # characters of a value in a message
# The names under which transformers looks for the configuration of a language model.
_TEXT_PARTS = ("text_config", "decoder", "generator", "text_encoder")
# The first release of transformers that has an architecture, of those that presets and DeepSeek's models need.
_SINCE = {"deepseek_v3": (4, 51), "deepseek_v2": (4, 54), "deepseek_ocr2_text": (5, 10)}
# The model_type of a language_config that has none, by its architecture, for releases that lack the class.
_KNOWN = {"DeepseekV2ForCausalLM": "deepseek_v2", "DeepseekV3ForCausalLM": "deepseek_v3"}


@dataclass(frozen=True)
class Description:
    """What a config.json says about a model.

    Attributes:
        source: The file, and the part of it that is used, for messages.
        kind: The model_type in transformers.
        content: The fields, without those that would download or run foreign code.
        outer: The model_type of the whole model, if only its language_config is used.
        renamed: Whether the names of the weights on disk are those of another class, so that transformers cannot load
            them by itself.
    """

    source: str
    kind: str
    content: dict[str, Any]
    outer: Any = None
    renamed: bool = False


def describe(content: dict[str, Any], path: Path, transformers: Any) -> Description:
    """Find out what a config.json describes.

    Args:
        content: Its content.
        path: Where it is, for messages.
        transformers: The library.

    Returns:
        The description.

    Raises:
        CommandError: If transformers does not have the architecture, or a field has a value that no model can have.
    """
    with command_errors(f"{path} cannot be interpreted"):
        return _described(content, path, transformers)


def _described(content: dict[str, Any], path: Path, transformers: Any) -> Description:
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
        raise CommandError(f"{_unknown(source, kind, transformers)}; {python_advice(path.parent, foreign)}")
    return Description(source, kind, content, outer, renamed)


def python_advice(folder: Path, foreign: bool) -> str:
    """Return what a user can do if the commands cannot load a model: load it in Python, and patch it.

    Args:
        folder: The folder of the model.
        foreign: Whether its config.json asks for code from the folder.
    """
    patched = "report = rmsnorm.patch(model); print(report)"
    if not foreign:
        return f"you can also load it yourself with the code of its authors, then: import rmsnorm; {patched}"
    load = f"model = transformers.AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    return (
        "you can also load it yourself with its own code, which then runs on this machine: "
        f"import rmsnorm, transformers; {load}; {patched}"
    )


def configuration(described: Description, transformers: Any) -> Any:
    """Make transformers' configuration object.

    Args:
        described: What `describe` returned.
        transformers: The library.

    Returns:
        The configuration.

    Raises:
        CommandError: If sizes are missing, or transformers refuses the configuration.
    """
    kind, content = described.kind, described.content
    with command_errors(
        f"{described.source}: transformers {transformers.__version__} cannot read this {kind} configuration"
    ):
        cls = of_kind(kind, transformers, described.source)
        names = getattr(cls, "attribute_map", {})
        nested = [content, *(v for v in content.values() if isinstance(v, dict))]
        for needed in ("hidden_size", "num_hidden_layers"):
            spelled = {needed, names.get(needed, needed)}
            if not any(spelled & set(part) for part in nested):
                message = " or ".join(sorted(spelled))
                raise CommandError(
                    f"{described.source} has no {message}, expected a whole number of at least 1: add it"
                )
        return cls(**{k: v for k, v in content.items() if k != "model_type"})


def text_configuration(config: Any, source: str) -> Any:
    """Return the part of a configuration that describes the language model.

    Args:
        config: A configuration of transformers.
        source: Where it comes from, for messages.

    Returns:
        A configuration of transformers: `config` itself, if it has no part for text.

    Raises:
        CommandError: If transformers finds several parts, or one that is not a configuration. transformers keeps a
            value of config.json as it is under a name that the architecture does not have.
    """
    with command_errors(f"{source}: transformers finds no language model in this {config.model_type}"):
        text = config.get_text_config()
    if not hasattr(text, "get_text_config"):
        name = next((key for key in _TEXT_PARTS if getattr(config, key, None) is text), "a part for text")
        raise CommandError(
            f"{source} has {name} {one_line(repr(text))[:_MOST_SHOWN]}, which a configuration of {config.model_type} "
            "does not have: remove it, or give another model_type"
        )
    return text


def of_kind(kind: str, transformers: Any, what: str) -> Any:
    """Return the configuration class of a model_type.

    Args:
        kind: The model_type.
        transformers: The library.
        what: What needs it, for the message.

    Returns:
        The class.

    Raises:
        CommandError: If the installed transformers does not have the architecture.
    """
    if not _knows(transformers, kind):
        raise CommandError(_unknown(what, kind, transformers))
    return type(transformers.AutoConfig.for_model(kind))


def build_on_meta(config: Any, transformers: Any, what: str) -> nn.Module:
    """Build the model of a configuration on the meta device, which allocates no memory.

    Args:
        config: A configuration of transformers.
        transformers: The library.
        what: The name of the model, for messages.

    Returns:
        The model.

    Raises:
        CommandError: If transformers cannot build it, or it is too large.
    """
    model: nn.Module
    try:
        with (
            command_errors(f"transformers cannot build {what}"),
            torch.enable_grad(),
            torch.device("meta"),
            CallLimit(_BUILD_CALLS),
        ):
            cls = model_class(config, transformers)
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
    """Return the class that builds the model of a configuration.

    It is AutoModel, except for DeepSeek-OCR 2's decoder, for a model that was saved as an encoder alone, and for a
    configuration that AutoModel does not know but that names its class.

    Args:
        config: A configuration of transformers.
        transformers: The library.

    Returns:
        AutoModel, whose `from_config` builds the model, or a class whose constructor does.
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


def release(transformers: Any) -> tuple[int, ...]:
    """Return the major and the minor version: (5, 23)."""
    return tuple(int(n) for n in re.findall(r"\d+", transformers.__version__)[:2])


def _knows(transformers: Any, kind: Any) -> bool:
    return kind in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES


def _unknown(source: str, kind: str, transformers: Any) -> str:
    """Return the message that an architecture is missing, and which release has it."""
    since = _SINCE.get(kind)
    if since is None:
        message = f"transformers {transformers.__version__} does not know the architecture {kind!r} of {source}"
        return f"{message}; a later one may: pip install -U transformers"
    first = ".".join(map(str, since))
    message = f"{source} is of the architecture {kind!r}, which transformers {transformers.__version__} does not have"
    return f"{message}, but {first} and later do: pip install 'transformers>={first}'"


def _without_a_type(source: str, content: dict[str, Any]) -> str:
    message = f'{source} has no model_type, which names the architecture, such as "llama"'
    if "architectures" in content:
        message += f" (its architectures {content['architectures']!r} name no language model of transformers)"
    return f"{message}: add it"


def _harmless(content: dict[str, Any]) -> dict[str, Any]:
    """Return the fields without those that would download or run foreign code."""
    kept = {}
    for key, value in content.items():
        if key in ("auto_map", "quantization_config") or key.endswith(
            ("attn_implementation", "experts_implementation")
        ):
            continue
        kept[key] = _harmless(value) if isinstance(value, dict) else value
    return kept


def _of_architectures(content: dict[str, Any], transformers: Any) -> str | None:
    """Return the model_type that belongs to the field `architectures`; None if it names no language model."""
    classes = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = content.get("architectures")
    wanted = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    return next((kind for kind, cls in classes.items() if cls == wanted), _KNOWN.get(wanted))


def _without_mla(content: dict[str, Any]) -> dict[str, Any]:
    """Convert a DeepSeek-V2 configuration with ordinary attention to the class that DeepSeek-OCR 2 uses for it."""
    layers, dense = content.get("num_hidden_layers"), content.get("first_k_dense_replace", 0)
    drop = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "architectures")
    kept = {k: v for k, v in content.items() if k not in drop}
    if isinstance(layers, int) and isinstance(dense, int):
        kept["mlp_layer_types"] = ["dense" if i < dense else "sparse" for i in range(layers)]
    return kept
