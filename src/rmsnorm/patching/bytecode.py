"""What the Python code of a forward may do, read from its bytecode before it runs.

It may use torch's functions, Python's pure functions, functions of its own, and attributes of tensors and of its
module. Anything else that it loads could hold state, and anything that it stores outside its local variables is state.
"""

import builtins
import dis
import functools
import math
from collections.abc import Collection, Sequence
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch

from rmsnorm.errors import type_name
from rmsnorm.patching import activations

_STORES = {"STORE_ATTR": "the attribute", "DELETE_ATTR": "the attribute", "STORE_GLOBAL": "the global variable",
           "DELETE_GLOBAL": "the global variable", "STORE_SUBSCR": "an item of a container",
           "DELETE_SUBSCR": "an item of a container"}  # fmt: skip
_ATTRIBUTE_LOADS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_CLOSURE_LOADS = ("LOAD_DEREF", "LOAD_CLASSDEREF")
_FILLERS = ("PUSH_NULL", "CACHE", "PRECALL", "EXTENDED_ARG")
# Python's own functions and types whose result depends on their arguments alone, and which change nothing.
_PURE = frozenset(
    getattr(builtins, name)
    for name in ("abs", "all", "any", "bool", "callable", "float", "getattr", "hasattr", "int", "isinstance", "len",
                 "max", "min", "pow", "round", "sum", "super", "tuple")
)  # fmt: skip
_TORCH_CLASSES = (torch.Tensor, torch.finfo, torch.autocast, torch.Size)
# Attributes of tensors, and of what these return: sizes, dtypes, devices.
_ATTRIBUTES = frozenset(name for name in dir(torch.Tensor) if not name.startswith("_")) | {
    "bits", "dtype", "eps", "max", "min", "numel", "smallest_normal", "tiny", "type",
}  # fmt: skip
# Functions of torch that return no tensor and tell the mode that the forward runs in.
TORCH_QUERIES = ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled", "promote_types", "result_type",
               "is_autocast_cpu_enabled", "is_inference", "is_tensor")  # fmt: skip


def why_refused(frame: FrameType, cls: type, attributes: Collection[str], stand_in: type) -> str | None:
    """Why the code of a frame that is about to run may not run.

    Args:
        frame: A frame of the forward, or of a function that it calls.
        cls: The norm's own class.
        attributes: The names of the norm's attributes.
        stand_in: A base class of the stand-in, and of nothing else.

    Returns:
        The reason, or None if the code may run.
    """
    code, where = frame.f_code, f"(in {frame.f_code.co_name})"
    steps = _steps(code)
    end = 0  # of the chain of attributes after the name that was loaded last
    for i, step in enumerate(steps):
        name = str(step.argval)
        if step.opname in _STORES:
            named = f" {name}" if isinstance(step.argval, str) else ""
            return f"its forward writes {_STORES[step.opname]}{named} {where}"
        if step.opname == "STORE_DEREF" and name in code.co_freevars:
            return f"its forward writes the enclosing function's variable {name} {where}"
        if step.opname in ("IMPORT_NAME", "YIELD_VALUE", "GET_AWAITABLE"):
            return f"its forward imports a module, or is a generator or coroutine {where}"
        if step.opname in _ATTRIBUTE_LOADS and i >= end and not _is_known(name, cls, attributes):
            if not _loads_module(frame, steps, i - 1, stand_in):  # whose reads the stand-in records
                return f"its forward uses an attribute {name} {where}"
        elif step.opname == "LOAD_GLOBAL" or (step.opname in _CLOSURE_LOADS and name in code.co_freevars):
            value, path = _resolved(frame, steps, i)
            end = i + len(path)
            if value is getattr or value is hasattr:
                named_by = steps[i + 2].opname if i + 2 < len(steps) else ""
                if named_by != "LOAD_CONST" or not _loads_module(frame, steps, i + 1, stand_in):
                    return f"its forward calls {name} on something other than its module {where}"
            elif not (value is _MISSING and len(path) == 1) and not _allowed(value, path, cls):
                return f"its forward uses {'.'.join(path)}, {type_name(value)} {where}"
    return None


@functools.lru_cache(64)  # a proof runs the same code hundreds of times
def _steps(code: CodeType) -> tuple[dis.Instruction, ...]:
    return tuple(step for step in dis.get_instructions(code) if step.opname not in _FILLERS)


def _is_known(name: str, cls: type, attributes: Collection[str]) -> bool:
    """Whether a name is an attribute of tensors, of the norm or of its class."""
    return name in _ATTRIBUTES or name in attributes or (not name.startswith("__") and name in dir(cls))


_MISSING: Any = object()


def _resolved(frame: FrameType, steps: Sequence[dis.Instruction], i: int) -> tuple[Any, list[str]]:
    """The value that step i loads, or an attribute of it if it is a module or class; and the path to it."""
    path = [str(steps[i].argval)]
    value = _loaded(frame, path[0])
    for step in steps[i + 1 :]:
        if step.opname not in _ATTRIBUTE_LOADS or not isinstance(value, (ModuleType, type)):
            break
        path.append(str(step.argval))
        value = getattr(value, path[-1], _MISSING)
    return value, path


def _loaded(frame: FrameType, name: str) -> Any:
    for names in (frame.f_locals if name in frame.f_code.co_freevars else {}, frame.f_globals, frame.f_builtins):
        if name in names:
            return names[name]
    return _MISSING


def _loads_module(frame: FrameType, steps: Sequence[dis.Instruction], i: int, stand_in: type) -> bool:
    """Whether step i loads the norm itself."""
    if not 0 <= i < len(steps) or not steps[i].opname.startswith("LOAD_FAST"):
        return False
    return issubclass(type(frame.f_locals.get(steps[i].argval)), stand_in)


def _allowed(value: Any, path: list[str], cls: type) -> bool:
    if isinstance(value, FunctionType):
        return True  # its code is read when it is called
    if isinstance(value, type):
        known = value in cls.__mro__ or value in _TORCH_CLASSES or issubclass(value, BaseException)
        return known or value in _PURE
    if isinstance(value, BuiltinFunctionType):
        return is_pure(value)
    if value is not None and value is activations.table():
        return True
    constant = isinstance(value, (torch.dtype, torch.device, int, float))
    return constant and path[0] in ("torch", "math") and len(path) > 1


def is_pure(function: Any) -> bool:
    """Whether a function in C has no effect but its result. Operators are judged where they are dispatched."""
    owner = getattr(function, "__self__", None)
    if function in _PURE or owner is math or owner is torch._C._nn or isinstance(owner, torch.Tensor):
        return True
    if owner is None and function.__module__ == "torch" and hasattr(torch._C._VariableFunctions, function.__name__):
        return True  # torch.rsqrt and the like
    of_torch = str(getattr(function, "__module__", None) or "").partition(".")[0] == "torch" or owner is torch._C
    return of_torch and str(function.__name__) in TORCH_QUERIES
