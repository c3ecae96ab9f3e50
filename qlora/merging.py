"""Adapters folded into the base, and taken off it: in memory, and always exact.

`merge_adapter` puts a dense 16-bit weight beside the codes: the 4-bit base is never quantized
again, so unmerging restores it bit for bit. (`qlora.merge` writes merged checkpoints, a tensor at a
time.)
"""

from collections.abc import Iterable
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from qlora.adapter_module import (
    adapted,
    adapter_modules,
    base_modules,
    plain,
    put_module,
    take_all_off,
    take_off,
)
from qlora.adapters import (
    Model,
    active_adapters,
    adapter_configs,
    known_adapters,
    require_one_owner,
)
from qlora.errors import UserError
from qlora.frozen import as_dense, computes_in, dense_weight, is_tied, output_head
from qlora.lora import lora_layers
from qlora.rebase import restore

OF_TASK = ("task", "heads", "labels", "pad_token_id")  # what a model is, whatever its weights are


def merge_adapter(model: Model, adapter_names: str | Iterable[str] | None = None) -> Model:
    """Fold adapters, by default the active ones, into dense 16-bit weights, for speed.

    The 4-bit base stays as it is beside them, which costs memory: nothing is quantized again, and
    `unmerge_adapter` is exact. `set_adapter` and `disable_adapter` go on meaning what they mean,
    as merged weights are used while all that is in them is active. `model.train()` unmerges.

    Raises:
        UserError: there is no such adapter, some are merged already, two of them cannot be active
            together, or the model is in training.
    """
    names = _to_merge(model, adapter_names)
    if model.training:
        raise UserError(
            "the model is in training mode, in which adapters are kept apart from the base: call "
            "model.eval() before merge_adapter"
        )
    for _, wrapper in adapted(model):
        wrapper.merge(names)
    return model


def unmerge_adapter(model: Model) -> Model:
    """Undo `merge_adapter`, exactly.

    Raises:
        UserError: nothing is merged.
    """
    if not merged_adapters(model):
        raise UserError("no adapter is merged: there is nothing to unmerge")
    for _, wrapper in adapted(model):
        wrapper.unmerge()
    return model


def merged_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that are merged, each once."""
    names = (name for _, wrapper in adapted(model) for name in wrapper.merged_adapters)
    return tuple(dict.fromkeys(names))


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
        UserError: there is no such adapter, two of them cannot be active together, or one has a
            lora_bias where the layer has none to add it to.
    """
    names = _to_merge(model, adapter_names, again=True)
    _require_biases(model, names)
    for name, module in base_modules(model).items():
        made = plain(module)
        for wrapper in reversed(list(adapter_modules(module))):
            made = wrapper.fold(made, names)
        if isinstance(made, Linear4bit):
            made = as_dense(made, dense_weight(made).to(computes_in(made)))
        if made is not module:
            put_module(model, name, made)
    _part(model)
    model.original_weights = None  # type: ignore[assignment]  # they are others now
    record: dict[str, Any] = getattr(model, "qlora_base", {})  # of another base, then
    kept = {key: record[key] for key in OF_TASK if key in record}
    model.qlora_base = kept  # type: ignore[assignment]
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
    take_all_off(model)
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
    take_off(model, adapter_name)
    del adapter_configs(model)[adapter_name]


def _to_merge(
    model: nn.Module, adapter_names: str | Iterable[str] | None, *, again: bool = False
) -> tuple[str, ...]:
    names = (
        active_adapters(model) if adapter_names is None else known_adapters(model, adapter_names)
    )
    if not names:
        raise UserError("no adapter is active: there is nothing to merge")
    require_one_owner(model, names)
    merged = merged_adapters(model)
    if merged and not again:
        raise UserError(f"{', '.join(merged)} is merged already: unmerge_adapter first")
    return names


def _require_biases(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse a lora_bias on layers without one: their class has none to save."""
    without = {
        n: layer
        for n, layer in lora_layers(model).items()
        if getattr(layer.plain, "bias", None) is None
    }
    for name in names:
        found = [n for n, layer in without.items() if name in layer.lora_bias]
        if found:
            raise UserError(
                f"adapter {name!r} has lora_bias, and {', '.join(found[:4])}"
                f"{', …' if len(found) > 4 else ''} have no bias to fold it into: use "
                "merge_adapter, which keeps it beside the layer"
            )


def _part(model: nn.Module) -> None:
    """Where a head and its embedding were one tensor and are two now, say so; or tie them again."""
    if not is_tied(model):
        return
    head, embedding = output_head(model), model.get_input_embeddings()  # type: ignore[operator]
    if head.weight is embedding.weight:
        return
    if head.weight.shape == embedding.weight.shape and torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
        return
    config: Any = model.config
    config.tie_word_embeddings = False
    config.get_text_config(decoder=True).tie_word_embeddings = False
