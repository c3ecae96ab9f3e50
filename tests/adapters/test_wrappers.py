"""Wrappers without adapters beside those with: outputs and files stay as they are."""

import pytest
import torch
from conftest import FP32, randomize_adapter, token_ids
from safetensors.torch import load_file

from qlora.adapters.apply import apply_lora, disable_adapter
from qlora.adapters.files import load_adapter, save_adapter
from qlora.adapters.fuse import delete_adapter, merge_and_unload, unload
from qlora.adapters.lora import LoRALinear
from qlora.adapters.trained import TrainedModule
from qlora.adapters.wrappers import Wrapper, base_modules, plain, put_module, wrappers
from qlora.base.load import load_base
from qlora.config import LoraConfig

NAMES = ("lm_head", "model.layers.0.mlp", "model.layers.1.mlp.up_proj")


class Same(Wrapper):
    """An equivalent of the module behind it."""

    def forward(self, x):
        return self.base_layer(x)


def wrapped(checkpoints):
    model = load_base(str(checkpoints("llama")), FP32)
    for name in NAMES:
        put_module(model, name, Same(model.get_submodule(name)))
    return model


def there(model):
    return [name for name, module in base_modules(model).items() if isinstance(module, Same)]


def test_a_wrapper_has_the_attributes_of_the_module_behind_it(checkpoints):
    model = wrapped(checkpoints)
    head = model.get_output_embeddings()
    assert isinstance(head, Same) and head.weight is plain(head).weight
    assert head.in_features == 64 and not hasattr(head, "no_such")
    plain_model = load_base(str(checkpoints("llama")), FP32)
    assert list(base_modules(model)) == list(base_modules(plain_model))


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_adapters_are_the_same_with_other_wrappers(wrapped_first, checkpoints, tmp_path):
    """Their files, outputs and gradients; those of a model without wrappers are the expected."""
    settings = LoraConfig(r=4, target_modules=("up_proj", "q_proj"), modules_to_save=("lm_head",))
    found = []
    for with_wrappers in (True, False):
        model = load_base(str(checkpoints("llama")), FP32)
        if with_wrappers and wrapped_first:
            model = wrapped(checkpoints)
        apply_lora(model, settings, generator=torch.Generator().manual_seed(0))
        if with_wrappers and not wrapped_first:
            for name in NAMES:
                put_module(model, name, Same(model.get_submodule(name)))
        randomize_adapter(model)
        folder = save_adapter(model, tmp_path / f"{with_wrappers}")
        loss = model(token_ids(), labels=token_ids()).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        found.append((load_file(folder / "adapter_model.safetensors"), loss, gradients))
    (file, loss, gradients), (wanted_file, wanted, wanted_gradients) = found
    assert file.keys() == wanted_file.keys() and torch.equal(loss, wanted)
    for got, gradient in zip(gradients, wanted_gradients, strict=True):
        assert torch.equal(got, gradient)


def test_removing_an_adapter_keeps_other_wrappers(checkpoints, tmp_path):
    model = wrapped(checkpoints)
    logits = model(token_ids()).logits
    apply_lora(model, LoraConfig(r=4, modules_to_save=("lm_head",)))
    layers = [list(map(type, wrappers(model.get_submodule(name)))) for name in NAMES]
    assert layers == [[Same, TrainedModule], [Same], [LoRALinear, Same]]
    randomize_adapter(model)
    load_adapter(model, save_adapter(model, tmp_path), adapter_name="other")
    delete_adapter(model, "default")
    assert there(model) == ["model.layers.0.mlp", "lm_head"]
    assert not torch.equal(model(token_ids()).logits, logits)
    model.eval()
    with disable_adapter(model):
        delete_adapter(model, "other")
    assert [type(model.get_submodule(name)) for name in NAMES[:2]] == [Same, Same]
    unload(model)
    assert not any(isinstance(module, Same) for module in model.modules())
    assert torch.equal(model(token_ids()).logits, logits)


def test_merge_and_unload_removes_all_wrappers(checkpoints):
    model = wrapped(checkpoints)
    apply_lora(model, LoraConfig(r=4))
    randomize_adapter(model)
    wanted = model.eval()(token_ids()).logits
    merge_and_unload(model)
    assert there(model) == [] and not any("base_layer" in name for name in model.state_dict())
    torch.testing.assert_close(model(token_ids()).logits, wanted, rtol=0, atol=1e-5)
