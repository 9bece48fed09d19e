"""Runs `rmsnorm cost`.

    configuration -> model on the meta device -> its proven norms -> the rows that reach them -> CostResult

transformers' own code builds the model: without weights, and without code from a repository. The norms that `patch`
proves are counted, with the shapes that reach them when the model runs on tensors without data. Times are predictions:
the time to move the bytes at a share of the published bandwidth, or to launch the kernels if that takes longer.
"""

import collections
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmsnorm.costs.counts import Cost, Phase, cost
from rmsnorm.errors import CommandError, one_line
from rmsnorm.patching.patch import patch, unpatch
from rmsnorm.patching.patch_report import PatchReport, Verdict
from rmsnorm.tools.cost.calls import calls_of_norms
from rmsnorm.tools.cost.result import (
    COLUMNS,
    RECOMPUTED,
    CostResult,
    NormCall,
    NormGroup,
    Totals,
    UncountedNorms,
)
from rmsnorm.tools.cost.sizes import matmul_flops, size_of
from rmsnorm.tools.hardware import GPUS, Gpu
from rmsnorm.tools.models import architecture, checkpoint, library
from rmsnorm.tools.models.presets import PRESETS
from rmsnorm.tools.timing import Progress

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def model_cost(target: str, progress: Progress, *, batch: int, seq: int, dtype: str, gpu: str | None) -> CostResult:
    """Count what the norms of a model cost.

    Args:
        target: The name of a preset, a config.json, or a folder that holds one.
        progress: Called before each step.
        batch: The number of sequences.
        seq: The tokens of each.
        dtype: "bfloat16", "float16" or "float32".
        gpu: A key of `hardware.GPUS`, for which times are predicted.

    Returns:
        The costs.

    Raises:
        CommandError: If the target, the GPU or the dtype is unknown, a size is negative, the configuration is
            incomplete or unknown to transformers, or transformers is missing.
    """
    start = time.perf_counter()
    for name, value in (("--batch", batch), ("--seq", seq)):
        if value < 0:
            raise CommandError(f"{name} is {value}, expected 0 or more")
    if dtype not in DTYPES:
        raise CommandError(f"--dtype is {dtype!r}, expected {', '.join(DTYPES)}")
    if gpu is not None and gpu.lower() not in GPUS:
        raise CommandError(f"--gpu is {gpu!r}, expected one of {', '.join(GPUS)}")
    read = None if target in PRESETS else _read(target)
    progress(0, 4, "importing transformers")
    transformers = library.import_transformers("cost")
    with library.quiet():
        progress(1, 4, "building the model on the meta device")
        config, notes = (PRESETS[target](transformers), ()) if read is None else _config(*read, transformers)
        model = architecture.build_on_meta(config, transformers, target)
        progress(2, 4, "proving its norms")
        with library.command_errors(f"the norms of {type(model).__name__} cannot be proven"):
            report = patch(model)
            unpatch(model)
        progress(3, 4, "running it without data")
        modules = dict(model.named_modules())
        proven = {v.name: v for v in report.replaced if _why_uncounted(v) is None}
        model.to(DTYPES[dtype])  # a cast of an output is a copy, which is saved instead, or the output itself
        calls, more = calls_of_norms({name: modules[name] for name in proven}, model, config, batch, seq)
    notes += more
    if not report.verdicts:
        raise CommandError(f"{target}: {type(model).__name__} has no RMSNorm, so there is nothing to count")
    groups = tuple(_groups(proven, modules, calls))
    where = "cpu" if gpu is None else "cuda"
    peaks = None if gpu is None else GPUS[gpu.lower()]
    inference, training = (
        {name: _totals(groups, name, DTYPES[dtype], both, where, peaks) for name in COLUMNS} for both in (False, True)
    )
    weight, master = _weights(groups, DTYPES[dtype])
    return CostResult(
        target, type(model).__name__, sum(p.numel() for p in model.parameters()), groups, tuple(_uncounted(report)),
        weight, master, batch, seq, dtype, peaks, where, cost((1, 1), device=where).derived, inference, training,
        matmul_flops(model, config, batch, seq), notes, time.perf_counter() - start,
    )  # fmt: skip


def _totals(
    groups: tuple[NormGroup, ...],
    column: str,
    dtype: torch.dtype,
    training: bool,
    device: str,
    gpu: Gpu | None,
) -> Totals:
    totals = Totals(seconds=None if gpu is None else 0.0)
    phases: tuple[Phase, ...] = ("forward", "backward") if training else ("inference",)
    recompute = column == RECOMPUTED
    implementation: Any = "ours" if recompute else column
    for g in groups:
        for call, times in collections.Counter(g.calls).items():
            for phase in phases:
                c = cost(
                    (call.rows, call.width), dtype, implementation=implementation, phase=phase, device=device,
                    cast=g.spec.cast, offset=g.spec.offset, elementwise_affine=g.weighted,
                    recompute=recompute and call.is_saved,
                )  # fmt: skip
                totals = totals.plus(c, phase, g.count * times, gpu, call.is_saved)
    return totals


def _weights(groups: tuple[NormGroup, ...], dtype: torch.dtype) -> tuple[Cost, int]:
    weighted = [g for g in groups if g.weighted]
    plain = [(g.count, cost((1, g.width), dtype)) for g in weighted]
    summed = {
        name: sum(count * getattr(c, name) for count, c in plain) for name in ("parameters", "gradients", "optimizer")
    }
    master = sum(g.count * cost((1, g.width), dtype, master=True).optimizer for g in weighted)
    return replace(cost((0, 1), dtype), **summed), master


def _groups(
    proven: dict[str, Verdict], modules: dict[str, nn.Module], calls: dict[str, tuple[NormCall, ...]]
) -> Iterator[NormGroup]:
    """NormGroup the norms whose inputs are known by what they cost, in order of appearance."""
    found: dict[Any, list[str]] = {}
    for name, verdict in proven.items():
        if name in calls:
            width = library.norm_width(modules[name])
            key = calls[name], width or next((call.width for call in calls[name]), 0), verdict.class_name, verdict.spec
            found.setdefault((*key, modules[name]._parameters.get("weight") is not None), []).append(name)
    for (called, width, cls, spec, weighted), names in found.items():
        yield NormGroup(len(names), called, width, cls, names[0], spec, weighted)


def _why_uncounted(verdict: Verdict) -> str | None:
    """Why the cost of a norm is not counted; None if it is."""
    if verdict.spec is None:
        return verdict.reason
    return None if verdict.spec.gate is None else "it has a gate, and only norms without one are counted"


def _uncounted(report: PatchReport) -> Iterator[UncountedNorms]:
    found: dict[tuple[str, str], list[str]] = {}
    for v in report.verdicts:
        if (why := _why_uncounted(v)) is not None:
            found.setdefault((v.class_name, why), []).append(v.name)
    for (cls, reason), names in found.items():
        yield UncountedNorms(len(names), cls, names[0], reason)


def _read(target: str) -> tuple[dict[str, Any], Path]:
    """Return the content of the config.json that the target names, and where it is."""
    path = Path(target)
    try:
        if path.is_dir():
            path /= "config.json"
        there = path.exists() or path.is_symlink()
    except OSError as error:
        raise CommandError(f"{target!r} cannot be read: {one_line(error)}") from None
    if not there:
        raise CommandError(f"{target!r} is neither a config.json nor a preset: give {', '.join(PRESETS)}, or a file")
    return checkpoint.read_config(path), path


def _config(content: dict[str, Any], path: Path, transformers: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the configuration of the language model, or of an encoder and a decoder of text, and notes."""
    described = architecture.describe(content, path, transformers)
    notes = () if described.outer is None else (f"{described.outer}: only its language_config is counted",)
    config = architecture.configuration(described, transformers)
    # If an encoder and a decoder of text have a configuration each, both are counted.
    encoder = getattr(config, "encoder", None) if getattr(config, "is_encoder_decoder", False) else None
    if hasattr(encoder, "get_text_config"):
        text = architecture.text_configuration(encoder, described.source)
        if size_of(text, "vocab_size"):
            return config, notes
    text = architecture.text_configuration(config, described.source)
    if text is config:
        return config, notes
    return text, (*notes, f"{described.kind}: only its language part is counted")
