"""What SECURITY.md promises of data files and chat templates."""

import gzip
import json

import pyarrow as pa
import pytest
from conftest import tiny_tokenizer, write_rows
from damage import CHAT, DEEP
from datasets import Dataset, Features, Image
from pyarrow import parquet

from qlora.data import readers, templates
from qlora.data.records import load_records
from qlora.data.rows import prepare_data
from qlora.errors import UserError


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "txt"])
@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_compressed_bomb_is_one_line_before_it_fills_the_memory(
    ending, compression, tmp_path, monkeypatch
):
    for name in ("LONGEST_LINE", "LONGEST_JSON"):
        monkeypatch.setattr(readers, name, 1 << 16)
    path, bomb = tmp_path / f"a.{ending}.{compression}", b'{"text": "' + b"a" * (1 << 22)
    if compression == "gz":
        path.write_bytes(gzip.compress(bomb))
    else:
        with pa.CompressedOutputStream(str(path), "zstd") as out:
            out.write(bomb)
    assert path.stat().st_size < 1 << 16
    with pytest.raises(UserError, match=r"a\.\w+\.\w+, line 1 is longer than 0 MiB: make shorter"):
        list(load_records(str(path)))


@pytest.mark.parametrize("text", ["[" * DEEP, '{"text": ' + '{"a":' * DEEP])
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_json_nested_too_deep_is_one_line(text, ending, tmp_path):
    (tmp_path / f"a.{ending}").write_text(text)
    with pytest.raises(UserError, match=r"line 1: nested too deep"):
        list(load_records(str(tmp_path / f"a.{ending}")))


def test_no_path_in_data_is_opened(tmp_path):
    """A column of images may hold any path or address, which datasets opens."""
    (tmp_path / "secret").write_text("x")
    rows = {"text": [{"path": str(tmp_path / "secret"), "bytes": None}]}
    Dataset.from_dict(rows, features=Features(text=Image())).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: column text holds Image, .* any path"):
        list(load_records(str(tmp_path / "a.parquet")))


def test_a_damaged_page_of_a_parquet_file_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["one", "two"]}), path, compression="none")
    path.write_bytes(
        path.read_bytes().replace(b"one", b"\xff\xff\xff", 1).replace(b"\x15", b"\xff", 2)
    )
    with pytest.raises(UserError, match=r"a.parquet cannot be read as parquet: "):
        list(load_records(str(path)))


LOOPS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ ''.__class__ }}{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{% for i in range(10 ** 9) %}a{% endfor %}", "OverflowError: Range"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[7].x.y }}", "undefined|no element"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        (LOOPS, "takes more than 0.2 s"),
    ],
)
def test_a_hostile_template_runs_no_code_and_ends(template, words, tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.2)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    data = write_rows(tmp_path / "a.jsonl", [CHAT])
    with pytest.raises(UserError, match=f"chat template rejects the chat: .*({words})"):
        prepare_data(str(data), tokenizer, max_length=64)


def test_a_label_that_would_make_a_trillion_classes_is_refused(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 10**12}]
    data = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"got 1000000000000: .* at most 1,000,000 classes"):
        prepare_data(str(data), tiny_tokenizer(), max_length=64, task="seq-cls")


@pytest.mark.parametrize("field", ["role", "content", "tool_calls", "function_call"])
@pytest.mark.parametrize("value", [3, [3], [[3]], {"x": 3}, [{"function": 3}]])
def test_a_message_of_the_wrong_types_is_one_line_or_text(field, value, tmp_path):
    chat = json.loads(json.dumps(CHAT))
    chat["messages"][1][field] = value
    data = write_rows(tmp_path / "a.jsonl", [chat])
    try:
        prepare_data(str(data), tiny_tokenizer(), max_length=64)
    except UserError as error:
        assert "row 1" in str(error)
