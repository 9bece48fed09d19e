"""prove: what a module computes, without touching it."""

import copy
import gc
import itertools
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

import rmsnorm
from rmsnorm import DeepseekV2RMSNorm, GatedRMSNorm, Proof, RMSNorm, TorchRMSNorm, patch, prove
from rmsnorm.spec import DTYPES, Gate, Spec


class DividingRMSNorm(nn.Module):
    """Divides by a root, which only strict=False accepts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(48))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return self.weight * (x32 / torch.sqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: nn.RMSNorm(48, 1e-5),
    "two dimensions": lambda: nn.RMSNorm((4, 12), 1e-5),
    "no weight": lambda: nn.RMSNorm(48, 1e-5, elementwise_affine=False),
    "offset": lambda: GemmaRMSNorm(48),
    "not every dtype": lambda: T5LayerNorm(48),
    "gate": lambda: MambaRMSNormGated(48, group_size=48),
    "root": DividingRMSNorm,
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_prove_finds_what_patch_finds(name: str, strict: bool) -> None:
    module = MODULES[name]()
    proof = prove(module, strict=strict)
    (verdict,) = patch(nn.ModuleDict({"norm": module}), strict=strict).verdicts
    assert {**vars(proof), "name": "norm"} == vars(verdict)
    assert (proof.dtypes, proof.own_forward_when) == (verdict.dtypes, verdict.own_forward_when)
    assert proof.proven == (proof.reason == "") == (not (strict and name == "root"))
    assert prove(module, strict=strict) == proof, "a replaced norm"


def state_of(module: nn.Module) -> Any:
    tensors = [(name, id(t), t.requires_grad, t._version, t.grad) for name, t in module.named_parameters()]
    hooks = {name: dict(value) for name, value in vars(module).items() if name.endswith("_hooks")}
    return type(module), {**vars(module), **hooks}, tensors, torch.get_rng_state().tolist(), torch.is_grad_enabled()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", MODULES)
def test_the_module_and_the_random_state_stay_as_they_are(name: str, device: str) -> None:
    module = MODULES[name]().to(device).train()
    module.requires_grad_(False)
    module.register_forward_pre_hook(lambda *_: pytest.fail("a hook was called"))
    subclasses = list(type(module).__subclasses__())
    before = state_of(module)
    bits = copy.deepcopy(module.state_dict())
    proof = prove(module)
    assert state_of(module) == before
    if device == "cpu":
        for key, t in module.state_dict().items():
            assert torch.equal(t, bits[key])
    assert proof == prove(MODULES[name]())
    gc.collect()
    assert type(module).__subclasses__() == subclasses


def test_nothing_keeps_the_module_or_its_class_alive() -> None:
    class LocalRMSNorm(DividingRMSNorm):
        pass

    module = LocalRMSNorm()
    proofs = [prove(module, strict=strict) for strict in (True, False)]
    alive = [weakref.ref(module), weakref.ref(module.weight), weakref.ref(LocalRMSNorm)]
    del module, LocalRMSNorm
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3
    assert [proof.proven for proof in proofs] == [False, True]


def test_the_dtypes_are_those_for_which_the_own_forward_is_not_needed() -> None:
    every = {(x, w) for x in DTYPES for w in DTYPES}
    assert set(prove(GemmaRMSNorm(48)).dtypes) == every
    assert set(prove(nn.RMSNorm(48)).dtypes) == {pair for pair in every if torch.float64 not in pair}
    t5 = prove(T5LayerNorm(48))
    assert {(x, w) for x, w in t5.dtypes if torch.float64 not in (x, w)} == {(x, x) for x in DTYPES[:3]}
    assert t5.own_forward_when == "when input and weight have different dtypes"
    assert set(prove(nn.RMSNorm(48, elementwise_affine=False)).dtypes) == {(x, None) for x in DTYPES[:3]}
    assert prove(nn.Identity()).dtypes == ()


def test_a_gated_norm_is_proven_for_triples_of_dtypes() -> None:
    proof = prove(Qwen3NextRMSNormGated(64))
    assert proof.spec == Spec(1e-6, gate=Gate())
    assert set(proof.dtypes) == set(itertools.product(DTYPES[:3], repeat=3))
    assert str(proof).startswith("Qwen3NextRMSNormGated is proven: early, eps 1e-06, silu gate last; float32: ")
    mamba = prove(MODULES["gate"]())
    assert mamba.spec == Spec(1e-6, gate=Gate(first=True))
    assert mamba.finding == "proven: early, eps 1e-06, silu gate first; its own forward runs without a gate"


@pytest.mark.parametrize(
    ("layer", "spec"),
    [
        (RMSNorm(48, 1e-4), Spec(1e-4)),
        (RMSNorm(48, cast="late", offset=1.0), Spec(1e-6, "late", 1.0)),
        (RMSNorm(48, elementwise_affine=False), Spec(1e-6)),
        (DeepseekV2RMSNorm(48, 1e-3), Spec(1e-3)),
        (TorchRMSNorm((4, 12)), Spec(torch.finfo(torch.float32).eps, "late")),
        (GatedRMSNorm(8), Spec(1e-6, gate=Gate())),
        (
            GatedRMSNorm(48, 1e-3, cast="late", activation="sigmoid", gate_first=True, groups=4),
            Spec(1e-3, "late", gate=Gate("sigmoid", first=True), groups=4),
        ),
        (GatedRMSNorm(48, elementwise_affine=False), Spec(1e-6, gate=Gate())),
    ],
)
def test_a_layer_of_this_package_computes_what_it_says_and_changes_nothing(layer: nn.Module, spec: Spec) -> None:
    proof = prove(layer)
    assert (proof.spec, proof.class_name, proof.reason) == (spec, type(layer).__name__, "")
    assert {(c.share, c.max_ulp) for c in proof.output_changes.values()} == {(0.0, 0)}
    floats = DTYPES[:3]
    every = [floats, (None,) if layer.weight is None else floats, *([] if spec.gate is None else [floats])]
    assert set(itertools.product(*every)) <= set(proof.dtypes)
    assert {len(dtypes) for dtypes in proof.dtypes} == {len(every)}


def test_a_subclass_of_a_layer_is_judged_by_its_own_forward() -> None:
    class Doubled(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert not prove(Doubled(48)).proven


def test_the_norm_inside_what_torch_compile_returned_is_judged() -> None:
    assert prove(torch.compile(GemmaRMSNorm(48))) == prove(GemmaRMSNorm(48))


def test_a_forward_on_the_instance_is_not_proven_by_that_of_the_class() -> None:
    norm = GemmaRMSNorm(48)
    norm.forward = torch.relu
    assert "a forward that was set on the instance" in prove(norm).reason


def test_a_module_that_breaks_the_proof_is_not_proven_and_raises_nothing() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise ValueError

    class Breaking(nn.Module):
        @property
        def weight(self) -> Tensor:
            raise Silent

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x

    assert prove(Breaking()).reason.startswith("the proof failed with ")
    assert prove(nn.LazyLinear(4, bias=False)).reason


def test_a_proof_is_one_line_and_can_be_pickled() -> None:
    proof = prove(GemmaRMSNorm(48))
    assert re.match(
        r"GemmaRMSNorm is proven: late, eps 1e-06, offset 1; float32: \d+% of outputs change by", str(proof)
    )
    assert "\n" not in str(proof)
    assert str(prove(nn.Identity())).startswith("Identity is not proven: its forward ")
    assert "accepted by strict=False" in str(prove(DividingRMSNorm(), strict=False))
    assert pickle.loads(pickle.dumps(proof)) == proof
    assert isinstance(proof, Proof)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (torch.ones(3), r"[prove] module is a Tensor, expected a torch.nn.Module"),
        (None, r"[prove] module is a NoneType, expected a torch.nn.Module"),
        (nn.RMSNorm, r"[prove] module is the class RMSNorm, expected a torch.nn.Module: an instance, such as RMSNorm("),
    ],
)
def test_what_is_no_module_raises_a_type_error_that_says_what_to_pass(module: Any, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        rmsnorm.prove(module)


def test_strict_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match=re.escape("[prove] strict is 1, expected True or False")):
        prove(nn.RMSNorm(48), strict=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("default", ["meta", "cuda:99"])
def test_a_norm_is_proven_whatever_the_default_device_is(default: str) -> None:
    """Also if no tensor can be allocated there, as on a GPU in a forked process."""
    norm = nn.RMSNorm(8, 1e-6)
    with torch.device(default):
        assert prove(norm).spec == Spec(1e-6, "late")
