"""For each task: how a record becomes a row and a batch, and the loss and scores of its outputs.

    task        input_ids                labels (-100: no loss)                        loss over
    causal-lm   the chat, or the text    the same ids, where the model has to answer   next tokens
    seq2seq     the prompt               (T',) ids of the answer                       answer tokens
    seq-cls     the text, or two texts   the number of its class                       rows
    token-cls   the words' tokens        a class at the first token of each word       words

The loss is a cross-entropy summed over all labels of an optimizer step and divided once by their
number, so it does not depend on how a step is split into batches. The tasks other than causal-lm
follow transformers' examples: run_translation, run_glue and run_ner.

Classes: a record holds a class's name or its number. Names are sorted, and their positions are the
numbers; numbers without names are called LABEL_0, LABEL_1, … as in transformers. A hub data set
with a ClassLabel column has its own names.

Left out: regression, several labels per row, question answering.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.loss.loss_utils import ForCausalLMLoss

from qlora.data.chat_template import NO_LOSS, Rendering, learned_turns, renderings, tokenize
from qlora.data.chats import AS_IT_IS, Reading, alpaca_prompt, chat_of
from qlora.data.records import (
    KINDS,
    Kinds,
    Record,
    Records,
    kind_of,
    string_of,
)
from qlora.data.templates import ending_of, last_word, reasoning_in
from qlora.errors import UserError, did_you_mean, require, some

Row = dict[str, Any]
Names = Sequence[str]  # of a classifier's classes, by their number
Pieces = Iterable[tuple[str, bool]]  # text, and whether it has loss
ClassRows = Sequence[tuple[list[int], list[int]]]  # predicted and expected numbers of each row

SEQ2SEQ_KINDS: Kinds = {
    ("prompt", "completion"): (),
    ("input", "target"): (),
    ("instruction", "output"): ("input",),
}
MOST_CLASSES = 1_000_000  # of a classifier
PAIRS = (("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"))
TEXT_KINDS: Kinds = {(*texts, "label"): () for texts in (*PAIRS, ("text",), ("sentence",))}
WORD_KINDS: Kinds = {("tokens", "tags"): (), ("tokens", "ner_tags"): ()}


@dataclass(frozen=True)
class Objective:
    """The data functions and the loss of one task."""

    # the columns of each kind of record, of which the last one holds a classifier's label
    kinds: Kinds
    # (record, tokenizer, max_length, class names, reading of chats) -> rows, as `_row` returns them
    encode: Callable[[Record, Tokenizer, int, Names, Reading], list[Row]]
    # (row, tokenizer, class names) -> its decoded text in pieces
    pieces: Callable[[Row, Tokenizer, Names], Pieces]
    collator: Any  # transformers' class
    # of a classifier: (classes of each row, class names) -> scores
    scores: Callable[[ClassRows, Names], dict[str, float]] | None = None
    one_label: bool = False  # of a row, which may be a pair of texts, with token_type_ids
    next_tokens: bool = False  # outputs (B, T, vocab) at t are for labels (B, T) at t + 1

    @property
    def classifies(self) -> bool:
        """Whether labels are class numbers, not token ids."""
        return self.scores is not None

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None) -> Tensor:
        """Cross-entropy summed over the batch's labels, divided by their number in the step."""
        logits, count = outputs["logits"], num_items_in_batch  # None: the batch's own
        aligned: Any = None if self.next_tokens else labels  # None: shifted by one
        loss: Tensor = ForCausalLMLoss(
            logits, labels, logits.shape[-1], num_items_in_batch=count, shift_labels=aligned
        )
        return loss


def _row(ids: list[int], labels: Any, full_length: int, supervised: int) -> Row:
    """Ids and labels, cut; `full_length`, in tokens before the cut, 0 without an answer;
    `supervised`, the number of labels with loss; `lost`, what a chat template leaves out;
    `special`, whether the chat has tools or reasoning; `thinks`, whether it is rendered with the
    template's enable_thinking."""
    counts = {"length": len(ids), "full_length": full_length, "supervised": supervised}
    others = {"lost": [], "special": False, "thinks": False}
    return {"input_ids": ids, "labels": labels, **counts, **others}


# ---- causal language models


def encode_chat(
    record: Record,
    tokenizer: Tokenizer,
    max_length: int,
    names: Names = (),
    reading: Reading = AS_IT_IS,
) -> list[Row]:
    """Ids of a text or chat, in several rows where a chat's turns need them; labels are the same
    ids in the answers, NO_LOSS elsewhere."""
    chat = chat_of(record, reading)
    if chat is None:
        text = string_of(record["text"])
        ids = text_ids(text, tokenizer) if text.strip() else []
        return [_cut_row(ids, ids, max_length)]
    if not learned_turns(chat):
        return [_row([], [], 0, 0)]
    return [_chat_row(rendering, max_length) for rendering in renderings(tokenizer, chat)]


def _chat_row(rendering: Rendering, max_length: int) -> Row:
    tokenizer, chat = rendering.tokenizer, rendering.chat
    if (text_and_spans := rendering.with_spans()) is not None:
        ids, labels = tokenize(tokenizer, *text_and_spans)
    elif not chat.no_loss and re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)):
        marked: Any = tokenizer.apply_chat_template(
            rendering.messages,
            tools=rendering.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = marked["input_ids"], marked["assistant_masks"]
        labels = [i if on else NO_LOSS for i, on in zip(ids, mask, strict=True)]
    else:
        turn = (rendering.not_found or 0) + 1
        word = last_word(rendering.messages[turn - 1])
        raise UserError(
            f"the assistant's turns cannot be found in the chat as the model's template renders it "
            f"(message {turn}, which ends in {word[:40]!r}): put {{% generation %}} marks around "
            "them in the template, or render the rows to a text column"
        )
    special = any(m.get("tool_calls") or reasoning_in(m) for m in rendering.messages)
    thinks = "enable_thinking" in rendering.switches
    row = _cut_row(ids, labels, max_length)
    return row | {"lost": sorted(rendering.lost), "special": special, "thinks": thinks}


def _cut_row(ids: list[int], labels: list[int], max_length: int) -> Row:
    kept = labels[:max_length]
    supervised = len(kept) - kept.count(NO_LOSS)
    # the first token is never predicted, so a label there alone teaches nothing
    if supervised == 1 and kept[0] != NO_LOSS:
        supervised = 0
    return _row(ids[:max_length], kept, len(ids), supervised)


def text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text between the tokenizer's special tokens and eos, of which none comes twice.

    A rendered chat may begin with BOS, and end in the end token of its last turn and a line break,
    or in a turn that its template opens unasked, which is left out.
    """
    ending = ending_of(tokenizer)
    if (opened := ending.opened.rstrip()) and text.rstrip().endswith(opened):
        text = text.rstrip().removesuffix(opened)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    before, after = _special_ids(tokenizer)
    if tokenizer.eos_token_id is not None and [*ids, *after][-1:] != [tokenizer.eos_token_id]:
        after = [*after, tokenizer.eos_token_id]
    ends = tuple(end for end in (tokenizer.eos_token, *ending.tokens) if end)
    is_ended = bool(ends) and text.rstrip().endswith(ends)
    return [*([] if ids[: len(before)] == before else before), *ids, *([] if is_ended else after)]


def _special_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer adds before and after a text."""
    if not tokenizer.is_fast:  # what it adds may depend on any of its attributes
        return _added_ids.__wrapped__(tokenizer, "")
    return _added_ids(tokenizer, repr(tokenizer.backend_tokenizer.post_processor))


@lru_cache(maxsize=4)  # the last argument stands for what may change in the tokenizer
def _added_ids(tokenizer: Tokenizer, processor: str) -> tuple[list[int], list[int]]:
    options = ({"add_special_tokens": added, "verbose": False} for added in (False, True))
    own, ids = (list(tokenizer("a", **option)["input_ids"]) for option in options)
    start = next((i for i in range(len(ids)) if ids[i : i + len(own)] == own), 0)
    return ids[:start], ids[start + len(own) :]


def _chat_pieces(row: Row, tokenizer: Tokenizer, names: Names) -> Pieces:
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for learned, group in groupby(pairs, key=lambda pair: pair[1] != NO_LOSS):
        yield str(tokenizer.decode([i for i, _ in group], skip_special_tokens=False)), learned


# ---- encoder-decoder language models


def encode_answer(
    record: Record, tokenizer: Tokenizer, max_length: int, names: Names, reading: Reading = AS_IT_IS
) -> list[Row]:
    """Ids of the prompt, and ids of the answer as labels, both with the tokenizer's end token."""
    kind = kind_of(record, kinds=SEQ2SEQ_KINDS)
    prompt, answer = (string_of(record[column], column) for column in (kind[0], kind[-1]))
    if kind[0] == "instruction":
        prompt = alpaca_prompt(record)
    if not answer.strip():
        return [_row([], [], 0, 0)]
    source, source_length = _encode(tokenizer, max_length, _bare(prompt, tokenizer))
    target, target_length = _encode(
        tokenizer, max_length, None, text_target=_bare(answer, tokenizer)
    )
    ids, labels = source["input_ids"], target["input_ids"]
    row = _row(ids, labels, max(source_length, target_length), len(labels))
    return [row | {"length": len(ids) + len(labels)}]


def _bare(text: str, tokenizer: Tokenizer) -> str:
    """`text` without the special tokens at its ends that the tokenizer adds itself."""
    before, after = map(tokenizer.convert_ids_to_tokens, _special_ids(tokenizer))
    for token in before:
        text = text.removeprefix(token)
    for token in reversed(after):
        if text.rstrip().endswith(token):
            text = text.rstrip().removesuffix(token).rstrip()
    return text


def _encode(tokenizer: Tokenizer, max_length: int, *texts: Any, **options: Any) -> tuple[Any, int]:
    """The encoding, truncated with its special tokens kept, and its length before that."""
    encoded = tokenizer(*texts, verbose=False, **options)
    full_length = len(encoded["input_ids"])
    if full_length > max_length:
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, **options)
    return encoded, full_length


def _answer_pieces(row: Row, tokenizer: Tokenizer, names: Names) -> Pieces:
    answer = row["labels"]
    yield str(tokenizer.decode(row["input_ids"])) + " ", False
    yield str(tokenizer.decode(answer)) if isinstance(answer, list) else names[answer], True


# ---- classifiers


def encode_text(
    record: Record, tokenizer: Tokenizer, max_length: int, names: Names, reading: Reading = AS_IT_IS
) -> list[Row]:
    """Ids of a text or a pair of texts, and the number of its class."""
    *columns, column = kind_of(record, kinds=TEXT_KINDS)
    require(record[column] is not None, f"{column} is missing: fill it, or remove the row")
    texts = [_bare(string_of(record[name], name), tokenizer) for name in columns]
    encoded, full_length = _encode(tokenizer, max_length, *texts)
    ids = encoded["input_ids"]  # none, of an empty text
    row = _row(ids, class_number(record[column], names), full_length, min(len(ids), 1))
    return [row | {key: encoded[key] for key in ("token_type_ids",) if key in encoded}]


def encode_words(
    record: Record, tokenizer: Tokenizer, max_length: int, names: Names, reading: Reading = AS_IT_IS
) -> list[Row]:
    """Ids of a list of words; labels are the number of a word's class at its first token."""
    kind = kind_of(record, kinds=WORD_KINDS)
    words, tags = (record[column] for column in kind)
    sizes = [len(x) if isinstance(x, list) else type(x).__name__ for x in (words, tags)]
    fault = f"{' and '.join(kind)} must be lists of one length, got {sizes[0]} and {sizes[1]}"
    require(isinstance(sizes[0], int) and sizes[0] == sizes[1], fault)
    numbers = [class_number(tag, names) for tag in tags]
    strings = [string_of(word) for word in words]
    encoded, full_length = _encode(tokenizer, max_length, strings, is_split_into_words=True)
    positions = encoded.word_ids()  # of each token: the index of its word, or None
    labels = [
        numbers[word] if word is not None and word != before else NO_LOSS
        for before, word in zip([None, *positions], positions, strict=False)
    ]
    supervised = sum(label != NO_LOSS for label in labels)
    return [_row(encoded["input_ids"], labels, full_length, supervised)]


def _word_pieces(row: Row, tokenizer: Tokenizer, names: Names) -> Pieces:
    for i, label in zip(row["input_ids"], row["labels"], strict=True):
        yield str(tokenizer.decode([i])).strip(), False
        if label != NO_LOSS:
            yield names[label], True
        yield " ", False


def class_names(*sources: Records, known: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of the classes in the column of labels, or of lists of labels, of all sources.

    `known`, the model's class names, are returned if they include all names in the column.

    Raises:
        UserError: a label is neither a name nor a whole number from 0, or all are the same; or two
            sources have names of their own, which differ.
    """
    columns = [records.kind[-1] for records in sources]
    column = some(list(dict.fromkeys(columns)))
    parts = [(c, p) for c, r in zip(columns, sources, strict=True) for p in r.parts]
    every_given = list(dict.fromkeys(tuple(p.classes[c]) for c, p in parts if c in p.classes))
    given = every_given[0] if every_given else None
    differ = " and ".join(some(names, 8) for names in every_given)
    require(len(every_given) < 2, f"{column} has two numberings, {differ}: write names as text")
    every = zip(columns, sources, strict=True)
    labels = (record[c] for c, records in every for record in records)
    items = (label if isinstance(label, list) else [label] for label in labels)
    values = {_label(label, column) for item in items for label in item if label is not None}
    require(bool(values), f"{column} is empty in every row: a classifier needs labels")
    if given:
        names = given
    elif all(type(value) is int and value >= 0 for value in values):
        count = max(values) + 1
        names = tuple(known) if len(known) >= count else tuple(f"LABEL_{i}" for i in range(count))
    elif all(isinstance(value, str | bool) for value in values):
        names = tuple(sorted(map(string_of, values)))
    else:
        raise _no_label(next(v for v in values if type(v) is not int or v < 0), column)
    if set(names) <= set(known):
        return tuple(known)
    if len(names) < 2:
        raise UserError(f"{column} is {names[0]} in every row: a classifier needs two labels")
    return names


def _label(value: Any, column: str) -> Any:
    """A label that may be one: there are at most MOST_CLASSES."""
    is_label = isinstance(value, str | float) or (type(value) is int and value < MOST_CLASSES)
    if not (is_label or isinstance(value, bool)):
        raise _no_label(value, column)
    return value


def _no_label(value: Any, column: str) -> UserError:
    wanted = f"{column} must hold names, or whole numbers from 0, got {str(value)[:60]}"
    return UserError(f"{wanted}: change or remove it; at most {MOST_CLASSES:,} classes are read")


def class_number(label: Any, names: Names) -> int:
    """The number of a class, given by its name or its number."""
    if type(label) is int:
        if 0 <= label < len(names):
            return label
        raise UserError(f"label {label} is not one of the training data: 0 to {len(names) - 1}")
    name = string_of(label)
    if isinstance(label, bool) and name not in names:
        name = name.title()  # as bool labels were called once
    if name not in names:
        hint = did_you_mean(name, names)
        raise UserError(f"label {name[:60]!r} is not one of {some(names, 12)}.{hint}")
    return names.index(name)


# ---- loss and scores over rows


def measure(
    objective: Objective,
    results: Iterable[tuple[Tensor, Any, Tensor]],
    names: Names = (),
    *,
    gathered: Callable[[Any], list[Any]] = lambda own: [own],
) -> dict[str, float]:
    """`loss`, the mean over all labels of all batches, and a classifier's accuracy and F1.

    `results` are, of each batch, the loss summed over its labels (`objective.loss` with a count of
    1), the model's outputs, and the labels. `gathered`: a value of this process -> of all that
    measure together.
    """
    total, count = 0.0, 0
    rows: list[tuple[list[int], list[int]]] = []
    for loss, outputs, labels in results:
        total += float(loss)
        count += int(((labels[:, 1:] if objective.next_tokens else labels) != NO_LOSS).sum())
        if objective.scores:
            classes = outputs["logits"].argmax(-1)  # (B, C) -> (B,), or (B, T, C) -> (B, T)
            for row, row_labels in zip(classes, labels, strict=True):
                has_label = row_labels != NO_LOSS
                rows.append((row[has_label].tolist(), row_labels[has_label].tolist()))
    totals, counts, parts = zip(*gathered((total, count, rows)), strict=True)
    rows = [row for part in parts for row in part]
    scores = {"loss": sum(totals) / max(sum(counts), 1)}
    return scores | objective.scores(rows, names) if objective.scores else scores


def text_scores(rows: ClassRows, names: Names) -> dict[str, float]:
    """`accuracy`: right labels / labels, over all rows together."""
    right = [a == b for row in rows for a, b in zip(*row, strict=True)]
    return {"accuracy": sum(right) / max(len(right), 1)}


def word_scores(rows: ClassRows, names: Names) -> dict[str, float]:
    """`accuracy`, and `f1` over whole entities, as in CoNLL, where `names` are B- and I- tags.

    f1 = 2 * right / (predicted + expected); an entity is right if its type and both its ends are.
    seqeval is not used: it requires scikit-learn, and its last release is from 2020.
    """
    scores = text_scores(rows, names)
    if not any(name.startswith(("B-", "I-")) for name in names):
        return scores
    right = total = 0
    for row in rows:
        found, correct = (entities([names[i] for i in numbers]) for numbers in row)
        right += len(found & correct)
        total += len(found) + len(correct)
    return scores | {"f1": 2 * right / max(total, 1)}


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, start, end) of each entity in a row of B-, I- and other tags; end is exclusive.

    An I- tag after another type begins an entity, as in conlleval.
    """
    spans = set()
    start, current = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-") if tag.startswith(("B-", "I-")) else ("O", "", "")
        if current and (mark != "I" or kind != current):
            spans.add((current, start, i))
            current = ""
        if kind and not current:
            start, current = i, kind
    return spans


OBJECTIVES = {
    "causal-lm": Objective(
        KINDS, encode_chat, _chat_pieces, transformers.DataCollatorForSeq2Seq, next_tokens=True
    ),
    "seq2seq": Objective(
        SEQ2SEQ_KINDS, encode_answer, _answer_pieces, transformers.DataCollatorForSeq2Seq
    ),
    "seq-cls": Objective(
        TEXT_KINDS, encode_text, _answer_pieces, transformers.DataCollatorWithPadding,
        scores=text_scores, one_label=True,
    ),
    "token-cls": Objective(
        WORD_KINDS, encode_words, _word_pieces, transformers.DataCollatorForTokenClassification,
        scores=word_scores,
    ),
}  # fmt: skip
