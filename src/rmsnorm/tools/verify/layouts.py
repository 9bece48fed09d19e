"""How the tensors of a case lie in memory, and the names of the kinds of values that a case can have."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Layout = Callable[[Tensor], Tensor]  # from a contiguous (M, N) tensor to a view with the same values


def _plain(t: Tensor) -> Tensor:
    return t


def _padded(t: Tensor) -> Tensor:
    return torch.nn.functional.pad(t, (0, 64), value=math.nan)[:, : t.shape[1]]


def _transposed(t: Tensor) -> Tensor:
    return t.view(2, -1, 8, t.shape[1]).transpose(1, 2)


def _columns(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


def _shifted(t: Tensor) -> Tensor:
    return torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view(t.shape)


def _one_row(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def _one_number(t: Tensor) -> Tensor:
    return t[:1, :1].expand(t.shape)


# For each name: the layout of x and residual, and that of dy and ds. M must be a multiple of 16. The memory around a
# view is filled with NaN, so that reading outside the view changes the result.
LAYOUTS: dict[str, tuple[Layout, Layout]] = {
    "contiguous": (_plain, _plain),
    "512 of 576 columns": (_padded, _padded),
    "4-D transposed": (_transposed, _transposed),
    "columns": (_columns, _columns),
    "one element off": (_shifted, _shifted),
    "dy one row expanded": (_plain, _one_row),
    "dy one number expanded": (_plain, _one_number),
}
# Contiguous, with values that are generated specially: see `inputs.draw`.
SPECIAL_VALUES, ROUNDING_BOUNDARY, ORTHOGONAL = "NaN, inf, zeros, largest", "S on a boundary", "dy orthogonal to y"
