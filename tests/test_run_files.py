"""JSON-lines and JSON files, and atomic writes."""

import errno
import json
import os
import platform
import subprocess
import sys
from unittest.mock import Mock

import psutil
import pytest

from qlora import files
from qlora.errors import UserError
from qlora.files import locked, read_json, read_rows, replace_text, replacing


def test_rows_are_read_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    rows = [{"text": "a\u2028b\x85c\nd"}, {"loss": float("inf")}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    ("line", "fault"),
    [(line, "wanted a JSON object") for line in ('{"step": 3, "lo', "[1]", "\x00\x00")]
    + [
        ('{"a": 1}', "it has no b, c"),
        ('{"a": 1e999, "b": 2, "c": 3}', "a must be a whole number, got inf"),
        ("[" * 100_000, "wanted a JSON object"),
    ],
)
def test_a_damaged_line_is_named(line, fault, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1, "b": 2, "c": null}\n\n' + line)
    with pytest.raises(UserError, match=rf"rows.jsonl, line 3: {fault}.*: remove that line"):
        read_rows(path, {"a": int, "b": int, "c": None | int})


@pytest.mark.parametrize(
    ("text", "got"),
    [("{", "Expecting"), ("[1]", "a list"), ("\x00", "Expecting"), (None, "No such")],
)
def test_a_file_without_a_json_object_is_named(text, got, tmp_path):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"config\.json .*{got}.* Save it again$"):
        read_json(path, fix="Save it again")
    path.write_text('{"r": 8}')
    assert read_json(path) == {"r": 8}


def test_files_are_replaced_together_or_not_at_all(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    replace_text(one, "older")
    replace_text(one, "old")
    with pytest.raises(ZeroDivisionError), replacing(one, two) as partials:
        partials[0].write_text("new")
        raise ZeroDivisionError
    assert one.read_text() == "old" and [*tmp_path.iterdir()] == [one]
    with replacing(one, two) as partials:
        for partial in partials:
            partial.write_text("new")
    assert one.read_text() == two.read_text() == "new" and len([*tmp_path.iterdir()]) == 2


HOLDS = """import sys, pathlib, qlora.files
with qlora.files.locked(pathlib.Path(sys.argv[1])):
    input(print())
"""


def test_a_second_process_is_told_and_a_dead_ones_lock_is_taken_over(tmp_path):
    command, pipe = [sys.executable, "-c", HOLDS, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None and other.stdout.readline()
        words = rf"in use by another run, process {other.pid} on {platform.node()}: wait"
        with pytest.raises(UserError, match=words), locked(tmp_path):
            pass
        other.kill()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == other.pid
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "process 1 on .*: wait for its end"),
        ({"host": "else"}, "process 1 on else: if that process has ended, remove .*lock; else"),
        ({"pid": 1 << 22}, None),
        ({"started": 1.0}, None),  # another process of that number
        ({"pid": "damaged"}, None),
    ],
)
def test_a_file_system_without_locks_has_those_of_the_file(changes, words, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CLAIM_SECONDS", 0.0)
    flock = Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr(files, "fcntl", Mock(flock=flock, LOCK_EX=2, LOCK_NB=4))
    owner = {"pid": 1, "host": platform.node(), "started": psutil.Process(1).create_time()}
    (tmp_path / ".lock").write_text(json.dumps(owner | changes))
    if words:
        with pytest.raises(UserError, match=words), locked(tmp_path):
            pass
    else:
        with locked(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        assert not (tmp_path / ".lock").exists()


def test_of_two_processes_that_begin_at_once_the_last_to_write_the_lock_goes_on(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "fcntl", None)
    other = {"pid": 7, "host": "else", "started": 1.0}
    path = tmp_path / ".lock"
    monkeypatch.setattr(files.time, "sleep", lambda _: path.write_text(json.dumps(other)))
    with pytest.raises(UserError, match="in use by another run, process 7"), locked(tmp_path):
        pass
    assert json.loads(path.read_text()) == other
