"""Files and hub names -> records -> messages."""

import json
import os
from unittest.mock import Mock

import datasets
import pytest
from conftest import write_rows

from qlora.data.records import chat_of, load_records
from qlora.errors import UserError

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
ALPACA = {"instruction": "a", "input": "", "output": "b"}
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
PARTS = [{"type": "text", "text": "a"}]
KINDS = [  # record, its messages
    ({"messages": [{**USER, "name": None, "tool_calls": None}, ANSWER]}, [USER, ANSWER]),
    ({"messages": json.dumps([USER, ANSWER]), "text": "t"}, [USER, ANSWER]),
    ({"messages": [{"role": "user", "content": PARTS}]}, [USER]),
    ({"conversations": SHAREGPT}, [USER, ANSWER]),
    ({"conversations": [USER, ANSWER], "system": "s"}, [SYSTEM, USER, ANSWER]),
    ({"prompt": "a", "completion": "b"}, [USER, ANSWER]),
    ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    (ALPACA, [USER, ANSWER]),
    ({**ALPACA, "input": "c", "system": "s"}, [SYSTEM, {**USER, "content": "a\n\nc"}, ANSWER]),
    ({"instruction": "a", "output": 3}, [USER, {**ANSWER, "content": "3"}]),
]
ROLES = {  # role: the names that it has
    "user": ("human", "user"), "assistant": ("gpt", "bing", "chatgpt", "function_call"),
    "tool": ("tool", "observation", "function_response"), "system": ("system",),
}  # fmt: skip


def test_every_kind_of_record_becomes_messages():
    for record, messages in KINDS:
        assert chat_of(record).messages == messages
    assert chat_of({"text": "a"}) is None
    for role, names in ROLES.items():
        talk = [{"from": name, "value": "a"} for name in names]
        assert chat_of({"conversations": talk}).messages == [{**USER, "role": role}] * len(names)


def test_all_file_kinds_have_the_same_rows(tmp_path):
    rows = [{"prompt": "a", "completion": "None"}, {"prompt": "é, b", "completion": "c\nd"}]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "a.csv")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for kind in ("jsonl", "json", "csv", "parquet"):
        assert load_records(str(tmp_path / f"a.{kind}")).to_list() == rows


def test_dates_and_numbers_are_text_as_they_are_in_the_file(tmp_path):
    first = {"completion": "2024-05-01", "label": "2024-05-01T07:30:00Z"}
    second = {"completion": "1990-07-04"}
    write_rows(tmp_path / "a.jsonl", [first, second])
    (tmp_path / "a.json").write_text(json.dumps([first, second], indent=1))
    for name in ("a.jsonl", "a.json"):
        found = load_records(str(tmp_path / name), [("completion",)])
        assert found.to_list() == [first, {**second, "label": None}]
    (tmp_path / "a.csv").write_text("prompt,completion,label\n1,007,3\n2,1.50,4\n3,1e5,5\n")
    records = load_records(str(tmp_path / "a.csv"), limit=9)
    assert records["completion"][:] == ["007", "1.50", "1e5"]
    assert records["label"][:] == [3, 4, 5]  # of a classifier, a number


def test_folder_of_one_kind_is_read_in_order_of_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write_rows(tmp_path / name, [{"text": name}])
    (tmp_path / "README.md").write_text("no data")
    assert load_records(str(tmp_path))["text"][:] == ["a.jsonl", "b.jsonl"]
    (tmp_path / "c.csv").write_text("text\nx\n")
    with pytest.raises(UserError, match=r"one kind \(.*\), got \.csv and \.jsonl: pass one"):
        load_records(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="got none"):
        load_records(str(tmp_path / "empty"))


def test_edited_file_is_read_again(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "old"}])
    stamp = path.stat()
    assert load_records(str(path))["text"][:] == ["old"]
    write_rows(path, [{"text": "new"}])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # only the content differs
    assert load_records(str(path))["text"][:] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", "x", r"a\.xlsx is not a \.jsonl .* file: convert it"),
        ("a.jsnl", "x", r"Did you mean \.jsonl\?"),
        ("a.jsonl", "", r"a\.jsonl has no rows: add at least one"),
        ("a.jsonl", "\n \n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.csv", "text\n", "has no rows"),
        ("a.jsonl", '{"text": "a"}\n\n{"text" "b"}\n', r"a\.jsonl, line 3: .*: expected one JSON"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', r"a\.jsonl, line 2: got a list, not an object"),
        ("a.json", '[\n{"text": "a"},\n{"text" "b"}]', r"a\.json, line 3: Expecting ':' delimiter"),
        ("a.json", '{"text": "a"}\n{"text": \n', r"a\.json, line 2"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "cannot be read as csv: .*line 3.* Fix the file"),
        ("a.parquet", "x", "cannot be read as parquet: .* Fix the file"),
        ("a.csv", "text\ncaf\xe9\n", r"a\.csv, line 2 is not UTF-8: save the file as UTF-8"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        load_records(str(tmp_path / name))


def test_missing_path_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", [{"text": "a"}])
    for name in ("no.jsonl", "data/train.csv", "./train", "/no/such", "a/b/c"):
        with pytest.raises(UserError, match=rf"{name} does not exist: pass a \.jsonl .* hub name"):
            load_records(name)
    with pytest.raises(UserError, match=r"does not exist: .* Did you mean train\.jsonl\?"):
        load_records("trian.jsonl")


def test_hub_name_that_cannot_be_reached(monkeypatch):
    load_dataset = Mock(side_effect=ConnectionError("Couldn't reach 'a/b' on the Hub"))
    monkeypatch.setattr("qlora.data.records.load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"'a/b' is no local file .* Couldn't reach .* Pass a"):
        load_records("a/b")
    load_dataset.assert_called_once_with("a/b", split="train")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a"}, "columns question; expected one of: messages; .* text"),
        ({"conversation": []}, r"Did you mean conversations\?"),
        ({"prompt": "a", "completions": "b"}, r"Did you mean completion\?"),
        ({"messages": [{**ANSWER, "role": "assistent"}]}, "'assistent'.* Did you mean assistant"),
        ({"messages": [{"content": "a"}]}, "unknown role None"),
        ({"messages": [{**ANSWER, "tool_calls": "f(1)"}]}, r"a list of calls, got 'f\(1\)'"),
        ({"messages": ["a"]}, "a message must be .* got 'a'"),
        ({"messages": "hello"}, "messages must be a list, or JSON of one, got 'hello'"),
        ({"messages": {"role": "user"}}, "messages must be a list of messages, got a dict"),
        ({"messages": [{**USER, "content": [{"type": "image"}]}]}, "parts that are not text"),
    ],
)
def test_bad_records(record, message):
    with pytest.raises(UserError, match=message):
        chat_of(record)
