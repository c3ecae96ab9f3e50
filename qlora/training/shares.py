"""Each rank's share of the rows, in an order that does not depend on the number of ranks.

    the order of one process    0 1 | 2 3 | 4 5 | 6 7 | 8         batches of 2 rows
    rank 0 of two               0 1 |     | 4 5 |     | 8
    rank 1 of two                   | 2 3 |     | 6 7 |   | -     an empty batch

Batch i is that of rank i modulo the number of ranks: a step of two ranks has the rows of a step of
one process that accumulates twice as many batches. No row is read twice, where accelerate's
BatchSamplerShard begins again at the end of the data; a rank that has no more batches adds nothing
to the sum of the step.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from qlora.data.chat_template import NO_LOSS
from qlora.training import ranks

EMPTY = ("input_ids", "labels", "attention_mask")  # of a batch without tokens


class SeededGroups(Sampler[int]):
    """Trainer's group_by_length, in an order that depends on the seed and the epoch alone, as its
    random order does: a resumed epoch goes on where it stopped. Accelerate sets the epoch."""

    def __init__(self, groups: LengthGroupedSampler, seed: int) -> None:
        groups.batch_size *= ranks.count()  # rows of a step, by which it groups
        self.groups, self.seed, self.epoch = groups, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        # a DataLoader's draw for its workers: epoch 0 has the order of plain Trainer
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        self.groups.generator = generator
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)


class Share(Sampler[int]):
    """This rank's share of another sampler, in batches of `size`; all ranks have equal lengths."""

    def __init__(self, every: Any, size: int, *, seed: int, drop_last: bool = False) -> None:
        if isinstance(every, RandomSampler):  # as accelerate has it in one process
            data, generator = every.data_source, torch.Generator()
            every = SeedableRandomSampler(data, generator=generator, data_seed=seed)
        self.every, self.size, self.drop_last = every, size, drop_last

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.every, "set_epoch"):
            self.every.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        rank, count = ranks.number(), ranks.count()
        for place, row in enumerate(islice(self.every, self._end())):
            if place // self.size % count == rank:
                yield row

    def _end(self) -> int:
        rows = len(self.every)
        return rows - rows % self.size if self.drop_last else rows

    def __len__(self) -> int:
        """The rows of full batches, as many as that of a rank with the most batches."""
        return -(-self._end() // (self.size * ranks.count())) * self.size


def share_alone(loader: Any) -> None:
    """Let a loader that accelerate has prepared read its Share as it is, without sharing again, as
    transformers does for its samplers that know of ranks."""
    shard = loader.batch_sampler
    shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
    shard.sampler = shard.batch_sampler.sampler  # where accelerate sets the epoch of a resumed run


def empty_batch(device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of no tokens (1, 0)."""
    return {name: torch.zeros((1, 0), dtype=torch.int64, device=device) for name in EMPTY}


def blank_batch(device: torch.device) -> dict[str, torch.Tensor]:
    """A batch (1, 2) without a supervised token, whose loss and gradients are 0: where a model is
    sharded, each pass needs all ranks."""
    batch = {name: torch.zeros((1, 2), dtype=torch.int64, device=device) for name in EMPTY}
    return batch | {"labels": batch["labels"] + NO_LOSS, "attention_mask": batch["labels"] + 1}


def is_empty(batch: Any) -> bool:
    """Whether a batch has no tokens."""
    return bool(batch["input_ids"].numel() == 0)
