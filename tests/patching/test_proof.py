"""patch proves a norm by the operators that its forward runs. If it does anything else it is not replaced."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RMSNorm
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4UnweightedRMSNorm

from rmsnorm import patch, reference, rms_norm
from rmsnorm.spec import Spec
from tolerance import assert_same_bits

N = 96


class PlainRMSNorm(nn.Module):
    """The published arithmetic, to which each norm below adds one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.to(torch.float32)
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def changed_norm(change: Callable[..., Tensor], **attributes: Any) -> nn.Module:
    """A norm whose forward is change(plain, self, x), where plain(x) is the published arithmetic."""

    class ChangedRMSNorm(PlainRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return change(super().forward, self, x)

    norm = ChangedRMSNorm()
    for name, value in attributes.items():
        setattr(norm, name, value)
    return norm


def verdict(norm: nn.Module, strict: bool = True) -> Any:
    (found,) = patch(nn.ModuleDict({"norm": norm}), strict=strict).verdicts
    return found


def assert_not_replaced(norm: nn.Module, reason: str) -> None:
    before = type(norm)
    for strict in (True, False):
        found = verdict(norm, strict)
        assert found.spec is None, f"strict={strict}: {found}"
        assert reason in found.reason, found.reason
        assert type(norm) is before


# --- operators -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "operator"),
    [
        (lambda plain, self, x: plain(x.clamp(-65504, 65504)), "aten.clamp"),
        (lambda plain, self, x: plain(x.clamp_max(3e4)), "aten.clamp_max"),
        (lambda plain, self, x: plain(x.nan_to_num()), "aten.nan_to_num"),
        (lambda plain, self, x: plain(torch.where(x.isinf(), 0, x)), "aten.isinf"),
        (lambda plain, self, x: plain(x).clamp(-65504, 65504), "aten.clamp"),
        (lambda plain, self, x: plain(x).nan_to_num(), "aten.nan_to_num"),
        (lambda plain, self, x: torch.nn.functional.hardtanh(plain(x), -8, 8), "aten.hardtanh"),
        (lambda plain, self, x: plain(x) if x.abs().max() < 1e5 else x, "aten.abs"),
        (lambda plain, self, x: plain(x) if bool((x.sum(-1) > 0).any()) else x, "aten.gt"),
        (lambda plain, self, x: plain(x) + torch.randn_like(x) * 0, "aten.randn_like"),
        (lambda plain, self, x: plain(F.dropout(x, 0.5, self.training)), "aten.empty_like"),
        (lambda plain, self, x: plain(x.masked_fill(x.abs() > 1e6, 0)), "aten.abs"),
        (lambda plain, self, x: plain(x - x.mean(-1, keepdim=True)), "aten.sub"),
        (lambda plain, self, x: plain(x[..., :]).select(-1, 0), "aten.select"),
        (lambda plain, self, x: plain(x.flip(-1)).flip(-1), "aten.flip"),
    ],
)
def test_the_reason_names_an_operator_that_no_rmsnorm_needs(change: Callable[..., Tensor], operator: str) -> None:
    assert_not_replaced(changed_norm(change), f"its forward runs {operator}")


@pytest.mark.parametrize(
    "arithmetic",
    [
        lambda x, w, eps: w * (x.float() / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + eps)).to(x.dtype),
        lambda x, w, eps: w * (x.float() * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) + eps)).to(x.dtype),
        lambda x, w, eps: w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).to(x.dtype)),
        lambda x, w, eps: w * w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype),
        lambda x, w, eps: (w * x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype),
        lambda x, w, eps: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)),
        lambda x, w, eps: (w + 1).float() * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)),
        lambda x, w, eps: (
            2 * (w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype))
        ),
    ],
    ids=["eps outside", "sum", "cast statistic", "weight twice", "weight first", "no upcast", "wide output", "doubled"],
)
def test_other_arithmetic_is_not_replaced(arithmetic: Callable[..., Tensor]) -> None:
    assert_not_replaced(
        changed_norm(lambda plain, self, x: arithmetic(x, self.weight, self.eps)), "match no supported RMSNorm"
    )


def rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def test_a_norm_that_rounds_its_statistic_first_is_proven_without_a_weight() -> None:
    weighted = changed_norm(lambda plain, self, x: self.weight * (x * rstd(x.float(), self.eps).to(x.dtype)))
    assert_not_replaced(weighted, "it rounds the inverse root to bfloat16")
    x = torch.randn(64, N, dtype=torch.bfloat16)
    bare = DeepseekV4UnweightedRMSNorm(1e-6)
    before = bare(x)
    assert [v.spec for v in patch(nn.Sequential(bare)).verdicts] == [Spec(1e-6, "first")]
    assert_same_bits(bare(x), rms_norm(x, cast="first"))
    assert_same_bits(before, reference.published(x, None, 1e-6, "first", 0.0))


@pytest.mark.parametrize(
    ("arithmetic", "reason"),
    [
        (lambda x, w, eps: w * (x * rstd(x, eps)), "it takes the mean of squares in bfloat16, not in float32"),
        (
            lambda x, w, eps: w * (x.float() * torch.rsqrt(x.float().pow(2).sum(-1, True) + eps)).to(x.dtype),
            "it takes the sum of the squares, not their mean",
        ),
        (
            lambda x, w, eps: w * (x.float() * torch.rsqrt(x.float().pow(4).mean(-1, True) + eps)).to(x.dtype),
            "its forward raises to the power 4",
        ),
        (
            lambda x, w, eps: w * (x.float() * torch.rsqrt(x.float().mean(-1, True) + eps)).to(x.dtype),
            "it takes the mean of something other than the squares of its input",
        ),
        (
            lambda x, w, eps: w * (x.float() / (x.float().pow(2).mean(-1, True).sqrt() + eps)).to(x.dtype),
            "it adds eps outside of the square root",
        ),
        (
            lambda x, w, eps: w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True))).to(x.dtype),
            "it adds no eps under the square root",
        ),
        (
            lambda x, w, eps: w * (x.float() * rstd(x.float(), eps).to(x.dtype)).to(x.dtype),
            "it rounds the inverse root to bfloat16",
        ),
        (lambda x, w, eps: w * x, "it takes no square root"),
        (
            lambda x, w, eps: w * (x - x.mean(-1, True)) * rstd(x, eps),
            "sub.Tensor: it subtracts the mean, as LayerNorm",
        ),
        (
            lambda x, w, eps: w * x * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + eps),
            "it takes a variance, as LayerNorm does",
        ),
    ],
    ids=["no upcast", "sum", "power", "mean", "eps outside", "no eps", "statistic", "no root", "centred", "variance"],
)
def test_the_reason_names_the_usual_differences(arithmetic: Callable[..., Tensor], reason: str) -> None:
    norm = changed_norm(lambda plain, self, x: arithmetic(x, self.weight, self.eps))
    assert_not_replaced(norm, reason)


@pytest.mark.parametrize("divided", [lambda x, v: x / v.sqrt(), lambda x, v: x * v.sqrt().reciprocal()])
def test_the_reason_says_that_a_division_by_a_root_is_accepted_by_strict_false(divided: Any) -> None:
    def change(plain: Any, self: Any, x: Tensor) -> Tensor:
        v = x.float().pow(2).mean(-1, keepdim=True) + self.eps
        return self.weight * divided(x.float(), v).to(x.dtype)

    reason = verdict(changed_norm(change)).reason
    assert reason.endswith(
        "; it computes the mean or rsqrt differently (it divides by a square root), which strict=False accepts"
    )
    assert verdict(changed_norm(change), strict=False).spec == Spec(1e-6)


@pytest.mark.parametrize(
    "arithmetic",
    [
        lambda x, w, eps: w * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).type_as(x),
        lambda x, w, eps: w * (x.float() * ((x.float() * x.float()).mean(-1, True) + eps).pow(-0.5)).to(x.dtype),
        lambda x, w, eps: w * (x.float() * torch.rsqrt(x.float().pow(2).sum(-1, True) / x.shape[-1] + eps)).to(x.dtype),
        lambda x, w, eps: (torch.rsqrt(eps + x.float().pow(2).mean(-1, True)) * x.float()).to(x.dtype) * w,
        lambda x, w, eps: w * (x.double().float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + eps)).to(x.dtype),
    ],
    ids=["square", "power", "sum and division", "other order", "cast there and back"],
)
@pytest.mark.parametrize("rank", ["unchanged", "two dimensions"])
def test_the_same_arithmetic_written_differently_is_proven(arithmetic: Callable[..., Tensor], rank: str) -> None:
    def unchanged(plain: Any, self: Any, x: Tensor) -> Tensor:
        return arithmetic(x, self.weight, self.eps)

    def in_two_dimensions(plain: Any, self: Any, x: Tensor) -> Tensor:
        return arithmetic(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(*x.shape)

    assert verdict(changed_norm(unchanged if rank == "unchanged" else in_two_dimensions)).spec == Spec(1e-6)


# --- writes, reads and calls -----------------------------------------------------------------------------------

CALLS: list[int] = []
COUNTER = {"calls": 0}
CALLED = 0


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def count(self) -> None:
        self.calls += 1


TALLY = Counter()


def counts_in_an_attribute(plain: Any, self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return plain(x)


def counts_in_training(plain: Any, self: Any, x: Tensor) -> Tensor:
    if self.training:
        self.calls = 1
    return plain(x)


def counts_in_its_class(plain: Any, self: Any, x: Tensor) -> Tensor:
    type(self).called = True
    return plain(x)


def counts_in_a_list(plain: Any, self: Any, x: Tensor) -> Tensor:
    CALLS.append(1)
    return plain(x)


def counts_in_a_dict(plain: Any, self: Any, x: Tensor) -> Tensor:
    COUNTER["calls"] += 1
    return plain(x)


def counts_in_a_global(plain: Any, self: Any, x: Tensor) -> Tensor:
    global CALLED
    CALLED += 1
    return plain(x)


def counts_in_an_object(plain: Any, self: Any, x: Tensor) -> Tensor:
    TALLY.count()
    return plain(x)


def counts_through_setattr(plain: Any, self: Any, x: Tensor) -> Tensor:
    object.__setattr__(self, "calls", 1)
    return plain(x)


def counts_in_its_list(plain: Any, self: Any, x: Tensor) -> Tensor:
    self.seen.append(x)
    return plain(x)


def updates_a_buffer(plain: Any, self: Any, x: Tensor) -> Tensor:
    self.count.add_(1)
    return plain(x)


def handles_errors(plain: Any, self: Any, x: Tensor) -> Tensor:
    try:
        return plain(x.clamp(-1, 1))
    except BaseException:
        return plain(x)


@pytest.mark.parametrize(
    ("change", "reason", "attributes"),
    [
        (counts_in_an_attribute, "writes the attribute calls", {"calls": 0}),
        (counts_in_training, "writes", {}),
        (counts_in_its_class, "its forward", {}),
        (counts_in_a_list, "uses CALLS, a list", {}),
        (counts_in_a_dict, "uses COUNTER, a dict", {}),
        (counts_in_a_global, "uses CALLED, an int", {}),
        (counts_in_an_object, "uses TALLY, a Counter", {}),
        (counts_through_setattr, "uses object.__setattr__", {}),
        (counts_in_its_list, "uses an attribute append", {"seen": []}),
        (handles_errors, "runs aten.clamp", {}),
        (lambda plain, self, x: plain(x) if len(x) != 7 else x, "Tensor.__len__", {}),
        (lambda plain, self, x: [plain(x), print()][0], "uses print, a builtin", {}),
        (lambda plain, self, x: plain(x) if torch.get_num_threads() else x, "uses torch.get_num_threads", {}),
        (lambda plain, self, x: plain(x) if not torch.compiler.is_compiling() else x, "is_compiling", {}),
        (lambda plain, self, x: plain(x.detach()), "Tensor.detach", {}),
        (lambda plain, self, x: plain(x.data), "Tensor.data", {}),
        (lambda plain, self, x: plain(x * self.gain), "attribute gain, a Tensor", {"gain": torch.ones(1)}),
        (lambda plain, self, x: plain(x) * self._gain, "attribute _gain, a Tensor", {"_gain": torch.tensor(1.0)}),
        (lambda plain, self, x: self._act(plain(x)), "attribute _act, a builtin", {"_act": torch.abs}),
        (lambda plain, self, x: self.act(plain(x)), "attribute act, a partial", {"act": functools.partial(torch.mul, other=1)}),
        (lambda plain, self, x: plain(x) * self.__dict__.get("gain", 1), "uses an attribute get", {}),
    ],
)  # fmt: skip
def test_the_reason_names_what_it_writes_reads_or_calls(
    change: Callable[..., Tensor], reason: str, attributes: dict[str, Any]
) -> None:
    assert_not_replaced(changed_norm(change, **attributes), reason)
    assert CALLED == COUNTER["calls"] == TALLY.calls == len(CALLS) == 0, "the probe has side effects"


def test_the_reason_names_a_buffer_that_it_updates() -> None:
    norm = changed_norm(updates_a_buffer)
    norm.register_buffer("count", torch.zeros(()))
    assert_not_replaced(norm, "uses its buffer count")


def test_a_class_default_does_not_hide_what_the_instance_holds() -> None:
    class GainRMSNorm(PlainRMSNorm):
        _gain: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if self._gain is None else y * self._gain

    plain, scaled = GainRMSNorm(), GainRMSNorm()
    scaled._gain = torch.tensor(2.0)
    report = patch(nn.ModuleDict({"plain": plain, "scaled": scaled}))
    assert [v.spec for v in report.verdicts] == [Spec(1e-6), None]
    x = torch.randn(3, N)
    plain._gain = torch.tensor(2.0)
    assert torch.equal(plain(x), GainRMSNorm.forward(plain, x))


def test_norms_that_differ_in_what_they_hold_do_not_share_a_proof() -> None:
    @dataclasses.dataclass
    class Settings:
        gain: float = dataclasses.field(repr=False, default=1.0)

    class ConfiguredRMSNorm(PlainRMSNorm):
        def __init__(self, gain: float) -> None:
            super().__init__()
            self.settings = Settings(gain)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.settings.gain

    report = patch(nn.Sequential(ConfiguredRMSNorm(1.0), ConfiguredRMSNorm(2.0)))
    assert [v.spec for v in report.verdicts] == [None, None]
    assert all("its forward uses an attribute gain" in v.reason for v in report.verdicts)

    class BufferedRMSNorm(PlainRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if getattr(self, "gain", None) is None else y * self.gain

    without, with_buffer = BufferedRMSNorm(), BufferedRMSNorm()
    with_buffer.register_buffer("gain", torch.tensor(2.0))
    report = patch(nn.Sequential(without, with_buffer))
    assert [v.spec for v in report.verdicts] == [Spec(1e-6), None]


@pytest.mark.parametrize("name", ["shape", "state", "w", "cls"])
def test_an_attribute_may_have_any_name(name: str) -> None:
    """Also those of the parameters of the functions that set attributes of a stand-in."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)

    code = f"def forward(self, x): return forward_of_norm(self, x) if self.{name} else x"
    names: dict[str, Any] = {"forward_of_norm": forward}
    exec(code, names)
    norm = type("NamedRMSNorm", (PlainRMSNorm,), {"forward": names["forward"]})()
    setattr(norm, name, 1)
    assert verdict(norm).spec == Spec(1e-6)


def test_what_a_norm_holds_is_not_copied() -> None:
    class Uncopied:
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

        __copy__ = __reduce_ex__ = __deepcopy__  # type: ignore[assignment]

    norm = PlainRMSNorm()
    norm.owner = [Uncopied()]
    assert verdict(norm).spec == Spec(1e-6)


# --- states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda plain, self, x: plain(x) if x.shape[0] != 1000 else x, "branches on the size of its input"),
        (lambda plain, self, x: plain(x) if x.size(0) > 1 else x, "branches on the size of its input"),
        (lambda plain, self, x: plain(x) if x.numel() < 1 << 20 else x, "branches on the size of its input"),
        (lambda plain, self, x: plain(x) if x.shape[:-1] != (7, 7) else x, "branches on the size of its input"),
        (
            lambda plain, self, x: plain(x) if x.numel() // 96 % 2 else plain(x) * 1.5,
            "branches on the size of its input",
        ),
        (lambda plain, self, x: {7: torch.abs}.get(x.shape[0], plain)(x), "its forward"),
        (lambda plain, self, x: plain(x) if x.is_contiguous() else x * 2, "Tensor.is_contiguous"),
        (lambda plain, self, x: plain(x) if x.stride(-1) == 1 else x * 2, "Tensor.stride"),
        (lambda plain, self, x: plain(x) if x.data_ptr() % 16 == 0 else x * 2, "Tensor.data_ptr"),
        (lambda plain, self, x: plain(x) if x.dim() != 1 else x * 2, "match no supported RMSNorm"),
        (lambda plain, self, x: plain(x) if x.ndim != 5 else x * 2, "match no supported RMSNorm"),
        (lambda plain, self, x: plain(x) if torch.is_grad_enabled() else x * 2, "match no supported RMSNorm"),
        (lambda plain, self, x: plain(x) if not torch.is_inference_mode_enabled() else x * 2, "inference mode"),
        (lambda plain, self, x: plain(x) if self.training else x * 2, "match no supported RMSNorm"),
        (lambda plain, self, x: plain(x) if x.requires_grad or x.dtype != torch.float16 else x * 2, "float16"),
        (lambda plain, self, x: plain(x) if self.weight.requires_grad else x * 2, "match no supported RMSNorm"),
        (lambda plain, self, x: plain(x) if x.device.type == "cpu" else x * 2, "cuda:0"),
        (lambda plain, self, x: plain(x) if not x.is_cuda else x * 2, "Tensor.is_cuda"),
    ],
)
def test_a_branch_that_computes_something_else_is_found(change: Callable[..., Tensor], reason: str) -> None:
    assert_not_replaced(changed_norm(change), reason)


def test_a_norm_that_raises_for_some_ranks_still_does() -> None:
    def change(plain: Any, self: Any, x: Tensor) -> Tensor:
        if x.dim() != 3:
            raise ValueError("expected 3 dimensions")
        return plain(x)

    norm = changed_norm(change)
    found = verdict(norm)
    assert found.spec == Spec(1e-6)
    assert "for 1-D, 2-D, 4-D, 5-D inputs" in str(found)
    assert norm(torch.randn(2, 3, N)).shape == (2, 3, N)
    with pytest.raises(ValueError, match="expected 3 dimensions"):
        norm(torch.randn(3, N))


def test_a_norm_that_changes_under_autocast_runs_its_own_forward_there() -> None:
    norm = changed_norm(lambda plain, self, x: plain(x) if not torch.is_autocast_enabled("cpu") else plain(x) * 2)
    assert "under autocast" in str(verdict(norm))
    x = torch.randn(3, N)
    plain = norm(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), type(norm)._rmsnorm_original.forward(norm, x))
        assert not torch.allclose(norm(x), plain)


FLAG = False
CONVERT = functools.partial(torch.mul, other=1)


class Settings:
    scale = 1.0


class MarkedTuple(tuple):  # type: ignore[type-arg]
    flag = False


@pytest.mark.parametrize(
    "change",
    [
        lambda plain, self, x: plain(x) * getattr(self.weight, "gain", 1.0),
        lambda plain, self, x: plain(x) if not hasattr(x, "_done") else x,
        lambda plain, self, x: plain(x) if type(self) is PlainRMSNorm else x,
        lambda plain, self, x: plain(x) if self.__class__.__mro__[1] is not nn.Module else x,
        lambda plain, self, x: x * 2 if x.shape.numel() > 10_000 else plain(x),
        lambda plain, self, x: x * 2 if x.flatten().shape[0] == 7 * 96 else plain(x),
        lambda plain, self, x: x * 2 if x.reshape(-1).size(0) > 10**6 else plain(x),
        lambda plain, self, x: x * 2 if x.mean(-1).shape[-1] == 1000 else plain(x),
        lambda plain, self, x: x * 2 if str(x.shape) == "torch.Size([7, 96])" else plain(x),
        lambda plain, self, x: x * 2 if "[7, " in f"{x.shape}" else plain(x),
        lambda plain, self, x: x * 2 if len(range(x.shape[0])) == 7 else plain(x),
        lambda plain, self, x: x * 2 if x.shape[0] * 1.0 == 7 else plain(x),
        lambda plain, self, x: x * 2 if x.shape[0].bit_length() == 3 else plain(x),
        lambda plain, self, x: x * 2 if x.dim() == 2 and torch.is_inference_mode_enabled() else plain(x),
        lambda plain, self, x: x * 2 if x.dim() == 2 and self.training and not x.requires_grad else plain(x),
        lambda plain, self, x: plain(x).squeeze(0) if x.dim() == 4 else plain(x),
        lambda plain, self, x: x * 2 if torch.get_default_dtype() == torch.float64 else plain(x),
        lambda plain, self, x: x * 2 if x.device.type == "mps" else plain(x),
        lambda plain, self, x: x * 2 if FLAG else plain(x),
        lambda plain, self, x: plain(x) * Settings.scale,
        lambda plain, self, x: CONVERT(plain(x)),
        lambda plain, self, x: x * 2 if self.mark.flag else plain(x),
        lambda plain, self, x: x * 2 if object.__getattribute__(self, "mark") is None else plain(x),
        torch.autocast("cpu", enabled=False)(lambda plain, self, x: plain(x)),
    ],
)
def test_a_branch_that_is_hidden_from_the_probe_is_found(change: Callable[..., Tensor]) -> None:
    found = verdict(changed_norm(change, mark=MarkedTuple()))
    assert found.spec is None, found


def test_a_norm_that_changes_under_autocast_in_training_runs_its_own_forward_under_autocast() -> None:
    norm = changed_norm(
        lambda plain, self, x: x * 2 if torch.is_autocast_enabled("cpu") and self.training else plain(x)
    )
    assert "under autocast" in str(verdict(norm))


@pytest.mark.parametrize(
    "change",
    [
        lambda self: max(self.eps, 1e-6),
        lambda self: self.eps or 1e-5,
        lambda self: min(self.eps, 0.1),
        lambda self: round(self.eps, 8),
        lambda self: 0.5 if self.eps == 0.25 else self.eps,
    ],
)
def test_a_norm_that_changes_its_eps_before_use_is_not_replaced(change: Callable[..., float]) -> None:
    def forward(plain: Any, self: Any, x: Tensor) -> Tensor:
        h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + change(self))
        return self.weight * h.to(x.dtype)

    assert verdict(changed_norm(forward)).spec is None


def test_attributes_that_compare_equal_do_not_share_a_proof() -> None:
    class SignedRMSNorm(PlainRMSNorm):
        def __init__(self, sign: float) -> None:
            super().__init__()
            self.sign = sign

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if math.copysign(1, self.sign) > 0 else y * 2

    report = patch(nn.Sequential(SignedRMSNorm(0.0), SignedRMSNorm(-0.0)))
    assert [v.spec for v in report.verdicts] == [Spec(1e-6), None]


def test_the_getter_of_a_property_is_checked() -> None:
    class PropertyRMSNorm(PlainRMSNorm):
        @property
        def gain(self) -> Tensor:
            CALLS.append(1)
            return self.weight

        def forward(self, x: Tensor) -> Tensor:
            h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
            return self.gain * h.to(x.dtype)

    assert_not_replaced(PropertyRMSNorm(), "uses CALLS, a list")


# --- gradients -------------------------------------------------------------------------------------------------


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx / 2


def hooked(plain: Any, self: Any, x: Tensor) -> Tensor:
    y = plain(x)
    if y.requires_grad:
        y.register_hook(lambda g: g.clamp(-1, 1))
    return y


def hooked_at_its_node(plain: Any, self: Any, x: Tensor) -> Tensor:
    y = plain(x)
    if y.requires_grad:
        y.grad_fn.register_hook(lambda grads, _: grads)
    return y


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "Tensor.register_hook"),
        (hooked_at_its_node, "Tensor.grad_fn"),
        (lambda plain, self, x: plain(Halved.apply(x)), "uses Halved.apply"),
        (lambda plain, self, x: plain(Halved.apply(x) if self.training else x), "uses Halved.apply"),
        (lambda plain, self, x: plain(Halved.apply(x) if x.dtype == torch.bfloat16 else x), "uses Halved.apply"),
        (lambda plain, self, x: plain(x if not self.training else x.detach()), "Tensor.detach"),
        (lambda plain, self, x: torch.no_grad()(plain)(x), "uses torch.no_grad"),
    ],
)
def test_a_norm_with_another_gradient_is_not_replaced(change: Callable[..., Tensor], reason: str) -> None:
    assert_not_replaced(changed_norm(change), reason)


def test_a_norm_that_rounds_late_only_with_gradients_is_not_replaced() -> None:
    def change(plain: Any, self: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(x)
        h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * h).to(x.dtype)

    assert_not_replaced(
        changed_norm(change), "match no supported RMSNorm for bfloat16 input with bfloat16 weight, with gradients"
    )


def test_a_norm_with_another_eps_with_gradients_is_not_replaced() -> None:
    def change(plain: Any, self: Any, x: Tensor) -> Tensor:
        eps = self.eps if not torch.is_grad_enabled() else 1e-5
        h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        return self.weight * h.to(x.dtype)

    assert_not_replaced(changed_norm(change), "match no supported RMSNorm")


# --- the same on every processor ---------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["as the library takes it", "as rsqrt takes it"])
@pytest.mark.parametrize("width", [8, 64, 96])
def test_another_way_to_take_the_root_is_not_replaced_even_if_its_bits_agree(
    root: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On some processors 1 / sqrt and rsqrt give the same bits. Here they are made to."""

    class RootRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))
            self.eps = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            h = x.float() * (1 / torch.sqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps))
            return self.weight * h.to(x.dtype)

    if root == "as rsqrt takes it":
        library = torch.library.Library("aten", "IMPL")
        library.impl("sqrt", lambda v: torch.rsqrt(v).double().reciprocal().to(v.dtype), "CPU")
        library.impl("reciprocal", lambda r: torch.rsqrt(r.double().square()).to(r.dtype), "CPU")
    else:
        library = None
    try:
        strict, loose = verdict(RootRMSNorm()), verdict(RootRMSNorm(), strict=False)
    finally:
        if library is not None:
            library._destroy()
    assert strict.spec is None
    assert "which strict=False accepts" in strict.reason
    assert loose.spec == Spec(1e-6)


# --- unusual classes -------------------------------------------------------------------------------------------------


class SlottedRMSNorm(PlainRMSNorm):
    __slots__ = ("more",)


class RegisteredRMSNorm(PlainRMSNorm):
    def __init_subclass__(cls, *, tag: str) -> None:
        super().__init_subclass__()


class GuardedRMSNorm(PlainRMSNorm):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError("my class stays")
        super().__setattr__(name, value)


class BuiltinRMSNorm(PlainRMSNorm):
    forward = torch.rsqrt


class UnprintableRMSNorm(PlainRMSNorm):
    def __init__(self) -> None:
        super().__init__()
        self.odd = type("Odd", (), {"__repr__": lambda self: 1 / 0, "__eq__": lambda self, other: 1 / 0})()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.odd else x


class RaisingRMSNorm(PlainRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no CPU here")


class GettingRMSNorm(PlainRMSNorm):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class RefusingMeta(type):
    def __call__(cls, *args: Any) -> Any:
        return super().__call__(*args)

    def __new__(mcs, name: str, bases: Any, body: Any) -> Any:
        if any(isinstance(base, RefusingMeta) for base in bases):
            raise TypeError("no subclasses")
        return super().__new__(mcs, name, bases, body)


class FinalRMSNorm(PlainRMSNorm, metaclass=RefusingMeta):
    pass


@pytest.mark.parametrize(
    "cls",
    [SlottedRMSNorm, RegisteredRMSNorm, GuardedRMSNorm, BuiltinRMSNorm, UnprintableRMSNorm, RaisingRMSNorm,
     GettingRMSNorm, FinalRMSNorm],
)  # fmt: skip
def test_an_unusual_class_is_not_replaced_and_the_others_are(cls: type[nn.Module]) -> None:
    model = nn.ModuleDict({"unusual": cls(), "plain": PlainRMSNorm()})
    report = patch(model)
    assert [(v.name, v.spec is None) for v in report.verdicts] == [("unusual", True), ("plain", False)]
    assert report.verdicts[0].reason
    assert type(model["unusual"]) is cls


def test_a_class_that_registers_its_subclasses_does_not_see_ours() -> None:
    registered = []

    class ListedRMSNorm(PlainRMSNorm):
        def __init_subclass__(cls) -> None:
            registered.append(cls)

    assert verdict(ListedRMSNorm()).spec == Spec(1e-6)
    assert registered == []


def test_a_parametrized_norm_is_reported() -> None:
    model = nn.ModuleDict({"norm": DeepseekV2RMSNorm(N)})
    parametrize.register_parametrization(model["norm"], "weight", nn.Identity())
    (found,) = patch(model).verdicts
    assert (found.name, found.spec) == ("norm", None)
    assert "parametrizations" in found.reason


def test_the_profiler_of_the_thread_is_restored() -> None:
    events: list[str] = []

    def mine(frame: Any, event: str, arg: Any) -> None:
        events.append(event)

    sys.setprofile(mine)
    try:
        assert verdict(PlainRMSNorm()).spec == Spec(1e-6)
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(None)
    assert events
