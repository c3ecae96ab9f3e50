"""Records of each task -> rows, batches and loss: expected values are transformers' own."""

import json

import pytest
import torch
from conftest import tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from qlora.data.objectives import label_loss
from qlora.data.rows import collator, describe, prepare_data, show_example
from qlora.errors import UserError


def bert_tokenizer():
    """WordPiece as BERT's: [CLS] … [SEP], words in pieces, token_type_ids."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "##s", "ann", "met", "in"]
    vocab = {word: i for i, word in enumerate([*words, "rome", "##lie", "##by"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def t5_tokenizer():
    """Bytes, and </s> at the end of each text, as T5's."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    eos = ("<|im_end|>", 2)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[eos]
    )
    return tokenizer


@pytest.fixture
def write(tmp_path):
    def write(*records):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def prepare(source, tokenizer, task, max_length=64, **settings):
    return prepare_data(source, tokenizer, max_length=max_length, task=task, **settings)


# ---- seq2seq ----


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "say one", "completion": "one"},
        {"input": "say one", "target": "one"},
        {"instruction": "say one", "output": "one", "input": ""},
    ],
)
def test_an_answer_is_the_decoders_labels(record, write):
    tokenizer = t5_tokenizer()
    rows, stats = prepare(write(record), tokenizer, "seq2seq")
    wanted = tokenizer("say one", text_target="one")
    assert rows[0]["input_ids"] == wanted["input_ids"]
    assert rows[0]["labels"] == wanted["labels"] and rows[0]["labels"][-1] == 2
    assert (stats.rows, stats.tokens, stats.supervised_tokens) == (1, 8 + 4, 4)
    assert tokenizer.chat_template is None
    shown = show_example(rows, tokenizer, colour=False, task="seq2seq")
    assert shown.endswith("say one<|im_end|> ⟦one<|im_end|>⟧")


def test_both_sides_are_cut_and_keep_their_end(write):
    record = {"prompt": "p" * 30, "completion": "c" * 30}
    rows, stats = prepare(write(record), t5_tokenizer(), "seq2seq", max_length=10)
    assert len(rows[0]["input_ids"]) == len(rows[0]["labels"]) == 10
    assert rows[0]["input_ids"][-1] == rows[0]["labels"][-1] == 2
    assert stats.cut_rows == 1


def test_an_instruction_with_input(write):
    tokenizer = t5_tokenizer()
    record = {"instruction": "add", "input": "1 2", "output": "3"}
    rows, _ = prepare(write(record), tokenizer, "seq2seq")
    assert rows[0]["input_ids"] == tokenizer("add\n\n1 2")["input_ids"]


def test_an_answer_that_is_missing(write):
    records = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}
    with pytest.raises(UserError, match=r"1 of 2 rows have no answer \(row 2\)"):
        prepare(write(*records), t5_tokenizer(), "seq2seq")


def test_batches_for_an_encoder_decoder(write):
    """decoder_input_ids are the labels, one to the right: without labels BART would take the
    encoder's input."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=320, pad_token_id=0, decoder_start_token_id=0, **sizes)
    )
    tokenizer = t5_tokenizer()
    records = [{"prompt": "p" * i, "completion": "c" * i} for i in (3, 9)]
    rows, _ = prepare(write(*records), tokenizer, "seq2seq")
    batch = collator(tokenizer, "seq2seq", model)([rows[0], rows[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 16)
    assert batch["labels"][0].tolist() == rows[0]["labels"] + [-100] * 12
    shifted = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    assert torch.equal(batch["decoder_input_ids"], shifted)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "decoder_input_ids"}


# ---- texts ----


def test_a_text_and_its_label(write):
    tokenizer = bert_tokenizer()
    records = {"text": "good films", "label": "pos"}, {"text": "bad", "label": "neg"}
    rows, stats = prepare(write(*records), tokenizer, "seq-cls")
    assert rows[0]["input_ids"] == tokenizer("good films")["input_ids"] == [2, 4, 6, 7, 3]
    assert list(rows["labels"]) == [1, 0]
    assert stats.classes == ("neg", "pos")
    assert describe(stats, name="x") == "x: 2 rows, 8 tokens, 2 labels of 2 kinds: neg, pos"
    shown = show_example(rows, tokenizer, colour=False, task="seq-cls", classes=stats.classes)
    assert shown.endswith("[CLS] bad [SEP] ⟦neg⟧")


@pytest.mark.parametrize(
    "columns", [("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis")]
)
def test_a_pair_of_texts(columns, write):
    tokenizer = bert_tokenizer()
    one, two = columns
    records = [{one: "good film", two: "bad", "label": 1}, {one: "film", two: "film", "label": 0}]
    rows, _ = prepare(write(*records), tokenizer, "seq-cls")
    wanted = tokenizer("good film", "bad")
    assert rows[0]["input_ids"] == wanted["input_ids"]
    assert rows[0]["token_type_ids"] == wanted["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    batch = collator(tokenizer, "seq-cls")([rows[0], rows[1]])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (2, 8)
    assert batch["attention_mask"].sum(1).tolist() == [6, 5]


def test_a_long_text_keeps_its_last_token(write):
    records = {"text": "good " * 20, "label": 1}, {"text": "bad", "label": 0}
    rows, stats = prepare(write(*records), bert_tokenizer(), "seq-cls", max_length=8)
    assert rows[0]["input_ids"] == [2, *[4] * 6, 3]
    assert stats.cut_rows == 1


def test_evaluation_has_the_labels_of_training(write):
    source = write({"text": "good", "label": "pos"}, {"text": "bad", "label": "odd"})
    with pytest.raises(UserError, match="row 2: label 'odd' is none of neg, pos"):
        prepare(source, bert_tokenizer(), "seq-cls", classes=("neg", "pos"), new_classes=False)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "a", "label": "x"}], "data.jsonl: label holds one label alone, x"),
        (
            [{"text": "a", "label": "x"}, {"text": "b"}, {"text": "c", "label": "y"}],
            "data.jsonl, row 2: label is missing: give each row one, or leave the row out",
        ),
        (
            [{"text": "a", "lable": "x"}],
            r"columns text, lable: wanted are .*text \+ label.*\. Did you mean label\?",
        ),
        ([{"text": "a", "label": 0.5}], "data.jsonl: label must be names or whole numbers"),
    ],
)
def test_bad_records_of_texts(records, message, write):
    with pytest.raises(UserError, match=message):
        prepare(write(*records), bert_tokenizer(), "seq-cls")


# ---- words ----


@pytest.mark.parametrize("column", ["tags", "ner_tags"])
def test_the_first_token_of_a_word_has_its_label(column, write):
    tokenizer = bert_tokenizer()
    record = {"tokens": ["Annlie", "met", "Ann"], column: ["B-PER", "O", "B-PER"]}
    rows, stats = prepare(write(record), tokenizer, "token-cls")
    encoded = tokenizer(record["tokens"], is_split_into_words=True)
    assert rows[0]["input_ids"] == encoded["input_ids"] == [2, 8, 12, 9, 8, 3]
    assert encoded.word_ids() == [None, 0, 0, 1, 2, None]
    assert rows[0]["labels"] == [-100, 0, -100, 1, 0, -100]
    assert (stats.classes, stats.supervised_tokens) == (("B-PER", "O"), 3)
    shown = show_example(rows, tokenizer, colour=False, task="token-cls", classes=stats.classes)
    assert shown.endswith("[CLS] ann⟦B-PER⟧ ##lie met⟦O⟧ ann⟦B-PER⟧ [SEP] ")


def test_words_that_were_cut_off_have_no_label(write):
    records = {"tokens": ["ann"] * 20, "tags": [0, 1] * 10}, {"tokens": ["in"], "tags": [1]}
    tokenizer = bert_tokenizer()
    rows, stats = prepare(write(*records), tokenizer, "token-cls", max_length=8)
    assert rows[0]["labels"] == [-100, 0, 1, 0, 1, 0, 1, -100]
    assert (stats.cut_rows, stats.supervised_tokens) == (1, 7)
    batch = collator(tokenizer, "token-cls")([rows[0], rows[1]])
    assert batch["labels"][1].tolist() == [-100, 1, *[-100] * 6]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "row 1: tokens and tags must be two lists of one "
         "length, got 2 and 1"),
        ({"tokens": "a b", "tags": ["O", "B"]}, "must be two lists of one length, got str and 2"),
    ],
)  # fmt: skip
def test_bad_records_of_words(record, message, write):
    good = {**record, "tags": ["O", "B"]}
    good["tokens"] = ["a", "b"] if isinstance(record["tokens"], list) else "a"
    source = write(record, good)
    with pytest.raises(UserError, match=message):
        prepare(source, bert_tokenizer(), "token-cls", classes=("B", "O"))


# ---- loss ----


def test_the_loss_of_labels_is_divided_once():
    """Summed over micro-batches it is torch's mean over all labels, however they are split."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 3, generator=generator)
    labels = torch.randint(-1, 3, (6, 5), generator=generator)
    labels[labels < 0] = -100
    mean = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    count = (labels != -100).sum()
    for sizes in ([6], [1, 5], [2, 3, 1]):
        parts = zip(logits.split(sizes), labels.split(sizes), strict=True)
        total = sum(label_loss({"logits": x}, y, count) for x, y in parts)
        torch.testing.assert_close(total, mean)  # fp32 sums in another order
    torch.testing.assert_close(label_loss({"logits": logits}, labels, None), mean)
    rows = label_loss({"logits": logits[:, 0]}, labels[:, 0].clamp(min=0), torch.tensor(6))
    torch.testing.assert_close(rows, F.cross_entropy(logits[:, 0], labels[:, 0].clamp(min=0)))
