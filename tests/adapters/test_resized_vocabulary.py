"""Adapters of a model whose vocabulary was enlarged by resize_token_embeddings, PEFT's and ours."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_kinds import logits, move
from conftest import FP32, VOCAB, adapted_model, pefts_parameters, tiny_model
from merging import refused, require_logits, run_merge
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qlora import (
    LoraConfig,
    UserError,
    apply_lora,
    load_adapter,
    load_base,
    merge_and_unload,
    save_adapter,
    unload,
)
from qlora.base.checkpoint import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of tied and resized weights
GROWN, NEW = VOCAB + 8, [VOCAB, VOCAB + 5]
KINDS: dict[str, dict[str, Any]] = {
    "both in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding in full": {"modules_to_save": ["embed_tokens"]},
    "lora": {},
    "lora on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "rows": {"trainable_token_indices": NEW},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("resized")

    def folder(tied: bool) -> Path:
        path = root / str(tied)
        if not path.exists():
            tiny_model("llama", tied=tied).save_pretrained(path)
        return path

    return folder


def resized(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(5)
    model.resize_token_embeddings(GROWN, mean_resizing=False)
    return model


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_pefts_adapters_grow_embedding_head_and_vocab_size(kind, tied, base, tmp_path):
    settings = {"target_modules": ["q_proj"]} | KINDS[kind]
    theirs = peft.get_peft_model(resized(base(tied)), peft.LoraConfig(r=4, **settings)).eval()
    move(pefts_parameters(theirs))
    theirs.save_pretrained(tmp_path / "adapter")
    wanted = logits(theirs)
    again = load_adapter(resized(base(tied)), tmp_path / "adapter")  # resized by the user
    torch.testing.assert_close(logits(again), wanted, atol=1e-5, rtol=1e-5)
    live = AutoModelForCausalLM.from_pretrained(base(tied), dtype=torch.float32).eval()
    if not tied and "lora on" in kind:  # of the other of the two the file has no rows
        with pytest.raises(UserError, match=rf"rows of .*{GROWN}.*save that model"):
            load_adapter(live, tmp_path / "adapter")
        small = {"base_model": str(base(tied))}
        refused(tmp_path / "adapter", tmp_path / "out", "save that model", **small)
        return
    load_adapter(live, tmp_path / "adapter")
    torch.testing.assert_close(logits(live), wanted, atol=1e-5, rtol=1e-5)
    ids = torch.tensor([[5, *NEW, 7]])
    assert live(input_ids=ids, labels=ids).loss.isfinite() and live.config.vocab_size == GROWN
    original = {"onto": "original", "format": "fp32", "base_model": str(base(tied))}
    run_merge(tmp_path / "adapter", tmp_path / "merged", **original)
    require_logits(tmp_path / "merged", wanted)
    assert Checkpoint(tmp_path / "merged").config["vocab_size"] == GROWN
    merge_and_unload(live).save_pretrained(tmp_path / "unloaded")
    require_logits(tmp_path / "unloaded", wanted)


def test_unload_restores_the_vocab_size(base, tmp_path):
    theirs = peft.get_peft_model(resized(base(False)), peft.LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    live = AutoModelForCausalLM.from_pretrained(base(False), dtype=torch.float32)
    assert load_adapter(live, tmp_path).config.vocab_size == GROWN
    assert unload(live).config.vocab_size == VOCAB


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_vocabulary_resized_in_python_is_saved_with_ours(kind, tied, base, tmp_path):
    model = load_base(str(base(tied)), FP32)
    torch.manual_seed(5)
    model.resize_token_embeddings(GROWN, mean_resizing=False)
    settings = {"target_modules": ("q_proj",)} | {k: tuple(v) for k, v in KINDS[kind].items()}
    apply_lora(model, LoraConfig(r=4, **settings))
    move({name: p for name, p in model.named_parameters() if p.requires_grad})
    wanted = logits(model.eval())
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_base(str(base(tied)), FP32), tmp_path / "adapter")
    torch.testing.assert_close(logits(again.eval()), wanted, atol=1e-5, rtol=1e-5)
    run_merge(tmp_path / "adapter", tmp_path / "merged", format="fp32")
    require_logits(tmp_path / "merged", wanted)
    assert Checkpoint(tmp_path / "merged").config["vocab_size"] == GROWN


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_a_resize_after_the_adapter_is_refused_before_it_changes_the_model(saved, tied, base):
    model = load_base(str(base(tied)), FP32)
    apply_lora(model, LoraConfig(r=4, modules_to_save=(saved,)))
    wanted = logits(model)
    with pytest.raises(UserError, match=f"{saved}.* cannot be resized.*: resize the voc.*before"):
        model.resize_token_embeddings(GROWN)
    assert torch.equal(logits(model), wanted)
    assert len(model.resize_token_embeddings().weight) == VOCAB  # without arguments: a look
    unload(model).resize_token_embeddings(GROWN, mean_resizing=False)
    assert logits(model).shape[-1] == GROWN


def test_no_vocabulary_is_saved_with_an_adapter_of_the_base_s_size(base, tmp_path):
    save_adapter(adapted_model(base(False)), tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert not [name for name in names if "embed_tokens" in name or "lm_head" in name]


@pytest.mark.parametrize("saved", [(), ("embed_tokens",)])
def test_a_family_whose_embedding_has_more_rows_than_its_head_was_not_resized(
    saved, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from family_sizes import tiny_config

    base, quant = tmp_path / "base", replace(FP32, skip_modules=saved)
    AutoModelForImageTextToText.from_config(tiny_config("mllama")).save_pretrained(base)
    model = apply_lora(load_base(str(base), quant), LoraConfig(r=4, modules_to_save=saved)).eval()
    assert len(model.get_input_embeddings().weight) > model.config.vocab_size == 256
    move({name: p for name, p in model.named_parameters() if p.requires_grad})
    ids = torch.tensor([[5, 9, 7, 8]])
    wanted = model(ids, labels=ids)
    save_adapter(model, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum("embed_tokens" in name for name in names) == len(saved)
    again = load_adapter(load_base(str(base), quant), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, wanted.logits, atol=1e-5, rtol=1e-5)
    run_merge(tmp_path / "adapter", tmp_path / "merged", format="fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, wanted.logits, atol=1e-5, rtol=1e-5)
