"""Forward and training steps of a language model on random token ids, run eagerly or compiled."""

import copy
import itertools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rmsnorm.errors import CommandError
from rmsnorm.tools.models import architecture, library

_NUMBERS = itertools.count()


class Steps:
    """Forward and training steps of a language model. They do not wait for the GPU.

    Args:
        model: The model.
        device: The device of the model.
        compiled: The arguments of torch.compile; None to run eagerly.

    Attributes:
        model: The model.
        device: The device of the model.
        vocabulary: How many token ids there are.
        positions: The longest sequence; None if the configuration does not limit it.
    """

    def __init__(self, model: Any, device: torch.device, compiled: Mapping[str, Any] | None = None) -> None:
        self.model, self.device = model, device
        text = architecture.text_configuration(model.config, f"the configuration of {type(model).__name__}")
        vocabulary, positions = (getattr(text, key, None) for key in ("vocab_size", "max_position_embeddings"))
        if not isinstance(vocabulary, int) or vocabulary < 1:
            raise CommandError(f"{type(model).__name__} takes no token ids: give the folder of a language model")
        self.vocabulary = vocabulary
        self.positions = positions if isinstance(positions, int) and positions > 0 else None
        self._run = _first_output_of(model) if compiled is None else _compile(_first_output_of(model), compiled)
        self._failed = (
            f"{type(model).__name__} cannot be {'run on token ids alone' if compiled is None else 'compiled'}"
        )
        # Stored, so that a timed step does not generate them.
        self._arguments: dict[str, Any] = {}
        self._dy: Tensor | None = None

    def forward(self, tokens: int, batch: int = 1) -> None:
        """Run a forward step without gradients."""
        self._set_training(False)
        with torch.no_grad():
            self.outputs(tokens, batch)

    def train(self, tokens: int, batch: int = 1) -> None:
        """Run forward and backward of one batch, from a random cotangent, without an optimizer."""
        self._set_training(True)
        self.backward(self.outputs(tokens, batch))
        self.model.zero_grad(set_to_none=True)

    def training_outputs(self, tokens: int, batch: int = 1) -> Tensor:
        """Run the forward pass of a training step, and return its output."""
        self._set_training(True)
        return self.outputs(tokens, batch)

    def backward(self, y: Tensor) -> Tensor:
        """Run the backward pass of a training step from its output y, and return the cotangent of y."""
        if self._dy is None or self._dy.shape != y.shape:
            generator = torch.Generator(y.device).manual_seed(1)
            self._dy = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator)
        torch.autograd.backward(y, self._dy)
        return self._dy

    def outputs(self, tokens: int, batch: int = 1) -> Tensor:
        """Run the model on `batch` sequences of `tokens` random ids, and return its first output.

        Raises:
            CommandError: If the model cannot run on token ids alone, or cannot be compiled.
        """
        with library.command_errors(self._failed):
            if self._arguments.get("input_ids", _NO_IDS).shape != (batch, tokens):
                generator = torch.Generator().manual_seed(0)
                ids = torch.randint(0, self.vocabulary, (batch, tokens), generator=generator).to(self.device)
                self._arguments = library.token_arguments(self.model, ids)
            return self._run(self._arguments)

    def _set_training(self, training: bool) -> None:
        if self.model.training != training:
            self.model.train(training)


_NO_IDS = torch.empty(0)


def copy_sharing_tensors(model: nn.Module) -> Any:
    """Return a copy of a model that shares its parameters and buffers, and whose norms can be replaced separately."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(t): t for t in tensors})


def _first_output_of(model: Any) -> Callable[[dict[str, Any]], Tensor]:
    def first_output(arguments: dict[str, Any]) -> Tensor:
        output = model(**arguments)
        y: Tensor | None = getattr(output, "last_hidden_state", None)
        first: Tensor = output[0] if y is None else y
        return first

    return first_output


def _compile(run: Callable[[dict[str, Any]], Tensor], options: Mapping[str, Any]) -> Callable[[dict[str, Any]], Tensor]:
    """Compile a closure, with a code object of its own.

    torch.compile stores compiled graphs with the code object. Closures of one function share it, so a call of one
    closure would check the guards of all, and a few closures would reach the recompilation limit.
    """
    name = f"{run.__name__}_{next(_NUMBERS)}"
    code = run.__code__.replace(co_name=name)
    own = types.FunctionType(code, run.__globals__, name, run.__defaults__, run.__closure__)
    compiled: Callable[[dict[str, Any]], Tensor] = torch.compile(own, dynamic=False, **options)
    return compiled
