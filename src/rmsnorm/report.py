"""`rmsnorm report`: what replacing a model's norms changes and gains, measured on the activations that reach them."""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmsnorm import checkpoint, machine, measure
from rmsnorm.errors import CommandError, one_line
from rmsnorm.measure import Progress, Timing
from rmsnorm.models import Report, Verdict, exact, patch, unpatch
from rmsnorm.ops import wait_for_host

_NORM_SECONDS = 6.0  # for timing the norms alone, all of them together
_NORM_SAMPLES, _TOKEN_SAMPLES, _FEWEST = 15, 50, 3
_FEWEST_FORWARD, _FEWEST_TRAINING, _MOST_STEPS = 3, 2, 15


# --- what comes out ------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Seconds with the model's own classes and with ours, summed over what was timed."""

    before: float = 0.0
    after: float = 0.0

    def add(self, timings: dict[str, Timing]) -> None:
        self.before += timings["before"].median
        self.after += timings["after"].median

    @property
    def gain(self) -> float | None:
        return self.before / self.after if self.after else None

    def to_json(self) -> dict[str, Any]:
        return {"before_us": self.before * 1e6, "after_us": self.after * 1e6, "gain": self.gain}


@dataclass
class Norm:
    """One norm, proven or left, and what was seen where activations reached it.

    wrong: outputs of the patched model that are not *exact*'s bits, NaN positions counted; changed: those that are
    not the replaced class's; ulp: by how much at most.
    """

    verdict: Verdict
    width: int | None
    calls: int = 0
    rows: int = 0
    outputs: int = 0
    wrong: int = 0
    changed: int = 0
    ulp: int = 0
    forward: Pair = field(default_factory=Pair)
    training: Pair = field(default_factory=Pair)
    token: Pair = field(default_factory=Pair)

    def to_json(self) -> dict[str, Any]:
        spec = self.verdict.spec
        return {
            "name": self.verdict.name,
            "class": self.verdict.cls,
            "width": self.width,
            "spec": None if spec is None else {"eps": spec.eps, "cast": spec.cast, "offset": spec.offset},
            "left_because": self.verdict.reason or None,
            "own_forward": self.verdict.partly or None,
            "calls": self.calls,
            "rows": self.rows,
            "outputs": self.outputs,
            "differ_from_exact": self.wrong,
            "differ_from_original": self.changed,
            "most_ulp_from_original": self.ulp,
            "forward": self.forward.to_json(),
            "forward_backward": self.training.to_json(),
            "one_token": self.token.to_json(),
        }


@dataclass(frozen=True)
class Step:
    """A whole-model step, timed with the model's own norms and with ours in turn, and what the norms are of it."""

    before: Timing
    after: Timing
    norms: Pair
    samples: tuple[tuple[float, float], ...]  # seconds before and after, a pair a round

    @property
    def inside_spread(self) -> bool:
        """Whether the two spreads overlap, so that the difference of the medians says nothing."""
        return self.before.low <= self.after.high and self.after.low <= self.before.high

    @property
    def shares(self) -> tuple[float, float]:
        return self.norms.before / self.before.median, self.norms.after / self.after.median

    def to_json(self) -> dict[str, Any]:
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "difference_us": (self.before.median - self.after.median) * 1e6,
            "inside_spread": self.inside_spread,
            "rounds_us": [[before * 1e6, after * 1e6] for before, after in self.samples],
            "norms_share_before": self.shares[0],
            "norms_share_after": self.shares[1],
        }


@dataclass(frozen=True)
class Saved:
    """Bytes that the whole model saves for backward, weights not counted."""

    before: int
    after: int


@dataclass(frozen=True)
class Result:
    target: str
    facts: dict[str, Any]
    model: dict[str, Any]
    notes: tuple[str, ...]
    norms: tuple[Norm, ...]
    forward: Step | None
    training: Step | None
    saved: Saved | None
    seconds: float
    peak_bytes: int

    @property
    def ok(self) -> bool:
        """No output of the patched model's norms differs from *exact*, and the preset has the norms it should."""
        return not any(n.wrong for n in self.norms) and self.model["as_expected"] is not False

    def total(self, which: str) -> Pair:
        """The norms' times summed; which: "forward", "training" or "token"."""
        return _total(self.norms, which)

    def to_json(self) -> dict[str, Any]:
        return {
            "verb": "report",
            "ok": self.ok,
            "target": self.target,
            "machine": self.facts,
            "model": self.model,
            "notes": list(self.notes),
            "norms": [n.to_json() for n in self.norms],
            "sum_forward": self.total("forward").to_json(),
            "sum_forward_backward": self.total("training").to_json(),
            "sum_one_token": self.total("token").to_json(),
            "forward_step": None if self.forward is None else self.forward.to_json(),
            "training_step": None if self.training is None else self.training.to_json(),
            "saved_for_backward": None
            if self.saved is None
            else {
                "before_bytes": self.saved.before,
                "after_bytes": self.saved.after,
                "less_bytes": self.saved.before - self.saved.after,
            },
            "seconds": round(self.seconds, 1),
            "peak_resident_bytes": self.peak_bytes,
        }

    def table(self) -> Any:
        """A rich renderable: the norms one by one, then the whole model."""
        from rich.console import Group
        from rich.text import Text

        m = self.model
        head = (
            f"{self.target}: {m['class']}, {m['parameters']:,} parameters, {m['dtype']}, {m['tokens']} tokens; "
            f"{m['norm_parameters']:,} norm parameters"
        )
        groups = str(Report(tuple(n.verdict for n in self.norms)))
        lines = [
            Text(machine.headline(self.facts)),
            Text(head),
            Text(groups),
            *(Text(f"note: {note}") for note in self.notes),
        ]
        last = Text(f"{self.seconds:.0f} s, {self.peak_bytes / 1e9:.1f} GB of memory at most")
        verdict = Text("every output of the replaced norms has the exact bits", "green")
        if not self.ok:
            verdict = Text(self._red(), "red")
        return Group(*lines, self._norms_table(), self._model_table(), verdict, last)

    def _red(self) -> str:
        wrong = sum(n.wrong for n in self.norms)
        if wrong:
            return f"{wrong} outputs of the replaced norms differ from the exact bits"
        found = f"{self.model['norms']} norms with {self.model['norm_parameters']:,} parameters"
        return f"this is not the expected model: {found}, so transformers has changed it"

    def _norms_table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Each norm alone, on the activations that reach it: median us before → with ours")
        table.add_column("norm", no_wrap=True)
        for column in ("M x N", "≠ exact", "≠ before", "forward", "forward + backward", "one token"):
            table.add_column(column, justify="right")
        for n in self.norms:
            if n.verdict.spec is None:
                table.add_row(Text(f"{n.verdict.name}, left: {n.verdict.reason}", "yellow"))
            elif not n.calls:
                table.add_row(Text(f"{n.verdict.name}, no activation reached it", "yellow"))
            else:
                changed = f"{n.changed / n.outputs:.1g}, {n.ulp} ulp" if n.changed else "0"
                wrong = Text(str(n.wrong), "red" if n.wrong else "")
                table.add_row(n.verdict.name, f"{n.rows} x {n.width}", wrong, changed, *self._times(n))
        table.add_section()
        reached = [n for n in self.norms if n.calls]
        changed = f"{sum(n.changed for n in reached)} of {sum(n.outputs for n in reached):,}"
        total = Norm(Verdict("sum", "", None), None)
        total.forward, total.training, total.token = (self.total(k) for k in ("forward", "training", "token"))
        table.add_row("sum", "", str(sum(n.wrong for n in reached)), changed, *self._times(total))
        return table

    @staticmethod
    def _times(n: Norm) -> list[str]:
        if n.wrong:
            return ["-"] * 3
        return [f"{_us(p.before)} → {_us(p.after)}" for p in (n.forward, n.training, n.token)]

    def _model_table(self) -> Any:
        from rich.table import Table

        table = Table(title="The whole model (median, and in brackets the spread)")
        for column in ("", "its own norms", "ours", "difference"):
            table.add_column(column, justify="left" if not column else "right")
        for label, pair in (("the norms, forward", self.total("forward")),
                            ("the norms, forward + backward", self.total("training")),
                            ("the norms, one token", self.total("token"))):  # fmt: skip
            if pair.gain is not None:
                table.add_row(label, _ms(pair.before), _ms(pair.after), f"{pair.gain:.1f} x faster")
        for label, step in (("forward step", self.forward), ("training step", self.training)):
            if step is not None:
                difference = step.before.median - step.after.median
                what = f"{difference / step.before.median:+.1%}, {difference * 1e3:+.0f} ms"
                what = f"inside the spread ({what})" if step.inside_spread else f"{what} saved"
                times = f"{label}, {step.before.calls} times each"
                table.add_row(times, _spread(step.before), _spread(step.after), what)
                table.add_row("  the norms' share", *(f"{share:.2%}" for share in step.shares), "")
        if self.saved is not None:
            before, after = self.saved.before, self.saved.after
            less = f"{(before - after) / 1e6:.1f} MB less"
            table.add_row("saved for backward", f"{before / 1e6:.1f} MB", f"{after / 1e6:.1f} MB", less)
        return table


def _total(norms: tuple[Norm, ...], which: str) -> Pair:
    pairs = [getattr(n, which) for n in norms]
    return Pair(sum(p.before for p in pairs), sum(p.after for p in pairs))


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _spread(timing: Timing) -> str:
    return f"{timing.median * 1e3:.0f} ms [{timing.low * 1e3:.0f}, {timing.high * 1e3:.0f}]"


# --- measuring -----------------------------------------------------------------------------------------------

_Say = Callable[[str], None]


class _Steps:
    """Counts what is announced; the total grows where more rounds fit in than were sure to."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.done, self.total = 0, 2

    def __call__(self, what: str) -> None:
        self.total = max(self.total, self.done + 1)
        self.progress(self.done, self.total, what)
        self.done += 1


def main(
    target: str, out: Path, progress: Progress, *, device: str | None = None, tokens: int = 2048, seconds: float = 90.0,
    every_layer: bool = False,
) -> Result:  # fmt: skip
    """Report on a preset ("deepseek-ocr") or on a local Hugging Face checkpoint folder; writes out/report.json.

    device: "cpu" or "cuda", by default the GPU if there is one. seconds: about how long it may take; whole-model
    steps are repeated until then, forward at least three times and training at least twice. Raises CommandError,
    before anything is written, for a target that is neither, a damaged folder, and options that make no sense.
    """
    start = time.perf_counter()
    where = machine.find_device(device)
    if tokens < 1:
        raise CommandError(f"tokens is {tokens}: give at least 1")
    measure.check_file(out / "report.json", "--out")
    build = _builder(target)
    checkpoint.transformers_for("the report")
    say = _Steps(progress)
    say(f"building {target}")
    with checkpoint.quiet():
        model, expected, notes = build(where)
        return _measure(target, out, where, model, expected, notes, tokens, seconds, start, say)


def _measure(
    target: str, out: Path, where: torch.device, model: Any, expected: tuple[int, int] | None, notes: tuple[str, ...],
    tokens: int, seconds: float, start: float, say: _Steps,
) -> Result:  # fmt: skip
    with checkpoint.blame(f"the configuration of {type(model).__name__} is of no language model"):
        text = model.config.get_text_config()
    vocabulary, positions = (getattr(text, key, None) for key in ("vocab_size", "max_position_embeddings"))
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise CommandError(f"{type(model).__name__} takes no token ids: give the folder of a language model")
    tokens = min(tokens, positions if isinstance(positions, int) and positions > 0 else tokens)
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0)).to(where)

    say("proving and replacing its norms")
    originals = {name: type(module) for name, module in model.named_modules()}
    with checkpoint.blame(f"the norms of {type(model).__name__} cannot be proven"):
        verdicts = patch(model).verdicts
    modules = dict(model.named_modules())
    norms = tuple(Norm(v, checkpoint.norm_width(modules[v.name])) for v in verdicts)
    facts = _model_facts(model, [modules[v.name] for v in verdicts], tokens, expected)

    forward = training = saved = None
    if any(n.verdict.spec for n in norms):
        wait_for_host()
        say.total += sum(n.verdict.spec is not None for n in norms) + _FEWEST_FORWARD + 1 + _FEWEST_TRAINING
        _examine(model, ids, norms, originals, say)
        left = max(0.0, seconds - (time.perf_counter() - start))
        forward = _forward_step(model, ids, _total(norms, "forward"), left / 4, say)
        left = max(0.0, seconds - (time.perf_counter() - start))
        try:
            training, saved = _training_step(model, ids, _total(norms, "training"), left, say)
        except Exception as error:  # noqa: BLE001  # some models raise what they like in training
            said = str(error) if isinstance(error, CommandError) else one_line(error)
            notes = (*notes, f"no training step: {said}")
    else:
        notes = (*notes, "no norm was proven, so there is nothing to compare")

    result = Result(
        target, machine.describe(where), facts, notes, norms, forward, training, saved,
        time.perf_counter() - start, _peak_bytes(),
    )  # fmt: skip
    measure.write_json(out / "report.json", result.to_json())
    return result


def _model_facts(
    model: nn.Module, norms: list[nn.Module], tokens: int, expected: tuple[int, int] | None
) -> dict[str, Any]:
    counts = len(norms), sum(p.numel() for module in norms for p in module.parameters(recurse=False))
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})),
        "tokens": tokens,
        "norms": counts[0],
        "norm_parameters": counts[1],
        "as_expected": None if expected is None else counts == expected,
    }


def _examine(
    model: nn.Module, ids: Tensor, norms: tuple[Norm, ...], originals: dict[str, type[nn.Module]], say: _Say
) -> None:
    """One forward pass of the patched model; each norm is checked and timed as its activations reach it.

    Nothing is stored: the model waits inside the norm until it is done.
    """
    proven = [n for n in norms if n.verdict.spec is not None]
    seconds = _NORM_SECONDS / len(proven)

    def look(n: Norm, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> None:
        (x,) = (*args, *named.values())
        say(f"checking and timing {n.verdict.name}")
        _look(n, originals[n.verdict.name], module, x, y, seconds)

    modules = dict(model.named_modules())
    hooks = []
    for n in proven:

        def hook(module: nn.Module, args: Any, named: Any, y: Any, n: Norm = n) -> None:
            look(n, module, args, named, y)

        hooks.append(modules[n.verdict.name].register_forward_hook(hook, with_kwargs=True))
    try:
        model.eval()
        with torch.no_grad():
            _run(model, ids)
    finally:
        for handle in hooks:
            handle.remove()


def _look(n: Norm, original: type[nn.Module], module: nn.Module, x: Tensor, y: Tensor, seconds: float) -> None:
    """Compare y, which the patched norm gave for x, and time the norm before and after on this x."""
    w = module._parameters.get("weight")
    before = original.forward(module, x)
    expected = exact(module, x)
    wrong = measure.differing(y, before if expected is None else expected)[0]
    changed, ulp = measure.differing(y, before)
    del before, expected
    n.width = n.width or y.shape[-1]
    n.calls += 1
    n.rows += x.numel() // n.width
    n.outputs += y.numel()
    n.wrong += wrong
    n.changed += changed
    n.ulp = max(n.ulp, ulp)
    if wrong:
        return  # no time for a norm whose bits are wrong

    def timed(
        make: Callable[[Callable[..., Tensor]], Callable[[], object]], samples: int, part: float
    ) -> dict[str, Timing]:
        calls = {"before": make(original.forward), "after": make(type(module).forward)}
        return measure.interleave(calls, x.device, samples=samples, fewest=_FEWEST, seconds=part * seconds / 2)

    token = x[..., -1:, :].contiguous()
    n.forward.add(timed(lambda f: lambda: f(module, x), _NORM_SAMPLES, 0.3))
    n.token.add(timed(lambda f: lambda: f(module, token), _TOKEN_SAMPLES, 0.1))
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        inputs = [leaf] if w is None or not w.requires_grad else [leaf, w]
        dy = torch.randn(y.shape, dtype=y.dtype, device=y.device)
        n.training.add(timed(lambda f: lambda: torch.autograd.grad(f(module, leaf), inputs, dy), _NORM_SAMPLES, 0.6))


def _forward_step(model: nn.Module, ids: Tensor, norms: Pair, seconds: float, say: _Say) -> Step:
    def step() -> None:
        with torch.no_grad():
            _run(model, ids)

    model.eval()
    return _alternate(model, step, norms, seconds, _FEWEST_FORWARD, ids.device, "forward step", say)


def _training_step(model: nn.Module, ids: Tensor, norms: Pair, seconds: float, say: _Say) -> tuple[Step, Saved]:
    """Forward and backward of one batch, from a random cotangent; no optimizer. Every step counts what it saves."""
    model.train()
    kept: list[int] = []
    dy: list[Tensor] = []

    def step() -> None:
        with measure.saved_for_backward(model.parameters()) as saved:
            y = _run(model, ids)
            kept.append(saved())
        if not dy:
            generator = torch.Generator().manual_seed(1)
            dy.append(torch.randn(y.shape, generator=generator).to(y.device, y.dtype))
        y.backward(dy[0])
        model.zero_grad(set_to_none=True)

    say("warming up the training step")
    start = time.perf_counter()
    # The first step also pays for memory that nothing has touched yet: seconds, which would count against "before".
    _run(model, ids[:, : max(1, ids.shape[1] // 8)]).square().mean().backward()
    model.zero_grad(set_to_none=True)
    _run(model, ids)
    seconds -= time.perf_counter() - start
    timed = _alternate(model, step, norms, seconds, _FEWEST_TRAINING, ids.device, "training step", say)
    return timed, Saved(kept[0], kept[1])


def _alternate(
    model: nn.Module, step: Callable[[], None], norms: Pair, seconds: float, fewest: int, device: torch.device,
    what: str, say: _Say,
) -> Step:  # fmt: skip
    """Time the step with the model's own norms and with ours in turn, until the seconds are spent."""
    before: list[float] = []
    after: list[float] = []
    start = time.perf_counter()
    while len(before) < _MOST_STEPS:
        pair = (time.perf_counter() - start) / max(1, len(before))
        if len(before) >= fewest and time.perf_counter() - start + pair > seconds:
            break
        say(f"timing the {what}, round {len(before) + 1}")
        for swap, samples in ((unpatch, before), (patch, after)):
            swap(model)
            samples.append(_timed(step, device))
    rounds = tuple(zip(before, after, strict=True))
    return Step(measure.summarize(before), measure.summarize(after), norms, rounds)


def _timed(step: Callable[[], None], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def _run(model: nn.Module, ids: Tensor) -> Tensor:
    with checkpoint.blame(f"{type(model).__name__} cannot be run on token ids alone"):
        output = checkpoint.on_tokens(model, ids)
        y: Tensor | None = getattr(output, "last_hidden_state", None)
        first: Tensor = output[0] if y is None else y
    return first


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- the model -----------------------------------------------------------------------------------------------

_Built = tuple[Any, tuple[int, int] | None, tuple[str, ...]]
_Builder = Callable[[torch.device], _Built]


def _builder(target: str) -> _Builder:
    """What builds the target: (model, its expected norms and norm parameters if they are known, notes)."""
    if target in PRESETS:
        return PRESETS[target]
    folder = Path(target)
    try:
        there = folder.is_dir()
    except OSError as error:
        raise CommandError(f"{target!r} cannot be read: {one_line(error)}") from None
    if not there:
        raise CommandError(
            f"{target!r} is neither a preset nor a folder: give {', '.join(PRESETS)}, or a folder that holds "
            "config.json and *.safetensors"
        )
    config, weights = _checked(folder)
    return lambda device: _load(folder, config, weights, device)


def _deepseek_ocr(device: torch.device) -> _Built:
    """DeepSeek-OCR's language decoder at its true widths, with random weights."""
    from transformers import DeepseekOcr2TextConfig
    from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

    notes: tuple[str, ...] = ("random weights; a norm's are drawn from 0.5 to 1.5, so that early and late differ",)
    experts, used, vocabulary = 64, 6, 129280
    if device.type == "cpu":
        experts, used, vocabulary = 4, 2, 4096
        notes += ("4 experts with top-2 instead of 64 with top-6, and a vocabulary of 4096 instead of 129,280: "
                  "no norm sees these, but the step is shorter than the real one",)  # fmt: skip
    config = DeepseekOcr2TextConfig(
        vocab_size=vocabulary,
        hidden_size=1280,
        intermediate_size=6848,
        num_hidden_layers=12,
        num_attention_heads=10,
        max_position_embeddings=8192,
        n_routed_experts=experts,
        num_experts_per_tok=used,
        n_shared_experts=2,
        moe_intermediate_size=896,
        mlp_layer_types=["dense"] + ["sparse"] * 11,
    )
    default = torch.get_default_dtype()
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = DeepseekOcr2TextModel(config)
        finally:
            torch.set_default_dtype(default)
        with torch.no_grad():
            for module in model.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    module.get_parameter("weight").uniform_(0.5, 1.5)
    return model, (25, 32_000), notes


PRESETS: dict[str, _Builder] = {"deepseek-ocr": _deepseek_ocr}


def _load(folder: Path, content: dict[str, Any], weights: list[Path], device: torch.device) -> _Built:
    """The folder's model as transformers' own code builds it; nothing in the folder is executed."""
    transformers = checkpoint.transformers_for("the report")
    with checkpoint.vetted(content, weights) as vetted:
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        with checkpoint.blame(f"transformers cannot load {folder}", (vetted, str(folder))):
            config = transformers.AutoConfig.from_pretrained(vetted, **options)
            _check_memory(checkpoint.build_on_meta(config, transformers, str(folder)), folder)
            options |= {"config": config, "use_safetensors": True, "dtype": "auto", "output_loading_info": True}
            cls = checkpoint.model_class(config, transformers)
            try:
                model, info = cls.from_pretrained(vetted, **options)
            except RuntimeError:
                # transformers logs the shapes that differ, and does not say them.
                _, info = cls.from_pretrained(vetted, device_map="meta", ignore_mismatched_sizes=True, **options)
                if not info["mismatched_keys"]:
                    raise
                name, stored, wanted = min(info["mismatched_keys"])
                raise CommandError(
                    f"transformers cannot load {folder}: {name} has shape {tuple(stored)}, its config.json expects "
                    f"{tuple(wanted)}"
                ) from None
            model = model.to(device)
    missing = sorted(info["missing_keys"])
    notes: tuple[str, ...] = ()
    if missing:
        notes = (f"{len(missing)} parameters are not in the folder and were drawn at random, {missing[0]} first",)
    return model, None, notes


def _check_memory(model: nn.Module, folder: Path) -> None:
    """What the folder lacks is drawn at random, so its files do not say how much is allocated."""
    needed = 2 * sum(p.numel() for p in model.parameters())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        has = f"this machine has {there / 1e9:,.0f}"
        raise CommandError(f"{folder} is of a model of at least {needed / 1e9:,.0f} GB in 16 bits, {has}")


def _checked(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """The folder's configuration and the files of its weights. Raises CommandError unless these can be trusted."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise CommandError(f"{folder} holds no config.json: give the folder of a Hugging Face checkpoint")
    config = checkpoint.read_config(path)
    for key, value in _strings(config):
        # A kernel of this form would be fetched and run.
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in value:
            raise CommandError(f"{path} asks for foreign code, {key} {value!r}: remove that line")
    return config, checkpoint.check_weights(folder)


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, name if not key.endswith("_implementation") else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)
