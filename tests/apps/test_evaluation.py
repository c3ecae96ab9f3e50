"""Evaluation end to end: its loss is training's, its answers are transformers'."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu
from conftest import FP32
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qlora import disable_adapter, load_adapter, load_base
from qlora.apps.evaluation import evaluate, questions_in, samples
from qlora.config import DataConfig, EvaluateConfig, LoraConfig, MergeConfig, TrainConfig
from qlora.errors import UserError
from qlora.merge import merge
from qlora.training import train

WORDS, TAGS = ["I", "met", "Ann", "Lee", "in", "Rome"], ["O", "O", "B-P", "I-P", "O", "B-L"]
RECORDS = {
    "causal-lm": lambda i: {"prompt": f"{i} times {i}", "completion": f"{i * i} " * (1 + i % 3)},
    "seq2seq": lambda i: {"prompt": f"say {i % 3}", "completion": "one two three"[: 3 + i % 9]},
    "seq-cls": lambda i: {"text": "good " * (i % 2) + "bad " * (1 + i % 4), "label": "ab"[i % 2]},
    "token-cls": lambda i: {"tokens": WORDS[: 3 + i % 4], "tags": TAGS[: 3 + i % 4]},
}


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run_of(checkpoints, tmp_path_factory):
    """`run_of(family, task)`: (folder, data) of a short run that was evaluated, made once."""
    root = tmp_path_factory.mktemp("runs")

    def made(family: str, task: str = "causal-lm"):
        folder, data = root / f"{family}-{task}", root / f"{family}-{task}.jsonl"
        if not folder.exists():
            write_rows(data, map(RECORDS[task], range(12)))
            config = TrainConfig(
                model=str(checkpoints(family)),
                output_dir=str(folder),
                data=DataConfig(str(data), eval_data=str(data), max_length=48),
                task=task,
                lora=LoraConfig(r=4, lora_alpha=8),
                quant=FP32,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=1,
                learning_rate=1e-2,
                max_steps=4,
                eval_steps=4,
            )
            train(config)
        return folder, data

    return made


def trained(folder: Path) -> dict:
    """What evaluation found at the end of training."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in reversed(rows) if "eval_loss" in row)


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("llama", "causal-lm"),
        ("t5", "seq2seq"),
        ("llama without pad", "seq-cls"),
        ("bert", "token-cls"),
    ],
)
def test_the_loss_is_that_of_training(family, task, run_of, capsys):
    folder, data = run_of(family, task)
    config = EvaluateConfig(adapter=str(folder), data=str(data), max_new_tokens=4)
    found = evaluate(config)["scores"]
    wanted = trained(folder)
    # fp32, batches of other shapes
    assert found["adapter"]["loss"] == pytest.approx(wanted["eval_loss"], rel=1e-5)
    for name in ("accuracy", "f1"):
        assert found["adapter"].get(name) == wanted.get(f"eval_{name}")
    assert ("base" in found) == ("bleu" in found["adapter"]) == (task in ("causal-lm", "seq2seq"))
    said = capsys.readouterr().out
    assert f"{wanted['eval_loss']:.4f}" in said
    assert ("qlora.chat" in said) == ("base" in found)


def plain_answers(model, tokenizer, rows, **settings):
    """transformers' generate, a row at a time."""
    found = []
    for row in rows:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        ids = model.generate(**inputs, do_sample=False, **settings)
        new = ids[0, inputs["input_ids"].shape[1] :]
        found.append(tokenizer.decode(new, skip_special_tokens=True))
    return found


def test_answers_of_base_and_adapter(run_of, checkpoints, tmp_path, capsys):
    folder, data = run_of("llama")
    output = tmp_path / "found.json"
    flags = {"data": str(data), "limit": 5, "max_new_tokens": 6, "output": str(output)}
    results = evaluate(EvaluateConfig(adapter=str(folder), **flags))
    assert json.loads(output.read_text()) == results

    model = load_base(str(checkpoints("llama")), FP32)
    load_adapter(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [RECORDS["causal-lm"](i) for i in range(5)]
    wanted = [row["completion"] for row in rows]
    with disable_adapter(model):
        expected = {"base": plain_answers(model, tokenizer, rows, max_new_tokens=6)}
    expected["adapter"] = plain_answers(model, tokenizer, rows, max_new_tokens=6)
    for name, given in expected.items():
        assert [answer[name] for answer in results["answers"]] == given
        bleu = sacrebleu.corpus_bleu(given, [wanted], force=True).score
        assert results["scores"][name]["bleu"] == pytest.approx(bleu)
    assert [answer["wanted"] for answer in results["answers"]] == wanted
    assert [answer["request"] for answer in results["answers"]] == [row["prompt"] for row in rows]
    said = capsys.readouterr().out
    assert "Measured on 5 rows," in said and "5 answers of up to 6 tokens" in said
    assert said.count("    wanted ") == 3
    assert f"python -m qlora.chat --adapter {folder} --compare" in said


def test_a_merged_model_stands_alone(run_of, tmp_path, capsys):
    folder, data = run_of("llama")
    merged = str(tmp_path / "merged")
    merge(MergeConfig(adapter=str(folder), output_dir=merged, format="fp32"))
    results = evaluate(
        EvaluateConfig(
            model=merged, data=str(data), max_length=48, generate=False, compute_dtype="fp32"
        )
    )
    # merged in fp32 it is the function that was trained, to rounding: rows of 48, two layers
    assert results["scores"]["model"]["loss"] == pytest.approx(
        trained(folder)["eval_loss"], rel=1e-4
    )
    assert results["answers"] == []
    assert not (Path(merged) / "evaluation.json").exists()
    assert f"python -m qlora.chat --model {merged}" in capsys.readouterr().out


def test_rows_of_text_have_a_loss_alone(adapters, tmp_path, capsys):
    data = write_rows(tmp_path / "text.jsonl", [{"text": "some words"}, {"text": "and more"}])
    config = EvaluateConfig(adapter=str(adapters("llama")), data=str(data))
    results = evaluate(config)
    assert results["scores"]["base"].keys() == {"loss", "perplexity"}
    said = capsys.readouterr().out
    assert "text without questions" in said
    assert "All results are in" in said
    assert json.loads((adapters("llama") / "evaluation.json").read_text()) == results


def test_the_last_turn_of_a_chat_is_asked(adapters):
    tokenizer = AutoTokenizer.from_pretrained(adapters("llama"))
    messages = [
        {"role": role, "content": text}
        for role, text in zip(["user", "assistant"] * 2, ["a", "b", "c", " d\n"], strict=True)
    ]
    (question,) = questions_in([{"messages": messages}], tokenizer, "causal-lm")
    expected = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True)
    assert question.prompt == expected["input_ids"] and question.request == "c"
    assert tokenizer.decode(question.answer, skip_special_tokens=True) == " d\n"


def test_an_adapter_that_is_no_gain_is_said(adapters, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", map(RECORDS["causal-lm"], range(3)))
    folder = shutil.copytree(adapters("llama"), tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: 0 * t for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    config = EvaluateConfig(adapter=str(folder), data=str(data), generate=False)
    scores = evaluate(config)["scores"]
    assert scores["adapter"]["loss"] == scores["base"]["loss"]
    assert "no better than its base" in capsys.readouterr().out


def test_questions_that_do_not_fit_are_left_out(adapters, tmp_path, capsys):
    rows = [{"prompt": "x" * n, "completion": "y"} for n in (10, 500)]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    results = evaluate(EvaluateConfig(adapter=str(adapters("llama")), data=data, max_new_tokens=8))
    assert len(results["answers"]) == 1
    assert "1 of 2 questions do not fit" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no question of .* fits into the 512 tokens"):
        evaluate(EvaluateConfig(adapter=str(adapters("llama")), data=data, max_new_tokens=500))


def test_samples_do_nothing_to_a_terminal():
    answers = [{"request": "a\x1b[2Jb", "wanted": "c\nd", "model": "\a" * 9}]
    assert samples({"answers": answers}).split("\n") == [
        *("", "  a[2Jb", "    model    (nothing)", "    wanted   c d")
    ]


@pytest.fixture
def nothing_loads(monkeypatch):
    monkeypatch.setattr(
        "qlora.adapters.live.ResolvedModel.load", lambda self: pytest.fail("it was loaded")
    )


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"question": "a", "answer": "b"}], {}, "has the columns question, answer: wanted are"),
        ([{"prompt": "a", "completion": ""}], {}, "1 of 1 rows have no answer"),
        ([], {}, "has no rows"),
        (None, {"data": "gone.jsonl"}, "gone.jsonl does not exist"),
        (None, {"adapter": "nowhere"}, "adapter nowhere does not exist"),
        (None, {"output": "no/such/folder.json"}, "--output .* must be a file in a folder that"),
    ],
)
@pytest.mark.usefixtures("nothing_loads")
def test_mistakes_are_found_before_the_model_is_loaded(adapters, tmp_path, rows, settings, message):
    rows = [{"prompt": "a", "completion": "b"}] if rows is None else rows
    data = write_rows(tmp_path / "rows.jsonl", rows)
    config = {"adapter": str(adapters("llama")), "data": str(data), **settings}
    with pytest.raises(UserError, match=message):
        evaluate(EvaluateConfig(**config))


@pytest.mark.parametrize("output", [None, "results.json"])
@pytest.mark.usefixtures("nothing_loads")
def test_a_folder_that_cannot_be_written_to(output, adapters, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    place = output and str(tmp_path / output)
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(
        UserError, match=r"no write permission for .*: give a file elsewhere as --ou"
    ):
        evaluate(EvaluateConfig(adapter=str(adapters("llama")), data=str(data), output=place))


@pytest.mark.parametrize("text", ["config: [", "config:", "- a", "\xff"])
def test_a_damaged_run_file_is_as_good_as_none(text, adapters, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapters("llama"), folder)
    (folder / "run.yaml").write_text(text, encoding="latin-1")
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    config = EvaluateConfig(adapter=str(folder), data=str(data), generate=False)
    assert evaluate(config)["max_length"] == 512  # all that the model takes


@pytest.mark.usefixtures("nothing_loads")
def test_missing_packages_are_said_before_the_model_is_loaded(adapters, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "rows.jsonl", [RECORDS["causal-lm"](2)])
    monkeypatch.setattr("qlora.apps.evaluation.PACKAGES", {"no_such_package": "no-such-package"})
    with pytest.raises(UserError, match="pip install no-such-package"):
        evaluate(EvaluateConfig(adapter=str(adapters("llama")), data=str(data)))


def test_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "qlora.evaluate", "--adapter", "a"], capture_output=True, text=True
    )
    line = "error: missing --data: write a value here or in a --config file\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_a_model_of_any_dtype_is_measured_in_the_one_that_is_asked_for(checkpoints, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", map(RECORDS["causal-lm"], range(3)))
    found = {}
    for dtype in ("fp32", "bf16"):
        config = EvaluateConfig(
            model=str(checkpoints("llama")), data=str(data), generate=False, compute_dtype=dtype
        )
        found[dtype] = evaluate(config)["scores"]["model"]["loss"]
    # bf16 has 8 bits: the loss of a random model moves, and not far
    assert found["fp32"] == pytest.approx(found["bf16"], rel=0.05)
    assert found["fp32"] != found["bf16"]
