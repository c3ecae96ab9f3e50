"""`--adapter DIR`: a run that starts from a saved adapter."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from conftest import FP32, losses, quick_config, read_rows, refuses, require_same_adapter
from transformers import AutoModelForCausalLM

from qlora import LoraConfig, QuantConfig
from qlora.training.run import train


@pytest.fixture
def peft_adapter(checkpoints, tmp_path) -> Path:
    """An adapter that PEFT wrote, with values in B, on some layers, with one in full."""
    base = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
    settings: Any = {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]}
    config = peft.LoraConfig(r=4, lora_alpha=12, rank_pattern={"up_proj": 2}, **settings)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, replace(config, init_lora_weights=False))
    model.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


def test_a_run_starts_from_an_adapter_with_a_fresh_optimizer(quick_run, tmp_path, capsys):
    """From a checkpoint of another run: its loss goes on, steps and schedule begin anew."""
    adapter = shutil.copytree(quick_run.folder / "checkpoint-4", tmp_path / "saved")
    config = replace(quick_run.config, output_dir=str(tmp_path / "new"), adapter=str(adapter))
    folder = train(replace(config, lora=LoraConfig(), max_steps=3, samples=0))
    said = capsys.readouterr().out
    assert f"the run starts from the adapter in {adapter}, r 4, with a fresh optimizer" in said
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "learning_rate" in row] == [1, 2, 3]
    assert rows[0]["loss"] < losses(quick_run.folder)[0]
    recorded = yaml.safe_load((folder / "run.yaml").read_text())["config"]
    assert (recorded["adapter"], recorded["r"], recorded["lora_alpha"]) == (str(adapter), 4, 8)
    assert f"| started from | {adapter} |" in (folder / "README.md").read_text()


def test_an_adapter_of_peft_is_trained_on_and_resumed(peft_adapter, checkpoints, data, tmp_path):
    """With its ranks and its module in full; merged and live, PEFT reads the result."""
    base, named = checkpoints("llama"), {"adapter": str(peft_adapter), "lora": LoraConfig()}
    config = quick_config(base, data, tmp_path / "run", **named)
    folder = train(config)
    theirs = peft.PeftConfig.from_pretrained(peft_adapter)
    ours = peft.PeftConfig.from_pretrained(folder)
    for name in ("r", "lora_alpha", "rank_pattern", "target_modules", "modules_to_save"):
        assert getattr(ours, name) == getattr(theirs, name), name
    parts = train(replace(config, output_dir=str(tmp_path / "parts"), max_steps=2))
    peft_adapter.rename(tmp_path / "elsewhere")
    train(replace(config, output_dir=str(parts), resume=True))
    require_same_adapter(folder, parts)
    for other, words in (
        ({"lora": LoraConfig(r=8)}, "r 4, not 8"),
        ({"adapter": None}, "not None"),
    ):
        with refuses(parts, words):
            train(replace(config, output_dir=str(parts), resume=True, **other))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora": LoraConfig(r=8, use_dora=True)}, ("r 4, not 8", "leave out --r, --use-dora")),
        ({"quant": QuantConfig(blocksize=128)}, ("blocksize 64, not 128: leave out --blocksize",)),
        ({"task": "seq-cls"}, ("trained for task causal-lm, not seq-cls: give --task causal-lm",)),
        ({"adapter": "/nowhere"}, ("adapter /nowhere does not exist",)),
        ({"model": "qwen2"}, ("belongs to another base",)),
    ],
)
def test_other_settings_and_another_base_are_refused(
    settings, words, quick_run, checkpoints, tmp_path
):
    named = {"output_dir": str(tmp_path / "new"), "lora": LoraConfig(), "quant": FP32}
    named |= {"adapter": str(quick_run.folder)} | settings
    named["model"] = str(checkpoints(settings.get("model", "llama")))
    with refuses(tmp_path / "new", *words):
        train(replace(quick_run.config, **named))
