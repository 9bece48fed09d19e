"""The description of the machine, and the choice of the device."""

import json
import sys
from pathlib import Path

import pytest
import torch

from rmsnorm.errors import CommandError
from rmsnorm.tools import machine


def test_the_description_has_the_commit_and_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMSNORM_COMMIT", "abc123")
    facts = json.loads(json.dumps(machine.describe("cpu")))
    assert facts["commit"] == "abc123"
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["gpu"] is None
    assert facts["cores"] >= 1
    assert facts["cpu"]
    assert "abc123" in machine.headline(facts)


def test_a_peer_that_is_installed_is_among_the_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, version in (("liger_kernel", "1.2"), ("quack_kernels", "3.4")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        content = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(content)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = machine.versions()
    assert (found["liger-kernel"], found["quack-kernels"]) == ("1.2", "3.4")


def test_an_installed_package_is_named_by_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RMSNORM_COMMIT", raising=False)
    package = tmp_path / "rmsnorm"
    package.mkdir()
    (tmp_path / "rmsnorm-7.8.dist-info").mkdir()
    (tmp_path / "rmsnorm-7.8.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: rmsnorm\nVersion: 7.8\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(machine, "__file__", str(package / "tools" / "machine.py"))
    facts = machine.describe("cpu")
    assert (facts["commit"], facts["release"]) == (None, "7.8")
    assert machine.headline(facts).endswith("; rmsnorm 7.8")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "a copy" / "rmsnorm" / "tools" / "machine.py"))
    facts = machine.describe("cpu")
    assert facts["release"] is None
    assert machine.headline(facts).endswith("; commit unknown")
    del facts["release"]  # like older results
    assert machine.headline(facts).endswith("; commit unknown")


@pytest.mark.parametrize("name", ["nonsense", "meta", "cuda:99", "cpu:x", "hpu"])
def test_a_device_that_cannot_be_used_is_refused(name: str) -> None:
    with pytest.raises(CommandError, match="give cpu"):
        machine.find_device(name)


def test_the_advice_of_torch_to_those_who_build_it_is_left_out() -> None:
    with pytest.raises(CommandError, match=r"^--device ipu cannot be used here, give .*: this build of torch cannot"):
        machine.find_device("ipu")


@pytest.mark.parametrize(
    ("name", "gpu", "advice"), [("x", False, "cpu"), ("x", True, "cpu or cuda"), ("cuda:99", False, "cpu")]
)
def test_errors_suggest_only_devices_of_this_machine(
    name: str, gpu: bool, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(CommandError, match=rf"give {advice}(:|$)"):
        machine.find_device(name)
