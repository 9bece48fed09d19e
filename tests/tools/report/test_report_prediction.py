"""What the report predicts of our norms: counted bytes, at a speed that was fitted elsewhere."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from report_runs import a_norm, a_result, printed_report
from torch.utils._python_dispatch import TorchDispatchMode

import rmsnorm
from rmsnorm.patching.patch_report import Verdict
from rmsnorm.spec import Gate, Spec
from rmsnorm.tools import timing
from rmsnorm.tools.hardware import FITTED, GPUS
from rmsnorm.tools.report import prediction
from rmsnorm.tools.report.norms import Pair
from rmsnorm.tools.report.prediction import CopyLine, Rate, Work, measure_copies, rate_on, work_of
from rmsnorm.tools.timing import Timing
from scripts import FOLDER

CPU = torch.device("cpu")
BF16 = {"dtype": "bfloat16", "weight_dtype": "bfloat16"}


def one(spec: Spec | None = None, **more: Any):
    times = {"forward": Pair(6e-5, 1e-5), "training": Pair(3e-4, 5e-5)}
    norm = a_norm("norm", times, **{"rows": 8192, "width": 1280} | BF16 | more)
    return replace(norm, verdict=Verdict("ARMSNorm", spec or Spec(), name="norm"))


@pytest.mark.parametrize(
    ("spec", "more", "dtype", "weight_dtype", "options"),
    [
        (Spec(), {}, torch.bfloat16, torch.bfloat16, {}),
        (Spec(cast="late", offset=1.0), {"weight_dtype": "float32"}, torch.bfloat16, torch.float32, {"cast": "late", "offset": 1.0}),
        (Spec(cast="first"), {"weight_dtype": None}, torch.bfloat16, None, {"cast": "first", "elementwise_affine": False}),
        (Spec(), {"dtype": "float32", "weight_dtype": "float32"}, torch.float32, None, {}),
        (Spec(), {"calls": 2, "rows": 16384}, torch.bfloat16, None, {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_work_of_a_norm_is_what_cost_counts_for_one_call(spec, more, dtype, weight_dtype, options, device) -> None:
    n = one(spec, **more)
    costs = [
        rmsnorm.cost((8192, 1280), dtype, weight_dtype, phase=phase, device=device, **options)
        for phase in ("inference", "forward", "backward")
    ]
    assert work_of(n, "forward", device) == (costs[0].moved, costs[0].kernels)
    both = costs[1:]
    assert work_of(n, "training", device) == (sum(c.moved for c in both), sum(c.kernels for c in both))


def test_what_is_not_counted_has_no_work_and_no_prediction() -> None:
    gated = one(Spec(gate=Gate()))
    for n in (gated, one(calls=0), one(dtype="float64"), one(dtype=None), one(weight_dtype="float64"), one(width=None)):
        assert work_of(n, "forward", "cpu") is None
    result = a_result(norms=(one(), gated), copy=CopyLine(((1 << 20, 1e-5), (1 << 24, 1e-4))))
    content = result.to_json()
    assert content["norms"][0]["predicted"]["forward"]["error"] is not None
    assert content["norms"][1]["predicted"] == {}
    assert content["prediction"]["sum_forward"] is None  # of all norms together
    assert "1 × ARMSNorm, 8192 × 1280, forward " in printed_report(result)
    assert "all norms" not in printed_report(result)


def test_a_prediction_is_bytes_at_a_rate_and_a_launch_for_each_kernel() -> None:
    rate = Rate("the published bandwidth of X", 4e12, 0.5, 5e-6, "a file")
    assert rate.seconds(Work(8_000_000, 3)) == pytest.approx(15e-6 + 4e-6)
    line = CopyLine(((1_000_000, 15e-6), (2_000_000, 20e-6), (4_000_000, 30e-6)))  # 10 µs, and 200 GB/s
    assert line.fit == pytest.approx((10e-6, 200e9))
    assert line.seconds(3_000_000) == pytest.approx(25e-6)
    result = a_result(norms=(one(calls=2, rows=16384), one()), copy=line)
    found = result.to_json()["prediction"]
    assert (found["bandwidth_of"], found["efficiency"], found["launch_us"]) == (
        "the speed of a copy",
        1.0,
        pytest.approx(10),
    )
    moved = rmsnorm.cost((8192, 1280)).moved
    predicted = 3 * (10e-6 + moved / 200e9)
    assert found["sum_forward"] == {
        "predicted_us": pytest.approx(predicted * 1e6), "measured_us": pytest.approx(30), "error": pytest.approx(predicted / 30e-6 - 1),
    }  # fmt: skip
    text = printed_report(result)
    assert "bytes at the speed of a copy (200 GB/s), and 10 µs a kernel (from copies in this run)" in " ".join(
        text.split()
    )
    assert "all norms, forward" in text


def test_the_line_of_copies_never_begins_below_zero() -> None:
    line = CopyLine(((1_000_000, 4e-6), (2_000_000, 9e-6)))
    assert line.fit == (0.0, pytest.approx(200e9))
    assert line.seconds(0) == 0
    rate = rate_on({"gpu": None}, line)
    assert rate is not None
    assert rate.seconds(Work(1, 1000)) > 0


def test_a_gpu_in_the_table_is_predicted_from_its_published_bandwidth_and_another_from_copies() -> None:
    line = CopyLine(((1_000_000, 15e-6), (2_000_000, 20e-6)))
    h200 = rate_on({"gpu": {"name": "NVIDIA H200"}}, line)
    assert h200 is not None
    assert (h200.bandwidth, h200.name) == (4.8e12, "the published bandwidth of H200 SXM")
    assert "bench-cuda.json" in h200.source
    for facts in ({"gpu": {"name": "Unknown GPU"}}, {"gpu": None}):
        rate = rate_on(facts, line)
        assert rate is not None
        assert (rate.efficiency, rate.bandwidth) == (1.0, pytest.approx(200e9))
        assert rate_on(facts, None) is None
        flat = CopyLine(((1_000_000, 15e-6), (2_000_000, 15e-6)))
        assert flat.fit is None
        assert rate_on(facts, flat) is None


def test_the_rate_of_a_gpu_is_the_line_of_its_stored_measurements() -> None:
    file = FOLDER / "results" / "bench-cuda.json"
    if not file.exists():
        pytest.skip("benchmarks/results/ is not here: this is not the repository")
    stored = json.loads(file.read_text())
    fitted = FITTED[stored["machine"]["gpu"]["name"]]
    assert file.name in fitted.source
    line = stored["line"]["ours"]
    assert fitted.launch * 1e6 == pytest.approx(line["fixed_us"], abs=0.005)
    assert fitted.efficiency == pytest.approx(line["gb_per_s"] * 1e9 / GPUS[fitted.gpu].bandwidth, abs=0.0005)


class Copied(TorchDispatchMode):
    """Counts the bytes that copies read and write together."""

    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.moved += args[0].nbytes + args[1].nbytes
        return func(*args, **(kwargs or {}))


def test_copies_reach_from_a_small_one_to_the_most_that_a_norm_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def interleave(calls: Any, device: torch.device, **options: Any) -> dict[str, Timing]:
        for name, call in calls.items():
            with Copied() as copied:
                call()
            assert copied.moved == int(name) // 2 * 2
        asked.update(options)
        return {name: Timing(3, int(name) * 1e-9, int(name) * 2e-9, 0.0, 0.0) for name in calls}

    monkeypatch.setattr(timing, "interleave", interleave)
    norms = (one(rows=64), one(rows=512))
    copies = measure_copies(CPU, norms, 1.0)
    assert copies is not None
    sizes = [size for size, _ in copies.sizes]
    work = work_of(norms[1], "training", "cpu")
    assert work is not None
    assert sizes[-1] == work.moved
    assert sizes == sorted(set(sizes))
    assert sizes[0] <= 1 << 18
    assert len(sizes) >= 3
    assert asked["seconds"] * len(sizes) == pytest.approx(1.0)
    assert [seconds for _, seconds in copies.sizes] == [size * 1e-9 for size in sizes]  # on a CPU the minimum
    assert measure_copies(CPU, (one(Spec(gate=Gate())),), 1.0) is None
    monkeypatch.setattr(prediction, "_LARGEST_COPY", 1 << 20)
    limited = measure_copies(CPU, norms, 1.0)
    assert limited is not None
    assert limited.sizes[-1][0] == 1 << 20
