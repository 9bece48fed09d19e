"""The cases of `rmsnorm verify`, and the rows of the sweep that they are grouped into."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rmsnorm.errors import CommandError
from rmsnorm.spec import Activation, Cast, Gate, Spec, gated_dtype, result_dtype, sum_dtype
from rmsnorm.tools.verify.bounds import NARROW
from rmsnorm.tools.verify.layouts import LAYOUTS, ORTHOGONAL, ROUNDING_BOUNDARY, SPECIAL_VALUES


@dataclass(frozen=True)
class VerifyCase:
    """One call of the norm, forward and backward.

    Attributes:
        x: The dtype of x.
        w: The dtype of the weight; None for no weight.
        cast: "early", "late" or "first".
        offset: What is added to the weight.
        M: The number of rows.
        N: The width of the rows.
        form: A key of `LAYOUTS`, or the name of a kind of special values.
        eps: The epsilon of the norm.
        residual: The dtype of the residual; None for a norm without a residual.
        sharding: How the tensors are sharded, a key of `ranks.SHARDINGS`; empty for a single process.
        summands: How many gradients of y the operator `backward_of_sum` adds to compute dx and dw; 0 if autograd
            computes them.
        gate: The dtype of the gate of a gated norm; None for a norm without a gate.
        activation: Of a gated norm, like the following: "silu" or "sigmoid".
        gate_first: Whether x is multiplied by the gate before it is normalized.
        groups: The number of groups of a row.
        heads: How many weights there are, one for each head; x is then (M / heads, heads, N). 1 for a single weight.
    """

    x: torch.dtype
    w: torch.dtype | None
    cast: Cast
    offset: float
    M: int
    N: int
    form: str = "contiguous"
    eps: float = 1e-6
    residual: torch.dtype | None = None
    sharding: str = ""
    summands: int = 0
    gate: torch.dtype | None = None
    activation: Activation = "silu"
    gate_first: bool = False
    groups: int = 1
    heads: int = 1

    @property
    def outputs(self) -> int:
        """The number of elements of y."""
        return self.M * self.N

    @property
    def s(self) -> torch.dtype:
        """The dtype of the tensor that is normalized: x, or x + residual."""
        return sum_dtype(self.x, self.residual)

    @property
    def y(self) -> torch.dtype:
        """The dtype of y."""
        if self.gate is not None:
            return gated_dtype(self.x, self.w, self.gated_spec)
        return result_dtype(self.s, self.w, self.cast)

    @property
    def gated_spec(self) -> Spec:
        """The spec of a gated norm."""
        return Spec(self.eps, self.cast, gate=Gate(self.activation, self.gate_first), groups=self.groups)


@dataclass(frozen=True)
class SweepRow:
    """A row of the sweep: cases that share their dtypes and are reported together.

    Attributes:
        section: The table that the row belongs to: "spec", "form", "width", "constructed", "gated" or "all".
        name: The name of the row, unique in the sweep.
        cases: What is run.
        seed: The seed of the first case; the following cases have the next ones. It does not depend on which rows
            are selected, so a row that runs alone gets the same numbers.
    """

    section: str
    name: str
    cases: tuple[VerifyCase, ...]
    seed: int = 0


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SPECS: tuple[tuple[Cast, float], ...] = (("early", 0.0), ("late", 0.0), ("late", 1.0))
_EPS = (1e-6, 1e-5, 0.0, 1e-3)
_PRIMES = (67, 127, 251, 509, 1021, 1279, 2039, 4093, 7919)
_MIXED = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float16, torch.float16: torch.float32}


def sweep(quick: bool) -> list[SweepRow]:
    """Return every row: each spec with each pair of dtypes, each layout, each range of widths, constructed, gated.

    Args:
        quick: Whether to use about a sixth of the outputs.

    Returns:
        The rows, each with its own range of seeds.
    """
    rows = []
    widths = (512, 1280, 1021) if quick else (512, 768, 1021, 1280, 1536, 1555, 2048) * 8
    for x in FLOATS:
        for w in (None, *FLOATS):
            for cast, offset in SPECS if w is not None else SPECS[:1]:
                cases = tuple(VerifyCase(x, w, cast, offset, 48, N, eps=_EPS[i % 4]) for i, N in enumerate(widths))
                plus = "1 + weight" if offset else "weight"
                spec = f"{plus} {short_name(w)}, {cast}" if w is not None else "no weight"
                rows.append(SweepRow("spec", f"{short_name(x)}, {spec}", cases))
    M = 96 if quick else 256
    for x in FLOATS:
        for form in list(LAYOUTS)[1:]:
            N = 512 if form == "512 of 576 columns" else 1280
            cases = tuple(VerifyCase(x, x, cast, offset, M, N, form) for cast, offset in SPECS)
            rows.append(SweepRow("form", f"{short_name(x)}, {form}", cases))
        cases = tuple(VerifyCase(x, x, cast, offset, M, 1280, SPECIAL_VALUES, eps=0.0) for cast, offset in SPECS)
        rows.append(SweepRow("form", f"{short_name(x)}, {SPECIAL_VALUES}", cases))
        singles = tuple(
            VerifyCase(x, x, SPECS[i % 3][0], SPECS[i % 3][1], 1, 1024 + i) for i in range(20 if quick else 400)
        )
        rows.append(SweepRow("form", f"{short_name(x)}, one row", singles))
        empty = tuple(VerifyCase(x, x, cast, offset, 0, 1280) for cast, offset in SPECS)
        rows.append(SweepRow("form", f"{short_name(x)}, no rows", empty))
        for other in (x, _MIXED[x]):
            cases = tuple(VerifyCase(x, x, cast, offset, M, 1280, residual=other) for cast, offset in SPECS)
            rows.append(SweepRow("form", f"{short_name(x)}, residual {short_name(other)}", cases))
    scale = 1 << (13 if quick else 17)
    bands: tuple[tuple[str, Iterable[int]], ...] = (
        (f"N 1 to {NARROW - 1}", range(1, NARROW)),
        (f"N {NARROW} to 64", range(NARROW, 65)),
        ("N prime", _PRIMES),
        ("N 576 to 32767", (576, 1536, 2048, 5120, 7168, 8191, 12288, 32767)),
    )
    for x in FLOATS:
        for name, band in bands:
            cases = tuple(
                VerifyCase(x, x, *SPECS[i % 3], max(4, scale // N), N, eps=_EPS[i % 2]) for i, N in enumerate(band)
            )
            rows.append(SweepRow("width", f"{short_name(x)}, {name}", cases))
    for x in FLOATS:
        for form in (ROUNDING_BOUNDARY, ORTHOGONAL):
            cases = tuple(VerifyCase(x, x, cast, offset, M, 2048, form, eps=0.0) for cast, offset in SPECS)
            rows.append(SweepRow("constructed", f"{short_name(x)}, {form}", cases))
    for x in FLOATS:
        cases = tuple(
            VerifyCase(x, x, cast, offset, few, N, form, summands=1 + i)
            for i, (cast, offset) in enumerate(SPECS)
            for few, N, form in ((48, 1280, "contiguous"), (48, 512, "512 of 576 columns"), (4, 16384, "contiguous"))
        )
        rows.append(SweepRow("form", f"{short_name(x)}, gradients to add", cases))
    for x in FLOATS:
        contiguous = tuple(VerifyCase(x, None, "first", 0.0, 48, N, eps=_EPS[i % 4]) for i, N in enumerate(widths))
        sliced = VerifyCase(x, None, "first", 0.0, M, 512, "512 of 576 columns")
        added = VerifyCase(x, None, "first", 0.0, M, 1280, residual=x)
        rows.append(SweepRow("spec", f"{short_name(x)}, no weight, first", (*contiguous, sliced, added)))
    for i, x in enumerate(FLOATS):
        batch = 16 if quick else 64
        cases = tuple(
            VerifyCase(x, (x, _MIXED[x])[j % 2], *SPECS[(i + j) % 3], batch * H, N, form, residual=residual, heads=H)
            for j, (H, N) in enumerate(((32, 128), (5, 64), (8, 1280), (3, 97)))
            for form, residual in (("contiguous", None), ("512 of 576 columns", None), ("contiguous", x))
        )
        rows.append(SweepRow("form", f"{short_name(x)}, a weight for each head", cases))
    rows += _gated_rows(quick)
    return [dataclasses.replace(row, seed=1000 * i) for i, row in enumerate(rows)]


_GATED: tuple[tuple[Cast, Activation, bool], ...] = tuple(
    itertools.product(("early", "late"), ("silu", "sigmoid"), (False, True))
)


def _gated_rows(quick: bool) -> list[SweepRow]:
    """Return the rows of gated norms: every form with each pair of dtypes, each layout, groups and widths.

    There are few outputs, because the reference emulates an fp64 instruction and takes about 500 operations for each.
    """

    def case(i: int, x: torch.dtype, w: torch.dtype | None, M: int, N: int, **more: Any) -> VerifyCase:
        cast, activation, first = _GATED[i % len(_GATED)]
        named = {"eps": _EPS[i % 4], "gate": x, **more}
        return VerifyCase(x, w, cast, 0.0, M, N, activation=activation, gate_first=first, **named)

    every, M = range(len(_GATED)), 16 if quick else 32
    rows = []
    for x, gate in itertools.product(FLOATS, FLOATS):
        cases = tuple(
            case(i + j, x, w, 2 if quick else 6, 1024, gate=gate, groups=groups)
            for i in every
            for j, (w, groups) in enumerate(zip((x, _MIXED[x], None), (1, 8, 2), strict=True))
        )
        rows.append(SweepRow("gated", f"gated {short_name(x)}, gate {short_name(gate)}", cases))
    for x in FLOATS:
        for k, form in enumerate(
            ("512 of 576 columns", "4-D transposed", "columns", "one element off", "dy one row expanded")
        ):
            some = every[k % 2 :: 3] if quick else every
            cases = tuple(case(i, x, x, M, 512, form=form, groups=1 + 3 * (i % 2)) for i in some)
            rows.append(SweepRow("gated", f"gated {short_name(x)}, {form}", cases))
        cases = tuple(case(i, x, x, M, 512, form=SPECIAL_VALUES, eps=0.0, groups=1 + i % 2) for i in every)
        rows.append(SweepRow("gated", f"gated {short_name(x)}, {SPECIAL_VALUES}", cases))
        widths = [(N, 1) for N in (*range(1, NARROW), *_PRIMES, 32767)] + [(20480, 4), (16384, 128), (999, 333)]
        cases = tuple(case(i, x, x, max(1, (1 << (10 if quick else 13)) // N), N, groups=G)
                      for i, (N, G) in enumerate(widths))  # fmt: skip
        rows.append(SweepRow("gated", f"gated {short_name(x)}, widths and groups", cases))
        rows.append(SweepRow("gated", f"gated {short_name(x)}, no rows", (case(0, x, x, 0, 512),)))
    return rows


def select_rows(rows: list[SweepRow], only: Sequence[str]) -> list[SweepRow]:
    """Return the rows whose name contains one of the texts.

    Args:
        rows: The rows of a sweep.
        only: The texts; without any, all rows are returned.

    Returns:
        The selected rows, in order.

    Raises:
        CommandError: If no name contains one of the texts, or a text is empty.
    """
    for text in only:
        if not text or not any(text in row.name for row in rows):
            raise CommandError(f"--only {text!r} matches no row; a row's name is, for example, {rows[0].name!r}")
    return [row for row in rows if not only or any(text in row.name for text in only)]


def short_name(dtype: torch.dtype) -> str:
    """Return "fp32", "bf16" or "fp16"."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
