"""The one kind of error that a user can mend.

The commands print it as a single line `error: …` on standard error and exit with 2 (qlora.cli);
any other exception is a bug and keeps its traceback.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class UserError(ValueError):
    """One line for the user: what was wanted, what came, how to mend it."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


def require(ok: bool, message: str) -> None:
    """Raise a UserError with that message unless `ok`."""
    if not ok:
        raise UserError(message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`' Did you mean …?'` with the nearest of `known`; empty when none is near."""
    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def some(names: Sequence[str], most: int = 4) -> str:
    """The first of `names` in a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, to quote within another."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:200] + "."
