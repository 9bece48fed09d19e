"""Calls without Python, by the plans that it makes: host.cpp.

    norm(x, residual, w, …), or an operator  ->  a plan, of which C++ asks Python once a kind  ->  what comes out
                                                 none: Python's turn

Nearly all of a small norm's time is Python's, not the kernel's. The C++ is compiled once: at the first call, by a
process of its own, meanwhile Python makes the calls; for 20 s, into torch's folder for extensions. The compiler is
$RMSNORM_CXX, else $CXX, else c++; with RMSNORM_CXX= (empty) all stays in Python.
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmsnorm import kernels
from rmsnorm.kernels import dispatch
from rmsnorm.kernels.host import build
from rmsnorm.kernels.plan import Backward, ByReference, Forward, Native, Plan
from rmsnorm.spec import Cast, Spec, caller, check_gradients, check_saved, check_tensors

_NAME = "rmsnorm_host"
_SOURCE = Path(__file__).with_name("host.cpp")
_FLAGS = ("-O2", "-DNDEBUG", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", f"-DRMSNORM_HOST={_NAME}")
_LIBRARIES = ("c10", "torch", "torch_cpu", "torch_python")
_BETWEEN_LOOKS, _DAY = 1.0, 86400.0  # seconds
_COMPILING = "the C++ is being compiled"
_AGAIN = "; rmsnorm.warmup() compiles it again"


class Unusable(Exception):
    """There will be no C++ in this process; the message says why."""


class _State:
    """Of this process: the C++, or why there is none; when to look again; whether waiting has failed; who compiles."""

    module: Any = None
    reason = "nothing was called yet"
    look_at = 0.0
    hopeless = False
    compiling: "subprocess.Popen[bytes] | None" = None


def _python_s_turn(*arguments: Any) -> None:
    return None


norm: Callable[..., Any] = _python_s_turn  # until the C++ is there


def look() -> None:
    """Load the C++ if it is there; if not, have it compiled."""
    if _State.module is not None or time.monotonic() < _State.look_at:
        return
    _State.look_at = time.monotonic() + _BETWEEN_LOOKS
    try:
        if _State.compiling is not None and _State.compiling.poll() is None:
            return
        target = _target()
        file = _found(target)
        if file is None:
            file = _compiled_beside(target)
        if file is not None:
            _open(file, target)
    except Exception as error:  # whatever it is, Python can make the calls
        if kernels.is_of_a_signal(error):
            raise
        _State.reason, _State.look_at = _words(error), float("inf")


def load() -> None:
    """As `look`, but compile or wait, also if looking has been given up. Raises Unusable, the next time at once."""
    if _State.module is not None:
        return
    try:
        if not _State.hopeless:
            _open_built()
            return
    except Exception as error:
        if kernels.is_of_a_signal(error):
            raise
        _State.reason, _State.hopeless, _State.look_at = _words(error), True, float("inf")
    raise Unusable(_State.reason)


def wait(seconds: float) -> bool:
    """As `look`, again and again for so long; whether it is settled by then who makes the calls."""
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
    """Who makes the calls, and why."""
    return "called from C++" if _State.module is not None else f"called from Python: {_State.reason}"


def made_by(plan: Plan, *arguments: Any) -> str:
    """Who would make this very call of `norm`, which has that plan, and why."""
    if _State.module is None or _State.module.makes(*arguments):
        return described()
    why = plan.native if isinstance(plan.native, str) else "C++ takes tensors of the current GPU"
    return f"called from Python: {why}"


@contextlib.contextmanager
def bypassed() -> Iterator[None]:
    """Meanwhile Python makes the calls of the public functions, and the gradients of what they return."""
    global norm
    before, norm = norm, _python_s_turn
    try:
        yield
    finally:
        norm = before


def forget() -> None:
    """All plans that the C++ has."""
    if _State.module is not None:
        _State.module.forget()


# --- what the C++ asks ---------------------------------------------------------------------------------------


def _native_forward(
    x: Tensor, residual: Tensor | None, w: Tensor | None, eps: float, cast: Cast, offset: float, with_rstd: bool
) -> Native | None:
    """The plan for calls of this kind; None if Python makes them, or says what is wrong with them."""
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
    try:
        check_gradients(caller(ds), dy, ds, x, w, rstd, offset, need_dw)
        spec = Spec(0.0, cast, offset)
    except (TypeError, ValueError):
        return None
    return _native(dispatch.plan_backward(Backward.of(dy, ds, x, w, rstd, spec, need_dx, need_dw)))


def _check_saved(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, rstd: Tensor, offset: float, need_dw: bool,
    x_dtype: torch.dtype, w_dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raise what is wrong with what was saved for a backward pass that C++ does not make."""
    check_saved("rms_norm", x, w, x_dtype, w_dtype)
    check_gradients(caller(ds), dy, ds, x, w, rstd, offset, need_dw, symbolic=True)


def _native(plan: Plan | ByReference) -> Native | None:
    native = plan.native if isinstance(plan, Plan) else None
    return native if isinstance(native, Native) else None


# --- how it is built -----------------------------------------------------------------------------------------


def built() -> Path:
    """The file, compiled unless it was, by this process or by one that does so already. Raises Unusable, or OSError."""
    target = _target()
    os.close(_built(target))
    return target


def _built(target: Path, unlike: int | None = None) -> int:
    """As `built`, and open. unlike: the inode of one that cannot be loaded, and is to be replaced."""

    def there() -> int | None:
        try:
            file = _found(target)
        except _Replaceable:
            return None
        if file is not None and os.fstat(file).st_ino == unlike:
            os.close(file)
            return None
        return file

    begun = time.time()
    file = there()
    if file is None:
        with _lock(target, wait=True) as lock:
            file = there()
            if file is None:
                _check_failure(target, begun)  # whoever it was that we waited for
                if not _compiled(target, lock):
                    _check_failure(target, 0.0)
                    raise Unusable("it could not be compiled")
                file = _found(target)
    if file is None:
        raise Unusable(f"{target} is gone")
    return file


def _compiled(target: Path, lock: int | None) -> bool:
    """Whether it was, by a process that ends with this one where there can be one, else by this one."""
    if not _has_python():
        return build.compiled(str(target), _command())
    assert lock is not None
    compiling = _start(target, lock, os.getpid())
    try:
        return compiling.wait() == 0
    finally:
        compiling.terminate()
        compiling.wait()


def _compiled_beside(target: Path) -> int | None:
    """The file, open, if it is there now. If not, a process of its own compiles it, since this one may end sooner.

    That process inherits the lock, so however it ends nobody waits for it in vain. Raises Unusable where none should.
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
    """A process that compiles it, and inherits the lock. parent: the process that it ends with, or 0."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", build.__file__, str(parent), str(target), *_command()], pass_fds=[lock],
        process_group=0, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _check_folder(target: Path) -> None:
    """Make the folder if there is none. Raises Unusable if others could put something into it, or nobody can."""
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
    """What is there must not be loaded, but may be replaced."""


def _found(target: Path) -> int | None:
    """The file, open; None if there is none, or not all of it. Raises Unusable if others can have put it there."""
    _check_folder(target)
    try:
        file = build.opened(target)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _Replaceable(f"{target} cannot be opened: {error.strerror or error}{_AGAIN}") from None
    fault = build.distrust(os.fstat(file))
    if fault is None and build.unsealed(build.content(file)) is not None:
        return file
    os.close(file)
    if fault is not None:
        raise _Replaceable(f"{target} {fault}{_AGAIN}")
    return None


@contextlib.contextmanager
def _lock(target: Path, wait: bool) -> Iterator[int | None]:
    """The file that whoever compiles holds locked; None if another does and one is not to wait.

    Raises Unusable where no file can be.
    """
    import fcntl  # not everywhere, but nothing is compiled elsewhere

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
    """Raise Unusable if the very command has failed since then."""
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


def _open(file: int, target: Path) -> None:
    """Load the very file that was examined, and close it."""
    global norm
    try:
        loader = importlib.machinery.ExtensionFileLoader(_NAME, f"/proc/self/fd/{file}")
        spec = importlib.util.spec_from_loader(_NAME, loader)
        assert spec is not None
        module: Any = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise _Replaceable(f"{target} cannot be loaded: {error}{_AGAIN}") from None
    finally:
        os.close(file)
    module.begin(_native_forward, _native_backward, _check_saved)
    _State.module, norm = module, module.norm


def _open_built() -> None:
    """Compile or wait, and load; compile once more what cannot be loaded."""
    target = _target()
    file = _built(target)
    unlike = os.fstat(file).st_ino
    try:
        _open(file, target)
    except _Replaceable:
        _open(_built(target, unlike), target)


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
