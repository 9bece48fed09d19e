"""What a norm costs, as exact integers: the public function `cost` and its result, `Cost`.

A count follows the code that runs, operator by operator. Each line of a formula that records an operator is one term,
and its arguments are the derivation. M rows of N columns, E = M·N elements; x, w, y, dy, dx, dw as everywhere.

Conventions:
    FLOPs: An addition, multiplication, division or (reciprocal) square root of one element is 1. A power k is k − 1,
        the sum of n numbers is n − 1. A cast, a copy, a view, and an operation that changes no number (× 1, + 0) is 0.
    Bytes: Each kernel is assumed to read each of its inputs once and to write each of its outputs once; caches and
        second passes are ignored. Of an expanded tensor, only the stored elements count. MB is 10⁶ bytes.
    Kernels: On a CPU, operators that touch memory (of ours: the compiled loops). On CUDA, the kernels, copies and fills
        that are launched on the stream, but not the memsets that prepare a reduction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rmsnorm.costs import eager, ours, torch_norms
from rmsnorm.costs.case import IMPLEMENTATIONS, PHASES, Case, Implementation, Phase, check_case
from rmsnorm.costs.tape import F32, Tape, Term
from rmsnorm.spec import Cast

__all__ = ["IMPLEMENTATIONS", "PHASES", "TRACED_TORCH", "Cost", "Implementation", "Phase", "Term", "cost"]

# The version of torch whose operators were traced: how it decomposes its own norms is internal and may change.
TRACED_TORCH = "2.13.0"
# Devices whose counts a trace of the running code has confirmed; those of others are derived.
CONFIRMED = ("cpu",)


class Formulas(NamedTuple):
    """Forward returns the bytes that are saved for the backward pass; both record on the tape."""

    forward: Callable[[Tape, Case], int]
    backward: Callable[[Tape, Case], None]


FORMULAS: dict[str, Formulas] = {
    "ours": Formulas(ours.forward, ours.backward),
    "ours+residual": Formulas(ours.forward, ours.backward),
    "eager": Formulas(eager.forward, eager.backward),
    "F.rms_norm": Formulas(torch_norms.rms_norm_forward, torch_norms.rms_norm_backward),
    "LayerNorm": Formulas(torch_norms.layer_norm_forward, torch_norms.layer_norm_backward),
}


@dataclass(frozen=True)
class Cost:
    """Exact counts of one phase of one norm, from `cost`.

    Attributes:
        flops: Floating-point operations.
        read: Bytes that its kernels read.
        written: Bytes that its kernels write.
        kernels: How many kernels run.
        saved: Bytes that the norm keeps for its own backward pass: the input where it is kept, but not the weights.
        saved_by_readers: Bytes of y that the operators that read it, such as matrix multiplications, keep for their own
            backward pass. Counted once, however many operators there are. 0 with `recompute`.
        peak: The most bytes allocated at once, beside x, the residual, the weight and the incoming gradients. In the
            backward phase this includes what the forward phase saved, and y. With `recompute`, y is allocated only
            until the operators that read it have used it, before the norm's own backward pass.
        least: Bytes that no implementation can avoid to move: each argument and each result once.
        parameters: Bytes of the weight, and of the bias of LayerNorm.
        gradients: Bytes of their gradients.
        optimizer: Bytes of AdamW's state for them.
        derived: Whether the counts follow from the source code alone, and no trace of the running code confirms them.
        terms: The operators that the counts are made of, in the order in which they run.

    Example:
        >>> c = rmsnorm.cost((8192, 1280), torch.bfloat16, implementation="eager", phase="backward")
        >>> c.kernels, round(c.moved / c.least, 1)
        (16, 15.3)
        >>> c.terms[0]
        Term(what='dy · w', flops=10485760, read=20974080, written=20971520, kernels=1)
    """

    flops: int
    read: int
    written: int
    kernels: int
    saved: int
    saved_by_readers: int
    peak: int
    least: int
    parameters: int
    gradients: int
    optimizer: int
    derived: bool
    terms: tuple[Term, ...]

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def cost(
    shape: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    *,
    implementation: Implementation = "ours",
    phase: Phase = "inference",
    device: str = "cpu",
    cast: Cast = "early",
    offset: float = 0.0,
    elementwise_affine: bool = True,
    master: bool = False,
    recompute: bool = False,
    by_head: bool = False,
    threads: int | None = None,
) -> Cost:
    """Count what one norm of x costs, without running it.

    Args:
        shape: The shape of x, (..., N). With no rows, nothing is counted but the parameters.
        dtype: The dtype of x: float32, bfloat16 or float16.
        weight_dtype: The dtype of the weight, one of the same three. None for that of x.
        implementation: What computes it.
            "ours": this package's kernels.
            "ours+residual": `add_rms_norm`.
            "eager": a published class, run by PyTorch operator by operator: the Definition for "early", GPT-OSS's
            class for "late", Gemma's with an offset; there is no count for "first".
            "F.rms_norm": torch's function, operator by operator on a CPU and fused on CUDA.
            "LayerNorm": torch.nn.LayerNorm with its bias.
            The last two ignore `cast` and `offset`.
        phase: "inference" (forward, under `torch.no_grad`), "forward" (autograd records), or "backward" (gradients of
            x, of the weight, and of the residual).
        device: "cpu" or "cuda".
        cast: As for `rms_norm`.
        offset: As for `rms_norm`.
        elementwise_affine: Whether there is a weight.
        master: Whether AdamW keeps an fp32 copy of 16-bit weights.
        recompute: Whether y is not kept for the operators that read it, but recomputed in the backward pass, as by
            `rmsnorm.recompute` and `patch(model, recompute=True)`. This adds a forward call to the backward phase. For
            "ours" and "ours+residual" only.
        by_head: Whether each head has its own weight: x is (..., H, N) and the weight (H, N). For "ours" and
            "ours+residual" only.
        threads: The number of CPU threads; None for torch's. The backward pass of LayerNorm allocates memory for each.

    Returns:
        The counts of that phase.

    Raises:
        TypeError: If `shape` is not a sequence of integers, a dtype is none of the three, or `elementwise_affine`,
            `master`, `recompute`, `by_head` or `threads` has the wrong type; the message names the argument.
        ValueError: If another argument has a value that is not allowed, LayerNorm refuses the weight's dtype, or
            `recompute` or `by_head` is True with an implementation that is not ours; the message names the argument.

    Example:
        >>> c = rmsnorm.cost((8192, 1280), torch.bfloat16)
        >>> c.moved, c.least, c.kernels
        (41945600, 41945600, 1)
    """
    case = check_case(
        shape, dtype, weight_dtype, implementation=implementation, phase=phase, device=device, cast=cast, offset=offset,
        elementwise_affine=elementwise_affine, master=master, recompute=recompute, threads=threads,
        by_head=by_head,
    )  # fmt: skip
    tape, saved = _record(case)
    parameters = _parameter_bytes(case)
    return Cost(
        flops=sum(term.flops for term in tape.terms),
        read=sum(term.read for term in tape.terms),
        written=sum(term.written for term in tape.terms),
        kernels=sum(term.kernels for term in tape.terms),
        saved=saved if case.training else 0,
        saved_by_readers=case.y_nbytes if case.training and not case.recompute else 0,
        peak=tape.peak,
        least=_least_bytes(case),
        parameters=parameters,
        gradients=parameters,
        optimizer=_adamw_bytes(case, master),
        derived=device not in CONFIRMED,
        terms=tuple(tape.terms),
    )


def _record(case: Case) -> tuple[Tape, int]:
    """The tape of the case's phase, and the bytes that its forward pass saves."""
    tape = Tape(case.cpu)
    if not case.M:
        return tape, 0
    formulas = FORMULAS[case.implementation]
    saved = formulas.forward(tape, case)
    if case.phase == "backward":
        tape = Tape(case.cpu, tape.alive - (case.y_nbytes if case.recompute else 0))
        if case.recompute:
            ours.recompute(tape, case)
        formulas.backward(tape, case)
    return tape, saved


def _least_bytes(case: Case) -> int:
    """Each argument and each result once; rstd, 4 bytes a row, where there is a backward pass.

    A call that recomputes y reads what was normalized and the weight, and writes y.
    """
    x, y = case.E * case.x_dtype.itemsize, case.y_nbytes
    weight = 0 if case.w_dtype is None or not case.M else case.W * case.w_dtype.itemsize
    rstd = 4 * case.M if case.training else 0
    if case.phase == "backward":
        dy, dx, dw, ds = y, x, weight, x if case.adds else 0
        again = x + weight + y if case.recompute else 0
        return dy + x + weight + rstd + dx + dw + ds + again
    residual = s = x if case.adds else 0
    return x + residual + weight + y + s + rstd


def _tensors(case: Case) -> int:
    """How many parameters the norm has: the weight, and the bias of LayerNorm."""
    if case.w_dtype is None:
        return 0
    return 2 if case.implementation == "LayerNorm" else 1


def _parameter_bytes(case: Case) -> int:
    return 0 if case.w_dtype is None else _tensors(case) * case.W * case.w_dtype.itemsize


def _adamw_bytes(case: Case, master: bool) -> int:
    """Two moments in the dtype that is stepped, and 4 bytes a tensor that count the steps; a master copy is fp32."""
    counters = 4 * _tensors(case)
    if master and case.w_dtype not in (None, F32):
        return 3 * _tensors(case) * case.W * F32.itemsize + counters
    return 2 * _parameter_bytes(case) + counters
