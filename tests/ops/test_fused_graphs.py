"""Additions around norms under torch.compile, one graph at a time: which are fused, and that no bit changes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rmsnorm
from captured import Capture, EarlyNorm, Sites, assert_equal, assert_pass_keeps_bits
from rmsnorm import rms_norm

pytestmark = pytest.mark.compiled

N = 32
FP32, BF16 = torch.float32, torch.bfloat16


class Model(nn.Module):
    """Two patched norms, `norm` (early) and `late`, one without a weight, and a function that uses them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.norm = EarlyNorm(N)
        self.late = nn.RMSNorm(N, eps=1e-5)
        self.bare = nn.RMSNorm(N, eps=1e-5, elementwise_affine=False)
        self.linear = nn.Linear(N, N, bias=False)
        nn.init.normal_(self.late.weight)
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(self, *tensors)


@dataclass(frozen=True)
class Case:
    """A function of a model and of tensors a, b, c of shape (2, 5, N), and what the pass fuses when it is trained.

    `fused` is None where either is right, as long as the bits stay. The bits of bf16 show where a sum is rounded.
    """

    name: str
    function: Callable[..., Any]
    fused: Sites | None
    dtypes: tuple[torch.dtype, ...] = (BF16,)
    inputs: Callable[[torch.dtype], list[Tensor]] | None = None
    like_eager: bool = True  # autograd adds some gradients in another order when it is traced

    def arguments(self, dtype: torch.dtype) -> list[Tensor]:
        if self.inputs is not None:
            return self.inputs(dtype)
        return [drawn(2, 5, N, seed=seed, dtype=dtype) for seed in range(3)]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def transposed(dtype: torch.dtype) -> list[Tensor]:
    return [drawn(5, 2, N, seed=seed, dtype=dtype).transpose(0, 1) for seed in range(3)]


def special(dtype: torch.dtype) -> list[Tensor]:
    """Rows with signed zeros, infinities, NaN, and values whose squares overflow or vanish."""
    tensors = [drawn(2, 5, N, seed=seed, dtype=dtype) for seed in range(3)]
    for k, t in enumerate(tensors[:2]):
        t[0, 0] = -0.0
        t[0, 1, 3 + k] = float("inf")
        t[0, 2, 3] = float("nan")
        t[0, 3] *= 1e30
        t[0, 4] *= 1e-30
        t[1, 0, ::2] = -0.0
    tensors[1][1, 1] = -tensors[0][1, 1]
    return tensors


# --- the sum, and what uses it -------------------------------------------------------------------------------


def sum_and_norm(m, a, b, c):
    s = a + b
    return m.norm(s), s


def norm_of_sum(m, a, b, c):
    return m.norm(a + b)


def late_norm(m, a, b, c):
    s = a + b
    return m.late(s), s


def norm_without_weight(m, a, b, c):
    s = a + b
    return m.bare(s), s


def users_before_and_after(m, a, b, c):
    s = a + b
    before = s.sin() * c
    y = m.norm(s)
    return before, y, s.cos() * y, s


def two_norms_of_one_sum(m, a, b, c):
    s = a + b
    return m.norm(s), m.late(s)


def three_norms_of_one_sum(m, a, b, c):
    s = a + b
    return m.norm(s), m.late(s), m.bare(s), s


def chain_of_sums(m, a, b, c):
    s = a + b
    t = s + c
    return m.norm(t), t, s


def norms_of_a_chain(m, a, b, c):
    s = a + b
    y = m.norm(s)
    t = s + m.linear(y)
    return m.late(t), t


def norm_of_a_norm_and_its_input(m, a, b, c):
    s = a + b
    return m.late(m.norm(s) + s)


def two_blocks(m, a, b, c):
    h = a
    for norm in (m.norm, m.late):
        h = h + m.linear(norm(h))
    return m.bare(h)


def three_gradients_of_the_norm(m, a, b, c):
    s = a + b
    y = m.norm(s)
    return y * c, y.sin(), y.exp(), s


def gradients_of_projections(m, a, b, c):
    y = m.norm(a)
    return m.linear(y), F.linear(y, c[0]), F.linear(y, c[1])


def three_gradients_of_the_sum(m, a, b, c):
    s = a + b
    return m.norm(s), s * c, s.sin(), s.exp()


def doubled(m, a, b, c):
    return m.norm(a + a)


def doubled_and_returned(m, a, b, c):
    s = a + a
    return m.norm(s), s


def gradient_doubled(m, a, b, c):
    y = m.norm(a * 1.5)
    return y + y


def sum_of_dx_and_its_double(m, a, b, c):
    """Two uses of the rows by norms with the same gradient."""
    s = a * 2
    return m.bare(s) + m.bare(s)


def views_are_returned(m, a, b, c):
    s = a + b
    return m.norm(s), s.view(-1), s[0]


def in_place(m, a, b, c):
    s = m.linear(a)
    s += b
    return m.norm(s), s * c


def in_place_after(m, a, b, c):
    s = m.linear(a)
    t = -s
    s.add_(b)
    return m.norm(s), t


def cast_before_the_sum(m, a, b, c):
    s = a.float() + b.float()
    return m.norm(s), s


def no_gradient_to_the_rows(m, a, b, c):
    s = (a + b).detach()
    return m.norm(s), s * a


def only_the_norms_output_is_detached(m, a, b, c):
    s = a + b
    return m.norm(s).detach(), s * c


def rows_of_one_vector(m, a, b, c):
    s = a[0, 0] + b[0, 0]
    return m.norm(s), s * 2


def columns_of_wider_rows(m, a, b, c):
    wide = torch.cat([a, b], -1)
    s = wide[..., :N] + wide[..., N:]
    return m.norm(s), s


def expanded_operand(m, a, b, c):
    s = a + b[:, :1].expand(2, 5, N)
    return m.norm(s), s * c


# --- what is not fused ---------------------------------------------------------------------------------------


def alpha(m, a, b, c):
    return m.norm(torch.add(a, b, alpha=0.5))


def alpha_two(m, a, b, c):
    return m.norm(torch.add(a, b, alpha=2))


def difference(m, a, b, c):
    return m.norm(a - b)


def broadcast_row(m, a, b, c):
    return m.norm(a + b[0, 0])


def broadcast_rows(m, a, b, c):
    return m.norm(b[:, :1] + a)


def broadcast_column(m, a, b, c):
    return m.norm(a + b[..., :1])


def scalar(m, a, b, c):
    return m.norm(a + 1.25)


def scalar_tensor(m, a, b, c):
    return m.norm(a + b[0, 0, 0])


def cast_after_the_sum(m, a, b, c):
    return m.norm((a + b).double())


def sum_of_weights(m, a, b, c):
    return rms_norm(a, b[0, 0] + c[0, 0])


def unused_norm(m, a, b, c):
    s = a + b
    m.norm(s)
    return s * c


def residual_of_add_rms_norm(m, a, b, c):
    y, s = rmsnorm.add_rms_norm(a, b + c, m.norm.weight)
    return y, s


def rows_of_add_rms_norm(m, a, b, c):
    y, s = rmsnorm.add_rms_norm(a + b, c, m.norm.weight)
    return y, s


def multiple(m, a, b, c):
    """Inductor computes 2 * b in the kernel of the sum, which saves more than a fused norm."""
    return m.norm(a + 2 * b)


def three_gradients_of_a_norm_alone(m, a, b, c):
    y = m.norm(a)
    return m.linear(y), y * c, y.sin()


# --- where either is right -----------------------------------------------------------------------------------


def across_a_view(m, a, b, c):
    s = a + b
    return m.norm(s.view(10, N)).view(2, 5, N), s


def across_a_reshape_of_columns(m, a, b, c):
    s = a + b
    return rms_norm(s.view(2, 5, 2, N // 2), m.norm.weight[: N // 2]), s


def across_a_permute(m, a, b, c):
    s = a + b
    return m.norm(s.transpose(0, 1)), s


def weight_computed_after_a_use_of_the_sum(m, a, b, c):
    """The norm cannot move before the first use of the sum, nor can its dx wait for the gradient of that use."""
    s = a + b
    early = s.sin() * c
    return torch.func.functional_call(m.norm, {"weight": early.mean((0, 1)).exp()}, (s,)), early


def weight_computed_between(m, a, b, c):
    s = a + b
    early = -s
    return torch.func.functional_call(m.norm, {"weight": c[0, 0].exp()}, (s,)), early


def weight_computed_from_the_sum(m, a, b, c):
    s = a + b
    return torch.func.functional_call(m.norm, {"weight": s.mean((0, 1))}, (s,)), s


def weight_computed_before_the_sum(m, a, b, c):
    w = c[0, 0].exp()
    s = a + b
    return torch.func.functional_call(m.norm, {"weight": w}, (s,)), s


def mixed_dtypes(m, a, b, c):
    s = a + b.double()
    return m.norm(s), s


def bf16_and_fp32(m, a, b, c):
    s = a.bfloat16() + b.float()
    return m.norm(s), s


def autocast(m, a, b, c):
    with torch.autocast("cpu", BF16):
        h = a + m.linear(m.norm(a))
        h = h + m.linear(m.late(h))
        return m.norm(h)


def layout_is_relied_on(m, a, b, c):
    s = a + b
    return rms_norm(s, m.norm.weight), s.transpose(0, 1).view(-1)


def checkpointed(m, a, b, c):
    """The sums inside a block are fused; those between blocks are not computed again with the norm after them."""

    def block(h):
        h = h + m.linear(m.norm(h))
        return h + m.linear(m.late(h).sin())

    h = checkpoint(block, a, use_reentrant=False)
    h = checkpoint(block, h, use_reentrant=False)
    return m.bare(h)


def vmapped(m, a, b, c):
    return torch.func.vmap(lambda x, r: m.norm(x + r), in_dims=(0, 0))(a, b)


ONE, FORWARD_ONLY, NONE = Sites(1, 1), Sites(1, 0), Sites(0, 0)
CASES = [
    Case("sum and norm", sum_and_norm, ONE, (FP32, BF16)),
    Case("norm of a sum", norm_of_sum, FORWARD_ONLY),
    Case("late", late_norm, ONE, (FP32, BF16)),
    Case("no weight", norm_without_weight, ONE),
    Case("users before and after", users_before_and_after, ONE, (FP32, BF16)),
    Case("two norms of one sum", two_norms_of_one_sum, ONE),
    Case("three norms of one sum", three_norms_of_one_sum, Sites(1, 3)),
    Case("chain of sums", chain_of_sums, ONE),
    Case("norms of a chain", norms_of_a_chain, Sites(2, 2), (FP32, BF16)),
    Case("norm of a norm and its input", norm_of_a_norm_and_its_input, Sites(2, 1)),
    Case("two blocks", two_blocks, Sites(2, 2), (FP32, BF16)),
    Case("three gradients of the norm", three_gradients_of_the_norm, ONE, (FP32, BF16)),
    Case("gradients of projections", gradients_of_projections, Sites(0, 1), (FP32, BF16)),
    Case("three gradients of the sum", three_gradients_of_the_sum, ONE, (FP32, BF16)),
    Case("a + a", doubled, FORWARD_ONLY),
    Case("a + a, returned", doubled_and_returned, ONE, (FP32, BF16)),
    Case("gradient doubled", gradient_doubled, None),
    Case("the same rows normalized twice", sum_of_dx_and_its_double, None),
    Case("views of the sum are returned", views_are_returned, ONE),
    Case("in place", in_place, ONE),
    Case("in place after a use", in_place_after, FORWARD_ONLY),
    Case("cast before the sum", cast_before_the_sum, ONE),
    Case("no gradient to the rows", no_gradient_to_the_rows, FORWARD_ONLY),
    Case("the norm's output is detached", only_the_norms_output_is_detached, FORWARD_ONLY),
    Case("rows of one vector", rows_of_one_vector, ONE),
    Case("columns of wider rows", columns_of_wider_rows, ONE),
    Case("expanded operand", expanded_operand, ONE),
    Case("fp64", sum_and_norm, None, (torch.float64,)),
    Case("fp16", sum_and_norm, ONE, (torch.float16,)),
    Case("special values", three_gradients_of_the_sum, ONE, (FP32, BF16), inputs=special),
    Case("no rows", sum_and_norm, None, inputs=lambda dtype: [drawn(0, 5, N, dtype=dtype) for _ in range(3)]),
    Case("alpha 0.5", alpha, NONE),
    Case("alpha 2", alpha_two, NONE),
    Case("difference", difference, NONE),
    Case("broadcast row", broadcast_row, NONE),
    Case("broadcast rows", broadcast_rows, NONE),
    Case("broadcast column", broadcast_column, NONE),
    Case("scalar", scalar, NONE),
    Case("tensor of no dimension", scalar_tensor, NONE),
    Case("cast after the sum", cast_after_the_sum, NONE),
    Case("multiple of an operand", multiple, NONE),
    Case("gradients that Inductor adds where it computes them", three_gradients_of_a_norm_alone, NONE),
    Case("sum of weights", sum_of_weights, NONE),
    Case("unused norm", unused_norm, NONE),
    Case("weight computed from the sum", weight_computed_from_the_sum, None),
    Case("residual of add_rms_norm", residual_of_add_rms_norm, None),
    Case("rows of add_rms_norm", rows_of_add_rms_norm, None),
    Case("across a view", across_a_view, None),
    Case("across a reshape of the columns", across_a_reshape_of_columns, None),
    Case("across a permute", across_a_permute, None),
    Case("weight computed from a use of the sum", weight_computed_after_a_use_of_the_sum, None),
    Case("weight computed before the sum", weight_computed_before_the_sum, ONE),
    Case("weight computed between", weight_computed_between, None),
    Case("fp64 and a narrower dtype", mixed_dtypes, None),
    Case("bf16 and fp32", bf16_and_fp32, None, (FP32,)),
    Case("autocast", autocast, None, (FP32,), like_eager=False),
    Case("transposed operands", sum_and_norm, None, inputs=transposed),
    Case("transposed operands, viewed", layout_is_relied_on, None, inputs=transposed),
    Case("checkpointed", checkpointed, Sites(2, 4)),
    Case("vmap inside", vmapped, None, like_eager=False),
]
RUNS = [pytest.param(c, dtype, id=f"{c.name}-{str(dtype).removeprefix('torch.')}") for c in CASES for dtype in c.dtypes]


@pytest.fixture(autouse=True)
def _one_thread(threads, fresh_dynamo) -> None:
    threads(1)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def trained(run: Callable[..., Any], model: nn.Module, given: list[Tensor]) -> dict[str, Any]:
    """What it returns, and all gradients that random gradients of its outputs give."""
    leaves = {str(i): t.clone().requires_grad_() if t.is_contiguous() else t.detach().requires_grad_()
              for i, t in enumerate(given)}  # fmt: skip
    leaves |= dict(model.named_parameters())
    returned = as_tuple(run(*(leaves[str(i)] for i in range(len(given)))))
    differentiable = [y for y in returned if y.requires_grad]
    upstream = [drawn(*y.shape, seed=100 + i, dtype=y.dtype) for i, y in enumerate(differentiable)]
    gradients = torch.autograd.grad(differentiable, list(leaves.values()), upstream, allow_unused=True)
    named = {f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {f"output {i}": y.detach() for i, y in enumerate(returned)} | named


@pytest.fixture
def patched():
    """Makes a patched model of a function, in a dtype, and unpatches it after the test."""
    models = []

    def make(function: Callable[..., Any], dtype: torch.dtype = FP32, **keywords: Any) -> Model:
        model = Model(function).to(dtype)
        rmsnorm.patch(model, **keywords)
        models.append(model)
        return model

    yield make
    for model in models:
        rmsnorm.unpatch(model)


def assert_all_equal(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_equal(got[name], value, name)


@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_training_fuses_the_allowed_additions_and_keeps_all_bits(case, dtype, patched) -> None:
    model, given = patched(case.function, dtype), case.arguments(dtype)
    expected = trained(model, model, given)
    capture = Capture()
    got = trained(torch.compile(model, backend=capture.backend, fullgraph=True, dynamic=False), model, given)
    if case.like_eager:
        assert_all_equal(got, expected)
    assert_pass_keeps_bits(capture)
    if case.fused is not None:
        assert capture.sites == case.fused
    for before, after in capture.saved_bytes:
        assert after <= before, "the pass makes the forward pass keep more"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inference_fuses_the_allowed_additions_and_keeps_all_bits(case, patched) -> None:
    dtype = case.dtypes[-1]
    model, given = patched(case.function, dtype), case.arguments(dtype)
    capture = Capture()
    with torch.no_grad():
        expected = as_tuple(model(*given))
        got = as_tuple(torch.compile(model, backend=capture.backend, fullgraph=True, dynamic=False)(*given))
    assert_all_equal(dict(enumerate(got)), dict(enumerate(expected)))
    assert_pass_keeps_bits(capture)
    if case.fused is not None and case.name != "checkpointed":  # in inference there is nothing to compute again
        assert capture.sites.forward == case.fused.forward


def test_a_graph_with_symbolic_sizes_fuses_as_much_and_keeps_all_bits(patched) -> None:
    """One graph serves all numbers of rows, and fuses as much as a graph of fixed sizes."""
    model, capture = patched(two_blocks, BF16), Capture()
    compiled = torch.compile(model, backend=capture.backend, fullgraph=True, dynamic=True)
    for rows in (5, 7, 3):
        given = [drawn(2, rows, N, seed=seed, dtype=BF16) for seed in range(3)]
        assert_all_equal(trained(compiled, model, given), trained(model, model, given))
    assert len(capture.graphs) == 1
    assert capture.sites == Sites(2, 2)


def test_a_graph_kept_for_another_backward_pass_gives_the_same_bits_again(patched) -> None:
    model, capture = patched(two_blocks, BF16), Capture()
    compiled = torch.compile(model, backend=capture.backend, fullgraph=True, dynamic=False)
    given = [t.requires_grad_() for t in Case("", two_blocks, None).arguments(BF16)[:1]]
    others = Case("", two_blocks, None).arguments(BF16)[1:]
    y = compiled(*given, *others)
    leaves = [*given, *(p for p in model.parameters() if p.requires_grad)]
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.sum(), leaves)
    expected = torch.autograd.grad(model(*given, *others).sum(), leaves)
    assert capture.sites == Sites(2, 2)
    for name, *same in zip(range(len(leaves)), first, second, expected, strict=True):
        assert_equal(same[0], same[2], f"first {name}")
        assert_equal(same[1], same[2], f"second {name}")


def test_frozen_weights_and_a_frozen_stream_keep_all_bits(patched) -> None:
    for frozen in ("norm", "linear", "everything but linear"):
        model, capture = patched(two_blocks, BF16), Capture()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("linear") if "but" in frozen else not name.startswith(frozen))
        leaves = [p for p in model.parameters() if p.requires_grad]
        given = Case("", two_blocks, None).arguments(BF16)
        y = model(*given)
        upstream = drawn(*y.shape, seed=9, dtype=BF16)
        expected = torch.autograd.grad(y, leaves, upstream)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=capture.backend, fullgraph=True, dynamic=False)
        got = torch.autograd.grad(compiled(*given), leaves, upstream)
        assert capture.sites == Sites(2, 1), frozen  # the first norm needs no dx, as nothing before it does
        assert_pass_keeps_bits(capture)
        for i, (gradient, same) in enumerate(zip(got, expected, strict=True)):
            assert_equal(gradient, same, f"{frozen}: gradient {i}")


def adds_to_its_input(m, a, b, c):
    a += b
    y = m.norm(a)
    a.mul_(2)
    return y, a + c


def overwrites_its_input(m, a, b, c):
    s = a + b
    a.zero_()
    b.fill_(1)
    return m.norm(s), s


@pytest.mark.parametrize("function", [adds_to_its_input, overwrites_its_input])
def test_inputs_that_the_model_modifies_have_the_same_values_afterwards(function, patched) -> None:
    model, capture = patched(function), Capture()
    results = []
    for run in (model, torch.compile(model, backend=capture.backend, fullgraph=True, dynamic=False)):
        given = [t.clone() for t in Case("", function, None).arguments(FP32)]
        with torch.no_grad():
            results.append([*run(*given), *given])
    for i, (got, expected) in enumerate(zip(*results, strict=True)):
        assert_equal(got, expected, str(i))
    assert capture.sites == Sites(1, 0)
    assert_pass_keeps_bits(capture)
