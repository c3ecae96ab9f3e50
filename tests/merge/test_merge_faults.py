"""What goes wrong in a merge is one clear line, and never an output that looks whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FP32, randomize_adapter
from safetensors.torch import load_file, save_file

from qlora.adapters.apply import apply_lora
from qlora.adapters.files import save_adapter
from qlora.base.load import load_base
from qlora.base.shards import INDEX, SINGLE, Entry, write_shards
from qlora.config import LoraConfig, MergeConfig, QuantConfig
from qlora.errors import UserError
from qlora.merge import merge

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(checkpoints, tmp_path):
    """A base of several shards, to be spoilt."""
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = load_file(checkpoints("llama") / SINGLE)
    entries = [Entry(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    write_shards(folder, entries, iter(tensors.values()), max_bytes=100_000)
    for file in checkpoints("llama").iterdir():
        if file.name != SINGLE:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    return an_adapter(base, tmp_path / "adapter")


def an_adapter(base: Path, folder: Path, quant: QuantConfig = FP32) -> Path:
    model = apply_lora(load_base(str(base), quant), LoraConfig(r=2))
    randomize_adapter(model)
    return save_adapter(model, folder)


def cut_short(base: Path, adapter: Path) -> None:
    shard = sorted(base.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)


def damage_header(base: Path, adapter: Path) -> None:
    shard = sorted(base.glob("model-*.safetensors"))[1]
    shard.write_bytes(b"\xff" * 16 + shard.read_bytes()[16:])


def remove_shard(base: Path, adapter: Path) -> None:
    sorted(base.glob("model-*.safetensors"))[1].unlink()


def index_outside(base: Path, adapter: Path) -> None:
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (base / INDEX).write_text(json.dumps(index))


def nan_in_base(base: Path, adapter: Path) -> None:
    for shard in base.glob("model-*.safetensors"):
        tensors = load_file(shard)
        if name := next((n for n in tensors if "down_proj" in n), None):
            tensors[name][0, 0] = torch.nan
            save_file(tensors, shard)
            return


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
        (remove_shard, r"lacks model-00002.*, which its index names"),
        (index_outside, r"names files outside its folder: \.\./elsewhere\.safetensors"),
        (nan_in_base, r"down_proj\.weight .*NaN.*if the base itself holds NaN, download it again"),
        (nan_in_adapter, r"lora_A\.weight holds NaN or infinity"),
        (other_base, r"belongs to another base"),
        (cut_adapter, r"adapter_model\.safetensors is damaged or cut short"),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"format": "nf4", "calibration": "none"}], ids=str)
def test_one_line_and_nothing_is_left(spoil, match, settings, base, adapter, tmp_path):
    spoil(base, adapter)
    with pytest.raises(UserError, match=match) as error:
        merge(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "out"), **settings))
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_4_bit_base_of_another_quantization(base, tmp_path):
    """Its codes are not those that were trained on, and no arithmetic makes them so."""
    adapter = an_adapter(
        base, tmp_path / "adapter", QuantConfig(blocksize=32, compute_dtype="fp32")
    )
    load_base(str(base), FP32).save_pretrained(tmp_path / "four")
    with pytest.raises(UserError, match=r"is NF4 of blocksize 64.*trained on NF4 of blocksize 32"):
        merge(
            MergeConfig(
                adapter=str(adapter),
                base_model=str(tmp_path / "four"),
                output_dir=str(tmp_path / "out"),
            )
        )
    assert not (tmp_path / "out").exists()


def command(adapter: Path, output: Path) -> list[str]:
    script = [sys.executable, str(ROOT / "merge_dequant.py"), "--adapter", str(adapter)]
    return [*script, "--output-dir", str(output)]


def test_the_script_says_so_in_one_line_and_exits_2(base, adapter, tmp_path):
    remove_shard(base, adapter)
    run = subprocess.run(
        command(adapter, tmp_path / "out"), capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


def test_a_killed_merge_leaves_nothing_that_looks_whole_and_runs_again(adapter, tmp_path):
    output = tmp_path / "out"
    with subprocess.Popen(command(adapter, output), stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and not list(tmp_path.glob(".out.partial-*")):
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob(".out.partial-*"))
    assert not output.exists()
    subprocess.run(command(adapter, output), check=True, stdout=subprocess.DEVNULL)
    assert (output / SINGLE).exists()
    assert not list(tmp_path.glob(".out.partial-*"))
