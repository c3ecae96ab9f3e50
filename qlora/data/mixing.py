"""Several sources of training data -> one, and the part of it to evaluate on.

With weights, each source gives its share of the rows: as many as fit without a row used twice, so
the source that is the smallest for its weight is used whole. Which rows of the others, and which
rows are evaluated on, is decided by a hash of the seed and of each record's contents, not of its
place. So rows from one record, and equal records, are on one side of the split; the order of files
changes nothing, and more rows leave most of the others on their side.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora.config import DataConfig
from qlora.data.batches import column
from qlora.data.encoding import SELECTING, errors_in
from qlora.data.objectives import OBJECTIVES, class_names
from qlora.data.records import Chosen, load_records
from qlora.data.rows import DataStats, prepare_data
from qlora.errors import require

Part = tuple[Dataset, DataStats]
SUMMED = (
    "rows", "tokens", "supervised_tokens", "cut_rows", "dropped_rows", "unanswered_rows",
    "own_rows", "own_tokens", "thinks",
)  # fmt: skip
WITHIN, ACROSS = 1, 2  # for two hashes: rows of a mixture, rows to evaluate on


def prepare_training(
    data: DataConfig, tokenizer: Tokenizer, *, seed: int, **options: Any
) -> tuple[Part, Part | None]:
    """The rows to train on, and those of `eval_share` to evaluate on, each with its counts.

    Args:
        options: of `prepare_data`.

    Raises:
        UserError: a source cannot be used, or a share is less than a row.
    """
    chosen = Chosen(data.data_config or "", data.data_split or "")
    objective = OBJECTIVES[options["task"]]
    if objective.classifies and len(data.sources) > 1:
        every = [load_records(source, objective.kinds) for source in data.sources]
        with errors_in(data.name):
            classes = class_names(*every, known=options.get("classes", ()))
        options |= {"classes": classes, "new_classes": False}
    places: Any = {"selecting": True, "split": "training", "chosen": chosen}
    parts = [prepare_data(source, tokenizer, **places, **options) for source in data.sources]
    if data.data_weights:
        parts = weighted(parts, data, seed)
    rows, stats = joined(parts)
    if data.eval_share is None:
        return (_bare(rows), stats), None
    training, evaluation = split_off(data, rows, stats, seed)
    return (_bare(training[0]), training[1]), (_bare(evaluation[0]), evaluation[1])


def weighted(parts: Sequence[Part], data: DataConfig, seed: int) -> list[Part]:
    """As many rows of each part as its weight among `data_weights` asks for."""
    total = sum(data.data_weights)
    shares = [weight / total for weight in data.data_weights]
    size = min(len(rows) / share for (rows, _), share in zip(parts, shares, strict=True))
    chosen = []
    for (rows, stats), share, source in zip(parts, shares, data.sources, strict=True):
        count = min(round(size * share), len(rows))
        fault = f"--data-weights: {share:.4g} of {size:.0f} rows is no row of {source}"
        require(count > 0, f"{fault}: give it a larger weight, or leave it out")
        order = np.argsort(hashes(rows, seed, WITHIN), kind="stable")[:count]
        kept = rows if count == len(rows) else rows.select(np.sort(order))
        note = f"{source}: {count:,} of its {len(rows):,} rows, for {share:.1%} of the mixture"
        chosen.append((kept, counted(kept, replace(stats, notes=(*stats.notes, note)))))
    return chosen


def joined(parts: Sequence[Part]) -> Part:
    """All rows of the parts, one after the other, and the sums of their counts."""
    (rows, stats), *others = parts
    if not others:
        return rows, stats
    for _, theirs in others:
        special = stats.special
        if special is None and theirs.special is not None:
            special = stats.rows + theirs.special
        full = [s.cut_tokens / s.cut_share if s.cut_share else s.tokens for s in (stats, theirs)]
        cut_tokens = stats.cut_tokens + theirs.cut_tokens
        sums: Any = {name: getattr(stats, name) + getattr(theirs, name) for name in SUMMED}
        sums |= {"special": special, "cut_tokens": cut_tokens, "cut_share": cut_tokens / sum(full)}
        sums["lost"] = dict(Counter(stats.lost) + Counter(theirs.lost))
        sums |= {"chats": stats.chats or theirs.chats, "notes": (*stats.notes, *theirs.notes)}
        sums["fingerprint"] = ""
        stats = replace(stats, **sums)
    return concatenate_datasets([rows for rows, _ in parts]), stats


def split_off(data: DataConfig, rows: Dataset, stats: DataStats, seed: int) -> tuple[Part, Part]:
    """The rows to train on, and `eval_share` of the different records to evaluate on."""
    mixed = hashes(rows, seed, ACROSS)
    different = np.unique(mixed)
    count = max(1, round(float(data.eval_share or 0) * len(different)))
    fault = f"--eval-share {data.eval_share}: {data.name} has {len(different)} different rows"
    require(count < len(different), f"{fault}, of which none is left to train on: add rows")
    is_evaluated = mixed <= different[count - 1]
    sides = []
    for chosen in (~is_evaluated, is_evaluated):
        side = rows.select(np.flatnonzero(chosen))
        special = np.flatnonzero(chosen[: stats.special])
        is_here = stats.special is not None and chosen[stats.special]
        sides.append((side, counted(side, stats, len(special) if is_here else None)))
    (training, counts), (held_out, others) = sides
    name = f"{data.name}: {len(held_out):,} rows are evaluated on and not trained on"
    counts = replace(counts, notes=(*counts.notes, name))
    nothing: Any = dict.fromkeys(("cut_rows", "dropped_rows", "cut_tokens", "unanswered_rows"), 0)
    others = replace(others, **nothing, cut_share=0.0, notes=(), lost={}, own_rows=0)
    others = replace(others, own_tokens=0, thinks=0)
    return (training, counts), (held_out, others)


def counted(rows: Dataset, stats: DataStats, special: int | None = None) -> DataStats:
    """The counts of some of the rows that `stats` is of."""
    tokens, supervised = (int(column(rows, name).sum()) for name in ("length", "supervised"))
    sums: Any = {"rows": len(rows), "tokens": tokens, "supervised_tokens": supervised}
    sums["fingerprint"] = ""  # that of other rows
    return replace(stats, **sums, special=special)


def hashes(rows: Dataset, seed: int, purpose: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A number for each row that depends on the contents of its record, the seed and `purpose`.

    The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), on the record's key.
    """
    mix = (seed * 4 + purpose) * 0x9E3779B97F4A7C15 % (1 << 64)
    value = column(rows, "key").astype(np.uint64) + np.uint64(mix)  # wraps
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    return value ^ (value >> np.uint64(31))


def _bare(rows: Dataset) -> Dataset:
    return rows.remove_columns(list(SELECTING))
