"""Finds the device to measure on, and describes the machine, the versions and the commit of a result."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from rmsnorm.errors import CommandError, one_line

_PEERS = ("liger-kernel", "quack-kernels", "flashinfer-python", "flash-linear-attention")
_PACKAGES = ("torch", "numba", "triton", "transformers", "numpy", *_PEERS)


def find_device(name: str | None) -> torch.device:
    """Return the device of that name.

    Args:
        name: "cpu", "cuda" or "cuda:1"; by default the GPU if there is one.

    Returns:
        The device.

    Raises:
        CommandError: If torch cannot compute on it.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name is None else name
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):  # torch's message lists every kind of device that exists
        raise CommandError(f"--device {name}: give {_usable()}") from None
    try:
        torch.ones(1, dtype=torch.float64, device=device).sum().item()
    except (RuntimeError, AssertionError, ImportError, TypeError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if reason.startswith("Could not run"):  # torch goes on with advice to those who build it
            reason = "this build of torch cannot compute on it"
        raise CommandError(f"--device {name} cannot be used here, give {_usable()}: {reason}"[:300]) from None
    return device


def _usable() -> str:
    return "cpu or cuda" if torch.cuda.is_available() else "cpu"


def describe(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Describe the machine and the software, so that figures measured on `device` can be interpreted later.

    Args:
        device: Where the figures are measured.

    Returns:
        What `json.dumps` takes, with the keys device, cpu, cores, threads, isa, memory_gb, gpu (a dict with name,
        memory_gb, multiprocessors, capability, driver, cuda; None on a CPU), load (how many processes wanted a core in
        the last minute), os, python, versions, commit (RMSNORM_COMMIT if that is set, else the commit of the
        repository, with "+" if files differ from it; None outside a repository), release (the version of rmsnorm if it
        is installed, else None), date (UTC).
    """
    device, memory = torch.device(device), memory_bytes()
    return {
        "device": device.type,
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": None if memory is None else round(memory / 1e9, 1),
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
        "commit": _commit(),
        "release": _release(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def headline(facts: dict[str, Any]) -> str:
    """Return one line for the top of a table.

    Args:
        facts: What `describe` returned.
    """
    gpu = facts["gpu"]
    where = f"{gpu['name']}, driver {gpu['driver']}" if gpu else f"{facts['cpu']}, {facts['threads']} threads"
    packages = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if name != "numpy")
    commit, release = facts["commit"], facts.get("release")  # older results have no release
    code = f"commit {commit[:12]}" if commit else f"rmsnorm {release}" if release else "commit unknown"
    return f"{where}; {packages}; {code}"


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cores() -> int:
    """Return how many cores this process may use, which in a container may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_temporary_folder() -> None:
    """Check that temporary files can be written; torch and transformers write some even while they are imported.

    Raises:
        CommandError: If they cannot.
    """
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise CommandError(f"{one_line(error)}: free space there, or name another folder in TMPDIR") from None


def memory_bytes() -> int | None:
    """Return how much memory the machine has; None if the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def peak_bytes() -> int | None:
    """Return the most memory that this process has used; None on systems other than Unix."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver.splitlines()[0].strip() if driver else None,
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, str]:
    """Return the versions of those packages that a result depends on and that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _release() -> str | None:
    """Return the installed version, if the installed package is the one that holds this file."""
    try:
        installed = importlib.metadata.distribution("rmsnorm")
    except importlib.metadata.PackageNotFoundError:
        return None
    return installed.version if Path(str(installed.locate_file("rmsnorm"))).resolve() == _package() else None


def _package() -> Path:
    return Path(__file__).resolve().parents[1]


def _commit() -> str | None:
    given = os.environ.get("RMSNORM_COMMIT")
    if given:
        return given
    here = _package()
    # An installed copy may lie inside another repository: only a repository that tracks this file counts.
    if not _output("git", "-C", str(here), "ls-files", "--", "spec.py"):
        return None
    head = _output("git", "-C", str(here), "rev-parse", "HEAD").strip()
    changed = _output("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changed.strip() else "") if head else None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
