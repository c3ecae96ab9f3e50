"""Every kind of adapter, trained and live: PEFT's own model is the oracle, on every base."""

from typing import Any

import peft
import pytest
import torch
from conftest import pefts_parameters, token_ids
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from qlora.adapters.apply import apply_lora, disable_adapter, mixed_batch, set_adapter
from qlora.adapters.files import (
    load_adapter,
    load_adapter_weights,
    parameters_by_file_name,
    save_adapter,
    swap_adapter,
)
from qlora.adapters.fuse import merge_adapter, merge_and_unload, unload, unmerge_adapter
from qlora.adapters.lora import LoRALayer
from qlora.adapters.wrappers import adapted
from qlora.base.load import load_base
from qlora.config import LoraConfig, QuantConfig
from qlora.errors import UserError

# transformers 5.23 deprecates a property that PEFT 0.21 asks for; PEFT warns of tied weights.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # it means parameters by these patterns, and looks for them among layers when it warns
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
]
QV = ("q_proj", "v_proj")
KINDS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "all biases": ("qwen2", False, {"bias": "all"}),
    "lora's biases": ("phi", False, {"bias": "lora_only", "target_modules": ("q_proj", "fc1")}),
    "all biases of gpt2": ("gpt2", True, {"bias": "all", "target_modules": ("c_attn",)}),
    "biases and dora": ("qwen2", False, {"bias": "lora_only", "use_dora": True}),
    "lora_bias": ("qwen2", False, {"lora_bias": True}),
    "norms": ("llama", False, {"modules_to_save": ("input_layernorm", "norm")}),
    "a block": ("llama", False, {"modules_to_save": ("layers.1.mlp",)}),
    "a conv1d": (
        "gpt2", True, {"target_modules": ("c_attn",), "modules_to_save": ("h.1.mlp.c_fc",)}
    ),
    "the head": ("llama", False, {"modules_to_save": ("lm_head",)}),
    "the tied head": ("llama", True, {"modules_to_save": ("lm_head",)}),
    "the tied embedding": ("llama", True, {"modules_to_save": ("embed_tokens",)}),
    "embedding and head": ("gemma", True, {"modules_to_save": ("embed_tokens", "lm_head")}),
    "lora on the embedding": ("llama", False, {"target_modules": ("embed_tokens", "q_proj")}),
    "lora on a scaled one": ("gemma", True, {"target_modules": ("embed_tokens", "q_proj")}),
    "dora on the embedding": (
        "llama", False, {"target_modules": ("embed_tokens", "q_proj"), "use_dora": True}
    ),
    "lora on gpt2's embedding": ("gpt2", True, {"target_modules": ("wte", "c_attn")}),
    "lora on the head": ("llama", False, {"target_modules": ("lm_head", "q_proj")}),
    "token rows": ("llama", False, {"trainable_token_indices": (92, 7, 191)}),
    "token rows, tied": ("llama", True, {"trainable_token_indices": (92, 7, 191)}),
    "token rows, scaled": ("gemma", True, {"trainable_token_indices": (92, 200)}),
    "rows by name": (
        "gpt2", True, {"target_modules": ("c_attn",), "trainable_token_indices": {"wte": (92, 7)}}
    ),
    "rows of the head": ("llama", False, {"trainable_token_indices": {"lm_head": (5, 9)}}),
    "experts": ("mixtral", False, {
        "target_modules": ("q_proj",),
        "target_parameters": ("experts.down_proj", "experts.gate_up_proj"),
    }),
    "one of experts": ("mixtral", False, {
        "target_modules": ("q_proj",), "target_parameters": ("experts.down_proj", "gate.weight"),
    }),
    "experts alone": (
        "mixtral", False, {"target_modules": (), "target_parameters": ("experts.down_proj",)}
    ),
    "experts of two ranks": ("mixtral", False, {
        "target_modules": ("q_proj",), "target_parameters": ("down_proj", "experts.gate_up_proj"),
        "rank_pattern": {"experts.down_proj": 2, "q_proj": 3}, "use_rslora": True,
        "alpha_pattern": {"gate_up_proj": 3},
    }),
}  # fmt: skip
# The weights of experts are no linear layers': a 4-bit base has them in 16 bits.
FP32_OR_16_BITS = QuantConfig(compute_dtype="fp32", allow_unquantized=True)


@pytest.fixture(params=["4-bit", "plain"])
def new_base(request, base_of):
    """`new_base(kind)`: the kind's model, loaded in NF4 or as it is, each time the same."""

    def make(kind: str) -> Any:
        family, tied, _ = KINDS[kind]
        folder = base_of(family, tied)
        if request.param == "plain":
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        else:
            model = load_base(str(folder), FP32_OR_16_BITS)
        return model.eval()

    return make


def trained(
    model: Any, kind: str, *, name: str = "default", seed: int = 3, std: float = 0.02
) -> Any:
    """`model` with an adapter of that kind, every trainable value moved."""
    settings = {"target_modules": QV} | KINDS[kind][2]
    apply_lora(model, LoraConfig(r=4, lora_alpha=6, **settings), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters_by_file_name(model, name).values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=std * float(parameter.abs().mean() + 0.5))
    return model


def peft_config(kind: str) -> peft.LoraConfig:
    settings = {"target_modules": QV} | KINDS[kind][2]
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    if isinstance(ids := lists.get("trainable_token_indices"), dict):
        lists["trainable_token_indices"] = {name: list(some) for name, some in ids.items()}
    return peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **lists)


def skip_what_peft_cannot(kind: str, new_base: Any) -> None:
    if kind in ("a block", "a conv1d") and getattr(new_base(kind), "is_loaded_in_4bit", False):
        pytest.skip("PEFT would copy the 4-bit codes, which nothing trains; ours become dense")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(token_ids()).logits)


def gradients(model: Any, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    ids = token_ids()
    for parameter in parameters.values():
        parameter.grad = None
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: torch.as_tensor(parameter.grad) for name, parameter in parameters.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_pefts(kind, new_base, tmp_path):
    skip_what_peft_cannot(kind, new_base)
    model = trained(new_base(kind), kind)
    before = logits(new_base(kind))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(new_base(kind), tmp_path, is_trainable=True).eval()
    # fp32: the same sums in another order
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(model) - before).abs().max() > 1e-3  # the adapter is not idle
    ours = gradients(model, parameters_by_file_name(model, "default"))
    wanted = gradients(theirs, pefts_parameters(theirs))
    assert ours.keys() == wanted.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5, msg=name)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in parameters_by_file_name(model, "default").values()}


@pytest.mark.parametrize("kind", KINDS)
def test_files_have_pefts_names_and_shapes(kind, new_base, tmp_path):
    skip_what_peft_cannot(kind, new_base)
    save_adapter(trained(new_base(kind), kind), tmp_path / "ours")
    theirs = peft.get_peft_model(new_base(kind), peft_config(kind))
    # PEFT would save an embedding whole beside its A and B, untrained as it is
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    shapes = [
        {name: tensor.shape for name, tensor in load_file(file).items()}
        for file in sorted(tmp_path.glob("*/adapter_model.safetensors"))
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same_to_the_bit(kind, new_base, tmp_path):
    model = trained(new_base(kind), kind)
    save_adapter(model, tmp_path / "first")
    again = load_adapter(new_base(kind), tmp_path / "first")
    assert torch.equal(logits(again), logits(model))
    save_adapter(again, tmp_path / "second")
    saved = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("first", "second")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    resumed = trained(new_base(kind), kind, seed=8)
    load_adapter_weights(resumed, tmp_path / "first")
    assert torch.equal(logits(resumed), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_below_it_untouched(kind, new_base):
    wanted = logits(new_base(kind))
    model = trained(new_base(kind), kind)
    live = logits(model)
    with disable_adapter(model):
        assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(model), live)
    unload(model)
    assert torch.equal(logits(model), wanted)
    assert not adapted(model)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_is_what_it_was_live_and_unmerged_to_the_bit(kind, new_base):
    model = trained(new_base(kind), kind)
    live = logits(model)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), live, rtol=1e-5, atol=1e-5)
    unmerge_adapter(model)
    assert torch.equal(logits(model), live)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_unloaded_it_is_a_plain_model_that_transformers_saves(kind, new_base, tmp_path):
    model = trained(new_base(kind), kind)
    live = logits(model)
    merge_and_unload(model)
    assert not adapted(model)
    torch.testing.assert_close(logits(model), live, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_two_of_a_kind_live_side_by_side(kind, new_base, tmp_path):
    if KINDS[kind][2].get("bias", "none") != "none":
        pytest.skip("one adapter with biases is enough for a model: another is refused")
    model = trained(new_base(kind), kind, name="one")
    first = logits(model)
    trained(model, kind, name="two", seed=4)
    second = logits(model)
    assert (first - second).abs().max() > 1e-3
    set_adapter(model, "one")
    assert torch.equal(logits(model), first)
    save_adapter(model, tmp_path, adapter_name="two")
    swap_adapter(model, tmp_path / "two", adapter_name="one")
    assert torch.equal(logits(model), second)


@pytest.mark.parametrize("kind", [k for k in KINDS if not {"dora", "experts"} & set(k.split())])
def test_rows_of_a_batch_go_their_own_ways(kind, new_base):
    model = trained(new_base(kind), kind, name="one")
    wanted = logits(model)
    with disable_adapter(model):
        base = logits(model)
    with mixed_batch(model, [None, "one"]):
        mixed = logits(model)
    # fp32: products over another number of rows
    torch.testing.assert_close(mixed[0], base[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_a_gpu(kind, base_of, tmp_path):
    """In bf16: trained a step, saved, loaded, merged, unmerged and taken off again."""
    family, tied, _ = KINDS[kind]

    def new() -> Any:
        quant = QuantConfig(compute_dtype="bf16", allow_unquantized=True)
        return load_base(str(base_of(family, tied)), quant, device="cuda").eval()

    ids = token_ids().cuda()

    def answers(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.as_tensor(model(ids).logits)

    model, before = trained(new(), kind), answers(new())
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in parameters_by_file_name(model, "default").items():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    live = answers(model)
    save_adapter(model, tmp_path)
    assert torch.equal(answers(load_adapter(new(), tmp_path)), live)
    merge_adapter(model)
    # one more rounding of the weights to bf16, 0.4 %, in every layer
    torch.testing.assert_close(answers(model), live, rtol=0.05, atol=0.05)
    unmerge_adapter(model)
    assert torch.equal(answers(model), live)
    assert torch.equal(answers(unload(model)), before)


# ---- what is refused, with the model as it was ----


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no such module": ("llama", {"modules_to_save": ("lm_hed",)}, "no module. Did you mean"),
    "adapted and saved": (
        "llama", {"modules_to_save": ("q_proj",)}, "q_proj is in target_modules and in modules"
    ),
    "all saved": (
        "llama", {"target_modules": "all-linear", "modules_to_save": ("model",)}, "leaves none"
    ),
    "no bias there": ("llama", {"bias": "all"}, "bias=all has nothing to train: the model has no"),
    "no bias in layers": (
        "qwen2", {"bias": "lora_only", "target_modules": ("o_proj",)}, "the layers that target_mod"
    ),
    "rows beyond": ("llama", {"trainable_token_indices": (5, 320)}, "has 320, and model.embed_tok"),
    "rows of no embedding": (
        "llama", {"trainable_token_indices": {"q_proj": (5,)}}, "matches no embedding"
    ),
    "rows and lora": (
        "llama",
        {"target_modules": ("embed_tokens",), "trainable_token_indices": (5,)},
        "embed_tokens is adapted or trained as a whole, and in trainable_token_indices",
    ),
    "a bias of an embedding's B": (
        "llama",
        {"target_modules": ("embed_tokens", "q_proj"), "lora_bias": True},
        "model.embed_tokens is an embedding, whose B has none",
    ),
    "no such parameter": (
        "mixtral", {"target_parameters": ("experts.up",)}, "matches no parameter"
    ),
    "no matrix": ("mixtral", {"target_parameters": ("norm.weight",)}, "which is no matrix in 16"),
    "another revision": ("llama", {"revision": "v2"}, "revision='v2', and the base was loaded at"),
    "stored otherwise": ("llama", {"fan_in_fan_out": True}, r"layers store \(out, in\): leave"),
    "stored otherwise too": (
        "gpt2",
        {"target_modules": ("c_attn",), "fan_in_fan_out": False},
        r"layers store \(in, out\): leave",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_the_model_as_it_was(what, base_of):
    family, settings, message = REFUSED[what]
    model = load_base(str(base_of(family, False)), FP32_OR_16_BITS).eval()
    before = logits(model)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(UserError, match=message):
        apply_lora(model, LoraConfig(r=2, **{"target_modules": QV} | settings))
    assert not adapted(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert torch.equal(logits(model), before)


def test_only_one_adapter_trains_biases(base_of, tmp_path):
    model = load_base(str(base_of("qwen2", False)), FP32_OR_16_BITS).eval()
    save_adapter(trained(model, "all biases"), tmp_path)
    before = logits(model)
    again = LoraConfig(target_modules=QV, bias="lora_only")
    for put_on in (
        lambda: apply_lora(model, again, adapter_name="other"),
        lambda: load_adapter(model, tmp_path, adapter_name="other"),
    ):
        with pytest.raises(UserError, match="'default' trains biases already, and only one"):
            put_on()
    assert torch.equal(logits(model), before)


def test_lora_bias_is_not_folded_into_a_layer_without_a_bias(base_of):
    model = load_base(str(base_of("llama", False)), FP32_OR_16_BITS).eval()
    apply_lora(model, LoraConfig(r=2, target_modules=("v_proj", "k_proj"), lora_bias=True))
    before = logits(model)
    with pytest.raises(
        UserError, match=r"'default' has lora_bias, and .*k_proj, .*have no bias to"
    ):
        merge_and_unload(model)
    assert adapted(model) and torch.equal(logits(model), before)
    merge_adapter(model)


@pytest.mark.parametrize(
    ("one", "two", "tied"),
    [
        ("token rows", "lora on the embedding", False),
        ("lora on the head", "token rows, tied", True),
    ],
)
def test_rows_and_a_change_of_all_rows_are_not_active_together(base_of, one, two, tied):
    """Which comes first would depend on the order they were put on in."""
    model = load_base(str(base_of("llama", tied)), FP32_OR_16_BITS).eval()
    trained(trained(model, one, name="one"), two, name="two", seed=4)
    for call in (set_adapter, merge_adapter, merge_and_unload):
        with pytest.raises(UserError, match="'one' and 'two' cannot be active together"):
            call(model, ["one", "two"])


def test_experts_are_swapped_in_frozen_and_whole_or_not_at_all(base_of, tmp_path):
    def base():
        return load_base(str(base_of("mixtral", False)), FP32_OR_16_BITS).eval()

    save_adapter(trained(base(), "experts"), tmp_path)
    swapped = swap_adapter(trained(base(), "one of experts"), tmp_path)
    assert not any(p.requires_grad for p in swapped.parameters())
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    inner = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_"
    outer = inner.replace("base_layer.", "")
    half = {f"{outer}A.weight": torch.ones(8, 128), f"{outer}B.weight": torch.ones(64, 8)}
    whole = {name: t for name, t in tensors.items() if not name.startswith(inner)}
    for changed, message in (
        (tensors | half, r"experts.down_proj takes A \(16, 128\) and B \(64, 16\), .* \(8, 128\)"),
        (whole, "layers.0.mlp.experts has 2 of target_parameters, the adapter has 1"),
    ):
        save_file(changed, path)
        with pytest.raises(UserError, match=message):
            load_adapter(base(), tmp_path)
        model = trained(base(), "experts")
        before = logits(model)
        with pytest.raises(UserError, match=message):
            swap_adapter(model, tmp_path)
        assert torch.equal(logits(model), before)


def test_two_that_own_the_same_part_are_not_active_together(base_of):
    model = load_base(str(base_of("llama", False)), FP32_OR_16_BITS).eval()
    trained(trained(model, "the head", name="one"), "the head", name="two", seed=4)
    before = logits(model)
    with pytest.raises(UserError, match="'one' and 'two' cannot be active together: each has a lm"):
        set_adapter(model, ["one", "two"])
    for merge in (merge_adapter, merge_and_unload):
        with pytest.raises(UserError, match="'one' and 'two' cannot be active together"):
            merge(model, ["one", "two"])
    assert torch.equal(logits(model), before)


def test_an_error_halfway_leaves_no_half_adapter(base_of, monkeypatch):
    """As when memory runs out in the middle."""
    model = load_base(str(base_of("llama", False)), FP32_OR_16_BITS).eval()
    trained(model, "norms", name="one")
    before = logits(model)
    put_on = LoRALayer.add_adapter
    calls = []

    def third_fails(self: Any, *args: Any, **settings: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no more")
        put_on(self, *args, **settings)

    monkeypatch.setattr(LoRALayer, "add_adapter", third_fails)
    with pytest.raises(torch.OutOfMemoryError):
        apply_lora(model, LoraConfig(r=2, modules_to_save=("lm_head",)), adapter_name="two")
    assert {name for _, wrapper in adapted(model) for name in wrapper.adapters} == {"one"}
    assert torch.equal(logits(model), before)
