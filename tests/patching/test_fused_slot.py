"""The slot of Inductor in which the pass runs, the caches of compiled code, and several models and threads."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.profiler import ProfilerActivity, profile

import rmsnorm
from captured import Capture, Sites, assert_equal

pytestmark = pytest.mark.compiled

N = 32


class Block(nn.Module):
    """A pre-norm block and a final norm."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.norms = nn.ModuleList(nn.RMSNorm(N, eps=1e-6) for _ in range(3))
        self.mixers = nn.ModuleList(nn.Linear(N, N, bias=False) for _ in range(2))
        for norm in self.norms:
            nn.init.normal_(norm.weight)
        self.to(dtype)

    def forward(self, h: Tensor) -> Tensor:
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            h = h + mixer(norm(h))
        return self.norms[2](h)


FUSED, INFERENCE, UNFUSED = Sites(2, 2), Sites(2, 0), Sites(0, 0)


class Recorder(CustomGraphPass):
    """A user's pass that keeps which operators it saw."""

    def __init__(self, name: Any = "recorder") -> None:
        self.name = name
        self.seen: list[int] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.seen.append(len(graph.find_nodes(op="call_function", target=torch.ops.rmsnorm.forward.default)))

    def uuid(self) -> Any:
        return self.name


@pytest.fixture(autouse=True)
def own_slot(fresh_dynamo) -> Iterator[None]:
    """Start with an empty slot, and give the earlier value back."""
    before = inductor_config.joint_custom_post_pass
    inductor_config.joint_custom_post_pass = None
    yield
    inductor_config.joint_custom_post_pass = before


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, N, generator=torch.Generator().manual_seed(8)).to(dtype)


def patched(**keywords: Any) -> Block:
    model = Block()
    rmsnorm.patch(model, **keywords)
    return model


def captured_sites(model: nn.Module) -> Sites:
    """What is fused in an inference of the model, compiled anew."""
    torch._dynamo.reset()
    capture = Capture()
    with torch.no_grad():
        got = torch.compile(model, backend=capture.backend, fullgraph=True)(rows())
        assert_equal(got, model(rows()), "y")
    return capture.sites


# --- the user's own pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["pass", "function", "list"])
def test_a_pass_of_the_user_still_runs_and_unpatch_restores_it(given) -> None:
    if given == "list" and not hasattr(torch._inductor.custom_graph_pass, "get_custom_graph_passes"):
        pytest.skip("this torch takes no list of passes")
    recorder = Recorder()
    mine: Any = {"pass": recorder, "function": lambda graph: recorder(graph), "list": [recorder, recorder]}[given]
    inductor_config.joint_custom_post_pass = mine
    model = patched()
    assert captured_sites(model) == INFERENCE
    assert recorder.seen == [3] * (2 if given == "list" else 1)
    rmsnorm.unpatch(model)
    assert inductor_config.joint_custom_post_pass is mine


def test_unpatch_empties_a_slot_that_was_empty() -> None:
    model = patched()
    assert captured_sites(model) == INFERENCE
    rmsnorm.unpatch(model)
    assert inductor_config.joint_custom_post_pass is None
    assert captured_sites(model) == UNFUSED


def test_what_the_user_sets_after_patch_survives_unpatch_and_runs() -> None:
    model, mine = patched(), Recorder()
    assert captured_sites(model) == INFERENCE
    inductor_config.joint_custom_post_pass = mine
    assert captured_sites(model) == INFERENCE
    assert mine.seen == [3]
    rmsnorm.unpatch(model)
    assert inductor_config.joint_custom_post_pass is mine


def test_the_pass_works_inside_a_context_of_the_user_and_after_it() -> None:
    model, mine = patched(), Recorder()
    with inductor_config.patch(joint_custom_post_pass=mine):
        assert captured_sites(model) == INFERENCE
    assert mine.seen == [3]
    assert inductor_config.joint_custom_post_pass is None
    assert captured_sites(model) == INFERENCE
    with inductor_config.patch(max_autotune=False):
        assert captured_sites(model) == INFERENCE
    rmsnorm.unpatch(model)
    assert inductor_config.joint_custom_post_pass is None


def test_a_model_unpatched_inside_a_context_leaves_the_context_as_it_was() -> None:
    model, mine = patched(), Recorder()
    assert captured_sites(model) == INFERENCE
    with inductor_config.patch(joint_custom_post_pass=mine):
        rmsnorm.unpatch(model)
        assert inductor_config.joint_custom_post_pass is mine
    assert captured_sites(model) == UNFUSED


def test_the_uuid_depends_on_the_users_pass_and_is_none_if_that_has_none() -> None:
    """Inductor caches nothing if it is None."""
    uuids = []
    for mine in (None, Recorder("one"), Recorder("two"), lambda graph: None, Recorder(None)):
        inductor_config.joint_custom_post_pass = mine
        model = patched()
        captured_sites(model)
        uuids.append(inductor_config.joint_custom_post_pass.uuid())
        rmsnorm.unpatch(model)
    assert len(set(uuids[:3])) == 3
    assert all(uuids[:3])
    assert uuids[3:] == [None, None]
    pickle.dumps(uuids)


# --- several models ------------------------------------------------------------------------------------------


def test_two_patched_models_share_one_pass() -> None:
    mine = inductor_config.joint_custom_post_pass = Recorder()
    first, second = patched(), patched()
    assert captured_sites(first) == captured_sites(second) == captured_sites(first) == INFERENCE
    assert mine.seen == [3, 3, 3]
    rmsnorm.unpatch(first)
    assert captured_sites(first) == UNFUSED
    assert captured_sites(second) == INFERENCE
    rmsnorm.unpatch(second)
    assert inductor_config.joint_custom_post_pass is mine


def test_only_the_model_patched_with_fuse_residual_is_fused() -> None:
    asks, declines, own = patched(), patched(fuse_residual=False), Block()
    assert [captured_sites(model) for model in (declines, asks, declines, own, asks)] == [
        UNFUSED, INFERENCE, UNFUSED, UNFUSED, INFERENCE,
    ]  # fmt: skip
    rmsnorm.patch(declines)
    rmsnorm.patch(asks, fuse_residual=False)
    assert [captured_sites(model) for model in (declines, asks)] == [INFERENCE, UNFUSED]


def test_only_the_norms_patched_with_fuse_residual_are_fused_in_one_model() -> None:
    model = patched()
    rmsnorm.patch(model.norms[1], fuse_residual=False)
    assert captured_sites(model) == Sites(1, 0)


def test_copies_are_fused_as_their_original() -> None:
    for model, expected in ((patched(), INFERENCE), (patched(fuse_residual=False), UNFUSED)):
        assert captured_sites(copy.deepcopy(model)) == expected
        assert captured_sites(pickle.loads(pickle.dumps(model))) == expected


def test_deleting_a_patched_model_does_not_affect_others() -> None:
    model = patched()
    assert captured_sites(model) == INFERENCE
    del model
    torch._dynamo.reset()
    gc.collect()
    assert captured_sites(Block()) == UNFUSED
    assert captured_sites(patched()) == INFERENCE


def test_threads_patch_and_compile_at_the_same_time() -> None:
    found: dict[int, Sites] = {}
    start = threading.Barrier(3)

    def work(i: int) -> None:
        start.wait()
        model = patched(fuse_residual=i != 1)
        capture = Capture()
        with torch.no_grad():
            torch.compile(model, backend=capture.backend, fullgraph=True)(rows())
        found[i] = capture.sites
        rmsnorm.unpatch(model)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == {0: INFERENCE, 1: UNFUSED, 2: INFERENCE}


# --- another process -----------------------------------------------------------------------------------------

ELSEWHERE = """
import pickle, sys, torch
import test_fused_slot as here
model = pickle.load(open(sys.argv[1], "rb"))
assert here.captured_sites(model) == here.INFERENCE
"""

EAGER = """
import sys, torch, rmsnorm
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8))
rmsnorm.patch(model)
model(torch.randn(2, 8)).sum().backward()
rmsnorm.unpatch(model)
loaded = {"torch._inductor.compile_fx", "torch._inductor.fx_passes", "rmsnorm.ops.inductor"} & set(sys.modules)
assert not loaded, loaded
"""


def run_python(code: str, *arguments: str) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_pickled_model_is_fused_in_another_process(tmp_path) -> None:
    (tmp_path / "model").write_bytes(pickle.dumps(patched()))
    run_python(ELSEWHERE, str(tmp_path / "model"))


def test_patch_and_eager_mode_do_not_import_the_compiler() -> None:
    run_python(EAGER)


# --- Inductor itself -----------------------------------------------------------------------------------------


def executed(run: Callable[[], Any]) -> tuple[Any, Sites]:
    """What a call returns, and the fused operators that it runs, also if they come from a cache."""
    run()  # which compiles, and so calls the operators on tensors without memory
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        result = run()
    forward = [e for e in profiler.events() if e.name == "rmsnorm::forward"]
    backward = [e for e in profiler.events() if e.name == "rmsnorm::backward_of_sum"]
    return result, Sites(sum(bool(e.input_shapes[1]) for e in forward), len(backward))


def train(model: nn.Module, compiled: Any, x: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    names = ["x", *dict(model.named_parameters())]
    return {"y": y.detach()} | dict(
        zip(names, torch.autograd.grad(y, [leaf, *model.parameters()], upstream), strict=True)
    )


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> None:
    """Nothing that was compiled before the test is found."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def cache_hits() -> int:
    return counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]


def test_caches_never_mix_up_fused_and_unfused_graphs(own_cache) -> None:
    """And in fp32 the bits are the same with the pass, without it, and in eager mode."""
    model, x = Block(), rows()
    found, hits, results = [], [], []
    for fuse_residual in (True, False, True, False):
        rmsnorm.patch(model, fuse_residual=fuse_residual)
        torch._dynamo.reset()
        before = cache_hits()
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
        result, sites = executed(lambda: train(model, compiled, x))
        found.append(sites)
        hits.append(cache_hits() > before)
        results += [result, train(model, model, x)]
    assert found == [FUSED, UNFUSED, FUSED, UNFUSED]
    assert hits == [False, False, True, True]
    for result in results[1:]:
        for name, value in results[0].items():
            assert_equal(result[name], value, name)


def test_training_in_bf16_compiled_with_the_pass_has_the_bits_of_eager_mode() -> None:
    """Without it Inductor keeps the residual stream of a CPU in fp32 between two additions that it fuses."""
    model, x = Block(torch.bfloat16), rows(torch.bfloat16)
    rmsnorm.patch(model)
    expected = train(model, model, x)
    got, sites = executed(lambda: train(model, torch.compile(model, fullgraph=True, dynamic=True), x))
    assert sites == FUSED
    for name, value in expected.items():
        assert_equal(got[name], value, name)
