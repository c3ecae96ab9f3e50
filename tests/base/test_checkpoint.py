"""Finding a checkpoint and knowing it from its headers; every way it can be wrong is named."""

import json
import shutil

import pytest
import torch
from conftest import CONFIGS, FP32, tiny_model
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
    """A llama checkpoint of one's own, to break."""
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


# ---- finding it ----


def test_a_folder_is_itself(checkpoints):
    assert resolve(str(checkpoints("llama"))) == checkpoints("llama")


def test_a_sharded_folder_is_itself(sharded):
    assert resolve(str(sharded)) == sharded


def test_a_path_may_start_at_home(checkpoints, monkeypatch):
    monkeypatch.setenv("HOME", str(checkpoints("llama").parent))
    assert resolve("~/llama") == checkpoints("llama")


@pytest.mark.parametrize("name", ["./nowhere/at/all", "/nowhere", "nowhere.gguf", "a/b/c", "a b"])
def test_what_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=f"model {name} does not exist: give a folder, a .gguf"):
        resolve(name)


@pytest.mark.parametrize("name", ["owner/name", "name-1.5"])
def test_a_hub_name_without_a_network_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"model {name} is no local folder, and the hub did not give it: \w"
    ):
        resolve(name)


def test_a_plain_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"is a file: wanted a folder with config.json"):
        resolve(str(tmp_path / "model.safetensors"))


def test_a_folder_without_a_config_is_refused(copy):
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"copy is no model: it holds no config.json.*for an adap"):
        resolve(str(copy))


def test_pickled_weights_are_refused(copy):
    tensors = load_file(copy / SINGLE)
    (copy / SINGLE).unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=rf"holds no {SINGLE} or {INDEX}\. Pickled weights .* are not opened"
    ):
        resolve(str(copy))


def test_what_is_no_gguf_is_refused_and_leaves_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF, but no more than that")
    with pytest.raises(UserError, match=r"model.gguf cannot be read as a GGUF model \(\w+: "):
        resolve(str(tmp_path / "model.gguf"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_is_below_home_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("QLORA_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "qlora"


# ---- its headers and tensors ----


@pytest.mark.parametrize("kind", ["copy", "sharded"])
def test_headers_and_tensors_are_those_of_the_model(kind, request):
    checkpoint = Checkpoint(request.getfixturevalue(kind))
    exact = tiny_model("llama").state_dict()
    assert set(checkpoint.tensors) == set(exact)
    for name, tensor in exact.items():
        header = checkpoint.tensors[name]
        assert (header.dtype, header.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(checkpoint.read(name), tensor)


def test_headers_know_every_dtype(tmp_path):
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    save_file({str(d): torch.ones(2).to(d) for d in dtypes}, tmp_path / SINGLE)
    tensors = Checkpoint(tmp_path).tensors
    assert {name: header.dtype for name, header in tensors.items()} == {str(d): d for d in dtypes}


def test_an_unknown_dtype_is_refused(tmp_path):
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(UserError, match=r"holds a tensor of unknown dtype 'F8_E4M3'"):
        _ = Checkpoint(tmp_path).tensors


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short_is_refused(copy, keep):
    data = (copy / SINGLE).read_bytes()
    (copy / SINGLE).write_bytes(data[:keep])
    with pytest.raises(UserError, match=rf"{SINGLE} is damaged or cut short \(.+\): download or"):
        _ = Checkpoint(copy).tensors


def test_a_shard_cut_short_is_refused(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{shard.name} is damaged or cut short"):
        _ = Checkpoint(sharded).tensors


def test_a_missing_shard_is_refused(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(UserError, match=rf"sharded lacks {shard.name}, which its index names"):
        _ = Checkpoint(sharded).tensors


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_may_not_name_files_outside(sharded, name):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][Q_PROJ] = name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"{INDEX} names files outside its folder: {name}"):
        _ = Checkpoint(sharded).tensors


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_broken_index_is_refused(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(UserError, match=INDEX):
        _ = Checkpoint(sharded).tensors


def test_the_config_is_read(checkpoints):
    assert Checkpoint(checkpoints("llama")).config["model_type"] == "llama"


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", '"llama"', "null"])
def test_a_broken_config_is_refused(copy, text):
    (copy / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json is no JSON object: "):
        _ = Checkpoint(copy).config


# ---- 4-bit records ----


def test_a_plain_checkpoint_has_no_records(checkpoints):
    checkpoint = Checkpoint(checkpoints("llama"))
    assert not checkpoint.is_quantized
    assert checkpoint.record(Q_PROJ) is None


def test_a_record_is_the_weights_entries_on_disk(four_bit):
    exact = load_file(four_bit.folder / SINGLE)
    record = four_bit.record(Q_PROJ)
    assert four_bit.is_quantized
    assert set(record) == {
        "", "absmax", "quant_map", "nested_absmax", "nested_quant_map",
        "quant_state.bitsandbytes__nf4",
    }  # fmt: skip
    for suffix, tensor in record.items():
        assert torch.equal(tensor, exact[f"{Q_PROJ}.{suffix}".rstrip(".")])


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_what_stays_unquantized_has_no_record(four_bit, name):
    assert name in four_bit.tensors
    assert four_bit.record(name) is None


# ---- fingerprints ----


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "gpt2"])
@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_a_4_bit_copy_has_the_fingerprint_of_its_base(checkpoints, tmp_path, family, compute_dtype):
    folder = checkpoints(family)
    quant = QuantConfig(compute_dtype=compute_dtype)
    load_base(str(folder), quant, device="cpu").save_pretrained(tmp_path)
    copy = Checkpoint(tmp_path)
    assert copy.is_quantized
    assert copy.fingerprint == Checkpoint(folder).fingerprint


def test_sharding_does_not_change_the_fingerprint(copy, sharded):
    assert Checkpoint(copy).fingerprint == Checkpoint(sharded).fingerprint


def test_another_models_fingerprint_is_another(checkpoints, tmp_path):
    tiny_model("llama", seed=1).save_pretrained(tmp_path)
    assert Checkpoint(tmp_path).fingerprint != Checkpoint(checkpoints("llama")).fingerprint


def test_one_changed_norm_changes_the_fingerprint(copy):
    before = Checkpoint(copy).fingerprint
    tensors = load_file(copy / SINGLE)
    tensors["model.norm.weight"][7] += 0.1
    save_file(tensors, copy / SINGLE, metadata={"format": "pt"})
    assert Checkpoint(copy).fingerprint != before


# ---- what the model made of it will look like ----


@pytest.mark.parametrize("family", CONFIGS)
def test_a_skeleton_has_the_names_and_shapes_and_no_memory(checkpoints, family):
    model, exact = skeleton(checkpoints(family)), tiny_model(family)
    assert type(model) is type(exact)
    assert all(p.is_meta for p in model.parameters())
    shapes, wanted = ({name: p.shape for name, p in m.named_parameters()} for m in (model, exact))
    assert shapes == wanted


@pytest.mark.parametrize(
    "config", [{"model_type": "unheard_of"}, {"model_type": "clip_vision_model"}, {}]
)
def test_what_is_no_language_model_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is no causal language model that this transformers knows"):
        skeleton(tmp_path)


def test_a_name_on_disk_is_the_models_own(checkpoints):
    checkpoint = Checkpoint(checkpoints("llama"))
    assert disk_name(checkpoint, skeleton(checkpoint.folder), Q_PROJ) == Q_PROJ


def test_a_headless_checkpoint_leaves_the_prefix_out(checkpoints, tmp_path):
    headless = GPT2Model(CONFIGS["gpt2"]())
    headless.save_pretrained(tmp_path)
    checkpoint, model = Checkpoint(tmp_path), skeleton(checkpoints("gpt2"))
    name = "transformer.h.0.attn.c_attn.weight"
    assert disk_name(checkpoint, model, name) == "h.0.attn.c_attn.weight"


def test_a_headless_model_finds_the_prefixed_names(checkpoints):
    checkpoint = Checkpoint(checkpoints("gpt2"))
    model = GPT2Model(CONFIGS["gpt2"]())
    name = disk_name(checkpoint, model, "h.0.attn.c_attn.weight")
    assert name == "transformer.h.0.attn.c_attn.weight"


def test_a_name_that_is_not_on_disk_is_none(checkpoints):
    checkpoint = Checkpoint(checkpoints("llama"))
    assert disk_name(checkpoint, skeleton(checkpoint.folder), "model.rotary.inv_freq") is None


# ---- which layers are to be quantized ----


def test_llamas_layers_to_be_quantized(checkpoints):
    layers = quantized_layers(skeleton(checkpoints("llama")), QuantConfig())
    leaves = {name.rpartition(".")[2] for name in layers}
    assert leaves == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert len(layers) == 14
    assert not any(layers.values())


def test_gpt2s_layers_are_transposed_on_disk(checkpoints):
    layers = quantized_layers(skeleton(checkpoints("gpt2")), QuantConfig())
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert layers == {f"transformer.h.{i}.{name}": True for i in (0, 1) for name in names}


def test_skipped_layers_are_not_to_be_quantized(checkpoints):
    quant = QuantConfig(skip_modules=("layers.0", "q_proj"))
    layers = quantized_layers(skeleton(checkpoints("llama")), quant)
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
