"""The autograd functions against the same arithmetic in plain torch, on dense weights."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import bitsandbytes as bnb
import pytest
import torch
from conftest import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qlora.config import QuantConfig
from qlora.ops import lora as lora_function
from qlora.ops.lora import Dropout, LayerSpec, lora_linear, lora_mlp
from qlora.ops.nf4 import dequantize, quantize

MLP_SHAPES = [(64, 128), (64, 128), (128, 64)]
ACTS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class Layer(NamedTuple):
    spec: LayerSpec
    weight: Tensor
    """what the codes stand for, fp32"""
    A: nn.Parameter
    B: nn.Parameter

    def twin(self, x: Tensor) -> Tensor:
        layer: Any = self.spec.layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        read = x if self.spec.dropout is None else self.spec.dropout(x)
        low = F.linear(F.linear(read, self.A.to(x.dtype)), self.B.to(x.dtype))
        return F.linear(x, self.weight.to(x.dtype), bias) + self.spec.scaling * low


def layer(
    inputs: int,
    outputs: int,
    r: int,
    *,
    bias: bool = False,
    four_bit: bool = True,
    p: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Layer:
    weight = torch.randn(outputs, inputs) / inputs**0.5
    made: Any = nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)
    if four_bit:
        quantized = quantize(weight, QuantConfig())
        weight = dequantize(quantized)
        made = bnb.nn.Linear4bit(inputs, outputs, bias=bias, compute_dtype=dtype)
        made.weight = bnb.nn.Params4bit(
            quantized.packed,
            quant_state=quantized.state,
            requires_grad=False,
            quant_type="nf4",
            bnb_quantized=True,
        )
        made = made.to(device)
    else:
        made.weight = nn.Parameter(weight.to(device, dtype))
    A = nn.Parameter(torch.randn(r, inputs, device=device) / inputs**0.5)
    B = nn.Parameter(torch.randn(outputs, r, device=device) / r**0.5)
    spec = LayerSpec(made.requires_grad_(False), 0.7, Dropout.drawn(p) if p else None)
    return Layer(spec, weight.to(device), A, B)


def parameters(layers: Sequence[Layer]) -> list[nn.Parameter]:
    return [matrix for one in layers for matrix in (one.A, one.B)]


def arguments(layers: Sequence[Layer]) -> tuple[list[LayerSpec], list[tuple[Tensor, Tensor]]]:
    return [one.spec for one in layers], [(one.A, one.B) for one in layers]


def twin_mlp(x: Tensor, layers: Sequence[Layer], activation: str) -> Tensor:
    gate, up, down = layers
    return down.twin(ACTS[activation](gate.twin(x)) * up.twin(x))


def close(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
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
)
def test_layers_that_share_an_input(shape, outputs, r, bias, four_bit, unused, dropped):
    torch.manual_seed(0)
    layers = [
        layer(64, size, r + i, bias=bias, four_bit=four_bit, p=p)
        for i, (size, p) in enumerate(zip(outputs, dropped, strict=False))
    ]
    x = torch.randn(*shape, 64, requires_grad=True)
    ys = lora_linear(x, *arguments(layers))
    twins = [one.twin(x) for one in layers]
    assert [y.shape for y in ys] == [y.shape for y in twins]
    close(ys, twins)
    used = slice(None, -1 if unused and len(layers) > 1 else None)  # an output that nobody asks for
    wanted = torch.autograd.grad(
        sum((y**2).sum() for y in twins[used]), [x, *parameters(layers[used])]
    )
    got = torch.autograd.grad(sum((y**2).sum() for y in ys[used]), [x, *parameters(layers[used])])
    close(got, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tiles, p", [(1, 0.0), (3, 0.0), (1, 0.3)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ACTS)
def test_a_gated_mlp(activation, recompute, tiles, p, device, monkeypatch):
    torch.manual_seed(0)
    layers = [
        layer(64, 128, 4, bias=True, device=device, p=p),
        layer(64, 128, 4, four_bit=False, device=device, p=p / 2),
        layer(128, 64, 4, bias=True, device=device, p=p),
    ]
    monkeypatch.setattr(lora_function, "TILE_BYTES", 21 * 128 * 4 // tiles)
    x = torch.randn(3, 7, 64, device=device).transpose(0, 1).requires_grad_()  # not contiguous
    weights = torch.randn(7, 3, 64, device=device)
    y = lora_mlp(x, *arguments(layers), activation=activation, recompute=recompute)
    twin = twin_mlp(x, layers, activation)
    close([y], [twin])
    wanted = torch.autograd.grad((twin * weights).sum(), [x, *parameters(layers)])
    once = torch.autograd.grad((y * weights).sum(), [x, *parameters(layers)], retain_graph=True)
    again = torch.autograd.grad((y * weights).sum(), [x, *parameters(layers)])
    close(once, wanted)
    close(again, wanted)


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_it_gives_can_be_changed_in_place(recompute, shape):
    """As Falcon's decoder layer does, which adds its attention to what its MLP gives."""
    layers = [layer(64, 128, 4), layer(64, 128, 4), layer(128, 64, 4)]
    x = torch.randn(*shape, requires_grad=True)

    def changed(both: Sequence[Tensor], y: Tensor) -> Tensor:
        made = both[0].add_(1).square().sum() + both[1].mul_(2).square().sum()
        return made + y.add_(1).square().sum()

    mlp = lora_mlp(x, *arguments(layers), activation="silu", recompute=recompute)
    got = changed(lora_linear(x, *arguments(layers[:2])), mlp)
    wanted = changed([one.twin(x) for one in layers[:2]], twin_mlp(x, layers, "silu"))
    inputs = [x, *parameters(layers)]
    close(torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, inputs))


@pytest.mark.parametrize("recompute", [False, True])
def test_no_tokens_at_all(recompute):
    """As an expert gets them that no token is sent to."""
    layers = [layer(64, 128, 4), layer(64, 128, 4), layer(128, 64, 4)]
    x = torch.randn(2, 0, 64, requires_grad=True)
    made = [
        *lora_linear(x, *arguments(layers[:2])),
        lora_mlp(x, *arguments(layers), activation="silu", recompute=recompute),
    ]
    assert [tuple(y.shape) for y in made] == [(2, 0, 128), (2, 0, 128), (2, 0, 64)]
    sum(y.sum() for y in made).backward()
    assert x.grad.shape == x.shape
    assert not any(parameter.grad.any() for parameter in parameters(layers))


@pytest.mark.parametrize("recompute", [False, True])
def test_an_input_without_gradient(recompute):
    """As that of the first layers, which see a spec embedding."""
    layers = [layer(64, 128, 4), layer(64, 128, 4), layer(128, 64, 4)]
    x = torch.randn(5, 64)
    wanted = torch.autograd.grad(twin_mlp(x, layers, "silu").sum(), parameters(layers))
    y = lora_mlp(x, *arguments(layers), activation="silu", recompute=recompute)
    close(torch.autograd.grad(y.sum(), parameters(layers)), wanted)
    (y,) = lora_linear(x, *arguments(layers[:1]))
    wanted = torch.autograd.grad(layers[0].twin(x).sum(), parameters(layers[:1]))
    close(torch.autograd.grad(y.sum(), parameters(layers[:1])), wanted)


def saved_by(make: Any) -> list[Tensor]:
    """What is kept for the backward pass, each memory once, parameters left out."""
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make()
    return list(found.values())


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_layer_keeps_its_input_and_nothing_else_of_its_size(p):
    layers = [layer(*shape, 2, p=p) for shape in MLP_SHAPES]
    x = torch.randn(50, 64, requires_grad=True)
    made = [
        (lambda: lora_linear(x, *arguments(layers[:1])), [x.numel(), 50 * 2]),
        (lambda: lora_linear(x, *arguments(layers[:2])), [x.numel(), 50 * 4]),
        (lambda: lora_mlp(x, *arguments(layers), activation="silu", recompute=True), [x.numel()]),
        (
            lambda: lora_mlp(x, *arguments(layers), activation="silu"),
            [x.numel(), 50 * 4, 50 * 128, 50 * 128],
        ),
    ]
    for make, sizes in made:
        saved = saved_by(make)
        assert [tensor.numel() for tensor in saved] == sizes
        assert saved[0].data_ptr() == x.data_ptr()


def test_tiles_drop_each_for_itself_and_the_same_in_both_passes(monkeypatch):
    """The derivative along some direction, of what the function gives in fp64."""
    torch.manual_seed(0)
    double = torch.float64
    layers = [layer(*shape, 2, four_bit=False, p=0.3, dtype=double) for shape in MLP_SHAPES]
    layers = [one._replace(A=nn.Parameter(one.A.double()), B=nn.Parameter(one.B.double()))
              for one in layers]  # fmt: skip
    monkeypatch.setattr(lora_function, "TILE_BYTES", 10 * 128 * 8)
    x = torch.randn(30, 64, dtype=double, requires_grad=True)
    leaves = [x, *parameters(layers)]
    directions = [torch.randn_like(leaf) for leaf in leaves]

    def loss(step: float) -> Tensor:
        with torch.no_grad():
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf += step * direction
        return lora_mlp(x, *arguments(layers), activation="silu", recompute=True).square().sum()

    gradients = torch.autograd.grad(loss(0), leaves)
    along = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    difference = (loss(1e-6) - loss(-2e-6)) / 2e-6
    # the function adds up its tiles' gradients of A and B in fp32
    assert abs(along - difference) <= 1e-5 * abs(difference)
    alike = torch.ones(30, 64, dtype=double)
    first, second, _ = lora_mlp(alike, *arguments(layers), activation="silu", recompute=True)[::10]
    assert not torch.allclose(first, second)


def test_of_a_tile_nothing_is_left_when_the_next_begins(monkeypatch):
    layers = [layer(*shape, 2) for shape in MLP_SHAPES]
    monkeypatch.setattr(lora_function, "TILE_BYTES", 10 * 128 * 4)
    alive: list[weakref.ref[Tensor]] = []
    begin = lora_function._outputs

    def gate_and_up(*given: Any) -> tuple[Tensor, ...]:
        assert not [one for one in alive if one() is not None]
        made = begin(*given)
        alive.extend(weakref.ref(tensor) for tensor in made)
        return made

    monkeypatch.setattr(lora_function, "_outputs", gate_and_up)
    x = torch.randn(30, 64, requires_grad=True)
    y = lora_mlp(x, *arguments(layers), activation="silu", recompute=True)
    y.square().sum().backward()
    assert len(alive) == 2 * 3 * 3  # in both passes, of three tiles


def test_the_second_forward_pass_of_checkpointing_ends_before_the_block(monkeypatch):
    layers = [layer(64, 128, 2), layer(64, 128, 2), layer(128, 64, 2)]
    x = torch.randn(50, 64, requires_grad=True)
    made: list[Tensor] = []
    forward = lora_function.gated_forward
    monkeypatch.setattr(
        lora_function, "gated_forward", lambda *given: made.append(forward(*given)) or made[-1]
    )

    def block(x: Tensor) -> Tensor:
        return x + lora_mlp(x.sin(), *arguments(layers), activation="silu", recompute=True)

    wanted = torch.autograd.grad(block(x).square().sum(), [x, *parameters(layers)])
    made.clear()
    y = checkpoint(block, x, use_reentrant=False)
    got = torch.autograd.grad(y.square().sum(), [x, *parameters(layers)])
    assert len(made) == 1
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


def test_a_parameter_that_was_changed_before_the_backward_pass_is_an_error():
    layers = [layer(64, 128, 2), layer(64, 128, 2), layer(128, 64, 2)]
    for recompute in (True, False):
        x = torch.randn(5, 64, requires_grad=True)
        y = lora_mlp(x, *arguments(layers), activation="silu", recompute=recompute)
        with torch.no_grad():
            layers[0].A.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_in_16_bits_the_error_is_no_larger_than_the_twins(dtype, recompute, device, monkeypatch):
    torch.manual_seed(0)
    layers = [
        layer(256, 512, 8, dtype=dtype, device=device),
        layer(256, 512, 8, dtype=dtype, device=device),
        layer(512, 256, 8, dtype=dtype, device=device),
    ]
    monkeypatch.setattr(lora_function, "TILE_BYTES", 100 * 512 * 2)
    x = torch.randn(300, 256, device=device)
    weights = torch.randn(300, 256, device=device)

    def gradients(run: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = x.to(dtype).requires_grad_()
        y = run(inputs)
        return [y.detach(), *torch.autograd.grad((y * weights.to(dtype)).sum(), [inputs, *all_of])]

    all_of = parameters(layers)
    exact = gradients(lambda x: twin_mlp(x, layers, "silu"), torch.float64)
    plain = gradients(lambda x: twin_mlp(x, layers, "silu"), dtype)
    ours = gradients(
        lambda x: lora_mlp(x, *arguments(layers), activation="silu", recompute=recompute), dtype
    )
    for one, other, truth in zip(ours, plain, exact, strict=True):
        errors = [float((found - truth).double().norm()) for found in (one, other)]
        # two draws of the same rounding noise differ by a few per cent
        assert errors[0] <= 1.05 * errors[1]
