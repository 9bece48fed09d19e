"""reference.py: its bits are those of the published classes, and its gradients are close to the fp64 truth."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RMSNorm
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4UnweightedRMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from rmsnorm import reference
from tolerance import (
    DEFINITION_SHARE,
    DEFINITION_ULP,
    FIRST_ROWS,
    FP32_GRADIENT_FROM_N,
    FP32_GRADIENT_NARROW,
    FP32_GRADIENT_OF_EAGER,
    GRADIENT_ELEMENTS,
    HALF_GRADIENT_CAST_TIE,
    HALF_GRADIENT_OF_EAGER,
    HALF_GRADIENT_TIE,
    assert_same_bits,
    ordered,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PUBLISHED = {
    DeepseekV2RMSNorm: ("early", 0.0),
    LlamaRMSNorm: ("early", 0.0),
    T5LayerNorm: ("early", 0.0),
    GptOssRMSNorm: ("late", 0.0),
    Gemma2RMSNorm: ("late", 1.0),
}
PAIRS = [
    pytest.param(cls, w, x, id=f"{cls.__name__}-{w}-{x}".replace("torch.", ""))
    for cls in PUBLISHED
    for w in FLOATS
    for x in FLOATS
    if w == x or cls is not T5LayerNorm  # with mixed dtypes T5 skips the cast: another function
]


def module(cls: type[nn.Module], w: Tensor, eps: float) -> nn.Module:
    norm = cls(w.shape[0], eps)
    norm.weight = nn.Parameter(w.clone())
    return norm


@pytest.mark.parametrize(("cls", "w_dtype", "x_dtype"), PAIRS)
def test_published_gives_the_bits_of_each_class_run_eagerly(cls, w_dtype, x_dtype, randn) -> None:
    cast, offset = PUBLISHED[cls]
    for N, eps in ((1, 1e-6), (64, 0.0), (127, 1e-5), (1280, 1e-6)):
        # In half of the rows the mean square is about as large as eps, so that eps matters.
        x = torch.cat([randn(32, N), randn(32, N, scale=2e-3)]).to(x_dtype)
        w = randn(N, dtype=w_dtype)
        y = reference.published(x, w, eps, cast, offset)
        assert_same_bits(y, module(cls, w, eps)(x), f"N={N} eps={eps}")


@pytest.mark.parametrize("x_dtype", [*FLOATS, torch.float64])
def test_published_gives_the_bits_of_the_class_of_deepseek_v4_without_a_weight(x_dtype, randn) -> None:
    for N, eps in ((1, 1e-6), (64, 0.0), (127, 1e-5), (1280, 1e-6)):
        x = torch.cat([randn(32, N), randn(32, N, scale=2e-3)]).to(x_dtype)
        y = reference.published(x, None, eps, "first", 0.0)
        assert_same_bits(y, DeepseekV4UnweightedRMSNorm(eps)(x), f"N={N} eps={eps}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_first_gives_the_bits_of_its_class_but_in_rows_whose_statistic_rounds_otherwise(dtype, randn) -> None:
    """The class's statistic is an fp32 ulp or two off, which matters if a rounding boundary of 16 bits lies between."""
    x = randn(4096, 320, dtype=dtype)
    exact = reference.forward(x, None, None, 1e-6, "first", 0.0, False)[0]
    apart = (ordered(exact) - ordered(DeepseekV4UnweightedRMSNorm(1e-6)(x))).abs()
    assert apart.max() <= DEFINITION_ULP["first"]
    assert (apart > 0).any(-1).float().mean() <= FIRST_ROWS[dtype]
    assert (exact != reference.forward(x, None, None, 1e-6, "early", 0.0, False)[0]).float().mean() > 0.05


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_gradient_of_first_is_no_worse_than_that_of_its_class(dtype, randn) -> None:
    x, dy = randn(256, 320, dtype=dtype), randn(256, 320, dtype=dtype)
    rstd = reference.exact_rstd(x, 1e-6)
    dx = reference.backward(dy, None, x, None, rstd, "first", 0.0, True, False)[0]
    eager, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    (theirs,) = torch.autograd.grad(DeepseekV4UnweightedRMSNorm(1e-6)(eager), eager, dy)
    (truth,) = torch.autograd.grad(reference.truth(wide, None, 1e-6, 0.0), wide, dy.double())
    ours, eagers = ((d.double() - truth).norm() for d in (dx, theirs))
    assert ours <= eagers * (FP32_GRADIENT_OF_EAGER if dtype == torch.float32 else HALF_GRADIENT_OF_EAGER)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_early_and_late_give_different_bits_in_16_bits(dtype, randn) -> None:
    x, w = randn(64, 1280, dtype=dtype), randn(1280, dtype=dtype)
    for statistic in (
        lambda cast: reference.published(x, w, 1e-6, cast, 0.0),
        lambda cast: reference.forward(x, None, w, 1e-6, cast, 0.0, False)[0],
    ):
        share = (statistic("early") != statistic("late")).float().mean()
        # A second rounding shows unless it falls where one rounding would: it does about 3 times in 10.
        assert share > 0.1


def test_exact_and_published_differ_in_fp32(randn) -> None:
    x, w = randn(512, 1280), randn(1280)
    exact = reference.forward(x, None, w, 1e-6, "early", 0.0, False)[0]
    assert (exact != reference.published(x, w, 1e-6, "early", 0.0)).any()


@pytest.mark.parametrize("cast", ["early", "late"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_differs_from_the_class_in_no_more_outputs_than_the_contract_allows(dtype, cast, randn) -> None:
    x, w = randn(1024, 1280, dtype=dtype), randn(1280, dtype=dtype)
    exact = reference.forward(x, None, w, 1e-6, cast, 0.0, False)[0]
    eager = module(DeepseekV2RMSNorm if cast == "early" else GptOssRMSNorm, w, 1e-6)(x)
    apart = (ordered(exact) - ordered(eager)).abs()
    assert apart.max() <= DEFINITION_ULP[cast]
    assert (apart > 0).float().mean() <= DEFINITION_SHARE[dtype]


def steps(x: Tensor, w: Tensor | None, eps: float, cast: str, offset: float) -> Tensor:
    """The arithmetic of docs/contract.md, one number at a time, with every rounding to fp32 written out."""
    f = torch.float32
    y = []
    for row in x.reshape(-1, x.shape[-1]):
        S = sum(float(a) * float(a) for a in row)
        v = torch.tensor(S / x.shape[-1], dtype=f) + torch.tensor(eps, dtype=f)
        root = torch.tensor(float(v) ** 0.5, dtype=f)
        rstd = torch.tensor(1.0, dtype=f) / root
        h = row * rstd.to(x.dtype) if cast == "first" else row.to(f) * rstd
        if w is None:
            y.append(h.to(x.dtype))
        elif cast in ("early", "first"):
            y.append(w * h.to(x.dtype))
        else:
            scale = w.to(f) + torch.tensor(offset, dtype=f) if offset else w.to(f)
            y.append((scale * h).to(x.dtype))
    return torch.stack(y).reshape(x.shape)


@pytest.mark.parametrize(("cast", "offset"), [("early", 0.0), ("late", 0.0), ("late", 1.0), ("first", 0.0)])
@pytest.mark.parametrize("x_dtype", [*FLOATS, torch.float64])
def test_forward_gives_the_bits_of_the_arithmetic_written_out_by_hand(x_dtype, cast, offset, randn) -> None:
    x = randn(2, 24, 37, dtype=x_dtype)
    for w in (None, *(randn(37, dtype=w_dtype) for w_dtype in (*FLOATS, torch.float64))):
        if w is None and offset:
            continue
        for eps in (0.0, 1e-6, 0.3):
            y, s, rstd = reference.forward(x, None, w, eps, cast, offset, True)
            assert_same_bits(y, steps(x, w, eps, cast, offset), f"w={None if w is None else w.dtype} eps={eps}")
            assert s is None
            assert rstd is not None
            assert rstd.shape == x.shape[:-1]
            assert rstd.dtype == torch.float32
            late = w is None or cast == "late"
            assert y.dtype == (x.dtype if late else torch.promote_types(w.dtype, x.dtype))


@pytest.mark.parametrize("r_dtype", FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_the_sum_with_the_residual_is_rounded_before_it_is_normalized(x_dtype, r_dtype, randn) -> None:
    x, residual, w = randn(16, 64, dtype=x_dtype), randn(16, 64, dtype=r_dtype), randn(64, dtype=x_dtype)
    y, s, _ = reference.forward(x, residual, w, 1e-6, "early", 0.0, False)
    assert_same_bits(s, (x + residual).to(torch.promote_types(x_dtype, r_dtype)), "s")
    assert_same_bits(y, reference.forward(s, None, w, 1e-6, "early", 0.0, False)[0], "y")


# --- the derivative ------------------------------------------------------------------------------------------

CLASS = {("early", 0.0): DeepseekV2RMSNorm, ("late", 0.0): GptOssRMSNorm, ("late", 1.0): Gemma2RMSNorm}
Gradients = tuple[Tensor, Tensor]


def ours(x: Tensor, w: Tensor, dy: Tensor, eps: float, cast: str, offset: float) -> Gradients:
    rstd = reference.forward(x, None, w, eps, cast, offset, True)[2]
    return reference.backward(dy, None, x, w, rstd, cast, offset, True, True)


def eagers(x: Tensor, w: Tensor, dy: Tensor, eps: float, cast: str, offset: float) -> Gradients:
    norm = module(CLASS[cast, offset], w, eps)
    x = x.clone().requires_grad_()
    return torch.autograd.grad(norm(x), (x, norm.weight), dy)


def truths(x: Tensor, w: Tensor, dy: Tensor, eps: float, cast: str, offset: float) -> Gradients:
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    return torch.autograd.grad(reference.truth(x, w, eps, offset), (x, w), dy.double())


def gathered(how: Callable[..., Gradients], draws: list[tuple[Tensor, ...]], *spec: object) -> Gradients:
    dx, dw = zip(*(how(*draw, *spec) for draw in draws), strict=True)
    return torch.cat([t.double().flatten() for t in dx]), torch.cat([t.double() for t in dw])


@pytest.mark.parametrize(("cast", "offset"), list(CLASS))
@pytest.mark.parametrize(("w_dtype", "x_dtype"), [(w, x) for w in FLOATS for x in FLOATS if w in (x, torch.float32)])
@pytest.mark.parametrize("N", [1, 2, 3, 7, 16, 127, 1280])
def test_gradients_are_no_further_from_fp64_than_those_of_eager(N, w_dtype, x_dtype, cast, offset, randn) -> None:
    # dw has only N elements a draw: for narrow rows its bound is held over fewer draws with many rows each.
    count = min(-(-GRADIENT_ELEMENTS // N), 64)
    rows = max(-(-GRADIENT_ELEMENTS // (N * count)), 16)
    y_dtype = torch.promote_types(w_dtype, x_dtype) if cast == "early" else x_dtype
    draws = [
        (randn(rows, N, dtype=x_dtype), randn(N, dtype=w_dtype), randn(rows, N, dtype=y_dtype)) for _ in range(count)
    ]
    spec = (1e-6, cast, offset)
    true, got, eager = (gathered(how, draws, *spec) for how in (truths, ours, eagers))
    assert got[0].numel() >= GRADIENT_ELEMENTS
    scale = gathered(unit, draws, *spec)
    for label, g, e, t, d in zip(("dx", "dw"), got, eager, true, scale, strict=True):
        error = (g - t).norm()
        if x_dtype == torch.float32 and N < FP32_GRADIENT_FROM_N:
            bound = FP32_GRADIENT_NARROW * d.norm()
        elif x_dtype == torch.float32:
            bound = FP32_GRADIENT_OF_EAGER * (e - t).norm()
        elif cast == "late":
            bound = HALF_GRADIENT_OF_EAGER * (e - t).norm() + HALF_GRADIENT_TIE * d.norm()
        elif label == "dw" and w_dtype == torch.float32:
            bound = HALF_GRADIENT_CAST_TIE[x_dtype] * (e - t).norm()
        else:
            bound = HALF_GRADIENT_OF_EAGER * (e - t).norm()
        assert error <= bound, label


def unit(x: Tensor, w: Tensor, dy: Tensor, eps: float, cast: str, offset: float) -> Gradients:
    """The units for the errors of dx and dw of narrow rows: rstd·dy·w and Σ|dy·xh|."""
    x, w, dy = x.double(), w.double() + offset, dy.double()
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return rstd * dy * w, (dy * x * rstd).abs().sum(0)


@pytest.mark.parametrize(("cast", "offset"), list(CLASS))
def test_the_gradient_through_the_sum_is_added_before_the_only_cast(cast, offset, randn) -> None:
    for dtype in FLOATS:
        x, w, dy, ds = randn(64, 96, dtype=dtype), randn(96, dtype=dtype), *(randn(64, 96, dtype=dtype) for _ in "12")
        rstd = reference.forward(x, None, w, 1e-6, cast, offset, True)[2]
        both, _ = reference.backward(dy, ds, x, w, rstd, cast, offset, True, False)
        # From fp32 rows of the same numbers dx comes out before its cast: the cast of xh has no part in it.
        alone, _ = reference.backward(dy.float(), None, x.float(), w, rstd, cast, offset, True, False)
        assert_same_bits(both, (alone + ds.float()).to(dtype), str(dtype))


def test_results_that_are_not_asked_for_are_none(randn) -> None:
    x, w, dy = randn(4, 8), randn(8), randn(4, 8)
    rstd = reference.forward(x, None, w, 1e-6, "early", 0.0, True)[2]
    assert reference.forward(x, None, w, 1e-6, "early", 0.0, False)[2] is None
    assert reference.backward(dy, None, x, w, rstd, "early", 0.0, False, False) == (None, None)
    dx, dw = reference.backward(dy, None, x, w, rstd, "early", 0.0, True, False)
    assert dx is not None
    assert dw is None


def test_truth_passes_gradcheck_and_gradgradcheck(randn) -> None:
    x, w = randn(3, 5).double().requires_grad_(), randn(5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: reference.truth(x, w, 1e-2, 1.0), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: reference.truth(x, w, 1e-2, 1.0), (x, w))
