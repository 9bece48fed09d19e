"""Runs plans in Python: allocates the tensors that a plan lists and starts its launches in order."""

import ctypes
import mmap
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rmsnorm import compat
from rmsnorm.kernels.plan import Converted, Fresh, Plan

_HUGE_PAGE = 2 << 20


def run(plan: Plan, given: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Runs a plan.

    Args:
        plan: the plan.
        given: the input tensors in the order of `plan.inputs`; None for an absent one.

    Returns:
        The tensors named in `plan.outputs`; None for each that was not requested.
    """
    gpu = plan.gpu
    if gpu is not None and gpu != compat.current_gpu():
        with torch.cuda.device(gpu):  # allocations and launches go to the current GPU
            return _run(plan, given)
    return _run(plan, given)


def _run(plan: Plan, given: Sequence[Tensor | None]) -> list[Tensor | None]:
    tensors = dict(zip(plan.inputs, given, strict=True))
    for converted in plan.before:
        tensors[converted.name] = _converted(converted, tensors)
    for fresh in plan.fresh:
        tensors[fresh.name] = _allocated(fresh, plan)
    for launch in plan.launches:
        launch.run(tensors)
    for converted in plan.after:
        tensors[converted.name] = _converted(converted, tensors)
    return [None if name is None else tensors[name] for name in plan.outputs]


def _converted(converted: Converted, tensors: Mapping[str, Tensor | None]) -> Tensor:
    total, *others = (t for name in converted.of if (t := tensors[name]) is not None)
    for other in others:
        total = total + other
    return total.to(converted.dtype).contiguous()


def _allocated(fresh: Fresh, plan: Plan) -> Tensor:
    if fresh.value is not None:
        return torch.full(fresh.shape, fresh.value, dtype=fresh.dtype, device=plan.device)
    if compat.empty_on_gpu is not None and plan.gpu is not None:
        return compat.empty_on_gpu(fresh.shape, fresh.strides, fresh.dtype)
    t = torch.empty(fresh.shape, dtype=fresh.dtype, device=plan.device)
    if fresh.huge_pages:
        _in_huge_pages(t.data_ptr(), t.nbytes)
    return t


def _in_huge_pages(address: int, size: int) -> None:
    """Advises the system to use huge pages for newly mapped memory, as torch does if THP_MEM_ALLOC_ENABLE=1."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # only on Linux; the advice may be refused without harm
    if advice is not None:
        start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
        whole = (address + size - start) // _HUGE_PAGE * _HUGE_PAGE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(whole), advice)
