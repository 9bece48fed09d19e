"""The functions: `rms_norm`, `add_rms_norm`, `rms_norms`, `gated_rms_norm`, `explain` and `warmup`."""

import contextlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, Never, ParamSpec, TypeVar

import torch
from torch import Tensor

from rmsnorm.errors import complaint, one_line, type_name
from rmsnorm.gated_reference import grouped
from rmsnorm.kernels import dispatch
from rmsnorm.kernels.host import loader as host
from rmsnorm.kernels.plan import BeginForward, ByReference, FinishForward, Forward, GatedForward, Plan
from rmsnorm.ops import eager_recomputation
from rmsnorm.ops.autograd import needs_gradient, norm
from rmsnorm.ops.dispatch import any_dtensor, is_plain, load_sharding, refuse_dtensors
from rmsnorm.ops.gated import gated_norm
from rmsnorm.ops.pairs import norms
from rmsnorm.ops.slices import sliced_norm
from rmsnorm.spec import (
    DTYPES,
    Activation,
    Cast,
    Spec,
    check_gated,
    check_int,
    check_order,
    check_tensors,
    check_variance_size,
    gated_spec,
    spec_of,
    sum_dtype,
)  # fmt: skip

P = ParamSpec("P")
T = TypeVar("T")


def _as_documented(function: Callable[P, T]) -> Callable[P, T]:
    """Hide the parameters that exist only to raise a helpful error from the signature that help and editors show."""
    signature = inspect.signature(function)
    shown = [p for p in signature.parameters.values() if p.name not in ("more", "normalized_shape")]
    function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return function


@_as_documented
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *more: Never,
    cast: Cast = "early",
    offset: float = 0.0,
    variance_size: int | None = None,
    normalized_shape: None = None,
) -> Tensor:
    """Normalize the rows of x: x / sqrt(mean(x²) + eps) · weight over the last dimension.

    Each row of y has the bits of *exact* (see `Spec`), whatever the device, the batch and the strides. Differentiable
    once, in reverse and in forward mode; a second derivative raises RuntimeError.

    Args:
        x: Of shape (..., N), in float32, bfloat16, float16 or float64 (which is computed in float32). Any strides; as
            long as the last dimension is contiguous nothing is copied.
        weight: In any of these dtypes, or None. Of shape (N,), or (H, N) for x of shape (..., H, N): then each head is
            multiplied by its own row of the weight. Every row of N numbers is normalized on its own in both cases.
        eps: Added to the mean of the squares; 0 is legal.
        cast: "early" casts to the dtype of x before the multiplication by the weight, as Llama, DeepSeek V2 and V3,
            Qwen and Mistral do; "late" multiplies in float32 and casts once, as GPT-OSS, Olmo 2 and Gemma do; "first"
            casts the statistic before x is multiplied by it, as the norms of DeepSeek V4 without a weight do.
        offset: 0, or 1 to multiply by 1 + weight, added in float32 (Gemma); needs a weight and cast="late".
        variance_size: None, or a number V from 1 to N: then the mean is taken over the first V columns of a row, and
            all N columns are normalized by it (vLLM's `var_hidden_size`). Such norms have no rule for DTensors and no
            forward-mode derivative, and `recompute` does not recompute them.

    Returns:
        y, contiguous, of the shape of x. Its dtype is that of x for cast="late" or without a weight, and otherwise
        `torch.promote_types(weight.dtype, x.dtype)`.

    Raises:
        TypeError: If an argument is of a type or dtype that is not allowed; the message names it.
        ValueError: If shapes, devices, eps, cast, offset or variance_size are not allowed; the message names the
            argument.

    Example:
        >>> x, weight = torch.randn(2, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
        >>> rmsnorm.rms_norm(x, weight, eps=1e-6).shape
        torch.Size([2, 8])
        >>> queries, of_heads = torch.randn(2, 32, 128), torch.ones(32, 128)  # a weight for each of 32 heads
        >>> rmsnorm.rms_norm(queries, of_heads).shape
        torch.Size([2, 32, 128])
    """
    if not more and normalized_shape is variance_size is None and not torch.compiler.is_compiling():
        y = host.norm(x, None, weight, eps, cast, offset)
        if y is not None:
            if eager_recomputation.open_passes:
                eager_recomputation.note(y, x, weight, eps, cast, offset)
            return y  # type: ignore[no-any-return]
    if not more and normalized_shape is None and _stands_for_tensors(x, weight):
        handle = torch.overrides.handle_torch_function
        sliced: dict[str, Any] = {} if variance_size is None else {"variance_size": variance_size}
        return handle(rms_norm, (x, weight), x, weight, eps, cast=cast, offset=offset, **sliced)
    check_order("rms_norm", weight, more, normalized_shape)
    if variance_size is not None:
        return sliced_norm(x, None, weight, eps, cast, offset, variance_size)[0]
    return norm(x, None, weight, eps, cast, offset)[0]  # type: ignore[no-any-return]


@_as_documented
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *more: Never,
    cast: Cast = "early",
    offset: float = 0.0,
    variance_size: int | None = None,
    normalized_shape: None = None,
) -> tuple[Tensor, Tensor]:
    """Add the residual to x and normalize the sum, in one pass over memory.

    Args:
        x: As in `rms_norm`.
        residual: Of the shape of x; its dtype may be another.
        weight: As in `rms_norm`, like the following.
        eps: As in `rms_norm`.
        cast: As in `rms_norm`.
        offset: As in `rms_norm`.
        variance_size: As in `rms_norm`.

    Returns:
        (y, s): s = x + residual, rounded to `torch.promote_types(x.dtype, residual.dtype)`, and
        y = rms_norm(s, weight, eps, ...). In the backward pass the gradient that arrives through s is added in
        float32, before the only cast.

    Raises:
        TypeError: As in `rms_norm`.
        ValueError: As in `rms_norm`, and if x and residual differ in shape.

    Example:
        >>> y, s = rmsnorm.add_rms_norm(torch.ones(2, 8), torch.ones(2, 8))
        >>> s[0, 0]
        tensor(2.)
    """
    if residual is None:
        raise TypeError(complaint("add_rms_norm", "residual", f"is {type_name(residual)}", "a torch.Tensor"))
    if not more and normalized_shape is variance_size is None and not torch.compiler.is_compiling():
        outputs = host.norm(x, residual, weight, eps, cast, offset)
        if outputs is not None:
            if eager_recomputation.open_passes:
                eager_recomputation.note(outputs[0], outputs[1], weight, eps, cast, offset)
            return outputs  # type: ignore[no-any-return]
    if _stands_for_tensors(x, residual, weight):
        handle = torch.overrides.handle_torch_function
        sliced: dict[str, Any] = {} if variance_size is None else {"variance_size": variance_size}
        given = x, residual, weight
        return handle(add_rms_norm, given, *given, eps, cast=cast, offset=offset, **sliced)
    check_order("add_rms_norm", weight, more, normalized_shape)
    if variance_size is not None:
        return sliced_norm(x, residual, weight, eps, cast, offset, variance_size)
    y, s = norm(x, residual, weight, eps, cast, offset)[:2]
    return y, s


def rms_norms(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor | None] | None = None,
    eps: float = 1e-6,
    *,
    cast: Cast = "early",
    offset: float = 0.0,
) -> list[Tensor]:
    """Normalize several tensors, each as `rms_norm` does: queries and keys, or the compressed ones of latent attention.

    Use it for calls of few rows, such as decoding steps. There the call and the launch of the kernel take nearly all of
    the time, and two norms share both. Each output has the bits of `rms_norm`. Norms share nothing in eager calls that
    autograd records.

    Args:
        xs: The tensors, as in `rms_norm`; their shapes and dtypes may differ.
        weights: A weight or None for each tensor; None if no norm has a weight.
        eps: As in `rms_norm`, like the following, and the same for all norms.
        cast: As in `rms_norm`.
        offset: As in `rms_norm`.

    Returns:
        y of each norm.

    Raises:
        TypeError: As in `rms_norm`, and if xs or weights is not a list or tuple.
        ValueError: As in `rms_norm`, and if there is not one weight for each tensor.

    Example:
        >>> q, k = torch.randn(1, 32, 128), torch.randn(1, 8, 128)
        >>> [tuple(y.shape) for y in rmsnorm.rms_norms([q, k], [torch.ones(128), torch.ones(128)])]
        [(1, 32, 128), (1, 8, 128)]
    """
    given = (*_entries(xs), *_entries(weights))
    if _stands_for_tensors(*given):
        handle = torch.overrides.handle_torch_function
        return handle(rms_norms, given, xs, weights, eps, cast=cast, offset=offset)
    for name, sequence in (("xs", xs), ("weights", weights)):
        if not isinstance(sequence, (list, tuple)) and not (name == "weights" and sequence is None):
            raise TypeError(complaint("rms_norms", name, f"is {type_name(sequence)}", "a list or tuple of tensors"))
    if weights is not None and len(weights) != len(xs):
        raise ValueError(complaint("rms_norms", "weights", f"has {len(weights)} entries", f"{len(xs)}, one for each x"))
    return norms(xs, [None] * len(xs) if weights is None else weights, eps, cast, offset)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    cast: Cast = "early",
    activation: Activation = "silu",
    gate_first: bool = False,
    groups: int = 1,
) -> Tensor:
    """Normalize the rows of x and multiply by silu or the sigmoid of a gate, as Qwen3-Next and Kimi Linear do.

    This is `rms_norm(x)·weight·silu(gate)`, or with gate_first, as in Mamba 2, `rms_norm(x·silu(gate))·weight`. Each
    row of y has the bits that `rmsnorm.gated_reference` defines, whatever the device, the batch and the strides.
    Autograd keeps x, gate, the weight, and 4 bytes for each group of a row. Differentiable once, in reverse mode.

    Args:
        x: Of shape (..., N), in float32, bfloat16, float16 or float64 (which is computed in float32).
        gate: Of the shape of x, in any of these dtypes.
        weight: Of shape (N,), in any of these dtypes, or None.
        eps: Added to the mean of the squares; 0 is legal.
        cast: "early" casts to the dtype of x before the multiplication by the weight; "late" multiplies in float32.
        activation: "silu" or "sigmoid".
        gate_first: Whether x is multiplied by silu or the sigmoid of the gate before it is normalized, and not after.
        groups: How many parts of equal width a row has, each with its own statistic.

    Returns:
        y, contiguous, of the shape of x. Its dtype is that of x, except for gate_first with cast="early" and a weight:
        then it is `torch.promote_types(weight.dtype, x.dtype)`.

    Raises:
        TypeError: If an argument is of a type or dtype that is not allowed; the message names it.
        ValueError: If shapes, devices, eps, cast, activation or groups are not allowed; the message names the argument.
        NotImplementedError: If a tensor is a DTensor.

    Example:
        >>> x, gate = torch.randn(2, 2, 8, dtype=torch.bfloat16)
        >>> rmsnorm.gated_rms_norm(x, gate, torch.ones(8, dtype=torch.bfloat16), groups=2).shape
        torch.Size([2, 8])
    """
    if _stands_for_tensors(x, gate, weight):
        return torch.overrides.handle_torch_function(
            gated_rms_norm, (x, gate, weight), x, gate, weight, eps, cast=cast, activation=activation,
            gate_first=gate_first, groups=groups,
        )  # fmt: skip
    return gated_norm(x, gate, weight, eps, cast, activation, gate_first, groups)


def explain(
    x: Tensor,
    weight: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    cast: Cast = "early",
    offset: float = 0.0,
    variance_size: int | None = None,
    gate: Tensor | None = None,
    activation: Activation = "silu",
    gate_first: bool = False,
    groups: int = 1,
) -> str:
    """Say which kernel `rms_norm(x, weight)` would run, or `add_rms_norm` or `gated_rms_norm`, and why.

    Nothing is computed, but a kernel is compiled as the first call would compile it, to say whether that is possible.

    Args:
        x: As in `rms_norm`.
        weight: As in `rms_norm`; or a layer of this package, or a norm that `patch` has replaced: then the answer is
            about a call of that norm, and says whether our kernel or the norm's own forward would run on x.
        residual: As in `add_rms_norm`, or None.
        eps: As in `rms_norm`.
        cast: As in `rms_norm`.
        offset: As in `rms_norm`.
        variance_size: As in `rms_norm`.
        gate: As in `gated_rms_norm`, or None. For a layer with a gate, None stands for a gate like x.
        activation: As in `gated_rms_norm`, like the following.
        gate_first: As in `gated_rms_norm`.
        groups: As in `gated_rms_norm`.

    Returns:
        One line in words; docs/troubleshooting.md explains each that it can say.

    Raises:
        TypeError: As in `rms_norm` and `gated_rms_norm`, and if a layer without a gate is given one.
        ValueError: As in `rms_norm` and `gated_rms_norm`, and if a gate is given with a residual, an offset or a
            variance_size.
        NotImplementedError: If a gate or a variance_size is given with DTensors.

    Example:
        >>> rmsnorm.explain(torch.ones(2, 8, dtype=torch.float64), torch.ones(8))[:12]
        'cpu, float64'
    """
    own = getattr(weight, "_rmsnorm_explain", None)
    if own is not None:
        _check_gate_of_layer(gate, own)
        return own(x) if gate is None else own(x, gate)  # type: ignore[no-any-return]
    if isinstance(weight, torch.nn.Module):
        expected = "a torch.Tensor, a layer of rmsnorm or a norm that patch replaced: pass norm.weight"
        raise TypeError(complaint("explain", "weight", f"is {type_name(weight)} that was not patched", expected))
    check_order("explain", weight)
    of_gate = (activation, gate_first, groups) != ("silu", False, 1)
    _check_gate_of_call(gate, residual, offset, variance_size, of_gate)
    if gate is not None:
        return _explain_gated(x, gate, weight, eps, cast, activation, gate_first, groups)
    spec = spec_of("explain", eps, cast, offset, variance_size)
    check_tensors("explain", x, residual, weight, offset)
    check_variance_size("explain", variance_size, x)
    if variance_size is not None:
        refuse_dtensors("explain", "variance_size", x, residual, weight)
    plain = is_plain(x, residual, weight)
    given: list[Any] = [x, residual, weight]
    if not plain:
        by_columns = _part_of_columns(*given)
        if by_columns is not None:
            return _explain_parts(x, weight, residual, by_columns, spec)
    x_, residual_, weight_ = given if plain else map(_without_memory, given)
    kind = Forward.of(x_, residual_, weight_, spec, needs_gradient(x, residual, weight))._replace(device=x.device)
    plan = dispatch.plan_forward(kind)
    reason = plan.why if isinstance(plan, ByReference) else ""
    if isinstance(plan, Plan) and plain:
        host.look()
        by_cpp = variance_size is None
        reason = host.made_by(plan, x, residual, weight, eps, cast, offset) if by_cpp else _NOT_BY_CPP
    lines = _described(plan, reason, x=x, residual=residual, weight=weight)
    if isinstance(plan, Plan) and _differ_in_dtype(x, residual):
        lines.append(_SUM_BEFORE_THE_KERNEL)
    if not plain:
        lines.append(_THROUGH_THE_OPERATORS)
        if any_dtensor(*given):
            lines.append("each rank takes its own rows, without communication")
    return "; ".join(lines)


_SUM_BEFORE_THE_KERNEL = "the sum is taken before the kernel, because x and residual differ in dtype"
_THROUGH_THE_OPERATORS = "reached through torch.ops.rmsnorm, because not every argument is a plain tensor"


def _differ_in_dtype(x: Tensor, residual: Tensor | None) -> bool:
    return residual is not None and residual.dtype != x.dtype


def _explain_parts(x: Tensor, weight: Tensor | None, residual: Tensor | None, n: int, spec: Spec) -> str:
    """As `explain`, for DTensors that are sharded by columns, of which this rank has n."""

    def part(t: Tensor | None, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None) -> Any:
        return None if t is None else torch.empty(shape or (*t.shape[:-1], n), dtype=dtype or t.dtype, device="meta")

    rows = part(x, sum_dtype(x.dtype, None if residual is None else residual.dtype))
    S = torch.empty(x.shape[:-1], dtype=torch.float64, device="meta")
    with_rstd = needs_gradient(x, residual, weight)
    finish = FinishForward.of(rows, part(weight), S, x.shape[-1], spec, with_rstd)._replace(device=x.device)
    plans = (
        dispatch.plan_begin_forward(BeginForward.of(part(x), part(residual))._replace(device=x.device)),
        dispatch.plan_finish_forward(finish),
    )
    by_kernels = [plan for plan in plans if isinstance(plan, Plan)]
    plan = next((plan for plan in plans if isinstance(plan, ByReference)), plans[1])
    if isinstance(plan, ByReference):
        why = plan.why
    else:
        host.look()
        why = host.operator_made_by(*by_kernels)
    lines = _described(plan, why, x=x, residual=residual, weight=weight)
    lines.append("in two parts around an all-reduce, because the last dimension is sharded")
    if isinstance(plan, Plan) and _differ_in_dtype(x, residual):
        lines.append(_SUM_BEFORE_THE_KERNEL)
    return "; ".join([*lines, _THROUGH_THE_OPERATORS])


def _check_gate_of_layer(gate: Tensor | None, explain_layer: Callable[..., str]) -> None:
    if gate is not None and "gate" not in inspect.signature(explain_layer).parameters:
        raise TypeError(complaint("explain", "gate", "is given", "None: the layer has no gate"))


def _check_gate_of_call(
    gate: Tensor | None, residual: Tensor | None, offset: float, variance_size: int | None, of_gate: bool
) -> None:
    """of_gate: whether there are arguments of gated norms only."""
    if gate is None:
        if of_gate:
            raise ValueError(complaint("explain", "gate", "is None with arguments of gated_rms_norm", "the gate"))
    elif residual is not None:
        raise ValueError(complaint("explain", "residual", "is given with a gate", "None"))
    elif offset != 0:
        raise ValueError(complaint("explain", "offset", f"is {offset} with a gate", "0"))
    elif variance_size is not None:
        raise ValueError(complaint("explain", "variance_size", f"is {variance_size} with a gate", "None"))


def _explain_gated(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, cast: Cast, activation: Activation, gate_first: bool,
    groups: int,
) -> str:  # fmt: skip
    spec = gated_spec("explain", eps, cast, activation, gate_first, groups)
    check_gated("explain", x, gate, weight, groups)
    refuse_dtensors("explain", "gate", x, gate, weight)
    plain = is_plain(x, gate, weight)
    x_, gate_, weight_ = (x, gate, weight) if plain else map(_without_memory, (x, gate, weight))
    rows, gate_rows = grouped(x_, groups), grouped(gate_, groups)
    with_rstd = needs_gradient(x, gate, weight)
    kind = GatedForward.of(rows, gate_rows, weight_, spec, with_rstd)._replace(device=x.device)
    plan = dispatch.plan_gated_forward(kind)
    reason = plan.why if isinstance(plan, ByReference) else ""
    if isinstance(plan, Plan) and plain:
        host.look()
        reason = host.operator_made_by(plan)
    return "; ".join(_described(plan, reason, x=x, gate=gate, weight=weight))


def _described(plan: Plan | ByReference, reason: str, **tensors: Tensor | None) -> list[str]:
    """What runs and why, and which tensors are copied for it. The first tensor is x."""
    x = tensors["x"]
    assert x is not None
    said = f"{x.device.type}, {str(x.dtype).removeprefix('torch.')}: {dispatch.name_of(plan)}"
    lines = [f"{said} ({reason})" if reason else said]
    if isinstance(plan, Plan):
        lines += plan.remarks
        copied = [name for name, t in tensors.items() if t is not None and t.shape[-1] > 1 and t.stride(-1) != 1]
        if copied:
            lines.append(f"copied once, because the last dimension is not contiguous: {', '.join(copied)}")
    return lines


_NOT_BY_CPP = "called from Python: C++ does not take variance_size"


def _part_of_columns(x: Any, residual: Any, w: Any) -> int | None:
    """How many columns of each row this rank has; None if the tensors are plain or the rank has whole rows."""
    if not any_dtensor(x, residual, w):
        return None
    load_sharding()
    found: int | None = sys.modules["rmsnorm.ops.sharding"].part_of_columns(x, residual, w)
    return found


def warmup(
    device: torch.device | str = "cpu",
    dtypes: tuple[torch.dtype, ...] = DTYPES[:3],
    weight_dtypes: tuple[torch.dtype, ...] | None = None,
    hidden_size: int = 128,
) -> None:
    """Compile ahead of time what a first call would compile: kernels, forward and backward, and the C++.

    Args:
        device: "cpu", "cuda" or a `torch.device`.
        dtypes: The dtypes of x.
        weight_dtypes: Those to pair with every dtype of x; by default its own dtype and float32.
        hidden_size: N, the width of the rows. GPU kernels are compiled for a range of widths, CPU kernels for all.

    Raises:
        TypeError: If device is neither a str nor a `torch.device`, dtypes or weight_dtypes is not a sequence of
            float32, bfloat16, float16 and float64, or hidden_size is not an int.
        ValueError: If torch has no such device here, or hidden_size is less than 1.

    Example:
        >>> rmsnorm.warmup(dtypes=(torch.bfloat16,))
    """
    for name, given in (("dtypes", dtypes), ("weight_dtypes", weight_dtypes or ())):
        if not isinstance(given, (tuple, list)) or any(dtype not in DTYPES for dtype in given):
            expected = "a tuple of float32, bfloat16, float16 or float64"
            raise TypeError(complaint("warmup", name, f"is {given!r}", expected))
    hidden_size = check_int("warmup", "hidden_size", hidden_size, 1)
    _check_present("warmup", device)
    wait_for_host()
    for dtype in dtypes:
        for weight_dtype in dict.fromkeys(weight_dtypes or (dtype, torch.float32)):
            for cast in ("early", "late"):
                x = torch.ones(1, hidden_size, dtype=dtype, device=device, requires_grad=True)
                w = torch.ones(hidden_size, dtype=weight_dtype, device=device, requires_grad=True)
                rms_norm(x, w, cast=cast).sum().backward()


def _check_present(where: str, device: object) -> None:
    """Raise TypeError if it is not a device, and ValueError if torch cannot make a tensor on it here."""
    if not isinstance(device, (str, torch.device)):
        raise TypeError(complaint(where, "device", f"is {type_name(device)}", "a str or a torch.device"))
    try:
        torch.empty(0, device=device)
    except (AssertionError, ImportError, RuntimeError) as error:  # the first two if torch was built without it
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        count = torch.accelerator.device_count() if accelerator else 0
        found = ["'cpu'", *(f"'{accelerator}:{i}'" for i in range(count))]
        words = complaint(where, "device", f"is '{device}'", f"a device that torch finds here: {' or '.join(found)}")
        raise ValueError(f"{words} ({one_line(str(error).partition('. ')[0])})") from None


def wait_for_host(seconds: float | None = None) -> bool:
    """Wait until the C++ is compiled and loaded, if it can be: `explain` says what came of it.

    Args:
        seconds: The longest to wait; None for no limit. With 0, its compilation is begun in another process.

    Returns:
        Whether the wait is over: False if the C++ is still being compiled.
    """
    if seconds is not None:
        return host.wait(seconds)
    with contextlib.suppress(host.Unusable):
        host.load()
    return True


def _stands_for_tensors(*given: Any) -> bool:
    """Whether an argument is not a tensor but overrides torch's functions, as a Proxy of torch.fx does."""
    for t in given:
        if t is not None and not isinstance(t, Tensor):
            others = [t for t in given if not isinstance(t, Tensor)]
            return torch.overrides.has_torch_function(others)
    return False


def _entries(given: Any) -> tuple[Any, ...]:
    """The entries of a list or tuple of tensors; anything else is one entry."""
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


def _without_memory(t: Any) -> Any:
    """Of the same kind, for tensors of which not all have memory of their own."""
    return None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
