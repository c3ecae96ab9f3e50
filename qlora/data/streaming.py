"""Rows that are read, encoded and packed while training runs; nothing is written.

    records -> shuffle buffer -> windows of WINDOW_ROWS records -> rows -> items

An item is what a batch is made of: a row, or with packing a pack of rows of one window. Items are
numbered from 0. Which item has a number depends on the data, the settings and the seed only: the
draws of the order of files, of the sources and of the buffer are seeded by the seed and the number
of the pass over the data. When the records end, the next pass begins. Of several sources, each
record is drawn from one of those that are not at their end; with weights, from one by its weight,
and the pass ends with the first source that does.

A thread reads ahead, and processes encode (qlora.data.workers): they are forked before the model is
loaded. Memory holds the buffer and a few windows.

A run that is resumed reads past the records of the windows that are done, of the present pass only,
without encoding them. A hash over these records, which a checkpoint has, tells whether they are
the same.

`datasets` has IterableDataset, with such a buffer; its state_dict leaves out the buffer's contents,
so a resumed run would see other rows.

Left out: batches of rows of like length; the order of files within a hub data set.
"""

import copy
import hashlib
import random
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, islice
from queue import Full, Queue
from threading import Event, Thread
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora.cli import Progress
from qlora.config import DataConfig
from qlora.data import workers
from qlora.data.batches import PackedRows
from qlora.data.chats import Reading
from qlora.data.encoding import (
    MOST_LOST,
    SELECTING,
    Encoder,
    Tally,
    record_key,
    require_rows,
)
from qlora.data.objectives import OBJECTIVES
from qlora.data.records import Chosen, Part, Record, Records, load_records
from qlora.data.rows import DataStats, has_chats, notes_on, require_known, stats_of
from qlora.data.templates import set_switches
from qlora.data.workers import KILLED
from qlora.errors import StreamError, UserError, first_line

WINDOW_ROWS = 1000  # records that are packed together
PIECE_ROWS = 100  # records that a process encodes at a time
WINDOWS_AHEAD = 2
MOST_PROCESSES = 8  # unless --dataset-num-proc says otherwise
KNOWN_PLACES = 1000  # windows that a checkpoint can begin in
LOOK_SECONDS = 0.2  # from one look of the thread, whether it should end, to the next
Numbered = tuple[str, Record]  # the number of a row, and its record


class OtherRecords(StreamError):
    """The records before a place are not those that it was saved with."""


@dataclass(frozen=True)
class Place:
    """Where a window begins."""

    items: int = 0  # those before it
    number: int = 0  # of the pass
    window: int = 0  # in the pass
    digest: str = ""  # of the records before it, in the pass
    tally: Mapping[str, Any] | None = None  # of all records before it


@dataclass(frozen=True)
class Window:
    """The items of records that were encoded together."""

    place: Place
    rows: Dataset
    items: Any  # the rows, or packs of them
    order: Sequence[int]
    tally: Tally  # of its records and all before

    @property
    def end(self) -> int:
        """The number of the item after the last."""
        return self.place.items + len(self.order)


class StreamedRows(torch.utils.data.Dataset[Any]):
    """`size` items of the training data, to be read one after the other.

    A later item is reached by reading up to it; an earlier one, but of the first window `head`, by
    starting again.
    """

    rows = ()  # those with a number in the data
    has_epochs = False  # Trainer would count shares of the run

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        task: str,
        max_length: int,
        size: int,
        seed: int,
        vocabulary: int | None = None,
    ) -> None:
        """Open the sources, and encode the first window.

        Raises:
            UserError: a source cannot be read, or too little is learned of the first window.
        """
        self.data, self.size, self.seed, self.vocabulary = data, size, seed, vocabulary
        reading, sources = Reading.of(data), []
        chosen = Chosen(data.data_config or "", data.data_split or "", streaming=True)
        for source in data.sources:
            records = load_records(source, reading.kinds(OBJECTIVES[task].kinds), chosen=chosen)
            sources.append(_named(records, source) if len(data.sources) > 1 else records)
        self.sources: Sequence[Records] = sources
        every = replace(sources[0], parts=[part for records in sources for part in records.parts])
        self.tokenizer = tokenizer
        own = copy.deepcopy(tokenizer)  # rows do not depend on what is set in the run's later
        self.encoder = Encoder(data.name, task, own, max_length, (), reading, data.long_rows, every)
        processes = data.dataset_num_proc or max(1, min(workers.cores() - 1, MOST_PROCESSES))
        self.places: deque[Place] = deque(maxlen=KNOWN_PLACES)
        self.told = 0  # rows that were left out or cut, in the last note
        self.is_cut = False  # whether it was told that many tokens are cut
        self.ahead: Ahead | None = None
        with ExitStack() as resources:
            self.submit = resources.enter_context(workers.started(self.encoder.chunk, processes))
            self.windows = self._windows(Place())
            self.window = self.head = next(self.windows)
            self.thinks = self.head.tally.thinks > 0  # then the run sets it
            self.places.append(self.head.place)
            self.resources = resources.pop_all()

    @property
    def stats(self) -> DataStats:
        """The counts of the first window."""
        tally, drops = self.head.tally, self.data.long_rows == "drop"
        chats = any(has_chats(self.encoder.task, records) for records in self.sources)
        notes = [note for records in self.sources for note in records.notes]
        return stats_of(tally, (), chats, drops, (*notes_on(self.encoder, tally), *notes))

    def close(self) -> None:
        """End the thread and the processes."""
        if self.ahead:
            self.ahead.close()
        self.resources.close()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        self.ahead = self.ahead or Ahead(self.windows)
        if index < self.head.end:
            window = self.head
        else:
            if index < self.window.place.items:
                self._restart(Place())
            while index >= self.window.end:
                self._enter()
            window = self.window
        return window.items[window.order[index - window.place.items]]

    def place_of(self, index: int) -> dict[str, Any]:
        """The last known place that is not behind the item `index`, for `go_to`."""
        known = [place for place in self.places if place.items <= index]
        return asdict(known[-1] if known else Place())

    def go_to(self, index: int, place: Mapping[str, Any]) -> bool:
        """Read up to the item `index` from a place that is not behind it; from the beginning if
        `place` is empty. Returns whether the records before the place are those of then."""
        try:
            self._restart(Place(**place))
        except OtherRecords:
            self._restart(Place())
            return False
        while index >= self.window.end:
            self._enter()
        return True

    @property
    def rows_read(self) -> int:
        """The rows of the windows that were begun."""
        return self.window.tally.rows

    # ---- windows

    def _restart(self, place: Place) -> None:
        if self.ahead:
            self.ahead.close()
        self.places.clear()
        self.ahead = Ahead(self._windows(place))
        self._enter()

    def _enter(self) -> None:
        """Go on to the next window, and tell what is left out of it."""
        assert self.ahead is not None
        self.window = self.ahead.get()
        place, tally, name = self.window.place, self.window.tally, self.data.name
        self.places.append(place)
        if (place.number, place.window) == (1, 0):
            rows = Tally.of(dict(place.tally or {})).rows
            tqdm.write(f"{name}: all {rows:,} rows were read, the next pass over them begins")
        if tally.thinks and not self.thinks:  # the first row with reasoning comes late
            self.thinks = True
            set_switches(self.tokenizer, {"enable_thinking": True})
        left_out = tally.long.count + tally.dropped.count + tally.unanswered.count
        if left_out >= max(1, 2 * self.told):
            self.told = left_out
            for note in notes_on(self.encoder, tally):
                tqdm.write(f"so far, {note}")
        share = tally.cut_tokens / max(tally.full_tokens, 1)
        if self.data.long_rows == "error" and share > MOST_LOST and not self.is_cut:
            self.is_cut = True
            tqdm.write(f"warning: {name}: {share:.1%} of all tokens so far were cut")

    def _windows(self, place: Place) -> Generator[Window, None, None]:
        """The windows from `place` on; the records of WINDOWS_AHEAD more are being encoded."""
        waiting: deque[tuple[Place, list[Future[tuple[pa.Table, Tally]]]]] = deque()
        every, items, ahead = self._records_from(place), place.items, 0  # the first one at once
        tally, fault = Tally.of(dict(place.tally or {})), None
        while fault is None:
            try:
                at, records = next(every)
                pieces = range(0, len(records), PIECE_ROWS)
                waiting.append((at, [self.submit(records[i : i + PIECE_ROWS]) for i in pieces]))
            except UserError as error:
                fault = error  # raised behind the windows before it, which are right
            except OSError as error:  # of a hub, or a file that was removed
                fault = UserError(f"{self.data.name} cannot be read: {first_line(error)}")
            while len(waiting) > (0 if fault else ahead):
                at, encoded = waiting.popleft()
                at = replace(at, items=items, tally=tally.record() if tally.full_tokens else None)
                window = self._window(at, [future.result() for future in encoded])
                tally, items, ahead = window.tally, window.end, WINDOWS_AHEAD
                try:
                    yield window
                except GeneratorExit:
                    for future in chain.from_iterable(futures for _, futures in waiting):
                        future.cancel()
                    raise
        raise fault

    def _window(self, place: Place, encoded: Sequence[tuple[pa.Table, Tally]]) -> Window:
        tally = Tally.of(dict(place.tally or {}))
        for _, counts in encoded:
            tally += counts
        if not place.tally:  # the first one decides
            require_rows(self.encoder, tally)
        table = pa.concat_tables([table for table, _ in encoded]).drop_columns(list(SELECTING))
        rows = Dataset(table, fingerprint=f"{place.number}-{place.window}")  # else it is hashed
        require_known(self.encoder, rows, tally, self.vocabulary)
        packing = self.data.packing and len(rows) > 0
        items: Any = PackedRows(rows, self.encoder.max_length) if packing else rows
        order = list(range(len(items)))
        if packing or self.data.shuffle_buffer > 1:  # packs are ordered by their longest rows
            random.Random(f"{self.seed} {place.number} {place.window}").shuffle(order)
        return Window(place, rows, items, order, tally)

    # ---- records

    def _records_from(self, place: Place) -> Iterator[tuple[Place, list[Numbered]]]:
        """The records of each window from `place` on, without end."""
        for number in count(place.number):
            records, digest, begin = self._pass(number), "", 0
            if number == place.number and place.window:
                begin = place.window
                for _ in Progress(range(begin), desc="Reading past rows that are done"):
                    digest = _digest(digest, list(islice(records, WINDOW_ROWS)))
                if digest != place.digest:
                    raise OtherRecords(f"{self.data.name} has other records than before")
            for window in count(begin):
                if not (chosen := list(islice(records, WINDOW_ROWS))):
                    break
                yield Place(0, number, window, digest), chosen
                digest = _digest(digest, chosen)

    def _pass(self, number: int) -> Iterator[Numbered]:
        """The records of a pass over the data, shuffled."""
        draw, size = random.Random(f"{self.seed} {number}"), self.data.shuffle_buffer
        several = sum(len(records.parts) for records in self.sources) > 1
        streams = []
        for records in self.sources:
            parts = list(records.parts)
            if size > 1:
                draw.shuffle(parts)
            streams.append(chain.from_iterable(_numbered(records, p, several) for p in parts))
        return shuffled(drawn(streams, self.data.data_weights, draw), size, draw)


class Ahead:
    """A thread that reads windows ahead, at most WINDOWS_AHEAD."""

    def __init__(self, windows: Generator[Window, None, None]) -> None:
        self.windows, self.ends = windows, Event()
        self.fault: BaseException | None = None
        self.queue: Queue[Window | BaseException] = Queue(WINDOWS_AHEAD)
        self.thread = Thread(target=self._read, daemon=True)
        self.thread.start()

    def get(self) -> Window:
        """The next window. Raises what reading it raised; StreamError for a UserError."""
        if self.fault is None:
            item = self.queue.get()
            if isinstance(item, Window):
                return item
            self.fault = item
            if isinstance(item, BrokenProcessPool):
                self.fault = StreamError(f"one of the {KILLED}")
            elif isinstance(item, UserError) and not isinstance(item, StreamError):
                self.fault = StreamError(str(item))
        raise self.fault

    def close(self) -> None:
        """End the thread, and leave out what is not encoded yet."""
        self.ends.set()
        self.thread.join()
        self.windows.close()

    def _read(self) -> None:
        try:
            for window in self.windows:
                self._put(window)
                if self.ends.is_set():
                    return
        except BaseException as error:  # raised where the window is wanted
            self._put(error)

    def _put(self, item: Window | BaseException) -> None:
        while not self.ends.is_set():
            with suppress(Full):
                self.queue.put(item, timeout=LOOK_SECONDS)
                return


# ---- streams of records


def shuffled(records: Iterator[Numbered], size: int, draw: random.Random) -> Iterator[Numbered]:
    """`records` through a buffer of `size`: each gives its place up to the next one, by chance."""
    buffer = list(islice(records, size))
    for record in records:
        at = draw.randrange(size)
        yield buffer[at]
        buffer[at] = record
    if size > 1:
        draw.shuffle(buffer)
    yield from buffer


def drawn(
    streams: Sequence[Iterator[Numbered]], weights: Sequence[float], draw: random.Random
) -> Iterator[Numbered]:
    """The records of several streams, each from one by chance. With weights, until one ends."""
    left, shares = list(streams), list(weights) or [1.0] * len(streams)
    while left:
        (at,) = draw.choices(range(len(left)), shares) if len(left) > 1 else (0,)
        if (record := next(left[at], None)) is not None:
            yield record
        elif weights:
            return
        else:
            del left[at], shares[at]


def _numbered(records: Records, part: Part, several: bool) -> Iterator[Numbered]:
    of = f" of {part.name}" * several
    return ((f"{n}{of}", row) for n, row in replace(records, parts=[part]).numbered())


def _named(records: Records, source: str) -> Records:
    """Records of one source of several: the names of its parts begin with its own."""
    one = len(records.parts) == 1
    parts = [replace(p, name=source if one else f"{source}/{p.name}") for p in records.parts]
    return replace(records, parts=parts)


def _digest(before: str, records: Sequence[Numbered]) -> str:
    """A hash over records and all before them."""
    keys = b"".join(record_key(record).to_bytes(8) for _, record in records)
    return hashlib.sha256(before.encode() + keys).hexdigest()[:32]
