"""Training steps of a model that is spread over ranks, as it is and patched, on one rank."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from many import plans, shares
from many.definitions import FSDP, MODEL, Options
from many.sampling import sample_rounds
from rmsnorm.tools import timing
from rmsnorm.tools.models import library, loading
from rmsnorm.tools.models.steps import Steps, copy_sharing_tensors
from rmsnorm.tools.processes import Rank
from whole_models.definitions import AS_IS, PATCHED, VARIANTS, variant_named
from whole_models.measuring import ratio_to_json

_NAMES = AS_IS, PATCHED
_CHECKED = "layers.0.input_layernorm.weight"  # the gradient that depends on all layers and on the sum over ranks


class Spread:
    """A variant of the model that is spread over the ranks.

    Args:
        name: The name of the variant.
        built: The model as it is. It is not changed.
        plan: One of PLANS.
        rank: This rank.
        options: The options.

    Attributes:
        model: The copy that is spread.
        mesh: The mesh of the plan.
    """

    def __init__(self, name: str, built: Any, plan: str, rank: Rank, options: Options) -> None:
        variant = variant_named(name, VARIANTS)
        assert variant is not None
        self.model, self.mesh, self.plan = variant.applied(built), plans.mesh_of(plan, rank), plan
        names = [name for name, module in built.named_modules() if type(module).__name__.endswith("RMSNorm")]
        self.norms = [self.model.get_submodule(name) for name in names]
        plans.spread(self.model, plan, self.mesh)
        self.steps = Steps(self.model, rank.device)
        self.shape = options.tokens, options.batch

    def first_step(self) -> "FirstStep":
        """Run a step, and return its tensors as a single process has them."""
        y, dy = self._run()
        gradient = self.model.get_parameter(_CHECKED).grad.full_tensor()
        self.model.zero_grad(set_to_none=True)
        if self.plan != FSDP:
            y, dy = (DTensor.from_local(t, self.mesh["tp"], [Shard(1)]).full_tensor() for t in (y, dy))
        return FirstStep(y.detach(), dy, gradient)

    def train(self) -> None:
        """Run forward and backward, and add up the gradients that the ranks share."""
        self._run()
        self.model.zero_grad(set_to_none=True)

    def _run(self) -> tuple[Tensor, Tensor]:
        y = self.steps.training_outputs(*self.shape)
        dy = self.steps.backward(y)
        with shares.in_norms():
            plans.reduce_partial_gradients(self.model)
        return y, dy


@dataclass(frozen=True)
class FirstStep:
    """The tensors of a step that are compared: the outputs y, their cotangent dy, and one gradient."""

    y: Tensor
    dy: Tensor
    gradient: Tensor

    def errors(self, expected: "FirstStep") -> dict[str, float]:
        """Return how far outputs and gradients are from the expected ones, relative to their norm."""
        pairs = {"outputs": (self.y, expected.y), "gradients": (self.gradient, expected.gradient)}
        return {what: float((a.float() - b.float()).norm() / b.float().norm()) for what, (a, b) in pairs.items()}


def build(rank: Rank, options: Options) -> Any:
    """Build the model, the same on every rank."""
    transformers = library.import_transformers("this benchmark")
    config = MODEL.config(transformers, options.tiny, options.layers)
    return loading.random_model(config, transformers, rank.device)


def measure_plan(plan: str, built: Any, rank: Rank, options: Options) -> dict[str, Any]:
    """Check, time and profile the variants under a plan.

    Args:
        plan: One of PLANS.
        built: The model.
        rank: This rank.
        options: The options.

    Returns:
        What was found, in types that `json.dumps` takes.
    """
    start = timing.now()
    variants = {name: Spread(name, built, plan, rank, options) for name in _NAMES}
    first = {name: one.first_step() for name, one in variants.items()}
    alone = _alone(built, first[AS_IS].dy, rank, options)
    errors = {name: step.errors(alone) for name, step in first.items()}
    del first, alone
    calls: dict[str, Callable[[], object]] = {name: one.train for name, one in variants.items()}
    samples = sample_rounds(calls, rank, options.repetitions)
    mesh = plans.described(next(iter(variants.values())).mesh)
    found = [
        {
            "variant": name,
            **timing.summarize(samples[name]).to_json(),
            "over_as_is": ratio_to_json(samples[name], samples[AS_IS]),
            "errors": errors[name],
            "shares_us": shares.measure(one.train, one.norms, rank.device),
            "samples_us": [round(sample * 1e6, 1) for sample in samples[name]],
        }
        for name, one in variants.items()
    ]
    return {
        "plan": plan,
        "mesh": mesh,
        "layers": options.layers,
        "parameters": sum(p.numel() for p in built.parameters()),
        "batch": options.batch * mesh[plans.DATA],
        "tokens": options.tokens,
        "variants": found,
        "seconds": round(timing.now() - start, 1),
    }


def _alone(built: Any, dy: Tensor, rank: Rank, options: Options) -> FirstStep:
    """Run a step of the model as it is in this process alone."""
    model = copy_sharing_tensors(built)
    y = Steps(model, rank.device).training_outputs(options.tokens, options.batch)
    y.backward(dy)
    gradient = model.get_parameter(_CHECKED).grad
    assert gradient is not None
    model.zero_grad(set_to_none=True)
    return FirstStep(y.detach(), dy, gradient)
