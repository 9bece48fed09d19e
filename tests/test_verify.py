"""verify is green on the code as it is, and red on code that is wrong in one step."""

import json

import pytest
import torch

from rmsnorm import machine, reference, verify
from rmsnorm.errors import CommandError

CPU = torch.device("cpu")


def small_plans() -> list[verify.Plan]:
    """Of every section the plans with the fewest outputs."""
    plans = sorted(verify.sweep(quick=True), key=lambda plan: sum(case.outputs for case in plan.cases))
    return plans[:12]


def test_the_code_is_green() -> None:
    rows = verify.verify_rows(small_plans(), CPU)
    assert all(row.ok for row in rows), [(row.name, row.faults) for row in rows if not row.ok]
    assert sum(row.tally.outputs for row in rows) > 0


def fp32_sum(x: torch.Tensor, eps: float) -> torch.Tensor:
    v = x.float().square().mean(-1) + eps
    return 1 / v.double().sqrt().float()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("exact_rstd", fp32_sum),
        ("exact_rstd", lambda x, eps: reference.published_rstd(x, eps) * (1 + 2**-22)),
        ("normalize", lambda x, w, rstd, cast, offset: (x.float() * rstd.unsqueeze(-1)).to(x.dtype)),
    ],
    ids=["fp32 sum", "rstd off by two ulp", "weight forgotten"],
)
def test_a_wrong_step_is_red(name, wrong, monkeypatch) -> None:
    """The oracle is what is broken here: the two differ all the same, and the kernels need no second build."""
    monkeypatch.setattr(reference, name, wrong)
    rows = verify.verify_rows(small_plans(), CPU)
    assert any(not row.ok for row in rows)


def test_the_full_sweep_tries_enough() -> None:
    assert sum(case.outputs for plan in verify.sweep(quick=False) for case in plan.cases) >= 1e8


def test_an_unknown_device_is_a_command_error() -> None:
    with pytest.raises(CommandError, match="nowhere"):
        verify.verify("nowhere")


def test_the_result_is_json() -> None:
    rows = verify.verify_rows(small_plans()[:2], CPU)
    result = verify.Result("cpu", "kernel", True, 1.0, machine.describe(), rows)
    assert json.loads(json.dumps(result.to_json()))["ok"] is True
    assert result.table() is not None
