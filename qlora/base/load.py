"""A checkpoint becomes a model whose linear layers are frozen 4-bit Linear4bit.

transformers does the loading, shard by shard, and bitsandbytes the quantizing; this room decides
which layers, in which dtype and blocksize, and refuses what would silently stay in 16 bits.

Every nn.Linear (and GPT-2's Conv1D) is quantized but the output head or a classifier's, what the
config skips, and T5's `wo`, which transformers quantizes for nobody. Embeddings, norms and the head
take the compute dtype and are not cast up; nothing has `requires_grad`. Weights that are linear but
no Linear module, such as fused mixture-of-experts parameters, cannot be quantized: they are named
with their size and are an error unless allowed.

A classifier's head where the checkpoint has none, or one of other labels: made with a seed.

A pretrained checkpoint ends in another task's head, or in none. transformers fills the gap with
random values and goes on; here that is allowed for the head alone (and a pooler that the
checkpoint lacks), the values come from a seed, and whatever else is missing is an error.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationMethod

from qlora.base.checkpoint import (
    Checkpoint,
    OriginalWeights,
    disk_name,
    is_skipped,
    kept_dense,
    linear_layers,
    model_config,
    quantized_layers,
    skeleton,
)
from qlora.base.modules import ModelState, auto_class, is_in, state_of, task_of
from qlora.base.modules import heads as heads_of
from qlora.config import QuantConfig
from qlora.config.tasks import task_named
from qlora.errors import UserError, first_line
from qlora.ops import nf4

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
    """A frozen model with 4-bit linear layers: a causal language model, or that of another task.

    Args:
        model: local folder, hub name, .gguf file, or an opened `Checkpoint`. One that is already
            bitsandbytes 4-bit keeps its own quantization; of `quant` only the compute dtype counts.
        task: causal-lm, seq2seq, seq-cls or token-cls.
        labels: class names of a classifier, by default those of the checkpoint.
        seed: of a classifier's head, where the checkpoint has none for these labels.
        revision: of a hub name.
        device: by default the GPU where there is one.

    Raises:
        UserError: there is nothing to load, or linear weights would stay unquantized.
    """
    quant = quant or QuantConfig()
    device = torch.device(device or default_device())
    dtype = compute_dtype(quant, device)
    trusted: Any = {"trust_remote_code": trust_remote_code}
    checkpoint = (
        model if isinstance(model, Checkpoint) else Checkpoint.open(model, revision=revision)
    )
    config = model_config(checkpoint.folder, task=task, labels=labels, **trusted)
    empty = skeleton(checkpoint.folder, task=task, config=deepcopy(config), **trusted)
    heads = heads_to_train(checkpoint, empty, task)
    if checkpoint.is_quantized:
        quant = own_quantization(checkpoint, quant)
        if heads:  # otherwise transformers skips the language head by itself
            _keep_dense(config, heads)
    quant = replace(quant, skip_modules=(*quant.skip_modules, *heads))
    settings = None
    if not checkpoint.is_quantized:
        _require_in_16_bits(checkpoint)
        _require_all_quantized(empty, quant)
        settings = _Bnb4BitConfig(quant, dtype, _skipped(empty, quant))
    loading = {"dtype": dtype, "device_map": {"": device}, **trusted}
    loading |= {"quantization_config": settings} if settings else {}
    with quiet() if heads else nullcontext():  # `complete` reports a missing head
        loaded, info = auto_class(task_named(task)).from_pretrained(
            checkpoint.folder,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `complete` refuses them, except in a head
            **loading,
        )
    complete(loaded, empty, checkpoint, info, heads, seed)
    if settings is not None:
        settings.as_bitsandbytes(loaded)
    _freeze(loaded, dtype)
    _require_right_kernel(loaded)
    if not checkpoint.name.endswith(".gguf"):  # there the folder of the conversion
        loaded.config._name_or_path = checkpoint.name or str(checkpoint.folder)
    loaded.qlora_state = ModelState(
        fingerprint=checkpoint.fingerprint,
        quant=replace(quant, compute_dtype=DTYPE_NAMES[dtype]),
        revision=checkpoint.revision,
        task=task,
        heads=tuple(heads),
        labels=tuple(config.id2label[i] for i in range(config.num_labels)) if heads else (),
        original_weights=None
        if checkpoint.is_quantized
        else _original_weights(checkpoint, empty, dtype),
    )
    return loaded  # type: ignore[no-any-return]


def load_tokenizer(
    source: Checkpoint | Path, *, task: str = "causal-lm", trust_remote_code: bool = False
) -> Any:
    """The tokenizer in the folder of a checkpoint or adapter, with the options of `task`.

    Raises:
        UserError: there is none that transformers can read.
    """
    folder = source.folder if isinstance(source, Checkpoint) else source
    options = dict(task_named(task).tokenizer_options)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no tokenizer that can be read: {first_line(error)}"
        ) from error


def share_pad(model: PreTrainedModel, pad_token_id: int | None) -> None:
    """Give a classifier without a pad token this one, and record it for its adapter's files.

    A decoder reads the label of a row from its last token that is not padding.
    """
    text, task = model.config.get_text_config(), task_of(model)
    if task is not None and task.trains_head and text.pad_token_id is None:
        text.pad_token_id = state_of(model).pad_token_id = pad_token_id


def _original_weights(
    checkpoint: Checkpoint, plan: nn.Module, dtype: torch.dtype
) -> OriginalWeights:
    layers = linear_layers(plan)
    names = {name: disk_name(checkpoint, plan, f"{name}.weight") for name in layers}
    transposed = {name for name, layer in layers.items() if not isinstance(layer, nn.Linear)}
    known = {name: found for name, found in names.items() if found}
    return OriginalWeights(checkpoint, known, frozenset(transposed), dtype)


def default_device() -> torch.device:
    """The current GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _require_in_16_bits(checkpoint: Checkpoint) -> None:
    if method := (checkpoint.config.get("quantization_config") or {}).get("quant_method"):
        raise UserError(
            f"{checkpoint.name or checkpoint.folder} is already quantized, with {method}: give the "
            "16-bit model it was made from, or a bitsandbytes 4-bit one"
        )


def _keep_dense(config: Any, modules: Iterable[str]) -> None:
    """Tell transformers that a 4-bit checkpoint has no codes of `modules`."""
    settings = config.quantization_config
    skipped = [*(settings.get("llm_int8_skip_modules") or []), *modules]
    config.quantization_config = {**settings, "llm_int8_skip_modules": skipped}


def compute_dtype(quant: QuantConfig, device: torch.device) -> torch.dtype:
    """The dtype everything but the codes is held and computed in; `auto` asks the hardware."""
    if quant.compute_dtype != "auto":
        return nf4.DTYPES[quant.compute_dtype]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    # torch's own tests for bf16 units; its "is bf16 supported" also counts slow emulation.
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def _skipped(model: nn.Module, quant: QuantConfig) -> list[str]:
    """The layers transformers must leave alone, as the anchored patterns it matches with."""
    chosen = quantized_layers(model, quant)
    return [f"{re.escape(name)}$" for name in linear_layers(model) if name not in chosen]


def unquantized_linear(model: nn.Module, quant: QuantConfig) -> dict[str, int]:
    """Matrices that are neither quantized, nor skipped on purpose, nor an embedding; their values.

    Plain matrices that make up less than 1 % of the model together are left out: routers, which
    nobody quantizes.
    """
    left_out, kept = heads_of(model), kept_dense(model)
    total = sum(p.numel() for p in model.parameters())
    chosen = quantized_layers(model, quant)
    found: dict[str, int] = {}
    matrices: dict[str, int] = {}
    for name, module in model.named_modules():
        known = isinstance(module, nn.Embedding | nn.modules.conv._ConvNd)
        known = known or name in kept or is_in(name, left_out)
        if known or name in chosen or is_skipped(name, quant.skip_modules):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                kind = found if parameter.ndim >= 3 else matrices
                kind[f"{name}.{leaf}".lstrip(".")] = parameter.numel()
    return found | (matrices if sum(matrices.values()) > total / 100 else {})


def _require_all_quantized(model: nn.Module, quant: QuantConfig) -> None:
    if kept := kept_dense(model):
        size = sum(model.get_parameter(f"{name}.weight").numel() for name in kept)
        print(
            f"{', '.join(sorted({name.rpartition('.')[2] for name in kept}))} of this family is "
            f"never quantized: {len(kept)} layers, {size * 2 / 2**30:.2f} GiB, stay in 16 bits"
        )
    left = unquantized_linear(model, quant)
    if not left or quant.allow_unquantized:
        return
    shown = ", ".join(f"{name} ({size:,} values)" for name, size in list(left.items())[:4])
    raise UserError(
        f"{len(left)} linear weights cannot be quantized to 4 bits and would stay in 16: {shown}"
        f"{', …' if len(left) > 4 else ''}; {sum(left.values()) * 2 / 2**30:.2f} GiB in all. "
        "Take another model, or go on as it is with --allow-unquantized"
    )


def own_quantization(checkpoint: Checkpoint, quant: QuantConfig) -> QuantConfig:
    """The settings of a checkpoint that is already 4-bit, with `quant`'s compute dtype."""
    name = next(n.partition(".quant_state.")[0] for n in checkpoint.tensors if ".quant_state." in n)
    record = checkpoint.record(name)
    assert record is not None
    state = nf4.from_record(record).state
    own = QuantConfig(
        quant_type=state.quant_type,
        blocksize=state.blocksize,
        double_quant=state.nested,
        compute_dtype=quant.compute_dtype,
    )
    asked = replace(quant, allow_unquantized=False)
    if asked not in (own, QuantConfig(compute_dtype=quant.compute_dtype)):
        print(
            f"{checkpoint.folder} is 4-bit already: {own.quant_type}, blocksize {own.blocksize}, "
            f"double quantization {'on' if own.double_quant else 'off'}; the settings given for "
            "quantization do not apply"
        )
    return own


def _require_right_kernel(model: PreTrainedModel) -> None:
    """Refuse widths for which bitsandbytes would compute with wrong weights, silently, on a CPU."""
    if model.device.type != "cpu":
        return
    wrong = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            if not nf4.kernel_is_right(module.in_features, weight.quant_state.blocksize):
                wrong[module.in_features] = (name, weight.quant_state.blocksize)
    if wrong:
        width, (name, blocksize) = next(iter(wrong.items()))
        raise UserError(
            f"blocksize {blocksize} does not divide the {width} inputs of {name}, and "
            "bitsandbytes computes such layers wrongly on this CPU: use a GPU, or a --blocksize "
            f"that divides {', '.join(map(str, wrong))}"
        )


def _freeze(model: PreTrainedModel, dtype: torch.dtype) -> None:
    model.requires_grad_(False)
    # Of a checkpoint that is 4-bit already transformers leaves norm weights in the dtype they have.
    overflows = kept_dense(model) if dtype == torch.float16 else []
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            own = torch.float32 if name.rpartition(".")[0] in overflows else dtype
            parameter.data = parameter.data.to(own)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.compute_type_is_set = True
            # In eval mode on a CPU with bf16 units bitsandbytes would repack the weight in place,
            # its absmax rounded to bf16, in a form that has no backward pass.
            module.support_avx512bf16_for_cpu = False


# ---- bitsandbytes through transformers, with a blocksize ----
# BitsAndBytesConfig cannot say the blocksize. A registered quantizer of our own, the public way to
# extend transformers, sets it on the still empty parameters; after loading, the model is
# indistinguishable from one that BitsAndBytesConfig loaded.

_METHOD = "qlora_bnb_4bit"


@register_quantization_config(_METHOD)
class _Bnb4BitConfig(BitsAndBytesConfig):
    def __init__(self, quant: QuantConfig, dtype: torch.dtype, skip: list[str]) -> None:
        super().__init__(  # type: ignore[no-untyped-call]  # transformers does not type it
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.quant_type,
            bnb_4bit_use_double_quant=quant.double_quant,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip,
        )
        self.quant_method: Any = _METHOD
        self.blocksize = quant.blocksize

    def as_bitsandbytes(self, model: PreTrainedModel) -> None:
        """Let `model` say of itself what it now is: a plain bitsandbytes 4-bit model."""
        skip = [s.removesuffix("$").replace("\\", "") for s in self.llm_int8_skip_modules]
        plain = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=self.bnb_4bit_compute_dtype,
            llm_int8_skip_modules=skip,
        )
        loaded: Any = model
        loaded.config.quantization_config = plain
        loaded.hf_quantizer.quantization_config = plain
        loaded.quantization_method = QuantizationMethod.BITS_AND_BYTES
        loaded.is_loaded_in_4bit = True


@register_quantizer(_METHOD)
class _Bnb4BitQuantizer(Bnb4BitHfQuantizer):
    quantization_config: Any

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, **kwargs: Any
    ) -> None:
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                weight: Any = module.weight
                weight.blocksize = self.quantization_config.blocksize


def heads_to_train(checkpoint: Checkpoint, model: nn.Module, task: str) -> list[str]:
    """The modules that a classifier trains in full: its head, and a pooler that was never trained,
    as the checkpoint lacks it."""
    if not task_named(task).trains_head:
        return []
    pooler = f"{getattr(model, 'base_model_prefix', '')}.pooler"
    below = [name for name in linear_layers(model) if is_in(name, [pooler])]
    lacks = any(disk_name(checkpoint, model, f"{name}.weight") is None for name in below)
    return [*heads_of(model), *([pooler] if lacks else [])]


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block transformers logs errors alone."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def complete(
    model: nn.Module,
    plan: nn.Module,
    checkpoint: Checkpoint,
    info: Mapping[str, Any],
    new: Iterable[str],
    seed: int,
) -> None:
    """Make what the checkpoint lacks of the modules `new`; refuse it where it lacks more, as
    transformers would make up random tensors."""
    misshapen = {name for name, *_ in info["mismatched_keys"]}
    # transformers 5.17 takes any shape where something is quantized
    shapes = {n: p.shape for n, p in plan.named_parameters() if is_in(n, new)}
    misshapen |= {n for n, shape in shapes.items() if model.get_parameter(n).shape != shape}
    missing = sorted({*info["missing_keys"], *misshapen})
    lacks = [name for name in missing if not is_in(name, new)]
    if lacks:
        raise UserError(
            f"{checkpoint.folder} lacks {len(lacks)} tensors of its model, or has them in "
            f"another shape: {', '.join(lacks[:4])}{', …' if len(lacks) > 4 else ''}. "
            "Download or copy it again"
        )
    if missing:
        made = sorted({head for head in new for name in missing if is_in(name, [head])})
        print(f"The checkpoint has no {', '.join(made)} of this shape: made anew, seed {seed}")
        _initialise(model, {name: shapes[name] for name in missing}, seed)


def _initialise(model: nn.Module, shapes: Mapping[str, torch.Size], seed: int) -> None:
    """New values for parameters: matrices normal with the model's initializer_range, the rest as in
    a new model. Drawn on the CPU, so a seed means the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = getattr(model, "config", None)
    std = getattr(config, "initializer_range", None) or 0.02
    for name, shape in shapes.items():
        values = torch.zeros(shape)
        if values.ndim > 1:
            values.normal_(std=std, generator=generator)
        elif name.endswith("weight"):  # of a norm
            values.fill_(1)
        parameter = model.get_parameter(name)
        parameter.data = values.to(parameter)
