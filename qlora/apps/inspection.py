"""`python train.py --inspect N` and `qlora inspect`: rows of the training data, token by token.

Reads the tokenizer and as many records as are shown; no weights. Prints a table per row, and writes
inspect.html, a self-contained page, into the output folder, in which training then starts as in an
empty one; without an output folder, into the working directory. With --json, prints one object a
row and writes nothing.
"""

import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment

from qlora.base.checkpoint import Checkpoint, resolve
from qlora.base.load import load_tokenizer
from qlora.config import TrainConfig
from qlora.data.chats import Reading
from qlora.data.encoding import Encoder
from qlora.data.inspection import Piece, View, views
from qlora.data.objectives import OBJECTIVES, class_names
from qlora.data.records import Chosen, load_records
from qlora.data.templates import apply_settings
from qlora.errors import UserError, require
from qlora.files import INSPECTION, replace_text

PAGE = Path(__file__).with_name("inspection.html")


def inspect(config: TrainConfig) -> None:
    """Show the rows that `config` asks for. Raises UserError for rows that cannot be read."""
    shown: list[View] = []
    page = Path(config.output_dir).expanduser() / INSPECTION
    if not config.json:
        require_writable(page.parent)
    for view in views_of(config):
        print(json.dumps(view.record(), ensure_ascii=False) if config.json else "", flush=True)
        if not config.json:
            print(table(view, colour=sys.stdout.isatty()))
            shown.append(view)
    if not config.json:
        page.parent.mkdir(parents=True, exist_ok=True)
        replace_text(page, html(shown, config))
        print(f"\nThe same rows are in {page}; nothing was trained.")


def require_writable(folder: Path) -> None:
    """Refuse an output folder in which no file can be written."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    fault = f"--output-dir {folder}: {place} is no folder, give another one"
    require(place.is_dir(), fault)


def views_of(config: TrainConfig) -> Iterable[View]:
    """The rows that `config` asks for, of each source of training data."""
    folder = resolve(config.model, revision=config.revision, weights=False)
    trusted = config.trust_remote_code
    tokenizer = load_tokenizer(folder, task=config.task, trust_remote_code=trusted)
    apply_settings(tokenizer, config.data)
    longest: int | None = None
    with suppress(UserError):  # without config.json
        longest = Checkpoint(folder).max_positions
    max_length = min(config.data.max_length, longest or config.data.max_length)
    reading, objective = Reading.of(config.data), OBJECTIVES[config.task]
    names_of = config.data.data_config or "", config.data.data_split or ""
    chosen = Chosen(*names_of, streaming=config.data.streaming)
    count = None if config.inspect_rows else config.inspect
    names: Any = ()
    if objective.classifies:
        every = (load_records(s, objective.kinds, chosen=chosen) for s in config.data.sources)
        names = class_names(*every)
    for source in config.data.sources:
        last = count or max(config.inspect_rows)
        kinds = reading.kinds(objective.kinds)
        records = load_records(source, kinds, limit=last, chosen=chosen)
        reading.require_column(records, source)
        how: Any = (reading, config.data.long_rows, records)
        encoder = Encoder(source, config.task, tokenizer, max_length, names, *how)
        yield from views(encoder, records, count=count, chosen=config.inspect_rows)


# ---- for a terminal and for a browser


def heading(view: View) -> str:
    """The row's number and counts."""
    learned = sum(token.label is not None for token in view.tokens)
    counts = f"{len(view.input_ids):,} tokens, {learned:,} learned"
    return f"{view.source}, row {view.row}: {counts}" + (f"; {view.note}" if view.note else "")


def table(view: View, *, colour: bool) -> str:
    """A line per token: its position, id, label and text; learned ones in green, or with a *."""
    lines = [heading(view), "  position       id    label  token"]
    for i, token in enumerate(view.tokens):
        label = "-" if token.label is None else str(token.label)
        mark = "*" if token.label is not None and not colour else " "
        line = f"{mark} {i:>8} {token.id:>8} {label:>8}  {token.text!r}"
        lines.append(f"\x1b[32m{line}\x1b[0m" if token.label is not None and colour else line)
    return "\n".join(lines)


def html(shown: list[View], config: TrainConfig) -> str:
    """The page of some rows."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(PAGE.read_text(encoding="utf-8"))
    rows = [(heading(view), _stretches(view.pieces), view.tokens) for view in shown]
    return page.render(rows=rows, model=config.model, data=config.data.name)


def _stretches(pieces: list[Piece]) -> list[tuple[bool, list[Piece]]]:
    """Pieces in stretches with and without loss."""
    groups = groupby(pieces, key=lambda piece: piece.tokens[0].label is not None)
    return [(learned, list(group)) for learned, group in groups]
