"""Triton kernels of a gated MLP's elementwise part, and of its gradient; see qlora.gated.

Both gates of the sigmoid kind are g * sigmoid(v), with v = g for SiLU and, since
(1 + tanh u) / 2 = sigmoid(2 u), v = 2 sqrt(2/pi) (g + 0.044715 g^3) for tanh's GELU.

A value is read once and a result written once: 6 bytes a value in bf16 forward, 12 backward, in
accesses of 16 bytes where the number of values is a multiple of 16. That is all such a kernel
costs: the arithmetic hides behind it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values a program: 4 warps, 16 bytes a thread in 16 bits


def forward(gate: Tensor, up: Tensor, h: Tensor, act: str) -> None:
    """h = act(gate) * up, all contiguous, of one shape and dtype on one device."""
    values = gate.numel()
    with torch.cuda.device_of(gate):
        _forward[(triton.cdiv(values, BLOCK),)](gate, up, h, values, act, BLOCK)


def backward(
    gate: Tensor, up: Tensor, dh: Tensor, h: Tensor, dgate: Tensor, dup: Tensor, act: str
) -> None:
    """h and both gradients from that of h. The last three tensors may be the first three's."""
    values = gate.numel()
    with torch.cuda.device_of(gate):
        _backward[(triton.cdiv(values, BLOCK),)](
            gate, up, dh, h, dgate, dup, values, act, BLOCK
        )  # fmt: skip


@triton.jit
def _gate(g, ACT: tl.constexpr):
    """act(g) and its slope, of fp32."""
    if ACT == "gelu":
        below = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        slope = below + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        v = g
        dv = 1.0
        if ACT == "gelu_tanh":
            v = 1.5957691216057308 * (g + 0.044715 * g * g * g)
            dv = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        e = tl.exp(-tl.abs(v))  # never above 1
        below = tl.where(v >= 0, 1.0, e) / (1.0 + e)
        slope = below + g * below * (1.0 - below) * dv
    return g * below, slope


@triton.jit
def _forward(gate, up, h, values, ACT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < values
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    a, _slope = _gate(g, ACT)
    tl.store(h + at, (a * u).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gate, up, dh, h, dgate, dup, values, ACT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < values
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dh + at, mask=inside, other=0.0).to(tl.float32)
    a, slope = _gate(g, ACT)
    tl.store(h + at, (a * u).to(h.dtype.element_ty), mask=inside)
    tl.store(dgate + at, (d * u * slope).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + at, (d * a).to(dup.dtype.element_ty), mask=inside)
