"""What distinguishes one RMSNorm from another, and the one validator of its arguments."""

import numbers
from dataclasses import dataclass
from typing import Literal, NoReturn

import torch

from rmsnorm.errors import complaint

Cast = Literal["early", "late"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_EPS = torch.finfo(torch.float32).max


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
    if type(eps) is float and 0.0 <= eps <= LARGEST_EPS and offset == 0.0 and (cast == "early" or cast == "late"):
        return  # nearly every call
    for name, value in (("eps", eps), ("offset", offset)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(complaint(where, name, f"is a {type(value).__name__}", "a number"))
    if not 0.0 <= eps <= LARGEST_EPS:
        raise ValueError(complaint(where, "eps", f"is {eps}", "a number of at least 0 that fp32 can hold"))
    if cast not in ("early", "late"):
        raise ValueError(complaint(where, "cast", f"is {cast!r}", "'early' or 'late'"))
    if offset not in (0.0, 1.0):
        raise ValueError(complaint(where, "offset", f"is {offset}", "0 or 1"))
    if offset != 0.0 and cast == "early":
        raise ValueError(complaint(where, "offset", "is 1 with cast='early'", "cast='late' when there is an offset"))


def check_tensors(
    where: str, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, offset: float
) -> None:
    """Raise `TypeError` or `ValueError`, naming the argument, unless the tensors fit each other.

    x: (..., N) with N >= 1; residual: the shape of x; weight: (N,). All of a floating dtype in `DTYPES`, dense,
    on one device.
    """
    if not (isinstance(x, torch.Tensor) and x.dtype in DTYPES and x.layout is torch.strided):
        _refuse(where, "x", x)
    shape = x.shape
    if not shape or shape[-1] == 0:
        raise ValueError(complaint(where, "x", f"has shape {tuple(shape)}", "(..., N) with N of at least 1"))
    if residual is not None:
        if not (isinstance(residual, torch.Tensor) and residual.dtype in DTYPES and residual.layout is torch.strided):
            _refuse(where, "residual", residual)
        if residual.shape != shape:
            expected = f"{tuple(shape)}, the shape of x"
            raise ValueError(complaint(where, "residual", f"has shape {tuple(residual.shape)}", expected))
        if residual.device != x.device:
            raise ValueError(complaint(where, "residual", f"is on {residual.device}", f"{x.device}, the device of x"))
    if weight is not None:
        if not (isinstance(weight, torch.Tensor) and weight.dtype in DTYPES and weight.layout is torch.strided):
            _refuse(where, "weight", weight)
        if weight.shape != shape[-1:]:
            expected = f"({shape[-1]},), the last dimension of x"
            raise ValueError(complaint(where, "weight", f"has shape {tuple(weight.shape)}", expected))
        if weight.device != x.device:
            raise ValueError(complaint(where, "weight", f"is on {weight.device}", f"{x.device}, the device of x"))
    elif offset != 0.0:
        raise ValueError(complaint(where, "weight", "is None with an offset", "a weight that the offset is added to"))


def _refuse(where: str, name: str, value: object) -> NoReturn:
    if not isinstance(value, torch.Tensor):
        raise TypeError(complaint(where, name, f"is a {type(value).__name__}", "a torch.Tensor"))
    if value.layout is not torch.strided:
        raise TypeError(complaint(where, name, f"has layout {value.layout}", "a dense tensor"))
    raise TypeError(complaint(where, name, f"has dtype {value.dtype}", "float32, bfloat16, float16 or float64"))
