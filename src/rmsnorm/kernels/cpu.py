"""The arithmetic of reference.py on the CPU, in Numba: one pass over memory, a row at a time.

A kernel is compiled for what its pointers point to: float32 is itself, uint16 is bf16, int16 is fp16 (Numba has
no type for either on a CPU), and uint32 is two numbers of bf16, which take fewer instructions than one by one.
Kernels and their helpers share this file because machine code on disk is known by this source: an edit in another
file would not be noticed. No function carries `fastmath`: the one instruction that may be reordered or fused, the
addition into an fp64 sum, says so itself (`_add_square`, `_add`).
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import pickle
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import ccallback, cgutils, sigutils
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target
from numba.core.serialize import dumps
from numba.extending import intrinsic

from rmsnorm import kernels
from rmsnorm.kernels import build
from rmsnorm.kernels.plan import (
    MOST_PLANS,
    Backward,
    ByReference,
    Converted,
    Forward,
    Fresh,
    Plan,
    TensorKind,
    laid_out,
    summands,
)
from rmsnorm.kernels.rows import walk
from rmsnorm.kernels.threads import MachineCode, Team

NAME = "cpu kernel (Numba)"

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

# --- what the kernels are written in -------------------------------------------------------------------------

_I16, _I32 = ir.IntType(16), ir.IntType(32)


@intrinsic
def _parts(typing_context: Any, pointer: Any) -> Any:
    """How many numbers one element holds, as a constant."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.IntType(64)(2 if pointer.dtype == types.uint32 else 1)

    return types.int64(pointer), code


@intrinsic
def _nothing(typing_context: Any, pointer: Any) -> Any:
    """An element of zeros."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(pointer.dtype), 0)

    return pointer.dtype(pointer), code


@intrinsic
def _widen(typing_context: Any, element: Any, part: Any) -> Any:
    """A number of the element as fp32, exactly."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits, k = args
        if element == types.uint32:
            high = builder.icmp_unsigned("!=", k, k.type(0))
            half = builder.select(high, builder.and_(bits, _I32(0xFFFF0000)), builder.shl(bits, _I32(16)))
            return builder.bitcast(half, ir.FloatType())
        if element == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(bits, _I32), _I32(16)), ir.FloatType())
        if element == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        return bits

    return types.float32(element, part), code


def _bf16(builder: Any, value: Any, source: Any) -> Any:
    """The bits of an fp32 value, of which the upper half is what it rounds to.

    A NaN that stems from bf16 or from the processor has only zeros in its low 16 bits, so the addition cannot carry
    it away; one that stems from an fp32 source can have others, and is kept by hand.
    """
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
    rounded = builder.add(builder.add(bits, _I32(0x7FFF)), odd)
    if source.dtype == types.float32:
        rounded = builder.select(builder.fcmp_unordered("uno", value, value), _I32(0x7FC00000), rounded)
    return rounded


@intrinsic
def _cast(typing_context: Any, value: Any, pointer: Any) -> Any:
    """The fp32 value rounded to nearest even to the numbers that the pointer points to, and back in fp32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if pointer.dtype in (types.uint16, types.uint32):
            rounded = builder.and_(_bf16(builder, args[0], pointer), _I32(0xFFFF0000))
            return builder.bitcast(rounded, ir.FloatType())
        if pointer.dtype == types.int16:
            return builder.fpext(builder.fptrunc(args[0], ir.HalfType()), ir.FloatType())
        return args[0]

    return types.float32(types.float32, pointer), code


@intrinsic
def _put(typing_context: Any, element: Any, part: Any, value: Any, pointer: Any, source: Any) -> Any:
    """The element with one of its numbers: the fp32 value rounded to nearest even to what the pointer points to."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        before, k, number = args[:3]
        if pointer.dtype == types.uint32:
            bits = _bf16(builder, number, source)
            high = builder.icmp_unsigned("!=", k, k.type(0))
            half = builder.select(high, builder.and_(bits, _I32(0xFFFF0000)), builder.lshr(bits, _I32(16)))
            return builder.or_(before, half)
        if pointer.dtype == types.uint16:
            return builder.trunc(builder.lshr(_bf16(builder, number, source), _I32(16)), _I16)
        if pointer.dtype == types.int16:
            return builder.bitcast(builder.fptrunc(number, ir.HalfType()), _I16)
        return number

    return pointer.dtype(element, part, types.float32, pointer, source), code


@intrinsic
def _add_square(typing_context: Any, total: Any, value: Any) -> Any:
    """total + value², in any order; the square of an fp32 number is exact in fp64, so fusing changes nothing."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        square = builder.fmul(args[1], args[1], flags=("contract",))
        return builder.fadd(args[0], square, flags=("reassoc", "contract"))

    return types.float64(types.float64, types.float64), code


@intrinsic
def _add(typing_context: Any, total: Any, value: Any) -> Any:
    """total + value, in any order."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(args[0], args[1], flags=("reassoc",))

    return types.float64(types.float64, types.float64), code


@intrinsic
def _given(typing_context: Any, pointer: Any) -> Any:
    """Whether the pointer is not null: what is absent is passed as null."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.icmp_unsigned("!=", args[0], ir.Constant(args[0].type, None))

    return types.boolean(pointer), code


@intrinsic
def _take(typing_context: Any, counter: Any) -> Any:
    """What the counter held; it now holds one more. No two threads get the same."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], ir.IntType(64)(1), "monotonic")

    return types.int64(counter), code


@intrinsic
def _finish(typing_context: Any, call: Any, rows: Any) -> Any:
    """Count the rows of a piece that is done: whoever sees the count also sees the piece."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.atomic_rmw("add", builder.gep(args[0], [ir.IntType(64)(1)]), args[1], "release")
        return context.get_dummy_value()

    return types.void(call, rows), code


@intrinsic
def _finished(typing_context: Any, call: Any) -> Any:
    """How many rows are done."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.gep(args[0], [ir.IntType(64)(1)]), "acquire", 8)

    return types.int64(call), code


@intrinsic
def _yield_processor(typing_context: Any) -> Any:
    """Let another thread run, if one waits for the processor."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if os.name == "posix":
            builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I32, []), "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), code


@intrinsic(prefer_literal=True)
def _invoke(typing_context: Any, call: Any, pointers: Any, first: Any, last: Any) -> Any:
    """Run the kernel whose address is call[4], and whose pointers follow, for the rows from first to last."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(64)
        address, *values = (
            builder.load(builder.gep(args[0], [word(4 + i)])) for i in range(1 + pointers.literal_value)
        )
        kernel = ir.FunctionType(ir.VoidType(), [byte] * len(values) + [word] * 2).as_pointer()
        given = [builder.inttoptr(value, byte) for value in values]
        builder.call(builder.inttoptr(address, kernel), [*given, args[2], args[3]])
        return context.get_dummy_value()

    return types.void(call, pointers, first, last), code


# --- the kernels ---------------------------------------------------------------------------------------------
# Pointers: what is absent is null. Outputs are contiguous; of the inputs only the last dimension is, and `layout`
# holds N, the rows of a chunk, the two inner sizes of the rows' three dimensions, and three strides for each of them.
# An element has one part or two, and N is a multiple of them; in partial sums all first parts come before the second.
# spec: eps, the offset, and whether the cast is early. The offset is -0.0 where there is none, the one number whose
# addition changes no weight.

_FIRST, _SECOND, _THIRD = 4, 7, 10


@numba.njit(error_model="numpy")
def _start(layout: Any, strides: int, m: int) -> Any:
    """Where row m of an input begins, in elements."""
    middle, inner = layout[2], layout[3]
    if m < inner:
        return m * layout[strides + 2]
    outer, rest = m // (middle * inner), m // inner
    return outer * layout[strides] + rest % middle * layout[strides + 1] + m % inner * layout[strides + 2]


def _forward(
    x: Any, residual: Any, w: Any, y: Any, s: Any, rstd: Any, layout: Any, spec: Any, first: int, last: int
) -> None:  # fmt: skip
    N, eps, offset, early = layout[0], spec[0], spec[1], spec[2] != 0
    parts = _parts(x)
    steps = N // parts
    for m in range(first, last):
        rows, at, out = x, _start(layout, _FIRST, m) // parts, m * steps
        if _given(residual):
            other = _start(layout, _SECOND, m) // parts
            for i in range(steps):
                element = _nothing(s)
                for k in range(parts):
                    element = _put(element, k, _widen(x[at + i], k) + _widen(residual[other + i], k), s, x)
                s[out + i] = element
            rows, at = s, out
        total = 0.0
        for i in range(steps):
            for k in range(parts):
                total = _add_square(total, np.float64(_widen(rows[at + i], k)))
        v = np.float32(total / N) + eps
        r = np.float32(1) / np.float32(math.sqrt(v))
        if _given(rstd):
            rstd[m] = r
        for i in range(steps):
            element = _nothing(y)
            for k in range(parts):
                h = _widen(rows[at + i], k) * r
                scaled = _widen(w[i], k) * _cast(h, x) if early else (_widen(w[i], k) + offset) * h
                element = _put(element, k, scaled, y, w)
            y[out + i] = element


def _backward(
    dy: Any, ds: Any, x: Any, w: Any, rstd: Any, dx: Any, dw: Any, layout: Any, spec: Any, first: int, last: int
) -> None:  # fmt: skip
    N, chunk, wants_dw, adds = layout[0], layout[1], _given(dw), _given(ds)
    offset, early = spec[1], spec[2] != 0
    parts = _parts(x)
    steps = N // parts
    for m in range(first, last):
        a, b = _start(layout, _FIRST, m) // parts, _start(layout, _SECOND, m) // parts
        out, sums = m * steps, m // chunk * N
        r = rstd[m]
        if wants_dw and m % chunk == 0:
            for i in range(N):
                dw[sums + i] = 0.0
        total = 0.0
        for i in range(steps):
            for k in range(parts):
                d, xh = _widen(dy[a + i], k), _widen(x[b + i], k) * r
                total = _add(total, np.float64((d * (_widen(w[i], k) + offset)) * xh))
                if wants_dw:
                    dw[sums + k * steps + i] += np.float64(d * (_cast(xh, x) if early else xh))
        if _given(dx):
            c = np.float32(total / N)
            other = _start(layout, _THIRD, m) // parts
            for i in range(steps):
                element = _nothing(dx)
                for k in range(parts):
                    g, xh = _widen(dy[a + i], k) * (_widen(w[i], k) + offset), _widen(x[b + i], k) * r
                    t = r * (g - xh * c)
                    element = _put(element, k, t + _widen(ds[other + i], k) if adds else t, dx, w)
                dx[out + i] = element


def _sum_chunks(partials: Any, dw: Any, chunks: int, N: int) -> None:
    for chunk in range(1, chunks):
        for i in range(N):
            partials[i] += partials[chunk * N + i]
    parts = _parts(dw)
    steps = N // parts
    for i in range(steps):
        element = _nothing(dw)
        for k in range(parts):
            element = _put(element, k, np.float32(partials[k * steps + i]), dw, dw)
        dw[i] = element


def _drain(pointers: int) -> Callable[[Any], None]:
    """What each thread does of a call.

    That is how many pieces are taken, how many rows are done, M, the rows of a piece, a kernel and its pointers.
    """

    def drain(call: Any) -> None:
        M, rows = call[2], call[3]
        first = _take(call) * rows
        while first < M:
            last = min(first + rows, M)
            _invoke(call, pointers, first, last)
            _finish(call, last - first)
            first = _take(call) * rows

    return drain


def _wait(call: Any) -> None:
    while _finished(call) < call[2]:
        _yield_processor()


# --- compiling them ------------------------------------------------------------------------------------------

_ELEMENT = {torch.float32: types.float32, torch.bfloat16: types.uint16, torch.float16: types.int16}
_PAIR = types.uint32
_WORD, _POINTER = ctypes.c_int64, ctypes.c_void_p


_FAILURES: list[str] = []  # what Numba said where it could not compile


@functools.cache
def _compiled(kernel: Callable[..., None], *pointees: Any) -> Any:
    """The kernel as machine code: pointers to these types first, then two integers. None if it cannot be compiled."""
    return _code(kernel, [types.CPointer(pointee) for pointee in pointees], 2)


@functools.cache
def _compiled_drain(pointers: int) -> Any:
    return _code(_drain(pointers), [types.CPointer(types.int64)], 0)


@functools.cache
def _compiled_wait() -> Any:
    return _code(_wait, [types.CPointer(types.int64)], 0)


def _code(function: Callable[..., None], pointers: Sequence[Any], integers: int) -> Any:
    """Machine code that is called through ctypes, which releases the GIL, with addresses as plain integers."""
    code = _Code(function, sigutils.normalize_signature(types.void(*pointers, *[types.int64] * integers)))
    try:
        code.compile()
    except Exception as error:  # whatever it is, the reference can compute
        if kernels.is_of_a_signal(error):
            raise
        said = str(error).strip().partition("\n")[0]
        _FAILURES.append(f"Numba cannot compile the kernel: {type(error).__name__}: {said}")
        return None
    callable_ = ctypes.CFUNCTYPE(None, *[_POINTER] * len(pointers), *[_WORD] * integers)(code.address)
    callable_.keeps, callable_.address = code, code.address  # type: ignore[attr-defined]  # the code lives as long
    return callable_


_CFunc: Any = ccallback.CFunc


class _Code(_CFunc):  # type: ignore[misc]
    """A function that Numba compiles to machine code, or has compiled before."""

    def __init__(self, function: Callable[..., None], signature: Any) -> None:
        super().__init__(function, signature, locals={}, options={"error_model": "numpy"})
        self._kept: _Kept | None = None
        with _whatever_ails_the_cache():
            self._kept = _Kept(function)

    def _compile_uncached(self) -> Any:
        if self._kept is None:
            return super()._compile_uncached()
        context = self._targetdescr.target_context
        found = self._kept.load(self._sig, context)
        if found is None:
            with self._kept.lock():
                found = self._kept.load(self._sig, context)  # what the process that we waited for compiled
                if found is None:
                    found = super()._compile_uncached()
                    self._kept.save(self._sig, found)
        return found


@contextlib.contextmanager
def _whatever_ails_the_cache() -> Iterator[None]:
    """Goes on without: a compilation says what is wrong, if anything is."""
    try:
        yield
    except Exception as error:
        if kernels.is_of_a_signal(error):
            raise


class _Kept:
    """The machine code of a function on disk, each signature in a file of its own.

    So reading takes no lock. The seal of a file covers its function, signature, processor, source and versions: a file
    that was renamed is not loaded. What is read is executed, hence the folder and the file must be the user's own.
    """

    _waits = True  # for other processes that compile, until one took too long

    def __init__(self, function: Callable[..., None]) -> None:
        constants = tuple(cell.cell_contents for cell in function.__closure__ or ())
        self._function = function.__qualname__, constants
        self._folder = _folder()
        self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        _check_own(self._folder)

    def _file(self, signature: Any, context: Any) -> tuple[Path, bytes]:
        """Its path, and what its seal is about."""
        about = repr((self._function, signature, context.codegen().magic_tuple())).encode()
        name = f"{self._function[0].split('.')[0]}.{hashlib.sha256(about).hexdigest()[:16]}.nbc"
        return self._folder / name, _made_from() + about

    def load(self, signature: Any, context: Any) -> Any:
        """What was compiled; None if there is no file, or it is damaged or not the user's own."""
        with _whatever_ails_the_cache(), contextlib.ExitStack() as stack:
            context.refresh()
            path, about = self._file(signature, context)
            file = build.opened(path)
            stack.callback(os.close, file)
            if build.distrust(os.fstat(file)) is None:
                content = build.unsealed(build.content(file), about)
                return None if content is None else CompileResult._rebuild(context, *pickle.loads(content))
        return None

    def save(self, signature: Any, result: Any) -> None:
        with _whatever_ails_the_cache():
            content = dumps(result._reduce())
            path, about = self._file(signature, cpu_target.target_context)
            build.write(str(path), build.sealed(content, about), 0o644)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process compiles while the others wait, so that they need not; but not for long."""
        with contextlib.ExitStack() as stack:
            with _whatever_ails_the_cache():
                try:
                    timeout = 10 if _Kept._waits else 0
                    stack.enter_context(filelock.FileLock(self._folder / "rmsnorm.compiling", timeout, mode=0o600))
                except filelock.Timeout:
                    _Kept._waits = False
            yield


@functools.cache
def _made_from() -> bytes:
    """What all machine code depends on: this source, and who compiles it."""
    versions = numba.__version__, llvmlite.__version__, sys.version
    return Path(__file__).read_bytes() + repr(versions).encode()


def _folder() -> Path:
    """Where the machine code is kept: never beside the sources, where it would outlive the package.

    In a folder for each source and its compiler, so that environments of different versions do not replace each
    other's files.
    """
    given = os.environ.get("RMSNORM_CACHE_DIR") or numba.config.CACHE_DIR
    if given:
        base = Path(given).absolute()
    else:
        xdg = os.environ.get("XDG_CACHE_HOME", "")
        base = (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "rmsnorm"
    return base / f"numba-{hashlib.sha256(_made_from()).hexdigest()[:16]}"


def _check_own(folder: Path) -> None:
    """Raises PermissionError where anybody else can put files into the folder, or another folder in its place."""
    own, around = folder.lstat(), folder.parent.stat()
    fault = build.distrust(own) if stat.S_ISDIR(own.st_mode) else "is no folder"
    if fault is not None:
        raise PermissionError(f"{folder} {fault}")
    if around.st_uid not in (0, os.geteuid()):
        raise PermissionError(f"{folder.parent} is another user's")
    if around.st_mode & stat.S_IWOTH and not around.st_mode & stat.S_ISVTX:  # with it, as /tmp, others can only add
        raise PermissionError(f"{folder.parent} can be written by others")


class _Types(NamedTuple):
    """What the kernels read the weight as, the input's dtype or fp32, and what y is."""

    w: torch.dtype
    y: torch.dtype


@functools.cache
def _types(x: torch.dtype, w: torch.dtype | None, cast: str) -> _Types:
    read = x if w is None or w == x else torch.float32
    return _Types(read, torch.promote_types(x, read) if cast == "early" else x)


def _elements(x: torch.dtype, read: _Types, even: bool) -> tuple[Any, Any, Any]:
    """What x, w and y point to: two numbers at once where all are bf16 and every row begins and ends with a pair."""
    if even and {x, read.w, read.y} == {torch.bfloat16}:
        return _PAIR, _PAIR, _PAIR
    return _ELEMENT[x], _ELEMENT[read.w], _ELEMENT[read.y]


@functools.cache
def _forward_kernel(x: torch.dtype, read: _Types, even: bool) -> Any:
    X, W, Y = _elements(x, read, even)
    return _compiled(_forward, X, X, W, Y, X, types.float32, types.int64, types.float32)


@functools.cache
def _backward_kernel(x: torch.dtype, read: _Types, even: bool) -> Any:
    X, W, Y = _elements(x, read, even)
    return _compiled(_backward, Y, X, X, W, types.float32, X, types.float64, types.int64, types.float32)


@functools.cache
def _sum_kernel(x: torch.dtype, read: _Types, even: bool) -> Any:
    return _compiled(_sum_chunks, types.float64, _elements(x, read, even)[1])


# --- planning calls ------------------------------------------------------------------------------------------

# Elements that a thread takes at once at least, 4 us of work: about what it costs to have torch's threads begin.
_GRAIN = 1 << 14
# Elements that one partial sum of dw is over, at least, and what bounds the sums: 8 bytes a column for each.
_CHUNK, _MOST_CHUNKS, _FEWEST_ROWS = 1 << 16, 256, 32
# Bytes from which the C library maps fresh memory for every tensor: 10,000 page faults at 42 MB, or 20 huge ones.
_MAPPED = 32 << 20
_PAIR_BYTES = 4


def refuses(x: torch.dtype, residual: torch.dtype | None, w: torch.dtype | None) -> str | None:
    """Why tensors of these dtypes must run the reference; None if the kernels take them."""
    for name, dtype in (("x", x), ("residual", residual), ("weight", w)):
        if dtype is not None and dtype not in _ELEMENT:
            return f"{name} is {dtype}: computed in fp32 and returned as {dtype} by plain torch"
    if torch.promote_types(x, residual or x) == torch.float16 and not _has_fp16():
        return "the processor that Numba compiles for has no instructions for fp16: computed by plain torch"
    return None


@functools.cache
def _has_fp16() -> bool:
    """Whether the conversions of fp16 are instructions, and no calls of a library that the process may not have."""
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    half, single = ir.HalfType(), ir.FloatType()
    module = ir.Module()
    module.triple = triple
    for source, target, convert in ((half, single, "fpext"), (single, half, "fptrunc")):
        pointers = [source.as_pointer(), target.as_pointer()]
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), pointers), convert)
        builder = ir.IRBuilder(function.append_basic_block())
        builder.store(getattr(builder, convert)(builder.load(function.args[0]), target), function.args[1])
        builder.ret_void()
    machine = llvmlite.binding.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    assembly = machine.emit_assembly(llvmlite.binding.parse_assembly(str(module)))
    return re.search(r"__\w*(hf|f2h|h2f)", assembly) is None


@functools.lru_cache(MOST_PLANS)
def plan_forward(kind: Forward) -> Plan | ByReference:
    """For y, s and rstd as of `reference.forward`."""
    row, x, residual, before = summands(kind)
    spec = kind.spec
    wanted = {row: (x, x.dtype)} | ({} if residual is None else {"residual": (residual, x.dtype)})
    rows, kinds, converted = laid_out(_rows, wanted)
    types = _types(x.dtype, None if kind.w is None else kind.w.dtype, spec.cast)
    scale = _scale(kind.w, types, rows.N)
    even = rows.even and _paired(*kinds.values(), scale.kind)
    kernel = _forward_kernel(x.dtype, types, even)
    if kernel is None:
        return ByReference(_FAILURES[-1])
    y, s = _like_rows("y", kind.x, types.y), _like_rows("s", kind.x, x.dtype)
    rstd = Fresh("rstd", torch.float32, tuple(kind.x.shape[:-1]))
    tensors = (
        row, None if residual is None else "residual", scale.name, "y", None if residual is None else "s",
        "rstd" if kind.with_rstd else None,
    )  # fmt: skip
    return Plan(
        kind.device,
        inputs=("x", "residual", "w"),
        before=(*before, *converted, *scale.before),
        fresh=(y, *([] if residual is None else [s]), *([rstd] if kind.with_rstd else []), *scale.fresh),
        launches=(_over_rows(kernel, tensors, rows, _spec(spec.eps, spec.offset, spec.cast), rows.grain),),
        outputs=("y", None if kind.residual is None else "s", "rstd" if kind.with_rstd else None),
    )


@functools.lru_cache(MOST_PLANS)
def plan_backward(kind: Backward) -> Plan | ByReference:
    """For dx and dw as of `reference.backward`; dw is summed in fp64 over chunks of rows, then over them in order."""
    x, w, spec, need_dx = kind.x, kind.w, kind.spec, kind.need_dx
    types = _types(x.dtype, None if w is None else w.dtype, spec.cast)
    wanted = {"dy": (kind.dy, types.y), "x": (x, x.dtype)} | ({} if kind.ds is None else {"ds": (kind.ds, x.dtype)})
    rows, kinds, before = laid_out(_rows, wanted)
    rstd = kind.rstd
    if not rstd.is_dense:  # as it was, but for hooks on what is saved
        rstd = TensorKind.dense(rstd.shape, rstd.dtype)
        before.append(Converted("rstd", ("rstd",), rstd.dtype))
    scale = _scale(w, types, rows.N)
    even = rows.even and _paired(*kinds.values(), scale.kind, rstd)
    kernel = _backward_kernel(x.dtype, types, even)
    need_dw = kind.need_dw and w is not None
    sums = need_dw and rows.chunks > 0
    of_sum = _sum_kernel(x.dtype, types, even) if sums else None
    if kernel is None or (sums and of_sum is None):
        return ByReference(_FAILURES[-1])
    fresh, after = list(scale.fresh), []
    if need_dx:
        fresh.append(_like_rows("dx", x, x.dtype))
    tensors = (
        "dy", None if kind.ds is None else "ds", "x", scale.name, "rstd", "dx" if need_dx else None,
        "partials" if sums else None,
    )  # fmt: skip
    launches = [_over_rows(kernel, tensors, rows, _spec(0.0, spec.offset, spec.cast), rows.chunk)]
    if sums:
        fresh += [
            Fresh("partials", torch.float64, (rows.chunks, rows.N)),
            Fresh("dw", types.w, (rows.N,)),
        ]
        launches.append(MachineCode(of_sum, ("partials", "dw"), (rows.chunks, rows.N)))
        if w is not None and w.dtype is not types.w:
            after.append(Converted("dw", ("dw",), w.dtype))
    elif need_dw and w is not None:
        fresh.append(Fresh("dw", w.dtype, (rows.N,), value=0))
    return Plan(
        kind.device,
        inputs=("dy", "ds", "x", "w", "rstd"),
        before=(*before, *scale.before),
        fresh=tuple(fresh),
        launches=tuple(launches),
        after=tuple(after),
        outputs=("dx" if need_dx else None, "dw" if need_dw else None),
    )


@dataclass(frozen=True)
class _Rows:
    """How the rows of some shape and strides are walked. A pure function of both, never of the thread count.

    grain: rows that a thread takes at once forward. chunk: rows that a partial sum of dw is over. even: whether rows
    begin and end with pairs of numbers. layout: what the kernels read of it.
    """

    M: int
    N: int
    grain: int
    chunk: int
    chunks: int
    even: bool
    layout: Any


@functools.lru_cache(MOST_PLANS)
def _rows(shape: Sequence[int], *strides: Sequence[int]) -> _Rows | None:
    """As `rows.walk`, with the rows cut into chunks."""
    found = walk(shape, *strides)
    if found is None:
        return None
    M, N = found.M, found.N
    chunk = max(_FEWEST_ROWS, -(-_CHUNK // N), -(-M // _MOST_CHUNKS))
    sizes = found.sizes if found.strided else (1, M)
    steps = [step for of_one in found.steps for step in of_one]
    values = [N, chunk, *sizes, *steps, *[0] * (9 - len(steps))]
    even = all(number % 2 == 0 for number in (N, *steps)) and sys.byteorder == "little"
    return _Rows(M, N, max(1, _GRAIN // N), chunk, -(-M // chunk), even, (_WORD * len(values))(*values))


class _Scale(NamedTuple):
    """The weight as the kernels read it, and what makes it so; ones in place of none, which change no bit."""

    name: str
    kind: TensorKind
    before: tuple[Converted, ...] = ()
    fresh: tuple[Fresh, ...] = ()


def _scale(w: TensorKind | None, types: _Types, N: int) -> _Scale:
    if w is not None and w.dtype is types.w and w.is_dense:
        return _Scale("w", w)
    made = TensorKind.dense((N,), types.w)
    if w is None:
        return _Scale("ones", made, fresh=(Fresh("ones", types.w, (N,), value=1),))
    return _Scale("w", made, before=(Converted("w", ("w",), types.w),))


def _paired(*kinds: TensorKind) -> bool:
    """Whether all begin where pairs of 16-bit numbers do."""
    return all(kind.alignment >= _PAIR_BYTES for kind in kinds)


def _like_rows(name: str, x: TensorKind, dtype: torch.dtype) -> Fresh:
    nbytes = math.prod(x.shape) * dtype.itemsize
    return Fresh(name, dtype, tuple(x.shape), huge_pages=nbytes >= _MAPPED)


def _over_rows(kernel: Any, tensors: tuple[str | None, ...], rows: _Rows, spec: Any, at_once: int) -> MachineCode:
    """The kernel over all rows, on several threads where there is more than one piece of so many rows."""
    words = ctypes.addressof(rows.layout), ctypes.addressof(spec)
    drain = _compiled_drain(len(tensors) + len(words)) if at_once < rows.M else None
    if drain is None:
        return MachineCode(kernel, tensors, (*words, 0, rows.M), keeps=(rows, spec))
    return MachineCode(kernel, tensors, words, Team(rows.M, at_once, drain, _compiled_wait), keeps=(rows, spec))


@functools.lru_cache(256)
def _spec(eps: float, offset: float, cast: str) -> Any:
    """As the kernels read it."""
    return (ctypes.c_float * 3)(eps, offset or -0.0, cast == "early")
