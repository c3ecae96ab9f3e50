"""int4 against compressed-tensors: the bytes of a weight, and folders that transformers opens."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from conftest import axis
from merging import merged, report_of, rows_file
from merging import trained_on as trained_on
from transformers import AutoModelForCausalLM

from qlora.adapters.lora import lora_layers
from qlora.merge import int4
from qlora.merge.grids import Int4

SYMMETRY = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def oracle(grid: type[Int4]):
    """compressed-tensors' own codec of that grid."""
    weights = int4.settings(grid, [])["config_groups"]["group_0"]["weights"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    return BaseCompressor.get_value_from_registry("pack-quantized"), scheme


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
