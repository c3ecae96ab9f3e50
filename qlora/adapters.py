"""What is done to a model: put an adapter on, choose which are active, look without it.

The model keeps its class: `apply_lora` replaces the targeted linear layers by LoRALinear in
place, so Trainer, generate() and everything else go on working. An error leaves the model as it
was. Which layers a config means is in qlora.matching.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qlora.config import LoraConfig
from qlora.errors import UserError, did_you_mean
from qlora.eva import eva_start
from qlora.lora import LoRALinear, as_dense, computes_in, dense_weight, lora_layers
from qlora.matching import target_layers
from qlora.rebase import check_start, require_own_base, restore, start_from_weights

Model = TypeVar("Model", bound=nn.Module)


def apply_lora(
    model: Model,
    config: LoraConfig | None = None,
    *,
    adapter_name: str = "default",
    generator: torch.Generator | None = None,
    data: Sequence[Any] | None = None,
) -> Model:
    """Freeze `model` and add a trainable, active adapter to its targeted layers, in place.

    PiSSA, OLoRA and LoftQ read the weights from before quantization, one at a time, from where
    load_base found them, and all but LoftQ of one round change the base: see qlora.rebase.

    Args:
        generator: of A's first values; by default torch's global one.
        data: what EVA looks at, batches of input_ids and attention_mask (rows, length).

    Raises:
        UserError: a target matches nothing or no linear layer, the name is taken, or what
            init_lora_weights wants is not to be had.
    """
    config = config or LoraConfig()
    require_new_name(model, adapter_name)
    layers = {name: config.of(name) for name in target_layers(model, config)}
    check_start(model, layers)
    directions: dict[str, Tensor] = {}
    if config.init_lora_weights == "eva":
        with disable_adapter(model):
            config, directions = eva_start(model, config, layers, data)
        layers = {name: config.of(name) for name in directions}
    model.requires_grad_(False)
    for name, own in layers.items():
        layer = wrap(model, name)
        layer.add_adapter(adapter_name, own, generator=generator)
        if name in directions:
            layer.lora_A[adapter_name].data.copy_(directions[name])
        if own.starts_from_weights:
            start_from_weights(model, name, adapter_name, own, generator)
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
    require_own_base(model, f"adapter {adapter_name!r}")


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """The LoraConfig of each adapter on `model`, by name."""
    if not hasattr(model, "lora_configs"):
        model.lora_configs = {}  # type: ignore[assignment]  # a plain attribute, no parameter
    configs: dict[str, LoraConfig] = model.lora_configs  # type: ignore[assignment]
    return configs


def set_adapter(model: nn.Module, adapter_name: str | list[str]) -> None:
    """Make one adapter, or several whose changes add up, active and trainable; the rest rest."""
    names = known_adapters(model, adapter_name)
    for layer in lora_layers(model).values():
        layer.active_adapters = tuple(name for name in names if name in layer.lora_A)
        for name in layer.lora_A:
            for parameter in layer.parameters_of(name).values():
                parameter.requires_grad_(name in names)


def known_adapters(model: nn.Module, adapter_name: str | Iterable[str]) -> tuple[str, ...]:
    """The names given, all of which must be those of adapters on the model."""
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    known = adapter_configs(model)
    for name in names:
        if name not in known:
            raise UserError(
                f"no adapter {name!r} on the model, which has: {', '.join(known) or 'none'}."
                f"{did_you_mean(name, known)}"
            )
    return names


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that are active, each once."""
    layers = lora_layers(model).values()
    return tuple(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is its frozen base.

    One that was changed for its adapter has what was taken out of it beside it, in 16 bits.
    """
    layers = lora_layers(model).values()
    active = [layer.active_adapters for layer in layers]
    try:
        for layer in layers:
            layer.active_adapters = ()
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer.active_adapters = names


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str | None]) -> Iterator[None]:
    """Inside the block each row of a batch goes through its own adapter, or the base for None.

    The base sees all rows at once. Which adapters are active does not matter meanwhile.

    Raises:
        UserError: there is no such adapter; in the block: a batch has another number of rows.
    """
    known_adapters(model, [name for name in adapter_names if name is not None])
    require_own_base(model, "mixed_batch")
    layers = lora_layers(model).values()
    for name in filter(None, adapter_names):
        if any(name in layer.lora_magnitude_vector for layer in layers):
            raise UserError(f"adapter {name!r} is DoRA's, which cannot be mixed by rows")
    before = [layer.adapter_of_row for layer in layers]
    try:
        for layer in layers:
            layer.adapter_of_row = tuple(name or "" for name in adapter_names)
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            layer.adapter_of_row = names


# ---- merge, unmerge, take off ----


def merge_adapter(model: Model, adapter_names: str | Iterable[str] | None = None) -> Model:
    """Fold adapters, by default the active ones, into dense 16-bit weights, for speed.

    The 4-bit base stays as it is beside them, which costs memory: nothing is quantized again, and
    `unmerge_adapter` is exact. `set_adapter` and `disable_adapter` go on meaning what they mean,
    as merged weights are used while all that is in them is active. `model.train()` unmerges.

    Raises:
        UserError: there is no such adapter, some are merged already, or the model is in training.
    """
    names = _to_merge(model, adapter_names)
    if model.training:
        raise UserError(
            "the model is in training mode, in which adapters are kept apart from the base: call "
            "model.eval() before merge_adapter"
        )
    for layer in lora_layers(model).values():
        layer.merge(names)
    return model


def unmerge_adapter(model: Model) -> Model:
    """Undo `merge_adapter`, exactly.

    Raises:
        UserError: nothing is merged.
    """
    if not merged_adapters(model):
        raise UserError("no adapter is merged: there is nothing to unmerge")
    for layer in lora_layers(model).values():
        layer.unmerge()
    return model


def merged_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that are merged, each once."""
    layers = lora_layers(model).values()
    return tuple(dict.fromkeys(name for layer in layers for name in layer.merged_adapters))


def require_unmerged(model: nn.Module, adapter_name: str) -> None:
    """Refuse to change an adapter whose merged weight would then be another's."""
    if adapter_name in merged_adapters(model):
        raise UserError(f"adapter {adapter_name!r} is merged: unmerge_adapter first")


def merge_and_unload(model: Model, adapter_names: str | Iterable[str] | None = None) -> Model:
    """Make `model` a plain 16-bit one with these adapters, by default the active ones, folded in.

    Every 4-bit layer becomes a dense one, adapted or not, so that the model is one thing, and what
    `save_pretrained` writes is what merge_dequant.py does (which needs less memory, one tensor at a
    time). Other adapters are dropped.

    Raises:
        UserError: there is no such adapter.
    """
    names = _to_merge(model, adapter_names, again=True)
    for name, layer in lora_layers(model).items():
        weight = layer.merged(n for n in names if n in layer.lora_A)
        model.set_submodule(name, as_dense(layer.base_layer, weight), strict=True)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            weight = dense_weight(module).to(computes_in(module))
            model.set_submodule(name, as_dense(module, weight), strict=True)
    model.original_weights = None  # type: ignore[assignment]  # they are others now
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = False  # type: ignore[assignment]
    adapter_configs(model).clear()
    return model


def unload(model: Model) -> Model:
    """Take every adapter off: `model` is its frozen base again.

    Raises:
        UserError: the base was changed for its adapter, and the checkpoint to make it anew from is
            gone.
    """
    restore(model)
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.base_layer, strict=True)
    adapter_configs(model).clear()
    return model


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take one adapter off, and free its memory.

    Raises:
        UserError: there is no such adapter, or it is active or merged; or `unload` would raise.
    """
    known_adapters(model, adapter_name)
    require_unmerged(model, adapter_name)
    if adapter_name in active_adapters(model):
        raise UserError(
            f"adapter {adapter_name!r} is active: set_adapter another first, or unload to take all "
            "off"
        )
    restore(model)
    for name, layer in lora_layers(model).items():
        layer.remove_adapter(adapter_name)
        if not layer.lora_A:
            model.set_submodule(name, layer.base_layer, strict=True)
    del adapter_configs(model)[adapter_name]


def _to_merge(
    model: nn.Module, adapter_names: str | Iterable[str] | None, *, again: bool = False
) -> tuple[str, ...]:
    names = (
        active_adapters(model) if adapter_names is None else known_adapters(model, adapter_names)
    )
    if not names:
        raise UserError("no adapter is active: there is nothing to merge")
    merged = merged_adapters(model)
    if merged and not again:
        raise UserError(f"{', '.join(merged)} is merged already: unmerge_adapter first")
    return names


# ---- what is trained ----


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
    found: Counter[tuple[str, int, int, int, int]] = Counter()
    for name, layer in lora_layers(model).items():
        for adapter, lora_A in layer.lora_A.items():
            if lora_A.requires_grad:
                kind = name.rpartition(".")[2]
                size = sum(p.numel() for p in layer.parameters_of(adapter).values())
                found[kind, layer.out_features, layer.in_features, len(lora_A), size] += 1
    if found:
        print(f"{'layer':16}{'layers':>7}{'out x in':>15}{'rank':>6}{'trainable':>13}")
    for (kind, out_features, in_features, r, size), count in found.items():
        print(f"{kind:16}{count:7}{f'{out_features} x {in_features}':>15}{r:6}{count * size:13,}")
    trainable, total = trainable_parameters(model)
    print(f"trainable {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
