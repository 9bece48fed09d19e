"""The layers: state and one call."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor, nn

from rmsnorm.errors import complaint
from rmsnorm.ops import rms_norm
from rmsnorm.spec import DTYPES, Cast, check_spec, is_torchs_shape

P = ParamSpec("P")
_TORCHS = "rmsnorm.TorchRMSNorm takes the arguments of torch.nn.RMSNorm"


def _not_torchs(init: Callable[Concatenate[Any, P], None]) -> Callable[Concatenate[Any, P], None]:
    """A constructor that names the class to use where it is given the arguments of torch.nn.RMSNorm."""

    @functools.wraps(init)
    def checked(self: Any, *args: P.args, **named: P.kwargs) -> None:
        where = type(self).__name__
        if "normalized_shape" in named:
            was = f"is {named['normalized_shape']!r}"
            raise TypeError(complaint(where, "normalized_shape", was, f"hidden_size, an int; {_TORCHS}"))
        if len(args) > 2:
            expected = f"hidden_size and eps by position and the others by name; {_TORCHS}"
            raise TypeError(complaint(where, "the argument after eps", f"is {args[2]!r}", expected))
        init(self, *args, **named)

    return checked  # type: ignore[return-value]  # mypy has a type of its own for what is wrapped


class RMSNorm(nn.Module):
    """`rms_norm` over the last dimension, with a weight of shape (hidden_size,).

    The weight starts at one, or, with offset 1, at zero, so that a new layer scales by one. Without
    `elementwise_affine` there is none. Arguments are those of `rms_norm`; raises TypeError or ValueError for what
    makes no sense. state_dict key: "weight".
    """

    weight: nn.Parameter | None

    @_not_torchs
    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        cast: Cast = "early",
        offset: float = 0.0,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        if not isinstance(hidden_size, int) or isinstance(hidden_size, bool):
            expected = f"an int; {_TORCHS}" if is_torchs_shape(hidden_size) else "an int"
            raise TypeError(complaint(where, "hidden_size", f"is a {type(hidden_size).__name__}", expected))
        if hidden_size <= 0:
            raise ValueError(complaint(where, "hidden_size", f"is {hidden_size}", "at least 1"))
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(complaint(where, "dtype", f"is {dtype}", "float32, bfloat16, float16 or float64"))
        check_spec(where, eps, cast, offset)
        if offset != 0 and not elementwise_affine:
            raise ValueError(complaint(where, "elementwise_affine", "is False with an offset", "True"))
        self.hidden_size = hidden_size
        self.eps = eps
        self.cast = cast
        self.offset = offset
        weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if elementwise_affine else None
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, cast=self.cast, offset=self.offset)

    def extra_repr(self) -> str:
        parts = [f"{self.hidden_size}, eps={self.eps}, cast={self.cast!r}"]
        if self.offset != 0:
            parts.append(f"offset={self.offset}")
        if self.weight is None:
            parts.append("elementwise_affine=False")
        return ", ".join(parts)


class DeepseekV2RMSNorm(nn.Module):
    """The published class: the same constructor, attributes (`weight`, `variance_epsilon`) and state_dict."""

    weight: nn.Parameter

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.register_parameter("weight", RMSNorm(hidden_size, eps).weight)
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"
