"""The longest row that a side can train on, on a GPU or with a limit on its memory.

The search doubles the length until it does not fit, then bisects. A try is two steps on rows of
that length (the second has the optimizer's states from the start). After a failed try the next one
runs in a fresh process. Positions past the model's limit cost the same, so the search includes
them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from step_runner import Runner
from step_sides import Setup
from tqdm.auto import tqdm
from turns import Apart, ApartError

LIMIT = 1 << 20


def longest(fits: Callable[[int], bool], *, unit: int, limit: int = LIMIT) -> int:
    """The most tokens that fit, a multiple of `unit` up to `limit`."""
    good, bad = 0, unit
    while bad <= limit and fits(bad):
        good, bad = bad, 2 * bad
    if bad > limit:
        return good
    while bad - good > unit:
        middle = (good + bad) // 2 // unit * unit
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


class Tries:
    """Runs Runner.fits of one side, in a fresh process after a failure."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.name, self.setup = name, setup
        self._side: Apart | None = None

    def __call__(self, seq: int) -> bool:
        self._side = self._side or Apart(Runner, self.name, self.setup)
        try:
            if self._side("fits", seq):
                return True
        except ApartError as error:
            if error.kind != "OutOfMemoryError":  # not even the model fits
                raise
        self.close()
        return False

    def close(self) -> None:
        """End the process, if there is one."""
        if self._side:
            self._side.close()
        self._side = None


def find_longest(names: Sequence[str], setup: Setup, unit: int) -> Iterator[tuple[str, int]]:
    """Each side and the tokens of its longest row; 0 where the model itself does not fit."""
    for name in tqdm(names, desc="Longest row", leave=False):
        tries = Tries(name, replace(setup, seq=unit))
        try:
            found = longest(tries, unit=unit)
        finally:
            tries.close()
        tqdm.write(f"{name:28}{found:>10,} tokens")
        yield name, found
