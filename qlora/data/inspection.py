"""What is learned of a row, token by token.

A `View` is a row as it is trained on: its text, its tokens, and the label of each. Rows of which
nothing is learned are shown too: training leaves them out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora.data.batches import column
from qlora.data.chat_template import NO_LOSS
from qlora.data.encoding import Encoder
from qlora.data.objectives import OBJECTIVES
from qlora.data.records import Records
from qlora.errors import require, some

MOST_PIECES = 40  # of a row that is shown
MOST_PARTS = 8  # tokens that are one character together


def show_example(
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    colour: bool,
    task: str = "causal-lm",
    classes: Sequence[str] = (),
    special: int | None = None,
) -> str:
    """The longest row, the row `special`, and the shortest, decoded, with loss marked."""
    lengths = column(dataset, "length")
    longest, shortest = int(lengths.argmax()), int(lengths.argmin())
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


# ---- rows of a source


class Token(NamedTuple):
    """A token of a row; `label` is None where there is no loss."""

    id: int
    text: str
    label: int | str | None


class Piece(NamedTuple):
    """A text and its tokens: one, or those that are a character only together."""

    text: str
    tokens: list[Token]


@dataclass(frozen=True)
class View:
    """A row of a source as it is trained on."""

    source: str
    row: int
    """number of its record, from 1"""
    input_ids: list[int]
    labels: Any
    """token ids or numbers of classes, of each token or of the row"""
    text: str
    learned: list[str]
    """the stretches with loss, in their order"""
    tokens: list[Token]
    pieces: list[Piece]
    """the tokens in readable pieces"""
    full_length: int
    """tokens before the cut; 0 for a row without an answer"""
    note: str
    """what training does with it, if it does not learn it whole"""

    def record(self) -> dict[str, Any]:
        """What --json prints."""
        names = ("row", "text", "input_ids", "labels", "learned")
        return {name: getattr(self, name) for name in names}


def views(
    encoder: Encoder, records: Records, *, count: int | None, chosen: Sequence[int] = ()
) -> Iterator[View]:
    """The rows of the first `count` records, or of those with the numbers `chosen`.

    A record has several rows where its turns need them, or where it is split.

    Raises:
        UserError: there is no record of such a number.
    """
    last = max(chosen, default=count or 0)
    left, number = set(chosen), 0
    for number, (name, record) in enumerate(records.numbered(), start=1):
        if number > last:
            break
        if chosen and number not in left:
            continue
        left.discard(number)
        yield from (_view(encoder, number, row) for row in encoder.rows_of(name, record))
    missing = [str(number) for number in sorted(left)]
    fault = f"--inspect-rows: {encoder.source} has {number} rows, but no row {some(missing)}"
    require(not left, fault)


def _view(encoder: Encoder, number: int, row: dict[str, Any]) -> View:
    tokenizer, names, length = encoder.tokenizer, encoder.classes, row["full_length"]
    ids, labels = row["input_ids"], row["labels"]
    is_aligned = isinstance(labels, list) and encoder.task != "seq2seq"
    label_of = {NO_LOSS: None} | (dict(enumerate(names)) if encoder.objective.classifies else {})
    of_tokens = labels if is_aligned else [NO_LOSS] * len(ids)
    tokens = [
        Token(i, token_text(tokenizer, i), label_of.get(label, label))
        for i, label in zip(ids, of_tokens, strict=True)
    ]
    pieces = list(_pieces(tokenizer, tokens))
    if isinstance(labels, int):
        learned = [names[labels]]
        pieces.append(Piece(names[labels], [Token(labels, names[labels], names[labels])]))
    elif encoder.task == "seq2seq":
        learned = [decoded(tokenizer, labels)] if labels else []
        targets = [Token(i, token_text(tokenizer, i), i) for i in labels]
        pieces += _pieces(tokenizer, targets)
    else:
        parts = encoder.objective.pieces(row, tokenizer, names)
        learned = [text for text, has_loss in parts if has_loss]
    note = "" if row["supervised"] else "nothing of it is learned: training leaves it out"
    if length > encoder.max_length:
        done = {"split": "a piece of it", "drop": "training leaves it out"}
        note = done.get(encoder.long_rows, f"cut, {length - len(ids):,} tokens are left out")
        note = f"{length:,} tokens are more than {encoder.max_length:,}: {note}"
    tokens, text = [token for piece in pieces for token in piece.tokens], decoded(tokenizer, ids)
    return View(encoder.source, number, ids, labels, text, learned, tokens, pieces, length, note)


def _pieces(tokenizer: Tokenizer, tokens: Sequence[Token]) -> Iterator[Piece]:
    """The tokens in readable pieces, none of which is learned in part."""
    start = 0
    while start < len(tokens):
        end, text = start + 1, tokens[start].text
        if "\ufffd" in decoded(tokenizer, [tokens[start].id]):
            for stop in range(start + 2, min(start + MOST_PARTS, len(tokens)) + 1):
                whole = decoded(tokenizer, [token.id for token in tokens[start:stop]])
                if "\ufffd" not in whole:
                    end, text = stop, whole
                    break
        part = tokens[start:end]
        if len({token.label is None for token in part}) > 1:
            yield from (Piece(token.text, [token]) for token in part)
        else:
            yield Piece(text, list(part))
        start = end


def decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of tokens, as it was before they were made."""
    options: Any = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(list(ids), **options))


def token_text(tokenizer: Tokenizer, i: int) -> str:
    """The text of one token; as the vocabulary has it where it is a part of a character."""
    text, piece = decoded(tokenizer, [i]), str(tokenizer.convert_ids_to_tokens(i))
    if "\ufffd" in text:
        return piece
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text
