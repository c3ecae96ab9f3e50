"""Load a checkpoint as a model whose linear layers are frozen 4-bit Linear4bit.

transformers loads, shard by shard, and bitsandbytes quantizes. This module decides which layers,
in which dtype and blocksize:

- 4 bits: every linear layer and GPT-2's Conv1D, except output heads, `skip_modules`, layers that
  transformers never quantizes (T5's `wo`), and those that do more than x W^T + b (routers).
- compute dtype: embeddings, norms and heads.
- refused unless allowed: other matrices, such as fused experts, which would stay in 16 bits.

A classifier's head that the checkpoint lacks, or has for other labels, is initialised from a seed,
as is a pooler that it lacks. Any other missing tensor raises; transformers would initialise it.
"""

import inspect
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as REPLACED
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationMethod

from qlora.base.checkpoint import (
    Checkpoint,
    OriginalWeights,
    disk_name,
    disk_names,
    fp32_names,
    is_skipped,
    kept_dense,
    linear_layers,
    not_as_linear,
    quantized_layers,
    skeleton,
)
from qlora.base.inputs import why_not
from qlora.base.missing import classifier_modules, initialise_missing, require_on_disk
from qlora.base.modules import (
    ModelState,
    auto_class,
    heads,
    is_in,
    is_linear,
    state_of,
    task_of,
    use_codes_as_stored,
    was_conv1d,
)
from qlora.config import QuantConfig
from qlora.config.tasks import task_named
from qlora.errors import UserError, first_line, require, some
from qlora.files import require_inside
from qlora.ops import nf4

# model type -> why an adapter over 4-bit weights cannot be trained and merged
UNFIT = {
    "reformer": "its reversible layers pass no gradient to an adapter",
    "rwkv": "it rescales its own weights when it changes between training and evaluation",
    "zamba": "its layers share weights, which would get an adapter in each layer",
    "zamba2": "its layers share weights, which would get an adapter in each layer",
}
DTYPE_NAMES: dict[Any, Any] = {dtype: name for name, dtype in nf4.DTYPES.items()}


def load_base(
    model: str | Checkpoint,
    quant: QuantConfig | None = None,
    *,
    task: str = "causal-lm",
    labels: Sequence[str] = (),
    seed: int = 0,
    revision: str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A frozen model with 4-bit linear layers, for causal-lm, seq2seq, seq-cls or token-cls.

    Args:
        model: local folder, hub name (at `revision`), .gguf file, or an opened `Checkpoint`. A
            4-bit checkpoint keeps its quantization; of `quant` only the compute dtype is used.
        labels: class names of a classifier, by default those of the checkpoint.
        seed: for a classifier's head that the checkpoint lacks.
        device: by default the GPU where there is one.
    Raises:
        UserError: the model cannot be loaded, or linear weights would stay unquantized.
    """
    device = torch.device(device or default_device())
    dtype = compute_dtype(quant or QuantConfig(), device)
    quant = replace(quant or QuantConfig(), compute_dtype=DTYPE_NAMES[dtype])
    trusted: Any = {"trust_remote_code": trust_remote_code}
    checkpoint = Checkpoint.open(model, revision=revision) if isinstance(model, str) else model
    kind = task_named(task)
    empty: Any = skeleton(checkpoint.folder, task=kind, labels=labels, **trusted)
    in_full = classifier_modules(checkpoint, empty, kind)
    names = tuple(name for _, name in sorted((empty.config.id2label or {}).items()))
    require_unquantized(checkpoint)
    require_on_disk(checkpoint, empty, in_full)
    quant, bnb_config = _quantization(checkpoint, empty, quant, in_full)
    args = trusted | {"dtype": dtype, "device_map": {"": device}, "quantization_config": bnb_config}
    # `initialise_missing` refuses those, except in a head
    args |= {"config": empty.config, "ignore_mismatched_sizes": True}
    with ExitStack() as stack:
        if in_full:  # `initialise_missing` reports a missing head
            stack.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
            transformers_logging.set_verbosity_error()
        loaded, info = from_pretrained(type(empty), checkpoint, **args)
    initialise_missing(loaded, empty, checkpoint, info, in_full, seed)
    if bnb_config:
        _describe_as_bitsandbytes(loaded, quant, dtype)
    _freeze(loaded, dtype)
    loaded.config._name_or_path = checkpoint.origin
    loaded.qlora_state = ModelState(
        fingerprint=checkpoint.fingerprint,
        quant=quant,
        revision=checkpoint.revision,
        task=task,
        heads=tuple(in_full),
        labels=names if in_full else (),
        original_weights=OriginalWeights(checkpoint, empty, dtype) if bnb_config else None,
        unlike_bnb=tuple(chain(*unlike_bnb(empty, quant))) if bnb_config else (),
    )
    return loaded  # type: ignore[no-any-return]


def load_dense(
    checkpoint: Checkpoint,
    quant: QuantConfig | None = None,
    *,
    task: str = "causal-lm",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model without quantization, in the compute dtype of `quant`; int4 is decoded.

    Raises:
        UserError: the model cannot be loaded, or lacks parameters.
    """
    device, trusted = device or default_device(), dict[str, Any]()
    trusted["trust_remote_code"] = trust_remote_code
    dtype, kind = compute_dtype(quant or QuantConfig(), torch.device(device)), task_named(task)
    settings = checkpoint.config.get("quantization_config") or {}
    if settings.get("quant_method") == "compressed-tensors":
        require_compressed_tensors(f"model {checkpoint.name or checkpoint.folder}")
    else:
        require_on_disk(checkpoint, skeleton(checkpoint.folder, task=kind, **trusted))
    placed: Any = {"dtype": dtype, "device_map": {"": device}, **trusted}
    model, info = from_pretrained(auto_class(kind), checkpoint, **placed)
    lacks = sorted(info["missing_keys"])
    fault = f"model {checkpoint.name} lacks {len(lacks)} tensors of a {type(model).__name__}: "
    require(not lacks, f"{fault}{some(lacks)}. Give a complete model, such as a merged one")
    return model  # type: ignore[no-any-return]


def require_compressed_tensors(what: str) -> None:
    """Raise if the package is not installed, with which transformers opens int4."""
    fault = f"{what} is opened with the package compressed-tensors, which is not installed"
    is_there = find_spec("compressed_tensors") is not None
    require(is_there, f"{fault}: pip install compressed-tensors")


def from_pretrained(model_class: Any, checkpoint: Checkpoint, **options: Any) -> tuple[Any, Any]:
    """transformers' model of safetensors, and its loading info; UserError for damaged files."""
    options |= {"output_loading_info": True, "use_safetensors": True}
    try:
        return model_class.from_pretrained(checkpoint.folder, **options)  # type: ignore[no-any-return]
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # transformers has one for each setting and each damaged file
        fault = (
            f"{checkpoint.folder} cannot be loaded ({type(error).__name__}): {first_line(error)}"
        )
        raise UserError(f"{fault} Download or copy it again") from error


def load_tokenizer(
    source: Checkpoint | Path, *, task: str = "causal-lm", trust_remote_code: bool = False
) -> Any:
    """The tokenizer of a checkpoint or adapter, with the options of `task`. UserError if none."""
    folder = source.folder if isinstance(source, Checkpoint) else source
    require_inside(folder)
    options = dict(task_named(task).tokenizer_options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **options
        )
        _ = tokenizer.model_max_length > 0  # a TypeError now, not at the first text
        return tokenizer
    except Exception as error:  # transformers and tokenizers have one for each damaged file
        raise UserError(f"{folder} holds no tokenizer to load: {why_not(error)}") from error


def share_pad(model: nn.Module, pad_token_id: int | None) -> None:
    """Set and record the tokenizer's pad in a classifier that has none, or another one by which it
    finds a row's end. Encoders keep theirs: RoBERTa's positions are counted from it."""
    task = task_of(model)
    if task is None or not task.trains_head or pad_token_id is None:
        return
    text: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    finds_end = "pad_token_id" in inspect.unwrap(type(model).forward).__code__.co_names
    if text.pad_token_id is None or (finds_end and text.pad_token_id != pad_token_id):
        text.pad_token_id = state_of(model).pad_token_id = pad_token_id


def default_device() -> torch.device:
    """The current GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def compute_dtype(quant: QuantConfig, device: torch.device) -> torch.dtype:
    """The dtype of everything but the codes; `auto` is bf16 if the hardware has it."""
    if quant.compute_dtype != "auto":
        return nf4.DTYPES[quant.compute_dtype]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    # torch's own tests for bf16 units; its "is bf16 supported" also counts slow emulation.
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


# ---- which layers are quantized ----


def _quantization(
    checkpoint: Checkpoint, model: nn.Module, quant: QuantConfig, in_full: list[str]
) -> tuple[QuantConfig, "_Bnb4BitConfig | None"]:
    """How `model` is quantized, and transformers' settings; None for a 4-bit checkpoint.

    In the config of a 4-bit `model`, `in_full` is added to the modules without codes.
    """
    config: Any = model.config
    if why := UNFIT.get(config.model_type):
        raise UserError(
            f"{checkpoint.origin} is of type {config.model_type}, which is not supported: {why}. "
            "Use another model"
        )
    if not checkpoint.is_quantized:
        quant = replace(quant, skip_modules=(*quant.skip_modules, *in_full))
        layers = quantized_layers(model, quant)
        _require_own_weights(checkpoint, model, layers)
        require_all_quantized(model, layers, quant)
        skip = [f"{re.escape(name)}$" for name in linear_layers(model) if name not in layers]
        return quant, _Bnb4BitConfig(quant, skip)
    names = [n.partition(".quant_state.")[0] for n in checkpoint.tensors if ".quant_state." in n]
    places = {n: disk_name(checkpoint, model, f"{n}.weight") for n in linear_layers(model)}
    in_4_bits = [layer for layer, place in places.items() if place in names]
    require_plain_layers(model, in_4_bits, f"{checkpoint.origin} is 4-bit", "give its 16-bit model")
    name = names[0]
    record: Any = checkpoint.record(name)
    state = nf4.from_record(record).state
    default = QuantConfig(compute_dtype=quant.compute_dtype)
    stored = replace(
        default, quant_type=state.quant_type, blocksize=state.blocksize, double_quant=state.nested
    )
    if replace(quant, allow_unquantized=False) not in (stored, default):
        print(
            f"{checkpoint.folder} is 4-bit already: {state.quant_type}, blocksize "
            f"{state.blocksize}, double quantization {'on' if state.nested else 'off'}; other "
            "quantization settings are ignored"
        )
    if in_full:  # a list replaces transformers' default, which is the output head
        entries = config.quantization_config
        skipped = [*(entries.get("llm_int8_skip_modules") or []), *in_full]
        config.quantization_config = {**entries, "llm_int8_skip_modules": skipped}
    return replace(stored, skip_modules=tuple(in_full)), None


def bnb_layers(model: Any) -> dict[str, bool]:
    """The layers that transformers' BitsAndBytesConfig quantizes by default, as training with PEFT
    does -> whether the weight is (in, out) on disk. Unlike `quantized_layers`, also those whose
    weights the model reads itself, as Bloom's `dense`, and none of its own classes, as Falcon's."""
    skip = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return {
        name: was_conv1d(layer)
        for name, layer in linear_layers(model).items()
        if (type(layer) is nn.Linear or was_conv1d(layer)) and should_convert_module(name, skip)
    }


def unlike_bnb(model: Any, quant: QuantConfig) -> tuple[list[str], list[str]]:
    """The layers that load_base alone quantizes, and those that transformers alone does."""
    ours, theirs = quantized_layers(model, quant), bnb_layers(model)
    return [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]


def require_unquantized(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint without 4-bit codes whose config.json says that it is quantized."""
    settings = checkpoint.config.get("quantization_config") or {}
    if checkpoint.is_quantized:
        return
    loads = any(settings.get(key) for key in ("load_in_4bit", "load_in_8bit"))
    method = settings.get("quant_method") or ("bitsandbytes" if loads else None)
    fault = f"{checkpoint.origin} is already quantized, with {method}"
    if settings.get("load_in_4bit"):
        fault = (
            f"{checkpoint.origin}: config.json says bitsandbytes 4-bit, its tensors have no codes"
        )
    require(not method, f"{fault}: give its 16-bit model, or a bitsandbytes 4-bit one")


def require_plain_layers(model: nn.Module, layers: Iterable[str], what: str, fix: str) -> None:
    """Refuse 4-bit `layers` of classes of the model's own (Falcon's), and modules that transformers
    replaces in a quantized model, with other names (Llama 4's experts): it opens neither."""
    own = {type(model.get_submodule(name)).__name__ for name in layers} - {"Linear", "Conv1D"}
    own |= {type(module).__name__ for module in model.modules()} & REPLACED.keys()
    fault = f"{what}: transformers opens no 4-bit {', '.join(sorted(own))}, of which this model is"
    require(not own, f"{fault} made: {fix}")


def _require_own_weights(checkpoint: Checkpoint, model: nn.Module, layers: Iterable[str]) -> None:
    """Refuse layers whose weights the checkpoint has in a form that the merge cannot write."""
    converted = disk_names(checkpoint, model).converted
    places = {name: place for name in layers if (place := converted.get(f"{name}.weight"))}
    listed = some([f"{name} (in {place})" for name, place in places.items()])
    what = f"{checkpoint.origin} stores {len(places)} weights fused, split or transposed"
    fix = "Use another model, or leave them out with --skip-modules and --exclude-modules"
    message = f"{what}, in which no merge could write them: {listed}. {fix}"
    require(not places, message)


def require_all_quantized(model: nn.Module, layers: Iterable[str], quant: QuantConfig) -> None:
    """Print which layers the family never quantizes; raise for matrices that no setting explains.

    Plain matrices are ignored if they are less than 1 % of the model in all: routers.
    """
    left_out, known = heads(model), {*layers}
    unlike = [name for name in not_as_linear(model) if not is_in(name, left_out)]
    why = " and without an adapter (the model reads their weights itself, or they do more than W x)"
    for dense, reason in ((kept_dense(model), ""), (unlike, why)):
        known.update(dense)
        if dense:
            gib = sum(model.get_parameter(f"{name}.weight").numel() for name in dense) * 2 / 2**30
            leaves = ", ".join(sorted({name.rpartition(".")[2] for name in dense}))
            size = f"{len(dense)} layers, {gib:.2f} GiB"
            print(f"This family keeps {leaves} in 16 bits{reason}: {size}")
    matrices = {
        f"{name}.{leaf}".lstrip("."): parameter
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding | nn.modules.conv._ConvNd)
        and not (name in known or is_in(name, left_out) or is_skipped(name, quant.skip_modules))
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    }
    plain = sum(p.numel() for p in matrices.values() if p.ndim == 2)
    few = plain <= sum(p.numel() for p in model.parameters()) / 100
    sizes = {name: p.numel() for name, p in matrices.items() if p.ndim > 2 or not few}
    if sizes and not quant.allow_unquantized:
        listed = some([f"{name} ({size:,} values)" for name, size in sizes.items()])
        raise UserError(
            f"{len(sizes)} linear weights cannot be quantized to 4 bits and would stay in 16: "
            f"{listed}; {sum(sizes.values()) * 2 / 2**30:.2f} GiB in all. "
            "Use another model, or accept it with --allow-unquantized"
        )


def _freeze(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Freeze all parameters; `dtype` for those without codes, and for the Linear4bit products."""
    model.requires_grad_(False)
    use_codes_as_stored(model)
    in_fp32 = fp32_names(model, dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.compute_type_is_set = True
            weight: Any = module.weight
            fault = "a linear layer has no 4-bit codes, which config.json says it has"
            require(hasattr(weight, "quant_state"), f"{fault}: download or copy the model again")
            weight.data = nf4.as_bytes(weight.data)  # those of FSDP are stored as a float dtype
            weight.quant_storage = module.quant_storage = torch.uint8
            if model.device.type == "cpu":
                own_kernel(module)
    if settings := getattr(model.config, "quantization_config", None):
        settings.bnb_4bit_quant_storage = torch.uint8
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():  # a 4-bit checkpoint's norms are loaded as stored
            values = parameter.data.to(torch.float32 if name in in_fp32 else dtype)
            if values.device.type == "cpu" and values.itemsize == 2:
                # as the file has it, maybe: all pages of the mapped file would stay resident
                values = values.clone()
            parameter.data = values


def own_kernel(module: Any) -> None:
    """Let a Linear4bit on a CPU decode its weight by `nf4` where bitsandbytes' kernel is wrong."""
    if not nf4.kernel_is_right(module.in_features, module.weight.quant_state.blocksize):
        module.__class__ = Decoded4bit


class Decoded4bit(Linear4bit):
    """A Linear4bit with a weight decoded by `nf4`, for widths at which bitsandbytes' CPU kernel
    silently uses a wrong one. The backward pass decodes it again."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        y: Tensor = _DecodedProduct.apply(x.to(self.compute_dtype), self)  # type: ignore[no-untyped-call]
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)


class _DecodedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        return F.linear(x, nf4.decoded(layer, x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy @ nf4.decoded(ctx.layer, dy.dtype), None  # (..., out) @ (out, in) -> (..., in)


# ---- bitsandbytes through transformers, with a blocksize ----
# BitsAndBytesConfig has no blocksize. A registered quantizer, transformers' public extension
# point, sets it on the still empty parameters; the model is otherwise the one that
# BitsAndBytesConfig loads.

_METHOD = "qlora_bnb_4bit"


def bnb_settings(quant: QuantConfig, dtype: torch.dtype, skip: Sequence[str]) -> dict[str, Any]:
    """The arguments of BitsAndBytesConfig; `skip`: names or patterns of layers without codes."""
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant.quant_type,
        "bnb_4bit_use_double_quant": quant.double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "llm_int8_skip_modules": list(skip),
    }


@register_quantization_config(_METHOD)
class _Bnb4BitConfig(BitsAndBytesConfig):
    def __init__(self, quant: QuantConfig, skip: list[str]) -> None:
        settings = bnb_settings(quant, nf4.DTYPES[quant.compute_dtype], skip)
        super().__init__(**settings)  # type: ignore[no-untyped-call]
        self.quant_method: Any = _METHOD
        self.blocksize = quant.blocksize


@register_quantizer(_METHOD)
class _Bnb4BitQuantizer(Bnb4BitHfQuantizer):
    quantization_config: Any

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, **kwargs: Any
    ) -> None:
        for module in model.modules():
            if isinstance(module, nn.Linear) and is_linear(module):
                module.__class__ = nn.Linear  # transformers quantizes no subclass
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                weight: Any = module.weight
                weight.blocksize = self.quantization_config.blocksize


def _describe_as_bitsandbytes(model: Any, quant: QuantConfig, dtype: torch.dtype) -> None:
    """Turn `model`'s own description into that of a plain bitsandbytes 4-bit model."""
    patterns = model.config.quantization_config.llm_int8_skip_modules
    skip = [pattern.removesuffix("$").replace("\\", "") for pattern in patterns]
    plain = BitsAndBytesConfig(**bnb_settings(quant, dtype, skip))
    model.config.quantization_config = model.hf_quantizer.quantization_config = plain
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    model.is_loaded_in_4bit = True
