"""int4 against compressed-tensors: the bytes of a weight, and folders that transformers opens."""

import pytest
import torch
from adapter_kinds import logits
from conftest import axis, tiny_model, tiny_tokenizer
from merging import merged, refused, report_of, rows_file, run_merge, trained
from merging import trained_on as trained_on
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qlora import UserError, load_base
from qlora.adapters.live import resolve_model
from qlora.adapters.lora import lora_layers
from qlora.base.checkpoint import Checkpoint
from qlora.config import ModelChoice
from qlora.merge import int4
from qlora.merge.grids import Int4

compressors = pytest.importorskip("compressed_tensors.compressors")
quantization = pytest.importorskip("compressed_tensors.quantization")
SYMMETRY = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def oracle(grid: type[Int4]):
    """compressed-tensors' own codec of that grid."""
    weights = int4.settings(grid, [])["config_groups"]["group_0"]["weights"]
    arguments = quantization.QuantizationArgs(**weights)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    return compressors.BaseCompressor.get_value_from_registry("pack-quantized"), scheme


@SYMMETRY
@pytest.mark.parametrize(("size", "rows"), [(128, 64), (64, 5), (32, 16)])
def test_the_bytes_are_those_of_compressed_tensors(symmetric, size, rows):
    kind = int4.grid_of(size, symmetric=symmetric)
    weight = torch.randn(rows, 3 * size, generator=torch.Generator().manual_seed(0)) + 0.1
    weight[1, :size] = 0
    grid = kind(weight.T.contiguous())
    record = int4.to_record(grid, torch.bfloat16)
    assert {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in record.items()
    } == int4.layout(weight.shape, kind, torch.bfloat16)
    codec, scheme = oracle(kind)
    ours = {f"weight{name}": tensor for name, tensor in record.items()}
    ours["weight_scale"] = record["_scale"].float()  # what it decodes in
    decoded = codec.decompress(ours, scheme)
    assert torch.equal(decoded["weight"], grid.weight.T)
    again = codec.compress(decoded, scheme)
    assert again.keys() == ours.keys()
    for name, tensor in again.items():
        assert torch.equal(tensor, ours[name]), name


@SYMMETRY
@pytest.mark.parametrize("family", ["llama", *axis("qwen2", "gemma", "phi")])
def test_transformers_opens_the_values_of_the_grid(family, symmetric, trained_on, tmp_path, capsys):
    model, adapter = trained_on(family)
    data, output = rows_file(tmp_path), tmp_path / "out"
    settings = {"format": "int4", "symmetric": symmetric, "calibration": data, "verify": data}
    tensors = merged(adapter, output, **settings)
    full = merged(adapter, tmp_path / "fp32", format="fp32")
    again = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    codec, scheme = oracle(int4.grid_of(64, symmetric=symmetric))
    facts = report_of(output)["layers"]
    assert "int4 with groups of 64: model.layers.0." in capsys.readouterr().out
    for name in lora_layers(model):
        record = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{name}.w")}
        record["weight_scale"] = record["weight_scale"].float()
        wanted = codec.decompress(record, scheme)["weight"]
        got = again.get_submodule(name).weight
        assert torch.equal(got, wanted.bfloat16().float()), name  # in the scale's dtype
        assert facts[name]["kept"] == pytest.approx(1, abs=0.1), name
        assert float((wanted - full[f"{name}.weight"]).norm() / wanted.norm()) < 0.2, name
    for name in tensors.keys() & full.keys():  # all others, in bf16
        assert torch.equal(tensors[name], full[name].bfloat16()), name
    verified = report_of(output)["verify"]
    assert 0 < verified["kl"] < 0.1
    assert 0.5 < verified["agreement"] <= 1


def test_it_opens_as_a_model_to_chat_with_and_needs_a_package(trained_on, tmp_path, monkeypatch):
    adapter, output = trained_on("llama").adapter, tmp_path / "out"
    run_merge(adapter, output, format="int4", calibration="none")
    resolved = resolve_model(ModelChoice(model=str(output), compute_dtype="fp32"))
    wanted = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert torch.equal(logits(resolved.load()), logits(wanted))
    with pytest.raises(UserError, match="already quantized, with compressed-tensors"):
        load_base(str(output))
    monkeypatch.setattr("qlora.base.load.find_spec", lambda name: None)
    match = "with the package compressed-tensors, .*: pip install compressed-tensors$"
    with pytest.raises(UserError, match=match):
        resolved.load()
    refused(adapter, tmp_path / "other", match, format="int4", verify=rows_file(tmp_path))


def narrow(folder, **sizes):
    """A tiny model of these sizes."""
    config = tiny_model("llama").config
    config.update({"num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 4} | sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_columns_that_no_group_divides_stay_in_16_bits(checkpoints, tmp_path, capsys):
    base = narrow(tmp_path / "base", intermediate_size=48)
    adapter = trained(base, tmp_path / "adapter").adapter
    tensors = merged(adapter, tmp_path / "out", format="int4", calibration="none")
    said = "In 16 bits, as columns are no multiple of 32: model.layers.0.mlp.down_proj"
    assert said in capsys.readouterr().out
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
    ignored = Checkpoint(tmp_path / "out").config["quantization_config"]["ignore"]
    assert ignored == [f"model.layers.{i}.mlp.down_proj" for i in range(2)] + ["lm_head"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    conv1d = trained(checkpoints("gpt2"), tmp_path / "conv1d").adapter
    match = "nn.Linear layers of a multiple of 128 or 64 or 32 columns: use --format nf4"
    refused(conv1d, tmp_path / "other", match, format="int4", calibration="none")
