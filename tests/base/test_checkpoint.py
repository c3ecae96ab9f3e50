"""Checkpoints: resolve, headers, tensors, fingerprints, skeletons, and damaged files."""

import json
import shutil

import pytest
import torch
from conftest import CONFIGS, axis, tiny_model
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import GPT2Model

from qlora import QuantConfig, UserError, load_base
from qlora.base import Checkpoint, resolve
from qlora.base.checkpoint import (
    HUB_COPIES,
    HUB_FILES,
    disk_name,
    is_skipped,
    quantized_layers,
    skeleton,
)
from qlora.base.shards import INDEX, SINGLE

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def copy(checkpoints, tmp_path):
    return shutil.copytree(checkpoints("llama"), tmp_path / "copy")


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    tiny_model("llama").save_pretrained(folder, max_shard_size="150KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_folders_resolve_to_themselves_also_from_home(checkpoints, sharded, monkeypatch):
    for folder in (checkpoints("llama"), sharded):
        assert resolve(str(folder)) == folder
    monkeypatch.setenv("HOME", str(checkpoints("llama").parent))
    assert resolve("~/llama") == checkpoints("llama")


def test_hub_files_are_all_that_a_tokenizer_needs_and_no_copies_of_weights():
    needed = ["model.safetensors", "config.json", "spiece.model", "source.spm", "bpe.codes"]
    needed += ["vocab.txt", "a.tiktoken", "additional_chat_templates/a.jinja", "a.jinja"]
    copies = ["original/model.safetensors", "onnx/config.json", "pytorch_model.bin", "README.md"]
    patterns = {"allow_patterns": HUB_FILES, "ignore_patterns": HUB_COPIES}
    assert [*filter_repo_objects(needed + copies, **patterns)] == needed


def test_models_that_cannot_be_resolved(copy, monkeypatch, tmp_path):
    def refused(name, match, **settings):
        with pytest.raises(UserError, match=match):
            resolve(str(name), **settings)

    monkeypatch.chdir(tmp_path)
    for name in ("./nowhere/at/all", "/nowhere", "nowhere.gguf", "a/b/c", "a b"):
        refused(name, f"model {name} does not exist: give a folder, a .gguf")
    for name in ("owner/name", "name-1.5"):  # without a network
        refused(name, rf"model {name} is no local folder and cannot be downloaded: \w")
    refused(copy / SINGLE, r"is a file: give a folder, a .gguf file or a hub name")
    refused(copy, "--revision main is for hub models", revision="main")
    torch.save(load_file(copy / SINGLE), copy / "pytorch_model.bin")
    (copy / SINGLE).unlink()
    refused(copy, rf"no {SINGLE} or {INDEX}\. Pickled weights .*not opened")
    (copy / "config.json").unlink()
    refused(copy, r"copy is no model: it holds no config.json.*for an adap")


def test_a_damaged_gguf_leaves_no_cache(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF, but no more than that")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("QLORA_CACHE", raising=False)
    for cache in (tmp_path / ".cache" / "qlora", tmp_path / "mine"):
        with pytest.raises(UserError, match=r"model.gguf cannot be read as a GGUF model \(\w+: "):
            resolve(str(tmp_path / "model.gguf"))
        assert list(cache.iterdir()) == []
        monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "mine"))


def test_headers_and_tensors_are_those_of_the_model(copy, sharded):
    exact = tiny_model("llama").state_dict()
    for checkpoint in (Checkpoint(copy), Checkpoint(sharded)):
        assert checkpoint.config["model_type"] == "llama"
        assert set(checkpoint.tensors) == set(exact)
        for name, tensor in exact.items():
            header = checkpoint.tensors[name]
            assert (header.dtype, header.shape) == (tensor.dtype, tuple(tensor.shape))
            assert torch.equal(checkpoint.read(name), tensor)


def test_dtypes_are_read_or_refused(tmp_path):
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    save_file({str(d): torch.ones(2).to(d) for d in dtypes}, tmp_path / SINGLE)
    tensors = Checkpoint(tmp_path).tensors
    assert {name: header.dtype for name, header in tensors.items()} == {str(d): d for d in dtypes}
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(UserError, match=r"holds a tensor of unknown dtype 'F8_E4M3'"):
        _ = Checkpoint(tmp_path).tensors


def cut_short(count):
    def change(folder):
        second = sorted(folder.glob("*.safetensors"))[1]
        second.write_bytes(second.read_bytes()[:count])

    return change, r"-00002-.* is damaged or cut short \(.+\): download or copy it again"


def index(text):
    return lambda folder: (folder / INDEX).write_text(text)


def outside(file):
    return index(json.dumps({"weight_map": {Q_PROJ: file}})), f"outside its folder.*: {file}"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        *(cut_short(count) for count in (0, 4, 100, -1)),
        *(outside(file) for file in ("../a", "/etc/passwd", "a/b")),
        (lambda folder: min(folder.glob("*.safetensors")).unlink(), "sharded lacks model-00001-of"),
        (index("{}"), "holds no weight_map"),
        (index("["), f"{INDEX} is not a JSON object: "),
    ],
)
def test_damaged_shards_and_indices(sharded, change, match):
    change(sharded)
    with pytest.raises(UserError, match=match):
        _ = Checkpoint(sharded).tensors


def test_the_longest_row(checkpoints):
    """RoBERTa's positions start after the pad token's id; T5's are relative."""
    for family, positions in (("roberta", 512), ("bert", 512), ("t5", None)):
        assert Checkpoint(checkpoints(family)).max_positions == positions


@pytest.mark.parametrize("family", axis("llama", "gpt2", "qwen2", "phi"))
@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_the_fingerprint_and_records_of_a_4_bit_copy(checkpoints, tmp_path, family, compute_dtype):
    quant = QuantConfig(compute_dtype=compute_dtype)
    load_base(str(checkpoints(family)), quant, device="cpu").save_pretrained(tmp_path)
    base, copy = Checkpoint(checkpoints(family)), Checkpoint(tmp_path)
    assert (base.is_quantized, copy.is_quantized) == (False, True)
    assert copy.fingerprint == base.fingerprint
    on_disk = load_file(tmp_path / SINGLE)
    weights = [name for name in on_disk if name.endswith(".weight")]
    records = {name: copy.record(name) for name in weights if copy.record(name)}
    for name, record in records.items():
        assert set(record) == {
            "", "absmax", "quant_map", "nested_absmax", "nested_quant_map",
            "quant_state.bitsandbytes__nf4",
        }  # fmt: skip
        for suffix, tensor in record.items():
            assert torch.equal(tensor, on_disk[f"{name}.{suffix}".rstrip(".")])
    layers = quantized_layers(skeleton(checkpoints(family)), quant)
    assert set(records) == {f"{name}.weight" for name in layers}
    assert not any(base.record(name) for name in weights)


def test_fingerprints_tell_models_apart_and_not_their_shards(copy, sharded, tmp_path):
    fingerprint = Checkpoint(copy).fingerprint
    assert Checkpoint(sharded).fingerprint == fingerprint
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    assert Checkpoint(tmp_path / "other").fingerprint != fingerprint
    tensors = load_file(copy / SINGLE)
    tensors["model.norm.weight"][7] += 0.1
    save_file(tensors, copy / SINGLE, metadata={"format": "pt"})
    assert Checkpoint(copy).fingerprint != fingerprint


@pytest.mark.parametrize("family", CONFIGS)
def test_a_skeleton_has_the_names_and_shapes_and_no_memory(checkpoints, family):
    model, exact = skeleton(checkpoints(family)), tiny_model(family)
    assert type(model) is type(exact)
    assert all(p.is_meta for p in model.parameters())
    shapes, wanted = ({name: p.shape for name, p in m.named_parameters()} for m in (model, exact))
    assert shapes == wanted


def test_a_config_of_another_kind_of_model_is_refused(tmp_path):
    for config in ({"model_type": "unheard_of"}, {"model_type": "clip"}, {}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="is no causal language model that this transformers k"):
            skeleton(tmp_path)


def test_names_on_disk_differ_from_the_models_by_the_prefix(checkpoints, tmp_path):
    llama, gpt2 = (Checkpoint(checkpoints(family)) for family in ("llama", "gpt2"))
    headless = GPT2Model(CONFIGS["gpt2"]())
    headless.save_pretrained(tmp_path)
    bare, full = "h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"
    model = skeleton(llama.folder)
    assert disk_name(llama, model, Q_PROJ) == Q_PROJ
    assert disk_name(llama, model, "model.rotary.inv_freq") is None
    assert disk_name(Checkpoint(tmp_path), skeleton(gpt2.folder), full) == bare
    assert disk_name(gpt2, headless, bare) == full


def test_the_layers_to_quantize(checkpoints):
    gpt2 = skeleton(checkpoints("gpt2"))
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    transposed = {f"transformer.h.{i}.{name}": True for i in (0, 1) for name in names}
    assert quantized_layers(gpt2, QuantConfig()) == transposed
    name = "model.layers.1.mlp.up_proj"  # of which whole parts are matched
    assert all(is_skipped(name, [skip]) for skip in ("up_proj", "mlp", "layers.1", name))
    assert not any(is_skipped(name, [skip]) for skip in ("proj", "1.up_proj", "layers.11"))
    assert not is_skipped(name.replace("1", "11"), ["layers.1"])
