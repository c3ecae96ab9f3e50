"""What adapters stand on: a frozen module of the base, quantized or not.

A linear layer is an nn.Linear, GPT-2's Conv1D (its weight is (in, out)), or a bitsandbytes
Linear4bit made of either. Seen from an adapter every weight is a matrix (out, in): a convolution's
in is in_channels * kernel size, an embedding is a layer from vocab to dim.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from qlora.ops.nf4 import Quantized, dequantize


def was_conv1d(layer: nn.Module) -> bool:
    """Whether the checkpoint stores this layer's weight as (in, out), as GPT-2's Conv1D does."""
    return getattr(layer, "source_cls", type(layer)).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, of any kind."""
    return isinstance(module, nn.Linear) or was_conv1d(module)


def is_conv(module: nn.Module) -> bool:
    """Whether it is a convolution of one, two or three dimensions."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def is_quantized(layer: nn.Module) -> bool:
    """Whether its weight is 4-bit codes."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def computes_in(layer: nn.Module) -> torch.dtype:
    """The dtype a Linear4bit or plain layer computes in."""
    weight: Any = layer.weight
    dtype: torch.dtype = getattr(layer, "compute_dtype", weight.dtype)
    return dtype


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is computed in: its own dtype, or autocast's."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to see its calls, or has put another forward in its place."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    backward_hooks = (module._backward_hooks, module._backward_pre_hooks)
    # accelerate's forward moves weights about
    return any(hooks) or any(backward_hooks) or "forward" in vars(module)


def matrix_shape(layer: Any) -> tuple[int, int]:
    """(out, in) of its weight as a matrix."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    shape = layer.weight.shape
    if isinstance(layer, nn.Embedding) or was_conv1d(layer):
        return shape[1], shape[0]
    return shape[0], shape[1:].numel()


def dense_weight(layer: Any) -> Tensor:
    """A new tensor with its weight as a matrix, fp32 (out, in)."""
    weight: Tensor = layer.weight.detach()
    if is_quantized(layer):
        return dequantize(Quantized(weight, layer.weight.quant_state))
    dense = weight.to(torch.float32, copy=True)
    if isinstance(layer, nn.Embedding) or was_conv1d(layer):
        return dense.T.contiguous()
    return dense.flatten(1)


def as_dense(layer: Any, weight: Tensor) -> nn.Module:
    """A plain frozen layer with `layer`'s bias and that weight (out, in), of the model's own class:
    where `layer` is a Linear4bit, an nn.Linear or GPT-2's Conv1D."""
    if isinstance(layer, nn.Linear):
        if was_conv1d(layer):
            dense: Any = layer.source_cls(layer.out_features, layer.in_features)  # type: ignore[operator]
            weight = weight.T.contiguous()
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    else:
        dense = shallow_copy(layer)
        is_transposed = isinstance(layer, nn.Embedding) or was_conv1d(layer)
        weight = weight.T.contiguous() if is_transposed else weight.view_as(layer.weight)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    dense.bias = getattr(layer, "bias", None)
    return dense.train(layer.training)  # type: ignore[no-any-return]


def shallow_copy(module: nn.Module) -> nn.Module:
    """Another module with the same parameters, buffers and children, to change some of them."""
    made = module.__new__(type(module))
    made.__dict__ = {
        name: value.copy() if isinstance(value, dict) else value
        for name, value in vars(module).items()
    }
    return made


def output_head(model: nn.Module) -> Any:
    """The layer that makes logits, which is neither quantized nor adapted, or None."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None


def vocabulary(model: nn.Module) -> tuple[str | None, str | None]:
    """The names of `model`'s embedding and of its output head."""
    names = {module: name for name, module in model.named_modules()}
    get = getattr(model, "get_input_embeddings", None)
    embedding = None
    with suppress(NotImplementedError):  # a model of images has none, and says so in this way
        embedding = get() if get else None
    return names.get(embedding), names.get(output_head(model))


def is_tied(model: nn.Module) -> bool:
    """Whether `model`'s output head is its embedding."""
    if output_head(model) is None:
        return False
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if config else None
    return bool(getattr(text, "tie_word_embeddings", False))
