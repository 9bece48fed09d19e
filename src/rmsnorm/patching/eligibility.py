"""What rules a norm out before its forward is run, and what its proof depends on."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from rmsnorm.errors import with_article
from rmsnorm.patching.rule import dtype_name
from rmsnorm.patching.stand_in import Absent, identity, is_plain
from rmsnorm.spec import DTYPES

_POSITIONAL = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)


def forward_parameters(cls: type[nn.Module]) -> list[inspect.Parameter]:
    """The parameters of the class's forward, without self.

    Raises:
        TypeError, ValueError: If the forward has no signature that can be read.
    """
    return list(inspect.signature(cls.forward).parameters.values())[1:]


def may_be_gated(cls: type[nn.Module]) -> bool:
    """Whether the class's forward takes a second argument, which may be a gate."""
    return len(forward_parameters(cls)) == 2


def why_ineligible(cls: type[nn.Module], module: nn.Module) -> str | None:
    """Why a norm cannot be proven, seen from what it holds and from its own class, `cls`; None if it may be."""
    try:
        parameters = forward_parameters(cls)
    except (TypeError, ValueError):
        return "its forward has no signature that can be read"
    if len(parameters) not in (1, 2) or any(p.kind not in _POSITIONAL for p in parameters):
        return f"its forward takes ({', '.join(map(str, parameters))}), not one tensor, or a tensor and a gate"
    shape = normalized_shape(module)
    if len(parameters) == 2 and shape is not None and len(shape) > 1:
        return f"its forward takes ({', '.join(map(str, parameters))}), and it normalizes over {len(shape)} dimensions"
    held = {name for name, value in {**module._parameters, **module._modules}.items() if value is not None}
    if others := sorted(held - {"weight"}):
        if len(held) == 1:
            return f"it holds {others[0]} in place of an attribute named weight"
        return f"it holds more than a weight: {', '.join(others)}"
    if module._modules.get("weight") is not None:
        return "its weight is a submodule"
    return _unusual_class(cls) or _unusual_weight(module)


def _unusual_class(cls: type[nn.Module]) -> str | None:
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        if vars(base).get("__slots__"):
            return "its class has __slots__, so its instances cannot change their class"
        for name in ("__getattribute__", "__getattr__"):
            if name in vars(base):
                return f"its class defines {name}"
        hook = vars(base).get("__init_subclass__")
        if hook is not None and _needs_arguments(hook.__func__):
            return "its class defines an __init_subclass__ with required arguments"
    return None


def _needs_arguments(hook: Callable[..., Any]) -> bool:
    own = list(inspect.signature(hook).parameters.values())[1:]
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in own)


def _unusual_weight(module: nn.Module) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    kind = type(weight).__name__
    if type(weight) is not nn.Parameter and kind != "DTensor":
        return f"its weight is {with_article(kind)}"
    shape = tuple(weight.shape)
    if shape != normalized_shape(module) and len(shape) != 1:
        return f"its weight has shape {shape}"
    if weight.numel() < 2 or weight.dtype not in DTYPES:
        return f"its weight has shape {shape} and dtype {dtype_name(weight.dtype)}"
    return None


def normalized_shape(module: nn.Module) -> tuple[int, ...] | None:
    """The last dimensions over which torch.nn.RMSNorm and similar classes say that they normalize."""
    shape = vars(module).get("normalized_shape")
    if isinstance(shape, tuple) and shape and all(type(n) is int and n > 0 for n in shape):
        return tuple(shape)
    return None


def fingerprint(cls: type[nn.Module], module: nn.Module) -> tuple[Any, ...]:
    """A key for everything that the proof of a norm depends on; `cls` is its own class.

    Of attributes that are not plain the names suffice, since a forward that reads one is refused.
    """
    weight = module._parameters.get("weight")
    held = [{k: v is None for k, v in of.items()} for of in (module._parameters, module._buffers, module._modules)]
    plain = {k: identity(v) if is_plain(v) else Absent for k, v in vars(module).items() if k != "training"}
    return (
        cls, None if weight is None else weight.shape, *(frozenset(h.items()) for h in held), frozenset(plain.items())
    )  # fmt: skip
