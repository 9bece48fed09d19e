"""Adapters for transformers and for the `kernels` library of Hugging Face.

patch_mapping   for transformers.monkey_patching: models are built with replaced norms.
kernel_mapping  for kernels.kernelize: norms run our kernels until `kernelize` gives them others.

Both prove norms as `rmsnorm.patch` does; a norm that is not proven keeps its own forward. `rmsnorm.patch(model)` does
the same for a model that exists, and needs neither library.
"""

import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from rmsnorm.errors import complaint, type_name
from rmsnorm.patching.finding import Proof
from rmsnorm.patching.patch import replace_norm, replaceable
from rmsnorm.patching.proof import proof_of
from rmsnorm.patching.replacement import forward_by_rule
from rmsnorm.patching.rule import Rule
from rmsnorm.spec import Hints, check_bool


def patch_mapping(
    *sources: type[nn.Module] | ModuleType, strict: bool = True, fuse_residual: bool = True
) -> dict[str, type[nn.Module]]:
    """Make a mapping for `transformers.monkey_patching.register_patch_mapping`, which needs transformers 5.17 or newer.

    Models that `from_pretrained` and `from_config` build afterwards have replaced norms: each norm is built by its own
    class, proven, and replaced as by `rmsnorm.patch`. A norm that is not proven keeps its own class; a warning says
    why. `rmsnorm.unpatch(model)` restores the norms of one model. After `unregister_patch_mapping(list(mapping))`, new
    models have their own norms.

    transformers finds classes by their name in all modules whose names begin with "transformers", also in the code
    that comes with a checkpoint. Import that code first, because a name that several classes have raises ValueError.

    Args:
        sources: Norm classes, such as LlamaRMSNorm, or modules that define some, such as
            transformers.models.llama.modeling_llama. Of a module, the classes with "rmsnorm" in their names are taken.
        strict: As in `rmsnorm.patch`.
        fuse_residual: As in `rmsnorm.patch`.

    Returns:
        Patterns that match exactly one name each, and the classes to build instead.

    Raises:
        TypeError: If a source is neither a class of modules nor a module.
        ValueError: If there is no source, a module defines no such class, or a name is ambiguous.

    Example:
        >>> from rmsnorm.integrations import hub
        >>> mapping = hub.patch_mapping(torch.nn.RMSNorm)
        >>> list(mapping)
        ['^RMSNorm$']
        >>> mapping['^RMSNorm$'](64)
        RMSNorm((64,), eps=None, elementwise_affine=True, rmsnorm: late)
    """
    check_bool("patch_mapping", "strict", strict)
    check_bool("patch_mapping", "fuse_residual", fuse_residual)
    classes = {cls for source in sources for cls in _classes(source)}
    if not classes:
        raise ValueError(complaint("patch_mapping", "sources", "is empty", "at least one class or module"))
    names = [cls.__name__ for cls in classes]
    for cls in classes:
        others = {other for other in _classes_named(cls.__name__) if other is not cls}
        if names.count(cls.__name__) > 1 or others:
            found = ", ".join(sorted(other.__module__ for other in {cls, *others}))
            was = f"has {cls.__name__}, a name that several classes have, in {found}"
            raise ValueError(complaint("patch_mapping", "sources", was, "unique names: use rmsnorm.patch(model)"))
    hints, proofs = Hints(fuse_residual), dict[Any, Proof]()
    return {
        f"^{cls.__name__}$": _building(cls, strict, hints, proofs) for cls in sorted(classes, key=lambda c: c.__name__)
    }


def _classes(source: Any) -> list[type[nn.Module]]:
    if isinstance(source, type) and issubclass(source, nn.Module):
        return [source]
    if not isinstance(source, ModuleType):
        raise TypeError(complaint("patch_mapping", "sources", f"has {type_name(source)}", "classes and modules"))
    found = [
        cls for name, cls in vars(source).items()
        if isinstance(cls, type) and issubclass(cls, nn.Module) and "rmsnorm" in name.lower()
    ]  # fmt: skip
    if not found:
        was = f"has {source.__name__}, which defines no class with rmsnorm in its name"
        raise ValueError(complaint("patch_mapping", "sources", was, "the class itself"))
    return found


def _classes_named(name: str) -> set[type]:
    """The classes that transformers would replace for this name."""
    modules = [module for key, module in list(sys.modules.items()) if key.startswith("transformers")]
    found = (vars(module).get(name) for module in modules if isinstance(module, ModuleType))
    return {cls for cls in found if isinstance(cls, type)}


class _Building(type):
    """Metaclass of what transformers calls in place of a norm's class: a call builds and replaces the norm itself."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        build = vars(cls).get("_rmsnorm_build")
        return super().__call__(*args, **kwargs) if build is None else build(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        own = vars(cls).get("_rmsnorm_class")  # for `isinstance(module, LlamaRMSNorm)` in the code of a model
        return super().__instancecheck__(instance) if own is None else isinstance(instance, own)


def _building(cls: type[nn.Module], strict: bool, hints: Hints, proofs: dict[Any, Proof]) -> type[nn.Module]:
    def build(*args: Any, **kwargs: Any) -> nn.Module:
        module = cls(*args, **kwargs)
        verdict = replace_norm("", module, replaceable(module, proof_of(module, strict, proofs), hints), hints)
        if verdict.spec is None:
            warnings.warn(f"[patch_mapping] {cls.__name__} is not replaced: {verdict.reason}", stacklevel=3)
        return module

    metaclass: Any = _Building if type(cls) is type else type("_Building", (_Building, type(cls)), {})
    names: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    names |= {"_rmsnorm_build": staticmethod(build), "_rmsnorm_class": cls}
    return metaclass(cls.__name__, (cls,), names)  # type: ignore[no-any-return]


# --- kernels -------------------------------------------------------------------------------------------------


def kernel_mapping(
    model: nn.Module, *, strict: bool = True, fuse_residual: bool = True
) -> dict[str, dict[str, dict[Any, Any]]]:
    """Make a mapping for `kernels.use_kernel_mapping` that gives the norms of a model our kernels, without the Hub.

    It serves every mode, also `Mode.TRAINING | Mode.TORCH_COMPILE`. The layer that it names "RMSNorm" dispatches on the
    class of the norm, because transformers gives this name to classes that round early and to classes that round late.
    A class that is not proven, or whose instances compute different things, keeps its own forward; a warning says why.

    Args:
        model: The model that is to be kernelized.
        strict: As in `rmsnorm.patch`.
        fuse_residual: As in `rmsnorm.patch`.

    Returns:
        The mapping, for the devices "cuda" and "cpu" and the layer names of the norms in the model.

    Raises:
        ImportError: If there is no package `kernels`.
        TypeError: If `model` is not a torch.nn.Module.
        ValueError: If the model has no norm that `kernels` could replace.
    """
    from kernels import Mode

    if not isinstance(model, nn.Module):
        raise TypeError(complaint("kernel_mapping", "model", f"is {type_name(model)}", "a torch.nn.Module"))
    check_bool("kernel_mapping", "strict", strict)
    check_bool("kernel_mapping", "fuse_residual", fuse_residual)
    hints = Hints(fuse_residual)
    norms = [m for m in model.modules() if _layer_name(m) is not None and "norm" in type(m).__name__.lower()]
    if not norms:
        expected = (
            "norms of classes with a kernel_layer_name; transformers sets it if `kernels` has the version it needs"
        )
        raise ValueError(complaint("kernel_mapping", "model", "has no norm that kernels replaces", f"{expected}. "
                                   "rmsnorm.patch(model) needs none"))  # fmt: skip
    forwards: dict[type, Callable[[Any, Tensor], Tensor]] = {}
    for cls, rule in _rules(norms, strict, hints).items():
        forwards[cls] = forward_by_rule(rule, cls.forward, hints)
    repository = _Repository(forwards)
    modes = {Mode.TRAINING | Mode.TORCH_COMPILE: repository}  # kernels falls back to it for every other mode
    return {str(_layer_name(m)): {"cuda": modes, "cpu": modes} for m in norms}


def _layer_name(module: nn.Module) -> str | None:
    """The name by which `kernels` finds a layer for the module; None if it leaves the module alone."""
    cls: Any = type(module)
    condition = getattr(cls, "kernel_condition", None)
    return None if condition is not None and not condition(module) else getattr(cls, "kernel_layer_name", None)


def _rules(norms: list[nn.Module], strict: bool, hints: Hints) -> dict[type[nn.Module], Rule]:
    """What each class computes, where that is proven and the same for all its instances."""
    proofs: dict[Any, Proof] = {}
    found: dict[type[nn.Module], set[Rule | None]] = {}
    reasons: dict[type[nn.Module], str] = {}
    for module in norms:
        proof = replaceable(module, proof_of(module, strict, proofs), hints)
        found.setdefault(type(module), set()).add(proof.rule)
        reasons[type(module)] = proof.reason or "its instances compute different things"
    rules = {cls: next(iter(of_cls)) for cls, of_cls in found.items() if len(of_cls) == 1}
    proven = {cls: rule for cls, rule in rules.items() if rule is not None}
    for cls in found.keys() - proven.keys():
        warnings.warn(f"[kernel_mapping] {cls.__name__} keeps its own forward: {reasons[cls]}", stacklevel=3)
    return proven


class _Repository:
    """Stands for a repository on the Hub. `kernels` caches layers by repository, so it is compared by identity."""

    layer_name = "RMSNorm"

    def __init__(self, forwards: dict[type, Callable[[Any, Tensor], Tensor]]) -> None:
        self._forwards = forwards

    def load(self) -> type[nn.Module]:
        """A layer without state, whose forward `kernels` binds to each norm of the model."""
        forwards = self._forwards

        class RMSNorm(nn.Module):
            can_torch_compile = True
            has_backward = True

            def forward(self, hidden_states: Tensor) -> Tensor:
                cls: Any = type(self)
                return forwards.get(cls, cls.forward)(self, hidden_states)  # type: ignore[no-any-return]

        return RMSNorm

    def __deepcopy__(self, memo: Any) -> "_Repository":
        return self  # kernels copies mappings

    def __str__(self) -> str:
        return "`rmsnorm` (in this process)"
