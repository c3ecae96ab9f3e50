"""Records -> token ids with labels -> batches.

A row of the result is what its task makes of a record (qlora.objectives): `input_ids` (T,),
`labels`, -100 where there is no loss, and `length`, T. For a causal language model `labels` (T,)
are the same ids where the model has to answer.

Several rows in one, and batches without padding, are in qlora.packing. Left out: streaming; tokens
are kept in memory, 8 bytes each, and so are the records of a local file.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from qlora.chat_template import ensure_chat_template
from qlora.errors import UserError
from qlora.labels import label_names
from qlora.objectives import OBJECTIVES, Collator, Objective
from qlora.records import kind_of, load_records

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

    Installs the fallback chat template on a tokenizer that needs one (ensure_chat_template).

    Args:
        labels: the names of a classifier's labels.
        new_labels: take the data's own in their place, where it has others.
        limit: take only the first so many records.
    """
    objective = OBJECTIVES[task]
    records = load_records(source, objective.kinds)
    records = records if limit is None else records.select(range(min(limit, len(records))))
    kind = kind_of(records.column_names, source, objective.kinds)
    if objective.chats and kind != ("text",):
        ensure_chat_template(tokenizer)
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
    return rows.select_columns([*columns, "length"]), replace(stats, labels=tuple(labels))


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
    keeps its loss. A missing pad token is set on the tokenizer, to eos or else unk.

    Args:
        model: of an encoder-decoder, which makes decoder_input_ids out of the labels.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise UserError(
            "the tokenizer has no pad, eos or unk token: set one in its tokenizer_config"
        )
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
