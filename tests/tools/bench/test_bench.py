"""bench: what is measured, what is reported if our bits are wrong, and the figures that are derived."""

import dataclasses
import importlib.metadata
import json
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import printed
import rmsnorm
from rmsnorm.errors import CommandError
from rmsnorm.spec import Spec
from rmsnorm.tools import cli, machine, timing
from rmsnorm.tools.bench import cases, command, line, measure, overheads, peers, plot, printing
from rmsnorm.tools.bench.cases import (
    ADD_BACKWARD,
    ADD_FORWARD,
    BACKWARD,
    FORWARD,
    GATED_MODES,
    MODES,
    STRIDED_FORWARD,
    TRAINING,
    BenchCase,
    Mode,
    moved_bytes,
)
from rmsnorm.tools.bench.line import FittedLine
from rmsnorm.tools.bench.peers import Provider
from rmsnorm.tools.bench.result import BenchResult, BenchRow, Measurement
from rmsnorm.tools.display import render
from rmsnorm.tools.timing import Timing

M, N = 48, 320
QUIET = {"error": "not asked for"}
EAGER = tuple(p for p in peers.PROVIDERS if not p.compiled and not p.package)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure one shape, without torch.compile and without new processes."""
    monkeypatch.setattr(cases, "_CPU_SHAPES_QUICK", ((M, N),))
    monkeypatch.setattr(measure, "_QUICK_SECONDS", 0.01)
    monkeypatch.setattr(peers, "PROVIDERS", EAGER)
    monkeypatch.setattr(overheads, "first_call", lambda device: QUIET)


def replaced(name: str, norm: Callable[[Tensor, Tensor], Tensor]) -> tuple[Provider, ...]:
    return tuple(dataclasses.replace(p, norm=norm) if p.name == name else p for p in EAGER)


def shown(result: BenchResult, verbose: bool = True) -> str:
    return render(printing.blocks(result, verbose), 200)


def silent(done: int, total: int, what: str) -> None:
    assert 0 <= done < total
    assert what


def test_definition_has_the_bits_of_the_published_class() -> None:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RMSNorm

    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        published = DeepseekV2RMSNorm(N, eps=peers.EPS).to(dtype)
        published.weight.data.copy_(torch.randn(N, generator=generator))
        x = torch.randn(M, N, generator=generator).to(dtype)
        assert torch.equal(peers.definition(x, published.weight), published(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moved_bytes_are_those_of_the_tensors(dtype: torch.dtype) -> None:
    def size(*tensors: Tensor) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    def moved(mode: Mode) -> int:
        return moved_bytes(BenchCase(M, N, dtype, mode))

    x = torch.empty(M, N, dtype=dtype)
    w, rstd = torch.empty(N, dtype=dtype), torch.empty(M)
    backward = size(x, x, w, rstd) + size(x, w)  # reads dy, x, w and rstd, writes dx and dw
    assert moved(FORWARD) == moved(STRIDED_FORWARD) == size(x, w, x)  # reads x and w, writes y
    assert moved(BACKWARD) == backward
    assert moved(TRAINING) == size(x, w, x, rstd) + backward
    assert moved(ADD_FORWARD) == size(x, x, w) + size(x, x)
    assert moved(ADD_BACKWARD) == backward + size(x)  # and ds


def test_a_mode_is_named_by_its_slug_and_read_back() -> None:
    for slug, mode in MODES.items():
        case = BenchCase(M, N, torch.float16, mode)
        assert case.to_json() == {"M": M, "N": N, "dtype": "float16", "mode": slug}
        assert BenchCase.from_json(case.to_json()) == case
    with pytest.raises(KeyError):
        BenchCase.from_json({"M": M, "N": N, "dtype": "float16", "mode": "sideways"})


def test_the_cases_of_a_cpu_and_of_a_gpu() -> None:
    full, quick = list(cases.cases("cpu", quick=False)), list(cases.cases("cpu", quick=True))
    assert set(quick) < set(full)
    assert {c.mode for c in quick} == {FORWARD, TRAINING}
    assert {c.dtype for c in full} - {c.dtype for c in quick} == {torch.float16}
    shapes = {(rows, 1280) for rows in (1, 64, 512, 2048, 4096, 8192)} | {(2048, 4096)}
    assert {(c.M, c.N) for c in full} == shapes
    gpu = list(cases.cases("cuda", quick=False))
    assert {(8192, 1280), (65536, 1280), (512, 262144)} <= {(c.M, c.N) for c in gpu}
    modes = {FORWARD, STRIDED_FORWARD, BACKWARD, ADD_FORWARD, ADD_BACKWARD, *GATED_MODES}
    assert {c.mode for c in gpu} == modes
    slices = [c for c in gpu if c.mode == STRIDED_FORWARD]  # compared with the same rows without gaps
    assert slices
    assert {dataclasses.replace(c, mode=FORWARD) for c in slices if c.dtype != torch.float16} <= set(gpu)


def test_strided_rows_are_columns_of_wider_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def norm(x: Tensor, w: Tensor) -> Tensor:
        given.append(x)
        return rmsnorm.rms_norm(x, w, peers.EPS)

    monkeypatch.setattr(peers, "PROVIDERS", (peers.Provider("ours", norm),))
    monkeypatch.setattr(measure, "_QUICK_SECONDS", 0.01)
    for mode, stride in ((FORWARD, N), (STRIDED_FORWARD, N + 64)):
        given.clear()
        case = BenchCase(M, N, torch.bfloat16, mode)
        row = measure.measure(case, torch.device("cpu"), peers.providers("cpu"), quick=True)
        assert row.fault == ""
        assert {(tuple(x.shape), x.stride()) for x in given} == {((M, N), (stride, 1))}


@pytest.mark.parametrize("mode", [STRIDED_FORWARD, BACKWARD, ADD_FORWARD, ADD_BACKWARD])
def test_every_mode_detects_wrong_bits(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PROVIDERS", EAGER)
    monkeypatch.setattr(measure, "_QUICK_SECONDS", 0.01)
    case = BenchCase(M, N, torch.bfloat16, mode)
    row = measure.measure(case, torch.device("cpu"), peers.providers("cpu"), quick=True)
    assert row.fault == ""
    assert all(m.timing for m in row.providers.values())
    assert row.providers["Definition"].differs == 0

    def wrong(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y, s = rmsnorm.add_rms_norm(x, residual, w, peers.EPS)
        return y, (s + 0.5 * (s - s.detach()) if mode == ADD_BACKWARD else s + 1)

    broken = tuple(dataclasses.replace(p, add=wrong) if p.name == "ours" else p for p in EAGER)
    monkeypatch.setattr(peers, "PROVIDERS", broken)
    row = measure.measure(case, torch.device("cpu"), peers.providers("cpu"), quick=True)
    assert bool(row.fault) == case.mode.adds
    assert (row.providers["ours"].timing is None) == case.mode.adds


@pytest.mark.parametrize("mode", GATED_MODES, ids=lambda mode: mode.slug)
def test_gated_modes_measure_providers_with_a_gate_and_detect_wrong_bits(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_QUICK_SECONDS", 0.01)
    case = BenchCase(8, 64, torch.bfloat16, mode)
    monkeypatch.setattr(peers, "PROVIDERS", EAGER)
    row = measure.measure(case, torch.device("cpu"), peers.providers("cpu"), quick=True)
    assert row.fault == ""
    assert set(row.providers) == {p.name for p in EAGER if p.name == "copy" or p.gated}
    assert all(m.timing for m in row.providers.values())
    differs = row.providers["ours"].differs
    assert differs is not None
    assert differs < 0.01  # from the class: its statistic and activation may differ by a unit in the last place
    spec = mode.gated
    assert spec is not None
    ours = next(p.gated for p in EAGER if p.name == "ours")
    assert ours is not None

    def wrong(x: Tensor, gate: Tensor, w: Tensor, spec: Spec) -> Tensor:
        y = ours(x, gate, w, spec)
        return y + 0.5 * (gate - gate.detach()) if mode.backward else y + 1

    broken = tuple(dataclasses.replace(p, gated=wrong) if p.name == "ours" else p for p in EAGER)
    monkeypatch.setattr(peers, "PROVIDERS", broken)
    row = measure.measure(case, torch.device("cpu"), peers.providers("cpu"), quick=True)
    assert ("dgate" if mode.backward else "y") in row.fault
    assert row.providers["ours"].timing is None


@pytest.mark.parametrize("mode", [FORWARD, STRIDED_FORWARD, BACKWARD, ADD_FORWARD, ADD_BACKWARD])
def test_compiling_ahead_makes_the_same_calls_as_measuring(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every provider, on tensors of the same kind; a provider that raises does not stop the others."""
    ran: list[str] = []

    def noted(name: str) -> peers.Norm:
        def norm(x: Tensor, w: Tensor) -> Tensor:
            if name == "broken":
                raise RuntimeError("not here")
            if x.requires_grad:
                x.register_hook(lambda dx: ran.append(f"backward of {name}"))
            ran.append(f"{name} {tuple(x.shape)} {x.stride()} {x.requires_grad}")
            return peers.definition(x, w)

        return norm

    names = ("broken", "ours", "Definition")
    monkeypatch.setattr(peers, "PROVIDERS", tuple(peers.Provider(name, noted(name)) for name in names))

    def once(calls: dict[str, Callable[[], object]], *_: object, **__: object) -> dict[str, Timing]:
        for call in calls.values():
            call()
        return {}

    monkeypatch.setattr(timing, "interleave", once)
    case = BenchCase(M, N, torch.bfloat16, mode)
    measure.compile_once(case, torch.device("cpu"), ())
    ahead, before = set(ran), len(ran)
    assert len(ahead) == (4 if mode in (BACKWARD, ADD_BACKWARD) else 2)
    measure.measure(case, torch.device("cpu"), peers.providers("cpu"), quick=True)
    assert set(ran[before:]) == ahead


@pytest.mark.usefixtures("small")
def test_a_run_on_the_cpu_measures_every_provider_and_writes_json(tmp_path: Path) -> None:
    result = command.bench("cpu", True, tmp_path, silent)
    assert result.ok
    assert len(result.rows) == 4
    for row in result.rows:
        assert row.fault == ""
        assert set(row.providers) == {p.name for p in EAGER}
        for measured in row.providers.values():
            assert measured.timing is not None
            assert measured.timing.calls >= 5
        rows, ours, definition = M * N * row.case.dtype.itemsize, row.providers["ours"], row.providers["Definition"]
        assert definition.differs == 0
        assert row.providers["LayerNorm"].differs is None
        if row.case.dtype == torch.bfloat16:
            others = row.providers["F.rms_norm"].differs
            assert others is not None
            assert others > 0.1  # it rounds once, after the weight
        if row.case.mode == TRAINING:
            assert ours.saved == rows + 4 * M
            assert definition.saved == (6 if row.case.dtype == torch.bfloat16 else 8) * M * N + 4 * M
        else:
            assert ours.saved is None
    written = json.loads((tmp_path / "bench-cpu.json").read_text())
    assert written == json.loads(json.dumps(result.to_json()))
    assert [p.name for p in tmp_path.iterdir()] == ["bench-cpu.json"]
    assert written["machine"]["cpu"]
    assert {case["check"] for case in written["cases"]} == {"green"}
    assert "PASSED: ours has the exact bits in all" in shown(result, verbose=False)


@pytest.mark.usefixtures("small")
def test_a_result_has_the_versions_of_the_packages_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = iter(("yaml", "", "no_such_package"))  # pip calls the first PyYAML
    others = tuple(dataclasses.replace(p, package=next(packages, "")) for p in EAGER)
    monkeypatch.setattr(peers, "providers", lambda *_: others)
    versions = command.bench("cpu", True, None, silent, dtypes=["float32"], modes=["forward"]).facts["versions"]
    assert versions["PyYAML"] == importlib.metadata.version("PyYAML")
    assert versions["no_such_package"] == "unknown"
    assert versions["torch"] == torch.__version__


@pytest.mark.parametrize("wrong", ["y", "dx"])
@pytest.mark.usefixtures("small")
def test_a_case_with_wrong_bits_fails_and_has_no_time(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        y = rmsnorm.rms_norm(x, w, peers.EPS)
        if wrong == "y":
            one = torch.zeros_like(y)
            one[0, 0] = 1
            return y + one
        return y + 0.01 * (x - x.detach())  # the same y and another gradient

    monkeypatch.setattr(peers, "PROVIDERS", replaced("ours", norm))
    result = command.bench("cpu", True, None, silent)
    assert not result.ok
    for row in result.rows:
        fails = wrong == "y" or row.case.mode == TRAINING
        assert bool(row.fault) == fails
        assert (row.providers["ours"].timing is None) == fails
        assert (row.ratio("copy", cuda=False) is None) == fails
        assert row.providers["Definition"].timing is not None
        assert not fails or f"{wrong} differ" in row.fault
    wrong_cases = 4 if wrong == "y" else 2
    message = shown(result, verbose=False)
    assert f"FAILED: our bits are wrong in {wrong_cases} of 4 cases, which have no time" in message
    assert message.count(f"{wrong} differ") == wrong_cases
    assert any("no_time" in case["providers"]["ours"] for case in result.to_json()["cases"])


@pytest.mark.usefixtures("small")
def test_a_provider_that_raises_is_reported_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(x: Tensor, w: Tensor) -> Tensor:
        raise RuntimeError("too wide\nfor me")

    monkeypatch.setattr(peers, "PROVIDERS", replaced("F.rms_norm", refuses))
    result = command.bench("cpu", True, None, silent)
    assert result.ok
    assert {row.providers["F.rms_norm"].reason for row in result.rows} == {"RuntimeError: too wide"}
    assert all(row.providers["ours"].timing for row in result.rows)
    assert f"F.rms_norm has no time at {M} × {N}: RuntimeError: too wide" in shown(result)

    monkeypatch.setattr(peers, "PROVIDERS", replaced("ours", refuses))
    assert not command.bench("cpu", True, None, silent).ok


def test_a_compiled_provider_is_timed() -> None:
    row = measure.measure(
        BenchCase(8, 64, torch.float32, TRAINING), torch.device("cpu"), peers.providers("cpu"), quick=True
    )
    compiled = row.providers["torch.compile"]
    if compiled.timing is None:
        pytest.skip(f"torch.compile cannot run here: {compiled.reason}")
    assert compiled.saved is not None
    assert compiled.saved >= 8 * 64 * 4


def a_timing(us: float) -> Timing:
    return Timing(100, us * 1e-6, 2 * us * 1e-6, us * 1e-6, 3 * us * 1e-6)


def result_of(device: str, *rows: BenchRow) -> BenchResult:
    facts = machine.describe("cpu") | {"device": device}
    return BenchResult(facts, "a kernel", False, rows, QUIET, {}, 1.0)


def test_aims_use_the_minimum_on_a_cpu() -> None:
    times = {"ours": 100.0, "copy": 50.0, "Definition": 1999.0, "LayerNorm": 131.0, "torch.compile": 114.0}
    providers = {name: Measurement(a_timing(us)) for name, us in times.items()}
    result = result_of("cpu", BenchRow(BenchCase(8192, 1280, torch.bfloat16, FORWARD), "", providers))
    held = {h.what.split(": ")[1]: h.met for h in result.aims()}
    assert held == {
        "copy / ours": True,
        "Definition / ours": False,
        "LayerNorm / ours": True,
        "torch.compile / ours": False,
    }
    assert "not met" in shown(result_with_all(result))
    assert "not met" in shown(result_with_all(result), verbose=False)


def result_with_all(result: BenchResult) -> BenchResult:
    """Add a measurement of every provider."""
    rows = [
        dataclasses.replace(row, providers={p.name: Measurement(None, "-") for p in peers.PROVIDERS} | row.providers)
        for row in result.rows
    ]
    return dataclasses.replace(result, rows=tuple(rows))


def test_aims_for_one_row() -> None:
    providers = {"ours": Measurement(a_timing(5.0)), "F.rms_norm": Measurement(a_timing(14.9))}
    held = result_of("cpu", BenchRow(BenchCase(1, 1280, torch.bfloat16, FORWARD), "", providers)).aims()
    assert [(h.met, round(h.measured, 3)) for h in held] == [(False, 2.98), (True, 1.0)]


def test_aims_use_the_median_on_a_gpu() -> None:
    providers = {"ours": Measurement(a_timing(10.0)), "copy": Measurement(Timing(100, 1e-6, 18.6e-6, 1e-6, 2e-5))}
    shapes = ((8192, 1280), (8192, 16384), (1024, 131072))
    rows = [BenchRow(BenchCase(m, n, torch.bfloat16, FORWARD), "", providers) for m, n in shapes]
    held = result_of("cuda", *rows).aims()
    assert [(h.met, round(h.measured, 3)) for h in held] == [(False, 0.93), (True, 0.93)]  # small cases have no aim


def test_strided_rows_are_compared_with_rows_without_gaps() -> None:
    rows = [
        BenchRow(BenchCase(65536, 512, torch.bfloat16, mode), "", {"ours": Measurement(a_timing(us))})
        for mode, us in ((FORWARD, 10.0), (STRIDED_FORWARD, 10.4))
    ]
    rows.append(dataclasses.replace(rows[0], case=BenchCase(65536, 1280, torch.bfloat16, FORWARD)))
    (held,) = result_of("cuda", *rows).aims()
    assert (round(held.measured, 3), held.met) == (0.962, False)


def test_the_first_call_runs_twice_in_new_processes_with_one_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    caches: list[tuple[str, str, bool]] = []

    def run(command: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        ran.append(command)
        caches.append((env["RMSNORM_CACHE_DIR"], env["TRITON_CACHE_DIR"], Path(env["RMSNORM_CACHE_DIR"]).is_dir()))
        return SimpleNamespace(stdout=f'a warning\n{{"forward_s": {len(ran)}, "backward_s": 0.5}}\n')

    monkeypatch.setattr(subprocess, "run", run)
    found = overheads.first_call(torch.device("cpu"))
    assert found == {
        "empty_cache": {"forward_s": 1, "backward_s": 0.5},
        "filled_cache": {"forward_s": 2, "backward_s": 0.5},
    }
    assert [command[-1] for command in ran] == ["cpu", "cpu"]
    assert len(set(caches)) == 1
    folder, other, existed = caches[0]
    assert folder == other
    assert existed
    assert not Path(folder).exists()


def test_the_first_call_finds_no_kernel_of_the_user_s_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = "import json; from rmsnorm.kernels.cpu import cache; print(json.dumps(str(cache._folder())))"
    monkeypatch.setattr(overheads, "_FIRST_CALL", program)
    for variable in ("RMSNORM_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    found = overheads.first_call(torch.device("cpu"))
    assert found["empty_cache"] == found["filled_cache"]
    assert not Path(found["empty_cache"]).is_relative_to(tmp_path)


def test_the_program_of_the_first_call_prints_its_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["-c", "cpu"])
    exec(overheads._FIRST_CALL, {})
    times = json.loads(capsys.readouterr().out)
    assert set(times) == {"forward_s", "backward_s"}
    assert all(isinstance(seconds, float) for seconds in times.values())


def test_a_first_call_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overheads, "_FIRST_CALL", "raise SystemExit(3)")
    error = overheads.first_call(torch.device("cpu"))["error"]
    assert error.startswith("CalledProcessError: Command ")


def test_without_a_temporary_folder_the_first_call_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", fails)
    error = overheads.first_call(torch.device("cpu"))["error"]
    assert error == "no temporary folder can be made (TMPDIR): No usable temporary directory found"


@pytest.mark.parametrize(("device", "out"), [("nonsense", None), ("cpu", "file")])
def test_bad_options_raise_and_write_nothing(device: str, out: str | None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError):
        command.bench(device, True, tmp_path / out if out else None, silent)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


WIDTHS = (512, 1280, 4096, 16384)


def stored_result(modes: tuple[Mode, ...] = (FORWARD, BACKWARD), seed: int = 0) -> BenchResult:
    """A result with random times. Apart rounds at another place, LayerNorm is another function."""
    draw = random.Random(seed)
    differ = {"ours": 5e-6, "copy": None, "Definition": 0.0, "Apart": 0.2, "LayerNorm": None}
    rows = []
    for mode in modes:
        for n in (1, *WIDTHS):
            found = {name: Measurement(a_timing(draw.uniform(20, 200)), "", share) for name, share in differ.items()}
            found["QuACK"] = Measurement(None, "is not there")
            rows.append(BenchRow(BenchCase(max(1, 2**25 // n) * 2, n, torch.bfloat16, mode), "", found))
    rows.append(BenchRow(BenchCase(2**20, 64, torch.float32, FORWARD), "1 of 9 y differ", rows[0].providers))
    return result_of("cuda", *rows)


def write_result(path: Path, result: BenchResult) -> Path:
    path.write_text(json.dumps(result.to_json()))
    return path


def test_a_stored_result_is_read_back(tmp_path: Path) -> None:
    result = stored_result()
    read = command.bench(None, False, None, silent, stored=write_result(tmp_path / "a.json", result))
    assert not read.ok
    assert [row.case for row in read.rows] == [row.case for row in result.rows]
    for was, now in zip(result.rows, read.rows, strict=True):
        assert now.fault == was.fault
        assert now.ratio("copy", cuda=True) == pytest.approx(was.ratio("copy", cuda=True), rel=1e-4)
    assert json.loads(json.dumps(BenchResult.from_json(read.to_json()).to_json())) == read.to_json()
    assert "Apart" in shown(read)
    short, full = printed.check(printing.blocks(read)), printed.check(printing.blocks(read, verbose=True))
    assert len(short.splitlines()) < 30 < len(full.splitlines())
    assert short.startswith("FAILED: our bits are wrong in 1 of 11 cases, which have no time\n  float32 1048576 x 64")
    assert "Apart" not in short


def bare(mode: str, *shapes: tuple[int, int]) -> list[dict[str, Any]]:
    """Cases without measurements, as a run has them before it starts."""
    return [{"mode": mode, "dtype": "bfloat16", "M": m, "N": n} for m, n in shapes]


WIDE = [(2**25 // n, n) for n in (512, 64, 2048)]


def test_a_panel_over_widths_needs_three_of_large_cases() -> None:
    (panel,) = plot.panels([*bare("forward", *WIDE, (4, 32)), *bare("backward", *WIDE[:2])])
    assert (panel.mode, panel.axis, [case["N"] for case in panel.cases]) == ("forward", "N", [64, 512, 2048])
    assert panel.title == "forward, bfloat16"


def test_without_such_widths_a_panel_is_over_three_numbers_of_rows_of_one_width() -> None:
    forward = bare("forward", (9, 64), (1, 64), (5, 64), (1, 32), (5, 32))
    (panel,) = plot.panels([*forward, *bare("backward", (1, 64), (5, 64))])
    assert (panel.mode, panel.axis, [case["M"] for case in panel.cases]) == ("forward", "M", [1, 5, 9])
    assert panel.title == "forward, bfloat16, N = 64"


@pytest.mark.parametrize(
    "shapes", [WIDE[:2], [*WIDE[:2], WIDE[0]], [(m - 1, n) for m, n in WIDE], [(1, 64), (5, 64), (5, 64), (9, 32)]]
)
def test_too_few_cases_are_not_drawn(shapes: list[tuple[int, int]]) -> None:
    with pytest.raises(CommandError, match=r"--plot: no mode and dtype has 3 widths .* or 3 numbers of rows M"):
        plot.panels(bare("forward", *shapes))


def test_providers_that_do_not_compute_the_definition_are_found() -> None:
    cases = stored_result().to_json()["cases"]
    assert plot.others(cases) == {"Apart", "LayerNorm"}
    for case in cases:  # in fp32 only the sums differ
        case["dtype"] = "float32"
    assert plot.others(cases) == {"LayerNorm"}


def test_a_drawing_has_every_panel_and_provider(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    stored = write_result(tmp_path / "a.json", stored_result())
    for name in ("a.svg", "b.svg", "c.png"):
        command.bench(None, False, None, silent, stored=stored, drawing=tmp_path / "new" / name)
    svg = (tmp_path / "new" / "a.svg").read_text()
    assert svg == (tmp_path / "new" / "b.svg").read_text()
    assert "<dc:date>" not in svg
    assert (tmp_path / "new" / "c.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.svg", "b.svg", "c.png"]
    labels = {"ours", "Definition", "Apart (not the Definition)", "LayerNorm (not the Definition)"}
    panels = {"forward, bfloat16", "backward, bfloat16"}
    comments = {line.strip().removeprefix("<!-- ").removesuffix(" -->") for line in svg.splitlines() if "<!--" in line}
    assert labels | panels <= comments
    assert not {"copy", "QuACK", "forward, float32"} & comments
    other = write_result(tmp_path / "other.json", stored_result(seed=1))
    command.bench(None, False, None, silent, stored=other, drawing=tmp_path / "new" / "b.svg")
    assert svg != (tmp_path / "new" / "b.svg").read_text()


@pytest.mark.parametrize("stored", [True, False])
def test_a_drawing_that_cannot_be_made_raises_before_anything_is_measured(
    stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overheads, "first_call", lambda device: pytest.fail("it was measured"))
    monkeypatch.setattr(cases, "_CPU_SHAPES", ((1, 1280), (2048, 1280)))
    few = write_result(tmp_path / "few.json", result_of("cpu")) if stored else None
    device = None if stored else "cpu"

    def drawn(name: str) -> None:
        command.bench(device, False, None, silent, stored=few, drawing=tmp_path / name)

    for name in ("a.pdf", "svg"):
        with pytest.raises(CommandError, match=r"--plot .*ends in \.svg or \.png"):
            drawn(name)
    with pytest.MonkeyPatch.context() as hidden:
        hidden.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(CommandError, match=r"needs matplotlib: pip install 'rmsnorm\[plot\]'$"):
            drawn("a.svg")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError, match=r"--plot .*/file/a\.svg cannot be written: Not a directory"):
        drawn("file/a.svg")
    with pytest.raises(CommandError, match="no mode and dtype has 3 widths"):
        drawn("a.svg")


def test_a_file_that_is_not_a_stored_result_raises(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", "[" * 100_000, '{"verb": "verify", "cases": [3]}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(CommandError, match=r"--from .*a\.json: give the JSON of a run"):
            command.bench(None, False, None, silent, stored=tmp_path / "a.json")
    with pytest.raises(CommandError, match=r"--from .*b\.json: No such file"):
        command.bench(None, False, None, silent, stored=tmp_path / "b.json")
    with pytest.raises(CommandError, match="leave out --device"):
        command.bench("cpu", False, None, silent, stored=tmp_path / "a.json")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("machine",), {}),
        (("machine", "versions"), 1),
        (("seconds",), "many"),
        (("first_call",), "x"),
        (("cases", 0, "M"), "nan"),
        (("cases", 0, "N"), -1),
        (("cases", 0, "M"), 10**400),
        (("cases", 0, "providers", "copy", "median_us"), 0),
        (("cases", 0, "providers", "ours", "median_us"), math.nan),
        (("cases", 0, "providers", "ours", "differs_from_definition"), "few"),
    ],
    ids=lambda part: ".".join(map(str, part)) if isinstance(part, tuple) else type(part).__name__,
)
def test_a_stored_result_with_a_value_that_no_run_has_is_refused_in_one_line(
    path: tuple[Any, ...], value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = stored_result().to_json()
    place: Any = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--from", str(tmp_path / "a.json")])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("a.json: give the JSON of a run of rmsnorm bench")


def line_of(fixed: float, bandwidth: float, off: dict[int, float] | None = None) -> FittedLine:
    """A line through exact times, some of which are multiplied by a factor in `off`."""
    moved = [(rows, moved_bytes(BenchCase(rows, 4096, torch.bfloat16, FORWARD))) for rows in line.ROWS]
    return FittedLine(tuple((rows, b, (fixed + b / bandwidth) * (off or {}).get(rows, 1)) for rows, b in moved))


def test_the_line_has_powers_of_two_elements() -> None:
    assert [rows * 4096 for rows in line.ROWS] == [2**power for power in range(24, 34)]


@pytest.mark.parametrize(("fixed", "bandwidth"), [(5.25e-6, 4.2e12), (0.0, 1e12), (1e-4, 3.3e12)])
def test_exact_times_are_fitted_exactly(fixed: float, bandwidth: float) -> None:
    found = line_of(fixed, bandwidth).to_json()
    assert found["fixed_us"] == pytest.approx(fixed * 1e6, abs=1e-9)
    assert found["gb_per_s"] == pytest.approx(bandwidth / 1e9, rel=1e-9)
    assert found["greatest_deviation"] < 1e-9
    assert found["within_5_percent"]
    for size in found["sizes"]:
        assert size["bytes"] == 2 * (2 * size["M"] * 4096 + 4096)
        assert size["line_us"] == pytest.approx(size["median_us"], rel=1e-9)


@pytest.mark.parametrize("rows", [line.ROWS[0], line.ROWS[5], line.ROWS[-1]])
def test_one_time_off_the_line_is_found_by_least_squares(rows: int) -> None:
    fitted = line_of(5e-6, 4e12, {rows: 1.3})
    found = {size["M"]: size["deviation"] for size in fitted.to_json()["sizes"]}
    assert min(found, key=found.__getitem__) == rows  # that time lies above the line
    assert fitted.greatest == max(map(abs, found.values())) > 0.05
    assert not fitted.to_json()["within_5_percent"]

    def squares(fixed: float, per_byte: float) -> float:
        return sum(((fixed + per_byte * b) / t - 1) ** 2 for _, b, t in fitted.measured)

    fixed, per_byte = fitted.fit
    least = squares(fixed, per_byte)
    for near in (0.99, 1.01):
        assert squares(fixed * near, per_byte) > least
        assert squares(fixed, per_byte * near) > least


def test_a_line_is_measured_and_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "_SECONDS", 0.001)
    lines = line.measure_lines(torch.device("cpu"), (1, 4, 16))
    assert lines is not None
    for found in lines.values():
        assert [rows for rows, *_ in found.measured] == [1, 4, 16]
        assert all(seconds > 0 for *_, seconds in found.measured)
    assert line.measure_lines(torch.device("cpu"), (1, 4)) is None
    result = dataclasses.replace(result_of("cuda"), line={"ours": line_of(5e-6, 4e12), "copy": line_of(0, 5e12)})
    read = BenchResult.from_json(json.loads(json.dumps(result.to_json())))
    assert read.line is not None
    assert read.line["ours"].fit == pytest.approx((5e-6, 1 / 4e12))
    table = shown(read)
    assert "ours: 5 µs + bytes / (4 TB/s), off by " in table
    assert "2097152" in table
    assert "at most: within 5 %" in table
    assert "not within 5 %" in line_of(5e-6, 4e12, {4096: 1.3}).summary()


def test_sizes_that_do_not_fit_into_memory_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = 3 * 2 * 2**30  # x, its result and its copy, of 2³⁰ elements
    for free, largest in ((sizes / 0.8 + 1, 2**30), (sizes, 2**29)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert line.fitting_rows(torch.device("cuda"))[-1] * 4096 == largest


@pytest.mark.usefixtures("small")
def test_there_is_no_line_on_a_cpu() -> None:
    assert command.bench("cpu", True, None, silent).to_json()["line"] is None


@pytest.mark.usefixtures("small")
def test_dtype_and_mode_select_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(*dtypes: str, modes: tuple[str, ...] = ()) -> BenchResult:
        return command.bench("cpu", True, None, silent, dtypes=dtypes, modes=modes)

    def measured(result: BenchResult) -> list[tuple[str, Mode]]:
        return [(row.case.dtype_name, row.case.mode) for row in result.rows]

    both = part("float32", "bfloat16", modes=("forward",))
    assert measured(both) == [("bfloat16", FORWARD), ("float32", FORWARD)]
    assert both.first_call == QUIET
    monkeypatch.setattr(overheads, "first_call", lambda device: pytest.fail("it is only measured with forward in bf16"))
    assert measured(part(modes=("training",))) == [("bfloat16", TRAINING), ("float32", TRAINING)]
    one = part("float32")
    assert measured(one) == [("float32", FORWARD), ("float32", TRAINING)]
    assert "first call" not in shown(one)
    with pytest.raises(
        CommandError, match=r"--dtype 'float16' is not measured in this run: give one of 'bfloat16', 'fl"
    ):
        part("float32", "float16")
    with pytest.raises(CommandError, match=r"--mode 'back' .* 'forward', 'training'$"):
        part(modes=("back",))


@pytest.mark.usefixtures("small")
def test_provider_selects_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    result = command.bench("cpu", True, None, silent, dtypes=("float32",), names=("LayerNorm",))
    assert [list(row.providers) for row in result.rows] == [["ours", "copy", "LayerNorm"]] * len(result.rows)
    assert all(measured.timing for row in result.rows for measured in row.providers.values())
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("nothing is measured"))
    with pytest.raises(CommandError, match=r"--provider 'Liger' cannot be measured here: give one of 'ours', 'copy', "):
        command.bench("cpu", True, None, silent, names=("LayerNorm", "Liger"))
