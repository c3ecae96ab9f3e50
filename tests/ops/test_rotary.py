"""Rotary embedding of q and k in one operation, against transformers' own and float64."""

import pytest
import torch
from conftest import DEVICES, axis
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qlora.ops import relative_error, rotary
from qlora.ops.rotary import plain, rotate

# batch, heads of q and of k, tokens, dim; whether positions differ between rows
SHAPES = [(2, 4, 2, 5, 16, True), (1, 9, 3, 33, 64, False), (3, 5, 5, 7, 80, False)]


def case(shape, dtype=torch.float32, device="cpu") -> list[Tensor]:
    """q and k as models have them, transposed, and cosines and sines with unlike halves."""
    batch, q_heads, k_heads, tokens, dim, differ = shape
    draw = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(batch, tokens, heads, dim, generator=draw).to(device, dtype).transpose(1, 2)
        for heads in (q_heads, k_heads)
    )
    angles = torch.randn(batch if differ else 1, tokens, dim, generator=draw)
    cos, sin = (x.to(device, dtype) for x in (angles.cos(), angles.sin()))
    return [q.requires_grad_(), k.requires_grad_(), cos, sin]


def values_and_gradients(function, q, k, cos, sin) -> list[Tensor]:
    outputs = function(q, k, cos, sin)
    weights = [torch.arange(y.numel(), device=y.device).view_as(y).cos().to(y) for y in outputs]
    total = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return [*(y.detach() for y in outputs), *torch.autograd.grad(total, (q, k))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", axis(torch.float32, torch.bfloat16, torch.float16))
def test_values_and_gradients(shape, dtype, device):
    inputs = case(shape, dtype, device)
    in_fp64 = [x.detach().double().requires_grad_() for x in inputs]
    exact = values_and_gradients(apply_rotary_pos_emb, *in_fp64)
    error = relative_error(values_and_gradients(rotate, *inputs), exact)
    own = relative_error(values_and_gradients(apply_rotary_pos_emb, *inputs), exact)
    assert error <= max(own, torch.finfo(dtype).eps)
    if device == "cpu":
        theirs = values_and_gradients(apply_rotary_pos_emb, *inputs)
        assert all(map(torch.equal, values_and_gradients(rotate, *inputs), theirs))


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_the_plain_function(kernel_device, shape):
    from qlora.ops import kernels

    q, k, cos, sin = (x.detach() for x in case(shape, device=str(kernel_device)))
    for strided in (q, q.contiguous(), q.transpose(-1, -2).contiguous().transpose(-1, -2)):
        for backward in (False, True):
            ours = kernels.rotate(strided, k, cos, sin, backward=backward)
            assert relative_error(ours, plain(q, k, cos, sin, backward=backward)) < 1e-6
            assert all(y.transpose(1, 2).is_contiguous() for y in ours)


def test_only_cosines_and_sines_are_saved():
    q, k, cos, sin = case(SHAPES[0])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        rotate(q, k, cos, sin)
    assert [x.data_ptr() for x in saved] == [cos.data_ptr(), sin.data_ptr()]


def test_a_kernel_that_differs_is_not_used(kernel_device, monkeypatch, caplog):
    from qlora.ops import kernels

    monkeypatch.setattr(rotary, "may_use_triton", lambda *_: True)
    for kernel, is_right in ((kernels.rotate, True), (lambda *a, **k: (a[0], a[1]), False)):
        monkeypatch.setattr(kernels, "rotate", kernel)
        rotary.implementation.cache_clear()
        used = rotary.implementation(kernel_device, torch.float32)
        assert used is (kernel if is_right else plain)
    rotary.implementation.cache_clear()
    assert "Triton's rotary embedding in torch.float32" in caplog.text
