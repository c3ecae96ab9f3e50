"""The merge against the function that was trained, for every family and every format."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import FAMILIES, FP32, randomize_adapter, tiny_model, tiny_tokenizer, token_ids
from reference import NF4, round_trip
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.adapters.apply import apply_lora
from qlora.adapters.files import save_adapter
from qlora.adapters.lora import lora_layers
from qlora.base.load import load_base
from qlora.config import LoraConfig, MergeConfig, QuantConfig
from qlora.errors import UserError
from qlora.merge import measure as calibration
from qlora.merge import merge
from qlora.merge.measure import Verification, Verifier
from qlora.ops import nf4


def trained(
    base: Path, folder: Path, *, quant: QuantConfig = FP32, **lora: object
) -> torch.nn.Module:
    """A live model with a random adapter over `base`, and its files in `folder`."""
    model = load_base(str(base), quant)
    config = LoraConfig(r=4, lora_alpha=8, **lora)  # type: ignore[arg-type]
    apply_lora(model, config, generator=torch.Generator().manual_seed(0))
    randomize_adapter(model)
    save_adapter(model, folder)
    return model.eval()


def merged(adapter: Path, output: Path, **settings: object) -> dict[str, Tensor]:
    """The merged checkpoint's tensors, as written."""
    merge(MergeConfig(adapter=str(adapter), output_dir=str(output), **settings))  # type: ignore[arg-type]
    files = sorted(output.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def live_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """By definition of the trained function: W_live = layer(identity), less the bias."""
    weights = {}
    for name, layer in lora_layers(model).items():
        with torch.no_grad():
            out = layer(torch.eye(layer.in_features))
        bias = layer.bias
        weights[f"{name}.weight"] = (out if bias is None else out - bias).T
    return weights


def assert_same_function(merged_folder: Path, model: torch.nn.Module) -> None:
    """The merged checkpoint gives the live model's logits, to fp32 sums in another order."""
    again = AutoModelForCausalLM.from_pretrained(merged_folder, dtype=torch.float32)
    with torch.no_grad():
        ids = token_ids()
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_merge_is_the_live_model(family, checkpoints, tmp_path):
    model = trained(checkpoints(family), tmp_path / "adapter")
    tensors = merged(tmp_path / "adapter", tmp_path / "out", format="fp32")
    for name, wanted in live_weights(model).items():
        got = tensors[name].T if family == "gpt2" else tensors[name]
        # fp32 sums in another order; the issue asks for 1e-6
        assert relative_error(got, wanted) <= 1e-6, name
    ids = token_ids()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_merge_rounds_once(family, checkpoints, tmp_path):
    model = trained(checkpoints(family), tmp_path / "adapter")
    tensors = merged(tmp_path / "adapter", tmp_path / "out", format="bf16")
    for name, wanted in live_weights(model).items():
        got = tensors[name].T if family == "gpt2" else tensors[name]
        # one rounding to 8 bits of mantissa costs 1.65e-3 (figures.md, section 5), ± sampling
        assert 1.5e-3 < relative_error(got, wanted) < 1.75e-3, name
    assert all(t.dtype == torch.bfloat16 for t in tensors.values())


@pytest.mark.parametrize("target", ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"])
def test_every_target_type_alone(target, checkpoints, tmp_path):
    """Layers without an adapter were quantized in training too, and must be in the merge."""
    model = trained(checkpoints("llama"), tmp_path / "adapter", target_modules=(target,))
    merged(tmp_path / "adapter", tmp_path / "out", format="fp32")
    assert_same_function(tmp_path / "out", model)


@pytest.mark.parametrize(
    "quant",
    [
        QuantConfig(compute_dtype="fp32", quant_type="fp4"),
        QuantConfig(compute_dtype="fp32", blocksize=32, double_quant=False),
        QuantConfig(compute_dtype="fp32", skip_modules=("k_proj",)),
    ],
    ids=["fp4", "blocksize", "skip"],
)
def test_the_adapter_remembers_how_its_base_was_quantized(quant, checkpoints, tmp_path):
    model = trained(checkpoints("llama"), tmp_path / "adapter", quant=quant)
    merged(tmp_path / "adapter", tmp_path / "out", format="fp32")
    assert_same_function(tmp_path / "out", model)


def test_an_fp32_checkpoint_trained_in_bf16(checkpoints, tmp_path):
    """Loading casts to bf16 before it quantizes, which moves codes; the merge must do the same."""
    base, name = checkpoints("llama"), "model.layers.1.mlp.down_proj.weight"
    trained(base, tmp_path / "adapter", quant=QuantConfig(compute_dtype="bf16"))
    tensors = merged(tmp_path / "adapter", tmp_path / "out", format="fp32")
    original = load_file(base / "model.safetensors")[name]
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = f"base_model.model.{name.removesuffix('.weight')}"
    delta = 8 / 4 * adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
    wanted = round_trip(original.bfloat16(), NF4, double_quant=True) + delta
    assert relative_error(tensors[name], wanted) <= 1e-6
    assert (
        relative_error(tensors[name], round_trip(original, NF4, double_quant=True) + delta) > 1e-4
    )


def test_a_4_bit_base_that_keeps_some_layers_in_16_bits(checkpoints, tmp_path):
    """Those were not quantized in training and must not be in the merge."""
    skip = QuantConfig(compute_dtype="fp32", skip_modules=("o_proj",))
    load_base(str(checkpoints("llama")), skip).save_pretrained(tmp_path / "base4")
    model = trained(tmp_path / "base4", tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "out", format="fp32")
    assert_same_function(tmp_path / "out", model)


def test_a_base_that_is_already_4_bit(checkpoints, tmp_path):
    load_base(str(checkpoints("llama")), FP32).save_pretrained(tmp_path / "base4")
    model = trained(tmp_path / "base4", tmp_path / "adapter")
    tensors = merged(tmp_path / "adapter", tmp_path / "out", format="fp32")
    assert not any("absmax" in name or "quant" in name for name in tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert_same_function(tmp_path / "out", model)


def test_merge_against_the_reference(checkpoints, tmp_path):
    """One weight computed from the disk by the slow twins alone, both ways."""
    base, name = checkpoints("llama"), "model.layers.0.mlp.up_proj.weight"
    model = trained(base, tmp_path / "adapter")
    layer = model.get_submodule(name.removesuffix(".weight"))
    A, B = (m["default"].detach().double() for m in (layer.lora_A, layer.lora_B))
    delta = 8 / 4 * B @ A
    original = load_file(base / "model.safetensors")[name]
    weights = {"nf4": round_trip(original, NF4, double_quant=True), "original": original}
    for onto, weight in weights.items():
        tensors = merged(tmp_path / "adapter", tmp_path / onto, format="fp32", onto=onto)
        assert relative_error(tensors[name], weight.double() + delta) <= 1e-6


def test_untouched_tensors_are_copied(checkpoints, tmp_path):
    base = checkpoints("llama")
    trained(base, tmp_path / "adapter")
    tensors = merged(tmp_path / "adapter", tmp_path / "out", format="fp32")
    before = load_file(base / "model.safetensors")
    assert tensors.keys() == before.keys()
    for name in before:
        if "embed" in name or "norm" in name or "lm_head" in name:
            assert torch.equal(tensors[name], before[name]), name


def test_shards_have_an_index_and_load(checkpoints, tmp_path):
    model = trained(checkpoints("llama"), tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "out", format="fp32", max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert_same_function(tmp_path / "out", model)


def test_the_output_is_whole(checkpoints, tmp_path):
    base = checkpoints("llama")
    trained(base, tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "out")
    out = tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(out).decode(tiny_tokenizer()("a b").input_ids) == "a b"
    report = json.loads((out / "merge_report.json").read_text())
    assert report["onto"] == "nf4" and len(report["layers"]) == 14
    layer = report["layers"]["model.layers.0.self_attn.q_proj"]
    assert layer["delta_over_weight"] == pytest.approx(layer["delta_norm"] / layer["weight_norm"])
    assert "(NF4, blocksize 64), as it was in training" in (out / "README.md").read_text()
    assert (out / "merge.png").read_bytes().startswith(b"\x89PNG")
    assert [p for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_verify_measures_the_merge(checkpoints, tmp_path, capsys):
    trained(checkpoints("llama"), tmp_path / "adapter")
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"say {i}", "completion": f"it is {i * i}"} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    merged(tmp_path / "adapter", tmp_path / "out", format="fp32", verify=str(data))
    verified = json.loads((tmp_path / "out" / "merge_report.json").read_text())["verify"]
    assert verified["rows"] == 12
    # "it is 81" in single bytes and <|im_end|>: 7 to 9 + 1 tokens a row
    assert verified["tokens"] == sum(len(row["completion"]) + 1 for row in rows)
    # live and merged compute in the machine's dtype, bf16 or fp32: bf16 rounds at 4e-3
    assert verified["loss_merged"] == pytest.approx(verified["loss_live"], abs=5e-3)
    assert 0 <= verified["kl"] < 1e-3
    assert abs(verified["loss_base"] - verified["loss_live"]) > 5e-3  # the adapter does something
    assert "base + live adapter" in capsys.readouterr().out


# ---- 4-bit output ----


def rows_file(folder: Path, rows: int = 12) -> str:
    """A small data file for calibration and verification."""
    made = [{"prompt": f"say {i}", "completion": f"it is {i * i}"} for i in range(rows)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def live_deltas(model: torch.nn.Module) -> dict[str, Tensor]:
    layers = lora_layers(model)
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_4_bit_merge_opens_in_transformers_and_holds_the_adapter(family, checkpoints, tmp_path):
    model = trained(checkpoints(family), tmp_path / "adapter")
    base = {n: nf4.dequantize(codes_of(m.base_layer)) for n, m in lora_layers(model).items()}
    data = rows_file(tmp_path)
    merged(tmp_path / "adapter", tmp_path / "out", format="nf4", calibration=data)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    for name, delta in live_deltas(model).items():
        layer = again.get_submodule(name)
        assert isinstance(layer, Linear4bit), name
        change = nf4.dequantize(codes_of(layer)) - base[name]
        # felt in the outputs, the change is delta (the report); in the weights it is not far off
        assert report["layers"][name]["kept"] == pytest.approx(1, abs=0.05), name
        assert relative_error(change, delta) < 1.5, name
        assert float((change * delta).sum() / delta.square().sum()) > 0.5, name  # a no-op gives 0
    linear = {n for n, m in again.named_modules() if isinstance(m, Linear4bit)}
    assert linear == set(live_deltas(model))  # no more and no less than in training


def codes_of(layer: Linear4bit) -> nf4.Quantized:
    return nf4.Quantized(layer.weight.data, layer.weight.quant_state)


def test_layers_without_an_adapter_keep_their_codes(checkpoints, tmp_path):
    model = trained(checkpoints("llama"), tmp_path / "adapter", target_modules=("q_proj",))
    tensors = merged(tmp_path / "adapter", tmp_path / "out", format="nf4", calibration="none")
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit) and "base_layer" not in name:
            record = nf4.to_record(codes_of(layer))
            assert torch.equal(tensors[f"{name}.weight"], record[""]), name
            assert torch.equal(tensors[f"{name}.weight.absmax"], record["absmax"]), name


def test_the_4_bit_merge_of_an_idle_adapter_is_the_base(checkpoints, tmp_path):
    model = load_base(str(checkpoints("llama")), FP32)
    save_adapter(apply_lora(model, LoraConfig(r=4)), tmp_path / "adapter")
    load_base(str(checkpoints("llama")), FP32).save_pretrained(tmp_path / "base4")
    before = load_file(tmp_path / "base4" / "model.safetensors")
    data = rows_file(tmp_path)
    tensors = merged(tmp_path / "adapter", tmp_path / "out", format="nf4", calibration=data)
    assert tensors.keys() == before.keys()  # the very tensors that transformers writes
    for name, tensor in before.items():
        if tensor.dtype == torch.uint8 and "quant_state" not in name:
            assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("settings", [{"blocksize": 32}, {"double_quant": False}])
def test_another_grid_than_in_training(settings, checkpoints, tmp_path):
    trained(checkpoints("llama"), tmp_path / "adapter")
    data = rows_file(tmp_path)
    tensors = merged(
        tmp_path / "adapter", tmp_path / "out", format="nf4", calibration=data, **settings
    )
    absmax = tensors["model.layers.0.mlp.up_proj.weight.absmax"]
    assert len(absmax) == 128 * 64 // settings.get("blocksize", 64)
    assert absmax.dtype == (torch.uint8 if settings.get("double_quant", True) else torch.float32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_use_double_quant"] is settings.get("double_quant", True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_4_bit_base_merges_to_4_bits(checkpoints, tmp_path):
    skip = QuantConfig(compute_dtype="fp32", skip_modules=("o_proj",))
    load_base(str(checkpoints("llama")), skip).save_pretrained(tmp_path / "base4")
    tiny_tokenizer().save_pretrained(tmp_path / "base4")
    model = trained(tmp_path / "base4", tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "out", format="nf4", calibration=rows_file(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    kinds = {n: isinstance(again.get_submodule(n), Linear4bit) for n in lora_layers(model)}
    assert kinds == {n: "o_proj" not in n for n in kinds}


def test_calibration_is_by_default_on_the_training_data(checkpoints, tmp_path, capsys, monkeypatch):
    trained(checkpoints("llama"), tmp_path / "adapter")
    (tmp_path / "adapter" / "run.yaml").write_text(f"config:\n  data: {rows_file(tmp_path)}\n")
    named = merged(tmp_path / "adapter", tmp_path / "named", format="nf4")
    data = rows_file(tmp_path)
    given = merged(tmp_path / "adapter", tmp_path / "given", format="nf4", calibration=data)
    assert all(torch.equal(named[name], given[name]) for name in given)
    (tmp_path / "adapter" / "run.yaml").unlink()
    capsys.readouterr()
    monkeypatch.setattr(calibration, "MIN_TOKENS", 256)
    without = merged(tmp_path / "adapter", tmp_path / "without", format="nf4")
    assert "The model reads text that it writes itself" in capsys.readouterr().out
    assert any(not torch.equal(without[name], given[name]) for name in given)


def test_verify_measures_a_4_bit_merge(checkpoints, tmp_path):
    trained(checkpoints("llama"), tmp_path / "adapter")
    data = rows_file(tmp_path)
    merged(tmp_path / "adapter", tmp_path / "out", format="nf4", calibration=data, verify=data)
    verified = json.loads((tmp_path / "out" / "merge_report.json").read_text())["verify"]
    assert 0 < verified["kl"] < 0.1 and 0.5 < verified["agreement"] <= 1
    gain = verified["loss_base"] - verified["loss_live"]  # a random adapter may gain or lose
    kept = (verified["loss_base"] - verified["loss_merged"]) / gain if gain > 0 else None
    assert verified["kept"] == (kept and pytest.approx(kept))


def test_the_share_kept():
    assert Verification(1, 1, 3.0, 1.0, 1.5, 0, 1, 1).kept == 0.75
    assert Verification(1, 1, 2.0, 3.0, 3.0, 0, 1, 1).kept is None


def test_less_than_min_kept_is_not_published(checkpoints, tmp_path, monkeypatch):
    trained(checkpoints("llama"), tmp_path / "adapter")
    data = rows_file(tmp_path)
    poor = Verification(12, 100, 3.0, 1.0, 1.5, 0.2, 1.9, 0.8)
    monkeypatch.setattr(Verifier, "measure", lambda *_: poor)
    with pytest.raises(UserError, match=r"keeps 75.0%.*--min-kept 0.9.*nothing was written"):
        merged(tmp_path / "adapter", tmp_path / "out", verify=data, min_kept=0.9)
    assert not (tmp_path / "out").exists()
    assert [p for p in tmp_path.iterdir() if "partial" in p.name] == []
    merged(tmp_path / "adapter", tmp_path / "out", verify=data, min_kept=0.7)
    assert (
        json.loads((tmp_path / "out" / "merge_report.json").read_text())["verify"]["kept"] == 0.75
    )


def test_a_poor_merge_is_called_so(checkpoints, tmp_path, monkeypatch, capsys):
    trained(checkpoints("llama"), tmp_path / "adapter")
    poor = Verification(12, 100, 3.0, 1.0, 1.5, 0.2, 1.9, 0.8)
    monkeypatch.setattr(Verifier, "measure", lambda *_: poor)
    merged(tmp_path / "adapter", tmp_path / "out", verify=rows_file(tmp_path))
    assert "WARNING: the merged model has lost 25.0%" in capsys.readouterr().out


def test_no_gain_is_no_share_of_it(checkpoints, tmp_path, monkeypatch, capsys):
    trained(checkpoints("llama"), tmp_path / "adapter")
    worse = Verification(12, 100, 1.0, 2.0, 2.0, 0.2, 1.9, 0.8)
    monkeypatch.setattr(Verifier, "measure", lambda *_: worse)
    data = rows_file(tmp_path)
    refused(
        tmp_path / "adapter", tmp_path / "out", "the adapter gains nothing: loss 1.0000 without",
        verify=data, min_kept=0.5,
    )  # fmt: skip
    merged(tmp_path / "adapter", tmp_path / "out", verify=data)
    assert "no gain" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["verify"]["kept"] is None


@pytest.mark.parametrize("better", ["nf4", "original"])
def test_auto_takes_the_base_with_the_lower_loss(
    better, checkpoints, tmp_path, monkeypatch, capsys
):
    trained(checkpoints("llama"), tmp_path / "adapter")
    data = rows_file(tmp_path)
    losses = {"nf4": 1.5, "original": 1.5, better: 1.2}

    def measure(_: object, folder: Path) -> Verification:
        return Verification(12, 100, 3.0, 1.0, losses[folder.name], 0.2, 1.9, 0.8)

    wanted = merged(tmp_path / "adapter", tmp_path / "wanted", onto=better)
    monkeypatch.setattr(Verifier, "measure", measure)
    tensors = merged(tmp_path / "adapter", tmp_path / "out", onto="auto", verify=data)
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {path.name for path in (tmp_path / "wanted").iterdir()}
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["onto"] == better
    assert f"taken is {better}" in capsys.readouterr().out


# ---- what the user can mend ----


def test_a_wrong_verify_path_does_not_cost_a_merge(checkpoints, tmp_path):
    base = checkpoints("llama")
    trained(base, tmp_path / "adapter")
    shutil.copy(base / "tokenizer.json", tmp_path / "adapter")
    shutil.copy(base / "tokenizer_config.json", tmp_path / "adapter")
    refused(tmp_path / "adapter", tmp_path / "out", "nothing.jsonl", verify="nothing.jsonl")


def test_a_failing_verification_keeps_the_merge(checkpoints, tmp_path, monkeypatch):
    trained(checkpoints("llama"), tmp_path / "adapter")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Verifier, "measure", fail)
    with pytest.raises(MemoryError):
        merged(tmp_path / "adapter", tmp_path / "out", verify=str(tmp_path / "rows.jsonl"))
    assert (tmp_path / "out" / "merge_report.json").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_output_folder_below_a_file(checkpoints, tmp_path):
    trained(checkpoints("llama"), tmp_path / "adapter")
    (tmp_path / "file.txt").write_text("precious")
    refused(tmp_path / "adapter", tmp_path / "file.txt" / "out", "no folder that can be written to")


def refused(adapter: Path, output: Path, match: str, **settings: object) -> None:
    """The merge fails with `match` and leaves nothing behind."""
    folder = adapter.parent
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=match):
        merged(adapter, output, **settings)
    assert sorted(folder.rglob("*")) == before


def test_an_output_folder_in_use(checkpoints, tmp_path):
    trained(checkpoints("llama"), tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    refused(tmp_path / "adapter", tmp_path / "out", "already holds something: give a new folder")
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_an_adapter_for_another_base(checkpoints, tmp_path):
    trained(checkpoints("llama"), tmp_path / "adapter")
    tiny_model("llama", seed=9).save_pretrained(tmp_path / "other")
    refused(
        tmp_path / "adapter",
        tmp_path / "out",
        "belongs to another base.*Give the base it was trained on",
        base_model=str(tmp_path / "other"),
    )


def test_a_foreign_adapter_of_other_shapes(checkpoints, tmp_path):
    """Without our metadata the shapes must tell, all of them at once."""
    trained(checkpoints("llama"), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    tensors[key] = torch.zeros(99, 4)
    tensors["base_model.model.nowhere.lora_A.weight"] = torch.zeros(4, 64)
    tensors["base_model.model.nowhere.lora_B.weight"] = torch.zeros(64, 4)
    save_file(tensors, file, metadata={"format": "pt"})
    match = r"nowhere.weight is not in.*\(128, 64\).*\(99, 64\)"
    refused(tmp_path / "adapter", tmp_path / "out", match)


def test_onto_original_needs_the_original(checkpoints, tmp_path):
    load_base(str(checkpoints("llama")), FP32).save_pretrained(tmp_path / "base4")
    trained(tmp_path / "base4", tmp_path / "adapter")
    refused(tmp_path / "adapter", tmp_path / "out", "is 4-bit.*--base-model", onto="original")


def test_a_value_beyond_fp16(checkpoints, tmp_path):
    shutil.copytree(checkpoints("llama"), tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    trained(tmp_path / "base", tmp_path / "adapter")
    refused(tmp_path / "adapter", tmp_path / "out", "lm_head.*--format bf16", format="fp16")


def test_a_full_disk_is_seen_before_writing(checkpoints, tmp_path, monkeypatch):
    trained(checkpoints("llama"), tmp_path / "adapter")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    refused(tmp_path / "adapter", tmp_path / "out", "make room")


def test_a_missing_adapter(tmp_path):
    refused(tmp_path / "none", tmp_path / "out", "does not exist.*adapter_config.json")


def test_cuda_without_a_gpu(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(tmp_path / "adapter", tmp_path / "out", "no GPU: use --device cpu", device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_merging_on_the_gpu_gives_the_same(checkpoints, tmp_path):
    trained(checkpoints("llama"), tmp_path / "adapter")
    on_cpu = merged(tmp_path / "adapter", tmp_path / "cpu", format="fp32")
    on_gpu = merged(tmp_path / "adapter", tmp_path / "gpu", format="fp32", device="cuda")
    for name, tensor in on_cpu.items():
        # the mean of the absmax is summed in another order: some 8-bit absmax may differ by one
        assert relative_error(on_gpu[name], tensor) <= 1e-3, name
