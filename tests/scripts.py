"""Loads the scripts of benchmarks/, which are no package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


def benchmark_results() -> Path:
    """The folder benchmarks/results/. Skips the test if it is not here."""
    if not (FOLDER / "results").is_dir():
        pytest.skip("benchmarks/results/ is not here: this is not the repository")
    return FOLDER / "results"


def benchmark_script(name: str) -> ModuleType:
    """The script benchmarks/NAME.py as a module. Skips the test if benchmarks/results/ is not here."""
    benchmark_results()
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # where a script finds the modules that it imports
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses looks for it
    spec.loader.exec_module(module)
    return module
