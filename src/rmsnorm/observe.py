"""Runs the forward of a norm on a stand-in for the module, and watches what it does besides running operators.

A stand-in has the module's attributes, a weight of its own, and a class made from the module's. It is refused

- to read an attribute that is no plain value, since such a value can change, or differ between two norms, unseen;
- to write an attribute, a global variable, an item of a container, or a free variable;
- to call anything but torch's functions of tensors and Python's own that have no effect;
- to ask a tensor for more than its dtype, device and sizes, or to let the number of rows decide.
"""

import builtins
import dis
import gc
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FrameType, FunctionType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rmsnorm.expression import Node, Operators, Refusal

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, type(None))


class Absent:
    """In place of the value of an attribute that was looked for and is not there."""


def is_plain(value: object) -> bool:
    """Whether the value cannot change but by another assignment."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(is_plain, value))
    return type(value) in _PLAIN


@dataclass
class Observation:
    """Of one call. expression: what y is. facts: the plain attributes that were read, by name."""

    y: Tensor
    expression: Node
    facts: dict[str, object] = field(default_factory=dict)
    functions: set[str] = field(default_factory=set)


# --- the stand-in --------------------------------------------------------------------------------------------


class _StandIn:
    """In front of the module's own class: what the forward reads of its module is noted or refused."""

    def __init_subclass__(cls) -> None:
        """Keeps the own class's hook, which may register what it is given, from running."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in ("__class__", "training"):
            return value
        state = _state(self)
        if is_plain(value):
            state.facts[name] = value
        elif name == "__dict__" or not _of_class(type(self), name, value):
            refuse(state, f"its forward reads its attribute {name}, a {type(value).__name__}")
        return value

    def __getattr__(self, name: str) -> Any:
        state = _state(self)
        if name == "weight" and "weight" in state.module._parameters:
            return state.weight
        for held, what in (("_parameters", "parameter"), ("_buffers", "buffer"), ("_modules", "submodule")):
            if name in getattr(state.module, held):
                if getattr(state.module, held)[name] is not None:
                    refuse(state, f"its forward uses its {what} {name}")
                state.facts[name] = None
                return None
        state.facts[name] = Absent
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        refuse(_state(self), f"its forward writes the attribute {name}")

    def __delattr__(self, name: str) -> None:
        refuse(_state(self), f"its forward writes the attribute {name}")


_KEY = "_rmsnorm_state"


@dataclass
class _State:
    """Beside a stand-in, out of its forward's sight."""

    module: nn.Module
    weight: nn.Parameter | None
    facts: dict[str, object] = field(default_factory=dict)
    refusal: str | None = None


def _state(stand_in: Any) -> _State:
    state: _State = object.__getattribute__(stand_in, "__dict__")[_KEY]
    return state


def refuse(state: Any, reason: str) -> NoReturn:
    """Keep the first reason, in case that the forward handles the exception, and raise it."""
    state.refusal = state.refusal or reason
    raise Refusal(reason)


def _of_class(cls: type, name: str, value: object) -> bool:
    """Whether the value is what a function, or a static or class method, of the class is to an instance."""
    found = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    if isinstance(found, property):
        return isinstance(value, Tensor)  # whose operators were seen
    function = getattr(found, "__func__", found)
    return isinstance(function, FunctionType) and getattr(value, "__func__", value) is function


def stand_in_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Raises what the class raises when it is subclassed."""
    metaclass: Any = type(cls)
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return metaclass(cls.__name__, (_StandIn, cls), body)  # type: ignore[no-any-return]


def stand_in(cls: type[nn.Module], module: nn.Module, weight: nn.Parameter | None, **attributes: object) -> nn.Module:
    """Of a class that `stand_in_class` made. The attributes are in place of the module's own of that name."""
    made: nn.Module = object.__new__(cls)
    own = {key: value for key, value in vars(module).items() if key not in _USUAL and key != "forward"}
    values = vars(nn.Module()) | own | attributes
    for held in ("_parameters", "_buffers", "_modules"):
        del values[held]
    object.__getattribute__(made, "__dict__").update(values | {_KEY: _State(module, weight)})
    return made


_USUAL = frozenset(vars(nn.Module()))


# --- what it asks tensors ------------------------------------------------------------------------------------


class _Rows(int):
    """A size that differs from call to call, or a number made from one: it may be given to torch, and that is all."""

    state: Any

    def _of(self, value: Any) -> Any:
        if type(value) is not int:
            return value
        made = _Rows(value)
        made.state = self.state
        return made

    def _seen(self, *_: object) -> NoReturn:
        refuse(self.state, "its forward decides by the size of its input")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __hash__ = __str__ = __repr__ = __format__ = _seen
    __int__ = __float__ = __trunc__ = __floor__ = __ceil__ = __round__ = _seen


def _arithmetic(name: str) -> Callable[..., Any]:
    operation = getattr(int, name)

    def method(self: _Rows, *others: Any) -> Any:
        return self._of(operation(int.__pos__(self), *(int.__pos__(o) if isinstance(o, int) else o for o in others)))

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor"):
    for _kind in ("", "r"):
        setattr(_Rows, f"__{_kind}{_name}__", _arithmetic(f"__{_kind}{_name}__"))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(_Rows, f"__{_name}__", _arithmetic(f"__{_name}__"))
_Rows.__truediv__ = _Rows.__rtruediv__ = _Rows.__divmod__ = _Rows.__rdivmod__ = _Rows._seen  # type: ignore[assignment]

_SIZES = ("shape", "size", "numel", "nelement")
_ASKED = ("dtype", "dim", "ndim", "ndimension", "requires_grad", "device", "is_floating_point", "is_complex", "layout",
          "is_sparse", "result_type", "can_cast", "promote_types", "is_tensor", "itemsize", "element_size")  # fmt: skip
# What gives a tensor and yet is no operator, or cuts the gradient.
_EFFECTS = ("detach", "detach_", "data", "requires_grad_", "set_", "share_memory_", "pin_memory", "register_hook",
            "apply_", "map_", "map2_", "as_subclass", "rename_", "grad")  # fmt: skip


class _Questions(TorchFunctionMode):
    """Judges the functions of tensors that give no tensor.

    fixed: how many last dimensions are known. device: what to say if a tensor is asked for its device.
    """

    def __init__(self, state: Any, fixed: int, device: torch.device | None) -> None:
        super().__init__()
        self.state, self.fixed, self.device = state, fixed, device
        self.functions: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        calls = sys.getprofile()
        sys.setprofile(None)  # what torch calls is judged by its operators
        try:
            return self._judged(func, args, kwargs or {})
        finally:
            sys.setprofile(calls)

    def _judged(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, where = getattr(func, "__name__", str(func)), "Tensor"
        if name in ("__get__", "__set__"):
            name = func.__self__.__name__ if name == "__get__" else f"{func.__self__.__name__} ="
        elif not getattr(func, "__qualname__", "").startswith(("Tensor.", "TensorBase.")):
            where = "torch"
        self.functions.add(name)
        if name in _EFFECTS:
            refuse(self.state, f"its forward uses {where}.{name}")
        result = func(*args, **kwargs)
        if name in _SIZES:
            return self._sizes(result, args, kwargs)
        if name == "device" and self.device is not None:
            return self.device
        if name in _ASKED or _holds_tensor(result):
            return result
        return refuse(self.state, f"its forward uses {where}.{name}")

    def _sizes(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and args[0] is self.state.weight:
            return result
        if isinstance(result, torch.Size):
            last = len(result) - self.fixed
            return torch.Size([self._rows(n) if i < last else n for i, n in enumerate(result)])
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dim is not None and dim % args[0].dim() >= args[0].dim() - self.fixed:
            return result
        return self._rows(result)

    def _rows(self, n: int) -> _Rows:
        rows = _Rows(n)
        rows.state = self.state
        return rows


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_holds_tensor, value)))


# --- what it calls and writes ----------------------------------------------------------------------------------

_WITHOUT_EFFECT = frozenset(
    getattr(builtins, name)
    for name in ("abs", "all", "any", "callable", "divmod", "getattr", "hasattr", "isinstance", "issubclass", "len",
                 "max", "min", "pow", "round", "sorted", "sum")
)  # fmt: skip
_IMMUTABLE = (str, bytes, int, float, bool, tuple, frozenset, type(None), torch.dtype, torch.device, range)
_TORCH_ASKED = ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled", "promote_types", "result_type",
                "get_default_dtype", "is_autocast_cpu_enabled", "get_autocast_dtype", "get_autocast_gpu_dtype",
                "get_autocast_cpu_dtype", "is_inference", "is_tensor")  # fmt: skip
# Of torch's code in Python: what computes, or says which functions handle which tensors.
_TORCH_FILES = ("torch.nn.functional", "torch.functional", "torch._tensor", "torch.overrides", "torch.types",
                "torch.nn.modules.normalization", "torch._VF", "torch.amp.autocast_mode",
                "torch.cuda.amp.autocast_mode", "torch.cpu.amp.autocast_mode")  # fmt: skip
_WRITES = {"STORE_ATTR": "the attribute", "DELETE_ATTR": "the attribute", "STORE_GLOBAL": "the global variable",
           "DELETE_GLOBAL": "the global variable", "STORE_SUBSCR": "an item of a container",
           "DELETE_SUBSCR": "an item of a container"}  # fmt: skip
# Of Python's special methods and attributes, which can write or read anything, these only read what cannot change.
_HARMLESS = ("__class__", "__name__", "__qualname__", "__module__", "__doc__", "__version__")


class _Calls:
    """A profiler of this thread that judges what code outside torch calls and writes, before it does."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.scanned: set[CodeType] = set()

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            self._entered(frame)
        elif event == "c_call" and not _of_torch_or_ours(frame) and _by_forward(frame) and not _without_effect(arg):
            refuse(self.state, f"its forward calls {_name_of(arg)}")

    def _entered(self, frame: FrameType) -> None:
        if _of_torch_or_ours(frame):
            if frame.f_back is not None and not _of_torch_or_ours(frame.f_back) and _by_forward(frame.f_back):
                module = str(frame.f_globals["__name__"])
                if module.startswith("torch.") and module not in _TORCH_FILES:
                    refuse(self.state, f"its forward calls {module}.{frame.f_code.co_name}")
        elif _by_forward(frame) and frame.f_code not in self.scanned:
            self.scanned.add(frame.f_code)
            self._scan(frame.f_code)

    def _scan(self, code: CodeType) -> None:
        for step in dis.get_instructions(code):
            name = str(step.argval)
            if step.opname in _WRITES:
                named = f" {name}" if isinstance(step.argval, str) else ""
                refuse(self.state, f"its forward writes {_WRITES[step.opname]}{named} (in {code.co_name})")
            if step.opname == "STORE_DEREF" and name in code.co_freevars:
                refuse(self.state, f"its forward writes the variable {name} of the function around {code.co_name}")
            special = step.opname in ("LOAD_ATTR", "LOAD_METHOD") and name.startswith("__") and name.endswith("__")
            if special and name not in _HARMLESS:
                refuse(self.state, f"its forward uses {name} (in {code.co_name})")


def _of_torch_or_ours(frame: FrameType) -> bool:
    return f"{frame.f_globals.get('__name__', '')}.".startswith(("torch.", "rmsnorm."))


def _by_forward(frame: FrameType | None) -> bool:
    """Whether the frame is the forward's, or was called by it without torch in between."""
    while frame is not None and not _of_torch_or_ours(frame):
        frame = frame.f_back
    return frame is not None and frame.f_code is observe.__code__


def _without_effect(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    if function in _WITHOUT_EFFECT or isinstance(owner, (Tensor, *_IMMUTABLE)):
        return True
    if owner is math or getattr(owner, "__name__", "") == "_VariableFunctionsClass":
        return True
    if owner is torch._C._nn:
        return True
    objclass = getattr(function, "__objclass__", None)  # of a method that is called through its class
    if objclass is not None:
        return issubclass(objclass, (torch._C.TensorBase, *_IMMUTABLE))
    of_torch: bool = str(getattr(function, "__module__", None) or "").partition(".")[0] == "torch" or owner is torch._C
    return of_torch and str(function.__name__) in _TORCH_ASKED


def _name_of(function: Any) -> str:
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, type(sys)):
        return f"{type(owner).__name__}.{function.__name__}"
    module = getattr(function, "__module__", None) or getattr(owner, "__name__", "")
    return f"{module}.{function.__name__}".removeprefix("builtins.")


class _Profiled:
    """Without the collector of garbage, whose finalizers are somebody else's calls."""

    def __init__(self, calls: _Calls) -> None:
        self.calls = calls

    def __enter__(self) -> None:
        self.before, self.collects = sys.getprofile(), gc.isenabled()
        gc.disable()
        sys.setprofile(self.calls)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self.before)
        if self.collects:
            gc.enable()


# --- one call ------------------------------------------------------------------------------------------------


def observe(
    forward: Callable[..., Any], made: nn.Module, x: Tensor, N: int, fixed: int, device: torch.device | None = None
) -> Observation:
    """Call the forward of the stand-in. Raises Refusal, or whatever the forward raises.

    N: how many numbers a row has. fixed: how many last dimensions of x are the same in every call. device: what the
    tensors say that they are on, if not where they are.
    """
    state = _state(made)
    leaves = {"x": x} if state.weight is None else {"x": x, "w": state.weight}
    operators, questions, calls = Operators(leaves, N), _Questions(state, fixed, device), _Calls(state)
    try:
        with operators, questions, _Profiled(calls):
            y = forward(made, x)
    except Exception:
        if state.refusal or operators.refusal:
            raise Refusal(state.refusal or operators.refusal) from None
        raise
    reason = state.refusal or operators.refusal
    if reason:
        raise Refusal(reason)
    if not isinstance(y, Tensor):
        raise Refusal(f"its forward returns a {type(y).__name__}")
    return Observation(y, operators.expression(y), state.facts, questions.functions)
