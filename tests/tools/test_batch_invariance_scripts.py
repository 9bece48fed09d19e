"""benchmarks/batch_invariance.py and train_and_serve.py: that their counts can be other than 0, and ours are 0."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

import rmsnorm
from scripts import benchmark_script


@pytest.fixture(scope="module")
def invariance() -> ModuleType:
    return benchmark_script("batch_invariance")


@pytest.fixture(scope="module")
def serving() -> ModuleType:
    return benchmark_script("train_and_serve")


def test_rows_that_change_with_the_batch_are_counted(invariance: ModuleType) -> None:
    def of_all_rows(x: Tensor, w: Tensor) -> Tensor:
        return x * w + (len(x) < 10)  # y changes in batches smaller than 10, dx never

    x, w, dy = torch.randn(20, 8), torch.randn(8), torch.randn(20, 8)
    assert invariance.changed_rows(of_all_rows, x, w, dy, (1, 15)) == {"y": 20, "dx": 0}
    assert invariance.changed_rows(of_all_rows, x, w, dy, (15,)) == {"y": 5, "dx": 0}
    assert invariance.changed_rows(lambda x, w: x * w * len(x), x, w, dy, (15,)) == {"y": 20, "dx": 20}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_of_ours_changes_with_the_batch(invariance: ModuleType, dtype: torch.dtype) -> None:
    x, w, dy = (torch.randn(size).to(dtype) for size in ((300, 256), (256,), (300, 256)))
    for name in invariance.OURS:
        assert invariance.changed_rows(invariance.NORMS[name], x, w, dy, (1, 7, 64)) == {"y": 0, "dx": 0}


def test_a_model_is_served_with_the_bits_of_training(serving: ModuleType) -> None:
    calls, loss = serving.train(serving.ours, 3, torch.device("cpu"))
    assert len(calls) == serving.LAYERS + 1
    assert loss > 0
    assert serving.differing(calls, serving.served) == 0
    assert serving.differing(calls, serving.row_by_row) == 0
    for call in calls:  # after three steps the weights are close to one, where early and late are hard to tell apart
        call.weight = torch.randn_like(call.weight)
        call.y = rmsnorm.rms_norm(call.x if call.residual is None else call.x + call.residual, call.weight, serving.EPS)
    assert serving.differing(calls, serving.served) == 0
    late = serving.differing(calls, lambda call: rmsnorm.rms_norm(call.x, call.weight, serving.EPS, cast="late"))
    assert late > 0


def test_a_weight_in_fp32_is_multiplied_in_fp32_as_in_vllm(serving: ModuleType) -> None:
    x, w = torch.randn(50, 64).bfloat16(), torch.randn(64)
    y, s = serving.fused_add_rms_norm(x, x, w, 1e-6)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rmsnorm.rms_norm(x + x, w, 1e-6, cast="late"))
    assert torch.equal(s, x + x)
    with pytest.raises(NotImplementedError):
        serving.rms_norm(x, w, 1e-6, 32)
