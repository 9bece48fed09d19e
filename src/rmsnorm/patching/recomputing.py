"""Makes the forward of a model run in the context `recompute`, for `patch(model, recompute=True)`.

The model gets a class of ours in front of its own, as norms do. Hooks of torch.nn.Module would not do, because PEFT
calls the model's forward without them, and after a KeyboardInterrupt they would leave the context active.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rmsnorm.ops.eager_recomputation import Recomputation, recompute
from rmsnorm.patching.replacement import ReplacedClass, original_class, set_class
from rmsnorm.patching.stand_in import put_in_front

# The counts of each model's last forward pass. They are not attributes, which copies and checkpoints would contain.
_last: "weakref.WeakKeyDictionary[nn.Module, Recomputation]" = weakref.WeakKeyDictionary()


class _Recomputing(ReplacedClass):
    """Put in front of the class of a model."""

    _rmsnorm_recomputing = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the original class, because the class made here cannot be found by its name."""
        if "_rmsnorm_recomputing" not in vars(type(self)):
            return super().__reduce_ex__(protocol)  # another library's subclass of ours
        return _rebuild, (self._rmsnorm_original,), self.__getstate__()


def is_recomputing(module: nn.Module) -> bool:
    """Whether the forward of a module runs in the context."""
    return getattr(type(module), "_rmsnorm_recomputing", False)


def whole_model(model: nn.Module) -> nn.Module:
    """The model inside the wrapper of torch.compile, if it has one."""
    return getattr(model, "_orig_mod", model)


def set_recomputing(module: nn.Module, recomputes: bool) -> None:
    """Make the module's forward run in the context, or stop doing so."""
    if is_recomputing(module) != recomputes:
        cls = original_class(module)
        set_class(module, _recomputing_class(cls, cls.forward) if recomputes else cls)  # type: ignore[arg-type]


def last_recomputation(module: nn.Module) -> Recomputation:
    """The counts of the module's last forward pass with gradients; all are 0 if there was none."""
    return _last.get(module, Recomputation())


@functools.cache
def _recomputing_class(cls: type[nn.Module], own_forward: Callable[..., Any]) -> type[nn.Module]:
    @functools.wraps(own_forward)  # torch.fx reads the parameters of what this wraps
    def forward(self: Any, *args: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return own_forward(self, *args, **named)
        with recompute() as recomputation:
            _last[self] = recomputation
            return own_forward(self, *args, **named)

    return put_in_front(_Recomputing, cls, _rmsnorm_recomputing=True, _rmsnorm_original=cls, forward=forward)


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    made = _recomputing_class(cls, cls.forward)  # type: ignore[arg-type]
    return made.__new__(made)
