"""A norm whose output is added to a residual that another norm reads: in one call, with the bits of three."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import rmsnorm
from captured import FORWARD, FORWARD_SANDWICH, Capture, EarlyNorm, assert_pass_keeps_bits, calls
from rmsnorm.ops import residual_fusion

FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
KINDS = [
    (BF16, BF16, BF16, "late", 1.0),  # Gemma's
    (BF16, BF16, BF16, "first", 0.0),
    (BF16, FP32, FP32, "early", 0.0),  # h and s are fp32
    (BF16, FP32, BF16, "early", 0.0),  # h and s are fp32 although x and the residual are bf16
    (FP16, FP16, FP16, "early", 0.0),
    (FP32, FP32, FP32, "late", 0.0),
    (BF16, BF16, FP32, "late", 0.0),  # torch adds tensors of two dtypes
    (FP64, FP64, FP64, "early", 0.0),  # by the reference
]


def inputs(x_dtype: torch.dtype, w_dtype: torch.dtype, residual_dtype: torch.dtype, N: int = 96) -> list[Tensor]:
    """x, its weight, the residual, and the weight of the sum; their rows have different gaps."""
    torch.manual_seed(0)
    x, residual = torch.randn(3, 5, N + 8).to(x_dtype)[..., :N], torch.randn(3, 5, 2 * N).to(residual_dtype)[..., :N]
    return [x, torch.randn(N).to(w_dtype), residual, torch.randn(N).to(w_dtype)]


def apart(x: Tensor, w: Tensor | None, residual: Tensor, w2: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    """What the operator returns, by two norms."""
    h, _, rstd = FORWARD(x, None, w, *options)
    y, s, rstd2 = FORWARD(h, residual, w2, *options)
    return y, s, rstd, rstd2


@pytest.mark.parametrize(("x_dtype", "w_dtype", "residual_dtype", "cast", "offset"), KINDS)
@pytest.mark.usefixtures("runner")
def test_one_call_has_the_bits_of_two_norms(
    x_dtype: torch.dtype, w_dtype: torch.dtype, residual_dtype: torch.dtype, cast: str, offset: float
) -> None:
    given = inputs(x_dtype, w_dtype, residual_dtype)
    given[0][0, 0], given[2][0, 0], given[2][0, 1, 3] = -0.0, -0.0, float("nan")
    for with_rstd in (False, True):
        options = 1e-5, cast, offset, with_rstd
        found, expected = FORWARD_SANDWICH(*given, *options), apart(*given, *options)
        requested = 4 if with_rstd else 2
        assert all(t.numel() == 0 for t in found[requested:])
        for a, b in zip(found[:requested], expected[:requested], strict=True):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            assert a.signbit().equal(b.signbit())


def test_a_norm_without_weight_and_rows_without_elements() -> None:
    x, _, residual, w2 = inputs(FP32, FP32, FP32)
    options = 1e-6, "early", 0.0, True
    for rows, other in ((x, residual), (x[:0], residual[:0])):
        for given in ((rows, None, other, w2), (rows, w2, other, None)):
            assert all(
                a.equal(b) for a, b in zip(FORWARD_SANDWICH(*given, *options), apart(*given, *options), strict=True)
            )


def test_no_python_runs_for_a_planned_call(left_to_python: list[str]) -> None:
    FORWARD_SANDWICH(*inputs(BF16, BF16, BF16), 1e-6, "late", 1.0, True)
    assert left_to_python == []


def test_the_operator_is_refused_where_autograd_would_lose_a_gradient() -> None:
    x, w, residual, w2 = inputs(FP32, FP32, FP32)
    with pytest.raises(RuntimeError, match=r"call rmsnorm.rms_norm and rmsnorm.add_rms_norm instead"):
        FORWARD_SANDWICH(x.requires_grad_(), w, residual, w2, 1e-6, "early", 0.0, True)
    with torch.no_grad():
        torch.library.opcheck(FORWARD_SANDWICH, (x.detach(), w, residual, w2, 1e-6, "early", 0.0, True))


@pytest.mark.parametrize(("x_dtype", "w_dtype", "residual_dtype", "cast", "offset"), KINDS)
def test_a_compiler_is_told_the_dtypes_and_shapes_of_the_outputs(
    x_dtype: torch.dtype, w_dtype: torch.dtype, residual_dtype: torch.dtype, cast: str, offset: float
) -> None:
    given = inputs(x_dtype, w_dtype, residual_dtype)
    for with_rstd in (False, True):
        arguments = *given, 1e-6, cast, offset, with_rstd
        torch.library.opcheck(FORWARD_SANDWICH, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("place", "given", "message"),
    [
        (2, torch.ones(3, 5, 95), r"residual has shape \(3, 5, 95\)"),
        (1, torch.ones(95), r"weight has shape \(95,\)"),
        (3, torch.ones(95), r"weight has shape \(95,\), expected \(96,\).*in the second norm"),
    ],
)
def test_invalid_tensors_are_refused_by_name(place: int, given: Tensor, message: str) -> None:
    tensors = inputs(FP32, FP32, FP32)
    tensors[place] = given
    with pytest.raises(ValueError, match=rf"\[forward_sandwich\] {message}"):
        FORWARD_SANDWICH(*tensors, 1e-6, "early", 0.0, False)


# --- under torch.compile ---------------------------------------------------------------------------------------

N = 32


class Layer(nn.Module):
    """norm -> add -> norm, as in Gemma 2; `variant` changes what stands between the norms."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.before, self.after = EarlyNorm(N), EarlyNorm(N)
        for norm in (self.before, self.after):
            nn.init.normal_(norm.weight)
        if variant == "another eps":
            self.after.variance_epsilon = 1e-3
        self.linear = nn.Linear(N, N, bias=False)
        self.variant = variant

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.variant == "checkpointed":
            h = checkpoint(lambda x: self.before(self.linear(x)), x, use_reentrant=False)
        else:
            h = self.before(self.linear(x))
        if self.variant == "activation":
            h = h.tanh()
        s = h + residual if self.variant == "sum on the left" else residual + h
        y = self.linear(self.after(s))
        return s + y + h if self.variant == "read twice" else s + y


def sandwiches(variant: str, training: bool) -> int:
    """How many pairs of norms the compiler pass fuses, after checking the bits of outputs and gradients."""
    model = Layer(variant).to(BF16)
    rmsnorm.patch(model)
    given = [torch.randn(2, 5, N, dtype=BF16) for _ in range(2)]
    capture = Capture()
    try:
        compiled = torch.compile(model, backend=capture.backend, fullgraph=True, dynamic=False)
        with torch.set_grad_enabled(training):
            expected, found = model(*given), compiled(*given)
        assert found.equal(expected)
        if training:
            of_eager, of_compiled = (
                torch.autograd.grad(y.float().square().sum(), list(model.parameters())) for y in (expected, found)
            )
            assert all(a.equal(b) for a, b in zip(of_compiled, of_eager, strict=True))
    finally:
        rmsnorm.unpatch(model)
    assert_pass_keeps_bits(capture)
    (graph,) = capture.graphs
    return len(calls(graph.after, FORWARD_SANDWICH))


@pytest.mark.compiled
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("variant", "count"),
    [("plain", 1), ("sum on the left", 1), ("another eps", 0), ("activation", 0), ("read twice", 0)],
)
def test_sandwiched_norms_are_fused_where_nothing_else_reads_between_them(
    variant: str, count: int, training: bool
) -> None:
    assert sandwiches(variant, training) == count


@pytest.mark.compiled
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("training", "count"), [(False, 1), (True, 0)])
def test_a_norm_that_is_computed_again_is_fused_with_none_that_is_not(training: bool, count: int) -> None:
    """The first norm is in a checkpointed region, the second outside. Without gradients nothing is recomputed."""
    assert sandwiches("checkpointed", training) == count


@pytest.mark.parametrize(("early", "count"), [(False, 1), (True, 0)])
def test_a_statistic_that_is_read_between_the_norms_prevents_a_sandwich(early: bool, count: int) -> None:
    """One call for both norms would come after the operator that reads the statistic of the first."""

    def function(x: Tensor, w: Tensor, residual: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        options = 1e-6, "early", 0.0, True
        h, _, rstd = FORWARD(x, None, w, *options, fuse_residual=True)
        added = residual * rstd.unsqueeze(-1) if early else residual
        y, s, rstd2 = FORWARD(h, added, w2, *options, fuse_residual=True)
        return y, s, rstd * 2, rstd2

    given = inputs(FP32, FP32, FP32)
    expected = function(*given)
    graph: fx.GraphModule = make_fx(function, tracing_mode="fake")(*given)
    residual_fusion.fuse(graph.graph)
    graph.graph.lint()
    graph.recompile()
    assert len(calls(graph, FORWARD_SANDWICH)) == count
    assert all(a.equal(b) for a, b in zip(graph(*given), expected, strict=True))
