"""The labels of a classifier: their names, their numbers, and how often they are right.

A record names its label, or says its number. Names are sorted, and their places are the numbers;
numbers without names are called LABEL_0, LABEL_1, … as transformers does. A data set of the hub
that says what its numbers mean (ClassLabel) has the names.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset

from qlora.errors import UserError, did_you_mean


def label_names(records: Dataset, column: str, known: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of all labels in a column of labels, or of lists of them.

    Args:
        known: the names that a model has already; they stay where they hold all that is there.

    Raises:
        UserError: labels are neither names nor whole numbers from 0, or there is just one.
    """
    feature = records.features[column]
    given = getattr(getattr(feature, "feature", feature), "names", None)
    values = {label for item in records[column] for label in _listed(item) if label is not None}
    if not values:
        raise UserError(f"{column} is empty in every row: a classifier learns from labels")
    if given:
        names = tuple(given)
    elif all(type(value) is int and value >= 0 for value in values):
        count = max(values, default=0) + 1
        names = tuple(f"LABEL_{i}" for i in range(count))
        names = tuple(known) if len(known) >= count else names
    elif all(isinstance(value, str | bool) for value in values):
        names = tuple(sorted(map(str, values)))
    else:
        odd = next(v for v in values if type(v) is not int or v < 0)
        raise UserError(
            f"{column} must be names or whole numbers from 0, got {odd!r}: change them, or leave "
            "those rows out"
        )
    if set(names) <= set(known):
        return tuple(known)
    if len(names) < 2:
        raise UserError(
            f"{column} holds one label alone, {''.join(names)}: a classifier needs two or more"
        )
    return names


def _listed(item: Any) -> list[Any]:
    return item if isinstance(item, list) else [item]


def label_id(label: Any, names: Sequence[str]) -> int:
    """The number of a label that is one of `names`, or a number already."""
    if type(label) is int:
        if 0 <= label < len(names):
            return label
        raise UserError(f"label {label} is not one of the training data's 0 to {len(names) - 1}")
    if str(label) not in names:
        shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
        raise UserError(
            f"label {str(label)[:60]!r} is none of {shown}.{did_you_mean(str(label), names)}"
        )
    return names.index(str(label))


# ---- how often they are right ----


def accuracy(predicted: Iterable[Sequence[int]], wanted: Iterable[Sequence[int]]) -> float:
    """The share of labels that are as wanted, of those of all rows together."""
    pairs = [pair for row in zip(predicted, wanted, strict=True) for pair in zip(*row, strict=True)]
    return sum(a == b for a, b in pairs) / max(len(pairs), 1)


def entity_f1(
    predicted: Iterable[Sequence[int]], wanted: Iterable[Sequence[int]], names: Sequence[str]
) -> float | None:
    """F1 over whole entities, as CoNLL counts them; None where `names` are no B- and I- tags.

    2 * right / (predicted + wanted), where an entity is right if its type, its first and its last
    word are.
    """
    if not any(name.startswith(("B-", "I-")) for name in names):
        return None
    right = total = 0
    for row in zip(predicted, wanted, strict=True):
        found, real = (entities([names[i] for i in ids]) for ids in row)
        right += len(found & real)
        total += len(found) + len(real)
    return 2 * right / max(total, 1)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, word after the last) of each entity in a row of B-, I- and other tags.

    An I- tag after another type begins an entity, as in conlleval.
    """
    spans = set()
    start, kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        mark, _, own = tag.partition("-") if tag.startswith(("B-", "I-")) else ("O", "", "")
        if kind and (mark != "I" or own != kind):
            spans.add((kind, start, i))
            kind = ""
        if own and (mark == "B" or not kind):
            start, kind = i, own
    return spans
