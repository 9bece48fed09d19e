"""Checks that run in an environment with the wheel, so they import only the package and its requirements.

    python -I tests/wheel/checks.py ENVIRONMENT SOURCE   # SOURCE: the unpacked sdist

Writes into the current folder. A check that fails raises AssertionError or another exception.
"""

import contextlib
import importlib.metadata
import io
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

loaded = set(sys.modules)
begun = time.perf_counter()
import rmsnorm  # noqa: E402

import_s = time.perf_counter() - begun
added = {name.partition(".")[0] for name in sys.modules.keys() - loaded}

from rmsnorm import reference  # noqa: E402
from rmsnorm.tools.cli import main  # noqa: E402

SOURCE = Path(sys.argv[2])
PLOT = ("bench", "--from", str(SOURCE / "benchmarks" / "results" / "bench-cpu.json"), "--plot", "bench.svg")


def command(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the command line, run in this process."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            main(arguments)
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), error.getvalue()


def check_imports() -> None:
    """`import rmsnorm` imports nothing but itself, and everything comes from this environment."""
    print(f"  import rmsnorm: {import_s:.2f} s after torch")
    assert added - set(sys.stdlib_module_names) == {"rmsnorm"}, added
    packages = Path(sysconfig.get_path("purelib"))
    assert Path(rmsnorm.__file__).parent == packages / "rmsnorm"
    standard = Path(sysconfig.get_path("stdlib")).parent
    others = [folder for folder in sys.path if Path(folder) != packages and standard not in Path(folder).parents]
    assert not others, others


def check_metadata() -> None:
    """The version is that of the package, and each entry point can be loaded."""
    wheel = importlib.metadata.distribution("rmsnorm")
    assert wheel.version == rmsnorm.__version__
    assert [callable(point.load()) for point in wheel.entry_points] == [True] * 4


def check_norms(kernel: str) -> None:
    """The norms of functions and of a patched model have the reference's bits, without a warning.

    kernel: what `explain` must say computes them.
    """
    warnings.simplefilter("error")
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, residual, w = (torch.randn(*shape).to(dtype) for shape in ((7, 384), (7, 384), (384,)))
        assert rmsnorm.explain(x, w).partition(": ")[2].startswith(kernel), rmsnorm.explain(x, w)
        y = rmsnorm.rms_norm(x, w)
        of_sum, s = rmsnorm.add_rms_norm(x, residual, w)
        model = torch.nn.Sequential(torch.nn.RMSNorm(384, 1e-6)).to(dtype)
        model[0].weight.data.copy_(w)
        assert len(rmsnorm.patch(model).replaced) == 1
        late = model(x)
        assert torch.equal(y, reference.forward(x, None, w, 1e-6, "early", 0.0, False)[0])
        assert torch.equal(of_sum, reference.forward(x, residual, w, 1e-6, "early", 0.0, False)[0])
        assert torch.equal(s, x + residual)
        assert torch.equal(late, reference.forward(x, None, w, 1e-6, "late", 0.0, False)[0])


def check_reference() -> None:
    """Without Numba the reference computes, and `explain` says why."""
    check_norms("the reference, in plain torch (Numba cannot be used: ModuleNotFoundError: No module named 'numba')")


def check_kernels() -> None:
    check_norms("cpu kernel (Numba)")


def check_command() -> None:
    """The installed command runs, and so does the help of each verb."""
    script = Path(sysconfig.get_path("scripts")) / "rmsnorm"
    said = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"rmsnorm {rmsnorm.__version__} ("), said
    for verb in ([], ["report"], ["verify"], ["bench"], ["cost"]):
        assert "--help" in succeed(*verb, "--help")


def check_missing_hf() -> None:
    for verb, what in (("cost", "cost"), ("report", "the report")):
        said = f"rmsnorm: {what} needs transformers: pip install 'rmsnorm[hf]'\n"
        assert command(verb, "deepseek-ocr") == (2, "", said)


def check_missing_plot() -> None:
    assert command(*PLOT) == (2, "", "rmsnorm: --plot needs matplotlib: pip install 'rmsnorm[plot]'\n")


def succeed(*arguments: str) -> str:
    code, out, error = command(*arguments)
    assert code == 0, f"rmsnorm {' '.join(arguments)}: {code}\n{out}\n{error}"
    return out


def check_verify() -> None:
    """`verify` compares the kernels with the reference."""
    assert "PASSED" in succeed(
        "verify", "--device", "cpu", "--quick", "--only", "residual bf16", "--only", "gated bf16"
    )


def check_hf() -> None:
    """transformers' models can be patched, counted and reported, also from a checkpoint on disk."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=64, pad_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained("checkpoint")
    ids = torch.arange(8)[None]
    before = model(input_ids=ids).logits
    assert rmsnorm.patch(model).replaced
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    succeed("cost", "deepseek-ocr")
    succeed("report", "checkpoint", "--tokens", "32", "--seconds", "2")
    assert "</html>" in Path("report.html").read_text()


def check_plot() -> None:
    """A stored result can be drawn."""
    succeed(*PLOT)
    assert "</svg>" in Path("bench.svg").read_text()


def check_dev() -> None:
    """Tests of the sdist pass. They test the wheel, because the sources are not on their path."""
    tests = ("test_public_surface", "test_imports", "test_modules", "test_dependencies")
    files = [str(SOURCE / "tests" / f"{name}.py") for name in tests]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], cwd=SOURCE)
    assert done.returncode == 0


def check_cpp() -> None:
    """The C++ of the wheel compiles and makes calls, if there is a compiler."""
    rmsnorm.warmup(dtypes=(torch.float32,))
    said = rmsnorm.explain(torch.ones(2, 8), torch.ones(8))
    print(f"  {said}")
    assert "called from C++" in said or "there is no C++ compiler" in said or "RMSNORM_CXX is empty" in said


ALWAYS = (check_imports, check_metadata)
# A new extra needs a line here.
OF_ENVIRONMENT: dict[str, tuple[Callable[[], None], ...]] = {
    "torch alone": (check_reference, check_command, check_missing_hf, check_missing_plot),
    "no extra": (check_kernels, check_cpp, check_verify, check_missing_hf, check_missing_plot),
    "hf": (check_hf, check_missing_plot),
    "plot": (check_plot, check_missing_hf),
    "dev": (check_dev,),
}


if __name__ == "__main__":
    for check in (*ALWAYS, *OF_ENVIRONMENT[sys.argv[1]]):
        check()
