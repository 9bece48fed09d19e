"""The proof of one norm: which RMSNorm it computes, found by running it, or why none was found.

The class's own forward runs on detached twins of the module with random weights and inputs, and must equal *published*
of exactly one spec bit for bit. Nothing of the live module is touched: no parameter, hook or random number.
"""

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rmsnorm import reference
from rmsnorm.measure import differing, saved_for_backward
from rmsnorm.spec import DTYPES, Spec

# The dtypes in which a spec must hold where input and weight share one; in any other pair it may be the class's own.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ONE_TENSOR = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
_ROWS = (2, 12)
# A norm without a weight takes any width. At two, the smaller a divisor of the larger, groups of a fixed size show.
_WIDTHS = (64, 320)
# Of how many outputs a distance from *exact* is taken.
_OUTPUTS = 1 << 16
# Against the class run eagerly: the share of 16-bit outputs that may differ, and by how many ulp.
_SHARE = {torch.bfloat16: 1e-5, torch.float16: 8e-5}
_ULP = {"early": 2, "late": 1}
# A gradient of other meaning is off by far more than this, relative in L2; one of other rounding by far less.
_GRADIENT = 1e-3

_PLAIN = (bool, int, float, str, torch.dtype, type(None))

_Pair = tuple[torch.dtype, torch.dtype | None]  # of the input and of the weight


@dataclass(frozen=True)
class Change:
    """What replacing a norm changes on random rows: the share of outputs that differ, and by how many ulp at most."""

    share: float
    ulp: int


@dataclass(frozen=True)
class Rule:
    """What a replaced norm does.

    weighted: whether it has a weight. own: the pairs of dtypes in which its own forward runs. fp32: whether autocast
    casts what it is given to fp32, as it does for F.rms_norm on some devices: its own forward runs there. shape: the
    last dimensions that it normalizes over, where it says so; None for the last one, whatever its size.
    """

    spec: Spec
    weighted: bool
    own: frozenset[_Pair] = frozenset()
    fp32: bool = False
    shape: tuple[int, ...] | None = None

    @property
    def partly(self) -> str:
        """Where the norm's own forward runs, in words. fp64, which nobody trains in, is worth none unless it is all."""
        pairs = {(x, w) for x, w in self.own if torch.float64 not in (x, w)}
        parts = []
        if pairs and all((x, w) in pairs for x in _DTYPES for w in _DTYPES if x != w):
            parts.append("where input and weight differ in dtype")
        elif pairs:
            parts.append("for " + ", ".join(sorted(f"{_name(x)} input with {_name(w)} weight" for x, w in pairs if w)))
        if self.fp32:
            parts.append("under autocast")
        return " and ".join(parts)


@dataclass(frozen=True)
class Proof:
    """What was found about one norm: the rule that replaces it, or None and the reason. The rest as in a Verdict."""

    rule: Rule | None = None
    reason: str = ""
    exactly: bool = True
    changed: dict[str, Change] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)


class _NotProven(Exception):
    """Carries the reason."""


def arguments(cls: type[nn.Module]) -> list[inspect.Parameter]:
    """What the forward of the class takes, without self."""
    return list(inspect.signature(cls.forward).parameters.values())[1:]


def obstacle(cls: type[nn.Module], module: nn.Module) -> str | None:
    """Why the module, whose own class is cls, cannot even be tried; None if it can."""
    taken = arguments(cls)
    if len(taken) != 1 or taken[0].kind not in _ONE_TENSOR:
        return f"its forward takes ({', '.join(map(str, taken))}), not one tensor"
    others = sorted(k for k, v in {**module._parameters, **module._modules}.items() if v is not None and k != "weight")
    if others or module._modules.get("weight") is not None:
        return f"it holds more than a weight: {', '.join(others) or 'no parameter'}"
    tensors = {**vars(module), **module._buffers}
    fixed = [k for k, v in tensors.items() if isinstance(v, Tensor) and not v.is_floating_point()]
    if fixed:
        return f"it holds {', '.join(fixed)}, which no random numbers can stand for"
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


def prove(cls: type[nn.Module], module: nn.Module, strict: bool) -> Proof:
    """The one rule that survives every probe, or why none does; what replacing it changes."""
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            warnings.catch_warnings(action="ignore"),  # of dtypes that nobody mixes but the probe
        ):
            return _Probe(cls, module).run(strict)
    except _NotProven as reason:
        return Proof(reason=str(reason))


class _Probe:
    """Runs the forward of a class on twins of a module, away from the module itself."""

    def __init__(self, cls: type[nn.Module], module: nn.Module) -> None:
        self.cls, self.module = cls, module
        self.attributes = list(_attributes(module))
        self.generator = torch.Generator("cpu").manual_seed(0)
        weight = module._parameters.get("weight")
        self.weighted = weight is not None
        self.normalized = _normalized(module)
        self.shapes = [(n,) for n in _WIDTHS] if self.normalized is None else [self.normalized]
        if weight is not None:
            self.shapes = [tuple(weight.shape)]
        self.numbers = sorted({float(v) for v in vars(module).values() if type(v) in (int, float) and 0 <= v < 1})
        if not self.numbers and "eps" in vars(module) and module.eps is None:
            self.numbers = [torch.finfo(torch.float32).eps]  # as torch.nn.RMSNorm means it, in all these dtypes

    def run(self, strict: bool) -> Proof:
        if not self.numbers:
            raise _NotProven("it has no attribute that could be its eps")
        with _Called() as called:
            candidates = self._survivors()
        exactly = bool(candidates)
        if not exactly and not strict:
            candidates = self._near()
        if not candidates:
            raise _NotProven(self.refusal)
        if len(candidates) > 1:
            raise _NotProven(f"{len(candidates)} specs give its bits, so none is proven")
        (spec,) = candidates
        self._other_ranks(spec, exactly)
        saved = self._gradients(spec)
        rule = Rule(spec, self.weighted, self._own(spec, exactly), called.rms_norm, self.normalized)
        return Proof(rule, "", exactly, self._changed(spec), saved)

    def _candidates(self) -> list[Spec]:
        early = [Spec(eps) for eps in self.numbers]
        if not self.weighted:
            return early
        return early + [Spec(eps, "late", offset) for eps in self.numbers for offset in (0.0, 1.0)]

    def _survivors(self) -> list[Spec]:
        """The specs that give its bits wherever input and weight share a dtype, training or not."""
        candidates = self._candidates()
        for dtype in _DTYPES:
            for shape in self.shapes:
                for training in (False, True):
                    x, w = self._draw(shape, dtype, dtype)
                    y = self._forward(x, w, training)
                    candidates = [c for c in candidates if _same(y, self._published(x, w, c))]
                    if not candidates:
                        self.refusal = f"no spec gives its bits for {self._named((dtype, dtype))}"
                        return []
        return candidates

    def _near(self) -> list[Spec]:
        """The specs from whose *exact* it is nowhere further than *published* is."""
        candidates = self._candidates()
        for dtype in _DTYPES:
            for shape in self.shapes:
                x, w = self._draw(shape, dtype, dtype, self._many(shape))
                y = self._forward(x, w)
                distances = {c: self._distance(y, x, w, c) for c in candidates}
                candidates = [c for c in candidates if distances[c] is None]
                if not candidates:
                    nearest = min((d for d in distances.values() if d is not None), key=lambda d: d[1])
                    self.refusal += f"; {nearest[0]}"
                    return []
        return candidates

    def _distance(self, y: Tensor, x: Tensor, w: Tensor | None, spec: Spec) -> tuple[str, float] | None:
        """None if y is near enough to *exact*; otherwise (what is wrong, the share of outputs that differ)."""
        ours, theirs = self._exact(x, w, spec), self._published(x, w, spec)
        if y.dtype != ours.dtype or y.shape != ours.shape:
            return f"its output is {y.dtype}", 1.0
        count, ulp = differing(y, ours)
        limit = differing(theirs, ours)[1]
        expected = y.numel() * _SHARE.get(y.dtype, 1.0)
        if y.dtype in _SHARE:
            limit = max(limit, _ULP[spec.cast])
            expected += 3 * math.sqrt(expected) + 1  # chance, in so few outputs
        if ulp <= limit and count <= expected:
            return None
        share = count / y.numel()
        return f"{share:.2g} of its outputs differ from exact, by up to {ulp} ulp (published: {limit})", share

    def _own(self, spec: Spec, exactly: bool) -> frozenset[_Pair]:
        """The pairs of dtypes in which only its own forward gives its bits."""
        own = []
        for x_dtype in DTYPES:
            for w_dtype in DTYPES if self.weighted else (None,):
                if x_dtype == w_dtype and x_dtype in _DTYPES:
                    continue
                for shape in self.shapes:
                    if not self.weighted and x_dtype in _DTYPES:
                        continue
                    x, w = self._draw(shape, x_dtype, w_dtype, 0 if exactly else self._many(shape))
                    try:
                        y = self._forward(x, w)
                        agrees = _same(y, self._published(x, w, spec))
                        if not exactly and torch.float64 not in (x_dtype, w_dtype):
                            agrees = self._distance(y, x, w, spec) is None
                    except _NotProven:
                        agrees = False  # then it raises as it always did
                    if not agrees:
                        own.append((x_dtype, w_dtype))
                        break
        return frozenset(own)

    def _other_ranks(self, spec: Spec, exactly: bool) -> None:
        """A norm may treat inputs of 2 or 4 dimensions in another way; one that does not take them is none the less."""
        rows = 0 if exactly else self._many(self.shapes[0])
        for leading in ((-1,), (2, 3, -1)):
            x, w = self._draw(self.shapes[0], torch.float32, torch.float32, rows)
            x = x.reshape(*leading, *self.shapes[0])
            try:
                y = self._forward(x, w)
            except _NotProven:
                continue
            if not (_same(y, self._published(x, w, spec)) if exactly else self._distance(y, x, w, spec) is None):
                raise _NotProven(f"no spec gives its bits for an input of {x.dim()} dimensions")

    def _gradients(self, spec: Spec) -> dict[str, int]:
        """Raise unless its gradients are those of the formula. By how many bytes a row it keeps more for them."""
        more = {}
        shape, rows = self.shapes[0], math.prod(_ROWS)
        for dtype in _DTYPES:
            x, w = self._draw(shape, dtype, dtype)
            x = x.sign() + x / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30).to(dtype)  # rows of one size
            x.requires_grad_()
            twin = self._twin(w)
            weight = twin._parameters.get("weight")
            y, kept = self._kept(twin, x)
            half = self._kept(twin, x.detach()[:1].clone().requires_grad_())[1]  # what it keeps once falls out
            if not y.requires_grad:
                raise _NotProven("its output carries no gradient")
            more[_name(dtype)] = 2 * (kept - half) // rows - (math.prod(shape) * x.element_size() + 4)
            if dtype == torch.float32:
                self._check_gradients(x, weight, y, spec)
        return more

    def _kept(self, twin: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        """Its output and the bytes that autograd keeps for it, besides the weight."""
        weight = twin._parameters.get("weight")
        with torch.enable_grad(), saved_for_backward(() if weight is None else (weight,)) as saved:
            y = self._call(twin, x)
            return y, saved()

    def _check_gradients(self, x: Tensor, weight: Tensor | None, y: Tensor, spec: Spec) -> None:
        inputs = [x] if weight is None else [x, weight]
        dy = y.detach() + self._randn(y.shape)  # so that every term of dx counts
        with torch.enable_grad():
            grads = torch.autograd.grad(y, inputs, dy, allow_unused=True)
        k = len(self.shapes[0])
        rows, w = x.detach().flatten(-k), None if weight is None else weight.detach().flatten()
        rstd = reference.exact_rstd(rows, spec.eps)
        ours = reference.backward(
            dy.flatten(-k), None, rows, w, rstd, spec.cast, spec.offset, need_dx=True, need_dw=w is not None
        )
        for name, theirs, right in zip(("input", "weight"), grads, ours, strict=False):
            assert right is not None
            off = 1.0 if theirs is None else float((theirs.flatten() - right.flatten()).norm() / right.norm())
            if not off <= _GRADIENT:
                raise _NotProven(f"its gradient of the {name} is not the formula's, by {off:.1g} of it")

    def _changed(self, spec: Spec) -> dict[str, Change]:
        changed = {}
        for dtype in _DTYPES:
            x, w = self._draw(self.shapes[0], dtype, dtype, self._many(self.shapes[0]))
            y = self._forward(x, w)
            count, ulp = differing(y, self._exact(x, w, spec))
            changed[_name(dtype)] = Change(count / y.numel(), ulp)
        return changed

    def _draw(
        self, shape: tuple[int, ...], x_dtype: torch.dtype, w_dtype: torch.dtype | None, rows: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Random rows, from large to so small that eps decides the result, and a random weight."""
        leading = (1, rows) if rows > math.prod(_ROWS) else _ROWS
        smallest = math.log10(max(self.numbers[0], 1e-12)) / 2 - 1
        sizes = torch.logspace(2, smallest, math.prod(leading), dtype=torch.float32).view(*leading, *(1 for _ in shape))
        x = self._randn((*leading, *shape)) * sizes
        w = self._randn(shape) if self.weighted else None
        return x.to(x_dtype), w if w is None else w.to(w_dtype)

    @staticmethod
    def _many(shape: tuple[int, ...]) -> int:
        """Rows enough for a distance: in few, the largest of them is chance. A multiple of 6, for other ranks."""
        return 6 * -(-_OUTPUTS // (6 * math.prod(shape)))

    def _randn(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32)  # whatever the default dtype is

    def _forward(self, x: Tensor, w: Tensor | None, training: bool = False) -> Tensor:
        given = x.clone()
        y = self._call(self._twin(w, training), given)
        if not torch.equal(given.nan_to_num(), x.nan_to_num()):
            raise _NotProven("it writes to its input")
        return y

    def _call(self, twin: nn.Module, x: Tensor) -> Tensor:
        try:
            y = self.cls.forward(twin, x)
        except Exception as error:
            raise _NotProven(f"its forward raises {type(error).__name__} under the probe: {error}"[:200]) from error
        if not isinstance(y, Tensor):
            raise _NotProven(f"its forward returns a {type(y).__name__}")
        return y

    def _twin(self, w: Tensor | None, training: bool = False) -> nn.Module:
        """A module with the same attributes and class of its own, but its own weight, no hooks, and nothing shared.

        Other tensors it may hold, unused, so they are random: what it computes cannot depend on them unseen.
        """
        twin = nn.Module()
        for key, value in self.attributes:
            twin.__dict__[key] = value if type(value) in _PLAIN else self._copy(value)
        twin.training = training
        twin._parameters.update(dict.fromkeys(self.module._parameters))
        twin._modules.update(dict.fromkeys(self.module._modules))
        for key, buffer in self.module._buffers.items():
            twin._buffers[key] = None if buffer is None else self._copy(buffer)
        if w is not None:
            twin._parameters["weight"] = nn.Parameter(w.clone())
        twin.__class__ = self.cls
        return twin

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._randn(value.shape).to(value.dtype)
        try:
            return copy.deepcopy(value)
        except Exception as error:
            raise _NotProven(f"its attributes cannot be copied: {type(error).__name__}: {error}"[:200]) from error

    def _published(self, x: Tensor, w: Tensor | None, spec: Spec) -> Tensor:
        return self._flat(reference.published, x, w, spec)

    def _exact(self, x: Tensor, w: Tensor | None, spec: Spec) -> Tensor:
        def forward(x: Tensor, w: Tensor | None, eps: float, cast: str, offset: float) -> Tensor:
            return reference.forward(x, None, w, eps, cast, offset, with_rstd=False)[0]

        return self._flat(forward, x, w, spec)

    def _flat(self, compute: Callable[..., Tensor], x: Tensor, w: Tensor | None, spec: Spec) -> Tensor:
        rows = x.flatten(-len(self.shapes[0]))
        return compute(rows, None if w is None else w.flatten(), spec.eps, spec.cast, spec.offset).view(x.shape)

    def _named(self, pair: _Pair) -> str:
        return f"{_name(pair[0])} input" + (f" with {_name(pair[1])} weight" if self.weighted and pair[1] else "")


class _Called(TorchFunctionMode):
    """Whether F.rms_norm was called, which autocast runs in fp32 on some devices."""

    rms_norm = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.rms_norm |= getattr(func, "__name__", "") == "rms_norm"
        return func(*args, **(kwargs or {}))


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What the class has set on the module, without what others have put there: hooks and bound forwards."""
    usual = vars(nn.Module())
    for key, value in vars(module).items():
        bound = isinstance(value, (MethodType, partial)) or key == "forward"
        private = key.startswith("_") and type(value) not in _PLAIN
        if key not in usual and not bound and not private:
            yield key, value


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """What a proof depends on besides the class: every attribute, and the weight's shape."""
    weight = module._parameters.get("weight")
    held = sorted(k for k, v in module._parameters.items() if v is not None)
    attributes = sorted((k, v.shape if isinstance(v, Tensor) else repr(v)) for k, v in _attributes(module))
    return (None if weight is None else weight.shape, *held, *attributes)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and differing(a, b)[0] == 0
