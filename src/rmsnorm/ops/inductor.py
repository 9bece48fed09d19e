"""Lets Inductor run the rewritings of recomputation.py, residual_fusion.py and pairing.py.

The pass is installed in the thread that compiles, when torch.compile or torch.export traces a norm that requests it:
Inductor's configuration belongs to a thread, and other code may have replaced the pass since the last trace. Importing
this module imports Inductor, which takes seconds, so it is imported only while a norm is traced.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from rmsnorm.ops import graphs, pairing, recomputation, residual_fusion


def rewrite(graph: Graph) -> None:
    """Rewrite the norms in a graph as the hints of their calls allow, in place."""
    recomputation.recompute_outputs(graph)
    residual_fusion.fuse(graph)
    pairing.pair(graph)
    for node in graph.find_nodes(op="call_function", target=graphs.FORWARD):
        node.kwargs = {}  # the hints are not needed any more, and a call is faster without them


class NormPass(CustomGraphPass):
    """Our graph pass, which runs after the passes that the user or another library had set in Inductor's slot.

    Args:
        before: The earlier value of the slot: None, a pass, or since torch 2.13 a list of passes.
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
    """Put the pass in Inductor's slot for this thread, after existing passes, if it is not there yet."""
    if not isinstance(config.joint_custom_post_pass, NormPass):
        config.joint_custom_post_pass = NormPass(config.joint_custom_post_pass)
    return True


def remove_pass() -> None:
    """Restore the earlier value of the slot in this thread, if the pass is there."""
    if isinstance(config.joint_custom_post_pass, NormPass):
        config.joint_custom_post_pass = config.joint_custom_post_pass.before


@functools.cache
def _hash_of_source() -> str:
    files = graphs.__file__, pairing.__file__, recomputation.__file__, residual_fusion.__file__
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()
