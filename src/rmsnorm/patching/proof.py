"""The proof of one norm: which RMSNorm it computes, or why that was not found.

    module  ->  obstacle          what rules it out before it is run
            ->  _Probe            its own forward on stand-ins, in every state in which it can be called
                  observe         the operators that it runs, as an expression of x and the weight
                  _specs          the specs whose *published*, run eagerly, is the same expression in all of them
                  _confirm        the same in numbers
                  _gradients      that its gradients are the formula's
            ->  Proof

Nothing of the live module is touched: no parameter, hook or random number. What the proof cannot see is said in
docs/patching.md.
"""

import contextlib
import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rmsnorm import reference
from rmsnorm.bits import differing
from rmsnorm.memory import saved_for_backward
from rmsnorm.patching import observe
from rmsnorm.patching.expression import BACKWARD, Node, Operators, Refusal, epsilon, loosened
from rmsnorm.patching.observe import DECISIVE, Absent, Observation, identity, is_plain
from rmsnorm.spec import DTYPES, LARGEST_EPS, Cast, Spec

# The dtypes in which a spec must hold where input and weight share one; in any other pair it may be the class's own.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ONE_TENSOR = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
# A norm without a weight takes any width. At two, the smaller a divisor of the larger, groups of a fixed size show.
_WIDTHS = (64, 320)
# Of how many outputs a distance from *exact* is taken.
_OUTPUTS = 1 << 16
# Gradients are taken of twice so many rows, and what is kept for them is the difference to so many.
_ROWS = 12
# Numbers of dimensions in front of those that are normalized over.
RANKS = range(5)
# A gradient of other meaning is off by far more than this share of rstd · ‖dy·w‖; one of other rounding by far less.
_GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01, torch.float64: 1e-4}

_Pair = tuple[torch.dtype, torch.dtype | None]  # of the input and of the weight


@dataclass(frozen=True)
class Change:
    """What replacing a norm changes on random rows: the share of outputs that differ, and by how many ulp at most."""

    share: float
    ulp: int


@dataclass(frozen=True)
class Rule:
    """What a replaced norm computes, and where its own forward runs instead.

    cast, offset: as in Spec. eps: the attribute that holds eps, which is read at each call. torch_eps: whether None
    there means fp32's machine epsilon, as torch.nn.RMSNorm takes it. weighted: whether it has a weight. shape: the
    last dimensions that it normalizes over, where it says so; None for the last one, whatever its size.

    Its own forward runs for the pairs of dtypes in `own`, under autocast if `autocast` says so (F.rms_norm is cast to
    fp32 there, on some devices), for inputs of a number of dimensions that is not in `ranks`, and where an attribute
    in `facts` has not the value that it had when the norm was proven.
    """

    cast: Cast
    offset: float
    eps: str
    weighted: bool
    torch_eps: bool = False
    own: frozenset[_Pair] = frozenset()
    autocast: bool = False
    ranks: frozenset[int] = frozenset()
    facts: tuple[tuple[str, object], ...] = ()
    shape: tuple[int, ...] | None = None

    @property
    def k(self) -> int:
        """Over how many last dimensions it normalizes."""
        return 1 if self.shape is None else len(self.shape)

    def number(self, eps: object) -> float | None:
        """What the attribute that holds eps means; None if it means nothing that we could take."""
        if eps is None and self.torch_eps:
            return torch.finfo(torch.float32).eps
        if type(eps) in (int, float) and 0 <= eps <= LARGEST_EPS:  # type: ignore[operator]
            return float(eps)  # type: ignore[arg-type]
        return None

    @property
    def partly(self) -> str:
        """Where the norm's own forward runs, in words. fp64, which nobody trains in, is worth none unless it is all."""
        pairs = {(x, w) for x, w in self.own if torch.float64 not in (x, w)}
        parts = []
        if pairs and all((x, w) in pairs for x in _DTYPES for w in _DTYPES if x != w):
            parts.append("where input and weight differ in dtype")
        elif pairs:
            parts.append("for " + ", ".join(sorted(f"{_name(x)} input with {_name(w)} weight" for x, w in pairs if w)))
        if self.autocast:
            parts.append("under autocast")
        missing = [self.k + r for r in RANKS if self.k + r not in self.ranks]
        if missing:
            parts.append(f"for inputs of {', '.join(map(str, missing))} dimensions")
        return " and ".join(parts)


@dataclass(frozen=True)
class Proof:
    """What was found about one norm: the rule that replaces it, or None and the reason. The rest as in a Verdict."""

    rule: Rule | None = None
    spec: Spec | None = None
    reason: str = ""
    exactly: bool = True
    changed: dict[str, Change] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)


class _NotProven(Exception):
    """Carries the reason."""


# --- before it is run ----------------------------------------------------------------------------------------


def arguments(cls: type[nn.Module]) -> list[inspect.Parameter]:
    """What the forward of the class takes, without self. Raises TypeError or ValueError where nobody can tell."""
    return list(inspect.signature(cls.forward).parameters.values())[1:]


def obstacle(cls: type[nn.Module], module: nn.Module) -> str | None:
    """Why the module, whose own class is cls, cannot even be tried; None if it can."""
    try:
        taken = arguments(cls)
    except (TypeError, ValueError):
        return "its forward does not say what it takes"
    if len(taken) != 1 or taken[0].kind not in _ONE_TENSOR:
        return f"its forward takes ({', '.join(map(str, taken))}), not one tensor"
    others = sorted(k for k, v in {**module._parameters, **module._modules}.items() if v is not None and k != "weight")
    if others or module._modules.get("weight") is not None:
        return f"it holds more than a weight: {', '.join(others) or 'no parameter'}"
    return _odd_class(cls) or _odd_weight(module)


def _odd_class(cls: type[nn.Module]) -> str | None:
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        if vars(base).get("__slots__"):
            return "its class has __slots__, so no other class can stand in for it"
        for name in ("__getattribute__", "__getattr__"):
            if name in vars(base):
                return f"its class has a {name} of its own"
        hook = vars(base).get("__init_subclass__")
        if hook is not None and _needs_arguments(hook.__func__):
            return "its class has an __init_subclass__ that takes arguments"
    return None


def _needs_arguments(hook: Callable[..., Any]) -> bool:
    own = list(inspect.signature(hook).parameters.values())[1:]
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in own)


def _odd_weight(module: nn.Module) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    if type(weight) is not nn.Parameter and type(weight).__name__ != "DTensor":
        return f"its weight is a {type(weight).__name__}"
    shape = tuple(weight.shape)
    if shape != _normalized(module) and len(shape) != 1:
        return f"its weight has shape {shape}"
    if weight.numel() < 2 or weight.dtype not in DTYPES:
        return f"its weight has shape {shape} and dtype {str(weight.dtype).removeprefix('torch.')}"
    return None


def _normalized(module: nn.Module) -> tuple[int, ...] | None:
    """The shape that torch.nn.RMSNorm and its like say they normalize over."""
    shape = vars(module).get("normalized_shape")
    if isinstance(shape, tuple) and shape and all(type(n) is int and n > 0 for n in shape):
        return tuple(shape)
    return None


def fingerprint(cls: type[nn.Module], module: nn.Module) -> tuple[Any, ...]:
    """All that the proof of a module of this class depends on, as a key.

    A forward that reads an attribute which is no plain value is refused, so of these the names are enough.
    """
    weight = module._parameters.get("weight")
    held = [{k: v is None for k, v in of.items()} for of in (module._parameters, module._buffers, module._modules)]
    plain = {k: identity(v) if is_plain(v) else Absent for k, v in vars(module).items() if k != "training"}
    return (
        cls, None if weight is None else weight.shape, *(frozenset(h.items()) for h in held), frozenset(plain.items())
    )  # fmt: skip


# --- the states in which it is run -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    """One way to call a norm.

    leading: the dimensions in front of those that are normalized over. grad: what requires a gradient ("both",
    "input", "weight", "neither"), or that gradients are off ("no_grad", "inference"). strides: how the input lies in
    memory. values: what its rows hold. device: what tensors say that they are on.
    """

    pair: _Pair
    leading: tuple[int, ...] = (2, 3)
    training: bool = False
    grad: str = "no_grad"
    strides: str = "dense"
    values: str = "random"
    autocast: torch.dtype | None = None
    device: str | None = None

    def __str__(self) -> str:
        x, w = self.pair
        text = f"{_name(x)} input" + (f" with {_name(w)} weight" if w is not None else "")
        usual = _State(self.pair)
        if self.leading != usual.leading:
            text += f" and leading dimensions {self.leading}"
        if self.training:
            text += ", in training"
        grads = {"no_grad": "", "inference": ", in inference mode"}
        text += grads.get(self.grad, ", with gradients")
        for value in (self.strides, self.values, self.device):
            if value not in (None, usual.strides, usual.values):
                text += f", {value}"
        return text


_GRADS = ("no_grad", "both", "input", "weight", "neither", "inference")
_VALUES = ("zero", "tiny", "huge", "infinite", "NaN", "spiky")
_STRIDES = ("dense", "sliced", "every second", "transposed", "expanded")


def _shared(pair: _Pair) -> bool:
    """Whether input and weight have one dtype, or there is no weight."""
    return pair[1] in (pair[0], None)


def _in_all_modes(pair: _Pair) -> Iterator[_State]:
    """In training or not, with and without gradients; fewer of these where nobody trains."""
    for training in (False, True):
        for grad in _GRADS if _shared(pair) or (torch.float64 not in pair and not training) else _GRADS[:2]:
            yield _State(pair, training=training, grad=grad)


def _in_all_shapes(weighted: bool) -> Iterator[_State]:
    """Inputs of all ranks, in every dtype; the sizes, strides and values, which no forward may ask for, in turn."""
    ways = [(d, training, grad) for d in _DTYPES for training, grad in ((False, "no_grad"), (True, "both"))]
    turn = itertools.cycle(ways)

    def state(way: tuple[torch.dtype, bool, str], leading: tuple[int, ...], **others: Any) -> _State:
        dtype, training, grad = way
        return _State((dtype, dtype if weighted else None), leading, training, grad, **others)

    for way in ways:
        yield from (state(way, leading) for leading in ((), (2,), (2, 3), (2, 1, 5), (2, 3, 2, 2)))
        for device in ("cuda:0", "cuda:1", "mps", "xpu:0", "meta"):
            yield state(way, (2, 3), device=device)
    yield from (state(next(turn), leading) for leading in ((0,), (1,), (40,), (1, 1), (3, 0, 2)) for _ in range(2))
    for strides in _STRIDES[1:]:
        yield from (state(next(turn), leading, strides=strides) for leading in ((5,), (3, 2), (2, 3, 4)))
    for values in _VALUES:
        yield from (state(way, (2, 4), values=values) for way in ways[::2])


def _in_autocast(pair: _Pair) -> Iterator[_State]:
    for autocast in (torch.bfloat16, torch.float16):
        for grad in ("no_grad", "both"):
            yield _State(pair, grad=grad, autocast=autocast)


# --- running it ------------------------------------------------------------------------------------------------


def prove(cls: type[nn.Module], module: nn.Module, strict: bool) -> Proof:
    """The one rule that holds in every state, or why none does; what replacing the norm changes.

    With strict=False the statistic may be taken in another way than *published* takes it.
    """
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.autograd.set_detect_anomaly(False),
            warnings.catch_warnings(action="ignore"),  # of dtypes that nobody mixes but the probe
        ):
            return _Probe(cls, module).run(strict)
    except (_NotProven, Refusal) as reason:
        return Proof(reason=str(reason))


class _Probe:
    """Runs the forward of a class on stand-ins for a module, away from the module itself."""

    def __init__(self, cls: type[nn.Module], module: nn.Module) -> None:
        self.cls, self.module = cls, module
        try:
            self.stand_in_class = observe.stand_in_class(cls)
        except Exception as error:
            raise _NotProven(f"its class cannot be subclassed: {type(error).__name__}: {error}") from error
        self.generator = torch.Generator("cpu").manual_seed(0)
        weight = module._parameters.get("weight")
        self.weighted = weight is not None
        self.normalized = _normalized(module)
        self.shapes = [(n,) for n in _WIDTHS] if self.normalized is None else [self.normalized]
        if weight is not None:
            self.shapes = [tuple(weight.shape)]
        self.k = len(self.shapes[0])
        self.row = self.shapes[0] if self.weighted or self.normalized is not None else ()
        self.facts: dict[str, object] = {}
        self.asked: set[str] = set()
        self.numbers: set[float] = set()
        self.loose = False
        self.by_autocast, self.by_pair = False, set[_Pair]()  # what the combinations have shown

    def run(self, strict: bool) -> Proof:
        candidates = self._specs()
        exactly = bool(candidates)
        if not exactly and not strict:
            self.loose = True
            candidates = self._specs()
        if not candidates:
            raise _NotProven(self.refusal)
        if len(candidates) > 1:
            raise _NotProven(f"{len(candidates)} specs give its bits, so none is proven")
        (spec,) = candidates
        ranks = self._shapes(spec)
        if self.asked & DECISIVE:
            self._all_together(spec, ranks)
        rule = Rule(
            spec.cast, spec.offset, self._eps(spec), self.weighted, self.torch_eps, self._own(spec),
            self._autocast(spec), ranks, (), self.normalized,
        )  # fmt: skip
        eps = rule.number(vars(self.module)[rule.eps])  # which the operators have rounded to fp32
        spec = replace(spec, eps=spec.eps if eps is None else eps)
        saved = self._gradients(spec, rule.own)
        read = {name: value for name, value in self.facts.items() if name != rule.eps}
        rule = replace(rule, facts=tuple(sorted(read.items())))
        return Proof(rule, spec, "", exactly, self._changed(spec), saved)

    # --- what it computes ---

    def _specs(self) -> list[Spec]:
        """The specs whose expression it is wherever input and weight share a dtype, training or not."""
        candidates: list[Spec] | None = None
        for dtype in _DTYPES:
            pair = dtype, dtype if self.weighted else None
            for shape in self.shapes:
                for state in _in_all_modes(pair):
                    seen, x, w = self._observed(state, shape)
                    if candidates is None:
                        candidates = self._candidates(self._added(seen, shape))
                    before, candidates = candidates, [c for c in candidates if self._agrees(seen, x, w, c)]
                    if not candidates:
                        self.refusal = f"its operators match no supported RMSNorm for {state}"
                        self.refusal += self._nearest(shape, pair) if self.loose else self._hint(seen, x, w, before)
                        return []
        return candidates or []

    def _added(self, seen: Observation, shape: tuple[int, ...]) -> float | None:
        """The eps that was observed."""
        return epsilon(loosened(seen.expression, math.prod(shape)))

    def _candidates(self, eps: float | None) -> list[Spec]:
        """The specs that a norm of this eps can be; none if it has none that we could take."""
        if eps is None or not 0 <= eps <= LARGEST_EPS:
            return []
        early = [Spec(eps)]
        if not self.weighted:
            return early
        return early + [Spec(eps, "late", offset) for offset in (0.0, 1.0)]

    def _agrees(self, seen: Observation, x: Tensor, w: Tensor | None, spec: Spec) -> bool:
        """Whether what was observed is the spec's *published*: the same expression, and about the same numbers."""
        N = math.prod(x.shape[x.dim() - self.k :])
        expected = _expression(x.dtype, None if w is None else w.dtype, spec)
        found: Any = seen.expression
        if self.loose:
            expected, found = loosened(expected, N), loosened(found, N)  # type: ignore[assignment]
        return found == expected and _close(seen.y.detach(), self._published(x, w, spec))

    def _shapes(self, spec: Spec) -> frozenset[int]:
        """The numbers of dimensions of an input in which it is the spec; it may not take the others."""
        ranks, raises = set(), set()
        for shape in self.shapes:
            for state in _in_all_shapes(self.weighted):
                rank = self.k + len(state.leading)
                try:
                    seen, x, w = self._observed(state, shape)
                except _Raised:
                    if state.strides == "dense" and state.device is None:
                        raises.add(rank)  # else ours runs where it raises, or where this machine has no such device
                    continue
                ranks.add(rank)
                if not self._agrees(seen, x, w, spec):
                    raise _NotProven(f"its operators match no supported RMSNorm for {state}")
        return frozenset(ranks - raises)

    def _all_together(self, spec: Spec, ranks: frozenset[int]) -> None:
        """Where it asks what can decide between two paths: every combination of the answers."""
        leadings = [one for one in ((), (2,), (1, 2), (2, 3), (1, 3, 2), (1, 2, 1, 3)) if self.k + len(one) in ranks]
        for pair, leading, training, grad, autocast in itertools.product(
            self._pairs(_DTYPES), leadings, (False, True), _GRADS, (None, torch.bfloat16)
        ):
            state = _State(pair, leading, training, grad, autocast=autocast)
            holds = self._holds(spec, state, self.shapes[0])
            if not holds and autocast is not None:
                self.by_autocast = True
            elif not holds and _shared(pair):
                raise _NotProven(f"its operators match no supported RMSNorm for {state}")
            elif not holds:
                self.by_pair.add(pair)

    def _own(self, spec: Spec) -> frozenset[_Pair]:
        """The pairs of dtypes in which it is not the spec, so that only its own forward gives its bits."""
        asked = [p for p in self._pairs(DTYPES) if p not in self.by_pair and not (p[0] in _DTYPES and _shared(p))]
        return frozenset(self.by_pair).union(
            pair
            for pair in asked
            if not all(self._holds(spec, state, shape) for shape in self.shapes for state in _in_all_modes(pair))
        )

    def _pairs(self, dtypes: Sequence[torch.dtype]) -> list[_Pair]:
        """Every dtype of the input with every one of the weight, if there is one."""
        return [(x, w) for x in dtypes for w in (dtypes if self.weighted else (None,))]

    def _autocast(self, spec: Spec) -> bool:
        """Whether autocast changes what it computes, on this device or on another."""
        if "rms_norm" in self.asked or self.by_autocast:
            return True
        states = [s for dtype in _DTYPES for s in _in_autocast((dtype, dtype if self.weighted else None))]
        return not all(self._holds(spec, state, shape) for state in states for shape in self.shapes)

    def _holds(self, spec: Spec, state: _State, shape: tuple[int, ...]) -> bool:
        """Whether it is the spec there; where it raises, it is not, and then it raises as it always did."""
        try:
            seen, x, w = self._observed(state, shape)
        except _Raised:
            return False
        return self._agrees(seen, x, w, spec)

    def _eps(self, spec: Spec) -> str:
        """The attribute that decides eps: the one that changes what is added under the root."""
        self.torch_eps = False
        state, shape = _State((torch.float32, torch.float32 if self.weighted else None)), self.shapes[0]
        for name in self.facts:
            value = vars(self.module).get(name, Absent)
            if type(value) not in (int, float) and not (value is None and name == "eps"):
                continue
            doubled = 0.0 if value is None else float(value) * 2
            others = {
                0.0,
                1.0,
                0.0078125,
                3.3e-9,
                doubled + 0.0078125,
                *(n for n in self.numbers if 0 <= n <= LARGEST_EPS),
            }
            with contextlib.suppress(_NotProven):
                if all(self._follows(name, other, state, shape, spec) for other in sorted(others)):
                    self.torch_eps = self._means_torchs(name, state, shape, spec)
                    return name
        raise _NotProven("it has no attribute that could be its eps")

    def _follows(self, name: str, eps: float, state: _State, shape: tuple[int, ...], spec: Spec) -> bool:
        seen, x, w = self._observed(state, shape, **{name: eps})
        return self._agrees(seen, x, w, replace(spec, eps=eps))

    def _means_torchs(self, name: str, state: _State, shape: tuple[int, ...], spec: Spec) -> bool:
        torchs = replace(spec, eps=torch.finfo(torch.float32).eps)
        with contextlib.suppress(_NotProven):
            seen, x, w = self._observed(state, shape, **{name: None})
            return self._agrees(seen, x, w, torchs)
        return False

    def _hint(self, seen: Observation, x: Tensor, w: Tensor | None, candidates: list[Spec]) -> str:
        """Whether strict=False would take it there, in words."""
        candidates = candidates or self._candidates(self._added(seen, self.shapes[0]))
        self.loose = True
        taken = any(self._agrees(seen, x, w, c) for c in candidates)
        self.loose = False
        return "; it takes the statistic in another way, which strict=False allows" if taken else ""

    def _nearest(self, shape: tuple[int, ...], pair: _Pair) -> str:
        """How far its outputs are from the nearest *exact*, in words."""
        numbers = {float(v) for v in vars(self.module).values() if type(v) in (int, float) and 0 <= v < 1}
        found = []
        x, w = self._draw(shape, *pair, leading=(1, self._many(shape)))
        with contextlib.suppress(Exception, Refusal):
            y = self.cls.forward(self._stand_in(w), x.clone())
            for spec in (c for eps in numbers for c in self._candidates(eps)):
                ours = self._exact(x, w, spec)
                if y.dtype == ours.dtype and y.shape == ours.shape:
                    count, ulp = differing(y, ours)
                    found.append((count / y.numel(), ulp))
        if not found:
            return ""
        share, ulp = min(found)
        return f"; {share:.2g} of its outputs differ from exact, by up to {ulp} ulp"

    # --- its gradients ---

    def _gradients(self, spec: Spec, own: frozenset[_Pair]) -> dict[str, int]:
        """Raise unless its gradients are those of the formula. By how many bytes a row it keeps more for them."""
        more = {}
        shape = self.shapes[0]
        for pair in (p for p in self._pairs(DTYPES) if p not in own):
            usual = pair[0] in _DTYPES and _shared(pair)
            for training in (False, True) if usual else (True,):
                x, w = self._draw(
                    shape, *pair, leading=(2, _ROWS), smallest=-3.0
                )  # or gradients overflow where eps is 0
                x.requires_grad_()
                made = self._stand_in(w, training)
                y, kept = self._kept(made, x)
                if not y.requires_grad:
                    raise _NotProven("its output carries no gradient")
                if usual:
                    half = self._kept(made, x.detach()[:1].clone().requires_grad_())[1]  # what it keeps once falls out
                    more[_name(pair[0])] = (kept - half) // _ROWS - (math.prod(shape) * x.element_size() + 4)
                self._check_gradients(x, made, y, spec)
        return more

    def _kept(self, made: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        """Its output and the bytes that autograd keeps for it, besides the weight."""
        weight = self._weight_of(made)
        with torch.enable_grad(), saved_for_backward(() if weight is None else (weight,)) as saved:
            y = self.cls.forward(made, x)
            return y, saved()

    def _weight_of(self, made: Any) -> Tensor | None:
        return made.weight if self.weighted else None

    def _check_gradients(self, x: Tensor, made: nn.Module, y: Tensor, spec: Spec) -> None:
        weight = self._weight_of(made)
        inputs = [x] if weight is None else [x, weight]
        dy = self._randn(y.shape).to(y.dtype)
        with torch.enable_grad(), _Backward() as operators:  # type: ignore[no-untyped-call]
            grads = torch.autograd.grad(y, inputs, dy, allow_unused=True)
        if operators.refusal:
            raise _NotProven(operators.refusal)
        rows, w = x.detach().flatten(-self.k), None if weight is None else weight.detach().flatten()
        rstd = reference.exact_rstd(rows, spec.eps)
        dx, dw = reference.backward(
            dy.flatten(-self.k), None, rows, w, rstd, spec.cast, spec.offset, need_dx=True, need_dw=w is not None
        )
        assert dx is not None
        g, xh = reference.products(dy.flatten(-self.k), rows, w, rstd, spec.offset)
        scale = (g.double() * rstd.double().unsqueeze(-1)).norm(dim=-1)
        self._check_close("input", grads[0], dx, scale, -1)
        if weight is not None:
            assert dw is not None
            self._check_close("weight", grads[1], dw, (dy.flatten(-self.k).double() * xh.double()).norm(), None)

    @staticmethod
    def _check_close(name: str, theirs: Tensor | None, ours: Tensor, scale: Tensor, dim: int | None) -> None:
        """Each row of dx within a share of rstd · ‖dy·w‖, and dw as a whole within one of ‖dy·xh‖."""
        off = 1.0
        if theirs is not None:
            error = (theirs.double().reshape(ours.shape) - ours.double()).norm(dim=dim)
            off = float((error / scale.clamp(min=torch.finfo(ours.dtype).tiny)).max())
        if not off <= _GRADIENT[ours.dtype]:
            raise _NotProven(f"its gradient of the {name} is not the formula's, by {off:.1g} of it")

    # --- figures ---

    def _changed(self, spec: Spec) -> dict[str, Change]:
        changed = {}
        for dtype in _DTYPES:
            x, w = self._draw(
                self.shapes[0], dtype, dtype if self.weighted else None, leading=(1, self._many(self.shapes[0]))
            )
            y = self.cls.forward(self._stand_in(w), x)
            if not _close(y, self._published(x, w, spec)):
                raise _NotProven(f"its operators match no supported RMSNorm for {x.shape[1]} rows")
            count, ulp = differing(y, self._exact(x, w, spec))
            changed[_name(dtype)] = Change(count / y.numel(), ulp)
        return changed

    @staticmethod
    def _many(shape: tuple[int, ...]) -> int:
        return -(-_OUTPUTS // math.prod(shape))

    # --- inputs ---

    def _observed(
        self, state: _State, shape: tuple[int, ...], **attributes: object
    ) -> tuple[Observation, Tensor, Tensor | None]:
        """What its forward does in the state, and the input and weight. Raises _NotProven; _Raised if it raises."""
        with contextlib.ExitStack() as contexts:
            if state.grad == "inference":
                contexts.enter_context(torch.inference_mode())
            elif state.grad != "no_grad":
                contexts.enter_context(torch.enable_grad())
            x, w = self._draw(shape, *state.pair, state.leading, state.values, state.strides)
            x.requires_grad_(state.grad in ("both", "input"))
            made = self._stand_in(w, state.training, state.grad in ("both", "weight"), **attributes)
            if state.autocast is not None:
                contexts.enter_context(torch.autocast("cpu", state.autocast))
                contexts.enter_context(_flagged("cuda"))
            device = None if state.device is None else torch.device(state.device)
            try:
                seen = observe.observe(self.cls, made, x, math.prod(shape), self.row, device)
            except Refusal as refusal:
                raise _NotProven(str(refusal)) from None
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                why = f"its forward raises {type(error).__name__} under the probe: {' '.join(str(error).split())}"[:200]
                raise _Raised(why) from error
        if not attributes:
            self.facts |= seen.facts
            self.asked |= seen.asked
            self.numbers |= seen.numbers
        return seen, x.detach(), w

    def _stand_in(
        self, w: Tensor | None, training: bool = False, requires_grad: bool = True, **attributes: object
    ) -> nn.Module:
        weight = None if w is None else nn.Parameter(w.clone(), requires_grad)
        return observe.stand_in(self.stand_in_class, self.module, weight, training=training, **attributes)

    def _draw(
        self, shape: tuple[int, ...], x_dtype: torch.dtype, w_dtype: torch.dtype | None,
        leading: Sequence[int] = (2, 3), values: str = "random", strides: str = "dense", smallest: float = -4.0,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Rows and a random weight. Random rows are of all sizes, down to where eps decides the result."""
        x = self._randn((*leading, *shape))
        count = math.prod(leading)
        if values == "random":
            sizes = torch.logspace(1.5, smallest, count, dtype=torch.float32)
        elif values in ("zero", "tiny", "huge"):
            sizes = torch.full((count,), {"zero": 0.0, "tiny": 1e-30, "huge": 1e25}[values])
        else:
            sizes = torch.full((count,), 0.01)
            odd = {"infinite": math.inf, "NaN": math.nan, "spiky": 3e4}[values]
            x[(0,) * x.dim()] = odd
        limits = torch.finfo(x_dtype)
        x = x * sizes.view(*leading, *(1 for _ in shape))
        if values == "huge":
            x = x.clamp(-limits.max, limits.max)
        w = self._randn(shape) if self.weighted else None
        return _laid(x.to(x_dtype), strides), None if w is None or w_dtype is None else w.to(w_dtype)

    def _randn(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float32)  # whatever the default dtype is

    def _published(self, x: Tensor, w: Tensor | None, spec: Spec) -> Tensor:
        return self._flat(reference.published, x, w, spec)

    def _exact(self, x: Tensor, w: Tensor | None, spec: Spec) -> Tensor:
        def forward(x: Tensor, w: Tensor | None, eps: float, cast: str, offset: float) -> Tensor:
            return reference.forward(x, None, w, eps, cast, offset, with_rstd=False)[0]

        return self._flat(forward, x, w, spec)

    def _flat(self, compute: Callable[..., Tensor], x: Tensor, w: Tensor | None, spec: Spec) -> Tensor:
        rows = x.flatten(-self.k)
        return compute(rows, None if w is None else w.flatten(), spec.eps, spec.cast, spec.offset).view(x.shape)


@contextlib.contextmanager
def _flagged(device: str) -> Iterator[None]:
    """Autocast that says it is on for a device which may not be there."""
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before)


class _Raised(_NotProven):
    """The forward itself has raised."""


class _Backward(TorchDispatchMode):
    """Notes the first operator that no backward pass of an RMSNorm needs."""

    refusal = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not self.refusal and func.name().removeprefix("aten::") not in BACKWARD:
            self.refusal = f"its backward pass runs {func}"
        return func(*args, **(kwargs or {}))


@functools.lru_cache(1024)
def _expression(x: torch.dtype, w: torch.dtype | None, spec: Spec) -> Node:
    """What *published* computes."""
    rows = torch.ones(1, 4, dtype=x)
    weight = None if w is None else torch.ones(4, dtype=w)
    with Operators({"x": rows} if weight is None else {"x": rows, "w": weight}, 4) as operators:
        y = reference.published(rows, weight, spec.eps, spec.cast, spec.offset)
    found: Node = operators.expression(y)
    return found


def _laid(x: Tensor, strides: str) -> Tensor:
    """The same numbers, in memory in another way."""
    if strides == "sliced":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if strides == "every second":
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    if strides == "transposed" and x.dim() > 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if strides == "expanded" and x.dim() > 1 and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    return x


def _close(theirs: Tensor, published: Tensor) -> bool:
    """Whether these are the outputs of the same expression.

    ATen may take the sum or the root in another way for another layout, or on another processor, each an fp32 ulp or
    two off: 16 ulp in fp32, and at most 2 after a rounding to 16 bits. Where one is not finite, so is the other.
    """
    if theirs.dtype != published.dtype or theirs.shape != published.shape:
        return False
    if torch.equal(theirs, published):
        return True
    if theirs.dtype == torch.float64:
        theirs, published = theirs.float(), published.float()  # in which both were computed
    return differing(theirs, published)[1] <= (2 if theirs.dtype in (torch.bfloat16, torch.float16) else 16)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
