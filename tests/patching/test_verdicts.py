"""Every RMSNorm class of the installed transformers: what patch says of it, and that it is true."""

import collections
import copy
import itertools
import re
import warnings
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.muse_spark.modeling_muse_spark import (
    MuseSparkTextCenteredRMSNorm,
    MuseSparkTextInputScaledRMSNorm,
)
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.models.xlstm.modeling_xlstm import xLSTMRMSNorm

from rmsnorm import gated_reference, patch, reference
from rmsnorm.bits import differing
from rmsnorm.spec import Gate, Spec
from tolerance import DEFINITION_SHARE, DEFINITION_ULP, GATED_SHARE, GATED_ULP, assert_same_bits
from verdict_table import TABLE, without_figures
from verdicts import OTHER_FUNCTIONS, Found, every, summary, table

COUNTED = "5.23.0"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 512
N = 96


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """Thousands of small tensors: on a busy machine the threads wait for one another far longer than they work."""
    threads(1)


def rows(seed: int, width: int, dtype: torch.dtype, count: int = ROWS) -> Tensor:
    """Random rows from large to so small that eps decides."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, width, generator=generator) * torch.logspace(2, -4, count)[:, None]).to(dtype)


def gates(seed: int) -> Tensor:
    """Random gates whose silu and sigmoid are near 0, near 1 and between."""
    return 3 * torch.randn(ROWS, N, generator=torch.Generator().manual_seed(seed))


def flat(compute: str, x: Tensor, module: nn.Module, spec: Spec) -> Tensor:
    w = dict(module.named_parameters()).get("weight")
    if compute == "published":
        return reference.published(x, w, spec.eps, spec.cast, spec.offset)
    return reference.forward(x, None, w, spec.eps, spec.cast, spec.offset, with_rstd=False)[0]


def test_the_counts() -> None:
    if transformers.__version__ != COUNTED:
        pytest.skip(f"the classes were counted in transformers {COUNTED}, this is {transformers.__version__}")
    assert summary() == {
        "early": 143,
        "late": 24,
        "late, offset 1": 14,
        "early, its own forward when input and weight have different dtypes": 10,
        "left": 5,
        "without a weight, early": 5,
        "early, silu gate first, 4 groups, its own forward without a gate": 5,
        "early, silu gate last": 5,
        "without a weight, first": 3,
        "late, sigmoid gate last": 3,
        "late, silu gate last, its own forward without a gate and for 1-D, 4-D, 5-D inputs": 1,
    }


def test_what_is_proven_is_true() -> None:
    """The class gives published's bits, the patched one exact's, and between them lies what contract 2 allows."""
    seen = {dtype: [0, 0] for dtype in DEFINITION_SHARE}
    proven = [f for f in every() if f.verdict is not None and f.verdict.spec is not None and not f.gated]
    assert len(proven) > 100
    for seed, found in enumerate(proven):
        spec = found.verdict.spec  # type: ignore[union-attr]
        patched = found.replaced().eval()
        for dtype in DTYPES:
            module, ours = found.module().to(dtype).eval(), copy.deepcopy(patched).to(dtype)
            weight = dict(module.named_parameters()).get("weight")
            width = N if weight is None else weight.shape[0]
            x = rows(seed, width, dtype, -(-ROWS * N // width))
            with torch.no_grad():
                before, after = module(x), ours(x)
            assert_same_bits(before, flat("published", x, module, spec), f"{found.cls}, before")
            assert_same_bits(after, flat("exact", x, module, spec), f"{found.cls}, after")
            count, ulp = differing(after, before)
            if dtype in seen:
                assert ulp <= DEFINITION_ULP[spec.cast], found.cls
                seen[dtype][0] += count
                seen[dtype][1] += x.numel()
    for dtype, (count, total) in seen.items():
        assert total > 5e6
        assert count <= total * DEFINITION_SHARE[dtype], dtype


def test_classes_like_t5s_run_their_own_forward_when_the_dtypes_differ() -> None:
    own = [f for f in every() if f.verdict is not None and f.verdict.own_forward_when and not f.gated]
    assert any(f.cls == "T5LayerNorm" for f in own)
    for found in own:
        patched = found.replaced()
        for x_dtype in (*DTYPES, torch.float64):
            for w_dtype in (*DTYPES, torch.float64):
                module = found.module().to(w_dtype)
                x = rows(3, N, x_dtype, 24)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    before = module(x)
                spec = Spec(module.variance_epsilon)
                ours = x_dtype == w_dtype and x_dtype in DTYPES
                if torch.float64 in (x_dtype, w_dtype):  # there some of these classes are early too
                    published = flat("published", x, module, spec)
                    ours = before.dtype == published.dtype and torch.equal(before, published)
                expected = flat("exact", x, module, spec) if ours else before
                after = copy.deepcopy(patched).to(w_dtype)(x)
                assert_same_bits(after, expected, f"{found.cls}, {x_dtype}, {w_dtype}")


GATED = {
    "BailingHybridRMSNormGated": Spec(1e-6, "late", gate=Gate("sigmoid")),
    "BambaRMSNormGated": Spec(1e-6, gate=Gate(first=True), groups=4),
    "FalconH1RMSNormGated": Spec(1e-6, "late", gate=Gate()),
    "Glm5NextTextRMSNormGated": Spec(1e-6, "late", gate=Gate("sigmoid")),
    "GraniteMoeHybridRMSNormGated": Spec(1e-6, gate=Gate(first=True), groups=4),
    "KimiLinearRMSNormGated": Spec(1e-6, "late", gate=Gate("sigmoid")),
    "MambaRMSNormGated": Spec(1e-6, gate=Gate(first=True), groups=4),
    "NemotronHRMSNormGated": Spec(1e-6, gate=Gate(first=True), groups=4),
    "OlmoHybridRMSNormGated": Spec(1e-6, gate=Gate()),
    "Qwen3NextRMSNormGated": Spec(1e-6, gate=Gate()),
    "Qwen3_5MoeRMSNormGated": Spec(1e-6, gate=Gate()),
    "Qwen3_5RMSNormGated": Spec(1e-6, gate=Gate()),
    "Qwen4ExpTextRMSNormGated": Spec(1e-6, gate=Gate()),
    "Zamba2RMSNormGated": Spec(1e-6, gate=Gate(first=True), groups=4),
}


def test_every_gated_class_is_proven() -> None:
    if transformers.__version__ != COUNTED:
        pytest.skip(f"the classes were counted in transformers {COUNTED}, this is {transformers.__version__}")
    found = {f.cls: f.verdict for f in every() if f.gated}
    assert {cls: v and v.spec for cls, v in found.items()} == GATED
    own = {cls: v.own_forward_when for cls, v in found.items() if v is not None and v.own_forward_when}
    assert own.pop("FalconH1RMSNormGated") == "without a gate and for 1-D, 4-D, 5-D inputs"
    assert set(own) == {cls for cls, spec in GATED.items() if spec.gate is not None and spec.gate.first}
    assert set(own.values()) == {"without a gate"}


def test_what_is_proven_of_gated_classes_is_true_for_all_dtypes() -> None:
    """The class gives published's bits, the patched one exact's; what lies between is stated in tolerance.py."""
    classes = collections.defaultdict(list)
    for found in every():
        if found.gated:
            assert found.verdict is not None
            classes[found.verdict.spec].append(found)
    seen = {dtype: [0, 0] for dtype in GATED_SHARE}
    for seed, (spec, same) in enumerate(classes.items()):
        patched = [found.replaced() for found in same]
        for dtypes in itertools.product(DTYPES, repeat=3):
            x, gate = rows(seed, N, dtypes[0]), gates(seed + 100).to(dtypes[1])
            w = same[0].module().weight.to(dtypes[2])
            published = gated_reference.published(x, gate, w, spec)
            exact = gated_reference.forward(x, gate, w, spec, with_rstd=False)[0]
            for found, ours in zip(same, patched, strict=True):
                module, what = found.module().to(dtypes[2]), f"{found.cls}, input, gate and weight {dtypes}"
                with torch.no_grad():
                    assert_same_bits(module(x, gate), published, f"{what}, before")
                    assert_same_bits(copy.deepcopy(ours).to(dtypes[2])(x, gate), exact, f"{what}, after")
            if exact.dtype in seen:
                count, ulp = differing(exact, published)
                assert ulp <= GATED_ULP[spec.cast, spec.gate.first], (spec, dtypes)
                seen[exact.dtype][0] += count
                seen[exact.dtype][1] += x.numel()
    for dtype, (count, total) in seen.items():
        assert total > 1e6
        assert count <= total * GATED_SHARE[dtype], dtype


def test_the_attributes_of_an_instance_decide_not_its_class() -> None:
    plain, biased, bare = xLSTMRMSNorm(N), xLSTMRMSNorm(N, use_bias=True), xLSTMRMSNorm(N, use_weight=False)
    report = patch(nn.Sequential(plain, biased, bare))
    assert [v.spec for v in report.verdicts] == [Spec(1e-6), None, Spec(1e-6)]
    assert "more than a weight: bias" in report.not_replaced[0].reason


def test_another_name_is_reported_only_if_it_is_proven() -> None:
    model = nn.Sequential(T5LayerNorm(N), nn.LayerNorm(N), nn.BatchNorm1d(N))
    report = patch(model)
    assert [(v.name, v.class_name) for v in report.verdicts] == [("0", "T5LayerNorm")]


def test_the_table_is_current() -> None:
    written = TABLE.read_text()
    version = re.search(r"transformers (\S+),", written)
    assert version is not None
    if version[1] != transformers.__version__:
        pytest.skip(f"docs/verdicts.md is of transformers {version[1]}, this is {transformers.__version__}")
    if torch.__version__.partition("+")[0] != "2.13.0":
        pytest.skip(f"docs/verdicts.md was written with torch 2.13.0, this is {torch.__version__}")
    assert without_figures(written) == without_figures(table()), "run: python tests/patching/verdicts.py"


def test_the_table_has_a_line_for_each_class() -> None:
    lines = table().splitlines()
    found: tuple[Found, ...] = every()
    end = lines.index("Why these classes are left:")
    assert sum(line.startswith("| ") and line.count("|") >= 7 for line in lines[:end]) == len(found) + 1


def test_the_document_says_why_each_class_that_is_left_is() -> None:
    left = [f for f in every() if f.group == "left"]
    explained = {re.match(r"`(\w+)`", sentence)[1] for sentence in OTHER_FUNCTIONS}  # type: ignore[index]
    assert explained == {f.cls for f in left}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_document_says_in_place_of_muse_sparks_classes_has_their_bits(dtype: torch.dtype) -> None:
    x, w = rows(0, N, dtype), rows(1, N, torch.float32, 1)[0].to(dtype)
    centered, scaled = (
        MuseSparkTextCenteredRMSNorm(N, 1e-6).to(dtype),
        MuseSparkTextInputScaledRMSNorm(N, 1e-6).to(dtype),
    )
    centered.weight.data, scaled.weight.data = w, w
    assert_same_bits(centered(x), reference.published(x, 1 + w, 1e-6, "late", 0.0))
    product = (x.float() * (1 + w).float()).to(x.dtype)
    assert_same_bits(scaled(x), reference.published(product, None, 1e-6, "early", 0.0))
