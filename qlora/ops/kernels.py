"""Triton kernels that decode 4-bit weights of bitsandbytes' layout; see qlora.ops.nf4 for the
layout.

    value = level[code] * absmax          absmax = map[absmax code] * second absmax + offset

Both levels of the double quantization are undone in the one kernel. Each step is rounded as
bitsandbytes rounds it (hence no fused multiply-add), and the value once, to the output's dtype.

What decides the design: a byte of codes becomes four bytes of bf16, and memory must not wait for
arithmetic. From 18 instructions a value on, an H200's would; from 24 on, an A100's. So

- a thread takes groups of 8 values: it loads 4 bytes and stores 16, both side by side with its
  neighbours', and as every block is a multiple of 8, a group has one absmax;
- it has 4 groups of its own, whose loads are under way together;
- the 16 levels lie in shared memory, each in a bank of its own, so that a warp looks up 32 values
  at once, whatever they are.

Compiled for sm_80 and sm_90 that is 10 instructions a value and 32 registers, so that all threads
of a multiprocessor can run: it should come near to the card's copy bandwidth, at 2.52 bytes a value
in bf16. A tree of selections, which needs no table, takes 20 instructions; a table that is read
through the first-level cache takes 12, for its 64-bit addresses. bitsandbytes has three launches,
and writes the decoded absmax, 4 bytes a block, in between.

`product` multiplies with a weight that is decoded on the way and nowhere stored: 0.52 bytes of
memory a value, where decoding first and reading again takes 4.52. Then arithmetic is what it waits
for, so it is meant for few tokens. It has no gradient.

Triton kernels of a gated MLP's elementwise part, and of its gradient; see qlora.ops.gated.

Both gates of the sigmoid kind are g * sigmoid(v), with v = g for SiLU and, since
(1 + tanh u) / 2 = sigmoid(2 u), v = 2 sqrt(2/pi) (g + 0.044715 g^3) for tanh's GELU.

A value is read once and a result written once: 6 bytes a value in bf16 forward, 12 backward, in
accesses of 16 bytes where the number of values is a multiple of 16. That is all such a kernel
costs: the arithmetic hides behind it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUPS = 512  # of 8 values a program of 128 threads
WAVES = 4  # programs that a product is cut into, for each multiprocessor, at least
MOST_TOKENS = 64  # of a program of `product`


def decode(packed: Tensor, state: Any, out: Tensor) -> None:
    """The values of `packed` into `out`, of their number in any shape, contiguous, bf16/fp16/fp32.

    Args:
        packed: bytes with two indices each, the first in the high nibble.
        state: bitsandbytes' QuantState; its blocksize is a power of two from 32 on.
    """
    values = out.numel()
    with torch.cuda.device_of(packed):
        _decode[(triton.cdiv(values, GROUPS * 8),)](
            *_sources(packed, state), out, values, triton.cdiv(values, 2),
            state.blocksize, state.nested, GROUPS,
            enable_fp_fusion=False,
        )  # fmt: skip


def product(x: Tensor, packed: Tensor, state: Any) -> Tensor:
    """x (tokens, in) times the transposed weight (out, in), as `decode` to x's dtype and a product.

    Raises:
        ValueError: `in` is no multiple of 8.
    """
    out_features, in_features = state.shape
    if in_features % 8:
        raise ValueError(f"in_features must be a multiple of 8, got {in_features}")
    x, tokens = x.contiguous(), len(x)
    if tokens <= 8:
        kernel: Any = _few
        at_once = triton.next_power_of_2(tokens)
        rows, groups = 4, 128 // at_once if at_once < 4 else 32
    else:
        kernel = _some
        at_once = min(MOST_TOKENS, max(16, triton.next_power_of_2(tokens)))
        rows, groups = 32, 16
    programs = triton.cdiv(out_features, rows), 1, triton.cdiv(tokens, at_once)
    steps = triton.cdiv(in_features, groups * 8)
    parts = min(steps, max(1, WAVES * _multiprocessors(x.device) // programs[0]))
    steps = triton.cdiv(steps, parts)
    dtype = x.dtype if parts == 1 else torch.float32
    made = torch.empty(parts, tokens, out_features, dtype=dtype, device=x.device)
    values = out_features * in_features
    with torch.cuda.device_of(x):
        kernel[(programs[0], parts, programs[2])](
            x, *_sources(packed, state), made,
            tokens, out_features, in_features, values, triton.cdiv(values, 2),
            state.blocksize, state.nested, at_once, rows, groups, steps,
        )  # fmt: skip
    return made[0] if parts == 1 else made.sum(0).to(x.dtype)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _sources(packed: Tensor, state: Any) -> tuple[Tensor, ...]:
    """packed, absmax, and map, second absmax, offset of double quantization; the 16 levels."""
    packed = packed.reshape(-1).view(torch.uint8)  # codes may be stored as another dtype
    code = state.code
    if not state.nested:
        return packed, state.absmax, code, code, code, code  # three that are not read
    return packed, state.absmax, state.state2.code, state.state2.absmax, state.offset, code


@triton.jit
def _values(
    group, packed, absmax, absmax_map, second, offset, levels, values, size,
    BLOCKSIZE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """The 8 values of each group, (groups, 8), fp32; past the end of the weight, anything."""
    at = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    byte = tl.load(packed + at, mask=at < size, other=0).to(tl.int32)
    block = group * 8 // BLOCKSIZE
    inside = group * 8 < values
    if DOUBLE:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        first = tl.load(absmax_map + code, mask=inside, other=0.0)
        # 256: there is no other second blocksize
        scale = first * tl.load(second + block // 256, mask=inside, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    index = tl.reshape(tl.join(byte >> 4, byte & 15), (group.shape[0] * 8,))
    level = tl.gather(tl.load(levels + tl.arange(0, 16)), index, 0)
    return tl.reshape(level, (group.shape[0], 8)) * scale[:, None]


@triton.jit
def _decode(
    packed, absmax, absmax_map, second, offset, levels, out, values, size,
    BLOCKSIZE: tl.constexpr, DOUBLE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    value = _values(
        group, packed, absmax, absmax_map, second, offset, levels, values, size, BLOCKSIZE, DOUBLE
    )
    to = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + to, value.to(out.dtype.element_ty), mask=to < values)


@triton.jit
def _few(
    x, packed, absmax, absmax_map, second, offset, levels, out,
    tokens, out_features, in_features, values, size,
    BLOCKSIZE: tl.constexpr, DOUBLE: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Some rows of W times all of up to 8 tokens, each thread over groups of its own until the end:
    x is loaded as the values lie, and nothing moves between threads before."""
    which = tl.arange(0, ROWS * GROUPS)
    row_start = (tl.program_id(0) * ROWS + which // GROUPS).to(tl.int64) * (in_features // 8)
    part = tl.program_id(1)
    token = tl.arange(0, TOKENS)[:, None, None]
    total = tl.zeros((TOKENS, ROWS * GROUPS, 8), tl.float32)
    for i in range(STEPS):
        group = (part * STEPS + i) * GROUPS + which % GROUPS
        value = _values(
            row_start + group, packed, absmax, absmax_map, second, offset, levels, values, size,
            BLOCKSIZE, DOUBLE,
        )  # fmt: skip
        column = group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
        inside = (token < tokens) & (column < in_features)
        # 0 past the end of a row, where `value` is the next row's
        seen = tl.load(x + token * in_features + column, mask=inside, other=0.0).to(tl.float32)
        total += seen * value.to(x.dtype.element_ty).to(tl.float32)[None, :, :]
    made = tl.sum(tl.reshape(total, (TOKENS, ROWS, GROUPS * 8)), 2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _store(made, out, part, tl.arange(0, TOKENS), row, tokens, out_features)


@triton.jit
def _some(
    x, packed, absmax, absmax_map, second, offset, levels, out,
    tokens, out_features, in_features, values, size,
    BLOCKSIZE: tl.constexpr, DOUBLE: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Some rows of W times 16 tokens or more, by tensor cores."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_start = row.to(tl.int64) * (in_features // 8)
    part = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for i in range(STEPS):
        step = part * STEPS + i
        group = row_start[:, None] + (step * GROUPS + tl.arange(0, GROUPS))[None, :]
        value = _values(
            tl.reshape(group, (ROWS * GROUPS,)), packed, absmax, absmax_map, second, offset,
            levels, values, size, BLOCKSIZE, DOUBLE,
        )  # fmt: skip
        weight = tl.reshape(value, (ROWS, GROUPS * 8)).to(x.dtype.element_ty)
        column = step * GROUPS * 8 + tl.arange(0, GROUPS * 8)
        inside = (token < tokens)[:, None] & (column < in_features)[None, :]
        # 0 past the end of a row, where `weight` is the next row's
        seen = tl.load(x + token[:, None] * in_features + column[None, :], mask=inside, other=0.0)
        total = tl.dot(seen, tl.trans(weight), total, input_precision="ieee")
    _store(total, out, part, token, row, tokens, out_features)


@triton.jit
def _store(total, out, part, token, row, tokens, out_features):
    """(tokens, rows) of one part of the sum."""
    to = (part * tokens + token).to(tl.int64)[:, None] * out_features + row[None, :]
    known = (token < tokens)[:, None] & (row < out_features)[None, :]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=known)


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
