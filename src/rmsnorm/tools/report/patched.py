"""A model that can run with its own norms or with those that `patch` puts in their place, eagerly or compiled."""

import abc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from rmsnorm import compat, memory
from rmsnorm.ops.eager_recomputation import recompute
from rmsnorm.patching.patch import patch
from rmsnorm.patching.replacement import set_class
from rmsnorm.tools import timing
from rmsnorm.tools.models import library
from rmsnorm.tools.models.steps import Steps, copy_sharing_tensors
from rmsnorm.tools.report.norms import Mode, NormResult
from rmsnorm.tools.report.result import CompiledStep, MemoryBytes

# With the model's own norms; with ours; with ours, but torch.compile fuses no residual additions with them.
Side = Literal["before", "after", "unfused"]


Measure = Callable[..., int]  # of a side, a number of tokens and optionally a context for the forward pass

_NO_CONTEXT = nullcontext()
_COMPILED: dict[str, Any] = {}  # the arguments of torch.compile


class Sides(abc.ABC):
    """A model that can run with its own norms or with ours.

    Attributes:
        sides: The sets of norms that it can run with.
        steps: Its steps with the norms that are in use.
    """

    sides: tuple[Side, ...]
    steps: Steps

    @abc.abstractmethod
    def use(self, side: Side) -> None:
        """Switch to the model's own norms or to ours."""

    def forward(self, tokens: int) -> None:
        """Run a forward step, and wait for the GPU."""
        self.steps.forward(tokens)
        wait_for(self.steps.device)

    def train(self, tokens: int) -> None:
        """Run forward and backward of one batch, from a random cotangent, without an optimizer; wait for the GPU."""
        self.steps.train(tokens)
        wait_for(self.steps.device)

    def saved_bytes(self, tokens: int) -> MemoryBytes:
        """Count the bytes kept for the backward pass with the model's own norms and with ours."""
        return self._each(self._saved, tokens)

    def peak_bytes(self, tokens: int) -> MemoryBytes | None:
        """Measure the most that is allocated during a training step; None where that cannot be measured."""
        if memory.allocated(lambda: None, self.steps.device).peak is None:
            return None
        return self._each(self._peak, tokens)

    def _each(self, measure: Measure, tokens: int) -> MemoryBytes:
        return MemoryBytes(tokens, measure("before", tokens), measure("after", tokens))

    def _saved(self, side: Side, tokens: int, context: AbstractContextManager[Any] = _NO_CONTEXT) -> int:
        self.use(side)
        with memory.saved_for_backward(self.steps.model.parameters()) as saved, context:
            y = self.steps.training_outputs(tokens)
            total = saved()
        del y
        return total

    def _peak(self, side: Side, tokens: int, context: AbstractContextManager[Any] = _NO_CONTEXT) -> int:
        self.use(side)

        def step() -> None:
            with context:
                y = self.steps.training_outputs(tokens)
            self.steps.backward(y)

        found = memory.allocated(step, self.steps.device)
        self.steps.model.zero_grad(set_to_none=True)
        assert found.peak is not None
        return found.peak


class PatchedModel(Sides):
    """A language model with proven norms, run eagerly.

    Attributes:
        model: The model.
        verdicts: What `patch` decided about each norm.
        modules: The norms, by name.
        own: Their own classes, by name.
        ours: The classes that `patch` gave them, by name.
    """

    sides = ("before", "after")

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.steps = Steps(model, device)

    def prove(self) -> None:
        """Prove and replace the norms. Raises CommandError if the model does not allow that."""
        own = {name: type(module) for name, module in self.model.named_modules()}
        with library.command_errors(f"the norms of {type(self.model).__name__} cannot be proven"):
            self.verdicts = patch(self.model).verdicts
        modules = dict(self.model.named_modules())
        self.modules: dict[str, nn.Module] = {v.name: modules[v.name] for v in self.verdicts}
        self.own: dict[str, type[nn.Module]] = {name: own[name] for name in self.modules}
        self.ours: dict[str, type[nn.Module]] = {name: type(module) for name, module in self.modules.items()}

    def fresh_results(self) -> tuple[NormResult, ...]:
        """Return a result without measurements for each norm."""
        return tuple(NormResult(v, library.norm_width(self.modules[v.name])) for v in self.verdicts)

    def facts(self) -> dict[str, Any]:
        """Return the model's class, size and dtype, and how many norms and norm parameters it has."""
        norms = self.modules.values()
        return {
            "class": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in self.model.parameters()})),
            "norms": len(norms),
            "norm_parameters": sum(p.numel() for module in norms for p in module.parameters(recurse=False)),
        }

    def use(self, side: Side) -> None:
        """Switch to the model's own norms or to ours."""
        for name, module in self.modules.items():
            set_class(module, (self.own if side == "before" else self.ours)[name])

    def _each(self, measure: Measure, tokens: int) -> MemoryBytes:
        """As in the base class, and also with our norms and `recompute`."""
        return replace(super()._each(measure, tokens), recomputed=measure("after", tokens, recompute()))


class CompiledModel(Sides):
    """Compiled copies of a model, one for each side, which share its weights.

    Args:
        patched: The model.

    Attributes:
        first_calls: The calls that compiled it.
    """

    sides = ("before", "after", "unfused")

    def __init__(self, patched: PatchedModel) -> None:
        patched.use("before")
        self._steps: dict[Side, Steps] = {}
        for side in self.sides:
            model = copy_sharing_tensors(patched.model)
            if side != "before":
                patch(model, fuse_residual=side == "after")
            self._steps[side] = Steps(model, patched.steps.device, _COMPILED)
        self.steps = self._steps["before"]
        self.first_calls: list[CompiledStep] = []

    def use(self, side: Side) -> None:
        """Switch to the model's own norms or to ours."""
        self.steps = self._steps[side]

    def compile(self, mode: Mode, tokens: int) -> None:
        """Compile a step for every side by running it."""
        for side in self.sides:
            self.use(side)
            start, graphs = timing.now(), compat.compiled_graphs()
            (self.train if mode == "training" else self.forward)(tokens)
            seconds = timing.now() - start
            self.first_calls.append(CompiledStep(mode, side, seconds, compat.compiled_graphs() - graphs))


def wait_for(device: torch.device) -> None:
    """Wait until the GPU has finished; on a CPU do nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
