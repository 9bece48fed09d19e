"""The public names and their signatures, and the operators. docs/versions.md says in which version they may change."""

import inspect
from pathlib import Path

import pytest
import torch

import rmsnorm

pytestmark = pytest.mark.short

ROOT = Path(rmsnorm.__file__).parent
SIGNATURES = {
    "rms_norm": "x, weight=None, eps=1e-06, *, cast='early', offset=0.0, variance_size=None",
    "add_rms_norm": "x, residual, weight=None, eps=1e-06, *, cast='early', offset=0.0, variance_size=None",
    "rms_norms": "xs, weights=None, eps=1e-06, *, cast='early', offset=0.0",
    "RMSNorm": "hidden_size, eps=1e-06, *, cast='early', offset=0.0, heads=None, variance_size=None, "
    "elementwise_affine=True, device=None, dtype=None",
    "gated_rms_norm": "x, gate, weight=None, eps=1e-06, *, cast='early', activation='silu', gate_first=False, groups=1",
    "GatedRMSNorm": "hidden_size, eps=1e-06, *, cast='early', activation='silu', gate_first=False, groups=1, "
    "elementwise_affine=True, device=None, dtype=None",
    "DeepseekV2RMSNorm": "hidden_size, eps=1e-06",
    "TorchRMSNorm": "normalized_shape, eps=None, elementwise_affine=True, device=None, dtype=None",
    "patch": "model, *, strict=True, fuse_residual=True, recompute=False",
    "prove": "module, *, strict=True",
    "Proof": "class_name, spec=None, reason='', rule=None, matches_published_bits=True, output_changes=<factory>, "
    "memory_saved_per_row=<factory>",
    "batch_invariant": "",
    "recompute": "",
    "register": "",
    "decompositions": "",
    "cost": "shape, dtype=torch.bfloat16, weight_dtype=None, *, implementation='ours', phase='inference', device='cpu', "
    "cast='early', offset=0.0, elementwise_affine=True, master=False, recompute=False, by_head=False, "
    "threads=None",
    "Cost": "flops, read, written, kernels, saved, saved_by_readers, peak, least, parameters, gradients, optimizer, "
    "derived, terms",
    "unpatch": "model",
    "explain": "x, weight=None, residual=None, *, eps=1e-06, cast='early', offset=0.0, variance_size=None, gate=None, "
    "activation='silu', "
    "gate_first=False, groups=1",
    "warmup": "device='cpu', dtypes=(torch.float32, torch.bfloat16, torch.float16), weight_dtypes=None, hidden_size=128",
    "PatchReport": "verdicts, skipped=(), fuse_residual=True, recompute=False",
}


# Exported programs contain these operators.
SCHEMAS = {
    "forward": "(Tensor x, Tensor? residual, Tensor? weight, float eps, str cast, float offset, bool with_rstd, *, "
    "bool fuse_residual=False, bool recompute=False) -> (Tensor y, Tensor s, Tensor rstd)",
    "backward": "(Tensor dy, Tensor? ds, Tensor x, Tensor? weight, Tensor rstd, str cast, float offset, bool "
    "need_dx, bool need_dw) -> (Tensor dx, Tensor dw)",
    "backward_of_sum": "(Tensor[] dy, Tensor? ds, Tensor x, Tensor? weight, Tensor rstd, str cast, float offset, "
    "bool need_dx, bool need_dw) -> (Tensor dx, Tensor dw)",
    "slice_forward": "(Tensor x, Tensor? residual, Tensor? weight, float eps, str cast, float offset, int "
    "variance_size, bool with_rstd) -> (Tensor y, Tensor s, Tensor rstd)",
    "slice_backward": "(Tensor dy, Tensor? ds, Tensor x, Tensor? weight, Tensor rstd, str cast, float offset, int "
    "variance_size, bool need_dx, bool need_dw) -> (Tensor dx, Tensor dw)",
    "forward_pair": "(Tensor x, Tensor? weight, Tensor x2, Tensor? weight2, float eps, str cast, float offset, bool "
    "with_rstd) -> (Tensor y, Tensor rstd, Tensor y2, Tensor rstd2)",
    "backward_pair": "(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, Tensor dy2, Tensor x2, Tensor? weight2, "
    "Tensor rstd2, str cast, float offset, bool need_dx, bool need_dw) -> (Tensor dx, Tensor dw, Tensor dx2, Tensor "
    "dw2)",
    "forward_sandwich": "(Tensor x, Tensor? weight, Tensor residual, Tensor? weight2, float eps, str cast, float "
    "offset, bool with_rstd) -> (Tensor y, Tensor s, Tensor rstd, Tensor rstd2)",
    "begin_forward": "(Tensor x, Tensor? residual) -> (Tensor s, Tensor S)",
    "finish_forward": "(Tensor x, Tensor? weight, Tensor S, int N, float eps, str cast, float offset, bool "
    "with_rstd) -> (Tensor y, Tensor rstd)",
    "begin_backward": "(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, str cast, float offset) -> Tensor S",
    "finish_backward": "(Tensor dy, Tensor? ds, Tensor x, Tensor? weight, Tensor rstd, Tensor S, int N, str cast, "
    "float offset, bool need_dw) -> (Tensor dx, Tensor dw)",
    "gated_forward": "(Tensor x, Tensor gate, Tensor? weight, float eps, str cast, str activation, bool gate_first, "
    "int groups, bool with_rstd) -> (Tensor y, Tensor rstd)",
    "gated_backward": "(Tensor dy, Tensor x, Tensor gate, Tensor? weight, Tensor rstd, str cast, str activation, "
    "bool gate_first, int groups, bool need_dx, bool need_dgate, bool need_dw) -> (Tensor dx, Tensor dgate, Tensor "
    "dw)",
}


def bare(function: object) -> str:
    parameters = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(plain))[1:-1]


def test_the_public_names_have_these_signatures() -> None:
    assert sorted(rmsnorm.__all__) == sorted(SIGNATURES)
    assert {name: bare(getattr(rmsnorm, name)) for name in rmsnorm.__all__} == SIGNATURES


def test_the_operators_have_these_schemas() -> None:
    schemas = [str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("rmsnorm::")]
    assert sorted(schemas) == sorted(f"rmsnorm::{name}{schema}" for name, schema in SCHEMAS.items())


def test_the_package_ships_its_type_information() -> None:
    assert (ROOT / "py.typed").exists()
