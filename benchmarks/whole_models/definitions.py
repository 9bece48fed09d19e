"""The models that are measured, the modes in which they run, and the variants of their norms."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rmsnorm
from rmsnorm.errors import CommandError
from rmsnorm.spec import Spec
from rmsnorm.tools.bench import peers
from rmsnorm.tools.models import architecture, presets
from rmsnorm.tools.models.steps import copy_sharing_tensors

AS_IS, PATCHED, NOT_FUSED, RECOMPUTED, NO_NORMS = "as is", "patched", "not fused", "recomputed", "no norms"
CASES, BATCHES, GRADIENTS = SECTIONS = "times", "largest batch", "gradients"


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
        kinds: How many of the first layers have all kinds of layers. Gradients are compared on so many.
        compiled: Whether it is measured compiled, too.
    """

    name: str
    what: str
    kind: str
    sizes: dict[str, Any]
    tiny: dict[str, Any] = field(default_factory=dict)
    far_off: float = 0.1
    kinds: int = 1
    compiled: bool = True

    @property
    def ways(self) -> tuple[bool, ...]:
        """Whether it is compiled, for each way in which it is measured."""
        return (False, True) if self.compiled else (False,)

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
_TINY_DELTA_RULE = {
    "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
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
          "deepseek_ocr2_text", {"num_hidden_layers": 4}, _TINY_MOE, kinds=2),
    # Compiled, its delta rule in plain torch would be a loop over 64 chunks, unrolled.
    Model("qwen3-next", "Qwen3-Next's widths, 16 experts: gated norms in 3 of 4 layers, delta rule in plain torch",
          "qwen3_next", {"num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 4}, _TINY_DELTA_RULE,
          kinds=4, far_off=0.5, compiled=False),
)  # fmt: skip


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

Norm = Callable[[Tensor, Tensor, Spec], Tensor]


class ReplacedNorm(nn.Module):
    """A norm that calls a function with its input, its weight and its spec, and multiplies the result by a gate.

    Args:
        norm: The function; None for the identity.
        weight: The weight.
        spec: The spec of the replaced norm. With a gate it is that of Qwen3-Next: the norm first, and silu.
    """

    def __init__(self, norm: Norm | None, weight: nn.Parameter, spec: Spec) -> None:
        super().__init__()
        if spec.gate is not None and (spec.gate.first or spec.gate.activation != "silu" or spec.groups != 1):
            raise CommandError(f"a gated norm of {spec} has no variants here")
        self.norm, self.weight, self.spec = norm, weight, spec

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = x if self.norm is None else self.norm(x, self.weight, self.spec)
        return y if gate is None else y * nn.functional.silu(gate)


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
                copied.set_submodule(verdict.name, ReplacedNorm(self.norm, weight, verdict.spec))
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


def replaced_norms(built: nn.Module, copied: nn.Module) -> list[nn.Module]:
    """Return the modules of a variant's model that have another class than in the model as it is."""
    own = dict(built.named_modules())
    return [module for name, module in copied.named_modules() if type(module) is not type(own[name]) and name]


def variant_named(name: str, variants: Sequence[Variant]) -> Variant | None:
    """Return the variant of this name; None if it is not among these."""
    return next((variant for variant in variants if variant.name == name), None)


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Attributes:
        sections: Those of SECTIONS that are measured.
        limit: The bytes of GPU memory within which the largest batch is searched.
        compiled: The arguments of torch.compile.
        layers: The number of layers of every model; None for the usual one.
        rounds: The fewest rounds.
        seconds: What does not fit into this time is left out.
        cache: A folder for the caches of compilers.
        say: Called with what comes next.
    """

    device: torch.device
    models: tuple[Model, ...]
    modes: tuple[Mode, ...]
    variants: tuple[Variant, ...]
    sections: tuple[str, ...]
    limit: int
    compiled: dict[str, Any]
    tiny: bool
    layers: int | None
    rounds: int
    seconds: float
    cache: Path
    say: Callable[[str], None]
