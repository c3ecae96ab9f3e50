"""Adapters folded into the base, and taken off it: in memory, and always exact.

`merge_adapter` puts a dense 16-bit weight beside the codes: the 4-bit base is never quantized
again, so unmerging restores it bit for bit. (`qlora.merge.run` writes merged checkpoints, a tensor
at a time.)

A new adapter out of several: weighted sums of them, by PEFT's ways and under its names.

    cat              A's stacked, B's side by side: the weighted sum of the changes, exactly
    svd              the same sum in a rank of choice: its best approximation
    linear           sum of sqrt(weight) A times sum of sqrt(weight) B: cheap, with cross terms
    ties             linear, of the largest values only, where their signs agree (arXiv:2306.01708)
    dare_linear      linear, of random values, the others' size made up for (arXiv:2311.03099)
    dare_ties        both
    magnitude_prune  linear, of the largest values only

and the last four with _svd: the same done to the changes themselves, scaling * B A, and brought to
a rank of choice.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qlora.adapters.apply import (
    Model,
    active_adapters,
    adapter_configs,
    known_adapters,
    require_new_name,
    require_one_owner,
)
from qlora.adapters.lora import Factors, LoRALayer, lora_layers
from qlora.adapters.rebase import restore
from qlora.adapters.wrappers import (
    adapted,
    adapter_modules,
    base_modules,
    plain,
    put_module,
    take_all_off,
    take_off,
)
from qlora.base.modules import (
    as_dense,
    computes_in,
    dense_weight,
    is_tied,
    output_head,
    state_of,
)
from qlora.config import LoraConfig
from qlora.errors import UserError, did_you_mean


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
    state_of(model).forget_base()
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


Combination = Literal[
    "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd",
    "dare_linear_svd", "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
Signs = Literal["total", "frequency"]
Mix = Callable[[list[Tensor], list[float]], Tensor]


@torch.no_grad()
def add_weighted_adapter(
    model: Model,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: Combination = "svd",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: Signs = "total",
    *,
    generator: torch.Generator | None = None,
) -> Model:
    """A new adapter beside the others, frozen and not yet active.

    Args:
        svd_rank: rank of the new adapter, for svd and what ends in _svd; by default the largest.
        density: share of the values that are kept, above 0 and at most 1, for ties, dare and
            magnitude_prune.
        majority_sign_method: of ties: a sign weighs as much as its values, or each value alike.
        generator: of dare's choice; by default torch's global one.

    Raises:
        UserError: the name is taken, an adapter is not there, or the settings do not fit.
    """
    require_new_name(model, adapter_name)
    names = known_adapters(model, adapters)
    _check(names, weights, combination_type, svd_rank, density, majority_sign_method)
    configs = adapter_configs(model)
    for name in names:
        if configs[name].use_dora:
            raise UserError(f"adapter {name!r} is DoRA's, of which no weighted sum is made")
        if configs[name].lora_bias:
            raise UserError(f"adapter {name!r} has lora_bias, of which no weighted sum is made")
        other = [
            n for n, w in adapted(model) if name in w.adapters and not isinstance(w, LoRALayer)
        ]
        if other:
            raise UserError(
                f"adapter {name!r} trains {', '.join(other[:4])}{', …' if len(other) > 4 else ''} "
                "beside its A and B, of which no weighted sum is made"
            )
    layers = {
        name: {n: w for n, w in zip(names, weights, strict=True) if n in layer.lora_A}
        for name, layer in lora_layers(model).items()
    }
    layers = {name: parts for name, parts in layers.items() if parts}
    if combination_type != "cat" and not combination_type.endswith("svd"):
        _require_one_rank(model, layers, combination_type)
    mix = _mix(combination_type.removesuffix("_svd"), density, majority_sign_method, generator)
    r = svd_rank or _largest(model, names)
    made = {
        name: _combined(lora_layers(model)[name], parts, combination_type, mix, r)
        for name, parts in layers.items()
    }
    _put(model, made, configs[names[0]], adapter_name)
    return model


def _put(model: nn.Module, made: dict[str, Factors], like: LoraConfig, adapter_name: str) -> None:
    """The factors of each layer as an adapter on the model, of one rank: all readers of adapter
    files understand that."""
    r = max(len(factors.lora_A) for factors in made.values())
    layers = lora_layers(model)
    for name, factors in made.items():
        dtype = next(iter(layers[name].lora_A.values())).dtype
        lora_A, lora_B = (t.to(dtype) for t in factors.padded(r)[:2])
        layers[name].put_adapter(adapter_name, Factors(lora_A, lora_B, 1.0))
    adapter_configs(model)[adapter_name] = LoraConfig(
        r=r, lora_alpha=r, lora_dropout=like.lora_dropout, target_modules=tuple(made)
    )


def _combined(layer: LoRALayer, parts: dict[str, float], way: str, mix: Mix, r: int) -> Factors:
    """One layer's weighted adapters as one, in fp32 and of scaling 1."""
    found = [layer.factors(name) for name in parts]
    if way in ("cat", "svd"):
        stacked = Factors.cat([*zip(found, parts.values(), strict=True)])
        return stacked if way == "cat" else _low_rank_svd(stacked, r)
    if way.endswith("_svd"):
        return _svd(mix([layer.delta_weight(name) for name in parts], [*parts.values()]), r)
    each = [w * factors.scaling for w, factors in zip(parts.values(), found, strict=True)]
    roots = [math.sqrt(abs(w)) for w in each]
    signed = [math.copysign(root, w) for root, w in zip(roots, each, strict=True)]
    lora_A = mix([factors.lora_A.float() for factors in found], signed)
    lora_B = mix([factors.lora_B.float() for factors in found], roots)
    return Factors(lora_A, lora_B, 1.0)


# ---- ways to mix some tensors of one shape into one ----


def _mix(way: str, density: float | None, signs: Signs, generator: torch.Generator | None) -> Mix:
    def prune(tensor: Tensor) -> Tensor:
        if density is None or density == 1:
            return tensor
        if not way.startswith("dare"):
            return keep_largest(tensor, density)
        return keep_some(tensor, density, generator)

    def mix(tensors: list[Tensor], weights: list[float]) -> Tensor:
        stacked = torch.stack([prune(tensor) for tensor in tensors])
        scale = torch.tensor(weights, device=stacked.device).view(-1, *[1] * tensors[0].ndim)
        if not way.endswith("ties"):
            return (stacked * scale).sum(0)
        agree = agreeing(stacked, signs)
        return (stacked * scale * agree).sum(0) / agree.sum(0).clamp_min(1)

    return mix


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """The largest of its values, that share of them; zeros for the rest."""
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(tensor)


def keep_some(tensor: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
    """About that share of its values at random, divided by it; zeros for the rest."""
    drawn = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * drawn / density


def agreeing(stacked: Tensor, signs: Signs) -> Tensor:
    """Where each of some tensors (n, …) has the sign that most have: by size, or by count."""
    votes = stacked.sum(0) if signs == "total" else stacked.sign().sum(0)
    return stacked.sign() == torch.where(votes >= 0, 1, -1)


def _low_rank_svd(sum_: Factors, r: int) -> Factors:
    """The best approximation of rank r of B A, which is never formed."""
    left, up = torch.linalg.qr(sum_.lora_B)  # (out, R) = (out, R) @ (R, R)
    right, down = torch.linalg.qr(sum_.lora_A.T)  # (in, R) = (in, R) @ (R, R)
    core = _svd(up @ down.T, r)
    return Factors(core.lora_A @ right.T, left @ core.lora_B, 1.0)


def _svd(delta: Tensor, r: int) -> Factors:
    """The best approximation of rank r of `delta` (out, in)."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return Factors(vh[:r], u[:, :r] * s[:r], 1.0)


# ---- checks ----


def _check(
    names: Sequence[str],
    weights: Sequence[float],
    way: str,
    svd_rank: int | None,
    density: float | None,
    signs: str,
) -> None:
    if not names or len(names) != len(weights):
        raise UserError(f"wanted a weight for each adapter, got {len(names)} and {len(weights)}")
    if len(set(names)) < len(names):
        raise UserError("an adapter is named twice: add up its weights")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"weights must be finite numbers, got {list(weights)}")
    if way not in get_args(Combination):
        raise UserError(
            f"combination_type must be one of {', '.join(get_args(Combination))}, got {way!r}."
            f"{did_you_mean(way, get_args(Combination))}"
        )
    if svd_rank is not None and (not way.endswith("svd") or svd_rank < 1):
        raise UserError(
            f"svd_rank is the rank, above 0, of what ends in svd; got {svd_rank} for {way}"
        )
    prunes = way.startswith(("ties", "dare", "magnitude"))
    if prunes != (density is not None):
        raise UserError(
            f"density is the share of values that ties, dare and magnitude_prune keep: {way} "
            f"{'needs one' if prunes else 'takes none'}"
        )
    if density is not None and not 0 < density <= 1:
        raise UserError(f"density must be above 0 and at most 1, got {density}")
    if signs not in get_args(Signs):
        raise UserError(f"majority_sign_method must be total or frequency, got {signs!r}")


def _require_one_rank(model: nn.Module, layers: dict[str, dict[str, float]], way: str) -> None:
    for name, parts in layers.items():
        layer = lora_layers(model)[name]
        ranks = {adapter: len(layer.lora_A[adapter]) for adapter in parts}
        if len(set(ranks.values())) > 1:
            raise UserError(
                f"{way} wants adapters of one rank, at {name} they have "
                f"{', '.join(f'{r} ({adapter})' for adapter, r in ranks.items())}: take svd or cat"
            )


def _largest(model: nn.Module, names: Sequence[str]) -> int:
    """The largest rank that one of these adapters has."""
    layers = lora_layers(model).values()
    return max(
        len(layer.lora_A[name]) for layer in layers for name in names if name in layer.lora_A
    )
