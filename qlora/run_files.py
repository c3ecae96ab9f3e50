"""The small files that a run and a merge leave for people, and how they are written and read.

Rows, of metrics.jsonl and samples.jsonl, are lines of JSON. Nothing heavy is imported here, so that
a report is there at once.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora.errors import UserError

RUN = "run.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
MERGE_REPORT = "merge_report.json"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged; nothing where it has not."""
    return read_rows(folder / METRICS, ("step",))


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """What a run's model answered; nothing where it was not asked."""
    return read_rows(folder / SAMPLES, ("prompt", "wanted", "before", "after"))


def read_rows(path: Path, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a file; none where there is no file.

    Raises:
        UserError: a line is no JSON object, as the last of a run that was killed while it wrote, or
            one without one of `keys`.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    rows = []
    # not splitlines: a text may hold other line ends, which JSON leaves as they are
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            row = _object(line)
            if row is None:
                raise UserError(
                    f"{path}, line {number}: a JSON object is wanted, got {line[:40]!r}, which is "
                    "cut short or damaged: remove that line"
                )
            if lacking := [key for key in keys if key not in row]:
                raise UserError(
                    f"{path}, line {number}: it has no {', '.join(lacking)}: remove that line"
                )
            rows.append(row)
    return rows


def _object(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def replace_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that it is never half there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
