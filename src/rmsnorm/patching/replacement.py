"""What a replaced norm does: a class of ours in front of the norm's own, made from the rule that was proven of it.

forward  ->  why_own   None: our kernel
                       a reason: the norm's own forward, as if it had not been replaced
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rmsnorm import compat
from rmsnorm.functional import explain, rms_norm
from rmsnorm.kernels.host import loader as host
from rmsnorm.patching.observe import Absent, InFront, Method, identity, is_plain, put_in_front
from rmsnorm.patching.proof import Rule, arguments
from rmsnorm.spec import DTYPES, LARGEST_EPS, Spec


def original(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before `patch`."""
    return getattr(type(module), "_rmsnorm_original", type(module))


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a replaced norm; None for any other module."""
    return getattr(type(module), "_rmsnorm_rule", None)


class _Replacement(InFront):
    """What a replaced norm does, in front of its own class. Adds no attribute to any instance."""

    _rmsnorm_rule: Rule
    _rmsnorm_original: type[nn.Module]
    # The kernels library of Hugging Face would put its own forward over ours, since the name is inherited.
    kernel_condition = staticmethod(lambda module: False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as its own class and a rule, because the class made here cannot be found by its name."""
        if "_rmsnorm_rule" not in vars(type(self)):
            return super().__reduce_ex__(protocol)  # of a class made from ours: it would come back as ours
        return _rebuild, (self._rmsnorm_original, self._rmsnorm_rule), self.__getstate__()

    def extra_repr(self) -> str:
        """As the norm's own, and how it is computed now, so that the repr of a model shows what is patched."""
        own = super().extra_repr()  # type: ignore[misc]
        offset = f", offset {self._rmsnorm_rule.offset:g}" if self._rmsnorm_rule.offset else ""
        return f"{own}{', ' if own else ''}rmsnorm: {self._rmsnorm_rule.cast}{offset}"

    def _rmsnorm_explain(self, x: Any) -> str:
        """For `rmsnorm.explain`."""
        return explained(self, self._rmsnorm_rule, x)

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script, which compiles the source of a forward: the norm gets its own class back."""
        norm: Any = self
        become(norm, self._rmsnorm_original)
        words = "torch.jit.script has given the norm its own class back: patch the model again to use it in Python"
        warnings.warn(f"[patch] {words}", stacklevel=2)
        return norm  # type: ignore[no-any-return]


def weight_of(module: Any) -> Any:
    """The weight, also where a parametrization or an older FSDP has put something else in the parameter's place."""
    try:
        return module._parameters["weight"]
    except KeyError:
        return getattr(module, "weight", None)


def why_own(module: Any, x: Any, rule: Rule | None = None) -> str | None:
    """Why a norm with a rule, by default that of a replaced norm, runs its own forward on x; None where ours runs."""
    rule, w, eps = _held(module, rule)
    return _changed(rule, module, w, eps) or _unproven(rule, x, w) or _unserved(x, w, rule.shape)


def changed(module: Any) -> str | None:
    """Why a replaced norm runs its own forward on every input; None if it does not."""
    rule, w, eps = _held(module)
    return _changed(rule, module, w, eps)


def _held(module: Any, rule: Rule | None = None) -> tuple[Rule, Any, float | None]:
    """The rule of a norm, its weight and its eps, which is None if it is nothing that we could take."""
    rule = rule or rule_of(module)
    assert rule is not None
    return rule, weight_of(module) if rule.weighted else None, rule.number(getattr(module, rule.eps, Absent))


def served(module: Any, x: Tensor, rule: Rule | None = None) -> tuple[Tensor, Tensor | None, Spec]:
    """What our kernel is given where it runs, which `why_own` says: x with its rows flat, the weight, and the spec."""
    rule, w, eps = _held(module, rule)
    assert eps is not None
    return x.flatten(-rule.k), None if w is None else w.flatten(), Spec(eps, rule.cast, rule.offset)


def explained(module: Any, rule: Rule, x: Any) -> str:
    """Which kernel a norm with this rule would run on x, or why its own forward."""
    own = why_own(module, x, rule)
    if own is not None:
        return f"the norm's own forward, because {own}"
    x, w, spec = served(module, x, rule)
    return explain(x, w, eps=spec.eps, cast=spec.cast, offset=spec.offset)


def _changed(rule: Rule, module: Any, w: Any, eps: float | None) -> str | None:
    """Why the proof says nothing about the module as it is now."""
    if eps is None:
        return f"its {rule.eps} is {getattr(module, rule.eps, 'missing')}"
    if w is None and rule.weighted:
        return "its weight is None"
    for name, value in rule.facts:
        if value is Method:
            same = name not in vars(module)
        else:
            now = getattr(module, name, Absent)
            same = now is value or (is_plain(now) and identity(now) == identity(value))
        if not same:
            return f"its {name} has changed since it was proven"
    return None


def _unproven(rule: Rule, x: Any, w: Any) -> str | None:
    """Why the proof says nothing about this input."""
    if not isinstance(x, Tensor):
        return f"its input is a {type(x).__name__}"
    if rule.own and (x.dtype, None if w is None else w.dtype) in rule.own:
        return f"it was not proven for {_dtypes(x, w)}"
    if x.dim() not in rule.ranks:
        return f"it was not proven for an input of {x.dim()} dimensions"
    if rule.autocast and torch.is_autocast_enabled(x.device.type):
        return "autocast may cast its input"
    return None


def _dtypes(x: Tensor, w: Tensor | None) -> str:
    text = f"{x.dtype} input" + ("" if w is None else f" with {w.dtype} weight")
    return text.replace("torch.", "")


# Subclasses that take our operators apart themselves, or know them.
_KNOWN_SUBCLASSES = ("torch._subclasses.", "torch.distributed.")


def _unserved(x: Tensor, w: Tensor | None, shape: tuple[int, ...] | None) -> str | None:
    """Why our kernels cannot serve a call that the norm's own forward may well serve."""
    if (exported := _exported()) is not None:
        return exported  # first, because a tracer warns where a size is compared
    for name, t in (("input", x), ("weight", w)):
        if t is None:
            continue
        if t.dtype not in DTYPES or t.is_nested or t.layout is not torch.strided:
            return f"its {name} is a {'nested' if t.is_nested else t.layout} tensor of {t.dtype}".replace("torch.", "")
        cls = type(t)
        if (
            cls not in (Tensor, nn.Parameter)
            and cls.__torch_dispatch__ is not Tensor.__torch_dispatch__
            and not cls.__module__.startswith(_KNOWN_SUBCLASSES)
        ):
            return f"its {name} is a {cls.__name__}"
    if shape is not None and x.shape[-len(shape) :] != shape:
        return f"its input has shape {tuple(x.shape)}"
    if w is not None and w.shape != (x.shape[-1:] if shape is None else shape):
        return f"its weight has shape {tuple(w.shape)}, its input {tuple(x.shape)}"
    if w is not None and w.device != x.device:
        return f"its weight is on {w.device}, its input on {x.device}"
    return _inference_tensor(x, w)


def _exported() -> str | None:
    """Whether a graph is made for others, who do not have our operators."""
    if torch.compiler.is_compiling():
        onnx = "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()
        return "it is exported to ONNX" if onnx else None
    return "it is traced by torch.jit" if compat.is_tracing() else None


def _inference_tensor(x: Tensor, w: Tensor | None) -> str | None:
    """Autograd keeps no tensor that was made in inference mode; the norm's own forward has it keep a copy."""
    if w is None or not w.requires_grad or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    return "its input was made in inference mode and its weight is trained" if x.is_inference() else None


def _order(x: Tensor, k: int) -> list[int] | None:
    """The dimensions of x as they lie in memory, if that is another order: torch's own operators keep it for y.

    None where our kernels, which give y in the order of its dimensions, give what torch gives.
    """
    rows, strides = range(x.dim() - k), x.stride()
    order = sorted(rows, key=lambda axis: -strides[axis] if x.shape[axis] > 1 else 0)
    moved = [axis for axis in order if x.shape[axis] > 1]
    if moved == sorted(moved) or any(x.stride(axis) == 0 for axis in moved):
        return None
    return [*order, *range(x.dim() - k, x.dim())]


def replacement(cls: type[nn.Module], rule: Rule) -> type[nn.Module]:
    """A subclass of the class, by the same name, since users of transformers match on it."""
    return _made(cls, rule, cls.forward)  # type: ignore[arg-type]  # classes hash by identity


@functools.cache
def _made(cls: type[nn.Module], rule: Rule, theirs: Callable[..., Tensor]) -> type[nn.Module]:
    (argument,) = arguments(cls)
    forward = serving(rule, theirs, argument.name)
    # Not functools.wraps: what follows __wrapped__ would find the original forward.
    forward.__name__, forward.__qualname__, forward.__doc__ = "forward", theirs.__qualname__, theirs.__doc__
    forward.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]
    return put_in_front(_Replacement, cls, _rmsnorm_rule=rule, _rmsnorm_original=cls, forward=forward)


def serving(rule: Rule, theirs: Callable[..., Tensor], argument: str) -> Callable[..., Tensor]:
    """A forward that runs our kernel where the rule holds and theirs elsewhere; argument is the name of its input."""
    cast, offset, held = rule.cast, rule.offset, rule.eps
    weighted, shape, ranks, facts = rule.weighted, rule.shape, rule.ranks, rule.facts
    judged = bool(rule.own) or rule.autocast  # what else can be unproven is asked here, in a fraction of the time
    k = rule.k

    def forward(self: Any, *args: Tensor, **named: Tensor) -> Tensor:
        if len(args) + len(named) != 1 or (named and argument not in named):
            return theirs(self, *args, **named)  # which raises the error that it always raised
        x = args[0] if args else named[argument]
        w = weight_of(self) if weighted else None
        eps = getattr(self, held, Absent)
        if type(eps) is not float or not 0.0 <= eps <= LARGEST_EPS:
            eps = rule.number(eps)
        if eps is None or (w is None and weighted) or (facts and _changed(rule, self, w, eps) is not None):
            return theirs(self, x)
        if not isinstance(x, Tensor) or x.dim() not in ranks or (judged and _unproven(rule, x, w) is not None):
            return theirs(self, x)
        if not x.is_contiguous() and (order := _order(x, k)) is not None:
            y = forward(self, x.permute(order))
            return y.permute([order.index(axis) for axis in range(x.dim())])
        if k == 1 and (shape is None or x.shape[-1:] == shape) and not torch.compiler.is_compiling():
            y = host.norm(x, None, w, eps, cast, offset)
            if y is not None:
                return y  # type: ignore[no-any-return]
        if _unserved(x, w, shape) is not None:
            return theirs(self, x)
        if k == 1:
            return rms_norm(x, w, eps, cast=cast, offset=offset)
        w = None if w is None else w.flatten()
        return rms_norm(x.flatten(-k), w, eps, cast=cast, offset=offset).view(x.shape)

    return forward


def _rebuild(cls: type[nn.Module], rule: Rule) -> nn.Module:
    made = replacement(cls, rule)
    return made.__new__(made)


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the module's class, and what accelerate has kept of it: its bound forward."""
    before = type(module).forward
    if cls is type(module):
        return
    module.__class__ = cls
    for key, value in vars(module).items():
        if is_bound(module, value, before):
            module.__dict__[key] = MethodType(cls.forward, module)


def is_bound(module: nn.Module, value: object, function: object) -> bool:
    """Whether the value is the function as a method of the module."""
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is function


def rebound(module: nn.Module) -> str | None:
    """Who has put another forward on the instance, where neither its class's nor accelerate's hook is there."""
    own, forward = vars(module), type(module).forward
    if "forward" not in own or is_bound(module, own["forward"], forward):
        return None
    if "_hf_hook" in own and is_bound(module, own.get("_old_forward"), forward):
        return None
    value = own["forward"]
    function = getattr(getattr(value, "func", value), "__func__", getattr(value, "func", value))
    where = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{where}.{name}" if where else name
