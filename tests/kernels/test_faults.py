"""Signals, forks, processors without fp16, and a Numba that cannot compile, each in its own process."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from test_processes import NOTHING_COMPILES, finish, package, start, start_python  # noqa: F401

# --- signals and forks ---------------------------------------------------------------------------------------

_SIGNALS = """
import os, random, signal, sys, time
import torch, rmsnorm
from rmsnorm.kernels.cpu import threads
torch.set_num_threads(3)
x, w = torch.randn(4000, 512), torch.randn(512)
dy = torch.randn(4000, 512)
class Timeout(Exception): pass
def handler(*_): raise Timeout
signal.signal(signal.SIGALRM, handler)
def call(x):
    y = torch.ops.rmsnorm.forward.default(x, None, w, 1e-6, "early", 0.0, True)
    return (y[0], *torch.ops.rmsnorm.backward.default(dy, None, x, w, y[2], "early", 0.0, True, True))
expected = call(x)
def loop():
    seen = 0
    deadline = time.monotonic() + 60
    while seen < 60 and time.monotonic() < deadline:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 6e-3), 1e-3)
            try:
                got = call(torch.clone(x))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Timeout:
            seen += 1
            continue
        for a, b in zip(got, expected):
            assert torch.equal(a, b)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    assert seen >= 60, seen
    for a, b in zip(call(x), expected):
        assert torch.equal(a, b)
"""
_IN_CHILD = """
def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + 90
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            sys.exit("the child hangs")
        time.sleep(0.02)
    assert os.waitstatus_to_exitcode(ended[1]) == 0, os.waitstatus_to_exitcode(ended[1])
"""


@pytest.mark.parametrize(
    "where", ["in_child(loop)", "loop()", "threads._team_of_openmp = lambda: None; loop()"],
    ids=["forked child", "torch's threads", "pool"],
)  # fmt: skip
def test_an_exception_in_a_signal_handler_leaves_no_thread_running(where, package) -> None:  # noqa: F811
    code = _SIGNALS + _IN_CHILD
    # torch's own parallel functions hang in a forked child: the copy is made by numpy.
    code = code.replace("torch.clone(x)", "torch.from_numpy(x.numpy().copy())")
    code = code.replace("torch.equal(a, b)", "(a.numpy() == b.numpy()).all()")
    assert finish(start_python(package, f"{code}\n{where}\nprint('right')")) == "right"


_IMPORTED_IN_A_CHILD = """
import os, sys, time
import numpy, torch
torch.set_num_threads(3)
torch.ones(3000, 1280).exp_().sum()  # starts OpenMP threads, which a child does not inherit
x = numpy.random.default_rng(0).standard_normal((3000, 1280)).astype("float32")
def work():
    import rmsnorm
    y = rmsnorm.rms_norm(torch.from_numpy(x))
    expected = x / numpy.sqrt((x.astype("float64") ** 2).mean(-1, keepdims=True) + 1e-6)
    assert abs(y.numpy() - expected).max() < 1e-5
def twice():
    in_child(work)
    work()
"""


@pytest.mark.parametrize("how", ["in_child(work)", "in_child(twice)"], ids=["a child", "a child and its child"])
def test_a_forked_child_that_imports_the_package_computes(how, package) -> None:  # noqa: F811
    if not Path("/proc/self/stat").exists():
        pytest.skip("this system does not say whether a process was forked")
    assert finish(start_python(package, _IMPORTED_IN_A_CHILD + _IN_CHILD + how + "\nprint('right')")) == "right"


def test_a_forked_child_computes_if_it_cannot_tell_that_it_was_forked(package) -> None:  # noqa: F811
    unknown = "import pathlib\ndef fail(self): raise FileNotFoundError(self)\npathlib.Path.read_bytes = fail\n"
    code = unknown + _IMPORTED_IN_A_CHILD + _IN_CHILD + "in_child(work)\nprint('right')"
    assert finish(start_python(package, code)) == "right"


_TIMEOUT_IN_THE_FIRST_CALL = """
import functools, signal, torch, rmsnorm
from numba.core.ccallback import CFunc
class Timeout(Exception): pass
class Handler:
    def __call__(self, *_): raise Timeout
def raises(*_): raise Timeout
@functools.wraps(print)
def wrapper(*_): raise Timeout
signal.signal(signal.SIGALRM, HANDLER)
compiled = CFunc._compile_uncached
def interrupted(self):
    signal.raise_signal(signal.SIGALRM)
    return compiled(self)
CFunc._compile_uncached = interrupted
x = torch.randn(3, 8)
for call in (lambda: rmsnorm.rms_norm(x), lambda: rmsnorm.explain(x)):
    try:
        call()
    except Timeout:
        pass
    else:
        raise AssertionError("the exception was lost")
CFunc._compile_uncached = compiled
rmsnorm.rms_norm(x)
print(rmsnorm.explain(x))
"""


@pytest.mark.parametrize(
    "handler", [
        "raises", "Handler()", "Handler().__call__", "functools.partial(raises, 1)",
        "functools.partial(functools.partial(Handler(), 1), 2)", "functools.lru_cache(raises)", "wrapper",
    ],
)  # fmt: skip
def test_a_timeout_during_the_first_call_is_raised_and_the_next_call_works(handler, package, tmp_path) -> None:  # noqa: F811
    code = _TIMEOUT_IN_THE_FIRST_CALL.replace("HANDLER", handler)
    said = finish(start(package, code, NUMBA_CACHE_DIR=str(tmp_path), RMSNORM_CXX=""))
    assert said.startswith("cpu, float32: cpu kernel (Numba)")


# --- kernels or the reference --------------------------------------------------------------------------------

_EVERYTHING = """
import itertools, torch, rmsnorm
from rmsnorm import gated_reference, reference
from rmsnorm.spec import Gate, Spec
def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
floats = (torch.float32, torch.bfloat16, torch.float16)
for dtype, of_w, of_residual, N, cast in itertools.product(floats, (*floats, None), (*floats, None), (7, 8), ("early", "late")):
    if N == 7 and of_residual is not None:
        continue
    x = torch.randn(5, N).to(dtype).requires_grad_()
    w = None if of_w is None else torch.randn(N).to(of_w).requires_grad_()
    residual = None if of_residual is None else torch.randn(5, N).to(of_residual).requires_grad_()
    leaves = [t for t in (x, residual, w) if t is not None]
    if residual is None:
        y = rmsnorm.rms_norm(x, w, cast=cast)
    else:
        y, s = rmsnorm.add_rms_norm(x, residual, w, cast=cast)
    expected, s_ref, rstd = reference.forward(x, residual, w, 1e-6, cast, 0.0, True)
    same(y, expected)
    dy = torch.randn(5, N).to(y.dtype)
    grads = torch.autograd.grad(y, leaves, dy)
    dx, dw = reference.backward(dy, None, x if s_ref is None else s_ref, w, rstd, cast, 0.0, True, w is not None)
    same(grads[0], dx.to(x.dtype))
    if w is not None:
        same(grads[-1], dw)
many = torch.randn(3000, 128)
same(rmsnorm.rms_norm(many), reference.forward(many, None, None, 1e-6, "early", 0.0, False)[0])
for dtype, of_gate in itertools.product(floats, floats):
    x, gate, w = (t.requires_grad_() for t in (torch.randn(5, 8).to(dtype), torch.randn(5, 8).to(of_gate), torch.randn(8)))
    y = rmsnorm.gated_rms_norm(x, gate, w, groups=2)
    spec, dy = Spec(gate=Gate(), groups=2), torch.randn(5, 8).to(y.dtype)
    expected, rstd = gated_reference.forward(x, gate, w, spec, True)
    gradients = gated_reference.backward(dy, x, gate, w, rstd, spec, True, True, True)
    for a, b in zip((y, *torch.autograd.grad(y, (x, gate, w), dy)), (expected, *gradients), strict=True):
        same(a, b)
rmsnorm.warmup()
for dtype in floats:
    print(rmsnorm.explain(torch.ones(2, 8, dtype=dtype), torch.ones(8, dtype=dtype)))
print(rmsnorm.explain(torch.ones(2, 8, dtype=floats[1]), residual=torch.ones(2, 8, dtype=floats[1])))
print(rmsnorm.explain(torch.ones(2, 8), gate=torch.ones(2, 8)))
"""


@pytest.mark.parametrize("processor", ["generic", "nehalem", "x86-64-v2"])
def test_the_reference_computes_fp16_and_gated_norms_on_an_old_processor(processor, package, tmp_path) -> None:  # noqa: F811
    """The cache may also hold code for another processor, which must not be loaded."""
    if os.uname().machine != "x86_64":
        pytest.skip("the processors are those of x86")
    environment = {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""}
    fp32, bf16, fp16, added, gated = finish(start(package, _EVERYTHING, **environment)).splitlines()
    for said in (fp32, bf16, added):
        assert "cpu kernel (Numba)" in said
    assert "reference" in fp16
    assert "no instructions for fp16" in fp16
    assert "no instructions for fp16 or fma: computed by plain torch" in gated


def test_the_kernel_computes_fp16_on_a_processor_with_it(package, tmp_path) -> None:  # noqa: F811
    if os.uname().machine != "x86_64":
        pytest.skip("the processor is one of x86")
    environment = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+f16c,+avx"}
    code = "import torch, rmsnorm; print(rmsnorm.explain(torch.ones(2, 8).half()))"
    if "f16c" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no fp16")
    assert "cpu kernel (Numba)" in finish(start(package, code, NUMBA_CACHE_DIR=str(tmp_path), **environment))


@pytest.mark.parametrize("full", [False, True], ids=["empty cache", "cached kernels"])
def test_the_reference_computes_if_numba_jit_is_disabled(full, package, cache, tmp_path) -> None:  # noqa: F811
    folder = cache if full else tmp_path
    out = finish(start(package, _EVERYTHING, NUMBA_CACHE_DIR=str(folder), NUMBA_DISABLE_JIT="1"))
    for said in out.splitlines():
        assert "reference" in said
        assert "NUMBA_DISABLE_JIT is set" in said


_LLVM = "import llvmlite.binding\ndef fail(*args, **kwargs): raise RuntimeError('no LLVM')\n"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (NOTHING_COMPILES, "AssertionError: nothing can be compiled"),
        (_LLVM + "llvmlite.binding.parse_assembly = fail\n", "RuntimeError: no LLVM"),
        (_LLVM + "llvmlite.binding.create_mcjit_compiler = fail\n", "RuntimeError: no LLVM"),
        ("import sys; sys.modules['llvmlite'] = None\n", "Numba cannot be used"),
        ("import sys; sys.modules['filelock'] = None\n", "Numba cannot be used"),
    ],
    ids=["compiler", "LLVM's parser", "LLVM's engine", "no llvmlite", "no filelock"],
)  # fmt: skip
def test_the_reference_computes_if_numba_cannot_compile(how, reason, package, tmp_path) -> None:  # noqa: F811
    out = finish(start(package, how + _EVERYTHING, NUMBA_CACHE_DIR=str(tmp_path)))
    for said in out.splitlines():
        assert "reference" in said
        assert reason in said


_FAILS_WITH_ITS_SIGNATURE = """
import torch, rmsnorm
from numba.core.ccallback import CFunc
def fail(self): raise RuntimeError(self._sig)
CFunc._compile_uncached = fail
for dtype, N in ((torch.float32, 8), (torch.bfloat16, 8), (torch.float32, 16)):
    print(rmsnorm.explain(torch.ones(2, N, dtype=dtype)))
"""


def test_explain_says_why_the_kernel_of_this_very_call_cannot_be_compiled(package, tmp_path) -> None:  # noqa: F811
    out = finish(start(package, _FAILS_WITH_ITS_SIGNATURE, NUMBA_CACHE_DIR=str(tmp_path)))
    of_float, of_bfloat, of_float_again = (line.partition("RuntimeError")[2] for line in out.splitlines())
    assert of_float_again == of_float != of_bfloat


def test_the_reference_computes_the_backward_pass_if_only_forward_kernels_were_compiled(package, tmp_path) -> None:  # noqa: F811
    forward = "import torch, rmsnorm\nrmsnorm.rms_norm(torch.randn(3, 8))\n"
    finish(start(package, forward, NUMBA_CACHE_DIR=str(tmp_path)))
    out = finish(start(package, NOTHING_COMPILES + _EVERYTHING, NUMBA_CACHE_DIR=str(tmp_path))).splitlines()
    assert ["reference" in said for said in out] == [False, True, True, True, True]


# --- Numba's cache -------------------------------------------------------------------------------------------

_SMALL = """
import torch, rmsnorm
x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
rmsnorm.rms_norm(x, w).sum().backward()
print(rmsnorm.explain(x, w))
"""
_ONE_KERNEL = """
import torch, rmsnorm
x, w = torch.randn(3, 8), torch.randn(8)
rmsnorm.rms_norm(x, w)
print(rmsnorm.explain(x, w))
"""
_RUNS = "cpu, float32: cpu kernel (Numba)"
_NOT_KEPT = "each process compiles the kernel, because it cannot be kept"
_NOBODY = 65534


def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files to another user")


@pytest.fixture(scope="module")
def cache(package, tmp_path_factory) -> Path:  # noqa: F811
    return filled(tmp_path_factory.mktemp("small"), package, _SMALL)


@pytest.fixture(scope="module")
def cache_of_one(package, tmp_path_factory) -> Path:  # noqa: F811
    """A cache of one file."""
    return filled(tmp_path_factory.mktemp("one"), package, _ONE_KERNEL)


def filled(folder: Path, package: Path, code: str) -> Path:  # noqa: F811
    assert _NOT_KEPT not in finish(start(package, code, NUMBA_CACHE_DIR=str(folder)))
    return folder


_EXECUTED = """
import pickle
whole = pickle.loads
def loads(*args, **kwargs):
    print("executed")
    return whole(*args, **kwargs)
pickle.loads = loads
"""


def executed(package: Path, folder: Path, code: str = _ONE_KERNEL) -> bool:  # noqa: F811
    """Whether a process executes machine code, or anything else, of the cache."""
    out = finish(start(package, _EXECUTED + code, NUMBA_CACHE_DIR=str(folder), RMSNORM_CXX=""))
    assert _RUNS in out
    return "executed" in out


def test_a_cache_that_other_users_can_write_is_not_used(package, cache_of_one) -> None:  # noqa: F811
    assert executed(package, cache_of_one)
    (leaf,) = (f for f in cache_of_one.iterdir() if f.is_dir())
    file = next(leaf.glob("*.nbc"))
    for path, mode in ((cache_of_one, 0o777), (leaf, 0o777), (leaf, 0o1777), (leaf, 0o770)):
        before = path.stat().st_mode
        path.chmod(mode)
        assert not executed(package, cache_of_one), (path, oct(mode))
        path.chmod(before)
    cache_of_one.chmod(0o1777)  # as /tmp
    assert executed(package, cache_of_one)
    cache_of_one.chmod(0o700)
    for f in leaf.glob("*.nbc"):
        f.chmod(0o666)
    assert not executed(package, cache_of_one)
    assert file.stat().st_mode & 0o777 == 0o644  # replaced
    assert executed(package, cache_of_one)


def test_a_cache_of_another_user_is_not_used(package, cache_of_one, tmp_path) -> None:  # noqa: F811
    as_root()
    (leaf,) = (f for f in cache_of_one.iterdir() if f.is_dir())
    os.chown(leaf, _NOBODY, _NOBODY)
    assert not executed(package, cache_of_one)
    os.chown(leaf, 0, 0)
    os.chown(cache_of_one, _NOBODY, _NOBODY)
    assert not executed(package, cache_of_one)
    os.chown(cache_of_one, 0, 0)
    assert executed(package, cache_of_one)
    for f in leaf.glob("*.nbc"):
        os.chown(f, _NOBODY, _NOBODY)
    assert not executed(package, cache_of_one)
    for f in leaf.glob("*.nbc"):
        f.rename(tmp_path / f.name)
        f.symlink_to(tmp_path / f.name)
    assert not executed(package, cache_of_one)
    assert executed(package, cache_of_one)


def test_a_cache_file_is_only_loaded_for_its_own_signature(package, cache, tmp_path) -> None:  # noqa: F811
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    files = sorted(folder.rglob("*.nbc"))
    contents = [f.read_bytes() for f in files]
    assert len(set(contents)) >= 3
    for f, content in zip(files, contents[1:] + contents[:1], strict=True):
        f.write_bytes(content)
    assert not executed(package, folder, _SMALL)
    assert executed(package, folder, _SMALL)  # newly compiled files have replaced them


@pytest.mark.parametrize("name", ["rmsnorm.lock", "rmsnorm.compiling"])
def test_a_held_lock_does_not_block_reading_the_cache(name, package, cache_of_one) -> None:  # noqa: F811
    import fcntl

    (leaf,) = (f for f in cache_of_one.iterdir() if f.is_dir())
    with open(leaf / name, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert executed(package, cache_of_one)  # and waits for nothing: see the next


def test_a_held_lock_delays_compiling_only_once(package, cache, tmp_path) -> None:  # noqa: F811
    """A process waits only once for the holder of the lock, however many kernels there are to compile."""
    import fcntl

    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    (leaf,) = (f for f in folder.iterdir() if f.is_dir())
    for f in leaf.glob("*.nbc"):
        f.unlink()
    lock = leaf / "rmsnorm.compiling"
    assert lock.stat().st_mode & 0o777 == 0o600
    waits = """
import filelock
acquire = filelock.FileLock.acquire
def noted(self, *args, **kwargs):
    print("timeout", self.timeout)
    self.timeout = 0
    return acquire(self, *args, **kwargs)
filelock.FileLock.acquire = noted
"""
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        out = finish(start(package, waits + _SMALL, NUMBA_CACHE_DIR=str(folder))).splitlines()
    found = [float(line.split()[1]) for line in out if line.startswith("timeout")]
    assert len(found) >= 3
    assert found[0] <= 10
    assert not any(found[1:])


@pytest.mark.parametrize("what", ["file", "read-only"])
def test_an_unusable_cache_folder_does_not_prevent_compiling(what, package, tmp_path) -> None:  # noqa: F811
    place = tmp_path / "place"
    if what == "file":
        place.write_text("")
    else:
        place.mkdir()
    fixed = ["chattr", "+i", str(place)]
    if what == "read-only" and subprocess.run(fixed, capture_output=True, check=False).returncode != 0:
        pytest.skip("no folder can be made immutable here")
    try:
        out = finish(start(package, _SMALL, NUMBA_CACHE_DIR=str(place), HOME=str(place), XDG_CACHE_HOME=str(place)))
    finally:
        if what == "read-only":
            subprocess.run(["chattr", "-i", str(place)], check=True)
    assert _RUNS in out
    assert f"{_NOT_KEPT}: {place}" in out
