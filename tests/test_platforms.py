"""Imitations of devices and systems on which no tests run.

torch's FakeTensorMode makes tensors that report any device and compute only shapes.
"""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rmsnorm

REFUSED = r"x is on mps:0, expected a device that supports float64, in which the squares are summed, such as the CPU"


def on(device: str) -> Tensor:
    with FakeTensorMode():
        return torch.empty(2, 8, device=device)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: rmsnorm.rms_norm(x),
        lambda x: rmsnorm.rms_norm(x, variance_size=4),
        lambda x: rmsnorm.add_rms_norm(x, x),
        lambda x: rmsnorm.rms_norms([x, x]),
        lambda x: rmsnorm.gated_rms_norm(x, x),
        lambda x: rmsnorm.RMSNorm(8, elementwise_affine=False)(x),
        lambda x: torch.ops.rmsnorm.forward(x, None, None, 1e-6, "early", 0.0, False),
        lambda x: rmsnorm.explain(x),
        lambda x: rmsnorm.explain(x, gate=x),
    ],
)
def test_a_device_without_float64_is_refused_with_one_message(call) -> None:
    with pytest.raises(ValueError, match=REFUSED):
        call(on("mps"))


def test_a_replaced_norm_runs_its_own_forward_on_a_device_without_float64() -> None:
    model = nn.Sequential(nn.RMSNorm(8, 1e-6, elementwise_affine=False))
    assert rmsnorm.patch(model).replaced
    x = on("mps")
    y = model[0](x)
    assert (y.shape, y.device) == (x.shape, x.device)
    assert "its input is on mps:0, which does not support float64" in rmsnorm.explain(x, model[0])


@pytest.mark.parametrize("has_float64", [True, False])
def test_intels_gpus_run_the_reference_if_they_have_float64(has_float64: bool, monkeypatch) -> None:
    properties = type("Properties", (), {"has_fp64": has_float64})
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties)
    x = on("xpu")
    if has_float64:
        assert rmsnorm.explain(x).startswith("xpu, float32: the reference, in plain torch (there is no kernel for xpu)")
        assert rmsnorm.rms_norm(x).device == x.device
    else:
        with pytest.raises(ValueError, match="x is on xpu:0, expected a device that supports float64"):
            rmsnorm.rms_norm(x)


# Removes what Windows does not have, after the libraries are imported. os.name stays, because pathlib needs it.
AS_ON_WINDOWS = """
import os, signal, sys, sysconfig
import filelock, numba, torch

sysconfig.get_config_vars()  # cached now: later it would look for another system's file

for module, names in {
    os: ("fchmod", "fork", "getegid", "geteuid", "getgid", "getloadavg", "getuid", "killpg", "nice", "sched_getaffinity",
         "sysconf", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"),
    signal: ("pthread_sigmask", "SIGHUP", "SIGKILL"),
}.items():
    for name in names:
        delattr(module, name)
sys.modules["fcntl"] = sys.modules["resource"] = None
sys.platform = "win32"
"""
CALLS = """
import rmsnorm
from rmsnorm.reference import forward
from rmsnorm.tools import machine
from rmsnorm.tools.cli import main
import rmsnorm.tools.report.command, rmsnorm.tools.bench.command, rmsnorm.tools.cost.command

x, w = torch.randn(3, 8, requires_grad=True), torch.ones(8)
y = rmsnorm.rms_norm(x, w)
y.sum().backward()
assert torch.equal(y, forward(x, None, w, 1e-6, "early", 0.0, False)[0])
assert rmsnorm.patch(torch.nn.Sequential(torch.nn.RMSNorm(8, 1e-6))).replaced
assert machine.describe()["memory_gb"] is machine.peak_bytes() is None
print(rmsnorm.explain(x.detach(), w))
main(["--version"])
"""


def test_without_what_only_unix_has_the_kernels_run_and_explain_says_what_is_missing() -> None:
    command = [sys.executable, "-c", AS_ON_WINDOWS + CALLS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "cpu, float32: cpu kernel (Numba) (called from Python: it is for Linux, and a Python that has the GIL); each "
        "process compiles the kernel, because it cannot be kept: OSError: this system does not report the owners of "
        "files\n"
    )
    assert f"\nrmsnorm {rmsnorm.__version__} (" in done.stdout
