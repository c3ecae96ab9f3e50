"""Every kind of adapter, trained and live: PEFT's own model is the oracle, on every base."""

import copy
from typing import Any
from unittest.mock import DEFAULT, Mock

import adapter_kinds as kinds
import peft
import pytest
import torch
from adapter_kinds import ADAPTER_KINDS, OUR_KINDS, QV, gradients_of, logits, new_base
from conftest import on_gpu, require_same_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora import LoraConfig, QuantConfig, UserError, load_adapter, load_base, save_adapter
from qlora.adapters import lora, merge_adapter, merge_and_unload, unload, unmerge_adapter
from qlora.adapters.apply import apply_lora, disable_adapter, mixed_batch, set_adapter
from qlora.adapters.files import load_adapter_weights, parameters_by_file_name, swap_adapter
from qlora.adapters.format import WEIGHTS
from qlora.adapters.wrappers import adapted

# PEFT warns of tied weights, and of patterns that it looks for among layers.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
]
BASES = ("4-bit", "plain")
SUMS = {"rtol": 1e-5, "atol": 1e-5}  # fp32: the same sums in another order


def on_base(kind: str, base: str) -> Any:
    """In `make test`: the 4-bit base, and the plain one where only that has PEFT's numbers."""
    in_make_test = base == "4-bit" or ADAPTER_KINDS[kind].base == "plain"
    marks = [] if in_make_test else [pytest.mark.full]
    return pytest.param((kind, base), marks=marks, id=f"{kind}, {base}")


@pytest.fixture(scope="module", params=[on_base(k, b) for k in OUR_KINDS for b in BASES])
def kind(request):
    """(kind, base): all tests of one run after another, over one build."""
    return request.param


@pytest.fixture
def build(kind, adapter_build):
    return adapter_build(*kind)


@pytest.fixture
def fresh(kind, checkpoints):
    family, tied = ADAPTER_KINDS[kind[0]][1:3]
    return lambda: new_base(*kind, checkpoints(family, tied))


def test_logits_gradients_and_files_are_pefts_and_peft_opens_ours(build, fresh):
    if not build.gradients:
        pytest.skip("PEFT would copy the 4-bit codes, which nothing trains; ours become dense")
    torch.testing.assert_close(logits(build.model), build.logits, **SUMS)
    assert (build.logits - build.base_logits).abs().max() > 1e-3  # the adapter is not idle
    parameters = parameters_by_file_name(build.model, "default")
    gradients = gradients_of(build.model, parameters)
    assert gradients.keys() == build.gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, build.gradients[name], **SUMS, msg=name)
    trainable = {id(p) for p in build.model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in parameters.values()}
    ours, theirs = (load_file(f / WEIGHTS) for f in (build.folder, build.peft_folder))
    # PEFT saves an embedding whole beside its A and B, untrained as it is
    copies = {name for name in theirs if name.endswith((".base_layer.weight", "lm_head.weight"))}
    assert theirs.keys() - copies <= ours.keys() <= theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    opened = peft.PeftModel.from_pretrained(fresh(), build.folder).eval()
    torch.testing.assert_close(logits(opened), build.logits, **SUMS)


def test_saved_and_loaded_it_is_the_same_to_the_bit(kind, fresh, build, tmp_path):
    loaded = load_adapter(fresh(), build.folder)
    assert torch.equal(logits(loaded), logits(build.model))
    save_adapter(loaded, tmp_path)
    require_same_adapter(build.folder, tmp_path)
    resumed = kinds.trained(unload(loaded), kind[0], seed=8)
    load_adapter_weights(resumed, build.folder)
    assert torch.equal(logits(resumed), logits(build.model))


def test_disabled_and_unloaded_it_is_the_base_and_merged_a_plain_model(build, tmp_path):
    model, live = build.model, logits(build.model)
    with disable_adapter(model):
        assert torch.equal(logits(model), build.base_logits)
    assert torch.equal(logits(model), live)
    torch.testing.assert_close(logits(merge_adapter(model)), live, **SUMS)
    assert torch.equal(logits(unmerge_adapter(model)), live)
    unloaded, merged = copy.deepcopy(model), copy.deepcopy(model)
    assert torch.equal(logits(unload(unloaded)), build.base_logits) and not adapted(unloaded)
    assert not adapted(merge_and_unload(merged))
    torch.testing.assert_close(logits(merged), build.logits, **SUMS)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(merged))


def test_two_of_a_kind_live_side_by_side(kind, build, tmp_path):
    if ADAPTER_KINDS[kind[0]].settings.get("bias", "none") != "none":
        pytest.skip("one adapter with biases is enough for a model: another is refused")
    model = copy.deepcopy(build.model)
    first = logits(model)
    second = logits(kinds.trained(model, kind[0], name="two", seed=4))
    assert (first - second).abs().max() > 1e-3
    set_adapter(model, "default")
    assert torch.equal(logits(model), first)
    save_adapter(model, tmp_path, adapter_name="two")
    swap_adapter(model, tmp_path / "two")
    assert torch.equal(logits(model), second)


def test_rows_of_a_batch_have_their_own_adapters(kind, build):
    if {"dora", "experts"} & set(kind[0].split()):
        pytest.skip("refused: see test_apply")
    with mixed_batch(build.model, [None, "default"]):
        mixed = logits(build.model)
    torch.testing.assert_close(mixed[0], build.base_logits[0], **SUMS)
    torch.testing.assert_close(mixed[1], build.logits[1], **SUMS)


@on_gpu
@pytest.mark.parametrize("kind", OUR_KINDS)
def test_every_kind_in_bf16_on_a_gpu(kind, checkpoints, tmp_path):
    _, family, tied, *_ = ADAPTER_KINDS[kind]

    def new():
        quant = QuantConfig(compute_dtype="bf16", allow_unquantized=True)
        return load_base(str(checkpoints(family, tied)), quant, device="cuda").eval()

    model, before = kinds.trained(new(), kind), logits(new())
    for gradient in gradients_of(model, parameters_by_file_name(model, "default")).values():
        assert torch.isfinite(gradient).all()
    live = logits(model)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(new(), tmp_path)), live)
    # one more rounding of the weights to bf16, 0.4 %, in every layer
    torch.testing.assert_close(logits(merge_adapter(model)), live, rtol=0.05, atol=0.05)
    assert torch.equal(logits(unmerge_adapter(model)), live)
    assert torch.equal(logits(unload(model)), before)


def test_only_one_adapter_trains_biases(checkpoints, tmp_path):
    model = kinds.trained(
        new_base("all biases", "4-bit", checkpoints("qwen2", False)), "all biases"
    )
    save_adapter(model, tmp_path)
    again = LoraConfig(target_modules=QV, bias="lora_only")
    for put, asked in ((apply_lora, again), (load_adapter, tmp_path)):
        with kinds.refused(model, "'default' trains biases already, and only one"):
            put(model, asked, adapter_name="other")


def test_lora_bias_is_not_folded_into_a_layer_without_a_bias(checkpoints):
    model = new_base("lora_bias", "4-bit", checkpoints("llama", False))
    apply_lora(model, LoraConfig(r=2, target_modules=("v_proj", "k_proj"), lora_bias=True))
    with kinds.refused(model, r"'default' has lora_bias, and .*k_proj, .*no bias to"):
        merge_and_unload(model)
    merge_adapter(model)


@pytest.mark.parametrize(("one", "two", "tied"), [
    ("the head", "the head", False),
    ("token rows", "lora on the embedding", False),  # which comes first?
    ("lora on the head", "token rows, tied", True),
])  # fmt: skip
def test_two_that_own_the_same_part_are_not_active_together(checkpoints, one, two, tied):
    model = kinds.trained(new_base(one, "4-bit", checkpoints("llama", tied)), one, name="one")
    kinds.trained(model, two, name="two", seed=4)
    for call in (set_adapter, merge_adapter, merge_and_unload):
        with kinds.refused(model, "'one' and 'two' cannot be active together: each has"):
            call(model, ["one", "two"])


def test_experts_are_swapped_in_frozen_and_whole_or_not_at_all(checkpoints, tmp_path):
    def base():
        return new_base("experts", "4-bit", checkpoints("mixtral", False))

    model, path = kinds.trained(base(), "experts"), tmp_path / WEIGHTS
    save_adapter(model, tmp_path)
    swapped = swap_adapter(kinds.trained(base(), "one of experts"), tmp_path)
    assert not any(p.requires_grad for p in swapped.parameters())
    tensors = load_file(path)
    inner = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_"
    outer = inner.replace("base_layer.", "")
    half = {f"{outer}A.weight": torch.ones(8, 128), f"{outer}B.weight": torch.ones(64, 8)}
    whole = {name: t for name, t in tensors.items() if not name.startswith(inner)}
    for changed, message in (
        (tensors | half, r"experts.down_proj needs A \(16, 128\) and B \(64, 16\), .* \(8, 128\)"),
        (whole, "layers.0.mlp.experts has 2 of target_parameters, the adapter has 1"),
    ):
        save_file(changed, path)
        for target, put in ((base(), load_adapter), (model, swap_adapter)):
            with kinds.refused(target, message):
                put(target, tmp_path)


def test_an_error_halfway_leaves_no_half_adapter(checkpoints, monkeypatch):
    model = kinds.trained(
        new_base("norms", "4-bit", checkpoints("llama", False)), "norms", name="one"
    )
    calls = [DEFAULT, DEFAULT, UserError("no more")]
    third_fails = Mock(wraps=lora.adapter_dtype, side_effect=calls)
    monkeypatch.setattr(lora, "adapter_dtype", third_fails)
    with kinds.refused(model, "no more"):
        apply_lora(model, LoraConfig(r=2, modules_to_save=("lm_head",)), adapter_name="two")
