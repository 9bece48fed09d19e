"""Checks and times the norms alone, when activations reach them in a forward pass."""

import inspect
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmsnorm import bits
from rmsnorm.patching.replacement import exact_output
from rmsnorm.tools import timing
from rmsnorm.tools.report.budget import Announcer
from rmsnorm.tools.report.norms import Mode, NormResult, Pair
from rmsnorm.tools.report.patched import PatchedModel

_NORM_SAMPLES, _TOKEN_SAMPLES, _FEWEST_SAMPLES = 15, 50, 3
OUTLIER = 3.0  # how many times as slow as norms of the same kind an outlier is
_AGAIN = 2  # how often an outlier is measured again


def examine(patched: PatchedModel, tokens: int, timer: "NormTimer | None") -> tuple[NormResult, ...]:
    """Run one forward pass with our norms; check each norm, and time it, when its activations reach it.

    No activation is stored: the model waits inside the norm while that is measured.

    Args:
        patched: The model.
        tokens: The length of the sequence.
        timer: What times the norms; None to check them only.

    Returns:
        What was found about each norm.
    """
    norms = patched.fresh_results()
    hooks = []
    for n in norms:
        if n.verdict.replaced:

            def hook(
                module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y: Tensor, n: NormResult = n
            ) -> None:
                own = patched.own[n.verdict.name]
                inputs = inspect.signature(own.forward).bind(module, *args, **named).args[1:]
                check_outputs(n, own, module, inputs, y)
                if timer is not None and not n.wrong and n.calls == 1:
                    timer.time(n, inputs, y)

            hooks.append(patched.modules[n.verdict.name].register_forward_hook(hook, with_kwargs=True))
    try:
        patched.use("after")
        patched.forward(tokens)
    finally:
        for handle in hooks:
            handle.remove()
    return norms


def check_outputs(n: NormResult, own: type[nn.Module], module: nn.Module, inputs: Sequence[Any], y: Tensor) -> None:
    """Compare y, which our norm returned for x and perhaps a gate, with *exact* and with the norm's own class."""
    before = own.forward(module, *inputs)
    expected = exact_output(module, *inputs)
    n.width = n.width or y.shape[-1]
    w = module._parameters.get("weight")
    n.dtype, n.weight_dtype = (None if t is None else str(t.dtype).removeprefix("torch.") for t in (inputs[0], w))
    n.calls += 1
    n.rows += inputs[0].numel() // n.width
    n.outputs += y.numel()
    n.wrong += bits.differing(y, before if expected is None else expected)[0]
    changed, ulp = bits.differing(y, before)
    n.changed += changed
    n.ulp = max(n.ulp, ulp)


class NormTimer:
    """Times norms within a number of seconds, and measures outliers again.

    When the seconds are spent, only the first norm of each kind is timed.

    Args:
        patched: The model.
        say: Announces each norm.
        seconds: The budget for all norms together.
        modes: What is timed.
        most: How many norms of a kind are timed at most; by default all.
        with_host: What `timing.interleave` takes.
    """

    def __init__(
        self, patched: PatchedModel, say: Announcer, seconds: float, modes: tuple[Mode, ...], most: int | None = None,
        with_host: bool = False,
    ) -> None:  # fmt: skip
        self.patched, self.say, self.seconds, self.modes = patched, say, seconds, modes
        self.most, self.with_host = most, with_host
        self.to_come = sum(v.replaced for v in patched.verdicts)
        self.spent = 0.0
        self.kinds: dict[Any, list[NormResult]] = {}

    def time(self, n: NormResult, inputs: Sequence[Any], y: Tensor) -> None:
        """Time a norm on its inputs, unless the budget does not allow it; y is its output."""
        x = inputs[0]
        kind = self.kinds.setdefault((n.verdict.class_name, n.verdict.finding, x.shape, x.stride(), x.dtype), [])
        seconds = max(0.0, self.seconds - self.spent) / max(1, self.to_come)
        self.to_come -= 1
        if kind and (self.spent >= self.seconds or (self.most is not None and len(kind) >= self.most)):
            return
        self.say(f"timing {n.verdict.name}")
        start = timing.now()
        n.times = self._times(n, inputs, y, seconds)
        kind.append(n)
        for other in kind:
            while self._is_outlier(other, kind) and other.again < _AGAIN:
                again = self._times(other, inputs, y, seconds)
                other.again += 1
                # Disturbances make a measurement longer, never shorter.
                other.times = {
                    mode: Pair(min(pair.before, again[mode].before), min(pair.after, again[mode].after))
                    for mode, pair in other.times.items()
                }
        for other in kind:
            other.outlier = self._is_outlier(other, kind)
        self.spent += timing.now() - start

    def _is_outlier(self, n: NormResult, kind: list[NormResult]) -> bool:
        """Return whether any of its times is far above those of the others of its kind."""
        others = [other for other in kind if other is not n]
        for mode, pair in n.times.items():
            for side in ("before", "after"):
                usual = [getattr(other.times[mode], side) for other in others]
                if usual and getattr(pair, side) > OUTLIER * statistics.median(usual):
                    return True
        return False

    def _times(self, n: NormResult, inputs: Sequence[Any], y: Tensor, seconds: float) -> dict[Mode, Pair]:
        name = n.verdict.name
        own, ours, module = self.patched.own[name], self.patched.ours[name], self.patched.modules[name]
        device = y.device
        token = [None if t is None else t[..., -1:, :].contiguous() for t in inputs]
        w = module._parameters.get("weight")
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        wanted = [t for t in (*leaves, w) if t is not None and t.requires_grad]
        dy = torch.randn(y.shape, dtype=y.dtype, device=device)
        makes: dict[Mode, tuple[int, float, Callable[[Any], Callable[[], object]]]] = {
            "forward": (_NORM_SAMPLES, 0.3, lambda f: lambda: f(module, *inputs)),
            "token": (_TOKEN_SAMPLES, 0.1, lambda f: lambda: f(module, *token)),
            "training": (_NORM_SAMPLES, 0.6, lambda f: lambda: torch.autograd.grad(f(module, *leaves), wanted, dy)),
        }
        times: dict[Mode, Pair] = {}
        for mode in self.modes:
            samples, part, make = makes[mode]
            with torch.set_grad_enabled(mode == "training"):
                timings = timing.interleave(
                    {"before": make(own.forward), "after": make(ours.forward)}, device, samples=samples,
                    fewest=_FEWEST_SAMPLES, seconds=part * seconds / 2, with_host=self.with_host,
                )  # fmt: skip
            times[mode] = Pair(*(timing.undisturbed(timings[side], device) for side in ("before", "after")))
        return times
