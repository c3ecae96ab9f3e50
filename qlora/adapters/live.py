"""The model that is to be tried: found and checked before anything large is read, then loaded.

An adapter is put live on its base, quantized as in training; a whole model stays as it is, 16-bit
or 4-bit. What is computed in is fp32 where training computed in it, else the best 16 bits that this
machine has units for, or fp32: the same as in training, and the same losses, on a like machine.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from qlora.adapters.files import attach, check_fits
from qlora.adapters.format import (
    CONFIG,
    AdapterFile,
    read_adapter,
    require_same_base,
    require_same_codes,
)
from qlora.base.checkpoint import Checkpoint, resolve, skeleton
from qlora.base.load import DTYPE_NAMES, compute_dtype, default_device, load_base
from qlora.base.tasks import TASKS, task_named
from qlora.config import ModelChoice, QuantConfig
from qlora.errors import UserError, first_line


@dataclass(frozen=True)
class Found:
    """A model that is there and fits together, not loaded yet."""

    choice: ModelChoice
    name: str
    """of the base, or of the whole model, as it was given"""
    checkpoint: Checkpoint
    adapter: AdapterFile | None
    revision: str | None = None

    @property
    def task(self) -> str:
        """What the model is for."""
        return self.adapter.task if self.adapter else task_in(self.checkpoint.config)

    @property
    def what(self) -> str:
        """It, in a message."""
        return f"adapter {self.adapter.folder}" if self.adapter else f"model {self.name}"

    def describe(self) -> str:
        """One line of what is loaded."""
        quant = self.quantization
        bits = f"4-bit {quant.quant_type.upper()}, " if self.in_4_bits else ""
        own = f"{self.adapter.folder}, an adapter on " if self.adapter else ""
        return f"{own}{self.name} ({bits}computed in {quant.compute_dtype})"

    @property
    def in_4_bits(self) -> bool:
        """Whether its linear layers are, once it is loaded."""
        asked = self.adapter is not None or self.choice.load_in_4bit
        return asked or self.checkpoint.is_quantized

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of a classifier's labels."""
        if self.adapter:
            return self.adapter.labels
        names = self.checkpoint.config.get("id2label") or {}
        is_classifier = task_named(self.task).trains_head
        return tuple(names[i] for i in sorted(names, key=int)) if is_classifier else ()

    @property
    def quantization(self) -> QuantConfig:
        """How it is loaded in 4 bits."""
        asked = self.choice.compute_dtype
        quant = self.adapter.quantization if self.adapter else QuantConfig()
        if asked == "auto":
            own = DTYPE_NAMES[compute_dtype(QuantConfig(), default_device())]
            asked = quant.compute_dtype if quant.compute_dtype in ("fp32", own) else own
        return replace(quant, compute_dtype=asked, allow_unquantized=True)

    def load_tokenizer(self) -> Any:
        """The tokenizer that training left with the adapter, else the model's own."""
        own = self.adapter is not None and self.adapter.has_tokenizer
        folder = self.adapter.folder if self.adapter and own else self.checkpoint.folder
        try:
            return AutoTokenizer.from_pretrained(
                folder,
                trust_remote_code=self.choice.trust_remote_code,
                **dict(task_named(self.task).tokenizer_options),
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder} holds no tokenizer to be read: {first_line(error)}"
            ) from error

    def load(self) -> PreTrainedModel:
        """The model, to write and to measure with: on the GPU where there is one."""
        with _bars_for_people():
            return self._load()

    def _load(self) -> PreTrainedModel:
        trusted: Any = {"trust_remote_code": self.choice.trust_remote_code}
        if not self.in_4_bits:
            device = default_device()
            whole: PreTrainedModel = task_named(self.task).load("from_pretrained")(
                self.checkpoint.folder,
                dtype=compute_dtype(self.quantization, device),
                device_map={"": device},
                **trusted,
            )
            whole.eval()
            return whole
        model = load_base(
            self.name,
            self.quantization,
            task=self.task,
            labels=self.labels,
            revision=self.revision,
            **trusted,
        )
        if self.adapter:
            check_fits(model, self.adapter)
            attach(model, self.adapter)
            _share_pad(model, self.adapter.base)
        model.eval()
        return model


@contextmanager
def _bars_for_people() -> Iterator[None]:
    """Inside the block transformers shows a progress bar on a terminal alone, not in a log."""
    hides = transformers_logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hides:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hides:
            transformers_logging.enable_progress_bar()


def find(choice: ModelChoice) -> Found:
    """What `choice` names, from headers alone.

    Raises:
        UserError: there is no such adapter or model, or the two do not belong together.
    """
    if choice.adapter is None:
        name = str(choice.model)
        if (Path(name).expanduser() / CONFIG).is_file():
            raise UserError(f"{name} is an adapter, not a whole model: give it as --adapter")
        return Found(choice, name, Checkpoint(resolve(name)), None)
    _require_adapter(Path(choice.adapter).expanduser())
    adapter = read_adapter(choice.adapter)
    name = choice.base_model or adapter.base_model or ""
    if not name:
        raise UserError(f"adapter {adapter.folder} names no base model: give --base-model")
    revision = adapter.revision if name == adapter.base_model else None
    try:
        checkpoint = Checkpoint(resolve(name, revision=revision))
    except UserError as error:
        if choice.base_model:
            raise
        raise UserError(
            f"adapter {adapter.folder} was trained on {name}, which is not to be had: {error}. "
            "Give the base's new place as --base-model"
        ) from error
    found = Found(choice, name, checkpoint, adapter, revision)
    _require_together(found, adapter)
    return found


def task_in(config: Mapping[str, Any]) -> str:
    """The name of the task that a checkpoint's config.json is for."""
    classes = config.get("architectures") or ()
    for name, task in TASKS.items():
        if task.trains_head and any(found.endswith(task.class_ending) for found in classes):
            return name
    return "seq2seq" if config.get("is_encoder_decoder") else "causal-lm"


def _require_adapter(folder: Path) -> None:
    """Say of some folders what they are in place of an adapter."""
    if (folder / CONFIG).is_file():
        return
    if (folder / "config.json").is_file():
        raise UserError(f"{folder} is a whole model, not an adapter: give it as --model")
    steps = [int(p.parent.name[11:]) for p in folder.glob(f"checkpoint-*/{CONFIG}")]
    if steps:
        raise UserError(
            f"{folder} is of a run that did not end, so it holds no adapter: give its last "
            f"checkpoint, {folder / f'checkpoint-{max(steps)}'}"
        )


def _require_together(found: Found, adapter: AdapterFile) -> None:
    """Refuse a base on which the adapter was not trained, before it is loaded."""
    checkpoint = found.checkpoint
    require_same_base(adapter, checkpoint.fingerprint, str(checkpoint.folder))
    require_same_codes(checkpoint, adapter)
    if not adapter.taken:  # that one wants weights, not shapes: attach looks
        plan = skeleton(
            checkpoint.folder,
            task=found.task,
            labels=found.labels,
            trust_remote_code=found.choice.trust_remote_code,
        )
        check_fits(plan, adapter)


def _share_pad(model: PreTrainedModel, base: Mapping[str, Any]) -> None:
    """A classifier that is a decoder reads its label off the last token that is no pad."""
    text = model.config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = base.get("pad_token_id")
