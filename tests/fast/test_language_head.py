"""The loss that a model's own forward computes, with lazy logits and with all of them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from chunks import Sizes, chunks_of
from conftest import (
    CONFIGS,
    FP32,
    OTHERS,
    SIZES,
    VOCAB,
    randomize_adapter,
    tiny_model,
    token_ids,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    FalconH1Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaForCausalLM,
    OPTConfig,
)

from qlora.adapters.apply import apply_lora, disable_adapter
from qlora.adapters.files import save_adapter
from qlora.adapters.fuse import merge_and_unload, unload
from qlora.base.load import load_base
from qlora.config import LoraConfig
from qlora.fast.head import LanguageHead, LazyLogits, put_language_head
from qlora.training import prepare_for_training

MORE: dict[str, Callable[[], Any]] = {
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.0625),
    "falcon-h1": lambda: FalconH1Config(
        **SIZES, lm_head_multiplier=0.5, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16,
        mamba_d_state=8, mamba_n_groups=1,
    ),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=16, final_logit_softcapping=0.5),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=8.0),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=64, pad_token_id=0,
    ),
}  # fmt: skip
CAUSAL = [*CONFIGS, *MORE]
MASKED = ["t5", "bert without pooler", "roberta", "modernbert"]
IDS = token_ids(rows=3, length=16)


@pytest.fixture(autouse=True)
def small_chunks() -> Iterator[None]:
    """Chunks of 5 tokens of the tiny models, that their logits are more than one."""
    with chunks_of(5 * VOCAB):
        yield


def frozen(family: str, dtype: torch.dtype = torch.float32) -> Any:
    if family in MORE:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(MORE[family]()).to(dtype).eval()
    else:
        model = tiny_model(family, dtype=dtype)
    if family == "gemma":  # or the cap of 30 is out of reach
        model.config.final_logit_softcapping = 0.5
    return model.requires_grad_(False)


def labels() -> Tensor:
    """Loss on some tokens only, with the first and the last of a row among them."""
    some = IDS.clone()
    some[0, 3:7] = -100
    some[1, :-2] = -100
    return some


def run(model: Any, **inputs: Any) -> tuple[Any, Tensor]:
    """What the model gives for embeddings of IDS, and the gradient of its loss in them."""
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    outputs = model(inputs_embeds=x, labels=labels(), **inputs)
    return outputs, torch.autograd.grad(outputs.loss, x)[0]


def is_lazy(logits: Any) -> bool:
    return isinstance(logits, LazyLogits) and logits.value is None


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


# ---- models whose loss needs no logits ----


@pytest.mark.parametrize("num_items_in_batch", [None, 40])
@pytest.mark.parametrize("family", CAUSAL)
def test_the_models_own_loss(family, num_items_in_batch):
    model = frozen(family)
    count = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
    wanted, wanted_gradient = run(model, **count)
    put_language_head(model)
    outputs, gradient = run(model, **count)
    assert is_lazy(outputs.logits)
    # fp32: the same sums in another order
    torch.testing.assert_close(outputs.loss, wanted.loss, rtol=1e-6, atol=0)
    assert off(gradient, wanted_gradient) <= 1e-5
    assert torch.equal(outputs.logits, wanted.logits)


@pytest.mark.parametrize("family", MASKED)
def test_the_loss_of_other_language_models(family):
    model = frozen(family)
    # a decoder's input is made of labels
    wanted, wanted_gradient = run(model)
    put_language_head(model)
    outputs, gradient = run(model)
    assert is_lazy(outputs.logits)
    torch.testing.assert_close(outputs.loss, wanted.loss, rtol=1e-6, atol=0)
    assert off(gradient, wanted_gradient) <= 1e-5


def test_the_router_loss_of_experts_is_added():
    model = frozen("mixtral")
    model.config.output_router_logits = True
    wanted, wanted_gradient = run(model)
    put_language_head(model)
    outputs, gradient = run(model)
    assert is_lazy(outputs.logits) and outputs.aux_loss > 0
    torch.testing.assert_close(outputs.loss, wanted.loss, rtol=1e-6, atol=0)
    assert off(gradient, wanted_gradient) <= 1e-5


class Doubled(LlamaForCausalLM):
    """A model that does with its logits what no config says."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 1.05 * outputs.logits
        outputs.loss = self.loss_function(outputs.logits, labels, VOCAB)
        return outputs


class Shifted(LlamaForCausalLM):
    """A model whose logits are more than a multiple of what its head makes."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + torch.arange(VOCAB) / VOCAB
        outputs.loss = self.loss_function(outputs.logits, labels, VOCAB)
        return outputs


def bert() -> nn.Module:
    """Its head has a layer of its own before the linear one."""
    return BertLMHeadModel(BertConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=64,
                                      num_hidden_layers=1, num_attention_heads=2,
                                      is_decoder=True))  # fmt: skip


@pytest.mark.parametrize(
    ("make", "lazily"),
    [
        (lambda: Doubled(CONFIGS["llama"]()), True),
        (lambda: Shifted(CONFIGS["llama"]()), False),
        (bert, True),
        (OTHERS["bart"], False),  # a bias beside the head
    ],
    ids=["doubled", "shifted", "bert", "bart"],
)
def test_models_that_do_more_than_others(make, lazily):
    torch.manual_seed(0)
    model = make().requires_grad_(False).eval()
    wanted, wanted_gradient = run(model)
    put_language_head(model)
    outputs, gradient = run(model)
    assert is_lazy(outputs.logits) is lazily
    torch.testing.assert_close(outputs.loss, wanted.loss, rtol=1e-6, atol=0)
    assert off(gradient, wanted_gradient) <= 1e-5


# ---- with adapters ----


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "mixtral"])
def test_gradients_of_adapters(family, checkpointing, checkpoints):
    found = []
    for fast_path in (True, False):
        model = load_base(str(checkpoints(family)), replace(FP32, allow_unquantized=True))
        apply_lora(model, LoraConfig(r=4), generator=torch.Generator().manual_seed(0))
        randomize_adapter(model)
        prepare_for_training(model, gradient_checkpointing=checkpointing, fast_path=fast_path)
        torch.manual_seed(0)  # of GPT-2's dropout
        outputs = model(input_ids=IDS, labels=labels())
        outputs.loss.backward()
        assert is_lazy(outputs.logits) is fast_path
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for got, wanted in zip(*found, strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_no_logits_of_all_tokens_are_made(family, checkpoints):
    """Forward and backward through the whole model; its other tensors are smaller."""
    ids = token_ids(rows=4, length=64)
    for fast_path in (True, False):
        model = apply_lora(load_base(str(checkpoints(family)), FP32), LoraConfig(r=4))
        prepare_for_training(model, gradient_checkpointing=False, fast_path=fast_path)
        with Sizes() as sizes:
            model(input_ids=ids, labels=ids).loss.backward()
        assert (max(sizes.seen) < ids.numel() * VOCAB) is fast_path


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_nothing_else_notices(family, checkpoints, tmp_path, capsys):
    """The names of parameters in files, generation, disabled adapters, and taking them off."""
    plain_model = load_base(str(checkpoints(family)), FP32)
    logits = plain_model.eval()(IDS).logits
    models = []
    for fast_path in (True, False):
        model = load_base(str(checkpoints(family)), FP32)
        apply_lora(model, LoraConfig(r=4), generator=torch.Generator().manual_seed(0))
        randomize_adapter(model)
        prepare_for_training(model, fast_path=fast_path)
        prepare_for_training(model, fast_path=fast_path)  # once is enough
        save_adapter(model, tmp_path / str(fast_path))
        models.append(model.eval())
    fast, slow = models
    head = fast.get_output_embeddings()
    assert isinstance(head, LanguageHead) and type(head.base_layer) is nn.Linear
    assert (head.weight is fast.get_input_embeddings().weight) is (family == "gemma")
    files = [load_file(tmp_path / str(on) / "adapter_model.safetensors") for on in (True, False)]
    assert files[0].keys() == files[1].keys()
    prompt = {"input_ids": IDS, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(fast.generate(**prompt), slow.generate(**prompt))
    with torch.no_grad():  # with gradients, the layers sum in another order
        assert torch.equal(fast(IDS).logits, slow(IDS).logits)
    with disable_adapter(fast):
        assert torch.equal(fast(IDS).logits, logits)
    for take, model in ((unload, fast), (merge_and_unload, load_again(fast, checkpoints(family)))):
        take(model)
        assert not any(isinstance(module, LanguageHead) for module in model.modules())
        assert not any("base_layer" in name for name in model.state_dict())
    assert torch.equal(fast(IDS).logits, logits)
    assert capsys.readouterr().out == ""


def load_again(model: nn.Module, folder: Any) -> nn.Module:
    other = apply_lora(load_base(str(folder), FP32), LoraConfig(r=4))
    return prepare_for_training(other)


def test_compiled_models_make_their_logits():
    model = frozen("llama")
    wanted, wanted_gradient = run(model)
    put_language_head(model)
    outputs, gradient = run(torch.compile(model, backend="eager", fullgraph=True))
    assert type(outputs.logits) is Tensor
    torch.testing.assert_close(outputs.loss, wanted.loss, rtol=1e-6, atol=0)
    assert off(gradient, wanted_gradient) <= 1e-5


# ---- heads that make their logits at once ----


def test_few_tokens_and_inference_mode():
    model = frozen("llama")
    put_language_head(model)
    assert type(model(IDS[:1, :5]).logits) is Tensor
    assert is_lazy(model(IDS[:1, :6]).logits)
    assert type(model(IDS, logits_to_keep=1).logits) is Tensor
    with torch.no_grad():
        assert is_lazy(model(IDS).logits)
    with torch.inference_mode():
        assert type(model(IDS).logits) is Tensor


def said(name: str, what: str) -> str:
    return f"the loss is computed from all logits: the output head, {name}, is {what}\n"


TOUCHED = "trained, adapted or no plain linear layer"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"modules_to_save": ("lm_head",)}),
        ("llama", {"target_modules": ("lm_head", "q_proj")}),
        ("phi", {"bias": "all"}),
        ("gemma", {"trainable_token_indices": (5, 6)}),  # of the embedding that the head is tied to
    ],
    ids=str,
)
@pytest.mark.parametrize("adapter_first", [True, False])
def test_a_head_that_is_trained_or_adapted(family, settings, adapter_first, checkpoints, capsys):
    model = load_base(str(checkpoints(family)), FP32)
    if not adapter_first:
        put_language_head(model)
    apply_lora(model, LoraConfig(r=4, **settings), generator=torch.Generator().manual_seed(0))
    plain_model = load_base(str(checkpoints(family)), FP32)
    apply_lora(plain_model, LoraConfig(r=4, **settings), generator=torch.Generator().manual_seed(0))
    capsys.readouterr()
    if adapter_first:
        put_language_head(model)
    assert capsys.readouterr().out == (said("lm_head", TOUCHED) if adapter_first else "")
    gradients = []
    for each in (model, plain_model):
        randomize_adapter(each)
        outputs = each(IDS, labels=labels())
        outputs.loss.backward()
        assert type(outputs.logits) is Tensor
        gradients.append([p.grad for p in each.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for got, wanted in zip(*gradients, strict=True):
        assert torch.equal(got, wanted)


def test_a_head_that_gets_a_gradient(capsys):
    model = frozen("llama")
    model.lm_head.weight.requires_grad_()
    put_language_head(model)
    assert capsys.readouterr().out == said("lm_head", TOUCHED)
    model = frozen("llama")
    put_language_head(model)
    model.lm_head.weight.requires_grad_()
    model(IDS, labels=labels()).loss.backward()
    assert model.lm_head.weight.grad.norm() > 0


def test_a_quantized_head(checkpoints, capsys):
    model = load_base(str(checkpoints("llama")), FP32)
    model.lm_head = model.model.layers[0].self_attn.q_proj
    put_language_head(model)
    assert capsys.readouterr().out == said("model.layers.0.self_attn.q_proj", "quantized")


def test_weights_are_tied_again():
    model = tiny_model("gemma").requires_grad_(False)
    names = list(model.state_dict())
    put_language_head(model)
    wrapped = list(model.state_dict())
    model.tie_weights()
    model.resize_token_embeddings(VOCAB + 8)
    head = model.get_output_embeddings()
    assert head.base_layer.weight is model.get_input_embeddings().weight
    assert len(head.weight) == VOCAB + 8
    assert list(model.state_dict()) == wrapped and len(names) == len(wrapped)


def test_a_head_that_is_watched():
    model = frozen("llama")
    put_language_head(model)
    seen = []
    handle = model.lm_head.base_layer.register_forward_hook(lambda *_: seen.append(1))
    assert type(model(IDS).logits) is Tensor and seen
    handle.remove()
    assert is_lazy(model(IDS).logits)


def test_a_model_without_a_head(capsys):
    put_language_head(frozen("llama").model)
    assert capsys.readouterr().out == ""
