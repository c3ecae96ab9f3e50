"""Evaluation: its loss is training's, its answers are transformers', its scores the packages'."""

import json
import math
import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import sacrebleu
from conftest import (
    FP32,
    RECORDS,
    ROWS,
    axis,
    larger_tokenizer,
    one_by_one,
    quick_config,
    write_rows,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qlora import DataConfig, MergeConfig, UserError, disable_adapter, load_adapter, load_base
from qlora.apps import evaluation
from qlora.apps.evaluation import compare_answers, evaluate
from qlora.config import EvaluateConfig
from qlora.files import read_metrics
from qlora.merge import merge
from qlora.training import train


@pytest.fixture
def evaluated(adapters, tmp_path):
    """`evaluated(rows, …)`: the results of a random adapter, or another one, on these rows."""
    folder = shutil.copytree(adapters("llama"), tmp_path / "adapter")

    def run(rows, **settings):
        data = write_rows(tmp_path / "rows.jsonl", rows)
        return evaluate(EvaluateConfig(**{"adapter": str(folder), "data": str(data), **settings}))

    return run


def logged(folder: Path) -> dict:
    return [row for row in read_metrics(folder) if "eval_loss" in row][-1]


def test_tokens_beyond_the_embedding_are_refused(evaluated, checkpoints, tmp_path):
    base = larger_tokenizer(shutil.copytree(checkpoints("llama"), tmp_path / "base"))
    pairs = [("a", "<t69>"), ("<t69>", "b")]
    for rows in ([{"prompt": p, "completion": c}] for p, c in pairs):
        with pytest.raises(UserError, match=r"these are used: '<t69>'\."):
            evaluated(rows, adapter=None, model=str(base))


def test_loss_and_answers_of_base_and_adapter(evaluated, quick_run, checkpoints, tmp_path, capsys):
    output, trained = tmp_path / "results.json", str(quick_run.folder)
    results = evaluated(ROWS[:5], adapter=trained, output=str(output), max_new_tokens=6)
    assert json.loads(output.read_text()) == results
    assert results["max_length"] == 128  # as in training

    model = load_base(str(checkpoints("llama")), FP32)
    load_adapter(model, trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    wanted, requests = ([row[key] for row in ROWS[:5]] for key in ("completion", "prompt"))
    chats = [[{"role": "user", "content": text}] for text in requests]
    for name, state in (("base", disable_adapter(model)), ("adapter", nullcontext())):
        with state:
            given = one_by_one(model, tokenizer, chats, max_new_tokens=6)
        for key, expected in (("request", requests), ("wanted", wanted), (name, given)):
            assert [answer[key] for answer in results["answers"]] == expected
        bleu = sacrebleu.corpus_bleu(given, [wanted], force=True).score
        assert results["scores"][name]["bleu"] == pytest.approx(bleu)
    said = capsys.readouterr().out
    assert "Measured on 5 rows," in said and "5 answers of up to 6 tokens" in said
    assert said.count("    wanted ") == 3
    assert f"python -m qlora.chat --adapter {trained} --compare" in said


def test_loss_is_that_of_training_and_of_the_merged_model(evaluated, quick_run, tmp_path, capsys):
    loss, output = logged(quick_run.folder)["eval_loss"], str(tmp_path / "a.json")
    found = evaluated(ROWS, adapter=str(quick_run.folder), output=output, generate=False)
    # fp32, other batches
    assert found["scores"]["adapter"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["scores"]["adapter"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["answers"] == [] and f"{loss:.4f}" in capsys.readouterr().out
    merged = str(tmp_path / "merged")
    merge(MergeConfig(adapter=str(quick_run.folder), output_dir=merged, format="fp32"))
    config = {"max_length": 128, "generate": False, "compute_dtype": "fp32"}
    results = evaluated(ROWS, adapter=None, model=merged, **config)
    # merged in fp32 it is the function that was trained, to rounding
    assert results["scores"]["model"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert not (Path(merged) / "evaluation.json").exists()
    said = capsys.readouterr().out
    assert f"python -m qlora.chat --model {merged}" in said
    assert "from all logits" not in said


@pytest.mark.parametrize("task", axis("token-cls", "seq2seq", "seq-cls"))
def test_other_tasks_have_the_scores_of_training(task, evaluated, checkpoints, tmp_path, capsys):
    family = {"token-cls": "bert", "seq2seq": "t5", "seq-cls": "llama without pad"}[task]
    rows = [RECORDS[task](i) for i in range(12)]
    data = write_rows(tmp_path / "data.jsonl", rows)
    both = DataConfig(str(data), eval_data=str(data), max_length=48)
    config = quick_config(checkpoints(family), data, tmp_path / "run", data=both, eval_steps=4)
    folder = train(replace(config, task=task))
    found = evaluated(rows, adapter=str(folder), max_new_tokens=4)["scores"]
    wanted = logged(folder)
    assert found["adapter"]["loss"] == pytest.approx(wanted["eval_loss"], rel=1e-5)
    for name in ("accuracy", "f1"):
        assert found["adapter"].get(name) == wanted.get(f"eval_{name}")
    assert ("base" in found) == ("bleu" in found["adapter"]) == (task == "seq2seq")
    assert "qlora.chat" not in capsys.readouterr().out  # for causal language models only


def test_compute_dtype_is_the_one_asked_for(evaluated, checkpoints):
    model = {"adapter": None, "model": str(checkpoints("llama")), "generate": False}
    results = [evaluated(ROWS[:3], **model, compute_dtype=dtype) for dtype in ("fp32", "bf16")]
    fp32, bf16 = (found["scores"]["model"]["loss"] for found in results)
    # bf16 has 8 bits: the loss of a random model moves, and not far
    assert fp32 == pytest.approx(bf16, rel=0.05) and fp32 != bf16


def test_adapter_without_effect_is_no_better_than_its_base(evaluated, tmp_path, capsys):
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: 0 * tensor for name, tensor in load_file(file).items()}, file)
    scores = evaluated(ROWS[:3], generate=False)["scores"]
    assert scores["adapter"]["loss"] == scores["base"]["loss"]
    assert "no better than its base" in capsys.readouterr().out


def test_last_turn_of_a_chat_is_the_question(adapters):
    tokenizer = AutoTokenizer.from_pretrained(adapters("llama"))
    turns = zip(["user", "assistant"] * 2, ["a", "b", "c", " d\n"], strict=True)
    messages = [{"role": role, "content": text} for role, text in turns]
    records = [{"messages": messages}, {"messages": messages[:3]}, {"messages": messages[1:2]}]
    question, first, alone = evaluation.questions_in(records, tokenizer, "causal-lm")
    assert (first.request, alone.request) == ("a", "")  # a question after it, no question
    prompt = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True)
    assert question.prompt == prompt["input_ids"] and question.request == "c"
    assert tokenizer.decode(question.answer) == " d\n<|im_end|>"


def test_rows_of_text_and_questions_that_do_not_fit_are_not_asked(evaluated, tmp_path, capsys):
    results = evaluated([{"text": "some words"}, {"text": "and more"}])
    assert results["scores"]["base"].keys() == {"loss", "perplexity"}
    assert "plain text without prompts" in capsys.readouterr().out
    assert json.loads((tmp_path / "adapter" / "evaluation.json").read_text()) == results
    rows = [{"prompt": "x" * n, "completion": "y"} for n in (10, 500)]
    assert len(evaluated(rows, max_new_tokens=8)["answers"]) == 1
    assert "1 of 2 questions exceed" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"exceeds the model.s context, 512 tokens"):
        evaluated(rows, max_new_tokens=500)


def test_answers_are_scored_as_the_packages_score_them():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is missing")
    given = ["the cat sat on the mat today", " Paris\n", "", "seven and eight are numbers ."]
    wanted = ["the cat sat on the mat", "Paris", "a word", "seven or eight are numbers ."]
    found, kinds = compare_answers(given, wanted), ["rouge1", "rouge2", "rougeL"]
    assert list(found) == ["exact_match", *kinds, "bleu"]
    assert found["exact_match"] == 0.25  # Paris, whatever white space is around it
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(given, [wanted]).score)
    scorer = rouge_scorer.RougeScorer(kinds)
    for kind in kinds:
        each = [scorer.score(w, g)[kind].fmeasure for g, w in zip(given, wanted, strict=True)]
        assert found[kind] == pytest.approx(math.fsum(each) / 4)
    # by hand: the first answer has all 6 wanted words among its 7, twice 12 / 13 words of two texts
    assert compare_answers(given[:1], wanted[:1])["rouge1"] == pytest.approx(12 / 13)
    perfect = {"exact_match": 1, "rouge1": 1, "rouge2": 0.75, "rougeL": 1, "bleu": 100}
    assert compare_answers(wanted, wanted) == pytest.approx(perfect)  # "Paris" has no word pairs
    assert [*compare_answers(["我们"], ["我们"])] == ["exact_match", "bleu"]  # no word for ROUGE


def test_samples_do_nothing_to_a_terminal():
    answers = [{"request": "a\x1b[2Jb", "wanted": "c\nd", "model": "\a" * 9}]
    lines = ["", "  a[2Jb", "    model    (nothing)", "    wanted   c d"]
    assert evaluation.samples({"answers": answers}).split("\n") == lines


def test_mistakes_are_found_before_the_model_is_loaded(evaluated, monkeypatch):
    load = Mock(side_effect=AssertionError("the model was loaded"))
    monkeypatch.setattr("qlora.adapters.live.ResolvedModel.load", load)

    def refused(message, rows=ROWS, **settings):
        with pytest.raises(UserError, match=message):
            evaluated(rows, **settings)

    refused("question, answer; expected one of", rows=[{"question": "a", "answer": "b"}])
    refused(r"gone\.jsonl does not exist", data="gone.jsonl")
    refused("--output no/such/folder.json must be", output="no/such/folder.json")
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        refused("pip install rouge-score sacrebleu, or measure only the loss", limit=1)
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    refused(r"no write permission for .*--output")
    refused(r"no write permission for .*--output", output="results.json")


@pytest.mark.parametrize("text", ["config: [", "config:", "- a", "\xff"])
def test_a_damaged_run_file_is_refused(text, evaluated, tmp_path):
    """Its max_length is not known; the rows would be cut elsewhere than in training."""
    (tmp_path / "adapter" / "run.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"run\.yaml is not a run file of train.py, or damaged"):
        evaluated(ROWS[:1], generate=False)
    assert evaluated(ROWS[:1], generate=False, max_length=100)["max_length"] == 100
