"""Which package may import which, and what `import rmsnorm` loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rmsnorm

ROOT = Path(rmsnorm.__file__).parent
# A module imports only what stands in a line above its own, or its own package. "" is the package root, `import rmsnorm`.
LAYERS = (
    ("errors", "bits", "compat"),
    ("memory", "spec"),
    ("reference",),
    ("gated_reference",),
    ("kernels",),
    ("ops",),
    ("functional",),
    ("modules",),
    ("costs",),
    ("patching",),
    ("register",),
    ("",),
    ("integrations", "tools"),
    ("__main__",),
)
LAYER = {package: i for i, layer in enumerate(LAYERS) for package in layer}
FILES = sorted(ROOT.rglob("*.py"))
# What `import rmsnorm` must not load: each takes long, or is there for one command alone.
HEAVY = ("numba", "triton", "transformers", "matplotlib", "multiprocessing.pool", "concurrent.futures.process",
         "rmsnorm.tools", "rmsnorm.integrations", "rmsnorm.kernels.cpu.intrinsics",
         "rmsnorm.kernels.gpu.kernels")  # fmt: skip


def module_of(file: Path, root: Path = ROOT) -> str:
    """Its dotted name below the package: "tools.cli", and "tools" for its __init__.py."""
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def known(name: str, root: Path) -> bool:
    path = root.joinpath(*name.split("."))
    return not name or path.with_suffix(".py").exists() or path.is_dir()


def imported(file: Path, root: Path = ROOT) -> set[str]:
    """The modules of the package that a file imports: at its top, inside functions, and by `import_module`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rmsnorm":
            below = (node.module or "").partition(".")[2]
            for alias in node.names:
                whole = f"{below}.{alias.name}".lstrip(".")
                found.add(whole if known(whole, root) else below)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "rmsnorm"]
            found |= {name.partition(".")[2] for name in names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            words = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            found |= {word.removeprefix("rmsnorm.").rstrip(".") for word in words if word.startswith("rmsnorm.")}
    return found


def forbidden(file: Path, root: Path = ROOT) -> set[str]:
    """What a file imports from another package of its own layer or of a higher one."""
    own = module_of(file, root).split(".")[0]
    others = {name for name in imported(file, root) if name.split(".")[0] != own or not own}
    return {name for name in others if LAYER[name.split(".")[0]] >= LAYER[own]}


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_a_module_imports_only_packages_below_its_own(file: Path) -> None:
    assert not forbidden(file)


def test_there_are_no_import_cycles() -> None:
    graph = {module_of(file): imported(file) for file in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path, name))
        if name not in done:
            for other in graph.get(name, set()) - {name}:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_package_is_assigned_to_a_layer() -> None:
    assert {module_of(file).split(".")[0] for file in FILES} == set(LAYER)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from rmsnorm import ops", {"ops"}),
        ("from rmsnorm.kernels import host", {"kernels.host"}),
        ("from rmsnorm.spec import Spec", {"spec"}),
        ("import rmsnorm", {""}),
        ("from rmsnorm import rms_norm", {""}),
        ("def f():\n    import rmsnorm.tools.cli", {"tools.cli"}),
        ("import importlib\nimportlib.import_module('rmsnorm.tools')", {"tools"}),
    ],
)
def test_the_check_sees_every_kind_of_import(code: str, found: set[str], tmp_path: Path) -> None:
    file = tmp_path / "spec.py"
    file.write_text(code)
    (tmp_path / "kernels").mkdir()
    for name in ("ops", "kernels/host"):
        (tmp_path / f"{name}.py").touch()
    assert imported(file, tmp_path) == found
    assert forbidden(file, tmp_path) == found - {"spec"}


@pytest.mark.short
def test_importing_the_package_loads_nothing_heavy_and_edits_nothing_outside_it() -> None:
    code = (
        "import sys, torch, torch.distributed.tensor; before = list(sys.meta_path), dict(sys.modules); import rmsnorm\n"
        "assert sys.meta_path == before[0], sys.meta_path\n"
        f"loaded = [n for n in {HEAVY!r} if n in sys.modules and n not in before[1]]\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
