"""The inputs of a case: random or constructed values, moved to the device and laid out in memory."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rmsnorm.tools.verify.cases import VerifyCase
from rmsnorm.tools.verify.layouts import LAYOUTS, ORTHOGONAL, ROUNDING_BOUNDARY, SPECIAL_VALUES


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call: (..., N) each, the weight (N,) or (heads, N). residual, w and ds may be absent.

    more_dy: further gradients of y, which are added to dy. gate: that of a gated norm.
    """

    x: Tensor
    residual: Tensor | None
    w: Tensor | None
    dy: Tensor
    ds: Tensor | None
    more_dy: tuple[Tensor, ...] = ()
    gate: Tensor | None = None

    @property
    def dys(self) -> list[Tensor]:
        """All gradients of y."""
        return [self.dy, *self.more_dy]

    def map(self, change: Callable[[Tensor, bool], Tensor]) -> "Inputs":
        """Return a copy in which `change(tensor, is_gradient)` replaced every tensor except the weight."""
        return Inputs(
            change(self.x, False),
            None if self.residual is None else change(self.residual, False),
            self.w,
            change(self.dy, True),
            None if self.ds is None else change(self.ds, True),
            tuple(change(t, True) for t in self.more_dy),
            None if self.gate is None else change(self.gate, False),
        )


def draw(case: VerifyCase, seed: int) -> Inputs:
    """Return the inputs of a case as contiguous (M, N) tensors on the CPU, so that they do not depend on the device.

    The rows are scaled by 2⁻⁶ to 2³, so that eps matters in some of them. dy is scaled alike, so that every row
    contributes to the error of dx.

    Args:
        case: The case.
        seed: The seed of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randint(-6, 4, (case.M, 1), generator=generator).float())

    def normal() -> Tensor:
        return torch.randn((case.M, case.N), generator=generator)

    x, dy = normal() * size, normal() * size
    shape = (case.N,) if case.heads == 1 else (case.heads, case.N)
    w = None if case.w is None else torch.randn(shape, generator=generator)
    if case.form == SPECIAL_VALUES:
        _spoil(x, torch.finfo(case.x).max)
    elif case.form == ROUNDING_BOUNDARY:
        x = _on_boundary(x.shape, generator)
    elif case.form == ORTHOGONAL and w is not None:
        _orthogonalize(x, w, dy, generator)
    residual = None if case.residual is None else (normal() * size).to(case.residual)
    return Inputs(
        x.to(case.x),
        residual,
        None if w is None else w.to(case.w),
        dy.to(case.y),
        normal().to(case.s) if residual is not None or case.summands else None,
        tuple((normal() * size).to(case.y) for _ in range(case.summands - 1)),
        None if case.gate is None else _gate(case, generator).to(case.gate),
    )


def _gate(case: VerifyCase, generator: torch.Generator) -> Tensor:
    """Return the gate. Its special values are those where the activation or its slope changes its form."""
    gate = 4 * torch.randn((case.M, case.N), generator=generator)
    if case.form == SPECIAL_VALUES:
        special = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 90.0, -90.0, 201.0, -201.0, 1e38, -1e38)
        gate[::2, : len(special)] = torch.tensor(special)
    return gate


def _spoil(x: Tensor, largest: float) -> None:
    """Put into rows of x, in place: a NaN, an infinity, zeros only, the largest numbers only; some stay as they are."""
    x[0::8, 5] = math.nan
    x[1::8, 7] = math.inf
    x[2::8, 11] = -math.inf
    x[3::8] = 0.0
    x[4::8] = x[4::8].sign() * largest


def _on_boundary(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return rows of 2048 numbers for which the order of the fp64 sum decides how S/N rounds to fp32.

    The squares of 1024 integers up to 255 add up to 2²⁴ … 2²⁵. fp32 numbers are 2 apart there, so an odd sum is exactly
    halfway between two of them. fp64 numbers are 2⁻²⁸ apart there: a square of 2⁻³² … 2⁻³⁶ is lost if it is added to
    the total, but 512 of them that are first added to each other are not.
    """
    x = torch.randint(-255, 256, shape, generator=generator).float()
    x[:, 1024:] = 0.0
    x[:, 1024:1536] = torch.exp2(-torch.randint(16, 19, (shape[0], 1), generator=generator).float())
    x[:, 0] = 1 + x[:, 1:1024].double().square().sum(-1) % 2
    return x[:, torch.randperm(shape[1], generator=generator)]


def _orthogonalize(x: Tensor, w: Tensor, dy: Tensor, generator: torch.Generator) -> None:
    """Change the tensors in place so that the terms of Σ dy·w·xh cancel in pairs of columns.

    The order of the sum alone then decides what remains. Some terms are 2⁻²⁴ times the others, too small for fp64's
    digits. Some columns have dy = 0, so that their dx is that remainder alone.
    """
    one, two = torch.randperm(x.shape[1], generator=generator).view(2, -1)
    for t in (x, w, dy):
        t[..., one[:128]] *= 2.0**-8
    dy[:, one[-16:]] = 0.0
    x[:, two], w[two], dy[:, two] = x[:, one], w[one], -dy[:, one]


def place(inputs: Inputs, case: VerifyCase, device: torch.device) -> Inputs:
    """Return the inputs on a device, in the layout of a case, and with a dimension for its heads.

    They are moved first and laid out then, because moving a strided tensor to a device makes it contiguous.

    Args:
        inputs: Contiguous tensors.
        case: The case; those with special values are contiguous.
        device: Where the tensors are to be.
    """
    values, gradients = LAYOUTS.get(case.form, LAYOUTS["contiguous"])

    def laid_out(t: Tensor, is_gradient: bool) -> Tensor:
        rows = (gradients if is_gradient else values)(t.to(device))
        return rows if case.heads == 1 else rows.unflatten(0, (-1, case.heads))

    return dataclasses.replace(inputs, w=None if inputs.w is None else inputs.w.to(device)).map(laid_out)
