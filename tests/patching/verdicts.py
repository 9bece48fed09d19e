"""Every RMSNorm class of the installed transformers, found in its source, built, and judged by patch.

`python tests/patching/verdicts.py` writes docs/verdicts.md from it.
"""

import collections
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from rmsnorm.patching import replacement
from rmsnorm.patching.patch import patch
from rmsnorm.patching.patch_report import Verdict
from verdict_table import TABLE, N, line, measured, parts, verdict_of

# Why the classes that are left compute another function.
OTHER_FUNCTIONS = (
    "`HYV4UnweightedRMSNorm` returns the factor alone, one number a row; the model multiplies by it later.",
    "`MuseSparkTextCenteredRMSNorm` adds 1 to the weight in the dtype of the weight, where Gemma's classes add it in fp32. In "
    'its place, `rms_norm(x, 1 + weight, eps, cast="late")` has its rounding.',
    "`MuseSparkTextInputScaledRMSNorm` multiplies by the weight first, rounds, and then normalizes without a weight: "
    "`rms_norm((x.float() * (1 + weight).float()).to(x.dtype), None, eps)`.",
    "`AXK2GatedRMSNorm` multiplies an `AXK2RMSNorm`, which is proven and replaced, by a gate that it computes from the result.",
    "`VoxtralRealtimeTextAdaRmsNorm` normalizes nothing: it is two linear layers with a GELU in between.",
)
# What the constructors call their arguments, other than the width, which goes by many names.
ARGUMENTS = {"group_size": N // 4, "activation": "silu"}


@dataclass(frozen=True)
class Found:
    """A class of transformers, one module of it if it can be built on its own, and what patch says of that."""

    folder: str
    cls: str
    build: Any
    problem: str = ""

    @functools.cached_property
    def _judged(self) -> tuple[Verdict | None, type[nn.Module] | None]:
        """The verdict, and the class that patch gave to the module."""
        if self.problem:
            return None, None
        module = self.build()
        verdicts = patch(nn.ModuleDict({"norm": module})).verdicts
        return next((v for v in verdicts if v.name == "norm"), None), type(module)

    @property
    def verdict(self) -> Verdict | None:
        return self._judged[0]

    def replaced(self) -> nn.Module:
        """As `module`, with the class that patch gives it; to prove each of these again would take minutes."""
        module, cls = self.module(), self._judged[1]
        assert cls is not None
        replacement.set_class(module, cls)
        return module

    def module(self) -> nn.Module:
        """A fresh one, its weight drawn at random."""
        module: nn.Module = self.build()
        if any(parameter.is_meta for parameter in module.parameters()):
            module.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(1)
        for parameter in module.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        return module

    @property
    def gated(self) -> bool:
        """Whether it is proven to be a gated norm."""
        return self.verdict is not None and self.verdict.spec is not None and self.verdict.spec.gate is not None

    @property
    def group(self) -> str:
        """The line of the summary that it belongs to."""
        v = self.verdict
        if v is None or v.spec is None:
            return "left"
        return verdict_of(v)


@functools.cache
def every() -> tuple[Found, ...]:
    """The classes named *RMSNorm*, and those of other names, *Norm*, that patch proves."""
    named, others = [], []
    for folder, module_name, cls in _classes():
        found = _build(folder, module_name, cls)
        (named if "rmsnorm" in cls.lower() else others).append(found)
    return tuple(sorted((*named, *(f for f in others if f.verdict is not None)), key=lambda f: (f.folder, f.cls)))


def _classes() -> Iterator[tuple[str, str, str]]:
    """(folder, module, class): by the source alone, since importing all of transformers takes minutes."""
    root = Path(transformers.__file__).parent
    for file in sorted(root.glob("models/*/modeling_*.py")):
        source = file.read_text()
        for name in re.findall(
            r"^ *class (\w*norm\w*)\((?:torch\.)?nn\.Module\)", source, re.IGNORECASE | re.MULTILINE
        ):
            if "rmsnorm" in name.lower() or name.lower().endswith("norm"):
                parts = file.relative_to(root).with_suffix("").parts
                yield parts[-2], ".".join(("transformers", *parts)), name


def _build(folder: str, module_name: str, name: str) -> Found:
    try:
        cls = getattr(importlib.import_module(module_name), name)
    except Exception as error:
        return Found(folder, name, None, f"cannot be imported: {type(error).__name__}")
    parameters = list(inspect.signature(cls).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p.name for p in positional if p.default is p.empty or p.name == "dim"]
    build = functools.partial(cls, *(ARGUMENTS.get(p, N) for p in needed))
    if needed == ["config"]:
        build = functools.partial(_from_config, cls, cls.__init__.__annotations__.get("config"))
    try:
        build()
    except Exception as error:
        return Found(folder, name, None, f"cannot be built on its own: {type(error).__name__}")
    return Found(folder, name, build)


def _from_config(cls: type[nn.Module], config: type) -> nn.Module:
    """With the configuration's defaults, which are a model's true widths: on meta, since some take gigabytes."""
    with torch.device("meta"):
        return cls(config())


def summary() -> dict[str, int]:
    counts = collections.Counter(found.group for found in every())
    return dict(counts.most_common())


def table() -> str:
    lines = [
        "# What patch finds in transformers",
        "",
        f"Every RMSNorm class of transformers {transformers.__version__}, written by `python tests/patching/verdicts.py`.",
        "Each class that can be built on its own is, with its default arguments; what it holds and how it is called then",
        "decide, so another configuration of the same class may get another verdict. The verdicts do not depend on the",
        "machine. The last three columns do: the share of outputs that change when the norm is replaced, on random rows,",
        "and by how many ulp at most, against the class run eagerly.",
        "",
        measured(),
        "",
        "| classes | verdict |",
        "|---|---|",
        *(f"| {count} | {group} |" for group, count in summary().items()),
        f"| {len(every())} | in all |",
        "",
        "| model | class | verdict | float32 | bfloat16 | float16 |",
        "|---|---|---|---|---|---|",
    ]
    for f in every():
        v = f.verdict
        said = f.group if v is not None and v.spec is not None else f"left: {f.problem or (v and v.reason)}"
        lines.append(line(f.folder, f.cls, said, proof=v))
    lines += ["", "Why these classes are left:", "", *(f"- {one}" for one in OTHER_FUNCTIONS)]
    return "\n".join(lines) + f"\n\n{parts()[1]}"


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table())
    print(*(f"{count:4} {group}" for group, count in summary().items()), sep="\n", file=sys.stderr)
