"""One weight under several names: an encoder-decoder's `shared`, its stacks' embeddings, its head.

The references are PEFT's live model for token rows, and for the rest the base itself with its one
weight changed by hand (PEFT wraps `shared`, which no encoder-decoder calls).
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_kinds import move
from conftest import FP32, OTHERS, VOCAB, axis, token_ids
from merging import refused, run_merge
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from qlora import LoraConfig, apply_lora, load_adapter, load_base, merge_and_unload, save_adapter
from qlora.adapters.files import parameters_by_file_name
from qlora.base.checkpoint import Checkpoint
from qlora.merge import plan

T5, BART = (OTHERS[name][1] for name in ("t5", "bart"))
FAMILIES: dict[str, dict[str, Any]] = {
    "bart": BART, "t5": T5, "marian": BART, "mbart": BART | {"scale_embedding": True},
    "pegasus": BART, "m2m_100": BART, "blenderbot": BART, "mt5": T5, "umt5": T5,
}  # fmt: skip
SHARED: dict[str, dict[str, Any]] = {  # of the one weight
    "copy": {"modules_to_save": ("shared",)},
    "lora": {"target_modules": ("shared",)},
    "dora": {"target_modules": ("shared",), "use_dora": True},
    "rows": {"trainable_token_indices": (5, 7)},
}
APART: dict[str, dict[str, Any]] = {  # of some of its names
    "head": {"modules_to_save": ("lm_head",)},
    "lora on the head": {"target_modules": ("lm_head",)},
    "encoder's": {"modules_to_save": ("encoder.embed_tokens",)},
    "both stacks'": {"target_modules": ("embed_tokens",)},
    "shared and head": {"target_modules": ("shared",), "modules_to_save": ("lm_head",)},
}


def inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": token_ids(), "labels": token_ids(length=6, seed=1)}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**inputs()).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("tied")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **FAMILIES[family])
            AutoModelForSeq2SeqLM.from_config(config).save_pretrained(root / family)
        return root / family

    return folder


def adapted(folder: Path, settings: dict[str, Any]) -> Any:
    """The 4-bit base with such an adapter, every value moved; each gets a gradient."""
    model = load_base(str(folder), FP32, task="seq2seq")
    apply_lora(model, LoraConfig(r=4, lora_alpha=8, **settings))
    parameters = parameters_by_file_name(model, "default")
    move(parameters)
    model.eval()(**inputs()).loss.backward()
    assert {name for name, p in parameters.items() if p.grad is None or not p.grad.any()} == set()
    return model


def require_merged(folder: Path, model: Any, tmp_path: Path) -> Path:
    """Loaded again, merged on disk and in memory, the model is the live one."""
    wanted = logits(model)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_base(str(folder), FP32, task="seq2seq"), tmp_path / "adapter")
    assert torch.equal(logits(again), wanted)
    run_merge(tmp_path / "adapter", tmp_path / "merged", format="fp32")
    merge_and_unload(model).save_pretrained(tmp_path / "unloaded")
    for output in (tmp_path / "merged", tmp_path / "unloaded"):
        opened, info = AutoModelForSeq2SeqLM.from_pretrained(output, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        torch.testing.assert_close(logits(opened), wanted, rtol=1e-5, atol=2e-5)
    return tmp_path / "merged"


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("family", ["bart", "t5", "marian", *axis(*list(FAMILIES)[2:])[1:]])
def test_an_adapter_on_the_shared_embedding_changes_each_use(family, kind, base, tmp_path):
    linear = ("q", "v") if "t5" in family else ("q_proj", "v_proj")
    settings = {"target_modules": linear} | SHARED[kind]
    model = adapted(base(family), settings)
    one = load_base(str(base(family)), FP32, task="seq2seq")
    if kind != "rows":
        if kind == "copy":
            apply_lora(one, LoraConfig(r=4, lora_alpha=8, target_modules=linear))
            for name, parameter in parameters_by_file_name(one, "default").items():
                parameter.data.copy_(parameters_by_file_name(model, "default")[name])
        name = next(n for n, m in one.named_modules() if n.rpartition(".")[2] == "shared")
        shared, wrapper = one.get_submodule(name), model.get_submodule(name)
        with torch.no_grad():
            if kind == "copy":
                shared.weight.copy_(wrapper.copies["default"]["weight"])
            else:
                shared.weight.add_(wrapper.get_delta_weight("default").T)
        torch.testing.assert_close(logits(model), logits(one), rtol=1e-5, atol=2e-5)
    else:
        save_adapter(model, tmp_path / "rows")
        opened = peft.PeftModel.from_pretrained(one, tmp_path / "rows")
        torch.testing.assert_close(logits(model), logits(opened), rtol=1e-5, atol=1e-5)
    merged = Checkpoint(require_merged(base(family), model, tmp_path))
    assert "lm_head.weight" not in merged.tensors  # still tied
    assert merged.config["tie_word_embeddings"] is True


@pytest.mark.parametrize("kind", APART)
@pytest.mark.parametrize("family", ["bart", "t5", *axis(*list(FAMILIES)[1:])[1:]])
def test_names_of_the_shared_weight_that_change_apart_are_untied(family, kind, base, tmp_path):
    merged = Checkpoint(require_merged(base(family), adapted(base(family), APART[kind]), tmp_path))
    assert sum(header.shape == (VOCAB, 64) for header in merged.tensors.values()) == 4
    # T5 always ties, except weights that differ, and takes the entry for another setting
    assert merged.config["tie_word_embeddings"] is ("t5" in family)


@pytest.mark.parametrize("kind", ["copy", "rows", "lora"])
def test_a_checkpoint_with_a_head_of_its_own_as_flan_t5(kind, base, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(base("t5"))
    model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, 64) / 8)
    model.encoder.embed_tokens.weight = nn.Parameter(model.shared.weight.detach().clone())
    model.save_pretrained(tmp_path / "base")
    assert len(Checkpoint(tmp_path / "base").tensors) == len(Checkpoint(base("t5")).tensors) + 2
    head = model.lm_head.weight.detach()
    settings = {"target_modules": ("q",)} | SHARED[kind]
    require_merged(tmp_path / "base", adapted(tmp_path / "base", settings), tmp_path)
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.lm_head.weight, head) and not torch.equal(merged.shared.weight, head)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_after_resize_token_embeddings_the_names_are_of_one_module(family, base):
    model = load_base(str(base(family)), FP32, task="seq2seq")
    model.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    apply_lora(model, LoraConfig(r=4, **SHARED["copy"]))
    model(**inputs()).loss.backward()
    grad = parameters_by_file_name(model, "default")
    assert next(p for n, p in grad.items() if n.endswith("shared.weight")).grad.any()


def test_a_plan_that_lacks_names_which_are_no_longer_tied_is_refused(base, tmp_path, monkeypatch):
    save_adapter(adapted(base("bart"), {}), tmp_path / "adapter")
    untie = lambda planner, _: setattr(planner, "unties", True)  # noqa: E731
    monkeypatch.setattr(plan._Planner, "_tie_or_untie", untie)
    refused(tmp_path / "adapter", tmp_path / "out", "model.encoder.embed_tokens.weight is missing")
