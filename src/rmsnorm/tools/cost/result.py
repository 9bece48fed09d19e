"""What the norms of a model cost, the predictions of time, and the JSON."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rmsnorm.costs.counts import Cost, Implementation
from rmsnorm.spec import Spec
from rmsnorm.tools.hardware import Gpu

# The share of the published bandwidth that a kernel like ours reaches, and of the peak that a matrix product reaches.
EFFICIENCY = 0.75
# What the host needs to launch one eager operator.
LAUNCH_SECONDS = 5e-6
COMPARED: tuple[Implementation, ...] = ("eager", "F.rms_norm", "LayerNorm", "ours")

RECOMPUTED = "ours, recompute"  # ours, with recompute where a reader keeps the output
COLUMNS = (*COMPARED, RECOMPUTED)


class NormCall(NamedTuple):
    """One call of a norm in a step.

    Attributes:
        rows: The rows of its input.
        width: The width of its input.
        is_saved: Whether an operator that reads the output keeps it for the backward pass, as a matrix product does.
    """

    rows: int
    width: int
    is_saved: bool = True


@dataclass(frozen=True)
class NormGroup:
    """Proven norms that cost the same.

    Attributes:
        count: How many there are.
        calls: The calls of each of them in a step.
        width: Their width.
        cls: The name of their class.
        first: The name of the first of them in the model.
        spec: What they compute.
        weighted: Whether they have a weight.
    """

    count: int
    calls: tuple[NormCall, ...]
    width: int
    cls: str
    first: str
    spec: Spec
    weighted: bool

    @property
    def rows(self) -> int:
        """The rows of one norm in all its calls of a step."""
        return sum(call.rows for call in self.calls)

    @property
    def parameters(self) -> int:
        """The parameters of all of them."""
        return self.count * self.width if self.weighted else 0


@dataclass(frozen=True)
class UncountedNorms:
    """Norms of one class that are not counted, for one reason."""

    count: int
    cls: str
    first: str
    reason: str


@dataclass(frozen=True)
class Totals:
    """The costs of all norms in a step.

    Attributes:
        flops: Floating-point operations.
        bytes: Bytes that are read and written.
        kernels: Kernel launches.
        saved: Bytes that the norms keep for the backward pass.
        saved_by_readers: Bytes of the norms' outputs that the operators that read them keep for the backward pass.
        peak: The peak memory of the norm that needs most.
        seconds: The predicted time; None without a GPU.
    """

    flops: int = 0
    bytes: int = 0
    kernels: int = 0
    saved: int = 0
    saved_by_readers: int = 0
    peak: int = 0
    seconds: float | None = None

    @property
    def kept(self) -> int:
        """Bytes kept for the backward pass, by the norms and by what reads their outputs."""
        return self.saved + self.saved_by_readers

    def plus(self, c: Cost, phase: str, count: int, gpu: Gpu | None, is_saved: bool) -> "Totals":
        """Return the totals with `count` more calls of cost `c`, whose outputs are saved by readers or not."""
        seconds = None
        if gpu is not None:
            one = max(c.moved / (EFFICIENCY * gpu.bandwidth), c.kernels * LAUNCH_SECONDS)
            seconds = (self.seconds or 0.0) + count * one
        forward = count if phase == "forward" else 0  # the cost of the backward pass has the saved bytes again
        return Totals(
            self.flops + count * c.flops,
            self.bytes + count * c.moved,
            self.kernels + count * c.kernels,
            self.saved + forward * c.saved,
            self.saved_by_readers + (forward * c.saved_by_readers if is_saved else 0),
            max(self.peak, c.peak),
            seconds,
        )


@dataclass(frozen=True)
class CostResult:
    """What the norms of a model cost.

    Attributes:
        target: What the user named.
        model: The name of the model's class.
        parameters: The parameters of the model.
        norms: The norms that are counted.
        left: The norms that are not counted.
        weight: The bytes of the norms' weights, their gradients and their optimizer state.
        optimizer_master: The bytes of the optimizer state with fp32 master weights.
        batch: The number of sequences.
        seq: The tokens of each sequence.
        dtype: The dtype of the activations.
        gpu: The GPU for which times are predicted, or None.
        device: The device whose kernels are counted, "cpu" or "cuda".
        derived: Whether the counts are derived rather than traced.
        inference: For each of COLUMNS the costs of a forward step without gradients.
        training: For each of COLUMNS the costs of a forward and backward step.
        matmul_flops: The FLOP of the forward pass's matrix products: linear layers, attention, the head.
        notes: What may make the counts wrong.
        seconds: How long counting took.
        ok: Always True: nothing is checked.
    """

    target: str
    model: str
    parameters: int
    norms: tuple[NormGroup, ...]
    left: tuple[UncountedNorms, ...]
    weight: Cost
    optimizer_master: int
    batch: int
    seq: int
    dtype: str
    gpu: Gpu | None
    device: str
    derived: bool
    inference: dict[str, Totals]
    training: dict[str, Totals]
    matmul_flops: int
    notes: tuple[str, ...]
    seconds: float
    ok: bool = field(default=True, init=False)

    @property
    def count(self) -> int:
        """The number of norms that are counted."""
        return sum(g.count for g in self.norms)

    @property
    def norm_parameters(self) -> int:
        """The parameters of the norms that are counted."""
        return sum(g.parameters for g in self.norms)

    def step_seconds(self, training: bool) -> float | None:
        """Predict the seconds of a step's matrix products; None without a GPU or a published peak for the dtype."""
        if self.gpu is None or self.dtype == "float32":
            return None
        return (3 if training else 1) * self.matmul_flops / (EFFICIENCY * self.gpu.matmul)

    def amdahl(self, training: bool) -> tuple[float, float] | None:
        """Return the share of an eager step that the norms take, and the share of it that ours would save."""
        totals = self.training if training else self.inference
        rest, eager, ours = self.step_seconds(training), totals["eager"].seconds, totals["ours"].seconds
        if rest is None or eager is None or ours is None or rest + eager == 0:
            return None
        return eager / (rest + eager), (eager - ours) / (rest + eager)

    def to_json(self) -> dict[str, Any]:
        """Return everything, in types that `json.dumps` takes."""

        def totals(of: dict[str, Totals]) -> dict[str, Any]:
            return {name: vars(t) for name, t in of.items()}

        def amdahl(training: bool) -> dict[str, float] | None:
            shares = self.amdahl(training)
            return None if shares is None else {"norms_share": shares[0], "gain_share": shares[1]}

        return {
            "verb": "cost",
            "ok": self.ok,
            "target": self.target,
            "model": self.model,
            "parameters": self.parameters,
            "batch": self.batch,
            "seq": self.seq,
            "dtype": self.dtype,
            "norms": self.count,
            "norm_parameters": self.norm_parameters,
            "norm_parameter_bytes": self.weight.parameters,
            "norm_gradient_bytes": self.weight.gradients,
            "norm_adamw_bytes": self.weight.optimizer,
            "norm_adamw_bytes_with_master_weights": self.optimizer_master,
            "groups": [
                {
                    "count": g.count,
                    "rows": g.rows,
                    "calls": len(g.calls),
                    "outputs_saved_by_readers": sum(call.is_saved for call in g.calls),
                    "width": g.width,
                    "weighted": g.weighted,
                    "class": g.cls,
                    "first": g.first,
                    "spec": vars(g.spec),
                }
                for g in self.norms
            ],
            "left": [{"count": n.count, "class": n.cls, "first": n.first, "left_because": n.reason} for n in self.left],
            "counts_of": self.device,
            "derived": self.derived,
            "gpu": None if self.gpu is None else vars(self.gpu),
            "efficiency": EFFICIENCY,
            "launch_seconds": LAUNCH_SECONDS,
            "inference": totals(self.inference),
            "training": totals(self.training),
            "matmul_flops_forward": self.matmul_flops,
            "matmul_seconds_forward": self.step_seconds(False),
            "amdahl_inference": amdahl(False),
            "amdahl_training": amdahl(True),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 1),
        }
