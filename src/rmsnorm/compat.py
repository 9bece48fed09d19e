"""Every private name of torch and Triton that the kernels and operators use, each with its fallback.

Each was seen in torch 2.11 and 2.13 and in Triton 3.6 and 3.9 (tests/test_compat.py). Where a name is gone, its
fallback assumes the case that takes the longer way through torch's dispatcher, which is slower and always right.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def assume_true(*_: Any) -> bool:
    """The fallback of a question that torch no longer answers."""
    return True


# How many __torch_dispatch__ modes are active. Public: none.
dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", assume_true)
# Whether a transform of torch.func is active. Public: none.
transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", assume_true)
# torch.jit.is_tracing, without its checks of the script compiler.
is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", None) or torch.jit.is_tracing  # type: ignore[attr-defined]
# Whether a tensor comes from is_grads_batched=True of torch.autograd.grad. Public: none.
is_batched_cotangent: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", assume_true)
# Whether a tensor still wears the wrapper of a transform of torch.func that has ended. Public: none.
is_wrapped: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", assume_true)
# The context in which an operator's call skips the autograd key. Public: none, and no fallback.
below_autograd: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd
# torch.cuda.current_device, without its check that CUDA is initialized.
current_gpu: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
# torch.empty_strided for a GPU, without the parsing of its arguments; None in a torch without CUDA.
empty_on_gpu: Callable[..., Tensor] | None = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None
)


def in_forward_ad() -> bool:
    """Whether forward-mode differentiation is active. Public: none."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def raw_stream(device: int) -> int:
    """The handle of a GPU's current stream: torch.cuda.current_stream(device).cuda_stream."""
    get: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return torch.cuda.current_stream(device).cuda_stream if get is None else get(device)


def bare_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` in C++, without the part in Python that serves torch.func and takes microseconds."""
    apply: Callable[..., Any] = getattr(super(torch.autograd.Function, function), "apply", function.apply)
    return apply
