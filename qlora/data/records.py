"""Files, folders and hub data sets -> records.

The columns of a record determine its kind, the first match of: `messages` (roles system, user,
assistant, tool), ShareGPT `conversations`, `prompt` + `completion` (strings or lists of messages),
Alpaca `instruction` + `input` + `output`, and `text`.

Values reach the model as the file has them: `datasets`, that is Arrow, reads only what is Arrow's,
since it turns dates into timestamps, and 5 beside 6.5 or null into 5.0. Each pass reads the files
anew, row by row: none stays in memory (of a .json file, its text does). Errors name file and line.
The names of files and folders name splits: of train.jsonl and valid.jsonl, training reads one.

Sources: Alpaca (tatsu-lab/stanford_alpaca), ShareGPT. Messages are read by qlora.data.chats.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora.data.readers import (
    Written,
    cell_rows,
    csv_rows,
    data_ending,
    json_rows,
    text_lines,
    text_rows,
)
from qlora.errors import UserError, did_you_mean, first_line, require, some

if TYPE_CHECKING:  # half a second, which a plan of a run does without
    from datasets import Dataset, Features, IterableDataset

Record = Mapping[str, Any]
Kind = tuple[str, ...]
Kinds = Mapping[Kind, Sequence[str]]  # the columns of each kind of record, and its optional ones

ENDINGS = ".jsonl .json .csv .parquet .txt"
SOURCES = (
    f"a {ENDINGS} file (.gz, .zst), a folder of them or of save_to_disk, or a dataset's hub name"
)
CHAT = ("system", "tools")
KINDS: Kinds = {  # the first match wins
    ("messages",): CHAT, ("conversations",): CHAT, ("prompt", "completion"): CHAT,
    ("instruction", "output"): ("input", "history", *CHAT), ("text",): (),
}  # fmt: skip
SPLITS = {  # split: the words for it in a file's name
    "train": "train(ing)?",
    "validation": "val(id(ation)?)?|dev|eval(uation)?|h[eo]ld.?out",
    "test": "test(ing)?",
}
WANTED = {"training": ("train", ""), "evaluation": ("validation", "test", "")}  # "": no split named
ARROW_ROWS = 1000  # that are Python objects at a time
FIRST_ROWS = 100  # of each file, whose columns are those of a source that is streamed


@dataclass(frozen=True)
class Chosen:
    """What a user named of a source; empty for what is read by default."""

    config: str = ""
    split_name: str = ""
    streaming: bool = False  # nothing is read to the end, or downloaded, to know its columns


ANY = Chosen()


@dataclass(frozen=True)
class Part:
    """A file, or a split of a dataset."""

    name: str
    columns: Sequence[str]
    size: int  # rows; of a source that is streamed, those that were looked at
    rows: Callable[[Sequence[str]], Iterable[Record]]  # anew at each call; Arrow: these columns
    classes: Mapping[str, Sequence[str]]  # names of the classes in ClassLabel columns
    file: Path | None = None  # a text file
    fingerprint: str = ""  # of a data set's contents


@dataclass(frozen=True)
class Records:
    """Records of one kind, as dictionaries of `columns`; each pass reads the files anew."""

    parts: Sequence[Part]
    kind: Kind
    columns: Sequence[str]  # that are used: those of the kind, and optional ones
    limit: int | None
    notes: tuple[str, ...] = ()  # what was left out: files, columns

    def __iter__(self) -> Iterator[Record]:
        return (record for _, record in self.numbered())

    def numbered(self) -> Iterator[tuple[str, Record]]:
        """Records with their row's number: `3`, or `3 of b.jsonl` of several. Blank lines of .txt
        files are left out; any other blank row is counted where it is encoded."""
        rows = (
            (f"{number} of {part.name}" if len(self.parts) > 1 else str(number), row)
            for part in self.parts
            for number, row in enumerate(part.rows(self.columns), start=1)
            if not (part.file and data_ending(part.file) == ".txt") or row["text"].strip()
        )
        for number, row in islice(rows, self.limit):
            yield number, {column: row.get(column) for column in self.columns}

    def place(self, number: str) -> str:
        """`row 3`, with its line in a .jsonl file that has empty ones before it."""
        count, _, name = number.partition(" of ")
        part = next((p for p in self.parts if p.name == name or not name), None)
        if part and part.file and data_ending(part.file) == ".jsonl":
            filled = (n for n, line in enumerate(text_lines(part.file), start=1) if line.strip())
            line = next(islice(filled, int(count) - 1, None), int(count))
            return f"row {number}" + f" (line {line})" * (line != int(count))
        return f"row {number}"


def load_records(
    source: str,
    kinds: Kinds = KINDS,
    *,
    split: str = "training",
    limit: int | None = None,
    chosen: Chosen = ANY,
) -> Records:
    """Records of a file, of a folder (data files, or save_to_disk's), or of the hub.

    Args:
        kinds: the columns of each kind of record that the task accepts.
        split: "training" or "evaluation": what to read of a source with several splits.
        limit: the number of records to return at most.
        chosen: the configuration and the split that the user named.

    Raises:
        UserError: the source cannot be read, is empty, or has no such split or kind of record.
    """
    parts, notes = _parts(source, split, limit, chosen)
    columns = list(dict.fromkeys(column for part in parts for column in part.columns))
    empty = f"{source} has no rows: add at least one record, or pass another file"
    require(bool(columns), empty)
    kind = kind_of(columns, source, kinds)
    _require_one_kind_of_files(parts, kind, source)
    # later rows of a stream may have optional columns that the first ones lack
    used = [c for c in (*kind, *kinds[kind]) if c in columns or chosen.streaming]
    if unused := [_visible(column) for column in columns if column not in used]:
        notes += (f"{source}: columns that are not used: {some(unused, 12)}",)
    records = Records(parts, kind, used, limit, notes)
    require(next(iter(records), None) is not None, empty)
    present = [other for other in kinds if set(other) <= set(columns)]
    if len(present) > 1:
        first = replace(records, limit=FIRST_ROWS) if chosen.streaming else records
        _require_one_kind(first, present, source)
    return records


def _require_one_kind_of_files(parts: Sequence[Part], kind: Kind, source: str) -> None:
    """Raise if one of several formats lacks columns of the records' kind."""
    others = [part.name for part in parts if not set(kind) <= set(part.columns)]
    if others and len({data_ending(Path(part.name)) for part in parts}) > 1:
        fault = f"{source} has files of several kinds: {some(others)} without {' and '.join(kind)}"
        raise UserError(f"{fault}. Pass the files to train on, or move the others out")


def _require_one_kind(records: Records, kinds: Sequence[Kind], source: str) -> None:
    """Raise if rows lack the first column of the records' kind and are of another of `kinds`."""
    found: dict[Kind, list[str]] = defaultdict(list)
    columns = [column for kind in kinds for column in kind]
    for number, row in replace(records, columns=columns).numbered():
        filled = {column for column in columns if row[column] not in (None, "")}
        others = [kind for kind in kinds if set(kind) <= filled]
        found[others[0] if others and records.kind[0] not in filled else records.kind] += [number]
    if len(found) > 1:
        kinds_found = (f"{' + '.join(kind)} (row {some(rows)})" for kind, rows in found.items())
        fault = f"{source} has rows of several kinds: {'; '.join(kinds_found)}"
        raise UserError(f"{fault}. Put each kind into a file of its own, or convert the rows")


# ---- sources -> parts


def _parts(
    source: str, split: str, limit: int | None, chosen: Chosen
) -> tuple[list[Part], tuple[str, ...]]:
    """The parts of a source that `split` reads, and notes on those left out."""
    from datasets import load_from_disk

    path = Path(source).expanduser()
    if chosen.config and (path.exists() or _names_a_path(source)):
        raise UserError(f"--data-config is for datasets of the hub, {source} is local: drop it")
    if chosen.split_name and path.is_file():
        raise UserError(f"--data-split is for data with several splits, {source} is one: drop it")
    if any((path / file).exists() for file in ("state.json", "dataset_dict.json")):
        saved = _dataset(load_from_disk, str(path), "is not whole")
        return _dataset_parts(saved, source, split, chosen.split_name)
    if path.exists():
        whole = [path], ()
        files, notes = _folder(path, source, split, chosen.split_name) if path.is_dir() else whole
        last = FIRST_ROWS if chosen.streaming else limit
        return [_file_part(file, last, chosen.streaming) for file in files], notes
    if not _names_a_path(source):
        fault = "is no local file or folder, and cannot be loaded from the hub"
        names = [chosen.config] if chosen.config else []
        options: Any = {"split": chosen.split_name} if chosen.split_name else {}
        options |= {"streaming": True} if chosen.streaming else {}
        load = partial(_from_hub, *names, **options)
        return _dataset_parts(_dataset(load, source, fault), source, split, "")
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, siblings)
    raise UserError(f"{source} does not exist: pass {SOURCES}.{hint}")


def _from_hub(*names: str, **options: Any) -> Any:
    """The data set of a name, which comes last, of a configuration and a split if given."""
    import datasets

    *configs, name = names
    return datasets.load_dataset(name, *configs, **options)


def _dataset(load: Callable[[str], Any], source: str, fault: str) -> Any:
    from datasets.exceptions import DatasetsError

    try:
        return load(source)
    except (DatasetsError, ValueError, OSError, KeyError) as error:  # httpx's are OSErrors
        words = str(error.__cause__ or error).split()  # the names to choose from are at the end
        reason = " ".join(words[:100]).rstrip(".") + (" …" if len(words) > 100 else ".")
        reason += " Choose with --data-config." * reason.startswith("Config name is missing")
        raise UserError(f"{source!r} {fault}: {reason} Pass {SOURCES}") from error


def _names_a_path(source: str) -> bool:
    """Whether a missing `source` looks like a path; a hub name is `owner/name`."""
    folder, slash, _ = source.partition("/")
    is_path = source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1
    return is_path or data_ending(Path(source)) in PARTS or bool(slash and Path(folder).is_dir())


def _dataset_parts(
    data: Any, source: str, split: str, named: str
) -> tuple[list[Part], tuple[str, ...]]:
    """One split of a dataset; a dataset without splits is whole, as is one with only `train`."""
    if named and isinstance(data, dict):
        fault = f"{source} has no split {named}, but {', '.join(data)}"
        require(named in data, f"{fault}.{did_you_mean(named, data)}")
        return [dataset_part(named, data[named])], ()
    if not isinstance(data, dict) or list(data) == ["train"]:
        return [dataset_part(source, data["train"] if isinstance(data, dict) else data)], ()
    names, notes = _choose(list(data), source, split, "")
    if len(names) > 1:
        fault = f"{source} has several splits for {split}: {', '.join(names)}"
        raise UserError(
            f"{fault}. Choose one with --data-split, or save it with to_json and pass that"
        )
    return [dataset_part(names[0], data[names[0]])], notes


def _folder(path: Path, source: str, split: str, named: str) -> tuple[list[Path], tuple[str, ...]]:
    """The files of a folder and its subfolders that `split` reads, of one or several formats. Text
    files beside others are documentation."""
    every = (p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file())
    visible = [p for p in every if not any(part.startswith((".", "__")) for part in p.parts)]
    data = [p for p in visible if data_ending(p) in PARTS and not p.match("dataset_info*.json")]
    known = [p.as_posix() for p in data]
    names, notes = _choose(known, source, split, named) if known else ([], ())
    if not names:
        endings = sorted({data_ending(name) for name in visible} - {""})
        fault = f"{path} must contain data files ({ENDINGS}), got {' and '.join(endings) or 'none'}"
        raise UserError(f"{fault}: pass another folder, or a file")
    is_text = {name: data_ending(Path(name)) == ".txt" for name in names}
    if any(is_text.values()) and not all(is_text.values()):
        texts, names = ([n for n in names if is_text[n] is wanted] for wanted in (True, False))
        notes += (f"{source}: leaves out {some(texts, 8)}, text files beside others",)
    return [path / name for name in names], notes


def _choose(
    names: Sequence[str], source: str, split: str, named: str
) -> tuple[Sequence[str], tuple[str, ...]]:
    """Those of `names`, of files or splits, that `split` reads, and a note that tells the others.
    `named` is the split that the user named, of a word in the names, or empty.

    Files without the name of a split are read where no file has the right one: those in subfolders
    where there are no others.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_split_in(name)].append(name)
    groups[""] = [name for name in groups[""] if "/" not in name] or groups[""]
    listed = [f"{s or 'no split'}: {some(group)}" for s, group in groups.items() if group]
    wanted = next((name for name in WANTED[split] if groups[name]), None)
    if named:
        wanted, groups[named] = named, _named(names, named)
    if wanted is None or not groups[wanted]:
        what = f"split {named}" if named else f"data for {split}"
        fault = f"{source} has no {what}, but {'; '.join(listed)}"
        raise UserError(f"{fault}. Pass the one to read, or name one of them {WANTED[split][0]}")
    read = groups.pop(wanted)
    if len(read) == len(names):
        return read, ()
    others = [name for name in names if name not in read]
    return read, (f"{source}: for {split}, reads {some(read)}; leaves out {some(others, 8)}",)


def _named(names: Sequence[str], split: str) -> list[str]:
    """The files of a split: of that name, in a folder of it, or with the word for it."""
    words = {name: (Path(name).name.partition(".")[0], *Path(name).parts[:-1]) for name in names}
    exact = [name for name in names if split in words[name]]
    return exact or [name for name in names if _split_in(name) == split]


def _split_in(name: str) -> str:
    """The split that a file's name has a word for, or else its folder's; "" without one."""
    file, *folders = reversed(re.sub("(?<=[a-z])(?=[A-Z])", "-", name).lower().split("/"))
    for part in (re.sub(r"(\.(gz|zst))?$", "", file).rpartition(".")[0] or file, *folders):
        found = {
            match.start(): split
            for split, words in SPLITS.items()
            if (match := re.search(rf"(?<![a-z])({words})(set|data)?(?![a-z])", part))
        }
        if found:
            return found[min(found)]
    return ""


def _file_part(file: Path, limit: int | None, streaming: bool = False) -> Part:
    ending = data_ending(file)
    if ending not in PARTS:
        hint = did_you_mean(file.suffix, PARTS)
        raise UserError(f"{file} is not a {ENDINGS} file: convert it, to .jsonl for example.{hint}")
    with _readable(file):
        return (STREAMED if streaming else PARTS)[ending](file, limit)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Name the file in what Arrow and `datasets` raise for a damaged one."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, MemoryError, TypeError, LookupError, AttributeError) as error:
        fault = f"{file} cannot be read as {data_ending(file)[1:]}: {first_line(error)}"
        raise UserError(f"{fault} Fix the file, or save it as .jsonl") from error


# ---- files -> rows


def _row_part(read: Callable[[Path], Iterator[Record]], file: Path, limit: int | None) -> Part:
    columns: dict[str, int] = {}  # and the number of the last row that has it
    for number, row in enumerate(islice(read(file), limit), start=1):
        columns |= dict.fromkeys(row, number)
    size = max(columns.values(), default=0)
    return Part(file.name, tuple(columns), size, lambda _: read(file), {}, file)


def _parquet_part(file: Path, limit: int | None) -> Part:
    from datasets import Features
    from pyarrow import parquet

    with parquet.ParquetFile(file) as head:
        features, size = Features.from_arrow_schema(head.schema_arrow), head.metadata.num_rows

    def rows(columns: Sequence[str]) -> Iterator[Record]:
        with _readable(file), parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(ARROW_ROWS, columns=columns):
                yield from map(features.decode_example, batch.to_pylist())

    return _arrow_part(file.name, features, size, rows)


def dataset_part(name: str, data: "Dataset | IterableDataset") -> Part:
    """A dataset without splits, which may have the format of torch, or be streamed."""
    from datasets import Dataset

    if not isinstance(data, Dataset):
        return _stream_part(name, data)
    read = data.with_format(None).select_columns
    return replace(_arrow_part(name, data.features, len(data), read), fingerprint=data._fingerprint)


def _stream_part(name: str, data: "IterableDataset") -> Part:
    """A dataset that is streamed; what its rows have is not known before they are read."""
    first = list(islice(data, FIRST_ROWS))
    columns = dict.fromkeys(column for row in first for column in row)
    features = data.features or {}

    def rows(names: Sequence[str]) -> Iterator[Record]:
        return (_as_json({n: row.get(n) for n in names}, features) for row in data)

    return Part(name, tuple(columns), len(first), rows, {})


def _arrow_part(
    name: str, features: "Features", size: int, read: Callable[[list[str]], Iterable[Record]]
) -> Part:
    """`read` with the columns that exist, and values as JSON has them."""
    from datasets import ClassLabel

    inner = {column: getattr(item, "feature", item) for column, item in features.items()}
    classes = {column: x.names for column, x in inner.items() if isinstance(x, ClassLabel)}

    def rows(columns: Sequence[str]) -> Iterable[Record]:
        used = [column for column in columns if column in features]
        for column in used:
            media = _media_in(features[column])
            fault = f"{name}: column {column} holds {media}, which may be of any path or address"
            require(not media, f"{fault}: leave it out, or write its text")
        return (_as_json(row, features) for row in read(used))

    return Part(name, tuple(features), size, rows, classes)


def _media_in(feature: Any) -> str:
    """The type of images, sounds and other files within a feature; `datasets` opens these."""
    if isinstance(feature, Mapping):
        return next(filter(None, map(_media_in, feature.values())), "")
    if hasattr(feature, "feature"):
        return _media_in(feature.feature)
    kind = type(feature).__name__
    return kind if hasattr(feature, "decode_example") and kind != "Json" else ""


def _as_json(value: Any, feature: Any) -> Any:
    """A value without None, which Arrow has for the keys of other rows, and with float32 as 0.1."""
    if isinstance(value, Mapping):
        inner = feature if isinstance(feature, Mapping) else {}
        return {k: _as_json(x, inner.get(k)) for k, x in value.items() if x is not None}
    if isinstance(value, list):
        return [_as_json(item, getattr(feature, "feature", None)) for item in value]
    if isinstance(value, datetime):  # `datasets` makes them of strings in JSON files
        raise UserError(f"{value} is a timestamp: cast it to a string, or give its JSON file")
    if (dtype := getattr(feature, "dtype", "")) in ("float16", "float32"):
        return Written(str(np.dtype(dtype).type(value)))
    return value if isinstance(value, str | int | float | bytes | None) else str(value)  # a date


READERS = {".jsonl": json_rows, ".json": json_rows, ".csv": csv_rows, ".txt": text_rows}
PARTS: dict[str, Callable[[Path, int | None], Part]] = {".parquet": _parquet_part}
PARTS |= {ending: partial(_row_part, read) for ending, read in READERS.items()}
STREAMED = PARTS | {".csv": partial(_row_part, cell_rows)}


# ---- columns and cells


def kind_of(
    columns: Iterable[str], source: str = "the record", kinds: Iterable[Kind] = KINDS
) -> Kind:
    """The first of `kinds` whose columns are all in `columns`."""
    columns = list(columns)
    for kind in kinds:
        if set(kind) <= set(columns):
            return kind
    expected = "; ".join(" + ".join(kind) for kind in kinds)
    known = [column for kind in kinds for column in kind]
    missing = [column for column in known if column not in columns]
    hints = (did_you_mean(column, missing) for column in columns if column not in known)
    shown = ", ".join(map(_visible, columns))
    fault = f"{source} has the columns {shown}; expected one of: {expected}."
    raise UserError(f"{fault} Rename them.{next(filter(None, hints), '')}")


def _visible(column: str) -> str:
    """The name of a column, in quotes where white space in it would not be seen."""
    return column if column.split() == [column] else repr(column)


def string_of(value: Any, name: str = "the value") -> str:
    """A cell as the text that JSON has for it, empty if it is missing; a list or object raises."""
    if value is None or value != value:  # NaN, of a .parquet file
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple | Mapping | bytes):
        kind = "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"
        fault = f"{name} must be text, got {kind}, {str(value)[:60]!r}"
        raise UserError(f"{fault}: write it as one string")
    return str(value)
