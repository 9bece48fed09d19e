"""Watches what a forward asks its tensors.

It may ask for dtypes, devices and numbers of dimensions; these answers are recorded. Sizes that differ from call to
call may be passed on to torch, but must not decide anything. Strides, addresses and contiguity are refused.
"""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rmsnorm.patching.stand_in import Record

# A forward can branch on the answers to these.
DECISIVE = frozenset(
    ("dim", "ndim", "ndimension", "requires_grad", "device", "len", "training", "is_grad_enabled", "is_inference",
     "is_autocast_enabled", "is_autocast_cpu_enabled", "is_inference_mode_enabled")
)  # fmt: skip
_SIZES = ("shape", "size", "numel", "nelement")
_ALLOWED = ("dtype", "dim", "ndim", "ndimension", "requires_grad", "device", "is_floating_point", "is_complex",
            "layout", "is_sparse", "result_type", "can_cast", "promote_types", "is_tensor", "itemsize",
            "element_size")  # fmt: skip
# Calls that return a tensor without dispatching an operator, or that cut the gradient.
_EFFECTS = ("detach", "detach_", "data", "requires_grad_", "set_", "share_memory_", "pin_memory", "register_hook",
            "apply_", "map_", "map2_", "as_subclass", "rename_", "grad")  # fmt: skip


def _reject(size: Any, *_: object) -> NoReturn:
    record: Record = size.record
    record.refuse("its forward branches on the size of its input")


class _VaryingSize(int):
    """A size that differs from call to call, or a number made from one: it may only be passed on to torch."""

    record: Record

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __hash__ = __str__ = __repr__ = __format__ = (
        _reject
    )
    __int__ = __float__ = __trunc__ = __floor__ = __ceil__ = __round__ = _reject
    __truediv__ = __rtruediv__ = __divmod__ = __rdivmod__ = _reject
    real = imag = numerator = denominator = property(_reject)
    bit_length = bit_count = conjugate = as_integer_ratio = __index__ = _reject


def _arithmetic(name: str) -> Callable[..., Any]:
    operation = getattr(int, name)

    def method(self: _VaryingSize, *others: Any) -> Any:
        if not all(isinstance(other, int) for other in others):
            _reject(self)
        value = operation(int.__pos__(self), *(int.__pos__(other) for other in others))
        return _varying(value, self.record)

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor"):
    for _kind in ("", "r"):
        setattr(_VaryingSize, f"__{_kind}{_name}__", _arithmetic(f"__{_kind}{_name}__"))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(_VaryingSize, f"__{_name}__", _arithmetic(f"__{_name}__"))


def _varying(n: int, record: Record) -> _VaryingSize:
    size = _VaryingSize(n)
    size.record = record
    return size


class _Shape(tuple):  # type: ignore[type-arg]
    """A shape in which some sizes vary. A torch.Size would print and count them without asking us."""

    record: Record

    __str__ = __repr__ = __format__ = __hash__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _reject
    __contains__ = index = count = _reject

    def __len__(self) -> int:
        self.record.queries.add("len")
        return super().__len__()

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return _shape(found, self.record) if isinstance(key, slice) else found

    def __add__(self, other: Any) -> Any:
        return _shape((*self, *other), self.record)

    def __radd__(self, other: Any) -> Any:
        return _shape((*other, *self), self.record)

    def numel(self) -> _VaryingSize:
        product = 1
        for n in self:
            product *= int.__pos__(n)
        return _varying(product, self.record)


def _shape(sizes: Any, record: Record) -> _Shape:
    shape = _Shape(sizes)
    shape.record = record
    return shape


class TensorQueries(TorchFunctionMode):
    """Refuses functions of tensors that do not return a tensor, except those that a norm may use.

    Args:
        record: Where the queries are recorded.
        row: The last dimensions of x that are the same in every call; empty if none is.
        device: The device that tensors report, if not the one that they are on.
    """

    def __init__(self, record: Record, row: tuple[int, ...], device: torch.device | None) -> None:
        super().__init__()
        self.record, self.row, self.device = record, row, device

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        profiler = sys.getprofile()
        sys.setprofile(None)  # what torch itself calls is judged by its operators
        try:
            return self._answer(func, args, kwargs or {})
        finally:
            sys.setprofile(profiler)

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, owner = getattr(func, "__name__", str(func)), "Tensor"
        if name in ("__get__", "__set__"):
            name = func.__self__.__name__ if name == "__get__" else f"{func.__self__.__name__} ="
        elif not getattr(func, "__qualname__", "").startswith(("Tensor.", "TensorBase.")):
            owner = "torch"
        self.record.queries.add(name)
        if name in _EFFECTS:
            self.record.refuse(f"its forward uses {owner}.{name}")
        result = func(*args, **kwargs)
        if name in _SIZES:
            return self._sizes(result, args, kwargs)
        if name == "device" and self.device is not None:
            return self.device
        if name in _ALLOWED or _holds_tensor(result):
            return result
        return self.record.refuse(f"its forward uses {owner}.{name}")

    def _sizes(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        t = args[0]
        if t is self.record.weight:
            return result
        k = len(self.row)
        fixed = k if k and tuple(Tensor.size(t))[-k:] == self.row else 0
        if isinstance(result, torch.Size):
            last = len(result) - fixed
            return _shape([_varying(n, self.record) if i < last else n for i, n in enumerate(result)], self.record)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dim is not None and dim % t.dim() >= t.dim() - fixed:
            return result
        return _varying(result, self.record)


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_holds_tensor, value)))
