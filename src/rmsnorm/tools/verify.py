"""`rmsnorm verify`: the contract, tried on the device at hand.

    sweep(quick) -> rows of cases -> verify_rows: each case is drawn from its own seed and compared -> Result

What runs is the public API with autograd. It is held to *exact* (`reference.py`, on the same device, and for a GPU
the CPU's result too), to the class run eagerly, and its gradients to the formula's in fp64.
"""

import contextlib
import dataclasses
import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmsnorm import reference
from rmsnorm.errors import CommandError
from rmsnorm.functional import add_rms_norm, explain, rms_norm, wait_for_host
from rmsnorm.kernels.host import loader as host
from rmsnorm.spec import Cast
from rmsnorm.tools import display, machine, processes
from rmsnorm.tools.display import Block, Column, Table, Text
from rmsnorm.tools.timing import Progress

# --- the bounds of the contract ------------------------------------------------------------------------------

FP32_ULP = 2.0**-23
# Outputs of random rows, forward and dx, whose bits may differ from exact.
DIFFERING = 0
# Against the class run eagerly. Its fp32 statistic makes rstd differ by an ulp or two in some rows; that moves an
# output across a rounding boundary of the 16-bit dtype in about 2⁻¹⁶ (bf16) or 2⁻¹³ (fp16) of the places. The share is
# a mean over many rows: below so many outputs, what a sample may show by chance is allowed on top.
EAGER_SHARE = {torch.bfloat16: 1e-5, torch.float16: 8e-5}
SHARE_OUTPUTS = 10_000_000
# Early, one ulp of cast(h) is multiplied by a weight whose own leading digits are in [1, 2): less than two ulp of y.
EAGER_ULP = {"early": 2, "late": 1}
# Relative L2 error of a gradient over that of eager's, measured over at least so many elements; and so many rows,
# because rstd's rounding is one draw a row, and in fp32 a gradient's error hangs on it.
GRADIENT_RATIO = {torch.float32: 1.1, torch.bfloat16: 1.0, torch.float16: 1.0}
GRADIENT_ELEMENTS, GRADIENT_ROWS = 1 << 16, 256
# Where eager too rounds the gradient to 16 bits only once (late; dw of one row), both errors are that one rounding,
# and which is larger is chance: two roundings of numbers δ apart differ by δ² in the square of the error, δ ≤ 8 fp32
# ulp against 2⁻¹² of fp16, so 2⁻¹⁶ of the error.
# Early, when the weight is wider than x, dw sums dy·cast(h) unrounded on both sides: it is the casts that are alike,
# but for EAGER_SHARE of them that land one ulp apart, of an error of ulp/√12 each: √(12·share) of the error, of a sign
# of its own in each element of dw; five sigma over all of them.
TIE = 2.0**-16
CAST_TIE = {dtype: 5 * math.sqrt(12 * share / GRADIENT_ELEMENTS) for dtype, share in EAGER_SHARE.items()}
# Below this width dx is a difference that cancels, wholly at N = 1: an error of so many fp32 ulp of what is
# subtracted, ‖rstd·dy·w‖, or for dw of Σ|dy·xh|, is allowed whatever eager's is.
NARROW, NARROW_ERROR = 16, 8 * FP32_ULP
# Constructed rows, whose statistic lies on a rounding boundary: v may differ by an ulp, rstd then by one, h and y by
# two each at most; of a row's largest number, because where g = 0 all of dx is what the order of the sum left.
CONSTRUCTED_ULP = 4


# --- what is tried -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call: dtypes, spec, M rows of width N, and how they lie in memory or what is in them."""

    x: torch.dtype
    w: torch.dtype | None
    cast: Cast
    offset: float
    M: int
    N: int
    form: str = "contiguous"
    eps: float = 1e-6
    residual: torch.dtype | None = None
    sharding: str = ""  # how it lies on the ranks, one of `world.LAYOUTS`

    @property
    def outputs(self) -> int:
        return self.M * self.N

    @property
    def s(self) -> torch.dtype:
        """The dtype of what is normalized."""
        return self.x if self.residual is None else torch.promote_types(self.x, self.residual)


@dataclass(frozen=True)
class Plan:
    """A row of the table before it has run. All its cases have the same dtypes.

    seed: of its first case, a constant, so that a row that runs alone is given the same numbers.
    """

    section: str
    name: str
    cases: tuple[Case, ...]
    seed: int = 0


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SPECS: tuple[tuple[Cast, float], ...] = (("early", 0.0), ("late", 0.0), ("late", 1.0))
_EPS = (1e-6, 1e-5, 0.0, 1e-3)
_PRIMES = (67, 127, 251, 509, 1021, 1279, 2039, 4093, 7919)
_MIXED = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float16, torch.float16: torch.float32}


def sweep(quick: bool) -> list[Plan]:
    """Every row of the table: each spec in each pair of dtypes, then every memory form, then every kind of width."""
    plans = []
    widths = (512, 1280, 1021) if quick else (512, 768, 1021, 1280, 1536, 1555, 2048) * 8
    for x in _FLOATS:
        for w in (None, *_FLOATS):
            for cast, offset in _SPECS if w is not None else _SPECS[:1]:
                cases = tuple(Case(x, w, cast, offset, 48, N, eps=_EPS[i % 4]) for i, N in enumerate(widths))
                plus = "1 + weight" if offset else "weight"
                spec = f"{plus} {_short(w)}, {cast}" if w is not None else "no weight"
                plans.append(Plan("spec", f"{_short(x)}, {spec}", cases))
    rows = 96 if quick else 256
    for x in _FLOATS:
        for form in list(_FORMS)[1:]:
            N = 512 if form == "512 of 576 columns" else 1280
            cases = tuple(Case(x, x, cast, offset, rows, N, form) for cast, offset in _SPECS)
            plans.append(Plan("form", f"{_short(x)}, {form}", cases))
        cases = tuple(Case(x, x, cast, offset, rows, 1280, _NOT_FINITE, eps=0.0) for cast, offset in _SPECS)
        plans.append(Plan("form", f"{_short(x)}, {_NOT_FINITE}", cases))
        singles = tuple(
            Case(x, x, _SPECS[i % 3][0], _SPECS[i % 3][1], 1, 1024 + i) for i in range(20 if quick else 400)
        )
        plans.append(Plan("form", f"{_short(x)}, one row", singles))
        empty = tuple(Case(x, x, cast, offset, 0, 1280) for cast, offset in _SPECS)
        plans.append(Plan("form", f"{_short(x)}, no rows", empty))
        for other in (x, _MIXED[x]):
            cases = tuple(Case(x, x, cast, offset, rows, 1280, residual=other) for cast, offset in _SPECS)
            plans.append(Plan("form", f"{_short(x)}, residual {_short(other)}", cases))
    scale = 1 << (13 if quick else 17)
    bands: tuple[tuple[str, Iterable[int]], ...] = (
        (f"N 1 to {NARROW - 1}", range(1, NARROW)),
        (f"N {NARROW} to 64", range(NARROW, 65)),
        ("N prime", _PRIMES),
        ("N 576 to 32767", (576, 1536, 2048, 5120, 7168, 8191, 12288, 32767)),
    )
    for x in _FLOATS:
        for name, band in bands:
            cases = tuple(
                Case(x, x, *_SPECS[i % 3], max(4, scale // N), N, eps=_EPS[i % 2]) for i, N in enumerate(band)
            )
            plans.append(Plan("width", f"{_short(x)}, {name}", cases))
    for x in _FLOATS:
        for form in (_ON_BOUNDARY, _ORTHOGONAL):
            cases = tuple(Case(x, x, cast, offset, rows, 2048, form, eps=0.0) for cast, offset in _SPECS)
            plans.append(Plan("constructed", f"{_short(x)}, {form}", cases))
    return [dataclasses.replace(plan, seed=1000 * i) for i, plan in enumerate(plans)]


def named(plans: list[Plan], only: Sequence[str]) -> list[Plan]:
    """The plans that have one of these texts in their names; all of them if there are no texts.

    Raises CommandError for a text that is in the name of none.
    """
    for text in only:
        if not any(text in plan.name for plan in plans):
            raise CommandError(f"--only {text!r} is in the name of no row: give {plans[0].name!r} for example")
    return [plan for plan in plans if not only or any(text in plan.name for text in only)]


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


_Form = Callable[[Tensor], Tensor]


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


# How x (and residual) and dy (and ds) lie in memory: views of an (M, N) tensor, M a multiple of 16. What lies beside a
# view is NaN, so that reading it shows.
_FORMS: dict[str, tuple[_Form, _Form]] = {
    "contiguous": (_plain, _plain),
    "512 of 576 columns": (_padded, _padded),
    "4-D transposed": (_transposed, _transposed),
    "columns": (_columns, _columns),
    "one element off": (_shifted, _shifted),
    "dy one row expanded": (_plain, _one_row),
    "dy one number expanded": (_plain, _one_number),
}
# Special values, drawn as such.
_NOT_FINITE, _ON_BOUNDARY, _ORTHOGONAL = "NaN, inf, zeros, largest", "S on a boundary", "dy orthogonal to y"


@dataclass(frozen=True)
class Inputs:
    """What one call is given."""

    x: Tensor
    residual: Tensor | None
    w: Tensor | None
    dy: Tensor
    ds: Tensor | None

    def map(self, change: Callable[[Tensor, bool], Tensor]) -> "Inputs":
        """The same with each tensor changed; the flag says whether it is a gradient."""
        return Inputs(
            change(self.x, False),
            None if self.residual is None else change(self.residual, False),
            self.w,
            change(self.dy, True),
            None if self.ds is None else change(self.ds, True),
        )


def _draw(case: Case, seed: int) -> Inputs:
    """Random (M, N) tensors on the CPU: the same for every device.

    The rows' sizes span 2⁻⁶ … 2³, so that eps counts in some; dy goes along, so that every row counts in dx.
    """
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randint(-6, 4, (case.M, 1), generator=generator).float())

    def normal() -> Tensor:
        return torch.randn((case.M, case.N), generator=generator)

    x, dy = normal() * size, normal() * size
    w = None if case.w is None else torch.randn(case.N, generator=generator)
    if case.form == _NOT_FINITE:
        _spoil(x, torch.finfo(case.x).max)
    elif case.form == _ON_BOUNDARY:
        x = _on_boundary(x.shape, generator)
    elif case.form == _ORTHOGONAL and w is not None:
        _orthogonalize(x, w, dy, generator)
    residual = None if case.residual is None else (normal() * size).to(case.residual)
    y_dtype = torch.promote_types(case.s, case.w) if case.w is not None and case.cast == "early" else case.s
    return Inputs(
        x.to(case.x),
        residual,
        None if w is None else w.to(case.w),
        dy.to(y_dtype),
        None if residual is None else normal().to(case.s),
    )


def _spoil(x: Tensor, largest: float) -> None:
    """NaN in some rows, infinities in others, rows of zeros, rows of the largest numbers, and rows left alone."""
    x[0::8, 5] = math.nan
    x[1::8, 7] = math.inf
    x[2::8, 11] = -math.inf
    x[3::8] = 0.0
    x[4::8] = x[4::8].sign() * largest


def _on_boundary(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Rows of 2048 whose S/N is halfway between two fp32 numbers, but for squares that some orders of an fp64 sum lose.

    The squares of 1024 whole numbers up to 255 add up to 2²⁴ … 2²⁵ here, where fp32 numbers are 2 apart: an odd sum is
    halfway. fp64 numbers are 2⁻²⁸ apart there: a square of 2⁻³² … 2⁻³⁶ is lost when it is added to the whole, not when
    it is added to a part; 512 of them are not lost.
    """
    x = torch.randint(-255, 256, shape, generator=generator).float()
    x[:, 1024:] = 0.0
    x[:, 1024:1536] = torch.exp2(-torch.randint(16, 19, (shape[0], 1), generator=generator).float())
    x[:, 0] = 1 + x[:, 1:1024].double().square().sum(-1) % 2
    return x[:, torch.randperm(shape[1], generator=generator)]


def _orthogonalize(x: Tensor, w: Tensor, dy: Tensor, generator: torch.Generator) -> None:
    """In place: pairs of columns whose terms of Σ dy·w·xh cancel, so that only the order says what is left of them.

    The terms of some are 2⁻²⁴ of the others', beyond fp64's digits; some have dy = 0, where dx is that rest alone.
    """
    one, two = torch.randperm(x.shape[1], generator=generator).view(2, -1)
    for t in (x, w, dy):
        t[..., one[:128]] *= 2.0**-8
    dy[:, one[-16:]] = 0.0
    x[:, two], w[two], dy[:, two] = x[:, one], w[one], -dy[:, one]


def _placed(inputs: Inputs, form: str, device: torch.device) -> Inputs:
    """On the device, and only then in the form: a move of a strided tensor would make it contiguous."""
    values, gradients = _FORMS.get(form, _FORMS["contiguous"])
    there = dataclasses.replace(inputs, w=None if inputs.w is None else inputs.w.to(device))
    return there.map(lambda t, is_gradient: (gradients if is_gradient else values)(t.to(device)))


# --- comparing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Error:
    """Squared relative error of a gradient, ours and eager's, summed over so many elements."""

    elements: int = 0
    ours: float = 0.0
    eagers: float = 0.0

    def __add__(self, other: "Error") -> "Error":
        return Error(self.elements + other.elements, self.ours + other.ours, self.eagers + other.eagers)

    @property
    def size(self) -> float:
        return math.sqrt(self.ours / self.elements) if self.elements else 0.0

    @property
    def ratio(self) -> float | None:
        if self.eagers == 0.0:
            return math.inf if self.ours > 0.0 else None
        return math.sqrt(self.ours / self.eagers)


@dataclass(frozen=True)
class Tally:
    """What was counted in some cases.

    outputs: elements of y. differing: of y, of x + residual and of dx, those whose bits are not exact's; from_cpu:
    those that are not the CPU's. unsteady: numbers that change from run to run, or are astray on a rank.
    rows, close: of the rows, those where Σ x² or Σ g·xh lies so near a rounding boundary that the order of an fp64
    sum could tell. eager_too_far: cases that are more ulp from eager's than their spec allows. off_in_row:
    constructed rows only.
    """

    outputs: int = 0
    differing: int = 0
    from_cpu: int = 0
    unsteady: int = 0
    rows: int = 0
    close: int = 0
    eager_differing: int = 0
    eager_ulp: float = 0.0
    eager_too_far: int = 0
    off_in_row: float = 0.0
    dx: Error = Error()
    dw: Error = Error()

    def __add__(self, other: "Tally") -> "Tally":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        largest = {name: max(getattr(self, name), getattr(other, name)) for name in ("eager_ulp", "off_in_row")}
        return Tally(**{**sums, **largest})


def differing(a: Tensor, b: Tensor) -> int:
    """How many elements differ in their bits; of a NaN only its place counts. Shapes and dtypes must be the same."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return max(a.numel(), b.numel(), 1)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    unequal = a.contiguous().view(bits) != b.contiguous().view(bits)
    return int((unequal & ~(a.isnan() & b.isnan())).sum()) if unequal.any() else 0


def largest_ulp(a: Tensor, b: Tensor, dtype: torch.dtype) -> float:
    """The largest |a − b| in units of the last place that `dtype` has at the larger of the two."""
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
    """The largest |a − b| in units of the dtype's epsilon times the largest number of the row."""
    if a.numel() == 0:
        return 0.0
    unit = b.double().abs().amax(-1, keepdim=True) * torch.finfo(b.dtype).eps
    off = (a.double() - b.double()).abs()
    return float(torch.where(off == 0.0, 0.0, off / unit).nan_to_num(math.inf).max())


def close_rows(terms: Tensor, digits: int) -> Tensor:
    """Which rows of (..., N) fp64 terms of so many binary digits have a sum whose order could tell: fp32 rounds S/N
    the other way within N·2⁻⁵³·Σ|term|. Not a sum that no order rounds, because fp64 holds all its digits."""
    size = terms.abs().sum(-1)
    smallest = torch.where(terms == 0, math.inf, terms.abs()).amin(-1)
    rounds = size > torch.exp2((torch.frexp(smallest).exponent - digits + 53).double())
    mean, reach = terms.mean(-1), 2.0**-53 * size
    spacing = torch.exp2((torch.frexp(mean).exponent - 24).double())
    from_boundary = ((mean - mean.float().double()).abs() - spacing / 2).abs()
    return rounds & ((from_boundary <= reach) | (mean.abs() <= reach))


def eager(x: Tensor, w: Tensor | None, eps: float, cast: str, offset: float) -> Tensor:
    """The class run eagerly: the bits of `reference.published`, and the gradients of a class, which takes x to fp32
    once, so that its two gradients are added in fp32."""
    hidden = x.float()
    h = hidden * reference.published_rstd(hidden, eps).unsqueeze(-1)
    if w is None:
        return h.to(x.dtype)
    if cast == "early":
        return w * h.to(x.dtype)
    return ((w.float() + offset) * h).to(x.dtype)


@dataclass(frozen=True)
class Outcome:
    """What one call gave. astray: elements of a rank's part of dw that its own rows alone do not give; dw is None
    where it stays in such parts, because their rounding is the ranks' doing."""

    y: Tensor
    s: Tensor | None
    dx: Tensor
    d_residual: Tensor | None
    dw: Tensor | None
    astray: int = 0

    def pairs(self, other: "Outcome") -> Iterator[tuple[Tensor, Tensor]]:
        """Ours and the other's of all that must be the same in bits: everything but dw."""
        for name in ("y", "s", "dx", "d_residual"):
            a, b = getattr(self, name), getattr(other, name)
            if a is not None:
                yield a, b

    def changed(self, again: "Outcome") -> int:
        """Numbers that another run has otherwise, dw's too."""
        pairs = [*self.pairs(again), *([] if self.dw is None or again.dw is None else [(self.dw, again.dw)])]
        return sum(differing(a, b) for a, b in pairs)


def run_whole(inputs: Inputs, case: Case) -> Outcome:
    """Through the public API."""
    x = inputs.x.detach().requires_grad_()
    w = None if inputs.w is None else inputs.w.detach().requires_grad_()
    into = [x] if w is None else [x, w]
    if inputs.residual is None or inputs.ds is None:
        y = rms_norm(x, w, case.eps, cast=case.cast, offset=case.offset)
        dx, *dw = torch.autograd.grad(y, into, inputs.dy)
        return Outcome(y.detach(), None, dx, None, dw[0] if dw else None)
    residual = inputs.residual.detach().requires_grad_()
    y, s = add_rms_norm(x, residual, w, case.eps, cast=case.cast, offset=case.offset)
    dx, d_residual, *dw = torch.autograd.grad([y, s], [x, residual, *into[1:]], [inputs.dy, inputs.ds])
    return Outcome(y.detach(), s.detach(), dx, d_residual, dw[0] if dw else None)


def _exact(inputs: Inputs, case: Case) -> tuple[Outcome, Tensor]:
    """The reference's outcome on the same device, and its rstd."""
    y, s, rstd = reference.forward(
        inputs.x, inputs.residual, inputs.w, case.eps, case.cast, case.offset, with_rstd=True
    )
    assert rstd is not None
    rows = inputs.x if s is None else s
    need_dw = inputs.w is not None
    dx, dw = reference.backward(inputs.dy, inputs.ds, rows, inputs.w, rstd, case.cast, case.offset, True, need_dw)
    assert dx is not None
    d_residual = None if case.residual is None else dx.to(case.residual)
    return Outcome(y, s, dx.to(case.x), d_residual, dw), rstd


def _derived(
    formula: Callable[[Tensor, Tensor | None], Tensor], inputs: Inputs, rows: Tensor, wide: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, dx, dw) that autograd gives for a formula at the rows that are normalized; in fp64 throughout if wide."""
    rows = (rows.double() if wide else rows).detach().requires_grad_()
    w = None if inputs.w is None else (inputs.w.double() if wide else inputs.w).detach().requires_grad_()
    y = formula(rows, w)
    dx, *dw = torch.autograd.grad(y, [rows] if w is None else [rows, w], inputs.dy.to(y.dtype))
    return y.detach(), dx if inputs.ds is None else dx + inputs.ds.to(dx.dtype), dw[0] if dw else None


Run = Callable[[Inputs, Case], Outcome]


def compare(case: Case, seed: int, device: torch.device, run: Run = run_whole, counts: bool = True) -> Tally:
    """Draw a case, run it, and count what is not as it should be; or only take part, where another rank counts."""
    drawn = _draw(case, seed)
    inputs = _placed(drawn, case.form, device)
    ours = run(inputs, case)
    with host.bypassed():  # by Python what C++ makes otherwise, where it is there
        again = [run(inputs, case)]
    with _another_thread_count():
        again.append(run(inputs, case))
    unsteady = ours.astray + (sum(ours.changed(other) for other in again) if counts else 0)
    if not counts:
        return Tally(unsteady=unsteady)
    exact, rstd = _exact(inputs, case)
    rows = inputs.x if exact.s is None else exact.s
    different = sum(differing(a, b) for a, b in ours.pairs(exact))
    tally = Tally(case.outputs, different, unsteady=unsteady, rows=case.M)
    if device.type != "cpu":
        on_cpu = run_whole(_placed(drawn, case.form, torch.device("cpu")), case)
        tally = dataclasses.replace(tally, from_cpu=sum(differing(a.cpu(), b) for a, b in ours.pairs(on_cpu)))
    if case.outputs == 0 or case.form == _NOT_FINITE:
        return tally
    xh = rows.float() * rstd.unsqueeze(-1)
    g = inputs.dy.float() if inputs.w is None else inputs.dy.float() * (inputs.w.float() + case.offset)
    squares = close_rows(rows.double().square(), 2 * _digits(case.s))
    tally = dataclasses.replace(tally, close=int((squares | close_rows((g * xh).double(), 24)).sum()))
    if case.form in (_ON_BOUNDARY, _ORTHOGONAL):
        return dataclasses.replace(tally, off_in_row=max(largest_in_row(a, b) for a, b in ours.pairs(exact)))
    y_eager, dx_eager, dw_eager = _derived(
        lambda x, w: eager(x, w, case.eps, case.cast, case.offset), inputs, rows, wide=False
    )
    _, dx_true, dw_true = _derived(lambda x, w: reference.truth(x, w, case.eps, case.offset), inputs, rows, wide=True)
    ulp = largest_ulp(ours.y, y_eager, rows.dtype)
    dw_error = Error()
    if ours.dw is not None and dw_eager is not None and dw_true is not None:
        terms = (inputs.dy.double() * xh).abs().reshape(-1, case.N).sum(0)
        dw_error = _error(ours.dw, dw_eager, dw_true, terms)
    return dataclasses.replace(
        tally,
        eager_differing=differing(ours.y, y_eager),
        eager_ulp=ulp,
        eager_too_far=int(ulp > EAGER_ULP["late" if case.w is None else case.cast]),
        dx=_error(ours.dx, dx_eager.to(case.x), dx_true, rstd.unsqueeze(-1).double() * g),
        dw=dw_error,
    )


def _digits(dtype: torch.dtype) -> int:
    return round(1 - math.log2(torch.finfo(dtype).eps))


def _error(ours: Tensor, eagers: Tensor, truth: Tensor, scale: Tensor) -> Error:
    """In units of ‖scale‖, so that cases of different sizes add up, each counted as often as it has elements."""
    unit = float(scale.square().sum()) / ours.numel()
    squares = [float((t.double() - truth).square().sum()) / unit for t in (ours, eagers)]
    return Error(ours.numel(), *squares)


@contextlib.contextmanager
def _another_thread_count() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- judging -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of the table: what was counted, and what of it is against the contract."""

    section: str
    name: str
    tally: Tally
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.faults


def judge(plan: Plan, tally: Tally) -> Row:
    """Hold what was counted for a row to the bounds."""
    case = plan.cases[0]
    faults = []
    if tally.unsteady:
        faults.append(f"{tally.unsteady} numbers change from run to run, with the thread count or with the rank")
    if plan.section == "constructed":
        if tally.off_in_row > CONSTRUCTED_ULP:
            faults.append(f"off by {tally.off_in_row:.3g} ulp of the row's largest number")
        return Row(plan.section, plan.name, tally, tuple(faults))
    if tally.from_cpu > DIFFERING:
        faults.append(f"{tally.from_cpu} numbers of y, x + residual and dx are not the CPU's")
    if tally.differing > DIFFERING:
        faults.append(f"{tally.differing} numbers of y, x + residual and dx are not exact's")
    if case.s in EAGER_SHARE:
        if tally.eager_differing > _differences_allowed(plan):
            faults.append(f"{tally.eager_differing} outputs are not eager's")
        if tally.eager_too_far:
            faults.append(f"{tally.eager_ulp:.3g} ulp from eager's")
    narrow = max(c.N for c in plan.cases) < NARROW
    for name, error, dtype in (("dx", tally.dx, case.x), ("dw", tally.dw, case.w)):
        if dtype is None or error.ratio is None or error.elements < GRADIENT_ELEMENTS or tally.rows < GRADIENT_ROWS:
            continue
        limit = _ratio_allowed(plan, name, dtype)
        # Written so that a NaN is a fault.
        if not (error.ratio <= limit or (narrow and error.size <= NARROW_ERROR)):
            faults.append(f"the error of {name} is {error.ratio:.5f} of eager's, more than {limit:.5f}")
    return Row(plan.section, plan.name, tally, tuple(faults))


def _differences_allowed(plan: Plan) -> float:
    """How many outputs of these cases may differ from eager's.

    In a small sample five standard deviations come on top. Differences come in flocks: where x·rstd falls on the
    other side of a boundary for one x, it does for all x of the same digits, N·2⁻⁷ of them in a row of bf16.
    """
    dtype = plan.cases[0].s
    expected = variance = largest = 0.0
    for case in plan.cases:
        flock = max(1.0, case.N * torch.finfo(dtype).eps)
        largest = max(largest, flock)
        expected += EAGER_SHARE[dtype] * case.outputs
        variance += EAGER_SHARE[dtype] * case.outputs * flock
    if sum(case.outputs for case in plan.cases) >= SHARE_OUTPUTS:
        return expected
    return expected + 5 * math.sqrt(variance) + largest


def _ratio_allowed(plan: Plan, gradient: str, dtype: torch.dtype) -> float:
    case = plan.cases[0]
    early = any(c.cast == "early" for c in plan.cases)
    if gradient == "dw" and early and case.s in CAST_TIE and case.w != case.s:
        return GRADIENT_RATIO[case.s] + CAST_TIE[case.s]
    return GRADIENT_RATIO[dtype] + (TIE if dtype != torch.float32 else 0.0)


def _together(plans: list[Plan], tallies: list[Tally]) -> Iterator[tuple[Plan, Tally]]:
    """For each dtype, all random rows in which everything is of it as one: the sample that the contract speaks of."""
    for dtype in _FLOATS:
        cases: list[Case] = []
        total, count = Tally(), 0
        for plan, tally in zip(plans, tallies, strict=True):
            case = plan.cases[0]
            if plan.section == "constructed" or {case.x, case.s, case.w or dtype} != {dtype}:
                continue
            cases.extend(plan.cases)
            count += 1
            total += (
                tally if max(c.N for c in plan.cases) >= NARROW else dataclasses.replace(tally, dx=Error(), dw=Error())
            )
        if count > 1:  # of one row alone it would say the same again
            yield Plan("all", f"{_short(dtype)}, together", tuple(cases)), total


@dataclass(frozen=True)
class Result:
    """What verify found. ok: no row is red."""

    device: str
    kernel: str
    quick: bool
    seconds: float
    machine: dict[str, Any]
    rows: tuple[Row, ...]
    world: int = 1  # ranks
    only: tuple[str, ...] = ()  # what the names of the rows were to contain

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def outputs(self) -> int:
        """Elements of y that were tried, each once."""
        return sum(row.tally.outputs for row in self.rows if row.section != "all")

    def to_json(self) -> dict[str, Any]:
        """Everything, as what `json.dumps` takes."""
        return {
            "verb": "verify",
            "ok": self.ok,
            "outputs": self.outputs,
            "device": self.device,
            "world": self.world,
            "kernel": self.kernel,
            "quick": self.quick,
            "only": list(self.only),
            "seconds": round(self.seconds, 1),
            "machine": self.machine,
            "rows": [_row_json(row) for row in self.rows],
        }

    def table(self, verbose: bool = False) -> list[Block]:
        """What to print: the verdict, what was compared, what is red; with `verbose` each row as well."""
        return [*_verdict(self), *_totals(self), *_red(self), *(_details(self) if verbose else _hint(self))]


def count(plans: list[Plan], one: Callable[[Case, int], Tally], progress: Progress) -> list[Tally]:
    """What `one`, given each case and its seed, counts for each plan. progress counts outputs."""
    total, done, tallies = sum(case.outputs for plan in plans for case in plan.cases), 0, []
    for plan in plans:
        tally = Tally()
        for j, case in enumerate(plan.cases):
            progress(done, total, plan.name)
            tally += one(case, plan.seed + j)
            done += case.outputs
        tallies.append(tally)
    progress(done, total, "done")
    return tallies


def judge_rows(plans: list[Plan], tallies: list[Tally]) -> tuple[Row, ...]:
    """Judge each plan, and those of each dtype together."""
    pairs = [*zip(plans, tallies, strict=True), *_together(plans, tallies)]
    return tuple(judge(plan, tally) for plan, tally in pairs)


def verify_rows(
    plans: list[Plan], device: torch.device, progress: Progress = lambda done, total, what: None
) -> tuple[Row, ...]:
    """Run these plans on one process, and judge them."""
    return judge_rows(plans, count(plans, lambda case, seed: compare(case, seed, device), progress))


_FEW_ROWS = 16


def compile_ahead(plans: list[Plan], device: torch.device, progress: Progress) -> None:
    """Have processes side by side compile what the cases need, into the cache on disk: one alone takes minutes.

    Each case runs once, with few rows, on which hardly a kernel depends. Nothing is compared: what goes wrong here goes
    wrong again where it is seen.
    """
    progress(0, 1, "compiling in processes side by side")
    processes.side_by_side(_run_once, _by_kernels(plans), device)


def _by_kernels(plans: list[Plan]) -> list[set[Case]]:
    """All cases, each once and with few rows; in one set those that share most kernels, so that few compile twice."""
    groups: dict[Case, set[Case]] = {}
    for case in (case for plan in plans for case in plan.cases):
        few = dataclasses.replace(case, M=min(case.M, _FEW_ROWS), eps=1.0)
        groups.setdefault(dataclasses.replace(few, M=0, offset=0.0, N=case.N.bit_length()), set()).add(few)
    return list(groups.values())


def _run_once(cases: set[Case], device: torch.device) -> None:
    for case in cases:
        with contextlib.suppress(Exception):
            run_whole(_placed(_draw(case, 0), case.form, device), case)


def verify(
    device: str | None = None,
    quick: bool = False,
    progress: Progress = lambda done, total, what: None,
    *,
    only: Sequence[str] = (),
) -> Result:
    """Try the contract on a device ("cuda" where there is one, else "cpu"): over 10⁸ outputs, or a sixth if quick.

    Changes nothing but, for moments, torch's thread count.

    Args:
        device: "cpu" or "cuda".
        quick: Whether to try a sixth of the outputs.
        progress: Called with the outputs that are done, all of them, and the name of the next row.
        only: Texts; only the rows with one of them in their names are tried, on the numbers of the whole sweep.

    Raises:
        CommandError: For a device that is not there, or a text that is in no name.
    """
    place = machine.find_device(device)
    start = time.perf_counter()
    x = torch.ones(1, 1280, dtype=torch.bfloat16, device=place)
    plans = named(sweep(quick), only)
    wait_for_host()
    if place.type == "cuda":
        compile_ahead(plans, place, progress)
    rows = verify_rows(plans, place, progress)
    kernel = explain(x, x[0])
    facts = machine.describe(place)
    return Result(str(place), kernel, quick, time.perf_counter() - start, facts, rows, only=tuple(only))


# --- printing ------------------------------------------------------------------------------------------------


def _row_json(row: Row) -> dict[str, Any]:
    tally = row.tally
    share = tally.eager_differing / tally.outputs if tally.outputs else None
    counts = {f.name: _finite(getattr(tally, f.name)) for f in dataclasses.fields(tally) if f.name not in ("dx", "dw")}
    gradients = {
        name: {"elements": error.elements, "error": _finite(error.size), "of_eagers": _finite(error.ratio)}
        for name, error in (("dx", tally.dx), ("dw", tally.dw))
    }
    return {
        "section": row.section,
        "name": row.name,
        "ok": row.ok,
        "faults": list(row.faults),
        **counts,
        "eager_share": share,
        **gradients,
    }


def _finite(number: float | None) -> float | None:
    """JSON knows neither inf nor NaN; the row's faults say what was found."""
    return number if number is not None and math.isfinite(number) else None


def _verdict(result: Result) -> list[Block]:
    red = sum(not row.ok for row in result.rows)
    said = Text(f"PASSED: all {len(result.rows)} rows of the sweep keep the contract", "good")
    if red:
        said = Text(f"FAILED: {red} of {len(result.rows)} rows of the sweep break the contract", "bad")
    how = "quick sweep" if result.quick else "full sweep"
    how += f", rows named {' or '.join(map(repr, result.only))}" if result.only else ""
    how += f", {result.world} ranks" if result.world > 1 else ""
    return [
        said,
        f"{display.count(result.outputs)} outputs in {display.duration(result.seconds, 3)} on {result.device} ({how})",
        f"kernel: {result.kernel}",
        Text(machine.headline(result.machine), "note"),
    ]


def _hint(result: Result) -> list[Block]:
    return [Text(f"\n--verbose prints all {len(result.rows)} rows.", "note")]


def _summed(rows: Iterable[Row]) -> Tally:
    return sum((row.tally for row in rows), Tally())


def _totals(result: Result) -> list[Block]:
    """What was compared with what, over all rows: how much was tried, how much differs, and how much may."""
    tried = [row for row in result.rows if row.section != "all"]
    random = [row for row in tried if row.section != "constructed"]
    total, built, both = (_summed(rows) for rows in (random, [r for r in tried if r not in random], tried))
    lines = []

    def exactly(what: str, tally: Tally, differing: int) -> None:
        lines.append((what, display.count(tally.outputs), display.count(differing), "", "0", ""))

    def nearly(what: str, tally: Tally, differing: int, ulp: float, allowed: str, allowed_ulp: str) -> None:
        share = display.share(differing / tally.outputs, digits=2)
        by = display.number(ulp, digits=2)
        lines.append((what, display.count(tally.outputs), share, by, allowed, allowed_ulp))

    exactly("itself, called again", both, both.unsteady)
    if random:
        exactly("exact, random rows", total, total.differing)
    if random and result.device != "cpu":
        exactly("the CPU, random rows", total, total.from_cpu)
    if built.outputs:
        nearly("exact, constructed rows", built, built.differing, built.off_in_row, "any", f"{CONSTRUCTED_ULP}")
    for dtype, tally in _by_dtype(result).items():
        share = EAGER_SHARE.get(dtype)
        allowed = ("any", "any") if share is None else (display.share(share), f"{max(EAGER_ULP.values())}")
        nearly(f"eager, {_short(dtype)}", tally, tally.eager_differing, tally.eager_ulp, *allowed)
    numbers = ("outputs", "differ", "by ulp", "may differ", "may by ulp")
    columns = (Column("compared with", words=True), *map(Column, numbers))
    gradients = tuple(
        (_short(dtype), *(display.factor(e.ratio) for e in (t.dx, t.dw)), display.factor(GRADIENT_RATIO[dtype]))
        for dtype, t in _by_dtype(result).items()
    )
    of_gradients = (Column("dtype", words=True), Column("dx"), Column("dw"), Column("at most"))
    return [
        Table("Outputs", columns, tuple(lines)),
        "",
        "exact: the same arithmetic with a correctly rounded statistic, in plain torch; y, dx and x + residual are "
        "compared. eager: the published class run as it is; where it differs, its own fp32 sum is off.",
        *(
            ["constructed: rows built so that the order of an fp64 sum decides; ulp of a row's largest number."]
            if built.outputs
            else []
        ),
        f"Of {display.count(total.rows)} random rows, {display.count(total.close)} were so near a rounding boundary "
        "that this order could tell.",
        *(
            [Table("Gradients: their error in L2 against fp64, ours over eager's", of_gradients, gradients)]
            if gradients
            else []
        ),
    ]


def _by_dtype(result: Result) -> dict[torch.dtype, Tally]:
    """All random rows of a dtype together, where that many were tried; a single row says less."""
    named = {f"{_short(dtype)}, together": dtype for dtype in _FLOATS}
    return {named[row.name]: row.tally for row in result.rows if row.section == "all" and row.tally.dx.elements}


def _red(result: Result) -> list[Block]:
    """Each row that failed: why, and the command that tries it alone, on the same numbers."""
    blocks: list[Block] = []
    for row in result.rows:
        if row.ok:
            continue
        blocks.append(Text(f"\nFAILED  {row.name}: {display.count(row.tally.outputs)} outputs tried", "bad"))
        blocks += [f"  {fault}" for fault in row.faults]
        options = ["--quick"] * result.quick + (["--world", str(result.world)] if result.world > 1 else [])
        if row.section != "all":
            options += ["--only", row.name]
        blocks += [
            "  to repeat it:",
            Text(f"  rmsnorm verify --device {result.device} {shlex.join(options)}".rstrip(), fold=False),
        ]
    return blocks


_SECTIONS = {
    "spec": "Every spec in every pair of dtypes",
    "form": "Every form in memory",
    "width": "Every kind of width",
    "constructed": "Constructed rows: the order of an fp64 sum decides, so some numbers may differ",
    "all": "All random rows of one dtype",
}


def _details(result: Result) -> list[Block]:
    """Each row of the sweep, a table a section."""
    blocks: list[Block] = []
    for section, title in _SECTIONS.items():
        rows = [row for row in result.rows if row.section == section]
        cells = [_cells(row, result.device != "cpu") for row in rows]
        # Of what was not compared in any row of the section there is no column.
        headers = [header for header in (cells[0] if cells else ()) if any(c[header] for c in cells)]
        columns = tuple(Column(header, words=header in ("row", "verdict")) for header in headers)
        drawn = tuple(tuple(c[header] or display.NOTHING for header in headers) for c in cells)
        if rows:
            blocks.append(Table(title, columns, drawn))
    blocks += [
        "",
        "not exact, not the CPU's: numbers of y, dx and x + residual whose bits are not those of the exact arithmetic, "
        "or of the same call on the CPU.",
        "not eager's: the share of outputs that are not those of the published class run as it is; by ulp: by how many "
        "at most.",
        "dx, dw: the error in L2 of a gradient against fp64, ours over eager's.",
        "close: rows where the order of an fp64 sum could tell.",
    ]
    return blocks


def _cells(row: Row, on_gpu: bool) -> dict[str, str | Text]:
    tally = row.tally
    constructed, against_eager = row.section == "constructed", tally.dx.elements > 0
    return {
        "row": row.name,
        "verdict": Text("passed", "good") if row.ok else Text("FAILED", "bad"),
        "outputs": display.count(tally.outputs),
        "not exact": display.count(tally.differing),
        "not the CPU's": display.count(tally.from_cpu) if on_gpu else "",
        "off by": f"{display.number(tally.off_in_row, digits=3)} ulp" if constructed else "",
        "may be off by": f"{CONSTRUCTED_ULP} ulp" if constructed else "",
        "not eager's": display.share(tally.eager_differing / tally.outputs, 2) if against_eager else "",
        "by ulp": display.number(tally.eager_ulp, digits=2) if against_eager else "",
        "dx": "" if tally.dx.ratio is None else display.factor(tally.dx.ratio),
        "dw": "" if tally.dw.ratio is None else display.factor(tally.dw.ratio),
        "close": display.count(tally.close),
    }
