"""patch and unpatch: replace every norm of a model that is proven to be an RMSNorm of ours, in place.

A norm is proven, not recognized by its name: the operators that its own forward runs must be those of exactly one
RMSNorm, in every state in which it can be called (proof.py). It then gets a class of ours, a subclass of its own class
(replacement.py); its parameters, names and hooks stay as they are.
"""

import re
import sys
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rmsnorm.errors import complaint, type_name
from rmsnorm.patching.finding import Proof
from rmsnorm.patching.layers import LAYERS
from rmsnorm.patching.other_libraries import check_not_fsdp1, why_class_is_fixed, why_model_is_too_late, why_too_late
from rmsnorm.patching.patch_report import PatchReport, SkippedModule, UnpatchReport, Verdict
from rmsnorm.patching.proof import in_words, proof_of
from rmsnorm.patching.recomputing import is_recomputing, set_recomputing, whole_model
from rmsnorm.patching.replacement import (
    hints_for,
    hints_of,
    original_class,
    replacement_class,
    rule_of,
    set_class,
)
from rmsnorm.spec import Hints, check_bool

_EPS_NAME = re.compile(r"(^|_)eps(ilon)?(_|$)", re.IGNORECASE)  # but not "steps"


def patch(model: nn.Module, *, strict: bool = True, fuse_residual: bool = True, recompute: bool = False) -> PatchReport:
    """Replace, in place, every norm of a model that is proven to compute an RMSNorm of ours.

    `patch` considers the modules with "norm" in the name of their class, and those that have the attributes of an
    RMSNorm: one 1-D parameter and an eps. It runs each norm's own forward on stand-ins and proves from the operators
    what it computes. A replaced norm keeps its parameters, name, hooks and `isinstance`; where our kernels cannot serve
    a call, it runs its own forward. All other norms stay as they are. Patching a model again proves its norms again.
    Norms with a gate, such as Qwen3-Next's and Mamba 2's, are proven and replaced too; `fuse_residual` and `recompute`
    do not apply to them.

    Patch a model first, then apply PEFT, torch.compile, FSDP, tensor parallelism or accelerate.

    Args:
        model: The model, or any part of it.
        strict: If False, `patch` also replaces norms that compute the mean or the rsqrt in another way than the
            published classes do, such as with `1 / sqrt`. Some more of their outputs change.
        fuse_residual: Whether torch.compile fuses residual additions, such as `hidden = residual + hidden`, with the
            norms that follow them, in the forward and in the backward pass, without changing a bit. It has no effect
            in eager mode, where the model's own code makes the addition and the norm as separate calls.
        recompute: Whether norm outputs are not kept for the backward pass, which recomputes them with the same bits.
            The forward of `model` then runs in the context `rmsnorm.recompute()`; see there. If you call only a part
            of the model, use the context yourself.

    Returns:
        What was replaced and what it changes, and what was not replaced and why. Print it.

    Raises:
        TypeError: If `model` is not a torch.nn.Module, or another argument is not a bool.
        RuntimeError: If FSDP or tensor parallelism has sharded a norm already, or if another library, such as
            accelerate, has replaced the forward of a norm or, with recompute=True, of the model; also if, with
            recompute=True, the class of the model cannot be changed. The model is not changed then.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.RMSNorm(64, eps=1e-6))
        >>> report = rmsnorm.patch(model)
        >>> [verdict.name for verdict in report.replaced]
        ['1']
        >>> model[1]
        RMSNorm((64,), eps=1e-06, elementwise_affine=True, rmsnorm: late)
    """
    _check_module("patch", model)
    for argument, value in (("strict", strict), ("fuse_residual", fuse_residual), ("recompute", recompute)):
        check_bool("patch", argument, value)
    check_not_fsdp1(model)
    hints = Hints(fuse_residual, recompute)
    proofs: dict[Any, Proof] = {}
    norms: list[tuple[str, nn.Module, Proof]] = []
    skipped: list[SkippedModule] = []
    for name, module in model.named_modules():
        cls = original_class(module)
        if not _is_candidate(module):
            reason = _why_skipped(module)
        else:
            proof = replaceable(module, proof_of(module, strict, proofs), hints)
            if proof.rule is not None or "rmsnorm" in cls.__name__.lower() or rule_of(module) is not None:
                norms.append((name, module, proof))
                continue
            reason = proof.reason  # neither named like an RMSNorm nor proven to be one
        if reason is not None:
            resembles_rmsnorm = not isinstance(module, LAYERS) and _name_of_eps(module) is not None
            skipped.append(SkippedModule(name, cls.__name__, reason, resembles_rmsnorm))
    for name, module, proof in norms:
        late = why_too_late(module) if _class_for(module, proof, hints) is not type(module) else None
        if late is not None:
            raise RuntimeError(f"[patch] {name} {late}")
    whole = whole_model(model)
    late = why_model_is_too_late(whole) if is_recomputing(whole) != recompute else None
    if late is not None:
        raise RuntimeError(f"[patch] with recompute={recompute}, the model {late}")
    # First, because it may fail. A norm alone has no part that saves its output.
    _set_recomputing(whole, recompute and not any(module is whole and proof.rule for _, module, proof in norms))
    verdicts = [replace_norm(name, module, proof, hints) for name, module, proof in norms]
    return PatchReport.of_model(verdicts, skipped, hints, whole, [module for _, module, _ in norms])


def unpatch(model: nn.Module) -> UnpatchReport:
    """Restore the own class of every norm in the model that `patch` replaced.

    Args:
        model: The model, or any part of it.

    Returns:
        The names of the norms that were restored.

    Raises:
        TypeError: If `model` is not a torch.nn.Module.
        RuntimeError: If FSDP or a parametrization has changed the class of a norm since it was patched. The model is
            not changed then.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.RMSNorm(64))
        >>> report = rmsnorm.patch(model)
        >>> print(rmsnorm.unpatch(model))
        1 norm has its own class again: 0
    """
    _check_module("unpatch", model)
    patched = [(name, module) for name, module in model.named_modules() if original_class(module) is not type(module)]
    for name, module in patched:
        why = why_class_is_fixed(module)
        if why is not None:
            raise RuntimeError(f"[unpatch] {name or 'the model'} {why}; call unpatch before that, or rebuild the model")
    norms = [name for name, module in patched if rule_of(module) is not None]
    recompute = any(is_recomputing(module) for _, module in patched)
    for _, module in patched:
        set_class(module, original_class(module))
    inductor = sys.modules.get("rmsnorm.ops.inductor")  # imported when a replaced norm is compiled
    if inductor is not None:
        inductor.remove_pass()  # another patched model installs it again when it is compiled
    return UnpatchReport(tuple(norms), recompute)


def _check_module(where: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(complaint(where, "model", f"is {type_name(model)}", "a torch.nn.Module"))


# --- proving and replacing one norm --------------------------------------------------------------------------


def replaceable(module: nn.Module, proof: Proof, hints: Hints) -> Proof:
    """The proof, or why no class for it can be made, which must not fail later, when norms are replaced already."""
    try:
        _class_for(module, proof, hints)
        return proof
    except Exception as error:  # noqa: BLE001  # one unusual class must not end patch for the other norms
        return Proof(proof.class_name, reason=f"its class cannot be subclassed: {in_words(error)}")


def replace_norm(name: str, module: nn.Module, proof: Proof, hints: Hints) -> Verdict:
    """Give the module the class for what was proven. If that fails it keeps its class, and the verdict says so."""
    before = type(module)
    try:
        set_class(module, _class_for(module, proof, hints))
    except Exception as error:  # noqa: BLE001
        if type(module) is not before:
            object.__setattr__(module, "__class__", before)
        proof = Proof(proof.class_name, reason=f"its class cannot be changed: {in_words(error)}")
    return Verdict(**vars(proof), name=name)


def _set_recomputing(model: nn.Module, recompute: bool) -> None:
    before = type(model)
    try:
        set_recomputing(model, recompute)
    except Exception as error:
        if type(model) is not before:
            object.__setattr__(model, "__class__", before)
        raise RuntimeError(
            f"[patch] with recompute={recompute}, the class of the model cannot be changed: {in_words(error)}; "
            "use the context rmsnorm.recompute()"
        ) from error


def _class_for(module: nn.Module, proof: Proof, hints: Hints) -> type[nn.Module]:
    if proof.rule is None:
        return original_class(module)
    if proof.rule == rule_of(module) and hints_for(proof.rule, hints) == hints_of(module):
        return type(module)  # ours, or FSDP's subclass of ours
    return replacement_class(original_class(module), proof.rule, hints)


# --- which modules are considered ----------------------------------------------------------------------------


def _is_candidate(module: nn.Module) -> bool:
    """Whether to prove a module. The test is cheap, because a model has thousands of modules."""
    if isinstance(module, LAYERS) or _is_other_torch_module(module):
        return False
    return _is_named_norm(module) or _name_of_eps(module) is not None


def _is_named_norm(module: nn.Module) -> bool:
    return "norm" in original_class(module).__name__.lower() or isinstance(module, nn.RMSNorm)


def _is_other_torch_module(module: nn.Module) -> bool:
    """Whether it is one of torch's own modules other than RMSNorm."""
    cls = original_class(module)
    return str(cls.__module__).startswith("torch.nn.modules.") and cls is not nn.RMSNorm


def _why_skipped(module: nn.Module) -> str | None:
    """Why a module that is no candidate is not considered; None if it does not resemble a norm."""
    if isinstance(module, LAYERS):
        return "it is a layer of rmsnorm already"
    return "it is a module of torch.nn other than RMSNorm" if _is_named_norm(module) else None


def _name_of_eps(module: nn.Module) -> str | None:
    """The attribute that holds the eps of a module with the attributes of an RMSNorm; None for any other module."""
    held = [p for p in (*module._parameters.values(), *module._modules.values()) if p is not None]
    if len(held) != 1 or not isinstance(held[0], Tensor) or is_lazy(held[0]) or held[0].dim() != 1:
        return None
    return next(filter(_EPS_NAME.search, vars(module)), None)
