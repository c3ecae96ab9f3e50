"""Models on the fast path against the same models without it."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers as hf
from conftest import CONFIGS, DEVICES, SIZES, adapted_model, axis, randomize_adapter, token_ids
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.llama4.modeling_llama4 import Llama4TextMLP

from qlora.adapters.apply import apply_lora, disable_adapter, mixed_batch, set_adapter
from qlora.adapters.fuse import delete_adapter, merge_adapter, unload, unmerge_adapter
from qlora.adapters.lora import lora_layers
from qlora.adapters.wrappers import base_modules, plain
from qlora.config import LoraConfig, QuantConfig
from qlora.fast import layers as fast_layers
from qlora.fast.layers import MLPBlock, Rotary, remove_fast_path, use_fast_path
from qlora.ops import lora as lora_function
from qlora.ops import nf4, rotary
from qlora.training import prepare_for_training

LORA = LoraConfig(r=4, lora_alpha=8)
ONE_LAYER = SIZES | {"num_hidden_layers": 1}
CHECKPOINTING = axis(True, False)

# MLP blocks of each family's two layers, and sizes of the groups of one of them
EXPECTED = {
    **dict.fromkeys(["llama", "qwen2", "qwen3", "mistral", "gemma"], (2, [1, 1, 2, 3])),
    "phi": (0, [1, 1, 1, 3]),
    "gpt2": (0, [1, 1, 1, 1]),
    "mixtral": (0, [1, 3]),
}


prepared: Any = partial(prepare_for_training, gradient_checkpointing=False)


def dense_model(config: Any = None, target: Any = "all-linear") -> Any:
    """A model with adapters, not quantized, without the fast path; by default of one layer."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config or hf.LlamaConfig(**ONE_LAYER))
    apply_lora(model.requires_grad_(False), LoraConfig(r=4, target_modules=target))
    randomize_adapter(model)
    return prepared(model, fast_path=False)


def gradients(model: Any, **inputs: Any) -> dict[str, Tensor]:
    ids = token_ids(rows=3, length=16).to(model.device)
    model.zero_grad()
    torch.manual_seed(0)  # of the model's own dropout
    loss = model(**inputs or {"input_ids": ids, "labels": ids}).loss
    loss.backward()
    found = {"loss": loss.detach()}
    for name, layer in lora_layers(model).items():
        for adapter in layer.adapters:
            for ending, parameter in layer.parameters_of(adapter).items():
                if parameter.grad is not None and parameter.grad.any():
                    found[f"{name}.{adapter}.{ending}"] = parameter.grad.clone()
    return found


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], close: float = 1e-5) -> None:
    assert got.keys() == wanted.keys() and len(wanted) > 1
    for name, gradient in wanted.items():
        # fp32 sums in another order
        assert (got[name] - gradient).norm() <= close * gradient.norm() > 0, name


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert all(torch.equal(gradient, got[name]) for name, gradient in wanted.items())


def blocks_of(model: nn.Module) -> list[MLPBlock]:
    return [module for module in base_modules(model).values() if isinstance(module, MLPBlock)]


def fast_parts(model: nn.Module) -> tuple[int, list[int]]:
    """The number of blocks, and the sizes of groups of one of two equal layers."""
    groups = {id(layer.fast): layer.fast for layer in lora_layers(model).values()}
    return len(blocks_of(model)), sorted(len(group.layers) for group in groups.values())[::2]


def test_attention_rotates_by_the_function_and_its_class_stays_as_it_is(monkeypatch):
    own = LlamaAttention.forward, vars(modeling_llama)["apply_rotary_pos_emb"]
    calls: list[Any] = []
    monkeypatch.setattr(fast_layers, "rotate", lambda *x: calls.append(x) or rotary.rotate(*x))
    fast_layers.rotating_forward.cache_clear()
    model = dense_model()
    wanted = gradients(model)
    use_fast_path(model)
    attention = base_modules(model)["model.layers.0.self_attn"]
    assert isinstance(attention, Rotary) and not calls
    assert_same(gradients(model), wanted)
    assert len(calls) == 1
    gradients(copy.deepcopy(model))
    assert len(calls) == 2
    with torch.no_grad():
        model(token_ids(rows=1, length=4))
    with plain(attention).register_forward_hook(lambda *_: None):
        gradients(model)
    assert len(calls) == 2  # neither is computed by the function
    remove_fast_path(model)
    assert base_modules(model)["model.layers.0.self_attn"] is plain(attention)
    assert own == (LlamaAttention.forward, vars(modeling_llama)["apply_rotary_pos_emb"])
    fast_layers.rotating_forward.cache_clear()


def test_other_calls_of_the_rotation_are_the_models_own(monkeypatch):
    """By name, of parts, or of another number of tensors, as Qwen4's."""
    monkeypatch.setattr(fast_layers, "rotate", Mock(side_effect=AssertionError))
    apply = fast_layers.rotating_forward(LlamaAttention.forward).__globals__["apply_rotary_pos_emb"]
    own = modeling_llama.apply_rotary_pos_emb
    q, k, cos, sin = (
        torch.randn(shape) for shape in ((2, 4, 3, 8), (2, 1, 3, 8)) + 2 * ((2, 3, 8),)
    )
    for args, named in [
        ((q, k), {"cos": cos, "sin": sin}),
        ((q, k, cos, sin), {"unsqueeze_dim": 1}),
        ((q.transpose(1, 2), k.transpose(1, 2), cos, sin, 2), {}),
        ((q[:, 0], k[:, 0], cos[:, None][:, 0], sin), {}),
    ]:
        for got, wanted in zip(apply(*args, **named), own(*args, **named), strict=True):
            assert torch.equal(got, wanted)
    with pytest.raises(TypeError, match="apply_rotary_pos_emb"):
        apply(q)


@pytest.mark.parametrize(
    "attention, rotates",
    [
        (hf.models.qwen3.modeling_qwen3.Qwen3Attention, True),
        (hf.models.phi.modeling_phi.PhiAttention, True),  # a part of each head
        (hf.models.cohere.modeling_cohere.CohereAttention, False),  # pairs side by side
        (hf.models.gemma3n.modeling_gemma3n.Gemma3nTextAttention, False),  # q and k one by one
        (hf.models.gpt2.modeling_gpt2.GPT2Attention, False),
        (nn.Linear, False),
    ],
)
def test_attentions_that_rotate_halves(attention, rotates):
    assert (fast_layers.rotating_forward(attention.forward) is not None) == rotates


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", CONFIGS)
def test_loss_and_gradients_are_the_same(family, checkpointing, checkpoints):
    model = adapted_model(checkpoints(family))
    prepared(model, gradient_checkpointing=checkpointing, fast_path=False)
    wanted = gradients(model)
    use_fast_path(model, recompute=checkpointing)
    assert fast_parts(model) == EXPECTED[family]
    assert_same(gradients(model), wanted)
    remove_fast_path(model)
    assert_equal(gradients(model), wanted)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("device", DEVICES)
def test_dropout_drops_the_same_numbers(device, checkpointing, checkpoints, capsys):
    model = adapted_model(checkpoints("llama"), replace(LORA, lora_dropout=0.3)).to(device)
    prepared(model, gradient_checkpointing=checkpointing, fast_path=False)
    without, wanted = gradients(model.eval()), gradients(model.train())
    assert abs(wanted["loss"] - without["loss"]) > 1e-3 * without["loss"]
    use_fast_path(model, recompute=checkpointing)
    assert fast_parts(model) == EXPECTED["llama"] and "plain" not in capsys.readouterr().out
    assert_same(gradients(model), wanted)
    assert_same(gradients(model.eval()), without)


@pytest.mark.parametrize("dtype", axis(torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("act", "known_as"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", None),
     ("gelu_10", None), ("gelu_new", "gelu_tanh"), ("gelu_fast", "gelu_tanh"),
     ("quick_gelu", None), ("tanh", None)],
)  # fmt: skip
def test_an_activation_is_known_by_its_values(act, known_as, dtype):
    model = dense_model(hf.LlamaConfig(**ONE_LAYER, hidden_act=act)).to(dtype)
    wanted = gradients(model) if dtype == torch.float32 else None
    use_fast_path(model)
    assert [block.activation for block in blocks_of(model)] == ([known_as] if known_as else [])
    if wanted:
        assert_same(gradients(model), wanted)


class Other(nn.Module):
    """Another forward over the layers of a gated MLP, under any names."""

    def __init__(self, compute: Any, **children: nn.Module) -> None:
        super().__init__()
        self.compute = compute
        self._modules.update(children)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.compute(self, x)
        return y


def with_mlp(compute: Any, names: Any = None, **more: nn.Module) -> Any:
    """A model with that MLP; `names` are those of gate, up, down and activation."""
    model = dense_model()
    own = model.model.layers[0].mlp
    children = zip(names or own._modules, own.children(), strict=True)
    model.model.layers[0].mlp = Other(compute, **dict(children), **more)
    return model


def h(m: Any, x: Tensor) -> Any:
    return m.act_fn(m.gate_proj(x)) * m.up_proj(x)


def clamped(m: Any, x: Tensor) -> Any:
    """As DeepSeek-V4's."""
    return m.down_proj(m.act_fn(m.gate_proj(x).clamp(max=10)) * m.up_proj(x).clamp(-10, 10))


NO_UP = ["gate_proj", "down_proj", "q_proj", "v_proj"]
IN_REMOTE_CODE = ("w1", "w3", "w2", "act_fn")
LLAMA_4 = ("gate_proj", "up_proj", "down_proj", "activation_fn")
# blocks and groups, and the arguments of a model or of with_mlp
PARTS: dict[str, tuple[int, list[int], Any, Any]] = {
    "InternLM2": (1, [1, 2], lambda m, x: m.w2(m.act_fn(m.w1(x)) * m.w3(x)), IN_REMOTE_CODE),
    "Llama 4": (1, [1, 2], Llama4TextMLP.forward, LLAMA_4),
    "phi3": (0, [1, 1, 1, 1], hf.Phi3Config(**SIZES), "all-linear"),  # gate and up in one matrix
    "no up_proj": (0, [1, 1, 2], hf.LlamaConfig(**SIZES), NO_UP),
    "halved": (0, [1, 2], lambda m, x: m.down_proj(h(m, x)) / 2, None),
    # of which the check has another width
    "adds its input": (0, [1, 2], lambda m, x: x + m.down_proj(h(m, x)), None),
    "drops": (0, [1, 2], lambda m, x: F.dropout(m.down_proj(h(m, x)), 0.5, m.training), None),
    "drops by a module": (0, [1, 2], lambda m, x: m.down_proj(m.drop(h(m, x))), None),
    "squared": (0, [1, 2], lambda m, x: m.down_proj(h(m, x).square()), None),
    "clamped": (0, [1, 2], clamped, None),
}


@pytest.mark.parametrize("kind", PARTS)
def test_which_mlps_are_a_block(kind):
    blocks, groups, *given = PARTS[kind]
    make = dense_model if isinstance(given[0], hf.PretrainedConfig) else with_mlp
    model = make(*given, **{"drop": nn.Dropout(0.5)} if "module" in kind else {})
    wanted = gradients(model)
    use_fast_path(model)
    assert fast_parts(model) == (blocks, groups)
    assert_same(gradients(model), wanted)


@pytest.mark.parametrize(("family", "times"), [("llama", 2), ("gemma", 4)])
def test_a_block_is_computed_again_only_if_its_output_is_read(
    family, times, checkpoints, monkeypatch
):
    """By Gemma's norm after the MLP."""
    model = prepared(adapted_model(checkpoints(family)), gradient_checkpointing=True)
    assert {block.recompute for block in blocks_of(model)} == {family == "llama"}
    forward = Mock(side_effect=lora_function.gated_forward)
    monkeypatch.setattr(lora_function, "gated_forward", forward)
    gradients(model)
    assert forward.call_count == times  # of two layers


def test_an_image_model_computes_layer_by_layer():
    """It reads no token ids, so that it is not run."""
    sizes = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = hf.ViTConfig(**sizes, num_hidden_layers=1, image_size=32, patch_size=8)
    torch.manual_seed(0)
    model = apply_lora(hf.ViTForImageClassification(config), LoraConfig(r=4))
    randomize_adapter(model)
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    wanted = gradients(model, **inputs)
    use_fast_path(model)
    assert all(len(layer.fast.layers) == 1 for layer in lora_layers(model).values())
    assert_same(gradients(model, **inputs), wanted)


class Gained(nn.Linear):
    """A linear layer with a forward of its own, as BitNet's."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def own_layers(checkpoints: Any) -> Any:
    model = dense_model()
    for layer in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.up_proj):
        layer.base_layer.__class__ = Gained
    return model


def in_bf16(checkpoints: Any) -> Any:
    model = adapted_model(checkpoints("llama"), quant=QuantConfig(compute_dtype="bf16"))
    model.model.embed_tokens.float(), model.lm_head.float()
    return model


@pytest.mark.parametrize(
    "make, count, reason",
    [(lambda saved: adapted_model(saved("qwen2"), replace(LORA, use_dora=True)), 14, "DoRA"),
     (lambda saved: adapted_model(saved("qwen2"), replace(LORA, lora_bias=True)), 14, "lora_bias"),
     (own_layers, 2, "no plain linear layer of its own"),
     (in_bf16, 14, "their input is torch.float32, and they compute in torch.bfloat16")],
)  # fmt: skip
def test_unsupported_layers_fall_back_with_one_line(make, count, reason, checkpoints, capsys):
    model = prepared(make(checkpoints), fast_path=False)
    wanted, layers = gradients(model), len(lora_layers(model))
    capsys.readouterr()
    use_fast_path(model)
    assert_same(gradients(model), wanted)
    message = f"{count} of {layers} layers compute the plain way: {reason}\n"
    assert capsys.readouterr().out == message


def test_adapters_changed_later(checkpoints):
    """Another one, two, none, rows of their own, merged: as without the fast path."""
    models = [adapted_model(checkpoints("llama")) for _ in range(2)]
    for model, fast in zip(models, (True, False), strict=True):
        generator = torch.Generator().manual_seed(3)
        apply_lora(model, replace(LORA, r=2), adapter_name="other", generator=generator)
        randomize_adapter(model)
        prepared(model, fast_path=fast)

    def same_logits(change: Any = None, context: Any = nullcontext) -> None:
        logits = []
        for model in models:
            if change:
                change(model)
            with context(model):
                logits.append(model(input_ids=token_ids()).logits.detach())
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)

    both = ["default", "other"]
    for names in (["default"], ["other"], both):
        same_logits(partial(set_adapter, adapter_name=names))
        assert_same(*map(gradients, models))
    same_logits(context=disable_adapter)
    same_logits(lambda model: set_adapter(model.eval(), "default"))
    same_logits(context=partial(mixed_batch, adapter_names=both))
    for change in (merge_adapter, unmerge_adapter, lambda m: delete_adapter(m, "other"), unload):
        same_logits(change)
    assert not any(isinstance(module, MLPBlock) for module in models[0].modules())


def test_hooks_and_a_replaced_forward_are_called():
    """On LoRA layers, the base's layers, the MLP and its activation, set before or after."""
    model = dense_model()
    layer = model.model.layers[0]
    base, calls = layer.self_attn.q_proj.base_layer, []
    watched = {layer.mlp, layer.mlp.act_fn, layer.mlp.up_proj, layer.mlp.up_proj.base_layer}
    watched |= {layer.self_attn.k_proj, base}
    wanted = gradients(model)
    for use_before, use_after in ((lambda _: None, use_fast_path), (use_fast_path, lambda _: None)):
        use_before(model)
        hooks = [m.register_forward_hook(lambda m, *_: calls.append(m)) for m in watched]
        use_after(model)
        calls.clear()
        assert_same(gradients(model), wanted)
        assert set(calls) == watched and len(calls) == len(watched)
        for hook in hooks:
            hook.remove()
    assert len(blocks_of(model)) == 1
    base.forward = Mock(side_effect=base.forward)  # as accelerate does, to move weights
    assert_same(gradients(model), wanted)
    assert base.forward.call_count == 1


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_under_autocast(compute, checkpointing, checkpoints):
    model = adapted_model(checkpoints("llama"), quant=QuantConfig(compute_dtype=compute))
    runs = []
    for fast in (True, False):
        prepared(model, gradient_checkpointing=checkpointing, fast_path=fast)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            runs.append(gradients(model))
    # 16 bits two ways round in two ways
    assert_same(*runs, close=1e-6 if compute == "fp32" else 0.1)


def test_copies_and_an_interrupted_forward_pass(checkpoints):
    model = prepared(adapted_model(checkpoints("llama")))
    wanted = gradients(model)

    def fail(*_: Any) -> None:
        raise MemoryError

    hook = lora_layers(model)["model.layers.0.self_attn.k_proj"].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        gradients(model)
    hook.remove()
    other = copy.deepcopy(model)
    assert_equal(gradients(other), wanted)
    randomize_adapter(other, seed=2)
    assert_equal(gradients(model), wanted)
    assert gradients(other)["loss"] != wanted["loss"]


def test_the_last_call_of_prepare_for_training_counts(checkpoints):
    model = adapted_model(checkpoints("llama"))
    modules = [type(module) for module in model.modules()]
    names = [name for name, _ in model.named_parameters()]
    for fast in (True, False, True, False):
        prepared(model, gradient_checkpointing=fast, fast_path=fast)
        assert len(blocks_of(model)) == 2 * fast
        assert fast is any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        assert fast is any(layer.fast is not None for layer in lora_layers(model).values())
        assert fast is ([type(module) for module in model.modules()] != modules)
    assert [name for name, _ in model.named_parameters()] == names


def test_layers_that_share_an_input(monkeypatch):
    """They compute once, for calls in any order and with any input; one may never be called."""
    model = dense_model()
    use_fast_path(model)
    attention = model.model.layers[0].self_attn
    q, k, v, shared = attention.q_proj, attention.k_proj, attention.v_proj, attention.q_proj.fast
    function = Mock(side_effect=fast_layers.lora_linear)
    monkeypatch.setattr(fast_layers, "lora_linear", function)

    def plain(layer: Any, x: Tensor) -> Any:
        low = x @ layer.lora_A["default"].T
        return layer.base_layer(x) + layer.scaling["default"] * low @ layer.lora_B["default"].T

    for count in (1, 2):
        x = torch.randn(5, 64, requires_grad=True)
        wanted = torch.autograd.grad(plain(q, x).sum() + plain(v, x).sum(), x)[0]
        got = torch.autograd.grad(q(x).sum() + v(x).sum(), x)[0]
        torch.testing.assert_close(got, wanted)
        assert list(shared._waiting) == [k] and function.call_count == count

    def check(layer: Any, x: Tensor) -> None:
        torch.testing.assert_close(layer(x), plain(layer, x), rtol=1e-5, atol=1e-6)

    x, other = torch.randn(5, 64), torch.randn(5, 64)
    for layer in (q, k, v, v, q, k):
        check(layer, x)
    assert not shared._waiting
    for layer, given in ((q, x), (k, other), (v, x), (k, x), (q, x)):
        check(layer, given)
    q(x)
    x.add_(1)  # changed between the calls
    check(k, x)
    q(x)
    with torch.no_grad():
        k.lora_B["default"].add_(1)
        check(k, x)  # another mode than that of the first call
    check(v, x)


@pytest.mark.parametrize("lora_dropout, attention_dropout", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])
def test_random_states_are_kept_for_recomputation_where_numbers_are_drawn(
    lora_dropout, attention_dropout
):
    torch.manual_seed(0)
    config = hf.LlamaConfig(**ONE_LAYER | {"attention_dropout": attention_dropout})
    model = hf.AutoModelForCausalLM.from_config(config)
    apply_lora(model.requires_grad_(False), LoraConfig(r=4, lora_dropout=lora_dropout))
    randomize_adapter(model)
    state = torch.get_rng_state()
    prepare_for_training(model)
    assert torch.equal(torch.get_rng_state(), state)
    kept = model.model.layers[0]._gradient_checkpointing_func.keywords["preserve_rng_state"]
    assert kept == bool(lora_dropout or attention_dropout)
    wanted = gradients(prepare_for_training(model, gradient_checkpointing=False))
    assert_same(gradients(prepare_for_training(model)), wanted)


@pytest.mark.parametrize("has_room", [True, False])
def test_decoded_weights_are_kept_from_recomputation_to_the_gradient(
    has_room, checkpoints, monkeypatch
):
    """q, k, v and o are decoded twice a step, not three times, where a GPU has room for them."""
    decoded: list[int] = []

    def decode(quantized: nf4.Quantized, out: Tensor) -> None:
        decoded.append(quantized.packed.data_ptr())
        out.copy_(nf4.dequantize(quantized, out.dtype))

    monkeypatch.setattr(nf4, "decoder", lambda *_: decode)
    monkeypatch.setattr(nf4, "_has_room", lambda *_: has_room)
    model = adapted_model(checkpoints("llama"))
    prepared(model, gradient_checkpointing=True, fast_path=False)
    wanted = gradients(model)
    use_fast_path(model, recompute=True)
    for _ in range(2):  # in the second step the buffers have the first one's weights
        decoded.clear()
        assert_same(gradients(model), wanted)
        for name, layer in lora_layers(model).items():
            count = decoded.count(layer.base_layer.weight.data_ptr())
            is_mlp = "mlp" in name
            assert count == (2 if is_mlp or has_room else 3), name
    vars(nf4._thread).clear()
