"""Adapters that start from the weights, and their changed base: saved, loaded, merged, removed.

Expected values come from the checkpoint's own weights, the quantization of tests/reference.py, and
PEFT over the unchanged model.
"""

import copy
import json
import shutil
from functools import cache
from unittest.mock import DEFAULT, Mock

import peft
import pytest
import reference
import torch
from adapter_kinds import SAVED, codes, logits, move, refused, same
from conftest import FP32, axis, randomize_adapter, require_same_adapter, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora import LoraConfig, MergeConfig, QuantConfig, UserError, load_adapter, save_adapter
from qlora.adapters import delete_adapter, merge_adapter, merge_and_unload, rebase, unload
from qlora.adapters.apply import apply_lora, disable_adapter, mixed_batch, set_adapter
from qlora.adapters.files import load_adapter_weights, parameters_by_file_name, swap_adapter
from qlora.adapters.format import CONFIG, WEIGHTS, read_adapter
from qlora.adapters.lora import lora_layers
from qlora.base import load_base
from qlora.base.modules import dense_weight, state_of
from qlora.merge import merge

PISSA = {"init_lora_weights": "pissa"}
OLORA = {"init_lora_weights": "olora"}
LOFTQ = {"init_lora_weights": "loftq"}
LOFTQ_3 = {**LOFTQ, "loftq_config": {"loftq_iter": 3}}
REBASING = {
    "patterns": {**LOFTQ_3, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"up_proj": 3}},
    "pissa": PISSA,
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": OLORA,
    "loftq": LOFTQ_3,
    "rslora": {**PISSA, "use_rslora": True},
}
Q, Q_1 = (f"model.layers.{i}.self_attn.q_proj" for i in range(2))
# fp32: sums in another order, of weights around 0.02 and logits around 0.1
SAME_LOGITS = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def base(checkpoints):
    return checkpoints("llama")


@pytest.fixture
def plain(base):
    return load_base(str(base), FP32)


@pytest.fixture(scope="module")
def rebased(checkpoints, tmp_path_factory):
    """`rebased(kind)`: a trained model and its files' folder, made once, not to be changed."""

    @cache
    def build(kind):
        model = trained(checkpoints("llama"), **REBASING[kind])
        return model, save_adapter(model, tmp_path_factory.mktemp("rebased"))

    return build


def started(base, *, quant=FP32, task="causal-lm", **settings):
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, **settings})
    generator, model = torch.Generator().manual_seed(0), load_base(str(base), quant, task=task)
    return apply_lora(model, config, generator=generator).eval()


def trained(base, **settings):
    """The same with noise on every value that is trained."""
    model = started(base, **settings)
    move(parameters_by_file_name(model, "default"))
    return model


def reloaded(base, folder):
    return load_adapter(load_base(str(base), FP32), folder).eval()


def merged(adapter, output, **settings):
    merge(MergeConfig(adapter=str(adapter), output_dir=str(output), **settings))
    return AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)


def originals(base):
    return load_file(base / "model.safetensors")


@torch.no_grad()
def live_weight(layer):
    """The layer's outputs for the identity, (out, in)."""
    out = layer(torch.eye(layer.in_features))
    return (out if layer.bias is None else out - layer.bias).T


OLORA_1 = {**OLORA, "lora_alpha": 8}  # OLoRA of scaling 1 is a projection


@pytest.mark.parametrize("settings", [PISSA, OLORA_1, LOFTQ, LOFTQ_3], ids=str)
def test_the_start_is_nearer_to_the_16_bit_model_than_plain_nf4(base, plain, settings):
    model, weights = started(base, **{"r": 8, **settings}), originals(base)
    for name, layer in lora_layers(model).items():
        wanted = weights[f"{name}.weight"]
        error = float((live_weight(layer) - wanted).norm())
        assert error < float((dense_weight(plain.get_submodule(name)) - wanted).norm()), name
        if settings["init_lora_weights"] != "loftq":
            assert torch.equal(layer.rebased.subtracted.lora_A, layer.lora_A["default"])
            assert torch.equal(layer.rebased.subtracted.lora_B, layer.lora_B["default"])
    full = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert (logits(model) - full).norm() < (logits(plain) - full).norm()


def test_one_round_of_loftq_and_gaussian_leave_the_base_unchanged(base, plain):
    for init in ("loftq", "gaussian"):
        model = started(base, init_lora_weights=init)
        assert same(codes(model), codes(plain))
        assert not any(layer.rebased for layer in lora_layers(model).values())
    assert torch.equal(logits(model), logits(plain))
    drawn = torch.cat([layer.lora_A["default"].flatten() for layer in lora_layers(model).values()])
    # of some thousand draws the standard deviation, 1 / r as PEFT's, is known to 2 %
    assert float(drawn.detach().std()) == pytest.approx(1 / 4, rel=0.06)


TASKS = {"gpt2": "causal-lm", "t5": "seq2seq", "roberta": "seq-cls"}


@pytest.mark.parametrize("family", axis(*TASKS))
def test_other_models_start_and_are_saved_and_restored(family, checkpoints, tmp_path):
    folder, task = checkpoints(family), TASKS[family]
    one, two = (load_base(str(folder), FP32, task=task) for _ in range(2))
    model = started(folder, task=task, **PISSA)
    weights, errors = originals(folder), {}
    for name, layer in lora_layers(model).items():
        weight = weights[f"{name}.weight"]
        weight = weight.T if family == "gpt2" else weight
        errors[name] = reference.relative_rms(live_weight(layer), weight)
    # the rest of the error of 4 bits, 9 %; T5's wo is not quantized
    assert 0.01 < max(errors.values()) < 0.095, errors
    assert same(codes(load_adapter(one, save_adapter(model, tmp_path))), codes(model))
    assert same(codes(unload(model)), codes(two))


def test_layers_that_are_not_quantized_are_rebased_in_fp32(base):
    quant = QuantConfig(compute_dtype="fp32", skip_modules=("q_proj",))
    model = started(base, quant=quant, **PISSA)
    layer, weight = lora_layers(model)[Q], originals(base)[f"{Q}.weight"]
    rest = weight - reference.delta(*layer.rebased.subtracted[:3]).float()
    torch.testing.assert_close(layer.base_layer.weight.data, rest, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(live_weight(layer), weight, rtol=1e-4, atol=1e-6)
    unload(model)
    assert torch.equal(model.get_submodule(Q).weight, weight)


@pytest.mark.parametrize("family", axis("llama", "gpt2"))
def test_a_base_that_is_not_quantized_is_restored_to_the_bit(family, monkeypatch):
    """In bf16 the rest plus the subtracted part is not the weight. Also after a failed start."""
    leaf = {"llama": "up_proj", "gpt2": "c_fc"}[family]
    config = LoraConfig(r=4, target_modules=(leaf,), **PISSA)
    model = tiny_model(family, dtype=torch.bfloat16)
    before = logits(model)
    randomize_adapter(apply_lora(model, config))
    assert torch.equal(logits(unload(model)), before)
    once = Mock(wraps=rebase.start_from_weights, side_effect=[DEFAULT, MemoryError])
    monkeypatch.setattr(rebase, "start_from_weights", once)
    with pytest.raises(MemoryError):
        apply_lora(model, config)
    assert torch.equal(logits(model), before)


def test_bf16_adapters_and_other_codes(base):
    """The subtracted part is the adapter's own; the new codes keep the old ones' settings."""
    quant = QuantConfig(compute_dtype="bf16", blocksize=32, double_quant=False)
    layer = lora_layers(started(base, quant=quant, adapter_dtype="bf16", **PISSA))[Q]
    assert layer.rebased.subtracted.lora_A.dtype == torch.bfloat16
    assert torch.equal(layer.rebased.subtracted.lora_B, layer.lora_B["default"])
    state = layer.base_layer.weight.quant_state
    assert (state.dtype, state.blocksize, bool(state.nested)) == (torch.bfloat16, 32, False)
    assert state is layer.base_layer.quant_state
    assert layer(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("settings", [PISSA, LOFTQ, LOFTQ_3], ids=str)
def test_a_weight_of_zeros_gets_an_adapter_that_can_learn(settings, tmp_path):
    plain = tiny_model("llama")
    plain.get_submodule(Q).weight.data.zero_()
    plain.save_pretrained(tmp_path / "base")
    model = started(tmp_path / "base", **settings)
    layer = lora_layers(model)[Q]
    assert layer.lora_A["default"].any()
    assert not live_weight(layer).any()
    again = reloaded(tmp_path / "base", save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))


def test_biases_and_a_head_trained_in_full_beside_it(checkpoints, tmp_path):
    settings, phi = {"bias": "lora_only", SAVED: ("lm_head",)}, checkpoints("phi")
    model = trained(phi, **PISSA, **settings, target_modules=("q_proj", "fc1"))
    again = reloaded(phi, save_adapter(model, tmp_path))
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(unload(again)), logits(load_base(str(phi), FP32)))


@pytest.mark.parametrize("kind", ["pissa", "loftq"])
def test_disabled_the_base_has_the_subtracted_part_beside_it(base, kind, rebased):
    model, weights = rebased(kind)[0], originals(base)
    with disable_adapter(model):
        for name, layer in lora_layers(model).items():
            wanted = dense_weight(layer.base_layer) + reference.delta(*layer.rebased.subtracted[:3])
            torch.testing.assert_close(live_weight(layer).double(), wanted, rtol=1e-4, atol=1e-6)
            assert reference.relative_rms(live_weight(layer), weights[f"{name}.weight"]) < 0.095
        if kind == "pissa":
            assert torch.equal(logits(model), logits(started(base, **PISSA)))


def test_fused_it_is_the_trained_function_and_unloaded_or_deleted_the_base(base, plain):
    deleted = trained(base, **PISSA)
    fused, wanted = copy.deepcopy(deleted), logits(deleted)
    for fuse in (merge_adapter, merge_and_unload):
        torch.testing.assert_close(logits(fuse(fused)), wanted, **SAME_LOGITS)
    assert state_of(fused).original_weights is None  # of another model now
    set_adapter(deleted, [])
    delete_adapter(deleted, "default")
    for model in (deleted, unload(trained(base, **LOFTQ_3))):
        assert same(codes(model), codes(plain))
        assert torch.equal(logits(model), logits(plain))
    apply_lora(model, LoraConfig(r=2))  # any adapter can be added again


@pytest.mark.parametrize("kind", REBASING)
def test_saved_files_are_plain_for_peft_and_load_as_trained(kind, base, rebased, tmp_path):
    model, folder = rebased(kind)
    config, weights = state_of(model).lora_configs["default"], originals(base)
    written = json.loads((folder / CONFIG).read_text())
    assert (written["init_lora_weights"], written["r"]) == (True, 8)
    full = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(full, folder).base_model.model
    for name, layer in lora_layers(model).items():
        scaling, subtracted = config.of(name).scaling, layer.rebased.subtracted
        assert subtracted.scaling == scaling
        # codes of the rest; a value half-way between two codes may take either
        rest = weights[f"{name}.weight"] - reference.delta(*subtracted[:3])
        wanted = reference.round_trip(rest.float(), double_quant=True).float()
        assert reference.relative_rms(dense_weight(layer.base_layer), wanted) < 0.02
        # PEFT has the learned change
        learned = reference.delta(*layer.factors("default")[:2], scaling)
        learned -= reference.delta(*subtracted[:2], scaling)
        delta = theirs.get_submodule(name).get_delta_weight("default").double()
        torch.testing.assert_close(delta, learned, rtol=1e-4, atol=1e-6)
    again = reloaded(base, folder)
    assert same(codes(again), codes(model))
    assert torch.equal(logits(again), logits(model))
    assert state_of(again).lora_configs["default"].of(Q).r == config.of(Q).r
    require_same_adapter(folder, save_adapter(again, tmp_path))


@pytest.mark.parametrize("init", ["pissa", True], ids=["same", "plain"])
def test_a_run_resumes_with_the_base_of_its_checkpoint(base, tmp_path, init):
    model = trained(base, init_lora_weights="pissa_niter_0")
    again = started(base, init_lora_weights=init)
    load_adapter_weights(again, save_adapter(model, tmp_path))
    assert same(codes(again), codes(model))
    assert torch.equal(logits(again), logits(model))
    lora_A = (p for layer in lora_layers(again).values() for p in layer.lora_A.values())
    assert all(p.requires_grad for p in lora_A)
    plain = started(base)
    load_adapter_weights(again, save_adapter(plain, tmp_path / "plain"))
    assert same(codes(again), codes(plain))


def test_portable_files_are_the_same_over_their_own_base(base, rebased, tmp_path):
    """Portable ranks are padded, and all layers have one scaling."""
    model, _ = rebased("patterns")
    save_adapter(model, tmp_path, portable=True)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert (written["r"], written["rank_pattern"]) == (12, {})
    again = reloaded(base, tmp_path)
    torch.testing.assert_close(logits(again), logits(model), **SAME_LOGITS)
    assert len(read_adapter(save_adapter(again, tmp_path / "again")).subtracted[Q].lora_A) == 6
    whole = merged(tmp_path, tmp_path / "out", format="fp32")
    torch.testing.assert_close(logits(whole), logits(model), **SAME_LOGITS)


def test_metadata_that_contradicts_the_tensors_is_refused(rebased, tmp_path):
    shutil.copytree(rebased("pissa")[1], tmp_path, dirs_exist_ok=True)
    record = {"format": "pt", "qlora": json.dumps({"rebased": {Q: 5}})}
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata=record)
    with pytest.raises(UserError, match=f"{Q} must have 10 ranks, of which 5 .*; .* is not in its"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("kind", axis(*REBASING))
def test_the_merge_is_the_trained_function(kind, rebased, tmp_path):
    model, folder = rebased(kind)
    whole = merged(folder, tmp_path / "out", format="fp32")
    torch.testing.assert_close(logits(whole), logits(model), **SAME_LOGITS)


def test_the_merge_onto_the_original_weights_adds_the_learned_change(base, tmp_path):
    folder = save_adapter(started(base, **PISSA), tmp_path / "adapter")  # new: the change is zero
    whole = merged(folder, tmp_path / "out", format="fp32", onto="original").state_dict()
    for name, weight in originals(base).items():
        torch.testing.assert_close(whole[name], weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("calibration", axis("none", "self"))
def test_the_merge_to_4_bits_keeps_the_learned_change(rebased, tmp_path, calibration):
    merged(rebased("pissa")[1], tmp_path / "out", format="nf4", calibration=calibration)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    kept = [layer["kept"] for layer in report["layers"].values()]
    # quantize(W + delta) keeps 0.98 of a delta of 1 % and more (figures.md, section 5), ± its noise
    assert all(0.7 < share < 1.3 for share in kept), kept


def test_merges_that_need_the_unchanged_base_are_refused(plain, rebased, tmp_path):
    folder = str(rebased("pissa")[1])
    shutil.copytree(folder, tmp_path / "two")
    plain.save_pretrained(tmp_path / "nf4")
    output = {"output_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"was changed for it .*: merge it alone"):
        merge(MergeConfig(adapter=(folder, str(tmp_path / "two")), **output))
    with pytest.raises(UserError, match="is 4-bit: give the 16-bit model as --base-model"):
        merge(MergeConfig(adapter=folder, base_model=str(tmp_path / "nf4"), **output))
    assert not (tmp_path / "out").exists()


def test_layers_that_do_not_support_an_init_are_named(base, plain):
    skipped = load_base(str(base), QuantConfig(compute_dtype="fp32", skip_modules=("q_proj",)))
    ranks = {"rank_pattern": {"k_proj": 33, "v_proj": 99}, "r": 4}
    too_high = (
        r"0.self_attn.k_proj has r=33 and is \(32, 64\), .*0.self_attn.v_proj has r=99 "
        ".*1.self_attn.v_proj .* Give a smaller r"
    )
    embedding = {"target_modules": ("q_proj", "embed_tokens")}
    for model, inits, settings, message in (
        (plain, ("pissa", "olora", "loftq"), ranks, "'{}' .*" + too_high),
        (plain, ("loftq", "eva"), embedding, "'{}' .* only, not model.embed"),
        (skipped, ("loftq",), {}, rf"not quantized: {Q}, {Q_1}. Name them in exclude_modules"),
    ):
        for init in inits:
            with refused(model, message.replace("{}", init)):
                apply_lora(model, LoraConfig(init_lora_weights=init, **settings))


def test_a_model_without_its_original_weights_is_refused(base, plain, checkpoints, tmp_path):
    shutil.copytree(base, tmp_path / "gone")
    model = trained(tmp_path / "gone", **PISSA)
    shutil.rmtree(tmp_path / "gone")
    with refused(model, "can no longer be read"):
        unload(model)
    config = LoraConfig(**PISSA, target_modules=("q_proj",))
    plain.save_pretrained(tmp_path)
    quantized, other = (load_base(str(f), FP32) for f in (tmp_path, checkpoints("gpt2")))
    needed = "weights from before quantization are needed .*: load a 16-bit checkpoint"
    for target, given, message in [
        (quantized, state_of(quantized).original_weights, needed),
        (plain, None, needed),
        (plain, state_of(other).original_weights, f"does not hold the weights of {Q}, {Q_1} in"),
    ]:
        state_of(target).original_weights = given
        with refused(target, message):
            apply_lora(target, config)


def test_a_start_that_fails_half_way_restores_the_bases(base, plain, monkeypatch):
    model = load_base(str(base), FP32)
    originals = state_of(model).original_weights
    failure = [*[DEFAULT] * 4, UserError("the disk is asleep"), *[DEFAULT] * 4]
    reads = Mock(wraps=originals.read, side_effect=failure)
    monkeypatch.setattr(type(originals), "read", reads)
    with refused(model, "asleep"):
        apply_lora(model, LoraConfig(r=4, **PISSA))
    assert reads.call_count == 5 + 4  # the bases of four layers were quantized again
    assert same(codes(model), codes(plain))


def test_a_changed_base_holds_one_adapter(base, rebased, tmp_path):
    plain, (model, folder) = started(base), rebased("pissa")
    save_adapter(plain, tmp_path)
    was_changed = "it was changed for adapter default .PiSSA, OLoRA or LoftQ.: unload that first"
    in_use = "changes the base, and adapter default needs it unchanged: unload first"
    for target, message, saved in [(model, was_changed, tmp_path), (plain, in_use, folder)]:
        with refused(target, message):
            apply_lora(target, LoraConfig(**OLORA), adapter_name="other")
        with refused(target, message):
            load_adapter(target, saved, adapter_name="other")
        with refused(target, message):
            swap_adapter(target, saved)
    with refused(model, was_changed), mixed_batch(model, ["default", None]):
        pass
