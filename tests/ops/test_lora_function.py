"""LoRA's autograd functions against plain torch on dense weights, and dropout."""

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import Mock

import bitsandbytes as bnb
import pytest
import torch
from conftest import DEVICES, axis
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qlora.ops import lora
from qlora.ops.lora import Dropout, LayerSpec, lora_linear, lora_mlp
from qlora.ops.nf4 import Quantized, dequantize

ACTS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class Layer(NamedTuple):
    spec: LayerSpec
    weight: Tensor  # dense
    A: nn.Parameter
    B: nn.Parameter

    def plain(self, x: Tensor) -> Tensor:
        module: Any = self.spec.layer
        bias = None if module.bias is None else module.bias.to(x.dtype)
        dropped = x if self.spec.dropout is None else self.spec.dropout(x)
        low = F.linear(F.linear(dropped, self.A.to(x.dtype)), self.B.to(x.dtype))
        return F.linear(x, self.weight.to(x.dtype), bias) + self.spec.scaling * low


def layer(
    inputs: int, outputs: int, r: int = 4, *, bias: bool = False, four_bit: bool = True,
    p: float = 0.0, dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> Layer:  # fmt: skip
    module: Any = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    if four_bit:
        module = bnb.nn.Linear4bit(inputs, outputs, bias=bias, quant_type="nf4")
    weight = module.requires_grad_(False).to(device).weight
    if four_bit:
        weight = dequantize(Quantized(weight, weight.quant_state))
    like: Any = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
    A = nn.Parameter(torch.randn(r, inputs, **like) / inputs**0.5)
    B = nn.Parameter(torch.randn(outputs, r, **like) / r**0.5)
    return Layer(LayerSpec(module, 0.7, Dropout.drawn(p) if p else None), weight, A, B)


def mlp_layers(inputs: int = 64, intermediate: int = 128, **settings: Any) -> list[Layer]:
    shapes = [(inputs, intermediate), (inputs, intermediate), (intermediate, inputs)]
    return [layer(*shape, **settings) for shape in shapes]


def parameters(layers: Sequence[Layer]) -> list[nn.Parameter]:
    return [matrix for one in layers for matrix in (one.A, one.B)]


def linears(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    return lora_linear(x, [one.spec for one in layers], [(one.A, one.B) for one in layers])


def mlp(x: Tensor, layers: Sequence[Layer], activation: str = "silu", **settings: Any) -> Tensor:
    specs, factors = [one.spec for one in layers], [(one.A, one.B) for one in layers]
    return lora_mlp(x, specs, factors, activation=activation, **settings)


def plain_mlp(x: Tensor, layers: Sequence[Layer], activation: str = "silu") -> Tensor:
    gate, up, down = layers
    return down.plain(ACTS[activation](gate.plain(x)) * up.plain(x))


def close(values: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(values, expected, strict=True):
        # fp32 sums in another order
        assert (one - other).norm() <= 1e-5 * other.norm() and other.norm() > 0


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    outputs=st.lists(st.sampled_from([40, 64, 96]), min_size=1, max_size=3),
    r=st.integers(2, 5),
    bias=st.booleans(),
    four_bit=st.booleans(),
    unused=st.booleans(),
    dropped=st.lists(st.sampled_from([0.0, 0.3]), min_size=3, max_size=3),
    needs_dx=st.booleans(),  # not in the first decoder layer, after a frozen embedding
)
def test_layers_that_share_an_input(shape, outputs, r, bias, four_bit, unused, dropped, needs_dx):
    torch.manual_seed(0)
    layers = [
        layer(64, size, r + i, bias=bias, four_bit=four_bit, p=dropped[i])
        for i, size in enumerate(outputs)
    ]
    x = torch.randn(*shape, 64, requires_grad=needs_dx)
    ys, expected = linears(x, layers), [one.plain(x) for one in layers]
    assert [y.shape for y in ys] == [y.shape for y in expected]
    close(ys, expected)
    used = slice(None, -1 if unused and len(layers) > 1 else None)  # the loss ignores an output
    inputs = [x] * needs_dx + parameters(layers[used])
    exact = torch.autograd.grad(sum((y**2).sum() for y in expected[used]), inputs)
    close(torch.autograd.grad(sum((y**2).sum() for y in ys[used]), inputs), exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "tiles, p, needs_dx", [(1, 0.0, True), (3, 0.0, True), (1, 0.3, True), (3, 0.0, False)]
)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", axis(*ACTS))
def test_a_gated_mlp(activation, recompute, tiles, p, needs_dx, device, monkeypatch):
    torch.manual_seed(0)
    layers = [
        layer(64, 128, bias=True, device=device, p=p),
        layer(64, 128, four_bit=False, device=device, p=p / 2),
        layer(128, 64, bias=True, device=device, p=p),
    ]
    monkeypatch.setattr(lora, "TILE_BYTES", 21 * 128 * 4 // tiles)
    x = torch.randn(3, 7, 64, device=device).transpose(0, 1)  # not contiguous
    x.requires_grad_(needs_dx)
    weights = torch.randn(7, 3, 64, device=device)
    y, expected = mlp(x, layers, activation, recompute=recompute), plain_mlp(x, layers, activation)
    close([y], [expected])
    inputs = [x] * needs_dx + parameters(layers)
    exact = torch.autograd.grad((expected * weights).sum(), inputs)
    for retain_graph in (True, False):  # the backward pass can run twice
        close(torch.autograd.grad((y * weights).sum(), inputs, retain_graph=retain_graph), exact)


@pytest.mark.parametrize("shape", axis((2, 3, 64), (64,), (5, 64)))
@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_may_be_changed_in_place_and_parameters_may_not(recompute, shape):
    """Falcon's decoder layer adds its attention to the MLP's output."""
    layers = mlp_layers()
    x = torch.randn(*shape, requires_grad=True)

    def changed(*ys: Tensor) -> Tensor:
        return sum(y.mul_(i + 2).add_(1).square().sum() for i, y in enumerate(ys))

    loss = changed(*linears(x, layers[:2]), mlp(x, layers, recompute=recompute))
    exact = changed(*(one.plain(x) for one in layers[:2]), plain_mlp(x, layers))
    inputs = [x, *parameters(layers)]
    gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
    close(gradients, torch.autograd.grad(exact, inputs))
    with torch.no_grad():
        layers[2].B.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("recompute", [False, True])
def test_no_tokens_as_for_an_expert_that_none_is_routed_to(recompute):
    layers = mlp_layers()
    x = torch.randn(2, 0, 64, requires_grad=True)
    ys = [*linears(x, layers[:2]), mlp(x, layers, recompute=recompute)]
    assert [tuple(y.shape) for y in ys] == [(2, 0, 128), (2, 0, 128), (2, 0, 64)]
    sum(y.sum() for y in ys).backward()
    assert x.grad.shape == x.shape and not any(m.grad.any() for m in parameters(layers))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_layer_saves_its_input_and_nothing_else_of_that_size(p):
    layers = mlp_layers(r=2, p=p)
    x = torch.randn(50, 64, requires_grad=True)
    saved: dict[int, Tensor] = {}  # each memory once, without parameters

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    for run, sizes in (
        (lambda: linears(x, layers[:1]), [50 * 2]),
        (lambda: linears(x, layers[:2]), [50 * 4]),
        (lambda: mlp(x, layers, recompute=True), []),
        (lambda: mlp(x, layers), [50 * 4, 50 * 128, 50 * 128]),
    ):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
        assert saved.pop(x.untyped_storage().data_ptr()).numel() == x.numel()
        assert [tensor.numel() for tensor in saved.values()] == sizes


def test_tiles_have_their_own_dropout_the_same_in_both_passes(monkeypatch):
    torch.manual_seed(0)
    layers = mlp_layers(r=2, four_bit=False, p=0.3, dtype=torch.float64)
    monkeypatch.setattr(lora, "TILE_BYTES", 10 * 128 * 8)
    x = torch.randn(30, 64, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *matrices: Tensor) -> Tensor:
        pairs = zip(layers, matrices[::2], matrices[1::2], strict=True)
        return mlp(x, [one._replace(A=A, B=B) for one, A, B in pairs], recompute=True)

    # the function adds up its tiles' gradients of A and B in fp32
    inputs = [x, *parameters(layers)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, rtol=1e-5, atol=1e-9)
    first, second, _ = run(torch.ones_like(x), *parameters(layers))[::10]  # of equal rows
    assert not torch.allclose(first, second)


def test_a_tile_is_freed_before_the_next_is_computed(monkeypatch):
    layers = mlp_layers(r=2)
    monkeypatch.setattr(lora, "TILE_BYTES", 10 * 128 * 4)
    tensors: list[weakref.ref[Tensor]] = []
    outputs = lora._outputs

    def recorded(*inputs: Any) -> tuple[Tensor, ...]:
        assert all(ref() is None for ref in tensors)
        of_tile = outputs(*inputs)
        tensors.extend(map(weakref.ref, of_tile))
        return of_tile

    monkeypatch.setattr(lora, "_outputs", recorded)
    x = torch.randn(30, 64, requires_grad=True)
    mlp(x, layers, recompute=True).square().sum().backward()
    assert len(tensors) == 2 * 3 * 3  # x A', gate and up, in both passes, of three tiles


def test_the_second_forward_pass_of_checkpointing_ends_before_the_block(monkeypatch):
    layers = mlp_layers(r=2)
    x = torch.randn(50, 64, requires_grad=True)
    gated_forward = Mock(wraps=lora.gated_forward)
    monkeypatch.setattr(lora, "gated_forward", gated_forward)

    def block(x: Tensor) -> Tensor:
        return x + mlp(x.sin(), layers, recompute=True)

    inputs = [x, *parameters(layers)]
    expected = torch.autograd.grad(block(x).square().sum(), inputs)
    gated_forward.reset_mock()
    y = checkpoint(block, x, use_reentrant=False)
    gradients = torch.autograd.grad(y.square().sum(), inputs)
    gated_forward.assert_called_once()
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", axis(torch.bfloat16, torch.float16), ids=str)
def test_16_bits_are_as_exact_as_the_plain_path(dtype, recompute, device, monkeypatch):
    torch.manual_seed(0)
    layers = mlp_layers(256, 512, r=8, dtype=dtype, device=device)
    monkeypatch.setattr(lora, "TILE_BYTES", 100 * 512 * 2)
    x, weights = torch.randn(2, 300, 256, device=device)

    def gradients(run: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_(), *parameters(layers)]
        y = run(inputs[0], layers)
        return [y.detach(), *torch.autograd.grad((y * weights.to(dtype)).sum(), inputs)]

    exact, plain = (gradients(plain_mlp, kind) for kind in (torch.float64, dtype))
    ours = gradients(partial(mlp, recompute=recompute), dtype)
    for one, other, truth in zip(ours, plain, exact, strict=True):
        assert one.dtype == other.dtype
        # two draws of the same rounding noise differ by a few per cent
        assert (one - truth).double().norm() <= 1.05 * (other - truth).double().norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.1, 0.75])
def test_dropout_scales_what_its_mask_keeps_and_a_seed_gives_the_same_mask(p, device):
    torch.manual_seed(1)
    dropout, other = Dropout.drawn(p), Dropout.drawn(p)
    state = torch.get_rng_state()
    x = torch.full((4, 100, 500), 3.0, device=device)
    y, mask = dropout(x), dropout.mask(x)
    # 200,000 draws: a standard deviation of 0.001
    assert abs(mask.float().mean() - (1 - p)) < 0.005
    assert torch.allclose(y[mask], torch.tensor(3 / (1 - p))) and not y[~mask].any()
    assert torch.equal(mask.view(400, 500), dropout.mask(x.view(400, 500).half()))
    assert not torch.equal(mask, other.mask(x))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert Dropout.drawn(p) == dropout  # seeds come from torch's generator
