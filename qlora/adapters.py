"""What is done to a model: put an adapter on, choose which are active, look without it.

The model keeps its class: `apply_lora` replaces the targeted linear layers by LoRALinear in
place, so Trainer, generate() and everything else go on working. An error leaves the model as it
was. Target names mean what they mean in PEFT: a list matches whole endings of the dotted name, a
single string is a regular expression over the full name, "all-linear" is every linear layer but
the output head. Unlike in PEFT, each entry must match something.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from qlora.config import ALL_LINEAR, LoraConfig
from qlora.errors import UserError, did_you_mean
from qlora.lora import LoRALinear, lora_layers, output_head

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
    names = target_layers(model, config.target_modules)
    model.requires_grad_(False)
    for name in names:
        wrap(model, name).add_adapter(adapter_name, config, generator=generator)
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
    """One line: `trainable 4,884,480 of 139,399,488 parameters (3.50%)`."""
    trainable, total = trainable_parameters(model)
    print(f"trainable {trainable:,} of {total:,} parameters ({trainable / total:.2%})")


def target_layers(model: nn.Module, target_modules: str | tuple[str, ...]) -> list[str]:
    """Names of the linear layers that `target_modules` means, in the model's order.

    Raises:
        UserError: an entry matches nothing, or only what is no linear layer.
    """
    head = output_head(model)
    modules = {
        name: module
        for name, module in model.named_modules()
        if not re.search(r"\.(base_layer|lora_[AB])(\.|$)", name)
    }
    linear = {n: m for n, m in modules.items() if isinstance(m, nn.Linear | LoRALinear)}
    targets = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    if targets == (ALL_LINEAR,):
        chosen = [name for name, module in linear.items() if module is not head]
        if not chosen:
            raise UserError(
                "all-linear found no linear layer in this model: name its layers as target_modules"
            )
        return chosen
    is_regex = isinstance(target_modules, str)
    if is_regex:
        _require_regex(targets[0])
    hits = {t: [n for n in modules if matches(n, t, is_regex=is_regex)] for t in targets}
    _require_hits(hits, set(linear))
    chosen_set = {name for found in hits.values() for name in found}
    return [name for name in linear if name in chosen_set]


def matches(name: str, target: str, *, is_regex: bool) -> bool:
    """PEFT's rule: a regular expression over the full name, or a whole ending of it."""
    if is_regex:
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith(f".{target}")


def _require_regex(target: str) -> None:
    try:
        re.compile(target)
    except re.error as error:
        raise UserError(
            f"target_modules {target!r} is no regular expression ({error}); "
            "for name endings give a list"
        ) from error


def _require_hits(hits: dict[str, list[str]], linear: set[str]) -> None:
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    missing = [target for target, found in hits.items() if not found]
    if missing:
        raise UserError(
            f"target_modules {', '.join(map(repr, missing))} matches no layer."
            f"{did_you_mean(missing[0], leaves)} This model has: {', '.join(leaves)}."
        )
    other = sorted({name for found in hits.values() for name in found} - linear)
    if other:
        raise UserError(
            f"target_modules matches what is no linear layer: {', '.join(other[:5])}"
            f"{' …' if len(other) > 5 else ''}. This model's linear layers: {', '.join(leaves)}."
        )
