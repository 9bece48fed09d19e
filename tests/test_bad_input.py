"""Invalid arguments raise TypeError or ValueError that names the argument, what it was and what it should be.

The same holds under torch.compile.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import rmsnorm
from rmsnorm import add_rms_norm, explain, rms_norm
from rmsnorm.errors import type_name, with_article

N = 8


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape or (3, N), dtype=dtype, device=device)


class Bad(NamedTuple):
    argument: str
    was: str
    should_be: str
    error: type[Exception]
    arguments: Callable[[], dict[str, Any]]


def of_tensor(name: str, make: Callable[..., Any]) -> list[Bad]:
    """The values that are invalid for every argument that is a tensor."""
    wanted = "float32, bfloat16, float16 or float64"
    refused = (
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.complex128,
        torch.float8_e4m3fn,
    )

    def bad(was: str, should_be: str, value: Callable[[], Any]) -> Bad:
        return Bad(name, was, should_be, TypeError, lambda: {name: value()})

    return [
        *(bad(f"has dtype {dtype}", wanted, lambda dtype=dtype: make(dtype=dtype)) for dtype in refused),
        bad("has layout torch.sparse_coo", "a dense tensor", lambda: make().to_sparse()),
        bad("is a list", "a torch.Tensor", lambda: make().tolist()),
        bad("is an ndarray", "a torch.Tensor", lambda: make().numpy()),
        bad("is a float", "a torch.Tensor", lambda: 1.0),
    ]


BAD = [
    *of_tensor("x", x),
    *of_tensor("weight", lambda **given: x(N, **given)),
    Bad("x", "is a NoneType", "a torch.Tensor", TypeError, lambda: {"x": None}),
    Bad("x", "has layout torch.sparse_csr", "a dense tensor", TypeError, lambda: {"x": x().to_sparse_csr()}),
    Bad("x", "has shape ()", "(..., N)", ValueError, lambda: {"x": torch.tensor(1.0), "weight": None}),
    Bad("x", "has shape (3, 0)", "(..., N)", ValueError, lambda: {"x": x(3, 0), "weight": x(0)}),
    Bad("x", "has shape (0,)", "(..., N)", ValueError, lambda: {"x": x(0), "weight": None}),
    Bad("weight", "has shape (5,)", "(8,), the last dimension of x", ValueError, lambda: {"weight": x(5)}),
    Bad("weight", "has shape (1,)", "(8,), the last dimension of x", ValueError, lambda: {"weight": x(1)}),
    Bad("weight", "has shape ()", "(8,), the last dimension of x", ValueError, lambda: {"weight": torch.tensor(1.0)}),
    Bad("weight", "has shape (1, 8)", "(8,), the last dimension of x", ValueError, lambda: {"weight": x(1, N)}),
    Bad("weight", "has shape (2, 8)", "(8,), the last dimension of x, or (3,", ValueError, lambda: {"weight": x(2, N)}),
    Bad("weight", "has shape (2, 4)", "x.unflatten(-1, (2, 4))", ValueError, lambda: {"weight": x(2, 4)}),
    Bad("weight", "has shape (0,)", "(8,), the last dimension of x", ValueError, lambda: {"weight": x(0)}),
    Bad("weight", "is on meta", "cpu, the device of x", ValueError, lambda: {"weight": x(N, device="meta")}),
    Bad("weight", "is on cpu", "meta, the device of x", ValueError, lambda: {"x": x(device="meta")}),
    Bad("weight", "is None", "a weight", ValueError, lambda: {"weight": None, "cast": "late", "offset": 1.0}),
    Bad("eps", "is -1e-06", "at least 0", ValueError, lambda: {"eps": -1e-6}),
    Bad("eps", "is -1", "at least 0", ValueError, lambda: {"eps": -1}),
    Bad("eps", "is nan", "at least 0", ValueError, lambda: {"eps": math.nan}),
    Bad("eps", "is inf", "at least 0", ValueError, lambda: {"eps": math.inf}),
    Bad("eps", "is a NoneType", "a number", TypeError, lambda: {"eps": None}),
    Bad("eps", "is a str", "a number", TypeError, lambda: {"eps": "1e-6"}),
    Bad("eps", "is a bool", "a number", TypeError, lambda: {"eps": True}),
    Bad("eps", "is a complex", "a number", TypeError, lambda: {"eps": 1j}),
    Bad("eps", "is a Tensor", "a number", TypeError, lambda: {"eps": torch.tensor(1e-6)}),
    Bad("cast", "is 'Early'", "'early', 'late' or 'first'", ValueError, lambda: {"cast": "Early"}),
    Bad("offset", "is 1 with cast='first'", "cast='late'", ValueError, lambda: {"cast": "first", "offset": 1.0}),
    Bad("cast", "is None", "'early', 'late' or 'first'", ValueError, lambda: {"cast": None}),
    Bad("cast", "is torch.float32", "'early', 'late' or 'first'", ValueError, lambda: {"cast": torch.float32}),
    Bad("offset", "is 1", "cast='late'", ValueError, lambda: {"offset": 1.0}),
    Bad("offset", "is 0.5", "0 or 1", ValueError, lambda: {"offset": 0.5, "cast": "late"}),
    Bad("offset", "is nan", "0 or 1", ValueError, lambda: {"offset": math.nan, "cast": "late"}),
    Bad("offset", "is a NoneType", "a number", TypeError, lambda: {"offset": None, "cast": "late"}),
    Bad("offset", "is a bool", "a number", TypeError, lambda: {"offset": True, "cast": "late"}),
]
BAD_RESIDUAL = [
    *of_tensor("residual", x),
    Bad("residual", "is a NoneType", "a torch.Tensor", TypeError, lambda: {"residual": None}),
    Bad("residual", "has shape (8,)", "(3, 8), the shape of x", ValueError, lambda: {"residual": x(N)}),
    Bad("residual", "has shape (1, 8)", "(3, 8), the shape of x", ValueError, lambda: {"residual": x(1, N)}),
    Bad("residual", "has shape (3, 1)", "(3, 8), the shape of x", ValueError, lambda: {"residual": x(3, 1)}),
    Bad("residual", "is on meta", "cpu, the device of x", ValueError, lambda: {"residual": x(device="meta")}),
]
names = {"ids": lambda bad: f"{bad.argument} {bad.was}"}


def plain(bad: Bad) -> Any:
    return rms_norm(**({"x": x(), "weight": x(N)} | bad.arguments()))


def summed(bad: Bad) -> Any:
    return add_rms_norm(**({"x": x(), "residual": x(), "weight": x(N)} | bad.arguments()))


def check(bad: Bad, where: str, call: Callable[[Bad], Any]) -> None:
    with pytest.raises(bad.error) as raised:
        call(bad)
    assert type(raised.value) is bad.error
    message = str(raised.value)
    assert message.startswith(f"[{where}] {bad.argument} {bad.was}"), message
    _, expected, should_be = message.partition(", expected ")
    assert expected, message
    assert bad.should_be in should_be, message
    assert "\n" not in message


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("bad", BAD, **names)
def test_rms_norm_names_the_bad_argument_and_what_it_should_be(bad) -> None:
    check(bad, "rms_norm", plain)


@pytest.mark.parametrize("bad", BAD + BAD_RESIDUAL, **names)
def test_add_rms_norm_names_the_bad_argument_and_what_it_should_be(bad) -> None:
    if (bad.argument == "x" and bad.was.startswith("has shape")) or "the device of x" in bad.should_be:
        # The residual is made to fit x, so that the other argument is the only bad one.
        given = bad.arguments
        bad = bad._replace(arguments=lambda: {"residual": given().get("x", x())} | given())
    check(bad, "add_rms_norm", summed)


def test_explain_names_the_bad_argument() -> None:
    with pytest.raises(
        ValueError, match=re.escape("[explain] weight has shape (5,), expected (8,), the last dimension")
    ):
        explain(x(), x(5))
    with pytest.raises(TypeError, match=re.escape("[explain] x has dtype torch.int64")):
        explain(x(dtype=torch.int64))


def test_a_short_weight_raises_the_message_of_the_contract() -> None:
    with pytest.raises(ValueError, match="expected") as raised:
        rms_norm(x(2, 1280), x(512))
    assert str(raised.value) == "[rms_norm] weight has shape (512,), expected (1280,), the last dimension of x"


def test_a_weight_of_several_dimensions_that_does_not_fit_raises_an_error_that_says_what_to_write() -> None:
    heads = "; if each head has its own weight, call with x."
    for given, weight, more in (
        (x(5, 32), x(4, N), f", or (5, 32), the last two{heads}unflatten(-1, (4, 8))"),
        (x(4, 5, N), x(4, N), f", or (5, 8), the last two{heads}transpose(-3, -2)"),
        (x(5, 3, N), x(4, N), ", or (3, 8), the last two"),
        (x(N), x(4, N), ""),
        (x(3, 4, N), x(3, 4, N), "; to normalize over 3 dimensions, flatten them in x and weight; if each row of"),
    ):
        start = f"weight has shape {tuple(weight.shape)}, expected ({given.shape[-1]},), the last dimension of x{more}"
        for where, call in (
            ("rms_norm", lambda given=given, weight=weight: rms_norm(given, weight)),
            ("add_rms_norm", lambda given=given, weight=weight: add_rms_norm(given, given, weight)),
            ("explain", lambda given=given, weight=weight: explain(given, weight)),
        ):
            with pytest.raises(ValueError, match=re.escape(f"[{where}] {start}")):
                call()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heads": 0}, ValueError, "heads is 0, expected at least 1"),
        ({"heads": 2.0}, TypeError, "heads is 2.0, expected an int"),
        ({"heads": True}, TypeError, "heads is True, expected an int"),
        ({"heads": 2, "elementwise_affine": False}, ValueError, "elementwise_affine is False with a number of heads"),
    ],
)
def test_a_layer_refuses_a_number_of_heads_that_makes_no_sense(arguments, error, message) -> None:
    with pytest.raises(error, match=re.escape(f"[RMSNorm] {message}")):
        rmsnorm.RMSNorm(N, **arguments)


def test_the_argument_order_of_f_rms_norm_raises_an_error_that_says_so() -> None:
    order = "expected a torch.Tensor: this is the argument order of F.rms_norm; write rms_norm(x, weight, eps=eps, "
    for shape in ((N,), [N], N, torch.Size((N,))):
        for more in ((), (x(N),), (x(N), 1e-6), (None, 1e-6)):
            with pytest.raises(TypeError, match=re.escape(order)) as raised:
                rms_norm(x(), shape, *more)
            assert str(raised.value).startswith(f"[rms_norm] weight is {type_name(shape)}, ")
    for call in (lambda: rms_norm(x(), (4, N), x(N)), lambda: rms_norm(x(), normalized_shape=[4, N])):
        with pytest.raises(TypeError, match="with the last 2 dimensions of x and weight flattened, or use"):
            call()
    with pytest.raises(
        TypeError, match=re.escape("eps is a NoneType, expected a number; F.rms_norm's None is torch.f")
    ):
        rms_norm(x(), x(N), None)
    rms_norm(x(), x(N))  # so that C++ makes the next calls of this kind
    for given, was in (("late", "is 'late'"), (x(N), "is a Tensor")):
        with pytest.raises(
            TypeError, match=re.escape(f"[rms_norm] the argument after eps {was}, expected cast and off")
        ):
            rms_norm(x(), x(N), 1e-6, given)


@pytest.mark.parametrize("shape", [N, (N,), [N]])
def test_torchs_argument_names_and_order_raise_an_error_that_says_what_to_write(shape: Any) -> None:
    rms_norm(x(), x(N))  # so that C++ makes the next calls of this kind
    add_rms_norm(x(), x(), x(N))
    for where, call in (
        ("rms_norm", lambda: rms_norm(x(), normalized_shape=shape)),
        ("rms_norm", lambda: rms_norm(x(), normalized_shape=shape, weight=x(N), eps=1e-6)),
        ("add_rms_norm", lambda: add_rms_norm(x(), x(), normalized_shape=shape, weight=x(N))),
    ):
        with pytest.raises(TypeError) as raised:
            call()
        assert str(raised.value).startswith(f"[{where}] normalized_shape is {shape!r}, expected no such argument")
        assert str(raised.value).endswith(f'write {where}(x, weight, eps=eps, cast="late")')
    for where, call in (
        ("add_rms_norm", lambda: add_rms_norm(x(), x(), shape, x(N))),
        ("explain", lambda: explain(x(), shape)),
    ):
        with pytest.raises(
            TypeError, match=rf"^\[{where}\] weight is .*the argument order of F.rms_norm; write {where}"
        ):
            call()
    with pytest.raises(
        TypeError, match=r"^\[add_rms_norm\] the argument after eps is 'late', expected cast and offset"
    ):
        add_rms_norm(x(), x(), x(N), 1e-6, "late")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_weight_and_residual_are_never_broadcast(grad, residual) -> None:
    """Plain torch would broadcast an (N, 1) weight or a (1, N) residual."""
    a = x(1, N).requires_grad_(grad)
    with pytest.raises(ValueError, match="shape"):
        _ = add_rms_norm(a, x(3, N)) if residual else rms_norm(a, x(N, 1))


def test_numbers_of_numpy_integers_and_zero_rows_are_accepted() -> None:
    expected = rms_norm(x(), x(N), 0.0)
    for eps in (0, np.float32(0), np.float64(0), np.int64(0)):
        assert torch.equal(rms_norm(x(), x(N), eps), expected)
    assert torch.equal(rms_norm(x(), x(N), cast="late", offset=1), rms_norm(x(), x(N), cast="late", offset=1.0))
    assert rms_norm(x(0, N), x(N)).shape == (0, N)


# --- compiled: torch's own error contains ours ----------------------------------------------------------------

# Not sparse tensors: torch.compile raises for those before it reaches our code.
REACHES_US = [bad for bad in BAD if "sparse" not in bad.was]
RESIDUAL_REACHES_US = [bad for bad in BAD_RESIDUAL if "sparse" not in bad.was]


def compiled(f: Callable[..., Any], given: dict[str, Any]) -> str:
    torch._dynamo.reset()
    try:
        torch.compile(lambda given: f(**given), fullgraph=True, backend="eager")(given)
    except Exception as error:  # torch wraps ours in a class of its own
        chain, e = [], error
        while e is not None:
            chain.append(str(e))
            e = e.__cause__
        return "\n".join(chain)
    return ""


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("bad", REACHES_US, **names)
def test_compiled_rms_norm_names_the_bad_argument(bad) -> None:
    message = compiled(rms_norm, {"x": x(), "weight": x(N)} | bad.arguments())
    assert f"[rms_norm] {bad.argument} {bad.was}" in message, message
    assert bad.should_be in message


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("bad", RESIDUAL_REACHES_US, **names)
def test_compiled_add_rms_norm_names_the_bad_argument(bad) -> None:
    message = compiled(add_rms_norm, {"x": x(), "residual": x(), "weight": x(N)} | bad.arguments())
    assert f"[add_rms_norm] {bad.argument} {bad.was}" in message, message
    assert bad.should_be in message


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtypes": torch.float32}, TypeError, r"\[warmup\] dtypes is torch.float32, expected a tuple of float32"),
        ({"dtypes": (torch.int32,)}, TypeError, r"\[warmup\] dtypes is \(torch.int32,\), expected a tuple of"),
        ({"dtypes": ("bfloat16",)}, TypeError, r"\[warmup\] dtypes is \('bfloat16',\), expected a tuple of"),
        ({"weight_dtypes": (torch.int8,)}, TypeError, r"\[warmup\] weight_dtypes is \(torch.int8,\), expected a"),
        ({"hidden_size": 0}, ValueError, r"\[warmup\] hidden_size is 0, expected at least 1"),
        ({"hidden_size": 2.0}, TypeError, r"\[warmup\] hidden_size is 2.0, expected an int"),
        ({"hidden_size": True}, TypeError, r"\[warmup\] hidden_size is True, expected an int"),
        ({"device": "gpu"}, ValueError, r"\[warmup\] device is 'gpu', expected a device that torch finds here: 'cpu'"),
        ({"device": "cuda:99"}, ValueError, r"\[warmup\] device is 'cuda:99', expected a device that torch finds here"),
        ({"device": "hpu"}, ValueError, r"\[warmup\] device is 'hpu', expected a device that torch finds here"),
        ({"device": torch.device("cuda:99")}, ValueError, r"\[warmup\] device is 'cuda:99', expected a device that"),
        ({"device": None}, TypeError, r"\[warmup\] device is a NoneType, expected a str or a torch.device"),
        ({"device": 0}, TypeError, r"\[warmup\] device is an int, expected a str or a torch.device"),
    ],
)
def test_warmup_names_the_argument_that_is_wrong(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rmsnorm.warmup(**arguments)


LAYERS = ("RMSNorm", "DeepseekV2RMSNorm", "TorchRMSNorm")
SIZE = {"RMSNorm": "hidden_size", "DeepseekV2RMSNorm": "hidden_size", "TorchRMSNorm": "normalized_shape"}


def wrong_types() -> list[tuple[str, tuple[Any, ...], str, Any]]:
    """(function, its arguments by position, an argument by name, a value of a wrong type)"""
    found: list[tuple[str, tuple[Any, ...], str, Any]] = [
        *((name, (), SIZE[name], value) for name in LAYERS for value in (True, 2.0, "8", None)),
        *((name, (8,), "eps", value) for name in LAYERS for value in (True, "1e-6", 1j)),
        *((name, (8,), "elementwise_affine", v) for name in LAYERS[::2] for v in ("no", 0, None)),
        *(("RMSNorm", (8,), "offset", value) for value in (True, "1", None)),
        *(("patch", (torch.nn.Linear(2, 2),), "strict", value) for value in ("no", 0, None)),
        *(("cost", ((4, 8),), name, value) for name in ("elementwise_affine", "master") for value in ("no", 0)),
        *(("cost", ((4, 8),), "threads", value) for value in (True, 2.0, "2")),
        *(("cost", (), "shape", value) for value in ((2, True), (2.0, 8), "28", 8)),
        *((name, (x(), x(), x(N)), "offset", "1") for name in ("add_rms_norm", "explain")),
        *((name, (x(), x(), x(N)), "eps", True) for name in ("add_rms_norm",)),
    ]
    return found


@pytest.mark.parametrize(
    ("function", "arguments", "name", "value"),
    wrong_types(),
    ids=lambda value: repr(value) if isinstance(value, (str, int, float)) else type(value).__name__,
)
def test_an_argument_of_a_wrong_type_raises_with_the_name_of_the_function_or_class(
    function: str, arguments: tuple[Any, ...], name: str, value: Any
) -> None:
    with pytest.raises(TypeError) as raised:
        getattr(rmsnorm, function)(*arguments, **{name: value})
    assert re.match(rf"\[{function}\] {name} is [^,]", str(raised.value)), raised.value
    assert ", expected " in str(raised.value)


@pytest.mark.parametrize("name", LAYERS)
def test_a_wrong_value_raises_with_the_name_of_the_class_that_was_called(name: str) -> None:
    cls = getattr(rmsnorm, name)
    for value in (0, -1):
        with pytest.raises(ValueError, match=rf"^\[{name}\] {SIZE[name]} is .*, expected "):
            cls(value)
    named = type("NamedNorm", (cls,), {})
    with pytest.raises(TypeError, match=r"^\[NamedNorm\] "):
        named("8")


def test_sizes_may_be_numpy_integers() -> None:
    n = np.int64(N)
    layers = (rmsnorm.RMSNorm(n), rmsnorm.DeepseekV2RMSNorm(n), rmsnorm.TorchRMSNorm(n), rmsnorm.TorchRMSNorm([n]))
    for layer in layers:
        assert layer.weight.shape == (N,)
        assert explain(x(), layer) == explain(x(), x(N))
    assert type(layers[0].hidden_size) is int
    assert rmsnorm.cost((np.int32(4), n), threads=np.int64(1)) == rmsnorm.cost((4, N), threads=1)
    rmsnorm.warmup(dtypes=(torch.float32,), hidden_size=n)


def test_a_layer_keeps_eps_and_offset_as_floats() -> None:
    layer = rmsnorm.RMSNorm(N, np.float32(1), cast="late", offset=1)
    assert (type(layer.eps), type(layer.offset)) == (float, float)
    assert type(rmsnorm.DeepseekV2RMSNorm(N, 0).variance_epsilon) is float
    assert type(rmsnorm.TorchRMSNorm(N, 0).eps) is float


def test_messages_choose_the_indefinite_article() -> None:
    assert [with_article(noun) for noun in ("int", "ndarray", "RMSNorm", "str", "NoneType", "uint8")] == [
        "an int", "an ndarray", "an RMSNorm", "a str", "a NoneType", "a uint8",
    ]  # fmt: skip
