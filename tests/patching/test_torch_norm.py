"""TorchRMSNorm beside torch.nn.RMSNorm, and beside what patch makes of one."""

import copy
import inspect
import itertools
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from rmsnorm import TorchRMSNorm, compat, explain, patch, prove, unpatch
from rmsnorm.patching.replacement import why_own_forward
from rmsnorm.patching.torch_norm import torch_rule
from rmsnorm.spec import DTYPES


def pair(*arguments, seed: int = 0, **named) -> tuple[nn.RMSNorm, TorchRMSNorm]:
    """torch's and ours, of the same arguments and the same random weight."""
    theirs, ours = nn.RMSNorm(*arguments, **named), TorchRMSNorm(*arguments, **named)
    generator = torch.Generator().manual_seed(seed)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, generator=generator)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def rows(norm: nn.RMSNorm, leading: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*leading, *norm.normalized_shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(64,), (8, 16)])
@pytest.mark.parametrize("eps", [None, 1e-6])
def test_the_rule_is_what_the_proof_finds_for_the_class_of_torch(shape, eps, affine) -> None:
    proof = prove(nn.RMSNorm(shape, eps, affine))
    assert proof.rule is not None, proof.reason
    assert proof.rule.attributes == (("normalized_shape", shape),)  # the class reads it at each call
    assert replace(proof.rule, attributes=()) == torch_rule(shape, affine)


@pytest.mark.parametrize(
    ("shape", "eps", "affine"), [(64, None, True), ([4, 16], 1e-5, True), (torch.Size((2, 4, 8)), None, False)]
)
def test_it_computes_what_patch_makes_of_the_class_of_torch(shape, eps, affine) -> None:
    """Outputs and gradients in all pairs of dtypes, under autocast too; where torch's own forward runs as well."""
    theirs, ours = pair(shape, eps, affine)
    assert len(patch(nn.Sequential(theirs)).replaced) == 1
    own = []
    for of_x, of_w in itertools.product(DTYPES, DTYPES if affine else DTYPES[:1]):
        theirs.to(of_w)
        ours.to(of_w)
        for leading, autocast in (((3, 5), False), ((), False), ((1, 1, 1, 2, 3), False), ((3, 5), True)):
            x, dy = rows(ours, leading, of_x), rows(ours, leading, of_x).flip(-1)
            results = []
            for norm in (theirs, ours):
                leaves = [x.clone().requires_grad_(), *norm.parameters()]
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    y = norm(leaves[0])
                    own.append("own forward" in explain(x, norm))
                results.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
            assert own[-2] == own[-1] == (len(leading) == 5 or torch.float64 in (of_x, of_w))
            assert results[0][0].dtype == of_x
            for a, b in zip(*results, strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)
    assert set(own) == {True, False}


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_on_a_cpu_changes_no_bit(autocast: torch.dtype) -> None:
    """torch's list of what autocast casts on a CPU has no rms_norm."""
    theirs, ours = pair(64)
    patch(nn.Sequential(theirs))
    for norm, dtype in itertools.product((theirs, ours), (torch.float32, torch.bfloat16, torch.float16)):
        x = rows(ours, (200,), dtype)
        expected, own = norm(x), nn.RMSNorm.forward(norm, x)
        with torch.autocast("cpu", autocast):
            y = norm(x)
            assert torch.equal(nn.RMSNorm.forward(norm, x), own)
        assert y.dtype == own.dtype
        assert torch.equal(y, expected)
        assert dtype != torch.float32 or not torch.equal(y, own)  # so ours ran


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_output_has_torchs_dtype_under_autocast(x_dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    """Fake tensors know what autocast does on a GPU: it casts F.rms_norm to fp32, in the versions of torch that do."""
    with torch.no_grad(), FakeTensorMode(), torch.device("cuda"):
        theirs, ours = nn.RMSNorm(64, dtype=w_dtype), TorchRMSNorm(64, dtype=w_dtype)
        x = torch.empty(3, 64, dtype=x_dtype)
        torch.set_autocast_enabled("cuda", True)
        try:
            expected, y = theirs(x), ours(x)
            own = why_own_forward(ours, x, torch_rule((64,), True)) is not None
        finally:
            torch.set_autocast_enabled("cuda", False)
        without = theirs(x)
    assert y.dtype == expected.dtype
    assert own or expected.dtype == without.dtype  # a cast is left to torch
    assert own is not (x_dtype == w_dtype == torch.float32 or "cuda" in compat.RMS_NORM_UNCHANGED_BY_AUTOCAST)


def test_our_kernel_runs() -> None:
    _, ours = pair(64)
    assert "own forward" not in explain(rows(ours, (3,)), ours)
    x = rows(ours, (200,))
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    theirs, late = nn.RMSNorm.forward(ours, x), exact * ours.weight.double()
    assert (ours(x) - late).abs().sum() < (theirs - late).abs().sum()  # closer than torch's, whose sum is fp32's


def test_it_is_a_torch_rms_norm() -> None:
    theirs, ours = pair((4, 16), 1e-5, dtype=torch.bfloat16)
    assert isinstance(ours, nn.RMSNorm)
    shown = [[(p.name, p.kind, p.default) for p in inspect.signature(cls).parameters.values()]
             for cls in (TorchRMSNorm, nn.RMSNorm)]  # fmt: skip
    assert shown[0] == shown[1]
    assert repr(ours) == f"Torch{theirs!r}"
    assert ours.normalized_shape == (4, 16)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight"]
    assert vars(ours).keys() == vars(theirs).keys()
    x = rows(ours, (3,), torch.bfloat16)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is TorchRMSNorm
        assert torch.equal(copied(x), ours(x))
    ours.reset_parameters()
    assert torch.equal(ours.weight, torch.ones_like(ours.weight))
    assert TorchRMSNorm(64, None, False).weight is None
    assert TorchRMSNorm(64, device="meta").weight.is_meta
    for norm in (theirs, ours):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            norm(x[..., :3])
    ours.normalized_shape, ours.weight = (16,), nn.Parameter(torch.ones(16))
    assert torch.equal(ours(x), TorchRMSNorm(16, 1e-5)(x))


def test_patch_and_unpatch_leave_it_alone() -> None:
    model = nn.Sequential(TorchRMSNorm(64))
    assert patch(model).verdicts == ()
    unpatch(model)
    assert type(model[0]) is TorchRMSNorm


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("shape", [64, (4, 16)])
def test_compiled_and_exported(shape) -> None:
    """Without a call before, so that nothing is prepared."""
    _, ours = pair(shape, None)
    with warnings.catch_warnings(action="error", category=UserWarning):
        compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
        exported = torch.export.export(ours, (rows(ours, (2, 3)),)).module()
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = rows(ours, (2, 3), dtype)
            assert torch.equal(compiled(x), ours(x))
        assert torch.equal(exported(rows(ours, (2, 3))), ours(rows(ours, (2, 3))))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_and_traced_as_the_class_of_torch(tmp_path) -> None:
    theirs, ours = pair(64, 1e-5)
    x = rows(ours, (3,))
    scripted = torch.jit.script(nn.Sequential(ours))
    assert type(ours) is TorchRMSNorm
    assert torch.equal(scripted(x), theirs(x))
    with warnings.catch_warnings(action="error", category=torch.jit.TracerWarning):
        traced = torch.jit.trace(ours, (x,))
    assert torch.equal(traced(x), theirs(x))
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(ours))(x), theirs(x))
