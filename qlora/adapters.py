"""What is done to a model: put an adapter on, choose which are active, look without it.

The model keeps its class: `apply_lora` replaces the targeted linear layers by LoRALinear in
place, so Trainer, generate() and everything else go on working. An error leaves the model as it
was. Which layers a config means is in qlora.matching.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from qlora.config import LoraConfig
from qlora.errors import UserError, did_you_mean
from qlora.lora import LoRALinear, lora_layers
from qlora.matching import target_layers

Model = TypeVar("Model", bound=nn.Module)


def apply_lora(
    model: Model,
    config: LoraConfig | None = None,
    *,
    adapter_name: str = "default",
    generator: torch.Generator | None = None,
) -> Model:
    """Freeze `model` and add a trainable, active adapter to its targeted layers, in place.

    Args:
        generator: of A's first values; by default torch's global one.

    Raises:
        UserError: a target matches nothing or no linear layer, or the name is taken.
    """
    config = config or LoraConfig()
    require_new_name(model, adapter_name)
    names = target_layers(model, config)
    model.requires_grad_(False)
    for name in names:
        wrap(model, name).add_adapter(adapter_name, config.of(name), generator=generator)
    adapter_configs(model)[adapter_name] = config
    set_adapter(model, adapter_name)
    return model


def wrap(model: nn.Module, name: str) -> LoRALinear:
    """The LoRALinear at `name`, put around the linear layer there if it is not one yet."""
    layer: Any = model.get_submodule(name)
    if isinstance(layer, LoRALinear):
        return layer
    wrapped = LoRALinear(layer)
    wrapped.train(layer.training)
    model.set_submodule(name, wrapped, strict=True)
    return wrapped


def require_new_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that is taken, or cannot be a key of a ParameterDict and a folder's name."""
    if not re.fullmatch(r"[\w-]+", adapter_name) or hasattr(nn.ParameterDict, adapter_name):
        raise UserError(
            f"adapter_name must be letters, digits, - and _, and no word that torch keeps for "
            f"itself, got {adapter_name!r}"
        )
    if adapter_name in adapter_configs(model):
        raise UserError(f"the model already has an adapter {adapter_name!r}: choose another name")


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """The LoraConfig of each adapter on `model`, by name."""
    if not hasattr(model, "lora_configs"):
        model.lora_configs = {}  # type: ignore[assignment]  # a plain attribute, no parameter
    configs: dict[str, LoraConfig] = model.lora_configs  # type: ignore[assignment]
    return configs


def set_adapter(model: nn.Module, adapter_name: str | list[str]) -> None:
    """Make one adapter, or several whose changes add up, active and trainable; the rest rest."""
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    known = adapter_configs(model)
    for name in names:
        if name not in known:
            raise UserError(
                f"no adapter {name!r} on the model, which has: {', '.join(known) or 'none'}."
                f"{did_you_mean(name, known)}"
            )
    for layer in lora_layers(model).values():
        layer.active_adapters = tuple(name for name in names if name in layer.lora_A)
        for name in layer.lora_A:
            layer.lora_A[name].requires_grad_(name in names)
            layer.lora_B[name].requires_grad_(name in names)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is its frozen base."""
    layers = lora_layers(model).values()
    active = [layer.active_adapters for layer in layers]
    try:
        for layer in layers:
            layer.active_adapters = ()
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer.active_adapters = names


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit weight counts all of its values, not its bytes."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += state.shape.numel() if state is not None else parameter.numel()
    return trainable, total


def print_trainable_parameters(model: nn.Module) -> None:
    """The trainable adapters by kind of layer, and in all.

    layer        layers       out x in  rank    trainable
    q_proj           30      576 x 576    16      552,960
    …
    trainable 4,884,480 of 139,399,488 parameters (3.50%)
    """
    found: Counter[tuple[str, int, int, int]] = Counter()
    for name, layer in lora_layers(model).items():
        for lora_A in layer.lora_A.values():
            if lora_A.requires_grad:
                kind = name.rpartition(".")[2]
                found[kind, layer.out_features, layer.in_features, len(lora_A)] += 1
    if found:
        print(f"{'layer':16}{'layers':>7}{'out x in':>15}{'rank':>6}{'trainable':>13}")
    for (kind, out_features, in_features, r), count in found.items():
        shape, size = f"{out_features} x {in_features}", count * r * (out_features + in_features)
        print(f"{kind:16}{count:7}{shape:>15}{r:6}{size:13,}")
    trainable, total = trainable_parameters(model)
    print(f"trainable {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
