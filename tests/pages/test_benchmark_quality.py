"""benchmarks/quality.py: which runs it performs, and that it repeats none."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora.adapters.apply import apply_lora, trainable_parameters
from qlora.config import LoraConfig

SMOLLM2_135M = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The benchmark, with a results folder of its own."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import quality
    import results

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(quality, "FILE", tmp_path / "quality.jsonl")
    return quality


def test_targets_have_the_published_number_of_parameters(quality):
    # LoRA of rank 16 on SmolLM2-135M by PEFT: all linear, attention, MLP
    for place, wanted in (("all", 4_884_480), ("attention", 1_843_200), ("mlp", 3_041_280)):
        with torch.device("meta"):  # shapes alone
            model = AutoModelForCausalLM.from_config(SMOLLM2_135M)
        apply_lora(model, LoraConfig(r=16, **quality.PLACES[place]))
        assert trainable_parameters(model)[0] == wanted
    per_rank = {"all": 305_280, "attention": 115_200, "mlp": 190_080}
    matched = [r * per_rank[place] for place, r in quality.QUESTIONS["place"]]
    assert max(matched) / min(matched) < 1.03


def test_recorded_runs_are_not_repeated(quality, checkpoints, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.txt"
    data.write_text("".join(f"name : {i}||{i} is a cafe .\n" for i in range(40)))
    flags = ["--train", str(data), "--test", str(data), "--model", str(checkpoints("llama"))]
    command = ["quality.py", *flags, "--steps", "2", "--questions", "rate", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    # three rates each, whatever the tiny model's losses are
    monkeypatch.setattr(quality, "next_k", lambda found: None if len(found) > 2 else max(found) + 2)
    quality.main()
    lines = quality.FILE.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["place"] for row in rows] == ["full"] * 3 + ["all"] * 3
    assert quality.FILE.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    quality.FILE.write_text("\n".join(lines[:4]) + "\n")  # as if stopped there
    capsys.readouterr()
    quality.main()
    again = [json.loads(line) for line in quality.FILE.read_text().splitlines()]
    a_line_a_run, table = capsys.readouterr().out.split("\n\n")
    assert len(a_line_a_run.splitlines()) == 2 and "after 2 steps" in table
    assert [row["test_loss"] for row in again] == [row["test_loss"] for row in rows]
