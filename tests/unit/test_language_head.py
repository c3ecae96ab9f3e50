"""From last hidden states to the loss, against the model's own logits and transformers' loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, FP32, SIZES, tiny_model, token_ids
from test_loss import Sizes
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    GraniteConfig,
    LlamaForCausalLM,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from qlora import loss as loss_module
from qlora.adapters import apply_lora
from qlora.base import load_base
from qlora.config import LoraConfig
from qlora.language_head import language_head

SCALED: dict[str, Callable[[], Any]] = {
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.0625),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=8.0),
}


def frozen(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose hidden states alone get gradients, through its last norm."""
    if family in SCALED:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(SCALED[family]()).to(dtype).eval()
    else:
        model = tiny_model(family, dtype=dtype)
    return model.requires_grad_(False)


def labels_of(ids: Tensor) -> Tensor:
    """Loss on some tokens only, with the first and the last of a row among them."""
    labels = ids.clone()
    labels[0, 3:7] = -100
    labels[1, :-2] = -100
    return labels


@pytest.mark.parametrize("divisor", [None, 30])
@pytest.mark.parametrize("family", [*CONFIGS, *SCALED])
def test_loss_and_gradient_are_transformers(family, divisor, capsys):
    model = frozen(family)
    if family == "gemma":  # or the cap of 30 is out of reach
        model.config.final_logit_softcapping = 0.5
    head = language_head(model)
    assert head is not None and capsys.readouterr().out == ""
    ids = token_ids()
    hidden = model.base_model(ids)[0].detach().requires_grad_()
    logits = head_of(model)(hidden)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=0)
    count = None if divisor is None else torch.tensor(divisor)
    wanted = ForCausalLMLoss(logits, labels_of(ids), logits.shape[-1], num_items_in_batch=count)
    got = head.next_token_loss(hidden, labels_of(ids), count)
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in (got, wanted)]
    # fp32: the same sums in another order
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm() > 0


def head_of(model: Any) -> Callable[[Tensor], Tensor]:
    """Logits of hidden states as transformers' modeling files write them for these families."""

    def logits(hidden: Tensor) -> Tensor:
        z: Tensor = model.get_output_embeddings()(hidden)
        match model.config.model_type:
            case "gemma2":
                cap = model.config.final_logit_softcapping
                return torch.tanh(z / cap) * cap
            case "cohere":
                return z * 0.0625
            case "granite":
                return z / 8.0
        return z

    return logits


@pytest.mark.parametrize("family", ["gemma", "cohere", "granite", "phi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_head_in_16_bits_is_recognized(family, dtype):
    assert language_head(frozen(family, dtype)) is not None


def test_looking_leaves_the_model_as_it_was():
    model = frozen("llama").train()
    state = torch.get_rng_state()
    assert language_head(model) is not None
    assert model.training and torch.equal(torch.get_rng_state(), state)


# ---- models whose logits are all made ----


class Doubled(LlamaForCausalLM):
    """A model that does with its logits what no config says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 1.05 * outputs.logits
        return outputs


def doubled() -> nn.Module:
    torch.manual_seed(0)
    return Doubled(CONFIGS["llama"]()).to(torch.bfloat16)


def bert() -> nn.Module:
    """Its head has a layer of its own before the linear one."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return BertLMHeadModel(BertConfig(**sizes, num_attention_heads=2, is_decoder=True))


def with_router_loss() -> nn.Module:
    model = tiny_model("mixtral")
    model.config.output_router_logits = True
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (doubled, "it makes more of its last hidden states than its head does"),
        (bert, "it makes more of its last hidden states than its head does"),
        (with_router_loss, "its experts' router has a loss of its own"),
    ],
)
def test_a_model_that_makes_more_of_its_hidden_states(make, why, capsys):
    assert language_head(make().requires_grad_(False)) is None
    said = capsys.readouterr().out
    assert said == f"the loss is computed from all logits of the model: {why}\n"


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
def test_a_head_that_is_trained_or_adapted(family, settings, checkpoints, capsys):
    model = load_base(str(checkpoints(family)), FP32)
    apply_lora(model, LoraConfig(r=4, **settings))
    capsys.readouterr()
    assert language_head(model) is None
    assert "its head is trained or adapted" in capsys.readouterr().out


def test_a_head_that_gets_a_gradient(capsys):
    model = frozen("llama")
    model.lm_head.weight.requires_grad_()
    assert language_head(model) is None
    assert "its head is trained or adapted" in capsys.readouterr().out


# ---- memory ----


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_no_logits_of_all_tokens_are_made(family, checkpoints: Callable[[str], Path], monkeypatch):
    """Forward and backward through the whole model; its other tensors are smaller."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cpu": 4 * 320 * 16})
    model = load_base(str(checkpoints(family)), FP32)
    apply_lora(model, LoraConfig(r=4))
    head = language_head(model)
    assert head is not None
    ids = token_ids(rows=4, length=64)
    all_logits = ids.numel() * 320
    with Sizes() as sizes:
        head.next_token_loss(model.base_model(ids)[0], ids, None).backward()
    assert max(sizes.seen) < all_logits
    with Sizes() as sizes:
        model(ids)
    assert max(sizes.seen) >= all_logits
