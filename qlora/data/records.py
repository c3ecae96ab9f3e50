"""Files and hub data sets -> records -> chat messages.

The columns of a record determine its kind, the first match of: `messages` (roles system, user,
assistant, tool), ShareGPT `conversations`, `prompt` + `completion` (strings or lists of messages),
Alpaca `instruction` + `input` + `output`, and `text`. `datasets` reads the files; errors name the
file and the line.

Left out: images and sound in messages, weights per message.
Sources: Alpaca (tatsu-lab/stanford_alpaca), ShareGPT as LLaMA-Factory and axolotl read it.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from datasets.utils import logging as datasets_logging

from qlora.errors import UserError, did_you_mean, first_line

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
ENDINGS = " ".join(LOADERS)
KINDS = (  # the columns of each kind of record; the first match wins
    ("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"),
    ("text",),
)  # fmt: skip
TEXTS = (  # columns that a .csv file keeps as they are written
    "prompt", "completion", "instruction", "input", "output", "target", "text", "text_pair",
    "system",
)  # fmt: skip
ROLES = {"system": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "function_call"), "assistant")
ROLES |= dict.fromkeys(("tool", "observation", "function_response"), "tool")
EXPECTED_JSON = "expected one JSON object per line (or, in .json, a list of them)"


def load_records(
    source: str, kinds: Sequence[tuple[str, ...]] = KINDS, *, limit: int | None = None
) -> Dataset:
    """Records of a local file, of a folder of files of one kind, or of a hub dataset's train split.

    A local file is read again at each call, past datasets' cache, and leaves nothing on disk.
    Blank rows of `text` are skipped. `kinds` are the columns of each kind of record that the task
    accepts; `limit` is the number of records to return at most.
    """
    path = Path(source).expanduser()
    if path.exists():
        records = _load_files(path, source)
    elif _names_a_path(source):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"{source} does not exist: pass a {ENDINGS} file, a folder of them, or a dataset's hub "
            f"name.{did_you_mean(path.name, siblings)}"
        )
    else:
        try:
            records = load_dataset(source, split="train")
        except (DatasetsError, ValueError, OSError) as error:  # the hub's, httpx's are OSErrors
            raise UserError(
                f"{source!r} is no local file or folder, and cannot be loaded from the hub: "
                f"{first_line(error)} Pass a {ENDINGS} file, a folder of them, or the hub name of "
                "a dataset with a train split"
            ) from error
    if records and kind_of(records.column_names, source, kinds) == ("text",):
        filled = [i for i, text in enumerate(records["text"]) if string_of(text).strip()]
        records = records.select(filled)
    if not records:
        raise UserError(f"{source} has no rows: add at least one record, or pass another file")
    return records if limit is None else records.select(range(min(limit, len(records))))


def _names_a_path(source: str) -> bool:
    """Whether a missing `source` looks like a path; a hub name is `owner/name`."""
    folder, slash, _ = source.partition("/")
    return (
        source.startswith((".", "/", "~"))
        or "\\" in source
        or source.count("/") > 1
        or Path(source).suffix.lower() in LOADERS
        or bool(slash and Path(folder).is_dir())
    )


def _load_files(path: Path, source: str) -> Dataset | None:
    """Records of a file, or of a folder's files, which must be of one kind; None if it has none."""
    files = [path]
    if path.is_dir():
        known = (p for p in path.iterdir() if p.suffix.lower() in LOADERS)
        files = sorted(p for p in known if not p.name.startswith("."))
    endings = sorted({p.suffix.lower() for p in files})
    kinds = {LOADERS.get(ending) for ending in endings}
    if len(kinds) != 1:
        raise UserError(
            f"{path} must contain data files of one kind ({ENDINGS}), got "
            f"{' and '.join(endings) or 'none'}: pass one of its files, or move the others out"
        )
    kind = kinds.pop()
    if kind is None:
        hint = did_you_mean(path.suffix, LOADERS)
        raise UserError(f"{path} is not a {ENDINGS} file: convert it, to .jsonl for example.{hint}")
    if kind != "parquet" and not _have_text(files):
        return None
    options: dict[str, Any] = {"split": "train", "keep_in_memory": True}
    if kind == "csv":
        # pandas would read the answers "None" and "N/A" as missing, and "007" and "1.50" as numbers
        options |= {"keep_default_na": False, "converters": dict.fromkeys(TEXTS, str)}
    data_files, verbosity = [str(file) for file in files], datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)  # the error below explains it
    try:
        # datasets identifies a file by name and mtime: its cache would return an edited file's old
        # content
        with tempfile.TemporaryDirectory() as cache:
            records = load_dataset(kind, data_files=data_files, cache_dir=cache, **options)
    except (DatasetsError, ValueError, OSError, StopIteration) as error:
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            return None
        for file in files if kind == "json" else ():
            _json_rows(file)  # names the file and the line, which datasets' message lacks
        reason = first_line(error.__cause__ or error)
        fault = f"{source} cannot be read as {kind}: {reason} Fix the file, or save it as .jsonl"
        raise UserError(fault) from error
    finally:
        datasets_logging.set_verbosity(verbosity)
    return _restore_dates(records, files) if kind == "json" else records


def _have_text(files: Sequence[Path]) -> bool:
    """Whether a file is not blank; raises for encodings other than UTF-8: datasets accepts them."""
    filled = False
    for file in files:
        with file.open("rb") as lines:  # line by line: a file may not fit into memory
            for number, line in enumerate(lines, start=1):
                try:
                    filled |= bool(line.decode().strip())
                except UnicodeDecodeError as error:
                    fault = f"{file}, line {number} is not UTF-8: save the file as UTF-8"
                    raise UserError(fault) from error
    return filled


def _restore_dates(records: Dataset, files: Sequence[Path]) -> Dataset:
    """Restore the text of columns of dates: datasets reads "2024-05-01" as a timestamp, and the
    model would be trained on "2024-05-01 00:00:00"."""
    types = {name: getattr(value, "dtype", "") for name, value in records.features.items()}
    dates = [name for name, dtype in types.items() if dtype.startswith("timestamp")]
    rows = [row for file in files for row in _json_rows(file)] if dates else []
    for name in dates:
        written = [row.get(name) for row in rows]
        records = records.remove_columns(name).add_column(name, written)
    return records


def _json_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON file, one per line or in a list; raises for any other value."""
    text = file.read_text("utf-8-sig")
    is_list = text.lstrip().startswith("[")
    rows: list[Any] = []
    for number, part in enumerate([text] if is_list else text.split("\n"), start=1):
        if part.strip():
            try:
                values = json.loads(part) if is_list else [json.loads(part)]
            except json.JSONDecodeError as error:
                problem = f"line {number + error.lineno - 1}: {error.msg}"
                raise UserError(f"{file}, {problem}: {EXPECTED_JSON}") from error
            if odd := [type(row).__name__ for row in values if not isinstance(row, dict)]:
                problem = f"line {number}: got a {odd[0]}, not an object"
                raise UserError(f"{file}, {problem}: {EXPECTED_JSON}")
            rows += values
    return rows


# ---- records -> messages


@dataclass(frozen=True)
class Chat:
    """A record as messages for a chat template."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    first: int  # index of the first message that may have loss; those before it are a `prompt`


def kind_of(
    columns: Iterable[str], source: str = "the record", kinds: Sequence[tuple[str, ...]] = KINDS
) -> tuple[str, ...]:
    """The first of `kinds` whose columns are all in `columns`."""
    columns = list(columns)
    for kind in kinds:
        if set(kind) <= set(columns):
            return kind
    expected = "; ".join(" + ".join(kind) for kind in kinds)
    known = [column for kind in kinds for column in kind]
    missing = [column for column in known if column not in columns]
    hints = (did_you_mean(column, missing) for column in columns if column not in known)
    fault = f"{source} has the columns {', '.join(columns)}; expected one of: {expected}."
    raise UserError(f"{fault} Rename them.{next(filter(None, hints), '')}")


def chat_of(record: Mapping[str, Any]) -> Chat | None:
    """The record as a chat; None for a `text` record."""
    kind, first = kind_of(record), 0
    if kind == ("text",):
        return None
    if kind == ("prompt", "completion"):
        prompt = _messages(record["prompt"], "user", "prompt")
        first = len(prompt)
        messages = prompt + _messages(record["completion"], "assistant", "completion")
    elif kind == ("instruction", "output"):
        parts = (string_of(record["instruction"]), string_of(record.get("input")))
        user = "\n\n".join(part for part in parts if part.strip())
        messages = _messages(user, "user", "") + _messages(record["output"], "assistant", "output")
    else:
        messages = _messages(_parsed(record[kind[0]], kind[0]) or [], None, kind[0])
    system = string_of(record.get("system"))
    if system.strip() and not (messages and messages[0]["role"] == "system"):
        messages, first = [{"role": "system", "content": system}, *messages], first + 1
    return Chat(messages, _without_none(_parsed(record.get("tools"), "tools")) or None, first)


def _messages(value: Any, role: str | None, column: str) -> list[dict[str, Any]]:
    """A list of messages as it is, or text as one message of `role`."""
    if isinstance(value, (list, tuple)):
        return [_message(turn) for turn in value]
    if role is None or isinstance(value, Mapping):
        raise UserError(f"{column} must be a list of messages, got a {type(value).__name__}")
    return [{"role": role, "content": string_of(value)}]


def _message(turn: Any) -> dict[str, Any]:
    """`role` and `content`, also from ShareGPT's from/value; other keys stay for the template."""
    if not isinstance(turn, Mapping):
        raise UserError(f'a message must be {{"role": …, "content": …}}, got {str(turn)[:60]!r}')
    rest: dict[str, Any] = _without_none(turn)
    sender, value = rest.pop("from", None), rest.pop("value", None)
    role, content = rest.pop("role", None) or sender, rest.pop("content", value)
    if role not in ROLES:
        hint = did_you_mean(str(role), ROLES)
        raise UserError(f"unknown role {role!r}, expected one of {', '.join(ROLES)}.{hint}")
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        if any("text" not in part for part in content):
            raise UserError("a message has parts that are not text: only text can be trained on")
        content = "".join(part["text"] for part in content)
    if not all(isinstance(call, Mapping) for call in rest.get("tool_calls", ())):
        raise UserError(f"tool_calls must be a list of calls, got {str(rest['tool_calls'])[:60]!r}")
    return {"role": ROLES[role]} | ({} if content is None else {"content": str(content)}) | rest


def _without_none(value: Any) -> Any:
    """Drop keys whose value is None, at any depth: datasets adds the keys of other rows."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _parsed(value: Any, column: str) -> Any:
    """The value, parsed as JSON if it is a string, as the lists of a .csv file are."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UserError(f"{column} must be a list, or JSON of one, got {value[:60]!r}") from error


def string_of(value: Any) -> str:
    """A cell as text, empty if it is missing."""
    return "" if value is None else str(value)
