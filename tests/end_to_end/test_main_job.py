"""The scripts as a person runs them: train, open elsewhere, merge, use; and mistakes."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import yaml
from conftest import FP32, tiny_model, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora import load_adapter, load_base

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"double {i}", "completion": str(2 * i)} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def script(name: str, *words: object) -> int:
    """Run train.py or merge_dequant.py in this process; its exit code."""
    before = sys.argv
    sys.argv = [name, *map(str, words)]
    try:
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(REPOSITORY / name), run_name="__main__")
    finally:
        sys.argv = before
    return int(stop.value.code or 0)


def train(base: Path, data: Path, output: Path, *more: object) -> int:
    return script(
        "train.py", "--model", base, "--data", data, "--output-dir", output,
        "--max-length", 128, "--max-steps", 3, "--logging-steps", 1, "--r", 4,
        "--learning-rate", 0.01, "--compute-dtype", "fp32", *more,
    )  # fmt: skip


def test_train_open_merge_use(checkpoints, data, tmp_path, capsys):
    base, run, out = checkpoints("llama"), tmp_path / "run", tmp_path / "merged"
    assert train(base, data, run, "--eval-data", data) == 0
    said = capsys.readouterr().out
    for wanted in ("24 rows", "supervised", "⟦", "trainable", "merge_dequant.py --adapter"):
        assert wanted in said
    assert script("merge_dequant.py", "--adapter", run, "--output-dir", out,
                  "--format", "fp32", "--verify", data) == 0  # fmt: skip
    assert "base + live adapter" in capsys.readouterr().out

    ids = token_ids()
    live = load_adapter(load_base(str(base), FP32), run)
    theirs = peft.PeftModel.from_pretrained(load_base(str(base), FP32), run)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        wanted = live(ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(merged(ids).logits, wanted, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_a_run_file_is_a_recipe_for_the_same_run(checkpoints, data, tmp_path):
    assert train(checkpoints("llama"), data, tmp_path / "one") == 0
    again = script("train.py", "--config", tmp_path / "one" / "run.yaml",
                   "--output-dir", tmp_path / "two")  # fmt: skip
    assert again == 0
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_resume_from_the_command_line(checkpoints, data, tmp_path):
    base, run = checkpoints("llama"), tmp_path / "run"
    assert train(base, data, run, "--save-steps", 2) == 0
    assert train(base, data, run, "--save-steps", 2, "--resume", "--max-steps", 5) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]


def test_one_line_and_no_traceback_in_a_process_of_its_own(tmp_path):
    words = ["--model", "/nowhere/at/all", "--data", "x.jsonl", "--output-dir", "out"]
    done = subprocess.run(
        [sys.executable, REPOSITORY / "train.py", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: model /nowhere/at/all does not exist")
    assert list(tmp_path.iterdir()) == []


# ---- every mistake: one line, exit 2, nothing written or lost ----

BAD_FILES = {
    "empty.jsonl": "",
    "broken.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comple\n',
    "no_answer.jsonl": '{"prompt": "a", "completion": ""}\n',
    "columns.jsonl": '{"question": "a", "answer": "b"}\n',
    "picture.png": "not data",
}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "/nowhere/at/all"], "does not exist"),
        (["--model", "."], "is no model: it holds no config.json"),
        (["--data", "nothing.jsonl"], "nothing.jsonl"),
        (["--data", "empty.jsonl"], "empty.jsonl"),
        (["--data", "broken.jsonl"], "line 2"),
        (["--data", "no_answer.jsonl"], "row"),
        (["--data", "columns.jsonl"], "question, answer"),
        (["--data", "picture.png"], ".png"),
        (["--target-modules", "query"], "'query' matches no layer"),
        (["--learning-rte", "1"], "--learning-rate"),
        (["--config", "typo.yaml"], "lora_alpha"),
        (["--plan"], "not there yet"),
        (["--packing", "--task", "seq-cls"], "packing is for task causal-lm"),
        (["--resume"], "no checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_in_training(flags, said, checkpoints, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in BAD_FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump({"lora_alhpa": 16}))
    before = sorted(p.name for p in tmp_path.iterdir())
    assert train(checkpoints("llama"), data, tmp_path / "out", *flags) == 2
    one_line(capsys.readouterr().err, said)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_an_output_folder_that_holds_a_run(checkpoints, data, tmp_path, capsys):
    base, run = checkpoints("llama"), tmp_path / "run"
    assert train(base, data, run) == 0
    kept = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert train(base, data, run) == 2
    one_line(capsys.readouterr().err, "already holds a run")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == kept


def test_an_adapter_for_another_base(checkpoints, data, tmp_path, capsys):
    assert train(checkpoints("llama"), data, tmp_path / "run") == 0
    tiny_model("llama", seed=5).save_pretrained(tmp_path / "other")
    capsys.readouterr()
    code = script("merge_dequant.py", "--adapter", tmp_path / "run", "--output-dir",
                  tmp_path / "merged", "--base-model", tmp_path / "other")  # fmt: skip
    assert code == 2
    one_line(capsys.readouterr().err, "belongs to another base")
    assert not (tmp_path / "merged").exists()


def one_line(stderr: str, said: str) -> None:
    """The last line is the error; before it there may be progress bars, never a traceback."""
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert "Traceback" not in stderr
    assert lines[-1].startswith("error: ") and said in lines[-1], lines[-1]
