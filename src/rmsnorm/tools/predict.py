"""`rmsnorm cost`: a model's norms from its configuration alone, what they cost, and what that is of a step.

The model is built by transformers' own code on the meta device: no weights, no code from a repository. The norms that
`patch` proves are counted, over the shapes that reach them when the model runs on tensors without memory. Times are
predictions: bytes at a share of the published bandwidth, or the launches where those take longer.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Has no public name, though torch documents it: the mode in which operators compute shapes alone. transformers knows
# its tensors and then asks for no values, as it would of plain tensors on the meta device.
from torch._subclasses.fake_tensor import FakeTensorMode

from rmsnorm.costs.counts import TRACED_TORCH, Cost, Implementation, Phase, cost
from rmsnorm.errors import CommandError, one_line
from rmsnorm.patching.patch import patch, unpatch
from rmsnorm.patching.patch_report import PatchReport, Verdict
from rmsnorm.spec import Spec
from rmsnorm.tools import architecture, checkpoint, display
from rmsnorm.tools.checkpoint import AtMost, CallsExhausted
from rmsnorm.tools.display import Block, Column, Table, Text
from rmsnorm.tools.hardware import GPUS, Gpu
from rmsnorm.tools.timing import Progress

# What a kernel of this kind gets of a published bandwidth, and a matrix product of a published peak.
EFFICIENCY = 0.75
# How many calls of torch the run on tensors without memory may take, a few seconds; a scan over a long sequence takes
# more, and its rows are extrapolated from two short ones.
_RUN_CALLS = 100_000
_SHORT = (16, 32)
# What it takes the host to put one eager operator on a stream.
LAUNCH_SECONDS = 5e-6
COMPARED: tuple[Implementation, ...] = ("eager", "F.rms_norm", "LayerNorm", "ours")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# --- what comes out ------------------------------------------------------------------------------------------


Call = tuple[int, int]  # rows and width of one input of a norm


@dataclass(frozen=True)
class Group:
    """Proven norms that cost the same: `count` of them, each run once a step for every entry of `calls`."""

    count: int
    calls: tuple[Call, ...]
    width: int
    cls: str
    first: str
    spec: Spec
    weighted: bool

    @property
    def rows(self) -> int:
        """Of one norm, in all of its calls of a step."""
        return sum(rows for rows, _ in self.calls)

    @property
    def parameters(self) -> int:
        """Of all of them."""
        return self.count * self.width if self.weighted else 0


@dataclass(frozen=True)
class Left:
    """Norms that `patch` does not replace, and so are not counted: of one class, for one reason."""

    count: int
    cls: str
    first: str
    reason: str


@dataclass(frozen=True)
class Totals:
    """Over all norms of one step. bytes: read and written; peak: of the one that needs most; seconds: predicted."""

    flops: int = 0
    bytes: int = 0
    kernels: int = 0
    saved: int = 0
    peak: int = 0
    seconds: float | None = None

    def plus(self, c: Cost, phase: str, count: int, gpu: Gpu | None) -> "Totals":
        seconds = None
        if gpu is not None:
            one = max(c.moved / (EFFICIENCY * gpu.bandwidth), c.kernels * LAUNCH_SECONDS)
            seconds = (self.seconds or 0.0) + count * one
        return Totals(
            self.flops + count * c.flops,
            self.bytes + count * c.moved,
            self.kernels + count * c.kernels,
            self.saved + (count * c.saved if phase == "forward" else 0),  # the backward names it again
            max(self.peak, c.peak),
            seconds,
        )


@dataclass(frozen=True)
class Result:
    """inference and training: what each implementation costs a step; training is forward and backward."""

    target: str
    model: str
    parameters: int
    norms: tuple[Group, ...]
    left: tuple[Left, ...]
    weight: Cost  # its parameter, gradient and optimizer bytes, summed over the norms
    optimizer_master: int
    batch: int
    seq: int
    dtype: str
    gpu: Gpu | None
    device: str
    derived: bool
    inference: dict[str, Totals]
    training: dict[str, Totals]
    matmul_flops: int  # of the forward pass: linear layers, attention scores, the head
    notes: tuple[str, ...]
    seconds: float
    ok: bool = field(default=True, init=False)

    @property
    def count(self) -> int:
        return sum(g.count for g in self.norms)

    @property
    def norm_parameters(self) -> int:
        return sum(g.parameters for g in self.norms)

    def step_seconds(self, training: bool) -> float | None:
        """The matrix products of a step, predicted; None without a GPU or a peak for the dtype."""
        if self.gpu is None or self.dtype == "float32":
            return None
        return (3 if training else 1) * self.matmul_flops / (EFFICIENCY * self.gpu.matmul)

    def amdahl(self, training: bool) -> tuple[float, float] | None:
        """(what share of an eager step the norms are, what share of it ours would gain)."""
        totals = self.training if training else self.inference
        rest, eager, ours = self.step_seconds(training), totals["eager"].seconds, totals["ours"].seconds
        if rest is None or eager is None or ours is None or rest + eager == 0:
            return None
        return eager / (rest + eager), (eager - ours) / (rest + eager)

    def to_json(self) -> dict[str, Any]:
        def totals(of: dict[str, Totals]) -> dict[str, Any]:
            return {name: vars(t) for name, t in of.items()}

        def amdahl(training: bool) -> dict[str, float] | None:
            shares = self.amdahl(training)
            return None if shares is None else {"norms_share": shares[0], "gain_share": shares[1]}

        return {
            "verb": "cost",
            "ok": self.ok,
            "target": self.target,
            "model": self.model,
            "parameters": self.parameters,
            "batch": self.batch,
            "seq": self.seq,
            "dtype": self.dtype,
            "norms": self.count,
            "norm_parameters": self.norm_parameters,
            "norm_parameter_bytes": self.weight.parameters,
            "norm_gradient_bytes": self.weight.gradients,
            "norm_adamw_bytes": self.weight.optimizer,
            "norm_adamw_bytes_with_master_weights": self.optimizer_master,
            "groups": [
                {
                    "count": g.count,
                    "rows": g.rows,
                    "calls": len(g.calls),
                    "width": g.width,
                    "weighted": g.weighted,
                    "class": g.cls,
                    "first": g.first,
                    "spec": vars(g.spec),
                }
                for g in self.norms
            ],
            "left": [{"count": n.count, "class": n.cls, "first": n.first, "left_because": n.reason} for n in self.left],
            "counts_of": self.device,
            "derived": self.derived,
            "gpu": None if self.gpu is None else vars(self.gpu),
            "efficiency": EFFICIENCY,
            "launch_seconds": LAUNCH_SECONDS,
            "inference": totals(self.inference),
            "training": totals(self.training),
            "matmul_flops_forward": self.matmul_flops,
            "matmul_seconds_forward": self.step_seconds(False),
            "amdahl_inference": amdahl(False),
            "amdahl_training": amdahl(True),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 1),
        }

    def table(self, verbose: bool = False) -> list[Block]:
        """What to print: what ours saves, and what the norms cost; with `verbose` each kind of norm as well."""
        details = _details(self) if verbose else [Text("\n--verbose prints each kind of norm and each count.", "note")]
        return [*_answer(self), _costs(self, verbose), *_cautions(self), *details]


# --- printing ------------------------------------------------------------------------------------------------


def _answer(result: Result) -> list[Block]:
    """The model, what ours saves a step, and what of a step that is."""
    eager, ours = result.training["eager"], result.training["ours"]
    lines: list[Block] = [
        f"{result.target}: {result.model}, {display.count(result.parameters)} parameters; {result.count} norms with "
        f"{display.count(result.norm_parameters)} of them; {result.batch} × {result.seq} tokens, {result.dtype}",
        f"ours instead of eager: {display.size(eager.saved - ours.saved)} less kept for the backward pass; a training "
        f"step moves {display.size(eager.bytes - ours.bytes)} less, in {display.count(eager.kernels - ours.kernels)} "
        "fewer kernels",
    ]
    if result.gpu is None or eager.seconds is None or ours.seconds is None:
        return [*lines, f"for predicted times give --gpu one of {', '.join(GPUS)}"]
    saved = f"predicted on {result.gpu.name}: {display.duration(eager.seconds - ours.seconds)} less a training step"
    shares = result.amdahl(True)
    if shares is not None:
        saved += f", of which the norms are {display.share(shares[0], 3)} and ours gains {display.share(shares[1], 3)}"
    return [*lines, saved]


def _costs(result: Result, verbose: bool) -> Table:
    """All norms of a step, a column an implementation."""
    figures: list[tuple[str, Callable[[Totals], str]]] = [
        ("read and written", lambda t: display.size(t.bytes)),
        ("kernels", lambda t: display.count(t.kernels)),
        ("kept for backward", lambda t: display.size(t.saved)),
    ]
    if result.gpu is not None:
        figures.append(("predicted time", lambda t: display.duration(t.seconds)))
    if verbose:
        figures += [
            ("FLOPs", lambda t: display.count(t.flops)),
            ("memory of one, at most", lambda t: display.size(t.peak)),
        ]
    rows = tuple(
        (f"{what}: {label}", *(cell(of[name]) for name in COMPARED))
        for what, of in (("inference", result.inference), ("training", result.training))
        for label, cell in figures
        if (what, label) != ("inference", "kept for backward")
    )
    status = "derived" if result.derived else f"as traced in torch {TRACED_TORCH}"
    columns = (Column("", words=True), *map(Column, COMPARED))
    return Table(f"All norms of a step, on {result.device}: {status}", columns, rows)


def _cautions(result: Result) -> list[Block]:
    """What is not in the counts, and what could make them wrong."""
    lines = [f"not counted: {n.count} × {n.cls} ({n.first}), which patch leaves: {n.reason}" for n in result.left]
    lines += [f"note: {note}" for note in result.notes]
    if result.gpu is not None and result.gpu.few_fp64:
        lines.append(f"note: {result.gpu.name} has little fp64, in which ours sums: it will fall short of this")
    return ["", *lines] if lines else []


def _details(result: Result) -> list[Block]:
    """Each kind of norm, its weights, and what the predictions rest on."""
    w = result.weight
    columns = (
        Column("first", words=True),
        *map(Column, ("count", "rows", "width")),
        *(Column(header, words=True) for header in ("what it computes", "class")),
    )
    rows = []
    for g in result.norms:
        spec = f"{g.spec.cast} cast, offset {g.spec.offset:g}" if g.weighted else "no weight"
        rows.append((g.first, f"{g.count}", _rows_of(g.calls), f"{g.width:,}", spec, g.cls))
    return [
        Table("Norms", columns, tuple(rows)),
        "",
        f"weights {display.size(w.parameters)}, their gradients {display.size(w.gradients)}, AdamW "
        f"{display.size(w.optimizer)} ({display.size(result.optimizer_master)} with fp32 weights)",
        *_predictions(result),
    ]


def _predictions(result: Result) -> list[str]:
    if result.gpu is None:
        return []
    efficiency = display.share(EFFICIENCY)
    lines = [
        f"predicted for {result.gpu.name}: bytes at {efficiency} of {display.speed(result.gpu.bandwidth)}, or "
        f"{display.duration(LAUNCH_SECONDS)} a kernel where that is more; matrix products at {efficiency} of "
        f"{display.number(result.gpu.matmul / 1e12)} TFLOP/s ({result.gpu.source})"
    ]
    for what, training in (("inference", False), ("training", True)):
        shares, rest = result.amdahl(training), result.step_seconds(training)
        totals = result.training if training else result.inference
        if shares is None or rest is None:
            continue
        norms, gain = (display.share(share, 3) for share in shares)
        step = display.duration(rest + (totals["eager"].seconds or 0.0))
        lines.append(
            f"{what}: norms are {norms} of the {step} that an eager step takes for them and its matrix products; at "
            f"most {norms} to gain, {gain} with ours"
        )
    return lines


def _rows_of(calls: tuple[Call, ...]) -> str:
    """`8,192` or, of norms that run several times a step, `2 × 8,192`; `0` of those that no input reaches."""
    counted = collections.Counter(rows for rows, _ in calls)
    return " + ".join(f"{rows:,}" if n == 1 else f"{n} × {rows:,}" for rows, n in counted.items()) or "0"


# --- counting ------------------------------------------------------------------------------------------------


def main(target: str, progress: Progress, *, batch: int, seq: int, dtype: str, gpu: str | None) -> Result:
    """What the norms of the target cost, a preset's name, a config.json, or a folder that holds one.

    Raises CommandError for an unknown target, GPU or dtype, for negative sizes, for a configuration that lacks what
    is needed or that transformers does not know, and where transformers is missing.
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
    transformers = checkpoint.transformers_for("cost")
    with checkpoint.quiet():
        progress(1, 4, "building the model on the meta device")
        config, notes = (PRESETS[target](transformers), ()) if read is None else _config(*read, transformers)
        model = architecture.build_on_meta(config, transformers, target)
        progress(2, 4, "proving its norms")
        with checkpoint.blame(f"the norms of {type(model).__name__} cannot be proven"):
            report = patch(model)
            unpatch(model)
        progress(3, 4, "running it without memory")
        modules = dict(model.named_modules())
        proven = {v.name: v for v in report.replaced}
        calls, said = _calls({name: modules[name] for name in proven}, model, config, batch, seq)
    notes += said
    if not report.verdicts:
        raise CommandError(f"{target}: {type(model).__name__} has no RMSNorm, so there is nothing to count")
    groups = tuple(_groups(proven, modules, calls))
    where = "cpu" if gpu is None else "cuda"
    peaks = None if gpu is None else GPUS[gpu.lower()]
    inference, training = (
        {str(name): _totals(groups, name, DTYPES[dtype], both, where, peaks) for name in COMPARED}
        for both in (False, True)
    )
    weight, master = _weights(groups, DTYPES[dtype])
    return Result(
        target, type(model).__name__, sum(p.numel() for p in model.parameters()), groups, tuple(_left(report)), weight,
        master, batch, seq, dtype, peaks, where, cost((1, 1), device=where).derived, inference, training,
        _matmul_flops(model, config, batch, seq), notes, time.perf_counter() - start,
    )  # fmt: skip


def _totals(
    groups: tuple[Group, ...], name: Implementation, dtype: torch.dtype, training: bool, device: str, gpu: Gpu | None
) -> Totals:
    totals = Totals(seconds=None if gpu is None else 0.0)
    phases: tuple[Phase, ...] = ("forward", "backward") if training else ("inference",)
    for g in groups:
        for (rows, width), times in collections.Counter(g.calls).items():
            for phase in phases:
                c = cost(
                    (rows, width), dtype, implementation=name, phase=phase, device=device, cast=g.spec.cast,
                    offset=g.spec.offset, elementwise_affine=g.weighted,
                )  # fmt: skip
                totals = totals.plus(c, phase, g.count * times, gpu)
    return totals


def _weights(groups: tuple[Group, ...], dtype: torch.dtype) -> tuple[Cost, int]:
    weighted = [g for g in groups if g.weighted]
    plain = [(g.count, cost((1, g.width), dtype)) for g in weighted]
    summed = {
        name: sum(count * getattr(c, name) for count, c in plain) for name in ("parameters", "gradients", "optimizer")
    }
    master = sum(g.count * cost((1, g.width), dtype, master=True).optimizer for g in weighted)
    return replace(cost((0, 1), dtype), **summed), master


def _groups(
    proven: dict[str, Verdict], modules: dict[str, nn.Module], calls: dict[str, tuple[Call, ...]]
) -> Iterator[Group]:
    """The norms whose inputs are known, by what they cost, in the order in which they come."""
    found: dict[Any, list[str]] = {}
    for name, verdict in proven.items():
        if name in calls:
            width = checkpoint.norm_width(modules[name])
            key = calls[name], width or next((w for _, w in calls[name]), 0), verdict.class_name, verdict.spec
            found.setdefault((*key, _weight(modules[name]) is not None), []).append(name)
    for (called, width, cls, spec, weighted), names in found.items():
        yield Group(len(names), called, width, cls, names[0], spec, weighted)


def _left(report: PatchReport) -> Iterator[Left]:
    found: dict[tuple[str, str], list[str]] = {}
    for v in report.not_replaced:
        found.setdefault((v.class_name, v.reason), []).append(v.name)
    for (cls, reason), names in found.items():
        yield Left(len(names), cls, names[0], reason)


def _weight(module: nn.Module) -> Tensor | None:
    return module._parameters.get("weight")


# --- the inputs of the norms ---------------------------------------------------------------------------------


def _calls(
    norms: dict[str, nn.Module], model: nn.Module, config: Any, batch: int, seq: int
) -> tuple[dict[str, tuple[Call, ...]], tuple[str, ...]]:
    """What reaches each norm in one step, and notes. A norm that is not in it has no weight and no known input."""
    if not norms:
        return {}, ()
    # A run needs at least one token; without any there are no rows.
    tokens = (batch, seq) if batch and seq else (1, 1)
    try:
        with checkpoint.blame("a run without data"):
            found = _observed(norms, model, *tokens, _RUN_CALLS)
        if not (batch and seq):
            found = {name: tuple((0, width) for _, width in called) for name, called in found.items()}
        return found, _unreached(found)
    except CommandError as error:
        reason = error
    with contextlib.suppress(CommandError), checkpoint.blame("a run without data"):
        one, two = (_observed(norms, model, 1, short, 4 * _RUN_CALLS) for short in _SHORT)
        found = {name: _extrapolated(one[name], two[name], batch, seq) for name in norms}
        short = " and ".join(map(str, _SHORT))
        said = "it takes too long" if isinstance(reason.__cause__, CallsExhausted) else str(reason)
        return found, (f"rows are extrapolated from runs of {short} tokens: of {seq:,} {said}", *_unreached(found))
    widths = {name: width for name, module in norms.items() if (width := checkpoint.norm_width(module))}
    guessed: dict[str, tuple[Call, ...]] = {
        name: ((_rows(name, width, config, batch * seq), width),) for name, width in widths.items()
    }
    notes: tuple[str, ...] = (
        f"rows are guessed by the norms' names, as the model does not run on token ids alone: {reason}",
    )
    if unknown := [name for name in norms if name not in guessed]:
        notes += (f"{len(unknown)} norms without a weight are not counted, {unknown[0]} first: their width is unknown",)
    return guessed, notes


def _unreached(found: dict[str, tuple[Call, ...]]) -> tuple[str, ...]:
    names = [name for name, called in found.items() if not called]
    return (f"{len(names)} norms are not run in a step on token ids, {names[0]} first",) if names else ()


def _observed(
    norms: dict[str, nn.Module], model: nn.Module, batch: int, seq: int, most: int
) -> dict[str, tuple[Call, ...]]:
    """What reaches the norms in a forward pass over tensors without memory. Raises what the model raises."""
    found: dict[str, list[Call]] = {name: [] for name in norms}

    def watch(name: str, width: int | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            (x,) = (a for a in (*args, *named.values()) if isinstance(a, Tensor))
            n = width or x.shape[-1]
            found[name].append((x.numel() // n, n))

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name, checkpoint.norm_width(module)), with_kwargs=True)
        for name, module in norms.items()
    ]
    with contextlib.suppress(Exception):  # transformers' form of experts in which no shape depends on the routing
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    model.eval()
    try:
        with torch.no_grad(), AtMost(most), FakeTensorMode(allow_non_fake_inputs=True):
            checkpoint.on_tokens(model, torch.zeros(batch, seq, dtype=torch.long, device="meta"))
    finally:
        for handle in hooks:
            handle.remove()
    return {name: tuple(called) for name, called in found.items()}


def _extrapolated(one: tuple[Call, ...], two: tuple[Call, ...], batch: int, seq: int) -> tuple[Call, ...]:
    """Rows as a line through those of two short sequences. Raises ValueError where the calls are not the same."""
    short, long = _SHORT
    if [width for _, width in one] != [width for _, width in two]:
        raise ValueError("the number of calls depends on the length of the sequence")
    return tuple(
        (batch * (a + (b - a) * (seq - short) // (long - short)) if batch and seq else 0, width)
        for (a, width), (b, _) in zip(one, two, strict=True)
    )


def _rows(name: str, width: int, config: Any, tokens: int) -> int:
    """A guess for a model that cannot be run: a norm of queries or keys as wide as a head runs once a head."""
    last = name.rpartition(".")[2]
    heads = _number(config, "num_attention_heads") or 1
    if width == _head_dim(config) != _number(config, "hidden_size") and last.startswith(("q_", "k_")):
        return tokens * (heads if last.startswith("q_") else _number(config, "num_key_value_heads") or heads)
    return tokens


def _number(config: Any, key: str) -> int:
    """A size of the configuration; 0 where it has none, or one for each layer, for which transformers may raise."""
    value = None
    with contextlib.suppress(Exception):
        value = getattr(config, key, None)
    return int(value) if isinstance(value, int) else 0


def _head_dim(config: Any) -> int:
    heads = _number(config, "num_attention_heads") or 1
    return _number(config, "head_dim") or _number(config, "d_kv") or _number(config, "hidden_size") // heads


def _matmul_flops(model: nn.Module, config: Any, batch: int, seq: int) -> int:
    """Of a forward pass: 2 for each weight a token meets, attention's scores and sums, and the head.

    Of experts a token meets `num_experts_per_tok`; every layer's attention is taken to see the whole sequence. Half
    of the scores are masked in a decoder's own attention, none in an encoder's and between the two.
    """
    experts = next((n for n in (_number(config, k) for k in _EXPERTS) if n), 1)
    used = _number(config, "num_experts_per_tok") or experts
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    met = 0
    for name, p in model.named_parameters():
        if p.dim() < 2 or id(p) in embeddings:
            continue
        routed = (p.dim() == 3 and p.shape[0] == experts) or (".experts." in name and p.dim() == 2)
        met += p.numel() * used // experts if routed else p.numel()
    text = getattr(config, "decoder", None) or config  # of two that have their own: the decoder's sizes
    met += _number(text, "vocab_size") * _number(text, "hidden_size")
    nope = _number(config, "qk_nope_head_dim")
    mla = nope and any(name.endswith("kv_a_layernorm") for name, _ in model.named_modules())
    heads, layers = _number(text, "num_attention_heads"), _number(text, "num_hidden_layers")
    per_layer = getattr(text, "per_layer_config", None) or []  # where layers differ, as Gemma 4's do
    if mla:
        a_layer = heads * (nope + _number(config, "qk_rope_head_dim") + _number(config, "v_head_dim"))
    elif per_layer:
        a_layer = sum(_number(c, "num_attention_heads") * 2 * _head_dim(c) for c in per_layer) // len(per_layer)
    else:
        a_layer = heads * 2 * _head_dim(text)
    parts = [part for part in ("encoder", "decoder") if isinstance(getattr(model, part, None), nn.Module)]
    if getattr(config, "is_encoder_decoder", False) and "encoder" in parts:
        encoder = _number(getattr(config, "encoder", None) or config, "num_hidden_layers")
        decoder = _number(config, "num_decoder_layers") or layers
        layers = 2 * encoder + (3 * decoder if "decoder" in parts else 0)
    return 2 * batch * seq * met + batch * seq * seq * layers * a_layer


_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


# --- the model -----------------------------------------------------------------------------------------------


def _deepseek_v2_lite(transformers: Any) -> Any:
    return architecture.of_kind("deepseek_v2", transformers, "deepseek-v2-lite")(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, kv_lora_rank=512, n_routed_experts=64,
        num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1, max_position_embeddings=163840,
    )  # fmt: skip


def _deepseek_v2(transformers: Any) -> Any:
    return architecture.of_kind("deepseek_v2", transformers, "deepseek-v2")(
        vocab_size=102400, hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=60,
        num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512, n_routed_experts=160,
        num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1, max_position_embeddings=163840,
    )  # fmt: skip


def _deepseek_v3(transformers: Any) -> Any:
    return architecture.of_kind("deepseek_v3", transformers, "deepseek-v3")()  # transformers' defaults are this model


PRESETS: dict[str, Callable[[Any], Any]] = {
    "deepseek-ocr": architecture.deepseek_ocr,
    "deepseek-ocr-40-layers": lambda transformers: architecture.deepseek_ocr(transformers, 40),
    "deepseek-v2-lite": _deepseek_v2_lite,
    "deepseek-v2": _deepseek_v2,
    "deepseek-v3": _deepseek_v3,
}


def _read(target: str) -> tuple[dict[str, Any], Path]:
    """The content of the config.json that is meant, and where it is."""
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
    """The language model's configuration, or that of an encoder and a decoder of text, and notes."""
    described = architecture.describe(content, path, transformers)
    notes = () if described.outer is None else (f"{described.outer}: its language_config alone is counted",)
    config = architecture.configuration(described, transformers)
    with checkpoint.blame(f"{described.source}: transformers finds no language model in this {described.kind}"):
        # Of an encoder and a decoder of text, which have a configuration each, both are counted.
        both = getattr(config, "is_encoder_decoder", False) and hasattr(config, "encoder")
        if both and _number(config.encoder.get_text_config(), "vocab_size"):
            return config, notes
        text = config.get_text_config()
    if text is config:
        return config, notes
    return text, (*notes, f"{described.kind}: its language part alone is counted")
