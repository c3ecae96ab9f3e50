"""`train.py --inspect`: rows token by token, as JSON, on a terminal and as a page."""

import json
import shutil

import pytest
from conftest import tiny_tokenizer, write_rows

from qlora.apps.inspection import inspect
from qlora.config import DataConfig, TrainConfig
from qlora.data import prepare_data
from qlora.errors import UserError
from qlora.training.outputs import is_left_over

USER, ANSWER = {"role": "user", "content": "<i>1+1?"}, {"role": "assistant", "content": "two"}
RECORDS = [
    {"messages": [USER, ANSWER, USER, {**ANSWER, "content": "3 é"}]},
    {"messages": [USER]},
    {"messages": [USER, {**ANSWER, "content": "x" * 90}]},
]


def run(tmp_path, **settings):
    """Inspect RECORDS with a folder that has a tokenizer and nothing else."""
    data = str(write_rows(tmp_path / "rows.jsonl", RECORDS))
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = DataConfig(data, max_length=100, **settings.pop("data", {}))
    out = str(tmp_path / "out" / "deep")
    inspect(TrainConfig(model=str(tmp_path / "model"), output_dir=out, data=config, **settings))
    return data


def test_json_rows_are_those_of_training(tmp_path, capsys):
    data = run(tmp_path, inspect=3, json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["row"] for row in rows] == [1, 2, 3] and not (tmp_path / "out").exists()
    assert all([*row] == ["row", "text", "input_ids", "labels", "learned"] for row in rows)
    trained, _ = prepare_data(data, tiny_tokenizer(), max_length=100)
    shown = [(row["input_ids"], row["labels"]) for row in rows if row["learned"]]
    assert shown == [(row["input_ids"], row["labels"]) for row in trained]
    assert rows[0]["learned"] == ["two<|im_end|>", "3 é<|im_end|>"]
    assert rows[0]["text"] == tiny_tokenizer().decode(rows[0]["input_ids"])
    assert len(rows[2]["input_ids"]) == 100
    run(tmp_path, inspect_rows=(3, 1), json=True, data={"long_rows": "split"})
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["row"] for row in rows] == [1, 3, 3]


def test_table_and_page_show_each_token(tmp_path, capsys):
    run(tmp_path, inspect=2)
    said = capsys.readouterr().out
    assert "row 2: 0 tokens, 0 learned; nothing of it is learned" in said
    (line,) = (line for line in said.splitlines() if line.endswith("  'w'"))
    i = tiny_tokenizer().convert_tokens_to_ids("w")
    assert line.split() == ["*", line.split()[1], str(i), str(i), "'w'"]
    page = (tmp_path / "out/deep/inspect.html").read_text(encoding="utf-8")
    assert f'<span title="id {i}, label {i}">w</span>' in page and "<i>1" not in page
    parts = [tiny_tokenizer().convert_tokens_to_ids(part) for part in ("Ã", "©")]  # of é
    ids = " ".join(map(str, parts))
    assert f'<span title="id {ids}, label {ids}">é</span>' in page
    assert "http" not in page and "prefers-color-scheme: dark" in page
    assert is_left_over(tmp_path / "out/deep")  # training starts there as in an empty folder
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out is no folder"):
        run(tmp_path, inspect=2)
    with pytest.raises(UserError, match=r"--inspect-rows: .* has 3 rows, but no row 4, 17"):
        run(tmp_path, inspect_rows=(17, 4), json=True)


@pytest.mark.parametrize(
    ("task", "record", "learned"),
    [
        ("seq2seq", {"prompt": "a", "completion": "b"}, ["b"]),
        ("seq-cls", {"text": "ab", "label": "x"}, ["x"]),
        ("token-cls", {"tokens": ["ab", "c"], "tags": ["x", "y"]}, ["x", "y"]),
    ],
)
def test_other_tasks(tmp_path, capsys, monkeypatch, task, record, learned):
    other = {**record} | ({"label": "y"} if "label" in record else {})
    monkeypatch.setattr(f"{__name__}.RECORDS", [record, other])
    run(tmp_path, inspect=1, json=True, task=task)
    assert json.loads(capsys.readouterr().out)["learned"] == learned
    run(tmp_path, inspect=1, task=task)
    assert capsys.readouterr().out.count("\n* ") == len(learned)
