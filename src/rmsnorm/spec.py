"""What distinguishes one RMSNorm from another, and the one validator of its arguments."""

import functools
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


def spec_of(where: str, eps: float, cast: Cast, offset: float) -> Spec:
    """The `Spec`, of floats. Raises as `check_spec`."""
    check_spec(where, eps, cast, offset)
    return _spec(eps, cast, offset)


@functools.lru_cache(256)
def _spec(eps: float, cast: Cast, offset: float) -> Spec:
    return Spec(float(eps), cast, float(offset))


def check_spec(where: str, eps: float, cast: str, offset: float) -> None:
    """Raise `TypeError` or `ValueError`, naming the argument, unless the three make an RMSNorm."""
    if type(eps) is float and 0.0 <= eps <= LARGEST_EPS and offset == 0.0 and (cast == "early" or cast == "late"):
        return  # nearly every call
    for name, value in (("eps", eps), ("offset", offset)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            torchs = "; F.rms_norm's None is torch.finfo(torch.float32).eps" if name == "eps" and value is None else ""
            raise TypeError(complaint(where, name, f"is a {type(value).__name__}", f"a number{torchs}"))
    if not 0.0 <= eps <= LARGEST_EPS:
        raise ValueError(complaint(where, "eps", f"is {eps}", "a number of at least 0 that fp32 can hold"))
    if cast not in ("early", "late"):
        raise ValueError(complaint(where, "cast", f"is {cast!r}", "'early' or 'late'"))
    if offset not in (0.0, 1.0):
        raise ValueError(complaint(where, "offset", f"is {offset}", "0 or 1"))
    if offset != 0.0 and cast == "early":
        raise ValueError(complaint(where, "offset", "is 1 with cast='early'", "cast='late' when there is an offset"))


def check_order(where: str, weight: object, more: tuple[object, ...]) -> None:
    """Raise `TypeError` for what stands in another place than here: the arguments of F.rms_norm, or one by position."""
    if is_torchs_shape(weight):
        fix = f'this is the argument order of F.rms_norm; write {where}(x, weight, eps, cast="late")'
        raise TypeError(complaint(where, "weight", f"is a {type(weight).__name__}", f"a torch.Tensor: {fix}"))
    if more:
        given = f"is {more[0]!r}" if isinstance(more[0], (str, int, float)) else f"is a {type(more[0]).__name__}"
        raise TypeError(complaint(where, "the argument after eps", given, "cast and offset by name: cast='late'"))


def is_torchs_shape(value: object) -> bool:
    """Whether it can only be the `normalized_shape` of torch's functions."""
    if isinstance(value, (tuple, list)):
        return all(isinstance(n, int) for n in value)
    return isinstance(value, int) and not isinstance(value, bool)


def caller(residual: torch.Tensor | None) -> str:
    """The public function that is called with this residual, or with the gradient that arrives through its sum."""
    return "rms_norm" if residual is None else "add_rms_norm"


def check_tensors(
    where: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    offset: float,
    symbolic: bool = False,
) -> None:
    """Raise `TypeError` or `ValueError`, naming the argument, unless the tensors fit each other.

    x: (..., N) with N >= 1; residual: the shape of x; weight: (N,). All of a floating dtype in `DTYPES`, dense,
    on one device. symbolic: whether sizes may be known only when a compiled program runs; it then checks them.
    """
    _check_rows(where, "x", x, symbolic)
    if residual is not None:
        _check_like(where, "residual", residual, "x", x, symbolic)
    _check_weight(where, weight, x, symbolic)
    if weight is None and offset != 0.0:
        raise ValueError(complaint(where, "weight", "is None with an offset", "a weight that the offset is added to"))


def check_gradients(
    where: str,
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    need_dw: bool,
    symbolic: bool = False,
) -> None:
    """As `check_tensors`, for what the backward pass gets: dy, x and ds: (..., N); weight: (N,); rstd: (...,).

    Autograd gives dy the shape of y, so what does not fit it has changed since the forward pass.
    """
    try:
        _check_rows(where, "dy", dy, symbolic)
        _check_like(where, "x", x, "dy", dy, symbolic)
        if ds is not None:
            _check_like(where, "ds", ds, "dy", dy, symbolic)
        _check_weight(where, weight, x, symbolic)
        if weight is None and (need_dw or offset != 0.0):
            raise ValueError(complaint(where, "weight", "is None", "a weight, for its gradient or for an offset"))
        if not _is_dense(rstd):
            _refuse(where, "rstd", rstd)
        if rstd.dtype is not torch.float32:
            raise TypeError(complaint(where, "rstd", f"has dtype {rstd.dtype}", "float32"))
        if not _same_sizes(rstd.shape, x.shape[:-1], symbolic):
            expected = f"{tuple(x.shape[:-1])}, a number for each row of x"
            raise ValueError(complaint(where, "rstd", f"has shape {tuple(rstd.shape)}", expected))
        _check_device(where, "rstd", rstd, x)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} {_IN_BACKWARD}") from None


def check_saved(
    where: str, x: torch.Tensor, weight: torch.Tensor | None, x_dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> None:
    """Raise `TypeError`, naming the argument, unless x and the weight have the dtypes that they were saved with."""
    for name, t, dtype in (("x", x, x_dtype), ("weight", weight, weight_dtype)):
        if t is not None and t.dtype is not dtype:
            words = complaint(where, name, f"has dtype {t.dtype}", str(dtype).removeprefix("torch."))
            raise TypeError(f"{words} {_IN_BACKWARD}")


_IN_BACKWARD = "(in the backward pass: what was saved for it must be as it was in the forward pass)"


def check_memory(where: str, backward: bool = False, **tensors: torch.Tensor | None) -> None:
    """Raise `ValueError`, naming the argument, unless each tensor's storage holds all that its shape says.

    Engines that shard parameters free a storage, or make it smaller, while the shape stays.
    """
    for name, t in tensors.items():
        if t is None:
            continue
        try:
            held = t.untyped_storage().nbytes()
        except NotImplementedError:
            continue  # the tensors of some devices have no storage
        elements = t.numel()
        if elements and not t.is_contiguous():
            elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        needed = (t.storage_offset() + elements) * t.element_size() if elements else 0
        if held < needed:
            words = complaint(where, name, f"has a storage of {held} bytes", f"{needed}: it was freed or made smaller")
            raise ValueError(f"{words} {_IN_BACKWARD}" if backward else words)


def _check_rows(where: str, name: str, x: torch.Tensor, symbolic: bool) -> None:
    if not (_is_dense(x) and x.dtype in DTYPES):
        _refuse(where, name, x)
    shape = x.shape
    if not shape or not _is_not_zero(shape[-1], symbolic):
        raise ValueError(complaint(where, name, f"has shape {tuple(shape)}", "(..., N) with N of at least 1"))


def _check_like(where: str, name: str, t: torch.Tensor, of: str, x: torch.Tensor, symbolic: bool) -> None:
    if not (_is_dense(t) and t.dtype in DTYPES):
        _refuse(where, name, t)
    if not _same_sizes(t.shape, x.shape, symbolic):
        raise ValueError(complaint(where, name, f"has shape {tuple(t.shape)}", f"{tuple(x.shape)}, the shape of {of}"))
    _check_device(where, name, t, x, of)


def _check_weight(where: str, weight: torch.Tensor | None, x: torch.Tensor, symbolic: bool) -> None:
    if weight is None:
        return
    if not (_is_dense(weight) and weight.dtype in DTYPES):
        _refuse(where, "weight", weight)
    if not _same_sizes(weight.shape, x.shape[-1:], symbolic):
        expected = f"({x.shape[-1]},), the last dimension of x"
        raise ValueError(complaint(where, "weight", f"has shape {tuple(weight.shape)}", expected))
    _check_device(where, "weight", weight, x)


def _check_device(where: str, name: str, t: torch.Tensor, x: torch.Tensor, of: str = "x") -> None:
    if t.device != x.device:
        raise ValueError(complaint(where, name, f"is on {t.device}", f"{x.device}, the device of {of}"))


def _same_sizes(a: torch.Size, b: torch.Size, symbolic: bool) -> bool:
    """Whether two shapes are the same, as far as that is known; what is not is checked when the program runs."""
    if not symbolic:
        return a == b
    if len(a) != len(b):
        return False
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    for m, n in zip(a, b, strict=True):
        if guard_or_false(m != n):
            return False
        torch._check(m == n)
    return True


def _is_not_zero(n: int, symbolic: bool) -> bool:
    if not symbolic:
        return n != 0
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    if guard_or_false(n == 0):
        return False
    torch._check(n != 0)
    return True


def _is_dense(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested


def _refuse(where: str, name: str, value: object) -> NoReturn:
    if not isinstance(value, torch.Tensor):
        raise TypeError(complaint(where, name, f"is a {type(value).__name__}", "a torch.Tensor"))
    if value.layout is not torch.strided:
        raise TypeError(complaint(where, name, f"has layout {value.layout}", "a dense tensor"))
    if value.is_nested:
        raise TypeError(complaint(where, name, "is a nested tensor", "a dense tensor"))
    raise TypeError(complaint(where, name, f"has dtype {value.dtype}", "float32, bfloat16, float16 or float64"))
