"""Spread a Llama model over ranks: FSDP2, sequence parallel around tensor parallel, or both."""

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from many.definitions import FSDP, FSDP_AND_TENSOR
from rmsnorm.tools.processes import Rank

DATA, TENSOR = "data parallel", "tensor parallel"


def sizes_of(plan: str, world: int) -> tuple[int, int]:
    """Return the data-parallel and the tensor-parallel size. The latter is 2 in a plan of both, if world is even."""
    tensor = {FSDP: 1, FSDP_AND_TENSOR: 2 if world % 2 == 0 else 1}.get(plan, world)
    return world // tensor, tensor


def why_not(plan: str, world: int, config: Any, tokens: int) -> str:
    """Return why a model cannot be spread in this way; empty if it can."""
    _, tensor = sizes_of(plan, world)
    for what, number in (("heads of keys and values", config.num_key_value_heads), ("tokens of a sequence", tokens)):
        if number % tensor:
            return f"{number} {what} cannot be spread evenly over {tensor} ranks"
    return ""


def mesh_of(plan: str, rank: Rank) -> DeviceMesh:
    """Return the mesh of a plan, the same one for plans of the same sizes."""
    return _mesh(rank.device.type, sizes_of(plan, rank.world))


@functools.cache  # for each new mesh, NCCL would connect the ranks again
def _mesh(device_type: str, sizes: tuple[int, int]) -> DeviceMesh:
    return init_device_mesh(device_type, sizes, mesh_dim_names=("dp", "tp"))


def described(mesh: DeviceMesh) -> dict[str, int]:
    """Return the size of each dimension of the mesh."""
    return {DATA: mesh["dp"].size(), TENSOR: mesh["tp"].size()}


def spread(model: Any, plan: str, mesh: DeviceMesh) -> None:
    """Spread a model of Llama's class over the ranks, in place.

    Args:
        model: The model without a head; its norms may have been replaced.
        plan: One of PLANS.
        mesh: The mesh of the plan.
    """
    if plan != FSDP:
        _parallelize(model, mesh["tp"])
    if plan in (FSDP, FSDP_AND_TENSOR):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh["dp"], mp_policy=policy)


def _parallelize(model: Any, mesh: DeviceMesh) -> None:
    """Shard the sequence between the parts of a layer, and heads and hidden dimensions inside of them."""
    sequence = Shard(1)
    of_model = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=sequence),
        "norm": SequenceParallel(use_local_output=True),
    }
    of_layer = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": sequence}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
        ),
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(output_layouts=sequence),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(sequence,), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=sequence),
    }
    parallelize_module(model, mesh, of_model)
    for layer in model.layers:
        parallelize_module(layer, mesh, of_layer)
    model.register_forward_pre_hook(_add_positions, with_kwargs=True)


def _add_positions(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a model the positions of the whole sequence; it would otherwise count only its part of the embeddings."""
    ids = kwargs["input_ids"]
    return args, kwargs | {"position_ids": torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)}


def reduce_partial_gradients(model: nn.Module) -> None:
    """Add up the gradients of parameters that every rank holds, such as norms of a sharded sequence."""
    for p in model.parameters():
        if isinstance(p.grad, DTensor) and any(isinstance(placement, Partial) for placement in p.grad.placements):
            p.grad = p.grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]
