"""Compiles and loads host.cpp, which runs plans without Python.

    norm(x, residual, w, …), or an operator  ->  C++ looks up the plan for this kind of call  ->  outputs
                                                 (it asks Python for the plan the first time)
                                                 no plan for C++: Python makes the call

For a small norm nearly all of the time is spent in Python, not in the kernel. The first call starts a background
process that compiles the C++ into torch's folder for extensions, which takes about 20 s; until then Python makes the
calls. The compiler is $RMSNORM_CXX, else $CXX, else c++. If RMSNORM_CXX is set but empty, Python makes all calls.
"""

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmsnorm import kernels
from rmsnorm.gated_reference import grouped
from rmsnorm.kernels import dispatch
from rmsnorm.kernels.host import build
from rmsnorm.kernels.plan import (
    Backward,
    BeginBackward,
    BeginForward,
    ByReference,
    FinishBackward,
    FinishForward,
    Forward,
    GatedBackward,
    GatedForward,
    Native,
    Plan,
)
from rmsnorm.spec import (
    GATED,
    PAIR,
    Activation,
    Cast,
    Saved,
    Spec,
    caller,
    check_gated,
    check_gated_gradients,
    check_gradients,
    check_pair,
    check_pair_gradients,
    check_part,
    check_sandwich,
    check_saved,
    check_summed,
    check_tensors,
    gated_spec,
)  # fmt: skip

_NAME = "rmsnorm_host"
_SOURCE = Path(__file__).with_name("host.cpp")
_FLAGS = ("-O2", "-DNDEBUG", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", f"-DRMSNORM_HOST={_NAME}")
_LIBRARIES = ("c10", "torch", "torch_cpu", "torch_python")
_LOOK_INTERVAL, _DAY = 1.0, 86400.0  # seconds
_COMPILING = "the C++ is being compiled"
_WARMUP_RECOMPILES = "; rmsnorm.warmup() compiles it again"


class Unusable(Exception):
    """The C++ cannot be used in this process; the message says why."""


class _State:
    """The state of the C++ in this process."""

    module: Any = None  # the loaded C++
    reason = "nothing was called yet"  # why it is not loaded
    look_at = 0.0  # when to look for it again, on the monotonic clock; infinity: never
    waiting_failed = False  # whether `load` has failed: then it fails at once
    compiling: "subprocess.Popen[bytes] | None" = None  # the compiling process, if this process started it


def _leave_to_python(*arguments: Any) -> None:
    return None


norm: Callable[..., Any] = _leave_to_python  # replaced when the C++ is loaded


def look() -> None:
    """Loads the C++ if it has been compiled; otherwise starts compiling it in the background. Does not wait."""
    if _State.module is not None or time.monotonic() < _State.look_at:
        return
    _State.look_at = time.monotonic() + _LOOK_INTERVAL
    try:
        if _State.compiling is not None and _State.compiling.poll() is None:
            return
        target = _target()
        file = _found(target)
        if file is None:
            file = _compiled_in_background(target)
        if file is not None:
            _open(file, target)
    except Exception as error:  # Python can make the calls whatever the error is
        if kernels.raised_by_signal_handler(error):
            raise
        _State.reason, _State.look_at = _words(error), float("inf")


def load() -> None:
    """Loads the C++, compiling it or waiting for the process that does; tries even if `look` has given up.

    Raises:
        Unusable: if it cannot be loaded. Later calls raise it at once.
    """
    if _State.module is not None:
        return
    try:
        if not _State.waiting_failed:
            _open_built()
            return
    except Exception as error:
        if kernels.raised_by_signal_handler(error):
            raise
        _State.reason, _State.waiting_failed, _State.look_at = _words(error), True, float("inf")
    raise Unusable(_State.reason)


def wait(seconds: float) -> bool:
    """Calls `look` repeatedly, for at most `seconds`.

    Returns whether the outcome is final by then: the C++ is loaded, or `look` has given up.
    """
    until = time.monotonic() + seconds
    while True:
        look()
        if _State.module is not None or _State.look_at == float("inf"):
            return True
        left = until - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(left, 0.05 if _State.compiling is None else 0.2))


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def described() -> str:
    """Whether calls are made from C++ or from Python, and why."""
    return "called from C++" if _State.module is not None else f"called from Python: {_State.reason}"


def made_by(plan: Plan, *arguments: Any) -> str:
    """Whether a call of `norm` with these arguments and this plan would be made from C++ or Python, and why."""
    if _State.module is None or _State.module.makes(*arguments):
        return described()
    return _by_python(plan)


def operator_made_by(*plans: Plan) -> str:
    """As `made_by`, for calls of operators by Python, with plain tensors and these plans."""
    if _State.module is None:
        return described()
    for plan in plans:
        if not (isinstance(plan.native, Native) and (plan.gpu is None or plan.gpu == torch.cuda.current_device())):
            return _by_python(plan)
    return described()


def _by_python(plan: Plan) -> str:
    why = plan.native if isinstance(plan.native, str) else "C++ takes tensors of the current GPU"
    return f"called from Python: {why}"


@contextlib.contextmanager
def bypassed() -> Iterator[None]:
    """A context in which Python, not C++, makes calls of the public functions and computes their gradients."""
    global norm
    before, norm = norm, _leave_to_python
    try:
        yield
    finally:
        norm = before


def forget() -> None:
    """Clears the plan cache of the C++."""
    if _State.module is not None:
        _State.module.forget()


def cached_plans() -> int:
    """How many plans the cache of the C++ holds, which is at most `MOST_PLANS` of host.cpp."""
    return 0 if _State.module is None else int(_State.module.cached_plans())


# --- called from C++ -----------------------------------------------------------------------------------------


def _native_forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: Cast, offset: float, with_rstd: bool
) -> Native | None:
    """Returns the plan for calls of this kind, or None if Python must make them or raise an error."""
    try:
        check_tensors(caller(residual), x, residual, w, offset)
        spec = Spec(eps, cast, offset)
    except (TypeError, ValueError):
        return None
    return _native(dispatch.plan_forward(Forward.of(x, residual, w, spec, with_rstd)))


def _native_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, offset: float, need_dx: bool,
    need_dw: bool,
) -> Native | None:  # fmt: skip
    """As `_native_forward`, for the backward pass."""
    try:
        check_gradients(caller(ds), dy, ds, x, w, rstd, offset, need_dw)
        spec = Spec(0.0, cast, offset)
    except (TypeError, ValueError):
        return None
    return _native(dispatch.plan_backward(Backward.of(dy, ds, x, w, rstd, spec, need_dx, need_dw)))


def _native_backward_of_sum(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, offset: float, need_dx: bool,
    need_dw: bool, *more: Tensor,
) -> Native | None:  # fmt: skip
    """As `_native_forward`, for `backward_of_sum`, which adds several gradients of y."""
    try:
        check_summed(caller(ds), (dy, *more), ds, x, w, rstd, offset, need_dw)
        spec = Spec(0.0, cast, offset)
    except (TypeError, ValueError):
        return None
    return _native(dispatch.plan_backward(Backward.of_sum((dy, *more), ds, x, w, rstd, spec, need_dx, need_dw)))


def _native_forward_pair(
    x: Tensor, _: None, w: Tensor | None, x2: Tensor, _2: None, w2: Tensor | None, eps: float, cast: Cast,
    offset: float, with_rstd: bool,
) -> Native | None:  # fmt: skip
    """As `_native_forward`, for `forward_pair`; the arguments that are always None stand for residuals."""
    try:
        check_pair(PAIR, x, w, x2, w2, offset)
        spec = Spec(eps, cast, offset)
    except (TypeError, ValueError):
        return None
    kinds = (Forward.of(rows, None, weight, spec, with_rstd) for rows, weight in ((x, w), (x2, w2)))
    return _native(dispatch.plan_forward_pair(*kinds))


def _native_forward_sandwich(
    x: Tensor, _: None, w: Tensor | None, residual: Tensor, w2: Tensor | None, eps: float, cast: Cast, offset: float,
    with_rstd: bool,
) -> Native | None:  # fmt: skip
    """As `_native_forward`, for `forward_sandwich`; None stands for the residual of the first norm."""
    try:
        check_sandwich("forward_sandwich", x, w, residual, w2, offset)
        spec = Spec(eps, cast, offset)
    except (TypeError, ValueError):
        return None
    kinds = dispatch.sandwich_kinds(x, w, residual, w2, spec, with_rstd)
    return _native(dispatch.plan_forward_sandwich(*kinds))


def _native_backward_pair(
    dy: Tensor, _: None, x: Tensor, w: Tensor | None, rstd: Tensor, dy2: Tensor, _2: None, x2: Tensor,
    w2: Tensor | None, rstd2: Tensor, cast: Cast, offset: float, need_dx: bool, need_dw: bool,
) -> Native | None:  # fmt: skip
    """As `_native_backward`, for `backward_pair`; the arguments that are always None stand for gradients of s."""
    try:
        check_pair_gradients(PAIR, (dy, x, w, rstd), (dy2, x2, w2, rstd2), offset, need_dw)
        spec = Spec(0.0, cast, offset)
    except (TypeError, ValueError):
        return None
    first = Backward.of(dy, None, x, w, rstd, spec, need_dx, need_dw)
    return _native(dispatch.plan_backward_pair(first, Backward.of(dy2, None, x2, w2, rstd2, spec, need_dx, need_dw)))


def _native_gated_forward(
    x: Tensor, gate: Tensor, w: Tensor | None, eps: float, cast: Cast, activation: Activation, gate_first: bool,
    groups: int, with_rstd: bool,
) -> Native | None:  # fmt: skip
    """As `_native_forward`, for a gated norm."""
    try:
        check_gated(GATED, x, gate, w, groups)
        spec = gated_spec(GATED, eps, cast, activation, gate_first, groups)
    except (TypeError, ValueError):
        return None
    rows, gate_rows = grouped(x, groups), grouped(gate, groups)
    return _ungrouped(dispatch.plan_gated_forward(GatedForward.of(rows, gate_rows, w, spec, with_rstd)), x)


def _native_gated_backward(
    dy: Tensor, x: Tensor, gate: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, activation: Activation,
    gate_first: bool, groups: int, need_dx: bool, need_dgate: bool, need_dw: bool,
) -> Native | None:  # fmt: skip
    """As `_native_backward`, for a gated norm."""
    try:
        check_gated_gradients(GATED, dy, x, gate, w, rstd, groups, need_dw)
        spec = gated_spec(GATED, 0.0, cast, activation, gate_first, groups)
    except (TypeError, ValueError):
        return None
    of_dy, of_x, of_gate = (grouped(t, groups) for t in (dy, x, gate))
    kind = GatedBackward.of(of_dy, of_x, of_gate, w, rstd, spec, need_dx, need_dgate, need_dw)
    return _ungrouped(dispatch.plan_gated_backward(kind), x)


def _native_begin_forward(x: Tensor, residual: Tensor | None) -> Native | None:
    """As `_native_forward`, for `begin_forward`, which takes parts of rows."""
    try:
        check_part(caller(residual), {"x": x, "residual": residual}, None, {})
    except (TypeError, ValueError):
        return None
    return _native(dispatch.plan_begin_forward(BeginForward.of(x, residual)))


def _native_finish_forward(
    x: Tensor, w: Tensor | None, S: Tensor, N: int, eps: float, cast: Cast, offset: float, with_rstd: bool
) -> Native | None:
    """As `_native_forward`, for `finish_forward`, which takes parts of rows."""
    try:
        check_part("rms_norm", {"x": x}, w, {"S": S}, N)
        spec = Spec(eps, cast, offset)
    except (TypeError, ValueError):
        return None
    return _native(dispatch.plan_finish_forward(FinishForward.of(x, w, S, N, spec, with_rstd)))


def _native_begin_backward(
    dy: Tensor, x: Tensor, w: Tensor | None, rstd: Tensor, cast: Cast, offset: float
) -> Native | None:
    """As `_native_forward`, for `begin_backward`, which takes parts of rows."""
    try:
        check_part("rms_norm", {"x": x, "dy": dy}, w, {"rstd": rstd})
        spec = Spec(0.0, cast, offset)
    except (TypeError, ValueError):
        return None
    return _native(dispatch.plan_begin_backward(BeginBackward.of(dy, x, w, rstd, spec)))


def _native_finish_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, S: Tensor, N: int, cast: Cast,
    offset: float, need_dw: bool,
) -> Native | None:  # fmt: skip
    """As `_native_forward`, for `finish_backward`, which takes parts of rows."""
    try:
        check_part(caller(ds), {"x": x, "dy": dy, "ds": ds}, w, {"rstd": rstd, "S": S}, N)
        spec = Spec(0.0, cast, offset)
    except (TypeError, ValueError):
        return None
    return _native(dispatch.plan_finish_backward(FinishBackward.of(dy, ds, x, w, rstd, S, N, spec, need_dw)))


def _ungrouped(plan: Plan | ByReference, x: Tensor) -> Native | None:
    """The plan of a gated norm for C++, with outputs in the shape of x instead of (..., groups, N / groups)."""
    native, of_rows = _native(plan), {"y", "dx", "dgate"}
    if native is None:
        return None
    fresh = (replace(t, shape=tuple(x.shape)) if t.name in of_rows else t for t in native.fresh)
    return replace(native, fresh=tuple(fresh))


def _check_saved(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, offset: float, need_dw: bool,
    x_dtype: torch.dtype, w_dtype: torch.dtype, w_dims: int, adds: bool,
) -> None:  # fmt: skip
    """Raises an error if the saved tensors are invalid; called for backward passes that C++ leaves to Python."""
    of_x, of_w = Saved(x_dtype, dy.shape), Saved(w_dtype, dy.shape[-w_dims:])  # y has the shape of x, and dy that of y
    where = "add_rms_norm" if adds else "rms_norm"
    check_saved(where, x=(x, of_x), weight=(w, of_w))
    check_gradients(where, dy, ds, x, w, rstd, offset, need_dw, symbolic=True)


def _native(plan: Plan | ByReference) -> Native | None:
    native = plan.native if isinstance(plan, Plan) else None
    return native if isinstance(native, Native) else None


# --- compiling and loading -----------------------------------------------------------------------------------


def built() -> Path:
    """Returns the path of the compiled library, compiling it first if necessary.

    If another process is compiling it, waits for that process.

    Raises:
        Unusable: if it cannot be compiled or must not be loaded.
        OSError: if a file operation fails.
    """
    target = _target()
    os.close(_built(target))
    return target


def _built(target: Path, not_inode: int | None = None) -> int:
    """As `built`, but returns a file descriptor. not_inode: the inode of a file that failed to load; it is replaced."""

    def existing() -> int | None:
        try:
            file = _found(target)
        except _Replaceable:
            return None
        if file is not None and os.fstat(file).st_ino == not_inode:
            os.close(file)
            return None
        return file

    begun = time.time()
    file = existing()
    if file is None:
        with _lock(target, wait=True) as lock:
            file = existing()
            if file is None:
                _check_failure(target, begun)  # of the process that held the lock while we waited
                if not _compiled(target, lock):
                    _check_failure(target, 0.0)
                    raise Unusable("it could not be compiled")
                file = _found(target)
    if file is None:
        raise Unusable(f"{target} is gone")
    return file


def _compiled(target: Path, lock: int | None) -> bool:
    """Compiles in a child process that ends when this process does, or in this process if none can be started."""
    if not _has_python():
        return build.compiled(str(target), _command())
    assert lock is not None
    compiling = _start(target, lock, os.getpid())
    try:
        return compiling.wait() == 0
    finally:
        compiling.terminate()
        compiling.wait()


def _compiled_in_background(target: Path) -> int | None:
    """Returns a file descriptor if the library exists; otherwise starts a process that compiles it and returns None.

    That process may outlive this one. It inherits the lock, so the lock is released however it ends.

    Raises:
        Unusable: if no process should be started.
    """
    with _lock(target, wait=False) as lock:
        if lock is None:
            _State.reason = _COMPILING
            return None
        file = _found(target)
        if file is not None:
            return file
        _check_failure(target, time.time() - _DAY)
        if _State.compiling is not None:
            raise Unusable(f"the process that compiled it ended with {_State.compiling.returncode}")
        if not _has_python():
            raise Unusable("it takes a Python to compile it beside this process: call rmsnorm.warmup()")
        _State.compiling = _start(target, lock, 0)
        _State.reason = _COMPILING
        return None


def _has_python() -> bool:
    return not getattr(sys, "frozen", False) and Path(sys.executable or "").name.startswith("python")


def _start(target: Path, lock: int, parent: int) -> "subprocess.Popen[bytes]":
    """Starts a process that compiles and inherits the lock. parent: the pid of the process it ends with, or 0."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", build.__file__, str(parent), str(target), *_command()], pass_fds=[lock],
        process_group=0, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _check_folder(target: Path) -> None:
    """Creates the folder if necessary. Raises Unusable if it is not writable, or other users can write to it."""
    folder = target.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.lstat(folder)
    except OSError as error:
        raise Unusable(f"nothing can be written into {folder}: {error.strerror}") from None
    fault = build.distrust(found) if stat.S_ISDIR(found.st_mode) else "is no folder"
    if fault is not None:
        raise Unusable(f"{folder} {fault}: delete it, or name a folder of your own in TORCH_EXTENSIONS_DIR")


class _Replaceable(Unusable):
    """The existing file must not be loaded, but it may be replaced."""


def _found(target: Path) -> int | None:
    """Returns a file descriptor, or None if the file is missing or incomplete.

    Raises:
        Unusable: if another user could have written the file.
    """
    _check_folder(target)
    try:
        file = build.opened(target)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _Replaceable(f"{target} cannot be opened: {error.strerror or error}{_WARMUP_RECOMPILES}") from None
    fault = build.distrust(os.fstat(file))
    if fault is None and build.unsealed(build.content(file)) is not None:
        build.mark_used(target.parent)
        return file
    os.close(file)
    if fault is not None:
        raise _Replaceable(f"{target} {fault}{_WARMUP_RECOMPILES}")
    return None


@contextlib.contextmanager
def _lock(target: Path, wait: bool) -> Iterator[int | None]:
    """Holds the compilation lock and yields its file descriptor; None if another process holds it and `wait` is false.

    Raises:
        Unusable: if the lock file cannot be created.
    """
    import fcntl  # Unix only; nothing is compiled on other systems

    _check_folder(target)
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(target.with_suffix(".lock"), flags, 0o600)
    except OSError as error:
        raise Unusable(f"{target.with_suffix('.lock')} cannot be written: {error.strerror}") from None
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
    """Raises Unusable if the same compiler command has failed since the time `since`."""
    failed = Path(f"{target}.failed")
    with contextlib.suppress(OSError):
        file = build.opened(failed)
        try:
            same = build.content(file).startswith(build.first_line(_command()))
            recent = os.fstat(file).st_mtime >= since
        finally:
            os.close(file)
        if same and recent:
            raise Unusable(f"it could not be compiled, see {failed}; rmsnorm.warmup() tries again")


def _command() -> list[str]:
    """The compiler command without `-o FILE`. Raises Unusable if there is no compiler."""
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


def _open(file: int, target: Path) -> None:
    """Loads the library from the descriptor that was checked, so that nobody can swap the file, and closes it."""
    global norm
    try:
        loader = importlib.machinery.ExtensionFileLoader(_NAME, f"/proc/self/fd/{file}")
        spec = importlib.util.spec_from_loader(_NAME, loader)
        assert spec is not None
        module: Any = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise _Replaceable(f"{target} cannot be loaded: {error}{_WARMUP_RECOMPILES}") from None
    finally:
        os.close(file)
    # This registers kernels for the operators; a call in another thread reads the dispatcher's table without a lock.
    # The Python kernels stay registered for all devices, so none is freed while a call uses it. But an entry is several
    # words: a call that reads it in the nanoseconds in which it is written can see a mix of both kernels and crash.
    # Calls of rms_norm and add_rms_norm with plain tensors bypass the dispatcher. To rule out such a crash for compiled
    # graphs and DTensors, call rmsnorm.warmup() before other threads run them, as docs/first-call.md says.
    planners = {
        "forward": _native_forward,
        "backward": _native_backward,
        "backward_of_sum": _native_backward_of_sum,
        "forward_pair": _native_forward_pair,
        "backward_pair": _native_backward_pair,
        "forward_sandwich": _native_forward_sandwich,
        "gated_forward": _native_gated_forward,
        "gated_backward": _native_gated_backward,
        "begin_forward": _native_begin_forward,
        "finish_forward": _native_finish_forward,
        "begin_backward": _native_begin_backward,
        "finish_backward": _native_finish_backward,
    }
    module.begin(planners, _check_saved)
    _State.module, norm = module, module.norm


def _open_built() -> None:
    """Compiles or waits, and loads; if loading fails, compiles once more."""
    target = _target()
    file = _built(target)
    not_inode = os.fstat(file).st_ino
    try:
        _open(file, target)
    except _Replaceable:
        _open(_built(target, not_inode), target)


def _target() -> Path:
    """The library's path for this source, Python and torch. Raises Unusable if the C++ is disabled or unsupported."""
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
