"""Builds, checks and times the variants of models, and measures their memory."""

import contextlib
import dataclasses
import itertools
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmsnorm import memory
from rmsnorm.errors import one_line
from rmsnorm.functional import wait_for_host
from rmsnorm.tools import machine, timing
from rmsnorm.tools.models import library, loading
from rmsnorm.tools.models.steps import Steps
from rmsnorm.tools.report.steps import CONFIDENCE
from whole_models import batches, gradients
from whole_models import result as results
from whole_models.definitions import (
    AS_IS,
    BATCHES,
    CASES,
    GRADIENTS,
    NO_NORMS,
    PATCHED,
    RECOMPUTED,
    Mode,
    Model,
    Options,
    replaced_norms,
    variant_named,
)

FEWEST_ROUNDS, MOST_ROUNDS = 9, 99
_SECONDS = 1.0  # the time limit for timing a variant, unless that gives fewer rounds than the fewest


@dataclass
class Measured:
    """What was measured of a variant, eager or compiled.

    Attributes:
        variant: Its name.
        compiled: Whether it was compiled.
        reason: Why there are no times; empty if there are.
        first_call: The seconds of the first call.
        kept: The bytes that the forward pass leaves allocated; None without a backward pass.
        peak: The most bytes allocated during a step, beyond what was before.
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

    def to_json(self, as_is: "Measured | None", patched: "Measured | None") -> dict[str, Any]:
        """Return everything, with the times relative to those of the model as it is and of the patched model."""
        return {
            "variant": self.variant,
            "compiled": self.compiled,
            **(timing.summarize(self.samples).to_json() if self.samples else {"no_time": self.reason}),
            "first_call_s": None if self.first_call is None else round(self.first_call, 3),
            "kept_bytes": self.kept,
            "peak_bytes": self.peak,
            "errors": {name: error if math.isfinite(error) else None for name, error in self.errors.items()},
            "over_as_is": ratio_to_json(self.samples, as_is.samples if as_is else []),
            "over_patched": ratio_to_json(self.samples, patched.samples if patched else []),
            "samples_us": [round(sample * 1e6, 1) for sample in self.samples],
        }


def ratio_to_json(samples: Sequence[float], base: Sequence[float]) -> dict[str, Any] | None:
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
        saved_outputs: The bytes of the norm outputs that other operators save for the backward pass of the patched
            model in eager mode, which are what recompute can free; None without that model or a backward pass.
    """

    def __init__(self, model: Model, built: Any, mode: Mode, options: Options) -> None:
        self.model, self.built, self.mode, self.options = model, built, mode, options
        self.measured: list[Measured] = []
        self.steps: dict[int, Steps] = {}
        self.saved_outputs: int | None = None
        self._expected: dict[str, Tensor] = {}

    def prepare(self) -> None:
        """Build every variant, compile it with the first call, check it and measure its memory with the second."""
        for compiled, variant in itertools.product(self.model.ways, self.options.variants):
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

    def count_saved_outputs(self) -> None:
        """Count the bytes of norm outputs that recompute can free."""
        patched = variant_named(PATCHED, self.options.variants)
        if not self.mode.training or patched is None:
            return
        model = patched.applied(self.built)
        with memory.saved_outputs(replaced_norms(self.built, model)) as outputs:
            Steps(model, self.options.device).training_outputs(self.mode.tokens, self.mode.batch)
        self.saved_outputs = sum(output.nbytes for output in outputs if output.saved)

    def _second_call(self, steps: Steps, found: Measured) -> None:
        """Check a variant and measure its memory."""
        device, shape = self.options.device, (self.mode.tokens, self.mode.batch)
        values: dict[str, Tensor] = {}
        if self.mode.training:
            forward = memory.allocated(lambda: steps.training_outputs(*shape), device)
            y = forward.result
            backward = memory.allocated(lambda: steps.backward(y), device)
            found.kept = forward.kept
            if forward.peak is not None and forward.kept is not None and backward.peak is not None:
                found.peak = max(forward.peak, forward.kept + backward.peak)
            values["gradients"] = self.built.get_input_embeddings().weight.grad
        else:
            steps.model.eval()
            with torch.no_grad():
                forward = memory.allocated(lambda: steps.outputs(*shape), device)
            y, found.peak = forward.result, forward.peak
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

    def to_json(self) -> dict[str, Any]:
        """Return what was measured."""
        by_name = {(found.variant, found.compiled): found for found in self.measured}
        return {
            "model": self.model.name,
            "what": self.model.what,
            "mode": self.mode.name,
            "title": self.mode.title,
            "at_most": self.mode.at_most,
            "layers": self.built.config.num_hidden_layers,
            "parameters": sum(p.numel() for p in self.built.parameters()),
            "saved_output_bytes": self.saved_outputs,
            "variants": [
                found.to_json(by_name.get((AS_IS, found.compiled)), by_name.get((PATCHED, found.compiled)))
                for found in self.measured
            ],
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


class Run:
    """Everything that is asked for, until the time is spent.

    Args:
        options: What is measured.
        write: Called with the result after each part, so that nothing is lost if the run is interrupted.
    """

    def __init__(self, options: Options, write: Callable[[dict[str, Any]], None]) -> None:
        self.transformers = library.import_transformers("this benchmark")
        self.write, self.start, self.taken = write, timing.now(), dict[str, float]()
        missing = {variant.name: why for variant in options.variants if (why := variant.missing())}
        self.options = dataclasses.replace(options, variants=tuple(v for v in options.variants if not v.missing()))
        self.sections = set(options.sections)
        if not any(mode.training for mode in options.modes) or not self._names({PATCHED, RECOMPUTED}):
            self.sections &= {CASES}
        elif BATCHES in self.sections and options.device.type != "cuda":
            missing["the largest batch"] = "the memory of a CPU cannot be limited"
            self.sections -= {BATCHES}
        self.result: dict[str, Any] = {
            "verb": "models",
            "machine": machine.describe(options.device),
            "tiny": options.tiny,
            "compiled_with": options.compiled,
            "missing": missing,
            "left_out": [],
            "cases": [],
            "gradients": [],
            "batches": [],
            "bounds": [],
            "seconds": 0.0,
        }

    def _names(self, names: set[str]) -> bool:
        return names <= {variant.name for variant in self.options.variants}

    def measure(self) -> dict[str, Any]:
        """Measure every model; return the result, in types that `json.dumps` takes."""
        wait_for_host()
        _start_compiler(self.options)
        for model in self.options.models:
            self._measure_model(model)
        return self.result

    def _measure_model(self, model: Model) -> None:
        build = cache(lambda: self._build(model, self.options.layers))
        for mode in self.options.modes if CASES in self.sections else ():
            with self._part(f"{model.name}, {mode.title}", mode.name) as fits:
                if fits:
                    case = Case(model, build(), mode, self.options)
                    case.prepare()
                    case.time()
                    case.count_saved_outputs()
                    self.result["cases"].append(case.to_json())
                    del case
        if BATCHES in self.sections:
            with self._part(f"{model.name}, {BATCHES}", BATCHES) as fits:
                if fits:
                    self.result["batches"].append(batches.measure(model, build(), self.options))
        del build
        if GRADIENTS in self.sections:
            with self._part(f"{model.name}, {GRADIENTS}", GRADIENTS) as fits:
                if fits:
                    built = self._build(model, None if self.options.tiny else model.kinds)
                    with _empty_caches(self.options.cache):
                        self.result["gradients"] += gradients.measure(model, built, self.options)

    def _build(self, model: Model, layers: int | None) -> Any:
        config = model.config(self.transformers, self.options.tiny, layers)
        return loading.random_model(config, self.transformers, self.options.device)

    @contextlib.contextmanager
    def _part(self, title: str, kind: str) -> Iterator[bool]:
        """Yield whether a part is expected to fit into the time; write the result if it was measured."""
        began = timing.now()
        if _expected_seconds(self.taken, kind) > self.options.seconds - (began - self.start):
            self.result["left_out"].append(title)
            yield False
            return
        with library.quiet():
            yield True
        self.result["bounds"] = results.bounds(self.result["cases"], self.result["gradients"])
        self.result["seconds"] = round(timing.now() - self.start, 1)
        self.write(self.result)
        self.taken[kind] = max(self.taken.get(kind, 0.0), timing.now() - began)
        torch._dynamo.reset()  # frees what was compiled, and the variants with it


def _expected_seconds(taken: Mapping[str, float], kind: str) -> float:
    """Return how long a part is expected to take: the longest of its kind so far, or the shortest of any kind."""
    return taken.get(kind, min(taken.values(), default=0.0))
