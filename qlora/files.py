"""The small files that a run and a merge leave, and how files appear whole or not at all.

metrics.jsonl and samples.jsonl hold a JSON object per line. Nothing heavy is imported here, so that
the report starts at once.
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

import yaml

from qlora.errors import UserError

RUN = "run.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
MERGE_REPORT = "merge_report.json"


# ---- read ----


def read_json(path: Path, *, mend: str = "") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: the file cannot be read or holds anything else; `mend` says how to mend it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. {mend}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON object: {error}. {mend}") from error
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise UserError(f"{path} is no JSON object: it holds a {kind}. {mend}")
    return values


class AsWritten(yaml.BaseLoader):
    """YAML whose scalars stay text; a key may be set once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value).replace("-", "_") for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(problem=f"{twice[0]} is set twice")
        return super().construct_mapping(node, deep)


class Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(where: str, text: str, loader: Any = Loader) -> Any:
    """The value of a YAML text, or a UserError that says `where` it stands."""
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line} is not YAML: {getattr(error, 'problem', error)}") from None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows that a run has logged; none before the first."""
    return read_rows(folder / METRICS, ("step",))


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The answers of a run's model before and after training; none where none were asked."""
    return read_rows(folder / SAMPLES, ("prompt", "wanted", "before", "after"))


def read_rows(path: Path, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a file; none where there is no file.

    Raises:
        UserError: a line is no JSON object, as the last one of a run that was killed while it
            wrote, or lacks one of `keys`.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    rows = []
    # not splitlines: JSON leaves other line ends inside a text as they are
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            fault = f"a JSON object is wanted, got {line[:40]!r}, which is cut short or damaged"
        else:
            fault = ", ".join(key for key in keys if key not in row)
            fault = f"it has no {fault}" if fault else ""
        if fault:
            raise UserError(f"{path}, line {number}: {fault}: remove that line")
        rows.append(row)
    return rows


# ---- write ----


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """`with replacing(path) as [partial]`: files that appear whole or not at all.

    Each partial file lies beside its `path` and is renamed to it when the block ends, all of them
    after the last was written. They are removed when the block fails.
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
    """Write a text file that appears whole or not at all."""
    with replacing(path) as [partial]:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """`with publishing(folder) as partial`: a folder that appears whole or not at all.

    Files are written into a neighbour of `folder`, which takes its name when the block ends and is
    removed when it fails. `folder` must not exist, or be empty. What a killed run left is removed.
    """
    require_new(folder)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        if not _is_another_process(left.name.rpartition("-")[2]):
            shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_another_process(pid: str) -> bool:
    if not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # another user's
    return True


def require_new(folder: Path) -> None:
    """Refuse a folder that holds something, or that cannot be created."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already holds something: give a new folder, or remove it")
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{folder} cannot be made: {parent} is no folder that can be written to")


def front_matter(base_model: str, *lines: str) -> str:
    """The head of a model card, which the hub reads; of the last two `lines` it makes tags.

    A base that is a local folder has no name on the hub and is left out.
    """
    *settings, first, second = lines
    path = Path(base_model).expanduser()
    if not path.is_absolute() and not path.exists():
        settings.insert(0, f"base_model: {base_model}")
    return "\n".join(["---", *settings, "tags:", f"- {first}", f"- {second}", "---", ""])
