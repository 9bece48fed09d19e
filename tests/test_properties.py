"""Mathematical properties of RMSNorm, tested on the public functions: scaling, symmetry, orthogonality, Jacobian.

ms is the mean of squares of a row, r = 1/√(ms + ε), xh = r·x, g = dy·w.
"""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from rmsnorm import add_rms_norm, reference, rms_norm
from tolerance import (
    CENTRED,
    DX,
    FOLDED,
    FP32_GRADIENT_NARROW,
    FP64,
    GRADIENT_ELEMENTS,
    IDEMPOTENT,
    LAYER_NORM,
    SCALED,
    TANGENT,
    XH,
    assert_same_bits,
)  # fmt: skip

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SPECS = (("early", 0.0), ("late", 0.0), ("late", 1.0), ("first", 0.0))

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from(FLOATS)
specs = st.sampled_from(SPECS)
widths = st.integers(1, 200)
epses = st.sampled_from((1e-6, 1e-3, 1.0))


def numbers(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def gradients(x: Tensor, w: Tensor, dy: Tensor, eps: float, cast: str, offset: float) -> tuple[Tensor, Tensor]:
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    dx, dw = torch.autograd.grad(rms_norm(x, w, eps, cast=cast, offset=offset), (x, w), dy)
    return dx, dw


def exactly(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x, ms and r in fp64."""
    x = x.double()
    ms = x.square().mean(-1, keepdim=True)
    return x, ms, (ms + eps).rsqrt()


# --- scale ---------------------------------------------------------------------------------------------------


# A factor that keeps fp16 squares, sums and gradients in its normal range; at eps 0 nothing else depends on scale.
@given(seeds, widths, dtypes, specs, st.integers(-3, 3))
def test_scaling_x_by_a_power_of_two_keeps_y_and_dw_and_divides_dx_exactly(seed, N, dtype, spec, k) -> None:
    x, w, dy = numbers(seed, (6, N), (N,), (6, N), dtype=dtype)
    x, alpha = x.sign() * (x.abs() + 0.25), 2.0**k
    assert_same_bits(
        rms_norm(alpha * x, w, 0.0, cast=spec[0], offset=spec[1]),
        rms_norm(x, w, 0.0, cast=spec[0], offset=spec[1]),
        "y",
    )
    dx, dw = gradients(x, w, dy, 0.0, *spec)
    dx_scaled, dw_scaled = gradients(alpha * x, w, dy, 0.0, *spec)
    assert_same_bits(dw_scaled, dw, "dw")
    # An fp16 dx near zero is subnormal, where halving it rounds.
    normal = torch.minimum(dx.abs(), dx_scaled.abs()) >= torch.finfo(dtype).tiny
    assert_same_bits((dx_scaled * alpha)[normal], dx[normal], "dx")


def test_scaling_x_by_another_factor_changes_bits(randn) -> None:
    x, w = randn(64, 128), randn(128)
    assert (rms_norm(3 * x, w, 0.0) != rms_norm(x, w, 0.0)).any()


@given(seeds, widths, epses, st.floats(0.1, 10))
def test_scaling_x_changes_y_only_through_eps(seed, N, eps, alpha) -> None:
    x, w = numbers(seed, (4, N), (N,))
    _, ms, _ = exactly(x, eps)
    expected = rms_norm(x, w, eps).double() * ((ms + eps) / (ms + eps / alpha**2)).sqrt()
    torch.testing.assert_close(rms_norm(alpha * x, w, eps).double(), expected, rtol=SCALED, atol=0)


@given(seeds, widths, specs)
@example(0, 1, ("early", 0.0))
def test_normalizing_twice_is_normalizing_once(seed, N, spec) -> None:
    (x,) = numbers(seed, (4, N))
    once = rms_norm(x, None, 0.0)
    torch.testing.assert_close(rms_norm(once, None, 0.0), once, rtol=IDEMPOTENT, atol=0)


@given(seeds, widths, epses, st.floats(1e-3, 1e3))
def test_the_rms_of_the_output_is_at_most_one_and_follows_the_formula(seed, N, eps, scale) -> None:
    (x,) = numbers(seed, (4, N))
    x = x * scale
    _, ms, _ = exactly(x, eps)
    rms = rms_norm(x, None, eps).double().square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(rms, (ms / (ms + eps)).sqrt(), rtol=XH, atol=0)
    assert (rms <= 1 + XH).all()


# --- symmetry ------------------------------------------------------------------------------------------------


@given(seeds, widths, dtypes, specs, epses)
def test_negating_x_negates_y_and_dw_and_negating_dy_negates_dx_and_dw(seed, N, dtype, spec, eps) -> None:
    x, w, dy = numbers(seed, (5, N), (N,), (5, N), dtype=dtype)
    y = rms_norm(x, w, eps, cast=spec[0], offset=spec[1])
    assert_same_bits(rms_norm(-x, w, eps, cast=spec[0], offset=spec[1]), -y, "y")
    dx, dw = gradients(x, w, dy, eps, *spec)
    for sx, sy in itertools.product((1, -1), repeat=2):
        got_dx, got_dw = gradients(sx * x, w, sy * dy, eps, *spec)
        # Comparing values, not bits: a sum that cancels to +0 does so with either sign.
        assert torch.equal(got_dx, sy * dx)
        assert torch.equal(got_dw, sx * sy * dw)


@given(seeds, widths, dtypes, specs, epses)
def test_permuting_columns_permutes_the_outputs(seed, N, dtype, spec, eps) -> None:
    x, w, dy = numbers(seed, (5, N), (N,), (5, N), dtype=dtype)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    y = rms_norm(x, w, eps, cast=spec[0], offset=spec[1])
    permuted = rms_norm(x[:, order], w[order], eps, cast=spec[0], offset=spec[1])
    assert_same_bits(permuted, y[:, order], "y")
    dx, dw = gradients(x, w, dy, eps, *spec)
    got_dx, got_dw = gradients(x[:, order], w[order], dy[:, order], eps, *spec)
    assert_same_bits(got_dx, dx[:, order], "dx")
    assert_same_bits(got_dw, dw[order], "dw")


@given(seeds, st.integers(1, 40), widths, dtypes, specs)
def test_a_row_of_y_and_dx_does_not_depend_on_the_other_rows(seed, M, N, dtype, spec) -> None:
    x, w, dy = numbers(seed, (M, N), (N,), (M, N), dtype=dtype)
    y = rms_norm(x, w, cast=spec[0], offset=spec[1])
    dx, _ = gradients(x, w, dy, 1e-6, *spec)
    order = torch.randperm(M, generator=torch.Generator().manual_seed(seed))
    assert_same_bits(rms_norm(x[order], w, cast=spec[0], offset=spec[1]), y[order], "y, rows permuted")
    assert_same_bits(gradients(x[order], w, dy[order], 1e-6, *spec)[0], dx[order], "dx, rows permuted")
    for m in (0, M // 2, M - 1):
        assert_same_bits(rms_norm(x[m], w, cast=spec[0], offset=spec[1]), y[m], f"y, row {m} alone")
        assert_same_bits(gradients(x[m], w, dy[m], 1e-6, *spec)[0], dx[m], f"dx, row {m} alone")
    half = rms_norm(x[M // 2 :], w, cast=spec[0], offset=spec[1])
    assert_same_bits(half, y[M // 2 :], "y, half the rows")


def test_a_row_of_y_and_dx_does_not_depend_on_thousands_of_other_rows(randn) -> None:
    x, w, dy = randn(9000, 96, dtype=torch.bfloat16), randn(96), randn(9000, 96)
    y = rms_norm(x, w)
    dx, _ = gradients(x, w, dy, 1e-6, "early", 0.0)
    for m in (0, 1, 4095, 4096, 8999):
        assert_same_bits(rms_norm(x[m], w), y[m], f"y {m}")
        assert_same_bits(gradients(x[m], w, dy[m], 1e-6, "early", 0.0)[0], dx[m], f"dx {m}")


def test_add_rms_norm_is_rms_norm_of_the_rounded_sum(randn) -> None:
    for dtype, (cast, offset) in itertools.product(FLOATS, SPECS):
        x, residual, w = randn(7, 65, dtype=dtype), randn(7, 65, dtype=dtype), randn(65, dtype=dtype)
        y, s = add_rms_norm(x, residual, w, cast=cast, offset=offset)
        assert_same_bits(s, x + residual, "s")
        assert_same_bits(y, rms_norm(s, w, cast=cast, offset=offset), "y")
        swapped = add_rms_norm(residual, x, w, cast=cast, offset=offset)
        assert_same_bits(swapped[0], y, "x and residual swapped")


# --- properties that RMSNorm does not have -------------------------------------------------------------------


def test_adding_a_constant_to_x_changes_the_output(randn) -> None:
    x, w = randn(4, 64), randn(64)
    assert (rms_norm(x + 1, w) - rms_norm(x, w)).abs().max() > 0.1


def test_scaling_one_row_of_the_matrix_before_a_norm_changes_the_other_outputs(randn) -> None:
    a, W = randn(4, 32), randn(64, 32)
    scaled = W.clone()
    scaled[0] *= 8
    assert ((rms_norm(a @ scaled.T) - rms_norm(a @ W.T))[:, 1:].abs().amax(0) > 0).all()


# --- LayerNorm and linear layers -----------------------------------------------------------------------------


@given(seeds, st.integers(2, 200), epses)
def test_layer_norm_is_rms_norm_of_centred_rows(seed, N, eps) -> None:
    x, w = numbers(seed, (4, N), (N,))
    centred = (x.double() - x.double().mean(-1, keepdim=True)).float()
    expected = F.layer_norm(x.double(), (N,), w.double(), eps=eps)
    _, _, r = exactly(centred, eps)
    atol = CENTRED * (x.abs().amax(-1, keepdim=True) * r * w.abs())
    assert ((rms_norm(centred, w, eps).double() - expected).abs() <= LAYER_NORM * expected.abs() + atol).all()


@given(seeds, st.integers(1, 40), st.integers(-4, 4))
def test_scaling_the_matrix_before_a_norm_by_a_power_of_two_divides_its_gradient_exactly(seed, N, k) -> None:
    a, W, w, dy = numbers(seed, (8, 24), (N, 24), (N,), (8, N))

    def dW(a: Tensor, W: Tensor) -> Tensor:
        W = W.clone().requires_grad_()
        (grad,) = torch.autograd.grad(rms_norm(a @ W.T, w, 0.0), W, dy)
        return grad

    delta = 2.0**k
    assert torch.equal(dW(a, delta * W) * delta, dW(a, W))
    assert torch.equal(dW(delta * a, W), dW(a, W))


@given(seeds, st.integers(2, 60))
def test_the_gradient_of_the_matrix_before_a_norm_is_orthogonal_to_the_matrix(seed, N) -> None:
    a, W, w, dy = numbers(seed, (8, 24), (N, 24), (N,), (8, N))
    z = (a @ W.T).requires_grad_()
    dz, _ = gradients(z, w, dy, 0.0, "early", 0.0)
    z64, _, r = exactly(z.detach(), 0.0)
    assert abs(float((dz.double() * z64).sum())) <= orthogonal(z64, r, (dy * w).double()).sum()


@given(seeds, st.integers(1, 60))
def test_the_weight_can_be_folded_into_the_matrix_after_a_norm(seed, N) -> None:
    x, w, L = numbers(seed, (5, N), (N,), (3, N))
    folded = rms_norm(x).double() @ (L.double() * w.double()).T
    y = rms_norm(x, w).double()
    assert ((y @ L.double().T - folded).abs() <= FOLDED * (y.abs() @ L.double().abs().T)).all()


# --- gradients -----------------------------------------------------------------------------------------------


def orthogonal(x: Tensor, r: Tensor, g: Tensor) -> Tensor:
    """The bound on the error of ⟨dx, x⟩ of each row: DX of each element of dx, times x."""
    xh = x * r
    c = (g * xh).mean(-1, keepdim=True)
    return DX * (r * (g.abs() + (xh * c).abs()) * x.abs()).sum(-1)


@given(seeds, widths, epses | st.just(0.0), specs)
def test_dx_is_orthogonal_to_x_up_to_the_term_of_eps(seed, N, eps, spec) -> None:
    x, w, dy = numbers(seed, (6, N), (N,), (6, N))
    dx, _ = gradients(x, w, dy, eps, *spec)
    x64, _, r = exactly(x, eps)
    g = dy.double() * (w.double() + spec[1])
    expected = eps * r.squeeze(-1) ** 3 * (g * x64).sum(-1)
    assert (((dx.double() * x64).sum(-1) - expected).abs() <= orthogonal(x64, r, g)).all()


def jacobian(x: Tensor, eps: float) -> Tensor:
    J: Tensor = torch.func.jacrev(lambda x: reference.truth(x, None, eps, 0.0))(x)
    return J


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("N", [1, 2, 17, 64])
def test_the_jacobian_of_the_formula_is_symmetric_and_has_the_expected_eigenvalues(N, eps, randn) -> None:
    x = randn(N).double()
    _, ms, r = exactly(x, eps)
    J = jacobian(x, eps)
    torch.testing.assert_close(J, J.T, rtol=0, atol=FP64)
    values = torch.linalg.eigvalsh(J)
    torch.testing.assert_close(values[1:], r.expand(N - 1), rtol=FP64, atol=FP64)
    torch.testing.assert_close(values[:1], r * eps / (ms + eps), rtol=0, atol=FP64)
    torch.testing.assert_close(J @ x, reference.truth(x, None, eps, 0.0) * eps / (ms + eps), rtol=0, atol=FP64)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
def test_backward_and_forward_mode_multiply_by_the_jacobian(eps, randn) -> None:
    N = 33
    x, v = randn(N), randn(N)
    J = jacobian(x.double(), eps)
    (dx,) = torch.autograd.grad(rms_norm(x.requires_grad_(), None, eps), x, v)
    _, tangent = torch.func.jvp(lambda x: rms_norm(x, None, eps), (x.detach(),), (v,))
    x64, _, r = exactly(x.detach(), eps)
    xh, g = x64 * r, v.double()
    bound = r * (g.abs() + (xh * (g * xh).mean()).abs())
    assert ((dx.double() - J @ g).abs() <= DX * bound).all()
    assert ((tangent.double() - J @ g).abs() <= TANGENT * bound).all()


def test_dx_of_the_formula_follows_from_y_in_closed_form(randn) -> None:
    x, w, dy = randn(4, 24).double().requires_grad_(), randn(24).double(), randn(4, 24).double()
    y = reference.truth(x, w, 1e-6, 0.0)
    (dx,) = torch.autograd.grad(y, x, dy)
    _, _, r = exactly(x.detach(), 1e-6)
    xh, g = y.detach() / w, dy * w
    torch.testing.assert_close(r * (g - xh * (g * xh).mean(-1, keepdim=True)), dx, rtol=FP64, atol=FP64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [1, 2, 5, 15])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_gradients_of_narrow_rows_are_within_8_ulps_of_the_terms_that_cancel(
    dtype: torch.dtype, N: int, eps: float
) -> None:
    """Below 16 columns dx is a difference of nearly equal terms, so the bound is relative to those terms."""
    generator = torch.Generator().manual_seed(N)
    x = torch.randn(GRADIENT_ELEMENTS // N, N, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(N, generator=generator).to(dtype).requires_grad_()
    y = rms_norm(x, w, eps)
    dy = torch.randn(y.shape, generator=generator).to(dtype)
    dx, dw = torch.autograd.grad(y, [x, w], dy)
    wide, scale = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    right, right_w = torch.autograd.grad(reference.truth(wide, scale, eps, 0.0), [wide, scale], dy.double())
    rstd = (wide.detach().square().mean(-1, keepdim=True) + eps).rsqrt()
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    subtracted = (rstd * dy.double() * scale.detach()).norm()
    bound = FP32_GRADIENT_NARROW * subtracted + rounding * right.norm() + tiny * right.numel() ** 0.5
    assert (dx.double() - right).norm() <= bound
    sums = (dy.double() * wide.detach() * rstd).abs().sum(0)
    assert (
        (dw.double() - right_w).abs() <= (FP32_GRADIENT_NARROW + 2 * rounding) * sums + rounding * right_w.abs()
    ).all()
