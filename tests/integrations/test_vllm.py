"""The providers in vLLM's own registry, dispatched by vLLM's own operators, on the CPU."""

from importlib.metadata import entry_points

import pytest
import torch

from installed import need

need("vllm")

import vllm.plugins
from torch import Tensor
from vllm.compilation.passes.ir.lowering_pass import VllmIRLoweringPass
from vllm.config import DeviceConfig, VllmConfig
from vllm.config.kernel import IrOpPriorityConfig
from vllm.ir import ops

import rmsnorm
from rmsnorm.bits import differing
from rmsnorm.integrations import vllm as adapter
from scripts import benchmark_script

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
NAMES = {"rmsnorm": "early", "rmsnorm_late": "late"}
NEARLY_NONE = (
    1e-4  # outputs that differ because native takes its statistic in fp32; another rounding changes 5 % or more
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM does it in each of its processes: by the entry point of the installed package."""
    monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
    monkeypatch.setattr("vllm.envs.VLLM_PLUGINS", ["rmsnorm"], raising=False)
    vllm.plugins.load_general_plugins()
    torch.manual_seed(0)


def inputs(dtype: torch.dtype, weight_dtype: torch.dtype, rows: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    x, residual, weight = ops.fused_add_rms_norm.generate_inputs(num_tokens=rows, hidden_size=640, dtype=dtype)[:3]
    return x, residual, weight.to(weight_dtype)


def test_the_entry_point_registers_both_providers_and_may_be_called_twice() -> None:
    (entry,) = entry_points(group="vllm.general_plugins", name="rmsnorm")
    assert entry.load() is adapter.register
    before = dict(ops.rms_norm.impls)
    adapter.register()
    assert ops.rms_norm.impls == before
    assert set(NAMES) < set(ops.rms_norm.impls)
    assert set(NAMES) < set(ops.fused_add_rms_norm.impls)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_those_of_rmsnorm(name: str, dtype: torch.dtype) -> None:
    x, residual, weight = inputs(dtype, dtype)
    kept = x.clone(), residual.clone()
    with ops.rms_norm.set_priority([name, "native"]), ops.fused_add_rms_norm.set_priority([name, "native"]):
        y = ops.rms_norm(x, weight, 1e-5)
        z, s = ops.fused_add_rms_norm.maybe_inplace(x, residual, weight, 1e-5)
    assert differing(y, rmsnorm.rms_norm(x, weight, 1e-5, cast=NAMES[name])) == (0, 0)
    expected_z, expected_s = rmsnorm.add_rms_norm(x, residual, weight, 1e-5, cast=NAMES[name])
    assert differing(z, expected_z) == (0, 0)
    assert differing(s, expected_s) == (0, 0)
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_float32_weight_is_multiplied_before_the_cast_as_gemma_needs(dtype: torch.dtype) -> None:
    x, _, weight = inputs(dtype, dtype)
    with ops.rms_norm.set_priority(["rmsnorm", "native"]):
        y = ops.rms_norm(x, weight.float() + 1.0, 1e-6)  # as vLLM's GemmaRMSNorm calls it
    assert y.dtype is dtype
    assert differing(y, rmsnorm.rms_norm(x, weight, 1e-6, cast="late", offset=1.0)) == (0, 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_row_alone_has_the_bits_it_has_in_a_batch(name: str, dtype: torch.dtype) -> None:
    x, residual, weight = inputs(dtype, dtype, rows=33)
    with ops.fused_add_rms_norm.set_priority([name, "native"]):
        together = ops.fused_add_rms_norm(x, residual, weight, 1e-6)
        for i in range(len(x)):
            alone = ops.fused_add_rms_norm(x[i : i + 1], residual[i : i + 1], weight, 1e-6)
            for a, b in zip(alone, together, strict=True):
                assert torch.equal(a[0], b[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_within_vllms_own_tolerances_of_its_native_implementation(dtype: torch.dtype) -> None:
    for op in (ops.rms_norm, ops.fused_add_rms_norm):
        args = op.generate_inputs(num_tokens=256, hidden_size=2048, dtype=dtype)
        native = op.impls["native"].impl_fn(*args)
        ours = op.impls["rmsnorm"].impl_fn(*args)
        torch.testing.assert_close(ours, native, **op.get_tolerance(dtype))


def test_native_differs_in_few_outputs_without_a_residual_and_in_many_with_one() -> None:
    x, residual, weight = (torch.randn(shape).bfloat16() for shape in [(1024, 2048), (1024, 2048), (2048,)])
    alone, _ = differing(ops.rms_norm.impls["native"].impl_fn(x, weight, 1e-6), rmsnorm.rms_norm(x, weight, 1e-6))
    assert alone <= NEARLY_NONE * x.numel()
    native, summed = ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, 1e-6)
    y, s = rmsnorm.add_rms_norm(x, residual, weight, 1e-6)
    assert differing(summed, s) == (0, 0)
    # Native normalizes the sum before it is rounded; the models' own classes, and we, normalize the rounded sum.
    assert differing(native, y)[0] > 0.05 * x.numel()
    assert differing(y, ops.rms_norm.impls["native"].impl_fn(s, weight, 1e-6))[0] <= NEARLY_NONE * x.numel()


@pytest.mark.parametrize("name", NAMES)
def test_a_statistic_of_the_first_columns_has_the_bits_of_our_functions(name: str) -> None:
    x, residual, weight = inputs(torch.bfloat16, torch.bfloat16)
    options = {"cast": NAMES[name], "variance_size": 320}
    with ops.rms_norm.set_priority([name, "native"]), ops.fused_add_rms_norm.set_priority([name, "native"]):
        y = ops.rms_norm(x, weight, 1e-5, 320)
        z, s = ops.fused_add_rms_norm(x, residual, weight, 1e-5, 320)
    assert differing(y, rmsnorm.rms_norm(x, weight, 1e-5, **options)) == (0, 0)
    for ours, theirs in zip(rmsnorm.add_rms_norm(x, residual, weight, 1e-5, **options), (z, s), strict=True):
        assert differing(theirs, ours) == (0, 0)
    if name == "rmsnorm":
        native = ops.rms_norm.impls["native"].impl_fn(x, weight, 1e-5, 320)
        assert differing(native, y)[0] <= NEARLY_NONE * x.numel()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"variance_size": 641}, "more columns than a row has"),
        ({"variance_size": 0}, "no columns"),
        ({"weight": torch.ones(640, dtype=torch.float16)}, "another 16-bit dtype"),
        ({"weight": torch.ones(1)}, "a weight that is broadcast"),
        ({"x": torch.ones(2, 640, dtype=torch.float64)}, "float64"),
        ({"x": torch.ones(2, 640, dtype=torch.bfloat16, device="meta")}, "another device"),
        ({"epsilon": -1.0}, "a negative eps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_we_do_not_compute_goes_to_the_next_provider(change: dict[str, object], why: str) -> None:
    x, _, weight = inputs(torch.bfloat16, torch.bfloat16, rows=2)
    given = {"x": x, "weight": weight, "epsilon": 1e-6, "variance_size": None}
    with ops.rms_norm.set_priority(["rmsnorm", "native"]):
        assert ops.rms_norm.dispatch(*given.values()).provider == "rmsnorm"
        assert ops.rms_norm.dispatch(*(given | change).values()).provider == "native", why


def test_a_residual_of_another_dtype_goes_to_the_next_provider() -> None:
    x, residual, weight = inputs(torch.bfloat16, torch.bfloat16)
    with ops.fused_add_rms_norm.set_priority(["rmsnorm", "native"]):
        assert ops.fused_add_rms_norm.dispatch(x, residual.float(), weight, 1e-6).provider == "native"
        assert ops.fused_add_rms_norm.dispatch(x, residual, weight, 1e-6).provider == "rmsnorm"


def test_the_setting_of_the_command_line_chooses_the_provider() -> None:
    x, residual, weight = inputs(torch.bfloat16, torch.bfloat16)
    chosen = IrOpPriorityConfig.with_default(["native"], rms_norm="rmsnorm,native", fused_add_rms_norm="rmsnorm,native")
    with chosen.set_priority():
        assert ops.rms_norm.dispatch(x, weight, 1e-6).provider == "rmsnorm"
        assert ops.fused_add_rms_norm.dispatch(x, residual, weight, 1e-6).provider == "rmsnorm"
    with IrOpPriorityConfig.with_default(["native"]).set_priority():
        assert ops.rms_norm.dispatch(x, weight, 1e-6).provider == "native"


def test_vllms_layer_runs_the_provider() -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

    x, residual, weight = inputs(torch.bfloat16, torch.bfloat16)
    with (
        set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))),
        ops.rms_norm.set_priority(["rmsnorm", "native"]),
        ops.fused_add_rms_norm.set_priority(["rmsnorm", "native"]),
    ):
        layer = RMSNorm(640, eps=1e-5, dtype=torch.bfloat16)
        layer.weight.data.copy_(weight)
        gemma = GemmaRMSNorm(640, eps=1e-5).bfloat16()
        gemma.weight.data.copy_(weight)
        assert differing(layer.forward_native(x), rmsnorm.rms_norm(x, weight, 1e-5)) == (0, 0)
        for ours, theirs in zip(
            layer.forward_native(x.clone(), residual.clone()),
            rmsnorm.add_rms_norm(x, residual, weight, 1e-5),
            strict=True,
        ):
            assert differing(theirs, ours) == (0, 0)
        expected = rmsnorm.rms_norm(x, weight, 1e-5, cast="late", offset=1.0)
        assert differing(gemma.forward_native(x), expected) == (0, 0)


def test_vllms_compiler_pass_lowers_to_our_operators_for_every_batch_size() -> None:
    """The pass that vLLM runs on a compiled model, on a graph with a symbolic batch size."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, s = torch.ops.vllm_ir.fused_add_rms_norm(x, residual, weight, 1e-6)
        return torch.ops.vllm_ir.rms_norm(y, weight, 1e-6), s

    x, residual, weight = inputs(torch.bfloat16, torch.bfloat16)
    graph = make_fx(model, tracing_mode="symbolic")(x, residual, weight)
    with ops.rms_norm.set_priority(["rmsnorm", "native"]), ops.fused_add_rms_norm.set_priority(["rmsnorm", "native"]):
        lowering = VllmIRLoweringPass(VllmConfig(device_config=DeviceConfig(device="cpu")))
        lowering(graph.graph)
        graph.recompile()
    assert {provider for ops_ in lowering.selected_impls.values() for provider in ops_.values()} == {"rmsnorm"}
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert any("rmsnorm" in target for target in targets), targets
    assert not any("vllm_ir" in target for target in targets), targets
    for rows in (1, 5, 64):
        with torch.no_grad():
            y, s = graph(x[:rows], residual[:rows], weight)
        expected_y, expected_s = rmsnorm.add_rms_norm(x[:rows], residual[:rows], weight, 1e-6)
        assert differing(s, expected_s) == (0, 0)
        assert differing(y, rmsnorm.rms_norm(expected_y, weight, 1e-6)) == (0, 0)


def test_a_trained_model_is_served_through_the_operators_with_the_bits_of_training() -> None:
    script = benchmark_script("train_and_serve")
    calls, _ = script.train(script.ours, 3, torch.device("cpu"))
    with script.through_vllm() as present:
        assert present
        assert script.rms_norm is ops.rms_norm
        assert script.differing(calls, script.served) == 0
        assert script.differing(calls, script.row_by_row) == 0
    native = ops.fused_add_rms_norm.impls["native"].impl_fn
    call = calls[-1]
    assert not torch.equal(native(call.x, call.residual, call.weight, script.EPS)[0], call.y)  # so a count can be > 0
