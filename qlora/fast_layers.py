"""Layers with adapters that compute together, by qlora.lora_function: those that are called one
after another with the same input, and the three of a gated MLP.

A layer asks, in each forward pass, whether the fast way covers what is wanted of it; if it does
not, the layer, or the model's own MLP, computes as if this room were not there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapter_module import Wrapper
from qlora.frozen import computes_in, is_quantized, is_watched, product_dtype, was_conv1d
from qlora.lora import LoRALayer, LoRALinear
from qlora.lora_function import Frozen, lora_linear, lora_mlp


def why_plain(layer: LoRALayer) -> str | None:
    """What about a layer and its active adapter the functions do not cover, or None."""
    base: Any = layer.base_layer
    # what is derived from nn.Linear may compute something else
    if not isinstance(layer, LoRALinear) or not (type(base) is nn.Linear or is_quantized(base)):
        return "no plain linear layer of its own"
    if was_conv1d(base) and not is_quantized(base):
        return "a Conv1D"
    if layer.merged_adapters or layer.adapter_of_row is not None:
        return "merged, or a batch of several adapters"
    if len(layer.active_adapters) != 1:
        return "not one adapter"
    name = layer.active_adapters[0]
    if name in layer.lora_magnitude_vector:
        return "DoRA"
    if name in layer.lora_bias:
        return "lora_bias"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "a base that is trained"
    if is_watched(base):
        return "a base with hooks"
    return None


def is_fast(layer: LoRALayer, x: Tensor) -> bool:
    """Whether the functions cover this call; without gradients there is nothing to be won."""
    in_dtype = x.dtype == computes_in(layer.base_layer) == product_dtype(x)
    return torch.is_grad_enabled() and in_dtype and why_plain(layer) is None


def _inputs(layers: Sequence[LoRALayer]) -> tuple[list[Frozen], list[tuple[Tensor, Tensor]]]:
    """What the functions take, of layers that are fast."""
    names = [layer.active_adapters[0] for layer in layers]
    pairs = list(zip(layers, names, strict=True))
    frozen = [
        Frozen(layer.base_layer, layer.scaling[name], layer.drawn_dropout(name))
        for layer, name in pairs
    ]
    return frozen, [(layer.lora_A[name], layer.lora_B[name]) for layer, name in pairs]


class SharedInput:
    """Layers that are called one after another with the same tensor, like q, k and v; or one alone.

    The first that is called computes for all. What the others gave waits for their calls: with the
    same tensor, unchanged. A call with another one drops it.
    """

    def __init__(self, layers: Sequence[LoRALayer]) -> None:
        self.layers = tuple(layers)
        self._seen: tuple[Tensor, int] | None = None
        self._waiting: dict[LoRALayer, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy nobody waits, if a forward pass was left half done."""
        return {"layers": self.layers, "_seen": None, "_waiting": {}}

    def __call__(self, layer: LoRALayer, x: Tensor) -> Tensor | None:
        """What `layer` gives for x (..., in), or None where it is to compute by itself."""
        is_same = self._seen is not None and self._seen[0] is x and self._seen[1] == x._version
        if not (is_same and layer in self._waiting and torch.is_grad_enabled()):
            self._seen, self._waiting = None, {}
            together = self.layers if all(is_fast(other, x) for other in self.layers) else (layer,)
            if not is_fast(layer, x):
                return None
            outputs = lora_linear(x, *_inputs(together))
            if len(together) == 1:
                return outputs[0]
            self._seen = x, x._version
            self._waiting = dict(zip(together, outputs, strict=True))
        y = self._waiting.pop(layer)
        if not self._waiting:
            self._seen = None
        return y


class MLPBlock(Wrapper):
    """A gated MLP, down(act(gate(x)) * up(x)), in front of the model's own, as one function."""

    def __init__(self, base_layer: nn.Module, layers: Sequence[LoRALayer], activation: str) -> None:
        super().__init__(base_layer)
        self.layers = tuple(layers)  # gate, up and down, which are the base layer's children
        self.activation = activation
        self.recompute = False
        """keep x alone for the backward pass, as under gradient checkpointing"""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(..., in) -> (..., in)."""
        # of the calls of what is in it, the function makes none
        is_plain = args or kwargs or any(map(is_watched, self.base_layer.modules()))
        if is_plain or not all(is_fast(layer, x) for layer in self.layers):
            return self.base_layer(x, *args, **kwargs)
        frozen, factors = _inputs(self.layers)
        return lora_mlp(x, frozen, factors, activation=self.activation, recompute=self.recompute)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, recompute={self.recompute}"
