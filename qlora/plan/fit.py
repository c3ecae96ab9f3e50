"""What would make a run fit, by counting it again with other settings; and what fits beside it.

A `Change` is a setting with other values; `options` counts each value alone. `cheapest` searches
all combinations in the order of their time, by qlora.plan.time: first those that train the same
rows and adapter, then smaller ranks, and last shorter rows. The other way, `fill`, takes the
fastest combination that fits into free memory.

Left out: tiles of the MLP and chunks of the loss of another size. Tiles of 32 MiB instead of 128
take at most 2.4 % off the peak of Llama-2-7B, Qwen2.5-7B and Gemma-2-9B at 2,048 and 8,192 tokens
(counted), and add to it where all fits into one tile; chunks of 32 MiB take 80 MiB at most.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product, repeat
from math import prod
from typing import Any, NamedTuple
from unittest.mock import patch

from qlora.config import TrainConfig, flat
from qlora.config.tasks import CAUSAL_LM
from qlora.errors import UserError
from qlora.ops import nf4
from qlora.plan.estimate import Plan, Planner, budget, gpus_of
from qlora.plan.time import Card, card_of, card_of_size, step_seconds

PAGED = "paged_adamw_8bit"
LONG_ROWS = {"truncate": "truncated", "drop": "dropped", "split": "split"}
LEAST_RANK, LEAST_LENGTH = 4, 256
MOST_ROWS, MOST_LENGTH = 1024, 1 << 22
UNIT = 64  # of the longest row, in tokens
SHARP = 32  # of the largest batch and row, one part in so many
ONE_MODEL = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "max_length",
    "offload_embedding", "sharding", "offload_base",
)  # fmt: skip
"""settings that need no other model to be counted"""
TRAVELS = "the base's shards are sent to all GPUs, twice a micro-batch"
IN_DATA, IN_LORA = {"max_length", "long_rows", "packing"}, {"r"}
Settings = dict[str, Any]


class Change(NamedTuple):
    """A setting's other values, of which one may be taken, and what they cost."""

    values: list[Settings]
    cost: str | Sequence[str]
    """of all values, or of each"""
    learns_less: bool = False

    def priced(self) -> Iterator[tuple[Settings, str]]:
        """Each value with its cost."""
        costs = repeat(self.cost) if isinstance(self.cost, str) else self.cost
        yield from zip(self.values, costs, strict=False)


@dataclass(frozen=True)
class Option:
    """A change of the settings, and what it costs."""

    settings: Settings
    cost: str
    peak_bytes: int
    saved_bytes: int
    slower: float
    """the time of a token over that before"""

    @property
    def flags(self) -> str:
        return flags_of(self.settings)

    def record(self) -> dict[str, Any]:
        """The object of --json."""
        names = ("flags", "saved_bytes", "slower", "cost")
        return {name: getattr(self, name) for name in names}


def flags_of(settings: Settings) -> str:
    """The settings as flags."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words.append(f"--{'' if value else 'no-'}{flag}" if type(value) is bool
                     else f"--{flag} {value}")  # fmt: skip
    return " ".join(words)


def less_memory(config: TrainConfig, *, pads: bool) -> Iterator[Change]:
    """What takes less memory, without what learns less. `pads`: rows are filled up to the longest,
    as packed ones are not."""
    rows, checkpoints = config.per_device_train_batch_size, config.gradient_checkpointing
    if rows > 1 and pads and config.task == CAUSAL_LM.name:
        yield Change([{"packing": True}], "full rows instead of padding, so more of them a step")
    fewer = [_batch(config, n) for n in range(rows - 1, 0, -1) if _total(config) % n == 0]
    if fewer:
        yield Change(fewer, "the same steps, in more and smaller passes")
    if config.optim != PAGED:
        cost = "8-bit states of Adam, which move to host memory if they must"
        yield Change([{"optim": PAGED}], cost)
    if not config.fast_path:
        yield Change([{"fast_path": True}], "nothing: the same numbers, but for rounding")
    offload, again = {"offload_activations": True}, {"gradient_checkpointing": True}
    if not checkpoints:
        yield Change([again, again | offload], "each layer's forward pass is computed twice")
    elif not config.offload_activations:
        yield Change([offload], "host memory, and copies beside the computation")
    yield from _less_of_base(config)


def _less_of_base(config: TrainConfig) -> Iterator[Change]:
    """Other places for the base, of which one may be taken."""
    shards: Settings = {"sharding": "fsdp"}
    host: Settings = {"offload_base": True}
    copies = "host memory, and copies of each layer's shard to the GPU"
    if config.sharding == "fsdp":
        if not config.offload_base:
            yield Change([host], copies)
        return
    values: list[Settings] = [] if config.offload_embedding else [{"offload_embedding": True}]
    costs = ["host memory, and a few rows read from it a pass"] * len(values)
    if gpus_of(config) > 1:
        stays = {"offload_embedding": False} if config.offload_embedding else {}
        values += [stays | shards, stays | shards | host]
        costs += [TRAVELS, f"{TRAVELS}; {copies}"]
    if values:
        yield Change(values, costs)


def learns_less(config: TrainConfig) -> Iterator[Change]:
    """What takes less memory because it learns less, the better first."""
    if (r := config.lora.r // 2) >= LEAST_RANK:
        yield Change([{"r": r}], "a smaller adapter, which may learn less", True)
    if (tokens := config.data.max_length // 2) >= LEAST_LENGTH:
        how = "truncate" if config.data.long_rows == "error" else config.data.long_rows
        shorter = {"max_length": tokens, "long_rows": how}
        yield Change([shorter], f"longer rows are {LONG_ROWS[how]}", True)


def more_memory(config: TrainConfig) -> Iterator[Change]:
    """What is faster and takes more memory."""
    rows, total = config.per_device_train_batch_size, _total(config)
    yield Change([_batch(config, n) for n in range(rows + 1, total + 1) if total % n == 0], "")
    stays = {"offload_activations": False} if config.offload_activations else {}
    if config.gradient_checkpointing:
        yield Change([stays, stays | {"gradient_checkpointing": False}], "")
    if config.offload_embedding:
        yield Change([{"offload_embedding": False}], "")
    if config.sharding == "fsdp":
        stays = {"offload_base": False} if config.offload_base else {}
        yield Change([*[stays] * bool(stays), stays | {"sharding": "ddp"}], "")
    if not config.fast_path:
        yield Change([{"fast_path": True}], "")


def _total(config: TrainConfig) -> int:
    """Rows of an optimizer's step."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


def _batch(config: TrainConfig, rows: int) -> Settings:
    passes = _total(config) // rows
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}


def with_settings(config: TrainConfig, settings: Settings) -> TrainConfig:
    """`config` with some settings changed, by their flat names."""
    own, data, lora = dict(settings), config.data, config.lora
    for name in own.keys() & IN_DATA:
        data = replace(data, **{name: own.pop(name)})
    for name in own.keys() & IN_LORA:
        lora = replace(lora, **{name: own.pop(name)})
    return replace(config, data=data, lora=lora, **own)


class Fitter:
    """Plans of one run with other settings."""

    def __init__(self, planner: Planner) -> None:
        self.config, self.source = planner.config, planner.source
        self.budget = budget(planner.config) or 0
        self.card: Card = card_of(planner.config) or card_of_size(self.budget)
        self._planners = {self._key(planner.config): planner}
        self._plans: dict[str, Plan | None] = {}

    def _key(self, config: TrainConfig) -> str:
        """Of the settings that a planner's model has."""
        return repr({k: v for k, v in flat(config).items() if k not in ONE_MODEL})

    def plan(self, settings: Settings) -> Plan | None:
        """The plan with these settings; None where they do not work together."""
        name = repr(sorted(settings.items()))
        if name not in self._plans:
            self._plans[name] = self._planned(settings)
        return self._plans[name]

    def _planned(self, settings: Settings) -> Plan | None:
        try:
            config = with_settings(self.config, settings)
            key = self._key(config)
            if key not in self._planners:
                self._planners[key] = Planner(config, self.source)
            return self._planners[key].plan(config)
        except UserError:
            return None

    @cached_property
    def before(self) -> Plan:
        """The plan of the run as it is."""
        made = self.plan({})
        assert made is not None  # it was made before
        return made

    def slower(self, made: Plan) -> float:
        """The time of a token over that of the run as it is."""
        one, other = (
            step_seconds(p, self.card) / (_total(p.config) * p.length) for p in (self.before, made)
        )
        return other / one

    def _less_memory(self) -> Iterator[Change]:
        own = self._planners[self._key(self.config)].sample
        return less_memory(self.config, pads=own.collate is None)

    def options(self) -> list[Option]:
        """What takes less memory alone, the fastest first, and last what learns less."""
        found = []
        for change in (*self._less_memory(), *learns_less(self.config)):
            for settings, cost in change.priced():
                made = self.plan(settings)
                saved = self.before.peak_bytes - made.peak_bytes if made is not None else 0
                if made is not None and saved > 0:
                    own = Option(settings, cost, made.peak_bytes, saved, self.slower(made))
                    found.append((change.learns_less, own))
        found.sort(key=lambda option: (option[0], not option[0] and option[1].slower))
        return [option for _, option in found]

    def _factors(self, changes: Iterable[Change]) -> list[list[Settings]]:
        """The values of each change that can be planned, and none of them."""
        found = []
        for change in changes:
            known = [settings for settings in change.values if self.plan(settings) is not None]
            found.append([{}, *known])
        return found

    def _ordered(self, factors: list[list[Settings]]) -> list[Settings]:
        """All combinations, the fastest first; of equally fast ones that with the fewest flags."""
        pace = {repr(s): self.slower(self.plan(s) or self.before) for own in factors for s in own}
        every = []
        for parts in product(*factors):
            slower = prod(pace[repr(settings)] for settings in parts)
            every.append((round(slower, 3), sum(map(bool, parts)), _merged(parts)))
        return [settings for *_, settings in sorted(every, key=lambda found: found[:2])]

    def cheapest(self) -> Plan | None:
        """The plan of the fastest combination that fits, of the most that is learned; or None."""
        factors = [
            [s for s in own if self._peak(s) <= self.before.peak_bytes]
            for own in self._factors(self._less_memory())
        ]
        ordered, least = self._ordered(factors), _merged(own[-1] for own in factors)
        ranks = [{}, *(s for c in learns_less(self.config) for s in c.values if "r" in s)]
        for rank in ranks:
            if self._peak(least | rank) <= self.budget:
                plans = (self.plan(settings | rank) for settings in ordered)
                return next(made for made in plans if made is not None and made.fits)
        for rank in ranks:
            if self._peak(least | rank | {"max_length": LEAST_LENGTH}) <= self.budget:
                tokens = self.longest_row(least | rank)
                return self.plan(least | rank | {"max_length": tokens})
        return None

    def fill(self) -> Plan:
        """The fastest plan that fits: larger micro-batches, no checkpointing, all on the GPU."""
        best, found = step_seconds(self.before, self.card), self.before
        for settings in self._ordered(self._factors(more_memory(self.config))):
            made = self.plan(settings)
            if made is not None and made.fits:
                seconds = step_seconds(made, self.card)
                if seconds < 0.995 * best:
                    best, found = seconds, made
        return found

    def kept_weights(self, plan: Plan) -> Option | None:
        """What a run does by itself where a part of the card is free (qlora.ops.nf4.keep): bytes
        taken, as negative savings. None where it is not free, or where nothing is kept."""
        again = self._planners[self._key(plan.config)].anew()
        with patch.object(nf4, "_has_room", lambda *_: True):
            made = again.plan(plan.config)
        more = made.peak_bytes - plan.peak_bytes
        if more <= 0 or self.budget - made.peak_bytes < nf4.SPARE * self.budget:
            return None
        slower = step_seconds(made, self.card) / step_seconds(plan, self.card)
        return Option({}, "attention's weights stay decoded", made.peak_bytes, -more, slower)

    def longest_row(self, settings: Settings | None = None) -> int:
        """The most tokens of a row that fit, a multiple of UNIT; 0 if none do. By default of the
        run with one row a micro-batch."""
        most = min(self.source.longest or MOST_LENGTH, MOST_LENGTH) // UNIT
        own = {"per_device_train_batch_size": 1} if settings is None else settings

        def peak(units: int) -> int:
            return self._peak(own | {"max_length": units * UNIT})

        return UNIT * largest(peak, self.budget, most, self.config.data.max_length // UNIT)

    def largest_batch(self) -> int:
        """The most rows of a micro-batch that fit; 0 if none do."""

        def peak(rows: int) -> int:
            return self._peak({"per_device_train_batch_size": rows})

        rows = self.config.per_device_train_batch_size
        return largest(peak, self.budget, MOST_ROWS, rows)

    def _peak(self, settings: Settings) -> int:
        made = self.plan(settings)
        return self.budget + 1 if made is None else made.peak_bytes


def _merged(parts: Iterable[Settings]) -> Settings:
    return {name: value for settings in parts for name, value in settings.items()}


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
