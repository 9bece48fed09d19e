"""Helpers that call a device's kernels by plans, whichever device the tensors are on, and that inject plans for C++."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rmsnorm.gated_reference import grouped
from rmsnorm.kernels.host import loader as host
from rmsnorm.kernels.plan import (
    Backward,
    BeginBackward,
    BeginForward,
    FinishBackward,
    FinishForward,
    Forward,
    Fresh,
    GatedBackward,
    GatedForward,
    Native,
    NativeLaunch,
    Plan,
)
from rmsnorm.kernels.run import run
from rmsnorm.spec import Spec


class Kernels(NamedTuple):
    """`forward` and `backward` with the signatures of `reference`, computed by the kernels of one planner."""

    planner: ModuleType

    def forward(
        self, x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: str, offset: float,
        with_rstd: bool, variance_size: int | None = None,
    ) -> list[Tensor | None]:  # fmt: skip
        spec = Spec(eps, cast, offset, variance_size=variance_size)
        plan = self.planner.plan_forward(Forward.of(x, residual, w, spec, with_rstd))
        assert isinstance(plan, Plan), plan.why
        return run(plan, (x, residual, w))

    def backward(
        self, dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, cast: str, offset: float,
        need_dx: bool, need_dw: bool, variance_size: int | None = None,
    ) -> list[Tensor | None]:  # fmt: skip
        spec = Spec(0.0, cast, offset, variance_size=variance_size)
        plan = self.planner.plan_backward(Backward.of(dy, ds, x, w, rstd, spec, need_dx, need_dw))
        assert isinstance(plan, Plan), plan.why
        return run(plan, (dy, ds, x, w, rstd))

    def backward_of_sum(
        self, dy: Sequence[Tensor], ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, cast: str,
        offset: float, need_dx: bool, need_dw: bool,
    ) -> list[Tensor | None]:  # fmt: skip
        spec = Spec(0.0, cast, offset)
        plan = self.planner.plan_backward(Backward.of_sum(dy, ds, x, w, rstd, spec, need_dx, need_dw))
        assert isinstance(plan, Plan), plan.why
        return run(plan, (dy[0], ds, x, w, rstd, *dy[1:]))


class GatedKernels(NamedTuple):
    """`forward` and `backward` with the signatures of `gated_reference`, computed by the kernels of one planner."""

    planner: ModuleType

    def forward(self, x: Tensor, gate: Tensor, w: Tensor | None, spec: Spec, with_rstd: bool) -> list[Tensor | None]:
        rows, gates = grouped(x, spec.groups), grouped(gate, spec.groups)
        y, rstd = run(
            self.planner.plan_gated_forward(GatedForward.of(rows, gates, w, spec, with_rstd)), (rows, gates, w)
        )
        assert y is not None
        return [y.view(x.shape), rstd]

    def backward(
        self, dy: Tensor, x: Tensor, gate: Tensor, w: Tensor | None, rstd: Tensor, spec: Spec, *needs: bool
    ) -> list[Tensor | None]:
        tensors = (*(grouped(t, spec.groups) for t in (dy, x, gate)), w, rstd)
        *gradients, dw = run(self.planner.plan_gated_backward(GatedBackward.of(*tensors, spec, *needs)), tensors)
        return [*(t if t is None else t.view(x.shape) for t in gradients), dw]


class PartsKernels(NamedTuple):
    """The functions of `reference` for parts of rows, computed by the kernels of one planner."""

    planner: ModuleType

    def begin_forward(self, x: Tensor, residual: Tensor | None) -> list[Tensor | None]:
        return run(self.planner.plan_begin_forward(BeginForward.of(x, residual)), (x, residual))

    def finish_forward(
        self, x: Tensor, w: Tensor | None, S: Tensor, N: int, eps: float, cast: str, offset: float, with_rstd: bool
    ) -> list[Tensor | None]:
        kind = FinishForward.of(x, w, S, N, Spec(eps, cast, offset), with_rstd)
        return run(self.planner.plan_finish_forward(kind), (x, w, S))

    def begin_backward(
        self, dy: Tensor, x: Tensor, w: Tensor | None, rstd: Tensor, cast: str, offset: float
    ) -> Tensor:  # fmt: skip
        kind = BeginBackward.of(dy, x, w, rstd, Spec(0.0, cast, offset))
        return run(self.planner.plan_begin_backward(kind), (dy, x, w, rstd))[0]

    def finish_backward(
        self, dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, S: Tensor, N: int, cast: str,
        offset: float, need_dw: bool,
    ) -> list[Tensor | None]:  # fmt: skip
        kind = FinishBackward.of(dy, ds, x, w, rstd, S, N, Spec(0.0, cast, offset), need_dw)
        return run(self.planner.plan_finish_backward(kind), (dy, ds, x, w, rstd, S))


class InParts(NamedTuple):
    """`forward` and `backward` with the signatures of `reference`, from calls of parts with these columns.

    functions: those of `reference` for parts, as attributes; `begin_backward` takes the cast too. The sums of the parts
    are added from the last to the first.
    """

    functions: Any
    columns: Sequence[slice]

    def forward(
        self, x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: str, offset: float,
        with_rstd: bool, variance_size: None = None,
    ) -> list[Tensor | None]:  # fmt: skip
        begun = [self.functions.begin_forward(x[..., c], _part(residual, c)) for c in self.columns]
        rows = [x[..., c] if residual is None else s for c, (s, _) in zip(self.columns, begun, strict=True)]
        S = sum(S for _, S in reversed(begun))
        found = [
            self.functions.finish_forward(part, _part(w, c), S, x.shape[-1], eps, cast, offset, with_rstd)
            for part, c in zip(rows, self.columns, strict=True)
        ]
        for _, rstd in found[1:]:
            assert rstd is None if found[0][1] is None else rstd.equal(found[0][1]) or rstd.isnan().any()
        y, s = (torch.cat([*parts], -1) for parts in ([y for y, _ in found], rows))
        return [y, None if residual is None else s, found[0][1] if with_rstd else None]

    def backward(
        self, dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, cast: str, offset: float,
        need_dx: bool, need_dw: bool, variance_size: None = None,
    ) -> list[Tensor | None]:  # fmt: skip
        assert need_dx
        begin = self.functions.begin_backward
        S = sum(begin(dy[..., c], x[..., c], _part(w, c), rstd, cast, offset) for c in reversed(self.columns))
        found = [
            self.functions.finish_backward(
                dy[..., c], _part(ds, c), x[..., c], _part(w, c), rstd, S, x.shape[-1], cast, offset, need_dw
            )
            for c in self.columns
        ]
        dx, dw = (
            torch.cat(parts, -1) if need else None
            for parts, need in zip(zip(*found, strict=True), (True, need_dw), strict=True)
        )
        return [dx, dw]


def _part(t: Tensor | None, columns: slice) -> Tensor | None:
    return None if t is None else t[..., columns]


def planning(monkeypatch: pytest.MonkeyPatch, *launches: NativeLaunch, keeps: Any = None) -> None:
    """Gives every forward call on the CPU a plan with these launches and a y of x's shape, which C++ runs."""

    def plan(kind: Forward) -> Plan:
        y = Fresh("y", kind.x.dtype, tuple(kind.x.shape))
        made = Plan(kind.device, ("x", "residual", "w"), (y,), (), ("y", None, None))
        made.__dict__["native"] = Native(made.inputs, made.fresh, launches, made.outputs, keeps)
        return made

    monkeypatch.setattr("rmsnorm.kernels.cpu.planner.plan_forward", plan)
    host.forget()
