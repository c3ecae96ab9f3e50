"""Answers before and after: those of transformers' own generate, and training goes as without."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chunks import chunks_of
from conftest import FP32, VOCAB, tiny_tokenizer
from conftest import quick_run as config
from safetensors.torch import load_file

from qlora.adapters.files import load_adapter
from qlora.base.load import load_base
from qlora.config import DataConfig, LoraConfig, TrainConfig
from qlora.data.rows import prepare_data
from qlora.errors import UserError
from qlora.training import train
from qlora.training.outputs import ask, questions

ROWS = [{"prompt": f"{i} times {i}", "completion": f"{i * i} " * (1 + i % 5)} for i in range(40)]


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return lines(tmp_path / "data.jsonl", ROWS)


def read(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def generated(model: Any, tokenizer: Any, record: dict[str, Any]) -> str:
    """What the model answers, by transformers alone."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": record["prompt"]}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    wanted = tokenizer(record["completion"] + "<|im_end|>")["input_ids"]
    model.eval()
    model.generation_config.max_length = None
    ids = model.generate(
        **inputs, do_sample=False, use_cache=True, pad_token_id=0, max_new_tokens=2 * len(wanted)
    )
    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text)


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_answers_are_those_of_generate(family, fast_path, checkpoints, tmp_path, data, capsys):
    base = checkpoints(family)
    with chunks_of(8 * VOCAB):
        output = train(config(base, data, tmp_path / "run", fast_path=fast_path))
    rows = read(output)
    asked = [ROWS[0], ROWS[13], ROWS[26]]
    assert [row["prompt"] for row in rows] == [record["prompt"] for record in asked]
    assert [row["wanted"] for row in rows] == [record["completion"] for record in asked]
    tokenizer, model = tiny_tokenizer(), load_base(str(base), FP32)
    assert [row["before"] for row in rows] == [generated(model, tokenizer, r) for r in asked]
    load_adapter(model, output)
    assert [row["after"] for row in rows] == [generated(model, tokenizer, r) for r in asked]
    assert all(row["before"] != row["after"] for row in rows)
    assert "3 rows of the training data are answered: samples.jsonl" in capsys.readouterr().out


def test_training_goes_as_without(checkpoints, tmp_path, data):
    """To the bit, with dropout and a random order; before and after are asked of it."""
    base, found = checkpoints("llama"), []
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1)
    for count in (0, 3):
        output = train(config(base, data, tmp_path / str(count), samples=count, lora=lora))
        metrics = (output / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in metrics]
        found.append((losses, load_file(output / "adapter_model.safetensors")))
        assert (output / "samples.jsonl").exists() is (count > 0)
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], tensor) for name, tensor in found[1][1].items())


def test_a_run_that_goes_on_keeps_what_was_answered_before(checkpoints, tmp_path, data):
    base = checkpoints("llama")
    whole = read(train(config(base, data, tmp_path / "whole", samples=2)))
    output = train(config(base, data, tmp_path / "parts", samples=2, max_steps=2))
    rows = read(train(config(base, data, output, samples=2, resume=True)))
    assert rows == whole and all(row["before"] for row in rows)
    # asked for late: nothing is known of before
    output = train(config(base, data, tmp_path / "late", samples=0, max_steps=2))
    rows = read(train(config(base, data, output, samples=2, resume=True)))
    assert [row["before"] for row in rows] == [None, None]
    assert [row["after"] for row in rows] == [row["after"] for row in whole]


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("samples.jsonl", '{"prompt": "a", "wan', "a JSON object is wanted"),
        ("samples.jsonl", '{"question": "a"}', "it has no prompt, wanted, before, after"),
        ("metrics.jsonl", '{"loss": 1.0}', "it has no step"),
    ],
)
def test_a_damaged_file_of_the_run_is_said_before_it_goes_on(
    name, line, said, checkpoints, tmp_path, data
):
    base = checkpoints("llama")
    output = train(config(base, data, tmp_path / "run", samples=1, max_steps=1))
    with (output / name).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    there = {path: path.read_bytes() for path in output.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=rf"{name}, line \d: {said}.*: remove that line"):
        train(config(base, data, output, samples=1, resume=True))
    assert {path: path.read_bytes() for path in output.iterdir() if path.is_file()} == there


def test_one_prompt_may_want_several_answers(checkpoints, tmp_path):
    rows = [{"prompt": "Say a word.", "completion": word} for word in ("bee", "cat", "dog", "elk")]
    data = lines(tmp_path / "words.jsonl", rows)
    asked = read(train(config(checkpoints("llama"), data, tmp_path / "run", samples=4)))
    assert [row["wanted"] for row in asked] == ["bee", "cat", "dog", "elk"]
    assert all(row["before"] is not None and row["after"] is not None for row in asked)


def test_the_adapter_is_saved_before_the_last_answers(checkpoints, tmp_path, data, monkeypatch):
    """What they may run into, a full memory or Ctrl-C, costs no training."""

    def stopped(path, when, *rest):
        if when == "after":
            raise KeyboardInterrupt
        ask(path, when, *rest)

    monkeypatch.setattr("qlora.training.run.ask", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(config(checkpoints("llama"), data, tmp_path / "run"))
    load_adapter(load_base(str(checkpoints("llama")), FP32), tmp_path / "run")


def test_it_is_the_evaluation_data_that_is_asked(checkpoints, tmp_path, data, capsys):
    other = lines(tmp_path / "eval.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    settings = config(checkpoints("llama"), data, tmp_path / "run", samples=5, max_steps=1)
    output = train(replace(settings, data=replace(settings.data, eval_data=str(other))))
    assert [row["prompt"] for row in read(output)] == ["a", "a"]
    assert "2 rows of the evaluation data are answered" in capsys.readouterr().out


def asked(path: Path, *, tokenizer: Any = None, **settings: Any) -> list[Any]:
    tokenizer = tokenizer or tiny_tokenizer()
    made = config(path, path, path, **{"samples": 1, **settings})
    length = made.data.max_length
    rows, _ = prepare_data(str(path), tokenizer, max_length=length, task=made.task)
    return questions(made, rows, None, length)


def test_what_is_asked_of_each_kind_of_row(tmp_path):
    tokenizer = tiny_tokenizer()
    turns = [("user", "a"), ("assistant", "bb"), ("user", "ccc"), ("assistant", "dddd")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (last,) = asked(lines(tmp_path / "chat.jsonl", [chat]))
    wanted = tokenizer.apply_chat_template(
        chat["messages"][:3], add_generation_prompt=True, return_dict=False
    )
    assert last.prompt == wanted and tokenizer.decode(last.wanted) == "dddd<|im_end|>"
    assert last.max_new_tokens == 2 * 5
    (text,) = asked(lines(tmp_path / "text.jsonl", [{"text": "0123456789"}]))
    assert tokenizer.decode(text.prompt + text.wanted) == "0123456789<|im_end|>"
    assert len(text.prompt) == 6
    (pair,) = asked(lines(tmp_path / "pair.jsonl", ROWS[:1]), task="seq2seq")
    assert tokenizer.decode(pair.prompt) == "0 times 0" and tokenizer.decode(pair.wanted) == "0 "
    long = {"prompt": "a", "completion": "b" * 900}
    room = DataConfig("", max_length=512)
    (cut,) = asked(lines(tmp_path / "long.jsonl", [long]), data=room)
    assert cut.max_new_tokens == 128
    (cut,) = asked(lines(tmp_path / "long.jsonl", [{"text": "a" * 900}]), data=room)
    assert len(cut.prompt) == 256
    room = DataConfig("", max_length=128)
    (cut,) = asked(lines(tmp_path / "long.jsonl", [long]), data=room)
    assert len(cut.prompt) + cut.max_new_tokens == 128  # no more than the model has positions for


def test_a_prompt_is_shown_without_what_the_template_puts_around_it(checkpoints, tmp_path):
    """Of one turn; a chat of several is shown with its marks."""
    turns = [("system", "Be kind."), ("user", "a"), ("assistant", "b")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    path = lines(tmp_path / "chat.jsonl", [chat])
    output = train(config(checkpoints("llama"), path, tmp_path / "run", max_steps=1))
    assert [row["prompt"] for row in read(output)] == [
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\n"
    ]


def test_an_encoder_decoder_answers(checkpoints, tmp_path, data):
    settings = config(checkpoints("t5"), data, tmp_path / "run", task="seq2seq")
    rows = read(train(settings))
    tokenizer = tiny_tokenizer()
    model = load_base(settings.model, FP32, task="seq2seq").eval()
    for row, record in zip(rows, (ROWS[0], ROWS[13], ROWS[26]), strict=True):
        ids = torch.tensor([tokenizer(record["prompt"])["input_ids"]])
        count = 2 * len(tokenizer(record["completion"])["input_ids"])
        answer = model.generate(input_ids=ids, do_sample=False, max_new_tokens=count)
        assert row["before"] == tokenizer.decode(answer[0], skip_special_tokens=True)
        assert row["prompt"] == record["prompt"] and row["after"] is not None


def test_a_classifier_is_not_asked(checkpoints, tmp_path):
    path = lines(tmp_path / "rows.jsonl", [{"text": f"{i}", "label": i % 2} for i in range(8)])
    made = config(checkpoints("llama"), path, tmp_path / "run", task="seq-cls", max_steps=1)
    assert not (train(made) / "samples.jsonl").exists()


def test_samples_cannot_be_fewer_than_none():
    with pytest.raises(UserError, match="samples must be at least 0, got -1"):
        TrainConfig(model="m", output_dir="o", data=DataConfig("d"), samples=-1)
