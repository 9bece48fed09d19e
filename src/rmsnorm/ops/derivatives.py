"""Autograd rules of operators: saved tensors, and derivatives that exist once and in reverse mode only.

operator  ->  autograd kernel  |- nothing to record: the implementation
                               |- a tangent, or torch.func: RuntimeError, because the tangent would be lost silently
                               `- a gradient: a torch.autograd.Function, whose backward pass is another operator
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rmsnorm import compat
from rmsnorm.ops.dispatch import load_sharding


def has_tangent(*args: Any) -> bool:
    """Whether a tensor among the arguments has a tangent of forward mode."""
    return compat.in_forward_ad() and any(
        isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args
    )


def differentiated(*args: Any) -> bool:
    """Whether autograd or forward mode must record the call: a tensor requires a gradient or has a tangent."""
    recorded = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    return recorded or has_tangent(*args)


def refuse_transforms(name: str, instead: str) -> None:
    """Raise RuntimeError under torch.func, where an operator cannot call an autograd function written in Python."""
    if compat.transforms_active():
        raise RuntimeError(
            f"[torch.ops.rmsnorm.{name}] torch.func cannot differentiate the operator itself: call {instead} instead"
        )


def saved_tensors(ctx: Any, where: str, names: str) -> tuple[Any, ...]:
    """What was saved. Raises RuntimeError, as torch does, if a tensor was modified in place since, and names the fix.

    Args:
        ctx: Of the autograd function.
        where: The function that was called, for the message.
        names: The arguments that were saved, for the message.
    """
    rows = "s" if where == "add_rms_norm" else "x"
    try:
        return ctx.saved_tensors  # type: ignore[no-any-return]
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"[{where}] {names} was modified in place after the forward pass, which keeps them for the backward "
            f"pass: write {rows} = {rows} + ... instead of {rows} += ..., call optimizer.step() after the last "
            f"backward pass, or rmsnorm.unpatch the norm ({error})"
        ) from None


def undifferentiable(name: str, message: str) -> type[torch.autograd.Function]:
    """An operator with an autograd rule that raises, so that second derivatives are not silently zero.

    Args:
        name: The operator's.
        message: Of the RuntimeError.
    """

    class Undifferentiable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return getattr(torch.ops.rmsnorm, name).default(*args)  # type: ignore[no-any-return]

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> None:
            raise RuntimeError(message)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor) -> None:
            raise RuntimeError(message)

    return Undifferentiable


def reverse_only(
    name: str,
    where: str,
    setup_context: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> type[torch.autograd.Function]:
    """An operator as an autograd function, also for torch.func, which raises in forward mode.

    Args:
        name: The operator's.
        where: The public function, for the message.
        setup_context: As of `torch.autograd.Function`, like gradients, its backward.
        gradients: From the context and the gradients of all outputs to those of all arguments.
    """

    class ReverseOnly(torch.autograd.Function):
        generate_vmap_rule = True
        backward = staticmethod(gradients)

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return getattr(torch.ops.rmsnorm, name).default(*args)  # type: ignore[no-any-return]

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor) -> None:
            raise RuntimeError(no_forward_mode(where))

    ReverseOnly.setup_context = staticmethod(setup_context)  # type: ignore[assignment,method-assign]
    return ReverseOnly


def no_forward_mode(where: str) -> str:
    """The message about a tangent of forward mode."""
    return f"[{where}] forward mode is not implemented: use reverse mode, such as torch.func.vjp or backward"


def autograd_kernel(
    name: str, where: str, instead: str, function: type[torch.autograd.Function]
) -> Callable[..., tuple[Tensor, ...]]:
    """The kernel of an operator for the dispatch key Autograd.

    Args:
        name: The operator's.
        where: The public function, for the message about forward mode.
        instead: What to call under torch.func, for the message.
        function: Computes the operator and records it.
    """

    def kernel(*args: Any) -> tuple[Tensor, ...]:
        load_sharding()
        if not differentiated(*args):
            with compat.below_autograd():
                return getattr(torch.ops.rmsnorm, name).default(*args)  # type: ignore[no-any-return]
        refuse_transforms(name, instead)
        if has_tangent(*args):
            raise RuntimeError(no_forward_mode(where))
        return function.apply(*args)  # type: ignore[no-any-return]

    return kernel
