"""The labels of a classifier: their names, their numbers, and how often they are right.

A record names its label, or says its number. Names are sorted, and their places are the numbers;
numbers without names are called LABEL_0, LABEL_1, … as transformers does. A data set of the hub
that says what its numbers mean (ClassLabel) has the names.

What each task makes of a record, of rows, and of logits: its rows, batches, loss and measures.

    task        input_ids                labels (-100: no loss)                        loss over
    causal-lm   the chat, or the text    the same ids, where the model has to answer   next tokens
    seq2seq     the prompt               (T',) the answer's ids                        answer tokens
    seq-cls     the text, or two texts   one label                                     rows
    token-cls   the words' tokens        a label at the first token of each word       words

The loss is a cross-entropy summed over all labels of an optimizer step and divided once by their
number, so that it does not matter how a step is split into batches.

For chats (causal-lm), loss is on the assistant's turns and their end tokens alone
(qlora.data.chat_template); of `text` records, on every token. Sources: transformers'
examples for the others (run_translation, run_glue, run_ner), from which it is that the first
token of a word alone has its label.

Left out: regression, several labels a row, question answering.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from qlora.data.chat_template import NO_LOSS, Rendering, is_answer, tokenize
from qlora.data.records import KINDS, chat_of, kind_of, string_of
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


Record = Mapping[str, Any]
Names = Sequence[str]
Collator = Callable[[list[Any]], Any]
PADDING: Any = {"pad_to_multiple_of": 8}


class Encoded(NamedTuple):
    """A record as a row."""

    row: dict[str, Any]
    """input_ids and labels, cut"""
    tokens: int
    """read or written, after the cut"""
    full_length: int
    """tokens before the cut; 0 where there is no answer"""
    supervised: int
    """labels with loss"""


@dataclass(frozen=True)
class Objective:
    """What a task learns from, and how."""

    kinds: tuple[tuple[str, ...], ...]
    """columns that make a kind of record; a classifier's label is the last of them"""
    encode: Callable[[Record, PreTrainedTokenizerBase, int, Names], Encoded]
    """(record, tokenizer, max_length, names of labels) -> row"""
    collator: Callable[[PreTrainedTokenizerBase, Any], Collator]
    """(tokenizer that pads on the right, model) -> what makes a batch of rows"""
    pieces: Callable[[Record, PreTrainedTokenizerBase, Names], Iterable[tuple[str, bool]]]
    """(row, tokenizer, names) -> its text in pieces, each with whether it is learned"""
    loss: Callable[[Any, Tensor, Tensor | None], Tensor]
    """(outputs, labels, number of labels in the step) -> loss"""
    supervised: Callable[[Tensor], int]
    """the number of labels with loss in a batch's labels"""
    scores: Callable[..., dict[str, float]] | None = None
    """(predicted, wanted, names) -> what evaluation tells beside the loss; rows of label numbers"""
    chats: bool = False
    """its records can be chats, which need a template"""
    one_label: bool = False
    """a row has one, and is a text or two, which some models tell apart by token_type_ids"""

    @property
    def classifies(self) -> bool:
        """Whether its labels are names, not tokens."""
        return self.scores is not None


# ---- causal language models


def encode_chat(
    record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int, names: Names = ()
) -> Encoded:
    """Ids of a chat or text, and the same as labels where the model has to answer."""
    ids, labels = _chat_ids(record, tokenizer) or ([], [])
    kept = labels[:max_length]
    # the first token is never predicted, so a label there alone teaches nothing
    supervised = sum(i != NO_LOSS for i in kept) * any(i != NO_LOSS for i in kept[1:])
    row = {"input_ids": ids[:max_length], "labels": kept}
    return Encoded(row, len(kept), len(ids), supervised)


def _chat_ids(
    record: Record, tokenizer: PreTrainedTokenizerBase
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


def _learned_runs(
    row: Record, tokenizer: PreTrainedTokenizerBase, names: Names
) -> Iterable[tuple[str, bool]]:
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for learned, group in groupby(pairs, key=lambda pair: pair[1] != NO_LOSS):
        yield str(tokenizer.decode([i for i, _ in group], skip_special_tokens=False)), learned


def token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None) -> Tensor:
    """Cross-entropy summed over supervised next tokens, over those of the whole optimizer step."""
    logits = outputs["logits"]
    loss: Tensor = ForCausalLMLoss(
        logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch
    )
    return loss


# ---- encoder-decoder language models


def encode_answer(
    record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int, names: Names = ()
) -> Encoded:
    """Ids of the prompt, and those of the answer as labels, each as the tokenizer ends it."""
    kind = kind_of(record, kinds=SEQ2SEQ_KINDS)
    prompt, answer = string_of(record[kind[0]]), string_of(record[kind[-1]])
    if kind[0] == "instruction" and string_of(record.get("input")).strip():
        prompt = f"{prompt}\n\n{string_of(record['input'])}"
    if not answer.strip():
        return Encoded({"input_ids": [], "labels": []}, 0, 0, 0)
    ids, full = _cut(tokenizer, max_length, prompt)
    labels, full_answer = _cut(tokenizer, max_length, None, text_target=answer)
    row = {"input_ids": ids["input_ids"], "labels": labels["input_ids"]}
    tokens = len(row["input_ids"]) + len(row["labels"])
    return Encoded(row, tokens, max(full, full_answer), len(row["labels"]))


def _cut(
    tokenizer: PreTrainedTokenizerBase, max_length: int, *texts: Any, **settings: Any
) -> tuple[Any, int]:
    """What the tokenizer makes of it, cut with its special tokens left on, and its full length."""
    encoded = tokenizer(*texts, verbose=False, **settings)
    full = len(encoded["input_ids"])
    if full > max_length:
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, **settings)
    return encoded, full


def _answer_after_prompt(
    row: Record, tokenizer: PreTrainedTokenizerBase, names: Names
) -> Iterable[tuple[str, bool]]:
    yield str(tokenizer.decode(row["input_ids"])) + " ", False
    yield str(tokenizer.decode(row["labels"])), True


# ---- classifiers


def encode_text(
    record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int, names: Names
) -> Encoded:
    """Ids of a text, or of two, and its label's number."""
    *columns, column = kind_of(record, kinds=TEXT_KINDS)
    if record[column] is None:
        raise UserError(f"{column} is missing: give each row one, or leave the row out")
    encoded, full = _cut(tokenizer, max_length, *(string_of(record[c]) for c in columns))
    row = {k: encoded[k] for k in ("input_ids", "token_type_ids") if k in encoded}
    row["labels"] = label_id(record[column], names)
    return Encoded(row, len(row["input_ids"]), full, 1)


def encode_words(
    record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int, names: Names
) -> Encoded:
    """Ids of a list of words, and the number of each word's label at its first token."""
    kind = kind_of(record, kinds=WORD_KINDS)
    words, tags = (record[column] for column in kind)
    if not (isinstance(words, list) and isinstance(tags, list) and len(words) == len(tags)):
        sizes = [len(x) if isinstance(x, list) else type(x).__name__ for x in (words, tags)]
        raise UserError(
            f"{kind[0]} and {kind[1]} must be two lists of one length, got {sizes[0]} and "
            f"{sizes[1]}"
        )
    numbers = [label_id(tag, names) for tag in tags]
    strings = [string_of(word) for word in words]
    encoded, full = _cut(tokenizer, max_length, strings, is_split_into_words=True)
    places = encoded.word_ids()
    labels = [
        numbers[place] if place is not None and place != before else NO_LOSS
        for before, place in zip([None, *places], places, strict=False)
    ]
    supervised = sum(label != NO_LOSS for label in labels)
    row = {"input_ids": encoded["input_ids"], "labels": labels}
    return Encoded(row, len(labels), full, supervised)


def _text_and_label(
    row: Record, tokenizer: PreTrainedTokenizerBase, names: Names
) -> Iterable[tuple[str, bool]]:
    yield str(tokenizer.decode(row["input_ids"])) + " ", False
    yield names[row["labels"]], True


def _words_and_labels(
    row: Record, tokenizer: PreTrainedTokenizerBase, names: Names
) -> Iterable[tuple[str, bool]]:
    for i, label in zip(row["input_ids"], row["labels"], strict=True):
        yield str(tokenizer.decode([i])).strip(), False
        if label != NO_LOSS:
            yield names[label], True
        yield " ", False


def label_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None) -> Tensor:
    """Cross-entropy summed over labels, over the number of those of the whole optimizer step."""
    logits = outputs["logits"].float().flatten(0, -2)
    total = F.cross_entropy(
        logits, labels.flatten().to(logits.device), ignore_index=NO_LOSS, reduction="sum"
    )
    return total / (with_loss(labels) if num_items_in_batch is None else num_items_in_batch)


def with_loss(labels: Tensor) -> int:
    """How many labels are learned from."""
    return int((labels != NO_LOSS).sum())


def measure(
    objective: Objective, results: Iterable[tuple[Tensor, Any, Tensor]], names: Names = ()
) -> dict[str, float]:
    """`loss`, the mean over all labels of all batches, and a classifier's accuracy and F1.

    Args:
        results: for each batch the loss summed over its labels (`objective.loss` divided by 1),
            the model's outputs, and the labels.
        names: a classifier's label names.
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
    found = {"loss": total / max(count, 1)}
    return found | objective.scores(predicted, wanted, names) if objective.scores else found


def _labelled(values: Tensor, labels: Tensor) -> list[list[int]]:
    """For each row the values at the positions that have a label."""
    # (B,) of a text or (B, T) of words -> (B, 1) or (B, T)
    rows = zip(values.view(len(labels), -1), labels.view(len(labels), -1), strict=True)
    return [row[real != NO_LOSS].tolist() for row, real in rows]


def _of_rows(predicted: Any, wanted: Any, names: Names) -> dict[str, float]:
    return {"accuracy": accuracy(predicted, wanted)}


def _of_words(predicted: Any, wanted: Any, names: Names) -> dict[str, float]:
    f1 = entity_f1(predicted, wanted, names)
    return _of_rows(predicted, wanted, names) | ({} if f1 is None else {"f1": f1})


# ---- the table

SEQ2SEQ_KINDS = (("prompt", "completion"), ("input", "target"), ("instruction", "output"))
TEXT_KINDS = (
    ("text", "text_pair", "label"),
    ("sentence1", "sentence2", "label"),
    ("premise", "hypothesis", "label"),
    ("text", "label"),
    ("sentence", "label"),
)
WORD_KINDS = (("tokens", "tags"), ("tokens", "ner_tags"))

OBJECTIVES = {
    "causal-lm": Objective(
        kinds=KINDS,
        encode=encode_chat,
        collator=lambda tokenizer, _: DataCollatorForSeq2Seq(tokenizer, **PADDING),
        pieces=_learned_runs,
        loss=token_loss,
        supervised=lambda labels: with_loss(labels[:, 1:]),
        chats=True,
    ),
    "seq2seq": Objective(
        kinds=SEQ2SEQ_KINDS,
        encode=encode_answer,
        collator=lambda tokenizer, model: DataCollatorForSeq2Seq(tokenizer, model, **PADDING),
        pieces=_answer_after_prompt,
        loss=label_loss,
        supervised=with_loss,
    ),
    "seq-cls": Objective(
        kinds=TEXT_KINDS,
        encode=encode_text,
        collator=lambda tokenizer, _: DataCollatorWithPadding(tokenizer, **PADDING),
        pieces=_text_and_label,
        loss=label_loss,
        supervised=with_loss,
        scores=_of_rows,
        one_label=True,
    ),
    "token-cls": Objective(
        kinds=WORD_KINDS,
        encode=encode_words,
        collator=lambda tokenizer, _: DataCollatorForTokenClassification(tokenizer, **PADDING),
        pieces=_words_and_labels,
        loss=label_loss,
        supervised=with_loss,
        scores=_of_words,
    ),
}
