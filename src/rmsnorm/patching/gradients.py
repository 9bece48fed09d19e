"""Checks that a norm's gradients are those of the formula, and counts the memory that its backward pass keeps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rmsnorm import gated_reference, reference
from rmsnorm.memory import saved_for_backward
from rmsnorm.patching.expression import BACKWARD
from rmsnorm.patching.probe import NotProven, Probe
from rmsnorm.patching.rule import TRAINING_DTYPES, Dtypes, dtype_name
from rmsnorm.patching.states import one_dtype
from rmsnorm.spec import DTYPES, Spec

# Gradients are taken for two batches of this many rows; memory is the difference between two batches and one.
_ROWS = 12
# A gradient of another function is off by far more than this share of rstd · ‖dy·w‖; one that is only rounded
# elsewhere is off by far less.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01, torch.float64: 1e-4}


def check_gradients(probe: Probe, spec: Spec, own_dtypes: frozenset[Dtypes]) -> dict[str, int]:
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
            gate = probe.draw_gate(x, dtypes)
            inputs = [t.requires_grad_() for t in (x, gate) if t is not None]
            norm = probe.stand_in(w, training)
            y, kept = _forward(probe, norm, inputs)
            if not y.requires_grad:
                raise NotProven("its output has no gradient")
            if usual:
                half = _forward(probe, norm, [t.detach()[:1].clone().requires_grad_() for t in inputs])[1]
                ours = math.prod(shape) * sum(t.element_size() for t in inputs) + 4 * spec.groups
                memory[dtype_name(dtypes[0])] = (kept - half) // _ROWS - ours
            _check(probe, spec, norm, inputs, y)
    return memory


def _forward(probe: Probe, norm: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, int]:
    """The output, and the bytes that autograd keeps for it besides the weight."""
    weights = (norm.weight,) if probe.weighted else ()
    with torch.enable_grad(), saved_for_backward(weights) as saved:
        y = probe.call(norm, *inputs)
        return y, saved()


@dataclass(frozen=True)
class _Expected:
    """One gradient of the formula, and the size of its terms, of which a share is tolerated.

    The size is one number for each row, or one number for the gradient of a weight, which has no rows. `through` are
    the dtypes to which the norm rounds on the way.
    """

    name: str
    gradient: Tensor
    scale: Tensor
    through: tuple[torch.dtype, ...] = ()


def _check(probe: Probe, spec: Spec, norm: Any, inputs: Sequence[Tensor], y: Tensor) -> None:
    weight: nn.Parameter | None = norm.weight if probe.weighted else None
    dy = probe.randn(y.shape).to(y.dtype)
    leaves = [*inputs, *([] if weight is None else [weight])]
    with torch.enable_grad(), _BackwardOperators() as operators:  # type: ignore[no-untyped-call]
        grads = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    if operators.refusal:
        raise NotProven(operators.refusal)
    x, *gate = (t.detach().flatten(-probe.normalized_dims) for t in inputs)
    w, dy = None if weight is None else weight.detach().flatten(), dy.flatten(-probe.normalized_dims)
    expected = _expected_of_gated(x, gate[0], dy, w, spec) if gate else _expected(x, dy, w, spec)
    for theirs, one in zip(grads, expected, strict=True):
        _check_close(one, theirs)


def _expected(x: Tensor, dy: Tensor, w: Tensor | None, spec: Spec) -> list[_Expected]:
    rstd = reference.exact_rstd(x, spec.eps)
    dx, dw = reference.backward(dy, None, x, w, rstd, spec.cast, spec.offset, need_dx=True, need_dw=w is not None)
    assert dx is not None
    g, xh = reference.products(dy, x, w, rstd, spec.offset)
    expected = [_Expected("input", dx, (g.double() * rstd.double().unsqueeze(-1)).norm(dim=-1))]
    if dw is not None:
        expected.append(_Expected("weight", dw, (dy.double() * xh.double()).norm()))
    return expected


def _expected_of_gated(x: Tensor, gate: Tensor, dy: Tensor, w: Tensor | None, spec: Spec) -> list[_Expected]:
    assert spec.gate is not None
    a = gated_reference.silu_or_sigmoid(gate, spec.gate.activation).double()
    slope = gated_reference.silu_or_sigmoid_slope(gate, spec.gate.activation).double()
    normalized = x.float() * a.float() if spec.gate.first else x.float()
    rstd = reference.exact_rstd(gated_reference.grouped(normalized, spec.groups), spec.eps)
    dx, dgate, dw = gated_reference.backward(dy, x, gate, w, rstd, spec, True, True, w is not None)
    assert dx is not None
    assert dgate is not None
    r = rstd.double().repeat_interleave(x.shape[-1] // spec.groups, -1)
    weighted, xh = dy.double() if w is None else dy.double() * w.double(), normalized.double() * r
    of_gate = weighted * r * x.double() if spec.gate.first else weighted * xh
    expected = [
        _Expected("input", dx, (weighted * r * a).norm(dim=-1)),
        _Expected("gate", dgate, (of_gate * slope).norm(dim=-1), through=(x.dtype,)),
    ]
    if dw is not None:
        expected.append(_Expected("weight", dw, (dy.double() * xh * (1 if spec.gate.first else a)).norm()))
    return expected


def _check_close(expected: _Expected, theirs: Tensor | None) -> None:
    """Hold each row of a gradient, or that of a weight as a whole, to a share of the size of its terms."""
    ours, off = expected.gradient, 1.0
    if theirs is not None:
        error = (theirs.double().reshape(ours.shape) - ours.double()).norm(dim=-1 if expected.scale.dim() else None)
        off = float((error / expected.scale.clamp(min=torch.finfo(ours.dtype).tiny)).max())
    if not off <= max(_TOLERANCE[dtype] for dtype in (ours.dtype, *expected.through)):
        raise NotProven(f"its gradient of the {expected.name} is not the formula's: the relative error is {off:.1g}")


class _BackwardOperators(TorchDispatchMode):
    """Keeps the first operator that no backward pass of an RMSNorm needs."""

    refusal = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not self.refusal and func.name().removeprefix("aten::") not in BACKWARD:
            self.refusal = f"its backward pass runs {func}"
        return func(*args, **(kwargs or {}))
