"""Models for inference: checked before they are loaded, and loaded as in training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import conftest
import pytest
import torch
from adapter_kinds import logits
from bitsandbytes.nn import Linear4bit
from conftest import FP32, tiny_model
from transformers import AutoModelForCausalLM, LlamaModel

from qlora import UserError, load_adapter, load_base, save_adapter
from qlora.adapters import live
from qlora.adapters.live import resolve_model
from qlora.config import ModelChoice


def test_an_adapter_is_live_in_a_dtype_of_the_machine(adapters, checkpoints, monkeypatch):
    resolved = resolve_model(ModelChoice(adapter=str(adapters("llama"))))
    model = resolved.load()
    assert not model.training and model.dtype == torch.float32  # as in training
    twin = load_base(str(checkpoints("llama")), FP32)
    load_adapter(twin, adapters("llama"))
    assert torch.equal(logits(model), logits(twin.eval()))
    monkeypatch.setitem(resolved.adapter.base, "compute_dtype", "bf16")
    for best, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        monkeypatch.setattr(live, "compute_dtype", lambda quant, device, best=best: best)
        assert resolved.quantization.compute_dtype == name


def test_a_model_without_an_adapter_is_loaded_in_16_or_4_bits(adapters, checkpoints, tmp_path):
    choice = {"model": str(checkpoints("llama")), "compute_dtype": "fp32"}
    model = resolve_model(ModelChoice(**choice)).load()
    plain = AutoModelForCausalLM.from_pretrained(checkpoints("llama"), dtype=torch.float32)
    assert torch.equal(logits(model), logits(plain))
    quantized = resolve_model(ModelChoice(**choice, load_in_4bit=True)).load()
    assert torch.equal(logits(quantized), logits(load_base(choice["model"], FP32).eval()))
    quantized.save_pretrained(tmp_path)
    resolved = resolve_model(ModelChoice(model=str(tmp_path)))
    assert any(isinstance(module, Linear4bit) for module in resolved.load().modules())
    assert resolved.describe().startswith(f"{tmp_path} (4-bit NF4, computed in ")


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "bert without prefix", "bare"])
def test_models_that_generate_no_text_are_refused(family, checkpoints, tmp_path):
    if family == "bare":
        LlamaModel(conftest.CONFIGS["llama"]()).save_pretrained(tmp_path)
    else:
        tiny_model(family).save_pretrained(tmp_path)
    refusal = r"is a \w+, which generates no text|lacks \d+ tensors of a \w+"
    with pytest.raises(UserError, match=refusal):
        resolve_model(ModelChoice(model=str(tmp_path))).load()


def test_a_base_is_found_from_another_folder(checkpoints, tmp_path, monkeypatch):
    """By its absolute path; a relative one, of an older adapter, from the adapter's parents."""
    shutil.copytree(checkpoints("llama"), tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path / "models")
    save_adapter(conftest.adapted_model(Path("base")), "out")
    config = Path("out/adapter_config.json").resolve()
    written = json.loads(config.read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    assert resolve_model(ModelChoice(adapter="models/out")).adapter
    config.write_text(json.dumps(written | {"base_model_name_or_path": "base"}))
    (tmp_path / "models").rename(tmp_path / "moved")
    resolved = resolve_model(ModelChoice(adapter="moved/out"))
    assert resolved.checkpoint.folder == tmp_path / "moved" / "base"


WRONG = [
    ({"adapter": "empty"}, "holds no adapter_config.json: give the folder with"),
    ({"adapter": "gone"}, "gone does not exist: give the folder with adapter_config.json"),
    ({"adapter": "other"}, "not an adapter: give it as --model"),
    ({"adapter": "cut"}, r"holds no adapter: give its last checkpoint, .*checkpoint-10$"),
    ({"adapter": "moved"}, r"trained on .*gone, which could not be found: .* --base-model$"),
    ({"adapter": "moved", "base_model": "other"}, "belongs to another base: it was trained on"),
    ({"adapter": "moved", "base_model": "gone"}, r"^model .*gone does not exist: give a"),
    ({"model": "cut/checkpoint-9"}, "is an adapter, .*: give it as --adapter"),
    ({"model": "empty"}, "is no model: it holds no config.json"),
]


def test_wrong_folders_are_refused_before_loading(adapters, checkpoints, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    for step in (9, 10):
        shutil.copytree(adapters("llama"), tmp_path / "cut" / f"checkpoint-{step}")
    moved = shutil.copytree(adapters("llama"), tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (moved / "adapter_config.json").write_text(json.dumps(config))
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    for choice, message in WRONG:
        named = {key: str(tmp_path / name) for key, name in choice.items()}
        with pytest.raises(UserError, match=message):
            resolve_model(ModelChoice(**named))
    with pytest.raises(UserError, match=r"other .*tokenizer"):
        resolve_model(ModelChoice(model=str(tmp_path / "other"))).load_tokenizer()
    # shapes are compared where no fingerprint is known
    adapter = str(tmp_path / "cut" / "checkpoint-9")
    from_peft = replace(live.read_adapter(adapter), base={})
    monkeypatch.setattr(live, "read_adapter", lambda folder: from_peft)
    with pytest.raises(UserError, match=r"does not fit this model: .*q_proj is no layer of this"):
        resolve_model(ModelChoice(adapter=adapter, base_model=str(checkpoints("gpt2"))))
    assert resolve_model(ModelChoice(adapter=adapter, base_model=str(tmp_path / "other")))
