"""Rows that are read and encoded while training runs."""

import gzip
import json
from collections import Counter

import datasets
import pytest
from conftest import tiny_tokenizer, write_rows

from qlora.config import DataConfig
from qlora.data import prepare_data, streaming
from qlora.data.batches import PackedRows
from qlora.data.streaming import StreamedRows, StreamError
from qlora.errors import UserError

COUNT = 250
RECORDS = [{"prompt": f"{i}?", "completion": "x" * (1 + i % 30)} for i in range(COUNT)]


@pytest.fixture
def stream(monkeypatch):
    """`stream(sources, **settings)`: with small windows; closed at the end."""
    monkeypatch.setattr(streaming, "WINDOW_ROWS", 40)
    monkeypatch.setattr(streaming, "PIECE_ROWS", 15)
    opened = []

    def open_stream(
        *sources,
        seed=1,
        size=10_000,
        max_length=64,
        vocabulary=None,
        chat_template=None,
        **settings,
    ):
        settings = {"shuffle_buffer": 50, "dataset_num_proc": 2, "streaming": True} | settings
        data = DataConfig(tuple(map(str, sources)), max_length=max_length, **settings)
        how = {"task": "causal-lm", "max_length": max_length, "vocabulary": vocabulary}
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = chat_template or tokenizer.chat_template
        opened.append(StreamedRows(data, tokenizer, seed=seed, size=size, **how))
        return opened[-1]

    yield open_stream
    for each in opened:
        each.close()


def first(rows, count=COUNT):
    return [tuple(rows[i]["input_ids"]) for i in range(count)]


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "folder", "hub"])
def test_a_pass_has_the_rows_of_a_run_that_maps_them(kind, stream, tmp_path, monkeypatch, capsys):
    """Each once, in another order in each pass; the seed decides."""
    source = tmp_path / f"rows.{kind}"
    table = datasets.Dataset.from_list(RECORDS)
    if kind == "jsonl.gz":
        source.write_bytes(gzip.compress(write_rows(tmp_path / "rows", RECORDS).read_bytes()))
    elif kind == "folder":
        source.mkdir()
        for i in range(3):
            write_rows(source / f"{i}.jsonl", RECORDS[i::3])
    elif kind == "hub":
        source = "a/b"
        load = {False: table, True: table.to_iterable_dataset()}
        monkeypatch.setattr(
            "datasets.load_dataset", lambda *_, streaming=False, **__: load[streaming]
        )
    else:
        table.to_parquet(source)
    mapped, _ = prepare_data(str(source), tiny_tokenizer(), max_length=64)
    rows = stream(source)
    seen = first(rows, 2 * COUNT)
    assert (
        Counter(seen[:COUNT]) == Counter(seen[COUNT:]) == Counter(map(tuple, mapped["input_ids"]))
    )
    assert seen[:COUNT] != seen[COUNT:] and seen[:COUNT] != [*map(tuple, mapped["input_ids"])]
    said = capsys.readouterr().out
    assert said.count(f"all {COUNT} rows were read, the next pass over them begins") == 1
    if kind == "folder":
        assert first(stream(source, dataset_num_proc=1), 2 * COUNT) == seen
        assert first(stream(source, seed=2)) != seen[:COUNT]
    assert rows[3]["input_ids"] == list(seen[3]) and len(rows) == 10_000  # the first window stays


@pytest.mark.parametrize("packing", [False, True])
def test_a_place_is_gone_on_from_bit_by_bit(packing, stream, tmp_path):
    """Also in a later pass, and from a place that lies before the item, or is not known."""
    source = write_rows(tmp_path / "rows.jsonl", RECORDS)
    whole = stream(source, packing=packing)
    items = [whole[i] for i in range(150 if packing else 330)]
    last = len(items) - 40
    places = {at: whole.place_of(at) for at in (5, 60, last)}
    for at, place in [(5, places[5]), (60, {}), (last, places[60]), (last, places[last])]:
        assert whole.go_to(at, json.loads(json.dumps(place)))
        assert [whole[i] for i in range(at, len(items))] == items[at:]
    other = write_rows(tmp_path / "other.jsonl", [*RECORDS[:60], *RECORDS[61:]])
    assert not stream(other, packing=packing).go_to(60, places[60])


def test_packs_hold_each_row_of_a_window_once(stream, tmp_path):
    rows = stream(write_rows(tmp_path / "rows.jsonl", RECORDS), packing=True)
    assert isinstance(rows.head.items, PackedRows)
    packs, seen = (rows[i] for i in range(1000)), []
    while len(seen) < COUNT:
        pack = next(packs)
        assert sum(row["length"] for row in pack) <= 64
        seen += [tuple(row["input_ids"]) for row in pack]
    assert len(set(seen)) == len(seen) == COUNT


def test_sources_are_mixed(stream, tmp_path):
    a, b = (
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(count)])
        for name, count in (("a", 300), ("b", 60))
    )
    texts = [tiny_tokenizer().decode(ids) for ids in first(stream(a, b), 720)]
    assert len({*texts[:360]}) == len({*texts[360:]}) == 360
    assert 10 < sum(text[0] == "b" for text in texts[:60]) < 50
    texts = [tiny_tokenizer().decode(ids) for ids in first(stream(a, b, data_weights=(1, 4)), 400)]
    assert 290 < sum(text[0] == "b" for text in texts) < 350


def test_memory_does_not_grow_with_the_data(stream, tmp_path, monkeypatch):
    """What is read ahead of the items in use: the buffer, and a few windows."""
    read = []
    shuffle = streaming.shuffled

    def counted(items, *rest):
        return shuffle((read.append(1) or item for item in items), *rest)

    monkeypatch.setattr(streaming, "shuffled", counted)
    rows = stream(write_rows(tmp_path / "rows.jsonl", RECORDS * 4))
    for i in range(900):
        rows[i]
        assert len(read) <= i + 50 + 40 * (streaming.WINDOWS_AHEAD + 3) + 15 * 2 * 2
    assert len(rows.places) <= streaming.KNOWN_PLACES


def test_shuffle_buffer_is_that_of_datasets(stream, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", RECORDS)
    mapped, _ = prepare_data(str(source), tiny_tokenizer(), max_length=64)
    assert first(stream(source, shuffle_buffer=1)) == [*map(tuple, mapped["input_ids"])]


def test_rows_that_teach_nothing_are_counted_as_they_come(stream, tmp_path, capsys):
    bad = [{"prompt": "a", "completion": ""}, {"prompt": "b" * 99, "completion": "c"}]
    records = [*RECORDS[:100], *bad, *RECORDS[100:200], *bad * 9, *RECORDS[200:]]
    source = write_rows(tmp_path / "rows.jsonl", records)
    rows = stream(source, shuffle_buffer=1, long_rows="drop")
    capsys.readouterr()
    assert len(set(first(rows))) == COUNT and rows.stats.rows == 40
    said = capsys.readouterr().out
    assert (
        "so far, " in said
        and "1 rows dropped because they have no answer or text (row 101)" in said
    )
    assert (
        "10 rows dropped because they have no answer or text (row 101, 203, 205, 207 and 6 more)"
        in said
    )
    assert said.count("no answer") == 2
    rows = stream(source, shuffle_buffer=1, long_rows="error")
    first(rows)
    assert "of all tokens so far were cut" in capsys.readouterr().out
    long = write_rows(tmp_path / "long.jsonl", [bad[1], *RECORDS])
    with pytest.raises(UserError, match=r"long\.jsonl: 1 rows are longer than 64 tokens \(row 1\)"):
        stream(long, shuffle_buffer=1)


def test_faults_of_the_data(stream, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [*RECORDS, {"prompt": "a", "completion": {}}])
    rows = stream(source, shuffle_buffer=1)
    with pytest.raises(StreamError, match=r"rows\.jsonl, row 251: completion must be a list"):
        first(rows, 251)
    with pytest.raises(StreamError):  # and does not wait for the thread
        rows[250]
    with pytest.raises(UserError, match=r"the tokenizer 260 tokens, of which these are used: 'x'"):
        stream(source, vocabulary=90)


def test_reasoning_that_comes_late_turns_thinking_on_in_the_saved_template(stream, tmp_path):
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
        "<think>{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}<|im_end|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>"
        "{{ '' if enable_thinking else '</think>' }}{% endif %}"
    )
    turns = [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "yes"}]
    thinks = [turns[0], turns[1] | {"reasoning_content": "hm"}]
    rows = [{"messages": thinks if i > 60 else turns} for i in range(120)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    rows = stream(source, shuffle_buffer=1, chat_template=template)
    prompt = {"tokenize": False, "add_generation_prompt": True}
    assert rows.tokenizer.apply_chat_template(turns[:1], **prompt).endswith("</think>")
    rows[119]
    assert rows.tokenizer.apply_chat_template(turns[:1], **prompt).endswith("<think>")
