"""UserError, the exception for errors that a user can fix, and helpers for its messages."""

import os
import signal
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

# Ends a process, as does Ctrl-C. SIGHUP: its terminal was closed; not on Windows.
STOPS = tuple(each for each in signal.Signals if each.name in ("SIGTERM", "SIGHUP"))


OWN_SECONDS = 4.0  # in which the first of several processes ends on an error of all
LONGEST_MESSAGE = 2000  # characters


class UserError(ValueError):
    """An error in one line: what was wanted, what came, how to fix it."""

    def __str__(self) -> str:
        return plain_line(super().__str__())


class StreamError(UserError):
    """A fault of the data that was found while training ran."""


class RankError(UserError):
    """An error of one process of several, which it prints although it is not the first."""


def is_first_process() -> bool:
    """Whether this process is the one that prints: the first, if a launcher started several."""
    values = [os.environ.get(name, "").strip() for name in ("WORLD_SIZE", "RANK")]
    ranks, rank = (int(value) if value.isdecimal() else 0 for value in values)
    return ranks <= 1 or rank == 0


def plain_line(text: str) -> str:
    """`text` in one line, with escapes for what a terminal would obey; a long one without its
    middle. Names and values from files come into messages."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    cut = f"{line[: LONGEST_MESSAGE - 400]} … {line[-390:]}"
    return line if len(line) <= LONGEST_MESSAGE else cut


class Interrupted(KeyboardInterrupt):
    """A run that ended on a signal; `str` says what was saved."""

    def __init__(self, message: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


def ignore_hangups() -> None:
    """Ignore SIGHUP from now on: a terminal that is closed sends it more than once."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def require(ok: bool, message: str) -> None:
    """Raise UserError(message) unless `ok`."""
    if not ok:
        raise UserError(message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`' Did you mean …?'` with the closest of `known`; empty if none is close."""
    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def some(names: Sequence[str], most: int = 4) -> str:
    """The first `most` of `names`, and the number of the others, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for another message."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0].rstrip(".")[:200]
    return line if line.endswith(("!", "?")) else f"{line}."
