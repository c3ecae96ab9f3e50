"""Files of data -> rows, one at a time: JSON, JSON lines, CSV and text, also compressed."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

from qlora.errors import UserError

EXPECTED_JSON = "expected one JSON object per line (or, in .json, a list of them)"
COMPRESSED = (".gz", ".zst")
LONGEST_LINE = 64 << 20  # bytes; a small .gz may hold terabytes in one line
LONGEST_JSON = 1 << 30  # bytes of a compressed .json file, which is read whole
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # of an escaped emoji, or alone

csv.field_size_limit(LONGEST_LINE)


class Written(float):
    """A number that prints as its file writes it: 1.10, not 1.1."""

    text: str

    def __new__(cls, text: str) -> "Written":
        """The number of `text`."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __repr__(self) -> str:
        return self.text


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON number, write null or a string")


class _Decoder(json.JSONDecoder):
    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        try:
            return super().raw_decode(s, idx)
        except RecursionError:
            raise json.JSONDecodeError("nested too deep", s, idx) from None


JSON = _Decoder(parse_float=Written, parse_constant=_not_json)


def data_ending(file: Path) -> str:
    """The ending of a file's name in lower case, without that of its compression."""
    ending = file.suffix.lower()
    inner = Path(file.stem).suffix.lower()
    return (
        inner if ending in COMPRESSED and inner in (".jsonl", ".json", ".csv", ".txt") else ending
    )


def _opened(file: Path) -> Any:
    """A file's bytes, decompressed."""
    ending = file.suffix.lower()
    if ending == ".zst":  # Python has it since 3.14; Arrow, which `datasets` brings, has it too
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(str(file), "zstd"))
    return gzip.open(file) if ending == ".gz" else file.open("rb")


def _lines(file: Path) -> Generator[bytes, None, None]:
    longest = LONGEST_LINE
    if data_ending(file) == ".json":
        longest = LONGEST_JSON if file.suffix.lower() in COMPRESSED else file.stat().st_size
    with _opened(file) as lines:
        try:
            for number in count(1):
                if not (line := lines.readline(longest + 1)):
                    return
                if len(line) > longest:
                    fault = f"{file}, line {number} is longer than {longest >> 20} MiB"
                    raise UserError(f"{fault}: make shorter rows of it, or a .json list")
                yield line
        except (OSError, EOFError, zlib.error) as error:
            fault = f"{file} is cut short, or not compressed as {file.suffix} ({error})"
            raise UserError(f"{fault}: copy it again, or decompress it") from error


def text_lines(file: Path) -> Iterator[str]:
    """The lines of a text file with their ends, also of a .gz or .zst; raises for encodings other
    than UTF-8."""
    with closing(_lines(file)) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                fault = f"{file}, line {number} is not UTF-8: save the file as UTF-8"
                raise UserError(fault) from error
            yield text


def json_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON file: one per line, or in .json one after the other or in a list."""
    filled = ((n, line) for n, line in enumerate(text_lines(file), start=1) if line.strip())
    for index, (number, line) in enumerate(filled):
        if data_ending(file) == ".json" or (index == 0 and line.lstrip().startswith("[")):
            yield from _objects("".join(text_lines(file)), file)
            return
        yield from _objects(line, file, number)


def _objects(text: str, file: Path, line: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects in a line of a file or, in or without a list, in all of it; raises for others."""
    fault = partial(json.JSONDecodeError, doc=text)
    at = start = _skip(text, 0)
    try:
        if in_list := line is None and text.startswith("[", at):
            at = _skip(text, at + 1)
        while at < len(text) and not (in_list and text[at] == "]"):
            start = at
            value, at = JSON.raw_decode(text, at)
            if not isinstance(value, dict):
                kind = "null" if value is None else f"a {type(value).__name__}"
                raise fault(f"got {kind}, not an object", pos=start)
            if HALF_PAIR.search(text, start, at):
                json.dumps(value, ensure_ascii=False).encode()  # raises if one half is missing
            yield value
            at = _skip(text, at)
            if in_list and text[at : at + 1] not in (",", "]"):
                raise fault("Expecting ',' delimiter", pos=at)
            at = _skip(text, at + 1) if in_list and text[at] == "," else at
        if in_list and (at == len(text) or _skip(text, at + 1) < len(text)):
            raise fault("expected the end of the list, and nothing after it", pos=at)
    except ValueError as error:
        place = min(getattr(error, "pos", start), len(text.rstrip()))
        number = (line or 1) + text.count("\n", 0, place)
        problem = f"line {number}: {getattr(error, 'msg', None) or error}"
        raise UserError(f"{file}, {problem}: {EXPECTED_JSON}") from error


def _skip(text: str, at: int) -> int:
    """The index of the first character from `at` on that is not white space."""
    while text[at : at + 1].isspace():
        at += 1
    return at


def text_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, each as the `text` of a row."""
    return ({"text": line.rstrip("\r\n")} for line in text_lines(file))


def csv_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .csv file with a header; None for empty cells.

    Cells are text, except in columns that have only numbers, such as a classifier's labels.
    """
    texts: set[str] = set()  # columns
    for row in cell_rows(file):
        texts |= {name for name in row.keys() - texts if isinstance(_number_in(row[name]), str)}
        if len(texts) == len(row):
            break
    for row in cell_rows(file):
        yield {name: cell if name in texts else _number_in(cell) for name, cell in row.items()}


def cell_rows(file: Path) -> Iterator[dict[str, str | None]]:
    """The rows of a .csv file as text, without reading it to the end first."""
    reader = csv.reader(text_lines(file), strict=True)
    try:
        header = next((cells for cells in reader if cells), [])
        names = [name for name in header if name]
        if len(set(names)) < len(names):
            raise csv.Error("two columns have one name")
        for cells in reader:
            if len(cells) > len(header):
                raise csv.Error(f"{len(cells)} cells for {len(header)} columns")
            if cells:
                yield {name: cell or None for name, cell in zip_longest(header, cells)}
    except csv.Error as error:
        fault = f"{file} cannot be read as csv: line {reader.line_num}: {error}"
        raise UserError(f"{fault}. Fix the file, or save it as .jsonl") from error


def _number_in(cell: str | None) -> Any:
    """The number that prints as the cell does, or else the cell."""
    with suppress(ValueError):
        value = JSON.decode(cell or "")
        if type(value) in (int, Written) and str(value) == cell:
            return value
    return cell
