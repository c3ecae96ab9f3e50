"""What each task does with a record: the row, the batch, the loss and the scores.

    task        input_ids                labels (-100: no loss)                        loss over
    causal-lm   the chat, or the text    the same ids, where the model has to answer   next tokens
    seq2seq     the prompt               (T',) ids of the answer                       answer tokens
    seq-cls     the text, or two texts   the number of its class                       rows
    token-cls   the words' tokens        a class at the first token of each word       words

The loss is a cross-entropy summed over all labels of an optimizer step and divided once by their
number, so it does not depend on how a step is split into batches.

Of chats, the assistant's turns and their end tokens have loss (qlora.data.chat_template); of `text`
records, every token. The other tasks follow transformers' examples (run_translation, run_glue,
run_ner); that only the first token of a word has its label is run_ner's.

Classes: a record holds a class's name or its number. Names are sorted, and their positions are the
numbers; numbers without names are called LABEL_0, LABEL_1, … as in transformers. A data set of the
hub that names its numbers (ClassLabel) has the names.

Left out: regression, several labels a row, question answering.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.loss.loss_utils import ForCausalLMLoss

from qlora.config.tasks import TASKS, Task
from qlora.data.chat_template import NO_LOSS, Rendering, is_answer, tokenize
from qlora.data.records import KINDS, chat_of, kind_of, string_of
from qlora.errors import UserError, did_you_mean

Record = Mapping[str, Any]
Row = dict[str, Any]
Names = Sequence[str]
Pieces = Iterable[tuple[str, bool]]
Numbers = Iterable[Sequence[int]]


def count_labels(labels: Tensor) -> int:
    """How many labels have loss."""
    return int((labels != NO_LOSS).sum())


def label_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None) -> Tensor:
    """Cross-entropy summed over labels, divided by the number of those of the optimizer step."""
    logits = outputs["logits"].float().flatten(0, -2)  # (B, C) stays, (B, T, C) -> (B*T, C)
    total = F.cross_entropy(
        logits, labels.flatten().to(logits.device), ignore_index=NO_LOSS, reduction="sum"
    )
    return total / (count_labels(labels) if num_items_in_batch is None else num_items_in_batch)


@dataclass(frozen=True)
class Objective:
    """What a task learns from, and how."""

    task: Task
    kinds: tuple[tuple[str, ...], ...]
    """columns of each kind of record; a classifier's label is the last of them"""
    encode: Callable[[Record, Tokenizer, int, Names], Row]
    """(record, tokenizer, max_length, class names) -> what `_row` returns"""
    pieces: Callable[[Row, Tokenizer, Names], Pieces]
    """(row, tokenizer, class names) -> its text in pieces, each with whether it has loss"""
    collator: Any
    """transformers' class for it"""
    loss: Callable[[Any, Tensor, Tensor | None], Tensor] = label_loss
    """(outputs, labels, number of labels in the step) -> loss"""
    supervised: Callable[[Tensor], int] = count_labels
    """the number of labels with loss in a batch's labels"""
    scores: Callable[[Numbers, Numbers, Names], dict[str, float]] | None = None
    """of a classifier: (predicted, wanted, class names) -> scores; rows of class numbers"""
    one_label: bool = False
    """a row has one label, and is a text or two, which some models tell apart by token_type_ids"""

    @property
    def classifies(self) -> bool:
        """Whether labels are classes, not tokens."""
        return self.scores is not None


def _row(
    ids: list[int], labels: Any, full_length: int, supervised: int, length: int | None = None
) -> Row:
    """`input_ids` and `labels`, cut; `length`, tokens after the cut; `full_length`, tokens before
    it, 0 where there is no answer; `supervised`, labels with loss."""
    length = len(ids) if length is None else length
    counts = {"length": length, "full_length": full_length, "supervised": supervised}
    return {"input_ids": ids, "labels": labels, **counts}


# ---- causal language models


def encode_chat(record: Record, tokenizer: Tokenizer, max_length: int, names: Names = ()) -> Row:
    """Ids of a chat or text, and the same as labels where the model has to answer."""
    ids, labels = _chat_ids(record, tokenizer) or ([], [])
    kept = labels[:max_length]
    # the first token is never predicted, so a label there alone teaches nothing
    supervised = sum(i != NO_LOSS for i in kept) * any(i != NO_LOSS for i in kept[1:])
    return _row(ids[:max_length], kept, len(ids), supervised)


def _chat_ids(record: Record, tokenizer: Tokenizer) -> tuple[list[int], list[int]] | None:
    """Ids and labels of a record before the cut; None when it has no answer."""
    chat = chat_of(record)
    if chat is None:
        ids = list(tokenizer(string_of(record["text"]), verbose=False)["input_ids"])
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        return ids, list(ids)
    if not any(is_answer(message) for message in chat.messages[chat.first :]):
        return None
    text_and_spans = Rendering(tokenizer, chat).with_spans()
    if text_and_spans is not None:
        return tokenize(tokenizer, *text_and_spans)
    if re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)):
        marked: Any = tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = marked["input_ids"], marked["assistant_masks"]
        return ids, [i if on else NO_LOSS for i, on in zip(ids, mask, strict=True)]
    raise UserError(
        "the assistant's turns cannot be found in the chat as the model's template renders it: put "
        "{% generation %} marks around them in the template, or render the rows to a text column"
    )


def _chat_pieces(row: Row, tokenizer: Tokenizer, names: Names) -> Pieces:
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for learned, group in groupby(pairs, key=lambda pair: pair[1] != NO_LOSS):
        yield str(tokenizer.decode([i for i, _ in group], skip_special_tokens=False)), learned


def token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None) -> Tensor:
    """Cross-entropy summed over supervised next tokens, divided by those of the optimizer step.

    Logits are (B, T, vocab) and labels (B, T).
    """
    logits = outputs["logits"]
    loss: Tensor = ForCausalLMLoss(
        logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch
    )
    return loss


# ---- encoder-decoder language models


def encode_answer(record: Record, tokenizer: Tokenizer, max_length: int, names: Names = ()) -> Row:
    """Ids of the prompt, and those of the answer as labels, each as the tokenizer ends it."""
    kind = kind_of(record, kinds=SEQ2SEQ_KINDS)
    prompt, answer = string_of(record[kind[0]]), string_of(record[kind[-1]])
    if kind[0] == "instruction" and string_of(record.get("input")).strip():
        prompt = f"{prompt}\n\n{string_of(record['input'])}"
    if not answer.strip():
        return _row([], [], 0, 0)
    ids, full = _cut(tokenizer, max_length, prompt)
    labels, full_answer = _cut(tokenizer, max_length, None, text_target=answer)
    ids, labels = ids["input_ids"], labels["input_ids"]
    return _row(ids, labels, max(full, full_answer), len(labels), len(ids) + len(labels))


def _cut(tokenizer: Tokenizer, max_length: int, *texts: Any, **settings: Any) -> tuple[Any, int]:
    """The encoding, cut with its special tokens left on, and its length before the cut."""
    encoded = tokenizer(*texts, verbose=False, **settings)
    full = len(encoded["input_ids"])
    if full > max_length:
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, **settings)
    return encoded, full


def _answer_pieces(row: Row, tokenizer: Tokenizer, names: Names) -> Pieces:
    answer = row["labels"]
    yield str(tokenizer.decode(row["input_ids"])) + " ", False
    yield str(tokenizer.decode(answer)) if isinstance(answer, list) else names[answer], True


# ---- classifiers


def encode_text(record: Record, tokenizer: Tokenizer, max_length: int, names: Names) -> Row:
    """Ids of a text, or of two, and its class's number."""
    *columns, column = kind_of(record, kinds=TEXT_KINDS)
    if record[column] is None:
        raise UserError(f"{column} is missing: give each row one, or leave the row out")
    encoded, full = _cut(tokenizer, max_length, *(string_of(record[c]) for c in columns))
    row = _row(encoded["input_ids"], class_number(record[column], names), full, 1)
    types = encoded.get("token_type_ids")
    return row if types is None else row | {"token_type_ids": types}


def encode_words(record: Record, tokenizer: Tokenizer, max_length: int, names: Names) -> Row:
    """Ids of a list of words, and the number of each word's class at its first token."""
    kind = kind_of(record, kinds=WORD_KINDS)
    words, tags = (record[column] for column in kind)
    if not (isinstance(words, list) and isinstance(tags, list) and len(words) == len(tags)):
        sizes = [len(x) if isinstance(x, list) else type(x).__name__ for x in (words, tags)]
        raise UserError(
            f"{kind[0]} and {kind[1]} must be two lists of one length, got {sizes[0]} and "
            f"{sizes[1]}"
        )
    numbers = [class_number(tag, names) for tag in tags]
    strings = [string_of(word) for word in words]
    encoded, full = _cut(tokenizer, max_length, strings, is_split_into_words=True)
    positions = encoded.word_ids()  # of each token: its word, None for special tokens
    labels = [
        numbers[word] if word is not None and word != before else NO_LOSS
        for before, word in zip([None, *positions], positions, strict=False)
    ]
    return _row(encoded["input_ids"], labels, full, sum(label != NO_LOSS for label in labels))


def _word_pieces(row: Row, tokenizer: Tokenizer, names: Names) -> Pieces:
    for i, label in zip(row["input_ids"], row["labels"], strict=True):
        yield str(tokenizer.decode([i])).strip(), False
        if label != NO_LOSS:
            yield names[label], True
        yield " ", False


def class_names(records: Dataset, column: str, known: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of all classes in a column of labels, or of lists of labels.

    Args:
        known: the model's class names; kept where they include all that the column has.

    Raises:
        UserError: labels are neither names nor whole numbers from 0, or all are the same.
    """
    feature = records.features[column]
    given = getattr(getattr(feature, "feature", feature), "names", None)  # of a ClassLabel
    items = (item if isinstance(item, list) else [item] for item in records[column])
    values = {label for item in items for label in item if label is not None}
    if not values:
        raise UserError(f"{column} is empty in every row: a classifier learns from labels")
    if given:
        names = tuple(given)
    elif all(type(value) is int and value >= 0 for value in values):
        count = max(values) + 1
        names = tuple(known) if len(known) >= count else tuple(f"LABEL_{i}" for i in range(count))
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


def class_number(label: Any, names: Names) -> int:
    """The number of a class, given by its name or its number."""
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


# ---- loss and scores over rows


def measure(
    objective: Objective, results: Iterable[tuple[Tensor, Any, Tensor]], names: Names = ()
) -> dict[str, float]:
    """`loss`, the mean over all labels of all batches, and a classifier's accuracy and F1.

    Args:
        results: for each batch the loss summed over its labels (`objective.loss` divided by 1),
            the model's outputs, and the labels.
        names: a classifier's class names.
    """
    total, count = 0.0, 0
    predicted: list[list[int]] = []
    wanted: list[list[int]] = []
    for loss, outputs, labels in results:
        total += float(loss)
        count += objective.supervised(labels)
        if objective.scores:
            wanted += _labelled(labels, labels)
            predicted += _labelled(outputs["logits"].argmax(-1), labels)
    scores = {"loss": total / max(count, 1)}
    return scores | objective.scores(predicted, wanted, names) if objective.scores else scores


def _labelled(values: Tensor, labels: Tensor) -> list[list[int]]:
    """For each row the values where it has a label; both (B,), or (B, T)."""
    rows = zip(values.view(len(labels), -1), labels.view(len(labels), -1), strict=True)
    return [row[real != NO_LOSS].tolist() for row, real in rows]


def text_scores(predicted: Numbers, wanted: Numbers, names: Names) -> dict[str, float]:
    """`accuracy`, the share of right labels among those of all rows together."""
    pairs = [pair for row in zip(predicted, wanted, strict=True) for pair in zip(*row, strict=True)]
    return {"accuracy": sum(a == b for a, b in pairs) / max(len(pairs), 1)}


def word_scores(predicted: Numbers, wanted: Numbers, names: Names) -> dict[str, float]:
    """`accuracy`; and `f1` over whole entities, as in CoNLL, where `names` are B- and I- tags.

    f1 = 2 * right / (predicted + wanted), where an entity is right if its type, its first and its
    last word are. Not seqeval's: that brings scikit-learn, and had its last release in 2020.
    """
    scores = text_scores(predicted, wanted, names)
    if not any(name.startswith(("B-", "I-")) for name in names):
        return scores
    right = total = 0
    for row in zip(predicted, wanted, strict=True):
        ours, theirs = (entities([names[i] for i in numbers]) for numbers in row)
        right += len(ours & theirs)
        total += len(ours) + len(theirs)
    return scores | {"f1": 2 * right / max(total, 1)}


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, word after the last) of each entity in a row of B-, I- and other tags.

    An I- tag after another type begins an entity, as in conlleval.
    """
    spans = set()
    start, kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        mark, _, new_kind = tag.partition("-") if tag.startswith(("B-", "I-")) else ("O", "", "")
        if kind and (mark != "I" or new_kind != kind):
            spans.add((kind, start, i))
            kind = ""
        if new_kind and (mark == "B" or not kind):
            start, kind = i, new_kind
    return spans


# ---- the table

SEQ2SEQ_KINDS = (("prompt", "completion"), ("input", "target"), ("instruction", "output"))
PAIRS = (("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"))
TEXT_KINDS = tuple((*texts, "label") for texts in (*PAIRS, ("text",), ("sentence",)))
WORD_KINDS = (("tokens", "tags"), ("tokens", "ner_tags"))

OBJECTIVES = {
    objective.task.name: objective
    for objective in (
        Objective(
            TASKS["causal-lm"], KINDS, encode_chat, _chat_pieces, DataCollatorForSeq2Seq,
            loss=token_loss, supervised=lambda labels: count_labels(labels[:, 1:]),
        ),
        Objective(
            TASKS["seq2seq"], SEQ2SEQ_KINDS, encode_answer, _answer_pieces, DataCollatorForSeq2Seq
        ),
        Objective(
            TASKS["seq-cls"], TEXT_KINDS, encode_text, _answer_pieces, DataCollatorWithPadding,
            scores=text_scores, one_label=True,
        ),
        Objective(
            TASKS["token-cls"], WORD_KINDS, encode_words, _word_pieces,
            DataCollatorForTokenClassification, scores=word_scores,
        ),
    )
}  # fmt: skip
