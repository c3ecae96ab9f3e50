"""What goes wrong in a merge is one clear line, and never an output that looks whole."""

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
from conftest import FP32, tiny_model, tiny_tokenizer
from merging import refused, run_merge, trained
from merging import trained_on as trained_on
from safetensors.torch import load_file, save_file

from qlora.base.load import load_base
from qlora.base.shards import INDEX, SINGLE
from qlora.config import QuantConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A base of several shards, and an adapter over it."""
    root = tmp_path_factory.mktemp("sound")
    tiny_model("llama").save_pretrained(root / "base", max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(root / "base")
    trained(root / "base", root / "adapter")
    return root


@pytest.fixture
def base(sound, tmp_path):
    """A copy of that base, to spoil."""
    return shutil.copytree(sound / "base", tmp_path / "base")


@pytest.fixture
def adapter(sound, base, tmp_path):
    """A copy of that adapter, over the copied base."""
    folder = shutil.copytree(sound / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# ---- spoilt files ----


def second_shard(base: Path) -> Path:
    return sorted(base.glob("model-*.safetensors"))[1]


def cut_short(base: Path, adapter: Path) -> None:
    os.truncate(second_shard(base), second_shard(base).stat().st_size - 100)


def damage_header(base: Path, adapter: Path) -> None:
    second_shard(base).write_bytes(b"\xff" * 16 + second_shard(base).read_bytes()[16:])


def remove_shard(base: Path, adapter: Path) -> None:
    second_shard(base).unlink()


def index_outside(base: Path, adapter: Path) -> None:
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (base / INDEX).write_text(json.dumps(index))


def change_base(base: Path, name: str, value: float) -> None:
    shard = base / json.loads((base / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][0, 0] = value
    save_file(tensors, shard, metadata={"format": "pt"})


def nan_in_base(base: Path, adapter: Path) -> None:
    change_base(base, "model.layers.0.mlp.down_proj.weight", torch.nan)


def change_adapter(adapter: Path, change) -> None:
    path = adapter / "adapter_model.safetensors"
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(size))["__metadata__"]
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def nan_in_adapter(base: Path, adapter: Path) -> None:
    change_adapter(adapter, lambda tensors, _: next(iter(tensors.values())).fill_(torch.nan))


def other_base(base: Path, adapter: Path) -> None:
    def change(_, metadata):
        metadata["qlora"] = json.dumps(json.loads(metadata["qlora"]) | {"fingerprint": "0" * 64})

    change_adapter(adapter, change)


def cut_adapter(base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (cut_short, r"model-00002.* is damaged or cut short .*download or copy it again"),
        (damage_header, r"model-00002.* is damaged or cut short"),
        (remove_shard, r"lacks model-00002.*, listed in its index"),
        (index_outside, r"lists files outside its folder.*: \.\./elsewhere\.safetensors"),
        (nan_in_base, r"down_proj\.weight .*NaN.*if the base itself has NaN, download it again"),
        (nan_in_adapter, r"lora_A\.weight holds NaN or infinity"),
        (other_base, r"belongs to another base.*Give the base it was trained on"),
        (cut_adapter, r"adapter_model\.safetensors is damaged or cut short"),
    ],
)
def test_one_line_and_nothing_is_left(spoil, match, base, adapter, tmp_path):
    spoil(base, adapter)
    formats = [{}, {"format": "nf4", "calibration": "none"}]
    for settings in formats if spoil is nan_in_base else formats[:1]:
        refused(adapter, tmp_path / "out", match, **settings)


# ---- inputs that do not belong together, outputs that cannot be written ----


def test_a_base_that_is_already_4_bit(trained_on, checkpoints, tmp_path):
    """Codes of another quantization are not those trained on; --onto original has no original."""
    load_base(str(checkpoints("llama")), FP32).save_pretrained(tmp_path / "four")
    quant = QuantConfig(blocksize=32, compute_dtype="fp32")
    adapter = trained(checkpoints("llama"), tmp_path / "adapter", quant).adapter
    four, out = str(tmp_path / "four"), tmp_path / "out"
    match = r"is NF4 of blocksize 64.*trained on NF4 of blocksize 32"
    refused(adapter, out, match, base_model=four)
    adapter = trained_on("llama").adapter
    match = r"--onto original .* is 4-bit.*--base-model"
    refused(adapter, out, match, base_model=four, onto="original")


def test_values_beyond_fp16(base, adapter, tmp_path):
    change_base(base, "lm_head.weight", 1e6)
    refused(adapter, tmp_path / "out", "lm_head.*--format bf16", format="fp16")


def test_settings_and_outputs_that_are_refused(trained_on, tmp_path, monkeypatch):
    adapter, out = trained_on("llama").adapter, tmp_path / "out"
    refused(tmp_path / "none", out, "does not exist.*adapter_config.json")
    refused(adapter, out, "nothing.jsonl", verify="nothing.jsonl")
    (tmp_path / "file.txt").write_text("precious")
    refused(adapter, tmp_path / "file.txt" / "out", "no folder that can be written to")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("precious")
    refused(adapter, tmp_path / "used", "already holds something: give a new folder")
    assert (tmp_path / "used" / "mine.txt").read_text() == "precious"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(adapter, out, "no GPU: use --device cpu", device="cuda")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    refused(adapter, out, "free disk space")


# ---- as a script ----


def test_a_killed_merge_leaves_nothing_that_looks_whole_and_runs_again(adapter, tmp_path):
    output = tmp_path / "out"
    script = [sys.executable, str(ROOT / "merge_dequant.py"), "--adapter", str(adapter)]
    command = [*script, "--output-dir", str(output)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and not list(tmp_path.glob(".out.partial-*")):
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob(".out.partial-*"))
    assert not output.exists()
    run_merge(adapter, output, max_shard_size="1GB")
    assert (output / SINGLE).exists()
    assert not list(tmp_path.glob(".out.partial-*"))
