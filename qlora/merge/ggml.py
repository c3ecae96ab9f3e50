"""The bytes of llama.cpp's quantized tensors, of choices on the grids of `qlora.merge.grids`.

A row of a tensor is stored block by block, each the scales first and then the levels' bits, as
ggml-common.h declares them (block_q4_0, block_q4_K, ...). `gguf.dequantize` of the bytes gives the
grid's values, bit for bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qlora.merge.grids import (
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    SUPERBLOCK,
    IntegerGrid,
)

CHUNK = 1 << 22  # values at a time


def to_bytes(grid: IntegerGrid) -> Tensor:
    """The tensor (out, bytes of a row), uint8, of the current choice; the codes of all rows at once
    would take much memory."""
    columns, rows = grid.weight.shape
    step = max(1, CHUNK // columns)
    return torch.cat([_packed(grid.rows(slice(i, i + step))) for i in range(0, rows, step)])


def _packed(grid: IntegerGrid) -> Tensor:
    pack, size = PACKERS[type(grid)]
    columns, rows = grid.weight.shape
    codes = grid.level_indices().to(torch.uint8).T.reshape(rows, columns // size, size)
    packed = pack(grid, codes)  # (out, blocks, bytes)
    return packed.reshape(rows, -1)


def _fp16(values: Tensor) -> Tensor:
    """Values (blocks, out), each exactly an fp16 number, as bytes (out, blocks, 2)."""
    return values.T.reshape(-1).half().view(torch.uint8).view(*values.T.shape, 2)


def _nibbles(codes: Tensor) -> Tensor:
    """4-bit codes (..., 32) -> bytes (..., 16): the first half in the low bits."""
    low, high = codes.chunk(2, dim=-1)
    return low | high << 4


def _q4_0(grid: IntegerGrid, codes: Tensor) -> Tensor:
    return torch.cat([_fp16(grid.scale), _nibbles(codes)], -1)


def _q4_1(grid: IntegerGrid, codes: Tensor) -> Tensor:
    assert grid.shift is not None
    return torch.cat([_fp16(grid.scale), _fp16(grid.shift), _nibbles(codes)], -1)


def _q5_0(grid: IntegerGrid, codes: Tensor) -> Tensor:
    high = _bits((codes >> 4).view(*codes.shape[:2], 4, 8))  # the fifth bits
    return torch.cat([_fp16(grid.scale), high, _nibbles(codes & 15)], -1)


def _q5_1(grid: IntegerGrid, codes: Tensor) -> Tensor:
    assert grid.shift is not None
    high = _bits((codes >> 4).view(*codes.shape[:2], 4, 8))
    return torch.cat([_fp16(grid.scale), _fp16(grid.shift), high, _nibbles(codes & 15)], -1)


def _bits(ones: Tensor) -> Tensor:
    """Eight bits (..., 8) -> a byte (...), the first in the lowest place."""
    return (ones << torch.arange(8, device=ones.device)).sum(-1).to(torch.uint8)


def _q8_0(grid: IntegerGrid, codes: Tensor) -> Tensor:
    signed = (codes.short() + int(grid.levels[0])).to(torch.int8)
    return torch.cat([_fp16(grid.scale), signed.view(torch.uint8)], -1)


def _q4_k(grid: IntegerGrid, codes: Tensor) -> Tensor:
    pairs = codes.view(*codes.shape[:2], 4, 64)
    return torch.cat([_scales(grid), _nibbles(pairs).flatten(2)], -1)


def _q5_k(grid: IntegerGrid, codes: Tensor) -> Tensor:
    pairs = (codes & 15).view(*codes.shape[:2], 4, 64)
    high = _bits((codes >> 4).view(*codes.shape[:2], 8, 32).mT)  # of each place of the 8 blocks
    return torch.cat([_scales(grid), high, _nibbles(pairs).flatten(2)], -1)


def _scales(grid: IntegerGrid) -> Tensor:
    """The two fp16 numbers of each superblock, and what its blocks multiply them with."""
    assert isinstance(grid, Q4_K) and grid.shift is not None
    scale, shift = (
        _multiples(grid, grid.scale, grid.unit),
        _multiples(grid, -grid.shift, grid.shift_unit),
    )
    first, last = slice(0, 4), slice(4, 8)  # of the eight: 6 bits each, in 12 bytes
    packed = [
        scale[..., first] | scale[..., last] >> 4 << 6,
        shift[..., first] | shift[..., last] >> 4 << 6,
        scale[..., last] & 15 | (shift[..., last] & 15) << 4,
    ]
    units = [_fp16(unit[:: SUPERBLOCK // grid.size]) for unit in (grid.unit, grid.shift_unit)]
    return torch.cat([*units, *packed], -1)


def _q6_k(grid: IntegerGrid, codes: Tensor) -> Tensor:
    assert isinstance(grid, Q6_K)
    quarters = codes.view(*codes.shape[:2], 2, 4, 32)  # of each half of a superblock
    low, high = quarters & 15, quarters >> 4
    low = torch.cat([low[..., :2, :].flatten(3) | low[..., 2:, :].flatten(3) << 4], -1).flatten(2)
    high = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    scales = _multiples(grid, grid.scale, grid.unit)
    unit = _fp16(grid.unit[:: SUPERBLOCK // grid.size])
    return torch.cat([low, high.flatten(2), scales, unit], -1)


def _multiples(grid: Q4_K | Q6_K, values: Tensor, unit: Tensor) -> Tensor:
    """What to multiply `unit` with: uint8 (out, superblocks, blocks of one)."""
    whole = (values / unit).nan_to_num(0, 0, 0).round().T
    return whole.to(torch.int8).view(torch.uint8).reshape(len(whole), -1, SUPERBLOCK // grid.size)


Packer = Callable[[IntegerGrid, Tensor], Tensor]
PACKERS: dict[type[IntegerGrid], tuple[Packer, int]] = {  # and how many values are packed together
    Q4_0: (_q4_0, 32),
    Q4_1: (_q4_1, 32),
    Q5_0: (_q5_0, 32),
    Q5_1: (_q5_1, 32),
    Q8_0: (_q8_0, 32),
    Q4_K: (_q4_k, SUPERBLOCK),
    Q5_K: (_q5_k, SUPERBLOCK),
    Q6_K: (_q6_k, SUPERBLOCK),
}
