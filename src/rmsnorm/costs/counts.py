"""What a norm costs, as exact integers, and what each of them is made of.

The count follows the code that runs, operator by operator, on a `_Tape`: every line that appends to it is one term, and
its arguments are the derivation. M rows of N columns, E = M·N elements; x, w, y, dy, dx, dw as everywhere.

Conventions. FLOPs: an addition, multiplication, division or (reciprocal) square root of one element is 1; a power k is
k − 1; the sum of n numbers is n − 1; a cast, a copy, a view, and an operation that leaves every number alone (× 1,
+ 0) are 0. Bytes: a kernel reads each tensor that it is given once and writes each that it makes once, whatever a cache
may save or a second pass may cost; what is expanded counts as what is stored. Kernels: on a CPU the operators that
touch memory (our own: their compiled loops); on CUDA what is put on the stream, copies and fills included, but not the
memsets by which a reduction prepares itself. Bytes are plain bytes everywhere; MB is 10⁶ of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from rmsnorm.errors import complaint
from rmsnorm.kernels import launch
from rmsnorm.kernels.launch import Launch
from rmsnorm.spec import Cast, check_spec

Implementation = Literal["ours", "ours+residual", "eager", "F.rms_norm", "LayerNorm"]
Phase = Literal["inference", "forward", "backward"]

IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
PHASES: tuple[Phase, ...] = get_args(Phase)
# The version whose operators were traced: what PyTorch's own norms decompose into is its internals, and may change.
TRACED_TORCH = "2.13.0"
# Devices whose numbers a trace of the running code has confirmed; those of others are derived.
_CONFIRMED = ("cpu",)

F32 = torch.float32
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Term:
    """One operator: the FLOPs it does, the bytes it reads and writes, the kernels it is."""

    what: str
    flops: int
    read: int
    written: int
    kernels: int


@dataclass(frozen=True)
class Cost:
    """Exact counts of one phase of one norm; bytes unless the name says otherwise.

    saved: kept for the backward pass, the input included where it is kept, the weights not. peak: the most that is
    allocated at once beside x, residual, weight and the cotangents; in the backward phase what the forward left (y,
    and what it saved) counts, and y is held. least: what no implementation can avoid moving. parameters, gradients,
    optimizer: of the weight (and LayerNorm's bias), with AdamW's state. derived: not confirmed by a trace.
    """

    flops: int
    read: int
    written: int
    kernels: int
    saved: int
    peak: int
    least: int
    parameters: int
    gradients: int
    optimizer: int
    derived: bool
    terms: tuple[Term, ...]

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def cost(
    shape: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    *,
    implementation: Implementation = "ours",
    phase: Phase = "inference",
    device: str = "cpu",
    cast: Cast = "early",
    offset: float = 0.0,
    elementwise_affine: bool = True,
    master: bool = False,
    threads: int | None = None,
) -> Cost:
    """What one norm of x (..., N) costs.

    shape, dtype: of x; weight_dtype: of the weight, by default x's. Each float32, bfloat16 or float16.
    implementation: "ours"; "ours+residual", which also adds; "eager", the published class in plain torch ("early" is
    the Definition; "late" the order of the pseudo-code, which multiplies before it casts; with an offset Gemma's);
    "F.rms_norm" (operator by operator on a CPU, fused on CUDA); "LayerNorm" (nn.LayerNorm with its bias). The last
    two have no spec: cast and offset say nothing about them.
    phase: "inference" (no_grad), "forward" (autograd records), "backward" (of x, the weight, and the residual).
    master: AdamW keeps an fp32 copy of 16-bit weights. threads: a CPU's, by default torch's; LayerNorm's backward
    allocates by it.

    No rows cost nothing. Raises TypeError or ValueError, naming the argument, for what makes no sense.
    """
    case = _checked(shape, dtype, weight_dtype, implementation, phase, device, cast, offset, elementwise_affine)
    if threads is not None and threads < 1:
        raise ValueError(complaint("cost", "threads", f"is {threads}", "at least 1"))
    parameters = case.N * case.w.itemsize * (2 if implementation == "LayerNorm" else 1) if case.w is not None else 0
    tape = _Tape(case.cpu)
    saved = _FORWARD[implementation](tape, case) if case.M else 0
    if phase == "backward":
        alive = tape.alive
        tape = _Tape(case.cpu)
        tape.alive = tape.peak = alive
        if case.M:
            _BACKWARD[implementation](tape, case, threads or torch.get_num_threads())
    return Cost(
        flops=sum(t.flops for t in tape.terms),
        read=sum(t.read for t in tape.terms),
        written=sum(t.written for t in tape.terms),
        kernels=sum(t.kernels for t in tape.terms),
        saved=0 if phase == "inference" else saved,
        peak=tape.peak,
        least=_least(case),
        parameters=parameters,
        gradients=parameters,
        optimizer=_adamw(case, parameters, master),
        derived=device not in _CONFIRMED,
        terms=tuple(tape.terms),
    )


@dataclass(frozen=True)
class _Case:
    M: int
    N: int
    x: torch.dtype
    w: torch.dtype | None
    implementation: str
    phase: str
    device: str
    cast: str
    offset: float
    row: bool = False  # x has the weight's shape, so that autograd has no rows to sum over

    @property
    def E(self) -> int:
        return self.M * self.N

    @property
    def cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def training(self) -> bool:
        return self.phase != "inference"

    @property
    def adds(self) -> bool:
        return self.implementation == "ours+residual"

    @property
    def y(self) -> torch.dtype:
        """Ours and eager promote where they cast early; PyTorch's own return x's dtype."""
        if self.w is None or self.cast == "late" or self.implementation in ("F.rms_norm", "LayerNorm"):
            return self.x
        return torch.promote_types(self.x, self.w)


def _checked(
    shape: Sequence[int], x: torch.dtype, w: torch.dtype | None, implementation: str, phase: str, device: str,
    cast: str, offset: float, affine: bool,
) -> _Case:  # fmt: skip
    check_spec("cost", 0.0, cast, offset)
    if not isinstance(shape, Sequence) or any(isinstance(size, bool) or not isinstance(size, int) for size in shape):
        raise TypeError(complaint("cost", "shape", f"is {shape!r}", "a sequence of integers"))
    sizes = tuple(shape)
    if not sizes or min(sizes) < 0 or sizes[-1] == 0:
        raise ValueError(complaint("cost", "shape", f"is {sizes}", "(..., N) with N of at least 1, nothing negative"))
    for name, value, known in (
        ("implementation", implementation, IMPLEMENTATIONS),
        ("phase", phase, PHASES),
        ("device", device, ("cpu", "cuda")),
    ):
        if value not in known:
            raise ValueError(complaint("cost", name, f"is {value!r}", " or ".join(map(repr, known))))
    w = x if w is None else w
    for name, dtype in (("dtype", x), ("weight_dtype", w)):
        if dtype not in _DTYPES:
            raise TypeError(complaint("cost", name, f"is {dtype}", "float32, bfloat16 or float16"))
    if not affine and offset:
        raise ValueError(complaint("cost", "elementwise_affine", "is False with an offset", "True"))
    if implementation == "LayerNorm" and affine and w != x and (device == "cuda" or w != F32):
        wanted = "dtype" if device == "cuda" else "dtype or float32"
        was = f"is {w} for {x} on {device}"
        raise ValueError(complaint("cost", "weight_dtype", was, f"{wanted}: LayerNorm refuses others"))
    M, N, w = math.prod(sizes[:-1]), sizes[-1], w if affine else None
    return _Case(M, N, x, w, implementation, phase, device, cast, offset, row=len(sizes) == 1)


def _least(c: _Case) -> int:
    """Every argument once and every result once; of a statistic, 4 bytes a row where there is a backward pass."""
    rows, weight = c.E * c.x.itemsize, 0 if c.w is None or not c.M else c.N * c.w.itemsize
    y, rstd = c.E * c.y.itemsize, 4 * c.M if c.training else 0
    if c.phase != "backward":
        return rows + weight + y + rstd + (2 * rows if c.adds else 0)  # + residual, s
    return y + rows + weight + rstd + rows + weight + (rows if c.adds else 0)  # dy, x, w, rstd; dx, dw; + ds


def _adamw(c: _Case, parameters: int, master: bool) -> int:
    """Two moments in the dtype of what is stepped, and 4 bytes a tensor that count the steps."""
    if c.w is None:
        return 0
    tensors = 2 if c.implementation == "LayerNorm" else 1
    if master and c.w != F32:
        return tensors * (3 * 4 * c.N + 4)
    return 2 * parameters + 4 * tensors


# --- the tape ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Array:
    """Memory: elements stored, their dtype, and whether the tape allocated it (x and the like come from outside)."""

    numel: int
    dtype: torch.dtype
    ours: bool = True

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class _Tape:
    """The operators in the order in which they run, and what is alive between them."""

    def __init__(self, cpu: bool) -> None:
        self.cpu = cpu
        self.terms: list[Term] = []
        self.alive = self.peak = 0

    def new(self, numel: int, dtype: torch.dtype) -> _Array:
        array = _Array(numel, dtype)
        self.alive += array.nbytes
        self.peak = max(self.peak, self.alive)
        return array

    def free(self, *arrays: _Array | None) -> None:
        for array in arrays:
            if array is not None and array.ours:
                assert array.nbytes <= self.alive
                self.alive -= array.nbytes
                array.ours = False

    def run(
        self, what: str, flops: int, inputs: Sequence[_Array | None], outputs: Sequence[_Array | None], kernels: int = 1
    ) -> None:
        """A kernel over memory that is there already."""
        read, written = (sum(a.nbytes for a in arrays if a is not None) for arrays in (inputs, outputs))
        self.terms.append(Term(what, flops, read, written, kernels))

    def op(self, what: str, flops: int, numel: int, *inputs: _Array, scalar: bool = False) -> _Array:
        """An aten operator that computes in the promoted dtype of its inputs.

        On a CPU it first casts the inputs that have another, and makes tensors of a Python number: 8 bytes, and 4.
        """
        dtype = inputs[0].dtype
        for a in inputs:
            dtype = torch.promote_types(dtype, a.dtype)
        scratch: list[_Array] = []
        if self.cpu:
            scratch = [self.new(a.numel, dtype) for a in inputs if a.dtype != dtype]
            if scalar:
                scratch += [self.new(1, torch.float64), self.new(1, F32)]
        out = self.new(numel, dtype)
        self.run(what, flops, inputs, [out])
        self.free(*scratch)
        return out

    def cast(self, a: _Array, dtype: torch.dtype) -> _Array:
        """The array itself where it has the dtype."""
        if a.dtype == dtype:
            return a
        out = self.new(a.numel, dtype)
        self.run(f"cast to {str(dtype).removeprefix('torch.')}", 0, [a], [out])
        return out


def _given(numel: int, dtype: torch.dtype) -> _Array:
    return _Array(numel, dtype, ours=False)


def _weight(c: _Case) -> _Array | None:
    return None if c.w is None else _given(c.N, c.w)


# --- plain torch ---------------------------------------------------------------------------------------------


def _eager_forward(t: _Tape, c: _Case) -> int:
    """The published classes' lines in their order; an array is freed where Python drops its last name."""
    M, N, E = c.M, c.N, c.E
    x, w = _given(E, c.x), _weight(c)
    h = t.cast(x, F32)
    squares = t.op("x²", E, E, h)
    variance = t.op("mean", E, M, squares, scalar=True)  # N − 1 additions and a division a row
    t.free(squares)
    shifted = t.op("+ eps", M, M, variance, scalar=True)
    if c.offset:
        t.free(variance)  # which has a name in the other classes
    rstd = t.op("rsqrt", M, M, shifted)
    t.free(shifted)
    normed = t.op("× rstd", E, E, h, rstd)
    if not c.training:
        t.free(rstd, h)
    saved: list[_Array] = [h, rstd]
    if w is None:
        y = t.cast(normed, c.x)
        if y is not normed:
            t.free(normed)
    elif c.cast == "early":
        cast = t.cast(normed, c.x)
        y = t.op("× weight", E, E, w, cast)
        if c.training:
            saved.append(cast)
        else:
            t.free(cast)
        if cast is not normed:
            t.free(normed)
    else:
        scale = w
        if c.offset:
            w32 = t.cast(w, F32)
            scale = t.op("1 + weight", N, N, w32, scalar=True)
            t.free(w32)
        product = t.op("× weight", E, E, scale, normed)
        if c.training:
            saved += [normed] if scale is w else [normed, scale]
        elif scale is not w:
            t.free(scale)
        if not c.training and c.offset:
            t.free(normed)  # its name is taken by the product
        y = t.cast(product, c.x)
        if y is not product:
            t.free(product)
        if not c.training:
            t.free(normed)
    t.free(variance)
    return sum(a.nbytes for a in saved)


def _eager_backward(t: _Tape, c: _Case, threads: int) -> None:
    """Autograd's nodes in the order in which its engine runs them; a node frees what it saved when it is done."""
    E = c.E
    dy, w = _given(E, c.y), _weight(c)
    x32, rstd = _Array(E, F32, ours=c.x != F32), _Array(c.M, F32)
    if w is None:
        g = t.cast(dy, F32)
    elif c.cast == "early":
        h = _Array(E, c.x)
        g = t.op("dy · w", E, E, dy, w)
        _dw(t, c, dy, h, c.w)
        g = _recast(t, g, c.x)
        t.free(h)
        g = _recast(t, g, F32)
    else:
        g, _ = _late_products(t, c, t.cast(dy, F32), w)
    _statistic_backward(t, c, g, x32, rstd)


def _late_products(t: _Tape, c: _Case, g32: _Array, w: _Array) -> tuple[_Array, _Array]:
    """The product with the weight in fp32, taken back."""
    normed = _Array(c.E, F32)
    scale = _Array(c.N, F32) if c.offset else w
    g = t.op("dy · w", c.E, c.E, g32, scale)
    dw = _dw(t, c, g32, normed, F32 if c.offset else c.w)
    t.free(normed, g32)
    if c.offset:
        t.free(scale)
        dw = _recast(t, dw, w.dtype)
    return g, dw


def _dw(t: _Tape, c: _Case, dy: _Array, h: _Array, dtype: torch.dtype | None) -> _Array:
    dw = t.op("dy · h", c.E, c.E, dy, h)
    if not c.row:
        product, dw = dw, t.op("Σ over rows", c.E - c.N, c.N, dw)
        t.free(product)
    return dw if dtype is None else _recast(t, dw, dtype)


def _recast(t: _Tape, a: _Array, dtype: torch.dtype) -> _Array:
    out = t.cast(a, dtype)
    if out is not a:
        t.free(a)
    return out


def _statistic_backward(t: _Tape, c: _Case, g: _Array, x32: _Array, rstd: _Array) -> None:
    """From the gradient of x·rstd to dx: the direct part, the part through the statistic, and their sum."""
    M, N, E = c.M, c.N, c.E
    products = t.op("g · x", E, E, g, x32)
    direct = t.op("g · rstd", E, E, g, rstd)
    d_rstd = products
    if N > 1:
        d_rstd = t.op("Σ over columns", E - M, M, products)
        t.free(products)
    t.free(g)
    cube = t.op("rstd³", 2 * M, M, rstd)
    half = t.op("× −1/2", M, M, cube, scalar=True)
    d_variance = t.op("· d rstd", M, M, half, d_rstd)
    t.free(half, cube, d_rstd, rstd)
    spread = t.op("/ N, for every column", E if N > 1 else 0, E, d_variance, scalar=True)
    t.free(d_variance)
    power = t.op("x¹", 0, E, x32)
    double = t.op("× 2", E, E, power, scalar=True)
    through = t.op("· d square", E, E, double, spread)
    t.free(double, power, spread)
    t.run("+", E, [direct, through], [direct])  # in place
    t.free(through, x32)
    _recast(t, direct, c.x)


def _decomposed_forward(t: _Tape, c: _Case) -> int:
    """F.rms_norm where it is no one kernel: everything in fp32, one cast at the end."""
    M, E = c.M, c.E
    x, w = _given(E, c.x), _weight(c)
    h = t.cast(x, F32)
    squares = t.op("x²", E, E, h)
    variance = t.op("mean", E, M, squares, scalar=True)
    scratch = [t.new(1, torch.float64), t.new(1, F32)] if t.cpu else []
    t.run("+ eps", M, [variance], [variance])  # in place
    t.free(*scratch)
    rstd = t.op("rsqrt", M, M, variance)
    t.free(variance, squares)
    normed = t.op("× rstd", E, E, h, rstd)
    product = normed if w is None else t.op("× weight", E, E, normed, w)
    saved = [h, rstd] if w is None else [h, rstd, normed]
    if not c.training:
        if product is not normed:
            t.free(normed)
        t.free(h)
    y = t.cast(product, c.x)
    if y is not product:
        t.free(product)
    if not c.training:
        t.free(rstd)
    return sum(a.nbytes for a in saved)


def _decomposed_backward(t: _Tape, c: _Case, threads: int) -> None:
    x32, rstd, w = _Array(c.E, F32, ours=c.x != F32), _Array(c.M, F32), _weight(c)
    g = t.cast(_given(c.E, c.x), F32)
    if w is not None:
        g, _ = _late_products(t, c, g, w)
    _statistic_backward(t, c, g, x32, rstd)


# --- PyTorch's fused norms -----------------------------------------------------------------------------------


# For CUDA as in aten/native/cuda/layer_norm_kernel.cu, which serves both norms.
_VECTOR = 4  # columns; with another number of them statistics and result are two kernels
_MANY_ROWS, _ROWS_A_BLOCK, _COLUMNS_A_BLOCK, _MOST_BLOCKS = 1 << 16, 32, 32, 1 << 15
_MULTIPROCESSORS = 132  # of an H100 or H200


def _torch_rms_forward(t: _Tape, c: _Case) -> int:
    if c.cpu or c.w not in (None, c.x):  # with another dtype of the weight it is not fused on CUDA either
        return _decomposed_forward(t, c)
    x, y, rstd = _given(c.E, c.x), t.new(c.E, c.x), t.new(c.M, F32)
    _fused_forward(t, c, 2 * c.E + 2 * c.M, (1 if c.w is None else 2) * c.E, [x], [rstd], [_weight(c)], y)
    if not c.training:
        t.free(rstd)
    return x.nbytes + rstd.nbytes


def _torch_rms_backward(t: _Tape, c: _Case, threads: int) -> None:
    """xh E; g = dy · w E; mean(g · xh) 2E; rstd · (g − xh · c) 3E; dw = Σ dy · xh 2E − N.

    Without a weight: no g, dw.
    """
    if c.cpu or c.w not in (None, c.x):
        return _decomposed_backward(t, c, threads)
    dy, x, rstd, w = _given(c.E, c.x), _given(c.E, c.x), _Array(c.M, F32), _weight(c)
    dx, dw = t.new(c.E, c.x), None if w is None else t.new(c.N, w.dtype)
    t.run("dx", (6 if w is None else 7) * c.E, [dy, x, rstd, w], [dx])
    if dw is not None:
        _fused_dw(t, c, 2 * c.E - c.N, [dy, x, rstd], [dw])
    t.free(rstd)


def _layer_norm_forward(t: _Tape, c: _Case) -> int:
    """mean E, x − mean E, squares E, their mean E, + eps M, rsqrt M; × rstd E, × weight E, + bias E."""
    x, w = _given(c.E, c.x), _weight(c)
    y = t.new(c.E, c.x)
    mean, rstd = (t.new(c.M, _layer_norm_statistic(c)) for _ in range(2))
    _fused_forward(t, c, 4 * c.E + 2 * c.M, (1 if w is None else 3) * c.E, [x], [mean, rstd], [w, w], y)
    if not c.training:
        t.free(mean, rstd)
    return x.nbytes + mean.nbytes + rstd.nbytes


def _layer_norm_backward(t: _Tape, c: _Case, threads: int) -> None:
    """xh = (x − mean) · rstd 2E; g = dy · w E; mean(g) E; mean(g · xh) 2E; rstd · (g − c1 − xh · c2) 4E;
    dw = Σ dy · xh 2E − N; db = Σ dy E − N. Without a weight: no g, dw, db."""
    statistic = _layer_norm_statistic(c)
    dy, x, w = _given(c.E, c.x), _given(c.E, c.x), _weight(c)
    mean, rstd = _Array(c.M, statistic), _Array(c.M, statistic)
    dx = t.new(c.E, c.x)
    dw, db = (None if w is None else t.new(c.N, w.dtype) for _ in range(2))
    flops, sums = (9 if w is None else 10) * c.E, 0 if w is None else 3 * c.E - 2 * c.N
    if c.cpu:
        scratch = t.new(2 * threads * c.N, c.x) if w is not None else None
        t.run("fused backward", flops + sums, [dy, x, mean, rstd, w, w], [dx, dw, db])
        t.free(scratch)
    else:
        t.run("dx", flops, [dy, x, mean, rstd, w], [dx])
        if dw is not None and db is not None:
            _fused_dw(t, c, sums, [dy, x, mean, rstd], [dw, db])
    t.free(mean, rstd)


def _fused_forward(
    t: _Tape, c: _Case, statistics: int, rest: int, x: list[_Array], made: list[_Array], weights: list[_Array | None],
    y: _Array,
) -> None:  # fmt: skip
    if c.cpu or c.N % _VECTOR == 0:
        t.run("fused forward", statistics + rest, [*x, *weights], [y, *made])
    else:
        t.run("statistics", statistics, x, made)
        t.run("y", rest, [*x, *made, *weights], [y])


def _fused_dw(t: _Tape, c: _Case, flops: int, inputs: list[_Array], outputs: list[_Array]) -> None:
    """Over many rows of few columns: partial sums first, in the weight's dtype, and a sum of those into new memory."""
    if c.M <= _MANY_ROWS or c.N // _COLUMNS_A_BLOCK >= _MULTIPROCESSORS // 2:
        t.run("sums over rows", flops, inputs, outputs)
        return
    blocks = min(_MOST_BLOCKS // -(-c.N // _COLUMNS_A_BLOCK), -(-c.M // _ROWS_A_BLOCK))
    partials = [t.new(blocks * c.N, out.dtype) for out in outputs]
    t.run("sums over blocks of rows", flops, inputs, partials)
    for part, out in zip(partials, outputs, strict=True):
        t.op("Σ over blocks", 0, c.N, part)
        t.free(out)
    t.free(*partials)


def _layer_norm_statistic(c: _Case) -> torch.dtype:
    """Mean and rstd are fp32 on CUDA; on a CPU x's dtype, or the weight's where it is another."""
    return F32 if not c.cpu else c.x if c.w is None else c.w


# --- ours ----------------------------------------------------------------------------------------------------


def _forward_flops(c: _Case) -> int:
    """x² E, their sum E − M, / N M, + eps M, sqrt M, 1 / M, × rstd E, × weight E; + residual E, + offset N."""
    return 3 * c.E + 3 * c.M + (c.w is not None) * c.E + c.adds * c.E + int(c.offset) * c.N


def _backward_flops(c: _Case, need_dx: bool = True, need_dw: bool = True, adds: bool = False) -> int:
    """xh = x · rstd E; dx: g = dy · w E, g · xh E, its sum E − M, / N M, xh · c E, g − E, rstd · E, + ds E;
    dw: dy · xh E, its sum E − N."""
    flops = c.E
    if need_dx:
        flops += 5 * c.E + adds * c.E + (c.w is not None) * c.E + int(c.offset) * c.N
    if need_dw and c.w is not None:
        flops += 2 * c.E - c.N
    return flops


def _our_forward(t: _Tape, c: _Case) -> int:
    x, residual = _given(c.E, c.x), _given(c.E, c.x) if c.adds else None
    s = t.new(c.E, c.x) if c.adds else None
    w, scratch = _readable(t, c)
    y = t.new(c.E, c.y)
    rstd = t.new(c.M, F32) if c.training else None
    shares = None if c.cpu else _shares(t, c, _forward_launch(c))
    t.run("forward", _forward_flops(c), [x, residual, w, shares], [y, s, rstd, shares])
    t.free(scratch, shares)
    return x.nbytes + (0 if rstd is None else rstd.nbytes)


def _our_backward(t: _Tape, c: _Case, threads: int) -> None:
    dy, ds, x = _given(c.E, c.y), _given(c.E, c.x) if c.adds else None, _given(c.E, c.x)
    rstd = _Array(c.M, F32)
    w, scratch = _readable(t, c)
    dx = t.new(c.E, c.x)
    flops, inputs = _backward_flops(c, adds=c.adds), [dy, ds, x, w, rstd]
    if c.cpu:
        partials = t.new(_cpu_chunks(c) * c.N, torch.float64) if c.w is not None else None
        t.run("backward", flops, inputs, [dx, partials])
        if partials is not None and w is not None:
            dw = t.new(c.N, w.dtype)
            t.run("Σ over chunks", 0, [partials], [dw])
            _recast(t, dw, c.w or F32)
            t.free(partials)
    else:
        _our_backward_cuda(t, c, flops, inputs, dx)
    t.free(scratch, rstd)


def _our_backward_cuda(t: _Tape, c: _Case, flops: int, inputs: list[_Array | None], dx: _Array) -> None:
    """A program sums its share of dw; where it walks over a row in pieces, a kernel of its own does."""
    dy, _, x, _, rstd = inputs
    config, alone = _backward_launch(c), _dw_launch(c)
    shares = _shares(t, c, config)
    partials = None if c.w is None else t.new((alone or config).programs * c.N, F32)
    if alone is not None:
        dw_flops = 2 * c.E - c.N
        t.run("dx", flops - dw_flops, [*inputs, shares], [dx, shares])
        t.run("dw, by programs", dw_flops, [dy, x, rstd], [partials])
    else:
        what = "dx" if partials is None else "dx, and dw by programs"
        t.run(what, flops, [*inputs, shares], [dx, partials, shares])
    if c.w is not None:
        t.run("Σ over programs", 0, [partials], [t.new(c.N, c.w)])
    t.free(partials, shares)


# What is read off a launch: how many programs share a row, and how many hold a share of dw. These are the same on every
# GPU with `launch.ROOM` for the programs that share a row; how many share it is as on an H200.
_GPU = launch.Gpu(227 << 10)


def _forward_launch(c: _Case) -> Launch:
    return launch.forward(c.N, c.x.itemsize, c.adds, launch.ADD_WIDEST < c.N and c.N % 16 == 0, _GPU)


def _backward_launch(c: _Case) -> Launch:
    aligned = launch.BACKWARD_WIDEST[c.x.itemsize] < c.N and c.N % 16 == 0
    dw_itemsize = 0 if c.w is None else c.w.itemsize
    return launch.backward(c.M, c.N, c.x.itemsize, c.y.itemsize, dw_itemsize, c.adds, aligned, _GPU)


def _dw_launch(c: _Case) -> Launch | None:
    """Of the kernel that sums dw alone; None where the other one does it, or nothing is to be summed."""
    if c.w is None or _backward_launch(c).parts > 0:
        return None
    return launch.dw_alone(c.M, c.N, c.y.itemsize + c.x.itemsize, c.w.itemsize, _GPU)


def _shares(t: _Tape, c: _Case, config: Launch) -> _Array | None:
    """Where the programs that share a row exchange their sums: 8 bytes a program and row, filled before."""
    if config.parts < 2:
        return None
    shares = t.new(c.M * config.parts, torch.int64)
    t.run("fill", 0, [], [shares])
    return shares


def _readable(t: _Tape, c: _Case) -> tuple[_Array | None, _Array | None]:
    """The weight as the kernels read it, and what had to be made for that: the CPU's read x's dtype or fp32."""
    w = _weight(c)
    if not t.cpu:
        return w, None
    if w is None:
        ones = t.new(c.N, c.x)
        t.run("ones", 0, [], [ones])
        return ones, ones
    read = w if c.w == c.x else t.cast(w, F32)
    return read, None if read is w else read


def _cpu_chunks(c: _Case) -> int:
    """Of how many chunks of rows the CPU kernels sum dw; see `kernels/cpu.py`."""
    rows = max(32, -(-(1 << 16) // c.N), -(-c.M // 256))
    return -(-c.M // rows)


_FORWARD: dict[str, Any] = {
    "ours": _our_forward,
    "ours+residual": _our_forward,
    "eager": _eager_forward,
    "F.rms_norm": _torch_rms_forward,
    "LayerNorm": _layer_norm_forward,
}
_BACKWARD: dict[str, Any] = {
    "ours": _our_backward,
    "ours+residual": _our_backward,
    "eager": _eager_backward,
    "F.rms_norm": _torch_rms_backward,
    "LayerNorm": _layer_norm_backward,
}


# --- torch.utils.flop_counter --------------------------------------------------------------------------------

_COUNTER = "torch.utils.flop_counter"


def _operator_case(shape: Sequence[int], weight: object, cast: str, offset: float, residual: object = None) -> _Case:
    name = "ours" if residual is None else "ours+residual"
    w = None if weight is None else F32
    return _Case(math.prod(shape[:-1]), shape[-1], F32, w, name, "forward", "cpu", cast, offset)


def _count_forward(x: Any, residual: Any, weight: Any, eps: float, cast: str, offset: float, *_: Any, **__: Any) -> int:
    return _forward_flops(_operator_case(x, weight, cast, offset, residual))


def _count_backward(
    dy: Any, ds: Any, x: Any, weight: Any, rstd: Any, cast: str, offset: float, need_dx: bool, need_dw: bool, **_: Any
) -> int:
    return _backward_flops(_operator_case(x, weight, cast, offset), need_dx, need_dw, ds is not None)


# By the name of the operator; `rmsnorm.register` gives them to FlopCounterMode.
FLOP_FORMULAS: dict[str, Callable[..., int]] = {"forward": _count_forward, "backward": _count_backward}
