"""Records -> token ids with a loss mask -> batches.

A row of the result is

    input_ids  (T,)  the chat template's rendering, token for token what apply_chat_template gives
    labels     (T,)  the same ids where the model has to answer, -100 (no loss) elsewhere
    length           T

For chats, loss is on the assistant's turns and their end tokens alone (qlora.chat); of `text`
records, on every token.

Left out: packing (qlora.packing, later) and streaming: tokens are kept in memory, 8 bytes each, and
so are the records of a local file.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from datasets import Dataset, Features, Value
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from qlora.chat import NO_LOSS, Rendering, ensure_chat_template, is_answer, tokenize
from qlora.errors import UserError
from qlora.records import chat_of, kind_of, load_records, string_of

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


def _encode(
    record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]] | None:
    """Ids and labels of a record before the cut; None when there is no answer in it."""
    chat = chat_of(record)
    if chat is None:
        ids = list(tokenizer(string_of(record["text"]), verbose=False)["input_ids"])
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        return ids, list(ids)
    if not any(is_answer(message) for message in chat.messages[chat.first :]):
        return None
    found = Rendering(tokenizer, chat).with_spans()
    if found is not None:
        return tokenize(tokenizer, *found)
    if re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)):
        marked: Any = tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = marked["input_ids"], marked["assistant_masks"]
        return ids, [i if on else NO_LOSS for i, on in zip(ids, mask, strict=True)]
    raise UserError(
        "the assistant's turns cannot be found in what the model's chat template makes of it: put "
        "{% generation %} marks around them in the template, or render the rows to a text column"
    )


def prepare_data(
    source: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[Dataset, DataStats]:
    """Rows of `source` as input_ids, labels (-100: no loss) and length, cut to max_length tokens.

    Installs the fallback chat template on a tokenizer that needs one (ensure_chat_template).
    """
    records = load_records(source)
    if kind_of(records.column_names) != ("text",):
        ensure_chat_template(tokenizer)

    def encode(record: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            pair = _encode(record, tokenizer)
        except UserError as error:
            raise UserError(f"{source}, row {index + 1}: {error}") from error
        ids, labels = pair or ([], [])
        kept = labels[:max_length]
        return {
            "input_ids": ids[:max_length],
            "labels": kept,
            "length": len(kept),
            "full_length": len(ids),
            # the first token is never predicted, so a label there alone teaches nothing
            "supervised": sum(i != NO_LOSS for i in kept) * any(i != NO_LOSS for i in kept[1:]),
        }

    columns = {"input_ids": [Value("int32")], "labels": [Value("int32")], "length": Value("int32")}
    counts = {"full_length": Value("int64"), "supervised": Value("int64")}
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
    return _kept(source, encoded, max_length)


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
    return rows.select_columns(["input_ids", "labels", "length"]), stats


# ---- batches, and what a person sees


@dataclass
class _Collator(DataCollatorForSeq2Seq):
    def __call__(self, features: Any, return_tensors: str | None = None) -> Any:
        rows = [{key: row[key] for key in ("input_ids", "labels")} for row in features]
        return super().__call__(rows, return_tensors)  # type: ignore[no-untyped-call]


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Rows -> input_ids, attention_mask, labels (B, T), T a multiple of 8, padded on the right.

    Pads are masked by where they stand, never by their id: where pad is eos, the answers' own eos
    keeps its loss. A missing pad token is set on the tokenizer, to eos or else unk.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise UserError(
            "the tokenizer has no pad, eos or unk token: set one in its tokenizer_config"
        )
    right = copy.copy(tokenizer)  # generation may want its own tokenizer padded on the left
    right.padding_side = "right"
    return _Collator(right, pad_to_multiple_of=8, label_pad_token_id=NO_LOSS)


def length_batches(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int = BATCH_TOKENS,
) -> list[Any]:
    """`rows`, shortest first, in batches of at most `max_tokens` (or one row), on the CPU."""
    groups: list[list[Mapping[str, Any]]] = [[]]
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        if groups[-1] and (len(groups[-1]) + 1) * len(row["input_ids"]) > max_tokens:
            groups.append([])
        groups[-1].append(row)
    collate = collator(tokenizer)
    return [collate(group) for group in groups]


def describe(stats: DataStats, *, name: str) -> str:
    """One line of counts, and a second when rows were cut or dropped."""
    share = stats.supervised_tokens / max(stats.tokens, 1)
    line = (
        f"{name}: {stats.rows:,} rows, {stats.tokens:,} tokens, "
        f"{stats.supervised_tokens:,} of them supervised ({share:.0%})"
    )
    if stats.cut_rows or stats.dropped_rows:
        line += (
            f"\n{name}: {stats.cut_rows:,} rows cut at max_length, {stats.dropped_rows:,} rows "
            "dropped because no answer was left"
        )
    return line


def show_example(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, colour: bool) -> str:
    """A short row, decoded, with the part that has loss marked: how to check a mask by eye."""
    some = min(len(dataset), 32)
    row = min((dataset[i] for i in range(some)), key=lambda row: int(row["length"]))
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    pieces = []
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for learned, group in groupby(pairs, key=lambda pair: pair[1] != NO_LOSS):
        piece = str(tokenizer.decode([i for i, _ in group], skip_special_tokens=False))
        if len(piece) > 800:
            piece = f"{piece[:400]} … {piece[-400:]}"
        pieces.append(f"{begin}{piece}{end}" if learned else piece)
    marked = "in green" if colour else "between ⟦ and ⟧"
    return f"An example row; the model learns what is {marked}:\n{''.join(pieces)}"
