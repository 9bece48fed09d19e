"""Builds the model that `rmsnorm report` measures: a preset, or a local Hugging Face checkpoint folder.

`builder` looks at the target and reads no more than headers; what it returns takes a device and builds the model. No
code from a folder is run.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rmsnorm.errors import CommandError, one_line
from rmsnorm.tools import machine
from rmsnorm.tools.models import architecture, checkpoint, library, presets


class Built(NamedTuple):
    """A model that was built.

    Attributes:
        model: The model.
        expected: How many norms and norm parameters it must have; None if that is unknown.
        notes: What the user should know about it.
    """

    model: Any
    expected: tuple[int, int] | None
    notes: tuple[str, ...]


Builder = Callable[[torch.device], Built]
_MOST_NAMED = 8


def builder(target: str) -> Builder:
    """Return the function that builds a target.

    Args:
        target: The name of a preset, or the path of a folder.

    Returns:
        A function that takes a device and returns the model.

    Raises:
        CommandError: If the target is neither, or the folder is damaged or asks for foreign code.
    """
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
    """Build DeepSeek-OCR's language decoder with its real widths and random weights."""
    transformers = library.import_transformers("the report")
    notes: tuple[str, ...] = (
        "random weights; those of the norms are between 0.5 and 1.5, so that early and late differ",
    )
    smaller: dict[str, int] = {}
    if device.type == "cpu":
        smaller = {"n_routed_experts": 4, "num_experts_per_tok": 2, "vocab_size": 4096}
        notes += ("4 experts with top-2 instead of 64 with top-6, and a vocabulary of 4096 instead of 129,280: "
                  "this does not affect the norms, but a step is shorter than the real one",)  # fmt: skip
    with library.command_errors("transformers cannot build deepseek-ocr"):
        model = random_model(presets.deepseek_ocr(transformers, **smaller), transformers, device)
    return Built(model, (25, 32_000), notes)


def random_model(config: Any, transformers: Any, device: torch.device) -> Any:
    """Build a model in bf16 with random weights, the same every time.

    Args:
        config: A configuration of transformers.
        transformers: The library.
        device: The device of the model.

    Returns:
        The model. The weights of its RMSNorms are between 0.5 and 1.5, so that early and late differ.
    """
    cls = architecture.model_class(config, transformers)
    default = torch.get_default_dtype()
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = cls.from_config(config) if cls is transformers.AutoModel else cls(config)
        finally:
            torch.set_default_dtype(default)
        with torch.no_grad():
            for module in model.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    module.get_parameter("weight").uniform_(0.5, 1.5)
    return model


PRESETS: dict[str, Builder] = {"deepseek-ocr": _deepseek_ocr}


def _load(folder: Path, content: dict[str, Any], weights: list[Path], device: torch.device) -> Built:
    """Load the model of a folder with transformers' own code; nothing in the folder is executed.

    If transformers does not know the model but knows its language model, that one is loaded.
    """
    transformers = library.import_transformers("the report")
    described = architecture.describe(content, folder / "config.json", transformers)
    try:
        if described.renamed:
            loaded = _load_renamed(folder, described, weights, transformers)
        else:
            loaded = _load_known(folder, content, weights, transformers)
    except CommandError as error:
        if error.__cause__ is None:  # the error is not transformers'
            raise
        raise CommandError(f"{error}; {architecture.python_advice(folder, 'auto_map' in content)}") from None
    notes = [_note_language_model(described), _note_not_loaded(loaded), _note_random(loaded.missing)]
    return Built(loaded.model.to(device), None, tuple(note for note in notes if note))


class _Loaded(NamedTuple):
    """A model with its weights.

    Attributes:
        model: The model.
        read: How many tensors the folder has.
        unused: Those of them that the model does not have.
        missing: Parameters of the model that the folder does not have.
    """

    model: Any
    read: int
    unused: list[str]
    missing: list[str]


def _load_known(folder: Path, content: dict[str, Any], weights: list[Path], transformers: Any) -> _Loaded:
    """Load a model that transformers knows how to load."""
    with checkpoint.vetted(content, weights) as vetted:
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        with library.command_errors(f"transformers cannot load {folder}", (vetted, str(folder))):
            config = transformers.AutoConfig.from_pretrained(vetted, **options)
            _check_memory(architecture.build_on_meta(config, transformers, str(folder)), folder)
            options |= {"config": config, "use_safetensors": True, "output_loading_info": True}
            options[_dtype_option(transformers)] = "auto"
            cls = architecture.model_class(config, transformers)
            try:
                model, info = cls.from_pretrained(vetted, **options)
            except RuntimeError:
                # The exception does not name the shapes that differ; transformers only logs them.
                _, info = cls.from_pretrained(vetted, device_map="meta", ignore_mismatched_sizes=True, **options)
                if not info["mismatched_keys"]:
                    raise
                raise CommandError(_mismatch(folder, *min(info["mismatched_keys"]))) from None
    return _Loaded(
        model, len(checkpoint.tensors(weights)), sorted(info["unexpected_keys"]), sorted(info["missing_keys"])
    )


def _load_renamed(folder: Path, described: architecture.Description, weights: list[Path], transformers: Any) -> _Loaded:
    """Load a language model whose weights have the names of a class that transformers does not have."""
    config = architecture.configuration(described, transformers)
    model = architecture.build_on_meta(config, transformers, str(folder))
    cls: Any = type(model)
    _check_memory(model, folder)
    stored = checkpoint.tensors(weights)
    sources = _sources(model.state_dict(), stored, folder)
    for source in sources.values():
        for name in source.names:
            _check_stored(name, stored[name], source.shape, folder)
    options = {"config": config, "output_loading_info": True, _dtype_option(transformers): "auto"}
    with library.command_errors(f"transformers cannot load {folder}"):
        state = {name: source.read(stored) for name, source in sources.items()}
        loaded, info = cls.from_pretrained(None, state_dict=state, **options)
    used = {name for source in sources.values() for name in source.names}
    return _Loaded(loaded, len(stored), sorted(stored.keys() - used), sorted(info["missing_keys"]))


@dataclass(frozen=True)
class _Source:
    """The tensors of a folder that make up one parameter.

    Attributes:
        names: Their names: one, or those of all experts if they are fused into one parameter.
        shape: The shape of each of them.
        per_expert: How many tensors of each expert are concatenated; 0 for a single tensor.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    per_expert: int = 0

    def read(self, stored: dict[str, checkpoint.Stored]) -> Tensor:
        """Load the tensors and assemble the parameter."""
        parts = [stored[name].read(name) for name in self.names]
        if not self.per_expert:
            return parts[0]
        each = range(0, len(parts), self.per_expert)
        return torch.stack([torch.cat(parts[i : i + self.per_expert]) for i in each])


# The names of an expert's weights, by the name of the parameter into which transformers fuses those of all experts.
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def _sources(state: dict[str, Tensor], stored: dict[str, checkpoint.Stored], folder: Path) -> dict[str, _Source]:
    """Return the source of each parameter, except of those that are not in the folder."""
    prefix = _prefix(list(state), stored, folder)
    found = ((name, _source(name, tuple(tensor.shape), prefix, stored)) for name, tensor in state.items())
    return {name: source for name, source in found if source is not None}


def _prefix(names: list[str], stored: dict[str, checkpoint.Stored], folder: Path) -> str:
    """Return the prefix of the language model's tensors in the folder, for example "model." or "language.model."."""
    ends = [key.removesuffix(names[0]) for key in stored if f".{key}".endswith(f".{names[0]}")]
    if not ends:
        raise CommandError(f"{folder} has no tensor {names[0]!r} under any prefix: its language model is missing")
    return max(ends, key=lambda prefix: sum(prefix + name in stored for name in names))


def _source(name: str, shape: tuple[int, ...], prefix: str, stored: dict[str, checkpoint.Stored]) -> _Source | None:
    if prefix + name in stored:
        return _Source((prefix + name,), shape)
    experts, _, last = name.rpartition(".")
    parts = _FUSED.get(last)
    if parts is None or not experts.endswith("experts"):
        return None
    names = tuple(f"{prefix}{experts}.{i}.{part}.weight" for i in range(shape[0]) for part in parts)
    rows = shape[1] // len(parts)
    return _Source(names, (rows, *shape[2:]), len(parts)) if stored.keys() >= set(names) else None


def _check_stored(name: str, stored: checkpoint.Stored, wanted: tuple[int, ...], folder: Path) -> None:
    if stored.dtype not in ("F64", "F32", "F16", "BF16"):
        raise CommandError(
            f"{folder} holds {name} as {stored.dtype}: only the model's own code can load quantized weights; "
            "give a folder with its weights in F32, F16 or BF16"
        )
    if stored.shape != wanted:
        raise CommandError(_mismatch(folder, name, stored.shape, wanted))


def _dtype_option(transformers: Any) -> str:
    return "dtype" if architecture.release(transformers) >= (4, 56) else "torch_dtype"


def _mismatch(folder: Path, name: str, stored: Any, wanted: Any) -> str:
    return (
        f"transformers cannot load {folder}: {name} has shape {tuple(stored)}, its config.json expects {tuple(wanted)}"
    )


def _note_language_model(described: architecture.Description) -> str:
    return "" if described.outer is None else f"{described.outer}: only its language model is loaded"


def _note_not_loaded(loaded: _Loaded) -> str:
    """Return a note that counts the tensors that were not loaded, by their modules."""
    if not loaded.unused:
        return ""
    parts = (name.removeprefix("model.").split(".") for name in loaded.unused)
    counts = Counter("lm_head" if "lm_head" in part else part[0] for part in parts)
    of = ", ".join(f"{count} of {module}" for module, count in counts.most_common(_MOST_NAMED))
    more = f" and of {len(counts) - _MOST_NAMED} other modules" if len(counts) > _MOST_NAMED else ""
    return (
        f"tensors of the folder that were not loaded, because {type(loaded.model).__name__} does not have them: "
        f"{len(loaded.unused)} of {loaded.read} ({of}{more})"
    )


def _note_random(missing: list[str]) -> str:
    if not missing:
        return ""
    return f"parameters that are not in the folder and have random values: {len(missing)}, for example {missing[0]}"


def _check_memory(model: nn.Module, folder: Path) -> None:
    """Check that the model fits into memory.

    The sizes of the files do not tell, because parameters that are missing from the folder are allocated, too.
    """
    needed = 2 * sum(p.numel() for p in model.parameters())
    there = machine.memory_bytes()
    if there is not None and needed > there:
        has = f"this machine has {there / 1e9:,.0f}"
        raise CommandError(f"{folder} holds a model of at least {needed / 1e9:,.0f} GB in 16 bits, but {has}")


def _checked(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Return a folder's configuration and weight files. Raises CommandError unless they can be trusted."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise CommandError(f"{folder} holds no config.json: give the folder of a Hugging Face checkpoint")
    config = checkpoint.read_config(path)
    for key, value in _strings(config):
        # transformers would download and run a kernel with such a name.
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in value:
            raise CommandError(f"{path} asks for foreign code, {key} {value!r}: remove that line")
    return config, checkpoint.check_weights(folder)


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the key and the value of every string; what is nested under …_implementation keeps that key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, name if not key.endswith("_implementation") else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)
