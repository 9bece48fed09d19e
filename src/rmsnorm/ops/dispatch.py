"""Whether a call goes straight to a kernel, or through the operators and torch's dispatcher."""

import sys

from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from rmsnorm import compat

_PLAIN_TYPES = (Tensor, Parameter)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these may go straight to a kernel, past torch's dispatcher: real memory, nobody watching."""
    if compat.dispatch_modes() or compat.transforms_active() or compat.is_tracing() or is_compiling():
        return False
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN_TYPES or t.is_meta or t.is_neg() or t._is_zerotensor()):
            return False  # is_neg: a minus sign that torch has not yet applied to the memory; zeros have none
    return True


def load_sharding() -> None:
    """Load what the operators do with DTensors, if there can be any yet. torch.compile does so while it traces."""
    if "torch.distributed.tensor" in sys.modules:
        import rmsnorm.ops.sharding  # noqa: F401
