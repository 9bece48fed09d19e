"""What a forward pass computes, as an expression of x, the weight and the gate, built from the operators that it runs.

Two expressions are equal if they denote the same arithmetic: the same rounded steps, with commuting arguments in any
order and intermediate results of any shape. `loosened` also equates different ways to compute the mean and the rsqrt.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Union, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rmsnorm.spec import Activation

_WIDER = {torch.bfloat16: (torch.float32, torch.float64), torch.float16: (torch.float32, torch.float64),
          torch.float32: (torch.float64,), torch.float64: ()}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One step: `op` of the arguments, rounded to dtype. The leaves are the tensors "x", "w" and "g", and floats."""

    op: str
    dtype: torch.dtype
    args: tuple[Union["Node", float], ...] = ()

    def __str__(self) -> str:
        return f"{self.op}({', '.join(map(str, self.args))}):{str(self.dtype).removeprefix('torch.')}"


Term = Node | float


class Refusal(BaseException):
    """The forward pass does something that no RMSNorm needs; the message says what.

    It is not an Exception, so that a forward that catches exceptions does not catch this one.
    """


def cast(e: Term, dtype: torch.dtype) -> Term:
    """e rounded to the dtype. A cast to a wider dtype and back is dropped, since it changes nothing.

    A number is rounded to fp32, unless the tensor that it is combined with is fp64.
    """
    if not isinstance(e, Node):
        return e if dtype == torch.float64 or abs(e) > torch.finfo(torch.float32).max else ctypes.c_float(e).value
    if e.dtype == dtype:
        return e
    if e.op == "cast":
        (inner,) = e.args
        assert isinstance(inner, Node)
        if e.dtype in _WIDER.get(inner.dtype, ()):
            return cast(inner, dtype)
    return Node("cast", dtype, (e,))


def _commuting(op: str, dtype: torch.dtype, a: Term, b: Term) -> Node:
    if op == "mul" and 1.0 in (a, b):
        return cast(a if b == 1.0 else b, dtype)  # type: ignore[return-value]
    terms = sorted((cast(a, dtype), cast(b, dtype)), key=str)
    if op == "mul" and terms[0] == terms[1]:
        return Node("square", dtype, (terms[0],))
    return Node(op, dtype, tuple(terms))


def _power(e: Term, dtype: torch.dtype, exponent: float) -> Node:
    """For these three exponents ATen computes a power with the named function."""
    named = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt"}
    if exponent not in named:
        raise Refusal(f"its forward raises to the power {exponent:g}")
    return Node(named[exponent], dtype, (cast(e, dtype),))


def _quotient(a: Term, b: Term, dtype: torch.dtype, N: int) -> Node:
    if isinstance(a, Node) and a.op == "sum" and b == float(N):
        return Node("mean", dtype, a.args)
    return Node("div", dtype, (cast(a, dtype), cast(b, dtype)))


def loosened(e: Term, N: int) -> Term:
    """The expression with 1 / sqrt, a sum times 1 / N, and an fp64 statistic replaced by rsqrt of an fp32 mean."""
    if not isinstance(e, Node):
        return e
    args = tuple(loosened(a, N) for a in e.args)
    first = args[0] if args else None
    if e.op == "reciprocal" or (e.op == "div" and first == 1.0):
        root = args[-1]
        if isinstance(root, Node) and root.op == "sqrt":
            return Node("rsqrt", e.dtype, root.args)
    if e.op == "div" and isinstance(args[1], Node) and args[1].op == "sqrt":
        return _commuting("mul", e.dtype, args[0], Node("rsqrt", args[1].dtype, args[1].args))
    if e.op == "mul" and cast(1.0 / N, e.dtype) in args:
        for a in args:
            if isinstance(a, Node) and a.op == "sum":
                return Node("mean", e.dtype, a.args)
    if e.op == "cast" and e.dtype == torch.float32 and isinstance(first, Node) and first.op == "rsqrt":
        return _narrowed(first)
    if e.op == "mul":
        return _commuting("mul", e.dtype, *args)
    return Node(e.op, e.dtype, args)


def _narrowed(e: Term) -> Term:
    """An fp64 statistic, as if it were computed in fp32."""
    if not isinstance(e, Node) or e.dtype != torch.float64:
        return e
    args = tuple(cast(_narrowed(a), torch.float32) for a in e.args)
    if e.op == "cast":
        return args[0]
    return Node(e.op, torch.float32, args)


def epsilon(e: Term) -> float | None:
    """The number that is added under the root of the expression; None if there is no root or more than one."""
    found = {_added(node) for node in nodes(e) if node.op in ("rsqrt", "sqrt")}
    return found.pop() if len(found) == 1 else None


def _added(root: Node) -> float | None:
    (v,) = root.args
    while isinstance(v, Node) and v.op == "cast":
        (v,) = v.args
    if isinstance(v, Node) and v.op == "add":
        return next((a for a in v.args if isinstance(a, float)), None)
    return None


def nodes(e: Term) -> Iterator[Node]:
    """The node and all nodes below it."""
    if isinstance(e, Node):
        yield e
        for a in e.args:
            yield from nodes(a)


# --- recording operators ------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Follows x, w and the gate through the operators that run inside, and refuses those that no RMSNorm needs.

    The first refusal is also kept in `refusal`, in case the forward catches it.

    Args:
        leaves: x, and the weight and the gate if there are any, under the names "x", "w" and "g".
        N: The number of elements of a row.

    Attributes:
        N: The number of elements over which means are taken: of a row, or if there is a gate of a group.
    """

    def __init__(self, leaves: dict[str, Tensor], N: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.N = N
        self.leaves = leaves
        self._may_divide = "g" in leaves
        self.refusal: str | None = None
        self._terms: dict[int, Node] = {}
        self._kept: list[Tensor] = []  # keeps them alive, so that no id is reused
        for name, t in leaves.items():
            self._keep(t, Node(name, t.dtype))

    def expression(self, y: Tensor) -> Node:
        """The expression that y is. Raises Refusal if y was not computed inside."""
        return self._term(y, "returns a tensor")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::")
        if name not in _RULES:  # a composite operator: in inference mode it is not decomposed before it gets here
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        try:
            self._check_written(func, args)
            if name not in _RULES or (name in ACTIVATIONS and "g" not in self.leaves):
                raise Refusal(f"its forward runs {func}{self._as_layer_norm(name, args)}")
            term = _RULES[name](self, [self._argument(a, func) for a in args], args, kwargs)
        except Refusal as refusal:
            self.refusal = self.refusal or str(refusal)
            raise
        out = func(*args, **kwargs)
        assert out.dtype == term.dtype, f"{func} of {term}"
        self._keep(out, term)
        return out

    def _keep(self, t: Tensor, term: Node) -> None:
        self._terms[id(t)] = term
        self._kept.append(t)

    def _argument(self, a: Any, func: Any) -> Any:
        if isinstance(a, Tensor):
            return self._term(a, f"passes {func} a tensor")
        return float(a) if isinstance(a, (int, float)) and not isinstance(a, bool) else a

    def _term(self, t: Tensor, what: str) -> Node:
        if id(t) not in self._terms:
            own = "none of its input, its gate and" if "g" in self.leaves else "neither its input nor"
            raise Refusal(f"its forward {what} that comes from {own} its weight")
        return self._terms[id(t)]

    def _as_layer_norm(self, name: str, args: tuple[Any, ...]) -> str:
        """Says so if the operator belongs to LayerNorm but not to RMSNorm; "" if not."""
        terms = [self._terms.get(id(a)) for a in args]
        if name.startswith("sub") and any(term is not None and term.op == "mean" for term in terms[1:]):
            return ": it subtracts the mean, as LayerNorm does"
        return ": it takes a variance, as LayerNorm does" if name.startswith(("var", "std")) else ""

    def takes_mean_over(self, size: int) -> bool:
        """Whether a mean or a sum over so many elements is one over a row, or over a group as of the first such."""
        if self._may_divide and size and self.N % size == 0:
            self.N, self._may_divide = size, False
        return size == self.N

    def _check_written(self, func: Any, args: tuple[Any, ...]) -> None:
        """Refuse to overwrite a tensor unless the forward made it and it shares memory with no other."""
        if not func._schema.is_mutable:
            return
        target = args[0]
        for name, whose in (("x", "input"), ("w", "weight"), ("g", "gate")):
            if name in self.leaves and _share(target, self.leaves[name]):
                raise Refusal(f"it writes to its {whose} ({func})")
        if id(target) not in self._terms or any(t is not target and _share(target, t) for t in self._kept):
            raise Refusal(f"its forward overwrites a tensor ({func})")


def _share(a: Tensor, b: Tensor) -> bool:
    return a is b or a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0


OperatorRule = Callable[[Operators, list[Any], tuple[Any, ...], dict[str, Any]], Node]


def _reshaped(self: Operators, terms: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """These operators keep the order of the elements. The reductions and the compared outputs show where rows end."""
    (term,) = terms[:1]
    assert isinstance(term, Node)
    return term


def _copied(self: Operators, terms: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    dtype = kwargs.get("dtype") or args[0].dtype
    if kwargs.get("device") not in (None, args[0].device):
        raise Refusal("its forward moves a tensor to another device")
    term = cast(terms[0], dtype)
    assert isinstance(term, Node)
    return term


def _reduced(op: str) -> OperatorRule:
    def rule(self: Operators, terms: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        t = args[0]
        dims = args[1] if len(args) > 1 and args[1] is not None else range(t.dim())
        dims = sorted(d % t.dim() for d in ([dims] if isinstance(dims, int) else dims))
        size = 1
        for d in dims:
            size *= t.shape[d]
        if dims != list(range(t.dim() - len(dims), t.dim())) or not self.takes_mean_over(size):
            raise Refusal(f"its forward takes a {op} over dimensions other than the normalized ones")
        dtype = kwargs.get("dtype") or t.dtype
        return Node(op, dtype, (cast(terms[0], dtype),))

    return rule


def _binary(op: str) -> OperatorRule:
    def rule(self: Operators, terms: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        if kwargs.get("alpha", 1) != 1:
            raise Refusal(f"its forward adds with alpha={kwargs['alpha']}")
        a, b = terms[:2]
        # Numbers and 0-D tensors do not take part in type promotion; no leaf is 0-D.
        dtype = torch.result_type(args[0], args[1])
        return _quotient(a, b, dtype, self.N) if op == "div" else _commuting(op, dtype, a, b)

    return rule


def _unary(op: str) -> OperatorRule:
    return lambda self, terms, args, kwargs: Node(op, args[0].dtype, (terms[0],))


def _raised(self: Operators, terms: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    if not isinstance(terms[1], float):
        raise Refusal("its forward raises to the power of a tensor")
    return _power(terms[0], args[0].dtype, terms[1])


ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

_RULES: dict[str, OperatorRule] = {
    **dict.fromkeys(
        ("view", "_unsafe_view", "unsqueeze", "squeeze.dim", "squeeze.dims", "expand", "clone", "detach", "alias",
         "_reshape_alias"), _reshaped,
    ),
    "_to_copy": _copied,
    "mean.dim": _reduced("mean"),
    "mean": _reduced("mean"),
    "sum.dim_IntList": _reduced("sum"),
    "sum": _reduced("sum"),
    **{f"{name}.{kind}": _binary(name.rstrip("_"))
       for name in ("add", "mul", "div", "add_", "mul_", "div_") for kind in ("Tensor", "Scalar")},
    **{name: _unary(name.rstrip("_")) for name in ("rsqrt", "sqrt", "reciprocal", "rsqrt_", "sqrt_", "reciprocal_")},
    **{name: _unary(name) for name in ACTIVATIONS},
    "pow.Tensor_Scalar": _raised,
    "pow_.Scalar": _raised,
}  # fmt: skip

# The operators that the backward passes of those operators run.
BACKWARD: Sequence[str] = (
    *_RULES, "neg", "mul.Scalar", "div.Scalar", "sum.dim_IntList", "squeeze", "ones_like", "zeros_like", "new_zeros",
    "empty_like", "new_empty_strided", "copy_", "_fused_rms_norm_backward",
    "silu_backward", "sigmoid_backward",
)  # fmt: skip
