"""The providers that `rmsnorm bench` measures. To measure another norm, add a line to PROVIDERS."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

import rmsnorm
from rmsnorm import gated_reference
from rmsnorm.errors import CommandError
from rmsnorm.spec import Spec

EPS = 1e-6

Norm = Callable[[Tensor, Tensor], Tensor]
AddNorm = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
GatedNorm = Callable[[Tensor, Tensor, Tensor, Spec], Tensor]


@dataclass(frozen=True)
class Provider:
    """Something that is measured.

    Attributes:
        name: Its name in tables, in JSON and on the command line.
        norm: (x, w) -> y; None for a copy of as many bytes.
        compiled: Whether it goes through `torch.compile`.
        equal: Whether it computes the Definition up to rounding.
        add: (x, residual, w) -> (y, x + residual); without it, the sum and then `norm` are called.
        package: The package that it needs; without that package it is left out.
        gated: (x, gate, w, spec) -> y; without it, the provider is left out of gated modes.
    """

    name: str
    norm: Norm | None
    compiled: bool = False
    equal: bool = True
    add: AddNorm | None = None
    package: str = ""
    gated: GatedNorm | None = None


def definition(x: Tensor, w: Tensor) -> Tensor:
    """Compute the published forward, with the same temporary tensors as the class.

    Args:
        x: (..., N).
        w: (N,).
    """
    h = x.to(torch.float32)
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + EPS)
    return w * h.to(x.dtype)


def liger(x: Tensor, w: Tensor, spec: Spec) -> Tensor:
    """Call Liger's kernel for a spec. Its default overwrites the incoming gradient, which a benchmark needs again."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    casting = "llama" if spec.cast == "early" else "gemma"
    y: Tensor = LigerRMSNormFunction.apply(x, w, spec.eps, spec.offset, casting, False)
    return y


def _liger_add(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    y, s = LigerFusedAddRMSNormFunction.apply(x, residual, w, EPS, 0.0, "llama", False)
    return y, s


def _quack(x: Tensor, w: Tensor) -> Tensor:
    from quack.rmsnorm import rmsnorm as norm

    y: Tensor = norm(x, w, eps=EPS)
    return y


def _quack_add(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    from quack.rmsnorm import rmsnorm as norm

    y, s = norm(x, w, residual=residual, eps=EPS, prenorm=True)
    return y, s


def _flashinfer(x: Tensor, w: Tensor) -> Tensor:
    from flashinfer.norm import rmsnorm as norm

    y: Tensor = norm(x, w, EPS)
    return y


def _fla(x: Tensor, w: Tensor) -> Tensor:
    from fla.modules.norm.layernorm import rms_norm as norm

    y: Tensor = norm(x, w, None, eps=EPS)
    return y


def _fla_add(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    from fla.modules.norm.layernorm import rms_norm as norm

    y, s = norm(x, w, None, residual=residual, eps=EPS, prenorm=True)
    return y, s


def _ours_gated(x: Tensor, gate: Tensor, w: Tensor, spec: Spec) -> Tensor:
    assert spec.gate is not None
    return rmsnorm.gated_rms_norm(
        x, gate, w, spec.eps, cast=spec.cast, activation=spec.gate.activation, gate_first=spec.gate.first,
        groups=spec.groups,
    )  # fmt: skip


def _fla_gated(x: Tensor, gate: Tensor, w: Tensor, spec: Spec) -> Tensor:
    from fla.modules.fused_norm_gate import rms_norm_gated as norm

    assert spec.gate is not None
    if spec.gate.first or spec.groups > 1:
        raise ValueError("its gated norm has neither groups nor a gate that comes first")
    y: Tensor = norm(x, gate, w, None, eps=spec.eps)
    return y


def _mamba_ssm_gated(x: Tensor, gate: Tensor, w: Tensor, spec: Spec) -> Tensor:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn as norm

    assert spec.gate is not None
    width = x.shape[-1] // spec.groups
    y: Tensor = norm(x, w, None, z=gate, eps=spec.eps, group_size=width, norm_before_gate=not spec.gate.first)
    return y


PROVIDERS = (
    Provider(
        "ours",
        lambda x, w: rmsnorm.rms_norm(x, w, EPS),
        add=lambda x, r, w: rmsnorm.add_rms_norm(x, r, w, EPS),
        gated=_ours_gated,
    ),
    Provider("copy", None),
    Provider("Definition", definition, gated=gated_reference.published),
    Provider("F.rms_norm", lambda x, w: F.rms_norm(x, (x.shape[-1],), w, EPS)),
    Provider("LayerNorm", lambda x, w: F.layer_norm(x, (x.shape[-1],), w, None, EPS), equal=False),
    Provider("torch.compile", definition, compiled=True, gated=gated_reference.published),
    Provider("Liger", lambda x, w: liger(x, w, Spec(EPS)), add=_liger_add, package="liger_kernel"),
    Provider("QuACK", _quack, add=_quack_add, package="quack"),
    Provider("FlashInfer", _flashinfer, package="flashinfer"),
    Provider("fla", _fla, add=_fla_add, package="fla", gated=_fla_gated),
    Provider("mamba_ssm", None, package="mamba_ssm", gated=_mamba_ssm_gated),
)


def versions(measured: Iterable[Provider]) -> dict[str, str]:
    """Return the versions of the packages that these providers need.

    Args:
        measured: The providers.

    Returns:
        Versions by the name under which pip knows a package; "unknown" if pip does not know it.
    """
    found: dict[str, str] = {}
    known = packages_distributions()
    for provider in measured:
        if provider.package:
            names = dict.fromkeys(known.get(provider.package, ()))
            found |= {name: version(name) for name in names} or {provider.package: "unknown"}
    return found


def providers(device_type: str, only: Sequence[str] = ()) -> tuple[Provider, ...]:
    """Return the providers that can run on a device. The other packages have kernels for GPUs only.

    Args:
        device_type: "cpu" or "cuda".
        only: Names of providers; with any, only these, ours and the copy are returned.

    Raises:
        CommandError: If a named provider cannot run.
    """
    known = tuple(p for p in PROVIDERS if not p.package or (device_type == "cuda" and find_spec(p.package) is not None))
    names = [p.name for p in known]
    for name in only:
        if name not in names:
            raise CommandError(
                f"--provider {name!r} cannot be measured here: give one of {', '.join(map(repr, names))}"
            )
    return tuple(p for p in known if not only or p.name in ("ours", "copy", *only))
