"""What the commands read is data that may be anything: each fault is one line and exit code 2, no traceback, no wait."""

import contextlib
import io
import json
import os
import shutil
import struct
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaModel, Qwen2VLConfig, Qwen2VLModel

from rmsnorm.errors import CommandError
from rmsnorm.tools.cli import main
from rmsnorm.tools.models import architecture, checkpoint, library

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
}
TENSOR: dict[str, Any] = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
VERBS = ("cost", "report")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    LlamaModel(LlamaConfig(**SMALL)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call the command, and return the one line that it prints before it exits with 2."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["rmsnorm", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        (message,) = capsys.readouterr().err.strip().splitlines()
        assert exit.value.code == 2
        assert message.startswith("rmsnorm: ")
        return message

    return call


def arguments(verb: str, folder: Path) -> list[object]:
    if verb == "cost":
        return ["cost", folder, "--seq", 8]
    return ["report", folder, "--out", folder.parent / "out", "--tokens", 8, "--seconds", 0.001, "--device", "cpu"]


def edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- config.json ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "is a pipe or a device, expected a regular file"),
        (lambda p: p.symlink_to("/dev/zero"), "is a pipe or a device"),
        (lambda p: p.symlink_to("/proc/self/mem"), "cannot be read"),  # a regular file that no one can read
        (lambda p: p.symlink_to(p), "cannot be read: Too many levels of symbolic links"),
        (lambda p: p.symlink_to("nowhere"), "a broken link"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: p.write_text("[" * 200_000), "nested more than 32 deep"),
        (lambda p: p.write_text('{"a":' * 40 + "1" + "}" * 40), "nested more than 32 deep"),
        (
            lambda p: p.write_text('{"a": "' + "x" * (9 << 20) + '"}'),
            "bytes, expected a JSON object of at most 8,388,608",
        ),
        (lambda p: p.write_bytes(bytes(range(128, 256))), "'utf-8' codec can't decode"),
        (lambda p: p.write_bytes('{"a": "é"}'.encode("latin1")), "'utf-8' codec can't decode"),
        (lambda p: p.write_bytes(b""), "is not a JSON object"),
        (lambda p: p.write_text("\ufeff{}"), "Unexpected UTF-8 BOM"),
        (lambda p: p.write_text("{}", "utf-16"), "'utf-8' codec can't decode"),
        (lambda p: p.write_text("[{}]"), "is not a JSON object but a list"),
        (lambda p: p.write_text('{"hidden_size": 64, "hidden_size": 32}'), "has the key 'hidden_size' twice"),
        (lambda p: p.write_text('{"a": ' + "9" * 5000 + "}"), "is not a JSON object"),
    ],
)
def test_a_config_json_that_is_not_a_json_object_is_refused(verb, make, says, folder: Path, refused) -> None:
    (folder / "config.json").unlink()
    make(folder / "config.json")
    assert says in refused(*arguments(verb, folder))
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_position_embeddings": -5}, "max_position_embeddings -5, expected a whole number of at least 1"),
        ({"model_type": ["llama"]}, 'model_type ["llama"], expected the name of one'),
        ({"model_type": {"llama": 1}}, 'model_type {"llama": 1}, expected the name of one'),
        ({"model_type": 7}, "model_type 7, expected"),
        ({"hidden_size": 0}, "hidden_size 0, expected"),
        ({"vocab_size": 0}, "vocab_size 0, expected"),
        ({"num_attention_heads": 0}, "num_attention_heads 0, expected"),
        ({"head_dim": -16}, "head_dim -16, expected"),
        ({"num_key_value_heads": 3, "num_attention_heads": 4}, "num_key_value_heads 3, expected a divisor of 4 heads"),
        ({"num_hidden_layers": "3"}, 'num_hidden_layers "3", expected'),
        ({"num_hidden_layers": 1e9}, "num_hidden_layers 1000000000.0, expected"),
        ({"num_hidden_layers": float("nan")}, "num_hidden_layers NaN, expected"),
        ({"num_hidden_layers": True}, "num_hidden_layers true, expected"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, expected at most 1,000"),
        ({"num_labels": 10**9}, "num_labels 1000000000, expected at most"),
        ({"text_config": {"num_heads": [4, -1]}}, "text_config.num_heads [4, -1], expected"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None}, "not a multiple of the number of"),
        ({"vocab_size": 10**18}, "Storage size calculation overflowed"),
        ({"hidden_act": "no\nsuch"}, "KeyError: 'no\\nsuch'"),
        ({"dtype": "float99"}, "float99"),
        ({"model_type": "gemma4", "text_config": []}, "Field 'text_config' with value [] doesn't match any type in"),
        ({"rope_parameters": {"rope_type": "none"}}, "KeyError: 'none'"),
        ({"hidden_size": None}, "Field 'hidden_size' expected int, got NoneType"),
        ({"hidden_size": 10**30}, "Overflow when unpacking"),
        ({"intermediate_size": "96"}, "Field 'intermediate_size' expected int, got str (value: '96')"),
        ({"layer_types": ["none"]}, "The `layer_types` entries must be in"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps NaN, expected a finite number of at least 0"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps Infinity, expected a finite number of at least 0"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps -1e-06, expected a finite number of at least 0"),
        ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps "1e-6", expected a finite number of at least 0'),
        ({"rms_norm_eps": True}, "rms_norm_eps true, expected a finite number of at least 0"),
        (
            {"text_config": {"layer_norm_epsilon": [1] * 2 + [-1]}},
            "text_config.layer_norm_epsilon [1, 1, -1], expected",
        ),
        ({"blocks": [{"num_labels": 10**9}]}, "blocks[].num_labels 1000000000, expected at most"),
        ({"text_config": "x"}, "has text_config 'x', which a configuration of llama does not have: remove it"),
        ({"text_config": SMALL}, "has text_config {'vocab_size': 128, "),
        ({"text_config": True}, "has text_config True, which"),
        ({"decoder": [1]}, "has decoder [1], which a configuration of llama does not have"),
        ({"decoder": {}, "text_config": {}}, "Multiple valid text configs were found"),
        ({"get_text_config": 1}, "TypeError: 'int' object is not callable"),
    ],
)
def test_impossible_values_of_a_configuration_are_refused(verb, changes, says, folder: Path, refused) -> None:
    edit(folder, **changes)
    assert says in refused(*arguments(verb, folder))


@pytest.mark.parametrize("architectures", [7, {"a": 1}, [7], [], "x"])
def test_architectures_that_are_not_names_are_refused(architectures, folder: Path, refused) -> None:
    content = {"model_type": "deepseek_vl_v2", "language_config": SMALL | {"architectures": architectures}}
    (folder / "config.json").write_text(json.dumps(content))
    for verb in VERBS:
        message = refused(*arguments(verb, folder))
        assert "config.json, language_config has no model_type, which names the architecture" in message
        assert f"its architectures {architectures!r} name no language model of transformers" in message


def test_a_transformers_with_other_modules_is_reported_in_one_line() -> None:
    with pytest.raises(CommandError, match=r"^config\.json cannot be interpreted: AttributeError: .* 'models'$"):
        architecture.describe({"model_type": "llama"}, Path("config.json"), types.SimpleNamespace(__version__="9.0"))


@pytest.mark.parametrize("verb", VERBS)
def test_a_python_that_removes_docstrings_is_refused_with_the_fix(verb, folder: Path, refused, monkeypatch) -> None:
    """transformers fails without docstrings, after it has printed many errors."""
    flags = types.SimpleNamespace(optimize=2)
    monkeypatch.setattr(library, "sys", types.SimpleNamespace(flags=flags))
    assert "PYTHONOPTIMIZE=2 removes them: use python -O or PYTHONOPTIMIZE=1 at most" in refused(
        *arguments(verb, folder)
    )
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("dense", [-1, 0, 1, 10**30])
def test_dense_layers_of_deepseek_are_limited_by_all_layers(dense: int) -> None:
    """A list of 10**30 names would not fit into memory."""
    content = SMALL | {"model_type": "deepseek_v2", "use_mla": False, "first_k_dense_replace": dense}
    described = architecture.describe(content, Path("config.json"), transformers)
    assert described.content["mlp_layer_types"] == ["dense" if dense > 0 else "sparse"]


JUNK: list[Any] = [
    None, "", "x", [], [1], {}, {"a": [1]}, True, -1, 0, 3, 1.5, 2**31, 10**18, 10**30, float("nan"), float("inf"),
    {"model_type": ["llama"]}, SMALL, [SMALL],
]  # fmt: skip
MUTATED = (
    *SMALL, "model_type", "architectures", "rms_norm_eps", "hidden_act", "head_dim", "rope_parameters", "rope_theta",
    "layer_types", "dtype", "pad_token_id", "tie_word_embeddings", "text_config", "language_config", "vision_config",
    "encoder", "decoder", "is_encoder_decoder", "id2label", "attention_bias", "auto_map", "attribute_map", "",
)  # fmt: skip


@settings(max_examples=30)
@given(changes=st.dictionaries(st.sampled_from(MUTATED), st.sampled_from(JUNK), min_size=1, max_size=3))
def test_whatever_a_field_holds_cost_counts_or_exits_with_2_and_one_line(changes: dict[str, Any], saved: Path) -> None:
    valid = json.loads((saved / "config.json").read_text())
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(valid | changes))
        errors = io.StringIO()
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(errors),
            pytest.raises(SystemExit) as exit,
        ):
            main(["cost", name, "--seq", "8"])
    message = errors.getvalue().splitlines()
    assert (exit.value.code, len(message)) in ((0, 0), (2, 1)), message


def test_a_language_config_that_is_a_list_is_ignored(folder: Path, refused) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_vl_v2", "language_config": [SMALL]}))
    for verb in VERBS:
        assert "does not know the architecture 'deepseek_vl_v2'" in refused(*arguments(verb, folder))


def test_the_whole_reason_is_reported(folder: Path, refused) -> None:
    """Transformers lists the types that it accepts, in more than 200 characters on several lines."""
    edit(folder, rope_parameters=[1])
    for verb in VERBS:
        message = refused(*arguments(verb, folder))
        assert "Field 'rope_parameters' with value [1] doesn't match any type" in message
        assert len(message) > 300
    assert message.endswith(
        "with the code of its authors, then: import rmsnorm; report = rmsnorm.patch(model); print(report)"
    )


def test_a_message_about_a_long_value_is_short_and_keeps_its_end(folder: Path, refused) -> None:
    edit(folder, num_heads=[1] * 1_000_000 + [-1])
    for verb in VERBS:
        message = refused(*arguments(verb, folder))
        assert "config.json has num_heads [1, 1, " in message
        assert message.endswith("1, 1, -1], expected a whole number of at least 1")
        assert len(message) < 2100


def test_shapes_that_differ_from_the_configuration_are_named(folder: Path, refused) -> None:
    edit(folder, hidden_size=128)
    assert "embed_tokens.weight has shape (128, 64), its config.json expects (128, 128)" in refused(
        *arguments("report", folder)
    )


def test_a_model_that_does_not_fit_into_memory_is_refused(folder: Path, refused) -> None:
    edit(folder, vocab_size=10**14)
    assert "GB in 16 bits, but this machine has" in refused(*arguments("report", folder))


def test_a_model_with_too_many_modules_is_refused(folder: Path, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture, "_BUILD_CALLS", 10)
    for verb in VERBS:
        assert "too large to be built: it takes more than 10 calls of torch" in refused(*arguments(verb, folder))


def test_a_forward_that_raises_is_reported(tmp_path: Path, refused) -> None:
    text = SMALL | {"head_dim": 32}
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64}
    Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path / "model")
    message = refused(*arguments("report", tmp_path / "model"))
    assert "Qwen2VLModel cannot be run on token ids alone: RuntimeError: split_with_sizes" in message
    assert message.endswith("got split_sizes=[16, 24, 24]")


def test_a_target_that_cannot_be_a_file_name_is_refused(refused) -> None:
    for verb in VERBS:
        assert "File name too long" in refused(verb, "a" * 5000)


# --- safetensors ---------------------------------------------------------------------------------------------


def weights(header: object, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(64)


@pytest.mark.parametrize("name", ["x.safetensors", "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (weights({"a": TENSOR | {"data_offsets": []}}), 'tensor "a" has data_offsets [], expected a begin and an end'),
        (weights({"a": TENSOR | {"data_offsets": [0]}}), "has data_offsets [0], expected a begin and an end"),
        (weights({"a": TENSOR | {"data_offsets": [64, 0]}}), "has data_offsets [64, 0], expected"),
        (weights({"a": TENSOR | {"data_offsets": ["0", "64"]}}), "expected a list of whole numbers"),
        (weights({"a": TENSOR | {"data_offsets": [0.0, 64.0]}}), "expected a list of whole numbers"),
        (weights({"a": TENSOR | {"data_offsets": [-64, 0]}}), "expected a list of whole numbers"),
        (weights({"a": TENSOR | {"shape": [True]}}), "has shape [true], expected"),
        (weights({"a": TENSOR | {"shape": None}}), "has shape null, expected"),
        (weights({"a": TENSOR | {"shape": [17]}}), "expected 68 bytes for F32 [17]"),
        (weights({"a": TENSOR | {"shape": [2**62] * 40}}), "bytes for F32"),
        (weights({"a": TENSOR | {"dtype": "F33"}}), 'has dtype "F33", expected one of BOOL'),
        (weights({"a": TENSOR | {"dtype": ["F32"]}}), 'has dtype ["F32"], expected one of'),
        (weights({"a": 3}), "expected an object"),
        (weights({"a": TENSOR, "b": TENSOR}), "its tensors overlap at byte 0"),
        (weights({"a": TENSOR | {"shape": [8], "data_offsets": [32, 64]}}), "its tensors leave a gap at byte 32"),
        (weights({"a": TENSOR | {"shape": [8], "data_offsets": [0, 32]}}), "cut short or damaged"),
        (weights({"__metadata__": [1]}), "__metadata__"),
        (weights({"a": TENSOR}, 2**63), "cut short or damaged"),
        (weights({"a": TENSOR}, 3), "is not a JSON object"),
        (weights(b'{"a":' + b"[" * 100_000), "nested more than 32 deep"),
        (weights(b'{"a": {}, "a": {}}'), "has the key 'a' twice"),
        (weights(b"\xff\xfe"), "'utf-8' codec can't decode"),
        (weights([1]), "is not a JSON object but a list"),
    ],
)
def test_a_damaged_header_is_refused(name, content, says, folder: Path, refused) -> None:
    (folder / name).write_bytes(content)
    assert says in refused(*arguments("report", folder))


@pytest.mark.parametrize("name", ["x.safetensors", "model.safetensors"])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "is a pipe or a device"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: p.symlink_to("nowhere"), "a broken link"),
        (lambda p: p.symlink_to(p), "Too many levels"),
        (lambda p: p.symlink_to("/proc/self/mem"), "cannot be read"),
    ],
)
def test_weights_that_are_not_a_regular_file_are_refused(name, make, says, folder: Path, refused) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert says in refused(*arguments("report", folder))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"a": "pytorch_model.bin"}, '"pytorch_model.bin" for "a" in its weight_map, expected a *.safetensors file'),
        ({"a": "../saved/model.safetensors"}, "expected a *.safetensors file of the same folder"),
        ({"a": "/tmp/model.safetensors"}, "expected a *.safetensors file of the same folder"),
        ({"a": "w.safetensors", "b": "below/w.safetensors"}, "expected a *.safetensors file of the same folder"),
        ({"a": "\0.safetensors"}, "expected a *.safetensors file of the same folder"),
        ({"a": 3}, "expected a *.safetensors file of the same folder"),
        ({"a": "link.safetensors"}, "is a link out of the folder"),
        ({"a": "gone.safetensors"}, "holds no gone.safetensors"),
        ({}, "has no weight_map"),
        (["w.safetensors"], "has no weight_map"),
    ],
)
def test_an_index_that_names_other_files_is_refused(
    names, says, folder: Path, saved: Path, refused, monkeypatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", load)
    (folder / "model.safetensors").rename(folder / "w.safetensors")
    (folder / "link.safetensors").symlink_to(saved / "model.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert says in refused(*arguments("report", folder))


def test_links_into_the_hugging_face_cache_are_followed(saved: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(saved, blobs)
    (snapshot / "w.safetensors").symlink_to("../../blobs/model.safetensors")
    index = snapshot / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm.weight": "w.safetensors"}}))
    assert checkpoint.check_weights(snapshot) == [index, snapshot / "w.safetensors"]
    (snapshot / "w.safetensors").unlink()
    (snapshot / "w.safetensors").symlink_to(saved / "model.safetensors")
    with pytest.raises(CommandError, match="a link out of the folder"):
        checkpoint.check_weights(snapshot)


def test_transformers_reads_only_the_configuration_and_the_weights(folder: Path, monkeypatch, capsys) -> None:
    """Not pipes under names that it would read, and not weights that the configuration names."""
    for name in ("generation_config.json", "adapter_config.json"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    edit(folder, transformers_weights="../elsewhere.safetensors")
    monkeypatch.setattr(sys, "argv", ["rmsnorm", *map(str, arguments("report", folder))])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 0
    assert "of the norms are exact" in capsys.readouterr().out
