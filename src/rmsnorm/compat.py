"""The private names of torch and Numba that the package uses, with a fallback for all but one.

tests/test_compat.py says in which versions they were seen. If torch removes one that a call of the norm uses, its
fallback assumes the case that goes through torch's dispatcher, which is slower but always correct.
"""

import contextlib
import functools
import importlib
import pickle
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing import reductions


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


def slow_storage_id(t: Tensor) -> int:
    """The fallback for `storage_id`, which is slower."""
    return int(t.untyped_storage()._cdata)


# Identifies the storage of a tensor among those that are alive. There is no public equivalent.
storage_id: Callable[[Tensor], int] = getattr(torch._C, "_storage_id", slow_storage_id)
# A weak reference to a storage, with a method `expired`. It is not documented, but torch uses it in several places.
StorageWeakRef: Any = reductions.StorageWeakRef
# What `saved_tensors_hooks` returns if torch cannot tell which hooks are active.
UNKNOWN_HOOKS = assume_true, assume_true
_top_saved_tensors_hooks: Callable[[bool], tuple[Any, Any] | None] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: UNKNOWN_HOOKS
)


def sum_over_ranks(t: Tensor, mesh: Any, dim: int) -> Tensor | None:
    """The sum of t over the ranks along a dimension of a device mesh, as a functional collective.

    This takes a quarter of the time that a redistributed DTensor takes, which is the public way. None if torch has no
    such operators.
    """
    operators: Any = torch.ops._c10d_functional
    if not (hasattr(operators, "all_reduce") and hasattr(operators, "wait_tensor")):
        return None
    summed = operators.all_reduce(t, "sum", mesh.get_group(dim).group_name)
    return operators.wait_tensor(summed)  # type: ignore[no-any-return]


_graph_task_id: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def in_backward() -> bool:
    """Whether a backward pass runs in this thread. There is no public equivalent; the fallback returns False."""
    return _graph_task_id() != -1


def saved_tensors_hooks() -> tuple[Any, Any] | None:
    """The active hooks on saved tensors (pack, unpack), or None. There is no public equivalent."""
    return _top_saved_tensors_hooks(True)


def _rms_norm_unchanged_by_autocast() -> frozenset[str]:
    """The devices whose autocast does not change F.rms_norm; on others it casts, or may cast, the input to fp32."""
    has_kernel = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", assume_true)
    keys = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
    return frozenset(device for device, key in keys.items() if not has_kernel("aten::rms_norm", key))


# Which of "cpu" and "cuda" these are depends on the version of torch. There is no public equivalent.
RMS_NORM_UNCHANGED_BY_AUTOCAST = _rms_norm_unchanged_by_autocast()


@functools.cache
def without_override_check(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Python function of torch, without its check whether a mode or a class of tensors overrides it.

    torch takes a TorchFunctionMode away while that handles a call. A backward pass that is such a call thus runs
    without the mode, and so does the forward pass that activation checkpointing runs in it. There is no public
    equivalent; the fallback is the function itself.
    """
    own = getattr(function, "__globals__", {})
    if not isinstance(function, FunctionType) or "has_torch_function" not in own:
        return function
    names = {**own, "has_torch_function": lambda tensors: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def in_forward_ad() -> bool:
    """Whether forward-mode differentiation is active. There is no public equivalent."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def bare_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The C++ `function.apply`, without the Python wrapper for torch.func, which costs a few microseconds."""
    apply: Callable[..., Any] = getattr(super(torch.autograd.Function, function), "apply", function.apply)
    return apply


def tensors_without_data() -> contextlib.AbstractContextManager[Any]:
    """A context in which operators compute shapes only: FakeTensorMode, which torch documents but does not export.

    transformers recognizes fake tensors and does not read their values, which it would try with tensors on the meta
    device. The fallback is a context that does nothing: tensors on the meta device have no data either.
    """
    try:
        mode = importlib.import_module("torch._subclasses.fake_tensor").FakeTensorMode
    except (ImportError, AttributeError):
        return contextlib.nullcontext()
    return mode(allow_non_fake_inputs=True)  # type: ignore[no-any-return]


def keep_compiled_graphs() -> None:
    """Let graphs that are compiled from now on run their backward pass several times. There is no public equivalent.

    Without this setting, torch raises at the second backward pass if the first one reused the memory of saved tensors.
    """
    with contextlib.suppress(ImportError, AttributeError):
        config: Any = importlib.import_module("torch._functorch.config")
        config.donated_buffer = False


def cpu_allocations(profile: Any) -> list[int] | None:
    """What torch's CPU allocator allocated (+) and freed (-) during a profile with `profile_memory`, in bytes.

    The public list of the profile's events only has the sum of each operator. The fallback is None.

    Args:
        profile: A `torch.profiler.profile` that has ended.
    """
    try:
        events = profile.profiler.kineto_results.events()
        found = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    except AttributeError:
        return None
    return [nbytes for _, nbytes in sorted(found, key=lambda event: event[0])]


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process. There is no public equivalent; the fallback is 0."""
    counters: Any = getattr(getattr(sys.modules.get("torch._dynamo"), "utils", None), "counters", {})
    return int(counters.get("stats", {}).get("unique_graphs", 0))


# --- Numba, which is imported by the first call that needs it --------------------------------------------------------


def numba_cfunc(
    function: Callable[..., None], signature: Any, options: dict[str, Any],
    result: Callable[[Any, Callable[[], Any]], Any],
) -> Any:  # fmt: skip
    """As `numba.cfunc(signature, **options)(function)`, but `result(signature, compile)` returns the compiled code.

    `result` may call `compile`, or return stored code that an earlier call of `compile` returned. The fallback is
    numba.cfunc itself, which always compiles.
    """
    import numba

    try:
        from numba.core import ccallback, sigutils

        normal = sigutils.normalize_signature(signature)
        code: Any = ccallback.CFunc(function, normal, locals={}, options=options)
        code._compile_uncached = lambda compile=code._compile_uncached: result(code._sig, compile)
    except (ImportError, AttributeError, TypeError):
        return numba.cfunc(signature, **options)(function)
    code.compile()
    return code


def numba_packed(result: Any) -> bytes:
    """A result of Numba's compiler, as bytes. Raises ImportError or AttributeError if this Numba cannot do that."""
    from numba.core.serialize import dumps

    return dumps(result._reduce())  # type: ignore[no-any-return]


def numba_unpacked(content: bytes) -> Any:
    """The result that `numba_packed` has packed. It is executed, so `content` must come from a trusted source."""
    from numba.core.compiler import CompileResult
    from numba.core.registry import cpu_target

    cpu_target.target_context.refresh()
    return CompileResult._rebuild(cpu_target.target_context, *pickle.loads(content))


def numba_processor() -> tuple[str, str, str]:
    """The target, processor and features that Numba compiles for; the fallback is what llvmlite detects."""
    try:
        from numba.core.registry import cpu_target

        return cpu_target.target_context.codegen().magic_tuple()  # type: ignore[no-any-return]
    except (ImportError, AttributeError):
        import llvmlite.binding as llvm
        from numba import config

        features = config.CPU_FEATURES
        return (
            llvm.get_process_triple(),
            config.CPU_NAME or llvm.get_host_cpu_name(),
            llvm.get_host_cpu_features().flatten() if features is None else features,
        )
