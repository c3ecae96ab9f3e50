"""Waits of the host for a GPU in an optimizer step, counted on a CPU.

One step of 2 micro-batches by AdapterTrainer, on a tiny model: operators and calls for which the
host would wait, each with its line. As on a GPU attention is varlen_attn (replaced by a function
that computes nothing), the loss is computed in chunks, and the optimizer is paged and keeps its
states in memory that the host shares. Copies to the GPU do not wait, from pinned memory.
"""

import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes.optim.optimizer as bnb_optimizer
import torch
from datasets import Dataset
from meta_gpu import write_narrow
from step_sides import any_tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, TrainerCallback

from qlora.adapters.apply import apply_lora
from qlora.base.load import load_base
from qlora.config import DataConfig, TrainConfig
from qlora.fast import attention
from qlora.ops import loss
from qlora.training import optimizers, prepare_for_training
from qlora.training.trainer import make_trainer

WAITS = (
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select",
    "aten::_unique2", "aten::bincount",
)  # fmt: skip
AS_ON_GPU: tuple[tuple[Any, str, Any], ...] = (
    (optimizers, "SLOW_ON", "cpu"),
    (loss, "CHUNK_BYTES", {}),
    (loss, "GPU_CHUNK_BYTES", 1),  # so that the few tokens are more than a chunk
    (attention, "varlen_attn", lambda q, *_, **__: q),
)
TOKENS = 8  # of a row


class Waits(TorchDispatchMode):
    """The operators and calls for which the host waits for the GPU, each with its line."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.is_on = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in WAITS:
            self.note(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        """Count one at the innermost line outside torch."""
        if self.is_on:
            frames = [f for f in traceback.extract_stack()[:-2] if _is_own(f.filename)]
            self.found[f"{what} {_place(frames[-1])}"] += 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count within the block, calls of `torch.cuda.synchronize` and the like as well."""
        with ExitStack() as stack:
            for owner, name in (
                (torch.cuda, "synchronize"), (Tensor, "tolist"), (Tensor, "cpu"), (Tensor, "numpy"),
                (bnb_optimizer, "sync_gpu"), (optimizers, "sync_gpu"),
            ):  # fmt: skip
                real = getattr(owner, name)
                stack.enter_context(patch.object(owner, name, self._counted(real, name)))
            stack.enter_context(self)
            yield

    def _counted(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.note(name)
            return None if name == "synchronize" else real(*args, **kwargs)

        return call


def _is_own(file: str) -> bool:
    return "/torch/" not in file and Path(file) != Path(__file__)


def _place(frame: traceback.FrameSummary) -> str:
    """The package's file and the line."""
    file = frame.filename.rpartition("site-packages/")[2]
    return f"{file[file.rfind('qlora/') :] if '/qlora/' in file else file}:{frame.lineno}"


class SecondStep(TrainerCallback):
    """Turns counting on for the second of three steps."""

    def __init__(self, trainer: Any, waits: Waits) -> None:
        self.trainer, self.waits = trainer, waits

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.waits.is_on = state.global_step == 1
        inner = self.trainer.optimizer
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        inner.is_paged = True  # as on a GPU; its states exist by now


def count_waits(config: PretrainedConfig) -> dict[str, int]:
    """Waits of an optimizer step of a narrow model of this config, by operator or call and line."""
    waits = Waits()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        write_narrow(config, folder)
        run = TrainConfig(
            model=folder, output_dir=f"{folder}/out", data=DataConfig(folder), max_steps=3,
            gradient_accumulation_steps=2, learning_rate=1e-3, logging_steps=100,
            trainer={"logging_first_step": False},
        )  # fmt: skip
        model = apply_lora(load_base(folder, run.quant, device="cpu"), run.lora)
        prepare_for_training(model)
        row = {"input_ids": [5] * TOKENS, "labels": [5] * TOKENS, "length": TOKENS}
        with ExitStack() as stack:
            for module, name, value in AS_ON_GPU:
                stack.enter_context(patch.object(module, name, value))
            trainer = make_trainer(run, model, any_tokenizer(), Dataset.from_list([row] * 16), None)
            model.set_attn_implementation(attention.VARLEN)
            trainer.add_callback(SecondStep(trainer, waits))
            stack.enter_context(waits.watching())
            trainer.train()
    return dict(waits.found.most_common())
