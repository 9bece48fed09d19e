"""`rmsnorm cost`: a model's norms from its configuration alone, what they cost, and what that is of a step.

The model is built by transformers' own code on the meta device: no weights, no code from a repository. Each norm is
proven as `patch` proves it, so that what is counted is what it computes. Times are predictions: bytes at a share of
the published bandwidth, or the launches where those take longer.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmsnorm import models
from rmsnorm.cost import TRACED_TORCH, Cost, Implementation, Phase, cost
from rmsnorm.errors import CommandError
from rmsnorm.hardware import GPUS, Gpu
from rmsnorm.measure import Progress
from rmsnorm.spec import Spec

# What a kernel of this kind gets of a published bandwidth, and a matrix product of a published peak.
EFFICIENCY = 0.75
# What it takes the host to put one eager operator on a stream.
LAUNCH_SECONDS = 5e-6
COMPARED: tuple[Implementation, ...] = ("eager", "F.rms_norm", "LayerNorm", "ours")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# --- what comes out ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Norms that cost the same: `count` of them, over `rows` rows of `width` columns; spec is None if not proven."""

    count: int
    rows: int
    width: int
    cls: str
    first: str
    spec: Spec | None
    reason: str = ""


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
        return sum(g.count * g.width for g in self.norms)

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
                    "width": g.width,
                    "class": g.cls,
                    "first": g.first,
                    "spec": None if g.spec is None else vars(g.spec),
                    "left_because": g.reason or None,
                }
                for g in self.norms
            ],
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

    def table(self) -> Any:
        """A rich renderable: the norms, what a step of them costs, what that is of the whole."""
        from rich.console import Group as Lines
        from rich.table import Table
        from rich.text import Text

        w = self.weight
        head = [
            f"{self.target}: {self.model}, {self.parameters:,} parameters; "
            f"{self.batch} × {self.seq} tokens, {self.dtype}",
            f"{self.count} norms, {self.norm_parameters:,} parameters: weights {_mb(w.parameters)} MB, gradients "
            f"{_mb(w.gradients)} MB, AdamW {_mb(w.optimizer)} MB ({_mb(self.optimizer_master)} MB with fp32 weights)",
        ]
        groups = Table(title="Norms")
        for column in ("count", "rows", "width"):
            groups.add_column(column, justify="right")
        for column in ("class", "what it computes", "first"):
            groups.add_column(column)
        for g in self.norms:
            spec = f"not proven: {g.reason}" if g.spec is None else f"{g.spec.cast}, offset {g.spec.offset:g}"
            groups.add_row(f"{g.count}", f"{g.rows:,}", f"{g.width:,}", g.cls, spec, g.first)
        costs = Table(title=f"All norms of a step, on {self.device}: {self._status()}")
        costs.add_column("MB: 10⁶ bytes")
        for name in COMPARED:
            costs.add_column(name, justify="right")
        for what, of in (("inference", self.inference), ("training", self.training)):
            cells: tuple[tuple[str, Callable[[Totals], str]], ...] = (
                ("MFLOP", lambda t: f"{t.flops / 1e6:,.1f}"),
                ("MB read and written", lambda t: f"{t.bytes / 1e6:,.1f}"),
                ("kernels", lambda t: f"{t.kernels:,}"),
                ("MB saved", lambda t: f"{t.saved / 1e6:,.1f}"),
                ("MB of one, at most", lambda t: f"{t.peak / 1e6:,.1f}"),
                ("ms, predicted", lambda t: "-" if t.seconds is None else f"{t.seconds * 1e3:,.3f}"),
            )
            for label, cell in cells:
                if (label.startswith("MB saved") and what == "inference") or (self.gpu is None and "ms" in label):
                    continue
                costs.add_row(f"{what}: {label}", *(cell(of[name]) for name in COMPARED))
            costs.add_section()
        below = [*self._conclusions(), *(f"note: {note}" for note in self.notes)]
        return Lines(*map(Text, head), groups, costs, *map(Text, below))

    def _status(self) -> str:
        return "derived" if self.derived else f"as traced in torch {TRACED_TORCH}"

    def _conclusions(self) -> list[str]:
        eager, ours = self.training["eager"], self.training["ours"]
        lines = [
            f"ours instead of eager: {_mb(eager.saved - ours.saved)} MB less kept for the backward pass, and "
            f"{_mb(eager.bytes - ours.bytes)} MB less moved in {eager.kernels - ours.kernels:,} fewer kernels "
            "a training step"
        ]
        if eager.seconds is not None and ours.seconds is not None:
            lines[0] += f", predicted to save {(eager.seconds - ours.seconds) * 1e3:,.3f} ms"
        if self.gpu is None:
            known = ", ".join(GPUS)
            return [*lines, f"for predicted times: --gpu with one of {known}"]
        lines.append(
            f"predicted for {self.gpu.name}: bytes at {EFFICIENCY:.0%} of {self.gpu.bandwidth / 1e12:g} TB/s, or "
            f"{LAUNCH_SECONDS * 1e6:g} us a kernel where that is more; matrix products at {EFFICIENCY:.0%} of "
            f"{self.gpu.matmul / 1e12:g} TFLOP/s ({self.gpu.source})"
        )
        for what, training in (("inference", False), ("training", True)):
            shares, rest = self.amdahl(training), self.step_seconds(training)
            totals = self.training if training else self.inference
            if shares is None or rest is None:
                continue
            step = rest + (totals["eager"].seconds or 0.0)
            lines.append(
                f"{what}: norms are {shares[0]:.1%} of the {step * 1e3:,.2f} ms that an eager step takes for them and "
                f"its matrix products; at most {shares[0]:.1%} to gain, {shares[1]:.1%} with ours"
            )
        if self.gpu.few_fp64:
            lines.append(f"{self.gpu.name} has little fp64, in which ours sums: it will fall short of this")
        return lines


def _mb(count: int) -> str:
    return f"{count / 1e6:,.3f}" if abs(count) < 1e6 else f"{count / 1e6:,.1f}"


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
    progress(0, 3, "importing transformers")
    try:
        import transformers
    except ImportError:
        raise CommandError("cost needs transformers to build the model: pip install 'rmsnorm[hf]'") from None

    with _quiet(transformers):
        progress(1, 3, "building the model on the meta device")
        config, notes = (PRESETS[target](), ()) if read is None else _config(read, transformers)
        model = _build(config, target, transformers)
    progress(2, 3, "counting")
    groups = tuple(_groups(model, config, batch * seq))
    if not groups:
        raise CommandError(f"{type(model).__name__} has no RMSNorm")
    where = "cpu" if gpu is None else "cuda"
    peaks = None if gpu is None else GPUS[gpu.lower()]
    inference, training = (
        {str(name): _totals(groups, name, DTYPES[dtype], both, where, peaks) for name in COMPARED}
        for both in (False, True)
    )
    notes += tuple(f"{g.first}: counted as the Definition, not proven ({g.reason})" for g in groups if g.spec is None)
    weight, master = _weights(groups, DTYPES[dtype])
    return Result(
        target, type(model).__name__, sum(p.numel() for p in model.parameters()), groups, weight, master, batch, seq,
        dtype, peaks, where, cost((1, 1), device=where).derived, inference, training,
        _matmul_flops(model, config, batch, seq), notes, time.perf_counter() - start,
    )  # fmt: skip


def _totals(
    groups: tuple[Group, ...], name: Implementation, dtype: torch.dtype, training: bool, device: str, gpu: Gpu | None
) -> Totals:
    totals = Totals(seconds=None if gpu is None else 0.0)
    phases: tuple[Phase, ...] = ("forward", "backward") if training else ("inference",)
    for g in groups:
        spec = g.spec or Spec()
        for phase in phases:
            c = cost(
                (g.rows, g.width), dtype, implementation=name, phase=phase, device=device, cast=spec.cast,
                offset=spec.offset,
            )  # fmt: skip
            totals = totals.plus(c, phase, g.count, gpu)
    return totals


def _weights(groups: tuple[Group, ...], dtype: torch.dtype) -> tuple[Cost, int]:
    plain = [(g.count, cost((1, g.width), dtype)) for g in groups]
    summed = {
        name: sum(count * getattr(c, name) for count, c in plain) for name in ("parameters", "gradients", "optimizer")
    }
    master = sum(g.count * cost((1, g.width), dtype, master=True).optimizer for g in groups)
    return replace(cost((0, 1), dtype), **summed), master


def _groups(model: nn.Module, config: Any, tokens: int) -> Iterator[Group]:
    """The norms, by what they cost, in the order in which they come."""
    verdicts = {v.name: v for v in models.patch(model).verdicts}
    models.unpatch(model)
    found: dict[Any, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if type(module).__name__.endswith("RMSNorm") and weight is not None:
            verdict = verdicts.get(name)
            spec, reason = (None, "patch leaves it") if verdict is None else (verdict.spec, verdict.reason)
            width = weight.shape[-1]
            found.setdefault(
                (_rows(name, width, config, tokens), width, type(module).__name__, spec, reason), []
            ).append(name)
    for (rows, width, cls, spec, reason), names in found.items():
        yield Group(len(names), rows, width, cls, names[0], spec, reason)


def _rows(name: str, width: int, config: Any, tokens: int) -> int:
    """A norm of queries or keys that is as wide as a head runs once a head."""
    last = name.rpartition(".")[2]
    heads = getattr(config, "num_attention_heads", None) or 1
    if width == _head_dim(config) != getattr(config, "hidden_size", None) and last.startswith(("q_", "k_")):
        return tokens * (heads if last.startswith("q_") else getattr(config, "num_key_value_heads", None) or heads)
    return tokens


def _head_dim(config: Any) -> int:
    heads = getattr(config, "num_attention_heads", None) or 1
    return getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads


def _matmul_flops(model: nn.Module, config: Any, batch: int, seq: int) -> int:
    """Of a forward pass: 2 for each weight a token meets, causal attention's scores and sums, and the head.

    Of experts a token meets `num_experts_per_tok`; every layer's attention is taken to see the whole sequence.
    """
    experts = next((n for n in (getattr(config, k, None) for k in _EXPERTS) if n), 1)
    used = getattr(config, "num_experts_per_tok", None) or experts
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    met = 0
    for name, p in model.named_parameters():
        if p.dim() < 2 or id(p) in embeddings:
            continue
        routed = (p.dim() == 3 and p.shape[0] == experts) or (".experts." in name and p.dim() == 2)
        met += p.numel() * used // experts if routed else p.numel()
    met += getattr(config, "vocab_size", 0) * getattr(config, "hidden_size", 0)
    nope = getattr(config, "qk_nope_head_dim", None)
    mla = nope and any(name.endswith("kv_a_layernorm") for name, _ in model.named_modules())
    scores = nope + config.qk_rope_head_dim if mla else _head_dim(config)
    values = config.v_head_dim if mla else _head_dim(config)
    heads, layers = (getattr(config, k, None) or 0 for k in ("num_attention_heads", "num_hidden_layers"))
    return 2 * batch * seq * met + batch * seq * seq * layers * heads * (scores + values)


_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


# --- the model -----------------------------------------------------------------------------------------------


def _ocr(layers: int) -> Any:
    from transformers import DeepseekOcr2TextConfig

    return DeepseekOcr2TextConfig(
        vocab_size=129280, hidden_size=1280, intermediate_size=6848, num_hidden_layers=layers, num_attention_heads=10,
        num_key_value_heads=10, max_position_embeddings=8192, n_routed_experts=64, num_experts_per_tok=6,
        n_shared_experts=2, moe_intermediate_size=896, mlp_layer_types=["dense"] + ["sparse"] * (layers - 1),
    )  # fmt: skip


def _v2_lite() -> Any:
    from transformers import DeepseekV2Config

    return DeepseekV2Config(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, kv_lora_rank=512, n_routed_experts=64,
        num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1, max_position_embeddings=163840,
    )  # fmt: skip


def _v2() -> Any:
    from transformers import DeepseekV2Config

    return DeepseekV2Config(
        vocab_size=102400, hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=60,
        num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512, n_routed_experts=160,
        num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1, max_position_embeddings=163840,
    )  # fmt: skip


def _v3() -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config()  # transformers' defaults are this model


PRESETS: dict[str, Any] = {
    "deepseek-ocr": lambda: _ocr(12),
    "deepseek-ocr-40-layers": lambda: _ocr(40),
    "deepseek-v2-lite": _v2_lite,
    "deepseek-v2": _v2,
    "deepseek-v3": _v3,
}


def _read(target: str) -> dict[str, Any]:
    path = Path(target)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise CommandError(f"{target!r} is neither a config.json nor a preset: give {', '.join(PRESETS)}, or a file")
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} is no JSON: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise CommandError(f"{path} holds no JSON object, so it is no model's configuration")
    return content


def _config(content: dict[str, Any], transformers: Any) -> tuple[Any, tuple[str, ...]]:
    """The language model's configuration. Keys that would fetch or run foreign code are left out."""
    names = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    notes: tuple[str, ...] = ()
    content = _harmless(content)
    kind = content.get("model_type")
    if kind not in names and isinstance(content.get("language_config"), dict):
        notes += (f"{kind}: its language_config alone is counted",)
        content = content["language_config"]
        kind = content.get("model_type") or _of_architecture(content, transformers)
    if not kind:
        raise CommandError("the configuration has no model_type, which says what it is of")
    if kind not in names:
        raise CommandError(f"transformers {transformers.__version__} does not know the architecture {kind!r}")
    if kind == "deepseek_v2" and content.get("use_mla") is False:
        kind, content = "deepseek_ocr2_text", _without_mla(content)
    try:
        cls = transformers.AutoConfig.for_model(kind).__class__
        nested = [content, *(v for k, v in content.items() if k.endswith("_config") and isinstance(v, dict))]
        for needed in ("hidden_size", "num_hidden_layers"):
            spelled = {needed, cls.attribute_map.get(needed, needed)}
            if not any(spelled & set(part) for part in nested):
                raise CommandError(f"the configuration has no {needed}")
        config = transformers.AutoConfig.for_model(kind, **{k: v for k, v in content.items() if k != "model_type"})
        text = config.get_text_config()
    except CommandError:
        raise
    except Exception as error:  # noqa: BLE001  # transformers raises what it likes
        raise CommandError(f"transformers cannot read this {kind} configuration: {_first_line(error)}") from None
    if text is not config:
        notes += (f"{kind}: its language part alone is counted",)
    return text, notes


def _harmless(content: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in content.items():
        if key in ("auto_map", "quantization_config") or key.endswith(
            ("attn_implementation", "experts_implementation")
        ):
            continue
        kept[key] = _harmless(value) if isinstance(value, dict) else value
    return kept


def _of_architecture(content: dict[str, Any], transformers: Any) -> str | None:
    classes = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    wanted = content.get("architectures") or [None]
    return next((kind for kind, cls in classes.items() if cls == wanted[0]), None)


def _without_mla(content: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek-V2's decoder with ordinary attention, which transformers keeps under DeepSeek-OCR 2."""
    layers, dense = content.get("num_hidden_layers"), content.get("first_k_dense_replace", 0)
    drop = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "architectures")
    kept = {k: v for k, v in content.items() if k not in drop}
    if isinstance(layers, int) and isinstance(dense, int):
        kept["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (layers - dense)
    return kept


def _build(config: Any, target: str, transformers: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            if config.model_type == "deepseek_ocr2_text":
                from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

                model: nn.Module = DeepseekOcr2TextModel(config)
            else:
                model = transformers.AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  # transformers raises what it likes
        raise CommandError(f"transformers cannot build {target}: {_first_line(error)}") from None
    return model


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
