"""Records -> rows of token ids with labels -> batches, padded or packed.

A row holds what its task makes of a record (qlora.data.objectives): `input_ids` (T,), `labels` with
-100 where there is no loss, and `length`, T. Records and tokens (8 bytes each) stay in memory.

A pack is several rows, of up to max_length tokens together, in a batch without padding:

    input_ids       a a a a a b b b c c c c       rows a, b, c
    position_ids    0 1 2 3 4 0 1 2 0 1 2 3       begin again with each
    labels          - a a a a - b b - c c c       the first token of a row is no target
    cu_seq_lens     0         5     8       12    where rows begin, and the end

Each row gives what it gives alone: the loss is summed over the same labels, and attention stays
within each row (qlora.fast.attention).

Best-fit decreasing finds the packs: the longest row first, each into the pack that it leaves the
least space in. It takes at most 11/9 of the fewest packs possible, and 6/9 of one (Johnson et al.,
SIAM J. Comput. 3, 1974; Dósa, 2007). The free spaces that occur are the bits of one number: n rows
cost a sort and n shifts of max_length bits, 0.4 s for 100,000 rows of up to 2048 tokens. It runs
once; an epoch shuffles packs, not what is in them.

Left out: streaming; cutting rows to fill packs completely, which separates text from its context.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset, Features, Value
from torch import Tensor
from transformers import DataCollatorWithFlattening
from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora.data.chat_template import NO_LOSS, fallback_template
from qlora.data.objectives import OBJECTIVES, class_names
from qlora.data.records import kind_of, load_records
from qlora.errors import UserError

Collator = Callable[[list[Any]], Any]
BATCH_TOKENS = 2048  # to read, not to train: logits of so many over 128k take 0.5 GB in bf16


@dataclass(frozen=True)
class DataStats:
    """Counts of a prepared data set: of the rows kept, and their tokens after the cut."""

    rows: int
    tokens: int
    supervised_tokens: int
    """tokens with loss"""
    cut_rows: int
    """rows longer than max_length, kept or not"""
    dropped_rows: int
    """rows cut so far that no supervised token was left"""
    classes: tuple[str, ...] = ()
    """a classifier's class names, by their number"""
    chats: bool = False
    """whether the chat template rendered the rows"""


def prepare_data(
    source: str,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    task: str = "causal-lm",
    classes: Sequence[str] = (),
    new_classes: bool = True,
    limit: int | None = None,
) -> tuple[Dataset, DataStats]:
    """Rows of `source` as input_ids, labels and length, cut to max_length tokens.

    The tokenizer is not changed: one without a chat template renders chats with the fallback
    template, which `prepare_tokenizer` then sets.

    Args:
        classes: a classifier's class names.
        new_classes: replace them by those of the data, where it has others.
        limit: take only the first so many records.
    """
    objective = OBJECTIVES[task]
    records = load_records(source, objective.kinds)
    records = records if limit is None else records.select(range(min(limit, len(records))))
    kind = kind_of(records.column_names, source, objective.kinds)
    if objective.classifies and new_classes:
        with _errors_in(source):
            classes = class_names(records, kind[-1], classes)

    def encode(record: dict[str, Any], index: int) -> dict[str, Any]:
        with _errors_in(f"{source}, row {index + 1}"):
            return objective.encode(record, tokenizer, max_length, classes)

    ids, count = [Value("int32")], Value("int64")
    columns: dict[str, Any] = {"input_ids": ids, "labels": ids[0] if objective.one_label else ids}
    if objective.one_label and "token_type_ids" in tokenizer.model_input_names:
        columns["token_type_ids"] = ids
    encoded = records.map(
        encode,
        with_indices=True,
        remove_columns=records.column_names,
        features=Features(columns | dict.fromkeys(("length", "full_length", "supervised"), count)),
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint="qlora-data",  # spares datasets hashing the tokenizer for its cache
        desc="tokenizing",
    )
    full, supervised = list(encoded["full_length"]), list(encoded["supervised"])
    _require_answers(source, full, supervised, max_length)
    keep = [i for i, labels in enumerate(supervised) if labels]
    rows = encoded if len(keep) == len(full) else encoded.select(keep)
    stats = DataStats(
        rows=len(keep),
        tokens=sum(rows["length"]),
        supervised_tokens=sum(supervised),
        cut_rows=sum(length > max_length for length in full),
        dropped_rows=len(full) - len(keep),
        classes=tuple(classes),
        chats=task == "causal-lm" and kind != ("text",),
    )
    return rows.select_columns([*columns, "length"]), stats


@contextmanager
def _errors_in(place: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _require_answers(source: str, full: list[int], supervised: list[int], max_length: int) -> None:
    if unanswered := [str(row) for row, length in enumerate(full, start=1) if not length]:
        some = ", ".join(unanswered[:5]) + (", …" if len(unanswered) > 5 else "")
        raise UserError(
            f"{source}: {len(unanswered)} of {len(full)} rows have no answer (row {some}): each "
            "needs a non-empty assistant turn, completion or output. Fill or remove them"
        )
    if not any(supervised):
        raise UserError(
            f"{source}: cut to {max_length} tokens, no row has an answer left (its {len(full)} "
            f"rows have {min(full)} to {max(full)} tokens): raise --max-length"
        )


def prepare_tokenizer(tokenizer: Tokenizer, *, chats: bool = False) -> tuple[str, ...]:
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


def describe(stats: DataStats, *, name: str) -> str:
    """One line of counts, and a second when rows were cut or dropped."""
    share = stats.supervised_tokens / max(stats.tokens, 1)
    learned = f"of them supervised ({share:.0%})"
    if stats.classes:
        shown = ", ".join(stats.classes[:8]) + (", …" if len(stats.classes) > 8 else "")
        learned = f"labels of {len(stats.classes)} kinds: {shown}"
    count = f"{stats.supervised_tokens:,}"
    line = f"{name}: {stats.rows:,} rows, {stats.tokens:,} tokens, {count} {learned}"
    if stats.cut_rows or stats.dropped_rows:
        line += (
            f"\n{name}: {stats.cut_rows:,} rows cut at max_length, {stats.dropped_rows:,} rows "
            "dropped because no answer was left"
        )
    return line


def show_example(
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    colour: bool,
    task: str = "causal-lm",
    classes: Sequence[str] = (),
) -> str:
    """A short row, decoded, with the part that has loss marked, to check the mask by eye."""
    some = min(len(dataset), 32)
    row = min((dataset[i] for i in range(some)), key=lambda row: int(row["length"]))
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    marked = "in green" if colour else "between ⟦ and ⟧"
    text = f"An example row; the model learns what is {marked}:\n"
    for piece, learned in OBJECTIVES[task].pieces(row, tokenizer, classes):
        piece = piece if len(piece) <= 800 else f"{piece[:400]} … {piece[-400:]}"
        text += f"{begin}{piece}{end}" if learned else piece
    return text


# ---- padded batches


def _without_length(collate: Collator, rows: list[Any]) -> Any:
    return collate([{k: v for k, v in row.items() if k != "length"} for row in rows])


def collator(tokenizer: Tokenizer, task: str = "causal-lm", model: Any = None) -> Collator:
    """Rows -> input_ids, attention_mask (B, T), labels, T a multiple of 8, padded on the right.

    Pads are masked by their position, not by their id: where pad is eos, the answers' own eos keeps
    its loss.

    Args:
        tokenizer: with a pad token, as `prepare_tokenizer` leaves it.
        model: of an encoder-decoder, which computes decoder_input_ids from the labels.
    """
    if tokenizer.pad_token is None:
        raise UserError("the tokenizer has no pad token: call prepare_tokenizer(tokenizer) first")
    right = copy.copy(tokenizer)  # the caller may generate with padding on the left
    right.padding_side = "right"
    options = {"model": model} if task == "seq2seq" else {}
    collate = OBJECTIVES[task].collator(right, pad_to_multiple_of=8, **options)
    return partial(_without_length, collate)


def length_batches(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
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
    return list(map(collator(tokenizer, task, model), groups))


# ---- packs


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs of indices into `lengths`, whose sums are at most `capacity`; deterministic.

    Every index is in one pack. Lengths are at least 1 and at most `capacity`.
    """
    packs: list[list[int]] = []
    by_space: dict[int, list[int]] = defaultdict(list)  # free space -> packs that have it
    spaces = 0  # bit s is set where some pack has free space s
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        enough = spaces >> length
        if enough:
            space = length + (enough & -enough).bit_length() - 1  # the lowest bit: the best fit
            pack = by_space[space].pop()
            spaces ^= 0 if by_space[space] else 1 << space
        else:
            space, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        by_space[space - length].append(pack)
        spaces |= 1 << (space - length)
    return packs


class PackedRows(torch.utils.data.Dataset[list[dict[str, list[int]]]]):
    """Packs of the rows of a data set, each a list of rows; no token is stored twice."""

    def __init__(self, rows: Dataset, max_length: int) -> None:
        self.rows = rows
        self.max_length = max_length
        self.packs = best_fit_decreasing(list(rows["length"]), max_length)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict[str, list[int]]]:
        return [self.rows[i] for i in self.packs[index]]

    def describe(self) -> str:
        """One line: how many rows became how many packs, and how full these are."""
        tokens = sum(self.rows["length"])
        share = tokens / max(len(self) * self.max_length, 1)
        return (
            f"packing: {len(self.rows):,} rows in {len(self):,} of up to {self.max_length:,} "
            f"tokens, {share:.1%} full; --per-device-train-batch-size counts the packed ones"
        )


_flatten: Any = DataCollatorWithFlattening(return_flash_attn_kwargs=True)


def _as_packs(items: Sequence[Any]) -> list[list[Mapping[str, Any]]]:
    """Packs as they are; a row, of evaluation data, is a pack of one."""
    return [item if isinstance(item, list) else [item] for item in items]


@dataclass(frozen=True)
class FlatCollator:
    """Rows or packs -> one row without pads: input_ids, labels, position_ids (1, total).

    And FlashAttention's arguments under transformers' names: cu_seq_lens_q and _k (rows + 1,)
    int32, where each row begins and the end; max_length_q and _k, the longest row.
    """

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = _flatten([row for pack in _as_packs(items) for row in pack])
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}  # to count tokens


@dataclass(frozen=True)
class PackCollator:
    """Rows or packs -> input_ids, labels, position_ids, attention_mask (packs, T), T a multiple
    of 8.

    For attention with a mask of each pack, (packs, T, T): it costs T * T for each pack, however
    many there are in a batch. The pads of a pack are a row of their own.
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
