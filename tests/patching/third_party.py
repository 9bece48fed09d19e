"""RMSNorm classes of other libraries than transformers, and what `rmsnorm.prove` finds for each.

`python tests/patching/third_party.py` writes the part of docs/verdicts.md about them. Run it where torch for CPUs,
rmsnorm and as many of the libraries as possible are installed: each with `pip install --no-deps`, then what its import
needs. A class that cannot be imported or built is listed with the reason. To add one, add it to `NORMS`.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import types
import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import rmsnorm
import verdict_table
from rmsnorm.errors import one_line
from verdict_table import N, line, verdict_of

# Arguments that a line of the table does not show.
_USUAL = ("dim", "size", "channels", "num_channels", "hidden_size", "embedding_dim", "eps", "norm_eps", "config")


@dataclass(frozen=True)
class Norm:
    """A class of another library, and how to build one.

    Attributes:
        library: The name of its distribution.
        where: The module that defines it.
        cls: The name of the class.
        arguments: What its constructor gets, by name; or its configuration, if the class has one, `Config`.
        built_for: The shape for which it makes its weight after its construction, as Keras does; empty for others.
    """

    library: str
    where: str
    cls: str
    arguments: dict[str, Any] = field(default_factory=dict)
    built_for: tuple[int, ...] = ()

    @property
    def version(self) -> str | None:
        """The installed version; None if there is none."""
        try:
            return importlib.metadata.version(self.library).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            return None

    def build(self) -> nn.Module:
        """One of them. Raises whatever its import and its constructor raise."""
        with warnings.catch_warnings(action="ignore"):
            cls: Any = getattr(importlib.import_module(self.where), self.cls)
            config = getattr(cls, "Config", None)
            module: nn.Module = cls(**self.arguments) if config is None else cls(config(**self.arguments))
            if self.built_for:
                module.build(self.built_for)
        return module

    def line(self) -> str:
        """Its line of the table."""
        shown = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items() if name not in _USUAL)
        name = f"{self.where}.{self.cls}" + (f" ({shown})" if shown else "")
        try:
            proof = rmsnorm.prove(self.build())
        except Exception as error:
            return line(f"{self.library} {self.version or ''}".rstrip(), name, _unbuilt(error), proof=None)
        return line(f"{self.library} {self.version}", name, verdict_of(proof), proof=proof)


def _unbuilt(error: Exception) -> str:
    return f"cannot be imported or built: {one_line(error)[:120]}"


# What Megatron's wrapper reads of its configuration.
MEGATRON_CONFIG = types.SimpleNamespace(
    normalization="RMSNorm", layernorm_zero_centered_gamma=False, persist_layer_norm=False, sequence_parallel=False,
    memory_efficient_layer_norm=False,
)  # fmt: skip
NORMS = (
    Norm("torch", "torch.nn", "RMSNorm", {"normalized_shape": N}),
    Norm("torch", "torch.nn", "RMSNorm", {"normalized_shape": (4, 24)}),
    Norm("torch", "torch.nn", "RMSNorm", {"normalized_shape": N, "elementwise_affine": False}),
    Norm("torchtune", "torchtune.modules.rms_norm", "RMSNorm", {"dim": N}),
    Norm("torchtune", "torchtune.models.gemma.rms_norm", "GemmaRMSNorm", {"dim": N}),
    Norm("torchtitan", "torchtitan.models.common.nn_modules", "RMSNorm", {"normalized_shape": N}),
    Norm("torchtitan", "torchtitan.models.qwen3_5.model", "OffsetRMSNorm", {"dim": N}),
    Norm("torchtitan", "torchtitan.models.qwen3_5.model", "RMSNormGated", {"dim": N}),
    Norm("diffusers", "diffusers.models.normalization", "RMSNorm", {"dim": N, "eps": 1e-6}),
    Norm("diffusers", "diffusers.models.normalization", "RMSNorm", {"dim": N, "eps": 1e-6, "bias": True}),
    Norm("diffusers", "diffusers.models.normalization", "MochiRMSNorm", {"dim": N, "eps": 1e-6}),
    Norm(
        "diffusers", "diffusers.models.normalization", "LuminaRMSNormZero",
        {"embedding_dim": N, "norm_eps": 1e-6, "norm_elementwise_affine": True},
    ),
    Norm("diffusers", "diffusers.pipelines.kolors.text_encoder", "RMSNorm", {"normalized_shape": (N,)}),
    Norm("diffusers", "diffusers.models.transformers.transformer_krea2", "Krea2RMSNorm", {"dim": N}),
    Norm(
        "diffusers", "diffusers.models.transformers.transformer_qwenimage21", "QwenImage21ZeroCenterRMSNorm",
        {"dim": N},
    ),
    Norm(
        "diffusers", "diffusers.models.transformers.transformer_cosmos3", "Cosmos3NemotronRMSNorm",
        {"dim": N, "eps": 1e-6},
    ),
    Norm("diffusers", "diffusers.models.transformers.transformer_mochi", "MochiModulatedRMSNorm", {"eps": 1e-6}),
    Norm("diffusers", "diffusers.models.transformers.transformer_stable_audio3", "StableAudio3RMSNorm", {"dim": N}),
    Norm("diffusers", "diffusers.models.autoencoders.autoencoder_kl_wan", "WanRMS_norm", {"dim": N}),
    Norm("diffusers", "diffusers.models.autoencoders.autoencoder_kl_ltx2", "PerChannelRMSNorm"),
    Norm(
        "diffusers", "diffusers.models.autoencoders.autoencoder_kandinsky6_sr", "Kandinsky6VAERMSNorm",
        {"num_channels": N},
    ),
    Norm("timm", "timm.layers.norm", "RmsNorm", {"channels": N}),
    Norm("timm", "timm.layers.norm", "RmsNorm", {"channels": N, "affine": False}),
    Norm("timm", "timm.layers.norm", "RmsNormFp32", {"channels": N}),
    Norm("timm", "timm.layers.norm", "RmsNorm2d", {"channels": N}),
    Norm("timm", "timm.layers.norm", "SimpleNorm", {"channels": N}),
    Norm("timm", "timm.layers.norm_act", "RmsNormAct", {"num_channels": N}),
    Norm("x-transformers", "x_transformers.x_transformers", "RMSNorm", {"dim": N}),
    Norm("x-transformers", "x_transformers.x_transformers", "SimpleRMSNorm", {"dim": N}),
    Norm("x-transformers", "x_transformers.x_transformers", "AdaptiveRMSNorm", {"dim": N}),
    Norm("x-transformers", "x_transformers.x_transformers", "MultiheadRMSNorm", {"dim": N, "heads": 4}),
    Norm("fla-core", "fla.modules", "RMSNorm", {"hidden_size": N}),
    Norm("fla-core", "fla.modules", "FusedRMSNormGated", {"hidden_size": N}),
    Norm("fla-core", "fla.modules.norm.layernorm_gated", "RMSNormGated", {"hidden_size": N}),
    Norm("xformers", "xformers.ops.rmsnorm", "RMSNorm", {"dim": N}),
    Norm("litgpt", "litgpt.model", "RMSNorm", {"size": N}),
    Norm("litgpt", "litgpt.model", "RMSNorm", {"size": N, "add_unit_offset": True}),
    Norm("keras", "keras.layers", "RMSNormalization", built_for=(4, N)),
    Norm("liger_kernel", "liger_kernel.transformers.rms_norm", "LigerRMSNorm", {"hidden_size": N}),
    Norm("liger_kernel", "liger_kernel.transformers.rms_norm", "LigerRMSNormForGemma", {"hidden_size": N}),
    Norm("quack-kernels", "quack.rmsnorm", "QuackRMSNorm", {"dim": N}),
    Norm("flash-attn", "flash_attn.ops.triton.layer_norm", "RMSNorm", {"hidden_size": N}),
    Norm("mamba-ssm", "mamba_ssm.ops.triton.layer_norm", "RMSNorm", {"hidden_size": N}),
    Norm("mamba-ssm", "mamba_ssm.ops.triton.layernorm_gated", "RMSNorm", {"hidden_size": N}),
    Norm("megatron-core", "megatron.core.transformer.torch_norm", "L2Norm", {"hidden_size": N}),
    Norm(
        "megatron-core", "megatron.core.transformer.torch_norm", "WrappedTorchNorm",
        {"config": MEGATRON_CONFIG, "hidden_size": N},
    ),
)  # fmt: skip
# Packages that importing these libraries needs but their norms do not; empty ones take the place of those that are absent.
UNUSED = ("torchvision", "lightning", "torchao", "torchdata", "datasets", "sentencepiece", "tiktoken", "blobfile")


class _Name(type):
    """A name in an absent package: an empty class, whose attributes, and what a call returns, are empty classes too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})

    def __call__(cls, *_: Any, **__: Any) -> Any:
        return cls


class _Empty(types.ModuleType):
    """An absent package: each name in it is an empty class or, imported as a module, another of these."""

    __path__: list[str] = []  # noqa: RUF012  # as of a package
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds empty packages in place of those of `UNUSED` that are not installed."""

    def __init__(self) -> None:
        self.names = [name for name in UNUSED if importlib.util.find_spec(name) is None]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing in it."""


def part() -> str:
    """The part of docs/verdicts.md about other libraries."""
    lines = [
        verdict_table.OTHERS,
        "",
        "RMSNorm classes of other libraries, as `rmsnorm.prove` finds them, written by `python tests/patching/third_party.py`,",
        "which also says how each is built. `left` names the first thing that no proof allows: a forward that takes more than",
        "one tensor and a gate, a weight of another name, or code that could hold state, such as an import or a kernel of its",
        "own. sentence-transformers has no RMSNorm class. flash-attn and mamba-ssm come as source code that is compiled with",
        "CUDA, and QuACK imports NVIDIA's CUTLASS, so these are listed but cannot be built on a CPU.",
        "",
        verdict_table.measured(),
        "",
        "| library | class | verdict | float32 | bfloat16 | float16 |",
        "|---|---|---|---|---|---|",
        *(norm.line() for norm in NORMS),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the part."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    sys.meta_path.append(Absent())
    first, _ = verdict_table.parts()
    text = part()
    verdict_table.TABLE.write_text(f"{first.rstrip()}\n\n{text}")
    print(*(f"{norm.library} {norm.version}" for norm in {n.library: n for n in NORMS}.values()), sep="\n")


if __name__ == "__main__":
    main()
