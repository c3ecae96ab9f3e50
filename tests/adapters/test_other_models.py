"""Models that are no language models, as a person adapts them: images, segmentation, diffusion.

Each is trained a few steps, in full precision and over 4-bit linear layers, saved, opened with
PEFT, and merged.
"""

import copy
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from conftest import axis, randomize_adapter
from diffusers import UNet2DModel
from torch import nn
from torch.nn import functional as F
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
)

from qlora import LoraConfig, apply_lora, load_adapter, merge_and_unload, save_adapter
from qlora.base.modules import heads, is_in

TOLERANCE = 1e-5  # fp32, the same sums in the same order as PEFT's; a merge rounds once more


def vit() -> tuple[nn.Module, dict[str, Any]]:
    """Image classification: pixels -> one of three classes."""
    model = ViTForImageClassification(ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8, num_labels=3,
    ))  # fmt: skip
    return model, {"pixel_values": torch.randn(6, 3, 16, 16), "labels": torch.arange(6) % 3}


def segformer() -> tuple[nn.Module, dict[str, Any]]:
    """Semantic segmentation: pixels -> one of three classes for each pixel."""
    model = SegformerForSemanticSegmentation(SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[64, 64],
        patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=64, num_labels=3, drop_path_rate=0.0, classifier_dropout_prob=0.0,
    ))  # fmt: skip
    pixels = torch.randn(2, 3, 16, 16)
    return model, {"pixel_values": pixels, "labels": (pixels[:, 0] > 0).long()}


def unet() -> tuple[nn.Module, dict[str, Any]]:
    """Diffusion: a noisy image and its time step -> the noise (arXiv:2006.11239)."""
    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(32, 64), attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([3, 40])}


# Norms over a batch in SegFormer's decode_head keep running means, which are no parameters: they
# stay as they are, in eval mode, and of the head its last layer is trained. The last is a Conv2d.
SEGFORMER = r".*(q_proj|v_proj|fc1|patch_embeddings\.proj|sequence_reduction\.sequence_reduction)"
MODELS = {
    "vit": (vit, {"modules_to_save": ("classifier",)}),
    "segformer": (
        segformer, {"target_modules": SEGFORMER, "modules_to_save": ("decode_head.classifier",)}
    ),
    "unet": (unet, {"target_modules": ("to_q", "to_k", "to_v", "conv1", "conv2")}),
}  # fmt: skip


def output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    result = model(**{name: value for name, value in inputs.items() if name != "labels"})
    return result.sample if hasattr(result, "sample") else result.logits


def loss(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    if "labels" in inputs:
        return model(**inputs).loss
    return F.mse_loss(output(model, inputs), torch.sin(3 * inputs["sample"]))


def in_4_bits(model: nn.Module) -> nn.Module:
    """Every linear layer but the head as Linear4bit, as bitsandbytes' own documentation does it."""
    for name, layer in list(model.named_modules()):
        is_head = is_in(name, heads(model))
        if type(layer) is nn.Linear and layer.in_features % 64 == 0 and not is_head:
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
    model = (in_4_bits(model) if is_4_bit else model).eval()
    twin, again = copy.deepcopy(model), copy.deepcopy(model)

    config = LoraConfig(r=4, lora_alpha=8, **settings)
    apply_lora(model, config, generator=torch.Generator().manual_seed(0))
    before = output(again, inputs)
    assert (output(model, inputs) - before).abs().max() <= TOLERANCE
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(loss(model, inputs))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    randomize_adapter(model)  # larger than a few steps make them
    with torch.no_grad():
        wanted = output(model, inputs)
        assert (wanted - before).abs().max() > 1e-2

        save_adapter(model, tmp_path)
        load_adapter(again, tmp_path)
        assert (output(again, inputs) - wanted).abs().max() <= TOLERANCE
        opened = peft.PeftModel.from_pretrained(twin, tmp_path).eval()
        assert (output(opened.base_model.model, inputs) - wanted).abs().max() <= TOLERANCE

        merged = merge_and_unload(model)
        assert not any(isinstance(m, bnb.nn.Linear4bit) for m in merged.modules())
        assert (output(merged, inputs) - wanted).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("kind", "head"), [("vit", "classifier"), ("segformer", "decode_head")])
def test_all_linear_leaves_the_head_alone(kind, head):
    model, _ = MODELS[kind][0]()
    assert list(heads(model)) == [head]
    apply_lora(model, LoraConfig(r=2))
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert adapted and not any(name.startswith(head) for name in adapted)
