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
from torch.nn.modules.module import register_module_parameter_registration_hook

from qlora.errors import require
from qlora.ops.nf4 import as_bytes

# torch.distributed.fsdp and .tensor are imported where they are used: half a second of each start
ASYNC = "HF_DEACTIVATE_ASYNC_LOAD"  # of transformers


@contextmanager
def keeping_shards(*, offload: bool = False) -> Iterator[None]:
    """Cut each 4-bit weight that a module gets in this block, as of a model that is loaded in it,
    to the shard of this rank; with `offload` in host memory."""

    def cut(_: nn.Module, __: str, weight: Any) -> None:
        state = getattr(weight, "quant_state", None)
        if state is not None and as_bytes(weight.data).numel() == _bytes(state):
            own = as_bytes(weight.data).chunk(dist.get_world_size())
            rank = dist.get_rank()
            shard = own[rank] if rank < len(own) else own[0][:0]
            weight.data = torch.clone(shard.cpu() if offload else shard)

    hook = register_module_parameter_registration_hook(cut)
    before = os.environ.get(ASYNC)
    os.environ[ASYNC] = "1"  # else threads put a 4-bit checkpoint on the device before it is cut
    try:
        yield
    finally:
        hook.remove()
        os.environ.pop(ASYNC) if before is None else os.environ.update({ASYNC: before})


def shard_base(model: Any, *, offload: bool = False) -> None:
    """Shard all parameters of a frozen `model` over the ranks, in place.

    The model has been loaded within `keeping_shards`. `offload` keeps the shards of the decoder
    layers in pinned host memory, and copies each to the GPU before it is gathered.

    Raises:
        UserError: the family has no decoder layers of transformers' common class.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    fault = f"{type(model).__name__} has no decoder layers that transformers knows"
    require(bool(layers), f"{fault}, by which it would be sharded: use --sharding ddp")
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    pins = torch.cuda.is_available()
    policy = CPUOffloadPolicy(pin_memory=pins) if offload else OffloadPolicy()
    for layer in layers:
        _shard(layer, mesh, policy)
    _shard(model, mesh, OffloadPolicy())


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_base` has sharded the model."""
    return any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__)


def device_of(weight: Tensor) -> torch.device:
    """Where a layer computes: its weight's device, but for shards in host memory."""
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None or mesh.device_type == weight.device.type:
        return weight.device
    return torch.device(mesh.device_type, torch.cuda.current_device())


def _is_shard(parameter: Any) -> bool:
    return hasattr(parameter, "device_mesh")


def _shard(module: nn.Module, mesh: Any, policy: Any) -> None:
    """Make the parameters of `module` that are in no group yet a group."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
    from torch.distributed.tensor import DTensor, Shard

    shards: dict[Any, tuple[Tensor, Any]] = {}
    for layer in module.modules():
        weight: Any = getattr(layer, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None and not _is_shard(weight):
            shards[layer] = weight.data, state
            layer.weight = _frozen(torch.empty(_bytes(state), 1, dtype=torch.uint8, device="meta"))
    small = {p for p in module.parameters() if p.ndim < 2}
    fully_shard(module, mesh=mesh, offload_policy=policy, ignored_params=small)
    for layer, (own, state) in shards.items():
        full = layer.weight
        shape: Any = {"shape": full.shape, "stride": full.stride()}
        shard = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, **shape)  # on the GPU
        layer.weight = _frozen(shard.cpu() if isinstance(policy, CPUOffloadPolicy) else shard)
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
