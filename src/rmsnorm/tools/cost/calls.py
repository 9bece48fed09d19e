"""Finds out how each norm of a model is called in a step and whether its output is kept, without computing anything."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rmsnorm import compat, memory
from rmsnorm.errors import CommandError
from rmsnorm.tools.cost.result import NormCall
from rmsnorm.tools.cost.sizes import head_dim, size_of
from rmsnorm.tools.models import library
from rmsnorm.tools.models.library import CallLimit, CallsExhausted

# The most calls of torch in a run without data, which take a few seconds. A scan over a long sequence needs more: the
# rows are then extrapolated from two short sequences.
_RUN_CALLS = 100_000
_SHORT = (16, 32)


def calls_of_norms(
    norms: dict[str, nn.Module], model: nn.Module, config: Any, batch: int, seq: int
) -> tuple[dict[str, tuple[NormCall, ...]], tuple[str, ...]]:
    """Find out what reaches each norm in one step.

    Args:
        norms: The norms, by name.
        model: The model, on the meta device.
        config: Its configuration.
        batch: The number of sequences.
        seq: The tokens of each.

    Returns:
        The calls of each norm, by name, without the norms whose width is unknown; and notes on how they were found.
    """
    if not norms:
        return {}, ()
    # A run needs at least one token; with no tokens there are no rows.
    tokens = (batch, seq) if batch and seq else (1, 1)
    try:
        with library.command_errors("a run without data"):
            found = _observed(norms, model, *tokens, _RUN_CALLS)
        if not (batch and seq):
            found = {name: tuple(call._replace(rows=0) for call in called) for name, called in found.items()}
        return found, _unreached(found)
    except CommandError as error:
        reason = error
    with contextlib.suppress(CommandError), library.command_errors("a run without data"):
        one, two = (_observed(norms, model, 1, short, 4 * _RUN_CALLS) for short in _SHORT)
        found = {name: _extrapolated(one[name], two[name], batch, seq) for name in norms}
        short = " and ".join(map(str, _SHORT))
        why = "it takes too long" if isinstance(reason.__cause__, CallsExhausted) else str(reason)
        return found, (f"rows are extrapolated from runs of {short} tokens: with {seq:,}, {why}", *_unreached(found))
    widths = {name: width for name, module in norms.items() if (width := library.norm_width(module))}
    guessed: dict[str, tuple[NormCall, ...]] = {
        name: (NormCall(_rows(name, width, config, batch * seq), width),) for name, width in widths.items()
    }
    notes: tuple[str, ...] = (
        "rows are guessed from the norms' names, and readers are assumed to keep all outputs, since the model does not "
        f"run on token ids alone: {reason}",
    )
    if unknown := [name for name in norms if name not in guessed]:
        notes += (
            f"{len(unknown)} norms without a weight are not counted, {unknown[0]} for example: their width is unknown",
        )
    return guessed, notes


def _unreached(found: dict[str, tuple[NormCall, ...]]) -> tuple[str, ...]:
    names = [name for name, called in found.items() if not called]
    return (f"{len(names)} norms do not run in a step on token ids, for example {names[0]}",) if names else ()


def _observed(
    norms: dict[str, nn.Module], model: nn.Module, batch: int, seq: int, most: int
) -> dict[str, tuple[NormCall, ...]]:
    """Return the calls of the norms in a forward pass on tensors without data. Raises what the model raises.

    It is that of a training step, to find out which outputs are saved for the backward pass.
    """
    found: dict[str, list[NormCall]] = {name: [] for name in norms}

    def watch(name: str, width: int | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            (x,) = (a for a in (*args, *named.values()) if isinstance(a, Tensor))
            n = width or x.shape[-1]
            found[name].append(NormCall(x.numel() // n, n))

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name, library.norm_width(module)), with_kwargs=True)
        for name, module in norms.items()
    ]
    with contextlib.suppress(Exception):  # this form of experts has no shapes that depend on the routing
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    model.train()  # dropout makes a tensor of its own, which is saved instead of the output
    try:
        with (
            torch.enable_grad(),
            memory.saved_outputs(norms.values()) as outputs,
            CallLimit(most),
            compat.tensors_without_data(),
        ):
            library.run_on_tokens(model, torch.zeros(batch, seq, dtype=torch.long, device="meta"))
    finally:
        for handle in hooks:
            handle.remove()
    saved = {name: [output.saved for output in outputs if output.module is norms[name]] for name in norms}
    return {
        name: tuple(call._replace(is_saved=s) for call, s in zip(found[name], saved[name], strict=True))
        for name in norms
    }


def _extrapolated(one: tuple[NormCall, ...], two: tuple[NormCall, ...], batch: int, seq: int) -> tuple[NormCall, ...]:
    """Extrapolate rows linearly from two short sequences. Raises ValueError if the numbers of calls differ."""
    short, long = _SHORT
    if [call.width for call in one] != [call.width for call in two]:
        raise ValueError("the number of calls depends on the length of the sequence")
    return tuple(
        b._replace(rows=batch * (a.rows + (b.rows - a.rows) * (seq - short) // (long - short)) if batch and seq else 0)
        for a, b in zip(one, two, strict=True)
    )


def _rows(name: str, width: int, config: Any, tokens: int) -> int:
    """Guess the rows of a norm: one for queries or keys that is as wide as a head gets a row for each head."""
    last = name.rpartition(".")[2]
    heads = size_of(config, "num_attention_heads") or 1
    if width == head_dim(config) != size_of(config, "hidden_size") and last.startswith(("q_", "k_")):
        return tokens * (heads if last.startswith("q_") else size_of(config, "num_key_value_heads") or heads)
    return tokens
