"""Rows, cut and counted; packs against brute force; batches against transformers' collators."""

import pytest
import torch
from conftest import tiny_tokenizer, write_rows
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from qlora.data import batches, collator, prepare_data, prepare_tokenizer
from qlora.data import rows as data
from qlora.data.chats import Reading
from qlora.data.inspection import show_example
from qlora.errors import UserError

TURNS = [("user", "1+1?"), ("assistant", "two"), ("user", "+1?"), ("assistant", "3")]
TALK = [{"role": role, "content": text} for role, text in TURNS]
CHAT = {"messages": TALK}
SHORT = {"prompt": "a", "completion": "b"}
ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "length": 5},
    {"input_ids": [15, 16], "labels": [-100, 16], "length": 2},
    {"input_ids": [25, 26, 27], "labels": [-100, -100, 27], "length": 3},
]
CAPACITY = 24  # of a pack


def prepare(path, records, tokenizer, max_length=4096, **options):
    source = str(write_rows(path / "rows.jsonl", records))
    return prepare_data(source, tokenizer, max_length=max_length, **options)


def test_rows_are_cut_and_counted(tmp_path):
    tokenizer, long = tiny_tokenizer(), {"prompt": "a", "completion": "b" * 50}
    hopeless = {"prompt": "a" * 200, "completion": "b"}
    length = prepare(tmp_path, [SHORT], tokenizer)[0][0]["length"] + 5
    rows, stats = prepare(tmp_path, [long, hopeless, SHORT], tokenizer, max_length=length)
    assert list(rows["length"]) == [length, length - 5]
    learned = [label for label in rows[0]["labels"] if label != -100]
    assert tokenizer.decode(learned) == "b" * 8  # 5 more than b, <|im_end|>, \n
    assert (stats.rows, stats.tokens, stats.supervised_tokens) == (2, 2 * length - 5, 8 + 2)
    assert (stats.cut_rows, stats.dropped_rows, stats.cut_tokens) == (2, 1, 44 + 194)
    first, cut, dropped = data.describe(stats, name="train").split("\n")
    assert first.startswith(f"train: 2 rows, {2 * length - 5} tokens, 10 of them supervised")
    assert cut.endswith("2 rows cut at max_length (row 1, 2), 75.08% of the tokens left out")
    assert dropped.endswith("1 rows dropped because no answer was left (row 2)")
    with pytest.raises(UserError, match=r"cut to 12 tokens, no row .* 2\d\d tokens.*--max-length"):
        prepare(tmp_path, [hopeless], tokenizer, max_length=12)


def test_long_rows_are_refused_dropped_or_split(tmp_path):
    tokenizer, long = tiny_tokenizer(), {"prompt": "a", "completion": "0123456789" * 12}
    options = {"tokenizer": tokenizer, "max_length": 64}
    whole = prepare(tmp_path, [SHORT, long], tokenizer)[0]
    wanted = r"1 rows are longer than 64 tokens \(row 2\), the longest has 142; .* 47\.3% of all .*"
    with pytest.raises(UserError, match=wanted + "--long-rows truncate, drop or split"):
        prepare(tmp_path, [SHORT, long], **options, long_rows="error")
    rows, stats = prepare(tmp_path, [long, *[SHORT] * 400], **options, long_rows="error")
    assert (stats.rows, stats.cut_rows) == (401, 1) and rows[0]["length"] == 64  # below 1 %
    rows, stats = prepare(tmp_path, [SHORT, long], **options, long_rows="drop")
    assert (stats.rows, stats.dropped_rows) == (1, 1)
    assert "dropped, longer than max_length (row 2)" in stats.notes[0]
    rows, stats = prepare(tmp_path, [SHORT, long], **options, long_rows="split")
    assert list(rows["length"])[1:] == [64, 64, 16] and stats.cut_tokens == 0
    pieces = [dict(row) for row in rows][1:]
    joined = pieces[0]["input_ids"] + [i for piece in pieces[1:] for i in piece["input_ids"][1:]]
    assert joined == whole[1]["input_ids"]
    learned = [i for piece in pieces for i in piece["labels"][1:]]  # each is predicted once
    assert learned == whole[1]["labels"][1:]
    assert stats.supervised_tokens == sum(i != -100 for row in whole for i in row["labels"])
    asked = {"prompt": "a" * 200, "completion": "b"}  # pieces of it hold the prompt only
    rows, stats = prepare(tmp_path, [asked, SHORT], **options, long_rows="split")
    assert (stats.rows, stats.dropped_rows, stats.supervised_tokens) == (2, 0, 4)


def test_text_is_learned_whole_and_ended(tmp_path):
    tokenizer = tiny_tokenizer()
    (tmp_path / "a.txt").write_text("one two\n\n  \nthree\n", encoding="utf-8")
    rows, stats = prepare_data(str(tmp_path / "a.txt"), tokenizer, max_length=64)
    assert tokenizer.batch_decode(rows["input_ids"][:]) == ["one two<|im_end|>", "three<|im_end|>"]
    assert rows["labels"][:] == rows["input_ids"][:] and not stats.chats
    said = data.describe(stats, name="eval")
    assert said == "eval: 2 rows, 14 tokens, 14 of them supervised (100%)"
    tokenizer.eos_token = None  # a row of one token has nothing to predict
    rows, stats = prepare(tmp_path, [{"text": "one two"}, {"text": "a"}], tokenizer)
    assert tokenizer.batch_decode(rows["input_ids"][:]) == ["one two"]
    assert (stats.rows, stats.dropped_rows) == (1, 1)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet", ".txt"])
def test_blank_texts_are_counted_but_in_a_txt_file(ending, tmp_path):
    """Rows 2 and 3, null or white space."""
    rows, path = [{"text": text} for text in ("one", None, " ", "two")], tmp_path / f"a{ending}"
    if ending == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif ending == ".jsonl":
        write_rows(path, rows)
    else:
        header = "text,n\n" * (ending == ".csv")
        comma = "," * (ending == ".csv")
        path.write_text(header + "".join(f"{row['text'] or ''}{comma}\n" for row in rows))
    stats = prepare_data(str(path), tiny_tokenizer(), max_length=64)[1]
    notes = [n for n in stats.notes if n.endswith("have no answer or text (row 2, 3)")]
    assert (stats.rows, stats.unanswered_rows, len(notes)) == (
        (2, 0, 0) if ending == ".txt" else (2, 2, 1)
    )


def test_show_example_marks_what_is_learned(tmp_path):
    tokenizer = tiny_tokenizer()
    rows, _ = prepare(tmp_path, [CHAT], tokenizer)
    legend, text = show_example(rows, tokenizer, colour=False).split("\n", 1)
    assert legend == "An example row; loss is on the text between ⟦ and ⟧:"
    assert text.count("⟦") == 2 and text.endswith("⟦3<|im_end|>⟧\n")
    assert "\x1b[32m3<|im_end|>\x1b[0m" in show_example(rows, tokenizer, colour=True)


def test_show_example_shows_the_longest_and_a_special_row(tmp_path):
    tokenizer = tiny_tokenizer()
    many = [{"role": ("user", "assistant")[i % 2], "content": f"({i})"} for i in range(60)]
    thought = {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nyes"}
    records = [CHAT, {"messages": many}, {"messages": [TALK[0], thought]}, {"messages": TALK[:2]}]
    rows, stats = prepare(tmp_path, records, tokenizer)
    shown = show_example(rows, tokenizer, colour=False, special=stats.special)
    assert "(0)" in shown and "⟦(59)<|im_end|>⟧" in shown and "(31)" not in shown
    assert "One with tool calls or reasoning, row 3:" in shown and "why" in shown
    assert shown.endswith(
        "The shortest, row 4:\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
        "⟦two<|im_end|>⟧\n"
    )


def test_turns_of_weight_0_have_no_loss(tmp_path):
    tokenizer, last = tiny_tokenizer(), {**TALK[3], "weight": 1}
    rows, stats = prepare(
        tmp_path, [{"messages": [TALK[0], {**TALK[1], "weight": 0}, TALK[2], last]}], tokenizer
    )
    expected, _ = prepare(tmp_path, [CHAT], tokenizer)
    assert rows[0]["input_ids"] == expected[0]["input_ids"]
    assert tokenizer.decode([i for i in rows[0]["labels"] if i != -100]) == "3<|im_end|>"
    _, stats = prepare(tmp_path, [{**SHORT, "id": 1}], tokenizer)
    note = f"{tmp_path / 'rows.jsonl'}: columns that are not used: id"
    assert data.describe(stats, name="x").endswith(f"\n{note}")


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (SHORT, {"prompt": "a", "completion": " "}),
        (SHORT, {"prompt": "a", "completion": None}),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}),
        (CHAT, {"messages": TALK[:1]}),
        (CHAT, {"messages": None}),
        (CHAT, {"messages": [TALK[0], {**TALK[1], "weight": 0}]}),
        (CHAT, {"messages": [TALK[0], {"role": "assistant", "content": None}]}),
    ],
)
def test_rows_without_an_answer_are_dropped_by_number(tmp_path, good, bad):
    rows, stats = prepare(tmp_path, [good, *[bad] * 7, good], tiny_tokenizer())
    assert (len(rows), stats.unanswered_rows) == (2, 7)
    note = "7 rows dropped because they have no answer or text (row 2, 3, 4, 5 and 3 more)"
    assert stats.notes[0].endswith(note)
    with pytest.raises(UserError, match=r"2 of 2 rows have no answer \(row 1, 2\), .*: each needs"):
        prepare(tmp_path, [bad, bad], tiny_tokenizer())


def test_a_column_of_reasoning_must_exist(tmp_path):
    record, tokenizer = CHAT | {"why": None}, tiny_tokenizer()
    prepare(tmp_path, [record], tokenizer, reading=Reading(reasoning_content="why"))
    other = {"reading": Reading(reasoning_content="wy")}
    prepare(tmp_path, [record], tokenizer, split="evaluation", **other)
    with pytest.raises(UserError, match=r"has no such column; it has messages, why\. Did you mean"):
        prepare(tmp_path, [record], tokenizer, **other)


def test_errors_name_the_line_where_it_is_not_the_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", "completion": [1]}')
    message = r"a\.jsonl, row 2 \(line 4\): a message must be"
    with pytest.raises(UserError, match=message):
        prepare_data(str(path), tiny_tokenizer(), max_length=64)


def test_pads_have_no_loss_and_the_answers_eos_has(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = None, "left"
    rows, _ = prepare(tmp_path, [{"messages": TALK[:2]}, CHAT], tokenizer)
    with pytest.raises(UserError, match="no pad token: call prepare_tokenizer"):
        collator(tokenizer)
    assert prepare_tokenizer(tokenizer) == ("pad_token",)
    batch = collator(tokenizer)([*rows])
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.padding_side == "left"  # the tokenizer's own side is left alone
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape[1] % 8 == 0
    length, labels = rows[0]["length"], torch.tensor(rows[0]["labels"])
    assert length < rows[1]["length"] and torch.equal(batch["labels"][0, :length], labels)
    assert (labels == tokenizer.eos_token_id).sum() == 1  # the answer's own end
    assert (batch["labels"][0, length:] == -100).all()
    assert (batch["input_ids"][0, length:] == tokenizer.pad_token_id).all()
    assert batch["attention_mask"].sum(dim=1).tolist() == [length, rows[1]["length"]]
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="no pad, eos or unk token: set one"):
        prepare_tokenizer(tokenizer)
    tokenizer.unk_token = "a"
    assert prepare_tokenizer(tokenizer) == ("pad_token",) and tokenizer.pad_token == "a"


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.integers(1, CAPACITY), max_size=60))
def test_packing_is_best_fit_decreasing(lengths):
    """Against a search through all packs, row by row; of two with the same free space, the one that
    was filled last is used: a resumed run has the packs of its start. So the bound of the theorem,
    11/9 of the fewest packs and 6/9 (Dósa, 2007), needs no test."""
    expected: list[list[int]] = []
    filled: list[int] = []  # of a pack: how many rows were placed before its last one
    for count, row in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        free = [CAPACITY - sum(lengths[i] for i in pack) for pack in expected]
        fitting = [i for i, space in enumerate(free) if space >= lengths[row]]
        best = min(fitting, key=lambda i: (free[i], -filled[i]), default=len(free))
        expected[best:] = [[*(expected[best] if fitting else []), row], *expected[best + 1 :]]
        filled[best : best + 1] = [count]
    assert batches.best_fit_decreasing(lengths, CAPACITY) == expected


@pytest.mark.parametrize("as_packs", [True, False], ids=["packs", "rows"])
def test_flat_batches_are_those_of_transformers(as_packs):
    flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    expected = flatten([ROWS[i] for i in ([0, 2, 1] if as_packs else [0, 1, 2])])
    packed = batches.PackedRows(Dataset.from_list(ROWS), 8)
    assert packed.describe().startswith("packing: 3 rows in 2 packs of up to 8 tokens, 62.5% full")
    assert [*packed] == [[ROWS[0], ROWS[2]], [ROWS[1]]]
    batch = batches.FlatCollator()([*packed] if as_packs else ROWS)
    assert batch.pop("attention_mask").tolist() == [[1] * 10]
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(value)), name
    assert batch["cu_seq_lens_q"].tolist() == ([0, 5, 8, 10] if as_packs else [0, 5, 7, 10])
    assert batch["cu_seq_lens_q"].dtype == torch.int32


def test_padded_packs_end_with_a_row_of_pads():
    packed, collate = (
        batches.PackedRows(Dataset.from_list([*ROWS, ROWS[0]]), 10),
        batches.PackCollator(0),
    )
    assert packed.packs == [[0, 3], [2, 1]]
    batch = collate([*packed])
    assert batch["input_ids"].tolist()[1] == [25, 26, 27, 15, 16] + [0] * 11
    assert batch["labels"].tolist()[1] == [-100, -100, 27, -100, 16] + [-100] * 11
    assert batch["position_ids"].tolist()[1] == [0, 1, 2, 0, 1, *range(11)]
    assert batch["attention_mask"].sum(1).tolist() == [10, 5]
    assert batch["labels"][0, 0] == batch["labels"][0, 5] == -100
    rows = collate(ROWS)  # evaluation data is not packed
    assert rows["input_ids"].shape == (3, 8) and rows["attention_mask"].sum(1).tolist() == [5, 2, 3]
