"""verify is green on the code as it is, and red on code that is wrong in one step."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import printed
from rmsnorm import reference
from rmsnorm.errors import CommandError
from rmsnorm.kernels import dispatch
from rmsnorm.kernels.plan import ByReference
from rmsnorm.tools import machine, verify
from rmsnorm.tools.cli import main
from rmsnorm.tools.display import render

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


def late(x: torch.Tensor, w: torch.Tensor | None, rstd: torch.Tensor, cast: str, offset: float) -> torch.Tensor:
    h = x.float() * rstd.unsqueeze(-1)
    return h.to(x.dtype) if w is None else ((w.float() + offset) * h).to(torch.promote_types(w.dtype, x.dtype))


def faults(plans: list[verify.Plan]) -> str:
    return "; ".join(fault for row in verify.verify_rows(plans, CPU) for fault in row.faults)


def bf16_early(M: int, N: int, count: int) -> list[verify.Plan]:
    case = verify.Case(torch.bfloat16, torch.bfloat16, "early", 0.0, M, N)
    return [verify.Plan("spec", "bf16, weight bf16, early", (case,) * count)]


def test_late_instead_of_early_is_red(monkeypatch) -> None:
    monkeypatch.setattr(reference, "normalize", late)
    assert "are not exact's" in faults(bf16_early(16, 512, 1))


@pytest.fixture
def reference_runs(monkeypatch) -> None:
    """The reference computes what is called ours as well, so that a mistake in it is on both sides."""
    monkeypatch.setattr(dispatch, "_planner", lambda *_: ByReference("for a test"))


@pytest.mark.usefixtures("reference_runs")
class TestAMistakeThatExactSharesIsRed:
    def test_nothing_is_red_without_one(self) -> None:
        assert faults(bf16_early(64, 1024, 6)) == ""

    def test_late_instead_of_early(self, monkeypatch) -> None:
        monkeypatch.setattr(reference, "normalize", late)
        assert "outputs are not eager's" in faults(bf16_early(64, 1024, 6))

    def test_rstd_off(self, monkeypatch) -> None:
        exact = reference.exact_rstd
        monkeypatch.setattr(reference, "exact_rstd", lambda x, eps: exact(x, eps) * (1 + 2**-6))
        assert "ulp from eager's" in faults(bf16_early(64, 1024, 6))

    def test_gradients_rounded_on_the_way(self, monkeypatch) -> None:
        backward = reference.backward

        def rounded(dy, ds, x, w, rstd, *rest) -> tuple[torch.Tensor | None, torch.Tensor | None]:
            return backward((dy.float() * (1 + 2**-7)).to(dy.dtype), ds, x, w, rstd, *rest)

        monkeypatch.setattr(reference, "backward", rounded)
        found = faults(bf16_early(8, 1024, 64))
        assert "the error of dx" in found
        assert "the error of dw" in found

    def test_dw_that_changes_from_run_to_run(self, monkeypatch) -> None:
        backward, calls = reference.backward, iter(range(1000))

        def drifting(*args) -> tuple[torch.Tensor | None, torch.Tensor | None]:
            dx, dw = backward(*args)
            return dx, None if dw is None else dw + next(calls)

        monkeypatch.setattr(reference, "backward", drifting)
        assert "numbers change" in faults(bf16_early(16, 64, 1))


@pytest.mark.parametrize("form", [verify._ON_BOUNDARY, verify._ORTHOGONAL])
def test_a_constructed_row_is_close_and_a_wrong_one_is_red(form, monkeypatch) -> None:
    case = verify.Case(torch.float32, torch.float32, "early", 0.0, 8, 2048, form, eps=0.0)
    plan = verify.Plan("constructed", form, (case,))
    (row,) = verify.verify_rows([plan], CPU)
    assert row.ok
    assert row.tally.close == 8
    exact = reference.exact_rstd
    monkeypatch.setattr(reference, "exact_rstd", lambda x, eps: exact(x, eps) * (1 + 2**-20))
    (row,) = verify.verify_rows([plan], CPU)
    assert not row.ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cast", "offset"), [("early", 0.0), ("late", 0.0), ("late", 1.0)])
def test_eager_has_the_bits_of_published(cast, offset, dtype, randn) -> None:
    x, w = randn(32, 257).to(dtype), randn(257).to(dtype)
    for weight in (w, w.float(), None if not offset else w):
        y = verify.eager(x, weight, 1e-6, cast, offset)
        assert verify.differing(y, reference.published(x, weight, 1e-6, cast, offset)) == 0


def test_close_rows_are_those_that_an_order_can_tell() -> None:
    half = 1 + 2.0**-24  # between two fp32 numbers, as the mean of two terms
    tiny = 2.0**-60  # lost when it is added to them
    rows = [[2 * half, 2 * half, 0.0, 0.0], [2 * half, tiny, 2 * half, tiny], [1.1, 1.3, 1.7, tiny]]
    assert verify.close_rows(torch.tensor(rows, dtype=torch.float64), 25).tolist() == [False, True, False]


def test_ulp_are_those_of_the_coarser_dtype() -> None:
    a = torch.tensor([1.0, 1.0, 0.0, 300.0])
    b = torch.tensor([1.0 + 2**-7, 1.0, 2.0**-133, 296.0])
    assert verify.largest_ulp(a, b, torch.bfloat16) == 2.0
    assert verify.largest_ulp(a[:3], b[:3], torch.bfloat16) == 1.0
    assert verify.largest_ulp(a, a, torch.bfloat16) == 0.0
    assert verify.largest_ulp(a, torch.full_like(a, torch.nan), torch.bfloat16) == torch.inf


def test_the_full_sweep_tries_enough() -> None:
    assert sum(case.outputs for plan in verify.sweep(quick=False) for case in plan.cases) >= 1e8


def test_an_unknown_device_is_a_command_error() -> None:
    with pytest.raises(CommandError, match="nowhere"):
        verify.verify("nowhere")


def test_the_result_is_json() -> None:
    rows = verify.verify_rows(small_plans()[:2], CPU)
    result = verify.Result("cpu", "kernel", True, 1.0, machine.describe(), rows)
    assert json.loads(json.dumps(result.to_json()))["ok"] is True


def result_of(rows: Sequence[verify.Row], device: str = "cuda", **options: Any) -> verify.Result:
    facts = machine.describe() | {"commit": "abc"}
    return verify.Result(device, "kernel", options.pop("quick", False), 1.0, facts, tuple(rows), **options)


def counted_rows() -> list[verify.Row]:
    """Of the full sweep, as if all of it had run on a GPU and nothing were wrong."""
    error = verify.Error(1 << 20, 0.9, 1.0)
    some = {"eager_differing": 3, "eager_ulp": 1.0, "dx": error, "dw": error}
    plans = verify.sweep(quick=False)
    tallies = []
    for plan in plans:
        outputs = sum(case.outputs for case in plan.cases)
        tally = verify.Tally(outputs, rows=sum(case.M for case in plan.cases), close=1)
        if plan.section == "constructed":
            tally = dataclasses.replace(tally, differing=12_345, off_in_row=1.5)
        elif outputs and "NaN" not in plan.name:
            tally = dataclasses.replace(tally, **some)
        tallies.append(tally)
    return list(verify.judge_rows(plans, tallies))


def test_what_is_printed_is_the_verdict_and_what_was_compared() -> None:
    rows = counted_rows()
    short = printed.check(result_of(rows).table())
    assert short.startswith(
        f"PASSED: all {len(rows)} rows of the sweep keep the contract\n167.9 million outputs in 1 s"
    )
    assert len(short.splitlines()) < 40
    assert "exact, constructed rows  9.437 million" in short
    assert "0.001 %" in short
    assert "FAILED" not in short
    assert not any(row.name in short for row in rows)
    assert "the CPU, random rows" in short
    assert "the CPU" not in printed.check(result_of(rows, "cpu").table())


def test_every_row_is_printed_when_it_is_asked_for() -> None:
    rows = counted_rows()
    full = printed.check(result_of(rows).table(verbose=True))
    wide = render(result_of(rows).table(verbose=True), 200)
    for row in rows:
        assert f"{row.name}  " in wide
    assert wide.count("passed") == len(rows)
    assert "so some numbers may differ" in " ".join(full.split())


@pytest.mark.parametrize("quick", [True, False])
def test_a_row_that_failed_is_printed_with_a_command_that_repeats_it_alone(quick, monkeypatch) -> None:
    rows = counted_rows()
    at = next(i for i, row in enumerate(rows) if row.name == "bf16, 1 + weight bf16, late")
    rows[at] = dataclasses.replace(rows[at], faults=("12 numbers are not exact's", "the error of dx is too large"))
    text = printed.check(result_of(rows, "cpu", quick=quick).table())
    assert text.startswith(f"FAILED: 1 of {len(rows)} rows of the sweep break the contract")
    assert f"FAILED  {rows[at].name}: " in text
    assert "\n  12 numbers are not exact's\n  the error of dx is too large\n" in text
    (command,) = (line for line in text.splitlines() if line.startswith("  rmsnorm verify "))
    assert command in render(result_of(rows, "cpu", quick=quick).table(), 40).splitlines()  # to copy as it is

    tried: list[tuple[verify.Case, int]] = []

    def compare(case: verify.Case, seed: int, device: torch.device) -> verify.Tally:
        tried.append((case, seed))
        return verify.Tally()

    monkeypatch.setattr(verify, "compare", compare)
    verify.verify("cpu", quick)
    whole, tried = tried, []
    with pytest.raises(SystemExit):
        main(shlex.split(command)[1:])
    assert tried
    assert set(tried) <= set(whole)
    assert len({seed for _, seed in whole}) == len(whole)  # no two cases draw the same numbers
    (plan,) = (plan for plan in verify.sweep(quick) if plan.name == rows[at].name)
    assert [case for case, _ in tried] == list(plan.cases)


def test_a_row_of_many_ranks_is_repeated_on_as_many() -> None:
    rows = [dataclasses.replace(row, faults=("wrong",)) for row in counted_rows()[-1:]]
    assert "rmsnorm verify --device cuda --quick --world 4\n" in render(result_of(rows, quick=True, world=4).table())


def test_only_some_rows_are_tried() -> None:
    plans = verify.sweep(quick=True)
    assert verify.named(plans, ()) == plans
    assert {plan.name for plan in verify.named(plans, ["one row", "no rows"])} == {
        f"{dtype}, {form}"
        for dtype in ("fp32", "bf16", "fp16")
        for form in ("one row", "no rows", "dy one row expanded")
    }
    with pytest.raises(CommandError, match="--only 'fp4' is in the name of no row"):
        verify.named(plans, ["one row", "fp4"])


def test_a_row_alone_is_not_judged_a_second_time_as_all_of_its_dtype() -> None:
    (plan,) = verify.named(verify.sweep(quick=True), ["fp32, N 1 to 15"])
    assert [row.name for row in verify.verify_rows([plan], CPU)] == [plan.name]


def test_every_case_is_compiled_ahead_once_beside_those_of_its_kind() -> None:
    plans = verify.sweep(quick=True)
    groups = verify._by_kernels(plans)
    ahead = [case for group in groups for case in group]
    assert len(ahead) == len(set(ahead))
    wanted = {
        dataclasses.replace(case, M=min(case.M, verify._FEW_ROWS), eps=1.0) for plan in plans for case in plan.cases
    }
    assert set(ahead) == wanted
    for group in groups:
        assert len({(c.x, c.w, c.cast, c.form, c.residual, c.N.bit_length()) for c in group}) == 1
    assert len(groups) < len(ahead) / 2


def test_what_is_compiled_ahead_runs_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[verify.Case] = []
    whole = verify.run_whole
    monkeypatch.setattr(verify, "run_whole", lambda inputs, case: ran.append(case) or whole(inputs, case))
    groups = verify._by_kernels(verify.sweep(quick=True))
    for group in groups[::25]:
        verify._run_once(group, torch.device("cpu"))
    assert set(ran) == {case for group in groups[::25] for case in group}
    assert {case.residual is None for case in ran} == {False, True}
