"""Calls that Python has planned before, made again without it: host.cpp.

    ops.py   ->  norm(x, residual, w, …)  ->  what comes out, or None: Python's turn
    kernels  ->  learned(…)                   after each call that they have planned and run

Nearly all of a small norm's time is Python's, not the kernel's. The C++ is compiled once: at the first call, by a
process of its own, meanwhile Python makes the calls; for 20 s, into torch's folder for extensions. The compiler is
$RMSNORM_CXX, else $CXX, else c++; with RMSNORM_CXX= (empty) all stays in Python.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmsnorm.kernels import build

_NAME = "rmsnorm_host"
_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O2", "-DNDEBUG", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", f"-DRMSNORM_HOST={_NAME}")
_LIBRARIES = ("c10", "torch", "torch_cpu", "torch_python")
_BETWEEN_LOOKS, _DAY = 1.0, 86400.0  # seconds
_COMPILING = "the C++ is being compiled"

# How large a fresh tensor is: as the rows that are normalized, with a number a row, as the weight, the same full of
# ones; or so many numbers.
LIKE_ROWS, A_NUMBER_A_ROW, LIKE_WEIGHT, ONES_LIKE_WEIGHT = -1, -2, -3, -4

Argument = int | tuple[int, Tensor | None]  # a number; or a tensor, after its place among the inputs and what is fresh


class Launch(NamedTuple):
    """A function and what it is called with.

    launcher, configuration, stream_at: cuLaunchKernelEx, its CUlaunchConfig, and where the stream is in that; nothing
    where the function is machine code of the CPU.
    """

    function: int
    arguments: Sequence[Argument]
    launcher: int = 0
    configuration: bytes = b""
    stream_at: int = 0


class Unusable(Exception):
    """There will be no C++ in this process; the message says why."""


class _State:
    """Of this process: the C++, or why there is none; when to look again; whether waiting has failed; who compiles."""

    module: Any = None
    reason = "nothing was called yet"
    look_at = 0.0
    hopeless = False
    compiling: "subprocess.Popen[bytes] | None" = None


def _nothing_planned(*arguments: Any) -> None:
    return None


norm: Callable[..., Any] = _nothing_planned  # until the C++ is there


def look(backward: Callable[..., Any]) -> None:
    """Load the C++ if it is there; if not, have it compiled. backward: Python's, for what is not planned."""
    if _State.module is not None or time.monotonic() < _State.look_at:
        return
    _State.look_at = time.monotonic() + _BETWEEN_LOOKS
    try:
        if _State.compiling is not None and _State.compiling.poll() is None:
            return
        target = _target()
        if target.exists() or _compiled_beside(target):
            _open(target, backward)
    except Exception as error:  # noqa: BLE001  # whatever it is, Python can make the calls
        _State.reason, _State.look_at = _words(error), float("inf")


def load(backward: Callable[..., Any]) -> None:
    """As `look`, but compile or wait, also if looking has been given up. Raises Unusable, the next time at once."""
    if _State.module is not None:
        return
    try:
        if not _State.hopeless:
            _open(built(), backward)
            return
    except Exception as error:  # noqa: BLE001
        _State.reason, _State.hopeless, _State.look_at = _words(error), True, float("inf")
    raise Unusable(_State.reason)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def described() -> str:
    """Who makes calls of a kind that was seen before, and why."""
    return "called from C++" if _State.module is not None else f"called from Python: {_State.reason}"


def caller(*arguments: Any) -> str:
    """Who would make this very call of `norm`, and why."""
    if _State.module is None or _State.module.replays(*arguments):
        return described()
    several = "every one that takes several CPU threads or converts an argument"
    return f"called from Python, as the first call of a kind is, and {several}"


def learns() -> bool:
    """Whether this thread's call is one that the C++ was just asked for and did not know."""
    return _State.module is not None and _State.module.missed()


def learned(
    inputs: Sequence[Tensor | None], spec: tuple[Any, ...], fresh: Sequence[tuple[Tensor | None, int]],
    launches: Sequence[Launch], aligned: int, keeps: Any,
) -> None:  # fmt: skip
    """From now on calls of this kind are made as this one was, unless it had to copy something.

    inputs: (x, residual, w), and spec: (eps, cast, offset, with_rstd); or (dy, ds, x, w, rstd) and (cast, offset,
    need_dx, need_dw). fresh: (y, s, rstd, …) or (dx, dw, …), each with its size; the others are the launches' alone.
    aligned: bits that no address has. keeps: what must live as long.
    """
    tensors = (*inputs, *(t for t, _ in fresh))
    described = []
    for function, arguments, *launcher in launches:
        words, places = [], []
        for argument in arguments:
            place, t = argument if isinstance(argument, tuple) else (-1, None)
            if place >= 0 and tensors[place] is not t:
                return
            words.append(argument if isinstance(argument, int) else 0)
            places.append(place)
        described.append((function, words, places, *launcher))
    made = tuple(None if t is None else (t.dtype, size) for t, size in fresh)
    learn = _State.module.learn_forward if len(inputs) == 3 else _State.module.learn_backward
    learn(tuple(inputs), *spec, made, tuple(described), aligned, keeps)


def forget() -> None:
    """All that was learned."""
    if _State.module is not None:
        _State.module.forget()


def built() -> Path:
    """The file, compiled unless it was, by this process or by one that does so already. Raises Unusable, or OSError."""
    target, begun = _target(), time.time()
    if not target.exists():
        with _lock(target, wait=True):
            if not target.exists():
                _check_failure(target, begun)  # whoever it was that we waited for
                if not build.compiled(str(target), _command()):
                    _check_failure(target, 0.0)
                    raise Unusable("it could not be compiled")
    return target


def _compiled_beside(target: Path) -> bool:
    """Whether it is there now. If not, a process of its own compiles it, since this one may end sooner.

    That process inherits the lock, so however it ends nobody waits for it in vain. Raises Unusable where none should.
    """
    with _lock(target, wait=False) as lock:
        if lock is None:
            _State.reason = _COMPILING
            return False
        if target.exists():
            return True
        _check_failure(target, time.time() - _DAY)
        if _State.compiling is not None:
            raise Unusable(f"the process that compiled it ended with {_State.compiling.returncode}")
        if getattr(sys, "frozen", False) or not Path(sys.executable or "").name.startswith("python"):
            raise Unusable("it takes a Python to compile it beside this process: call rmsnorm.warmup()")
        _State.compiling = subprocess.Popen(
            [sys.executable, "-I", "-S", build.__file__, str(target), *_command()], pass_fds=[lock],
            process_group=0, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        _State.reason = _COMPILING
        return False


@contextlib.contextmanager
def _lock(target: Path, wait: bool) -> Iterator[int | None]:
    """The file that whoever compiles holds locked; None if another does and one is not to wait.

    Raises Unusable where no file can be.
    """
    import fcntl  # not everywhere, but nothing is compiled elsewhere

    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(target.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise Unusable(f"nothing can be written into {target.parent}: {error.strerror}") from None
    try:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        yield file if held else None
    finally:
        os.close(file)


def _check_failure(target: Path, since: float) -> None:
    """Raise Unusable if the very command has failed since then."""
    failed = Path(f"{target}.failed")
    with contextlib.suppress(FileNotFoundError):
        same = failed.read_bytes().startswith(build.first_line(_command()))
        if same and failed.stat().st_mtime >= since:
            raise Unusable(f"it could not be compiled, see {failed}; rmsnorm.warmup() tries again")


def _command() -> list[str]:
    """All but where to. Raises Unusable if there is no compiler."""
    given = os.environ.get("RMSNORM_CXX", os.environ.get("CXX") or "c++")
    try:
        compiler = shlex.split(given)
    except ValueError as error:
        raise Unusable(f"RMSNORM_CXX or CXX is {given!r}: {error}") from None
    if not compiler or shutil.which(compiler[0]) is None:
        raise Unusable(f"there is no C++ compiler {given!r}: name one in RMSNORM_CXX")
    root = Path(torch.__file__).parent
    includes = (root / "include", root / "include/torch/csrc/api/include", sysconfig.get_path("include"))
    return [
        *compiler, *_FLAGS, *(f"-isystem{folder}" for folder in includes), str(_SOURCE),
        f"-L{root / 'lib'}", *(f"-l{library}" for library in _LIBRARIES),
    ]  # fmt: skip


def _open(target: Path, backward: Callable[..., Any]) -> None:
    global norm
    if target.stat().st_uid not in (0, os.geteuid()):
        raise Unusable(f"{target} is another user's")
    spec = importlib.util.spec_from_file_location(_NAME, target)
    assert spec is not None
    assert spec.loader is not None
    try:
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise Unusable(f"{target} cannot be loaded, and should be deleted: {error}") from None
    module.begin(backward)
    _State.module, norm = module, module.norm


def _target() -> Path:
    """The file for this source, Python and torch. Raises Unusable where there is to be none."""
    if os.environ.get("RMSNORM_CXX") == "":
        raise Unusable("RMSNORM_CXX is empty")
    return _file()


@functools.cache
def _file() -> Path:
    if sys.platform != "linux" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise Unusable("it is for Linux, and a Python that has the GIL")
    made_from = (torch.__version__, torch.version.git_version, sysconfig.get_config_var("SOABI"), *_FLAGS)
    key = hashlib.sha256(_SOURCE.read_bytes() + repr(made_from).encode()).hexdigest()[:16]
    try:
        folder = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    except RuntimeError as error:
        raise Unusable(f"{error}: name a folder in TORCH_EXTENSIONS_DIR") from None
    return Path(folder).absolute() / f"{_NAME}_{key}" / f"{_NAME}.so"
