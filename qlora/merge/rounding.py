"""Round a weight to a grid column by column, each one's error made up for by those that follow.

With the inputs' moments H = L D L', where L is lower triangular of unit diagonal, and the error E
of the rounded weight, the error in the outputs is

    tr(E H E') = sum over columns k of  D_k |(E L)_k|^2.

Taken from the last column to the first, each is rounded where it makes (E L)_k least given those
that were rounded before: W_k + (their error) (their L). D_k is what is left of the input x_k when
the inputs before it are known; the scale and shift of a block are chosen first, where rounding
alone costs least with D_k as weights. Columns go from the largest input to the smallest.

This is GPTQ (arXiv:2210.17323) as QuIP writes it (LDLQ, arXiv:2307.13304), with GPTQ's order by
activation. Against coordinate descent alone, from the nearest values, the noise in the outputs of
SmolLM2-135M's layers is half to two thirds (Q4_0), on other text of the same kind two thirds.
"""

import torch
from torch import Tensor

from qlora.merge.grids import TINY, IntegerGrid
from qlora.merge.loops import compiled_loops, round_panel

SCALES = (0.7, 0.8, 0.9, 1.0)  # tried for a block, relative to that of rounding to nearest
PANEL = 128  # columns at a time
FITTED = 1 << 20  # values whose scales are chosen at a time
LEAST = 1e-6  # of the mean energy of an input, for those that never occur


class InputOrder:
    """The order of a layer's inputs, and the factors of their moments H in it.

    `moments` is the sum of x x' over the layer's inputs, fp32 (in, in), positive definite.
    """

    def __init__(self, moments: Tensor) -> None:
        self.order = moments.diagonal().argsort(stable=True)  # the largest last, where it begins
        self.factor, left = _factors(moments[self.order][:, self.order])  # L
        self.left = torch.empty_like(left)  # D, in the inputs' own order
        self.left[self.order] = left


def round_in_order(grid: IntegerGrid, target: Tensor, inputs: InputOrder) -> None:
    """Choose scales, shifts and values of `grid` for `target`, fp32 (out, in), in place."""
    order, factor = inputs.order, inputs.factor
    _fit_blocks(grid, target.T, inputs.left)
    target = target.T[order]
    error = torch.empty_like(target)  # of what is rounded so far: target less value
    compiled = compiled_loops(target.device)
    step = compiled.round_panel if compiled else round_panel
    for first in reversed(range(0, len(target), PANEL)):
        own, after = slice(first, first + PANEL), slice(first + PANEL, None)
        ideal = torch.addmm(target[own], factor[after, own].T, error[after])
        blocks = order[own] // grid.block
        scale = grid.scale[blocks]
        shift = torch.zeros_like(scale) if grid.shift is None else grid.shift[blocks]
        values = torch.empty_like(ideal)
        step(ideal, target[own], factor[own, own], scale, shift, grid.levels, values)
        grid.weight[order[own]] = values
        torch.sub(target[own], values, out=error[own])


def _factors(moments: Tensor) -> tuple[Tensor, Tensor]:
    """L (in, in) and D (in,) of moments = L D L'."""
    energy = moments.diagonal()  # a view: of the caller's copy
    mean = energy.mean()
    energy += torch.where(mean > 0, LEAST * mean, 1.0)
    lower = torch.linalg.cholesky(moments)
    size = lower.diagonal().clone()
    return lower.div_(size), size.square()


def _fit_blocks(grid: IntegerGrid, target: Tensor, importance: Tensor) -> None:
    """For each block the scale and shift whose nearest values cost least.

    `importance` (in,) weighs the squared error of the columns of `target` (in, out).
    """
    weights = importance.view(-1, 1, grid.block)  # (blocks, 1, columns)
    weights = weights / weights.sum(2, keepdim=True)
    step = max(1, FITTED // (grid.block * target.shape[1]))
    for first in range(0, len(weights), step):
        blocks = slice(first, first + step)
        columns = slice(first * grid.block, (first + step) * grid.block)
        values = target[columns].reshape(-1, grid.block, target.shape[1])
        scale = grid.scale[blocks].clone()
        shift = None if grid.shift is None else grid.shift[blocks].clone()
        least = torch.full_like(scale, torch.inf)
        for part in SCALES:
            tried = grid.nearest(blocks, scale * part, None if shift is None else shift * part)
            tried, cost = _least_squares(grid, blocks, tried, values, weights[blocks])
            better = cost < least
            least = torch.where(better, cost, least)
            grid.scale[blocks] = torch.where(better, tried[0], grid.scale[blocks])
            if grid.shift is not None and tried[1] is not None:
                grid.shift[blocks] = torch.where(better, tried[1], grid.shift[blocks])


Stored = tuple[Tensor, Tensor | None]  # scale and shift (blocks, out)


def _least_squares(
    grid: IntegerGrid, blocks: slice, tried: Stored, values: Tensor, weights: Tensor
) -> tuple[Stored, Tensor]:
    """The scale and shift that can be stored and fit best, with the levels nearest to `values`
    (blocks, columns, out) under `tried`, and their cost (blocks, out)."""
    scale, shift = tried
    of_values = values if shift is None else values - shift[:, None]
    levels = grid.snap((of_values / scale[:, None]).nan_to_num_(0, 0, 0))
    level = value = torch.zeros_like(scale)
    if shift is not None:
        level, value = _weighed(weights, levels), _weighed(weights, values)
    spread = levels - level[:, None]
    scale = _weighed(weights, spread * (values - value[:, None]))
    scale = scale / _weighed(weights, spread.square()).clamp_min(TINY)
    found = grid.nearest(blocks, scale, None if shift is None else value - scale * level)
    error = torch.addcmul(-values, levels, found[0][:, None])
    if found[1] is not None:
        error += found[1][:, None]
    return found, _weighed(weights, error.square())


def _weighed(weights: Tensor, values: Tensor) -> Tensor:
    """Sums over the columns, (blocks, 1, columns) @ (blocks, columns, out) -> (blocks, out)."""
    return (weights @ values)[:, 0]
