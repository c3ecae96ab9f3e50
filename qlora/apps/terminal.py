"""Texts side by side on a terminal, while they are being written.

A row of the screen holds the same line of each text. It is written again in its place (carriage
return) until the line of every text is full or its text at an end, and left behind then: nothing
moves up the screen, so what has scrolled away stays as it was. Widths are in cells: Chinese and
Japanese characters and most emoji take two, combining marks none (Unicode's East Asian Width).
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import islice

GAP = " │ "
ERASE = "\x1b[K"  # to the end of the line


def cells(text: str) -> int:
    """How many cells of a terminal it takes."""
    return sum(map(_cells_of, text))


def _cells_of(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cc", "Cf", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def printable(text: str) -> str:
    """Without control characters but line breaks and tabs: a model may write what a terminal would
    obey."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, broken at spaces, or within words that are longer.

    What is appended to `text` changes none of its lines but the last.
    """
    lines: list[str] = []
    for paragraph in text.expandtabs(4).split("\n"):
        line = ""
        for word in re.findall(r" *[^ ]+", paragraph):
            if line and cells(line + word) > width:
                lines.append(line)
                line = ""
                word = word.lstrip(" ")
            line += word
            while cells(line) > width:
                head = _head(line, width)
                lines.append(head)
                line = line[len(head) :]
        lines.append(line)
    return lines


def _head(text: str, width: int) -> str:
    """The most characters, at least one, that fit into `width` cells."""
    taken = 0
    for i, character in enumerate(text):
        taken += _cells_of(character)
        if taken > width and i:
            return text[:i]
    return text


class Columns:
    """Columns of one width, filled from the left to the right and from the top down."""

    def __init__(self, count: int, width: int, write: Callable[[str], object]) -> None:
        """`width` is that of the terminal in cells; one of them stays free, as the last would wrap
        the line."""
        self.width = (width - 1 - len(GAP) * (count - 1)) // count
        self.write = write
        self.rows = 0

    def heading(self, names: Sequence[str]) -> None:
        """A row of names, and a line below."""
        self.write(self._row(names) + "\n")
        self.write("─┼─".join("─" * self.width for _ in names) + "\n")

    def show(self, texts: Sequence[str], ended: Sequence[bool]) -> None:
        """All of the texts so far, and which of them are at an end."""
        wrapped = [wrap(printable(text).rstrip(), self.width) for text in texts]
        last = max(map(len, wrapped))
        full = min(
            last if end else len(lines) - 1 for lines, end in zip(wrapped, ended, strict=True)
        )
        for row in range(self.rows, min(full + 1, last)):
            now = [next(islice(lines, row, None), "") for lines in wrapped]
            self.write("\r" + self._row(now) + ERASE + "\n" * (row < full))
        self.rows = max(self.rows, full)

    def _row(self, lines: Sequence[str]) -> str:
        padded = (line + " " * (self.width - cells(line)) for line in lines)
        return GAP.join(padded).rstrip()
