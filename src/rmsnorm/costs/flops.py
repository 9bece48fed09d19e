"""The FLOP formulas of our operators, for `torch.utils.flop_counter.FlopCounterMode`."""

import math
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from rmsnorm.costs.case import Case
from rmsnorm.costs.ours import backward_flops, forward_flops
from rmsnorm.costs.tape import F32

_COUNTER = "torch.utils.flop_counter"


def _operator_case(shape: Sequence[int], weight: object, cast: str, offset: float, added: object) -> Case:
    """FLOPs depend on no dtype. added: the residual, or in the backward pass the gradient of the sum."""
    return Case(
        M=math.prod(shape[:-1]), N=shape[-1], x_dtype=F32, w_dtype=None if weight is None else F32,
        implementation="ours" if added is None else "ours+residual", phase="forward", device="cpu", cast=cast,
        offset=offset,
    )  # fmt: skip


def _count_forward(x: Any, residual: Any, weight: Any, eps: float, cast: str, offset: float, *_: Any, **__: Any) -> int:
    return forward_flops(_operator_case(x, weight, cast, offset, residual))


def _count_backward(
    dy: Any, ds: Any, x: Any, weight: Any, rstd: Any, cast: str, offset: float, need_dx: bool, need_dw: bool, **_: Any
) -> int:
    return backward_flops(_operator_case(x, weight, cast, offset, ds), need_dx, need_dw)


def _register(counter: ModuleType) -> None:
    for name, formula in (("forward", _count_forward), ("backward", _count_backward)):
        operator = getattr(torch.ops.rmsnorm, name)
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator)(formula)


class _WhenImported(MetaPathFinder, Loader):
    """Registers when the counter is imported: importing it here would bring Triton, ten times this package's time."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return None
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register(module)


def register_flops() -> None:
    """Have `FlopCounterMode` count our operators, from now on or from the moment it is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
