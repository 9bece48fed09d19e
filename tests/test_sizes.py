"""Every entry to a kernel checks its tensors, so that no size, dtype or freed storage makes it read foreign memory."""

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RMSNorm

from rmsnorm import RMSNorm, add_rms_norm, explain, patch, rms_norm
from rmsnorm.kernels.host import loader as host
from tolerance import assert_same_bits

M, N = 4, 64
EPS = 1e-6
FROM_CPP, FROM_PYTHON = "called from C++", "called from Python"
Draw = Callable[..., Tensor]
Change = Callable[["Run"], object]


def _skip_without_cpp() -> None:
    """Skip unless C++ makes calls. The call that finds out is forgotten."""
    x, w = torch.ones(1, 8), torch.ones(8)
    rms_norm(x, w)
    said = explain(x, w)
    host.forget()
    if FROM_CPP not in said:
        pytest.skip(said)


@pytest.fixture
def cpp() -> None:
    _skip_without_cpp()


@pytest.fixture(params=["C++", "Python"])
def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether C++ or Python creates the autograd nodes of this test."""
    if request.param == "C++":
        _skip_without_cpp()
    else:
        monkeypatch.setattr(host, "norm", lambda *arguments: None)
    return str(request.param)


class Run:
    """A forward pass of a planned kind, through the named node, and the backward pass that follows."""

    def __init__(self, node: str, randn: Draw, adds: bool = False, dtype: torch.dtype = torch.float32) -> None:
        x, self.w, r = randn(M, N, dtype=dtype), nn.Parameter(randn(N, dtype=dtype)), randn(M, N, dtype=dtype)
        self.x, self.r = x.requires_grad_(), r.requires_grad_() if adds else None
        self.dy, self.ds = randn(M, N, dtype=dtype), randn(M, N, dtype=dtype) if adds else None
        self.untouched = self.forward().backward()
        self.forward()
        name = self.y.grad_fn.name()
        assert ("CppNode<rmsnorm::Norm>" in name) if node == "C++" else (name == "_NormBackward"), name

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.r, self.w) if t is not None]

    def forward(self) -> "Run":
        if self.r is None:
            self.y, self.s = rms_norm(self.x, self.w, EPS), None
        else:
            self.y, self.s = add_rms_norm(self.x, self.r, self.w, EPS)
        return self

    def backward(self) -> list[Tensor]:
        outputs, cotangents = ([self.y], [self.dy]) if self.s is None else ([self.y, self.s], [self.dy, self.ds])
        return [*torch.autograd.grad(outputs, self.leaves, cotangents)]


def set_data(t: Tensor, data: Tensor) -> None:
    t.data = data


def resize(t: Tensor, size: int) -> None:
    t.untyped_storage().resize_(size)


# --- between the forward and the backward pass ---------------------------------------------------------------

CHANGES: dict[str, tuple[bool, Change, str]] = {
    "the weight is emptied": (
        False,
        lambda run: set_data(run.w, torch.empty(0)),
        "[rms_norm] weight has shape (0,), expected (64,)",
    ),
    "the weight is shortened": (
        False,
        lambda run: set_data(run.w, torch.ones(N - 1)),
        "[rms_norm] weight has shape (63,), expected (64,)",
    ),
    "the weight is of two dimensions": (
        False,
        lambda run: set_data(run.w, torch.ones(1, N)),
        "[rms_norm] weight has shape (1, 64), expected (64,)",
    ),
    "the weight gets a row for each head": (
        False,
        lambda run: set_data(run.w, torch.ones(M, N)),
        "[rms_norm] weight has shape (4, 64), expected (64,)",
    ),
    "the weight gets a row for each head, before the gradient of a sum": (
        True,
        lambda run: set_data(run.w, torch.ones(M, N)),
        "[add_rms_norm] weight has shape (4, 64), expected (64,)",
    ),
    "x loses rows": (
        False,
        lambda run: set_data(run.x, torch.ones(M - 1, N)),
        "[rms_norm] x has shape (3, 64), expected (4, 64)",
    ),
    "x loses columns": (
        False,
        lambda run: set_data(run.x, torch.ones(M, N - 1)),
        "[rms_norm] x has shape (4, 63), expected (4, 64)",
    ),
    "x is emptied": (
        False,
        lambda run: set_data(run.x, torch.empty(0)),
        "[rms_norm] x has shape (0,), expected (4, 64)",
    ),
    "the weight is shortened after a sum": (
        True,
        lambda run: set_data(run.w, torch.ones(N - 1)),
        "[add_rms_norm] weight has shape (63,), expected (64,)",
    ),
    "the weight's dtype": (
        False,
        lambda run: set_data(run.w, run.w.double()),
        "[rms_norm] weight has dtype torch.float64, expected float32",
    ),
    "x's dtype": (
        False,
        lambda run: set_data(run.x, run.x.detach().bfloat16()),
        "[rms_norm] x has dtype torch.bfloat16, expected float32",
    ),
    "x is narrowed, and the weight": (
        False,
        lambda run: (set_data(run.x, torch.ones(M, 8)), set_data(run.w, torch.ones(8))),
        "[rms_norm] x has shape (4, 8), expected (4, 64)",
    ),
    "the weight is freed": (
        False,
        lambda run: resize(run.w, 0),
        "[rms_norm] weight has a storage of 0 bytes, expected 256: it was freed or made smaller",
    ),
    "the weight's storage is made smaller": (
        False,
        lambda run: resize(run.w, 252),
        "[rms_norm] weight has a storage of 252 bytes, expected 256: it was freed or made smaller",
    ),
    "x is freed": (
        False,
        lambda run: resize(run.x, 0),
        "[rms_norm] x has a storage of 0 bytes, expected 1024: it was freed or made smaller",
    ),
    "x's storage is made smaller": (
        False,
        lambda run: resize(run.x, 1020),
        "[rms_norm] x has a storage of 1020 bytes, expected 1024: it was freed or made smaller",
    ),
    "dy is freed": (
        False,
        lambda run: resize(run.dy, 0),
        "[rms_norm] dy has a storage of 0 bytes, expected 1024: it was freed or made smaller",
    ),
    "dy's storage is made smaller": (
        False,
        lambda run: resize(run.dy, 1020),
        "[rms_norm] dy has a storage of 1020 bytes, expected 1024: it was freed or made smaller",
    ),
    "ds is freed": (
        True,
        lambda run: resize(run.ds, 0),
        "[add_rms_norm] ds has a storage of 0 bytes, expected 1024: it was freed or made smaller",
    ),
    "the sum is freed": (
        True,
        lambda run: resize(run.s, 0),
        "[add_rms_norm] x has a storage of 0 bytes, expected 1024: it was freed or made smaller",
    ),
}


@pytest.mark.parametrize(("adds", "change", "words"), CHANGES.values(), ids=CHANGES.keys())
def test_the_backward_pass_names_the_tensor_that_changed_since_the_forward_pass(
    node, randn, adds, change, words
) -> None:
    run = Run(node, randn, adds)
    change(run)
    with pytest.raises((TypeError, ValueError), match=re.escape(words) + r" \(in the backward pass: "):
        run.backward()


def _through_the_operator(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.rmsnorm.forward(x, None, w, EPS, "early", 0.0, True)[0].square().sum()


# Names of the function in messages, and calls with x of (2, M, N) and a weight of (M, N).
CALLS_WITH_HEADS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "rms_norm": ("rms_norm", lambda x, w: rms_norm(x, w, EPS).square().sum()),
    "add_rms_norm": ("add_rms_norm", lambda x, w: sum(t.square().sum() for t in add_rms_norm(x, x, w, EPS))),
    "variance_size": ("rms_norm", lambda x, w: rms_norm(x, w, EPS, variance_size=8).square().sum()),
    "operator": ("rms_norm", _through_the_operator),
    "pair": (
        "rms_norms",
        lambda x, w: torch.ops.rmsnorm.forward_pair(x, None, x, w, EPS, "early", 0.0, True)[2].square().sum(),
    ),
}


@pytest.mark.parametrize("shape", [(N,), (M, 1), (M * N,)], ids=str)
@pytest.mark.parametrize(("where", "call"), CALLS_WITH_HEADS.values(), ids=CALLS_WITH_HEADS.keys())
def test_a_weight_for_each_head_that_changed_its_shape_since_the_forward_pass_is_named(
    node, randn, where, call, shape
) -> None:
    """A weight of (N,) would be a valid one for x, so only what the forward pass saved shows the change."""
    x, w = randn(2, M, N).requires_grad_(), randn(M, N).requires_grad_()
    for _ in range(2):
        call(x, randn(N).requires_grad_()).backward()  # so that C++ has a plan for such a weight
    loss = call(x, w)
    set_data(w, torch.ones(shape))
    words = rf"\[{where}\] weight2? has shape {re.escape(str(shape))}, expected \({M}, {N}\) \(in the backward pass: "
    with pytest.raises(ValueError, match=words):
        loss.backward()


def test_a_dtype_that_changed_to_that_of_another_planned_kind_is_named(node, randn) -> None:
    """C++ has a plan for the backward pass of both dtypes and must not confuse them."""
    x, dy = randn(M, N, dtype=torch.bfloat16).requires_grad_(), randn(M, N, dtype=torch.bfloat16)
    narrow, wide = (randn(N, dtype=dtype).requires_grad_() for dtype in (torch.bfloat16, torch.float32))
    for w in 3 * [wide] + 2 * [narrow]:
        torch.autograd.grad(rms_norm(x, w, EPS, cast="late"), x, dy)
    y = rms_norm(x, narrow, EPS, cast="late")
    set_data(narrow, narrow.float())
    with pytest.raises(TypeError, match=re.escape("[rms_norm] weight has dtype torch.float32, expected bfloat16")):
        torch.autograd.grad(y, x, dy)
    y = rms_norm(x, wide, EPS, cast="late")
    set_data(wide, wide.bfloat16())
    with pytest.raises(TypeError, match=re.escape("[rms_norm] weight has dtype torch.bfloat16, expected float32")):
        torch.autograd.grad(y, x, dy)


def test_strided_rows_that_reach_past_their_storage_are_named(node, randn) -> None:
    """The last row of a slice ends before its stride does."""
    whole = randn(M, 2 * N)
    x, w, dy = whole[:, :N].requires_grad_(), randn(N), randn(M, N)
    expected = torch.autograd.grad(rms_norm(x, w, EPS), x, dy)[0]
    least = ((M - 1) * 2 * N + N) * 4
    resize(whole, least)
    for _ in range(2):
        assert_same_bits(torch.autograd.grad(rms_norm(x, w, EPS), x, dy)[0], expected)
    y = rms_norm(x, w, EPS)
    resize(whole, least - 4)
    words = re.escape(f"[rms_norm] x has a storage of {least - 4} bytes, expected {least}")
    with pytest.raises(ValueError, match=words):
        torch.autograd.grad(y, x, dy)
    with pytest.raises(ValueError, match=words):
        rms_norm(x, w, EPS)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_freed_and_restored_before_the_backward_pass_changes_no_gradient(node, randn, adds, dtype) -> None:
    """As FSDP does: it frees the weight after the forward pass and gathers it again before the backward pass."""
    run = Run(node, randn, adds, dtype)
    held, rows = run.w.data, run.x.data
    set_data(run.w, torch.empty(0, dtype=dtype))
    set_data(run.x, torch.empty(0, dtype=dtype))
    set_data(run.w, held)
    set_data(run.x, rows)
    found = [run.backward()]
    run.forward()
    kept = run.w.detach().clone()
    size = run.w.untyped_storage().nbytes()
    resize(run.w, 0)
    resize(run.w, size)
    run.w.data.copy_(kept)
    found.append(run.backward())
    run.forward()
    set_data(run.w, kept)  # elsewhere, but the same values
    found.append(run.backward())
    for gradients in found:
        for a, b in zip(gradients, run.untouched, strict=True):
            assert_same_bits(a, b)


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    resize(t, 0)
    return t


UNPACKED = {
    "shorter": (lambda t: t[:-1].clone(), ValueError, "has shape "),
    "of another rank": (lambda t: t[None].clone(), ValueError, "has shape "),
    "complex": (lambda t: t.to(torch.complex64), TypeError, "has dtype torch.complex64, expected float32"),
    "of more bits": (lambda t: t.double(), TypeError, "has dtype torch.float64, expected float32"),
    "of fewer bits": (lambda t: t.half(), TypeError, "has dtype torch.float16, expected float32"),
    "nested": (lambda t: torch.nested.nested_tensor([t]), TypeError, "is a nested tensor, expected a dense tensor"),
    "on meta": (lambda t: t.to("meta"), ValueError, "is on meta, expected cpu"),
    "sparse": (lambda t: t.to_sparse(), TypeError, "has layout torch.sparse_coo, expected a dense tensor"),
    "freed": (freed, ValueError, "has a storage of 0 bytes"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("which", ["x", "weight", "rstd"])
@pytest.mark.parametrize(("unpacked", "error", "words"), UNPACKED.values(), ids=UNPACKED.keys())
def test_the_backward_pass_checks_what_a_saved_tensor_hook_returns(node, randn, which, unpacked, error, words) -> None:
    run = Run(node, randn)
    shape = {"x": (M, N), "weight": (N,), "rstd": (M,)}[which]
    changed = []

    def unpack(t: Tensor) -> Tensor:
        if t.shape != shape:
            return t
        changed.append(which)
        return unpacked(t)

    with saved_tensors_hooks(lambda t: t.detach(), unpack):
        run.forward()
    with pytest.raises(error, match=re.escape(f"[rms_norm] {which} {words}")):
        run.backward()
    assert changed == [which]


def test_saved_tensor_hooks_that_return_copies_change_no_bits(node, randn) -> None:
    run = Run(node, randn)
    with saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
        run.forward()
    for a, b in zip(run.backward(), run.untouched, strict=True):
        assert_same_bits(a, b)


# --- in the forward pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("which", ["x", "residual", "weight"])
def test_the_forward_pass_names_the_tensor_whose_memory_was_freed(node, randn, which, trains) -> None:
    for size in (0, 252):
        x, r, w = randn(M, N), randn(M, N), randn(N).requires_grad_(trains)
        adds = which == "residual"

        def call() -> object:
            return add_rms_norm(x, r, w, EPS) if adds else rms_norm(x, w, EPS)

        for _ in range(2):
            call()
        gone = {"x": x, "residual": r, "weight": w}[which]
        whole = gone.untyped_storage().nbytes()
        resize(gone, size)
        where = "add_rms_norm" if adds else "rms_norm"
        words = f"[{where}] {which} has a storage of {size} bytes, expected {whole}: it was freed or made smaller"
        with pytest.raises(ValueError, match=re.escape(words) + "$"):
            call()


@pytest.mark.parametrize("shape", [(0, N), (0, 3, N), (2, 0, N)])
def test_tensors_without_rows_need_no_memory(node, randn, shape) -> None:
    x, r = (randn(*shape).requires_grad_() for _ in range(2))
    w = randn(N).requires_grad_()
    resize(x, 0)
    for _ in range(3):
        y, s = add_rms_norm(x, r, w, EPS)
        dx, dr, dw = torch.autograd.grad([y, s], [x, r, w], [torch.ones(shape), torch.ones(shape)])
        assert y.shape == s.shape == dx.shape == dr.shape == shape
        assert torch.equal(dw, torch.zeros(N))
        y = rms_norm(x, w, EPS)
        assert torch.equal(torch.autograd.grad(y, w, torch.ones(shape))[0], torch.zeros(N))


# --- the operators -------------------------------------------------------------------------------------------


def forward_arguments(randn: Draw, **others: Any) -> dict[str, Any]:
    return {
        "x": randn(M, N), "residual": None, "weight": randn(N), "eps": EPS, "cast": "early", "offset": 0.0,
        "with_rstd": True, **others,
    }  # fmt: skip


def backward_arguments(randn: Draw) -> dict[str, Any]:
    return {
        "dy": randn(M, N), "ds": None, "x": randn(M, N), "weight": randn(N), "rstd": randn(M).square() + 1,
        "cast": "early", "offset": 0.0, "need_dx": True, "need_dw": True,
    }  # fmt: skip


ROWS, FLAT = torch.ones(M, N), torch.ones(N)
BAD_FORWARD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "short weight": ({"weight": FLAT[:-1]}, ValueError, "[rms_norm] weight has shape (63,), expected (64,)"),
    "no weight to add the offset to": (
        {"weight": None, "cast": "late", "offset": 1.0}, ValueError, "[rms_norm] weight is None"),
    "short residual": ({"residual": ROWS[:-1]}, ValueError, "[add_rms_norm] residual has shape (3, 64), expected (4"),
    "narrow residual": ({"residual": ROWS[:, 1:]}, ValueError, "[add_rms_norm] residual has shape (4, 63), expected"),
    "cast": ({"cast": "erly"}, ValueError, "[rms_norm] cast is 'erly', expected 'early', 'late' or 'first'"),
    "negative eps": ({"eps": -1e-6}, ValueError, "[rms_norm] eps is -1e-06"),
    "offset": ({"offset": 0.5, "cast": "late"}, ValueError, "[rms_norm] offset is 0.5, expected 0 or 1"),
    "integer x": ({"x": ROWS.int()}, TypeError, "[rms_norm] x has dtype torch.int32"),
    "integer weight": ({"weight": FLAT.int()}, TypeError, "[rms_norm] weight has dtype torch.int32"),
    "integer residual": ({"residual": ROWS.int()}, TypeError, "[add_rms_norm] residual has dtype torch.int32"),
    "sparse x": ({"x": ROWS.to_sparse()}, TypeError, "[rms_norm] x has layout torch.sparse_coo"),
    "sparse weight": ({"weight": FLAT.to_sparse()}, TypeError, "[rms_norm] weight has layout torch.sparse_coo"),
    "no columns": ({"x": ROWS[:, :0], "weight": FLAT[:0]}, ValueError, "[rms_norm] x has shape (4, 0), expected (...,"),
    "no dimension": ({"x": ROWS[0, 0]}, ValueError, "[rms_norm] x has shape (), expected (..., N)"),
}  # fmt: skip
BAD_BACKWARD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "short weight": ({"weight": FLAT[:-1]}, ValueError, "[rms_norm] weight has shape (63,), expected (64,)"),
    "no weight, but its gradient": ({"weight": None}, ValueError, "[rms_norm] weight is None"),
    "no weight to add the offset to": (
        {"weight": None, "cast": "late", "offset": 1.0, "need_dw": False}, ValueError, "[rms_norm] weight is None"),
    "short rstd": ({"rstd": torch.ones(M - 1)}, ValueError, "[rms_norm] rstd has shape (3,), expected (4,)"),
    "no rstd": ({"rstd": torch.ones(0)}, ValueError, "[rms_norm] rstd has shape (0,), expected (4,)"),
    "integer rstd": ({"rstd": torch.ones(M).int()}, TypeError, "[rms_norm] rstd has dtype torch.int32"),
    "short x": ({"x": ROWS[:-1]}, ValueError, "[rms_norm] x has shape (3, 64), expected (4, 64), the shape of dy"),
    "narrow dy": ({"dy": ROWS[:, 1:]}, ValueError, "[rms_norm] x has shape (4, 64), expected (4, 63), the shape of dy"),
    "short ds": ({"ds": ROWS[:-1]}, ValueError, "[add_rms_norm] ds has shape (3, 64), expected (4, 64)"),
    "cast": ({"cast": "erly"}, ValueError, "[rms_norm] cast is 'erly', expected 'early', 'late' or 'first'"),
    "offset": ({"offset": 0.5, "cast": "late"}, ValueError, "[rms_norm] offset is 0.5, expected 0 or 1"),
    "integer dy": ({"dy": ROWS.int()}, TypeError, "[rms_norm] dy has dtype torch.int32"),
    "integer x": ({"x": ROWS.int()}, TypeError, "[rms_norm] x has dtype torch.int32"),
    "integer ds": ({"ds": ROWS.int()}, TypeError, "[add_rms_norm] ds has dtype torch.int32"),
    "sparse dy": ({"dy": ROWS.to_sparse()}, TypeError, "[rms_norm] dy has layout torch.sparse_coo"),
    "sparse x": ({"x": ROWS.to_sparse()}, TypeError, "[rms_norm] x has layout torch.sparse_coo"),
    "no columns": (
        {"dy": ROWS[:, :0], "x": ROWS[:, :0], "weight": FLAT[:0]}, ValueError, "[rms_norm] dy has shape (4, 0)"),
    "no dimension": ({"dy": ROWS[0, 0], "x": ROWS[0, 0]}, ValueError, "[rms_norm] dy has shape (), expected (..., N)"),
}  # fmt: skip
BAD = {f"forward, {name}": ("forward", *case) for name, case in BAD_FORWARD.items()}
BAD |= {f"backward, {name}": ("backward", *case) for name, case in BAD_BACKWARD.items()}


def on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


@pytest.mark.parametrize("meta", [False, True], ids=["cpu", "meta"])
@pytest.mark.parametrize(("name", "others", "error", "words"), BAD.values(), ids=BAD.keys())
def test_the_operators_name_the_argument_that_is_wrong(randn, name, others, error, words, meta) -> None:
    op = getattr(torch.ops.rmsnorm, name)
    given = forward_arguments(randn) if name == "forward" else backward_arguments(randn)
    (op if not meta else lambda **named: op(**{k: on_meta(v) for k, v in named.items()}))(**given)  # the right ones
    given |= others
    if meta:
        given = {key: on_meta(value) for key, value in given.items()}
    with pytest.raises(error, match=re.escape(words)):
        op(**given)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_operators_refuse_tensors_of_two_devices(randn, device) -> None:
    other = "meta" if device == "cpu" else "cpu"
    for name, arguments in (("forward", forward_arguments), ("backward", backward_arguments)):
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments(randn).items()}
        given["weight"] = torch.ones(N, device=other)
        with pytest.raises(ValueError, match=re.escape(f"[rms_norm] weight is on {other}, expected {device}")):
            getattr(torch.ops.rmsnorm, name)(**given)


@pytest.mark.parametrize("which", ["x", "weight", "residual", "dy", "ds", "rstd"])
def test_the_operators_name_the_tensor_whose_memory_was_freed(randn, which) -> None:
    backward = which in ("dy", "ds", "rstd")
    given = backward_arguments(randn) if backward else forward_arguments(randn)
    if given[which] is None:
        given[which] = randn(M, N)
    op = torch.ops.rmsnorm.backward if backward else torch.ops.rmsnorm.forward
    op(**given)
    resize(given[which], 0)
    with pytest.raises(ValueError, match=rf"norm\] {which} has a storage of 0 bytes, expected "):
        op(**given)


@pytest.mark.parametrize(
    "case", [case for case in BAD_FORWARD if "integer weight" not in case and case[:6] != "sparse"]
)
def test_the_forward_operator_checks_its_arguments_when_a_gradient_is_needed(randn, case) -> None:
    others, error, words = BAD_FORWARD[case]
    given = forward_arguments(randn, **others)
    trained = "x" if given["weight"] is None else "weight"
    given[trained] = given[trained].clone().requires_grad_()
    with pytest.raises(error, match=re.escape(words)):
        torch.ops.rmsnorm.forward(**given)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_refused(randn) -> None:
    nested = torch.nested.nested_tensor([randn(M, N), randn(2, N)])
    with pytest.raises(TypeError, match=re.escape("[rms_norm] x is a nested tensor, expected a dense tensor")):
        rms_norm(nested, randn(N))
    with pytest.raises((TypeError, NotImplementedError)):
        torch.ops.rmsnorm.forward(nested, None, randn(N), EPS, "early", 0.0, True)


def test_vmap_over_scalars_raises(randn) -> None:
    """A scalar sample has no columns, though the batch of all samples has the shape of a row."""
    with pytest.raises(ValueError, match=re.escape("[rms_norm] x has shape (), expected (..., N)")):
        torch.vmap(lambda x: torch.ops.rmsnorm.forward(x, None, None, EPS, "early", 0.0, True)[0])(randn(N))


# --- traced, exported, compiled ------------------------------------------------------------------------------

SHORT = "[rms_norm] weight has shape (63,), expected (64,), the last dimension of x"


def test_a_traced_norm_raises_for_another_width(randn) -> None:
    w = randn(N)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jit.trace is deprecated, and says what it takes for constants
        traced = torch.jit.trace(lambda x: rms_norm(x, w, EPS), (randn(M, N),))
    x = randn(2 * M, N)
    assert_same_bits(traced(x), rms_norm(x, w, EPS))
    words = "[rms_norm] weight has shape (64,), expected (4096,), the last dimension of x"
    with pytest.raises(RuntimeError, match=re.escape(words)):
        traced(randn(M, 4096))


class OfAnInput(nn.Module):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return rms_norm(x, w, EPS)


def test_an_exported_norm_raises_for_a_short_weight_given_as_an_input(randn) -> None:
    x, w = randn(M, N), randn(N)
    program = torch.export.export(OfAnInput(), (x, w))
    assert_same_bits(program.module()(x, w), rms_norm(x, w, EPS))
    with pytest.raises((AssertionError, RuntimeError)):  # torch's own check
        program.module()(x, w[:-1].clone())
    with pytest.raises(ValueError, match=re.escape(SHORT)):  # without it
        program.graph_module(x, w[:-1].clone())


@pytest.mark.parametrize(
    "trains",
    [False, True],
)
def test_an_exported_layer_raises_for_a_short_weight_in_its_state(randn, trains) -> None:
    x, layer = randn(M, N), RMSNorm(N, EPS)
    nn.init.normal_(layer.weight)
    layer.requires_grad_(trains)
    exported = torch.export.export(layer, (x,)).module()
    assert_same_bits(exported(x), layer(x))
    set_data(exported.weight, torch.ones(N - 1))
    with pytest.raises(ValueError, match=re.escape(SHORT)):
        exported(x)


@pytest.mark.parametrize("trains", [False, True])
def test_a_compiled_norm_raises_for_a_short_weight(fresh_dynamo, randn, trains) -> None:
    x, w = randn(M, N), randn(N).requires_grad_(trains)
    compiled = torch.compile(rms_norm, backend="aot_eager")
    assert_same_bits(compiled(x, w), rms_norm(x, w))
    with pytest.raises(ValueError, match=re.escape(SHORT)):
        compiled(x, randn(N - 1).requires_grad_(trains))


# --- sizes that are unknown until the program runs -----------------------------------------------------------


def unbacked(t: Tensor, dim: int) -> Tensor:
    mark_unbacked(t, dim)
    return t


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_an_unbacked_number_of_rows_compiles(fresh_dynamo, randn, backend) -> None:
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend=backend)
    w = randn(N).requires_grad_()
    for rows in (5, 7, 1):
        x, r = (unbacked(randn(rows, N).requires_grad_(), 0) for _ in range(2))
        cotangents = [randn(rows, N), randn(rows, N)]
        runs = []
        for call in (compiled, add_rms_norm):
            outputs = call(x, r, w, EPS)
            runs.append([*outputs, *torch.autograd.grad(outputs, [x, r, w], cotangents)])
        for a, b in zip(*runs, strict=True):
            assert_same_bits(a, b)
    x, r = unbacked(randn(5, N), 0), unbacked(randn(6, N), 0)
    with pytest.raises((AssertionError, RuntimeError)):  # by torch's compiler, or by the program that it made
        compiled(x, r, w, EPS)


def test_a_dynamic_eps_compiles(fresh_dynamo, randn) -> None:
    x, w = randn(M, N), randn(N)
    compiled = torch.compile(lambda eps: rms_norm(x, w, eps), fullgraph=True, backend="aot_eager")
    for eps in (1e-6, 1e-3, 0.1):
        assert_same_bits(compiled(eps), rms_norm(x, w, eps))


class SumOfInputs(nn.Module):
    def forward(self, x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, r, w, EPS)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_norm_of_dynamic_shape_raises_for_shapes_that_do_not_fit(randn, strict) -> None:
    any_size, columns = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC}
    shapes = (any_size, any_size, columns)
    given = (randn(5, N), randn(5, N), randn(N))
    program = torch.export.export(SumOfInputs(), given, dynamic_shapes=shapes, strict=strict)
    x, r, w = randn(7, 33), randn(7, 33), randn(33)
    for a, b in zip(program.module()(x, r, w), add_rms_norm(x, r, w, EPS), strict=True):
        assert_same_bits(a, b)
    for wrong in ((x, r[1:], w), (x, r, w[1:]), (x, r[:, 1:], w)):
        with pytest.raises((AssertionError, RuntimeError)):  # torch's own check
            program.module()(*wrong)
        with pytest.raises(ValueError, match=r"\[add_rms_norm\] \w+ has shape"):
            program.graph_module(*wrong)


def test_an_unbacked_width_compiles(fresh_dynamo, randn) -> None:
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    for width in (N, 33):
        x, w = unbacked(randn(M, width).requires_grad_(), 1), unbacked(randn(width).requires_grad_(), 0)
        dy = randn(M, width)
        runs = []
        for call in (compiled, rms_norm):
            y = call(x, w, EPS)
            runs.append([y, *torch.autograd.grad(y, [x, w], dy)])
        for a, b in zip(*runs, strict=True):
            assert_same_bits(a, b)
    with pytest.raises((AssertionError, RuntimeError)):
        compiled(unbacked(randn(M, N), 1), unbacked(randn(N - 1), 0), EPS)


# --- modified in place ---------------------------------------------------------------------------------------


def test_an_x_or_weight_modified_in_place_raises_an_error_that_says_what_to_write(cpp, randn, monkeypatch) -> None:
    """The nodes of C++ and Python give the same message, followed by torch's own."""
    for which in ("x", "w", "s"):
        said = []
        for node in ("C++", "Python"):
            with monkeypatch.context() as patched:
                if node == "Python":
                    patched.setattr(host, "norm", lambda *arguments: None)
                run = Run(node, randn, adds=which == "s")
                with torch.no_grad():
                    getattr(run, which).add_(1)
                with pytest.raises(RuntimeError) as found:
                    run.backward()
                said.append(str(found.value).split(" (one of the variables needed for gradient computation")[0])
        where, names, rows = ("rms_norm", "x or weight", "x") if which != "s" else (
            "add_rms_norm", "s, the sum that it returned, or weight", "s"
        )  # fmt: skip
        assert (
            said[0]
            == said[1]
            == (
                f"[{where}] {names} was modified in place after the forward pass, which keeps them for the backward pass: "
                f"write {rows} = {rows} + ... instead of {rows} += ..., call optimizer.step() after the last backward "
                "pass, or rmsnorm.unpatch the norm"
            )
        )


def test_a_sum_modified_in_place_is_named_as_the_output_that_it_is_with_variance_size_too(randn) -> None:
    x, r, w = (randn(*shape).requires_grad_() for shape in ((M, N), (M, N), (N,)))
    y, s = add_rms_norm(x, r, w, EPS, variance_size=8)
    s.add_(1)
    with pytest.raises(RuntimeError, match=re.escape("[add_rms_norm] s, the sum that it returned, or weight was mod")):
        y.sum().backward()


def test_other_errors_of_what_was_saved_stay_torchs(node, randn) -> None:
    run = Run(node, randn)
    run.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time") as found:
        run.backward()
    assert "[rms_norm]" not in str(found.value)


# --- explain -------------------------------------------------------------------------------------------------


def test_explain_says_of_each_call_who_would_make_it(cpp, randn, threads) -> None:
    """Also of a call that was never made, and why where it is Python."""
    threads(2)
    x, w, r = randn(M, N), randn(N), randn(M, N)
    half, store = randn(N, dtype=torch.bfloat16), randn(M * N + 1, dtype=torch.bfloat16)
    cases = {
        "small": (x, w, None, ""),
        "without a weight": (x, None, None, ""),
        "with a residual": (x, w, r, ""),
        "strided rows": (randn(M, 2 * N)[:, :N], w, None, ""),
        "on several threads": (randn(81, 1280), randn(1280), None, ""),
        "at an odd place": (store[1:].view(M, N), half, None, ""),
        "to be differentiated": (x.clone().requires_grad_(), w, None, ""),
        "of huge pages": (torch.ones(1, 8 << 20), None, None, "it asks for huge pages"),
        "a weight of another dtype": (x, half, None, "torch converts weight at each call"),
        "a transposed x": (randn(N, M).T, w, None, "torch converts x at each call"),
        "a residual of another dtype": (
            x, w, randn(M, N, dtype=torch.bfloat16), "torch converts x, residual at each call"
        ),
    }  # fmt: skip
    for name, (x, w, r, why) in cases.items():
        expected = f"({FROM_PYTHON}: {why})" if why else f"({FROM_CPP})"
        assert expected in explain(x, w, r), name
        assert (host.norm(x, r, w, EPS, "early", 0.0) is None) == bool(why), name
        assert expected in explain(x, w, r), name


# --- a batch of nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [(0, None), (None, 0), (0, 0)], ids=["x", "weight", "both"])
def test_vmap_over_no_samples_gives_empty_results(randn, batched) -> None:
    x, w = (randn(*([0] if d == 0 else []), *shape) for d, shape in zip(batched, ((M, N), (N,)), strict=True))
    assert torch.vmap(rms_norm, batched)(x, w).shape == (0, M, N)
    y, s = torch.vmap(add_rms_norm, (batched[0], batched[0], batched[1]))(x, x, w) if batched[0] == 0 else (None, None)
    assert y is None or y.shape == s.shape == (0, M, N)


def test_gradients_of_no_single_rows_have_the_right_shapes(randn) -> None:
    """Their rstd has the shape (0,), like an output that was not asked for."""
    x, w = randn(0, N), randn(N)
    dx, dw = torch.vmap(torch.func.grad(lambda x, w: rms_norm(x, w).sum(), (0, 1)), (0, None))(x, w)
    assert dx.shape == dw.shape == (0, N)
    y, tangent = torch.vmap(lambda x: torch.func.jvp(lambda x: rms_norm(x, w), (x,), (x,)))(x)
    assert y.shape == tangent.shape == (0, N)


def test_vmap_over_no_samples_of_a_residual_alone_gives_empty_results(randn) -> None:
    y, s = torch.vmap(add_rms_norm, (None, 0, None))(randn(M, N), randn(0, M, N), randn(N))
    assert y.shape == s.shape == (0, M, N)


@pytest.mark.parametrize("batched", [(0, 0), (0, None), (None, 0)], ids=["both", "x", "weight"])
def test_gradients_of_no_samples_have_the_right_shapes(randn, batched) -> None:
    x, w = (randn(*([0] if d == 0 else []), *shape) for d, shape in zip(batched, ((M, N), (N,)), strict=True))
    gradient = torch.func.grad(lambda x, w: rms_norm(x, w).square().sum(), (0, 1))
    dx, dw = torch.vmap(gradient, batched)(x, w)
    assert dx.shape == (0, M, N)
    assert dw.shape == (0, N)


def test_gradients_of_no_samples_of_a_sum_have_the_right_shapes(randn) -> None:
    def loss(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        y, s = add_rms_norm(x, r, w)
        return y.sum() + s.square().sum()

    found = torch.vmap(torch.func.grad(loss, (0, 1, 2)))(randn(0, M, N), randn(0, M, N), randn(0, N))
    assert [t.shape for t in found] == [(0, M, N), (0, M, N), (0, N)]


# --- a replaced norm -----------------------------------------------------------------------------------------


def test_a_trained_norm_accepts_an_inference_tensor_after_ordinary_calls(node, randn) -> None:
    norm = DeepseekV2RMSNorm(N)
    nn.init.normal_(norm.weight)
    own = copy.deepcopy(norm)
    patch(nn.ModuleDict({"norm": norm}))
    with torch.inference_mode():
        x = randn(M, N)
    for _ in range(2):
        norm(x.clone())
    if node == "C++":
        assert FROM_CPP in explain(x.clone(), norm.weight, eps=norm.variance_epsilon)
    dy = randn(M, N)
    (found,), (expected,) = (torch.autograd.grad(one(x), one.weight, dy) for one in (norm, own))
    assert_same_bits(found, expected)
