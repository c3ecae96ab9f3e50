"""Large data: encoded by several processes, memory-mapped, and found again by their contents."""

import hashlib
import os
import signal

import pytest
from conftest import tiny_tokenizer, write_rows

from qlora import files
from qlora.data import cache, encoding, prepare_data, workers
from qlora.data.batches import PackedRows
from qlora.data.rows import fingerprint
from qlora.errors import UserError

ANSWERS = [str(i) * (1 + i % 40) for i in range(260)]
RECORDS = [{"prompt": f"{i}?", "completion": a} for i, a in enumerate(ANSWERS)]


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Prepare records as a large data set would be; MIN_BYTES can be raised again."""
    monkeypatch.setattr(cache, "MIN_BYTES", 0)
    monkeypatch.setattr(encoding, "CHUNK_ROWS", 100)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))

    def prepare(records, tokenizer=None, **options):
        source = str(write_rows(tmp_path / "rows.jsonl", records))
        options = {"max_length": 64, "num_proc": 2, **options}
        return prepare_data(source, tokenizer or tiny_tokenizer(), **options)

    return prepare


def entries():
    return sorted(path.name for path in cache.cache_folder().iterdir())


def test_rows_of_the_cache_are_those_in_memory(prepare, monkeypatch):
    rows, stats = prepare(RECORDS)
    assert rows.cache_files and len(entries()) == 1  # memory-mapped
    with monkeypatch.context() as context:
        context.setattr("qlora.data.rows.load_records", None)  # the second start reads no record
        again, counts = prepare(RECORDS)
    monkeypatch.setattr(cache, "MIN_BYTES", 1 << 40)
    in_memory, wanted = prepare(RECORDS)
    assert not in_memory.cache_files and stats == counts == wanted and stats.cut_rows > 100
    assert fingerprint(rows) == fingerprint(again) == fingerprint(in_memory) == stats.fingerprint
    assert rows[259] == in_memory[259] and len(PackedRows(again, 64)) <= len(again)


def test_other_contents_or_settings_are_another_entry(prepare):
    few, tokenizer = RECORDS[:9], tiny_tokenizer()
    prepare(few)
    tokenizer.chat_template = "{# 1 #}" + tokenizer.chat_template
    for changed in ({"tokenizer": tokenizer}, {"max_length": 32}, {"long_rows": "drop"}):
        before = entries()
        rows, _ = prepare(few, **changed)
        assert len(entries()) == len(before) + 1 and rows.cache_files
    prepare([{**few[0], "completion": "x"}, *few[1:]])
    assert len(entries()) == 5
    (cache.cache_folder() / entries()[0] / cache.ROWS).write_bytes(b"cut")
    assert len(prepare(few)[0]) == len(prepare(few, max_length=32)[0]) == 9  # it is made again


def test_two_runs_may_prepare_the_same_data_at_once(prepare, monkeypatch, tmp_path):
    prepare(RECORDS)
    (entry,) = cache.cache_folder().iterdir()
    entry.rename(tmp_path / "the other run's")

    def tables(*args):
        yield from encoding.tables_of(*args)
        (tmp_path / "the other run's").rename(entry)

    monkeypatch.setattr("qlora.data.rows.tables_of", tables)
    rows, _ = prepare(RECORDS)
    assert len(rows) == len(RECORDS) and entries() == [entry.name]


def test_a_file_hashed_beside_the_imports_is_hashed_again_once_it_changes(tmp_path, monkeypatch):
    large, small, pipe = (tmp_path / name for name in ("large", "small", "pipe"))
    large.write_bytes(b"a" * files.LARGE_BYTES + b"b" * (files.HASH_BYTES + 1))
    small.write_bytes(b"c")
    os.mkfifo(pipe)  # which can be read once, so not here
    files.hash_beside([str(tmp_path), f"{tmp_path}/none", "~no user/x", "a\0"])
    sha256 = hashlib.sha256(large.read_bytes()).hexdigest()
    with monkeypatch.context() as context:
        assert files.hash_of(small) == hashlib.sha256(b"c").hexdigest()  # the thread has ended
        context.setattr(files, "_hash", None)
        assert files.hash_of(large) == sha256
    large.write_bytes(b"d" * files.LARGE_BYTES)
    assert files.hash_of(large) == hashlib.sha256(b"d" * files.LARGE_BYTES).hexdigest()


def test_errors_leave_no_entry_and_name_the_row(prepare):
    with pytest.raises(UserError, match=r"rows\.jsonl, row 220: completion must be a list"):
        prepare([*RECORDS[:219], {"prompt": "a", "completion": {}}, *RECORDS[219:]])
    with pytest.raises(UserError, match="would lose"):
        prepare(RECORDS, long_rows="error")
    assert entries() == []
    with pytest.raises(UserError, match=r"one of 2 tokenizing processes was killed: free memory"):
        list(workers.mapped(lambda chunk: os.kill(os.getpid(), signal.SIGKILL), [1, 2, 3], 2))
