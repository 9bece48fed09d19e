"""What distinguishes one RMSNorm from another, the dtypes of its tensors, and the checks of its arguments.

Every check raises TypeError for a wrong type or dtype and ValueError for a wrong value. The message names the function
that was called (`where`), the argument, what it was and what it should be.
"""

import functools
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, NoReturn, get_args

import torch

from rmsnorm.errors import complaint, type_name

Cast = Literal["early", "late", "first"]
Activation = Literal["silu", "sigmoid"]
CASTS = get_args(Cast)

# What x and a weight may have, each. There are kernels for the first three; float64 is computed by the reference.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*KERNEL_DTYPES, torch.float64)
MOST_SUMMANDS = 3  # gradients that one backward pass adds: those of the projections to q, k and v
PAIR, GATED = "rms_norms", "gated_rms_norm"  # the functions for several norms and for gated ones, for messages


@dataclass(frozen=True)
class Hints:
    """How torch.compile may optimize a call; see ops/residual_fusion.py and ops/recomputation.py.

    fuse_residual: fuse it with the residual addition that computes its x. recompute: recompute y in the backward pass.
    This is not a tuple, because torch.func would flatten that.
    """

    fuse_residual: bool = False
    recompute: bool = False


NO_HINTS = Hints()


@dataclass(frozen=True)
class Gate:
    """What a gated RMSNorm does with its second input, the gate.

    Attributes:
        activation: "silu" or "sigmoid": the function that is applied to the gate to get a factor.
        first: Whether x is multiplied by the factor before it is normalized, as in Mamba 2, and not after, as in
            Qwen3-Next.
    """

    activation: Activation = "silu"
    first: bool = False


@dataclass(frozen=True)
class Spec:
    """One RMSNorm: its epsilon, where it rounds, and what it adds to the weight.

    The words of this project, which mean the same in every file:

    - *Definition*: the forward of `DeepseekV2RMSNorm` as published: convert x to fp32, take the mean of its squares,
      multiply by `rsqrt(mean + eps)`, convert to the dtype of x, multiply by the weight.
    - *early*, *late*: whether that conversion comes before or after the multiplication by the weight. Early: Llama,
      DeepSeek V2 and V3, Qwen, Mistral. Late: GPT-OSS, Olmo 2, DeepSeek V4 and, with an offset of 1, Gemma.
    - *first*: as early, but the statistic is converted to the dtype of x before x is multiplied by it. DeepSeek V4,
      GLM 5 Next and Inkling 2, in norms without a weight. In fp32 this is early.
    - *statistic*: `1 / sqrt(mean(x²) + eps)`, one number a row, which the code calls rstd.
    - *published*: the statistic as the classes take it, with an fp32 mean and `torch.rsqrt`. Its last bits depend on
      the device. It serves to prove what a class computes.
    - *exact*: the statistic with an fp64 sum and correctly rounded steps, the same on every device. We compute this.

    Attributes:
        eps: Added to the mean of squares. A number that `may_be_eps`.
        cast: "early", "late" or "first"; with a gate not "first".
        offset: Added to the weight in fp32, 0 or 1. An offset of 1 requires "late".
        gate: What is done with a gate; None for a norm without one. Not with an offset.
        groups: How many parts of equal width a row has, each with its own statistic. More than 1 only with a gate.
        variance_size: Over how many of the first columns of a row the statistic is taken; None for all. All columns
            are multiplied by it. Not with a gate.

    Raises:
        TypeError: If eps or the offset is not a number, or variance_size is not an int.
        ValueError: If eps, cast, the offset, groups or variance_size has another value than these, if the offset is 1
            without "late", or if there is an offset of 1 or a variance_size with a gate.

    Example:
        >>> from rmsnorm.spec import Spec
        >>> gemma = Spec(eps=1e-6, cast="late", offset=1.0)
        >>> Spec(offset=1.0)
        Traceback (most recent call last):
        ValueError: [Spec] offset is 1 with cast='early', expected cast='late' when there is an offset
    """

    eps: float = 1e-6
    cast: Cast = "early"
    offset: float = 0.0
    gate: Gate | None = None
    groups: int = 1
    variance_size: int | None = None

    def __post_init__(self) -> None:
        check_spec("Spec", self.eps, self.cast, self.offset)
        check_groups("Spec", self.groups)
        check_variance_size("Spec", self.variance_size)
        if self.gate is None:
            if self.groups != 1:
                raise ValueError(complaint("Spec", "groups", f"is {self.groups} without a gate", "1"))
            return
        if self.offset != 0.0:
            raise ValueError(complaint("Spec", "offset", f"is {self.offset} with a gate", "0"))
        if self.variance_size is not None:
            raise ValueError(complaint("Spec", "variance_size", f"is {self.variance_size} with a gate", "None"))
        _check_gated_cast("Spec", self.cast)

    def __repr__(self) -> str:
        """The fields by name; gate and groups only with a gate, and variance_size only if there is one."""
        names: tuple[str, ...] = ("eps", "cast", "offset") if self.gate is None else ("eps", "cast", "gate", "groups")
        names += () if self.variance_size is None else ("variance_size",)
        return f"Spec({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def sum_dtype(x: torch.dtype, residual: torch.dtype | None) -> torch.dtype:
    """The dtype of what is normalized: the dtype to which PyTorch promotes x + residual, or x's without a residual.

    Args:
        x: The dtype of x.
        residual: The dtype of the residual; None without one.

    Example:
        >>> from rmsnorm.spec import sum_dtype
        >>> sum_dtype(torch.bfloat16, torch.float16)
        torch.float32
    """
    return x if residual is None else torch.promote_types(x, residual)


def result_dtype(x: torch.dtype, weight: torch.dtype | None, cast: str) -> torch.dtype:
    """The dtype of y.

    Args:
        x: The dtype of what is normalized, `sum_dtype`.
        weight: The dtype of the weight; None without one.
        cast: "early", "late" or "first".

    Returns:
        For "late" or without a weight x's, otherwise the dtype to which PyTorch promotes the product of weight and x.

    Example:
        >>> from rmsnorm.spec import result_dtype
        >>> result_dtype(torch.bfloat16, torch.float32, "early")
        torch.float32
        >>> result_dtype(torch.bfloat16, torch.float32, "late")
        torch.bfloat16
    """
    return x if weight is None or cast == "late" else torch.promote_types(x, weight)


def gated_dtype(x: torch.dtype, weight: torch.dtype | None, spec: Spec) -> torch.dtype:
    """The dtype of y of a gated norm: that of x, or if the weight is the last factor, that of `result_dtype`.

    Args:
        x: The dtype of x.
        weight: The dtype of the weight; None without one.
        spec: With a gate.

    Example:
        >>> from rmsnorm.spec import Gate, Spec, gated_dtype
        >>> gated_dtype(torch.bfloat16, torch.float32, Spec(gate=Gate()))
        torch.bfloat16
        >>> gated_dtype(torch.bfloat16, torch.float32, Spec(gate=Gate(first=True)))
        torch.float32
    """
    return result_dtype(x, weight, spec.cast) if spec.gate is not None and spec.gate.first else x


def spec_of(where: str, eps: float, cast: Cast, offset: float, variance_size: int | None = None) -> Spec:
    """The `Spec` with eps and offset as floats, from a cache.

    Raises:
        TypeError: As `check_spec` and `check_variance_size`.
        ValueError: As `check_spec` and `check_variance_size`.
    """
    check_spec(where, eps, cast, offset)
    check_variance_size(where, variance_size)
    return _spec(eps, cast, offset, variance_size)


@functools.lru_cache(256)
def _spec(eps: float, cast: Cast, offset: float, variance_size: int | None) -> Spec:
    return Spec(float(eps), cast, float(offset), variance_size=None if variance_size is None else int(variance_size))


def check_variance_size(
    where: str, variance_size: object, x: torch.Tensor | None = None, symbolic: bool = False
) -> None:
    """Check a number of columns over which the statistic is taken, or None for all.

    Args:
        where: The function that was called, for the message.
        variance_size: At least 1, and at most the last dimension of x.
        x: (..., N); None if it is not known yet.
        symbolic: Whether N may be unknown until a compiled program runs, which then checks it.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is less than 1 or greater than N.
    """
    if variance_size is None:
        return
    V = check_int(where, "variance_size", variance_size, 1)
    if x is not None and not _is_at_most(V, x.shape[-1], symbolic):
        raise ValueError(
            complaint(where, "variance_size", f"is {V}", f"at most {x.shape[-1]}, the last dimension of x")
        )


def check_gate(where: str, eps: float, cast: str, activation: str, gate_first: bool, groups: int) -> None:
    """Check what the `Spec` of a gated norm holds.

    Raises:
        TypeError: As `check_spec`, and if gate_first is not a bool or groups is not an int.
        ValueError: As `check_spec`, and if the activation is not known or groups is less than 1.
    """
    check_spec(where, eps, cast, 0.0)
    _check_gated_cast(where, cast)
    if activation not in ("silu", "sigmoid"):
        raise ValueError(complaint(where, "activation", f"is {activation!r}", "'silu' or 'sigmoid'"))
    check_bool(where, "gate_first", gate_first)
    check_groups(where, groups)


def _check_gated_cast(where: str, cast: str) -> None:
    if cast == "first":
        raise ValueError(complaint(where, "cast", "is 'first' with a gate", "'early' or 'late'"))


def gated_spec(where: str, eps: float, cast: Cast, activation: Activation, gate_first: bool, groups: int) -> Spec:
    """The `Spec` of a gated norm, from a cache.

    Raises:
        TypeError: As `check_gate`.
        ValueError: As `check_gate`.
    """
    check_gate(where, eps, cast, activation, gate_first, groups)
    return _gated_spec(eps, cast, activation, gate_first, groups)


@functools.lru_cache(256)
def _gated_spec(eps: float, cast: Cast, activation: Activation, gate_first: bool, groups: int) -> Spec:
    return Spec(float(eps), cast, gate=Gate(activation, gate_first), groups=int(groups))


def check_groups(where: str, groups: object) -> int:
    """Check a number of groups and return it as an int.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is less than 1.
    """
    return check_int(where, "groups", groups, 1)


def may_be_eps(value: float) -> bool:
    """Whether a number is at least 0 and at most the largest that fp32 can hold."""
    # The limit is no global, because torch.compile would read it as `constant_offset` describes.
    return 0.0 <= value <= 3.4028234663852886e38


def constant_offset(offset: float) -> float:
    """The offset as a constant of the graph, for code that torch.compile traces.

    With dynamic=True, torch.compile takes a float from a default, a global or a closure as an input of the graph, and
    fails if code under two activation checkpoints reads it. A look-up makes it guard on the value instead.
    """
    return {0.0: 0.0, 1.0: 1.0}.get(offset, offset) if type(offset) is float else offset


def check_spec(where: str, eps: float, cast: str, offset: float) -> None:
    """Check what a `Spec` holds.

    Args:
        where: The function that was called, for the message.
        eps: As in `Spec`.
        cast: As in `Spec`.
        offset: As in `Spec`.

    Raises:
        TypeError: If eps or the offset is not a number.
        ValueError: If one has a value that is not allowed, or the offset is 1 without "late".
    """
    if type(eps) is float and may_be_eps(eps) and offset == 0.0 and cast in CASTS:
        return  # nearly every call
    for name, value in (("eps", eps), ("offset", offset)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            torchs = "; F.rms_norm's None is torch.finfo(torch.float32).eps" if name == "eps" and value is None else ""
            raise TypeError(complaint(where, name, f"is {type_name(value)}", f"a number{torchs}"))
    if not may_be_eps(eps):
        raise ValueError(complaint(where, "eps", f"is {eps}", "a number of at least 0 that fp32 can hold"))
    if cast not in CASTS:
        raise ValueError(complaint(where, "cast", f"is {cast!r}", "'early', 'late' or 'first'"))
    if offset not in (0.0, 1.0):
        raise ValueError(complaint(where, "offset", f"is {offset}", "0 or 1"))
    if offset != 0.0 and cast != "late":
        raise ValueError(complaint(where, "offset", f"is 1 with cast={cast!r}", "cast='late' when there is an offset"))


def check_bool(where: str, name: str, value: object) -> None:
    """Check an argument that is True or False.

    Args:
        where: The function that was called, for the message.
        name: The argument.
        value: What was given.

    Raises:
        TypeError: If it is not a bool.
    """
    if not isinstance(value, bool):
        raise TypeError(complaint(where, name, f"is {_shown(value)}", "True or False"))


def check_int(where: str, name: str, value: object, least: int, more: str = "") -> int:
    """Check an argument that is an integer, such as an int or an integer of NumPy.

    Args:
        where: The function that was called, for the message.
        name: The argument.
        value: What was given.
        least: The smallest value that is allowed.
        more: What the message of the TypeError says after "an int".

    Returns:
        The value as an int.

    Raises:
        TypeError: If it is not an integer, or if it is a bool.
        ValueError: If it is smaller than `least`.
    """
    n = as_int(value)
    if n is None:
        raise TypeError(complaint(where, name, f"is {_shown(value)}", f"an int{more}"))
    if n < least:
        raise ValueError(complaint(where, name, f"is {n}", f"at least {least}"))
    return n


def as_int(value: object) -> int | None:
    """The value of an int or of an integer of NumPy; None for a bool and anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _shown(value: object) -> str:
    """The repr of a short value; the type of anything else."""
    return repr(value) if isinstance(value, (str, int, float)) or value is None else type_name(value)


def check_order(where: str, weight: object, more: tuple[object, ...] = (), normalized_shape: object = None) -> None:
    """Check that a function was not called with the arguments of F.rms_norm, or with cast or offset by position.

    Args:
        where: The function that was called, for the message.
        weight: What was given as the weight.
        more: What was given by position after eps.
        normalized_shape: What was given by this name, which F.rms_norm has for its second argument.

    Raises:
        TypeError: If a `normalized_shape` was given, by name or as the weight, or there are arguments after eps.
    """
    fix = f'{where}(x, weight, eps=eps, cast="late")'
    shape = weight if normalized_shape is None else normalized_shape
    if isinstance(shape, (tuple, list)) and len(shape) > 1:
        fix += f", with the last {len(shape)} dimensions of x and weight flattened, or use rmsnorm.TorchRMSNorm"
    if normalized_shape is not None:
        expected = f"no such argument: it belongs to F.rms_norm; write {fix}"
        raise TypeError(complaint(where, "normalized_shape", f"is {normalized_shape!r}", expected))
    if is_torchs_shape(weight):
        expected = f"a torch.Tensor: this is the argument order of F.rms_norm; write {fix}"
        raise TypeError(complaint(where, "weight", f"is {type_name(weight)}", expected))
    if more:
        expected = "cast and offset by name: cast='late'"
        raise TypeError(complaint(where, "the argument after eps", f"is {_shown(more[0])}", expected))


def is_torchs_shape(value: object) -> bool:
    """Whether this is an int or a sequence of ints, which only torch's own functions take: their normalized_shape."""
    if isinstance(value, (tuple, list)):
        return all(isinstance(n, int) for n in value)
    return isinstance(value, int) and not isinstance(value, bool)


def caller(residual: torch.Tensor | None) -> str:
    """The name of the public function that is called with this residual, or with this gradient of the sum."""
    return "rms_norm" if residual is None else "add_rms_norm"


def check_tensors(
    where: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    offset: float,
    symbolic: bool = False,
) -> None:
    """Check the tensors of a forward pass. All must be dense, have a dtype in `DTYPES`, and be on one device.

    Args:
        where: The function that was called, for the message.
        x: (..., N) with N of at least 1.
        residual: None, or of the shape of x.
        weight: None, (N,), or (H, N) for x of shape (..., H, N). An offset requires one.
        offset: 0 or 1.
        symbolic: Whether a size may be unknown until a compiled program runs, which then checks it.

    Raises:
        TypeError: If one is not a dense tensor of these dtypes.
        ValueError: If a shape or device does not fit, or there is an offset without a weight.
    """
    _check_rows(where, "x", x, symbolic)
    if residual is not None:
        _check_like(where, "residual", residual, "x", x, symbolic)
    _check_weight(where, weight, x, symbolic, by_head=True)
    if weight is None and offset != 0.0:
        raise ValueError(complaint(where, "weight", "is None with an offset", "a weight that the offset is added to"))


def check_pair(
    where: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    x2: torch.Tensor,
    weight2: torch.Tensor | None,
    offset: float,
    symbolic: bool = False,
) -> None:
    """Check the tensors of two forward passes, as `check_tensors` does each. Both must be on one device.

    Args:
        where: The function that was called, for the message.
        x: (..., N) of the first norm.
        weight: None, or (N,), of the first norm.
        x2: (..., N) of the second norm; shape and dtype may be others.
        weight2: None, or (N,), of the second norm.
        offset: 0 or 1.
        symbolic: Whether a size may be unknown until a compiled program runs, which then checks it.

    Raises:
        TypeError: As `check_tensors`.
        ValueError: As `check_tensors`, and if the norms are on different devices.
    """
    check_tensors(where, x, None, weight, offset, symbolic)
    try:
        check_tensors(where, x2, None, weight2, offset, symbolic)
        _check_device(where, "x", x2, x, "the x before it")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} (in the second norm of a pair)") from None


def check_sandwich(
    where: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor,
    weight2: torch.Tensor | None,
    offset: float,
    symbolic: bool = False,
) -> None:
    """Check the tensors of a norm whose output is added to a residual that another norm reads, as `check_tensors` does.

    Args:
        where: The function that was called, for the message.
        x: (..., N).
        weight: None, or (N,), of the norm of x.
        residual: (..., N), of the shape of x.
        weight2: None, or (N,), of the norm of the sum.
        offset: 0 or 1.
        symbolic: Whether a size may be unknown until a compiled program runs, which then checks it.

    Raises:
        TypeError: As `check_tensors`.
        ValueError: As `check_tensors`.
    """
    check_tensors(where, x, residual, weight, offset, symbolic)
    try:
        check_tensors(where, x, None, weight2, offset, symbolic)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} (in the second norm)") from None


def check_gated(
    where: str, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None, groups: int, symbolic: bool = False
) -> None:
    """Check the tensors of a gated forward pass, as `check_tensors` does.

    Args:
        where: The function that was called, for the message.
        x: (..., N) with N of at least 1.
        gate: Of the shape of x and on its device; the dtype may be another.
        weight: None, or (N,).
        groups: The number of groups of a row, which must divide N.
        symbolic: Whether a size may be unknown until a compiled program runs, which then checks it.

    Raises:
        TypeError: If one is not a dense tensor of these dtypes.
        ValueError: If a shape or device does not fit, or the groups do not divide N.
    """
    _check_rows(where, "x", x, symbolic)
    _check_like(where, "gate", gate, "x", x, symbolic)
    _check_weight(where, weight, x, symbolic)
    if not _divides(groups, x.shape[-1], symbolic):
        expected = f"a number that divides {x.shape[-1]}, the last dimension of x"
        raise ValueError(complaint(where, "groups", f"is {groups}", expected))


def check_gated_gradients(
    where: str,
    dy: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    groups: int,
    need_dw: bool,
    symbolic: bool = False,
) -> None:
    """Check the tensors of a gated backward pass, as `check_gradients` does.

    Args:
        where: The function that was called, for the message.
        dy: (..., N), the gradient of y.
        x: As in `check_gated`, like the arguments that follow.
        gate: Of the shape of x.
        weight: None, or (N,).
        rstd: (..., groups) float32.
        groups: The number of groups of a row.
        need_dw: Whether the gradient of the weight is asked for.
        symbolic: Whether a size may be unknown until a compiled program runs, which then checks it.

    Raises:
        TypeError: If one is not a dense tensor of the right dtype.
        ValueError: If a shape or device does not fit, or there is no weight for its gradient.
    """
    try:
        check_gated(where, x, gate, weight, groups, symbolic)
        _check_like(where, "dy", dy, "x", x, symbolic)
        if weight is None and need_dw:
            raise ValueError(complaint(where, "weight", "is None", "a weight, for its gradient"))
        _check_of_rows(where, "rstd", rstd, torch.float32, (*x.shape[:-1], groups), x, symbolic)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} {_IN_BACKWARD}") from None


def check_part(
    where: str,
    rows: Mapping[str, torch.Tensor | None],
    weight: torch.Tensor | None,
    of_rows: Mapping[str, torch.Tensor],
    N: int = 1,
    *,
    backward: bool = False,
    symbolic: bool = False,
) -> None:
    """Check the tensors of a call that begins or finishes a part of rows, as `check_tensors` does.

    Args:
        where: The function that was called, for the message.
        rows: By name, x and what must have its shape (..., n) and its device, or is None; n may be 0.
        weight: None, (n,), or (H, n) if each of H heads has its own.
        of_rows: By name, tensors of one number a row: rstd in float32, the sums S in float64.
        N: The width of whole rows.
        backward: Whether this is the backward pass; the message then says so.
        symbolic: Whether a size may be unknown until a compiled program runs, which then checks it.

    Raises:
        TypeError: If one is not a dense tensor of the right dtype.
        ValueError: If a shape or device does not fit, or N is less than 1.
    """
    try:
        x = rows["x"]
        assert x is not None
        _check_dtype(where, "x", x)
        if not x.shape:
            raise ValueError(complaint(where, "x", "has shape ()", "(..., n)"))
        for name, t in rows.items():
            if t is not None:
                _check_like(where, name, t, "x", x, symbolic)
        _check_weight(where, weight, x, symbolic, by_head=True)
        for name, t in of_rows.items():
            dtype = torch.float32 if name == "rstd" else torch.float64
            _check_of_rows(where, name, t, dtype, tuple(x.shape[:-1]), x, symbolic)
        if not (_is_not_zero(N, symbolic) if symbolic else N >= 1):
            raise ValueError(complaint(where, "N", f"is {N}", "the width of whole rows, at least 1"))
    except (TypeError, ValueError) as error:
        if not backward:
            raise
        raise type(error)(f"{error} {_IN_BACKWARD}") from None


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
    """Check the tensors of a backward pass, as `check_tensors` does those of the forward pass.

    Autograd gives dy the shape of y, so a tensor that does not fit it has changed since the forward pass.

    Args:
        where: The function that was called, for the message.
        dy: (..., N), the gradient of y.
        ds: None, or of the shape of dy: the gradient of x + residual.
        x: What was normalized, of the shape of dy.
        weight: None, or (N,).
        rstd: (...,) float32, one number a row of x.
        offset: 0 or 1.
        need_dw: Whether the gradient of the weight is asked for.
        symbolic: Whether a size may be unknown until a compiled program runs, which then checks it.

    Raises:
        TypeError: If one is not a dense tensor of the right dtype.
        ValueError: If a shape or device does not fit, or there is no weight for an offset or for a gradient.
    """
    try:
        _check_rows(where, "dy", dy, symbolic)
        _check_like(where, "x", x, "dy", dy, symbolic)
        if ds is not None:
            _check_like(where, "ds", ds, "dy", dy, symbolic)
        _check_weight(where, weight, x, symbolic, by_head=True)
        if weight is None and (need_dw or offset != 0.0):
            raise ValueError(complaint(where, "weight", "is None", "a weight, for its gradient or for an offset"))
        _check_of_rows(where, "rstd", rstd, torch.float32, tuple(x.shape[:-1]), x, symbolic)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} {_IN_BACKWARD}") from None


def check_pair_gradients(
    where: str,
    first: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor],
    offset: float,
    need_dw: bool,
    symbolic: bool = False,
) -> None:
    """Check the tensors of two backward passes, as `check_gradients` does each. Both must be on one device.

    Args:
        where: The function that was called, for the message.
        first: dy, x, weight and rstd of the first norm, as in `check_gradients`.
        second: Those of the second norm; shapes and dtypes may be others.
        offset: 0 or 1.
        need_dw: Whether the gradients of the weights are asked for.
        symbolic: Whether a size may be unknown until a compiled program runs, which then checks it.

    Raises:
        TypeError: As `check_gradients`.
        ValueError: As `check_gradients`, and if the norms are on different devices.
    """
    for dy, x, weight, rstd in (first, second):
        check_gradients(where, dy, None, x, weight, rstd, offset, need_dw, symbolic)
    check_pair(where, *first[1:3], *second[1:3], offset, symbolic)


def check_summed(
    where: str,
    dy: Sequence[torch.Tensor],
    ds: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    need_dw: bool,
    symbolic: bool = False,
) -> None:
    """Check the tensors of a backward pass for which dy is a sum, as `check_gradients` does.

    Args:
        where: The function that was called, for the message.
        dy: 1 to `MOST_SUMMANDS` tensors of one shape and dtype, whose sum is the gradient of y.
        ds: None, or of the shape and dtype of x.
        x: As in `check_gradients`, like the arguments that follow.
        weight: (N,) or None.
        rstd: (...,) float32.
        offset: 0 or 1.
        need_dw: Whether the gradient of the weight is asked for.
        symbolic: Whether a size may be unknown until a compiled program runs, which then checks it.

    Raises:
        TypeError: If an argument is not a dense tensor of the right dtype.
        ValueError: If the number of tensors, a shape or a device does not fit, or a weight is missing.
    """
    if not 1 <= len(dy) <= MOST_SUMMANDS:
        raise ValueError(complaint(where, "dy", f"is a list of {len(dy)} tensors", f"1 to {MOST_SUMMANDS}"))
    check_gradients(where, dy[0], ds, x, weight, rstd, offset, need_dw, symbolic)
    for name, t in summands_by_name(dy).items():
        _check_like(where, name, t, "dy[0]", dy[0], symbolic)
        if t.dtype is not dy[0].dtype:
            raise TypeError(complaint(where, name, f"has dtype {t.dtype}", f"{dy[0].dtype}, the dtype of dy[0]"))
    if ds is not None and ds.dtype is not x.dtype:
        raise TypeError(complaint(where, "ds", f"has dtype {ds.dtype}", f"{x.dtype}, the dtype of x"))


def summands_by_name(dy: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose sum is dy, by the names that error messages use."""
    return {f"dy[{i}]": t for i, t in enumerate(dy)}


class Saved(NamedTuple):
    """What a tensor was when the forward pass saved it, which `t.data = ...` can change without autograd's knowledge.

    Attributes:
        dtype: Of the tensor.
        shape: Of the tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, t: torch.Tensor | None) -> "Saved | None":
        """What a tensor is now; None if there is none."""
        return None if t is None else cls(t.dtype, t.shape)


def check_saved(where: str, **saved: tuple[torch.Tensor | None, Saved | None]) -> None:
    """Check in the backward pass that each tensor has the dtype and the shape with which it was saved.

    Args:
        where: The function that was called, for the message.
        **saved: Each tensor, or None, and what it was, by the argument's name.

    Raises:
        TypeError: If one has another dtype; the message names it.
        ValueError: If one has another shape; the message names it.
    """
    for name, (t, was) in saved.items():
        if t is None or was is None:
            continue
        if t.dtype is not was.dtype:
            words = complaint(where, name, f"has dtype {t.dtype}", str(was.dtype).removeprefix("torch."))
            raise TypeError(f"{words} {_IN_BACKWARD}")
        if not t.is_nested and t.shape != was.shape:  # a later check refuses nested tensors
            words = complaint(where, name, f"has shape {tuple(t.shape)}", f"{tuple(was.shape)}")
            raise ValueError(f"{words} {_IN_BACKWARD}")


_IN_BACKWARD = "(in the backward pass: what was saved for it must be as it was in the forward pass)"


def check_memory(where: str, backward: bool = False, **tensors: torch.Tensor | None) -> None:
    """Check that each tensor's storage is large enough for its shape.

    Libraries that shard parameters free a storage, or make it smaller, and keep the tensor with its shape.

    Args:
        where: The function that was called, for the message.
        backward: Whether this is the backward pass; the message then says so.
        **tensors: The tensors by their argument's name. None is passed over.

    Raises:
        ValueError: If a storage is too small.
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


def _check_dtype(where: str, name: str, t: torch.Tensor) -> None:
    if not (_is_dense(t) and t.dtype in DTYPES):
        _refuse(where, name, t)


def lacks_float64(device: torch.device) -> bool:
    """Whether a device does not support float64, in which squares are summed: Apple's GPUs and some of Intel's."""
    if device.type == "mps":
        return True
    if device.type != "xpu" or torch.compiler.is_compiling():  # torch.compile cannot trace the query below
        return False
    try:
        return not torch.xpu.get_device_properties(device).has_fp64
    except (AssertionError, RuntimeError):  # torch was built without XPU, so the tensor is a fake one
        return False


def _check_rows(where: str, name: str, x: torch.Tensor, symbolic: bool) -> None:
    _check_dtype(where, name, x)
    if lacks_float64(x.device):
        expected = "a device that supports float64, in which the squares are summed, such as the CPU"
        raise ValueError(complaint(where, name, f"is on {x.device}", expected))
    shape = x.shape
    if not shape or not _is_not_zero(shape[-1], symbolic):
        raise ValueError(complaint(where, name, f"has shape {tuple(shape)}", "(..., N) with N of at least 1"))


def _check_like(where: str, name: str, t: torch.Tensor, of: str, x: torch.Tensor, symbolic: bool) -> None:
    _check_dtype(where, name, t)
    if not _same_sizes(t.shape, x.shape, symbolic):
        raise ValueError(complaint(where, name, f"has shape {tuple(t.shape)}", f"{tuple(x.shape)}, the shape of {of}"))
    _check_device(where, name, t, x, of)


def _check_weight(
    where: str, weight: torch.Tensor | None, x: torch.Tensor, symbolic: bool, by_head: bool = False
) -> None:
    """Check a weight of shape (N,), or if `by_head` also of shape (H, N), for x of shape (..., H, N)."""
    if weight is None:
        return
    _check_dtype(where, "weight", weight)
    dims = 2 if by_head and weight.dim() == 2 else 1
    if not _same_sizes(weight.shape, x.shape[-dims:], symbolic):
        was = f"has shape {tuple(weight.shape)}"
        raise ValueError(complaint(where, "weight", was, _expected_weight(weight.shape, x.shape, by_head)))
    _check_device(where, "weight", weight, x)


def _expected_weight(shape: Sequence[int], of_x: Sequence[int], by_head: bool) -> str:
    """What a weight of this shape should have been for x of shape `of_x`, for a message."""
    N, dims = of_x[-1], len(shape)
    expected = f"({N},), the last dimension of x"
    if not by_head or dims < 2:
        return expected
    if dims == 2:
        heads, width = shape
        if len(of_x) > 1:
            expected += f", or ({of_x[-2]}, {N}), the last two"
        if heads * width == N and heads > 1:
            expected += f"; if each head has its own weight, call with x.unflatten(-1, ({heads}, {width}))"
        elif len(of_x) > 2 and (of_x[-3], N) == (heads, width):
            expected += "; if each head has its own weight, call with x.transpose(-3, -2)"
        return expected
    if tuple(shape) == tuple(of_x[-dims:]):
        expected += (
            f"; to normalize over {dims} dimensions, flatten them in x and weight; if each row of these has its own "
            "weight, flatten all of them but the last"
        )
    return expected


def _check_of_rows(
    where: str, name: str, t: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], x: torch.Tensor, symbolic: bool
) -> None:
    if not _is_dense(t):
        _refuse(where, name, t)
    if t.dtype is not dtype:
        raise TypeError(complaint(where, name, f"has dtype {t.dtype}", str(dtype).removeprefix("torch.")))
    if not _same_sizes(t.shape, shape, symbolic):
        expected = f"{shape}, a number for each {'row of x' if len(shape) < x.dim() else 'group of each row of x'}"
        raise ValueError(complaint(where, name, f"has shape {tuple(t.shape)}", expected))
    _check_device(where, name, t, x)


def _check_device(where: str, name: str, t: torch.Tensor, x: torch.Tensor, of: str = "x") -> None:
    if t.device != x.device:
        raise ValueError(complaint(where, name, f"is on {t.device}", f"{x.device}, the device of {of}"))


def _same_sizes(a: Sequence[int], b: Sequence[int], symbolic: bool) -> bool:
    """Whether two shapes are the same. Sizes that are not known yet are checked when the compiled program runs."""
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


def _divides(groups: int, n: int, symbolic: bool) -> bool:
    if not symbolic:
        return n % groups == 0
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    if guard_or_false(n % groups != 0):
        return False
    torch._check(n % groups == 0)
    return True


def _is_at_most(size: int, n: int, symbolic: bool) -> bool:
    if not symbolic:
        return size <= n
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    if guard_or_false(size > n):
        return False
    torch._check(size <= n)
    return True


def _is_dense(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested


def _refuse(where: str, name: str, value: object) -> NoReturn:
    if not isinstance(value, torch.Tensor):
        raise TypeError(complaint(where, name, f"is {type_name(value)}", "a torch.Tensor"))
    if value.layout is not torch.strided:
        raise TypeError(complaint(where, name, f"has layout {value.layout}", "a dense tensor"))
    if value.is_nested:
        raise TypeError(complaint(where, name, "is a nested tensor", "a dense tensor"))
    raise TypeError(complaint(where, name, f"has dtype {value.dtype}", "float32, bfloat16, float16 or float64"))
