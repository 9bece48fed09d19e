"""batch_invariant, a context in which F.rms_norm runs our kernels.

It is a TorchFunctionMode: torch calls it for every function of torch, before autograd, autocast, tensor subclasses and
torch.func see the call, so none of them is bypassed. Modes belong to a thread, nest with those of other libraries, and
are guarded by torch.compile, which keeps the graphs made inside and outside the context apart. An implementation that
is registered for `aten::rms_norm` has none of these properties.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rmsnorm import compat
from rmsnorm.patching.replacement import forward_by_rule, why_own_forward
from rmsnorm.patching.rule import Rule
from rmsnorm.patching.torch_norm import torch_rule

MOST_DIMS = 64  # torch allows no more dimensions
# An exported program calls the operators. All take (input, normalized_shape, weight=None, eps=None).
_RMS_NORMS = (F.rms_norm, torch.rms_norm, torch.ops.aten.rms_norm, torch.ops.aten.rms_norm.default)


def batch_invariant() -> AbstractContextManager[Any]:
    """Make a context in which `F.rms_norm`, and so `torch.nn.RMSNorm`, has the bits of `rms_norm`.

    Inside it, `F.rms_norm(x, shape, weight, eps)` and `torch.rms_norm` return what `rms_norm(x, weight, eps,
    cast="late")` returns. So each row of y depends on that row of x and the weight alone, and each row of the gradient
    of x also on that row's incoming gradient: they have the same bits for every batch size and thread count, on CPU and
    GPU. Arguments, result dtype and errors stay those of torch: eps=None is the machine epsilon of fp32, and several
    dimensions in `normalized_shape` are normalized as one. A second derivative raises RuntimeError. Nothing else
    changes: matrix multiplications and attention keep torch's bits, and so do norms that a model computes from other
    operators, which `patch` replaces.

    The context acts on the thread that enters it, and may be nested. A norm that was called inside keeps its gradient
    when the backward pass runs outside. Activation checkpointing calls the norm again in the backward pass, which must
    therefore run inside, too. torch.compile traces norms inside and outside the context into separate graphs, and does
    not use one in place of the other. In eager mode each call of a function of torch inside the context takes a few
    microseconds more.

    torch's own kernel runs, and a warning says why, for float64, for tensor subclasses that we do not know, and where
    a program is traced for use without this package (torch.jit.trace, ONNX). The context does not reach code that does
    not call torch from Python: TorchScript, C++ and AOTInductor.

    Returns:
        A context manager.

    Example:
        >>> norm, x = torch.nn.RMSNorm(4096), torch.randn(64, 4096)
        >>> with rmsnorm.batch_invariant():
        ...     y, first = norm(x), norm(x[:1])
        >>> torch.equal(y[:1], first)
        True
    """
    return _BatchInvariance()


class _BatchInvariance(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _RMS_NORMS:
            return _rms_norm(*args, **kwargs)
        if function not in _BACKWARDS or torch.compiler.is_compiling() or not {Tensor, nn.Parameter}.issuperset(types):
            return function(*args, **kwargs)
        with self:  # torch disables a mode while it handles a call, but checkpointing calls norms in the backward pass
            return _BACKWARDS[function](*args, **kwargs)


def _backward(
    t: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: Any = False, inputs: Any = None
) -> None:
    """As Tensor.backward."""
    run = compat.without_override_check(torch.autograd.backward)
    run(t, gradient, retain_graph, create_graph, inputs=inputs)


_BACKWARDS: dict[Any, Callable[..., Any]] = {
    Tensor.backward: _backward,
    torch.autograd.backward: compat.without_override_check(torch.autograd.backward),
    torch.autograd.grad: compat.without_override_check(torch.autograd.grad),
}


@dataclass(frozen=True)
class _Call:
    """The arguments of one call, with the names that a norm has for them."""

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    eps: float | None


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if not isinstance(normalized_shape, (tuple, list)) or not normalized_shape:
        return F.rms_norm(input, normalized_shape, weight, eps)  # raises
    input, weight = _as_autocast_does(input), _as_autocast_does(weight)
    call = _Call(tuple(normalized_shape), weight, eps)
    forward_of = _forward.__wrapped__ if torch.compiler.is_compiling() else _forward
    return forward_of(call.normalized_shape, weight is not None)(call, input)


def _as_autocast_does(t: Any) -> Any:
    """The tensor in fp32, if autocast would cast it for F.rms_norm: on GPUs, in versions of torch that do."""
    if not isinstance(t, Tensor) or not t.is_cuda or "cuda" in compat.RMS_NORM_UNCHANGED_BY_AUTOCAST:
        return t
    cast = torch.is_autocast_enabled("cuda") and t.dtype in (torch.bfloat16, torch.float16)
    return t.float() if cast else t


@functools.lru_cache(256)
def _forward(shape: tuple[int, ...], weighted: bool) -> Callable[[_Call, Tensor], Tensor]:
    return forward_by_rule(_rule(shape, weighted), _own_forward)


def _rule(shape: tuple[int, ...], weighted: bool) -> Rule:
    return replace(torch_rule(shape, weighted), ranks=frozenset(range(len(shape), MOST_DIMS + 1)))


def _own_forward(call: _Call, x: Tensor) -> Tensor:
    """torch's own forward, with a warning, after torch has raised for arguments that it does not take."""
    y = F.rms_norm(x, call.normalized_shape, call.weight, call.eps)
    if not torch.compiler.is_compiling():
        why = why_own_forward(call, x, _rule(call.normalized_shape, call.weight is not None))
        if torch.float64 in (x.dtype, None if call.weight is None else call.weight.dtype):
            why = "torch computes float64 in fp64, and our kernels compute in fp32"
        warnings.warn(f"[batch_invariant] torch's own F.rms_norm ran, because {why}", stacklevel=2)
    return y
