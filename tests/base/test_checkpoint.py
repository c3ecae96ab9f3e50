"""Checkpoints: resolving them, reading headers and tensors, and every way they can be wrong."""

import json
import shutil

import pytest
import torch
from conftest import CONFIGS, FP32, axis, tiny_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Model

from qlora.base.checkpoint import (
    Checkpoint,
    cache_folder,
    disk_name,
    is_skipped,
    quantized_layers,
    resolve,
    skeleton,
)
from qlora.base.load import load_base
from qlora.base.shards import INDEX, SINGLE
from qlora.config import QuantConfig
from qlora.errors import UserError

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def copy(checkpoints, tmp_path):
    """A copy of a llama checkpoint, to break."""
    return shutil.copytree(checkpoints("llama"), tmp_path / "copy")


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    tiny_model("llama").save_pretrained(folder, max_shard_size="150KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def four_bit(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four_bit")
    load_base(str(checkpoints("llama")), FP32, device="cpu").save_pretrained(folder)
    return Checkpoint(folder)


# ---- resolve ----


def test_folders_resolve_to_themselves_and_paths_may_start_at_home(
    checkpoints, sharded, monkeypatch
):
    for folder in (checkpoints("llama"), sharded):
        assert resolve(str(folder)) == folder
    monkeypatch.setenv("HOME", str(checkpoints("llama").parent))
    assert resolve("~/llama") == checkpoints("llama")


@pytest.mark.parametrize("name", ["./nowhere/at/all", "/nowhere", "nowhere.gguf", "a/b/c", "a b"])
def test_a_name_that_does_not_exist(name):
    with pytest.raises(UserError, match=f"model {name} does not exist: give a folder, a .gguf"):
        resolve(name)


@pytest.mark.parametrize("name", ["owner/name", "name-1.5"])
def test_a_hub_name_without_a_network(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"model {name} is no local folder, and the hub .*: \w"):
        resolve(name)


def test_what_is_no_checkpoint(copy, tmp_path):
    with pytest.raises(UserError, match=r"is a file: wanted a folder with config.json"):
        resolve(str(copy / SINGLE))
    with pytest.raises(UserError, match=r"--revision main is for hub models"):
        resolve(str(copy), revision="main")
    torch.save(load_file(copy / SINGLE), copy / "pytorch_model.bin")
    (copy / SINGLE).unlink()
    with pytest.raises(UserError, match=rf"no {SINGLE} or {INDEX}\. Pickled weights .*not opened"):
        resolve(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"copy is no model: it holds no config.json.*for an adap"):
        resolve(str(copy))


def test_a_damaged_gguf_leaves_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF, but no more than that")
    with pytest.raises(UserError, match=r"model.gguf cannot be read as a GGUF model \(\w+: "):
        resolve(str(tmp_path / "model.gguf"))
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.delenv("QLORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "qlora"


# ---- headers and tensors ----


@pytest.mark.parametrize("kind", ["copy", "sharded"])
def test_headers_and_tensors_are_those_of_the_model(kind, request):
    checkpoint = Checkpoint(request.getfixturevalue(kind))
    exact = tiny_model("llama").state_dict()
    assert checkpoint.config["model_type"] == "llama"
    assert set(checkpoint.tensors) == set(exact)
    for name, tensor in exact.items():
        header = checkpoint.tensors[name]
        assert (header.dtype, header.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(checkpoint.read(name), tensor)


def test_every_dtype_is_known_or_refused(tmp_path):
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    save_file({str(d): torch.ones(2).to(d) for d in dtypes}, tmp_path / SINGLE)
    tensors = Checkpoint(tmp_path).tensors
    assert {name: header.dtype for name, header in tensors.items()} == {str(d): d for d in dtypes}
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(UserError, match=r"holds a tensor of unknown dtype 'F8_E4M3'"):
        _ = Checkpoint(tmp_path).tensors


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short(copy, keep):
    (copy / SINGLE).write_bytes((copy / SINGLE).read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{SINGLE} is damaged or cut short \(.+\): download or"):
        _ = Checkpoint(copy).tensors


def test_shards_cut_short_or_missing(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{second.name} is damaged or cut short"):
        _ = Checkpoint(sharded).tensors
    first.unlink()
    with pytest.raises(UserError, match=rf"sharded lacks {first.name}, which its index names"):
        _ = Checkpoint(sharded).tensors


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_may_not_name_files_outside(sharded, name):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][Q_PROJ] = name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"{INDEX} names files outside its folder: {name}"):
        _ = Checkpoint(sharded).tensors


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", '"llama"', "null"])
def test_a_broken_index_or_config(sharded, text):
    for file in (INDEX, "config.json"):
        (sharded / file).write_text(text)
    with pytest.raises(UserError, match=INDEX):
        _ = Checkpoint(sharded).tensors
    with pytest.raises(UserError, match=r"config.json is not a JSON object: "):
        _ = Checkpoint(sharded).config
    (sharded / INDEX).write_text("{}")
    with pytest.raises(UserError, match="holds no weight_map"):
        _ = Checkpoint(sharded).tensors


@pytest.mark.parametrize(("family", "positions"), [("roberta", 512), ("bert", 512), ("t5", None)])
def test_the_longest_row(family, positions, checkpoints):
    """RoBERTa's positions start after the pad token's id; T5's are relative."""
    assert Checkpoint(checkpoints(family)).max_positions == positions


# ---- 4-bit records ----


def test_a_record_is_the_weights_entries_on_disk(four_bit, checkpoints):
    exact = load_file(four_bit.folder / SINGLE)
    record = four_bit.record(Q_PROJ)
    assert four_bit.is_quantized
    assert set(record) == {
        "", "absmax", "quant_map", "nested_absmax", "nested_quant_map",
        "quant_state.bitsandbytes__nf4",
    }  # fmt: skip
    for suffix, tensor in record.items():
        assert torch.equal(tensor, exact[f"{Q_PROJ}.{suffix}".rstrip(".")])
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert name in four_bit.tensors
        assert four_bit.record(name) is None
    plain = Checkpoint(checkpoints("llama"))
    assert not plain.is_quantized
    assert plain.record(Q_PROJ) is None


# ---- fingerprints ----


@pytest.mark.parametrize("family", axis("gpt2", "llama", "qwen2", "phi"))
@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_a_4_bit_copy_has_the_fingerprint_of_its_base(checkpoints, tmp_path, family, compute_dtype):
    quant = QuantConfig(compute_dtype=compute_dtype)
    load_base(str(checkpoints(family)), quant, device="cpu").save_pretrained(tmp_path)
    copy = Checkpoint(tmp_path)
    assert copy.is_quantized
    assert copy.fingerprint == Checkpoint(checkpoints(family)).fingerprint


def test_fingerprints_tell_models_apart_and_not_their_shards(copy, sharded, tmp_path):
    fingerprint = Checkpoint(copy).fingerprint
    assert Checkpoint(sharded).fingerprint == fingerprint
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    assert Checkpoint(tmp_path / "other").fingerprint != fingerprint
    tensors = load_file(copy / SINGLE)
    tensors["model.norm.weight"][7] += 0.1
    save_file(tensors, copy / SINGLE, metadata={"format": "pt"})
    assert Checkpoint(copy).fingerprint != fingerprint


# ---- the model without weights ----


@pytest.mark.parametrize("family", CONFIGS)
def test_a_skeleton_has_the_names_and_shapes_and_no_memory(checkpoints, family):
    model, exact = skeleton(checkpoints(family)), tiny_model(family)
    assert type(model) is type(exact)
    assert all(p.is_meta for p in model.parameters())
    shapes, wanted = ({name: p.shape for name, p in m.named_parameters()} for m in (model, exact))
    assert shapes == wanted


@pytest.mark.parametrize("config", [{"model_type": "unheard_of"}, {"model_type": "clip"}, {}])
def test_what_is_no_language_model(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is no causal language model that this transformers knows"):
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


# ---- which layers are quantized ----


def test_the_layers_to_quantize(checkpoints):
    llama, gpt2 = (skeleton(checkpoints(family)) for family in ("llama", "gpt2"))
    layers = quantized_layers(llama, QuantConfig())
    leaves = {name.rpartition(".")[2] for name in layers}
    assert leaves == {f"{leaf}_proj" for leaf in ("q", "k", "v", "o", "gate", "up", "down")}
    assert len(layers) == 14
    assert not any(layers.values())
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    transposed = {f"transformer.h.{i}.{name}": True for i in (0, 1) for name in names}
    assert quantized_layers(gpt2, QuantConfig()) == transposed
    layers = quantized_layers(llama, QuantConfig(skip_modules=("layers.0", "q_proj")))
    assert len(layers) == 6
    assert all(name.startswith("model.layers.1.") for name in layers)


@pytest.mark.parametrize(
    ("name", "skip", "skipped"),
    [
        ("model.layers.1.mlp.up_proj", "up_proj", True),
        ("model.layers.1.mlp.up_proj", "mlp", True),
        ("model.layers.1.mlp.up_proj", "layers.1", True),
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1.mlp.up_proj", "proj", False),
        ("model.layers.11.mlp.up_proj", "layers.1", False),
        ("model.layers.1.mlp.up_proj", "1.up_proj", False),
    ],
)
def test_skip_means_whole_parts_of_a_name(name, skip, skipped):
    assert is_skipped(name, [skip]) is skipped
