"""Rows -> batches, padded or packed.

A pack is several rows, of up to max_length tokens together, concatenated without padding:

    input_ids       a a a a a b b b c c c c       rows a, b, c
    position_ids    0 1 2 3 4 0 1 2 0 1 2 3       start at 0 in each row
    labels          - a a a a - b b - c c c       the first token of a row is never predicted
    cu_seq_lens     0         5     8       12    where rows begin, and the end

The loss equals that of separate rows: it is summed over the same labels, and attention stays within
each row (qlora.fast.attention).

Packs are filled by best-fit decreasing: the longest row first, each into the pack that it fills
best. At most 11/9 of the fewest possible packs, plus 6/9, are used (Johnson et al., SIAM J. Comput.
3, 1974; Dósa, 2007). Rows of one length are placed together: the free spaces in use are the bits of
one integer, and a shift finds all packs of the best space. So n rows cost two sorts, and a few
shifts for each length: 0.4 s for a million rows of up to 1024 tokens. Packing runs once; epochs
shuffle the packs, not the rows within them.

Left out: cutting rows to fill packs completely, which separates text from its context.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening
from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora.data.chat_template import NO_LOSS
from qlora.data.objectives import OBJECTIVES
from qlora.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Collator = Callable[[list[Any]], Any]
BATCH_TOKENS = 2048  # without gradients: their logits over a vocabulary of 128k take 0.5 GB in bf16


# ---- padded batches


def _without_length(collate: Collator, rows: list[Any]) -> Any:
    return collate([{k: v for k, v in row.items() if k != "length"} for row in rows])


def collator(tokenizer: Tokenizer, task: str = "causal-lm", model: Any = None) -> Collator:
    """Rows -> input_ids, attention_mask (B, T), labels, T a multiple of 8, padded on the right.

    Pads are masked by position, not by id: where pad is eos, the eos of an answer keeps its loss.

    Args:
        model: an encoder-decoder, which computes decoder_input_ids from the labels.

    Raises:
        UserError: the tokenizer has no pad token.
    """
    if tokenizer.pad_token is None:
        raise UserError("the tokenizer has no pad token: call prepare_tokenizer(tokenizer) first")
    right = copy.copy(tokenizer)  # the caller's may pad on the left, for generation
    right.padding_side = "right"
    options = {"model": model} if task == "seq2seq" else {}
    collate = OBJECTIVES[task].collator(right, pad_to_multiple_of=8, **options)
    return partial(_without_length, collate)


def length_batches(
    rows: Iterable[Any], tokenizer: Tokenizer, *, task: str = "causal-lm", model: Any = None
) -> list[Any]:
    """`rows`, shortest first, in batches of at most BATCH_TOKENS (or of one row), on the CPU."""
    groups: list[list[Any]] = [[]]
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        if groups[-1] and (len(groups[-1]) + 1) * len(row["input_ids"]) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(row)
    return list(map(collator(tokenizer, task, model), groups))


# ---- packs


def best_fit_decreasing(
    lengths: "Sequence[int] | np.ndarray[Any, Any]", capacity: int
) -> list[list[int]]:
    """Packs of indices into `lengths`, with a sum of at most `capacity` each; deterministic.

    Each index is in one pack. Lengths must be from 1 to `capacity`.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")  # the longest first
    pack_of = np.empty(len(order), dtype=np.int64)
    by_space: dict[int, list[int]] = defaultdict(list)  # free space -> packs that have it
    spaces = done = used = 0  # bit s of `spaces` is set where some pack has free space s
    different, counts = np.unique(-sizes, return_counts=True)
    for length, left in zip((-different).tolist(), counts.tolist(), strict=True):
        while left:
            enough = spaces >> length
            # The lowest bit is the best fit, and stays it until its pack has no space for a row.
            space = length + (enough & -enough).bit_length() - 1 if enough else capacity
            each = space // length
            number = -(-left // each)  # of packs
            if not enough:
                by_space[space] += range(used + number - 1, used - 1, -1)
                used += number
            packs = by_space[space][: -number - 1 : -1]  # the last first
            del by_space[space][-number:]
            rows = min(left, each * len(packs))
            pack_of[done : done + rows] = np.repeat(packs, each)[:rows]
            full, rest = divmod(rows, each)
            by_space[space % length] += packs[:full]
            by_space[space - rest * length] += packs[full:]
            for free in (space, space % length, space - rest * length):
                spaces = spaces & ~(1 << free) | bool(by_space[free]) << free
            done, left = done + rows, left - rows
    ends = np.cumsum(np.bincount(pack_of, minlength=used)).tolist()
    indices = order[np.argsort(pack_of, kind="stable")].tolist()
    return [indices[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def column(rows: "Dataset", name: str) -> np.ndarray[Any, Any]:
    """A column of numbers; `rows[name]` has them one by one."""
    table = rows.select_columns([name]).with_format("arrow")[:]
    return np.asarray(table[name].to_numpy())


class PackedRows(torch.utils.data.Dataset[list[dict[str, list[int]]]]):
    """Packs of the rows of a data set, each a list of rows; tokens are not copied."""

    def __init__(self, rows: "Dataset", max_length: int) -> None:
        self.rows, self.max_length = rows, max_length
        self.packs = best_fit_decreasing(column(rows, "length"), max_length)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict[str, list[int]]]:
        return [self.rows[i] for i in self.packs[index]]

    def describe(self) -> str:
        """One line: the numbers of rows and packs, and how full the packs are."""
        share = int(column(self.rows, "length").sum()) / max(len(self) * self.max_length, 1)
        return (
            f"packing: {len(self.rows):,} rows in {len(self):,} packs of up to {self.max_length:,} "
            f"tokens, {share:.1%} full; --per-device-train-batch-size counts packs"
        )


_flatten: Any = DataCollatorWithFlattening(return_flash_attn_kwargs=True)


def _as_packs(items: Sequence[Any]) -> list[list[Mapping[str, Any]]]:
    """Packs as they are; a row (evaluation data is not packed) as a pack of one."""
    return [item if isinstance(item, list) else [item] for item in items]


def row_lengths(batch: Mapping[str, Any]) -> Tensor:
    """For each token (B, T) of a batch, padded or packed, the number of tokens in its row."""
    positions: Tensor | None = batch.get("position_ids")
    if positions is not None:  # each row begins at 0, and so does each pack
        rows = (positions == 0).flatten().cumsum(0) - 1  # (B * T,), the number of each token's row
        return rows.bincount()[rows].view_as(positions)
    mask: Tensor = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return mask.sum(-1, keepdim=True).expand_as(mask)  # (B, 1) -> (B, T)


class FlatCollator:
    """Rows or packs -> one row without pads: input_ids, labels, position_ids (1, total).

    The batch also has FlashAttention's arguments under transformers' names: cu_seq_lens_q and _k
    (rows + 1,) int32, where each row begins and the end; max_length_q and _k, the longest row.
    """

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = _flatten([row for pack in _as_packs(items) for row in pack])
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}  # to count tokens


@dataclass(frozen=True)
class PackCollator:
    """Rows or packs -> input_ids, labels, position_ids, attention_mask (packs, T); 8 divides T.

    For attention with a mask (packs, T, T). The pads of a pack are a row of their own.
    """

    pad_token_id: int

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        packs = _as_packs(items)
        lengths = torch.tensor([sum(len(row["input_ids"]) for row in pack) for pack in packs])
        width = -(-int(lengths.max()) // 8) * 8
        parts = []
        for pack, pads in zip(packs, (width - lengths).tolist(), strict=True):
            padding = {"input_ids": [self.pad_token_id] * pads, "labels": [NO_LOSS] * pads}
            parts.append(_flatten([*pack, padding] if pads else pack))
        names = ("input_ids", "labels", "position_ids")
        batch = {name: torch.cat([part[name] for part in parts]) for name in names}  # (packs, T)
        mask = torch.arange(width) < lengths[:, None]  # (T,) < (packs, 1) -> (packs, T)
        return batch | {"attention_mask": mask.long()}
