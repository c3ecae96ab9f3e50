"""Wrappers without adapters beside those with: outputs and files stay as they are."""

import copy

import pytest
import torch
from adapter_kinds import logits
from conftest import FP32, randomize_adapter, require_same_adapter, token_ids
from torch import nn

from qlora import LoraConfig, apply_lora, disable_adapter, load_adapter, load_base, save_adapter
from qlora.adapters import delete_adapter, unload
from qlora.adapters.lora import LoRALinear
from qlora.adapters.trained import TrainedModule
from qlora.adapters.wrappers import Wrapper, base_modules, plain, put_module, wrappers

NAMES = ("lm_head", "model.layers.0.mlp", "model.layers.1.mlp.up_proj")


class Same(Wrapper):
    def forward(self, x):
        return self.base_layer(x)


@pytest.fixture
def plain_model(checkpoints):
    return load_base(str(checkpoints("llama")), FP32).eval()


def wrap(model):
    for name in NAMES:
        put_module(model, name, Same(model.get_submodule(name)))
    return model


def test_a_wrapper_has_the_attributes_of_the_module_behind_it(plain_model):
    names = list(base_modules(plain_model))
    head = wrap(plain_model).get_output_embeddings()
    assert isinstance(head, Same) and head.weight is plain(head).weight
    assert head.in_features == 64 and not hasattr(head, "no_such")
    assert list(base_modules(plain_model)) == names


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_adapters_are_the_same_with_other_wrappers(wrapped_first, plain_model, tmp_path):
    settings = LoraConfig(r=4, target_modules=("up_proj", "q_proj"), modules_to_save=("lm_head",))
    outputs = []
    for folder, steps in (("plain", [nn.Module.eval] * 2), ("wrapped", [wrap, nn.Module.eval])):
        before, after = steps if wrapped_first else reversed(steps)
        model = before(copy.deepcopy(plain_model))
        apply_lora(model, settings, generator=torch.Generator().manual_seed(0))
        randomize_adapter(after(model))
        save_adapter(model, tmp_path / folder)
        loss = model(token_ids(), labels=token_ids()).loss
        loss.backward()
        outputs.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    require_same_adapter(tmp_path / "plain", tmp_path / "wrapped")
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


def test_removing_an_adapter_keeps_other_wrappers(plain_model, tmp_path):
    model = wrap(plain_model)
    before = logits(model)
    apply_lora(model, LoraConfig(r=4, modules_to_save=("lm_head",)))
    layers = [list(map(type, wrappers(model.get_submodule(name)))) for name in NAMES]
    assert layers == [[Same, TrainedModule], [Same], [LoRALinear, Same]]
    randomize_adapter(model)
    load_adapter(model, save_adapter(model, tmp_path), adapter_name="other")
    delete_adapter(model, "default")
    outermost = [name for name, module in base_modules(model).items() if isinstance(module, Same)]
    assert outermost == ["model.layers.0.mlp", "lm_head"]
    assert not torch.equal(logits(model), before)
    with disable_adapter(model):
        delete_adapter(model, "other")
    assert [type(model.get_submodule(name)) for name in NAMES[:2]] == [Same, Same]
    unload(model)
    assert not any(isinstance(module, Same) for module in model.modules())
    assert torch.equal(logits(model), before)
