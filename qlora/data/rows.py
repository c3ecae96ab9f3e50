"""Records -> token ids with labels -> batches.

A row of the result is what its task makes of a record (qlora.data.objectives): `input_ids` (T,),
`labels`, -100 where there is no loss, and `length`, T. For a causal language model `labels` (T,)
are the same ids where the model has to answer.

Left out: streaming; tokens
are kept in memory, 8 bytes each, and so are the records of a local file.

Several rows in one: packs of up to max_length tokens, and batches without padding.

    input_ids       a a a a a b b b c c c c       rows a, b, c
    position_ids    0 1 2 3 4 0 1 2 0 1 2 3       begin again with each
    labels          - a a a a - b b - c c c       the first token of a row is nobody's target
    cu_seq_lens     0         5     8       12    where rows begin, and the end

so that a row gives what it gives alone: the loss is summed over the same labels. What keeps
attention within each row is in qlora.fast.attention.

Rows are put together by best-fit decreasing: the longest first, each where it leaves the least room
free. That takes at most 11/9 of the fewest packs possible, and 6/9 of one (Johnson et al., SIAM J.
Comput. 3, 1974; Dósa, 2007). Packs are kept by their free room, and which rooms there are is a
number with a bit for each: n rows cost a sort and n shifts of max_length bits, 0.4 s for 100,000
rows of up to 2048 tokens. It is done once; an epoch shuffles packs, not what is in them.

Left out: cutting rows to fill packs to the brim, which takes their context from what is cut off.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from datasets import Dataset, Features, Value
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from qlora.data.chat_template import NO_LOSS, fallback_template
from qlora.data.objectives import OBJECTIVES, Collator, Objective, label_names
from qlora.data.records import kind_of, load_records
from qlora.errors import UserError

BATCH_TOKENS = 2048  # to read, not to train: logits of so many over 128k take 0.5 GB in bf16


@dataclass(frozen=True)
class DataStats:
    """Counts of a prepared data set; tokens are those of the rows kept, after the cut."""

    rows: int
    """rows kept"""
    tokens: int
    supervised_tokens: int
    """tokens with loss"""
    cut_rows: int
    """rows longer than max_length, kept or not"""
    dropped_rows: int
    """rows cut so far that no supervised token was left"""
    labels: tuple[str, ...] = ()
    """a classifier's labels, by their number"""
    chats: bool = False
    """whether the chat template rendered them"""


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, *, chats: bool = False
) -> tuple[str, ...]:
    """Set what batches need and the tokenizer lacks; returns the attributes that were set.

    `pad_token` becomes eos, or else unk. With `chats`, `chat_template` becomes the fallback that
    `prepare_data` rendered the rows with: saved with the tokenizer, generation uses the same.

    Raises:
        UserError: the tokenizer has no token to pad with.
    """
    changed = []
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise UserError(
                "the tokenizer has no pad, eos or unk token: set one in its tokenizer_config"
            )
        changed.append("pad_token")
    if chats and (template := fallback_template(tokenizer)):
        tokenizer.chat_template = template
        changed.append("chat_template")
    return tuple(changed)


def prepare_data(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    task: str = "causal-lm",
    labels: Sequence[str] = (),
    new_labels: bool = True,
    limit: int | None = None,
) -> tuple[Dataset, DataStats]:
    """Rows of `source` as input_ids, labels (-100: no loss) and length, cut to max_length tokens.

    The tokenizer stays as it is; chats of one without a chat template are rendered with
    `fallback_template`.

    Args:
        labels: the names of a classifier's labels.
        new_labels: take the data's own in their place, where it has others.
        limit: take only the first so many records.
    """
    objective = OBJECTIVES[task]
    records = load_records(source, objective.kinds)
    records = records if limit is None else records.select(range(min(limit, len(records))))
    kind = kind_of(records.column_names, source, objective.kinds)
    if objective.classifies and new_labels:
        try:
            labels = label_names(records, kind[-1], labels)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error

    def encode(record: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            encoded = objective.encode(record, tokenizer, max_length, labels)
        except UserError as error:
            raise UserError(f"{source}, row {index + 1}: {error}") from error
        return {
            **encoded.row,
            "length": encoded.tokens,
            "full_length": encoded.full_length,
            "supervised": encoded.supervised,
        }

    columns = _columns(objective, tokenizer)
    counts = dict.fromkeys(("length", "full_length", "supervised"), Value("int64"))
    encoded = records.map(
        encode,
        with_indices=True,
        remove_columns=records.column_names,
        features=Features(columns | counts),
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint="qlora-data",  # spares datasets hashing the tokenizer for its cache
        desc="tokenizing",
    )
    rows, stats = _kept(source, encoded, max_length)
    chats = objective.chats and kind != ("text",)
    stats = replace(stats, labels=tuple(labels), chats=chats)
    return rows.select_columns([*columns, "length"]), stats


def _columns(objective: Objective, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a row has beside its length."""
    ids = [Value("int32")]
    columns = {"input_ids": ids, "labels": Value("int32") if objective.one_label else ids}
    if objective.one_label and "token_type_ids" in tokenizer.model_input_names:
        columns["token_type_ids"] = ids
    return columns


def _kept(source: str, encoded: Dataset, max_length: int) -> tuple[Dataset, DataStats]:
    """Drop rows without loss and the counting columns; the error when an answer is missing."""
    full, supervised = list(encoded["full_length"]), list(encoded["supervised"])
    unanswered = [str(row) for row, length in enumerate(full, start=1) if not length]
    if unanswered:
        some = ", ".join(unanswered[:5]) + (", …" if len(unanswered) > 5 else "")
        raise UserError(
            f"{source}: {len(unanswered)} of {len(full)} rows have no answer (row {some}): each "
            "needs a non-empty assistant turn, completion or output. Fill or remove them"
        )
    keep = [i for i, count in enumerate(supervised) if count]
    if not keep:
        raise UserError(
            f"{source}: cut to {max_length} tokens, no row has an answer left (its {len(full)} "
            f"rows have {min(full)} to {max(full)} tokens): raise --max-length"
        )
    rows = encoded if len(keep) == len(full) else encoded.select(keep)
    stats = DataStats(
        rows=len(keep),
        tokens=sum(rows["length"]),
        supervised_tokens=sum(supervised),
        cut_rows=sum(length > max_length for length in full),
        dropped_rows=len(full) - len(keep),
    )
    return rows, stats


# ---- batches, and what a person sees


@dataclass
class _Collator:
    collate: Collator

    def __call__(self, rows: list[Any]) -> Any:
        return self.collate([{k: v for k, v in row.items() if k != "length"} for row in rows])


def collator(
    tokenizer: PreTrainedTokenizerBase, task: str = "causal-lm", model: Any = None
) -> Collator:
    """Rows -> input_ids, attention_mask (B, T), labels, T a multiple of 8, padded on the right.

    Pads are masked by where they stand, never by their id: where pad is eos, the answers' own eos
    keeps its loss.

    Args:
        tokenizer: with a pad token, as `prepare_tokenizer` leaves it.
        model: of an encoder-decoder, which makes decoder_input_ids out of the labels.
    """
    if tokenizer.pad_token is None:
        raise UserError("the tokenizer has no pad token: call prepare_tokenizer(tokenizer) first")
    right = copy.copy(tokenizer)  # generation may want its own tokenizer padded on the left
    right.padding_side = "right"
    return _Collator(OBJECTIVES[task].collator(right, model))


def length_batches(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int = BATCH_TOKENS,
    *,
    task: str = "causal-lm",
    model: Any = None,
) -> list[Any]:
    """`rows`, shortest first, in batches of at most `max_tokens` (or one row), on the CPU."""
    groups: list[list[Mapping[str, Any]]] = [[]]
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        if groups[-1] and (len(groups[-1]) + 1) * len(row["input_ids"]) > max_tokens:
            groups.append([])
        groups[-1].append(row)
    collate = collator(tokenizer, task, model)
    return [collate(group) for group in groups]


def describe(stats: DataStats, *, name: str) -> str:
    """One line of counts, and a second when rows were cut or dropped."""
    share = stats.supervised_tokens / max(stats.tokens, 1)
    line = f"{name}: {stats.rows:,} rows, {stats.tokens:,} tokens, {stats.supervised_tokens:,} "
    line += "labels" if stats.labels else f"of them supervised ({share:.0%})"
    if stats.labels:
        shown = ", ".join(stats.labels[:8]) + (", …" if len(stats.labels) > 8 else "")
        line += f" of {len(stats.labels)} kinds: {shown}"
    if stats.cut_rows or stats.dropped_rows:
        line += (
            f"\n{name}: {stats.cut_rows:,} rows cut at max_length, {stats.dropped_rows:,} rows "
            "dropped because no answer was left"
        )
    return line


def show_example(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    colour: bool,
    task: str = "causal-lm",
    labels: Sequence[str] = (),
) -> str:
    """A short row, decoded, with the part that has loss marked: how to check a mask by eye."""
    some = min(len(dataset), 32)
    row = min((dataset[i] for i in range(some)), key=lambda row: int(row["length"]))
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    pieces = []
    for piece, learned in OBJECTIVES[task].pieces(row, tokenizer, labels):
        if len(piece) > 800:
            piece = f"{piece[:400]} … {piece[-400:]}"
        pieces.append(f"{begin}{piece}{end}" if learned else piece)
    marked = "in green" if colour else "between ⟦ and ⟧"
    return f"An example row; the model learns what is {marked}:\n{''.join(pieces)}"


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
