"""Runs a case and compares what it returns with the exact arithmetic, with eager, and with fp64.

What runs is the public API with autograd. It is compared with *exact* (`reference.py`, on the same device, and on a GPU
also with the CPU's result), with the class run eagerly, and its gradients with those of the formula in fp64.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rmsnorm import bits, gated_reference, reference
from rmsnorm.functional import add_rms_norm, gated_rms_norm, rms_norm
from rmsnorm.kernels.host import loader as host
from rmsnorm.tools.verify.bounds import EAGER_ULP, FP32_ULP
from rmsnorm.tools.verify.cases import VerifyCase
from rmsnorm.tools.verify.inputs import Inputs, draw, place
from rmsnorm.tools.verify.layouts import ORTHOGONAL, ROUNDING_BOUNDARY, SPECIAL_VALUES
from rmsnorm.tools.verify.tally import GradientError, Tally


def differing(a: Tensor, b: Tensor) -> int:
    """Return how many elements differ in their bits, NaN counting as equal; all if the shapes or dtypes differ."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return max(a.numel(), b.numel(), 1)
    return bits.differing(a, b)[0]


def largest_ulp(a: Tensor, b: Tensor, dtype: torch.dtype) -> float:
    """Return the largest |a − b| in ulp of `dtype`, taken at the larger of the two numbers; inf if one is NaN."""
    a, b = a.double().flatten(), b.double().flatten()
    unequal = a.ne(b) & ~(a.isnan() & b.isnan())
    a, b = a[unequal], b[unequal]
    if a.numel() == 0:
        return 0.0
    limits = torch.finfo(dtype)
    exponent = torch.frexp(torch.maximum(a.abs(), b.abs())).exponent - 1
    spacing = torch.exp2(exponent.double().clamp(min=math.log2(limits.tiny))) * limits.eps
    return float(((a - b).abs() / spacing).nan_to_num(math.inf).max())


def largest_in_row(a: Tensor, b: Tensor) -> float:
    """Return the largest |a − b| in units of b's machine epsilon times the largest number of the row."""
    if a.numel() == 0:
        return 0.0
    unit = b.double().abs().amax(-1, keepdim=True) * torch.finfo(b.dtype).eps
    off = (a.double() - b.double()).abs()
    return float(torch.where(off == 0.0, 0.0, off / unit).nan_to_num(math.inf).max())


def close_rows(terms: Tensor, digits: int) -> Tensor:
    """Return which rows have a sum S for which the order of summation could change S/N rounded to fp32.

    That is so if S/N lies within 2⁻⁵³·Σ|term| of a rounding boundary, unless fp64 holds all digits of the sum.

    Args:
        terms: (..., N) in fp64.
        digits: How many binary digits the terms have.

    Returns:
        A bool tensor of shape (...).
    """
    size = terms.abs().sum(-1)
    smallest = torch.where(terms == 0, math.inf, terms.abs()).amin(-1)
    rounds = size > torch.exp2((torch.frexp(smallest).exponent - digits + 53).double())
    mean, reach = terms.mean(-1), 2.0**-53 * size
    spacing = torch.exp2((torch.frexp(mean).exponent - 24).double())
    from_boundary = ((mean - mean.float().double()).abs() - spacing / 2).abs()
    return rounds & ((from_boundary <= reach) | (mean.abs() <= reach))


def eager(x: Tensor, w: Tensor | None, eps: float, cast: str, offset: float) -> Tensor:
    """Compute what the published class computes when it runs eagerly.

    The result has the bits of `reference.published`. The gradients are those of a class: x is converted to fp32 once,
    so autograd adds the two parts of its gradient in fp32.

    Args:
        x: (..., N).
        w: (N,), or None; or (H, N) for x of shape (..., H, N).
        eps: The epsilon of the norm.
        cast: "early", "late" or "first".
        offset: What is added to the weight.
    """
    hidden = x.float()
    rstd = reference.published_rstd(hidden, eps).unsqueeze(-1)
    h = x * rstd.to(x.dtype) if cast == "first" else hidden * rstd
    if w is None:
        return h.to(x.dtype)
    if cast != "late":
        return w * h.to(x.dtype)
    return ((w.float() + offset) * h).to(x.dtype)


@dataclass(frozen=True)
class CallOutputs:
    """What one call returned.

    Attributes:
        y: The output.
        s: x + residual, or None without a residual.
        dx: The gradient of x.
        d_residual: The gradient of the residual, or None.
        dgate: The gradient of the gate, or None without a gate.
        dw: The gradient of the weight. None without a weight, and if each rank keeps its own part of it, since the
            rounding of the parts depends on the number of ranks.
        misplaced: Elements of a rank's part of dw that differ from what the rank's own rows give; all elements of
            dw if its placements are wrong.
    """

    y: Tensor
    s: Tensor | None
    dx: Tensor
    d_residual: Tensor | None
    dw: Tensor | None
    misplaced: int = 0
    dgate: Tensor | None = None

    def pairs(self, other: "CallOutputs") -> Iterator[tuple[Tensor, Tensor]]:
        """Yield our tensor and the other's for everything that must have the same bits, which is all but dw."""
        for name in ("y", "s", "dx", "d_residual", "dgate"):
            a, b = getattr(self, name), getattr(other, name)
            if a is not None:
                yield a, b

    def changed(self, again: "CallOutputs") -> int:
        """Return how many numbers, those of dw included, differ in another run."""
        pairs = [*self.pairs(again), *([] if self.dw is None or again.dw is None else [(self.dw, again.dw)])]
        return sum(differing(a, b) for a, b in pairs)


def run_unsharded(inputs: Inputs, case: VerifyCase) -> CallOutputs:
    """Call the public API, forward and backward."""
    if case.summands:
        return _run_operators(inputs, case)
    if inputs.gate is not None:
        return _run_gated(inputs, inputs.gate, case)
    x = inputs.x.detach().requires_grad_()
    w = None if inputs.w is None else inputs.w.detach().requires_grad_()
    into = [x] if w is None else [x, w]
    if inputs.residual is None or inputs.ds is None:
        y = rms_norm(x, w, case.eps, cast=case.cast, offset=case.offset)
        dx, *dw = torch.autograd.grad(y, into, inputs.dy)
        return CallOutputs(y.detach(), None, dx, None, dw[0] if dw else None)
    residual = inputs.residual.detach().requires_grad_()
    y, s = add_rms_norm(x, residual, w, case.eps, cast=case.cast, offset=case.offset)
    dx, d_residual, *dw = torch.autograd.grad([y, s], [x, residual, *into[1:]], [inputs.dy, inputs.ds])
    return CallOutputs(y.detach(), s.detach(), dx, d_residual, dw[0] if dw else None)


def _run_operators(inputs: Inputs, case: VerifyCase) -> CallOutputs:
    """Call the operators as in a compiled graph whose backward passes are fused with the additions around them."""
    spec = case.cast, case.offset
    y, _, rstd = torch.ops.rmsnorm.forward.default(inputs.x, None, inputs.w, case.eps, *spec, True)
    need_dw = inputs.w is not None
    dx, dw = torch.ops.rmsnorm.backward_of_sum.default(
        inputs.dys, inputs.ds, inputs.x, inputs.w, rstd, *spec, True, need_dw
    )  # fmt: skip
    return CallOutputs(y, None, dx, None, dw if need_dw else None)


def _run_gated(inputs: Inputs, gate: Tensor, case: VerifyCase) -> CallOutputs:
    x, gate = (t.detach().requires_grad_() for t in (inputs.x, gate))
    w = None if inputs.w is None else inputs.w.detach().requires_grad_()
    y = gated_rms_norm(
        x, gate, w, case.eps, cast=case.cast, activation=case.activation, gate_first=case.gate_first, groups=case.groups
    )
    dx, dgate, *dw = torch.autograd.grad(y, [x, gate] if w is None else [x, gate, w], inputs.dy)
    return CallOutputs(y.detach(), None, dx, None, dw[0] if dw else None, dgate=dgate)


def _compare_gated(ours: CallOutputs, inputs: Inputs, gate: Tensor, case: VerifyCase) -> Tally:
    """Count in a gated case what differs from the reference, and rows for which the order of a sum could matter."""
    spec, w = case.gated_spec, inputs.w
    y, rstd = gated_reference.forward(inputs.x, gate, w, spec, with_rstd=True)
    assert rstd is not None
    need_dw = w is not None
    dx, dgate, dw = gated_reference.backward(inputs.dy, inputs.x, gate, w, rstd, spec, True, True, need_dw)
    assert dx is not None
    exact = CallOutputs(y, None, dx, None, dw, dgate=dgate)
    different = sum(differing(a, b) for a, b in ours.pairs(exact))
    tally = Tally(case.outputs, different, rows=case.M)
    if case.outputs == 0 or case.form == SPECIAL_VALUES:
        return tally
    factor = gated_reference.silu_or_sigmoid(gate, case.activation)
    z = gated_reference.grouped(inputs.x.float() * factor if case.gate_first else inputs.x.float(), case.groups)
    d = inputs.dy.float() if case.gate_first else inputs.dy.float() * factor
    g = gated_reference.grouped(d if w is None else d * w.float(), case.groups)
    xh = z * rstd.unsqueeze(-1)
    digits = 24 if case.gate_first else _significand_bits(case.x)
    close = close_rows(z.double().square(), 2 * digits) | close_rows((g * xh).double(), 24)
    tally = dataclasses.replace(tally, close=int(close.any(-1).sum()))
    if ours.dw is None or dw is None:
        return tally
    terms = (d * xh.flatten(-2)).double().abs().reshape(-1, case.N).sum(0)
    return dataclasses.replace(tally, dw_too_far=_too_far(ours.dw, dw, terms, case.M))


def _too_far(dw: Tensor, exact: Tensor, terms: Tensor, rows: int) -> int:
    """Return how many numbers of dw differ by more than fp32 sums in any order and one rounding allow."""
    limits = torch.finfo(dw.dtype)
    allowed = (rows + 1) * FP32_ULP / 2 * terms + exact.double().abs() * limits.eps + limits.smallest_normal
    return int((~((dw.double() - exact.double()).abs() <= allowed)).sum())


def _exact(inputs: Inputs, case: VerifyCase) -> tuple[CallOutputs, Tensor]:
    """Return what the reference gives on the same device, and its rstd."""
    y, s, rstd = reference.forward(
        inputs.x, inputs.residual, inputs.w, case.eps, case.cast, case.offset, with_rstd=True
    )
    assert rstd is not None
    rows = inputs.x if s is None else s
    need_dw = inputs.w is not None
    arguments = inputs.ds, rows, inputs.w, rstd, case.cast, case.offset, True, need_dw
    if case.summands:
        dx, dw = reference.backward_of_sum(inputs.dys, *arguments)
    else:
        dx, dw = reference.backward(inputs.dy, *arguments)
    assert dx is not None
    d_residual = None if case.residual is None else dx.to(case.residual)
    return CallOutputs(y, s, dx.to(case.x), d_residual, dw), rstd


def _gradients_of(
    formula: Callable[[Tensor, Tensor | None], Tensor], inputs: Inputs, rows: Tensor, wide: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (y, dx, dw) of a formula by autograd, for the rows that are normalized; computed in fp64 if `wide`."""
    rows = (rows.double() if wide else rows).detach().requires_grad_()
    w = None if inputs.w is None else (inputs.w.double() if wide else inputs.w).detach().requires_grad_()
    y = formula(rows, w)
    dx, *dw = torch.autograd.grad(y, [rows] if w is None else [rows, w], inputs.dy.to(y.dtype))
    return y.detach(), dx if inputs.ds is None else dx + inputs.ds.to(dx.dtype), dw[0] if dw else None


Run = Callable[[Inputs, VerifyCase], CallOutputs]


def compare(case: VerifyCase, seed: int, device: torch.device, run: Run = run_unsharded, counts: bool = True) -> Tally:
    """Run a case three times and count what is wrong.

    Args:
        case: The case.
        seed: The seed of its inputs.
        device: Where it runs.
        run: What calls the norm; the ranks pass one that shards the inputs.
        counts: Whether this process compares the results. False on a rank that takes part while another one compares.

    Returns:
        The tally of the case; empty but for `unsteady` if this process does not compare.
    """
    drawn = draw(case, seed)
    inputs = place(drawn, case, device)
    ours = run(inputs, case)
    with host.bypassed():  # Python makes the calls that C++ makes otherwise, if it is loaded
        again = [run(inputs, case)]
    with _other_thread_count():
        again.append(run(inputs, case))
    unsteady = ours.misplaced + (sum(ours.changed(other) for other in again) if counts else 0)
    if not counts:
        return Tally(unsteady=unsteady)
    if inputs.gate is not None:
        tally = dataclasses.replace(_compare_gated(ours, inputs, inputs.gate, case), unsteady=unsteady)
        return _with_cpu(tally, ours, drawn, case, device)
    exact, rstd = _exact(inputs, case)
    rows = inputs.x if exact.s is None else exact.s
    different = sum(differing(a, b) for a, b in ours.pairs(exact))
    tally = Tally(case.outputs, different, unsteady=unsteady, rows=case.M)
    tally = _with_cpu(tally, ours, drawn, case, device)
    if case.outputs == 0 or case.form == SPECIAL_VALUES or case.summands:
        return tally
    xh = rows.float() * rstd.unsqueeze(-1)
    g = inputs.dy.float() if inputs.w is None else inputs.dy.float() * (inputs.w.float() + case.offset)
    squares = close_rows(rows.double().square(), 2 * _significand_bits(case.s))
    tally = dataclasses.replace(tally, close=int((squares | close_rows((g * xh).double(), 24)).sum()))
    if case.form in (ROUNDING_BOUNDARY, ORTHOGONAL):
        return dataclasses.replace(tally, off_in_row=max(largest_in_row(a, b) for a, b in ours.pairs(exact)))
    y_eager, dx_eager, dw_eager = _gradients_of(
        lambda x, w: eager(x, w, case.eps, case.cast, case.offset), inputs, rows, wide=False
    )
    _, dx_true, dw_true = _gradients_of(
        lambda x, w: reference.truth(x, w, case.eps, case.offset), inputs, rows, wide=True
    )
    ulp = largest_ulp(ours.y, y_eager, rows.dtype)
    dw_error = GradientError()
    if ours.dw is not None and dw_eager is not None and dw_true is not None:
        terms = (inputs.dy.double() * xh).abs().reshape(-1, *ours.dw.shape).sum(0)
        dw_error = _gradient_error(ours.dw, dw_eager, dw_true, terms)
    return dataclasses.replace(
        tally,
        eager_differing=differing(ours.y, y_eager),
        eager_ulp=ulp,
        eager_too_far=int(ulp > EAGER_ULP["late" if case.w is None and case.cast == "early" else case.cast]),
        dx=_gradient_error(ours.dx, dx_eager.to(case.x), dx_true, rstd.unsqueeze(-1).double() * g),
        dw=dw_error,
    )


def _with_cpu(tally: Tally, ours: CallOutputs, drawn: Inputs, case: VerifyCase, device: torch.device) -> Tally:
    """Return the tally with the numbers that differ from those of the same call on the CPU, if this is a GPU."""
    if device.type == "cpu":
        return tally
    on_cpu = run_unsharded(place(drawn, case, torch.device("cpu")), case)
    return dataclasses.replace(tally, from_cpu=sum(differing(a.cpu(), b) for a, b in ours.pairs(on_cpu)))


def _significand_bits(dtype: torch.dtype) -> int:
    """Return how many binary digits a number of the dtype has, with the implicit leading one."""
    return round(1 - math.log2(torch.finfo(dtype).eps))


def _gradient_error(ours: Tensor, eagers: Tensor, truth: Tensor, scale: Tensor) -> GradientError:
    """Return squared errors in units of ‖scale‖²/numel: cases then add up, weighted by their numbers of elements."""
    unit = float(scale.square().sum()) / ours.numel()
    squares = [float((t.double() - truth).square().sum()) / unit for t in (ours, eagers)]
    return GradientError(ours.numel(), *squares)


@contextlib.contextmanager
def _other_thread_count() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
