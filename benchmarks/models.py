"""Times whole models with different norms, eagerly and compiled, and writes models-DEVICE.json.

    python benchmarks/models.py --out DIR                            every model, mode and variant
    python benchmarks/models.py --models llama,qwen3 --seconds 300   some models; what does not fit is left out
    python benchmarks/models.py --merge a.json b.json --out DIR      several runs as one result

The models have random weights and the widths of published models, but fewer layers, since most of the time goes into
compilation. A variant is a copy of the model that shares its weights and has other norms:

    as is          the model's own norms
    patched        rmsnorm.patch(model)
    not fused      rmsnorm.patch(model, fuse_residual=False), which differs only when compiled
    recomputed     rmsnorm.patch(model, recompute=True), which differs only in training
    Liger          Liger's Triton kernel, called with in_place=False as in `rmsnorm bench`
    F.rms_norm     torch.nn.functional.rms_norm
    no norms       the identity: what a step takes without norms

All variants of a model and a mode are called twice before any is timed. The first call compiles, from empty caches on
disk, and its time is that of the compilation. The second one is checked against the eager model as it is, and its
memory is measured: `kept` is what is allocated after the forward pass beyond what was before, `peak` the most in the
step. Then all variants are timed once in every round, in random order. A ratio is the median over the rounds of the
time divided by that of "as is", eager or compiled alike, with the confidence interval of the sign test.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rmsnorm
from rmsnorm.errors import CommandError, one_line
from rmsnorm.functional import wait_for_host
from rmsnorm.spec import Spec
from rmsnorm.tools import display, machine, results, timing
from rmsnorm.tools.bench import peers
from rmsnorm.tools.display import NOTHING, Block, Column, Table, duration, size
from rmsnorm.tools.models import architecture, library, loading, presets
from rmsnorm.tools.models.steps import Steps, copy_sharing_tensors
from rmsnorm.tools.report.steps import CONFIDENCE

AS_IS, PATCHED, NOT_FUSED, RECOMPUTED, NO_NORMS = "as is", "patched", "not fused", "recomputed", "no norms"
FEWEST_ROUNDS, MOST_ROUNDS = 9, 99
_SECONDS = 1.0  # the time limit for timing a variant, unless that gives fewer rounds than the fewest


# --- models --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model that is measured.

    Attributes:
        name: Its name on the command line and in JSON.
        what: What it is, in words.
        kind: Its model_type in transformers.
        sizes: Fields of its configuration.
        tiny: Fields that --tiny changes, beside those that all models have.
        far_off: The most by which outputs and gradients may differ from those of the eager model as it is, relative to
            their norm. bf16 alone makes up to a few percent.
    """

    name: str
    what: str
    kind: str
    sizes: dict[str, Any]
    tiny: dict[str, Any] = field(default_factory=dict)
    far_off: float = 0.1

    def config(self, transformers: Any, tiny: bool, layers: int | None) -> Any:
        """Return its configuration. Raises CommandError if the installed transformers does not have the model.

        Args:
            transformers: The library.
            tiny: Whether it is to be as small as possible.
            layers: The number of layers; None for the usual one.
        """
        sizes = _COMMON | self.sizes | (_TINY | self.tiny if tiny else {})
        if layers is not None:
            sizes["num_hidden_layers"] = layers
        if self.kind == "deepseek_ocr2_text":
            return presets.deepseek_ocr(transformers, sizes.pop("num_hidden_layers"), **sizes)
        return architecture.of_kind(self.kind, transformers, self.name)(**sizes)


_COMMON = {"vocab_size": 32000, "rms_norm_eps": peers.EPS}
_TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
_TINY_MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
_TINY_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "mlp_layer_types": ["sparse"],
}
MODELS = (
    Model("llama", "Llama 3.2 1B's widths", "llama", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64,
    }, {"head_dim": 16}),
    Model("qwen3", "Qwen3 1.7B's widths, norms of queries and keys", "qwen3", {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 6, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128,
    }, {"head_dim": 16}),
    Model("gemma2", "Gemma 2 2B's widths, norms before and after each part, eager attention", "gemma2", {
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256,
    }, {"head_dim": 16}, far_off=0.5),  # compiled, its own norms differ by 0.12, their gradients by 0.31
    Model("deepseek-v3", "DeepSeek-V3's first layers: multi-head latent attention and dense MLPs", "deepseek_v3", {
        "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 2, "num_attention_heads": 128,
        "num_key_value_heads": 128, "first_k_dense_replace": 61,
    }, _TINY_MLA),
    Model("deepseek-ocr", "DeepSeek-OCR's decoder: one layer with a dense MLP, the others with 64 experts",
          "deepseek_ocr2_text", {"num_hidden_layers": 4}, _TINY_MOE),
)  # fmt: skip


# --- modes and variants --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mode:
    """A kind of step, its sizes, and the aim for the time of a patched model relative to the model as it is."""

    name: str
    words: str
    training: bool
    batch: int
    tokens: int
    at_most: float

    @property
    def title(self) -> str:
        """Its name in tables."""
        return f"{self.words}, {self.batch} × {self.tokens} tokens"

    def shrunk(self) -> "Mode":
        """Return the mode for --tiny."""
        return dataclasses.replace(self, batch=2, tokens=min(self.tokens, 8))


MODES = (
    Mode("training", "training step", True, 4, 4096, 1.0),
    Mode("forward", "forward", False, 4, 4096, 1.0),
    Mode("token", "forward of single tokens", False, 16, 1, 1.05),
)
_COMPILATION_AT_MOST, _KEPT_AT_MOST = 1.1, 1.0

Norm = Callable[[Tensor, Tensor, Spec], Tensor]


class ReplacedNorm(nn.Module):
    """A norm that calls a function with its input, its weight and its spec."""

    def __init__(self, norm: Norm, weight: nn.Parameter, spec: Spec) -> None:
        super().__init__()
        self.norm, self.weight, self.spec = norm, weight, spec

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.spec)


def _torch_norm(x: Tensor, w: Tensor, spec: Spec) -> Tensor:
    return nn.functional.rms_norm(x, (x.shape[-1],), w + spec.offset if spec.offset else w, spec.eps)


@dataclass(frozen=True)
class Variant:
    """A way to replace the norms of a model: the arguments of `patch`, or a function; with neither they are removed.

    Attributes:
        name: Its name in tables, in JSON and on the command line.
        arguments: The arguments of `patch`.
        norm: What computes each norm instead.
        package: The package that it needs; without that package it is left out.
        only_compiled: Whether it is the same as another variant in eager mode.
        only_training: Whether it is the same as another variant without gradients.
    """

    name: str
    arguments: dict[str, Any] | None = None
    norm: Norm | None = None
    package: str = ""
    only_compiled: bool = False
    only_training: bool = False

    def missing(self) -> str:
        """Return why the variant cannot be measured here; empty if it can."""
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return ""

    def applied(self, model: Any) -> Any:
        """Return a copy of the model with these norms and the same weights. Raises CommandError if a norm stays."""
        copied = copy_sharing_tensors(model)
        if self.name == AS_IS:
            return copied
        report = rmsnorm.patch(copied, **(self.arguments or {}))
        left = [verdict.name for verdict in report.verdicts if not verdict.replaced]
        if left or not report.verdicts:
            raise CommandError(f"{type(model).__name__}: patch leaves {', '.join(left) or 'everything'} as it is")
        if self.arguments is None:
            for verdict in report.verdicts:
                assert verdict.spec is not None
                weight = copied.get_submodule(verdict.name).weight
                replaced = nn.Identity() if self.norm is None else ReplacedNorm(self.norm, weight, verdict.spec)
                copied.set_submodule(verdict.name, replaced)
        return copied


VARIANTS = (
    Variant(AS_IS),
    Variant(PATCHED, {}),
    Variant(NOT_FUSED, {"fuse_residual": False}, only_compiled=True),
    Variant(RECOMPUTED, {"recompute": True}, only_training=True),
    Variant("Liger", norm=peers.liger, package="liger_kernel"),
    Variant("F.rms_norm", norm=_torch_norm),
    Variant(NO_NORMS),
)


# --- measuring -----------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What was measured of a variant, eager or compiled.

    Attributes:
        variant: Its name.
        compiled: Whether it was compiled.
        reason: Why there are no times; empty if there are.
        first_call: The seconds of the first call.
        kept: The bytes kept for the backward pass; None on a CPU and without a backward pass.
        peak: The most bytes allocated during a step; None on a CPU.
        errors: How far outputs and gradients are from those of the eager model as it is, relative to their norm.
        samples: The seconds of a step, one for each round.
    """

    variant: str
    compiled: bool
    reason: str = ""
    first_call: float | None = None
    kept: int | None = None
    peak: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Its name in tables."""
        return f"{self.variant}, {'compiled' if self.compiled else 'eager'}"

    def to_json(self, base: "Measured | None") -> dict[str, Any]:
        """Return everything; `base` is the model as it is."""
        return {
            "variant": self.variant,
            "compiled": self.compiled,
            **(timing.summarize(self.samples).to_json() if self.samples else {"no_time": self.reason}),
            "first_call_s": None if self.first_call is None else round(self.first_call, 3),
            "kept_bytes": self.kept,
            "peak_bytes": self.peak,
            "errors": {name: error if math.isfinite(error) else None for name, error in self.errors.items()},
            "over_as_is": _ratio_to_json(self.samples, base.samples if base else []),
            "samples_us": [round(sample * 1e6, 1) for sample in self.samples],
        }


def _ratio_to_json(samples: Sequence[float], base: Sequence[float]) -> dict[str, Any] | None:
    """Return the median of the paired ratios with its interval; None without pairs."""
    if not samples or not base:
        return None
    ratios = [a / b for a, b in zip(samples, base, strict=True)]
    interval = timing.median_interval(ratios, CONFIDENCE)
    return {
        "ratio": statistics.median(ratios),
        "low": interval and interval.low,
        "high": interval and interval.high,
        "coverage": interval and interval.coverage,
    }


@dataclass(frozen=True)
class Options:
    """What is measured, and how."""

    device: torch.device
    models: tuple[Model, ...]
    modes: tuple[Mode, ...]
    variants: tuple[Variant, ...]
    compiled: dict[str, Any]
    tiny: bool
    layers: int | None
    rounds: int
    seconds: float
    cache: Path
    say: Callable[[str], None]


class Case:
    """The variants of one model in one mode: built, called, checked, timed.

    Args:
        model: The model.
        built: The model as it is.
        mode: The mode.
        options: The options.

    Attributes:
        measured: What was measured of each variant.
        steps: What runs each variant, by its index in `measured`.
    """

    def __init__(self, model: Model, built: Any, mode: Mode, options: Options) -> None:
        self.model, self.built, self.mode, self.options = model, built, mode, options
        self.measured: list[Measured] = []
        self.steps: dict[int, Steps] = {}
        self._expected: dict[str, Tensor] = {}

    def prepare(self) -> None:
        """Build every variant, compile it with the first call, check it and measure its memory with the second."""
        for compiled, variant in itertools.product((False, True), self.options.variants):
            if (variant.only_compiled and not compiled) or (variant.only_training and not self.mode.training):
                continue
            found = Measured(variant.name, compiled)
            index = len(self.measured)
            self.measured.append(found)
            self.options.say(f"{self.model.name}, {self.mode.title}: {found.label}")
            try:
                options = self.options.compiled if compiled else None
                steps = Steps(variant.applied(self.built), self.options.device, options)
                with _empty_caches(self.options.cache):
                    found.first_call = self._first_call(steps)
                self._second_call(steps, found)
            except Exception as error:  # noqa: BLE001  # a variant that cannot run is reported in the table
                found.reason = one_line(error)[:300]
                self.built.zero_grad(set_to_none=True)
            if not found.reason:
                self.steps[index] = steps

    def run(self, steps: Steps) -> None:
        """Run a step."""
        (steps.train if self.mode.training else steps.forward)(self.mode.tokens, self.mode.batch)

    def time(self) -> None:
        """Time the variants in turn."""
        calls = {str(index): lambda steps=steps: self.run(steps) for index, steps in self.steps.items()}
        fewest = self.options.rounds
        taken = timing.sample_rounds(
            calls, self.options.device, fewest=fewest, most=max(MOST_ROUNDS, fewest), seconds=_SECONDS * len(calls)
        )
        for index, samples in taken.items():
            self.measured[int(index)].samples = samples

    def _first_call(self, steps: Steps) -> float:
        _wait(self.options.device)
        start = timing.now()
        self.run(steps)
        _wait(self.options.device)
        return timing.now() - start

    def _second_call(self, steps: Steps, found: Measured) -> None:
        """Check a variant and measure its memory."""
        on_gpu = self.options.device.type == "cuda"
        before = self._reset_memory() if on_gpu else 0
        shape = self.mode.tokens, self.mode.batch
        values: dict[str, Tensor] = {}
        if self.mode.training:
            y = steps.training_outputs(*shape)
            found.kept = torch.cuda.memory_allocated() - before if on_gpu else None
            steps.backward(y)
            values["gradients"] = self.built.get_input_embeddings().weight.grad
        else:
            steps.model.eval()
            with torch.no_grad():
                y = steps.outputs(*shape)
        found.peak = torch.cuda.max_memory_allocated() - before if on_gpu else None
        values["outputs"] = y.detach().clone()
        self.built.zero_grad(set_to_none=True)
        if not self._expected:  # the first variant: the eager model as it is
            self._expected = values
        for name, value in values.items():
            expected = self._expected[name].float()
            error = ((value.float() - expected).norm() / expected.norm()).item()
            found.errors[name] = error
            if found.variant != NO_NORMS and not error <= self.model.far_off:
                found.reason = f"its {name} differ by {error:.1%} from those of the eager model as it is"

    def _reset_memory(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())

    def to_json(self) -> dict[str, Any]:
        """Return what was measured."""
        base = {found.compiled: found for found in self.measured if found.variant == AS_IS}
        return {
            "model": self.model.name,
            "what": self.model.what,
            "mode": self.mode.name,
            "title": self.mode.title,
            "at_most": self.mode.at_most,
            "layers": self.built.config.num_hidden_layers,
            "parameters": sum(p.numel() for p in self.built.parameters()),
            "variants": [found.to_json(base.get(found.compiled)) for found in self.measured],
        }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _empty_caches(folder: Path) -> Iterator[None]:
    """Let compilers use new folders below this one inside the context, where they find nothing."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    new = tempfile.mkdtemp(dir=folder)  # stays until the end: compiled code is loaded from it
    os.environ.update({name: os.path.join(new, name.lower()) for name in names})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_compiler(options: Options) -> None:
    """Compile a small function, so that the first variant does not pay for loading the compiler and its workers."""
    with _empty_caches(options.cache):
        x = torch.ones(8, 8, device=options.device, requires_grad=True)
        torch.compile(lambda t: (t.sin() * 2).sum(), **options.compiled)(x).backward()


def measure(options: Options, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure every model in every mode, until the time is spent.

    Args:
        options: What is measured.
        write: Called with the result after each case, so that nothing is lost if the run is interrupted.

    Returns:
        The result, in types that `json.dumps` takes.
    """
    transformers = library.import_transformers("this benchmark")
    start = timing.now()
    taken: dict[str, float] = {}
    result: dict[str, Any] = {
        "verb": "models",
        "machine": machine.describe(options.device),
        "tiny": options.tiny,
        "compiled_with": options.compiled,
        "missing": {variant.name: why for variant in options.variants if (why := variant.missing())},
        "left_out": [],
        "cases": [],
        "bounds": [],
        "seconds": 0.0,
    }
    options = dataclasses.replace(options, variants=tuple(v for v in options.variants if not v.missing()))
    wait_for_host()
    _start_compiler(options)
    for model in options.models:
        built = None
        for mode in options.modes:
            began = timing.now()
            if _expected_seconds(taken, mode) > options.seconds - (began - start):
                result["left_out"].append(f"{model.name}, {mode.title}")
                continue
            with library.quiet():
                if built is None:
                    config = model.config(transformers, options.tiny, options.layers)
                    built = loading.random_model(config, transformers, options.device)
                case = Case(model, built, mode, options)
                case.prepare()
                case.time()
            result["cases"].append(case.to_json())
            result["bounds"] = bounds(result["cases"])
            result["seconds"] = round(timing.now() - start, 1)
            write(result)
            taken[mode.name] = max(taken.get(mode.name, 0.0), timing.now() - began)
            del case
            torch._dynamo.reset()  # frees what was compiled, and the variants with it
    return result


def _expected_seconds(taken: Mapping[str, float], mode: Mode) -> float:
    """Return how long a case is expected to take: the longest of its mode so far, or the shortest of any mode."""
    return taken.get(mode.name, min(taken.values(), default=0.0))


# --- results -------------------------------------------------------------------------------------------------


_MUST_AGREE = "tiny", "compiled_with", "gpu", "cpu", "commit"


def merge(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return several runs as one; of a case that was measured twice, the later run counts.

    Raises:
        CommandError: If they are not of one machine, commit and way to compile, or of several versions of a package.
    """
    versions = [run["machine"]["versions"] for run in runs]
    packages = sorted({package for each in versions for package in each})
    facts = {what: [run.get(what, run["machine"].get(what)) for run in runs] for what in _MUST_AGREE}
    facts |= {f"the version of {package}": [v[package] for v in versions if package in v] for package in packages}
    for what, values in facts.items():
        found = {json.dumps(value, sort_keys=True) for value in values}
        if len(found) > 1:
            raise CommandError(f"--merge: the runs differ in {what} ({'; '.join(sorted(found))}): give runs that agree")
    cases = {(case["model"], case["mode"]): case for run in runs for case in run["cases"]}
    return runs[0] | {
        "machine": runs[0]["machine"] | {"versions": {name: v for each in versions for name, v in each.items()}},
        "missing": {name: why for run in runs for name, why in run["missing"].items()},
        "left_out": [],
        "cases": list(cases.values()),
        "bounds": bounds(list(cases.values())),
        "seconds": round(sum(run["seconds"] for run in runs), 1),
    }


def bounds(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the aims for the patched model relative to the model as it is, and what was measured."""
    found = []
    for case in cases:
        for compiled in (False, True):
            by_name = {v["variant"]: v for v in case["variants"] if v["compiled"] == compiled}
            if not {AS_IS, PATCHED} <= by_name.keys():
                continue
            as_is, patched = by_name[AS_IS], by_name[PATCHED]
            what = {"model": case["model"], "mode": case["mode"], "compiled": compiled}
            ratio = patched["over_as_is"]
            if ratio is not None:
                low = ratio["ratio"] if ratio["low"] is None else ratio["low"]
                found.append(what | _bound("time", ratio["ratio"], case["at_most"], low))
            if compiled and None not in (patched["first_call_s"], as_is["first_call_s"]):
                share = patched["first_call_s"] / as_is["first_call_s"]
                found.append(what | _bound("compilation", share, _COMPILATION_AT_MOST, share))
            if patched["kept_bytes"] and as_is["kept_bytes"]:
                share = patched["kept_bytes"] / as_is["kept_bytes"]
                found.append(what | _bound("kept memory", share, _KEPT_AT_MOST, share))
    return found


def _bound(of: str, measured: float, at_most: float, low: float) -> dict[str, Any]:
    met = measured <= at_most
    spread = not met and low <= at_most
    return {"of": of, "measured": measured, "at_most": at_most, "met": met, "inside_spread": spread}


def blocks(result: dict[str, Any]) -> Iterator[Block]:
    """Yield what is printed of a result."""
    yield machine.headline(result["machine"])
    yield f"compiled with torch.compile({', '.join(f'{k}={v!r}' for k, v in result['compiled_with'].items())})"
    columns = (
        Column("", words=True), Column("step"), Column("quartiles"), Column("/ as is", words=True),
        Column("first call"), Column("kept"), Column("peak"),
    )  # fmt: skip
    for case in result["cases"]:
        of_model = f"{case['model']} ({case['what']}, {case['layers']} layer{'s' if case['layers'] > 1 else ''})"
        title = f"{of_model}, {case['title']}"
        yield Table(title, columns, tuple(_row(found) for found in case["variants"]))
    yield ""
    for case in result["cases"]:
        for found in case["variants"]:
            if "no_time" in found:
                label = f"{found['variant']}, {'compiled' if found['compiled'] else 'eager'}"
                yield f"{case['model']}, {case['mode']}, {label}: not timed: {found['no_time']}"
    for name, why in result["missing"].items():
        yield f"{name} was not measured: {why}"
    if result["left_out"]:
        yield f"no time was left for: {'; '.join(result['left_out'])}; give more --seconds, or measure them apart"
    met = sum(bound["met"] for bound in result["bounds"])
    yield f"{met} of {len(result['bounds'])} aims for patched / as is are met in {duration(result['seconds'], 3)}"
    for bound in result["bounds"]:
        if not bound["met"]:
            yield f"  missed: {in_words(bound)}"


def in_words(bound: dict[str, Any]) -> str:
    """Return what was measured for an aim."""
    how = "compiled" if bound["compiled"] else "eager"
    spread = ", within the spread" if bound["inside_spread"] else ""
    figures = f"{bound['measured']:.3f}, aim: at most {bound['at_most']:.2f}{spread}"
    return f"{bound['model']}, {bound['mode']}, {how}: {bound['of']} {figures}"


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    label = f"{found['variant']}, {'compiled' if found['compiled'] else 'eager'}"
    times = (NOTHING, NOTHING)
    if "no_time" not in found:
        median, low, high = (found[f"{figure}_us"] / 1e6 for figure in ("median", "low", "high"))
        times = duration(median), f"{duration(low, 3)} to {duration(high, 3)}"
    memory = (size(found[f"{what}_bytes"], 3) for what in ("kept", "peak"))
    return (label, *times, _ratio_in_words(found), duration(found["first_call_s"], 3), *memory)


def _ratio_in_words(found: dict[str, Any]) -> str:
    ratio = found["over_as_is"]
    if ratio is None or found["variant"] == AS_IS:
        return NOTHING
    if ratio["low"] is None:
        return f"{ratio['ratio']:.3f}"
    spread = "; within the spread" if ratio["low"] <= 1 <= ratio["high"] else ""
    return f"{ratio['ratio']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}{spread})"


# --- the command ---------------------------------------------------------------------------------------------


def _named(known: Sequence[Any], what: str) -> Callable[[str], tuple[Any, ...]]:
    """Return what parses names that are separated by commas."""

    def parse(text: str) -> tuple[Any, ...]:
        by_name = {item.name: item for item in known}
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in by_name:
                raise argparse.ArgumentTypeError(f"{name!r} is not a {what}: give one of {', '.join(by_name)}")
        return tuple(item for item in known if item.name in names)

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, known in (("model", MODELS), ("mode", MODES), ("variant", VARIANTS)):
        names = ", ".join(item.name for item in known)
        parser.add_argument(
            f"--{option}s",
            type=_named(known, option),
            default=known,
            metavar="NAME,…",
            help=f"of {names}; default: all",
        )
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument(
        "--repetitions", type=int, default=FEWEST_ROUNDS, metavar="N",
        help="the fewest samples of each variant (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=570.0, metavar="S",
        help="a model and mode that is not expected to fit is left out (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, metavar="N", help="the number of layers of every model")
    parser.add_argument("--backend", default="inductor", help="the backend of torch.compile (default: %(default)s)")
    parser.add_argument("--compile-mode", metavar="MODE", help="the mode of torch.compile, such as reduce-overhead")
    parser.add_argument(
        "--tiny", action="store_true", help="one layer and a few tokens: tries the script, also on a CPU"
    )
    parser.add_argument("--out", type=Path, help="a folder for models-DEVICE.json")
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="FILE", help="merge these results instead of measuring"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(arguments)
    for option in ("repetitions", "layers"):
        if (value := getattr(given, option)) is not None and value < 1:
            parser.error(f"--{option} {value}: give at least 1")

    def write(result: dict[str, Any]) -> None:
        if given.out is not None:
            results.write_json(given.out / f"models-{result['machine']['device']}.json", result)

    if given.out is not None:
        results.check_folder(given.out)
    if given.merge:
        result = merge([_load(path) for path in given.merge])
        write(result)
    else:
        device = machine.find_device(given.device)
        # Without a mode that torch.compile takes, its default.
        compiled = {"backend": given.backend} | ({"mode": given.compile_mode} if given.compile_mode else {})
        variants = tuple(v for v in VARIANTS if v.name == AS_IS or v in given.variants)
        modes = tuple(mode.shrunk() for mode in given.modes) if given.tiny else given.modes
        with tempfile.TemporaryDirectory(prefix="rmsnorm-models-", ignore_cleanup_errors=True) as cache:
            options = Options(
                device, given.models, modes, variants, compiled, given.tiny, given.layers, given.repetitions,
                given.seconds, Path(cache), lambda what: print(f"… {what}", file=sys.stderr, flush=True),
            )  # fmt: skip
            result = measure(options, write)
    print(display.render(blocks(result), display.terminal_width()), end="")


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CommandError(f"--merge {path}: {one_line(error)}") from None
    if not isinstance(found, dict) or found.get("verb") != "models":
        raise CommandError(f"--merge {path}: give the JSON of a run of models.py")
    return found


if __name__ == "__main__":
    try:
        main()
    except CommandError as error:
        sys.exit(f"models.py: {error}")
