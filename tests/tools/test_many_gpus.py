"""benchmarks/many_gpus.py, with gloo on the CPU and models as small as can be."""

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

pytest.importorskip("transformers", reason="there is no transformers")

import rmsnorm
from rmsnorm.errors import CommandError
from rmsnorm.tools.processes import Rank
from rmsnorm.tools.verify.compare import eager
from scripts import benchmark_script


@pytest.fixture(scope="module")
def many() -> Any:
    return benchmark_script("many_gpus")


def run(many: Any, out: Path, *arguments: str) -> tuple[Any, int]:
    code = many.main(["--tiny", "--device", "cpu", "--repetitions", "1", "--out", str(out), *arguments])
    return json.loads((out / "many-gpus-cpu.json").read_text()), code


def test_two_ranks_are_compared_timed_and_profiled(
    many: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = "FSDP2,sequence parallel"
    found, code = run(many, tmp_path, "--worlds", "2", "--plans", plans)
    assert code == 0, found["failed"]
    by_sharding = dict(many.result.by_sharding(found["bits"]))
    cases = many.definitions.Options(True, (), (), 1, 2, 16, 2).bit_cases()
    counts = {(2, "rows"): len(cases), (2, "columns"): len(cases), (2, "FSDP2"): len(cases) // 2}
    assert {key: len(group) for key, group in by_sharding.items()} == counts
    for case in found["bits"]:
        tensors = 4 if case["residual"] else 2
        ranks_with_all = 1 if case["sharding"] == "FSDP2" else 2
        assert case["elements"] == tensors * case["rows"] * case["width"] * ranks_with_all
        assert case["differing"] == 0
        assert case["dw"].get("differing", 0) == 0
    for one in found["norms"]:
        assert min(time["median_us"] for time in one["times"].values()) > 0
    assert [(one["plan"], tuple(one["mesh"].values()), one["batch"]) for one in found["steps"]] == [
        ("FSDP2", (2, 1), 4),
        ("sequence parallel", (1, 2), 2),
    ]
    for one in found["steps"]:
        as_is, patched = one["variants"]
        assert (as_is["variant"], patched["variant"]) == ("as is", "patched")
        assert as_is["over_as_is"]["ratio"] == 1
        for variant in (as_is, patched):
            assert max(variant["errors"].values()) < many.definitions.MODEL.far_off
            shares = variant["shares_us"]
            assert shares["norms"] > 0
            assert shares["other collectives"] > 0
        assert (patched["shares_us"]["their collectives"] > 0) == (one["plan"] == "sequence parallel")
    printed = " ".join(capsys.readouterr().out.split())
    assert "Training step on 2 ranks, sequence parallel, mesh 1 × 2, 2 × 16 tokens" in printed
    assert "aims are met" in printed


def test_a_rank_that_fails_keeps_the_parts_before(
    many: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(work: Any, arguments: Any, world: int, device: str, on_report: Callable[..., None]) -> None:
        on_report("left_out", [{"plan": "FSDP2", "reason": "a reason"}])
        raise CommandError(f"rank 0 of {world} failed")

    monkeypatch.setattr(many.measuring.processes, "run_ranks", failing)
    found, code = run(many, tmp_path, "--worlds", "1,3")
    assert code == 1
    assert found["failed"] == {"1": "rank 0 of 1 failed", "3": "rank 0 of 3 failed"}
    assert [(one["world"], one["plan"]) for one in found["left_out"]] == [(1, "FSDP2"), (3, "FSDP2")]
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 ranks, FSDP2 was left out: a reason" in printed
    assert "not measured: sequence parallel on 1 rank; FSDP2 × TP on 1 rank; sequence parallel on 3 ranks" in printed


def test_a_plan_that_a_model_does_not_fit_is_left_out(many: Any) -> None:
    plans = many.measuring.plans
    config = types.SimpleNamespace(num_key_value_heads=8)
    assert plans.why_not("sequence parallel", 3, config, 9) == (
        "8 heads of keys and values cannot be spread evenly over 3 ranks"
    )
    assert plans.why_not("sequence parallel", 8, config, 12) == (
        "12 tokens of a sequence cannot be spread evenly over 8 ranks"
    )
    assert plans.why_not("sequence parallel", 8, config, 16) == ""
    assert plans.why_not("FSDP2", 3, config, 7) == ""
    assert [plans.sizes_of("FSDP2 × TP", world) for world in (1, 2, 3, 8)] == [(1, 1), (1, 2), (3, 1), (4, 2)]


@pytest.mark.parametrize(
    ("worlds", "message"), [("0", "--worlds is 0, expected at least 1"), ("1,x", "'1,x': give numbers")]
)
def test_a_number_of_ranks_that_cannot_be_is_refused(
    many: Any, worlds: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((CommandError, SystemExit)) as raised:
        many.main(["--device", "cpu", "--worlds", worlds])
    assert message in str(raised.value) + capsys.readouterr().err


def test_bits_that_differ_are_counted(many: Any, one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    options = many.definitions.Options(True, (), (), 1, 2, 16, 2)
    (case, *_) = (case for case in options.bit_cases() if case.x == torch.float32 and case.residual is None)
    monkeypatch.setattr(many.definitions.Options, "bit_cases", lambda self: [case])
    rank = Rank(0, 1, torch.device("cpu"), lambda *_: None)
    norms = many.measuring.norms

    def differing() -> dict[str, int]:
        return {one["sharding"]: one["differing"] for one in norms.compare_bits(rank, options)}

    assert differing() == {"rows": 0, "columns": 0, "FSDP2": 0}
    whole = norms.run_unsharded
    monkeypatch.setattr(norms, "run_unsharded", lambda inputs, case: whole(inputs.map(lambda t, _: t * 1.5), case))
    assert min(differing().values()) > 0
    monkeypatch.setattr(norms, "run_unsharded", whole)
    from rmsnorm.ops import sharding

    over_ranks = sharding._over_ranks
    monkeypatch.setattr(sharding, "_over_ranks", lambda S, norm: over_ranks(S, norm) * 1.001)
    found = differing()
    assert found["columns"] > 0
    assert found["rows"] == 0


# --- shares --------------------------------------------------------------------------------------------------


class AsItIs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        return eager(x, self.weight, 1e-6, "early", 0.0)


@pytest.mark.parametrize(
    ("norm", "mark"), [(AsItIs, "rsqrt"), (AsItIs, "RsqrtBackward"), (lambda: rmsnorm.RMSNorm(16), "Norm")]
)
def test_the_forward_and_backward_of_norms_count_as_norms(
    many: Any, norm: Callable[[], nn.Module], mark: str, monkeypatch: pytest.MonkeyPatch, runner: str
) -> None:
    """Each operator counts with 1 instead of its time, if its name has the mark of the norm, or that of a layer."""
    shares = many.measuring.steps.shares
    model = nn.Sequential(nn.Linear(16, 16), norm(), nn.Linear(16, 16), norm())
    norms, x = [model[1], model[3]], torch.randn(4, 16, requires_grad=True)

    def counts(of: str) -> dict[str, float]:
        monkeypatch.setattr(shares, "_own_time", lambda operator: float(of in operator.name))
        found: dict[str, float] = shares.measure(lambda: model(x).sum().backward(), norms, torch.device("cpu"))
        return found

    counts(mark)  # after the first call of a kind C++ makes the calls, if it is there
    of_norms, of_layers = counts(mark), counts("AddmmBackward0")
    assert of_norms["norms"] >= 2
    assert of_norms["others"] == 0
    assert of_layers["norms"] == 0
    assert of_layers["others"] >= 2


def event(name: str, parent: Any = None, number: int = -1, kernels: dict[str, float] | None = None) -> Any:
    made = types.SimpleNamespace(
        name=name, cpu_parent=parent, cpu_children=[], sequence_nr=number, device_type=DeviceType.CPU,
        kernels=[types.SimpleNamespace(name=kernel, duration=us) for kernel, us in (kernels or {}).items()],
    )  # fmt: skip
    if parent is not None:
        parent.cpu_children.append(made)
    return made


def kernel(name: str, us: float) -> Any:
    span = types.SimpleNamespace(elapsed_us=lambda: us)
    return types.SimpleNamespace(name=name, device_type=DeviceType.CUDA, is_user_annotation=False, time_range=span)


def test_kernels_and_collectives_are_attributed_by_what_launched_them(many: Any) -> None:
    shares = many.measuring.steps.shares
    inside = event("a norm of the model")
    begin, launch = event("aten::view", inside, 5), event("rmsnorm", inside, -1, {"forward_block": 1.0})
    reduce = event("c10d::allreduce_", inside, -1, {"ncclDevKernel_AllReduce": 2.0})
    end = event("aten::view", inside, 7)
    own, next_one = (event("autograd::engine::evaluate_function: N", None, number) for number in (6, 7))
    gather = event("FSDP::all_gather", own)
    launched = [
        event("rmsnorm_backward", own, -1, {"backward_loop": 4.0}),
        event("c10d::allgather", gather, -1, {"ncclDevKernel_AllGather": 8.0}),
        event("aten::mm", next_one, -1, {"gemm": 16.0}),
    ]
    on_gpu = [kernel(one.name, one.duration) for each in (launch, reduce, *launched) for one in each.kernels]
    unknown = [kernel("gemm", 32.0), kernel("ncclDevKernel_SendRecv", 64.0), kernel("nccl:all_reduce", 128.0)]
    operators = [inside, begin, launch, reduce, end, own, next_one, gather, *launched]
    found = shares.classify([*operators, *on_gpu, *unknown], on_gpu=True)
    assert found == {"norms": 5.0, "their collectives": 2.0, "other collectives": 72.0, "others": 48.0}
