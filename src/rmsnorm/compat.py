"""The private names of torch and Triton that the kernels and operators use, with a fallback for all but one.

All of them exist in torch 2.11 and 2.13 and in Triton 3.6 and 3.9 (tests/test_compat.py). If torch removes one, its
fallback assumes the case that goes through torch's dispatcher, which is slower but always correct.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def assume_true(*_: Any) -> bool:
    """The fallback for a query that torch no longer offers."""
    return True


# How many __torch_dispatch__ modes are active. There is no public equivalent.
dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", assume_true)
# Whether a transform of torch.func is active. There is no public equivalent.
transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", assume_true)
# As torch.jit.is_tracing, without its checks for the script compiler.
is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", None) or torch.jit.is_tracing  # type: ignore[attr-defined]
# Whether a tensor comes from torch.autograd.grad(is_grads_batched=True). There is no public equivalent.
is_batched_cotangent: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", assume_true)
# Whether a tensor is still wrapped by a torch.func transform that has ended. There is no public equivalent.
is_wrapped: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", assume_true)
# A context manager under which operator calls skip the autograd key. It has no public equivalent and no fallback.
below_autograd: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd
# As torch.cuda.current_device, without its check that CUDA is initialized.
current_gpu: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
# The handle of a GPU's current stream.
raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)
# As torch.empty_strided on a GPU, without its argument parsing; None if torch was built without CUDA.
empty_on_gpu: Callable[..., Tensor] | None = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None
)


def _rms_norm_unchanged_by_autocast() -> frozenset[str]:
    """The devices whose autocast leaves F.rms_norm as it is; elsewhere it may cast the input to fp32, or does."""
    has_kernel = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", assume_true)
    keys = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
    return frozenset(device for device, key in keys.items() if not has_kernel("aten::rms_norm", key))


# Of "cpu" and "cuda". It depends on the version of torch. There is no public equivalent.
RMS_NORM_UNCHANGED_BY_AUTOCAST = _rms_norm_unchanged_by_autocast()


def in_forward_ad() -> bool:
    """Whether forward-mode differentiation is active. There is no public equivalent."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def bare_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The C++ `function.apply`, without the Python wrapper for torch.func, which costs a few microseconds."""
    apply: Callable[..., Any] = getattr(super(torch.autograd.Function, function), "apply", function.apply)
    return apply
