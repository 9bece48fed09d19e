"""Fixtures of several test files: seeded numbers, poisoned memory, and cleaning up the state of torch and the host."""

import gc
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor

from memory_guards import poisoned_memory
from rmsnorm.functional import wait_for_host
from rmsnorm.kernels import dispatch
from rmsnorm.kernels.host import loader as host

# The same examples on every run and no time limit, so that a slow machine fails nothing.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=30)
settings.register_profile("unshrunk", settings.get_profile("fixed"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("fixed")

Draw = Callable[..., Tensor]


def pytest_collection_finish() -> None:
    """Exclude the imported modules from later garbage collections, each of which took half a second with them."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let Python free these modules at exit, or libraries warn about leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_learned() -> Iterator[None]:
    """Forget the calls of earlier tests. Python makes the first call of a kind; where there is a compiler, C++ the next."""
    wait_for_host()
    host.forget()
    yield
    host.forget()


@pytest.fixture
def randn() -> Draw:
    """Seeded normal numbers: randn(*shape, dtype=…, scale=…)."""
    generator = torch.Generator().manual_seed(0x5EED)

    def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    return draw


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill fresh memory, so that an element that was never written is noticed."""
    with poisoned_memory():
        yield


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Discard what torch.compile has compiled, before and after the test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def left_to_python(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the calls of operators that C++ leaves to Python, by the name of the function in dispatch."""
    if host.described() != "called from C++":
        pytest.skip(host.described())
    seen: list[str] = []

    def noting(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (seen.append(name), made(*arguments))[1]

    for name in (
        "backward_of_sum", "forward_pair", "backward_pair", "forward_sandwich", "gated_forward", "gated_backward",
        "begin_forward", "finish_forward", "begin_backward", "finish_backward",
    ):  # fmt: skip
        monkeypatch.setattr(dispatch, name, noting(name, getattr(dispatch, name)))
    return seen


@pytest.fixture(params=["C++", "Python"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the plans of the operators in C++, or in Python as where there is no C++."""
    if request.param == "Python":
        monkeypatch.setattr("rmsnorm.kernels.host.loader._native", lambda plan: None)
        host.forget()
    elif host.described() != "called from C++":
        pytest.skip(host.described())
    yield request.param
    host.forget()


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
