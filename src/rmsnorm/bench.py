"""`rmsnorm bench`: ours beside its peers, interleaved in one run; no time for a case whose bits are wrong.

Providers are a table and every one of them goes through the same loop. To add one, add a line to `PROVIDERS`.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rmsnorm
from rmsnorm import machine, measure, reference
from rmsnorm.measure import Progress, Timing

EPS = 1e-6
FORWARD, TRAINING = "forward", "forward+backward"
_QUICK_SECONDS, _QUICK_FEWEST = 0.4, 5

Norm = Callable[[Tensor, Tensor], Tensor]


def definition(x: Tensor, w: Tensor) -> Tensor:
    """The published forward with the temporaries it really makes; x (..., N), w (N,)."""
    h = x.to(torch.float32)
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + EPS)
    return w * h.to(x.dtype)


# --- what is measured ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """M rows of N, one dtype for x and w; mode is FORWARD or TRAINING."""

    M: int
    N: int
    dtype: torch.dtype
    mode: str

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Provider:
    """norm: (x, w) -> y, or None for a copy of as many bytes. equal: it computes the Definition, up to rounding."""

    name: str
    norm: Norm | None
    compiled: bool = False
    equal: bool = True


PROVIDERS = (
    Provider("ours", lambda x, w: rmsnorm.rms_norm(x, w, EPS)),
    Provider("copy", None),
    Provider("Definition", definition),
    Provider("F.rms_norm", lambda x, w: F.rms_norm(x, (x.shape[-1],), w, EPS)),
    Provider("LayerNorm", lambda x, w: F.layer_norm(x, (x.shape[-1],), w, None, EPS), equal=False),
    Provider("torch.compile", definition, compiled=True),
)

Shapes = tuple[tuple[int, int], ...]
_CPU_SHAPES: Shapes = ((1, 1280), (64, 1280), (512, 1280), (2048, 1280), (4096, 1280), (8192, 1280), (2048, 4096))
_CPU_SHAPES_QUICK: Shapes = ((1, 1280), (512, 1280), (8192, 1280))
_CUDA_SHAPES: Shapes = (
    (16, 1280), (8192, 1280), (65536, 1280), (8192, 512), (16384, 2048), (16384, 4096), (16384, 7168),
    (8192, 16384), (4096, 32768), (2048, 65536), (1024, 131072), (512, 262144),
)  # fmt: skip
_CUDA_SHAPES_QUICK: Shapes = ((16, 1280), (8192, 1280), (16384, 7168))


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    """The cases of a run, in the order in which they are measured."""
    if device_type == "cuda":
        shapes = _CUDA_SHAPES_QUICK if quick else _CUDA_SHAPES
    else:
        shapes = _CPU_SHAPES_QUICK if quick else _CPU_SHAPES
    dtypes = (torch.bfloat16, torch.float32) if quick else (torch.bfloat16, torch.float32, torch.float16)
    for dtype, mode, (M, N) in itertools.product(dtypes, (FORWARD, TRAINING), shapes):
        yield Case(M, N, dtype, mode)


def moved_bytes(M: int, N: int, element: int, mode: str) -> int:
    """What a norm that touches nothing twice must move; `element`: bytes of one of x, w, y, dy, dx, dw.

    Forward: x, w, y. Forward and backward: x, w, y and the fp32 rstd written; then dy, x, w and rstd read, dx and
    dw written.
    """
    rows, columns = M * N * element, N * element
    if mode == FORWARD:
        return 2 * rows + columns
    return 5 * rows + 3 * columns + 2 * 4 * M


# --- what is held against it ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """A peer's time over ours must be at least `at_least`. Printed as met or not met; nothing fails by it."""

    mode: str
    peer: str
    at_least: float


_BIG, _ROW = (8192, 1280), (1, 1280)
_CPU_BOUNDS = (
    Bound(FORWARD, "copy", 1 / 2),
    Bound(FORWARD, "Definition", 20),
    Bound(FORWARD, "LayerNorm", 1.3),
    Bound(FORWARD, "torch.compile", 1.15),
    Bound(TRAINING, "LayerNorm", 1),
    Bound(TRAINING, "torch.compile", 1),
    Bound(TRAINING, "Definition", 15),
)
_CPU_ROW_BOUND = Bound(FORWARD, "F.rms_norm", 3)
_CPU_ROW_SECONDS = 5e-6
_CUDA_BOUND = Bound(FORWARD, "copy", 0.85)
_CUDA_WIDEST = 16384


@dataclass(frozen=True)
class Held:
    """One bound beside what was measured."""

    what: str
    measured: float
    at_least: float

    @property
    def met(self) -> bool:
        return self.measured >= self.at_least


# --- what comes out ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One provider in one case. timing is None where there is none, and `reason` says why.

    differs: the share of outputs whose bits are not the Definition's; None for what is no such norm.
    saved: bytes kept for backward besides the weight; None in FORWARD.
    """

    timing: Timing | None
    reason: str = ""
    differs: float | None = None
    saved: int | None = None

    def to_json(self) -> dict[str, Any]:
        timing = self.timing.to_json() if self.timing else {"no_time": self.reason}
        return {**timing, "differs_from_definition": self.differs, "saved_bytes": self.saved}


@dataclass(frozen=True)
class Row:
    """One case: red says what is wrong with our bits; empty is green."""

    case: Case
    red: str
    providers: dict[str, Measured]

    def time(self, name: str, cuda: bool) -> float | None:
        """The figure that counts: the minimum on a CPU, the median on a GPU."""
        timing = self.providers[name].timing if name in self.providers else None
        return None if timing is None else timing.median if cuda else timing.minimum

    def ratio(self, peer: str, cuda: bool) -> float | None:
        """The peer's time over ours."""
        theirs, ours = self.time(peer, cuda), self.time("ours", cuda)
        return None if theirs is None or ours is None else theirs / ours


@dataclass(frozen=True)
class Result:
    facts: dict[str, Any]
    kernel: str
    quick: bool
    rows: tuple[Row, ...]
    first_call: dict[str, Any]
    seconds: float

    @property
    def ok(self) -> bool:
        return not any(row.red for row in self.rows)

    @property
    def cuda(self) -> bool:
        return bool(self.facts["device"] == "cuda")

    def bounds(self) -> list[Held]:
        held = []
        for row in self.rows:
            case = row.case
            where = f"{case.dtype_name} {case.M} x {case.N} {case.mode}"
            wanted: tuple[Bound, ...] = ()
            if self.cuda:
                wanted = (_CUDA_BOUND,) if case.N <= _CUDA_WIDEST and case.M > 16 else ()
            elif case.dtype != torch.float16:
                wanted = {_BIG: _CPU_BOUNDS, _ROW: (_CPU_ROW_BOUND,)}.get((case.M, case.N), ())
            for bound in wanted:
                ratio = row.ratio(bound.peer, self.cuda)
                if bound.mode == case.mode and ratio is not None:
                    held.append(Held(f"{where}: {bound.peer} / ours", ratio, bound.at_least))
            ours = row.time("ours", self.cuda)
            if not self.cuda and wanted == (_CPU_ROW_BOUND,) and case.mode == FORWARD and ours is not None:
                held.append(Held(f"{where}: {_CPU_ROW_SECONDS * 1e6:g} us / ours", _CPU_ROW_SECONDS / ours, 1))
        return held

    def to_json(self) -> dict[str, Any]:
        return {
            "verb": "bench",
            "ok": self.ok,
            "machine": self.facts,
            "kernel": self.kernel,
            "quick": self.quick,
            "seconds": round(self.seconds, 1),
            "figure": "median_us, L2 overwritten before every call" if self.cuda else "min_us",
            "first_call": self.first_call,
            "cases": [
                {
                    "M": row.case.M,
                    "N": row.case.N,
                    "dtype": row.case.dtype_name,
                    "mode": row.case.mode,
                    "moved_bytes": moved_bytes(row.case.M, row.case.N, row.case.dtype.itemsize, row.case.mode),
                    "check": row.red or "green",
                    "copy_over_ours": row.ratio("copy", self.cuda),
                    "definition_over_ours": row.ratio("Definition", self.cuda),
                    "providers": {name: m.to_json() for name, m in row.providers.items()},
                }
                for row in self.rows
            ],
            "bounds": [
                {"what": h.what, "measured": h.measured, "at_least": h.at_least, "met": h.met} for h in self.bounds()
            ],
        }

    def table(self) -> Any:
        """A rich renderable: a table a mode and dtype, then the bounds."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = [Text(machine.headline(self.facts)), Text(f"ours: {self.kernel}")]
        which = "median" if self.cuda else "minimum"
        for (dtype, mode), group in itertools.groupby(self.rows, lambda row: (row.case.dtype_name, row.case.mode)):
            names = [p.name for p in PROVIDERS]
            table = Table(title=f"{mode}, {dtype}: {which} us (≠: share of outputs that are not the Definition's bits)")
            table.add_column("M x N")
            for name in names:
                table.add_column(name, justify="right")
            table.add_column("copy / ours", justify="right")
            table.add_column("Definition / ours", justify="right")
            if mode == TRAINING:
                table.add_column("saved: ours, Definition (MB)", justify="right")
            for row in group:
                cells = [self._cell(row, name) for name in names]
                cells += [_times(row.ratio(peer, self.cuda)) for peer in ("copy", "Definition")]
                if mode == TRAINING:
                    saved = [row.providers[name].saved for name in ("ours", "Definition")]
                    cells.append(", ".join("-" if s is None else f"{s / 1e6:.2f}" for s in saved))
                table.add_row(f"{row.case.M} x {row.case.N}", *cells)
            parts.append(table)
        table = Table(title="Bounds (said, not asserted)")
        for column in ("ratio", "measured", "at least", ""):
            table.add_column(column)
        for h in self.bounds():
            verdict = Text("met", "green") if h.met else Text("not met", "red")
            table.add_row(h.what, f"{h.measured:.2f}", f"{h.at_least:g}", verdict)
        parts.append(table)
        parts.append(Text(_first_call_line(self.first_call)))
        red = [f"{r.case.dtype_name} {r.case.M} x {r.case.N} {r.case.mode}: {r.red}" for r in self.rows if r.red]
        if red:
            parts.append(Text("no time is given where our bits are wrong: " + "; ".join(red), "red"))
        else:
            parts.append(Text("ours has the exact bits in every case; where it is ≠, the Definition's own sum is off"))
        return Group(*parts)

    def _cell(self, row: Row, name: str) -> Any:
        from rich.text import Text

        measured = row.providers[name]
        seconds = row.time(name, self.cuda)
        if seconds is None:
            return Text(measured.reason, "red")
        share = f"  ≠ {_share(measured.differs)}" if measured.differs else ""
        return Text(f"{seconds * 1e6:.4g}{share}")


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.0e}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _first_call_line(first: dict[str, Any]) -> str:
    if "error" in first:
        return f"first call: not measured, {first['error']}"
    empty, filled = first["empty_cache"], first["filled_cache"]
    return (
        f"first call in a new process, bf16, forward and backward: {empty['forward_s']:.2f} s + "
        f"{empty['backward_s']:.2f} s with an empty cache of compiled code, "
        f"{filled['forward_s']:.2f} s + {filled['backward_s']:.2f} s with a filled one"
    )


# --- measuring -----------------------------------------------------------------------------------------------


def main(device: str | None, quick: bool, out: Path | None, progress: Progress) -> Result:
    """Measure every provider in every case of the device (the GPU if there is one, by default).

    quick: fewer cases, and of slow providers as many calls as fit into a short time. out: a folder into which
    bench-<device>.json is written. Raises CommandError for a device that is not there and a folder that cannot be
    written to.
    """
    where = machine.find_device(device)
    if out is not None:
        measure.check_folder(out)
    start = time.perf_counter()
    facts = machine.describe(where)
    todo = list(cases(where.type, quick))
    progress(0, 1 + len(todo), "the first call, in new processes")
    first_call = _first_call(where)
    rows = []
    for number, case in enumerate(todo, 1):
        progress(number, 1 + len(todo), f"{case.dtype_name} {case.M} x {case.N} {case.mode}")
        rows.append(_measure(case, where, quick))
    x = torch.ones(2, 1280, dtype=torch.bfloat16, device=where)
    kernel = rmsnorm.explain(x, x[0])
    seconds = time.perf_counter() - start
    result = Result(facts, kernel, quick, tuple(rows), first_call, seconds)
    if out is not None:
        measure.write_json(out / f"bench-{where.type}.json", result.to_json())
    return result


def _measure(case: Case, device: torch.device, quick: bool) -> Row:
    generator = torch.Generator("cpu").manual_seed(case.M * 7919 + case.N)
    x, dy = (torch.randn(case.M, case.N, generator=generator).to(device, case.dtype) for _ in range(2))
    w = (torch.rand(case.N, generator=generator) + 0.5).to(device, case.dtype)
    training = case.mode == TRAINING
    if training:
        x.requires_grad_()
        w.requires_grad_()
    with torch.no_grad():
        expected = definition(x, w)

    calls: dict[str, Callable[[], object]] = {}
    found: dict[str, Measured] = {}
    red = ""
    for provider in PROVIDERS:
        name, norm = provider.name, provider.norm
        if norm is None:
            calls[name], found[name] = _copy(case, device), Measured(None)
            continue
        try:
            if provider.compiled:
                norm = _compile(norm)
            if name == "ours":
                red = _wrong(norm, x, w, dy, training)
            y = norm(x, w)
            differs = measure.differing(y, expected)[0] / y.numel() if provider.equal else None
            saved = _saved(norm, x, w) if training else None
            call = _call(norm, x, w, dy, training)
            call()
        except Exception as error:  # noqa: BLE001  # a peer that cannot run here is a line in the table
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            found[name] = Measured(None, reason)
            red = reason if name == "ours" else red
            continue
        found[name] = Measured(None, red if name == "ours" else "", differs, saved)
        if not (name == "ours" and red):
            calls[name] = call
        del y
    del expected

    timings = measure.interleave(calls, device, fewest=_QUICK_FEWEST, seconds=_QUICK_SECONDS if quick else None)
    return Row(case, red, {name: replace(m, timing=timings.get(name)) for name, m in found.items()})


def _compile(norm: Norm) -> Norm:
    torch._dynamo.reset()  # each case compiles anew, for its own shape, as a model of fixed shapes would
    return torch.compile(norm, fullgraph=True, dynamic=False)


def _saved(norm: Norm, x: Tensor, w: Tensor) -> int:
    with measure.saved_for_backward([w]) as saved:
        y = norm(x, w)  # held until it is counted
        count = saved()
    del y
    return count


def _call(norm: Norm, x: Tensor, w: Tensor, dy: Tensor, training: bool) -> Callable[[], object]:
    if training:
        return lambda: torch.autograd.grad(norm(x, w), (x, w), dy)
    return lambda: norm(x, w)


def _copy(case: Case, device: torch.device) -> Callable[[], object]:
    """y.copy_(x) of as many elements as the norm has to move: one tensor to another, and 5 tensors when training."""
    tensors = 2 if case.mode == FORWARD else 5
    source = torch.ones(case.M * case.N * tensors // 2, dtype=case.dtype, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _wrong(norm: Norm, x: Tensor, w: Tensor, dy: Tensor, training: bool) -> str:
    """What differs in bits from the reference on this very input; empty if nothing does."""
    y_wanted, _, rstd = reference.forward(x.detach(), None, w.detach(), EPS, "early", 0.0, with_rstd=True)
    y = norm(x, w)
    pairs = {"y": (y, y_wanted)}
    if training:
        assert rstd is not None
        dx = torch.autograd.grad(y, x, dy)[0]
        wanted = reference.backward(dy, None, x.detach(), w.detach(), rstd, "early", 0.0, True, False)[0]
        assert wanted is not None
        pairs["dx"] = (dx, wanted)
    wrong = {name: measure.differing(*pair)[0] for name, pair in pairs.items()}
    return ", ".join(f"{count} of {y.numel()} {name} differ" for name, count in wrong.items() if count)


# --- the first call ------------------------------------------------------------------------------------------

_FIRST_CALL = """
import json, sys, time, torch, rmsnorm
device = sys.argv[1]
x = torch.ones(64, 1280, dtype=torch.bfloat16, device=device, requires_grad=True)
w = torch.ones(1280, dtype=torch.bfloat16, device=device, requires_grad=True)
wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
wait(); t0 = time.perf_counter()
y = rmsnorm.rms_norm(x, w)
wait(); t1 = time.perf_counter()
torch.autograd.grad(y, (x, w), torch.ones_like(y))
wait(); t2 = time.perf_counter()
print(json.dumps({"forward_s": round(t1 - t0, 3), "backward_s": round(t2 - t1, 3)}))
"""


def _first_call(device: torch.device) -> dict[str, Any]:
    """Seconds of the first forward and backward of a process, with an empty and with a filled cache."""
    found: dict[str, Any] = {}
    package = str(Path(rmsnorm.__file__).resolve().parent.parent)
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        caches = {"NUMBA_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder, "PYTHONPATH": paths}
        for state in ("empty_cache", "filled_cache"):
            try:
                run = subprocess.run(
                    [sys.executable, "-c", _FIRST_CALL, str(device)],
                    env=os.environ | caches, capture_output=True, text=True, timeout=300, check=True,
                )  # fmt: skip
                found[state] = json.loads(run.stdout.splitlines()[-1])
            except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
                return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]}
    return found
