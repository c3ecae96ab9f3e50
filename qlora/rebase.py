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

W comes from the model's checkpoint, tensor by tensor (`original_weights` of a model that load_base
made), as loading cast it. It is read again when the adapter is taken off, so nothing is kept of the
old codes. A layer that is not quantized has its W at hand, and keeps W - scaling * B' A' instead.

Such a model holds this one adapter: others were trained over other codes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qlora import nf4
from qlora.config import LoraConfig, QuantConfig
from qlora.errors import UserError
from qlora.initialise import Pair, loftq, olora, pissa
from qlora.lora import Factors, LoRALinear, dense_weight, lora_layers


class OriginalWeights(Protocol):
    """Weights of linear layers from before quantization, by the layers' names."""

    def shape(self, name: str) -> tuple[int, int] | None:
        """(out, in), or None where there is no such weight."""

    def read(self, name: str) -> Tensor:
        """The weight (out, in) in the dtype that loading casts it to."""


def check_start(model: nn.Module, layers: Mapping[str, LoraConfig]) -> None:
    """Refuse a start from weights that cannot be had, before anything is changed.

    Args:
        layers: those to be adapted, and what each is to get.

    Raises:
        UserError: it names every layer at fault.
    """
    wanted = {name: config for name, config in layers.items() if config.starts_from_weights}
    if not wanted:
        return
    init = next(iter(wanted.values())).init_lora_weights
    modules = {name: _linear(model, name) for name in wanted}
    small = [
        f"{name} has r={config.r} and is {tuple(_shape(modules[name]))}"
        for name, config in wanted.items()
        if config.r > min(_shape(modules[name]))
    ]
    if small:
        raise UserError(
            f"init_lora_weights={init!r} takes at most as many directions as a layer has: "
            f"{_some(small)}. Give a smaller r, or another to these layers with rank_pattern"
        )
    plain = [name for name, module in modules.items() if not isinstance(module, Linear4bit)]
    if init == "loftq" and plain:
        raise UserError(
            f"LoftQ makes up for quantization, and these layers are not quantized: {_some(plain)}. "
            "Name them in exclude_modules"
        )
    if any(config.rebases for config in wanted.values()):
        require_alone(model, f"init_lora_weights={init!r}")
    require_originals(model, modules)


def require_alone(model: nn.Module, what: str) -> None:
    """Refuse `what`, which changes the base, while there are adapters on it."""
    if names := adapter_names(model):
        raise UserError(
            f"{what} changes the base, and {', '.join(names)} was made for it as it is: unload "
            "first, or load the base again"
        )


def require_originals(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse 4-bit layers whose weights from before quantization are not at hand."""
    coded = [name for name in names if isinstance(_linear(model, name), Linear4bit)]
    originals: OriginalWeights | None = getattr(model, "original_weights", None)
    if coded and originals is None:
        raise UserError(
            "the weights from before quantization are needed and not at hand: load the 16-bit "
            "model with load_base, which remembers where they are (a checkpoint that is 4-bit "
            "already has none)"
        )
    missing = [n for n in coded if originals and originals.shape(n) != _shape(_linear(model, n))]
    if missing:
        raise UserError(
            f"the checkpoint does not hold the weights of {_some(missing)} as this model has them: "
            "is it the one that the model was loaded from?"
        )


@torch.no_grad()
def start_from_weights(
    model: nn.Module,
    name: str,
    adapter_name: str,
    config: LoraConfig,
    generator: torch.Generator | None = None,
) -> None:
    """Give the new adapter of layer `name` its first values, and the layer the base they want."""
    layer: Any = model.get_submodule(name)
    weight = original_weight(model, name)
    pair, taken = _first_values(weight, config, _quant_of(layer.base_layer), generator)
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


@torch.no_grad()
def rebase(layer: LoRALinear, weight: Tensor, taken: Factors | None) -> None:
    """Make the base of `layer` anew, of its original `weight` (out, in) without `taken`."""
    base: Any = layer.base_layer
    taken = taken and taken.to(weight.device)
    rest = weight if taken is None else weight.float() - taken.change(weight)
    old = getattr(base.weight, "quant_state", None)
    if old is not None:
        packed, state = nf4.quantize(rest, _quant_of(base))
        state.dtype = old.dtype  # what the codes are turned into
        base.weight.data = packed
        base.weight.quant_state = base.quant_state = state
    else:
        base.weight.copy_(rest)
    layer.taken = taken


def original_weight(model: nn.Module, name: str) -> Tensor:
    """The weight (out, in) that layer `name` was loaded with, on its device."""
    base, taken = _linear(model, name), getattr(model.get_submodule(name), "taken", None)
    originals: OriginalWeights | None = getattr(model, "original_weights", None)
    is_whole = taken is None and not isinstance(base, Linear4bit)
    if originals is not None and not is_whole:
        return originals.read(name).to(base.weight.device)
    weight = dense_weight(base)
    return weight if taken is None else weight + taken.change(weight)


def restore(model: nn.Module) -> None:
    """Give every layer the base it was loaded with.

    Raises:
        UserError: the weights from before quantization are no longer there.
    """
    layers = {n: layer for n, layer in lora_layers(model).items() if layer.taken is not None}
    require_originals(model, layers)
    for name, layer in layers.items():
        rebase(layer, original_weight(model, name), None)


def require_own_base(model: nn.Module, what: str) -> None:
    """Refuse `what` on a model whose base was changed for the adapter it has."""
    if any(layer.taken is not None for layer in lora_layers(model).values()):
        raise UserError(
            f"{what} wants the base as it was, and it was changed for adapter "
            f"{', '.join(adapter_names(model))} (PiSSA, OLoRA or LoftQ): unload that first"
        )


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters on `model`, each once."""
    return list(dict.fromkeys(n for layer in lora_layers(model).values() for n in layer.lora_A))


def _linear(model: nn.Module, name: str) -> Any:
    """The frozen layer at `name`, below its adapters."""
    module: Any = model.get_submodule(name)
    return module.base_layer if isinstance(module, LoRALinear) else module


def _shape(layer: Any) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _quant_of(layer: Any) -> QuantConfig:
    """How a Linear4bit is quantized; anything, for a layer that is not."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return QuantConfig()
    return QuantConfig(state.quant_type, state.blocksize, bool(state.nested))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
