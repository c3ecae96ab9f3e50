"""A step before the run: one that will run out of memory fails in its first minute.

The heaviest micro-batch of the data goes forward and backward, with the optimizer's state in
memory: that of a throwaway optimizer after a step on zero gradients. Where memory runs out, the
batch is split as later in the run (qlora.training.memory). Afterwards everything is put back, so
that the run is the same, bit for bit, as without it: parameters, gradients, random generators,
values that modules keep, Trainer's counters.

On a GPU a second pass is timed, as the first compiles kernels; on a CPU the only one is, and runs
of few micro-batches go without: the pass would cost more than it tells. Left out: evaluation.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset

from qlora.cli import show_seconds
from qlora.data.streaming import StreamedRows
from qlora.training import ranks
from qlora.training.callbacks import tokens_of
from qlora.training.memory import free_unused, out_of_memory_in, rows_in
from qlora.training.outputs import peak_bytes, show_bytes

MIN_BATCHES = 50  # micro-batches of a run on a CPU that begins with a dry step


def before_training(trainer: Any, done: int) -> None:
    """Print the steps that follow `done`, and tokens a step; take the dry step, print its memory
    and the time that the run will take.

    Raises UserError if not even one row fits.
    """
    steps, batches = trainer.lengths_of_run()
    steps, accumulated = steps - done, min(trainer.args.gradient_accumulation_steps, batches)
    if steps <= 0:
        return
    sizes = lengths(trainer.train_dataset)
    if isinstance(trainer.train_dataset, StreamedRows):  # as the first rows are
        batches = -(-len(sizes) // (trainer.args.train_batch_size * ranks.count()))
    tokens = round(sum(sizes) / batches * accumulated)
    after = f" after step {done:,}" if done else ""
    print(f"training: {steps:,} step{'s' * (steps != 1)}{after}, about {tokens:,} tokens a step")
    if trainer.model.device.type == "cpu" and steps * accumulated < MIN_BATCHES:
        return
    batch = heaviest(trainer)
    seconds, peak = dry_step(trainer, batch)
    own = int(tokens_of(batch))
    takes = show_seconds(seconds / own * tokens / ranks.count() * steps)
    rows = rows_in(batch)
    shown = f"{rows} row{'s' * (rows != 1)}, {own:,} tokens"
    print(f"dry step, {shown}: peak memory {show_bytes(peak)}; training takes about {takes}")


def lengths(dataset: Any) -> Sequence[int]:
    """Tokens of each row, or of each pack, of a training set; of a stream's first window."""
    dataset = dataset.head.items if isinstance(dataset, StreamedRows) else dataset
    if isinstance(dataset, Dataset):
        return list(dataset["length"])
    own = list(dataset.rows["length"])
    return [sum(own[i] for i in pack) for pack in dataset.packs]


def heaviest(trainer: Any) -> Any:
    """The micro-batch of the rows, or packs, with most tokens, made by the run's collator."""
    dataset, sizes = trainer.train_dataset, lengths(trainer.train_dataset)
    dataset = dataset.head.items if isinstance(dataset, StreamedRows) else dataset
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])  # stable: the first of equal ones
    if isinstance(dataset, Dataset):
        dataset = trainer._remove_unused_columns(dataset)  # as Trainer's loader does
    return trainer.data_collator([dataset[i] for i in order[: trainer.args.train_batch_size]])


def dry_step(trainer: Any, batch: Any) -> tuple[float, int]:
    """Seconds of a forward and backward pass on `batch`, and the peak memory in bytes.

    Raises UserError if not even one row fits.
    """
    on_gpu, parts = trainer.model.device.type == "cuda", trainer.parts
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    values = [p.detach().to("cpu", copy=True) for p in trained]
    count = trainer._get_num_items_in_batch([batch], trainer.args.device)

    def one_pass(part: Any) -> Any:
        with trainer.accelerator.autocast():  # of fp16; else accelerate's wrapper does this later
            return trainer.one_pass(trainer.model, part, count)

    _reset_peak()
    parts.where = "the dry step"
    parts.rewind.mark()
    try:
        with out_of_memory_in(trainer, "the dry step, at the optimizer's state"):
            _make_state(trainer, trained)
        for _ in range(1 + on_gpu):
            trainer.model.zero_grad()
            begin = _now(on_gpu)
            parts.run([batch], one_pass)
            seconds = _now(on_gpu) - begin
        return seconds, peak_bytes()
    finally:
        parts.where = ""
        parts.put_back()
        trainer.optimizer = trainer.lr_scheduler = None
        for p, value in zip(trained, values, strict=True):
            p.data.copy_(value)
        free_unused()
        _reset_peak()  # the peak that is logged is that of training


def _make_state(trainer: Any, trained: list[Any]) -> None:
    """Create Trainer's optimizer, and its state by a step at rate 0 on zero gradients."""
    optimizer = trainer.create_optimizer()
    inner = getattr(optimizer, "optimizer", optimizer)
    if getattr(inner, "is_paged", False):
        inner.is_paged = False  # bitsandbytes never frees paged memory
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()


def _now(on_gpu: bool) -> float:
    """Seconds, once the GPU is done."""
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
