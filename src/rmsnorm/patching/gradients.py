"""Checks that a norm's gradients are those of the formula, and counts the memory that its backward pass keeps."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rmsnorm import reference
from rmsnorm.memory import saved_for_backward
from rmsnorm.patching.expression import BACKWARD
from rmsnorm.patching.probe import NotProven, Probe
from rmsnorm.patching.rule import TRAINING_DTYPES, DtypePair, dtype_name
from rmsnorm.patching.states import one_dtype
from rmsnorm.spec import DTYPES, Spec

# Gradients are taken for two batches of this many rows; memory is the difference between two batches and one.
_ROWS = 12
# A gradient of another function is off by far more than this share of rstd · ‖dy·w‖; one that is only rounded
# elsewhere is off by far less.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01, torch.float64: 1e-4}


def check_gradients(probe: Probe, spec: Spec, own_dtypes: frozenset[DtypePair]) -> dict[str, int]:
    """Compare the gradients with the formula's, for all dtypes but those in which the norm's own forward will run.

    Returns:
        By how many bytes per row the norm keeps more for the backward pass than ours, by the name of the dtype.

    Raises:
        NotProven: If its gradients are not those of the formula.
    """
    memory = {}
    shape = probe.shapes[0]
    for dtypes in (p for p in probe.dtype_pairs(DTYPES) if p not in own_dtypes):
        usual = dtypes[0] in TRAINING_DTYPES and one_dtype(dtypes)
        for training in (False, True) if usual else (True,):
            # No smaller rows: their gradients would overflow for an eps of 0.
            x, w = probe.draw(shape, dtypes, leading=(2, _ROWS), smallest=-3.0)
            x.requires_grad_()
            norm = probe.stand_in(w, training)
            y, kept = _forward(probe, norm, x)
            if not y.requires_grad:
                raise NotProven("its output has no gradient")
            if usual:
                half = _forward(probe, norm, x.detach()[:1].clone().requires_grad_())[1]
                ours = math.prod(shape) * x.element_size() + 4
                memory[dtype_name(dtypes[0])] = (kept - half) // _ROWS - ours
            _check(probe, spec, norm, x, y)
    return memory


def _forward(probe: Probe, norm: Any, x: Tensor) -> tuple[Tensor, int]:
    """The output, and the bytes that autograd keeps for it besides the weight."""
    weights = (norm.weight,) if probe.weighted else ()
    with torch.enable_grad(), saved_for_backward(weights) as saved:
        y = probe.cls.forward(norm, x)
        return y, saved()


def _check(probe: Probe, spec: Spec, norm: Any, x: Tensor, y: Tensor) -> None:
    weight: nn.Parameter | None = norm.weight if probe.weighted else None
    inputs = [x] if weight is None else [x, weight]
    dy = probe.randn(y.shape).to(y.dtype)
    with torch.enable_grad(), _BackwardOperators() as operators:  # type: ignore[no-untyped-call]
        grads = torch.autograd.grad(y, inputs, dy, allow_unused=True)
    if operators.refusal:
        raise NotProven(operators.refusal)
    k = probe.normalized_dims
    rows, w, dy_rows = x.detach().flatten(-k), None if weight is None else weight.detach().flatten(), dy.flatten(-k)
    rstd = reference.exact_rstd(rows, spec.eps)
    dx, dw = reference.backward(
        dy_rows, None, rows, w, rstd, spec.cast, spec.offset, need_dx=True, need_dw=w is not None
    )
    assert dx is not None
    g, xh = reference.products(dy_rows, rows, w, rstd, spec.offset)
    scale = (g.double() * rstd.double().unsqueeze(-1)).norm(dim=-1)
    _check_close("input", grads[0], dx, scale, -1)
    if weight is not None:
        assert dw is not None
        _check_close("weight", grads[1], dw, (dy_rows.double() * xh.double()).norm(), None)


def _check_close(name: str, theirs: Tensor | None, ours: Tensor, scale: Tensor, dim: int | None) -> None:
    """Hold each row of dx to a share of rstd · ‖dy·w‖, and dw as a whole to a share of ‖dy·xh‖."""
    off = 1.0
    if theirs is not None:
        error = (theirs.double().reshape(ours.shape) - ours.double()).norm(dim=dim)
        off = float((error / scale.clamp(min=torch.finfo(ours.dtype).tiny)).max())
    if not off <= _TOLERANCE[ours.dtype]:
        raise NotProven(f"its gradient of the {name} is not the formula's: the relative error is {off:.1g}")


class _BackwardOperators(TorchDispatchMode):
    """Keeps the first operator that no backward pass of an RMSNorm needs."""

    refusal = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not self.refusal and func.name().removeprefix("aten::") not in BACKWARD:
            self.refusal = f"its backward pass runs {func}"
        return func(*args, **(kwargs or {}))
