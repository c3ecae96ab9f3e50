"""Finds the layers of a model that can compute together (qlora.fast_layers), by looking at a run.

A few tokens go through the model once, and each layer's input and output is noted. Layers of one
module that are called one after another with the same tensor share their input. A module is a gated
MLP when gate and up get what it gets, it gives what down gives, and what down gets is
act(gate(x)) * up(x) with one of the activations there are, of large values too. So it does not
matter what a class is called, or how its source reads; what is not recognised computes layer by
layer.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby, permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora.adapter_module import base_modules, plain, put_module, take_wrappers_off, wrappers
from qlora.fast_layers import MLPBlock, SharedInput, why_plain
from qlora.frozen import computes_in
from qlora.gated import ACTS, gated_forward
from qlora.lora import LoRALayer, LoRALinear, lora_layers

FEW_TOKENS = 8
LARGE = 200.0  # its square is a number in fp16, too


class _Call(NamedTuple):
    """A module's only call."""

    x: Tensor
    y: Tensor


def use_fast_path(model: Any, *, recompute: bool = False) -> None:
    """Let the layers of `model` with adapters compute by functions of our own; in place.

    Prints one line where some take the plain way. The numbers are the same either way.

    Args:
        recompute: activations are made again for the backward pass (gradient checkpointing), so
            that a block need not keep them.
    """
    take_fast_path_off(model)
    layers = lora_layers(model)
    seen = _seen(model, layers.values())
    read = [call.x for call in seen.values()]
    for group in _groups(layers, seen):
        shared = SharedInput(group)
        for layer in group:
            layer.fast = shared
    for name, module in base_modules(model).items():
        block = _mlp(name, module, layers, seen)
        if block is not None:
            # what a norm reads, as Gemma's does, is made again in any case, so keep what it is of
            is_read = any(x is seen[module].y for x in read)
            block.recompute = recompute and not is_read
            put_module(model, name, block)
    _say_what_is_plain(layers, seen)


def take_fast_path_off(model: nn.Module) -> None:
    """Let every layer, and the model's own MLPs, compute by themselves."""
    for layer in lora_layers(model).values():
        if isinstance(layer, LoRALinear):
            layer.fast = None
    take_wrappers_off(model, lambda wrapper: isinstance(wrapper, MLPBlock))


def _groups(
    layers: dict[str, LoRALayer], seen: dict[nn.Module, _Call]
) -> Iterator[list[LoRALinear]]:
    """Layers of one parent that were called one after another with the same tensor, or one."""
    names = {layer: name for name, layer in layers.items() if isinstance(layer, LoRALinear)}
    called = [layer for layer in seen if layer in names]
    for _, group in groupby(called, lambda layer: (_parent(names[layer]), id(seen[layer].x))):
        yield list(group)
    yield from ([layer] for layer in names if layer not in seen)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _mlp(
    name: str, module: nn.Module, layers: dict[str, LoRALayer], seen: dict[nn.Module, _Call]
) -> MLPBlock | None:
    """`module` as one function, if it is a gated MLP of three layers with adapters."""
    own = [layer for layer_name, layer in layers.items() if _parent(layer_name) == name]
    call = seen.get(module)
    if call is None or len(own) != 3 or any(layer not in seen for layer in own):
        return None
    inside = {part for layer in own for wrapper in wrappers(layer) for part in wrapper.modules()}
    others = [part for part in plain(module).modules() if part not in inside][1:]
    activation = _activation(others[0]) if len(others) == 1 else None
    for gate, up, down in permutations(own):
        is_shaped = seen[gate].x is call.x is seen[up].x and seen[down].y is call.y
        if activation and is_shaped:
            h = gated_forward(seen[gate].y, seen[up].y, activation)
            # theirs rounds the activation too
            close = 4 * torch.finfo(h.dtype).eps * h.norm()
            block = MLPBlock(module, (gate, up, down), activation)
            if (h - seen[down].x).norm() <= close and _is_so_of_large_values(block, call.x):
                return block
    return None


@torch.no_grad()
def _is_so_of_large_values(block: MLPBlock, x: Tensor) -> bool:
    """Whether the module computes the same where gate and up give large values, and in training:
    some bound the former (DeepSeek-V4), or drop out."""
    module, (gate, up, down) = plain(block), block.layers
    shape = (*x.shape[:-1], gate.shape[0])
    given = torch.linspace(-LARGE, LARGE, math.prod(shape)).to(x).view(shape)
    instead = {gate: given, up: given.flip(-1)}
    calls: list[_Call] = []
    hooks = [layer.register_forward_hook(lambda layer, *_: instead[layer]) for layer in instead]
    hooks.append(down.register_forward_hook(lambda _, args, y: calls.append(_Call(args[0], y))))
    was_training, module.training = module.training, True
    try:
        y = module(x)
    finally:
        module.training = was_training
        for hook in hooks:
            hook.remove()
    if not calls or y is not calls[0].y:
        return False
    h = gated_forward(instead[gate], instead[up], block.activation)
    close = 4 * torch.finfo(h.dtype).eps * h.float().norm()  # which is too large for fp16
    return bool((h.float() - calls[0].x.float()).norm() <= close)


def _activation(module: nn.Module) -> str | None:
    """Which of the known ones it is."""
    if next(module.parameters(), None) is not None:
        return None
    grid = torch.linspace(-8, 8, 1025)
    y = module(grid)
    for name in ACTS:
        wanted = gated_forward(grid, torch.ones_like(grid), name)
        if isinstance(y, Tensor) and y.shape == grid.shape and (y - wanted).abs().max() < 1e-6:
            return name
    return None


@torch.no_grad()
def _seen(model: Any, layers: Iterable[nn.Module]) -> dict[nn.Module, _Call]:
    """The calls of `layers` and of the base's modules, in their order, of those that were called
    once with one tensor."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return {}
    calls: dict[nn.Module, list[_Call]] = {}

    def note(module: nn.Module, args: Any, y: Any) -> None:
        if len(args) == 1 and isinstance(y, Tensor):
            calls.setdefault(module, []).append(_Call(args[0], y))

    ids = torch.arange(FEW_TOKENS, device=model.device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    watched = {*layers, *base_modules(model).values()}
    hooks = [module.register_forward_hook(note) for module in watched]
    was_training = model.training
    try:
        model.eval()
        model.base_model(**inputs)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return {module: found[0] for module, found in calls.items() if len(found) == 1}


def _say_what_is_plain(layers: dict[str, LoRALayer], seen: dict[nn.Module, _Call]) -> None:
    reasons = Counter(
        reason for layer in layers.values() if (reason := why_plain(layer) or _dtypes(layer, seen))
    )
    for reason, count in reasons.items():
        print(f"{count} of {len(layers)} layers compute the plain way: {reason}")


def _dtypes(layer: LoRALayer, seen: dict[nn.Module, _Call]) -> str | None:
    """What stands against the functions about a layer's input."""
    dtype = computes_in(layer.base_layer)
    if layer in seen and seen[layer].x.dtype != dtype:
        return f"their input is {seen[layer].x.dtype}, and they compute in {dtype}"
    return None
