"""Several rows in one: packs of up to max_length tokens, and batches without padding.

    input_ids       a a a a a b b b c c c c       rows a, b, c
    position_ids    0 1 2 3 4 0 1 2 0 1 2 3       begin again with each
    labels          - a a a a - b b - c c c       the first token of a row is nobody's target
    cu_seq_lens     0         5     8       12    where rows begin, and the end

so that a row gives what it gives alone: the loss is summed over the same labels. What keeps
attention within each row is in qlora.row_attention.

Rows are put together by best-fit decreasing: the longest first, each where it leaves the least room
free. That takes at most 11/9 of the fewest packs possible, and 6/9 of one (Johnson et al., SIAM J.
Comput. 3, 1974; Dósa, 2007). Packs are kept by their free room, and which rooms there are is a
number with a bit for each: n rows cost a sort and n shifts of max_length bits, 0.4 s for 100,000
rows of up to 2048 tokens. It is done once; an epoch shuffles packs, not what is in them.

Left out: cutting rows to fill packs to the brim, which takes their context from what is cut off.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from qlora.chat_template import NO_LOSS


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs of indices into `lengths`, whose sums are at most `capacity`; the same each time.

    Every index is in one pack. Lengths are at least 1 and at most `capacity`.
    """
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # free room -> packs that have it
    rooms = 0  # bit r is set where some pack has room r
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1  # the lowest bit: the best fit
            pack = with_room[room].pop()
            rooms ^= 0 if with_room[room] else 1 << room
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        with_room[room - length].append(pack)
        rooms |= 1 << (room - length)
    return packs


class PackedRows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Packs of the rows of a data set, put together when asked for: no token is stored twice.

    A pack is `input_ids`, `labels` and `position_ids`, lists of one length.
    """

    def __init__(self, rows: Dataset, max_length: int) -> None:
        self.rows = rows
        self.max_length = max_length
        self.packs = best_fit_decreasing(list(rows["length"]), max_length)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        rows = self.rows[self.packs[index]]
        return {
            "input_ids": list(chain(*rows["input_ids"])),
            "labels": list(chain(*rows["labels"])),
            "position_ids": list(chain(*(range(len(ids)) for ids in rows["input_ids"]))),
        }

    def describe(self) -> str:
        """One line: how many rows became how many packs, and how full these are."""
        tokens = sum(self.rows["length"])
        share = tokens / max(len(self) * self.max_length, 1)
        return (
            f"packing: {len(self.rows):,} rows in {len(self):,} of up to {self.max_length:,} "
            f"tokens, {share:.1%} full; --per-device-train-batch-size counts the packed ones"
        )


# ---- batches of rows, or of packs of them


def _tensors(row: Mapping[str, Any]) -> dict[str, Tensor]:
    """A row, or a pack of rows, without labels that another row would have to predict."""
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
    given = row.get("position_ids")
    positions = torch.arange(len(ids)) if given is None else torch.tensor(given)
    labels = labels.where(positions != 0, NO_LOSS)
    mask = torch.ones_like(ids)  # of use to count tokens alone
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask}


@dataclass(frozen=True)
class FlatCollator:
    """Rows, or packs -> one row of all: input_ids, labels, position_ids (1, total), and no pads.

    And, under the names that transformers gives FlashAttention's arguments, cu_seq_lens_q and _k
    (rows + 1,) int32, where each row begins and the end; max_length_q and _k, the longest row.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        parts = [_tensors(row) for row in rows]
        batch: dict[str, Any] = {k: torch.cat([p[k] for p in parts])[None] for k in parts[0]}
        positions = batch["position_ids"][0]
        bounds = F.pad((positions == 0).nonzero()[:, 0], (0, 1), value=len(positions)).int()
        longest = int(bounds.diff().max())
        batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        return batch | {"max_length_q": longest, "max_length_k": longest}


@dataclass(frozen=True)
class PackCollator:
    """Packs -> input_ids, labels, position_ids (packs, T), T a multiple of 8.

    For attention with a mask of each pack, (packs, T, T), which costs T * T and not more where
    several packs make a batch. The pads of a pack are a row of their own in it.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        parts = [_tensors(row) for row in rows]
        length = -(-max(len(part["input_ids"]) for part in parts) // 8) * 8
        fill = {"input_ids": self.pad_token_id, "labels": NO_LOSS, "attention_mask": 0}

        def padded(name: str, part: Tensor) -> Tensor:
            pads = length - len(part)
            if name == "position_ids":
                return torch.cat([part, torch.arange(pads)])
            return F.pad(part, (0, pads), value=fill[name])

        return {k: torch.stack([padded(k, part[k]) for part in parts]) for k in parts[0]}
