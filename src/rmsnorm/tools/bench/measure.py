"""Measures one case: every provider on the same inputs, in turn, and no time for ours if its bits are wrong."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rmsnorm import bits, compat, gated_reference, memory, reference
from rmsnorm.tools import timing
from rmsnorm.tools.bench import peers
from rmsnorm.tools.bench.cases import GAP, STRIDED_FORWARD, TRAINING, BenchCase
from rmsnorm.tools.bench.peers import EPS, Provider, definition
from rmsnorm.tools.bench.result import BenchRow, Measurement

_QUICK_SECONDS, _QUICK_FEWEST = 0.4, 5
_SAMPLES, _SAMPLES_ON_GPU = 100, 31

Run = Callable[..., tuple[Tensor, ...]]


def compile_once(case: BenchCase, device: torch.device, names: Sequence[str]) -> None:
    """Call each provider once, to fill the caches on disk with its kernels."""
    inputs, cotangents = draw_inputs(case, device)
    for provider in _taking(case, peers.providers(device.type, names)):
        if provider.name != "copy":
            with contextlib.suppress(Exception):
                _timed_call(runner(provider, case), case, inputs, cotangents)()
    del inputs, cotangents
    torch.cuda.empty_cache()  # the other processes need the memory


def draw_inputs(case: BenchCase, device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return random inputs and cotangents of a case, the same every time.

    Args:
        case: The case.
        device: Where they are to be.

    Returns:
        (x, w), (x, residual, w) or (x, gate, w); and the cotangents of the outputs, (dy,) or (dy, ds).
    """
    generator = torch.Generator(device).manual_seed(case.M * 7919 + case.N)
    x, dy, *others = (
        torch.randn(case.M, case.N, generator=generator, device=device).to(case.dtype)
        for _ in range(4 if case.mode.adds else 3 if case.mode.gated else 2)
    )
    if case.mode == STRIDED_FORWARD:
        x = torch.nn.functional.pad(x, (0, GAP))[:, : case.N]
    w = (torch.rand(case.N, generator=generator, device=device) + 0.5).to(case.dtype)
    inputs = (x, *others[:1], w)
    if case.mode.backward:
        for t in inputs:
            t.requires_grad_()
    return inputs, (dy, *others[1:])


def measure(case: BenchCase, device: torch.device, measured: Sequence[Provider], quick: bool) -> BenchRow:
    """Check our bits and time every provider.

    Args:
        case: The case.
        device: Where it runs.
        measured: The providers.
        quick: Whether slow providers get fewer samples.
    """
    inputs, cotangents = draw_inputs(case, device)
    with torch.no_grad():
        expected = _expected(case, inputs)

    calls: dict[str, Callable[[], object]] = {}
    found: dict[str, Measurement] = {}
    fault = ""
    for provider in _taking(case, measured):
        name = provider.name
        if name == "copy":
            calls[name], found[name] = copy_call(case, device), Measurement(None)
            continue
        try:
            run = runner(provider, case)
            if name == "ours":
                fault = _bit_errors(case, run, inputs, cotangents)
            y, *_ = run(*inputs)
            differs = bits.differing(y, expected)[0] / y.numel() if provider.equal else None
            saved = _saved_bytes(run, inputs) if case.mode == TRAINING else None
            call = _timed_call(run, case, inputs, cotangents)
            call()
        except Exception as error:  # noqa: BLE001  # a provider that cannot run is reported in the table
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            found[name] = Measurement(None, reason)
            fault = reason if name == "ours" else fault
            continue
        found[name] = Measurement(None, fault if name == "ours" else "", differs, saved)
        if not (name == "ours" and fault):
            calls[name] = call
        del y
    del expected

    timings = timing.interleave(
        calls,
        device,
        samples=_SAMPLES_ON_GPU if device.type == "cuda" else _SAMPLES,
        fewest=_QUICK_FEWEST,
        seconds=_QUICK_SECONDS if quick else None,
    )
    return BenchRow(case, fault, {name: replace(m, timing=timings.get(name)) for name, m in found.items()})


def _taking(case: BenchCase, measured: Sequence[Provider]) -> list[Provider]:
    """Return the providers that can be called in a case, and the copy."""
    return [p for p in measured if p.name == "copy" or (p.gated if case.mode.gated else p.norm) is not None]


def _expected(case: BenchCase, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return y as a published class computes it."""
    x, *second, w = inputs
    if case.mode.gated is not None:
        return gated_reference.published(x, second[0], w, case.mode.gated)
    return definition(x + second[0] if second else x, w)


def runner(provider: Provider, case: BenchCase) -> Run:
    """Return the function that computes the outputs (y,) or (y, s) of a case from its inputs; see `draw_inputs`."""
    norm, add, gated, spec = provider.norm, provider.add, provider.gated, case.mode.gated

    def with_gate(x: Tensor, gate: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        assert gated is not None
        assert spec is not None
        return (gated(x, gate, w, spec),)

    if spec is not None:
        return _compile(with_gate) if provider.compiled else with_gate
    assert norm is not None

    def plain(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return (norm(x, w),)

    def added(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        if add is not None:
            return add(x, residual, w)
        s = x + residual
        return norm(s, w), s

    run: Run = added if case.mode.adds else plain
    return _compile(run) if provider.compiled else run


def _compile(run: Run) -> Run:
    torch.compiler.reset()  # compile for the shape of this case only, as in a model with fixed shapes
    compat.keep_compiled_graphs()
    return torch.compile(run, fullgraph=True, dynamic=False)


def _saved_bytes(run: Run, inputs: tuple[Tensor, ...]) -> int:
    with memory.saved_for_backward([inputs[-1]]) as saved:
        outputs = run(*inputs)  # kept alive until the bytes are counted
        count = saved()
    del outputs
    return count


def _timed_call(
    run: Run, case: BenchCase, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]
) -> Callable[[], object]:
    if not case.mode.backward:
        return lambda: run(*inputs)
    if case.mode == TRAINING:
        return lambda: torch.autograd.grad(run(*inputs), inputs, cotangents)
    outputs = run(*inputs)
    return lambda: torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)


def copy_call(case: BenchCase, device: torch.device) -> Callable[[], object]:
    """Return y.copy_(x) of as many elements as the norm must read and write."""
    source = torch.ones(case.M * case.N * case.mode.tensors // 2, dtype=case.dtype, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _bit_errors(case: BenchCase, run: Run, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> str:
    """Return what differs in bits from the reference on these inputs; empty if nothing does."""
    pairs = (_pairs if case.mode.gated is None else _gated_pairs)(case, run, inputs, cotangents)
    wrong = {name: bits.differing(*pair)[0] for name, pair in pairs.items()}
    return ", ".join(f"{count} of {pairs['y'][0].numel()} {name} differ" for name, count in wrong.items() if count)


Pairs = dict[str, tuple[Tensor, Tensor]]


def _gated_pairs(case: BenchCase, run: Run, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> Pairs:
    """Return what ours computes and what the reference computes, by name, in a gated mode."""
    x, gate, w = (t.detach() for t in inputs)
    spec = case.mode.gated
    assert spec is not None
    y, rstd = gated_reference.forward(x, gate, w, spec, True)
    outputs = run(*inputs)
    pairs = {"y": (outputs[0], y)}
    if case.mode.backward:
        assert rstd is not None
        found = torch.autograd.grad(outputs, inputs[:2], cotangents)
        wanted = gated_reference.backward(cotangents[0], x, gate, w, rstd, spec, True, True, False)[:2]
        for name, got, right in zip(("dx", "dgate"), found, wanted, strict=True):
            assert right is not None
            pairs[name] = (got, right)
    return pairs


def _pairs(case: BenchCase, run: Run, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> Pairs:
    """Return what ours computes and what the reference computes, by name."""
    x, *residual, w = (t.detach() for t in inputs)
    y, s, rstd = reference.forward(x, residual[0] if residual else None, w, EPS, "early", 0.0, with_rstd=True)
    outputs = run(*inputs)
    pairs = {"y": (outputs[0], y)}
    if s is not None:
        pairs["s"] = (outputs[1], s)
    if case.mode.backward:
        assert rstd is not None
        dx = torch.autograd.grad(outputs, inputs[0], cotangents)[0]
        dy, ds = (*cotangents, None)[:2]
        assert dy is not None
        wanted = reference.backward(dy, ds, x if s is None else s, w, rstd, "early", 0.0, True, False)[0]
        assert wanted is not None
        pairs["dx"] = (dx, wanted)
    return pairs
