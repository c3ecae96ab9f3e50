"""Triton kernels: decoding 4-bit weights, the elementwise part of a gated MLP, rotary embedding,
and a step of the search for codes.

Importing this module imports Triton: qlora.ops.nf4 and qlora.ops.gated, whose plain-torch functions
are the oracles, do so where they use a kernel. Decoding (layout: see qlora.ops.nf4):

    value = level[code] * absmax          absmax = map[absmax code] * second absmax + offset

Both levels of double quantization are undone in one kernel. Each step is rounded as bitsandbytes
rounds it (hence no fused multiply-add), and the value once, to the output's dtype. Arithmetic would
bound the speed from 18 instructions per value on an H200, and from 24 on an A100. So

- a thread takes groups of 8 values: it loads 4 bytes and stores 16, both next to its neighbours',
  and as each block is a multiple of 8, a group has one absmax;
- it has 4 such groups, whose loads are in flight together;
- the 16 levels lie in shared memory, one per bank, so that a warp looks up any 32 values at once.

Compiled for sm_80 and sm_90 that is 10 instructions per value and 32 registers, which lets all
threads of a multiprocessor run: it should come near the card's copy bandwidth, at 2.52 bytes per
value in bf16. bitsandbytes has three launches, with decoded absmax in between.

Gated MLP (see qlora.ops.gated): both kinds of sigmoid gates are g * sigmoid(v), with v = g for SiLU
and, since (1 + tanh u) / 2 = sigmoid(2 u), v = 2 sqrt(2/pi) (g + 0.044715 g^3) for tanh's GELU.
Each value is read once and each result written once, 6 bytes per value in bf16 forward and 12
backward, in accesses of 16 bytes if their number is a multiple of 16; memory bounds the speed.

Rotary embedding (see qlora.ops.rotary): a program rotates HEADS heads of one token, those of q and
then those of k, so that one launch does both; each value is read and written once.

Search (see qlora.merge.loops, whose `descend` is the oracle): the columns of a block are taken one
after the other, each of them by all rows at once. A program has ROWS rows; their values and
gradients stay in registers, so that a block is one launch, not five a column.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from qlora.ops.rotary import empty_like_heads

GROUPS = 512  # of 8 values, in a program of 128 threads
BLOCK = 1024  # values of a gated program: 4 warps, 16 bytes a thread in 16 bits
HEADS = 8  # of a program of rotary embedding
SEARCHED = 2048  # values of a program of the search


def decode(packed: Tensor, state: Any, out: Tensor) -> None:
    """Write the values of `packed` into `out`, contiguous, bf16, fp16 or fp32, of any shape.

    `state` is bitsandbytes' QuantState, with a power of two from 32 on as its blocksize.
    """
    codes = packed.reshape(-1).view(torch.uint8)  # they may be stored as another dtype
    absmax_map = second = offset = state.code  # not read without double quantization
    if state.nested:
        absmax_map, second, offset = state.state2.code, state.state2.absmax, state.offset
    values = out.numel()
    with torch.cuda.device_of(packed):
        _decode[(triton.cdiv(values, GROUPS * 8),)](
            codes, state.absmax, absmax_map, second, offset, state.code,
            out, values, triton.cdiv(values, 2), state.blocksize, state.nested, GROUPS,
            enable_fp_fusion=False,
        )  # fmt: skip
    _mark_written(out)


def gated_forward(gate: Tensor, up: Tensor, h: Tensor, act: str) -> None:
    """h = act(gate) * up, all contiguous, of one shape and dtype on one device."""
    values, grid = gate.numel(), (triton.cdiv(gate.numel(), BLOCK),)
    with torch.cuda.device_of(gate):
        _gated[grid](gate, up, None, h, None, None, values, act, BLOCK, enable_fp_fusion=True)


def gated_backward(
    gate: Tensor, up: Tensor, dh: Tensor, h: Tensor, dgate: Tensor, dup: Tensor, act: str
) -> None:
    """Writes h, dgate and dup, which may share memory with gate, up and dh."""
    values, grid = gate.numel(), (triton.cdiv(gate.numel(), BLOCK),)
    with torch.cuda.device_of(gate):
        _gated[grid](gate, up, dh, h, dgate, dup, values, act, BLOCK, enable_fp_fusion=True)
    _mark_written(h, dgate, dup)


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backward: bool
) -> tuple[Tensor, Tensor]:
    """q (batch, heads, tokens, dim) and k rotated, with cos and sin (batch or 1, tokens, dim)."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    (batch, q_heads, tokens, dim), k_heads = q.shape, k.shape[1]
    y, z = empty_like_heads(q), empty_like_heads(k)
    groups = triton.cdiv(q_heads, HEADS) + triton.cdiv(k_heads, HEADS)
    with torch.cuda.device_of(q):
        _rotate[(batch * tokens, groups)](
            q, k, cos, sin, y, z, *q.stride()[:3], *k.stride()[:3], tokens, q_heads, k_heads,
            tokens * dim * (len(cos) > 1), dim // 2, triton.next_power_of_2(dim // 2), HEADS,
            backward, enable_fp_fusion=True,
            num_warps=2,  # 16 bytes a thread in 16 bits, of heads of 128 values
        )  # fmt: skip
    return y, z


def descend(
    weight: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    scale: Tensor,
    shift: Tensor,
    codebook: Tensor,
    *,
    integers: bool,
) -> None:
    """Move the values of a block (c, out) to their best levels, column by column, in place.

    `gradient` (c, out), which follows, and `hessian` (c, c): of the cost. A value is level *
    `scale` + `shift`, (out,). `codebook` (n,): the levels there are, sorted, or all `integers`
    between its ends. All fp32 and, except for `hessian`, contiguous.
    """
    (columns, out), width = weight.shape, triton.next_power_of_2(len(weight))
    rows = rows_of(width)
    with torch.cuda.device_of(weight):
        _descend[(triton.cdiv(out, rows),)](
            weight, gradient, hessian, hessian.stride(0), scale, shift, codebook, columns, out,
            codebook.numel(), integers, width, rows, enable_fp_fusion=False,
        )  # fmt: skip


def rows_of(width: int) -> int:
    """Rows of a program of the search with so many columns."""
    return max(16, SEARCHED // width)


def _mark_written(*tensors: Tensor) -> None:
    """Count a change in place, as torch's own operations do: autograd raises on stale values."""
    increment_version([t for t in tensors if not t.is_inference()])


@triton.jit
def _decode(
    packed, absmax, absmax_map, second, offset, levels, out, values, size,
    BLOCKSIZE: tl.constexpr, DOUBLE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * 4 + tl.arange(0, 4)[None, :]  # (groups, 4)
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
    index = tl.reshape(tl.join(byte >> 4, byte & 15), (GROUPS * 8,))  # (groups, 4, 2) -> row
    level = tl.gather(tl.load(levels + tl.arange(0, 16)), index, 0)
    value = tl.reshape(level, (GROUPS, 8)) * scale[:, None]
    to = group[:, None] * 8 + tl.arange(0, 8)[None, :]  # (groups, 8)
    tl.store(out + to, value.to(out.dtype.element_ty), mask=to < values)


@triton.jit
def _act_and_slope(g, ACT: tl.constexpr):
    """act(g) and act'(g), fp32."""
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
def _gated(gate, up, dh, h, dgate, dup, values, ACT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < values
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    if dh is not None:  # before h is written, which may share its memory
        d = tl.load(dh + at, mask=inside, other=0.0).to(tl.float32)
    a, slope = _act_and_slope(g, ACT)
    tl.store(h + at, (a * u).to(h.dtype.element_ty), mask=inside)
    if dh is not None:
        tl.store(dgate + at, (d * u * slope).to(dgate.dtype.element_ty), mask=inside)
        tl.store(dup + at, (d * a).to(dup.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    q, k, cos, sin, y, z, q_batch, q_head, q_token, k_batch, k_head, k_token, tokens, q_heads,
    k_heads, cos_batch, half, HALF: tl.constexpr, HEADS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    group = tl.program_id(1)
    q_groups = tl.cdiv(q_heads, HEADS)
    i = tl.arange(0, HALF)
    inside = i < half
    angle = batch * cos_batch + token * 2 * half + i
    c1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        s1, s2 = -s2, -s1
    if group < q_groups:
        head = group * HEADS + tl.arange(0, HEADS)
        source = q + batch * q_batch + token * q_token + head * q_head
        _rotate_heads(source, y + row * q_heads * 2 * half, head, q_heads, i, half, c1, c2, s1, s2)
    else:
        head = (group - q_groups) * HEADS + tl.arange(0, HEADS)
        source = k + batch * k_batch + token * k_token + head * k_head
        _rotate_heads(source, z + row * k_heads * 2 * half, head, k_heads, i, half, c1, c2, s1, s2)


@triton.jit
def _rotate_heads(source, target, head, heads, i, half, c1, c2, s1, s2):
    """The heads of one token, of addresses `source` (HEADS,), to `target`, where they are dense."""
    inside = (head < heads)[:, None] & (i < half)[None, :]
    x1 = tl.load(source[:, None] + i[None, :], mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source[:, None] + i[None, :] + half, mask=inside, other=0.0).to(tl.float32)
    to = target + head[:, None] * 2 * half + i[None, :]
    y1 = x1 * c1[None, :] - x2 * s1[None, :]
    y2 = x2 * c2[None, :] + x1 * s2[None, :]
    tl.store(to, y1.to(target.dtype.element_ty), mask=inside)
    tl.store(to + half, y2.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _descend(
    weight, gradient, hessian, stride, scale, shift, codebook, columns, out,
    LEVELS: tl.constexpr, INTEGERS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    TINY: tl.constexpr = 1.1754943508222875e-38  # 2^-126; a number below it, Triton takes as fp64
    i = tl.arange(0, COLUMNS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (i < columns)[:, None] & (row < out)[None, :]
    at = i[:, None] * out + row[None, :]
    value = tl.load(weight + at, mask=inside, other=0.0)  # (columns, rows)
    slope = tl.load(gradient + at, mask=inside, other=0.0)
    unit = tl.load(scale + row, mask=row < out, other=0.0)
    zero = tl.load(shift + row, mask=row < out, other=0.0)
    moves = tl.abs(unit) >= TINY
    levels_per = tl.where(moves, 1.0 / tl.where(moves, unit, 1.0), 0.0)
    least, most = tl.load(codebook), tl.load(codebook + LEVELS - 1)
    for j in range(0, columns):
        this = (i == j)[:, None]
        current = tl.sum(tl.where(this, value, 0.0), 0)  # (rows,)
        curvature = tl.load(hessian + j * stride + j)
        inverse = 1.0 / tl.maximum(curvature, TINY)
        ideal = current - tl.sum(tl.where(this, slope, 0.0), 0) * inverse
        ideal = (ideal - zero) * levels_per
        if INTEGERS:
            best = tl.minimum(tl.maximum(ideal, least), most)
            best = (best + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to even
        else:
            best = tl.full((ROWS,), 0.0, tl.float32) + least
            below = least
            for k in tl.static_range(1, LEVELS):
                next = tl.load(codebook + k)
                best = tl.where(ideal > (next + below) / 2, next, best)
                below = next
        best = best * unit + zero
        pull = tl.load(hessian + i * stride + j, mask=i < columns, other=0.0)
        slope += pull[:, None] * (best - current)[None, :]
        value = tl.where(this, best[None, :], value)
    tl.store(weight + at, value, mask=inside)
    tl.store(gradient + at, slope, mask=inside)
