"""benchmarks/models.py: whole models with different norms. Its models are as small as can be here."""

import contextlib
import dataclasses
import json
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="there is no transformers")

from rmsnorm.errors import CommandError
from rmsnorm.tools import display
from scripts import benchmark_script


@pytest.fixture(scope="module")
def models() -> Any:
    return benchmark_script("models")


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None], fresh_dynamo: None) -> None:
    threads(1)  # with several, small models spend most of their time on waking threads


def run(models: Any, out: Path, *arguments: str) -> Any:
    """Run the script; torch.compile traces, but translates nothing, which would take long."""
    models.main(
        ["--tiny", "--device", "cpu", "--backend", "eager", "--repetitions", "7", "--out", str(out), *arguments]
    )
    return json.loads((out / "models-cpu.json").read_text())


@pytest.mark.compiled
def test_every_variant_of_a_step_is_checked_and_timed(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.measuring, "MOST_ROUNDS", 7)
    result = run(models, tmp_path, "--models", "llama", "--modes", "training")
    (case,) = result["cases"]
    assert (case["model"], case["mode"], case["layers"]) == ("llama", "training", 1)
    compiled = [v.name for v in models.definitions.VARIANTS if v.name not in result["missing"]]
    eager = [name for name in compiled if name != models.definitions.NOT_FUSED]
    assert [(v["variant"], v["compiled"]) for v in case["variants"]] == [
        *((name, False) for name in eager), *((name, True) for name in compiled)
    ]  # fmt: skip
    for found in case["variants"]:
        assert found["low_us"] <= found["median_us"] <= found["high_us"]
        assert len(found["samples_us"]) == 7
        assert found["first_call_s"] > 0
        assert 0 < found["kept_bytes"] < found["peak_bytes"]
        ratio = found["over_as_is"]
        assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
        if found["variant"] == models.definitions.NO_NORMS:
            assert found["errors"]["outputs"] > 0.1
        else:
            assert set(found["errors"]) == {"outputs", "gradients"}
            assert max(found["errors"].values()) < 0.1
        if found["variant"] == models.definitions.AS_IS:
            assert (ratio["ratio"], ratio["low"], ratio["high"]) == (1, 1, 1)
    of_both = ["kept memory", "time with recompute", "norm outputs freed"]
    assert [(b["of"], b["compiled"]) for b in result["bounds"]] == [
        *((of, False) for of in ("time", *of_both)),
        *((of, True) for of in ("time", "compilation", *of_both)),
        ("gradients that recompute changes", False),
        ("gradients that recompute changes", True),
    ]
    # The outputs of both norms of the layer, 2 × 8 tokens of 32 columns in bf16; no operator saves that of the last.
    assert case["saved_output_bytes"] == 2 * 2 * 8 * 32 * 2
    kept = {(v["variant"], v["compiled"]): v["kept_bytes"] for v in case["variants"]}
    assert kept["patched", False] - kept["recomputed", False] == case["saved_output_bytes"]
    # The backend "eager" does not run the passes of the compiler, which recompute in a compiled model.
    assert [b["measured"] for b in result["bounds"] if b["of"] == "norm outputs freed"] == [1, 0]
    for one in result["gradients"]:
        assert (one["model"], one["layers"], one["differing"], one["repeated"]) == ("llama", 1, 0, 0)
        assert one["elements"] == case["parameters"]
    assert [one["compiled"] for one in result["gradients"]] == [False, True]
    assert result["batches"] == []
    printed = " ".join(capsys.readouterr().out.split())
    assert "training step, 2 × 8 tokens" in printed
    assert "Liger was not measured: liger_kernel is not installed" in printed or "Liger" in eager
    assert "the largest batch was not measured: the memory of a CPU cannot be limited" in printed
    assert "llama, gradients, compiled: recompute changes 0 of " in printed
    assert "Recompute, relative to patched" in printed
    assert "aims are met" in printed
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "deepseek-v3", "deepseek-ocr"])
def test_every_model_is_patched_as_a_whole_and_compiled_in_one_graph(
    models: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.measuring, "MOST_ROUNDS", 7)
    compiled = models.measuring.Steps

    def in_one_graph(model: Any, device: Any, options: Any) -> Any:
        return compiled(model, device, None if options is None else options | {"fullgraph": True})

    monkeypatch.setattr(models.measuring, "Steps", in_one_graph)
    result = run(models, tmp_path, "--models", name, "--modes", "token", "--variants", "patched")
    (case,) = result["cases"]
    assert [(v["variant"], v.get("no_time")) for v in case["variants"]] == [("as is", None), ("patched", None)] * 2


def test_a_model_with_gated_norms_is_measured_in_eager_mode(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.measuring, "MOST_ROUNDS", 7)
    result = run(models, tmp_path, "--models", "qwen3-next", "--modes", "training", "--sections", "times,gradients")
    (case,) = result["cases"]
    assert {v["variant"] for v in case["variants"]} >= {"as is", "patched", "recomputed", "F.rms_norm", "no norms"}
    assert not any(v["compiled"] or "no_time" in v for v in case["variants"])
    assert [(one["compiled"], one["differing"]) for one in result["gradients"]] == [(False, 0)]


def test_the_memory_of_the_gpu_in_use_is_limited_and_released(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, int]] = []
    cuda = {
        "empty_cache": lambda: None,
        "current_device": lambda: 1,
        "get_per_process_memory_fraction": lambda index: 0.75 if type(index) is int else 1 / 0,
        "get_device_properties": lambda index: types.SimpleNamespace(total_memory=1000 * index),
        "set_per_process_memory_fraction": lambda fraction, index: seen.append((fraction, index)),
    }
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    for device in ("cuda", "cuda:1"):
        with models.measuring.batches._limited(torch.device(device), 200):
            assert seen.pop() == (0.2, 1)
        assert seen.pop() == (0.75, 1)


def test_a_variant_replaces_every_norm_of_a_copy(models: Any) -> None:
    transformers = pytest.importorskip("transformers")
    (model,) = (m for m in models.definitions.MODELS if m.name == "gemma2")
    config = model.config(transformers, tiny=True, layers=2)
    built = models.measuring.loading.random_model(config, transformers, torch.device("cpu"))
    norms = [name for name, module in built.named_modules() if "RMSNorm" in type(module).__name__]
    assert len(norms) == 2 * 4 + 1
    for variant in models.definitions.VARIANTS:
        if variant.missing():
            continue
        copied = variant.applied(built)
        kinds = {type(copied.get_submodule(name)).__name__ for name in norms}
        own = {type(built.get_submodule(name)).__name__ for name in norms}
        if variant.arguments is None and variant.name != models.definitions.AS_IS:
            assert kinds == {"ReplacedNorm"}
            assert copied.norm.norm is variant.norm
            assert copied.norm.weight is built.norm.weight
            assert copied.norm.spec.offset == 1
        else:
            assert all(isinstance(copied.get_submodule(name), type(built.get_submodule(name))) for name in norms)
            patched = [
                name for name in norms if type(copied.get_submodule(name)) is not type(built.get_submodule(name))
            ]
            assert patched == ([] if variant.name == models.definitions.AS_IS else norms)
        assert {type(built.get_submodule(name)).__name__ for name in norms} == own


@pytest.mark.compiled
def test_a_wrong_variant_and_one_that_raises_get_no_time(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(x: Any, w: Any, spec: Any) -> Any:
        raise ValueError("this kernel needs a GPU")

    wrong = models.definitions.Variant("wrong", norm=lambda x, w, spec: x * w)
    broken = models.definitions.Variant("broken", norm=refuses)
    monkeypatch.setattr(models.definitions, "VARIANTS", (models.definitions.VARIANTS[0], wrong, broken))
    monkeypatch.setattr(models.measuring, "MOST_ROUNDS", 7)
    result = run(models, tmp_path, "--models", "llama", "--modes", "forward")
    found = {(v["variant"], v["compiled"]): v for v in result["cases"][0]["variants"]}
    for compiled in (False, True):
        assert "no_time" not in found["as is", compiled]
        assert "its outputs differ by" in found["wrong", compiled]["no_time"]
        assert found["wrong", compiled]["over_as_is"] is None
        assert found["broken", compiled]["no_time"]
    assert "this kernel needs a GPU" in found["broken", False]["no_time"]
    assert "broken, eager: not timed: " in capsys.readouterr().out
    assert result["bounds"] == []


def test_cases_that_do_not_fit_into_the_time_are_left_out_and_reported(
    models: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    models.main(["--tiny", "--device", "cpu", "--backend", "eager", "--models", "llama", "--seconds", "0"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "no time was left for: llama, training step, 2 × 8 tokens; llama, forward, 2 × 8 tokens" in printed


def test_the_time_of_a_case_is_predicted_from_others_of_its_mode(models: Any) -> None:
    assert models.measuring._expected_seconds({}, "training") == 0
    assert models.measuring._expected_seconds({"training": 90.0, "forward": 30.0}, "training") == 90
    assert models.measuring._expected_seconds({"training": 90.0, "forward": 30.0}, "token") == 30


def test_every_variant_is_compiled_with_empty_caches(models: Any, tmp_path: Path) -> None:
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    folders = set()
    for _ in range(2):
        with models.measuring._empty_caches(tmp_path):
            for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
                folder = Path(os.environ[name])
                assert tmp_path in folder.parents
                assert not folder.exists()
                folders.add(folder)
    assert len(folders) == 4
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before


# --- stored results ------------------------------------------------------------------------------------------


def a_variant(name: str, compiled: bool, ratio: tuple[float, float, float], first: float, kept: int) -> dict[str, Any]:
    return {
        "variant": name, "compiled": compiled, "median_us": 1e3, "low_us": 9e2, "high_us": 2e3, "first_call_s": first,
        "kept_bytes": kept, "peak_bytes": 5, "over_as_is": dict(zip(("ratio", "low", "high"), ratio, strict=True)),
    }  # fmt: skip


def a_case(mode: str = "training", ratio: tuple[float, float, float] = (0.9, 0.8, 0.95), **other: Any) -> Any:
    rows = [
        a_variant(name, True, of, first, kept)
        for name, of, first, kept in (
            ("as is", (1, 1, 1), 10.0, 100),
            ("patched", ratio, *other.pop("rest", (10.5, 90))),
        )
    ]
    if "recomputed" in other:
        kept, over_patched = other.pop("recomputed")
        again = a_variant("recomputed", True, ratio, 1.0, kept * MB)
        again["over_patched"] = dict(zip(("ratio", "low", "high"), over_patched, strict=True))
        rows[1] |= {"kept_bytes": 90 * MB, "peak_bytes": 200 * MB}
        rows.append(again | {"peak_bytes": 196 * MB})
        other["saved_output_bytes"] = 10 * MB
    return {
        "model": "llama", "what": "a model", "mode": mode, "title": "a step", "at_most": 1.0, "layers": 2,
        "variants": rows,
    } | other  # fmt: skip


MB = 1_000_000


def of_recompute() -> dict[str, Any]:
    one = {"model": "llama", "layers": 1, "elements": 1000}
    batches = [{"variant": name, "batch": n} for name, n in (("as is", 40), ("patched", 44), ("recomputed", 48))]
    return {
        "gradients": [
            one | {"compiled": False, "differing": 0, "repeated": 0},
            one | {"compiled": True, "differing": 3, "repeated": 2},
            one | {"model": "qwen3", "compiled": False, "reason": "no deterministic form"},
        ],
        "batches": [
            {"model": "llama", "layers": 2, "tokens": 1024, "limit_bytes": 24 * 10**9, "variants": batches},
        ],
    }  # fmt: skip


def a_result(*cases: Any, **changes: Any) -> dict[str, Any]:
    facts = {
        "device": "cuda", "gpu": {"name": "H200", "driver": "1"}, "cpu": "x", "versions": {"torch": "2.13"},
        "commit": "c" * 40,
    }  # fmt: skip
    return {
        "verb": "models", "machine": facts, "tiny": False, "compiled_with": {"backend": "inductor"}, "missing": {},
        "left_out": ["llama, forward"], "cases": list(cases), "bounds": [], "seconds": 10.0,
    } | changes  # fmt: skip


def test_an_aim_is_met_missed_or_missed_inside_the_spread(models: Any) -> None:
    for ratio, expected in (
        ((0.9, 0.8, 0.95), (True, False)),
        ((1.0, 0.9, 1.1), (True, False)),
        ((1.02, 0.99, 1.05), (False, True)),
        ((1.02, 1.01, 1.05), (False, False)),
    ):
        bound = models.result.bounds([a_case(ratio=ratio)])[0]
        assert (bound["of"], bound["met"], bound["inside_spread"]) == ("time", *expected)
    of = {b["of"]: b["met"] for b in models.result.bounds([a_case(rest=(11.5, 101))])}
    assert of == {"time": True, "compilation": False, "kept memory": False}
    assert models.result.bounds([a_case()])[1]["measured"] == pytest.approx(1.05)


def test_a_difference_inside_the_spread_is_reported_as_such(models: Any) -> None:
    assert models.result.ratio_in_words(a_case(ratio=(1.01, 0.99, 1.02))["variants"][1]) == (
        "1.010 (0.990 to 1.020; within the spread)"
    )
    assert models.result.ratio_in_words(a_case(ratio=(1.03, 1.01, 1.05))["variants"][1]) == "1.030 (1.010 to 1.050)"


def test_runs_are_merged_and_the_later_one_of_a_case_counts(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(a_result(a_case(), a_case("forward"))))
    (tmp_path / "b.json").write_text(json.dumps(a_result(a_case(ratio=(1.2, 1.1, 1.3)), a_case("token"))))
    out = tmp_path / "out"
    models.main(["--merge", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out", str(out)])
    merged = json.loads((out / "models-cuda.json").read_text())
    assert [case["mode"] for case in merged["cases"]] == ["training", "forward", "token"]
    assert merged["cases"][0]["variants"][1]["over_as_is"]["ratio"] == 1.2
    assert [b["met"] for b in merged["bounds"] if b["of"] == "time"] == [False, True, True]
    assert (merged["seconds"], merged["left_out"]) == (20, [])
    assert "8 of 9 aims" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("commit", {"commit": "another"}),
        ("gpu", {"gpu": "another"}),
        ("the version of torch", {"versions": {"torch": "another"}}),
    ],
)
def test_runs_of_different_code_or_machines_are_not_merged(
    models: Any, what: str, change: dict[str, Any], tmp_path: Path
) -> None:
    other = a_result(a_case())
    other["machine"] = other["machine"] | change
    for name, result in (("a", a_result(a_case())), ("b", other)):
        (tmp_path / name).write_text(json.dumps(result))
    with pytest.raises(CommandError, match=f"--merge: the runs differ in {what} "):
        models.main(["--merge", str(tmp_path / "a"), str(tmp_path / "b")])


def test_runs_are_merged_even_if_only_some_had_a_package(models: Any) -> None:
    one, other = a_result(a_case()), a_result(a_case("token"))
    other["machine"] = other["machine"] | {"versions": other["machine"]["versions"] | {"liger-kernel": "0.8.5"}}
    merged = models.result.merge([one, other])
    assert merged["machine"]["versions"] == other["machine"]["versions"]
    assert len(merged["cases"]) == 2


@pytest.mark.parametrize("content", [None, "{", '{"verb": "bench"}', "[]"])
def test_a_file_that_is_not_a_result_raises(models: Any, content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(CommandError, match=r"--merge .*a\.json: "):
        models.main(["--merge", str(file)])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("--models", "lama"),
            "'lama' is not a model: give one of llama, qwen3, gemma2, deepseek-v3, deepseek-ocr, qwen3-next",
        ),
        (("--modes", "backward"), "'backward' is not a mode: give one of training, forward, token"),
        (
            ("--variants", "patched,ligre"),
            "'ligre' is not a variant: give one of as is, patched, not fused, recomputed, Liger",
        ),
        (("--repetitions", "0"), "--repetitions 0: give at least 1"),
        (("--layers", "0"), "--layers 0: give at least 1"),
        (("--limit", "0"), "--limit 0: give more than 0"),
        (("--sections", "times,bits"), "'bits' is not a section: give one of times, largest batch, gradients"),
    ],
)
def test_errors_of_invalid_arguments_say_what_is_expected(
    models: Any, arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        models.main(list(arguments))
    assert told in " ".join(capsys.readouterr().err.split())


def test_every_mode_has_its_batch_length_and_aim(models: Any) -> None:
    assert [(mode.name, mode.batch, mode.tokens, mode.at_most) for mode in models.definitions.MODES] == [
        ("training", 4, 4096, 1.0), ("forward", 4, 4096, 1.0), ("token", 16, 1, 1.05),
    ]  # fmt: skip
    assert dataclasses.replace(models.definitions.MODES[0], batch=1).title == "training step, 1 × 4096 tokens"


# --- recompute -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [1, 7, 50, 64])
@pytest.mark.parametrize("most", [0, 1, 2, 3, 49, 50, 51, 64, 100])
def test_the_largest_batch_is_found_in_few_steps(models: Any, start: int, most: int) -> None:
    tried: list[int] = []

    def fits(n: int) -> bool:
        tried.append(n)
        return n <= most

    assert models.measuring.batches.largest(fits, start, 64) == min(most, 64)
    assert len(tried) == len(set(tried)) <= 13


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_largest_batches_are_those_before_the_memory_is_exhausted(
    models: Any, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is not here: the step of a model raises for more sequences than its variant has room for."""
    transformers = pytest.importorskip("transformers")
    batches, room = models.measuring.batches, {"as is": 5, "patched": 6, "recomputed": 9}
    limits: list[int] = []

    @contextlib.contextmanager
    def limited(device: Any, limit: int) -> Any:
        limits.append(limit)
        yield
        limits.append(0)

    class Steps:
        def __init__(self, model: Any, device: Any) -> None:
            self.model = model
            self.most = next(n for name, n in room.items() if patched_models.get(name) is model)

        def train(self, tokens: int, batch: int) -> None:
            assert tokens == 1024
            self.model.norm.weight.grad = torch.ones_like(self.model.norm.weight)
            if batch > self.most:
                error = torch.OutOfMemoryError("CUDA out of memory")
                if wrapped:
                    raise CommandError("it cannot be run") from error
                raise error

    patched_models: dict[str, Any] = {}
    applied = models.definitions.Variant.applied

    def remember(self: Any, model: Any) -> Any:
        patched_models[self.name] = copied = applied(self, model)
        return copied

    monkeypatch.setattr(models.definitions.Variant, "applied", remember)
    monkeypatch.setattr(batches, "_limited", limited)
    monkeypatch.setattr(batches, "Steps", Steps)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    (model,) = (m for m in models.definitions.MODELS if m.name == "llama")
    built = models.measuring.loading.random_model(
        model.config(transformers, tiny=True, layers=None), transformers, torch.device("cpu")
    )
    options = types.SimpleNamespace(
        device=torch.device("cpu"), variants=models.definitions.VARIANTS, limit=10**9, say=lambda _: None
    )
    found = batches.measure(model, built, options)
    assert {v["variant"]: v["batch"] for v in found["variants"]} == room
    assert (found["model"], found["tokens"], found["limit_bytes"], found["layers"]) == ("llama", 1024, 10**9, 1)
    assert limits == [10**9, 0]
    assert built.norm.weight.grad is None  # everything is freed

    def broken(self: Any, tokens: int, batch: int) -> None:
        raise ValueError("something else")

    monkeypatch.setattr(Steps, "train", broken)
    with pytest.raises(ValueError, match="something else"):
        batches.measure(model, built, options)


def test_changed_gradients_are_counted(models: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (model,) = (m for m in models.definitions.MODELS if m.name == "llama")
    built = models.measuring.loading.random_model(
        model.config(transformers, tiny=True, layers=None), transformers, torch.device("cpu")
    )
    gradients = models.measuring.gradients
    options = types.SimpleNamespace(
        device=torch.device("cpu"), variants=models.definitions.VARIANTS, tiny=True, say=lambda _: None,
        compiled={"backend": "no such backend"},
    )  # fmt: skip
    before, calls = gradients._gradients, []

    def changed(*arguments: Any) -> Any:
        found = before(*arguments)
        calls.append(found)
        if len(calls) == 3:  # the recomputed one
            found["norm.weight"][:5] += 1
        return found

    monkeypatch.setattr(gradients, "_gradients", changed)
    eager, compiled = gradients.measure(model, built, options)
    assert (eager["differing"], eager["repeated"]) == (5, 0)
    assert "differing" not in compiled
    assert "no such backend" in compiled["reason"]
    (bound,) = models.result.bounds([], [eager, compiled])
    assert (bound["of"], bound["measured"], bound["met"]) == ("gradients that recompute changes", 5, False)


def test_the_aims_of_recompute_are_relative_to_patched(models: Any) -> None:
    aims = {b["of"]: b for b in models.result.bounds([a_case(recomputed=(80.4, (1.005, 0.99, 1.02)))])}
    freed, time = aims["norm outputs freed"], aims["time with recompute"]
    assert (freed["measured"], freed["met"], freed["at_least"]) == (pytest.approx(0.96), True, 0.95)
    assert (time["measured"], time["met"], time["at_most"]) == (1.005, True, 1.01)
    missed = {b["of"]: b["met"] for b in models.result.bounds([a_case(recomputed=(81, (1.02, 1.015, 1.03)))])}
    assert (missed["norm outputs freed"], missed["time with recompute"]) == (False, False)


def test_merged_runs_have_the_sections_of_all_runs(models: Any) -> None:
    sections = of_recompute()
    old, new = a_result(a_case()), a_result(a_case("token"), **sections)
    merged = models.result.merge([old, new])
    assert (merged["gradients"], merged["batches"]) == (sections["gradients"], sections["batches"])
    assert "gradients that recompute changes" in {b["of"] for b in merged["bounds"]}
    printed = display.render(models.result.blocks(merged), 200)
    assert "llama, 2 layers, sequences of 1024 tokens, 24 GB" in printed
    assert "missed: llama, training, compiled: gradients that recompute changes 3, aim: at most 0" in printed
    assert models.result.merge([old, old])["batches"] == []


# --- the table -----------------------------------------------------------------------------------------------


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """benchmarks/tables.py, reading another folder."""
    module = benchmark_script("tables")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_without_a_result_there_is_no_table(tables: Any) -> None:
    assert tables.whole_models() == ""


def test_the_table_has_every_case_and_says_which_aims_are_met(models: Any, tables: Any, tmp_path: Path) -> None:
    slower = a_case("token", ratio=(1.02, 0.99, 1.05), rest=(12.0, 100), title="a small step")
    result = a_result(a_case(), slower)
    result["bounds"] = models.result.bounds(result["cases"])
    result["machine"] |= {"date": "2026-01-02T03:04:05", "versions": {"torch": "2.13", "triton": "3.6"}}
    (tmp_path / "models-cuda.json").write_text(json.dumps(result))
    text = tables.whole_models()
    assert text.startswith("Machine: H200; torch 2.13, Triton 3.6; 2026-01-02, commit ccccccc.")
    assert "- llama: a model, 2 layers" in text
    assert "| llama, a step, compiled | 1.00 | 1.00 | 0.900 (0.800 to 0.950) | 1.05 | 0.90 |" in text
    assert "| llama, a small step, compiled | 1.00 | 1.00 | 1.020 (0.990 to 1.050) | 1.20 | 1.00 |" in text
    assert "4 of 6 aims are met. The others:" in text
    assert "| llama, token, compiled: time | 1.020 | at most 1.00 | yes |" in text
    assert "| llama, token, compiled: compilation | 1.200 | at most 1.10 | no |" in text
    assert "recomputed relative to patched" not in text  # this result is without recompute
    assert "largest batch" not in text


def test_the_tables_have_what_recompute_saves_and_costs(models: Any, tables: Any, tmp_path: Path) -> None:
    result = a_result(a_case(recomputed=(85, (1.02, 1.005, 1.03))), **of_recompute())
    result["bounds"] = models.result.bounds(result["cases"], result["gradients"])
    result["machine"] |= {"date": "2026-01-02T03:04:05", "versions": {"torch": "2.13", "triton": "3.6"}}
    (tmp_path / "models-cuda.json").write_text(json.dumps(result))
    text = tables.whole_models()
    assert "| llama, compiled | 10 | 5 | 4 | 0.500 | 1.020 (1.005 to 1.030) |" in text
    assert "| largest batch of a training step, eager | as is | patched | recomputed |" in text
    assert "| llama, 2 layers, sequences of 1024 tokens, 24 GB | 40 | 44 | 48 |" in text
    assert "- llama, eager: recompute changes 0 of 1,000 elements." in text
    assert "- llama, compiled: recompute changes 3 of 1,000 elements; 2 differ between two steps without it." in text
    assert "- qwen3, eager: not compared: no deterministic form." in text
    assert "| llama, training, compiled: norm outputs freed | 0.500 | at least 0.95 | no |" in text
    assert "| llama, training, compiled: time with recompute | 1.020 | at most 1.01 | yes |" in text
    assert "| llama, training, compiled: gradients that recompute changes | 3 | at most 0 | no |" in text
