"""Generated calls of the public functions: shapes, strides, offsets, dtypes, specs and unusual numbers.

Each call has the bits of the reference, writes every element of its results and nothing else, and changes no byte of
its inputs or of the memory between and around their rows, which holds NaN.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.nn import functional as F

import rmsnorm
from captured import FORWARD_SANDWICH
from drawn import (
    EPSES,
    FP32,
    FP64,
    SPECS,
    Drawn,
    all_dtypes,
    drawn,
    dtypes,
    epses,
    gradients,
    leadings,
    mostly,
    seeds,
    specs,
    widths,
)
from memory_guards import guarded, poisoned_memory, unchanged
from planned import GatedKernels, Kernels
from rmsnorm import gated_reference, reference
from rmsnorm.spec import Gate, Spec, gated_dtype, result_dtype, sum_dtype
from tolerance import assert_same_bits

cpu = pytest.importorskip("rmsnorm.kernels.cpu.planner", reason="the CPU kernels need Numba")
gated_cpu = pytest.importorskip("rmsnorm.kernels.cpu.gated_planner", reason="the CPU kernels need Numba")

# --- one norm ------------------------------------------------------------------------------------------------


def check_norm(
    x: Tensor, residual: Tensor | None, w: Tensor | None, dy: Drawn, ds: Drawn | None, eps: float, cast: Any,
    offset: float, wanted: Sequence[bool], V: int | None = None,
) -> None:  # fmt: skip
    """Compares the public function, and the plans that Python runs, with the reference.

    V: the variance_size.

    wanted: which of x, residual and w require a gradient.
    """
    y_ref, s_ref, rstd = reference.forward(x, residual, w, eps, cast, offset, True, V)
    assert rstd is not None
    rows = x if s_ref is None else s_ref
    dy_ = dy.tensor(y_ref.shape, y_ref.dtype)
    ds_ = None if ds is None or s_ref is None else ds.tensor(rows.shape, rows.dtype)
    given = {"dx": x, "d_residual": residual, "dw": w}
    needs = {name: t is not None and of_it for (name, t), of_it in zip(given.items(), wanted, strict=True)}
    with unchanged(x, residual, w, dy_, ds_), poisoned_memory():
        leaves = {n: None if t is None else t.detach().requires_grad_(needs[n]) for n, t in given.items()}
        options = {"cast": cast, "offset": offset, "variance_size": V}
        if residual is None:
            outputs = (rmsnorm.rms_norm(leaves["dx"], leaves["dw"], eps, **options),)
        else:
            outputs = rmsnorm.add_rms_norm(leaves["dx"], leaves["d_residual"], leaves["dw"], eps, **options)
            assert_same_bits(outputs[1], s_ref, "s")
        assert_same_bits(outputs[0], y_ref, "y")
        assert all(t.is_contiguous() for t in outputs)
        asked = [t for n, t in leaves.items() if needs[n]]
        got = dict.fromkeys(needs)
        if asked:
            cotangents = [dy_] if ds_ is None else [dy_, ds_]
            found = torch.autograd.grad(outputs[: len(cotangents)], asked, cotangents)
            got |= zip((n for n in needs if needs[n]), found, strict=True)
        need_dx = needs["dx"] or needs["d_residual"]
        dx, dw = reference.backward(dy_, ds_, rows, w, rstd, cast, offset, need_dx, needs["dw"], V)
        right = {n: None if dx is None or t is None else dx.to(t.dtype) for n, t in given.items()} | {"dw": dw}
        for name in (n for n in needs if needs[n]):
            assert_same_bits(got[name], right[name], name)
        if FP64 not in (x.dtype, *(t.dtype for t in (residual, w) if t is not None)):
            with guarded():
                y, s, rstd_ = Kernels(cpu).forward(x, residual, w, eps, cast, offset, True, V)
                gradients = Kernels(cpu).backward(dy_, ds_, rows, w, rstd, cast, offset, need_dx, needs["dw"], V)
            for name, one, expected in zip(
                ("y", "s", "rstd", "dx", "dw"), (y, s, rstd_, *gradients), (y_ref, s_ref, rstd, dx, dw), strict=True
            ):
                assert_same_bits(one, expected, f"{name} of a plan")


any_gradients = st.tuples(*[st.sampled_from((True, True, False))] * 3)


@pytest.mark.parametrize("eps", EPSES)
@settings(max_examples=25)
@given(drawn, mostly, gradients, leadings, widths, all_dtypes, all_dtypes, specs, any_gradients)
def test_rms_norm_has_the_bits_of_the_reference(eps, x, w, dy, leading, N, x_dtype, w_dtype, spec, wanted) -> None:
    if w is None and spec[1]:
        spec = ("late", 0.0)
    w_ = None if w is None else w.tensor((N,), w_dtype)
    check_norm(x.tensor((*leading, N), x_dtype), None, w_, dy, None, eps, *spec, wanted)


@pytest.mark.parametrize("eps", EPSES)
@settings(max_examples=25)
@given(
    drawn, drawn, drawn, gradients, st.one_of(gradients, gradients, st.none()), leadings, widths, all_dtypes,
    all_dtypes, all_dtypes, specs, any_gradients,
)  # fmt: skip
def test_add_rms_norm_has_the_bits_of_the_reference(
    eps, x, residual, w, dy, ds, leading, N, x_dtype, r_dtype, w_dtype, spec, wanted
) -> None:
    shape = (*leading, N)
    tensors = x.tensor(shape, x_dtype), residual.tensor(shape, r_dtype), w.tensor((N,), w_dtype)
    check_norm(*tensors, dy, ds, eps, *spec, wanted)


@given(
    drawn, mostly, drawn, gradients, gradients, leadings, st.integers(1, 5), st.integers(1, 40), all_dtypes, all_dtypes,
    specs, epses, any_gradients,
)  # fmt: skip
def test_norms_with_a_weight_for_each_head_have_the_bits_of_the_reference(
    x, residual, w, dy, ds, leading, H, N, x_dtype, w_dtype, spec, eps, wanted
) -> None:
    x_, w_ = x.tensor((*leading[:2], H, N), x_dtype), w.tensor((H, N), w_dtype)
    residual_ = None if residual is None else residual.tensor(x_.shape, x_dtype)
    check_norm(x_, residual_, w_, dy, ds, eps, *spec, wanted)
    layer = rmsnorm.RMSNorm(N, eps, cast=spec[0], offset=spec[1], heads=H)
    layer.weight = nn.Parameter(w_)
    with unchanged(x_, w_), poisoned_memory():
        assert_same_bits(layer(x_), reference.forward(x_, None, w_, eps, *spec, False)[0], "y of the layer")


@given(
    drawn, mostly, mostly, gradients, gradients, leadings, widths, st.floats(0, 1), all_dtypes, all_dtypes, specs, epses,
    any_gradients,
)  # fmt: skip
def test_norms_of_the_first_columns_have_the_bits_of_the_reference(
    x, residual, w, dy, ds, leading, N, share, x_dtype, w_dtype, spec, eps, wanted
) -> None:
    if w is None and spec[1]:
        spec = ("late", 0.0)
    V = max(1, round(share * N))
    x_, w_ = x.tensor((*leading, N), x_dtype), None if w is None else w.tensor((N,), w_dtype)
    residual_ = None if residual is None else residual.tensor(x_.shape, x_dtype)
    check_norm(x_, residual_, w_, dy, ds, eps, *spec, wanted, V)
    layer = rmsnorm.RMSNorm(N, eps, cast=spec[0], offset=spec[1], variance_size=V, elementwise_affine=w_ is not None)
    layer.weight = None if w_ is None else nn.Parameter(w_)
    with unchanged(x_, w_), poisoned_memory():
        assert_same_bits(layer(x_), reference.forward(x_, None, w_, eps, *spec, False, V)[0], "y of the layer")


@settings(max_examples=60)
@given(
    drawn, mostly, drawn, mostly, leadings, widths, all_dtypes, all_dtypes, all_dtypes, all_dtypes, specs, epses,
    st.booleans(),
)  # fmt: skip
def test_a_sandwich_has_the_bits_of_two_norms_of_the_reference(
    x, w, residual, w2, leading, N, x_dtype, w_dtype, r_dtype, w2_dtype, spec, eps, with_rstd
) -> None:
    if (w is None or w2 is None) and spec[1]:
        spec = ("late", 0.0)
    x_, residual_ = x.tensor((*leading, N), x_dtype), residual.tensor((*leading, N), r_dtype)
    w_, w2_ = (None if t is None else t.tensor((N,), d) for t, d in ((w, w_dtype), (w2, w2_dtype)))
    h, _, rstd = reference.forward(x_, None, w_, eps, *spec, with_rstd)
    y, s, rstd2 = reference.forward(h, residual_, w2_, eps, *spec, with_rstd)
    with unchanged(x_, w_, residual_, w2_), poisoned_memory():
        found = FORWARD_SANDWICH(x_, w_, residual_, w2_, eps, *spec, with_rstd)
    for name, got, expected in zip(("y", "s", "rstd", "rstd of s"), found, (y, s, rstd, rstd2), strict=True):
        assert got.is_contiguous()
        if expected is None:  # was not requested
            assert got.numel() == 0
        else:
            assert_same_bits(got, expected, name)


@given(st.lists(st.tuples(drawn, mostly, leadings, widths, dtypes, dtypes), max_size=4), specs, epses)
def test_rms_norms_has_the_bits_of_the_reference_for_each_norm(norms, spec, eps) -> None:
    if any(w is None for _, w, *_ in norms) and spec[1]:
        spec = ("late", 0.0)
    xs = [x.tensor((*leading, N), x_dtype) for x, _, leading, N, x_dtype, _ in norms]
    weights = [None if w is None else w.tensor((N,), w_dtype) for _, w, _, N, _, w_dtype in norms]
    with unchanged(*xs, *weights), poisoned_memory():
        found = rmsnorm.rms_norms(xs, weights, eps, cast=spec[0], offset=spec[1])
        for y, x, w in zip(found, xs, weights, strict=True):
            assert_same_bits(y, reference.forward(x, None, w, eps, *spec, False)[0], "y")


@given(drawn, mostly, mostly, leadings, widths, all_dtypes, all_dtypes, specs)
def test_explain_says_in_one_line_who_computes_any_valid_call(
    x, residual, w, leading, N, x_dtype, w_dtype, spec
) -> None:
    shape = (*leading, N)
    x_, residual_ = x.tensor(shape, x_dtype), None if residual is None else residual.tensor(shape, w_dtype)
    w_ = None if w is None else w.tensor((N,), w_dtype)
    if w is None and spec[1]:
        spec = ("late", 0.0)
    with unchanged(x_, residual_, w_):
        said = rmsnorm.explain(x_, w_, residual_, cast=spec[0], offset=spec[1])
    of_reference = FP64 in (x_dtype, w_dtype if w is not None or residual is not None else x_dtype)
    assert said.startswith(f"cpu, {str(x_dtype).removeprefix('torch.')}: ")
    assert ("the reference, in plain torch" in said) == of_reference
    assert "\n" not in said


@given(
    st.lists(st.tuples(drawn, mostly, gradients, leadings, widths, dtypes, dtypes), min_size=1, max_size=3),
    specs,
    epses,
)
def test_rms_norms_has_the_gradients_of_the_reference_for_each_norm(norms, spec, eps) -> None:
    if any(w is None for _, w, *_ in norms) and spec[1]:
        spec = ("late", 0.0)
    xs = [x.tensor((*leading, N), x_dtype) for x, _, _, leading, N, x_dtype, _ in norms]
    weights = [None if w is None else w.tensor((N,), w_dtype) for _, w, _, _, N, _, w_dtype in norms]
    right = [reference.forward(x, None, w, eps, *spec, True) for x, w in zip(xs, weights, strict=True)]
    dys = [dy.tensor(y.shape, y.dtype) for (_, _, dy, *_), (y, *_) in zip(norms, right, strict=True)]
    with unchanged(*xs, *weights, *dys), poisoned_memory():
        leaves = [x.detach().requires_grad_() for x in xs]
        of_w = [None if w is None else w.detach().requires_grad_() for w in weights]
        ys = rmsnorm.rms_norms(leaves, of_w, eps, cast=spec[0], offset=spec[1])
        for y, x, w, dy, (y_ref, _, rstd) in zip(ys, leaves, of_w, dys, right, strict=True):
            assert_same_bits(y, y_ref, "y")
            found = torch.autograd.grad(y, [x] if w is None else [x, w], dy)
            expected = reference.backward(dy, None, x, w, rstd, *spec, True, w is not None)
            for name, got, one in zip(("dx", "dw"), found, expected, strict=False):
                assert_same_bits(got, one, name)


# --- gated and grouped norms ---------------------------------------------------------------------------------

gates = st.builds(Gate, st.sampled_from(("silu", "sigmoid")), st.booleans())


@pytest.mark.parametrize("eps", EPSES)
@settings(max_examples=25)
@given(
    drawn, drawn, mostly, gradients, leadings, st.integers(1, 24) | st.sampled_from((64, 161)),
    st.integers(1, 4), all_dtypes, all_dtypes, all_dtypes, gates, st.sampled_from(("early", "late")), any_gradients,
)  # fmt: skip
def test_gated_rms_norm_has_the_bits_of_the_reference(
    eps, x, gate, w, dy, leading, n, groups, x_dtype, g_dtype, w_dtype, gate_of, cast, wanted
) -> None:
    shape, spec = (*leading, n * groups), Spec(eps, cast, gate=gate_of, groups=groups)
    x_, gate_ = x.tensor(shape, x_dtype), gate.tensor(shape, g_dtype)
    w_ = None if w is None else w.tensor(shape[-1:], w_dtype)
    y_ref, rstd = gated_reference.forward(x_, gate_, w_, spec, True)
    assert rstd is not None
    assert y_ref.dtype == gated_dtype(x_dtype, None if w is None else w_dtype, spec)
    dy_ = dy.tensor(shape, y_ref.dtype)
    given = {"dx": x_, "dgate": gate_, "dw": w_}
    needs = [t is not None and of_it for t, of_it in zip(given.values(), wanted, strict=True)]
    right = gated_reference.backward(dy_, x_, gate_, w_, rstd, spec, *needs)
    with unchanged(x_, gate_, w_, dy_), poisoned_memory():
        leaves = [
            None if t is None else t.detach().requires_grad_(of_it)
            for t, of_it in zip(given.values(), needs, strict=True)
        ]
        y = rmsnorm.gated_rms_norm(
            *leaves, eps, cast=cast, activation=gate_of.activation, gate_first=gate_of.first, groups=groups
        )
        assert_same_bits(y, y_ref, "y")
        asked = [t for t, of_it in zip(leaves, needs, strict=True) if of_it]
        found = iter(torch.autograd.grad(y, asked, dy_) if asked else ())
        for name, expected, of_it in zip(given, right, needs, strict=True):
            if of_it:
                assert_same_bits(next(found), expected, name)
        if FP64 not in (x_dtype, g_dtype, None if w is None else w_dtype):
            with guarded():
                made = GatedKernels(gated_cpu).forward(x_, gate_, w_, spec, True)
                made += GatedKernels(gated_cpu).backward(dy_, x_, gate_, w_, rstd, spec, *needs)
            for name, one, expected in zip(("y", "rstd", *given), made, (y_ref, rstd, *right), strict=True):
                assert_same_bits(one, expected, f"{name} of a plan")


@given(
    drawn, drawn, mostly, leadings, st.integers(1, 24), st.integers(1, 4), all_dtypes, all_dtypes, all_dtypes, gates,
    st.sampled_from(("early", "late")), epses,
)  # fmt: skip
def test_gated_layers_have_the_bits_of_the_reference(
    x, gate, w, leading, n, groups, x_dtype, g_dtype, w_dtype, gate_of, cast, eps
) -> None:
    N = n * groups
    x_, gate_ = x.tensor((*leading, N), x_dtype), gate.tensor((*leading, N), g_dtype)
    w_ = None if w is None else w.tensor((N,), w_dtype)
    layer = rmsnorm.GatedRMSNorm(
        N, eps, cast=cast, activation=gate_of.activation, gate_first=gate_of.first, groups=groups,
        elementwise_affine=w_ is not None,
    )  # fmt: skip
    layer.weight = None if w_ is None else nn.Parameter(w_)
    with unchanged(x_, gate_, w_), poisoned_memory():
        y = layer(x_, gate_)
    assert y.is_contiguous()
    spec = Spec(eps, cast, gate=gate_of, groups=groups)
    assert_same_bits(y, gated_reference.forward(x_, gate_, w_, spec, False)[0], "y")


# --- layers, contexts, patch ---------------------------------------------------------------------------------


@given(drawn, drawn, leadings, widths, dtypes, dtypes, specs, st.sampled_from((0.0, 1e-6, 1e-3)))
def test_layers_have_the_bits_of_the_functions(x, w, leading, N, x_dtype, w_dtype, spec, eps) -> None:
    x_, w_ = x.tensor((*leading, N), x_dtype), w.tensor((N,), w_dtype)
    layers = [
        (rmsnorm.RMSNorm(N, eps, cast=spec[0], offset=spec[1]), spec),
        (rmsnorm.DeepseekV2RMSNorm(N, eps), SPECS[0]),
    ]
    with unchanged(x_, w_):
        for layer, of in layers:
            layer.weight = nn.Parameter(w_)
            assert_same_bits(layer(x_), reference.forward(x_, None, w_, eps, *of, False)[0], type(layer).__name__)


@given(
    drawn, mostly, gradients, leadings, st.lists(st.integers(1, 7), min_size=1, max_size=2), dtypes, dtypes,
    st.sampled_from((None, 0.0, 1e-6, 1e-3)),
)  # fmt: skip
def test_torchs_layer_has_the_bits_of_the_reference_over_all_normalized_dimensions(
    x, w, dy, leading, sizes, x_dtype, w_dtype, eps
) -> None:
    dims, used = len(sizes), torch.finfo(FP32).eps if eps is None else eps
    x_, dy_ = (t.tensor((*leading[: 3 - dims], *sizes), x_dtype) for t in (x, dy))
    w_ = None if w is None else w.tensor(sizes, w_dtype)
    layer = rmsnorm.TorchRMSNorm(sizes, eps, elementwise_affine=w_ is not None)
    layer.weight = None if w_ is None else nn.Parameter(w_)
    with unchanged(x_, w_, dy_), poisoned_memory():
        leaves = [x_.detach().requires_grad_(), *([] if layer.weight is None else [layer.weight])]
        y = layer(leaves[0])
        found = torch.autograd.grad(y, leaves, dy_)
    rows, weight, dys = x_.flatten(-dims), None if w_ is None else w_.flatten(), dy_.flatten(-dims)
    expected, _, rstd = reference.forward(rows, None, weight, used, "late", 0.0, True)
    assert rstd is not None
    right = reference.backward(dys, None, rows, weight, rstd, "late", 0.0, True, weight is not None)
    for name, got, one in zip(("y", "dx", "dw"), (y, *found), (expected, *right), strict=False):
        assert one is not None
        assert_same_bits(got, one.view(w_.shape if name == "dw" and w_ is not None else x_.shape), name)


@given(drawn, drawn, gradients, leadings, widths, dtypes)
def test_torchs_function_has_the_bits_of_the_reference_in_the_context(x, w, dy, leading, N, dtype) -> None:
    x_, w_, dy_ = x.tensor((*leading, N), dtype), w.tensor((N,), dtype), dy.tensor((*leading, N), dtype)
    with unchanged(x_, w_, dy_), poisoned_memory(), rmsnorm.batch_invariant():
        leaves = x_.detach().requires_grad_(), w_.detach().requires_grad_()
        y = F.rms_norm(leaves[0], (N,), leaves[1], 1e-6)
        found = torch.autograd.grad(y, leaves, dy_)
    expected, _, rstd = reference.forward(x_, None, w_, 1e-6, "late", 0.0, True)
    assert rstd is not None
    assert_same_bits(y, expected, "y")
    right = reference.backward(dy_, None, x_, w_, rstd, "late", 0.0, True, True)
    for name, got, one in zip(("dx", "dw"), found, right, strict=True):
        assert_same_bits(got, one, name)


@given(drawn, mostly, drawn, leadings, st.integers(1, 40), dtypes, specs, st.integers(1, 3), seeds)
def test_recomputed_outputs_give_the_same_gradients(x, residual, w, leading, N, dtype, spec, readers, seed) -> None:
    """The readers are matrix multiplications, which keep the output, and one that keeps a part of it."""
    x_, w_ = x.tensor((*leading, N), dtype), w.tensor((N,), dtype)
    residual_ = None if residual is None else residual.tensor((*leading, N), dtype)
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(N, 2, generator=generator).to(dtype) for _ in range(readers)]

    def gradients(recomputing: bool) -> tuple[tuple[Tensor, ...], int]:
        leaves = [t.detach().requires_grad_() for t in (x_, residual_, w_, *matrices) if t is not None]
        x, w, readers = leaves[0], leaves[-len(matrices) - 1], leaves[-len(matrices) :]
        with rmsnorm.recompute() if recomputing else torch.enable_grad() as counts:
            if residual_ is None:
                y = rmsnorm.rms_norm(x, w, cast=spec[0], offset=spec[1])
            else:
                y = rmsnorm.add_rms_norm(x, leaves[1], w, cast=spec[0], offset=spec[1])[0]
            y = y.to(dtype)
            loss = (
                sum((y @ matrix).float().sum() for matrix in readers)
                + (y[..., : N // 2 + 1] * y[..., :1]).float().sum()
            )
            del y
        return torch.autograd.grad(loss, leaves), counts.dropped if recomputing else 0

    with unchanged(x_, residual_, w_), poisoned_memory():
        kept, _ = gradients(False)
        recomputed, dropped = gradients(True)
    assert dropped == 1
    for i, (got, expected) in enumerate(zip(recomputed, kept, strict=True)):
        assert_same_bits(got, expected, f"gradient {i}")


def root_of_mean(h: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def of_all_but_one_column(h: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(h[..., 1:].pow(2).mean(-1, keepdim=True) + eps)


def with_eps_after_the_root(h: Tensor, eps: float) -> Tensor:
    return 1.0 / (h.pow(2).mean(-1, keepdim=True).sqrt() + (eps + 1e-6))


def of_absolute_values(h: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(h.abs().mean(-1, keepdim=True) + eps)


def slightly_larger(h: Tensor, eps: float) -> Tensor:
    return root_of_mean(h, eps) * (1.0 + 2.0**-12)


WRONG = (of_all_but_one_column, with_eps_after_the_root, of_absolute_values, slightly_larger)


def module(cast: str, offset: float, eps: float, N: int, weighted: bool, statistic: Any = root_of_mean) -> nn.Module:
    """A norm like those of published models, with eps under one of their names."""

    class GeneratedRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps = eps
            if weighted:
                self.weight = nn.Parameter(torch.ones(N))

        if not weighted:

            def forward(self, x):
                h = x.float()
                return (h * statistic(h, self.eps)).to(x.dtype)
        elif cast == "early":

            def forward(self, x):
                h = x.to(torch.float32)
                h = h * statistic(h, self.eps)
                return self.weight * h.to(x.dtype)
        elif offset:

            def forward(self, x):
                h = x.float()
                h = h * statistic(h, self.eps)
                return (h * (1.0 + self.weight.float())).type_as(x)
        else:

            def forward(self, x):
                h = x.float()
                h = h * statistic(h, self.eps)
                return (self.weight.float() * h).to(x.dtype)

    return GeneratedRMSNorm()


rules = st.sampled_from((*SPECS[:3], None))  # None: without a weight


@pytest.mark.parametrize("statistic", [root_of_mean, *WRONG], ids=lambda function: function.__name__)
@settings(max_examples=10)
@given(drawn, drawn, rules, st.sampled_from((1e-6, 0.5, 0.0)), st.integers(2, 40), dtypes)
def test_prove_finds_the_spec_of_a_module_and_none_if_it_computes_something_else(
    statistic, x, w, rule, eps, N, dtype
) -> None:
    cast, offset = rule or ("early", 0.0)
    norm, x_, w_ = module(cast, offset, eps, N, rule is not None, statistic), x.tensor((3, N), dtype), None
    if rule is not None:
        w_ = w.tensor((N,), dtype)
        norm.weight = nn.Parameter(w_)
    with unchanged(x_, w_):
        proof = rmsnorm.prove(norm)
        if statistic in WRONG:
            assert proof.spec is None
            assert proof.reason
            return
        assert proof.spec == Spec(eps, cast, offset)
        assert_same_bits(norm(x_).detach(), reference.published(x_, w_, eps, cast, offset), "y")


@settings(max_examples=6)
@given(drawn, drawn, rules, st.sampled_from((0.0, 1e-30, 1e-6, 0.5)), widths, dtypes)
def test_what_is_proven_of_a_module_is_what_it_computes_when_replaced(x, w, spec, eps, N, dtype) -> None:
    N = max(N, 2)  # a weight of one element is not proven
    cast, offset = spec or ("early", 0.0)
    norm = module(cast, offset, eps, N, weighted=spec is not None)
    w_ = w.tensor((N,), dtype) if spec else None
    if w_ is not None:
        norm.weight = nn.Parameter(w_)
    model, x_ = nn.Sequential(norm), x.tensor((3, N), dtype)
    with unchanged(x_, w_):
        (verdict,) = rmsnorm.patch(model).replaced
        assert verdict.spec is not None
        assert (verdict.spec.cast, verdict.spec.offset, verdict.spec.eps) == (
            cast,
            offset,
            pytest.approx(eps, rel=1e-7),
        )
        assert_same_bits(model(x_), reference.forward(x_, None, w_, eps, cast, offset, False)[0], "y")


# --- sharded rows --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh(one_process: None) -> DeviceMesh:
    return init_device_mesh("cpu", (1,))


@given(
    drawn, mostly, drawn, gradients, gradients, leadings, st.integers(1, 40), dtypes, dtypes, specs, epses,
    st.sampled_from(("rows", "columns", "replicated")),
)  # fmt: skip
def test_sharded_rows_have_the_bits_of_the_reference(
    mesh, x, residual, w, dy, ds, leading, N, x_dtype, w_dtype, spec, eps, sharding
) -> None:
    """On one rank; tests/ops/test_distributed.py has several."""
    shape, last = (*leading, N), len(leading)
    x_, w_ = x.tensor(shape, x_dtype), w.tensor((N,), w_dtype)
    residual_ = None if residual is None else residual.tensor(shape, x_dtype)
    y_ref, s_ref, rstd = reference.forward(x_, residual_, w_, eps, *spec, True)
    assert rstd is not None
    rows = x_ if s_ref is None else s_ref
    assert rows.dtype == sum_dtype(x_dtype, None if residual is None else x_dtype)
    assert y_ref.dtype == result_dtype(rows.dtype, w_dtype, spec[0])
    dy_, ds_ = dy.tensor(shape, y_ref.dtype), ds.tensor(shape, rows.dtype) if residual is not None else None
    of_x: Placement = Shard(last) if sharding == "columns" else Shard(0) if sharding == "rows" and last else Replicate()
    of_w: Placement = Shard(0) if of_x == Shard(last) else Replicate()

    def spread(t: Tensor, placement: Placement) -> DTensor:
        return DTensor.from_local(t.detach(), mesh, [placement], run_check=False)

    with unchanged(x_, residual_, w_, dy_, ds_), poisoned_memory():
        leaves = [spread(t, of_x).requires_grad_() for t in (x_, residual_) if t is not None]
        leaves.append(spread(w_, of_w).requires_grad_())
        function = rmsnorm.rms_norm if residual is None else rmsnorm.add_rms_norm
        outputs = function(*leaves, eps, cast=spec[0], offset=spec[1])
        outputs = [outputs] if residual is None else [*outputs]
        cotangents = [spread(t, of_x) for t in (dy_, ds_) if t is not None]
        found = torch.autograd.grad(outputs, leaves, cotangents)
        for got, expected in zip(outputs, (y_ref, s_ref), strict=False):
            assert_same_bits(got.full_tensor(), expected, "y or s")
        dx, dw = reference.backward(dy_, ds_, rows, w_, rstd, *spec, True, True)
        for i, got in enumerate(found):
            assert_same_bits(got.full_tensor(), dw if i == len(found) - 1 else dx, f"gradient {i}")
