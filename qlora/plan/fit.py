"""What would make a run fit, by counting it again with other settings; and what fits beside it.

Options in the order of what they cost. `saved` is counted with that option alone; `cheapest` takes
the first that suffices alone, or else one after another. The other way, `fill` uses free memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from qlora.config import TrainConfig, flat
from qlora.errors import UserError
from qlora.plan.estimate import Plan, Planner, budget

PAGED = "paged_adamw_8bit"
LEAST_RANK, LEAST_LENGTH = 4, 256
MOST_ROWS, MOST_LENGTH = 1024, 1 << 22
UNIT = 64  # of the longest row, in tokens
SHARP = 32  # of the largest batch and row, one part in so many
ONE_MODEL = ("per_device_train_batch_size", "gradient_accumulation_steps", "optim")
"""settings that need no other model to be counted"""


@dataclass(frozen=True)
class Option:
    """A change of the settings, and what it costs."""

    settings: dict[str, Any]
    cost: str
    peak_bytes: int
    saved_bytes: int

    @property
    def flags(self) -> str:
        return flags_of(self.settings)


def flags_of(settings: dict[str, Any]) -> str:
    """The settings as flags."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words.append(f"--{'' if value else 'no-'}{flag}" if type(value) is bool
                     else f"--{flag} {value}")  # fmt: skip
    return " ".join(words)


def _candidates(config: TrainConfig) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes that take less memory, the cheapest first."""
    rows, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if rows > 1:
        fewer = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows * steps}
        yield fewer, "the same steps, in more and smaller passes"
    if config.optim != PAGED:
        yield {"optim": PAGED}, "8-bit states of Adam, which move to host memory if they must"
    if not config.fast_path:
        yield {"fast_path": True}, "nothing: the same numbers"
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}, "each layer's forward pass is computed twice"
    else:
        yield {"offload_activations": True}, "host memory, and copies beside the computation"
    yield {"offload_embedding": True}, "host memory, and a few rows read from it a step"
    if config.lora.r // 2 >= LEAST_RANK:
        yield {"r": config.lora.r // 2}, "a smaller adapter, which may learn less"
    if config.data.max_length // 2 >= LEAST_LENGTH:
        yield {"max_length": config.data.max_length // 2}, "longer rows are truncated"


def with_settings(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    """`config` with some settings changed, by their flat names."""
    for name, value in settings.items():
        if name == "r":
            config = replace(config, lora=replace(config.lora, r=value))
        elif name == "max_length":
            config = replace(config, data=replace(config.data, max_length=value))
        else:
            config = replace(config, **{name: value})
    return config


class Fitter:
    """Plans of one run with other settings."""

    def __init__(self, planner: Planner) -> None:
        self.config, self.source = planner.config, planner.source
        self.budget = budget(planner.config) or 0
        self._planners = {self._key(planner.config): planner}

    def _key(self, config: TrainConfig) -> str:
        """Of the settings that a planner's model has."""
        left_out = (*ONE_MODEL, "max_length", "offload_embedding")
        return repr({k: v for k, v in flat(config).items() if k not in left_out})

    def plan(self, settings: dict[str, Any]) -> Plan | None:
        """The plan with these settings; None where they do not work together."""
        try:
            config = with_settings(self.config, settings)
            key = self._key(config)
            if key not in self._planners:
                self._planners[key] = Planner(config, self.source)
            return self._planners[key].plan(config)
        except UserError:
            return None

    def options(self, before: Plan) -> list[Option]:
        """What takes less memory, the cheapest first."""
        found = []
        for settings, cost in _candidates(self.config):
            made = self.plan(settings)
            if made is not None and made.peak_bytes < before.peak_bytes:
                saved = before.peak_bytes - made.peak_bytes
                found.append(Option(settings, cost, made.peak_bytes, saved))
        return found

    def cheapest(self, before: Plan, options: list[Option]) -> Plan | None:
        """The plan of the cheapest options that suffice; None if all together do not."""
        for option in options:
            if option.peak_bytes <= self.budget:
                return self.plan(option.settings)
        settings: dict[str, Any] = {}
        for option in options:
            settings |= option.settings
            made = self.plan(settings)
            if made is not None and made.fits:
                return made
        return None

    def fill(self, before: Plan) -> Plan:
        """The plan that uses free memory: no checkpointing, then larger micro-batches."""
        best, settings = before, dict[str, Any]()
        if self.config.gradient_checkpointing and not self.config.offload_activations:
            made = self.plan({"gradient_checkpointing": False})
            if made is not None and made.fits:
                best, settings = made, {"gradient_checkpointing": False}
        rows = self.config.per_device_train_batch_size
        total = rows * self.config.gradient_accumulation_steps
        for more in (n for n in range(2 * rows, total + 1, rows) if total % n == 0):
            larger: dict[str, Any] = {"per_device_train_batch_size": more}
            larger["gradient_accumulation_steps"] = total // more
            made = self.plan(settings | larger)
            if made is None or not made.fits:
                break
            best = made
        return best

    def longest_row(self, rows: int = 1) -> int:
        """The most tokens of a row that fit, a multiple of UNIT; 0 if none do."""
        most = min(self.source.longest or MOST_LENGTH, MOST_LENGTH) // UNIT

        def peak(units: int) -> int:
            settings = {"per_device_train_batch_size": rows, "max_length": units * UNIT}
            return self._peak(settings)

        return UNIT * largest(peak, self.budget, most, self.config.data.max_length // UNIT)

    def largest_batch(self) -> int:
        """The most rows of a micro-batch that fit; 0 if none do."""

        def peak(rows: int) -> int:
            return self._peak({"per_device_train_batch_size": rows})

        rows = self.config.per_device_train_batch_size
        return largest(peak, self.budget, MOST_ROWS, rows)

    def _peak(self, settings: dict[str, Any]) -> int:
        made = self.plan(settings)
        return self.budget + 1 if made is None else made.peak_bytes


def largest(peak: Callable[[int], int], budget: int, most: int, first: int) -> int:
    """The largest number up to `most` whose peak is within the budget, to a part in SHARP; 0 if
    there is none. A bisection, at the place where a line through the last two peaks meets it."""
    low, high, at = 0, most + 1, max(1, min(first, most))
    points: list[tuple[int, int]] = []
    while high - low > max(1, low // SHARP):
        points.append((at, peak(at)))
        if points[-1][1] <= budget:
            low = at
        else:
            high = at
        (x, y), (x0, y0) = points[-1], points[-2] if len(points) > 1 else (0, 0)
        guess = x + (budget - y) * (x - x0) // (y - y0) if y > y0 and len(points) > 1 else 0
        if len(points) % 4 == 0 or not guess:  # a line that leads nowhere must not stop it
            guess = 2 * low if high > most and low else (low + high) // 2 if low else high // 2
        at = max(low + 1, min(guess, high - 1))
    return low


def changed(before: TrainConfig, after: TrainConfig) -> dict[str, Any]:
    """The settings of `after` that differ."""
    old, new = flat(before), flat(after)
    return {name: value for name, value in new.items() if old.get(name) != value}
