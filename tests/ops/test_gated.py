"""The gated part of an MLP against transformers' activations in float64: torch's and Triton's."""

from importlib.util import find_spec
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import DEVICES, axis
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.activations import ACT2FN

from qlora.ops import gated
from qlora.ops.gated import ACTS, gated_backward, gated_forward

# half a step of 16 bits; of fp32 a few: exp and the products after it each round once
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-21, torch.float16: 2.0**-11}
# erf and exp of fp32 are good to some 4e-7 of the 1 that they come near to, which is multiplied
# with two or three factors of a size up to 4
ABSOLUTE = 1e-5


def case(*shape: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> list[Tensor]:
    """gate, up and the gradient of h."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) * size for size in (3, 1, 1)]
    return [t.to(device, dtype) for t in tensors]


def expected(gate: Tensor, up: Tensor, dh: Tensor, act: str) -> list[Tensor]:
    """h, dgate, dup as autograd has them, float64."""
    inputs = [t.detach().double().requires_grad_() for t in (gate, up)]
    h = ACT2FN["gelu_pytorch_tanh" if act == "gelu_tanh" else act](inputs[0]) * inputs[1]
    return [h.detach(), *torch.autograd.grad(h, inputs, dh.double())]


def assert_right(values: Any, exact: Any, dtype: torch.dtype, steps: float = 1.0) -> None:
    for value, wide in zip(values, exact, strict=True):
        assert (value.dtype, value.shape) == (dtype, wide.shape)
        assert value.is_contiguous()
        rtol = steps * ROUNDING[dtype]
        torch.testing.assert_close(value.double(), wide, rtol=rtol, atol=ABSOLUTE)


def check(inputs: list[Tensor], act: str, *, triton: bool = False) -> None:
    functions, steps = (gated.plain_forward, gated.plain_backward), 1
    if triton:
        from qlora.ops import kernels

        functions = kernels.gated_forward, kernels.gated_backward
        steps = 1 if torch.cuda.is_available() else 2  # Triton's interpreter cuts bf16 off
    outputs = [torch.full_like(inputs[0], torch.nan) for _ in range(4)]
    functions[0](*inputs[:2], outputs[0], act)
    functions[1](*inputs, *outputs[1:], act)
    exact = expected(*inputs, act)
    assert_right(outputs, [exact[0], *exact], inputs[0].dtype, steps)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", axis(*ROUNDING))
def test_kernel_and_torch_equal_autograd_of_transformers(kernel_device, dtype, act):
    gate = torch.tensor([-1e4, -100, -20, 0, 20, 100, 1e4], dtype=dtype, device=kernel_device)
    large = [gate, torch.full_like(gate, 1e-2), torch.ones_like(gate)]
    for inputs in (case(3, 50, 11, dtype=dtype, device=kernel_device), large):
        for triton in (False, True):
            check(inputs, act, triton=triton)


@settings(deadline=None, max_examples=15)
@given(values=st.integers(1, 2100), act=st.sampled_from(ACTS), chunk=st.integers(1, 900))
def test_any_number_of_values(values, act, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gated.CHUNK, "cpu", chunk)
        check(case(values), act)
    if not torch.cuda.is_available() and find_spec("triton"):
        check(case(values), act, triton=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", axis(*ROUNDING))
@pytest.mark.parametrize("how", ["new", "in place", "in place from views"])
@pytest.mark.parametrize("act", ACTS)
def test_forward_and_backward_as_they_are_called(act, how, dtype, device):
    gate, up, dh = case(2, 9, 64, dtype=dtype, device=device)
    if "views" in how:  # as Phi-3 has them, halves of one projection; they are copied
        gate, up = torch.cat([gate, up], dim=-1).chunk(2, dim=-1)
    exact = expected(gate, up, dh, act)
    kept = [] if how == "in place" else [gate, up, dh] if how == "new" else [gate, up]
    before = [t.clone() for t in kept]
    product = torch.ones_like(up, requires_grad=True) * up  # saves up
    assert_right([gated_forward(gate, up, act)], exact[:1], dtype)
    outputs = gated_backward(gate, up, dh, act, in_place="in place" in how)
    assert_right(outputs, exact, dtype)
    assert all(torch.equal(t, b) for t, b in zip(kept, before, strict=True))
    if how == "in place":
        assert [t.data_ptr() for t in outputs] == [t.data_ptr() for t in (dh, gate, up)]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


@pytest.mark.parametrize("act", ACTS)
def test_float64_stays_exact_and_no_values_are_no_error(act):
    inputs = [t.double() for t in case(4, 8)]
    outputs = list(gated_backward(*inputs, act))
    torch.testing.assert_close(outputs, expected(*inputs, act), rtol=1e-14, atol=1e-15)  # some eps
    none = [t[:0] for t in inputs]
    assert gated_forward(*none[:2], act).shape == (0, 8)
    assert [t.shape for t in gated_backward(*none, act)] == [(0, 8)] * 3


def test_arguments_that_are_refused():
    gate, up, dh = case(2, 2)
    with pytest.raises(ValueError, match="act must be one of silu, gelu, gelu_tanh, got 'relu'"):
        gated_forward(gate, up, "relu")
    for other in (torch.zeros(2, 3), dh.half()):
        with pytest.raises(ValueError, match=r"in shape, dtype and device, got \(2, 2\)"):
            gated_backward(gate, up, other, "silu")


@pytest.mark.parametrize("dtype", axis(*ROUNDING))
def test_a_kernel_that_is_wrong_or_does_not_run_is_not_used(
    kernel_device, dtype, monkeypatch, caplog
):
    from qlora.ops import kernels

    def short(*tensors: Any) -> None:
        right(*(t[:-3] for t in tensors[:-1]), tensors[-1])
        for written in tensors[3:-1]:
            written[-3:] = 0  # the last block, which is not full

    def works() -> list[bool]:
        gated.implementation.cache_clear()
        used = [gated.implementation(kernel_device, dtype, act) for act in (*ACTS, "silu")]
        return [forward is kernels.gated_forward for forward, _ in used]

    right, broken = kernels.gated_backward, Mock(side_effect=RuntimeError("no C compiler"))
    assert any(works()) == (kernel_device.type == "cuda")  # the interpreter is not for a CPU
    monkeypatch.setattr(gated, "may_use_triton", lambda *_: True)
    assert all(works()) and not caplog.records
    for function, reason in (short, "off by"), (broken, "no C compiler"):
        caplog.clear()
        monkeypatch.setattr(kernels, "gated_backward", function)
        assert not any(works())
        assert len(caplog.records) == len(ACTS)  # each is reported once
        assert "Triton's kernel of silu" in caplog.text and reason in caplog.text
    gated.implementation.cache_clear()
