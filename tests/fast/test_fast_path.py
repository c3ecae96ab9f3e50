"""Models on the fast path against the same models without it."""

import copy
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from conftest import CONFIGS, DEVICES, FP32, SIZES, randomize_adapter, token_ids
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from qlora.adapters.apply import apply_lora, disable_adapter, mixed_batch, set_adapter
from qlora.adapters.fuse import delete_adapter, merge_adapter, unload, unmerge_adapter
from qlora.adapters.lora import lora_layers
from qlora.adapters.targets import target_layers
from qlora.adapters.wrappers import base_modules
from qlora.base.load import load_base
from qlora.config import LoraConfig, QuantConfig
from qlora.fast.layers import MLPBlock, SharedInput, take_fast_path_off, use_fast_path
from qlora.ops import lora as lora_function
from qlora.training import prepare_for_training

LORA = LoraConfig(r=4, lora_alpha=8)

# blocks, groups and single layers that each family's two layers make
EXPECTED = {
    "llama": (2, [1, 1, 2, 3]),
    "qwen2": (2, [1, 1, 2, 3]),
    "qwen3": (2, [1, 1, 2, 3]),
    "mistral": (2, [1, 1, 2, 3]),
    "gemma": (2, [1, 1, 2, 3]),
    "phi": (0, [1, 1, 1, 3]),
    "gpt2": (0, [1, 1, 1, 1]),
    "mixtral": (0, [1, 3]),
}


def adapted(folder: Any, config: LoraConfig = LORA, quant: QuantConfig = FP32) -> Any:
    quant = replace(quant, allow_unquantized=True)  # Mixtral's experts
    model = apply_lora(
        load_base(str(folder), quant), config, generator=torch.Generator().manual_seed(0)
    )
    randomize_adapter(model)
    return model


def gradients(model: Any, *, seed: int = 0, **inputs: Tensor) -> dict[str, Tensor]:
    """The loss and every gradient, by name."""
    ids = token_ids(rows=3, length=16, seed=seed).to(model.device)
    model.zero_grad()
    torch.manual_seed(0)  # of the model's own dropout
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    found = {f"{name}.{ending}": parameter.grad for name, layer in lora_layers(model).items()
             for ending, parameter in layer.parameters_of("default").items()}  # fmt: skip
    return {"loss": loss.detach(), **{k: g.clone() for k, g in found.items() if g is not None}}


def the_same(found: dict[str, Tensor], wanted: dict[str, Tensor], close: float = 1e-5) -> None:
    assert found.keys() == wanted.keys() and len(wanted) > 1
    for name, gradient in wanted.items():
        # fp32 sums in another order
        assert (found[name] - gradient).norm() <= close * gradient.norm() > 0, name


def fast_parts(model: nn.Module) -> tuple[int, list[int]]:
    """How many blocks, and the sizes of groups of one decoder layer."""
    modules = base_modules(model)
    blocks = [name for name, module in modules.items() if isinstance(module, MLPBlock)]
    groups = {id(layer.fast): layer.fast for layer in lora_layers(model).values()}
    sizes = sorted(len(group.layers) for group in groups.values())
    return len(blocks), sizes[::2]  # two decoder layers that are alike


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_numbers_are_the_same(family, checkpointing, checkpoints, capsys):
    model = adapted(checkpoints(family))
    prepare_for_training(model, gradient_checkpointing=checkpointing, fast_path=False)
    wanted = gradients(model)
    use_fast_path(model, recompute=checkpointing)
    blocks, groups = fast_parts(model)
    assert (blocks, sorted(groups)) == (EXPECTED[family][0], sorted(EXPECTED[family][1]))
    the_same(gradients(model), wanted)
    take_fast_path_off(model)
    assert all(torch.equal(g, wanted[name]) for name, g in gradients(model).items())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_same_numbers_are_dropped(device, checkpointing, checkpoints, capsys):
    model = adapted(checkpoints("llama"), replace(LORA, lora_dropout=0.3)).to(device)
    prepare_for_training(model, gradient_checkpointing=checkpointing, fast_path=False)
    without = gradients(model.eval())
    wanted = gradients(model.train())
    assert abs(wanted["loss"] - without["loss"]) > 1e-3 * without["loss"]
    use_fast_path(model, recompute=checkpointing)
    assert fast_parts(model) == (2, [1, 1, 2, 3])
    assert "plain" not in capsys.readouterr().out
    the_same(gradients(model), wanted)
    the_same(gradients(model.eval()), without)


# ---- what is recognised ----


def frozen_model(config: Any, target: Any = "all-linear", **lora: Any) -> Any:
    """A plain model with adapters, not quantized."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    apply_lora(model, LoraConfig(r=4, target_modules=target, **lora))
    randomize_adapter(model)
    return prepare_for_training(model, gradient_checkpointing=False, fast_path=False)


def only_block(model: Any) -> MLPBlock | None:
    use_fast_path(model)
    blocks = [m for m in base_modules(model).values() if isinstance(m, MLPBlock)]
    return blocks[0] if blocks else None


@pytest.mark.parametrize(
    "name, found",
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", None),
     ("gelu_10", None), ("gelu_new", "gelu_tanh"), ("gelu_fast", "gelu_tanh"),
     ("quick_gelu", None), ("tanh", None)],
)  # fmt: skip
def test_an_activation_is_known_by_its_values(name, found):
    model = frozen_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1}, hidden_act=name))
    wanted = gradients(model)
    block = only_block(model)
    assert (block.activation if block else None) == found
    the_same(gradients(model), wanted)


class Halved(nn.Module):
    """A gated MLP that halves what its down projection gives."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) / 2
        return y


class Squared(Halved):
    """One whose down projection sees something else."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).square())
        return y


class Dropping(Halved):
    """One with dropout of its own, which a look in eval mode does not see."""

    def __init__(self, mlp: Any) -> None:
        super().__init__(mlp)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.drop(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))
        return y


class Bounded(Halved):
    """DeepSeek-V4's, whose gate and up have bounds that few tokens do not reach."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x).clamp(max=10.0), self.up_proj(x).clamp(-10.0, 10.0)
        y: Tensor = self.down_proj(self.act_fn(gate) * up)
        return y


class DroppingByFunction(Halved):
    """One with dropout that is no module."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return nn.functional.dropout(y, 0.5, self.training)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act, found", [("silu", "silu"), ("gelu_10", None)])
def test_large_values_are_looked_at_in_16_bits_too(act, found, dtype):
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 1}, hidden_act=act)
    block = only_block(frozen_model(config).to(dtype))
    assert (block.activation if block else None) == found


@pytest.mark.parametrize("kind", [Halved, Squared, Dropping, Bounded, DroppingByFunction])
def test_what_only_looks_like_a_gated_mlp_is_left_alone(kind):
    model = frozen_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1}))
    model.model.layers[0].mlp = kind(model.model.layers[0].mlp)
    wanted = gradients(model)
    assert only_block(model) is None
    the_same(gradients(model), wanted)


@pytest.mark.parametrize("family, times", [("llama", 2), ("gemma", 4)])
def test_checkpointing_makes_a_blocks_output_again_only_for_who_reads_it(
    family, times, checkpoints, monkeypatch
):
    """Gemma's norm after the MLP does."""
    model = adapted(checkpoints(family))
    prepare_for_training(model, gradient_checkpointing=True)
    assert {m.recompute for m in model.modules() if isinstance(m, MLPBlock)} == {family == "llama"}
    made: list[Tensor] = []
    forward = lora_function.gated_forward
    monkeypatch.setattr(
        lora_function, "gated_forward", lambda *given: made.append(forward(*given)) or made[-1]
    )
    gradients(model)
    assert len(made) == times  # of two layers


def test_gate_and_up_in_one_matrix():
    """Phi-3's: no block, no group of q, k and v, and every layer by itself."""
    model = frozen_model(Phi3Config(**SIZES))
    wanted = gradients(model)
    use_fast_path(model)
    assert fast_parts(model) == (0, [1, 1, 1, 1])
    the_same(gradients(model), wanted)


def test_without_an_adapter_on_each_layer_of_it_an_mlp_is_no_block():
    model = frozen_model(
        LlamaConfig(**SIZES), target=["gate_proj", "down_proj", "q_proj", "v_proj"]
    )
    wanted = gradients(model)
    use_fast_path(model)
    assert fast_parts(model) == (0, [1, 1, 2])
    the_same(gradients(model), wanted)


def test_layers_of_an_image_model_are_not_looked_for():
    """What it takes is not known: each layer by itself."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = ViTConfig(**sizes, num_hidden_layers=2, image_size=32, patch_size=8)
    torch.manual_seed(0)
    model = ViTForImageClassification(config).requires_grad_(False)
    apply_lora(model, LoraConfig(r=4))
    randomize_adapter(model)
    pixels = torch.randn(2, 3, 32, 32)

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        model(pixel_values=pixels).logits.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = run()
    use_fast_path(model)
    assert all(len(layer.fast.layers) == 1 for layer in lora_layers(model).values())
    the_same(run(), wanted)


# ---- what the functions do not cover ----


@pytest.mark.parametrize(
    "lora, reason",
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_it_falls_back_and_says_so_once(lora, reason, checkpoints, capsys):
    model = adapted(checkpoints("qwen2"), replace(LORA, **lora))
    prepare_for_training(model, gradient_checkpointing=False, fast_path=False)
    wanted = gradients(model)
    capsys.readouterr()
    use_fast_path(model)
    assert capsys.readouterr().out == f"14 of 14 layers compute the plain way: {reason}\n"
    found = gradients(model)
    assert all(torch.equal(gradient, found[name]) for name, gradient in wanted.items())
    assert capsys.readouterr().out == ""


def test_another_dtype_than_the_layers_computes_the_plain_way(checkpoints, capsys):
    model = adapted(checkpoints("llama"), quant=QuantConfig(compute_dtype="bf16"))
    for module in (model.model.embed_tokens, model.lm_head):
        module.float()
    capsys.readouterr()
    prepare_for_training(model, gradient_checkpointing=False)
    said = capsys.readouterr().out
    assert "14 of 14 layers compute the plain way: their input is torch.float32" in said
    assert gradients(model)["loss"] > 0


def test_under_autocast_it_computes_as_without_it():
    model = frozen_model(LlamaConfig(**SIZES))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = gradients(model)
        use_fast_path(model)
        found = gradients(model)
    assert all(torch.equal(gradient, found[name]) for name, gradient in wanted.items())


def test_what_changes_about_adapters_later(checkpoints):
    """Another adapter, two at once, none, rows of their own, merged: as without the fast path."""
    models = [adapted(checkpoints("llama")) for _ in range(2)]
    for model, fast in zip(models, (True, False), strict=True):
        generator = torch.Generator().manual_seed(3)
        apply_lora(model, replace(LORA, r=2), adapter_name="other", generator=generator)
        randomize_adapter(model)
        prepare_for_training(model, gradient_checkpointing=False, fast_path=fast)

    def both(act: Any) -> None:
        found, wanted = (act(model) for model in models)
        the_same(found, wanted)

    def of(*names: str) -> Any:
        def act(model: Any) -> dict[str, Tensor]:
            set_adapter(model, list(names))
            ids = token_ids()
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            return {n.replace("mlp.base_layer", "mlp"): g for n, g in found.items() if g.any()}

        return act

    both(of("default"))
    both(of("other"))
    both(of("default", "other"))

    def logits(model: Any) -> Tensor:
        found: Tensor = model(input_ids=token_ids()).logits.detach()
        return found

    def same_logits() -> None:
        torch.testing.assert_close(*map(logits, models), rtol=1e-5, atol=1e-5)

    with disable_adapter(models[0]), disable_adapter(models[1]):
        same_logits()
    for model in models:
        set_adapter(model, "default")
        model.eval()
    with mixed_batch(models[0], ["default", "other"]), mixed_batch(models[1], ["default", "other"]):
        same_logits()
    for model in models:
        merge_adapter(model)
    same_logits()
    for model in models:
        unmerge_adapter(model)
        delete_adapter(model, "other")
    same_logits()
    for model in models:
        unload(model)
    assert not any(isinstance(m, MLPBlock) for m in models[0].modules())
    same_logits()


def test_somebody_who_watches_a_layer_sees_it_called(checkpoints):
    model = adapted(checkpoints("llama"))
    prepare_for_training(model, gradient_checkpointing=False)
    seen: list[Tensor] = []
    layers = lora_layers(model)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.k_proj"):
        layers[name].register_forward_hook(lambda _, args, y: seen.append(y))
    wanted = gradients(adapted_plain := copy.deepcopy(model))
    assert len(seen) == 2
    take_fast_path_off(adapted_plain)
    the_same(gradients(adapted_plain), wanted)


def test_hooks_below_the_adapters_are_called_too():
    """On the base's own layers, and on the MLP and its activation, put there before or after."""
    model = frozen_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1}))
    layer = model.model.layers[0]
    watched = [layer.mlp, layer.mlp.act_fn, layer.mlp.up_proj.base_layer]
    watched.append(layer.self_attn.q_proj.base_layer)
    wanted = gradients(model)
    for put_before in (True, False):
        seen: list[nn.Module] = []
        if not put_before:
            use_fast_path(model)
        hooks = [
            module.register_forward_hook(lambda module, *_, seen=seen: seen.append(module))
            for module in watched
        ]
        if put_before:
            use_fast_path(model)
        seen.clear()
        the_same(gradients(model), wanted)
        assert set(seen) == set(watched)
        for hook in hooks:
            hook.remove()
    assert fast_parts(model)[0] == 1


class Gained(nn.Linear):
    """A linear layer with a forward of its own, as BitNet's."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_linear_layer_of_another_kind_computes_what_it_computes(capsys):
    model = frozen_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1}))
    layer = model.model.layers[0]
    for own in (layer.self_attn.q_proj, layer.mlp.up_proj):
        own.base_layer.__class__ = Gained
    wanted = gradients(model)
    use_fast_path(model)
    said = "2 of 7 layers compute the plain way: no plain linear layer of its own\n"
    assert capsys.readouterr().out == said
    the_same(gradients(model), wanted)


def test_a_forward_that_was_put_in_a_layers_place_is_called():
    """As accelerate does, to bring weights that are elsewhere."""
    model = frozen_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1}))
    base = model.model.layers[0].self_attn.q_proj.base_layer
    own, calls = base.forward, []
    base.forward = lambda x: calls.append(1) or own(x)
    prepare_for_training(model, gradient_checkpointing=False)
    calls.clear()
    gradients(model)
    assert calls == [1]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_under_autocast(compute, checkpointing, checkpoints):
    models = [adapted(checkpoints("llama"), quant=QuantConfig(compute_dtype=compute))]
    models.append(copy.deepcopy(models[0]))
    found = []
    for model, fast in zip(models, (True, False), strict=True):
        prepare_for_training(model, gradient_checkpointing=checkpointing, fast_path=fast)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(gradients(model))
    # of 16 bits two ways round in two ways
    the_same(*found, close=1e-6 if compute == "fp32" else 0.1)


def test_after_a_forward_pass_that_was_left_half_done(checkpoints):
    model = adapted(checkpoints("llama"))
    prepare_for_training(model, gradient_checkpointing=False)
    wanted = gradients(model)

    def fail(*_: Any) -> None:
        raise MemoryError

    hook = lora_layers(model)["model.layers.0.self_attn.k_proj"].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        gradients(model)
    hook.remove()
    the_same(gradients(copy.deepcopy(model)), wanted)
    the_same(gradients(model), wanted)


def test_a_copy_of_a_model_is_its_own(checkpoints):
    model = adapted(checkpoints("llama"))
    prepare_for_training(model, gradient_checkpointing=False)
    wanted = gradients(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert all(torch.equal(g, wanted[name]) for name, g in gradients(model).items())
    assert gradients(other)["loss"] != wanted["loss"]


# ---- layers that share an input ----


def three() -> tuple[list[Any], SharedInput]:
    """q, k and v of a model."""
    model = frozen_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1}))
    use_fast_path(model)
    attention = model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    return layers, layers[0].fast


def plain_twin(layer: Any, x: Tensor) -> Tensor:
    lora_A, lora_B = layer.lora_A["default"], layer.lora_B["default"]
    y: Tensor = layer.base_layer(x) + layer.scaling["default"] * (x @ lora_A.T) @ lora_B.T
    return y


def check(layer: Any, x: Tensor) -> None:
    torch.testing.assert_close(layer(x), plain_twin(layer, x), rtol=1e-5, atol=1e-6)


def test_calls_in_any_order_and_with_any_input_are_right():
    (q, k, v), shared = three()
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


def test_a_layer_that_is_never_called_does_not_disturb_the_others():
    (q, k, v), shared = three()
    for _ in range(2):
        x = torch.randn(5, 64, requires_grad=True)
        wanted = torch.autograd.grad(plain_twin(q, x).sum() + plain_twin(v, x).sum(), x)[0]
        got = torch.autograd.grad(q(x).sum() + v(x).sum(), x)[0]
        torch.testing.assert_close(got, wanted)
    assert list(shared._waiting) == [k]


def test_the_last_call_of_prepare_for_training_counts(checkpoints):
    model = adapted(checkpoints("llama"))
    modules = [type(module) for module in model.modules()]
    names = [name for name, _ in model.named_parameters()]
    prepare_for_training(model)
    assert fast_parts(model)[0] == 2 and [type(m) for m in model.modules()] != modules
    prepare_for_training(model, gradient_checkpointing=False, fast_path=False)
    assert [type(module) for module in model.modules()] == modules
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(layer.fast for layer in lora_layers(model).values())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    prepare_for_training(model)
    assert fast_parts(model)[0] == 2
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_it_computes_once_for_all(monkeypatch):
    (q, k, v), _ = three()
    from qlora.fast import layers as fast_layers

    calls: list[int] = []
    function = fast_layers.lora_linear
    monkeypatch.setattr(
        fast_layers, "lora_linear", lambda x, *rest: calls.append(1) or function(x, *rest)
    )
    x = torch.randn(5, 64)
    for layer in (q, k, v):
        layer(x)
    assert len(calls) == 1


# ---- against PEFT, and over many steps ----


@pytest.mark.parametrize("device", DEVICES)
def test_in_bf16_errors_are_no_larger_than_pefts(device):
    """Of every gradient, against fp64, with the same 16-bit weights and adapters."""
    # rounding errors are random: of one model they differ by some per cent, either way
    found = [_bf16_errors(seed, device) for seed in range(6)]
    assert sum(ours for ours, _ in found) <= sum(theirs for _, theirs in found)


def _bf16_errors(seed: int, device: str) -> tuple[float, float]:
    """Ours and PEFT's."""
    config = LlamaConfig(**SIZES | {"hidden_size": 128, "intermediate_size": 256})
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(config).to(device, torch.bfloat16)
    ids = token_ids(rows=4, length=64, seed=seed).to(device)

    def run(model: Any) -> list[Tensor]:
        model.train()(input_ids=ids, labels=ids).loss.backward()
        named = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
        order = {n.rpartition("layers.")[2].replace("base_layer.", ""): p for n, p in named}
        return [order[name].grad.double() for name in sorted(order)]

    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=target_layers(base, LORA))
    theirs = peft.get_peft_model(copy.deepcopy(base), settings, autocast_adapter_dtype=False)
    ours = base.requires_grad_(False)
    apply_lora(ours, replace(LORA, adapter_dtype="bf16"))
    randomize_adapter(ours)
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            other = theirs.base_model.model.get_submodule(name)
            other.lora_A["default"].weight.copy_(layer.lora_A["default"])
            other.lora_B["default"].weight.copy_(layer.lora_B["default"])
    truth = run(copy.deepcopy(ours).double())
    prepare_for_training(ours, gradient_checkpointing=False)
    errors = []
    for model in (ours, theirs):
        pairs = zip(run(model), truth, strict=True)
        errors.append(sum(float((got - wanted).norm() / wanted.norm()) for got, wanted in pairs))
    return errors[0], errors[1]


def test_tiles_are_used_where_rows_are_long(checkpoints, monkeypatch):
    model = adapted(checkpoints("llama"))
    prepare_for_training(model, gradient_checkpointing=True, fast_path=False)
    wanted = gradients(model)
    monkeypatch.setattr(lora_function, "TILE_BYTES", 4 * 128 * 4)
    use_fast_path(model, recompute=True)
    the_same(gradients(model), wanted)
