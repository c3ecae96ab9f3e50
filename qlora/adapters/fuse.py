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
    remove_adapter,
    remove_wrappers,
)
from qlora.base.modules import as_dense, computes_in, dense_weight, is_tied, output_head, state_of
from qlora.config import LoraConfig
from qlora.errors import UserError, did_you_mean, require, some

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

    Raises:
        UserError: an adapter is unknown, one is fused already, two cannot be active together, or
            the model is in training.
    """
    names = _to_fuse(model, adapter_names)
    fused = fused_adapters(model)
    require(not fused, f"{', '.join(fused)} is merged already: unmerge_adapter first")
    require(not model.training, "the model is in training mode: call model.eval() first")
    for _, wrapper in adapted(model):
        wrapper.fuse(names)
    return model


def unmerge_adapter(model: Model) -> Model:
    """Undo `merge_adapter`, exactly. Raises UserError if nothing is fused."""
    require(fused_adapters(model) != (), "no adapter is merged: there is nothing to unmerge")
    for _, wrapper in adapted(model):
        wrapper.unfuse()
    return model


def fused_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that are fused, each once."""
    names = (name for _, wrapper in adapted(model) for name in wrapper.fused_adapters)
    return tuple(dict.fromkeys(names))


def require_unfused(model: nn.Module, adapter_name: str) -> None:
    """Refuse to change an adapter that is part of fused weights."""
    is_fused = adapter_name in fused_adapters(model)
    require(not is_fused, f"adapter {adapter_name!r} is merged: unmerge_adapter first")


def merge_and_unload(model: Model, adapter_names: str | Iterable[str] | None = None) -> Model:
    """Make `model` a plain 16-bit one that includes these adapters, by default the active ones.

    Every 4-bit layer becomes a dense one, adapted or not: `save_pretrained` writes what
    merge_dequant.py does, a tensor at a time in less memory. Other adapters are dropped.

    Raises:
        UserError: an adapter is unknown, two cannot be active together, or one has a lora_bias
            where the layer has no bias.
    """
    names = _to_fuse(model, adapter_names)
    _require_biases(model, names)
    for name, module in base_modules(model).items():
        fused = plain(module)
        for wrapper in reversed(list(adapter_modules(module))):
            fused = wrapper.fused(fused, names)
        if isinstance(fused, Linear4bit):
            fused = as_dense(fused, dense_weight(fused).to(computes_in(fused)))
        if fused is not module:
            put_module(model, name, fused)
    _untie(model)
    state_of(model).forget_base()
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = False  # type: ignore[assignment]
    adapter_configs(model).clear()
    return model


def unload(model: Model) -> Model:
    """Remove every adapter: `model` is its frozen base again.

    Raises UserError if the base was changed for its adapter, and its checkpoint is gone.
    """
    restore(model)
    remove_wrappers(model, lambda _: True)
    adapter_configs(model).clear()
    return model


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove one adapter. Raises UserError if it is unknown, active or fused, or as `unload`."""
    known_adapters(model, adapter_name)
    require_unfused(model, adapter_name)
    is_active, fix = adapter_name in active_adapters(model), "set_adapter another first, or unload"
    require(not is_active, f"adapter {adapter_name!r} is active: {fix}")
    restore(model)
    remove_adapter(model, adapter_name)
    del adapter_configs(model)[adapter_name]


def _to_fuse(model: nn.Module, adapter_names: str | Iterable[str] | None) -> tuple[str, ...]:
    """The adapters asked for, by default the active ones; at least one."""
    asked = active_adapters(model) if adapter_names is None else adapter_names
    names = known_adapters(model, asked)
    require(names != (), "no adapter is active: there is nothing to merge")
    require_one_owner(model, names)
    return names


def _require_biases(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse a lora_bias on layers without a bias: their class has none to save."""
    layers = lora_layers(model).items()
    without = {n: layer for n, layer in layers if getattr(layer.plain, "bias", None) is None}
    for name in names:
        unfit = [n for n, layer in without.items() if name in layer.lora_bias]
        why = f"adapter {name!r} has lora_bias, and {some(unfit)} have no bias to fold it into"
        require(not unfit, f"{why}: use merge_adapter, which keeps it beside the layer")


def _untie(model: nn.Module) -> None:
    """Set the config to untied where a head and its embedding differ now; else tie them again."""
    if not is_tied(model):
        return
    head, embedding = output_head(model), model.get_input_embeddings()  # type: ignore[operator]
    if torch.equal(head.weight, embedding.weight):  # False where the shapes differ
        head.weight = embedding.weight
    else:
        config: Any = model.config
        config.tie_word_embeddings = False
        config.get_text_config(decoder=True).tie_word_embeddings = False


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

    Raises:
        UserError: the name is taken, an adapter is missing, or the settings do not fit.
    """
    require_new_name(model, adapter_name)
    names = known_adapters(model, adapters)
    _check(names, weights, combination_type, svd_rank, density, majority_sign_method)
    for name in names:
        _require_only_matrices(model, name)
    way, weight_of = combination_type, dict(zip(names, weights, strict=True))

    def mix(tensors: list[Tensor], scales: list[float]) -> Tensor:
        pruned = [_pruned(tensor, way, density or 1.0, generator) for tensor in tensors]
        return _weighted_sum(pruned, scales, way, majority_sign_method)

    layers = {n: layer for n, layer in lora_layers(model).items() if {*names} & {*layer.lora_A}}
    ranks = {
        n: {a: len(layers[n].lora_A[a]) for a in names if a in layers[n].lora_A} for n in layers
    }
    for name, own in ranks.items():
        message = f"{way} wants adapters of one rank, at {name} they have {own}: take svd or cat"
        require(way.endswith(("cat", "svd")) or len({*own.values()}) == 1, message)
    r = svd_rank or max(max(own.values()) for own in ranks.values())
    combined = {}
    for name, own in ranks.items():
        combined[name] = _combined(layers[name], {a: weight_of[a] for a in own}, way, mix, r)
    r = max(len(factors.lora_A) for factors in combined.values())
    for name, factors in combined.items():
        dtype = next(iter(layers[name].lora_A.values())).dtype
        lora_A, lora_B = (t.to(dtype) for t in factors.padded(r)[:2])  # readers expect one rank
        layers[name].put_adapter(adapter_name, Factors(lora_A, lora_B, 1.0))
    dropout = adapter_configs(model)[names[0]].lora_dropout
    adapter_configs(model)[adapter_name] = LoraConfig(
        r=r, lora_alpha=r, lora_dropout=dropout, target_modules=tuple(combined)
    )
    return model


def _combined(layer: LoRALayer, weights: dict[str, float], way: str, mix: Mix, r: int) -> Factors:
    """The adapters of one layer, by their weights, as one in fp32 and of scaling 1."""
    parts = [layer.factors(name) for name in weights]
    if way in ("cat", "svd"):
        stacked = Factors.cat([*zip(parts, weights.values(), strict=True)])
        return stacked if way == "cat" else _low_rank_svd(stacked, r)
    if way.endswith("_svd"):
        return _svd(mix([layer.get_delta_weight(name) for name in weights], [*weights.values()]), r)
    scales = [w * part.scaling for w, part in zip(weights.values(), parts, strict=True)]
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    lora_A = mix([part.lora_A.float() for part in parts], signed)
    lora_B = mix([part.lora_B.float() for part in parts], roots)
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


def _low_rank_svd(stacked: Factors, r: int) -> Factors:
    """The best approximation of rank r of B A, which is never formed."""
    left, up = torch.linalg.qr(stacked.lora_B)  # (out, R) = (out, R) @ (R, R)
    right, down = torch.linalg.qr(stacked.lora_A.T)  # (in, R) = (in, R) @ (R, R)
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
    ways, prunes = get_args(Combination), way.startswith(("ties", "dare", "magnitude"))
    if not 0 < len(names) == len(weights):
        raise UserError(f"wanted a weight for each adapter, got {len(names)} and {len(weights)}")
    if len(set(names)) < len(names):
        raise UserError("an adapter is named twice: add up its weights")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"weights must be finite numbers, got {list(weights)}")
    if way not in ways:
        one_of = f"{', '.join(ways)}, got {way!r}.{did_you_mean(way, ways)}"
        raise UserError(f"combination_type must be one of {one_of}")
    if svd_rank is not None and (not way.endswith("svd") or svd_rank < 1):
        raise UserError(f"svd_rank is for the svd types, and above 0: got {svd_rank} for {way}")
    if prunes != (density is not None):
        needs = "needs one" if prunes else "takes none"
        raise UserError(f"density is for ties, dare and magnitude_prune: {way} {needs}")
    if density is not None and not 0 < density <= 1:
        raise UserError(
            f"density is the share of values kept, above 0 and at most 1: got {density}"
        )
    if signs not in get_args(Signs):
        raise UserError(f"majority_sign_method must be total or frequency, got {signs!r}")


def _require_only_matrices(model: nn.Module, name: str) -> None:
    """Refuse an adapter that is more than A and B of layers."""
    config = adapter_configs(model)[name]
    others = [n for n, w in adapted(model) if name in w.adapters and not isinstance(w, LoRALayer)]
    more = {
        "is DoRA's": config.use_dora,
        "has lora_bias": config.lora_bias,
        f"trains {some(others)} beside its A and B": others,
    }
    for part, is_so in more.items():
        require(not is_so, f"adapter {name!r} {part}, of which no weighted sum can be computed")
