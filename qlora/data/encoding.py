"""Records -> rows of token ids with labels, and the counts of what was cut and dropped.

A row longer than `max_length` tokens is

    truncate, error   cut; with error, refused if MOST_LOST of the tokens would be lost
    drop              left out
    split             cut into pieces of up to max_length tokens. Each begins with the last token of
                      the one before, which it does not predict: so every token is learned once.

A row without a supervised token after that is left out; if all are, that is an error.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from typing import Any

import pyarrow as pa
from datasets import Features, Value
from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora.cli import Progress
from qlora.data.chat_template import NO_LOSS
from qlora.data.chats import AS_IT_IS, Reading
from qlora.data.objectives import OBJECTIVES, Objective
from qlora.data.records import Record, Records
from qlora.data.workers import mapped
from qlora.errors import UserError, require, some

MOST_LOST = 0.01  # of the tokens
CHUNK_ROWS = 1000  # that are Python objects at a time
NO_LIMIT = 1 << 40
SELECTING = ("supervised", "key")  # columns by which rows are counted and chosen
SHOWN = 4  # row numbers in a message


@dataclass
class Numbers:
    """How many rows, and the numbers of the first."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, *numbers: str) -> None:
        """Count rows of these numbers."""
        self.count += len(numbers)
        self.first += numbers[: SHOWN - len(self.first)]

    def __add__(self, other: "Numbers") -> "Numbers":
        return Numbers(self.count + other.count, [*self.first, *other.first][:SHOWN])

    def __str__(self) -> str:
        more = f" and {self.count - SHOWN:,} more" if self.count > SHOWN else ""
        return f"row {some(self.first)}{more}"


NUMBERS = {"count", "first"}


@dataclass
class Tally:
    """Counts over encoded records; two of different records add up."""

    rows: int = 0  # that are kept
    tokens: int = 0  # in them
    supervised: int = 0  # tokens with loss
    full_tokens: int = 0  # before the cut
    cut_tokens: int = 0  # those behind it
    long: Numbers = field(default_factory=Numbers)  # rows longer than max_length
    dropped: Numbers = field(default_factory=Numbers)  # rows without a supervised token
    unanswered: Numbers = field(default_factory=Numbers)  # rows that never had one
    lost: Counter[str] = field(default_factory=Counter)  # what the template leaves out: rows
    special: Numbers = field(default_factory=Numbers)  # the first kept row with tools or reasoning
    own_rows: int = 0  # rows more than records, of turns that need their own
    own_tokens: int = 0  # in these rows
    thinks: int = 0
    largest: tuple[int, ...] = ()  # full lengths: of the longest row, and of minus the shortest
    largest_id: int = 0

    def __iadd__(self, other: "Tally") -> "Tally":
        special = Numbers(0, [str(self.rows + int(i)) for i in other.special.first])
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        sums["largest"] = tuple(map(max, self.largest or other.largest, other.largest))
        sums["largest_id"] = max(self.largest_id, other.largest_id)
        vars(self).update(sums | {"special": self.special + special})
        return self

    def record(self) -> dict[str, Any]:
        """As JSON has it; `asdict` counts a Counter's pairs."""
        return asdict(replace(self, lost=Counter())) | {"lost": dict(self.lost)}

    @staticmethod
    def of(facts: dict[str, Any]) -> "Tally":
        """The inverse of `record`."""
        values = {
            k: Numbers(**v) if set(v) == NUMBERS else Counter(v)
            for k, v in facts.items()
            if isinstance(v, dict)
        }
        largest = tuple(facts.get("largest", ()))  # a list in JSON
        return Tally(**facts | values | {"largest": largest})


@dataclass(frozen=True)
class Encoder:
    """How the records of a source become rows."""

    source: str
    task: str
    tokenizer: Tokenizer
    max_length: int
    classes: Sequence[str] = ()
    reading: Reading = AS_IT_IS
    long_rows: str = "truncate"
    records: Records | None = None  # to name places in

    @property
    def objective(self) -> Objective:
        """That of the task."""
        return OBJECTIVES[self.task]

    @property
    def features(self) -> Features:
        """The columns of rows that are trained on, and those that select some of them."""
        ids = [Value("int32")]
        columns: dict[str, Any] = {"input_ids": ids}
        columns["labels"] = ids[0] if self.objective.one_label else ids
        if self.objective.one_label and "token_type_ids" in self.tokenizer.model_input_names:
            columns["token_type_ids"] = ids
        return Features(columns | dict.fromkeys(("length", *SELECTING), Value("int64")))

    def rows_of(self, number: str, record: Record) -> list[dict[str, Any]]:
        """The rows of a record, with all that `objectives` says of them. Errors name its place."""
        limit = NO_LIMIT if self.long_rows == "split" else self.max_length
        args = (self.tokenizer, limit, self.classes, self.reading)
        try:
            rows = self.objective.encode(record, *args)
        except UserError as error:
            place = self.records.place(number) if self.records else f"row {number}"
            raise UserError(f"{self.source}, {place}: {error}") from error
        if self.long_rows == "split":
            rows = [piece for row in rows for piece in split_row(row, self.max_length)]
        return rows

    def chunk(self, numbered: Sequence[tuple[str, Record]]) -> tuple[pa.Table, Tally]:
        """The rows of some records that are kept, and the counts of all."""
        tally, names = Tally(), list(self.features)
        kept: list[dict[str, Any]] = []
        for number, record in numbered:
            rows = self.rows_of(number, record)
            key = record_key(record)
            own = [row for row in rows if row.get("piece", 0) == 0]
            lengths = [row["full_length"] for row in own]
            tally.own_rows += len(own) - 1
            tally.own_tokens += sum(lengths) - max(lengths)
            for row in own:
                self._count(tally, number, row)
            for row in rows:
                is_long = row["full_length"] > self.max_length
                if is_long and self.long_rows == "drop":
                    continue
                if row["supervised"]:
                    _count_kept(tally, row, self.task)
                    kept.append(row | {"key": key})
                elif row["full_length"]:
                    tally.dropped.add(number)
        arrays = {name: [row[name] for row in kept] for name in names}
        return pa.table(arrays, schema=self.features.arrow_schema), tally

    def _count(self, tally: Tally, number: str, row: dict[str, Any]) -> None:
        """Count a row before it is cut."""
        length = row["full_length"]
        tally.full_tokens += length
        tally.largest = tuple(map(max, tally.largest or (length, -length), (length, -length)))
        if not length:
            tally.unanswered.add(number)
        if length > self.max_length:
            tally.long.add(number)
            is_split = self.long_rows == "split"
            is_dropped = self.long_rows == "drop"
            tally.cut_tokens += 0 if is_split else length - self.max_length * (not is_dropped)


def record_key(record: Record) -> int:
    """A number of 63 bits that depends on the contents of a record only."""
    text = json.dumps(record, sort_keys=True, default=str, ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def _count_kept(tally: Tally, row: dict[str, Any], task: str) -> None:
    if row["special"] and not tally.special.first:
        tally.special.first = [str(tally.rows)]
    tally.rows += 1
    tally.tokens += row["length"]
    tally.supervised += row["supervised"]
    tally.lost.update(row["lost"])
    tally.thinks += row["thinks"]
    targets = row["labels"] if task == "seq2seq" else ()
    largest = (max(ids, default=0) for ids in (row["input_ids"], targets))
    tally.largest_id = max(tally.largest_id, *largest)


def split_row(row: dict[str, Any], max_length: int) -> list[dict[str, Any]]:
    """A row of a causal language model in pieces of at most `max_length` tokens: those with loss,
    or else the first."""
    ids, labels = row["input_ids"], row["labels"]
    if len(ids) <= max_length:
        return [row]
    pieces: list[dict[str, Any]] = []
    for start in range(0, len(ids) - 1, max_length - 1):
        part, end = dict(row), start + max_length
        part["input_ids"], part["labels"] = ids[start:end], labels[start:end]
        if start:
            part["labels"][0] = NO_LOSS  # the piece before has learned it
        part["length"] = len(part["input_ids"])
        learned = sum(label != NO_LOSS for label in part["labels"])
        part["supervised"] = learned * any(label != NO_LOSS for label in part["labels"][1:])
        pieces.append(part)
    pieces = [part for part in pieces if part["supervised"]] or pieces[:1]
    return [part | {"piece": number} for number, part in enumerate(pieces)]


def tables_of(
    encoder: Encoder, records: Records, tally: Tally, processes: int
) -> Iterator[pa.Table]:
    """The rows that are kept, a table for each chunk of records, while `tally` grows.

    Raises UserError for a record that cannot be encoded, and at the end as `require_rows` does.
    """
    total = sum(part.size for part in records.parts)
    numbered = iter(Progress(records.numbered(), desc="Tokenizing", total=total))
    chunks = iter(lambda: list(islice(numbered, CHUNK_ROWS)), [])
    for table, counts in mapped(encoder.chunk, chunks, processes):
        tally += counts
        yield table
    require_rows(encoder, tally)


def require_rows(encoder: Encoder, tally: Tally) -> None:
    """Refuse a source of which nothing, or too little, would be learned."""
    source, length, none_left = encoder.source, encoder.max_length, not tally.supervised
    count = tally.unanswered.count + tally.dropped.count
    if none_left and tally.unanswered.count:
        raise UserError(
            f"{source}: {tally.unanswered.count} of {count} rows have no answer "
            f"({tally.unanswered}), and no other is learned: each needs a non-empty assistant "
            "turn, completion, output or text"
        )
    if none_left:
        longest, shortest = tally.largest[0], -tally.largest[1]
        raise UserError(
            f"{source}: cut to {length} tokens, no row has an answer left (its {count} rows have "
            f"{shortest} to {longest} tokens): raise --max-length"
        )
    share = tally.cut_tokens / max(tally.full_tokens, 1)
    others = "truncate, drop or split" if encoder.task == "causal-lm" else "truncate or drop"
    require(
        encoder.long_rows != "error" or share <= MOST_LOST,
        f"{source}: {tally.long.count:,} rows are longer than {length:,} tokens ({tally.long}), "
        f"the longest has {(tally.largest or (0,))[0]:,}; cut, they would lose {share:.1%} of all "
        f"tokens. Raise --max-length, or give --long-rows {others}",
    )


@contextmanager
def errors_in(place: str) -> Iterator[None]:
    """Put `place` before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def require_vocabulary(rows: Iterable[Sequence[int]], tokenizer: Tokenizer, size: int) -> None:
    """Raise if a row of token ids, or of padding, has one without a row in an embedding of `size`.

    A tokenizer may be larger than the embedding as long as the others are not used.
    """
    beyond = {i for ids in rows if max(ids, default=0) >= size for i in ids if i >= size}
    if beyond:
        tokens = [repr(token) for token in tokenizer.convert_ids_to_tokens(sorted(beyond))]
        raise UserError(
            f"the model's embedding has {size:,} rows, the tokenizer {len(tokenizer):,} tokens, of "
            f"which these are used: {some(tokens, 8)}. Grow the model, in Python with "
            f"model.resize_token_embeddings({len(tokenizer)}), save it and the tokenizer with "
            "save_pretrained and give that folder as --model; or take the tokens out"
        )
