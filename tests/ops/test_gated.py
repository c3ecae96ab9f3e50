"""The gated part of an MLP against transformers' activations in float64, twin and kernel alike."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from conftest import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.activations import ACT2FN

from qlora.ops import gated
from qlora.ops.gated import ACTS, gated_backward, gated_forward

THEIRS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a step
# erf and exp of fp32 are good to some 4e-7 of the 1 that they come near to, which is multiplied
# with two or three factors of a size up to 4
ABSOLUTE = 1e-5


def case(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """gate, up and the gradient of h."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) * size for size in (3, 1, 1)]
    return [t.to(device, dtype) for t in made]


def expected(gate: Tensor, up: Tensor, dh: Tensor, act: str) -> list[Tensor]:
    """h, dgate, dup as autograd has them, float64."""
    inputs = [t.detach().double().requires_grad_() for t in (gate, up)]
    h = ACT2FN[THEIRS[act]](inputs[0]) * inputs[1]
    return [h.detach(), *torch.autograd.grad(h, inputs, dh.double())]


def assert_right(got: Tensor, wanted: Tensor, dtype: torch.dtype, steps: float = 1.0) -> None:
    assert (got.dtype, got.shape) == (dtype, wanted.shape)
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), wanted, rtol=steps * ROUNDING[dtype], atol=ABSOLUTE)


@pytest.fixture(params=["plain", "kernel"])
def way(request: pytest.FixtureRequest) -> tuple[Any, Any, float]:
    """Forward, backward, and how many half steps of bf16 they may be off."""
    if request.param == "plain":
        return gated.plain_forward, gated.plain_backward, 1
    pytest.importorskip("triton", reason="Triton is not installed")
    from qlora.ops import kernels as kernel

    # Triton's interpreter cuts bf16 off where a GPU rounds
    return kernel.forward, kernel.backward, 1 if torch.cuda.is_available() else 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_both_ways_equal_autograd_of_transformers(way, dtype, act, device):
    *functions, steps = way
    if functions[0] is not gated.plain_forward and device == "cpu" and torch.cuda.is_available():
        pytest.skip("on a machine with a GPU, the kernel runs there")
    check(*functions, steps, case(3, 50, 11, dtype=dtype, device=device), act)


def check(forward: Any, backward: Any, steps: float, inputs: list[Tensor], act: str) -> None:
    gate, up, dh = inputs
    h, again, dgate, dup = (torch.full_like(gate, torch.nan) for _ in range(4))
    forward(gate, up, h, act)
    backward(gate, up, dh, again, dgate, dup, act)
    wanted = expected(gate, up, dh, act)
    for got, want in zip([h, again, dgate, dup], [wanted[0], *wanted], strict=True):
        assert_right(got, want, gate.dtype, steps)


@settings(deadline=None, max_examples=15)
@given(values=st.integers(1, 2100), act=st.sampled_from(ACTS), chunk=st.integers(1, 900))
def test_any_number_of_values(values, act, chunk):
    ways = [(gated.plain_forward, gated.plain_backward)]
    if not torch.cuda.is_available() and find_spec("triton"):
        from qlora.ops import kernels as kernel

        ways.append((kernel.forward, kernel.backward))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gated.CHUNK, "cpu", chunk)
        for functions in ways:
            check(*functions, 1, case(values), act)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("in_place", [False, True])
def test_the_way_that_is_chosen(in_place, dtype, act, device):
    gate, up, dh = case(2, 9, 64, dtype=dtype, device=device)
    wanted = expected(gate, up, dh, act)
    before = [t.clone() for t in (gate, up, dh)]
    assert_right(gated_forward(gate, up, act), wanted[0], dtype)
    made = gated_backward(gate, up, dh, act, in_place=in_place)
    for got, want in zip(made, wanted, strict=True):
        assert_right(got, want, dtype)
    if in_place:
        assert [t.data_ptr() for t in made] == [t.data_ptr() for t in (dh, gate, up)]
    else:
        assert all(torch.equal(t, b) for t, b in zip((gate, up, dh), before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_halves_of_one_projection(device):
    """As Phi-3 has them: gate and up are views with a row's length between their rows."""
    both, dh = case(5, 64, device=device)[0], case(5, 32, device=device)[2]
    gate, up = both.chunk(2, dim=-1)
    kept = both.clone()
    wanted = expected(gate, up, dh, "silu")
    assert_right(gated_forward(gate, up, "silu"), wanted[0], torch.float32)
    for got, want in zip(gated_backward(gate, up, dh, "silu", in_place=True), wanted, strict=True):
        assert_right(got, want, torch.float32)
    assert torch.equal(both, kept)


def test_a_second_backward_pass_over_overwritten_values_is_refused():
    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
            ctx.save_for_backward(gate, up)
            return gated_forward(gate, up, "silu")

        @staticmethod
        def backward(ctx: Any, dh: Tensor) -> Any:
            return gated_backward(*ctx.saved_tensors, dh.clone(), "silu", in_place=True)[1:]

    gate, up, dh = case(4, 8)
    inputs = gate.clone().requires_grad_(), up.clone().requires_grad_()
    h = Gated.apply(*(t * 1 for t in inputs))
    h.backward(dh, retain_graph=True)
    for got, want in zip(inputs, expected(gate, up, dh, "silu")[1:], strict=True):
        assert_right(got.grad, want, torch.float32)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.backward(dh)


@pytest.mark.parametrize("act", ACTS)
def test_gates_far_out_stay_finite(way, act):
    forward, backward, _ = way
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gate = torch.tensor([-1e4, -100, -20, 0, 20, 100, 1e4], device=device)
    check(forward, backward, 1, [gate, torch.full_like(gate, 1e-2), torch.ones_like(gate)], act)


def test_nothing_of_nothing():
    empty = torch.empty(0, 8)
    assert gated_forward(empty, empty, "silu").shape == (0, 8)
    assert [t.shape for t in gated_backward(empty, empty, empty, "silu")] == [(0, 8)] * 3


def test_float64_stays_exact():
    gate, up, dh = (t.double() for t in case(4, 8))
    for act in ACTS:
        for got, want in zip(
            gated_backward(gate, up, dh, act), expected(gate, up, dh, act), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-15)  # a few steps of fp64


def test_an_unknown_activation():
    gate, up, _ = case(2, 2)
    with pytest.raises(ValueError, match="act must be one of silu, gelu, gelu_tanh, got 'relu'"):
        gated_forward(gate, up, "relu")


@pytest.mark.parametrize("other", [torch.zeros(2, 3), torch.zeros(2, 2).half()])
def test_tensors_that_do_not_belong_together(other):
    gate, up, _ = case(2, 2)
    with pytest.raises(ValueError, match=r"must agree in shape, dtype and device, got \(2, 2\)"):
        gated_backward(gate, up, other, "silu")


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_kernel_that_is_wrong_is_not_used(kernel_device, dtype, monkeypatch, caplog):
    from qlora.ops import kernels as kernel

    monkeypatch.setattr(gated, "usable", lambda device, dtype: True)
    gated.has_kernel.cache_clear()
    assert all(gated.has_kernel(kernel_device, dtype, act) for act in ACTS)
    right = kernel.backward
    monkeypatch.setattr(
        kernel, "backward", lambda g, u, d, h, dg, du, act: right(g, u, d, h, du, dg, act)
    )
    gated.has_kernel.cache_clear()
    assert not gated.has_kernel(kernel_device, dtype, "silu")
    assert "Triton's kernel of silu" in caplog.text
    gated.has_kernel.cache_clear()
