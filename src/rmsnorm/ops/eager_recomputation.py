"""Recomputes norm outputs in the backward pass of eager mode, so that autograd does not keep them.

    recompute()    -> a _Pass with hooks on saved tensors
    a norm's call  -> note(y, rows, w, …)  -> an _Output, which the pass finds by the storage of y
    pack(t)        -> a _View of the _Output if t is y or a view of it, else t and its version
    unpack(view)   -> _Output.tensor(): the norm's forward, run once for all views

An output y is a pure function of the normalized rows and the weight, which autograd keeps anyway for the norm's own
backward pass. An _Output keeps these two instead of y, and recomputes y with the operator `forward`, whose bits do not
depend on how it is called. There is no special kernel that reads rstd instead of summing again: it would read and write
as many bytes.

With hooks on saved tensors, torch does not check the versions of those tensors. These hooks do, and raise the same
error as torch. They do not check if other hooks are active around them, because those may keep copies.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_compiling
from torch.nn import Parameter

from rmsnorm import compat
from rmsnorm.spec import Saved, check_saved

# Reasons to keep an output.
_HOOKS = "it belongs to a checkpointed region or to other hooks on saved tensors"
_NO_INPUT = "autograd does not keep its input, because neither x nor the weight requires a gradient"
_NOT_PLAIN = "it is not a plain contiguous tensor"
_MODIFIED = "it was modified in place before it was saved"
_OTHER_FORM = "the saved tensor shares its memory but has another dtype or class, or is negated"
_FREED = "the norm's weight was freed before the output was saved, as FSDP does if the norm is a unit of its own"
_HELD = "something else held it when the forward pass ended"


@dataclass
class Recomputation:
    """What became of the norm outputs of one forward pass under `recompute`.

    Attributes:
        outputs: How many norm outputs there were, counting only calls with gradients enabled.
        dropped: How many of them the backward pass needs but nothing keeps. They are recomputed.
        dropped_bytes: The bytes of those outputs.
        kept: How many of them are kept, by reason. Outputs that no operator saves are neither dropped nor kept.
        recomputed: How many times an output was recomputed so far.
        why_inactive: Why the whole forward pass ran without recomputation; "" if it did not.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), rmsnorm.RMSNorm(8), torch.nn.Linear(8, 8))
        >>> with rmsnorm.recompute() as recomputation:
        ...     loss = model(torch.randn(4, 8)).sum()
        >>> loss.backward()
        >>> print(recomputation)
        1 of 1 norm outputs not kept (128 bytes), recomputed 1 time
    """

    outputs: int = 0
    dropped: int = 0
    dropped_bytes: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    recomputed: int = 0
    why_inactive: str = ""

    def __str__(self) -> str:
        if self.why_inactive:
            return f"no norm output recomputed: {self.why_inactive}"
        times = "1 time" if self.recomputed == 1 else f"{self.recomputed} times"
        share = f"{self.dropped} of {self.outputs} norm outputs not kept ({self.dropped_bytes:,} bytes)"
        kept = [f"  {count} kept: {reason}" for reason, count in self.kept.items()]
        return "\n".join([f"{share}, recomputed {times}", *kept])

    def _keep(self, reason: str) -> None:
        self.kept[reason] = self.kept.get(reason, 0) + 1


class _Call(NamedTuple):
    """How to recompute an output: the packed arguments of the operator, what they were, and how to unpack them."""

    rows: Any
    w: Any
    saved_rows: Saved | None
    saved_w: Saved | None
    eps: float
    cast: str
    offset: float
    unpack: Callable[[Any], Tensor]

    def run(self) -> Tensor:
        rows, w = self.unpack(self.rows), None if self.w is None else self.unpack(self.w)
        check_saved("rms_norm", x=(rows, self.saved_rows), weight=(w, self.saved_w))
        with torch.no_grad():
            return torch.ops.rmsnorm.forward.default(  # type: ignore[no-any-return]
                rows, None, w, self.eps, self.cast, self.offset, False
            )[0]


class _Output:
    """A norm output y that is not kept; a _View replaces each tensor that operators save of it.

    A recomputed y is cached until each view that is still alive has asked for it once.
    """

    lock = threading.RLock()  # reentrant: a view may be destroyed at any time, even in a thread that holds the lock

    def __init__(self, y: Tensor, w: Tensor | None, call: _Call, result: Recomputation, is_checked: bool) -> None:
        self.storage = compat.StorageWeakRef(
            y.untyped_storage()
        )  # while this is alive, no other storage gets the same address
        self.dtype, self.nbytes, self.gpu = y.dtype, y.nbytes, y.device.index if y.is_cuda else None
        self.counter, self.version = _version_counter_of(y) if is_checked else None, y._version
        self.w, self.call, self.result = w, call, result
        self.saved, self.reason = False, ""
        self.views, self.served, self.turn = 0, 0, 1
        self.cached: Tensor | None = None
        self.cached_for: tuple[int | None, int] = (None, 0)  # the stream, and the version of what is cached

    def view(self, t: Tensor) -> "_View | None":
        """A replacement for t, which has the storage of y; None if y as it is now cannot be recomputed."""
        if t._version != self.version:
            self.reason = _MODIFIED
        elif t.dtype is not self.dtype or type(t) not in (Tensor, Parameter) or t.is_neg():
            self.reason = _OTHER_FORM
        elif self.w is not None and _is_freed(self.w, self.call.saved_w):
            self.reason = _FREED
        else:
            return _View(self, t)
        return None

    def tensor(self, view: "_View") -> Tensor:
        """The whole of y, for this view."""
        if is_compiling():  # compiled autograd traces this; the compiler shares equal calls
            return self.call.run()
        if self.counter is not None:
            _check_version(self.counter, self.version, view.size)
        stream = None if self.gpu is None else compat.raw_stream(self.gpu)
        y = self.cached
        if y is None or self.cached_for[0] != stream:  # another stream cannot use it without synchronization
            y = self.call.run()
            with self.lock:
                self.result.recomputed += 1
                self.cached, self.cached_for = y, (stream, y._version)
        elif y._version != self.cached_for[1]:
            _check_version(y, self.cached_for[1], view.size)
        with self.lock:
            if view.turn != self.turn:
                view.turn = self.turn
                self.served += 1
            self._free()
        return y

    def leave(self, view: "_View") -> None:
        """Stop counting a view that is being destroyed."""
        with self.lock:
            self.views -= 1
            self.served -= view.turn == self.turn
            self._free()

    def _free(self) -> None:
        if self.cached is not None and self.served >= self.views:
            self.cached, self.served, self.turn = None, 0, self.turn + 1

    def tally(self) -> None:
        """Add y to the counts of the result, once no operator can save it any more."""
        self.w = None
        if not self.reason and not self.storage.expired():
            self.reason = _HELD
        if self.reason:
            self.result._keep(self.reason)
        elif self.saved:
            self.result.dropped += 1
            self.result.dropped_bytes += self.nbytes


class _View:
    """Replaces a saved tensor that is a norm output or a view of one."""

    __slots__ = ("offset", "output", "size", "stride", "turn")

    def __init__(self, output: _Output, t: Tensor) -> None:
        self.output, self.turn = output, 0
        self.size, self.stride, self.offset = t.shape, t.stride(), t.storage_offset()
        output.saved = True
        with output.lock:
            output.views += 1

    def __del__(self) -> None:
        self.output.leave(self)

    def tensor(self) -> Tensor:
        return self.output.tensor(self).as_strided(self.size, self.stride, self.offset)


def _version_counter_of(y: Tensor) -> Tensor:
    """An empty tensor that shares the version counter of y, but not its memory."""
    counter = y.detach()
    counter.data = y.new_empty(0)
    return counter


def _is_freed(w: Tensor, saved: Saved | None) -> bool:
    """Whether the weight has no memory, or other data in its place, such as the empty tensor of DeepSpeed's ZeRO-3."""
    return Saved.of(w) != saved or w.untyped_storage().nbytes() == 0


def _check_version(t: Tensor, version: int, size: torch.Size) -> None:
    if t._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{t.type()} {list(size)}] is at version {t._version}; expected version {version} instead. Hint: enable "
            "anomaly detection to find the operation that failed to compute its gradient, with "
            "torch.autograd.set_detect_anomaly(True)."
        )


# --- the hooks -----------------------------------------------------------------------------------------------


class _Pass:
    """The hooks of one forward pass, in one thread, and the outputs that are still alive.

    Args:
        outer: The hooks that were active before, which get all tensors but norm outputs; None if there were none.
    """

    def __init__(self, outer: tuple[Any, Any] | None) -> None:
        self.result = Recomputation()
        self.outputs: dict[int, _Output] = {}
        self.recent: deque[tuple[Tensor, Any]] = deque(
            maxlen=3
        )  # with outer hooks: the last tensors that were saved, such as the norm's own
        self.pack: Callable[[Tensor], Any] = _pack_into(self.outputs)
        self.unpack: Callable[[Any], Tensor] = _unpack
        if outer is not None:
            self.pack, self.unpack = _chained(self.outputs, self.recent, *outer)
        self.is_chained = outer is not None

    def packed(self, t: Tensor) -> Any:
        """What the pack hook returned for t when the norm saved it; None if it did not get t."""
        if not self.is_chained:
            return self.pack(t)  # a second call costs almost nothing
        view = _view_in(self.outputs, t)
        return view or next((packed for saved, packed in self.recent if _is_same(saved, t)), None)

    def sweep(self, everything: bool = False) -> None:
        """Forget the outputs whose memory was freed, or all outputs."""
        self.recent.clear()
        for key, output in list(self.outputs.items()):
            if everything or output.storage.expired():
                del self.outputs[key]
                output.tally()


def _pack_into(outputs: dict[int, _Output]) -> Callable[[Tensor], Any]:
    def pack(t: Tensor) -> Any:
        if outputs and (view := _view_in(outputs, t)) is not None:
            return view
        # A tensor that its own operator saves would keep itself alive through its grad_fn, so it is detached.
        return (t if t.is_leaf else t.detach()), t._version

    return pack


def _unpack(packed: Any) -> Tensor:
    if type(packed) is _View:
        return packed.tensor()
    t, version = packed
    if not is_compiling() and t._version != version:  # compiled autograd traces this, with tensors of its own
        _check_version(t, version, t.shape)
    return t  # type: ignore[no-any-return]


def _chained(
    outputs: dict[int, _Output], recent: deque[tuple[Tensor, Any]], outer_pack: Any, outer_unpack: Any
) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    def pack(t: Tensor) -> Any:
        if outputs and (view := _view_in(outputs, t)) is not None:
            return view
        packed = outer_pack(t)
        recent.append((t, packed))
        return packed

    def unpack(packed: Any) -> Tensor:
        return packed.tensor() if type(packed) is _View else outer_unpack(packed)

    return pack, unpack


def _view_in(outputs: dict[int, _Output], t: Tensor) -> _View | None:
    try:
        output = outputs.get(compat.storage_id(t))
    except NotImplementedError:
        return None  # sparse tensors have no storage
    return None if output is None else output.view(t)


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        compat.storage_id(a) == compat.storage_id(b)
        and (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())
    )


# --- what norms and users call -------------------------------------------------------------------------------


class _Thread(threading.local):
    def __init__(self) -> None:
        self.passes: list[_Pass] = []


_thread = _Thread()
_lock = threading.Lock()
open_passes = 0  # in all threads; norms call `note` only if there is one


@contextlib.contextmanager
def recompute() -> Iterator[Recomputation]:
    """Recompute norm outputs in the backward pass, with the same bits, instead of keeping them: a context.

    Run the forward pass in it. Autograd keeps the output of a norm for the matrix multiplications that read it (q, k
    and v, or gate and up), although it can be recomputed from the norm's input and weight, which autograd keeps anyway.
    In this context the output is not kept. The backward pass recomputes it when the first operator needs it, and frees
    it after the last one has used it. This costs one more forward call of the norm; no bit of a gradient changes.

    This is a context, not an argument of layers, because the operators that read an output decide whether it is kept,
    and a layer does not see them. `patch(model, recompute=True)` runs the model's forward in this context.

    It covers `rms_norm`, `add_rms_norm`, the layers of this package and replaced norms, in eager mode and in the thread
    that enters it. Outputs that cannot be recomputed are kept, and counted by reason. Other hooks on saved tensors work
    inside and around the context; those around it get everything but norm outputs. The context does nothing inside a
    checkpointed region, and leaves checkpointed regions inside it alone, because those keep no outputs anyway.

    An output that is changed without autograd's knowledge (through `.data`, NumPy, or a kernel that does not declare
    it) is recomputed unchanged, and an input or a weight whose values are changed in this way before the backward pass
    gives the output of the changed values: use torch's in-place operators, which are noticed.

    Returns:
        A context manager that yields the counts. They are complete when the `with` statement ends, except `recomputed`,
        which grows during the backward pass.

    Example:
        >>> model = torch.nn.Sequential(rmsnorm.RMSNorm(8), torch.nn.Linear(8, 8))
        >>> with rmsnorm.recompute() as recomputation:
        ...     y = model(torch.randn(2, 8))
        >>> recomputation.dropped, recomputation.kept
        (1, {})
    """
    outer = None if is_compiling() else compat.saved_tensors_hooks()
    if outer is not None and _thread.passes and outer[0] is _thread.passes[-1].pack:
        yield _thread.passes[-1].result  # this context is active already
        return
    why = _why_inactive(outer)
    if why:
        yield Recomputation(why_inactive=why)
        return
    this = _Pass(outer)
    with saved_tensors_hooks(this.pack, this.unpack):
        _count(1)
        _thread.passes.append(this)
        try:
            yield this.result
        finally:
            _thread.passes.pop()
            _count(-1)
            this.sweep(everything=True)


def _why_inactive(outer: tuple[Any, Any] | None) -> str:
    if is_compiling():
        return "the forward pass is being compiled"
    if compat.transforms_active() or compat.is_tracing():
        return "the forward pass is under a transform of torch.func, or traced by torch.jit"
    if compat.in_backward():
        return "the forward pass runs within a backward pass, as in reentrant checkpointing"
    if outer is not None and getattr(outer[0], "__module__", None) == "torch.utils.checkpoint":
        return "the forward pass is checkpointed"
    if outer is compat.UNKNOWN_HOOKS:
        return "this version of torch does not say which hooks on saved tensors are active"
    try:
        with saved_tensors_hooks(_unpack, _unpack):
            return ""
    except RuntimeError as error:
        return f"hooks on saved tensors are disabled ({error})"


def _count(change: int) -> None:
    global open_passes
    with _lock:
        open_passes += change


def note(y: Tensor, rows: Tensor, w: Tensor | None, eps: float, cast: str, offset: float) -> None:
    """Register y, the norm of these rows, with the context that is active in this thread, if there is one.

    Args:
        y: The output.
        rows: What was normalized, as the norm's own backward pass keeps it: x, or the sum of x and the residual.
        w: The weight.
        eps: As the norm was called.
        cast: As the norm was called.
        offset: As the norm was called.
    """
    if not _thread.passes or not torch.is_grad_enabled():
        return
    this = _thread.passes[-1]
    result = this.result
    result.outputs += 1
    if type(y) is not Tensor or not y.is_contiguous() or y.storage_offset() or y.nbytes != y.untyped_storage().nbytes():
        return result._keep(_NOT_PLAIN)
    hooks = compat.saved_tensors_hooks()
    if hooks is None or hooks[0] is not this.pack:
        return result._keep(_HOOKS)
    if not y.requires_grad:
        return result._keep(_NO_INPUT)
    packed_rows, packed_w = this.packed(rows), None if w is None else this.packed(w)
    this.sweep()
    if packed_rows is None or (packed_w is None and w is not None):
        return result._keep(_HOOKS)
    call = _Call(packed_rows, packed_w, Saved.of(rows), Saved.of(w), eps, cast, offset, this.unpack)
    this.outputs[compat.storage_id(y)] = _Output(y, w, call, result, is_checked=not this.is_chained)
