"""The one kind of error a user can mend.

Both scripts turn it into a single line `error: …` on standard error and exit code 2; everything
else is a bug and keeps its traceback. Each message says what was wanted, what came and how to
mend it.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """What was wanted, what came, how to mend it: one line, shown without a traceback."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`' Did you mean …?'` for the nearest of `known`, or nothing when none is near."""
    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def first_line(error: BaseException) -> str:
    """The first sentence of an error, for one line of ours."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:200] + "."
