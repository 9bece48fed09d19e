"""Runs the forward of a norm on a stand-in for the module, and watches what it does besides running operators.

A stand-in has the module's attributes, a weight of its own, and a class made from the module's. Its forward may not

- read an attribute that is no plain value: such a value can change, or differ between two norms, unseen;
- write anything but its local variables, or use what could hold a state (see bytecode.py);
- ask a tensor for more than its dtype, device and sizes, or let the sizes decide.
"""

import gc
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rmsnorm.patching import bytecode
from rmsnorm.patching.expression import Node, Operators, Refusal

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, type(None))


class Absent:
    """Marks an attribute that was looked for and is missing."""


class Method:
    """Marks an attribute that is a method of the class, which the instance has not replaced."""


def is_plain(value: object) -> bool:
    """Whether the value is immutable."""
    if type(value) in (tuple, frozenset, torch.Size):
        return all(map(is_plain, value))  # type: ignore[call-overload]
    return type(value) in _PLAIN


def identity(value: object) -> object:
    """A key that is equal for plain values of the same type and bits alone: 0.0 and -0.0, 1 and True differ."""
    if isinstance(value, tuple):
        return type(value), tuple(map(identity, value))
    if isinstance(value, frozenset):
        return type(value), frozenset(map(identity, value))
    return type(value), value.hex() if isinstance(value, float) else value


@dataclass
class Observation:
    """Of one call.

    expression: what y is. facts: the attributes that were read, by name. asked: by name, the functions of torch that
    were called, and the questions that can decide between two paths. numbers: the constants in its code.
    """

    y: Tensor
    expression: Node
    facts: dict[str, object] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    numbers: set[float] = field(default_factory=set)


# --- the stand-in --------------------------------------------------------------------------------------------


class InFront:
    """Of what is put in front of a module's own class."""

    def __init_subclass__(cls) -> None:
        """Keeps the own class's hook, which may register what it is given, from running."""


def put_in_front(front: type, cls: type[nn.Module], **body: object) -> type[nn.Module]:
    """A subclass of both, by the name of the class. Raises what the class raises when it is subclassed."""
    metaclass: Any = type(cls)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return metaclass(cls.__name__, (front, cls), body | names)  # type: ignore[no-any-return]


class _StandIn(InFront):
    """In front of the module's own class: what the forward reads of its module is noted or refused."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        state = _state(self)
        if name == "training":
            state.asked.add(name)
        elif is_plain(value):
            state.facts[name] = value
        elif name != "__class__":
            if name == "__dict__" or not _of_class(type(self), name, value):
                refuse(state, f"its forward reads its attribute {name}, a {type(value).__name__}")
            state.facts[name] = Method
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
    asked: set[str] = field(default_factory=set)
    numbers: set[float] = field(default_factory=set)
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
    return put_in_front(_StandIn, cls)


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


# --- what it asks tensors --------------------------------------------------------------------------------------


def _seen(size: Any, *_: object) -> NoReturn:
    refuse(size.state, "its forward decides by the size of its input")


class _Rows(int):
    """A size that differs from call to call, or a number made from one: it may only be given to torch."""

    state: Any

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __hash__ = __str__ = __repr__ = __format__ = _seen
    __int__ = __float__ = __trunc__ = __floor__ = __ceil__ = __round__ = _seen
    __truediv__ = __rtruediv__ = __divmod__ = __rdivmod__ = _seen
    real = imag = numerator = denominator = property(_seen)
    bit_length = bit_count = conjugate = as_integer_ratio = __index__ = _seen


def _arithmetic(name: str) -> Callable[..., Any]:
    operation = getattr(int, name)

    def method(self: _Rows, *others: Any) -> Any:
        if not all(isinstance(other, int) for other in others):
            _seen(self)
        value = operation(int.__pos__(self), *(int.__pos__(other) for other in others))
        return _rows(value, self.state)

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor"):
    for _kind in ("", "r"):
        setattr(_Rows, f"__{_kind}{_name}__", _arithmetic(f"__{_kind}{_name}__"))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(_Rows, f"__{_name}__", _arithmetic(f"__{_name}__"))


def _rows(n: int, state: Any) -> _Rows:
    rows = _Rows(n)
    rows.state = state
    return rows


class _Shape(tuple):  # type: ignore[type-arg]
    """Sizes of which some are `_Rows`. torch.Size could be printed, and counted, past them."""

    state: Any

    __str__ = __repr__ = __format__ = __hash__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _seen
    __contains__ = index = count = _seen

    def __len__(self) -> int:
        self.state.asked.add("len")
        return super().__len__()

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return _shape(found, self.state) if isinstance(key, slice) else found

    def __add__(self, other: Any) -> Any:
        return _shape((*self, *other), self.state)

    def __radd__(self, other: Any) -> Any:
        return _shape((*other, *self), self.state)

    def numel(self) -> _Rows:
        product = 1
        for n in self:
            product *= int.__pos__(n)
        return _rows(product, self.state)


def _shape(sizes: Any, state: Any) -> _Shape:
    shape = _Shape(sizes)
    shape.state = state
    return shape


_SIZES = ("shape", "size", "numel", "nelement")
_ASKED = ("dtype", "dim", "ndim", "ndimension", "requires_grad", "device", "is_floating_point", "is_complex", "layout",
          "is_sparse", "result_type", "can_cast", "promote_types", "is_tensor", "itemsize", "element_size")  # fmt: skip
# By these, or by what torch is asked, a forward can decide between two paths.
DECISIVE = frozenset(
    ("dim", "ndim", "ndimension", "requires_grad", "device", "len", "training", "is_grad_enabled", "is_inference",
     "is_autocast_enabled", "is_autocast_cpu_enabled", "is_inference_mode_enabled")
)  # fmt: skip
# Calls that return a tensor without dispatching an operator, or that cut the gradient.
_EFFECTS = ("detach", "detach_", "data", "requires_grad_", "set_", "share_memory_", "pin_memory", "register_hook",
            "apply_", "map_", "map2_", "as_subclass", "rename_", "grad")  # fmt: skip


class _Questions(TorchFunctionMode):
    """Refuses functions of tensors that return no tensor, except those listed.

    row: the last dimensions of x that are the same in every call. device: what tensors say that they are on, if not
    where they are.
    """

    def __init__(self, state: Any, row: tuple[int, ...], device: torch.device | None) -> None:
        super().__init__()
        self.state, self.row, self.device = state, row, device

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
        self.state.asked.add(name)
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
        t = args[0]
        if t is self.state.weight:
            return result
        k = len(self.row)
        fixed = k if k and tuple(Tensor.size(t))[-k:] == self.row else 0
        if isinstance(result, torch.Size):
            last = len(result) - fixed
            return _shape([_rows(n, self.state) if i < last else n for i, n in enumerate(result)], self.state)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dim is not None and dim % t.dim() >= t.dim() - fixed:
            return result
        return _rows(result, self.state)


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_holds_tensor, value)))


# --- what it calls and writes ------------------------------------------------------------------------------------

# Of torch's code in Python: what computes, or says how.
_TORCH_FILES = ("torch.nn.functional", "torch.functional", "torch._tensor", "torch.nn.modules.normalization",
                "torch._VF", "torch.amp.autocast_mode", "torch.cuda.amp.autocast_mode",
                "torch.cpu.amp.autocast_mode")  # fmt: skip
_DECORATES = ("__call__", "decorate_autocast", "autocast_decorator")


class _Calls:
    """A profiler of this thread that judges what code outside torch calls, before it does."""

    def __init__(self, state: Any, cls: type) -> None:
        self.state, self.cls = state, cls
        module = state.module
        self.held = {*vars(module), *module._parameters, *module._buffers, *module._modules}
        self.scanned: set[CodeType] = set()

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            self._entered(frame)
        elif event == "c_call" and not _of_torch_or_ours(frame) and _by_forward(frame):
            name = getattr(arg, "__name__", "")
            if name in bytecode.TORCH_ASKED:
                self.state.asked.add(name)
            if not bytecode.without_effect(arg) and not _of_immutable(arg):
                refuse(self.state, f"its forward calls {_name_of(arg)}")

    def _entered(self, frame: FrameType) -> None:
        before = frame.f_back
        if not _of_torch_or_ours(frame):
            if _by_forward(frame) and frame.f_code not in self.scanned:
                self.scanned.add(frame.f_code)
                self.state.numbers |= {float(n) for n in frame.f_code.co_consts if type(n) in (int, float)}
                reason = bytecode.refused(frame, self.cls, self.held, _StandIn)
                if reason is not None:
                    refuse(self.state, reason)
        elif before is not None and (before.f_code is observe.__code__ or not _of_torch_or_ours(before)):
            module, name = str(frame.f_globals["__name__"]), frame.f_code.co_name
            if module.partition(".")[0] == "torch" and _by_forward(before):
                itself = before.f_code is observe.__code__ and module != "torch.nn.modules.normalization"
                if itself or module not in _TORCH_FILES or name in _DECORATES:
                    refuse(self.state, f"its forward calls {module}.{name}")


def _of_torch_or_ours(frame: FrameType) -> bool:
    return f"{frame.f_globals.get('__name__', '')}.".startswith(("torch.", "rmsnorm."))


def _by_forward(frame: FrameType | None) -> bool:
    """Whether the frame is the forward's, or was called by it without torch in between."""
    while frame is not None and (not _of_torch_or_ours(frame) or frame.f_code in _PASSED_THROUGH):
        frame = frame.f_back
    return frame is not None and frame.f_code is observe.__code__


# The stand-in's own code, through which the getter of a property is called.
_PASSED_THROUGH = (_StandIn.__getattribute__.__code__, _StandIn.__getattr__.__code__)


def _of_immutable(function: Any) -> bool:
    owner = getattr(function, "__objclass__", None) or type(getattr(function, "__self__", None))
    plain = (str, bytes, int, float, bool, tuple, frozenset, torch.dtype, torch.device)
    return issubclass(owner, (torch._C.TensorBase, *plain)) and not issubclass(owner, torch.Size)


def _name_of(function: Any) -> str:
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, ModuleType):
        return f"{type(owner).__name__}.{function.__name__}"
    module = getattr(function, "__module__", None) or getattr(owner, "__name__", "")
    return f"{module}.{function.__name__}".removeprefix("builtins.")


class _Profiled:
    """Garbage collection is off meanwhile, so that unrelated finalizers are not attributed to the forward."""

    lock, inside, collected = threading.Lock(), 0, False

    def __init__(self, calls: _Calls) -> None:
        self.calls = calls

    def __enter__(self) -> None:
        with _Profiled.lock:
            if _Profiled.inside == 0:
                _Profiled.collected = gc.isenabled()
                gc.disable()
            _Profiled.inside += 1
        self.before = sys.getprofile()
        sys.setprofile(self.calls)

    def __exit__(self, *_: object) -> None:
        try:
            if self.before is None or callable(self.before):
                sys.setprofile(self.before)
            else:
                sys.setprofile(None)
                self.before.enable()  # a profiler in C, which gives itself and is no function
        finally:
            with _Profiled.lock:
                _Profiled.inside -= 1
                if _Profiled.inside == 0 and _Profiled.collected:
                    gc.enable()


# --- one call ------------------------------------------------------------------------------------------------


def observe(
    cls: type[nn.Module], made: nn.Module, x: Tensor, N: int, row: tuple[int, ...], device: torch.device | None = None
) -> Observation:
    """Call the forward of the class on the stand-in. Raises Refusal, or whatever the forward raises.

    N: how many numbers a row has. row: the last dimensions of x that are the same in every call. device: what the
    tensors say that they are on, if not where they are.
    """
    state = _state(made)
    leaves = {"x": x} if state.weight is None else {"x": x, "w": state.weight}
    operators, questions, calls = Operators(leaves, N), _Questions(state, row, device), _Calls(state, cls)
    forward: Any = cls.forward
    try:
        with operators, questions, _Profiled(calls):
            y = forward(made, x)
    except BaseException:
        if state.refusal or operators.refusal:
            raise Refusal(state.refusal or operators.refusal) from None
        raise
    reason = state.refusal or operators.refusal
    if reason:
        raise Refusal(reason)
    if not isinstance(y, Tensor):
        raise Refusal(f"its forward returns a {type(y).__name__}")
    return Observation(y, operators.expression(y), state.facts, state.asked, state.numbers)
