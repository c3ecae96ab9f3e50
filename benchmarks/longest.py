"""The longest row that a side can step on, on a GPU or under a cap of its memory.

By doubling until one does not fit, then by halving the gap. A try is the first two steps on rows of
that length (the second has the optimizer's states from the start). What ran out of memory may have
left something behind: the next try is in a fresh process. Positions that the model was not trained
for cost what others cost, so the search does not stop at them.
"""

from collections.abc import Callable, Sequence
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
    """`fits` of a side."""

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
        """End the process, if one is there."""
        if self._side:
            self._side.close()
        self._side = None


def find_longest(names: Sequence[str], setup: Setup, unit: int) -> dict[str, int]:
    """For each side the tokens of the longest row; 0 where the model alone is too much."""
    found = {}
    for name in tqdm(names, desc="Longest row", leave=False):
        tries = Tries(name, replace(setup, seq=unit))
        try:
            found[name] = longest(tries, unit=unit)
        finally:
            tries.close()
        tqdm.write(f"{name:28}{found[name]:>10,} tokens")
    return found
