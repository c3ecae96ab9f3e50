"""JSON-lines and JSON files, and atomic writes."""

import json

import pytest

from qlora.errors import UserError
from qlora.files import read_json, read_rows, replace_text, replacing


def test_rows_are_read_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    rows = [{"text": "a\u2028b\x85c\nd"}, {"loss": float("inf")}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    ("line", "fault"),
    [(line, "wanted a JSON object") for line in ('{"step": 3, "lo', "[1]", "\x00\x00")]
    + [('{"a": 1}', "it has no b, c")],
)
def test_a_damaged_line_is_named(line, fault, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1, "b": 2, "c": null}\n\n' + line)
    with pytest.raises(UserError, match=rf"rows.jsonl, line 3: {fault}.*: remove that line"):
        read_rows(path, ("a", "b", "c"))


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
