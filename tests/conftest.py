"""What several test files share: seeded numbers, poisoned memory, torch and the host put back as they were."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from rmsnorm.kernels.host import loader as host
from rmsnorm.ops import wait_for_host

# The same examples on every run and no time limit, so that a slow machine fails nothing.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=30)
settings.load_profile("fixed")

Draw = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def nothing_learned() -> Iterator[None]:
    """The first call of a test goes through Python; those of its kind that follow do not, where there is a compiler."""
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
    """Fresh memory is full of NaN, so that an output that nobody wrote shows."""
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
    """Nothing compiled before counts, and nothing compiled here stays."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
