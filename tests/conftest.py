"""Fixtures of several test files: seeded numbers, poisoned memory, and cleaning up the state of torch and the host."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from rmsnorm.functional import wait_for_host
from rmsnorm.kernels.host import loader as host

# The same examples on every run and no time limit, so that a slow machine fails nothing.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=30)
settings.load_profile("fixed")

Draw = Callable[..., Tensor]


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
    """Fill fresh memory with NaN, so that an element that was never written is noticed."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


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
