"""What `rmsnorm report` measures: the model of a preset, or of a local Hugging Face checkpoint folder.

`builder` looks at the target and reads no more than headers; what it returns takes a device and gives a Built. No code
from a folder is run.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from rmsnorm import checkpoint
from rmsnorm.errors import CommandError, one_line


class Built(NamedTuple):
    """A model, its norms and norm parameters as they are expected (None if unknown), and what is to be said of it."""

    model: Any
    expected: tuple[int, int] | None
    notes: tuple[str, ...]


Builder = Callable[[torch.device], Built]


def builder(target: str) -> Builder:
    """What builds the target. Raises CommandError unless that is a preset or a folder that can be trusted."""
    if target in PRESETS:
        return PRESETS[target]
    folder = Path(target)
    try:
        there = folder.is_dir()
    except OSError as error:
        raise CommandError(f"{target!r} cannot be read: {one_line(error)}") from None
    if not there:
        raise CommandError(
            f"{target!r} is neither a preset nor a folder: give {', '.join(PRESETS)}, or a folder that holds "
            "config.json and *.safetensors"
        )
    config, weights = _checked(folder)
    return lambda device: _load(folder, config, weights, device)


def _deepseek_ocr(device: torch.device) -> Built:
    """DeepSeek-OCR's language decoder at its true widths, with random weights."""
    from transformers import DeepseekOcr2TextConfig
    from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

    notes: tuple[str, ...] = ("random weights; a norm's are drawn from 0.5 to 1.5, so that early and late differ",)
    experts, used, vocabulary = 64, 6, 129280
    if device.type == "cpu":
        experts, used, vocabulary = 4, 2, 4096
        notes += ("4 experts with top-2 instead of 64 with top-6, and a vocabulary of 4096 instead of 129,280: "
                  "no norm sees these, but the step is shorter than the real one",)  # fmt: skip
    config = DeepseekOcr2TextConfig(
        vocab_size=vocabulary,
        hidden_size=1280,
        intermediate_size=6848,
        num_hidden_layers=12,
        num_attention_heads=10,
        max_position_embeddings=8192,
        n_routed_experts=experts,
        num_experts_per_tok=used,
        n_shared_experts=2,
        moe_intermediate_size=896,
        mlp_layer_types=["dense"] + ["sparse"] * 11,
    )
    default = torch.get_default_dtype()
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = DeepseekOcr2TextModel(config)
        finally:
            torch.set_default_dtype(default)
        with torch.no_grad():
            for module in model.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    module.get_parameter("weight").uniform_(0.5, 1.5)
    return Built(model, (25, 32_000), notes)


PRESETS: dict[str, Builder] = {"deepseek-ocr": _deepseek_ocr}


def _load(folder: Path, content: dict[str, Any], weights: list[Path], device: torch.device) -> Built:
    """The folder's model as transformers' own code builds it; nothing in the folder is executed."""
    transformers = checkpoint.transformers_for("the report")
    with checkpoint.vetted(content, weights) as vetted:
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        with checkpoint.blame(f"transformers cannot load {folder}", (vetted, str(folder))):
            config = transformers.AutoConfig.from_pretrained(vetted, **options)
            _check_memory(checkpoint.build_on_meta(config, transformers, str(folder)), folder)
            options |= {"config": config, "use_safetensors": True, "dtype": "auto", "output_loading_info": True}
            cls = checkpoint.model_class(config, transformers)
            try:
                model, info = cls.from_pretrained(vetted, **options)
            except RuntimeError:
                # transformers logs the shapes that differ, and does not say them.
                _, info = cls.from_pretrained(vetted, device_map="meta", ignore_mismatched_sizes=True, **options)
                if not info["mismatched_keys"]:
                    raise
                name, stored, wanted = min(info["mismatched_keys"])
                raise CommandError(
                    f"transformers cannot load {folder}: {name} has shape {tuple(stored)}, its config.json expects "
                    f"{tuple(wanted)}"
                ) from None
            model = model.to(device)
    missing = sorted(info["missing_keys"])
    notes: tuple[str, ...] = ()
    if missing:
        notes = (f"{len(missing)} parameters are not in the folder and were drawn at random, {missing[0]} first",)
    return Built(model, None, notes)


def _check_memory(model: nn.Module, folder: Path) -> None:
    """What the folder lacks is drawn at random, so its files do not say how much is allocated."""
    needed = 2 * sum(p.numel() for p in model.parameters())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        has = f"this machine has {there / 1e9:,.0f}"
        raise CommandError(f"{folder} is of a model of at least {needed / 1e9:,.0f} GB in 16 bits, {has}")


def _checked(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """The folder's configuration and the files of its weights. Raises CommandError unless these can be trusted."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise CommandError(f"{folder} holds no config.json: give the folder of a Hugging Face checkpoint")
    config = checkpoint.read_config(path)
    for key, value in _strings(config):
        # A kernel of this form would be fetched and run.
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in value:
            raise CommandError(f"{path} asks for foreign code, {key} {value!r}: remove that line")
    return config, checkpoint.check_weights(folder)


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, name if not key.endswith("_implementation") else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)
