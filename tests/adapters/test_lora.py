"""LoRALinear against the formula of the paper in float64."""

import math

import bitsandbytes
import pytest
import reference
import torch
from conftest import DEVICES
from torch import nn

from qlora.adapters.lora import LoRALinear, adapter_dtype, delta_weight
from qlora.config import LoraConfig

OUT, IN = 48, 64
FP32, BF16 = torch.float32, torch.bfloat16


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, BIAS = gaussian(OUT, IN) / 8, gaussian(OUT, seed=1)  # outputs around 1
EXACT = {"linear": WEIGHT.double(), "4bit": reference.round_trip(WEIGHT)}


def make(base="linear", *, dtype=FP32, device="cpu", seed=3, **settings):
    """A LoRALinear over a frozen base, and its A and B, of which B is random as well."""
    if base == "linear":
        plain = nn.Linear(IN, OUT, dtype=dtype)
    else:
        nf4 = {"compute_dtype": dtype, "compress_statistics": False, "quant_type": "nf4"}
        plain = bitsandbytes.nn.Linear4bit(IN, OUT, **nf4)
        plain.support_avx512bf16_for_cpu = False  # else it rounds absmax to bf16 in eval mode
    plain.load_state_dict({"weight": WEIGHT, "bias": BIAS})
    layer = LoRALinear(plain.requires_grad_(False).to("cpu").to(device))  # quantizes on the CPU
    generator = torch.Generator().manual_seed(seed)
    layer.add_adapter("default", LoraConfig(r=4, **settings), generator=generator)
    layer.active_adapters = ("default",)
    lora_A, lora_B = layer.lora_A["default"], layer.lora_B["default"]
    lora_B.data.copy_(gaussian(OUT, 4, seed=2))
    return layer, lora_A, lora_B


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adapter", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("base", EXACT)
def test_outputs_and_gradients_are_the_formulas(base, dtype, adapter, device):
    settings = {"dtype": dtype, "device": device, "adapter_dtype": adapter}
    layer, lora_A, lora_B = make(base, lora_alpha=12, **settings)
    x = gaussian(2, 5, IN, seed=4).to(device, dtype).requires_grad_()
    towards = gaussian(2, 5, OUT, seed=5)
    y = layer(x)
    (y * towards.to(device)).sum().backward()
    assert (y.dtype, y.shape) == (dtype, (2, 5, OUT))
    assert lora_A.dtype == {"fp32": FP32, "bf16": BF16}[adapter] and "r={'default': 4}" in repr(
        layer
    )
    inputs = (x, lora_A, lora_B)
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    exact_y = reference.lora_forward(exact[0], EXACT[base], *exact[1:], 3.0) + BIAS
    (exact_y * towards.double()).sum().backward()
    # relative to the whole: 1e-6 for sums of 48 to 64 fp32 products; 1 % where inputs, weights,
    # x A^T and the sums are each rounded to bf16, 2^-9; a bf16 adapter's gradients are, too
    tolerance = 1e-6 if dtype == FP32 else 0.01
    assert reference.relative_rms(y.cpu(), exact_y) < tolerance
    for ours, wanted in zip(inputs, exact, strict=True):
        tolerance = 1e-6 if dtype == ours.dtype == FP32 else 0.01
        assert reference.relative_rms(ours.grad.cpu(), wanted.grad) < tolerance


def test_dropout_is_on_the_adapters_input_and_in_training_alone():
    layer, lora_A, lora_B = make(lora_dropout=0.5)
    lora_A.data, lora_B.data = torch.eye(IN), torch.eye(OUT, IN)  # the change is the input of A
    x = gaussian(5, IN, seed=4)

    def ratio():
        change = layer(x).double() - (x.double() @ WEIGHT.double().T + BIAS)
        return change / (8 * x[:, :OUT])

    layer.eval()
    assert torch.allclose(ratio(), torch.ones(5, OUT).double(), atol=1e-3)
    layer.train()
    drawn = ratio()
    kept = drawn.abs() > 0.5
    assert torch.allclose(drawn, torch.where(kept, 2.0, 0.0).double(), atol=1e-3)
    assert 0.3 < kept.double().mean() < 0.7  # 240 draws
    assert not torch.allclose(ratio(), drawn)


def test_a_is_uniform_and_b_zero_and_a_seed_means_the_same_in_any_dtype():
    layer = LoRALinear(nn.Linear(400, 10))
    layer.add_adapter("default", LoraConfig(r=100), generator=torch.Generator().manual_seed(0))
    lora_A, lora_B = layer.lora_A["default"], layer.lora_B["default"]
    bound = 1 / math.sqrt(400)
    assert (lora_A.shape, lora_B.shape) == ((100, 400), (10, 100)) and not lora_B.any()
    assert 0.999 * bound < lora_A.abs().max() <= bound and abs(lora_A.mean()) < 0.02 * bound
    # A uniform variable has bound / sqrt(3); 1 % is five standard errors of 40,000 values.
    assert lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    (_, fp32, _), (_, bf16, _) = make(adapter_dtype="fp32"), make(adapter_dtype="bf16")
    assert torch.equal(bf16, fp32.bfloat16()) and not torch.equal(fp32, make(seed=4)[1])
    layer = LoRALinear(nn.Linear(IN, OUT))
    torch.manual_seed(3)  # without a generator
    layer.add_adapter("default", LoraConfig(r=4))
    assert torch.equal(layer.lora_A["default"], fp32)


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=str)
def test_delta_weight_equals_the_reference(dtype):
    lora_A, lora_B = gaussian(4, IN).to(dtype), gaussian(OUT, 4, seed=1).to(dtype)
    delta, exact = (of(lora_A, lora_B, 0.75) for of in (delta_weight, reference.delta))
    assert delta.dtype == FP32
    # four fp32 products and a scaling, on values around 2
    torch.testing.assert_close(delta.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("asked", "device", "compute", "dtype"), [
    ("auto", "cpu", BF16, FP32),
    ("auto", "cuda", BF16, BF16),
    ("auto", "cuda", torch.float16, FP32),  # loss scaling has no kernel for bf16
    ("bf16", "cpu", FP32, BF16),
])  # fmt: skip
def test_adapter_dtype(asked, device, compute, dtype):
    config = LoraConfig(adapter_dtype=asked)
    assert adapter_dtype(config, torch.device(device), compute) == dtype


def test_dora_in_bf16_beside_a_large_bias():
    """As Qwen2's k_proj has: subtracted from outputs of 16 bits it would take their digits."""
    torch.manual_seed(0)
    base = nn.Linear(64, 32, dtype=BF16).requires_grad_(False)
    base.bias.fill_(300)
    layer = LoRALinear(base)
    layer.add_adapter("default", LoraConfig(r=4, use_dora=True, adapter_dtype="bf16"))
    magnitude = layer.lora_magnitude_vector["default"]
    assert magnitude.dtype == FP32 and layer.lora_A["default"].dtype == BF16
    assert torch.equal(magnitude, base.weight.float().norm(dim=1))
    layer.active_adapters = ("default",)
    x = torch.randn(3, 64, dtype=BF16)
    assert torch.equal(layer(x), base(x))  # a new adapter changes nothing
    layer.lora_B["default"].data.normal_(std=0.2)
    summed = base.weight.double() + delta_weight(*layer.factors("default")[:3]).double()
    wanted = base.weight.double().norm(dim=1) / summed.norm(dim=1)
    # W A' is rounded to bf16, 0.4 %
    torch.testing.assert_close(layer._gain("default").double(), wanted, rtol=4e-3, atol=0)
