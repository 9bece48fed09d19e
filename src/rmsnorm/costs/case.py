"""One call whose cost is asked for, and the check of its arguments."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from rmsnorm.costs.tape import F32, Array, given
from rmsnorm.errors import complaint
from rmsnorm.spec import KERNEL_DTYPES, as_int, check_bool, check_int, check_spec, result_dtype

Implementation = Literal["ours", "ours+residual", "eager", "F.rms_norm", "LayerNorm"]
Phase = Literal["inference", "forward", "backward"]

IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
RECOMPUTED: tuple[Implementation, ...] = ("ours", "ours+residual")  # whose outputs `recompute` can recompute
PHASES: tuple[Phase, ...] = get_args(Phase)
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Case:
    """One phase of one norm of M rows and N columns.

    Attributes:
        M: The number of rows.
        N: The number of columns.
        heads: How many weights of N columns there are; 1 unless each head has its own.
        x_dtype: The dtype of x.
        w_dtype: The dtype of the weight; None without one.
        implementation: One of `IMPLEMENTATIONS`.
        phase: One of `PHASES`.
        device: "cpu" or "cuda".
        cast: "early", "late" or "first".
        offset: What is added to the weight, 0 or 1.
        recompute: Whether the backward pass recomputes y, so that it is not kept.
        single_row: Whether x has the weight's shape, (N,), so that autograd has no rows to sum over.
        threads: The number of CPU threads that torch uses.
    """

    M: int
    N: int
    x_dtype: torch.dtype
    w_dtype: torch.dtype | None
    implementation: str
    phase: str
    device: str
    cast: str
    offset: float
    recompute: bool = False
    single_row: bool = False
    threads: int = 1
    heads: int = 1

    @property
    def W(self) -> int:
        """The number of elements of the weight, if there is one."""
        return self.heads * self.N

    @property
    def E(self) -> int:
        """The number of elements of x."""
        return self.M * self.N

    @property
    def cpu(self) -> bool:
        """Whether it runs on a CPU."""
        return self.device == "cpu"

    @property
    def training(self) -> bool:
        """Whether autograd records the forward pass."""
        return self.phase != "inference"

    @property
    def adds(self) -> bool:
        """Whether a residual is added to x first."""
        return self.implementation == "ours+residual"

    @property
    def y_dtype(self) -> torch.dtype:
        """The dtype of y; PyTorch's own norms return that of x."""
        if self.implementation in ("F.rms_norm", "LayerNorm"):
            return self.x_dtype
        return result_dtype(self.x_dtype, self.w_dtype, self.cast)

    @property
    def y_nbytes(self) -> int:
        """The bytes of y."""
        return self.E * self.y_dtype.itemsize

    def weight(self) -> Array | None:
        """The weight as it is stored; None without one."""
        return None if self.w_dtype is None else given(self.W, self.w_dtype)


def check_case(
    shape: Sequence[int],
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    *,
    implementation: str,
    phase: str,
    device: str,
    cast: str,
    offset: float,
    elementwise_affine: bool,
    master: bool,
    recompute: bool,
    threads: int | None,
    by_head: bool,
) -> Case:
    """The case that these arguments of `cost` describe.

    Raises:
        TypeError: If an argument has the wrong type or dtype; the message names it.
        ValueError: If an argument has a value that is not allowed; the message names it.
    """
    check_spec("cost", 0.0, cast, offset)
    sizes = tuple(n for n in map(as_int, shape) if n is not None) if isinstance(shape, Sequence) else None
    if sizes is None or len(sizes) != len(shape):
        raise TypeError(complaint("cost", "shape", f"is {shape!r}", "a sequence of integers"))
    check_bool("cost", "elementwise_affine", elementwise_affine)
    check_bool("cost", "master", master)
    check_bool("cost", "recompute", recompute)
    if not sizes or min(sizes) < 0 or sizes[-1] == 0:
        raise ValueError(complaint("cost", "shape", f"is {sizes}", "(..., N) with N of at least 1, nothing negative"))
    for name, value, allowed in (
        ("implementation", implementation, IMPLEMENTATIONS),
        ("phase", phase, PHASES),
        ("device", device, DEVICES),
    ):
        if value not in allowed:
            raise ValueError(complaint("cost", name, f"is {value!r}", " or ".join(map(repr, allowed))))
    if recompute and implementation not in RECOMPUTED:
        expected = f"False, or implementation {' or '.join(map(repr, RECOMPUTED))}"
        raise ValueError(complaint("cost", "recompute", f"is True with implementation {implementation!r}", expected))
    if implementation == "eager" and cast == "first":
        raise ValueError(complaint("cost", "cast", "is 'first' with implementation='eager'", "'early' or 'late'"))
    weight_dtype = dtype if weight_dtype is None else weight_dtype
    for name, given_dtype in (("dtype", dtype), ("weight_dtype", weight_dtype)):
        if given_dtype not in KERNEL_DTYPES:
            raise TypeError(complaint("cost", name, f"is {given_dtype}", "float32, bfloat16 or float16"))
    if not elementwise_affine and offset:
        raise ValueError(complaint("cost", "elementwise_affine", "is False with an offset", "True"))
    if implementation == "LayerNorm" and elementwise_affine:
        _check_layer_norm(dtype, weight_dtype, device)
    check_bool("cost", "by_head", by_head)
    if by_head:
        _check_by_head(sizes, implementation, elementwise_affine)
    threads = None if threads is None else check_int("cost", "threads", threads, 1)
    return Case(
        M=math.prod(sizes[:-1]),
        N=sizes[-1],
        x_dtype=dtype,
        w_dtype=weight_dtype if elementwise_affine else None,
        implementation=implementation,
        phase=phase,
        device=device,
        cast=cast,
        offset=offset,
        recompute=recompute,
        single_row=len(sizes) == 1,
        threads=threads or torch.get_num_threads(),
        heads=max(1, sizes[-2]) if by_head else 1,
    )


def _check_by_head(sizes: Sequence[int], implementation: str, elementwise_affine: bool) -> None:
    """Raise ValueError if a norm of this shape and implementation has no weight for each head."""
    if len(sizes) < 2:
        raise ValueError(complaint("cost", "shape", f"is {tuple(sizes)} with by_head", "(..., H, N)"))
    if implementation not in RECOMPUTED:
        expected = f"False, or implementation {' or '.join(map(repr, RECOMPUTED))}"
        raise ValueError(complaint("cost", "by_head", f"is True with implementation {implementation!r}", expected))
    if not elementwise_affine:
        raise ValueError(complaint("cost", "elementwise_affine", "is False with by_head", "True"))


def _check_layer_norm(dtype: torch.dtype, weight_dtype: torch.dtype, device: str) -> None:
    """Raise ValueError for a weight that torch.nn.LayerNorm refuses: on CUDA it needs x's dtype, else that or fp32."""
    if weight_dtype == dtype or (device == "cpu" and weight_dtype == F32):
        return
    allowed = "dtype" if device == "cuda" else "dtype or float32"
    was = f"is {weight_dtype} for {dtype} on {device}"
    raise ValueError(complaint("cost", "weight_dtype", was, f"{allowed}: LayerNorm refuses others"))
