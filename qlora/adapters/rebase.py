"""Adapters that start from the base's weights, and the changed base that they are trained over.

PiSSA, OLoRA, and LoftQ of several iterations subtract scaling * B' A' from the weight W (out, in),
and the 4-bit base is quantized from the rest:

    codes = quantize(W - scaling * B' A')      A' (r, in) and B' (out, r) are `subtracted`

codes + scaling * B' A' is nearer to W than quantize(W). That sum is the model with its adapter
disabled, and training learns the change scaling * (B A - B' A'). qlora.adapters.files saves it as a
plain adapter of rank 2r. Loading quantizes W - scaling * B' A' again and recovers the trained
function to the bit on the same kind of device; another device sums B' A' in another order, so a
value half-way between two codes may take the other.

W is read from the checkpoint, tensor by tensor, cast as loading casts it (`original_weights` of
`state_of(model)`, set by load_base), and read again when the adapter is removed: the old codes are
not kept. A layer that is not quantized keeps W, which no rounded difference restores. The model
then holds this one adapter: others were trained over other codes.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapters.layers import lora_class
from qlora.adapters.lora import Factors, LoRALinear, Rebased
from qlora.adapters.starts import loftq, olora, pissa
from qlora.adapters.wrappers import adapted, plain, wrappers
from qlora.base.modules import dense_weight, is_quantized, matrix_shape, state_of, was_conv1d
from qlora.config import LoraConfig, QuantConfig
from qlora.errors import require, some
from qlora.ops import nf4

# ---- checks ----


def check_start(model: nn.Module, layers: Mapping[str, LoraConfig]) -> None:
    """Raise UserError if `layers`, with the config of each, do not support its init_lora_weights;
    all of them are named."""
    modules = {name: plain(model.get_submodule(name)) for name in layers}
    config = next(iter(layers.values()), LoraConfig())
    if config.init_lora_weights in (True, "gaussian"):
        return
    init = f"init_lora_weights={config.init_lora_weights!r}"
    others = [name for name, module in modules.items() if lora_class(module) is not LoRALinear]
    fix = "adapt these in another adapter"
    require(not others, f"{init} supports linear layers only, not {some(others)}: {fix}")
    shapes = {name: matrix_shape(module) for name, module in modules.items()}
    small = [name for name, shape in shapes.items() if layers[name].r > min(shape)]
    listed = some([f"{name} has r={layers[name].r} and is {shapes[name]}" for name in small])
    fix = "Give a smaller r, or one for these layers in rank_pattern"
    require(not small, f"{init} needs r of at most the smaller side of a layer: {listed}. {fix}")
    dense = [name for name, module in modules.items() if not is_quantized(module)]
    why = f"LoftQ compensates quantization, and these layers are not quantized: {some(dense)}"
    is_fit = config.init_lora_weights != "loftq" or not dense
    require(is_fit, f"{why}. Name them in exclude_modules")
    if config.rebases:
        require_alone(model, init)
    if config.starts_from_weights:
        require_originals(model, modules)


def require_alone(model: nn.Module, what: str) -> None:
    """Raise if the model has adapters: `what` changes the base that they were trained over."""
    names = ", ".join(state_of(model).lora_configs)
    why = f"{what} changes the base, and adapter {names} needs it unchanged"
    require(not names, f"{why}: unload first, or load the base again")


def require_unchanged_base(model: nn.Module, what: str) -> None:
    """Raise if the base was changed for the model's adapter: `what` needs it unchanged."""
    why = f"it was changed for adapter {', '.join(state_of(model).lora_configs)}"
    message = f"{what} needs the unchanged base, and {why} (PiSSA, OLoRA or LoftQ)"
    require(not subtracted_parts(model), f"{message}: unload that first")


def require_originals(model: nn.Module, names: Iterable[str]) -> None:
    """Raise if the weight from before quantization of a 4-bit layer is not available."""
    modules = {name: plain(model.get_submodule(name)) for name in names}
    shapes = {name: matrix_shape(m) for name, m in modules.items() if is_quantized(m)}
    originals = state_of(model).original_weights
    needed = "the weights from before quantization are needed and not available: load a 16-bit"
    is_read = originals is not None or not shapes
    require(is_read, f"{needed} checkpoint with load_base (a 4-bit one does not hold them)")
    missing = [n for n, shape in shapes.items() if originals and originals.shape(n) != shape]
    why = f"the checkpoint does not hold the weights of {some(missing)} in this model's shapes"
    require(not missing, f"{why}: load the model and its weights from the same checkpoint")


@torch.no_grad()
def start_from_weights(
    layer: LoRALinear,
    weight: Tensor,
    adapter_name: str,
    config: LoraConfig,
    generator: torch.Generator | None = None,
) -> None:
    """Set the first A and B of a layer's new adapter, from its `original_weight` (out, in), and
    rebase the layer where they need it."""
    r, scaling = config.r, config.scaling
    if config.init_lora_weights == "loftq":
        quantize = partial(nf4.round_trip, quant=_quant_of(layer.plain))
        pair, subtracted = loftq(weight, r, scaling, quantize, iterations=config.loftq_iter)
    elif config.init_lora_weights == "olora":
        pair = subtracted = olora(weight, r)
    else:
        niter = config.pissa_niter
        pair = subtracted = pissa(weight, r, scaling, niter=niter, generator=generator)
    lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if pair[0].any():  # A = 0 and B = 0, of a weight of zeros, would not learn
        lora_A.copy_(pair[0])
        lora_B.copy_(pair[1])
    if subtracted is not None:
        # in the adapter's dtype, so that the saved A' and B' are those that were subtracted
        base_A, base_B = (t.to(lora_A.dtype) for t in subtracted)
        rebase(layer, weight, Factors(base_A, base_B, scaling))


# ---- the base ----


@torch.no_grad()
def rebase(layer: LoRALinear, weight: Tensor, subtracted: Factors | None) -> None:
    """Set the base of `layer` to its original `weight` (out, in) minus the `subtracted` change."""
    base, rest = layer.plain, weight
    if subtracted is not None:
        subtracted = subtracted.to(weight.device)
        rest = weight.float() - subtracted.change(weight)  # (out, in)
    if is_quantized(base):
        packed, state = nf4.quantize(rest, _quant_of(base))
        state.dtype = base.weight.quant_state.dtype  # of dequantized weights
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
    for layer in wrappers(module):
        if isinstance(layer, LoRALinear) and layer.rebased and layer.rebased.original is not None:
            original = layer.rebased.original
            return (original.T if was_conv1d(base) else original).float()
    return dense_weight(base)


def subtracted_parts(model: nn.Module) -> dict[str, Factors]:
    """The change subtracted from each layer's base; empty for an unchanged base."""
    layers = _linear_layers(model).items()
    return {name: layer.rebased.subtracted for name, layer in layers if layer.rebased}


def set_bases(model: nn.Module, subtracted: Mapping[str, Factors]) -> None:
    """Rebase every adapted layer to its `subtracted` part, or to the weight as loaded."""
    current = subtracted_parts(model)
    for name, layer in _linear_layers(model).items():
        if not _same(current.get(name), subtracted.get(name)):
            rebase(layer, original_weight(model, name), subtracted.get(name))


def restore(model: nn.Module) -> None:
    """Restore every layer's base as loaded; UserError if its weights are no longer available."""
    require_originals(model, subtracted_parts(model))
    set_bases(model, {})


def _same(one: Factors | None, other: Factors | None) -> bool:
    if one is None or other is None:
        return one is other
    pairs = zip(one[:2], other[:2], strict=True)
    return all(torch.equal(a.cpu().float(), b.cpu().float()) for a, b in pairs)


def _linear_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in adapted(model) if isinstance(module, LoRALinear)}


def _quant_of(layer: Any) -> QuantConfig:
    """The settings of a 4-bit layer, the defaults for any other."""
    if not is_quantized(layer):
        return QuantConfig()
    state = layer.weight.quant_state
    return QuantConfig(state.quant_type, state.blocksize, bool(state.nested))
