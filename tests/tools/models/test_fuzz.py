"""Generated configurations and safetensors files: one line and exit code 2, or a result; no file besides; little memory."""

import contextlib
import io
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaModel

from rmsnorm.errors import CommandError
from rmsnorm.tools.cli import main
from rmsnorm.tools.models import checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 48,
}  # fmt: skip
# What a command may use beside the file's size: the largest that was seen is below 20 MB.
MOST_BYTES = 64 << 20

SLOW = [HealthCheck.too_slow]  # a slow machine fails nothing

SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 70) | st.sampled_from([2**31, 2**63, 10**30, 1e308, -0.0, "llama", "\0"])
    | st.floats() | st.text(max_size=8)
)  # fmt: skip
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    LlamaModel(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


# --- what a command does -------------------------------------------------------------------------------------


class Writes:
    """Notes the paths that Python code creates, opens for writing, renames or removes, while it is on."""

    def __init__(self) -> None:
        self.on = False
        self.paths: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self.paths.append(os.fsdecode(path))
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"):
            self.paths += [os.fsdecode(a) for a in arguments[:2] if isinstance(a, (str, bytes))]

    @contextlib.contextmanager
    def noted(self) -> Iterator[list[str]]:
        self.paths = []
        self.on = True
        try:
            yield self.paths
        finally:
            self.on = False


WRITES = Writes()


def run(arguments: list[str], allowed: tuple[Path, ...]) -> None:
    """Call the command, and check the exit code, what it prints, and where it writes."""
    errors = io.StringIO()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
        WRITES.noted() as written,
        pytest.raises(SystemExit) as exit,
    ):
        main(arguments)
    said = [
        line for line in errors.getvalue().splitlines() if not re.match(r" *\d+ %  ", line)
    ]  # progress, if it is slow
    assert (exit.value.code, len(said)) in ((0, 0), (2, 1)), (exit.value.code, said)
    assert all(line.startswith("rmsnorm: ") and line.isprintable() for line in said)
    roots = [os.path.realpath(folder) + os.sep for folder in allowed]
    elsewhere = [
        path for path in written if not f"{os.path.realpath(path)}{os.sep}".startswith((*roots, os.path.devnull))
    ]
    assert elsewhere == []


@contextlib.contextmanager
def folders(saved: Path) -> Iterator[tuple[Path, Path]]:
    """A copy of the saved model, and a temporary folder, which must be empty in the end."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        model, scratch = Path(name) / "model", Path(name) / "scratch"
        shutil.copytree(saved, model)
        scratch.mkdir()
        patch.setattr(tempfile, "tempdir", str(scratch))
        before = set(model.rglob("*"))
        yield model, scratch
        assert list(scratch.iterdir()) == []
        assert set(model.rglob("*")) == before


# --- configurations ------------------------------------------------------------------------------------------


def mutated(valid: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    """The bytes after insertions, replacements and deletions at places modulo their number."""
    data = bytearray(valid)
    for what, place, new in changes:
        at = place % (len(data) + 1)
        data[at : at + (0 if what == "insert" else max(1, len(new)))] = b"" if what == "delete" else new
    return bytes(data)


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["insert", "replace", "delete"]),
        st.integers(0, 2000),
        st.sampled_from(
            [b"{", b"}", b"[", b'"', b",", b"-", b"9" * 30, b"e", b"null", b"\xff", b"\0", b"\\u0000", b":"]
        ),
    ),
    max_size=6,
)


@settings(max_examples=25, suppress_health_check=SLOW)
@given(changes=CHANGES, verb=st.sampled_from(["cost", "report"]))
def test_a_config_json_of_any_bytes_is_counted_or_refused_in_one_line(changes: Any, verb: str, saved: Path) -> None:
    with folders(saved) as (model, scratch):
        valid = (model / "config.json").read_bytes()
        (model / "config.json").write_bytes(mutated(valid, changes))
        if verb == "report":  # the report of a model that can be loaded takes seconds, so its weights are missing
            (model / "model.safetensors").write_bytes(b"")
        out = scratch.parent / "out"
        out.mkdir()
        options = ["--seq", "4"] if verb == "cost" else ["--out", str(out), "--device", "cpu"]
        run([verb, str(model), *options], (scratch, out))
        assert list(out.iterdir()) == []


KEYS = st.sampled_from([
    *SIZES, "model_type", "architectures", "rms_norm_eps", "head_dim", "rope_parameters", "rope_theta", "layer_types", "dtype",
    "torch_dtype", "pad_token_id", "text_config", "language_config", "decoder", "encoder", "is_encoder_decoder",
    "id2label", "label2id", "num_labels", "auto_map", "quantization_config", "hidden_act", "attn_implementation",
    "_attn_implementation", "problem_type", "return_dict", "output_attentions", "sliding_window", "tie_word_embeddings",
    "transformers_version", "_name_or_path", "name_or_path", "get_text_config", "to_dict", "__class__", "self",
])  # fmt: skip
KINDS = st.sampled_from(["llama", "gemma3", "deepseek_v3", "t5", "qwen3_next", "mamba2", "bert", "whisper", "clip", ""])


@settings(max_examples=40, suppress_health_check=SLOW)
@given(fields=st.dictionaries(KEYS, JSON, max_size=3), kind=KINDS)
def test_a_configuration_of_any_values_is_counted_or_refused_in_one_line(fields: Any, kind: str, saved: Path) -> None:
    with folders(saved) as (model, scratch):
        (model / "config.json").write_text(json.dumps(SIZES | {"model_type": kind} | fields))
        run(["cost", str(model), "--seq", "4"], (scratch,))


# --- safetensors ---------------------------------------------------------------------------------------------

NUMBERS = st.lists(st.integers(-1, 70) | st.sampled_from([2**62, 2**64, 10**40]) | SCALARS, max_size=4)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", "BOOL", "X", 3, None, ["F32"]]),
        "shape": NUMBERS | JSON,
        "data_offsets": NUMBERS | JSON,
        "x": JSON,
    },
)
TENSORS = {"norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}
HEADERS = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), ENTRIES | JSON, max_size=3)
LENGTHS = st.none() | st.sampled_from([0, 1, 7, 2**31, 99_999_999, 2**63, 2**64 - 1])


def checked(folder: Path) -> None:
    """Check the weights of a folder; they are valid, or the error is one line. It takes little memory."""
    said = ""
    tracemalloc.start()
    try:
        checkpoint.tensors(checkpoint.check_weights(folder))
    except CommandError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(said.splitlines()) <= 1
    assert peak < MOST_BYTES


@settings(max_examples=150, suppress_health_check=SLOW)
@given(header=HEADERS, replaced=st.booleans(), length=LENGTHS, changes=CHANGES, rest=st.integers(0, 80))
def test_a_safetensors_file_of_any_bytes_is_read_or_refused(
    header: Any, replaced: bool, length: int | None, changes: Any, rest: int
) -> None:
    text = mutated(json.dumps(header if replaced else TENSORS | header).encode(), changes)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "model.safetensors"
        file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(rest))
        checked(Path(name))


@settings(max_examples=60, suppress_health_check=SLOW)
@given(content=st.dictionaries(st.sampled_from(["weight_map", "metadata", ""]), JSON, max_size=3), changes=CHANGES)
def test_an_index_of_any_bytes_is_read_or_refused(content: Any, changes: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "model.safetensors.index.json").write_bytes(mutated(json.dumps(content).encode(), changes))
        checked(Path(name))


@pytest.mark.parametrize(
    "make",
    [
        lambda: struct.pack("<Q", 99_999_999) + b"{",  # a header that is not there
        lambda: struct.pack("<Q", 1 << 40) + b"{}",
    ],
)
def test_a_length_that_a_file_only_claims_takes_no_memory(make: Callable[[], bytes], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(make())
    checked(tmp_path)
