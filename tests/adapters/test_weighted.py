"""Adapters out of adapters, against PEFT's add_weighted_adapter."""

from typing import get_args

import peft
import pytest
import torch
from conftest import randomize_adapter, tiny_model, token_ids

from qlora.adapters.apply import adapter_configs, apply_lora, set_adapter
from qlora.adapters.files import load_adapter, save_adapter
from qlora.adapters.fuse import Combination, add_weighted_adapter
from qlora.adapters.lora import lora_layers
from qlora.config import LoraConfig
from qlora.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

SETTINGS = {
    "one": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "two": {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj"]},
    "six": {"r": 6, "lora_alpha": 6, "target_modules": ["q_proj"], "use_rslora": True},
}


def ours(*names):
    model = tiny_model("llama")
    for name in names or ("one", "two"):
        settings = SETTINGS[name]
        targets = tuple(settings["target_modules"])
        apply_lora(model, LoraConfig(**settings | {"target_modules": targets}), adapter_name=name)
    randomize_adapter(model, std=0.3)
    return model.eval()


def theirs(model):
    """PEFT's model with the adapters of `model`."""
    names = [*adapter_configs(model)]
    adapted = None
    for name in names:
        config = peft.LoraConfig(**SETTINGS[name])
        if adapted is None:
            adapted = peft.get_peft_model(tiny_model("llama"), config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
    for name, layer in lora_layers(model).items():
        other = adapted.get_submodule(f"base_model.model.{name}")
        for adapter in layer.lora_A:
            other.lora_A[adapter].weight.data = layer.lora_A[adapter].data.clone()
            other.lora_B[adapter].weight.data = layer.lora_B[adapter].data.clone()
    return adapted.eval()


@pytest.fixture
def draws(monkeypatch):
    """The generator that dare draws with; PEFT's would be used for its layers' values as well."""
    own = torch.Generator()

    def bernoulli(probability, generator=None):
        return (torch.rand(probability.shape, generator=own) < probability).float()

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    return own


def density(way):
    return 0.4 if way.startswith(("ties", "dare", "magnitude")) else None


@pytest.mark.parametrize("weights", [(0.7, 0.5), (1.0, -0.4)], ids=str)
@pytest.mark.parametrize("way", get_args(Combination))
def test_the_change_is_that_of_pefts(way, weights, draws):
    model = ours()
    other = theirs(model)
    draws.manual_seed(5)
    add_weighted_adapter(model, ["one", "two"], weights, "new", way, density=density(way))
    draws.manual_seed(5)
    other.add_weighted_adapter(
        ["one", "two"], list(weights), "new", combination_type=way, density=density(way)
    )
    layers = lora_layers(model)
    assert {n.rpartition(".")[2] for n in layers} == {"q_proj", "down_proj", "up_proj"}
    for name, layer in layers.items():
        wanted = other.get_submodule(f"base_model.model.{name}").get_delta_weight("new")
        torch.testing.assert_close(layer.get_delta_weight("new"), wanted, rtol=0, atol=1e-5)
        assert wanted.abs().max() > 1e-3


@pytest.mark.parametrize("way", ["ties", "dare_ties_svd"])
def test_signs_by_count_are_those_of_pefts(way, draws):
    model = ours()
    other = theirs(model)
    for who in (add_weighted_adapter, other.add_weighted_adapter):
        draws.manual_seed(5)
        settings = {
            "combination_type": way,
            "density": 0.5,
            "majority_sign_method": "frequency",
        }
        args = (["one", "two"], [0.5, 0.5], "new")
        who(*(args if who is not add_weighted_adapter else (model, *args)), **settings)
    for name, layer in lora_layers(model).items():
        wanted = other.get_submodule(f"base_model.model.{name}").get_delta_weight("new")
        torch.testing.assert_close(layer.get_delta_weight("new"), wanted, rtol=0, atol=1e-5)


def test_dare_draws_from_the_generator():
    drawn = []
    for seed in (1, 1, 2):
        model, generator = ours(), torch.Generator().manual_seed(seed)
        settings = {"combination_type": "dare_linear", "density": 0.5, "generator": generator}
        add_weighted_adapter(model, ["one", "two"], [1, 1], "new", **settings)
        drawn.append(next(iter(lora_layers(model).values())).lora_B["new"])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("way", ["cat", "svd"])
def test_ranks_and_scalings_of_any_kind_add_up_exactly(way):
    model = ours("one", "two", "six")
    weights = {"one": 0.5, "two": -1.0, "six": 2.0}
    add_weighted_adapter(
        model, [*weights], [*weights.values()], "new", way, 14 if way == "svd" else None
    )
    for layer in lora_layers(model).values():
        wanted = sum(w * layer.get_delta_weight(n) for n, w in weights.items() if n in layer.lora_A)
        torch.testing.assert_close(layer.get_delta_weight("new"), wanted, rtol=0, atol=1e-5)
        assert len(layer.lora_A["new"]) == 14  # one rank for all, as the files want it


def test_dora_is_refused():
    model = apply_lora(ours(), LoraConfig(r=4, use_dora=True), adapter_name="dora")
    with pytest.raises(UserError, match="'dora' is DoRA's, of which no weighted sum"):
        add_weighted_adapter(model, ["one", "dora"], [1, 1], "new", "cat")


def test_lora_bias_is_refused():
    model = apply_lora(ours(), LoraConfig(r=4, lora_bias=True), adapter_name="biased")
    with pytest.raises(UserError, match="'biased' has lora_bias, of which no weighted sum"):
        add_weighted_adapter(model, ["one", "biased"], [1, 1], "new", "cat")


def test_the_new_one_rests_until_it_is_set_and_can_be_saved(tmp_path):
    model = ours()
    with torch.no_grad():
        before = model(input_ids=token_ids()).logits
        add_weighted_adapter(model, ["one", "two"], [1.0, 1.0], "new", "cat")
        assert torch.equal(model(input_ids=token_ids()).logits, before)
        assert not any(layer.lora_A["new"].requires_grad for layer in lora_layers(model).values())
        set_adapter(model, ["one", "two"])
        wanted = model(input_ids=token_ids()).logits
        set_adapter(model, "new")
        mixed = model(input_ids=token_ids()).logits
        torch.testing.assert_close(mixed, wanted, rtol=0, atol=1e-5)
        save_adapter(model, tmp_path, adapter_name="new")
        again = load_adapter(tiny_model("llama"), tmp_path / "new").eval()
        assert torch.equal(again(input_ids=token_ids()).logits, mixed)
        other = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "new").eval()
        torch.testing.assert_close(other(input_ids=token_ids()).logits, mixed, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((["one", "x"], [1, 1], "new"), "no adapter 'x'"),
        ((["one", "two"], [1], "new"), "a weight for each adapter, got 2 and 1"),
        (([], [], "new"), "a weight for each adapter"),
        ((["one", "one"], [1, 1], "new"), "named twice"),
        ((["one", "two"], [1, float("nan")], "new"), "finite"),
        ((["one", "two"], [1, 1], "one"), "already has an adapter 'one'"),
        ((["one", "two"], [1, 1], "new", "tie"), r"combination_type must be .*Did you mean ties\?"),
        ((["one", "two"], [1, 1], "new", "ties"), "ties needs one"),
        ((["one", "two"], [1, 1], "new", "cat", None, 0.5), "cat takes none"),
        ((["one", "two"], [1, 1], "new", "ties", None, 1.5), "above 0 and at most 1, got 1.5"),
        ((["one", "two"], [1, 1], "new", "cat", 3), "svd_rank is the rank"),
        ((["one", "two"], [1, 1], "new", "svd", 0), "svd_rank is the rank"),
        ((["one", "two"], [1, 1], "new", "ties", None, 0.5, "mean"), "must be total or frequency"),
        (
            (["one", "six"], [1, 1], "new", "linear"),
            r"linear wants adapters of one rank, at .*q_proj",
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(args, message):
    model = ours("one", "two", "six")
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=message):
        add_weighted_adapter(model, *args)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert adapter_configs(model).keys() == {"one", "two", "six"}
