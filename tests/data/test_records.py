"""Files and hub names -> records -> messages."""

import gzip
import json
import os
from datetime import date, datetime
from unittest.mock import Mock

import datasets
import numpy as np
import pyarrow as pa
import pytest
from conftest import write_rows
from pyarrow import parquet

from qlora.data.chats import Reading, chat_of
from qlora.data.records import Chosen, load_records
from qlora.errors import UserError

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
ALPACA = {"instruction": "a", "input": "", "output": "b"}
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
CALLS = [{"type": "function", "function": {"name": "f"}}]
OBJECTS = '[{"content": 1}, {"role": "x"}]'  # an answer that is no list of messages
PARTS = [{"type": "text", "text": "a"}]
THOUGHT = [{"type": "reasoning", "value": "c"}, {"type": "text", "value": "b"}]
CALL = '{"name": "f", "arguments": {"x": 1}}'
CALLED = [{"type": "function", "function": json.loads(CALL)}]
KINDS = [  # record, its messages
    ({"messages": [{**USER, "name": None, "tool_calls": None}, ANSWER]}, [USER, ANSWER]),
    ({"messages": json.dumps([USER, ANSWER]), "text": "t"}, [USER, ANSWER]),
    ({"messages": [{"role": "user", "content": PARTS}]}, [USER]),
    ({"messages": [{**ANSWER, "function_call": {"name": "f"}}]}, [{**ANSWER, "tool_calls": CALLS}]),
    ({"messages": [{**ANSWER, "content": THOUGHT}]}, [{**ANSWER, "reasoning_content": "c"}]),
    (
        {"conversations": [{"from": "function_call", "value": CALL}]},
        [
            {"role": "assistant", "tool_calls": CALLED, "value": CALL},
        ],
    ),
    ({"conversations": SHAREGPT}, [USER, ANSWER]),
    ({"conversations": [USER, ANSWER], "system": "s"}, [SYSTEM, USER, ANSWER]),
    ({"prompt": "a", "completion": "b"}, [USER, ANSWER]),
    ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    ({"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}, [USER, ANSWER]),
    ({"prompt": "a", "completion": OBJECTS}, [USER, {**ANSWER, "content": OBJECTS}]),
    (ALPACA, [USER, ANSWER]),
    ({**ALPACA, "input": "c", "system": "s"}, [SYSTEM, {**USER, "content": "a\n\nc"}, ANSWER]),
    ({"instruction": "a", "output": 3}, [USER, {**ANSWER, "content": "3"}]),
]
ROLES = {  # role: the names that it has
    "user": ("human", "user"), "assistant": ("gpt", "bing", "chatgpt", "function_call"),
    "tool": ("tool", "observation", "function_response", "function"), "system": ("system",),
}  # fmt: skip


def test_every_kind_of_record_becomes_messages():
    for record, messages in KINDS:
        assert chat_of(record).messages == messages
    assert chat_of({"text": "a"}) is None
    for role, names in ROLES.items():
        talk = [{"from": name, "value": "a"} for name in names]
        assert chat_of({"conversations": talk}).messages == [{**USER, "role": role}] * len(names)


def test_chats_are_read_as_training_was_told():
    """Settings as run.yaml has them: other roles, the last turn, a column of reasoning."""
    given = {"roles": {"bot": "assistant"}, "train_on": "last", "reasoning_content": "why"}
    bot = {"role": "bot", "content": "b"}
    record = {"messages": [USER, bot, USER, bot], "why": "c"}
    chat = chat_of(record, Reading.of(given))
    assert chat.messages == [USER, ANSWER, USER, {**ANSWER, "reasoning_content": "c"}]
    assert chat.no_loss == {1}
    with pytest.raises(UserError, match="roles must map names to system, user, assistant, tool, g"):
        Reading.of({"roles": {"bot": "robot"}})


def test_all_file_kinds_have_the_same_rows(tmp_path):
    rows = [{"prompt": "a", "completion": "None"}, {"prompt": "é, b", "completion": "c\nd"}]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "a.csv")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for kind in ("jsonl", "json", "csv", "parquet"):
        assert [*load_records(str(tmp_path / f"a.{kind}"))] == rows


VALUES = (  # as they are in a file, and are learned
    "2025-08-01", "2025-08-01T07:30:00Z", "5", "6.5", "1.10", "1e5", "-0", "007", "true", "null",
    "123456789012345678901", "12345678.123456789123",
)  # fmt: skip
JSON_VALUES = [v if v[0] in "56t" or v[0] == "1" else json.dumps(v) for v in VALUES]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_values_are_learned_as_the_file_writes_them(tmp_path, ending):
    file = tmp_path / f"a.{ending}"
    if ending == "csv":
        file.write_text("prompt,completion\n" + "".join(f"a,{v}\n" for v in VALUES))
    else:
        rows = [f'{{"prompt": "a", "completion": {v}}}' for v in JSON_VALUES]
        file.write_text("\n".join(rows) if ending == "jsonl" else f"[\n{', '.join(rows)}]")
    assert [chat_of(row).messages[1]["content"] for row in load_records(str(file))] == [*VALUES]
    assert len([*load_records(str(file), limit=3)]) == 3


def test_values_inside_messages_and_tools_stay(tmp_path):
    """Dates, mixed types, null and large numbers, beside rows with other keys."""
    arguments = [{"on": "2025-08-01", "n": 5}, {"n": 6.5}, {"n": None, "big": 2**70, "yes": True}]
    rows = []
    for value in arguments:
        call = {"type": "function", "function": {"name": "f", "arguments": value}}
        talk = [USER, {"role": "assistant", "tool_calls": [call], "name": None}]
        rows.append({"messages": talk, "tools": [{"default": value}]})
    for name in ("a.jsonl", "a.json"):
        write_rows(tmp_path / name, rows)
        chats = [chat_of(row) for row in load_records(str(tmp_path / name))]
        calls = [chat.messages[1]["tool_calls"][0]["function"]["arguments"] for chat in chats]
        assert str(calls) == str(arguments)  # 5 is not 5.0
        assert str([chat.tools[0]["default"] for chat in chats]) == str(arguments)
        assert [*chats[0].messages[1]] == ["role", "tool_calls"]
    mixed = datasets.Dataset.from_list([rows[0], {"messages": [USER, ANSWER]}])
    mixed.to_parquet(tmp_path / "a.parquet")  # has each key in each row
    found = [chat_of(row).messages for row in load_records(str(tmp_path / "a.parquet"))]
    assert found == [chat_of(rows[0]).messages, [USER, ANSWER]]


def test_numbers_of_parquet_files(tmp_path):
    features = datasets.Features({"instruction": datasets.Value("float32")})
    features |= {"input": datasets.Value("float64"), "output": datasets.Value("bool")}
    columns = {"instruction": [0.1, None], "input": [5.0, float("nan")], "output": [True, False]}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    data.to_parquet(tmp_path / "a.parquet")
    found = [chat_of(row).messages for row in load_records(str(tmp_path / "a.parquet"))]
    texts_found = [turn["content"] for turns in found for turn in turns]
    assert texts_found == ["0.1\n\n5.0", "true", "", "false"]


def test_values_of_parquet_files_inside_messages(tmp_path):
    """Dates and float32 as text and as they print; timestamps have no text as written."""
    arguments = {"n": np.float32(0.1), "on": date(2025, 8, 1), "no": None}
    number = pa.struct([("n", pa.float32()), ("on", pa.date32()), ("no", pa.string())])
    column = pa.array([[{"role": "assistant", "arguments": arguments}]])
    kind = pa.list_(pa.struct([("role", pa.string()), ("arguments", number)]))
    parquet.write_table(pa.table({"messages": column.cast(kind)}), tmp_path / "a.parquet")
    (row,) = load_records(str(tmp_path / "a.parquet"))
    assert str(row["messages"][0]["arguments"]) == "{'n': 0.1, 'on': '2025-08-01'}"
    stamps = {"text": ["a"], "messages": [[{**USER, "content": datetime(2025, 8, 1)}]]}
    parquet.write_table(pa.table(stamps), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="2025-08-01 00:00:00 is a timestamp: cast it"):
        load_records(str(tmp_path / "b.parquet"))
    kinds = {("text",): ()}
    assert [*load_records(str(tmp_path / "b.parquet"), kinds)] == [{"text": "a"}]  # is not used


def test_labels_of_a_csv_file_are_numbers_where_all_are(tmp_path):
    kinds = {("text", "label"): ()}
    for cells, labels in (
        ("3 4 5", [3, 4, 5]), ("1 2 x", ["1", "2", "x"]), ("01 2", ["01", "2"]),
        ("True False", ["True", "False"]), ("1.0 2", [1.0, 2]),
    ):  # fmt: skip
        rows = "".join(f"a,{cell}\n" for cell in cells.split())
        (tmp_path / "a.csv").write_text(f"text,label\n{rows}a,\n")
        found = [row["label"] for row in load_records(str(tmp_path / "a.csv"), kinds)]
        assert found == [*labels, None]


def texts(path, split="training", **chosen):
    return [row["text"] for row in load_records(str(path), split=split, chosen=Chosen(**chosen))]


def zst(content):
    return pa.Codec("zstd").compress(content, asbytes=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'\xef\xbb\xbf\r\n{"text": "a"}\r\n\r\n \r\n{"text": "b", "id": null}\r\n'),
        ("a.jsonl", b'[\n{"text": "a"},\n{"text": "b"}\n]\n'),
        ("a.csv", b"\xef\xbb\xbftext,label\r\na,\r\n\r\nb,1\r\n"),
        ("a.txt", b"\xef\xbb\xbfa\r\n\r\nb\r\n"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n', mtime=0) + gzip.compress(b'{"text": "b"}', mtime=0),
        ),
        ("a.jsonl.zst", zst(b'{"text": "a"}\n') + zst(b'{"text": "b"}')),
        ("a.JSON.GZ", gzip.compress(b'[{"text": "a"}, {"text": "b"}]', mtime=0)),
        ("a.csv.zst", zst(b"text\na\nb")),
    ],
)
def test_files_as_people_have_them(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name) == texts(tmp_path) == ["a", "b"]


def test_a_chosen_split_or_configuration(tmp_path, monkeypatch):
    for name in ("train", "test", "train_sft"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(
            gzip.compress(b'{"text": "%b"}' % name.encode(), mtime=0)
        )
    assert texts(tmp_path, split_name="test") == ["test"]
    assert texts(tmp_path, split_name="train") == ["train"]
    assert texts(tmp_path, split_name="train_sft") == ["train_sft"]
    with pytest.raises(
        UserError, match=r"has no split tset, but test: .*; train: train\.jsonl\.gz, train_sft"
    ):
        texts(tmp_path, split_name="tset")
    for chosen, flag in (
        ({"config": "c"}, "config is for"),
        ({"split_name": "test"}, "split is for"),
    ):
        with pytest.raises(UserError, match=f"--data-{flag} .*: drop it"):
            texts(tmp_path / "train.jsonl.gz", **chosen)
    both = datasets.DatasetDict({n: datasets.Dataset.from_dict({"text": [n]}) for n in "ab"})
    both.save_to_disk(tmp_path / "both")
    assert texts(tmp_path / "both", split_name="b") == ["b"]
    with pytest.raises(UserError, match="both has no split c, but a, b"):
        texts(tmp_path / "both", split_name="c")
    load_dataset = Mock(return_value=both["a"])
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert texts("a/b", config="c", split_name="s[:9]") == ["a"]
    load_dataset.assert_called_once_with("a/b", "c", split="s[:9]")
    load_dataset.side_effect = ValueError("Config name is missing.\nPick one of: ['one', 'two']")
    with pytest.raises(UserError, match=r"\['one', 'two'\]\. Choose with --data-config\. Pass a"):
        texts("a/b")


def test_files_of_a_folder_are_read_in_order_of_names(tmp_path):
    """Of several formats, too; not the text files among them."""
    for name in ("b.jsonl", "a.jsonl"):
        write_rows(tmp_path / name, [{"text": name}])
    (tmp_path / "README.md").write_text("no data")
    assert texts(tmp_path) == ["a.jsonl", "b.jsonl"]
    (tmp_path / "c.csv").write_text("text\nx\n")
    datasets.Dataset.from_dict({"text": ["y"], "other": [1]}).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("a note")
    assert texts(tmp_path) == ["a.jsonl", "b.jsonl", "x", "y"]
    assert "leaves out e.txt, text files beside others" in " ".join(
        load_records(str(tmp_path)).notes
    )
    write_rows(tmp_path / "meta.json", [{"license": "mit"}])
    with pytest.raises(UserError, match=r"of several kinds: meta\.json without text\. Pass the f"):
        load_records(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="got none"):
        load_records(str(tmp_path / "empty"))


def test_names_of_splits_mean_splits(tmp_path):
    for name in ("train", "valid", "test"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name}])
    (tmp_path / "notes.txt").write_text("no data")
    assert (texts(tmp_path), texts(tmp_path, "evaluation")) == (["train"], ["valid"])
    (note,) = load_records(str(tmp_path)).notes
    others = "notes.txt, test.jsonl, valid.jsonl"
    assert note == f"{tmp_path}: for training, reads train.jsonl; leaves out {others}"
    (tmp_path / "valid.jsonl").unlink()
    assert texts(tmp_path, "evaluation") == ["test"]
    assert texts(tmp_path / "test.jsonl") == ["test"]  # a file is what it is
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(UserError, match=r"no data for training, but test: test\.jsonl\. Pass"):
        load_records(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "training", "evaluation"),
    [
        ("data/train-00000-of-00002 data/train-00001-of-00002 data/test-00000-of-00001", "01", "2"),
        ("train/a train/b dev/a test/a", "01", "2"),
        ("my_trainset a-dev-b unit", "0", "1"),
        ("a b held_out.v2", "01", "2"),
        ("myTrain myTest trainData dataset_info", "02", "1"),
        ("mine holdout", "0", "1"),
        ("mine Evaluation old/mine", "0", "1"),  # subfolders: where there is nothing else
        ("x/a y/b", "01", "01"),
        (".cache/a train .train", "1", None),
        ("contest latest", "01", "01"),  # no words for test
    ],
)
def test_splits_of_folders(tmp_path, files, training, evaluation):
    for i, name in enumerate(files.split()):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = datasets.Dataset.from_dict({"text": [str(i)]})
        data.to_parquet(tmp_path / f"{name}.parquet")
    assert texts(tmp_path) == [*training]
    if evaluation:
        assert texts(tmp_path, "evaluation") == [*evaluation]
    else:
        with pytest.raises(UserError, match=r"no data for evaluation, but train: train\.parquet"):
            load_records(str(tmp_path), split="evaluation")


def test_dataset_saved_to_disk_and_splits_of_the_hub(tmp_path, monkeypatch):
    one, two = (datasets.Dataset.from_dict({"text": [name], "n": [1]}) for name in "ab")
    one.with_format("torch").save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, validation=two).save_to_disk(tmp_path / "both")
    for name, training, evaluation in (
        ("one", "a", "a"),
        ("both", "a", "b"),
        ("both/train", "a", "a"),
    ):
        path = tmp_path / name
        assert (texts(path), texts(path, "evaluation")) == ([training], [evaluation])
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"one' is not whole: .* Pass a \.jsonl"):
        load_records(str(tmp_path / "one"))
    splits = datasets.DatasetDict(train=one)
    monkeypatch.setattr("datasets.load_dataset", lambda name, *_, **__: splits)
    assert texts("a/b", "evaluation") == ["a"]  # the only one
    splits["test_matched"] = two
    assert texts("a/b", "evaluation") == ["b"]
    splits["train_sft"] = two
    with pytest.raises(
        UserError,
        match=r"several splits for training: train, train_sft\. Choose one with --data-split",
    ):
        load_records("a/b")
    splits = datasets.DatasetDict(test=one)
    with pytest.raises(UserError, match=r"a/b has no data for training, but test: test\. Pass"):
        load_records("a/b")


def test_edited_file_is_read_again(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "old"}])
    stamp = path.stat()
    assert texts(path) == ["old"]
    write_rows(path, [{"text": "new"}])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # only the content differs
    assert texts(path) == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_weight_0_and_train_false_turn_the_loss_of_a_turn_off():
    for switch, off in (
        ({"weight": 0}, True), ({"train": False}, True), ({"training": 0.0}, True),
        ({"loss": False, "weight": 1}, True), ({"weight": 1}, False), ({"train": None}, False),
    ):  # fmt: skip
        chat = chat_of({"messages": [USER, {**ANSWER, **switch}, USER, ANSWER], "system": "s"})
        assert chat.messages == [SYSTEM, USER, ANSWER, USER, ANSWER]
        assert chat.no_loss == ({2} if off else set())


def test_history_comes_before_the_instruction():
    chat = chat_of({**ALPACA, "history": [["q", "r"]], "system": "s"})
    asked, said = {**USER, "content": "q"}, {**ANSWER, "content": "r"}
    assert chat.messages == [SYSTEM, asked, said, USER, ANSWER]


def test_unused_columns_are_named(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{**ALPACA, "id": 1}, {**ALPACA, " tools": []}])
    assert load_records(str(path)).notes == (f"{path}: columns that are not used: id, ' tools'",)


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
        ("a.csv", "a,b\n1,2\n1,2,3\n", "csv: line 3: 3 cells for 2 columns. Fix the file"),
        ("a.csv", 'a,b\n1,"2\n1,2\n', "csv: line 3: unexpected end of data. Fix the file"),
        ("a.csv", "a,b,a\n1,2,3\n", "csv: line 1: two columns have one name"),
        ("a.csv", "prompt, completion\na,b\n", "columns prompt, ' completion'; .* mean completion"),
        ("a.jsonl", '{"text": NaN}', r"a\.jsonl, line 1: NaN is no JSON number, write null"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}', r"line 2: .*surrogates not allowed"),
        ("a.json", '[{"text": "a"}\n', r"a\.json, line 1: Expecting ',' delimiter"),
        ("a.json", '[{"text": "a"}]\n{"text": "a"}', "line 1: expected the end of the list"),
        (
            "a.jsonl",
            '{"messages": []}\n{"prompt": "a", "completion": "b"}\n{"messages": []}',
            r"several kinds: messages \(row 1, 3\); prompt \+ completion \(row 2\)\. Put each kind",
        ),
        ("a.jsonl.gz", "x", r"cut short, or not compressed as \.gz \(Not a gzipped file"),
        ("a.txt.zst", "x", r"cut short, or not compressed as \.zst \(.*: copy it again"),
        ("a.jsonl", '{"text": "a"}\nnull', r"a\.jsonl, line 2: got null, not an object"),
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
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"'a/b' is no local file .* Couldn't reach .* Pass a"):
        load_records("a/b")
    load_dataset.assert_called_once_with("a/b")
    load_dataset.side_effect = ValueError("Config name is missing.\nPick one of: ['one', 'two']\n")
    with pytest.raises(UserError, match=r"missing\. Pick one of: \['one', 'two'\]\. Choose with"):
        load_records("a/b")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a"}, "columns question; expected one of: messages; .* text"),
        ({"conversation": []}, r"Did you mean conversations\?"),
        ({"prompt": "a", "completions": "b"}, r"Did you mean completion\?"),
        ({"messages": [{**ANSWER, "role": "assistent"}]}, "'assistent'.* Did you mean assistant"),
        ({"messages": [{"content": "a"}]}, "unknown role None"),
        ({"messages": [{**ANSWER, "tool_calls": "f(1)"}]}, r"a list of calls, got 'f\(1\)'"),
        ({"messages": [], "tools": {"name": "f"}}, "tools must be a list of objects, got"),
        ({"messages": [], "tools": '["f"]'}, "tools must be a list of objects, got"),
        ({"messages": ["a"]}, "a message must be .* got 'a'"),
        ({"messages": "hello"}, "messages must be a list, or JSON of one, got 'hello'"),
        ({"messages": {"role": "user"}}, "messages must be a list of messages, got a dict"),
        ({"messages": [{**USER, "content": [{"type": "image"}]}]}, "part without text: .*image"),
        ({"messages": [{**USER, "content": ["a"]}]}, r"must be text, got a list, .* one string"),
        ({"messages": [{**USER, "content": {"a": 1}}]}, "must be text, got an object"),
        ({"messages": [{**USER, "content": [{"type": "text", "name": "a"}]}]}, "'name': 'a'"),
        (
            {"prompt": "[{'role': 'user', 'content': 'a'}]", "completion": "b"},
            "or JSON of one, got",
        ),
        ({"instruction": "a", "output": ["b"]}, "output must be text, got a list"),
        ({**ALPACA, "history": [["q"]]}, r"history must hold \[question, answer\] lists, got"),
        ({"messages": [{**ANSWER, "weight": 0.5}]}, "weight of a message must be 0 or 1.*got 0.5"),
        ({"messages": [{**ANSWER, "train": "no"}]}, "train of a message must be 0 or 1.*got no"),
    ],
)
def test_bad_records(record, message):
    with pytest.raises(UserError, match=message):
        chat_of(record)


@pytest.mark.parametrize("kind", ["image", "image_url", "input_image", "audio", "video", "file"])
def test_paths_of_images_and_sound_are_no_text(kind):
    """As Qwen-VL, OpenAI and LLaMA-Factory write them; a table has null for the other kinds."""
    question = {"type": "text", "text": "What is it?", "image": None}
    chat = chat_of({"messages": [{**USER, "content": [question]}]})
    assert chat is not None and chat.messages[0]["content"] == "What is it?"
    for key in (kind, "value", "text"):
        part = {"type": kind, key: "photos/cat.png"}
        with pytest.raises(UserError, match=rf"part without text: {kind} \{{"):
            chat_of({"messages": [{**USER, "content": [part, question]}]})
    with pytest.raises(UserError, match=rf"part without text: {kind} \{{"):
        chat_of({"messages": [{**USER, "content": [question | {kind: "photos/cat.png"}]}]})
