"""What distinguishes one RMSNorm from another, and the one validator of its arguments."""

import numbers
from dataclasses import dataclass
from typing import Literal

import torch

from rmsnorm.errors import complaint

Cast = Literal["early", "late"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGEST_EPS = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Spec:
    """One RMSNorm: `eps` under the root, when the cast happens, what is added to the weight.

    `cast="early"` casts to the input's dtype and then multiplies by the weight (Llama, DeepSeek V2/V3, Qwen);
    `cast="late"` multiplies in fp32 and casts once (GPT-OSS, Olmo 2, and, with `offset=1`, Gemma).
    Raises `TypeError` or `ValueError` when the combination makes no sense.
    """

    eps: float = 1e-6
    cast: Cast = "early"
    offset: float = 0.0

    def __post_init__(self) -> None:
        check_spec("Spec", self.eps, self.cast, self.offset)


def check_spec(where: str, eps: float, cast: str, offset: float) -> None:
    """Raise `TypeError` or `ValueError`, naming the argument, unless the three make an RMSNorm."""
    for name, value in (("eps", eps), ("offset", offset)):
        if type(value) is not float and (not isinstance(value, numbers.Real) or isinstance(value, bool)):
            raise TypeError(complaint(where, name, f"is a {type(value).__name__}", "a number"))
    if not 0.0 <= eps <= _LARGEST_EPS:
        raise ValueError(complaint(where, "eps", f"is {eps}", "a number of at least 0 that fp32 can hold"))
    if cast != "early" and cast != "late":
        raise ValueError(complaint(where, "cast", f"is {cast!r}", "'early' or 'late'"))
    if offset != 0.0:
        if offset != 1.0:
            raise ValueError(complaint(where, "offset", f"is {offset}", "0 or 1"))
        if cast == "early":
            raise ValueError(complaint(where, "offset", "is 1 with cast='early'", "cast='late' when there is an offset"))


def check_tensors(
    where: str, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, offset: float
) -> None:
    """Raise `TypeError` or `ValueError`, naming the argument, unless the tensors fit each other.

    x: (..., N) with N >= 1; residual: the shape of x; weight: (N,). All of a floating dtype in `DTYPES`, dense,
    on one device.
    """
    _check_tensor(where, "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(complaint(where, "x", f"has shape {tuple(x.shape)}", "(..., N) with N of at least 1"))
    if residual is not None:
        _check_tensor(where, "residual", residual)
        if residual.shape != x.shape:
            raise ValueError(
                complaint(where, "residual", f"has shape {tuple(residual.shape)}", f"{tuple(x.shape)}, the shape of x")
            )
        if residual.device != x.device:
            raise ValueError(complaint(where, "residual", f"is on {residual.device}", f"{x.device}, the device of x"))
    if weight is not None:
        _check_tensor(where, "weight", weight)
        if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
            expected = f"({x.shape[-1]},), the last dimension of x"
            raise ValueError(complaint(where, "weight", f"has shape {tuple(weight.shape)}", expected))
        if weight.device != x.device:
            raise ValueError(complaint(where, "weight", f"is on {weight.device}", f"{x.device}, the device of x"))
    elif offset != 0.0:
        raise ValueError(complaint(where, "weight", "is None with an offset", "a weight that the offset is added to"))


def _check_tensor(where: str, name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(complaint(where, name, f"is a {type(value).__name__}", "a torch.Tensor"))
    if value.layout is not torch.strided:
        raise TypeError(complaint(where, name, f"has layout {value.layout}", "a dense tensor"))
    if value.dtype not in DTYPES:
        raise TypeError(complaint(where, name, f"has dtype {value.dtype}", "float32, bfloat16, float16 or float64"))
