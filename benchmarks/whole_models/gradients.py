"""Which bits of the gradients recompute changes: one training step with and without it, in deterministic mode."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rmsnorm import bits
from rmsnorm.errors import one_line
from rmsnorm.tools.models.steps import Steps
from whole_models.definitions import PATCHED, RECOMPUTED, Model, Options, variant_named

_BATCH, _TOKENS = 1, 1024
_TINY = 2, 8


def prepare() -> None:
    """Let cuBLAS be deterministic, which it decides at its first use. The setting is torch's default on an H200."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def measure(model: Model, built: Any, options: Options) -> list[dict[str, Any]]:
    """Compare all gradients of the patched model with and without recompute, eager and compiled.

    Args:
        model: The model.
        built: The model as it is.
        options: The options.

    Returns:
        What was found eager and compiled, in types that `json.dumps` takes. `repeated` counts the elements that differ
        between two steps of the same model, which shows whether the other operators are deterministic.
    """
    batch, tokens = _TINY if options.tiny else (_BATCH, _TOKENS)
    patched, recomputed = (variant_named(name, options.variants) for name in (PATCHED, RECOMPUTED))
    assert patched is not None
    assert recomputed is not None
    found = []
    for compiled in model.ways:
        options.say(f"{model.name}, gradients, {'compiled' if compiled else 'eager'}")
        one: dict[str, Any] = {
            "model": model.name, "compiled": compiled, "layers": built.config.num_hidden_layers, "batch": batch,
            "tokens": tokens, "elements": sum(p.numel() for p in built.parameters()),
        }  # fmt: skip
        try:
            with _deterministic():
                plain, again = (
                    Steps(variant.applied(built), options.device, options.compiled if compiled else None)
                    for variant in (patched, recomputed)
                )
                first = _gradients(plain, tokens, batch)
                one["repeated"] = _differing(first, _gradients(plain, tokens, batch))
                one["differing"] = _differing(first, _gradients(again, tokens, batch))
        except Exception as error:  # noqa: BLE001  # an operator may have no deterministic form
            one["reason"] = one_line(error)[:300]
            built.zero_grad(set_to_none=True)
        found.append(one)
    return found


def _gradients(steps: Steps, tokens: int, batch: int) -> dict[str, Tensor]:
    steps.backward(steps.training_outputs(tokens, batch))
    found = {name: p.grad for name, p in steps.model.named_parameters() if p.grad is not None}
    steps.model.zero_grad(set_to_none=True)
    return found


def _differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> int:
    """Return how many elements differ. Raises ValueError if other parameters have gradients, or none has."""
    if not one or one.keys() != other.keys():
        raise ValueError(f"gradients of {len(one)} and of {len(other)} parameters cannot be compared")
    return sum(bits.differing(gradient, other[name])[0] for name, gradient in one.items())


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_deterministic_debug_mode(before)
