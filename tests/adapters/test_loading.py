"""What is tried: found before it is loaded, and loaded as it was trained."""

import json
import shutil

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import FP32, tiny_model, tiny_tokenizer, token_ids
from transformers import AutoModelForCausalLM

from qlora import load_adapter, load_base
from qlora.adapters import live as loading
from qlora.adapters.live import resolve_model
from qlora.config import MergeConfig, ModelChoice
from qlora.errors import UserError
from qlora.merge import merge


@torch.no_grad()
def logits(model):
    return model(token_ids()).logits.float()


def test_an_adapter_is_live_on_its_base_in_the_dtype_of_training(adapters, checkpoints):
    base = checkpoints("llama")
    model = resolve_model(ModelChoice(adapter=str(adapters("llama")))).load()
    assert not model.training
    assert model.dtype == torch.float32  # the adapter was made on such a base
    twin = load_base(str(base), FP32)
    load_adapter(twin, adapters("llama"))
    assert torch.equal(logits(model), logits(twin.eval()))


def test_a_whole_model_stays_as_it_is(adapters, checkpoints, tmp_path):
    folder = str(checkpoints("llama"))
    whole = resolve_model(ModelChoice(model=folder, compute_dtype="fp32")).load()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(whole), logits(plain))
    quantized = resolve_model(
        ModelChoice(model=folder, load_in_4bit=True, compute_dtype="fp32")
    ).load()
    assert torch.equal(logits(quantized), logits(load_base(folder, FP32).eval()))
    merged = str(tmp_path / "merged")
    merge(MergeConfig(adapter=str(adapters("llama")), output_dir=merged, format="nf4"))
    found = resolve_model(ModelChoice(model=merged))
    assert any(isinstance(module, Linear4bit) for module in found.load().modules())
    assert found.describe().startswith(f"{merged} (4-bit NF4, computed in ")


def test_a_dtype_without_units_is_not_taken_from_training(adapters, tmp_path, monkeypatch):
    found = resolve_model(ModelChoice(adapter=str(adapters("llama"))))
    monkeypatch.setitem(found.adapter.base, "compute_dtype", "bf16")
    for own, taken in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        monkeypatch.setattr(loading, "compute_dtype", lambda quant, device, own=own: own)
        assert found.quantization.compute_dtype == taken


@pytest.fixture
def broken(adapters, checkpoints, tmp_path):
    """Folders that are not what they are given as."""
    (tmp_path / "empty").mkdir()
    cut = tmp_path / "cut"
    for step in (9, 10):
        shutil.copytree(adapters("llama"), cut / f"checkpoint-{step}")
    moved = tmp_path / "moved"
    shutil.copytree(adapters("llama"), moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (moved / "adapter_config.json").write_text(json.dumps(config))
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    return tmp_path


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"adapter": "empty"}, "holds no adapter_config.json: give the folder with"),
        ({"adapter": "gone"}, "gone does not exist: give the folder with adapter_config.json"),
        ({"adapter": "other"}, "is a whole model, not an adapter: give it as --model"),
        ({"adapter": "cut"}, r"holds no adapter: give its last checkpoint, .*checkpoint-10$"),
        (
            {"adapter": "moved"},
            r"was trained on .*gone, which could not be found: .* new place as --base-model$",
        ),
        ({"adapter": "moved", "base_model": "other"}, "belongs to another base: it was trained on"),
        ({"adapter": "moved", "base_model": "gone"}, r"^model .*gone does not exist: give a"),
        ({"model": "cut/checkpoint-9"}, "is an adapter, not a whole model: give it as --adapter"),
        ({"model": "empty"}, "is no model: it holds no config.json"),
    ],
)
def test_what_does_not_fit_is_found_before_anything_is_loaded(broken, choice, message):
    with pytest.raises(UserError, match=message):
        resolve_model(ModelChoice(**{key: str(broken / value) for key, value in choice.items()}))


def test_shapes_are_compared_where_no_fingerprint_is_known(broken, checkpoints, monkeypatch):
    adapter = broken / "cut" / "checkpoint-9"
    read = loading.read_adapter

    def as_peft_writes(folder):
        found = read(folder)
        found.base.clear()
        return found

    monkeypatch.setattr(loading, "read_adapter", as_peft_writes)
    choice = ModelChoice(adapter=str(adapter), base_model=str(checkpoints("gpt2")))
    with pytest.raises(UserError, match=r"does not fit this model: .*q_proj is no layer of this"):
        resolve_model(choice)
    assert resolve_model(ModelChoice(adapter=str(adapter), base_model=str(broken / "other")))


def test_a_model_without_a_tokenizer(checkpoints, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="bare holds no tokenizer that can be read"):
        resolve_model(ModelChoice(model=str(tmp_path / "bare"))).load_tokenizer()
