"""Tests that need their own processes: the cache of machine code, a missing Numba, and what an import loads.

Each runs a copy of the package with its own cache, mostly in a process in which torch is already imported.
"""

import compileall
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rmsnorm
from forked import Forked

COMPUTE = """
import hashlib, sys, torch
from rmsnorm import explain, reference, rms_norm
g = torch.Generator().manual_seed(3)
x, w, dy = (torch.randn(s, generator=g).bfloat16() for s in ((40, 96), (96,), (40, 96)))
assert "Numba" in explain(x, w) and "reference" not in explain(x, w), explain(x, w)
leaves = x.requires_grad_(), w.requires_grad_()
y = rms_norm(x, w)
got = (y, *torch.autograd.grad(y, leaves, dy))
y, _, rstd = reference.forward(x, None, w, 1e-6, "early", 0.0, True)
expected = (y, *reference.backward(dy, None, x, w, rstd, "early", 0.0, True, True))
for a, b in zip(got, expected):
    assert torch.equal(a, b)
print("right")
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package that a test may change."""
    folder = tmp_path_factory.mktemp("copy")
    source = Path(rmsnorm.__file__).parent
    shutil.copytree(source, folder / "rmsnorm", ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(folder, quiet=2)  # once for all processes
    return folder


def start(package: Path, code: str, **environment: str) -> Forked:
    """A process in which torch is already imported."""
    return Forked(code, _variables(package) | environment)


def start_python(package: Path, code: str, **environment: str) -> "subprocess.Popen[str]":
    """A process that was not forked: in a forked one the kernels do not use OpenMP's threads."""
    return subprocess.Popen(
        [sys.executable, "-c", code], env=_variables(package) | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def _variables(package: Path) -> dict[str, str]:
    # One thread each: several run at once on few cores.
    variables = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("NUMBA_CACHE_DIR", "RMSNORM_CACHE_DIR"):
        variables.pop(name, None)
    return variables


def finish(process: "Forked | subprocess.Popen[str]") -> str:
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, err
    return out.strip()


@pytest.fixture(scope="module")
def cache(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that three processes filled concurrently."""
    folder = tmp_path_factory.mktemp("cache")
    processes = [start(package, COMPUTE, NUMBA_CACHE_DIR=str(folder)) for _ in range(3)]
    assert [finish(process) for process in processes] == ["right"] * 3
    return folder


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.nbc"))


def test_concurrent_processes_leave_a_complete_cache(cache) -> None:
    assert len(files(cache)) >= 3, "there was nothing to compete for"
    assert not list(cache.rglob("scratch.*"))


NOTHING_COMPILES = """
from numba.core.ccallback import CFunc
def fail(*args): raise AssertionError('nothing can be compiled')
CFunc._compile_uncached = fail
"""


def test_a_second_process_loads_kernels_from_the_cache(package, cache) -> None:
    code = NOTHING_COMPILES + COMPUTE
    before = {f: f.stat().st_mtime_ns for f in files(cache)}
    assert finish(start(package, code, NUMBA_CACHE_DIR=str(cache))) == "right"
    assert {f: f.stat().st_mtime_ns for f in files(cache)} == before


def damage(content: bytes, way: int) -> bytes:
    """Damages a file: empty, truncated, garbage, zeros at the end, zeros in the machine code, or one bit flipped."""
    middle = len(content) // 2
    return (
        b"", content[:middle], b"\xff\x00 no pickle", content[:middle] + bytes(len(content) - middle),
        content[:middle] + bytes(256) + content[middle + 256:],
        content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:],
    )[way]  # fmt: skip


@pytest.mark.parametrize("way", range(6))
def test_damaged_cache_files_are_replaced(way, package, cache, tmp_path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    assert len(files(folder)) >= 3
    for f in files(folder):
        f.write_bytes(damage(f.read_bytes(), way))
    assert finish(start(package, COMPUTE, NUMBA_CACHE_DIR=str(folder))) == "right"
    assert finish(start(package, NOTHING_COMPILES + COMPUTE, NUMBA_CACHE_DIR=str(folder))) == "right"


def test_the_cache_of_another_source_is_not_used(package, cache, tmp_path) -> None:
    """The edit changes no line of code, so the cache files have the same names."""
    copy, folder = package / "other", tmp_path / "cache"
    shutil.copytree(package / "rmsnorm", copy / "rmsnorm")
    shutil.copytree(cache, folder)
    ((of_package,),) = [list(folder.iterdir())]
    source = copy / "rmsnorm" / "kernels" / "cpu" / "kernels.py"
    source.write_text(source.read_text() + "# edited\n")
    assert finish(start(copy, COMPUTE, NUMBA_CACHE_DIR=str(folder))) == "right"
    (of_copy,) = [f for f in folder.iterdir() if f != of_package]
    assert [f.name for f in files(of_copy)] == [f.name for f in files(of_package)]
    for f in files(of_package):
        shutil.copy(f, of_copy)
    before = {f: f.read_bytes() for f in files(of_copy)}
    assert finish(start(copy, COMPUTE, NUMBA_CACHE_DIR=str(folder))) == "right"
    assert all(f.read_bytes() != content for f, content in before.items())


def test_machine_code_is_cached_in_the_users_cache_folder_only(package, tmp_path) -> None:
    """Files beside the sources would remain after the package is uninstalled."""
    home = tmp_path / "home"
    own, numbas, xdg = (str(tmp_path / name) for name in ("own", "numbas", "xdg"))
    places = [
        ({}, home / ".cache" / "rmsnorm"),
        (
            {"XDG_CACHE_HOME": "relative"},
            home / ".cache" / "rmsnorm",
        ),  # its specification says to ignore relative paths
        ({"XDG_CACHE_HOME": xdg}, tmp_path / "xdg" / "rmsnorm"),
        ({"XDG_CACHE_HOME": xdg, "NUMBA_CACHE_DIR": numbas}, tmp_path / "numbas"),
        ({"XDG_CACHE_HOME": xdg, "NUMBA_CACHE_DIR": numbas, "RMSNORM_CACHE_DIR": own}, tmp_path / "own"),
    ]
    code = "import torch, rmsnorm; print(rmsnorm.explain(torch.ones(2, 8)))"
    shipped = set(package.rglob("*"))
    for environment, place in places:
        home.mkdir()
        environment = {"HOME": str(home), "XDG_CACHE_HOME": "", "RMSNORM_CXX": ""} | environment
        assert "cpu kernel (Numba)" in finish(start(package, code, **environment))
        kept = files(tmp_path)
        assert [f.parent.parent for f in kept] == [place]
        assert place.stat().st_mode & 0o777 == 0o700
        for child in tmp_path.iterdir():
            shutil.rmtree(child)
    assert set(package.rglob("*")) == shipped


def test_kernels_work_without_a_cache_folder(package, tmp_path) -> None:
    """Neither the configured folder nor one in the user's home can be created."""
    file = tmp_path / "file"
    file.write_text("")
    nowhere = str(file / "folder")
    environment = {"NUMBA_CACHE_DIR": nowhere, "HOME": nowhere, "XDG_CACHE_HOME": nowhere}
    assert finish(start(package, COMPUTE, **environment)) == "right"


NO_HOOK = """
import sys, numba.core
del numba.core.sigutils
sys.modules["numba.core.sigutils"] = None
"""


def test_kernels_work_without_the_private_names_of_numba_that_the_cache_uses(package, tmp_path) -> None:
    code = NO_HOOK + COMPUTE + "print(explain(x, w))"
    right, said = finish(start(package, code, NUMBA_CACHE_DIR=str(tmp_path))).splitlines()
    assert right == "right"
    assert "cannot be kept: this version of Numba does not allow others to store what it compiles" in said
    assert not files(tmp_path)


def test_a_new_cache_folder_removes_only_those_that_were_not_used_for_30_days(package, tmp_path) -> None:
    """One of them stays if it holds a file that is not ours, or another process compiles into it, or is a link."""
    import fcntl

    base, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    now, day = time.time(), 24 * 60 * 60

    def made(folder: Path, days: float, *more: str) -> Path:
        folder.mkdir(parents=True)
        for name in ("forward.0.nbc", "rmsnorm.compiling", "scratch.1", *more):
            (folder / name).write_text("")
            os.utime(folder / name, (now - 40 * day,) * 2)
        os.utime(folder, (now - days * day,) * 2)
        return folder

    unused, used, foreign, held = (base / f"numba-{digit * 16}" for digit in "abcd")
    stay = [made(used, 20), made(foreign, 40, "mine.txt"), made(held, 40), made(base / "numba-kernels", 40)]
    read = made(base / f"numba-{'1' * 16}", 40)
    os.utime(read / "forward.0.nbc", (now - 20 * day, now - 40 * day))
    link = base / f"numba-{'e' * 16}"
    link.symlink_to(made(elsewhere, 40))
    os.utime(link, (now - 40 * day,) * 2, follow_symlinks=False)
    stay += [read, link, elsewhere]
    made(unused, 40)
    with open(held / "rmsnorm.compiling", "a") as lock:
        os.utime(held / "rmsnorm.compiling", (now - 40 * day,) * 2)
        fcntl.flock(lock, fcntl.LOCK_EX)
        code = "import torch, rmsnorm; rmsnorm.rms_norm(torch.ones(2, 8))"
        finish(start(package, code, RMSNORM_CACHE_DIR=str(base), RMSNORM_CXX=""))
    assert not unused.exists()
    assert [folder for folder in stay if not folder.exists()] == []
    assert all((folder / "forward.0.nbc").exists() for folder in stay)
    (new,) = set(base.iterdir()) - set(stay)
    os.utime(new, (now - 40 * day,) * 2)
    finish(start(package, code, RMSNORM_CACHE_DIR=str(base), RMSNORM_CXX=""))
    assert new.stat().st_mtime > now - day, "the folder in use does not look so"


def test_import_loads_no_compiler_and_no_transformers(package) -> None:
    code = """
import sys, rmsnorm
print(*sorted({m.partition(".")[0] for m in sys.modules} & {"numba", "llvmlite", "triton", "transformers"}))
"""
    assert finish(start(package, code)) == ""


WITHOUT = """
import torch, rmsnorm
from rmsnorm import reference
x, w = torch.randn(5, 7).requires_grad_(), torch.randn(7).requires_grad_()
said = rmsnorm.explain(x, w)
assert "reference" in said and "Numba" in said, said
y = rmsnorm.rms_norm(x, w)
expected, _, rstd = reference.forward(x, None, w, 1e-6, "early", 0.0, True)
assert torch.equal(y, expected)
dy = torch.randn(5, 7)
dx, dw = torch.autograd.grad(y, (x, w), dy)
for a, b in zip((dx, dw), reference.backward(dy, None, x, w, rstd, "early", 0.0, True, True)):
    assert torch.equal(a, b)
assert torch.equal(torch.compile(rmsnorm.rms_norm, backend="eager")(x, w), expected)
rmsnorm.warmup()
print(said)
"""


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("import sys; sys.modules['numba'] = None", "ModuleNotFoundError"),
        ("sys = __import__('sys'); sys.path.insert(0, sys.argv[1])", "NumPy too new"),
    ],
    ids=["numba is missing", "numba is broken"],
)
def test_the_reference_computes_without_numba(how, reason, package, tmp_path) -> None:
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise SystemError('NumPy too new')")
    code = how.replace("sys.argv[1]", repr(str(tmp_path))) + "\n" + WITHOUT
    assert reason in finish(start(package, code))
