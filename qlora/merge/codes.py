"""Add an adapter to a weight, in the format that is written.

    16 or 32 bits    W + scaling * B A, in fp32, and one cast
    4 bits           codes that approximate W + scaling * B A

The base of QLoRA lies exactly on the 4-bit grid and the adapter's change is a small part of a grid
step, so rounding to the nearest code loses it. `choose_codes` keeps it in one of two ways:

- without moments of the layer's inputs, if the weight from before quantization is known: that plus
  the change is rounded. The quantization error dithers the small change.
- otherwise `keep_adapter` chooses all codes together. Let E be the error of the codes against
  W + delta, X the layer's inputs and H = X'X. The error in the outputs is ||E X'||^2 = tr(E H E').
  Coordinate descent lowers it: column by column each code takes the level that is best given all
  others, then each block its best absmax (with double quantization, one of 256 levels). Rows of a
  weight are independent, so a column is computed at once.

`keep_adapter` adds two steps to the descent, which gain as much as the descent itself.

- The first rounds are damped: they use H_jj (1 + p) for H_jj, so that a code that moves for a small
  gain does not block another one's larger gain.
- Systematic error weighs more. Most error is noise, which averages out over the layers of a model.
  The error along the columns of B in response to the main inputs (those that the rows of A read,
  and the principal directions of the inputs) has the same sign in every layer and adds up; most of
  the KL divergence was there. These responses are few, r (r + PRINCIPAL) a layer. After the damped
  rounds their error is subtracted from the target, round after round, until it vanishes: dual
  ascent with "no systematic error" as the constraint. The best round is kept.

The descent is that of GPTQ's relatives (arXiv:2210.17323, and QuIP's LDLQ, arXiv:2307.13304),
without their sweep from left to right, which would move every weight off its grid point.
"""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora.adapters.lora import Factors
from qlora.config import QuantConfig
from qlora.ops import nf4
from qlora.ops.nf4 import Quantized

Facts = dict[str, float]  # of an adapted layer, for the report


@dataclass(frozen=True)
class AdaptedWeight:
    """A weight (out, in) and its adapter, on one device."""

    weight: Tensor | None = None  # the base in a float dtype; None if `codes` holds it
    factors: Factors | None = None  # the adapter, if the layer has one
    codes: Quantized | None = None  # the base as 4-bit codes, which a 4-bit output may keep
    original: Tensor | None = None  # the weight from before quantization, if known

    def base_in_rows(self) -> Iterator[tuple[slice, Tensor]]:
        """The base in fp32, some rows (rows, in) at a time to save memory."""
        stored = self.codes.packed if self.codes else self.weight
        assert stored is not None
        values = 1 << 20 if stored.device.type == "cpu" else 1 << 26
        if self.codes:
            yield from nf4.in_rows(self.codes, values)
            return
        step = max(1, values // stored.shape[1])
        for first in range(0, len(stored), step):
            rows = slice(first, first + step)
            yield rows, stored[rows].float()


# ---- one weight, folded ----


def fold(adapted: AdaptedWeight, dtype: torch.dtype) -> tuple[Tensor, Facts]:
    """base + delta (out, in), computed in fp32 and cast once, and facts for the report."""
    codes, weight, factors = adapted.codes, adapted.weight, adapted.factors
    shape = codes.state.shape if codes else weight.shape  # type: ignore[union-attr]
    device = codes.packed.device if codes else weight.device  # type: ignore[union-attr]
    folded = torch.empty(shape, dtype=dtype, device=device)
    base_sq = delta_sq = delta_change = 0.0
    for rows, base in adapted.base_in_rows():
        if factors is None:
            folded[rows] = base
            continue
        delta = factors.rows(rows).change(base)  # (rows, r) @ (r, in) -> (rows, in)
        folded[rows] = base + delta
        base_sq += _dot(base, base)
        delta_sq += _dot(delta, delta)
        delta_change += _dot(delta, folded[rows].float() - base)
    if factors is None:
        return folded, {}
    return folded, _facts(math.sqrt(base_sq), math.sqrt(delta_sq), delta_change, delta_sq)


def fold_to_codes(
    adapted: AdaptedWeight, quant: QuantConfig, moments: Tensor | None
) -> tuple[Quantized, Facts]:
    """4-bit codes for base + delta in the format of `quant`, and facts for the report.

    `moments` is the sum of x x' over the layer's inputs, fp32 (in, in), if known.
    """
    codes, weight, factors = adapted.codes, adapted.weight, adapted.factors
    base = nf4.dequantize(codes) if codes else weight.float()  # type: ignore[union-attr]
    if factors is None:
        return codes or nf4.quantize(base, quant), {}
    delta = factors.change(base)
    chosen = choose_codes(adapted, base, delta, quant, moments)
    change = nf4.dequantize(chosen) - base
    output_delta = delta if moments is None else delta @ moments  # (out, in) @ (in, in)
    kept, total = _dot(output_delta, change), _dot(output_delta, delta)
    facts = _facts(float(base.norm()), float(delta.norm()), kept, total)
    if codes:
        facts["codes_changed"] = nf4.codes_changed(codes, chosen)
    return chosen, facts


def choose_codes(
    adapted: AdaptedWeight, base: Tensor, delta: Tensor, quant: QuantConfig, moments: Tensor | None
) -> Quantized:
    """Codes for base + delta (out, in); the module docstring says how."""
    if moments is None and adapted.original is not None:
        return nf4.quantize(adapted.original.float() + delta, quant)
    target = base + delta
    if moments is None:
        moments = torch.eye(target.shape[1], device=target.device)
    assert adapted.factors is not None
    start = adapted.codes or nf4.quantize(target, quant)
    return keep_adapter(start, target, *adapted.factors[:2], moments)


def _facts(weight_norm: float, delta_norm: float, kept: float, total: float) -> Facts:
    """Norms, and the share of delta that was kept; kept and total are inner products with delta."""
    return {
        "weight_norm": weight_norm,
        "delta_norm": delta_norm,
        "delta_over_weight": delta_norm / weight_norm if weight_norm else math.inf,
        "kept": kept / total if total else 1.0,
    }


def _dot(a: Tensor, b: Tensor) -> float:
    """The sum of a * b, without a tensor of the products."""
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))


# ---- codes that keep the adapter ----

DAMPED = (8.0, 1.0)  # damping of the first rounds, toward the target itself
DAMPING = 0.25  # of the later rounds, which correct the systematic error
ROUNDS = 20  # at most
MIN_GAIN = 0.05  # stop when a round corrects less than this share of the systematic error
BIAS = 100.0  # weight of the systematic error relative to noise
PRINCIPAL = 64  # principal directions of the inputs
PATIENCE, ENOUGH = 4, 0.98  # stop when that many rounds have not lowered the cost to this share
CHUNK = 64  # columns at a time, where blocks cross rows
TINY = torch.finfo(torch.float32).tiny


def keep_adapter(
    start: Quantized, target: Tensor, lora_A: Tensor, lora_B: Tensor, moments: Tensor
) -> Quantized:
    """Codes and absmax near `start` whose outputs are close to `target`'s on the layer's inputs.

    Args:
        start: the 4-bit weight (out, in) to begin with; its second-level statistics are kept.
        target: base + scaling * B A, fp32 (out, in).
        lora_A, lora_B: (r, in), (out, r).
        moments: sum of x x' over the layer's inputs, fp32 (in, in); its scale does not matter.

    All tensors are on one device. The cost, noise + BIAS * systematic error, is never higher than
    that of `start`.
    """
    grid = _Grid(start)
    descent = _Descent(grid, target, moments)
    responses = _Responses(lora_A.float(), lora_B.float(), moments)
    best, best_cost = grid.snapshot(), descent.noise() + BIAS * responses.error(descent)
    gain, costs = 1.0, [best_cost]
    for round_ in range(ROUNDS):
        damped = round_ < len(DAMPED)
        if not damped:
            responses.correct(descent, gain)
        descent.sweep(DAMPED[round_] if damped else DAMPING)
        cost = descent.noise() + BIAS * responses.error(descent)
        if cost < best_cost:
            best, best_cost = grid.snapshot(), cost
        elif not damped:  # the correction was too large
            gain /= 2
        costs.append(best_cost)
        if gain < MIN_GAIN or (len(costs) > PATIENCE and best_cost > ENOUGH * costs[-1 - PATIENCE]):
            break
    return grid.quantized(*best)


class _Descent:
    """Coordinate descent of a weight on the grid toward the target plus a correction.

    All tensors are transposed, (in, out). `gradient`, moments @ error, is half the gradient of the
    noise. It is updated with each change, as computing it costs in * in * out.
    """

    def __init__(self, grid: "_Grid", target: Tensor, moments: Tensor) -> None:
        self.grid, self.moments = grid, moments
        self.curvature = moments.diagonal()[:, None]  # (in, 1)
        self.target = target.T.contiguous()
        self.gradient = moments @ self.error()  # (in, in) @ (in, out) -> (in, out)
        self.correction = torch.zeros_like(self.gradient)
        self.correction_gradient = torch.zeros_like(self.gradient)  # moments @ correction

    def error(self) -> Tensor:
        """Weight less target, (in, out)."""
        return self.grid.weight - self.target

    def noise(self) -> float:
        """The error in the outputs, tr(E H E')."""
        return float((self.gradient * self.error()).sum())

    def sweep(self, damping: float) -> None:
        """One pass over all columns, and over the scales of blocks."""
        grid = self.grid
        inverse = (self.curvature[:, 0] * (1 + damping)).clamp_min(TINY).reciprocal().tolist()
        for chunk, first in enumerate(range(0, len(grid.weight), grid.chunk)):
            columns = slice(first, first + grid.chunk)  # c columns of the weight: (c, out) here
            width = 1 if grid.aligned else grid.chunk
            scale = grid.absmax[chunk * width : (chunk + 1) * width]  # (1, out) or (c, out)
            before = grid.weight[columns]
            error = before - self.target[columns] - self.correction[columns]
            gradient = self.gradient[columns] - self.correction_gradient[columns]
            gradient.addcmul_(self.curvature[columns], error, value=damping)
            hessian = self.moments[columns, columns].clone()
            hessian.diagonal().mul_(1 + damping)
            weight = grid.descend(before, gradient, hessian, inverse[first:], scale)
            if grid.aligned:
                level = weight / scale.clamp_min(TINY)
                slope = (gradient * level).sum(0)  # (out,)
                curvature = (level * (hessian @ level)).sum(0)  # (c, c) @ (c, out) -> (out,)
                weight = level * grid.move_absmax(chunk, slope, curvature)
            self.gradient.addmm_(self.moments[:, columns], weight - before)  # (in, c) @ (c, out)
            grid.weight[columns] = weight


class _Grid:
    """The values that a 4-bit weight can have, and its current one; transposed, (in, out)."""

    def __init__(self, quantized: Quantized) -> None:
        packed, self.state = quantized
        rows, columns = self.state.shape
        levels, order = nf4.codebook(self.state.quant_type).to(packed.device).sort(stable=True)
        self.levels, self.order = levels, order.to(torch.uint8)  # ascending, and the code of each
        self.bounds = (levels[1:] + levels[:-1]) / 2
        self.weight = nf4.dequantize(quantized).T.contiguous()
        # Blocks run along rows. If they cross rows, absmax is left unchanged.
        self.aligned = columns % self.state.blocksize == 0
        self.chunk = self.state.blocksize if self.aligned else CHUNK
        absmax = nf4.absmax(quantized)
        if not self.aligned:
            absmax = absmax.repeat_interleave(self.state.blocksize)[: rows * columns]
        elif self.state.nested:
            second = self.state.state2  # the absmax of absmax, (blocks of a row, out)
            each = second.absmax.repeat_interleave(second.blocksize)[: len(absmax)]
            self.second = each.view(rows, -1).T.contiguous()
        self.absmax = absmax.view(rows, -1).T.contiguous()  # (blocks of a row or in, out)

    def descend(
        self, weight: Tensor, gradient: Tensor, hessian: Tensor, inverse: list[float], scale: Tensor
    ) -> Tensor:
        """The columns (c, out) at their best levels, found one after the other.

        `gradient` (c, out), which is updated, and `hessian` (c, c) are half of them; `inverse` is
        that of the diagonal; `scale` is (1, out) or (c, out).
        """
        rows = []
        for j, (current, slope) in enumerate(zip(weight, gradient, strict=True)):
            ideal = torch.sub(current, slope, alpha=inverse[j]).div_(scale[j % len(scale)])
            level = self.levels.index_select(0, torch.bucketize(ideal, self.bounds))
            rows.append(level.mul_(scale[j % len(scale)]))
            gradient.addr_(hessian[j], rows[-1] - current)  # outer product (columns,) x (out,)
        return torch.stack(rows)

    def move_absmax(self, block: int, slope: Tensor, curvature: Tensor) -> Tensor:
        """Move absmax (out,) of a block where that lowers slope * step + curvature / 2 * step^2."""
        current = self.absmax[block]
        ideal = current - slope / curvature.clamp_min(TINY)
        if self.state.nested:
            code = self._encode(ideal, self.second[block])
            ideal = self.state.state2.code[code] * self.second[block] + self.state.offset
        step = ideal - current
        better = (slope * step + curvature * step * step / 2 < 0) & (ideal > 0)
        self.absmax[block] = torch.where(better, ideal, current)
        return torch.as_tensor(self.absmax[block])

    def _encode(self, absmax: Tensor, second: Tensor) -> Tensor:
        """8-bit codes of absmax."""
        levels = self.state.state2.code
        bounds = (levels[1:] + levels[:-1]) / 2
        return torch.bucketize((absmax - self.state.offset) / second.clamp_min(TINY), bounds)

    def snapshot(self) -> tuple[Tensor, Tensor]:
        """A copy of the current weight and absmax."""
        return self.weight.clone(), self.absmax.clone()

    def quantized(self, weight: Tensor, absmax: Tensor) -> Quantized:
        """The 4-bit weight of a snapshot."""
        scale = absmax.repeat_interleave(self.chunk if self.aligned else 1, 0)  # (in, out)
        level = torch.bucketize((weight / scale).nan_to_num(), self.bounds)
        codes = self.order[level].T.reshape(-1)  # (in, out) -> (out * in,)
        packed = (codes[::2] << 4 | codes[1::2]).view(-1, 1)  # two a byte, first in the high half
        state = copy(self.state)
        if self.aligned and self.state.nested:
            state.absmax = self._encode(absmax, self.second).T.to(torch.uint8).reshape(-1)
        elif self.aligned:
            state.absmax = absmax.T.reshape(-1)
        return Quantized(packed, state)


class _Responses:
    """The systematic error: outputs along B in response to the main directions of the inputs."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor, moments: Tensor) -> None:
        directions = torch.cat([lora_A, _principal(moments, PRINCIPAL)])  # (k, in)
        energy = ((directions @ moments) * directions).sum(1, keepdim=True)  # (k, 1)
        occurs = energy[:, 0] > energy.max() * torch.finfo(torch.float32).eps
        self.directions = directions[occurs] / energy[occurs].sqrt()
        self.gradients = moments @ self.directions.T  # (in, in) @ (in, k) -> (in, k)
        self.gram = self.directions @ self.gradients  # (k, k)
        self.gram_inv = torch.linalg.pinv(self.gram, hermitian=True)
        self.basis = torch.linalg.qr(lora_B).Q  # (out, r), orthonormal

    def _regression(self, descent: _Descent) -> Tensor:
        """Coefficients (k, r) of the outputs' error along B, by least squares."""
        along_B = descent.gradient @ self.basis  # (in, out) @ (out, r) -> (in, r)
        return torch.mm(self.gram_inv, self.directions @ along_B)  # (k, k) @ (k, r)

    def error(self, descent: _Descent) -> float:
        """The part of tr(E H E') that these coefficients explain."""
        coefficients = self._regression(descent)
        return float((coefficients * (self.gram @ coefficients)).sum())

    def correct(self, descent: _Descent, gain: float) -> None:
        """Subtract `gain` times the error from the target."""
        coefficients = self._regression(descent)  # (in, k) @ (k, r) @ (r, out) -> (in, out)
        descent.correction.addmm_(self.directions.T @ coefficients, self.basis.T, alpha=-gain)
        descent.correction_gradient.addmm_(self.gradients @ coefficients, self.basis.T, alpha=-gain)


def _principal(moments: Tensor, count: int) -> Tensor:
    """The first eigenvectors of `moments` (in, in), as rows, roughly, by subspace iteration."""
    shape = (len(moments), min(count, len(moments)))
    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(moments)
    for _ in range(4):
        vectors = torch.linalg.qr(moments @ vectors).Q  # (in, in) @ (in, count)
    return vectors.T
