"""What is learned of a row, shown token by token."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora.data.objectives import OBJECTIVES

MOST_PIECES = 40  # of a row that is shown


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
