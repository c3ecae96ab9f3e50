"""A classifier's labels: names and numbers; measures worked out by hand, by conlleval's rules."""

import datasets
import pytest

from qlora.data.objectives import class_names, class_number, entities, text_scores, word_scores
from qlora.errors import UserError


def rows(values, feature=None):
    features = datasets.Features({"label": feature}) if feature else None
    return datasets.Dataset.from_dict({"label": values}, features=features)


def test_names_are_sorted_and_numbers_are_called_as_transformers_does():
    assert class_names(rows(["pos", "neg", "pos"]), "label") == ("neg", "pos")
    assert class_names(rows([0, 2, 2]), "label") == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert class_names(rows([True, False]), "label") == ("False", "True")
    assert class_names(rows([["O", "B-PER"], ["O"]]), "label") == ("B-PER", "O")
    assert class_names(rows([[0, 1], []]), "label") == ("LABEL_0", "LABEL_1")


def test_a_data_set_that_names_its_numbers():
    one = datasets.ClassLabel(names=["world", "sport"])
    assert class_names(rows([1, 1], one), "label") == ("world", "sport")
    assert class_names(rows([[1, 0]], datasets.List(one)), "label") == ("world", "sport")


def test_labels_that_the_model_knows_keep_their_places():
    known = ("neutral", "pos", "neg")
    assert class_names(rows(["neg", "pos"]), "label", known) == known
    assert class_names(rows([0, 2]), "label", known) == known
    assert class_names(rows(["neg", "new"]), "label", known) == ("neg", "new")
    assert class_names(rows([0, 3]), "label", known) == tuple(f"LABEL_{i}" for i in range(4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, 1.0], r"label must be names or whole numbers from 0, got (0\.5|1\.0)"),
        ([-1, 0], "must be names or whole numbers from 0, got -1"),
        (["a", "a"], "label holds one label alone, a: a classifier needs two or more"),
        ([None, None], "label is empty in every row"),
    ],
)
def test_labels_that_are_none(values, message):
    with pytest.raises(UserError, match=message):
        class_names(rows(values), "label")


def test_the_number_of_a_label():
    names = ("neg", "pos")
    assert [class_number(label, names) for label in ("pos", "neg", 1, 0)] == [1, 0, 1, 0]
    assert class_number(True, ("False", "True")) == 1
    with pytest.raises(UserError, match=r"label 'post' is none of neg, pos\. Did you mean pos\?"):
        class_number("post", names)
    with pytest.raises(UserError, match="label 2 is not one of the training data's 0 to 1"):
        class_number(2, names)


def test_accuracy_is_over_all_labels_not_over_rows():
    assert text_scores([[1, 1, 1, 1], [0]], [[1, 1, 1, 1], [1]], []) == {"accuracy": 4 / 5}
    assert text_scores([], [], []) == {"accuracy": 0}


def test_entities_are_those_of_conlleval():
    assert entities(["B-PER", "I-PER", "O", "B-LOC"]) == {("PER", 0, 2), ("LOC", 3, 4)}
    assert entities(["B-PER", "B-PER"]) == {("PER", 0, 1), ("PER", 1, 2)}
    assert entities(["I-PER", "I-LOC", "I-LOC"]) == {("PER", 0, 1), ("LOC", 1, 3)}
    assert entities(["O", "I-PER", "O", "I-PER"]) == {("PER", 1, 2), ("PER", 3, 4)}
    assert entities([]) == set()


def test_f1_counts_whole_entities():
    names = ["O", "B-PER", "I-PER"]
    wanted, cut_short = [[1, 2, 0, 1]], [[1, 0, 0, 1]]
    assert word_scores(wanted, wanted, names)["f1"] == 1
    # one of two entities is right: precision and recall are 1/2
    assert word_scores(cut_short, wanted, names)["f1"] == 0.5
    assert word_scores([[0, 0, 0, 0]], wanted, names)["f1"] == 0
    assert "f1" not in word_scores(wanted, wanted, ["noun", "verb", "other"])
