"""Writes docs/founding-document.md: each claim of the document that the project began with, and whether it holds.

    python benchmarks/founding_document.py          write the page
    python benchmarks/founding_document.py --check  say whether the page differs, and exit with 1 if it does

Each claim is quoted. The script computes what we find, and whether the claim holds: by `rmsnorm.cost`, by running the
code in question on the CPU, or from a file of benchmarks/results/. No figure of an answer is typed here.
"""

import argparse
import ast
import functools
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rmsnorm
from rmsnorm import bits, memory
from rmsnorm.costs.counts import Cost
from rmsnorm.tools.bench.peers import EPS, definition
from rmsnorm.tools.display import count, factor, number, share, size
from rmsnorm.tools.models import architecture, library
from rmsnorm.tools.models.presets import PRESETS
from tables import ROOT, cases, superscript, table

PAGE = ROOT / "docs" / "founding-document.md"
RESULTS = "../benchmarks/results"
CPU = torch.device("cpu")
ROWS = 512  # of random rows whose bits are compared
NEAR = 0.05  # a figure with "~" or "≈" holds if it is off by less than this share

# --- what a row says -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One claim.

    Attributes:
        said: The claim, quoted.
        holds: "yes", "no", "in part", or "not checked" for what can be neither run nor counted.
        so: What we found.
        known: How we found it.
    """

    said: str
    holds: str
    so: str
    known: str


def whether(*conditions: bool) -> str:
    """Whether a claim holds, from whether each of its parts does."""
    return "yes" if all(conditions) else "in part" if any(conditions) else "no"


def near(claimed: float, found: float) -> bool:
    """Whether a figure is about what was claimed."""
    return abs(found / claimed - 1) < NEAR


def bound(value: float) -> str:
    """The power of ten just above a small number: the last bits of fp32 depend on the processor."""
    return f"10{superscript(math.floor(math.log10(value)) + 1)}"


def function(of: Callable[..., Any]) -> str:
    """The name of a function of this file; the head of the page links to the file."""
    return f"`{of.__name__}`"


# --- what is computed ----------------------------------------------------------------------------------------


class Example(NamedTuple):
    """The sizes that the document calculates with."""

    batch: int = 1
    seq: int = 8192
    width: int = 1280

    @property
    def M(self) -> int:
        return self.batch * self.seq

    @property
    def elements(self) -> int:
        return self.M * self.width


class Counted(NamedTuple):
    """What `rmsnorm.cost` returned, and the call."""

    cost: Cost
    call: str


def counted(e: Example, **options: Any) -> Counted:
    words = "".join(f", {name}={value!r}" for name, value in options.items()).replace("'", '"')
    return Counted(rmsnorm.cost(e, torch.bfloat16, **options), f"`cost(shape{words})`")


def in_elements(flops: int, e: Example) -> str:
    """A count as multiples of N = B·S·d and of B·S: 4N + 2·B·S."""
    of_elements, rest = divmod(flops, e.elements)
    parts = ((of_elements, "N", f"{of_elements}N"), (rest // e.M, "B·S", f"{rest // e.M}·B·S"))
    return " + ".join(one if times == 1 else several for times, one, several in parts if times)


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16, mean: float = 0.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + mean).to(dtype)


def a_weight(width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.rand(width, generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype)


def pseudo_code(x: Tensor, w: Tensor) -> Tensor:
    """The document's "Key Pseudo Code", which multiplies by the weight before it casts."""
    h = x.to(torch.float32)
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + EPS)
    return (w * h).to(x.dtype)


def differing_share(y: Tensor, other: Tensor) -> float:
    return bits.differing(y, other)[0] / y.numel()


def relative(y: Tensor, other: Tensor) -> float:
    """The difference relative to `other`, in the L2 norm."""
    return ((y.double() - other.double()).norm() / other.double().norm()).item()


def without_upcast(x: Tensor) -> Tensor:
    """The Definition without its first line and its weight."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def constant_row(value: float, dtype: torch.dtype, width: int) -> tuple[float, float]:
    """y of a row of equal numbers, with the upcast and without it; it should be 1."""
    x = torch.full((width,), value, dtype=dtype)
    return definition(x, torch.ones(width, dtype=dtype))[0].item(), without_upcast(x)[0].item()


def statistic_error(dtype: torch.dtype | None, width: int) -> float:
    """The largest relative error of the mean of squares of bf16 rows, taken in a dtype; None for fp64."""
    x = drawn(ROWS, width)
    exact = x.double().pow(2).mean(-1)
    return ((x.to(dtype).pow(2).mean(-1).double() - exact) / exact).abs().max().item()


def alone(norm: Callable[[Tensor, Tensor], Tensor], e: Example, gradients: bool) -> memory.Allocated[Tensor]:
    """What a forward call allocates, according to torch's allocator."""
    x, w = (t.requires_grad_(gradients) for t in (drawn(*e), a_weight(e.width)))
    return memory.allocated(lambda: norm(x, w), CPU)


def peak(norm: Callable[[Tensor, Tensor], Tensor], e: Example, gradients: bool = False) -> int:
    most = alone(norm, e, gradients).peak
    assert most is not None
    return most


def peak_of_training(e: Example) -> int:
    """The most that is allocated during the forward and the backward pass of the Definition."""
    found = alone(definition, e, gradients=True)
    x, w, y = drawn(*e).requires_grad_(), a_weight(e.width).requires_grad_(), found.result
    del y
    dy = drawn(*e)
    most = memory.allocated(lambda: torch.autograd.grad(definition(x, w), (x, w), dy), CPU).peak
    assert most is not None
    return most


def kept(e: Example, with_checkpoint: bool) -> int:
    """Bytes that the Definition keeps for the backward pass."""
    x, w = drawn(*e).requires_grad_(), a_weight(e.width).requires_grad_()
    with memory.saved_for_backward([w]) as saved:
        y = checkpoint(definition, x, w, use_reentrant=False) if with_checkpoint else definition(x, w)
        found = saved()
    del y
    return found


def operators(module: nn.Module) -> list[str]:
    """The operators that the code of a module calls, in order; those that work in place end with "_"."""
    nodes = torch.fx.symbolic_trace(module).graph.nodes
    calls = [node for node in nodes if node.op in ("call_function", "call_method") and node.target is not getattr]
    return [node.target if isinstance(node.target, str) else node.target.__name__ for node in calls]


def gradients_of(norm: Callable[[Tensor], Tensor], width: int) -> tuple[float, float]:
    """The largest |cosine| of dx and x, and of dx and a row of ones, over random rows with mean one."""
    x = drawn(ROWS, width, dtype=torch.float64, mean=1.0).requires_grad_()
    (dx,) = torch.autograd.grad(norm(x), x, drawn(ROWS, width, dtype=torch.float64).roll(1, 0))
    return tuple(F.cosine_similarity(dx, v, dim=-1).abs().max().item() for v in (x, torch.ones_like(x)))  # type: ignore[return-value]


class AdamWState(NamedTuple):
    """Bytes of one moment of AdamW, its dtype, and the bytes of all its state."""

    moment: int
    dtype: str
    total: int


def adamw(width: int, dtype: torch.dtype) -> AdamWState:
    """Run a step of AdamW on a norm's weight."""
    weight = nn.Parameter(torch.ones(width, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    state = optimizer.state[weight]
    moment = state["exp_avg"]
    return AdamWState(moment.nbytes, str(moment.dtype).removeprefix("torch."), sum(t.nbytes for t in state.values()))


class Norms(NamedTuple):
    """The norms of a model: name -> width, its number of layers, and of parameters."""

    widths: dict[str, int]
    layers: int
    parameters: int

    def named(self, last: str) -> list[int]:
        """The widths of the norms with this last name."""
        return [width for name, width in self.widths.items() if name.rpartition(".")[2] == last]

    @property
    def norm_parameters(self) -> int:
        return sum(self.widths.values())


@functools.cache
def norms_of(preset: str) -> Norms:
    """Build a model on the meta device, and list its norms."""
    transformers = library.import_transformers("this page")
    with library.quiet():
        config = PRESETS[preset](transformers)
        model = architecture.build_on_meta(config, transformers, preset)
    widths = {n: m.weight.numel() for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")}
    return Norms(widths, config.num_hidden_layers, sum(p.numel() for p in model.parameters()))


def norm_class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


def uses(module: str, name: str) -> bool:
    """Whether the source of a module has a name, outside strings and comments."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    nodes = ast.walk(ast.parse(Path(spec.origin).read_text()))
    return any(name in (getattr(node, "id", ""), getattr(node, "name", "")) for node in nodes)


DEEPSEEK = ("deepseek_v2.modeling_deepseek_v2", "DeepseekV2RMSNorm")


def loaded(cls: type[nn.Module], width: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A norm of a class with a random weight."""
    norm: Any = cls(width)
    norm.weight = nn.Parameter(a_weight(width, dtype))
    return norm  # type: ignore[no-any-return]


def speeds(e: Example) -> dict[str, float]:
    """Microseconds on the GPU, forward in bf16, by the name of what was measured."""
    found = next(c for c in cases("bench-cuda", "bfloat16", "forward") if (e.M, e.width) == (c.M, c.N))
    return {name: time for name in found.providers if (time := found.time(name)) is not None}


# --- the claims ----------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Example], Iterator[Row]]] = {}


def section(title: str) -> Callable[[Callable[[Example], Iterator[Row]]], Callable[[Example], Iterator[Row]]]:
    def register(function: Callable[[Example], Iterator[Row]]) -> Callable[[Example], Iterator[Row]]:
        SECTIONS[title] = function
        return function

    return register


@section("What it is")
def _what_it_is(e: Example) -> Iterator[Row]:
    x, w = drawn(ROWS, e.width, mean=1.0), a_weight(e.width)
    one = torch.ones(e.width)
    means = [y.mean().item() for y in (definition(x.float(), one), F.layer_norm(x.float(), (e.width,)))]
    yield Row(
        "normalizes by the root mean square only, without centering",
        whether(means[0] > means[1] + 1 / 2),
        f"For rows with mean {number(x.float().mean().item(), digits=1)}, the outputs have mean "
        f"{number(means[0], digits=2)}, and those of LayerNorm have mean {number(abs(round(means[1], 3)))}.",
        "the Definition and `F.layer_norm`, run on the same rows",
    )
    t5 = norm_class("t5.modeling_t5", "T5LayerNorm")
    y = definition(x, w)
    same, mixed = (
        differing_share(loaded(t5, e.width, dtype)(x), definition(x, a_weight(e.width, dtype)))
        for dtype in (torch.bfloat16, torch.float32)
    )
    yield Row(
        "equivalent to T5's LayerNorm implementation",
        whether(not same, not mixed),
        f"With bf16 rows and a bf16 weight, {share(same)} of the outputs differ. With an fp32 weight, "
        f"{share(mixed, 2)} differ, because T5's class then does not round before it multiplies.",
        "`T5LayerNorm` of transformers and the Definition, run on the same rows",
    )
    others = {
        name: differing_share(loaded(norm_class(module, name), e.width)(x), y)
        for module, name in (("llama.modeling_llama", "LlamaRMSNorm"), ("mistral.modeling_mistral", "MistralRMSNorm"))
    }
    yield Row(
        "used in LLaMA, Mistral and others",
        whether(*(not differs for differs in others.values())),
        "; ".join(f"{share(differs)} of the outputs of `{name}` differ" for name, differs in others.items()) + ".",
        "these classes of transformers, run on the same rows; [verdicts.md](verdicts.md) has all others",
    )


@section("Constructor")
def _constructor(e: Example) -> Iterator[Row]:
    ours, theirs = rmsnorm.DeepseekV2RMSNorm, norm_class(*DEEPSEEK)
    parameters = list(inspect.signature(ours).parameters.values())
    yield Row(
        "`__init__(self, hidden_size: int, eps: float = 1e-6)`",
        whether(
            [p.name for p in parameters] == ["hidden_size", "eps"],
            *(inspect.signature(cls).parameters["eps"].default == EPS for cls in (ours, theirs)),
        ),
        f"`DeepseekV2RMSNorm({', '.join(map(str, parameters))})` here; in transformers the default of eps is "
        f"{inspect.signature(theirs).parameters['eps'].default:g} too.",
        "`inspect.signature` of both classes",
    )
    yield Row(
        "location: `modeling_deepseekv2.py`, lines 94 to 108",
        "not checked",
        f"That file comes with a checkpoint. transformers has the class in `{theirs.__module__}`.",
        "`DeepseekV2RMSNorm.__module__`",
    )
    weight = ours(e.width).weight
    yield Row(
        "`weight` of shape `(hidden_size,)`, initialized to ones; 1280 parameters a layer",
        whether(tuple(weight.shape) == (e.width,), bool((weight == 1).all()), near(1280, weight.numel())),
        f"Shape {tuple(weight.shape)}, every value is {', '.join(f'{v:g}' for v in weight.unique().tolist())}; "
        f"{sum(p.numel() for p in ours(e.width).parameters()):,} parameters.",
        "`rmsnorm.DeepseekV2RMSNorm`, built with that width",
    )
    zeros = torch.zeros(e.width)
    with_eps, without = (rmsnorm.rms_norm(zeros, None, eps)[0].item() for eps in (EPS, 0.0))
    yield Row(
        "eps is added to the variance for stability",
        whether(with_eps == 0, math.isnan(without)),
        f"A row of zeros gives {with_eps:g} with eps and {without} without it.",
        "`rmsnorm.rms_norm`, run with both",
    )


@section("Internals and formulas")
def _internals(e: Example) -> Iterator[Row]:
    x, w = drawn(ROWS, e.width), a_weight(e.width)
    y, late = definition(x, w), pseudo_code(x, w)
    differs = differing_share(y, late)
    yield Row(
        "diagram and pseudo-code: multiply by the weight, then cast to the input dtype",
        whether(not differs),
        f"The document's own Definition casts first. That is another function: {share(differs, 2)} of bf16 outputs "
        f"differ, by up to {bits.differing(y, late)[1]} ulp. We call the two orders early and late.",
        f"the Definition and {function(pseudo_code)}, run on {ROWS:,} random rows of {e.width:,}",
    )
    w32 = a_weight(e.width, torch.float32)
    dtypes = [str(f(x, weight).dtype).removeprefix("torch.") for f, weight in ((definition, w), (definition, w32))]
    yield Row(
        "casts back to the input dtype",
        whether(*(dtype == "bfloat16" for dtype in dtypes)),
        f"bf16 rows give {dtypes[0]} with a bf16 weight and {dtypes[1]} with an fp32 weight, because the cast comes "
        "before the multiplication.",
        "the Definition, run with both weights",
    )
    h, divided = (t.float() for t in (x, x))
    variance = h.pow(2).mean(-1, keepdim=True)
    root, divided = h * torch.rsqrt(variance + EPS), divided / torch.sqrt(variance + EPS)
    yield Row(
        "`x * rsqrt(variance + eps)` is equivalent to `x / sqrt(variance + eps)`",
        whether(relative(root, divided) < torch.finfo(torch.float32).eps, not bits.differing(root, divided)[0]),
        f"They agree to {bound(((root - divided) / divided).abs().max().item())} of the value, but not to the bit.",
        "both expressions, run in fp32 on the same rows",
    )
    x64 = x.double()
    formula = x64 / (x64.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * w.double()
    off = relative(definition(x.float(), w.float()), formula)
    yield Row(
        "RMSNorm(x) = x / sqrt(mean(x²) + ε) × weight",
        whether(off < torch.finfo(torch.float32).eps),
        f"The Definition in fp32 differs from the formula in fp64 by less than {bound(off)} of its Euclidean norm.",
        "both, run on the same rows",
    )
    centred = x64 - x64.mean(-1, keepdim=True)
    layer_norm = F.layer_norm(x64, (e.width,), eps=EPS)
    unbiased = relative(centred / x64.std(-1, keepdim=True), layer_norm)
    biased = relative(centred / (x64.var(-1, keepdim=True, correction=0) + EPS).sqrt(), layer_norm)
    yield Row(
        "LayerNorm(x) = (x − mean(x)) / std(x) × weight + bias",
        whether(biased < torch.finfo(torch.float32).eps, unbiased < torch.finfo(torch.float32).eps),
        f"With the standard deviation of `torch.std` the result is off by {share(unbiased, 2)}: LayerNorm divides by "
        "sqrt(mean((x − mean)²) + ε).",
        "the formula and `F.layer_norm`, run in fp64",
    )
    least = [rmsnorm.cost(e, torch.bfloat16, implementation=i).parameters for i in ("eager", "LayerNorm")]
    tensors = [len(list(norm.parameters())) for norm in (rmsnorm.DeepseekV2RMSNorm(e.width), nn.LayerNorm(e.width))]
    yield Row(
        "no bias: fewer parameters; saves hidden_size parameters a layer",
        whether(least[1] - least[0] == e.width * torch.bfloat16.itemsize),
        f"{tensors[0]} tensor instead of {tensors[1]}, {least[0]:,} bytes instead of {least[1]:,} in bf16.",
        f"{counted(e).call} and {counted(e, implementation='LayerNorm').call}",
    )
    us = speeds(e)
    eager, ours = (us[name] / us["LayerNorm"] for name in ("Definition", "ours"))
    yield Row(
        "~15–20 % faster than LayerNorm",
        whether(0.80 <= eager <= 0.85, 0.80 <= ours <= 0.85),
        f"On a GPU the Definition, run eagerly, takes {factor(eager, 2)} the time of `F.layer_norm`. Our kernel takes "
        f"{factor(ours, 2)} that time.",
        f"[bench-cuda.json]({RESULTS}/bench-cuda.json), bf16, forward",
    )


@section("FLOPs")
def _flops(e: Example) -> Iterator[Row]:
    eager = counted(e, implementation="eager")
    terms = {term.what: term.flops for term in eager.cost.terms}
    casts = [flops for what, flops in terms.items() if what.startswith("cast")]
    known = f"`.terms` of {eager.call}"
    yield Row(
        "casts: 0 FLOPs",
        whether(not any(casts)),
        f"{sum(casts)}, by convention.",
        known,
    )
    yield Row("x²: N FLOPs", whether(terms["x²"] == e.elements), f"{in_elements(terms['x²'], e)}.", known)
    yield Row(
        "mean along the last dimension: B·S FLOPs",
        whether(terms["mean"] == e.M),
        f"{in_elements(terms['mean'], e)}: a mean adds all the numbers of a row. The document first counts d for each "
        "of B·S rows, which is N, and then writes B·S.",
        known,
    )
    yield Row(
        "`1 / sqrt(variance + eps)`: B·S FLOPs",
        whether(terms["rsqrt"] == e.M, not terms["+ eps"]),
        f"{in_elements(terms['rsqrt'], e)} for the root, and {in_elements(terms['+ eps'], e)} to add eps.",
        known,
    )
    products = [terms["× rstd"], terms["× weight"]]
    yield Row(
        "multiplications by rsqrt and by the weight: N FLOPs each",
        whether(*(flops == e.elements for flops in products)),
        " and ".join(in_elements(flops, e) for flops in products) + ".",
        known,
    )
    claimed = 3 * e.elements + 2 * e.M
    yield Row(
        "in total 3N + 2·B·S",
        whether(eager.cost.flops == claimed),
        f"{in_elements(eager.cost.flops, e)}; the document counts {share(1 - claimed / eager.cost.flops, 2)} too few.",
        f"`.flops` of {eager.call}; `tests/costs` compares it with a trace",
    )
    yield Row(
        "for B = 1, S = 8192, d = 1280 about 31.5 MFLOPs",
        whether(near(31.5e6, eager.cost.flops)),
        f"{eager.cost.flops:,} FLOPs. A backward pass, which the document does not count, takes "
        f"{counted(e, implementation='eager', phase='backward').cost.flops:,}.",
        f"`.flops` of {eager.call}",
    )
    layer_norm = counted(e, implementation="LayerNorm")
    yield Row(
        "LayerNorm: ~5N FLOPs",
        whether(near(5 * e.elements, layer_norm.cost.flops)),
        f"{in_elements(layer_norm.cost.flops, e)}, counted in the same way.",
        f"`.flops` of {layer_norm.call}",
    )
    fewer = 1 - eager.cost.flops / layer_norm.cost.flops
    yield Row(
        "~40 % fewer FLOPs than LayerNorm",
        whether(near(0.40, fewer)),
        f"{share(fewer, 2)} fewer. Both of the document's counts leave out the sums.",
        f"`.flops` of {eager.call} and {layer_norm.call}",
    )
    ours = counted(e, implementation="ours")
    bytes_of = [c.cost.moved for c in (ours, layer_norm)]
    yield Row(
        "speedup over LayerNorm: ~1.67 × theoretical",
        whether(near(1.67, bytes_of[1] / bytes_of[0])),
        f"{factor(bytes_of[1] / bytes_of[0], 3)} in theory, because the time of a norm is the time to move its bytes. "
        f"A fused RMSNorm moves {bytes_of[0]:,} bytes, and a fused LayerNorm {bytes_of[1]:,}. The Definition, run "
        f"eagerly, moves {eager.cost.moved:,}.",
        f"`.moved` of {ours.call}, {layer_norm.call} and {eager.call}",
    )


@section("Parameters")
def _parameters(e: Example) -> Iterator[Row]:
    weight = counted(e).cost.parameters
    found, deeper = (norms_of(preset) for preset in ("deepseek-ocr", "deepseek-ocr-40-layers"))
    how = f"{function(norms_of)}, preset `deepseek-ocr`, the published sizes"
    yield Row(
        "1280 × 2 bytes = 2.56 KB a layer",
        whether(near(2560, weight)),
        f"{weight:,} bytes.",
        f"`.parameters` of {counted(e).call}",
    )
    per_layer = [len(found.named(name)) / found.layers for name in ("input_layernorm", "post_attention_layernorm")]
    yield Row(
        "each decoder layer has 2 RMSNorms",
        whether(sum(per_layer) == 2),
        f"{sum(per_layer):g}: `input_layernorm` and `post_attention_layernorm`.",
        how,
    )
    in_layers = sum(name.startswith("layers.") for name in found.widths)
    yield Row(
        "40 decoder layers, 80 RMSNorms",
        whether(found.layers == 40, in_layers == 80),
        f"{found.layers} decoder layers, {in_layers} RMSNorms.",
        how,
    )
    last = len(found.named("norm"))
    yield Row("1 final norm", whether(last == 1), f"{last}.", how)
    yield Row(
        "in total 81 RMSNorms",
        whether(len(found.widths) == 81),
        f"{len(found.widths)}. With {deeper.layers} layers there would be {len(deeper.widths)}.",
        f"{how} and preset `deepseek-ocr-40-layers`",
    )
    yield Row(
        "81 × 1280 = 103,680 parameters",
        whether(found.norm_parameters == 103_680),
        f"{found.norm_parameters:,}. With {deeper.layers} layers there would be {deeper.norm_parameters:,}.",
        f"{how} and preset `deepseek-ocr-40-layers`",
    )
    in_bytes, claimed = (norms.norm_parameters * torch.bfloat16.itemsize for norms in (found, deeper))
    yield Row(
        "in bf16 about 203 KB",
        whether(near(203e3, in_bytes)),
        f"{in_bytes:,} bytes. The document's number of parameters would take {claimed:,} bytes, which is "
        f"{number(claimed / 1024)} KiB; its other KB have a thousand bytes.",
        how,
    )


@section("Memory of a forward pass")
def _activations(e: Example) -> Iterator[Row]:
    eager = counted(e, implementation="eager", phase="forward")
    written = {term.what: term.written for term in eager.cost.terms}
    known = f"`.terms` of {eager.call}"
    for said, what, claimed in (
        ("`fp32_input`: 42 MB", "cast to float32", 42e6),
        ("`variance`: 32 KB", "mean", 32 * 1024),
        ("`normalized`: 42 MB", "× rstd", 42e6),
        ("`output`: 21 MB", "× weight", 21e6),
    ):
        yield Row(said, whether(near(claimed, written[what])), f"{written[what]:,} bytes.", known)
    listed = {"cast to float32", "mean", "× rstd", "× weight"}
    others = {what: nbytes for what, nbytes in written.items() if what not in listed}
    yield Row(
        "these four are all the intermediate tensors",
        whether(not others),
        f"There are {len(written)} tensors. The others are "
        + ", ".join(f"{what} ({size(nbytes)})" for what, nbytes in others.items())
        + ".",
        known,
    )
    inference, forward, training = peak(definition, e), peak(definition, e, gradients=True), peak_of_training(e)
    yield Row(
        "peak: ~42 MB a call",
        whether(*(near(42e6, found) for found in (inference, forward, training))),
        f"{size(inference)} without gradients, {size(forward)} with gradients, {size(training)} with the backward "
        "pass, in addition to x.",
        f"{function(peak)} and {function(peak_of_training)}: torch's allocator, on a CPU",
    )
    calls = operators(norm_class(*DEEPSEEK)(e.width))
    in_place = [name for name in calls if name.endswith("_") and not name.endswith("__")]
    yield Row(
        "PyTorch can perform many of the operations in place",
        whether(bool(in_place)),
        f"Of the {len(calls)} operators that the class calls, {len(in_place)} work in place, and PyTorch does not "
        "change that.",
        f"{function(operators)}: `torch.fx` traces the class",
    )
    least = e.elements * torch.bfloat16.itemsize
    ours = peak(lambda x, w: rmsnorm.rms_norm(x, w, EPS), e)
    yield Row(
        "the peak is closer to 1–2 × the input (21–42 MB)",
        whether(*(1 <= found / least <= 2 for found in (inference, forward))),
        f"{factor(inference / least, 2)} the input without gradients, {factor(forward / least, 2)} with them. "
        f"Our kernel allocates {factor(ours / least, 2)}: its output.",
        f"{function(peak)}",
    )
    plain, checkpointed = (kept(e, with_checkpoint) for with_checkpoint in (False, True))
    yield Row(
        "gradient checkpointing can reduce activation memory",
        whether(checkpointed < plain),
        f"The Definition keeps {size(plain)} for the backward pass. In a checkpoint it keeps {size(checkpointed)}, its "
        f"input. Our kernel keeps {size(counted(e, phase='forward').cost.saved)}: the input and one number a row.",
        f"{function(kept)}; `.saved` of {counted(e, phase='forward').call}",
    )


@section("Memory of training")
def _training(e: Example) -> Iterator[Row]:
    x, w = drawn(*e).requires_grad_(), a_weight(e.width).requires_grad_()
    dx, dw = torch.autograd.grad(rmsnorm.rms_norm(x, w), (x, w), drawn(*e))
    yield Row(
        "gradient of the weight: 2.56 KB", whether(near(2560, dw.nbytes)), f"{dw.nbytes:,} bytes.", "autograd, run"
    )
    yield Row(
        "gradient of the input: 21 MB, as the input",
        whether(near(21e6, dx.nbytes), dx.nbytes == x.nbytes),
        f"{dx.nbytes:,} bytes; the input has {x.nbytes:,}.",
        "autograd, run",
    )
    half, full = (adamw(e.width, dtype) for dtype in (torch.bfloat16, torch.float32))
    yield Row(
        "AdamW: momentum and variance of 5.12 KB each, in fp32",
        whether(*(near(5120, state.moment) for state in (half, full))),
        f"`torch.optim.AdamW` keeps them in the dtype of the weight: {half.moment:,} bytes in {half.dtype} each, "
        f"{full.moment:,} in {full.dtype}.",
        f"{function(adamw)}",
    )
    weight = counted(e).cost.parameters
    master = counted(e, master=True).cost.optimizer
    yield Row(
        "in total ~13 KB a norm: parameters and optimizer states",
        whether(near(13e3, weight + half.total), near(13e3, weight + master)),
        f"{weight + half.total:,} bytes with AdamW on the bf16 weight; {weight + master:,} with an fp32 copy of the "
        f"weight and fp32 moments. The gradient adds {dw.nbytes:,}.",
        f"{function(adamw)}; {counted(e, master=True).call}",
    )
    found, deeper = norms_of("deepseek-ocr"), norms_of("deepseek-ocr-40-layers")
    all_states = [len(norms.widths) * half.total for norms in (found, deeper)]
    yield Row(
        "optimizer states of all norms: 81 × 10 KB ≈ 810 KB",
        whether(near(810e3, all_states[0])),
        f"{all_states[0]:,} bytes for {len(found.widths)} norms. {len(deeper.widths)} norms would need "
        f"{all_states[1]:,}, or {len(deeper.widths) * 2 * full.moment:,} with fp32 moments.",
        f"{function(adamw)} and {function(norms_of)}",
    )
    total = all_states[0] + len(found.widths) * weight
    part = found.norm_parameters / found.parameters
    yield Row(
        "in total ~1 MB, negligible in a model of billions of parameters",
        whether(near(1e6, total), part < 1e-4),
        f"{total:,} bytes. The norms have {share(part, 2)} of the {count(found.parameters, 2)} parameters.",
        f"{function(adamw)} and {function(norms_of)}",
    )


@section("Related modules")
def _related(e: Example) -> Iterator[Row]:
    found, other = norms_of("deepseek-ocr"), norms_of("deepseek-v2")
    layers = [len(found.named(name)) for name in ("input_layernorm", "post_attention_layernorm")]
    yield Row(
        "`DeepseekV2DecoderLayer`: `input_layernorm`, `post_attention_layernorm`",
        whether(*(number_of == found.layers for number_of in layers)),
        f"{layers[0]} and {layers[1]}, one of each in every layer.",
        function(norms_of),
    )
    last = len(found.named("norm"))
    yield Row("`DeepseekV2Model`: `norm`", whether(last == 1), f"{last}, after the last layer.", function(norms_of))
    low_rank = [norms.named(name) for norms in (found, other) for name in ("q_a_layernorm", "kv_a_layernorm")]
    yield Row(
        "`DeepseekV2Attention`: `q_a_layernorm`, `kv_a_layernorm`",
        whether(*map(bool, low_rank[:2])),
        f"DeepSeek-OCR has {len(low_rank[0])} and {len(low_rank[1])}: its attention has no low-rank projections. "
        f"DeepSeek-V2 has {len(low_rank[2])} and {len(low_rank[3])}, of width {low_rank[2][0]:,} and "
        f"{low_rank[3][0]:,}, not hidden_size.",
        f"{function(norms_of)}, presets `deepseek-ocr` and `deepseek-v2`",
    )
    transformers = library.import_transformers("this page")
    listed = importlib.import_module("transformers.pytorch_utils").ALL_LAYERNORM_LAYERS
    read = uses("transformers.trainer", "ALL_LAYERNORM_LAYERS")
    there = norm_class(*DEEPSEEK) in listed
    yield Row(
        "registered in `transformers.ALL_LAYERNORM_LAYERS`",
        whether(there, hasattr(transformers, "ALL_LAYERNORM_LAYERS")),
        f"In transformers {version('transformers')} the list is in `transformers.pytorch_utils`, its DeepSeek class is "
        f"{'' if there else 'not '}in it, and `Trainer` {'reads' if read else 'does not read'} it. "
        "`rmsnorm.register()` adds our layers to it, for versions whose `Trainer` reads it.",
        "the list and the source of `transformers.trainer`",
    )
    importable = importlib.util.find_spec("modeling_deepseekv2") is not None
    yield Row(
        "`from modeling_deepseekv2 import DeepseekV2RMSNorm`",
        whether(importable),
        f"There is {'a' if importable else 'no'} package of that name: the file comes with a checkpoint. With `from "
        "rmsnorm import DeepseekV2RMSNorm` the document's example runs: see below.",
        "`importlib.util.find_spec`; a test runs the example",
    )


@section("Characteristics")
def _characteristics(e: Example) -> Iterator[Row]:
    values = {torch.float16: 256.0, torch.bfloat16: 1e19}
    fp16, bf16 = (constant_row(value, dtype, e.width) for dtype, value in values.items())
    yield Row(
        "the upcast prevents overflow in the variance",
        whether(fp16 == (1.0, 0.0), bf16 == (1.0, 0.0)),
        f"In fp16 it does: a row of {values[torch.float16]:g} gives {fp16[0]:g} with the upcast and {fp16[1]:g} "
        "without it, because the squares overflow. bf16 has the exponent range of fp32, so it gains nothing: a row of "
        f"{values[torch.bfloat16]:g} gives {bf16[0]:g} with the upcast and {bf16[1]:g} without it.",
        function(constant_row),
    )
    small = torch.full((e.width,), 1e-5, dtype=torch.float16)
    variances = [x.pow(2).mean().item() for x in (small.float(), small)]
    outputs = constant_row(small[0].item(), small.dtype, e.width)
    yield Row(
        "it prevents underflow in the variance",
        whether(variances[0] > 0 and not variances[1]),
        f"In fp16 a row of {small[0].item():.0e} has variance {variances[0]:.0e} with the upcast and {variances[1]:g} "
        f"without it. But eps is larger than both, so y is {outputs[0]:.2f} with it and {outputs[1]:.2f} without it.",
        f"the mean of squares, and {function(constant_row)}",
    )
    rounded, exact = (statistic_error(dtype, e.width) for dtype in (torch.bfloat16, torch.float32))
    yield Row(
        "it is critical for bf16 training",
        whether(rounded > 1e-3, bf16 == (1.0, 0.0)),
        f"In bf16 the upcast gains precision, not range: the mean of squares is off by up to {share(rounded, 1)} if it "
        f"is taken in bf16, and by less than {bound(exact)} in fp32.",
        function(statistic_error),
    )
    rms, layer = (
        gradients_of(norm, e.width)
        for norm in (
            lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
            lambda x: F.layer_norm(x, (e.width,), eps=0.0),
        )
    )
    tiny = 1e-10
    yield Row(
        "gradient properties similar to LayerNorm's",
        whether(rms[0] < tiny and layer[0] < tiny, (rms[1] < tiny) == (layer[1] < tiny)),
        "Without eps, dx is orthogonal to x for both. LayerNorm's dx is also orthogonal to a row of ones; RMSNorm's dx "
        f"is not (cosines up to {number(rms[1], digits=1)}).",
        function(gradients_of),
    )
    missing, unexpected = rmsnorm.DeepseekV2RMSNorm(e.width).load_state_dict(
        nn.LayerNorm(e.width).state_dict(), strict=False
    )
    x = drawn(ROWS, e.width, dtype=torch.float32, mean=1.0)
    off = relative(definition(x, torch.ones(e.width)), F.layer_norm(x, (e.width,), eps=EPS))
    yield Row(
        "drop-in replacement for LayerNorm",
        whether(not missing and not unexpected, off < 1e-3),
        f"The state of a LayerNorm has {len(unexpected)} more tensor, its {', '.join(unexpected)}, so strict loading "
        f"raises. For rows with mean {x.mean().item():.0f}, the outputs differ by {share(off, 2)} of their "
        "Euclidean norm.",
        "`load_state_dict` of `rmsnorm.DeepseekV2RMSNorm`; the Definition and `F.layer_norm`, run on the same rows",
    )
    yield Row(
        "original paper: Zhang & Sennrich, 2019",
        "not checked",
        "It compares whole training steps in the frameworks of its time, not kernels.",
        "[arXiv:1910.07467](https://arxiv.org/abs/1910.07467)",
    )


# --- the page ------------------------------------------------------------------------------------------------

HEAD = """# The founding document, claim by claim

<!-- Written by benchmarks/founding_document.py: run make tables. -->

The project began with a description of DeepSeek-OCR's `DeepseekV2RMSNorm`. It gives the class (the
[Definition](../README.md#words)), which we implement as it stands, and claims about its cost and properties,
many of which do not hold. This page says of each claim whether it holds, and how we know. B = {batch} sequence of
S = {seq:,} tokens of width d = {width:,} has N = B·S·d = {elements:,} elements, in bf16.

Of {checked} claims {yes} hold, {part} hold in part and {no} do not; {unchecked} can be neither run nor counted. The
answers are computed by [founding_document.py](../benchmarks/founding_document.py), here with torch {torch} and
transformers {transformers} on a CPU, and a test checks that this page shows them. The functions in the last column are
those of that file. `cost` is `rmsnorm.cost` with the shape (B, S, d) in bf16 ([conventions](cost.md#conventions)). A
figure counts as right if it is less than {near} off.
"""

EXAMPLE = """## The usage example

```python
import torch
from torch import nn
from rmsnorm import DeepseekV2RMSNorm


class MyLayer(nn.Module):
    def __init__(self, hidden_size=1280):
        super().__init__()
        self.norm = DeepseekV2RMSNorm(hidden_size, eps=1e-6)
        self.mlp = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        normalized = self.norm(x)
        output = self.mlp(normalized)
        return x + output


layer = MyLayer().to(torch.bfloat16)
x = torch.randn(1, 16, 1280, dtype=torch.bfloat16, requires_grad=True)
layer(x).sum().backward()
print(x.grad.shape, layer.norm.weight.grad.dtype)
```

```text
torch.Size([1, 16, 1280]) torch.bfloat16
```
"""


def rows(e: Example) -> dict[str, list[Row]]:
    """The rows of each section."""
    return {title: list(claims(e)) for title, claims in SECTIONS.items()}


def page(e: Example = Example()) -> str:  # noqa: B008  # immutable
    """The whole page."""
    found = rows(e)
    verdicts = [row.holds for claims in found.values() for row in claims]
    head = HEAD.format(
        **e._asdict(), elements=e.elements, checked=len(verdicts), yes=verdicts.count("yes"), no=verdicts.count("no"),
        part=verdicts.count("in part"), unchecked=verdicts.count("not checked"), near=share(NEAR),
        torch=torch.__version__.partition("+")[0], transformers=version("transformers"),
    )  # fmt: skip
    header = ["claim", "holds", "what we found", "how"]
    parts = [
        f"## {title}\n\n" + table(header, ([r.said, r.holds, r.so, r.known] for r in claims)).replace("---:", "---")
        for title, claims in found.items()
    ]
    return "\n".join([head, *(f"{part}\n" for part in parts), EXAMPLE])


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/founding-document.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the page differs")
    check = parser.parse_args().check
    text = page()
    if PAGE.exists() and PAGE.read_text() == text:
        return 0
    print(f"{PAGE.relative_to(ROOT)} {'differs: run make tables' if check else 'written'}")
    if not check:
        PAGE.write_text(text)
    return 1 if check else 0


if __name__ == "__main__":
    sys.exit(main())
