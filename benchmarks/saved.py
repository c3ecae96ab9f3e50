"""Tensors that a forward pass saves for the backward pass, by decoder layer, dtype and shape.

`torch.autograd.graph.saved_tensors_hooks` reports every tensor that an operation saves. Tensors
that share memory count once, in the layer that saved the memory first; parameters and buffers do
not count. Checkpointing hides the tensors inside a layer: count without it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

OUTSIDE = -1


class Kept(NamedTuple):
    """A tensor that was saved."""

    layer: int
    """the number of the decoder layer, or OUTSIDE"""
    kind: str
    """dtype and shape"""
    nbytes: int
    """bytes of its storage"""


def saved_tensors(model: nn.Module, forward: Callable[[], Tensor]) -> list[Kept]:
    """The tensors that `forward` saves while it computes a loss; each storage once, in order."""
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Kept] = {}
    held: list[Tensor] = []  # so that no storage is reused
    current = [OUTSIDE]

    def pack(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in there and memory.data_ptr() not in found:
            kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            found[memory.data_ptr()] = Kept(current[0], kind, memory.nbytes())
            held.append(tensor.detach())
        return tensor

    hooks = []
    for number, layer in enumerate(decoder_layers(model)):
        hooks += [
            layer.register_forward_pre_hook(lambda *_, n=number: current.__setitem__(0, n)),
            layer.register_forward_hook(lambda *_: current.__setitem__(0, OUTSIDE)),
        ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The longest list of modules."""
    lists: Iterable[Any] = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    layers: Sequence[nn.Module] = max(lists, key=len)
    return layers


def summary(kept: Sequence[Kept]) -> dict[str, Any]:
    """Total bytes, bytes of the middle layer, and that layer's tensors: kind -> bytes."""
    layers = sorted({k.layer for k in kept if k.layer != OUTSIDE})
    middle = [k for k in kept if layers and k.layer == layers[len(layers) // 2]]
    kinds: Counter[str] = Counter()
    for one in middle:
        kinds[one.kind] += one.nbytes
    return {
        "all_bytes": sum(k.nbytes for k in kept),
        "layer_bytes": sum(kinds.values()),
        "layer": dict(kinds.most_common()),
    }
