"""Read JSON, JSON lines and YAML files; write files and folders atomically.

metrics.jsonl and samples.jsonl hold a JSON object per line. Heavy packages are not imported here.
"""

import glob
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from qlora.errors import UserError

RUN = "run.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
MERGE_REPORT = "merge_report.json"


def read_json(path: Path, *, fix: str = "") -> dict[str, Any]:
    """The JSON object in a file; the UserError for anything else ends with `fix`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. {fix}") from error
    except ValueError as error:
        raise UserError(f"{path} is not a JSON object: {error}. {fix}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object: got a {type(values).__name__}. {fix}")
    return values


class AsWritten(yaml.BaseLoader):
    """Loads YAML with all scalars as text; refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value).replace("-", "_") for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(problem=f"{twice[0]} is set twice")
        return super().construct_mapping(node, deep)


class Loader(yaml.SafeLoader):
    """Loads YAML, with 1e-4 as a number."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(where: str, text: str, loader: Any = Loader) -> Any:
    """The value of a YAML text; a UserError names `where` it is from."""
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line} is not YAML: {getattr(error, 'problem', error)}") from None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The logged rows of a run; empty if there are none yet."""
    return read_rows(folder / METRICS, ("step",))


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Sample answers of a run, before and after training; empty if there are none."""
    return read_rows(folder / SAMPLES, ("prompt", "wanted", "before", "after"))


def read_rows(path: Path, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, none without one; UserError for a line cut short."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    rows = []
    # not splitlines: a JSON text may contain other line separators, such as U+2028
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            fault = f"wanted a JSON object, got {line[:40]!r}, which is cut short or damaged"
        elif missing := ", ".join(key for key in keys if key not in row):
            fault = f"it has no {missing}"
        else:
            rows.append(row)
            continue
        raise UserError(f"{path}, line {number}: {fault}: remove that line")
    return rows


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """`with replacing(path) as [partial]`: write files atomically.

    A partial file is beside its `path`, and renamed when the block ends, or removed if it raises.
    """
    partials = [path.with_name(f".{path.name}.partial") for path in paths]
    try:
        yield partials
        for partial, path in zip(partials, paths, strict=True):
            os.replace(partial, path)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as [partial]:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """`with publishing(folder) as partial`: write a folder atomically.

    The partial folder is beside `folder`, which must not exist, or be empty. It is renamed when the
    block ends, and removed if the block raises, as are partial folders of killed runs.
    """
    require_new(folder)
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        pid = leftover.name.rpartition("-")[2]
        if not pid.isdecimal() or int(pid) == os.getpid() or not psutil.pid_exists(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_new(folder: Path) -> None:
    """Refuse a folder that is not empty, or that cannot be created."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already holds something: give a new folder, or remove it")
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{folder} cannot be created: {parent} is not a writable folder")


def front_matter(base_model: str, library: str, *tags: str) -> str:
    """The YAML head of a model card, for the hub. A base in a local folder is left out."""
    path = Path(base_model).expanduser()
    is_local = path.is_absolute() or path.exists()
    lines = [] if is_local else [f"base_model: {base_model}"]
    lines += [f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---", ""])
