"""Adapters are added, chosen, disabled, and mixed by rows; an error leaves the model as it was."""

import pytest
import torch
from conftest import FP32, randomize_adapter, tiny_model, token_ids
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.adapters.apply import (
    active_adapters,
    adapter_configs,
    apply_lora,
    disable_adapter,
    mixed_batch,
    print_trainable_parameters,
    set_adapter,
    trainable_parameters,
)
from qlora.adapters.fuse import delete_adapter, merge_adapter, merge_and_unload
from qlora.adapters.lora import lora_layers
from qlora.base.load import load_base
from qlora.config import LoraConfig
from qlora.errors import UserError


def snapshot(model):
    """What an error must leave as it was: modules, parameters, and which are trainable."""
    modules = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    return modules, parameters, active_adapters(model), [*adapter_configs(model)]


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


# ---- one adapter ----


@pytest.mark.parametrize("training", [True, False])
def test_a_new_adapter_is_all_that_trains_and_changes_no_logit(training):
    model = tiny_model("llama").train(training)
    before, kind, config = logits(model), type(model), model.config
    lora = LoraConfig(r=2, target_modules=("q_proj",))
    assert apply_lora(model, lora) is model
    assert torch.equal(logits(model), before)
    assert (type(model), model.config) == (kind, config)
    assert adapter_configs(model) == {"default": lora}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"model.layers.{i}.self_attn.q_proj.lora_{side}.default" for i in (0, 1) for side in "AB"
    }
    assert {module.training for module in model.modules()} == {training}


def test_a_generator_decides_the_first_values():
    models = [
        apply_lora(tiny_model("llama"), generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    pairs = zip(*(lora_layers(model).values() for model in models), strict=True)
    same = [torch.equal(a.lora_A["default"], b.lora_A["default"]) for a, b in pairs]
    assert same == [True] * 14


def test_names_of_adapters():
    """They must be folders' names, and keys that no attribute of a ParameterDict is in the way of;
    such names work or are refused, but not half."""
    for name in ("", "a.b", "a b", "a/b", "../up", "train", "half", "keys", "_keys", "_parameters"):
        model = tiny_model("llama")
        before = snapshot(model)
        try:
            apply_lora(model, LoraConfig(r=2, modules_to_save=("norm",)), adapter_name=name)
        except UserError as error:
            assert "adapter_name must be" in str(error) and repr(name) in str(error)
            assert snapshot(model) == before
        else:
            assert name.isalpha() and set(adapter_configs(model)) == {name}


def smollm2():
    """SmolLM2-135M, on the meta device: names and shapes."""
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("targets", "r", "trainable"),
    [("all-linear", 16, 4_884_480), (("q_proj", "v_proj"), 1, 57_600)],
)
def test_trainable_parameters_of_smollm2(targets, r, trainable):
    model = apply_lora(smollm2(), LoraConfig(r=r, target_modules=targets))
    assert trainable_parameters(model) == (trainable, 134_515_008 + trainable)


def test_four_bit_weights_count_all_of_their_values(checkpoints):
    model = load_base(str(checkpoints("llama")), FP32, device="cpu")
    size = sum(p.numel() for p in tiny_model("llama").parameters())
    assert trainable_parameters(model) == (0, size)


def test_print_trainable_parameters(capsys):
    config = LoraConfig(r=16, rank_pattern={r"layers\.\d\.mlp\.up_proj": 4})
    print_trainable_parameters(apply_lora(smollm2(), config))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:-1]] == [
        ["q_proj", "30", "576", "x", "576", "16", "552,960"],
        ["k_proj", "30", "192", "x", "576", "16", "368,640"],
        ["v_proj", "30", "192", "x", "576", "16", "368,640"],
        ["o_proj", "30", "576", "x", "576", "16", "552,960"],
        ["gate_proj", "30", "1536", "x", "576", "16", "1,013,760"],
        ["up_proj", "10", "1536", "x", "576", "4", "84,480"],
        ["down_proj", "30", "576", "x", "1536", "16", "1,013,760"],
        ["up_proj", "20", "1536", "x", "576", "16", "675,840"],
    ]
    assert lines[-1] == "trainable 4,631,040 of 139,146,048 parameters (3.33%)"


# ---- several adapters ----


@pytest.fixture
def two():
    """A model with the adapters `first` (q_proj) and `second` (q_proj and v_proj, active)."""
    model = tiny_model("llama")
    apply_lora(model, LoraConfig(r=2, target_modules=("q_proj",)), adapter_name="first")
    apply_lora(model, LoraConfig(r=2, target_modules=("q_proj", "v_proj")), adapter_name="second")
    randomize_adapter(model)
    return model


def trainable_adapters(model):
    return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}


def test_set_adapter_makes_active_and_trainable(two):
    layer = two.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(layer.base_layer) is nn.Linear  # one wrapper for both
    assert list(layer.lora_A) == ["first", "second"]
    assert trainable_adapters(two) == set(active_adapters(two)) == {"second"}
    set_adapter(two, ["first", "second"])
    assert trainable_adapters(two) == set(active_adapters(two)) == {"first", "second"}
    set_adapter(two, "first")
    assert trainable_adapters(two) == set(active_adapters(two)) == {"first"}
    alone = apply_lora(tiny_model("llama"), LoraConfig(r=2, target_modules=("q_proj",)))
    for name, layer in lora_layers(alone).items():
        layer.lora_A["default"].data.copy_(two.get_submodule(name).lora_A["first"])
        layer.lora_B["default"].data.copy_(two.get_submodule(name).lora_B["first"])
    assert torch.equal(logits(two), logits(alone))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: set_adapter(m, "secnd"), "'secnd' on the model, which has: first, second"),
        (lambda m: set_adapter(m, ["first", "secnd"]), "Did you mean second?"),
        (lambda m: set_adapter(m, ["first", "second", "first"]), "'first' is named twice"),
        (lambda m: merge_adapter(m.eval(), ["first", "first"]), "'first' is named twice"),
        (lambda m: merge_and_unload(m, ["first", "first"]), "'first' is named twice"),
        (lambda m: apply_lora(m, adapter_name="first"), "already has an adapter 'first'"),
        (lambda m: set_adapter(tiny_model("llama"), "default"), "which has: none"),
    ],
)
def test_unknown_taken_and_repeated_names_are_refused(two, call, words):
    before, given = snapshot(two), logits(two)
    with pytest.raises(UserError) as error:
        call(two)
    assert words in str(error.value)
    assert snapshot(two) == before and torch.equal(logits(two), given)


# ---- disabled ----


def test_blocks_without_adapters_can_be_nested_and_end_by_an_error(two):
    adapted, base = logits(two), logits(tiny_model("llama"))
    assert not torch.allclose(adapted, base)
    with pytest.raises(RuntimeError, match="inside"), disable_adapter(two):
        with disable_adapter(two):
            pass
        assert torch.equal(logits(two), base)
        raise RuntimeError("inside")
    assert torch.equal(logits(two), adapted)


def test_adapters_may_come_and_go_inside_the_block(two):
    set_adapter(two, "first")
    first = logits(two)
    set_adapter(two, ["first", "second"])
    with disable_adapter(two):
        delete_adapter(two, "second")
        apply_lora(two, LoraConfig(r=2, target_modules=("o_proj",)), adapter_name="third")
        randomize_adapter(two, seed=3)
        for layer in lora_layers(two).values():  # randomize_adapter changed it, too
            if "first" in layer.lora_A:
                layer.lora_B["first"].data.zero_()
    assert active_adapters(two) == ("first",)
    assert not torch.equal(logits(two), first)
    assert torch.equal(logits(two), logits(tiny_model("llama")))  # third is not active


def test_the_last_bits_are_the_same_after_the_block():
    """They depend on the order in which adapters add up."""
    model = tiny_model("llama")
    for name, leaves in (("a", ("q_proj", "v_proj")), ("b", ("v_proj",)), ("c", ("v_proj",))):
        config = LoraConfig(r=2, target_modules=leaves)
        apply_lora(model, config, adapter_name=name)
    randomize_adapter(model)
    set_adapter(model, ["c", "b", "a"])
    before = logits(model)
    with disable_adapter(model):
        pass
    assert torch.equal(logits(model), before)


def test_an_inactive_adapter_costs_memory_only():
    """The same operations, one by one, as without it."""
    one = apply_lora(tiny_model("llama"), LoraConfig(r=2), adapter_name="one")
    two = apply_lora(tiny_model("llama"), LoraConfig(r=2), adapter_name="one")
    apply_lora(two, LoraConfig(r=8, use_dora=True, modules_to_save=("norm",)), adapter_name="two")
    set_adapter(two, "one")

    def operations(model: nn.Module) -> list[str]:
        with torch.profiler.profile(acc_events=True) as profile:
            logits(model)
        return [event.name for event in profile.events() if event.name.startswith("aten::")]

    assert operations(two) == operations(one)


# ---- rows of one batch ----


@pytest.fixture
def four(checkpoints):
    """A 4-bit base with adapters of four ranks, of which one is not on every layer."""
    model = load_base(str(checkpoints("llama")), FP32)
    for r, targets in ((1, "all-linear"), (2, "all-linear"), (3, ("q_proj",)), (4, "all-linear")):
        config, generator = (
            LoraConfig(r=r, target_modules=targets),
            torch.Generator().manual_seed(r),
        )
        apply_lora(model, config, adapter_name=f"r{r}", generator=generator)
    randomize_adapter(model, std=0.1)
    return model.eval()


def test_a_mixed_batch_is_its_adapters_one_by_one(four):
    names = ["r2", "r1", "r4", "r3", "r1", None, "r2", "r4"]
    ids = token_ids(rows=8)
    calls = []
    for layer in lora_layers(four).values():
        layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    merge_adapter(four, "r1")
    with torch.no_grad(), mixed_batch(four, names):
        mixed = four(input_ids=ids).logits
    assert len(calls) == len(lora_layers(four))  # one base pass
    for row, name in enumerate(names):
        with torch.no_grad(), disable_adapter(four):
            if name:
                set_adapter(four, name)
            alone = four(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=0, atol=1e-5)


def test_each_row_trains_its_own_adapter(four):
    for layer in lora_layers(four).values():
        layer.lora_B.requires_grad_(True)
    with mixed_batch(four, ["r1", "r4"]):
        four(input_ids=token_ids()).logits[0].sum().backward()  # the first row alone
    layer = lora_layers(four)["model.layers.0.self_attn.q_proj"]
    assert layer.lora_B["r1"].grad.abs().max() > 0
    assert layer.lora_B["r4"].grad.abs().max() == 0 and layer.lora_B["r2"].grad is None


def test_a_mixed_batch_generates(four):
    four.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 4, "do_sample": False}
    with mixed_batch(four, ["r1", "r4"]):
        both = four.generate(token_ids(), **settings)
    for row, name in enumerate(["r1", "r4"]):
        set_adapter(four, name)
        assert torch.equal(four.generate(token_ids()[row : row + 1], **settings)[0], both[row])


def test_what_cannot_be_mixed_by_rows(four):
    apply_lora(four, LoraConfig(r=2, use_dora=True), adapter_name="dora")
    set_adapter(four, "r1")
    for names, message in ((["r1", "dora"], "'dora' is DoRA's"), (["r1", "r5"], "no adapter 'r5'")):
        with pytest.raises(UserError, match=message), mixed_batch(four, names):
            pass
    experts = LoraConfig(target_modules=(), target_parameters=("experts.down_proj",))
    mixtral = apply_lora(tiny_model("mixtral"), experts)
    with pytest.raises(UserError, match="changes experts"), mixed_batch(mixtral, ["default"]):
        pass
    wrong = pytest.raises(UserError, match=r"3 adapter names .* 2 rows: give one name a row")
    with wrong, mixed_batch(four, ["r1", "r2", "r1"]):
        logits(four)
    assert logits(four).shape[0] == 2  # after the block all is as it was
