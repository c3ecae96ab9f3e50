"""LoRALinear against the formula of the paper in float64."""

import math

import bitsandbytes
import pytest
import reference
import torch
from torch import nn

from qlora.adapters.lora import LoRALinear, adapter_dtype, delta_weight, lora_layers
from qlora.config import LoraConfig

OUT, IN = 48, 64
# fp32 products of length 64 and rank 4: some 64 roundings of 6e-8, relative to values around 1
FP32_TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_layer(weight, bias):
    layer = nn.Linear(IN, OUT)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def four_bit_layer(weight, bias):
    layer = bitsandbytes.nn.Linear4bit(
        IN, OUT, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4"
    )
    layer.load_state_dict({"weight": weight, "bias": bias})
    layer.support_avx512bf16_for_cpu = False  # else it rounds absmax to bf16 in eval mode
    return layer.to("cpu")


BASES = {"linear": plain_layer, "4bit": four_bit_layer}
WEIGHT, BIAS = gaussian(OUT, IN) / 8, gaussian(OUT, seed=1)  # outputs around 1
EXACT = {"linear": WEIGHT.double(), "4bit": reference.round_trip(WEIGHT)}


def make(base="linear", *, names=("default",), seed=2, generator_seed=3, **settings):
    """A LoRALinear with random B, all of its adapters active, and the base frozen."""
    layer = LoRALinear(BASES[base](WEIGHT, BIAS).requires_grad_(False))
    generator = torch.Generator().manual_seed(generator_seed)
    for i, name in enumerate(names):
        layer.add_adapter(name, LoraConfig(r=4, **settings), generator=generator)
        layer.lora_B[name].data.copy_(gaussian(OUT, 4, seed=seed + i))
    layer.active_adapters = tuple(names)
    return layer


def expected(x, layer, base, name="default", *, scaling):
    lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
    return reference.lora_forward(x, EXACT[base], lora_A, lora_B, scaling) + BIAS


@pytest.fixture(params=BASES)
def base(request):
    return request.param


# ---- the forward pass ----


def test_a_new_adapter_changes_nothing(base):
    layer = LoRALinear(BASES[base](WEIGHT, BIAS))
    x = gaussian(2, 5, IN, seed=4)
    before = layer.base_layer(x)
    layer.add_adapter("default", LoraConfig(r=4))
    assert torch.equal(layer(x), before)  # not active
    layer.active_adapters = ("default",)
    assert torch.equal(layer(x), before)  # active, and B is zero


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 3.0), (True, 6.0)])  # 12 / sqrt(4)
def test_forward_equals_the_formula(base, use_rslora, scaling):
    layer = make(base, lora_alpha=12, use_rslora=use_rslora)
    x = gaussian(2, 5, IN, seed=4)
    y = layer(x)
    assert (y.dtype, y.shape) == (torch.float32, (2, 5, OUT))
    assert torch.allclose(y.double(), expected(x, layer, base, scaling=scaling), **FP32_TOLERANCE)


def test_two_active_adapters_add_up(base):
    layer = make(base, names=("first", "second"), lora_alpha=8)
    x = gaussian(5, IN, seed=4)
    alone = expected(x, layer, base, "first", scaling=2.0)
    second = reference.delta(layer.lora_A["second"], layer.lora_B["second"], 2.0)
    both = alone + x.double() @ second.T
    assert torch.allclose(layer(x).double(), both, **FP32_TOLERANCE)
    layer.active_adapters = ("first",)
    assert torch.allclose(layer(x).double(), alone, **FP32_TOLERANCE)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ["fp32", "bf16"])
def test_the_output_has_the_dtype_of_the_input(x_dtype, adapter):
    layer = LoRALinear(plain_layer(WEIGHT, BIAS).to(x_dtype))
    layer.add_adapter("default", LoraConfig(r=4, adapter_dtype=adapter))
    layer.lora_B["default"].data.copy_(gaussian(OUT, 4, seed=2))
    layer.active_adapters = ("default",)
    assert layer.lora_A["default"].dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[adapter]
    x = gaussian(5, IN, seed=4).to(x_dtype)
    y = layer(x)
    assert y.dtype == x_dtype
    exact = reference.lora_forward(x, layer.weight, *matrices(layer), 8.0)
    exact = exact + layer.bias.double()
    if x_dtype == torch.float32:  # a bf16 adapter's values are exact in fp32
        assert torch.allclose(y.double(), exact, **FP32_TOLERANCE)
    else:  # 1 %: A, B, x A^T and the two sums are rounded to bf16, 2^-9 each
        assert reference.relative_rms(y, exact) < 0.01


def matrices(layer, name="default"):
    return layer.lora_A[name], layer.lora_B[name]


def test_dropout_is_on_the_adapters_input_alone_and_in_training_alone():
    layer = make(lora_dropout=0.5)
    layer.lora_A["default"].data = torch.eye(IN)
    layer.lora_B["default"].data = torch.eye(OUT, IN)  # so the change is the input of A
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


# ---- the backward pass ----


def test_gradients_are_those_of_the_formula(base):
    layer = make(base, lora_alpha=12)
    x = gaussian(2, 5, IN, seed=4).requires_grad_()
    towards = gaussian(2, 5, OUT, seed=5)
    (layer(x) * towards).sum().backward()

    exact_x, A, B = (t.detach().double().requires_grad_() for t in (x, *matrices(layer)))
    y = reference.lora_forward(exact_x, EXACT[base], A, B, 3.0)
    (y * towards.double()).sum().backward()
    pairs = [(x, exact_x), (layer.lora_A["default"], A), (layer.lora_B["default"], B)]
    for ours, exact in pairs:
        # 1e-6: relative to the whole gradient, for sums of 48 to 64 fp32 products
        assert reference.relative_rms(ours.grad, exact.grad) < 1e-6


def test_at_step_one_only_b_has_a_gradient_that_is_not_zero(base):
    layer = make(base)
    layer.lora_B["default"].data.zero_()
    layer(gaussian(5, IN, seed=4)).square().sum().backward()
    with_gradient = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert with_gradient == {"lora_A.default", "lora_B.default"}
    assert not layer.lora_A["default"].grad.any()
    assert layer.lora_B["default"].grad.any()


# ---- the matrices ----


def test_a_is_uniform_and_b_zero():
    layer = LoRALinear(nn.Linear(400, 10))
    layer.add_adapter("default", LoraConfig(r=100), generator=torch.Generator().manual_seed(0))
    lora_A, lora_B = matrices(layer)
    bound = 1 / math.sqrt(400)
    assert (lora_A.shape, lora_B.shape) == ((100, 400), (10, 100))
    assert not lora_B.any()
    assert 0.999 * bound < lora_A.abs().max() <= bound
    # A uniform variable has bound / sqrt(3); 1 % is five standard errors of 40,000 values.
    assert lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert abs(lora_A.mean()) < 0.02 * bound


def test_a_seed_means_the_same_in_any_dtype_and_without_a_generator():
    fp32 = make(adapter_dtype="fp32").lora_A["default"]
    assert torch.equal(make(adapter_dtype="bf16").lora_A["default"], fp32.bfloat16())
    assert not torch.equal(fp32, make(generator_seed=4).lora_A["default"])
    layer = LoRALinear(nn.Linear(IN, OUT))
    torch.manual_seed(3)
    layer.add_adapter("default", LoraConfig(r=4))
    assert torch.equal(layer.lora_A["default"], fp32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_delta_weight_equals_the_reference(dtype):
    lora_A, lora_B = gaussian(4, IN).to(dtype), gaussian(OUT, 4, seed=1).to(dtype)
    delta = delta_weight(lora_A, lora_B, 0.75)
    assert delta.dtype == torch.float32
    # 1e-6: four fp32 products and a scaling, on values around 2
    exact = reference.delta(lora_A, lora_B, 0.75)
    assert torch.allclose(delta.double(), exact, rtol=1e-6, atol=1e-6)


# ---- how it looks to others ----


def test_it_shows_its_base_and_is_found_by_name(base):
    layer = make(base)
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert "r={'default': 4}" in repr(layer)
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"c": layer})})
    assert lora_layers(model) == {"b.c": layer}


@pytest.mark.parametrize(("asked", "device", "compute", "dtype"), [
    ("auto", "cpu", "bfloat16", "float32"),
    ("auto", "cuda", "bfloat16", "bfloat16"),
    ("auto", "cuda", "float16", "float32"),  # loss scaling has no kernel for bf16
    ("bf16", "cpu", "float32", "bfloat16"),
])  # fmt: skip
def test_adapter_dtype(asked, device, compute, dtype):
    config = LoraConfig(adapter_dtype=asked)
    found = adapter_dtype(config, torch.device(device), getattr(torch, compute))
    assert found == getattr(torch, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_forward_and_gradients_in_bf16_on_a_gpu(base):
    layer = LoRALinear(BASES[base](WEIGHT, BIAS).requires_grad_(False).to("cuda"))
    if base == "linear":
        layer.base_layer.bfloat16()
    else:
        layer.base_layer.compute_dtype = torch.bfloat16
    layer.add_adapter("default", LoraConfig(r=4, adapter_dtype="bf16"))
    layer.lora_B["default"].data.copy_(gaussian(OUT, 4, seed=2))
    layer.active_adapters = ("default",)
    x = gaussian(2, 5, IN, seed=4).to("cuda", torch.bfloat16).requires_grad_()
    y = layer(x)
    y.sum().backward()
    exact_x, A, B = (t.detach().cpu().double().requires_grad_() for t in (x, *matrices(layer)))
    exact = reference.lora_forward(exact_x, EXACT[base], A, B, 8.0) + BIAS
    exact.sum().backward()
    # 1 %: inputs, weights, x A^T and the sums are each rounded to bf16, 2^-9
    assert reference.relative_rms(y.cpu(), exact) < 0.01
    assert reference.relative_rms(x.grad.cpu(), exact_x.grad) < 0.01
    assert reference.relative_rms(layer.lora_A["default"].grad.cpu(), A.grad) < 0.01
    assert reference.relative_rms(layer.lora_B["default"].grad.cpu(), B.grad) < 0.01


def test_magnitudes_are_fp32_and_begin_as_the_rows_lengths():
    base = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    layer = LoRALinear(base)
    layer.add_adapter("default", LoraConfig(r=2, use_dora=True, adapter_dtype="bf16"))
    magnitude = layer.lora_magnitude_vector["default"]
    assert magnitude.dtype == torch.float32 and layer.lora_A["default"].dtype == torch.bfloat16
    assert torch.equal(magnitude, base.weight.float().norm(dim=1))
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    layer.active_adapters = ("default",)
    assert torch.equal(layer(x), base(x))  # a new adapter changes nothing


def test_doras_gain_is_right_beside_a_large_bias_in_bf16():
    """As Qwen2's k_proj has: subtracted from outputs of 16 bits it would take their digits."""
    torch.manual_seed(0)
    base = nn.Linear(64, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        base.bias.fill_(300)
    layer = LoRALinear(base)
    layer.add_adapter("default", LoraConfig(r=4, use_dora=True))
    with torch.no_grad():
        layer.lora_B["default"].normal_(std=0.2)
        summed = base.weight.double() + delta_weight(*layer.factors("default")[:3]).double()
    wanted = base.weight.double().norm(dim=1) / summed.norm(dim=1)
    # W A' is rounded to bf16, 0.4 %
    torch.testing.assert_close(layer._gain("default").double(), wanted, rtol=4e-3, atol=0)
