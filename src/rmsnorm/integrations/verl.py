"""verl 0.9: patches every Hugging Face model that verl's FSDP engine builds, before it is sharded.

    actor_rollout_ref.model.external_lib=rmsnorm.integrations.verl

verl imports the module that this setting names, and the import turns the adapter on. The server that generates has its
own setting: see the adapters for vLLM and SGLang.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

from rmsnorm.patching.patch import patch

logger = logging.getLogger(__name__)


def install() -> None:
    """Make `FSDPEngine` patch the models it builds. Calling it again changes nothing."""
    build = FSDPEngine._build_module
    if not hasattr(build, "_rmsnorm_original"):
        FSDPEngine._build_module = _patching(build)


def uninstall() -> None:
    """Let `FSDPEngine` build models as verl does."""
    build = FSDPEngine._build_module
    FSDPEngine._build_module = getattr(build, "_rmsnorm_original", build)


def _patching(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_module(self: Any, *args: Any, **options: Any) -> Any:
        model = build(self, *args, **options)
        logger.warning("%s", patch(model))  # verl shows warnings by default, and no messages below them
        return model

    build_module._rmsnorm_original = build  # type: ignore[attr-defined]
    return build_module


install()
