"""How much tokens count in the moments that a merge to 4 bits is calibrated with."""

import pytest
import torch
from conftest import FP32
from merging import trained_on as trained_on
from torch.nn import functional as F

from qlora.adapters.format import read_adapter
from qlora.adapters.live import load_live
from qlora.adapters.lora import lora_layers
from qlora.adapters.starts import SecondMoments
from qlora.data.chat_template import NO_LOSS
from qlora.merge.importance import token_weights

IDS = torch.tensor([[1, 20, 21, 22, 23, 24], [1, 30, 31, 32, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
LABELS = torch.tensor([[-100, -100, -100, 22, 23, 24], [-100, -100, 31, 32, -100, -100]])
TEXT = {"input_ids": IDS, "attention_mask": MASK}
BATCH = TEXT | {"labels": LABELS}


def live(trained_on, family):
    adapter = read_adapter(trained_on(family).adapter)
    return load_live(adapter.base_model, adapter, quant=FP32)


def weighted_moments(model, name, batch):
    """Sum of |g| x x', with g by a variable that is added to the layer's outputs."""
    layer, seen = model.get_submodule(name), {}

    def add_variable(_, args, output):
        seen["input"], seen["added"] = (
            args[0].detach(),
            torch.zeros_like(output, requires_grad=True),
        )
        return output + seen["added"]

    handle = layer.register_forward_hook(add_variable)
    with torch.enable_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    handle.remove()
    loss = F.cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, seen["added"])
    x, weights = seen["input"].flatten(0, -2), gradient.norm(dim=-1).flatten()
    real = batch["attention_mask"].bool().flatten()
    return torch.einsum("t,ti,tj->ij", weights[real], x[real], x[real])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2"])
def test_moments_weigh_tokens_by_the_gradient_at_the_layers_output(trained_on, family):
    model = live(trained_on, family)
    layers = lora_layers(model)
    moments = SecondMoments(model, [BATCH], layers, weights=token_weights(model, [BATCH], layers))
    for name in layers:
        wanted = weighted_moments(model, name, BATCH)
        torch.testing.assert_close(moments.of(name), wanted, rtol=1e-4, atol=1e-5)


def test_text_of_the_models_own_counts_whole(trained_on):
    model = live(trained_on, "llama")
    layers = lora_layers(model)
    labels = IDS.masked_fill(MASK == 0, NO_LOSS)
    (own,) = token_weights(model, [TEXT], layers)
    (given,) = token_weights(model, [TEXT | {"labels": labels}], layers)
    assert own.keys() == given.keys() == layers.keys()
    assert all(torch.equal(own[name], given[name]) for name in own)


def test_tokens_that_no_answer_reads_count_nothing(trained_on):
    model = live(trained_on, "llama")
    (weights,) = token_weights(model, [BATCH], lora_layers(model))
    last = {name: weight for name, weight in weights.items() if name.startswith("model.layers.1.")}
    for name, weight in last.items():
        read = BATCH["labels"][:, 1:] != NO_LOSS  # the last layer's outputs, but for k and v
        if not name.endswith(("k_proj", "v_proj")):
            assert torch.equal(weight[:, :-1] > 0, read), name


def test_the_model_is_left_as_it_was(trained_on):
    model = live(trained_on, "llama")
    before = model(**TEXT).logits
    token_weights(model, [BATCH], lora_layers(model))
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in lora_layers(model).values())
    assert not model.get_input_embeddings()._forward_hooks
    assert torch.equal(model(**TEXT).logits, before)
