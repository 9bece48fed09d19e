"""report: what it finds in small checkpoints, and what it refuses."""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from report_runs import (  # noqa: F401  # fixtures
    SMALL,
    TINY,
    checkpoint_fixture,
    clock_fixture,
    deepseek,
    deepseek_lite,
    edit_config,
    falcon_mamba,
    gemma,
    gemma3,
    llama,
    printed_report,
    quick_fixture,
    qwen,
    run_report,
    saved,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekV2Model,
    Gemma4TextConfig,
    Gemma4TextModel,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextModel,
    T5Config,
    T5EncoderModel,
    T5Model,
)

import rmsnorm
from rmsnorm import compat, memory
from rmsnorm.errors import CommandError
from rmsnorm.kernels.host import loader as host
from rmsnorm.patching import replacement
from rmsnorm.tools.cost.command import model_cost
from rmsnorm.tools.cost.result import RECOMPUTED
from rmsnorm.tools.models import loading
from rmsnorm.tools.models.loading import Built
from rmsnorm.tools.models.steps import Steps


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
def test_every_norm_of_a_checkpoint_is_proven_and_measured(
    build: Callable[[], PreTrainedModel], names: int, widths: set[int], eps: float, cast: str, tmp_path: Path
) -> None:
    spec = {"eps": eps, "cast": cast, "offset": 1.0 if cast == "late" else 0.0}
    out = tmp_path / "out"
    result = run_report(saved(build, tmp_path / "checkpoint"), out)
    assert result.ok
    assert len(result.norms) == names
    for n in result.norms:
        assert n.verdict.replaced
        heads = {"q_norm": 2, "k_norm": 2}.get(n.verdict.name.rpartition(".")[2], 1)
        assert (n.calls, n.rows, n.wrong) == (1, 32 * heads, 0)
        assert n.outputs == n.rows * (n.width or 0)
        assert n.changed <= n.outputs
        assert set(n.times) == {"forward", "token", "training"}
        assert all(pair.after > 0 for pair in n.times.values())
    assert {n.width for n in result.norms} == widths
    assert {(n.dtype, n.weight_dtype) for n in result.norms} == {("bfloat16", "bfloat16")}
    assert result.copy is not None
    assert result.copy.sizes[-1][0] >= max(n["moved_bytes"]["forward_backward"] for n in result.to_json()["norms"])
    assert result.saved is not None
    assert 0 < result.saved.after < result.saved.before
    assert result.forward is not None
    assert result.training is not None
    assert len(result.forward.rounds) == len(result.training.rounds) == 7
    assert result.forward.tokens == result.training.tokens == result.saved.tokens == 32

    assert sorted(p.name for p in out.iterdir()) == ["report.html", "report.json"]
    written = json.loads((out / "report.json").read_text())
    assert written == json.loads(json.dumps(result.to_json()))
    assert [n["spec"] for n in written["norms"]] == [spec] * names
    assert written["model"]["norms"] == names
    assert written["model"]["norm_parameters"] == sum(n.width or 0 for n in result.norms)
    assert f"{names} of {names} norms are proven and replaced" in printed_report(result)
    assert f"proven: {cast}, eps {eps:g}" in printed_report(result)
    assert "of the norms are exact" in printed_report(result)


T5 = {"vocab_size": 64, "d_model": 64, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 16}


def qwen3_next() -> PreTrainedModel:
    return Qwen3NextModel(
        Qwen3NextConfig(
            **TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
            linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
            layer_types=["linear_attention", "full_attention"],
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "norms", "left", "widths"),
    [
        (lambda: T5EncoderModel(T5Config(**T5)), 5, 0, {64}),
        (lambda: T5Model(T5Config(**T5)), 12, 0, {64}),
        (lambda: Gemma4TextModel(Gemma4TextConfig(**TINY)), 18, 0, {64, 16, 256, 512}),
        (falcon_mamba, 9, 0, {64, 8, 4}),
        (qwen3_next, 8, 0, {64, 16}),
    ],
    ids=["T5's encoder", "T5", "Gemma 4", "Falcon Mamba", "Qwen3-Next"],
)
def test_checkpoints_of_other_architectures(build, norms: int, left: int, widths: set[int], tmp_path: Path) -> None:
    model = saved(build, tmp_path / "checkpoint")
    result = run_report(model, tmp_path / "out", tokens=16)
    assert result.ok
    assert (len(result.norms), sum(n.verdict.spec is None for n in result.norms)) == (norms, left)
    proven = [n for n in result.norms if n.verdict.replaced]
    assert {n.width for n in proven} <= widths
    assert all(n.calls == 1 and n.rows >= 16 and n.outputs == n.rows * (n.width or 0) for n in proven)
    assert result.model["class"] == type(build()).__name__
    assert result.training is not None
    printed_report(result)


def test_the_saved_bytes_are_those_of_the_arithmetic(checkpoint: Path, tmp_path: Path) -> None:
    """The class kept 4 + 2 bytes an element, in fp32 and bf16, and 4 bytes a row; ours keep the input and 4 bytes a row.

    The input of kv_a_layernorm is 16 of 24 columns, of which the whole storage is kept.
    """
    result = run_report(checkpoint, tmp_path / "out")
    assert result.saved is not None
    rows, columns, views = 32, sum(n.width or 0 for n in result.norms), 2
    assert result.saved.before - result.saved.after == rows * columns * (6 - 2) - views * rows * (24 - 16) * 2


def test_the_report_counts_the_bytes_that_recompute_saves(checkpoint: Path, tmp_path: Path) -> None:
    """2 bytes for each element of an output that an operator of the model saves: all but the last norm's."""
    result = run_report(checkpoint, tmp_path / "out")
    assert result.saved is not None
    assert result.saved.recomputed is not None
    *inner, last = result.norms
    assert result.saved.after - result.saved.recomputed == 32 * sum(n.width or 0 for n in inner) * 2
    assert "saved for backward, patched with recompute=True" in printed_report(result)
    counted = model_cost(str(checkpoint), lambda *_: None, batch=1, seq=32, dtype="bfloat16", gpu=None)
    predicted = counted.training["ours"].kept - counted.training[RECOMPUTED].kept
    written = json.loads((tmp_path / "out" / "report.json").read_text())["saved_for_backward"]
    assert written["recompute_less_bytes"] == predicted
    assert written["before_bytes"] - written["recomputed_bytes"] == written["less_bytes"] + predicted


def test_the_report_measures_the_peak_of_a_training_step_with_and_without_recompute(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Compares with a measurement of a fresh copy of the model that is patched with recompute=True."""
    result = run_report(checkpoint, tmp_path / "out")
    assert result.saved is not None
    assert result.peak is not None
    peaks = result.peak.recomputed, result.peak.after, result.peak.before
    assert result.saved.recomputed < peaks[0] < peaks[1] < peaks[2]  # type: ignore[operator]
    model = DeepseekV2Model.from_pretrained(checkpoint, dtype=torch.bfloat16)
    steps = Steps(model, torch.device("cpu"))
    for expected, options in ((peaks[2], None), (peaks[1], {}), (peaks[0], {"recompute": True})):
        if options is not None:
            rmsnorm.patch(model, **options)
        steps.train(32)
        measured = memory.allocated(lambda: steps.train(32), torch.device("cpu"))
        assert measured.peak == expected, options
        rmsnorm.unpatch(model)
    written = json.loads((tmp_path / "out" / "report.json").read_text())["peak_of_training_step"]
    assert (written["recomputed_bytes"], written["after_bytes"], written["before_bytes"]) == peaks
    text = printed_report(result)
    assert "peak of a training step, 32 tokens" in text
    assert "peak of a training step, patched with recompute=True" in text


def test_where_the_peak_cannot_be_measured_it_is_left_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "cpu_allocations", lambda profile: None)
    result = run_report(checkpoint, tmp_path / "out")
    assert result.saved is not None
    assert result.peak is None
    assert result.to_json()["peak_of_training_step"] is None
    assert "peak of a training step" not in printed_report(result)


def test_wrong_bits_fail_and_have_no_time(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = replacement.rms_norm

    def wrong(x: Tensor, *args: Any, **named: Any) -> Tensor:
        y = right(x, *args, **named)
        if x.shape[-1] == 24:
            first = torch.zeros_like(y)
            first[..., :1, :1] = 1
            y = y + first
        return y

    monkeypatch.setattr(replacement, "rms_norm", wrong)
    monkeypatch.setattr(host, "norm", lambda *_: None)  # so that no call takes the C++ path
    result = run_report(checkpoint, tmp_path / "out")
    assert not result.ok
    failed = [n for n in result.norms if n.wrong]
    assert [(n.width, n.wrong, n.times) for n in failed] == [(24, 1, {})] * 2
    assert result.total("forward") is None
    assert result.forward is result.training is None
    assert "2 of 12.8 thousand outputs of the norms are wrong: they differ from exact." in printed_report(result)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["ok"] is False


def test_the_preset_has_the_real_widths() -> None:
    """On the meta device in full size; on a CPU three sizes differ, and it takes 700 MB."""
    model, expected, notes = loading.PRESETS["deepseek-ocr"](torch.device("meta"))
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert (len(norms), sum(m.weight.numel() for m in norms)) == (25, 32_000) == expected
    assert {m.weight.shape for m in norms} == {(1280,)}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.n_routed_experts == 64
    assert 2.5e9 < sum(p.numel() for p in model.parameters()) < 3e9  # "3B" with the head and the vision encoder
    assert len(notes) == 1
    assert torch.get_default_dtype() == torch.float32


def test_an_old_transformers_is_told_the_first_release_that_has_the_preset(tmp_path: Path, monkeypatch: Any) -> None:
    names = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    monkeypatch.delitem(names, "deepseek_ocr2_text")
    monkeypatch.setattr("transformers.__version__", "4.46.3")
    with pytest.raises(
        CommandError, match=r"4\.46\.3 does not have, but 5\.10 and later do: pip install 'transformers>="
    ):
        run_report("deepseek-ocr", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_preset_that_transformers_cannot_build_is_reported_in_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(loading, "random_model", fails)
    with pytest.raises(CommandError, match=r"^transformers cannot build deepseek-ocr: RuntimeError: out of memory$"):
        run_report("deepseek-ocr", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_preset_with_unexpected_norms_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loading.PRESETS, "small", lambda device: Built(deepseek(), (25, 32_000), ()))
    result = run_report("small", tmp_path)
    assert not any(n.wrong for n in result.norms)
    assert not result.ok
    assert "not the expected model" in printed_report(result)


def test_norms_that_are_left_or_not_reached_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StrangeRMSNorm(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    def build(device: torch.device) -> Any:
        model = deepseek()
        model.strange = StrangeRMSNorm()
        model.spare = type(model.norm)(64)
        return Built(model, None, ("a note",))

    monkeypatch.setitem(loading.PRESETS, "small", build)
    result = run_report("small", tmp_path)
    assert result.ok
    by_name = {n.verdict.name: n for n in result.norms}
    assert by_name["strange"].verdict.spec is None
    assert by_name["spare"].calls == 0
    text = printed_report(result)
    assert "(strange): not replaced: " in text
    assert "No activation reached spare." in text
    assert "Note: a note" in text
    assert "strange" in printed_report(replace(result, every_layer=True))


def torch_norms() -> PreTrainedModel:
    """A model with LayerNorm instead of RMSNorm."""
    model = deepseek()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, torch.nn.LayerNorm(module.weight.shape[0]))
    return model


def test_a_model_without_rms_norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loading.PRESETS, "small", lambda device: Built(torch_norms(), None, ()))
    result = run_report("small", tmp_path)
    assert result.ok
    assert result.forward is result.training is result.saved is None
    assert result.notes == ()
    assert "No norm was found" in printed_report(result)
    assert "exact" not in printed_report(result)


def test_a_busy_machine_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loading.PRESETS, "small", lambda device: Built(torch_norms(), None, ()))
    monkeypatch.setattr(os, "getloadavg", lambda: (1e6, 0.0, 0.0))
    (note,) = run_report("small", tmp_path).notes
    assert note.startswith("the machine was busy: 1000000.0 processes wanted its ")


def test_missing_weights_are_noted(checkpoint: Path, tmp_path: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert any("norm.weight" in note for note in run_report(checkpoint, tmp_path / "out").notes)


def test_the_sequence_is_no_longer_than_the_model_s_positions(checkpoint: Path, tmp_path: Path) -> None:
    assert run_report(checkpoint, tmp_path / "out", tokens=1000).norms[0].rows == SMALL["max_position_embeddings"]


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


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (no_config, "holds no config.json"),
        (broken_config, "not a JSON object"),
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
def test_a_folder_that_is_not_a_checkpoint_is_refused(
    damage: Callable[[Path], None], says: str, checkpoint: Path, tmp_path: Path
) -> None:
    damage(checkpoint)
    with pytest.raises(CommandError, match=says) as raised:
        run_report(checkpoint, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_code_in_the_folder_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w')\n"
    for name in ("configuration_mine.py", "modeling_mine.py"):
        (checkpoint / name).write_text(code)
    auto = {"AutoConfig": "configuration_mine.MineConfig", "AutoModel": "modeling_mine.MineModel"}
    edit_config(checkpoint, auto_map=auto)
    assert run_report(checkpoint, tmp_path / "out").ok  # transformers knows the model type itself
    assert not marker.exists()
    edit_config(checkpoint, auto_map=auto, model_type="mine")
    with pytest.raises(CommandError, match="does not know the architecture 'mine'") as raised:
        run_report(checkpoint, tmp_path / "other")
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
        ("deepseek-ocr", {"device": "nonsense"}, "give cpu"),
    ],
)
def test_bad_options_raise_before_anything_is_written(
    target: str, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(CommandError, match=says):
        run_report(target, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "taken" / "report.json").mkdir(parents=True)
    for out in (tmp_path / "link", tmp_path / "taken", Path("/proc/nothing"), Path("/dev/null")):
        with pytest.raises(CommandError, match="--out"):
            run_report("deepseek-ocr", out)


def test_an_out_that_is_a_file_is_refused_and_not_changed(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CommandError, match="--out"):
        run_report("deepseek-ocr", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_without_transformers_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CommandError, match=r"needs transformers: pip install 'rmsnorm\[hf\]'$"):
        run_report("deepseek-ocr", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_take_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(device: torch.device) -> Any:
        model = deepseek()
        model.forward = lambda pixels: pixels
        return Built(model, None, ())

    monkeypatch.setitem(loading.PRESETS, "pictures", refuses)
    with pytest.raises(CommandError, match="token ids alone"):
        run_report("pictures", tmp_path / "out")
    assert not (tmp_path / "out").exists()
