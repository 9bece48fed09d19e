"""bench: the loop over its providers, what it says when ours is wrong, and the figures it derives."""

import dataclasses
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import printed
import rmsnorm
from rmsnorm.errors import CommandError
from rmsnorm.tools import bench, machine, peers, plot
from rmsnorm.tools.bench import FORWARD, TRAINING, Case, Measured, Row
from rmsnorm.tools.display import render
from rmsnorm.tools.peers import Provider
from rmsnorm.tools.timing import Timing

M, N = 48, 320
QUIET = {"error": "not asked for"}
EAGER = tuple(p for p in peers.PROVIDERS if not p.compiled and not p.package)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape, no compiler and no further process: seconds become tenths."""
    monkeypatch.setattr(bench, "_CPU_SHAPES_QUICK", ((M, N),))
    monkeypatch.setattr(bench, "_QUICK_SECONDS", 0.01)
    monkeypatch.setattr(peers, "PROVIDERS", EAGER)
    monkeypatch.setattr(bench, "_first_call", lambda device: QUIET)


def replaced(name: str, norm: Callable[[Tensor, Tensor], Tensor]) -> tuple[Provider, ...]:
    return tuple(dataclasses.replace(p, norm=norm) if p.name == name else p for p in EAGER)


def shown(result: bench.Result, verbose: bool = True) -> str:
    return render(result.table(verbose), 200)


def silent(done: int, total: int, what: str) -> None:
    assert 0 <= done < total
    assert what


def test_definition_is_the_published_class() -> None:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RMSNorm

    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        published = DeepseekV2RMSNorm(N, eps=peers.EPS).to(dtype)
        published.weight.data.copy_(torch.randn(N, generator=generator))
        x = torch.randn(M, N, generator=generator).to(dtype)
        assert torch.equal(peers.definition(x, published.weight), published(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moved_bytes(dtype: torch.dtype) -> None:
    def size(*tensors: Tensor) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    def moved(mode: str) -> int:
        return bench.moved_bytes(Case(M, N, dtype, mode))

    x = torch.empty(M, N, dtype=dtype)
    w, rstd = torch.empty(N, dtype=dtype), torch.empty(M)
    backward = size(x, x, w, rstd) + size(x, w)  # reads dy, x, w and rstd, writes dx and dw
    assert moved(FORWARD) == moved(bench.SLICE_FORWARD) == size(x, w, x)  # reads x and w, writes y
    assert moved(bench.BACKWARD) == backward
    assert moved(TRAINING) == size(x, w, x, rstd) + backward
    assert moved(bench.ADD_FORWARD) == size(x, x, w) + size(x, x)
    assert moved(bench.ADD_BACKWARD) == backward + size(x)  # and ds


def test_the_cases() -> None:
    full, quick = list(bench.cases("cpu", quick=False)), list(bench.cases("cpu", quick=True))
    assert set(quick) < set(full)
    assert {c.mode for c in quick} == {FORWARD, TRAINING}
    assert {c.dtype for c in full} - {c.dtype for c in quick} == {torch.float16}
    shapes = {(rows, 1280) for rows in (1, 64, 512, 2048, 4096, 8192)} | {(2048, 4096)}
    assert {(c.M, c.N) for c in full} == shapes
    gpu = list(bench.cases("cuda", quick=False))
    assert {(8192, 1280), (65536, 1280), (512, 262144)} <= {(c.M, c.N) for c in gpu}
    modes = {FORWARD, bench.SLICE_FORWARD, bench.BACKWARD, bench.ADD_FORWARD, bench.ADD_BACKWARD}
    assert {c.mode for c in gpu} == modes
    slices = [c for c in gpu if c.mode == bench.SLICE_FORWARD]  # held to the same rows that lie without gaps
    assert slices
    assert {dataclasses.replace(c, mode=FORWARD) for c in slices if c.dtype != torch.float16} <= set(gpu)


def test_a_slice_lies_in_wider_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def norm(x: Tensor, w: Tensor) -> Tensor:
        given.append(x)
        return rmsnorm.rms_norm(x, w, peers.EPS)

    monkeypatch.setattr(peers, "PROVIDERS", (peers.Provider("ours", norm),))
    monkeypatch.setattr(bench, "_QUICK_SECONDS", 0.01)
    for mode, stride in ((FORWARD, N), (bench.SLICE_FORWARD, N + 64)):
        given.clear()
        case = Case(M, N, torch.bfloat16, mode)
        row = bench._measure(case, torch.device("cpu"), peers.providers("cpu"), quick=True)
        assert row.red == ""
        assert {(tuple(x.shape), x.stride()) for x in given} == {((M, N), (stride, 1))}


@pytest.mark.parametrize("mode", [bench.SLICE_FORWARD, bench.BACKWARD, bench.ADD_FORWARD, bench.ADD_BACKWARD])
def test_the_modes_of_a_gpu_run_on_a_cpu_too(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PROVIDERS", EAGER)
    monkeypatch.setattr(bench, "_QUICK_SECONDS", 0.01)
    case = Case(M, N, torch.bfloat16, mode)
    row = bench._measure(case, torch.device("cpu"), peers.providers("cpu"), quick=True)
    assert row.red == ""
    assert all(m.timing for m in row.providers.values())
    assert row.providers["Definition"].differs == 0

    def wrong(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y, s = rmsnorm.add_rms_norm(x, residual, w, peers.EPS)
        return y, (s + 0.5 * (s - s.detach()) if mode == bench.ADD_BACKWARD else s + 1)

    broken = tuple(dataclasses.replace(p, add=wrong) if p.name == "ours" else p for p in EAGER)
    monkeypatch.setattr(peers, "PROVIDERS", broken)
    row = bench._measure(case, torch.device("cpu"), peers.providers("cpu"), quick=True)
    assert bool(row.red) == case.adds
    assert (row.providers["ours"].timing is None) == case.adds


@pytest.mark.parametrize("mode", [FORWARD, bench.SLICE_FORWARD, bench.BACKWARD, bench.ADD_FORWARD, bench.ADD_BACKWARD])
def test_what_is_compiled_ahead_is_what_is_measured(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call of every provider, on tensors of the same kind; what cannot run keeps no other from it."""
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
    case = Case(M, N, torch.bfloat16, mode)
    bench._compile_once(case, torch.device("cpu"), ())
    ahead, before = set(ran), len(ran)
    assert len(ahead) == (4 if mode in (bench.BACKWARD, bench.ADD_BACKWARD) else 2)
    bench._measure(case, torch.device("cpu"), peers.providers("cpu"), quick=True)
    assert set(ran[before:]) == ahead


@pytest.mark.usefixtures("small")
def test_a_run_on_the_cpu(tmp_path: Path) -> None:
    result = bench.main("cpu", True, tmp_path, silent)
    assert result.ok
    assert len(result.rows) == 4
    for row in result.rows:
        assert row.red == ""
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


@pytest.mark.parametrize("wrong", ["y", "dx"])
@pytest.mark.usefixtures("small")
def test_no_time_is_given_where_our_bits_are_wrong(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        y = rmsnorm.rms_norm(x, w, peers.EPS)
        if wrong == "y":
            one = torch.zeros_like(y)
            one[0, 0] = 1
            return y + one
        return y + 0.01 * (x - x.detach())  # the same y and another gradient

    monkeypatch.setattr(peers, "PROVIDERS", replaced("ours", norm))
    result = bench.main("cpu", True, None, silent)
    assert not result.ok
    for row in result.rows:
        red = wrong == "y" or row.case.mode == TRAINING
        assert bool(row.red) == red
        assert (row.providers["ours"].timing is None) == red
        assert (row.ratio("copy", cuda=False) is None) == red
        assert row.providers["Definition"].timing is not None
        assert not red or f"{wrong} differ" in row.red
    wrong_cases = 4 if wrong == "y" else 2
    said = shown(result, verbose=False)
    assert f"FAILED: our bits are wrong in {wrong_cases} of 4 cases, which have no time" in said
    assert said.count(f"{wrong} differ") == wrong_cases
    assert any("no_time" in case["providers"]["ours"] for case in result.to_json()["cases"])


@pytest.mark.usefixtures("small")
def test_a_raising_provider_is_a_line_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(x: Tensor, w: Tensor) -> Tensor:
        raise RuntimeError("too wide\nfor me")

    monkeypatch.setattr(peers, "PROVIDERS", replaced("F.rms_norm", refuses))
    result = bench.main("cpu", True, None, silent)
    assert result.ok
    assert {row.providers["F.rms_norm"].reason for row in result.rows} == {"RuntimeError: too wide"}
    assert all(row.providers["ours"].timing for row in result.rows)
    assert f"F.rms_norm has no time at {M} × {N}: RuntimeError: too wide" in shown(result)

    monkeypatch.setattr(peers, "PROVIDERS", replaced("ours", refuses))
    assert not bench.main("cpu", True, None, silent).ok


def test_a_compiled_provider() -> None:
    row = bench._measure(Case(8, 64, torch.float32, TRAINING), torch.device("cpu"), peers.providers("cpu"), quick=True)
    compiled = row.providers["torch.compile"]
    if compiled.timing is None:
        pytest.skip(f"torch.compile cannot run here: {compiled.reason}")
    assert compiled.saved is not None
    assert compiled.saved >= 8 * 64 * 4


def timing(us: float) -> Timing:
    return Timing(100, us * 1e-6, 2 * us * 1e-6, us * 1e-6, 3 * us * 1e-6)


def result_of(device: str, *rows: Row) -> bench.Result:
    facts = machine.describe("cpu") | {"device": device}
    return bench.Result(facts, "a kernel", False, rows, QUIET, {}, 1.0)


def test_bounds_take_the_minimum_on_a_cpu() -> None:
    times = {"ours": 100.0, "copy": 50.0, "Definition": 1999.0, "LayerNorm": 131.0, "torch.compile": 114.0}
    providers = {name: Measured(timing(us)) for name, us in times.items()}
    result = result_of("cpu", Row(Case(8192, 1280, torch.bfloat16, FORWARD), "", providers))
    held = {h.what.split(": ")[1]: h.met for h in result.bounds()}
    assert held == {
        "copy / ours": True,
        "Definition / ours": False,
        "LayerNorm / ours": True,
        "torch.compile / ours": False,
    }
    assert "not met" in shown(result_with_all(result))
    assert "not met" in shown(result_with_all(result), verbose=False)


def result_with_all(result: bench.Result) -> bench.Result:
    """With a cell for every provider, as the table wants."""
    rows = [
        dataclasses.replace(row, providers={p.name: Measured(None, "-") for p in peers.PROVIDERS} | row.providers)
        for row in result.rows
    ]
    return dataclasses.replace(result, rows=tuple(rows))


def test_bounds_of_one_row() -> None:
    providers = {"ours": Measured(timing(5.0)), "F.rms_norm": Measured(timing(14.9))}
    held = result_of("cpu", Row(Case(1, 1280, torch.bfloat16, FORWARD), "", providers)).bounds()
    assert [(h.met, round(h.measured, 3)) for h in held] == [(False, 2.98), (True, 1.0)]


def test_bounds_take_the_median_on_a_gpu() -> None:
    providers = {"ours": Measured(timing(10.0)), "copy": Measured(Timing(100, 1e-6, 18.6e-6, 1e-6, 2e-5))}
    shapes = ((8192, 1280), (8192, 16384), (1024, 131072))
    rows = [Row(Case(m, n, torch.bfloat16, FORWARD), "", providers) for m, n in shapes]
    held = result_of("cuda", *rows).bounds()
    assert [(h.met, round(h.measured, 3)) for h in held] == [(False, 0.93), (True, 0.93)]  # small ones are not held


def test_a_slice_is_held_to_the_same_rows_without_gaps() -> None:
    rows = [
        Row(Case(65536, 512, torch.bfloat16, mode), "", {"ours": Measured(timing(us))})
        for mode, us in ((FORWARD, 10.0), (bench.SLICE_FORWARD, 10.4))
    ]
    rows.append(dataclasses.replace(rows[0], case=Case(65536, 1280, torch.bfloat16, FORWARD)))
    (held,) = result_of("cuda", *rows).bounds()
    assert (round(held.measured, 3), held.met) == (0.962, False)


def test_the_first_call_is_measured_in_new_processes() -> None:
    first = bench._first_call(torch.device("cpu"))
    assert "error" not in first, first
    assert first["empty_cache"]["forward_s"] > 0
    assert first["filled_cache"]["backward_s"] > 0


@pytest.mark.parametrize(("device", "out"), [("nonsense", None), ("cpu", "file")])
def test_bad_options(device: str, out: str | None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError):
        bench.main(device, True, tmp_path / out if out else None, silent)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


WIDTHS = (512, 1280, 4096, 16384)


def stored_result(modes: tuple[str, ...] = (FORWARD, bench.BACKWARD), seed: int = 0) -> bench.Result:
    """Random times of a GPU that nobody has; Apart rounds elsewhere, LayerNorm is another function."""
    draw = random.Random(seed)
    differ = {"ours": 5e-6, "copy": None, "Definition": 0.0, "Apart": 0.2, "LayerNorm": None}
    rows = []
    for mode in modes:
        for n in (1, *WIDTHS):
            found = {name: Measured(timing(draw.uniform(20, 200)), "", share) for name, share in differ.items()}
            found["QuACK"] = Measured(None, "is not there")
            rows.append(Row(Case(max(1, 2**25 // n) * 2, n, torch.bfloat16, mode), "", found))
    rows.append(Row(Case(2**20, 64, torch.float32, FORWARD), "1 of 9 y differ", rows[0].providers))
    return result_of("cuda", *rows)


def write_result(path: Path, result: bench.Result) -> Path:
    path.write_text(json.dumps(result.to_json()))
    return path


def test_a_result_is_read_back(tmp_path: Path) -> None:
    result = stored_result()
    read = bench.main(None, False, None, silent, stored=write_result(tmp_path / "a.json", result))
    assert not read.ok
    assert [row.case for row in read.rows] == [row.case for row in result.rows]
    for was, now in zip(result.rows, read.rows, strict=True):
        assert now.red == was.red
        assert now.ratio("copy", cuda=True) == pytest.approx(was.ratio("copy", cuda=True), rel=1e-4)
    assert json.loads(json.dumps(bench.Result.from_json(read.to_json()).to_json())) == read.to_json()
    assert "Apart" in shown(read)
    short, full = printed.check(read.table()), printed.check(read.table(verbose=True))
    assert len(short.splitlines()) < 30 < len(full.splitlines())
    assert short.startswith("FAILED: our bits are wrong in 1 of 11 cases, which have no time\n  float32 1048576 x 64")
    assert "Apart" not in short


def test_panels_have_three_widths_of_large_cases() -> None:
    cases = [{"mode": mode, "dtype": "bfloat16", "M": 2**25 // n, "N": n} for mode in "ab" for n in (512, 64, 2048)]
    drawn = plot.panels([*cases[:3], *cases[3:5]])
    assert {key: [case["N"] for case in group] for key, group in drawn.items()} == {("a", "bfloat16"): [64, 512, 2048]}
    for few in (cases[:2], [*cases[:2], cases[0]], [{**case, "M": case["M"] - 1} for case in cases]):
        with pytest.raises(CommandError, match="--plot: no mode and dtype has 3 widths"):
            plot.panels(few)


def test_who_is_not_the_definition() -> None:
    cases = stored_result().to_json()["cases"]
    assert plot.others(cases) == {"Apart", "LayerNorm"}
    for case in cases:  # in fp32 it is the sums that differ
        case["dtype"] = "float32"
    assert plot.others(cases) == {"LayerNorm"}


def test_a_drawing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    stored = write_result(tmp_path / "a.json", stored_result())
    for name in ("a.svg", "b.svg", "c.png"):
        bench.main(None, False, None, silent, stored=stored, drawing=tmp_path / "new" / name)
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
    bench.main(None, False, None, silent, stored=other, drawing=tmp_path / "new" / "b.svg")
    assert svg != (tmp_path / "new" / "b.svg").read_text()


@pytest.mark.parametrize("stored", [True, False])
def test_what_cannot_be_drawn_is_said_before_anything_is_measured(
    stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_first_call", lambda device: pytest.fail("it was measured"))
    few = write_result(tmp_path / "few.json", result_of("cpu")) if stored else None
    device = None if stored else "cpu"

    def drawn(name: str) -> None:
        bench.main(device, False, None, silent, stored=few, drawing=tmp_path / name)

    for name in ("a.pdf", "svg"):
        with pytest.raises(CommandError, match=r"--plot .*ends in \.svg or \.png"):
            drawn(name)
    with pytest.MonkeyPatch.context() as hidden:
        hidden.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(CommandError, match=r"needs matplotlib: pip install matplotlib$"):
            drawn("a.svg")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError, match=r"--plot .*/file/a\.svg cannot be written: Not a directory"):
        drawn("file/a.svg")
    with pytest.raises(CommandError, match="no mode and dtype has 3 widths"):
        drawn("a.svg")


def test_what_cannot_be_read_back(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", '{"verb": "verify", "cases": [3]}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(CommandError, match=r"--from .*a\.json: give the JSON of a run"):
            bench.main(None, False, None, silent, stored=tmp_path / "a.json")
    with pytest.raises(CommandError, match=r"--from .*b\.json: No such file"):
        bench.main(None, False, None, silent, stored=tmp_path / "b.json")
    with pytest.raises(CommandError, match="leave out --device"):
        bench.main("cpu", False, None, silent, stored=tmp_path / "a.json")


def line_of(fixed: float, bandwidth: float, off: dict[int, float] | None = None) -> bench.Line:
    """Exact times of the sizes that are measured, but for those that take `off` times as long."""
    moved = [(rows, bench.moved_bytes(Case(rows, 4096, torch.bfloat16, FORWARD))) for rows in bench._LINE_ROWS]
    return bench.Line(tuple((rows, b, (fixed + b / bandwidth) * (off or {}).get(rows, 1)) for rows, b in moved))


def test_the_sizes_of_the_line() -> None:
    assert [rows * 4096 for rows in bench._LINE_ROWS] == [2**power for power in range(24, 34)]


@pytest.mark.parametrize(("fixed", "bandwidth"), [(5.25e-6, 4.2e12), (0.0, 1e12), (1e-4, 3.3e12)])
def test_a_line_that_is_exact(fixed: float, bandwidth: float) -> None:
    found = line_of(fixed, bandwidth).to_json()
    assert found["fixed_us"] == pytest.approx(fixed * 1e6, abs=1e-9)
    assert found["gb_per_s"] == pytest.approx(bandwidth / 1e9, rel=1e-9)
    assert found["greatest_deviation"] < 1e-9
    assert found["within_5_percent"]
    for size in found["sizes"]:
        assert size["bytes"] == 2 * (2 * size["M"] * 4096 + 4096)
        assert size["line_us"] == pytest.approx(size["median_us"], rel=1e-9)


@pytest.mark.parametrize("rows", [bench._LINE_ROWS[0], bench._LINE_ROWS[5], bench._LINE_ROWS[-1]])
def test_a_line_with_one_size_off(rows: int) -> None:
    line = line_of(5e-6, 4e12, {rows: 1.3})
    found = {size["M"]: size["deviation"] for size in line.to_json()["sizes"]}
    assert min(found, key=found.__getitem__) == rows  # the line lies below the time that is too long
    assert line.greatest == max(map(abs, found.values())) > 0.05
    assert not line.to_json()["within_5_percent"]

    def squares(fixed: float, per_byte: float) -> float:
        return sum(((fixed + per_byte * b) / t - 1) ** 2 for _, b, t in line.measured)

    fixed, per_byte = line.fit
    least = squares(fixed, per_byte)
    for near in (0.99, 1.01):
        assert squares(fixed * near, per_byte) > least
        assert squares(fixed, per_byte * near) > least


def test_a_line_is_measured_and_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_LINE_SECONDS", 0.001)
    line = bench._line(torch.device("cpu"), (1, 4, 16))
    assert line is not None
    for found in line.values():
        assert [rows for rows, *_ in found.measured] == [1, 4, 16]
        assert all(seconds > 0 for *_, seconds in found.measured)
    assert bench._line(torch.device("cpu"), (1, 4)) is None
    result = dataclasses.replace(result_of("cuda"), line={"ours": line_of(5e-6, 4e12), "copy": line_of(0, 5e12)})
    read = bench.Result.from_json(json.loads(json.dumps(result.to_json())))
    assert read.line is not None
    assert read.line["ours"].fit == pytest.approx((5e-6, 1 / 4e12))
    table = shown(read)
    assert "ours: 5 µs + bytes / (4 TB/s), off by " in table
    assert "2097152" in table
    assert "at most: within 5 %" in table
    assert "not within 5 %" in line_of(5e-6, 4e12, {4096: 1.3}).summary()


def test_the_line_leaves_out_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = 3 * 2 * 2**30  # x, its result and its copy, of 2³⁰ elements
    for free, largest in ((sizes / 0.8 + 1, 2**30), (sizes, 2**29)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert bench._fitting(torch.device("cuda"))[-1] * 4096 == largest


@pytest.mark.usefixtures("small")
def test_no_line_on_a_cpu() -> None:
    assert bench.main("cpu", True, None, silent).to_json()["line"] is None


@pytest.mark.usefixtures("small")
def test_a_run_of_some_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(*dtypes: str, modes: tuple[str, ...] = ()) -> bench.Result:
        return bench.main("cpu", True, None, silent, dtypes=dtypes, modes=modes)

    def cases(result: bench.Result) -> list[tuple[str, str]]:
        return [(row.case.dtype_name, row.case.mode) for row in result.rows]

    both = part("float32", "bfloat16", modes=(FORWARD,))
    assert cases(both) == [("bfloat16", FORWARD), ("float32", FORWARD)]
    assert both.first_call == QUIET
    monkeypatch.setattr(bench, "_first_call", lambda device: pytest.fail("another part has measured it"))
    assert cases(part(modes=(TRAINING,))) == [("bfloat16", TRAINING), ("float32", TRAINING)]
    one = part("float32")
    assert cases(one) == [("float32", FORWARD), ("float32", TRAINING)]
    assert "first call" not in shown(one)
    with pytest.raises(
        CommandError, match=r"--dtype 'float16' is not measured in this run: give one of 'bfloat16', 'fl"
    ):
        part("float32", "float16")
    with pytest.raises(CommandError, match=r"--mode 'back' .* 'forward', 'forward\+backward'$"):
        part(modes=("back",))


@pytest.mark.usefixtures("small")
def test_a_run_of_some_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    result = bench.main("cpu", True, None, silent, dtypes=("float32",), names=("LayerNorm",))
    assert [list(row.providers) for row in result.rows] == [["ours", "copy", "LayerNorm"]] * len(result.rows)
    assert all(measured.timing for row in result.rows for measured in row.providers.values())
    monkeypatch.setattr(bench, "_measure", lambda *_: pytest.fail("nothing is measured"))
    with pytest.raises(CommandError, match=r"--provider 'Liger' cannot be measured here: give one of 'ours', 'copy', "):
        bench.main("cpu", True, None, silent, names=("LayerNorm", "Liger"))
