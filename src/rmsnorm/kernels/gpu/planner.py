"""Plans calls on the GPU: which kernel takes them, how it is launched, and what is allocated for it."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from rmsnorm.kernels.gpu import kernels, tiling
from rmsnorm.kernels.gpu.driver import Slot, TritonLaunch
from rmsnorm.kernels.gpu.tiling import Gpu, Launch
from rmsnorm.kernels.plan import (
    MOST_PLANS,
    Backward,
    Converted,
    Forward,
    Fresh,
    Plan,
    TensorKind,
    dense,
    find_layout,
    gradients,
    heads_of,
    summands,
)
from rmsnorm.kernels.rows import Walk, walk
from rmsnorm.spec import result_dtype

try:
    from rmsnorm.kernels.gpu import staged
except ImportError:  # Gluon is experimental and may be missing; then wide rows are held in registers
    staged = None  # type: ignore[assignment]

NAME = "gpu kernel (Triton)"
_SUMMED = "summed"  # the sum of several gradients of y


def refuses(x: torch.dtype) -> str | None:
    """Why rows of this dtype must run the reference here; None if the kernels take them."""
    if torch.version.hip is not None:
        return "the kernels are proven on NVIDIA GPUs only"
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if min(capabilities, default=(8, 0)) < (8, 0):
        return f"compute capability {min(capabilities)} is below 8.0, the first to round to bf16"
    return None


@functools.lru_cache(MOST_PLANS)
def plan_forward(kind: Forward) -> Plan:
    """Plans a call that computes y, s and rstd as `reference.forward` does."""
    row, x, residual, before = summands(kind)
    w, spec = kind.w, kind.spec
    wanted = {row: (x, x.dtype)} | ({} if residual is None else {"residual": (residual, x.dtype)})
    rows, kinds, converted = find_layout(walk, wanted)
    before += converted
    gpu = gpu_at(index_of(kind.device))
    aligned = rows.N > tiling.ADD_WIDEST and spec.variance_size is None and _can_be_staged(rows, kinds, x.dtype)
    config = tiling.forward(rows.N, x.dtype.itemsize, residual is not None, aligned, gpu, heads_of(w))
    if w is not None:
        kinds["w"] = dense("w", w, before)
    shape = tuple(x.shape)
    fresh = [Fresh("y", y_dtype_of(x.dtype, w, spec.cast), shape)]
    if residual is not None:
        fresh.append(Fresh("s", x.dtype, shape))
    if kind.with_rstd:
        fresh.append(Fresh("rstd", torch.float32, shape[:-1]))
    calls = Calls(index_of(kind.device), rows, kinds, fresh, x.dtype)
    whole_rows = staged.forward_staged if config.staged else kernels.forward_block
    calls.add(
        kernels.forward_loop if config.parts == 0 else whole_rows,
        config.tiles(rows.M) * max(1, config.parts), config, calls.exchange(config, gpu),
        x=row, residual=None if residual is None else "residual", w=None if w is None else "w", y="y",
        s=None if residual is None else "s", rstd="rstd" if kind.with_rstd else None, shares="shares",
        x_steps=rows.steps[0], residual_steps=rows.steps[-1], eps=float(spec.eps), offset=offset_of(spec.offset),
        V=spec.variance_size, EARLY=spec.cast != "late", FIRST=spec.cast == "first",
    )  # fmt: skip
    return Plan(
        kind.device,
        inputs=("x", "residual", "w"),
        before=tuple(before),
        fresh=tuple(fresh),
        launches=tuple(calls.launches),
        outputs=("y", None if kind.residual is None else "s", "rstd" if kind.with_rstd else None),
    )


_SHARED_BY_TWO = "eps", "offset", "EARLY", "FIRST"
_OF_EACH = "M", "N", "sizes", "STRIDED", "MULTIPLE", "ROWS", "PIECES", "BLOCK_N", "HEADS"


def merge_pair(plan: Plan) -> Plan:
    """The plan of two forward passes with one launch for both, if each has one that holds whole rows, of few tiles."""
    found = _launches_of_whole_rows(plan)
    if found is None:
        return plan
    (first, a), (second, b) = found
    tiles = first.grid[0]
    if a["residual"] is not None or b["residual"] is not None or tiles + second.grid[0] > tiling.MOST_TILES_OF_TWO:
        return plan
    values = {name: a[name] for name in _SHARED_BY_TWO} | {"tiles": tiles}
    for number, named in (("", a), ("2", b)):
        values |= {f"{name}{number}": named[name] for name in (*_OF_EACH, "x", "w", "y", "rstd")}
        values[f"x{number}_steps"] = named["x_steps"]
    return _with_one_launch(plan, kernels.forward_two, tiles + second.grid[0], values)


def merge_sandwich(plan: Plan) -> Plan:
    """The plan of `forward_sandwich` with one launch for both norms, if each has one that holds whole rows.

    The rows of x must be a constant step apart, and so must those of the residual.
    """
    found = _launches_of_whole_rows(plan)
    if found is None:
        return plan
    (_, a), (second, b) = found
    h = a["y"].tensor
    plain = all(named["HEADS"] == 1 and not named["STRIDED"] for named in (a, b))
    if b["x"].tensor != h or a["MULTIPLE"] != b["MULTIPLE"] or not plain:
        return plan
    values = {name: b[name] for name in (*_OF_EACH, *_SHARED_BY_TWO, "residual", "residual_steps", "y", "s")}
    values |= {"x": a["x"], "x_steps": a["x_steps"], "w": a["w"], "rstd": a["rstd"], "w2": b["w"], "rstd2": b["rstd"]}
    merged = _with_one_launch(plan, kernels.forward_sandwich, second.grid[0], values)
    return replace(merged, fresh=tuple(t for t in plan.fresh if t.name != h))


def _launches_of_whole_rows(plan: Plan) -> list[tuple[TritonLaunch, dict[str, Any]]] | None:
    """The two launches of a plan, each with its arguments by name; None if not each holds whole rows of whole words."""
    found = []
    for launch in plan.launches:
        assert isinstance(launch, TritonLaunch)
        named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))
        whole_words = named.get("WORD") == named.get("PARTS") == 1
        if launch.kernel is not kernels.forward_block or named["V"] is not None or not whole_words:
            return None
        found.append((launch, named))
    return found if len(found) == 2 else None  # none if there are no rows


def _with_one_launch(plan: Plan, kernel: Any, programs: int, values: Mapping[str, Any]) -> Plan:
    """The plan with one launch in place of its two."""
    first, second = plan.launches
    assert isinstance(first, TritonLaunch)
    assert isinstance(second, TritonLaunch)
    merged = replace(
        first,
        kernel=kernel,
        grid=(programs,),
        warps=max(first.warps, second.warps),
        arguments=tuple(values[name] for name in kernel.arg_names),
        aligned=first.aligned and second.aligned,
    )
    return replace(plan, launches=(merged,))


@functools.lru_cache(MOST_PLANS)
def plan_backward(kind: Backward) -> Plan:
    """Plans a call that computes dx and dw as `reference.backward` does.

    dw is the fp64 sum of fp32 partial sums, each over at most `tiling.LONGEST_SUM` numbers.
    """
    x, w, spec, need_dx = kind.x, kind.w, kind.spec, kind.need_dx
    with_ds, of_dw = need_dx and kind.ds is not None, w.dtype if kind.need_dw and w is not None else None
    y_dtype = y_dtype_of(x.dtype, w, spec.cast)
    dys, before = gradients(kind, y_dtype)
    fresh: list[Fresh] = []
    first: list[TritonLaunch] = []
    if len(dys) > 1 and need_dx and tiling.backward_is_wide(x.shape[-1], x.dtype.itemsize):
        dys, first = _sum_first(dys, y_dtype, index_of(kind.device), before, fresh)
    wanted = {name: (of, y_dtype) for name, of in dys.items()} | {"x": (x, x.dtype)}
    if kind.ds is not None and with_ds:
        wanted["ds"] = kind.ds, x.dtype
    rows, kinds, converted = find_layout(walk, wanted)
    before += converted
    M, N, device, gpu = rows.M, rows.N, index_of(kind.device), gpu_at(index_of(kind.device))
    of_x, of_dy = x.dtype.itemsize, y_dtype.itemsize
    wide, whole = tiling.BACKWARD_WIDEST[of_x] < N, spec.variance_size is None
    aligned = wide and whole and _can_be_staged(rows, kinds, x.dtype)
    kinds["rstd"] = dense("rstd", kind.rstd, before)  # only hooks on saved tensors can make a copy necessary
    if w is not None:
        kinds["w"] = dense("w", w, before)
    if need_dx:
        fresh.append(Fresh("dx", x.dtype, tuple(x.shape)))
    calls = Calls(device, rows, kinds, fresh, x.dtype)
    early, heads = spec.cast != "late", heads_of(w)
    reads = _reads(dict(zip(wanted, rows.steps, strict=True)))
    sums: Launch | None = None  # the launch whose programs compute partial sums of dw
    if need_dx:
        itemsize = 0 if of_dw is None else of_dw.itemsize
        config = tiling.backward(
            M, N, of_x, of_dy, itemsize, with_ds, aligned, gpu, len(dys), kind.round_first, heads
        )  # fmt: skip
        sums = config if of_dw is not None and config.parts > 0 else None
        if sums is not None:
            fresh.append(Fresh("partials", torch.float32, (sums.programs, N)))
        whole_rows = staged.backward_staged if config.staged else kernels.backward_block
        calls.add(
            kernels.backward_loop if config.parts == 0 else whole_rows,
            M if config.parts == 0 else config.programs * config.parts, config, calls.exchange(config, gpu),
            **reads, ds="ds" if with_ds else None, w=None if w is None else "w", rstd="rstd", dx="dx",
            partials=None if sums is None else "partials", shares="shares", programs=config.programs,
            ds_steps=rows.steps[-1], offset=offset_of(spec.offset), V=spec.variance_size, EARLY=early,
            ROUND_FIRST=kind.rounds_dx_first,
        )  # fmt: skip
    if of_dw is not None and w is not None:
        if sums is None:
            sums = tiling.dw_alone(M, N, len(dys) * of_dy + of_x, of_dw.itemsize, gpu, heads)
            parts = cdiv(N, sums.block_n)
            fresh.append(Fresh("partials", torch.float32, (sums.programs, N)))
            calls.add(
                kernels.dw_alone, sums.programs * parts, sums, False, **reads, rstd="rstd", partials="partials",
                parts=parts, programs=sums.programs, EARLY=early,
            )  # fmt: skip
        # The shares of a program for each head, one after the other, are like those of one program for a wider row.
        programs, columns = sums.programs // heads, heads * N
        config = tiling.sum_partials(programs, columns, gpu)
        fresh.append(Fresh("dw", of_dw, tuple(w.shape)))
        calls.add(
            kernels.sum_partials, cdiv(columns, config.block_n), config, programs > 0, partials="partials", dw="dw",
            programs=programs, N=columns,
        )  # fmt: skip
    return Plan(
        kind.device,
        inputs=kind.inputs,
        before=tuple(before),
        fresh=tuple(fresh),
        launches=(*first, *calls.launches),
        outputs=("dx" if need_dx else None, None if of_dw is None else "dw"),
    )


def _reads(steps: Mapping[str, tuple[int, int, int]]) -> dict[str, Any]:
    """The arguments for x and the gradients of y, from the steps of each; None for an absent gradient and its steps."""
    names = {"dy": _SUMMED if _SUMMED in steps else "dy", "dy2": "dy2", "dy3": "dy3", "x": "x"}
    return names | {f"{argument}_steps": steps.get(name) for argument, name in names.items()}


def _sum_first(
    dys: dict[str, TensorKind], dtype: torch.dtype, device: int, before: list[Converted], fresh: list[Fresh]
) -> tuple[dict[str, TensorKind], list[TritonLaunch]]:
    """A launch that adds several gradients of y for kernels that take only one; extends `before` and `fresh`.

    Returns the sum, by name, which replaces the gradients, and the launch; no launch if there are no rows.
    """
    rows, kinds, converted = find_layout(walk, {name: (kind, dtype) for name, kind in dys.items()})
    before += converted
    summed = Fresh(_SUMMED, dtype, tuple(dys["dy"].shape))
    fresh.append(summed)
    calls, config = Calls(device, rows, kinds, fresh, dtype), tiling.sum_gradients(rows.N)
    reads = _reads(dict(zip(dys, rows.steps, strict=True)))
    calls.add(kernels.sum_gradients, rows.M * config.parts, config, False, **reads, summed=_SUMMED)
    return {_SUMMED: TensorKind.dense(summed.shape, dtype)}, calls.launches


class Calls:
    """Collects the launches of a plan."""

    def __init__(
        self, device: int, rows: Walk, kinds: Mapping[str, TensorKind], fresh: list[Fresh], dtype: torch.dtype
    ) -> None:
        """Starts with no launches.

        Args:
            device: the index of the GPU.
            rows: where rows begin.
            kinds: the inputs as the kernels read them.
            fresh: the plan's fresh tensors; `exchange` adds to them.
            dtype: that of x, which is at most as wide as those of the other tensors of M rows.
        """
        self.launches: list[TritonLaunch] = []
        self._device, self._rows, self._kinds, self._fresh = device, rows, kinds, fresh
        self._word = tiling.WORD[dtype.itemsize]
        steps = _steps(rows)
        # Triton itself tells the compiler which integers 16 divides.
        known = all(step % 16 == 0 for step in steps) or any(step % self._word for step in steps)
        self._multiple = 1 if known else self._word
        self._can_be_shifted = not rows.strided and set(steps) == {rows.N} and _are_aligned(kinds)

    def add(self, kernel: Any, grid: int, config: Launch, after: bool, /, **named: Any) -> None:
        """Adds a launch of `grid` programs, if there are any.

        after: whether it depends on the launch before and may start before that one has ended. named: values for the
        kernel's arguments (others are ignored); for a tensor its name, or None.
        """
        if grid == 0:
            return
        rows = self._rows
        word = self._word if config.apart > 1 and config.heads == 1 and self._can_be_shifted else 1
        values = (config if word > 1 else config.for_any_strides(rows.N)).constants | {
            "M": rows.M, "N": rows.N, "parts": config.parts, "sizes": rows.sizes, "STRIDED": rows.strided,
            # One for each lane of a warp: with fewer, every value is held several times, in a third more registers.
            "PARTS": 1 if config.parts == 1 else tiling.MOST_PARTS,
            "MULTIPLE": self._multiple, "WORD": word,
        } | named  # fmt: skip
        arguments = tuple(self._argument(values[name]) for name in kernel.arg_names)
        given = [self._kinds.get(a.tensor) for a in arguments if isinstance(a, Slot)]
        aligned = all(kind is None or kind.alignment == 16 for kind in given)
        early = after and config.overlap
        self.launches.append(TritonLaunch(kernel, (grid,), config.warps, arguments, early, aligned, self._device))

    def exchange(self, config: Launch, gpu: Gpu) -> bool:
        """If programs share rows, adds the memory for their exchange of sums and a launch that initializes it.

        Returns whether that launch was added.
        """
        size = self._rows.M * config.parts
        if config.parts <= 1:
            return False
        self._fresh.append(Fresh("shares", torch.int64, (size,)))
        config = tiling.no_shares_yet(gpu)
        self.add(kernels.no_shares_yet, cdiv(size, config.block_n), config, False, shares="shares", size=size)
        return size > 0

    def _argument(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        kind = self._kinds.get(value) or next((t for t in self._fresh if t.name == value), None)
        return None if kind is None else Slot(value, kind.dtype)  # there is no tensor `shares` if no sums are exchanged


def index_of(device: torch.device) -> int:
    """The index of a GPU; -1 for Triton's interpreter, whose tensors are on the CPU."""
    return -1 if device.index is None or device.type != "cuda" else device.index


@functools.cache
def gpu_at(device: int) -> Gpu:
    """The properties of the GPU with this index; for the interpreter, of a typical GPU older than Hopper."""
    if device < 0:
        return Gpu(capability=8)
    found = torch.cuda.get_device_properties(device)
    shared_memory = int(found.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    return Gpu(shared_memory, found.multi_processor_count, found.major)


def y_dtype_of(x: torch.dtype, w: TensorKind | None, cast: str) -> torch.dtype:
    return result_dtype(x, None if w is None else w.dtype, cast)


def offset_of(offset: float) -> float:
    return float(offset) or -0.0


def _can_be_staged(rows: Walk, kinds: Mapping[str, TensorKind], dtype: torch.dtype) -> bool:
    """Whether the staged kernels can take rows of x of this dtype: there is Gluon, and its 16-byte copies fit them."""
    return (
        staged is not None
        and all(step % tiling.WORD[dtype.itemsize] == 0 for step in _steps(rows))
        and _are_aligned(kinds)
    )


def _steps(rows: Walk) -> list[int]:
    """N and the strides that the kernels multiply row numbers with."""
    return [rows.N, *(step for of_tensor in rows.steps for step in (of_tensor if rows.strided else of_tensor[2:]))]


def _are_aligned(kinds: Mapping[str, TensorKind]) -> bool:
    return all(kind.alignment == 16 for kind in kinds.values())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
