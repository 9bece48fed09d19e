"""Which part of a profiled step is spent in norms, in their collectives, and in other collectives.

The kernels of a norm are those that its forward pass launches, and those of the autograd nodes that it creates. torch
numbers the nodes in the order of their creation, and the profiler records the next number with each operator. So an
operator that does nothing is called at the beginning of a norm and at its end: the two numbers enclose those of its
nodes.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

NORM, NORM_COLLECTIVE, COLLECTIVE, OTHER = CLASSES = "norms", "their collectives", "other collectives", "others"
_RANGE = "a norm of the model"
_COLLECTIVES = "nccl", "gloo:", "c10d::", "_c10d_functional::"
_WAIT = "_c10d_functional::wait_tensor"  # called by the first operator that reads the result of a collective
_NODE = "autograd::engine::evaluate_function"


@contextlib.contextmanager
def marked(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Mark the calls of these modules for the profiler, including the work of other hooks around them."""
    handles = []
    nothing = torch.empty(0)
    for module in norms:
        mark = record_function(_RANGE)

        def enter(module: nn.Module, args: Any, mark: Any = mark) -> None:
            mark.__enter__()
            nothing.view(0)

        def leave(module: nn.Module, args: Any, y: Any, mark: Any = mark) -> None:
            nothing.view(0)
            mark.__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_norms() -> Any:
    """Return a context whose work counts as that of norms."""
    return record_function(_RANGE)


def measure(step: Callable[[], object], norms: Sequence[nn.Module], device: torch.device) -> dict[str, float]:
    """Run a step in torch's profiler.

    Args:
        step: A training step.
        norms: The norms of the model.
        device: Where it runs. On a CPU the operators' own times count instead of those of kernels.

    Returns:
        The microseconds of each of CLASSES. They can exceed the time of the step, because kernels run at the same time,
        and because a collective also waits for the other ranks.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with marked(norms), profile(activities=activities) as profiled:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    return classify(list(profiled.events() or ()), on_gpu)


def classify(events: list[Any], on_gpu: bool) -> dict[str, float]:
    """Add up the time of the events of a step by class.

    Args:
        events: What torch's profiler recorded.
        on_gpu: Whether the time of kernels counts, or that of operators.
    """
    operators = [event for event in events if event.device_type == DeviceType.CPU]
    nodes = _nodes_of_norms(operators)
    found = dict.fromkeys(CLASSES, 0.0)
    seen: dict[str, float] = defaultdict(float)
    for operator in operators:
        parts = [(k.name, k.duration) for k in operator.kernels] if on_gpu else [(operator.name, _own_time(operator))]
        if parts:
            of_norm = _is_in_norm(operator, nodes)
            for name, us in parts:
                found[_class_of(name, of_norm)] += us
                seen[name] += us
    if on_gpu:  # kernels without an operator, such as those that a library launches itself
        for event in events:
            if event.device_type == DeviceType.CUDA and not _is_annotation(event):
                left = event.time_range.elapsed_us()
                known = min(left, seen[event.name])
                seen[event.name] -= known
                found[_class_of(event.name, of_norm=False)] += left - known
    return {name: round(us, 3) for name, us in found.items()}


def _class_of(name: str, of_norm: bool) -> str:
    if name.startswith(_COLLECTIVES):
        return NORM_COLLECTIVE if of_norm and name != _WAIT else COLLECTIVE
    return NORM if of_norm else OTHER


def _is_annotation(event: Any) -> bool:
    """Return whether an event of a GPU is the range of an annotated part of the program, not a kernel."""
    return event.is_user_annotation or event.name == _RANGE or event.name.startswith("nccl:")


def _own_time(operator: Any) -> float:
    return float(operator.self_cpu_time_total)


def _nodes_of_norms(operators: list[Any]) -> set[int]:
    """Return the numbers of the autograd nodes that norms create."""
    nodes: set[int] = set()
    for operator in operators:
        if operator.name == _RANGE:
            numbers = [inner.sequence_nr for inner in operator.cpu_children if inner.sequence_nr >= 0]
            nodes |= set(range(min(numbers, default=0), max(numbers, default=0)))
    return nodes


def _with_callers(operator: Any) -> Iterator[Any]:
    while operator is not None:
        yield operator
        operator = operator.cpu_parent


def _is_in_norm(operator: Any, nodes: set[int]) -> bool:
    """Return whether an operator belongs to a norm. What FSDP does around one, such as gathering weights, does not."""
    for each in _with_callers(operator):
        if each.name == _RANGE:
            return True
        if each.name.startswith("FSDP::"):
            return False
        if each.name.startswith(_NODE):
            return each.sequence_nr in nodes
    return False
