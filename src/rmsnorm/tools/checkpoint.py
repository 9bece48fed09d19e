"""Reads models that others wrote, as data alone: configurations and safetensors; and how transformers is called.

Every fault of a file, and every exception of transformers, becomes a CommandError of one line with the whole reason.
"""

import contextlib
import inspect
import json
import logging
import math
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rmsnorm.errors import CommandError, one_line

_LARGEST_CONFIG = 8 << 20
_LARGEST_INDEX = 128 << 20
_LARGEST_HEADER = 100_000_000  # what the safetensors library itself accepts
_DEEPEST = 32
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Bits an element, by safetensors' names.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
# The sizes without which no model can be built, under each name that transformers' models give them.
_SIZES = frozenset(
    ("hidden_size", "d_model", "n_embd", "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers",
     "num_attention_heads", "num_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim", "d_kv", "vocab_size",
     "max_position_embeddings", "n_positions")
)  # fmt: skip
# Of anything that a configuration counts (num_…, n_…), more than this takes hours to build.
_MOST, _MOST_LAYERS = 1_000_000, 1_000


# --- files ---------------------------------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a model. Raises CommandError unless it is a JSON object whose sizes are possible."""
    content = read_object(path)
    _check_sizes(content, path, "")
    return content


def read_object(path: Path, largest: int = _LARGEST_CONFIG) -> dict[str, Any]:
    """The JSON object in a regular file of at most `largest` bytes of UTF-8. Raises CommandError for anything else."""
    with _open(path) as (file, size):
        if size > largest:
            raise CommandError(f"{path} has {size:,} bytes, expected a JSON object of at most {largest:,}")
        data = _take(path, file, largest + 1)
    if len(data) > largest:
        raise CommandError(f"{path} has more than {largest:,} bytes, expected a JSON object of at most that")
    return _object(data, str(path))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[int, int]]:
    """The handle and the size of a regular file. Does not block, as opening a pipe otherwise does."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        dangling = isinstance(error, FileNotFoundError) and os.path.islink(path)
        raise CommandError(f"{path} cannot be read: {'a link to nothing' if dangling else one_line(error)}") from None
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe or a device"
            raise CommandError(f"{path} is {kind}, expected a regular file")
        yield handle, info.st_size
    finally:
        os.close(handle)


def _take(path: Path, handle: int, count: int) -> bytes:
    """The next `count` bytes, or fewer at the end of the file."""
    parts = []
    try:
        while count and (part := os.read(handle, min(count, 1 << 24))):
            parts.append(part)
            count -= len(part)
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {one_line(error)}") from None
    return b"".join(parts)


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(data.decode(), object_pairs_hook=_each_key_once)
    except RecursionError:
        raise CommandError(f"{where} is nested more than {_DEEPEST} deep, expected a JSON object of fewer") from None
    except ValueError as error:
        raise CommandError(f"{where} is no JSON object: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise CommandError(f"{where} holds no JSON object but a {type(content).__name__}")
    level: list[Any] = [content]
    for _ in range(_DEEPEST):
        level = [v for outer in level for v in _values(outer) if isinstance(v, (dict, list))]
    if level:
        raise CommandError(f"{where} is nested more than {_DEEPEST} deep, expected a JSON object of fewer")
    return content


def _values(of: Any) -> Any:
    return of.values() if isinstance(of, dict) else of


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {twice!r} twice")
    return content


def _check_sizes(content: dict[str, Any], path: Path, prefix: str) -> None:
    for key, value in content.items():
        if isinstance(value, dict) and key != "model_type":
            _check_sizes(value, path, f"{prefix}{key}.")
            continue
        expected = "the name of one" if key == "model_type" and not isinstance(value, (str, type(None))) else ""
        for n in value if isinstance(value, list) else [value]:
            if key in _SIZES and n is not None and not (_whole(n) and n >= 1):
                expected = "a whole number of at least 1"
            elif key.startswith(("num_", "n_")) and isinstance(n, (int, float)):
                most = _MOST_LAYERS if key.endswith(("layers", "layer")) else _MOST
                expected = expected if n <= most else f"at most {most:,}"
        if expected:
            raise CommandError(f"{path} has {prefix}{key} {json.dumps(value)}, expected {expected}")
    heads, shared = content.get("num_attention_heads"), content.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise CommandError(f"{path} has {prefix}num_key_value_heads {shared}, expected a divisor of {heads} heads")


def _whole(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool)


def check_weights(folder: Path) -> list[Path]:
    """The files from which transformers would load the weights; each *.safetensors in the folder is checked.

    Raises CommandError unless all have whole, consistent headers, and the index, if there is one, names only them.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CommandError(f"{folder} cannot be read: {one_line(error)}") from None
    found = [name for name in names if name.endswith(".safetensors")]
    if not found and _INDEX not in names:
        raise CommandError(f"{folder} holds no *.safetensors: convert its weights to safetensors first")
    for name in found:
        _check_safetensors(folder / name)
    needed = [_WEIGHTS]
    if _INDEX in names:
        shards = _shards(folder / _INDEX)
        needed = needed if _WEIGHTS in names else [_INDEX, *shards]
    for name in needed:
        if name not in names:
            raise CommandError(f"{folder} holds no {name}, expected that file, or {_INDEX} and what it names")
        _check_inside(folder, name)
    return [folder / name for name in needed]


def _shards(index: Path) -> list[str]:
    """The files that an index of weights names."""
    names = read_object(index, _LARGEST_INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CommandError(f"{index} has no weight_map of tensors to files")
    for tensor, name in names.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & set("/\\\0"):
            where = f"{index} has {one_line(json.dumps(name))} for {one_line(json.dumps(tensor))} in its weight_map"
            raise CommandError(f"{where}, expected a *.safetensors file of the same folder")
    return sorted(set(names.values()))


def _check_inside(folder: Path, name: str) -> None:
    """Links may not lead out of the folder, but to the blobs beside it in the cache of the Hugging Face hub."""
    try:
        folder, target = folder.resolve(strict=True), (folder / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CommandError(f"{folder / name} cannot be read: {one_line(error)}") from None
    cache = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    if not target.is_relative_to(folder) and not cache:
        raise CommandError(f"{folder / name} is a link out of the folder, to {target}: put the file itself there")


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file; dtype by the name that it has there."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    def read(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def tensors(weights: list[Path]) -> dict[str, Stored]:
    """By their names, those that the files which `check_weights` found hold. Raises CommandError for a damaged one."""
    headers = ((file, _check_safetensors(file)) for file in weights if file.suffix == ".safetensors")
    return {
        name: Stored(file, entry["dtype"], tuple(entry["shape"]))
        for file, header in headers
        for name, entry in header.items()
    }


def _check_safetensors(file: Path) -> dict[str, Any]:
    """The header: the file begins with its length, and it says where each tensor lies in what follows it."""
    with _open(file) as (handle, size):
        length = int.from_bytes(_take(file, handle, 8), "little")
        if size < 8 or 8 + length > size:
            raise CommandError(f"{file} is cut short or damaged ({size} bytes, its header is more): fetch it again")
        if length > _LARGEST_HEADER:
            raise CommandError(f"{file} has a header of {length:,} bytes, expected at most {_LARGEST_HEADER:,}")
        header = _object(_take(file, handle, length), f"the header of {file}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CommandError(f"{file} is damaged: its __metadata__ is not an object of strings")
    ends = []
    for name, tensor in header.items():
        try:
            ends.append(_extent(tensor))
        except ValueError as error:
            raise CommandError(f"{file} is damaged: tensor {json.dumps(name)} {error}: fetch it again") from None
    position = 0
    for begin, end in sorted(ends):
        if begin != position:
            what = "overlap" if begin < position else "leave a gap"
            raise CommandError(f"{file} is damaged: its tensors {what} at byte {begin}: fetch it again")
        position = end
    if 8 + length + position != size:
        expected = f"{size} bytes, its header says {8 + length + position}"
        raise CommandError(f"{file} is cut short or damaged ({expected}): fetch it again")
    return header


def _extent(tensor: Any) -> tuple[int, int]:
    """Where a tensor begins and ends. Raises ValueError unless that fits its dtype and shape."""
    if not isinstance(tensor, dict):
        raise ValueError(f"is a {type(tensor).__name__}, expected an object")
    dtype = tensor.get("dtype")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"has dtype {json.dumps(dtype)}, expected one of {', '.join(_BITS)}")
    shape, offsets = _numbers(tensor, "shape"), _numbers(tensor, "data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"has data_offsets {offsets}, expected a begin and an end not before it")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"has data_offsets {offsets}, expected {-(-bits // 8)} bytes for {dtype} {shape}")
    return offsets[0], offsets[1]


def _numbers(tensor: dict[str, Any], key: str) -> list[int]:
    value = tensor.get(key)
    if not isinstance(value, list) or len(value) > 64 or not all(_whole(n) and 0 <= n < 1 << 63 for n in value):
        raise ValueError(f"has {key} {json.dumps(value)}, expected a list of whole numbers of at least 0")
    return value


@contextlib.contextmanager
def vetted(config: dict[str, Any], weights: list[Path]) -> Iterator[Path]:
    """A temporary folder with this configuration and links to these weights, so that transformers sees nothing else.

    It would also read adapters, generation settings and weights under names that a configuration gives.
    """
    kept = {k: v for k, v in config.items() if k not in ("auto_map", "transformers_weights")}
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rmsnorm-")))
            (folder / "config.json").write_text(json.dumps(kept))
            for file in weights:
                (folder / file.name).symlink_to(file.resolve())
        except OSError as error:
            raise CommandError(f"no temporary folder can be made (TMPDIR): {one_line(error)}") from None
        yield folder


# --- transformers --------------------------------------------------------------------------------------------


def transformers_for(what: str) -> Any:
    """The library. Raises CommandError where it is missing or broken."""
    try:
        import transformers
    except ImportError:
        raise CommandError(f"{what} needs transformers: pip install transformers safetensors") from None
    except Exception as error:  # noqa: BLE001  # its import runs much code
        raise CommandError(f"transformers cannot be imported: {one_line(error)}") from None
    return transformers


@contextlib.contextmanager
def blame(what: str, replace: tuple[object, str] = ("", "")) -> Iterator[None]:
    """Turn any exception into a CommandError: what failed, and all that the exception says.

    replace: a text in it and what to say instead.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as error:  # a model's code raises what it likes
        said = one_line(error)
        if replace[1]:
            said = said.replace(str(replace[0]), replace[1])
        raise CommandError(f"{what}: {said}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep bars, warnings and logs of transformers and torch off the screen."""
    from transformers.utils import logging as transformers_logging

    bars: Any = transformers_logging  # it has no types
    shown, disabled = bars.is_progress_bar_enabled(), logging.root.manager.disable
    bars.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)
        if shown:
            bars.enable_progress_bar()


class CallsExhausted(Exception):
    """More torch functions were called than allowed."""


class AtMost(TorchFunctionMode):
    """Raise CallsExhausted after so many calls of torch: unlike a time limit, the same on every machine."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0 and self.left % 1000 == 999:  # not each time: no_grad and the like call torch to end
            raise CallsExhausted
        return func(*args, **(kwargs or {}))


def on_tokens(model: nn.Module, ids: Tensor) -> Any:
    """Run the model on token ids alone; where it has a decoder that takes its own, on the same ones there."""
    taken = inspect.signature(model.forward).parameters
    named: dict[str, Any] = {"input_ids": ids}
    if "decoder_input_ids" in taken:
        named["decoder_input_ids"] = ids
    if "use_cache" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        named["use_cache"] = False
    return model(**named)


def norm_width(module: nn.Module) -> int | None:
    """How wide the rows are that a norm takes; None where it has no weight and takes any."""
    weight, shape = module._parameters.get("weight"), getattr(module, "normalized_shape", None)
    if weight is not None:
        return weight.numel()
    return math.prod(shape) if isinstance(shape, tuple) else None
