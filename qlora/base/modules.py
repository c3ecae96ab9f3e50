"""Properties of a model and its modules, quantized or not, that adapters depend on.

A linear layer is an nn.Linear, a subclass that computes the same (Falcon's does, Llama 4's router
does not), GPT-2's Conv1D (its weight is (in, out)), or a bitsandbytes layer made of one. To an
adapter every weight is a matrix (out, in): a convolution's in is in_channels * kernel size, and an
embedding is a layer from vocab to dim.
"""

import inspect
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.config import LoraConfig, QuantConfig
from qlora.config.tasks import TASKS, Task
from qlora.ops.nf4 import Quantized, as_bytes, dequantize

if TYPE_CHECKING:
    from qlora.base.checkpoint import OriginalWeights


@dataclass
class ModelState:
    """Facts about a model that its parameters do not hold, from `load_base`; otherwise empty."""

    fingerprint: str | None = None  # `Checkpoint.fingerprint` of the base
    quant: QuantConfig | None = None  # of the base, with `auto` resolved in its compute dtype
    revision: str | None = None  # of the hub repository, if one was asked for
    task: str | None = None
    heads: tuple[str, ...] = ()  # modules of a classifier that are trained in full
    labels: tuple[str, ...] = ()  # class names of a classifier
    pad_token_id: int | None = None  # of a classifier whose checkpoint has none or another one
    original_weights: "OriginalWeights | None" = None  # if the checkpoint has 16-bit weights
    unlike_bnb: tuple[str, ...] = ()  # layers that only one of load_base and transformers quantizes
    lora_configs: dict[str, LoraConfig] = field(default_factory=dict)  # of its adapters, by name

    def forget_base(self) -> None:
        """To be called when weights are no longer the checkpoint's."""
        self.fingerprint = self.quant = self.revision = self.original_weights = None

    def record(self) -> dict[str, Any]:
        """The entries for adapter files and run.yaml; unknown ones are left out."""
        entries: dict[str, Any] = {}
        if self.quant:
            entries = {
                "fingerprint": self.fingerprint,
                "quant_type": self.quant.quant_type,
                "blocksize": self.quant.blocksize,
                "double_quant": self.quant.double_quant,
                "compute_dtype": self.quant.compute_dtype,  # the cast before quantization
                "skip_modules": list(self.quant.skip_modules),
                "revision": self.revision,
            }
        if self.task:
            entries["task"] = self.task
        if self.heads:
            entries |= {"heads": list(self.heads), "labels": list(self.labels)}
        if self.pad_token_id is not None:
            entries["pad_token_id"] = self.pad_token_id
        return entries


def state_of(model: nn.Module) -> ModelState:
    """The state of `model`; an empty one is attached if it has none."""
    if not hasattr(model, "qlora_state"):
        model.qlora_state = ModelState()  # type: ignore[assignment]  # no parameter
    return model.qlora_state  # type: ignore[return-value]


def auto_class(task: Task) -> Any:
    """The class of transformers that loads models for `task`."""
    import transformers

    return getattr(transformers, task.auto_class)


def task_of(model: nn.Module) -> Task | None:
    """The task that `model` was loaded for, or else that of its class, if any."""
    if (name := state_of(model).task) is not None:
        return TASKS[name]
    for task in TASKS.values():
        if task.trains_head and type(model).__name__.endswith(task.class_ending):
            return task
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return TASKS["seq2seq" if is_encoder_decoder else "causal-lm"]


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """The modules after the last hidden states of `model`: neither quantized nor adapted.

    - a language model: its output head
    - another transformers model: all children with parameters but its `base_model`, and a pooler
      that the checkpoint lacked
    - any other module: none
    """
    head = output_head(model)
    if head is not None:
        return {name: module for name, module in model.named_modules() if module is head}
    base = getattr(model, "base_model", model)
    if base is model:
        return {}
    beside = {name: child for name, child in model.named_children() if child is not base}
    beside = {n: child for n, child in beside.items() if any(True for _ in child.parameters())}
    return beside | {name: model.get_submodule(name) for name in state_of(model).heads}


def is_in(name: str, modules: Any) -> bool:
    """Whether `name` is one of the names `modules`, or of a module or parameter inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def output_head(model: nn.Module) -> Any:
    """The layer from hidden states to logits, or None."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None


def vocabulary(model: nn.Module) -> tuple[str | None, str | None]:
    """The names of the embedding and of the output head of `model`."""
    names = {module: name for name, module in model.named_modules()}
    get = getattr(model, "get_input_embeddings", None)
    embedding = None
    with suppress(NotImplementedError):  # raised by vision models
        embedding = get() if get else None
    return names.get(embedding), names.get(output_head(model))


def followers(
    model: nn.Module, modules: Mapping[str, Any], tied: list[list[str]], name: str, *, rows: bool
) -> list[str]:
    """The other `modules` that have the weight of `name` (`tied`: groups), and change with it.

    - token rows of the model's embedding: all of them, as in PEFT
    - the embedding from which those of encoder and decoder have their weight, such as BART's
      `shared`, and which is not called itself: all of them
    - any other: none, so an adapted embedding unties a decoder's output head, as in PEFT
    """
    sources = getattr(model, "all_tied_weights_keys", {}).items()
    targets = [target.removesuffix(".weight") for target, s in sources if s == f"{name}.weight"]
    is_shared = any(isinstance(modules.get(target), nn.Embedding) for target in targets)
    if not is_shared and not (rows and name == vocabulary(model)[0]):
        return []
    return [peer for group in tied if name in group for peer in group if peer != name]


def tied_modules(modules: Mapping[str, Any]) -> list[list[str]]:
    """The names of `modules` that share one weight, in groups."""
    groups: dict[Any, list[str]] = {}
    for name, module in modules.items():
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            groups.setdefault(weight, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def can_untie(config: Any) -> bool:
    """Whether a model of this config.json can have tie_word_embeddings false. T5 takes it for
    another setting; where the file has all weights, transformers ties none that differ."""
    text = config.get_text_config(decoder=True)
    untied = type(text).from_dict(text.to_dict() | {"tie_word_embeddings": False})
    return not untied.tie_word_embeddings


def embedding_rows(model: Any) -> int:
    """The number of tokens that the embedding of `model` has rows for."""
    return int(model.get_input_embeddings().weight.shape[0])


def was_conv1d(layer: nn.Module) -> bool:
    """Whether it is GPT-2's Conv1D or a Linear4bit made of one: (in, out) in the checkpoint."""
    return getattr(layer, "source_cls", type(layer)).__name__ == "Conv1D"


def _stores_transposed(layer: nn.Module) -> bool:
    """Whether its dense weight is (in, out)."""
    return isinstance(layer, nn.Embedding) or was_conv1d(layer)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer of any kind, by what it computes."""
    if not isinstance(module, nn.Linear):
        return was_conv1d(module)
    is_bnb = is_quantized(module) or type(module).__module__.startswith("bitsandbytes.")
    return type(module) is nn.Linear or is_bnb or _computes_as_linear(module)


def _computes_as_linear(layer: nn.Linear) -> bool:
    """Whether a subclass of nn.Linear maps x to x W^T + b: tried with two inputs to each output."""
    copy: Any = shallow_copy(layer)
    copy.training, copy.in_features = False, 2
    weight = torch.linspace(-1, 1, 2 * layer.out_features).view(-1, 2)
    bias = None if layer.bias is None else weight.sum(1)
    copy._parameters |= {
        "weight": nn.Parameter(weight, requires_grad=False),
        "bias": bias if bias is None else nn.Parameter(bias, requires_grad=False),
    }
    x = torch.linspace(-1, 1, 12).view(2, 3, 2)
    try:
        y = type(layer).forward(copy, x)
    except Exception:  # it takes more than x, or x in another shape
        return False
    wanted = F.linear(x, weight, bias)
    return isinstance(y, Tensor) and y.shape == wanted.shape and torch.allclose(y, wanted)


# uses of a child's weight in a class's source: of its values, and of its dtype to cast inputs to
VALUES = r"(?<!isinstance\()\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|ndim)\b)"
CASTS = r"\.to\((?:dtype=)?self\.(\w+)\.weight\.dtype\)"
# methods of a child that the module above calls, which are no `forward`: those of Gemma 3n's altup
CALLS = r"\bself\.\w+\.(\w+)\("


def read_directly(modules: Mapping[str, nn.Module], use: str = VALUES) -> set[str]:
    """Those of a model's `modules` whose weight the module above uses in code of its own.

    An adapter there has no effect and codes cannot be read: Mamba's dt_proj in each pass, and
    out_proj where its fused kernel is installed.
    """
    kinds: Any = {type(module) for module in modules.values()}
    forward = frozenset(["forward"])
    calls = (re.findall(CALLS, source) for kind in kinds for source in _sources(kind, forward))
    entries = forward.union(*calls)
    used = {kind: _weights_used(_sources(kind, entries), use) for kind in kinds}
    names = (
        f"{name}.{leaf}".lstrip(".")
        for name, module in modules.items()
        for leaf in used[type(module)]
    )
    return {name for name in names if name in modules}


def _weights_used(sources: Iterable[str], use: str) -> set[str]:
    """The children whose weight the methods use, but for those that look for codes first."""
    guarded = "self.{}.weight.dtype != torch.uint8"  # as NLLB-MoE's is
    found = ((leaf, source) for source in sources for leaf in re.findall(use, source))
    return {leaf for leaf, source in found if guarded.format(leaf) not in source}


@cache
def _sources(kind: type, entries: frozenset[str]) -> tuple[str, ...]:
    """The sources of those methods of a class, and of all its methods that they name."""
    methods = dict(inspect.getmembers_static(kind, inspect.isfunction))
    sources, names = list[str](), sorted(entries)
    for name in names:
        with suppress(KeyError, OSError):  # no method, or one without source
            sources.append(inspect.getsource(inspect.unwrap(methods[name])))
            names += [n for n in re.findall(r"\bself\.(\w+)", sources[-1]) if n not in names]
    return tuple(sources)


def use_codes_as_stored(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights, or undo it.

    In eval mode on a CPU with bf16 units it does so in place, with absmax rounded to bf16, to a
    form that has no backward pass and that nothing else reads.
    """
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            weight: Any = layer.weight
            if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
                weight.data, state = _convert_weight_packed_for_cpu_inverse(
                    weight.data, weight.quant_state
                )
                weight.quant_state = layer.quant_state = state


def is_conv(module: nn.Module) -> bool:
    """Whether it is a convolution of one, two or three dimensions."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def is_quantized(layer: nn.Module) -> bool:
    """Whether its weight is stored as 4-bit codes."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def has_hooks(module: nn.Module) -> bool:
    """Whether it has hooks, or a replaced `forward` as accelerate sets to move weights."""
    forward_hooks = (module._forward_hooks, module._forward_pre_hooks)
    backward_hooks = (module._backward_hooks, module._backward_pre_hooks)
    return any(forward_hooks) or any(backward_hooks) or "forward" in vars(module)


def set_checkpointing(model: Any, *, on: bool, preserve_rng_state: bool = False) -> None:
    """Turn non-reentrant gradient checkpointing on or off."""
    # "activation" since transformers 5.2x
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        settings = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
        getattr(model, f"{kind}_checkpointing_enable")(settings)
    elif getattr(model, f"is_{kind}_checkpointing"):
        getattr(model, f"{kind}_checkpointing_disable")()


def computes_in(layer: Any) -> torch.dtype:
    """The dtype a Linear4bit or plain layer computes in."""
    dtype = getattr(layer, "compute_dtype", None)
    return layer.weight.dtype if dtype is None else dtype  # type: ignore[no-any-return]


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype a product of x is computed in: its own, or autocast's."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def matrix_shape(layer: Any) -> tuple[int, int]:
    """(out, in) of its weight as a matrix."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    rows, columns = layer.weight.shape[0], layer.weight.shape[1:].numel()
    return (columns, rows) if _stores_transposed(layer) else (rows, columns)


def dense_weight(layer: Any) -> Tensor:
    """A copy of its weight as an fp32 matrix (out, in)."""
    weight: Tensor = layer.weight.detach()
    if is_quantized(layer):
        return dequantize(Quantized(as_bytes(weight), layer.weight.quant_state))
    dense = weight.to(torch.float32, copy=True)
    if _stores_transposed(layer):
        return dense.T.contiguous()
    return dense.flatten(1)  # (out, in / groups, *kernel) -> (out, in / groups * kernel)


def as_dense(layer: Any, weight: Tensor) -> nn.Module:
    """A frozen layer of the class before quantization: this weight (out, in), `layer`'s bias."""
    if not isinstance(layer, nn.Linear):
        dense: Any = shallow_copy(layer)
    elif was_conv1d(layer):
        dense = layer.source_cls(layer.out_features, layer.in_features)  # type: ignore[operator]
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    if _stores_transposed(layer):
        weight = weight.T.contiguous()
    elif not isinstance(layer, nn.Linear):
        weight = weight.view_as(layer.weight)  # (out, in * kernel) -> (out, in, *kernel)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    dense.bias = getattr(layer, "bias", None)
    return dense.train(layer.training)  # type: ignore[no-any-return]


def shallow_copy(module: nn.Module) -> nn.Module:
    """A new module with the same parameters, buffers and children, in dicts of its own."""
    copy = module.__new__(type(module))
    copy.__dict__ = {
        name: value.copy() if isinstance(value, dict) else value
        for name, value in vars(module).items()
    }
    return copy
