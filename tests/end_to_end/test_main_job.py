"""The scripts as a person runs them: train, open elsewhere, merge, use; and mistakes."""

import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import peft
import pytest
import torch
import yaml
from conftest import FP32, read_rows, require_same_adapter, tiny_model, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora import load_adapter, load_base

REPOSITORY = Path(__file__).parents[2]


def script(name: str, *words: object) -> int:
    """Run train.py or merge_dequant.py in this process; its exit code."""
    before = sys.argv
    sys.argv = [name, *map(str, words)]
    try:
        runpy.run_path(str(REPOSITORY / name), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


def train(base: Path, data: Path, output: Path, *more: object) -> int:
    return script(
        "train.py", "--model", base, "--data", data, "--output-dir", output,
        "--max-length", 128, "--max-steps", 3, "--logging-steps", 1, "--r", 4,
        "--learning-rate", 0.01, "--compute-dtype", "fp32", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(checkpoints, data, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run by train.py, and what it printed; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("main job") / "run"
    with redirect_stdout(StringIO()) as said:
        assert train(checkpoints("llama"), data, folder, "--eval-data", data) == 0
    return folder, said.getvalue()


def test_train_open_merge_use(trained, checkpoints, data, tmp_path, capsys):
    base, (run, said), out = checkpoints("llama"), trained, tmp_path / "merged"
    for words in ("40 rows", "supervised", "⟦", "trainable", "merge_dequant.py --adapter"):
        assert words in said
    assert script("merge_dequant.py", "--adapter", run, "--output-dir", out,
                  "--format", "fp32", "--verify", data) == 0  # fmt: skip
    assert "base + live adapter" in capsys.readouterr().out

    ids = token_ids()
    live = load_adapter(load_base(str(base), FP32), run)
    theirs = peft.PeftModel.from_pretrained(load_base(str(base), FP32), run)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        logits = live(ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(merged(ids).logits, logits, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_run_file_is_a_recipe_for_the_same_run(trained, tmp_path):
    run, again = trained[0], tmp_path / "again"
    assert script("train.py", "--config", run / "run.yaml", "--output-dir", again) == 0
    require_same_adapter(run, again)


def test_resume_from_the_command_line(trained, checkpoints, data, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    assert train(checkpoints("llama"), data, run, "--resume", "--max-steps", 5) == 0
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2, 3, 4, 5]


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
    "broken.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comple\n',
    "no_answer.jsonl": '{"prompt": "a", "completion": ""}\n',
    "columns.jsonl": '{"question": "a", "answer": "b"}\n',
}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "/nowhere/at/all"], "does not exist"),
        (["--model", "."], "is no model: it holds no config.json"),
        (["--data", "broken.jsonl"], "line 2"),
        (["--data", "no_answer.jsonl"], "row"),
        (["--data", "columns.jsonl"], "question, answer"),
        (["--target-modules", "query"], "'query' matches no layer"),
        (["--learning-rte", "1"], "--learning-rate"),
        (["--config", "typo.yaml"], "lora_alpha"),
        (["--plan"], "not supported yet"),
        (["--packing", "--task", "seq-cls"], "packing is for task causal-lm"),
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


def test_adapter_for_another_base(trained, tmp_path, capsys):
    tiny_model("llama", seed=5).save_pretrained(tmp_path / "other")
    code = script("merge_dequant.py", "--adapter", trained[0], "--output-dir",
                  tmp_path / "merged", "--base-model", tmp_path / "other")  # fmt: skip
    assert code == 2
    one_line(capsys.readouterr().err, "belongs to another base")
    assert not (tmp_path / "merged").exists()


def one_line(stderr: str, said: str) -> None:
    """The last line is the error; before it there may be progress bars, never a traceback."""
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert "Traceback" not in stderr
    assert lines[-1].startswith("error: ") and said in lines[-1], lines[-1]
