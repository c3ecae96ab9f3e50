"""LoRA over the layers of models that are no language models; PEFT's are the oracle.

Each is trained a few steps, in full precision and over 4-bit linear layers, saved, opened with
PEFT, and merged. (Embeddings and experts: test_trained.)
"""

import copy
from functools import partial
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from conftest import axis, pefts_parameters, randomize_adapter, require_same_adapter
from torch import nn
from torch.nn import functional as F

from qlora import LoraConfig, UserError, apply_lora, load_adapter, save_adapter
from qlora.adapters import merge_adapter, merge_and_unload, unmerge_adapter
from qlora.adapters.files import parameters_by_file_name
from qlora.adapters.wrappers import adapted
from qlora.base.modules import heads, is_in

SUMS = {"rtol": 1e-5, "atol": 1e-5}  # fp32: the same sums in another order


def vit() -> tuple[nn.Module, dict[str, Any]]:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8, num_labels=3,
    ))  # fmt: skip
    return model, {"pixel_values": torch.randn(6, 3, 16, 16), "labels": torch.arange(6) % 3}


def segformer() -> tuple[nn.Module, dict[str, Any]]:
    model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[64, 64],
        patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=64, num_labels=3, drop_path_rate=0.0, classifier_dropout_prob=0.0,
    ))  # fmt: skip
    pixels = torch.randn(2, 3, 16, 16)
    return model, {"pixel_values": pixels, "labels": (pixels[:, 0] > 0).long()}


def unet() -> tuple[nn.Module, dict[str, Any]]:
    """Diffusion: a noisy image and its time step -> the noise (arXiv:2006.11239)."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(32, 64), attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([3, 40])}


class Head(nn.Module):
    """A module with a parameter of its own beside a layer, as ViT's embeddings have."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(4))
        self.project = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.project(x) + self.shift)


class Eyes(nn.Module):
    """Convolutions of one and two dimensions, padded and strided; one is grouped."""

    def __init__(self, **tall: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.tall = nn.Conv2d(8, 6, (3, 1), padding=(1, 0), bias=False, **tall)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.score = nn.Linear(5, 5)
        self.head = Head()

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        x = self.tall(torch.relu(self.first(sample)))
        x = self.line(torch.relu(self.grouped(x)).flatten(2))
        return torch.as_tensor(self.head(self.score(x.mean(-1))))


def eyes() -> tuple[nn.Module, dict[str, Any]]:
    return Eyes(), {"sample": torch.randn(2, 3, 9, 8)}


# Norms over a batch in SegFormer's decode_head keep running means, which are no parameters: they
# stay as they are, in eval mode, and of the head its last layer is trained. The last is a Conv2d.
SEGFORMER = r".*(q_proj|v_proj|fc1|patch_embeddings\.proj|sequence_reduction\.sequence_reduction)"
EYES = {"target_modules": ("first", "tall", "line", "score"), "modules_to_save": ("head",)}
MODELS = {
    "vit": (vit, {"modules_to_save": ("classifier",)}),
    "segformer": (
        segformer, {"target_modules": SEGFORMER, "modules_to_save": ("decode_head.classifier",)}
    ),
    "unet": (unet, {"target_modules": ("to_q", "to_k", "to_v", "conv1", "conv2")}),
    "convolutions": (eyes, EYES),
    "dora of convolutions": (eyes, {"use_dora": True, **EYES}),
}  # fmt: skip


def output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    result = model(**{name: value for name, value in inputs.items() if name != "labels"})
    if isinstance(result, torch.Tensor):
        return result
    return result.sample if hasattr(result, "sample") else result.logits


def loss(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    if "labels" in inputs:
        return model(**inputs).loss
    predicted = output(model, inputs)
    is_image = predicted.shape == inputs["sample"].shape
    return F.mse_loss(predicted, torch.sin(3 * inputs["sample"]) if is_image else predicted * 0 + 2)


def in_4_bits(model: nn.Module) -> nn.Module:
    """Every linear layer but the head as Linear4bit, as bitsandbytes' own documentation does it."""
    layers = {n: layer for n, layer in model.named_modules() if not is_in(n, heads(model))}
    for name, layer in layers.items():
        if type(layer) is nn.Linear and layer.in_features % 64 == 0:
            sizes = (layer.in_features, layer.out_features, layer.bias is not None)
            dense = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
            # as load_base does: on a CPU with bf16 units it would infer with other roundings
            dense.support_avx512bf16_for_cpu = False
            dense.load_state_dict(layer.state_dict())
            model.set_submodule(name, dense.to("cpu"))  # quantizes
    return model


@pytest.mark.parametrize("is_4_bit", axis(True, False))
@pytest.mark.parametrize("kind", MODELS)
def test_train_save_open_merge(kind, is_4_bit, tmp_path):
    torch.manual_seed(0)
    make, settings = MODELS[kind]
    model, inputs = make()
    outputs = torch.no_grad()(partial(output, inputs=inputs))
    model = (in_4_bits(model) if is_4_bit else model).eval()
    twin, again = copy.deepcopy(model), copy.deepcopy(model)
    config = LoraConfig(r=4, lora_alpha=8, **settings)
    apply_lora(model, config, generator=torch.Generator().manual_seed(0))
    before = outputs(again)
    torch.testing.assert_close(outputs(model), before, **SUMS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(loss(model, inputs))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    randomize_adapter(model)  # larger than a few steps make them
    wanted = outputs(model)
    assert (wanted - before).abs().max() > 1e-2
    save_adapter(model, tmp_path)
    load_adapter(again, tmp_path, trainable=True)  # convolutions of frozen weights round otherwise
    assert torch.equal(outputs(again), wanted)
    opened = peft.PeftModel.from_pretrained(twin, tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(outputs(opened.base_model.model), wanted, **SUMS)
    (loss(model, inputs) + loss(opened.base_model.model, inputs)).backward()
    pefts = pefts_parameters(opened)
    for name, parameter in parameters_by_file_name(model, "default").items():
        torch.testing.assert_close(parameter.grad, pefts[name].grad, **SUMS, msg=name)
    opened.save_pretrained(tmp_path / "peft")
    require_same_adapter(tmp_path, tmp_path / "peft")
    torch.testing.assert_close(outputs(merge_adapter(model)), wanted, **SUMS)
    assert torch.equal(outputs(unmerge_adapter(model)), wanted)
    merged = merge_and_unload(model)
    assert not adapted(merged)
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in merged.modules())
    torch.testing.assert_close(outputs(merged), wanted, **SUMS)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_convolutions_that_pad_in_a_circle_and_are_dilated(use_dora):
    """PEFT's adapter does not and is not, so fusing is the oracle."""
    torch.manual_seed(0)
    model, x = Eyes(padding_mode="circular", dilation=2).eval(), torch.randn(2, 3, 9, 8)
    apply_lora(model, LoraConfig(r=4, target_modules=("tall",), use_dora=use_dora))
    randomize_adapter(model, std=0.3)
    live = model(x)
    torch.testing.assert_close(merge_and_unload(model)(x), live, **SUMS)


def test_grouped_convolutions_are_refused_unless_left_out():
    with pytest.raises(UserError, match=r"grouped convolutions, .* grouped\. Leave them out"):
        apply_lora(Eyes(), LoraConfig(target_modules=".*(first|grouped)"))
    config = LoraConfig(target_modules=".*(first|grouped)", exclude_modules=("grouped",))
    assert [name for name, _ in adapted(apply_lora(Eyes(), config))] == ["first"]


@pytest.mark.parametrize(("make", "head"), [(vit, "classifier"), (segformer, "decode_head")])
def test_all_linear_leaves_the_head_alone(make, head):
    model, _ = make()
    assert list(heads(model)) == [head]
    names = [name for name, _ in adapted(apply_lora(model, LoraConfig(r=2)))]
    assert names and not any(is_in(name, [head]) for name in names)


ZERO, TINY = slice(0, 6), slice(6, 9)  # outputs whose weights are zero, or have no square in fp32
BASES: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(64, 32), lambda: torch.randn(5, 64)),
    "4-bit": (lambda: nn.Linear(64, 32), lambda: torch.randn(5, 64)),
    "embedding": (lambda: nn.Embedding(50, 32), lambda: torch.randint(50, (5,))),
    "convolution": (lambda: nn.Conv1d(8, 32, 3), lambda: torch.randn(5, 8, 3)),
}


@pytest.mark.parametrize("kind", BASES)
def test_dora_over_rows_of_zeros(kind):
    """They have the factor 1 while B is zero, and train away from zero; live, merged and again."""
    torch.manual_seed(0)
    make, inputs = BASES[kind]
    base, x = make(), inputs()
    by_row = base.weight.data.T if kind == "embedding" else base.weight.data
    by_row[ZERO], by_row[TINY] = 0, 1e-30
    model = nn.Sequential(base)
    model = in_4_bits(model) if kind == "4-bit" else model
    before = model(x)
    apply_lora(model, LoraConfig(r=4, target_modules=("0",), use_dora=True))
    torch.testing.assert_close(model(x), before, **SUMS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    parameters = parameters_by_file_name(model, "default")
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in parameters.values())
    magnitude = parameters["base_model.model.0.lora_magnitude_vector"].flatten()
    assert (magnitude[ZERO] != 0).all() and (magnitude[TINY].abs() > 1e-3).all()
    wanted = model(x).detach()
    channel = 1 if wanted.ndim == 3 else -1
    assert (wanted.movedim(channel, 0)[ZERO] != before.movedim(channel, 0)[ZERO]).any()
    torch.testing.assert_close(merge_adapter(model.eval())(x), wanted, **SUMS)
    torch.testing.assert_close(merge_and_unload(unmerge_adapter(model))(x), wanted, **SUMS)
