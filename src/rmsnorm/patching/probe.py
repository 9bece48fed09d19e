"""Runs a norm's own forward on stand-ins and compares what it does with a spec.

Nothing of the live module is touched: no parameter, no hook, no random state.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmsnorm import gated_reference, reference
from rmsnorm.bits import differing
from rmsnorm.errors import one_line
from rmsnorm.patching.eligibility import may_be_gated, normalized_shape
from rmsnorm.patching.expression import Node, Operators, Refusal, loosened
from rmsnorm.patching.observe import Observation, observe
from rmsnorm.patching.rule import Dtypes, dtype_combinations
from rmsnorm.patching.stand_in import make_stand_in, stand_in_class
from rmsnorm.patching.states import State, same_dtypes
from rmsnorm.spec import Spec

# A norm without a weight takes rows of any width. The smaller of these divides the larger, so that groups of a fixed
# size show.
_WIDTHS = (64, 320)
# The number of outputs on which a norm is compared with *exact*.
_OUTPUTS = 1 << 16


class NotProven(Exception):
    """The norm is not proven; the message says why."""


class ForwardRaised(NotProven):
    """The norm's own forward has raised."""


class Probe:
    """One norm under test.

    Attributes:
        cls: The norm's own class.
        module: The norm; it is only read.
        weighted: Whether it has a weight.
        gated: Whether it is called with a second argument, a gate of the shape of the input.
        normalized_shape: The last dimensions, over which it normalizes, if it fixes them.
        shapes: The shapes of the normalized dimensions with which it is run.
        normalized_dims: Over how many of the last dimensions it normalizes.
        loosely: Whether `matches` accepts other ways to compute the mean and the rsqrt than *published*'s.
        attributes, queries, constants: The union of those in the `Record` of each call.
    """

    def __init__(self, cls: type[nn.Module], module: nn.Module) -> None:
        self.cls, self.module = cls, module
        try:
            self._stand_in_class = stand_in_class(cls)
        except Exception as error:
            raise NotProven(f"its class cannot be subclassed: {one_line(error)}") from error
        self._generator = torch.Generator("cpu").manual_seed(0)
        weight = module._parameters.get("weight")
        self.weighted = weight is not None
        self.gated = may_be_gated(cls)
        self.normalized_shape = normalized_shape(module)
        self.shapes = [(n,) for n in _WIDTHS] if self.normalized_shape is None else [self.normalized_shape]
        if weight is not None:
            self.shapes = [tuple(weight.shape)]
        self.normalized_dims = len(self.shapes[0])
        # The last dimensions that are the same in every call.
        self._row = self.shapes[0] if self.weighted or self.normalized_shape is not None else ()
        self.loosely = False
        self.attributes: dict[str, object] = {}
        self.queries: set[str] = set()
        self.constants: set[float] = set()

    # --- running it ---

    def run(
        self, state: State, shape: tuple[int, ...], /, **attributes: object
    ) -> tuple[Observation, Tensor, Tensor | None]:
        """Call the forward in a state, for rows of a shape.

        Args:
            state: How to call it.
            shape: The shape of the normalized dimensions.
            **attributes: Replace attributes of the module; such a call is not recorded in the attributes of the probe.

        Returns:
            What was observed, the input and the weight.

        Raises:
            ForwardRaised: If the forward raises.
            NotProven: If it does something that no RMSNorm needs.
        """
        with contextlib.ExitStack() as contexts:
            if state.grad == "inference":
                contexts.enter_context(torch.inference_mode())
            elif state.grad != "no_grad":
                contexts.enter_context(torch.enable_grad())
            x, w = self.draw(shape, state.dtypes, state.leading, state.values, state.layout)
            gate = self.draw_gate(x, state.dtypes, state.layout)
            x.requires_grad_(state.grad in ("both", "input", "input without gate"))
            if gate is not None:
                gate.requires_grad_(state.grad in ("both", "input", "gate alone"))
            stand_in = self.stand_in(w, state.training, state.grad in ("both", "weight"), **attributes)
            if state.autocast is not None:
                contexts.enter_context(torch.autocast("cpu", state.autocast))
                contexts.enter_context(_autocast_flag("cuda"))
            device = None if state.device is None else torch.device(state.device)
            try:
                seen = observe(self.cls, stand_in, x, math.prod(shape), self._row, device, gate)
            except Refusal as refusal:
                raise NotProven(str(refusal)) from None
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                raise ForwardRaised(f"its forward raised {one_line(error)}"[:200]) from error
        if not attributes:
            self.attributes |= seen.record.attributes
            self.queries |= seen.record.queries
            self.constants |= seen.record.constants
        return seen, x.detach(), w

    def stand_in(
        self, w: Tensor | None, training: bool = False, requires_grad: bool = True, /, **attributes: object
    ) -> nn.Module:
        weight = None if w is None else nn.Parameter(w.clone(), requires_grad)
        return make_stand_in(self._stand_in_class, self.module, weight, training=training, **attributes)

    def call(self, norm: nn.Module, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """The output of its own forward on a stand-in, unobserved."""
        forward: Any = self.cls.forward
        return forward(norm, x) if gate is None else forward(norm, x, gate)  # type: ignore[no-any-return]

    def runs_without_gate(self) -> bool:
        """Whether the forward of a gated norm can be called without a gate."""
        x, w = self.draw(self.shapes[0], self.same_dtypes(torch.float32))
        with contextlib.suppress(Exception):
            return isinstance(self.call(self.stand_in(w), x), Tensor)
        return False

    # --- comparing it ---

    def holds(self, spec: Spec, state: State, shape: tuple[int, ...]) -> bool:
        """Whether it computes the spec in the state. Where it raises it does not, and will go on raising."""
        try:
            seen, x, w = self.run(state, shape)
        except ForwardRaised:
            return False
        return self.matches(seen, x, w, spec)

    def matches(self, seen: Observation, x: Tensor, w: Tensor | None, spec: Spec, loosely: bool = False) -> bool:
        """Whether what was observed is the spec's *published*: the same expression, and almost the same outputs.

        `loosely` is as in the probe, for this comparison alone.
        """
        gate = None if seen.gate is None else seen.gate.detach()
        expected: Any = _published_expression(
            x.dtype, None if w is None else w.dtype, None if gate is None else gate.dtype, spec
        )
        found: Any = seen.expression
        if loosely or self.loosely:
            N = math.prod(x.shape[x.dim() - self.normalized_dims :]) // seen.groups
            expected, found = loosened(expected, N), loosened(found, N)
        return found == expected and is_close(seen.y.detach(), self.published(x, w, spec, gate))

    def published(self, x: Tensor, w: Tensor | None, spec: Spec, gate: Tensor | None = None) -> Tensor:
        rows, weight, gates = self._as_rows(x, w, gate)
        if gates is None:
            return reference.published(rows, weight, spec.eps, spec.cast, spec.offset).view(x.shape)
        return gated_reference.published(rows, gates, weight, spec).view(x.shape)

    def exact(self, x: Tensor, w: Tensor | None, spec: Spec, gate: Tensor | None = None) -> Tensor:
        rows, weight, gates = self._as_rows(x, w, gate)
        if gates is None:
            y = reference.forward(rows, None, weight, spec.eps, spec.cast, spec.offset, with_rstd=False)[0]
        else:
            y = gated_reference.forward(rows, gates, weight, spec, with_rstd=False)[0]
        return y.view(x.shape)

    def _as_rows(self, x: Tensor, w: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        k = self.normalized_dims
        return x.flatten(-k), None if w is None else w.flatten(), None if gate is None else gate.flatten(-k)

    # --- inputs ---

    def dtype_pairs(self, dtypes: Sequence[torch.dtype]) -> list[Dtypes]:
        """Every dtype for the input with every dtype for the weight and every one for the gate, if there are any."""
        return dtype_combinations(dtypes, self.weighted, self.gated)

    def same_dtypes(self, dtype: torch.dtype) -> Dtypes:
        """The dtype for the input, and for the weight and the gate if there are any."""
        return same_dtypes(dtype, self.weighted, self.gated)

    def draw(
        self, shape: tuple[int, ...], dtypes: Dtypes, leading: Sequence[int] = (2, 3), values: str = "random",
        layout: str = "dense", smallest: float = -4.0,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """An input and a random weight. Random rows range from large ones to 10^smallest, where eps decides."""
        x = self.randn((*leading, *shape))
        count = math.prod(leading)
        if values == "random":
            sizes = torch.logspace(1.5, smallest, count, dtype=torch.float32)
        elif values in ("zero", "tiny", "huge"):
            sizes = torch.full((count,), {"zero": 0.0, "tiny": 1e-30, "huge": 1e25}[values])
        else:
            sizes = torch.full((count,), 0.01)
            x[(0,) * x.dim()] = {"infinite": math.inf, "NaN": math.nan, "spiky": 3e4}[values]
        x_dtype, w_dtype = dtypes[:2]
        limits = torch.finfo(x_dtype)
        x = x * sizes.view(*leading, *(1 for _ in shape))
        if values == "huge":
            x = x.clamp(-limits.max, limits.max)
        w = self.randn(shape) if self.weighted else None
        return _laid_out(x.to(x_dtype), layout), None if w is None or w_dtype is None else w.to(w_dtype)

    def draw_gate(self, x: Tensor, dtypes: Dtypes, layout: str = "dense") -> Tensor | None:
        """A random gate for an input; None for a norm that takes none. Its activation is near 0, near 1 and between."""
        if not self.gated:
            return None
        return _laid_out((4 * self.randn(x.shape)).to(dtypes[-1]), layout)

    def draw_many(self, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """An input with at least 2¹⁶ elements in a batch of one, and a random weight."""
        return self.draw(shape, self.same_dtypes(dtype), leading=(1, -(-_OUTPUTS // math.prod(shape))))

    def randn(self, shape: Sequence[int]) -> Tensor:
        # fp32 whatever the default dtype is
        return torch.randn(tuple(shape), generator=self._generator, dtype=torch.float32)


@contextlib.contextmanager
def _autocast_flag(device: str) -> Iterator[None]:
    """Has autocast report that it is on for a device, which need not exist."""
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before)


@functools.lru_cache(1024)
def _published_expression(x: torch.dtype, w: torch.dtype | None, gate: torch.dtype | None, spec: Spec) -> Node:
    """What *published* computes in these dtypes."""
    N = 4 * spec.groups
    shapes = {"x": ((1, N), x), "w": ((N,), w), "g": ((1, N), gate)}
    leaves = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in shapes.items() if dtype is not None}
    with Operators(leaves, N) as operators:
        if gate is None:
            y = reference.published(leaves["x"], leaves.get("w"), spec.eps, spec.cast, spec.offset)
        else:
            y = gated_reference.published(leaves["x"], leaves["g"], leaves.get("w"), spec)
    found: Node = operators.expression(y)
    return found


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same elements in another memory layout."""
    if layout == "sliced":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if layout == "every second element":
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    if layout == "transposed" and x.dim() > 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "columns first" and x.dim() > 1:  # such as a channels-first image whose channels are normalized
        return x.movedim(-1, 1).contiguous().movedim(1, -1)
    if layout == "expanded" and x.dim() > 1 and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    return x


def is_close(theirs: Tensor, published: Tensor) -> bool:
    """Whether these can be the outputs of the same expression.

    For another layout, or on another processor, ATen may sum or take the root in another way, each an fp32 ulp or two
    off. That allows 16 ulp in fp32, and 2 ulp after rounding to 16 bits. Both must be finite at the same places.
    """
    if theirs.dtype != published.dtype or theirs.shape != published.shape:
        return False
    if torch.equal(theirs, published):
        return True
    if theirs.dtype == torch.float64:
        theirs, published = theirs.float(), published.float()  # both were computed in fp32
    return differing(theirs, published)[1] <= (2 if theirs.dtype in (torch.bfloat16, torch.float16) else 16)
