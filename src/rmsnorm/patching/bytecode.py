"""What the Python code of a forward may do, read from its bytecode before it runs.

It may use torch's functions, Python's functions without effects, functions of its own, and attributes of tensors and of
its module. Whatever else it loads could hold a state, and whatever it stores outside its local variables is one.
"""

import builtins
import dis
import math
from collections.abc import Collection
from types import BuiltinFunctionType, FrameType, FunctionType, ModuleType
from typing import Any

import torch

_WRITES = {"STORE_ATTR": "the attribute", "DELETE_ATTR": "the attribute", "STORE_GLOBAL": "the global variable",
           "DELETE_GLOBAL": "the global variable", "STORE_SUBSCR": "an item of a container",
           "DELETE_SUBSCR": "an item of a container"}  # fmt: skip
_LOADS_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_LOADS_FREE = ("LOAD_DEREF", "LOAD_CLASSDEREF")
_BETWEEN = ("PUSH_NULL", "CACHE", "PRECALL", "EXTENDED_ARG")
# Python's own functions and types that change nothing and look at nothing but their arguments.
_HARMLESS = frozenset(
    getattr(builtins, name)
    for name in ("abs", "all", "any", "bool", "callable", "float", "getattr", "hasattr", "int", "isinstance", "len",
                 "max", "min", "pow", "round", "sum", "super", "tuple")
)  # fmt: skip
_TORCH_CLASSES = (torch.Tensor, torch.finfo, torch.autocast, torch.Size)
# Of what tensors give: sizes, numbers of a dtype, devices.
_ATTRIBUTES = frozenset(name for name in dir(torch.Tensor) if not name.startswith("_")) | {
    "bits", "dtype", "eps", "max", "min", "numel", "smallest_normal", "tiny", "type",
}  # fmt: skip
# Functions of torch that give no tensor and say what the forward is run under.
TORCH_ASKED = ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled", "promote_types", "result_type",
               "is_autocast_cpu_enabled", "is_inference", "is_tensor")  # fmt: skip


def refused(frame: FrameType, cls: type, attributes: Collection[str], stand_in: type) -> str | None:
    """Why the code of the frame, which is about to run, may not; None if it may.

    cls: the class of the module whose forward it is part of. attributes: the names of what the module holds. stand_in:
    a base class of what stands in for the module, and of nothing else.
    """
    code, where = frame.f_code, f"(in {frame.f_code.co_name})"
    steps = [step for step in dis.get_instructions(code) if step.opname not in _BETWEEN]
    known = _ATTRIBUTES | set(attributes) | {name for name in dir(cls) if not name.startswith("__")}
    end = 0  # of the attributes of what was loaded by name
    for i, step in enumerate(steps):
        name = str(step.argval)
        if step.opname in _WRITES:
            named = f" {name}" if isinstance(step.argval, str) else ""
            return f"its forward writes {_WRITES[step.opname]}{named} {where}"
        if step.opname == "STORE_DEREF" and name in code.co_freevars:
            return f"its forward writes the variable {name} of the function around it {where}"
        if step.opname in ("IMPORT_NAME", "YIELD_VALUE", "GET_AWAITABLE"):
            return f"its forward imports a module, or is a generator or coroutine {where}"
        if step.opname in _LOADS_ATTRIBUTE and i >= end and name not in known:
            if not _loads_module(frame, steps, i - 1, stand_in):  # which watches what is read of it
                return f"its forward uses an attribute {name} {where}"
        elif step.opname == "LOAD_GLOBAL" or (step.opname in _LOADS_FREE and name in code.co_freevars):
            value, path = _resolved(frame, steps, i)
            end = i + len(path)
            if value is getattr or value is hasattr:
                named_by = steps[i + 2].opname if i + 2 < len(steps) else ""
                if named_by != "LOAD_CONST" or not _loads_module(frame, steps, i + 1, stand_in):
                    return f"its forward uses {name} of something that is not its module {where}"
            elif not (value is _MISSING and len(path) == 1) and not _allowed(value, path, cls):
                return f"its forward uses {'.'.join(path)}, a {type(value).__name__} {where}"
    return None


_MISSING: Any = object()


def _resolved(frame: FrameType, steps: list[dis.Instruction], i: int) -> tuple[Any, list[str]]:
    """What a variable holds, or an attribute of the module or class that it holds, and the path to it."""
    path = [str(steps[i].argval)]
    value = _loaded(frame, path[0])
    for step in steps[i + 1 :]:
        if step.opname not in _LOADS_ATTRIBUTE or not isinstance(value, (ModuleType, type)):
            break
        path.append(str(step.argval))
        value = getattr(value, path[-1], _MISSING)
    return value, path


def _loaded(frame: FrameType, name: str) -> Any:
    for names in (frame.f_locals if name in frame.f_code.co_freevars else {}, frame.f_globals, frame.f_builtins):
        if name in names:
            return names[name]
    return _MISSING


def _loads_module(frame: FrameType, steps: list[dis.Instruction], i: int, stand_in: type) -> bool:
    """Whether that step loads the module whose forward it is."""
    if not 0 <= i < len(steps) or not steps[i].opname.startswith("LOAD_FAST"):
        return False
    return issubclass(type(frame.f_locals.get(steps[i].argval)), stand_in)


def _allowed(value: Any, path: list[str], cls: type) -> bool:
    if isinstance(value, FunctionType):
        return True  # judged when it is called
    if isinstance(value, type):
        ours = value in cls.__mro__ or value in _TORCH_CLASSES or issubclass(value, BaseException)
        return ours or value in _HARMLESS
    if isinstance(value, BuiltinFunctionType):
        return without_effect(value)
    constant = isinstance(value, (torch.dtype, torch.device, int, float))
    return constant and path[0] in ("torch", "math") and len(path) > 1


def without_effect(function: Any) -> bool:
    """Whether a function in C computes, or asks, and does nothing else. Operators are judged by what they dispatch."""
    owner = getattr(function, "__self__", None)
    if function in _HARMLESS or owner is math or owner is torch._C._nn or isinstance(owner, torch.Tensor):
        return True
    if owner is None and function.__module__ == "torch" and hasattr(torch._C._VariableFunctions, function.__name__):
        return True  # torch.rsqrt and its like
    of_torch = str(getattr(function, "__module__", None) or "").partition(".")[0] == "torch" or owner is torch._C
    return of_torch and str(function.__name__) in TORCH_ASKED
