"""A weight with its adapter folded in, in the format it is to be kept in.

    16 or 32 bits    base + scaling * B A, in fp32, and one cast
    4 bits           codes that act like base + scaling * B A

Rounding to the nearest code loses the adapter where the base lies on the 4-bit grid itself, as the
base of QLoRA does. With the layer's input moments the codes are chosen so that it survives
(qlora.merge.codes). Without them, but with the weights from before quantization, those plus the
adapter are rounded: what quantization had taken off them dithers the adapter's small change.

Choose 4-bit codes so that an adapter survives them.

The weights an adapter was trained on lie exactly on the 4-bit grid, and its change is a small part
of a grid step: rounded to nearest it is gone. Here codes are chosen together. With E the error of
the codes against W + delta, X a layer's inputs and H = X'X their second moments, the error that is
felt is that of the outputs, ||E X'||^2 = tr(E H E'). Coordinate descent lowers it: column by column
each code takes the level that is best given all the others, then each block its best absmax, which
under double quantization is one of 256 levels as well. Rows of a weight do not depend on each
other, so a column is done at once.

Two things matter as much as the descent.

- The start is timid. A code that moves because it helps a little blocks one that would help more,
  so early rounds make a move dearer: with damping p they count H_jj (1 + p) for H_jj.
- Not all of the error that is left matters alike. Most of it is noise, which averages out over the
  layers of a model. What does not is the error in what a layer writes along its adapter's
  directions (the columns of B) in response to its main inputs: to those the adapter reads (the rows
  of A), and to the inputs' principal directions. It falls short in every layer in the same way, and
  that adds up: most of the KL divergence was there. These responses are few, r (r + PRINCIPAL) a
  layer. After the timid rounds their error is added to what is aimed at, round after round, until
  it is made up for: dual ascent, with "no error there" as the constraint. The round that ends best
  is kept.

The descent over codes is that of GPTQ's relatives (arXiv:2210.17323, and QuIP's LDLQ,
arXiv:2307.13304) without their sweep from left to right, which has to move every weight off the
grid it lies on.
"""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora.adapters.lora import Factors
from qlora.config import QuantConfig
from qlora.ops import nf4
from qlora.ops.nf4 import Quantized


@dataclass(frozen=True)
class Folding:
    """A weight (out, in) about to be exported, on one device."""

    weight: Tensor | None = None
    """what the adapter is folded into, where that is no 4-bit weight, any float dtype"""
    factors: Factors | None = None
    codes: nf4.Quantized | None = None
    """else the codes of it"""
    original: Tensor | None = None
    """the weight from before quantization, where it is at hand"""

    @property
    def shape(self) -> torch.Size:
        """(out, in)"""
        return self.codes.state.shape if self.codes else self.weight.shape  # type: ignore[union-attr]

    def base(self) -> Tensor:
        """What the adapter is folded into, fp32 (out, in)."""
        return nf4.dequantize(self.codes) if self.codes else self.weight.float()  # type: ignore[union-attr]

    def in_rows(self) -> Iterator[tuple[slice, Tensor]]:
        """`base`, some rows at a time, so that little is held at once."""
        if self.codes:
            yield from nf4.in_rows(self.codes, _values_at_once(self.codes.packed))
            return
        assert self.weight is not None
        step = max(1, _values_at_once(self.weight) // self.weight.shape[1])
        for first in range(0, len(self.weight), step):
            rows = slice(first, first + step)
            yield rows, self.weight[rows].float()


def _values_at_once(tensor: Tensor) -> int:
    return 1 << 20 if tensor.device.type == "cpu" else 1 << 26


Facts = dict[str, float]


def in_full(folding: Folding, dtype: torch.dtype) -> tuple[Tensor, Facts]:
    """base + delta in fp32, cast once; and what is to be reported of an adapted layer."""
    merged = None
    sums = [0.0, 0.0, 0.0]  # of base^2, delta^2, and delta times the change
    for rows, base in folding.in_rows():
        if merged is None:
            merged = torch.empty(folding.shape, dtype=dtype, device=base.device)
        if folding.factors is None:
            merged[rows] = base
            continue
        delta = folding.factors.rows(rows).change(base)
        merged[rows] = base + delta
        change = merged[rows].float() - base
        for i, (a, b) in enumerate(((base, base), (delta, delta), (delta, change))):
            sums[i] += _dot(a, b)
    assert merged is not None
    if folding.factors is None:
        return merged, {}
    return merged, _facts(math.sqrt(sums[0]), math.sqrt(sums[1]), sums[2], sums[1])


def in_4_bits(
    folding: Folding, quant: QuantConfig, moments: Tensor | None
) -> tuple[nf4.Quantized, Facts]:
    """4-bit codes for base + delta, of the kind that `quant` says; and what is to be reported.

    Args:
        moments: sum of x x' over the layer's inputs, fp32 (in, in), if known.
    """
    base = folding.base()
    if folding.codes and not nf4.is_on_grid(folding.codes, quant):
        folding = replace(folding, weight=base, codes=None)
    if folding.factors is None:
        return folding.codes or nf4.quantize(base, quant), {}
    delta = folding.factors.change(base)
    merged = choose_codes(folding, base, delta, quant, moments)
    change = nf4.dequantize(merged) - base
    felt = delta if moments is None else delta @ moments
    norms = float(base.norm()), float(delta.norm())
    found = _facts(*norms, _dot(felt, change), _dot(felt, delta))
    if folding.codes:
        found["codes_changed"] = nf4.codes_changed(folding.codes, merged)
    return merged, found


def choose_codes(
    folding: Folding, base: Tensor, delta: Tensor, quant: QuantConfig, moments: Tensor | None
) -> nf4.Quantized:
    """Codes for base + delta (out, in), by what is known."""
    if moments is None and folding.original is not None:
        return nf4.quantize(folding.original.float() + delta, quant)
    target = base + delta
    if moments is None:
        moments = torch.eye(target.shape[1], device=target.device)
    assert folding.factors is not None
    lora_A, lora_B = folding.factors[:2]
    start = folding.codes or nf4.quantize(target, quant)
    return keep_adapter(start, target, lora_A, lora_B, moments)


def _facts(weight_norm: float, delta_norm: float, kept: float, wanted: float) -> Facts:
    """Norms, and the share of delta in the change: in the weights, or felt by a layer's inputs."""
    return {
        "weight_norm": weight_norm,
        "delta_norm": delta_norm,
        "delta_over_weight": delta_norm / weight_norm if weight_norm else math.inf,
        "kept": kept / wanted if wanted else 1.0,
    }


def _dot(a: Tensor, b: Tensor) -> float:
    """The sum of products of all values, without a tensor of them."""
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))


TIMID = (8.0, 1.0)  # damping of the rounds toward the target itself
DAMPING = 0.25  # of the rounds after, which make up for what adds up
ROUNDS = 20  # at most
GAIN = 0.05  # the rounds end when less than this share of an error is made up for at a time
BIAS = 100.0  # how much worse than noise an error is that adds up over the layers
PRINCIPAL = 64  # directions in which the inputs are largest
PATIENCE, ENOUGH = 4, 0.98  # or when that many have not lowered the cost to this share
CHUNK = 64  # columns at a time, where blocks do not lie within rows


def keep_adapter(
    start: Quantized, target: Tensor, lora_A: Tensor, lora_B: Tensor, moments: Tensor
) -> Quantized:
    """Codes and absmax near `start` that act like `target` on inputs with these moments.

    Args:
        start: the 4-bit weight (out, in) to begin with; its statistics of the second level stay.
        target: base + scaling * B A, fp32 (out, in).
        lora_A: (r, in).
        lora_B: (out, r).
        moments: sum of x x' over the layer's inputs, fp32 (in, in); its scale does not matter.

    All tensors are on one device. The result is never worse than `start` in the measure described
    above.
    """
    grid = _Grid(start)
    state = _State(grid, target, moments)
    responses = _Responses(lora_A.float(), lora_B.float(), moments)
    best, best_cost = grid.point(), state.noise() + BIAS * responses.error(state)
    gain, costs = 1.0, [best_cost]
    for round_ in range(ROUNDS):
        timid = round_ < len(TIMID)
        if not timid:
            responses.make_up_for(state, gain)
        state.sweep(TIMID[round_] if timid else DAMPING)
        cost = state.noise() + BIAS * responses.error(state)
        if cost < best_cost:
            best, best_cost = grid.point(), cost
        elif not timid:  # too much at a time
            gain /= 2
        costs.append(best_cost)
        if gain < GAIN or (len(costs) > PATIENCE and best_cost > ENOUGH * costs[-1 - PATIENCE]):
            break
    return grid.quantized(*best)


class _State:
    """A weight on its way: how far it is from the target, and what is aimed at instead.

    Everything is transposed, (in, out). What costs in * in * out is done once a sweep: `felt`, the
    moments times the error, is kept up to date.
    """

    def __init__(self, grid: "_Grid", target: Tensor, moments: Tensor) -> None:
        self.grid, self.moments = grid, moments
        self.curvature = moments.diagonal()[:, None]
        self.target = target.T.contiguous()
        self.felt = moments @ self.error()
        self.aside = torch.zeros_like(self.felt)
        """the aim less the target"""
        self.aside_felt = torch.zeros_like(self.felt)

    def error(self) -> Tensor:
        """Weight less target, (in, out)."""
        return self.grid.weight - self.target

    def noise(self) -> float:
        """The error that is felt, tr(E H E')."""
        return float((self.felt * self.error()).sum())

    def sweep(self, damping: float) -> None:
        """One pass of coordinate descent over all columns, and over the scales of blocks."""
        grid, tiny = self.grid, torch.finfo(torch.float32).tiny  # for unused inputs
        steepness = (self.curvature[:, 0] * (1 + damping)).clamp_min(tiny).reciprocal().tolist()
        for chunk, first in enumerate(range(0, len(grid.weight), grid.chunk)):
            columns = slice(first, first + grid.chunk)
            before = grid.weight[columns]
            off = before - self.target[columns] - self.aside[columns]
            pull = self.felt[columns] - self.aside_felt[columns]
            pull.addcmul_(self.curvature[columns], off, value=damping)
            inner = self.moments[columns, columns].clone()
            inner.diagonal().mul_(1 + damping)
            scale = grid.scale(chunk)
            weight = grid.descend(before, pull, inner, steepness[first:], scale)
            if grid.aligned:
                level = weight / scale.clamp_min(tiny)
                slope, bend = (pull * level).sum(0), (level * (inner @ level)).sum(0)
                weight = level * grid.move_absmax(chunk, slope, bend)
            self.felt.addmm_(self.moments[:, columns], weight - before)
            grid.weight[columns] = weight


class _Grid:
    """The points a 4-bit weight can take, and the one it takes now; transposed, (in, out)."""

    def __init__(self, quantized: Quantized) -> None:
        packed, self.state = quantized
        rows, columns = self.state.shape
        levels, order = nf4.codebook(self.state.quant_type).to(packed.device).sort(stable=True)
        self.levels, self.order = levels, order.to(torch.uint8)  # and the 4-bit code of each
        self.bounds = (levels[1:] + levels[:-1]) / 2
        self.weight = nf4.dequantize(quantized).T.contiguous()
        # Blocks run along rows. Where they do not lie within one, absmax stays as it is.
        self.aligned = columns % self.state.blocksize == 0
        self.chunk = self.state.blocksize if self.aligned else CHUNK
        absmax = nf4.absmax(quantized)
        if not self.aligned:
            absmax = absmax.repeat_interleave(self.state.blocksize)[: rows * columns]
        self.absmax = absmax.view(rows, -1).T.contiguous()  # (blocks or in, out)

    def scale(self, chunk: int) -> Tensor:
        """What the levels of a chunk of columns are multiplied with: (1, out) or (columns, out)."""
        width = 1 if self.aligned else self.chunk
        return self.absmax[chunk * width : (chunk + 1) * width]

    def descend(
        self, weight: Tensor, pull: Tensor, inner: Tensor, steepness: list[float], scale: Tensor
    ) -> Tensor:
        """Each of some columns at its best level, one after the other; `pull` is kept up to date.

        Args:
            weight: (columns, out); a new one is returned.
            pull: half the gradient (columns, out).
            inner: half the second derivative (columns, columns).
            steepness: the inverse of its diagonal.
            scale: (1, out) or (columns, out).
        """
        rows = []
        for j, (now, slope) in enumerate(zip(weight, pull, strict=True)):
            wanted = torch.sub(now, slope, alpha=steepness[j]).div_(scale[j % len(scale)])
            level = self.levels.index_select(0, torch.bucketize(wanted, self.bounds))
            rows.append(level.mul_(scale[j % len(scale)]))
            pull.addr_(inner[j], rows[-1] - now)
        return torch.stack(rows)

    def move_absmax(self, block: int, slope: Tensor, bend: Tensor) -> Tensor:
        """The absmax (out,) that lowers slope * step + bend / 2 * step^2 most, from now on used."""
        now = self.absmax[block]
        wanted = now - slope / bend.clamp_min(torch.finfo(torch.float32).tiny)
        if self.state.nested:
            wanted = self._decode(self._encode(wanted, block), block)
        step = wanted - now
        better = (slope * step + bend * step * step / 2 < 0) & (wanted > 0)
        self.absmax[block] = torch.where(better, wanted, now)
        return torch.as_tensor(self.absmax[block])

    def _second(self, block: int) -> Tensor:
        """The absmax of absmax, (out,), that the blocks of one column of blocks share."""
        blocks, rows = self.absmax.shape
        flat = torch.arange(rows, device=self.absmax.device) * blocks + block
        return torch.as_tensor(self.state.state2.absmax[flat // self.state.state2.blocksize])

    def _encode(self, absmax: Tensor, block: int) -> Tensor:
        """8-bit codes of absmax (out,)."""
        levels = self.state.state2.code
        second = self._second(block).clamp_min(torch.finfo(torch.float32).tiny)
        bounds = (levels[1:] + levels[:-1]) / 2
        return torch.bucketize((absmax - self.state.offset) / second, bounds)

    def _decode(self, code: Tensor, block: int) -> Tensor:
        level = self.state.state2.code[code]
        return torch.as_tensor(level * self._second(block) + self.state.offset)

    def point(self) -> tuple[Tensor, Tensor]:
        """A copy of where it is."""
        return self.weight.clone(), self.absmax.clone()

    def quantized(self, weight: Tensor, absmax: Tensor) -> Quantized:
        """The record of a point."""
        width = self.chunk if self.aligned else 1
        scale = absmax.repeat_interleave(width, 0)[: len(weight)]
        level = torch.bucketize((weight / scale).nan_to_num(), self.bounds)
        codes = self.order[level].T.reshape(-1)
        packed = (codes[::2] << 4 | codes[1::2]).view(-1, 1)
        state = copy(self.state)
        if self.aligned:
            if self.state.nested:
                coded = [self._encode(row, block) for block, row in enumerate(absmax)]
                state.absmax = torch.stack(coded, 1).to(torch.uint8).view(-1)
            else:
                state.absmax = absmax.T.reshape(-1)
        return Quantized(packed, state)


class _Responses:
    """What must come through: what is written along B in response to the inputs that matter."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor, moments: Tensor) -> None:
        reads = torch.cat([lora_A, _principal(moments, PRINCIPAL)])  # (k, in)
        energy = ((reads @ moments) * reads).sum(1, keepdim=True)
        there = energy[:, 0] > energy.max() * torch.finfo(torch.float32).eps
        self.reads = reads[there] / energy[there].sqrt()
        self.seen = moments @ self.reads.T  # (in, k): what the inputs have in common with each
        self.gram = self.reads @ self.seen  # (k, k)
        self.gram_inv = torch.linalg.pinv(self.gram, hermitian=True)
        self.written = torch.linalg.qr(lora_B).Q  # (out, r)

    def _wrong(self, state: _State) -> Tensor:
        """The regression of the outputs' error along B on the inputs that matter, (k, r)."""
        along_B = state.felt @ self.written  # (in, r)
        return torch.mm(self.gram_inv, self.reads @ along_B)

    def error(self, state: _State) -> float:
        """How much of the error that is felt lies there."""
        wrong = self._wrong(state)
        return float((wrong * (self.gram @ wrong)).sum())

    def make_up_for(self, state: _State, gain: float) -> None:
        """Aim to the other side of it."""
        wrong = self._wrong(state)
        state.aside.addmm_(self.reads.T @ wrong, self.written.T, alpha=-gain)
        state.aside_felt.addmm_(self.seen @ wrong, self.written.T, alpha=-gain)


def _principal(moments: Tensor, count: int) -> Tensor:
    """About the first eigenvectors of `moments` (in, in), as rows, by subspace iteration."""
    shape = (len(moments), min(count, len(moments)))
    found = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(moments)
    for _ in range(4):
        found = torch.linalg.qr(moments @ found).Q
    return found.T
