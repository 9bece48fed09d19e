"""A stand-in for a norm, on which the norm's own forward runs while it is being proven.

A stand-in has the attributes of the norm, a weight of its own, and a class made from the norm's class. It records which
attributes the forward reads. It refuses reads of values that are not plain, because these could change unnoticed or
differ between two norms, and it refuses all writes.
"""

from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from rmsnorm.errors import type_name
from rmsnorm.patching.expression import Refusal

_PLAIN_TYPES = (bool, int, float, complex, str, bytes, torch.dtype, type(None))


class Absent:
    """Marks an attribute that was looked up and is missing."""


class Method:
    """Marks an attribute that is a method of the class and was not replaced on the instance."""


def is_plain(value: object) -> bool:
    """Whether the value is immutable: a number, a string, a dtype, None, or a tuple or frozenset of these."""
    if type(value) in (tuple, frozenset, torch.Size):
        return all(map(is_plain, value))  # type: ignore[call-overload]
    return type(value) in _PLAIN_TYPES


def identity(value: object) -> object:
    """A key that is equal only for plain values of the same type and bits: 0.0 and -0.0 differ, 1 and True too."""
    if isinstance(value, tuple):
        return type(value), tuple(map(identity, value))
    if isinstance(value, frozenset):
        return type(value), frozenset(map(identity, value))
    return type(value), value.hex() if isinstance(value, float) else value


class InFront:
    """Base of the classes that are put in front of a norm's own class."""

    def __init_subclass__(cls) -> None:
        """Skips the own class's hook, which might register every subclass that it sees."""


def put_in_front(front: type, cls: type[nn.Module], **body: object) -> type[nn.Module]:
    """A subclass of both with the name of `cls`. Raises whatever `cls` raises when it is subclassed."""
    metaclass: Any = type(cls)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return metaclass(cls.__name__, (front, cls), body | names)  # type: ignore[no-any-return]


@dataclass
class Record:
    """What one forward did with its stand-in and its tensors. Kept where the forward does not look.

    Attributes:
        module: The norm that the stand-in stands in for.
        weight: The weight of the stand-in, if it has one.
        attributes: The attributes that the forward read, by name: their values, or `Method` or `Absent`.
        queries: The names of the torch functions that it called, and of the questions whose answers it could branch on.
        constants: The numbers in its code.
        refusal: The first reason to refuse it, which survives even if the forward catches the exception.
    """

    module: nn.Module
    weight: nn.Parameter | None
    attributes: dict[str, object] = field(default_factory=dict)
    queries: set[str] = field(default_factory=set)
    constants: set[float] = field(default_factory=set)
    refusal: str | None = None

    def refuse(self, reason: str) -> NoReturn:
        """Keep the reason if it is the first one, and raise it."""
        self.refusal = self.refusal or reason
        raise Refusal(reason)


class StandIn(InFront):
    """Put in front of the norm's own class: records or refuses what the forward does with its attributes."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        record = record_of(self)
        if name == "training":
            record.queries.add(name)
        elif is_plain(value):
            record.attributes[name] = value
        elif name != "__class__":
            if name == "__dict__" or not _comes_from_class(type(self), name, value):
                record.refuse(f"its forward reads its attribute {name}, {type_name(value)}")
            record.attributes[name] = Method
        return value

    def __getattr__(self, name: str) -> Any:
        record = record_of(self)
        if name == "weight" and "weight" in record.module._parameters:
            return record.weight
        for held, kind in (("_parameters", "parameter"), ("_buffers", "buffer"), ("_modules", "submodule")):
            if name in getattr(record.module, held):
                if getattr(record.module, held)[name] is not None:
                    record.refuse(f"its forward uses its {kind} {name}")
                record.attributes[name] = None
                return None
        record.attributes[name] = Absent
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        record_of(self).refuse(f"its forward writes the attribute {name}")

    def __delattr__(self, name: str) -> None:
        record_of(self).refuse(f"its forward writes the attribute {name}")


_KEY = "_rmsnorm_record"


def record_of(stand_in: Any) -> Record:
    record: Record = object.__getattribute__(stand_in, "__dict__")[_KEY]
    return record


def _comes_from_class(cls: type, name: str, value: object) -> bool:
    """Whether the value is what an instance sees of a function or a static or class method of the class."""
    found = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    if isinstance(found, property):
        return isinstance(value, Tensor)  # its operators were recorded when the getter ran
    function = getattr(found, "__func__", found)
    return isinstance(function, FunctionType) and getattr(value, "__func__", value) is function


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def stand_in_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of the stand-ins for norms of this class. Raises whatever `cls` raises when it is subclassed."""
    return put_in_front(StandIn, cls)


def make_stand_in(
    cls: type[nn.Module], module: nn.Module, weight: nn.Parameter | None, /, **attributes: object
) -> nn.Module:
    """A stand-in for the module.

    Args:
        cls: A class that `stand_in_class` made.
        module: The norm to stand in for; it is only read.
        weight: The weight of the stand-in.
        **attributes: Replace the module's attributes of the same names.
    """
    made: nn.Module = object.__new__(cls)
    own = {key: value for key, value in vars(module).items() if key not in _MODULE_ATTRIBUTES and key != "forward"}
    values = vars(nn.Module()) | own | attributes
    for held in ("_parameters", "_buffers", "_modules"):
        del values[held]
    object.__getattribute__(made, "__dict__").update(values | {_KEY: Record(module, weight)})
    return made
