"""What a process brings with it: Numba's cache of compiled code, a missing Numba, what an import loads.

Each case runs in processes of its own, from a copy of the package, with a cache of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rmsnorm

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
    """A copy, so that no cache beside the sources takes part."""
    folder = tmp_path_factory.mktemp("copy")
    source = Path(rmsnorm.__file__).parent
    shutil.copytree(source, folder / "rmsnorm", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def start(package: Path, code: str, **environment: str) -> "subprocess.Popen[str]":
    # One thread each: several run at once on few cores.
    variables = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    variables.pop("NUMBA_CACHE_DIR", None)
    return subprocess.Popen(
        [sys.executable, "-c", code], env=variables | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> str:
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, err
    return out.strip()


@pytest.fixture(scope="module")
def cache(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that three processes filled at once, from nothing."""
    folder = tmp_path_factory.mktemp("cache")
    processes = [start(package, COMPUTE, NUMBA_CACHE_DIR=str(folder)) for _ in range(3)]
    assert [finish(process) for process in processes] == ["right"] * 3
    return folder


def files(cache: Path) -> list[Path]:
    return sorted(f for f in cache.rglob("*") if f.suffix in (".nbi", ".nbc"))


def test_processes_that_compile_at_once(cache) -> None:
    assert {f.suffix for f in files(cache)} == {".nbi", ".nbc"}, "there was nothing to compete for"


def test_the_cache_is_used(package, cache) -> None:
    code = "from numba.core.ccallback import CFunc\ndef fail(*args): raise AssertionError('compiled again')\n"
    code += "CFunc._compile_uncached = fail\n" + COMPUTE
    before = {f: f.stat().st_mtime_ns for f in files(cache)}
    assert finish(start(package, code, NUMBA_CACHE_DIR=str(cache))) == "right"
    assert {f: f.stat().st_mtime_ns for f in files(cache)} == before


@pytest.mark.parametrize("kind", [".nbi", ".nbc"])
def test_a_damaged_cache(kind, package, cache, tmp_path) -> None:
    """One file is empty, one cut short, one is noise."""
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    damaged = [f for f in files(folder) if f.suffix == kind]
    assert len(damaged) >= 3
    for i, f in enumerate(damaged):
        content = f.read_bytes()
        f.write_bytes((b"", content[: len(content) // 2], b"\xff\x00 no pickle")[i % 3])
    assert finish(start(package, COMPUTE, NUMBA_CACHE_DIR=str(folder))) == "right"


def test_no_folder_for_a_cache(package, tmp_path) -> None:
    """Neither the one that is asked for, nor one beside the sources, nor one in the user's home."""
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    (copy / "rmsnorm" / "kernels" / "__pycache__").write_text("a file, where a folder should be")
    file = tmp_path / "file"
    file.write_text("")
    nowhere = str(file / "folder")
    environment = {"NUMBA_CACHE_DIR": nowhere, "HOME": nowhere, "XDG_CACHE_HOME": nowhere}
    assert finish(start(copy, COMPUTE, **environment)) == "right"


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
def test_without_numba(how, reason, package, tmp_path) -> None:
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise SystemError('NumPy too new')")
    code = how.replace("sys.argv[1]", repr(str(tmp_path))) + "\n" + WITHOUT
    assert reason in finish(start(package, code))
