"""Moments of inputs and gradients, which a merge to 4 bits is calibrated with."""

import pytest
import torch
from conftest import FP32
from merging import trained_on as trained_on
from torch.nn import functional as F

from qlora.adapters.format import read_adapter
from qlora.adapters.live import load_live
from qlora.adapters.lora import lora_layers
from qlora.data.chat_template import NO_LOSS
from qlora.merge import moments
from qlora.merge.moments import LossMoments

IDS = torch.tensor([[1, 20, 21, 22, 23, 24], [1, 30, 31, 32, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
LABELS = torch.tensor([[-100, -100, -100, 22, 23, 24], [-100, -100, 31, 32, -100, -100]])
TEXT = {"input_ids": IDS, "attention_mask": MASK}
BATCH = TEXT | {"labels": LABELS}


def live(trained_on, family):
    adapter = read_adapter(trained_on(family).adapter)
    return load_live(adapter.base_model, adapter, quant=FP32)


@pytest.fixture
def of_the_labels(monkeypatch):
    """v is the gradient of the cross-entropy with the data's labels."""
    labels = LABELS[:, 1:][LABELS[:, 1:] != NO_LOSS]

    def gradient(z, generator):
        return z.softmax(-1) - F.one_hot(labels, z.shape[-1])

    monkeypatch.setattr(moments, "_random", gradient)


def wanted_moments(model, name, batch):
    """H and G with g by a variable that is added to the layer's outputs."""
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
    x, g = seen["input"].flatten(0, -2), gradient.flatten(0, -2)
    return torch.einsum("t,ti,tj->ij", g.norm(dim=-1), x, x), g.T @ g


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2"])
@pytest.mark.parametrize("max_bytes", [1 << 30, 1], ids=["one group", "a layer each"])
def test_moments_of_inputs_and_gradients(trained_on, of_the_labels, monkeypatch, family, max_bytes):
    monkeypatch.setattr(moments, "BLOCK", 24)  # several a layer, the last one short
    monkeypatch.setattr(moments, "ACTIVATIONS", max_bytes)
    model = live(trained_on, family)
    layers = lora_layers(model)
    found = LossMoments(model, [BATCH], layers, with_outputs=True, max_bytes=max_bytes)
    assert len(found.groups) == (1 if max_bytes > 1 else len(layers))
    assert found.checkpoints == (max_bytes == 1)
    for name in layers:
        inputs, outputs = wanted_moments(model, name, BATCH)
        for sums, wanted in zip(found.of(name)[:2], (inputs, outputs), strict=True):
            close = {"rtol": 1e-4, "atol": 1e-4 * float(wanted.abs().max())}
            torch.testing.assert_close(sums, wanted, **close)
            assert wanted.any()


def test_moments_of_outputs_are_only_summed_where_they_are_used(trained_on):
    model = live(trained_on, "llama")
    layers = lora_layers(model)
    found = LossMoments(model, [BATCH], layers, with_outputs=False)
    both = LossMoments(model, [BATCH], layers, with_outputs=True)
    for name in layers:  # and signs are drawn alike
        assert found.of(name).outputs is None
        assert torch.equal(found.of(name).inputs, both.of(name).inputs)


def test_text_of_the_models_own_counts_whole(trained_on):
    model = live(trained_on, "llama")
    layers = lora_layers(model)
    labels = IDS.masked_fill(MASK == 0, NO_LOSS)
    own = LossMoments(model, [TEXT], layers, with_outputs=True)
    given = LossMoments(model, [TEXT | {"labels": labels}], layers, with_outputs=True)
    for name in layers:
        assert all(map(torch.equal, own.of(name)[:2], given.of(name)[:2])), name


def test_a_layer_that_the_loss_does_not_depend_on_has_moments_of_zero(trained_on):
    model = live(trained_on, "llama")
    nothing = TEXT | {"labels": torch.full_like(IDS, NO_LOSS)}
    found = LossMoments(model, [nothing], lora_layers(model), with_outputs=True)
    assert not any(each.any() for each in found.of(next(iter(found.layers)))[:2])


def test_random_gradients_have_the_fisher_information_as_their_covariance():
    z = torch.tensor([[0.0, 3.0, -1.0, 1.0], [2.0, 2.0, 0.0, -8.0]])
    generator = torch.Generator().manual_seed(0)
    v = torch.stack([moments._random(z.clone(), generator) for _ in range(4000)])  # (n, 2, 4)
    p = z.softmax(-1)
    wanted = p.diag_embed() - p[:, :, None] * p[:, None]
    close = {"rtol": 0, "atol": 0.02}
    torch.testing.assert_close(torch.einsum("nti,ntj->tij", v, v) / len(v), wanted, **close)
    apart = torch.einsum("ni,nj->ij", v[:, 0], v[:, 1]) / len(v)  # of two tokens
    torch.testing.assert_close(apart, torch.zeros(4, 4), **close)


def test_the_model_is_left_as_it_was(trained_on):
    model = live(trained_on, "llama")
    before = model(**TEXT).logits
    layers = lora_layers(model)
    LossMoments(model, [BATCH], layers, with_outputs=True).of(next(iter(layers)))
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in layers.values())
    assert torch.equal(model(**TEXT).logits, before)
