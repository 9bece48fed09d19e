"""The operators for rows in parts on the CPU: the bits of whole rows, for every dtype, spec, width and memory layout.

The tests call the operators, as sharding.py does with the local tensors of each rank.
"""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from planned import InParts
from rmsnorm import reference
from rmsnorm.kernels import dispatch
from rmsnorm.spec import Spec
from test_kernels import FLOATS, FORMS, NANS, SPECS, output_dtype, short, special
from tolerance import assert_same_bits

pytestmark = pytest.mark.usefixtures("poisoned")

OPS = torch.ops.rmsnorm


def in_parts(*bounds: int) -> InParts:
    """The norm from calls of the operators for parts with these columns."""

    names = ("begin_forward", "finish_forward", "begin_backward", "finish_backward")
    functions = SimpleNamespace(**{name: getattr(OPS, name).default for name in names})
    return InParts(functions, [slice(a, b) for a, b in itertools.pairwise(bounds)])


def check(
    x: Tensor,
    w: Tensor | None,
    residual: Tensor | None = None,
    *,
    at: tuple[int, ...],
    dy: Tensor | None = None,
    ds: Tensor | None = None,
    cast: str = "early",
    offset: float = 0.0,
    eps: float = 1e-6,
) -> None:
    """Asserts that y, s, rstd, dx and dw have the reference's bits, and that no input was written to.

    at: where parts begin besides the first.
    """
    parts = in_parts(0, *at, x.shape[-1])
    inputs = [t for t in (x, w, residual, dy, ds) if t is not None]
    before = [t.clone() for t in inputs]
    y, s, rstd = parts.forward(x, residual, w, eps, cast, offset, True)
    expected = reference.forward(x, residual, w, eps, cast, offset, True)
    for name, got, right in zip(("y", "s", "rstd"), (y, s, rstd), expected, strict=True):
        if right is not None:
            assert_same_bits(got, right, name)
    rows = x if expected[1] is None else expected[1]
    dy = torch.ones_like(y) if dy is None else dy.to(y.dtype)
    ds = None if ds is None else ds.to(rows.dtype)
    given = dy, ds, rows, w, expected[2], cast, offset, True, w is not None
    for name, got, right in zip(("dx", "dw"), parts.backward(*given), reference.backward(*given), strict=True):
        if right is not None:
            assert_same_bits(got, right, name)
    for now, then in zip(inputs, before, strict=True):
        assert_same_bits(now, then, "an input was written to")


@pytest.mark.parametrize(("cast", "offset"), SPECS)
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_parts_have_the_bits_of_whole_rows(dtype, cast, offset, randn, runner) -> None:
    """Parts of even and odd widths, without columns, and of rows that threads share."""
    for M, N, at in (
        (5, 64, (32,)),
        (3, 67, (33, 34)),
        (4, 5, (0, 2, 5)),
        (300, 1280, (640,)),
        (0, 8, (4,)),
        (2, 1, (1,)),
    ):
        scale = torch.logspace(-3, 2, M)[:, None] if M > 1 else 1.0
        x = (randn(M, N) * scale).to(dtype)
        for w_dtype in (dtype, torch.float32) if offset else (dtype, None):
            w = None if w_dtype is None else randn(N, dtype=w_dtype)
            dy = randn(M, N, dtype=output_dtype(dtype, w_dtype, cast))
            check(x, w, at=at, dy=dy, cast=cast, offset=offset)
            more = {"residual": randn(M, N, dtype=dtype), "ds": randn(M, N, dtype=dtype)}
            check(x, w, at=at, dy=dy, cast=cast, offset=offset, eps=0.0, **more)


@pytest.mark.parametrize(("x", "w", "residual"), list(itertools.permutations(FLOATS)), ids=str)
def test_dtypes_may_differ(x, w, residual, randn) -> None:
    for cast, offset in SPECS:
        check(
            randn(5, 66, dtype=x), randn(66, dtype=w), randn(5, 66, dtype=residual), at=(33,), dy=randn(5, 66),
            ds=randn(5, 66), cast=cast, offset=offset,
        )  # fmt: skip
    check(randn(3, 8).double(), randn(8, dtype=w), at=(4,), dy=randn(3, 8))


@pytest.mark.parametrize(("cast", "offset"), SPECS)
def test_parts_of_heads_with_weights_of_their_own(cast, offset, randn) -> None:
    x, residual, dy, ds = (randn(5, 4, 66) for _ in range(4))
    for at in ((32,), (33, 34)):
        check(x, randn(4, 66), at=at, dy=dy, cast=cast, offset=offset)
        check(x, randn(4, 66), residual, at=at, dy=dy, ds=ds, cast=cast, offset=offset)


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_any_strides(form, randn) -> None:
    for dtype in FLOATS[:2]:
        x, other = (FORMS[form](randn, 64, dtype) for _ in range(2))
        n = x.shape[-1]
        check(x, randn(2 * n, dtype=dtype)[::2], other, at=(n // 2,), dy=other, ds=x)


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_special_numbers_and_nans(dtype, randn) -> None:
    values = torch.tensor(special(dtype), dtype=dtype)
    pairs = torch.cartesian_prod(values, values)
    for eps in (0.0, 1e-6):
        check(pairs, randn(2, dtype=dtype), at=(1,), dy=randn(len(pairs), 2, dtype=dtype), eps=eps)
        check(randn(len(pairs), 2, dtype=dtype), randn(2, dtype=dtype), pairs, at=(1,), dy=pairs.flip(0), eps=eps)
    nans = NANS.view(torch.float32)
    for nan in nans:
        check(randn(3, 4, dtype=dtype), torch.cat([nan[None], randn(3)]), at=(2,), cast="late")


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_a_sum_of_minus_zero_gives_the_bits_of_zero(dtype, randn, runner) -> None:
    """Parts whose products are all -0.0 add up to either zero, depending on the order."""
    x, w, rstd = randn(3, 8, dtype=dtype).abs(), randn(8, dtype=dtype).abs(), torch.rand(3)
    dy, zeros = torch.full_like(x, -0.0), torch.zeros(3, dtype=torch.float64)
    for S in (zeros, -zeros):
        dx, dw = OPS.finish_backward.default(dy, None, x, w, rstd, S, 16, "early", 0.0, True)
        expected = reference.finish_backward(dy, None, x, w, rstd, zeros, 16, "early", 0.0, True)
        for got, right in zip((dx, dw), expected, strict=True):
            assert_same_bits(got, right)
            assert got.signbit().equal(right.signbit())


def test_outputs_are_written_inside_their_memory(randn, monkeypatch) -> None:
    """Around each output lies a sentinel, which stays."""
    empty, buffers = torch.empty, []

    def inside(shape: Any, *, dtype: torch.dtype, device: Any) -> Tensor:
        buffer = torch.full((torch.Size(shape).numel() + 128,), -77.0, dtype=dtype, device=device)
        buffers.append(buffer)
        return buffer[64 : buffer.numel() - 64].view(shape)

    x, w = randn(7, 63, dtype=torch.bfloat16), randn(63, dtype=torch.bfloat16)
    rstd, S, spec = torch.rand(7), torch.rand(7, dtype=torch.float64), Spec()
    monkeypatch.setattr(torch, "empty", inside)
    dispatch.begin_forward(x, x)
    dispatch.finish_forward(x, w, S, 126, spec, True)
    dispatch.begin_backward(x, x, w, rstd, spec)
    dispatch.finish_backward(x, x, x, w, rstd, S, 126, spec, True)
    monkeypatch.setattr(torch, "empty", empty)
    assert len(buffers) >= 8  # s, S, y, rstd, S, dx, dw and its partial sums
    for buffer in buffers:
        assert (torch.cat([buffer[:64], buffer[-64:]]) == -77.0).all()


def test_no_python_runs_for_a_planned_call(left_to_python, randn) -> None:
    for dtype in FLOATS:
        check(randn(5, 64, dtype=dtype), randn(64, dtype=dtype), randn(5, 64, dtype=dtype), at=(32,), ds=randn(5, 64))
    assert left_to_python == []
    OPS.begin_forward.default(randn(2, 8), randn(2, 8, dtype=torch.float16))  # torch adds them
    assert left_to_python == ["begin_forward"]


def test_operators_are_opaque_and_their_shapes_are_known(randn) -> None:
    x, w, S, rstd = randn(3, 8), randn(8), torch.rand(3).double(), torch.rand(3)
    for name, arguments in (
        ("begin_forward", (x, x)),
        ("begin_forward", (x[:, :0], None)),
        ("begin_forward", (x.bfloat16(), x)),
        ("finish_forward", (x.bfloat16(), w, S, 16, 1e-6, "early", 0.0, True)),
        ("finish_forward", (x, w, S, 16, 1e-6, "early", 0.0, True)),
        ("begin_backward", (x, x, w, rstd, "early", 0.0)),
        ("finish_backward", (x, None, x, w, rstd, S, 16, "early", 0.0, True)),
    ):
        torch.library.opcheck(getattr(OPS, name).default, arguments)
        found = getattr(OPS, name).default(x.clone().requires_grad_(), *arguments[1:])
        y = found if isinstance(found, Tensor) else found[0]
        with pytest.raises(RuntimeError, match=rf"^\[torch.ops.rmsnorm.{name}\] the operator has no derivative: call"):
            y.sum().backward()


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        (
            "begin_forward",
            {"residual": torch.ones(2, 7)},
            ValueError,
            r"residual has shape \(2, 7\), expected \(2, 8\)",
        ),
        ("begin_forward", {"x": torch.ones(2, 8, dtype=torch.int32)}, TypeError, "x has dtype torch.int32"),
        ("begin_forward", {"x": torch.ones(())}, ValueError, r"x has shape \(\), expected \(..., n\)"),
        ("finish_forward", {"S": torch.ones(3).double()}, ValueError, r"S has shape \(3,\), expected \(2,\)"),
        ("finish_forward", {"S": torch.ones(2)}, TypeError, "S has dtype torch.float32, expected float64"),
        ("finish_forward", {"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\), expected \(8,\)"),
        ("finish_forward", {"N": 0}, ValueError, "N is 0, expected the width of whole rows"),
        ("finish_forward", {"cast": "soon"}, ValueError, "cast is 'soon'"),
        (
            "begin_backward",
            {"rstd": torch.ones(2).double()},
            TypeError,
            "rstd has dtype torch.float64.*in the backward",
        ),
        ("finish_backward", {"dy": torch.ones(2, 7)}, ValueError, r"dy has shape \(2, 7\).*in the backward pass"),
    ],
)
def test_invalid_arguments_are_refused_by_name(name, change, error, message) -> None:
    x, w, S, rstd = torch.ones(2, 8), torch.ones(8), torch.ones(2).double(), torch.ones(2)
    spec: dict[str, Any] = {"cast": "early", "offset": 0.0}
    given: dict[str, dict[str, Any]] = {
        "begin_forward": {"x": x, "residual": None},
        "finish_forward": {"x": x, "weight": w, "S": S, "N": 16, "eps": 1e-6, **spec, "with_rstd": True},
        "begin_backward": {"dy": x, "x": x, "weight": w, "rstd": rstd, **spec},
        "finish_backward": {
            "dy": x, "ds": None, "x": x, "weight": w, "rstd": rstd, "S": S, "N": 16, **spec, "need_dw": True,
        },
    }  # fmt: skip
    with pytest.raises(error, match=message):
        getattr(OPS, name)(**(given[name] | change))


def test_a_freed_tensor_is_refused() -> None:
    x, freed = torch.ones(2, 8), torch.ones(8)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="weight has a storage of 0 bytes"):
        OPS.finish_forward(x, freed, torch.ones(2).double(), 16, 1e-6, "early", 0.0, True)
