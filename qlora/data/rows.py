"""Sources of data -> rows of token ids with labels, and their counts.

A row is a record as its task encodes it (qlora.data.objectives): `input_ids` (T,), `labels` with
-100 where there is no loss, and `length`, T. Records do not stay in memory; tokens, 8 bytes each,
do of small data only (qlora.data.cache). Rows that are encoded while training runs: see
qlora.data.streaming.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora.data import cache, workers
from qlora.data.chats import AS_IT_IS, Reading
from qlora.data.encoding import (
    SELECTING,
    Encoder,
    Tally,
    errors_in,
    require_vocabulary,
    tables_of,
)
from qlora.data.objectives import class_names
from qlora.data.records import ANY, Chosen, Records, load_records
from qlora.data.templates import fallback_template, set_switches
from qlora.errors import require, some

LARGE_ROWS = 10_000  # of a hub data set, to be encoded on disk


@dataclass(frozen=True)
class DataStats:
    """Counts of a prepared data set, of the rows that were kept and their tokens after the cut."""

    rows: int
    tokens: int
    supervised_tokens: int  # those with loss
    cut_rows: int  # longer than max_length, kept or not
    dropped_rows: int  # without a supervised token after the cut, or too long
    cut_tokens: int = 0  # those that were left out of longer rows
    cut_share: float = 0.0  # of all tokens
    unanswered_rows: int = 0  # dropped, since they have no answer or text
    classes: tuple[str, ...] = ()  # a classifier's names, by their number
    chats: bool = False  # whether the chat template rendered the rows
    lost: Mapping[str, int] = field(
        default_factory=dict
    )  # what the template leaves out: in how many rows
    special: int | None = None  # the first row with tool calls or reasoning
    notes: tuple[str, ...] = ()  # what of the source was not used, or cut
    own_rows: int = 0  # rows more than records, of turns that need their own
    own_tokens: int = 0  # in these rows, before the cut
    thinks: int = 0  # rows rendered with the template's enable_thinking
    fingerprint: str = ""  # of all rows; "" where it was not computed

    def counts(self) -> dict[str, Any]:
        """The counts, by name."""
        others = ("classes", "chats", "notes", "cut_share")
        return {name: value for name, value in asdict(self).items() if name not in others}


def prepare_data(
    source: str,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    task: str = "causal-lm",
    classes: Sequence[str] = (),
    new_classes: bool = True,
    split: str = "training",
    limit: int | None = None,
    vocabulary: int | None = None,
    reading: Reading = AS_IT_IS,
    long_rows: str = "truncate",
    selecting: bool = False,
    chosen: Chosen = ANY,
    num_proc: int | None = None,
) -> tuple[Dataset, DataStats]:
    """Rows of `source` as input_ids, labels and length, of at most max_length tokens; and counts.

    The tokenizer is not changed: where it has no chat template, chats are rendered with the
    fallback template, which `prepare_tokenizer` sets.

    Args:
        classes: a classifier's class names.
        new_classes: use the class names of the data where `classes` lacks some of them.
        split: "training" or "evaluation": what to read of a source with several splits.
        limit: read only the first records, at most so many.
        vocabulary: the rows of the model's embedding; UserError if a token has no row in it.
        reading: how chats are read from records.
        long_rows: "truncate", "drop", "split" or "error" (qlora.data.encoding).
        chosen: the configuration and the split of the source that the user named.
        num_proc: processes that tokenize large data; by default one a core.
        selecting: with the columns by which qlora.data.mixing chooses rows.
    """
    settings = (source, task, max_length, classes, new_classes, split, reading, long_rows, chosen)
    encoder = Encoder(source, task, tokenizer, max_length, classes, reading, long_rows)
    contents = cache.contents_of(source) if limit is None else None
    found = cache.cached(cache.key_of(contents, tokenizer, settings)) if contents else None
    if found is None:
        kinds = reading.kinds(encoder.objective.kinds)
        records = load_records(source, kinds, split=split, limit=limit, chosen=chosen)
        if split == "training":
            reading.require_column(records, source)
        contents = contents or _fingerprints(records)
        key = cache.key_of(contents, tokenizer, settings) if contents else None
        found = cache.cached(key) if key else None
        count = num_proc or workers.cores()
        found = found or _encoded(encoder, records, key, new_classes, count)
    rows, facts = found
    tally, classes = Tally.of(facts["tally"]), facts["classes"]
    require_known(encoder, rows, tally, vocabulary)
    notes = (*notes_on(encoder, tally), *facts["notes"])
    stats = stats_of(tally, classes, facts["chats"], long_rows == "drop", notes)
    stats = replace(stats, fingerprint=facts["fingerprint"])
    return rows if selecting else rows.remove_columns(list(SELECTING)), stats


def require_known(encoder: Encoder, rows: Dataset, tally: Tally, vocabulary: int | None) -> None:
    """Raise if a token of the rows, or the pad, has no row in an embedding of that size."""
    tokenizer = encoder.tokenizer
    if vocabulary is not None and max(tally.largest_id, tokenizer.pad_token_id or 0) >= vocabulary:
        used = [*rows["input_ids"], *(rows["labels"] if encoder.task == "seq2seq" else ())]
        pads = [i for i in [tokenizer.pad_token_id] if i is not None]
        with errors_in(encoder.source):
            require_vocabulary([*used, pads], tokenizer, vocabulary)


def _fingerprints(records: Records) -> str | None:
    """What stands for the contents of a large data set of the hub."""
    known = all(part.fingerprint for part in records.parts)
    is_large = sum(part.size for part in records.parts) >= LARGE_ROWS and records.limit is None
    return " ".join(part.fingerprint for part in records.parts) if known and is_large else None


def _encoded(
    encoder: Encoder, records: Records, key: str | None, new_classes: bool, processes: int
) -> tuple[Dataset, dict[str, Any]]:
    """The rows of the records, in memory or as the cache's entry `key`, and facts on them."""
    if encoder.objective.classifies and new_classes:
        with errors_in(encoder.source):
            classes = class_names(records, known=encoder.classes)
        encoder = replace(encoder, classes=classes)
    encoder = replace(encoder, records=records)
    tally, features = Tally(), encoder.features
    tables = tables_of(encoder, records, tally, processes if key else 1)

    def facts(rows: Dataset) -> dict[str, Any]:
        others: dict[str, Any] = {"classes": list(encoder.classes), "notes": list(records.notes)}
        others["chats"] = has_chats(encoder.task, records)
        return {"tally": tally.record(), "fingerprint": fingerprint(rows), **others}

    if key:
        return cache.store(key, features, tables, facts)
    rows = Dataset(pa.concat_tables([features.arrow_schema.empty_table(), *tables]))
    return rows, facts(rows)


def has_chats(task: str, records: Records) -> bool:
    """Whether the chat template renders these records."""
    return task == "causal-lm" and records.kind != ("text",)


def stats_of(
    tally: Tally, classes: Sequence[str], chats: bool, drops: bool, notes: tuple[str, ...]
) -> DataStats:
    """The counts of a tally; `drops`: rows that are too long are left out."""
    return DataStats(
        rows=tally.rows,
        tokens=tally.tokens,
        supervised_tokens=tally.supervised,
        cut_rows=tally.long.count,
        dropped_rows=tally.dropped.count + (tally.long.count if drops else 0),
        cut_tokens=tally.cut_tokens,
        cut_share=tally.cut_tokens / max(tally.full_tokens, 1),
        unanswered_rows=tally.unanswered.count,
        classes=tuple(classes),
        chats=chats,
        lost=dict(tally.lost),
        special=next(map(int, tally.special.first), None),
        notes=notes,
        own_rows=tally.own_rows,
        own_tokens=tally.own_tokens,
        thinks=tally.thinks,
    )


def notes_on(encoder: Encoder, tally: Tally) -> tuple[str, ...]:
    """What happened to long rows and to rows without an answer, with their numbers."""
    notes, name = [], encoder.source
    if tally.long.count and encoder.long_rows == "split":
        notes.append(f"{name}: {tally.long.count:,} rows split at max_length ({tally.long})")
    elif tally.long.count:
        done = "dropped, longer than" if encoder.long_rows == "drop" else "cut at"
        share = f"{tally.cut_tokens / tally.full_tokens:.2%} of the tokens left out"
        notes.append(f"{name}: {tally.long.count:,} rows {done} max_length ({tally.long}), {share}")
    if tally.dropped.count:
        dropped = f"{tally.dropped.count:,} rows dropped because no answer was left"
        notes.append(f"{name}: {dropped} ({tally.dropped})")
    if tally.unanswered.count:
        dropped = f"{tally.unanswered.count:,} rows dropped because they have no answer or text"
        notes.append(f"{name}: {dropped} ({tally.unanswered})")
    return tuple(notes)


def fingerprint(rows: Dataset) -> str:
    """A hash of the rows' token ids and labels, in their order."""
    digest = hashlib.sha256()
    columns = rows.select_columns(["input_ids", "labels"]).with_format("arrow")
    for table in columns.iter(batch_size=1000):
        for column in (chunks.combine_chunks() for chunks in table.columns):
            if hasattr(column, "value_lengths"):  # a classifier's labels are no lists
                digest.update(column.value_lengths().to_numpy().tobytes())
                column = column.flatten()
            digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()[:16]


def prepare_tokenizer(
    tokenizer: Tokenizer, *, chats: bool = False, thinks: bool = False
) -> tuple[str, ...]:
    """Set a missing `pad_token` to eos, or else unk; returns the names of the attributes set.

    With `chats`, also set a missing `chat_template` to the fallback template that `prepare_data`
    uses: saved with the tokenizer, it renders the same prompts in generation. With `thinks`, its
    enable_thinking is on by default.

    Raises:
        UserError: the tokenizer has neither.
    """
    changed = []
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        fault = "the tokenizer has no pad, eos or unk token: set one in its tokenizer_config"
        require(tokenizer.pad_token is not None, fault)
        changed.append("pad_token")
    if chats and (template := fallback_template(tokenizer)):
        tokenizer.chat_template = template
        changed.append("chat_template")
    if thinks:
        set_switches(tokenizer, {"enable_thinking": True})
    return tuple(changed)


def describe(stats: DataStats, *, name: str) -> str:
    """One line of counts, and those on what was cut, dropped or not used."""
    line = f"{name}: {stats.rows:,} rows, {stats.tokens:,} tokens, {stats.supervised_tokens:,} "
    if stats.classes:
        line += f"labels of {len(stats.classes)} classes: {some(stats.classes, 8)}"
    else:
        line += f"of them supervised ({stats.supervised_tokens / max(stats.tokens, 1):.0%})"
    if lost := [f"the {what} of {count:,} rows" for what, count in sorted(stats.lost.items())]:
        line += (
            f"\n{name}: the model's chat template leaves out {' and '.join(lost)}: write them as "
            "text, or use a template that renders them"
        )
    if stats.thinks:
        line += (
            f"\n{name}: {stats.thinks:,} rows have reasoning, which the chat template's prompt "
            "forbids: they are rendered with enable_thinking, as prompts will be "
            "(--no-enable-thinking leaves the reasoning out)"
        )
    if stats.own_rows:
        line += (
            f"\n{name}: {stats.own_rows:,} rows ({stats.own_tokens:,} tokens) more than chats: a "
            "turn has its own where the chat template changes its prompt, reasoning or end once it "
            "is not the last (--train-on last adds none)"
        )
    return "\n".join((line, *stats.notes))
