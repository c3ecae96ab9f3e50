"""What a run does when memory runs out.

    micro-batch, in either pass   the optimizer step is begun again, micro-batches in halves
    one row                       activations are kept in host memory (on a GPU)
    evaluation                    the batch is split
    optimizer, saving             the run ends; the last checkpoint is whole

A step's loss is a sum over its labels, divided once by their number: it is the same in parts, to
rounding, and the smaller size stays for the rest of the run. A step is begun again because the
backward pass may have added a part of its gradients already; the random generators are put back,
so that dropout draws the same numbers where a batch was not split.

Each rank of several does this for itself: gradients travel once a step, when all passes are done.

accelerate's find_executable_batch_size, transformers' auto_find_batch_size, instead begins the run
again with smaller batches, and so with another number of rows a step.
"""

import gc
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from qlora.base.sharding import is_sharded
from qlora.errors import UserError
from qlora.fast.offload import offload_activations
from qlora.training import ranks
from qlora.training.checkpoints import complete_checkpoints

T = TypeVar("T")
Batch = Mapping[str, Any]
# Errors of an allocation that are no torch.OutOfMemoryError. On a full card cuBLAS cannot start,
# and Triton cannot load a kernel.
PHRASES = (
    "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
    "CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "DefaultCPUAllocator: ",
)  # fmt: skip
ONEDNN = "could not create a primitive"  # on a CPU, in a product; the whole message
PLAIN = (bool, int, float, str, NoneType)
OFFLOADS_FROM = "cuda"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a tensor could not be allocated."""
    is_phrase = any(phrase in str(error) for phrase in PHRASES) or str(error) == ONEDNN
    is_error = isinstance(error, RuntimeError) and is_phrase
    return isinstance(error, torch.OutOfMemoryError) or is_error


def free_unused() -> None:
    """Free tensors that only reference cycles hold, and what the allocator keeps for reuse."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Rewind:
    """What a pass changes besides gradients, to put it back: the random generators, and in modules
    with buffers the buffers and plain values, as a batch norm or RoPE of dynamic length has."""

    def __init__(self, model: nn.Module) -> None:
        device = next(model.parameters()).device
        self.generators = [torch.default_generator]
        if device.type == "cuda":
            self.generators.append(torch.cuda.default_generators[device.index or 0])
        self.modules = [module for module in model.modules() if module._buffers]

    def mark(self) -> None:
        """Remember the values of now."""
        self.random = random.getstate(), np.random.get_state()
        self.states = [generator.get_state() for generator in self.generators]
        self.values: list[tuple[nn.Module, dict[str, Any], dict[str, Tensor]]] = []
        self.copies: list[tuple[Tensor, Tensor]] = []
        for module in self.modules:
            buffers = {name: b for name, b in module._buffers.items() if b is not None}
            if buffers:
                plain = {name: v for name, v in vars(module).items() if isinstance(v, PLAIN)}
                self.values.append((module, plain, buffers))
                # not only those of another _version: a batch norm does not count its changes
                self.copies += [(b, b.detach().clone()) for b in buffers.values()]

    @torch.no_grad()
    def back(self) -> None:
        """Put the values of `mark` back."""
        random.setstate(self.random[0])
        np.random.set_state(self.random[1])
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
        for module, plain, buffers in self.values:
            module._buffers.update(buffers)
            vars(module).update(plain)
        for buffer, copy in self.copies:
            buffer.copy_(copy)


# ---- a batch in parts


def tokens_in(batch: Batch) -> int:
    """Tokens of a batch, with padding, and of both sides of an encoder-decoder."""
    answers = batch.get("decoder_input_ids")
    return int(batch["input_ids"].numel() + (0 if answers is None else answers.numel()))


def starts_in(batch: Batch) -> list[int]:
    """Where the rows of a single pack (1, T) begin, without the pads' own row."""
    is_start = (batch["position_ids"][0] == 0) & batch["attention_mask"][0].bool()
    return [int(i) for i in is_start.nonzero().flatten().tolist()]


def rows_in(batch: Batch) -> int:
    """Rows of a batch, whether padded, concatenated or packed."""
    if "position_ids" not in batch:
        return len(batch["input_ids"])
    starts = (batch["position_ids"] == 0) & batch["attention_mask"].bool()
    return int(starts.sum())


def halves(batch: Batch) -> list[Batch]:
    """The batch as two of whole rows; as it is if it has one row.

    Padded rows and packs (B, T) are split by B; a single pack, or concatenated rows (1, T), at the
    row that begins nearest to the middle.
    """
    count, width = batch["input_ids"].shape
    if count > 1:
        places = slice(count // 2), slice(count // 2, None)
        return [_trimmed({k: v[at] for k, v in batch.items()}) for at in places]
    starts = starts_in(batch) if "position_ids" in batch else []
    if len(starts) < 2:
        return [batch]
    end = int(batch["attention_mask"][0].sum())  # pads, if any, are at the end
    middle = min(starts[1:], key=lambda start: abs(start - end / 2))
    halved: list[Batch] = []
    for begin, stop in ((0, middle), (middle, end)):
        half = {k: v[:, begin:stop] for k, v in batch.items() if _is_per_token(v, width)}
        if "cu_seq_lens_q" in batch:  # of FlatCollator
            within = [start - begin for start in starts if begin <= start < stop]
            bounds = torch.tensor([*within, stop - begin], dtype=torch.int32)
            longest = int(bounds.diff().max())
            bounds = bounds.to(batch["input_ids"].device)
            half |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            half |= {"max_length_q": longest, "max_length_k": longest}
        halved.append(half)
    return halved


def _trimmed(batch: Batch) -> Batch:
    """Packs (B, T) without the columns that only pads have: T is that of the longest pack."""
    if "position_ids" not in batch:
        return batch
    longest = int(batch["attention_mask"].sum(1).max())
    return {k: v[:, :longest] for k, v in batch.items()}


def _is_per_token(value: Any, width: int) -> bool:
    return isinstance(value, Tensor) and value.shape == (1, width)


class Parts:
    """Computes batches whole, or in parts of whole rows once memory has run out.

    Args:
        trainer: an AdapterTrainer.
        trains: whether gradients are computed: then a failed step is begun again, and activations
            may be kept in host memory.
    """

    def __init__(self, trainer: Any, *, trains: bool) -> None:
        self.trainer, self.trains = trainer, trains
        self.rewind = Rewind(trainer.model)
        self.most_tokens = math.inf  # a larger batch is split
        self.where = ""  # "the dry step"; by default the number of the step
        self.tried: Batch = {}

    def run(self, batches: list[Batch], compute: Callable[[Batch], T]) -> list[list[T]]:
        """`compute` of each part of the last batch; where memory ran out, of all `batches`, those
        of the optimizer step so far: it was begun again.

        Raises UserError if a single row does not fit.
        """
        wanted = batches[-1:]
        while True:
            try:
                return [[self._try(part, compute) for part in self.parts(b)] for b in wanted]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            if is_sharded(self.trainer.model):  # each rank has as many passes
                free_unused()
                raise UserError(ran_out(self.trainer, f"in {self._place()}"))
            # here, as the error holds the tensors of its frames
            if self.trains:
                self.put_back()
                wanted = batches
            free_unused()
            self._need_less()

    def _try(self, part: Batch, compute: Callable[[Batch], T]) -> T:
        self.tried = part
        return compute(part)

    def parts(self, batch: Batch) -> list[Batch]:
        """`batch`, in halves and their halves until each has `most_tokens` or one row."""
        if tokens_in(batch) <= self.most_tokens:
            return [batch]
        split = halves(batch)
        return split if len(split) == 1 else [part for half in split for part in self.parts(half)]

    def put_back(self) -> None:
        """Drop the gradients; put random generators and modules back."""
        self.trainer.model.zero_grad()
        self.rewind.back()

    def _place(self) -> str:
        step = self.trainer.state.global_step + self.trains
        return self.where or f"{'step' if self.trains else 'the evaluation after step'} {step}"

    def _need_less(self) -> None:
        """Split batches of as many tokens from now on, or offload; say so."""
        trainer, rows, tokens = self.trainer, rows_in(self.tried), tokens_in(self.tried)
        where = self._place()
        shown = f"{rows} row{'s' * (rows != 1)}, {tokens:,} tokens"
        split = halves(self.tried)
        self.tried = {}
        if len(split) > 1:
            self.most_tokens, most = tokens - 1, max(map(rows_in, split))
            change = f"such batches are computed in parts of at most {most}, with the same loss"
        elif self.trains and trainer.offload is None and _is_on(trainer, OFFLOADS_FROM):
            trainer.offload = offload_activations()
            change = "activations are kept in host memory, as by --offload-activations"
        else:
            raise UserError(ran_out(trainer, f"in {where}, at {shown}"))
        ranks.tell(f"{where}: {_memory(trainer)} ran out at {shown}: from now on {change}")


# ---- errors


@contextmanager
def out_of_memory_in(trainer: Any, what: str) -> Iterator[None]:
    """The block's out-of-memory error as a UserError, `what` naming the block."""
    has_failed = False
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        has_failed = True
    if has_failed:  # here, as the error holds the tensors of its frames
        free_unused()
        raise UserError(ran_out(trainer, f"in {what}"))


def ran_out(trainer: Any, where: str) -> str:
    """The message: where memory ran out, the last whole checkpoint, and what to change."""
    output = Path(str(trainer.args.output_dir))
    checkpoints, saved = complete_checkpoints(output), ""
    if checkpoints:
        saved = f" {checkpoints[max(checkpoints)]} is whole, --resume continues from it."
    elif trainer.is_in_train:
        saved = " There is no checkpoint yet."
    kind = "activation" if hasattr(trainer.model, "activation_checkpointing_enable") else "gradient"
    flags = ["--gradient-checkpointing"] * (not getattr(trainer.model, f"is_{kind}_checkpointing"))
    on_gpu = _is_on(trainer, "cuda")
    flags += ["--offload-activations"] * (on_gpu and trainer.offload is None)
    fixes = [f"give {' or '.join(flags)}"] if flags else []
    optim = getattr(trainer.args.optim, "value", trainer.args.optim)
    paged = ", --optim paged_adamw_8bit" if on_gpu and "8bit" not in optim else ""
    place = " and a new --output-dir" if checkpoints else ""
    lower = "start again with a lower --r or --max-length (--long-rows truncate)"
    fixes.append(f"{lower}{paged}{place}")
    tells = " (--plan --fit tells what fits)" if on_gpu else ""
    return f"{_memory(trainer)} ran out {where}.{saved} To need less, {', or '.join(fixes)}{tells}"


def _memory(trainer: Any) -> str:
    return "the GPU's memory" if _is_on(trainer, "cuda") else "memory"


def _is_on(trainer: Any, device_type: str) -> bool:
    return bool(trainer.model.device.type == device_type)
