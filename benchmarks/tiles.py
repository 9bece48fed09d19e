"""Times launch configurations of the GPU kernels, including those in use, and prints the fastest ones.

    python benchmarks/tiles.py "forward 16384x2880 bfloat16 block_n=512,1024 warps=2,4" "backward …" --out DIR

A sweep is a mode (forward, add-forward, backward, add-backward), M x N, a dtype, and for fields of `launch.Launch` the
values to try in every combination; the other fields stay as they are in use. A row that one program processes (parts=1)
gets as many pieces of block_n as it needs; a row that several programs share (parts=2) gets as many parts as it needs.
`programs` is the largest number of programs. The kernels are compiled in several processes, then timed in turn with a
copy.
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
from rmsnorm.kernels import dispatch
from rmsnorm.kernels.gpu import planner as gpu
from rmsnorm.kernels.gpu import tiling
from rmsnorm.kernels.gpu.tiling import Launch
from rmsnorm.spec import Spec
from rmsnorm.tools import machine, processes, results, timing
from rmsnorm.tools.bench.cases import ADD_BACKWARD, ADD_FORWARD, BACKWARD, FORWARD, BenchCase, Mode
from rmsnorm.tools.bench.measure import copy_call, draw_inputs
from rmsnorm.tools.bench.peers import EPS

MODES = {mode.slug: mode for mode in (FORWARD, ADD_FORWARD, BACKWARD, ADD_BACKWARD)}
DEVICE = torch.device("cuda")
SPEC = Spec(EPS)
FLAGS = ("staged", "overlap")  # fields that are not numbers


def _known(given: str, known: Sequence[str], what: str) -> None:
    if given not in known:
        raise argparse.ArgumentTypeError(f"{given!r} is not a {what}: give one of {', '.join(known)}")


@dataclass(frozen=True)
class Sweep:
    """A mode, a shape, a dtype, and the values to try for fields of `Launch`."""

    mode: Mode
    M: int
    N: int
    dtype: torch.dtype
    fields: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def parse(cls, text: str) -> "Sweep":
        """Parse an argument of the command. Raises ArgumentTypeError, whose message says what is expected."""
        mode, shape, dtype, *fields = *text.split(), "", "", ""
        _known(mode, tuple(MODES), "mode")
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
        return cls(MODES[mode], M, N, getattr(torch, dtype), tuple(values.items()))

    def __str__(self) -> str:
        return f"{self.mode.slug} {self.M} x {self.N} {str(self.dtype).removeprefix('torch.')}"

    @property
    def case(self) -> BenchCase:
        """The case of the benchmark with the same inputs and copy."""
        return BenchCase(self.M, self.N, self.dtype, self.mode)

    @property
    def passes(self) -> str:
        """The function of `tiling` that chooses the configuration."""
        return "backward" if self.mode.backward else "forward"

    def configs(self, in_use: Launch) -> list[Launch]:
        """Return the configuration in use, then every other combination that has a kernel: none shares several rows."""
        names = [name for name, _ in self.fields]
        found, longest = [in_use], tiling.LONGEST_SUM[self.dtype.itemsize]
        for values in itertools.product(*(values for _, values in self.fields)):
            chosen: dict[str, Any] = dict(zip(names, values, strict=True))
            config = dataclasses.replace(in_use, **chosen)
            parts = -(-self.N // (config.block_n * config.pieces)) if config.parts > 1 else 1
            body = tiling._body(self.N, self.dtype.itemsize)
            pieces = config.pieces if parts > 1 else -(-body // config.block_n)
            config = dataclasses.replace(config, parts=parts, pieces=pieces, staged=config.staged and parts > 1)
            if config.rows > 1 and parts > 1:
                continue
            if self.passes == "backward":
                config = dataclasses.replace(
                    config, programs=tiling._programs(config.tiles(self.M), config.programs, longest, config.apart)
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
        inputs, cotangents = draw_inputs(sweep.case, DEVICE)
        rstd = dispatch.forward(inputs[0], None, inputs[-1], SPEC, True)[2]
        assert rstd is not None
        return cls(sweep, inputs, cotangents, rstd)

    def run(self) -> tuple[Tensor | None, ...]:
        """Run the pass. The first output must have the same bits for every configuration."""
        x, *residual, w = self.inputs
        if self.sweep.passes == "forward":
            return dispatch.forward(x, residual[0] if residual else None, w, SPEC, False)
        dy, *ds = self.cotangents
        return dispatch.backward(dy, ds[0] if ds else None, x, w, self.rstd, SPEC, True, True)


@contextlib.contextmanager
def using(sweep: Sweep, config: Launch) -> Iterator[None]:
    """Launch with this configuration inside the context, planned and compiled anew."""
    before = getattr(tiling, sweep.passes)
    plans = (gpu.plan_forward, gpu.plan_backward)
    setattr(tiling, sweep.passes, lambda *a: config)
    for plan in plans:
        plan.cache_clear()
    try:
        yield
    finally:
        setattr(tiling, sweep.passes, before)
        for plan in plans:
            plan.cache_clear()


def in_use(sweep: Sweep) -> Launch:
    """Return the configuration that the library uses."""
    size, of = sweep.dtype.itemsize, gpu.gpu_at(torch.cuda.current_device())
    adds, aligned = sweep.mode.adds, sweep.N % tiling.WORD[size] == 0
    if sweep.passes == "forward":
        return tiling.forward(sweep.N, size, adds, aligned, of)
    return tiling.backward(sweep.M, sweep.N, size, size, size, adds, aligned, of)


def kernels(sweep: Sweep) -> list[tuple[Sweep, list[Launch]]]:
    """Group the configurations by the kernel that they need."""
    found: dict[Launch, list[Launch]] = {}
    for config in sweep.configs(in_use(sweep)):
        found.setdefault(dataclasses.replace(config, programs=1), []).append(config)
    return [(sweep, configs) for configs in found.values()]


def compile_one(kernel: tuple[Sweep, list[Launch]]) -> None:
    """Compile a kernel, and the sums for its numbers of programs, into the cache on disk."""
    sweep, configs = kernel
    tensors = Tensors.drawn(sweep)
    for config in configs:
        with using(sweep, config), contextlib.suppress(Exception):
            tensors.run()


def measured(sweep: Sweep, seconds: float) -> dict[str, Any]:
    """Return for each configuration the median in µs, or why there is none, and the share of dw that differs."""
    tensors = Tensors.drawn(sweep)
    configs = sweep.configs(in_use(sweep))
    expected = tensors.run()
    calls: dict[str, Any] = {"copy": copy_call(sweep.case, DEVICE)}
    found: dict[str, Any] = {"copy": {}}
    for config in configs:
        name = difference(configs[0], config)

        def call(config: Launch = config) -> tuple[Tensor | None, ...]:
            with using(sweep, config):
                return tensors.run()

        try:
            row, other, *_ = call()
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001  # such as too much shared memory: reported in the table
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
    """Return the fields that differ from the configuration in use."""
    a, b = dataclasses.asdict(in_use), dataclasses.asdict(config)
    return " ".join(f"{name}={int(b[name])}" for name in a if a[name] != b[name]) or "in use"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Sweep.parse, metavar="SWEEP")
    parser.add_argument(
        "--seconds", type=float, default=0.05, help="time limit for each configuration (default: %(default)s)"
    )
    parser.add_argument(
        "--best", type=int, default=8, help="how many configurations to print for each sweep (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="a folder for tiles.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use here")
    if options.out is not None:
        results.check_folder(options.out)
    processes.run_in_workers(compile_one, [kernel for sweep in options.sweeps for kernel in kernels(sweep)])
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
