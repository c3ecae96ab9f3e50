"""Adapters that start from the base's own weights, and the base that is left to them.

PiSSA, OLoRA, and LoftQ of several rounds take scaling * B' A' out of the weight, and the 4-bit base
is made of the rest:

    codes = quantize(W - scaling * B' A')      `taken` out of the base are A' (r, in), B' (out, r)

so that codes + scaling * B' A' is nearer to W than quantize(W) is. That sum is what the model is
without its adapter, and what training then learns is the change scaling * (B A - B' A'). This makes
it an adapter like any other, of rank 2r, over the base as it was: saved so, it works everywhere,
but for the difference between two quantizations of one weight. Who knows of `taken` makes the codes
anew, and has the very function that was trained (to the bit on one kind of device; another adds up
B' A' in another order, and a value half-way between two codes may take the other).

W comes from the model's checkpoint, tensor by tensor (`state_of(model).original_weights`, which
load_base fills in), as loading cast it. It is read again when the adapter is taken off, so nothing
is kept of the old codes. A layer that is not quantized keeps W beside
W - scaling * B' A', as no rounded difference gives W back.

Such a model holds this one adapter: others were trained over other codes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapters.lora import Factors, LoRALinear
from qlora.adapters.starts import Pair, loftq, olora, pissa
from qlora.adapters.wrappers import adapted, plain, wrappers
from qlora.base.modules import (
    dense_weight,
    is_linear,
    is_quantized,
    matrix_shape,
    state_of,
    was_conv1d,
)
from qlora.config import LoraConfig, QuantConfig
from qlora.errors import UserError
from qlora.ops import nf4

# ---- whether it can be ----


def check_start(model: nn.Module, layers: Mapping[str, LoraConfig]) -> None:
    """Refuse a start of A and B that these layers cannot have, before anything is changed.

    Args:
        layers: those to be adapted, and what each is to get.

    Raises:
        UserError: it names every layer at fault.
    """
    if not layers:  # only parameters, which have no other start than the usual
        return
    modules = {name: plain(model.get_submodule(name)) for name in layers}
    config = next(iter(layers.values()))
    init = config.init_lora_weights
    if init in (True, "gaussian"):
        return
    others = [name for name, module in modules.items() if not is_linear(module)]
    if others:
        raise UserError(
            f"init_lora_weights={init!r} is for linear layers, which {_some(others)} is not: give "
            "it an adapter of its own"
        )
    small = [
        f"{name} has r={layers[name].r} and is {matrix_shape(module)}"
        for name, module in modules.items()
        if layers[name].r > min(matrix_shape(module))
    ]
    if small:
        raise UserError(
            f"init_lora_weights={init!r} takes at most as many directions as a layer has: "
            f"{_some(small)}. Give a smaller r, or another to these layers with rank_pattern"
        )
    dense = [name for name, module in modules.items() if not is_quantized(module)]
    if init == "loftq" and dense:
        raise UserError(
            f"LoftQ makes up for quantization, and these layers are not quantized: {_some(dense)}. "
            "Name them in exclude_modules"
        )
    if config.rebases:
        require_alone(model, f"init_lora_weights={init!r}")
    if config.starts_from_weights:
        require_originals(model, modules)


def require_alone(model: nn.Module, what: str) -> None:
    """Refuse `what`, which changes the base, while there are adapters on it."""
    if names := _adapter_names(model):
        raise UserError(
            f"{what} changes the base, and {', '.join(names)} was made for it as it is: unload "
            "first, or load the base again"
        )


def require_own_base(model: nn.Module, what: str) -> None:
    """Refuse `what` on a model whose base was changed for the adapter it has."""
    if subtracted_parts(model):
        raise UserError(
            f"{what} wants the base as it was, and it was changed for adapter "
            f"{', '.join(_adapter_names(model))} (PiSSA, OLoRA or LoftQ): unload that first"
        )


def require_originals(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse 4-bit layers whose weights from before quantization are not at hand."""
    modules = {name: plain(model.get_submodule(name)) for name in names}
    coded = {name: module for name, module in modules.items() if is_quantized(module)}
    originals = state_of(model).original_weights
    if coded and originals is None:
        raise UserError(
            "the weights from before quantization are needed and not at hand: load the 16-bit "
            "model with load_base, which remembers where they are (a checkpoint that is 4-bit "
            "already has none)"
        )
    missing = [
        name for name in coded if originals and originals.shape(name) != matrix_shape(coded[name])
    ]
    if missing:
        raise UserError(
            f"the checkpoint does not hold the weights of {_some(missing)} as this model has them: "
            "is it the one that the model was loaded from?"
        )


# ---- the start ----


@torch.no_grad()
def start_from_weights(
    layer: LoRALinear,
    weight: Tensor,
    adapter_name: str,
    config: LoraConfig,
    generator: torch.Generator | None = None,
) -> None:
    """Give the new adapter of a layer its first values, and the layer the base they want.

    Args:
        weight: the layer's `original_weight` (out, in).
    """
    pair, taken = _first_values(weight, config, _quant_of(layer.plain), generator)
    lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if pair[0].any():  # else there is nothing to make up for, and A = 0, B = 0 would not learn
        lora_A.copy_(pair[0])
        lora_B.copy_(pair[1])
    if taken is not None:
        # in the adapter's dtype: what is saved of it, and what was taken out, are the same
        taken_A, taken_B = (t.to(lora_A.dtype) for t in taken)
        rebase(layer, weight, Factors(taken_A, taken_B, config.scaling))


def _first_values(
    weight: Tensor, config: LoraConfig, quant: QuantConfig, generator: torch.Generator | None
) -> tuple[Pair, Pair | None]:
    """A and B to start with, and A' and B' that are taken out of the base."""
    r, scaling = config.r, config.scaling
    if config.init_lora_weights == "loftq":

        def quantize(weight: Tensor) -> Tensor:
            return nf4.round_trip(weight, quant)

        return loftq(weight, r, scaling, quantize, iterations=config.loftq_iter)
    if config.init_lora_weights == "olora":
        pair = olora(weight, r)
    else:
        pair = pissa(weight, r, scaling, niter=config.pissa_niter, generator=generator)
    return pair, pair


# ---- the base ----


@torch.no_grad()
def rebase(layer: LoRALinear, weight: Tensor, taken: Factors | None) -> None:
    """Make the base of `layer` anew, of its original `weight` (out, in) without `taken`."""
    base = layer.plain
    taken = taken and taken.to(weight.device)
    rest = weight if taken is None else weight.float() - taken.change(weight)
    if is_quantized(base):
        packed, state = nf4.quantize(rest, _quant_of(base))
        state.dtype = base.weight.quant_state.dtype  # what the codes are turned into
        base.weight.data = packed
        base.weight.quant_state = base.quant_state = state
    elif taken is None:
        base.weight.copy_(layer.whole)
        layer.whole = None
    else:
        layer.whole = base.weight.detach().clone() if layer.whole is None else layer.whole
        base.weight.copy_(rest.T if was_conv1d(base) else rest)
    layer.taken = taken


def original_weight(model: nn.Module, name: str) -> Tensor:
    """The weight (out, in) that layer `name` was loaded with, on its device."""
    module = model.get_submodule(name)
    layers = (wrapper for wrapper in wrappers(module) if isinstance(wrapper, LoRALinear))
    base, whole = plain(module), next((layer.whole for layer in layers), None)
    originals = state_of(model).original_weights
    if originals is not None and is_quantized(base):
        return originals.read(name).to(base.weight.device)
    if whole is None:
        return dense_weight(base)
    return (whole.T if was_conv1d(base) else whole).float()


def subtracted_parts(model: nn.Module) -> dict[str, Factors]:
    """Of layers whose base was changed for an adapter, what was taken out of it."""
    found = {name: layer.taken for name, layer in _linear_layers(model).items()}
    return {name: taken for name, taken in found.items() if taken is not None}


def set_bases(model: nn.Module, wanted: Mapping[str, Factors]) -> None:
    """Every adapted layer's base without what is `wanted` out of it, and all others as loaded."""
    there = subtracted_parts(model)
    for name, layer in _linear_layers(model).items():
        if not _same(there.get(name), wanted.get(name)):
            rebase(layer, original_weight(model, name), wanted.get(name))


def restore(model: nn.Module) -> None:
    """Give every layer the base it was loaded with.

    Raises:
        UserError: the weights from before quantization are no longer there.
    """
    require_originals(model, subtracted_parts(model))
    set_bases(model, {})


def _same(one: Factors | None, other: Factors | None) -> bool:
    if one is None or other is None:
        return one is other
    pairs = zip(one[:2], other[:2], strict=True)
    return all(torch.equal(a.cpu().float(), b.cpu().float()) for a, b in pairs)


def _linear_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in adapted(model) if isinstance(module, LoRALinear)}


def _adapter_names(model: nn.Module) -> list[str]:
    """The adapters on `model`, each once."""
    return list(dict.fromkeys(n for _, wrapper in adapted(model) for n in wrapper.adapters))


def _quant_of(layer: Any) -> QuantConfig:
    """How a 4-bit layer is quantized; anything, for one that is not."""
    if not is_quantized(layer):
        return QuantConfig()
    state = layer.weight.quant_state
    return QuantConfig(state.quant_type, state.blocksize, bool(state.nested))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
