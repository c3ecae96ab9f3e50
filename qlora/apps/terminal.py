"""Texts side by side on a terminal, while they are being generated.

Row i of the screen shows line i of each text. The last row is rewritten in place (carriage return)
until line i is complete in every text; then the next row begins. The cursor never moves up, so rows
that have scrolled away stay valid. Widths are in cells: Chinese and Japanese characters and most
emoji take two, combining marks none (wcwidth, by Unicode's East Asian Width).
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import islice

from wcwidth import wcswidth

GAP = " │ "
ERASE = "\x1b[K"  # to the end of the line


def printable(text: str) -> str:
    """Remove control characters, which a terminal executes, except line breaks and tabs."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, broken at spaces, or within words that are longer.

    Appending to `text` changes only the last of its lines.
    """
    lines: list[str] = []
    for paragraph in text.expandtabs(4).split("\n"):
        line = ""
        for word in re.findall(r" *[^ ]+", paragraph):
            if line and wcswidth(line + word) > width:
                lines.append(line)
                line, word = "", word.lstrip(" ")
            line += word
            while wcswidth(line) > width:
                end = 1  # the longest beginning that fits, at least one character
                while wcswidth(line[: end + 1]) <= width:
                    end += 1
                lines.append(line[:end])
                line = line[end:]
        lines.append(line)
    return lines


class SideBySide:
    """Columns of equal width below their names, filled from the top down.

    `width` is the terminal's, in cells; the last one is not used, as writing there wraps the line.
    """

    def __init__(self, names: Sequence[str], width: int, write: Callable[[str], object]) -> None:
        self.width = (width - 1 - len(GAP) * (len(names) - 1)) // len(names)
        self.write = write
        self.rows = 0  # complete rows
        self.write(self._row(names) + "\n")
        self.write("─┼─".join("─" * self.width for _ in names) + "\n")

    def show(self, texts: Sequence[str], ended: Sequence[bool]) -> None:
        """Write what was added to the texts; `ended` says which of them are complete."""
        wrapped = [wrap(printable(text).rstrip(), self.width) for text in texts]
        last = max(map(len, wrapped))
        complete = min(
            last if end else len(lines) - 1 for lines, end in zip(wrapped, ended, strict=True)
        )
        for row in range(self.rows, min(complete + 1, last)):
            cells = [next(islice(lines, row, None), "") for lines in wrapped]
            self.write("\r" + self._row(cells) + ERASE + "\n" * (row < complete))
        self.rows = max(self.rows, complete)

    def _row(self, cells: Sequence[str]) -> str:
        padded = (text + " " * (self.width - wcswidth(text)) for text in cells)
        return GAP.join(padded).rstrip()
