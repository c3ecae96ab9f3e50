"""A merge that fails raises one clear line and leaves no output that looks whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from merging import merged, refused, run_merge, trained
from safetensors.torch import load_file, save_file

from qlora import UserError
from qlora.base.shards import INDEX, SINGLE


@pytest.fixture
def adapter(tmp_path):
    """An adapter over a base of several shards, `base` beside it, to damage."""
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(base)
    return trained(base, tmp_path / "adapter").adapter


DOWN, NAN = "model.layers.0.mlp.down_proj.weight", torch.nan
NAN_MATCH = r"down_proj\.weight has NaN.*if the base itself has NaN, download it again"


@pytest.mark.parametrize(
    ("name", "value", "settings", "match"),
    [
        (DOWN, None, {}, r"model-00.* is damaged or cut short .*download or copy it again"),
        (DOWN, NAN, {}, NAN_MATCH),
        (DOWN, NAN, {"format": "nf4", "calibration": "none"}, NAN_MATCH),
        ("lm_head.weight", 1e6, {"format": "fp16"}, "lm_head.*--format bf16"),
        ("model.norm.weight", 9, {}, r"another base.*Give the base it was trained on"),
    ],
)
def test_one_line_and_nothing_is_left(name, value, settings, match, adapter, tmp_path):
    """With another first value of a tensor, or its file cut short."""
    base = tmp_path / "base"
    shard = base / json.loads((base / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    if value is None:
        os.truncate(shard, shard.stat().st_size - 100)
    else:
        tensors[name].view(-1)[0] = value
        save_file(tensors, shard, metadata={"format": "pt"})
    refused(adapter, tmp_path / "out", match, **settings)


def test_an_infinity_of_the_base_is_copied(adapter, tmp_path):
    """As the bounds of Gemma 4's clipped layers are."""
    base = tmp_path / "base"
    shard = base / json.loads((base / INDEX).read_text())["weight_map"]["lm_head.weight"]
    tensors = load_file(shard)
    tensors["lm_head.weight"].view(-1)[:2] = torch.tensor([torch.inf, -torch.inf])
    save_file(tensors, shard, metadata={"format": "pt"})
    head = merged(adapter, tmp_path / "out")["lm_head.weight"]
    assert head.view(-1)[:2].tolist() == [torch.inf, -torch.inf]


def test_settings_and_outputs(adapter, tmp_path, monkeypatch):
    out = tmp_path / "out"
    refused(tmp_path / "none", out, "does not exist.*adapter_config.json")
    refused(adapter, out, "nothing.jsonl", verify="nothing.jsonl")
    mine = tmp_path / "base" / "config.json"
    text = mine.read_text()
    refused(adapter, mine / "out", "is not a writable folder")
    refused(adapter, mine.parent, "already holds something: give a new folder")
    for name in ("x" * 240, "x" * 300, f"{'x' * 300}/out", "x/" * 2000):  # of at most 255
        with pytest.raises(UserError, match=r"^\S{80}\.{3} cannot be created: its name has"):
            run_merge(adapter, tmp_path / name)
    merged(adapter, tmp_path / ("é" * 110), format="fp32")
    assert mine.read_text() == text
    refused(adapter, out, "must look like 5GB.*got '5'", max_shard_size="5")
    (adapter / "run.yaml").write_text("config: [")
    refused(adapter, out, "run.yaml is not a run file of train.py, or damaged", format="nf4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(adapter, out, "no GPU: use --device cpu", device="cuda")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    refused(adapter, out, "free disk space")


def test_a_killed_merge_leaves_no_output_and_runs_again(adapter, tmp_path):
    output, script = tmp_path / "out", Path(__file__).parents[2] / "merge_dequant.py"
    command = [sys.executable, script, "--adapter", adapter, "--output-dir", output]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and not list(tmp_path.glob(".out.partial-*")):
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob(".out.partial-*"))
    assert not output.exists()
    run_merge(adapter, output, max_shard_size="1GB")
    assert (output / SINGLE).exists()
    assert not list(tmp_path.glob(".out.partial-*"))
