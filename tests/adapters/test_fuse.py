"""Adapters fused into the base and removed, exactly; and combined, against PEFT's ways."""

from functools import partial
from typing import get_args

import peft
import pytest
import torch
from adapter_kinds import codes, logits, refused, same
from bitsandbytes.nn import Linear4bit
from conftest import FP32, axis, randomize_adapter, tiny_model, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora import LoraConfig, MergeConfig, QuantConfig, load_adapter, load_base, save_adapter
from qlora.adapters import delete_adapter, merge_adapter, merge_and_unload, unload, unmerge_adapter
from qlora.adapters.apply import adapter_configs, apply_lora, disable_adapter, set_adapter
from qlora.adapters.format import read_adapter
from qlora.adapters.fuse import Combination, add_weighted_adapter
from qlora.adapters.lora import LoRALinear, lora_layers
from qlora.base.modules import dense_weight
from qlora.merge import merge

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def adapted(checkpoints):
    """A 4-bit base with the adapters "other" and "default", the active one."""
    model = load_base(str(checkpoints("qwen2")), FP32)
    apply_lora(model, LoraConfig(r=3, target_modules=("q_proj",)), adapter_name="other")
    apply_lora(model, LoraConfig(r=4, use_dora=True))
    randomize_adapter(model, std=0.1)
    return model.eval()


def test_fused_weights_compute_what_the_adapter_does_and_unfuse_exactly(adapted):
    live, base = logits(adapted), codes(adapted)
    with disable_adapter(adapted):
        without = logits(adapted)
    merge_adapter(adapted)
    calls = []
    for layer in lora_layers(adapted).values():
        layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(logits(adapted), live, **CLOSE)
    assert not calls and same(codes(adapted), base)  # one product a layer
    assert not any("fused" in name for name in adapted.state_dict())
    with disable_adapter(adapted):
        assert torch.equal(logits(adapted), without)
    assert torch.equal(logits(unmerge_adapter(adapted)), live) and same(codes(adapted), base)
    merge_adapter(adapted).train()  # training unfuses
    adapted(input_ids=token_ids()).logits.sum().backward()
    for layer in lora_layers(adapted).values():
        assert layer.fused_weight is None and layer.lora_A["default"].grad is not None


def test_set_adapter_keeps_its_meaning_while_some_are_fused_and_after_one_is_deleted(adapted):
    choices = (["default"], ["other"], ["default", "other"])
    wanted = [set_adapter(adapted, names) or logits(adapted) for names in choices]
    for merged in ("default", "other"):
        merge_adapter(adapted, merged)
        for names, values in zip(choices, wanted, strict=True):
            set_adapter(adapted, names)
            torch.testing.assert_close(logits(adapted), values, **CLOSE)
        unmerge_adapter(adapted)
    set_adapter(adapted, "other")
    delete_adapter(adapted, "default")  # and wrappers without another
    assert adapter_configs(adapted).keys() == {"other"} and torch.equal(logits(adapted), wanted[1])
    assert all(name.endswith("q_proj") for name in lora_layers(adapted))
    assert not any("default" in name for name, _ in adapted.named_parameters())


def test_fusing_in_bf16_is_one_rounding(checkpoints):
    model = load_base(str(checkpoints("llama")), QuantConfig(compute_dtype="bf16"))
    apply_lora(model, LoraConfig(r=4))
    randomize_adapter(model, std=0.1)
    merge_adapter(model.eval())
    for layer in lora_layers(model).values():
        exact = dense_weight(layer.base_layer) + layer.get_delta_weight("default")
        assert layer.fused_weight.dtype == torch.bfloat16
        assert torch.equal(layer.fused_weight, exact.bfloat16())
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("family", axis("gpt2", "llama"))
def test_merge_and_unload_is_the_merge_of_the_files(family, checkpoints, tmp_path):
    model = load_base(str(checkpoints(family)), FP32)
    some = "c_fc" if family == "gpt2" else "up_proj"  # the other layers are 4-bit and not adapted
    apply_lora(model, LoraConfig(r=4, target_modules=(some,))).eval()
    randomize_adapter(model, std=0.1)
    folder, live = str(save_adapter(model, tmp_path / "adapter")), logits(model)
    merge_and_unload(model)
    assert not any(isinstance(m, Linear4bit | LoRALinear) for m in model.modules())
    torch.testing.assert_close(logits(model), live, **CLOSE)
    model.save_pretrained(tmp_path / "saved")
    merge(MergeConfig(adapter=folder, output_dir=str(tmp_path / "merged"), format="fp32"))
    assert same(*(load_file(tmp_path / f / "model.safetensors") for f in ("saved", "merged")))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(model))
    # an adapter trained over it is none of that base, which a merge would look for
    adapter = read_adapter(save_adapter(apply_lora(model, LoraConfig(r=4)), tmp_path / "second"))
    assert (adapter.base, adapter.quantization) == ({"task": "causal-lm"}, QuantConfig())


def test_refused_with_the_model_as_it_was(adapted):
    def refuse(message, call, *args):
        with refused(adapted, message):
            call(adapted, *args)

    refuse("no adapter 'othr' .* Did you mean other", merge_adapter, "othr")
    refuse("no adapter 'none'", delete_adapter, "none")
    refuse("'default' is active: set_adapter another first", delete_adapter, "default")
    refuse("no adapter is merged", unmerge_adapter)
    merge_adapter(adapted, "other")
    refuse("other is merged already: unmerge_adapter", merge_adapter)
    refuse("'other' is merged", delete_adapter, "other")
    adapted.train()
    refuse("training mode.*model.eval", merge_adapter)
    unload(adapted)
    refuse("no adapter is active", merge_and_unload)


TWO = (["one", "two"], [1, 1])
SETTINGS = {
    "one": {"r": 4, "lora_alpha": 8, "target_modules": ("q_proj", "down_proj")},
    "two": {"r": 4, "lora_alpha": 2, "target_modules": ("q_proj", "up_proj")},
    "six": {"r": 6, "lora_alpha": 6, "target_modules": ("q_proj",), "use_rslora": True},
    "dora": {"use_dora": True},
    "biased": {"lora_bias": True},
    "norm": {"modules_to_save": ("model.norm",)},
}


def ours(*names):
    model = tiny_model("llama")
    for name in names or ("one", "two"):
        apply_lora(model, LoraConfig(**SETTINGS[name]), adapter_name=name)
    randomize_adapter(model, std=0.3)
    return model.eval()


@pytest.mark.parametrize("weights", axis([0.7, -0.5], [1.0, 0.4]), ids=str)
@pytest.mark.parametrize(
    ("way", "signs"),
    [(way, "total") for way in get_args(Combination)]
    + [(way, "frequency") for way in ("ties", "dare_ties_svd")],
)
def test_combined_changes_are_pefts(way, signs, weights, monkeypatch, tmp_path):
    model, draws = ours(), torch.Generator()
    for name in ("one", "two"):
        save_adapter(model, tmp_path, adapter_name=name)
    other = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "one", "one").eval()
    other.load_adapter(tmp_path / "two", "two")

    def bernoulli(probability, generator=None):  # PEFT draws its layers' first values as well
        return (torch.rand(probability.shape, generator=draws) < probability).float()

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    settings = {"combination_type": way, "majority_sign_method": signs}
    if way.startswith(("ties", "dare", "magnitude")):
        settings["density"] = 0.4
    for combine in (partial(add_weighted_adapter, model), other.add_weighted_adapter):
        draws.manual_seed(5)
        combine(["one", "two"], weights, "new", **settings)
    layers = lora_layers(model)
    assert {n.rpartition(".")[2] for n in layers} == {"q_proj", "down_proj", "up_proj"}
    for name, layer in layers.items():
        wanted = other.get_submodule(f"base_model.model.{name}").get_delta_weight("new")
        torch.testing.assert_close(layer.get_delta_weight("new"), wanted, **CLOSE)
        assert wanted.abs().max() > 1e-3


def test_dare_draws_from_the_generator():
    model, settings = ours(), {"combination_type": "dare_linear", "density": 0.5}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generator = torch.Generator().manual_seed(seed)
        add_weighted_adapter(model, *TWO, name, **settings, generator=generator)
    drawn = next(iter(lora_layers(model).values())).lora_B
    assert torch.equal(drawn["a"], drawn["b"]) and not torch.equal(drawn["a"], drawn["c"])


@pytest.mark.parametrize("way", ["cat", "svd"])
def test_ranks_and_scalings_of_any_kind_add_up_exactly(way):
    model = ours("one", "two", "six")
    weights = {"one": 0.5, "two": -1.0, "six": 2.0}
    rank = 14 if way == "svd" else None
    add_weighted_adapter(model, [*weights], [*weights.values()], "new", way, rank)
    for layer in lora_layers(model).values():
        wanted = sum(w * layer.get_delta_weight(n) for n, w in weights.items() if n in layer.lora_A)
        torch.testing.assert_close(layer.get_delta_weight("new"), wanted, **CLOSE)
        assert len(layer.lora_A["new"]) == 14  # one rank for all, as the files want it


def test_a_combined_adapter_is_inactive_until_set_and_can_be_saved(tmp_path):
    model = ours()
    before = logits(model)
    add_weighted_adapter(model, *TWO, "new", "cat")
    assert torch.equal(logits(model), before)
    assert not any(layer.lora_A["new"].requires_grad for layer in lora_layers(model).values())
    wanted = set_adapter(model, ["one", "two"]) or logits(model)
    mixed = set_adapter(model, "new") or logits(model)
    torch.testing.assert_close(mixed, wanted, **CLOSE)
    folder = save_adapter(model, tmp_path, adapter_name="new")
    assert torch.equal(logits(load_adapter(tiny_model("llama"), folder).eval()), mixed)
    other = peft.PeftModel.from_pretrained(tiny_model("llama"), folder).eval()
    torch.testing.assert_close(logits(other), mixed, **CLOSE)


BAD_ARGUMENTS = [
    ((["one", "x"], [1, 1], "new"), "no adapter 'x'"),
    ((["one", "two"], [1], "new"), "a weight for each adapter, got 2 and 1"),
    (([], [], "new"), "a weight for each adapter"),
    ((["one", "one"], [1, 1], "new"), "named twice"),
    ((["one", "two"], [1, float("nan")], "new"), "finite"),
    ((*TWO, "one"), "already has an adapter 'one'"),
    ((*TWO, "new", "tie"), r"combination_type must be .*Did you mean ties\?"),
    ((*TWO, "new", "ties"), "ties needs one"),
    ((*TWO, "new", "cat", None, 0.5), "cat takes none"),
    ((*TWO, "new", "ties", None, 1.5), "above 0 and at most 1: got 1.5"),
    ((*TWO, "new", "ties", None, 0.0), "above 0 and at most 1: got 0.0"),
    ((*TWO, "new", "cat", 3), "svd_rank .* got 3 for cat"),
    ((*TWO, "new", "svd", 0), "svd_rank .* above 0: got 0 for svd"),
    ((*TWO, "new", "ties", None, 0.5, "mean"), "must be total or frequency"),
    ((["one", "six"], [1, 1], "new", "linear"), "linear wants adapters of one rank, at .*q_proj"),
    ((["one", "dora"], [1, 1], "new"), "'dora' is DoRA's, of which no weighted sum"),
    ((["one", "biased"], [1, 1], "new"), "'biased' has lora_bias, of which no weighted sum"),
    ((["one", "norm"], [1, 1], "new"), "trains model.norm beside its A and B, of which no"),
]


def test_bad_arguments_are_refused():
    model = ours(*SETTINGS)
    for args, message in BAD_ARGUMENTS:
        with refused(model, message):
            add_weighted_adapter(model, *args)
