"""Records -> rows of token ids with labels -> batches, padded or packed.

A row is a record as its task encodes it (qlora.data.objectives): `input_ids` (T,), `labels` with
-100 where there is no loss, and `length`, T. Tokens (8 bytes each) stay in memory, records do not.

A pack is several rows, of up to max_length tokens together, concatenated without padding:

    input_ids       a a a a a b b b c c c c       rows a, b, c
    position_ids    0 1 2 3 4 0 1 2 0 1 2 3       start at 0 in each row
    labels          - a a a a - b b - c c c       the first token of a row is never predicted
    cu_seq_lens     0         5     8       12    where rows begin, and the end

The loss equals that of separate rows: it is summed over the same labels, and attention stays within
each row (qlora.fast.attention).

Packs are filled by best-fit decreasing: the longest row first, each into the pack that it fills
best. At most 11/9 of the fewest possible packs, plus 6/9, are used (Johnson et al., SIAM J. Comput.
3, 1974; Dósa, 2007). The free spaces in use are the bits of one integer: n rows cost a sort and n
shifts of max_length bits, 0.4 s for 100,000 rows of up to 2048 tokens. Packing runs once; epochs
shuffle the packs, not the rows within them.

Left out: streaming; cutting rows to fill packs completely, which separates text from its context.
"""

import copy
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening
from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora.cli import Progress
from qlora.data.chat_template import NO_LOSS
from qlora.data.chats import AS_IT_IS, Reading
from qlora.data.objectives import OBJECTIVES, class_names
from qlora.data.records import Record, Records, load_records
from qlora.data.templates import fallback_template, set_switches
from qlora.errors import UserError, require, some

if TYPE_CHECKING:
    from datasets import Dataset

Collator = Callable[[list[Any]], Any]
MOST_PIECES = 40  # of a row that is shown
CHUNK_ROWS = 1000
BATCH_TOKENS = 2048  # without gradients: their logits over a vocabulary of 128k take 0.5 GB in bf16


@dataclass(frozen=True)
class DataStats:
    """Counts of a prepared data set, of the rows that were kept and their tokens after the cut."""

    rows: int
    tokens: int
    supervised_tokens: int  # those with loss
    cut_rows: int  # longer than max_length, kept or not
    dropped_rows: int  # without a supervised token after the cut
    classes: tuple[str, ...] = ()  # a classifier's names, by their number
    chats: bool = False  # whether the chat template rendered the rows
    lost: Mapping[str, int] = field(
        default_factory=dict
    )  # what the template leaves out: in how many rows
    special: int | None = None  # the first row with tool calls or reasoning
    notes: tuple[str, ...] = ()  # what of the source was not used
    own_rows: int = 0  # rows more than records, of turns that need their own
    thinks: int = 0  # rows rendered with the template's enable_thinking

    def counts(self) -> dict[str, Any]:
        """The counts, by name."""
        others = ("classes", "chats", "notes")
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
) -> "tuple[Dataset, DataStats]":
    """Rows of `source` as input_ids, labels and length, cut to max_length tokens; and counts.

    The tokenizer is not changed: where it has no chat template, chats are rendered with the
    fallback template, which `prepare_tokenizer` sets.

    Args:
        classes: a classifier's class names.
        new_classes: use the class names of the data where `classes` lacks some of them.
        split: "training" or "evaluation": what to read of a source with several splits.
        limit: read only the first records, at most so many.
        vocabulary: the rows of the model's embedding; UserError if a token has no row in it.
        reading: how chats are read from records.
    """
    from datasets import Value

    objective = OBJECTIVES[task]
    records = load_records(source, reading.kinds(objective.kinds), split=split, limit=limit)
    if objective.classifies and new_classes:
        with _errors_in(source):
            classes = class_names(records, records.kind[-1], classes)
    ids = [Value("int32")]
    columns: dict[str, Any] = {"input_ids": ids, "labels": ids[0] if objective.one_label else ids}
    if objective.one_label and "token_type_ids" in tokenizer.model_input_names:
        columns["token_type_ids"] = ids
    encoded = _encoded(
        source,
        records,
        columns,
        lambda row: objective.encode(row, tokenizer, max_length, classes, reading),
    )
    supervised = list(encoded["supervised"])
    _require_answers(source, encoded, max_length)
    keep = [i for i, labels in enumerate(supervised) if labels]
    rows = encoded if len(keep) == len(encoded) else encoded.select(keep)
    if vocabulary is not None:
        targets = rows["labels"] if task == "seq2seq" else ()
        pads = [[i for i in [tokenizer.pad_token_id] if i is not None]]
        with _errors_in(source):
            require_vocabulary(chain(rows["input_ids"], targets, pads), tokenizer, vocabulary)
    chats = task == "causal-lm" and records.kind != ("text",)
    stats = replace(_stats(encoded, rows, max_length), classes=tuple(classes), chats=chats)
    stats = replace(stats, notes=records.notes)
    return rows.select_columns([*columns, "length"]), stats


def _stats(encoded: "Dataset", rows: "Dataset", max_length: int) -> DataStats:
    """The counts of all encoded rows, and of `rows`, those that are kept."""
    full = list(encoded["full_length"])
    return DataStats(
        rows=len(rows),
        tokens=sum(rows["length"]),
        supervised_tokens=sum(rows["supervised"]),
        cut_rows=sum(length > max_length for length in full),
        dropped_rows=len(full) - len(rows),
        lost=dict(Counter(what for names in rows["lost"] for what in names)),
        special=next((i for i, special in enumerate(rows["special"]) if special), None),
        own_rows=len(full) - len(set(encoded["number"])),
        thinks=sum(rows["thinks"]),
    )


def fingerprint(rows: "Dataset") -> str:
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


def _encoded(
    source: str,
    records: Records,
    columns: Mapping[str, Any],
    encode: Callable[[Record], list[dict[str, Any]]],
) -> "Dataset":
    """The encoded records in memory; no more than CHUNK_ROWS are Python objects at a time."""
    from datasets import Dataset, Features, Value, concatenate_datasets

    others: dict[str, Any] = dict.fromkeys(("length", "full_length", "supervised"), Value("int64"))
    others |= {"lost": [Value("string")], "special": Value("bool"), "number": Value("string")}
    others |= {"thinks": Value("bool")}
    features = Features({**columns, **others})

    def rows() -> Iterator[dict[str, Any]]:
        total = sum(part.size for part in records.parts)
        for number, record in Progress(records.numbered(), desc="Tokenizing", total=total):
            with _errors_in(f"{source}, row {number}"):
                encoded = [row | {"number": number} for row in encode(record)]
            yield from ({name: row[name] for name in features} for row in encoded)

    parts = [Dataset.from_dict({name: [] for name in features}, features=features)]
    every = rows()
    while chunk := list(islice(every, CHUNK_ROWS)):
        parts.append(Dataset.from_list(chunk, features=features))
    return concatenate_datasets(parts)


@contextmanager
def _errors_in(place: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _require_answers(source: str, encoded: "Dataset", max_length: int) -> None:
    full = list(encoded["full_length"])
    numbers = zip(encoded["number"], full, strict=True)
    if unanswered := [number for number, length in numbers if not length]:
        raise UserError(
            f"{source}: {len(unanswered)} of {len(full)} rows have no answer (row "
            f"{some(unanswered)}): each needs a non-empty assistant turn, completion or output; "
            "fill or remove these rows"
        )
    if not any(encoded["supervised"]):
        raise UserError(
            f"{source}: cut to {max_length} tokens, no row has an answer left (its {len(full)} "
            f"rows have {min(full)} to {max(full)} tokens): raise --max-length"
        )


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
    """One line of counts, one if rows were cut or dropped, and those on what was not used."""
    line = f"{name}: {stats.rows:,} rows, {stats.tokens:,} tokens, {stats.supervised_tokens:,} "
    if stats.classes:
        line += f"labels of {len(stats.classes)} classes: {some(stats.classes, 8)}"
    else:
        line += f"of them supervised ({stats.supervised_tokens / max(stats.tokens, 1):.0%})"
    if stats.cut_rows or stats.dropped_rows:
        line += (
            f"\n{name}: {stats.cut_rows:,} rows cut at max_length, {stats.dropped_rows:,} rows "
            "dropped because no answer was left"
        )
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
            f"\n{name}: {stats.own_rows:,} rows more than chats: a turn whose reasoning or end the "
            "chat template shows only where it is the last has its own"
        )
    return "\n".join((line, *stats.notes))


def show_example(
    dataset: "Dataset",
    tokenizer: Tokenizer,
    *,
    colour: bool,
    task: str = "causal-lm",
    classes: Sequence[str] = (),
    special: int | None = None,
) -> str:
    """The longest row, the row `special`, and the shortest, decoded, with loss marked."""
    lengths = list(dataset["length"])
    longest, shortest = lengths.index(max(lengths)), lengths.index(min(lengths))
    chosen = {longest: "", special: "One with tool calls or reasoning", shortest: "The shortest"}
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    text = f"An example row; loss is on the text {'in green' if colour else 'between ⟦ and ⟧'}:\n"
    for index, title in chosen.items():
        if index is None:
            continue
        text += f"\n{title}, row {index + 1}:\n" if index != longest else ""
        row: Any = dataset[index]
        pieces = list(OBJECTIVES[task].pieces(row, tokenizer, classes))
        if len(pieces) > MOST_PIECES:
            half = MOST_PIECES // 2
            pieces[half:-half] = [(" … ", False)]
        for piece, has_loss in pieces:
            piece = piece if len(piece) <= 800 else f"{piece[:400]} … {piece[-400:]}"
            text += f"{begin}{piece}{end}" if has_loss else piece
    return text


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


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs of indices into `lengths`, with a sum of at most `capacity` each; deterministic.

    Each index is in one pack. Lengths must be from 1 to `capacity`.
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
    """Packs of the rows of a data set, each a list of rows; tokens are not copied."""

    def __init__(self, rows: "Dataset", max_length: int) -> None:
        self.rows, self.max_length = rows, max_length
        self.packs = best_fit_decreasing(list(rows["length"]), max_length)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict[str, list[int]]]:
        return [self.rows[i] for i in self.packs[index]]

    def describe(self) -> str:
        """One line: the numbers of rows and packs, and how full the packs are."""
        share = sum(self.rows["length"]) / max(len(self) * self.max_length, 1)
        return (
            f"packing: {len(self.rows):,} rows in {len(self):,} packs of up to {self.max_length:,} "
            f"tokens, {share:.1%} full; --per-device-train-batch-size counts packs"
        )


_flatten: Any = DataCollatorWithFlattening(return_flash_attn_kwargs=True)


def _as_packs(items: Sequence[Any]) -> list[list[Mapping[str, Any]]]:
    """Packs as they are; a row (evaluation data is not packed) as a pack of one."""
    return [item if isinstance(item, list) else [item] for item in items]


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
