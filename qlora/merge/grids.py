"""The values that quantized weights can have: what `qlora.merge.codes` chooses from.

In all formats a row of a weight is cut into blocks, and a value is level * scale + shift: a level
of a few for each value, a scale and perhaps a shift for each block. They differ in the levels, in
the size of a block, and in how scale and shift are stored:

    format     levels          block  scale                 shift                  bits
    NF4, FP4   16, a codebook  any    fp32, or 8 of fp32    -                      4.13
    Q4_0       -8 ... 7        32     fp16                  -                      4.5
    Q5_0       -16 ... 15      32     fp16                  -                      5.5
    Q8_0       -127 ... 127    32     fp16                  -                      8.5
    Q4_1       0 ... 15        32     fp16                  fp16                   5
    Q5_1       0 ... 31        32     fp16                  fp16                   6
    Q4_K       0 ... 15        32     6 bits times fp16     6 bits times -fp16     4.5
    Q5_K       0 ... 31        32     6 bits times fp16     6 bits times -fp16     5.5
    Q6_K       -32 ... 31      16     8 bits times fp16     -                      6.56
    int4       -8 ... 7        128    16 bits               -, or -8 ... 7 scales  4.13

"n bits times fp16" is an integer times an fp16 number that a superblock of 256 values shares. A
grid keeps these second-level scales as they were at the start.

Q...: llama.cpp's (ggml-quants.c; qlora.merge.ggml has the bytes). int4: pack-quantized, of
compressed-tensors. All tensors are transposed, (in, out), fp32, on one device.
"""

from copy import copy
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from qlora.ops import nf4
from qlora.ops.nf4 import Quantized

TINY = torch.finfo(torch.float32).tiny
SUPERBLOCK = 256
OF_ROWS = {"weight", "scale", "shift", "unit", "shift_unit"}  # (..., out), of an IntegerGrid


class Choice(NamedTuple):
    """A weight on the grid: values (in, out), scale and shift (blocks of a column, out)."""

    weight: Tensor
    scale: Tensor
    shift: Tensor | None = None


class Grid:
    """The values that a weight can have, and the current choice among them."""

    moves = True  # whether scales can change

    def __init__(self, levels: Tensor, block: int, choice: Choice) -> None:
        self.levels, self.block = levels, block
        self.bounds = (levels[1:] + levels[:-1]) / 2
        self.weight, self.scale, self.shift = choice

    def nearest(
        self, block: int | slice, scale: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The scale and shift, (out,) or (blocks, out), nearest to these that can be stored."""
        raise NotImplementedError

    def snap(self, ideal: Tensor) -> Tensor:
        """The level nearest to each value, in units of scale."""
        return self.levels[torch.bucketize(ideal, self.bounds)]

    def choice(self) -> Choice:
        """A copy of the current choice."""
        shift = None if self.shift is None else self.shift.clone()
        return Choice(self.weight.clone(), self.scale.clone(), shift)

    def restore(self, choice: Choice) -> None:
        """Take back an earlier choice."""
        self.weight, self.scale, self.shift = choice

    def level_indices(self) -> Tensor:
        """The index of each value's level (in, out), int64."""
        scale = self.scale.repeat_interleave(self.block, 0)
        shift = 0 if self.shift is None else self.shift.repeat_interleave(self.block, 0)
        return torch.bucketize(((self.weight - shift) / scale).nan_to_num(), self.bounds)


# ---- bitsandbytes ----


class NF4Grid(Grid):
    """A 4-bit weight of bitsandbytes, NF4 or FP4. Scales are its absmax. Where a block crosses rows
    they stay as they are, and each value has a block of its own here."""

    def __init__(self, start: Quantized) -> None:
        packed, self.state = start
        rows, columns = self.state.shape
        levels, order = nf4.codebook(self.state.quant_type).to(packed.device).sort(stable=True)
        self.order = order.to(torch.uint8)  # the code of each level
        self.moves = columns % self.state.blocksize == 0
        absmax = nf4.absmax(start)
        if not self.moves:
            absmax = absmax.repeat_interleave(self.state.blocksize)[: rows * columns]
        elif self.state.nested:
            second = self.state.state2  # the absmax of absmax, (blocks of a row, out)
            each = second.absmax.repeat_interleave(second.blocksize)[: len(absmax)]
            self.second = each.view(rows, -1).T.contiguous()
        scale = absmax.view(rows, -1).T.contiguous()
        weight = nf4.dequantize(start).T.contiguous()
        super().__init__(levels, self.state.blocksize if self.moves else 1, Choice(weight, scale))

    def nearest(
        self, block: int | slice, scale: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, None]:
        if not self.state.nested:
            return scale, None
        code = self._encode(scale, self.second[block])
        return self.state.state2.code[code] * self.second[block] + self.state.offset, None

    def _encode(self, absmax: Tensor, second: Tensor) -> Tensor:
        """8-bit codes of absmax."""
        levels = self.state.state2.code
        bounds = (levels[1:] + levels[:-1]) / 2
        return torch.bucketize((absmax - self.state.offset) / second.clamp_min(TINY), bounds)

    def quantized(self) -> Quantized:
        """The 4-bit weight of the current choice."""
        codes = self.order[self.level_indices()].T.reshape(-1)  # (in, out) -> (out * in,)
        packed = (codes[::2] << 4 | codes[1::2]).view(-1, 1)  # two a byte, first in the high half
        state = copy(self.state)
        if self.moves and self.state.nested:
            state.absmax = self._encode(self.scale, self.second).T.to(torch.uint8).reshape(-1)
        elif self.moves:
            state.absmax = self.scale.T.reshape(-1)
        return Quantized(packed, state)


# ---- integers ----


class IntegerGrid(Grid):
    """Integers from `low` to `high` as levels; starts with the levels nearest to `target`."""

    low: ClassVar[int]
    high: ClassVar[int]
    size: ClassVar[int] = 32  # of a block

    def __init__(self, target: Tensor) -> None:
        blocks = target.view(-1, self.size, target.shape[1])  # (blocks, size, out)
        scale, shift = self.start(blocks)
        levels = torch.arange(self.low, self.high + 1.0, device=target.device)
        super().__init__(levels, self.size, Choice(target, scale, shift))
        weight = self._levels().mul_(scale[:, None])
        self.weight = (weight if shift is None else weight.add_(shift[:, None])).view_as(target)

    def _levels(self) -> Tensor:
        """The level nearest to each value (blocks, size, out), in units of scale."""
        blocks = self.weight.view(-1, self.size, self.weight.shape[1])
        blocks = blocks if self.shift is None else blocks - self.shift[:, None]
        return self.snap((blocks / self.scale[:, None]).nan_to_num_())

    def level_indices(self) -> Tensor:
        return self._levels().sub_(self.low).view_as(self.weight).long()

    def start(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and shift (blocks, out), as they are stored, of rounding to nearest."""
        raise NotImplementedError

    def rows(self, rows: Tensor | slice) -> Self:
        """A grid of these rows of the weight alone; of indices, a copy."""
        part = copy(self)
        for name in OF_ROWS & vars(self).keys():
            values = getattr(self, name)
            setattr(part, name, None if values is None else values[:, rows])
        return part

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        """One grid of all rows of `parts`, which is emptied."""
        whole = copy(parts[0])
        for name in OF_ROWS & vars(whole).keys():
            if getattr(whole, name) is not None:
                setattr(whole, name, torch.cat([vars(part).pop(name) for part in parts], 1))
        return whole

    def put(self, rows: Tensor, part: Self) -> None:
        """Take the choice of `rows` back."""
        self.weight[:, rows], self.scale[:, rows] = part.weight, part.scale
        if self.shift is not None and part.shift is not None:
            self.shift[:, rows] = part.shift

    def snap(self, ideal: Tensor) -> Tensor:
        return ideal.round().clamp_(self.low, self.high)


class Symmetric(IntegerGrid):
    """One fp16 scale a block. The largest value has the level `low`, whatever its sign."""

    def start(self, blocks: Tensor) -> tuple[Tensor, None]:
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))[:, 0]
        return half(largest / self.low), None

    def nearest(
        self, block: int | slice, scale: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, None]:
        return half(scale), None


class Q4_0(Symmetric):
    """4.5 bits a value."""

    low, high = -8, 7


class Q5_0(Symmetric):
    """5.5 bits a value."""

    low, high = -16, 15


class Q8_0(Symmetric):
    """8.5 bits a value."""

    low, high = -127, 127

    def start(self, blocks: Tensor) -> tuple[Tensor, None]:
        return half(blocks.abs().amax(1) / self.high), None


class Q4_1(IntegerGrid):
    """An fp16 scale and the least value, in fp16."""

    low, high = 0, 15

    def start(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(blocks, dim=1)
        return half((high - low) / self.high), half(low)

    def nearest(
        self, block: int | slice, scale: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert shift is not None
        return half(scale), half(shift)


class Q5_1(Q4_1):
    """6 bits a value."""

    low, high = 0, 31


class Q4_K(IntegerGrid):
    """6-bit multiples of two fp16 numbers that a superblock shares; shifts are not positive."""

    low, high, most = 0, 15, 63

    def start(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(blocks, dim=1)
        low = low.clamp_max(0)
        scale, self.unit = self._multiples((high - low) / self.high)
        shift, self.shift_unit = self._multiples(-low)
        return scale, -shift

    def _multiples(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values (blocks, out) as multiples of a unit, which is returned too, (blocks, out)."""
        per = SUPERBLOCK // self.size
        unit = half(values.view(-1, per, values.shape[1]).amax(1) / self.most)
        unit = unit.repeat_interleave(per, 0)
        return self._times(values, unit), unit

    def _times(self, values: Tensor, unit: Tensor) -> Tensor:
        return (values / unit).nan_to_num(0, 0, 0).round().clamp_(0, self.most) * unit

    def nearest(
        self, block: int | slice, scale: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert shift is not None
        return self._times(scale, self.unit[block]), -self._times(-shift, self.shift_unit[block])


class Q5_K(Q4_K):
    """5.5 bits a value."""

    low, high, most = 0, 31, 63


class Q6_K(IntegerGrid):
    """Signed 8-bit multiples of an fp16 number that a superblock shares."""

    low, high, size = -32, 31, 16

    def start(self, blocks: Tensor) -> tuple[Tensor, None]:
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))[:, 0] / self.low
        per = SUPERBLOCK // self.size
        superblocks = largest.view(-1, per, largest.shape[1])
        self.unit = half(superblocks.abs().amax(1) / 127).repeat_interleave(per, 0)
        return self._times(largest, self.unit), None

    def _times(self, values: Tensor, unit: Tensor) -> Tensor:
        return (values / unit).nan_to_num(0, 0, 0).round().clamp_(-128, 127) * unit

    def nearest(
        self, block: int | slice, scale: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, None]:
        return self._times(scale, self.unit[block]), None


class Int4(IntegerGrid):
    """A bf16 scale for 128 values, symmetric."""

    low, high, size = -8, 7, 128

    def start(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        return bfloat(blocks.abs().amax(1) / 7.5), None  # as compressed-tensors' observers do

    def nearest(
        self, block: int | slice, scale: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return bfloat(scale), None


class Int4ZeroPoint(Int4):
    """A bf16 scale and a level for zero, -8 ... 7, for 128 values."""

    def start(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(blocks, dim=1)
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = bfloat((high - low) / 15)
        return self._stored(scale, low - self.low * scale)

    def _stored(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        zero = (-shift / scale).nan_to_num(0, 0, 0).round().clamp_(self.low, self.high)
        return scale, -zero * scale

    def nearest(
        self, block: int | slice, scale: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert shift is not None
        return self._stored(bfloat(scale), shift)


def half(values: Tensor) -> Tensor:
    """Rounded to fp16, as fp32."""
    return values.clamp(-65504, 65504).half().float()


def bfloat(values: Tensor) -> Tensor:
    """Rounded to bf16, as fp32."""
    return values.bfloat16().float()
