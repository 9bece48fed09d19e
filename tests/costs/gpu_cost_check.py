"""Compare the counts for CUDA with what a GPU does: `python tests/costs/gpu_cost_check.py [--out DIR]`.

The profiler counts launches, autograd's hooks the saved bytes, and the allocator the requested bytes, before it rounds
them up. The differences and a table are printed at the end, all figures are written to DIR/gpu_cost_check.json, and the
exit status is 1 if any count is wrong. Compiled kernels are written to a temporary folder.
"""

import argparse
import bisect
import gc
import itertools
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # noqa: E402

import rmsnorm  # noqa: E402
from rmsnorm import memory  # noqa: E402
from rmsnorm.costs import counts as counting  # noqa: E402
from rmsnorm.costs.case import RECOMPUTED, Implementation  # noqa: E402
from rmsnorm.spec import Cast  # noqa: E402
from rmsnorm.tools import machine  # noqa: E402
from trace_cost import ReadRun, Run  # noqa: E402

B, H, F = torch.bfloat16, torch.float16, torch.float32
SHAPES = ((8192, 1280), (2, 300, 512), (1, 1280), (16, 7168), (4096, 32768), (70000, 256), (33, 1001), (1280,))
DTYPES = ((B, B), (F, F), (B, F), (H, B), (B, None))
SPECS: tuple[tuple[Cast, float], ...] = (("early", 0.0), ("late", 0.0), ("late", 1.0))
# The device's clock and the host's differ by less, in seconds; and a profile that lost events is taken again.
SKEW, ATTEMPTS = 1e-3, 3
NO_KERNELS = ("Memset", "Context Sync", "Stream Sync", "Stream Wait", "Event Sync")
MOST_PRINTED = 80


@dataclass(frozen=True)
class Case:
    implementation: Implementation
    shape: tuple[int, ...]
    x: torch.dtype
    w: torch.dtype | None
    cast: Cast
    offset: float
    recompute: bool = False

    def __str__(self) -> str:
        x, w = (str(d).removeprefix("torch.") for d in (self.x, self.w))
        recompute = " recompute" if self.recompute else ""
        return f"{self.implementation} {self.cast} {self.offset:g} {self.shape} {x}/{w}{recompute}"


def cases() -> list[Case]:
    found = []
    for implementation, (x, w), shape in itertools.product(counting.IMPLEMENTATIONS, DTYPES, SHAPES):
        specs = SPECS if implementation in ("eager", "ours", "ours+residual") and x == w == B else SPECS[:1]
        if implementation != "LayerNorm" or w in (x, None):
            found += [Case(implementation, shape, x, w, *spec) for spec in specs]
        if implementation in RECOMPUTED:
            found.append(Case(implementation, shape, x, w, *SPECS[0], recompute=True))
    return found


def peak(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """The call's result, and how many bytes were asked for at most and afterwards, beyond what was there before."""
    gc.collect()  # what an earlier case left in a cycle must not be given back while this one is measured
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = call()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    return result, after["requested_bytes.all.peak"] - before, after["requested_bytes.all.current"] - before


def launches(run: Run) -> list[list[str]]:
    """The names of the kernels and copies that each phase launches, in order, without memsets."""
    for _ in range(ATTEMPTS):
        found = _profiled([run.inference, run.forward, _again(run)])
        if all(found):
            break  # every norm launches something; otherwise the profiler lost events
    return [[name for name in names if not name.startswith(NO_KERNELS)] for names in found]


def _profiled(calls: list[Callable[[], Any]]) -> list[list[str]]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for number, call in enumerate(calls):
            with torch.profiler.record_function(f"case {number}"):
                call()
                torch.cuda.synchronize()
            time.sleep(2 * SKEW)
    events = list(profile.events() or ())
    on_host = {e.name: e.time_range.start for e in events if e.device_type == DeviceType.CPU}
    starts = [on_host[f"case {number}"] - SKEW * 1e6 for number in range(len(calls))]
    names: list[list[str]] = [[] for _ in calls]
    on_device = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    for e in sorted(on_device, key=lambda e: e.time_range.start):
        names[max(0, bisect.bisect(starts, e.time_range.start) - 1)].append(e.name)
    return names


def allocations(call: Callable[[], Any]) -> list[int]:
    """The allocator's allocations (+) and frees (-) in order, in rounded bytes: they show where a peak comes from."""
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(max_entries=1000, stacks="python", context=None)
    try:
        result = call()
        torch.cuda.synchronize()
        trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
        del result
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    signs = {"alloc": 1, "free_requested": -1}
    return [signs[e["action"]] * e["size"] for e in trace if e["action"] in signs]


def check(case: Case) -> list[dict[str, Any]]:
    """A row for each phase: the counted and measured figures, and details where they differ."""
    run = Run.of(case.shape, case.x, case.w, case.implementation, case.cast, case.offset, device="cuda")
    if case.recompute:
        run = ReadRun.reading(run, recompute=True)
    run.backward(run.forward())()  # compiles, and fills the workspaces that stay
    run.inference()
    torch.cuda.synchronize()

    names = dict(zip(counting.PHASES, launches(run), strict=True))

    with memory.saved_for_backward([t for t in (run.w, run.bias) if t is not None]) as count:
        outputs = run.forward()
        saved = count()
    del outputs
    measured: dict[str, dict[str, int]] = {}
    _, most, _ = peak(run.inference)
    measured["inference"] = {"saved": 0, "peak": most}
    outputs, most, alive = peak(run.forward)
    measured["forward"] = {"saved": saved, "peak": most}
    _, most, _ = peak(run.backward(outputs))
    measured["backward"] = {"saved": saved, "peak": alive + most}
    del outputs

    rows = []
    for phase in counting.PHASES:
        c = rmsnorm.cost(
            case.shape, case.x, case.w, implementation=case.implementation, phase=phase, device="cuda", cast=case.cast,
            offset=case.offset, elementwise_affine=case.w is not None, recompute=case.recompute,
        )  # fmt: skip
        seen = measured[phase] | {"kernels": len(names[phase])}
        expected = {field: getattr(c, field) for field in seen}
        row: dict[str, Any] = {
            "implementation": case.implementation, "case": f"{case} {phase}", "counted": expected, "measured": seen,
            "red": [field for field in seen if seen[field] != expected[field]],
        }  # fmt: skip
        if row["red"]:
            row |= {"terms": [t.what for t in c.terms], "launched": names[phase], "allocations": _why(run, phase)}
        rows.append(row)
    return rows


def _again(run: Run) -> Callable[[], Any]:
    return run.backward(run.forward())


def _why(run: Run, phase: str) -> Any:
    try:
        return allocations(
            run.inference if phase == "inference" else run.forward if phase == "forward" else _again(run)
        )
    except Exception as error:  # the allocator's history is no public interface
        return f"{type(error).__name__}: {error}"[:200]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for gpu_cost_check.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU that torch can use", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", message="Mismatch dtype")
    start, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for case in cases():
            try:
                rows += check(case)
            except Exception as error:
                what = f"{type(error).__name__}: {error}"[:300]
                rows.append({"implementation": case.implementation, "case": str(case), "error": what, "red": ["error"]})
    red = [row for row in rows if row["red"]]
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        document = {
            "commit": machine.describe(torch.device("cpu"))["commit"],
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "counted_in_torch": counting.TRACED_TORCH,
            "green": not red,
            "phases": rows,
        }
        (options.out / "gpu_cost_check.json").write_text(json.dumps(document, indent=1) + "\n")
    for row in red[:MOST_PRINTED]:
        print(row["case"])
        if "error" in row:
            print(f"    {row['error']}")
            continue
        figures = [f"{name} {row['counted'][name]:,} counted, {row['measured'][name]:,} seen" for name in row["red"]]
        print(f"    {'; '.join(figures)}")
        if "kernels" in row["red"]:
            print(f"    counted: {', '.join(row['terms'])}\n    seen: {', '.join(n[:60] for n in row['launched'])}")
        if "peak" in row["red"]:
            print(f"    allocated: {row['allocations']}")
    if len(red) > MOST_PRINTED:
        print(f"... and {len(red) - MOST_PRINTED} more, all in gpu_cost_check.json with --out")
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}; counted in torch {counting.TRACED_TORCH}")
    for implementation in counting.IMPLEMENTATIONS:
        of_it = [row for row in rows if row["implementation"] == implementation]
        wrong = {name: sum(name in row["red"] for row in of_it) for name in ("saved", "peak", "kernels", "error")}
        told = ", ".join(f"{count} {name}" for name, count in wrong.items() if count) or "none"
        print(f"{'green' if told == 'none' else 'red':8}{implementation:16}{len(of_it):>5} phases, wrong: {told}")
    print(f"{'RED' if red else 'green'}: {len(rows)} phases, {time.monotonic() - start:.0f} s")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
