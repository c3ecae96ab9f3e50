"""What adapters stand on: a frozen module of the base, quantized or not.

A linear layer is an nn.Linear, GPT-2's Conv1D (its weight is (in, out)), or a bitsandbytes
Linear4bit made of either. Seen from an adapter every weight is a matrix (out, in): a convolution's
in is in_channels * kernel size, an embedding is a layer from vocab to dim.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora.config import LoraConfig, QuantConfig
from qlora.config.tasks import TASKS, Task, task_named
from qlora.ops.nf4 import Quantized, dequantize

if TYPE_CHECKING:
    from qlora.base.checkpoint import OriginalWeights


@dataclass
class ModelState:
    """What qlora knows of a model beyond its parameters: `state_of(model)`.

    `load_base` fills it in; a model from elsewhere starts with an empty one.
    """

    fingerprint: str | None = None
    """of the checkpoint (`Checkpoint.fingerprint`)"""
    quant: QuantConfig | None = None
    """how `load_base` quantized it, with `auto` compute dtype resolved"""
    revision: str | None = None
    """of the hub's repository, if one was asked for"""
    task: str | None = None
    heads: tuple[str, ...] = ()
    """modules of a classifier that are trained in full"""
    labels: tuple[str, ...] = ()
    """class names of a classifier"""
    pad_token_id: int | None = None
    """of a classifier whose checkpoint has none"""
    original_weights: "OriginalWeights | None" = None
    """the weights from before quantization, if the checkpoint has them"""
    lora_configs: dict[str, LoraConfig] = field(default_factory=dict)
    """of the adapters on the model, by name"""

    def forget_base(self) -> None:
        """The weights are no longer the checkpoint's."""
        self.fingerprint = self.quant = self.revision = self.original_weights = None

    def record(self) -> dict[str, Any]:
        """What adapter files and run.yaml keep of it; unknown entries are left out."""
        known: dict[str, Any] = {}
        if self.quant:
            known = {
                "fingerprint": self.fingerprint,
                "quant_type": self.quant.quant_type,
                "blocksize": self.quant.blocksize,
                "double_quant": self.quant.double_quant,
                # weights are cast to it before they are quantized
                "compute_dtype": self.quant.compute_dtype,
                "skip_modules": list(self.quant.skip_modules),
                "revision": self.revision,
            }
        if self.task:
            known["task"] = self.task
        if self.heads:
            known |= {"heads": list(self.heads), "labels": list(self.labels)}
        if self.pad_token_id is not None:
            known["pad_token_id"] = self.pad_token_id
        return known


def state_of(model: nn.Module) -> ModelState:
    """The state that `model` carries; an empty one is attached where it has none."""
    state: ModelState | None = getattr(model, "qlora_state", None)
    if state is None:
        state = ModelState()
        model.qlora_state = state  # type: ignore[assignment]  # nn.Module types its attributes
    return state


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


def auto_class(task: Task) -> Any:
    """The class of transformers that loads models for `task`."""
    import transformers

    return getattr(transformers, task.auto_class)


def task_of(model: nn.Module) -> Task | None:
    """The task of `model`: what it was loaded for, or what its class says; None of another kind."""
    name = state_of(model).task
    if name is not None:
        return task_named(name)
    for task in TASKS.values():
        if task.trains_head and type(model).__name__.endswith(task.class_ending):
            return task
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return TASKS["seq2seq" if is_encoder_decoder else "causal-lm"]


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that make its output, which are neither quantized nor adapted.

    That is the output head of a language model; of another transformers model all that stands
    beside its `base_model`, and a pooler that the checkpoint lacked; of any other module nothing.
    """
    head = output_head(model)
    if head is not None:
        return {name: module for name, module in model.named_modules() if module is head}
    base = getattr(model, "base_model", model)
    if base is model:
        return {}
    children = {n: m for n, m in model.named_children() if any(True for _ in m.parameters())}
    beside = {n: m for n, m in children.items() if m is not base}
    return beside | {name: model.get_submodule(name) for name in state_of(model).heads}


def is_in(name: str, modules: Any) -> bool:
    """Whether `name` is one of the modules named, or inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
