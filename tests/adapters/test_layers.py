"""LoRA over convolutions: PEFT's layers are the oracle. (Embeddings and experts: test_trained.)"""

import peft
import pytest
import torch
from conftest import pefts_parameters
from safetensors.torch import load_file
from torch import nn

from qlora.adapters.apply import apply_lora
from qlora.adapters.files import load_adapter, parameters_by_file_name, save_adapter
from qlora.adapters.fuse import merge_adapter, merge_and_unload, unmerge_adapter
from qlora.adapters.wrappers import adapted
from qlora.config import LoraConfig
from qlora.errors import UserError


class Eyes(nn.Module):
    """Convolutions of one and two dimensions, padded, strided and dilated; one is grouped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.mirrored = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), padding_mode="circular", bias=False)
        self.point = nn.Conv2d(8, 6, 1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.score = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mirrored(torch.relu(self.first(x)))
        x = self.line(torch.relu(self.grouped(self.point(x))).flatten(2))
        return torch.as_tensor(self.score(x.mean(-1)))


def image() -> torch.Tensor:
    return torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(5))


CONVS = ("first", "point", "line", "score")
SUMS = {"rtol": 1e-5, "atol": 1e-5}  # fp32: the same sums in another order


def moved(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in parameters_by_file_name(model, "default").values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_convolutions_are_pefts(use_dora, tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=CONVS, use_dora=use_dora)
    model = moved(apply_lora(Eyes(), config))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Eyes(), tmp_path, is_trainable=True)
    ours = model(image())
    torch.testing.assert_close(ours, theirs(image()), **SUMS)
    assert (ours - Eyes()(image())).abs().max() > 1e-2
    for output in (ours, theirs(image())):
        output.square().sum().backward()
    wanted = pefts_parameters(theirs)
    for name, parameter in parameters_by_file_name(model, "default").items():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, **SUMS, msg=name)
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "theirs")]
    shapes = [{name: tensor.shape for name, tensor in file.items()} for file in files]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_convolutions_save_merge_and_unmerge(use_dora, tmp_path):
    """With one that pads in a circle, which PEFT's adapter does not."""
    targets = (*CONVS, "mirrored")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=use_dora)
    model = moved(apply_lora(Eyes(), config)).eval()
    live = model(image())
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(Eyes().eval(), tmp_path)(image()), live)
    torch.testing.assert_close(merge_adapter(model)(image()), live, **SUMS)
    assert torch.equal(unmerge_adapter(model)(image()), live)
    torch.testing.assert_close(merge_and_unload(model)(image()), live, **SUMS)
    assert [type(m) for m in model.children()] == [type(m) for m in Eyes().children()]


def test_grouped_convolutions_are_refused_unless_left_out():
    with pytest.raises(UserError, match=r"grouped convolutions, .* grouped\. Leave them out"):
        apply_lora(Eyes(), LoraConfig(target_modules=".*(first|grouped)"))
    config = LoraConfig(target_modules=".*(first|grouped)", exclude_modules=("grouped",))
    assert [name for name, _ in adapted(apply_lora(Eyes(), config))] == ["first"]


class Patches(nn.Module):
    """A module with a parameter of its own beside a layer, as ViT's embeddings have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cls_token = nn.Parameter(torch.randn(1, 4))
        self.project = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.project(x) + self.cls_token)


def test_a_module_with_parameters_of_its_own_and_layers_is_trained_in_full(tmp_path):
    def new() -> nn.Module:
        return nn.Sequential(Patches(), nn.Linear(4, 2)).eval()

    model = moved(apply_lora(new(), LoraConfig(r=2, target_modules=("1",), modules_to_save=("0",))))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    live = model(x)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(new(), tmp_path)
    torch.testing.assert_close(theirs(x), live, **SUMS)
    assert torch.equal(load_adapter(new(), tmp_path)(x), live)
    torch.testing.assert_close(merge_and_unload(model)(x), live, **SUMS)
