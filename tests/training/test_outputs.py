"""Lines and files of a run: progress, memory, samples, the model card, the next commands."""

import inspect
import io
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import psutil
import pytest
import torch
from conftest import FP32, ROWS, axis, quick_config, read_rows, tiny_tokenizer, write_rows

from qlora import LoraConfig, load_adapter, load_base
from qlora.data.rows import prepare_data
from qlora.training import outputs, train
from qlora.training.outputs import PlainProgress, show_bytes
from qlora.training.samples import choose_samples, write_answers

LOGS = {"loss": 0.51234, "tokens_per_second": 1234.5, "peak_bytes": 3 * 2**29}
LINE = "loss 0.5123  1,234 tokens/s  peak 1.50 GiB"
EVALUATION = "evaluation loss 0.2500  accuracy 0.7500"


def shown_on(terminal: bool, monkeypatch: Any, *, begin: int = 0) -> str:
    """The standard error, a terminal or not, of a run of 10 steps, logged at step 6."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "100")
    progress = PlainProgress()
    state = SimpleNamespace(max_steps=10, is_world_process_zero=True, global_step=begin)
    progress.on_train_begin(None, state, None)
    for state.global_step in range(begin + 1, 11):
        progress.on_step_end(None, state, None)
        if state.global_step == 6:
            progress.on_log(None, state, None, LOGS)
            progress.on_prediction_step(None, state, None, eval_dataloader=[1, 2])
            progress.on_evaluate(None, state, None)
            progress.on_log(None, state, None, {"eval_loss": 0.25, "eval_accuracy": 0.75})
    progress.on_log(None, state, None, {"train_runtime": 3.0})  # prints nothing
    progress.on_train_end(None, state, None)
    progress.on_log(None, state, None, LOGS)  # after the end there is no bar
    return stream.getvalue()


def test_progress_on_a_terminal_and_elsewhere(monkeypatch, capsys):
    lines = f"step  6/10  {LINE}\nstep  6/10  {EVALUATION}\nstep 10/10  {LINE}\n"
    shown = shown_on(True, monkeypatch)
    assert f"left, {LINE}" in shown and "10/10 steps" in shown and "100%" in shown
    assert "0/2 [" in shown  # the bar of evaluation
    printed = capsys.readouterr().out
    assert all(line in printed for line in lines.splitlines())
    assert shown_on(False, monkeypatch) == ""
    assert capsys.readouterr().out == lines
    resumed = shown_on(True, monkeypatch, begin=5)  # else the time left is too short
    assert "0/10 steps" not in resumed.replace("10/10", "") and "5/10 steps" in resumed


CHILD = f"""
import re, sys, numpy
from pathlib import Path
{inspect.getsource(outputs.peak_resident_bytes)}
before = peak_resident_bytes()
numpy.ones(300_000_000, dtype=numpy.uint8)
print(peak_resident_bytes() - before)
"""


def test_peak_includes_freed_memory_and_excludes_the_parent():
    """The child imports no torch, whose own peak could hide the parent's."""
    ballast = bytearray(b"x" * 700_000_000)  # written to: resident in the parent
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, check=True)
    assert 290_000_000 < int(done.stdout) < 400_000_000
    assert len(ballast) == 700_000_000


def test_device_and_its_bytes():
    wanted = "CPU", psutil.virtual_memory().total
    if torch.cuda.is_available():
        wanted = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    assert outputs.device() == wanted
    assert show_bytes(5 * 2**29) == "2.50 GiB" and show_bytes(300 * 2**20) == "300 MiB"


OPEN = "<|im_start|>assistant\n"


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def chat(*texts: str) -> dict[str, Any]:
    roles = ("system", "user", "assistant")[-len(texts) :]
    turns = zip(roles, texts, strict=True)
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def rows_of(path: Path, records: list[dict[str, Any]], *, task="causal-lm", length=128) -> Any:
    write_rows(path, records)
    return prepare_data(str(path), tiny_tokenizer(), max_length=length, task=task)[0]


def generated(model: Any, tokenizer: Any, record: dict[str, Any]) -> str:
    model.eval().generation_config.max_length = None
    count = 2 * len(tokenizer(record["completion"] + "<|im_end|>")["input_ids"])
    user = [{"role": "user", "content": record["prompt"]}]
    return conftest.one_by_one(model, tokenizer, [user], use_cache=True, max_new_tokens=count)[0]


@pytest.mark.parametrize("case", axis(("llama", True), ("gemma", True), ("gemma", False)), ids=str)
def test_answers_equal_those_of_generate(case, quick_run, checkpoints, tmp_path, data):
    family, fast_path = case
    folder, base = quick_run.folder, checkpoints(family)
    if family != "llama":
        settings = {"samples": 3, "fast_path": fast_path}
        folder = train(quick_config(base, data, tmp_path / "run", **settings))
    rows, records = read_rows(folder / "samples.jsonl"), [ROWS[0], ROWS[13], ROWS[26]]
    assert [row["prompt"] for row in rows] == [record["prompt"] for record in records]
    assert [row["wanted"] for row in rows] == [record["completion"] for record in records]
    tokenizer, model = tiny_tokenizer(), load_base(str(base), FP32)
    assert [row["before"] for row in rows] == [generated(model, tokenizer, r) for r in records]
    load_adapter(model, folder)
    assert [row["after"] for row in rows] == [generated(model, tokenizer, r) for r in records]
    assert all(row["before"] != row["after"] for row in rows)


def test_samples_leave_training_bit_exact(checkpoints, tmp_path, data, monkeypatch):
    """With dropout and a random order of rows; the adapter is saved before the last answers."""
    config = quick_config(checkpoints("llama"), data, tmp_path / "without")
    config = replace(config, lora=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1))
    train(config)

    def interrupted(folder, when, *rest):
        if when == "after":
            raise KeyboardInterrupt
        write_answers(folder, when, *rest)

    monkeypatch.setattr("qlora.training.run.write_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, output_dir=str(tmp_path / "with"), samples=3))
    assert all(row["before"] for row in read_rows(tmp_path / "with" / "samples.jsonl"))
    assert conftest.losses(tmp_path / "with") == conftest.losses(tmp_path / "without")
    conftest.require_same_adapter(tmp_path / "with", tmp_path / "without")
    assert not (tmp_path / "without" / "samples.jsonl").exists()


def test_answers_keep_the_other_column(checkpoints, tmp_path):
    """Also if a prompt has several answers; a column that was not generated is None. The prompt of
    several turns is shown with its template."""
    words = [("Say a word.", word) for word in ("bee", "cat", "dog")]
    records = [chat(*texts) for texts in (*words, ("Be kind.", "a", "bb"))]
    rows = rows_of(tmp_path / "words.jsonl", records)
    samples = choose_samples("causal-lm", 4, rows, None, 128)
    model, tokenizer = load_base(str(checkpoints("llama")), FP32), tiny_tokenizer()
    write_answers(tmp_path, "after", samples, model, tokenizer)
    first = read_rows(tmp_path / "samples.jsonl")
    assert [row["wanted"] for row in first] == ["bee", "cat", "dog", "bb"]
    assert first[3]["prompt"] == turn("system", "Be kind.") + turn("user", "a") + OPEN
    assert all(row["before"] is None and row["after"] is not None for row in first)
    write_answers(tmp_path, "before", samples, model, tokenizer)
    second = read_rows(tmp_path / "samples.jsonl")
    assert second == [row | {"before": row["after"]} for row in first]


def test_answers_of_an_encoder_decoder_equal_those_of_generate(checkpoints, tmp_path):
    records, tokenizer = ROWS[12:14], tiny_tokenizer()
    rows = rows_of(tmp_path / "pairs.jsonl", records, task="seq2seq")
    model = load_base(str(checkpoints("t5")), FP32, task="seq2seq").eval()
    samples = choose_samples("seq2seq", 2, rows, None, 128)
    write_answers(tmp_path, "before", samples, model, tokenizer)
    for row, record in zip(read_rows(tmp_path / "samples.jsonl"), records, strict=True):
        ids = torch.tensor([tokenizer(record["prompt"])["input_ids"]])
        count = 2 * len(tokenizer(record["completion"])["input_ids"])
        answer = model.generate(input_ids=ids, do_sample=False, max_new_tokens=count)
        assert row["before"] == tokenizer.decode(answer[0], skip_special_tokens=True)
        assert row["prompt"] == record["prompt"]


def test_samples_come_from_evaluation_data_and_not_for_a_classifier(tmp_path, capsys):
    training = rows_of(tmp_path / "training.jsonl", ROWS)
    evaluation = rows_of(tmp_path / "evaluation.jsonl", ROWS[:2])
    assert len(choose_samples("causal-lm", 5, training, evaluation, 128)) == 2
    assert "samples.jsonl: answers to 2 rows of the evaluation data" in capsys.readouterr().out
    assert len(choose_samples("causal-lm", 5, training, None, 128)) == 5
    assert choose_samples("seq-cls", 5, training, evaluation, 128) == []


CHAT = {"messages": [*chat("a", "bb")["messages"], *chat("ccc", "dddd")["messages"]]}
FIRST_TURNS = turn("user", "a") + turn("assistant", "bb") + turn("user", "ccc") + OPEN
LONG = {"prompt": "a", "completion": "b" * 900}


@pytest.mark.parametrize(
    ("record", "task", "length", "prompt", "answer", "max_new_tokens"),
    [
        (CHAT, "causal-lm", 128, FIRST_TURNS, "dddd<|im_end|>", 2 * 5),
        ({"text": "0123456789"}, "causal-lm", 128, "012345", "6789<|im_end|>", 2 * 5),
        ({"text": "a" * 900}, "causal-lm", 512, "a" * 256, "a" * 256, 128),
        (ROWS[0], "seq2seq", 128, "0 times 0", "0 ", 2 * 2),
        (LONG, "causal-lm", 512, turn("user", "a") + OPEN, None, 128),
        (LONG, "causal-lm", 64, turn("user", "a") + OPEN, None, "the rest"),
    ],
)
def test_sample_of_each_kind_of_row(record, task, length, prompt, answer, max_new_tokens, tmp_path):
    tokenizer = tiny_tokenizer()
    rows = rows_of(tmp_path / "one.jsonl", [record], task=task, length=length)
    (sample,) = choose_samples(task, 1, rows, None, length)
    assert tokenizer.decode(sample.prompt) == prompt
    assert answer is None or tokenizer.decode(sample.answer) == answer
    if max_new_tokens == "the rest":  # of the positions that the model has
        max_new_tokens = length - len(sample.prompt)
    assert sample.max_new_tokens == max_new_tokens


SETTINGS: dict[str, Any] = {
    "task": "causal-lm", "data": "mine.jsonl", "learning_rate": 1.32e-3, "r": 16,
    "lora_alpha": 32, "target_modules": "all-linear",
}  # fmt: skip
BASE = {"quant_type": "nf4", "blocksize": 64, "double_quant": True}


@pytest.mark.parametrize("base_model", ["owner/name", "/home/me/model"])
def test_results_name_the_last_losses_and_commands_to_copy(base_model, tmp_path, capsys):
    folder, is_local = tmp_path / "a run", base_model.startswith("/")
    folder.mkdir()
    rows = [{"step": i, "loss": 3 / i} for i in (1, 2)]
    write_rows(folder / "metrics.jsonl", [*rows, {"step": 2, "eval_loss": 0.25}] * (not is_local))
    outputs.write_results(
        folder, SETTINGS, BASE | {"resolved": base_model}, rows="400 rows", steps=(2, 2)
    )
    card = (folder / "README.md").read_text()
    at_end = "training loss 1.5000, evaluation loss 0.2500"
    for words in ("NF4", "rank 16", "mine.jsonl (400 rows)", "not logged" if is_local else at_end):
        assert words in card
    assert ("base_model: owner/name" in card) != is_local  # a local folder has no name on the hub
    assert f"# LoRA adapter for {Path(base_model).name}" in card
    lines = capsys.readouterr().out.splitlines()
    report, chat, merge = (shlex.split(line.partition(":")[2]) for line in lines[-3:])
    assert report == ["python", "-m", "qlora.report", str(folder)]
    assert chat == ["python", "-m", "qlora.chat", "--adapter", str(folder), "--compare"]
    flags = ["--adapter", str(folder), "--output-dir", f"{folder}-merged"]
    assert merge == ["python", "-m", "qlora", "merge", *flags]
