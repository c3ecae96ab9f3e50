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

On a grid of integers (GGUF, int4), which the base does not lie on, all values move. `keep_outputs`
rounds them in order (qlora.merge.rounding), a group of rows at a time (qlora.merge.coupling), and
lets the same descent follow, undamped. The systematic error is small then, and correcting it gains
nothing. The target makes up for part of what the layers before have changed (qlora.merge.streams).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from qlora.adapters.lora import Factors
from qlora.config import QuantConfig
from qlora.merge.coupling import RowGroups, low_rank, principal
from qlora.merge.grids import TINY, Grid, IntegerGrid, NF4Grid
from qlora.merge.loops import descender
from qlora.merge.moments import Moments
from qlora.merge.rounding import LEAST, InputOrder, round_in_order
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
    sums = _Sums()
    for rows, base in adapted.base_in_rows():
        if factors is None:
            folded[rows] = base
            continue
        delta = factors.rows(rows).change(base)  # (rows, r) @ (r, in) -> (rows, in)
        folded[rows] = base + delta
        sums.add(base, delta, folded[rows].float())
    return folded, sums.facts() if factors else {}


def fold_to_codes(
    adapted: AdaptedWeight, quant: QuantConfig, moments: Moments | None
) -> tuple[Quantized, Facts]:
    """4-bit codes for base + delta in the format of `quant`, and facts for the report.

    `moments` are those of the layer, if known; of its inputs' alone use is made.
    """
    codes, weight, factors = adapted.codes, adapted.weight, adapted.factors
    base = nf4.dequantize(codes) if codes else weight.float()  # type: ignore[union-attr]
    if factors is None:
        return codes or nf4.quantize(base, quant), {}
    delta = factors.change(base)
    inputs = moments and moments.inputs
    chosen = choose_codes(adapted, base, delta, quant, inputs)
    facts = _Sums().add(base, delta, nf4.dequantize(chosen), inputs).facts()
    if codes:
        facts["codes_changed"] = nf4.codes_changed(codes, chosen)
    return chosen, facts


def fold_to_grid(
    adapted: AdaptedWeight, kind: type[IntegerGrid], moments: Moments | None
) -> tuple[IntegerGrid, Facts]:
    """Values on a grid that the base does not lie on, for base + delta, and facts for the report.

    `moments` as in `fold_to_codes`; without them, and without an adapter, the nearest values.
    """
    if moments is None or adapted.factors is None:
        return _nearest(adapted, kind)
    base = torch.cat([rows for _, rows in adapted.base_in_rows()])
    delta = adapted.factors.change(base)
    target = base + delta
    grid = kind(target.T.contiguous())
    keep_outputs(grid, target, moments)
    return grid, _Sums().add(base, delta, grid.weight.T, moments.inputs).facts()


def _nearest(adapted: AdaptedWeight, kind: type[IntegerGrid]) -> tuple[IntegerGrid, Facts]:
    """The nearest values, some rows at a time to save memory."""
    parts, sums = [], _Sums()
    for rows, base in adapted.base_in_rows():
        delta = adapted.factors.rows(rows).change(base) if adapted.factors else None
        target = base if delta is None else base + delta
        parts.append(part := kind(target.T.contiguous()))
        if delta is not None:
            sums.add(base, delta, part.weight.T)
    return kind.joined(parts), sums.facts() if adapted.factors else {}


def keep_outputs(grid: IntegerGrid, target: Tensor, moments: Moments) -> None:
    """Choose the values on the grid that change the model least from `target` (out, in), fp32.

    Without moments of the outputs all errors there count alike.
    """
    inputs = moments.inputs + (RIDGE * moments.inputs.diagonal()).diag()
    order, factor = InputOrder(inputs), _factor(inputs, RANK)
    if moments.drift is not None:
        target = target + STEP * _made_up(target, inputs, factor, moments.drift)

    def choose(grid: IntegerGrid, target: Tensor) -> None:
        round_in_order(grid, target, order)
        descent = _Descent(grid, target, inputs, factor)
        for _ in range(SWEEPS):
            descent.sweep(0.0)

    if moments.outputs is None:
        choose(grid, target)
        return
    coupled = RowGroups(moments.outputs, target.shape[1])
    for number, rows in enumerate(coupled.groups):
        part = grid.rows(rows)
        choose(part, target[rows] + coupled.owed(number))
        coupled.add(number, part.weight.T - target[rows])
        grid.put(rows, part)


def _made_up(target: Tensor, inputs: Tensor, factor: Tensor, drift: Tensor) -> Tensor:
    """W C inverse(H), (out, in), of the inputs' main directions V (k, in) alone, those of `factor`:
    W C V' inverse(V H V') V. That costs k, not in, products a weight."""
    span = factor / inputs.diagonal().clamp_min(TINY)  # V y are y's principal components,
    gram = span @ inputs @ span.T  # (k, k)
    size = gram.diagonal().clamp_min(TINY).sqrt()[:, None]
    span, gram = span / size, gram / size / size.T  # of size 1
    gram.diagonal().add_(LEAST)  # rows of zeros
    solved = torch.cholesky_solve(span, torch.linalg.cholesky(gram))
    return torch.mm(target @ (drift @ span.T), solved)


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
    grid = NF4Grid(adapted.codes or nf4.quantize(target, quant))
    keep_adapter(grid, target, *adapted.factors[:2], moments)
    return grid.quantized()


@dataclass
class _Sums:
    """Squares of base and delta, and inner products with delta's outputs."""

    base_sq: float = 0.0
    delta_sq: float = 0.0
    kept: float = 0.0
    total: float = 0.0

    def add(
        self, base: Tensor, delta: Tensor, chosen: Tensor, moments: Tensor | None = None
    ) -> Self:
        """Rows (rows, in) that were chosen for base + delta; `moments` (in, in) of the inputs."""
        outputs = delta if moments is None else delta @ moments  # (rows, in) @ (in, in)
        self.base_sq += _dot(base, base)
        self.delta_sq += _dot(delta, delta)
        self.kept += _dot(outputs, chosen - base)
        self.total += _dot(outputs, delta)
        return self

    def facts(self) -> Facts:
        """Norms, and the share of delta that was kept."""
        base, delta = math.sqrt(self.base_sq), math.sqrt(self.delta_sq)
        return {
            "weight_norm": base,
            "delta_norm": delta,
            "delta_over_weight": delta / base if base else math.inf,
            "kept": self.kept / self.total if self.total else 1.0,
        }


def _dot(a: Tensor, b: Tensor) -> float:
    """The sum of a * b, without a tensor of the products."""
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))


# ---- codes that keep the adapter ----

RIDGE = 0.07  # of the energy of each input, added to it, so that the moments hold for other inputs
STEP = 0.5  # toward what makes up for the layers before, see qlora.merge.streams
SWEEPS = 1  # of the descent after rounding in order; another gains 2 %

DAMPED = (8.0, 1.0)  # damping of the first rounds, toward the target itself
DAMPING = 0.25  # of the later rounds, which correct the systematic error
ROUNDS = 7  # at most; of 6 the KL divergence is a tenth higher, of 8 it is 5 % lower
MIN_GAIN = 0.05  # stop when a round corrects less than this share of the systematic error
BIAS = 100.0  # weight of the systematic error relative to noise
RANK, RANK_SHARE = 256, 16  # of the moments between panels: at least RANK, or 1 / 16 of the inputs
RANK_NF4 = 64  # where most codes stay
PRINCIPAL = 64  # principal directions of the inputs
PATIENCE, ENOUGH = 4, 0.98  # stop when that many rounds have not lowered the cost to this share
PANEL = 256  # columns at a time, whole blocks


def keep_adapter(
    grid: Grid, target: Tensor, lora_A: Tensor, lora_B: Tensor, moments: Tensor
) -> None:
    """Choose the values on the grid whose outputs are close to `target`'s on the layer's inputs.

    Args:
        grid: with the choice to begin with.
        target: base + scaling * B A, fp32 (out, in).
        lora_A, lora_B: (r, in), (out, r).
        moments: sum of x x' over the layer's inputs, fp32 (in, in); its scale does not matter.

    All tensors are on one device. The cost, noise + BIAS * systematic error, is never higher than
    that of the first choice.
    """
    descent = _Descent(grid, target, moments, _factor(moments, RANK_NF4))
    responses = _Responses(lora_A.float(), lora_B.float(), moments)
    best, best_cost = grid.choice(), descent.noise() + BIAS * responses.error(descent)
    gain, costs = 1.0, [best_cost]
    for round_ in range(ROUNDS):
        damped = round_ < len(DAMPED)
        if not damped:
            responses.correct(descent, gain)
        descent.sweep(DAMPED[round_] if damped else DAMPING)
        cost = descent.noise() + BIAS * responses.error(descent)
        if cost < best_cost:
            best, best_cost = grid.choice(), cost
        elif not damped:  # the correction was too large
            gain /= 2
        costs.append(best_cost)
        if gain < MIN_GAIN or (len(costs) > PATIENCE and best_cost > ENOUGH * costs[-1 - PATIENCE]):
            break
    grid.restore(best)


class _Descent:
    """Coordinate descent of a weight on the grid toward the target plus a correction.

    All tensors are transposed, (in, out). The moments are exact within a panel of columns, and of
    low rank between panels, where they are `factor`' `factor`; `response`, factor @ error, is kept
    up to date. A sweep costs rank * in * out, not in * in * out.
    """

    def __init__(self, grid: Grid, target: Tensor, moments: Tensor, factor: Tensor) -> None:
        self.grid, self.moments, self.factor = grid, moments, factor
        self.target = target.T.contiguous()
        self.panel = math.ceil(PANEL / grid.block) * grid.block
        self.response = factor @ self.error()  # (k, in) @ (in, out) -> (k, out)
        self.correction: tuple[Tensor, Tensor] | None = None  # (in, r), (r, out)

    def error(self) -> Tensor:
        """Weight less target, (in, out)."""
        return self.grid.weight - self.target

    def panels(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns of the weight, c, and what their moments (c, c) are beyond `factor`."""
        for first in range(0, len(self.target), self.panel):
            columns = slice(first, first + self.panel)
            of = self.factor[:, columns]
            yield columns, torch.addmm(self.moments[columns, columns], of.T, of, alpha=-1)

    def noise(self) -> float:
        """The error in the outputs, tr(E H E')."""
        response = self.response
        if self.correction is not None:
            ahead, basis = self.correction
            response = torch.addmm(response, self.factor @ ahead, basis)
        noise = _dot(response, response)
        for columns, rest in self.panels():
            error = self.grid.weight[columns] - self.target[columns]
            noise += _dot(error, rest @ error)
        return noise

    def correct(self, ahead: Tensor, basis: Tensor) -> None:
        """Add ahead @ basis, (in, r) @ (r, out), to what the descent moves toward."""
        self.response.addmm_(self.factor @ ahead, basis, alpha=-1)
        before = 0 if self.correction is None else self.correction[0]
        self.correction = (before + ahead, basis)

    def sweep(self, damping: float) -> None:
        """One pass over all columns, and over the scales of blocks."""
        grid = self.grid
        for columns, rest in self.panels():
            of = self.factor[:, columns]  # (k, c)
            before = grid.weight[columns].clone()
            error = before - self.target[columns]
            if self.correction is not None:
                error.addmm_(self.correction[0][columns], self.correction[1], alpha=-1)
            curvature = self.moments.diagonal()[columns] * damping
            rest.diagonal().add_(curvature)
            gradient = torch.addmm(rest @ error, of.T, self.response)  # (c, out)
            hessian = self.moments[columns, columns] + curvature.diag()
            _Panel(grid, columns.start, gradient, hessian).descend()
            self.response.addmm_(of, grid.weight[columns] - before)


def _factor(moments: Tensor, rank: int) -> Tensor:
    """(k, in), the part of the moments that is kept between panels; at least of `rank`."""
    return low_rank(moments, max(rank, len(moments) // RANK_SHARE))


class _Panel:
    """Some columns of a weight, `first` and on. Only their own part of the gradient (c, out) is
    kept up to date while they change; with `hessian` (c, c), it is half of that of the cost."""

    def __init__(self, grid: Grid, first: int, gradient: Tensor, hessian: Tensor) -> None:
        self.grid, self.first, self.gradient, self.hessian = grid, first, gradient, hessian
        self.weight = grid.weight[first : first + len(gradient)]  # a view, changed in place

    def descend(self) -> None:
        """One block after the other: its codes, then its scale and shift."""
        grid, size = self.grid, self.grid.block
        for first in range(0, len(self.weight), size):
            block = slice(first, first + size)
            before = self.weight[block].clone()
            self._move_codes(block)
            if grid.moves:
                self._move_scales(block)
            rest = slice(first + size, None)
            self.gradient[rest].addmm_(self.hessian[rest, block], self.weight[block] - before)

    def _move_codes(self, block: slice) -> None:
        """Columns at their best levels, each given those before it."""
        grid, at = self.grid, (self.first + block.start) // self.grid.block
        scale = grid.scale[at]
        shift = torch.zeros_like(scale) if grid.shift is None else grid.shift[at]
        own = self.weight[block], self.gradient[block], self.hessian[block, block], scale, shift
        descender(scale.device, columns=len(own[0]))(*own, grid)

    def _move_scales(self, columns: slice) -> None:
        """A block's scale and shift, where others that can be stored lower the cost: the best ones
        together, rounded, or another shift alone."""
        grid, block = self.grid, (self.first + columns.start) // self.grid.block
        scale, hessian = grid.scale[block].clone(), self.hessian[columns, columns]
        gradient = self.gradient[columns]
        shift = None if grid.shift is None else grid.shift[block].clone()
        weight = self.weight[columns] if shift is None else self.weight[columns] - shift
        level = (weight / scale).nan_to_num(0, 0, 0)  # (c, out)
        # the cost of a step s: slope * s + bend / 2 * s^2, each (out,)
        slope, bend = (gradient * level).sum(0), (level * (hessian @ level)).sum(0)
        wanted = [scale - slope / bend.clamp_min(TINY)]
        if (
            shift is not None
        ):  # and of a shift's step t: + slope_1 * t + bend_1 / 2 * t^2 + cross * s t
            ones = hessian.sum(1)
            slope_1, bend_1, cross = gradient.sum(0), ones.sum().clamp_min(TINY), ones @ level
            bend_0 = (bend - cross * cross / bend_1).clamp_min(TINY)  # with the best t for each s
            wanted = [scale - (slope - cross * slope_1 / bend_1) / bend_0, scale]
        least = torch.zeros_like(scale)
        for each in wanted:
            new, low = grid.nearest(block, each, shift)
            step = new - scale
            if shift is not None:
                new, low = grid.nearest(block, new, shift - (slope_1 + cross * step) / bend_1)
                step = new - scale
            cost = (slope + bend / 2 * step) * step
            if shift is not None and low is not None:
                move = low - shift
                cost += (slope_1 + bend_1 / 2 * move + cross * step) * move
            better = (cost < least) & (new * scale > 0)
            least = torch.where(better, cost, least)
            grid.scale[block] = torch.where(better, new, grid.scale[block])
            if grid.shift is not None and low is not None:
                grid.shift[block] = torch.where(better, low, grid.shift[block])
        self.weight[columns] = level * grid.scale[block]
        if grid.shift is not None:
            self.weight[columns] += grid.shift[block]


class _Responses:
    """The systematic error: outputs along B in response to the main directions of the inputs."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor, moments: Tensor) -> None:
        _, vectors = principal(moments, 2 * PRINCIPAL)  # twice as many make these accurate
        directions = torch.cat([lora_A, vectors[:PRINCIPAL]])  # (k, in)
        energy = ((directions @ moments) * directions).sum(1, keepdim=True)  # (k, 1)
        occurs = energy[:, 0] > energy.max() * torch.finfo(torch.float32).eps
        self.directions = directions[occurs] / energy[occurs].sqrt()
        self.gradients = self.directions @ moments  # (k, in) @ (in, in) -> (k, in)
        self.gram = self.gradients @ self.directions.T  # (k, k)
        self.gram_inv = torch.linalg.pinv(self.gram, hermitian=True)
        self.basis = torch.linalg.qr(lora_B).Q  # (out, r), orthonormal

    def _regression(self, descent: _Descent) -> Tensor:
        """Coefficients (k, r) of the outputs' error along B, by least squares."""
        along_B = descent.error() @ self.basis  # (in, out) @ (out, r) -> (in, r)
        return torch.mm(self.gram_inv, self.gradients @ along_B)  # (k, k) @ (k, r)

    def error(self, descent: _Descent) -> float:
        """The part of tr(E H E') that these coefficients explain."""
        coefficients = self._regression(descent)
        return float((coefficients * (self.gram @ coefficients)).sum())

    def correct(self, descent: _Descent, gain: float) -> None:
        """Subtract `gain` times the error from the target."""
        coefficients = self._regression(descent)  # (in, k) @ (k, r)
        descent.correct(-gain * (self.directions.T @ coefficients), self.basis.T)
