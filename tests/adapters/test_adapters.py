"""Targets mean what they mean in PEFT; adapters are put on, chosen and switched off."""

import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import FP32, randomize_adapter, tiny_model, token_ids
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers import LlamaConfig as LlamaModelConfig

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
from qlora.adapters.files import save_adapter
from qlora.adapters.format import read_adapter
from qlora.adapters.fuse import (
    delete_adapter,
    merge_adapter,
    merge_and_unload,
    unload,
    unmerge_adapter,
)
from qlora.adapters.lora import LoRALinear, lora_layers
from qlora.adapters.targets import target_layers
from qlora.base.load import load_base
from qlora.base.modules import dense_weight
from qlora.config import LoraConfig, MergeConfig, QuantConfig
from qlora.errors import UserError
from qlora.merge import merge

# transformers 5.23 deprecates a property that PEFT 0.21 asks for.
from_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

LLAMA_LEAVES = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"


def snapshot(model):
    """What an error must leave as it was: modules, tensors, and who is trainable."""
    modules = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    return modules, parameters


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=token_ids(), **kwargs).logits


def smollm2():
    """SmolLM2-135M, on the meta device: names and shapes."""
    config = LlamaModelConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def adapted_by_peft(model):
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


# ---- which layers ----


@from_peft
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", "all-linear"),
        ("llama", ("q_proj", "v_proj")),
        ("llama", ("self_attn.k_proj", "down_proj")),
        ("llama", ("layers.1.mlp.up_proj",)),
        ("llama", ("model.layers.0.self_attn.q_proj",)),
        ("llama", ("q_proj", "lm_head")),
        ("llama", r".*\.(q|k)_proj"),
        ("llama", r"model\.layers\.1\..*_proj"),
        ("llama", ".*mlp.*proj"),
        ("qwen3", "all-linear"),
        ("gemma", "all-linear"),
        ("phi", "all-linear"),
        ("phi", ("dense", "fc1")),
        ("mixtral", ("q_proj", "o_proj")),  # by all-linear PEFT means router and experts, too
    ],
)
def test_the_layers_are_those_that_peft_chooses(family, targets):
    model = apply_lora(tiny_model(family), LoraConfig(r=2, target_modules=targets))
    as_peft_has_it = targets if isinstance(targets, str) else list(targets)
    theirs = peft.get_peft_model(
        tiny_model(family), peft.LoraConfig(r=2, target_modules=as_peft_has_it)
    )
    assert set(lora_layers(model)) == adapted_by_peft(theirs)


@from_peft
@pytest.mark.parametrize("targets", ["all-linear", ("c_attn",), r".*mlp\.c_.*"])
def test_gpt2s_transposed_layers_are_those_that_peft_chooses(checkpoints, targets):
    base = load_base(str(checkpoints("gpt2")), FP32, device="cpu")
    model = apply_lora(base, LoraConfig(r=2, target_modules=targets))
    as_peft_has_it = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(r=2, target_modules=as_peft_has_it, fan_in_fan_out=True)
    theirs = peft.get_peft_model(tiny_model("gpt2"), config)
    assert set(lora_layers(model)) == adapted_by_peft(theirs)


@pytest.mark.parametrize("targets", ["all-linear", ("all-linear",)])
@pytest.mark.parametrize("family", ["llama", "gemma", "phi"])
def test_all_linear_leaves_the_output_head_alone(family, targets):
    names = target_layers(tiny_model(family), LoraConfig(target_modules=targets))
    assert names
    assert "lm_head" not in names


def test_targets_come_in_the_models_order():
    names = target_layers(tiny_model("llama"), LoraConfig(target_modules=("v_proj", "q_proj")))
    assert [name.split(".", 2)[2] for name in names] == [
        "0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj",
    ]  # fmt: skip


def test_part_of_a_name_is_no_ending():
    with pytest.raises(UserError, match="'proj' matches no layer"):
        target_layers(tiny_model("llama"), LoraConfig(target_modules=("proj",)))


def test_an_adapted_model_has_the_same_targets():
    """The matrices of an adapter, and the layer below it, are no targets."""
    model = tiny_model("llama")
    before = target_layers(model, LoraConfig())
    apply_lora(model, LoraConfig(r=2))
    assert target_layers(model, LoraConfig()) == before
    queries = target_layers(model, LoraConfig(target_modules=("q_proj",)))
    assert queries == [n for n in before if n.endswith("q_proj")]


@pytest.mark.parametrize(
    ("targets", "r", "trainable"),
    [
        ("all-linear", 16, 4_884_480),
        (("q_proj", "k_proj", "v_proj", "o_proj"), 16, 1_843_200),
        (("q_proj", "v_proj"), 16, 921_600),
        (("gate_proj", "up_proj", "down_proj"), 16, 3_041_280),
        ("all-linear", 1, 305_280),
    ],
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


# ---- putting it on ----


def test_a_new_adapter_changes_no_logit():
    model = tiny_model("llama")
    before = logits(model)
    assert apply_lora(model, LoraConfig(r=2)) is model
    assert torch.equal(logits(model), before)


def test_only_the_adapter_is_trainable():
    model = apply_lora(tiny_model("llama"), LoraConfig(r=2, target_modules=("q_proj",)))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"model.layers.{i}.self_attn.q_proj.lora_{side}.default" for i in (0, 1) for side in "AB"
    }


def test_the_class_and_config_of_the_model_stay():
    model = tiny_model("llama")
    kind, config = type(model), model.config
    apply_lora(model)
    assert (type(model), model.config) == (kind, config)
    assert adapter_configs(model) == {"default": LoraConfig()}


@pytest.mark.parametrize("training", [True, False])
def test_the_new_layer_is_in_the_old_ones_mode(training):
    model = apply_lora(tiny_model("llama").train(training), LoraConfig(r=2))
    assert {module.training for module in model.modules()} == {training}


def test_a_generator_decides_the_first_values():
    first, second = (
        apply_lora(tiny_model("llama"), generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    same = [
        torch.equal(a, b)
        for (name, a), (_, b) in zip(
            first.named_parameters(), second.named_parameters(), strict=True
        )
        if "lora_A" in name
    ]
    assert len(same) == 14
    assert all(same)


# ---- what is refused, and leaves the model as it was ----


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("query",), rf"target_modules 'query' matches no layer\..*from: {LLAMA_LEAVES}\."),
        (("q_prj",), r"'q_prj' matches no layer\. Did you mean q_proj\?"),
        (("q_proj", "x", "y"), r"target_modules 'x', 'y' matches no layer"),
        (".*query", r"'\.\*query' matches no layer"),
        (r".*mlp\.up", "matches no layer"),  # the whole name, not its beginning
        ("q_proj", "'q_proj' matches no layer"),  # a string is an expression over the full name
        ("*q_proj", r"'\*q_proj' is no regular expression \(.*\); for name endings give a list"),
        (
            ("norm",),
            r"convolution or embedding: model\.norm\. This model's linear layers: down_proj",
        ),
        (".*", r"no linear layer, convolution or embedding: .* …\. This"),
    ],
)
def test_bad_targets_are_refused(targets, message):
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(UserError, match=message):
        apply_lora(model, LoraConfig(target_modules=targets))
    assert snapshot(model) == before


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(UserError, match="all-linear found no linear layer in this model"):
        apply_lora(nn.Sequential(nn.Embedding(2, 2)))


@pytest.mark.parametrize("name", ["", "a.b", "a b", "a/b", "../up"])
def test_bad_names_are_refused(name):
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(UserError, match=r"adapter_name must be letters, digits, - and _, .* got"):
        apply_lora(model, adapter_name=name)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["train", "half", "keys", "training", "_keys", "_parameters"])
def test_names_that_a_parameter_dict_has_taken(name):
    """They work or are refused; in either case not half."""
    model = tiny_model("llama")
    before = snapshot(model)
    try:
        apply_lora(model, LoraConfig(r=2, modules_to_save=("norm",)), adapter_name=name)
    except UserError:
        assert snapshot(model) == before
    else:
        assert set(adapter_configs(model)) == {name}


def test_a_taken_name_is_refused():
    model = apply_lora(tiny_model("llama"), LoraConfig(r=2))
    before = snapshot(model)
    with pytest.raises(UserError, match="already has an adapter 'default': choose another name"):
        apply_lora(model)
    assert snapshot(model) == before


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


def test_the_last_one_put_on_is_active(two):
    assert trainable_adapters(two) == {"second"}
    assert {layer.active_adapters for layer in lora_layers(two).values()} == {("second",)}


def test_a_second_adapter_wraps_no_layer_twice(two):
    layer = two.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer.base_layer, nn.Linear)
    assert not isinstance(layer.base_layer, LoRALinear)
    assert list(layer.lora_A) == ["first", "second"]


@pytest.mark.parametrize(
    ("chosen", "active"), [("first", {"first"}), (["first", "second"], {"first", "second"})]
)
def test_set_adapter_makes_active_and_trainable(two, chosen, active):
    set_adapter(two, chosen)
    assert trainable_adapters(two) == active
    used = {name for layer in lora_layers(two).values() for name in layer.active_adapters}
    assert used == active


def test_a_set_adapter_computes_as_if_it_were_alone(two):
    set_adapter(two, "first")
    alone = apply_lora(tiny_model("llama"), LoraConfig(r=2, target_modules=("q_proj",)))
    for name, layer in lora_layers(alone).items():
        source = two.get_submodule(name)
        layer.lora_A["default"].data.copy_(source.lora_A["first"])
        layer.lora_B["default"].data.copy_(source.lora_B["first"])
    assert torch.equal(logits(two), logits(alone))


def test_an_unknown_adapter_is_refused(two):
    before = snapshot(two)
    with pytest.raises(UserError, match=r"no adapter 'secnd' on the model, which has: first, sec"):
        set_adapter(two, "secnd")
    with pytest.raises(UserError, match=r"Did you mean second\?"):
        set_adapter(two, ["first", "secnd"])
    assert snapshot(two) == before


@pytest.mark.parametrize("call", [set_adapter, merge_adapter, merge_and_unload])
def test_an_adapter_is_not_counted_twice(two, call):
    before, given = snapshot(two), logits(two)
    with pytest.raises(UserError, match="'first' is named twice: name each adapter once"):
        call(two.eval(), ["first", "second", "first"])
    assert snapshot(two) == before and torch.equal(logits(two), given)


def test_a_plain_model_has_no_adapter_to_set():
    with pytest.raises(UserError, match="which has: none"):
        set_adapter(tiny_model("llama"), "default")


# ---- without it ----


def test_a_disabled_adapter_leaves_the_base(two):
    base = logits(tiny_model("llama"))
    adapted = logits(two)
    assert not torch.allclose(adapted, base)
    with disable_adapter(two):
        assert torch.equal(logits(two), base)
    assert torch.equal(logits(two), adapted)


def test_an_error_inside_the_block_restores_the_adapter(two):
    adapted = logits(two)
    with pytest.raises(RuntimeError, match="inside"), disable_adapter(two):
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


def test_blocks_can_be_nested(two):
    adapted, base = logits(two), logits(tiny_model("llama"))
    with disable_adapter(two):
        with disable_adapter(two):
            pass
        assert torch.equal(logits(two), base)
    assert torch.equal(logits(two), adapted)


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


def test_dora_cannot_be_mixed_by_rows(four):
    apply_lora(four, LoraConfig(r=2, use_dora=True), adapter_name="dora")
    with pytest.raises(UserError, match="'dora' is DoRA's"), mixed_batch(four, ["r1", "dora"]):
        pass


def test_a_mixed_batch_generates(four):
    four.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 4, "do_sample": False}
    with mixed_batch(four, ["r1", "r4"]):
        both = four.generate(token_ids(), **settings)
    for row, name in enumerate(["r1", "r4"]):
        set_adapter(four, name)
        assert torch.equal(four.generate(token_ids()[row : row + 1], **settings)[0], both[row])


def test_names_that_do_not_fit_a_batch(four):
    with pytest.raises(UserError, match="no adapter 'r5'"), mixed_batch(four, ["r1", "r5"]):
        pass
    wrong = pytest.raises(UserError, match=r"3 adapter names .* 2 rows: give one name a row")
    with wrong, mixed_batch(four, ["r1", "r2", "r1"]):
        logits(four)
    set_adapter(four, "r1")
    assert logits(four).shape[0] == 2  # after the block all is as it was


# ---- merge, unmerge, take off ----


def codes(model):
    """Every tensor of the frozen base, the 4-bit ones as their bytes."""
    found = {}
    for name, tensor in model.state_dict().items():
        if "lora_" not in name and "fused_weight" not in name:
            found[name.replace(".base_layer", "")] = tensor.clone()
    return found


def same(tensors, others):
    return tensors.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) for name, tensor in tensors.items()
    )


@pytest.fixture(params=["llama", "gpt2", "qwen2", "plain", "llama dora", "qwen2 dora"])
def adapted(request, checkpoints):
    """A base, 4-bit or plain, with two adapters of which "default" is active; evaluating."""
    family, _, dora = request.param.partition(" ")
    model = tiny_model("llama") if family == "plain" else load_base(str(checkpoints(family)), FP32)
    first = "c_attn" if family == "gpt2" else "q_proj"
    apply_lora(model, LoraConfig(r=3, target_modules=(first,)), adapter_name="other")
    apply_lora(model, LoraConfig(r=4, use_dora=bool(dora)))
    randomize_adapter(model, std=0.1)
    return model.eval()


def test_merged_it_computes_what_it_computed_live(adapted):
    live, base = logits(adapted), codes(adapted)
    with disable_adapter(adapted):
        without = logits(adapted)
    merge_adapter(adapted)
    calls = []
    for layer in lora_layers(adapted).values():
        layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(logits(adapted), live, rtol=0, atol=1e-5)
    assert not calls  # one product a layer
    assert same(codes(adapted), base)
    with disable_adapter(adapted):
        assert torch.equal(logits(adapted), without)
    unmerge_adapter(adapted)
    assert torch.equal(logits(adapted), live)
    assert same(codes(adapted), base)
    assert not any("fused" in name for name in adapted.state_dict())


def test_other_adapters_go_on_meaning_what_they_mean(adapted):
    wanted = {}
    for names in (["default"], ["other"], ["default", "other"]):
        set_adapter(adapted, names)
        wanted[tuple(names)] = logits(adapted)
    for merged in ("default", "other"):
        merge_adapter(adapted, merged)
        for names, values in wanted.items():
            set_adapter(adapted, list(names))
            torch.testing.assert_close(logits(adapted), values, rtol=0, atol=1e-5)
        unmerge_adapter(adapted)


def test_training_unmerges(adapted):
    merge_adapter(adapted)
    adapted.train()
    adapted(input_ids=token_ids()).logits.sum().backward()
    for layer in lora_layers(adapted).values():
        assert layer.fused_weight is None
        assert layer.lora_A["default"].grad is not None


def test_a_merge_in_bf16_is_one_rounding(checkpoints):
    model = load_base(str(checkpoints("llama")), QuantConfig(compute_dtype="bf16"))
    apply_lora(model, LoraConfig(r=4))
    randomize_adapter(model, std=0.1)
    merge_adapter(model.eval())
    for layer in lora_layers(model).values():
        exact = dense_weight(layer.base_layer) + layer.get_delta_weight("default")
        assert layer.fused_weight.dtype == torch.bfloat16
        assert torch.equal(layer.fused_weight, exact.bfloat16())
    assert logits(model).dtype == torch.bfloat16


@from_peft
def test_merging_a_plain_base_is_what_peft_does():
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    theirs = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**config)).eval()
    ours = apply_lora(tiny_model("llama"), LoraConfig(**config)).eval()
    for name, layer in lora_layers(ours).items():
        torch.nn.init.normal_(layer.lora_B["default"])
        other = theirs.get_submodule(f"base_model.model.{name}")
        for ab in ("lora_A", "lora_B"):
            getattr(other, ab)["default"].weight.data = getattr(layer, ab)["default"].data.clone()
    merge_adapter(ours)
    theirs.merge_adapter()
    wanted = logits(theirs)
    torch.testing.assert_close(logits(ours), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(merge_and_unload(ours)), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merge_and_unload_is_the_merge_of_the_files(family, checkpoints, tmp_path):
    model = load_base(str(checkpoints(family)), FP32)
    some = "c_fc" if family == "gpt2" else "up_proj"  # the other layers are 4-bit and not adapted
    apply_lora(model, LoraConfig(r=4, target_modules=(some,))).eval()
    randomize_adapter(model, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    live = logits(model)
    merge_and_unload(model)
    assert not any(isinstance(m, Linear4bit | LoRALinear) for m in model.modules())
    torch.testing.assert_close(logits(model), live, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    out = tmp_path / "merged"
    merge(MergeConfig(adapter=str(tmp_path / "adapter"), output_dir=str(out), format="fp32"))
    files = [load_file(tmp_path / who / "model.safetensors") for who in ("saved", "merged")]
    assert same(*files)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(model))


def test_a_merged_model_is_no_longer_the_base_it_was(checkpoints, tmp_path):
    """An adapter trained over it is none of that base, which a merge would look for."""
    model = load_base(str(checkpoints("llama")), FP32)
    merge_and_unload(apply_lora(model, LoraConfig(r=4)))
    save_adapter(apply_lora(model, LoraConfig(r=4)), tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.base == {"task": "causal-lm"}
    assert adapter.quantization == QuantConfig()


def test_unload_leaves_the_very_base(checkpoints):
    model = load_base(str(checkpoints("llama")), FP32)
    before, modules = logits(model), dict(model.named_modules())
    apply_lora(model, LoraConfig(r=4))
    randomize_adapter(model)
    assert unload(model) is model
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), before)
    apply_lora(model, LoraConfig(r=2))  # and takes new ones


def test_delete_adapter(adapted):
    live = logits(adapted)
    delete_adapter(adapted, "other")
    assert adapter_configs(adapted).keys() == {"default"}
    assert torch.equal(logits(adapted), live)
    assert not any("other" in name for name, _ in adapted.named_parameters())


def test_a_layer_without_an_adapter_is_the_base_layer_again(adapted):
    set_adapter(adapted, "other")
    wanted = logits(adapted)
    delete_adapter(adapted, "default")
    first = "c_attn" if "c_attn" in str(adapted) else "q_proj"
    assert all(name.endswith(first) for name in lora_layers(adapted))
    assert torch.equal(logits(adapted), wanted)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m: merge_adapter(m, "othr"), "no adapter 'othr' .* Did you mean other"),
        (lambda m: merge_adapter(merge_adapter(m)), "default is merged already: unmerge_adapter"),
        (lambda m: merge_adapter(m.train()), "training mode.*model.eval"),
        (unmerge_adapter, "no adapter is merged"),
        (lambda m: unmerge_adapter(unmerge_adapter(merge_adapter(m))), "no adapter is merged"),
        (lambda m: delete_adapter(m, "default"), "'default' is active: set_adapter another first"),
        (lambda m: delete_adapter(merge_adapter(m, "other"), "other"), "'other' is merged"),
        (lambda m: delete_adapter(m, "none"), "no adapter 'none'"),
        (lambda m: merge_and_unload(unload(m)), "no adapter is active"),
    ],
)
def test_what_makes_no_sense_is_refused(adapted, wrong, message):
    live, base = logits(adapted), codes(adapted)
    with pytest.raises(UserError, match=message):
        wrong(adapted)
    assert same(codes(adapted), base)
    if lora_layers(adapted):
        torch.testing.assert_close(logits(adapted.eval()), live, rtol=0, atol=1e-5)
