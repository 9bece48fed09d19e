"""Lets Inductor run the rewritings of recomputation.py and residual_fusion.py.

The pass is installed while torch.compile or torch.export traces a norm that asks for it, in the thread that compiles:
Inductor's configuration belongs to a thread, and anything may have replaced the pass since the last trace. Importing
this module imports Inductor, which takes seconds, so only a trace and `unpatch` do.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from rmsnorm.ops import graphs, recomputation, residual_fusion


def rewrite(graph: Graph) -> None:
    """Rewrite the norms in a graph as the hints of their calls allow, in place."""
    recomputation.recompute_outputs(graph)
    residual_fusion.fuse(graph)
    for node in graph.find_nodes(op="call_function", target=graphs.FORWARD):
        node.kwargs = {}  # the hints have served, and a call is faster without them


class NormPass(CustomGraphPass):
    """The pass, behind what the user or another library had set in Inductor's slot for it.

    Args:
        before: The earlier value of the slot: a pass, since torch 2.13 also a list of passes, or None.
    """

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(self, graph: Graph) -> None:
        """Run the earlier passes, then ours."""
        for run in self._earlier():
            run(graph)
        rewrite(graph)

    def uuid(self) -> Any:
        """Identifies the passes in the keys of Inductor's caches; None, which disables them, if one has no uuid."""
        uuids = [run.uuid() if isinstance(run, CustomGraphPass) else None for run in self._earlier()]
        return None if not all(uuids) else (_hash_of_source(), *uuids)

    def _earlier(self) -> tuple[Any, ...]:
        if self.before is None:
            return ()
        return tuple(self.before) if isinstance(self.before, (list, tuple)) else (self.before,)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile calls it while it traces
def install_pass() -> bool:
    """Put the pass in Inductor's slot for this thread, behind what is there, if it is not there yet."""
    if not isinstance(config.joint_custom_post_pass, NormPass):
        config.joint_custom_post_pass = NormPass(config.joint_custom_post_pass)
    return True


def remove_pass() -> None:
    """Restore the earlier value of the slot in this thread, if the pass is there."""
    if isinstance(config.joint_custom_post_pass, NormPass):
        config.joint_custom_post_pass = config.joint_custom_post_pass.before


@functools.cache
def _hash_of_source() -> str:
    files = graphs.__file__, recomputation.__file__, residual_fusion.__file__
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()
