"""Reads models that others wrote, as data alone: configurations and safetensors files.

Every defect of a file becomes a CommandError of one line with the whole reason.
"""

import contextlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rmsnorm.errors import CommandError, one_line, type_name

_LARGEST_CONFIG = 8 << 20
_LARGEST_INDEX = 128 << 20
_LARGEST_HEADER = 100_000_000  # what the safetensors library itself accepts
_DEEPEST = 32
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Bits of an element, by the names that safetensors uses.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
# The sizes that every model needs, under all names that transformers' models use.
_SIZES = frozenset(
    ("hidden_size", "d_model", "n_embd", "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers",
     "num_attention_heads", "num_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim", "d_kv", "vocab_size",
     "max_position_embeddings", "n_positions")
)  # fmt: skip
_EPSILONS = ("_eps", "_epsilon")
# A model with more of anything that a configuration counts (num_…, n_…) would take hours to build.
_MOST, _MOST_LAYERS = 1_000_000, 1_000


def read_config(path: Path) -> dict[str, Any]:
    """Read the configuration of a model.

    Args:
        path: A config.json.

    Returns:
        Its content.

    Raises:
        CommandError: If it is not a JSON object, or has sizes that no model can have.
    """
    content = read_object(path)
    _check_sizes(content, path, "")
    return content


def read_object(path: Path, largest: int = _LARGEST_CONFIG) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: A regular file of UTF-8.
        largest: The most bytes that it may have.

    Returns:
        The object.

    Raises:
        CommandError: If the file cannot be read, is larger, or holds anything else.
    """
    with _open(path) as (file, size):
        if size > largest:
            raise CommandError(f"{path} has {size:,} bytes, expected a JSON object of at most {largest:,}")
        data = _take(path, file, largest + 1)
    if len(data) > largest:
        raise CommandError(f"{path} has more than {largest:,} bytes, expected a JSON object of at most that")
    return _object(data, str(path))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[int, int]]:
    """Open a regular file and yield its handle and its size. Opening a pipe fails and does not block."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        dangling = isinstance(error, FileNotFoundError) and os.path.islink(path)
        raise CommandError(f"{path} cannot be read: {'a broken link' if dangling else one_line(error)}") from None
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe or a device"
            raise CommandError(f"{path} is {kind}, expected a regular file")
        yield handle, info.st_size
    finally:
        os.close(handle)


def _take(path: Path, handle: int, count: int) -> bytes:
    """Read the next `count` bytes, or fewer at the end of the file."""
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
        raise CommandError(f"{where} is not a JSON object: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise CommandError(f"{where} is not a JSON object but {type_name(content)}")
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
        for inner in value if isinstance(value, list) else ():
            if isinstance(inner, dict):
                _check_sizes(inner, path, f"{prefix}{key}[].")
        expected = "the name of one" if key == "model_type" and not isinstance(value, (str, type(None))) else ""
        for n in value if isinstance(value, list) else [value]:
            if key in _SIZES and n is not None and not (_whole(n) and n >= 1):
                expected = "a whole number of at least 1"
            elif key.endswith(_EPSILONS) and n is not None and not (_number(n) and 0 <= n < math.inf):
                expected = "a finite number of at least 0"
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


def _number(n: Any) -> bool:
    return _whole(n) or isinstance(n, float)


def check_weights(folder: Path) -> list[Path]:
    """Check every *.safetensors file of a folder, and the index if there is one.

    Args:
        folder: The folder of a checkpoint.

    Returns:
        The files from which transformers would load the weights.

    Raises:
        CommandError: If a file is missing, is cut short or has an inconsistent header, or if the index names a file
            outside the folder.
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
    """Return the files that an index of weights names."""
    names = read_object(index, _LARGEST_INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CommandError(f"{index} has no weight_map of tensors to files")
    for tensor, name in names.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & set("/\\\0"):
            where = f"{index} has {one_line(json.dumps(name))} for {one_line(json.dumps(tensor))} in its weight_map"
            raise CommandError(f"{where}, expected a *.safetensors file of the same folder")
    return sorted(set(names.values()))


def _check_inside(folder: Path, name: str) -> None:
    """Reject links out of the folder, except to the blobs of the Hugging Face cache that the folder belongs to."""
    try:
        folder, target = folder.resolve(strict=True), (folder / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CommandError(f"{folder / name} cannot be read: {one_line(error)}") from None
    cache = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    if not target.is_relative_to(folder) and not cache:
        raise CommandError(f"{folder / name} is a link out of the folder, to {target}: put the file itself there")


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file.

    Attributes:
        file: The file.
        dtype: The dtype by the name that safetensors uses: "BF16".
        shape: The shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    def read(self, name: str) -> Tensor:
        """Load the tensor, whose name in the file is `name`."""
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def tensors(weights: list[Path]) -> dict[str, Stored]:
    """Return the tensors of files that `check_weights` returned, by name. Raises CommandError for a damaged file."""
    headers = ((file, _check_safetensors(file)) for file in weights if file.suffix == ".safetensors")
    return {
        name: Stored(file, entry["dtype"], tuple(entry["shape"]))
        for file, header in headers
        for name, entry in header.items()
    }


def _check_safetensors(file: Path) -> dict[str, Any]:
    """Check and return the header of a file: the file begins with its length, and it says where each tensor lies."""
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
        raise ValueError(f"is {type_name(tensor)}, expected an object")
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
    """Make a temporary folder that holds only a configuration and links to weights.

    From the original folder, transformers would also read adapters, generation settings, and weights under names that
    the configuration gives.

    Args:
        config: The content of a config.json.
        weights: What `check_weights` returned.

    Yields:
        The folder.
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
