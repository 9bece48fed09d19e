"""Fills the tables of README.md and docs/ from the stored results, so that no figure in them is copied by hand.

    python benchmarks/tables.py          fill them
    python benchmarks/tables.py --check  say which files differ, and exit with 1 if any does

A table, or a list of sentences with figures, stands between two comments, and what is there is replaced:

    <!-- results: NAME -->
    <!-- end of results -->

NAME is one of the functions under `@part`, with hyphens. Each reads files of benchmarks/results/ and computes nothing
but ratios, sums and extremes of what they hold, or compares them with a prediction.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from many import result as many_result
from many.definitions import COLUMNS, PART, REDUCE, ROWS, WHOLE
from rmsnorm.costs.counts import cost
from rmsnorm.tools.bench.cases import MODES
from rmsnorm.tools.report.prediction import Work, rate_on
from whole_models.result import (
    aim_in_words,
    batches_title,
    by_compilation,
    freed_share,
    gradients_in_words,
    how,
    recompute_less,
)  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_PART = re.compile(r"(<!-- results: (?P<name>[a-z0-9-]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

PARTS: dict[str, Callable[[], str]] = {}


def part(function: Callable[[], str]) -> Callable[[], str]:
    """Register what fills the parts of this name."""
    PARTS[function.__name__.replace("_", "-")] = function
    return function


def files(root: Path = ROOT) -> list[Path]:
    """The documents that may hold results."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """The text with every part as the stored results make it. Raises KeyError for a name that there is not."""
    return _PART.sub(lambda found: f"{found[1]}{PARTS[found['name']]()}\n{found[3]}", text)


def without_results(text: str) -> str:
    """The text without its parts: what people have written."""
    return _PART.sub("", text)


# --- the results ---------------------------------------------------------------------------------------------


@cache
def stored(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def is_stored(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


@dataclass(frozen=True)
class Case:
    """One case of a stored benchmark; figure: which of its times counts, the median on a GPU, the minimum on a CPU."""

    M: int
    N: int
    dtype: str
    mode: str
    figure: str
    providers: dict[str, dict[str, Any]]

    @property
    def shape(self) -> str:
        return f"{self.M} × {self.N}"

    def time(self, provider: str) -> float | None:
        """Microseconds; None if it was not or could not be measured."""
        return self.providers.get(provider, {}).get(self.figure)

    def ratio(self, over: str, under: str) -> float | None:
        """The first one's time over the second one's."""
        a, b = self.time(over), self.time(under)
        return None if a is None or b is None else a / b

    def differs(self, provider: str) -> float | None:
        """The share of its outputs that are not the Definition's bits; None for what is no such norm."""
        return self.providers.get(provider, {}).get("differs_from_definition")


def cases(name: str, dtype: str, mode: str) -> list[Case]:
    figure = str(stored(name)["figure"]).partition(",")[0]
    return [
        Case(c["M"], c["N"], dtype, mode, figure, c["providers"])
        for c in stored(name)["cases"]
        if (c["dtype"], c["mode"]) == (dtype, mode)
    ]


# --- words and figures ---------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def two_to_the(value: int) -> str:
    return f"2{superscript(value.bit_length() - 1)}"


def superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def us(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def power(value: float) -> str:
    """6.3·10⁻⁶"""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}·10{superscript(int(exponent))}"


def share_of(share: float) -> str:
    return percent(share) if share > 0.01 else power(share)


def percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def between(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    low, high = f"{min(known):.2f}", f"{max(known):.2f}"
    return low if low == high else f"{low} to {high}"


def bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def machine(facts: dict[str, Any]) -> str:
    versions = facts["versions"]
    what = facts["gpu"]["name"] if facts["gpu"] else f"{facts['cpu']}, {facts['threads']} threads"
    used = f"torch {versions['torch']}, " + (
        f"Triton {versions['triton']}" if facts["gpu"] else f"Numba {versions['numba']}"
    )
    return f"{what}; {used}; {facts['date'][:10]}, commit {facts['commit'][:7]}"


# --- the providers -------------------------------------------------------------------------------------------

_DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
_PEERS = ("torch.compile", "Liger", "QuACK", "FlashInfer", "fla", "F.rms_norm")
_SHOWN = {
    "ours": "**rmsnorm**",
    "Liger": "Liger",
    "QuACK": "QuACK",
    "FlashInfer": "FlashInfer",
    "F.rms_norm": "`F.rms_norm`",
    "torch.compile": "Definition, `torch.compile`",
    "Definition": "Definition, eager",
    "copy": "a copy of as many bytes",
}
_SIZES = ((8192, 1280), (16384, 4096))


_FROM_ELEMENTS = 1 << 25  # with fewer, launch time outweighs the time to move the bytes


@part
def in_short() -> str:
    """README: bits, speed and whole models, one sentence each."""
    outputs, differing = (_in_rows(stored("verify-cuda"), field) for field in ("outputs", "differing"))
    forward, backward = (
        between(c.ratio("copy", "ours") for c in cases("bench-cuda", "bfloat16", mode) if c.M * c.N >= _FROM_ELEMENTS)
        for mode in ("forward", "backward")
    )
    models = stored("models-cuda")
    training = [a for a in models["bounds"] if a["mode"] == "training"]

    def of(what: str, compiled: bool) -> str:
        return between(a["measured"] for a in training if (a["of"], a["compiled"]) == (what, compiled))

    names = list(dict.fromkeys(case["model"] for case in models["cases"]))
    return bullets(
        [
            f"**Bits**: {differing} of {outputs:,} outputs on an H200 differ from those of the layer computed with "
            "exact sums.",
            f"**Speed**: on an H200 in bf16, with at least {two_to_the(_FROM_ELEMENTS)} elements, the forward pass "
            f"runs at {forward} of the speed of a copy of as many bytes, and the backward pass at {backward}.",
            f"**Models**: patched, a training step of {', '.join(names[:-1])} and {names[-1]} in eager mode takes "
            f"{of('time', False)} of the time of the model as it is, and keeps {of('kept memory', False)} of the "
            f"memory for the backward pass. Compiled, these are {of('time', True)} and {of('kept memory', True)}.",
        ]
    )


@part
def compared() -> str:
    """README: a line a provider, at a few shapes."""
    forward, backward = (
        [c for c in cases("bench-cuda", "bfloat16", mode) if (c.M, c.N) in _SIZES] for mode in ("forward", "backward")
    )
    host = stored("bench-cuda")["host_us_of_16_x_1280"]

    def row(name: str, label: str) -> list[str]:
        shares = [share for c in forward if (share := c.differs(name)) is not None]
        differ = "–" if not shares else "0" if max(shares) == 0 else share_of(max(shares))
        return [
            label,
            *(us(c.time(name)) for c in (*forward, *backward)),
            us(host.get(name, {}).get("forward, no_grad")),
            differ,
        ]

    sizes = [f"{mode} {c.shape}" for mode, found in (("forward", forward), ("backward", backward)) for c in found]
    header = ["µs, bf16, H200", *sizes, "host, 16 × 1280", "outputs ≠ Definition"]
    return table(header, (row(*shown) for shown in _SHOWN.items()))


# --- correctness ---------------------------------------------------------------------------------------------


def _in_rows(verified: Any, field: str, constructed: bool = False) -> int:
    """The sum of a field over all random rows of a verification, or over all constructed ones."""
    rows = [r for r in verified["rows"] if r["section"] != "all" and (r["section"] == "constructed") == constructed]
    return sum(r[field] for r in rows)


@part
def verified() -> str:
    gpu, cpu, check = stored("verify-cuda"), stored("verify-cpu"), stored("gpu-check")

    def together(result: Any, dtype: str) -> Any:
        return next(r for r in result["rows"] if r["section"] == "all" and r["name"].startswith(dtype))

    eager = {d: [together(r, d) for r in (gpu, cpu)] for d in ("bf16", "fp16", "fp32")}
    share = {d: [share_of(row["eager_share"]) for row in rows] for d, rows in eager.items()}
    largest = max(row["eager_ulp"] for d in ("bf16", "fp16") for row in eager[d])
    compared, differing = (sum(c[field] for c in check["checks"]) for field in ("compared", "differing"))
    results = "../benchmarks/results"
    random, built = _in_rows(gpu, "outputs"), _in_rows(gpu, "outputs", True)
    wrong, on_cpu, apart = (
        _in_rows(result, field)
        for result, field in ((gpu, "differing"), (cpu, "differing"), (gpu, "from_cpu"))
    )  # fmt: skip
    return bullets(
        [
            f"`rmsnorm verify` compares {gpu['outputs']:,} outputs on the GPU and {cpu['outputs']:,} on the CPU. Of "
            f"these, {random:,} are of random rows: {wrong} differ from *exact* on the GPU, {on_cpu} on the CPU, and "
            f"{apart} differ between the two.",
            f"The other {built:,} are of rows constructed so that the order of an fp64 sum decides a bit: "
            f"{_in_rows(gpu, 'differing', True):,} differ from *exact* on the GPU and "
            f"{_in_rows(cpu, 'differing', True):,} on the CPU.",
            f"`tests/kernels/gpu_check.py` compares {compared:,} more outputs on the GPU, of which {differing} differ: "
            "every width from 1 to 1024, tensors beyond 2³¹ elements, CUDA graphs, four streams, and calls that C++ "
            f"makes beside calls that Python makes. {_outcomes_of(check['checks'])}",
            f"Against the class run eagerly, {share['bf16'][0]} of bf16 outputs and {share['fp16'][0]} of fp16 outputs "
            f"differ on the GPU, {share['bf16'][1]} and {share['fp16'][1]} on the CPU, by at most {largest:.0f} ulp. "
            f"In fp32, where the class's own sum is off in the last bits, {share['fp32'][0]} differ on the GPU and "
            f"{share['fp32'][1]} on the CPU.",
            f"Machines: {machine(gpu['machine'])} ([verify-cuda.json]({results}/verify-cuda.json)); "
            f"{machine(cpu['machine'])} ([verify-cpu.json]({results}/verify-cpu.json)); {check['device']}, commit "
            f"{check['commit'][:7]} ([gpu-check.json]({results}/gpu-check.json)).",
        ]
    )


def _outcomes_of(checks: list[dict[str, Any]]) -> str:
    # A tool of compute-sanitizer begins each line of its output with "=========".
    reasons = {c["name"]: re.split(r"(?:: )?=====|\n", c["wrong"][0])[0] for c in checks if c["state"] == "red"}
    failed = [f"{name} ({reason})" for name, reason in reasons.items()]
    passed = sum(c["state"] == "green" for c in checks)
    return f"{passed} of its {len(checks)} checks passed" + (
        f"; failed: {', '.join(failed)}; [LOG.md](../benchmarks/LOG.md) says what is known of it." if failed else "."
    )


# --- speed on a GPU ------------------------------------------------------------------------------------------


def _times(name: str, dtype: str, mode: str) -> str:
    measured = cases(name, dtype, mode)
    providers = [p for p in measured[0].providers if any(c.time(p) is not None for c in measured)]
    rows = [[c.shape, *(us(c.time(p)) for p in providers), between([c.ratio("copy", "ours")])] for c in measured]
    return table([f"µs, {_DTYPES[dtype]}", *providers, "our speed / copy's"], rows)


@part
def gpu_machine() -> str:
    result = stored("bench-cuda")
    return f"Machine: {machine(result['machine'])}. Our kernel: `{result['kernel']}`."


@part
def gpu_forward() -> str:
    return _times("bench-cuda", "bfloat16", "forward")


@part
def gpu_backward() -> str:
    return _times("bench-cuda", "bfloat16", "backward")


@part
def gpu_add_forward() -> str:
    return _times("bench-cuda", "bfloat16", "add-forward")


@part
def gpu_add_backward() -> str:
    return _times("bench-cuda", "bfloat16", "add-backward")


@part
def gpu_others() -> str:
    """What the tables leave out."""
    sliced = cases("bench-cuda", "bfloat16", "strided-forward")[0]
    whole = next(c for c in cases("bench-cuda", "bfloat16", "forward") if c.shape == sliced.shape)
    lines = stored("bench-cuda")["line"]
    sizes = [size["M"] * size["N"] for size in lines["ours"]["sizes"]]
    rounding = [
        share
        for dtype in ("bfloat16", "float16")
        for mode in ("forward", "add-forward")
        for c in cases("bench-cuda", dtype, mode)
        for name in _PEERS
        if name != "Liger" and (share := c.differs(name)) is not None
    ]

    def speeds(dtype: str) -> str:
        found = []
        for mode in ("forward", "backward"):
            measured = cases("bench-cuda", dtype, mode)
            lowest = min(measured, key=lambda c: c.ratio("copy", "ours") or 1)
            of_copy = between(c.ratio("copy", "ours") for c in measured)
            found.append(f"{mode} at {of_copy} of a copy's speed (lowest: {lowest.shape})")
        return ", ".join(found)

    def line(name: str) -> str:
        return f"{lines[name]['fixed_us']:.1f} µs plus its bytes at {lines[name]['gb_per_s']:.0f} GB/s"

    off = max(abs(size["deviation"]) for size in lines["ours"]["sizes"])
    return bullets(
        [
            f"Rows with gaps, as DeepSeek's `kv_a_layernorm` gets them ({sliced.N} columns of rows that lie "
            f"{sliced.N + 64} columns apart), take {us(sliced.time('ours'))} µs; the same rows without gaps take "
            f"{us(whole.time('ours'))} µs.",
            f"fp32 runs {speeds('float32')}.",
            f"fp16 runs {speeds('float16')}.",
            f"At {lines['ours']['sizes'][0]['N']} columns of bf16, from {two_to_the(min(sizes))} to "
            f"{two_to_the(max(sizes))} elements, the forward pass takes {line('ours')}, to within {off * 100:.1f} %; a "
            f"copy takes {line('copy')}.",
            f"All peers but Liger round elsewhere than the Definition: {percent(min(rounding))} to "
            f"{percent(max(rounding))} of their 16-bit outputs differ from it.",
        ]
    )


@part
def gpu_host() -> str:
    host = stored("bench-cuda")["host_us_of_16_x_1280"]
    kinds = {"forward, no_grad": "forward, no gradient", "forward": "forward, with gradient", "backward": "backward"}
    rows = [[name, *(us(times.get(kind)) for kind in kinds)] for name, times in host.items()]
    return table(["µs of host time", *kinds.values()], rows)


@part
def gpu_peers_ahead() -> str:
    """Every case in which another norm takes at least 1 % less time than ours."""
    rows = []
    for mode in ("forward", "backward", "add-forward", "add-backward"):
        for peer in _PEERS:
            ahead = [
                f"{short} {c.shape}: {percent(1 - ratio)}"
                for dtype, short in _DTYPES.items()
                for c in cases("bench-cuda", dtype, mode)
                if (ratio := c.ratio(peer, "ours")) is not None and ratio <= 0.99
            ]
            if ahead:
                rows.append([MODES[mode].title, peer, "; ".join(ahead)])
    return table(["mode", "peer", "takes less time than ours, by"], rows).replace("---:", "---")


@part
def layernorm() -> str:
    def row(label: str, name: str) -> list[str]:
        ratios = (
            between(c.ratio("LayerNorm", name) for dtype in _DTYPES for c in cases("bench-cuda", dtype, mode))
            for mode in ("forward", "backward")
        )
        return [label, *ratios]

    rows = [row("`F.rms_norm`", "F.rms_norm"), row("rmsnorm", "ours"), row("a copy of as many bytes", "copy")]
    return table(["speed relative to `F.layer_norm`", "forward", "backward"], rows)


def _missed(name: str) -> str:
    bounds = stored(name)["bounds"]
    rows = []
    for bound in bounds:
        case, _, peer = bound["what"].removesuffix(" / ours").replace(" x ", " × ").partition(": ")
        if not bound["met"]:
            rows.append([f"{case}, relative to {peer}", f"{bound['measured']:.3f}", f"{bound['at_least']:.3f}"])
    missed = table(["aim that is not met", "our speed", "aim: at least"], rows)
    return f"{len(bounds) - len(rows)} of {len(bounds)} aims are met. The others:\n\n{missed}"


@part
def gpu_aims() -> str:
    return _missed("bench-cuda")


# Modes of gated norms, and what each is.
_GATED = {
    "gated-forward": "Qwen3-Next, forward",
    "gated-backward": "Qwen3-Next, backward",
    "gate-first-forward": "Mamba 2, 8 groups, forward",
    "gate-first-backward": "Mamba 2, 8 groups, backward",
}


@part
def gpu_gated() -> str:
    """Gated norms beside those of other libraries."""
    name = "bench-gated-cuda"
    if not is_stored(name):
        return ""
    rows = [(c, what) for mode, what in _GATED.items() for d in ("bfloat16", "float32") for c in cases(name, d, mode)]
    providers = [p for p in rows[0][0].providers if any(c.time(p) is not None for c, _ in rows)]
    cells = [
        [
            f"{what}, {_DTYPES[c.dtype]}, {c.shape}",
            *(us(c.time(p)) for p in providers),
            between([c.ratio("ours", "copy")]),
        ]
        for c, what in rows
    ]
    times = table(["µs", *providers, "our time / copy's"], cells)
    return f"Machine: {machine(stored(name)['machine'])}.\n\n{times}\n\n{_missed(name)}"


# --- speed on a CPU ------------------------------------------------------------------------------------------


@part
def cpu_machine() -> str:
    return f"Machine: {machine(stored('bench-cpu')['machine'])}; a quick run on a shared machine."


_CPU_MODES = {"forward": "forward", "training": "forward and backward"}


@part
def cpu_times() -> str:
    measured = [
        c for dtype in ("bfloat16", "float32") for mode in _CPU_MODES for c in cases("bench-cpu", dtype, mode)
    ]  # fmt: skip
    providers = list(measured[0].providers)
    rows = [
        [f"{_DTYPES[c.dtype]} {c.shape}, {_CPU_MODES[c.mode]}", *(us(c.time(p)) for p in providers)] for c in measured
    ]
    return table(["µs", *providers], rows)


@part
def cpu_layernorm() -> str:
    def row(label: str, one: bool) -> list[str]:
        ratios = (
            between(
                c.ratio("LayerNorm", "ours")
                for dtype in ("bfloat16", "float32")
                for c in cases("bench-cpu", dtype, mode)
                if (c.M == 1) == one
            )
            for mode in _CPU_MODES
        )
        return [label, *ratios]

    rows = [row("512 and 8192 rows", one=False), row("one row", one=True)]
    return table(["speed relative to `F.layer_norm`", *_CPU_MODES.values()], rows)


@part
def cpu_aims() -> str:
    return _missed("bench-cpu")


# --- predictions ---------------------------------------------------------------------------------------------

_WITHIN = 0.15


@part
def predicted() -> str:
    """How far our times in the benchmark are from what `rmsnorm report` predicts on this GPU."""
    rate = rate_on(stored("bench-cuda")["machine"], None)
    assert rate is not None
    errors = {}
    for mode, phase in (("forward", "inference"), ("backward", "backward")):
        for dtype, short in _DTYPES.items():
            for c in cases("bench-cuda", dtype, mode):
                us_of_ours = c.time("ours")
                if c.M * c.N >= _FROM_ELEMENTS and us_of_ours is not None:
                    counts = cost((c.M, c.N), getattr(torch, dtype), phase=phase, device="cuda")  # type: ignore[arg-type]
                    seconds = rate.seconds(Work(counts.moved, counts.kernels))
                    errors[f"{short} {c.shape} {mode}"] = seconds * 1e6 / us_of_ours - 1
    far = {case: error for case, error in errors.items() if abs(error) > _WITHIN}
    typical = sorted(map(abs, errors.values()))[len(errors) // 2]
    others = "".join(
        f" {case} is predicted {abs(error) * 100:.1f} % too {'short' if error < 0 else 'long'}."
        for case, error in far.items()
    )
    return (
        f"Of the {len(errors)} cases of at least {two_to_the(_FROM_ELEMENTS)} elements, forward and backward in three "
        f"dtypes, {len(errors) - len(far)} are predicted to within {percent(_WITHIN)}, and half to within "
        f"{typical * 100:.1f} %.{others} The prediction assumes {rate.efficiency * 100:.1f} % of {rate.name}, and "
        f"{rate.launch * 1e6:.1f} µs a kernel. Both numbers are fitted to the forward pass in bf16 at one width."
    )


# --- a model, and the first call -----------------------------------------------------------------------------


@part
def model() -> str:
    r = stored("report-cuda")
    exact = sum(n["differ_from_exact"] for n in r["norms"])
    proven = sum(n["left_because"] is None for n in r["norms"])

    def ms(pair: Any) -> list[str]:
        return [f"{pair[f'{when}_us'] / 1e3:.2f} ms" for when in ("before", "after")]

    def step(pair: Any) -> list[str]:
        return [f"{pair[when]['median_us'] / 1e3:.1f} ms" for when in ("before", "after")]

    saved = [f"{r['saved_for_backward'][f'{when}_bytes'] / 1e6:,.0f} MB" for when in ("before", "after")]
    rows = [
        ["all norms, forward", *ms(r["sum_forward"])],
        ["all norms, forward and backward", *ms(r["sum_forward_backward"])],
        ["all norms, one token", *ms(r["sum_one_token"])],
        ["whole model, forward", *step(r["forward_step"])],
        ["whole model, training step", *step(r["training_step"])],
        ["saved for the backward pass", *saved],
    ]
    head = (
        f"{proven} of {len(r['norms'])} norms are proven; {exact} of their outputs differ from *exact*. "
        f"{r['model']['tokens']:,} tokens, {r['model']['dtype']}. Machine: {machine(r['machine'])}."
    )
    return f"{head}\n\n{table(['', 'model as it is', 'patched'], rows)}"


def _milliseconds(found: dict[str, Any] | None) -> str:
    return "–" if found is None or "no_time" in found else f"{found['median_us'] / 1e3:.2f}"


def _ratio(found: dict[str, Any] | None, which: str = "over_as_is") -> str:
    ratio = found and found.get(which)
    if not ratio:
        return "–"
    interval = "" if ratio["low"] is None else f" ({ratio['low']:.3f} to {ratio['high']:.3f})"
    return f"{ratio['ratio']:.3f}{interval}"


def _kept(found: dict[str, Any] | None, as_is: dict[str, Any] | None) -> str:
    """The memory kept for the backward pass, relative to the model as it is."""
    if not found or not as_is or not found["kept_bytes"] or not as_is["kept_bytes"]:
        return "–"
    return f"{found['kept_bytes'] / as_is['kept_bytes']:.2f}"


@part
def whole_models() -> str:
    """Nothing until benchmarks/models.py has been run."""
    files = [name for name in ("models-cuda", "models-cuda-qwen3-next") if is_stored(name)]
    parts = [part for name in files for part in _models(stored(name))]
    if is_stored("models-cuda-reduce-overhead"):
        (case,) = stored("models-cuda-reduce-overhead")["cases"]
        as_is, patched = (next(v for v in case["variants"] if v["compiled"] and v["variant"] == name)
                          for name in ("as is", "patched"))  # fmt: skip
        file = "[models-cuda-reduce-overhead.json](../benchmarks/results/models-cuda-reduce-overhead.json)"
        parts.append(
            f'With `mode="reduce-overhead"`, {case["model"]}, {case["title"]}, {count(case["layers"], "layer")}: '
            f"{_milliseconds(patched)} ms patched and {_milliseconds(as_is)} as is, {_ratio(patched)} ({file})."
        )
    return "\n\n".join(parts)


def _models(r: dict[str, Any]) -> Iterator[str]:
    """The machine, the models, their times and memory, and the aims, of one result of benchmarks/models.py."""
    variants = list(dict.fromkeys(v["variant"] for case in r["cases"] for v in case["variants"]))
    aims = {(a["model"], a["mode"], a["compiled"], a["of"]): a for a in r["bounds"]}
    rows, sizes = [], {}
    for case in r["cases"]:
        sizes[case["model"]] = f"{case['model']}: {case['what']}, {count(case['layers'], 'layer')}"
        for compiled, by_name in by_compilation(case):
            if not by_name:
                continue
            shares = [aims.get((case["model"], case["mode"], compiled, of)) for of in ("compilation", "kept memory")]
            rows.append(
                [
                    f"{case['model']}, {case['title']}, {how(compiled)}",
                    *(_milliseconds(by_name.get(name)) for name in variants),
                    _ratio(by_name.get("patched")),
                    *("–" if share is None else f"{share['measured']:.2f}" for share in shares),
                    _kept(by_name.get("recomputed"), by_name.get("as is")),
                ]
            )
    header = ["ms, bf16", *variants, "patched / as is", "compilation", "kept memory", "kept memory, recomputed"]
    missed = [
        [f"{a['model']}, {a['mode']}, {how(a['compiled'])}: {a['of']}", figure(a["measured"]), aim_in_words(a),
         "yes" if a["inside_spread"] else "no"]
        for a in r["bounds"] if not a["met"]
    ]  # fmt: skip
    versions = {k: v for k, v in r["machine"]["versions"].items() if k == "transformers" or k.endswith("-kernel")}
    used = "".join(f", {name} {version}" for name, version in versions.items())
    yield f"Machine: {machine(r['machine'])}{used}."
    yield bullets(sizes.values())
    yield table(header, rows)
    yield from _recompute(r)
    yield f"{len(r['bounds']) - len(missed)} of {len(r['bounds'])} aims are met" + (
        "." if not missed else ". The others:"
    )
    if missed:
        yield table(["aim that is not met", "measured", "aim", "within the spread"], missed)


def _recompute(r: dict[str, Any]) -> Iterator[str]:
    """What recompute saves and costs; nothing in results that do not have it."""
    rows = []
    for case in r["cases"]:
        for compiled, by_name in by_compilation(case):
            share = freed_share(case, by_name)
            if share is not None:
                less = [recompute_less(by_name, what) for what in ("kept_bytes", "peak_bytes")]
                sizes = (f"{n / 1e6:,.0f}" for n in (case["saved_output_bytes"], *less) if n is not None)
                ratio = _ratio(by_name["recomputed"], "over_patched")
                rows.append([f"{case['model']}, {how(compiled)}", *sizes, f"{share:.3f}", ratio])
    if rows:
        sizes = ["norm outputs kept, MB", "less kept, MB", "lower peak, MB"]
        yield table(["recomputed relative to patched", *sizes, "share freed", "time"], rows)
    batches = r.get("batches", [])
    if batches:
        names = [found["variant"] for found in batches[0]["variants"]]
        rows = [[batches_title(one), *(f"{found['batch']}" for found in one["variants"])] for one in batches]
        yield table(["largest batch of a training step, eager", *names], rows)
    if r.get("gradients"):
        yield bullets(f"{one['model']}, {how(one['compiled'])}: {gradients_in_words(one)}." for one in r["gradients"])


def figure(measured: float) -> str:
    return f"{measured:,}" if isinstance(measured, int) else f"{measured:.3f}"


def count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


@part
def first_call() -> str:
    def row(name: str, label: str) -> list[str]:
        first = stored(name)["first_call"]
        times = (first[cache][f"{phase}_s"] for cache in ("empty_cache", "filled_cache") for phase in phases)
        return [label, *(f"{time:.1f} s" for time in times)]

    phases = ("forward", "backward")
    header = [f"{when}: {phase}" for when in ("nothing compiled before", "kernels compiled before") for phase in phases]
    return table(["", *header], [row("bench-cpu", "CPU"), row("bench-cuda", "GPU")])


@part
def cost_check() -> str:
    r = stored("gpu-cost-check")
    phases = r["phases"]
    right = {what: sum(what not in p["red"] for p in phases) for what in ("kernels", "saved", "peak")}
    return (
        f"On an {r['device']} with torch {r['torch'].partition('+')[0]}, of {len(phases)} phases the number of kernels "
        f"is right in {right['kernels']}, the saved bytes in {right['saved']} and the peak in {right['peak']}."
    )


@part
def rows_in_parts() -> str:
    """Norms whose columns are sharded, compared with the least that such a norm needs."""
    found = stored("rows-in-parts-cuda")
    names = {
        "kernel_on_part": "kernel for whole rows, run on one part",
        "all_reduce": "all-reduce alone",
        "begin": "kernel before the all-reduce",
        "finish": "kernel after the all-reduce",
        "cuda_graph": "**sharded, in a CUDA graph**",
        "eager": "**sharded, eager, queued ahead**",
        "compiled": "**sharded, compiled, queued ahead**",
        "eager_in_a_row": "sharded, eager calls in a row",
        "whole_rows": "whole rows on one GPU",
    }
    cases = found["cases"]

    def cell(case: dict[str, Any], name: str) -> str:
        medians = {key: timing["median_us"] for key, timing in case["times"].items()}
        least = medians["kernel_on_part"] + medians["all_reduce"]
        bold = name in ("cuda_graph", "eager", "compiled")
        return f"{medians[name]:.0f}" + (f" ({medians[name] / least:.2f})" if bold else "")

    header = ["µs", *(f"{c['M']} × {c['N']} {c['direction']}" for c in cases)]
    rows = [[words, *(cell(case, name) for case in cases)] for name, words in names.items()]
    bits, pair = found["bits"], {name: timing["median_us"] for name, timing in found["pair"]["times"].items()}
    q, k = found["pair"]["N"]
    return (
        f"{machine(found['machine'])}; {found['ranks']} GPUs, bf16, medians. {bits['differ']} of "
        f"{bits['compared']:,} compared outputs differ from those of whole rows.\n\n{table(header, rows)}\n\n"
        f"Two norms of {found['pair']['M']} rows, with {q} and {k} columns, take {pair['apart_in_graph']:.0f} µs in a "
        f"CUDA graph by two calls of `rms_norm`, and {pair['together_in_graph']:.0f} µs by one call of `rms_norms`."
    )


@part
def batch_invariance() -> str:
    """How many rows change with the batch, on each device on which that was counted."""
    found = [stored(name) for name in ("batch-invariance-cpu", "batch-invariance-cuda") if is_stored(name)]

    def changed(result: dict[str, Any], dtype: str, name: str) -> str:
        counts = result["changed"][dtype][name]
        return f"{counts['y']}, {counts['dx']}"

    cells = [(result, dtype) for result in found for dtype in result["changed"]]
    header = [
        f"{result['machine']['device'].upper().replace('CUDA', 'GPU')}, {_DTYPES[dtype]}" for result, dtype in cells
    ]
    lines = [[label, *(changed(*cell, name) for cell in cells)] for name, label in _INVARIANCE.items()]
    machines = "; ".join(machine(result["machine"]) for result in found)
    first = found[0]
    *sizes, last = map(str, first["batches"])
    batches = f"batches of {', '.join(sizes)} or {last} rows"
    rows = f"{first['rows']} of width {first['width']}"
    said = f"Rows of y and, after the comma, of dx that change in {batches}, out of {rows}"
    return f"{said} ({machines}):\n\n{table(['', *header], lines)}"


@part
def many_gpus() -> str:
    """Norms and training steps on several GPUs; empty if benchmarks/many_gpus.py has not been run."""
    if not is_stored("many-gpus-cuda"):
        return ""
    r = stored("many-gpus-cuda")
    parts = [f"Machine: {machine(r['machine'])}, transformers {r['machine']['versions']['transformers']}.",
             *_sharded_bits(r["bits"]), *_sharded_norms(r["norms"]), *_spread_steps(r["steps"])]  # fmt: skip
    if missing := many_result.not_measured(r):
        parts.append(f"Not measured: {'; '.join(missing)}.")
    missed = [many_result.in_words(bound) for bound in r["bounds"] if not bound["met"]]
    met = f"{len(r['bounds']) - len(missed)} of {len(r['bounds'])} aims are met"
    parts.append(met + (":\n\n" + bullets(f"missed: {one}." for one in missed) if missed else "."))
    return "\n\n".join(parts)


def _sharded_bits(cases: list[dict[str, Any]]) -> Iterator[str]:
    rows = [
        [f"{many_result.ranks(world)}, by {sharding}", f"{len(group)}", f"{sum(c['elements'] for c in group):,}",
         f"{sum(c['differing'] for c in group):,}", many_result.dw_in_words(group)]
        for (world, sharding), group in many_result.by_sharding(cases)
    ]  # fmt: skip
    if rows:
        yield table(["y, s and dx of sharded norms against one GPU", "cases", "elements", "differing", "dw"], rows)


def _sharded_norms(timed: list[dict[str, Any]]) -> Iterator[str]:
    names = WHOLE, ROWS, COLUMNS, PART, REDUCE
    rows = [
        [f"{many_result.ranks(one['world'])}, {one['direction']}, {one['rows']} × {one['width']}",
         *(us(one["times"][name]["median_us"]) for name in names), f"{many_result.over_parts(one):.2f}"]
        for one in timed
    ]  # fmt: skip
    if rows:
        yield table(["µs, bf16, eager, host time included", *names, "columns / (part + all-reduce)"], rows)


def _spread_steps(steps: list[dict[str, Any]]) -> Iterator[str]:
    rows = []
    for one in steps:
        as_is, patched = one["variants"]
        pairs = zip(many_result.shares(as_is), many_result.shares(patched), strict=True)
        rows.append(
            [
                f"{many_result.ranks(one['world'])}, {one['plan']}, {many_result.mesh_in_words(one)}, "
                f"{one['batch']} × {one['tokens']} tokens",
                *(f"{v['median_us'] / 1e3:.1f} ({v['low_us'] / 1e3:.1f} to {v['high_us'] / 1e3:.1f})"
                  for v in (as_is, patched)),
                _ratio(patched),
                *("–" if None in pair else " → ".join(f"{share:.1%}" for share in pair) for pair in pairs),
            ]
        )  # fmt: skip
    if rows:
        header = ["ms of a training step (quartiles)", "as is", "patched", "patched / as is", *many_result.SHOWN]
        yield table(header, rows)


_INVARIANCE = {
    "Definition": "Definition, eager",
    "torch.compile": "Definition, `torch.compile`",
    "F.rms_norm": "`F.rms_norm`",
    "F.rms_norm in batch_invariant": "**`F.rms_norm` in `rmsnorm.batch_invariant()`**",
    "ours": "**rmsnorm**",
}


@part
def load() -> str:
    """What was done on each device, and how each resource changed."""
    found = [stored(name) for name in ("load-cpu", "load-cuda") if is_stored(name)]
    return "\n\n".join(map(_loaded, found))


def _loaded(r: dict[str, Any]) -> str:
    said = f"{r['rounds']} rounds in {r['seconds']:.0f} s, {count(r['fault_count'], 'fault')}"
    did = ", ".join(f"{what}: {times:,}" for what, times in r["counts"].items())
    if did:
        said += f". {did[0].upper()}{did[1:]}"
    first, last = r["samples"][0], r["samples"][-1]
    verdicts = {v["resource"]: v for v in r["verdicts"]}

    def verdict(name: str) -> str:
        return "too few rounds" if name not in verdicts else "yes" if verdicts[name]["flat"] else "no"

    lines = [[name, f"{first[name]:,.0f}", f"{last[name]:,.0f}", verdict(name)] for name in first if name != "second"]
    header = ["memory in MB, otherwise a count", "first round", "last round", "constant"]
    return f"{machine(r['machine'])}: {said}.\n\n{table(header, lines)}"


# --- the command ---------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="Fill the tables of README.md and docs/ from benchmarks/results/.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if a file is not as it should be"
    )
    check = parser.parse_args().check
    changed = [file for file in files() if filled(file.read_text()) != file.read_text()]
    for file in changed:
        print(f"{file.relative_to(ROOT)} {'differs from the results: run make tables' if check else 'filled'}")
        if not check:
            file.write_text(filled(file.read_text()))
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
