"""Adapters are added, chosen, disabled, and mixed by rows; an error leaves the model as it was."""

import re

import pytest
import torch
from adapter_kinds import logits, refused
from conftest import FP32, randomize_adapter, tiny_model, token_ids
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora import LoraConfig, apply_lora, load_base, mixed_batch, print_trainable_parameters
from qlora.adapters import delete_adapter, disable_adapter, merge_adapter, merge_and_unload
from qlora.adapters.apply import active_adapters, adapter_configs, set_adapter, trainable_parameters
from qlora.adapters.files import parameters_by_file_name
from qlora.adapters.lora import lora_layers


def add(model, name, *targets, **settings):
    settings = {"r": 2, "target_modules": targets or "all-linear"} | settings
    return apply_lora(model, LoraConfig(**settings), adapter_name=name)


@pytest.mark.parametrize("training", [True, False])
def test_a_new_adapter_is_all_that_trains_and_changes_no_logit(training):
    model = tiny_model("llama").train(training)
    before, kind, config = logits(model), type(model), model.config
    assert add(model, "one", "q_proj") is model
    assert torch.equal(logits(model), before)
    assert (type(model), model.config) == (kind, config)
    assert adapter_configs(model) == {"one": LoraConfig(r=2, target_modules=("q_proj",))}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"model.layers.{i}.self_attn.q_proj.lora_{side}.one" for i in (0, 1) for side in "AB"
    }
    assert {module.training for module in model.modules()} == {training}


def test_names_of_adapters():
    """They are names of folders, and keys of a ParameterDict, whose attributes exclude some."""
    model = tiny_model("llama")
    for name in ("", "a.b", "a b", "a/b", "../up", "train", "half", "keys", "_keys", "_parameters"):
        with refused(model, f"adapter_name must be .*, got {re.escape(repr(name))}$"):
            add(model, name, modules_to_save=("norm",))


def test_print_trainable_parameters(capsys, checkpoints):
    four_bit = load_base(str(checkpoints("llama")), FP32, device="cpu")  # counts values, not bytes
    size = sum(p.numel() for p in tiny_model("llama").parameters())
    assert trainable_parameters(four_bit) == (0, size)
    with torch.device("meta"):  # names and shapes of SmolLM2-135M
        smollm2 = LlamaForCausalLM(LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
        ))  # fmt: skip
    ranks = {r"layers\.\d\.mlp\.up_proj": 4}
    print_trainable_parameters(add(smollm2, "one", r=16, rank_pattern=ranks))
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines[1:-1]] == [
        "q_proj 30 576 x 576 16 552,960",
        "k_proj 30 192 x 576 16 368,640",
        "v_proj 30 192 x 576 16 368,640",
        "o_proj 30 576 x 576 16 552,960",
        "gate_proj 30 1536 x 576 16 1,013,760",
        "up_proj 10 1536 x 576 4 84,480",
        "down_proj 30 576 x 1536 16 1,013,760",
        "up_proj 20 1536 x 576 16 675,840",
    ]
    assert lines[-1] == "trainable 4,631,040 of 139,146,048 parameters (3.33%)"


@pytest.fixture
def two():
    """A model with the adapters `first` (q_proj) and `second` (q_proj and v_proj, active)."""
    model = add(add(tiny_model("llama"), "first", "q_proj"), "second", "q_proj", "v_proj")
    randomize_adapter(model)
    return model


def test_set_adapter_makes_active_and_trainable(two):
    layer = two.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(layer.base_layer) is nn.Linear and list(layer.lora_A) == ["first", "second"]
    for names in (["second"], ["first", "second"], ["first"]):
        set_adapter(two, names)
        trainable = {n.rpartition(".")[2] for n, p in two.named_parameters() if p.requires_grad}
        assert trainable == set(active_adapters(two)) == set(names)
    alone = add(tiny_model("llama"), "first", "q_proj")
    ours, theirs = (parameters_by_file_name(model, "first") for model in (alone, two))
    for name, parameter in ours.items():
        parameter.data.copy_(theirs[name])
    assert torch.equal(logits(two), logits(alone))


def test_unknown_taken_and_repeated_names_are_refused(two):
    for call, names, message in (
        (set_adapter, ["first", "secnd"], r"first, second\. Did you mean second\?"),
        (set_adapter, ["first", "second", "first"], "'first' is named twice"),
        (merge_adapter, ["first", "first"], "'first' is named twice"),
        (merge_and_unload, ["first", "first"], "'first' is named twice"),
        (lambda _, name: set_adapter(tiny_model("llama"), name), "default", "which has: none"),
        (add, "first", "already has an adapter 'first'"),
    ):
        with refused(two, message):
            call(two, names)


def test_blocks_without_adapters_can_be_nested_and_end_by_an_error(two):
    """The last bits depend on the order in which adapters add up."""
    set_adapter(two, ["second", "first"])
    adapted, base = logits(two), logits(tiny_model("llama"))
    assert not torch.allclose(adapted, base)
    with pytest.raises(RuntimeError, match="inside"), disable_adapter(two):
        with disable_adapter(two):
            pass
        assert torch.equal(logits(two), base)
        raise RuntimeError("inside")
    assert torch.equal(logits(two), adapted)


def test_adapters_may_be_added_and_deleted_while_disabled(two):
    set_adapter(two, "first")
    first = logits(two)
    set_adapter(two, ["first", "second"])
    with disable_adapter(two):
        delete_adapter(two, "second")
        add(two, "third", "o_proj")
        for layer in lora_layers(two).values():
            if "third" in layer.lora_B:
                layer.lora_B["third"].data.fill_(1)
    assert active_adapters(two) == ("first",)
    assert torch.equal(logits(two), first)


def test_an_inactive_adapter_costs_memory_only():
    one, two = (add(tiny_model("llama"), "one") for _ in "ab")
    set_adapter(add(two, "two", r=8, use_dora=True, modules_to_save=("norm",)), "one")

    operations = []
    for model in (one, two):
        with torch.profiler.profile(acc_events=True) as profile:
            logits(model)
        operations.append([e.name for e in profile.events() if e.name.startswith("aten::")])
    assert operations[0] == operations[1]


@pytest.fixture
def four(checkpoints):
    """A 4-bit base with adapters of four ranks, of which one is not on every layer."""
    model = load_base(str(checkpoints("llama")), FP32)
    for r in range(1, 5):
        add(model, f"r{r}", *(("q_proj",) if r == 3 else ()), r=r)
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
    lora_B = lora_layers(four)["model.layers.0.self_attn.q_proj"].lora_B
    assert lora_B["r1"].grad.any() and not lora_B["r4"].grad.any() and lora_B["r2"].grad is None


def test_dora_experts_unknown_names_and_other_counts_are_not_mixed_by_rows(four):
    set_adapter(add(four, "dora", use_dora=True), "r1")
    experts = LoraConfig(target_modules=(), target_parameters=("experts.down_proj",))
    mixtral = apply_lora(tiny_model("mixtral"), experts)
    for model, names, message in (
        (four, ["r1", "dora"], "'dora' is DoRA's"),
        (four, ["r1", "r5"], "no adapter 'r5'"),
        (four, ["r1", "r2", "r1"], r"3 adapter names .* 2 rows: give one name a row"),
        (mixtral, ["default"], "changes experts"),
    ):
        with refused(model, message), mixed_batch(model, names):
            logits(model)
