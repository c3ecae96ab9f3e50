"""The frozen base in shards, one on each rank of a run: torch's `fully_shard` (FSDP2).

Each decoder layer is a group: its packed weights are gathered before it runs, forward and backward,
and freed after it. What is left, the embedding and the head, is the group of the model, gathered
for a whole step. Whole on each rank are adapters, which are attached later and whose gradients are
summed as without shards; quantization constants, with double quantization 3 % of the codes; and
norms and biases.

FSDP2 replaces a parameter by its shard, a DTensor, and by the gathered tensor, both without the
`quant_state` of bitsandbytes' Params4bit, which is put back on each. Gathered parameters keep their
identity, so that a backward pass finds the weight that its forward pass has used.

A weight is cut when the loader registers it, 4-bit codes already: no rank has more than its shards
and what is not in 4 bits.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.errors import require
from qlora.ops.nf4 import as_bytes

ASYNC = "HF_DEACTIVATE_ASYNC_LOAD"  # of transformers


@contextmanager
def keeping_shards() -> Iterator[None]:
    """Cut each 4-bit weight that a module gets in this block to the shard of this rank."""

    def cut(_: nn.Module, __: str, weight: Any) -> None:
        state = getattr(weight, "quant_state", None)
        if state is not None and as_bytes(weight.data).numel() == _bytes(state):
            own = as_bytes(weight.data).chunk(dist.get_world_size())
            rank = dist.get_rank()
            weight.data = own[rank].clone() if rank < len(own) else own[0][:0].clone()

    hook = register_module_parameter_registration_hook(cut)
    before = os.environ.get(ASYNC)
    os.environ[ASYNC] = "1"  # else threads put a 4-bit checkpoint on the device before it is cut
    try:
        yield
    finally:
        hook.remove()
        os.environ.pop(ASYNC) if before is None else os.environ.update({ASYNC: before})


def shard_base(model: PreTrainedModel, *, offload: bool = False) -> None:
    """Shard all parameters of a frozen `model` over the ranks, in place.

    The 4-bit weights have been loaded within `keeping_shards`. `offload` keeps the shards of the
    decoder layers in pinned host memory, and copies each to the GPU before it is gathered.

    Raises:
        UserError: the family has no decoder layers of transformers' common class.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    fault = f"{type(model).__name__} has no decoder layers that transformers knows"
    require(bool(layers), f"{fault}, by which it would be sharded: use --sharding ddp")
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for layer in layers:
        _shard(layer, mesh, policy)
    _shard(model, mesh, OffloadPolicy())


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_base` has sharded the model."""
    return isinstance(model, FSDPModule)


def held_bytes(model: nn.Module) -> int:
    """The bytes of all parameters, and constants of quantized ones, that this rank holds."""
    total = 0
    for parameter in model.parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        total += own.nbytes
        state = getattr(parameter, "quant_state", None)
        for constants in (state, getattr(state, "state2", None)):
            total += 0 if constants is None else constants.absmax.nbytes + constants.code.nbytes
    return total


def _shard(module: nn.Module, mesh: DeviceMesh, policy: OffloadPolicy) -> None:
    """Make the parameters of `module` that are in no group yet a group."""
    shards: dict[Any, tuple[Tensor, Any]] = {}
    for layer in module.modules():
        weight: Any = getattr(layer, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None and not isinstance(weight, DTensor):
            shards[layer] = weight.data, state
            layer.weight = _frozen(torch.empty(_bytes(state), 1, dtype=torch.uint8, device="meta"))
    small = {p for p in module.parameters() if p.ndim < 2}
    fully_shard(module, mesh=mesh, offload_policy=policy, ignored_params=small)
    for layer, (own, state) in shards.items():
        full = layer.weight
        shape: Any = {"shape": full.shape, "stride": full.stride()}
        if isinstance(policy, CPUOffloadPolicy):
            own = own.cpu()
        layer.weight = _frozen(DTensor.from_local(own, mesh, [Shard(0)], run_check=False, **shape))
        layer.weight.quant_state = layer.quant_state = state
    # after that of fully_shard, which gathers
    module.register_forward_pre_hook(partial(_put_states, list(shards)))


def _put_states(layers: list[Any], *_: Any) -> None:
    for layer in layers:
        layer.weight.quant_state = layer.quant_state


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _bytes(state: Any) -> int:
    """The bytes of the codes of a whole weight."""
    return (int(state.shape.numel()) + 1) // 2
