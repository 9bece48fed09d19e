"""Two norms in one call have the bits of two calls, eager, compiled, differentiated and batched."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rmsnorm
from captured import Capture, EarlyNorm, assert_pass_keeps_bits
from rmsnorm.ops import pairing

PAIR, BACKWARD_PAIR = torch.ops.rmsnorm.forward_pair.default, torch.ops.rmsnorm.backward_pair.default
FORWARD, BACKWARD = torch.ops.rmsnorm.forward.default, torch.ops.rmsnorm.backward.default
KINDS = [
    (torch.bfloat16, torch.bfloat16, "early", 0.0),
    (torch.bfloat16, torch.float32, "early", 0.0),
    (torch.float16, torch.float32, "late", 1.0),
    (torch.float32, torch.float32, "late", 0.0),
    (torch.float64, torch.float64, "early", 0.0),  # by the reference
]


def inputs(x_dtype: torch.dtype, w_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x and weight of two norms of other shapes; the second x is a strided part of a tensor."""
    torch.manual_seed(0)
    x, x2 = torch.randn(3, 5, 96, dtype=x_dtype), torch.randn(7, 80, dtype=x_dtype)[:, :64]
    return x, torch.randn(96, dtype=w_dtype), x2, torch.randn(64, dtype=w_dtype)


@pytest.mark.parametrize(("x_dtype", "w_dtype", "cast", "offset"), KINDS)
@pytest.mark.usefixtures("runner")
def test_a_pair_has_the_bits_of_two_calls(x_dtype: torch.dtype, w_dtype: torch.dtype, cast: str, offset: float) -> None:
    x, w, x2, w2 = inputs(x_dtype, w_dtype)
    found = PAIR(x, w, x2, w2, 1e-5, cast, offset, True)
    y, _, rstd = FORWARD(x, None, w, 1e-5, cast, offset, True)
    y2, _, rstd2 = FORWARD(x2, None, w2, 1e-5, cast, offset, True)
    for a, b in zip(found, (y, rstd, y2, rstd2), strict=True):
        assert a.dtype is b.dtype
        assert a.equal(b)
    dy, dy2 = torch.randn_like(y), torch.randn_like(y2)
    for needs in ((True, True), (True, False), (False, True)):
        gradients = BACKWARD_PAIR(dy, x, w, rstd, dy2, x2, w2, rstd2, cast, offset, *needs)
        apart = (
            *BACKWARD(dy, None, x, w, rstd, cast, offset, *needs),
            *BACKWARD(dy2, None, x2, w2, rstd2, cast, offset, *needs),
        )
        for a, b in zip(gradients, apart, strict=True):
            assert a.dtype is b.dtype
            assert a.equal(b)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_rms_norms_has_the_bits_and_gradients_of_rms_norm(count: int) -> None:
    torch.manual_seed(1)
    xs = [torch.randn(2, 16 * (i + 1), dtype=torch.bfloat16, requires_grad=True) for i in range(count)]
    weights = [torch.randn(x.shape[-1], dtype=torch.bfloat16, requires_grad=True) if i else None
               for i, x in enumerate(xs)]  # fmt: skip
    with torch.no_grad():
        found = rmsnorm.rms_norms(xs, weights, 1e-5)
    apart = [rmsnorm.rms_norm(x, w, 1e-5) for x, w in zip(xs, weights, strict=True)]
    assert [y.tolist() for y in found] == [y.tolist() for y in apart]
    compiled = torch.compile(rmsnorm.rms_norms, backend="aot_eager", fullgraph=True)
    for function in (rmsnorm.rms_norms, compiled):
        recorded = function(xs, weights, 1e-5)
        given = [t for t in (*xs, *weights) if t is not None]
        if not given:
            continue
        a, b = (
            torch.autograd.grad([y.float().sin().sum() for y in each], given, retain_graph=True)
            for each in (recorded, apart)
        )
        assert all(p.equal(q) for p, q in zip(a, b, strict=True))


def test_only_the_gradients_that_are_needed_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, x2, w2 = inputs(torch.float32, torch.float32)
    x.requires_grad_()
    w2.requires_grad_()
    y, _, y2, _ = PAIR(x, w, x2, w2, 1e-6, "early", 0.0, True)
    (dx, dw2) = torch.autograd.grad([y.sum(), y2.sum()], [x, w2])
    expected = torch.autograd.grad(rmsnorm.rms_norm(x, w).sum() + rmsnorm.rms_norm(x2, w2).sum(), [x, w2])
    assert dx.equal(expected[0])
    assert dw2.equal(expected[1])
    (alone,) = torch.autograd.grad(PAIR(x, w, x2, w2, 1e-6, "early", 0.0, True)[0].sum(), [x])
    assert alone.equal(dx)


def test_vmap_and_opcheck_accept_the_operators() -> None:
    x, w, x2, w2 = inputs(torch.float32, torch.float32)
    batched = torch.vmap(lambda x, x2: PAIR(x, w, x2, w2, 1e-6, "early", 0.0, False)[::2])
    y, y2 = batched(x, x2[:3, None])
    assert y.equal(rmsnorm.rms_norm(x, w))
    assert y2[:, 0].equal(rmsnorm.rms_norm(x2[:3], w2))
    torch.library.opcheck(PAIR, (x.requires_grad_(), w, x2, w2, 1e-6, "early", 0.0, True))


def test_no_python_runs_for_a_planned_call(left_to_python: list[str]) -> None:
    for x_dtype, w_dtype, cast, offset in KINDS[:2]:
        x, w, x2, w2 = inputs(x_dtype, w_dtype)
        y, rstd, y2, rstd2 = PAIR(x, w, x2, w2, 1e-6, cast, offset, True)
        if y.dtype is x.dtype:  # otherwise torch converts the weight
            BACKWARD_PAIR(y, x, w, rstd, y2, x2, w2, rstd2, cast, offset, True, True)
    assert left_to_python == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"xs": torch.ones(2, 8)}, TypeError, "xs is a Tensor, expected a list or tuple of tensors"),
        ({"weights": [None]}, ValueError, "weights has 1 entries, expected 2, one for each x"),
        ({"xs": [torch.ones(2, 8), "x"]}, TypeError, "x is a str, expected a torch.Tensor"),
        ({"weights": [None, torch.ones(7)]}, ValueError, r"weight has shape \(7,\), expected \(4,\)"),
        ({"eps": -1.0}, ValueError, "eps is -1.0"),
    ],
)
def test_invalid_arguments_are_refused_by_name(change: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=rf"\[rms_norms\] {message}"):
        rmsnorm.rms_norms(**{"xs": [torch.ones(2, 8), torch.ones(3, 4)], **change})


def test_the_operator_names_the_norm_that_does_not_fit() -> None:
    x, w, x2, _ = inputs(torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"weight has shape \(96,\), expected \(64,\).*second norm of a pair"):
        PAIR(x, w, x2, w, 1e-6, "early", 0.0, False)
    with pytest.raises(ValueError, match="is on meta, expected cpu"):
        PAIR(x, w, x2.to("meta"), None, 1e-6, "early", 0.0, False)


# --- the pass of torch.compile --------------------------------------------------------------------------------


class Attention(nn.Module):
    """Queries and keys with norms, after a norm of the input; `variant` changes the keys or their norm."""

    def __init__(self, variant: str = "plain") -> None:
        super().__init__()
        self.before, self.q_norm, self.k_norm = (EarlyNorm(16).bfloat16() for _ in range(3))
        self.q, self.k = (nn.Linear(16, 16, bias=False, dtype=torch.bfloat16) for _ in range(2))
        self.variant = variant
        if variant == "another eps":
            self.k_norm.variance_epsilon = 1e-3
        if variant == "late":
            self.k_norm = nn.RMSNorm(16, eps=1e-6, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        q = self.q_norm(self.q(x))
        k = self.k(q if self.variant == "chained" else x)
        k = self.k_norm(k + x if self.variant == "residual" else k)
        return (q * k).sin()


def counted(model: nn.Module, x: Tensor, training: bool) -> tuple[int, int]:
    """How many pairs the pass makes, forward and backward, after checking the bits of outputs and gradients."""
    rmsnorm.patch(model)
    torch._dynamo.reset()
    capture = Capture()
    with torch.set_grad_enabled(training):
        y = model(x)
        made = torch.compile(model, backend=capture.backend, fullgraph=True)(x)
        assert made.equal(y)
        if training:
            expected, found = (
                torch.autograd.grad(each.float().square().sum(), list(model.parameters())) for each in (y, made)
            )
            assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    assert_pass_keeps_bits(capture)
    (graph,) = capture.graphs
    return tuple(len(graph.after.graph.find_nodes(op="call_function", target=op)) for op in (PAIR, BACKWARD_PAIR))


@pytest.mark.compiled
@pytest.mark.parametrize("training", [False, True])
def test_norms_of_queries_and_keys_are_paired_and_keep_all_bits(training: bool) -> None:
    torch.manual_seed(0)
    assert counted(Attention(), torch.randn(5, 16, dtype=torch.bfloat16), training) == (1, int(training))


@pytest.mark.compiled
def test_a_norm_that_depends_on_the_other_is_not_paired_with_it() -> None:
    torch.manual_seed(0)
    assert counted(Attention("chained"), torch.randn(5, 16, dtype=torch.bfloat16), True) == (0, 0)


@pytest.mark.compiled
@pytest.mark.parametrize(("variant", "backward"), [("late", 0), ("another eps", 1), ("residual", 1)])
def test_norms_that_differ_are_not_paired(variant: str, backward: int) -> None:
    """The backward pass depends on neither eps nor a residual whose sum nothing else reads."""
    torch.manual_seed(0)
    assert counted(Attention(variant), torch.randn(5, 16, dtype=torch.bfloat16), True) == (0, backward)


@pytest.mark.compiled
def test_norms_of_many_elements_are_not_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(pairing, "MOST_ELEMENTS", 79)
    assert counted(Attention(), torch.randn(5, 16, dtype=torch.bfloat16), True) == (0, 0)
