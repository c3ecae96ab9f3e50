"""Records of each task -> rows, batches, loss and scores: expected values are transformers' own,
or worked out by hand by conlleval's rules."""

from itertools import product

import datasets
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer, write_rows
from tokenizers import processors
from torch.nn import functional as F
from transformers import BertTokenizer

from qlora.data import objectives
from qlora.data.batches import collator
from qlora.data.inspection import show_example
from qlora.data.objectives import (
    OBJECTIVES,
    _cut_row,
    class_names,
    class_number,
    measure,
    text_ids,
)
from qlora.data.records import Records, dataset_part
from qlora.data.rows import describe, prepare_data
from qlora.errors import UserError


def bert_tokenizer():
    """WordPiece: [CLS] … [SEP], words in pieces, token_type_ids."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "##s", "ann", "met", "in"]
    vocab = {word: i for i, word in enumerate([*words, "rome", "##lie", "##by", "[MASK]"])}
    return BertTokenizer(vocab=vocab)


def t5_tokenizer():
    """Bytes, and an eos at the end of each text, as T5's."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)]
    )
    return tokenizer


@pytest.fixture
def prepare(tmp_path):
    """`prepare(task, records, …)`: tokenizer, rows and counts."""

    def run(task, records, max_length=64, **settings):
        tokenizer = t5_tokenizer() if task == "seq2seq" else bert_tokenizer()
        source = str(write_rows(tmp_path / "data.jsonl", records))
        prepared = prepare_data(source, tokenizer, max_length=max_length, task=task, **settings)
        return tokenizer, *prepared

    return run


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "say one", "completion": "one"}, "say one"),
        ({"input": "say one", "target": "one"}, "say one"),
        ({"instruction": "say one", "output": "one", "input": ""}, "say one"),
        ({"instruction": "say", "output": "one", "input": "1 2"}, "say\n\n1 2"),
        ({"instruction": " ", "output": "one", "input": "1 2"}, "1 2"),
    ],
)
def test_answer_is_the_decoders_labels(record, prompt, prepare):
    tokenizer, rows, stats = prepare("seq2seq", [record])
    expected = tokenizer(prompt, text_target="one")
    assert rows[0]["input_ids"] == expected["input_ids"]
    assert rows[0]["labels"] == expected["labels"] and rows[0]["labels"][-1] == 2
    assert (stats.rows, stats.tokens, stats.supervised_tokens) == (1, len(prompt) + 1 + 4, 4)
    shown = show_example(rows, tokenizer, colour=False, task="seq2seq")
    assert shown.endswith(f"{prompt}<|im_end|> ⟦one<|im_end|>⟧")


def test_special_tokens_at_the_ends_of_a_text_do_not_come_twice(prepare):
    record = {"prompt": "say <|im_end|>", "completion": "one <|im_end|>\n"}
    tokenizer, rows, _ = prepare("seq2seq", [record])
    assert rows[0]["labels"] == tokenizer("one")["input_ids"]
    assert rows[0]["input_ids"] == tokenizer("say")["input_ids"]
    records = [{"text": "[CLS] good [SEP]", "label": 1}, {"text": "bad", "label": 0}]
    assert prepare("seq-cls", records)[1][0]["input_ids"] == [2, 4, 3]


def test_batches_for_an_encoder_decoder(prepare):
    """decoder_input_ids are the labels, one to the right; a cut row keeps its end."""
    model = tiny_model("t5")
    records = [{"prompt": "p" * i, "completion": "c" * i} for i in (3, 30)]
    tokenizer, rows, stats = prepare("seq2seq", records, max_length=10)
    assert len(rows[1]["input_ids"]) == len(rows[1]["labels"]) == 10 and stats.cut_rows == 1
    assert rows[1]["input_ids"][-1] == rows[1]["labels"][-1] == 2
    batch = collator(tokenizer, "seq2seq", model)([*rows])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 16)
    assert batch["labels"][0].tolist() == rows[0]["labels"] + [-100] * 12
    shifted = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    assert torch.equal(batch["decoder_input_ids"], shifted)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "decoder_input_ids"}


def test_text_and_its_label(prepare):
    records = [{"text": "good films", "label": "pos"}, {"text": "bad", "label": "neg"}]
    tokenizer, rows, stats = prepare("seq-cls", records)
    assert rows[0]["input_ids"] == tokenizer("good films")["input_ids"] == [2, 4, 6, 7, 3]
    assert list(rows["labels"]) == [1, 0] and stats.classes == ("neg", "pos")
    assert describe(stats, name="x") == "x: 2 rows, 8 tokens, 2 labels of 2 classes: neg, pos"
    shown = show_example(rows, tokenizer, colour=False, task="seq-cls", classes=stats.classes)
    assert shown.endswith("[CLS] bad [SEP] ⟦neg⟧")
    records[0]["text"] = "good " * 20
    _, rows, stats = prepare("seq-cls", records, max_length=8)
    assert rows[0]["input_ids"] == [2, *[4] * 6, 3]  # cut, with its last token
    assert stats.cut_rows == 1


@pytest.mark.parametrize("columns", ["text text_pair", "sentence1 sentence2", "premise hypothesis"])
def test_pair_of_texts(columns, prepare):
    one, two = columns.split()
    records = [{one: "good film", two: "bad", "label": 1}, {one: "film", two: "film", "label": 0}]
    tokenizer, rows, _ = prepare("seq-cls", records)
    expected = tokenizer("good film", "bad")
    assert rows[0]["input_ids"] == expected["input_ids"]
    assert rows[0]["token_type_ids"] == expected["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    batch = collator(tokenizer, "seq-cls")([*rows])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (2, 8)
    assert batch["attention_mask"].sum(1).tolist() == [6, 5]


@pytest.mark.parametrize("column", ["tags", "ner_tags"])
def test_first_token_of_a_word_has_its_label(column, prepare):
    record = {"tokens": ["Annlie", "met", "Ann"], column: ["B-PER", "O", "B-PER"]}
    tokenizer, rows, stats = prepare("token-cls", [record])
    encoded = tokenizer(record["tokens"], is_split_into_words=True)
    assert rows[0]["input_ids"] == encoded["input_ids"] == [2, 8, 12, 9, 8, 3]
    assert encoded.word_ids() == [None, 0, 0, 1, 2, None]
    assert rows[0]["labels"] == [-100, 0, -100, 1, 0, -100]
    assert (stats.classes, stats.supervised_tokens) == (("B-PER", "O"), 3)
    shown = show_example(rows, tokenizer, colour=False, task="token-cls", classes=stats.classes)
    assert shown.endswith("[CLS] ann⟦B-PER⟧ ##lie met⟦O⟧ ann⟦B-PER⟧ [SEP] ")


def test_words_that_were_cut_off_have_no_label(prepare):
    records = [{"tokens": ["ann"] * 20, "tags": [0, 1] * 10}, {"tokens": ["in"], "tags": [1]}]
    tokenizer, rows, stats = prepare("token-cls", records, max_length=8)
    assert rows[0]["labels"] == [-100, 0, 1, 0, 1, 0, 1, -100]
    assert (stats.cut_rows, stats.supervised_tokens) == (1, 7)
    batch = collator(tokenizer, "token-cls")([*rows])
    assert batch["labels"][1].tolist() == [-100, 1, *[-100] * 6]


def test_counts_of_a_cut_row_are_those_of_its_labels():
    for labels in product((-100, 7), repeat=5):
        for length in range(7):
            kept = labels[:length]
            learned = sum(i != -100 for i in kept) * any(i != -100 for i in kept[1:])
            assert _cut_row([1] * 5, [*labels], length)["supervised"] == learned


def test_special_tokens_are_found_anew_where_they_changed():
    """They are looked for once a tokenizer, as long as its post-processor stays."""
    tokenizer = tiny_tokenizer()
    plain, end = text_ids("a", tokenizer), tokenizer.eos_token
    ids = [(end, tokenizer.eos_token_id)]
    processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = processor
    assert text_ids("a", tokenizer) == [tokenizer.eos_token_id, *plain]


def labelled(values, feature=None):
    features = datasets.Features({"label": feature}) if feature else None
    data = datasets.Dataset.from_dict({"label": values}, features=features)
    part = dataset_part("data", data)
    return Records([part], ("label",), ["label"], None)


def names(values, known=(), feature=None):
    return class_names(labelled(values, feature), known=known)


def test_class_names_and_numbers():
    """Sorted; numbers are called as in transformers; the model's names are kept where possible."""
    numbered, known = ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"), ("neutral", "pos", "neg")
    feature = datasets.ClassLabel(names=["world", "sport"])
    for found, expected in (
        (names(["pos", "neg", "pos"]), ("neg", "pos")),
        (names([0, 2, 2]), numbered[:3]),
        (names([True, False]), ("false", "true")),
        (names([["O", "B-PER"], ["O"]]), ("B-PER", "O")),
        (names([[0, 1], []]), numbered[:2]),
        (names([1, 1], feature=feature), ("world", "sport")),
        (names([[1, 0]], feature=datasets.List(feature)), ("world", "sport")),
        (names(["neg", "pos"], known), known),
        (names([0, 2], known), known),
        (names(["neg", "new"], known), ("neg", "new")),
        (names([0, 3], known), numbered),
    ):
        assert found == expected
    assert [class_number(label, ("neg", "pos")) for label in ("pos", "neg", 1, 0)] == [1, 0, 1, 0]
    assert class_number(True, ("False", "True")) == 1
    assert class_names(labelled(["pos"]), labelled(["neg"])) == ("neg", "pos")
    assert class_names(labelled([0]), labelled([2])) == numbered[:3]
    other = labelled([0], datasets.ClassLabel(names=["sport", "world"]))
    assert class_names(labelled([0], feature), labelled(["sport"])) == ("world", "sport")
    with pytest.raises(UserError, match="two numberings, world, sport and sport, world: write nam"):
        class_names(labelled([0], feature), other)


def texts(*labels):
    return [{"text": "a", "label": label} for label in labels]


@pytest.mark.parametrize(
    ("task", "records", "message"),
    [
        ("seq2seq", [{"prompt": "a", "completion": " "}], r"1 of 1 rows have no answer \(row 1\)"),
        ("evaluation", texts("pos", "post"), r"row 2: label 'post' is .* Did you mean pos\?"),
        ("evaluation", texts(2), "label 2 is not one of the training data: 0 to 1"),
        ("seq-cls", texts("x", "x"), r"data\.jsonl: label is x in every row"),
        ("seq-cls", texts("x", None, "y"), r"data\.jsonl, row 2: label is missing"),
        ("seq-cls", [{"text": "a", "lable": "x"}], r"text \+ label.*\. Did you mean label\?"),
        ("seq-cls", texts(0.5, 1.0), r"must hold names, or whole numbers from 0, got (0\.5|1)"),
        ("seq-cls", texts(-1, 0), "must hold names, or whole numbers from 0, got -1"),
        ("seq-cls", texts(None, None), "label is empty in every row"),
        ("token-cls", [{"tokens": ["a"], "tags": [0, 1]}], "row 1: tokens and .*, got 1 and 2"),
        ("token-cls", [{"tokens": "a b", "tags": [0, 1]}], "lists of one length, got str and 2"),
    ],
)
def test_bad_records(task, records, message, prepare):
    settings = {"classes": ("neg", "pos"), "new_classes": False} if task == "evaluation" else {}
    with pytest.raises(UserError, match=message):
        prepare("seq-cls" if settings else task, records, **settings)


def test_loss_of_labels_is_divided_once():
    """Summed over micro-batches it is torch's mean over all labels."""
    objective, generator = OBJECTIVES["token-cls"], torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 3, generator=generator)
    labels = torch.randint(-1, 3, (6, 5), generator=generator)
    labels[labels < 0] = -100
    mean = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    count, one = (labels != -100).sum(), torch.tensor(1)
    for sizes in ([6], [1, 5], [2, 3, 1]):
        parts = list(zip(logits.split(sizes), labels.split(sizes), strict=True))
        total = sum(objective.loss({"logits": x}, y, count) for x, y in parts)
        torch.testing.assert_close(total, mean)  # fp32 sums in another order
        results = ((objective.loss({"logits": x}, y, one), {"logits": x}, y) for x, y in parts)
        found = measure(objective, results, ["a", "b", "c"])
        assert found["loss"] == pytest.approx(mean.item(), rel=1e-6)
        right = (logits.argmax(-1) == labels).sum() / count
        assert found["accuracy"] == pytest.approx(right.item())
    torch.testing.assert_close(objective.loss({"logits": logits}, labels, None), mean)
    rows = objective.loss({"logits": logits[:, 0]}, labels[:, 0].clamp(min=0), torch.tensor(6))
    torch.testing.assert_close(rows, F.cross_entropy(logits[:, 0], labels[:, 0].clamp(min=0)))


def test_entities_are_those_of_conlleval():
    for tags, expected in (
        ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
        ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("I-PER I-LOC I-LOC", {("PER", 0, 1), ("LOC", 1, 3)}),
        ("O I-PER O I-PER", {("PER", 1, 2), ("PER", 3, 4)}),
        ("", set()),
    ):
        assert objectives.entities(tags.split()) == expected


def test_scores_are_over_all_labels_and_whole_entities():
    for rows, accuracy in (([([1, 1, 1, 1], [1, 1, 1, 1]), ([0], [1])], 4 / 5), ([], 0)):
        assert objectives.text_scores(rows, []) == {"accuracy": accuracy}
    tags, wanted = ["O", "B-PER", "I-PER"], [1, 2, 0, 1]
    # [1, 0, 0, 1]: one of two entities is right, so precision and recall are 1/2
    for predicted, f1 in ((wanted, 1), ([1, 0, 0, 1], 0.5), ([0, 0, 0, 0], 0)):
        assert objectives.word_scores([(predicted, wanted)], tags)["f1"] == f1
    assert "f1" not in objectives.word_scores([(wanted, wanted)], ["noun", "verb", "other"])
