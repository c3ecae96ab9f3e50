"""Adapters that start from the weights: what they start as, are saved as, and leave behind.

Expected values come from the checkpoint's own weights, the quantization of tests/reference.py, and
PEFT over the model as it was.
"""

import json
import shutil

import peft
import pytest
import reference
import torch
from conftest import FP32, randomize_adapter, tiny_model, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.adapters import apply as adapters
from qlora.adapters.apply import (
    adapter_configs,
    apply_lora,
    disable_adapter,
    mixed_batch,
    set_adapter,
)
from qlora.adapters.files import (
    CONFIG,
    WEIGHTS,
    load_adapter,
    load_adapter_weights,
    read_adapter,
    save_adapter,
    swap_adapter,
)
from qlora.adapters.fuse import delete_adapter, merge_adapter, merge_and_unload, unload
from qlora.adapters.lora import lora_layers
from qlora.base.load import load_base
from qlora.base.modules import dense_weight, state_of
from qlora.config import LoraConfig, MergeConfig, QuantConfig
from qlora.errors import UserError
from qlora.merge import merge
from qlora.ops import nf4

LOFTQ_3 = {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 3}}
REBASING = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": LOFTQ_3,
    "rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "patterns": {**LOFTQ_3, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"up_proj": 3}},
}
Q = "model.layers.0.self_attn.q_proj"
# fp32: sums in another order, of weights around 0.02 and logits around 0.1
SAME_LOGITS = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def base(checkpoints):
    return checkpoints("llama")


def started(base, *, quant=FP32, **settings):
    """A model from `base` whose adapter is as it begins."""
    model = load_base(str(base), quant)
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, **settings})
    return apply_lora(model, config, generator=torch.Generator().manual_seed(0)).eval()


def trained(base, **settings):
    """The same with other values in A and B."""
    model = started(base, **settings)
    start = {name: layer.lora_B["default"].clone() for name, layer in lora_layers(model).items()}
    randomize_adapter(model, std=0.02)
    for name, layer in lora_layers(model).items():
        layer.lora_B["default"].data.add_(start[name])
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def originals(base):
    return load_file(base / "model.safetensors")


def live_weight(layer):
    """By definition: what the layer does to the identity."""
    with torch.no_grad():
        out = layer(torch.eye(layer.in_features))
    return (out if layer.bias is None else out - layer.bias).T


def codes(model):
    return {
        name.replace(".base_layer", ""): (module.weight.data.clone(), nf4.absmax(quantized))
        for name, module in model.named_modules()
        if hasattr(module, "quant_state")
        for quantized in [nf4.Quantized(module.weight.data, module.weight.quant_state)]
    }


def assert_same_codes(model, other):
    ours, theirs = codes(model), codes(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(a, b) for n in ours for a, b in zip(ours[n], theirs[n], strict=True))


# ---- the start ----


@pytest.mark.parametrize("settings", REBASING.values(), ids=REBASING)
def test_the_base_is_quantized_without_what_was_taken_out(base, settings):
    model = started(base, **settings)
    weights = originals(base)
    assert len(lora_layers(model)) == 14
    for name, layer in lora_layers(model).items():
        taken = layer.taken
        assert taken.scaling == adapter_configs(model)["default"].of(name).scaling
        rest = weights[f"{name}.weight"] - reference.delta(*taken[:3])
        wanted = reference.round_trip(rest.float(), double_quant=True).float()
        # a value half-way between two codes may take either, as the sums differ in their order
        assert reference.relative_rms(dense_weight(layer.base_layer), wanted) < 0.02


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_begin_with_what_was_taken_out(base, init):
    model = started(base, init_lora_weights=init)
    for layer in lora_layers(model).values():
        assert torch.equal(layer.taken.lora_A, layer.lora_A["default"])
        assert torch.equal(layer.taken.lora_B, layer.lora_B["default"])


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora", "lora_alpha": 8},  # of scaling 1 it takes a projection out
        {"init_lora_weights": "loftq"},
        LOFTQ_3,
    ],
    ids=["pissa", "olora", "loftq", "loftq_3"],
)
def test_the_start_is_nearer_to_the_16_bit_model_than_plain_nf4(base, settings):
    model, plain = started(base, **{"r": 8, **settings}), load_base(str(base), FP32)
    weights = originals(base)
    for name, layer in lora_layers(model).items():
        wanted = weights[f"{name}.weight"]
        error = float((live_weight(layer) - wanted).norm())
        assert error < float((dense_weight(plain.get_submodule(name)) - wanted).norm()), name
    full = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert (logits(model) - full).norm() < (logits(plain) - full).norm()


def test_one_round_of_loftq_and_gaussian_leave_the_base_as_it_is(base):
    plain = load_base(str(base), FP32)
    for init in ("loftq", "gaussian"):
        model = started(base, init_lora_weights=init)
        assert_same_codes(model, plain)
        assert not any(layer.taken for layer in lora_layers(model).values())
    assert torch.equal(logits(model), logits(plain))
    drawn = torch.cat([layer.lora_A["default"].flatten() for layer in lora_layers(model).values()])
    # of some thousand draws the standard deviation, 1 / r as PEFT's, is known to 2 %
    assert float(drawn.detach().std()) == pytest.approx(1 / 4, rel=0.06)


def test_gpt2_s_transposed_weights_start_too(checkpoints):
    model = started(checkpoints("gpt2"), init_lora_weights="pissa")
    weights = originals(checkpoints("gpt2"))
    for name, layer in lora_layers(model).items():
        wanted = weights[f"{name}.weight"].T
        # what is left of the error of 4 bits, 9 %
        assert 0.01 < reference.relative_rms(live_weight(layer), wanted) < 0.095, name


@pytest.mark.parametrize(("family", "task"), [("t5", "seq2seq"), ("roberta", "seq-cls")])
def test_models_of_other_tasks_start_are_saved_and_are_themselves_again(
    family, task, checkpoints, tmp_path
):
    def base():
        return load_base(str(checkpoints(family)), FP32, task=task)

    model, weights = base(), originals(checkpoints(family))
    config = LoraConfig(r=4, lora_alpha=12, init_lora_weights="pissa")
    apply_lora(model, config, generator=torch.Generator().manual_seed(0))
    for name, layer in lora_layers(model).items():
        error = reference.relative_rms(live_weight(layer), weights[f"{name}.weight"])
        assert error < 0.095, name  # what is left of the error of 4 bits, 9 %
    save_adapter(model, tmp_path)
    assert_same_codes(load_adapter(base(), tmp_path), model)
    assert_same_codes(unload(model), base())


def test_layers_that_are_not_quantized_keep_the_rest_of_their_weight(base):
    quant = QuantConfig(compute_dtype="fp32", skip_modules=("q_proj",))
    model = started(base, quant=quant, init_lora_weights="pissa")
    layer = lora_layers(model)[Q]
    weight = originals(base)[f"{Q}.weight"]
    rest = weight - reference.delta(*layer.taken[:3]).float()
    torch.testing.assert_close(layer.base_layer.weight.data, rest, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(live_weight(layer), weight, rtol=1e-4, atol=1e-6)
    unload(model)
    assert torch.equal(model.get_submodule(Q).weight, weight)


def test_a_model_that_was_never_quantized_starts_and_is_itself_again():
    model, plain = tiny_model("llama"), tiny_model("llama")
    apply_lora(model, LoraConfig(r=4, lora_alpha=12, init_lora_weights="pissa"))
    torch.testing.assert_close(logits(model), logits(plain), **SAME_LOGITS)
    theirs = peft.get_peft_model(
        tiny_model("llama"),
        peft.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights="pissa"),
    ).base_model.model
    for name, layer in lora_layers(model).items():
        own, wanted = layer.base_layer.weight, theirs.get_submodule(name).base_layer.weight
        torch.testing.assert_close(own.data, wanted.data, rtol=1e-4, atol=1e-6)
    unload(model)
    torch.testing.assert_close(logits(model), logits(plain), **SAME_LOGITS)


def test_a_16_bit_adapter_takes_out_what_it_holds(base):
    model = started(base, init_lora_weights="pissa", adapter_dtype="bf16")
    layer = lora_layers(model)[Q]
    assert layer.taken.lora_A.dtype == torch.bfloat16
    assert torch.equal(layer.taken.lora_B, layer.lora_B["default"])


def test_in_bf16_the_new_codes_compute_as_the_old_ones_did(base):
    quant = QuantConfig(compute_dtype="bf16", blocksize=32, double_quant=False)
    model = started(base, quant=quant, init_lora_weights="pissa")
    state = lora_layers(model)[Q].base_layer.weight.quant_state
    assert (state.dtype, state.blocksize, bool(state.nested)) == (torch.bfloat16, 32, False)
    assert state is lora_layers(model)[Q].base_layer.quant_state
    assert logits(model).dtype == torch.bfloat16


def test_weights_that_are_all_zero_get_an_adapter_that_can_learn(checkpoints, tmp_path):
    """Nothing to decompose: A = 0 and B = 0 would stay so."""
    plain = tiny_model("llama")
    plain.get_submodule(Q).weight.data.zero_()
    plain.save_pretrained(tmp_path / "base")
    for settings in ({"init_lora_weights": "pissa"}, {"init_lora_weights": "loftq"}, LOFTQ_3):
        model = started(tmp_path / "base", **settings)
        layer = lora_layers(model)[Q]
        assert layer.lora_A["default"].any()
        assert not live_weight(layer).any()
        save_adapter(model, tmp_path / "adapter")
        again = load_adapter(load_base(str(tmp_path / "base"), FP32), tmp_path / "adapter")
        assert torch.equal(logits(again.eval()), logits(model))


def test_it_stands_beside_what_is_trained_in_full(base, tmp_path):
    """Biases lie below A and B, and the head is saved whole."""
    settings = {"init_lora_weights": "pissa", "bias": "lora_only", "modules_to_save": ("lm_head",)}
    base = tmp_path / "base"
    tiny_model("phi").save_pretrained(base)
    model = trained(base, **settings, target_modules=("q_proj", "fc1"))
    for name, parameter in model.named_parameters():
        if ".own." in name:
            parameter.data.add_(0.01)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_base(str(base), FP32), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    plain = load_base(str(base), FP32)
    assert torch.equal(logits(unload(again)), logits(plain))


# ---- without the adapter ----


@pytest.mark.parametrize("settings", [REBASING["pissa"], LOFTQ_3], ids=["pissa", "loftq"])
def test_disabled_the_model_is_the_base_with_what_was_taken_out_beside_it(base, settings):
    model = trained(base, **settings)
    with disable_adapter(model):
        for name, layer in lora_layers(model).items():
            wanted = dense_weight(layer.base_layer) + reference.delta(*layer.taken[:3])
            torch.testing.assert_close(live_weight(layer).double(), wanted, rtol=1e-4, atol=1e-6)
            original = originals(base)[f"{name}.weight"]
            assert reference.relative_rms(live_weight(layer), original) < 0.095
    if settings is not LOFTQ_3:
        before = logits(started(base, **settings))
        with disable_adapter(model):
            assert torch.equal(logits(model), before)


def test_unloaded_or_deleted_the_model_is_the_base_that_was_loaded(base):
    plain = load_base(str(base), FP32)
    model = trained(base, init_lora_weights="pissa")
    set_adapter(model, [])
    delete_adapter(model, "default")
    assert_same_codes(model, plain)
    model = unload(trained(base, **LOFTQ_3))
    assert_same_codes(model, plain)
    assert torch.equal(logits(model), logits(plain))
    apply_lora(model, LoraConfig(r=2))  # and takes any adapter again


def test_merged_in_memory_the_model_is_what_was_trained(base):
    model = trained(base, init_lora_weights="pissa")
    wanted = logits(model)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), wanted, **SAME_LOGITS)
    merge_and_unload(model)
    torch.testing.assert_close(logits(model), wanted, **SAME_LOGITS)
    assert state_of(model).original_weights is None  # of another model now


# ---- the files ----


@pytest.mark.parametrize("settings", REBASING.values(), ids=REBASING)
def test_saved_it_is_a_plain_adapter_of_twice_the_rank_for_peft(base, tmp_path, settings):
    model = trained(base, **settings)
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["init_lora_weights"] is True
    assert written["r"] == 8
    full = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(full, tmp_path).base_model.model
    for name, layer in lora_layers(model).items():
        scaling = adapter_configs(model)["default"].of(name).scaling
        learned = reference.delta(*layer.factors("default")[:2], scaling)
        learned -= reference.delta(*layer.taken[:2], scaling)
        own = theirs.get_submodule(name).get_delta_weight("default").double()
        torch.testing.assert_close(own, learned, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", REBASING.values(), ids=REBASING)
def test_loaded_again_it_is_the_function_that_was_trained(base, tmp_path, settings):
    model = trained(base, **settings)
    save_adapter(model, tmp_path)
    again = load_adapter(load_base(str(base), FP32), tmp_path).eval()
    assert_same_codes(again, model)
    assert torch.equal(logits(again), logits(model))
    config, own = adapter_configs(again)["default"], adapter_configs(model)["default"]
    assert config.of(Q).r == own.of(Q).r
    assert config.of(Q).scaling == pytest.approx(own.of(Q).scaling)
    save_adapter(again, tmp_path / "again")
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


@pytest.mark.parametrize("init", ["pissa", True], ids=["same", "plain"])
def test_a_run_goes_on_with_the_base_of_its_checkpoint(base, tmp_path, init):
    """Also where the new start was another: here the seed of pissa_niter, or none at all."""
    model = trained(base, init_lora_weights="pissa_niter_0")
    save_adapter(model, tmp_path)
    again = started(base, init_lora_weights=init)
    load_adapter_weights(again, tmp_path)
    assert_same_codes(again, model)
    assert torch.equal(logits(again), logits(model))
    assert all(
        p.requires_grad for layer in lora_layers(again).values() for p in layer.lora_A.values()
    )
    plain = started(base)
    save_adapter(plain, tmp_path / "plain")
    load_adapter_weights(again, tmp_path / "plain")
    assert_same_codes(again, plain)


def test_saved_portable_it_is_the_same_on_its_own_base(base, tmp_path):
    """Ranks are padded there, and all layers get one scaling."""
    model = trained(base, **REBASING["patterns"])
    save_adapter(model, tmp_path, portable=True)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert (written["r"], written["rank_pattern"]) == (12, {})
    again = load_adapter(load_base(str(base), FP32), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model), **SAME_LOGITS)
    save_adapter(again, tmp_path / "again")
    assert len(read_adapter(tmp_path / "again").subtracted[Q].lora_A) == 6
    output = tmp_path / "out"
    merge(MergeConfig(adapter=str(tmp_path), output_dir=str(output), format="fp32"))
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(model), **SAME_LOGITS)


def test_a_record_that_does_not_go_with_the_tensors_is_refused(base, tmp_path):
    save_adapter(started(base, init_lora_weights="pissa"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    record = json.dumps({"rebased": {Q: 5}})
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt", "qlora": record})
    message = f"{Q} has no 10 ranks, and its metadata says that 5 of them undo 5; .* is not in its"
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path)


# ---- the merge ----


@pytest.mark.parametrize("settings", REBASING.values(), ids=REBASING)
def test_the_merge_is_what_was_trained(base, tmp_path, settings):
    model = trained(base, **settings)
    save_adapter(model, tmp_path / "adapter")
    output = tmp_path / "out"
    merge(MergeConfig(adapter=str(tmp_path / "adapter"), output_dir=str(output), format="fp32"))
    again = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), **SAME_LOGITS)


def test_the_merge_onto_the_original_weights_adds_what_was_learned(base, tmp_path):
    save_adapter(started(base, init_lora_weights="pissa"), tmp_path / "adapter")
    output = tmp_path / "out"
    merge(
        MergeConfig(
            adapter=str(tmp_path / "adapter"),
            output_dir=str(output),
            format="fp32",
            onto="original",
        )
    )
    again, full = load_file(output / "model.safetensors"), originals(base)
    for name, weight in again.items():  # nothing was learned
        torch.testing.assert_close(weight, full[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("calibration", ["none", "self"])
def test_the_merge_to_4_bits_keeps_what_was_learned(base, tmp_path, calibration):
    save_adapter(trained(base, init_lora_weights="pissa"), tmp_path / "adapter")
    output = tmp_path / "out"
    merge(
        MergeConfig(
            adapter=str(tmp_path / "adapter"),
            output_dir=str(output),
            format="nf4",
            calibration=calibration,
        )
    )
    report = json.loads((output / "merge_report.json").read_text())
    kept = [layer["kept"] for layer in report["layers"].values()]
    # quantize(W + delta) keeps 0.98 of a delta of 1 % and more (figures.md, section 5), ± its noise
    assert all(0.7 < share < 1.3 for share in kept), kept


# ---- what cannot be ----


def snapshot(model):
    modules = {name: type(module) for name, module in model.named_modules()}
    parameters = {n: (id(p), p.requires_grad, p.data.clone()) for n, p in model.named_parameters()}
    return modules, parameters


def assert_unchanged(model, before):
    modules, parameters = snapshot(model)
    assert modules == before[0]
    for name, (identity, requires_grad, value) in parameters.items():
        assert (identity, requires_grad) == before[1][name][:2]
        assert torch.equal(value, before[1][name][2])


def refused(model, message, act):
    before = snapshot(model)
    with pytest.raises(UserError, match=message):
        act()
    assert_unchanged(model, before)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_a_rank_above_the_layer_s_is_refused_with_every_layer_named(base, init):
    model = load_base(str(base), FP32)
    config = LoraConfig(init_lora_weights=init, r=4, rank_pattern={"k_proj": 33, "v_proj": 99})
    message = (
        rf"init_lora_weights='{init}' takes at most as many directions as a layer has: "
        r"\S+0.self_attn.k_proj has r=33 and is \(32, 64\), \S+0.self_attn.v_proj has r=99 and .*"
        r"1.self_attn.v_proj .* Give a smaller r"
    )
    refused(model, message, lambda: apply_lora(model, config))


def test_a_model_without_its_original_weights_is_refused(base, tmp_path):
    model = load_base(str(base), FP32)
    state_of(model).original_weights = None
    config = LoraConfig(init_lora_weights="loftq")
    message = "weights from before quantization are needed and not available: load the 16-bit model"
    refused(model, message, lambda: apply_lora(model, config))
    load_base(str(base), FP32).save_pretrained(tmp_path)
    quantized = load_base(str(tmp_path), FP32)
    refused(quantized, message, lambda: apply_lora(quantized, config))


def test_a_checkpoint_with_other_weights_is_refused(base, checkpoints):
    model = load_base(str(base), FP32)
    state_of(model).original_weights = state_of(
        load_base(str(checkpoints("gpt2")), FP32)
    ).original_weights
    config = LoraConfig(init_lora_weights="pissa", target_modules=("q_proj",))
    message = (
        rf"the checkpoint does not hold the weights of {Q}, model.layers.1.self_attn.q_proj as"
    )
    refused(model, message, lambda: apply_lora(model, config))


def test_a_checkpoint_that_is_gone_is_refused_and_the_model_stays(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    model = trained(tmp_path / "base", init_lora_weights="pissa")
    shutil.rmtree(tmp_path / "base")
    refused(model, "can no longer be read", lambda: unload(model))


def test_a_start_that_fails_half_way_leaves_the_model_as_it_was(base, monkeypatch):
    model, plain = load_base(str(base), FP32), load_base(str(base), FP32)
    read, reads = type(state_of(model).original_weights).read, []

    def fails_once(originals, name):
        reads.append(name)
        if len(reads) == 5:
            raise UserError("the disk is asleep")
        return read(originals, name)

    monkeypatch.setattr(type(state_of(model).original_weights), "read", fails_once)
    config = LoraConfig(init_lora_weights="pissa", r=4)
    refused(model, "asleep", lambda: apply_lora(model, config))
    assert len(reads) == 5 + 4  # the bases of four layers were made anew again
    assert_same_codes(model, plain)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq", "eva"])
def test_an_embedding_is_refused(base, init):
    model = load_base(str(base), FP32)
    config = LoraConfig(init_lora_weights=init, target_modules=("q_proj", "embed_tokens"))
    message = f"init_lora_weights='{init}' is for linear layers, which model.embed_tokens is not"
    refused(model, message, lambda: apply_lora(model, config))


def test_loftq_of_layers_that_are_not_quantized_is_refused(base):
    model = load_base(str(base), QuantConfig(compute_dtype="fp32", skip_modules=("q_proj",)))
    message = rf"these layers are not quantized: {Q}, model.layers.1.self_attn.q_proj. Name them in"
    refused(model, message, lambda: apply_lora(model, LoraConfig(init_lora_weights="loftq")))


def test_a_changed_base_holds_one_adapter(base, tmp_path):
    save_adapter(started(base), tmp_path / "plain")
    model = started(base, init_lora_weights="pissa")
    save_adapter(model, tmp_path / "pissa")
    message = "it was changed for adapter default .PiSSA, OLoRA or LoftQ.: unload that first"
    for act in (
        lambda: apply_lora(model, adapter_name="other"),
        lambda: load_adapter(model, tmp_path / "plain", adapter_name="other"),
        lambda: swap_adapter(model, tmp_path / "plain"),
    ):
        refused(model, message, act)
    with pytest.raises(UserError, match=message), mixed_batch(model, ["default", None]):
        pass
    plain = started(base)
    message = "changes the base, and default was made for it as it is: unload first"
    config = LoraConfig(init_lora_weights="olora")
    for act in (
        lambda: apply_lora(plain, config, adapter_name="other"),
        lambda: load_adapter(plain, tmp_path / "pissa", adapter_name="other"),
        lambda: swap_adapter(plain, tmp_path / "pissa"),
    ):
        refused(plain, message, act)


def test_merges_that_want_the_base_as_it_was_are_refused(base, tmp_path):
    for name in ("one", "two"):
        save_adapter(started(base, init_lora_weights="pissa"), tmp_path / name)
    both = (str(tmp_path / "one"), str(tmp_path / "two"))
    with pytest.raises(UserError, match=r"was changed for it .*: merge it alone"):
        merge(MergeConfig(adapter=both, output_dir=str(tmp_path / "out")))
    load_base(str(base), FP32).save_pretrained(tmp_path / "nf4")
    with pytest.raises(UserError, match="is 4-bit: give the 16-bit model as --base-model"):
        merge(
            MergeConfig(
                adapter=both[0], output_dir=str(tmp_path / "out"), base_model=str(tmp_path / "nf4")
            )
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_base_that_is_not_quantized_is_given_back_to_the_bit(family, init, monkeypatch):
    """In bf16 the sum of what is left and what was taken is not what was there."""
    leaf = {"llama": "up_proj", "gpt2": "c_fc"}[family]
    config = LoraConfig(r=4, target_modules=(leaf,), init_lora_weights=init)
    model = tiny_model(family, dtype=torch.bfloat16)
    before = logits(model)
    apply_lora(model, config)
    randomize_adapter(model)
    assert torch.equal(logits(unload(model)), before)

    start, calls = adapters.start_from_weights, []

    def once(*args):
        if calls:
            raise MemoryError
        calls.append(start(*args))

    monkeypatch.setattr(adapters, "start_from_weights", once)
    with pytest.raises(MemoryError):
        apply_lora(model, config)
    assert torch.equal(logits(model), before)
