"""Decides whether a device's kernels or the reference compute a call, and runs it."""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from rmsnorm import gated_reference, kernels, reference
from rmsnorm.gated_reference import grouped
from rmsnorm.kernels.plan import (
    MOST_PLANS,
    Backward,
    BeginBackward,
    BeginForward,
    ByReference,
    FinishBackward,
    FinishForward,
    Forward,
    GatedBackward,
    GatedForward,
    Plan,
    TensorKind,
    both,
    heads_of,
    sandwich,
)  # fmt: skip
from rmsnorm.kernels.run import run
from rmsnorm.spec import KERNEL_DTYPES, Spec, result_dtype, sum_dtype

_KERNELS = {"cpu": ("cpu", "Numba"), "cuda": ("gpu", "Triton")}


def forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, spec: Spec, with_rstd: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `reference.forward`."""
    plan = plan_forward(Forward.of(x, residual, w, spec, with_rstd))
    if isinstance(plan, ByReference):
        return reference.forward(x, residual, w, spec.eps, spec.cast, spec.offset, with_rstd, spec.variance_size)
    y, s, rstd = run(plan, (x, residual, w))
    assert y is not None
    return y, s, rstd


def backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, spec: Spec, need_dx: bool, need_dw: bool
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """As `reference.backward`."""
    plan = plan_backward(Backward.of(dy, ds, x, w, rstd, spec, need_dx, need_dw))
    if isinstance(plan, ByReference):
        return reference.backward(dy, ds, x, w, rstd, spec.cast, spec.offset, need_dx, need_dw, spec.variance_size)
    dx, dw = run(plan, (dy, ds, x, w, rstd))
    return dx, dw


def backward_of_sum(
    dy: Sequence[Tensor], ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, spec: Spec, need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """As `reference.backward_of_sum`."""
    plan = plan_backward(Backward.of_sum(dy, ds, x, w, rstd, spec, need_dx, need_dw))
    if isinstance(plan, ByReference):
        return reference.backward_of_sum(dy, ds, x, w, rstd, spec.cast, spec.offset, need_dx, need_dw)
    dx, dw = run(plan, (dy[0], ds, x, w, rstd, *dy[1:]))
    return dx, dw


def forward_pair(
    x: Tensor, w: Tensor | None, x2: Tensor, w2: Tensor | None, spec: Spec, with_rstd: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """y and rstd of two norms, each as from `reference.forward`."""
    plan = plan_forward_pair(Forward.of(x, None, w, spec, with_rstd), Forward.of(x2, None, w2, spec, with_rstd))
    if isinstance(plan, ByReference):
        first, second = (forward(rows, None, weight, spec, with_rstd) for rows, weight in ((x, w), (x2, w2)))
        return first[0], first[2], second[0], second[2]
    y, rstd, y2, rstd2 = run(plan, (x, None, w, x2, None, w2))
    assert y is not None
    assert y2 is not None
    return y, rstd, y2, rstd2


def backward_pair(
    of_first: Sequence[Tensor | None], of_second: Sequence[Tensor | None], spec: Spec, need_dx: bool, need_dw: bool
) -> list[Tensor | None]:
    """dx and dw of two norms, each as from `reference.backward`, from (dy, x, w, rstd) of each."""
    given = [(dy, None, x, w, rstd) for dy, x, w, rstd in (of_first, of_second)]
    plan = plan_backward_pair(*(Backward.of(*each, spec, need_dx, need_dw) for each in given))  # type: ignore[arg-type]
    if isinstance(plan, ByReference):
        return [t for each in given for t in backward(*each, spec, need_dx, need_dw)]  # type: ignore[arg-type]
    return run(plan, (*given[0], *given[1]))


def forward_sandwich(
    x: Tensor, w: Tensor | None, residual: Tensor, w2: Tensor | None, spec: Spec, with_rstd: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """y and s of the norm, with weight w2, of residual + h, and rstd of both norms; h is y of the norm of x."""
    first, second = sandwich_kinds(x, w, residual, w2, spec, with_rstd)
    plan = plan_forward_sandwich(first, second)
    if isinstance(plan, ByReference):
        h, _, rstd = forward(x, None, w, spec, with_rstd)
        y, s, rstd2 = forward(h, residual, w2, spec, with_rstd)
    else:
        y, s, rstd, rstd2 = run(plan, (x, None, w, residual, w2))  # type: ignore[assignment]
    assert y is not None
    assert s is not None
    return y, s, rstd, rstd2


def sandwich_kinds(
    x: Tensor, w: Tensor | None, residual: Tensor, w2: Tensor | None, spec: Spec, with_rstd: bool
) -> tuple[Forward, Forward]:  # fmt: skip
    """The kinds of the two calls that `forward_sandwich` makes."""
    first = Forward.of(x, None, w, spec, with_rstd)
    h = TensorKind.dense(x.shape, result_dtype(x.dtype, None if w is None else w.dtype, spec.cast))
    return first, Forward.of(x, residual, w2, spec, with_rstd)._replace(x=h)


def begin_forward(x: Tensor, residual: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """As `reference.begin_forward`."""
    plan = plan_begin_forward(BeginForward.of(x, residual))
    if isinstance(plan, ByReference):
        return reference.begin_forward(x, residual)
    s, S = run(plan, (x, residual))
    assert S is not None
    return s, S


def finish_forward(
    x: Tensor, w: Tensor | None, S: Tensor, N: int, spec: Spec, with_rstd: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As `reference.finish_forward`."""
    plan = plan_finish_forward(FinishForward.of(x, w, S, N, spec, with_rstd))
    if isinstance(plan, ByReference):
        return reference.finish_forward(x, w, S, N, spec.eps, spec.cast, spec.offset, with_rstd)
    y, rstd = run(plan, (x, w, S))
    assert y is not None
    return y, rstd


def begin_backward(dy: Tensor, x: Tensor, w: Tensor | None, rstd: Tensor, spec: Spec) -> Tensor:
    """As `reference.begin_backward`."""
    plan = plan_begin_backward(BeginBackward.of(dy, x, w, rstd, spec))
    if isinstance(plan, ByReference):
        return reference.begin_backward(dy, x, w, rstd, spec.offset)
    (S,) = run(plan, (dy, x, w, rstd))
    assert S is not None
    return S


def finish_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, S: Tensor, N: int, spec: Spec,
    need_dw: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As `reference.finish_backward`."""
    plan = plan_finish_backward(FinishBackward.of(dy, ds, x, w, rstd, S, N, spec, need_dw))
    if isinstance(plan, ByReference):
        return reference.finish_backward(dy, ds, x, w, rstd, S, N, spec.cast, spec.offset, need_dw)
    dx, dw = run(plan, (dy, ds, x, w, rstd, S))
    assert dx is not None
    return dx, dw


def gated_forward(
    x: Tensor, gate: Tensor, w: Tensor | None, spec: Spec, with_rstd: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As `gated_reference.forward`."""
    rows, gate_rows = grouped(x, spec.groups), grouped(gate, spec.groups)
    plan = plan_gated_forward(GatedForward.of(rows, gate_rows, w, spec, with_rstd))
    if isinstance(plan, ByReference):
        return gated_reference.forward(x, gate, w, spec, with_rstd)
    y, rstd = run(plan, (rows, gate_rows, w))
    assert y is not None
    return y.view(x.shape), rstd


def gated_backward(
    dy: Tensor, x: Tensor, gate: Tensor, w: Tensor | None, rstd: Tensor, spec: Spec, need_dx: bool, need_dgate: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """As `gated_reference.backward`."""
    of_dy, of_x, of_gate = (grouped(t, spec.groups) for t in (dy, x, gate))
    plan = plan_gated_backward(GatedBackward.of(of_dy, of_x, of_gate, w, rstd, spec, need_dx, need_dgate, need_dw))
    if isinstance(plan, ByReference):
        return gated_reference.backward(dy, x, gate, w, rstd, spec, need_dx, need_dgate, need_dw)
    dx, dgate, dw = run(plan, (of_dy, of_x, of_gate, w, rstd))
    return None if dx is None else dx.view(x.shape), None if dgate is None else dgate.view(x.shape), dw


def plan_forward(kind: Forward) -> Plan | ByReference:
    """The plan of the device's kernels, or the reason why the reference computes."""
    residual, w = kind.residual, kind.w
    planner = _planner(
        kind.device, kind.x.dtype, None if residual is None else residual.dtype, None if w is None else w.dtype
    )
    return planner if isinstance(planner, ByReference) else planner.plan_forward(kind)


def plan_backward(kind: Backward) -> Plan | ByReference:
    """The plan of the device's kernels, or the reason why the reference computes."""
    planner = _planner(kind.device, kind.x.dtype, None, None if kind.w is None else kind.w.dtype)
    return planner if isinstance(planner, ByReference) else planner.plan_backward(kind)


@functools.lru_cache(MOST_PLANS)
def plan_forward_pair(first: Forward, second: Forward) -> Plan | ByReference:
    """The plan of a call that computes y and rstd of two norms, or the reason why they are computed apart."""
    return _merged(_pair(plan_forward(first), plan_forward(second), (0, 2)), "merge_pair")


@functools.lru_cache(MOST_PLANS)
def plan_backward_pair(first: Backward, second: Backward) -> Plan | ByReference:
    """The plan of a call that computes dx and dw of two norms, or the reason why they are computed apart."""
    return _pair(plan_backward(first), plan_backward(second), (0, 1))


@functools.lru_cache(MOST_PLANS)
def plan_forward_sandwich(first: Forward, second: Forward) -> Plan | ByReference:
    """The plan of a call that computes y, s, rstd and rstd2 of `forward_sandwich`, or why there are two calls."""
    of_first, of_second = plan_forward(first), plan_forward(second)
    if isinstance(of_first, ByReference):
        return of_first
    if isinstance(of_second, ByReference):
        return of_second
    plan = sandwich(of_first, of_second)
    if plan is None:
        return ByReference("torch adds tensors of several dtypes")
    return _merged(plan, "merge_sandwich")


def _merged(plan: Plan | ByReference, name: str) -> Plan | ByReference:
    """The plan with one launch for two, if the device's planner has a function of this name that can do that."""
    if isinstance(plan, ByReference):
        return plan
    merge = getattr(_module(plan.device.type), name, None)
    return plan if merge is None else merge(plan)


def _pair(first: Plan | ByReference, second: Plan | ByReference, outputs: Sequence[int]) -> Plan | ByReference:
    if isinstance(first, ByReference):
        return first
    return second if isinstance(second, ByReference) else both(first, second, outputs)


def plan_begin_forward(kind: BeginForward) -> Plan | ByReference:
    """The plan of the device's kernels, or the reason why the reference computes."""
    planner = _parts_planner(kind, None if kind.residual is None else kind.residual.dtype, None)
    return planner if isinstance(planner, ByReference) else planner.plan_begin_forward(kind)


def plan_finish_forward(kind: FinishForward) -> Plan | ByReference:
    """The plan of the device's kernels, or the reason why the reference computes."""
    planner = _parts_planner(kind, None, kind.w)
    return planner if isinstance(planner, ByReference) else planner.plan_finish_forward(kind)


def plan_begin_backward(kind: BeginBackward) -> Plan | ByReference:
    """The plan of the device's kernels, or the reason why the reference computes."""
    planner = _parts_planner(kind, None, kind.w)
    return planner if isinstance(planner, ByReference) else planner.plan_begin_backward(kind)


def plan_finish_backward(kind: FinishBackward) -> Plan | ByReference:
    """The plan of the device's kernels, or the reason why the reference computes."""
    planner = _parts_planner(kind, None, kind.w)
    return planner if isinstance(planner, ByReference) else planner.plan_finish_backward(kind)


def _parts_planner(
    kind: BeginForward | FinishForward | BeginBackward | FinishBackward, residual: torch.dtype | None,
    w: TensorKind | None,
) -> ModuleType | ByReference:  # fmt: skip
    planner = _planner(kind.device, kind.x.dtype, residual, None if w is None else w.dtype)
    if isinstance(planner, ByReference):
        return planner
    if kind.x.shape[-1] == 0:
        return ByReference("this rank has no columns")
    if heads_of(w) > 1:
        return ByReference("each head has its own weight")
    return _module(kind.device.type, "parts_planner")


def plan_gated_forward(kind: GatedForward) -> Plan | ByReference:
    """The plan of the device's kernels, or the reason why the reference computes."""
    planner = _gated_planner(kind)
    return planner if isinstance(planner, ByReference) else planner.plan_gated_forward(kind)


def plan_gated_backward(kind: GatedBackward) -> Plan | ByReference:
    """The plan of the device's kernels, or the reason why the reference computes."""
    planner = _gated_planner(kind)
    return planner if isinstance(planner, ByReference) else planner.plan_gated_backward(kind)


def _gated_planner(kind: GatedForward | GatedBackward) -> ModuleType | ByReference:
    planner = _planner(kind.device, kind.x.dtype, None, None if kind.w is None else kind.w.dtype)
    if isinstance(planner, ByReference):
        return planner
    if kind.gate.dtype not in KERNEL_DTYPES:
        return _by_plain_torch("gate", kind.gate.dtype)
    return _module(kind.device.type, "gated_planner")


def _by_plain_torch(name: str, dtype: torch.dtype) -> ByReference:
    return ByReference(f"{name} is {dtype}: computed in fp32 and returned as {dtype} by plain torch")


def name_of(plan: Plan | ByReference) -> str:
    """What `explain` calls the implementation that a plan selects."""
    if isinstance(plan, ByReference):
        return "the reference, in plain torch"
    return str(_module(plan.device.type).NAME)  # type: ignore[union-attr]


@functools.cache
def _planner(
    device: torch.device, x: torch.dtype, residual: torch.dtype | None, w: torch.dtype | None
) -> ModuleType | ByReference:
    """The planner of a device for tensors of these dtypes."""
    module = _module(device.type)
    if isinstance(module, ByReference):
        return module
    for name, dtype in (("x", x), ("residual", residual), ("weight", w)):
        if dtype is not None and dtype not in KERNEL_DTYPES:
            return _by_plain_torch(name, dtype)
    refusal = module.refuses(sum_dtype(x, residual))
    return module if refusal is None else ByReference(refusal)


@functools.cache
def _module(device_type: str, planner: str = "planner") -> ModuleType | ByReference:
    """The planner module of a device type, or that for gated norms or parts of rows, imported at the first call."""
    if device_type not in _KERNELS:
        return ByReference(f"there is no kernel for {device_type}")
    name, library = _KERNELS[device_type]
    try:
        return importlib.import_module(f"rmsnorm.kernels.{name}.{planner}")
    except Exception as error:  # the reference still works if the library is missing or broken
        if kernels.raised_by_signal_handler(error):
            raise
        return ByReference(f"{library} cannot be used: {type(error).__name__}: {error}")
