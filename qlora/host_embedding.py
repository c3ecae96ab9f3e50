"""The frozen embedding in host memory, where the GPU reads the rows that it looks up.

An embedding is the only weight of which a step needs a few rows: tokens * dim * 2 bytes of 0.98 GiB
for Llama-3.1-8B. Pinned host memory has an address on the GPU too (CUDA's unified addressing), so
the weight becomes a CUDA tensor whose bytes lie there, made through __cuda_array_interface__. The
lookup's kernel then fetches its rows over PCIe: 64 MiB for 8,192 tokens, 3 ms at 25 GB/s, with no
copy of ids to the CPU, which would wait for the GPU. Nobody else notices: the module, its name, its
device and dtype, state dict and generate() are as before; resize_token_embeddings makes a weight on
the GPU again. It is loaded onto the GPU first, when activations do not need the room yet. torch
rounds pinned memory up to a power of two.

Left out: the output head, of which every chunk of tokens needs all rows, 1 GB over PCIe; and an
embedding that is trained, adapted or tied to the head, for the same reason.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapter_module import AdapterModule
from qlora.errors import UserError
from qlora.frozen import vocabulary
from qlora.offload import require_gpu


def offload_embedding(model: nn.Module) -> None:
    """Move the weight of `model`'s embedding to pinned host memory, in place, after its adapters
    were put on.

    Raises:
        UserError: there is no GPU, or more than rows of the embedding is needed in a step.
    """
    require_gpu("offload_embedding")
    if reason := _why_not(model):
        raise UserError(f"offload_embedding: {reason}: leave it out")
    embedding: Any = model.get_submodule(str(vocabulary(model)[0]))
    embedding.weight.data = in_host_memory(embedding.weight.data)


def _why_not(model: nn.Module) -> str | None:
    name, _ = vocabulary(model)
    embedding = None if name is None else model.get_submodule(name)
    if isinstance(embedding, AdapterModule):
        return f"{name} is trained or adapted, and then needed on the GPU"
    if not isinstance(embedding, nn.Embedding):
        return "this model has no embedding of tokens"
    weight = embedding.weight
    if weight.requires_grad:
        return f"{name} is trained, and then needed on the GPU"
    named = model.named_parameters(remove_duplicate=False)
    users = [own.rpartition(".")[0] for own, p in named if p is weight]
    others = [user for user in users if not isinstance(model.get_submodule(user), nn.Embedding)]
    if others:
        return f"{name} is tied to {', '.join(others)}, and then needed on the GPU"
    return None


def in_host_memory(weight: Tensor) -> Tensor:
    """`weight` as a CUDA tensor of the same values whose bytes are in pinned host memory."""
    host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True).copy_(weight)
    return torch.as_tensor(_Pinned(host), device=weight.device).view(weight.dtype)


class _Pinned:
    """Pinned memory by its address, which is the same on the GPU; alive as long as the tensor made
    of it."""

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.__cuda_array_interface__ = {
            "shape": (*host.shape[:-1], host.shape[-1] * host.element_size()),
            "typestr": "|u1",  # the interface has no bf16
            "data": (host.data_ptr(), False),
            "version": 3,
        }
