"""A model for inference: resolved and checked from headers only, then loaded.

`resolve_model` finds the checkpoint and the adapter that a command names and raises before it reads
anything large. `ResolvedModel.load` loads a base with its live adapter, or a model without one, in
16 or 4 bits. Everything else that needs a base with its adapter calls `load_live`.

The base is quantized as in training. The compute dtype is fp32 if training used fp32, else the
best 16-bit dtype that this machine has units for, or fp32: on the same kind of machine as in
training the losses are the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from qlora.adapters.files import attach, check_fits
from qlora.adapters.format import (
    CONFIG,
    AdapterFile,
    read_adapter,
    require_same_base,
    require_same_codes,
)
from qlora.base.checkpoint import Checkpoint, skeleton
from qlora.base.load import (
    DTYPE_NAMES,
    compute_dtype,
    default_device,
    load_base,
    load_dense,
    load_tokenizer,
    unlike_bnb,
)
from qlora.base.modules import state_of
from qlora.config import ModelChoice, QuantConfig
from qlora.config.tasks import TASKS, task_named
from qlora.errors import UserError, require
from qlora.ops import nf4


def load_live(
    base: str | Checkpoint,
    adapter: AdapterFile,
    *,
    quant: QuantConfig | None = None,
    in_4_bits: bool = True,
    device: Any = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """`base`, by default in 4 bits, with `adapter` active on it, frozen and in eval mode; `quant`
    is by default that of training. Raises UserError if the base cannot be loaded or the adapter
    does not fit."""
    known: Any = {"device": device, "trust_remote_code": trust_remote_code}
    model = load_plain(base, adapter, quant or adapter.quantization, in_4_bits, **known)
    attach(model, adapter)
    model.eval()
    return model


def load_plain(
    base: str | Checkpoint, adapter: AdapterFile, quant: QuantConfig, in_4_bits: bool, **known: Any
) -> PreTrainedModel:
    """The base alone, for the adapter's task; `known`: device and trust_remote_code. PEFT's are of
    a base that transformers has quantized (`bnb_layers`)."""
    checkpoint = Checkpoint.open(base) if isinstance(base, str) else base
    if not in_4_bits:
        return load_dense(checkpoint, quant, task=adapter.task, **known)
    labels, ours, theirs = adapter.labels, list[str](), list[str]()
    if not (adapter.knows_quantization or checkpoint.is_quantized):
        of_code = {"labels": labels, "trust_remote_code": known.get("trust_remote_code", False)}
        empty = skeleton(checkpoint.folder, task=task_named(adapter.task), **of_code)
        ours, theirs = unlike_bnb(empty, quant)
    skipping = replace(quant, skip_modules=(*quant.skip_modules, *ours))
    model = load_base(checkpoint, skipping, task=adapter.task, labels=labels, **known)
    for weight in (model.get_parameter(f"{name}.weight") for name in theirs):
        weight.data = nf4.round_trip(weight, quant).to(weight)  # whose codes no model could read
    state_of(model).unlike_bnb = ()
    return model


@dataclass(frozen=True)
class ResolvedModel:
    """A model, or a base and its adapter, found and checked but not loaded."""

    choice: ModelChoice
    name: str
    """of the base or model, as the user gave it"""
    checkpoint: Checkpoint
    adapter: AdapterFile | None

    @property
    def task(self) -> str:
        return self.adapter.task if self.adapter else task_in(self.checkpoint.config)

    @property
    def what(self) -> str:
        return f"adapter {self.adapter.folder}" if self.adapter else f"model {self.name}"

    def describe(self) -> str:
        """One line: adapter, base, bits and compute dtype."""
        quant = self.quantization
        bits = f"4-bit {quant.quant_type.upper()}, " if self.in_4_bits else ""
        prefix = f"{self.adapter.folder}, an adapter on " if self.adapter else ""
        return f"{prefix}{self.name} ({bits}computed in {quant.compute_dtype})"

    @property
    def in_4_bits(self) -> bool:
        is_chosen = self.adapter is not None or self.choice.load_in_4bit
        return is_chosen or self.checkpoint.is_quantized

    @property
    def labels(self) -> tuple[str, ...]:
        if self.adapter:
            return self.adapter.labels
        named = self.checkpoint.labels or ("LABEL_0", "LABEL_1")  # transformers' default
        return named if task_named(self.task).trains_head else ()

    @property
    def quantization(self) -> QuantConfig:
        """The settings of its 4-bit layers, with the compute dtype for this machine."""
        dtype = self.choice.compute_dtype
        quant = self.adapter.quantization if self.adapter else QuantConfig()
        if dtype == "auto":
            fastest = DTYPE_NAMES[compute_dtype(QuantConfig(), default_device())]
            trained_in = quant.compute_dtype
            dtype = trained_in if trained_in in ("fp32", fastest) else fastest
        return replace(quant, compute_dtype=dtype, allow_unquantized=True)

    def load_tokenizer(self) -> Any:
        """The tokenizer that training saved with the adapter, else the checkpoint's."""
        folder = self.checkpoint.folder
        if self.adapter and self.adapter.has_tokenizer:
            folder = self.adapter.folder
        trusted = self.choice.trust_remote_code
        return load_tokenizer(folder, task=self.task, trust_remote_code=trusted)

    def load(self) -> PreTrainedModel:
        """The model in eval mode, on the GPU where there is one."""
        checkpoint, quant = self.checkpoint, self.quantization
        trusted: Any = {"trust_remote_code": self.choice.trust_remote_code}
        if self.adapter:
            return load_live(checkpoint, self.adapter, quant=quant, **trusted)
        if self.in_4_bits:
            model = load_base(checkpoint, quant, task=self.task, labels=self.labels, **trusted)
        else:
            model = load_dense(checkpoint, quant, task=self.task, **trusted)
        model.eval()
        return model


def resolve_model(choice: ModelChoice) -> ResolvedModel:
    """The model, or base and adapter, that `choice` names, checked from headers only. Raises
    UserError if there is no such adapter or model, or the adapter is of another base."""
    if choice.adapter is None:
        name = str(choice.model)
        is_adapter = (Path(name).expanduser() / CONFIG).is_file()
        require(not is_adapter, f"{name} is an adapter, not a whole model: give it as --adapter")
        checkpoint = Checkpoint.open(name)
        require_task(checkpoint, task_in(checkpoint.config))
        return ResolvedModel(choice, name, checkpoint, None)
    folder = Path(choice.adapter).expanduser()
    if not (folder / CONFIG).is_file():
        is_model = (folder / "config.json").is_file()
        require(not is_model, f"{folder} is a whole model, not an adapter: give it as --model")
        steps = [int(p.parent.name[11:]) for p in folder.glob(f"checkpoint-*/{CONFIG}")]
        last = folder / f"checkpoint-{max(steps, default=0)}"
        why = f"{folder} is an unfinished run, so it holds no adapter"
        require(not steps, f"{why}: give its last checkpoint, {last}")
    adapter = read_adapter(folder)
    name = choice.base_model or adapter.base_model or ""
    require(name != "", f"adapter {adapter.folder} names no base model: give --base-model")
    revision = adapter.revision if name == adapter.base_model else None
    try:
        checkpoint = Checkpoint.open(name, revision=revision)
    except UserError as error:
        if choice.base_model:
            raise
        what = f"adapter {adapter.folder} was trained on {name}, which could not be found"
        raise UserError(f"{what}: {error}. Give the base as --base-model") from error
    require_same_base(adapter, checkpoint.fingerprint, str(checkpoint.folder))
    require_same_codes(checkpoint, adapter)
    if not adapter.subtracted:  # otherwise attach checks it, which needs weights, not only shapes
        task, trusted = task_named(adapter.task), choice.trust_remote_code
        known: Any = {"task": task, "labels": adapter.labels, "trust_remote_code": trusted}
        check_fits(skeleton(checkpoint.folder, **known), adapter)
    return ResolvedModel(choice, name, checkpoint, adapter)


def require_task(checkpoint: Checkpoint, task: str) -> None:
    """Refuse a checkpoint as a causal language model if its class generates no text: BERT's encoder
    would be loaded, with attention in both directions. A bare `...Model` may lack only the head."""
    for found in checkpoint.config.get("architectures") or ():
        known = None if found.endswith("Model") else getattr(transformers, found, None)
        if task == "causal-lm" and known is not None and not known.can_generate():
            raise UserError(
                f"model {checkpoint.origin} is a {found}, which generates no text: give a "
                "language model, causal or encoder-decoder, or a classifier"
            )


def task_in(config: Mapping[str, Any]) -> str:
    """The name of a checkpoint's task, from its config.json."""
    classes = config.get("architectures") or ()
    for name, task in TASKS.items():
        if task.trains_head and any(found.endswith(task.class_ending) for found in classes):
            return name
    return "seq2seq" if config.get("is_encoder_decoder") else "causal-lm"
