"""The public names and signatures, and which module may import which."""

import ast
import inspect
from pathlib import Path

import pytest

import rmsnorm

ROOT = Path(rmsnorm.__file__).parent
ORDER = [
    "errors", "display", "spec", "hardware", "machine", "reference", "kernels", "distributed", "ops", "module", "measure",
    "checkpoint", "architecture", "bytecode", "expression", "observe", "proof", "replacement", "drop_in", "models", "cost", "predict", "verify",
    "world", "plot", "peers", "bench", "loading", "report", "cli",
]  # fmt: skip
KERNELS = ["build", "rows", "plan", "threads", "launch", "driver", "cpu", "gpu", "run", "dispatch", "host"]

SIGNATURES = {
    "rms_norm": "x, weight=None, eps=1e-06, *, cast='early', offset=0.0",
    "add_rms_norm": "x, residual, weight=None, eps=1e-06, *, cast='early', offset=0.0",
    "RMSNorm": "hidden_size, eps=1e-06, *, cast='early', offset=0.0, elementwise_affine=True, device=None, dtype=None",
    "DeepseekV2RMSNorm": "hidden_size, eps=1e-06",
    "TorchRMSNorm": "normalized_shape, eps=None, elementwise_affine=True, device=None, dtype=None",
    "patch": "model, *, strict=True",
    "cost": "shape, dtype=torch.bfloat16, weight_dtype=None, *, implementation='ours', phase='inference', device='cpu', "
    "cast='early', offset=0.0, elementwise_affine=True, master=False, threads=None",
    "Cost": "flops, read, written, kernels, saved, peak, least, parameters, gradients, optimizer, derived, terms",
    "unpatch": "model",
    "explain": "x, weight=None, residual=None, *, eps=1e-06, cast='early', offset=0.0",
    "warmup": "device='cpu', dtypes=(torch.float32, torch.bfloat16, torch.float16), weight_dtypes=None, hidden_size=128",
    "Report": "verdicts, passed=()",
}


def bare(function: object) -> str:
    parameters = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(plain))[1:-1]


def test_names_and_signatures() -> None:
    assert sorted(rmsnorm.__all__) == sorted(SIGNATURES)
    assert {name: bare(getattr(rmsnorm, name)) for name in rmsnorm.__all__} == SIGNATURES


def test_type_information_is_shipped() -> None:
    assert (ROOT / "py.typed").exists()


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rmsnorm":
            names |= {node.module} if node.module.count(".") else {f"rmsnorm.{alias.name}" for alias in node.names}
            if node.module == "rmsnorm.kernels":
                names |= {f"rmsnorm.kernels.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("rmsnorm.")}
    return {name.removeprefix("rmsnorm.") for name in names}


@pytest.mark.parametrize("name", [n for n in ORDER if n != "kernels"])
def test_a_module_imports_only_from_above(name: str) -> None:
    above = ORDER[: ORDER.index(name)]
    public = set(rmsnorm.__all__)  # what verify and later ones use of the package as a whole
    for other in imported(ROOT / f"{name}.py") - public:
        assert other.split(".")[0] in above, f"{name} imports {other}"


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_file_imports_only_from_above(name: str) -> None:
    above = {
        "kernels",
        *ORDER[: ORDER.index("kernels")],
        *(f"kernels.{other}" for other in KERNELS[: KERNELS.index(name)]),
    }
    assert imported(ROOT / "kernels" / f"{name}.py") <= above


def test_every_kernel_file_has_its_place() -> None:
    assert {file.stem for file in (ROOT / "kernels").glob("*.py")} == {"__init__", *KERNELS}


def test_the_import_test_can_fail(tmp_path: Path) -> None:
    (tmp_path / "spec.py").write_text("from rmsnorm import ops\nfrom rmsnorm.kernels import cpu\nimport rmsnorm.cli\n")
    assert imported(tmp_path / "spec.py") == {"ops", "kernels", "kernels.cpu", "cli"}
