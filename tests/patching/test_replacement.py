"""A replaced norm accepts all that its own class accepts, and uses the attributes that it has when it is called."""

import copy
import gc
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.masked import as_masked_tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from rmsnorm import TorchRMSNorm, patch, unpatch
from rmsnorm.patching import replacement
from tolerance import assert_same_bits

N = 64


def norms(cls: Callable[..., nn.Module] = DeepseekV2RMSNorm, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(a replaced norm, the same norm as it was), with a random weight."""
    norm = cls(N, **options)
    if norm.weight is not None:
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    own = copy.deepcopy(norm)
    (found,) = patch(nn.ModuleDict({"norm": norm})).verdicts
    assert found.spec is not None, found
    return norm, own


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def runs_ours(norm: nn.Module, own: nn.Module, x: Tensor) -> bool:
    """In fp32 about 15 % of outputs differ between the two."""
    return not torch.equal(norm(x), own(x))


# --- inputs that our kernels cannot handle -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_inputs_of_other_dtypes_run_its_own_forward(dtype: torch.dtype) -> None:
    norm, own = norms()
    x = (draw(3, 5, N) * 4).to(dtype)
    assert_same_bits(torch.view_as_real(norm(x)) if dtype.is_complex else norm(x),
                     torch.view_as_real(own(x)) if dtype.is_complex else own(x))  # fmt: skip
    assert "its input has dtype" in str(replacement.why_own_forward(norm, x))


@pytest.mark.parametrize("shape", [(1,), (1, N), (2, 1, N)])
def test_weights_of_other_shapes_run_its_own_forward(shape: tuple[int, ...]) -> None:
    norm, own = norms()
    norm.weight = own.weight = nn.Parameter(draw(*shape))
    x = draw(2, 3, N)
    assert_same_bits(norm(x), own(x))
    assert "its weight has shape" in str(replacement.why_own_forward(norm, x))


def test_inputs_of_unproven_ranks_run_its_own_forward() -> None:
    norm, own = norms()
    x = draw(1, 2, 1, 2, 1, 3, N)
    assert_same_bits(norm(x), own(x))
    assert runs_ours(norm, own, draw(64, N))


def test_a_jagged_tensor_runs_its_own_forward() -> None:
    norm, own = norms()
    x = torch.nested.nested_tensor([draw(3, N), draw(5, N)], layout=torch.jagged)
    for ours, theirs in zip(norm(x).unbind(), own(x).unbind(), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*")
def test_a_masked_tensor_runs_its_own_forward() -> None:
    norm, own = norms()
    x = as_masked_tensor(draw(3, N), torch.ones(3, N, dtype=torch.bool))
    assert_same_bits(norm(x).get_data(), own(x).get_data())
    assert torch.equal(norm(x).get_mask(), own(x).get_mask())


def test_an_inference_tensor_that_reaches_a_trained_norm_runs_its_own_forward() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        norm, own = norms()
        with torch.inference_mode():
            x = draw(3, N, dtype=dtype)
        for one in (norm, own):
            one(x).float().square().sum().backward()
        assert_same_bits(norm.weight.grad, own.weight.grad)
        with torch.no_grad():
            assert replacement.why_own_forward(norm, x) is None


def test_fx_and_jit_trace_its_own_operators() -> None:
    norm, own = norms()
    x = draw(3, N)
    assert_same_bits(torch.fx.symbolic_trace(nn.Sequential(norm))(x), own(x))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(norm, (x,))
        assert "rmsnorm" not in str(traced.inlined_graph)
        leaf = x.clone().requires_grad_()
        traced(leaf).sum().backward()
        assert_same_bits(traced(x), own(x))
        assert leaf.grad is not None


def test_jit_script_restores_the_own_class_with_a_warning() -> None:
    norm, own = norms()
    model = nn.Sequential(norm)
    with pytest.warns(UserWarning, match="patch the model again"):
        scripted = torch.jit.script(model)
    x = draw(3, N)
    assert_same_bits(scripted(x), own(x))
    assert model[0] is norm
    assert type(norm) is DeepseekV2RMSNorm


@pytest.mark.parametrize("cls", [DeepseekV2RMSNorm, nn.RMSNorm])
def test_torch_fx_traces_its_own_forward_also_where_the_norm_is_the_root(cls: Any) -> None:
    norm, own = norms(cls)
    x = draw(3, N)
    for root in (norm, nn.Sequential(norm)):
        assert_same_bits(
            torch.fx.symbolic_trace(root)(x), norm(x) if cls is nn.RMSNorm and root is not norm else own(x)
        )


def test_a_replaced_norm_takes_the_arguments_of_its_own_class() -> None:
    class OptionalRMSNorm(ReshapingRMSNorm):
        def forward(self, x: Tensor | None = None, /) -> Any:
            return None if x is None else super().forward(x)

    norm, own = norms()
    x = draw(3, N)
    assert_same_bits(norm(hidden_states=x), norm(x))
    for arguments, named in (((), {}), ((x, x), {}), ((x,), {"hidden_states": x}), ((), {"x": x})):
        messages = []
        for one in (norm, own):
            with pytest.raises(TypeError) as raised:
                one(*arguments, **named)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
    norm, _ = norms(OptionalRMSNorm)
    assert norm() is None
    with pytest.raises(TypeError, match="positional-only"):
        norm(x=x)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore:.*")
def test_onnx_exports_its_own_operators(dynamo: bool) -> None:
    onnx = pytest.importorskip("onnx", reason="the ONNX exporters need the package onnx")
    if dynamo:
        pytest.importorskip("onnxscript", reason="this ONNX exporter needs the package onnxscript")
    norm, _ = norms()
    buffer = io.BytesIO()
    program = torch.onnx.export(nn.Sequential(norm).eval(), (draw(3, N),), buffer, dynamo=dynamo, verbose=False)
    if program is not None:
        program.save(buffer)
    operators = {node.op_type for node in onnx.load_from_string(buffer.getvalue()).graph.node}
    assert operators & {"Sqrt", "Rsqrt", "Reciprocal", "RMSNormalization", "SimplifiedLayerNormalization"}
    assert not any("norm" in name and name.islower() for name in operators)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("cls", [DeepseekV2RMSNorm, Gemma2RMSNorm, nn.RMSNorm])
def test_compiled_as_one_graph_it_has_the_bits_of_eager(backend: str, cls: type[nn.Module]) -> None:
    norm, own = norms(cls)
    compiled = torch.compile(norm, backend=backend, fullgraph=True)
    x = draw(16, 5, N)
    assert runs_ours(norm, own, x)
    assert_same_bits(compiled(x), norm(x))
    if backend == "aot_eager":
        seven = draw(1, 2, 1, 2, 1, 3, N)  # runs its own forward
        assert_same_bits(compiled(seven), own(seven))


class ReshapingRMSNorm(nn.Module):
    """Its output is contiguous unless its input's rows can be viewed as one dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        h = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * h.to(x.dtype)).view(*x.shape)


def strides(t: Tensor) -> list[int]:
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


@pytest.mark.parametrize("cls", [DeepseekV2RMSNorm, Gemma2RMSNorm, nn.RMSNorm, TorchRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_of_a_permuted_input_has_the_strides_of_its_own_class(cls: Any, dtype: torch.dtype) -> None:
    """So that what works after the norm works after the replaced norm, such as view."""
    if cls is TorchRMSNorm:
        norm, own = TorchRMSNorm(N), nn.RMSNorm(N)
    else:
        norm, own = norms(cls)
    norm.to(dtype)
    own.to(dtype)
    for shape in ((5, N), (3, 5, N), (2, 3, 5, N), (2, 1, 5, N)):
        x = draw(*shape, dtype=dtype)
        expected, dy = norm(x), draw(*shape, dtype=dtype)
        for order in itertools.permutations(range(x.dim())):
            permuted = x.permute(order).contiguous().permute([order.index(axis) for axis in range(x.dim())])
            leaf = permuted.detach().requires_grad_()
            y = norm(leaf)
            assert strides(y) == strides(own(permuted)), (shape, order)
            assert_same_bits(y.detach(), expected.detach())
            if order == tuple(range(x.dim()))[::-1]:
                contiguous = x.clone().requires_grad_()
                assert_same_bits(
                    *torch.autograd.grad(y, leaf, dy), *torch.autograd.grad(norm(contiguous), contiguous, dy)
                )
        if len(shape) > 2:
            sliced = torch.cat([x, x], 0).transpose(0, 1)[1:]
            assert strides(norm(sliced)) == strides(own(sliced))


def test_the_output_is_contiguous_if_that_of_its_own_class_is() -> None:
    norm, own = norms(ReshapingRMSNorm)
    for x in (draw(3, 5, N).transpose(0, 1), draw(2, N, 3, 5).permute(0, 2, 3, 1), draw(2, 3, N, 5).transpose(2, 3)):
        assert own(x).is_contiguous()
        assert norm(x).is_contiguous()
        assert_same_bits(norm(x), norm(x.contiguous()))


def test_several_normalized_dimensions_keep_channels_last() -> None:
    norm, own = nn.RMSNorm((4, 6, 5)), nn.RMSNorm((4, 6, 5))
    patch(nn.Sequential(norm))
    x = draw(3, 4, 6, 5).to(memory_format=torch.channels_last)
    assert norm(x).stride() == own(x).stride() == x.stride()
    assert_same_bits(norm(x), norm(x.contiguous()))


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_norm_keeps_the_memory_layout() -> None:
    norm, _ = norms()
    x = draw(2, N, 3, 5).permute(0, 2, 3, 1)
    y = torch.compile(norm, backend="aot_eager", fullgraph=True)(x)
    assert y.stride() == x.stride()
    assert_same_bits(y, norm(x))


@pytest.mark.parametrize("shape", [(4, 8, N), (2, 3, 5, N)])
def test_the_output_has_the_memory_layout_of_its_own_class(shape: tuple[int, ...]) -> None:
    norm, own = norms()
    x = draw(*shape)
    for y in (x.transpose(0, 1), x[:, ::2], x.transpose(0, 1)[1:], x[..., :1, :].expand(shape), x.flip(0)):
        z = y.detach().clone(memory_format=torch.preserve_format).requires_grad_() if y.is_contiguous() else y
        assert norm(z).stride() == own(z).stride()
        expected = replacement.replacement_class(DeepseekV2RMSNorm, type(norm)._rmsnorm_rule, True).forward(
            norm, z.contiguous()
        )
        assert_same_bits(norm(z), expected)


def test_an_inference_tensor_works_after_ordinary_calls() -> None:
    norm, own = norms()
    for _ in range(2):
        norm(draw(4, N)).sum().backward()
    with torch.inference_mode():
        x = draw(4, N)
    norm.weight.grad = None
    norm(x).square().sum().backward()
    own(x).square().sum().backward()
    assert_same_bits(norm.weight.grad, own.weight.grad)


# --- attributes of the module -------------------------------------------------------------------------------------


def copies(norm: nn.Module) -> dict[str, nn.Module]:
    return {"itself": norm, "deepcopy": copy.deepcopy(norm), "pickle": pickle.loads(pickle.dumps(norm))}


@pytest.mark.parametrize("which", ["itself", "deepcopy", "pickle"])
@pytest.mark.parametrize(
    ("cls", "name"), [(DeepseekV2RMSNorm, "variance_epsilon"), (Gemma2RMSNorm, "eps"), (nn.RMSNorm, "eps")]
)
def test_eps_is_read_at_each_call(cls: type[nn.Module], name: str, which: str) -> None:
    norm, own = norms(cls)
    norm = copies(norm)[which]
    x = draw(3, N) * 1e-3
    for eps in (1e-3, 0.5, 0.0, 1, 1e-6):
        setattr(norm, name, eps)
        setattr(own, name, eps)
        assert replacement.why_own_forward(norm, x) is None
        torch.testing.assert_close(norm(x), own(x), rtol=1e-5, atol=1e-7)
        assert norm.extra_repr().startswith(own.extra_repr())


def test_eps_may_be_an_attribute_of_the_class() -> None:
    class ClassEpsRMSNorm(ReshapingRMSNorm):
        eps = 1e-6

        def __init__(self, width: int) -> None:
            super().__init__(width)
            del self.eps

    norm, own = norms(ClassEpsRMSNorm)
    x = draw(64, N) * 1e-3
    assert runs_ours(norm, own, x)
    ClassEpsRMSNorm.eps = 0.5
    torch.testing.assert_close(norm(x), own(x), rtol=1e-5, atol=1e-7)


def test_an_eps_of_none_means_that_of_torch() -> None:
    norm, own = norms(nn.RMSNorm)
    x = draw(64, N) * 1e-3
    assert runs_ours(norm, own, x)
    norm.eps = own.eps = 1e-3
    torch.testing.assert_close(norm(x), own(x), rtol=1e-5, atol=1e-7)
    norm.eps = own.eps = None
    torch.testing.assert_close(norm(x), own(x), rtol=1e-5, atol=1e-7)
    norm, own = norms()
    norm.variance_epsilon = own.variance_epsilon = None
    for one in (norm, own):
        with pytest.raises(TypeError):
            one(x)


@pytest.mark.parametrize("eps", [-1e-3, float("nan"), "1e-3", torch.tensor(1e-3)])
def test_an_invalid_eps_runs_its_own_forward(eps: Any) -> None:
    norm, own = norms()
    norm.variance_epsilon = own.variance_epsilon = eps
    x = draw(3, N)
    if isinstance(eps, str):
        with pytest.raises(TypeError):
            norm(x)
    else:
        assert_same_bits(norm(x), own(x))


@pytest.mark.usefixtures("fresh_dynamo")
def test_eps_is_read_at_each_call_of_a_compiled_norm() -> None:
    norm, _ = norms()
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    x = draw(3, N) * 1e-3
    assert_same_bits(compiled(x), norm(x))
    norm.variance_epsilon = 1e-3
    assert_same_bits(compiled(x), norm(x))


def test_without_its_weight_it_raises_as_its_class_does() -> None:
    norm, own = norms()
    norm.weight = own.weight = None
    for one in (norm, own):
        with pytest.raises(TypeError, match="NoneType"):
            one(draw(3, N))


def test_a_changed_attribute_runs_its_own_forward() -> None:
    class SwitchedRMSNorm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))
            self.eps, self.halved = 1e-6, False

        def forward(self, x: Tensor) -> Tensor:
            h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
            y = self.weight * h.to(x.dtype)
            return y / 2 if self.halved or getattr(self, "late", None) is not None else y

    for name, value in (("halved", True), ("late", 1)):
        norm, own = norms(SwitchedRMSNorm)
        x = draw(64, N)
        assert runs_ours(norm, own, x)
        setattr(norm, name, value)
        setattr(own, name, value)
        assert_same_bits(norm(x), own(x))
        assert f"its attribute {name} has changed" in str(replacement.why_own_forward(norm, x))


# --- other libraries --------------------------------------------------------------------------------------


class OtherRMSNorm(nn.Module):
    """Its forward is bound to instances of other classes, as Liger does it."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_check_reports_a_forward_that_was_set_after_patch() -> None:
    model = nn.ModuleDict({"a": DeepseekV2RMSNorm(N), "b": DeepseekV2RMSNorm(N), "c": DeepseekV2RMSNorm(N)})
    report = patch(model)
    assert report.check() == ()
    model["a"].forward = OtherRMSNorm.forward.__get__(model["a"])
    model["b"].weight = None
    (a, b) = report.check()
    assert a.startswith("a runs a forward that was set on the instance (test_replacement.OtherRMSNorm.forward")
    assert b == "b runs its own forward, because its weight is None"
    unpatch(model["c"])
    assert "c is not patched any more: its class is transformers.models.deepseek_v2" in report.check()[2]
    del model["a"], model["b"], model["c"]
    gc.collect()
    assert report.check() == ()
    assert pickle.loads(pickle.dumps(report)) == report
    assert copy.deepcopy(report).check() == ()


def test_a_forward_that_was_set_before_patch_raises_with_its_name_and_the_fix() -> None:
    model = nn.ModuleDict({"a": DeepseekV2RMSNorm(N), "b": DeepseekV2RMSNorm(N)})
    model["a"].forward = OtherRMSNorm.forward.__get__(model["a"])
    with pytest.raises(
        RuntimeError, match=r"a has a forward .*\(test_replacement\.OtherRMSNorm\.forward\).*rms_norm=False"
    ):
        patch(model)
    assert type(model["b"]) is DeepseekV2RMSNorm
