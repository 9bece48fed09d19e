"""Tries launch configurations of the GPU kernels on a GPU, those in use among them, and says which are fastest.

    python benchmarks/tiles.py "forward 16384x2880 bfloat16 block_n=512,1024 warps=2,4" "backward …" --out DIR

A sweep: the pass (forward, add, backward, add-backward), M x N, the dtype, and for fields of `launch.Launch` the values
to try in every combination; the others are as in use. A row that one program holds (parts=1) has the pieces of block_n
that it takes; one that programs share (parts=2) has the parts that it takes. `programs` is the most there may be.
Compiled in processes side by side, then timed in turn beside a copy.
"""

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmsnorm.errors import CommandError
from rmsnorm.kernels import dispatch, gpu, launch
from rmsnorm.kernels.launch import Launch
from rmsnorm.spec import Spec
from rmsnorm.tools import bench, machine, peers, processes, results, timing
from rmsnorm.tools.bench import Case

# What the benchmark calls the passes.
MODES = {
    "forward": bench.FORWARD,
    "add": bench.ADD_FORWARD,
    "backward": bench.BACKWARD,
    "add-backward": bench.ADD_BACKWARD,
}
DEVICE = torch.device("cuda")
SPEC = Spec(peers.EPS)
FLAGS = ("staged", "overlap")  # fields that are not numbers


def _known(given: str, known: Sequence[str], what: str) -> None:
    if given not in known:
        raise argparse.ArgumentTypeError(f"{given!r} is no {what}: give one of {', '.join(known)}")


@dataclass(frozen=True)
class Sweep:
    """kind: which pass. fields: of `Launch`, with the values to try."""

    kind: str
    M: int
    N: int
    dtype: torch.dtype
    fields: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def parse(cls, text: str) -> "Sweep":
        """From a command's argument; raises ArgumentTypeError, whose message says what would do."""
        kind, shape, dtype, *fields = *text.split(), "", "", ""
        _known(kind, tuple(MODES), "pass")
        _known(dtype, ("bfloat16", "float16", "float32"), "dtype")
        try:
            M, N = map(int, shape.split("x"))
            values = {
                name: tuple(map(int, of.split(",")))
                for name, _, of in (field.partition("=") for field in fields if field)
            }
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: give sizes as 8192x1280, and fields as warps=2,4") from None
        if min(M, N) < 1:
            raise argparse.ArgumentTypeError(f"{shape}: give sizes of at least 1")
        for name, of in values.items():
            _known(name, tuple(field.name for field in dataclasses.fields(Launch)), "field")
            least = 0 if name in FLAGS else 1
            if min(of) < least:
                raise argparse.ArgumentTypeError(f"{name}={min(of)}: give numbers of at least {least}")
            if name in FLAGS:
                values[name] = tuple(map(bool, of))
        return cls(kind, M, N, getattr(torch, dtype), tuple(values.items()))

    def __str__(self) -> str:
        return f"{self.kind} {self.M} x {self.N} {str(self.dtype).removeprefix('torch.')}"

    @property
    def case(self) -> Case:
        """The benchmark's, whose inputs and copy are taken."""
        return Case(self.M, self.N, self.dtype, MODES[self.kind])

    @property
    def passes(self) -> str:
        """The function of `launch` that chooses."""
        return "backward" if self.kind.endswith("backward") else "forward"

    def configs(self, in_use: Launch) -> list[Launch]:
        """The one in use first, then every other combination that there is a kernel for: none shares several rows."""
        names = [name for name, _ in self.fields]
        found, longest = [in_use], launch.LONGEST_SUM[self.dtype.itemsize]
        for values in itertools.product(*(values for _, values in self.fields)):
            chosen: dict[str, Any] = dict(zip(names, values, strict=True))
            config = dataclasses.replace(in_use, **chosen)
            parts = -(-self.N // (config.block_n * config.pieces)) if config.parts > 1 else 1
            pieces = config.pieces if parts > 1 else -(-self.N // config.block_n)
            config = dataclasses.replace(config, parts=parts, pieces=pieces, staged=config.staged and parts > 1)
            if config.rows > 1 and parts > 1:
                continue
            if self.passes == "backward":
                config = dataclasses.replace(
                    config, programs=launch._programs(self.M, config.programs, config.rows, longest)
                )
            found.append(config)
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Tensors:
    """Random inputs of a sweep, and its cotangents: (x, w) or (x, residual, w), and (dy,) or (dy, ds)."""

    sweep: Sweep
    inputs: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    rstd: Tensor

    @classmethod
    def drawn(cls, sweep: Sweep) -> "Tensors":
        inputs, cotangents = bench._drawn(sweep.case, DEVICE)
        rstd = dispatch.forward(inputs[0], None, inputs[-1], SPEC, True)[2]
        assert rstd is not None
        return cls(sweep, inputs, cotangents, rstd)

    def run(self) -> tuple[Tensor | None, ...]:
        """What the pass computes; what must have the same bits whatever the configuration, first."""
        x, *residual, w = self.inputs
        if self.sweep.passes == "forward":
            return dispatch.forward(x, residual[0] if residual else None, w, SPEC, False)
        dy, *ds = self.cotangents
        return dispatch.backward(dy, ds[0] if ds else None, x, w, self.rstd, SPEC, True, True)


@contextlib.contextmanager
def using(sweep: Sweep, config: Launch) -> Iterator[None]:
    """Launches with this configuration, planned and compiled anew."""
    before = getattr(launch, sweep.passes)
    plans = (gpu.plan_forward, gpu.plan_backward)
    setattr(launch, sweep.passes, lambda *a: config)
    for plan in plans:
        plan.cache_clear()
    try:
        yield
    finally:
        setattr(launch, sweep.passes, before)
        for plan in plans:
            plan.cache_clear()


def in_use(sweep: Sweep) -> Launch:
    size, of = sweep.dtype.itemsize, gpu._gpu(torch.cuda.current_device())
    adds, aligned = sweep.kind.startswith("add"), sweep.N % 16 == 0
    if sweep.passes == "forward":
        return launch.forward(sweep.N, size, adds, aligned, of)
    return launch.backward(sweep.M, sweep.N, size, size, size, adds, aligned, of)


def kernels(sweep: Sweep) -> list[tuple[Sweep, list[Launch]]]:
    """The configurations, those together that one kernel serves."""
    found: dict[Launch, list[Launch]] = {}
    for config in sweep.configs(in_use(sweep)):
        found.setdefault(dataclasses.replace(config, programs=1), []).append(config)
    return [(sweep, configs) for configs in found.values()]


def compile_one(kernel: tuple[Sweep, list[Launch]]) -> None:
    """Into the cache on disk, with the sums that its numbers of programs take."""
    sweep, configs = kernel
    tensors = Tensors.drawn(sweep)
    for config in configs:
        with using(sweep, config), contextlib.suppress(Exception):
            tensors.run()


def measured(sweep: Sweep, seconds: float) -> dict[str, Any]:
    """By configuration the median in microseconds, or why there is none; of backward passes what of dw differs."""
    tensors = Tensors.drawn(sweep)
    configs = sweep.configs(in_use(sweep))
    expected = tensors.run()
    calls: dict[str, Any] = {"copy": bench._copy(sweep.case, DEVICE)}
    found: dict[str, Any] = {"copy": {}}
    for config in configs:
        name = difference(configs[0], config)

        def call(config: Launch = config) -> tuple[Tensor | None, ...]:
            with using(sweep, config):
                return tensors.run()

        try:
            row, other, *_ = call()
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001  # too much shared memory, too many registers: a line in the table
            found[name] = {"no_time": f"{type(error).__name__}: {error}".splitlines()[0][:150]}
            continue
        if not torch.equal(row, expected[0]):  # type: ignore[arg-type]
            found[name] = {"no_time": "other bits"}
            continue
        calls[name], found[name] = call, {}
        if sweep.passes == "backward":
            assert isinstance(other, Tensor)
            found[name]["dw_differs"] = other.ne(expected[1]).float().mean().item()  # type: ignore[arg-type]
    timings = timing.interleave(calls, DEVICE, samples=31, seconds=seconds)
    return {
        name: what | ({"us": round(timings[name].median * 1e6, 2)} if name in timings else {})
        for name, what in found.items()
    }


def difference(in_use: Launch, config: Launch) -> str:
    """The fields that are not as in use."""
    a, b = dataclasses.asdict(in_use), dataclasses.asdict(config)
    return " ".join(f"{name}={int(b[name])}" for name in a if a[name] != b[name]) or "in use"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Sweep.parse, metavar="SWEEP")
    parser.add_argument(
        "--seconds", type=float, default=0.05, help="of each configuration's calls (default: %(default)s)"
    )
    parser.add_argument("--best", type=int, default=8, help="how many to print of each sweep (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a folder for tiles.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use here")
    if options.out is not None:
        results.check_folder(options.out)
    processes.side_by_side(compile_one, [kernel for sweep in options.sweeps for kernel in kernels(sweep)])
    of_sweeps = []
    for sweep in options.sweeps:
        found = measured(sweep, options.seconds)
        us, no_time = ({name: what[key] for name, what in found.items() if key in what} for key in ("us", "no_time"))
        of_sweeps.append({"sweep": str(sweep), "in_use": str(in_use(sweep)), "us": us, "no_time": no_time})
        print(f"{sweep}: in use {in_use(sweep)}; {len(no_time)} without a time")
        fastest = sorted(us, key=us.__getitem__)
        for name in dict.fromkeys([*fastest[: options.best], "in use", "copy"]):
            dw = found[name].get("dw_differs")
            of_copy = f"{us[name]:8.2f} us {us[name] / us['copy']:6.3f} of copy"
            print(f"  {of_copy}  {name}" + (f"  dw: {dw:.1%} differ" if dw else ""))
        sys.stdout.flush()
        if options.out is not None:
            results.write_json(options.out / "tiles.json", {"machine": machine.describe(DEVICE), "sweeps": of_sweeps})


if __name__ == "__main__":
    try:
        main()
    except CommandError as error:  # --out
        sys.exit(f"tiles.py: {error}")
