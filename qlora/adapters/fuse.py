"""Fuse adapters into the base in memory, remove them, and combine several into a new one.

`merge_adapter` (PEFT's name) computes a dense 16-bit weight beside the 4-bit codes: the base is
never quantized again, so `unmerge_adapter` restores it bit for bit. (qlora.merge writes merged
checkpoints, a tensor at a time.)

`add_weighted_adapter` combines adapters in PEFT's ways:

    cat              A stacked, B side by side: the weighted sum of the changes, exactly
    svd              the best approximation of that sum in a rank of choice
    linear           sum of sqrt(weight) A times sum of sqrt(weight) B: cheap, with cross terms
    ties             linear, of the largest values only, where their signs agree (arXiv:2306.01708)
    dare_linear      linear, of random values, rescaled (arXiv:2311.03099); dare_ties: both
    magnitude_prune  linear, of the largest values only

and the last four with _svd: of the changes themselves, scaling * B A, then their svd.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qlora.adapters import wrappers
from qlora.adapters.apply import (
    Model,
    activate,
    active_adapters,
    adapter_configs,
    known_adapters,
    require_new_name,
    require_one_owner,
    wrap_followers,
)
from qlora.adapters.lora import Factors, LoRALayer, delta_weight, lora_layers
from qlora.adapters.rebase import restore
from qlora.base.modules import (
    as_dense,
    can_untie,
    computes_in,
    dense_weight,
    state_of,
    tied_modules,
)
from qlora.config import LoraConfig
from qlora.errors import did_you_mean, require, some

Combination = Literal[
    "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd",
    "dare_linear_svd", "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
Signs = Literal["total", "frequency"]
Mix = Callable[[list[Tensor], list[float]], Tensor]


# ---- fuse and remove ----


def merge_adapter(model: Model, adapter_names: str | Iterable[str] | None = None) -> Model:
    """Fuse adapters, by default the active ones, into dense 16-bit weights, for speed.

    The 4-bit base stays beside them, which costs memory. `set_adapter` and `disable_adapter` keep
    their meaning: fused weights are used while all that is in them is active. `model.train()`
    unfuses.

    Raises UserError if an adapter is unknown, one is fused already, two cannot be active together,
    or the model is in training.
    """
    names = _to_fuse(model, adapter_names)
    fused = fused_adapters(model)
    require(not fused, f"{', '.join(fused)} is merged already: unmerge_adapter first")
    require(not model.training, "the model is in training mode: call model.eval() first")
    for _, wrapper in wrappers.adapted(model):
        wrapper.fuse(names)
    return model


def unmerge_adapter(model: Model) -> Model:
    """Undo `merge_adapter`, exactly. Raises UserError if nothing is fused."""
    require(fused_adapters(model) != (), "no adapter is merged: there is nothing to unmerge")
    for _, wrapper in wrappers.adapted(model):
        wrapper.unfuse()
    return model


def fused_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that are fused, each once."""
    names = (name for _, wrapper in wrappers.adapted(model) for name in wrapper.fused_adapters)
    return tuple(dict.fromkeys(names))


def require_unfused(model: nn.Module, adapter_name: str) -> None:
    """Refuse to change an adapter that is part of fused weights."""
    is_fused = adapter_name in fused_adapters(model)
    require(not is_fused, f"adapter {adapter_name!r} is merged: unmerge_adapter first")


def merge_and_unload(model: Model, adapter_names: str | Iterable[str] | None = None) -> Model:
    """Make `model` a plain 16-bit one that includes these adapters, by default the active ones.

    Every 4-bit layer becomes a dense one, adapted or not: `save_pretrained` writes what
    merge_dequant.py does, a tensor at a time in less memory. Other adapters are dropped.

    Raises UserError if an adapter is unknown, two cannot be active together, or one has a lora_bias
    where the layer has no bias.
    """
    names = _to_fuse(model, adapter_names)
    for adapter in names:
        biased = {n: w.plain for n, w in lora_layers(model).items() if adapter in w.lora_bias}
        unfit = [n for n, layer in biased.items() if getattr(layer, "bias", None) is None]
        why = f"adapter {adapter!r} has lora_bias, and {some(unfit)} have no bias to fold it into"
        require(not unfit, f"{why}: use merge_adapter, which keeps it beside the layer")
    activate(model, names)  # sets config.vocab_size
    modules = wrappers.base_modules(model)
    tied = tied_modules({name: wrappers.plain(module) for name, module in modules.items()})
    for name, module in modules.items():
        fused = wrappers.plain(module)
        for wrapper in reversed(list(wrappers.adapter_modules(module))):
            fused = wrapper.fused(fused, names)
        if isinstance(fused, Linear4bit):
            fused = as_dense(fused, dense_weight(fused).to(computes_in(fused)))
        if fused is not module:
            wrappers.put_module(model, name, fused)
    for group in tied:
        _tie_or_untie(model, [model.get_submodule(name) for name in group])
    state_of(model).forget_base()
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = False  # type: ignore[assignment]
    adapter_configs(model).clear()
    return model


def _tie_or_untie(model: Any, modules: Sequence[Any]) -> None:
    """Let `modules`, which shared a weight, share it again where it is the same in all of them."""
    first, *others = modules
    is_same = all(torch.equal(first.weight, other.weight) for other in others)  # also in shape
    for other in others:
        weight = first.weight if is_same else nn.Parameter(other.weight.clone(), False)
        other.weight = weight
    if not is_same and can_untie(model.config):
        model.config.tie_word_embeddings = False
        model.config.get_text_config(decoder=True).tie_word_embeddings = False


def unload(model: Model) -> Model:
    """Remove every adapter: `model` is its frozen base again. Raises UserError if the base was
    changed for its adapter, and its checkpoint is gone."""
    restore(model)
    activate(model, ())
    wrappers.remove_wrappers(model, lambda _: True)
    adapter_configs(model).clear()
    return model


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove one adapter. Raises UserError if it is unknown, active or fused, or as `unload`."""
    known_adapters(model, adapter_name)
    require_unfused(model, adapter_name)
    message = f"adapter {adapter_name!r} is active: set_adapter another first, or unload"
    require(adapter_name not in active_adapters(model), message)
    restore(model)
    wrappers.remove_adapter(model, adapter_name)
    del adapter_configs(model)[adapter_name]


def _to_fuse(model: nn.Module, adapter_names: str | Iterable[str] | None) -> tuple[str, ...]:
    """The adapters asked for, by default the active ones; at least one."""
    asked = active_adapters(model) if adapter_names is None else adapter_names
    names = known_adapters(model, asked)
    require(names != (), "no adapter is active: there is nothing to merge")
    require_one_owner(model, names)
    return names


# ---- combine ----


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
        svd_rank: of the new adapter, for types that end in svd; by default the largest.
        density: share of the values that are kept, for ties, dare and magnitude_prune.
        majority_sign_method: of ties: signs are weighted by their values, or each counts as one.
        generator: of dare's choice; by default torch's global one.

    Raises UserError if the name is taken, an adapter is missing, or the settings do not fit.
    """
    require_new_name(model, adapter_name)
    way, names = combination_type, known_adapters(model, adapters)
    _check(model, names, weights, way, svd_rank, density, majority_sign_method)

    def mix(tensors: list[Tensor], scales: list[float]) -> Tensor:
        pruned = [_pruned(tensor, way, density or 1.0, generator) for tensor in tensors]
        return _weighted_sum(pruned, scales, way, majority_sign_method)

    weighted = dict(zip(names, weights, strict=True))
    layers, parts = lora_layers(model), {}
    for name, layer in layers.items():
        own = {a: layer.factors(a) for a in names if layer.parameters_of(a)}
        if not own:
            continue
        ranks = {a: len(factors.lora_A) for a, factors in own.items()}
        message = f"{way} wants adapters of one rank, at {name} they have {ranks}: take svd or cat"
        require(way.endswith(("cat", "svd")) or len({*ranks.values()}) == 1, message)
        parts[name] = [(factors, weighted[a]) for a, factors in own.items()]
    r = svd_rank or max(len(factors.lora_A) for own in parts.values() for factors, _ in own)
    combined = {name: _combined(own, way, mix, r) for name, own in parts.items()}
    r = max(len(factors.lora_A) for factors in combined.values())
    for name, factors in combined.items():
        dtype = next(iter(layers[name].lora_A.values())).dtype
        lora_A, lora_B = (t.to(dtype) for t in factors.padded(r)[:2])  # readers expect one rank
        layers[name].put_adapter(adapter_name, Factors(lora_A, lora_B, 1.0))
    wrap_followers(model, adapter_name)
    dropout = adapter_configs(model)[names[0]].lora_dropout
    adapter_configs(model)[adapter_name] = LoraConfig(
        r=r, lora_alpha=r, lora_dropout=dropout, target_modules=tuple(combined)
    )
    return model


def _combined(parts: Sequence[tuple[Factors, float]], way: str, mix: Mix, r: int) -> Factors:
    """The adapters of one layer, with their weights, as one in fp32 and of scaling 1."""
    if way == "cat":
        return Factors.cat(parts)
    if way == "svd":  # of the stacked B A (out, in), which is never formed
        stacked = Factors.cat(parts)
        left, up = torch.linalg.qr(stacked.lora_B)  # (out, R) = (out, R) @ (R, R)
        right, down = torch.linalg.qr(stacked.lora_A.T)  # (in, R) = (in, R) @ (R, R)
        core = _svd(up @ down.T, r)
        return Factors(core.lora_A @ right.T, left @ core.lora_B, 1.0)
    if way.endswith("_svd"):
        return _svd(mix([delta_weight(*f[:3]) for f, _ in parts], [w for _, w in parts]), r)
    scales = [weight * factors.scaling for factors, weight in parts]
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    lora_A = mix([factors.lora_A.float() for factors, _ in parts], signed)
    lora_B = mix([factors.lora_B.float() for factors, _ in parts], roots)
    return Factors(lora_A, lora_B, 1.0)


def _pruned(tensor: Tensor, way: str, density: float, generator: torch.Generator | None) -> Tensor:
    """A share of the values: of dare random ones, scaled up, of other ways the largest."""
    if density == 1:
        return tensor
    if way.startswith("dare"):
        drawn = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
        return tensor * drawn / density
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(tensor)


def _weighted_sum(tensors: list[Tensor], weights: list[float], way: str, signs: Signs) -> Tensor:
    """The sum of tensors of one shape; of ties, the mean of those that have the majority's sign."""
    stacked = torch.stack(tensors)  # (n, *shape)
    scaled = stacked * stacked.new_tensor(weights).view(-1, *[1] * tensors[0].ndim)
    if "ties" not in way:
        return scaled.sum(0)
    votes = stacked.sum(0) if signs == "total" else stacked.sign().sum(0)
    agree = stacked.sign() == torch.where(votes >= 0, 1, -1)
    return (scaled * agree).sum(0) / agree.sum(0).clamp_min(1)


def _svd(delta: Tensor, r: int) -> Factors:
    """The best approximation of rank r of `delta` (out, in)."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return Factors(vh[:r], u[:, :r] * s[:r], 1.0)


def _check(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    way: str,
    svd_rank: int | None,
    density: float | None,
    signs: str,
) -> None:
    ways, counts = get_args(Combination), f"{len(names)} and {len(weights)}"
    known = f"{', '.join(ways)}, got {way!r}.{did_you_mean(way, ways)}"
    is_rank = svd_rank is None or (way.endswith("svd") and svd_rank > 0)
    prunes = way.startswith(("ties", "dare", "magnitude"))
    needs = f"{way} {'needs one' if prunes else 'takes none'}"
    share = f"density is the share of values kept, above 0 and at most 1: got {density}"
    checks = {
        f"wanted a weight for each adapter, got {counts}": 0 < len(names) == len(weights),
        "an adapter is named twice: add up its weights": len(set(names)) == len(names),
        f"weights must be finite numbers, got {list(weights)}": all(map(math.isfinite, weights)),
        f"combination_type must be one of {known}": way in ways,
        f"svd_rank is for the svd types, and above 0: got {svd_rank} for {way}": is_rank,
        f"density is for ties, dare and magnitude_prune: {needs}": prunes == (density is not None),
        share: density is None or 0 < density <= 1,
        f"majority_sign_method must be total or frequency, got {signs!r}": signs in get_args(Signs),
    }
    for name in names:
        config, parts = adapter_configs(model)[name], wrappers.adapted(model)
        more = [n for n, w in parts if w.parameters_of(name) and not isinstance(w, LoRALayer)]
        why = "of which no weighted sum can be computed"
        checks |= {
            f"adapter {name!r} is DoRA's, {why}": not config.use_dora,
            f"adapter {name!r} has lora_bias, {why}": not config.lora_bias,
            f"adapter {name!r} trains {some(more)} beside its A and B, {why}": not more,
        }
    for message, holds in checks.items():
        require(holds, message)
