"""Watches which functions a forward calls, and has the bytecode of its own functions read before they run."""

import gc
import sys
import threading
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch
from torch import nn

from rmsnorm.patching import activations, bytecode
from rmsnorm.patching.stand_in import Record, StandIn

# Modules of torch, in Python, whose functions compute or say how to.
_TORCH_MODULES = ("torch.nn.functional", "torch.functional", "torch._tensor", "torch.nn.modules.normalization",
                  "torch._VF", "torch.amp.autocast_mode", "torch.cuda.amp.autocast_mode",
                  "torch.cpu.amp.autocast_mode")  # fmt: skip
_DECORATORS = ("__call__", "decorate_autocast", "autocast_decorator")
_CALL_OF_MODULE = nn.Module.__call__.__code__
# The stand-in's own code, which calls the getters of properties.
_STAND_IN_CODE = (StandIn.__getattribute__.__code__, StandIn.__getattr__.__code__)


class Calls:
    """A profiler of this thread that judges each call made by code outside torch before it runs.

    Args:
        record: Where calls are recorded or refused.
        cls: The norm's own class.
        caller: The code of the function that calls the forward.
    """

    def __init__(self, record: Record, cls: type, caller: CodeType) -> None:
        self.record, self.cls, self.caller = record, cls, caller
        module = record.module
        self.names = {*vars(module), *module._parameters, *module._buffers, *module._modules}
        self.scanned: set[CodeType] = set()
        self.lookup = activations.code_of_lookup()
        self.kept: list[Any] = []  # whose finalizers would count as calls of the forward

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            self._enter(frame)
        elif event == "c_call" and not self._is_trusted(frame) and self._by_forward(frame):
            name = getattr(arg, "__name__", "")
            if name in bytecode.TORCH_QUERIES:
                self.record.queries.add(name)
            if not bytecode.is_pure(arg) and not _of_immutable(arg):
                self.record.refuse(f"its forward calls {_name_of(arg)}")

    def _enter(self, frame: FrameType) -> None:
        before = frame.f_back
        if not self._is_trusted(frame):
            if self._by_forward(frame) and frame.f_code not in self.scanned:
                self.scanned.add(frame.f_code)
                self.record.constants |= {float(n) for n in frame.f_code.co_consts if type(n) in (int, float)}
                reason = bytecode.why_refused(frame, self.cls, self.names, StandIn)
                if reason is not None:
                    self.record.refuse(reason)
        elif before is not None and (before.f_code is self.caller or not self._is_trusted(before)):
            module, name = str(frame.f_globals["__name__"]), frame.f_code.co_name
            if frame.f_code is _CALL_OF_MODULE and activations.is_entry(frame.f_locals["self"]):
                self.kept.append(frame.f_locals["self"])
                return
            if module.partition(".")[0] == "torch" and self._by_forward(before):
                is_forward = before.f_code is self.caller and module != "torch.nn.modules.normalization"
                if is_forward or module not in _TORCH_MODULES or name in _DECORATORS:
                    self.record.refuse(f"its forward calls {module}.{name}")

    def _by_forward(self, frame: FrameType | None) -> bool:
        """Whether the frame is the forward's, or was called by it without torch in between."""
        while frame is not None and (not self._is_trusted(frame) or frame.f_code in _STAND_IN_CODE):
            frame = frame.f_back
        return frame is not None and frame.f_code is self.caller

    def _is_trusted(self, frame: FrameType) -> bool:
        """Whether it is torch's code, ours, or a look-up in a table of activation functions."""
        ours = f"{frame.f_globals.get('__name__', '')}.".startswith(("torch.", "rmsnorm."))
        return ours or frame.f_code is self.lookup


def _of_immutable(function: Any) -> bool:
    """Whether it is a method of a tensor, whose operators are recorded, or of an immutable value."""
    owner = getattr(function, "__objclass__", None) or type(getattr(function, "__self__", None))
    plain = (str, bytes, int, float, bool, tuple, frozenset, torch.dtype, torch.device)
    return issubclass(owner, (torch._C.TensorBase, *plain)) and not issubclass(owner, torch.Size)


def _name_of(function: Any) -> str:
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, ModuleType):
        return f"{type(owner).__name__}.{function.__name__}"
    module = getattr(function, "__module__", None) or getattr(owner, "__name__", "")
    return f"{module}.{function.__name__}".removeprefix("builtins.")


class Profiled:
    """Installs the profiler. Garbage collection is off meanwhile, or finalizers would count as calls of the forward."""

    lock, inside, collected = threading.Lock(), 0, False

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def __enter__(self) -> None:
        with Profiled.lock:
            if Profiled.inside == 0:
                Profiled.collected = gc.isenabled()
                gc.disable()
            Profiled.inside += 1
        self.before = sys.getprofile()
        sys.setprofile(self.calls)

    def __exit__(self, *_: object) -> None:
        try:
            if self.before is None or callable(self.before):
                sys.setprofile(self.before)
            else:
                sys.setprofile(None)
                self.before.enable()  # a profiler written in C: getprofile returns the profiler, not a function
        finally:
            with Profiled.lock:
                Profiled.inside -= 1
                if Profiled.inside == 0 and Profiled.collected:
                    gc.enable()
