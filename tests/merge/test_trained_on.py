"""Adapters that were trained on the base in 16 bits: merged, calibrated and verified on it."""

import json
import shutil

import peft
import pytest
import torch
from conftest import FP32
from merging import merged, refused, report_of, require_logits, rows_file, run_merge, trained
from transformers import AutoModelForCausalLM

from qlora import load_base
from qlora.adapters.format import CONFIG
from qlora.merge.measure import read_examples

ON_16_BITS = {"trained_on": "16bit"}


def card(output):
    return (output / "README.md").read_text().replace("\n", " ")


@pytest.fixture
def adapter(adapter_build):
    return adapter_build("lora", "plain").peft_folder


def test_the_merged_model_is_pefts_on_the_16_bit_base(
    adapter, adapter_build, checkpoints, tmp_path
):
    base = AutoModelForCausalLM.from_pretrained(checkpoints("llama", False), dtype=torch.float32)
    wanted = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    full = merged(adapter, tmp_path / "fp32", format="fp32", **ON_16_BITS)
    half = merged(adapter, tmp_path / "bf16", **ON_16_BITS)
    assert full.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(full[name], tensor, rtol=1e-6, atol=1e-8)  # order of products
        assert torch.equal(half[name], full[name].bfloat16())
    require_logits(tmp_path / "fp32", adapter_build("lora", "plain").logits)
    report = report_of(tmp_path / "bf16")
    assert (report["trained_on"], report["onto"]) == ("16bit", "original")
    assert "into the original weights, as it was in training" in card(tmp_path / "bf16")


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_4_bits_are_chosen_and_measured_on_the_16_bit_base(
    format, adapter, checkpoints, tmp_path, capsys, monkeypatch
):
    for tokens in "TOKENS", "TOKENS_IN_SEQUENCE":
        monkeypatch.setattr(f"qlora.merge.measure.{tokens}", (256, 2))
    adapter = shutil.copytree(adapter, tmp_path / "stronger")  # else losses differ by 5e-3 or less
    values = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(values | {"lora_alpha": 30 * values["lora_alpha"]}))
    data, output, base = rows_file(tmp_path), tmp_path / "out", checkpoints("llama", False)
    settings = {"format": format, "calibration": data, "verify": data, **ON_16_BITS}
    run_merge(adapter, output, **settings)
    said = capsys.readouterr().out
    assert "\n  16-bit base " in said and "does not record" not in said
    got = report_of(output)["verify"]
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, adapter)
    batches = read_examples(data, base)
    losses = []
    for model in (AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), theirs):
        with torch.no_grad():
            each = [
                torch.nn.functional.cross_entropy(
                    model(batch["input_ids"], attention_mask=batch["attention_mask"])
                    .logits[:, :-1]
                    .flatten(0, 1),
                    batch["labels"][:, 1:].flatten(),
                    reduction="sum",
                )
                for batch in batches
            ]
        losses.append(float(sum(each)) / got["tokens"])
    # fp32, or bf16 where the machine has it
    assert [got["loss_base"], got["loss_live"]] == pytest.approx(losses, abs=5e-3)
    assert abs(losses[0] - losses[1]) > 2e-2
    assert 0 < got["kl"] < 0.1
    assert all(
        facts["kept"] == pytest.approx(1, abs=0.1) for facts in report_of(output)["layers"].values()
    )


def test_what_the_files_tell(adapter, checkpoints, tmp_path, capsys):
    hint = "give --trained-on 16bit"
    own = trained(checkpoints("llama"), tmp_path / "own").adapter
    match = r"was trained on NF4, its files tell: leave --trained-on 16bit out, or merge --onto"
    refused(own, tmp_path / "out", match, **ON_16_BITS)
    capsys.readouterr()
    run_merge(own, tmp_path / "of own")
    assert "does not record" not in capsys.readouterr().out
    assert report_of(tmp_path / "of own")["trained_on"] == "nf4"

    run_merge(adapter, tmp_path / "unknown")
    assert hint in capsys.readouterr().out
    load_base(str(checkpoints("llama", False)), FP32).save_pretrained(tmp_path / "4 bits")
    run_merge(adapter, tmp_path / "known", base_model=str(tmp_path / "4 bits"))
    assert hint not in capsys.readouterr().out
    match = "--trained-on 16bit needs the weights in 16 bits, .* give the 16-bit model as --base-m"
    refused(adapter, tmp_path / "out", match, base_model=str(tmp_path / "4 bits"), **ON_16_BITS)

    named = shutil.copytree(adapter, tmp_path / "named")
    values = json.loads((named / CONFIG).read_text())
    base = values["base_model_name_or_path"]
    (named / CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": "a/b-bnb-4bit"}))
    run_merge(named, tmp_path / "by name", base_model=base)
    assert hint not in capsys.readouterr().out


def test_it_may_be_merged_onto_another_base_than_in_training(adapter, tmp_path):
    data = rows_file(tmp_path)
    run_merge(adapter, tmp_path / "auto", onto="auto", verify=data, **ON_16_BITS)
    auto = report_of(tmp_path / "auto")
    run_merge(adapter, tmp_path / "nf4", onto="nf4", verify=data, **ON_16_BITS)
    nf4 = report_of(tmp_path / "nf4")["verify"]
    assert auto["verify"]["loss_live"] == nf4["loss_live"]  # of the 16-bit base, each time
    assert auto["verify"]["loss_merged"] <= nf4["loss_merged"]
    assert "4 bits (NF4, blocksize 64), with which it was not" in card(tmp_path / "nf4")
