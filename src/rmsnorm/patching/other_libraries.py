"""What other libraries have done to a norm that keeps `patch` from replacing it, or our forward from running."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from rmsnorm.patching.replacement import is_method, original_class, rule_of, why_always_own_forward

ORDER = "patch the model first, then apply PEFT, torch.compile, FSDP, tensor parallelism or accelerate"


def check_not_fsdp1(model: nn.Module) -> None:
    """Raise RuntimeError if a part of the model is wrapped in FullyShardedDataParallel."""
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise RuntimeError(
            f"[patch] model is sharded by FullyShardedDataParallel, which flattens its parameters; {ORDER}"
        )


def why_class_is_fixed(module: nn.Module) -> str | None:
    """Why the class of a module must not be changed; None if it may be."""
    cls = type(module)
    if any(base.__name__ == "FSDPModule" for base in cls.__mro__):
        return "is sharded by FSDP, which has changed its class"
    if original_class(module) is not cls and "_rmsnorm_original" not in vars(cls):
        return f"has had its class changed to {cls.__name__} since it was patched"
    return None


def why_model_is_too_late(module: nn.Module) -> str | None:
    """Why it is too late for `patch(model, recompute=True)`, which had to come first; None if it is not."""
    if (why := why_class_is_fixed(module) or _why_class_is_made_for_it(module)) is not None:
        return f"{why}; {ORDER}, or use the context rmsnorm.recompute()"
    if (function := forward_on_instance(module)) is not None:
        return f"has a forward that was set on the instance ({function}); {ORDER}, or use rmsnorm.recompute()"
    return None


def _why_class_is_made_for_it(module: nn.Module) -> str | None:
    """Why torch may change or drop what is put in front of the module's class; None if it will not."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by torch.jit, and its forward is no Python"
    if isinstance(module, torch.fx.GraphModule):
        return "has a class made by torch.fx, which writes the forward anew when its graph is compiled"
    if parametrize.is_parametrized(module):
        return "has a class made by torch.nn.utils.parametrize, which takes it away again"
    return None


def why_too_late(module: nn.Module) -> str | None:
    """What was done to a norm that has to be done after `patch`, and the fix; None if nothing was."""
    if (why := why_class_is_fixed(module)) is not None:
        return f"{why}; {ORDER}"
    if type(module._parameters.get("weight")).__name__ == "DTensor":
        return f"has a sharded weight (a DTensor); {ORDER}"
    if (function := forward_on_instance(module)) is not None:
        return (
            f"has a forward that was set on the instance ({function}): have the library that did it skip the norms "
            f"(for Liger: rms_norm=False), or rebuild the model; {ORDER}"
        )
    return None


def why_inactive(module: nn.Module) -> str | None:
    """Why a norm that was replaced does not run our kernel on any input; None if it does on some."""
    cls = f"{type(module).__module__}.{type(module).__qualname__}"
    if rule_of(module) is None:
        return f"is not patched any more: its class is {cls}"
    if (function := forward_on_instance(module)) is not None:
        return f"runs a forward that was set on the instance ({function})"
    ours = next(vars(base)["forward"] for base in type(module).__mro__ if "_rmsnorm_rule" in vars(base))
    if type(module).forward is not ours:
        return f"runs the forward of {cls}"
    why = why_always_own_forward(module)
    return None if why is None else f"runs its own forward, because {why}"


def forward_on_instance(module: nn.Module) -> str | None:
    """The name of a forward that was set on the instance and is neither its class's nor a hook of accelerate's."""
    own, forward = vars(module), type(module).forward
    if "forward" not in own or is_method(module, own["forward"], forward):
        return None
    if "_hf_hook" in own and is_method(module, own.get("_old_forward"), forward):
        return None
    value = own["forward"]
    function = getattr(getattr(value, "func", value), "__func__", getattr(value, "func", value))
    where = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{where}.{name}" if where else name
