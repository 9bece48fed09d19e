"""Helpers that call a device's kernels by plans, whichever device the tensors are on, and that inject plans for C++."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from rmsnorm.gated_reference import grouped
from rmsnorm.kernels.host import loader as host
from rmsnorm.kernels.plan import Backward, Forward, Fresh, GatedBackward, GatedForward, Native, NativeLaunch, Plan
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


def planning(monkeypatch: pytest.MonkeyPatch, *launches: NativeLaunch, keeps: Any = None) -> None:
    """Gives every forward call on the CPU a plan with these launches and a y of x's shape, which C++ runs."""

    def plan(kind: Forward) -> Plan:
        y = Fresh("y", kind.x.dtype, tuple(kind.x.shape))
        made = Plan(kind.device, ("x", "residual", "w"), (y,), (), ("y", None, None))
        made.__dict__["native"] = Native(made.inputs, made.fresh, launches, made.outputs, keeps)
        return made

    monkeypatch.setattr("rmsnorm.kernels.cpu.planner.plan_forward", plan)
    host.forget()
