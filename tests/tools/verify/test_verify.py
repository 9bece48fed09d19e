"""verify passes on the code as it is, and fails on code with one wrong step."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import printed
from rmsnorm import gated_reference, reference
from rmsnorm.errors import CommandError
from rmsnorm.kernels import dispatch
from rmsnorm.kernels.plan import ByReference
from rmsnorm.tools import machine
from rmsnorm.tools.cli import main
from rmsnorm.tools.display import render
from rmsnorm.tools.verify import bounds, command, compare, printing
from rmsnorm.tools.verify.cases import SweepRow, VerifyCase, select_rows, sweep
from rmsnorm.tools.verify.judge import RowResult, judge_all
from rmsnorm.tools.verify.layouts import ORTHOGONAL, ROUNDING_BOUNDARY
from rmsnorm.tools.verify.result import VerifyResult
from rmsnorm.tools.verify.tally import GradientError, Tally
from tolerance import DEFINITION_SHARE, DEFINITION_ULP

CPU = torch.device("cpu")


def smallest_rows() -> list[SweepRow]:
    """The rows with the fewest outputs."""
    rows = sorted(sweep(quick=True), key=lambda row: sum(case.outputs for case in row.cases))
    return rows[:12]


def test_the_bounds_are_those_of_the_other_tests() -> None:
    assert (bounds.EAGER_SHARE, bounds.EAGER_ULP) == (DEFINITION_SHARE, DEFINITION_ULP)


@pytest.mark.short
def test_the_code_passes() -> None:
    rows = command.verify_rows(smallest_rows(), CPU)
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
def test_a_wrong_step_fails(name, wrong, monkeypatch) -> None:
    """The reference is broken instead of the kernels, which then need not be built again."""
    monkeypatch.setattr(reference, name, wrong)
    rows = command.verify_rows(smallest_rows(), CPU)
    assert any(not row.ok for row in rows)


def late(x: torch.Tensor, w: torch.Tensor | None, rstd: torch.Tensor, cast: str, offset: float) -> torch.Tensor:
    h = x.float() * rstd.unsqueeze(-1)
    return h.to(x.dtype) if w is None else ((w.float() + offset) * h).to(torch.promote_types(w.dtype, x.dtype))


def faults(sweep_rows: list[SweepRow]) -> str:
    return "; ".join(fault for row in command.verify_rows(sweep_rows, CPU) for fault in row.faults)


def bf16_early(M: int, N: int, count: int) -> list[SweepRow]:
    case = VerifyCase(torch.bfloat16, torch.bfloat16, "early", 0.0, M, N)
    return [SweepRow("spec", "bf16, weight bf16, early", (case,) * count)]


def test_late_instead_of_early_fails(monkeypatch) -> None:
    monkeypatch.setattr(reference, "normalize", late)
    assert "differ from exact" in faults(bf16_early(16, 512, 1))


def gated_row(x: torch.dtype, **more: Any) -> list[SweepRow]:
    case = VerifyCase(x, x, "early", 0.0, 16, 512, gate=torch.float32, groups=4, **more)
    return [SweepRow("gated", "gated", (case, dataclasses.replace(case, gate_first=True)))]


@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16])
def test_gated_norms_pass_and_all_their_outputs_are_compared(x, monkeypatch) -> None:
    (result,) = command.verify_rows(gated_row(x), CPU)
    assert result.ok
    assert result.tally.outputs == 2 * 16 * 512
    backward = gated_reference.backward
    for i, fault in enumerate(("differ from exact", "differ from exact", "numbers of dw are too far from exact")):

        def changed(*args: Any, i: int = i) -> tuple[torch.Tensor | None, ...]:
            gradients = list(backward(*args))
            gradients[i] = gradients[i] * (1 + 2**-5)
            return tuple(gradients)

        monkeypatch.setattr(gated_reference, "backward", changed)
        assert fault in faults(gated_row(x))


def test_an_activation_that_is_not_correctly_rounded_fails(monkeypatch) -> None:
    monkeypatch.setattr(
        gated_reference, "silu_or_sigmoid", lambda gate, activation: torch.nn.functional.silu(gate.float())
    )
    assert "differ from exact" in faults(gated_row(torch.float32))


def test_the_sweep_has_every_form_of_gated_norm_with_each_pair_of_dtypes_and_groups() -> None:
    for quick in (True, False):
        cases = [case for row in sweep(quick) for case in row.cases if case.gate is not None]
        met = {(c.x, c.gate, c.cast, c.activation, c.gate_first, c.groups > 1) for c in cases}
        assert len(met) == 3 * 3 * 2 * 2 * 2 * 2
        assert sum(case.outputs for case in cases) < 6_000_000  # the reference takes about 5 us for each


@pytest.fixture
def reference_runs(monkeypatch) -> None:
    """Let the reference compute our results too, so that both sides share a mistake in it."""
    monkeypatch.setattr(dispatch, "_planner", lambda *_: ByReference("for a test"))


@pytest.mark.usefixtures("reference_runs")
class TestMistakesSharedWithTheReferenceFail:
    def test_no_mistake_passes(self) -> None:
        assert faults(bf16_early(64, 1024, 6)) == ""

    def test_late_instead_of_early(self, monkeypatch) -> None:
        monkeypatch.setattr(reference, "normalize", late)
        assert "outputs differ from eager's, more than allowed" in faults(bf16_early(64, 1024, 6))

    def test_inaccurate_rstd(self, monkeypatch) -> None:
        exact = reference.exact_rstd
        monkeypatch.setattr(reference, "exact_rstd", lambda x, eps: exact(x, eps) * (1 + 2**-6))
        assert "outputs differ from eager's by up to" in faults(bf16_early(64, 1024, 6))

    def test_gradients_with_an_extra_rounding(self, monkeypatch) -> None:
        backward = reference.backward

        def rounded(dy, ds, x, w, rstd, *rest) -> tuple[torch.Tensor | None, torch.Tensor | None]:
            return backward((dy.float() * (1 + 2**-7)).to(dy.dtype), ds, x, w, rstd, *rest)

        monkeypatch.setattr(reference, "backward", rounded)
        found = faults(bf16_early(8, 1024, 64))
        assert "the error of dx" in found
        assert "the error of dw" in found

    def test_dw_that_depends_on_the_run(self, monkeypatch) -> None:
        backward, calls = reference.backward, iter(range(1000))

        def drifting(*args) -> tuple[torch.Tensor | None, torch.Tensor | None]:
            dx, dw = backward(*args)
            return dx, None if dw is None else dw + next(calls)

        monkeypatch.setattr(reference, "backward", drifting)
        assert "numbers depend on the run" in faults(bf16_early(16, 64, 1))


@pytest.mark.parametrize("form", [ROUNDING_BOUNDARY, ORTHOGONAL])
def test_constructed_rows_are_close_and_fail_if_rstd_is_wrong(form, monkeypatch) -> None:
    case = VerifyCase(torch.float32, torch.float32, "early", 0.0, 8, 2048, form, eps=0.0)
    row = SweepRow("constructed", form, (case,))
    (result,) = command.verify_rows([row], CPU)
    assert result.ok
    assert result.tally.close == 8
    exact = reference.exact_rstd
    monkeypatch.setattr(reference, "exact_rstd", lambda x, eps: exact(x, eps) * (1 + 2**-20))
    (result,) = command.verify_rows([row], CPU)
    assert not result.ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cast", "offset"), [("early", 0.0), ("late", 0.0), ("late", 1.0)])
def test_eager_has_the_bits_of_the_published_class(cast, offset, dtype, randn) -> None:
    x, w = randn(32, 257).to(dtype), randn(257).to(dtype)
    for weight in (w, w.float(), None if not offset else w):
        y = compare.eager(x, weight, 1e-6, cast, offset)
        assert compare.differing(y, reference.published(x, weight, 1e-6, cast, offset)) == 0


def test_close_rows_are_those_whose_sum_depends_on_the_order() -> None:
    half = 1 + 2.0**-24  # between two fp32 numbers, as the mean of two terms
    tiny = 2.0**-60  # lost when it is added to them
    rows = [[2 * half, 2 * half, 0.0, 0.0], [2 * half, tiny, 2 * half, tiny], [1.1, 1.3, 1.7, tiny]]
    assert compare.close_rows(torch.tensor(rows, dtype=torch.float64), 25).tolist() == [False, True, False]


def test_ulp_are_those_of_the_given_dtype() -> None:
    a = torch.tensor([1.0, 1.0, 0.0, 300.0])
    b = torch.tensor([1.0 + 2**-7, 1.0, 2.0**-133, 296.0])
    assert compare.largest_ulp(a, b, torch.bfloat16) == 2.0
    assert compare.largest_ulp(a[:3], b[:3], torch.bfloat16) == 1.0
    assert compare.largest_ulp(a, a, torch.bfloat16) == 0.0
    assert compare.largest_ulp(a, torch.full_like(a, torch.nan), torch.bfloat16) == torch.inf


def test_the_full_sweep_has_at_least_1e8_outputs() -> None:
    assert sum(case.outputs for row in sweep(quick=False) for case in row.cases) >= 1e8


def test_an_unknown_device_raises_a_command_error() -> None:
    with pytest.raises(CommandError, match="nowhere"):
        command.verify("nowhere")


def test_the_result_can_be_written_as_json() -> None:
    rows = command.verify_rows(smallest_rows()[:2], CPU)
    result = VerifyResult("cpu", "kernel", True, 1.0, machine.describe(), rows)
    assert json.loads(json.dumps(result.to_json()))["ok"] is True


def result_of(rows: Sequence[RowResult], device: str = "cuda", **options: Any) -> VerifyResult:
    facts = machine.describe() | {"commit": "abc"}
    return VerifyResult(device, "kernel", options.pop("quick", False), 1.0, facts, tuple(rows), **options)


def counted_rows() -> list[RowResult]:
    """Results of the full sweep, as if it had passed on a GPU."""
    error = GradientError(1 << 20, 0.9, 1.0)
    some = {"eager_differing": 3, "eager_ulp": 1.0, "dx": error, "dw": error}
    sweep_rows = sweep(quick=False)
    tallies = []
    for row in sweep_rows:
        outputs = sum(case.outputs for case in row.cases)
        tally = Tally(outputs, rows=sum(case.M for case in row.cases), close=1)
        if row.section == "constructed":
            tally = dataclasses.replace(tally, differing=12_345, off_in_row=1.5)
        elif outputs and "NaN" not in row.name:
            tally = dataclasses.replace(tally, **some)
        tallies.append(tally)
    return list(judge_all(sweep_rows, tallies))


def test_the_summary_has_the_verdict_and_the_comparisons() -> None:
    rows = counted_rows()
    short = printed.check(printing.blocks(result_of(rows)))
    assert short.startswith(
        f"PASSED: all {len(rows)} rows of the sweep keep the contract\n193.8 million outputs in 1 s"
    )
    assert len(short.splitlines()) < 40
    assert "exact, constructed rows  9.437 million" in short
    assert "0.001 %" in short
    assert "FAILED" not in short
    assert not any(row.name in short for row in rows)
    assert "the CPU, random rows" in short
    assert "the CPU" not in printed.check(printing.blocks(result_of(rows, "cpu")))


def test_verbose_prints_every_row() -> None:
    rows = counted_rows()
    full = printed.check(printing.blocks(result_of(rows), verbose=True))
    wide = render(printing.blocks(result_of(rows), verbose=True), 200)
    for row in rows:
        assert f"{row.name}  " in wide
    assert wide.count("passed") == len(rows)
    assert "so some numbers may differ" in " ".join(full.split())


def test_a_ratio_of_too_few_elements_or_rows_is_not_printed() -> None:
    """With --only a sample may be too small to be judged."""
    for elements, rows, printed_ratio in ((1 << 16, 256, True), ((1 << 16) - 1, 256, False), (1 << 16, 255, False)):
        error = GradientError(elements, 9.0, 1.0)
        tally = Tally(outputs=elements, rows=rows, dx=error, dw=error)
        result = result_of([RowResult("all", "fp32, together", tally, ())], "cpu")
        for verbose in (False, True):
            text = printed.check(printing.blocks(result, verbose=verbose))
            assert ("3 ×" in text) == printed_ratio
            assert printed_ratio or "too few" in text
        assert printed_ratio or "too few: fewer than 65,536 elements or 256 rows" in " ".join(text.split())


@pytest.mark.parametrize("quick", [True, False])
def test_a_failed_row_is_printed_with_a_command_that_runs_it_alone(quick, monkeypatch) -> None:
    rows = counted_rows()
    at = next(i for i, row in enumerate(rows) if row.name == "bf16, 1 + weight bf16, late")
    rows[at] = dataclasses.replace(rows[at], faults=("12 numbers differ from exact", "the error of dx is too large"))
    text = printed.check(printing.blocks(result_of(rows, "cpu", quick=quick)))
    assert text.startswith(f"FAILED: 1 of {len(rows)} rows of the sweep break the contract")
    assert f"FAILED  {rows[at].name}: " in text
    assert "\n  12 numbers differ from exact\n  the error of dx is too large\n" in text
    (line,) = (line for line in text.splitlines() if line.startswith("  rmsnorm verify "))
    assert (
        line in render(printing.blocks(result_of(rows, "cpu", quick=quick)), 40).splitlines()
    )  # not wrapped, so that it can be copied

    tried: list[tuple[VerifyCase, int]] = []

    def counted(case: VerifyCase, seed: int, device: torch.device) -> Tally:
        tried.append((case, seed))
        return Tally()

    monkeypatch.setattr(command, "compare", counted)
    command.verify("cpu", quick)
    whole, tried = tried, []
    with pytest.raises(SystemExit):
        main(shlex.split(line)[1:])
    assert tried
    assert set(tried) <= set(whole)
    assert len({seed for _, seed in whole}) == len(whole)  # no two cases have the same numbers
    (row,) = (row for row in sweep(quick) if row.name == rows[at].name)
    assert [case for case, _ in tried] == list(row.cases)


def test_the_command_for_a_failed_row_has_the_number_of_ranks() -> None:
    rows = [dataclasses.replace(row, faults=("wrong",)) for row in counted_rows()[-1:]]
    assert "rmsnorm verify --device cuda --quick --world 4\n" in render(
        printing.blocks(result_of(rows, quick=True, world=4))
    )


def test_only_selects_rows_by_name() -> None:
    sweep_rows = sweep(quick=True)
    assert select_rows(sweep_rows, ()) == sweep_rows
    assert {row.name for row in select_rows(sweep_rows, ["one row", "no rows"])} == {
        f"{dtype}, {form}"
        for dtype in ("fp32", "bf16", "fp16")
        for form in ("one row", "no rows", "dy one row expanded")
    } | {f"gated {dtype}, {form}" for dtype in ("fp32", "bf16", "fp16") for form in ("no rows", "dy one row expanded")}
    with pytest.raises(CommandError, match="--only 'fp4' matches no row"):
        select_rows(sweep_rows, ["one row", "fp4"])


def test_a_single_row_is_not_repeated_as_the_sum_of_its_dtype() -> None:
    (row,) = select_rows(sweep(quick=True), ["fp32, N 1 to 15"])
    assert [row.name for row in command.verify_rows([row], CPU)] == [row.name]


def test_every_case_is_compiled_ahead_once_grouped_by_kernel() -> None:
    sweep_rows = sweep(quick=True)
    groups = command.groups_by_kernel(sweep_rows)
    ahead = [case for group in groups for case in group]
    assert len(ahead) == len(set(ahead))
    wanted = {
        dataclasses.replace(case, M=min(case.M, command._FEW_ROWS * case.heads), eps=1.0)
        for row in sweep_rows
        for case in row.cases
    }
    assert set(ahead) == wanted
    for group in groups:
        gated = {(c.x, c.gate) for c in group if c.gate is not None}
        others = {(c.x, c.w, c.cast, c.form, c.residual, c.N.bit_length()) for c in group if c.gate is None}
        assert len(gated) + len(others) == 1
    assert len(groups) < len(ahead) / 2


def test_compiling_ahead_runs_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[VerifyCase] = []
    run = command.run_unsharded
    monkeypatch.setattr(command, "run_unsharded", lambda inputs, case: ran.append(case) or run(inputs, case))
    groups = command.groups_by_kernel(sweep(quick=True))
    for group in groups[::25]:
        command._run_once(group, torch.device("cpu"))
    assert set(ran) == {case for group in groups[::25] for case in group}
    assert {case.residual is None for case in ran} == {False, True}
