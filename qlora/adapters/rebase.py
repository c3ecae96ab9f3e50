"""Adapters that start from the base's weights, and the base they are trained over.

PiSSA, OLoRA, and LoftQ of several rounds subtract scaling * B' A' from the weight, and the 4-bit
base is quantized from the rest:

    codes = quantize(W - scaling * B' A')      A' (r, in) and B' (out, r) are `subtracted`

so that codes + scaling * B' A' is nearer to W than quantize(W). That sum is the model without its
adapter, and training learns the change scaling * (B A - B' A'). It is saved as a plain adapter of
rank 2r over the unchanged base and works everywhere as one, but for the difference between two
quantizations of a weight. Our loaders quantize W - scaling * B' A' again and recover the trained
function exactly (to the bit on one kind of device; another sums B' A' in another order, and a value
half-way between two codes may take the other).

W comes from the checkpoint, tensor by tensor, cast as loading casts it (`original_weights` of
`state_of(model)`, which load_base fills in). It is read again when the adapter is taken off, so the
old codes are not kept. A layer that is not quantized keeps W, as no rounded difference gives it
back. The model holds this one adapter, as others were trained over other codes.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapters.lora import Factors, LoRALinear, Rebased
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
from qlora.errors import UserError, some
from qlora.ops import nf4

# ---- checks ----


def check_start(model: nn.Module, layers: Mapping[str, LoraConfig]) -> None:
    """Raise if these layers cannot have the first values that the config asks for.

    Args:
        layers: those to be adapted, and what each is to get.

    Raises:
        UserError: it names every layer at fault.
    """
    modules = {name: plain(model.get_submodule(name)) for name in layers}
    config = next(iter(layers.values()), LoraConfig())
    init = config.init_lora_weights
    if init in (True, "gaussian"):
        return
    if others := [name for name, module in modules.items() if not is_linear(module)]:
        raise UserError(
            f"init_lora_weights={init!r} is for linear layers, which {some(others)} is not: give "
            "it an adapter of its own"
        )
    shapes = {name: matrix_shape(module) for name, module in modules.items()}
    if small := [
        f"{name} has r={layers[name].r} and is {shape}"
        for name, shape in shapes.items()
        if layers[name].r > min(shape)
    ]:
        raise UserError(
            f"init_lora_weights={init!r} takes at most as many directions as a layer has: "
            f"{some(small)}. Give a smaller r, or another to these layers with rank_pattern"
        )
    dense = [name for name, module in modules.items() if not is_quantized(module)]
    if init == "loftq" and dense:
        raise UserError(
            f"LoftQ makes up for quantization, and these layers are not quantized: {some(dense)}. "
            "Name them in exclude_modules"
        )
    if config.rebases:
        require_alone(model, f"init_lora_weights={init!r}")
    if config.starts_from_weights:
        require_originals(model, modules)


def require_alone(model: nn.Module, what: str) -> None:
    """Raise if there are adapters on a model whose base `what` is to change."""
    if names := _adapter_names(model):
        raise UserError(
            f"{what} changes the base, and {names} was made for it as it is: unload first, or load "
            "the base again"
        )


def require_own_base(model: nn.Module, what: str) -> None:
    """Raise if a model's base was changed for its adapter, which `what` does not allow."""
    if subtracted_parts(model):
        raise UserError(
            f"{what} wants the base as it was, and it was changed for adapter "
            f"{_adapter_names(model)} (PiSSA, OLoRA or LoftQ): unload that first"
        )


def require_originals(model: nn.Module, names: Iterable[str]) -> None:
    """Raise if a 4-bit layer's weight from before quantization is not available."""
    modules = {name: plain(model.get_submodule(name)) for name in names}
    shapes = {name: matrix_shape(m) for name, m in modules.items() if is_quantized(m)}
    originals = state_of(model).original_weights
    if shapes and originals is None:
        raise UserError(
            "the weights from before quantization are needed and not available: load the 16-bit "
            "model with load_base, which remembers where they are (a checkpoint that is 4-bit "
            "already has none)"
        )
    missing = [n for n, shape in shapes.items() if originals and originals.shape(n) != shape]
    if missing:
        raise UserError(
            f"the checkpoint does not hold the weights of {some(missing)} as this model has them: "
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
    """Give the new adapter of a layer its first values, and the layer the base that they need.

    Args:
        weight: the layer's `original_weight` (out, in).
    """
    pair, subtracted = _first_values(weight, config, _quant_of(layer.plain), generator)
    lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if pair[0].any():  # A = 0 and B = 0, of a weight of zeros, would not learn
        lora_A.copy_(pair[0])
        lora_B.copy_(pair[1])
    if subtracted is not None:
        # in the adapter's dtype, so that what is saved is what was subtracted
        base_A, base_B = (t.to(lora_A.dtype) for t in subtracted)
        rebase(layer, weight, Factors(base_A, base_B, config.scaling))


def _first_values(
    weight: Tensor, config: LoraConfig, quant: QuantConfig, generator: torch.Generator | None
) -> tuple[Pair, Pair | None]:
    """A and B to start with, and A' and B' that the base is quantized without."""
    r, scaling = config.r, config.scaling
    if config.init_lora_weights == "loftq":
        rounds = config.loftq_iter
        return loftq(weight, r, scaling, lambda w: nf4.round_trip(w, quant), iterations=rounds)
    if config.init_lora_weights == "olora":
        pair = olora(weight, r)
    else:
        pair = pissa(weight, r, scaling, niter=config.pissa_niter, generator=generator)
    return pair, pair


# ---- the base ----


@torch.no_grad()
def rebase(layer: LoRALinear, weight: Tensor, subtracted: Factors | None) -> None:
    """Give `layer` the base of its original `weight` (out, in) without what is `subtracted`."""
    base = layer.plain
    subtracted = subtracted and subtracted.to(weight.device)
    rest = weight if subtracted is None else weight.float() - subtracted.change(weight)
    if is_quantized(base):
        packed, state = nf4.quantize(rest, _quant_of(base))
        state.dtype = base.weight.quant_state.dtype  # that of dequantized weights
        base.weight.data = packed
        base.weight.quant_state = base.quant_state = state
        original = None
    else:
        original = layer.rebased.original if layer.rebased else base.weight.detach().clone()
        base.weight.copy_(rest.T if was_conv1d(base) else rest)
    layer.rebased = None
    if subtracted is not None:
        lora_A, lora_B = (t.detach().clone() for t in subtracted[:2])
        layer.rebased = Rebased(Factors(lora_A, lora_B, subtracted.scaling), original)


def original_weight(model: nn.Module, name: str) -> Tensor:
    """The weight (out, in) that layer `name` was loaded with, on its device."""
    module = model.get_submodule(name)
    base, originals = plain(module), state_of(model).original_weights
    if originals is not None and is_quantized(base):
        return originals.read(name).to(base.weight.device)
    layers = (wrapper for wrapper in wrappers(module) if isinstance(wrapper, LoRALinear))
    original = next((layer.rebased.original for layer in layers if layer.rebased), None)
    if original is None:
        return dense_weight(base)
    return (original.T if was_conv1d(base) else original).float()


def subtracted_parts(model: nn.Module) -> dict[str, Factors]:
    """What the bases of layers were changed by, for an adapter; empty for a base as loaded."""
    layers = _linear_layers(model).items()
    return {name: layer.rebased.subtracted for name, layer in layers if layer.rebased}


def set_bases(model: nn.Module, subtracted: Mapping[str, Factors]) -> None:
    """Quantize every adapted layer without its `subtracted` part, or as loaded if it has none."""
    current = subtracted_parts(model)
    for name, layer in _linear_layers(model).items():
        if not _same(current.get(name), subtracted.get(name)):
            rebase(layer, original_weight(model, name), subtracted.get(name))


def restore(model: nn.Module) -> None:
    """Give every layer the base it was loaded with.

    Raises:
        UserError: the weights from before quantization are no longer available.
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


def _adapter_names(model: nn.Module) -> str:
    return ", ".join(dict.fromkeys(n for _, wrapper in adapted(model) for n in wrapper.adapters))


def _quant_of(layer: Any) -> QuantConfig:
    """The settings of a 4-bit layer; the defaults for another, which has none."""
    if not is_quantized(layer):
        return QuantConfig()
    state = layer.weight.quant_state
    return QuantConfig(state.quant_type, state.blocksize, bool(state.nested))
