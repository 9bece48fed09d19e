"""The clock, the counters and the file: what every figure rests on."""

import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import Draw
from rmsnorm import bits, memory
from rmsnorm.errors import CommandError
from rmsnorm.tools import machine, processes, results, timing

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("samples", "expected"),
    [([3.0, 1.0, 2.0], (1.0, 2.0, 1.0, 3.0)), ([5.0, 1.0, 2.0, 4.0, 3.0], (1.0, 3.0, 2.0, 4.0))],
    ids=["extremes of three", "quartiles of five"],
)
def test_summary(samples: list[float], expected: tuple[float, ...]) -> None:
    summary = timing.summarize(samples, repeats=4)
    assert (summary.minimum, summary.median, summary.low, summary.high) == expected
    assert summary.calls == 4 * len(samples)


def test_workers_run_every_task_and_ignore_failures(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "there", "b", "c")]
    folders[1].mkdir()
    processes.run_in_workers(os.mkdir, folders, 0o700)
    assert sorted(tmp_path.iterdir()) == sorted(folders)
    assert {folder.stat().st_mode & 0o777 for folder in folders if folder.name != "there"} == {0o700}


def store_sigint_handler(pids: Path) -> None:
    (pids / str(os.getpid())).write_text(str(int(signal.getsignal(signal.SIGINT))))


def test_ctrl_c_ends_a_worker_without_a_traceback(tmp_path: Path) -> None:
    processes.run_in_workers(store_sigint_handler, [tmp_path])
    assert [file.read_text() for file in tmp_path.iterdir()] == [str(int(signal.SIG_DFL))]


def test_every_call_gets_its_samples_and_no_fixed_neighbour() -> None:
    log: list[str] = []

    def busy(name: str) -> None:
        log.append(name)
        sum(range(20_000))  # longer than the shortest sample, so that one call is one sample

    timings = timing.interleave({n: lambda n=n: busy(n) for n in "abc"}, CPU, samples=30)  # type: ignore[misc]
    assert {name: t.calls for name, t in timings.items()} == dict.fromkeys("abc", 30)
    assert all(0 < t.minimum <= t.low <= t.median <= t.high for t in timings.values())
    rounds = ["".join(log[-90:][i : i + 3]) for i in range(0, 90, 3)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) > 3


def test_a_time_limit_leaves_the_slow_the_fewest_samples() -> None:
    calls = {"slow": lambda: time.sleep(0.01), "fast": lambda: time.sleep(0)}
    timings = timing.interleave(calls, CPU, samples=20, fewest=3, seconds=1e-3)
    assert timings["slow"].calls == 3
    assert timings["fast"].calls > timings["slow"].calls


class Clock:
    """Time that passes only where a call says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def takes(self, *seconds: float) -> Callable[[], None]:
        """A call that takes these, one after the other, and then the last of them."""
        left = list(seconds)

        def call() -> None:
            self.seconds += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "now", clock)
    return clock


def test_calls_that_get_slower_end_the_timing_when_its_seconds_are_over(clock: Clock) -> None:
    """The three that are tried first take a millisecond, all others a second."""
    calls = {name: clock.takes(1e-3, 1e-3, 1e-3, 1.0) for name in "ab"}
    timings = timing.interleave(calls, CPU, samples=1000, fewest=3, seconds=2.0)
    assert {t.calls for t in timings.values()} <= {2, 3}
    assert sum(t.calls for t in timings.values()) <= 6
    assert clock.seconds < 7
    steady = timing.interleave({"a": clock.takes(1e-3)}, CPU, samples=1000, fewest=3, seconds=2.0)
    assert steady["a"].calls == 1000


@pytest.mark.parametrize(
    ("n", "k", "outside"), [(6, 1, 2), (7, 1, 2), (8, 1, 2), (9, 2, 20), (12, 3, 158), (20, 6, 43400)]
)
def test_the_interval_of_a_median_is_that_of_the_sign_test(n: int, k: int, outside: int) -> None:
    """k: which smallest and largest sample bound it, as tables of the sign test have it for 95 %.

    outside: of the 2**n equally likely ways in which n samples lie above or below the median, those it misses.
    """
    samples = [float(i * i) for i in range(n)]
    random.Random(1).shuffle(samples)
    found = timing.median_interval(samples)
    assert found == timing.Interval((k - 1.0) ** 2, (n - k + 0.0) ** 2, 1 - outside / 2**n)


def test_too_few_samples_have_no_interval() -> None:
    assert timing.median_interval([1.0] * 5) is None
    assert timing.median_interval([]) is None
    assert timing.median_interval([1.0, 2.0, 3.0, 4.0, 5.0], confidence=0.9) is not None
    assert timing.median_interval([1.0] * 7, confidence=0.99) is None


def test_the_interval_contains_the_median_as_often_as_it_says() -> None:
    """Of a distribution without a mean, so that nothing but the order of the samples can serve."""
    draw = random.Random(0)
    tried, inside = 4000, 0
    for _ in range(tried):
        found = timing.median_interval([math.tan(math.pi * (draw.random() - 0.5)) for _ in range(9)])
        assert found is not None
        inside += found.low <= 0.0 <= found.high
    assert inside / tried == pytest.approx(1 - 20 / 512, abs=0.012)  # four standard deviations


def test_results_that_would_be_one_file_or_need_each_others_name(tmp_path: Path) -> None:
    report = tmp_path / "out" / "report.json"
    (tmp_path / "link").symlink_to(tmp_path / "out")
    results.check_apart(("--out", report), ("--json", tmp_path / "out" / "other.json"))
    results.check_apart(("--out", report), ("--json", tmp_path / "report.json"))
    for same in (report, tmp_path / "link" / "report.json", tmp_path / "x" / ".." / "out" / "report.json"):
        with pytest.raises(CommandError, match="--out and --json both write"):
            results.check_apart(("--out", report), ("--json", same))
    with pytest.raises(CommandError, match=r"--json writes the file .*out, which --out needs as a folder"):
        results.check_apart(("--out", report), ("--json", tmp_path / "out"))
    with pytest.raises(CommandError, match=r"--out writes the file .*json, which --json needs as a folder"):
        results.check_apart(("--out", report), ("--json", report / "x.json"))
    assert list(tmp_path.iterdir()) == [tmp_path / "link"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_differing_counts_bits(dtype: torch.dtype, randn: Draw) -> None:
    a = randn(5, 7).to(dtype)
    assert bits.differing(a, a.clone()) == (0, 0)
    b = a.clone()
    b[1, 2] = torch.nextafter(b[1, 2], b.new_tensor(math.inf))
    b[3, 0] = torch.nextafter(torch.nextafter(b[3, 0], b.new_tensor(-math.inf)), b.new_tensor(-math.inf))
    assert bits.differing(a, b) == (2, 2)
    tiny = torch.nextafter(a.new_zeros(()), a.new_ones(()))
    around_zero = torch.stack([-tiny, -0.0 * tiny, 0.0 * tiny, tiny])
    assert bits.differing(around_zero[:-1], around_zero[1:]) == (3, 1)


def test_differing_of_nan_and_of_what_cannot_be_compared() -> None:
    nan, one = torch.tensor([math.nan]), torch.tensor([1.0])
    negative = torch.tensor([-1], dtype=torch.int32).view(torch.float32)  # another NaN
    assert negative.isnan().all()
    assert bits.differing(nan, negative) == (0, 0)
    assert bits.differing(nan, one)[0] == 1
    assert bits.differing(torch.empty(0, 4), torch.empty(0, 4)) == (0, 0)
    with pytest.raises(ValueError, match="bfloat16"):
        bits.differing(one, one.bfloat16())
    with pytest.raises(ValueError, match="compared"):
        bits.differing(one, one.expand(2))


def test_saved_bytes_are_counted_once_a_storage_and_without_the_weights(randn: Draw) -> None:
    x = randn(6, 8).requires_grad_()
    w = randn(8).requires_grad_()
    with memory.saved_for_backward([w]) as saved:
        y = x * w  # saves x and w
        z = x[:3] * w  # the storage of x again
        assert saved() == x.numel() * 4
        u = y.sigmoid()  # its output
        assert saved() == 2 * x.numel() * 4
    grads = torch.autograd.grad(u.sum() + z.sum(), (x, w))
    s = (x * w).sigmoid()
    wanted = torch.autograd.grad(s.sum() + (x[:3] * w).sum(), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "figures.json"
    results.write_json(path, {"a": 1.5})
    assert json.loads(path.read_text()) == {"a": 1.5}
    with pytest.raises(ValueError, match="JSON"):
        results.write_json(path, {"a": math.nan})
    with pytest.raises(TypeError):
        results.write_json(path, {"a": CPU})
    assert json.loads(path.read_text()) == {"a": 1.5}
    assert [p.name for p in path.parent.iterdir()] == ["figures.json"]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    results.check_folder(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CommandError, match="--out"):
            results.check_folder(out)


def test_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMSNORM_COMMIT", "abc123")
    facts = json.loads(json.dumps(machine.describe("cpu")))
    assert facts["commit"] == "abc123"
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["gpu"] is None
    assert facts["cores"] >= 1
    assert facts["cpu"]
    assert "abc123" in machine.headline(facts)


def test_an_installed_package_is_named_by_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RMSNORM_COMMIT", raising=False)
    package = tmp_path / "rmsnorm"
    package.mkdir()
    (tmp_path / "rmsnorm-7.8.dist-info").mkdir()
    (tmp_path / "rmsnorm-7.8.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: rmsnorm\nVersion: 7.8\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(machine, "__file__", str(package / "machine.py"))
    facts = machine.describe("cpu")
    assert (facts["commit"], facts["release"]) == (None, "7.8")
    assert machine.headline(facts).endswith("; rmsnorm 7.8")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "a copy" / "rmsnorm" / "machine.py"))
    facts = machine.describe("cpu")
    assert facts["release"] is None
    assert machine.headline(facts).endswith("; commit unknown")
    del facts["release"]  # as in results that were stored before there was one
    assert machine.headline(facts).endswith("; commit unknown")


@pytest.mark.parametrize("name", ["nonsense", "meta", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(CommandError, match="give cpu or cuda"):
        machine.find_device(name)
