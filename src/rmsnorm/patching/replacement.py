"""What a replaced norm runs: our kernel where the proven rule covers the call, the norm's own forward elsewhere.

A replaced norm has a class of ours, made from the rule and put in front of the norm's own class.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rmsnorm import compat, gated_reference, reference
from rmsnorm.errors import type_name, with_article
from rmsnorm.functional import explain, gated_rms_norm, rms_norm
from rmsnorm.kernels.host import loader as host
from rmsnorm.ops import eager_recomputation
from rmsnorm.ops.autograd import norm
from rmsnorm.ops.derivatives import has_tangent
from rmsnorm.ops.dispatch import exported_to_onnx
from rmsnorm.patching.eligibility import forward_parameters
from rmsnorm.patching.rule import Dtypes, Rule, dtype_name, dtypes_in_words, kind_in_words
from rmsnorm.patching.stand_in import Absent, InFront, Method, identity, is_plain, put_in_front
from rmsnorm.spec import DTYPES, NO_HINTS, Hints, Spec, lacks_float64, may_be_eps

# --- the class of a replaced norm ----------------------------------------------------------------------------


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before `patch`."""
    return getattr(type(module), "_rmsnorm_original", type(module))


def hints_of(module: nn.Module) -> Hints:
    """How torch.compile may optimize the calls of a replaced norm."""
    return getattr(type(module), "_rmsnorm_hints", NO_HINTS)


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a replaced norm; None for any other module."""
    return getattr(type(module), "_rmsnorm_rule", None)


class ReplacedClass(InFront):
    """Put in front of the class of a module that `patch` changes. It adds no attribute to any instance."""

    _rmsnorm_original: type[nn.Module]

    def __prepare_scriptable__(self) -> nn.Module:
        """Restores the module's own class for torch.jit.script, which compiles the source code of a forward."""
        module: Any = self
        set_class(module, self._rmsnorm_original)
        words = f"torch.jit.script gave {type(module).__name__} its own class back"
        warnings.warn(f"[patch] {words}: patch the model again to use it in Python", stacklevel=2)
        return module  # type: ignore[no-any-return]


class _Replacement(ReplacedClass):
    """Put in front of the class of a replaced norm."""

    _rmsnorm_rule: Rule
    _rmsnorm_hints: Hints
    # Keeps the `kernels` library of Hugging Face, which finds classes by their name, from replacing our forward.
    kernel_condition = staticmethod(lambda module: False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the original class and the rule, because the class made here cannot be found by its name."""
        if "_rmsnorm_rule" not in vars(type(self)):
            return super().__reduce_ex__(protocol)  # another library's subclass of ours, which _rebuild would drop
        arguments = self._rmsnorm_original, self._rmsnorm_rule, self._rmsnorm_hints
        return _rebuild, arguments, self.__getstate__()

    def extra_repr(self) -> str:
        """Adds what our kernel computes, so that the repr of a model shows which norms are replaced."""
        own = super().extra_repr()  # type: ignore[misc]
        return f"{own}{', ' if own else ''}rmsnorm: {', '.join(kind_in_words(self._rmsnorm_rule))}"

    def _rmsnorm_explain(self, x: Any) -> str:
        """What `rmsnorm.explain` says."""
        return explain_norm(self, self._rmsnorm_rule, x)


class _GatedReplacement(_Replacement):
    """Put in front of the class of a replaced norm with a gate."""

    def _rmsnorm_explain(self, x: Any, gate: Any = None) -> str:
        """What `rmsnorm.explain` says. Without a gate, it describes a call whose gate is like x."""
        return explain_norm(self, self._rmsnorm_rule, x, x if gate is None else gate)


def hints_for(rule: Rule, hints: Hints) -> Hints:
    """Those of the hints that apply to a norm with this rule: none to a gated norm."""
    return hints if rule.gate is None else NO_HINTS


def replacement_class(cls: type[nn.Module], rule: Rule, hints: Hints) -> type[nn.Module]:
    """A subclass of the class with the same name, since users of transformers match on names."""
    return _make_class(cls, rule, hints_for(rule, hints), cls.forward)  # type: ignore[arg-type]  # classes hash by identity


@functools.cache
def _make_class(cls: type[nn.Module], rule: Rule, hints: Hints, own_forward: Callable[..., Tensor]) -> type[nn.Module]:
    if rule.gate is None:
        front, by_rule = _Replacement, forward_by_rule(rule, own_forward, hints)
    else:
        front, by_rule = _GatedReplacement, gated_forward(rule, own_forward)
    forward = _with_parameters(by_rule, forward_parameters(cls), own_forward.__defaults__)
    # Not functools.wraps: code that follows __wrapped__ would find the norm's own forward.
    forward.__name__, forward.__qualname__, forward.__doc__ = "forward", own_forward.__qualname__, own_forward.__doc__
    forward.__signature__ = inspect.signature(own_forward)  # type: ignore[attr-defined]
    return put_in_front(front, cls, _rmsnorm_rule=rule, _rmsnorm_hints=hints, _rmsnorm_original=cls, forward=forward)


def _with_parameters(
    by_rule: Callable[..., Tensor], parameters: Sequence[inspect.Parameter], defaults: tuple[Any, ...] | None
) -> Callable[..., Tensor]:
    """The function with the norm's own names for its inputs, which callers may use as keywords and torch.fx reads."""

    def of_one(self: Any, x: Tensor) -> Tensor:
        return by_rule(self, x)

    def of_two(self: Any, x: Tensor, gate: Tensor | None) -> Tensor:
        return by_rule(self, x, gate)

    forward = of_one if len(parameters) == 1 else of_two
    positional = sum(p.kind is p.POSITIONAL_ONLY for p in parameters)
    code = forward.__code__.replace(
        co_varnames=("self", *(p.name for p in parameters)), co_posonlyargcount=positional and 1 + positional
    )
    return FunctionType(code, globals(), "forward", defaults, forward.__closure__)


def _rebuild(cls: type[nn.Module], rule: Rule, hints: Hints = NO_HINTS) -> nn.Module:  # older pickles have no hints
    made = replacement_class(cls, rule, hints)
    return made.__new__(made)


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the module's class, and the bound forward that accelerate keeps on the instance."""
    before = type(module).forward
    if cls is type(module):
        return
    module.__class__ = cls
    for key, value in vars(module).items():
        if is_method(module, value, before):
            module.__dict__[key] = MethodType(cls.forward, module)


def is_method(module: nn.Module, value: object, function: object) -> bool:
    """Whether the value is the function, bound to the module."""
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is function


# --- its forward ---------------------------------------------------------------------------------------------


def forward_by_rule(rule: Rule, own_forward: Callable[..., Tensor], hints: Hints = NO_HINTS) -> Callable[..., Tensor]:
    """A forward that runs our kernel where the rule holds, and the norm's own forward elsewhere.

    Args:
        rule: What was proven of the norm.
        own_forward: The norm's own forward.
        hints: How torch.compile may optimize its calls.
    """
    cast, offset, eps_attribute = rule.cast, rule.offset, rule.eps_attribute
    weighted, shape, ranks, attributes = rule.weighted, rule.normalized_shape, rule.ranks, rule.attributes
    # Whether more than the rank decides; asking for less takes a fraction of the time.
    limited = bool(rule.own_dtypes) or rule.own_under_autocast or rule.calls_rms_norm
    k = rule.normalized_dims

    def forward(self: Any, x: Tensor) -> Tensor:
        w = weight_of(self) if weighted else None
        eps = getattr(self, eps_attribute, Absent)
        if type(eps) is not float or not may_be_eps(eps):
            eps = rule.eps(eps)
        if eps is None or (w is None and weighted) or (attributes and _why_changed(rule, self, w, eps) is not None):
            return own_forward(self, x)
        if not isinstance(x, Tensor) or x.dim() not in ranks or (limited and _why_unproven(rule, x, w) is not None):
            return own_forward(self, x)
        if x.is_contiguous() or (order := _memory_order(x, rule)) is None:
            return by_kernel(self, x, w, eps)
        return _in_memory_order(order, k, lambda x: by_kernel(self, x, w, eps), x)

    def by_kernel(self: Any, x: Tensor, w: Tensor | None, eps: float) -> Tensor:
        if k == 1 and not torch.compiler.is_compiling() and (shape is None or _has_size(x, shape)):
            y = host.norm(x, None, w, eps, cast, offset)
            if y is not None:
                if eager_recomputation.open_passes:
                    eager_recomputation.note(y, x, w, eps, cast, offset)
                return y  # type: ignore[no-any-return]
        if _why_unsupported(x, w, shape) is not None:
            return own_forward(self, x)
        rows, w = (x, w) if k == 1 else (x.flatten(-k), None if w is None else w.flatten())
        if torch.compiler.is_compiling():
            y = norm(rows, None, w, eps, cast, offset, hints)[0]
        else:
            y = rms_norm(rows, w, eps, cast=cast, offset=offset)
        return y if k == 1 else y.view(x.shape)  # type: ignore[no-any-return]

    return forward


def gated_forward(rule: Rule, own_forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As `forward_by_rule`, for a gated norm: a forward of an input and a gate."""
    assert rule.gate is not None
    cast, activation, gate_first, groups = rule.cast, rule.gate.activation, rule.gate.first, rule.groups

    def forward(self: Any, x: Tensor, gate: Tensor | None) -> Tensor:
        w, eps = _weight_and_eps(self, rule)
        if eps is None or gate is None or _why_own(rule, self, x, w, eps, gate) is not None:
            return own_forward(self, x, gate)

        def by_kernel(x: Tensor, gate: Tensor) -> Tensor:
            return gated_rms_norm(
                x, gate, w, eps, cast=cast, activation=activation, gate_first=gate_first, groups=groups
            )

        order = None if x.is_contiguous() else _memory_order(x, rule)
        return by_kernel(x, gate) if order is None else _in_memory_order(order, 1, by_kernel, x, gate)

    return forward


def _in_memory_order(order: list[int], k: int, by_kernel: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """What the kernel returns for the inputs, with its dimensions in memory in this order; it normalizes over k."""
    usual = list(range(len(order)))
    if order[-k:] == usual[-k:]:  # the kernel reads and writes the rows where they lie
        y = by_kernel(*(x.permute(order) for x in inputs))
    else:
        y = by_kernel(*inputs).permute(order).contiguous()
    return y.permute([order.index(axis) for axis in usual])


def _has_size(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether x ends in this shape; False while torch.jit traces, which warns about every comparison of a size."""
    return not compat.is_tracing() and x.shape[-len(shape) :] == shape


def weight_of(module: Any) -> Any:
    """The weight, also where a parametrization or FSDP1 has put something else in the parameter's place."""
    try:
        return module._parameters["weight"]
    except (AttributeError, KeyError):
        return getattr(module, "weight", None)


def _memory_order(x: Tensor, rule: Rule) -> list[int] | None:
    """The dimensions of x in the order in which they lie in memory, if the norm's own forward keeps it for y.

    None if the own forward does not keep it, or if it is the usual order, in which our kernels write y.
    """
    if not rule.keeps_memory_order and not (rule.calls_rms_norm and _is_channels_last(x)):
        return None  # F.rms_norm keeps no order but channels last
    strides = x.stride()
    axes = [axis for axis in range(x.dim()) if x.shape[axis] != 1]  # the order of dimensions of size 1 does not matter
    moved = sorted(axes, key=lambda axis: -strides[axis])
    if moved == axes or any(strides[axis] == 0 for axis in axes):
        return None
    places = dict(zip(axes, moved, strict=True))
    return [places.get(axis, axis) for axis in range(x.dim())]


def _is_channels_last(x: Tensor) -> bool:
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return memory_format is not None and x.is_contiguous(memory_format=memory_format)


# --- which of the two runs -----------------------------------------------------------------------------------


def explain_norm(module: Any, rule: Rule, x: Any, gate: Any = None) -> str:
    """Which kernel a norm with this rule would run on x, and a gate if it has one, or why its own forward would run."""
    why = why_own_forward(module, x, rule, gate)
    if why is not None:
        return f"the norm's own forward, because {why}"
    x, w, spec = _kernel_arguments(module, x, rule)
    if spec.gate is None:
        return explain(x, w, eps=spec.eps, cast=spec.cast, offset=spec.offset)
    return explain(
        x, w, eps=spec.eps, cast=spec.cast, gate=gate, activation=spec.gate.activation, gate_first=spec.gate.first,
        groups=spec.groups,
    )  # fmt: skip


def exact_output(module: nn.Module, x: Tensor, gate: Tensor | None = None) -> Tensor | None:
    """The output of *exact* for a norm that `patch` replaced; None where its own forward runs."""
    rule = rule_of(module)
    assert rule is not None
    if why_own_forward(module, x, rule, gate) is not None:
        return None
    if gate is not None:
        w = weight_of(module) if rule.weighted else None
        return gated_reference.forward(x, gate, w, _spec(module, rule), with_rstd=False)[0]
    rows, w, spec = _kernel_arguments(module, x, rule)
    y = reference.forward(rows, None, w, spec.eps, spec.cast, spec.offset, with_rstd=False)[0]
    return y.view(x.shape)


def why_own_forward(module: Any, x: Any, rule: Rule | None = None, gate: Any = None) -> str | None:
    """Why the norm's own forward runs on x; None if our kernel runs.

    Args:
        module: The norm.
        x: Its input.
        rule: The rule that it follows; by default that of a replaced norm.
        gate: The second argument of a gated norm; not used for others.
    """
    rule = rule or rule_of(module)
    assert rule is not None
    return _why_own(rule, module, x, *_weight_and_eps(module, rule), None if rule.gate is None else gate)


def _why_own(rule: Rule, module: Any, x: Any, w: Any, eps: float | None, gate: Any) -> str | None:
    why = _why_changed(rule, module, w, eps) or _why_unproven(rule, x, w, gate)
    return why or _why_unsupported(x, w, rule.normalized_shape, gate)


def why_always_own_forward(module: Any) -> str | None:
    """Why a replaced norm runs its own forward on every input; None if it does not."""
    rule = rule_of(module)
    assert rule is not None
    return _why_changed(rule, module, *_weight_and_eps(module, rule))


def _weight_and_eps(module: Any, rule: Rule) -> tuple[Any, float | None]:
    """The weight of the norm, None if the rule has none; and its eps, None if it is not a valid one."""
    return weight_of(module) if rule.weighted else None, rule.eps(getattr(module, rule.eps_attribute, Absent))


def _kernel_arguments(module: Any, x: Tensor, rule: Rule) -> tuple[Tensor, Tensor | None, Spec]:
    """What our kernel gets, where it runs: x as rows, the weight as a vector, and the spec."""
    w = weight_of(module) if rule.weighted else None
    return x.flatten(-rule.normalized_dims), None if w is None else w.flatten(), _spec(module, rule)


def _spec(module: Any, rule: Rule) -> Spec:
    """The spec that the module computes with its present eps, which is a valid one."""
    eps = _weight_and_eps(module, rule)[1]
    assert eps is not None
    return rule.spec(eps)


def _why_changed(rule: Rule, module: Any, w: Any, eps: float | None) -> str | None:
    """Why the proof does not cover the module as it is now."""
    if eps is None:
        return f"its {rule.eps_attribute} is {getattr(module, rule.eps_attribute, 'missing')}"
    if w is None and rule.weighted:
        return "its weight is None"
    for name, value in rule.attributes:
        if value is Method:
            same = name not in vars(module)
        else:
            now = getattr(module, name, Absent)
            same = now is value or (is_plain(now) and identity(now) == identity(value))
        if not same:
            return f"its attribute {name} has changed since it was proven"
    return None


def _why_unproven(rule: Rule, x: Any, w: Any, gate: Any = None) -> str | None:
    """Why the proof does not cover this input."""
    if not isinstance(x, Tensor):
        return f"its input is {type_name(x)}"
    dtypes: Dtypes = x.dtype, None if w is None else w.dtype
    if rule.gate is not None:
        if not isinstance(gate, Tensor):
            return "it is called without a gate" if gate is None else f"its gate is {type_name(gate)}"
        dtypes = *dtypes, gate.dtype
    if rule.own_dtypes and dtypes in rule.own_dtypes:
        return f"it was not proven for {dtypes_in_words(dtypes)}"
    if x.dim() not in rule.ranks:
        return f"it was not proven for {x.dim()}-D inputs"
    return _why_autocast(rule, x, w)


def _why_autocast(rule: Rule, x: Tensor, w: Tensor | None) -> str | None:
    """Why the proof does not cover this input under autocast; None if it does, or if autocast is off."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return None
    if rule.own_under_autocast:
        return "it was not proven under autocast"
    if not rule.calls_rms_norm or device in compat.RMS_NORM_UNCHANGED_BY_AUTOCAST:
        return None
    if device == "cuda" and x.dtype is torch.float32 and (w is None or w.dtype is torch.float32):
        return None  # autocast on CUDA casts F.rms_norm to fp32 only, so nothing changes
    return "autocast may cast its input"


# Tensor subclasses that decompose our operators themselves, or that our operators handle.
_KNOWN_SUBCLASSES = ("torch._subclasses.", "torch.distributed.")
_KNOWN_SUBCLASSES_WITH_GATE = ("torch._subclasses.",)  # the operators of gated norms have no rules for DTensors


def _why_unsupported(
    x: Tensor, w: Tensor | None, shape: tuple[int, ...] | None, gate: Tensor | None = None
) -> str | None:
    """Why our kernels cannot serve a call that the norm's own forward may well serve."""
    if (why := _why_exported()) is not None:
        return why  # first, because a tracer warns where a size is compared
    if lacks_float64(x.device):
        return f"its input is on {x.device}, which does not support float64"
    known = _KNOWN_SUBCLASSES if gate is None else _KNOWN_SUBCLASSES_WITH_GATE
    for name, t in (("input", x), ("weight", w), ("gate", gate)):
        if t is not None and (what := _unsupported_tensor(t, known)) is not None:
            return f"its {name} {what}"
    if gate is not None and (gate.shape != x.shape or gate.device != x.device):
        return f"its gate has shape {tuple(gate.shape)}, on {gate.device}, its input {tuple(x.shape)}, on {x.device}"
    if shape is not None and x.shape[-len(shape) :] != shape:
        return f"its input has shape {tuple(x.shape)}, which does not end in {shape}"
    if w is not None and w.shape != (x.shape[-1:] if shape is None else shape):
        return f"its weight has shape {tuple(w.shape)}, its input {tuple(x.shape)}"
    if w is not None and w.device != x.device:
        return f"its weight is on {w.device}, its input on {x.device}"
    return _why_forward_mode(x, w, gate) or _why_inference_tensor(x, w, gate)


def _unsupported_tensor(t: Tensor, known: tuple[str, ...]) -> str | None:
    if t.is_nested:
        return "is a nested tensor"
    if t.layout is not torch.strided:
        return f"has layout {str(t.layout).removeprefix('torch.')}"
    if t.dtype not in DTYPES:
        return f"has dtype {dtype_name(t.dtype)}"
    cls = type(t)
    plain = cls in (Tensor, nn.Parameter) or cls.__torch_dispatch__ is Tensor.__torch_dispatch__
    return None if plain or cls.__module__.startswith(known) else f"is {with_article(cls.__name__)}"


def _why_exported() -> str | None:
    """Says so if a graph is made for other programs, which do not have our operators."""
    if exported_to_onnx():
        return "it is being exported to ONNX"
    traced = not torch.compiler.is_compiling() and compat.is_tracing()
    return "it is being traced by torch.jit" if traced else None


def _why_forward_mode(x: Tensor, w: Tensor | None, gate: Tensor | None) -> str | None:
    """Our gated norms have no forward mode; the norm's own forward has."""
    if gate is None or torch.compiler.is_compiling() or not compat.in_forward_ad():
        return None
    active = compat.transforms_active() or has_tangent(x, w, gate)
    return "it is differentiated in forward mode, which gated_rms_norm does not implement" if active else None


def _why_inference_tensor(x: Tensor, w: Tensor | None, gate: Tensor | None) -> str | None:
    """Autograd cannot save a tensor that was made in inference mode; the norm's own forward saves a copy."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    for name, t in (("input", x), ("gate", gate)):
        if t is not None and t.is_inference():
            for other, of in (("weight", w), ("input", x), ("gate", gate)):
                if of is not None and of.requires_grad:
                    return f"its {name} was made in inference mode and its {other} requires a gradient"
    return None
