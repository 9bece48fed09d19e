"""The public names and their signatures."""

import inspect
from pathlib import Path

import pytest

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


def bare(function: object) -> str:
    parameters = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(plain))[1:-1]


def test_the_public_names_have_these_signatures() -> None:
    assert sorted(rmsnorm.__all__) == sorted(SIGNATURES)
    assert {name: bare(getattr(rmsnorm, name)) for name in rmsnorm.__all__} == SIGNATURES


def test_the_package_ships_its_type_information() -> None:
    assert (ROOT / "py.typed").exists()
