"""The layers `RMSNorm`, `GatedRMSNorm` and `DeepseekV2RMSNorm`: parameters, and a call of a function."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, NoReturn, ParamSpec

import torch
from torch import Tensor, nn

from rmsnorm.errors import complaint
from rmsnorm.functional import explain, gated_rms_norm, rms_norm
from rmsnorm.spec import (
    DTYPES,
    Activation,
    Cast,
    check_bool,
    check_int,
    check_spec,
    check_variance_size,
    gated_spec,
    is_torchs_shape,
)  # fmt: skip

P = ParamSpec("P")
_TORCHS = "rmsnorm.TorchRMSNorm takes the arguments of torch.nn.RMSNorm"


def _not_torchs(init: Callable[Concatenate[Any, P], None]) -> Callable[Concatenate[Any, P], None]:
    """Make a constructor refuse the arguments of torch.nn.RMSNorm with an error that names TorchRMSNorm."""

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


def _checked_size(where: str, hidden_size: object) -> int:
    return check_int(where, "hidden_size", hidden_size, 1, f"; {_TORCHS}" if is_torchs_shape(hidden_size) else "")


def _check_dtype(where: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        expected = "torch.float32, torch.bfloat16, torch.float16 or torch.float64"
        raise TypeError(complaint(where, "dtype", f"is {dtype!r}", expected))


def _refuse_script(layer: nn.Module) -> NoReturn:
    words = "torch.jit.script cannot compile this layer: use torch.export or torch.jit.trace"
    raise NotImplementedError(f"[{type(layer).__name__}] {words}")


class RMSNorm(nn.Module):
    """The layer of `rms_norm`: normalizes over the last dimension and multiplies by a weight.

    A new weight is one, or zero with an offset of 1, so that the layer at first multiplies by one. Its key in the
    state_dict is "weight". `rmsnorm.TorchRMSNorm` is the class with the arguments of `torch.nn.RMSNorm`.

    Args:
        hidden_size: The size N of the last dimension of x, at least 1.
        eps: Added to the mean of squares, 0 or more.
        cast: "early" converts to the dtype of x and then multiplies by the weight (Llama, DeepSeek, Qwen, Mistral);
            "late" multiplies in fp32 and converts once (GPT-OSS, Olmo 2, Gemma); "first" converts the statistic before
            x is multiplied by it (the norms of DeepSeek V4 without a weight).
        offset: 0, or 1 to multiply by 1 + weight (Gemma). 1 requires "late" and a weight.
        heads: None for a weight of shape (hidden_size,). A number H, at least 1, for a weight of shape
            (H, hidden_size): x is then (..., H, hidden_size), and each head is multiplied by its own row of the weight.
            Requires a weight.
        variance_size: None, or how many of the first columns the mean is taken over, from 1 to hidden_size, as in
            `rms_norm`.
        elementwise_affine: Whether there is a weight.
        device: The device of the weight.
        dtype: The dtype of the weight: float32, bfloat16, float16 or float64. None for torch's default.

    Raises:
        TypeError: If hidden_size, heads or variance_size is not an int, eps or offset is not a number,
            elementwise_affine is not a bool, dtype is none of the four, or the arguments are those of
            `torch.nn.RMSNorm`.
        ValueError: If hidden_size, eps, cast, offset, heads or variance_size has another value than these, the offset
            is 1 without "late", or an offset of 1 or a number of heads is given without a weight.

    Example:
        >>> layer = rmsnorm.RMSNorm(1280, dtype=torch.bfloat16)
        >>> layer(torch.randn(4, 128, 1280, dtype=torch.bfloat16)).dtype
        torch.bfloat16
        >>> rmsnorm.RMSNorm(3072, cast="late", offset=1.0)  # Gemma's
        RMSNorm(3072, eps=1e-06, cast='late', offset=1.0)
        >>> rmsnorm.RMSNorm(128, heads=32).weight.shape  # for x of shape (..., 32, 128)
        torch.Size([32, 128])
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
        heads: int | None = None,
        variance_size: int | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        hidden_size = _checked_size(where, hidden_size)
        heads = None if heads is None else check_int(where, "heads", heads, 1)
        check_bool(where, "elementwise_affine", elementwise_affine)
        _check_dtype(where, dtype)
        check_spec(where, eps, cast, offset)
        if offset != 0 and not elementwise_affine:
            raise ValueError(complaint(where, "elementwise_affine", "is False with an offset", "True"))
        check_variance_size(where, variance_size)
        if variance_size is not None and variance_size > hidden_size:
            expected = f"at most {hidden_size}, the hidden_size"
            raise ValueError(complaint(where, "variance_size", f"is {variance_size}", expected))
        if heads is not None and not elementwise_affine:
            raise ValueError(complaint(where, "elementwise_affine", "is False with a number of heads", "True"))
        self.hidden_size = hidden_size
        self.heads = heads
        self.variance_size = None if variance_size is None else int(variance_size)
        self.eps = float(eps)
        self.cast = cast
        self.offset = float(offset)
        shape = (hidden_size,) if heads is None else (heads, hidden_size)
        weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if elementwise_affine else None
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one, or with an offset of 1 to zero."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x.

        Args:
            x: (..., hidden_size), or (..., heads, hidden_size) if the layer has a number of heads; float32, bfloat16,
                float16 or float64.

        Returns:
            y of the shape of x. For "late" or without a weight it has the dtype of x, otherwise that to which PyTorch
            promotes the product of weight and x.

        Raises:
            TypeError: If x is not a dense tensor of these dtypes.
            ValueError: If its last dimension is not hidden_size, the one before it not the number of heads, or it is on
                another device than the weight.
        """
        return rms_norm(
            x, self.weight, self.eps, cast=self.cast, offset=self.offset, variance_size=self.variance_size
        )  # fmt: skip

    __prepare_scriptable__ = _refuse_script  # torch.jit.script calls it

    def _rmsnorm_explain(self, x: Any) -> str:
        """For `rmsnorm.explain`."""
        return explain(
            x, self.weight, eps=self.eps, cast=self.cast, offset=self.offset, variance_size=self.variance_size
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The arguments of the constructor, for `print(model)`."""
        parts = [f"{self.hidden_size}, eps={self.eps}, cast={self.cast!r}"]
        if self.offset != 0:
            parts.append(f"offset={self.offset}")
        if self.heads is not None:
            parts.append(f"heads={self.heads}")
        if self.variance_size is not None:
            parts.append(f"variance_size={self.variance_size}")
        if self.weight is None:
            parts.append("elementwise_affine=False")
        return ", ".join(parts)


class GatedRMSNorm(nn.Module):
    """The layer of `gated_rms_norm`: the gated norm of Qwen3-Next, Mamba 2, Kimi Linear and others.

    The weight starts at one. Its key in the state_dict is "weight".

    Args:
        hidden_size: The size N of the last dimension of x, at least 1.
        eps: Added to the mean of squares, 0 or more.
        cast: "early" or "late", as in `gated_rms_norm`, like the following.
        activation: "silu" or "sigmoid".
        gate_first: Whether x is multiplied by silu or the sigmoid of the gate before it is normalized, and not after.
        groups: How many parts of equal width a row has, each with its own statistic. It must divide hidden_size.
        elementwise_affine: Whether there is a weight.
        device: The device of the weight.
        dtype: The dtype of the weight: float32, bfloat16, float16 or float64. None for torch's default.

    Raises:
        TypeError: If an argument has a type that is not allowed; the message names it.
        ValueError: If an argument has a value that is not allowed; the message names it.

    Example:
        >>> layer = rmsnorm.GatedRMSNorm(128, dtype=torch.bfloat16)  # Qwen3-Next's
        >>> x, gate = torch.randn(2, 4, 128, dtype=torch.bfloat16)
        >>> layer(x, gate).shape
        torch.Size([4, 128])
        >>> rmsnorm.GatedRMSNorm(8192, gate_first=True, groups=8)  # Mamba 2's
        GatedRMSNorm(8192, eps=1e-06, cast='early', activation='silu', gate_first=True, groups=8)
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        cast: Cast = "early",
        activation: Activation = "silu",
        gate_first: bool = False,
        groups: int = 1,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        hidden_size = check_int(where, "hidden_size", hidden_size, 1)
        check_bool(where, "elementwise_affine", elementwise_affine)
        _check_dtype(where, dtype)
        self.spec = gated_spec(where, eps, cast, activation, gate_first, groups)
        if hidden_size % self.spec.groups:
            expected = f"a number that divides {hidden_size}, the hidden_size"
            raise ValueError(complaint(where, "groups", f"is {groups}", expected))
        self.hidden_size = hidden_size
        weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype)) if elementwise_affine else None
        self.register_parameter("weight", weight)

    @property
    def eps(self) -> float:
        """The number that is added to the mean of squares."""
        return self.spec.eps

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Normalize x and multiply it by silu or the sigmoid of the gate, in the order that `gate_first` says.

        Args:
            x: (..., hidden_size) float32, bfloat16, float16 or float64.
            gate: Of the shape of x, in any of these dtypes.

        Returns:
            y, as from `gated_rms_norm`.

        Raises:
            TypeError: If x or gate is not a dense tensor of these dtypes.
            ValueError: If a shape or a device does not fit.
        """
        spec = self.spec
        assert spec.gate is not None
        return gated_rms_norm(
            x, gate, self.weight, spec.eps, cast=spec.cast, activation=spec.gate.activation,
            gate_first=spec.gate.first, groups=spec.groups,
        )  # fmt: skip

    __prepare_scriptable__ = _refuse_script  # torch.jit.script calls it

    def _rmsnorm_explain(self, x: Any, gate: Any = None) -> str:
        """For `rmsnorm.explain`. Without a gate, it describes a call whose gate is like x."""
        spec = self.spec
        assert spec.gate is not None
        return explain(
            x, self.weight, eps=spec.eps, cast=spec.cast, gate=x if gate is None else gate,
            activation=spec.gate.activation, gate_first=spec.gate.first, groups=spec.groups,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The arguments of the constructor, for `print(model)`."""
        spec = self.spec
        assert spec.gate is not None
        parts = [f"{self.hidden_size}, eps={spec.eps}, cast={spec.cast!r}, activation={spec.gate.activation!r}"]
        parts.append(f"gate_first={spec.gate.first}, groups={spec.groups}")
        if self.weight is None:
            parts.append("elementwise_affine=False")
        return ", ".join(parts)


class DeepseekV2RMSNorm(nn.Module):
    """DeepSeek's published class with this package's kernels: the Definition, with *exact* statistics.

    Constructor, attributes (`weight`, `variance_epsilon`) and state_dict are those of the class of that name in
    transformers. The weight starts at one.

    Args:
        hidden_size: The size N of the last dimension of x, at least 1.
        eps: Added to the mean of squares, 0 or more.

    Raises:
        TypeError: If hidden_size is no int, or eps no number.
        ValueError: If hidden_size is less than 1, or eps less than 0 or too large for fp32.

    Example:
        >>> layer = rmsnorm.DeepseekV2RMSNorm(1536)
        >>> layer.weight.shape, layer.variance_epsilon
        (torch.Size([1536]), 1e-06)
        >>> layer(torch.randn(2, 1536, dtype=torch.bfloat16)).dtype  # promoted, as in the Definition
        torch.float32
    """

    weight: nn.Parameter

    @_not_torchs
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        where = type(self).__name__
        hidden_size = _checked_size(where, hidden_size)
        check_spec(where, eps, "early", 0.0)
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = float(eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize over the last dimension.

        Args:
            hidden_states: (..., hidden_size) float32, bfloat16, float16 or float64.

        Returns:
            The result of the same shape, in the dtype to which PyTorch promotes the product of weight and input.

        Raises:
            TypeError: If hidden_states is not a dense tensor of these dtypes.
            ValueError: If its last dimension is not hidden_size, or it is on another device than the weight.
        """
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    __prepare_scriptable__ = _refuse_script  # torch.jit.script calls it

    def _rmsnorm_explain(self, x: Any) -> str:
        """For `rmsnorm.explain`."""
        return explain(x, self.weight, eps=self.variance_epsilon)

    def extra_repr(self) -> str:
        """The shape of the weight and eps, as transformers prints them."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"
