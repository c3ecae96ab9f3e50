"""Scores against the packages they come from, called here by other ways, and by hand."""

import importlib.util
import math

import pytest
import sacrebleu
import torch
from conftest import tiny_model, tiny_tokenizer
from rouge_score import rouge_scorer, scoring
from torch.nn import functional as F

from qlora.apps.evaluation import compare_answers, measure_rows, require_scorers
from qlora.data.rows import prepare_data
from qlora.errors import UserError

GIVEN = ["the cat sat on the mat today", " Paris\n", "", "seven and eight are numbers ."]
WANTED = ["the cat sat on the mat", "Paris", "a word", "seven or eight are numbers ."]


def test_answers_are_scored_as_the_packages_score_them():
    found = compare_answers(GIVEN, WANTED)
    assert found["exact_match"] == 0.25  # Paris, whatever white space is around it
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(GIVEN, [WANTED]).score)
    aggregator = scoring.BootstrapAggregator()
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge_scorer.RougeScorer(kinds)
    for given, wanted in zip(GIVEN, WANTED, strict=True):
        aggregator.add_scores(scorer.score(wanted, given))
    assert list(found) == ["exact_match", *kinds, "bleu"]
    # by hand: the first answer has all 6 wanted words among its 7, twice 12 / 13 words of two texts
    assert compare_answers(GIVEN[:1], WANTED[:1])["rouge1"] == pytest.approx(12 / 13)
    for kind in kinds:
        own = [scorer.score(w, g)[kind].fmeasure for g, w in zip(GIVEN, WANTED, strict=True)]
        assert found[kind] == pytest.approx(math.fsum(own) / 4)
        assert aggregator.aggregate()[kind].low.fmeasure <= found[kind]
    assert compare_answers(WANTED, WANTED) == pytest.approx(
        {"exact_match": 1, "rouge1": 1, "rouge2": 0.75, "rougeL": 1, "bleu": 100}
    )  # one word has no pairs


def test_rouge_is_left_out_where_it_knows_no_word():
    assert compare_answers(["我们"], ["我们"]).keys() == {"exact_match", "bleu"}


def test_the_loss_is_the_mean_over_supervised_tokens(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(f'{{"prompt": "{"x" * i}", "completion": "{"yes " * (1 + i % 3)}"}}\n'
                for i in range(1, 9))
    )  # fmt: skip
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    rows, stats = prepare_data(str(path), tokenizer, max_length=64)
    total = 0.0
    for row in rows:  # one at a time: no padding
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += float(F.cross_entropy(logits, labels[1:], reduction="sum"))
    found = measure_rows(model, tokenizer, rows)
    loss = total / stats.supervised_tokens
    assert found["loss"] == pytest.approx(loss, rel=1e-5)  # fp32, added up in another order
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_packages_that_are_missing_are_named(monkeypatch):
    require_scorers()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install rouge-score sacrebleu, or measure the loss"):
        require_scorers()
