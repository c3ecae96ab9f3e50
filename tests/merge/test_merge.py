"""The merged model against the live one, for every family and format."""

import json
import shlex
import shutil

import pytest
import torch
from adapter_kinds import logits
from bitsandbytes.nn import Linear4bit
from conftest import axis, on_gpu, tiny_tokenizer
from merging import merged, refused, report_of, require_logits, rows_file, run_merge, trained
from merging import trained_on as trained_on
from reference import NF4, round_trip
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora import QuantConfig, load_base
from qlora.adapters.lora import lora_layers
from qlora.base.checkpoint import Checkpoint
from qlora.errors import UserError
from qlora.merge import measure
from qlora.merge.run import allows_stops
from qlora.ops import nf4

EACH_FAMILY = ["llama", *axis("gpt2", "qwen2", "qwen3", "mistral", "gemma", "phi")]


def live_weights(model):
    """W_live = layer(identity) less the bias, the function that was trained."""
    weights = {}
    for name, layer in lora_layers(model).items():
        with torch.no_grad():
            out = layer(torch.eye(layer.in_features))
        weights[f"{name}.weight"] = (out if layer.bias is None else out - layer.bias).T
    return weights


def relative_error(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def codes_of(layer):
    return nf4.Quantized(layer.weight.data, layer.weight.quant_state)


# ---- 16 and 32 bits ----


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_fp32_is_the_live_model_and_bf16_rounds_it_once(family, checkpoints, trained_on, tmp_path):
    model, adapter = trained_on(family)
    full = merged(adapter, tmp_path / "fp32", format="fp32", max_shard_size="100KB")
    half = merged(adapter, tmp_path / "bf16", format="bf16")
    before, live = load_file(checkpoints(family) / "model.safetensors"), live_weights(model)
    assert len(list((tmp_path / "fp32").glob("model-*-of-*.safetensors"))) > 2
    assert full.keys() == before.keys() > live.keys()
    for name in before.keys() - live.keys():
        assert torch.equal(full[name], before[name]), name
    for name, wanted in live.items():
        transposed = family == "gpt2"
        got, rounded = (t[name].T if transposed else t[name] for t in (full, half))
        assert relative_error(got, wanted) <= 1e-6, name  # fp32 sums in another order
        # one rounding to 8 bits of mantissa costs 1.65e-3 (figures.md, section 5), ± sampling
        assert 1.5e-3 < relative_error(rounded, wanted) < 1.75e-3, name
    assert all(t.dtype == torch.bfloat16 for t in half.values())
    require_logits(tmp_path / "fp32", logits(model))


@pytest.mark.parametrize(
    ("quant", "lora"),
    [
        ({"quant_type": "fp4"}, {}),
        ({"blocksize": 32, "double_quant": False}, {}),
        ({"skip_modules": ("k_proj",)}, {}),
        ({}, {"target_modules": ("v_proj",)}),
        *(
            pytest.param({}, {"target_modules": (name,)}, marks=pytest.mark.full)
            for name in ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        ),
    ],
    ids=str,
)
def test_all_layers_are_quantized_as_in_training(quant, lora, checkpoints, tmp_path):
    """Also those without an adapter, which keep their codes when written in 4 bits."""
    quant = QuantConfig(compute_dtype="fp32", **quant)
    model, adapter = trained(checkpoints("llama"), tmp_path / "adapter", quant, **lora)
    run_merge(adapter, tmp_path / "out", format="fp32")
    require_logits(tmp_path / "out", logits(model))
    tensors = merged(adapter, tmp_path / "nf4", format="nf4", calibration="none")
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit) and "base_layer" not in name:
            record = nf4.to_record(codes_of(layer))
            assert torch.equal(tensors[f"{name}.weight"], record[""]), name
            assert torch.equal(tensors[f"{name}.weight.absmax"], record["absmax"]), name


@pytest.mark.parametrize(
    ("compute_dtype", "onto"), [("fp32", "nf4"), ("bf16", "nf4"), ("fp32", "original")]
)
def test_one_weight_against_the_reference(compute_dtype, onto, checkpoints, tmp_path):
    """Loading casts to bf16 before it quantizes, which moves codes; the merge must do the same."""
    base, name = checkpoints("llama"), "model.layers.1.mlp.down_proj.weight"
    adapter = trained(base, tmp_path / "adapter", QuantConfig(compute_dtype=compute_dtype)).adapter
    weight = merged(adapter, tmp_path / "out", format="fp32", onto=onto)[name]
    original = load_file(base / "model.safetensors")[name]
    factors = load_file(adapter / "adapter_model.safetensors")
    key = f"base_model.model.{name.removesuffix('.weight')}"
    A, B = (factors[f"{key}.lora_{leaf}.weight"].double() for leaf in "AB")
    delta = 8 / 4 * B @ A  # (out, r) @ (r, in)
    cast = original.to(nf4.DTYPES[compute_dtype])
    wanted = original if onto == "original" else round_trip(cast, NF4, double_quant=True)
    assert relative_error(weight, wanted.double() + delta) <= 1e-6
    if compute_dtype == "bf16":
        uncast = round_trip(original, NF4, double_quant=True).double() + delta
        assert relative_error(weight, uncast) > 1e-4


def test_all_files_of_the_output(checkpoints, trained_on, tmp_path):
    base, out = checkpoints("llama"), tmp_path / "out"
    run_merge(trained_on("llama").adapter, out, picture=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert Checkpoint(out).config["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(out).decode(tiny_tokenizer()("a b").input_ids) == "a b"
    report = report_of(out)
    assert (report["onto"], len(report["layers"])) == ("nf4", 14)
    layer = report["layers"]["model.layers.0.self_attn.q_proj"]
    assert layer["delta_over_weight"] == pytest.approx(layer["delta_norm"] / layer["weight_norm"])
    assert "(NF4, blocksize 64), as it was in training" in (out / "README.md").read_text()
    assert (out / "merge.png").read_bytes().startswith(b"\x89PNG")
    assert [p for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_tokenizers_and_processors_of_every_kind_are_copied_and_nothing_else(
    checkpoints, trained_on, tmp_path
):
    """Without its vocabulary a tokenizer of transformers opens, and gives <unk> for all words."""
    base, adapter = (tmp_path / name for name in ("base", "adapter"))
    shutil.copytree(checkpoints("llama"), base)
    shutil.copytree(trained_on("llama").adapter, adapter)
    own = """spiece.model sentencepiece.bpe.model spm.model source.spm target.spm vocab.txt
        vocab.json merges.txt bpe.codes tekken.json qwen.tiktoken added_tokens.json emoji.json
        special_tokens_map.json additional_chat_templates/tool_use.jinja chat_template.json"""
    of_base = "preprocessor_config.json processor_config.json video_preprocessor_config.json"
    others = """token.json hf_token.json run.yaml metrics.jsonl samples.jsonl README.md LICENSE.txt
        loss.png training_args.bin trainer_state.json hf_quant_config.json onnx/tokenizer.json
        tokenizer.pkl pytorch_model.bin.index.json merge_report.json optimizer.pt
        checkpoint-1/tokenizer.json"""
    (base / "modeling.model").mkdir()
    (wanted := {*own.split()}).update(of_base.split())
    for has_tokenizer in (False, True):
        source = adapter if has_tokenizer else base
        for folder, names in ((source, own), (base, of_base), (base, others), (adapter, others)):
            for name in names.split():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(f"{{}}{folder.name}")
        if has_tokenizer:
            tiny_tokenizer().save_pretrained(adapter)
        out = tmp_path / f"out {has_tokenizer}"
        run_merge(adapter, out, base_model=str(base))
        found = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
        assert wanted == found & {*own.split(), *of_base.split(), *others.split()} - {
            "README.md", "merge_report.json",
        }  # fmt: skip
        for name in own.split():
            assert (out / name).read_bytes() == (source / name).read_bytes(), name


def test_a_base_that_is_already_4_bit(checkpoints, tmp_path):
    """Its dense layers were not quantized in training and are not in the merge."""
    skip, base = QuantConfig(compute_dtype="fp32", skip_modules=("o_proj",)), tmp_path / "base"
    load_base(str(checkpoints("llama")), skip).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    model, adapter = trained(base, tmp_path / "adapter")
    match = r"--onto original .* is 4-bit.*--base-model"
    refused(adapter, tmp_path / "out", match, onto="original")
    quant = QuantConfig(blocksize=32, compute_dtype="fp32")
    other = trained(checkpoints("llama"), tmp_path / "other", quant).adapter
    match = "is NF4 of blocksize 64.*on NF4 of blocksize 32"
    refused(other, tmp_path / "out", match, base_model=str(base))
    tensors = merged(adapter, tmp_path / "out", format="fp32")
    assert not any("absmax" in name or "quant" in name for name in tensors)
    assert "quantization_config" not in Checkpoint(tmp_path / "out").config
    require_logits(tmp_path / "out", logits(model))
    run_merge(adapter, tmp_path / "nf4", format="nf4", calibration=rows_file(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32)
    kinds = {n: isinstance(again.get_submodule(n), Linear4bit) for n in lora_layers(model)}
    assert kinds == {n: "o_proj" not in n for n in kinds}


# ---- 4 bits ----


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_4_bit_merge_opens_in_transformers_and_holds_the_adapter(family, trained_on, tmp_path):
    model, adapter = trained_on(family)
    output, data = tmp_path / "out", rows_file(tmp_path)
    tensors = merged(adapter, output, format="nf4", calibration=data)
    again = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    # the very tensors that transformers writes
    assert again.state_dict().keys() == tensors.keys() | {"lm_head.weight"}
    facts = report_of(output)["layers"]
    for name, live in lora_layers(model).items():
        layer = again.get_submodule(name)
        assert isinstance(layer, Linear4bit), name
        delta = live.get_delta_weight("default").detach()
        change = nf4.dequantize(codes_of(layer)) - nf4.dequantize(codes_of(live.base_layer))
        # in the outputs the change is delta (the report); in the weights it is not far off
        assert facts[name]["kept"] == pytest.approx(1, abs=0.05), name
        assert relative_error(change, delta) < 1.5, name
        assert float((change * delta).sum() / delta.square().sum()) > 0.5, name  # a no-op gives 0
    linear = {n for n, m in again.named_modules() if isinstance(m, Linear4bit)}
    assert linear == set(lora_layers(model))  # no more and no less than in training


@pytest.mark.parametrize("settings", [{"blocksize": 32}, {"double_quant": False}], ids=str)
def test_another_grid_than_in_training(settings, trained_on, tmp_path):
    output, data = tmp_path / "out", rows_file(tmp_path)
    settings = {"format": "nf4", "calibration": data} | settings
    tensors = merged(trained_on("llama").adapter, output, **settings)
    absmax = tensors["model.layers.0.mlp.up_proj.weight.absmax"]
    assert len(absmax) == 128 * 64 // settings.get("blocksize", 64)
    assert absmax.dtype == (torch.uint8 if settings.get("double_quant", True) else torch.float32)
    config = Checkpoint(output).config["quantization_config"]
    assert config["bnb_4bit_use_double_quant"] is settings.get("double_quant", True)
    AutoModelForCausalLM.from_pretrained(output)


def test_calibration_uses_the_training_data_by_default(trained_on, tmp_path, capsys, monkeypatch):
    adapter = shutil.copytree(trained_on("llama").adapter, tmp_path / "adapter")
    data = rows_file(tmp_path)
    (adapter / "run.yaml").write_text(f"config:\n  data: {data}\n")
    named = merged(adapter, tmp_path / "named", format="nf4")
    given = merged(adapter, tmp_path / "given", format="nf4", calibration=data)
    torch.testing.assert_close(named, given, rtol=0, atol=0)
    # as of a run in another folder, which gave a name that is another file's here
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "rows.jsonl").write_text('{"text": "others"}\n')
    monkeypatch.chdir(elsewhere)
    text = f"config:\n  data: rows.jsonl\ndata_paths: [{data}]\n"
    (adapter / "run.yaml").write_text(text)
    found = merged(adapter, tmp_path / "found", format="nf4")
    torch.testing.assert_close(found, given, rtol=0, atol=0)
    (adapter / "run.yaml").unlink()
    monkeypatch.setattr(measure, "TOKENS", (256, 2))
    without = merged(adapter, tmp_path / "without", format="nf4")
    assert "model calibrates on text that it generates" in capsys.readouterr().out
    assert any(not torch.equal(without[name], given[name]) for name in given)


def test_the_number_of_calibration_tokens_reaches_the_calibration(
    trained_on, tmp_path, monkeypatch
):
    def calibrate(*_, tokens, **others):
        raise UserError(f"asked for {tokens}")

    monkeypatch.setattr(measure, "calibrate", calibrate)
    settings = {"format": "nf4", "calibration": "self", "calibration_tokens": 100}
    with pytest.raises(UserError, match="asked for 100"):
        run_merge(trained_on("llama").adapter, tmp_path / "out", **settings)


@on_gpu
def test_merging_on_the_gpu_gives_the_same(trained_on, tmp_path):
    adapter = trained_on("llama").adapter
    on_cpu = merged(adapter, tmp_path / "cpu", format="fp32")
    on_gpu = merged(adapter, tmp_path / "gpu", format="fp32", device="cuda")
    for name, tensor in on_cpu.items():
        # the mean of the absmax is summed in another order: some 8-bit absmax may differ by one
        assert relative_error(on_gpu[name], tensor) <= 1e-3, name


@pytest.mark.parametrize("format", ["bf16", "nf4"])
def test_the_printed_commands_can_be_pasted(format, trained_on, tmp_path, capsys):
    settings = {"calibration": "none"} if format == "nf4" else {}
    output = tmp_path / 'it\'s "mine"'
    run_merge(trained_on("llama").adapter, output, format=format, **settings)
    lines = capsys.readouterr().out.splitlines()
    load = next(line for line in lines if "from_pretrained" in line)
    assert type(eval(load, {"AutoModelForCausalLM": AutoModelForCausalLM})).__name__ == (
        "LlamaForCausalLM"
    )
    serve = next(line for line in lines if "vllm serve" in line)
    assert shlex.split(serve, comments=True) == ["vllm", "serve", str(output)]
    assert ("vllm-bnb-plugin" in serve) == (format == "nf4")
    assert len({path.stat().st_mode for path in output.iterdir()}) == 1


@pytest.mark.parametrize("known_from", ["record", "tokenizer", "base", "base without settings"])
def test_a_merged_model_stops_where_training_taught(
    known_from, base_with_another_eos, tmp_path, capsys
):
    """The adapter's record, or the chat template of its tokenizer, or else of the base's."""
    base, output = base_with_another_eos, tmp_path / "merged"
    settings = base / "generation_config.json"
    kept = {"eos_token_id": 0, "do_sample": True, "temperature": 0.6, "max_new_tokens": 7}
    settings.write_text(json.dumps(kept))
    adapter = trained(base, tmp_path / "adapter").adapter
    if known_from == "record":
        (adapter / "generation_config.json").write_text('{"eos_token_id": [2, 9], "top_k": 1}')
    elif known_from == "tokenizer":
        AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
        (base / "chat_template.jinja").unlink()
    elif known_from == "base without settings":
        settings.unlink()
        kept = {"bos_token_id": 1, "pad_token_id": 0}  # of config.json
    run_merge(adapter, output)
    stops = [0, 2, 9] if known_from == "record" else [0, 2]
    written = json.loads((output / "generation_config.json").read_text())
    assert written == written | kept | {"eos_token_id": stops}
    assert Checkpoint(output).config["eos_token_id"] == stops
    assert "answers end at <|im_end|>" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert loaded.generation_config.eos_token_id == stops


def test_a_base_quantized_by_another_program_is_refused(trained_on, checkpoints, tmp_path):
    base = shutil.copytree(checkpoints("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (base / "config.json").write_text(json.dumps(config))
    match = "already quantized, with fp8: give its 16-bit model"
    refused(trained_on("llama").adapter, tmp_path / "out", match, base_model=str(base))


def test_model_types_that_allow_one_stop_token_keep_that_of_their_config(tmp_path):
    for kind, allowed in (("llama", True), ("chinese_clip_text_model", False)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        assert allows_stops(Checkpoint(tmp_path), [0, 2]) == allowed
        assert allows_stops(Checkpoint(tmp_path), 2)


def test_generation_settings_that_need_no_change_are_copied(
    trained_on, checkpoints, tmp_path, capsys
):
    run_merge(trained_on("llama").adapter, tmp_path / "out")
    name = "generation_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (checkpoints("llama") / name).read_bytes()
    assert "answers end" not in capsys.readouterr().out
